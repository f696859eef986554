"""The roofline model: what its formula must give whatever the rates, and that it counts what the engine does."""

from __future__ import annotations

import json
import math

import pytest
from models import tiny_model

from benchmarks import roofline
from benchmarks.costs import (
    AUTOCAST,
    ENGINES,
    FP32,
    GPUS,
    MEASURED,
    NO_GRAPH,
    SHAPES,
    SMOLLM2,
    Costs,
    Device,
    Pass,
    Shape,
    micro_batches,
)
from selfgen import ContextGenerator
from selfgen.context import budget

TINY = Shape("tiny", 2, 4, 8, 2, 1, 2, 16, False)
SLOW = Device("slow", 1e3, 1e2, 1e4)
COMPUTE_BOUND = SLOW._replace(bandwidth=math.inf)
BATCHES = micro_batches([50] * 16)


def test_parameters():
    """Without norms and biases, the counts that the models' cards give."""
    counts = {shape.name: shape.parameters / 1e9 for shape in (SMOLLM2, *SHAPES)}
    expected = [0.1345, 1.236, 3.213, 8.030, 14.77, 32.76, 70.55]
    assert list(counts.values()) == pytest.approx(expected, rel=1e-3)


def test_a_pass_by_hand():
    work = Pass(tokens=3, sampled=2, keys=5, pairs=7)
    assert TINY.layer_weights == 2 * (4 * 2 * (2 + 2 * 1 + 2) + 3 * 4 * 8) == 288
    layers = 288 * 2 / 1e2  # bytes; FLOPs would take 2 * 3 * 288 / 1e3
    attention = 2 * (2 * 5 * 1 * 2) * 2 / 1e2  # layers, K and V of 5 positions of a head of 2
    head = (64 + 2 * 2 * 16) * 2 / 1e2
    kept = 2 * 3 * (3 * 4) * 2 / 1e2
    assert Costs(TINY, SLOW, launching=7.0).a_pass(work) == pytest.approx(layers + attention + head + kept + 7)
    flops = 2 * 3 * 288 + 4 * 7 * 2 * 2 * 2 + 2 * 2 * 64
    assert Costs(TINY, COMPUTE_BOUND).a_pass(work) == pytest.approx(flops / 1e3)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_that_reuses_passes_is_a_checkpointed_one_and_a_head(shape):
    """Where bandwidth is endless, the host costs nothing and each token is computed once."""
    costs = Costs(shape, COMPUTE_BOUND)
    sft = costs.sft(BATCHES, checkpointing=True)
    assert costs.bss(BATCHES, [work._replace(sampled=0) for work in BATCHES]) == pytest.approx(sft)
    sampled = [work._replace(sampled=100) for work in BATCHES]
    assert costs.bss(BATCHES, sampled) - sft == pytest.approx(len(BATCHES) * costs.head(100))


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("shape", SHAPES)
def test_work_costs(shape, gpu):
    costs = Costs(shape, gpu, host=1e-3, launching=1e-3)
    passes = [Pass(400, 40, 1600, 20_000)] * 2
    known = costs.bss(BATCHES, passes)
    assert costs.bss(BATCHES, [work._replace(tokens=work.tokens * 2) for work in passes]) > known  # speculation
    halves = [Pass(200, 20, 1600, 10_000)] * 4  # the same work in more passes
    assert costs.bss(BATCHES, halves) > known
    free = costs._replace(host=0.0, launching=0.0)
    assert free.bss(BATCHES, halves) >= free.bss(BATCHES, passes)
    assert costs.sft(BATCHES, checkpointing=True) > costs.sft(BATCHES, checkpointing=False)


def test_the_achievable_part_cancels_out():
    def ratio(achievable: float) -> float:
        costs = Costs(SHAPES[2], GPUS[1].times(achievable))
        return costs.bss(BATCHES, [Pass(300, 30, 900, 9000)] * 9) / costs.sft(BATCHES, checkpointing=True)

    assert ratio(0.4) == pytest.approx(ratio(1.0))


