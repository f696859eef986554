"""Torch reference: the specification of every op, and the kernel of devices that have no other."""

import torch

from selfgen_kernels.backends.reference import attention, passes, philox, sampling

for op in (
    attention.kv_append,
    attention.ragged_attention,
    philox.gumbel_noise,
    philox.self_mask,
    sampling.sample_mix,
    sampling.linear_sample_mix,
    sampling.linear_sample_shard,
    sampling.combine_shards,
    sampling.reference_log_prob,
    sampling.linear_reference_log_prob,
    passes.plan_pass,
    passes.commit_pass,
):
    torch.library.impl(f"selfgen::{op.__name__}", "CompositeExplicitAutograd", op)
