"""What changes a model between two calls: the contexts of the second one are those of the model as it is then.

The measure is the loop over a model that was made anew with the same change, by a generator that has seen no other.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers.contexts import assert_equal, batch
from helpers.graphs import recorded_passes
from helpers.runs import lora
from helpers.training import make_trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCAB, tiny_model
from torch import nn
from transformers import TrainerCallback

from selfgen import ContextGenerator
from selfgen.context import UnsupportedModelError


def inner(model):
    return model.get_base_model() if hasattr(model, "peft_config") else model


def resized(model, by=7):
    torch.manual_seed(3)
    model = inner(model)
    model.resize_token_embeddings(model.get_input_embeddings().weight.shape[0] + by, mean_resizing=False)


def shrunk(model):
    resized(model, by=-5)


def in_half(model):
    inner(model).to(torch.bfloat16)


def in_double(model):
    inner(model).to(torch.float64)


def in_training(model):
    model.train()


def with_dropout(model):
    for layer in inner(model).model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()


def checkpointed(model):
    inner(model).gradient_checkpointing_enable()
    model.train()


def compiled(model):
    inner(model).model.layers[0].compile(backend="eager")


def attention(model):
    inner(model).set_attn_implementation("eager" if inner(model).config._attn_implementation != "eager" else "sdpa")


def rope(model):
    """Another base, in the configuration and in what was computed of it."""
    one = inner(model)
    one.config.rope_parameters = {**one.config.rope_parameters, "rope_theta": 50.0}
    one.model.rotary_emb = type(one.model.rotary_emb)(one.config)


def rope_factor(model):
    inner(model).model.rotary_emb.inv_freq.mul_(3.0)
    inner(model).model.rotary_emb.attention_scaling = 1.3


def other_end(model):
    inner(model).generation_config.eos_token_id = [5, 6, 7]


def layers_cut(model):
    one = inner(model)
    one.model.layers = one.model.layers[:1]
    one.config.num_hidden_layers = 1


def activation(model):
    for layer in inner(model).model.layers:
        layer.mlp.act_fn = nn.Tanh()


def replaced_head(model):
    torch.manual_seed(9)
    head = inner(model).lm_head
    inner(model).lm_head = nn.Linear(head.in_features, head.out_features, bias=False, dtype=head.weight.dtype)


def tied(model):
    one = inner(model)
    one.lm_head.weight = one.get_input_embeddings().weight


def eps(model):
    for layer in inner(model).model.layers:
        layer.input_layernorm.variance_epsilon += 0.5


def scaled(model):
    for weight in model.parameters():
        weight.data.mul_(1.3)


def hooked(model):
    inner(model).model.layers[0].register_forward_hook(lambda module, args, output: output * 1.5)


def on_head(model):
    inner(model).lm_head.register_forward_hook(lambda module, args, output: output * 0.2)


def squashed(model):
    inner(model).lm_head.register_forward_hook(lambda module, args, output: output.tanh() * 4)


def frozen(model):
    model.requires_grad_(False)


PLAIN = [
    resized, shrunk, in_half, in_double, in_training, with_dropout, checkpointed, compiled, attention, rope,
    rope_factor, other_end, layers_cut, activation, replaced_head, tied, eps, scaled, hooked, on_head, squashed, frozen,
]  # fmt: skip


def second(model):
    from peft import LoraConfig

    torch.manual_seed(7)
    if "second" not in model.peft_config:
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
        for name, weight in model.named_parameters():
            if "lora_B.second" in name:
                nn.init.normal_(weight, std=0.2)
    model.set_adapter("second")


def first(model):
    model.set_adapter("default")


def both(model):
    second(model)
    model.base_model.set_adapter(["default", "second"])


def off(model):
    model.base_model.disable_adapter_layers()


def on(model):
    model.base_model.enable_adapter_layers()


def merged(model):
    model.base_model.merge_adapter()


def unmerged(model):
    model.base_model.unmerge_adapter()


def rescaled(model):
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = {name: 2.5 * value for name, value in module.scaling.items()}


ADAPTED = [second, first, both, off, on, merged, unmerged, rescaled, scaled, in_half, in_training, hooked]


def rows_of(method="fixed_point"):
    prompts, references, ids = batch(6, 20)
    prompts, references = ([row % 100 + 3 for row in rows] for rows in (prompts, references))
    return {
        "prompts": prompts,
        "references": references,
        "self_prob": 0.5,
        "seed": 11,
        "sample_ids": ids,
        "method": method,
    }


def check(make, mutations, generator_of=ContextGenerator):
    torch.manual_seed(0)
    model = make()
    generator = generator_of(model, token_budget=40, balance=5.0)
    generator.contexts(**rows_of())
    for number in range(len(mutations)):
        with torch.no_grad():
            mutations[number](model)
        anew = make()
        with torch.no_grad():
            for mutation in mutations[: number + 1]:
                mutation(anew)
        oracle = generator_of(anew, token_budget=40, balance=5.0)
        exact = generator.dtype in (torch.float32, torch.float64)
        for method in ("fixed_point", "sequential"):
            want = oracle.contexts(**rows_of("sequential" if exact else method))
            assert_equal(generator.contexts(**rows_of(method)), want)
        answers, own = (one.answer(rows_of()["prompts"][:3], max_new_tokens=6, seed=2) for one in (generator, oracle))
        assert all(map(torch.equal, answers.tokens, own.tokens))
        assert generator.eos_token_ids == oracle.eos_token_ids


@pytest.mark.parametrize("mutation", PLAIN)
def test_each(mutation):
    check(lambda: tiny_model("llama"), [mutation])


@pytest.mark.slow
@pytest.mark.parametrize("mutation", ADAPTED)
def test_each_of_an_adapter(mutation):
    check(lora, [mutation])


@pytest.mark.slow
@pytest.mark.parametrize("mutation", PLAIN)
def test_each_recorded(mutation):
    with recorded_passes():
        check(lambda: tiny_model("llama"), [mutation, scaled])


def windowed(model):
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 3


def windowed_by_configuration(model):
    windowed(model)
    model.config.sliding_window = 3


def looks_ahead(model):
    for layer in model.model.layers:
        layer.self_attn.is_causal = False


def softer(model):
    model.config.final_logit_softcapping /= 3


def softer_attention(model):
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping /= 3


def head_scaled(model):
    for layer in model.model.layers:
        layer.self_attn.scaling *= 2


@pytest.mark.parametrize(
    ("family", "mutation"),
    [
        ("mistral", windowed),
        ("mistral", windowed_by_configuration),
        ("gemma2", softer),
        ("gemma2", softer_attention),
        ("gemma2", head_scaled),
    ],
)
def test_settings_of_other_families(family, mutation):
    check(lambda: tiny_model(family), [mutation])


def test_a_window_that_the_masks_do_not_have():
    model = tiny_model("gemma2")
    generator = ContextGenerator(model)
    generator.contexts(**rows_of())
    windowed(model)
    with pytest.raises(UnsupportedModelError, match="restricts attention by its mask alone"):
        generator.contexts(**rows_of())


def injected(model):
    """As transformers' add_adapter does it."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(7)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False), model)


