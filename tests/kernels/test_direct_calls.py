"""The operators without their public functions: `torch.ops.selfgen` on CPU tensors that nobody has checked.

Whatever size or dtype does not fit the others is refused before anything is read or written. `make sanitize` runs this
file on kernels built with AddressSanitizer and UBSan.
"""

import re

import pytest
import torch
from calls import CALLS, EXAMPLES, Recorder, call, copied
from conftest import require_cpp

from selfgen_kernels.ops import OPS as TABLE

require_cpp()

OPS = torch.ops.selfgen
FITS = {
    ("ragged_attention", "query", "longer"),  # padding
    ("sample_mix", "logits", "wider"),  # another vocabulary, as in the next
    ("sample_mix", "logits", "narrower"),
    ("invariant_linear", "hidden", "longer"),
    ("invariant_linear", "hidden", "shorter"),
    ("invariant_linear", "hidden", "empty"),
    ("invariant_linear", "weight", "longer"),  # without a bias, as in the next
    ("invariant_linear", "weight", "shorter"),
    ("invariant_linear", "weight", "empty"),
    ("linear_sample_mix", "weight", "longer"),
    ("linear_sample_mix", "weight", "shorter"),
    ("linear_sample_shard", "weight", "longer"),
    ("linear_sample_shard", "weight", "shorter"),
    ("linear_reference_log_prob", "weight", "longer"),
    ("linear_reference_log_prob", "weight", "shorter"),
    *(("rms_norm", "x", change) for change in ("longer", "shorter", "empty")),  # rows
    ("combine_shards", "threshold", "one axis less"),  # a number for all rows, as in the next; C++ kernels take none
    ("combine_shards", "inv_temperature", "one axis less"),
}
"""What has a meaning: (operator, argument, change)."""
TORCH_ONLY = [f"selfgen::{name}" for name, op in TABLE.items() if not op.kernels]
"""Torch code on every device, to which a dtype is no matter of memory."""


def changes(tensor):
    """(name, tensor changed in one way); none of the dtypes is accepted in place of the right one."""
    yield "shorter", tensor[:-1]
    yield "empty", tensor[:0]
    yield "longer", torch.cat([tensor, tensor[-1:]])
    yield "wider", torch.cat([tensor, tensor[..., -1:]], -1)
    yield "narrower", tensor[..., :-1]
    yield "flat", tensor.flatten()
    yield "one axis more", tensor[..., None]
    yield "one axis more in front", tensor[None]
    yield "one axis less", tensor[0]
    for dtype in (torch.bool, torch.uint8, torch.complex64, torch.int64 if tensor.is_floating_point() else torch.float):
        yield str(dtype), tensor.to(dtype)


@pytest.mark.parametrize("example", CALLS, ids=lambda call: f"{call[0]}-{call[1]}")
def test_a_tensor_that_does_not_fit_is_refused(example):
    name, i = example
    with Recorder() as recorder:
        call(name, **copied(EXAMPLES[name][i]))
    silent = []
    for op, args in recorder.calls:
        names = [argument.name for argument in op._schema.arguments]
        for place, tensor in enumerate(args):
            if not isinstance(tensor, torch.Tensor):
                continue
            for change, changed in changes(tensor):
                if changed.shape == tensor.shape and changed.dtype == tensor.dtype:
                    continue
                if op.name() in TORCH_ONLY and changed.dtype != tensor.dtype:
                    continue
                given = [changed if at == place else arg for at, arg in enumerate(args)]
                given = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in given]
                case = (name, names[place], change)
                has_bias = "bias" in names and args[names.index("bias")] is not None
                if case in FITS and not (has_bias and names[place] == "weight"):
                    op(*given)
                    continue
                try:
                    op(*given)
                except (ValueError, TypeError, RuntimeError):
                    continue
                silent.append(case)
    assert not silent, f"{len(silent)} calls ran on tensors that do not fit: {silent}"


KEYS = torch.arange(4), torch.arange(4)
MASK = torch.full((4,), 2**32)
ROWS = MASK, 3, *KEYS, torch.ones(4)
SAMPLING = torch.arange(4), *ROWS, None, None, None
HEAD = torch.ones(4, 8), torch.ones(70, 8), None, None, 1.0
ONE_CHUNK = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([[0, 9]])
NO_SINKS = None, None


