"""Passes in which a row has the same bits in any batch: ``precision="invariant"``, for bf16 and fp16.

Three things make a row depend on what it is computed with. Libraries choose how they multiply, and where they split a
sum, by the number of rows: linear layers run `invariant_linear` instead, and norms `rms_norm` (``fused``). torch
computes those numbers of a function that fill a vector register otherwise than those that are left over: activations
are looked up in a table of all 65,536 numbers of a 16-bit dtype. And a model may have other such operations of its own:
`check_invariant` looks at every operation of a pass, and refuses by name what is not known to give each row by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .fused import Fused
from .late import Late
from .models import UnsupportedModelError
from .packed import CastWeights, fresh_casts_of, plain_linears, replaced
from .precision import autocast_dtype, how_quantized, is_plain, precision_of
from .ragged import RaggedCache, RaggedPass, ragged_logits, ragged_model

HALF = (torch.bfloat16, torch.float16)
_NUMBERS = 2**16  # that they have
_FEW = 7  # numbers, less than a vector register holds
_CHUNK = 2**12  # numbers that one thread computes together


class DependsOnBatchError(UnsupportedModelError):
    """A row's bits may depend on its batch, so ``precision="invariant"`` can't be had for the model."""


class Invariant:
    """What runs in place of modules of ``model`` whose results may depend on the batch.

    Tables stay where they are, for CUDA graphs.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self._tables: dict[object, Tensor | None] = {}
        self._fused = Fused(model)
        self.by_place: dict[object, bool] = {}  # what `_Operations` has found out

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model}  # the rest is found out again

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(vars(Invariant(state["model"])))

    def used(self, casts: CastWeights | None = None) -> AbstractContextManager[None]:
        """Inside, it runs; ``casts`` are the weights in autocast's dtype, which otherwise are cast at each use."""
        return replaced(self._forwards(casts))

    def _forwards(self, casts: CastWeights | None) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
        yield from self._fused.norms()
        for linear in plain_linears(self.model, self.model.device.type):
            yield linear, partial(_linear, linear, casts)
        dtype = precision_of(self.model)
        for module in self.model.modules():
            if "forward" in vars(module):
                continue
            if type(module) is Conv1D and is_plain(module.weight):
                yield module, partial(_conv1d, module)
            elif dtype in HALF and (table := self._table(module, dtype)) is not None:
                yield module, partial(_look_up, module, table)

    def _table(self, module: nn.Module, dtype: torch.dtype) -> Tensor | None:
        """What ``module`` makes of each number of ``dtype``, by its bits; None if it is not a function of a number."""
        of_activations = type(module).__module__ in ("torch.nn.modules.activation", "transformers.activations")
        if not of_activations or any(True for _ in (*module.parameters(), *module.buffers(), *module.children())):
            return None
        settings = {name: repr(value) for name, value in vars(module).items() if name[0] != "_" and name != "training"}
        key = type(module), tuple(settings.items()), dtype, self.model.device
        if key not in self._tables:
            self._tables[key] = _table_of(module, dtype, self.model.device)
        return self._tables[key]


def _linear(module: nn.Linear, casts: CastWeights | None, hidden: Tensor) -> Tensor:
    own = module.weight, module.bias
    if casts is None or casts.dtype != autocast_dtype(hidden.device) or hidden.dtype == torch.float64:
        return _product(hidden, *own)
    return _product(hidden, *casts.of(module) or own)


def _conv1d(module: Conv1D, hidden: Tensor) -> Tensor:
    return _product(hidden, module.weight.T, module.bias)


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = autocast_dtype(hidden.device)
    if dtype is not None and hidden.dtype != torch.float64:
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    result = torch.ops.selfgen.invariant_linear(hidden.reshape(-1, hidden.shape[-1]), weight, bias)
    return result.view(*hidden.shape[:-1], len(weight))


def _numbers(dtype: torch.dtype, device: torch.device) -> Tensor:
    """All of a 16-bit ``dtype``, in the order of their bits; of fp32 one for each first half of the bits."""
    every = torch.arange(_NUMBERS, device=device)
    if dtype == torch.float32:
        return (every << 16 | every * 40503 % _NUMBERS).to(torch.int32).view(dtype)  # second halves in no order
    return every.to(torch.int16).view(dtype)


