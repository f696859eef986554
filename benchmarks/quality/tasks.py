"""Tasks whose answers cascade: a token is easy to tell from the one before it, and hard from the prompt alone.

A row is token ids; a task is a generator of rows, so that training hardly sees a row twice, and none of evaluation.
Each token of an answer can be told from the prompt, so a model that has gone astray can find its way back.
"""

from __future__ import annotations

import functools
import math
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel

from selfgen.data import tokenize_rows
from selfgen.evaluation.answers import exact_match
from tools.real_parts import common_words, gsm8k, gsm_symbolic, load_smollm2, passage, small_llama, smollm2_path

LONGEST = 256  # tokens of a row, prompt, own answer and cue included
PAD, EOS, SEP = 0, 1, 2
FIRST = 3  # the first id of a task's own tokens

Row = tuple[list[int], list[int]]


class Tokenizer:
    """What trainers ask of a tokenizer where rows are token ids. Its cue is two separators, whatever the text."""

    pad_token_id, eos_token_id, chat_template = PAD, EOS, None
    added_tokens_decoder: ClassVar[dict] = {}

    def __call__(self, text, **_):
        ids = [[SEP, SEP] if one.strip() else [] for one in ([text] if isinstance(text, str) else text)]
        return type("Encoding", (), {"input_ids": ids[0] if isinstance(text, str) else ids})()

    def batch_decode(self, rows, **_):
        """A character for each token of a task, none of them a digit."""
        return ["".join(chr(0x4E00 + one) for one in row if one >= FIRST) for row in rows]

    def save_pretrained(self, *_, **__):
        return ()


@dataclass(frozen=True)
class Task:
    """``row(random)`` draws a prompt and its answer, without the end; ids are below ``vocab``.

    ``train_rows`` are all that a training has, over and over, where it is not to be new rows all the time.
    """

    name: str
    about: str
    row: Callable[[random.Random], Row]
    vocab: int = 64
    train_rows: int | None = None
    longest = LONGEST
    test_rows = batch_size = 400
    curve_rows, pass_rows = 200, 32  # of the test rows: for points of the learning curve, and to count passes
    curve_shares = (0.25, 0.5, 0.75)  # of the steps, at which there are points besides the last one
    by_length = False  # rows of one task are equally long
    has_base, has_teacher = False, True
    tokenizer = Tokenizer()

    def model(self, width: int, layers: int) -> PreTrainedModel:
        """A Llama with random weights."""
        return small_llama(self.vocab, width, layers, positions=LONGEST, pad=PAD, bos=SEP, eos=EOS)

    def is_right(self, answer: list[int], reference: list[int]) -> bool:
        return answer == reference

    def rows(self, count: int, seed: int, without: Dataset | None = None) -> Dataset:
        """``count`` rows as ``tokenize_rows`` gives them, none of ``without``; another seed gives other rows."""
        draw = random.Random(f"{self.name} {seed}")
        taken = set() if without is None else {tuple(prompt) for prompt in without["prompt_ids"]}
        drawn: list[Row] = []
        while len(drawn) < count:
            prompt, answer = self.row(draw)
            if (*prompt, SEP) not in taken:
                drawn.append((prompt, answer))
        return Dataset.from_dict(
            {
                "sample_id": list(range(count)),
                "prompt_ids": [[*prompt, SEP] for prompt, _ in drawn],
                "answer_ids": [[*answer, EOS] for _, answer in drawn],
            }
        )


def wave(draw: random.Random, length: int = 48, levels: int = 24) -> Row:
    """A sine in ``levels`` steps from its amplitude, its period and its phase, the latter two with two digits each."""
    amplitude, period, phase = draw.randrange(8), draw.randrange(64), draw.randrange(256)
    size, turn = (amplitude + 3) / 10, 2 * math.pi / (8 + period / 4)
    values = [size * math.sin(turn * t + 2 * math.pi * phase / 256) for t in range(length)]
    answer = [FIRST + round((value + 1) / 2 * (levels - 1)) for value in values]
    first = FIRST + levels
    digit = first + 8
    return [
        first + amplitude,
        digit + period // 16,
        digit + period % 16,
        digit + phase // 16,
        digit + phase % 16,
    ], answer


def cubic(draw: random.Random, length: int = 48, levels: int = 24) -> Row:
    """The values of a cubic polynomial on [-1, 1] in ``levels`` steps, from its four coefficients."""
    places = [2 * t / (length - 1) - 1 for t in range(length)]
    while True:
        coefficients = [draw.randrange(-8, 8) for _ in range(4)]
        sizes = [coefficient * scale / 20 for coefficient, scale in zip(coefficients, (1, 1, 1.5, 2), strict=True)]
        values = [sum(size * x**power for power, size in enumerate(sizes)) for x in places]
        if max(map(abs, values)) < 1:
            break
    answer = [FIRST + round((value + 1) / 2 * (levels - 1)) for value in values]
    return [FIRST + levels + 8 + coefficient for coefficient in coefficients], answer


COMMON_WORDS = 200


@functools.cache
def _texts(shortest: int) -> list[list[int]]:
    """Questions of GSM8K as ids of their common words, in alphabetical order; other words are left out."""
    common, texts = common_words(gsm8k("train", 0, 7473)["prompt"], COMMON_WORDS)
    ids = {word: FIRST + place for place, word in enumerate(common)}
    known = [[ids[word] for word in text] for text in texts]
    return [text for text in known if len(text) >= shortest]


def words(draw: random.Random, length: int = 24) -> Row:
    """The words of a passage of GSM8K in alphabetical order, each as often as it occurs."""
    drawn = passage(draw, _texts(length), length)
    return drawn, sorted(drawn)


