"""Sampling, specified: z = logits / temperature, the filters, then Gumbel-max in two levels.

The vocabulary is cut into groups of 64 consecutive ids (the last may be short). With standard Gumbel noise G1 and G2
from the streams GROUP and TOKEN of `philox`:

    group = argmax_g  logsumexp(z in group g) + G1[g]
    token = argmax_v  z_v + G2[v mod 64]                 over v in that group

P(group) P(token | group) = softmax(z)_token: an exact draw for one random number a group instead of one a token.
Ties go to the lowest index. A greedy row knows no noise, temperature or filter: its token is the argmax of the logits.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from selfgen_kernels.backends.reference.philox import GROUP, TOKEN, gumbel_noise, self_mask
from selfgen_kernels.backends.reference.scaling import filter_cutoff, scaled

GROUP_SIZE = 64
VOCAB_CHUNK = 64 * GROUP_SIZE
"""Ids whose logits `linear_sample_mix` holds at a time: whole groups. Without influence on the tokens."""

Mixed = tuple[Tensor, Tensor, Tensor]


class Sampling(NamedTuple):
    """How each row is drawn: the arguments that both ops share, in the order of their schema. Tensors are [N]."""

    threshold: Tensor
    seed: int
    sample_ids: Tensor
    positions: Tensor
    inv_temperature: Tensor  # +inf is greedy
    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None

    @property
    def is_self(self) -> Tensor:
        return self_mask(self.seed, self.sample_ids, self.positions, self.threshold)

    @property
    def greedy(self) -> Tensor:
        return self.inv_temperature.isposinf()

    @property
    def filtered(self) -> bool:
        return any(value is not None for value in (self.top_k, self.top_p, self.min_p))

    def cutoff(self, logits: Tensor) -> Tensor:
        return filter_cutoff(logits, self.inv_temperature, self.top_k, self.top_p, self.min_p)

    def select(self, rows: Tensor) -> "Sampling":
        return Sampling(*(value[rows] if isinstance(value, Tensor) else value for value in self))  # type: ignore[arg-type]


def sample_mix(logits: Tensor, reference: Tensor, *sampling) -> Mixed:
    """Tokens int64 [N], is_self bool [N], invalid bool [N] from logits [N, V], reference [N] and a `Sampling`."""
    how = Sampling(*sampling)
    is_self = how.is_self  # [N]
    rows = is_self.nonzero()[:, 0]  # [S]
    how = how.select(rows)
    drawn, valid = draw([scaled_and_filtered(logits[rows], how)], logits.shape[1], how)  # [S]
    return mix(reference, is_self, rows, drawn, valid)


def linear_sample_mix(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, reference: Tensor, *sampling
) -> Mixed:
    """The same from hidden [N, D] and weight [V, D], with logits of only some rows or some ids at a time."""
    how = Sampling(*sampling)
    vocab_size = len(weight)
    if how.filtered:  # a filter looks at whole rows
        row_block, vocab_chunk = max(1, len(hidden) // 8), vocab_size
    else:
        row_block, vocab_chunk = max(1, len(hidden)), VOCAB_CHUNK

    def head(rows: Tensor, ids: slice) -> Tensor:
        logits = linear(hidden[rows], weight[ids], None if bias is None else bias[ids]).float()  # [B, C]
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    is_self = how.is_self  # [N]
    rows = is_self.nonzero()[:, 0]  # [S]
    drawn, valid = torch.empty_like(rows), torch.empty_like(rows, dtype=torch.bool)  # [S]
    for part in torch.arange(len(rows), device=rows.device).split(row_block):  # [B]
        block = how.select(rows[part])
        spans = (slice(start, start + vocab_chunk) for start in range(0, vocab_size, vocab_chunk))
        chunks = (scaled_and_filtered(head(rows[part], span), block) for span in spans)  # each [B, C]
        drawn[part], valid[part] = draw(chunks, vocab_size, block)
    return mix(reference, is_self, rows, drawn, valid)


def scaled_and_filtered(logits: Tensor, how: Sampling) -> Tensor:
    """z fp32 [N, V], with -inf for the tokens that the filters drop."""
    z = scaled(logits, how.inv_temperature)
    return z.masked_fill(z < how.cutoff(logits)[:, None], -torch.inf) if how.filtered else z


def draw(chunks: Iterable[Tensor], vocab_size: int, how: Sampling) -> tuple[Tensor, Tensor]:
    """Tokens int64 [N] and valid bool [N], from z [N, V] in `chunks` [N, C] of consecutive ids, whole groups each."""
    greedy = how.greedy[:, None]  # [N, 1]
    keys = how.seed, how.sample_ids, how.positions
    group_noise = gumbel_noise(*keys, -(-vocab_size // GROUP_SIZE), GROUP)  # [N, G]
    token_noise = gumbel_noise(*keys, GROUP_SIZE, TOKEN).masked_fill(greedy, 0)  # [N, 64]

    tokens = torch.zeros_like(how.sample_ids, dtype=torch.int64)  # [N]
    best = peak = torch.full_like(how.inv_temperature, -torch.inf)  # [N]
    first_group = 0
    for z in chunks:
        z = pad(z, (0, -z.shape[1] % GROUP_SIZE), value=-torch.inf)
        z = z.unflatten(1, (-1, GROUP_SIZE))  # [N, K, 64], the K groups of this chunk
        noise = group_noise[:, first_group : first_group + z.shape[1]]  # [N, K]
        score, group = torch.where(greedy, z.amax(2), z.logsumexp(2) + noise).max(1)  # [N]
        inside = z.take_along_dim(group[:, None, None], 1)[:, 0] + token_noise  # [N, 64]
        candidate = (first_group + group) * GROUP_SIZE + inside.argmax(1)

        tokens = torch.where(score > best, candidate, tokens)
        best = torch.maximum(best, score)
        peak = torch.maximum(peak, z.amax((1, 2)))
        first_group += z.shape[1]
    return tokens, peak.isfinite()  # NaN and +inf reach the peak; it stays -inf if nothing may be drawn


def mix(reference: Tensor, is_self: Tensor, rows: Tensor, drawn: Tensor, valid: Tensor) -> Mixed:
    """`drawn` [S] at the `rows` [S] of a copy of `reference` [N], where `valid` [S]."""
    tokens = reference.clone()
    tokens[rows] = torch.where(valid, drawn, reference[rows])
    invalid = torch.zeros_like(is_self)
    invalid[rows] = ~valid
    return tokens, is_self, invalid
