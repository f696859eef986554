"""sample_mix: every backend against the reference, invariances, edge cases, and the filters against transformers'."""

import pytest
import torch
from conftest import _TRITON, INTERPRETER_ONLY
from hypothesis import given
from hypothesis import strategies as st

from selfgen_kernels import sample_mix
from selfgen_kernels.backends.reference.philox import GROUP, TOKEN, gumbel_noise
from selfgen_kernels.backends.reference.sampling import scaled_and_filtered
from selfgen_kernels.backends.reference.scaling import filter_cutoff
from selfgen_kernels.call import Sampling, unscaled

INF = float("inf")
FILTERS = [{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 50, "top_p": 0.9, "min_p": 0.01}]


def random_logits(n, vocab_size, dtype=torch.float32, seed=0):
    return (torch.randn(n, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def draw(logits, **kwargs):
    """Tokens [N] of the public function with every row a self row."""
    n = len(logits)
    keys = {"seed": 0, "sample_ids": torch.arange(n), "positions": torch.zeros(n, dtype=torch.int64)}
    return sample_mix(logits, torch.full((n,), -7), 1.0, **(keys | kwargs))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("filters", FILTERS, ids=lambda f: "+".join(f) or "none")
@pytest.mark.each_pair
def test_backends_agree(fast, reference, dtype, filters):
    n = 5 if fast.name == "triton" and fast.device == "cpu" else 200
    logits = random_logits(n, 3001, dtype)
    inv_temperature = torch.ones(n)
    inv_temperature[::3], inv_temperature[1::3] = INF, 1.25  # a third greedy
    how = {"threshold": 2**31, "inv_temperature": inv_temperature, "seed": 2, **filters}
    got, want = fast.sample_mix(logits, **how), reference.sample_mix(logits, **how)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[2], want[2])
    assert 0 < want[1].sum() < n


@pytest.mark.parametrize("vocab_size", [1, 2, 63, 64, 65, 128, 8192, 8193])
def test_any_vocabulary_size(backend, reference, vocab_size):
    logits = random_logits(3, vocab_size)
    tokens, _, invalid = backend.sample_mix(logits)
    assert torch.equal(tokens, reference.sample_mix(logits)[0])
    assert ((tokens >= 0) & (tokens < vocab_size)).all()
    assert not invalid.any()


@pytest.mark.parametrize("fast", [_TRITON], indirect=True)
@pytest.mark.parametrize(
    ("span", "part", "block", "step"),
    [(64, 2048, 2048, 16), (4, 64, 64, 2), pytest.param(16, 128, 256, 4, marks=pytest.mark.slow)],
)
@pytest.mark.one_case
def test_sizes_of_tiles_do_not_matter(fast, reference, span, part, block, step, monkeypatch):
    from selfgen_kernels.backends.triton import filters, sampling

    logits = random_logits(4, 1100)  # 18 groups, in one tile of the sizes that ship
    how = {"inv_temperature": torch.tensor([1.0, 0.1, 2.0, INF]), "seed": 3}
    cases = [(logits, {}), (logits.bfloat16(), {"top_k": 60, "top_p": 0.9, "min_p": 0.001})]
    shipped = [fast.sample_mix(x, **how, **case) for x, case in cases]
    sizes = (sampling, "SPAN", span), (filters, "SPAN", part), (filters, "BLOCK", block), (filters, "STEP", step)
    for module, name, value in sizes:
        assert getattr(module, name) != value
        monkeypatch.setattr(module, name, value)
    for (x, case), before in zip(cases, shipped, strict=True):
        got = fast.sample_mix(x, **how, **case)
        assert all(torch.equal(a, b) for a, b in zip(got, before, strict=True))
        assert torch.equal(got[0], reference.sample_mix(x, **how, **case)[0])


@INTERPRETER_ONLY
@pytest.mark.parametrize("fast", [_TRITON], indirect=True)
def test_programs_may_run_in_any_order(fast, reference, monkeypatch):
    from triton.runtime.interpreter import interpreter_builder

    from selfgen_kernels.backends.triton import sampling

    monkeypatch.setattr(sampling, "SPAN", 4)
    logits = random_logits(3, 1100).round()  # five spans, and ties
    logits[2, 500] = torch.nan
    how = {"inv_temperature": torch.tensor([1.0, INF, 1.0]), "seed": 3}
    want, usual = reference.sample_mix(logits, **how), interpreter_builder.set_grid_idx
    for order in (range(5), range(4, -1, -1), (2, 4, 0, 3, 1)):
        monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda x, y, z, order=order: usual(x, order[y], z))
        got = fast.sample_mix(logits, **how)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, want, strict=True))