@dataclass(eq=False)
class TextTask(ABC):
    """Rows of text, for SmolLM2-135M-Instruct.

    ``longest_prompt`` and ``longest_answer`` are in tokens, the chat template included; longer rows are left out.
    """

    name: str
    about: str
    longest_prompt: int | None = None
    longest_answer: int | None = None
    spare: int = 2  # rows drawn for each that is wanted
    train_rows: int | None = None  # all that a training has, over and over
    longest = 768
    test_rows, batch_size = 200, 64
    curve_rows, pass_rows = 50, 4
    curve_shares = (0.5,)
    by_length = True  # a batch has rows of about the same length, so that little padding is computed
    has_base, has_teacher = True, False

    @functools.cached_property
    def tokenizer(self):
        return AutoTokenizer.from_pretrained(smollm2_path())

    def model(self, *_) -> PreTrainedModel:
        return load_smollm2()[0]

    @abstractmethod
    def texts(self, count: int, seed: int) -> Dataset:
        """``count`` rows as ``prompt``/``completion``; fewer, if there are no more."""

    @abstractmethod
    def is_right(self, answer: list[int], reference: list[int]) -> bool: ...

    def rows(self, count: int, seed: int, without: Dataset | None = None) -> Dataset:
        taken = set() if without is None else {tuple(prompt) for prompt in without["prompt_ids"]}
        limits = {"prompt": self.longest_prompt or self.longest, "completion": self.longest_answer or self.longest}
        drawn = self.spare * count
        while True:
            texts = self.texts(drawn, seed)
            is_all = len(texts) < drawn
            texts = texts.filter(lambda row: all(len(row[name]) <= 6 * limit for name, limit in limits.items()))
            rows, _ = tokenize_rows(texts, self.tokenizer, max_length=self.longest)
            rows = rows.filter(
                lambda row: (
                    len(row["prompt_ids"]) <= limits["prompt"]
                    and len(row["answer_ids"]) <= limits["completion"]
                    and tuple(row["prompt_ids"]) not in taken
                )
            )
            if len(rows) >= count:
                return rows.select(range(count))
            if is_all:
                raise ValueError(f"{self.name} has {len(rows)} rows, but {count} are asked for: train for fewer steps")
            drawn *= 2

    def _decoded(self, *rows: list[int]) -> list[str]:
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in rows]


class Problems(TextTask):
    """Generated word problems with worked solutions. Right is what has the right number."""

    def texts(self, count: int, seed: int) -> Dataset:
        return gsm_symbolic(count, seed)

    def is_right(self, answer: list[int], reference: list[int]) -> bool:
        return exact_match(*self._decoded(answer, reference))


@functools.cache
def _sentences(shortest: int = 10, longest: int = 20) -> list[str]:
    """Sentences of GSM8K's questions without digits, as small letters and spaces."""
    found: dict[str, None] = {}
    for row in gsm8k("train", 0, 7473):
        for sentence in re.split(r"(?<=[.?!])\s+", row["prompt"]):
            words = re.findall("[a-z]+", sentence.lower())
            if shortest <= len(words) <= longest and not re.search(r"\d", sentence):
                found[" ".join(words)] = None
    return list(found)


class Reversing(TextTask):
    """The words of a natural sentence in reverse order. Right is the whole answer.

    Without a chat template, whose tokens would be half of a row.
    """

    @functools.cached_property
    def tokenizer(self):
        tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
        tokenizer.chat_template = None
        return tokenizer

    def texts(self, count: int, seed: int) -> Dataset:
        sentences = _sentences()
        drawn = random.Random(f"{self.name} {seed}").sample(range(len(sentences)), min(count, len(sentences)))
        return Dataset.from_list(
            [
                {
                    "prompt": f"Sentence: {sentences[place]}\nIn reverse order:",
                    "completion": " " + " ".join(reversed(sentences[place].split())),
                    "sample_id": place,
                }
                for place in drawn
            ]
        )

    def is_right(self, answer: list[int], reference: list[int]) -> bool:
        found, want = self._decoded(answer, reference)
        return found.split() == want.split()


AnyTask = Task | TextTask
WORDS = FIRST + COMMON_WORDS
MAIN: tuple[AnyTask, ...] = (
    Task("wave", "a discretised sine wave from its amplitude, period and phase", wave),
    Task("cubic", "the values of a cubic polynomial from its coefficients", cubic),
    Task("words", "the words of a passage of GSM8K in alphabetical order", words, WORDS),
    Task("words-few", "the same, 2,000 rows again and again", words, WORDS, train_rows=2000),
    Reversing("reverse", "the words of a sentence of GSM8K in reverse order, SmolLM2-135M-Instruct with LoRA", spare=1),
    Problems(
        "gsm_symbolic-short",
        "word problems of at most 96 tokens with worked solutions of at most 56, SmolLM2-135M-Instruct",
        longest_prompt=96,
        longest_answer=56,
        spare=12,
    ),
    Problems(
        "gsm_symbolic-few",
        "those, 400 problems again and again, with LoRA",
        longest_prompt=96,
        longest_answer=56,
        spare=12,
        train_rows=400,
    ),
    Problems("gsm_symbolic", "grade-school word problems with worked solutions, SmolLM2-135M-Instruct"),
)
"""From cheap to costly."""
VARIANTS = (
    Task("wave-24", "half as long", functools.partial(wave, length=24)),
    Task("wave-96", "twice as long", functools.partial(wave, length=96)),
    Task("wave-few", "2,000 rows again and again", wave, train_rows=2000),
    Task("words-12", "half as long", functools.partial(words, length=12), WORDS),
)
"""Where it helps: other lengths, less data."""

TASKS: dict[str, AnyTask] = {task.name: task for task in (*MAIN, *VARIANTS)}
