"""The random numbers: Gumbel noise and the Bernoulli mask, pure functions of (seed, sample id, position)."""

import torch
from torch import Tensor

from selfgen_kernels.ops.registration import define
from selfgen_kernels.ops.rows import check_keys, mask_threshold, signed_seed


@define("gumbel_noise", "(SymInt seed, Tensor sample_ids, Tensor positions, SymInt size, int stream) -> Tensor")
def _(seed, sample_ids, positions, size, stream):
    return sample_ids.new_empty((sample_ids.shape[0], size), dtype=torch.float32)


@define("self_mask", "(SymInt seed, Tensor sample_ids, Tensor positions, Tensor threshold) -> Tensor")
def _(seed, sample_ids, positions, threshold):
    return sample_ids.new_empty((sample_ids.shape[0],), dtype=torch.bool)


def gumbel_noise(
    seed: int,
    sample_ids: Tensor,
    positions: Tensor,
    size: int,
    *,
    stream: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard Gumbel noise, `size` numbers for each (sample id, position), the same on every device and in any batch.

    The noise of sampling by Gumbel-max: `sample_mix` takes one number per vocabulary group from stream 1 and one per
    token of the winning group from stream 2. The generator is specified in `backends/reference/philox.py`
    (Philox4x32-10: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).

    Args:
        seed: any 64-bit integer, signed or unsigned.
        sample_ids: int32 or int64 [N], any values.
        positions: int32 or int64 [N], 0 <= position < 2^32.
        size: numbers per row, 0 <= size <= 2^30.
        stream: which of the 16 independent streams; 0 is the mask's, 1 the groups', 2 the tokens'.
        device: where to make the noise; where `sample_ids` are if None.

    Returns:
        fp32 [N, size], finite, within (-2.82, 22.88), the same bits from every backend.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a value, length or device outside of the above.

    Example:
        >>> import torch
        >>> from selfgen_kernels import gumbel_noise
        >>> ids, positions = torch.tensor([7, 7]), torch.tensor([0, 1])
        >>> noise = gumbel_noise(0, ids, positions, 4, stream=1)  # [2, 4]
        >>> torch.equal(noise[1:], gumbel_noise(0, ids[1:], positions[1:], 4, stream=1))
        True
    """
    check_keys(sample_ids, positions, "N", None)
    _check_range("size", size, 0, 2**30)
    _check_range("stream", stream, 0, 15)
    if device is not None:
        sample_ids, positions = sample_ids.to(device), positions.to(device)
    return torch.ops.selfgen.gumbel_noise(signed_seed(seed), sample_ids, positions, size, stream)


def self_mask(seed: int, sample_ids: Tensor, positions: Tensor, self_prob: float | Tensor) -> Tensor:
    """Which positions take a self token: independent Bernoulli(self_prob) draws, the m_t of the mixed context.

    From scheduled sampling (Bengio et al., arXiv 1506.03099), with Philox stream 0 as the only source of chance.

    Args:
        seed: any 64-bit integer, signed or unsigned.
        sample_ids: int32 or int64 [N], any values.
        positions: int32 or int64 [N], 0 <= position < 2^32.
        self_prob: a probability, or floating [N] with one per row, or bool [N]. 0 is never, 1 always; the resolution is
            2^-32.

    Returns:
        bool [N], on the device of `sample_ids`.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a value, length or device outside of the above.

    Example:
        >>> import torch
        >>> from selfgen_kernels import self_mask
        >>> positions = torch.arange(1000)
        >>> mask = self_mask(0, torch.zeros_like(positions), positions, 0.25)  # [1000]
        >>> 200 < mask.sum().item() < 300
        True
    """
    check_keys(sample_ids, positions, "N", None)
    threshold = mask_threshold(self_prob, sample_ids)  # [N]
    return torch.ops.selfgen.self_mask(signed_seed(seed), sample_ids, positions, threshold)


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}; pass {low} <= {name} <= {high}")
    if not low <= value <= high:
        raise ValueError(f"{name}={value} is not accepted; pass {low} <= {name} <= {high}")
