"""Weights of several dtypes: what a model's own forward computes with them is computed, and the rest is refused.

fp64 beside fp32 stands in for fp32 beside bf16: the same casts happen, and rounding turns no token.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import transformers as t
from helpers.training import generate, losses_of, make_trainer, padded, rows
from models import BASE, CONFIGS, tiny_model
from torch import nn
from zoo import definition
from zoo.definition import SEED, contexts, wrong_tokens

from selfgen import ContextGenerator, UnsupportedModelError
from selfgen.context.precision import full_precision, precision_of
from selfgen.training.losses import AnswerLoss, why_not_lean
from selfgen.training.reuse import reuse_passes
from selfgen_kernels import sample_mix

CONFIGS = CONFIGS | {
    "qwen2_moe": lambda: t.Qwen2MoeConfig(
        **{name: value for name, value in BASE.items() if name != "head_dim"},
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        decoder_sparse_step=1,
    )
}
FAMILIES = ["llama", "qwen2_moe", *(pytest.param(family, marks=pytest.mark.slow) for family in ("qwen2", "gemma2"))]


def takes(module, dtype):
    module.register_forward_pre_hook(lambda _, args: (args[0].to(dtype), *args[1:]))


def gives(module, dtype):
    module.register_forward_hook(lambda _, args, output: output.to(dtype))


def norms_of(model):
    return [module for name, module in model.named_modules() if name.endswith("norm")]


def head(model, low, high):
    """As TRL's ``cast_lm_head_to_fp32`` does."""
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.lm_head.to(high)
    takes(model.lm_head, high)


def tied_head(model, low, high):
    embedding = model.get_input_embeddings().to(high)
    model.lm_head.weight = embedding.weight
    takes(model.lm_head, high)
    gives(embedding, low)


def cast_logits(model, low, high):
    gives(model.lm_head, high)


class Cast(nn.Sequential):
    def forward(self, hidden):
        return super().forward(hidden).double()


def wrapped_head(model, low, high):
    model.lm_head = Cast(model.lm_head)


def norms(model, low, high):
    for norm in norms_of(model):
        gives(norm.to(high), low)


def last_norm_and_head(model, low, high):
    model.model.norm.to(high)
    head(model, low, high)


def embedding(model, low, high):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    gives(model.get_input_embeddings().to(high), low)


def attention(model, low, high):
    """The K/V, too."""
    for layer in model.model.layers:
        for module in layer.self_attn.modules():
            if isinstance(module, nn.Linear):
                takes(module.to(high), high)
        gives(layer.self_attn.o_proj, low)


def all_but_attention(model, low, high):
    """The residual stream, too."""
    model.to(high)
    for layer in model.model.layers:
        for module in layer.self_attn.modules():
            if isinstance(module, nn.Linear):
                takes(module.to(low), low)
                gives(module, high)


def gates(model, low, high):
    for layer in model.model.layers:
        takes(layer.mlp.shared_expert_gate.to(high), high)
        gives(layer.mlp.shared_expert_gate, low)


MIXES = {
    mix.__name__: mix
    for mix in (
        head, tied_head, cast_logits, wrapped_head, norms, last_norm_and_head, embedding, attention, all_but_attention,
        gates,
    )
}  # fmt: skip


def mixed(family, mix, low=torch.float32, high=torch.float64):
    if mix == "gates" and family != "qwen2_moe":
        pytest.skip("no router gates")
    if mix == "all_but_attention" and family == "qwen2_moe":
        pytest.skip("torch has no products of experts in fp64")
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=low).eval()
    MIXES[mix](model, low, high)
    return model


LENGTHS = [(30, 9), (3, 9), (5, 20)]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.each_value
def test_contexts_are_those_of_the_models_own_forward(family, mix):
    prompts, references = definition.rows(LENGTHS)
    model = mixed(family, mix)
    for method in ("fixed_point", "sequential"):
        made = contexts(model, prompts, references, method=method)
        assert made.stats.self_tokens > 10
        assert wrong_tokens(model, prompts, references, made) == 0


@pytest.mark.parametrize("mix", ["head", "tied_head", "norms", "attention"])
def test_answers_are_those_of_the_models_own_forward(mix):
    model, (prompts, _) = mixed("llama", mix), definition.rows(LENGTHS)
    answers = ContextGenerator(model).answer(prompts, max_new_tokens=8, seed=SEED)
    for number, (prompt, answer) in enumerate(zip(prompts, answers.tokens, strict=True)):
        row = torch.cat([prompt, answer])
        with torch.no_grad():
            logits = model(input_ids=row[None]).logits[0, len(prompt) - 1 : -1].float()
        want, _ = sample_mix(
            logits, answer, 1.0, seed=SEED, sample_ids=torch.full_like(answer, number),
            positions=torch.arange(len(answer)),
        )  # fmt: skip
        assert torch.equal(answer, want)


@pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.one_case
def test_in_bf16_few_tokens_differ(mix, autocast):
    """Those of near ties (docs/exactness.md)."""
    model = mixed("qwen2_moe" if mix == "gates" else "llama", mix, torch.bfloat16, torch.float32)
    prompts, references = definition.rows([*LENGTHS, (4, 40)])
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        for method in ("fixed_point", "sequential"):
            made = contexts(model, prompts, references, method=method)
            assert wrong_tokens(model, prompts, references, made) <= made.stats.self_tokens / 8


