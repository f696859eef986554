"""What changes a model between a step's contexts and its forwards, in one process and in two: no pass of the model as
it was is reused, and no process waits for another one that has decided otherwise."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers.processes import in_ranks
from helpers.runs import lora
from helpers.sharded import another_run, fsdp_on_cpus, whole_state
from helpers.tensor import split_model, tensor_parallel_on_cpus
from helpers.training import make_trainer
from helpers.versions import REUSED_IN_SHARDS
from models import tiny_model
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.multiprocessing.spawn import ProcessRaisedException
from transformers import TrainerCallback

from selfgen import BSSTrainer
from selfgen.context import changes
from selfgen.context.changes import bits_of
from selfgen.context.sharding import local_part

STEPS = 3


def scaled(model, by=0.9):
    for weight in model.parameters():
        local_part(weight).data.mul_(by)


def replaced(model):
    for weight in model.parameters():
        weight.data = weight.data * 0.9


def exchanged(model):
    """The bits of each weight are the same, in another order."""
    for weight in model.parameters():
        part = local_part(weight).data
        if part.ndim == 2:
            part.copy_(part.flip(0))


def transposed(model):
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.o_proj):
            projection.weight.data.copy_(projection.weight.data.T.clone())


def moved_to_another(model):
    first, second = model.model.layers[:2]
    kept = first.mlp.up_proj.weight.data.clone()
    first.mlp.up_proj.weight.data.copy_(second.mlp.up_proj.weight.data)
    second.mlp.up_proj.weight.data.copy_(kept)


def in_buffers(model):
    model.model.rotary_emb.inv_freq.mul_(1.5)


def set_otherwise(model):
    for layer in model.model.layers:
        layer.input_layernorm.variance_epsilon += 0.1


def hooked(model):
    model.model.layers[0].register_forward_hook(lambda module, args, output: output * 1.5)


def rescaled(model):
    for module in model.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            module.scaling["default"] *= 3


def all_of_it():
    """A LoRA whose base is trained, too."""
    return lora().requires_grad_(True)


def without_adapter(model):
    model.base_model.disable_adapter_layers()


def merged(model):
    model.base_model.merge_adapter()


class Between(TrainerCallback):
    """Changes the model at an event, from the second step on."""

    def __init__(self, event, change):
        def at_event(args, state, control, model=None, **kwargs):
            if state.global_step >= 1:
                with torch.no_grad():
                    change(model)

        setattr(self, event, at_event)


class Overridden(BSSTrainer):
    """Of a user's, who changes weights around the forward."""

    where = "training_step"

    def _change(self, where):
        if where == self.where and self.state.global_step >= 1:
            with torch.no_grad():
                scaled(self.model)

    def training_step(self, *args, **kwargs):
        self._change("training_step")
        return super().training_step(*args, **kwargs)

    def compute_loss(self, *args, **kwargs):
        self._change("compute_loss")
        return super().compute_loss(*args, **kwargs)


class OverriddenLoss(Overridden):
    where = "compute_loss"


def in_backward(trainer):
    """An optimizer of the user's, which steps as gradients come."""

    def step(weight):
        weight.data.add_(weight.grad, alpha=-0.05)

    for weight in trainer.model.parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(step)


def in_backward_of_modules(trainer):
    """What steps in hooks of modules, where weights have none."""

    def step(module, given, got):
        if trainer.state.global_step >= 1:
            module.weight.data.mul_(0.97)

    for layer in trainer.model.model.layers:
        layer.mlp.down_proj.register_full_backward_hook(step)


def at(event, change):
    return lambda trainer: trainer.add_callback(Between(event, change))


llama = partial(tiny_model, "llama")


