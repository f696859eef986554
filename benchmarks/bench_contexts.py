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
from selfgen.data import tokenize_rows

from .fixtures import gsm8k, load_smollm2

ROUNDS = 3
TARGET = 4.0


class Generation:
    """Context generation over the benchmark's rows."""

    def __init__(self) -> None:
        model, tokenizer = load_smollm2()
        rows, _ = tokenize_rows(gsm8k("train", 1000, 1008), tokenizer, max_length=1024)
        self.columns = [list(rows[name]) for name in ("prompt_ids", "answer_ids", "sample_id")]
        self.generator = ContextGenerator(model)
        self.token_budget = self.generator.token_budget  # measured before the clock starts

    def __call__(self, method: Method) -> MixedContext:
        prompts, references, sample_ids = self.columns
        return self.generator.generate(prompts, references, 0.25, seed=0, sample_ids=sample_ids, method=method)


@pytest.fixture(scope="module")
def generate() -> Generation:
    return Generation()


def test_fixed_point_against_sequential(benchmark, generate, report):
    sequential = []
    fixed_point = []

    def other_side():  # runs before each round and outside its clock, so the two sides alternate
        sequential.append(generate("sequential"))

    benchmark.pedantic(lambda: fixed_point.append(generate("fixed_point")), setup=other_side, rounds=ROUNDS)

    for mixed in fixed_point:
        assert all(torch.equal(a, b) for a, b in zip(mixed.tokens, sequential[0].tokens, strict=True))
    seconds = {
        name: statistics.median(mixed.stats.seconds for mixed in runs)
        for name, runs in (("sequential", sequential), ("fixed_point", fixed_point))
    }
    ratio = seconds["sequential"] / seconds["fixed_point"]
    rows = [
        {
            "method": name,
            "seconds": round(seconds[name], 2),
            "passes": mixed.stats.passes,
            "tokens computed": mixed.stats.tokens_computed,
            "per context token": round(mixed.stats.computed_per_context_token, 2),
            "self tokens": mixed.stats.self_tokens,
            "agreement": round(mixed.stats.agreement, 2),
        }
        for name, mixed in (("sequential", sequential[0]), ("fixed_point", fixed_point[0]))
    ]
    benchmark.extra_info.update(rows=rows, ratio=ratio, token_budget=generate.token_budget)
    report(f"context generation, medians of {ROUNDS}, token budget {generate.token_budget}", rows)
    report(f"fixed_point is {ratio:.1f}x faster than sequential (target {TARGET:.0f}x)", [])
    assert ratio >= TARGET
