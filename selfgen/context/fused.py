"""Norms, gates of MLPs and rotary positions as single kernels, where trying shows that this is what they compute.

In passes that are recorded, a norm's kernel also computes the sum that it reads, in layers that trying shows to be the
same then, and the kernel that writes the K/V turns queries and keys (``late``).

A decoder layer is about forty small kernels, and on a GPU each costs a pass more than what it computes. No class is
known by name here. What looks like a norm, say, is run on random rows, and so is the kernel: where they agree but for
roundings, the kernel takes its place during a generation. All else keeps its own forward, and ``verification`` compares
the whole model with its own forward afterwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import permutations, product
from types import CellType, FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from selfgen_kernels import act_mul, rms_norm, rotary

from .late import ChangedError, Residual, Rotation, computed_late
from .packed import replaced
from .precision import autocast_dtype, is_linear, is_plain

Forward = Callable[..., Any]
Fitting = Callable[[nn.Module], Forward]
"""Makes the forward of a module, and of others that are like it."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FAULTS = (ArithmeticError, AttributeError, IndexError, RuntimeError, TypeError, ValueError)
_ULPS = {torch.float32: 8, torch.bfloat16: 2, torch.float16: 2}  # a sum in another order, roundings to a neighbour
_EQUAL = 0.98  # of the numbers in 16 bits, at least: what rounds at other places has other ones more often


def saves_time(device: torch.device) -> bool:
    """Whether launches are what passes wait for on ``device``."""
    return device.type == "cuda"


