"""Hooks of a library that are off for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

OF_SHARDING = "_of_sharding"
"""An attribute of hooks that gather weights for a forward, or watch it, and change nothing."""


@contextmanager
def hooks_taken_off(model: nn.Module, chosen: Callable[[Callable], bool]) -> Iterator[None]:
    """Inside, forwards of the modules of ``model`` run without the hooks that are ``chosen``."""
    taken = [
        (hooks, list(hooks), {key: hook for key, hook in hooks.items() if chosen(hook)})
        for module in model.modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
    ]
    try:
        for hooks, _, off in taken:
            for key in off:
                del hooks[key]
        yield
    finally:
        for hooks, order, off in taken:
            if off:  # each in its place
                now = dict(hooks)
                hooks.clear()
                hooks.update({key: (off | now)[key] for key in order if key in off or key in now})
                hooks.update(now)