def check(folder, prepare=lambda trainer: None, model=llama, drops=True, **options):
    """A run that means to reuse passes comes to what one comes to that does not."""
    ended = []
    for reuse in (True, False):
        another_run()
        given = {"gradient_accumulation_steps": 3, "max_steps": STEPS, "adam_epsilon": 1e-3, "report_to": [], **options}
        trainer = make_trainer(folder / str(reuse), model=model(), reuse_passes=reuse, **given)
        prepare(trainer)
        trainer.train()
        if reuse:
            assert trainer._reuse.verified or not trainer._reuse.on  # a setting that changes has it looked at again
            assert drops is None or trainer._reuse.on != drops
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        ended.append((losses, whole_state(trainer.model)))
    (losses, weights), (want_losses, want) = ended
    assert losses == pytest.approx(want_losses, rel=1e-4)
    for name, weight in want.items():
        assert (weights[name] - weight).abs().max() <= 1e-4 * weight.abs().max(), name


CHANGES = {
    "scaled": (scaled, None),
    "replaced": (replaced, None),
    "exchanged": (exchanged, None),
    "transposed": (transposed, None),
    "moved to another": (moved_to_another, None),
    "in buffers": (in_buffers, None),
    "set otherwise": (set_otherwise, None),
    "hooked": (hooked, None),
    "rescaled": (rescaled, lora),
    "without adapter": (without_adapter, all_of_it),
    "merged": (merged, all_of_it),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_callback_changes(tmp_path, name):
    change, model = CHANGES[name]
    check(tmp_path, at("on_substep_end", change), **({"model": model} if model else {}))


@pytest.mark.parametrize("kind", [Overridden, OverriddenLoss])
@pytest.mark.parametrize("loss_on", ["all", "after_self"])
def test_what_a_subclass_changes(tmp_path, kind, loss_on):
    check(tmp_path, trainer=kind, loss_on=loss_on)


def test_what_steps_in_the_backward(tmp_path):
    check(tmp_path, in_backward)


def test_what_steps_in_the_backward_of_modules(tmp_path):
    check(tmp_path, in_backward_of_modules)


def test_what_watches_gradients_and_changes_nothing(tmp_path):
    """As wandb.watch does when training has begun."""

    def watch(gradient):
        pass

    watch.__module__ = "wandb.integration.torch.wandb_torch"
    trainer = make_trainer(tmp_path, report_to=[])
    trainer.model.lm_head.weight.register_hook(watch)
    assert not trainer._between.may_change
    trainer.model.lm_head.weight.register_hook(lambda gradient: None)
    assert trainer._between.may_change


@pytest.mark.parametrize("step", [1, 2])
def test_what_is_changed_after_a_step(tmp_path, step):
    """Layers that compute something else in training from then on."""

    class After(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == step:
                mlp = model.model.layers[0].mlp
                own = mlp.forward
                mlp.forward = lambda hidden: own(hidden) * (1.5 if mlp.training else 1)

    check(tmp_path, lambda trainer: trainer.add_callback(After()))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (7,), (5, 3), (11, 1), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("at_once", [2**24, 4])
def test_bits_of_tensors_of_any_shape(shape, dtype, at_once, monkeypatch):
    """Each number and its place counts."""
    monkeypatch.setattr(changes, "_AT_ONCE", at_once)
    flat = torch.arange(torch.Size(shape).numel()).remainder(2 if dtype == torch.bool else 100).to(dtype)
    module = torch.nn.Module()
    module.register_buffer("tensor", flat.view(shape))
    bits = bits_of(module)
    for place, before in enumerate(flat.clone()):
        flat[place] = not before if dtype == torch.bool else before + 1
        assert bits_of(module) != bits
        flat[place] = before
    for place in range(1, len(flat)):  # each differs from the one before
        flat[place - 1 : place + 1] = flat[place - 1 : place + 1].flip(0)
        assert bits_of(module) != bits
        flat[place - 1 : place + 1] = flat[place - 1 : place + 1].flip(0)
    assert bits_of(module) == bits


def test_bits_are_found_in_little_memory():
    """Of a weight of one column, too, as 4-bit ones are."""
    module = torch.nn.Module()
    for size in ((2**25, 1), (2**12, 2**13)):
        module.tensor = torch.nn.Buffer(torch.zeros(size, dtype=torch.uint8))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            bits_of(module)
        assert max(event.cpu_memory_usage for event in profile.events()) <= 8 * 2**24


def test_what_is_changed_and_changed_back(tmp_path):
    def swapped(model):
        kept = [weight.data.clone() for weight in model.parameters()]
        scaled(model)
        for weight, before in zip(model.parameters(), kept, strict=True):
            weight.data.copy_(before)

    check(tmp_path, at("on_substep_end", swapped), drops=False)


def of_engine(folder, engine):
    """(the model, what is done with its trainer, options)"""
    model = llama
    if engine == "tensor":
        tensor_parallel_on_cpus()
        return partial(split_model, folder / "model", tp_size=2), lambda trainer: None, {}
    if engine == "ddp":
        return model, lambda trainer: None, {}
    fsdp_on_cpus()

    def offloaded(trainer):
        if engine == "fsdp2, offloaded":
            trainer._engine._plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)

    return model, offloaded, {"fsdp": True, "weights": "sharded" if engine == "fsdp2, sharded" else "gathered"}


def in_two(rank, folder, engine, cases):
    model, prepare, options = of_engine(folder, engine)
    for number, (event, loss_on, of_all) in enumerate(cases):

        def prepared(trainer, event=event, change=scaled if rank or of_all else lambda model: None):
            prepare(trainer)
            trainer.add_callback(Between(event, change))

        # In DDP each process decides for itself.
        drops = None if engine == "ddp" and not of_all else (event, loss_on) != ("on_step_begin", "all")
        check(folder / str(number), prepared, model, drops, loss_on=loss_on, **options)


def overridden_in_two(rank, folder, engine):
    model, prepare, options = of_engine(folder, engine)
    for kind in (Overridden, OverriddenLoss):
        check(folder / kind.__name__, prepare, model, trainer=kind, **options)


def looked_at_in_one(rank, folder, engine):
    """A callback of one process alone, which changes nothing."""
    model, prepare, options = of_engine(folder, engine)

    def prepared(trainer):
        prepare(trainer)
        if rank == 0:
            trainer.add_callback(Between("on_substep_end", lambda model: None))

    check(folder / "looks", prepared, model, drops=False if REUSED_IN_SHARDS else None, **options)


def too_late(rank, folder):
    """A callback that comes when processes have agreed that there is none."""
    fsdp_on_cpus()
    another_run()
    trainer = make_trainer(folder, fsdp=True, report_to=[])

    class Adds(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if not rank:
                trainer.add_callback(Between("on_substep_end", scaled))

    trainer.add_callback(Adds())
    with pytest.raises(RuntimeError, match=r"on_substep_end of Between .*: add it before train\(\)"):
        trainer.train()
    raise Late


class Late(Exception):
    """Ends the other process, too."""


ENGINES = ("ddp", "fsdp2", "fsdp2, sharded", "fsdp2, offloaded", "tensor")
CASES = [(event, loss_on, True) for event in ("on_step_begin", "on_substep_end") for loss_on in ("all", "after_self")]
CASES += [("on_substep_end", "all", False), ("on_step_begin", "after_self", False)]


def test_a_shard_that_one_process_changes(tmp_path):
    in_ranks(in_two, tmp_path, "fsdp2", CASES[-2:])


def test_a_callback_that_one_process_has(tmp_path):
    in_ranks(looked_at_in_one, tmp_path, "fsdp2")


def test_a_callback_that_comes_too_late(tmp_path):
    with pytest.raises(ProcessRaisedException, match="Late"):
        in_ranks(too_late, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes(tmp_path, engine):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    for name, function, more in (
        ("in_two", in_two, [CASES]),
        ("overridden", overridden_in_two, []),
        ("looks", looked_at_in_one, []),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model").symlink_to(tmp_path / "model")
        in_ranks(function, folder, engine, *more)
