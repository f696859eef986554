"""Triton's head on random numbers: rounded as the reference's, and no work for rows that keep their reference."""

import pytest
import torch
from oracles import assert_same_tokens
from torch.utils._python_dispatch import TorchDispatchMode

from selfgen_kernels.backends.reference import head as reference
from selfgen_kernels.backends.reference.head import head_logits
from selfgen_kernels.backends.reference.sampling import is_self_of
from selfgen_kernels.backends.reference.scaling import scaled
from selfgen_kernels.call import Head, Sampling

pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available()
pytestmark = (
    pytest.mark.gpu if ON_GPU else pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
)
INTERPRETED = pytest.mark.skipif(ON_GPU, reason="the guard is one of the interpreter")
INF = float("inf")
NEAR_TIES = 1e-4  # at most this part of the rows: none of the few here
FILTERS = [{}, {"top_k": 9}, {"top_p": 0.9, "min_p": 0.01}]


def random_head(n, width, vocab_size, dtype, **settings):
    generator = torch.Generator().manual_seed(0)
    tensors = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((n, width), (vocab_size, width)))
    return *tensors, settings.get("bias"), settings.get("softcap"), settings.get("logit_scale", 1.0)


def rows_of(n, threshold=2**32, inv_temperature=1.0, top_k=None, top_p=None, min_p=None):
    """The arguments of a `Sampling`."""
    numbers = ((top_k, torch.int64), (top_p, torch.float64), (min_p, torch.float64))
    filters = (None if value is None else torch.full((n,), value, dtype=dtype) for value, dtype in numbers)
    threshold = threshold if isinstance(threshold, torch.Tensor) else torch.full((n,), threshold)
    ids = torch.arange(n)
    return threshold, 5, ids, ids % 7, torch.full((n,), inv_temperature), *filters


def in_triton(*args):
    from selfgen_kernels.backends.triton import head

    device = "cuda" if ON_GPU else "cpu"
    there = (value.to(device) if isinstance(value, torch.Tensor) else value for value in args)
    return [result.cpu() for result in head.linear_sample_mix(*there)]


# ---- Rounding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inv_temperature", [1.0, INF])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.each_value
def test_logits_are_rounded_as_those_of_the_reference(dtype, inv_temperature, with_bias):
    """To the head's dtype, after the bias."""
    n, vocab_size = 64, 256
    bias = torch.randn(vocab_size, generator=torch.Generator().manual_seed(1)).to(dtype) if with_bias else None
    settings = {"bias": bias, "softcap": 30.0, "logit_scale": 0.9} if with_bias else {}
    head = random_head(n, 64, vocab_size, dtype, **settings)
    kept = torch.zeros(n, dtype=torch.int64)
    rows = rows_of(n, inv_temperature=inv_temperature)
    got, want = in_triton(*head, kept, *rows)[0], reference.linear_sample_mix(*head, kept, *rows)[0]
    if inv_temperature == INF:
        assert torch.equal(got, want)  # noise has no part in it
    else:
        z = scaled(head_logits(Head(*head)), rows[4])
        keys = {"seed": rows[1], "sample_ids": rows[2], "positions": rows[3]}
        assert assert_same_tokens(got, want, z, **keys) <= NEAR_TIES * n


@pytest.mark.parametrize(("dtype", "offset"), [(torch.bfloat16, 16.0), (torch.float16, 64.0)])
def test_a_filter_that_keeps_all_changes_nothing(dtype, offset):
    """With whole numbers just above those that `dtype` has: every sum is exact, and its rounding decides."""
    n, vocab_size = 12, 200
    hidden, weight, *rest = random_head(n, 32, vocab_size, torch.float32)
    hidden, weight = (x.mul(2).round().to(dtype) for x in (hidden, weight))
    hidden[:, 0] = weight[:, 0] = offset
    head, kept = (hidden, weight, *rest), torch.zeros(n, dtype=torch.int64)
    exact = hidden.double() @ weight.double().T
    assert (exact != head_logits(Head(*head))).double().mean() > 0.2
    for inv_temperature in (1.0, INF):
        plain = in_triton(*head, kept, *rows_of(n, inv_temperature=inv_temperature))
        want = reference.linear_sample_mix(*head, kept, *rows_of(n, inv_temperature=inv_temperature))
        kept_all = in_triton(*head, kept, *rows_of(n, inv_temperature=inv_temperature, top_k=vocab_size))
        unrounded = (hidden.float(), weight.float(), *rest)
        other = reference.linear_sample_mix(*unrounded, kept, *rows_of(n, inv_temperature=inv_temperature))
        assert torch.equal(plain[0], want[0])
        assert torch.equal(kept_all[0], plain[0])
        assert not torch.equal(other[0], want[0])


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's, on 1e39 as fp32
def test_bf16_is_rounded_to_nearest_even():
    """The helper against torch, at what lies around the edges of bf16's numbers."""
    import specimens

    bits = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(0)).int()
    bits[::3] = (bits[::3] & ~0xFFFF) | 0x8000  # ties
    bits[1::6] |= 0x7F0000  # what carries into the exponent
    x = bits.view(torch.float32)
    x[:5] = torch.tensor([0.0, -0.0, INF, -INF, torch.nan])
    out = torch.zeros(4096, dtype=torch.bfloat16)
    x, out = (value.cuda() if ON_GPU else value for value in (x, out))
    specimens.rounding_kernel[(1,)](x, out, SIZE=4096)
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


