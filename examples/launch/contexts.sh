#!/bin/sh
# Write contexts with one process per GPU:
#   MODEL=meta-llama/Llama-3.1-8B DATA=train.jsonl OUT=contexts GPUS=8 sh examples/launch/contexts.sh [options]
#
# Several machines: give this very command on each of them, at any time, with OUT in a folder that all of them see and
# can lock files in (NFS 4, Lustre with -o flock). They need not know each other. Each shard is made once, and what a
# machine leaves when it dies is made by the others. In a cluster under Slurm: srun --ntasks-per-node 1 sh contexts.sh
#
# `generate` (with --output-file) and `eval` are started in the same way.
set -eu
exec torchrun --standalone --nproc-per-node "${GPUS:-8}" -m selfgen contexts \
    --model "$MODEL" --dataset "$DATA" --output-dir "$OUT" "$@"
