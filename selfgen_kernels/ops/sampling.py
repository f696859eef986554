"""Sample the model's own token where the Bernoulli mask says so, and keep the reference token elsewhere."""

from typing import Any

import torch
from torch import Tensor

from selfgen_kernels.ops import batching
from selfgen_kernels.ops.arguments import (
    FLOATS,
    INTEGERS,
    check_factor,
    check_keys,
    check_number,
    check_softcap,
    check_tensor,
    inverse_temperature,
    mask_threshold,
    per_row,
    signed_seed,
)
from selfgen_kernels.torch_internals import autocast_dtype, is_batchedtensor

_SAMPLING = (
    "Tensor reference, Tensor threshold, SymInt seed, Tensor sample_ids, Tensor positions, Tensor inv_temperature, "
    "Tensor? top_k, Tensor? top_p, Tensor? min_p) -> (Tensor tokens, Tensor is_self, Tensor invalid)"
)
torch.library.define("selfgen::sample_mix", f"(Tensor logits, {_SAMPLING}")
_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, float? softcap, float logit_scale"
torch.library.define("selfgen::linear_sample_mix", f"({_HEAD}, {_SAMPLING}")
torch.library.define(
    "selfgen::linear_sample_shard",
    f"({_HEAD}, SymInt first_id, Tensor threshold, SymInt seed, Tensor sample_ids, Tensor positions, "
    "Tensor inv_temperature) -> (Tensor values, Tensor ids)",
)
torch.library.define(
    "selfgen::combine_shards",
    "(Tensor values, Tensor ids, Tensor reference, Tensor threshold, SymInt seed, Tensor sample_ids, Tensor positions, "
    "Tensor inv_temperature) -> (Tensor tokens, Tensor is_self, Tensor invalid)",
)

_KEYS = "Tensor reference, Tensor threshold, SymInt seed, Tensor sample_ids, Tensor positions) -> Tensor"
torch.library.define("selfgen::reference_log_prob", f"(Tensor logits, {_KEYS}")
torch.library.define("selfgen::linear_reference_log_prob", f"({_HEAD}, {_KEYS}")


@torch.library.register_fake("selfgen::sample_mix")
def _(logits, reference, *sampling):
    return torch.empty_like(reference), _empty_bool(reference), _empty_bool(reference)


@torch.library.register_fake("selfgen::linear_sample_mix")
def _(hidden, weight, bias, softcap, logit_scale, reference, *sampling):
    return torch.empty_like(reference), _empty_bool(reference), _empty_bool(reference)


@torch.library.register_fake("selfgen::linear_sample_shard")
def _(hidden, *rest):
    n = hidden.shape[0]
    return hidden.new_empty((n, 3, 3), dtype=torch.float32), hidden.new_empty((n, 3), dtype=torch.int64)


@torch.library.register_fake("selfgen::combine_shards")
def _(values, ids, reference, *sampling):
    return torch.empty_like(reference), _empty_bool(reference), _empty_bool(reference)


@torch.library.register_fake("selfgen::reference_log_prob")
def _(logits, reference, *keys):
    return logits.new_empty((logits.shape[0],), dtype=torch.float32)


@torch.library.register_fake("selfgen::linear_reference_log_prob")
def _(hidden, *rest):
    return hidden.new_empty((hidden.shape[0],), dtype=torch.float32)


batching.register("sample_mix", "linear_sample_mix", "linear_sample_shard", "combine_shards")
batching.register("reference_log_prob", "linear_reference_log_prob")


def _empty_bool(like: Tensor) -> Tensor:
    return torch.empty_like(like, dtype=torch.bool)


