"""`plan_pass` and `commit_pass` without a look at the device's values from the host.

Rows know nothing of each other but the budget. So one program per row adds up its log chances, integers, by a scan
over its slots, and finds where the row's window would end if the budget allowed all that is worth computing. Where it
does, these windows are the plan.

If not, one program with a row in each lane shares the budget out; more rows than registers hold are taken in blocks,
their state kept in memory (on AMD's GPUs the reference plans so many: no barrier that Triton has there waits for stores
to memory). It goes down through the sums of log chances that occur: all segments of the best one are
taken at once, by all rows that have one, until the budget ends within such a level.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from selfgen_kernels.backends.reference import passes as reference_passes
from selfgen_kernels.backends.triton.configuration import Configuration

LOWEST = tl.constexpr(reference_passes.LOWEST)
UNITS = tl.constexpr(float(reference_passes.UNITS))
LOWEST_LOG = tl.constexpr(reference_passes.LOWEST / reference_passes.UNITS)
NONE = tl.constexpr(-(2**31))  # in place of a sum of log chances: no segment
LANES = (64, 512, 2048)
"""Rows that shipped plans hold in registers; with more, registers spill."""
ROWS = 256  # at a time, in plans of more: one a thread, which spills under no Triton
BLOCK = 128  # places that a program of the other kernels handles at a time
SCAN = 512  # slots of a row whose log chances are added up at a time


@triton.jit
def following(next_self, slot, num_slots, mask):
    """The next self slot; `slot` itself where there is none, where one of both is no slot, or outside of `mask`."""
    is_slot = mask & (slot >= 0) & (slot < num_slots)
    after = tl.load(next_self + slot, mask=is_slot, other=0)
    return tl.where(is_slot & (after > slot) & (after < num_slots), after, slot)


@triton.jit
def log_units(log_chance):
    """int32: `reference.log_units`."""
    log_chance = tl.where(log_chance >= LOWEST_LOG, log_chance, LOWEST_LOG)
    log_chance = tl.where(log_chance > 0, 0.0, log_chance) * UNITS
    whole = log_chance.to(tl.int32)  # towards 0
    return whole - (whole.to(tl.float32) > log_chance).to(tl.int32)


@triton.jit
def first_log_sum(reach, after):
    """Sum of log chances of the segments from `reach` to `after`: 1, before all others. NONE if there is none."""
    return tl.where(after > reach, 1, NONE)


@triton.jit
def least_log_sum(least_log_chance, row, exists):
    """The least sum of log chances of a segment that each row takes; what is no such log stands for a chance of 1."""
    least = tl.full(row.shape, LOWEST, tl.int32)
    if least_log_chance is not None:
        given = tl.load(least_log_chance + row, mask=exists, other=0.0)
        least = log_units(tl.where(given <= 0, given, 0.0))
    return least


@triton.jit
def take_level(next_self, log_chance, num_slots, least, reach, after, log_sum, level):
    """(reach, after, log_sum) once the rows with a segment of `level` have taken it."""
    taken = log_sum == level
    reach = tl.where(taken, after, reach)
    after = tl.where(taken, following(next_self, reach, num_slots, taken), after)
    is_open = taken & (after > reach)
    chance = log_units(tl.load(log_chance + reach, mask=is_open, other=0.0))
    longer = tl.minimum(tl.maximum(log_sum, LOWEST), 0) + chance
    longer = tl.where(is_open, tl.maximum(longer, LOWEST), NONE)
    log_sum = tl.where(taken, tl.where(longer >= least, longer, NONE), log_sum)
    return reach, after, log_sum


@triton.jit
def spend(end, reach, left):
    """(ends, what is left of the budget) when windows grow from `end` to `reach`, those of the first rows first."""
    size = tl.minimum(reach - end, left)
    before = tl.cumsum(size, 0) - size  # taken by the rows that come first
    size = tl.minimum(size, tl.maximum(left - before, 0))
    return end + size, left - tl.sum(size, 0)


@triton.jit
def store_windows(row_starts, cu_seqlens_q, kv_ranges, row, exists, begin, end, planned):
    """Writes the windows from `begin` to `end` after `planned` tokens of other rows; the tokens planned then."""
    tl.store(cu_seqlens_q + row + 1, (planned + tl.cumsum(end - begin, 0)).to(tl.int32), mask=exists)
    start = tl.load(row_starts + row, mask=exists, other=0)
    tl.store(kv_ranges + 2 * row, start, mask=exists)
    tl.store(kv_ranges + 2 * row + 1, end - start, mask=exists)
    return planned + tl.sum(end - begin, 0)


@triton.jit(do_not_specialize=["num_slots", "token_budget"])
def free_end_kernel(
    final, next_self, log_chance, least_log_chance, free_ends, num_slots, token_budget, SCAN: tl.constexpr
):  # fmt: skip
    """One program per row: where its window ends if no other row takes of the budget."""
    row = tl.program_id(0)
    start = tl.load(final + row)
    is_slot = (start >= 0) & (start < num_slots)
    end = tl.where(is_slot, tl.minimum(start + token_budget, num_slots), start)
    least = least_log_sum(least_log_chance, row, True)
    log_sum = start * 0
    while start < end:
        slot = start + tl.arange(0, SCAN)  # [SCAN], as all that follows but for scalars
        exists = slot < end
        after = following(next_self, slot, num_slots, exists)
        is_self = exists & (after == slot + 1)  # the next slot
        chance = log_units(tl.load(log_chance + slot + 1, mask=is_self, other=0.0)).to(tl.int64)
        chance = tl.where(is_self, chance, 0)
        unlikely = is_self & (tl.maximum(log_sum + tl.cumsum(chance, 0), LOWEST) < least)
        stop = tl.where(exists & (after == slot), slot, tl.where(unlikely, slot + 1, end))
        log_sum += tl.sum(chance, 0)
        start += SCAN
        end = tl.minimum(end, tl.min(stop, 0))
    tl.store(free_ends + row, end)


@triton.jit(do_not_specialize=["num_slots", "rows", "token_budget"])
def window_kernel(
    final, row_starts, next_self, log_chance, least_log_chance, free_ends, cu_seqlens_q, kv_ranges, num_slots, rows,
    token_budget, LANES: tl.constexpr,
):  # fmt: skip
    """One program: how far each row's window goes, as cu_seqlens_q [rows + 1], with kv_ranges [rows, 2]."""
    row = tl.arange(0, LANES)
    exists = row < rows
    begin = tl.load(final + row, mask=exists, other=0)  # [LANES], as is all that follows but for scalars
    free_end = tl.load(free_ends + row, mask=exists, other=0)
    fits = tl.sum(free_end - begin, 0) <= token_budget
    end = tl.where(fits, free_end, begin)  # of the window
    reach = begin  # the end if the budget allows
    after = following(next_self, reach, num_slots, exists)
    log_sum = first_log_sum(reach, after)
    least = least_log_sum(least_log_chance, row, exists)
    best = tl.max(log_sum, 0)
    left = tl.where(fits, 0, token_budget.to(tl.int64))
    while (left > 0) & (best > NONE):
        level = best
        while best == level:  # more than once if a guess is certain: a row may then have several segments of a level
            reach, after, log_sum = take_level(next_self, log_chance, num_slots, least, reach, after, log_sum, level)
            best = tl.max(log_sum, 0)
        end, left = spend(end, reach, left)
    store_windows(row_starts, cu_seqlens_q, kv_ranges, row, exists, begin, end, 0)
    tl.store(cu_seqlens_q, 0)


