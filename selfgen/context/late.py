"""Tensors that are computed late: when something reads them, or by a kernel that computes more in the same launch.

Models are unmodified, so what computes more is found out as it goes. The residual stream of a decoder: what enters a
layer is a tensor whose sums are computed late. A norm that is a kernel of its own (``fused``) computes the sum and the
norm. Rotary positions: queries and keys are turned by the kernel that writes the K/V to the cache (``ragged``).

Whatever else reads such a tensor gets the numbers that the model's own operations give, with the same bits. So nothing
has to be known of a layer: one that scales, clamps or normalizes what it adds, has two branches side by side, or does
something to its keys before the cache sees them, computes what it always does.

All that saves launches and costs Python, so it is for passes that are recorded (`computed_late`). What is added, or
turned, must stay as it is until then. torch counts the changes that it knows of, and all is computed before memory is
handed out to kernels of others. What can't be seen: a C++ extension that gets what is added without an operator, or
anything that has a pointer or a ``.data`` from before, and writes to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any, Literal, NoReturn
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.autograd.graph import increment_version
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from selfgen_kernels import add_rms_norm, rms_norm, rotary

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_at_once: WeakSet[nn.Module] = WeakSet()
_watch: ContextVar[_Watch | None] = ContextVar("selfgen_late", default=None)


class ChangedError(RuntimeError):
    """What something was to be computed of has been changed in place in between, or the form of what is computed."""


def computed_late(model: nn.Module) -> AbstractContextManager[Any]:
    """Inside, sums and rotations of ``model`` are computed late, and nowhere else; not if it is `never_late`."""
    return _Watch() if may_be_late(model) else nullcontext()


def never_late(model: nn.Module) -> None:
    _at_once.add(model)


def may_be_late(model: nn.Module) -> bool:
    return model not in _at_once


class _Watch(TorchFunctionMode):
    """Has all computed before something gets memory that may change it unseen."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[ref[Late]] = []

    def __enter__(self) -> _Watch:
        self._before = _watch.set(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _watch.reset(self._before)

    @torch.compiler.disable  # torch 2.11 and 2.12 compile it, and functions that they compile inside give other results
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _HAND_OUT or _is_of_others(func):
            if func == _DATA.__set__ and isinstance(args[0], Late):
                _refuse_other_form("data")
            made, self.made = self.made, []
            _read([one() for one in made])
            args, kwargs = _read(args), {name: _read(one) for name, one in kwargs.items()}
        return func(*args, **kwargs)


_DATA: Any = Tensor.data  # which shares memory, but not the count of changes
_HAND_OUT = {
    Tensor.__array__, Tensor.__cuda_array_interface__.__get__, Tensor.__deepcopy__, Tensor.__dlpack__,
    Tensor.__reduce_ex__, Tensor.data_ptr, Tensor.numpy, Tensor.share_memory_, Tensor.storage, Tensor.tolist,
    Tensor.untyped_storage, _DATA.__get__, _DATA.__set__,
}  # fmt: skip
_KNOWN = ("aten", "prim", "prims", "selfgen")  # whose changes are counted


def _is_of_others(func: Any) -> bool:
    return isinstance(func, OpOverload | OpOverloadPacket) and str(func).partition(".")[0] not in _KNOWN


_REMEDY = (
    "which it did not do when it was tried; report the model, and give cuda_graphs=False (--cuda-graphs no) until then"
)


def _refuse_other_form(by: object) -> NoReturn:
    raise ChangedError(
        f"a decoder layer has given its hidden states, or what it turns, another shape or memory in place ({by}), "
        f"{_REMEDY}"
    )


class _Given:
    """Tensors that something is computed of later."""

    def __init__(self, *tensors: Tensor):
        self._tensors, self._versions = tensors, [tensor._version for tensor in tensors]

    @staticmethod
    def can_be(tensors: Sequence[Any]) -> bool:
        """Whether nothing but their numbers decides what is computed, and changes of them are seen."""
        return not (_watch.get() is None or torch.is_grad_enabled() or torch.is_inference_mode_enabled()) and all(
            isinstance(one, Tensor) and one.dtype in _DTYPES and not one.is_inference() for one in tensors
        )

    def unchanged(self) -> tuple[Tensor, ...]:
        if [tensor._version for tensor in self._tensors] != self._versions:
            raise ChangedError(
                "a decoder layer has changed in place what it had added to its hidden states, or turned, before it "
                f"read the result, {_REMEDY}"
            )
        return self._tensors


class Late(Tensor):
    """Has a shape and a dtype; an operator that reads it is called with its `value`."""

    def value(self) -> Tensor:
        raise NotImplementedError

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        given, named = _read(args), {name: _read(one) for name, one in (kwargs or {}).items()}
        if func is torch.ops.aten.add.Tensor and Residual in types and not named and Residual.takes(*given):
            return Residual(*given)
        if torch.Tag.inplace_view in func.tags and isinstance(args[0], Late):
            _refuse_other_form(func)
        result = func(*given, **named)
        if func._schema.is_mutable:  # of which autograd, which counts changes, is not told here
            arguments = func._schema.arguments
            values = dict(zip((one.name for one in arguments), given, strict=False)) | named
            written = tree_leaves([values.get(one.name) for one in arguments if one.is_write])
            increment_version([one for one in written if isinstance(one, Tensor)])
        return result


def _read(given: Any) -> Any:
    """An argument of an operator, with the values of what is late."""
    if isinstance(given, list | tuple):
        return [_read(one) for one in given]
    return given.value() if isinstance(given, Late) else given


def _together(x: Tensor, y: Tensor) -> torch.dtype:
    """In which torch computes with two of `_DTYPES`."""
    return x.dtype if x.dtype == y.dtype else torch.float32


def _late(cls: Any, shape: Any, strides: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A tensor of class ``cls`` without memory."""
    make: Any = Tensor._make_wrapper_subclass
    made = make(cls, shape, strides=strides, dtype=dtype, device=device)
    torch._C._set_throw_on_mutable_data_ptr(made)  # to C++, it would be 0
    if (watch := _watch.get()) is not None:
        watch.made.append(ref(made))
    return made


class Residual(Late):
    """The sum of one or two ``terms`` of the same shape, contiguous ones."""

    @staticmethod
    def __new__(cls, *terms: Tensor) -> Residual:
        return _late(cls, terms[0].shape, None, _together(terms[0], terms[-1]), terms[0].device)

    def __init__(self, *terms: Tensor):
        self._terms = _Given(*terms) if len(terms) == 2 else None
        self._value = terms[0]  # once there are no terms

    @staticmethod
    def takes(*terms: Any) -> bool:
        """Whether their sum may be computed late."""
        like = terms[0]
        return _Given.can_be(terms) and all(
            (term.shape, term.device) == (like.shape, like.device) and term.is_contiguous() for term in terms
        )

    def value(self) -> Tensor:
        if self._terms is not None:
            first, second = self._terms.unchanged()
            self._terms, self._value = None, first + second
        return self._value

    def normed(self, weight: Tensor, eps: float, form: Literal["llama", "olmo2", "gemma"]) -> Tensor:
        """`rms_norm` of the sum."""
        if self._terms is None:
            return rms_norm(self._value, weight, eps, form=form)
        first, second = self._terms.unchanged()
        self._value, normed = add_rms_norm(first, second, weight, eps, form=form)
        self._terms = None
        return normed


class Rotation:
    """query [N, heads, head_dim] and key [N, kv_heads, head_dim], to be turned by cos and sin [N, head_dim]."""

    def __init__(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, keep_dtype: bool):
        self._given, self._keep_dtype = _Given(query, key, cos, sin), keep_dtype
        self._results: dict[int, Tensor] = {}

    @staticmethod
    def takes(*given: Any) -> bool:
        """Whether they may be turned late."""
        return _Given.can_be(given)

    def query(self) -> Turned:
        return Turned(self, 0)

    def key(self) -> Turned:
        return Turned(self, 1)

    def like(self, place: int) -> tuple[torch.Size, torch.dtype, torch.device]:
        """Shape, dtype and device of what is turned."""
        *states, cos, _ = self._given.unchanged()
        given = states[place]
        return given.shape, given.dtype if self._keep_dtype else _together(given, cos), given.device

    def result(self, place: int) -> Tensor:
        """The query, or the key, turned: [1, heads, N, head_dim]."""
        if place not in self._results:
            query, key, cos, sin = self._given.unchanged()
            both = rotary(query, key, cos, sin, keep_dtype=self._keep_dtype)
            self._results = dict(enumerate(both)) | self._results  # what was read before may have been changed
        return self._results[place].transpose(0, 1)[None]

    def append(self, keys: Tensor, values: Tensor, value: Tensor, slots: Tensor) -> bool:
        """Write keys and ``value`` [N, kv_heads, head_dim] to ``slots`` of a cache; False, unless nothing was read."""
        if self._results:
            return False
        query, key, cos, sin = self._given.unchanged()
        self._results[0] = torch.ops.selfgen.rotary_append(
            keys, values, query, key, value, cos, sin, slots, self._keep_dtype
        )
        return True


class Turned(Late):
    """The query or the key of a rotation, [1, heads, N, head_dim]."""

    @staticmethod
    def __new__(cls, rotation: Rotation, place: int) -> Turned:
        (tokens, heads, head_dim), dtype, device = rotation.like(place)
        shape, strides = (1, heads, tokens, head_dim), (heads * head_dim, head_dim, heads * head_dim, 1)
        return _late(cls, shape, strides, dtype, device)

    def __init__(self, rotation: Rotation, place: int):
        self.rotation, self._place = rotation, place

    def value(self) -> Tensor:
        return self.rotation.result(self._place)
