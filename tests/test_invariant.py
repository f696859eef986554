"""``precision="invariant"``: in bf16, contexts equal the loop's at any budget, in any batch and order, by every token.

The loop is each row by itself, one token per pass. What it computes is compared with the model's own forward.
"""

from __future__ import annotations

import pickle
from contextlib import contextmanager, nullcontext
from functools import cache

import pytest
import torch
import transformers as t
from helpers.contexts import PER_FAMILY, assert_equal, batch, batches, checked_as
from helpers.graphs import recorded_passes
from helpers.training import make_trainer, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCAB, each_family, tiny_model
from torch import nn

from selfgen import ContextGenerator, load_contexts, write_contexts
from selfgen.context import invariant as engine
from selfgen.context.forward import Forward
from selfgen.context.models import inference, own_logits
from selfgen.context.ragged import RaggedCache, RaggedPass, UnsupportedModelError, ragged_logits, ragged_model

NO = ("gpt_oss",)  # whose experts are no linear layers
BUDGETS = (1, 7, 60, 400)
DTYPES = st.sampled_from(["weights", "autocast"])


@cache
def model_of(family: str, how: str = "weights"):
    return tiny_model(family, dtype=torch.bfloat16 if how == "weights" else torch.float32)


def in_bf16(how: str):
    return torch.autocast("cpu", torch.bfloat16) if how == "autocast" else nullcontext()


def generator_of(model, budget: int = 32, precision: str = "invariant", **options) -> ContextGenerator:
    return ContextGenerator(model, token_budget=budget, balance=max(budget / 8, 0.1), precision=precision, **options)


