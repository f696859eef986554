"""The checked inputs of a context generation, its results, and their statistics."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .hidden_states import HiddenStates
from .masks import Masks
from .models import max_positions, vocab_size_of

TokenRow = Tensor | Sequence[int]


@dataclass(frozen=True)
class ContextStats:
    """What a generation cost and what it gave.

    ``context_tokens`` counts prompt and answer tokens: what one teacher-forced forward over the batch computes, so
    ``tokens_computed / context_tokens`` is the work in units of that forward. ``agreement`` is the share of self tokens
    that equal the reference (1.0 when there are none). ``invalid`` counts self tokens whose logits were not finite and
    which therefore kept the reference. ``seconds`` is wall time. Of the passes, ``captured`` ones were recorded as CUDA
    graphs and ``replayed`` ones were replays of such; the others were launched kernel by kernel. ``padding`` counts the
    tokens that were computed besides ``tokens_computed``, to fill recorded sizes.
    """

    rows: int
    passes: int
    tokens_computed: int
    context_tokens: int
    answer_tokens: int
    self_tokens: int
    agreement: float
    invalid: int
    seconds: float
    captured: int = 0
    replayed: int = 0
    padding: int = 0

    @classmethod
    def untouched(cls, prompt_lengths: Sequence[int], answer_lengths: Sequence[int]) -> ContextStats:
        """The statistics of contexts that are the reference: nothing was computed."""
        return cls(
            rows=len(answer_lengths),
            passes=0,
            tokens_computed=0,
            context_tokens=sum(prompt_lengths) + sum(answer_lengths),
            answer_tokens=sum(answer_lengths),
            self_tokens=0,
            agreement=1.0,
            invalid=0,
            seconds=0.0,
        )

    @property
    def computed_per_context_token(self) -> float:
        return self.tokens_computed / max(1, self.context_tokens)


@dataclass(frozen=True)
class MixedContext:
    """Mixed contexts of a batch (arXiv 2410.14655, batch-scheduled sampling).

    ``tokens[i]`` int64 [T_i] holds the context of row i's answer: the reference token where ``is_self[i]`` (bool [T_i])
    is false, a self token where it is true. Both lie on the model's device. ``hidden_states``, if they were asked for,
    are those of a forward over the contexts; their slots are the tokens of one row after another, prompts first.
    ``settled[i]`` int64 [T_i], if it was asked for, tells after which pass no token up to there could change any more.
    It never falls along a row, and is 0 before the first position that may hold a self token.
    """

    tokens: list[Tensor]
    is_self: list[Tensor]
    stats: ContextStats = field(repr=False)
    hidden_states: HiddenStates | None = field(default=None, repr=False)
    settled: list[Tensor] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Answers:
    """Free-running answers of a batch of prompts.

    ``tokens[i]`` int64 [T_i] is row i's answer on the model's device, with the token that ended it. ``finished[i]``
    tells whether it ended by itself, before ``max_new_tokens``. ``passes`` and ``tokens_computed`` are what they cost,
    ``invalid`` counts tokens whose logits were not finite, each of which is the token before it again; ``seconds`` is
    wall time. ``captured``, ``replayed`` and ``padding`` are as in ``ContextStats``.
    """

    tokens: list[Tensor]
    finished: list[bool]
    passes: int
    tokens_computed: int
    invalid: int
    seconds: float
    captured: int = 0
    replayed: int = 0
    padding: int = 0


@dataclass(frozen=True)
class Batch:
    """Checked inputs of one generation, on the model's device. Rows are ragged, so their tensors stay in lists."""

    prompts: list[Tensor]  # [P_i] int64
    references: list[Tensor]  # [T_i] int64
    candidates: list[Tensor]  # [T_i] bool: positions whose token may be a self token
    sample_ids: Tensor  # [R] int64
    seed: int
    temperature: float
    min_reference_prob: float | None = None  # below it, a candidate is the reference token after all
    vocab_size: int | None = None  # only ids below it are sampled

    @classmethod
    def of(
        cls,
        prompts: Sequence[TokenRow],
        references: Sequence[TokenRow],
        self_prob: float | Sequence[float] | Tensor,
        *,
        seed: int,
        sample_ids: Tensor | Sequence[int],
        model: PreTrainedModel,
        temperature: float,
        masks: Masks,
        vocab_size: int | None,
        may_be_self: Sequence[Tensor | Sequence[bool]] | None = None,
    ) -> Batch:
        """Check what was given and draw the candidates, which need no forward.

        Raises:
            ValueError, TypeError: as of ``ContextGenerator.contexts``.
        """
        device, ids_known, limit = model.device, vocab_size or vocab_size_of(model), max_positions(model)
        prompts = check_token_rows("prompts", prompts, ids_known, device)
        references = check_token_rows("references", references, ids_known, device)
        if len(prompts) != len(references):
            raise ValueError(f"{len(prompts)} prompts and {len(references)} references; give one reference per prompt")
        try:
            seed = operator.index(seed)
        except TypeError:
            raise TypeError(f"seed is a {type(seed).__name__}; give a 64-bit integer") from None
        for index, (prompt, reference) in enumerate(zip(prompts, references, strict=True)):
            length = len(prompt) + len(reference)
            if limit is not None and length > limit:
                raise ValueError(f"row {index} has {length} tokens; the model has {limit} positions: shorten the row")
        probs = _check_self_prob(self_prob, len(prompts), device)
        ids = check_sample_ids(sample_ids, len(prompts), device)
        candidates = masks.draw(seed, ids, [len(reference) for reference in references], probs) if prompts else []
        if may_be_self is not None:
            allowed = [torch.as_tensor(row, dtype=torch.bool, device=device) for row in may_be_self]
            if [len(row) for row in allowed] != [len(reference) for reference in references]:
                raise ValueError("may_be_self must have one bool per token of each reference")
            candidates = [drawn & may for drawn, may in zip(candidates, allowed, strict=True)]
        return cls(
            prompts=prompts,
            references=references,
            candidates=candidates,
            sample_ids=ids,
            seed=seed,
            temperature=temperature,
            min_reference_prob=masks.min_reference_prob or None,
            vocab_size=vocab_size,
        )

    @property
    def prompt_lengths(self) -> list[int]:
        return [len(prompt) for prompt in self.prompts]

    @property
    def answer_lengths(self) -> list[int]:
        return [len(reference) for reference in self.references]

    @property
    def lengths(self) -> list[int]:
        return [p + t for p, t in zip(self.prompt_lengths, self.answer_lengths, strict=True)]

    @property
    def device(self) -> torch.device:
        return self.sample_ids.device

    def row(self, index: int) -> Batch:
        """The batch of one row."""
        one = slice(index, index + 1)
        return Batch(
            self.prompts[one],
            self.references[one],
            self.candidates[one],
            self.sample_ids[one],
            self.seed,
            self.temperature,
            self.min_reference_prob,
            self.vocab_size,
        )


