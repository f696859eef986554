#!/bin/sh
# Train with one process per GPU; each has the whole model (DDP). Options of `selfgen train` follow:
#
#   sh examples/launch/ddp.sh --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset openai/gsm8k --dataset-config main \
#       --prompt-column question --completion-column answer --bf16 yes --output-dir outputs/ddp
#
# GPUS is the number of GPUs of this machine that are used; all of them by default. Several machines: give the same
# command on each, with NODES (how many they are) and MAIN (host:port of one of them; the port must be free there).
set -eu
exec torchrun --nnodes "${NODES:-1}" --nproc-per-node "${GPUS:-gpu}" \
    --rdzv-backend c10d --rdzv-endpoint "${MAIN:-localhost:0}" \
    -m selfgen train "$@"
