"""From logits to z: temperature, then top_k, top_p and min_p, each as one number per row, the cutoff of what stays.

All three keep "everything at least as likely as some token", so they keep or drop equal logits together, and a backend
needs no filtered copy of the logits: it compares z with `filter_cutoff`. Order and meaning are those of transformers'
logits processors: temperature, top_k (Fan et al., arXiv 1805.04833), top_p (Holtzman et al., arXiv 1904.09751), min_p
(Nguyen et al., arXiv 2407.01082). The best token always stays, and a greedy row knows no filter.

top_p sums weights, probabilities that `elementary` rounds to whole multiples of 2^-34 of the best token's: the cutoff
is the smallest z such that the weights of all larger ones come to less than top_p of all, compared in fp64. min_p below
2^-126 drops nothing.
"""

import torch
from torch import Tensor

from selfgen_kernels.backends.reference.elementary import exp_, log_of_share, weights
from selfgen_kernels.call import Sampling


def scaled(logits: Tensor, inv_temperature: Tensor) -> Tensor:
    """logits / temperature, fp32 [N, V]; a greedy row (inv_temperature [N] is +inf) keeps its logits."""
    return logits.float() * torch.where(inv_temperature.isposinf(), 1.0, inv_temperature)[:, None]


def filter_cutoff(logits: Tensor, how: Sampling) -> Tensor:
    """fp32 [N]: the smallest scaled logit of each row of logits [N, V] that the filters keep."""
    z = scaled(logits, how.inv_temperature)  # [N, V]
    cutoff = z.new_full((len(z),), -torch.inf)
    if how.top_k is not None and len(z):
        cutoff = _top_k_cutoff(z, how.top_k)
    if how.top_p is not None:
        cutoff = torch.maximum(cutoff, _top_p_cutoff(z, cutoff, how.top_p))
    if how.min_p is not None:
        cutoff = torch.maximum(cutoff, z.amax(1) + log_of_share(how.min_p))  # p_v >= min_p * max p
    return torch.where(how.greedy, -torch.inf, cutoff)


def _top_k_cutoff(z: Tensor, top_k: Tensor) -> Tensor:
    """The k-th largest value."""
    top_k = top_k.clamp(1, z.shape[1])
    largest = int(top_k.max()) if z.device.type == "cpu" else z.shape[1]  # its value is not worth a synchronisation
    return z.topk(largest, dim=1).values.gather(1, top_k[:, None] - 1)[:, 0]


def _top_p_cutoff(z: Tensor, cutoff: Tensor, top_p: Tensor) -> Tensor:
    """The last value, from the top, with less than `top_p` of the probability of what `cutoff` keeps before it."""
    descending = z.masked_fill(z < cutoff[:, None], -torch.inf).sort(dim=1, descending=True).values
    weight = weights(exp_(descending - descending[:, :1]))  # [N, V]
    sums = weight.cumsum(1)
    needed = top_p * sums[:, -1].double()  # [N]
    before = sums.sub_(weight).double()  # [N, V]
    kept = (before < needed[:, None]).sum(1).clamp(min=1)
    cutoff = descending.gather(1, kept[:, None] - 1)[:, 0]
    return torch.where(top_p < 1, cutoff, -torch.inf)  # 1 keeps all, of whatever weight