@cache
def generator_that_checks(family: str, how: str) -> ContextGenerator:
    return generator_of(model_of(family, how))


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@each_family("gemma3", "gpt2", "qwen3", but=NO)
@settings(max_examples=PER_FAMILY.max_examples // 2)
@given(
    batch=batches(max_rows=5),
    how=DTYPES,
    self_prob=st.sampled_from([0.1, 0.5, 1.0]),
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    budgets=st.lists(st.integers(1, 8) | st.integers(9, 400), min_size=2, max_size=2),
    balance=st.sampled_from([0.1, 2.0, 50.0]),
    count=st.integers(1, 3),
    seed=st.integers(-(2**63), 2**64 - 1),
    data=st.data(),
)
def test_contexts_equal_the_loop_s(
    family, batch, how, self_prob, temperature, budgets, balance, count, seed, data
):  # fmt: skip
    """At two budgets; the second time some of the rows in another order, and on other threads."""
    prompts, references, sample_ids = batch
    model = model_of(family, how)
    first, second = (
        ContextGenerator(model, temperature=temperature, token_budget=b, balance=balance, precision="invariant")
        for b in budgets
    )
    with in_bf16(how):
        for generator in (first, second):
            checked_as(generator, generator_that_checks(family, how))
        loop = first.contexts(prompts, references, self_prob, seed=seed, sample_ids=sample_ids, method="sequential")
        assert_equal(first.contexts(prompts, references, self_prob, seed=seed, sample_ids=sample_ids), loop)
        order = data.draw(st.permutations(range(len(prompts))))[: data.draw(st.integers(1, len(prompts)))]
        some = ([column[i] for i in order] for column in (prompts, references, sample_ids))
        prompts, references, sample_ids = some
        with threads(count):
            mixed = second.contexts(prompts, references, self_prob, seed=seed, sample_ids=sample_ids)
    for place, index in enumerate(order):
        assert torch.equal(mixed.tokens[place], loop.tokens[index])
        assert torch.equal(mixed.is_self[place], loop.is_self[index])


def differing(family: str, how: str, precision: str, seed: int) -> int:
    """Rows of 16, times four budgets, whose contexts are not those of the loop."""
    prompts, references, sample_ids = batch(16, 24)
    arguments = prompts, references, 0.5
    keys = {"seed": seed, "sample_ids": sample_ids}
    first, *others = (generator_of(model_of(family, how), budget, precision) for budget in BUDGETS)
    with in_bf16(how):
        generators = [first, *(checked_as(other, first) for other in others)]
        made = [generator.contexts(*arguments, **keys) for generator in generators]
        loop = first.contexts(*arguments, **keys, method="sequential")
    return sum(not torch.equal(a, b) for one in made for a, b in zip(one.tokens, loop.tokens, strict=True))


@pytest.mark.parametrize("how", ["weights", pytest.param("autocast", marks=pytest.mark.slow)])
def test_ordinary_products_do_not_give_the_loop_s_contexts(how):
    """The counterpart: here near ties are met, and turn. It was 4 to 16 of 128 for each of the families."""
    families = "gpt2", "olmo2", "qwen3"
    assert any(differing(family, how, "model", seed) for seed in range(2) for family in families)
    assert sum(differing(family, how, "invariant", seed=0) for family in families) == 0


@pytest.mark.parametrize("how", ["weights", "autocast"])
@each_family("gemma3", "gpt2", "qwen3", but=NO)
def test_logits_are_those_of_the_model_up_to_rounding(family, how):
    model = model_of(family, how)
    row = torch.arange(3, 40)
    windows = RaggedPass.of_windows([(0, 0, len(row))], row.device)
    every = torch.arange(len(row))
    with in_bf16(how), inference(model):
        own = own_logits(model, row, every).float()
        with ragged_model(model), engine.Invariant(model).used():
            found = ragged_logits(model, RaggedCache(model, len(row)), windows, row, every).float()
    with torch.no_grad():
        exact = own_logits(tiny_model(family), row, every)
    scale = own.std()
    assert (found - own).abs().mean() <= 0.05 * scale
    # As near to what fp32 gives as the model's own bf16 is.
    off, own_off = ((logits - exact).abs().mean() for logits in (found, own))
    assert off <= 1.3 * own_off if how == "autocast" else off <= 1.3 * own_off + 0.05 * scale


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_answers_do_not_depend_on_their_batch(how):
    model = model_of("llama", how)
    prompts, _, ids = batch(12, 20)
    generator = generator_of(model)
    with in_bf16(how):
        keys = {"max_new_tokens": 12, "seed": 3, "eos_token_ids": []}
        together = generator.answer(prompts, sample_ids=ids, batch_size=12, **keys).tokens
        backwards = generator.answer(prompts[::-1], sample_ids=ids[::-1], batch_size=5, **keys).tokens
        references = [torch.zeros(12, dtype=torch.int64)] * len(prompts)
        loop = generator.contexts(prompts, references, 1.0, seed=3, sample_ids=ids, method="sequential").tokens
    assert all(map(torch.equal, together, backwards[::-1]))
    assert all(map(torch.equal, together, loop))


@pytest.mark.parametrize("how", ["weights", "autocast"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.each_value
def test_recorded_passes_give_the_same(family, how):
    """A replay reads tables, and weights in autocast's dtype, where they were when it was recorded."""
    model = tiny_model(family, dtype=torch.bfloat16 if how == "weights" else torch.float32)
    prompts, references, ids = batch(4, 16)
    keys = {"seed": 0, "sample_ids": ids}
    with recorded_passes():
        recording = generator_of(model)
        for _ in range(2):
            with in_bf16(how):
                for _ in range(3):
                    mixed = recording.contexts(prompts, references, 0.5, **keys)
                plain = generator_of(model)
                plain._passes = Forward(model, plain._invariant)
                assert_equal(mixed, plain.contexts(prompts, references, 0.5, method="sequential", **keys))
            assert mixed.stats.replayed > 0
            with torch.no_grad():  # in place, as the step of an optimizer does
                model.lm_head.weight.mul_(1.25)


@pytest.mark.parametrize("adapters", [torch.bfloat16, torch.float32])
def test_adapters(adapters):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.5)
    model = peft.get_peft_model(tiny_model("llama", dtype=torch.bfloat16), lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapters)
    prompts, references, ids = batch(8, 20)
    keys = {"seed": 1, "sample_ids": ids}
    first = generator_of(model)
    loop = first.contexts(prompts, references, 0.5, method="sequential", **keys)
    for budget in BUDGETS:
        generator = checked_as(generator_of(model, budget), first)
        assert_equal(generator.contexts(prompts, references, 0.5, **keys), loop)


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_recorded_steps_of_the_loop_give_the_same(how):
    """Each token is one replay, for any rows and seed, beside recordings of the other method; and as weights are."""
    model = tiny_model("llama", dtype=torch.bfloat16 if how == "weights" else torch.float32)
    prompts, references, ids = batch(5, 16)
    plain = generator_of(model)
    plain._passes = Forward(model, plain._invariant)
    with recorded_passes():
        found = generator_of(model)
        for seed in range(3):
            rows = slice(seed % 2, 5)
            given, keys = (prompts[rows], references[rows], 0.7), {"seed": seed, "sample_ids": ids[rows]}
            with in_bf16(how):
                want = plain.contexts(*given, **keys, method="sequential")
                loop = found.contexts(*given, **keys, method="sequential")
                assert_equal(loop, want)
                assert_equal(found.contexts(*given, **keys), want)
            assert want.stats.captured == want.stats.replayed == want.stats.padding == 0
            assert (loop.stats.captured, loop.stats.replayed) == (seed == 0, loop.stats.passes - (seed == 0))
            with torch.no_grad():
                model.lm_head.weight.mul_(1.25)


def test_generators_can_be_copied():
    generator = generator_of(model_of("llama"))
    prompts, references, ids = (column[:2] for column in batch())
    want = generator.contexts(prompts, references, 0.5, seed=0, sample_ids=ids)
    assert_equal(pickle.loads(pickle.dumps(generator)).contexts(prompts, references, 0.5, seed=0, sample_ids=ids), want)


def test_the_model_is_left_as_it_was():
    model = tiny_model("gemma3", dtype=torch.bfloat16).train()
    before = [module.training for module in model.modules()]
    for method in ("fixed_point", "sequential"):
        generator_of(model).contexts([[3, 4]], [[5, 6, 7]], 1.0, seed=0, sample_ids=[0], method=method)
    modules = list(model.modules())
    assert [module.training for module in modules] == before
    assert not any("forward" in vars(one) or one._forward_hooks or one._forward_pre_hooks for one in modules)


# ---- What is refused -------------------------------------------------------------------------------------------------

GOOD = {"prompts": [[3, 4, 5]], "references": [[6, 7, 8]], "self_prob": 0.5, "seed": 0, "sample_ids": [0]}


def in_both_methods(model, message: str) -> None:
    for method in ("fixed_point", "sequential"):
        with pytest.raises(UnsupportedModelError, match=message):
            generator_of(model).contexts(**GOOD, method=method)
    with pytest.raises(UnsupportedModelError, match=message):
        generator_of(model).answer([[3, 4, 5]])


def test_a_product_outside_of_linear_layers():
    in_both_methods(
        tiny_model("gpt_oss", dtype=torch.bfloat16),
        r'GptOssTopKRouter \(model\.layers\.0\.mlp\.router\) computes addmm, .* use precision="model"',
    )


def with_mlp(make):
    """A model whose first gated layer is what ``make`` makes of it."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    model.model.layers[0].mlp = make(model.model.layers[0].mlp)
    return model


class Around(nn.Module):
    """A layer, and what ``change`` makes of its result."""

    def __init__(self, layer, change):
        super().__init__()
        self.layer, self.change = layer, change

    def forward(self, hidden):
        return self.change(self.layer(hidden))


EYE = torch.eye(32).bfloat16()


class Half(nn.Linear):
    """A linear layer whose forward is its own."""

    def forward(self, hidden):
        return super().forward(hidden) / 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda mlp: Around(mlp, lambda x: x + x.softmax(-1)), r"Around \(model\.layers\.0\.mlp\) computes _softmax"),
        (lambda mlp: Around(mlp, lambda x: x + x.sum(-1, keepdim=True) / 99), r"Around .* computes sum"),
        (lambda mlp: Around(mlp, lambda x: x + x.mean(1, keepdim=True)), r"Around .* computes mean"),
        (lambda mlp: Around(mlp, lambda x: x.cumsum(-1)), r"Around .* computes cumsum"),
        (lambda mlp: Around(mlp, lambda x: nn.functional.gelu(x)), r"Around .* computes gelu"),
        (lambda mlp: Around(mlp, lambda x: x @ EYE), r"Around .* computes mm"),
        (lambda mlp: nn.Sequential(mlp, Half(32, 32).bfloat16()), r"Half \(model\.layers\.0\.mlp\.1\) computes addmm"),
        # Exact operations, which depend on the batch all the same: bits are compared, too.
        (lambda mlp: Around(mlp, lambda x: x * x.shape[1]), r"Around \(model\.layers\.0\.mlp\) gives a row"),
        (lambda mlp: Around(mlp, lambda x: x + x[:, :1] / 256), r"Around \(model\.layers\.0\.mlp\) gives a row"),
    ],
)  # fmt: skip
def test_what_may_depend_on_the_batch_is_refused_by_name(make, message, monkeypatch):
    monkeypatch.setattr("selfgen.context.verification._compare_ragged", lambda *_: None)  # which sees some of them
    with pytest.raises(UnsupportedModelError, match=message):
        generator_of(with_mlp(make)).contexts(**GOOD)


def test_activations_need_their_table(monkeypatch):
    """torch's gelu gives numbers that do not fill a vector register other bits, so without a table it is refused."""
    model = tiny_model("gemma3", dtype=torch.bfloat16)
    monkeypatch.setattr(engine, "_table_of", lambda *_: None)
    with pytest.raises(UnsupportedModelError, match=r"GELUTanh \(model\.layers\.0\.mlp\.act_fn\) computes gelu"):
        generator_of(model).contexts(**GOOD)


def test_activations_of_few_tokens():
    """Of tanh's gelu in bf16, torch computes four numbers otherwise alone than among others."""
    module, numbers = t.activations.ACT2FN["gelu_pytorch_tanh"], engine._numbers(torch.bfloat16, torch.device("cpu"))
    table = engine._table_of(module, torch.bfloat16, torch.device("cpu"))
    alone = torch.cat([engine._look_up(module, table, one[None]) for one in numbers.view(-1, 1, 64)]).flatten()
    few = torch.cat([engine._look_up(module, table, one[None]) for one in numbers.view(-1, 1, 8)]).flatten()
    assert torch.equal(alone.nan_to_num(7.0), table.nan_to_num(7.0))
    assert torch.equal(few.nan_to_num(7.0), table.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu2", "tanh", "quick_gelu"])
def test_tables_have_what_activations_give(name, dtype):
    module = t.activations.ACT2FN[name]
    table = engine._table_of(module, dtype, torch.device("cpu"))
    numbers = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).mul(4).to(dtype)
    torch.testing.assert_close(engine._look_up(module, table, numbers), module(numbers), rtol=2**-6, atol=1e-6)
    assert torch.equal(
        engine._look_up(module, table, numbers.T)[:1], engine._look_up(module, table, numbers[:, 0])[None]
    )
    every = engine._numbers(dtype, torch.device("cpu"))
    assert torch.equal(engine._look_up(module, table, every).nan_to_num(7.0), table.nan_to_num(7.0))
    assert torch.equal(engine._look_up(module, table, torch.zeros(3)), module(torch.zeros(3)))  # fp32: its own forward


@pytest.mark.parametrize("family", ["gemma3", "llama", "olmo2", "phi3", "qwen3"])
def test_norms_are_one_kernel(family, monkeypatch):
    """Or a GPU's mean would be refused, as it may split a row's sum by the number of rows."""
    model = model_of(family)
    with torch.no_grad(), engine.Invariant(model).used():
        norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
        assert norms
        assert all("forward" in vars(module) for module in norms)
    monkeypatch.setattr(engine, "_MOST_WIDTH", 0)  # no mean is known any more
    generator_of(tiny_model(family, dtype=torch.bfloat16)).contexts(**GOOD)
    monkeypatch.setattr(engine.Fused, "norms", lambda self: ())
    with pytest.raises(UnsupportedModelError, match=r"RMSNorm \(.*\) computes mean"):
        generator_of(tiny_model(family, dtype=torch.bfloat16)).contexts(**GOOD)


@pytest.mark.parametrize("module", [nn.Softmax(-1), nn.GLU(), nn.LogSoftmax(-1), nn.PReLU()], ids=str)
def test_what_is_no_function_of_one_number_has_no_table(module):
    assert engine.Invariant(tiny_model("llama"))._table(module, torch.bfloat16) is None


def test_full_precision_and_quantized_weights():
    in_both_methods(tiny_model("llama"), r"is for bf16 and fp16, and LlamaForCausalLM computes in float32.*: use|; use")
    quantized = tiny_model("llama", dtype=torch.bfloat16)
    quantized.quantization_method = "int8"
    in_both_methods(quantized, r"LlamaForCausalLM has quantized weights \(int8\)")


def test_models_without_a_ragged_path_say_that_no_method_helps():
    model = t.AutoModelForCausalLM.from_config(
        t.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8), dtype=torch.bfloat16
    ).eval()
    message = (
        r'precision="invariant" computes everything over the ragged cache, whatever the method, .* precision="model"'
    )
    in_both_methods(model, message)


@pytest.mark.parametrize("precision", ["bf16", None, True])
def test_another_precision(precision):
    with pytest.raises(ValueError, match=f'precision is {precision!r}; it must be "model" or "invariant"'):
        ContextGenerator(model_of("llama"), precision=precision)


# ---- Training --------------------------------------------------------------------------------------------------------


def test_training_in_mixed_precision(tmp_path):
    """A step's own forward is the model's: passes are reused as far as rounding allows, and losses are near."""
    columns = [torch.tensor(row) for row in rows()["prompt_ids"]], [torch.tensor(row) for row in rows()["answer_ids"]]

    def contexts_of(budget):
        how = {"bf16": True, "context_precision": "invariant", "token_budget": budget, "max_steps": 2, "report_to": []}
        trainer = make_trainer(tmp_path / str(budget), model=tiny_model("llama"), **how)
        trainer.train()
        mixed = trainer.generator.contexts(*columns, 0.5, seed=3, sample_ids=range(16))
        return trainer, mixed.tokens

    (trainer, few), (_, many) = contexts_of(1), contexts_of(300)
    assert trainer._reuse.on
    assert trainer._reuse.verified
    assert trainer.generator.precision == "invariant"
    assert trainer.generator.dtype == torch.bfloat16
    assert all(map(torch.equal, few, many))


def test_stored_contexts_are_told_apart_by_it(tmp_path):
    """And by nothing that changes no bit: batches and budgets."""
    model, data, how = model_of("llama"), rows(6), {"self_prob": 0.5, "seed": 0}
    record = write_contexts(generator_of(model, 9), data, tmp_path / "a", batch_size=2, **how)
    write_contexts(generator_of(model, 300), data, tmp_path / "b", batch_size=6, **how)
    assert record["settings"]["context_precision"] == "invariant"
    assert not record["settings"].keys() & {"batch_size", "token_budget", "balance"}
    one, other = (load_contexts(tmp_path / name)["context_ids"] for name in "ab")
    assert list(one) == list(other)
    with pytest.raises(ValueError, match=r"context_precision was .invariant., is .model."):
        write_contexts(generator_of(model, precision="model"), data, tmp_path / "a", batch_size=2, **how)


def test_an_unknown_precision_of_contexts(tmp_path):
    with pytest.raises(ValueError, match="context_precision is 'bf16'; accepted: model, invariant"):
        make_trainer(tmp_path, context_precision="bf16")


# ---- The real model --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_on_whole_rows(smollm2_folder, math_rows):
    """All 16 rows at three budgets, where ordinary products gave 11 (docs/exactness.md)."""
    model = t.AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.bfloat16)
    prompts, references, ids = math_rows
    loop = generator_of(model).contexts(prompts, references, 0.25, seed=0, sample_ids=ids, method="sequential")
    for budget in (48, 96, 100_000):
        mixed = generator_of(model, budget).contexts(prompts, references, 0.25, seed=0, sample_ids=ids)
        assert_equal(mixed, loop)


@pytest.mark.slow
def test_smollm2_on_some_tokens(smollm2_folder, math_rows):
    model = t.AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.bfloat16)
    prompts, references, ids = (column[:2] for column in math_rows)
    prompts, references = [prompt[-40:] for prompt in prompts], [reference[:24] for reference in references]
    keys = {"seed": 11, "sample_ids": ids}
    first = generator_of(model)
    loop = first.contexts(prompts, references, 0.5, method="sequential", **keys)
    for budget in (33, 1000):
        generator = checked_as(generator_of(model, budget), first)
        assert_equal(generator.contexts(prompts, references, 0.5, **keys), loop)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_function_is_tried_on_more_numbers_than_the_probe_has(dtype):
    def large_numbers_depend_on_the_place(numbers):
        return numbers * torch.where(numbers.abs() > 1e4, 1 + (len(numbers) > 64), 1)

    probe = torch.randn(27, dtype=dtype)
    operations = engine._Operations(nn.Identity(), {})
    assert not operations._is_everywhere_the_same(large_numbers_depend_on_the_place, (probe,), {}, probe)
    assert operations._is_everywhere_the_same(torch.abs, (probe,), {}, probe)
