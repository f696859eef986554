"""Mixed contexts: the sequential definition, and the same contexts from a few parallel passes."""

from selfgen_kernels import NOISE_VERSION

from .batch import Answers, ContextStats, MixedContext
from .generator import ContextGenerator
from .masks import Masks
from .ragged import UnsupportedModelError

__all__ = [
    "NOISE_VERSION",
    "Answers",
    "ContextGenerator",
    "ContextStats",
    "Masks",
    "MixedContext",
    "UnsupportedModelError",
]
