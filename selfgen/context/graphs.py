"""The forward of a generation's passes as CUDA graphs.

A pass over few tokens is about a thousand small kernels. The host takes several times as long to launch them as a GPU
takes to run them. ``GraphedForward`` records them once for each size of a pass, and replays them for the price of one
launch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from .forward import Forward
from .hidden_states import HiddenStates
from .invariant import Invariant
from .models import vocab_size_of
from .packed import CastWeights
from .precision import autocast_dtype
from .ragged import RaggedCache, RaggedPass, ragged_logits

logger = logging.getLogger(__name__)

_STREAMS_OF_TORCH = 32  # of a device and a priority, which torch.cuda.Stream hands out in turn
_streams: WeakKeyDictionary[object, torch.cuda.Stream] = WeakKeyDictionary()
PADDING = -1  # a slot that `kv_append` passes by
LARGEST = 8192  # tokens of a recorded pass; beyond, the GPU has enough to do
MOST_HIDDEN = 2**30  # bytes of the hidden states of a recorded pass
MOST_LOGITS = 2**29  # bytes of the logits of one; those of fewer places are kept beside them, less than twice as many
MOST_KV = 1 / 16  # of the GPU's memory, to be kept from generation to generation
MOST_CASTS = 1 / 8  # the same, of weights in autocast's dtype


def forward_of(model: PreTrainedModel, *, cuda_graphs: bool, invariant: Invariant | None = None) -> Forward:
    """The fastest forward for ``model`` where it is."""
    parameters = list(model.parameters())
    one_gpu = len({parameter.device for parameter in parameters}) == 1 and parameters[0].device.type == "cuda"
    plain = not any(is_traceable_wrapper_subclass(parameter) for parameter in parameters)  # others hide their memory
    if cuda_graphs and one_gpu and any(isinstance(parameter, DTensor) for parameter in parameters):
        logger.info("passes are not recorded as CUDA graphs, as weights are split over processes")
    kind = GraphedForward if cuda_graphs and one_gpu and plain and not torch.version.hip else Forward
    return kind(model, invariant)


@dataclass(frozen=True)
class _Size:
    """What a recorded pass has room for: coarse, so that sizes recur, and fine enough that little is padding."""

    tokens: int
    places: int
    rows: int
    keeps: bool  # hidden states, too

    @classmethod
    def of(cls, ragged_pass: RaggedPass, index: Tensor, keeps: bool, most_places: int) -> _Size:
        """``most_places`` are those whose logits there is room for; sizes with more are the pass's own."""
        tokens, places, rows = (
            1 << max(4, (count - 1).bit_length())
            for count in (ragged_pass.num_tokens, len(index), len(ragged_pass.kv_ranges))
        )
        # Or there would be many sizes. Of a large vocabulary a quarter of a large pass has no room, a sixteenth may.
        places = max([places, *(least for least in (tokens // 4, tokens // 16) if least <= most_places)])
        if len(index) <= most_places < places:
            places = most_places
        if tokens > 256:
            step = tokens // 8
            tokens = -(-ragged_pass.num_tokens // step) * step
        return cls(tokens, places, rows, keeps)


class _Results:
    """What passes write, one after the other into the same memory."""

    def __init__(self, model: PreTrainedModel, room: int):
        self.model, self.room = model, room
        self.logits: dict[int, Tensor] = {}  # by their number of places: [places, V]
        self.hidden: HiddenStates | None = None  # a slot for each token of a pass

    def keep_logits(self, logits: Tensor) -> None:
        places = len(logits)
        if places not in self.logits:
            self.logits[places] = torch.empty_like(logits)
        self.logits[places].copy_(logits)

    def hidden_states(self) -> HiddenStates:
        if self.hidden is None:
            self.hidden = HiddenStates(self.model, self.room)
        return self.hidden


class _Recorded:
    """A pass of one size: what it reads and writes lies where it is, and ``run`` computes it."""

    replay: Callable[[], None] | None = None

    def __init__(self, model: PreTrainedModel, cache: RaggedCache, results: _Results, size: _Size):
        device = model.device
        self.model, self.cache, self.results = model, cache, results
        self.input_ids = torch.zeros(size.tokens, dtype=torch.int64, device=device)
        self.index = torch.zeros(size.places, dtype=torch.int64, device=device)
        self.ragged_pass = RaggedPass(
            slots=torch.full((size.tokens,), PADDING, device=device),
            position_ids=torch.zeros(1, size.tokens, dtype=torch.int64, device=device),
            cu_seqlens_q=torch.zeros(size.rows + 1, dtype=torch.int32, device=device),
            kv_ranges=torch.zeros(size.rows, 2, dtype=torch.int64, device=device),
        )

    def fill(self, ragged_pass: RaggedPass, tokens: Tensor, index: Tensor) -> None:
        mine, n, rows = self.ragged_pass, ragged_pass.num_tokens, len(ragged_pass.kv_ranges)
        self.input_ids[:n] = tokens[ragged_pass.slots]
        self.index[: len(index)] = index
        mine.slots[:n] = ragged_pass.slots
        mine.slots[n:] = PADDING
        mine.position_ids[:, :n] = ragged_pass.position_ids
        mine.cu_seqlens_q[: rows + 1] = ragged_pass.cu_seqlens_q
        mine.cu_seqlens_q[rows + 1 :] = ragged_pass.cu_seqlens_q[-1]  # windows of no row are empty
        mine.kv_ranges[:rows] = ragged_pass.kv_ranges

    def run(self) -> None:
        self.results.keep_logits(ragged_logits(self.model, self.cache, self.ragged_pass, self.input_ids, self.index))


class GraphedForward(Forward):
    """The same passes as CUDA graphs, padded to some sizes.

    A size is run as it is the first time, recorded the second time and replayed from then on, also in later
    generations: K/V and graphs stay. Weights are read where they lie, so an optimizer's steps are seen. When weights
    have moved, or modules, hooks, adapters, plain attributes or the precision have changed, all is recorded anew
    (`_state_of`). A model that can't be recorded, as it waits for the device within a pass, is run as it is.
    """

    def __init__(self, model: PreTrainedModel, invariant: Invariant | None = None):
        super().__init__(model, invariant)
        text = model.config.get_text_config(decoder=True)
        self._layers = text.num_hidden_layers
        self._most_tokens = min(LARGEST, MOST_HIDDEN // (4 * (self._layers + 1) * text.hidden_size))
        self._most_places = MOST_LOGITS // (4 * vocab_size_of(model))
        self._off = False
        self._state: object = None
        self._results: _Results | None = None
        self._casts: CastWeights | None = None
        self._told_of_casts = False
        self._recorded: dict[_Size, _Recorded] = {}
        self._pool: Any = None
        self._stream: Any = None
        self._recording = False  # or run as it is recorded

    def _begin(self, num_slots: int) -> None:
        if self._off:
            super()._begin(num_slots)
            return
        casts = self._casts_of_now()
        state = _state_of(self.model, casts.modules if casts else ())
        if state != self._state or num_slots > self.cache.num_slots:
            self.release()
            step = max(1024, (1 << num_slots.bit_length()) // 8)  # so that the next generation fits, too
            self.cache = RaggedCache(self.model, -(-num_slots // step) * step)
            self._results = _Results(self.model, min(self._most_tokens, self.cache.num_slots))
            self._state, self._casts = state, casts
        if self._casts is not None:
            self._casts.refresh()

    def _casts_of_now(self) -> CastWeights | None:
        """What autocast makes of the weights, if it is on and there is room to keep that."""
        dtype = autocast_dtype(self.device)
        if dtype is None:
            return None
        casts = CastWeights(self.model, dtype)
        if casts.nbytes <= MOST_CASTS * _memory_of(self.device):
            return casts
        if not self._told_of_casts:
            logger.info(
                "passes cast all weights again, as their %.1f GB in %s are too much to keep between generations",
                casts.nbytes / 1e9,
                dtype,
            )
            self._told_of_casts = True
        return None

    def _weights(self) -> AbstractContextManager[None]:
        if self.invariant is not None:
            return self.invariant.used(self._casts)
        return super()._weights() if self._casts is None else self._casts.used()

    def _end(self) -> None:
        if self._off:
            super()._end()
        elif self._state is not None and _bytes_of(self.cache) > MOST_KV * _memory_of(self.device):
            self._turn_off(
                f"the K/V of one generation take {_bytes_of(self.cache) / 1e9:.1f} GB, too much to keep between "
                "generations"
            )
            super()._end()

    def release(self) -> None:
        self._state = self._results = self._pool = self._casts = None
        self._recorded.clear()
        vars(self).pop("cache", None)

    def _turn_off(self, reason: object) -> None:
        logger.warning("passes run without CUDA graphs: %s", reason)
        self._off, self._results, self._pool, self._casts = True, None, None, None
        self._recorded.clear()

    def _target(self) -> tuple[HiddenStates, Tensor | slice]:
        if not self._recording:
            return super()._target()
        assert self._results is not None
        return self._results.hidden_states(), slice(self.cache.current.num_tokens)

    def __call__(self, ragged_pass: RaggedPass, tokens: Tensor, index: Tensor) -> Tensor:
        size = _Size.of(ragged_pass, index, self.hidden_states is not None, self._most_places)
        results = self._results
        if results is None or size.tokens > results.room or size.places > self._most_places:
            return super().__call__(ragged_pass, tokens, index)
        known = size in self._recorded
        recorded = self._recorded[size] if known else _Recorded(self.model, self.cache, results, size)
        recorded.fill(ragged_pass, tokens, index)
        is_new = recorded.replay is None
        if is_new and not self._prepare(recorded, known):
            del recorded, results  # and what they keep
            return super().__call__(ragged_pass, tokens, index)
        self._recorded[size] = recorded
        if recorded.replay is not None:
            recorded.replay()
            self.coverage.captured += is_new
            self.coverage.replayed += not is_new
        self.coverage.padding += size.tokens - ragged_pass.num_tokens
        if self.hidden_states is not None:
            kept = results.hidden_states().states[:, : ragged_pass.num_tokens]
            self.hidden_states.write(ragged_pass.slots, kept)
        return results.logits[size.places][: len(index)]

    def _prepare(self, recorded: _Recorded, known: bool) -> bool:
        """Record a pass of a ``known`` size; run one of a new size, which also compiles its kernels.

        False, if the model can't be recorded.
        """
        self._recording = True
        try:
            if known:
                recorded.replay = self._record(recorded.run)
            else:
                with not_waiting():
                    recorded.run()
        except RuntimeError as error:
            if not known and "synchroniz" not in str(error):
                raise
            self._turn_off(error)
            return False
        finally:
            self._recording = False
        return True

    def _record(self, run: Callable[[], None]) -> Callable[[], None]:
        """``run`` as a CUDA graph. What it allocates lies in one pool for all graphs, as nothing outlives a replay."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        if self._stream is None:
            self._stream = _stream_of_its_own(self, self.device)
        graph, stream = torch.cuda.CUDAGraph(), self._stream
        with torch.cuda.device(self.device), fresh_casts(self.model):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    run()
                finally:
                    graph.capture_end()
            torch.cuda.current_stream().wait_stream(stream)
        return graph.replay


def _stream_of_its_own(owner: object, device: torch.device) -> torch.cuda.Stream:
    """A stream that ``owner`` records on as long as it lives, and no other one does meanwhile.

    torch hands the same streams out again and again. Since torch 2.13, a graph that is freed takes the workspace of
    cuBLAS away from all graphs that were recorded on its stream.
    """
    taken = {stream.cuda_stream for stream in _streams.values()}
    for _ in range(_STREAMS_OF_TORCH + 1):
        stream = torch.cuda.Stream(device)
        if stream.cuda_stream not in taken:
            _streams[owner] = stream
            return stream
    raise RuntimeError(
        f"{len(taken)} generators record passes as CUDA graphs on {device}, as many as it has streams: let go of some "
        "(del generator), or make further ones with cuda_graphs=False"
    )


@contextmanager
def fresh_casts(model: PreTrainedModel) -> Iterator[None]:
    """Inside, autocast casts a weight whenever it is used: a cast that it has kept would be out of date in a replay.

    The forward that Accelerate gives a model switches autocast's cache on again, so it is left out.
    """
    device, given = model.device.type, vars(model)
    wrapped, original = given.get("forward"), given.get("_original_forward")
    try:
        if original is not None:
            given["forward"] = original
        enabled = torch.is_autocast_enabled(device)
        with torch.autocast(device, torch.get_autocast_dtype(device), enabled=enabled, cache_enabled=False):
            yield
    finally:
        if original is not None:
            given["forward"] = wrapped


@contextmanager
def not_waiting() -> Iterator[None]:
    """Inside, an operation that waits for the device raises a RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _bytes_of(cache: RaggedCache) -> int:
    return sum(states.nbytes for layer in cache.layers if layer.is_initialized for states in (layer.keys, layer.values))


def _memory_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


_UNRELATED = {"training", "gradient_checkpointing"}  # to what is computed in inference


def _state_of(model: PreTrainedModel, cast: Iterable[nn.Module] = ()) -> object:
    """Unequal for two generations if they may compute different things, or on different memory.

    The weights of the modules ``cast`` may lie anywhere, as passes read copies.
    """
    device = model.device.type
    settings = (
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
        torch.is_inference_mode_enabled(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
    )
    modules, copied = list(model.modules()), {*cast}
    tensors = [
        (None if module in copied else tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        for module in modules
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    ]
    # Keys of hooks count up and never recur, ids of objects do.
    hooks = [(*module._forward_pre_hooks, *module._forward_hooks) for module in modules]
    forwards = [vars(module).get("forward") for module in modules]
    configs = {id(module.config): module.config for module in modules if isinstance(module, PreTrainedModel)}
    attributes = [
        {name: repr(value) for name, value in vars(one).items() if name not in _UNRELATED and _is_plain(value)}
        for one in (*modules, *configs.values())
    ]
    return settings, tensors, modules, hooks, forwards, attributes


def _is_plain(value: object) -> bool:
    """Numbers, text, and small collections of them: settings, such as those of adapters."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple | set):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