def sample_mix(
    logits: Tensor,
    reference: Tensor,
    self_prob: float | Tensor,
    *,
    seed: int,
    sample_ids: Tensor,
    positions: Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    min_reference_prob: float | Tensor | None = None,
    status: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of a mixed context: the model's own token with probability `self_prob`, else the reference token.

    Row i is drawn from softmax(logits[i] / temperature) after the filters, with noise that depends on nothing but
    (seed, sample_ids[i], positions[i]): the same row gives the same token in any batch. The draw is Gumbel-max in two
    levels, exact by the chain rule: a group of 64 consecutive ids, then one of them (`backends/reference/sampling.py`).
    Rows that keep their reference cost nothing. Mixing: scheduled sampling, Bengio et al., arXiv 1506.03099.

    Args:
        logits: fp32, bf16, fp16 or fp64 [N, V], any strides, V >= 1; computed in fp32, no gradient flows.
        reference: int32 or int64 [N], the tokens of the reference answer.
        self_prob: a probability, or floating [N].
        seed: any 64-bit integer, signed or unsigned.
        sample_ids: int32 or int64 [N], any values.
        positions: int32 or int64 [N], 0 <= position < 2^32, counted from the first answer token.
        temperature: >= 0 and finite, or floating [N]; below 1e-5 is greedy (argmax, the lowest id wins a tie).
        top_k: >= 1, or integer [N]: keep the k best logits and what ties with the k-th.
        top_p: 0 < top_p <= 1, or floating [N]: keep the smallest set of best tokens with at least that probability.
        min_p: 0 <= min_p <= 1, or floating [N]: keep tokens at least min_p times as likely as the best one.
            The filters apply in the order temperature, top_k, top_p, min_p; None leaves one out.
        min_reference_prob: 0 <= value <= 1, or floating [N]: a row that the mask selects is sampled only where
            softmax(logits)[reference], at temperature 1 and without filters, is at least that; elsewhere it keeps its
            reference, and is_self is false (confidence-aware scheduled sampling, Liu et al., arXiv 2107.10427).
            Where the logits hold NaN, +inf or nothing but -inf no confidence can be told, and the row is sampled as
            without this, so that it is counted as invalid. A probability that is the threshold but for rounding, four
            ulp of its logarithm, is enough; where it is less by just that, backends may differ. None is no such
            condition.
        status: int64 with one element on the same device; the number of invalid rows is added to it. A row is invalid
            if it is to be sampled and its scaled logits hold NaN, +inf, or nothing but -inf; it gets its reference.

    Returns:
        tokens int64 [N], is_self bool [N]. is_self is the Bernoulli mask, for invalid rows too, less the rows that
            `min_reference_prob` takes away.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a value, shape or device outside of the above (values inside GPU tensors are not looked at).

    Example:
        >>> import torch
        >>> from selfgen_kernels import sample_mix
        >>> logits = torch.tensor([[0.0, 5.0, 1.0], [9.0, 0.0, 0.0]])  # [2, 3]
        >>> keys = dict(seed=0, sample_ids=torch.tensor([3, 3]), positions=torch.tensor([0, 1]))
        >>> tokens, is_self = sample_mix(logits, torch.tensor([2, 2]), 1.0, temperature=0.0, **keys)
        >>> tokens.tolist(), is_self.tolist()
        ([1, 0], [True, True])
    """
    check_tensor("logits", logits, ("N", "V"), FLOATS, None)
    _check_vocabulary(logits.shape[1])
    reference = _check_reference(reference, status, logits.shape[0], logits.device)
    rows = _row_arguments(logits, self_prob, seed, sample_ids, positions, temperature)
    filters = _filters(logits, top_k, top_p, min_p)
    if logits.dtype == torch.float64:
        logits = logits.float()
    given = logits.detach(), reference
    rows = _where_confident(rows, min_reference_prob, torch.ops.selfgen.reference_log_prob, *given)
    tokens, is_self, invalid = torch.ops.selfgen.sample_mix(*given, *rows, *filters)
    _report(invalid, status)
    return tokens, is_self


def linear_sample_mix(
    hidden: Tensor,
    weight: Tensor,
    reference: Tensor,
    self_prob: float | Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    seed: int,
    sample_ids: Tensor,
    positions: Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    min_reference_prob: float | Tensor | None = None,
    status: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`sample_mix` of `hidden @ weight.T + bias`, without the logits [N, V] ever in memory as a whole.

    Only rows that the mask selects are multiplied. Without filters the vocabulary passes by in chunks; with a filter,
    rows do, one or more at a time. The C++ kernel on the CPU lets the vocabulary pass by with filters, too, where what
    can matter of the rows fits into memory: that is at most 1/8 of the bytes of all logits in their dtype, and beside
    them 1/32 of an fp32 row a thread; one row is more than that for N < 8, and for N < 16 in bf16 and fp16 with a
    softcap or a scale, after which logits are fp32. The torch reference keeps to 1/8 from 32,000 ids on, but one row
    with its filters takes up to 64 bytes an id, which is more for N < 128 in fp32.

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
        min_reference_prob: as in `sample_mix`; a pass of the head of its own, in which the logits are in memory no more
            than in the draw's: their maximum and sum of exponentials are, one each for at least 64 ids.

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
    head = _head_arguments(hidden, weight, bias, softcap, logit_scale)
    reference = _check_reference(reference, status, hidden.shape[0], hidden.device)
    rows = _row_arguments(hidden, self_prob, seed, sample_ids, positions, temperature)
    filters = _filters(hidden, top_k, top_p, min_p)
    given = *head, reference
    rows = _where_confident(rows, min_reference_prob, torch.ops.selfgen.linear_reference_log_prob, *given)
    tokens, is_self, invalid = torch.ops.selfgen.linear_sample_mix(*given, *rows, *filters)
    _report(invalid, status)
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
    seed: int,
    sample_ids: Tensor,
    positions: Tensor,
    temperature: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:
    """One rank's part of `linear_sample_mix` when the LM head is split by vocabulary (tensor parallelism).

    Each rank calls this with its shard, all ranks gather the two small results (60 bytes a row and rank) in place of
    the logits, and each calls `combine_shards`. The token is the one that a single rank with the whole head draws, up
    to rounding at near ties; shards may have any sizes and begin and end anywhere. Filters are not offered: a cutoff
    needs the whole row. The split is Megatron-LM's (Shoeybi et al., arXiv 1909.08053, section 3); what shards have to
    exchange is small as a maximum of Gumbel-perturbed logits is one of its parts' maxima (Maddison et al., "A*
    Sampling", arXiv 1411.0030).

    Args:
        hidden: fp32, bf16, fp16 or fp64 [N, D], the same on every rank.
        weight: same dtype [V_shard, D]: the head of the ids first_id .. first_id + V_shard - 1, V_shard >= 1.
        first_id: >= 0, the id of the shard's first row.
        bias: same dtype [V_shard], or None.
        self_prob, softcap, logit_scale, seed, sample_ids, positions, temperature: as in `linear_sample_mix`.

    Returns:
        values fp32 [N, 3, 3], ids int64 [N, 3]: up to three candidates a row, whose meaning is in
        `backends/reference/sampling.py`; ids are -1 where there is none and in rows that keep their reference.

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
    head = _head_arguments(hidden, weight, bias, softcap, logit_scale)
    check_number(
        "first_id", first_id, "0 <= first_id < 2**31", lambda i: 0 <= i < 2**31, whole=True, or_else="a SymInt"
    )
    rows = _row_arguments(hidden, self_prob, seed, sample_ids, positions, temperature)
    return torch.ops.selfgen.linear_sample_shard(*head, first_id, *rows)


def combine_shards(
    values: Tensor,
    ids: Tensor,
    reference: Tensor,
    self_prob: float | Tensor,
    *,
    seed: int,
    sample_ids: Tensor,
    positions: Tensor,
    temperature: float | Tensor = 1.0,
    status: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The tokens from the gathered results of `linear_sample_shard` on R ranks, the same on every rank.

    Gumbel-max over the parts of a vocabulary: the best of the parts' best (Maddison et al., "A* Sampling", arXiv
    1411.0030). The torch reference on every device, by design: it handles 12 numbers a row and rank.

    Args:
        values: fp32 [R, N, 3, 3], the ranks' values, in any order of the ranks, R >= 1.
        ids: int64 [R, N, 3], their ids in the same order.
        reference, status: as in `sample_mix`.
        self_prob, seed, sample_ids, positions, temperature: what the shards were called with.

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
    reference = _check_reference(reference, status, ids.shape[1], ids.device)
    rows = _row_arguments(reference, self_prob, seed, sample_ids, positions, temperature)
    tokens, is_self, invalid = torch.ops.selfgen.combine_shards(values, ids, reference, *rows)
    _report(invalid, status)
    return tokens, is_self


def _head_arguments(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> tuple[Any, ...]:
    """The arguments of a head, checked and in the order of their schema."""
    hidden, weight, bias = (_autocast(tensor) for tensor in (hidden, weight, bias))
    check_tensor("hidden", hidden, ("N", "D"), FLOATS, None)
    check_tensor("weight", weight, ("V", hidden.shape[1]), (hidden.dtype,), hidden.device)
    _check_vocabulary(weight.shape[0])
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],), (hidden.dtype,), hidden.device)
        bias = bias.detach()
    check_softcap(softcap)
    check_factor("logit_scale", logit_scale, or_else="an int")
    return hidden.detach(), weight.detach(), bias, softcap, float(logit_scale)


