"""The command line, called in this process, and the tiny checkpoint that it is called with."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers as t

from selfgen.cli import main

from .data import WORDS, make_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def save_model(folder: Path, *, seed: int = 0, words=(), **settings) -> None:
    """A checkpoint of a tiny Llama and a tokenizer of WORDS and the ``words``."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(list(words))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = t.LlamaForCausalLM(t.LlamaConfig(vocab_size=len(WORDS) + len(words), **{**sizes, **heads, **settings}))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def flags(arguments: dict) -> list[str]:
    return [part for key, value in arguments.items() for part in (f"--{key}", str(value))]


def run(arguments: list[str], capsys) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of ``selfgen`` with these arguments."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def last_line(err: str) -> str:
    return err.strip().splitlines()[-1]


def refused(arguments: list, capsys, said: bool = False) -> str:
    """The one line by which ``selfgen`` refuses these arguments; before it may have ``said`` what it has done."""
    code, out, err = run([str(part) for part in arguments], capsys)
    assert code == 2, err
    assert "Traceback" not in err
    assert out == "" or said
    line = last_line(err)
    assert line.startswith(f"selfgen {arguments[0]}: error: ")
    return line


def history(folder) -> list[dict]:
    """The log entries of training steps."""
    return [e for e in json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"] if "loss" in e]
