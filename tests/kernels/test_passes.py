"""Planning and committing a pass: every backend against the reference, and a loop of the ops against its oracle."""

import heapq
import math

import pytest
import torch
from conftest import _TRITON, INTERPRETER_ONLY, ON_GPU, require_cpp
from hypothesis import given, settings
from hypothesis import strategies as st
from test_numbers import FREE, Computed

from selfgen_kernels import commit_pass, plan_pass
from selfgen_kernels.backends.reference import passes as reference

LOG_CHANCES = st.one_of(
    st.sampled_from([0.0, -0.5, -0.25, -1e-9, -1e30, -3e38, -float("inf")]), st.floats(-9, 0, width=32)
)


def triton_passes():
    pytest.importorskip("triton")
    from selfgen_kernels.backends.triton import passes

    return passes


class Backend:
    """The two ops of one backend, on CPU tensors."""

    def __init__(self, name: str):
        if name == "cpp":
            require_cpp()
        self.ops = {"reference": lambda: reference, "cpp": lambda: torch.ops.selfgen, "triton": triton_passes}[name]()
        self.device = "cuda" if name == "triton" and ON_GPU else "cpu"

    def plan_pass(self, *tensors, token_budget, least_log_chance=None):
        tensors = [x.to(self.device) for x in tensors]
        least = least_log_chance if least_log_chance is None else least_log_chance.to(self.device)
        return tuple(x.cpu() for x in self.ops.plan_pass(*tensors, token_budget, least))

    def commit_pass(self, tokens, final, *rest):
        state = [x.to(self.device, copy=True) for x in (tokens, final)]
        results = self.ops.commit_pass(*state, *(x.to(self.device) for x in rest))
        tokens.copy_(state[0])
        final.copy_(state[1])
        return tuple(x.cpu() for x in results)


class BlockedBackend(Backend):
    """Plans two rows at a time, as Triton does with a thousand where there are thousands."""

    def plan_pass(self, *tensors, token_budget, least_log_chance=None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.ops, "LANES", (1,))
            patch.setattr(self.ops, "ROWS", 2)
            return super().plan_pass(*tensors, token_budget=token_budget, least_log_chance=least_log_chance)


@pytest.fixture(params=["cpp", _TRITON], scope="module")
def fast(request):
    return Backend(request.param)


IN_BLOCKS = pytest.param("triton in blocks of rows", marks=_TRITON.marks)


@pytest.fixture(params=["reference", "cpp", _TRITON, IN_BLOCKS], scope="module")
def backend(request):
    if request.param == "triton in blocks of rows":
        return BlockedBackend("triton")
    return Backend(request.param)


def next_self_of(masks):
    """next_self [S] and row_starts [R] of rows given as lists of is_self."""
    following, starts = [], []
    for mask in masks:
        starts.append(len(following))
        start = starts[-1]
        for i in range(len(mask)):
            following.append(next((start + j for j in range(i + 1, len(mask)) if mask[j]), start + i))
    return torch.tensor(following), torch.tensor(starts)


@st.composite
def states(draw, max_rows=7):
    """final, row_starts, next_self and log_chance of rows of many lengths, each somewhere on its way."""
    masks = draw(st.lists(st.lists(st.booleans(), min_size=1, max_size=12), max_size=max_rows))
    next_self, row_starts = next_self_of(masks)
    final = [int(start) + draw(st.integers(0, len(mask) - 1)) for start, mask in zip(row_starts, masks, strict=True)]
    chances = draw(st.lists(LOG_CHANCES, min_size=len(next_self), max_size=len(next_self)))
    values = torch.tensor(final), row_starts, next_self
    return *(value.long() for value in values), torch.tensor(chances, dtype=torch.float32)


BUDGETS = st.one_of(st.integers(1, 6), st.integers(7, 200))
LEAST = st.none() | st.lists(
    st.sampled_from([0.0, -0.0, -1e-9, -0.4, -3.0, -1024.0, -1025.0, -3e38, -math.inf]) | st.floats(-9, 0, width=32),
    min_size=1,
)
"""Of the rows, over and over."""


def units(log_chance):
    """A log chance in whole units of 2^-20, rounded down and held at -1024."""
    return math.floor(max(log_chance, -1024.0) * 2**20)


