"""Sampling from the logits of a real model: `sample_mix` compared with other samplers, alternating in one run.

    make bench            (or: pytest benchmarks/bench_sampling.py)

The logits are SmolLM2-135M-Instruct's at the answer tokens of GSM8K, or of gsm_symbolic where that is not at hand.
Vocabularies other than its own are columns of these, drawn at random: each id once for a smaller vocabulary, as often
as needed for a larger one.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from selfgen_kernels import sample_mix
from selfgen_kernels.backends.reference.sampling import sample_mix as reference_sample_mix
from selfgen_kernels.call import GROUP_SIZE
from tools.real_parts import DEVICE, recorded_head

ROWS = (1, 8, 64, 512)
VOCABULARIES = {"32k": 32_000, "49k": 49_152, "128k": 128_256, "256k": 262_144}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TEMPERATURE, TOP_K, TOP_P = 0.8, 50, 0.95

Logits = dict[tuple[int, str], Tensor]


@pytest.fixture(scope="module")
def recorded() -> Tensor:
    """fp32 [512, 49152]."""
    hidden, weight = recorded_head(max(ROWS))
    return hidden @ weight.T


def logits_of(recorded: Tensor, vocabulary: str, rows: int, dtype: str) -> Tensor:
    size, generator = VOCABULARIES[vocabulary], torch.Generator().manual_seed(0)
    own = recorded.shape[1]
    columns = torch.cat([torch.randperm(own, generator=generator) for _ in range(-(-size // own))])[:size]
    if vocabulary == "49k":
        columns = torch.arange(own)
    return recorded[:rows, columns.to(recorded.device)].to(DTYPES[dtype]).contiguous()


def ours(logits: Tensor, self_prob: float = 1.0, **how):
    rows = torch.arange(len(logits), device=logits.device)
    reference = torch.zeros_like(rows)
    return lambda: sample_mix(logits, reference, self_prob, seed=0, sample_ids=rows, positions=rows, **how)


def multinomial(logits: Tensor) -> Tensor:
    return torch.multinomial(logits.softmax(-1), 1)[:, 0]


def exponential_race(logits: Tensor) -> Tensor:
    """argmax of probability over exponential noise, which is Gumbel-max without its logarithms."""
    probs = logits.float().softmax(-1)
    return (probs / torch.empty_like(probs).exponential_(1)).argmax(-1)


compiled_race = torch.compile(exponential_race, dynamic=True)
compiled_multinomial = torch.compile(multinomial, dynamic=True)


def two_level(logits: Tensor):
    """The torch reference of `sample_mix`, two-level sampling in eager torch."""
    n = len(logits)
    rows, ones = torch.arange(n, device=logits.device), torch.ones(n, device=logits.device)
    args = rows * 0, rows * 0 + 2**32, 0, rows, rows, ones, None, None, None
    return lambda: reference_sample_mix(logits, *args)


def two_level_draw(logits: Tensor) -> Tensor:
    """The same draw with noise from torch's generator: what a compiler can fuse of it."""
    z = pad(logits.float(), (0, -logits.shape[1] % GROUP_SIZE), value=-torch.inf).unflatten(1, (-1, GROUP_SIZE))
    group_score = z.logsumexp(2)  # [N, G]
    group = (group_score - torch.empty_like(group_score).exponential_().log()).argmax(1)  # [N]
    inner = z[torch.arange(len(z), device=z.device), group]  # [N, 64]
    return group * GROUP_SIZE + (inner - torch.empty_like(inner).exponential_().log()).argmax(1)


compiled_two_level = torch.compile(two_level_draw, dynamic=True)


