"""The forward of a generation's passes: the model as it is, or CUDA graphs of it.

A pass over few tokens is some thousand small kernels, which take the host several times as long to launch as a GPU to
run. ``GraphedForward`` records them once for each size of a pass, and replays them for the price of one launch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..replay import HiddenStates, check_like
from .packed import packed_linears
from .ragged import RaggedCache, RaggedPass, ragged_logits, ragged_model

logger = logging.getLogger(__name__)

PADDING = -1  # a slot that `kv_append` passes by
LARGEST = 4096  # tokens of a recorded pass; beyond, the GPU has enough to do


class Forward:
    """Passes of ``model`` over a ragged cache; one generation at a time."""

    cache: RaggedCache

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.hidden_states: HiddenStates | None = None

    @contextmanager
    def over(self, num_slots: int, hidden_states: HiddenStates | None = None) -> Iterator[None]:
        """Inside, passes over ``num_slots`` slots can be run; ``hidden_states`` keeps what they compute."""
        self.hidden_states = hidden_states
        kept = nullcontext() if hidden_states is None else hidden_states.capture(self._keep)
        self._begin(num_slots)
        try:
            with ragged_model(self.model), packed_linears(self.model), kept:
                yield
        finally:
            self._end()
            self.hidden_states = None

    def _begin(self, num_slots: int) -> None:
        self.cache = RaggedCache(self.model, num_slots)

    def _end(self) -> None:
        del self.cache  # and the K/V with it

    def _keep(self, index: int, hidden: Tensor) -> None:
        """What enters decoder layer ``index`` in a pass, or leaves the last one: [1, N, hidden_size]."""
        assert self.hidden_states is not None
        self.hidden_states.put(self.cache.current.slots, hidden[0], index)

    def __call__(self, ragged_pass: RaggedPass, tokens: Tensor, index: Tensor) -> Tensor:
        """Compute a pass of ``tokens`` [slots]; returns logits [M, V] at its places ``index`` [M].

        They are valid until the next pass. The head, with all that a model does to its logits, runs at ``index`` only.
        """
        return ragged_logits(self.model, self.cache, ragged_pass, tokens[ragged_pass.slots], index)


def forward_of(model: PreTrainedModel, *, cuda_graphs: bool) -> Forward:
    """The fastest forward for ``model`` where it is."""
    devices = {parameter.device for parameter in model.parameters()}
    one_gpu = len(devices) == 1 and next(iter(devices)).type == "cuda" and torch.version.hip is None
    return GraphedForward(model) if cuda_graphs and one_gpu else Forward(model)


@dataclass(frozen=True)
class _Size:
    """What a recorded pass has room for: coarse, so that sizes recur, and fine enough that little is padding."""

    tokens: int
    places: int
    rows: int
    keeps: bool  # hidden states, too

    @classmethod
    def of(cls, ragged_pass: RaggedPass, index: Tensor, keeps: bool) -> _Size:
        places, rows = (1 << max(4, (count - 1).bit_length()) for count in (len(index), len(ragged_pass.kv_ranges)))
        step = 1 << max(4, (ragged_pass.num_tokens - 1).bit_length() - 3)  # a quarter of the power of two below
        return cls(-(-ragged_pass.num_tokens // step) * step, places, rows, keeps)


class _Recorded:
    """A pass of one size: what it reads and writes lies where it is, and ``run`` computes it."""

    def __init__(self, model: PreTrainedModel, cache: RaggedCache, size: _Size):
        device = model.device
        self.model, self.cache, self.size = model, cache, size
        self.input_ids = torch.zeros(size.tokens, dtype=torch.int64, device=device)
        self.index = torch.zeros(size.places, dtype=torch.int64, device=device)
        self.ragged_pass = RaggedPass(
            slots=torch.full((size.tokens,), PADDING, device=device),
            position_ids=torch.zeros(1, size.tokens, dtype=torch.int64, device=device),
            cu_seqlens_q=torch.zeros(size.rows + 1, dtype=torch.int32, device=device),
            kv_ranges=torch.zeros(size.rows, 2, dtype=torch.int64, device=device),
        )
        self.logits: Tensor | None = None  # [places, V]
        self.hidden: Tensor | None = None  # [layers + 1, tokens, hidden_size]
        self.replay: Callable[[], None] | None = None

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

    def keep(self, index: int, layers: int, hidden: Tensor) -> None:
        if self.hidden is None:
            self.hidden = hidden.new_empty(layers + 1, *hidden.shape[1:])
        check_like(self.hidden, hidden)
        self.hidden[index] = hidden[0]

    def run(self) -> None:
        logits = ragged_logits(self.model, self.cache, self.ragged_pass, self.input_ids, self.index)
        if self.logits is None:
            self.logits = torch.empty_like(logits)
        self.logits.copy_(logits)


class GraphedForward(Forward):
    """The same passes as CUDA graphs, padded to some sizes.

    A size is run as it is the first time, recorded the second time and replayed from then on, also in later
    generations: K/V and graphs stay. Weights are read where they lie, so an optimizer's steps are seen; when weights
    have moved, or what is computed with them may have changed (adapters, hooks, precision), all is recorded anew. A
    model that waits for the device within a pass can't be recorded; it is run as it is.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        self._off = False
        self._state: object = None
        self._recorded: dict[_Size, _Recorded] = {}
        self._pool: Any = None
        self._running: _Recorded | None = None

    def _begin(self, num_slots: int) -> None:
        if self._off:
            super()._begin(num_slots)
            return
        state = _what_is_computed(self.model)
        if state != self._state or num_slots > self.cache.num_slots:
            self._recorded.clear()
            self._state, self._pool = state, None
            self.cache = RaggedCache(self.model, -(-num_slots * 5 // 4096) * 1024)  # a quarter more than is needed

    def _end(self) -> None:
        if self._off:
            super()._end()

    def _keep(self, index: int, hidden: Tensor) -> None:
        if self._running is None:
            super()._keep(index, hidden)
        else:
            assert self.hidden_states is not None
            self._running.keep(index, len(self.hidden_states.layers), hidden)

    def __call__(self, ragged_pass: RaggedPass, tokens: Tensor, index: Tensor) -> Tensor:
        size = _Size.of(ragged_pass, index, self.hidden_states is not None)
        if self._off or size.tokens > LARGEST:
            return super().__call__(ragged_pass, tokens, index)
        recorded = self._recorded.get(size)
        first = recorded is None
        if recorded is None:
            recorded = _Recorded(self.model, self.cache, size)
        recorded.fill(ragged_pass, tokens, index)
        if first:
            self._running = recorded
            try:
                with not_waiting():
                    recorded.run()
            except RuntimeError as error:
                if "synchroniz" not in str(error):
                    raise
                logger.info("passes are not recorded as CUDA graphs: the model waits for the device (%s)", error)
                self._off = True
                self._recorded.clear()
            finally:
                self._running = None
            if self._off:
                return super().__call__(ragged_pass, tokens, index)
            self._recorded[size] = recorded
        else:
            if recorded.replay is None:
                self._running = recorded
                try:
                    recorded.replay = self._record(recorded.run)
                finally:
                    self._running = None
            recorded.replay()
        if self.hidden_states is not None:
            assert recorded.hidden is not None
            self.hidden_states.put(ragged_pass.slots, recorded.hidden[:, : ragged_pass.num_tokens])
        assert recorded.logits is not None
        return recorded.logits[: len(index)]

    def _record(self, run: Callable[[], None]) -> Callable[[], None]:
        """``run`` as a CUDA graph. What it allocates lies in one pool for all graphs, as nothing outlives a replay."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        device, graph = self.model.device, torch.cuda.CUDAGraph()
        autocast = torch.is_autocast_enabled(device.type)
        with (
            torch.cuda.device(device),
            # No cache: a cast of the weights that is older than a replay would be out of date in it.
            torch.autocast(device.type, torch.get_autocast_dtype(device.type), enabled=autocast, cache_enabled=False),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            run()
        return graph.replay


@contextmanager
def not_waiting() -> Iterator[None]:
    """Inside, an operation that waits for the device raises a RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


_ADAPTER = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling")  # PEFT's layers


def _what_is_computed(model: PreTrainedModel) -> object:
    """Equal for two generations if the same kernels would run on the same memory."""
    device = model.device.type
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    memory = [tensor.data_ptr() for tensors in (model.parameters(), model.buffers()) for tensor in tensors]
    modules = [
        (
            id(module),
            "forward" in vars(module),
            *(id(hook) for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())),
            *(repr(vars(module)[name]) for name in _ADAPTER if name in vars(module)),
        )
        for module in model.modules()
    ]
    return precision, torch.is_inference_mode_enabled(), memory, modules
