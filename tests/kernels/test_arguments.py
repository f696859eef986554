"""What a user can get wrong: each mistake has its type of error, and a message that names it."""

import pytest
import torch

from selfgen_kernels import gumbel_noise, linear_sample_mix, sample_mix, self_mask

N, V, D = 3, 10, 4
IDS = torch.arange(N)
META = torch.empty(N, dtype=torch.int64, device="meta")


def mix(logits=None, reference=IDS, self_prob=0.5, **kwargs):
    logits = torch.zeros(N, V) if logits is None else logits
    return sample_mix(logits, reference, self_prob, **({"seed": 0, "sample_ids": IDS, "positions": IDS} | kwargs))


def linear(hidden=None, weight=None, **kwargs):
    hidden = torch.zeros(N, D) if hidden is None else hidden
    weight = torch.zeros(V, D) if weight is None else weight
    return linear_sample_mix(hidden, weight, IDS, 0.5, **({"seed": 0, "sample_ids": IDS, "positions": IDS} | kwargs))


BAD = [
    (mix, {"logits": [[0.0]]}, TypeError, "logits must be a tensor, got list"),
    (mix, {"logits": torch.zeros(N, V, dtype=torch.int64)}, TypeError, "logits has dtype torch.int64"),
    (mix, {"logits": torch.zeros(V)}, ValueError, r"logits has shape \[10\], expected \[N, V\]"),
    (mix, {"logits": torch.zeros(N, 0)}, ValueError, "vocabulary is empty"),
    (mix, {"reference": torch.zeros(N)}, TypeError, "reference has dtype torch.float32"),
    (mix, {"reference": torch.arange(N + 1)}, ValueError, r"reference has shape \[4\], expected \[3\]"),
    (mix, {"reference": META}, ValueError, "reference is on meta, the other tensors on cpu"),
    (mix, {"sample_ids": torch.arange(2)}, ValueError, r"sample_ids has shape \[2\]"),
    (mix, {"sample_ids": torch.zeros(N)}, TypeError, "sample_ids has dtype torch.float32"),
    (mix, {"sample_ids": 3}, TypeError, "sample_ids must be a tensor, got int"),
    (mix, {"positions": torch.arange(4)}, ValueError, r"positions has shape \[4\]"),
    (mix, {"positions": torch.tensor([0, -1, 0])}, ValueError, "positions holds -1"),
    (mix, {"positions": torch.tensor([0, 2**32, 0])}, ValueError, "positions holds 4294967296"),
    (mix, {"positions": META}, ValueError, "positions is on meta"),
    (mix, {"seed": 2**64}, ValueError, "does not fit in 64 bits"),
    (mix, {"seed": -(2**63) - 1}, ValueError, "does not fit in 64 bits"),
    (mix, {"seed": 1.0}, TypeError, "seed must be an int, got float"),
    (mix, {"seed": True}, TypeError, "seed must be an int, got bool"),
    (mix, {"self_prob": -0.1}, ValueError, "self_prob=-0.1 is not accepted; pass 0 <= p <= 1"),
    (mix, {"self_prob": 1.1}, ValueError, "self_prob=1.1"),
    (mix, {"self_prob": float("nan")}, ValueError, "self_prob=nan"),
    (mix, {"self_prob": "0.5"}, TypeError, "self_prob must be a float or a tensor"),
    (mix, {"self_prob": torch.tensor([0.5, 2.0, 0.5])}, ValueError, "self_prob holds 2.0"),
    (mix, {"self_prob": torch.tensor([0.5, 0.5])}, ValueError, r"self_prob has shape \[2\]"),
    (mix, {"self_prob": torch.tensor([0, 1, 1])}, TypeError, "self_prob has dtype torch.int64"),
    (mix, {"temperature": -1.0}, ValueError, "temperature=-1.0 is not accepted; pass a finite temperature >= 0"),
    (mix, {"temperature": float("nan")}, ValueError, "temperature=nan"),
    (mix, {"temperature": float("inf")}, ValueError, "temperature=inf"),
    (mix, {"temperature": torch.tensor([1.0, -1.0, 1.0])}, ValueError, "temperature holds -1.0"),
    (mix, {"temperature": None}, TypeError, "temperature must be a float or a tensor"),
    (mix, {"top_k": 0}, ValueError, "top_k=0 is not accepted; pass an int >= 1"),
    (mix, {"top_k": 2.0}, TypeError, "top_k must be an int or a tensor"),
    (mix, {"top_k": torch.tensor([1, 0, 1])}, ValueError, "top_k holds 0"),
    (mix, {"top_k": torch.ones(N)}, TypeError, "top_k has dtype torch.float32"),
    (mix, {"top_p": 0.0}, ValueError, "top_p=0.0 is not accepted"),
    (mix, {"top_p": 1.5}, ValueError, "top_p=1.5"),
    (mix, {"min_p": -0.1}, ValueError, "min_p=-0.1"),
    (mix, {"min_p": torch.tensor([0.1, 1.1, 0.0])}, ValueError, "min_p holds 1.1"),
    (mix, {"min_reference_prob": 1.5}, ValueError, "min_reference_prob=1.5 is not accepted; pass 0 <= p <= 1"),
    (linear, {"min_reference_prob": torch.tensor([0.1, -1.0, 0.0])}, ValueError, "min_reference_prob holds -1.0"),
    (mix, {"vocab_size": 0}, ValueError, "vocab_size=0 is not accepted; pass 1 <= vocab_size <= V"),
    (mix, {"vocab_size": V + 1}, ValueError, "vocab_size=11"),
    (mix, {"vocab_size": 5.0}, TypeError, "vocab_size must be an int or None, got float"),
    (mix, {"vocab_size": 2}, ValueError, "reference holds 2, which does not exist with vocab_size=2; pass ids below"),
    (linear, {"vocab_size": V + 1}, ValueError, "vocab_size=11"),
    (linear, {"vocab_size": 2}, ValueError, "reference holds 2"),
    (mix, {"status": torch.zeros(2, dtype=torch.int64)}, ValueError, "status has shape"),
    (mix, {"status": torch.zeros(())}, TypeError, "status has dtype torch.float32"),
    (mix, {"status": 0}, TypeError, "status must be a tensor, got int"),
    (linear, {"weight": torch.zeros(V, D + 1)}, ValueError, r"weight has shape \[10, 5\], expected \[V, 4\]"),
    (linear, {"weight": torch.zeros(0, D)}, ValueError, "vocabulary is empty"),
    (linear, {"weight": torch.zeros(V, D).half()}, TypeError, "weight has dtype torch.float16"),
    (linear, {"hidden": torch.zeros(D)}, ValueError, "hidden has shape"),
    (linear, {"bias": torch.zeros(V + 1)}, ValueError, r"bias has shape \[11\]"),
    (linear, {"bias": torch.zeros(V).double()}, TypeError, "bias has dtype torch.float64"),
    (linear, {"softcap": 0.0}, ValueError, "softcap=0.0 is not accepted"),
    (linear, {"softcap": float("nan")}, ValueError, "softcap=nan"),
    (linear, {"logit_scale": 1e300}, ValueError, r"logit_scale=1e\+300 is not accepted; pass 0 or a float with"),
    (linear, {"logit_scale": -1e-39}, ValueError, "logit_scale=-1e-39"),
    (linear, {"softcap": "30"}, TypeError, "softcap must be a float or None, got str"),
]


