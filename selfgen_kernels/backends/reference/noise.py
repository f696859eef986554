"""The two ops that return the numbers of the generator, which `philox` specifies, as they are."""

from selfgen_kernels.backends.reference.philox import gumbel_noise, self_mask

__all__ = ["gumbel_noise", "self_mask"]
