"""The ops alone, which need only torch: one step of a mixed context, over logits. Run: python examples/ops.py"""

import torch

from selfgen_kernels import sample_mix

logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))  # [rows, vocabulary]
reference = torch.tensor([7, 8, 9, 10])
ids, places = torch.arange(4), torch.full((4,), 12)  # whose noise: that of row i at place 12
tokens, is_self = sample_mix(
    logits, reference, 0.5, seed=0, sample_ids=ids, positions=places, temperature=0.8, top_p=0.95
)
assert torch.equal(tokens[~is_self], reference[~is_self])
print(tokens.tolist(), is_self.tolist())
