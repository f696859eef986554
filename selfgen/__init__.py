"""selfgen: train language models on their own tokens, online and exact.

``ContextGenerator`` makes mixed contexts, ``BSSTrainer`` trains on them, ``write_contexts`` and ``BASHTrainer`` do the
same offline; ``selfgen_kernels`` holds the fused ops.
"""

from .config import BSSConfig
from .context import ContextGenerator, ContextStats, MixedContext, UnsupportedModelError
from .offline import BASHTrainer, load_contexts, write_contexts
from .rounds import train_rounds
from .trainer import BSSTrainer

__all__ = [
    "BASHTrainer",
    "BSSConfig",
    "BSSTrainer",
    "ContextGenerator",
    "ContextStats",
    "MixedContext",
    "UnsupportedModelError",
    "load_contexts",
    "train_rounds",
    "write_contexts",
]