class Fused:
    """What of ``model`` is replaced. What has been found of a module holds for all that are like it."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self._found: dict[Hashable, Fitting | None] = {}
        self._last: list[tuple[nn.Module, Forward]] | None = None

    def used(self) -> AbstractContextManager[None]:
        """Inside, parts are single kernels, where that saves time; modules get their own forwards back afterwards."""
        if not saves_time(self.model.device):
            return replaced(())
        if self._last is None:
            self._last = list(self.forwards())
        return replaced(self._last)

    def forget(self) -> None:
        """Have a look at all modules again: they may have changed."""
        self._last = None

    def norms(self) -> Iterator[tuple[nn.Module, Forward]]:
        """Those that are `rms_norm`, and the forward that runs it."""
        return self.forwards(_norm)

    def forwards(self, *kinds: Callable[[nn.Module], Fitting | None]) -> Iterator[tuple[nn.Module, Forward]]:
        """The modules, of some ``kinds`` or of all, whose forward can be replaced, and by what."""
        every: tuple[Callable[[nn.Module], Fitting | None], ...] = _norm, _gated, _attention
        if not any(module._forward_hooks or module._forward_pre_hooks for module in self.model.modules()):
            every = *every, _layer  # hooks see what they always do
        for module in self.model.modules():
            kind = tuple(_kind_of(module)) if _is_its_own(module) else ()
            for find in (kinds or every) if kind else ():
                if (find, kind) not in self._found:
                    self._found[find, kind] = _tried(find, module)
                fitting = self._found[find, kind]
                if fitting is not None:
                    yield module, fitting(module)


def _dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """Those that are tried: all, or what autocast goes with."""
    dtype = autocast_dtype(device)
    return _DTYPES if dtype is None else (torch.float32, dtype)


def _is_its_own(module: nn.Module) -> bool:
    """Whether nobody else has a say in what a module computes: no hooks, compilers, or weights split over processes."""
    if "forward" in vars(module) or any(part._compiled_call_impl is not None for part in module.modules()):
        return False
    if any(part._forward_hooks or part._forward_pre_hooks for part in module.modules()):
        return False
    return not any(isinstance(weight, DTensor) for weight in module.parameters())


def _kind_of(module: nn.Module) -> Iterator[Any]:
    """What modules have in common that compute the same function of their weights."""
    weights = dict(module.named_parameters())
    yield type(module)
    yield from (autocast_dtype(weight.device) for weight in list(weights.values())[:1])
    yield _rotation_of(module)
    yield tuple((name, type(weight), weight.dtype, weight.shape) for name, weight in weights.items())
    for part in module.modules():
        plain = {name: value for name, value in vars(part).items() if isinstance(value, bool | int | float | str)}
        yield type(part), repr(plain)


@torch.no_grad()
def _tried(find: Callable[[nn.Module], Fitting | None], module: nn.Module) -> Fitting | None:
    try:
        return find(module)
    except _FAULTS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return None


def _agree(got: Tensor, want: Tensor, lost: Tensor | float = 0.0) -> bool:
    """Whether numbers are the same but for roundings, and for what is below ``lost``."""
    if got.dtype != want.dtype or got.shape != want.shape or got.dtype not in _DTYPES:
        return False
    allowed = _ULPS[want.dtype] * torch.finfo(want.dtype).eps * want.double().abs()
    difference = (got.double() - want.double()).abs()
    equal = ((difference == 0) | (difference <= lost)).double().mean() >= _EQUAL
    return bool((difference <= allowed + lost).all() & (equal | (want.dtype == torch.float32)))


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _like(module: nn.Module, args: tuple, kwargs: dict) -> bool:
    """Whether a call is one that has been tried: of one tensor, in inference."""
    return len(args) == 1 and not kwargs and args[0].dtype in _dtypes(args[0].device) and not torch.is_grad_enabled()


# ---- Norms -----------------------------------------------------------------------------------------------------------

_Form = Literal["llama", "olmo2", "gemma"]
_FORMS: tuple[_Form, ...] = ("llama", "olmo2", "gemma")


def _norm(module: nn.Module) -> Fitting | None:
    """Of a module with a weight [D], a small number and nothing else: its form of `rms_norm`, the same in any dtype."""
    weights = list(module.named_parameters())
    if len(weights) != 1 or any(True for _ in (*module.buffers(), *module.children())):
        return None
    name, weight = weights[0]
    if not is_plain(weight) or weight.dim() != 1 or weight.dtype not in _DTYPES:
        return None
    rows = _random(2, 5, len(weight))
    rows[0, 1:4] *= torch.tensor([1e-4, 1e-2, 60.0])[:, None]
    rows[1, 0, 0], rows[1, 1] = 3000, 0
    given = [rows.to(weight.device, dtype) for dtype in _dtypes(weight.device)]
    scales = weight, _random(len(weight), seed=1).to(weight)
    small = {value for value in vars(module).values() if isinstance(value, float) and 2**-64 <= value < 1}
    for eps, form in product(sorted(small), _FORMS):
        if all(
            _agree(rms_norm(x, scale, eps, form=form), functional_call(module, {name: scale}, (x,)))
            for x in given
            for scale in scales
        ):
            return partial(partial, _norm_forward, name, eps, form)
    return None


def _norm_forward(name: str, eps: float, form: _Form, module: nn.Module, *args: Tensor, **kwargs: Any) -> Tensor:
    if not _like(module, args, kwargs):
        return type(module).forward(module, *args, **kwargs)
    (x,) = args
    if isinstance(x, Residual):
        return x.normed(getattr(module, name), eps, form)
    order = sorted(range(x.dim() - 1), key=x.stride, reverse=True)  # as it lies in memory: rows need not be copied
    result = rms_norm(x.permute(*order, -1), getattr(module, name), eps, form=form)
    return result.permute(*map(order.index, range(len(order))), -1)


# ---- Sums before norms -----------------------------------------------------------------------------------------------


_MOST_BRANCHES = 4  # attention, an MLP, and what else a layer may have


class _Part(nn.Module):
    """Stands for a part of a layer that is tried."""

    def __init__(self, run: Forward):
        super().__init__()
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


def _layer(module: nn.Module) -> Fitting | None:
    """Of a decoder layer with norms that gives the same bits, to its caller and to its parts, if sums are late."""
    if not isinstance(module, GradientCheckpointingLayer):
        return None
    norms = {
        name: fitting(part)
        for name, part in module.named_children()
        if _is_its_own(part) and (fitting := _tried(_norm, part))  # others keep their forward
    }
    branches = [name for name, _ in module.named_children() if name not in norms]
    if not norms or len(branches) > _MOST_BRANCHES:
        return None
    for pairs in product((True, False), repeat=len(branches)):  # whether each has a second result
        try:
            with computed_late(module):
                is_same = _is_same_if_late(module, norms, dict(zip(branches, pairs, strict=True)))
        except ChangedError:
            return None
        except _FAULTS:
            continue
        return partial(partial, _layer_forward) if is_same else None
    return None


def _is_same_if_late(module: nn.Module, norms: dict[str, Forward], branches: dict[str, bool]) -> bool:
    (weight,) = module.get_submodule(next(iter(norms))).parameters()
    parameters = inspect.signature(type(module).forward).parameters.values()
    _, _, *others = (one.name for one in parameters if one.kind == one.POSITIONAL_OR_KEYWORD)
    tried = copy(module)
    for dtype, of_branches in product(_dtypes(weight.device), repeat=2):
        stand_ins = {name: partial(_stand_in, of_branches, pair, i) for i, (name, pair) in enumerate(branches.items())}
        vars(tried)["_modules"] = {name: _Part(run) for name, run in (norms | stand_ins).items()}
        hidden = _random(1, 5, len(weight)).to(weight.device, dtype)
        given = hidden.clone(), Residual(hidden.clone())
        want, got = (type(module).forward(tried, x, **dict.fromkeys(others)) for x in given)
        if not (isinstance(want, Tensor) and _same(got, want) and _same(given[1], given[0])):
            return False
    return True


def _same(got: Tensor, want: Tensor) -> bool:
    return got.dtype == want.dtype and torch.equal(got * 1, want)


def _stand_in(dtype: torch.dtype, has_second: bool, seed: int, *args: Any, **kwargs: Any) -> Any:
    """Numbers that depend on those that a branch is given."""
    x = next(one for one in (*args, *kwargs.values()) if isinstance(one, Tensor))
    result = (x.flip(-1) * _random(x.shape[-1], seed=seed).to(x)).to(dtype)
    return (result, None) if has_second else result


def _layer_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if args and type(args[0]) is Tensor and Residual.takes(args[0]):
        args = Residual(args[0]), *args[1:]
    return type(module).forward(module, *args, **kwargs)


# ---- Gated MLPs ------------------------------------------------------------------------------------------------------

_Activation = Literal["silu", "gelu_tanh"]
_ACTIVATIONS: tuple[_Activation, ...] = ("silu", "gelu_tanh")


@dataclass(frozen=True)
class _Gate:
    """By name, which part of a module is what in down(act(gate) * up)."""

    act: str
    down: str
    inner: tuple[str, ...]  # gate and up, or one that gives both
    first: bool = True  # of those that one gives, the gate is the first half

    def inner_states(self, module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        if len(self.inner) == 2:
            products, dtype = [getattr(module, name) for name in self.inner], autocast_dtype(x.device)
            if dtype is not None and x.dtype == torch.float32 and all(map(is_linear, products)):
                x = x.to(dtype)  # once, where autocast would for each
            gate, up = (product(x) for product in products)
            return gate, up
        halves = getattr(module, self.inner[0])(x).chunk(2, dim=-1)
        return halves if self.first else halves[::-1]

    def own(self, module: nn.Module, x: Tensor) -> Tensor:
        """By torch's ops."""
        gate, up = self.inner_states(module, x)
        return getattr(module, self.down)(getattr(module, self.act)(gate) * up)


