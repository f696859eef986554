"""BASH, offline and in rounds: the model writes the contexts of a part of the rows, is trained on them, and again.

Run: python examples/offline_rounds.py [--model NAME_OR_FOLDER] [--rounds N]. bash.yaml is the same for `selfgen train`.
"""

import argparse
from itertools import permutations
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfgen import BSSConfig, load_contexts, train_rounds

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--rounds", type=int, default=2)
parser.add_argument("--output-dir", default="outputs/rounds")
options = parser.parse_args()

words = permutations(["one", "two", "three", "four"], 4)
rows = Dataset.from_list(
    [{"prompt": f"Backwards: {' '.join(row)}", "completion": " ".join(reversed(row))} for row in words]
)
config = BSSConfig(
    options.output_dir,
    self_prob=0.25,
    num_train_epochs=1,  # of each round, over its part of the rows
    per_device_train_batch_size=8,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
)
train_rounds(
    lambda name: AutoModelForCausalLM.from_pretrained(name, dtype="float32"),
    options.model,
    rows,
    config,
    rounds=options.rounds,
    processing_class=AutoTokenizer.from_pretrained(options.model),
)
for folder in sorted(Path(options.output_dir).glob("round-*")):
    contexts = load_contexts(folder / "contexts")
    print(f"{folder.name}: {len(contexts)} rows, {sum(map(sum, contexts['is_self']))} self tokens")
