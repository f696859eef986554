"""Sample a self token where the Bernoulli mask says so, and keep the reference token elsewhere."""

import torch
from torch import Tensor

from selfgen_kernels.ops import OPS
from selfgen_kernels.ops.arguments import FLOATS, check_tensor
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


@define("sample_mix", f"({OPS['sample_mix'].parameters}) -> (Tensor tokens, Tensor is_self, Tensor invalid)")
def _(logits, reference, *sampling):
    return mixed_like(reference)


@define("reference_log_prob", f"({OPS['reference_log_prob'].parameters}) -> Tensor")
def _(logits, reference, *mask):
    return logits.new_empty((logits.shape[0],), dtype=torch.float32)


def sample_mix(
    logits: Tensor,
    reference: Tensor,
    self_prob: float | Tensor,
    *,
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
    """One step of a mixed context: with probability `self_prob` a self token, drawn from the model, else the reference
    token.

    Row i is drawn from softmax(logits[i] / temperature) after the filters, with noise that depends on nothing but
    (seed, sample_ids[i], positions[i]): the same row gives the same token in any batch. The draw is Gumbel-max in two
    levels, exact by the chain rule: a group of 64 consecutive ids, then one of them (`backends/reference/sampling.py`).
    The result is a function of the logits alone: the same bits from every backend, on any device. Rows that keep their
    reference cost nothing. Mixing: scheduled sampling, Bengio et al., arXiv 1506.03099.

    Args:
        logits: fp32, bf16, fp16 or fp64 [N, V], any strides, V >= 1; computed in fp32, no gradient flows.
        reference: int32 or int64 [N], the tokens of the reference answer, below `vocab_size` where that is given.
        self_prob: a probability, or floating [N], or bool [N], which is 0 or 1.
        seed: any 64-bit integer, signed or unsigned; or int64 [1] on the same device, which the kernel reads when it
            runs, so that a CUDA graph may be replayed with another one.
        sample_ids: int32 or int64 [N], any values.
        positions: int32 or int64 [N], 0 <= position < 2^32, counted from the first answer token.
        temperature: >= 0 and finite, or floating [N]; below 1e-5 is greedy (argmax, the lowest id wins a tie).
        top_k: >= 1, or integer [N]: keep the k best logits and what ties with the k-th.
        top_p: 0 < top_p <= 1, or floating [N]: keep the smallest set of best tokens with at least that probability, of
            probabilities rounded to whole multiples of 2^-34 of the best token's. For V < 2^29.
        min_p: 0 <= min_p <= 1, or floating [N]: keep tokens at least min_p times as likely as the best one.
            Below 2^-126 it drops nothing: a token that is as unlikely is never drawn.
            The filters apply in the order temperature, top_k, top_p, min_p; None leaves one out.
        min_reference_prob: 0 <= value <= 1, or floating [N]: a row that the mask selects is sampled only where
            softmax(logits)[reference], at temperature 1 and without filters, is at least that; elsewhere it keeps its
            reference, and is_self is false (confidence-aware scheduled sampling, Liu et al., arXiv 2107.10427).
            Where the logits hold NaN, +inf or nothing but -inf no confidence can be told, and the row is sampled as
            without this, so that it is counted as invalid. A probability that is the threshold but for rounding, four
            ulp of its logarithm, is enough. None is no such condition.
        vocab_size: 1 <= vocab_size <= V: only the ids below it exist, as where an embedding has padded rows; None: all
            V. The result is bit for bit that of logits[:, :vocab_size], on every backend: the other logits may hold
            anything, are never drawn, and count in no filter and no probability. An id below it that no token of the
            tokenizer has is still drawn.
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
    check_vocabulary(logits.shape[1], vocab_size)
    if vocab_size is not None:
        logits = logits[:, :vocab_size]  # a view, which kernels read with its strides
    reference = check_reference(reference, status, logits.shape[0], logits.device, vocab_size)
    how = sampling_of(logits, self_prob, seed, sample_ids, positions, temperature, top_k, top_p, min_p)
    if logits.dtype == torch.float64:
        logits = logits.float()
    given = logits.detach(), reference
    how = where_confident(how, min_reference_prob, torch.ops.selfgen.reference_log_prob, *given)
    tokens, is_self, invalid = for_seed(torch.ops.selfgen.sample_mix, how)(*given, *how)
    report(invalid, status)
    return tokens, is_self