def _gates(module: nn.Module) -> Iterator[_Gate]:
    """The ways in which the parts of a module could be a gated MLP, by their shapes."""
    parts = dict(module.named_children())
    products = [name for name, part in parts.items() if hasattr(part, "in_features") and hasattr(part, "out_features")]
    others = [name for name in parts if name not in products]
    if len(others) != 1 or len(products) not in (2, 3) or list(module.parameters(recurse=False)):
        return
    if any(True for _ in (*parts[others[0]].parameters(), *parts[others[0]].buffers())):
        return
    for *inner, down in permutations(products):
        widths = [_number(parts[name].out_features) for name in inner]
        width = _number(parts[down].in_features)
        if len(inner) == 2 and widths == [width, width]:
            yield _Gate(others[0], down, tuple(inner))
        elif len(inner) == 1 and widths == [2 * width]:
            yield from (_Gate(others[0], down, tuple(inner), first) for first in (True, False))


def _number(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is no size")
    return value


def _gated(module: nn.Module) -> Fitting | None:
    """Of a module that gives the bits of torch's ops for a gated MLP: the activation of `act_mul` that it has."""
    weights = list(module.parameters())
    if not weights or not all(map(is_plain, weights)):
        return None
    gates = [gate for gate in _gates(module) if _is_gated(module, gate, weights[0])]
    if len(gates) != 1:  # or weights that don't tell, such as zeros
        return None
    act = getattr(module, gates[0].act)
    for activation in _ACTIVATIONS:
        if all(_is_activation(act, activation, dtype, weights[0].device) for dtype in _dtypes(weights[0].device)):
            return partial(partial, _gated_forward, gates[0], activation)
    return None


def _is_gated(module: nn.Module, gate: _Gate, weight: Tensor) -> bool:
    width = _number(module.get_submodule(gate.inner[0]).in_features)
    given = [(_random(1, 5, width) * size).to(weight.device, weight.dtype) for size in (1, 100)]
    pairs = [(gate.own(module, x), type(module).forward(module, x)) for x in given]
    return all(torch.allclose(got, want, rtol=0, atol=0, equal_nan=True) for got, want in pairs)


def _is_activation(act: nn.Module, activation: _Activation, dtype: torch.dtype, device: torch.device) -> bool:
    gate, up = (_random(4, 500, seed=seed) for seed in (0, 1))
    gate *= torch.tensor([1e-2, 1.0, 5.0, 50.0])[:, None]
    gate, up = gate.to(device, dtype), up.to(device, dtype)
    lost = 2**-21 * (gate.double() * up.double()).abs() if activation == "gelu_tanh" else 1e-30  # by 1 + tanh near 0
    return _agree(act_mul(gate, up, activation=activation), act(gate) * up, lost)


def _gated_forward(
    gate: _Gate, activation: _Activation, module: nn.Module, *args: Tensor, **kwargs: Any
) -> Tensor:  # fmt: skip
    if not _like(module, args, kwargs):
        return type(module).forward(module, *args, **kwargs)
    states, up = gate.inner_states(module, args[0])
    if states.dtype != up.dtype or states.dtype not in _dtypes(up.device):
        return type(module).forward(module, *args, **kwargs)
    return getattr(module, gate.down)(act_mul(states, up, activation=activation))


# ---- Rotary positions ------------------------------------------------------------------------------------------------

_ROTARY = "apply_rotary_pos_emb"  # as transformers calls it in every model's file


def _rotation_of(module: nn.Module) -> Callable[..., Any] | None:
    """The function by which the forward of a module turns queries and keys."""
    forward = inspect.unwrap(type(module).forward)
    if _ROTARY not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return None
    return forward.__globals__.get(_ROTARY)


def _attention(module: nn.Module) -> Fitting | None:
    """Of a module whose rotation gives the bits of `rotary`: a forward that calls that."""
    rotation = _rotation_of(module)
    weight = next(module.parameters(), None)
    if rotation is None or weight is None:
        return None
    device = weight.device
    for keep_dtype in (False, True):
        turn = partial(_turned, rotation, keep_dtype)
        for dtype, of_angles in product(_dtypes(device), repeat=2):
            query, key = (_random(1, 5, heads, 16, seed=heads).transpose(1, 2).to(device, dtype) for heads in (4, 2))
            cos, sin = _random(2, 1, 5, 16, seed=1).to(device, of_angles)
            got, want = (f(query, key, cos, sin) for f in (turn, rotation))
            if not all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(got, want, strict=True)):
                break
        else:
            return partial(partial, _calling(turn, type(module).forward))
    return None


