"""Reference-answer-based correction (arXiv 2410.14655): a model that is shown its own answer and gives a better one.

A correction prompt is a conversation in which the model has answered and is asked to look again: the prompt, the
model's own answer, a *cue*. What follows is the corrected answer, in training the reference.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from .data import RowOptions, text_after_answer

DEFAULT_CUE = "Check your answer. If something in it is wrong, correct it; otherwise give it again."


@dataclass(frozen=True)
class CorrectionCue:
    """The token ids between an own answer and its correction."""

    ids: list[int]
    stop_ids: frozenset[int]  # what ends an answer; the cue begins with the end of a turn itself

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        cue: str = DEFAULT_CUE,
        *,
        stop_ids: Iterable[int] = (),
        options: RowOptions | None = None,
    ) -> CorrectionCue:
        """The cue as the user's next turn if the tokenizer has a chat template, else as a paragraph of its own.

        ``stop_ids`` end the model's answers, as does what the tokenizer ends them with (`data.answer_ends`).
        ``options`` are those by which rows become prompts, such as variables of the template.

        Raises:
            ValueError: an empty cue; a chat template that rewrites earlier turns when more follow.
        """
        if not cue.strip():
            raise ValueError("the cue is empty; give a text that asks for another answer")
        options = options or RowOptions()
        template = options.template(tokenizer)
        encoder = options.encoder(tokenizer, template)
        asked = encoder.mark(cue)
        text = text_after_answer(template, asked) if template else f"\n\n{asked}\n\n"
        (ids,) = encoder.after(["\n"], [text])
        return cls(ids, options.answer_ends(tokenizer, stop_ids))

    def prompt(self, prompt: list[int], answer: list[int]) -> list[int]:
        """The correction prompt of one row; of the answer, what comes before its end."""
        return [*prompt, *self.ended(answer), *self.ids]

    def whole(self, answer: list[int]) -> list[int]:
        """The answer up to where it ends."""
        return answer[: next((place for place, token in enumerate(answer) if token in self.stop_ids), len(answer))]

    def ended(self, answer: list[int]) -> list[int]:
        """The answer up to where it ends, without what the cue begins with."""
        whole = self.whole(answer)
        overlap = next((size for size in range(len(self.ids), 0, -1) if whole[-size:] == self.ids[:size]), 0)
        return whole[: len(whole) - overlap]
