"""Replay under the Trainer's settings: each optimizer step has the losses and gradients of the ordinary one."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
from helpers.processes import WORLD, in_ranks
from helpers.training import make_trainer, rows, weights
from models import CHECKPOINTING, CONFIGS, tiny_model
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, TrainerCallback

from selfgen import BSSTrainer
from selfgen.context.hidden_states import HiddenStates
from selfgen.data import Collator

llama = partial(tiny_model, "llama")


class Gradients(TrainerCallback):
    """The gradients of each optimizer step, by parameter."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        parameters = model.named_parameters()
        self.steps.append({name: p.grad.double() for name, p in parameters if p.grad is not None})


def run(trainer: BSSTrainer, *, only_contexts: bool = False) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """Train at a learning rate of 0; returns the loss of each micro-batch and the gradients of each step.

    With ``only_contexts``, contexts are made as if they were to be reused, but are not.
    """
    reused, losses, gradients = [], [], Gradients()
    compute_loss, mix = trainer.compute_loss, trainer.mix

    def recorded(model, *args, **kwargs):
        loss = compute_loss(model, *args, **kwargs)
        if model.training:
            losses.append(loss.detach().double())
            reused.append(trainer._step.passes is not None)
        return loss

    def mixed(batches):
        return mix(batches)[0], None

    trainer.compute_loss = recorded
    if only_contexts:
        trainer.mix = mixed
    trainer.add_callback(gradients)
    trainer.train()
    assert reused == [trainer.args.reuse_passes and not only_contexts] * len(losses)
    assert trainer._step.passes is None  # freed
    return torch.stack(losses), gradients.steps


def distance(got: list[dict[str, torch.Tensor]], want: list[dict[str, torch.Tensor]]) -> float:
    """The largest distance of a step's gradients, relative to their norm."""
    distances = []
    for ours, theirs in zip(got, want, strict=True):
        assert ours.keys() == theirs.keys()
        off = torch.stack([(ours[name] - theirs[name]).norm() for name in theirs]).norm()
        distances.append(off / torch.stack([gradient.norm() for gradient in theirs.values()]).norm())
    return float(torch.stack(distances).max())


def trainer_for(folder, make=llama, data=None, **changes) -> BSSTrainer:
    changes = {"learning_rate": 0.0, "max_grad_norm": 0.0, "max_steps": 1} | changes
    return make_trainer(folder, model=make(), data=data, **changes)


def check(folder, make=llama, prepare=lambda trainer: None, **changes) -> None:
    """A run that reuses is one that does not."""
    results = []
    for reuse in (True, False):
        trainer = trainer_for(folder, make, reuse_passes=reuse, **changes)
        prepare(trainer)
        results.append(run(trainer))
        assert trainer._reuse.on == reuse
    (losses, gradients), (want_losses, want_gradients) = results
    torch.testing.assert_close(losses, want_losses, rtol=1e-5, atol=0)
    assert distance(gradients, want_gradients) <= 1e-5


@pytest.mark.parametrize("count", [1, 2, None])
@pytest.mark.one_case
def test_contexts_of_some_micro_batches_at_a_time(tmp_path, count):
    check(tmp_path, gradient_accumulation_steps=3, context_micro_batches=count)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.one_case
def test_the_users_checkpointing(tmp_path, reentrant):
    check(
        tmp_path,
        **{CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}},
    )


def test_several_rows_of_a_sampler_that_repeats(tmp_path):
    order = [3, 3, 1, 3, 0, 1, 0, 0]

    def prepare(trainer):
        trainer._get_train_sampler = lambda *_: order

    check(tmp_path, prepare=prepare)


def padding_to_8(features):
    batch = Collator(0)(features)
    missing = -batch["input_ids"].shape[1] % 8 + 8
    for name, value in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        batch[name] = torch.nn.functional.pad(batch[name], (0, missing), value=value)
    return batch


def test_padding_to_a_multiple(tmp_path):
    def prepare(trainer):
        trainer.data_collator = padding_to_8

    check(tmp_path, prepare=prepare)


def test_label_smoothing(tmp_path):
    check(tmp_path, label_smoothing_factor=0.1)


