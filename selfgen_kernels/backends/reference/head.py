"""Sampling from what an LM head makes of hidden states, specified: `sampling` of its logits, a part of them at a time.

The candidates of chunks, and of the shards of several ranks, are put together as `sampling` says.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

from selfgen_kernels.backends.reference.sampling import (
    candidates,
    choose,
    is_self_of,
    log_prob,
    mix,
    scaled_and_filtered,
)
from selfgen_kernels.call import GROUP_SIZE, Candidates, Head, Mask, Mixed, Sampling, in_rows, unscaled
from selfgen_kernels.ops import in_records

WORKSPACE, FILTER_WORKSPACE = 32, 64
"""Bytes that a logit takes at most while it is drawn from, with its copies; the second where filters sort and sum it in
64 bits. `linear_sample_mix` works on as many at a time as fit into an eighth of all logits in the head's dtype;
`linear_reference_log_prob`, which keeps 8 bytes of each group of 64, on half of that."""


@in_records
def linear_sample_mix(head: Head, reference: Tensor, how: Sampling) -> Mixed:
    """`sample_mix` of what a head makes of its hidden states, with logits of only some rows or some ids at a time."""
    how = in_rows(how)
    is_self = is_self_of(how.mask)  # [N]
    rows = is_self.nonzero()[:, 0]  # [S]
    drawn, valid = torch.empty_like(rows), torch.empty_like(rows, dtype=torch.bool)  # [S]
    # A filter looks at whole rows: one pass over a block of them finds the cutoffs, a second one draws.
    row_block = max(1, at_a_time(len(is_self), head, FILTER_WORKSPACE) if how.filtered else len(is_self))
    for part in torch.arange(len(rows), device=rows.device).split(row_block):  # [B]
        block = how.select(rows[part])
        chunks = head_chunks(of_rows(head, rows[part]), 0, block)
        drawn[part], valid[part] = choose(*candidates(chunks, 0, len(head.weight), block), block.greedy)
    return mix(reference, is_self, rows, drawn, valid)


@in_records
def linear_sample_shard(head: Head, first_id: int, how: Sampling) -> Candidates:
    """Values [N, 3, 3] and ids [N, 3] of a shard of the head, whose weight [V_shard, D] begins with `first_id`."""
    hidden, weight, how = head.hidden, head.weight, in_rows(how)
    rows = is_self_of(how.mask).nonzero()[:, 0]  # [S]
    values = torch.full((len(hidden), 3, 3), -torch.inf, device=hidden.device)
    ids = torch.full((len(hidden), 3), -1, device=hidden.device)
    how = how.select(rows)
    chunks = head_chunks(of_rows(head, rows), first_id, how)
    values[rows], ids[rows] = candidates(chunks, first_id, len(weight), how)
    return values, ids


@in_records
def combine_shards(values: Tensor, ids: Tensor, reference: Tensor, how: Sampling) -> Mixed:
    """Tokens, is_self and invalid [N] from the candidates of all shards, [R, N, 3, 3] and [R, N, 3]; any device."""
    how = in_rows(how)
    per_row = reference, how.threshold, how.sample_ids, how.positions, how.inv_temperature  # [N] each
    shapes = [list(x.shape) for x in (values, ids, *per_row)]
    ranks, rows = len(ids), len(reference)
    if shapes != [[ranks, rows, 3, 3], [ranks, rows, 3], *[[rows]] * 5]:
        raise ValueError(
            f"values, ids, reference, threshold, sample_ids, positions and inv_temperature have shapes {shapes}, "
            "expected [R, N, 3, 3], [R, N, 3] and [N] five times; stack the results of all ranks for the same rows"
        )
    drawn, valid = choose(values.transpose(0, 1).flatten(1, 2), ids.transpose(0, 1).flatten(1), how.greedy)
    is_self = is_self_of(how.mask)  # [N]
    return torch.where(is_self & valid, drawn, reference), is_self, is_self & ~valid


@in_records
def linear_reference_log_prob(head: Head, reference: Tensor, mask: Mask) -> Tensor:
    """`reference_log_prob` of what a head makes of its hidden states, chunk by chunk of the vocabulary; any device."""
    hidden, weight, bias, *_ = head
    mask = in_rows(mask)
    per_row = reference, mask.threshold, mask.sample_ids, mask.positions  # [N] each
    shapes = [None if x is None else list(x.shape) for x in (hidden, weight, bias, *per_row)]
    rows, size, vocab_size = len(hidden), hidden.shape[-1], len(weight)
    of_bias = None if bias is None else [vocab_size]
    if vocab_size == 0 or shapes != [[rows, size], [vocab_size, size], of_bias, *[[rows]] * 4]:
        raise ValueError(
            f"hidden, weight, bias, reference, threshold, sample_ids and positions have shapes {shapes}, expected "
            "[N, D], [V, D], None or [V], and [N] four times, V >= 1; pass the rows and the head of one call"
        )
    selected = is_self_of(mask).nonzero()[:, 0]  # [S]
    result = torch.zeros_like(reference, dtype=torch.float32)
    chunks = head_chunks(of_rows(head, selected), 0, unscaled(*mask).select(selected), 2 * WORKSPACE)
    result[selected] = log_prob(chunks, reference[selected], vocab_size)
    return result


def of_rows(head: Head, rows: Tensor) -> Head:
    """`head` with the hidden states of some rows [S] only."""
    return head._replace(hidden=head.hidden[rows])


def at_a_time(size: int, head: Head, workspace: int) -> int:
    """Of `size` rows or ids, how many may be drawn from together."""
    return size * head.weight.element_size() // (8 * workspace)


def head_chunks(head: Head, first_id: int, how: Sampling, workspace: int | None = None) -> Iterator[Tensor]:
    """z [N, C] of consecutive ids from `first_id`: chunk after chunk that ends with a group, or all if filtered."""
    workspace = WORKSPACE if workspace is None else workspace
    size = len(head.weight)
    chunk = size if how.filtered else max(1, at_a_time(size, head, workspace) // GROUP_SIZE) * GROUP_SIZE
    begin, end = 0, size if how.filtered else min(size, chunk - first_id % GROUP_SIZE)
    while begin < size:
        bias = None if head.bias is None else head.bias[begin:end]
        yield scaled_and_filtered(head_logits(head._replace(weight=head.weight[begin:end], bias=bias)), how)
        begin, end = end, min(size, end + chunk)


def head_logits(head: Head) -> Tensor:
    """fp32 [N, V]: what the head makes of its hidden states [N, D]."""
    hidden, weight, bias, softcap, logit_scale = head
    logits = linear(hidden, weight, bias).float().mul_(logit_scale)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)
