"""The products of an LM head, which all kernels on heads share: the rows that are multiplied, a tile of it, its size.

Only self rows are multiplied: `select_rows_kernel` packs them, so that tiles are full and the others cost nothing. The
host knows no number of self rows; all is launched for N rows, and what lies after the selected ones returns at once.

Of more than `FEW_ROWS`, torch's product is faster: `logit_chunks` multiplies all of them, one part of the vocabulary
after the other, in memory that may stay in the cache. Which way is taken depends on N alone, so it is the same in a
graph as without, and on every run.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from selfgen_kernels.backends.triton.configuration import Configuration, current_target
from selfgen_kernels.backends.triton.dot import factor_of_dot, rounded
from selfgen_kernels.backends.triton.elementary import OPTIONS
from selfgen_kernels.backends.triton.noise import in_mask
from selfgen_kernels.call import GROUP_SIZE, Head, Mask

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
SELECTED = {"rows": "*i32", "count": "*i32"}  # what select_rows gives, as types of arguments
FEW_ROWS = 64  # at most these: products in tiles
ROWS = 1024  # that select_rows_kernel looks at at a time
SPAN = {"GROUPS": 64}  # of a chunk's logits that a program looks at
REDUCTION = {"LANES": 1024}  # results of a row that its program looks at at a time


@triton.jit(do_not_specialize=["seed", "size"])
def select_rows_kernel(
    thresholds, seed, sample_ids, positions, size, rows, count, reference, tokens, is_selfs, invalids,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One program writes which rows are self rows, then which are not, how many are, and the others' results."""
    selected = 0
    for start in range(0, size, ROWS):
        row = start + tl.arange(0, ROWS)
        exists = row < size
        sample_id = tl.load(sample_ids + row, mask=exists, other=0)[:, None]
        position = tl.load(positions + row, mask=exists, other=0)[:, None]
        threshold = tl.load(thresholds + row, mask=exists, other=-1)
        is_self = in_mask(seed, sample_id, position, threshold)  # [ROWS]
        before = selected + tl.cumsum(is_self.to(tl.int32), 0) - is_self.to(tl.int32)  # [ROWS] selected ones
        tl.store(rows + tl.where(is_self, before, size - 1 - (row - before)), row, mask=exists)
        selected += tl.sum(is_self.to(tl.int32))
        if tokens is not None:
            tl.store(tokens + row, tl.load(reference + row, mask=exists), mask=exists)
            tl.store(is_selfs + row, is_self, mask=exists)
            tl.store(invalids + row, tl.zeros_like(is_self), mask=exists)
    tl.store(count, selected)


@triton.jit
def multiply_tile(
    hidden, hidden_stride, weight, weight_stride, bias, hidden_size, logit_scale, softcap,
    row, is_row, column, is_column, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """fp32 [M, N]: the head's logits of `row` [M] at `column` [N], rounded to its dtype as those of a linear layer."""
    k = tl.arange(0, BLOCK_K)
    hidden_tile = hidden + row[:, None] * hidden_stride + k[None, :]  # [M, BLOCK_K]
    weight_tile = weight + column[None, :] * weight_stride + k[:, None]  # [BLOCK_K, N]
    logits = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    for first_k in range(0, hidden_size, BLOCK_K):
        is_k = first_k + k < hidden_size
        left = tl.load(hidden_tile + first_k, mask=is_row[:, None] & is_k[None, :], other=0.0)
        right = tl.load(weight_tile + first_k, mask=is_column[None, :] & is_k[:, None], other=0.0)
        logits = tl.dot(factor_of_dot(left), factor_of_dot(right), logits, input_precision="ieee")
    if bias is not None:
        logits += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    return scaled_and_capped(rounded(logits, weight.dtype.element_ty), logit_scale, softcap)


@triton.jit
def scaled_and_capped(logits, logit_scale, softcap):
    """fp32: what a head makes of its product."""
    logits = logits.to(tl.float32) * logit_scale
    if softcap is not None:
        logits = softcap * tanh(logits / softcap)
    return logits


@triton.jit
def load_groups(
    logits, row_stride, logit_scale, softcap, row, chunk_begin, begin, end, span, GROUP_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """The first group of the `span`-th GROUPS from that of `begin` on, and their logits fp32 [GROUPS, GROUP_SIZE].

    They are of a row of a chunk, which begins with `chunk_begin`. What is not of begin .. end - 1 is -inf, NaN is +inf.
    """
    first = begin // (4 * GROUP_SIZE) * 4 + span * GROUPS  # noise comes by four
    group = first + tl.arange(0, GROUPS)
    ids = group[:, None] * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, :]
    exists = (ids >= begin) & (ids < end)
    z = tl.load(logits + row * row_stride + (ids - chunk_begin), mask=exists, other=0.0)
    z = scaled_and_capped(z, logit_scale, softcap)
    return first, tl.where(exists, tl.where(z == z, z, float("inf")), float("-inf"))


@triton.jit
def tanh(x):
    """tanh with the absolute precision of fp32, in two instructions of the special function unit."""
    decay = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - decay) / (1.0 + decay)
    return tl.where(x < 0, -size, size)


