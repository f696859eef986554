"""Rows of logits in which a rounding shows: ties, near ties, and numbers at every end of a dtype's range."""

import torch

INF = float("inf")
TEMPERATURES = (1.0, 0.7, 1e5, 2.0**-126, INF)  # inverse ones; the last is greedy
FILTERS = {
    "none": {},
    "top_k": {"top_k": (1, 2, 63, 64, 10**6)},
    "top_p": {"top_p": (1e-9, 0.3, 0.9, 0.999, 1 - 2**-53)},
    "min_p": {"min_p": (0.0, 1e-300, 1e-6, 0.03, 1.0)},
    "all": {"top_k": (5, 300, 64, 2, 100), "top_p": (0.9, 0.999, 0.5, 0.99, 1.0), "min_p": (0.01, 1e-9, 0.0, 0.1, 0.3)},
}
"""By row, over and over. Five of each, as many as temperatures."""


def adversarial_logits(vocab_size, dtype=torch.float32):
    """[R, vocab_size] of `dtype`; the last three rows are invalid."""
    generator = torch.Generator().manual_seed(vocab_size)
    noise = torch.randn(vocab_size, generator=generator)
    line = torch.linspace(-1, 1, vocab_size)
    whole = torch.randint(-2, 3, (vocab_size,), generator=generator).float()
    finfo = torch.finfo(dtype)
    sparse = torch.where(torch.rand(vocab_size, generator=generator) < 0.02, noise, -INF)
    sparse[vocab_size // 2] = 0.5
    one = torch.full((vocab_size,), -INF)
    one[vocab_size // 3] = -7.0
    ulps = torch.tensor(3.0).view(torch.int32) + torch.randint(-3, 4, (vocab_size,), generator=generator).int()
    huge = noise.sign() * finfo.max
    peak = 4 * noise
    peak[vocab_size // 2] = 30.0
    tails = torch.full((vocab_size,), -23.5)  # each of 2^-34 of the peak's probability, or about that
    tails[: vocab_size // 2] += 0.1 * noise[: vocab_size // 2]
    tails[vocab_size - 1] = 0.0
    above = torch.zeros(vocab_size)  # one above all others, which tie
    above[vocab_size // 2] = 1.0
    rows = [
        3 * noise, 12 * noise, 1e-3 * noise, torch.zeros(vocab_size), torch.full((vocab_size,), -1e4), whole,
        40 * whole, ulps.view(torch.float32), 100 * line, (-100 * line).exp2() * 2.0**-100, finfo.max * line,
        huge, -huge.abs(), noise * finfo.smallest_normal, line * finfo.smallest_normal, 0 * noise, sparse, one, peak,
        tails, noise.bfloat16().float(), (noise.abs() + 1).log().neg(), -(2.0 ** (line * 7)),
        torch.where(line > 0, -0.0, 0.0), torch.where(whole > 1, 5.0, whole), above,
    ]  # fmt: skip
    bad = [noise.clone(), noise.clone(), torch.full((vocab_size,), -INF)]
    bad[0][vocab_size // 2], bad[1][0] = torch.nan, INF
    logits = torch.stack(rows).clamp(-finfo.max, finfo.max).where(torch.stack(rows).isfinite(), -INF)
    return torch.cat([logits, torch.stack(bad)]).to(dtype)


def adversarial_rows(vocab_size, dtype=torch.float32, filters="none", times=5):
    """The logits `times` times, the rows' inverse temperatures fp32 [N], and `FILTERS` as keyword arguments [N].

    With 5 times, each row meets each temperature and each value of a filter.
    """
    logits = adversarial_logits(vocab_size, dtype)
    index = torch.arange(times * len(logits))
    shift = index + index // len(logits)  # a row's turn is another one each time
    inverse = torch.tensor(TEMPERATURES)[shift % 5]
    dtypes = {"top_k": torch.int64, "top_p": torch.float64, "min_p": torch.float64}
    some = {
        name: torch.tensor(values, dtype=dtypes[name])[(2 * shift + i) % 5]
        for i, (name, values) in enumerate(FILTERS[filters].items())
    }
    return logits.repeat(times, 1), inverse, some
