"""Trainers of a tiny model on random rows, and what is compared of two of their runs."""

from __future__ import annotations

import torch
from datasets import Dataset
from models import VOCAB, tiny_model

from selfgen import BASHTrainer, BSSConfig, BSSTrainer, ContextGenerator, RACConfig, RACTrainer
from selfgen.data import Collator

from .data import TEMPLATE, make_tokenizer
from .versions import asked_for

SMALL = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "max_length": 64,
    "token_budget": 32,
    "balance": 4,
}
OWN_ANSWERS = [
    {"prompt": p, "completion": c, "own_answer": o}
    for p, c, o in [("a b", "c d", "e"), ("e", "f g h", "a a"), ("b c d", "a", "b"), ("h", "g f", "c c c")]
]


class Tokenizer:
    """Just what the trainer asks of a tokenizer when the data is tokenized already."""

    pad_token_id = 0
    eos_token_id = 2
    model_input_names = ("input_ids",)

    def save_pretrained(self, folder, **kwargs):
        return ()


def rows(count: int = 16, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)

    def ids(low, high):
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, VOCAB, (length,), generator=generator).tolist()

    return Dataset.from_list([{"sample_id": i, "prompt_ids": ids(2, 6), "answer_ids": ids(3, 9)} for i in range(count)])


def config(folder, **changes) -> BSSConfig:
    defaults = {**SMALL, "max_steps": 4, "learning_rate": 1e-2, "self_prob": 0.5}
    return BSSConfig(str(folder), **{**defaults, **asked_for(changes)})


def make_trainer(folder, model=None, data=None, eval_dataset=None, trainer=BSSTrainer, **changes) -> BSSTrainer:
    return trainer(
        model or tiny_model("llama"),
        config(folder, **changes),
        train_dataset=data or rows(),
        eval_dataset=eval_dataset,
        processing_class=Tokenizer(),
    )


def make_bash_trainer(folder, data=None, **changes) -> BASHTrainer:
    """On contexts whose every other token is no reference token."""

    def with_contexts(row):
        answer = row["answer_ids"]
        return {
            "context_ids": [token if place % 2 else (token + 9) % VOCAB for place, token in enumerate(answer)],
            "is_self": [place % 2 == 0 for place in range(len(answer))],
        }

    return make_trainer(folder, data=(data or rows()).map(with_contexts), trainer=BASHTrainer, **changes)


def make_rac_trainer(folder, data=OWN_ANSWERS, model=None, eval_dataset=None, judge=None, **changes) -> RACTrainer:
    """On corrections alone, if no ``direct_weight`` is given."""
    defaults = {"max_steps": 1, "learning_rate": 0.0, "max_new_tokens": 6, "correction_cue": "h g", "report_to": []}
    defaults["direct_weight"] = 0.0
    return RACTrainer(
        model or tiny_model("llama"),
        RACConfig(str(folder), **{**SMALL, **defaults, **asked_for(changes)}),
        train_dataset=Dataset.from_list(data),
        eval_dataset=eval_dataset,
        processing_class=make_tokenizer(TEMPLATE, size=VOCAB),
        judge=judge,
    )


def weights(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def losses_of(trainer) -> list[tuple[torch.Tensor, dict]]:
    """Train; the loss and the inputs of each micro-batch that was trained on."""
    found = []
    compute_loss = trainer.compute_loss

    def recorded(model, inputs, *args, **kwargs):
        loss = compute_loss(model, inputs, *args, **kwargs)
        if model.training:
            found.append((loss.detach().clone(), {name: column.clone() for name, column in inputs.items()}))
        return loss

    trainer.compute_loss = recorded
    trainer.train()
    return found


def generate(model, data, **kwargs):
    """Contexts of tokenized rows, half of them self tokens."""
    generator = ContextGenerator(model, token_budget=16, balance=2)
    columns = data["prompt_ids"], data["answer_ids"]
    kwargs = {"self_prob": 0.5, "seed": 3, "sample_ids": data["sample_id"]} | kwargs
    return generator.contexts(*(list(column) for column in columns), **kwargs)


def padded(model, data, mixed):
    """Inputs of a training forward over the contexts, the labels, and the slot of each token."""
    batch = Collator(0)([*data])
    lengths = [len(p) + len(a) for p, a in zip(data["prompt_ids"], data["answer_ids"], strict=True)]
    slots = torch.full(batch["input_ids"].shape, sum(lengths))
    for row, tokens in enumerate(mixed.tokens):
        prompt, first = len(data[row]["prompt_ids"]), sum(lengths[:row])
        batch["input_ids"][row, prompt : prompt + len(tokens)] = tokens
        slots[row, : lengths[row]] = torch.arange(first, first + lengths[row])
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}, slots


def gradients(model) -> dict[str, torch.Tensor]:
    """The gradients that a backward has left, by parameter; they are zero afterwards."""
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def distance(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> torch.Tensor:
    """How far gradients are from others, relative to their norm."""
    assert got.keys() == want.keys()
    off = torch.stack([(got[name].float() - want[name].float()).norm() for name in want]).norm()
    return off / torch.stack([gradient.float().norm() for gradient in want.values()]).norm()