def heap_plan(final, row_starts, next_self, log_chance, token_budget, least):
    """Windows [(begin, end)]: the policy once more, one segment at a time."""
    ends, segments, left = list(final), [], token_budget

    def take(row, begin, log_sum):
        nonlocal left
        ends[row] = min(next_self[begin], begin + left)
        left -= ends[row] - begin
        if next_self[ends[row]] > ends[row]:
            log_sum = max(log_sum + units(log_chance[ends[row]]), units(-1024.0))
            heapq.heappush(segments, (-log_sum, row, ends[row]))

    for row, begin in enumerate(final):
        take(row, begin, 0)
    while left and segments:
        negative, row, begin = heapq.heappop(segments)
        if least is not None and -negative < units(least[row % len(least)]):
            continue
        take(row, begin, -negative)
    return list(zip(final, ends, strict=True))


@settings(max_examples=settings().max_examples // 2)
@given(state=states(), token_budget=BUDGETS, least=LEAST)
def test_plan_is_that_of_a_heap(backend, state, token_budget, least):
    final, row_starts, *_ = state
    limits = None if least is None else torch.tensor([least[i % len(least)] for i in range(len(final))])
    slots, cu_seqlens_q, kv_ranges = backend.plan_pass(*state, token_budget=token_budget, least_log_chance=limits)
    windows = heap_plan(*(x.tolist() for x in state), token_budget, least)
    planned = [slot for begin, end in windows for slot in range(begin, end)]
    assert slots.tolist() == planned + [-1] * (token_budget - len(planned))
    assert cu_seqlens_q.dtype == torch.int32
    assert cu_seqlens_q.diff().tolist() == [end - begin for begin, end in windows]
    assert cu_seqlens_q[0] == 0
    ranges = [[start, end - start] for start, (_, end) in zip(row_starts.tolist(), windows, strict=True)]
    assert kv_ranges.tolist() == ranges
    assert kv_ranges.shape == (len(final), 2)


@settings(max_examples=settings().max_examples // 2)
@given(state=states(), token_budget=BUDGETS)
def test_plan_keeps_the_budget_and_leaves_no_work_waiting(backend, state, token_budget):
    final, _, next_self, _ = state
    _, cu_seqlens_q, _ = backend.plan_pass(*state, token_budget=token_budget)
    sizes = cu_seqlens_q.diff()
    required = next_self[final] - final
    unfinished = required > 0
    assert int(sizes.sum()) <= token_budget
    assert bool(sizes.sum()) == bool(unfinished.any())
    assert not sizes[~unfinished].any()
    assert (sizes > required).any() <= (
        sizes >= required
    ).all()  # speculation only when all required work has its place
    if sizes.sum() < token_budget:  # nothing is left to compute in any row
        ends = final + sizes
        assert torch.equal(next_self[ends], ends)


@pytest.mark.parametrize("rows", [0, 1, 64, 65, 700, 2049, pytest.param(5000, marks=pytest.mark.slow)])
def test_plan_of_many_rows(fast, rows):
    generator = torch.Generator().manual_seed(rows)
    size = 9 if rows < 100 else 5
    masks = (torch.rand(rows, size, generator=generator) < 0.4).tolist()
    next_self, row_starts = (x.long() for x in next_self_of(masks))
    final = row_starts + torch.randint(0, size, (rows,), generator=generator)
    log_chance = torch.tensor([0.6, 0.7, 0.75])[torch.randint(0, 3, (size * rows,), generator=generator)].log()
    for token_budget in (1, 2 * rows + 1, 20 * rows + 1) if rows < 100 else (2 * rows,):
        args = final, row_starts, next_self, log_chance
        for got, want in zip(
            fast.plan_pass(*args, token_budget=token_budget), reference.plan_pass(*args, token_budget), strict=True
        ):
            assert torch.equal(got, want)


@pytest.mark.parametrize("fast", [_TRITON], indirect=True)
def test_rows_whose_state_is_in_memory_are_planned_without_it_on_amds_gpus(fast, monkeypatch):
    monkeypatch.setattr(fast.ops, "LANES", (1,))
    next_self, row_starts = next_self_of([[False, True], [True, True, False]])
    args = row_starts, row_starts, next_self, torch.zeros(5), 4
    want = reference.plan_pass(*args)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for kernel in ("free_end_kernel", "many_windows_kernel", "slots_kernel"):
        monkeypatch.setattr(fast.ops, kernel, None)
    assert all(map(torch.equal, fast.ops.plan_pass(*args), want))


@pytest.mark.parametrize("fast", [_TRITON], indirect=True)
@pytest.mark.parametrize("scan", [8, None])
@pytest.mark.parametrize("least", [None, -0.7, -1e-7, -3.0])
@pytest.mark.each_value
def test_plan_of_long_rows(fast, least, scan, monkeypatch):
    """Rows of several scans: with budgets that bind and that don't, and sums that end a window or never do."""
    if scan:
        monkeypatch.setattr(fast.ops, "SCAN", scan)
    sizes = (1, 40, 8, 9, 17, 3) if scan else (1500, 3)
    generator = torch.Generator().manual_seed(0)
    for share, chances in ((0.5, (-0.1,)), (0.1, (0.0, -0.5, -math.inf)), (0.02, (-1e-7, 0.0))):
        next_self, starts = next_self_of([(torch.rand(n, generator=generator) < share).tolist() for n in sizes])
        log_chance = torch.tensor(chances)[torch.randint(0, len(chances), next_self.shape, generator=generator)]
        for final in (starts, (starts + 5).minimum(torch.tensor(sizes).cumsum(0) - 1)):
            args = final, starts, next_self, log_chance
            whole = int(reference.plan_pass(*args, sum(sizes))[1][-1])
            limits = None if least is None else torch.full((len(sizes),), least)
            for token_budget in {1, 7, max(1, whole - 1), max(1, whole), sum(sizes)}:
                got = fast.plan_pass(*args, token_budget=token_budget, least_log_chance=limits)
                want = reference.plan_pass(*args, token_budget, limits)
                assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, want, strict=True))


