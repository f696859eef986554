"""What only hardware shows of the public ops: Triton against the CPU, no wait for the device, CUDA graphs.

Ops whose graphs are captured elsewhere: `rms_norm` in test_norm.py, `kv_append` and `ragged_attention` in
test_attention.py, `plan_pass` and `commit_pass` in test_passes.py. The distribution of ten million draws is in
test_distribution.py.
"""

import contextlib
from itertools import pairwise

import pytest
import torch
from conftest import GPU_ONLY, moved
from oracles import assert_same_tokens

from selfgen_kernels import combine_shards, gumbel_noise, linear_sample_mix, linear_sample_shard, sample_mix, self_mask
from selfgen_kernels.backends.reference import sampling as reference

pytestmark = GPU_ONLY

N, D, V = 200, 256, 5000
IDS = torch.arange(N)
KEYS = {"seed": -3, "sample_ids": IDS // 7, "positions": IDS % 7}
FILTERS = {"none": {}, "top_k": {"top_k": 20}, "all": {"top_k": 50, "top_p": 0.9, "min_p": 0.01}}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NEAR_TIES = 2  # rows of N at most


def on_gpu(arguments):
    return dict(zip(arguments, moved(arguments.values(), "cuda"), strict=True))


def a_head(dtype, n=N, width=D, vocab_size=V):
    """hidden [N, D], weight [V, D] and bias [V] whose logits spread like a model's."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, width, generator=generator) for rows in (n, vocab_size))
    bias = torch.randn(vocab_size, generator=generator)
    return hidden.to(dtype), (weight * 3 * width**-0.5).to(dtype), bias.to(dtype)


@contextlib.contextmanager
def no_waiting():
    """An operation that waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- Triton against the reference ------------------------------------------------------------------------------------


def exact_logits(hidden, weight, bias, softcap, logit_scale):
    """What the fused head samples from: its products, rounded once to the dtype of the head."""
    logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    logits = logits.to(weight.dtype).double() * logit_scale
    return (logits if softcap is None else softcap * torch.tanh(logits / softcap)).float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "width", "vocab_size"), [(N, D, V), (1, D, V), (33, 100, 999), (5, 1, 1)], ids=str)
