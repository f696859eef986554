"""selfgen: train language models on their own tokens, online and exact.

``ContextGenerator`` makes mixed contexts and free-running answers, ``BSSTrainer`` and ``RACTrainer`` train on them;
``selfgen_kernels`` holds the fused ops.
"""

from .config import BSSConfig
from .context import Answers, ContextGenerator, ContextStats, Masks, MixedContext, UnsupportedModelError
from .generation import Corrected, generate, generate_corrected
from .rac import RACConfig, RACTrainer
from .trainer import BSSTrainer

__all__ = [
    "Answers",
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
    "generate",
    "generate_corrected",
]
