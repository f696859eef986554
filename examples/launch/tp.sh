#!/bin/sh
# Train with tensor parallelism: the GPUs of a machine split each weight, and FSDP2 shards the parts between machines.
# Options of `selfgen train` follow:
#
#   GPUS=8 sh examples/launch/tp.sh --model Qwen/Qwen3-8B --dataset openai/gsm8k --dataset-config main \
#       --prompt-column question --completion-column answer --activation-checkpointing yes \
#       --per-device-train-batch-size 4 --gradient-accumulation-steps 8 --output-dir outputs/tp
#
# The GPUs of a machine have the same rows, so a step has rows for one device per machine. GPUS must divide the model's
# heads. Options that follow win: with --tp-size 2 --fsdp-size 4, eight GPUs are four such groups. Several machines: give
# the same command on each, with NODES and MAIN as in ddp.sh.
set -eu
exec torchrun --nnodes "${NODES:-1}" --nproc-per-node "${GPUS:-8}" \
    --rdzv-backend c10d --rdzv-endpoint "${MAIN:-localhost:0}" \
    -m selfgen train --bf16 yes --tp-size "${GPUS:-8}" --fsdp-size "${NODES:-1}" "$@"
