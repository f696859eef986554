"""Replay: the kept passes give the loss and the gradients of an ordinary forward and backward over the same context."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import transformers
from helpers.training import distance, generate, gradients, make_trainer, padded, rows, weights
from models import ALTERNATING, BASE, VOCAB, each_family, tiny_model
from packaging.version import Version
from transformers import AutoModelForCausalLM

from selfgen.context.hidden_states import ReuseError
from selfgen.data import Collator
from selfgen.training.reuse import reuse_passes


@each_family()
def test_loss_and_gradients_are_those_of_the_ordinary_step(family):
    if family == "gpt_neox" and Version(transformers.__version__) < Version("5.2"):
        pytest.skip("its layers return tuples before transformers 5.2, so its passes are not reused")
    model, data = tiny_model(family), rows(5)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):  # GPT-2's default
            module.p = 0.0
    mixed = generate(model, data, keep_hidden_states=True)
    without = generate(model, data)
    assert all(map(torch.equal, mixed.tokens, without.tokens))  # keeping changes no token
    inputs, slots = padded(model, data, mixed)

    model.train()
    ordinary = model(**inputs).loss
    ordinary.backward()
    want = gradients(model)
    with reuse_passes(mixed.hidden_states, slots):
        reused = model(**inputs).loss
    reused.backward()
    got = gradients(model)

    torch.testing.assert_close(reused, ordinary, rtol=1e-5, atol=0)
    assert got.keys() == want.keys()
    assert distance(got, want) <= 1e-5


@pytest.mark.parametrize("precision", ["mixed", "whole"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_bf16_is_as_good_as_the_ordinary_step(family, precision):
    """Over the same contexts, and measured by their step in fp32."""
    dtype, autocast = torch.bfloat16, nullcontext
    if precision == "mixed":
        dtype, autocast = torch.float32, partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    model, data = tiny_model(family, dtype=dtype), rows(8)
    with autocast():
        mixed = generate(model, data, keep_hidden_states=True)
    inputs, slots = padded(model, data, mixed)
    model.train()
    with autocast():
        model(**inputs).loss.backward()
    ordinary = gradients(model)
    with autocast(), reuse_passes(mixed.hidden_states, slots):
        loss = model(**inputs).loss
    loss.backward()
    reused = gradients(model)
    model.float()(**inputs).loss.backward()
    exact = gradients(model)
    assert distance(reused, exact) <= 1.25 * distance(ordinary, exact)


def test_the_layers_forward_is_not_computed_again():
    """What the forward returns is what was kept, whatever the weights are by now."""
    model, data = tiny_model("llama"), rows(3)
    mixed = generate(model, data, keep_hidden_states=True)
    inputs, slots = padded(model, data, mixed)
    model.train()
    before = model(**inputs).loss
    model.model.layers[0].mlp.down_proj.weight.data.zero_()
    assert not torch.equal(model(**inputs).loss, before)
    with reuse_passes(mixed.hidden_states, slots):  # without gradients, newer transformers checkpoint nothing
        torch.testing.assert_close(model(**inputs).loss, before, rtol=1e-5, atol=0)


def test_every_position_but_a_rows_last_is_kept_from_its_final_context():
    model, data = tiny_model("llama"), rows(6)
    mixed = generate(model, data, keep_hidden_states=True)
    inputs, slots = padded(model, data, mixed)
    with torch.no_grad():
        want = model(**inputs, output_hidden_states=True).hidden_states
    learned = inputs["attention_mask"].bool().clone()
    for row in learned:
        row[row.sum() - 1] = False
    for index in range(len(model.model.layers)):
        got = mixed.hidden_states.at(index, slots)
        torch.testing.assert_close(got[learned], want[index][learned], rtol=1e-4, atol=1e-5)


def test_the_model_is_as_it_was():
    model, data = tiny_model("llama"), rows(2)
    mixed = generate(model, data, keep_hidden_states=True)
    _, slots = padded(model, data, mixed)
    model.gradient_checkpointing_enable()
    layer = model.model.layers[0]
    before = layer.gradient_checkpointing, layer._gradient_checkpointing_func
    with reuse_passes(mixed.hidden_states, slots):
        assert layer._gradient_checkpointing_func is not before[1]
    assert (layer.gradient_checkpointing, layer._gradient_checkpointing_func) == before
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model.model.layers)


def trained(tmp_path, name, model=None, **changes):
    trainer = make_trainer(tmp_path / name, model=model, optim="sgd", **changes)
    start = weights(trainer.model)
    trainer.train()
    return trainer, weights(trainer.model) - start


@pytest.mark.parametrize("changes", [{}, {"context_micro_batches": 1}, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")
@pytest.mark.one_case
def test_training_with_and_without_reuse_is_the_same(tmp_path, changes):
    trainer, step = trained(tmp_path, "reuse_passes", **changes)
    assert trainer._reuse.on
    assert trainer._step.passes is None  # freed
    _, want = trained(tmp_path, "ordinary", reuse_passes=False)
    assert (step - want).norm() <= 1e-4 * want.norm()
    assert want.norm() > 0


def test_lora(tmp_path):
    peft = pytest.importorskip("peft")

    def model():
        torch.manual_seed(0)
        return peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj", "up_proj"]))

    trainer, step = trained(tmp_path, "reuse_passes", model=model())
    assert trainer._reuse.on
    _, want = trained(tmp_path, "ordinary", model=model(), reuse_passes=False)
    assert want.norm() > 0
    assert (step - want).norm() <= 1e-4 * want.norm()


def dropout_in_lora(tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj"], lora_dropout=0.1)
    return make_trainer(tmp_path, model=peft.get_peft_model(tiny_model("llama"), lora))


def attention_dropout(tmp_path):
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    return make_trainer(tmp_path, model=model)


def embedding_dropout(tmp_path):
    model = tiny_model("gpt2")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and name != "transformer.drop":
            module.p = 0.0
    return make_trainer(tmp_path, model=model)


def router_logits(tmp_path):
    model = tiny_model("gpt_oss")
    model.config.output_router_logits = True
    return make_trainer(tmp_path, model=model)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (dropout_in_lora, "is a dropout of 0.1"),
        (attention_dropout, "attention_dropout of model.layers.0.self_attn is 0.1"),
        (embedding_dropout, "transformer.drop is a dropout of 0.1"),
        (router_logits, "output_router_logits is on"),
        (lambda path: make_trainer(path, context_method="sequential"), "context_method is sequential"),
        (lambda path: make_trainer(path, neftune_noise_alpha=5.0), "neftune_noise_alpha"),
    ],
    ids=["LoRA dropout", "attention dropout", "embedding dropout", "router logits", "sequential", "NEFTune"],
)
def test_refused_with_a_reason_in_the_log(tmp_path, caplog, make, reason):
    trainer = make(tmp_path)
    assert "passes are not reused, and the training step computes its own forward: " in caplog.text
    assert reason in caplog.text
    assert not trainer._reuse.on
    trainer.train()
    assert trainer.state.global_step == 4


def test_a_layer_that_changes_in_training_is_found_out(tmp_path, caplog):
    """Nothing tells of it beforehand: the first step compares the losses, and goes on without reuse."""
    model = tiny_model("llama")
    forward = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda x: forward(x) * (0.5 if model.training else 1.0)
    trainer, step = trained(tmp_path, "reuse_passes", model=model)
    assert "the loss would be off by" in caplog.text
    assert not trainer._reuse.on
    other = tiny_model("llama")
    usual = other.model.layers[1].mlp.forward
    other.model.layers[1].mlp.forward = lambda x: usual(x) * (0.5 if other.training else 1.0)
    _, want = trained(tmp_path, "ordinary", model=other, reuse_passes=False)
    assert torch.equal(step, want)


def test_a_layer_with_more_than_hidden_states_is_found_out(tmp_path, caplog):
    model = tiny_model("llama")
    model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] * 1.0, *args[1:]))
    trainer, _ = trained(tmp_path, "reuse_passes", model=model)
    assert "first argument is not the hidden states that left the one before it" in caplog.text
    assert not trainer._reuse.on


def test_a_second_input_with_a_gradient_is_found_out(tmp_path, caplog):
    """Gemma 4's embeddings for each layer: only a forward with gradients shows that they have one."""
    if not hasattr(transformers, "Gemma4TextConfig"):
        pytest.skip("this transformers has no Gemma 4")
    settings = {**BASE, "layer_types": ALTERNATING, "sliding_window": 7, "global_head_dim": BASE["head_dim"]}
    embeddings = {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(transformers.Gemma4TextConfig(**settings, **embeddings))
    trainer, step = trained(tmp_path, "reuse_passes", model=model)
    assert "a decoder layer has more than one input with a gradient" in caplog.text
    assert not trainer._reuse.on
    assert step.norm() > 0


def test_repeated_rows_share_their_slots(tmp_path):
    data = rows(2)
    trainer = make_trainer(tmp_path, data=data)
    batches = [Collator(0)([data[0], data[1]]), Collator(0)([data[1], data[1]])]
    _, passes = trainer.mix(batches)
    first, again = map(passes.slots, batches)
    length = len(data[1]["prompt_ids"]) + len(data[1]["answer_ids"])
    assert torch.equal(again[0, :length], first[1, :length])
    assert torch.equal(again[0], again[1])


def test_evaluation_does_not_reuse(tmp_path):
    trainer = make_trainer(tmp_path)
    _, trainer._step.passes = trainer.mix([Collator(0)([rows(2)[0]])])
    loss = trainer.evaluate(rows(4))["eval_loss"]
    trainer._step.passes = None
    assert trainer.evaluate(rows(4))["eval_loss"] == loss


def test_only_the_fixed_point_can_keep(tmp_path):
    with pytest.raises(ReuseError, match='goes with method="fixed_point"'):
        generate(tiny_model("llama"), rows(1), keep_hidden_states=True, method="sequential")
