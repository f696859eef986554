"""Modules as single kernels in the passes of a generation: which are found, which are not, and that all is restored.

That contexts are those of the loop is shown for every family in test_graphs.py, whose passes have them.
"""

from __future__ import annotations

import functools
import itertools
from functools import partial

import pytest
import torch
from helpers.contexts import assert_equal, batch
from helpers.graphs import Recorder, recorded_passes
from models import CONFIGS, tiny_model
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama import modeling_llama as llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from selfgen import ContextGenerator
from selfgen.context import fused, late
from selfgen.context.late import Residual, Rotation, computed_late
from selfgen.context.models import UnsupportedModelError
from selfgen.context.ragged import RaggedLayer
from selfgen_kernels import add_rms_norm, rms_norm, rotary

NORMS = {"qwen3": 9, "gemma2": 9, "gemma3": 13, "olmo2": 9, "gpt2": 0, "gpt_neox": 0}  # of two layers; others have 5
PLAIN_MLP = {"gpt2", "gpt_neox", "gpt_oss"}  # or experts
NO_ROTARY = {"gpt2", "gpt_oss"}  # or one of its own


@pytest.fixture(autouse=True)
def recorder():
    with recorded_passes():
        yield


def contexts(generator, **settings):
    prompts, references, sample_ids = batch()
    return generator.contexts(prompts, references, 0.5, seed=7, sample_ids=sample_ids, **settings)


def found_in(model):
    with torch.no_grad():
        return [module for module, _ in fused.Fused(model).forwards()]


def count(model, name):
    return sum(name in type(module).__name__ for module in found_in(model))


def norms_of(model):
    return [module for module in found_in(model) if "Norm" in type(module).__name__]


class Holder(nn.Module):
    """Stands for a model with one module."""

    def __init__(self, module):
        super().__init__()
        self.module, self.device = module, torch.device("cpu")


def is_found(module):
    return found_in(Holder(module)) == [module]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.each_value
