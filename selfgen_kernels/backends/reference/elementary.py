"""exp and log as written-out sequences of fp32 operations, and masses that are summed as integers: the specification.

Libraries' exp and log round differently from device to device, and a sum of floats depends on its order. So what a
token is drawn by is made of nothing but fp32 additions and multiplications, each rounded to nearest even (no fused
multiply-add, no division), operations on the bits of numbers, and sums of integers. Every backend writes out the same
steps (`cpu/elementary.h`, `triton/elementary.py`), so tokens are a function of the logits alone, bit for bit. No
number on the way from z is denormal, so it does not matter whether these are flushed to zero.

exp(x), x <= 0  x = max(x, -87); n = x * log2(e) rounded to a whole number; r = x - n log 2, by log 2 in two parts;
                Taylor's series of exp(r) up to r^7, times 2^n. exp(0) is 1, and no result is larger.
log(x)          of a positive normal x = 2^k (1 + f), sqrt(1/2) <= 1 + f < sqrt(2): Cephes' polynomial (S. L. Moshier,
                logf) in f, plus k log 2 in two parts. log(1) is 0, and no log of a larger x is negative.
Group mass      M = the sum of round(exp(z - peak) * 2^23) over a group of 64 ids, an integer within 2^23 .. 2^29. The
                group's logsumexp is peak + log(fp32(M) * 2^-23).
Weight          W = round(e * 2^34) of a probability e relative to its row's peak, rounded as fp32 does; sums of weights
                are int64, so a row may have 2^29 ids.
Row mass        the sum over groups of the weights of fp32(M) * 2^-23 * exp(group's peak - row's peak).

The relative error of a group's probability is below 2^-18: 63 terms, each rounded to a multiple of 2^-23.
"""

import torch
from torch import Tensor

_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.44269502, 0.693359375, 2.12194440e-4  # log 2 = high - low
_ROUND = 12582912.0  # 1.5 * 2^23: what is added to it is rounded to a whole number
_TAYLOR = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)
_SQRT_HALF, _ONE = 0x3F3504F3, 0x3F800000  # bits of fp32 numbers
_LOG = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
    2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
WEIGHT = 2.0**34
"""Weights are probabilities in units of 1 / WEIGHT."""
_SMALL = 2.0**-11  # fp32 numbers from here on are whole multiples of 2^-34


def exp_(x: Tensor) -> Tensor:
    """exp of x fp32 <= 0 of any shape, about 1e-38 below -87; x is overwritten."""
    x.clamp_(min=-87.0)
    rounded = (x * _LOG2_E).add_(_ROUND)
    n = rounded - _ROUND
    x.sub_(n * _LN2_HIGH).add_(n.mul_(_LN2_LOW))
    series = x * _TAYLOR[0]
    for factor in _TAYLOR[1:-1]:
        series.add_(factor).mul_(x)
    series.add_(_TAYLOR[-1])
    power = rounded.view(torch.int32).add_(127).bitwise_left_shift_(23).view(torch.float32)  # 2^n
    return series.mul_(power)


def log(x: Tensor) -> Tensor:
    """log of x fp32, positive and normal, of any shape."""
    return log_of(*split(x))


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """f fp32 and k int32 with x = 2^k (1 + f), for `log_of`."""
    bits = x.contiguous().view(torch.int32)
    k = (bits - _SQRT_HALF) >> 23
    return (bits - (k << 23)).view(torch.float32) - 1, k


def log_of(f: Tensor, k: Tensor) -> Tensor:
    """log(1 + f) + k log 2, fp32."""
    k = k.float()
    square = f * f
    series = f * _LOG[0]
    for factor in _LOG[1:-1]:
        series.add_(factor).mul_(f)
    series.add_(_LOG[-1]).mul_(f).mul_(square)
    series.sub_(k * _LN2_LOW).sub_(square.mul_(0.5))
    return (f + series).add_(k * _LN2_HIGH)


def log_of_share(share: Tensor) -> Tensor:
    """log of fp64 probabilities as fp32; -inf below 2^-126, NaN for what is no probability."""
    normal = share >= 2.0**-126
    result = log(share.masked_fill(~normal, 1).float())
    return result.masked_fill_(~normal, -torch.inf).masked_fill_(~(share >= 0), torch.nan)


def group_masses(z: Tensor) -> tuple[Tensor, Tensor]:
    """(peaks fp32, M int32), each [...], of groups z fp32 [..., 64]; M is 0 where the peak is not finite."""
    peak = z.amax(-1)
    finite = peak.isfinite()
    e = exp_(z - torch.where(finite, peak, 0)[..., None])
    mass = e.add_(1).view(torch.int32).sub_(_ONE).sum(-1, dtype=torch.int32)
    return peak, mass.masked_fill_(~finite, 0)


def log_mass(peak: Tensor, mass: Tensor) -> Tensor:
    """logsumexp fp32 [...] of groups, from what `group_masses` gives; the peak itself where that is not finite."""
    return torch.where(mass > 0, peak + log(mass.clamp(min=1).float().mul_(2.0**-23)), peak)


def weights(e: Tensor) -> Tensor:
    """int64: probabilities e fp32, 0 <= e <= 64, as whole multiples of 1 / WEIGHT."""
    return torch.where(e < _SMALL, (e + _SMALL).sub_(_SMALL), e).mul_(WEIGHT).long()


def row_mass(peaks: Tensor, masses: Tensor) -> tuple[Tensor, Tensor]:
    """(peak fp32, sum of weights int64), each [N], of rows whose groups have `peaks` and `masses` [N, G]."""
    peak = peaks.amax(1)
    shift = torch.where(peak.isfinite(), peak, 0)[:, None]
    weight = torch.empty_like(peak, dtype=torch.int64)
    for rows in torch.arange(len(peak), device=peak.device).split(max(1, 2**14 // peaks.shape[1])):  # in little memory
        e = exp_((peaks[rows] - shift[rows]).clamp_(max=0))
        weight[rows] = weights(e.mul_(masses[rows].float().mul_(2.0**-23))).sum(1)
    return peak, weight


def log_weight(weight: Tensor) -> Tensor:
    """log fp32 of a sum of weights int64 > 0, in units of 1."""
    return log(weight.float().mul_(1 / WEIGHT))
