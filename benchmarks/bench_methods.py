"""Contexts of the same rows by other methods, each alternating with ours in one run.

    make bench            (or: pytest benchmarks/bench_methods.py)

GSM8K train rows from 1000 on, SmolLM2-135M-Instruct in fp32, temperature 1. Peers run transformers as it is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
from torch import Tensor

from selfgen import ContextGenerator, MixedContext
from selfgen.data import tokenize_rows
from tools.real_parts import gsm8k, load_smollm2

from .peers import Grid, Rows, differing, full_recompute, parallel_scheduled_sampling

ROUNDS = 3
TITLE = f"contexts by method, medians of {ROUNDS}"
SHORT_ROWS, SHORT_ANSWER = 2, 48  # full recompute is cubic in the length


class Setting:
    """The rows, our generator, and the contexts of the sequential loop, which are made once per probability."""

    def __init__(self) -> None:
        self.model, tokenizer = load_smollm2()
        data, _ = tokenize_rows(gsm8k("train", 1000, 1008), tokenizer, max_length=1024)
        self.rows = Rows(list(data["prompt_ids"]), list(data["answer_ids"]), list(data["sample_id"]))
        self.generator = ContextGenerator(self.model)
        _ = self.generator.budget.tokens  # measured before the clock starts
        self.exact: dict[tuple[float, int], list[Tensor]] = {}

    def ours(self, rows: Rows, self_prob: float) -> MixedContext:
        return self.generator.contexts(rows.prompts, rows.references, self_prob, seed=0, sample_ids=rows.sample_ids)

    def sequential(self, rows: Rows, self_prob: float) -> list[Tensor]:
        mixed = self.generator.contexts(
            rows.prompts, rows.references, self_prob, seed=0, sample_ids=rows.sample_ids, method="sequential"
        )
        return self.exact.setdefault((self_prob, len(rows.prompts)), mixed.tokens)


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting()


@pytest.fixture
def against(setting, benchmark, report):
    """Time ours and a peer, alternating, add a row to the table, and return how many of the peer's tokens differ.

    Ours must be the sequential loop's contexts. A peer that draws with noise of its own is not compared with them.
    """

    def run(
        name: str, peer: Callable[[], list[Tensor]], rows: Rows, self_prob: float, *, own_noise: bool = False
    ) -> int | None:
        seconds: list[float] = []
        results: list[list[Tensor]] = []
        mixed: list[MixedContext] = []

        def time_peer() -> None:  # before each round and outside its clock
            started = time.perf_counter()
            results.append(peer())
            seconds.append(time.perf_counter() - started)

        benchmark.pedantic(lambda: mixed.append(setting.ours(rows, self_prob)), setup=time_peer, rounds=ROUNDS)
        exact = setting.exact.get((self_prob, len(rows.prompts))) or setting.sequential(rows, self_prob)
        assert all(differing(one.tokens, exact) == 0 for one in mixed)
        stats = mixed[0].stats
        ours, theirs = statistics.median(one.stats.seconds for one in mixed), statistics.median(seconds)
        wrong = None if own_noise else differing(results[0], exact)
        row = {
            "method": name,
            "p": self_prob,
            "rows": stats.rows,
            "answer tokens": stats.answer_tokens,
            "self tokens": stats.self_tokens,
            "of them not exact": "own noise" if wrong is None else wrong,
            "seconds": round(theirs, 2),
            "ours, seconds": round(ours, 2),
            "ours is faster by": f"{theirs / ours:.1f}x",
        }
        benchmark.extra_info.update(
            row, title=TITLE, seconds=theirs, ours_seconds=ours, not_exact=wrong, ratios={name: theirs / ours}
        )
        report(TITLE, [row])
        return wrong

    return run


@pytest.mark.parametrize("self_prob", [0.25, 1.0])
def test_sequential(setting, against, self_prob):
    rows = setting.rows
    assert against("token by token, KV cache", lambda: setting.sequential(rows, self_prob), rows, self_prob) == 0


def test_full_recompute(setting, against):
    rows = setting.rows.shortened(SHORT_ROWS, SHORT_ANSWER)
    assert against("full recompute", lambda: full_recompute(setting.model, rows, 0.25, seed=0), rows, 0.25) == 0


@pytest.mark.parametrize("passes", [1, 2, 4, 8])
def test_parallel_scheduled_sampling(setting, against, passes):
    rows = setting.rows
    against(
        f"Parallel Scheduled Sampling, K = {passes}",
        lambda: parallel_scheduled_sampling(setting.model, rows, 0.25, passes, seed=0),
        rows,
        0.25,
    )


def test_trl(setting, against, report, monkeypatch):
    """What ``GKDTrainer`` of TRL calls in each step at ``lmbda=1`` (arXiv 2306.13649): ``generate`` on the prompts.

    Each row gets as many new tokens as the longest reference has, and does not end before that; ours does the same at p
    = 1.
    """
    from transformers import GenerationConfig
    from trl.experimental.gkd import GKDTrainer

    monkeypatch.setattr(setting.model.generation_config, "eos_token_id", None)
    model, grid = setting.model, Grid(setting.rows, setting.model.device)
    inputs = {"prompts": grid.tokens[:, : grid.start], "prompt_attention_mask": grid.mask[:, : grid.start]}
    how = GenerationConfig(
        max_new_tokens=grid.width, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0
    )

    def generate() -> list[Tensor]:
        tokens, _, _ = GKDTrainer.generate_on_policy_outputs(model, inputs, how)
        assert tokens.shape == (len(setting.rows.prompts), grid.start + grid.width)
        return list(tokens[:, grid.start :])

    against("TRL, GKDTrainer", generate, setting.rows, 1.0, own_noise=True)
