"""Answers of the engine, of ``model.generate`` and of transformers' continuous batching; greedy, of equal lengths."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from selfgen import ContextGenerator

from ..lab import Lab
from ..parts import Parts, parts_of
from ..timing import synchronize

BATCH, LONGEST, ROUNDS = 32, 64, 3
OURS, GENERATE, CONTINUOUS = "selfgen", "model.generate", "transformers' continuous batching"

Answers = list[Tensor]


def run(lab: Lab) -> None:
    rows, longest = (2, 4) if lab.rehearsal else (BATCH, LONGEST)
    parts = parts_of(lab.device, rows, torch.float32 if lab.rehearsal else torch.bfloat16, rehearsal=lab.rehearsal)
    parts.model.generation_config.eos_token_id = None  # so that no answer ends early
    parts.model.generation_config.pad_token_id = 0
    prompts = parts.columns()[0]
    sides = {OURS: ours(lab, parts, prompts, longest), GENERATE: generate(lab, parts, prompts, longest)}
    if lab.rehearsal:
        lab.note(f"{CONTINUOUS}: not rehearsed, as it asks the GPU how much memory it has.")
    else:  # last, as another's threads may hang
        sides[CONTINUOUS] = continuous(parts, prompts, longest)
    seconds: dict[str, float] = {}
    expected: Answers = []
    for name, side in sides.items():
        try:
            for _ in range(1 if lab.rehearsal else 3):
                answers = side()
            times = []
            for _ in range(1 if lab.rehearsal else ROUNDS):
                synchronize(lab.device)
                started = time.perf_counter()
                answers = side()
                synchronize(lab.device)
                times.append(time.perf_counter() - started)
        except Exception as error:  # a version or a device that does not have it
            lab.note(f"{name} did not run: {type(error).__name__}: {str(error)[:200]}")
            continue
        seconds[name] = statistics.median(times)
        expected = expected or answers
        same = sum(a.tolist()[: len(b)] == b.tolist()[: len(a)] for a, b in zip(answers, expected, strict=True))
        lab.row(
            f"answers of {rows} prompts, {longest} tokens each, {parts.about}, {parts.model.dtype}",
            {"by": name},
            ms=seconds[name] * 1e3,
            tokens=sum(map(len, answers)),
            **{f"times {OURS}": seconds[name] / seconds[OURS] if OURS in seconds else None, "the same as ours": same},
        )


def ours(lab: Lab, parts: Parts, prompts: list, longest: int) -> Callable[[], Answers]:
    small = {"token_budget": 16, "balance": 2.0} if lab.rehearsal else {}
    generator = ContextGenerator(parts.model, temperature=0.0, **small)  # type: ignore[arg-type]

    def side() -> Answers:
        found = generator.answer(prompts, max_new_tokens=longest, batch_size=BATCH, eos_token_ids=[])
        counts = {"passes": found.passes, "captured": found.captured, "replayed": found.replayed}
        lab.row("the passes of the last answers", {"by": OURS}, **counts, padding=found.padding)
        return [answer.cpu() for answer in found.tokens]

    return side


def generate(lab: Lab, parts: Parts, prompts: list, longest: int) -> Callable[[], Answers]:
    rows = [torch.tensor(prompt, device=lab.device) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    how = {"max_new_tokens": longest, "do_sample": False, "pad_token_id": 0}

    def side() -> Answers:
        return [*parts.model.generate(ids, attention_mask=mask, **how)[:, ids.shape[1] :].cpu()]

    return side


def continuous(parts: Parts, prompts: list, longest: int) -> Callable[[], Answers]:
    """On a copy of the model, whose attention it exchanges."""
    config = GenerationConfig(max_new_tokens=longest, do_sample=False, eos_token_id=-1, pad_token_id=0)
    copies: list = []

    def side() -> Answers:
        if not copies:
            copies.append(copy.deepcopy(parts.model))
        found = copies[0].generate_batch(prompts, generation_config=config, progress_bar=False)
        if len(found) != len(prompts):
            raise RuntimeError(f"{len(found)} answers to {len(prompts)} prompts")
        by_id = sorted(found.values(), key=lambda one: int("".join(filter(str.isdigit, one.request_id)) or 0))
        return [torch.tensor(one.generated_tokens) for one in by_id]

    return side