def _turned(
    rotation: Callable[..., Any], keep_dtype: bool, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor,
    *args: Any, **kwargs: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """query [1, heads, N, head_dim] and key turned by cos and sin [1, N, head_dim]; anything else by ``rotation``."""
    plain = query.dtype == key.dtype and query.dtype in _dtypes(query.device) and not torch.is_grad_enabled()
    fits = query.dim() == 4 and cos.shape == sin.shape == (1, *query.shape[2:]) and len(query) == 1
    if args or kwargs or not plain or not fits or key.shape != (1, key.shape[1], *query.shape[2:]):
        return rotation(query, key, cos, sin, *args, **kwargs)
    given = query[0].transpose(0, 1), key[0].transpose(0, 1), cos[0], sin[0]
    if Rotation.takes(*given):
        turned = Rotation(*given, keep_dtype)
        return turned.query(), turned.key()
    results = rotary(*given, keep_dtype=keep_dtype)
    return results[0].transpose(0, 1)[None], results[1].transpose(0, 1)[None]


def _calling(turn: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with ``turn`` as its rotation, decorators included: a copy, so that other models keep theirs."""
    inner, cells = getattr(function, "__wrapped__", None), function.__closure__ or ()
    names = function.__globals__
    if inner is None:
        names = {**names, _ROTARY: turn}
    else:
        copied = CellType(_calling(turn, inner))
        changed = tuple(copied if cell.cell_contents is inner else cell for cell in cells)
        if changed == cells:
            raise TypeError(f"{function.__name__} calls what it wraps in a way of its own")
        cells = changed
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, cells)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
