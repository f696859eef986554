"""Recorded passes on the CPU: padding, sizes, and when all is recorded anew.

That CUDA graphs replay the same is shown in test_on_gpu.py.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import threading
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import pytest
import torch
from helpers.contexts import assert_equal, batch
from helpers.graphs import Launches, Recorder, recorded_passes
from helpers.training import generate, make_trainer, padded, rows
from models import CONFIGS, SOME_FAMILIES, each_family, tiny_model

from selfgen import ContextGenerator
from selfgen.context import Masks, budget
from selfgen.context import graphs as engine
from selfgen.context.batch import Batch
from selfgen.context.budget import PassBudget
from selfgen.context.fixed_point import FixedPoint
from selfgen.context.forward import Forward, Size
from selfgen.context.models import inference
from selfgen.context.sequential import one_by_one, sequential
from selfgen.training.meter import Meter


@pytest.fixture(autouse=True)
def recorder():
    with recorded_passes():
        yield


def contexts(generator, self_prob=0.5, **settings):
    prompts, references, sample_ids = batch()
    return generator.contexts(prompts, references, self_prob, seed=7, sample_ids=sample_ids, **settings)


@pytest.mark.parametrize(
    ("family", "self_probs"),
    [
        pytest.param(family, [0.5], marks=() if family in SOME_FAMILIES else pytest.mark.slow)
        for family in sorted(CONFIGS)
    ]
    + [("llama", [0.25, 0.5, 1.0])],
)
def test_padded_passes_give_the_contexts_of_the_loop(family, self_probs):
    model = tiny_model(family)
    generator = ContextGenerator(model, token_budget=100, balance=12.5)
    for self_prob in self_probs:
        want = contexts(generator, self_prob, method="sequential")
        for _ in range(3):  # recorded, replayed
            assert_equal(contexts(generator, self_prob), want)
    passes = generator._forward()
    assert passes.replays > passes.records > 0


def test_passes_that_were_no_replay_are_counted(monkeypatch):
    """So that a silent fall-back shows: of contexts and of answers, where graphs are off, and of a loop."""
    generator = ContextGenerator(tiny_model("llama"), token_budget=100, balance=12.5)
    prompts = batch()[0]

    def make(which):
        return contexts(generator).stats if which == "contexts" else generator.answer(prompts, max_new_tokens=9)

    for which in ("contexts", "answers"):
        found = []
        for _ in range(4):
            before = [getattr(generator._forward(), name, 0) for name in ("records", "replays")]
            found.append(make(which))
            records, replays = (
                getattr(generator._forward(), name) - count
                for name, count in zip(("records", "replays"), before, strict=True)
            )
            assert (found[-1].captured, found[-1].replayed) == (records, replays - records)
        assert found[0].captured > 0
        assert all(one.captured + one.replayed == one.passes for one in found)
        assert found[0].padding > 0
        assert (found[-1].captured, found[-1].replayed) == (0, found[-1].passes)
    assert contexts(generator, method="sequential").stats.padding == 0
    generator._forward()._turn_off("a test")
    for which in ("contexts", "answers"):
        found = make(which)
        assert (found.captured, found.replayed, found.padding) == (0, 0, 0)
        assert found.passes


def test_padding_is_what_recorded_sizes_have_too_much(monkeypatch):
    generator, sizes, planned = ContextGenerator(tiny_model("llama"), token_budget=100, balance=12.5), [], []
    of = engine.recorded_size

    def noted(size, most_places):
        sizes.append(of(size, most_places).tokens)
        planned.append(size.tokens)
        return of(size, most_places)

    monkeypatch.setattr(engine, "recorded_size", noted)
    for _ in range(3):
        sizes.clear()
        planned.clear()
        stats = contexts(generator).stats
        assert stats.padding == sum(sizes) - sum(planned)
        assert stats.tokens_computed == sum(planned)


def test_the_log_tells_of_them(tmp_path):
    """Where passes are to be graphs; and a checkpoint of a version that did not count them is read."""
    stats = contexts(ContextGenerator(tiny_model("llama"), token_budget=100, balance=12.5)).stats
    stats = dataclasses.replace(stats, passes=8, replayed=6, tokens_computed=300, padding=100)
    for has_graphs in (True, False):
        meter = Meter(has_graphs=has_graphs)
        meter.contexts_end(stats)
        meter.save(tmp_path, 0, 0)
        log = meter.flush()
        assert [log.get(name) for name in ("replayed_share", "padding_share")] == (
            [0.75, 0.25] if has_graphs else [None, None]
        )
    file = tmp_path / "selfgen_log_0.json"
    saved = json.loads(file.read_text())
    for name in ("captured", "replayed", "padding"):
        del saved["stats"][0][name]
    file.write_text(json.dumps(saved))
    meter = Meter(has_graphs=True)
    meter.load(tmp_path, 0)
    assert meter.flush()["replayed_share"] == 0


@each_family()
def test_the_loop_is_one_replay_per_token(family):
    """The tokens of the model's own loop, and nothing between replays; what precision="invariant" runs in bf16."""
    model, (prompts, references, ids) = tiny_model(family), batch(4, 14)
    masks = Masks("span", span_length=3.0, min_reference_prob=0.004 if family == "llama" else 0.0)
    how = {"model": model, "temperature": 0.9, "masks": masks, "vocab_size": None}
    forward = Recorder(model)
    for seed in range(2):
        rows = Batch.of(prompts, references, 0.6, seed=seed, sample_ids=ids, **how)
        with inference(model), Launches() as launches:
            want = sequential(model, rows)
            got = one_by_one(forward, rows)
        assert_equal(got, want)
        assert got.passes == len(launches.between) + 1 == sum(map(len, prompts + references)) - len(prompts)
        assert vars(got.coverage) == {
            "captured": seed == 0,
            "replayed": got.passes - (seed == 0),
            "padding": 15 * got.passes,
        }
    assert launches.between == [[]] * len(launches.between)


