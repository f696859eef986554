"""Sampling, specified: z = logits / temperature, the filters, then Gumbel-max in two levels.

The vocabulary is cut into groups of 64 consecutive ids (the last may be short). With standard Gumbel noise G1 and G2
from the streams GROUP and TOKEN of `philox`:

    group = argmax_g  logsumexp(z in group g) + G1[g]
    token = argmax_v  z_v + G2[v mod 64]                 over v in that group

P(group) P(token | group) = softmax(z)_token: an exact draw for one random number a group instead of one a token.
Ties go to the lowest index. A greedy row knows no noise, temperature or filter: its token is the argmax of the logits.

A part of the vocabulary is summed up by three candidates, and parts are put together by choosing among theirs: that is
how chunks of one head and shards of several ranks meet. A shard may begin and end inside of a group, so the candidates
are the group that its first id cuts, the best of its whole groups, and the group that its last id cuts. Pieces of one
group merge: their logsumexps add up, and the better token stays.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from selfgen_kernels.backends.reference.philox import GROUP, TOKEN, gumbel_noise, self_mask
from selfgen_kernels.backends.reference.scaling import filter_cutoff, scaled

GROUP_SIZE = 64
WORKSPACE, FILTER_WORKSPACE = 32, 64
"""Bytes that a logit takes at most while it is drawn from, with its copies; the second where filters sort and sum it in
fp64. `linear_sample_mix` works on as many at a time as fit into an eighth of all logits in the head's dtype."""

Mixed = tuple[Tensor, Tensor, Tensor]
Candidates = tuple[Tensor, Tensor]
"""Values fp32 [N, C, 3] and ids int64 [N, C] of C candidates a row: logsumexp of the group (its maximum if greedy), G1
of the group, z + G2 of the best token in it, and that token, or -1 for no candidate. A row with NaN or +inf is all NaN.
"""


class Sampling(NamedTuple):
    """How each row is drawn: the arguments that both ops share, in the order of their schema. Tensors are [N]."""

    threshold: Tensor
    seed: int
    sample_ids: Tensor
    positions: Tensor
    inv_temperature: Tensor  # +inf is greedy
    top_k: Tensor | None = None
    top_p: Tensor | None = None
    min_p: Tensor | None = None

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

    def select(self, rows: Tensor | slice) -> "Sampling":
        return Sampling(*(value[rows] if isinstance(value, Tensor) else value for value in self))  # type: ignore[arg-type]


def sample_mix(logits: Tensor, reference: Tensor, *sampling) -> Mixed:
    """Tokens int64 [N], is_self bool [N], invalid bool [N] from logits [N, V], reference [N] and a `Sampling`."""
    how = Sampling(*sampling)
    is_self = how.is_self  # [N]
    rows = is_self.nonzero()[:, 0]  # [S]
    how = how.select(rows)
    drawn, valid = choose(*candidates([scaled_and_filtered(logits[rows], how)], 0, logits.shape[1], how), how.greedy)
    return mix(reference, is_self, rows, drawn, valid)


def linear_sample_mix(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    reference: Tensor,
    *sampling,
) -> Mixed:
    """The same from hidden [N, D] and weight [V, D], with logits of only some rows or some ids at a time."""
    how = Sampling(*sampling)
    is_self = how.is_self  # [N]
    rows = is_self.nonzero()[:, 0]  # [S]
    drawn, valid = torch.empty_like(rows), torch.empty_like(rows, dtype=torch.bool)  # [S]
    # A filter looks at whole rows: one pass over a block of them finds the cutoffs, a second one draws.
    row_block = max(1, at_a_time(len(hidden), weight, FILTER_WORKSPACE) if how.filtered else len(hidden))
    for part in torch.arange(len(rows), device=rows.device).split(row_block):  # [B]
        block = how.select(rows[part])
        chunks = head_chunks(hidden[rows[part]], weight, bias, softcap, logit_scale, 0, block)
        drawn[part], valid[part] = choose(*candidates(chunks, 0, len(weight), block), block.greedy)
    return mix(reference, is_self, rows, drawn, valid)


def linear_sample_shard(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    first_id: int,
    *sampling,
) -> Candidates:
    """Values [N, 3, 3] and ids [N, 3] of the shard weight [V_shard, D], whose row 0 is the head of `first_id`."""
    how = Sampling(*sampling)
    rows = how.is_self.nonzero()[:, 0]  # [S]
    values = torch.full((len(hidden), 3, 3), -torch.inf, device=hidden.device)
    ids = torch.full((len(hidden), 3), -1, device=hidden.device)
    how = how.select(rows)
    chunks = head_chunks(hidden[rows], weight, bias, softcap, logit_scale, first_id, how)
    values[rows], ids[rows] = candidates(chunks, first_id, len(weight), how)
    return values, ids


