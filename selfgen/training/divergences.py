"""How far a model's distributions are from other ones: the divergences that a loss may have."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


@dataclass(frozen=True)
class Divergence:
    """Of the model q from a target p, which has no gradient.

    Attributes:
        kind: forward_kl is KL(p || q), reverse_kl is KL(q || p), and jsd is the generalised Jensen-Shannon divergence
            ``beta`` KL(p || m) + (1 - ``beta``) KL(q || m) from the mixture m = ``beta`` p + (1 - ``beta``) q (Agarwal
            et al. 2023, arXiv 2306.13649). Divided by ``beta`` it tends to KL(p || q) as ``beta`` falls to 0, and
            divided by 1 - ``beta`` to KL(q || p) as it rises to 1.
        top_k: compare the target's most likely ids one by one, and all others as one. It is never more than the
            divergence over all ids, and it is 0 for equal distributions. (Over the top ids alone, scaled to a sum of 1,
            it would not see the probability that the model gives to others.) None compares all ids one by one.
        temperature: what the target's logits are divided by.
        ids: how many ids both heads have, where one of them is padded further; None if they are of one size.
    """

    kind: str = "forward_kl"
    beta: float = 0.5
    top_k: int | None = None
    temperature: float = 1.0
    ids: int | None = None

    def __call__(self, own: Tensor, target: Tensor) -> Tensor:
        """[N] for the log-probabilities of the model [N, V], and the target's logits [N, V]."""
        if self.ids is not None:
            own, target = own[:, : self.ids].log_softmax(-1), target[:, : self.ids]
        if self.temperature != 1.0:  # the largest is 0, as the others may overflow
            target = (target - target.amax(-1, keepdim=True)) / self.temperature
        q, p = own, target.log_softmax(-1)
        if self.top_k is not None and self.top_k < p.shape[1]:
            top = p.topk(self.top_k, dim=-1).indices
            q, p = _with_rest(q, top), _with_rest(p, top)
        if self.kind == "forward_kl":
            return _kl(p, q)
        if self.kind == "reverse_kl":
            return _kl(q, p)
        neither = p.isneginf() & q.isneginf()  # where a mixture would have a gradient that is no number
        both = (p + math.log(self.beta), q + math.log1p(-self.beta))
        mixture = torch.logaddexp(*(one.masked_fill(neither, 0.0) for one in both))
        return self.beta * _kl(p, mixture) + (1 - self.beta) * _kl(q, mixture)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) [N] of log-probabilities [N, V]; an id that p rules out has no part in it, nor in its gradient."""
    return (p.exp() * (p - q).masked_fill(p.isneginf(), 0.0)).sum(-1)


def _with_rest(log_probs: Tensor, top: Tensor) -> Tensor:
    """Log-probabilities of the ids ``top`` [N, K], and of all others together: [N, K + 1]."""
    others = log_probs.scatter(1, top, float("-inf"))
    none = others.isneginf().all(-1, keepdim=True)  # is likely at all
    rest = others.masked_fill(none, 0.0).logsumexp(-1, keepdim=True).masked_fill(none, float("-inf"))
    return torch.cat([log_probs.gather(1, top), rest], dim=1)