def _table_of(module: nn.Module, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    numbers = _numbers(dtype, device)
    table = torch.cat([module(chunk) for chunk in numbers.split(_CHUNK)])
    if table.shape != numbers.shape or table.dtype != dtype:
        return None
    few = slice(1, _FEW + 1)  # subnormal numbers, of which softmax would make something else
    return table if torch.allclose(module(numbers[few]), table[few], rtol=2**-6, atol=1e-30) else None


def _look_up(module: nn.Module, table: Tensor, hidden: Tensor) -> Tensor:
    if hidden.dtype != table.dtype:
        return type(module).forward(module, hidden)
    return table[hidden.contiguous().view(torch.int16).long()]  # negative ones count from the end


# ---- What a model computes besides ----------------------------------------------------------------------------------

_MOVES = {  # compute no number, or an exact one
    "_reshape_alias", "_reshape_copy", "_to_copy", "_unsafe_index", "_unsafe_view", "alias", "amax", "amin", "arange",
    "argmax", "argmin", "argsort", "as_strided", "bitwise_and", "bitwise_not", "cat", "clone", "constant_pad_nd",
    "copy", "copy_", "detach", "embedding", "empty", "empty_like", "empty_strided", "eq", "expand", "fill", "fill_",
    "flip", "full", "full_like", "gather", "ge", "gt", "index", "index_copy", "index_put", "index_put_",
    "index_select", "isfinite", "isinf", "isnan", "le", "lift_fresh", "lt", "masked_fill", "masked_fill_", "max",
    "maximum", "min", "minimum", "ne", "new_empty", "new_full", "new_ones", "new_zeros", "nonzero", "ones",
    "ones_like", "repeat", "roll", "scalar_tensor", "scatter", "scatter_", "select_scatter", "slice_scatter", "sort",
    "stack", "topk", "tril", "triu", "where", "zeros", "zeros_like", "zero_",
}  # fmt: skip
_EXACT = {"abs", "add", "add_", "clamp", "clamp_min", "div", "mul", "mul_", "neg", "relu", "rsub", "sqrt", "sub"}
_BY_ROW = {"_fused_rms_norm", "native_layer_norm"}  # by one thread, or one block, for each row
_PRODUCTS = {"addmm", "bmm", "mm"}
_MOST_WIDTH = 2**15  # of a row whose mean one thread computes


class _Operations(TorchDispatchMode):
    """Looks at the operations called inside; ``doubts`` are those that may depend on the batch, by the module."""

    def __init__(self, model: nn.Module, by_place: dict[object, bool]):
        super().__init__()
        self.doubts: dict[str, str] = {}
        self._inside: list[str] = []
        self._by_place = by_place
        self._hooks = []
        for name, module in model.named_modules():
            said = f"{type(module).__name__} ({name})" if name else type(module).__name__
            self._hooks.append(module.register_forward_pre_hook(partial(self._enter, said)))
            self._hooks.append(module.register_forward_hook(self._leave))

    def _enter(self, said: str, *_: object) -> None:
        self._inside.append(said)

    def _leave(self, *_: object) -> None:
        self._inside.pop()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(one, Late) for one in types):  # calls operators itself
            return NotImplemented
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._is_known(func, args, kwargs, result):
            name = func.name().removeprefix("aten::").partition(".")[0]
            self.doubts.setdefault(self._inside[-1] if self._inside else "the model", name)
        return result

    def _is_known(self, func: Any, args: Any, kwargs: Any, result: Any) -> bool:
        name = func.name().removeprefix("aten::").partition(".")[0]
        given = zip(func._schema.arguments, args, strict=False)
        named = {argument.name: value for argument, value in given} | kwargs
        if named.get("accumulate") or named.get("reduce"):  # a sum in the order of the rows
            return False
        tensors = [one for one in tree_leaves((args, kwargs, result)) if isinstance(one, Tensor)]
        if func.namespace != "aten" or func.is_view or name in _MOVES | _EXACT | _BY_ROW:
            return func.namespace in ("aten", "prim", "selfgen")
        if not any(one.is_floating_point() for one in tensors):
            return True
        if name in _PRODUCTS:
            return args[-2].shape[-1] == 1  # one product is no sum
        if name == "mean":  # a row too long, or alone, would be split over threads; on GPUs, any may be
            given, dims = args[0], args[1] if len(args) > 1 else None
            return dims in ([-1], [given.dim() - 1]) and given.shape[-1] < _MOST_WIDTH and given.is_cpu
        if torch.Tag.pointwise in func.tags and isinstance(result, Tensor):
            return self._is_everywhere_the_same(func, args, kwargs, result)
        return False

    def _is_everywhere_the_same(self, func: Any, args: Any, kwargs: Any, result: Tensor) -> bool:
        """Whether a number gives alone, or with fewer than fill a vector register, what it gives among many."""
        given = [one for one in args if isinstance(one, Tensor)]
        rest = [one for one in args if not isinstance(one, Tensor)]
        key = func, repr(rest), repr(kwargs), *((one.dtype, one.device) for one in given)

        def call(*parts: Tensor) -> Tensor:
            left = iter(parts)
            return func(*(next(left) if isinstance(one, Tensor) else one for one in args), **kwargs)

        if key not in self._by_place:
            own = _gives_the_same(call, [one.expand(result.shape).reshape(-1)[:_CHUNK].clone() for one in given])
            if own and len(given) == 1 and given[0].dtype in (*HALF, torch.float32):
                if key not in _OF_NUMBERS:
                    _OF_NUMBERS[key] = _gives_the_same(call, [_numbers(given[0].dtype, given[0].device)])
                own = _OF_NUMBERS[key]
            self._by_place[key] = own
        return self._by_place[key]


