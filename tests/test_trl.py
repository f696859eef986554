"""TRL's SFTTrainer with mixed contexts: exact, as `BSSTrainer` trains, and TRL's own where nothing is mixed."""

from __future__ import annotations

import logging

import pytest
import torch
from datasets import Dataset, IterableDataset
from helpers.data import make_tokenizer
from helpers.training import weights
from models import VOCAB, tiny_model

from selfgen import BSSConfig, BSSTrainer, ContextGenerator
from selfgen.data.batches import rows_of

trl = pytest.importorskip("trl")

from selfgen import trl as ours  # noqa: E402  # needs TRL

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} <eos>"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %} <nl> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
SMALL = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": [],
}
MIXED = {"self_prob": 0.5, "token_budget": 32, "balance": 4}
TURNS = [("a b", "c d e f"), ("e", "f g h a b c"), ("b c d", "a d g"), ("h", "g f e d c b a"), ("c c", "h b"), ("d", "e")]
PAIRS = Dataset.from_list([{"prompt": prompt, "completion": f" {answer}"} for prompt, answer in TURNS])


def turn(role, content):
    return {"role": role, "content": content}


DIALOGUES = [
    {"messages": [turn("user", p), turn("assistant", a), turn("user", a), turn("assistant", p)]} for p, a in TURNS
]
CHATS = [{"prompt": [turn("user", p)], "completion": [turn("assistant", a)]} for p, a in TURNS]
CHATS_ARE_READ = pytest.mark.skipif(
    not ours._MEASURES_LEARNED, reason="this TRL can't read prompts of turns with transformers 5"
)


def make(folder, rows=PAIRS, model=None, *, trainer=ours.SFTTrainer, config=ours.SFTConfig, args=None, **changes):
    options = {**SMALL, **(MIXED if issubclass(config, ours.SFTConfig) else {}), **changes}
    return trainer(
        model or tiny_model("llama"),
        config(str(folder), **options),
        train_dataset=rows if isinstance(rows, Dataset | IterableDataset) else Dataset.from_list(rows),
        processing_class=make_tokenizer(TEMPLATE, size=VOCAB),
        **(args or {}),
    )


def steps_of(trainer):
    """Train; the micro-batches of each step as they were read, and with contexts, and the weights before it."""
    steps = []
    mix = trainer.mix

    def recorded(batches):
        state = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
        before = [{name: column.clone() for name, column in batch.items()} for batch in batches]
        found = mix(batches)
        steps.append((before, [{name: column.clone() for name, column in batch.items()} for batch in batches], state))
        return found

    trainer.mix = recorded
    trainer.train()
    return steps


def check_contexts(trainer, oracle, *, least=1):
    """Each context is what the loop over single tokens makes with the weights of its step; nothing else has changed."""
    steps = steps_of(trainer)
    assert len(steps) == trainer.args.max_steps
    changed = 0
    for step, (before, after, state) in enumerate(steps):
        oracle.load_state_dict(state)
        generator = ContextGenerator(oracle, vocab_size=trainer.generator.vocab_size)
        for was, now in zip(before, after, strict=True):
            assert torch.equal(was["labels"], now["labels"])
            learned = was["labels"] != -100
            assert torch.equal(was["input_ids"][~learned], now["input_ids"][~learned])
            assert torch.equal(was["input_ids"][learned], was["labels"][learned])
            for row, mixed in zip(rows_of(was), rows_of(now), strict=True):
                expected = generator.contexts(
                    [row.prompt],
                    [row.reference],
                    trainer.args.self_prob,
                    seed=42 << 32 | step,
                    sample_ids=[row.sample_id],
                    method="sequential",
                    may_be_self=[row.labels != -100],
                )
                assert torch.equal(mixed.answer, expected.tokens[0])
                changed += int((mixed.answer != row.answer).sum())
    assert changed >= least
    return steps


@pytest.mark.parametrize(
    ("rows", "options", "args"),
    [
        pytest.param(PAIRS, {}, {}, id="prompt and completion"),
        pytest.param(CHATS, {}, {}, id="turns of prompt and completion", marks=CHATS_ARE_READ),
        pytest.param(DIALOGUES, {"assistant_only_loss": True}, {}, id="turns of the assistant"),
        pytest.param(DIALOGUES, {}, {}, id="all turns"),
        pytest.param(PAIRS, {"completion_only_loss": False}, {}, id="prompts learned"),
        pytest.param([{"text": f"{p} {a}"} for p, a in TURNS], {}, {}, id="text"),
        pytest.param(PAIRS, {"max_length": 5}, {}, id="truncated"),
        pytest.param(PAIRS, {"context_micro_batches": 1, "gradient_accumulation_steps": 1}, {}, id="one by one"),
        pytest.param(PAIRS, {"pad_to_multiple_of": 8, "eos_token": "h"}, {}, id="other padding and end"),
        pytest.param(IterableDataset.from_generator(lambda: iter([*PAIRS] * 9)), {}, {}, id="stream"),
        pytest.param(
            [{"q": p, "a": a} for p, a in TURNS],
            {"completion_only_loss": False},
            {"formatting_func": lambda row: f"{row['q']} {row['a']}"},
            id="formatting_func",
        ),
        pytest.param(
            [{"input_ids": [1, 7, 8, 9, 2], "labels": [-100, -100, 8, 9, -100], "seq": i} for i in range(8)],
            {"dataset_kwargs": {"skip_prepare_dataset": True}},
            {},
            id="prepared",
            marks=CHATS_ARE_READ,
        ),
    ],
)
def test_contexts_are_those_of_the_loop(tmp_path, rows, options, args):
    check_contexts(make(tmp_path, rows, args=args, **options), tiny_model("llama"))
