"""selfgen: train language models on their own tokens, online and exact.

``ContextGenerator`` makes mixed contexts and free-running answers. ``BSSTrainer`` trains on contexts, ``RACTrainer`` on
corrections of own answers; ``write_contexts`` and ``BASHTrainer`` do the former offline. ``selfgen_kernels`` holds the
fused ops.
"""

from .context import Answers, ContextGenerator, ContextStats, Masks, MixedContext, UnsupportedModelError
from .context.lockstep import lockstep
from .context.sharding import whole_weights
from .generation import Corrected, answer, generate_corrected
from .stored_contexts import load_contexts, write_contexts
from .training import BASHTrainer, BSSConfig, BSSTrainer, RACConfig, RACTrainer, train_rounds

__version__ = "0.1.0"

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
