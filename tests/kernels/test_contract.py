"""What all public ops have in common, over the calls in `calls.py`: opcheck, torch.compile and the other
tracers, vmap, inference mode, autocast, the names in errors, runnable docstrings."""

import doctest
import inspect
import pkgutil
import re
import warnings
from contextlib import nullcontext
from importlib import import_module

import pytest
import torch
import torch._dynamo.testing
from calls import CALLS, EXAMPLES, Recorder, as_tuple, call, copied
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import selfgen_kernels
from selfgen_kernels import ops
from selfgen_kernels.ops.arguments import values_visible

PUBLIC = [name for name in selfgen_kernels.__all__ if callable(getattr(selfgen_kernels, name))]
INF, NAN = float("inf"), float("nan")


def named(call):
    return f"{call[0]}-{call[1]}"


def calls(which=CALLS, fast=CALLS):
    """A parameter `example` of the calls `which`; those of them that are not in `fast` are slow."""
    params = [pytest.param(call, marks=() if call in fast else pytest.mark.slow) for call in which]
    return pytest.mark.parametrize("example", params, ids=map(named, which), indirect=True)


ONE_OF_EACH = [(name, len(some) - 1) for name, some in EXAMPLES.items()]  # the last one is said the most about


@pytest.fixture(params=CALLS, ids=named)
def example(request):
    """A name and arguments that nobody else writes to."""
    torch.compiler.reset()  # or too many examples would be variants of one function to it
    name, i = request.param
    return name, copied(EXAMPLES[name][i])


def assert_equal(got, want):
    for a, b in zip(as_tuple(got), as_tuple(want), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_every_op_has_examples_and_every_operator_is_called_by_one():
    assert sorted(EXAMPLES) == sorted(PUBLIC), "add calls of the new op to examples.py"
    with Recorder() as recorder:
        for name, i in CALLS:
            call(name, **copied(EXAMPLES[name][i]))
    called = {func.name() for func, _ in recorder.calls}
    defined = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("selfgen::")}
    assert {name for name in defined if not name.startswith("selfgen::_")} == called


def test_opcheck(example):
    name, arguments = example
    with Recorder() as recorder:
        call(name, **arguments)
    for func, args in recorder.calls:
        torch.library.opcheck(func, args)


@calls(fast=ONE_OF_EACH)
def test_compiles_as_one_graph(example):
    check_compiled(*example, dynamic=False)


def check_compiled(name, arguments, dynamic):
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    want_arguments = copied(arguments)
    want = call(name, **want_arguments)
    assert_equal(compiled(name, **arguments), want)
    if "status" in arguments:
        assert torch.equal(arguments["status"], want_arguments["status"])


ROWS = (
    "hidden",
    "logits",
    "reference",
    "sample_ids",
    "positions",
    "self_prob",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "min_reference_prob",
)


OF_ROWS = [(name, i) for name, i in CALLS if "sample_ids" in EXAMPLES[name][i] and name != "combine_shards"]


@calls([call for call in CALLS if call not in OF_ROWS or call[1] == 1], fast=ONE_OF_EACH)
def test_compiles_as_one_dynamic_graph(example):
    """At most one of each op of rows: the next test has them all."""
    check_compiled(*example, dynamic=True)


@calls(OF_ROWS, fast=ONE_OF_EACH)
def test_a_few_dynamic_graphs_serve_any_number_of_rows(example):
    """Symbolic sizes and seeds: a size equal to another number, or a sign, may add one graph or two, batches do not."""
    name, arguments = example
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    for n, seed in ((5, 3), (4, -7), (3, 2**62), (2, -(2**63)), (5, 0)):
        some = {k: v[:n] if k in ROWS and isinstance(v, torch.Tensor) else v for k, v in copied(arguments).items()}
        same = copied(some)
        assert_equal(compiled(name, **some | {"seed": seed}), call(name, **same | {"seed": seed}))
        if "status" in some:
            assert torch.equal(some["status"], same["status"])
    assert counter.frame_count <= 3


@pytest.mark.slow
def test_compiles_with_inductor(example):
    name, arguments = example
    torch.compiler.reset()
    assert_equal(torch.compile(call, fullgraph=True)(name, **copied(arguments)), call(name, **copied(arguments)))