@pytest.mark.parametrize(
    ("call", "kwargs", "error", "message"), BAD, ids=lambda v: "-".join(v) if type(v) is dict else None
)
def test_sampling_ops_name_the_mistake(call, kwargs, error, message):
    with pytest.raises(error, match=message):
        call(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"size": -1}, ValueError, "size=-1"),
        ({"size": 2**30 + 1}, ValueError, "size=1073741825"),
        ({"size": 2.0}, TypeError, "size must be an int, got float"),
        ({"stream": 16}, ValueError, "stream=16 is not accepted; pass 0 <= stream <= 15"),
        ({"stream": -1}, ValueError, "stream=-1"),
        ({"seed": "0"}, TypeError, "seed must be an int"),
        ({"sample_ids": torch.zeros(N, 1, dtype=torch.int64)}, ValueError, "sample_ids has shape"),
        ({"positions": torch.tensor([-1, 0, 0])}, ValueError, "positions holds -1"),
    ],
)
def test_gumbel_noise_names_the_mistake(kwargs, error, message):
    good = {"seed": 0, "sample_ids": IDS, "positions": IDS, "size": 4, "stream": 1}
    with pytest.raises(error, match=message):
        gumbel_noise(**good | kwargs)


def test_self_mask_names_the_mistake():
    with pytest.raises(ValueError, match="self_prob=2 is not accepted"):
        self_mask(0, IDS, IDS, 2)
    with pytest.raises(ValueError, match=r"self_prob has shape \[1\], expected \[3\]"):
        self_mask(0, IDS, IDS, torch.tensor([0.5]))