@INTERPRETER_ONLY
@pytest.mark.parametrize("rows", [0, 3])
def test_launches_of_triton_are_all_there_is(monkeypatch, rows):
    """Besides allocations."""
    passes = triton_passes()
    from triton.runtime import interpreter

    launched = []
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda self, *_, **__: launched.append(self.fn.__name__))
    slots, chunks = torch.arange(9), torch.zeros(rows + 1, dtype=torch.int32)
    row, log_chance = slots[:rows].clone(), torch.zeros(9)
    with Computed("cpu") as computed:
        passes.plan_pass(row, row, slots, log_chance, 5)
        passes.commit_pass(slots, row, slots, chunks, slots, slots)
    assert launched == [*["free_end_kernel"][:rows], "window_kernel", "slots_kernel", "commit_pass_kernel"]
    assert set(computed.names) - FREE == {"new_empty", "empty_like", "unbind"}


def test_log_chances_round_alike(fast):
    """Rows of one guess each, in the order of their chances: the plan shows which of two is larger, to a unit."""
    unit = 2.0**-20
    near = [0.0, -1e-9, -unit / 2, -unit, -1.5 * unit, -0.4, -0.4 - unit / 8, -0.4 - unit, -15.99999, -16.0, -1023.9999]
    log_chance = torch.tensor([chance for chance in (*near, -1024.0, -1e4, -math.inf) for _ in range(3)])
    rows = len(log_chance) // 3
    next_self, starts = next_self_of([[False, True, True]] * rows)
    for order in (torch.arange(rows), torch.arange(rows - 1, -1, -1)):
        chances = log_chance.view(rows, 3)[order].flatten()
        for token_budget in range(rows, 2 * rows + 1):
            args = starts, starts, next_self, chances
            got, want = fast.plan_pass(*args, token_budget=token_budget), reference.plan_pass(*args, token_budget)
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, want, strict=True))
    for least in near:
        limits = torch.full((rows,), least)
        got = fast.plan_pass(*args, token_budget=2 * rows, least_log_chance=limits)
        want = reference.plan_pass(*args, 2 * rows, limits)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, want, strict=True))
        assert int(got[1][-1]) == rows + sum(units(x) >= units(least) for x in log_chance[::3].tolist())


@given(state=states(), token_budget=BUDGETS, seed=st.integers(0, 99))
def test_commit_is_that_of_the_reference(fast, state, token_budget, seed):
    final, _, next_self, _ = state
    slots, cu_seqlens_q, _ = reference.plan_pass(*state, token_budget)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 2, next_self.shape, generator=generator)
    sampled = torch.randint(0, 2, slots.shape, generator=generator)
    results = []
    for ops in (fast, reference):
        own = tokens.clone(), final.clone()
        results.append((*ops.commit_pass(*own, slots, cu_seqlens_q, next_self, sampled), *own))
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


