"""Weights that are whole for a while, in every process."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from weakref import WeakSet

from torch import nn

from . import fsdp, zero
from .found import sharding_of
from .together import IN_STEP

logger = logging.getLogger(__name__)

_WHOLE_NOW: WeakSet[nn.Module] = WeakSet()
_GATHERED = {"fsdp2": fsdp.gathered, "zero3": zero.gathered}
_KEPT_WHOLE = {"fsdp2": fsdp.kept_whole}


@contextmanager
def whole_weights(model: nn.Module, *, keep: bool = False) -> Iterator[None]:
    """Inside, ``model`` has all its weights in this process, and its forward waits for no other one.

    All processes that share the weights enter together, as all weights are gathered once; what they do inside is up to
    each. Weights must not be changed inside, and no backward be run. Where nothing is sharded, or all is gathered
    already, this does nothing.

    Args:
        model: a transformers model, or a wrapper around one, sharded by FSDP2 or DeepSpeed ZeRO-3.
        keep: afterwards, leave the weights to a training forward that follows at once: it shards them again layer by
            layer and gathers none. Else they are sharded again here, as they always are after an exception.

    Raises:
        ValueError: inside ``lockstep``.
        RuntimeError: (by a backward) its forward ran inside, with FSDP2.

    Example:
        >>> with whole_weights(model):
        >>>     mixed = generator.contexts(prompts, references, 0.25, seed=0, sample_ids=ids)
    """
    kind = sharding_of(model)
    if kind is None or is_whole(model):
        yield
        return
    if model in IN_STEP:
        raise ValueError("whole_weights inside lockstep, where weights stay sharded: leave one of the two out")
    modules = list(model.modules())
    with _GATHERED[kind](model, keep=keep):
        before = _versions(model)
        _WHOLE_NOW.update(modules)
        try:
            yield
        finally:
            _WHOLE_NOW.difference_update(modules)
        changed = sum(one != other for one, other in zip(before, _versions(model), strict=True))
        if changed:
            logger.warning(
                "%d weights were changed inside whole_weights, and the change is lost, as each process keeps its own "
                "part of what was gathered: change them outside",
                changed,
            )


def _versions(model: nn.Module) -> list[int]:
    return [weight._version for weight in model.parameters()]


@contextmanager
def kept_whole(model: nn.Module, *, last: bool) -> Iterator[None]:
    """Inside, a training forward and its backward leave gathered weights whole, for the next micro-batch of a step.

    Memory has room for them, as contexts were made with them just before, and each gathering less is time. With
    ``last``, or after an exception, they are sharded again: an optimizer must not find them whole.
    """
    kind = sharding_of(model)
    keep = None if kind is None else _KEPT_WHOLE.get(kind)
    with nullcontext() if keep is None else keep(model, last=last):
        yield


def is_whole(model: nn.Module) -> bool:
    """Whether no weight of ``model`` is sharded, or all are gathered now."""
    return model in _WHOLE_NOW or sharding_of(model) is None
