"""Exactness: contexts from parallel passes equal the sequential ones token for token."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import pytest
import torch
from helpers.contexts import PER_FAMILY, assert_equal, batch, batches, checked_as
from hypothesis import given
from hypothesis import strategies as st
from models import CONFIGS, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from selfgen import ContextGenerator
from selfgen.context import fixed_point as engine

FAMILIES = sorted(CONFIGS)
model_of = cache(tiny_model)


@cache
def generator_of(family: str):
    return ContextGenerator(model_of(family))


@pytest.mark.parametrize("family", FAMILIES)
@PER_FAMILY
@given(
    batch=batches(),
    self_prob=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    token_budget=st.one_of(st.integers(1, 8), st.integers(9, 400)),
    seed=st.integers(-(2**63), 2**64 - 1),
)
def test_fixed_point_equals_sequential(family, batch, self_prob, temperature, token_budget, seed):
    prompts, references, sample_ids = batch
    generator = ContextGenerator(
        model_of(family), temperature=temperature, token_budget=token_budget, balance=token_budget / 8
    )
    checked_as(generator, generator_of(family))
    arguments = {"seed": seed, "sample_ids": sample_ids}
    expected = generator.contexts(prompts, references, self_prob, method="sequential", **arguments)
    mixed = generator.contexts(prompts, references, self_prob, **arguments)
    assert_equal(mixed, expected)
    for is_self, token, reference in zip(mixed.is_self, mixed.tokens, references, strict=True):
        assert torch.equal(token[~is_self], reference[~is_self])
    if self_prob in (0.0, 1.0):
        assert all((is_self == bool(self_prob)).all() for is_self in mixed.is_self)
    assert mixed.stats.passes <= max(1, mixed.stats.self_tokens) or token_budget < mixed.stats.context_tokens


@given(batch=batches(), budgets=st.lists(st.integers(1, 300), min_size=2, max_size=2), data=st.data())
def test_a_row_does_not_depend_on_its_batch(batch, budgets, data):
    """Alone, in any batch, in any order, at any budget: the sample id is a row's identity."""
    prompts, references, sample_ids = batch
    model = model_of("llama")
    whole = ContextGenerator(model, token_budget=budgets[0], balance=budgets[0] / 8).contexts(
        prompts, references, 0.5, seed=5, sample_ids=sample_ids
    )
    order = data.draw(st.permutations(range(len(prompts))))[: data.draw(st.integers(1, len(prompts)))]
    part = ContextGenerator(model, token_budget=budgets[1], balance=budgets[1] / 8).contexts(
        [prompts[i] for i in order],
        [references[i] for i in order],
        0.5,
        seed=5,
        sample_ids=[sample_ids[i] for i in order],
    )
    for place, index in enumerate(order):
        assert torch.equal(part.tokens[place], whole.tokens[index])
        assert torch.equal(part.is_self[place], whole.is_self[index])


def test_sample_ids_and_seeds_change_the_contexts():
    """The counterpart: other ids or another seed give other noise, so the tests above compare something."""
    generator = ContextGenerator(model_of("llama"), token_budget=64, balance=8)
    prompts, references = [[5, 6, 7]] * 2, [list(range(10, 40))] * 2

    def tokens(seed, ids):
        return generator.contexts(prompts, references, 1.0, seed=seed, sample_ids=ids).tokens

    first, second = tokens(0, [0, 1])
    assert not torch.equal(first, second)
    assert not torch.equal(tokens(1, [0, 1])[0], first)
    assert torch.equal(tokens(0, [1, 2])[0], second)


def test_per_row_self_probabilities():
    generator = ContextGenerator(model_of("llama"), token_budget=16, balance=2)
    rows = [[5, 6, 7]] * 3
    mixed = generator.contexts(rows, rows, [0.0, 1.0, 0.5], seed=0, sample_ids=[0, 1, 2])
    assert not mixed.is_self[0].any()
    assert mixed.is_self[1].all()
    expected = generator.contexts(
        rows, rows, torch.tensor([0.0, 1.0, 0.5]), seed=0, sample_ids=[0, 1, 2], method="sequential"
    )
    assert_equal(mixed, expected)


def test_no_rows():
    mixed = ContextGenerator(model_of("llama"), token_budget=16, balance=2).contexts([], [], 0.5, seed=0, sample_ids=[])
    assert mixed.tokens == []
    assert mixed.stats.passes == 0


@pytest.mark.parametrize("token_budget", [1, 7, 40, 1000])
def test_nothing_final_is_computed_twice(token_budget, monkeypatch):
    """Each window starts where the row's final prefix ends, and no pass exceeds the budget."""
    sizes: list[int] = []
    original = engine.FixedPoint.run

    def record(state, forward, size):
        slots, bounds = state.slots[: size.tokens].clone(), state.cu_seqlens_q
        assert 1 <= len(slots) <= token_budget
        assert bounds[-1] == len(slots) == size.tokens
        assert (state.slots[size.tokens :] < 0).all()
        for row, final in enumerate(state.final.tolist()):
            window = slots[bounds[row] : bounds[row + 1]]
            assert torch.equal(window, torch.arange(final, final + len(window)))
        sizes.append(len(slots))
        original(state, forward, size)
        assert torch.equal(forward.cache.current.position_ids[0], state.positions[slots])

    monkeypatch.setattr(engine.FixedPoint, "run", record)
    generator = ContextGenerator(model_of("llama"), token_budget=token_budget, balance=token_budget / 8)
    rows = [list(range(3, 20)), list(range(30, 60)), [9]]
    mixed = generator.contexts(rows, rows, 0.4, seed=1, sample_ids=[1, 2, 3])
    assert len(sizes) == mixed.stats.passes
    assert sum(sizes) == mixed.stats.tokens_computed
    if token_budget == 1:  # no speculation: the work is exactly every needed position once
        needed = sum(
            len(row) + int(is_self.nonzero().max()) if is_self.any() else 0
            for row, is_self in zip(rows, mixed.is_self, strict=True)
        )
        assert mixed.stats.tokens_computed == needed


