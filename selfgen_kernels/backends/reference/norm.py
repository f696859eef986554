"""Root mean square norm, specified: squares are summed as integers, so no order of a sum can change a bit.

A row is scaled by a power of two, which rounds nothing, so that its largest absolute value is within 1 and 2. The
squares are rounded to fp32, then to whole multiples of 2^-34 (`elementary.weights`), and summed as integers: a row of
2^14 numbers has sums below 2^50. The sum is rounded to fp32 once, so its relative error is below 2^-23 + D * 2^-35.
Division and square root are those of IEEE 754, rounded to nearest, and nothing is fused.

Peaks below 2^-62, whose squares vanish beside any eps, are scaled as if they were that large. A row with a number from
2^64 on, whose square fp32 does not hold, has an infinite sum, and one with NaN has NaN.
"""

import torch
from torch import Tensor

from selfgen_kernels.backends.reference.elementary import WEIGHT, weights
from selfgen_kernels.ops.norm import normed_dtype

_LEAST, _MOST = 65, 190  # exponents, as fp32 has them, of the peaks that rows are scaled by
_TOO_LARGE = (_MOST + 1) << 23  # bits of 2^64


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool, round_first: bool) -> Tensor:
    """[N, D]: x / sqrt(mean(x^2) + eps), times the weight or 1 + weight; rounded to the dtype of x before, or not."""
    wide = x.float().contiguous()
    square_sum = _square_sum(wide)
    mean = square_sum / torch.full_like(square_sum, x.shape[1])  # a GPU would multiply by 1 / D, rounded
    root = (mean + eps).double().sqrt().float()  # libraries' roots in fp32 are off by one ulp
    normed = wide * (1 / root)[:, None]
    if round_first:
        normed = normed.to(x.dtype).float()
    factor = weight.float() + 1 if plus_one else weight.float()
    return (normed * factor).to(normed_dtype(x, weight, round_first))


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, plus_one: bool, round_first: bool
) -> tuple[Tensor, Tensor]:
    """[N, D] each: the sum of x and residual [N, D], rounded to its dtype, and that normed."""
    total = (x + residual).contiguous()
    return total, rms_norm(total, weight, eps, plus_one, round_first)


def _square_sum(x: Tensor) -> Tensor:
    """fp32 [N] of x fp32 [N, D]."""
    peak = (x.view(torch.int32) & 0x7FFFFFFF).amax(1)  # bits of the largest absolute value; those of NaN are larger
    exponent = (peak >> 23).clamp(_LEAST, _MOST)
    scale, back = ((bits << 23).view(torch.float32) for bits in (254 - exponent, exponent))
    scaled = x * scale[:, None]
    total = weights(scaled.mul_(scaled)).sum(1).float().mul_(1 / WEIGHT)
    largest = peak.view(torch.float32)
    return torch.where(peak < _TOO_LARGE, total * back * back, largest * largest)
