"""A teacher on mixed contexts (on-policy distillation, GKD): learn its distribution where own tokens lead.

Run: python examples/teacher.py [--model NAME_OR_FOLDER] [--teacher NAME_OR_FOLDER] [--max-steps N]
"""

import argparse
from itertools import permutations

from datasets import Dataset

from selfgen import BSSConfig, BSSTrainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--teacher", default="HuggingFaceTB/SmolLM2-360M-Instruct", help="with the same tokenizer")
parser.add_argument("--max-steps", type=int, default=3)
parser.add_argument("--output-dir", default="outputs/teacher")
options = parser.parse_args()

words = permutations(["one", "two", "three", "four", "five"], 4)
rows = Dataset.from_list(
    [{"prompt": f"Backwards: {' '.join(row)}", "completion": " ".join(reversed(row))} for row in words]
)
config = BSSConfig(
    options.output_dir,
    self_prob=0.5,
    target="teacher",
    teacher_model=options.teacher,
    target_weight=0.5,  # the rest is the cross-entropy to the reference
    divergence="jsd",
    max_steps=options.max_steps,
    logging_steps=1,
    report_to=[],
)
trainer = BSSTrainer(options.model, config, train_dataset=rows)
trainer.train()
trainer.save_model()
