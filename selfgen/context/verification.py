"""What no configuration tells of a model: found out by running it on short rows, once per generator, and again from
time to time while the model is trained.

The measure of everything is the model's own forward over one row alone. Three things are compared with it: the ragged
path, decoding token by token as ``method="sequential"`` does, and the same row with other tokens at its end, which
must not change what comes before them.

A row may grow beyond numbers of the configuration (windows, chunks, positions where rope or a temperature changes).
Rows beyond such a number are computed only after a probe that is longer than it, and all rows after one that is as long
(up to 512 tokens), as a number may stand in the code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from .batch import Batch
from .fused import Fused
from .hidden_states import noise_of
from .invariant import Invariant, check_half, check_invariant
from .late import computed_late, may_be_late, never_late
from .models import (
    attention_function,
    in_training_mode,
    max_positions,
    own_logits,
    text_inputs,
    vocab_size_of,
)
from .packed import fresh_casts_of, packed_linears
from .precision import dtype_clash, full_precision
from .ragged import RaggedCache, RaggedPass, UnsupportedModelError, ragged_logits, ragged_model
from .sequential import ALONE, STRATEGIES, SequentialResult, Strategy, sequential
from .sharding import ALONE as NOBODY
from .sharding import Together, agreed
from .support import lengths_of

logger = logging.getLogger(__name__)

_SHORT = 21  # tokens of the probe where the configuration has no number below the longest row
_KEPT = 13  # of them, those that come first
_LONG = 512  # tokens of it, at most, where no number asks for more
_COMPARED = 32  # positions of a window, at most
_FAULTS = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


class LooksAheadError(UnsupportedModelError):
    """The model sees tokens that come later, so it can't make contexts or be trained on them."""


