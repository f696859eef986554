"""selfgen: train language models on their own tokens, online and exact.

``ContextGenerator`` makes mixed contexts, ``BSSTrainer`` trains on them; ``selfgen_kernels`` holds the fused ops.
"""

from .config import BSSConfig
from .context import ContextGenerator, ContextStats, MixedContext, UnsupportedModelError
from .trainer import BSSTrainer

__all__ = ["BSSConfig", "BSSTrainer", "ContextGenerator", "ContextStats", "MixedContext", "UnsupportedModelError"]