def test_what_is_kept_is_that_of_the_plain_passes():
    model, data = tiny_model("llama"), rows(8)
    generator = ContextGenerator(model, token_budget=40, balance=5)
    columns = [list(data[name]) for name in ("prompt_ids", "answer_ids")]
    for seed in range(4):
        how = {"seed": seed, "sample_ids": data["sample_id"], "keep_hidden_states": True}
        got = generator.contexts(*columns, 0.5, **how)
        plain = ContextGenerator(model, token_budget=40, balance=5)
        plain._passes = Forward(model)
        want = plain.contexts(*columns, 0.5, **how)
        assert_equal(got, want)
        torch.testing.assert_close(got.hidden_states.states, want.hidden_states.states, rtol=1e-4, atol=1e-5)
        assert not got.hidden_states.states[:, -1].any()  # padding
    assert generator._forward().replays


def test_what_was_kept_before_stays():
    model, data = tiny_model("llama"), rows(8)
    first = generate(model, data, keep_hidden_states=True)
    before = first.hidden_states.states.clone()
    generate(model, data, keep_hidden_states=True, seed=4)
    assert torch.equal(first.hidden_states.states, before)
    assert padded(model, data, first)


def test_answers_are_those_of_the_plain_passes():
    model = tiny_model("llama")
    generator, plain = ContextGenerator(model), ContextGenerator(model)
    plain._passes = Forward(model)
    prompts = batch()[0]
    for seed in range(3):
        got, want = (one.answer(prompts, max_new_tokens=20, batch_size=5, seed=seed) for one in (generator, plain))
        assert all(map(torch.equal, got.tokens, want.tokens))
    assert generator._forward().replays


def test_an_optimizers_step_is_seen():
    model = tiny_model("llama")
    generator = ContextGenerator(model, token_budget=100, balance=12.5)
    for _ in range(3):
        contexts(generator)
    records = generator._forward().records
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert_equal(contexts(generator), contexts(generator, method="sequential"))
    assert generator._forward().records == records


def recordings(generator):
    """What replays the recorded passes of all kinds and sizes."""
    return [replay for kind in generator._forward()._recorded.values() for replay in kind.replays.values()]


