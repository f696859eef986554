"""What chat templates make of messages: prompts, answers, and what comes after an answer.

No other module applies a chat template.
"""

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase

_ANSWER = "The answer."
_TURNS = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _ANSWER}]


def answer_ends(tokenizer: PreTrainedTokenizerBase, known: Iterable[int] = ()) -> frozenset[int]:
    """Ids that end an answer: ``known`` ones, the EOS, and the added token that the template writes right after one.

    EOS and the template's differ where a base model's tokenizer has a template: EOS ends documents, and `<|im_end|>`
    turns. ``known`` are those of a model.
    """
    ends = {*known, tokenizer.eos_token_id} - {None}
    after = _text_after_last_answer(tokenizer).lstrip() if getattr(tokenizer, "chat_template", None) else ""
    first = tokenizer(after, add_special_tokens=False).input_ids[:1] if after else []
    return frozenset(ends | {token for token in first if token in tokenizer.added_tokens_decoder})


def _text_after_last_answer(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes after the last turn's content; nothing where that can't be told."""
    for before in ([], [{"role": "system", "content": "x"}]):
        try:
            text = tokenizer.apply_chat_template([*before, *_TURNS], tokenize=False)
        except Exception:  # a template may raise anything; where rows need it, that is reported with the row
            continue
        return text.rpartition(_ANSWER)[2] if _ANSWER in text else ""
    return ""


def text_after_answer(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """What the chat template writes between an answer and the next one, where the user's turn between is ``question``.

    Raises:
        ValueError: the template renders an answer in another way when more turns follow.
    """
    before = tokenizer.apply_chat_template(_TURNS[:1], add_generation_prompt=True, tokenize=False)
    asked = [*_TURNS, {"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    answered = before + _ANSWER
    if not text.startswith(answered):
        raise ValueError(
            "the chat template renders an answer in another way when a turn follows it, so a correction can't be asked "
            "for after it; set tokenizer.chat_template to one that does not, or apply_chat_template=False"
        )
    return text[len(answered) :]


def check_turns(row: int, columns: list[str], turns: list[Any]) -> list[dict[str, Any]]:
    """The messages of a conversation, without the keys that Arrow filled with None because other rows have them."""
    for turn in turns:
        if not isinstance(turn, dict) or not {"role", "content"} <= set(turn):
            where = f"row {row}, column {' or '.join(map(repr, columns))}"
            raise TypeError(f"{where}: a message is a dict with 'role' and 'content', not {turn!r}")
    return [{key: value for key, value in turn.items() if value is not None or key == "content"} for turn in turns]


def render(row: int, turns: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The chat template's text of a conversation, up to its last turn, which is the answer, and from there on."""
    prompt = render_prompt(row, turns[:-1], tokenizer)
    full = _render(row, turns, tokenizer)
    if not full.startswith(prompt):
        same = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), len(full))
        raise ValueError(
            f"row {row}: the chat template is not prefix preserving: after {same} characters the prompt alone has "
            f"{prompt[same : same + 60]!r}, but the prompt with its answer {full[same : same + 60]!r}. Set "
            "tokenizer.chat_template to one that renders both alike, or give text and apply_chat_template=False"
        )
    return prompt, full[len(prompt) :]


def render_prompt(row: int, turns: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template's text of ``turns``, up to the answer that comes next."""
    return _render(row, turns, tokenizer, add_generation_prompt=True)


def _render(row: int, turns: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, **options: bool) -> str:
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except Exception as error:  # a template may raise anything
        raise ValueError(f"row {row}: the chat template rejects these messages ({error}): {turns!r:.200}") from error