@calls(fast=ONE_OF_EACH)
def test_inference_mode(example):
    name, arguments = example
    want = call(name, **copied(arguments))
    with torch.inference_mode():
        assert_equal(call(name, **copied(arguments)), want)
        compiled = torch.compile(call, fullgraph=True, backend="eager")
        assert_equal(compiled(name, **copied(arguments)), want)


# ---- Tracing and transforms other than torch.compile -----------------------------------------------------------------


def split(arguments):
    """Names and values of the tensors, and a function of the tensors that gives all arguments."""
    names = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]
    return names, [arguments[name] for name in names], lambda values: arguments | dict(zip(names, values, strict=True))


def meta_of(result):
    return [(tensor.shape, tensor.dtype) for tensor in as_tuple(result)]


def test_values_are_visible_where_they_are_plain():
    with torch.inference_mode():
        assert values_visible(torch.zeros(2), torch.nn.Parameter(torch.zeros(2)))
    with FakeTensorMode() as mode:
        assert not values_visible(torch.zeros(2))
    assert not values_visible(torch.zeros(2), mode.from_tensor(torch.zeros(2)))
    assert not values_visible(torch.zeros(2, device="meta"))


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.each_value
def test_fake_tensors(example, inside):
    name, arguments = example
    want = meta_of(call(name, **copied(arguments)))
    _, values, rebuilt = split(arguments)
    mode = FakeTensorMode()
    fakes = rebuilt([mode.from_tensor(value) for value in values])
    with mode if inside else nullcontext():
        assert meta_of(call(name, **fakes)) == want


@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
@pytest.mark.each_value
def test_make_fx(example, tracing_mode, pre_dispatch):
    name, arguments = example
    want_arguments = copied(arguments)
    want = call(name, **want_arguments)
    _, values, rebuilt = split(copied(arguments))
    traced = make_fx(
        lambda *values: call(name, **rebuilt(values)), tracing_mode=tracing_mode, pre_dispatch=pre_dispatch
    )(*values)
    names, values, _ = split(arguments)
    assert_equal(traced(*values), want)
    for changed, value in zip(names, values, strict=True):
        assert torch.equal(value, want_arguments[changed]), changed


DYNAMIC = {  # sizes that a caller's batch changes, of the tensors that have them
    "rows": ((*ROWS, "status"), (0,)),
    "combine_shards": (("values", "ids"), (1,)),
    "invariant_linear": (("hidden",), (0,)),
    "kv_append": (("key", "value", "slots"), (0,)),
    "plan_pass": (("final", "row_starts", "next_self", "log_chance", "least_log_chance"), (0,)),
    "commit_pass": (("tokens", "final", "slots", "cu_seqlens_q", "next_self", "sampled"), (0,)),
    "ragged_attention": (("query", "key", "value", "cu_seqlens_q", "kv_ranges"), (0,)),
    "rms_norm": (("x",), (0,)),
    "add_rms_norm": (("x", "residual"), (0,)),
    "act_mul": (("gate", "up"), (0,)),
    "rotary": (("query", "key", "cos", "sin"), (0,)),
    "rotary_append": (("query", "key", "value", "cos", "sin", "slots"), (0,)),
}


def dynamic_sizes(name, arguments):
    """Of each tensor, the dimensions that `torch.export` must leave open."""
    of_rows, of_op = DYNAMIC["rows"] if "sample_ids" in arguments else ((), ()), DYNAMIC.get(name, ((), ()))
    names, values, _ = split(arguments)
    return {
        n: {dim: torch.export.Dim.DYNAMIC for some, dims in (of_rows, of_op) for dim in dims if n in some and v.dim()}
        for n, v in zip(names, values, strict=True)
    }


