"""The command line: one module a command, with ``run(arguments) -> exit code``."""

from __future__ import annotations

import sys
from importlib import import_module

from .options import fail

COMMANDS = ("train", "contexts", "generate", "eval")

OVERVIEW = """\
selfgen - train language models on their own tokens, online and exact

usage: selfgen train    [CONFIG.yaml] --model NAME --dataset NAME --output-dir DIR [options]
       selfgen contexts [CONFIG.yaml] --model NAME --dataset NAME --output-dir DIR [options]
       selfgen generate [CONFIG.yaml] --model NAME --dataset NAME --output-file FILE.jsonl [options]
       selfgen eval     [CONFIG.yaml] --model NAME --dataset NAME --output-dir DIR [options]

Each training example's context is mixed, token by token, from the reference answer and from what the model
itself samples there (batch-scheduled sampling, arXiv 2410.14655); the model learns to continue with the reference.

  # a local file with prompt/completion columns, a tenth of the context sampled by the model
  selfgen train --model ./SmolLM2-135M-Instruct --dataset train.jsonl --output-dir out --self-prob 0.1

  # GSM8K from the hub, from plain fine-tuning to one half over the training
  selfgen train --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset openai/gsm8k --dataset-config main \\
      --prompt-column question --completion-column answer \\
      --self-prob 0.5 --self-prob-schedule linear --learning-rate 2e-5 --output-dir out

  # the same options from a file; flags win over it
  selfgen train bss.yaml --max-steps 20

  # continue after a kill
  selfgen train bss.yaml --resume-from-checkpoint last

  # offline: write the contexts once, then train on them; or both in turn, in rounds over parts of the data
  selfgen contexts --model ./SmolLM2-135M-Instruct --dataset train.jsonl --self-prob 0.1 --output-dir contexts
  selfgen train --method bash --contexts contexts --model ./SmolLM2-135M-Instruct --output-dir out
  selfgen train --method bash --rounds 4 --dataset train.jsonl --model ./SmolLM2-135M-Instruct --output-dir out

  # let the model learn to correct its own answers, and then do so
  selfgen train --method rac --model ./SmolLM2-135M-Instruct --dataset train.jsonl --output-dir out
  selfgen generate --correct --model out --dataset test.jsonl --output-file answers.jsonl

  # free-running answers, and losses under reference and own contexts; a killed evaluation continues, too
  selfgen eval --model out --dataset openai/gsm8k --dataset-config main --dataset-split test \\
      --prompt-column question --completion-column answer --output-dir out/eval

Data: columns prompt and completion (text or messages), or messages; .jsonl, .json, .parquet, .arrow, a folder, or the
hub. The chat template is applied when the tokenizer has one.

selfgen COMMAND --help     the options that most runs need
selfgen --version          which selfgen this is
selfgen train --help-all   every option of transformers.TrainingArguments too
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(OVERVIEW, end="")
        return 0
    if arguments[0] == "--version":
        from .. import __version__

        print(f"selfgen {__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        fail(f"unknown command {command!r}; there is: {', '.join(COMMANDS)}", command="selfgen")
    return import_module(f".{command}", __name__).run(rest)  # imported only where it runs, as torch takes seconds
