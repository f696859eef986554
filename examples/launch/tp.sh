#!/bin/sh
# Batch-scheduled sampling with a model whose weights two GPUs of one machine split between them.
# The number of processes is tp_size * fsdp_size; with --fsdp_size 2, four GPUs train on twice as many rows.
torchrun --nproc-per-node 2 -m selfgen train \
  --model Qwen/Qwen3-8B \
  --dataset openai/gsm8k --dataset_config main \
  --method bss --self_prob 0.25 \
  --tp_size 2 --fsdp_size 1 \
  --bf16 yes --activation_checkpointing yes \
  --per_device_train_batch_size 4 --gradient_accumulation_steps 8 \
  --learning_rate 1e-5 --max_steps 1000 \
  --output_dir outputs/tp
