"""What tests compare tokens with when two computations of the same logits may round apart."""

import torch

from selfgen_kernels.backends.reference.philox import GROUP, TOKEN, gumbel_noise
from selfgen_kernels.call import GROUP_SIZE

CLOSE = 1e-4
"""Scores, some tens at most, are this close or closer in a near tie: a few hundred units in the last place."""


def near_tie(z, token, other, seed, sample_id, position):
    """Whether `token` and `other` are level up to rounding in a row z [V], scaled and filtered; ids are [1]."""
    z = torch.nn.functional.pad(z.double(), (0, -len(z) % GROUP_SIZE), value=-torch.inf).view(-1, GROUP_SIZE)
    groups = z.logsumexp(1) + gumbel_noise(seed, sample_id, position, len(z), GROUP)[0]  # [G]
    tokens = z + gumbel_noise(seed, sample_id, position, GROUP_SIZE, TOKEN)[0]  # [G, 64]
    (group, offset), (other_group, other_offset) = divmod(token, GROUP_SIZE), divmod(other, GROUP_SIZE)
    gap = groups[group] - groups[other_group]
    if group == other_group:
        gap = tokens[group, offset] - tokens[group, other_offset]
    return bool(gap.abs() < CLOSE)


def assert_same_tokens(got, want, z, *, seed, sample_ids, positions):
    """Tokens [N] equal but for near ties in z [N, V]; returns how many of these there were."""
    different = (got != want).nonzero()[:, 0].tolist()
    for row in different:
        pair, key = (int(got[row]), int(want[row])), (seed, sample_ids[row : row + 1], positions[row : row + 1])
        assert all(0 <= token < z.shape[1] for token in pair), f"row {row}: {pair} of {z.shape[1]} ids"
        assert near_tie(z[row], *pair, *key), f"row {row}: token {pair[0]} is not level with {pair[1]}"
    return len(different)
