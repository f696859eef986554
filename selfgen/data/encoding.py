"""Texts as token ids: control tokens that a text spells, one BOS, and answers as they follow their prompts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache

from transformers import PreTrainedTokenizerBase

from .conversations import RowFault

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # noncharacters, around a control token that is ordinary text
_MARKED = f"{_OPEN}.*?{_CLOSE}"
_TAIL = 16  # characters
_OFTEN = ("role", "content", "user", "assistant", "system", "")  # keys and roles, which need no second look
_PLAIN = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
NOT_MARKED = f"(?<!{_OPEN})"  # of a pattern of control tokens


class Encoder:
    """Token ids of texts.

    Args:
        tokenizer: any of transformers.
        control_tokens: spellings that are ordinary text where `mark` finds them in what a row gave. Where they are not
            marked, they are the control tokens.
        strict: whether `mark` rejects a control token that the vocabulary can't write as ordinary text, or else leaves
            it a control token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control_tokens: Iterable[str] = (), strict: bool = True):
        self.tokenizer, self._strict = tokenizer, strict
        self._added = {token.content: (one, token) for one, token in tokenizer.added_tokens_decoder.items()}
        spelled = frozenset(control_tokens).intersection(self._added)
        self._control_ids = {self._added[content][0] for content in spelled}
        self._spelled = _any_of(spelled)
        special = {content for content, (_, token) in self._added.items() if token.special}
        self._marked_or_control = _any_of(spelled | special, _MARKED)
        self._marked_or_added = _any_of(frozenset(self._added), _MARKED)
        self._writable = cache(self._can_write)
        self._clean = {text for text in _OFTEN if not (self._spelled and self._spelled.search(text))}
        self._around = self._special_tokens_around_texts()
        self._restarts = self._begins_anew_after(min(special, default=""))

    # -- what a row gave

    def mark(self, text: str) -> str:
        """``text`` with the control tokens that it spells marked as ordinary text.

        Raises:
            RowFault: it has a noncharacter that marks are made of, or a control token that can't be ordinary text.
        """
        if text in self._clean:
            return text
        if _OPEN in text or _CLOSE in text:
            raise RowFault("a text with the noncharacter U+FDD0 or U+FDD1")
        return self._spelled.sub(self._marked_token, text) if self._spelled else text

    def _marked_token(self, found: re.Match[str]) -> str:
        token = found[0]
        if self._writable(token):
            return f"{_OPEN}{token}{_CLOSE}"
        if self._strict:
            raise RowFault("a control token in a text, which this tokenizer can't write as ordinary text", repr(token))
        return token

    def mark_prompt(self, text: str) -> str:
        """As `mark`, for a prompt that no template makes: a BOS that it begins with is one, and there is one only."""
        bos = self.tokenizer.bos_token
        begins = text
        while bos and begins.lstrip().startswith(bos):
            begins = begins.lstrip()[len(bos) :]
        if begins == text or self.tokenizer.bos_token_id in self._around[0]:
            return self.mark(begins)
        return bos + self.mark(begins)

    @staticmethod
    def is_marked(text: str) -> bool:
        return _OPEN in text

    # -- ids

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts by themselves, without special tokens around them."""
        found = self._plain(["" if self.is_marked(text) else text for text in texts])
        return [
            self._ids_of_marked(text) if self.is_marked(text) else ids for text, ids in zip(texts, found, strict=True)
        ]

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of prompts that no template made: with the tokenizer's special tokens, but no EOS at the end."""
        before, after = self._around
        return [[*before, *ids, *after] for ids in self.texts(texts)]

    def after(self, before: Sequence[str], texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text as it follows the one ``before`` it: what both together have after the ids of the first.

        Where the tokenizer joins the two across their border, the text is tokenized as one that follows a new line.
        """
        tails = [self._tail(text) for text in before]
        unique = list(dict.fromkeys(tails))
        known = dict(zip(unique, self.texts(unique), strict=True))
        whole = self.texts([tail + text for tail, text in zip(tails, texts, strict=True)])
        return [
            ids[len(known[tail]) :] if ids[: len(known[tail])] == known[tail] else self._after_new_line(text)
            for tail, text, ids in zip(tails, texts, whole, strict=True)
        ]

    def _plain(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, **_PLAIN).input_ids if texts else []

    def _after_new_line(self, text: str) -> list[int]:
        line, both, alone = self.texts(["\n", "\n" + text, text])
        return both[len(line) :] if both[: len(line)] == line else alone

    def _tail(self, text: str) -> str:
        """The end of a text that tells how the next one is tokenized: from its last added token on, or some words.

        Tokenizers split texts at added tokens first, and join no letters over several words.
        """
        start = max(text.rfind(" ", 0, -_TAIL), text.rfind("\n", 0, -_TAIL)) + 1 if len(text) > _TAIL else 0
        start = 0 if self.is_marked(text) else start
        for found in self._marked_or_added.finditer(text, start) if self._marked_or_added else ():
            start = start if self.is_marked(found[0]) else max(start, found.start())
        return text[start:]

    def _special_tokens_around_texts(self) -> tuple[list[int], list[int]]:
        (plain,), whole = self._plain(["a"]), self.tokenizer("a").input_ids
        start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        before, after = whole[:start], whole[start + len(plain) :]
        return before, after[:-1] if after[-1:] == [self.tokenizer.eos_token_id] else after

    def _begins_anew_after(self, token: str) -> bool:
        """Whether texts after control tokens are tokenized as those with nothing before, as Llama 2's are."""
        alone, after = self._plain(["a", f"{token}a"])
        return after[-len(alone) :] == alone

    # -- marked texts

    def _ids_of_marked(self, text: str) -> list[int]:
        """Control tokens cut a text in sections; those with marked tokens are tokenized as ordinary text."""
        ids: list[int] = []
        clean = section = ""
        marked, strips = False, False
        pieces = self._marked_or_control.split(text) if self._marked_or_control else [text]
        for place, piece in enumerate([*pieces, None]):
            if piece is not None and (place % 2 == 0 or self.is_marked(piece)):
                marked |= place % 2 == 1
                section += piece.strip(_OPEN + _CLOSE) if place % 2 else piece
                continue
            token = self._added[piece][1] if piece is not None else None
            if marked:  # what the control tokens around it swallow is cut off by hand
                section = section.lstrip() if strips else section
                section = section.rstrip() if token is not None and token.lstrip else section
                ids += self._plain([clean])[0]
                ids += self._ordinary(section, first=self._restarts or not ids)
                clean = section = ""
            clean, section, marked = clean + section + (piece or ""), "", False
            strips = token is not None and token.rstrip
        return ids + (self._plain([clean])[0] if clean else [])

    def _ordinary(self, text: str, first: bool = False) -> list[int]:
        """Ids of a text in which no control token is one; ``first`` if nothing is before it."""
        ids = self._split(text) if first else self._split_after_new_line(text)
        if not self._control_ids.intersection(ids):
            return ids
        pieces = (
            self._spelled.split(text) if self._spelled else [text]
        )  # not all control tokens are special ones, which tokenizers can split
        parts = [part for i, piece in enumerate(pieces) for part in ((piece[:1], piece[1:]) if i % 2 else (piece,))]
        return [token for part in parts if part for token in self._split_after_new_line(part)]

    def _can_write(self, token: str) -> bool:
        """Whether a control token can be ordinary text: a vocabulary of whole words has it only as itself."""
        ids = self._ordinary(token)
        return not self._control_ids.intersection(ids) and token in self.tokenizer.decode(ids).replace(" ", "")

    def _split_after_new_line(self, text: str) -> list[int]:
        line, both = self._split("\n"), self._split("\n" + text)
        return both[len(line) :] if both[: len(line)] == line else self._split(text)

    def _split(self, text: str) -> list[int]:
        try:
            return self.tokenizer(text, split_special_tokens=True, **_PLAIN).input_ids
        finally:
            self._plain([""])  # fast tokenizers keep the setting, which would show in their fingerprint


@lru_cache(maxsize=8)  # tokenizers have up to 7,000 added tokens
def _any_of(texts: frozenset[str], pattern: str = "") -> re.Pattern[str] | None:
    """A pattern, in a group, of the longest of the texts at a place, after ``pattern``; None if there are no texts."""
    tree: dict[str, dict] = {}
    for text in filter(None, texts):
        node = tree
        for letter in text:
            node = node.setdefault(letter, {})
        node[""] = {}
    if not tree:
        return None
    firsts = "".join(map(re.escape, sorted({_OPEN, *tree})))
    return re.compile(f"(?=[{firsts}])({pattern}{'|' * bool(pattern)}{_pattern_of(tree)})", re.DOTALL)


def _pattern_of(tree: dict[str, dict]) -> str:
    """A pattern of the texts in a tree of their letters, in which "" ends one: long alternations would be slow."""
    letters = ""
    while len(tree) == 1 and "" not in tree:
        ((letter, tree),) = tree.items()
        letters += re.escape(letter)
    branches = [re.escape(letter) + _pattern_of(below) for letter, below in sorted(tree.items()) if letter]
    return letters + (f"(?:{'|'.join(branches)})" + "?" * ("" in tree) if branches else "")