@triton.jit(do_not_specialize=["num_slots", "rows", "token_budget"])
def many_windows_kernel(
    final, row_starts, next_self, log_chance, least_log_chance, free_ends, cu_seqlens_q, kv_ranges, ends, reaches,
    afters, log_sums, num_slots, rows, token_budget, LANES: tl.constexpr,
):  # fmt: skip
    """`window_kernel` for any number of rows, LANES at a time; `ends` .. `log_sums` [rows] hold their state."""
    whole = token_budget.to(tl.int64) * 0
    for start in range(0, rows, LANES):
        row = start + tl.arange(0, LANES)
        free_end = tl.load(free_ends + row, mask=row < rows, other=0)
        whole += tl.sum(free_end - tl.load(final + row, mask=row < rows, other=0), 0)
    fits = whole <= token_budget

    best = tl.full([], NONE, tl.int32)
    for start in range(0, rows, LANES):
        row = start + tl.arange(0, LANES)
        exists = row < rows
        reach = tl.load(final + row, mask=exists, other=0)
        free_end = tl.load(free_ends + row, mask=exists, other=0)
        after = following(next_self, reach, num_slots, exists)
        log_sum = first_log_sum(reach, after)
        tl.store(ends + row, tl.where(fits, free_end, reach), mask=exists)
        tl.store(reaches + row, reach, mask=exists)
        tl.store(afters + row, after, mask=exists)
        tl.store(log_sums + row, log_sum, mask=exists)
        best = tl.maximum(best, tl.max(log_sum, 0))
    left = tl.where(fits, 0, token_budget.to(tl.int64))
    while (left > 0) & (best > NONE):
        level = best
        while best == level:
            tl.debug_barrier()  # on CUDA, one thread stores the state of a row and another loads it
            best = tl.full([], NONE, tl.int32)
            for start in range(0, rows, LANES):
                row = start + tl.arange(0, LANES)
                exists = row < rows
                reach = tl.load(reaches + row, mask=exists, other=0)
                after = tl.load(afters + row, mask=exists, other=0)
                log_sum = tl.load(log_sums + row, mask=exists, other=NONE)
                least = least_log_sum(least_log_chance, row, exists)
                reach, after, log_sum = take_level(
                    next_self, log_chance, num_slots, least, reach, after, log_sum, level
                )
                tl.store(reaches + row, reach, mask=exists)
                tl.store(afters + row, after, mask=exists)
                tl.store(log_sums + row, log_sum, mask=exists)
                best = tl.maximum(best, tl.max(log_sum, 0))
        tl.debug_barrier()
        for start in range(0, rows, LANES):
            row = start + tl.arange(0, LANES)
            exists = row < rows
            end = tl.load(ends + row, mask=exists, other=0)
            end, left = spend(end, tl.load(reaches + row, mask=exists, other=0), left)
            tl.store(ends + row, end, mask=exists)

    tl.debug_barrier()
    planned = left * 0
    for start in range(0, rows, LANES):
        row = start + tl.arange(0, LANES)
        exists = row < rows
        begin = tl.load(final + row, mask=exists, other=0)
        end = tl.load(ends + row, mask=exists, other=0)
        planned = store_windows(row_starts, cu_seqlens_q, kv_ranges, row, exists, begin, end, planned)
    tl.store(cu_seqlens_q, 0)