@pytest.mark.parametrize("costs", [Costs(SHAPES[0], GPUS[0]), Costs(SHAPES[2], GPUS[1], launching=0.01)])
def test_token_budget_is_the_calibrated_one(monkeypatch, costs):
    """Of a model whose forward takes what the formula says."""
    clock = [0.0]

    class Model:
        device = roofline.torch.device("cpu")

        def __call__(self, input_ids, **_):
            n = input_ids.shape[1]
            clock[0] += costs.a_pass(Pass(n, 1, n, n * (n + 1) // 2), reuse=False)

    monkeypatch.setattr(budget, "arguments_of", lambda model, **arguments: arguments)
    monkeypatch.setattr(budget.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(budget, "max_positions", lambda model: None)
    found = budget.measure_budget(Model()).tokens  # type: ignore[arg-type]
    assert costs.token_budget() == pytest.approx(found, abs=1)


def test_the_measured_passes():
    """Of SmolLM2 in bf16 on an H200 (benchmarks/results/gpu.md): 4.6 ms at best as a graph, 27 (fp32) to 33 without."""

    def pass_of(engine):
        return 1e3 * Costs(SMOLLM2, roofline.H200, launching=engine.seconds(SMOLLM2)).a_pass(roofline.SMALL)

    assert pass_of(MEASURED) == pytest.approx(4.6, rel=0.1)
    assert 27 * 0.9 <= pass_of(NO_GRAPH) <= 33
    in_graph = MEASURED._replace(launches=0, other_launches=0).seconds(SMOLLM2)
    assert 1.4 <= 1e3 * (MEASURED.seconds(SMOLLM2) - in_graph) <= 1.8  # outside of the graph, as inferred
    assert [pass_of(engine) for engine in ENGINES] == sorted(pass_of(engine) for engine in ENGINES)


def test_casts_of_weights():
    shape, passes = SHAPES[0], [Pass(64, 16, 1600, 12_800)] * 10
    once = Costs(shape, roofline.H200, AUTOCAST)
    always = once._replace(casts=True)
    cast = (shape.layer_weights + shape.head_weights) * 6 / 4.3e12
    assert 1.7e-3 <= cast <= 2.3e-3
    assert always.a_pass(passes[0]) - once.a_pass(passes[0]) == pytest.approx(cast)
    assert always.bss(BATCHES, passes) - once.bss(BATCHES, passes) == pytest.approx(9 * cast)
    bf16 = Costs(shape, roofline.H200)
    for checkpointing, casts in ((False, 2), (True, 4)):  # of two micro-batches
        more = once.sft(BATCHES, checkpointing=checkpointing) - bf16.sft(BATCHES, checkpointing=checkpointing)
        assert more == pytest.approx(casts * cast + once.optimizer() - bf16.optimizer())


def test_the_table_of_passes_says_what_was_measured():
    rows = {row["passes"]: row for row in roofline.pass_table()}
    assert {name for name, row in rows.items() if row["SmolLM2-135M, measured"]} == {MEASURED.name, NO_GRAPH.name}
    assert {row["their counts are"] for row in rows.values()} == {"a bound", "counted on a CPU", "measured"}


def test_micro_batches():
    ragged, padded = micro_batches([3, 5] * 4 + [2]), micro_batches([3, 5] * 4 + [2], padded=True)
    assert ragged == [Pass(32, 32, 32, 4 * (6 + 15)), Pass(2, 2, 2, 3)]
    assert padded == [Pass(40, 40, 40, 8 * 15), Pass(2, 2, 2, 3)]


def test_passes_are_counted():
    """The recorder sees what the engine reports."""
    model = tiny_model("llama")
    generator = ContextGenerator(model, token_budget=8, balance=1)
    with roofline.recorded(model) as passes:
        stats = generator.contexts([[1, 2, 3], [4, 5]], [[6] * 9, [7] * 5], 1.0, seed=0, sample_ids=[0, 1]).stats
    passes = passes[-stats.passes :]
    assert sum(work.tokens for work in passes) == stats.tokens_computed
    assert sum(work.sampled for work in passes) >= stats.self_tokens
    assert all(work.tokens <= work.pairs and work.tokens <= 8 for work in passes)
    assert passes[0].keys == passes[0].tokens  # nothing is cached yet


@pytest.mark.skipif(not roofline.PASSES.is_file(), reason="nothing recorded: python -m benchmarks.roofline --measure")
def test_recorded_passes():
    """What is committed is of one generation a probability: the same contexts whatever the budget."""
    measured = json.loads(roofline.PASSES.read_text())
    for p in roofline.SELF_PROBS:
        runs = [run for run in measured["runs"] if run["p"] == p]
        assert [run["budget"] for run in runs] == list(roofline.BUDGETS)
        assert len({run["agreement"] for run in runs}) == 1
        for run in runs:
            tokens = [Pass(*work).tokens for work in run["passes"]]
            assert max(tokens) <= run["budget"]
            assert sum(tokens) >= sum(length - 1 for length in measured["lengths"])  # nothing is predicted at the last


def test_table():
    measured = {"lengths": [50] * 16, "runs": []}
    for p in roofline.SELF_PROBS:
        measured["runs"].append({"p": p, "budget": 512, "passes": [[400, 40, 1600, 20_000]] * 2})
    row = roofline.predict(SHAPES[-1], GPUS[1], measured, 0.6, 0.0)
    assert row["GPUs"] == 15
    assert "70B" in roofline.table([row])
    assert FP32.state == 16
