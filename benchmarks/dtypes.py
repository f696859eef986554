"""What lower precision does to exactness: how often two ways of computing the same context choose different tokens.

    python -m benchmarks.dtypes

In exact arithmetic ``fixed_point`` and ``sequential`` agree, and so do two token budgets. In floating point the same
logits come out of differently shaped products, and rounding can turn a near tie; what follows it in the row then
differs too. Counted is therefore the first difference of a row against the self tokens up to there. With
``precision="invariant"`` there is none; the seconds of a generation say what that costs.
"""

from __future__ import annotations

import argparse

import torch
from tqdm.auto import tqdm

from selfgen import ContextGenerator, MixedContext
from selfgen.context.generator import Method, Precision
from selfgen.data import tokenize_rows
from tools.real_parts import DEVICE, gsm8k, load_smollm2

WAYS: tuple[tuple[torch.dtype, Precision], ...] = (
    (torch.float32, "model"),
    (torch.bfloat16, "model"),
    (torch.bfloat16, "invariant"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--self-prob", type=float, default=0.25)
    arguments = parser.parse_args()
    head = f"{'dtype':10}{'precision':>11}{'against sequential':>22}{'rows equal':>12}{'self tokens':>13}{'differ':>8}"
    print(f"{head}{'passes':>8}{'seconds':>9}")
    for dtype, precision in WAYS:
        model, tokenizer = load_smollm2(dtype)
        model.to(DEVICE)
        rows, _ = tokenize_rows(gsm8k("train", 1000, 1000 + arguments.rows), tokenizer, max_length=1024)

        def generate(method: Method, budget: int, model=model, rows=rows, precision=precision) -> MixedContext:
            generator = ContextGenerator(model, token_budget=budget, balance=budget / 8, precision=precision)
            if method == "fixed_point":  # what is done once per generator does not count
                generator.contexts([[3, 4]], [[5, 6]], 1.0, seed=0, sample_ids=[0])
            return generator.contexts(
                list(rows["prompt_ids"]),
                list(rows["answer_ids"]),
                arguments.self_prob,
                seed=0,
                sample_ids=list(rows["sample_id"]),
                method=method,
            )

        expected = generate("sequential", 1)
        for budget in tqdm((48, 96, 100_000), desc=str(dtype), leave=False):
            mixed = generate("fixed_point", budget)
            equal, seen, differ = compare(mixed, expected)
            found = f"{f'budget {budget}':>22}{f'{equal}/{len(rows)}':>12}{seen:13}{differ:8}"
            cost = f"{mixed.stats.passes:8}{mixed.stats.seconds:9.1f}"
            print(f"{str(dtype)[6:]:10}{precision:>11}{found}{cost}", flush=True)


def compare(mixed: MixedContext, expected: MixedContext) -> tuple[int, int, int]:
    """(rows equal, self tokens up to and including each row's first difference, rows with a difference)."""
    equal = seen = 0
    for tokens, others, is_self in zip(mixed.tokens, expected.tokens, mixed.is_self, strict=True):
        different = (tokens != others).nonzero()[:, 0]
        equal += len(different) == 0
        seen += int(is_self[: int(different[0]) + 1 if len(different) else None].sum())
    return equal, seen, len(mixed.tokens) - equal


if __name__ == "__main__":
    main()