@triton.jit(do_not_specialize=["rows", "token_budget"])
def slots_kernel(final, cu_seqlens_q, slots, rows, token_budget, BLOCK: tl.constexpr):
    """One program per row writes its window's slots, and a last one the padding."""
    row = tl.program_id(0)
    is_row = row < rows
    begin = tl.load(cu_seqlens_q + row)
    end = tl.load(cu_seqlens_q + row + 1, mask=is_row, other=token_budget)
    first = tl.load(final + row, mask=is_row, other=0)
    for start in range(begin, end, BLOCK):
        place = start + tl.arange(0, BLOCK)
        tl.store(slots + place, tl.where(is_row, first + (place - begin), -1), mask=place < end)


@triton.jit(do_not_specialize=["num_slots", "rows", "places"])
def commit_pass_kernel(
    tokens, final, slots, cu_seqlens_q, next_self, sampled, changed, observed, num_slots, rows, places,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row, and a last one for the padding."""
    row = tl.program_id(0)
    if row == rows:
        for start in range(tl.maximum(tl.load(cu_seqlens_q + rows), 0), places, BLOCK):
            place = start + tl.arange(0, BLOCK)
            tl.store(changed + place, place < 0, mask=place < places)
            tl.store(observed + place, place < 0, mask=place < places)
        return
    begin = tl.maximum(tl.load(cu_seqlens_q + row), 0)
    end = tl.minimum(tl.load(cu_seqlens_q + row + 1), places)
    if begin < end:
        last = end - 1  # the place after which the row is not final
        for start in range(begin, end, BLOCK):
            place = start + tl.arange(0, BLOCK)
            exists = place < end
            slot = tl.load(slots + place, mask=exists, other=-1)
            is_slot = (slot >= 0) & (slot < num_slots - 1)
            is_sampled = is_slot & (tl.load(next_self + slot, mask=is_slot, other=0) == slot + 1)
            token = tl.load(sampled + place, mask=is_sampled, other=0)
            differs = is_sampled & (token != tl.load(tokens + slot + 1, mask=is_sampled, other=0))
            last = tl.minimum(last, tl.min(tl.where(differs, place, end)))
            tl.store(tokens + slot + 1, token, mask=is_sampled)
            tl.store(changed + place, differs, mask=exists)
            tl.store(observed + place, is_sampled & (place <= last), mask=exists)
        tl.store(final + row, tl.load(slots + last) + 1)


def plan_pass(
    final: Tensor,
    row_starts: Tensor,
    next_self: Tensor,
    log_chance: Tensor,
    token_budget: int,
    least_log_chance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Slots int64 [token_budget], cu_seqlens_q int32 [R + 1], kv_ranges int64 [R, 2]."""
    rows, num_slots = len(final), len(next_self)
    if rows > LANES[-1] and torch.version.hip:
        return reference_passes.plan_pass(final, row_starts, next_self, log_chance, token_budget, least_log_chance)
    slots = final.new_empty(token_budget)
    cu_seqlens_q = final.new_empty(rows + 1, dtype=torch.int32)
    kv_ranges = final.new_empty(rows, 2)
    final = final.contiguous()
    state = final, row_starts.contiguous(), next_self.contiguous(), log_chance.contiguous()
    least = None if least_log_chance is None else least_log_chance.contiguous()
    free_ends = torch.empty_like(final)
    if rows:
        free_end_kernel[(rows,)](
            final, *state[2:], least, free_ends, num_slots, token_budget, SCAN=SCAN, **ROWS_OPTIONS
        )
    results, sizes = (free_ends, cu_seqlens_q, kv_ranges), (num_slots, rows, token_budget)
    if rows <= LANES[-1]:
        lanes = next(lanes for lanes in LANES if rows <= lanes)
        window_kernel[(1,)](*state, least, *results, *sizes, LANES=lanes, **window_options(lanes))
    else:
        memory = *(torch.empty_like(final) for _ in range(3)), torch.empty_like(final, dtype=torch.int32)
        many_windows_kernel[(1,)](*state, least, *results, *memory, *sizes, LANES=ROWS, **MANY_OPTIONS)
    slots_kernel[(rows + 1,)](final, cu_seqlens_q, slots, rows, token_budget, BLOCK=BLOCK, **OPTIONS)
    return slots, cu_seqlens_q, kv_ranges


def commit_pass(
    tokens: Tensor, final: Tensor, slots: Tensor, cu_seqlens_q: Tensor, next_self: Tensor, sampled: Tensor
) -> tuple[Tensor, Tensor]:
    """Changed and observed, bool [N]; `tokens` and `final`, contiguous, are written."""
    changed, observed = slots.new_empty(2, len(slots), dtype=torch.bool)
    inputs = (tensor.contiguous() for tensor in (slots, cu_seqlens_q, next_self, sampled))
    sizes = len(tokens), len(final), len(slots)
    commit_pass_kernel[(len(final) + 1,)](tokens, final, *inputs, changed, observed, *sizes, BLOCK=BLOCK, **OPTIONS)
    return changed, observed


OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}
ROWS_OPTIONS = OPTIONS | {"num_warps": 8}
MANY_OPTIONS = ROWS_OPTIONS | {"maxnreg": 255}  # of one program: ptxas would spill to have room for others