def test_a_loss_of_the_users(tmp_path):
    def loss(outputs, labels, num_items_in_batch):
        return outputs.logits[:, :-1][labels[:, 1:] != -100].logsumexp(-1).sum() / num_items_in_batch

    def prepare(trainer):
        trainer.compute_loss_func = loss

    check(tmp_path, prepare=prepare)


class Evaluating(TrainerCallback):
    """Evaluates between the micro-batches of a step, and between steps."""

    def __init__(self, trainer):
        self.trainer, self.losses = trainer, []

    def on_substep_end(self, *args, **kwargs):
        self.losses.append(self.trainer.evaluate(rows(4, seed=1))["eval_loss"])

    on_step_end = on_substep_end


def test_evaluation_between_micro_batches(tmp_path):
    callbacks = []

    def prepare(trainer):
        callbacks.append(Evaluating(trainer))
        trainer.add_callback(callbacks[-1])

    check(tmp_path, prepare=prepare, gradient_accumulation_steps=3, max_steps=2)
    assert len(callbacks[0].losses) == 6  # of 2 steps
    assert len({loss for callback in callbacks for loss in callback.losses}) == 1  # not reused


@pytest.mark.parametrize("loss_on", ["all", "after_self"])
@pytest.mark.parametrize("event", ["on_step_begin", "on_substep_end"])
@pytest.mark.parametrize("change", [lambda p: p.data.mul_(0.9), lambda p: setattr(p, "data", p.data * 0.9)])
@pytest.mark.each_value
def test_a_callback_that_changes_weights_after_the_passes(tmp_path, loss_on, event, change):
    """From the second step on, when reuse has been tried."""

    def weights_later(trainer):
        if trainer.state.global_step >= 1:
            for parameter in trainer.model.parameters():
                change(parameter)

    ended = []
    for reuse_passes in (True, False):
        options = {"gradient_accumulation_steps": 3, "max_steps": 3, "learning_rate": 1e-3, "logging_steps": 1}
        options |= {"loss_on": loss_on, "reuse_passes": reuse_passes, "self_prob": 0.5}
        trainer = make_trainer(tmp_path, **options)
        trainer.add_callback(At(event, lambda _, trainer=trainer: weights_later(trainer)))
        trainer.train()
        ended.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert ended[0] == pytest.approx(ended[1], rel=1e-4)


def tied():
    settings = CONFIGS["llama"]()
    settings.tie_word_embeddings = True
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(settings)


def trained_parts(*parts: str, make=llama, requires_grad: bool = False):
    """Only the parameters whose name contains one of ``parts`` are trained."""
    model = make()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in parts))
    if requires_grad:
        model.enable_input_require_grads()
    return model


@pytest.mark.parametrize(
    "make",
    [
        tied,
        partial(trained_parts, "layers.1"),
        partial(trained_parts, "layers.1", requires_grad=True),
        partial(trained_parts, "layers.0"),
        partial(trained_parts, "layers.0.mlp", "layers.1.self_attn", "norm"),
        partial(trained_parts, "lm_head"),
        partial(trained_parts, "lm_head", requires_grad=True),
        partial(trained_parts, "embed_tokens"),
        partial(trained_parts, "embed_tokens", make=tied),
    ],
    ids=[
        "tied weights",
        "last layer",
        "last layer, inputs with gradients",
        "first layer",
        "parts of layers",
        "head",
        "head, inputs with gradients",
        "embedding",
        "tied weights only",
    ],
)
def test_what_is_trained(tmp_path, make):
    check(tmp_path, make)


def lora(**settings):
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **settings))


@pytest.mark.parametrize("changes", [{}, {CHECKPOINTING: True}], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["v_proj"], "layers_to_transform": [1]},
        pytest.param({"target_modules": ["v_proj"], "layers_to_transform": [0]}, marks=pytest.mark.slow),
        {"target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["lm_head"]},
    ],
    ids=str,
)
@pytest.mark.each_value
def test_lora_anywhere(tmp_path, settings, changes):
    check(tmp_path, partial(lora, **settings), **changes)


def test_hooks_on_parameters_see_each_gradient_once(tmp_path):
    def hooked():
        model = tiny_model("llama")
        model.model.layers[0].mlp.up_proj.weight.register_hook(lambda gradient: 3 * gradient)
        return model

    check(tmp_path, hooked)