@pytest.mark.each_value
def test_what_is_found(family, dtype):
    model = tiny_model(family, dtype=dtype)
    for enabled in (False, dtype != torch.float16):  # as no layer computes with two dtypes of 16 bits
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert count(model, "Norm") == NORMS.get(family, 5)
            assert count(model, "MLP") == (0 if family in PLAIN_MLP else 2)
            assert count(model, "Attention") == (0 if family in NO_ROTARY else 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2"])
def test_a_replaced_norm_gives_what_its_own_forward_gives(family, dtype):
    model = tiny_model(family, dtype=dtype)
    norm = norms_of(model)[0]
    x = torch.randn(1, 9, 3, 32).to(dtype)
    with torch.no_grad():
        want = norm(x)
        with fused.Fused(model).used():
            assert "forward" in vars(norm)
            torch.testing.assert_close(norm(x), want)
            torch.testing.assert_close(norm(x.transpose(1, 2)), want.transpose(1, 2))
            torch.testing.assert_close(norm(x[0, 0, 0]), want[0, 0, 0])
            assert torch.equal(norm(x.double()), type(norm).forward(norm, x.double()))  # which the kernel does not take
        assert "forward" not in vars(norm)


class Shifted(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x) + 1e-3


class Centred(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class Clamped(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x.clamp(-100, 100))


class OfTwo(LlamaRMSNorm):
    def forward(self, x, gate):
        return super().forward(x) * gate


class Rounding(LlamaRMSNorm):
    """Another order of rounding, which fp32 does not show."""

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype) if x.dtype != torch.bfloat16 else super().forward(x)


class Remembering(LlamaRMSNorm):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("seen", torch.zeros(1))


@pytest.mark.parametrize("kind", [Shifted, Centred, Clamped, OfTwo, Rounding, Remembering])
def test_what_computes_something_else_keeps_its_forward(kind):
    assert is_found(LlamaRMSNorm(32))
    assert not is_found(kind(32))


class Mlp(nn.Module):
    """Of a decoder, with what tests change."""

    def __init__(self, act=nn.SiLU, width=24):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(16, width), nn.Linear(16, width), nn.Linear(width, 16)
        self.act = act()

    def forward(self, x):
        return self.three(self.one(x) * self.act(self.two(x)))


class Doubled(Mlp):
    def forward(self, x):
        return super().forward(x) * 2


class Limited(Mlp):
    def forward(self, x):
        return self.three(self.one(x).clamp(max=20) * self.act(self.two(x)))


class Halves(nn.Module):
    def __init__(self, first):
        super().__init__()
        self.first, self.both, self.down, self.act = first, nn.Linear(16, 48), nn.Linear(24, 16), nn.SiLU()

    def forward(self, x):
        one, two = self.both(x).chunk(2, dim=-1)
        return self.down(self.act(one) * two if self.first else one * self.act(two))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gated_mlps_are_known_by_what_they_compute(dtype):
    tanh = partial(nn.GELU, approximate="tanh")
    for make in (Mlp, partial(Mlp, width=16), partial(Mlp, tanh), partial(Halves, True), partial(Halves, False)):
        mlp, x = make().to(dtype), torch.randn(1, 7, 16).to(dtype)
        model = Holder(mlp)
        assert found_in(model) == [mlp]
        with torch.no_grad():
            want = mlp(x)
            with fused.Fused(model).used():
                assert "forward" in vars(mlp)
                torch.testing.assert_close(mlp(x), want)
                torch.testing.assert_close(mlp(x=x), want)
    for make in (Doubled, Limited, partial(Mlp, nn.GELU), partial(Mlp, nn.ReLU), partial(Mlp, nn.Hardswish)):
        assert not is_found(make().to(dtype))


def decorated(forward):
    @functools.wraps(forward)
    def wrapper(*args, **kwargs):
        return forward(*args, **kwargs)

    return wrapper


def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    return llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    @decorated
    @decorated
    def forward(self, q, k, cos, sin, *args, scale=1.0):
        return apply_rotary_pos_emb(q * scale, k, cos, sin, *args)


def test_a_rotation_is_replaced_in_its_module_alone(monkeypatch):
    attention, other = Attention(), Attention()
    model, calls = Holder(attention), []
    monkeypatch.setattr(late, "rotary", lambda *args, **how: calls.append(args) or rotary(*args, **how))
    states = [torch.randn(1, n, 5, 8) for n in (4, 2)]
    cos, sin = torch.randn(2, 1, 5, 8)
    with torch.no_grad(), fused.Fused(model).used(), computed_late(model):
        calls.clear()
        for got, want in zip(attention(*states, cos, sin, scale=2.0), other(*states, cos, sin, scale=2.0), strict=True):
            assert torch.equal(got, want)
        assert len(calls) == 1  # of the first
        assert attention(*states, cos[0], sin[0], 0)[0].shape == states[0].shape
        assert attention(*(x.double() for x in states), cos, sin)[0].dtype == torch.float64
        with torch.enable_grad():
            assert attention(states[0].requires_grad_(), states[1], cos, sin)[0].requires_grad
        assert len(calls) == 1
    assert "forward" not in vars(attention)


def test_a_rotation_of_its_own_stays(monkeypatch):
    monkeypatch.setitem(globals(), "apply_rotary_pos_emb", lambda q, k, cos, sin: (q * cos - k * sin, k * cos))
    assert not is_found(Attention())


def test_what_is_not_torchs_own_keeps_its_forward():
    changed = LlamaRMSNorm(32)
    vars(changed)["forward"] = lambda x: x
    assert not is_found(changed)
    compiled = LlamaRMSNorm(32)
    compiled.compile(backend="eager")
    assert not is_found(compiled)
    parametrized = LlamaRMSNorm(32)
    torch.nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    assert not is_found(parametrized)
    double = LlamaRMSNorm(32).double()
    assert not is_found(double)
    for part in ("one", "two", "three"):
        quantized = Mlp()
        linear = getattr(quantized, part)
        linear.weight = nn.Parameter(torch.zeros_like(linear.weight, dtype=torch.int8), requires_grad=False)
        assert not is_found(quantized)
    bare = Attention()
    del bare.weight
    assert not is_found(bare)


def test_a_setting_that_changes_is_seen():
    model = Holder(LlamaRMSNorm(32))
    modules = fused.Fused(model)
    x = torch.full((1, 1, 32), 1e-3)
    for eps in (1e-6, 1e-5):
        model.module.variance_epsilon = eps
        ((_, forward),) = modules.forwards()
        with torch.no_grad():
            torch.testing.assert_close(forward(x), model.module(x))


def test_what_has_hooks_keeps_its_forward():
    """A kernel would pass by those of an activation, and trying would run them."""
    model, seen = tiny_model("llama"), []
    layer = model.model.layers[0]
    for module in (layer.input_layernorm, layer.mlp.act_fn, layer.self_attn):
        module.register_forward_hook(lambda module, args, result: seen.append(module))
    found = found_in(model)
    assert not seen
    assert layer.post_attention_layernorm in found
    assert not {layer.input_layernorm, layer.mlp, layer.self_attn} & {*found}
    assert model.model.layers[1].mlp in found


LATE = {"gpt2": 0, "gpt_neox": 0}  # of two layers; others have 2


@pytest.mark.parametrize("family", CONFIGS)
def test_layers_whose_sums_are_computed_late(family):
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(family, dtype=dtype)
        assert count(model, "Layer") == LATE.get(family, 2)
        with torch.autocast("cpu", torch.bfloat16):
            assert count(model, "Layer") == LATE.get(family, 2)
        model.model.layers[0].register_forward_hook(lambda *_: None) if family == "llama" else None
        assert family != "llama" or count(model, "Layer") == 0  # a hook sees what it always does


def a_recording():
    return computed_late(nn.Module())


def a_sum(dtype=torch.float32, count=2, seed=0):
    """Terms [1, 4, 16] of a sum, and the sum."""
    terms = [*torch.randn(count, 1, 4, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)]
    return terms, Residual(*(term.clone() for term in terms))


READS = {
    "product": lambda x: x @ torch.ones(16, 3).to(x),
    "view": lambda x: x[0, :, ::2].transpose(0, 1),
    "scaled": lambda x: x + 0.5 * x,
    "with alpha": lambda x: torch.add(x, x, alpha=2),
    "number": lambda x: x + 1,
    "broadcast": lambda x: x + torch.ones(16).to(x),
    "cast": lambda x: x.double(),
    "same dtype": lambda x: x.to(x.dtype) * 1,
    "twice": lambda x: (x + x) + (x + x),
    "in place": lambda x: x.mul_(2) + x,
    "into a view": lambda x: (x[0, 0].fill_(3), x * 1)[1],
    "by index": lambda x: (x.__setitem__((0, 1), 7.0), x * 1)[1],
    "taken in place": lambda x: torch.ones_like(x).add_(x),
    "out": lambda x: torch.add(x, x, out=torch.empty(1, 4, 16, dtype=x.dtype)),
    "layer norm": lambda x: torch.nn.functional.layer_norm(x, (16,)),
    "list": lambda x: torch.cat([x, x], 1),
    "clone": lambda x: x.clone(),
    "where": lambda x: torch.where(x > 0, x, -x),
    "autocast": lambda x: torch.nn.Linear(16, 3, dtype=x.dtype, bias=False).requires_grad_(False)(x).shape,
    "condition": lambda x: x * 2 if x.isfinite().all() else x,
    "item": lambda x: torch.tensor(x.sum().item()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("read", READS)
def test_whatever_reads_a_late_sum_gets_it(read, dtype):
    with torch.no_grad(), a_recording():
        for terms in (1, 2):
            given, x = a_sum(dtype, terms)
            want, got = READS[read](sum(given[1:], given[0].clone())), READS[read](x)
            if isinstance(want, torch.Tensor):
                assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())
                assert torch.equal(got * 1, want * 1)


@pytest.mark.parametrize("dtypes", [*itertools.product([torch.float32, torch.bfloat16, torch.float16], repeat=2)])
def test_a_norm_gets_the_bits_of_the_sum(dtypes, monkeypatch):
    both = []
    monkeypatch.setattr(late, "add_rms_norm", lambda *args, **how: both.append(args) or add_rms_norm(*args, **how))
    weight = torch.linspace(-1, 1, 16)
    with torch.no_grad(), a_recording():
        first, second = (a_sum(dtype, 1, seed)[0][0] for seed, dtype in enumerate(dtypes))
        x = Residual(first) + second
        assert type(x) is Residual
        assert x.dtype == (first + second).dtype
        y = x.normed(weight, 1e-6, "gemma")
        assert torch.equal(y, rms_norm(first + second, weight, 1e-6, form="gemma"))
        assert torch.equal(x.normed(weight, 1e-6, "gemma"), y)
        assert torch.equal(x * 1, first + second)
        assert len(both) == 1


def test_what_is_changed_before_a_late_sum_is_computed_is_an_error():
    with torch.no_grad(), a_recording():
        for changed in (0, 1, 2):
            terms = [torch.ones(1, 4, 16), torch.ones(1, 4, 16)]
            terms.append(Residual(terms[0]))
            x = terms[2] + terms[1]
            terms[changed].mul_(2)
            for read in (lambda x: x * 1, lambda x: x.normed(torch.ones(16), 1e-6, "llama")):
                with pytest.raises(RuntimeError, match="has changed in place what it had added"):
                    read(x)


def test_sums_are_not_late_where_more_than_numbers_decides():
    x = torch.ones(1, 4, 16)
    with torch.no_grad():
        assert not Residual.takes(x)  # no pass is recorded
    with a_recording():
        assert not Residual.takes(x)  # gradients are recorded
    with torch.no_grad(), a_recording():
        assert Residual.takes(x, x.half())
        assert not Residual.takes(x, x[:, :1])
        assert not Residual.takes(x, x.double())
        assert not Residual.takes(x, 1.0)
        assert not Residual.takes(x.transpose(1, 2))
        assert not Residual.takes(x, x.to("meta"))
    with torch.inference_mode(), a_recording():
        assert not Residual.takes(x)
        made = torch.ones(1, 4, 16)
    with torch.no_grad(), a_recording():
        assert not Residual.takes(made)


def a_rotation(dtype=torch.float32, of_cos=torch.float32, keep_dtype=False):
    """What is turned, and queries and keys [1, heads, 5, 8] that are turned late."""
    given = [torch.randn(5, heads, 8).to(dtype) for heads in (4, 2)] + [*torch.randn(2, 5, 8).to(of_cos)]
    turned = Rotation(*given, keep_dtype)
    return given, turned.query(), turned.key()


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(("dtype", "of_cos"), [*itertools.product(DTYPES, repeat=2)])
@pytest.mark.parametrize("keep_dtype", [False, True])
def test_a_late_rotation(dtype, of_cos, keep_dtype):
    """By the kernel that writes the K/V, or by whatever reads it first, in any order."""
    value, slots = torch.randn(5, 2, 8).bfloat16(), torch.tensor([4, -1, 0, 8, 2])
    for order in itertools.permutations(("query", "key", "append")):
        with torch.no_grad():
            given, query, key = a_rotation(dtype, of_cos, keep_dtype)
            want = rotary(*given, keep_dtype=keep_dtype)
            caches, is_first = torch.zeros(2, 9, 2, 8).bfloat16(), order[0] == "append"
            for step in order:
                if step == "append":
                    assert key.rotation.append(*caches, value, slots) == is_first
                    continue
                got, expected = (query, want[0]) if step == "query" else (key, want[1])
                expected = expected.transpose(0, 1)[None]
                assert (got.dtype, got.shape, got.stride()) == (expected.dtype, expected.shape, expected.stride())
                assert torch.equal(got * 1, expected)
                assert torch.equal(got[0, :, 2:], expected[0, :, 2:])
            there = slots >= 0
            assert torch.equal(caches[0][slots[there]], want[1][there].bfloat16() * is_first)
            assert torch.equal(caches[1][slots[there]], value[there] * is_first)


def test_what_is_changed_before_a_late_rotation_is_an_error():
    cache, slots = torch.zeros(9, 2, 8), torch.arange(5)
    with torch.no_grad():
        for place in range(4):
            given, query, key = a_rotation()
            given[place].mul_(2)
            with pytest.raises(RuntimeError, match="has changed in place"):
                query * 1
            with pytest.raises(RuntimeError, match="has changed in place"):
                key * 1
            with pytest.raises(RuntimeError, match="has changed in place"):
                key.rotation.append(cache, cache, cache[:5], slots)


@pytest.mark.parametrize("reads", ["a copy is made", "it is looked at"])
def test_keys_that_something_else_reads_are_turned_before(monkeypatch, reads):
    """The cache gets plain keys then, and the contexts are the same."""
    model, append, update, appended = tiny_model("llama"), Rotation.append, RaggedLayer.update, []
    monkeypatch.setattr(Rotation, "append", lambda *args: appended.append(append(*args)) or appended[-1])
    want = contexts(ContextGenerator(model, token_budget=100, balance=12.5))
    assert all(appended)
    assert appended
    appended.clear()

    def read(self, key, *args, **kwargs):
        copy = key * 1
        return update(self, copy if reads == "a copy is made" else key, *args, **kwargs)

    monkeypatch.setattr(RaggedLayer, "update", read)
    assert_equal(contexts(ContextGenerator(model, token_budget=100, balance=12.5)), want)
    assert not any(appended)


class Branch(nn.Module):
    def forward(self, hidden_states) -> tuple[torch.Tensor, None]:
        return hidden_states.roll(1, -1) * 0.7, None


class Layer(GradientCheckpointingLayer):
    """Of a decoder; tests change how it adds."""

    def __init__(self):
        super().__init__()
        self.first, self.second = LlamaRMSNorm(16), LlamaRMSNorm(16)
        self.attention, self.mlp = Branch(), Mlp()
        torch.manual_seed(1)
        for weight in self.parameters():
            nn.init.normal_(weight)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        x, _ = self.attention(hidden_states=self.first(hidden_states))
        hidden_states = self.add(hidden_states, x)
        return self.add(hidden_states, self.mlp(self.second(hidden_states)))

    def add(self, hidden_states, x):
        return hidden_states + x


def layer(add):
    return type("Layer", (Layer,), {"add": add})()


class Parallel(Layer):
    def forward(self, hidden_states, **kwargs):
        return self.attention(self.first(hidden_states))[0] + self.mlp(self.second(hidden_states)) + hidden_states


class PostNorms(Layer):
    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.first(self.attention(hidden_states)[0])
        return hidden_states + self.second(self.mlp(hidden_states))


class Tuple(Layer):
    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states), None


class OfTwoInputs(Layer):
    def forward(self, hidden_states, other, **kwargs):
        return super().forward(hidden_states + other[0])


class Late(Layer):
    """What it adds is changed between the sum and the norm."""

    def forward(self, hidden_states, **kwargs):
        x, _ = self.attention(self.first(hidden_states))
        total = hidden_states + x
        x.mul_(2)
        return total + self.mlp(self.second(total))


class Old(Late):
    """So is what it adds to."""

    def forward(self, hidden_states, **kwargs):
        total = hidden_states + self.attention(self.first(hidden_states))[0]
        hidden_states += 1
        return total + self.mlp(self.second(total))


DROPOUT = nn.Dropout(0.5).eval()
LAYERS = {  # name: (layer, whether its sums are computed late, by how many kernels that add and norm)
    "plain": (Layer, True, 1),
    "other order": (lambda: layer(lambda self, h, x: x + h), True, 1),
    "scaled residual": (lambda: layer(lambda self, h, x: h + x * 0.22), True, 1),
    "scaled by one": (lambda: layer(lambda self, h, x: h + x * torch.ones(16, dtype=x.dtype)), True, 1),
    "scaled both": (lambda: layer(lambda self, h, x: h * 0.5 + x), True, 0),
    "scaled sum": (lambda: layer(lambda self, h, x: (h + x) * 0.5), True, 0),
    "alpha": (lambda: layer(lambda self, h, x: torch.add(h, x, alpha=2)), True, 0),
    "clamped": (lambda: layer(lambda self, h, x: (h + x).clamp(-0.5, 0.5)), True, 0),
    "dropout": (lambda: layer(lambda self, h, x: h + DROPOUT(x)), True, 1),
    "in fp32": (lambda: layer(lambda self, h, x: (h.float() + x.float()).to(x.dtype)), True, None),
    "in place": (lambda: layer(lambda self, h, x: h.add_(x)), True, 0),
    "parallel": (Parallel, True, 0),
    "post-norms": (PostNorms, True, 0),
    "tuple": (Tuple, False, 0),
    "two inputs": (OfTwoInputs, False, 0),
    "changed term": (Late, False, 0),
    "changed residual": (Old, False, 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_any_layer_gives_the_bits_of_its_own_sums(name, dtype, monkeypatch):
    make, is_late, kernels = LAYERS[name]
    one, x, both = make().to(dtype).eval(), torch.randn(1, 9, 16).to(dtype), []
    monkeypatch.setattr(late, "add_rms_norm", lambda *args, **how: both.append(args) or add_rms_norm(*args, **how))
    model = Holder(one)
    assert (one in found_in(model)) == is_late
    how = {"other": (x,)} if name == "two inputs" else {}
    with torch.no_grad(), fused.Fused(model).used(), computed_late(model):
        both.clear()
        got = one(x.clone(), **how)
        vars(one).pop("forward", None)  # the parts keep their kernels
        assert kernels in (None, len(both))
        want = one(x.clone(), **how)
    for a, b in zip(got if name == "tuple" else [got], want if name == "tuple" else [want], strict=True):
        assert a is b is None or torch.equal(a * 1, b)


def test_norms_that_keep_their_forward_get_no_late_sum():
    """As where kernels of others have been bound to them (liger_kernel, transformers' use_kernels)."""
    given, one = [], Layer()

    def forward(x):
        given.append(type(x))
        return LlamaRMSNorm.forward(one.first, x)

    one.first.forward = one.second.forward = forward
    assert one not in found_in(Holder(one))
    one.second.forward = partial(LlamaRMSNorm.forward, one.second)
    del one.first.forward  # one of two
    model = Holder(one)
    with torch.no_grad(), fused.Fused(model).used(), computed_late(model):
        x = torch.randn(1, 9, 16)
        got = one(x.clone())
        vars(one).pop("forward", None)
        assert torch.equal(got * 1, one(x.clone()))


@pytest.mark.parametrize("value", [0.0, torch.nan])
def test_a_gated_mlp_whose_weights_do_not_tell_keeps_its_forward(value):
    """Whichever of its parts were the gate, all would be as well: it may tell once it has been trained."""
    model = tiny_model("llama")
    mlps = [layer.mlp for layer in model.model.layers]
    for mlp in mlps:
        torch.nn.init.constant_(mlp.down_proj.weight, value)
    assert not {*mlps} & {module for module, _ in fused.Fused(model).forwards()}


def test_forwards_are_restored_after_an_error(monkeypatch):
    model = tiny_model("llama")
    generator = ContextGenerator(model, token_budget=100, balance=12.5)
    contexts(generator)
    assert not any("forward" in vars(module) for module in model.modules())

    def fail(*args):
        assert any("forward" in vars(module) for module in model.modules())
        raise RuntimeError("a test")

    monkeypatch.setattr(type(generator._forward()), "run", fail)
    with pytest.raises(RuntimeError, match="a test"):
        contexts(generator)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_replacement_that_is_wrong_after_all_is_found_by_verification(monkeypatch):
    monkeypatch.setattr(fused, "rms_norm", lambda x, weight, eps, form: x * weight + 1)
    monkeypatch.setattr(fused, "_agree", lambda got, want: True)
    with pytest.raises(UnsupportedModelError, match="computes something else over the ragged cache"):
        contexts(ContextGenerator(tiny_model("llama"), token_budget=100, balance=12.5))


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "olmo2"])
def test_contexts_under_autocast(family):
    """Near ties apart, which bf16 has: nearly all tokens are those of passes with the modules' own forwards."""
    model = tiny_model(family)
    with torch.autocast("cpu", torch.bfloat16):
        got = contexts(ContextGenerator(model, token_budget=100, balance=12.5))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fused, "saves_time", lambda device: False)
            want = contexts(ContextGenerator(model, token_budget=100, balance=12.5))
    pairs = zip(got.tokens, want.tokens, strict=True)
    same = [bool(torch.equal(a, b)) for a, b in pairs]
    assert sum(same) >= len(same) - 1


