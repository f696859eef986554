"""Modules as single kernels in the passes of a generation: which are found, which are not, and that all is restored.

That contexts are those of the loop is shown for every family in test_graphs.py, whose passes have them.
"""

from __future__ import annotations

import functools
from functools import partial

import pytest
import torch
from helpers.contexts import batch
from helpers.graphs import Recorder, recorded_passes
from models import CONFIGS, tiny_model
from torch import nn
from transformers.models.llama import modeling_llama as llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from selfgen import ContextGenerator
from selfgen.context import fused
from selfgen.context.models import UnsupportedModelError
from selfgen_kernels import rotary

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
    monkeypatch.setattr(fused, "rotary", lambda *args, **how: calls.append(args) or rotary(*args, **how))
    states = [torch.randn(1, n, 5, 8) for n in (4, 2)]
    cos, sin = torch.randn(2, 1, 5, 8)
    with torch.no_grad(), fused.Fused(model).used():
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


def launches(monkeypatch, family, *, kernels=True):
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
            contexts(generator)
    names = [operator.name().partition("::")[2].partition(".")[0] for operator, *_ in recorded[0].calls]
    first, second = (at for at, name in enumerate(names) if name == "ragged_attention")
    return [name for name in names[first:second] if name not in VIEWS]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "gemma3", "phi3", "olmo2"])
def test_few_launches_per_layer(monkeypatch, family):
    """Those of seven products and two sums, one for each norm, and four for all else."""
    own = launches(monkeypatch, family, kernels=False)
    found = launches(monkeypatch, family)
    assert {"rms_norm", "act_mul", "rotary", "kv_append"} <= {*found}
    norms = found.count("rms_norm")
    assert len(found) <= 13 + norms < len(own) // 2 + 2
    with torch.autocast("cpu", torch.bfloat16):  # which casts what enters a product
        assert len(launches(monkeypatch, family)) <= 25
