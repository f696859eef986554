"""The rows of a call that draws: who their random numbers belong to, how they are drawn, and what became of them.

What users hand to sampling and noise ops for each row, checked and packed into the records of `call.py`.
"""

from collections.abc import Callable
from math import log
from typing import Any, TypeGuard

import torch
from torch import Tensor

from selfgen_kernels.call import Mixed, Sampling
from selfgen_kernels.ops import SEED_TENSOR
from selfgen_kernels.ops.arguments import FLOATS, INTEGERS, check_number, check_tensor, values_visible
from selfgen_kernels.torch_internals import is_batchedtensor

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: argmax, no noise."""


def signed_seed(seed: int) -> int:
    """Any 64-bit integer, signed or unsigned, as the int64 of the same bits."""
    if isinstance(seed, bool) or not isinstance(seed, int | torch.SymInt):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}; pass int(seed)")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed={seed} does not fit in 64 bits; pass -2**63 <= seed < 2**64, such as seed % 2**64")
    return seed - 2**64 if seed >= 2**63 else seed


def check_seed(seed: int | Tensor, device: torch.device) -> int | Tensor:
    """`signed_seed` of a number; a tensor as it is, checked."""
    if not isinstance(seed, Tensor):
        return signed_seed(seed)
    check_tensor("seed", seed, (1,), (torch.int64,), device)
    return seed


def for_seed(op: Any, how: Sampling) -> Any:
    """The overload of the operator `op` that takes the seed of `how`."""
    return getattr(op, SEED_TENSOR) if isinstance(how.seed, Tensor) else op


def check_keys(sample_ids: Tensor, positions: Tensor, rows: int | str, device: torch.device | None) -> None:
    """Check the two tensors [N] that name each row's random numbers."""
    check_tensor("sample_ids", sample_ids, (rows,), INTEGERS, device)
    check_tensor("positions", positions, (sample_ids.shape[0],), INTEGERS, sample_ids.device)
    if values_visible(positions) and not ((positions >= 0) & (positions.long() < 2**32)).all():
        wrong = positions[(positions < 0) | (positions.long() >= 2**32)][0].item()
        raise ValueError(
            f"positions holds {wrong}, accepted are 0 <= position < 2**32; count from the first answer token"
        )


def per_row(
    name: str, value: Any, like: Tensor, dtype: torch.dtype, accepted: str, is_valid: Callable[[Any], Any]
) -> Tensor:
    """A number or a tensor [N] for `like` [N, ...], of `dtype`; `accepted` is `is_valid` in words."""
    whole = not dtype.is_floating_point
    if isinstance(value, Tensor):
        check_tensor(name, value, (like.shape[0],), INTEGERS if whole else FLOATS, like.device)
        if values_visible(value) and not is_valid(value).all():
            wrong = value[~is_valid(value)][0].item()
            raise ValueError(f"{name} holds {wrong}, accepted is {accepted}; correct that row")
        return value.to(dtype)
    check_number(name, value, accepted, is_valid, whole=whole, or_else="a tensor [N]")
    if _on_host(value):
        return _for_all_rows(value, like, dtype)
    return like.new_full((like.shape[0],), value, dtype=dtype)


def _on_host(value: Any) -> TypeGuard[float]:
    """Whether `value` is a number that Python computes with: no tensor, and no symbol of what traces the call."""
    return isinstance(value, int | float) and not torch.compiler.is_compiling()