def eager(**settings):
    model = tiny_model("llama", **settings)
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("precision", ["mixed", "whole"])
@pytest.mark.one_case
def test_bf16_is_off_by_its_noise(tmp_path, precision):
    """Its noise: how far the ordinary step is from itself with another implementation of attention."""
    how = {"max_steps": 2, "bf16": precision == "mixed"}
    dtype = torch.float32 if precision == "mixed" else torch.bfloat16
    make = partial(llama, dtype=dtype)
    losses, gradients = run(trainer_for(tmp_path, make, **how))
    want_losses, want = run(trainer_for(tmp_path, make, **how), only_contexts=True)
    _, other = run(trainer_for(tmp_path, partial(eager, dtype=dtype), **how), only_contexts=True)
    torch.testing.assert_close(losses, want_losses, rtol=1e-2, atol=0)
    assert 0 < distance(gradients, want) <= 1.5 * distance(other, want)


@pytest.fixture
def kept(monkeypatch):
    """Weak references to all hidden states that are kept; the collector of cycles is off."""
    references = []
    init = HiddenStates.__init__

    def recorded(self, *args):
        references.append(weakref.ref(self))
        init(self, *args)

    monkeypatch.setattr(HiddenStates, "__init__", recorded)
    gc.disable()
    yield references
    gc.enable()


class At(TrainerCallback):
    def __init__(self, event, action):
        setattr(self, event, lambda args, state, control, **kwargs: action(control))


def test_states_are_freed_before_the_optimizer_steps(tmp_path, kept):
    trainer = make_trainer(tmp_path, max_steps=2)
    alive = []
    trainer.add_callback(At("on_substep_end", lambda _: alive.append(kept[-1]() is not None)))
    trainer.add_callback(At("on_pre_optimizer_step", lambda _: alive.append(kept[-1]() is not None)))
    trainer.train()
    assert alive == [True, False] * 2


def test_states_are_freed_where_a_step_is_broken_off(tmp_path, kept):
    def stop(control):
        control.should_training_stop = True

    trainer = make_trainer(tmp_path)
    trainer.add_callback(At("on_substep_end", stop))
    trainer.train()
    assert len(kept) == 1
    assert kept[0]() is None


def test_states_are_freed_where_a_step_fails(tmp_path, kept):
    def fail(_):
        raise KeyboardInterrupt

    trainer = make_trainer(tmp_path)
    trainer.add_callback(At("on_substep_end", fail))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert len(kept) == 1
    assert trainer._step.passes is None


def test_a_step_that_was_broken_off_is_not_reused_by_the_next(tmp_path):
    trainer = make_trainer(tmp_path)
    batch = Collator(0)([rows(2)[0]])
    for self_prob in (0.5, 0.0):
        trainer.args.self_prob = self_prob
        trainer._step.waiting = [batch]
        trainer._mix_next()
        assert (trainer._step.passes is not None) == (self_prob > 0)


def ddp_worker(rank, folder):
    for changes in (
        {},
        {"context_micro_batches": 1, "gradient_accumulation_steps": 3},
        {CHECKPOINTING: True},  # then the Trainer lets DDP look for no unused parameters
        {"ddp_find_unused_parameters": False, "ddp_bucket_cap_mb": 1},
    ):
        check_ddp(folder, changes)


def check_ddp(folder, changes):
    steps = []
    for reuse in (True, False):
        trainer = make_trainer(folder, reuse_passes=reuse, optim="sgd", max_steps=3, ddp_backend="gloo", **changes)
        reused = []
        trainer.add_callback(At("on_substep_end", lambda _, t=trainer, r=reused: r.append(t._reuse.on)))
        before = weights(trainer.model)
        trainer.train()
        assert isinstance(trainer.model_wrapped, DistributedDataParallel)
        assert reused == [reuse] * len(reused) != []
        assert trainer._step.passes is None
        steps.append(weights(trainer.model) - before)
        everyone = [torch.empty_like(steps[-1]) for _ in range(WORLD)]
        dist.all_gather(everyone, steps[-1])
        assert torch.equal(*everyone)
    step, want = steps
    assert want.norm() > 0
    assert (step - want).norm() <= 1e-4 * want.norm()


def test_ddp(tmp_path):
    """Two processes: the same weights after three optimizer steps with and without reuse, on both."""
    in_ranks(ddp_worker, tmp_path)
