"""selfgen: train language models on their own tokens, online and exact.

``ContextGenerator`` makes mixed contexts and free-running answers. ``BSSTrainer`` trains on contexts, ``RACTrainer`` on
corrections of own answers; ``write_contexts`` and ``BASHTrainer`` do the former offline. ``selfgen_kernels`` holds the
fused ops.

Importing it loads nothing: a name is loaded from its module when it is first used, as torch and transformers take
seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .context import Answers, ContextGenerator, ContextStats, Masks, MixedContext, UnsupportedModelError
    from .context.lockstep import lockstep
    from .context.sharding import whole_weights
    from .generation import Corrected, answer, generate_corrected
    from .stored_contexts import load_contexts, write_contexts
    from .training import BASHTrainer, BSSConfig, BSSTrainer, RACConfig, RACTrainer, train_rounds

__version__ = "0.2.0"

__all__ = [
    "Answers",
    "BASHTrainer",
    "BSSConfig",
    "BSSTrainer",
    "ContextGenerator",
    "ContextStats",
    "Corrected",
    "Masks",
    "MixedContext",
    "RACConfig",
    "RACTrainer",
    "UnsupportedModelError",
    "answer",
    "generate_corrected",
    "load_contexts",
    "lockstep",
    "train_rounds",
    "whole_weights",
    "write_contexts",
]

_MODULES = {
    ".context": ("Answers", "ContextGenerator", "ContextStats", "Masks", "MixedContext", "UnsupportedModelError"),
    ".context.lockstep": ("lockstep",),
    ".context.sharding": ("whole_weights",),
    ".generation": ("Corrected", "answer", "generate_corrected"),
    ".stored_contexts": ("load_contexts", "write_contexts"),
    ".training": ("BASHTrainer", "BSSConfig", "BSSTrainer", "RACConfig", "RACTrainer", "train_rounds"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}
_ROOMS = ("context", "correction", "data", "evaluation", "generation", "stored_contexts", "training")

if not TYPE_CHECKING:  # for which every name would be known, otherwise

    def __getattr__(name: str) -> Any:
        if name in _ROOMS:
            return import_module(f".{name}", __name__)
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = globals()[name] = getattr(import_module(_HOMES[name], __name__), name)
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, *_ROOMS})
