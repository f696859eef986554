"""Context generation on real rows: parallel passes against the token-by-token loop, alternating in one run.

    make bench            (or: pytest benchmarks/bench_contexts.py)

GSM8K train rows 1000 to 1007, SmolLM2-135M-Instruct in fp32, p = 0.25, temperature 1.
"""

from __future__ import annotations

import statistics

import pytest
import torch

from selfgen import ContextGenerator, MixedContext
from selfgen.context.generator import Method
from selfgen.context.packed import packed_linears
from selfgen.data import tokenize_rows
from tools.real_parts import DEVICE, WARM_UPS, gsm8k, load_smollm2

ROUNDS = 3
TARGET = 4.0


class Generation:
    """Context generation over the benchmark's rows."""

    def __init__(self) -> None:
        model, tokenizer = load_smollm2()
        rows, _ = tokenize_rows(gsm8k("train", 1000, 1008), tokenizer, max_length=1024)
        self.columns = [list(rows[name]) for name in ("prompt_ids", "answer_ids", "sample_id")]
        self.generator = ContextGenerator(model.to(DEVICE))
        self.token_budget = self.generator.budget.tokens  # measured before the clock starts

    def __call__(self, method: Method) -> MixedContext:
        prompts, references, sample_ids = self.columns
        return self.generator.contexts(prompts, references, 0.25, seed=0, sample_ids=sample_ids, method=method)

    def packed_sequential(self) -> MixedContext:
        """The loop with the packed products of the fast path: what then is left of the gain is due to the algorithm."""
        with packed_linears(self.generator.model):
            return self("sequential")


@pytest.fixture(scope="module")
def generate() -> Generation:
    return Generation()


def test_fixed_point_against_sequential(benchmark, generate, report):
    runs: dict[str, list[MixedContext]] = {"sequential": [], "sequential, packed weights": [], "fixed_point": []}
    sequential, packed, fixed_point = runs.values()
    for _ in range(WARM_UPS):
        generate("fixed_point")

    def other_sides():  # run before each round and outside its clock, so the sides alternate
        sequential.append(generate("sequential"))
        packed.append(generate.packed_sequential())

    benchmark.pedantic(lambda: fixed_point.append(generate("fixed_point")), setup=other_sides, rounds=ROUNDS)

    for mixed in fixed_point:
        for name in ("tokens", "is_self"):
            assert all(map(torch.equal, getattr(mixed, name), getattr(sequential[0], name)))
    seconds = {name: statistics.median(mixed.stats.seconds for mixed in sides) for name, sides in runs.items()}
    rows = [
        {
            "method": name,
            "seconds": round(seconds[name], 2),
            "fixed_point is faster by": f"{seconds[name] / seconds['fixed_point']:.1f}x",
            "passes": mixed.stats.passes,
            "tokens computed": mixed.stats.tokens_computed,
            "per context token": round(mixed.stats.computed_per_context_token, 2),
            "self tokens": mixed.stats.self_tokens,
            "agreement": round(mixed.stats.agreement, 2),
        }
        for name, (mixed, *_) in runs.items()
    ]
    ratios = {name: taken / seconds["fixed_point"] for name, taken in seconds.items() if name != "fixed_point"}
    benchmark.extra_info.update(rows=rows, token_budget=generate.token_budget, ratios=ratios)
    report(f"context generation, medians of {ROUNDS}, token budget {generate.token_budget}", rows)
    assert seconds["sequential"] / seconds["fixed_point"] >= TARGET
