"""RAC: learn to correct own answers, then answer, and correct the answer.

Run: python examples/rac.py [--model NAME_OR_FOLDER] [--max-steps N]
"""

import argparse
from itertools import permutations

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfgen import RACConfig, RACTrainer, generate_corrected

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--max-steps", type=int, default=3)
parser.add_argument("--output-dir", default="outputs/rac")
options = parser.parse_args()

words = permutations(["one", "two", "three", "four", "five"], 4)
rows = Dataset.from_list(
    [{"prompt": f"Backwards: {' '.join(row)}", "completion": " ".join(reversed(row))} for row in words]
)
model = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(options.model)
config = RACConfig(
    options.output_dir,
    correction_cue="Check your answer, and give the right one.",
    max_new_tokens=16,  # of own answers, which are made in each step
    max_steps=options.max_steps,
    logging_steps=1,
    report_to=[],
)
trainer = RACTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
trainer.train()
trainer.save_model()

found = generate_corrected(model, tokenizer, rows["prompt"][:3], cue=config.correction_cue, max_new_tokens=16)
for prompt, first, corrected in zip(rows["prompt"], found.first, found.corrected, strict=False):
    print(f"{prompt}\n  answer:    {tokenizer.decode(first)}\n  corrected: {tokenizer.decode(corrected)}")
