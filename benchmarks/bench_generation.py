"""Free-running answers against ``model.generate``, alternating in one run.

    make bench            (or: pytest benchmarks/bench_generation.py)

SmolLM2-135M-Instruct in fp32, GSM8K test prompts, greedy. 32 rows at a time; with twice as many rows, it shows what
reusing the places of ended rows gains.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from selfgen import Answers, ContextGenerator
from selfgen.data import tokenize_rows
from tools.real_parts import DEVICE, WARM_UPS, gsm8k, load_smollm2

BATCH, LONGEST, ROUNDS = 32, 48, 2


@pytest.mark.parametrize("rows", [BATCH, 2 * BATCH])
def test_generation(benchmark, report, rows):
    model, tokenizer = load_smollm2()
    model.to(DEVICE)
    data, _ = tokenize_rows(gsm8k("test", 0, rows), tokenizer, max_length=2048)
    prompts = [torch.tensor(prompt, device=DEVICE) for prompt in data["prompt_ids"]]
    generator = ContextGenerator(model, temperature=0.0)
    generator.answer(prompts[:1], max_new_tokens=2)  # what is done once
    for _ in range(WARM_UPS):
        generator.answer(prompts, max_new_tokens=LONGEST, batch_size=BATCH)

    def transformers() -> list[Tensor]:
        answers: list[Tensor] = []
        for begin in range(0, rows, BATCH):
            part = prompts[begin : begin + BATCH]
            ids = pad_sequence(part, batch_first=True, padding_side="left")
            mask = pad_sequence([torch.ones_like(prompt) for prompt in part], batch_first=True, padding_side="left")
            how = {"max_new_tokens": LONGEST, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
            answers += model.generate(ids, attention_mask=mask, **how)[:, ids.shape[1] :]
        return answers

    theirs: list[float] = []
    ours: list[Answers] = []
    found: list[list[Tensor]] = []

    def peer() -> None:
        started = time.perf_counter()
        found.append(transformers())
        theirs.append(time.perf_counter() - started)

    def run() -> None:
        ours.append(generator.answer(prompts, max_new_tokens=LONGEST, batch_size=BATCH))

    benchmark.pedantic(run, setup=peer, rounds=ROUNDS)
    same = sum(torch.equal(answer, want[: len(answer)]) for answer, want in zip(ours[0].tokens, found[0], strict=True))
    seconds, peers = statistics.median(answers.seconds for answers in ours), statistics.median(theirs)
    row = {
        "rows": rows,
        "answer tokens": sum(map(len, ours[0].tokens)),
        "answers that are the same": same,
        "answer, s": round(seconds, 2),
        "model.generate, s": round(peers, 2),
        "ours is faster by": f"{peers / seconds:.2f}x",
        "passes": ours[0].passes,
    }
    benchmark.extra_info.update(row, ratios={"model.generate": peers / seconds})
    report(f"free-running answers, {BATCH} rows at a time, at most {LONGEST} tokens, medians of {ROUNDS}", [row])
    assert seconds <= peers
