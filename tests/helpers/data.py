"""A tokenizer of fifteen words, and rows in them."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
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
