"""Accelerate without a Trainer: each process makes the contexts of its own rows, and DDP averages the gradients.

Run: accelerate launch examples/accelerate_loop.py [--model NAME_OR_FOLDER] [--steps N], or with python in one process.
"""

import argparse
from itertools import permutations

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfgen import ContextGenerator
from selfgen.data import Collator, pad_token_id, rows_of, tokenize_rows, write_contexts_into

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--steps", type=int, default=5)
options = parser.parse_args()

words = permutations(["one", "two", "three", "four", "five"], 4)
rows = Dataset.from_list(
    [{"prompt": f"Backwards: {' '.join(row)}", "completion": " ".join(reversed(row))} for row in words]
)
tokenizer = AutoTokenizer.from_pretrained(options.model)
dataset, _ = tokenize_rows(rows, tokenizer, max_length=256)

accelerator = Accelerator()
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
batches = DataLoader(dataset, batch_size=8, shuffle=True, collate_fn=Collator(pad_token_id(tokenizer)))
model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
generator = ContextGenerator(accelerator.unwrap_model(model))
model.train()
for step, batch in zip(range(options.steps), batches, strict=False):
    picked = rows_of(batch)
    with accelerator.autocast():
        mixed = generator.contexts(
            [row.prompt for row in picked],
            [row.reference for row in picked],
            0.25,
            seed=step,
            sample_ids=[row.sample_id for row in picked],
        )
    write_contexts_into(batch, mixed.tokens)  # in input_ids; labels stay the reference
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    loss = model(**inputs).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print(f"step {step + 1}: loss {loss.item():.3f}, {mixed.stats.self_tokens} self tokens")
