"""Long runs: what a process holds, and what a step takes, stay what they were."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import pytest
import torch
from helpers.endurance import Watch, grown, report, watched
from helpers.graphs import recorded_passes
from helpers.training import Tokenizer, config, rows
from models import VOCAB, tiny_model
from transformers import TrainerCallback

from selfgen import BSSTrainer, ContextGenerator


class Samples(TrainerCallback):
    """Evaluations and checkpoints do not count as time of a step."""

    def __init__(self, every: int):
        self.watch = Watch(every)

    def on_train_begin(self, *args, **kwargs):
        self.watch.mark()

    def on_step_end(self, args, state, control, **kwargs):
        self.watch.step_done(state.global_step)

    def on_evaluate(self, *args, **kwargs):
        self.watch.mark()

    on_save = on_evaluate


def train(folder, steps: int, every: int):
    """Everything on: contexts that are reused, a lean loss, logs, checkpoints of which two stay, evaluations."""
    samples = Samples(every)
    trainer = BSSTrainer(
        tiny_model("llama"),
        config(
            folder,
            max_steps=steps,
            learning_rate=1e-3,
            self_prob=0.5,
            lean_loss=True,
            logging_steps=every // 2,
            save_strategy="steps",
            save_steps=5 * every,
            save_total_limit=2,
            eval_strategy="steps",
            eval_steps=5 * every,
        ),
        train_dataset=rows(40),
        eval_dataset=rows(8, seed=1),
        processing_class=Tokenizer(),
        callbacks=[samples],
    )
    trainer.train()
    assert trainer._reuse.on
    assert trainer._answer_loss.lean
    assert len(list(folder.glob("checkpoint-*"))) <= 2
    return samples.watch.samples


def generations():
    """A function of a number that makes contexts or answers of other shapes each time, with weights that change."""
    model = tiny_model("llama")
    generators = [ContextGenerator(model, token_budget=budget, balance=budget / 8) for budget in (7, 60)]
    draws = torch.Generator().manual_seed(0)

    def row(longest):
        length = int(torch.randint(1, longest + 1, (), generator=draws))
        return torch.randint(3, VOCAB, (length,), generator=draws)

    def step(number):
        generator = generators[number % 2]
        longest, count = (16, 6) if number < 20 else (int(torch.randint(1, 17, (), generator=draws)), 1 + number % 6)
        prompts, references = ([row(longest) for _ in range(count)] for _ in range(2))
        ids = range(number, number + count)
        if number % 3 == 0:
            generator.answer(prompts, max_new_tokens=1 + number % 8, batch_size=3, seed=number, sample_ids=ids)
        else:
            keep = number % 4 == 1
            generator.contexts(prompts, references, 0.5, seed=number, sample_ids=ids, keep_hidden_states=keep)
        if number % 10 == 0:
            with torch.no_grad():
                model.model.norm.weight.mul_(1.0001)

    return step


@pytest.mark.slow
def test_two_thousand_steps(tmp_path):
    samples = train(tmp_path, 2000, every=50)
    print(report(samples))
    assert not grown(samples)


@pytest.mark.slow
@pytest.mark.parametrize("graphs", [False, True], ids=["plain", "graphs"])
def test_five_thousand_generations(graphs):
    """Half of them with what stands in for graphs."""
    with recorded_passes() if graphs else nullcontext():
        samples = watched(generations(), 2500, every=50)
    print(report(samples))
    assert not grown(samples)


def test_some_steps(tmp_path):
    assert len(train(tmp_path, 16, every=2)) == 8


def keep_a_tensor(kept, number):
    kept.append(torch.ones(3))


def keep_an_object(kept, number):
    kept.append([kept])


def keep_bytes(kept, number):
    kept.append(bytearray(b"x" * 600_000))


def keep_a_file(kept, number):
    kept.append(open("/dev/null"))  # noqa: SIM115


def keep_a_thread(kept, number):
    stop = threading.Event()
    kept.append(stop.set)
    threading.Thread(target=stop.wait, daemon=True).start()


def take_longer(kept, number):
    sum(range(2000 * number))


@pytest.mark.parametrize(
    ("leak", "name"),
    [
        (keep_a_tensor, "tensors"),
        (keep_bytes, "memory"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in [
                (keep_an_object, "objects"),
                (keep_a_file, "files"),
                (keep_a_thread, "threads"),
                (take_longer, "seconds"),
            ]
        ),
    ],
)
@pytest.mark.one_case
def test_a_leak_is_seen(leak, name):
    """And nothing is, in the same steps without it."""
    kept: list = []
    steps = 160 if name in ("memory", "seconds") else 40

    def step(number):
        torch.ones(100, 100) @ torch.ones(100, 100)
        leak(kept, number)

    try:
        assert name in grown(watched(step, steps, every=steps // 20))
    finally:
        for one in kept:
            if name == "files":
                one.close()
            if name == "threads":
                one()


@pytest.mark.slow
def test_a_leak_of_generations_is_seen(monkeypatch):
    """One that keeps what a cache holds is one of tensors."""
    from selfgen.context import forward

    kept: list = []
    original = forward.RaggedCache
    monkeypatch.setattr(forward, "RaggedCache", lambda *args: kept.append(original(*args)) or kept[-1])
    step = generations()
    assert "tensors" in grown(watched(step, 40, every=2))
    kept.clear()
    monkeypatch.undo()
    assert not grown(watched(step, 40, every=2)).keys() & {"tensors", "objects", "files", "threads"}
