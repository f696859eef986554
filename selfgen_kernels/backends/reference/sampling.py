"""Sampling, specified: z = logits / temperature, the filters, then Gumbel-max in two levels.

The vocabulary is cut into groups of 64 consecutive ids (the last may be short). With standard Gumbel noise G1 and G2
from the streams GROUP and TOKEN of `philox`:

    group = argmax_g  logsumexp(z in group g) + G1[g]
    token = argmax_v  z_v + G2[v mod 64]                 over v in that group

P(group) P(token | group) = softmax(z)_token: an exact draw for one random number per group instead of one per token.
A group's logsumexp is that of `elementary`, by a sum of integers, so that every backend draws the same token. Ties go
to the lowest index. A greedy row knows no noise, temperature or filter: its token is the argmax of the logits. Which
ids exist is told by the size of the logits, or of a head: a public function that is given a `vocab_size` hands over a
view of that many. Noise belongs to an id, so the others' absence changes nothing else.

A part of the vocabulary is summed up by three candidates, and parts are put together by choosing among theirs: that is
how chunks of one head and shards of several ranks meet. A shard may begin and end inside of a group, so the candidates
are the group that its first id cuts, the best of its whole groups, and the group that its last id cuts. Pieces of one
group merge: their logsumexps add up, and the better token stays.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import pad

from selfgen_kernels.backends.reference.elementary import group_masses, log_mass, log_weight, row_mass
from selfgen_kernels.backends.reference.philox import GROUP, TOKEN, gumbel_noise, self_mask
from selfgen_kernels.backends.reference.scaling import filter_cutoff, scaled
from selfgen_kernels.call import GROUP_SIZE, Candidates, Mask, Mixed, Sampling, in_rows
from selfgen_kernels.ops import in_records


@in_records
def sample_mix(logits: Tensor, reference: Tensor, how: Sampling) -> Mixed:
    """Tokens int64 [N], is_self bool [N], invalid bool [N] from logits [N, V] and reference [N]."""
    how = in_rows(how)
    is_self = is_self_of(how.mask)  # [N]
    rows = is_self.nonzero()[:, 0]  # [S]
    how = how.select(rows)
    drawn, valid = choose(*candidates([scaled_and_filtered(logits[rows], how)], 0, logits.shape[1], how), how.greedy)
    return mix(reference, is_self, rows, drawn, valid)


@in_records
def reference_log_prob(logits: Tensor, reference: Tensor, mask: Mask) -> Tensor:
    """log softmax(logits)[reference] fp32 [N] of the rows that the mask selects, 0 of others; logits are [N, V].

    A reference outside of the vocabulary gives -inf, and a row with NaN, +inf or nothing but -inf gives 0.
    """
    rows = is_self_of(in_rows(mask)).nonzero()[:, 0]  # [S]
    result = torch.zeros_like(reference, dtype=torch.float32)
    result[rows] = log_prob([logits[rows].float()], reference[rows], logits.shape[1])
    return result


def is_self_of(mask: Mask) -> Tensor:
    """bool [N]."""
    return self_mask(mask.seed, mask.sample_ids, mask.positions, mask.threshold)


def log_prob(chunks: Iterable[Tensor], tokens: Tensor, vocab_size: int) -> Tensor:
    """log softmax(z)[tokens] fp32 [N] of z [N, V], which come in `chunks` of whole groups, but for the last."""
    found = torch.full_like(tokens, -torch.inf, dtype=torch.float32)  # [N]
    peaks = found.new_empty(len(tokens), -(-vocab_size // GROUP_SIZE))  # [N, G], as is the next
    masses = torch.empty_like(peaks, dtype=torch.int32)
    begin = 0  # of the chunk
    for z in chunks:
        offset = tokens - begin
        here = (offset >= 0) & (offset < z.shape[1])
        found = torch.where(here, z.gather(1, torch.where(here, offset, 0)[:, None])[:, 0], found)
        group, begin = begin // GROUP_SIZE, begin + z.shape[1]
        z = pad(z, (0, -begin % GROUP_SIZE), value=-torch.inf).unflatten(1, (-1, GROUP_SIZE))  # [N, K, 64]
        its_groups = slice(group, group + z.shape[1])
        peaks[:, its_groups], masses[:, its_groups] = group_masses(z)
    peak, weight = row_mass(peaks, masses)  # [N] each
    return torch.where(peak.isfinite(), found - peak - log_weight(weight.clamp(min=1)), 0)


def scaled_and_filtered(logits: Tensor, how: Sampling) -> Tensor:
    """z fp32 [N, V], with -inf for the tokens that the filters drop."""
    cutoff = filter_cutoff(logits, how) if how.filtered else None
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
        mass = torch.where(greedy, z.amax(2), log_mass(*group_masses(z)))  # [N, K]
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
    score = torch.where(greedy[:, None], pieces.amax(2), log_mass(*group_masses(pieces))) + noise  # [N, C]

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
