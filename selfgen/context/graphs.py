"""The passes of a generation as CUDA graphs.

A pass over few tokens is about a thousand small kernels. The host takes several times as long to launch them as a GPU
takes to run them. ``GraphedForward`` records whole passes, once for each size: the model's forward, sampling, commit
and the plan of the next pass. To replay one is one launch, and between two of them the host reads a few numbers.
"""

from __future__ import annotations

import logging
import threading
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from .changes import settings_of
from .forward import Forward, Passes, Size
from .hidden_states import HiddenStates
from .invariant import Invariant
from .late import computed_late, may_be_late
from .models import vocab_size_of
from .packed import CastWeights
from .precision import autocast_dtype, precision_of
from .ragged import RaggedCache

logger = logging.getLogger(__name__)

_STREAMS_OF_TORCH = 32  # of a device and a priority, which torch.cuda.Stream hands out in turn
_streams: WeakKeyDictionary[object, torch.cuda.Stream] = WeakKeyDictionary()
TOKENS = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
"""Of recorded passes: coarse, so that sizes recur. Beyond, the GPU has enough to do."""
MOST_LOGITS = 1 / 32  # of the GPU's memory, for those of one pass
_ONE_AT_A_TIME = threading.Lock()
MOST_CASTS = 1 / 8  # the same, for weights in autocast's dtype that are kept from generation to generation


def forward_of(
    model: PreTrainedModel, *, cuda_graphs: bool, graph_memory: float, invariant: Invariant | None = None
) -> Forward:
    """The fastest forward for ``model`` where it is."""
    parameters = list(model.parameters())
    one_gpu = len({parameter.device for parameter in parameters}) == 1 and parameters[0].device.type == "cuda"
    plain = not any(is_traceable_wrapper_subclass(parameter) for parameter in parameters)  # others hide their memory
    if cuda_graphs and one_gpu and any(isinstance(parameter, DTensor) for parameter in parameters):
        logger.info("passes are not recorded as CUDA graphs, as weights are split over processes")
    if cuda_graphs and one_gpu and plain and not torch.version.hip:
        return GraphedForward(model, graph_memory, invariant)
    return Forward(model, invariant)