def test_head_runs_at_self_positions_only(monkeypatch):
    model = model_of("llama")
    generator = ContextGenerator(model, token_budget=1, balance=0.125)
    rows = [list(range(3, 40))] * 2
    seen: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[:-1].numel()))
    try:
        generator.contexts(rows, rows, 0.2, seed=0, sample_ids=[0, 1])  # also verifies the model with its hook
        seen.clear()
        mixed = generator.contexts(rows, rows, 0.2, seed=0, sample_ids=[0, 1])
    finally:
        handle.remove()
    assert sum(seen) == mixed.stats.self_tokens


def test_the_model_is_left_as_it_was():
    model = tiny_model("gemma3").train()
    model.model.layers[0].eval()
    before = model.config._attn_implementation, [module.training for module in model.modules()]
    ContextGenerator(model, token_budget=8, balance=1).contexts([[3, 4]], [[5, 6, 7]], 1.0, seed=0, sample_ids=[0])
    assert (model.config._attn_implementation, [module.training for module in model.modules()]) == before
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_dropout_is_off_while_contexts_are_made():
    model = tiny_model("gpt2")
    dropped = tiny_model("gpt2").train()
    dropped.config.attn_pdrop = dropped.config.resid_pdrop = 0.5
    for module in dropped.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    rows = [list(range(3, 20))]
    arguments = {"seed": 0, "sample_ids": [0]}
    expected = ContextGenerator(model, token_budget=8, balance=1).contexts(rows, rows, 1.0, **arguments)
    assert_equal(ContextGenerator(dropped, token_budget=8, balance=1).contexts(rows, rows, 1.0, **arguments), expected)


def test_rows_with_invalid_logits_keep_the_reference():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    rows = [list(range(3, 20))]
    for method in ("fixed_point", "sequential"):
        mixed = ContextGenerator(model, token_budget=8, balance=1).contexts(
            rows, rows, 1.0, seed=0, sample_ids=[0], method=method
        )
        assert mixed.tokens[0].tolist() == rows[0]
        assert mixed.stats.invalid == len(rows[0])


@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], ["embed_tokens", "q_proj"]])
def test_peft_model(modules):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=modules, lora_dropout=0.5))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding" in name:
                parameter.normal_(std=0.5)
    generator = ContextGenerator(model.train(), token_budget=16, balance=2)
    rows = [list(range(3, 30))]
    arguments = {"seed": 0, "sample_ids": [0]}
    mixed = generator.contexts(rows, rows, 0.5, **arguments)
    assert_equal(mixed, generator.contexts(rows, rows, 0.5, method="sequential", **arguments))
    plain = ContextGenerator(tiny_model("llama"), token_budget=16, balance=2).contexts(rows, rows, 0.5, **arguments)
    assert not torch.equal(mixed.tokens[0], plain.tokens[0])


@pytest.mark.parametrize(
    ("self_prob", "temperature", "token_budget"),
    [
        (0.5, 0.7, 96),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in [(0.1, 1.0, 40), (1.0, 0.0, 200)]),
    ],
)
def test_smollm2(smollm2, math_rows, self_prob, temperature, token_budget):
    prompts, references, sample_ids = (column[:2] for column in math_rows)
    references = [reference[:16] for reference in references]
    generator = ContextGenerator(
        smollm2[0], temperature=temperature, token_budget=token_budget, balance=token_budget / 8
    )
    arguments = {"seed": 11, "sample_ids": sample_ids}
    expected = generator.contexts(prompts, references, self_prob, method="sequential", **arguments)
    assert_equal(generator.contexts(prompts, references, self_prob, **arguments), expected)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("self_prob", [0.0, 0.1, 0.5, 1.0])
def test_smollm2_on_whole_rows(smollm2, math_rows, self_prob, temperature):
    prompts, references, sample_ids = math_rows
    arguments = {"seed": 12, "sample_ids": sample_ids}
    expected = ContextGenerator(smollm2[0], temperature=temperature).contexts(
        prompts, references, self_prob, method="sequential", **arguments
    )
    for token_budget in (33, 128, 100_000):
        generator = ContextGenerator(
            smollm2[0], temperature=temperature, token_budget=token_budget, balance=token_budget / 8
        )
        assert_equal(generator.contexts(prompts, references, self_prob, **arguments), expected)


class Casts(TorchDispatchMode):
    """How often a matrix of some shapes is cast from fp32."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes, self.count = shapes, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if "copy" in str(operator):  # _to_copy, or _foreach_copy_ with what is cast last
            of = args[-1] if isinstance(args[-1], list) else args[:1]
            self.count += sum(one.dtype == torch.float32 and one.shape in self.shapes for one in of)
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_under_autocast_a_pass_casts_no_weight(family):
    """Once per generation each, also where autocast keeps no cast, and to the contexts of its own casts."""
    model = tiny_model(family)
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    prompts, references, ids = batch()
    found = []
    for own in (False, True):
        generator = ContextGenerator(model, token_budget=20, balance=4.0)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            generator.contexts(prompts, references, 0.5, seed=1, sample_ids=ids)  # looked at before
            if own:
                generator._forward()._weights = nullcontext
            with Casts({module.weight.shape for module in linears}) as casts:
                found.append(generator.contexts(prompts, references, 0.5, seed=1, sample_ids=ids))
        if own:
            assert casts.count > len(linears) * 2
        else:
            assert casts.count == len(linears)
    assert_equal(*found)
