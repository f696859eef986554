"""How good a model is when it runs on its own tokens: losses by context, answers, self-corrections."""

from .answers import Share, exact_match, extract_answer, rouge, symbolic_match
from .corrections import Corrections
from .losses import PositionLoss, exposure_bias, held_out_losses, row_losses

__all__ = [
    "Corrections",
    "PositionLoss",
    "Share",
    "exact_match",
    "exposure_bias",
    "extract_answer",
    "held_out_losses",
    "rouge",
    "row_losses",
    "symbolic_match",
]