def ones(*shape):
    return torch.ones(shape)


def attend(query=(3, 4, 8), kv=(9, 2, 8), window=None):
    return OPS.ragged_attention(ones(*query), ones(*kv), ones(*kv), *ONE_CHUNK, 1.0, window, *NO_SINKS)


def plan(token_budget):
    return OPS.plan_pass(torch.zeros(1).long(), torch.zeros(1).long(), torch.arange(4), torch.zeros(4), token_budget)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: OPS.gumbel_noise(3, *KEYS, -1, 1), "size=-1"),
        (lambda: OPS.gumbel_noise(3, *KEYS, 2**30 + 1, 1), "size=1073741825"),
        (lambda: OPS.gumbel_noise(3, *KEYS, 4, 16), "stream=16"),
        (lambda: OPS.sample_mix(ones(4, 0), *SAMPLING), "the vocabulary is empty"),
        (lambda: OPS.linear_sample_mix(ones(4, 8), ones(0, 8), *HEAD[2:], *SAMPLING), "the vocabulary is empty"),
        (lambda: OPS.reference_log_prob(ones(4, 0), *SAMPLING[:5]), "the vocabulary is empty"),
        (
            lambda: OPS.linear_reference_log_prob(ones(4, 8), ones(0, 8), *HEAD[2:], *SAMPLING[:5]),
            "the vocabulary is empty",
        ),
        *(
            (lambda first=first: OPS.linear_sample_shard(*HEAD, first, *ROWS), f"first_id={first}")
            for first in (-1, -(2**63), 2**31, 2**63 - 1)
        ),
        (lambda: attend(kv=(9, 0, 8)), "4 query heads of size 8 cannot share 0 K/V heads"),
        (lambda: attend(kv=(9, 3, 8)), "cannot share 3 K/V heads"),
        (lambda: attend(query=(3, 4, 0), kv=(9, 2, 0)), "query heads of size 0"),
        *(
            (lambda window=window: attend(window=window), f"sliding_window={window}")
            for window in (0, -5, -(2**31) - 5, -(2**63))
        ),
        (lambda: OPS.rms_norm(ones(4, 0), ones(0), 1e-6, False, True), "x has rows of 0 numbers"),
        (lambda: OPS.rms_norm(ones(1, 2**14 + 1), ones(2**14 + 1), 1e-6, False, True), "x has rows of 16385 numbers"),
        (lambda: plan(-1), "token_budget=-1"),
        (lambda: plan(2**31), "token_budget=2147483648"),
    ],
)
def test_a_number_out_of_range_is_refused(run, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run()


def test_slots_at_the_ends_of_int64_do_not_overflow():
    for slot in (2**63 - 1, -(2**63)):
        slots, bounds = torch.tensor([slot]), torch.tensor([0, 1], dtype=torch.int32)
        tokens, far = torch.arange(3), torch.full((1,), -slot - 1)
        changed, observed = OPS.commit_pass(tokens, far.clone(), slots, bounds, torch.tensor([1, 2, 2]), slots)
        assert not (changed | observed).any()
        assert tokens.tolist() == [0, 1, 2]
        _, planned, _ = OPS.plan_pass(slots, far, torch.tensor([1, 2, 2]), torch.zeros(3), 5)
        assert planned.tolist() == [0, 0]


def test_more_keys_than_lanes_count_are_refused():
    cache = ones(1, 1, 1).expand(2**31 + 64, 1, 1)
    bounds = torch.tensor([0, 1], dtype=torch.int32)
    most = OPS.ragged_attention(ones(1, 1, 1), cache, cache, bounds, torch.tensor([[9, 2**30]]), 1.0, 5, *NO_SINKS)
    assert most.item() == 1
    for keys in (2**30 + 1, 2**31 + 32):
        with pytest.raises(ValueError, match=r"and at most 2\*\*30"):
            OPS.ragged_attention(ones(1, 1, 1), cache, cache, bounds, torch.tensor([[0, keys]]), 1.0, 5, *NO_SINKS)
