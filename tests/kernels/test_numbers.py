"""Numbers for all rows of a call: what a GPU is asked for, nothing, and that the results are those of tensors [N]."""

import pytest
import torch
from calls import as_tuple
from conftest import _TRITON, DEVICE, INTERPRETER_ONLY, moved
from torch.utils._python_dispatch import TorchDispatchMode

from selfgen_kernels import linear_sample_mix, sample_mix, self_mask
from selfgen_kernels.backends.reference import head as reference_head
from selfgen_kernels.backends.reference import philox
from selfgen_kernels.call import Sampling, in_rows
from selfgen_kernels.ops.rows import inverse_temperature, mask_threshold

FREE = {"detach", "slice", "select", "view", "alias"}  # of tensors on a device: no launch
N, V = 5, 130
FILTERS = {"top_k": 50, "top_p": 0.9, "min_p": 0.01}


class Computed(TorchDispatchMode):
    """The names of the operators that give a tensor of a device, or look at one and give none."""

    def __init__(self, device):
        super().__init__()
        self.device, self.names = device, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = [value for value in as_tuple(result) if isinstance(value, torch.Tensor)] or args
        if any(isinstance(value, torch.Tensor) and value.device.type == self.device for value in given):
            self.names.append(func.__name__.partition(".")[0])
        return result


def on_a_device(**more):
    """The arguments of a call on "meta", as a GPU's would be, but for what nobody computes."""
    ids = torch.arange(N, device="meta")
    logits = torch.empty(N, V, device="meta")
    return {"logits": logits, "reference": ids, "self_prob": 0.3, "seed": 1, "sample_ids": ids, "positions": ids} | more


@pytest.mark.parametrize("how", [{}, {"temperature": 0.0}, {"temperature": 0.7, **FILTERS}], ids=str)
def test_numbers_launch_nothing(how):
    rows = on_a_device(**how)
    with Computed("meta") as computed:
        sample_mix(**rows)
    assert set(computed.names) - FREE == {"sample_mix"}
    with Computed("meta") as computed:
        self_mask(1, rows["sample_ids"], rows["positions"], 0.5)
    assert set(computed.names) - FREE == {"self_mask"}
    rows = on_a_device(temperature=torch.ones(N, device="meta"))
    with Computed("meta") as computed:  # the measure sees what a tensor takes
        sample_mix(**rows)
    assert len(computed.names) > 5


def test_a_least_probability_takes_a_comparison_and_a_product():
    rows = on_a_device(min_reference_prob=0.1)
    with Computed("meta") as computed:
        sample_mix(**rows)
    assert sorted(set(computed.names) - FREE) == ["ge", "mul", "reference_log_prob", "sample_mix"]


def test_a_head_takes_them_too():
    rows = on_a_device()
    del rows["logits"]
    head = torch.empty(N, 8, device="meta"), torch.empty(V, 8, device="meta")
    with Computed("meta") as computed:
        linear_sample_mix(*head, **rows)
    assert set(computed.names) - FREE == {"linear_sample_mix"}


def numbers(self_prob, temperature, top_k=None, top_p=None, min_p=None):
    """A `Sampling` of N rows whose numbers are as the public functions make them on a GPU."""
    like, ids = torch.empty(N, device="meta"), torch.arange(N)
    threshold, inverse = mask_threshold(self_prob, like), inverse_temperature(temperature, like)
    filters = zip((top_k, top_p, min_p), (torch.int64, torch.float64, torch.float64), strict=True)
    return Sampling(
        threshold, 3, ids, ids, inverse, *(None if x is None else torch.tensor(x, dtype=kind) for x, kind in filters)
    )