def combine_shards(values: Tensor, ids: Tensor, reference: Tensor, *sampling) -> Mixed:
    """Tokens, is_self and invalid [N] from the candidates of all shards, [R, N, 3, 3] and [R, N, 3]; any device."""
    how = Sampling(*sampling)
    per_row = reference, how.threshold, how.sample_ids, how.positions, how.inv_temperature  # [N] each
    shapes = [list(x.shape) for x in (values, ids, *per_row)]
    ranks, rows = len(ids), len(reference)
    if shapes != [[ranks, rows, 3, 3], [ranks, rows, 3], *[[rows]] * 5]:
        raise ValueError(
            f"values, ids, reference, threshold, sample_ids, positions and inv_temperature have shapes {shapes}, "
            "expected [R, N, 3, 3], [R, N, 3] and [N] five times; stack the results of all ranks for the same rows"
        )
    drawn, valid = choose(values.transpose(0, 1).flatten(1, 2), ids.transpose(0, 1).flatten(1), how.greedy)
    is_self = self_mask(how.seed, how.sample_ids, how.positions, how.threshold)  # [N]
    return torch.where(is_self & valid, drawn, reference), is_self, is_self & ~valid


def reference_log_prob(logits: Tensor, reference: Tensor, *keys) -> Tensor:
    """log softmax(logits)[reference] fp32 [N] of the rows that the mask selects, 0 of others; logits are [N, V].

    `keys` are threshold, seed, sample_ids and positions. A reference outside of the vocabulary gives -inf, and a row
    with NaN, +inf or nothing but -inf gives 0.
    """
    rows = unscaled(*keys).is_self.nonzero()[:, 0]  # [S]
    result = torch.zeros_like(reference, dtype=torch.float32)
    result[rows] = log_prob([logits[rows].float()], reference[rows])
    return result


def linear_reference_log_prob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    reference: Tensor,
    *keys,
) -> Tensor:
    """The same from hidden [N, D] and weight [V, D], chunk by chunk of the vocabulary; any device."""
    how = unscaled(*keys)
    per_row = reference, how.threshold, how.sample_ids, how.positions  # [N] each
    shapes = [None if x is None else list(x.shape) for x in (hidden, weight, bias, *per_row)]
    rows, size, vocab_size = len(hidden), hidden.shape[-1], len(weight)
    of_bias = None if bias is None else [vocab_size]
    if vocab_size == 0 or shapes != [[rows, size], [vocab_size, size], of_bias, *[[rows]] * 4]:
        raise ValueError(
            f"hidden, weight, bias, reference, threshold, sample_ids and positions have shapes {shapes}, expected "
            "[N, D], [V, D], None or [V], and [N] four times, V >= 1; pass the rows and the head of one call"
        )
    selected = how.is_self.nonzero()[:, 0]  # [S]
    result = torch.zeros_like(reference, dtype=torch.float32)
    chunks = head_chunks(hidden[selected], weight, bias, softcap, logit_scale, 0, how.select(selected))
    result[selected] = log_prob(chunks, reference[selected])
    return result


def unscaled(threshold: Tensor, seed: int, sample_ids: Tensor, positions: Tensor) -> Sampling:
    """A `Sampling` at temperature 1."""
    return Sampling(threshold, seed, sample_ids, positions, torch.ones_like(threshold, dtype=torch.float32))


def log_prob(chunks: Iterable[Tensor], tokens: Tensor) -> Tensor:
    """log softmax(z)[tokens] fp32 [N] of z [N, V], which come in `chunks` of consecutive ids and are overwritten."""
    peak = torch.full_like(tokens, -torch.inf, dtype=torch.float32)  # [N], as are the next
    mass, found = torch.zeros_like(peak), peak.clone()
    begin = 0  # of the chunk
    for z in chunks:
        offset = tokens - begin
        here = (offset >= 0) & (offset < z.shape[1])
        found = torch.where(here, z.gather(1, torch.where(here, offset, 0)[:, None])[:, 0], found)
        before, peak = peak, torch.maximum(peak, z.amax(1))
        shift = torch.where(peak.isfinite(), peak, 0)
        mass = mass * (before - shift).exp() + z.sub_(shift[:, None]).exp_().sum(1)
        begin += z.shape[1]
    return torch.where(peak.isfinite(), found - peak - mass.log(), 0)


def at_a_time(size: int, weight: Tensor, workspace: int) -> int:
    """Of `size` rows or ids, how many may be drawn from together."""
    return size * weight.element_size() // (8 * workspace)


