"""The passes of a fixed-point iteration over ragged rows: which tokens to compute next, and what they settled.

Rows lie one after the other: row r, position i has the *slot* row_starts[r] + i, for tokens and K/V alike. A *guess* of
all tokens is given; at some positions, the self positions, the model puts a self token. A pass computes a *window* of
consecutive slots per row; where the slot before a self position is computed, the model's token there becomes known.

Nothing here waits for the device: with kernels that do not either, planning, computing and committing a pass can be
captured in one CUDA graph and replayed until every row is done.
"""

import torch
from torch import Tensor

from selfgen_kernels.ops.arguments import check_number, check_tensor, values_visible
from selfgen_kernels.ops.registration import define


@define(
    "plan_pass",
    "(Tensor final, Tensor row_starts, Tensor next_self, Tensor log_chance, SymInt token_budget, "
    "Tensor? least_log_chance=None) -> (Tensor, Tensor, Tensor)",
)
def _(final, row_starts, next_self, log_chance, token_budget, least_log_chance=None):
    rows = final.shape[0]
    cu_seqlens_q = final.new_empty((rows + 1,), dtype=torch.int32)
    return final.new_empty((token_budget,)), cu_seqlens_q, final.new_empty((rows, 2))


@define(
    "commit_pass",
    "(Tensor(a!) tokens, Tensor(b!) final, Tensor slots, Tensor cu_seqlens_q, Tensor next_self, Tensor sampled) "
    "-> (Tensor, Tensor)",
)
def _(tokens, final, slots, cu_seqlens_q, next_self, sampled):
    return tuple(slots.new_empty(slots.shape, dtype=torch.bool) for _ in range(2))


