#!/usr/bin/env bash
# Train in as many processes as this machine has GPUs; each has the whole model (DDP).
#
#   examples/launch/ddp.sh --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset openai/gsm8k --dataset-config main \
#       --output-dir outputs/bss --bf16 yes --max-steps 100
#
# PROCESSES=4 takes another number. On several machines, give each of them NODES, NODE (0, 1, ...) and the address of the
# first one as MAIN (host:port).
set -euo pipefail

machines=(--standalone)
if [[ "${NODES:-1}" -gt 1 ]]; then
  machines=(--nnodes "$NODES" --node-rank "$NODE" --rdzv-backend c10d --rdzv-id selfgen --rdzv-endpoint "$MAIN")
fi
exec torchrun "${machines[@]}" --nproc-per-node "${PROCESSES:-gpu}" -m selfgen train "$@"
