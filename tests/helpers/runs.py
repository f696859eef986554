"""Runs that are the same in one process and in several, whatever engine trains them: what is compared of two."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from models import OPTIONS, SINCE, VOCAB, tiny_model
from transformers import LlamaForCausalLM

from selfgen import BSSTrainer

from .data import TEMPLATE, make_tokenizer
from .sharded import another_run, whole_state
from .training import losses_of, make_bash_trainer, make_rac_trainer, make_trainer, rows
from .versions import FSDP2_ONCE, REUSED_IN_SHARDS, has

STEPS = 3
UNEVEN = Dataset.from_list(
    [
        {
            "sample_id": i,
            "prompt_ids": [3 + i] * (1 + i % 3),
            "answer_ids": [(7 * i + j) % 100 + 3 for j in range(size)],
        }
        for i, size in enumerate([1, 30, 2, 1, 17, 3, 1, 40, 1, 1, 2, 9, 25, 1, 4, 3])
    ]
)
SHORT = Dataset.from_list([*rows(11)])  # the last step of an epoch is short, and so is its last batch
GIVEN = {"accelerator_config": {"even_batches": False}}
if "train_sampling_strategy" in OPTIONS:
    GIVEN["train_sampling_strategy"] = "sequential"


def padded(family: str):
    """A model with more embedding rows than the tokenizer has ids."""
    model = tiny_model(family)
    torch.manual_seed(1)
    model.resize_token_embeddings(VOCAB + 5, mean_resizing=False)
    return model


def tied(family: str):
    torch.manual_seed(0)
    config = tiny_model(family).config
    config.tie_word_embeddings = True
    return type(tiny_model(family))(config).eval()


def lora(family: str = "llama", base=None, **changes):
    from peft import LoraConfig, get_peft_model

    options = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.0, **changes}
    base = base or tiny_model(family)
    torch.manual_seed(5)
    model = get_peft_model(base, LoraConfig(**options))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model


@dataclass(frozen=True)
class Case:
    """A run: which trainer of which model, and how it differs from the others."""

    changes: dict = field(default_factory=dict)
    model: Callable = lambda: tiny_model("llama")
    make: Callable = make_trainer
    data: Dataset | list | None = None
    reused: bool = True
    lean: bool = True
    before: Callable | None = None  # what is done with the trainer before training
    after: Callable | None = None
    weights: float = 1e-5  # of the largest of a tensor

    def trainer(self, folder: Path, micro_batches: int, **engine):
        another_run()
        accumulated = self.changes.get("gradient_accumulation_steps", 2) * micro_batches
        # With a small epsilon, Adam makes steps of rounding where a gradient is near zero.
        defaults = {"max_steps": STEPS, "adam_epsilon": 1e-3, "report_to": []}
        changes = {**defaults, **self.changes, **engine, "gradient_accumulation_steps": accumulated}
        given = {} if self.data is None else {"data": self.data}
        return self.make(folder, model=self.model(), **given, **changes)


def run(case: Case, folder: Path, micro_batches: int = 1, **engine) -> dict:
    """Train, and what came of it; ``micro_batches`` is the number of processes that this one takes the place of."""
    trainer = case.trainer(folder, micro_batches, **engine)
    before = case.before(trainer) if case.before else None
    seen = losses_of(trainer)
    after = case.after(trainer) if case.after else None
    if case.reused and not REUSED_IN_SHARDS and trainer._engine.is_sharded:
        assert not trainer._reuse.on
    elif case.reused:
        assert trainer._reuse.on
        assert trainer._reuse.verified
    loss = trainer._answer_loss
    assert (loss is not None and loss.lean) == case.lean, loss and loss.not_lean
    return {
        "batches": [{name: batch[name] for name in ("input_ids", "labels")} for _, batch in seen],
        "log": [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry],
        "weights": whole_state(trainer.model),
        "others": [one for one in (before, after) if one is not None],
    }


def assert_same(found: dict, expected: dict, case: Case, rank: int, world: int) -> None:
    """What a process found is its part of what one process did."""
    for got, want in zip(found["batches"], expected["batches"][rank::world], strict=True):
        for name in want:
            assert torch.equal(got[name], want[name]), (name, got[name], want[name])
    for got, want in zip(found["log"], expected["log"], strict=True):
        for name, tolerance in (("loss", 1e-6), ("eval_loss", 1e-6), ("grad_norm", 1e-5)):
            if name in want:
                assert abs(got[name] / want[name] - 1) < tolerance, (name, got[name], want[name])
    for got, want in zip(found["others"], expected["others"], strict=True):
        assert abs(got / want - 1) < 1e-6, (got, want)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        off = (found["weights"][name] - weight).abs().max() / weight.abs().max().clamp(min=1e-30)
        assert off <= case.weights, (name, float(off))


def evaluate(trainer) -> float:
    return trainer.evaluate()["eval_loss"]


def predict(trainer) -> float:
    trainer.args.prediction_loss_only = True
    return trainer.predict(rows(5, seed=3)).metrics["test_loss"]


def train_on(trainer) -> float:
    """A second run of the same trainer, which begins at its first step with the weights of the first run's end."""
    return trainer.train().training_loss


