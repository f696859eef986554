"""The generator of `reference/philox.py` in Triton, and the two ops that return its numbers as they are."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from selfgen_kernels.backends.reference import philox
from selfgen_kernels.backends.triton.configuration import Configuration
from selfgen_kernels.backends.triton.elementary import OPTIONS, gumbel
from selfgen_kernels.backends.triton.rows import for_rows, int64_of_row

MASK, GROUP, TOKEN = tl.constexpr(philox.MASK), tl.constexpr(philox.GROUP), tl.constexpr(philox.TOKEN)

BLOCK = 1024  # random numbers per program


@triton.jit
def number_of(seed):
    """int64: a seed that is given by value, or lies in memory, as that of a CUDA graph does."""
    if tl.constexpr(seed.dtype.is_ptr()):
        seed = tl.load(seed)
    return seed.to(tl.int64)


@triton.jit
def random_words(seed, sample_id, position, first_index, SIZE: tl.constexpr, STREAM: tl.constexpr):
    """r(first_index) .. r(first_index + SIZE - 1) as uint32 [SIZE]; first_index and SIZE are multiples of 4.

    With sample_id and position [M, 1] in place of scalars: uint32 [M, SIZE].
    """
    block = (first_index // 4 + tl.arange(0, SIZE // 4)).to(tl.uint32)  # [SIZE / 4]
    c1 = tl.zeros_like(block) + position.to(tl.uint32)
    c0 = tl.zeros_like(c1) + (block | (STREAM << 28))
    c2 = tl.zeros_like(c1) + sample_id.to(tl.uint32)
    c3 = tl.zeros_like(c1) + (sample_id.to(tl.int64) >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(number_of(seed), c0, c1, c2, c3)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def in_mask(seed, sample_id, position, threshold):
    """Whether a row is a self row; for rows [M], sample_id and position are [M, 1] and threshold is [M]."""
    word = tl.max(tl.where(tl.arange(0, 4) == 0, random_words(seed, sample_id, position, 0, 4, MASK), 0), -1)
    return word.to(tl.int64) < threshold


@triton.jit(do_not_specialize=["seed"])
def gumbel_noise_kernel(
    out, seed, sample_ids, positions, size, blocks, rows, count, STREAM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Program (slot, block) writes out[slot, block * BLOCK :][:BLOCK]; out is contiguous [N, size].

    A slot is a row; or, given those, the row `rows[slot]`, and slots from `count` on are left as they are.
    """
    slot = tl.program_id(0).to(tl.int64) // blocks
    row = slot
    if rows is not None:
        if slot >= tl.load(count):
            return
        row = tl.load(rows + slot).to(tl.int64)
    first = (tl.program_id(0) % blocks) * BLOCK
    words = random_words(seed, tl.load(sample_ids + row), tl.load(positions + row), first, BLOCK, STREAM)  # [BLOCK]
    index = first + tl.arange(0, BLOCK)
    tl.store(out + slot * size + index, gumbel(words), mask=index < size)


@triton.jit(do_not_specialize=["seed", "threshold"])
def self_mask_kernel(out, seed, sample_ids, positions, threshold):
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    is_self = in_mask(seed, tl.load(sample_ids + row), tl.load(positions + row), int64_of_row(threshold, row))
    tl.store(out + row, is_self)


def gumbel_noise(
    seed: int | Tensor, sample_ids: Tensor, positions: Tensor, size: int, stream: int, rows: Tensor | None = None,
    count: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Standard Gumbel noise, fp32 [N, size]; given `rows` int32 [N] and `count` [1], of the first count of them."""
    out = torch.empty(len(sample_ids), size, device=sample_ids.device)
    block = min(BLOCK, max(4, triton.next_power_of_2(size)))
    blocks = triton.cdiv(size, block)
    if out.numel():
        keys = sample_ids.contiguous(), positions.contiguous()
        grid = (len(sample_ids) * blocks,)
        gumbel_noise_kernel[grid](out, seed, *keys, size, blocks, rows, count, STREAM=stream, BLOCK=block, **OPTIONS)
    return out


def self_mask(seed: int, sample_ids: Tensor, positions: Tensor, threshold: Tensor) -> Tensor:
    """bool [N]: r(0) of stream MASK is below `threshold`, int64 [N] or a number."""
    out = torch.empty_like(sample_ids, dtype=torch.bool, memory_format=torch.contiguous_format)
    if out.numel():
        keys = sample_ids.contiguous(), positions.contiguous()
        self_mask_kernel[(len(out),)](out, seed, *keys, for_rows(threshold), **OPTIONS)
    return out


def configurations(target: str) -> list[Configuration]:
    """What ships for `target`."""
    keys = {"seed": "i64", "sample_ids": "*i64", "positions": "*i64"}
    noise = {"out": "*fp32", **keys, "size": "i32", "blocks": "i32"}
    mask = {"out": "*i1", **keys}
    selected = {"rows": "*i32", "count": "*i32"}
    groups = dict.fromkeys(selected) | {"STREAM": philox.GROUP, "BLOCK": BLOCK}
    tokens = {"STREAM": philox.TOKEN, "BLOCK": 64}
    return [
        Configuration("gumbel_noise[groups]", gumbel_noise_kernel, noise, groups, OPTIONS),
        Configuration("gumbel_noise[tokens]", gumbel_noise_kernel, noise | selected, tokens, OPTIONS),
        Configuration("self_mask", self_mask_kernel, mask | {"threshold": "*i64"}, {}, OPTIONS),
        Configuration("self_mask[one p]", self_mask_kernel, mask | {"threshold": "i64"}, {}, OPTIONS),
    ]
