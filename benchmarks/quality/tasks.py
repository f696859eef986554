"""Tasks whose answers cascade: a token is easy to tell from the one before it, and hard from the prompt alone.

A row is token ids; a task is a generator of rows, so that training hardly sees a row twice, and none of evaluation.
Each answer can be told from the prompt, so a model that has gone astray can find its way back.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from datasets import Dataset

PAD, EOS, SEP = 0, 1, 2
FIRST = 3  # the first id of a task's own tokens
VOCAB = 64

Row = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Task:
    """``row(random)`` draws a prompt and its answer, without the end."""

    name: str
    about: str
    row: Callable[[random.Random], Row]

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


def progression(draw: random.Random, terms: int = 16, digits: int = 3) -> Row:
    """Terms of an arithmetic progression modulo 1000, digit by digit, from its first term and its difference."""
    start, step = draw.randrange(10**digits), draw.randrange(1, 10**digits)

    def spell(number: int) -> list[int]:
        return [FIRST + int(digit) for digit in f"{number % 10**digits:0{digits}d}"]

    answer = [token for term in range(terms) for token in spell(start + (term + 1) * step)]
    return [*spell(start), FIRST + 10, *spell(step)], answer


def working(draw: random.Random, steps: int = 12) -> Row:
    """A chain of additions, subtractions and multiplications by small numbers modulo 100, with every result."""
    value = draw.randrange(100)
    prompt, answer = [FIRST + value // 10, FIRST + value % 10], []
    for _ in range(steps):
        operation, operand = draw.randrange(3), draw.randrange(2, 10)
        value = (value + operand, value - operand, value * operand)[operation] % 100
        prompt += [FIRST + 10 + operation, FIRST + operand]
        answer += [FIRST + value // 10, FIRST + value % 10]
    return prompt, answer


def extract(draw: random.Random, words: int = 40, chosen: int = 10) -> Row:
    """The words of a text that come right behind a mark, in reverse: a summary that is all quotation."""
    text = [FIRST + 1 + draw.randrange(40) for _ in range(words)]
    places = sorted(draw.sample(range(words), chosen))
    prompt = [token for place, word in enumerate(text) for token in ([FIRST] if place in places else []) + [word]]
    return prompt, [text[place] for place in reversed(places)]


def merged(draw: random.Random, length: int = 24) -> Row:
    """The words of a text in alphabetical order, each as often as it occurs."""
    text = [FIRST + draw.randrange(40) for _ in range(length)]
    return text, sorted(text)


TASKS = {
    task.name: task
    for task in (
        Task("wave", "a discretised sine wave from its parameters", wave),
        Task("progression", "an arithmetic progression, digit by digit", progression),
        Task("working", "multi-step arithmetic with working", working),
        Task("extract", "the marked words of a text, the last one first", extract),
        Task("merged", "the words of a text in alphabetical order", merged),
    )
}
