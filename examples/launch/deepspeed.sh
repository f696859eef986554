#!/bin/sh
# Train with DeepSpeed (pip install deepspeed), one process per GPU:
#   MODEL=meta-llama/Llama-3.1-8B DATA=train.jsonl OUT=outputs/zero GPUS=8 sh examples/launch/deepspeed.sh [options]
#
# ZERO=3 splits the weights, too; 2, the default, splits gradients and the optimizer's state.
# Several machines: torchrun --nnodes N --rdzv-backend c10d --rdzv-endpoint HOST:29500 in place of --standalone, on each.
set -eu
exec torchrun --standalone --nproc-per-node "${GPUS:-8}" -m selfgen train \
    --model "$MODEL" --dataset "$DATA" --output-dir "$OUT" --bf16 yes \
    --deepspeed "$(dirname "$0")/deepspeed_zero${ZERO:-2}.json" "$@"