_OF_NUMBERS: dict[object, bool] = {}
"""Whether a function gives each of `_numbers` alone what it gives it among others: trying that takes a while."""


def _gives_the_same(call: Callable[..., Tensor], some: list[Tensor]) -> bool:
    """Whether ``call`` gives a number alone, and with few, what it gives among many; ``some`` are arguments, [n]."""

    def together(count: int) -> Tensor:
        results = [call(*(x.clone() for x in chunks)) for chunks in zip(*(x.split(count) for x in some), strict=True)]
        return torch.cat(results).nan_to_num(7.0)

    want = together(_CHUNK)
    return torch.equal(together(_FEW), want) and torch.equal(together(1), want)


def check_half(model: PreTrainedModel) -> None:
    """Raise DependsOnBatchError if ``model`` does not compute in bf16 or fp16, or if its weights are quantized."""
    name, dtype = type(model).__name__, precision_of(model)
    if method := how_quantized(model):
        raise DependsOnBatchError(
            f'{name} has quantized weights ({method}), for whose products precision="invariant" has no kernel; use '
            'precision="model"'
        )
    if dtype not in HALF:
        raise DependsOnBatchError(
            f'precision="invariant" is for bf16 and fp16, and {name} computes in {str(dtype).removeprefix("torch.")}, '
            'whose contexts are those of the loop but for ties; use precision="model"'
        )


def check_invariant(model: PreTrainedModel, invariant: Invariant, rows: list[Tensor]) -> None:
    """Raise DependsOnBatchError if a row's bits may depend on its batch, with ``invariant`` in use.

    By looking at the operations of a pass over ``rows``, of at least 2 tokens each, and by comparing the bits that
    modules give for the tokens of the first row, in one pass with the others, in another order, and one by one.
    """
    tokens, lengths = torch.cat(rows), [len(row) for row in rows]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    every = [(start, 0, length) for start, length in zip(starts, lengths, strict=True)]
    of_first = torch.arange(lengths[0], device=tokens.device)
    with ragged_model(model), invariant.used(fresh_casts_of(model)), Fused(model).used():
        with _Operations(model, invariant.by_place) as operations:
            _outputs_of(model, tokens, [every], of_first)
        for where, operation in operations.doubts.items():
            raise DependsOnBatchError(
                f"{where} computes {operation}, whose result for a row is not known to be the same in any batch; use "
                'precision="model"'
            )
        want = _outputs_of(model, tokens, [every], of_first)
        middle = lengths[0] // 2
        backwards = [[*every[:0:-1], (0, 0, middle)], [(0, middle, lengths[0])]]
        one_by_one = [[(0, place, place + 1)] for place in range(lengths[0])]
        for passes in (backwards, one_by_one):
            found = _outputs_of(model, tokens, passes, of_first)
            for where, output in want.items():
                if not torch.equal(found[where].view(torch.uint8), output.view(torch.uint8)):
                    raise DependsOnBatchError(
                        f"{where} gives a row other bits in another batch, in spite of products and activations that "
                        'don\'t; use precision="model"'
                    )


def _outputs_of(
    model: PreTrainedModel, tokens: Tensor, passes: list[list[tuple[int, int, int]]], slots: Tensor
) -> dict[str, Tensor]:
    """What each module gives for the tokens at ``slots``, in the order in which modules are left, and the logits."""
    cache = RaggedCache(model, len(tokens))
    found: dict[str, Tensor] = {}
    current = slots

    def keep(said: str, module: nn.Module, args: tuple, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(first, Tensor) or first.dim() < 2 or first.shape[:2] != (1, len(current)):
            return
        kept = found.setdefault(said, first.new_zeros(len(tokens), *first.shape[2:]))
        kept[current] = first[0]

    hooks = [
        module.register_forward_hook(partial(keep, f"{type(module).__name__} ({name})"))
        for name, module in model.named_modules()
    ]
    try:
        for windows in passes:
            ragged_pass = RaggedPass.of_windows(windows, tokens.device)
            current = ragged_pass.slots
            every = torch.arange(len(current), device=tokens.device)
            logits = ragged_logits(model, cache, ragged_pass, tokens[current], every)
            kept = found.setdefault(f"{type(model).__name__}", logits.new_zeros(len(tokens), logits.shape[-1]))
            kept[current] = logits
    finally:
        for hook in hooks:
            hook.remove()
    return {said: kept[slots] for said, kept in found.items()}
