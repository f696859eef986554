"""`sample_mix` of what an LM head makes of hidden states, on one rank or on several that hold a part of it each."""

import torch
from torch import Tensor

from selfgen_kernels.call import Head
from selfgen_kernels.ops import OPS
from selfgen_kernels.ops.arguments import FLOATS, autocast, check_factor, check_number, check_softcap, check_tensor
from selfgen_kernels.ops.registration import define
from selfgen_kernels.ops.rows import (
    check_reference,
    check_vocabulary,
    for_seed,
    mixed_like,
    report,
    sampling_of,
    where_confident,
)

_MIXED = "(Tensor tokens, Tensor is_self, Tensor invalid)"


@define("linear_sample_mix", f"({OPS['linear_sample_mix'].parameters}) -> {_MIXED}")
def _(hidden, weight, bias, softcap, logit_scale, reference, *sampling):
    return mixed_like(reference)


@define("linear_sample_shard", f"({OPS['linear_sample_shard'].parameters}) -> (Tensor values, Tensor ids)")
def _(hidden, *rest):
    n = hidden.shape[0]
    return hidden.new_empty((n, 3, 3), dtype=torch.float32), hidden.new_empty((n, 3), dtype=torch.int64)


@define("combine_shards", f"({OPS['combine_shards'].parameters}) -> {_MIXED}")
def _(values, ids, reference, *draw):
    return mixed_like(reference)


@define("linear_reference_log_prob", f"({OPS['linear_reference_log_prob'].parameters}) -> Tensor")
def _(hidden, *rest):
    return hidden.new_empty((hidden.shape[0],), dtype=torch.float32)