def test_a_cpu_keeps_its_own(monkeypatch):
    monkeypatch.setattr(fused, "saves_time", lambda device: device.type == "cuda")
    model = tiny_model("llama")
    with fused.Fused(model).used():
        assert not any("forward" in vars(module) for module in model.modules())


VIEWS = (
    "alias", "as_strided", "detach", "expand", "permute", "select", "slice", "split", "split_with_sizes", "squeeze",
    "t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view",
)  # fmt: skip
"""Operators that launch nothing."""


def launches(monkeypatch, family, *, kernels=True, **settings):
    """The operators of a recorded pass from one layer's attention to the next one's, views left out."""
    recorded, record = [], Recorder._record

    def noted(self, run):
        recorded.append(record(self, run))
        return recorded[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "_record", noted)
        patch.setattr(fused, "saves_time", lambda device: kernels)
        generator = ContextGenerator(tiny_model(family), token_budget=100, balance=12.5)
        for _ in range(2):
            contexts(generator, **settings)
    names = [operator.name().partition("::")[2].partition(".")[0] for operator, *_ in recorded[0].calls]
    first, second = (at for at, name in enumerate(names) if name == "ragged_attention")
    return [name for name in names[first:second] if name not in VIEWS]


FEW = {"llama": 12, "mistral": 12, "qwen3": 14, "gemma2": 14, "gemma3": 16, "phi3": 9, "olmo2": 16}
"""Those of seven products (four in Phi-3), attention, K/V with rotary positions and the gate, and one for each norm,
with the sum before it. In OLMo 2 there is a product between the two."""


@pytest.mark.parametrize(
    "family", [pytest.param(one, marks=() if one in ("llama", "gemma3", "olmo2") else pytest.mark.slow) for one in FEW]
)
def test_few_launches_per_layer(monkeypatch, family):
    own = launches(monkeypatch, family, kernels=False)
    found = launches(monkeypatch, family)
    assert {"act_mul", "rotary_append"} <= {*found}
    assert not {"rotary", "kv_append"} & {*found}
    assert ("add_rms_norm" in found) == ("add" not in found) == (family != "olmo2")
    assert len(found) == FEW[family] < len(own) // 2
    kept = launches(monkeypatch, family, keep_hidden_states=True)
    assert len(kept) == FEW[family] + 1 + kept.count("add") - found.count("add")  # what enters a layer is summed first
    assert kept.count("add") == 1 + (family == "olmo2")
    with torch.autocast("cpu", torch.bfloat16):  # which casts what enters a product
        assert len(launches(monkeypatch, family)) <= 25
