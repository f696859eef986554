"""A tokenizer of fifteen words, and rows in them; tokenizers of bytes, for any text."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

WORDS = ["<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<system>", "<nl>", *"abcdefgh"]
ID = {word: number for number, word in enumerate(WORDS)}
EOS = ID["<eos>"]

# Every turn ends in EOS and a newline token, as ChatML's "<|im_end|>\n" does.
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <eos> <nl> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
ROWS = [{"prompt": "a b", "completion": "c d"}, {"prompt": "e", "completion": "f g h"}]


def make_tokenizer(chat_template=None, special="<bos> $A", eos_token="<eos>", size=0) -> PreTrainedTokenizerFast:
    """One token per word of WORDS, and more up to `size` ids; `special` is how the tokenizer wraps a text."""
    words = ID | {f"<{number}>": number for number in range(len(WORDS), size)}
    backend = Tokenizer(WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single=special, special_tokens=[("<bos>", 1), ("<eos>", EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token=eos_token, chat_template=chat_template
    )


def write_jsonl(path: Path, rows=ROWS) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_jsonl(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def make_byte_tokenizer(
    chat_template=None, *, special, eos, bos=None, added=(), rstrip=False
) -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges: one token per byte, the special tokens, and the `added` ones, which are not."""
    vocab = {piece: number for number, piece in enumerate([*special, *sorted(ByteLevel.alphabet())])}
    backend = Tokenizer(BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _with_tokens(backend, chat_template, special, eos, bos, added, rstrip)


def make_sentencepiece_tokenizer(
    chat_template=None, *, special, eos, bos=None, added=(), rstrip=False
) -> PreTrainedTokenizerFast:
    """As Llama 2's: a space is written before every text, spaces are "▁", and what has no token is bytes."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters, *(f"▁{one}" for one in letters)]
    backend = Tokenizer(
        BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            merges=[("▁", letter) for letter in letters],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_tokens(backend, chat_template, special, eos, bos, added, rstrip)


def _with_tokens(backend, chat_template, special, eos, bos, added, rstrip) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([AddedToken(one, special=True, normalized=False, rstrip=rstrip) for one in special])
    backend.add_tokens([AddedToken(one, normalized=False) for one in added])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, bos_token=bos, chat_template=chat_template, unk_token=None
    )