@given(state=states(), token_budget=BUDGETS, seed=st.integers(0, 99))
def test_commit_place_by_place(state, token_budget, seed):
    """The reference, told in words of the docstring."""
    final, _, next_self, _ = state
    slots, cu_seqlens_q, _ = reference.plan_pass(*state, token_budget)
    generator = torch.Generator().manual_seed(seed)
    before = torch.randint(0, 2, next_self.shape, generator=generator)
    sampled = torch.randint(0, 2, slots.shape, generator=generator)
    tokens, moved = before.clone(), final.clone()
    changed, observed = reference.commit_pass(tokens, moved, slots, cu_seqlens_q, next_self, sampled)
    for row in range(len(final)):
        places = range(cu_seqlens_q[row], cu_seqlens_q[row + 1])
        is_sampled = {i for i in places if next_self[slots[i]] == slots[i] + 1}
        wrong = [i for i in places if i in is_sampled and sampled[i] != before[slots[i] + 1]]
        for i in places:
            assert changed[i] == (i in wrong)
            assert observed[i] == (i in is_sampled and (not wrong or i <= wrong[0]))
            assert tokens[slots[i] + 1] == (sampled[i] if i in is_sampled else before[slots[i] + 1])
        last = wrong[0] if wrong else max(places, default=None)
        assert moved[row] == (final[row] if last is None else slots[last] + 1)
    assert not changed[cu_seqlens_q[-1] :].any()
    assert not observed[cu_seqlens_q[-1] :].any()


def toy_states(states_before, tokens):
    """A toy model: its state [...] after a token is a hash of the state before, its self token the state mod 3."""
    return (states_before * 31 + tokens * 7 + 11) % 10007


@settings(max_examples=15)  # each is a whole loop
@given(
    masks=st.lists(st.lists(st.booleans(), min_size=1, max_size=12), min_size=1, max_size=4),
    token_budget=BUDGETS,
    rate=st.floats(0.01, 1.0),
)
def test_a_loop_of_passes_ends_at_the_sequential_contexts(backend, masks, token_budget, rate):
    masks = [[False, *mask] for mask in masks]  # nothing comes before the first token, so nothing can predict it
    next_self, row_starts = next_self_of(masks)
    tokens = torch.arange(len(next_self)) % 3
    expected = tokens.tolist()
    for start, mask in zip(row_starts.tolist(), masks, strict=True):
        state = 0
        for i in range(len(mask)):
            if mask[i]:
                expected[start + i] = state % 3
            state = toy_states(state, expected[start + i])

    final, cache = row_starts.clone(), [0] * len(tokens)
    log_chance = torch.full((len(tokens),), rate).log()
    passes = 0
    while True:
        slots, cu_seqlens_q, _ = backend.plan_pass(final, row_starts, next_self, log_chance, token_budget=token_budget)
        if not cu_seqlens_q[-1]:
            break
        sampled = torch.full_like(slots, 99)
        for place, slot in enumerate(slots[: cu_seqlens_q[-1]].tolist()):
            cache[slot] = toy_states(0 if slot in row_starts else cache[slot - 1], int(tokens[slot]))
            if next_self[slot] == slot + 1:
                sampled[place] = cache[slot] % 3
        before = final.clone()
        backend.commit_pass(tokens, final, slots, cu_seqlens_q, next_self, sampled)
        assert (final >= before).all()
        assert (final > before).any()
        passes += 1
    assert tokens.tolist() == expected
    if token_budget > len(tokens):
        assert passes <= max(1, max(sum(mask) for mask in masks))


