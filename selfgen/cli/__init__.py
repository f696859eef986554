"""The command line: one module per command, with ``run(arguments) -> exit code``."""

from __future__ import annotations

import signal
import sys
from importlib import import_module

from .terminal import fail, first_here, meant

COMMANDS = ("train", "contexts", "generate", "eval", "inspect", "doctor")

_GO_ON = ("train", "contexts", "generate", "eval")  # where they were stopped

OVERVIEW = """\
selfgen - train language models on their own tokens, online and exact

usage: selfgen train    [CONFIG.yaml] --model NAME --dataset NAME --output-dir DIR [options]
       selfgen contexts [CONFIG.yaml] --model NAME --dataset NAME --output-dir DIR [options]
       selfgen generate [CONFIG.yaml] --model NAME --dataset NAME --output-file FILE.jsonl [options]
       selfgen eval     [CONFIG.yaml] --model NAME --dataset NAME --output-dir DIR [options]
       selfgen inspect  MODEL DATA [options]
       selfgen doctor   [MODEL] [--weights] [--trust-remote-code] [--json]

The context of each training example mixes tokens of the reference answer with self tokens, which the model samples
(batch-scheduled sampling, arXiv 2410.14655). The model learns to continue each context with the reference.

  # train on a local file with columns prompt and completion
  selfgen train --model ./SmolLM2-135M-Instruct --dataset train.jsonl --output-dir out

  # train on GSM8K from the hub; the share of self tokens grows from 0 (plain fine-tuning) to a tenth
  selfgen train --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset openai/gsm8k --dataset-config main \\
      --prompt-column question --completion-column answer \\
      --self-prob 0.1 --self-prob-schedule linear --learning-rate 2e-5 --output-dir out

  # give the same options in a file; flags win over it
  selfgen train bss.yaml --max-steps 20

  # continue after a kill
  selfgen train bss.yaml --resume-from-checkpoint last

  # offline: write the contexts once, then train on them; or do both in rounds over parts of the data
  selfgen contexts --model ./SmolLM2-135M-Instruct --dataset train.jsonl --self-prob 0.1 --output-dir contexts
  selfgen train --method bash --contexts contexts --model ./SmolLM2-135M-Instruct --output-dir out
  selfgen train --method bash --rounds 4 --dataset train.jsonl --model ./SmolLM2-135M-Instruct --output-dir out

  # train the model to correct its own answers, and then let it correct them
  selfgen train --method rac --model ./SmolLM2-135M-Instruct --dataset train.jsonl --output-dir out
  selfgen generate --correct --model out --dataset test.jsonl --output-file answers.jsonl

  # evaluate free-running answers, and losses under reference, mixed and self contexts; after a kill, run it again
  selfgen eval --model out --dataset openai/gsm8k --dataset-config main --dataset-split test \\
      --prompt-column question --completion-column answer --output-dir out/eval

  # look at a few rows token by token, here and in inspect.html
  selfgen inspect ./SmolLM2-135M-Instruct train.jsonl

Data: a .jsonl, .json, .csv, .parquet or .arrow file, a folder of them, or a data set on the Hugging Face hub, with
columns prompt and completion (text or messages), or messages. If the tokenizer has a chat template, it is applied.

selfgen COMMAND --help     its options, those that most runs need first
selfgen doctor             whether this installation works, and what a model allows
selfgen --version          the version of selfgen
selfgen train --help-all   also the less common options of transformers.TrainingArguments
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code. Ctrl-C ends it with a line, unless a program gives ``arguments``."""
    is_program, arguments = arguments is None, sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(OVERVIEW, end="")
        return 0
    if arguments[0] == "--version":
        from .. import __version__

        print(f"selfgen {__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        accepted = f"accepted: {', '.join(COMMANDS)} (selfgen --help tells what they do)"
        fail(f"unknown command {command!r}{meant(command, COMMANDS) or ';'} {accepted}", command="selfgen")
    if {"-h", "--help"} & set(rest):
        from .help import known_help

        if (shown := known_help(command, rest)) is not None:
            print(shown, end="")
            raise SystemExit(0)  # as a parser does
    try:
        return import_module(f".{command}", __name__).run(rest)  # imported only where it runs, as torch takes seconds
    except KeyboardInterrupt:
        if not is_program:
            raise
        more = " with --resume-from-checkpoint last" if command == "train" else ""
        how = f"; the same command{more} goes on from what is written" if command in _GO_ON else ""
        if first_here():
            print(f"selfgen {command}: stopped{how}", file=sys.stderr)
        return 128 + signal.SIGINT