def injected_off(model):
    for module in model.modules():
        if hasattr(module, "adapter_layer_names"):
            module.enable_adapters(False)


def test_an_adapter_that_is_put_in_place():
    check(lambda: tiny_model("llama"), [injected, injected_off])


def unloaded(model):
    model.merge_and_unload()


def test_an_adapter_that_is_merged_for_good():
    check(lora, [unloaded])


@pytest.mark.slow
@pytest.mark.parametrize("mutation", [one for one in PLAIN if one not in (in_double, compiled)])
def test_each_invariant(mutation):
    check(
        lambda: tiny_model("llama", dtype=torch.bfloat16), [mutation], partial(ContextGenerator, precision="invariant")
    )


def test_fewer_ids_than_were_told():
    generator = ContextGenerator(tiny_model("llama"), vocab_size=VOCAB)
    generator.contexts(**rows_of())
    shrunk(generator.model)
    for method in ("fixed_point", "sequential"):
        with pytest.raises(ValueError, match="vocab_size"):
            generator.contexts(**rows_of(method))


@pytest.mark.slow
@given(st.lists(st.sampled_from(PLAIN), min_size=2, max_size=4))
@settings(max_examples=10)
def test_some_after_one_another(mutations):
    check(lambda: tiny_model("llama"), mutations)


@pytest.mark.slow
@given(st.lists(st.sampled_from(ADAPTED), min_size=2, max_size=4))
@settings(max_examples=10)
def test_some_of_an_adapter_after_one_another(mutations):
    check(lora, mutations)


class After(TrainerCallback):
    """Changes the model after the third step, when neither the model nor the loss is looked at again."""

    def __init__(self, mutation):
        self.mutation = mutation

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            self.mutation(model)


def check_training(folder, make, mutation, **options):
    """The losses of all steps are those of contexts by the loop and a loss of all logits."""
    found = []
    for exact in (True, False):
        way = {"context_method": "sequential", "lean_loss": False} if exact else {"lean_loss": True}
        torch.manual_seed(0)
        trainer = make_trainer(folder, model=make(), max_steps=5, learning_rate=1e-3, report_to=[], **way, **options)
        trainer.add_callback(After(mutation))
        trainer.train()
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize(
    "mutation", [checkpointed, compiled, attention, rope, rope_factor, layers_cut, activation, replaced_head,
                 tied, eps, scaled, hooked, on_head, squashed]
)  # fmt: skip
def test_between_steps(mutation, tmp_path):
    check_training(tmp_path, lambda: tiny_model("llama"), mutation)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", [second, both, rescaled, scaled, hooked, on_head, squashed])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_between_steps_of_an_adapter(mutation, kl_weight, tmp_path):
    check_training(tmp_path, lora, mutation, kl_weight=kl_weight)


def test_softer_between_steps(tmp_path):
    check_training(tmp_path, lambda: tiny_model("gemma2"), softer)