def tile_constants(target: str, dtype: str, rows: int, aligned: bool) -> tuple[dict, dict]:
    """Tile and launch options of the products, for `dtype` and at most `rows` self rows.

    `aligned`: its sizes and strides are divisible by 16. If not, loads are narrow and take more registers.
    """
    if dtype == "fp32":  # no tensor cores
        tile, warps, stages = ((64, 64, 32), 8, 2) if target == "gfx942" else ((64, 64, 16), 4, 2)
        if target == "sm_86" and aligned:  # 11.0, which takes its tiles, spills with two stages
            stages = 3
    elif not aligned:
        tile, warps, stages = (64, 128, 32), 8, 2
    else:
        few = rows <= FEW_ROWS
        tile, warps = (64 if few else 128, 128, 64), 4 if few else 8
        if target == "sm_120":  # both of these spill
            tile, warps = (64, 128, 64), 8
        stages = 2 if target == "gfx942" else 3  # 64 KiB of shared memory
    names = "BLOCK_M", "BLOCK_N", "BLOCK_K"
    options = OPTIONS | {"num_warps": warps, "num_stages": stages}
    if target == "sm_120" and stages == 3:  # room for one program, ptxas spills for a second
        options["maxnreg"] = 255
    return dict(zip(names, tile, strict=True)), options


def select_rows(mask: Mask, reference=None, tokens=None, is_self=None, invalid=None) -> tuple[Tensor, Tensor]:
    """All rows int32 [N], first the self rows, their count [1]; sets the results of the others if they are given."""
    size = len(mask.threshold)
    rows = torch.empty_like(mask.threshold, dtype=torch.int32, memory_format=torch.contiguous_format)
    count = rows.new_empty(1)
    select_rows_kernel[(1,)](
        mask.threshold.contiguous(), mask.seed, mask.sample_ids.contiguous(), mask.positions.contiguous(), size, rows,
        count, reference, tokens, is_self, invalid, ROWS=ROWS, **OPTIONS,
    )  # fmt: skip
    return rows, count


def factors(head: Head) -> Head:
    """`head` as kernels take it."""
    hidden, weight, bias, softcap, logit_scale = head
    if hidden.dtype == torch.float64:
        hidden, weight, bias = hidden.float(), weight.float(), None if bias is None else bias.float()
    hidden, weight = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden, weight))
    return Head(hidden, weight, None if bias is None else bias.contiguous(), softcap, logit_scale)


def product_arguments(head: Head) -> tuple[Any, ...]:
    """The arguments of `multiply_tile` that are of the head, which `factors` has made ready."""
    hidden, weight, bias, softcap, logit_scale = head
    return (
        hidden, hidden.stride(0), weight, weight.stride(0), bias, hidden.shape[1], logit_scale, softcap,
    )  # fmt: skip