def make_rac(folder, **changes):
    return make_rac_trainer(folder, **{"learning_rate": 1e-2, **changes})


def make_taught(folder, **changes):
    """With a teacher of another hidden size."""
    config = tiny_model("llama").config
    config.hidden_size = 48
    torch.manual_seed(5)
    teacher = LlamaForCausalLM(config).eval()
    return make_trainer(folder, trainer=partial(BSSTrainer, teacher=teacher), **{"target": "teacher", **changes})


def make_privileged(folder, **changes):
    """With a tokenizer that can make prompts."""

    def trainer(model, config, **given):
        return BSSTrainer(model, config, **{**given, "processing_class": make_tokenizer(TEMPLATE, size=VOCAB)})

    return make_trainer(folder, trainer=trainer, **{"target": "privileged", "privileged_cue": "h g", **changes})


OWN = [
    {"prompt": p, "completion": c, "own_answer": o}
    for p, c, o in [
        ("a b", "c d", "e"), ("e", "f g h", "a a"), ("b c d", "a", "b"), ("h", "g f", "c c c"), ("h a", "g", "c"),
        ("c", "f g", "h"), ("d", "f g h a b", ""), ("b b", "b", "a a a a"),
    ]
]  # fmt: skip
AUTO = {"self_prob": "auto", "difference_target": 0.3, "self_prob_cap": 0.9, "self_prob_warmup": 0}
EASY = Dataset.from_list(
    [{"sample_id": i, "prompt_ids": [3 + i], "answer_ids": [7] * (6 + i % 5)} for i in range(16)]
)  # answers that are soon learned, so that self tokens agree with them
RAC = {"self_prob": 0.5, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
RIGHT = {
    **RAC, "own_answer": "column", "right_answers": "keep", "right_answer_share": 0.4, "direct_weight": 0.5,
    "judge": lambda answer, reference: answer[-1:] in "aeh",
}  # fmt: skip
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": rows(5, seed=3)}

CASES = {
    "plain": Case(),
    "uneven": Case({"self_prob": 0.2}, data=UNEVEN),
    "by micro-batch": Case({"context_micro_batches": 1}),
    "short": Case({"num_train_epochs": 2, "max_steps": -1, **GIVEN}, data=SHORT),
    "after_self": Case({"loss_on": "after_self", "self_prob": 0.2}, data=UNEVEN),
    "after_switch": Case({"loss_on": "after_switch", "granularity": "prefix", "self_prob": 0.6}, data=UNEVEN),
    "smoothed": Case({"label_smoothing_factor": 0.1}),
    "not lean": Case({"lean_loss": False}, lean=False),
    "kl": Case({"kl_weight": 0.3}),
    "kl, not lean": Case({"kl_weight": 0.3, "lean_loss": False}, lean=False),
    "dft": Case({"target": "dft"}),
    "teacher_forced": Case({"target": "teacher_forced", "self_prob": 0.1}, data=UNEVEN),
    "teacher_forced, not lean": Case({"target": "teacher_forced", "lean_loss": False}, lean=False),
    "teacher": Case(make=make_taught),
    "privileged": Case(make=make_privileged),
    "not reused": Case({"reuse_passes": False}, reused=False),
    "scheduled": Case({"self_prob_warmup": 2}),
    "auto": Case({**AUTO, "learning_rate": 0.03}, data=EASY),
    "not clipped": Case({"max_grad_norm": 0.0}),
    "evaluated": Case(EVALUATED, before=evaluate, after=predict),
    "checkpointed": Case({"gradient_checkpointing": True}),
    "tied": Case(model=lambda: tied("llama")),
    "gemma2": Case(model=lambda: tiny_model("gemma2"), lean=False),
    "padded": Case(model=lambda: padded("llama")),
    "evaluated, lora": Case(EVALUATED, before=evaluate, model=lora),
    "twice": Case(after=train_on),
    "best": Case({**EVALUATED, "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}),
    "lora": Case(model=lora),
    "lora, kl": Case({"kl_weight": 0.3}, model=lora),
    "lora, teacher": Case({"target": "teacher", "divergence": "jsd"}, model=lora),
    "lora, teacher_forced": Case({"target": "teacher_forced"}, model=lora),
    "lora, privileged": Case(model=lora, make=make_privileged),
    "lora, after_self": Case({"loss_on": "after_self"}, model=lora),
    "rac": Case(RAC, make=make_rac, data=OWN),
    "rac, mixed": Case({**RAC, "own_answer": "mixed"}, make=make_rac, data=OWN),
    "rac, column": Case({**RAC, "own_answer": "column", "self_prob": 0.0}, make=make_rac, data=OWN, reused=False),
    "rac, direct": Case({**RAC, "direct_weight": 0.5}, make=make_rac, data=OWN),
    "rac, direct, after_self": Case(
        {**RAC, "direct_weight": 0.5, "loss_on": "after_self"}, make=make_rac, data=OWN, reused=True
    ),
    "rac, right": Case(RIGHT, make=make_rac, data=OWN, reused=True),
    "rac, lora": Case(RAC, make=make_rac, data=OWN, model=lora),
    "bash": Case({"lean_loss": True}, make=make_bash_trainer, reused=False),
    "bash, lora": Case({"lean_loss": True}, make=make_bash_trainer, reused=False, model=lora),
}
CASES["many"] = Case(
    {**EVALUATED, "self_prob": 0.2, "context_micro_batches": 1, "label_smoothing_factor": 0.1},
    model=lambda: tied("llama"),
    data=UNEVEN,
    before=evaluate,
    after=predict,
)
if not has("transformers", SINCE["gemma2"]):
    del CASES["gemma2"]
ALL = tuple(CASES)
"""Those for every engine; a test of one may add its own to `CASES`."""
FAST = ("many", "short", "after_switch", "lora, kl", "rac, direct", "bash", "teacher_forced")
"""Together they have most of what the others have."""
EVEN = tuple(name for name in FAST if name != "short")
"""Those of which four processes get equally many batches, as they must in any training."""
PREPARED_TWICE = ("many", "evaluated", "evaluated, lora", "twice", "best")


def under_fsdp2(names: Iterable[str]) -> tuple[str, ...]:
    """Those that this Accelerate can run; the others are refused, which `test_fsdp.py` shows."""
    return tuple(name for name in names if not (FSDP2_ONCE and name in PREPARED_TWICE))


def make_expected(folder: Path, names: Iterable[str], world: int) -> None:
    """What one process does, for `compare`."""
    for name in names:
        torch.save(run(CASES[name], folder / "one" / name, world), folder / f"{name}.pt")


def compare(rank: int, folder: Path, names: Iterable[str], world: int, **engine) -> None:
    """Run the cases with others, and compare them with what one process did."""
    for name in names:
        expected = torch.load(folder / f"{name}.pt", weights_only=True)
        try:
            assert_same(run(CASES[name], folder / "several" / name, **engine), expected, CASES[name], rank, world)
        except Exception as error:
            error.add_note(f"case: {name}")
            raise