def linear_sample_mix(
    hidden: Tensor,
    weight: Tensor,
    reference: Tensor,
    self_prob: float | Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    seed: int | Tensor,
    sample_ids: Tensor,
    positions: Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    min_reference_prob: float | Tensor | None = None,
    vocab_size: int | None = None,
    status: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`sample_mix` of `hidden @ weight.T + bias`, without the logits [N, V] ever in memory as a whole.

    Only rows that the mask selects are multiplied, but for more than 64 rows without filters on a GPU: torch multiplies
    all of them. Without filters the vocabulary passes by in chunks; with a filter, rows do, one or more at a time. The
    C++ kernel on the CPU lets the vocabulary pass by with filters, too, where what can matter of the rows fits into
    memory: that is at most 1/8 of the bytes of all logits in their dtype, and beside them 1/32 of an fp32 row per
    thread; one row is more than that for N < 8, and for N < 16 in bf16 and fp16 with a softcap or a scale, after which
    logits are fp32. The torch reference keeps to 1/8 from 32,000 ids on, but one row with its filters takes up to 64
    bytes per id, which is more for N < 128 in fp32.

    The tokens are those of `sample_mix` on the same logits; the product may round differently than one over the whole
    vocabulary, which can decide between near ties.

    Args:
        hidden: fp32, bf16, fp16 or fp64 [N, D], the input of the LM head.
        weight: same dtype [V, D], the LM head, V >= 1. Under torch.autocast the two and `bias` are cast as in F.linear.
            A DTensor is refused: gather it with .full_tensor(), or use `linear_sample_shard`.
        bias: same dtype [V], or None.
        softcap: > 0 in fp32: logits become softcap * tanh(logits / softcap), in fp32, as in Gemma 2 (arXiv 2408.00118).
        logit_scale: factor on the logits, finite in fp32, before the softcap, as in Cohere's models (`logit_scale`)
            and, as its inverse, in Granite (`logits_scaling`).
        reference, self_prob, seed, sample_ids, positions, temperature, top_k, top_p, min_p, status: as in `sample_mix`.
        min_reference_prob: as in `sample_mix`; a second pass of the head, in which the logits are in memory no more
            than in the draw's; of each group of 64 ids, its maximum and mass are, in 8 bytes.
        vocab_size: as in `sample_mix`; the result is that of weight[:vocab_size] and bias[:vocab_size], and the rest of
            the head is not multiplied.

    Returns:
        tokens int64 [N], is_self bool [N].

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a value, shape or device outside of the above (values inside GPU tensors are not looked at).

    Example:
        >>> import torch
        >>> from selfgen_kernels import linear_sample_mix, sample_mix
        >>> hidden, weight = torch.randn(2, 8), torch.randn(1000, 8)
        >>> keys = dict(seed=0, sample_ids=torch.tensor([3, 3]), positions=torch.tensor([0, 1]))
        >>> tokens, _ = linear_sample_mix(hidden, weight, torch.tensor([2, 2]), 1.0, **keys)  # [2]
        >>> torch.equal(tokens, sample_mix(hidden @ weight.T, torch.tensor([2, 2]), 1.0, **keys)[0])
        True
    """
    head = _head_of(hidden, weight, bias, softcap, logit_scale)
    check_vocabulary(head.weight.shape[0], vocab_size)
    if vocab_size is not None:
        head = _below(vocab_size, head)
    reference = check_reference(reference, status, hidden.shape[0], hidden.device, vocab_size)
    how = sampling_of(hidden, self_prob, seed, sample_ids, positions, temperature, top_k, top_p, min_p)
    given = *head, reference
    how = where_confident(how, min_reference_prob, torch.ops.selfgen.linear_reference_log_prob, *given)
    tokens, is_self, invalid = for_seed(torch.ops.selfgen.linear_sample_mix, how)(*given, *how)
    report(invalid, status)
    return tokens, is_self


def linear_sample_shard(
    hidden: Tensor,
    weight: Tensor,
    self_prob: float | Tensor,
    *,
    first_id: int,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    seed: int | Tensor,
    sample_ids: Tensor,
    positions: Tensor,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """One rank's part of `linear_sample_mix` when the LM head is split by vocabulary (tensor parallelism).

    Each rank calls this with its shard, all ranks gather the two small results (60 bytes per row and rank) in place of
    the logits, and each calls `combine_shards`. The token is the one that a single rank with the whole head draws, up
    to rounding at near ties: of its products, and of a group of 64 ids that two shards share, which is summed up in two
    parts. Shards may have any sizes and begin and end anywhere. Filters are not offered: a cutoff
    needs the whole row. The split is Megatron-LM's (Shoeybi et al., arXiv 1909.08053, section 3); what shards have to
    exchange is small as a maximum of Gumbel-perturbed logits is one of its parts' maxima (Maddison et al., "A*
    Sampling", arXiv 1411.0030).

    Args:
        hidden: fp32, bf16, fp16 or fp64 [N, D], the same on every rank.
        weight: same dtype [V_shard, D]: the head of the ids first_id .. first_id + V_shard - 1, V_shard >= 1.
        first_id: >= 0, the id of the shard's first row.
        bias: same dtype [V_shard], or None.
        self_prob, softcap, logit_scale, seed, sample_ids, positions, temperature: as in `linear_sample_mix`.
        vocab_size: >= 1, of the whole head: only the ids below it exist, the same number on every rank; None: all. A
            shard of ids that don't exist has no candidates.

    Returns:
        values fp32 [N, 3, 3], ids int64 [N, 3]: up to three candidates per row, whose meaning is in
        `call.py`; ids are -1 where there is none and in rows that keep their reference.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a value, shape or device outside of the above (values inside GPU tensors are not looked at).

    Example:
        >>> import torch
        >>> from selfgen_kernels import combine_shards, linear_sample_mix, linear_sample_shard
        >>> hidden, weight, reference = torch.randn(2, 8), torch.randn(1000, 8), torch.tensor([2, 2])
        >>> keys = dict(seed=0, sample_ids=torch.tensor([3, 3]), positions=torch.tensor([0, 1]))
        >>> ranks = [(0, weight[:300]), (300, weight[300:])]
        >>> parts = [linear_sample_shard(hidden, shard, 0.5, first_id=first, **keys) for first, shard in ranks]
        >>> values, ids = (torch.stack(part) for part in zip(*parts))  # what all_gather would give
        >>> tokens, _ = combine_shards(values, ids, reference, 0.5, **keys)
        >>> torch.equal(tokens, linear_sample_mix(hidden, weight, reference, 0.5, **keys)[0])
        True
    """
    head = _head_of(hidden, weight, bias, softcap, logit_scale)
    check_number(
        "first_id", first_id, "0 <= first_id < 2**31", lambda i: 0 <= i < 2**31, whole=True, or_else="a SymInt"
    )
    how = sampling_of(hidden, self_prob, seed, sample_ids, positions, temperature)
    if vocab_size is not None:
        _check_vocab_size(vocab_size)
        if vocab_size <= first_id:
            n = hidden.shape[0]
            values = hidden.new_full((n, 3, 3), -torch.inf, dtype=torch.float32)
            return values, torch.full_like(values[:, :, 0], -1, dtype=torch.int64)
        head = _below(vocab_size - first_id, head)
    return for_seed(torch.ops.selfgen.linear_sample_shard, how)(*head, first_id, *how.draw)


def combine_shards(
    values: Tensor,
    ids: Tensor,
    reference: Tensor,
    self_prob: float | Tensor,
    *,
    seed: int | Tensor,
    sample_ids: Tensor,
    positions: Tensor,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    status: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The tokens from the gathered results of `linear_sample_shard` on R ranks, the same on every rank.

    Gumbel-max over the parts of a vocabulary: the best of the parts' best (Maddison et al., "A* Sampling", arXiv
    1411.0030). The torch reference on every device, by design: it handles 12 numbers per row and rank.

    Args:
        values: fp32 [R, N, 3, 3], the ranks' values, in any order of the ranks, R >= 1.
        ids: int64 [R, N, 3], their ids in the same order.
        reference, status: as in `sample_mix`.
        self_prob, seed, sample_ids, positions, temperature, vocab_size: what the shards were called with.

    Returns:
        tokens int64 [N], is_self bool [N], as `linear_sample_mix` returns them.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a value, shape or device outside of the above (values inside GPU tensors are not looked at).

    Example:
        >>> import torch
        >>> from selfgen_kernels import combine_shards, linear_sample_shard
        >>> weight = torch.tensor([[0.0], [2.0], [9.0], [1.0]])  # [V, D], of which two ranks hold half each
        >>> keys = dict(seed=0, sample_ids=torch.tensor([3]), positions=torch.tensor([0]), temperature=0.0)
        >>> parts = [linear_sample_shard(torch.ones(1, 1), weight[i : i + 2], 1.0, first_id=i, **keys) for i in (0, 2)]
        >>> values, ids = (torch.stack(part) for part in zip(*parts))  # [2, 1, 3, 3] and [2, 1, 3]
        >>> combine_shards(values, ids, torch.tensor([0]), 1.0, **keys)
        (tensor([2]), tensor([True]))
    """
    check_tensor("ids", ids, ("R", "N", 3), (torch.int64,), None)
    check_tensor("values", values, (*ids.shape, 3), (torch.float32,), ids.device)
    if ids.shape[0] == 0:
        raise ValueError("ids and values are of no rank (R = 0); stack the results of at least one")
    if vocab_size is not None:
        _check_vocab_size(vocab_size)
    reference = check_reference(reference, status, ids.shape[1], ids.device, vocab_size)
    how = sampling_of(reference, self_prob, seed, sample_ids, positions, temperature)
    tokens, is_self, invalid = for_seed(torch.ops.selfgen.combine_shards, how)(values, ids, reference, *how.draw)
    report(invalid, status)
    return tokens, is_self


def _head_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float) -> Head:
    """A head, checked."""
    hidden, weight, bias = (autocast(tensor) for tensor in (hidden, weight, bias))
    check_tensor("hidden", hidden, ("N", "D"), FLOATS, None)
    check_tensor("weight", weight, ("V", hidden.shape[1]), (hidden.dtype,), hidden.device)
    check_vocabulary(weight.shape[0])
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],), (hidden.dtype,), hidden.device)
        bias = bias.detach()
    check_softcap(softcap)
    check_factor("logit_scale", logit_scale, or_else="an int")
    return Head(hidden.detach(), weight.detach(), bias, softcap, float(logit_scale))


def _below(end: int, head: Head) -> Head:
    """The part of the head for its first `end` ids, or all of it if it has fewer."""
    return head._replace(weight=head.weight[:end], bias=None if head.bias is None else head.bias[:end])


def _check_vocab_size(vocab_size: int) -> None:
    """Check the size of a vocabulary of which nobody here has the whole head."""
    check_number("vocab_size", vocab_size, "vocab_size >= 1", lambda ids: ids >= 1, whole=True)