def test_nonsense_that_python_cannot_see_is_no_address(fast):
    """What a GPU tensor may hold: slots far out of range, cycles and NaN. Nothing hangs, nothing else is written."""
    far = torch.tensor([2**40, -(2**40), 2**62, -1, 8, 3, 0, 5])
    final, starts = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    nan = torch.full((8,), torch.nan)
    for args in ((far[:4], starts, far, nan), (final, starts, far, nan), (final, far[:4], far.flip(0), -nan)):
        slots, cu_seqlens_q, _ = fast.plan_pass(*args, token_budget=20)
        planned = slots[: cu_seqlens_q[-1]]
        assert ((planned >= 0) & (planned < 8)).all()
    for least in (torch.nan, torch.inf, 2.0):  # what must be computed is planned all the same
        rows = torch.tensor([0, 4]), torch.tensor([0, 4]), NEXT_SELF, torch.full((8,), -0.5)
        _, cu_seqlens_q, _ = fast.plan_pass(*rows, token_budget=20, least_log_chance=torch.full((2,), least))
        assert cu_seqlens_q.tolist() == [0, 2, 4]

    guarded = torch.full((24,), -5)
    tokens = guarded[8:16]
    chunks = torch.tensor([-3, 2, 9, 4, 2**30], dtype=torch.int32)
    for next_self in (far, torch.arange(1, 9)):
        fast.commit_pass(tokens, final.clone(), far, chunks, next_self, torch.arange(8))
    assert (guarded[:8] == -5).all()
    assert (guarded[16:] == -5).all()


def test_compiles_as_one_graph():
    next_self, starts = next_self_of([[False, True, True], [False, False, True, False]])

    def step(tokens, final, token_budget):
        slots, chunks, ranges = plan_pass(final, starts, next_self, torch.full((7,), -0.5), token_budget)
        changed, observed = commit_pass(tokens, final, slots, chunks, next_self, slots * 5)
        return tokens + 1, final + 1, slots, chunks, ranges, changed, observed

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for token_budget in (3, 4, 5):
        results = [f(torch.zeros(7, dtype=torch.int64), starts.clone(), token_budget) for f in (compiled, step)]
        for got, want in zip(*results, strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [50, 2100])
def test_a_pass_is_captured_in_a_cuda_graph(rows):
    """Replayed without a look at the device, plan and commit bring every row to its end, as they do on CPU."""
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(rows, 40, generator=generator) < 0.3).tolist()
    next_self, starts = next_self_of(masks)
    truth = torch.randint(0, 9, next_self.shape, generator=generator)  # what the "model" samples, whatever comes before
    log_chance, token_budget = torch.full(next_self.shape, -0.4), 2 * rows

    def step(tokens, final, starts, next_self, log_chance, truth):
        slots, chunks, _ = plan_pass(final, starts, next_self, log_chance, token_budget)
        commit_pass(tokens, final, slots, chunks, next_self, truth[(slots + 1).clamp(max=len(truth) - 1)])

    def fresh(device):
        state = torch.zeros_like(next_self), starts.clone(), starts, next_self, log_chance, truth
        return [x.to(device) for x in state]

    on_cpu, on_gpu, warm = fresh("cpu"), fresh("cuda"), fresh("cuda")
    step(*warm)  # compiles the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            step(*on_gpu)
        for _ in range(60):
            graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(60):
        step(*on_cpu)
    assert torch.equal(on_gpu[0].cpu(), on_cpu[0])
    assert torch.equal(on_gpu[1].cpu(), on_cpu[1])
    assert (next_self[on_cpu[1]] == on_cpu[1]).all()


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


