"""DeepSpeed ZeRO-1, ZeRO-2 and ZeRO-3 in two processes, compared with one process: `make deepspeed` runs them."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from helpers.processes import WORLD, in_ranks
from helpers.training import Tokenizer, config, make_rac_trainer, make_trainer, rows
from helpers.zero import deepspeed_on_cpus, whole_weights_of, zero_config
from models import VOCAB, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback

from selfgen import BASHTrainer, BSSTrainer, ContextGenerator, write_contexts
from selfgen.data import rows_of
from selfgen.context.sharding import is_whole, whole_weights
from selfgen.training.bss import step_seed
from selfgen.training.checkpoints import ResumeError, fault_of
from selfgen.training.weights import DivergedError

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed: `make deepspeed` installs it and runs these", allow_module_level=True)

BATCH, ACCUMULATED = 2, 2  # of each process
ROWS = rows(12)  # an epoch of one step of two micro-batches per process, and one of a single micro-batch
SGD = {"optim": "sgd", "learning_rate": 3e-2, "lr_scheduler_type": "linear", "max_steps": 4, "report_to": []}
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")


def bss(folder, model=None, **options) -> BSSTrainer:
    return make_trainer(folder, model=model, data=ROWS, **options)


def bss_lora(folder, **options) -> BSSTrainer:
    torch.manual_seed(0)
    return make_trainer(folder, model=get_peft_model(tiny_model("llama"), LORA), data=ROWS, **options)


def rac(folder, **options):
    data = [{"prompt": " ".join("abcdefgh"[i % 8] for i in range(n)), "completion": "c d e"[: n % 6 + 1]} for n in range(2, 14)]
    return make_rac_trainer(folder, data=data, **options)


def bash(folder, **options) -> BASHTrainer:
    contexts = folder.parent / f"contexts-of-{folder.name}"
    write_contexts(ContextGenerator(tiny_model("llama")), ROWS, contexts, self_prob=0.5, progress=False)
    options = config(folder, **options)
    return BASHTrainer(tiny_model("llama"), options, train_dataset=contexts, processing_class=Tokenizer())


RUNS = {  # what is trained, and its options; each under one process, and under ZeRO
    "bss": (bss, {}),
    "without reuse": (bss, {"reuse_passes": False}),
    "logits": (bss, {"lean_loss": False, "self_prob": 0.1}),
    "one by one": (bss, {"context_micro_batches": 1}),
    "after self": (bss, {"loss_on": "after_self"}),
    "near": (bss, {"kl_weight": 0.3}),
    "rac": (rac, {"self_prob": 0.5, "direct_weight": 0.5}),
    "bash": (bash, {"self_prob": 0.5}),
    "lora": (bss_lora, {}),
    "lora, near": (bss_lora, {"kl_weight": 0.3}),
    "tied": (lambda folder, **o: bss(folder, model=tiny_model("gemma2"), **o), {}),
}


class Recorded:
    """The contexts of each row by step, as it was trained on."""

    def __init__(self, trainer):
        self.seen = {}
        compute_loss = trainer.compute_loss

        def recorded(model, inputs, *args, **kwargs):
            if model.training:
                columns = ("sample_id", "prompt_length", "answer_length", "input_ids", "labels")
                for row, prompt, answer, ids, labels in zip(*(inputs[name].tolist() for name in columns), strict=True):
                    end = prompt + answer
                    self.seen[trainer.state.global_step, row] = ids[:end], labels[prompt:end]
            return compute_loss(model, inputs, *args, **kwargs)

        trainer.compute_loss = recorded


def trained(trainer, **arguments) -> dict:
    """What a run came to: contexts, losses and weights, all in this process."""
    contexts = Recorded(trainer)
    trainer.train(**arguments)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "contexts": contexts.seen,
        "loss": [entry["loss"] for entry in logged],
        "norm": [entry["grad_norm"] for entry in logged],
        "weights": whole_weights_of(trainer.model),
        "reuses": trainer._reuses,
        "lean": trainer._answer_loss is not None and trainer._answer_loss.lean,
    }


def options_of(name, processes, **changes):
    make, options = RUNS[name]
    sizes = {"per_device_train_batch_size": BATCH * WORLD // processes, "gradient_accumulation_steps": ACCUMULATED}
    return make, {**SGD, **sizes, **options, **changes}


def same(found: dict, want: dict, name: str) -> None:
    """Contexts token for token; losses and weights to the order in which they are summed up."""
    assert found["contexts"] == {key: want["contexts"][key] for key in found["contexts"]}, name
    assert found["loss"] == pytest.approx(want["loss"], rel=2e-6), name
    assert found["norm"] == pytest.approx(want["norm"], rel=2e-5), name
    assert found["weights"].keys() == want["weights"].keys()
    for weight, value in want["weights"].items():
        off = (found["weights"][weight] - value).abs().max() / value.abs().max()
        assert off <= 4e-6, (name, weight, float(off))


def of_a_stage(rank, folder, stage, file):
    wanted = torch.load(file, weights_only=False)
    logging.basicConfig(level=logging.WARNING)
    with deepspeed_on_cpus():
        for name in RUNS:
            make, options = options_of(name, WORLD, deepspeed=zero_config(stage), ddp_backend="gloo")
            found = trained(make(folder / f"{name}-{rank}", **options))
            same(found, wanted[name], name)
            seen = [None, None]
            dist.all_gather_object(seen, found["contexts"])
            assert seen[0] | seen[1] == wanted[name]["contexts"]
            assert found["lean"] == wanted[name]["lean"], name
            assert found["reuses"] == (wanted[name]["reuses"] and stage < 3), name


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory):
    """The file of what each run came to."""
    folder = tmp_path_factory.mktemp("one")
    found = {}
    for name in RUNS:
        make, options = options_of(name, 1)
        found[name] = trained(make(folder / name, **options))
    torch.save(found, folder / "found.pt")
    return folder / "found.pt"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_as_in_one_process(stage, in_one_process, tmp_path):
    in_ranks(of_a_stage, tmp_path, stage, in_one_process)