def resized(name, arguments):
    """The arguments of a call with another batch size, of at least 2, which torch.export asks for."""
    if "sample_ids" in arguments:
        cut = {n: v[:3] for n, v in arguments.items() if n in ROWS and isinstance(v, torch.Tensor)}
        shards = {n: arguments[n][:, :3] for n in ("values", "ids") if n in arguments}
        return arguments | cut | shards
    other = {
        "invariant_linear": {"hidden": arguments["hidden"][:3]} if "hidden" in arguments else {},
        "kv_append": {n: arguments[n][:2] for n in ("key", "value", "slots") if n in arguments},
        "rms_norm": {n: arguments[n][:2] for n in arguments if n == "x"},
        "add_rms_norm": {n: arguments[n][:2] for n in arguments if n in ("x", "residual")},
        "act_mul": {n: arguments[n][:2] for n in ("gate", "up") if n in arguments},
        "rotary": {n: arguments[n][:2] for n in ("query", "key", "cos", "sin") if n in arguments},
        "rotary_append": {
            n: arguments[n][:2] for n in ("query", "key", "value", "cos", "sin", "slots") if n in arguments
        },
        "plan_pass": {
            "final": torch.tensor([0, 5, 8]),
            "row_starts": torch.tensor([0, 5, 8]),
            **{n: torch.full((3,), -0.7) for n in arguments if n == "least_log_chance"},
        },
        "commit_pass": {
            "final": torch.tensor([0, 5, 8]),
            "slots": torch.tensor([0, 1, 5]),
            "cu_seqlens_q": torch.tensor([0, 2, 3, 3], dtype=torch.int32),
            "sampled": torch.arange(3),
        },
        "ragged_attention": {
            "cu_seqlens_q": torch.tensor([0, 1, 1, 3], dtype=torch.int32),
            "kv_ranges": torch.tensor([[0, 4], [1, 1], [4, 5]]),
        },
    }
    return arguments | other[name]


@calls(fast=ONE_OF_EACH)
def test_export_with_a_dynamic_batch(example):
    name, arguments = example
    names, _, _ = split(arguments)

    class Program(torch.nn.Module):
        def forward(self, tensors):
            return call(name, **(arguments | tensors))

    tensors = {n: v.clone() for n, v in arguments.items() if n in names}
    exported = torch.export.export(
        Program(), (tensors,), strict=False, dynamic_shapes={"tensors": dynamic_sizes(name, arguments)}
    ).module()
    for batch in (arguments, resized(name, arguments)):
        want_arguments, got_arguments = copied(batch), copied(batch)
        want = call(name, **want_arguments)
        assert_equal(exported({n: got_arguments[n] for n in names}), want)
        for n in names:
            assert torch.equal(got_arguments[n], want_arguments[n]), n


WRITTEN = ("key_cache", "value_cache", "tokens", "final", "status")


@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.each_value
def test_vmap_gives_what_call_after_call_gives(example, dim):
    """Over each argument alone, and what is written to with it."""
    name, arguments = example
    names, values, _ = split(arguments)
    kept = {n: v for n, v in zip(names, values, strict=True) if n in WRITTEN and name != "plan_pass"}
    for changed in names:
        mapped = {changed: arguments[changed]} | kept
        pairs = {n: torch.stack([v, v.clone()], 0) for n, v in mapped.items()}
        if changed not in ("cu_seqlens_q", "slots", "final", "row_starts", "next_self", *kept):  # others have to fit
            pairs[changed][1] = mapped[changed].flip(0)
        if dim == -1 and name != "commit_pass":  # it wants contiguous rows
            pairs = {n: pair.movedim(0, -1).contiguous() for n, pair in pairs.items()}
        at = dim if name != "commit_pass" else 0
        calls = [arguments | {n: pair.select(at, i).clone() for n, pair in pairs.items()} for i in range(2)]
        want = [as_tuple(call(name, **each)) for each in calls]
        got = torch.func.vmap(lambda some: as_tuple(call(name, **(arguments | some))), in_dims=at)(pairs)
        for i in range(2):
            assert_equal(tuple(result[i] for result in got), want[i])
            for n in kept:
                assert torch.equal(pairs[n].select(at, i), calls[i][n])


