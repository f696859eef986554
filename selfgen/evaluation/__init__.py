"""How good a model is when it runs on its own tokens: the gap, losses by context, answers, self-corrections."""

from .answers import Share, compared, exact_match, extract_answer, rouge
from .corrections import Corrections
from .gap import Gap, free_running_gap, greedy_of, row_gaps
from .losses import PositionLoss, exposure_bias, held_out_losses, row_losses
from .symbolic import symbolic_match

__all__ = [
    "Corrections",
    "Gap",
    "PositionLoss",
    "Share",
    "compared",
    "exact_match",
    "exposure_bias",
    "extract_answer",
    "free_running_gap",
    "greedy_of",
    "held_out_losses",
    "rouge",
    "row_gaps",
    "row_losses",
    "symbolic_match",
]