NEXT_SELF = torch.tensor([2, 2, 3, 3, 6, 6, 6, 7])
PLAN = {
    "final": torch.tensor([0, 4]),
    "row_starts": torch.tensor([0, 4]),
    "next_self": NEXT_SELF,
    "log_chance": torch.full((8,), -0.5),
    "token_budget": 6,
}
COMMIT = {
    "tokens": torch.arange(8),
    "final": torch.tensor([0, 4]),
    "slots": torch.tensor([0, 1, 2, 4, 5, -1]),
    "cu_seqlens_q": int32(0, 3, 5),
    "next_self": NEXT_SELF,
    "sampled": torch.zeros(6, dtype=torch.int64),
}
OUTSIDE = torch.tensor([2, 2, 3, 3, 6, 8, 6, 7])
BAD = [
    (plan_pass, {"final": [0, 4]}, TypeError, "final must be a tensor, got list"),
    (plan_pass, {"final": int32(0, 4)}, TypeError, "final has dtype torch.int32"),
    (plan_pass, {"final": torch.tensor([0, 8])}, ValueError, "final holds 8, accepted are the slots 0 <= slot < 8"),
    (plan_pass, {"final": torch.tensor([0, 3])}, ValueError, "before its row_starts"),
    (plan_pass, {"row_starts": torch.tensor([0])}, ValueError, r"row_starts has shape \[1\], expected \[2\]"),
    (plan_pass, {"row_starts": torch.tensor([-1, 4])}, ValueError, "row_starts holds -1"),
    (plan_pass, {"next_self": NEXT_SELF.int()}, TypeError, "next_self has dtype torch.int32"),
    (plan_pass, {"next_self": NEXT_SELF.to("meta")}, ValueError, "next_self is on meta"),
    (plan_pass, {"next_self": OUTSIDE}, ValueError, r"next_self\[5\] is 8, accepted are 5 <= slot < 8"),
    (plan_pass, {"next_self": NEXT_SELF.flip(0)}, ValueError, r"next_self\[4\] is 3"),
    (plan_pass, {"log_chance": torch.full((8,), 0.5)}, ValueError, "log_chance holds a number that is not <= 0"),
    (plan_pass, {"log_chance": torch.full((8,), torch.nan)}, ValueError, "log_chance holds a number that is not <= 0"),
    (plan_pass, {"log_chance": torch.zeros(8).double()}, TypeError, "log_chance has dtype torch.float64"),
    (plan_pass, {"log_chance": torch.zeros(7)}, ValueError, r"log_chance has shape \[7\], expected \[8\]"),
    (plan_pass, {"least_log_chance": torch.zeros(1)}, ValueError, r"least_log_chance has shape \[1\], expected \[2\]"),
    (plan_pass, {"least_log_chance": -1.0}, TypeError, "least_log_chance must be a tensor, got float"),
    (
        plan_pass,
        {"least_log_chance": torch.tensor([-1, 0.1])},
        ValueError,
        "least_log_chance holds a number that is not",
    ),
    (
        plan_pass,
        {"least_log_chance": torch.full((2,), torch.nan)},
        ValueError,
        "least_log_chance holds a number that is not",
    ),
    (plan_pass, {"token_budget": 0}, ValueError, r"token_budget=0 is not accepted; pass 1 <= token_budget < 2\*\*31"),
    (plan_pass, {"token_budget": 2**31}, ValueError, "token_budget=2147483648"),
    (plan_pass, {"token_budget": 6.0}, TypeError, "token_budget must be an int"),
    (commit_pass, {"tokens": torch.zeros(8)}, TypeError, "tokens has dtype torch.float32"),
    (commit_pass, {"tokens": torch.arange(16)[::2]}, ValueError, "tokens is written in place and has stride 2"),
    (commit_pass, {"final": torch.arange(4)[::2]}, ValueError, "final is written in place and has stride 2"),
    (commit_pass, {"slots": torch.arange(5)}, ValueError, r"sampled has shape \[6\], expected \[5\]"),
    (commit_pass, {"slots": torch.tensor([0, 1, 2, -1, 5, -1])}, ValueError, "slots holds -1"),
    (commit_pass, {"slots": torch.tensor([0, 1, 2, 8, 5, -1])}, ValueError, "slots holds 8"),
    (commit_pass, {"cu_seqlens_q": int32(0, 5)}, ValueError, r"cu_seqlens_q has shape \[2\], expected \[3\]"),
    (
        commit_pass,
        {"cu_seqlens_q": int32(0, 3, 7)},
        ValueError,
        r"cu_seqlens_q is \[0, 3, 7\], expected .* at most the 6",
    ),
    (commit_pass, {"cu_seqlens_q": int32(0, 3, 2)}, ValueError, r"cu_seqlens_q is \[0, 3, 2\]"),
    (commit_pass, {"cu_seqlens_q": int32(1, 3, 5)}, ValueError, r"cu_seqlens_q is \[1, 3, 5\]"),
    (commit_pass, {"next_self": NEXT_SELF[:7]}, ValueError, r"next_self has shape \[7\], expected \[8\]"),
    (commit_pass, {"next_self": OUTSIDE}, ValueError, r"next_self\[5\] is 8"),
    (commit_pass, {"sampled": int32(*range(6))}, TypeError, "sampled has dtype torch.int32"),
]


@pytest.mark.parametrize(("op", "kwargs", "error", "message"), BAD)
def test_names_the_mistake(op, kwargs, error, message):
    good = PLAN if op is plan_pass else COMMIT
    op(**{name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in good.items()})
    with pytest.raises(error, match=message):
        op(**good | kwargs)