CASES = [
    (0.3, 1.0), (0.5, 0.7), (0.6, 0.0), (1.0, 1e30), (0.0, 1.0), (2.0**-32, 1.0), (1.0, 1.3, 1), (0.9, 1.0, 10**12),
    (1.0, 1.0, None, 1 - 2**-53), (1.0, 0.5, None, 5e-324), (1.0, 1.0, None, 1.0), (1.0, 1.0, None, None, 0.0),
    (1.0, 1.0, None, None, 1e-300), (1.0, 0.8, 40, 0.3, 0.05),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_numbers_are_those_of_tensors(case):
    like = torch.empty(N)
    self_prob, temperature, *_ = case
    got, want = in_rows(numbers(*case)), (mask_threshold(self_prob, like), inverse_temperature(temperature, like))
    assert torch.equal(got.threshold, want[0])
    assert torch.equal(got.inv_temperature, want[1])
    for value, share in zip(got[5:], case[2:], strict=False):
        assert share is None or value.tolist() == [share] * N


def test_a_mask_is_a_probability_of_0_or_1():
    mask, like = torch.arange(N) % 2 == 0, torch.empty(N)
    assert torch.equal(mask_threshold(mask, like), mask_threshold(mask.double(), like))
    with Computed("cpu") as computed:
        mask_threshold(mask, like)
    assert computed.names == ["mul"]


@pytest.mark.parametrize("fast", [_TRITON], indirect=True)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_give_the_same_for_both(fast, reference, case):
    logits = torch.randn(N, V, generator=torch.Generator().manual_seed(0)) * 3
    how, kept = numbers(*case), torch.arange(N) + 1000
    want = reference.sampling.sample_mix(logits, kept, *in_rows(how))
    on_reference = reference.sampling.sample_mix(logits, kept, *how)
    rows = moved((logits, kept, how.sample_ids, how.positions), DEVICE)
    there = how._replace(sample_ids=rows[2], positions=rows[3])
    got = fast.sampling.sample_mix(*rows[:2], *there)
    for ours, theirs, others in zip(got, want, on_reference, strict=True):
        assert torch.equal(ours.cpu(), theirs)
        assert torch.equal(others, theirs)
    assert torch.equal(fast.noise.self_mask(*there.mask[1:], there.threshold).cpu(), want[1])
    log_probs = [
        ops.sampling.reference_log_prob(*args, *mask).cpu()
        for ops, args, mask in ((fast, rows[:2], there.mask), (reference, (logits, kept), in_rows(how.mask)))
    ]
    assert torch.equal(*log_probs)


def test_every_op_of_the_reference_takes_both():
    how = numbers(0.5, 0.7)
    head, kept = (torch.randn(N, 8), torch.randn(V, 8), None, None, 1.0), torch.arange(N)
    parts = [reference_head.linear_sample_shard(*head, 0, *how.draw)]
    values, ids = (torch.stack(part) for part in zip(*parts, strict=True))
    for got, want in (
        (
            reference_head.linear_sample_mix(*head, kept, *how),
            reference_head.linear_sample_mix(*head, kept, *in_rows(how)),
        ),
        (parts[0], reference_head.linear_sample_shard(*head, 0, *in_rows(how).draw)),
        (
            reference_head.combine_shards(values, ids, kept, *how.draw),
            reference_head.combine_shards(values, ids, kept, *in_rows(how).draw),
        ),
        (
            [reference_head.linear_reference_log_prob(*head, kept, *how.mask)],
            [reference_head.linear_reference_log_prob(*head, kept, *in_rows(how.mask))],
        ),
    ):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, want, strict=True))
    masks = [philox.self_mask(*mask[1:], mask.threshold) for mask in (how.mask, in_rows(how.mask))]
    assert torch.equal(*masks)


@INTERPRETER_ONLY
@pytest.mark.parametrize(
    ("filters", "launches"), [({}, 1), ({"min_p": 0.1}, 3), ({"top_k": 9}, 4), (FILTERS, 4)], ids=str
)
def test_launches_of_triton_are_all_there_is(monkeypatch, filters, launches):
    """Besides allocations, and the zeros that programs meet at."""
    pytest.importorskip("triton")
    from triton.runtime import interpreter

    from selfgen_kernels.backends.triton import sampling

    launched = []
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda self, *_, **__: launched.append(self.fn.__name__))
    rows = torch.zeros(N, V), torch.arange(N), *numbers(0.5, 0.7, **filters)
    with Computed("cpu") as computed:
        sampling.sample_mix(*rows)
    assert len(launched) == launches
    of_numbers = {"_local_scalar_dense", "clamp"}  # of which there are some, on the host
    assert set(computed.names) - FREE - of_numbers == {"empty_like", "new_empty", "new_zeros"} - (
        set() if filters else {"new_empty"}
    )


def test_an_integer_has_one_type_whatever_it_is():
    """Triton takes one below 2^31 for 32 bits, and would compile anew for another."""
    pytest.importorskip("triton")
    from selfgen_kernels.backends.triton.rows import for_rows

    for value in (0.0, 0.7, float("inf")):
        assert 2**31 <= for_rows(torch.tensor(value)) < 2**63
    for value in (0, 1, 2**31, 2**32, 2**62, 2**63 - 1):
        assert 2**31 <= for_rows(torch.tensor(value)) < 2**63
    for share in (0.0, 5e-324, 0.5, 1 - 2**-53, 1.0):
        assert 2**31 <= for_rows(torch.tensor(share, dtype=torch.float64)) < 2**63