def test_the_rule_by_hand(backend):
    """The specification once more, as one would write it on paper."""
    logits = random_logits(4, 200)
    ids, positions = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    group_noise = gumbel_noise(0, ids, positions, 4, GROUP)  # [4, 4]
    token_noise = gumbel_noise(0, ids, positions, 64, TOKEN)  # [4, 64]
    expected = []
    for row in range(4):
        groups = logits[row].split(64)
        scores = [group.logsumexp(0) + group_noise[row, g] for g, group in enumerate(groups)]
        best = int(torch.stack(scores).argmax())
        expected.append(64 * best + int((groups[best] + token_noise[row, : len(groups[best])]).argmax()))
    assert backend.sample_mix(logits)[0].tolist() == expected


def test_rows_do_not_see_their_batch(backend, rows):
    rows["inv_temperature"] = torch.ones(12)
    rows["top_k"] = torch.tensor([5, 900] * 6)
    tokens, is_self, _ = backend.sample_mix(**rows)
    order = torch.arange(11, -1, -1)
    shuffled = backend.sample_mix(**{name: value[order] for name, value in rows.items()})
    assert torch.equal(shuffled[0], tokens[order])
    assert torch.equal(shuffled[1], is_self[order])
    for row in range(0, 12, 4):
        alone = backend.sample_mix(**{name: value[row : row + 1] for name, value in rows.items()})
        assert alone[0].item() == tokens[row]


@given(
    n=st.integers(1, 9),
    vocab_size=st.integers(1, 400),
    seed=st.integers(-(2**63), 2**64 - 1),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    top_k=st.none() | st.integers(1, 500),
    top_p=st.none() | st.floats(0.01, 1.0),
    self_prob=st.floats(0, 1),
    data=st.data(),
)
def test_a_row_alone_gives_the_same_token(n, vocab_size, seed, temperature, top_k, top_p, self_prob, data):
    logits = random_logits(n, vocab_size, seed=seed % 1000)
    ids = torch.tensor(data.draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=n, max_size=n)))
    positions = torch.tensor(data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=n, max_size=n)))
    settings = {"seed": seed, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    reference = torch.arange(n) + vocab_size
    tokens, is_self = sample_mix(logits, reference, self_prob, sample_ids=ids, positions=positions, **settings)
    assert (torch.where(is_self, tokens >= 0, tokens == reference)).all()
    assert (tokens < vocab_size)[is_self].all()
    row = slice(n - 1, n)
    alone = sample_mix(
        logits[row], reference[row], self_prob, sample_ids=ids[row], positions=positions[row], **settings
    )
    assert alone[0].item() == tokens[-1]
    assert alone[1].item() == is_self[-1]


def test_any_strides(backend):
    dense = random_logits(5, 300)
    want = backend.sample_mix(dense)[0]
    padded = torch.full((5, 700), torch.nan)
    padded[:, :600:2] = dense
    assert torch.equal(backend.sample_mix(padded[:, :600:2])[0], want)
    assert torch.equal(backend.sample_mix(dense.T.contiguous().T)[0], want)
    padded[:, 100:400] = dense
    assert torch.equal(backend.sample_mix(padded[:, 100:400])[0], want)
    expanded = backend.sample_mix(dense[:1].expand(5, -1))[0]
    assert torch.equal(expanded, backend.sample_mix(dense[:1].repeat(5, 1))[0])


def test_mask_decides_whose_token(backend, rows):
    tokens, is_self, _ = backend.sample_mix(**rows)
    mask = backend.self_mask(0, rows["sample_ids"], rows["positions"], rows["threshold"])
    assert torch.equal(is_self, mask)
    assert torch.equal(tokens[~mask], rows["reference"][~mask])
    assert (tokens[mask] < 1000).all()
    assert backend.sample_mix(**rows | {"threshold": torch.zeros(12, dtype=torch.int64)})[0].tolist() == list(
        range(5000, 5012)
    )


def test_invalid_rows_keep_their_reference_and_are_counted(backend):
    logits = random_logits(6, 130)
    logits[0, 129], logits[1, 0], logits[2], logits[3, :64] = torch.nan, INF, -INF, -INF
    logits[4, torch.arange(130) != 77] = -INF
    reference = torch.tensor([10, 11, 12, 13, 14, 15])
    for inv_temperature in (1.0, INF):
        tokens, is_self, invalid = backend.sample_mix(logits, reference, inv_temperature=inv_temperature)
        assert invalid.tolist() == [True, True, True, False, False, False]
        assert is_self.all()
        assert tokens[:3].tolist() == [10, 11, 12]
        assert tokens[3] >= 64
        assert tokens[4] == 77
    untouched = backend.sample_mix(logits, reference, threshold=0)
    assert not untouched[2].any()


@pytest.mark.parametrize("shape", [(), (1,)])
def test_status_counts_up(shape):
    logits = random_logits(4, 10)
    logits[1:3] = torch.nan
    status = torch.full(shape, 5, dtype=torch.int64)
    draw(logits, status=status)
    assert status.item() == 7
    draw(logits, status=status)
    assert status.item() == 9


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-40, 1e-6, torch.zeros(3)])
def test_greedy_takes_the_lowest_of_the_best(temperature):
    logits = torch.zeros(3, 200)
    logits[0, [70, 150]] = 5.0
    logits[1, [3, 64]] = 1e30
    assert draw(logits, temperature=temperature, top_k=1, top_p=0.1).tolist() == [70, 3, 0]


