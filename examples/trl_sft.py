"""TRL's SFTTrainer with mixed contexts: in a script of TRL's, one line changes, the import.

Run: python examples/trl_sft.py [--model NAME_OR_FOLDER] [--max_steps N] [any option of SFTConfig, as --self_prob 0.25]
"""

from dataclasses import dataclass
from itertools import permutations

from datasets import Dataset
from trl import TrlParser

from selfgen.trl import SFTConfig, SFTTrainer  # before: from trl import SFTConfig, SFTTrainer


@dataclass
class Script:
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"


if __name__ == "__main__":
    parser = TrlParser((Script, SFTConfig))
    parser.set_defaults(output_dir="outputs/trl", self_prob=0.1, max_steps=5, logging_steps=1, bf16=False)
    script, config = parser.parse_args_and_config()

    words = permutations(["one", "two", "three", "four", "five"], 4)
    rows = [{"prompt": f"Backwards: {' '.join(row)}", "completion": " " + " ".join(reversed(row))} for row in words]
    trainer = SFTTrainer(script.model, config, train_dataset=Dataset.from_list(rows))
    trainer.train()
    trainer.save_model()
