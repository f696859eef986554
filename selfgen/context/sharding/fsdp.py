"""FSDP2 (``torch.distributed.fsdp.fully_shard``): all weights at once, outside its hooks.

FSDP2 gathers a module's weights in a hook before its forward and frees them in one after it. Here all modules are
gathered first, and the hooks are taken off: forwards inside are those of a model that was never sharded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves

from .hooks import OF_SHARDING, hooks_taken_off

ShardedModule = Any
"""A ``Module`` that ``fully_shard`` has made an ``FSDPModule``, too, which no type can say."""


@contextmanager
def gathered(model: nn.Module, *, keep: bool) -> Iterator[None]:
    """Inside, ``model`` is whole; see ``whole_weights``."""
    modules = _modules(model)
    whole = False
    try:
        for module in modules:
            module._get_fsdp_state()._lazy_init()  # the first one is the root, which tells the others; once
        for handle in [module.unshard(async_op=True) for module in modules]:
            assert handle is not None
            handle.wait()
        with hooks_taken_off(model, _is_fsdps), _no_backward(modules):
            yield
        whole = True
    finally:
        if whole and keep:
            _shard_before_a_step(model)
        else:
            shard_again(model)


_KEPT: WeakSet[nn.Module] = WeakSet()


def _shard_before_a_step(model: nn.Module) -> None:
    """Shard ``model`` again when an optimizer steps before a training forward has come: it would stay as it was."""

    def shard_kept(*_) -> None:
        for one in [*_KEPT]:
            shard_again(one)
        _KEPT.clear()

    if not hasattr(_shard_before_a_step, "handle"):
        _shard_before_a_step.handle = register_optimizer_step_pre_hook(shard_kept)  # type: ignore[attr-defined]
    _KEPT.add(model)


def shard_again(model: nn.Module) -> None:
    """Free the weights that are whole now, as after a forward that has not come; no communication."""
    _shard(_modules(model))


def forget_steps(model: nn.Module) -> None:
    """Leave nothing of a step that an exception has broken off: without this, the next ones train on wrong gradients.

    Gradients that wait for the last micro-batch are none that ``zero_grad`` finds, and FSDP2 takes a module whose
    forward or backward was broken off for one that is in it still: it would reduce no gradient of it any more.

    Raises:
        RuntimeError: this torch can't.
    """
    for module in _modules(model):
        state = module._get_fsdp_state()
        groups = _groups(state)
        if hasattr(module, "reset_iter_state"):
            if state._is_root:
                module.reset_iter_state()
        elif any(one._training_state.name != "IDLE" for one in (state, *groups)):
            raise RuntimeError(
                "a step was broken off, and FSDP2 of this torch would go on with it: make a new model and trainer, or "
                "install torch 2.13 or later"
            )
        for one in [one for group in groups for one in group.fsdp_params]:
            one.unsharded_accumulated_grad = None
            if hasattr(one, "_unsharded_param"):
                one._unsharded_param.grad = None


def keep_after_forward(module: nn.Module) -> None:
    """Leave the weights of ``module`` whole from its forward to its backward, if it is sharded by itself."""
    if isinstance(module, FSDPModule):
        module.set_reshard_after_forward(False, recurse=False)


def gathered_bytes(model: nn.Module) -> list[int]:
    """What is gathered in each of the collectives that make ``model`` whole."""
    states = dict.fromkeys(module._get_fsdp_state() for module in _modules(model))
    groups = [group for state in states for group in _groups(state) if group.fsdp_params]
    return [
        sum(one.sharded_param.numel() * (group.mp_policy.param_dtype or one.sharded_param.dtype).itemsize
            for one in group.fsdp_params)
        for group in groups
    ]  # fmt: skip


def processes_of(model: nn.Module) -> int:
    """The number of processes that the weights of ``model`` are split over; with replicas, of one of them."""
    weights = (one for one in model.parameters() if isinstance(one, DTensor))
    counts = (
        math.prod(size for size, place in zip(one.device_mesh.shape, one.placements, strict=True) if place.is_shard())
        for one in weights
    )
    return max(counts, default=1)


@contextmanager
def kept_whole(model: nn.Module, *, last: bool) -> Iterator[None]:
    """Inside, a forward and a backward leave gathered weights as they are, for the next micro-batch of the step.

    They are sharded afterwards where that was the ``last`` one, or failed: an optimizer must not find them whole.
    """
    groups = [group for module in _modules(model) for group in _groups(module._get_fsdp_state())]
    before = [(group.post_forward_mesh_info, group.reshard_after_backward) for group in groups]
    done = False
    try:
        for group in groups:
            group.post_forward_mesh_info, group.reshard_after_backward = None, False
        yield
        done = True
    finally:
        for group, (forward, backward) in zip(groups, before, strict=True):
            group.post_forward_mesh_info, group.reshard_after_backward = forward, backward
        if last or not done:
            shard_again(model)


@contextmanager
def gathered_in_time(model: nn.Module, *, keep: bool) -> Iterator[list[ShardedModule]]:
    """Inside, FSDP2's hooks are off, and what it does not shard after a forward is whole: norm, head, what is no layer.

    Gives what it does shard after every forward (`parts_in_time`), which the caller has to gather. With ``keep``, the
    rest is left whole for a training forward that follows at once.
    """
    in_time = parts_in_time(model)
    rest = [module for module in _modules(model) if module not in in_time]
    done = False
    try:
        for module in rest:
            module.unshard()
        with hooks_taken_off(model, _is_fsdps), _no_backward(_modules(model)):
            yield in_time
        done = True
    finally:
        _shard([*in_time, *([] if done and keep else rest)])


@contextmanager
def _no_backward(modules: list[ShardedModule]) -> Iterator[None]:
    """Inside, a forward of the model has no backward: its gradients would be this process' own, and never be used."""

    def refuse(_gradient: Tensor) -> None:
        raise RuntimeError(
            "a backward of a forward inside whole_weights or lockstep: its gradients would reach no optimizer, as "
            "nothing sums them over processes. Run the training forward and the backward after the block"
        )

    def watch(_module: nn.Module, _args: tuple, output: object) -> None:
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(refuse)

    setattr(watch, OF_SHARDING, True)
    handles = [module.register_forward_hook(watch) for module in modules if module._get_fsdp_state()._is_root]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shard(modules: list[ShardedModule]) -> None:
    """Shard ``modules`` again, which communicates nothing.

    Where an exception has come in between, weights may be on their way still: FSDP2 would take them for the ones that
    it gathers next, and by then they may have changed.
    """
    for module in modules:
        if any(group._all_gather_result is not None for group in _groups(module._get_fsdp_state())):
            module.unshard()  # waits for them, and gathers no others
        module.reshard()


def parts_in_time(model: nn.Module) -> list[ShardedModule]:
    """What FSDP2 shards after a forward, and gathers for each: layers. It is not shared with another module.

    The root is none of them, even where it is sharded after a forward: passes compute what is in it, and not itself.
    """
    found: list[ShardedModule] = []
    modules: list[ShardedModule] = [*_modules(model)]
    for module in modules:
        state = module._get_fsdp_state()
        groups = _groups(state)
        state._lazy_init()  # the first one is the root
        if module is modules[0] and set(modules) <= set(module.modules()):
            continue
        if groups and len(state._modules) == 1 and all(group._reshard_after_forward for group in groups):
            found.append(module)
    return found


def _groups(state: Any) -> list[Any]:
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    return [state._fsdp_param_group] if state._fsdp_param_group else []  # before torch 2.13


def _modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _is_fsdps(hook: Callable) -> bool:
    return getattr(hook, "__module__", "").startswith("torch.distributed.fsdp")