def chunk_bounds(size: int, first_id: int) -> list[tuple[int, int]]:
    """Parts of `size` ids from `first_id` on, of whole groups but for the first and the last: an eighth, or 64 ids."""
    chunk = max(1, size // (8 * GROUP_SIZE)) * GROUP_SIZE
    end_id = first_id + size
    return list(pairwise((first_id, *range(first_id // GROUP_SIZE * GROUP_SIZE + chunk, end_id, chunk), end_id)))


def keeps_precision(head: Head) -> bool:
    """Whether torch's product is as precise as that of tiles: fp32 by TF32 is not, where a program has allowed that."""
    return head.hidden.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"


def logit_chunks(head: Head, first_id: int) -> Iterator[tuple[int, int, Tensor]]:
    """(first id, id past its last, product [N, C]) of the parts of a head that `factors` has made ready.

    The products take turns in the memory of the largest.
    """
    hidden, weight = head.hidden.detach(), head.weight.detach()
    bias = None if head.bias is None else head.bias.detach()
    rows, bounds = len(hidden), chunk_bounds(len(weight), first_id)
    memory = hidden.new_empty(rows * max(end - begin for begin, end in bounds))
    for begin, end in bounds:
        product = memory[: rows * (end - begin)].view(rows, end - begin)
        part = slice(begin - first_id, end - first_id)
        if bias is None:
            torch.mm(hidden, weight[part].T, out=product)
        else:
            torch.addmm(bias[part], hidden, weight[part].T, out=product)
        yield begin, end, product


def spans_of(begin: int, end: int) -> int:
    """How many programs look at the ids begin .. end - 1 of a chunk."""
    return triton.cdiv(triton.cdiv(end, GROUP_SIZE) - begin // (4 * GROUP_SIZE) * 4, SPAN["GROUPS"])


def tile_of(head: Head, rows: int) -> tuple[dict, dict]:
    """`tile_constants` for at most `rows` self rows."""
    hidden, weight, *_ = head
    sizes = hidden.shape[1], hidden.stride(0), weight.stride(0)
    aligned = all(size % 16 == 0 for size in sizes)  # as Triton tells them apart
    return tile_constants(current_target(), DTYPES[hidden.dtype], rows, aligned)


def configurations(target: str) -> list[Configuration]:
    """What ships for `target`, whatever is made of the products."""
    mask = {"thresholds": "*i64", "seed": "i64", "sample_ids": "*i64", "positions": "*i64", "size": "i32"}
    outputs = {"reference": "*i64", "tokens": "*i64", "is_selfs": "*i1", "invalids": "*i1"}
    types, nothing = mask | SELECTED, dict.fromkeys(outputs)
    return [
        Configuration("select_rows", select_rows_kernel, types | outputs, {"ROWS": ROWS}, OPTIONS),
        Configuration("select_rows[shard]", select_rows_kernel, types, nothing | {"ROWS": ROWS}, OPTIONS),
    ]


def product_configurations(
    target: str, name: str, kernel: Any, types: dict[str, str], sizes: tuple[str, ...] = (), out: str | None = None
) -> list[Configuration]:
    """`kernel` with each tile, dtype and head: `types` of its other arguments, of which `sizes` may be aligned.

    `out` is an argument of the head's dtype, or fp32 with a softcap. A kernel with one is for many rows, too.
    """
    ships = []
    for dtype in DTYPES.values():
        product = {
            "hidden": f"*{dtype}", "hidden_stride": "i64", "weight": f"*{dtype}", "weight_stride": "i64",
            "hidden_size": "i32", "logit_scale": "fp32", **SELECTED,
        }  # fmt: skip
        optional = {"bias": f"*{dtype}", "softcap": "fp32"}
        few, many = [("few rows", FEW_ROWS, True)], [("many rows", FEW_ROWS + 1, True)]
        by_rows = few if out is None else many if dtype == "fp32" else few + many
        for label, rows_at_most, aligned in (*by_rows, ("odd sizes", 1, False)):
            for extra, present, absent in (("", {}, dict.fromkeys(optional)), (", bias, softcap", optional, {})):
                constants, options = tile_constants(target, dtype, rows_at_most, aligned)
                divisible = ("hidden_stride", "weight_stride", "hidden_size", *sizes) if aligned else ()
                results = {} if out is None else {out: "*fp32" if extra else f"*{dtype}"}
                ships.append(
                    Configuration(
                        f"{name}[{dtype}, {label}{extra}]", kernel, product | types | results | present,
                        absent | constants, options, divisible, streams=aligned, tensor_cores=dtype != "fp32",
                    )
                )  # fmt: skip
    return ships


def chunk_configurations(name: str, kernel: Any, types: dict[str, str]) -> list[Configuration]:
    """`kernel` on chunks of logits with each dtype and head: `types` of its other arguments."""
    ships = []
    sizes = dict.fromkeys(("chunk_begin", "begin", "end", "spans"), "i32")
    given = sizes | {"row_stride": "i64", "logit_scale": "fp32", **SELECTED} | types
    for dtype in DTYPES.values():
        for extra, present, absent in (("", {}, {"softcap": None}), (", softcap", {"softcap": "fp32"}, {})):
            constants, aligned = absent | SPAN, ("row_stride", "chunk_begin", "begin", "end")
            logits = {"logits": f"*{dtype}"}
            title = f"{name}[{dtype}{extra}]"
            ships.append(
                Configuration(title, kernel, given | logits | present, constants, OPTIONS, aligned, streams=True)
            )
    return ships