def test_greedy_and_sampled_ties_go_to_the_lowest_id(backend):
    assert backend.sample_mix(torch.full((2, 8200), 3.0), inv_temperature=INF)[0].tolist() == [0, 0]


def test_temperature_per_row_and_its_limits():
    logits = random_logits(3, 500)
    tokens = draw(logits, temperature=torch.tensor([0.0, 0.5, 2.0]))
    for row, temperature in enumerate((0.0, 0.5, 2.0)):
        assert draw(logits, temperature=temperature)[row] == tokens[row]
    assert (draw(logits, temperature=1e-4) == logits.argmax(1)).all()
    assert draw(logits, temperature=1e30).unique().numel() == 3


def test_argument_forms_are_equivalent():
    logits = random_logits(5, 300)
    want = draw(logits, top_k=30, top_p=0.9, min_p=0.01, temperature=0.7)
    per_row = {
        "top_k": torch.full((5,), 30, dtype=torch.int32),
        "top_p": torch.full((5,), 0.9, dtype=torch.float64),
        "min_p": torch.full((5,), 0.01, dtype=torch.float64),
        "temperature": torch.full((5,), 0.7, dtype=torch.float64),
        "sample_ids": torch.arange(5, dtype=torch.int32),
        "positions": torch.zeros(5, dtype=torch.int32),
    }
    assert torch.equal(draw(logits, **per_row), want)
    assert torch.equal(draw(logits.double(), top_k=30, top_p=0.9, min_p=0.01, temperature=0.7), want)
    reference = torch.arange(5, dtype=torch.int32)
    keys = {"seed": 0, "sample_ids": torch.arange(5), "positions": torch.arange(5)}
    tokens, _ = sample_mix(logits.requires_grad_(), reference, 0.0, **keys)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [0, 1, 2, 3, 4]


def test_no_rows(backend):
    tokens, is_self, invalid = backend.sample_mix(torch.empty(0, 10), top_k=3)
    assert tokens.shape == is_self.shape == invalid.shape == (0,)


def test_large_scaled_logits_overflow_to_invalid_not_to_an_illegal_id():
    status = torch.zeros((), dtype=torch.int64)
    assert draw(torch.full((1, 100), 3e38), temperature=1e-4, status=status).tolist() == [-7]
    assert status.item() == 1


@pytest.mark.parametrize("filters", FILTERS[1:], ids=lambda f: "+".join(f))
def test_filters_are_those_of_transformers(filters):
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = random_logits(50, 777)
    classes = {
        "top_k": warpers.TopKLogitsWarper,
        "top_p": warpers.TopPLogitsWarper,
        "min_p": warpers.MinPLogitsWarper,
    }
    expected = warpers.TemperatureLogitsWarper(0.8)(None, logits)
    for name, value in filters.items():
        expected = classes[name](value)(None, expected)
    n = torch.zeros(50, dtype=torch.int64)
    values = (
        None if name not in filters else torch.full((50,), filters[name], dtype=dtype)
        for name, dtype in (("top_k", torch.int64), ("top_p", torch.float64), ("min_p", torch.float64))
    )
    z = scaled_and_filtered(logits, Sampling(n, 0, n, n, torch.full((50,), 1 / 0.8), *values))
    assert torch.equal(z.isneginf(), expected.isneginf())
    kept = ~z.isneginf()
    assert torch.allclose(z[kept], expected[kept])
    assert (kept.sum(1) >= 1).all()


def test_top_p_is_exact_on_a_large_vocabulary():
    logits = torch.randn(2**18, generator=torch.Generator().manual_seed(0)) * 4
    top_p = torch.linspace(0.05, 0.95, 16).double()
    descending = logits.double().sort(descending=True).values
    probs = descending.softmax(0)
    kept = [int((probs.cumsum(0) - probs < p).sum()) for p in top_p]
    ids = torch.arange(16)
    cutoff = filter_cutoff(logits.expand(16, -1), unscaled(ids, 0, ids, ids)._replace(top_p=top_p))
    assert cutoff.tolist() == [descending[n - 1].item() for n in kept]


def test_filters_off_by_value_change_nothing():
    logits = random_logits(20, 500)
    assert torch.equal(draw(logits, top_k=500, top_p=1.0, min_p=0.0), draw(logits))
    assert torch.equal(draw(logits, top_k=10**9), draw(logits))
    assert torch.equal(draw(logits, top_k=1), logits.argmax(1))
    assert torch.equal(draw(logits, top_p=1e-9), logits.argmax(1))
    assert torch.equal(draw(logits, min_p=1.0), logits.argmax(1))