def _for_all_rows(value: float, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A number for all rows of `like` [N, ...], as the records of `call.py` have it."""
    if like.device.type == "cpu":
        return like.new_full((like.shape[0],), value, dtype=dtype)
    return like.new_full((), value, dtype=dtype, device="cpu")  # fake if `like` is


def mask_threshold(self_prob: float | Tensor, like: Tensor) -> Tensor:
    """The probability p as int64 [N], or a number: a row whose uint32 random number is below p * 2^32 is a self row."""
    accepted, is_valid = "0 <= p <= 1", lambda p: (p >= 0) & (p <= 1)
    if _on_host(self_prob):
        check_number("self_prob", self_prob, accepted, is_valid, or_else="a tensor [N]")
        return _for_all_rows(round(self_prob * 2**32), like, torch.int64)
    if isinstance(self_prob, Tensor) and self_prob.dtype == torch.bool:
        check_tensor("self_prob", self_prob, (like.shape[0],), (torch.bool,), like.device)
        return self_prob * 2**32
    prob = per_row("self_prob", self_prob, like, torch.float64, accepted, is_valid)
    return (prob * 2**32).round().long()


def inverse_temperature(temperature: float | Tensor, like: Tensor) -> Tensor:
    """1 / temperature as fp32 [N], or a number; +inf is greedy, NaN a temperature that no one could accept."""
    accepted, is_valid = "a finite temperature >= 0 (0 is greedy)", lambda t: (t >= 0) & (t < float("inf"))
    if _on_host(temperature):
        check_number("temperature", temperature, accepted, is_valid, or_else="a tensor [N]")
        number = torch.inf if temperature < GREEDY_BELOW else max(1 / temperature, 2**-126)
        return _for_all_rows(number, like, torch.float32)
    value = per_row("temperature", temperature, like, torch.float64, accepted, is_valid)
    inverse = (1 / value).clamp(min=2**-126)  # 0 would make NaN of -inf
    return inverse.masked_fill(value < GREEDY_BELOW, torch.inf).masked_fill(value < 0, torch.nan).float()


def sampling_of(
    like: Tensor,
    self_prob: float | Tensor,
    seed: int | Tensor,
    sample_ids: Tensor,
    positions: Tensor,
    temperature: float | Tensor,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
) -> Sampling:
    """How the rows of `like` [N, ...] are drawn, checked."""
    check_keys(sample_ids, positions, like.shape[0], like.device)
    threshold = mask_threshold(self_prob, like)  # [N]
    keys = check_seed(seed, like.device), sample_ids, positions
    inv_temperature = inverse_temperature(temperature, like)  # [N]
    return Sampling(threshold, *keys, inv_temperature, *_filters(like, top_k, top_p, min_p))


def _filters(like: Tensor, top_k: Any, top_p: Any, min_p: Any) -> list[Tensor | None]:
    """The filters for `like` [N, ...], checked."""
    return [
        None if value is None else per_row(name, value, like, dtype, accepted, is_valid)
        for name, value, dtype, accepted, is_valid in (
            ("top_k", top_k, torch.int64, "an int >= 1", lambda k: k >= 1),
            ("top_p", top_p, torch.float64, "0 < top_p <= 1", lambda p: (p > 0) & (p <= 1)),
            ("min_p", min_p, torch.float64, "0 <= min_p <= 1", lambda p: (p >= 0) & (p <= 1)),
        )
    ]


def where_confident(how: Sampling, min_reference_prob: Any, log_prob_of: Any, *given: Any) -> Sampling:
    """`how` with a threshold of 0 where the operator `log_prob_of` finds the reference less likely than that."""
    if min_reference_prob is None:
        return how
    like, accepted, is_valid = given[0], "0 <= p <= 1", lambda p: (p >= 0) & (p <= 1)
    if _on_host(min_reference_prob):
        check_number("min_reference_prob", min_reference_prob, accepted, is_valid, or_else="a tensor [N]")
        least = log(min_reference_prob) if min_reference_prob > 0 else -torch.inf
        log_least = _for_all_rows(least, like, torch.float32)
    else:
        log_least = _log(per_row("min_reference_prob", min_reference_prob, like, torch.float64, accepted, is_valid))
    log_prob = for_seed(log_prob_of, how)(*given, *how.mask)  # [N]
    rounding = 4 * torch.finfo(torch.float32).eps * (1 + log_least.abs())  # what is as likely as asked for is enough
    return how._replace(threshold=how.threshold * (log_prob >= log_least - rounding))


_SQRT_HALF = 0x3FE6A09E667F3BCD  # bits of sqrt(1/2) in fp64


def _log(prob: Tensor) -> Tensor:
    """log fp32 of fp64 probabilities, by operations that every device rounds alike; NaN for what is none."""
    is_tiny = prob < 2.0**-1000
    bits = torch.where(is_tiny, prob * 2.0**60, prob).view(torch.int64)
    exponent = (bits - _SQRT_HALF) >> 52  # of the power of two that leaves sqrt(1/2) <= mantissa < sqrt(2)
    mantissa = (bits - (exponent << 52)).view(torch.float64)
    s = (mantissa - 1) / (mantissa + 1)  # log(mantissa) = 2 atanh(s), |s| < 0.18
    square, series = s * s, torch.zeros_like(s)
    for power in range(17, 0, -2):
        series = series * square + 1 / power
    result = 2 * s * series + (exponent.double() - 60 * is_tiny.double()) * log(2)
    return result.masked_fill(prob == 0, -torch.inf).masked_fill(~(prob >= 0), torch.nan).float()


def check_vocabulary(size: int, vocab_size: int | None = None) -> None:
    """Check that there are logits, `size` per row, and that they hold the `vocab_size` ids that exist."""
    if size == 0:
        raise ValueError("the vocabulary is empty (V = 0); pass logits or weight with V >= 1")
    if vocab_size is not None:
        check_number("vocab_size", vocab_size, "1 <= vocab_size <= V", lambda ids: 1 <= ids <= size, whole=True)


def check_reference(
    reference: Tensor, status: Tensor | None, rows: int, device: torch.device, vocab_size: int | None
) -> Tensor:
    """`reference` as int64 [N], checked, and `status` with it."""
    check_tensor("reference", reference, (rows,), INTEGERS, device)
    if vocab_size is not None and values_visible(reference) and not (reference < vocab_size).all():
        wrong = reference[reference >= vocab_size][0].item()
        raise ValueError(
            f"reference holds {wrong}, which does not exist with vocab_size={vocab_size}; pass ids below vocab_size"
        )
    if status is not None:
        one_element = (1,) if isinstance(status, Tensor) and status.dim() else ()
        check_tensor("status", status, one_element, (torch.int64,), device)
    return reference.long()


def report(invalid: Tensor, status: Tensor | None) -> None:
    """Add the number of invalid rows to `status`."""
    if status is not None:
        if is_batchedtensor(invalid) and not is_batchedtensor(status):
            raise ValueError(
                "status is one tensor for all the calls that torch.func.vmap makes; give each its own, by a status "
                "with the batch dimension and in_dims, or leave it out"
            )
        status.add_(invalid.sum())


def mixed_like(reference: Tensor) -> Mixed:
    """Tokens, is_self and invalid as tensors without values: what fake kernels give for a reference [N]."""
    is_self, invalid = (torch.empty_like(reference, dtype=torch.bool) for _ in range(2))
    return torch.empty_like(reference), is_self, invalid