def gpu_peers(logits: Tensor, filtered: bool) -> dict:
    """FlashInfer and vLLM, where they are installed and run; neither does on a CPU."""
    peers: dict = {}
    if logits.device.type != "cuda":
        return peers
    try:
        from flashinfer import sampling as flashinfer

        if filtered:
            peers["FlashInfer"] = lambda: flashinfer.top_k_top_p_sampling_from_logits(
                logits.float() / TEMPERATURE, TOP_K, TOP_P, filter_apply_order="top_k_first"
            )
        else:
            peers["FlashInfer"] = lambda: flashinfer.sampling_from_logits(logits.float())
    except ImportError:
        pass
    try:
        from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p, random_sample

        n, device = len(logits), logits.device
        k, p = torch.full((n,), TOP_K, device=device), torch.full((n,), TOP_P, device=device)
        if filtered:
            peers["vLLM"] = lambda: random_sample(apply_top_k_top_p(logits.float() / TEMPERATURE, k, p).softmax(-1), {})
        else:
            peers["vLLM"] = lambda: random_sample(logits.float().softmax(-1), {})
    except ImportError:
        pass
    for name, draw in list(peers.items()):
        try:
            draw()
        except Exception as error:  # of a version with other functions, or without kernels for this GPU
            warnings.warn(f"{name} is left out: {error!r}", stacklevel=2)
            del peers[name]
    return peers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("rows", ROWS)
def test_sample_mix(compare, recorded, rows, vocabulary, dtype):
    logits = logits_of(recorded, vocabulary, rows, dtype)
    sides = {
        "sample_mix": ours(logits),
        "sample_mix, p=0.25": ours(logits, 0.25),
        "argmax": lambda: logits.argmax(-1),
        "two-level, eager": two_level(logits),
        "exponential race, torch.compile": lambda: compiled_race(logits),
        "exponential race, eager": lambda: exponential_race(logits),
        "multinomial(softmax)": lambda: multinomial(logits),
        "multinomial(softmax), torch.compile": lambda: compiled_multinomial(logits),
        "two-level, torch.compile": lambda: compiled_two_level(logits),
        **gpu_peers(logits, filtered=False),
    }
    seconds = compare("sample_mix", sides, {"rows": rows, "vocabulary": vocabulary, "dtype": dtype}, own=2)
    if (rows, vocabulary, dtype, logits.device.type) == (64, "49k", "fp32", "cpu"):
        assert seconds["multinomial(softmax)"] >= 35 * seconds["sample_mix"]
        assert seconds["sample_mix"] <= 1.3 * seconds["argmax"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("rows", ROWS)
def test_top_k_and_top_p(compare, recorded, rows, vocabulary, dtype):
    logits = logits_of(recorded, vocabulary, rows, dtype)
    processors = LogitsProcessorList(
        [TemperatureLogitsWarper(TEMPERATURE), TopKLogitsWarper(TOP_K), TopPLogitsWarper(TOP_P)]
    )
    sides = {
        "top-k + top-p": ours(logits, temperature=TEMPERATURE, top_k=TOP_K, top_p=TOP_P),
        "top-k": ours(logits, temperature=TEMPERATURE, top_k=TOP_K),
        "top-p": ours(logits, temperature=TEMPERATURE, top_p=TOP_P),
        "min-p": ours(logits, temperature=TEMPERATURE, min_p=0.05),
        "argmax": lambda: logits.argmax(-1),
        "transformers' processors": lambda: multinomial(processors(None, logits)),
        **gpu_peers(logits, filtered=True),
    }
    seconds = compare(
        f"sample_mix, temperature {TEMPERATURE}, top-k {TOP_K}, top-p {TOP_P}, min-p 0.05",
        sides,
        {"rows": rows, "vocabulary": vocabulary, "dtype": dtype},
        own=4,
    )
    if (rows, vocabulary, dtype, logits.device.type) == (64, "49k", "fp32", "cpu"):
        assert seconds["top-k + top-p"] <= 3 * seconds["argmax"]


def test_recorded_logits_are_a_models(recorded):
    assert recorded.shape == (max(ROWS), VOCABULARIES["49k"])
    assert recorded.device.type == DEVICE
    assert recorded.max(1).values.mean() - recorded.mean() > 2 * recorded.std()  # randn's maximum would be 4.2 std
