"""Sampling ops for self-generated contexts: one `torch.library` operator each, with torch, Triton and C++ kernels.

`ops/` says what each op takes and returns, `backends/reference/` says in torch what it computes, and the other folders
of `backends/` compute the same faster. Only torch is needed: a missing compiler, GPU or Triton costs speed, no more.
"""

from selfgen_kernels.call import NOISE_VERSION
from selfgen_kernels.ops.activation import act_mul
from selfgen_kernels.ops.attention import kv_append, ragged_attention
from selfgen_kernels.ops.head import combine_shards, linear_sample_mix, linear_sample_shard
from selfgen_kernels.ops.linear import invariant_linear
from selfgen_kernels.ops.noise import gumbel_noise, self_mask
from selfgen_kernels.ops.norm import add_rms_norm, rms_norm
from selfgen_kernels.ops.passes import commit_pass, plan_pass
from selfgen_kernels.ops.rotary import rotary, rotary_append
from selfgen_kernels.ops.sampling import sample_mix

from selfgen_kernels import backends  # isort: skip  (kernels register for schemas that the ops above have defined)

__all__ = [
    "NOISE_VERSION",
    "act_mul",
    "add_rms_norm",
    "backends",
    "combine_shards",
    "commit_pass",
    "gumbel_noise",
    "invariant_linear",
    "kv_append",
    "linear_sample_mix",
    "linear_sample_shard",
    "plan_pass",
    "ragged_attention",
    "rms_norm",
    "rotary",
    "rotary_append",
    "sample_mix",
    "self_mask",
]
