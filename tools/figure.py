"""The figure of the README: one mixed context by the decode loop, and the same one by parallel passes.

    python -m tools.figure

It makes a context of SmolLM2-135M-Instruct for an answer of gsm_symbolic by both methods, records what each pass
computed and settled, and draws that as ``docs/figure.svg``. Nothing in the picture is made up: if the two contexts
differ, or a token changes after a pass has settled it, this raises an error and draws nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import torch
from torch import Tensor

from selfgen import ContextGenerator, MixedContext
from selfgen.context import fixed_point
from selfgen.context.generator import Method
from selfgen.data import tokenize_rows

from .real_parts import gsm_symbolic, load_smollm2

ROOT = Path(__file__).resolve().parent.parent

# Colours that are seen on white and on black alike, as the file can't know what it is shown on.
REFERENCE, SELF, TEXT = "#8c959f", "#e8590c", "#7b8590"
LEFT, COLUMN = 78, 20.4  # where the first token stands, and the width of a token
STEP, LABELS, PASS = 5.4, 74, 19  # heights: of a decode step, of the tokens' text, of a pass


@dataclass(frozen=True)
class Pass:
    """What one pass did to the answer; places count from its first token."""

    computed: range  # places whose token came out
    settled: int  # places that are final when it has ended
    corrected: list[int]  # places where the guess was another token
    guess: Tensor  # [T] int64, when it has ended


@dataclass(frozen=True)
class Run:
    """One row's context, by both methods."""

    texts: list[str]  # of the T tokens
    is_self: list[bool]
    prompt_length: int
    self_prob: float
    steps: int
    passes: list[Pass]


@contextmanager
def recorded(prompt_length: int, length: int) -> Iterator[list[Pass]]:
    """Inside, the passes over one row of ``prompt_length`` and ``length`` answer tokens are noted down."""
    passes: list[Pass] = []
    commit_pass = fixed_point.commit_pass

    def record(tokens, final, slots, cu_seqlens_q, next_self, sampled):
        result = commit_pass(tokens, final, slots, cu_seqlens_q, next_self, sampled)
        slot = int(final)
        is_done = int(next_self[slot]) == slot  # then all that is left is the reference's
        after = slots + 1 - prompt_length  # [N]: a token comes out one slot before its own
        passes.append(
            Pass(
                computed=range(max(0, int(after[0])), min(length, int(after[-1]) + 1)),
                settled=length if is_done else max(0, slot + 1 - prompt_length),
                corrected=after[result[0]].tolist(),
                guess=tokens[prompt_length:].clone(),
            )
        )
        return result

    fixed_point.commit_pass = record  # type: ignore[assignment]
    try:
        yield passes
    finally:
        fixed_point.commit_pass = commit_pass


def run(row_number: int, self_prob: float, seed: int) -> Run:
    """Make the context of one row by both methods; RuntimeError unless they agree in every token."""
    model, tokenizer = load_smollm2()
    rows, _ = tokenize_rows(gsm_symbolic(row_number + 1, seed=0), tokenizer, max_length=512)
    row = rows[row_number]
    generator = ContextGenerator(model, token_budget=256, balance=32)

    def contexts(method: Method) -> MixedContext:
        return generator.contexts(
            [row["prompt_ids"]],
            [row["answer_ids"]],
            self_prob,
            seed=seed,
            sample_ids=[row["sample_id"]],
            method=method,
        )

    loop = contexts("sequential")
    with recorded(len(row["prompt_ids"]), len(row["answer_ids"])) as passes:
        parallel = contexts("fixed_point")
    check(loop.tokens[0], loop.is_self[0], parallel.tokens[0], parallel.is_self[0], passes)
    if (loop.stats.passes, parallel.stats.passes) != (len(row["answer_ids"]), len(passes)):
        raise RuntimeError(f"the loop took {loop.stats.passes} steps, and {len(passes)} passes were seen")
    return Run(
        texts=[shown(tokenizer.decode([token])) for token in loop.tokens[0].tolist()],
        is_self=loop.is_self[0].tolist(),
        prompt_length=len(row["prompt_ids"]),
        self_prob=self_prob,
        steps=loop.stats.passes,
        passes=passes,
    )


def check(loop: Tensor, loop_mask: Tensor, parallel: Tensor, parallel_mask: Tensor, passes: list[Pass]) -> None:
    """RuntimeError unless both contexts are the same, and what a pass settled stayed as it was."""
    if not (torch.equal(loop, parallel) and torch.equal(loop_mask, parallel_mask)):
        raise RuntimeError("the decode loop and the passes gave different contexts, so there is nothing to draw")
    for number, one in enumerate(passes, start=1):
        if not torch.equal(one.guess[: one.settled], loop[: one.settled]):
            raise RuntimeError(f"a token changed after pass {number} had settled it")
    if not passes or passes[-1].settled != len(loop):
        raise RuntimeError("the passes ended before every token was settled")


