"""Models of 1B and 8B with random weights: the passes that were counted for SmolLM2, run one by one, and steps.

How many tokens, places and keys a pass has is from ``results/passes.json``, so nothing depends on what such a model
answers. The 1B model also trains; 8B with AdamW's state would not fit beside its activations.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from typing import Any, ClassVar

import torch

from selfgen import ContextGenerator
from selfgen.context.forward import PADDING, Forward, Passes, Size, numbers_for
from selfgen.context.graphs import forward_of
from selfgen.context.ragged import RaggedPass

from ...costs import SHAPES, Pass, Shape
from ...roofline import PASSES
from ..lab import Lab
from ..parts import TINY, Padding, Parts, own_text, random_model
from ..timing import from_python, synchronize
from .step import compare_steps

BUDGETS, SELF_PROBS = (2048, 8192), (0.25, 1.0, 0.5, 0.1)
ROWS, MICRO_BATCH = 32, 8
NAMES = ("Llama-3.2-1B", "Llama-3.1-8B")
WARM_UPS, ROUNDS = 2, 3


def run(lab: Lab) -> None:
    measured = json.loads(PASSES.read_text())
    shapes = [TINY] if lab.rehearsal else [shape for name in NAMES for shape in SHAPES if shape.name == name]
    for shape in shapes:
        model = random_model(shape, lab.device, torch.float32 if lab.rehearsal else torch.bfloat16)
        passes(lab, shape, model, measured)
        del model
        if not lab.rehearsal:
            torch.cuda.empty_cache()
        if shape is shapes[0]:
            train(lab, shape)
            if not lab.rehearsal:
                torch.cuda.empty_cache()


def passes(lab: Lab, shape: Shape, model: Any, measured: dict[str, Any]) -> None:
    """Seconds of all passes of a generation against a forward over the same rows in batches, by graph and as it is."""
    lengths = [min(one, 12) for one in measured["lengths"][:4]] if lab.rehearsal else measured["lengths"]
    once = teacher_forced(lab, model, lengths)
    table = f"recorded passes of {len(lengths)} rows by {shape.name}, random weights, {model.dtype}"
    generator = ContextGenerator(model, token_budget=256, balance=32.0)  # for its surroundings: eval, no gradients
    for budget, p in itertools.product(BUDGETS, SELF_PROBS):
        runs = [run for run in measured["runs"] if run["p"] == p]
        run = min(runs, key=lambda run: abs(math.log(run["budget"] / budget)))
        works = [Pass(*work) for work in run["passes"]]
        if lab.rehearsal:
            if (budget, p) != (BUDGETS[0], SELF_PROBS[0]):
                continue
            works = [Pass(6, 2, 12, 0), Pass(3, 1, 6, 0), Pass(6, 2, 12, 0)]
        slots = sum(lengths)
        forward = Forward(model) if lab.rehearsal else forward_of(model, cuda_graphs=True, graph_memory=0.5)
        ready = [a_pass(work, lengths, lab.device) for work in works]
        times = []
        with generator.computing():
            given = Given(forward, slots, len(lengths), shape.vocab)
            for _ in range(1 if lab.rehearsal else WARM_UPS + ROUNDS):
                with forward.over(given):
                    synchronize(lab.device)
                    started = time.perf_counter()
                    for ragged_pass, index in ready:
                        forward.run(given, given.take(ragged_pass, index))
                    synchronize(lab.device)
                    times.append(time.perf_counter() - started)
                coverage = forward.coverage
        forward.release()
        best = min(times)
        lab.row(
            table,
            {"p": p, "budget": budget},
            passes=len(works),
            **{
                "all passes, ms": best * 1e3,
                "a pass, ms": best / len(works) * 1e3,
                "one forward over the rows, ms": once * 1e3,
                "passes / forward": best / once,
                "replayed": coverage.replayed,
                "padding": coverage.padding,
                "tokens": sum(work.tokens for work in works),
            },
        )


class Given(Passes):
    """Passes that are given one by one; what they compute is looked at by nobody."""

    hidden_states = None
    settings = ()
    PLAN: ClassVar = {"slots": PADDING, "bounds": 0}

    def __init__(self, forward: Forward, slots: int, rows: int, vocab: int):
        self.num_slots, rows = forward.room(slots, rows)
        device = forward.device
        self.tokens = torch.randint(3, vocab, (self.num_slots,), device=device)
        self.slots, self.positions, self.index = torch.zeros(3, self.num_slots, dtype=torch.int64, device=device)
        self.bounds = torch.zeros(rows + 1, dtype=torch.int32, device=device)
        self.ranges = torch.zeros(rows, 2, dtype=torch.int64, device=device)
        self.numbers = numbers_for(0, forward.device)

    def take(self, ragged_pass: RaggedPass, index: torch.Tensor) -> Size:
        tokens, rows = ragged_pass.num_tokens, len(ragged_pass.kv_ranges)
        self.slots.fill_(PADDING)[:tokens] = ragged_pass.slots
        self.positions[:tokens] = ragged_pass.position_ids[0]
        self.bounds.fill_(tokens)[: rows + 1] = ragged_pass.cu_seqlens_q
        self.ranges[:rows] = ragged_pass.kv_ranges
        self.index.zero_()[: len(index)] = index
        return Size(tokens, len(index))

    def run(self, forward: Forward, size: Size) -> None:
        slots, positions = self.slots[: size.tokens], self.positions[: size.tokens]
        ragged_pass = RaggedPass(slots, positions[None], self.bounds, self.ranges)
        forward.logits(ragged_pass, self.tokens[slots], self.index[: size.places])


def a_pass(work: Pass, lengths: list[int], device: str) -> tuple[RaggedPass, torch.Tensor]:
    """A pass with the tokens, places and about the keys of ``work``: windows of equal size at the end of rows.

    So many rows take part that they have its keys together.
    """
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    keys, rows = 0, 0
    while rows < len(lengths) and (keys < work.keys or sum(lengths[:rows]) < work.tokens):
        keys, rows = keys + lengths[rows], rows + 1
    windows = [0] * len(lengths)
    left = work.tokens
    while left and any(windows[row] < lengths[row] for row in range(rows)):  # as equal as the rows' lengths allow
        open_rows = [row for row in range(rows) if windows[row] < lengths[row]]
        share = max(1, left // len(open_rows))
        for row in open_rows:
            more = min(share, lengths[row] - windows[row], left)
            windows[row], left = windows[row] + more, left - more
    sizes, ends = torch.tensor(windows), torch.tensor(lengths)
    places = torch.cat([torch.arange(int(end - size), int(end)) for size, end in zip(sizes, ends, strict=True)])
    row_of = torch.arange(len(lengths)).repeat_interleave(sizes)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]).int()
    ranges = torch.stack([starts, torch.where(sizes > 0, ends, 0)], 1)
    ragged = RaggedPass(
        (starts[row_of] + places).to(device), places[None].to(device), bounds.to(device), ranges.to(device)
    )
    sampled = max(1, min(work.sampled, len(places)))  # the head is run at one place at least
    return ragged, torch.linspace(0, len(places) - 1, sampled).long().to(device)


@torch.no_grad()
def teacher_forced(lab: Lab, model: Any, lengths: list[int]) -> float:
    """Seconds of forwards over rows of these lengths, padded in batches, without their heads."""
    batches = []
    for begin in range(0, len(lengths), MICRO_BATCH):
        part = lengths[begin : begin + MICRO_BATCH]
        mask = torch.arange(max(part), device=lab.device) < torch.tensor(part, device=lab.device)[:, None]
        batches.append((torch.full_like(mask, 5, dtype=torch.int64), mask.long()))

    def forward() -> None:
        for ids, mask in batches:
            model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)

    return from_python([forward], lab.device, seconds=0.01 if lab.rehearsal else 0.5)


def train(lab: Lab, shape: Shape) -> None:
    """Steps of a model with fp32 weights under bf16 autocast."""
    model = random_model(shape, lab.device, torch.float32)
    rows = own_text(model, 4, 12) if lab.rehearsal else own_text(model, ROWS)
    about = f"random weights in the shape of {shape.name}, text of its own"
    compare_steps(lab, Parts(model, Padding(), rows, about), (0.25,), most_rounds=5)
