"""exp, log, group masses and weights as `reference/elementary.py` writes them out: every result is its own bit for bit.

Kernels that call this are compiled with `OPTIONS`: a fused multiply-add rounds once where the specification rounds
twice.
"""

import triton
import triton.language as tl

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23
LN2_HIGH, LN2_LOW = tl.constexpr(0.693359375), tl.constexpr(2.12194440e-4)
ONE, SQRT_HALF = tl.constexpr(0x3F800000), tl.constexpr(0x3F3504F3)  # bits of fp32 numbers
SMALL = tl.constexpr(2.0**-11)
WEIGHT, UNIT = tl.constexpr(2.0**34), tl.constexpr(2.0**-34)


@triton.jit
def exp(x):
    """exp of x fp32 <= 0, about 1e-38 below -87; something for NaN."""
    x = tl.where(x < -87.0, -87.0, x)
    rounded = x * 1.44269502 + ROUND
    n = rounded - ROUND
    r = (x - n * LN2_HIGH) + n * LN2_LOW
    series = r * (1 / 5040)
    series = (series + 1 / 720) * r
    series = (series + 1 / 120) * r
    series = (series + 1 / 24) * r
    series = (series + 1 / 6) * r
    series = (series + 1 / 2) * r
    series = (series + 1.0) * r
    power = ((rounded.to(tl.int32, bitcast=True) + 127) << 23).to(tl.float32, bitcast=True)  # 2^n
    return (series + 1.0) * power


@triton.jit
def split(x):
    """(f fp32, k int32) of x fp32, positive and normal: x = 2^k (1 + f)."""
    bits = x.to(tl.int32, bitcast=True)
    k = (bits - SQRT_HALF) >> 23
    return (bits - (k << 23)).to(tl.float32, bitcast=True) - 1.0, k


@triton.jit
def log_of(f, k):
    """log(1 + f) + k log 2, fp32."""
    k = k.to(tl.float32)
    square = f * f
    series = f * 7.0376836292e-2
    series = (series - 1.1514610310e-1) * f
    series = (series + 1.1676998740e-1) * f
    series = (series - 1.2420140846e-1) * f
    series = (series + 1.4249322787e-1) * f
    series = (series - 1.6668057665e-1) * f
    series = (series + 2.0000714765e-1) * f
    series = (series - 2.4999993993e-1) * f
    series = (series + 3.3333331174e-1) * f * square
    series = series - k * LN2_LOW - square * 0.5
    return (f + series) + k * LN2_HIGH


@triton.jit
def log(x):
    """log of x fp32, positive and normal."""
    f, k = split(x)
    return log_of(f, k)


@triton.jit
def log_of_share(share):
    """log fp32 of an fp64 probability; -inf below 2^-126, NaN for what is no probability."""
    normal = share >= 1.1754943508222875e-38  # 2^-126
    result = log(tl.where(normal, share, 1.0).to(tl.float32))
    return tl.where(normal, result, tl.where(share >= 0, float("-inf"), float("nan")))


@triton.jit
def gumbel(word):
    """Standard Gumbel fp32 of a uint32."""
    w = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)  # 2^-32, 1 - 2^-24
    f, k = split(1.0 - w)
    return -log(-log_of(tl.where(k == 0, -w, f), k))


@triton.jit
def finite_or_0(peak):
    """What is subtracted from logits that are at most `peak`: 0 in place of +inf and -inf, for which nothing counts."""
    return tl.where(tl.abs(peak) == float("inf"), 0.0, peak)


@triton.jit
def group_masses(z):
    """Maxima fp32 and masses int32 over the last dimension, of 64 z, none of them NaN; something where not finite."""
    peak = tl.max(z, -1)
    e = exp(z - tl.expand_dims(finite_or_0(peak), -1))
    return peak, tl.sum((e + 1.0).to(tl.int32, bitcast=True) - ONE, -1)


@triton.jit
def mass_of(mass):
    """fp32: a group's mass in units of 1."""
    return mass.to(tl.float32) * 1.1920928955078125e-07  # 2^-23


@triton.jit
def weights(e):
    """int64: probabilities e fp32, 0 <= e <= 64, as whole multiples of 2^-34."""
    return (tl.where(e < SMALL, (e + SMALL) - SMALL, e) * WEIGHT).to(tl.int64)


@triton.jit
def mass_weights(peaks, masses, peak):
    """int64: the weights of groups, relative to the peak of their row."""
    return tl.where(peaks > float("-inf"), weights(exp(peaks - peak) * mass_of(masses)), 0)


@triton.jit
def log_weight(weight):
    """log fp32 of a sum of weights int64 > 0, in units of 1."""
    return log(weight.to(tl.float32) * UNIT)
