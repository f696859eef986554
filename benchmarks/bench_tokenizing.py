"""Rows to token ids against the least that it can be, alternating in one run.

    make bench            (or: pytest benchmarks/bench_tokenizing.py)

100,000 GSM8K rows and SmolLM2's tokenizer, in one process and without the cache of `datasets`. The least is two
renderings of the chat template per row, prompt and conversation, and their ids, with no look at what they contain.
"""

from __future__ import annotations

import statistics
import time

import datasets
import pytest

from selfgen.data import tokenize_rows
from tools.real_parts import gsm8k, load_smollm2

ROWS, ROUNDS = 100_000, 3
MOST = 1.2  # times the least
IDS = datasets.List(datasets.Value("int64"))


def least(rows: datasets.Dataset, tokenizer, template: bool) -> datasets.Dataset:
    """Prompt and answer ids of rows that are as they should be."""

    def texts(prompt: str, completion: str) -> tuple[str, str]:
        if not template:
            return prompt, completion
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        begin = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        return begin, tokenizer.apply_chat_template(turns, tokenize=False)[len(begin) :]

    def ids(batch, numbers):
        prompts, answers = zip(*map(texts, batch["prompt"], batch["completion"]), strict=True)
        found = [tokenizer(list(part), add_special_tokens=False).input_ids for part in (prompts, answers)]
        return {"sample_id": numbers, "prompt_ids": found[0], "answer_ids": found[1]}

    features = datasets.Features(sample_id=datasets.Value("int64"), prompt_ids=IDS, answer_ids=IDS)
    return rows.map(ids, batched=True, with_indices=True, remove_columns=rows.column_names, features=features)


@pytest.mark.parametrize("template", [True, False], ids=["chat template", "text"])
def test_tokenizing(benchmark, report, template, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    tokenizer = load_smollm2()[1]
    some = gsm8k("train", 0, 7000)
    rows = (
        datasets.concatenate_datasets([some] * (ROWS // len(some) + 1))
        .select(range(ROWS))
        .flatten_indices()
        .remove_columns("sample_id")
    )
    datasets.disable_caching()
    theirs: list[float] = []
    ours: list[float] = []

    def peer() -> None:
        started = time.perf_counter()
        least(rows, tokenizer, template)
        theirs.append(time.perf_counter() - started)

    def run() -> None:
        started = time.perf_counter()
        _, found = tokenize_rows(rows, tokenizer, max_length=2048, apply_chat_template=template)
        ours.append(time.perf_counter() - started)
        assert found.kept == ROWS

    try:
        benchmark.pedantic(run, setup=peer, rounds=ROUNDS)
    finally:
        datasets.enable_caching()
    seconds, peers = statistics.median(ours), statistics.median(theirs)
    row = {
        "rows": ROWS,
        "chat template": "yes" if template else "no",
        "tokenize_rows, s": round(seconds, 1),
        "the least, s": round(peers, 1),
        "as long": f"{seconds / peers:.2f}x",
    }
    benchmark.extra_info.update(row, ratios={"the least": peers / seconds})
    report(f"rows to token ids, medians of {ROUNDS}", [row])
    assert seconds <= MOST * peers
