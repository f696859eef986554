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
from .ragged import RaggedCache, RaggedPass, ragged_logits, ragged_model, vocab_size_of

logger = logging.getLogger(__name__)

PADDING = -1  # a slot that `kv_append` passes by
LARGEST = 8192  # tokens of a recorded pass; beyond, the GPU has enough to do
MOST_HIDDEN, MOST_LOGITS = 2**30, 2**29  # bytes that recorded passes keep of their hidden states and of their logits


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
        tokens, places, rows = (
            1 << max(4, (count - 1).bit_length())
            for count in (ragged_pass.num_tokens, len(index), len(ragged_pass.kv_ranges))
        )
        places = max(places, tokens // 4)  # the head is a small part of a model
        if tokens > 256:
            step = tokens // 8
            tokens = -(-ragged_pass.num_tokens // step) * step
        return cls(tokens, places, rows, keeps)


class _Results:
    """What passes write, one after the other into the same memory."""

    def __init__(self, room: int, layers: int):
        self.room, self.layers = room, layers
        self.logits: dict[int, Tensor] = {}  # by their number of places: [places, V]
        self.hidden: Tensor | None = None  # [layers + 1, room, hidden_size]

    def keep_logits(self, logits: Tensor) -> None:
        places = len(logits)
        if places not in self.logits:
            self.logits[places] = torch.empty_like(logits)
        self.logits[places].copy_(logits)

    def keep(self, index: int, hidden: Tensor) -> None:
        if self.hidden is None:
            self.hidden = hidden.new_empty(self.layers + 1, self.room, hidden.shape[2])
        check_like(self.hidden, hidden)
        self.hidden[index, : hidden.shape[1]] = hidden[0]


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
    generations: K/V and graphs stay. Weights are read where they lie, so an optimizer's steps are seen; when weights
    have moved, or what is computed with them may have changed (adapters, hooks, precision), all is recorded anew. A
    model that waits for the device within a pass can't be recorded; it is run as it is.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        text = model.config.get_text_config(decoder=True)
        self._layers = text.num_hidden_layers
        self._most_tokens = min(LARGEST, MOST_HIDDEN // (4 * (self._layers + 1) * text.hidden_size))
        self._most_places = MOST_LOGITS // (4 * vocab_size_of(model))
        self._off = False
        self._state: object = None
        self._results: _Results | None = None
        self._recorded: dict[_Size, _Recorded] = {}
        self._pool: Any = None
        self._recording = False  # or run as it is recorded

    def _begin(self, num_slots: int) -> None:
        if self._off:
            super()._begin(num_slots)
            return
        state = _what_is_computed(self.model)
        if state != self._state or num_slots > self.cache.num_slots:
            self._forget()  # what it kept is free before the next is taken
            self._state = state
            self.cache = RaggedCache(self.model, -(-num_slots * 5 // 4096) * 1024)  # a quarter more than is needed
            self._results = _Results(min(self._most_tokens, self.cache.num_slots), self._layers)

    def _forget(self) -> None:
        self._recorded.clear()
        self._pool = self._results = None

    def _end(self) -> None:
        if self._off:
            super()._end()

    def _keep(self, index: int, hidden: Tensor) -> None:
        if self._recording:
            assert self._results is not None
            self._results.keep(index, hidden)
        else:
            super()._keep(index, hidden)

    def __call__(self, ragged_pass: RaggedPass, tokens: Tensor, index: Tensor) -> Tensor:
        size, results = _Size.of(ragged_pass, index, self.hidden_states is not None), self._results
        if results is None or size.tokens > results.room or size.places > self._most_places:
            return super().__call__(ragged_pass, tokens, index)
        known = size in self._recorded
        recorded = self._recorded[size] if known else _Recorded(self.model, self.cache, results, size)
        recorded.fill(ragged_pass, tokens, index)
        if recorded.replay is None:
            try:
                self._prepare(recorded, known)
            except RuntimeError as error:
                if not known and "synchroniz" not in str(error):
                    raise
                logger.warning("passes run without CUDA graphs, since the model can't be recorded: %s", error)
                self._off = True
                self._forget()
                return super().__call__(ragged_pass, tokens, index)
            self._recorded[size] = recorded
        if recorded.replay is not None:
            recorded.replay()
        if self.hidden_states is not None:
            assert results.hidden is not None
            self.hidden_states.put(ragged_pass.slots, results.hidden[:, : ragged_pass.num_tokens])
        return results.logits[size.places][: len(index)]

    def _prepare(self, recorded: _Recorded, known: bool) -> None:
        """Record a pass of a ``known`` size; run one of a new size, which also compiles its kernels."""
        self._recording = True
        try:
            if known:
                recorded.replay = self._record(recorded.run)
            else:
                with not_waiting():
                    recorded.run()
        finally:
            self._recording = False

    def _record(self, run: Callable[[], None]) -> Callable[[], None]:
        """``run`` as a CUDA graph. What it allocates lies in one pool for all graphs, as nothing outlives a replay."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self.model.device),
            fresh_casts(self.model),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            run()
        return graph.replay


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