def head_chunks(hidden, weight, bias, softcap, logit_scale, first_id, how: Sampling) -> Iterator[Tensor]:
    """z [N, C] of consecutive ids from `first_id`: chunk after chunk that ends with a group, or all if filtered."""
    size = len(weight)
    chunk = size if how.filtered else max(1, at_a_time(size, weight, WORKSPACE) // GROUP_SIZE) * GROUP_SIZE
    begin, end = 0, size if how.filtered else min(size, chunk - first_id % GROUP_SIZE)
    while begin < size:
        part = None if bias is None else bias[begin:end]
        yield scaled_and_filtered(head_logits(hidden, weight[begin:end], part, softcap, logit_scale), how)
        begin, end = end, min(size, end + chunk)


def head_logits(hidden, weight, bias, softcap, logit_scale) -> Tensor:
    """fp32 [N, V]: what the head makes of hidden [N, D]."""
    logits = linear(hidden, weight, bias).float().mul_(logit_scale)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def scaled_and_filtered(logits: Tensor, how: Sampling) -> Tensor:
    """z fp32 [N, V], with -inf for the tokens that the filters drop."""
    cutoff = how.cutoff(logits) if how.filtered else None
    z = scaled(logits, how.inv_temperature)
    return z if cutoff is None else z.masked_fill_(z < cutoff[:, None], -torch.inf)


def candidates(chunks: Iterable[Tensor], first_id: int, size: int, how: Sampling) -> Candidates:
    """Values [N, 3, 3] and ids [N, 3] of the ids first_id .. first_id + size - 1, whose z [N, C] come in `chunks`."""
    greedy = how.greedy[:, None]  # [N, 1]
    keys = how.seed, how.sample_ids, how.positions
    end_id = first_id + size
    group_noise = group_noise_of(how, -(-end_id // GROUP_SIZE)).masked_fill_(greedy, 0)  # [N, G]
    token_noise = gumbel_noise(*keys, GROUP_SIZE, TOKEN).masked_fill(greedy, 0)  # [N, 64]

    values = torch.full((len(how.positions), 3, 3), -torch.inf, device=greedy.device)
    ids = torch.full((len(how.positions), 3), -1, device=greedy.device)
    peak = torch.full_like(how.inv_temperature, -torch.inf)  # [N]
    begin = first_id  # of the chunk
    for z in chunks:
        peak = torch.maximum(peak, z.amax(1))
        group, last = begin // GROUP_SIZE, -(-(begin + z.shape[1]) // GROUP_SIZE)  # its groups
        z = pad(z, (begin - group * GROUP_SIZE, last * GROUP_SIZE - begin - z.shape[1]), value=-torch.inf)
        begin = last * GROUP_SIZE
        z = z.unflatten(1, (-1, GROUP_SIZE))  # [N, K, 64]
        mass = torch.where(greedy, z.amax(2), z.logsumexp(2))  # [N, K]
        noise = group_noise[:, group:last]
        first = torch.arange(group, last, device=z.device) * GROUP_SIZE  # [K]: the first id of each group
        cut_at_first, cut_at_last = first < first_id, first + GROUP_SIZE > end_id
        for place, is_place in enumerate((cut_at_first, ~(cut_at_first | cut_at_last), cut_at_last & ~cut_at_first)):
            score, best = (mass + noise).masked_fill(~is_place, -torch.inf).max(1, keepdim=True)  # [N, 1]
            inner, token = (z.take_along_dim(best[:, :, None], 1)[:, 0] + token_noise).max(1, keepdim=True)  # [N, 1]
            value = torch.cat([mass.gather(1, best), noise.gather(1, best), inner], 1)  # [N, 3]
            better = score > values[:, place, :2].sum(1, keepdim=True)  # [N, 1]
            values[:, place] = torch.where(better, value, values[:, place])
            ids[:, place] = torch.where(better, (group + best) * GROUP_SIZE + token, ids[:, place, None])[:, 0]
    values[peak.isnan() | peak.isposinf()] = torch.nan
    return values, ids


def group_noise_of(how: Sampling, groups: int) -> Tensor:
    """G1 fp32 [N, groups], part after part, as the random words of it all take many times its memory."""
    noise = torch.empty(len(how.positions), groups, device=how.positions.device)
    part = 4 * -(-groups // 64)
    for first in range(0, groups, part):
        some = noise[:, first : first + part]
        some.copy_(gumbel_noise(how.seed, how.sample_ids, how.positions, some.shape[1], GROUP, first))
    return noise


def choose(values: Tensor, ids: Tensor, greedy: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens int64 [N] and valid bool [N]: the winner among candidates [N, C, 3] and [N, C]; greedy is bool [N]."""
    mass, noise, inner = values.unbind(2)  # [N, C] each
    exists = ids >= 0
    group = ids // GROUP_SIZE
    same = (group[:, :, None] == group[:, None]) & exists[:, None]  # [N, C, C]
    pieces = mass[:, None].masked_fill(~same, -torch.inf)  # [N, C, C]
    score = torch.where(greedy[:, None], pieces.amax(2), pieces.logsumexp(2)) + noise  # [N, C]

    best = exists & (score == score.masked_fill(~exists, -torch.inf).amax(1, keepdim=True))
    winner = group.masked_fill(~best, 2**62).amin(1, keepdim=True)
    in_winner = exists & (group == winner)
    inner = inner.masked_fill(~in_winner, -torch.inf)
    tokens = ids.masked_fill(~in_winner | (inner < inner.amax(1, keepdim=True)), 2**63 - 1).amin(1)
    return tokens, best.any(1) & ~values.isnan().any(2).any(1)  # no best: inf - inf, which no shard gives


def mix(reference: Tensor, is_self: Tensor, rows: Tensor, drawn: Tensor, valid: Tensor) -> Mixed:
    """`drawn` [S] at the `rows` [S] of a copy of `reference` [N], where `valid` [S]."""
    tokens = reference.clone()
    tokens[rows] = torch.where(valid, drawn, reference[rows])
    invalid = torch.zeros_like(is_self)
    invalid[rows] = ~valid
    return tokens, is_self, invalid