def moved(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1


def hooked(model):
    model.model.layers[0].register_forward_hook(lambda module, args, output: output * 1.5)


def replaced(model):
    model.model.layers[1].mlp = tiny_model("llama", seed=5).model.layers[1].mlp


def patched(model):
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda hidden: 0.5 * forward(hidden)


def transposed(model):
    projection = model.model.layers[0].self_attn.q_proj
    projection.weight.data = projection.weight.data.T


def adapted(model):
    embeddings = model.get_input_embeddings()
    embeddings._active_adapter = [*getattr(embeddings, "_active_adapter", []), "another"]


def rescaled(model):
    model.model.norm.variance_epsilon += 0.3


def configured(model):
    model.config.final_logit_softcapping /= 3


def more_precise(model):
    highest = torch.get_float32_matmul_precision() == "highest"
    torch.set_float32_matmul_precision("high" if highest else "highest")


@pytest.fixture
def precision():
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize(
    "change", [moved, hooked, replaced, patched, transposed, adapted, rescaled, configured, more_precise]
)
def test_what_changes_the_computation_is_recorded_anew(change):
    """Twice, as what has gone may come again at the same address."""
    model = tiny_model("gemma2" if change is configured else "llama")
    generator = ContextGenerator(model, token_budget=100, balance=12.5)
    for _ in range(2):
        for _ in range(3):
            contexts(generator)
        old = recordings(generator)
        assert old
        change(model)
        assert_equal(contexts(generator), contexts(generator, method="sequential"))
        assert not {*map(id, old)} & {*map(id, recordings(generator))}


def test_one_hook_after_another():
    model = tiny_model("llama")
    generator = ContextGenerator(model, token_budget=100, balance=12.5)
    for scale in (1.5, 0.5, 2.0, 0.7):
        handle = model.model.layers[0].register_forward_hook(lambda module, args, output, by=scale: output * by)
        want = contexts(generator, method="sequential")
        for _ in range(3):
            assert_equal(contexts(generator), want)
        handle.remove()


@pytest.mark.parametrize("prepared", [False, True])
def test_recorded_casts_are_no_kept_ones(tmp_path, prepared):
    """A pass sees weights as they are, while autocast would go on with what it cast first."""
    model = tiny_model("llama")
    if prepared:
        model = make_trainer(tmp_path, model=model, bf16=True).accelerator.prepare_model(model)
    ids = torch.arange(3, 10)[None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(input_ids=ids).logits
        for parameter in model.parameters():
            parameter.mul_(-1.0)
        stale = model(input_ids=ids).logits
        with engine.fresh_casts(model):
            fresh = model(input_ids=ids).logits
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want = model(input_ids=ids).logits
    assert torch.equal(fresh, want.to(fresh.dtype))
    assert not torch.equal(stale, want)
    assert not torch.equal(before, want)
    assert (vars(model).get("_original_forward") is None) == (not prepared)
    assert ("forward" in vars(model)) == prepared


def test_longer_batches_get_a_larger_cache():
    generator = ContextGenerator(tiny_model("llama"), token_budget=100, balance=12.5)
    prompts, references, sample_ids = batch(40, longest=100)
    few = slice(0, 3)
    generator.contexts(prompts[few], references[few], 0.5, seed=0, sample_ids=sample_ids[few])
    small = generator._forward().cache.num_slots
    got = generator.contexts(prompts, references, 0.5, seed=0, sample_ids=sample_ids)
    assert_equal(got, generator.contexts(prompts, references, 0.5, seed=0, sample_ids=sample_ids, method="sequential"))
    assert generator._forward().cache.num_slots > small


@pytest.mark.parametrize("when", ["run", "_record"])
def test_a_model_that_cannot_be_recorded_is_run_as_it_is(monkeypatch, caplog, when):
    def failing(*_):
        raise RuntimeError("called a synchronizing CUDA operation")

    @contextmanager
    def failing_context():
        yield
        failing()

    if when == "run":
        monkeypatch.setattr(engine, "not_waiting", failing_context)
    else:
        monkeypatch.setattr(Recorder, when, failing)
    generator = ContextGenerator(tiny_model("llama"), token_budget=100, balance=12.5)
    want = contexts(generator, method="sequential")
    for _ in range(3):
        assert_equal(contexts(generator), want)
    assert caplog.text.count("passes run without CUDA graphs") == 1
    assert not hasattr(generator._forward(), "cache")  # K/V is freed


@pytest.mark.parametrize("limit", ["tokens", "places"])
def test_passes_that_are_too_large_are_run_as_they_are(limit, monkeypatch):
    generator = ContextGenerator(tiny_model("llama"), token_budget=400, balance=50)
    if limit == "tokens":
        monkeypatch.setattr(engine, "TOKENS", (16,))
    else:
        generator._forward()._most_places = 20
    want = contexts(generator, method="sequential")
    for _ in range(3):
        mixed = contexts(generator)
        assert_equal(mixed, want)
        assert mixed.stats.captured + mixed.stats.replayed < mixed.stats.passes
    sizes = [size for kind in generator._forward()._recorded.values() for size in kind.replays]
    assert sizes
    assert all(getattr(size, limit) <= 20 for size in sizes)


def test_kv_that_would_be_too_much_to_keep_is_freed(monkeypatch, caplog):
    monkeypatch.setattr(engine, "_memory_of", lambda device: 2**10)
    generator = ContextGenerator(tiny_model("llama"), token_budget=100, balance=12.5)
    want = contexts(generator, method="sequential")
    for _ in range(3):
        assert_equal(contexts(generator), want)
        assert not hasattr(generator._forward(), "cache")
    assert caplog.text.count("too much to keep") == 1


def test_only_a_generation_that_takes_too_much_runs_as_it_is():
    """Between others, whose graphs stay; and a setting says what is too much."""
    model = tiny_model("llama")
    generator = ContextGenerator(model, token_budget=100, balance=12.5, graph_memory=2e-5)  # of 16 GB
    prompts, references, sample_ids = batch(40, longest=100)
    for count in (2, 40, 2, 40, 2):
        rows = prompts[:count], references[:count]
        how = {"self_prob": 0.5, "seed": count, "sample_ids": sample_ids[:count]}
        mixed = generator.contexts(*rows, **how)
        assert_equal(mixed, generator.contexts(*rows, **how, method="sequential"))
        assert bool(mixed.stats.captured + mixed.stats.replayed) == (count == 2)
    assert mixed.stats.captured == 0


def test_hidden_states_that_would_be_too_much_to_keep(caplog):
    """Also where slots are as many as a generation before, without them, had room for."""
    model = tiny_model("llama")
    kv = Recorder(model)._nbytes(1024, False)
    generator = ContextGenerator(model, token_budget=100, balance=12.5, graph_memory=1.05 * kv / 2**34)
    prompts, references = [torch.arange(3, 20)] * 31, [torch.arange(3, 19)] * 31  # with nobody's, 1024 slots
    for keep, is_recorded in ((False, True), (True, False), (False, True)):
        how = {"sample_ids": range(31), "keep_hidden_states": keep}
        stats = generator.contexts(prompts, references, 0.1, seed=0, **how).stats
        assert bool(stats.captured + stats.replayed) == is_recorded
        assert ("too much to keep" in caplog.text) == (not is_recorded)
        caplog.clear()


def test_passes_that_were_made_before_a_release_are_recorded_as_well(caplog):
    generator = ContextGenerator(tiny_model("llama"), token_budget=100, balance=12.5)
    contexts(generator)
    forward = generator._forward()
    trial = budget._Trial(forward, 100)
    generator.release()
    with generator.computing(), forward.over(trial):
        forward.run(trial, Size(16, 1))
    assert forward.coverage.captured == 1
    assert not caplog.text


def test_a_trial_of_the_budget_is_recorded_as_generations_are(monkeypatch):
    """With fewer slots, where the most would be too much to keep; as it is, where all are."""
    model = tiny_model("llama")
    model.config.max_position_embeddings = 2**20
    kv = Recorder(model)._nbytes(1, False) // 1024  # of a slot
    monkeypatch.setattr(budget, "budget_of", lambda seconds, longest: (seconds(16), PassBudget(longest, 1.0))[1])
    for most, longest in ((16384, 8192), (8000, 4096), (1024, 512), (1000, 8192)):
        generator = ContextGenerator(model, graph_memory=most * kv / 2**34)
        forward = generator._forward()
        assert generator.budget.tokens == longest
        assert bool(forward.records) == (longest < most)


def test_a_trial_of_the_budget_does_not_use_up_the_warning(monkeypatch, caplog):
    """It takes more memory than most generations, and nobody can give it fewer rows."""
    monkeypatch.setattr(engine, "_memory_of", lambda device: 2**10)
    generator = ContextGenerator(tiny_model("llama"))
    assert generator.budget
    assert "too much to keep" not in caplog.text
    for _ in range(2):
        contexts(generator)
    assert caplog.text.count("too much to keep") == 1


def test_release():
    generator = ContextGenerator(tiny_model("llama"), token_budget=100, balance=12.5)
    generator.release()
    for _ in range(3):
        want = contexts(generator)
    assert hasattr(generator._forward(), "cache")
    assert pickle.loads(pickle.dumps(generator))._passes is None
    generator.release()
    assert not hasattr(generator._forward(), "cache")
    assert not generator._forward()._recorded
    assert_equal(contexts(generator), want)


def test_training_releases(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    assert trainer.generator._forward()._state is None


def test_one_generation_at_a_time():
    model = tiny_model("llama")
    generator = ContextGenerator(model, token_budget=100, balance=12.5)
    inside = []  # a hook that is new would run while the model is tried
    model.model.norm.register_forward_hook(lambda *_: inside[0]() if inside else None)
    contexts(generator)
    inside.append(lambda: contexts(generator))
    generator.release()  # no hook runs in a replay
    with pytest.raises(RuntimeError, match=r"at work already.* use a second one"):
        contexts(generator)
    inside[:] = [generator.release]  # what is being run needs what would be freed
    with pytest.raises(RuntimeError, match=r"at work already.* release it when that is done"):
        contexts(generator)
    model.model.norm._forward_hooks.clear()
    assert_equal(contexts(generator), contexts(generator, method="sequential"))


def test_release_waits_for_its_turn():
    """Not to free what a replay in another thread reads."""
    model = tiny_model("llama")
    generator, order = ContextGenerator(model, token_budget=100, balance=12.5), []
    forward = generator._forward()

    def release():
        generator.release()
        order.append("released")

    other = threading.Thread(target=release)
    with generator.computing():
        contexts(generator)
        other.start()
        other.join(0.05)
        assert other.is_alive()
        assert forward._recorded
        order.append("computed")
    other.join()
    assert order == ["computed", "released"]
    assert not forward._recorded


def test_the_budget_is_measured_by_recorded_passes():
    generator = ContextGenerator(tiny_model("llama"))
    assert generator.budget.tokens >= 16
    assert generator._forward().replays


def under_autocast(generator):
    """Autocast keeps what it has cast until it ends, whatever becomes of the weights."""
    with torch.autocast("cpu", torch.bfloat16):
        return contexts(generator)


def with_casts_and_without(model):
    """Two generators with the same passes; those of the second cast weights as autocast does."""
    found = [ContextGenerator(model, token_budget=100, balance=12.5) for _ in range(2)]
    found[1]._forward()._casts_of_now = lambda: None
    return found


def cast_operators(generator):
    """How often replays cast a weight of a linear module."""
    weights = {module.weight.shape for module in generator.model.modules() if isinstance(module, torch.nn.Linear)}
    return sum(
        "_to_copy" in str(operator) and args[0].dtype == torch.float32 and args[0].shape in weights
        for replay in recordings(generator)
        for operator, args, *_ in replay.calls
    )


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
@pytest.mark.one_case
def test_under_autocast_weights_are_cast_once_a_generation(family, monkeypatch):
    """To the contexts of autocast's own casts; those of the weights as they are now; and no replay casts them."""
    model = tiny_model(family)
    generator, plain = with_casts_and_without(model)
    refreshed = []
    refresh = engine.CastWeights.refresh
    monkeypatch.setattr(engine.CastWeights, "refresh", lambda self: refreshed.append(1) or refresh(self))
    for step in range(4):
        assert_equal(under_autocast(generator), under_autocast(plain))
        assert len(refreshed) == step + 1
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    assert generator._forward().replays
    assert not cast_operators(generator)
    assert all("forward" not in vars(module) for module in model.modules())

    monkeypatch.setattr(engine, "MOST_CASTS", 0.0)
    again = ContextGenerator(model, token_budget=100, balance=12.5)
    for _ in range(3):
        assert_equal(under_autocast(again), under_autocast(plain))
    assert again._forward()._casts is None
    assert cast_operators(again)


def test_a_generation_without_graphs_casts_weights_as_they_are():
    """Copies that the last recorded generation has read are those of its weights."""
    model = tiny_model("llama")
    generator, plain = with_casts_and_without(model)
    under_autocast(generator)
    assert generator._forward()._casts is not None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    for one in (generator, plain):
        one._forward()._share = 0.0
    found, want = under_autocast(generator), under_autocast(plain)
    assert found.stats.captured == found.stats.replayed == 0
    assert_equal(found, want)


def test_weights_that_have_moved_need_no_new_recording():
    """As after an optimizer that swaps them: passes read copies. Other weights do need one."""
    model = tiny_model("llama")
    generator, plain = with_casts_and_without(model)
    for _ in range(3):
        under_autocast(generator)
    records = generator._forward().records
    projection = model.model.layers[0].mlp.down_proj
    projection.weight.data = projection.weight.data * 1.5
    assert_equal(under_autocast(generator), under_autocast(plain))
    assert generator._forward().records == records
    norm = model.model.norm
    norm.weight.data = norm.weight.data * 1.5
    for _ in range(3):
        assert_equal(under_autocast(generator), under_autocast(plain))
    assert generator._forward().records > records


def test_a_weight_that_is_used_without_autocast_is_not_cast():
    """As of a router that is computed in fp32 in the midst of autocast."""
    model = tiny_model("llama")
    gate = model.model.layers[0].mlp.gate_proj
    forward = type(gate).forward

    class Router(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = gate

        def forward(self, hidden):
            with torch.autocast("cpu", enabled=False):
                return self.linear(hidden.float())

    model.model.layers[0].mlp.gate_proj = Router()
    generator, plain = with_casts_and_without(model)
    for _ in range(3):
        assert_equal(under_autocast(generator), under_autocast(plain))
    assert generator._forward().replays
    assert type(gate).forward is forward


class FewStreams:
    """As torch.cuda.Stream: three of them, again and again."""

    made = 0

    def __init__(self, device):
        FewStreams.made += 1
        self.cuda_stream = FewStreams.made % 3


def test_each_forward_records_on_a_stream_of_its_own(monkeypatch):
    """Of those that are alive; one that is gone leaves its stream to others."""
    monkeypatch.setattr(engine.torch.cuda, "Stream", FewStreams)
    monkeypatch.setattr(engine, "_STREAMS_OF_TORCH", 3)
    monkeypatch.setattr(engine, "_streams", WeakKeyDictionary())

    class Owner:
        pass

    owners = [Owner() for _ in range(3)]
    found = [engine._stream_of_its_own(owner, torch.device("cuda")).cuda_stream for owner in owners]
    assert sorted(found) == [0, 1, 2]
    with pytest.raises(RuntimeError, match="as many as it has streams"):
        engine._stream_of_its_own(Owner(), torch.device("cuda"))
    del owners[1]
    assert engine._stream_of_its_own(Owner(), torch.device("cuda")).cuda_stream == found[1]


def test_another_error_is_raised(monkeypatch):
    def failing(*args):
        raise RuntimeError("out of luck")

    generator = ContextGenerator(tiny_model("llama"), token_budget=100, balance=12.5)
    with monkeypatch.context() as patch:
        patch.setattr(FixedPoint, "run", failing)
        with pytest.raises(RuntimeError, match="out of luck"):
            contexts(generator)
    assert not hasattr(generator._forward(), "cache")
    assert_equal(contexts(generator), contexts(generator, method="sequential"))


@pytest.mark.parametrize(
    ("tokens", "places", "most", "room"),
    [
        (1, 0, 10**6, (16, 16)), (16, 16, 10**6, (16, 16)), (17, 1, 10**6, (32, 32)), (65, 30, 10**6, (128, 32)),
        (65, 40, 10**6, (128, 128)), (256, 1, 10**6, (256, 16)), (300, 1, 10**6, (384, 24)),
        (1025, 600, 10**6, (1536, 1536)), (8192, 8192, 10**6, (8192, 8192)), (8192, 300, 883, (8192, 512)),
        (8192, 600, 883, (8192, 883)), (8192, 1, 300, (8192, 300)), (512, 100, 883, (512, 128)), (8193, 1, 10**6, None),
        (8192, 900, 883, None),
    ],
)  # fmt: skip
def test_sizes(tokens, places, most, room):
    """Of a vocabulary of 152,000 there is room for the logits of 883 places on a GPU of 16 GB."""
    assert engine.recorded_size(engine.Size(tokens, places), most) == room
