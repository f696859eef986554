"""Whole passes as recordings: nothing is left for the host between two of them, and nothing of one call stays in them.

What differs from call to call (seed, rows, budget, settings, weights) is what a recording could have kept by mistake.
"""

from __future__ import annotations

import gc
from contextlib import contextmanager

import pytest
import torch
from helpers.contexts import assert_equal, batch
from helpers.graphs import Launches, recorded_passes
from models import CONFIGS, each_family, tiny_model

from selfgen import ContextGenerator
from selfgen.context import Masks
from selfgen.context.fixed_point import FixedPoint
from selfgen.context.forward import Forward


@pytest.fixture(autouse=True)
def recorder():
    with recorded_passes():
        yield


def make(model, **settings):
    return ContextGenerator(model, **{"token_budget": 100, "balance": 12.5, **settings})


def contexts(generator, rows=slice(None), *, count=12, longest=40, self_prob=0.5, seed=7, **settings):
    columns = [column[rows] for column in batch(count, longest)]
    return generator.contexts(*columns[:2], self_prob, seed=seed, sample_ids=columns[2], **settings)


def check(generator, *args, **how):
    """Contexts are the loop's; returns them."""
    mixed = contexts(generator, *args, **how)
    assert_equal(mixed, contexts(generator, *args, **how, method="sequential"))
    return mixed


def test_a_seed_of_each_step():
    generator = make(tiny_model("llama"))
    for seed in (7, 8, -(2**63), 2**64 - 1, 7):
        check(generator, seed=seed)
    prompts = batch()[0]
    found = [generator.answer(prompts, max_new_tokens=9, batch_size=5, seed=seed) for seed in (3, 4, 3)]
    assert found[-1].replayed == found[-1].passes
    assert all(map(torch.equal, found[0].tokens, found[2].tokens))
    assert not all(map(torch.equal, found[0].tokens, found[1].tokens))


def test_more_rows_and_longer_ones():
    """Recorded anew where they need more room, and from then on replayed for all."""
    generator = make(tiny_model("llama"))
    small, many, long = (
        {"rows": slice(0, 3)},
        {"count": 70, "longest": 6},
        {"count": 4, "longest": 120},
    )
    for how in (small, many, small, long, many, small):
        check(generator, **how)
    assert all(contexts(generator, **how).stats.captured == 0 for how in (small, many, long))


def test_another_budget_and_balance():
    generator = make(tiny_model("llama"))
    generator._token_budget = generator._balance = None
    passes = set()
    for tokens, balance in ((100, 12.5), (7, 1.0), (300, 200.0), (300, 0.1), (100, 12.5)):
        generator.take_budget(tokens, balance)
        mixed = check(generator)
        assert mixed.stats.tokens_computed <= tokens * mixed.stats.passes
        passes.add(mixed.stats.passes)
    assert len(passes) == 4
    assert mixed.stats.captured == 0


@pytest.mark.slow
def test_other_settings():
    """Each is baked into recordings of its own, and those of others stay."""
    generator = make(tiny_model("llama"))
    masks = Masks(), Masks("span", span_length=3.0), Masks(min_reference_prob=0.004), Masks(min_reference_prob=0.02)
    for again in (False, True):
        for temperature in (1.0, 0.0, 0.6):
            for mask in masks:
                generator.temperature, generator.masks = temperature, mask
                mixed = check(generator)
                assert not again or mixed.stats.captured == 0
    prompts = batch()[0]
    plain = make(generator.model)
    plain._passes = Forward(plain.model)
    plain.temperature = generator.temperature
    for _ in range(2):
        for how in ({}, {"top_k": 1}, {"top_p": 0.6}, {"min_p": 0.2}, {"eos_token_ids": []}, {"eos_token_ids": [5, 9]}):
            got, want = (one.answer(prompts, max_new_tokens=9, batch_size=5, **how) for one in (generator, plain))
            assert all(map(torch.equal, got.tokens, want.tokens))
            assert got.finished == want.finished
    assert got.replayed == got.passes