def plan_pass(
    final: Tensor,
    row_starts: Tensor,
    next_self: Tensor,
    log_chance: Tensor,
    token_budget: int,
    *,
    least_log_chance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose a window of slots for each row, of at most `token_budget` tokens together.

    What must be computed comes first: each unfinished row, in the order of the rows, from its first slot that is not
    final up to its next self position. What is left of the budget goes to speculation. The *segment* from one self
    position up to the next is worth computing if the guesses up to and at its first slot turn out right, so segments
    are taken in the order of the sum of `log_chance` along the row, from the row's first open self position to the
    segment's first slot (of equal sums the lower row, then the earlier slot), and none whose sum is less than its row's
    `least_log_chance`. The last one is cut where the budget ends. At least one token is planned while any row is
    unfinished.

    A pass is a step of Jacobi decoding (Santilli et al., arXiv 2305.10427), here of the mixed contexts of
    batch-scheduled sampling (Cen et al., arXiv 2410.14655), under a token budget as in Sarathi-Serve (Agrawal et al.,
    arXiv 2403.02310).

    Logs count in whole units of 2^-20, rounded down and held at -1024, and so do their sums: integers, so that every
    backend gives the same plan, whatever the order in which it adds. Only a log of 0 is a certain guess.

    Args:
        final: int64 [R], the slot of each row's first position whose K/V is not final. Row r is done if
            next_self[final[r]] == final[r].
        row_starts: int64 [R], the first slot of each row.
        next_self: int64 [S], the slot of the first self position after slot s in the same row; s if there is none.
        log_chance: fp32 [S], <= 0: natural log of the chance that the guess at a self position is right. Other slots
            are not looked at.
        token_budget: 1 <= token_budget < 2^31.
        least_log_chance: fp32 [R], <= 0: natural log of the least chance that is worth speculation in each row. None:
            any is.

    Returns:
        slots int64 [token_budget], the planned slots row after row, then -1 as padding.
        cu_seqlens_q int32 [R + 1]: row r's window is slots[cu_seqlens_q[r] : cu_seqlens_q[r + 1]], empty if it is not
            served; the last entry is the number of planned tokens.
        kv_ranges int64 [R, 2]: the first slot of each row and the number of slots up to the end of its window, as
            `ragged_attention` takes them.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a value, shape or device outside of the above (values inside GPU tensors are not looked at: there a
            row with a slot out of range is taken for done).

    Example:
        >>> import torch
        >>> from selfgen_kernels import plan_pass
        >>> starts = torch.tensor([0, 4])  # two rows of four slots; self positions at slots 2, 3 and 6
        >>> next_self = torch.tensor([2, 2, 3, 3, 6, 6, 6, 7])
        >>> log_chance = torch.full((8,), 0.6).log()
        >>> slots, cu_seqlens_q, kv_ranges = plan_pass(starts, starts, next_self, log_chance, 6)
        >>> slots.tolist()  # up to slots 2 and 6, then slot 2 itself in the hope that its guess is right
        [0, 1, 2, 4, 5, -1]
        >>> cu_seqlens_q.tolist(), kv_ranges.tolist()
        ([0, 3, 5], [[0, 3], [4, 2]])
    """
    check_tensor("final", final, ("R",), (torch.int64,), None)
    rows, device = final.shape[0], final.device
    check_tensor("row_starts", row_starts, (rows,), (torch.int64,), device)
    check_tensor("next_self", next_self, ("S",), (torch.int64,), device)
    check_tensor("log_chance", log_chance, (next_self.shape[0],), (torch.float32,), device)
    check_number(
        "token_budget",
        token_budget,
        "1 <= token_budget < 2**31",
        lambda n: 1 <= n < 2**31,
        whole=True,
        or_else="a SymInt",
    )
    if least_log_chance is not None:
        check_tensor("least_log_chance", least_log_chance, (rows,), (torch.float32,), device)
        if values_visible(least_log_chance) and not (least_log_chance <= 0).all():
            raise ValueError("least_log_chance holds a number that is not <= 0; pass logs of probabilities")
        least_log_chance = least_log_chance.detach()
    if values_visible(final, row_starts, next_self, log_chance):
        _check_next_self(next_self)
        _check_slots("final", final, len(next_self))
        _check_slots("row_starts", row_starts, len(next_self))
        if (row_starts > final).any():
            raise ValueError("a row's final slot lies before its row_starts; pass row_starts[r] <= final[r]")
        is_self = next_self[next_self > torch.arange(len(next_self))]
        if not (log_chance[is_self] <= 0).all():
            raise ValueError(
                "log_chance holds a number that is not <= 0 at a self position; pass logs of probabilities"
            )
    return torch.ops.selfgen.plan_pass(
        final, row_starts, next_self, log_chance.detach(), token_budget, least_log_chance
    )


def commit_pass(
    tokens: Tensor, final: Tensor, slots: Tensor, cu_seqlens_q: Tensor, next_self: Tensor, sampled: Tensor
) -> tuple[Tensor, Tensor]:
    """Write what a pass sampled into the guess `tokens`, and move `final` forward. Both are changed in place.

    Place i of the pass computed slot s = slots[i]. If the next self position is s + 1, then sampled[i] is the model's
    token there, and else it is ignored. A row is final up to its first token that changed: `final` becomes that slot,
    or the end of the row's window if none did. Rows with an empty window stay as they are.

    Jacobi decoding's test of a guess (Santilli et al., arXiv 2305.10427), at self positions only.

    Args:
        tokens: int64 [S], contiguous: the guess.
        final: int64 [R], contiguous: the slot of each row's first position whose K/V is not final.
        slots, cu_seqlens_q: int64 [N] and int32 [R + 1], as `plan_pass` gives them; the windows begin at `final`.
        next_self: int64 [S], as in `plan_pass`.
        sampled: int64 [N].

    Returns:
        changed bool [N]: a token was sampled at place i, and it is not what the guess was.
        observed bool [N]: one was sampled, and no change comes before it in its row's window. It was drawn under the
            final context, so over such places the mean of `changed` estimates how often a guess is wrong.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a value, shape, layout or device outside of the above (values inside GPU tensors are not looked at;
            slots out of range are neither read nor written).

    Example:
        >>> import torch
        >>> from selfgen_kernels import commit_pass
        >>> tokens, final = torch.tensor([5, 6, 7, 8, 5, 6, 7, 8]), torch.tensor([0, 4])
        >>> next_self = torch.tensor([2, 2, 3, 3, 6, 6, 6, 7])
        >>> slots, chunks = torch.tensor([0, 1, 2, 4, 5, -1]), torch.tensor([0, 3, 5], dtype=torch.int32)
        >>> changed, observed = commit_pass(tokens, final, slots, chunks, next_self, torch.tensor([0, 9, 8, 0, 7, 0]))
        >>> tokens.tolist(), final.tolist()  # slot 2 changed from 7 to 9; slot 6 was right
        ([5, 6, 9, 8, 5, 6, 7, 8], [2, 6])
        >>> changed.tolist(), observed.tolist()
        ([False, True, False, False, False, False], [False, True, False, False, True, False])
    """
    check_tensor("tokens", tokens, ("S",), (torch.int64,), None)
    device = tokens.device
    check_tensor("final", final, ("R",), (torch.int64,), device)
    check_tensor("slots", slots, ("N",), (torch.int64,), device)
    check_tensor("cu_seqlens_q", cu_seqlens_q, (final.shape[0] + 1,), (torch.int32,), device)
    check_tensor("next_self", next_self, (tokens.shape[0],), (torch.int64,), device)
    check_tensor("sampled", sampled, (slots.shape[0],), (torch.int64,), device)
    for name, tensor in (("tokens", tokens), ("final", final)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is written in place and has stride {tensor.stride(0)}; pass a contiguous tensor")
    if values_visible(slots, cu_seqlens_q, next_self):
        _check_next_self(next_self)
        planned = int(cu_seqlens_q[-1])
        sizes = cu_seqlens_q.diff()
        if cu_seqlens_q[0] != 0 or (sizes < 0).any() or planned > len(slots):
            raise ValueError(
                f"cu_seqlens_q is {cu_seqlens_q.tolist()}, expected numbers that ascend from 0 to at most the "
                f"{len(slots)} slots; pass what plan_pass gave"
            )
        _check_slots("slots", slots[:planned], len(tokens))
    return torch.ops.selfgen.commit_pass(tokens, final, slots, cu_seqlens_q, next_self, sampled)


def _check_slots(name: str, slots: Tensor, size: int) -> None:
    outside = (slots < 0) | (slots >= size)
    if outside.any():
        raise ValueError(f"{name} holds {slots[outside][0]}, accepted are the slots 0 <= slot < {size}; correct it")


def _check_next_self(next_self: Tensor) -> None:
    slots = torch.arange(len(next_self))
    outside = (next_self < slots) | (next_self >= len(next_self))
    if outside.any():
        slot = int(outside.nonzero()[0])
        raise ValueError(
            f"next_self[{slot}] is {int(next_self[slot])}, accepted are {slot} <= slot < {len(next_self)}; "
            "pass the slot of the next self position, or the slot itself if there is none"
        )
