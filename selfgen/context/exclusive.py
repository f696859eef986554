"""A model is one generator's at a time, and gives logits alone meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

_LOCKS: WeakKeyDictionary[PreTrainedModel, RLock] = WeakKeyDictionary()
_NEW_LOCK = RLock()
_MORE_OUTPUTS = ("output_router_logits",)  # from which models compute a loss, also of one token over a cache


@contextmanager
def taking_turns(model: PreTrainedModel) -> Iterator[None]:
    """Inside, no other thread generates with ``model``: its attention, modes and modules are changed meanwhile."""
    with _NEW_LOCK:
        lock = _LOCKS.setdefault(model, RLock())
    with lock:
        yield


@contextmanager
def logits_alone(model: PreTrainedModel) -> Iterator[None]:
    """Inside, ``model`` does not return what its configuration asks for besides logits."""
    configs = model.config, model.config.get_text_config(decoder=True)  # one or two
    asked = [(config, name) for config in configs for name in _MORE_OUTPUTS if getattr(config, name, False)]
    try:
        for config, name in asked:
            setattr(config, name, False)
        yield
    finally:
        for config, name in asked:
            setattr(config, name, True)