@each_family()
def test_confidence_spans_and_a_smaller_vocabulary(family):
    model = tiny_model(family)
    for masks in (Masks(min_reference_prob=0.005), Masks("span", span_length=4.0)):
        generator = make(model, masks=masks, vocab_size=131 if family == "gpt_oss" else 129)
        for self_prob, seed in ((0.25, 1), (1.0, 2)):
            columns = batch(5, 20)
            prompts, references = ([row % 129 for row in column] for column in columns[:2])
            how = {"seed": seed, "sample_ids": columns[2]}
            want = generator.contexts(prompts, references, self_prob, **how, method="sequential")
            for _ in range(2):
                mixed = generator.contexts(prompts, references, self_prob, **how)
                assert_equal(mixed, want)
        assert mixed.stats.replayed == mixed.stats.passes


def test_two_generators_in_turn():
    """Of one model, each with recordings of its own; steps of an optimizer between."""
    model = tiny_model("llama")
    one, other = make(model), make(model, token_budget=30, balance=4.0, temperature=0.5)
    for seed in range(4):
        for generator in (one, other):
            mixed = check(generator, seed=seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    assert mixed.stats.captured == 0


@pytest.mark.parametrize("place", ["before", "after"])
def test_an_error_in_the_middle(monkeypatch, place):
    """Before or after a replay: the next generation begins anew."""
    generator = make(tiny_model("llama"))
    check(generator)
    forward, left = generator._forward(), 3
    run = forward.run

    def failing(passes, size):
        nonlocal left
        left -= 1
        if left == 0 and place == "before":
            raise KeyError("in the middle")
        run(passes, size)
        if left == 0:
            raise KeyError("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(forward, "run", failing)
        with pytest.raises(KeyError, match="in the middle"):
            contexts(generator, seed=1)
    assert not forward._recorded
    for seed in (1, 2):
        check(generator, seed=seed)


def test_logits_that_are_not_finite_are_counted_once():
    """Those of padding are not counted, nor those of a pass that is only recorded."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    generator = make(model)
    want = contexts(generator, method="sequential")
    assert want.stats.invalid == want.stats.self_tokens > 0
    for _ in range(3):
        mixed = contexts(generator)
        assert_equal(mixed, want)
        plain = make(model)
        plain._passes = Forward(model)
        assert mixed.stats.invalid == contexts(plain).stats.invalid
    answers = [generator.answer(batch()[0], max_new_tokens=4, batch_size=5) for _ in range(2)]
    assert [answer.invalid for answer in answers] == [4 * 12] * 2


def test_kept_hidden_states_are_written_once():
    """To where those of the last generation are, unless somebody has them yet; and never to two places."""
    model = tiny_model("llama")
    generator, plain = make(model), make(model)
    plain._passes = Forward(model)
    how = {"keep_hidden_states": True}
    held, addresses = [], []
    for seed in range(5):
        rows = slice(0, 3) if seed in (1, 3) else slice(None)  # what a larger generation left is not seen
        got, want = (contexts(one, rows, seed=seed, **how).hidden_states for one in (generator, plain))
        torch.testing.assert_close(got.states, want.states, rtol=1e-4, atol=1e-5)
        assert not got.states[:, -1].any()
        addresses.append(got.states.data_ptr())
        if seed >= 2:
            held.append((got, got.states.clone()))
        del got
    assert len({*addresses}) == 1
    for kept, states in held:
        assert torch.equal(kept.states, states)
    assert len({kept.states.data_ptr() for kept, _ in held}) == 3
    contexts(generator)  # without hidden states, which needs nobody's memory
    assert held[-1][0].states.data_ptr() == addresses[0]


def test_memory_of_a_generation_serves_the_next():
    """Nothing that a generation gives is written by the next one."""
    generator = make(tiny_model("llama"))
    first = contexts(generator)
    tokens, masks = [row.clone() for row in first.tokens], [row.clone() for row in first.is_self]
    for seed in range(3):
        contexts(generator, seed=seed, self_prob=1.0)
    assert all(map(torch.equal, first.tokens, tokens))
    assert all(map(torch.equal, first.is_self, masks))
    gc.collect()
    states = [one for one in gc.get_objects() if isinstance(one, FixedPoint)]
    assert not states


@pytest.mark.parametrize("keeps", [False, True])
def test_the_host_only_reads_numbers_between_two_passes(keeps):
    generator = make(tiny_model("llama"))
    contexts(generator, keep_hidden_states=keeps)
    with Launches() as launches:
        mixed = contexts(generator, keep_hidden_states=keeps)
    assert mixed.stats.replayed == mixed.stats.passes == len(launches.between) + 1 > 5
    assert launches.between == [[]] * len(launches.between)


def test_so_of_answers_unless_a_row_ends():
    generator = make(tiny_model("llama"))
    prompts = batch()[0][:5]
    for _ in range(2):
        with Launches() as launches:
            answers = generator.answer(prompts, max_new_tokens=9, batch_size=5, eos_token_ids=[])
    assert answers.replayed == answers.passes == len(launches.between) + 1 == 9
    assert launches.between == [[]] * 8


def test_what_a_thread_gets_is_its_own(monkeypatch):
    """Though the next one, which waits for its turn, computes in the same memory."""
    generator = make(tiny_model("llama"))
    want = {seed: contexts(generator, seed=seed).tokens for seed in (1, 2)}
    computing, others = type(generator).computing, []

    @contextmanager
    def then_another(self):
        with computing(self):
            yield
        if not others:
            others.append(None)
            others[0] = contexts(generator, seed=2).tokens

    monkeypatch.setattr(type(generator), "computing", then_another)
    found = contexts(generator, seed=1).tokens
    assert all(map(torch.equal, others[0], want[2]))
    assert all(map(torch.equal, found, want[1]))


def test_what_was_kept_for_larger_generations_counts():
    """Hidden states have as many slots as the K/V that stay, and so do not fit beside them."""
    passes = make(tiny_model("llama"), graph_memory=1.0)._forward()
    large = passes.room(100_000, 40)
    assert large[0] > 100_001
    passes._share = 1.01 * large[0] * 4 * 2 * 2 * 16 / 2**34  # K/V of two layers of two heads of 8 numbers
    assert passes.room(1000, 8) == large
    assert passes.room(1000, 8, keeps_hidden_states=True) == (1001, 8)


MOST_LAUNCHES = {
    "llama": (15, 56), "qwen3": (17, 56), "gemma3": (19, 64), "phi3": (12, 56), "gpt2": (18, 51), "gpt_neox": (23, 56)
}  # fmt: skip
"""Of a recorded pass, per family: in each layer, and all others. Where they fall, lower these."""


def launches_of(family, layers, monkeypatch, generate=contexts):
    config = CONFIGS[family]()
    name = "n_layer" if family == "gpt2" else "num_hidden_layers"
    types = getattr(config, "layer_types", None)
    setattr(config, name, layers)
    if types is not None:
        config.layer_types = (list(types) * layers)[:layers]
    monkeypatch.setitem(CONFIGS, family, lambda: config)
    generator = make(tiny_model(family))
    generate(generator)
    (kind,) = generator._forward()._recorded.values()
    return {Launches.count(replay.calls) for replay in kind.replays.values()}


@pytest.mark.parametrize("family", sorted(MOST_LAUNCHES))
@pytest.mark.one_case
def test_launches_of_a_pass(family, monkeypatch):
    """As many in every pass, whatever its size."""
    (two,), (four,) = (launches_of(family, layers, monkeypatch) for layers in (2, 4))
    of_layer, besides = MOST_LAUNCHES[family]
    assert (four - two) / 2 <= of_layer
    assert 2 * two - four <= besides


def test_launches_of_a_pass_of_answers(monkeypatch):
    def answers(generator):
        generator.answer(batch()[0], max_new_tokens=9, batch_size=5, eos_token_ids=[5])

    (two,), (four,) = (launches_of("llama", layers, monkeypatch, answers) for layers in (2, 4))
    assert 2 * two - four <= 66
