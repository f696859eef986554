"""Reference-answer-based correction (arXiv 2410.14655): a model that is shown its own answer and gives a better one.

A correction prompt is a conversation in which the model has answered and is asked to look again: the prompt, the
model's own answer, a *cue*. What follows is the corrected answer, in training the reference.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from .data import answer_ends

DEFAULT_CUE = "Check your answer. If something in it is wrong, correct it; otherwise give it again."
_PLACEHOLDER = "The answer."


def stop_ids_of(tokenizer: PreTrainedTokenizerBase, model_ids: Iterable[int]) -> frozenset[int]:
    """What ends an answer: the model's ids, the tokenizer's EOS, and the end of a turn in its chat template."""
    return frozenset(model_ids) | answer_ends(tokenizer)


@dataclass(frozen=True)
class CorrectionCue:
    """Token ids between an own answer and its correction."""

    ids: list[int]
    stop_ids: frozenset[int]  # end an answer; the cue brings the end of turn itself

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        cue: str = DEFAULT_CUE,
        *,
        stop_ids: Iterable[int] = (),
        apply_chat_template: bool | None = None,
    ) -> CorrectionCue:
        """The cue as the user's next turn if the tokenizer has a chat template, else as a paragraph of its own.

        ``stop_ids`` end the model's answers, beside what the tokenizer says (`stop_ids_of`).

        Raises:
            ValueError: an empty cue; a chat template that rewrites earlier turns when more follow.
        """
        if not cue.strip():
            raise ValueError("the correction cue is empty; give a text that asks for a correction")
        use_template = bool(tokenizer.chat_template) if apply_chat_template is None else apply_chat_template
        stop_ids = stop_ids_of(tokenizer, stop_ids)
        if not use_template:
            return cls(tokenizer(f"\n\n{cue}\n\n", add_special_tokens=False).input_ids, stop_ids)
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _PLACEHOLDER}]
        before = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=False)
        asked = [*turns, {"role": "user", "content": cue}]
        text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        answered = before + _PLACEHOLDER
        if not text.startswith(answered):
            raise ValueError(
                "the chat template renders an answer in another way when a turn follows it, so a correction can't be "
                "asked for behind it; set tokenizer.chat_template to one that does not, or apply_chat_template=False"
            )
        return cls(tokenizer(text[len(answered) :], add_special_tokens=False).input_ids, stop_ids)

    def prompt(self, prompt: list[int], answer: list[int]) -> list[int]:
        """The correction prompt of one row; the answer counts up to where it ends."""
        return [*prompt, *self.ended(answer), *self.ids]

    def ended(self, answer: list[int]) -> list[int]:
        """The answer up to where it ends, and without what the cue begins with."""
        end = next((place for place, token in enumerate(answer) if token in self.stop_ids), len(answer))
        overlap = next((size for size in range(len(self.ids), 0, -1) if answer[:end][-size:] == self.ids[:size]), 0)
        return answer[: end - overlap]