# ---- Rows that keep their reference ----------------------------------------------------------------------------------


class UntouchedByTorch(TorchDispatchMode):
    """Fails where torch, rather than a kernel, computes with a tensor; to look at its layout is no computing."""

    def __init__(self, tensor):
        super().__init__()
        self.storage = tensor.untyped_storage().data_ptr()

    def is_it(self, value):
        return isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() == self.storage

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name, kwargs or {}
        of_interpreter = name in ("aten::new_empty", "aten::set_") or (name == "aten::copy_" and self.is_it(args[0]))
        if any(self.is_it(value) for value in (*args, *kwargs.values())):
            assert func.is_view or of_interpreter, f"{func} of the whole tensor"
        return func(*args, **kwargs)


@INTERPRETED
@pytest.mark.parametrize(
    ("filters", "selected"),
    [*((some, rows) for some in FILTERS[::2] for rows in ((), (3,), (0, 2, 4), range(5))), (FILTERS[1], (0, 2, 4))],
    ids=lambda value: "+".join(map(str, value)) or "none",
)
def test_hidden_states_of_other_rows_are_not_read(filters, selected):
    from guard import disowned, guarded
    from triton.runtime.errors import InterpreterError

    n = 5
    threshold = torch.zeros(n, dtype=torch.int64)
    threshold[list(selected)] = 2**32
    head, kept = random_head(n, 32, 150, torch.float32), torch.arange(n) + 1000
    rows = rows_of(n, threshold, **filters)
    want = reference.linear_sample_mix(*head, kept, *rows)
    others = [head[0][row] for row in range(n) if row not in selected]
    with guarded() as launches, disowned(*others):
        got = in_triton(*head, kept, *rows)
    assert launches
    with UntouchedByTorch(head[0]):
        in_triton(*head, kept, *rows)
    assert is_self_of(Sampling(*rows).mask).sum() == len(selected)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, want, strict=True))
    if selected:  # the measure itself does see it
        with (
            guarded(),
            disowned(head[0][selected[-1]]),
            pytest.raises(InterpreterError, match="outside of every tensor"),
        ):
            in_triton(*head, kept, *rows)
    with UntouchedByTorch(head[0]), pytest.raises(AssertionError, match="of the whole tensor"):
        reference.linear_sample_mix(*head, kept, *rows)


@pytest.mark.parametrize("filters", FILTERS, ids=lambda f: "+".join(f) or "none")
def test_noise_is_made_for_self_rows_only(filters, monkeypatch):
    from selfgen_kernels.backends.triton import head

    made, gumbel_noise = [], head.gumbel_noise

    def spy(*args):
        made.append(gumbel_noise(*args))
        return made[-1]

    monkeypatch.setattr(head, "gumbel_noise", spy)
    n = 16
    rows = rows_of(n, 2**31, **filters)
    torch.use_deterministic_algorithms(True, warn_only=True)  # what is not written is NaN
    try:
        in_triton(*random_head(n, 16, 70, torch.float32), torch.zeros(n, dtype=torch.int64), *rows)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(made) == (0 if filters else 1)
    for noise in made:
        written = ~noise.isnan().all(1).cpu()
        assert 0 < written.sum() == is_self_of(Sampling(*rows).mask).sum() < n
