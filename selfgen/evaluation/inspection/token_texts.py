"""Tokens as text that can be shown anywhere: nothing in it is invisible, moves other text, or is half a character."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal

from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how sentencepiece writes a byte
_SPACE = "▁"  # and how a space
_MARKS = {"\n": "↵", "\t": "⇥", "\r": "␍", "\x7f": "␡", " ": " "}
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zs", "Zl", "Zp"}  # categories of Unicode: controls, bidi marks, odd spaces


@dataclass(frozen=True)
class TokenText:
    """One token: ``text`` as it is shown, and what kind of token it is.

    "bytes" are part of a character, or none, and shown in hexadecimal; "special" tokens are no text; "none" is an id
    without a token. ``breaks`` tells that a line ends in it.
    """

    text: str
    kind: Literal["text", "bytes", "special", "none"] = "text"
    breaks: bool = False


class TokenTexts:
    """The texts of a tokenizer's tokens, each by itself."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._pieces = {one: piece for piece, one in tokenizer.get_vocab().items()}  # ids may have holes
        self._special = set(tokenizer.all_special_ids)
        self._special |= {one for one, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.of = cache(self._of)

    def passage(self, ids: Iterable[int]) -> str:
        """Tokens as running text of several lines."""
        text = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return "\n".join(visible(line) for line in text.split("\n"))

    def _of(self, token_id: int) -> TokenText:
        piece = self._pieces.get(token_id)
        if piece is None:
            return TokenText(f"⟨id {token_id}⟩", "none")
        if token_id in self._special:
            return TokenText(visible(piece), "special")
        text = self._tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if (data := bytes_of(piece)) is not None and (not text or "\ufffd" in text or _BYTE.fullmatch(piece)):
            try:
                text = data.decode()
            except UnicodeDecodeError:
                return TokenText(data.hex(" ").upper(), "bytes")
        if piece.startswith(_SPACE) and not text.startswith(" "):
            text = f" {text}"
        return TokenText(visible(text) or f"⟨id {token_id}⟩", "text" if text else "none", "\n" in text)


def bytes_of(piece: str) -> bytes | None:
    """The bytes that a piece of a vocabulary of bytes stands for; None of any other piece."""
    if found := _BYTE.fullmatch(piece):
        return bytes.fromhex(found[1])
    letters = _letters_of_bytes()
    if len(piece) == 1 and piece not in letters and ord(piece) < 256:
        return bytes([ord(piece)])  # as ByT5 writes all of them
    return bytes(letters[one] for one in piece) if all(one in letters for one in piece) else None


@cache
def _letters_of_bytes() -> dict[str, int]:
    """The letters by which byte-level tokenizers write bytes: Latin-1 where that is seen, else from U+0100 on."""
    alphabet = ByteLevel.alphabet()
    rest = sorted(set(range(256)) - {ord(one) for one in alphabet})
    return {one: ord(one) if ord(one) < 256 else rest[ord(one) - 256] for one in alphabet}


def visible(text: str) -> str:
    """``text`` in one line, with signs for characters that are not seen or change the text around them."""
    if text and not text.strip(" "):
        return "␣" * len(text)
    begins = "◌" if text and unicodedata.combining(text[0]) else ""  # else it would sit on what is before it
    return begins + "".join(_sign(one) for one in text)


def _sign(one: str) -> str:
    if one in _MARKS:
        return _MARKS[one]
    if ord(one) < 32:
        return chr(0x2400 + ord(one))
    return f"⟨U+{ord(one):04X}⟩" if unicodedata.category(one) in _UNSEEN else one