def check_token_rows(name: str, rows: Sequence[TokenRow], vocab_size: int, device: torch.device) -> list[Tensor]:
    """Check a ragged list of token ids and move it to ``device`` as int64.

    One host synchronisation at most, however many rows.
    """
    if isinstance(rows, str | bytes) or not isinstance(rows, Sequence):
        raise TypeError(f"{name} must be a list with one row of token ids per sample, got {type(rows).__name__}")
    checked = []
    for index, row in enumerate(rows):
        if isinstance(row, str | bytes):
            raise TypeError(f"{name}[{index}] is text; tokenize it first and give its token ids")
        tensor = row if isinstance(row, Tensor) else _as_ids(f"{name}[{index}]", row)
        if tensor.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name}[{index}] has dtype {tensor.dtype}; token ids must be int64 or int32")
        if tensor.dim() != 1:
            raise ValueError(f"{name}[{index}] has shape {tuple(tensor.shape)}; give a 1-D tensor of token ids")
        if tensor.device.type != "cpu" and tensor.device != device:
            raise ValueError(
                f"{name}[{index}] is on {tensor.device}; give it on cpu or on the model's device, {device}"
            )
        if len(tensor) == 0:
            raise ValueError(f"{name}[{index}] is empty; every row needs at least one token (drop the row otherwise)")
        checked.append(tensor)
    if checked and any(tensor.device.type != "cpu" for tensor in checked):
        checked = [tensor.to(device) for tensor in checked]
    if checked:
        _check_vocabulary(name, checked, vocab_size)
    return [tensor.to(device=device, dtype=torch.int64) for tensor in checked]


def _as_ids(name: str, row: object) -> Tensor:
    try:
        tensor = torch.as_tensor(row)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{name} must be a 1-D tensor or a list of 64-bit integers ({error})") from None
    return tensor.to(torch.int64) if tensor.numel() == 0 else tensor


def _check_vocabulary(name: str, rows: list[Tensor], vocab_size: int) -> None:
    low, high = torch.aminmax(torch.cat(rows))
    if int(low) >= 0 and int(high) < vocab_size:
        return
    for index, row in enumerate(rows):
        wrong = row[(row < 0) | (row >= vocab_size)]
        if len(wrong):
            raise ValueError(
                f"{name}[{index}] holds token id {int(wrong[0])}; the model's vocabulary has ids 0 to "
                f"{vocab_size - 1}: use the tokenizer of the model"
            )


def check_sample_ids(sample_ids: Tensor | Sequence[int], rows: int, device: torch.device) -> Tensor:
    """int64 [rows] on ``device``; unique, as two rows with one id would share their noise."""
    ids = sample_ids if isinstance(sample_ids, Tensor) else _as_ids("sample_ids", sample_ids)
    if ids.device.type != "cpu" and ids.device != device:
        raise ValueError(f"sample_ids is on {ids.device}; give it on cpu or on the model's device, {device}")
    if ids.dtype not in (torch.int64, torch.int32) and ids.numel():
        raise TypeError(f"sample_ids has dtype {ids.dtype}; sample ids must be int64 or int32")
    if ids.shape != (rows,):
        raise ValueError(f"sample_ids has shape {tuple(ids.shape)}; {rows} rows need shape ({rows},)")
    values = ids.tolist()
    if len(set(values)) != rows:
        twice = next(value for value in values if values.count(value) > 1)
        raise ValueError(f"sample id {twice} occurs more than once; ids tell rows apart and must be unique in a batch")
    return ids.to(device=device, dtype=torch.int64)


def _check_self_prob(self_prob: float | Sequence[float] | Tensor, rows: int, device: torch.device) -> Tensor:
    try:
        values = torch.as_tensor(self_prob, dtype=torch.float64, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"self_prob is {self_prob!r}; give a number in [0, 1], or one per row") from None
    if values.dim() and values.shape != (rows,):
        raise ValueError(f"self_prob has shape {tuple(values.shape)}; give one number, or one for each of {rows} rows")
    outside = values[~((values >= 0) & (values <= 1))]
    if outside.numel():
        raise ValueError(f"self_prob is {float(outside.flatten()[0])}; a probability must be in [0, 1]")
    return values.expand(rows)


def left_pad(rows: list[Tensor]) -> Tensor:
    """[R, longest], zeros before the shorter rows."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")


def interleave(prompts: list[Tensor], answers: list[Tensor]) -> list[Tensor]:
    """The parts of the rows, one after the other."""
    return [part for pair in zip(prompts, answers, strict=True) for part in pair]