@calls([call for call in CALLS if {*EXAMPLES[call[0]][call[1]]} & {"key_cache", "tokens", "status"}])
def test_vmap_does_not_write_to_one_tensor_from_many_calls(example):
    name, arguments = example
    mapped = {"kv_append": "key", "rotary_append": "key", "commit_pass": "sampled"}.get(name, "reference")
    with pytest.raises(ValueError, match=r"(key_cache|tokens|status) is .*one tensor for all the calls .*; give"):
        torch.func.vmap(lambda one: call(name, **(arguments | {mapped: one})))(torch.stack([arguments[mapped]] * 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.each_value
def test_autocast_changes_the_product_of_a_head_and_nothing_else(example, dtype):
    name, arguments = example
    lowered = copied(arguments)
    if "hidden" in arguments:  # what torch.nn.functional.linear casts
        lowered |= {k: v.to(dtype) for k, v in lowered.items() if k in ("hidden", "weight", "bias")}
    want = call(name, **lowered)
    with torch.autocast("cpu", dtype):
        assert_equal(call(name, **copied(arguments)), want)
        if dtype == torch.bfloat16:
            compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
            assert_equal(compiled(name, **copied(arguments)), want)


# ---- Wrong arguments -------------------------------------------------------------------------------------------------

NUMBERS = [0, 1, -1, 2, 0.5, -0.5, 1.5, NAN, INF, -INF, 2**31, 2**63, 2**70, -(2**70), 10**400, 1e300, 1e-320]
OBJECTS = [None, True, "x", b"", [0.0], {}, object(), 1j, torch.float32, torch.device("cpu")]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # some of these are beta
    TENSORS = [
        torch.tensor(1.0),
        torch.tensor(1),
        torch.zeros(0),
        torch.zeros(1),
        torch.zeros(3, 3),
        torch.zeros(2, 3, 3, 3),
        torch.zeros(5, dtype=torch.bool),
        torch.zeros(5, dtype=torch.uint8),
        torch.zeros(5, 130, dtype=torch.complex64),
        torch.zeros(5, 130, dtype=torch.float8_e4m3fn),
        torch.zeros(5, 130).to_sparse(),
        torch.zeros(5, 130).to_sparse_csr(),
        torch.zeros(5, 8).to_mkldnn(),
        torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        torch.quantize_per_tensor(torch.zeros(5, 8), 1.0, 0, torch.qint8),
    ]


def variations(tensor):
    """A good tensor made bad, or not so bad."""
    yield from (tensor[..., None], tensor.to("meta"), tensor.to(torch.complex64), tensor.bool(), tensor.to_sparse())
    yield from (tensor.double(), tensor.int(), tensor.half())
    if tensor.dim():
        yield from (tensor[:0], tensor[:-1], tensor[..., :-1], tensor[None], torch.cat([tensor, tensor]))
        yield tensor[:1].expand_as(tensor)
    if tensor.is_floating_point():
        yield from (torch.full_like(tensor, value) for value in (NAN, INF, -INF, -1.0, torch.finfo(tensor.dtype).max))
        yield tensor.clone().requires_grad_()
    else:
        yield from (torch.full_like(tensor, value) for value in (-1, 2**31 - 1, torch.iinfo(tensor.dtype).min))


def test_a_wrong_argument_is_named_or_does_no_harm(example):
    """One argument after the other becomes something else: the call returns, or its error names an argument."""
    name, arguments = example
    function = getattr(selfgen_kernels, name)
    names = "|".join(inspect.signature(function).parameters)
    unclear = []
    for changed in inspect.signature(function).parameters.keys() - {"device"}:  # torch names the devices that it knows
        good = arguments.get(changed)
        for value in (*NUMBERS, *OBJECTS, *TENSORS, *(variations(good) if isinstance(good, torch.Tensor) else ())):
            try:
                function(**copied(arguments) | {changed: value})
            except (TypeError, ValueError) as error:
                if re.search(rf"\b({names}|vocabulary|heads)\b", str(error)) and ";" in str(error):
                    continue
                unclear.append((changed, value, error))
            except RuntimeError as error:
                if "requires_grad" in str(error) or "no backward" in str(error):
                    continue
                unclear.append((changed, value, error))
            except Exception as error:
                unclear.append((changed, value, error))
    report = "\n".join(
        f"{changed} = {str(value)[:60]!r}: {type(e).__name__}: {str(e)[:150]!r}" for changed, value, e in unclear
    )
    assert not unclear, f"{len(unclear)} errors that say neither what was wrong nor what to do:\n{report}"


# ---- Docstrings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [m.name for m in pkgutil.iter_modules(ops.__path__)])
def test_examples_of_the_docstrings_run(module):
    result = doctest.testmod(import_module(f"{ops.__name__}.{module}"))
    assert result.failed == 0
    if module in {op.module for op in ops.OPS.values()}:
        assert result.attempted > 0


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_have_what_a_reader_needs(name):
    text = inspect.getdoc(getattr(selfgen_kernels, name))
    for part in ("Args:", "Returns:", "Raises:", "Example:", ">>> "):
        assert part in text, f"the docstring of {name} has no {part}"
    assert re.search(r"arXiv\s\d{4}\.\d{4,5}|SC 2011", text), f"the docstring of {name} names no source"
    for parameter in inspect.signature(getattr(selfgen_kernels, name)).parameters:
        assert re.search(rf"\b{parameter}\b", text.split("Args:")[1].split("Returns:")[0]), parameter
