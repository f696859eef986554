"""Torch reference: the specification of every op, and the kernel of devices that have no other."""

import torch

from selfgen_kernels.backends.reference import attention, philox, sampling, scaling

for op in (
    attention.kv_append,
    attention.ragged_attention,
    philox.gumbel_noise,
    philox.self_mask,
    sampling.sample_mix,
    sampling.linear_sample_mix,
    sampling.linear_sample_shard,
    sampling.combine_shards,
):
    torch.library.impl(f"selfgen::{op.__name__}", "CompositeExplicitAutograd", op)

# For kernels that have left Python and come back for the filters.
_FILTERS = "Tensor logits, Tensor inv_temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p"
torch.library.define("selfgen::_filter_cutoff", f"({_FILTERS}) -> Tensor")
torch.library.impl("selfgen::_filter_cutoff", "CompositeExplicitAutograd", scaling.filter_cutoff)