def recorded_size(size: Size, most_places: int) -> Size | None:
    """The size of a recorded pass that ``size`` fits into; None if there is none.

    ``most_places`` are those whose logits there is room for. Of a large vocabulary a quarter of a large pass has no
    room, a sixteenth may.
    """
    at = bisect_left(TOKENS, size.tokens)
    if at == len(TOKENS) or size.places > most_places:
        return None
    tokens = TOKENS[at]
    places = (tokens,) if tokens <= 64 else (tokens // 16, tokens // 4, tokens)
    return Size(tokens, min(places[bisect_left(places, size.places)], most_places))


@dataclass
class _Recordings:
    """Passes of one kind, by their sizes, and the tensors that they read and write."""

    memory: list[Tensor]
    replays: dict[Size, Callable[[], None]] = field(default_factory=dict)


class GraphedForward(Forward):
    """The same passes as CUDA graphs, padded to some sizes.

    A size is run and recorded when a pass needs it, and replayed from that pass on, also in later generations: graphs,
    K/V, hidden states and the tensors of passes stay where they are, with room for the largest generation so far. So
    few sizes are recorded in vain, and a generation begins with its largest passes, whose memory the others share.
    Weights are read where they lie, so an optimizer's steps are seen. When weights have moved, or modules, hooks,
    adapters, plain attributes or the precision have changed (`_state_of`), or a generation needs more room, all graphs
    are dropped: freeing a single one may harm others (`_stream_of_its_own`).

    A model that can't be recorded, as it waits for the device within a pass, is run as it is; and so is a generation
    whose K/V and hidden states would take more than ``share`` of the GPU's memory.
    """

    def __init__(self, model: PreTrainedModel, share: float, invariant: Invariant | None = None):
        super().__init__(model, invariant)
        self._share = share
        self._most_places = int(MOST_LOGITS * _memory_of(self.device)) // (4 * vocab_size_of(model))
        self._off = self._told_of_memory = self._told_of_casts = False
        self._stream: Any = None
        self._release()

    def _release(self) -> None:
        self._room = 0, 0  # slots and rows
        self._drop()

    def _drop(self) -> None:
        """Let go of all graphs, and of all that they read and write."""
        self._fused.forget()
        self._state: object = None
        self._casts: CastWeights | None = None
        self._recorded: dict[Hashable, _Recordings] = {}
        self._current: _Recordings | None = None  # of the generation that runs, if it is recorded
        self._pool: Any = None
        self._kept: RaggedCache | None = None
        self._hidden: Tensor | None = None  # memory of hidden states
        self._borrower: Callable[[], HiddenStates | None] = lambda: None  # who has it
        vars(self).pop("cache", None)

    def _turn_off(self, reason: object) -> None:
        logger.warning("passes run without CUDA graphs: %s", reason)
        cache = self.cache
        self._release()
        self._off, self.cache = True, cache  # with which the generation goes on

    def room(self, slots: int, rows: int, *, keeps_hidden_states: bool = False) -> tuple[int, int]:
        exact = super().room(slots, rows)
        if not self._fits(exact[0], keeps_hidden_states):
            return exact
        self._room = self._room_for(*exact)
        return self._room

    def most_slots(self, wanted: int) -> int:
        fewer = (wanted >> halvings for halvings in range(wanted.bit_length()))
        return next((slots for slots in fewer if self._fits(slots + 1, False)), wanted)

    def _fits(self, slots: int, keeps_hidden_states: bool) -> bool:
        """Whether passes over so many slots are recorded."""
        return not self._off and self._nbytes(slots, keeps_hidden_states) <= self._share * _memory_of(self.device)

    def _room_for(self, slots: int, rows: int) -> tuple[int, int]:
        """So that the next generation fits, too; of what has been made for it, the same."""
        room = self._room
        if slots <= room[0] and rows <= room[1]:
            return room
        step = max(1024, (1 << slots.bit_length()) // 8)
        return max(-(-slots // step) * step, room[0]), max(32, 1 << (rows - 1).bit_length(), room[1])

    def _nbytes(self, slots: int, keeps_hidden_states: bool) -> int:
        """What graphs of so many slots keep, with room for the next generation."""
        config = self.model.config.get_text_config(decoder=True)
        heads, layers = config.num_attention_heads, config.num_hidden_layers
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        of_slot = 2 * layers * kv_heads * head_dim * precision_of(self.model).itemsize
        if keeps_hidden_states or self._hidden is not None:
            of_slot += (layers + 1) * config.hidden_size * self.model.dtype.itemsize
        return self._room_for(slots, 1)[0] * of_slot

    def _tell_of_memory(self, passes: Passes) -> None:
        if passes.is_trial or self._told_of_memory:
            return
        nbytes = self._nbytes(passes.num_slots, passes.hidden_states is not None)
        logger.warning(
            "passes of a generation run without CUDA graphs: its K/V and hidden states take %.1f GB, too much to keep "
            "between generations; give a larger graph_memory, or fewer rows at a time",
            nbytes / 1e9,
        )
        self._told_of_memory = True

    def _begin(self, passes: Passes) -> None:
        if not self._fits(passes.num_slots, passes.hidden_states is not None):
            if not self._off:
                self._tell_of_memory(passes)
            super()._begin(passes)
            return
        casts = self._casts_of_now()
        state = self._room, passes.num_slots, _state_of(self.model, casts.modules if casts else ())
        if state != self._state:
            self._drop()
            self._kept = RaggedCache(self.model, passes.num_slots)
            self._state, self._casts = state, casts
        if self._casts is not None:
            self._casts.refresh()
        assert self._kept is not None
        self.cache = self._kept
        if passes.hidden_states is not None:
            self._lend(passes.hidden_states)
        self.read(passes)  # so that what was written to the host is there
        memory = passes.memory
        kind = type(passes), passes.settings, *((tensor.shape, tensor.dtype) for tensor in memory)
        if kind in self._recorded:
            passes.move_to(self._recorded[kind].memory)
        self._current = self._recorded.setdefault(kind, _Recordings(memory))

    def _lend(self, hidden_states: HiddenStates) -> None:
        """Have them written where those of the last generation are, which go elsewhere if somebody wants them yet."""
        last = self._borrower()
        if last is not None:
            last.move_away()
        if self._hidden is not None:
            hidden_states.use(self._hidden)
        self._borrower = ref(hidden_states)

    def _end(self) -> None:
        if self._current is None:
            super()._end()
            return
        self._current, borrower = None, self._borrower()
        if borrower is not None and hasattr(borrower, "memory"):
            self._hidden = borrower.memory

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
        if self._current is None:  # no copy of a weight has been refreshed
            return super()._weights()
        if self.invariant is not None:
            return self.invariant.used(self._casts)
        return nullcontext() if self._casts is None else self._casts.used()  # recordings outlive what this one copies

    def run(self, passes: Passes, size: Size) -> None:
        recordings = self._current
        room = None if recordings is None else recorded_size(size, self._most_places)
        if recordings is None or room is None:
            super().run(passes, size)
            return
        is_new = room not in recordings.replays
        if is_new:
            replay = self._prepare(passes, room)
            if replay is None:
                super().run(passes, size)
                return
            recordings.replays[room] = replay
        recordings.replays[room]()
        self.coverage.captured += is_new
        self.coverage.replayed += not is_new
        self.coverage.padding += room.tokens - size.tokens

    def _prepare(self, passes: Passes, size: Size) -> Callable[[], None] | None:
        """Run a pass of padding alone, which also compiles its kernels, and record one; None if that can't be."""

        def run() -> None:
            with computed_late(self.model):
                passes.run(self, size)

        try:
            with passes.idle(), not_waiting():
                run()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            self._turn_off(error)
            return None
        try:
            with passes.idle():
                return self._record(run)
        except RuntimeError as error:
            self._turn_off(error)
            return None

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
    """Inside, an operation that waits for the device raises a RuntimeError, in other threads, too."""
    with _ONE_AT_A_TIME:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


def _memory_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


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
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        may_be_late(model),
    )
    modules, copied = list(model.modules()), {*cast}
    tensors = [
        (None if module in copied else tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        for module in modules
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    ]
    return settings, tensors, *settings_of(model)
