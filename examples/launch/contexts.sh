#!/bin/sh
# Write contexts with one process per GPU. Options of `selfgen contexts` follow:
#
#   sh examples/launch/contexts.sh --model meta-llama/Llama-3.1-8B --dataset train.jsonl --self-prob 0.1 \
#       --output-dir contexts
#
# GPUS is the number of GPUs of this machine that are used; all of them by default. Several machines: give this very
# command on each of them, at any time, with the output in a folder that all of them see and can lock files in (NFS 4,
# Lustre with -o flock). They need not know each other. Each shard is made once, and what a machine leaves when it dies is
# made by the others. In a cluster under Slurm: srun --ntasks-per-node 1 sh examples/launch/contexts.sh ...
#
# `generate` (with --output-file) and `eval` are started in the same way.
set -eu
exec torchrun --standalone --nproc-per-node "${GPUS:-gpu}" -m selfgen contexts "$@"
