"""Planning and committing a pass, specified: segments in order, and what a row's first change leaves final."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

UNITS = 2**20
"""In 1: log chances are whole numbers of units, so that their sums are the same in any order."""
LOWEST = -(2**30)
"""Units: what log chances and their sums are held at, a chance of e^-1024."""


def log_units(log_chance: Tensor) -> Tensor:
    """int32: log chances fp32 in units, rounded down; LOWEST for NaN, and 0 for what is above 0."""
    log_chance = torch.where(log_chance >= LOWEST / UNITS, log_chance, LOWEST / UNITS)
    return (log_chance.clamp(max=0) * UNITS).floor().int()


def least_units(least_log_chance: Tensor) -> Tensor:
    """int32: the same of the least that rows take; what is no log of a chance stands for a chance of 1."""
    return log_units(torch.where(least_log_chance <= 0, least_log_chance, 0.0))


def plan_pass(
    final: Tensor,
    row_starts: Tensor,
    next_self: Tensor,
    log_chance: Tensor,
    token_budget: int,
    least_log_chance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Slots [token_budget], cu_seqlens_q [R + 1], kv_ranges [R, 2]: all segments of all rows, sorted and cut.

    Column k holds the k-th segment of each row; the first one must be computed, and none has a better chance than 1.
    """
    begin, end = final, next_self[final]  # [R]
    log_chance = log_units(log_chance)  # [S]
    log_sum = torch.ones_like(final, dtype=torch.int32)  # [R]
    columns = [(end - begin, log_sum)]
    while ((end > begin) & (end - final < token_budget)).any():
        begin, end = end, next_self[end]
        log_sum = (log_sum.clamp(max=0) + log_chance[begin]).clamp(min=LOWEST)
        columns.append((end - begin, log_sum))
    sizes, log_sums = (torch.stack(column, 1).flatten() for column in zip(*columns, strict=True))  # [R * K], row by row

    if least_log_chance is not None:
        least = least_units(least_log_chance)  # what must be computed is, whatever is given
        sizes = torch.where(log_sums >= least.repeat_interleave(len(columns)), sizes, 0)
    order = log_sums.argsort(descending=True, stable=True)
    in_order = sizes[order]
    left = token_budget - (in_order.cumsum(0) - in_order)  # of the budget, before each segment
    taken = torch.empty_like(sizes)
    taken[order] = torch.minimum(in_order, left.clamp(min=0))
    window = taken.view(len(final), len(columns)).sum(1)  # [R]

    cu_seqlens_q = pad(window.cumsum(0), (1, 0))
    slots = torch.full((token_budget,), -1, device=final.device)
    planned = int(window.sum())
    slots[:planned] = (final - cu_seqlens_q[:-1]).repeat_interleave(window)
    slots[:planned] += torch.arange(planned, device=final.device)
    return slots, cu_seqlens_q.int(), torch.stack([row_starts, final + window - row_starts], 1)


def commit_pass(
    tokens: Tensor, final: Tensor, slots: Tensor, cu_seqlens_q: Tensor, next_self: Tensor, sampled: Tensor
) -> tuple[Tensor, Tensor]:
    """Changed [N] and observed [N]; `tokens` and `final` are written."""
    changed, observed = torch.zeros(2, len(slots), dtype=torch.bool, device=slots.device)
    bounds = cu_seqlens_q.tolist()
    for row, (begin, end) in enumerate(pairwise(bounds)):
        if begin == end:
            continue
        window = slots[begin:end]
        places = begin + (next_self[window] == window + 1).nonzero()[:, 0]  # where a token was sampled
        at = slots[places] + 1
        changed[places] = sampled[places] != tokens[at]
        tokens[at] = sampled[places]
        wrong = changed[begin:end].nonzero()[:, 0]
        last = begin + int(wrong[0]) if len(wrong) else end - 1  # the place after which the row is not final
        observed[places] = places <= last
        final[row] = slots[last] + 1
    return changed, observed