def _autocast(tensor: Any) -> Any:
    """What torch.nn.functional.linear makes of an argument under torch.autocast: fp64 stays, other floats are cast."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    dtype = autocast_dtype(tensor.device.type)
    return tensor if dtype is None else tensor.to(dtype)


def _check_vocabulary(vocab_size: int) -> None:
    if vocab_size == 0:
        raise ValueError("the vocabulary is empty (V = 0); pass logits or weight with V >= 1")


def _row_arguments(
    like: Tensor, self_prob: float | Tensor, seed: int, sample_ids: Tensor, positions: Tensor, temperature: Any
) -> tuple[Any, ...]:
    """What every op needs to know about its rows, checked against `like` [N, ...] and in the order of the schemas."""
    check_keys(sample_ids, positions, like.shape[0], like.device)
    threshold = mask_threshold(self_prob, like)  # [N]
    return threshold, signed_seed(seed), sample_ids, positions, inverse_temperature(temperature, like)


def _filters(like: Tensor, top_k: Any, top_p: Any, min_p: Any) -> list[Tensor | None]:
    """The filters as tensors [N] beside `like` [N, ...], checked."""
    return [
        None if value is None else per_row(name, value, like, dtype, accepted, is_valid)
        for name, value, dtype, accepted, is_valid in (
            ("top_k", top_k, torch.int64, "an int >= 1", lambda k: k >= 1),
            ("top_p", top_p, torch.float64, "0 < top_p <= 1", lambda p: (p > 0) & (p <= 1)),
            ("min_p", min_p, torch.float64, "0 <= min_p <= 1", lambda p: (p >= 0) & (p <= 1)),
        )
    ]


def _where_confident(rows: tuple[Any, ...], min_reference_prob: Any, log_prob_of: Any, *given: Any) -> tuple[Any, ...]:
    """`rows` with a threshold of 0 where `log_prob_of` the `given` finds the reference less likely than that."""
    if min_reference_prob is None:
        return rows
    least = per_row(
        "min_reference_prob", min_reference_prob, given[0], torch.float64, "0 <= p <= 1", lambda p: (p >= 0) & (p <= 1)
    )
    threshold, *others, inv_temperature = rows
    log_prob = log_prob_of(*given, threshold, *others)  # [N]
    log_least = least.log().float()
    rounding = 4 * torch.finfo(torch.float32).eps * (1 + log_least.abs())  # what is as likely as asked for is enough
    return threshold.masked_fill(~(log_prob >= log_least - rounding), 0), *others, inv_temperature


def _check_reference(reference: Tensor, status: Tensor | None, rows: int, device: torch.device) -> Tensor:
    """`reference` as int64 [N], checked, and `status` with it."""
    check_tensor("reference", reference, (rows,), INTEGERS, device)
    if status is not None:
        one_element = (1,) if isinstance(status, Tensor) and status.dim() else ()
        check_tensor("status", status, one_element, (torch.int64,), device)
    return reference.long()


def _report(invalid: Tensor, status: Tensor | None) -> None:
    if status is not None:
        if is_batchedtensor(invalid) and not is_batchedtensor(status):
            raise ValueError(
                "status is one tensor for all the calls that torch.func.vmap makes; give each its own, by a status "
                "with the batch dimension and in_dims, or leave it out"
            )
        status.add_(invalid.sum())
