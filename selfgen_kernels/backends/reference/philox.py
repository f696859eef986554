"""The generator, and with it the specification of all randomness in this package.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) is a keyed bijection
of 128-bit counters: no state, so any number can be had on its own.

Key             (k0, k1) = (low, high) 32 bits of the 64-bit seed, two's complement.
Counter         c0 = stream * 2^28 + index // 4      0 <= stream < 16, 0 <= index < 2^30
                c1 = position                        0 <= position < 2^32
                c2 = low 32 bits of sample_id        int64, two's complement
                c3 = high 32 bits of sample_id
Round           (c0, c1, c2, c3) <- (hi(M1 * c2) ^ c1 ^ k0, lo(M1 * c2), hi(M0 * c0) ^ c3 ^ k1, lo(M0 * c0)), then
                k0 <- k0 + W0, k1 <- k1 + W1 (mod 2^32); ten times.
Random number   r(index) = word index % 4 of the output, a uint32.
Streams         0 MASK: is row (sample_id, position) a self row; only index 0 is used.
                1 GROUP: the Gumbel noise of vocabulary group `index`.
                2 TOKEN: the Gumbel noise of the token at offset `index` inside the winning group.
Bernoulli(p)    r < round(p * 2^32), rounded to the nearest integer in fp64. p = 0 is never, p = 1 always.
Gumbel          in fp32, each operation rounded to nearest even, with `split` and `log_of` of `elementary`:
                w = min((fp32(r) + 0.5) * 2^-32, 1 - 2^-24)      uniform on (0, 1), finest near 0
                f, k = split(1 - w), but f = -w where k = 0
                E = -log_of(f, k)                                exponential, relative precision kept for small E
                G = -log_of(split(E))                            so large Gumbels, which decide an argmax, are exact
                Every r gives a finite G, within (-2.82, 22.88).

Backends agree on r and on G bit for bit.

Known answers (Random123): counter and key all 0 give 6627e8d5 e169c58d bc57ac4c 9b00dbd8; all bits set give 408f276d
41c83b0e a20bc7c6 6d5451fd; counter 243f6a88 85a308d3 13198a2e 03707344 with key a4093822 299f31d0 gives d16cfe09
94fdcceb 5001e420 24126ea1.
"""

import torch
from torch import Tensor

from selfgen_kernels.backends.reference.elementary import log, log_of, split

MASK, GROUP, TOKEN = 0, 1, 2  # streams

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[int | Tensor, int | Tensor]) -> Words:
    """Ten rounds of Philox on uint32 counters, held in int64 tensors of any one shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = _M0 * c0, _M1 * c2  # 64 bits, of which int64 keeps every one
        c0, c1 = _high(product1) ^ c1 ^ k0, product1 & _LOW
        c2, c3 = _high(product0) ^ c3 ^ k1, product0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


def random_words(
    seed: int | Tensor, sample_ids: Tensor, positions: Tensor, size: int, stream: int, first: int = 0
) -> Tensor:
    """r(first) .. r(first + size - 1) of every row: uint32 in int64 [N, size]; `first` is a multiple of 4."""
    sample_ids, positions = sample_ids.long()[:, None], positions.long()[:, None]  # [N, 1]
    blocks = torch.arange(first // 4, (first + size + 3) // 4, device=sample_ids.device)[None]  # [1, B]
    counter = torch.broadcast_tensors((stream << 28) | blocks, positions & _LOW, sample_ids & _LOW, _high(sample_ids))
    words = philox4x32(counter, (seed & _LOW, (seed >> 32) & _LOW))
    return torch.stack(words, dim=-1).flatten(1)[:, :size]  # [N, B, 4] -> [N, size]


def gumbel_from_words(words: Tensor) -> Tensor:
    """Standard Gumbel fp32 of uint32 random numbers in int64, of any shape."""
    uniform = ((words.float() + 0.5) * 2**-32).clamp(max=1 - 2**-24)
    f, k = split(1 - uniform)
    f = torch.where(k == 0, -uniform, f)  # the bits of w that 1 - w loses
    exponential = -log_of(f, k)  # -log(1 - w)
    return -log(exponential)


def gumbel_noise(
    seed: int | Tensor, sample_ids: Tensor, positions: Tensor, size: int, stream: int, first: int = 0
) -> Tensor:
    """Standard Gumbel noise, fp32 [N, size], of the indices from `first`, a multiple of 4."""
    return gumbel_from_words(random_words(seed, sample_ids, positions, size, stream, first)).contiguous()


def self_mask(seed: int | Tensor, sample_ids: Tensor, positions: Tensor, threshold: Tensor) -> Tensor:
    """bool [N]: r(0) of stream MASK is below `threshold` int64 [N]."""
    return random_words(seed, sample_ids, positions, 1, MASK)[:, 0] < threshold


def _high(word64: Tensor) -> Tensor:
    return (word64 >> 32) & _LOW
