"""Forwards over weights that stay sharded: every process runs as many as its own rows need, and all run equally many.

A forward gathers one layer after the other, so it is a collective. Before each one, a process says that it begins one,
by an all-reduce over all processes. One that has nothing left to do hears that others go on, and runs along: a forward
over a single token, without a cache, of which nothing is kept. When nobody begins another one, all are done. So
processes never have to know what the others do: passes, the probes of ``verification``, answers by ``generate``.

    forwards of this process   1 2 3 . .        . one that runs along
    forwards of another one    1 2 3 4 5        five times the layers' gathers, six all-reduces
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from transformers import PreTrainedModel

from .models import inference, own_logits, transformers_model
from .sharding import IN_STEP, OF_SHARDING, Together, is_whole, sharding_of
from .sharding.fsdp import ShardedModule, gathered_in_time

_DONE, _BEGINS, _FAILED = range(3)
_ORDERS: WeakKeyDictionary[nn.Module, list[ref]] = WeakKeyDictionary()  # in which a forward gathers; layers know models


class _OtherFailed(BaseException):
    """Another process has failed. No probe takes it for a fault of the model, as it does with exceptions."""


class Steps:
    """The forwards of this process inside `lockstep`: ``forwards`` counts them, those that it has run along, too."""

    def __init__(self, model: PreTrainedModel, order: list[ShardedModule], together: Together):
        self.model, self._order, self._together = model, order, together
        self.forwards = self.gathers = 0
        self._entered = 0  # modules of the forward that is being run
        self._ahead: list[object] = []  # the handle of the next one's weights, which are on their way
        self._runs_along = False

    def enter(self, module: ShardedModule) -> None:
        if module is self._order[0]:
            self.complete()
            if not self._runs_along:
                self._say(_BEGINS)
        if self._entered == len(self._order) or module is not self._order[self._entered]:
            raise RuntimeError(
                f"a {type(module).__name__} is computed out of the order in which its weights are gathered: make "
                "contexts with whole weights (weights=gathered, selfgen.whole_weights)"
            )
        self._gather()

    def _gather(self) -> None:
        """The weights of the next module; those of the one after it are sent meanwhile."""
        module, following = self._order[self._entered], self._order[self._entered + 1 : self._entered + 2]
        self.gathers += 1
        ahead = self._ahead or [module.unshard(async_op=True)]
        self._entered += 1
        self._ahead = [one.unshard(async_op=True) for one in following]
        for handle in ahead:
            handle.wait()  # type: ignore[attr-defined]

    def complete(self) -> None:
        """Gather what a forward that was broken off has left out, as the other processes wait for it."""
        while 0 < self._entered < len(self._order):
            self._gather()
            self._order[self._entered - 1].reshard()
        self._entered = 0

    def run_along(self) -> None:
        """Until no process begins a forward any more."""
        row = torch.zeros(1, dtype=torch.int64, device=self.model.device)
        self.complete()
        while self._say(_DONE):
            self._runs_along = True
            try:
                with inference(self.model):
                    own_logits(self.model, row, row)
            finally:
                self._runs_along = False

    def fail(self, error: Exception) -> None:
        """Tell the others."""
        self.complete()
        self._say(_FAILED, f"{type(error).__name__}: {error}")

    def _say(self, what: int, message: str | None = None) -> bool:
        """Whether any process begins a forward."""
        found = self._together.most(what)
        if found == _FAILED:
            told = self._together.told(message)
            if message is None:
                raise _OtherFailed("; ".join(f"process {rank} has failed ({one})" for rank, one in told.items()))
        self.forwards += found == _BEGINS
        return found == _BEGINS


@contextmanager
def lockstep(model: nn.Module, *, keep: bool = False, together: Together | None = None) -> Iterator[Steps | None]:
    """Inside, each process makes its own contexts and answers, while weights stay sharded.

    All processes that share the weights enter together; what they do inside is up to each. Each forward gathers one
    layer after the other, and the next one meanwhile, so that little memory is needed, and all processes take part in
    it: one that is done runs along. Weights must not be changed inside, and no backward be run. Where nothing is
    sharded, or all is gathered already (``whole_weights``), this does nothing.

    Args:
        model: a transformers model, or a wrapper around one, sharded by FSDP2.
        keep: a training forward follows at once: leave those weights whole that FSDP2 does not shard after a forward.
        together: the processes; by default all.

    Raises:
        ValueError: the weights are sharded in another way, or a forward gathers the same ones several times.
        RuntimeError: another process has failed; what it says of it. One that is interrupted tells nobody.

    Example:
        >>> with lockstep(model):
        >>>     mixed = generator.contexts(prompts, references, 0.25, seed=0, sample_ids=ids)
    """
    kind, inner = sharding_of(model), transformers_model(getattr(model, "_orig_mod", model))  # torch.compile's
    if kind is None or is_whole(model) or inner in IN_STEP:
        yield None
        return
    if kind != "fsdp2":
        raise ValueError(
            "the weights are sharded by DeepSpeed ZeRO-3, which gathers them in an order of its own: make contexts "
            "with whole weights (weights=gathered, selfgen.whole_weights), or shard them by FSDP2"
        )
    modules = list(model.modules())
    together = Together(None, inner.device) if together is None else together
    with gathered_in_time(model, keep=keep) as sharded:
        order = _order_of(inner, sharded)  # none, if all weights are whole now
        steps = Steps(inner, order, together)
        IN_STEP.update(modules)
        try:
            with _hooked(order, steps.enter):
                try:
                    yield steps
                    steps.run_along()
                except _OtherFailed as failed:
                    raise RuntimeError(str(failed)) from None
                except Exception as error:
                    steps.fail(error)
                    raise
        finally:
            IN_STEP.difference_update(modules)


def _order_of(model: PreTrainedModel, sharded: list[ShardedModule]) -> list[ShardedModule]:
    """Which of the ``sharded`` modules a forward over text computes, in order; all processes find it out together."""
    known = [module() for module in _ORDERS[model]] if model in _ORDERS else None
    if known is not None and set(known) <= set(sharded):
        return known
    found: list[ShardedModule] = []

    def enter(module: ShardedModule) -> None:
        found.append(module)
        module.unshard()

    row = torch.zeros(1, dtype=torch.int64, device=model.device)
    with inference(model), _hooked(sharded, enter):
        begins = model.register_forward_pre_hook(lambda *_: found.clear())  # some need several tries
        try:
            own_logits(model, row, row)
        finally:
            begins.remove()
    twice = next((module for module in found if found.count(module) > 1), None)
    if twice is not None:
        raise ValueError(
            f"a forward computes the same {type(twice).__name__} several times, and would gather its weights as "
            "often: make contexts with whole weights (weights=gathered, selfgen.whole_weights)"
        )
    _ORDERS[model] = [ref(module) for module in found]
    return found


@contextmanager
def _hooked(modules: list[ShardedModule], enter: Callable[[ShardedModule], None]) -> Iterator[None]:
    """Inside, each of ``modules`` calls ``enter`` before its forward, and is sharded again after it."""

    def before(module: ShardedModule, *_) -> None:
        enter(module)

    def after(module: ShardedModule, *_) -> None:
        module.reshard()

    handles = []
    for hook in (before, after):
        setattr(hook, OF_SHARDING, True)
    for module in modules:
        handles.append(module.register_forward_pre_hook(before, prepend=True))
        handles.append(module.register_forward_hook(after, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