class Verification:
    """What has been found out of one model. Each method raises what it has found once, and then again at each call."""

    def __init__(
        self,
        model: PreTrainedModel,
        given: torch.nn.Module | None = None,
        together: Together = NOBODY,
        invariant: Invariant | None = None,
        records: bool = False,
    ):
        """``given`` is what the model is part of: a model of PEFT, or the model itself.

        All processes that are ``together`` find out the same, at the same time. ``invariant`` runs in passes, which are
        recorded if it ``records``.
        """
        self.model, self.given, self._together, self._invariant = model, given, together, invariant
        self._records = records
        self._numbers = lengths_of(model)
        self._found: dict[tuple[str, int], UnsupportedModelError | None] = {}  # (what was tried, length of the probe)
        self._masks: list[_LayerMask] | None = None
        self._masks_seen = 0  # up to this length of rows
        self._strategies: dict[int, Strategy] = {}  # by the length of the probe

    def look_again(self) -> None:
        """Find everything out anew, as weights have changed; what layers' masks allow depends on none."""
        self._found.clear()
        self._strategies.clear()

    def check_causal(self, longest_row: int = 0, *, in_training: bool = False) -> None:
        """Raise LooksAheadError if other tokens at the end of rows of up to ``longest_row`` change logits before them.

        With ``in_training``, also if they do in training mode alone. Raise UnsupportedModelError if the model can't be
        run on tokens alone.
        """
        length = self._probe_length(longest_row)
        self._once("causal", length, lambda: _check_causal(self.model, length))
        if in_training:
            self._once("causal in training", length, lambda: _check_causal_in_training(self.model, length))

    def check_dtypes(self) -> None:
        """Raise UnsupportedModelError if weights have several dtypes that the model's own forward can't compute with.

        It can where a hook casts what enters a module, or autocast does. A model that was refused is tried again: its
        weights may have been cast.
        """
        if ("dtypes", 0) not in self._found:
            _check_dtypes(self.model)
            self._found["dtypes", 0] = None

    def check_adapter(self) -> None:
        """Raise UnsupportedModelError if PEFT's own forward computes something else than the model inside."""
        given = self.given
        if given is not None and given is not self.model:
            self._once("adapter", 0, lambda: _check_adapter(self.model, given))

    def check_ragged(self, longest_row: int) -> None:
        """Raise UnsupportedModelError if rows of up to ``longest_row`` tokens differ over the ragged cache.

        This shows that the model does not look ahead, too, as nothing over the ragged cache does. DependsOnBatchError
        if passes are to be invariant, and a row's bits may depend on its batch.
        """
        self.check_adapter()
        invariant = self._invariant
        if invariant is not None:
            self._once("half", 0, lambda: check_half(self.model))
        length = self._probe_length(longest_row)
        try:
            self._check_masks(longest_row)
            self._compare_passes(length)
        except UnsupportedModelError:
            self.check_causal(longest_row)  # says more
            raise
        if invariant is not None:
            rows = _two_rows(self.model, min(_SHORT, max_positions(self.model) or _SHORT))
            with self._as_passes():
                self._once("invariant", 0, lambda: check_invariant(self.model, invariant, rows))

    def _as_passes(self) -> AbstractContextManager[Any]:
        return computed_late(self.model) if self._records else nullcontext()

    def _compare_passes(self, length: int) -> None:
        """Compare what passes compute; where that is wrong if something is computed late, nothing is from now on."""
        compare = partial(_compare_ragged, self.model, length, self._invariant)
        if not self._records or not may_be_late(self.model):
            self._once("ragged", length, compare)
            return

        def compare_late() -> None:
            with self._as_passes():
                compare()

        try:
            self._once("late", length, compare_late)
        except UnsupportedModelError as error:
            self._once("ragged", length, compare)
            never_late(self.model)
            logger.warning(
                "%s: sums and rotations are computed by kernels of their own, which is slower: computed with the norm, "
                "or the write of the K/V, they fail (%s)",
                type(self.model).__name__,
                _one_line(error.__cause__ or error),
            )

    def _once(self, what: str, length: int, check: Callable[[], None]) -> None:
        """Unless it was, with a probe of this length, or all was well with a longer one."""
        longer = (found for (of, long), found in self._found.items() if of == what and long > length)
        if (what, length) not in self._found and not any(found is None for found in longer):
            try:
                agreed(self._together, check)
            except UnsupportedModelError as error:
                self._found[what, length] = type(error)(*error.args)  # without the frames, which hold logits
                raise
            self._found[what, length] = None
        found = self._found.get((what, length))
        if found is not None:
            raise type(found)(*found.args)

    def strategy(self, longest_row: int) -> Strategy:
        """How rows of up to ``longest_row`` tokens have to be decoded one token at a time."""
        self.check_causal(longest_row)
        self.check_adapter()
        length = self._probe_length(longest_row)
        longer = min((known for known in self._strategies if known > length), default=None)
        if length not in self._strategies and longer is not None:
            return self._strategies[longer]
        if length not in self._strategies:
            slowest = max(self._strategies.values(), key=STRATEGIES.index, default=STRATEGIES[0])
            beyond = self._beyond(longest_row)
            lengths = [length, *([beyond + 2] if beyond else [])]  # begun beyond it, and grown beyond it
            self._choose(length, next(s for s in STRATEGIES[STRATEGIES.index(slowest) :] if self._suits(lengths, s)))
        return self._strategies[length]

    def _suits(self, lengths: list[int], strategy: Strategy) -> bool:
        return not any(self._together.any(not _suits(self.model, length, strategy)) for length in lengths)

    def _choose(self, length: int, strategy: Strategy) -> None:
        if strategy != STRATEGIES[0]:
            logger.warning(
                "%s: contexts are computed %s, which is slower: otherwise they differ from those of a forward over "
                "each row alone",
                type(self.model).__name__,
                strategy,
            )
        self._strategies[length] = strategy

    def sequential(self, batch: Batch) -> SequentialResult:
        """Decode ``batch`` in the fastest way that is right."""
        longest = max(batch.lengths)
        while (strategy := self.strategy(longest)) != ALONE:
            try:
                return sequential(self.model, batch, strategy)
            except _FAULTS as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                logger.warning("%s: %s", type(self.model).__name__, _one_line(error))
                self._choose(self._probe_length(longest), STRATEGIES[STRATEGIES.index(strategy) + 1])
        return sequential(self.model, batch, ALONE)

    def _probe_length(self, longest_row: int) -> int:
        """Tokens of a probe that goes beyond the numbers that rows of up to ``longest_row`` tokens go beyond."""
        below = self._beyond(longest_row)
        above = min((number for number in self._numbers if number >= max(_SHORT, longest_row)), default=2**31)
        enough = below + max(64, below // 4) if below else _SHORT
        step = 2 ** max(0, longest_row.bit_length() - 3)  # four lengths from one power of two to the next
        as_long = -(-longest_row // step) * step
        return min(max(enough, min(as_long, _LONG)), above, max_positions(self.model) or 2**31)

    def _beyond(self, longest_row: int) -> int:
        """The largest number that ``longest_row`` is beyond; 0 if any probe is beyond it."""
        return max((number for number in self._numbers if _SHORT <= number < longest_row), default=0)

    def _check_masks(self, longest_row: int) -> None:
        if longest_row <= self._masks_seen:
            return
        if self._masks is None:
            self._masks = _masks_of(self.model, 8)
        try:
            differing = [layer for layer in self._masks if layer.differs(longest_row)]
        except _FAULTS:  # some hold numbers of each position of the row
            self._masks = _masks_of(self.model, longest_row)
            differing = [layer for layer in self._masks if layer.differs(longest_row)]
        if differing:
            raise UnsupportedModelError(
                f"{differing[0].name} restricts attention by its mask alone (a sliding window, chunks) in rows of "
                f'{longest_row} tokens, which the ragged path is not told of; use method="sequential"'
            )
        self._masks_seen = longest_row


def _probe_row(model: PreTrainedModel, length: int, seed: int = 0) -> Tensor:
    """[length] int64 on the model's device: tokens without special ones, but for padding in the middle."""
    config = model.config.get_text_config(decoder=True)
    special = {value for name, value in _ids_in(model.config) | _ids_in(config)}
    vocab_size = vocab_size_of(model)
    known = [token for token in range(min(vocab_size, 4096)) if token not in special] or list(range(vocab_size))
    draws = torch.randint(len(known), (length,), generator=torch.Generator().manual_seed(seed))
    row = torch.tensor(known)[draws]
    padding = getattr(config, "pad_token_id", None)
    if isinstance(padding, int) and 0 <= padding < vocab_size and length > 4:
        row[4] = padding
    return row.to(model.device)


def _ids_in(config) -> set[tuple[str, int]]:
    found = set()
    for name, value in vars(config).items():
        if name.endswith(("_token_id", "_token_index", "_token_ids")):
            for one in value if isinstance(value, list | tuple) else [value]:
                if isinstance(one, int):
                    found.add((name, one))
    return found


def _difference(model: PreTrainedModel, found: list[Tensor], own: list[Tensor]) -> float:
    """How far logits [N, V] of windows are off those of the model's own forward, in their standard deviations.

    Of each window the mean counts. In half precision, rounding alone may put a few positions off far, so there it is
    the median. It is a difference, too, if there are NaN; 0 if the model's own logits have nothing to compare.
    """
    everything = torch.cat(own).detach().float()
    usual = everything.isfinite() & (everything.abs() < 1e30)  # some models mask logits with -inf or the lowest number
    if not usual.any():
        return 0.0
    if any(f.shape != o.shape for f, o in zip(found, own, strict=True)):
        return torch.inf
    scale = everything[usual].std().clamp(min=1e-30)
    off = (
        (torch.cat(found).detach().float() - everything).abs().where(usual, 0.0).sum(1)
        / usual.sum(1).clamp(min=1)
        / scale
    )
    summary = Tensor.mean if full_precision(model) else Tensor.median
    return float(torch.stack([summary(w) for w in off.split([len(o) for o in own]) if len(w)]).max())


def _tolerance(model: PreTrainedModel) -> float:
    """What rounding stays far below. A model that computes something else is off by as much as its logits vary."""
    return 1e-3 if full_precision(model) else 0.1


def _check_dtypes(model: PreTrainedModel) -> None:
    row = _probe_row(model, min(_SHORT, max_positions(model) or _SHORT))
    if clash := dtype_clash(model, lambda: own_logits(model, row, torch.arange(1, device=row.device))):
        raise UnsupportedModelError(
            f"weights of {type(model).__name__} have dtypes that its own forward can't compute with: {clash}; cast "
            "them with model.to(dtype), compute in mixed precision (torch.autocast; --bf16), or cast what enters such "
            "a module by a forward pre-hook"
        )


def _rows_with_other_ends(model: PreTrainedModel, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two rows, and the places of what they have in common, or some of them."""
    kept = length * _KEPT // _SHORT
    row = _probe_row(model, length)
    return row, torch.cat([row[:kept], _probe_row(model, length, seed=1)[kept:]]), _some(0, kept, row.device)


def _check_causal_in_training(model: PreTrainedModel, length: int) -> None:
    """Nothing is said of a model that is random in training, or goes on from one call to the next."""
    if noise_of(dict(model.named_modules())) is not None:
        return
    row, changed, at = _rows_with_other_ends(model, length)
    with in_training_mode(model) as run:
        try:
            own, found, again = (run(partial(own_logits, model, one, at)) for one in (row, changed, row))
        except _FAULTS as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            logger.debug("%s can't be tried in training mode: %s", type(model).__name__, error)
            return
    told = ~(own.isnan() | found.isnan() | again.isnan()).any(1)
    own, found, again = own[told], found[told], again[told]
    if not len(own) or not _difference(model, [again], [own]) <= _tolerance(model):
        return
    difference = _difference(model, [found], [own])
    if not difference <= _tolerance(model):
        raise LooksAheadError(
            f"{type(model).__name__} looks ahead in training mode, though not in inference: other tokens at the end of "
            f"a row change its logits before them by {difference:.1%} of their standard deviation, so it would see the "
            "answer that it learns to predict; give a causal model"
        )


def _check_causal(model: PreTrainedModel, length: int) -> None:
    row, changed, at = _rows_with_other_ends(model, length)
    try:
        own, found, again = (own_logits(model, one, at) for one in (row, changed, row))
    except _FAULTS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UnsupportedModelError(
            f"{type(model).__name__} can't be run on rows of tokens alone ({_one_line(error)}); give a causal language "
            "model"
        ) from error
    # A later token whose values overflow spoils earlier ones in attention, as 0 * NaN is NaN: these show nothing.
    told = ~(own.isnan() | found.isnan() | again.isnan()).any(1)
    own, found, again = own[told], found[told], again[told]
    if not len(own):
        return
    if not _difference(model, [again], [own]) <= _tolerance(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} computes something else each time for the same row (chance in eval mode, or a "
            "state that one call leaves to the next), so what it says of a prefix is not defined; give a model whose "
            "logits depend on its tokens alone"
        )
    difference, at_last = _difference(model, [found], [own]), _difference(model, [found[-1:]], [own[-1:]])
    # A single position may be off by more in half precision.
    if not difference <= _tolerance(model) or not at_last <= (_tolerance(model) if full_precision(model) else 0.5):
        difference = max(difference, at_last)
        raise LooksAheadError(
            f"{type(model).__name__} looks ahead: other tokens at the end of a row change its logits before them by "
            f"{difference:.1%} of their standard deviation, so it would see the answer that it learns to predict; give "
            "a causal model (is_decoder=True, no use_bidirectional_attention, no adapter that mixes tokens)"
        )


def _check_adapter(model: PreTrainedModel, given: torch.nn.Module) -> None:
    """Compare PEFT's own forward with that of the model inside, which is what contexts are made with."""
    row = _probe_row(model, min(_SHORT, max_positions(model) or _SHORT))
    own = own_logits(model, row, torch.arange(len(row), device=row.device))
    try:
        found = given(input_ids=row[None], attention_mask=torch.ones_like(row)[None]).logits[0]
        difference = _difference(model, [found], [own])
        reason = f"logits differ by {difference:.1%} of their standard deviation"
    except _FAULTS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        difference, reason = torch.inf, _one_line(error)
    if not difference <= _tolerance(model):
        configs = getattr(given, "peft_config", {})
        kinds = sorted({str(getattr(config, "peft_type", None)).rpartition(".")[2] for config in configs.values()})
        raise UnsupportedModelError(
            f"the adapter ({', '.join(kinds)}) computes something else in the forward of {type(given).__name__} than "
            f"in that of the model inside ({reason}); use LoRA or another adapter"
        )


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _two_rows(model: PreTrainedModel, length: int) -> list[Tensor]:
    return [_probe_row(model, length), _probe_row(model, min(6, length), seed=1)]


def _compare_ragged(model: PreTrainedModel, length: int, invariant: Invariant | None = None) -> None:
    """Compare the ragged path with the model's own forward on two rows, the first of them in two passes."""
    device, cut = model.device, length * _KEPT // _SHORT
    rows = _two_rows(model, length)
    tokens, short_length = torch.cat(rows), len(rows[1])
    cache = RaggedCache(model, len(tokens))
    first, second, short = (_some(begin, end, device) for begin, end in ((0, cut), (cut, length), (0, short_length)))
    found: list[Tensor] = []
    try:
        weights = packed_linears(model) if invariant is None else invariant.used(fresh_casts_of(model))
        with ragged_model(model), weights, Fused(model).used():
            for windows, index in (
                ([(0, 0, cut), (length, 0, short_length)], torch.cat([first, cut + short])),
                ([(0, cut, length), (length, short_length, short_length)], second - cut),  # row start, begin, end
            ):
                ragged_pass = RaggedPass.of_windows(windows, device)
                found.append(ragged_logits(model, cache, ragged_pass, tokens[ragged_pass.slots], index))
                if len(found[-1]) != len(index):
                    raise UnsupportedModelError(
                        f"{type(model).__name__} ignores logits_to_keep, the positions whose logits it is asked for: "
                        'the ragged path does not support it; use method="sequential"'
                    )
    except UnsupportedModelError:
        raise
    except _FAULTS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UnsupportedModelError(
            f'{type(model).__name__} does not run over the ragged cache ({_one_line(error)}); use method="sequential"'
        ) from error
    of_first, of_short = found[0].split([len(first), len(short)])
    long = own_logits(model, rows[0], torch.cat([first, second]))
    own = [*long.split([len(first), len(second)]), own_logits(model, rows[1], short)]
    prefix = own_logits(model, rows[0][:cut], first[-1:])  # some models do other things to the end of a row
    difference = _difference(model, [of_first, found[1], of_short, of_first[-1:]], [*own, prefix])
    if not difference <= _tolerance(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} computes something else over the ragged cache than in its own forward (logits "
            f'differ by {difference:.1%} of their standard deviation); use method="sequential"'
        )


def _some(begin: int, end: int, device: torch.device) -> Tensor:
    """Positions of a window, the last one and at most ``_COMPARED`` in all, in order."""
    return torch.linspace(begin, end - 1, min(end - begin, _COMPARED), dtype=torch.float64).round().long().to(device)


def _suits(model: PreTrainedModel, length: int, strategy: Strategy) -> bool:
    """Whether decoding token by token in this way gives the logits of the model's own forward over each row alone."""
    if strategy == ALONE:  # it is that forward
        return True
    answer = min(4, length - 1)
    lengths = [(length - answer, answer), (min(3, length - answer), max(1, answer - 1)), (1, answer)]
    rows = [_probe_row(model, sum(parts), seed=seed) for seed, parts in enumerate(lengths)]
    prompts = [row[:prompt] for row, (prompt, _) in zip(rows, lengths, strict=True)]
    references = [row[prompt:] for row, (prompt, _) in zip(rows, lengths, strict=True)]
    batch = Batch(
        prompts=prompts,
        references=references,
        candidates=[torch.zeros_like(reference, dtype=torch.bool) for reference in references],
        sample_ids=torch.arange(len(rows), device=model.device),
        seed=0,
        temperature=0.0,
    )
    steps: list[Tensor] = []
    own = [
        own_logits(model, row, torch.arange(prompt - 1, len(row) - 1, device=row.device))
        for row, (prompt, _) in zip(rows, lengths, strict=True)
    ]
    start = own_logits(model, prompts[0], torch.tensor([len(prompts[0]) - 1], device=model.device))
    try:
        sequential(model, batch, strategy, observe=steps.append)
    except _FAULTS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return False
    if strategy.together:
        found = [torch.stack([of_rows[i] for of_rows in steps[: len(want)]]) for i, want in enumerate(own)]
    else:
        found = list(torch.cat(steps).split([answer for _, answer in lengths]))
    return _difference(model, [*found, start], [*own, own[0][:1]]) <= _tolerance(model)


@dataclass
class _LayerMask:
    """What a layer's mask allows, and what it tells the attention function."""

    name: str
    allows: Callable  # (batch, head, query, key) -> bool, of transformers
    window: int | None

    def differs(self, longest_row: int) -> bool:
        """Whether some query of a row sees other keys by the mask than by the window."""
        last = longest_row - 1
        query = torch.tensor(sorted({last, *range(last, 0, -max(1, longest_row // 16))}))[:, None]  # [Q, 1]
        key = torch.arange(longest_row)[None]  # [1, K]
        zero = torch.zeros((), dtype=torch.int64)
        told = (key <= query) & (query - key < (self.window or longest_row))
        allowed = torch.as_tensor(self.allows(zero, zero, query, key)).cpu().broadcast_to(told.shape)
        return not torch.equal(told, allowed)


_RECORDING = "selfgen_masks"
_made: list[tuple[Tensor, Callable]] | None = None  # masks, while they are recorded
_layers: list[_LayerMask] = []


def _record_mask(*args, mask_function: Callable, **kwargs) -> Tensor:
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=kwargs.get("device"))
    if isinstance(kwargs.get("q_length"), int) and isinstance(kwargs.get("kv_length"), int):
        mask = mask.expand(-1, -1, kwargs["q_length"], kwargs["kv_length"])  # a shape, which takes no memory
    assert _made is not None
    _made.append((mask, mask_function))
    return mask


def _record_layer(module, query, key, value, attention_mask, *args, sliding_window=None, **kwargs):
    for mask, allows in _made or ():
        if mask is attention_mask:
            _layers.append(_LayerMask(type(module).__name__, allows, sliding_window))
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


AttentionInterface.register(_RECORDING, _record_layer)
AttentionMaskInterface.register(_RECORDING, _record_mask)


def _masks_of(model: PreTrainedModel, length: int) -> list[_LayerMask]:
    """What the layers' masks allow in rows of ``length`` tokens, where transformers makes them; none where it can't be
    found out.

    Attention is not computed: masks, and what the layers tell the attention function, depend on no hidden state.
    """
    global _made
    row = _probe_row(model, length)
    text_inputs(model, row[None])  # which may need forwards to find them out, whose masks don't count
    _made = []
    _layers.clear()
    try:
        with attention_function(model, _RECORDING):
            own_logits(model, row, torch.arange(1, device=model.device))
        unique = {(layer.name, id(layer.allows), layer.window): layer for layer in _layers}
        found = list(unique.values())
        for layer in found:
            layer.differs(length)
        return found
    except _FAULTS as error:
        logger.debug("%s: its masks can't be looked at: %s", type(model).__name__, error)
        return []
    finally:
        _made = None
        _layers.clear()