def shown(text: str) -> str:
    """A token as a label."""
    return {"\n": "↵", " ": "␣", "<|im_end|>": "end"}.get(text, text.strip())


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def draw(of: Run) -> str:
    """The picture as SVG, 800 units wide."""
    count = len(of.texts)
    width, right = 800, LEFT + count * COLUMN
    colours = [SELF if is_self else REFERENCE for is_self in of.is_self]
    parts: list[str] = []

    def rect(x: float, y: float, w: float, h: float, colour: str, more: str = "") -> None:
        parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="2" fill="{colour}"{more}/>')

    def text(x: float, y: float, content: str, kind: str = "", more: str = "") -> None:
        kind = kind and f' class="{kind}"'
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}"{kind}{more}>{escape(content)}</text>')

    def circle(x: float, y: float, colour: str) -> None:
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')

    def guessed(colour: str) -> str:
        return f' fill-opacity="0.16" stroke="{colour}" stroke-opacity="0.6"'

    # Above: one step per token, from the upper left to the lower right; the heading has the room that this leaves.
    top = 12.0
    for step in range(of.steps):
        y = top + step * STEP
        rect(LEFT + step * COLUMN + 0.7, y, COLUMN - 1.4, STEP - 1, colours[step])
        if step + 1 in (1, 10, 20, 30):
            text(LEFT - 8, y + 7, f"step {step + 1}", "end")
    text(right, top + 12, f"Token by token: {of.steps} decode steps", "head end")
    x = right - 220
    for label, colour in (("reference token", REFERENCE), ("self token", SELF)):
        rect(x, top + 23, 10, 10, colour)
        text(x + 15, top + 32, label)
        x += 128

    # Between them: the tokens, which belong to both.
    y = top + of.steps * STEP + 6
    for place, label in enumerate(of.texts):
        x = LEFT + (place + 0.5) * COLUMN
        if of.is_self[place]:
            rect(x - COLUMN / 2 + 1.2, y, COLUMN - 2.4, LABELS, SELF, ' fill-opacity="0.16"')
        kind = "token self" if of.is_self[place] else "token"
        if len(label) < 3:
            text(x, y + 12, label, f"{kind} middle")
        else:
            text(x, y + 6, label, kind, f' transform="rotate(90 {x:.1f} {y + 6:.1f})"')
    text(LEFT - 8, y + LABELS / 2 - 3, "the same", "end")
    text(LEFT - 8, y + LABELS / 2 + 10, f"{count} tokens", "end")

    # Below: what each pass computed, and what it settled.
    y += LABELS + 18
    text(right, y + 2, f"In parallel: {len(of.passes)} passes", "head end")
    x = float(LEFT)
    for label, width_of_label in (
        ("computed, final", 112),
        ("not final yet", 98),
        ("corrected", 82),
        ("in the cache", 0),
    ):
        if label == "in the cache":
            rect(x, y - 4, 16, 2, REFERENCE, ' fill-opacity="0.55"')
        else:
            colour = SELF if label == "corrected" else REFERENCE
            rect(x, y - 9, 14, 12, colour, guessed(colour) if label == "not final yet" else "")
        if label == "corrected":
            circle(x + 7, y - 3, "#ffffff")
        text(x + 20, y + 1, label)
        x += 20 + width_of_label
    y += 14
    before = 0
    for number, one in enumerate(of.passes, start=1):
        middle = y + (PASS - 5) / 2
        text(LEFT - 8, middle + 4, f"pass {number}", "end")
        if before:  # in the KV cache
            rect(LEFT, middle - 1, before * COLUMN - 1, 2, REFERENCE, ' fill-opacity="0.55"')
        for place in one.computed:
            is_final = place < one.settled
            rect(
                LEFT + place * COLUMN + 1.2, y, COLUMN - 2.4, PASS - 5, colours[place],
                "" if is_final else guessed(colours[place]),
            )  # fmt: skip
            if place in one.corrected:
                circle(LEFT + (place + 0.5) * COLUMN, middle, "#ffffff" if is_final else SELF)
        before = one.settled
        y += PASS
    height = y + 2

    what = (
        f"One answer of {count} tokens, {sum(of.is_self)} of them self tokens (p = {of.self_prob}). The decode loop "
        f"takes {of.steps} steps, the fixed point {len(of.passes)} passes, and both give the same tokens."
    )
    style = (
        f"text{{font:12px system-ui,-apple-system,'Segoe UI','DejaVu Sans',sans-serif;fill:{TEXT}}}"
        ".head{font-size:15px;font-weight:600}.end{text-anchor:end}"
        f".token{{font:11px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;"
        f"dominant-baseline:central}}.middle{{text-anchor:middle}}.self{{font-weight:700;fill:{SELF}}}"
    )
    lines = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" width="{width}" '
        f'height="{height:.0f}" role="img">\n<title>{what}</title>\n'
        "<desc>Drawn by python -m tools.figure from a run of SmolLM2-135M-Instruct on a row of gsm_symbolic.</desc>"
        f"\n<style>{style}</style>\n{lines}\n</svg>\n"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--row", type=int, default=8, help="number of the row of gsm_symbolic; the default is the first short one"
    )
    parser.add_argument("--self-prob", type=float, default=0.25, help="probability of a self token: 0 to 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "figure.svg")
    arguments = parser.parse_args(argv)
    found = run(arguments.row, arguments.self_prob, arguments.seed)
    arguments.output.write_text(draw(found), encoding="utf-8")
    print(f"{found.steps} steps and {len(found.passes)} passes, the same {found.steps} tokens: {arguments.output}")


if __name__ == "__main__":
    main()