def window_options(lanes: int) -> dict[str, int | bool]:
    return OPTIONS | {"num_warps": min(max(1, lanes // 64), 16)}


def configurations(target: str) -> list[Configuration]:
    """What ships for one of `configuration.TARGETS`."""
    state = {"final": "*i64", "row_starts": "*i64", "next_self": "*i64"}
    state |= {"log_chance": "*fp32", "least_log_chance": "*fp32"}
    free = {"next_self": "*i64", "free_ends": "*i64", "num_slots": "i64", "token_budget": "i32"}
    free |= {name: state[name] for name in ("final", "log_chance", "least_log_chance")}
    plan = {"free_ends": "*i64", "cu_seqlens_q": "*i32", "kv_ranges": "*i64"}
    plan |= {"num_slots": "i64", "rows": "i32", "token_budget": "i32"}
    places = {"final": "*i64", "cu_seqlens_q": "*i32", "slots": "*i64", "rows": "i32", "token_budget": "i32"}
    commit = {
        "tokens": "*i64", "final": "*i64", "slots": "*i64", "cu_seqlens_q": "*i32", "next_self": "*i64",
        "sampled": "*i64", "changed": "*i1", "observed": "*i1", "num_slots": "i64", "rows": "i32", "places": "i32",
    }  # fmt: skip
    windows = [
        Configuration(f"plan_pass, {lanes} rows", window_kernel, state | plan, {"LANES": lanes}, window_options(lanes))
        for lanes in LANES
    ]
    memory = {"ends": "*i64", "reaches": "*i64", "afters": "*i64", "log_sums": "*i32"}
    return [
        Configuration("plan_pass, rows alone", free_end_kernel, free, {"SCAN": SCAN}, ROWS_OPTIONS),
        *windows,
        Configuration(
            "plan_pass, more rows", many_windows_kernel, state | memory | plan, {"LANES": ROWS}, MANY_OPTIONS
        ),
        Configuration("plan_pass, slots", slots_kernel, places, {"BLOCK": BLOCK}, OPTIONS),
        Configuration("commit_pass", commit_pass_kernel, commit, {"BLOCK": BLOCK}, OPTIONS),
    ]