def gradients(model):
    found = {
        name: parameter.grad.double() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    return found


def distance(found, wanted) -> float:
    assert found.keys() == wanted.keys()
    off = sum((found[name] - wanted[name]).square().sum() for name in wanted)
    return float((off / sum(grad.square().sum() for grad in wanted.values())).sqrt())


@pytest.mark.parametrize("mix", MIXES)
def test_the_step_over_reused_passes_is_the_ordinary_one(mix):
    model, data = mixed("qwen2_moe" if mix == "gates" else "llama", mix), rows(6)
    made = generate(model, data, keep_hidden_states=True)
    inputs, slots = padded(model, data, made)
    model.train()
    ordinary = model(**inputs).loss
    ordinary.backward()
    want = gradients(model)
    with reuse_passes(made.hidden_states, slots) as reused:
        loss = model(**inputs).loss
    loss.backward()
    assert sorted(reused) == [0, 1]
    torch.testing.assert_close(loss, ordinary, rtol=1e-5, atol=0)
    assert distance(gradients(model), want) <= 1e-5


NOT_LEAN = {"cast_logits": "casts what leaves it to torch.float64", "wrapped_head": "is a Cast with a forward"}


@pytest.mark.parametrize("mix", MIXES)
def test_the_lean_loss_is_the_ordinary_one(mix):
    model, data = mixed("qwen2_moe" if mix == "gates" else "llama", mix), rows(6)
    inputs, _ = padded(model, data, generate(model, data))
    loss = AnswerLoss(model.train())
    if mix in NOT_LEAN:
        assert NOT_LEAN[mix] in loss.not_lean
    else:
        assert loss.not_lean is None
    ordinary = model(**inputs).loss
    ordinary.backward()
    want = gradients(model)
    with loss.inside():
        found = model(**inputs).loss
    found.backward()
    torch.testing.assert_close(found, ordinary, rtol=1e-6, atol=0)
    assert distance(gradients(model), want) <= 1e-6


def test_a_hook_that_casts_logits_under_bf16():
    model = mixed("llama", "cast_logits", torch.bfloat16, torch.float32)
    assert "torch.float32" in why_not_lean(model)


def bf16_with_fp32_norms(family="llama"):
    model = tiny_model(family, dtype=torch.bfloat16)
    for norm in norms_of(model):
        norm.float()
    return model


@pytest.mark.parametrize("method", ["fixed_point", "sequential"])
def test_what_the_models_own_forward_cannot_compute(method):
    model, (prompts, references) = bf16_with_fp32_norms(), definition.rows(LENGTHS)
    generator = ContextGenerator(model)
    how = {"seed": SEED, "sample_ids": range(len(prompts)), "method": method}
    message = (
        r"layers.0.self_attn.q_proj.weight is torch.bfloat16, and model.layers.0.input_layernorm.weight is "
        r"torch.float32 \(.*\); cast them"
    )
    with pytest.raises(UnsupportedModelError, match=message):
        generator.contexts(prompts, references, 0.5, **how)
    with pytest.raises(UnsupportedModelError, match=message):
        generator.answer(prompts, max_new_tokens=2)
    with torch.autocast("cpu", torch.bfloat16):  # which casts what enters a product
        generator.contexts(prompts, references, 0.5, **how)
    model.bfloat16()
    generator.contexts(prompts, references, 0.5, **how)


def test_experts_of_another_dtype():
    model = tiny_model("gpt_oss")
    model.model.layers[1].mlp.experts.double()
    with pytest.raises(
        UnsupportedModelError, match=r"layers.1.mlp.experts.* is torch.float64, and .* is torch.float32"
    ):
        ContextGenerator(model).contexts([[5]], [[6]], 0.5, seed=0, sample_ids=[0])


def test_the_precision_of_a_mix():
    model = mixed("llama", "tied_head", torch.bfloat16, torch.float32)
    assert model.dtype == torch.float32  # transformers', of the first weight
    assert precision_of(model) == ContextGenerator(model).dtype == torch.bfloat16
    assert not full_precision(model)
    assert full_precision(mixed("llama", "head"))


@pytest.mark.parametrize("mix", ["head", "tied_head", "norms"])
@pytest.mark.one_case
def test_a_step_of_the_trainer(tmp_path, mix):
    found = []
    for number, how in enumerate([{"reuse_passes": False, "lean_loss": False}, {"lean_loss": True}]):
        trainer = make_trainer(tmp_path / str(number), mixed("llama", mix), max_steps=2, **how)
        found.append([loss for loss, _ in losses_of(trainer)])
        assert trainer._reuse.on == how.get("reuse_passes", True)
    torch.testing.assert_close(torch.stack(found[1]), torch.stack(found[0]), rtol=1e-4, atol=0)


def test_mixed_precision_trains_what_only_autocast_computes(tmp_path):
    with pytest.raises(UnsupportedModelError, match="have dtypes that its own forward can't compute with"):
        make_trainer(tmp_path / "plain", bf16_with_fp32_norms())
    found = []
    for number, how in enumerate([{"reuse_passes": False, "lean_loss": False}, {"lean_loss": True}]):
        trainer = make_trainer(tmp_path / str(number), bf16_with_fp32_norms(), max_steps=1, bf16=True, **how)
        found.append([loss for loss, _ in losses_of(trainer)])
        assert trainer._reuse.on == how.get("reuse_passes", True)
    torch.testing.assert_close(torch.stack(found[1]), torch.stack(found[0]), rtol=2e-2, atol=0)


def test_training_computes_something_else(tmp_path, caplog):
    """Even where rounding would hide it: here, by a third of what bf16 may be off by."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    model.lm_head.register_forward_hook(lambda head, _, logits: logits * (1.01 if head.training else 1.0))
    trainer = make_trainer(tmp_path, model, max_steps=1)
    trainer.train()
    assert not trainer._reuse.on
    assert "training and inference differ" in caplog.text