@pytest.mark.parametrize("plain", [True, False])
def test_head_gives_the_references_tokens(dtype, n, width, vocab_size, plain):
    """The reference samples from products in fp64, each rounded once; sums in fp32 may round to the other side."""
    hidden, weight, bias = a_head(dtype, n, width, vocab_size)
    settings = (None, None, 1.0) if plain else (bias, 8.0, 0.5)
    ids = torch.arange(n)
    keys = {"seed": 11, "sample_ids": ids, "positions": ids}
    inverse = torch.linspace(0.5, 1.5, n)
    logits = exact_logits(hidden, weight, *settings)
    sampling = ids + 2**32, *keys.values(), inverse, None, None, None
    want = reference.sample_mix(logits, ids, *sampling)
    bias, softcap, scale = settings
    op = torch.ops.selfgen.linear_sample_mix
    tokens, is_self, invalid = op(*moved((hidden, weight, bias, softcap, scale, ids, *sampling), "cuda"))
    assert is_self.all()
    assert not invalid.any()
    if dtype == torch.float32:
        assert assert_same_tokens(tokens.cpu(), want[0], logits * inverse[:, None], **keys) <= NEAR_TIES
    else:
        assert (tokens.cpu() != want[0]).sum() <= NEAR_TIES


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_public_head_gives_the_tokens_of_the_cpu(dtype, filters):
    """In 16 bits more rows may differ: the CPU rounds its product, and so does torch on the GPU, for filters."""
    hidden, weight, bias = a_head(dtype)
    how = {"bias": bias, "softcap": 30.0, **KEYS, **filters, "temperature": torch.linspace(0, 2, N)}
    want, want_self = linear_sample_mix(hidden, weight, IDS + V, 0.7, **how)
    status = torch.zeros((), dtype=torch.int64, device="cuda")
    there = moved((hidden, weight, IDS + V), "cuda")
    got, is_self = linear_sample_mix(*there, 0.7, **on_gpu(how), status=status)
    assert torch.equal(is_self.cpu(), want_self)
    assert torch.equal(got.cpu()[~want_self], want[~want_self])
    assert (got.cpu() != want).sum() <= (NEAR_TIES if dtype == torch.float32 else N // 10)
    assert status.item() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shards_give_the_tokens_of_the_whole_head(dtype):
    hidden, weight, bias = (x.cuda() for x in a_head(dtype))
    how, reference_tokens = on_gpu(KEYS), (IDS + V).cuda()
    want, _ = linear_sample_mix(hidden, weight, reference_tokens, 0.7, bias=bias, **how)
    cuts = (0, 1000, 1030, 3777, V)
    parts = [
        linear_sample_shard(hidden, weight[a:b], 0.7, first_id=a, bias=bias[a:b], **how) for a, b in pairwise(cuts)
    ]
    got, _ = combine_shards(*(torch.stack(part) for part in zip(*parts, strict=True)), reference_tokens, 0.7, **how)
    assert (got != want).sum() <= NEAR_TIES


def test_invalid_rows_are_counted_on_the_device():
    hidden, weight, _ = (x.cuda() for x in a_head(torch.bfloat16))
    hidden[3] = torch.nan
    status = torch.zeros((), dtype=torch.int64, device="cuda")
    tokens, _ = linear_sample_mix(hidden, weight, (IDS + V).cuda(), 1.0, **on_gpu(KEYS), status=status)
    assert tokens[3] == 3 + V
    assert status.item() == 1


# ---- CUDA graphs -----------------------------------------------------------------------------------------------------


def ops_in_a_step(dtype):
    """Every sampling op by name, as a function of no arguments over tensors that stay, and those tensors."""
    hidden, weight, _ = (x.cuda() for x in a_head(dtype))
    ids, how = IDS.cuda(), on_gpu(KEYS)
    prob = torch.full((N,), 0.7, device="cuda")
    logits = (hidden @ weight.T).contiguous()
    steps = {
        f"{name}, {filtered}": (lambda op=op, tensors=tensors, some=some: op(*tensors, ids, prob, **how, **some))
        for name, op, tensors in (
            ("sample_mix", sample_mix, (logits,)), ("linear_sample_mix", linear_sample_mix, (hidden, weight))
        )
        for filtered, some in FILTERS.items()
    }  # fmt: skip
    steps["linear_sample_shard"] = lambda: linear_sample_shard(hidden, weight, prob, first_id=70, **how)
    steps["sample_mix, confident"] = lambda: sample_mix(logits, ids, prob, min_reference_prob=1e-5, **how)
    steps["gumbel_noise"] = lambda: (gumbel_noise(**how, size=100, stream=1),)
    steps["self_mask"] = lambda: (self_mask(**how, self_prob=prob),)
    return steps, (hidden, logits)


NAMES = [f"{name}, {filtered}" for name in ("sample_mix", "linear_sample_mix") for filtered in FILTERS]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", [*NAMES, "sample_mix, confident", "linear_sample_shard", "gumbel_noise", "self_mask"])
def test_sampling_is_captured_in_a_cuda_graph(name, dtype):
    """Captured without a wait, and replayed on other numbers than it was captured with."""
    steps, (hidden, logits) = ops_in_a_step(dtype)
    step = steps[name]
    step()  # compiles the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with no_waiting(), torch.cuda.graph(graph):
        got = step()
    for _ in range(2):
        hidden.copy_(hidden.flip(0))
        logits.copy_(logits.flip(0))
        graph.replay()
        for ours, wanted in zip(got, step(), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=0, atol=0, equal_nan=True)
