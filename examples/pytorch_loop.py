"""`ContextGenerator` in a plain PyTorch loop: contexts with the current weights, references as labels.

Run: python examples/pytorch_loop.py [--model NAME_OR_FOLDER] [--steps N]
"""

import argparse
from itertools import permutations

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfgen import ContextGenerator
from selfgen.data import Collator, pad_token_id, tokenize_rows, write_contexts_into

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--steps", type=int, default=5)
options = parser.parse_args()

words = permutations(["one", "two", "three", "four", "five"], 4)
rows = Dataset.from_list(
    [{"prompt": f"Backwards: {' '.join(row)}", "completion": " ".join(reversed(row))} for row in words]
)
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(options.model)
dataset, report = tokenize_rows(rows, tokenizer, max_length=256)
print(report)

generator = ContextGenerator(model)  # made once: it measures what a pass costs here
collate = Collator(pad_token_id(tokenizer))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
model.train()
for step in range(options.steps):
    picked = [dataset[index % len(dataset)] for index in range(8 * step, 8 * step + 8)]
    mixed = generator.contexts(
        [row["prompt_ids"] for row in picked],
        [row["answer_ids"] for row in picked],
        0.25,
        seed=step,  # other self tokens in each step
        sample_ids=[row["sample_id"] for row in picked],
    )
    batch = collate(picked)
    write_contexts_into(batch, mixed.tokens)  # in input_ids; labels stay the reference
    loss = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(
        f"step {step + 1}: loss {loss.item():.3f}, {mixed.stats.self_tokens} self tokens, {mixed.stats.passes} passes"
    )
