#!/bin/sh
# Train with DeepSpeed (pip install deepspeed), one process per GPU. Options of `selfgen train` follow:
#
#   sh examples/launch/deepspeed.sh --model meta-llama/Llama-3.1-8B --dataset train.jsonl --output-dir outputs/zero
#
# ZERO=3 splits the weights, too; 2, the default, splits gradients and the optimizer's state. GPUS, NODES and MAIN are as
# in ddp.sh.
set -eu
exec torchrun --nnodes "${NODES:-1}" --nproc-per-node "${GPUS:-gpu}" \
    --rdzv-backend c10d --rdzv-endpoint "${MAIN:-localhost:0}" \
    -m selfgen train --bf16 yes --deepspeed "$(dirname "$0")/deepspeed_zero${ZERO:-2}.json" "$@"
