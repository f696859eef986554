"""Kernels for the tests of the tests: two that are as they should be, the others each with one thing wrong.

Compiled by `python -m tools.aot --module specimens` with this folder on the path; it is never launched from there.
"""

import dataclasses

import triton
import triton.language as tl

from selfgen_kernels.backends.triton import head
from selfgen_kernels.backends.triton.configuration import Configuration
from selfgen_kernels.backends.triton.dot import rounded
from selfgen_kernels.backends.triton.elementary import gumbel
from selfgen_kernels.backends.triton.noise import random_words


@triton.jit(do_not_specialize=["seed"])
def words_kernel(out, seed, sample_ids, positions, first, STREAM: tl.constexpr):
    """Four random words as they are, for the generator's known answers."""
    words = random_words(seed, tl.load(sample_ids), tl.load(positions), first, 4, STREAM)
    tl.store(out + tl.arange(0, 4), words.to(tl.int64))


@triton.jit
def product_kernel(x, y, out, size, x_stride, y_stride, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Program (m, n) writes the row maxima of a tile of x y^T."""
    rows = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    columns = tl.program_id(1).to(tl.int64) * N + tl.arange(0, N)
    total = tl.zeros([M, N], tl.float32)
    for start in range(0, size, K):
        inner = start + tl.arange(0, K)
        a = tl.load(x + rows[:, None] * x_stride + inner[None])  # [M, K]
        b = tl.load(y + columns[:, None] * y_stride + inner[None])  # [N, K]
        total = tl.dot(a, b.T, total)
    tl.store(out + rows, tl.max(total, 1))


@triton.jit
def rounding_kernel(x, out, SIZE: tl.constexpr):
    """Copies fp32 x [SIZE], rounded, to out."""
    index = tl.arange(0, SIZE)
    tl.store(out + index, rounded(tl.load(x + index), out.dtype.element_ty))


@triton.jit
def add_kernel(x, y, out, x_stride, y_stride, SIZE: tl.constexpr):
    """Adds a row of x and one of y, without a loop."""
    row = tl.program_id(0).to(tl.int64)
    inner = tl.arange(0, SIZE)
    tl.store(out + row * SIZE + inner, tl.load(x + row * x_stride + inner) + tl.load(y + row * y_stride + inner))


@triton.jit
def softmax_kernel(x, out, STRIDE: tl.constexpr, SIZE: tl.constexpr):
    """Softmax of SIZE numbers per program, which are read STRIDE apart and held in registers."""
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    z = tl.load(x + index * STRIDE)
    weight = tl.exp(z - tl.max(z))
    tl.store(out + index, weight / tl.sum(weight))


@triton.jit
def narrow_offset_kernel(x, out, stride, SIZE: tl.constexpr):
    """Copies a row whose place is computed in 32 bits, if that is what the stride has, and widened too late."""
    row = tl.program_id(0)
    inner = tl.arange(0, SIZE)
    tl.store(out + row.to(tl.int64) * SIZE + inner, tl.load(x + (row * stride).to(tl.int64) + inner))


@triton.jit
def narrow_steps_kernel(x, out, stride, count, SIZE: tl.constexpr):
    """Adds up the rows of x, moving by 32-bit steps of SIZE strides."""
    inner = tl.arange(0, SIZE)
    total = tl.zeros([SIZE], tl.float32)
    place = inner
    for _ in range(count):
        total += tl.load(x + place)
        place += stride * SIZE
    tl.store(out + inner, total)


@triton.jit
def past_the_end_kernel(x, out, size, REACH: tl.constexpr):
    """Copies x [size] to out [size], REACH elements too many."""
    index = tl.arange(0, 64)
    tl.store(out + index, tl.load(x + index, mask=index < size + REACH), mask=index < size)


@triton.jit
def stray_store_kernel(x, out, size, REACH: tl.constexpr):
    """The same with the store going astray."""
    index = tl.arange(0, 64)
    tl.store(out + index, tl.load(x + index, mask=index < size, other=0.0), mask=index < size + REACH)


def configurations(target: str) -> list[Configuration]:
    """Named for what must be found wrong."""
    types = {"x": "*bf16", "y": "*bf16", "out": "*fp32", "size": "i32", "x_stride": "i64", "y_stride": "i64"}
    aligned = "size", "x_stride", "y_stride"
    tile, small_tile, big_tile = ({"M": m, "N": m, "K": k} for m, k in ((64, 64), (64, 32), (128, 128)))
    row = {"x": "*fp32", "out": "*fp32"}
    one_warp, four_warps = {"num_warps": 1, "enable_fp_fusion": False}, {"num_warps": 4, "enable_fp_fusion": True}
    many_stages = {"num_warps": 8, "num_stages": 5 if target.startswith("sm_") else 3, "enable_fp_fusion": True}
    pair = {name: types[name] for name in ("x", "y", "out", "x_stride", "y_stride")}
    head_of_odd_sizes = next(c for c in head.configurations(target) if c.name == "score_tile[bf16, odd sizes]")
    odd_sizes = dataclasses.replace(head_of_odd_sizes, name="odd sizes", streams=True)
    spills = Configuration("spills", softmax_kernel, row, {"STRIDE": 1, "SIZE": 8192}, one_warp, streams=True)
    return [
        Configuration("nothing", product_kernel, types, tile, four_warps, aligned, streams=True, tensor_cores=True),
        Configuration("narrow loads", product_kernel, types, small_tile, four_warps, streams=True),
        Configuration("mixed loads", product_kernel, types, tile, four_warps, aligned[:2], streams=True),
        Configuration(
            "mixed loads, no loop", add_kernel, pair, {"SIZE": 2048}, four_warps, ("x_stride",), streams=True
        ),
        odd_sizes,
        Configuration("shared memory", product_kernel, types, big_tile, many_stages, aligned),
        *([spills] if target == "sm_80" else []),  # one is enough
        Configuration("tensor cores", softmax_kernel, row, {"STRIDE": 2, "SIZE": 512}, four_warps, tensor_cores=True),
        Configuration("offsets", narrow_offset_kernel, row | {"stride": "i64"}, {"SIZE": 512}, four_warps),
        Configuration("steps", narrow_steps_kernel, row | {"stride": "i64", "count": "i32"}, {"SIZE": 512}, four_warps),
    ]


@triton.jit
def gumbel_kernel(words, out, SIZE: tl.constexpr):
    """Program i writes the noise of words int64 [.., SIZE] into out fp32, at i * SIZE."""
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + place, gumbel(tl.load(words + place).to(tl.uint32)))
