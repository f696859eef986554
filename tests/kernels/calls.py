"""Calls of every public op, with numbers and with tensors as per-row arguments. Tests of what all ops have in common
run over them, so a new op gets these tests with its line here."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import selfgen_kernels

N, V, D = 5, 130, 8
_generator = torch.Generator().manual_seed(0)


def _normal(*shape):
    return torch.randn(shape, generator=_generator)


_IDS = torch.arange(N)
_REFERENCE = _IDS + V
_KEYS = {"seed": 3, "sample_ids": _IDS - 2, "positions": _IDS}
_ROWS = {"temperature": torch.linspace(0, 2, N)}
_FILTERS = {"top_k": 9, "top_p": 0.9, "min_p": 0.01}
_FILTER_ROWS = {"top_k": _IDS + 1, "top_p": torch.linspace(0.5, 1, N), "min_p": torch.linspace(0, 1, N)}
_PROBS = torch.linspace(0, 1, N)
_HEAD = {"hidden": _normal(N, D), "weight": _normal(V, D)}
_CAPPED = {"bias": _normal(V), "softcap": 30.0, "logit_scale": 0.5}
_CONFIDENT = {"reference": _IDS, "self_prob": 0.9, **_KEYS, "min_reference_prob": _PROBS / 50}
_STATUS = torch.zeros((), dtype=torch.int64)
_PARTS = {"values": _normal(2, N, 3, 3), "ids": torch.arange(2 * N * 3).view(2, N, 3), "reference": _REFERENCE}
_CACHE = {
    "query": _normal(3, 4, 8),
    "key": _normal(9, 2, 8),
    "value": _normal(9, 2, 8),
    "cu_seqlens_q": torch.tensor([0, 1, 3], dtype=torch.int32),
    "kv_ranges": torch.tensor([[0, 4], [4, 5]]),
}

_APPEND = {
    "key_cache": _normal(9, 2, 8),
    "value_cache": _normal(9, 2, 8),
    "key": _normal(3, 2, 8),
    "value": _normal(3, 2, 8),
    "slots": torch.tensor([4, -1, 0]),
}
_NEXT_SELF = torch.tensor([2, 2, 4, 4, 4, 7, 7, 7, 8])  # two rows of slots, 0 to 4 and 5 to 8

EXAMPLES = {
    "gumbel_noise": [{**_KEYS, "size": 10, "stream": 1}],
    "self_mask": [{**_KEYS, "self_prob": 0.5}, {**_KEYS, "self_prob": _PROBS}],
    "sample_mix": [
        {"logits": _normal(N, V), "reference": _REFERENCE, "self_prob": 0.5, **_KEYS},
        {"logits": _normal(N, V), "reference": _REFERENCE, "self_prob": 0.9, **_KEYS, **_FILTERS, "status": _STATUS},
        {"logits": _normal(N, V), "reference": _REFERENCE, "self_prob": _PROBS, **_KEYS, **_ROWS, **_FILTER_ROWS},
        {"logits": _normal(N, V), **_CONFIDENT, "vocab_size": 100},
    ],
    "linear_sample_mix": [
        {**_HEAD, "reference": _REFERENCE, "self_prob": 0.5, **_KEYS},
        {**_HEAD, **_CAPPED, "reference": _REFERENCE, "self_prob": 0.9, **_KEYS, **_FILTERS, "status": _STATUS},
        {**_HEAD, "reference": _REFERENCE, "self_prob": _PROBS, **_KEYS, **_ROWS, **_FILTER_ROWS},
        {**_HEAD, **_CAPPED, **_CONFIDENT, "vocab_size": 100},
    ],
    "linear_sample_shard": [
        {**_HEAD, "first_id": 77, "self_prob": 0.5, **_KEYS, "vocab_size": 150},
        {**_HEAD, **_CAPPED, "first_id": 0, "self_prob": _PROBS, **_KEYS, **_ROWS},
    ],
    "combine_shards": [
        {**_PARTS, "self_prob": 0.5, **_KEYS, "status": _STATUS},
        {**_PARTS, "self_prob": _PROBS, **_KEYS, **_ROWS, "vocab_size": 200},
    ],
    "kv_append": [_APPEND],
    "invariant_linear": [_HEAD, {**_HEAD, "bias": _normal(V)}],
    "act_mul": [
        {"gate": _normal(3, D), "up": _normal(3, D)},
        {"gate": _normal(3, 2, D).bfloat16(), "up": _normal(3, 2, D).bfloat16(), "activation": "gelu_tanh"},
    ],
    "rotary": [
        {"query": _normal(3, 4, D), "key": _normal(3, 2, D), "cos": _normal(3, D), "sin": _normal(3, D)},
        {
            "query": _normal(3, 4, D).bfloat16(),
            "key": _normal(3, 2, D).bfloat16(),
            "cos": _normal(3, D),
            "sin": _normal(3, D),
            "keep_dtype": True,
        },
    ],
    "rotary_append": [
        {**_APPEND, "query": _normal(3, 4, 8), "cos": _normal(3, 8), "sin": _normal(3, 8)},
        {
            **{name: x.bfloat16() if x.is_floating_point() else x for name, x in _APPEND.items()},
            "query": _normal(3, 4, 8).bfloat16(),
            "cos": _normal(3, 8),
            "sin": _normal(3, 8),
            "keep_dtype": True,
        },
    ],
    "rms_norm": [
        {"x": _normal(3, D), "weight": _normal(D), "eps": 1e-6},
        {"x": _normal(3, 2, D).bfloat16(), "weight": _normal(D), "eps": 1e-5, "form": "gemma"},
    ],
    "add_rms_norm": [
        {"x": _normal(3, D), "residual": _normal(3, D), "weight": _normal(D), "eps": 1e-6},
        {
            "x": _normal(3, 2, D).bfloat16(),
            "residual": _normal(3, 2, D),
            "weight": _normal(D),
            "eps": 1e-5,
            "form": "olmo2",
        },
    ],
    "plan_pass": [
        {
            "final": torch.tensor([0, 5]),
            "row_starts": torch.tensor([0, 5]),
            "next_self": _NEXT_SELF,
            "log_chance": torch.full((9,), -0.5),
            "token_budget": 6,
            **extra,
        }
        for extra in ({}, {"least_log_chance": torch.tensor([-0.3, -1.0])})
    ],
    "commit_pass": [
        {
            "tokens": torch.arange(9),
            "final": torch.tensor([0, 5]),
            "slots": torch.tensor([0, 1, 5, 6, -1]),
            "cu_seqlens_q": torch.tensor([0, 2, 4], dtype=torch.int32),
            "next_self": _NEXT_SELF,
            "sampled": torch.arange(5) + 20,
        }
    ],
    "ragged_attention": [
        _CACHE,
        {**_CACHE, "scale": 0.1, "sliding_window": 3, "softcap": 30.0, "sinks": _normal(4)},
    ],
}
"""By the name of the public function: keyword arguments of calls. The first call of each takes no tensor [N] where a
number will do."""

CALLS = [(name, i) for name, calls in EXAMPLES.items() for i in range(len(calls))]


def call(name, **arguments):
    return getattr(selfgen_kernels, name)(**arguments)


def copied(arguments):
    """The arguments with fresh copies of their tensors, for ops that write to some."""
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


class Recorder(TorchDispatchMode):
    """Remembers the calls of this library's operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "selfgen":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def as_tuple(result):
    if result is None:  # an op that only writes to its arguments
        return ()
    return result if isinstance(result, tuple | list) else (result,)
