"""Free-running generation, and answers that the model corrects itself (RAC)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .context import Answers, ContextGenerator
from .context.batch import TokenRow
from .context.models import room_for_answers, transformers_model, unpadded_vocab_size
from .correction import DEFAULT_CUE, CorrectionCue
from .data import RowOptions

logger = logging.getLogger(__name__)


def answer(
    model: PreTrainedModel | ContextGenerator,
    prompts: Sequence[TokenRow],
    *,
    temperature: float = 0.0,
    vocab_size: int | None = None,
    **options: Any,
) -> Answers:
    """Answers of the model running freely, over the engine that makes contexts; greedy by default.

    Args:
        model: a causal language model of transformers, or a generator around one, whose temperature and ``vocab_size``
            then count.
        prompts: R rows of token ids, [P_i] int64/int32 tensors or lists, each at least one token.
        temperature: of the sampling; 0 is greedy.
        vocab_size: of ``ContextGenerator``: ``len(tokenizer)`` where the model's embedding is padded.
        **options: of ``ContextGenerator.answer``, such as ``max_new_tokens``, 256 by default.

    Example:
        >>> prompts = tokenizer(["1 + 1 ="]).input_ids
        >>> answers = answer(model, prompts, max_new_tokens=8)
        >>> tokenizer.batch_decode(answers.tokens, skip_special_tokens=True)
    """
    if isinstance(model, ContextGenerator):
        generator = model
    else:
        generator = ContextGenerator(model, temperature=temperature, vocab_size=vocab_size)
    return generator.answer(prompts, **options)


@dataclass(frozen=True)
class Corrected:
    """``first`` are the answers to the prompts and ``corrected`` what the last round made of them, int64 [T_i] each."""

    first: list[Tensor]
    corrected: list[Tensor]
    finished: list[bool]  # whether the corrected answer ended by itself
    cut: list[bool]  # whether an answer was shown cut, as the model has no more positions


def generate_corrected(
    model: PreTrainedModel | ContextGenerator,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[TokenRow],
    *,
    rounds: int = 1,
    cue: str | None = None,
    row_options: RowOptions | None = None,
    max_new_tokens: int = 256,
    **options: Any,
) -> Corrected:
    """Answer, look at the answer, and answer again: RAC at inference (arXiv 2410.14655), with no oracle.

    Args:
        model: as in `answer`; best one that was trained with ``RACTrainer``.
        tokenizer: the model's.
        prompts: R texts, or R rows of token ids as ``tokenize_rows`` makes them.
        rounds: corrections, at least 1; each sees the answer of the one before it.
        cue: the text that asks for a correction, as in training; ``correction.DEFAULT_CUE`` by default.
        row_options: how the texts and the cue become tokens, as in training: a `data.RowOptions`, whose
            ``apply_chat_template``, ``chat_template_kwargs`` and the like count.
        max_new_tokens: longest answer of a round, at least 1.
        **options: of `answer`; every round has noise of its own. Answers also end with the tokenizer's EOS. Only ids of
            the tokenizer are sampled, unless ``model`` is a generator.

    An answer is shown as far as there are positions for it: ``max_new_tokens`` of them, or half of what the prompt and
    the cue leave, are kept for the correction.

    Raises:
        ValueError: values out of range, empty prompts, prompts that leave no position after the cue, or a token that
            has no row in the model's embedding.
    """
    if not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds is {rounds!r}; it must be an integer >= 1")
    temperature, vocab_size = options.pop("temperature", 0.0), options.pop("vocab_size", None)
    if isinstance(model, ContextGenerator):
        generator = model
    else:
        known = unpadded_vocab_size(transformers_model(model), tokenizer)
        generator = ContextGenerator(model, temperature=temperature, vocab_size=vocab_size or known)
    row_options = row_options or RowOptions(max_length=None)
    rows = _prompt_rows(tokenizer, prompts, row_options)
    stop_ids = options.pop("eos_token_ids", None)
    between = CorrectionCue.of(
        tokenizer,
        DEFAULT_CUE if cue is None else cue,
        stop_ids=generator.eos_token_ids if stop_ids is None else stop_ids,
        options=row_options,
    )
    options |= {"eos_token_ids": sorted(between.stop_ids), "max_new_tokens": max_new_tokens}
    left = room_for_answers(generator.model, rows, len(between.ids))
    rooms = [room - min(max_new_tokens, (room + 1) // 2) for room in left]  # of the answers that are shown
    seed, progress = options.pop("seed", 0), options.pop("progress", False)
    bars = progress is True  # else a row is done with its last answer
    answers = generator.answer(rows, seed=seed, progress=bars, **options)
    first, cut = answers.tokens, [False] * len(rows)
    for turn in range(1, rounds + 1):
        shown = [between.ended(answer.tolist()) for answer in answers.tokens]
        cut = [before or len(own) > room for before, own, room in zip(cut, shown, rooms, strict=True)]
        asked = [between.prompt(row, own[:room]) for row, own, room in zip(rows, shown, rooms, strict=True)]
        told = progress if turn == rounds else bars
        answers = generator.answer(asked, seed=seed + turn, progress=told, **options)
    if any(cut):
        logger.warning("%d of %d answers were shown cut: the model has no more positions", sum(cut), len(cut))
    return Corrected(first, answers.tokens, answers.finished, cut)


def _prompt_rows(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str] | Sequence[TokenRow], row_options: RowOptions
) -> list[list[int]]:
    """Token ids of the prompts; texts become what training makes of them."""
    if isinstance(prompts, str):
        raise TypeError("prompts is one text; give a list of texts")
    rows = [prompt for prompt in prompts if not isinstance(prompt, str)]
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if rows and texts:
        raise TypeError("some prompts are text and some are token ids; give one or the other")
    if not texts:
        return [prompt.tolist() if isinstance(prompt, Tensor) else list(prompt) for prompt in rows]
    data, report = row_options.tokenize_prompts(Dataset.from_dict({row_options.prompt_column: texts}), tokenizer)
    if len(data) < len(texts):
        raise ValueError(f"not all prompts can be answered ({report}); leave the dropped ones out")
    return list(data["prompt_ids"])
