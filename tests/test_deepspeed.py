"""DeepSpeed ZeRO-1, ZeRO-2 and ZeRO-3 in two processes, compared with one process: `make deepspeed` runs them."""

from __future__ import annotations

import importlib.util
import logging
import math
import shlex
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from helpers.cli import ROOT, flags, history
from helpers.processes import WORLD, in_ranks
from helpers.training import Tokenizer, config, make_rac_trainer, make_trainer, rows
from helpers.zero import Counted, deepspeed_on_cpus, whole_weights_of, zero_config
from models import tiny_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback

from selfgen import BASHTrainer, BSSTrainer, ContextGenerator, write_contexts
from selfgen.cli import main
from selfgen.context.sharding import is_whole, local_part, whole_weights
from selfgen.training.checkpoints import ResumeError, fault_of
from selfgen.training.mixing import step_seed
from selfgen.training.weights import DivergedError

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed: `make deepspeed` installs it and runs these", allow_module_level=True)

pytestmark = pytest.mark.slow

BATCH, ACCUMULATED = 2, 2  # of each process
ROWS = rows(12)  # an epoch of one step of two micro-batches per process, and one of a single micro-batch
SGD = {"optim": "sgd", "learning_rate": 3e-2, "lr_scheduler_type": "linear", "max_steps": 4, "report_to": []}
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")


def bss(folder, model=None, **options) -> BSSTrainer:
    return make_trainer(folder, model=model, data=ROWS, **options)


def evaluated(folder, **options) -> BSSTrainer:
    """Between steps; an evaluation leaves ZeRO-3 with weights on their way for a backward."""
    model = tiny_model("llama")  # before the arguments, with which ZeRO-3 would partition it
    arguments = config(folder, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=2, **options)
    return BSSTrainer(model, arguments, train_dataset=ROWS, eval_dataset=rows(8, seed=1), processing_class=Tokenizer())


def bss_lora(folder, **options) -> BSSTrainer:
    torch.manual_seed(0)
    return make_trainer(folder, model=get_peft_model(tiny_model("llama"), LORA), data=ROWS, **options)


def rac(folder, **options):
    data = [
        {"prompt": " ".join("abcdefgh"[i % 8] for i in range(n)), "completion": "c d e"[: n % 6 + 1]}
        for n in range(2, 14)
    ]
    return make_rac_trainer(folder, data=data, **options)


def bash(folder, **options) -> BASHTrainer:
    contexts = folder.parent / f"contexts-of-{folder.name}"
    write_contexts(ContextGenerator(tiny_model("llama")), ROWS, contexts, self_prob=0.5, progress=False)
    model = tiny_model("llama")
    return BASHTrainer(model, config(folder, **options), train_dataset=contexts, processing_class=Tokenizer())


RUNS = {  # what is trained, and its options; each under one process, and under ZeRO
    "bss": (bss, {}),
    "without reuse": (bss, {"reuse_passes": False}),
    "logits": (bss, {"lean_loss": False, "self_prob": 0.1}),
    "evaluated": (evaluated, {}),
    "one by one": (bss, {"context_micro_batches": 1}),
    "after self": (bss, {"loss_on": "after_self"}),
    "near": (bss, {"kl_weight": 0.3}),
    "under the reference": (bss, {"target": "teacher_forced"}),
    "rac": (rac, {"self_prob": 0.5, "direct_weight": 0.5}),
    "bash": (bash, {"self_prob": 0.5}),
    "lora": (bss_lora, {}),
    "lora, near": (bss_lora, {"kl_weight": 0.3}),
    "lora, under the reference": (bss_lora, {"target": "teacher_forced", "divergence": "jsd"}),
    "lora, taught": (bss_lora, {"target": "teacher"}),
    "tied": (lambda folder, **o: bss(folder, model=tiny_model("gemma2"), **o), {}),
}


def forget_partitions() -> None:
    """From here on, models are made whole: a configuration of an earlier trainer would partition them."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


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
        "eval_loss": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
        "norm": [entry["grad_norm"] for entry in logged],
        "weights": whole_weights_of(trainer.model),
        "reuses": trainer._reuse.on,
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
    assert found["eval_loss"] == pytest.approx(want["eval_loss"], rel=2e-6), name
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
            forget_partitions()
            found = trained(make(folder / f"{name}-{rank}", **options))
            same(found, wanted[name], name)
            seen = [None, None]
            dist.all_gather_object(seen, found["contexts"])
            assert seen[0] | seen[1] == wanted[name]["contexts"]
            assert found["lean"] == wanted[name]["lean"], name
            assert found["reuses"] == wanted[name]["reuses"], name


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


def zero(stage, **changes) -> dict:
    return {**SGD, "deepspeed": zero_config(stage, **changes), "ddp_backend": "gloo"}


def lives(rank, folder, stage):
    logging.basicConfig(level=logging.WARNING)
    with deepspeed_on_cpus():
        checks = [resumes, in_bf16, changed_between]
        if stage > 1:
            checks += [stops_at_broken_gradients, tells_of_missing_gradients, comes_apart_again]
            checks += [waits_for_no_timer, offloads, in_fp16]
        for check in checks:
            forget_partitions()
            check(stage, folder / check.__name__, rank)
        if stage == 3:
            loaded_in_parts(stage, folder / "loaded", rank)
            communicates(folder / "counted")


def resumes(stage, folder, rank):
    """Bit for bit, with what AdamW knows in parts; and the model that is saved is whole."""
    options = {**zero(stage), "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    whole = bss(folder, **options)
    want = trained(whole)
    with pytest.raises(RuntimeError, match="make a new trainer"):
        whole.train()
    saved = folder / "checkpoint-2"
    assert fault_of(saved) is None
    forget_partitions()
    again = bss(folder, **options)
    found = trained(again, resume_from_checkpoint=str(saved))
    assert found["contexts"] == {key: value for key, value in want["contexts"].items() if key[0] >= 2}
    assert found["loss"] == want["loss"]
    assert all(torch.equal(found["weights"][name], value) for name, value in want["weights"].items())
    forget_partitions()
    for made in (folder / "checkpoint-4", saved):
        model = AutoModelForCausalLM.from_pretrained(made)
        last = all(torch.equal(dict(model.named_parameters())[name], value) for name, value in want["weights"].items())
        assert last == (made.name == "checkpoint-4")
    dist.barrier()
    with pytest.raises(ResumeError, match=r"other settings .*self_prob"):
        bss(folder, **options, self_prob=0.3).check_resumed(saved)
    part = next(saved.glob("global_step2/*1_mp_rank_00_optim_states.pt"))
    dist.barrier()
    if rank == 0:
        part.unlink()
    dist.barrier()
    with pytest.raises(ResumeError, match="1 of 2 parts of the optimizer are in global_step2"):
        bss(folder, **options).train(resume_from_checkpoint=str(saved))


def in_bf16(stage, folder, rank):
    """Contexts are those of bf16 weights; the optimizer's fp32 weights take up what bf16 would round away."""
    options = {**zero(stage), "bf16": True, "learning_rate": 1e-3, "token_budget": 32, "save_strategy": "no"}
    trainer = bss(folder, **options)
    contexts = Recorded(trainer)
    trainer.train()
    before = tiny_model_of_one_process().bfloat16()
    rows_here = [row for step, row in contexts.seen if step == 0]
    chosen = ROWS.select(rows_here)
    columns = [list(chosen[name]) for name in ("prompt_ids", "answer_ids")]
    made = ContextGenerator(before, token_budget=32, balance=4).contexts(
        *columns, trainer.args.self_prob, seed=step_seed(trainer.args.seed, 0), sample_ids=rows_here
    )
    for row, prompt, tokens in zip(rows_here, columns[0], made.tokens, strict=True):
        assert contexts.seen[0, row][0] == [*prompt, *tokens.tolist()]
    weights = whole_weights_of(trainer.model)
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    from deepspeed.utils import safe_get_full_fp32_param

    finer = 0  # than bf16
    for weight in trainer.model.parameters():
        exact = safe_get_full_fp32_param(weight)
        assert exact.dtype == torch.float32
        finer += int((exact != exact.bfloat16()).sum())
    assert finer
    assert trainer.meter.scales_loss is False


def in_fp16(stage, folder, rank):
    """DeepSpeed scales the loss, and leaves steps out that overflow, as a log line counts."""
    if not import_module("deepspeed.accelerator").get_accelerator().is_fp16_supported():
        return
    scaling = {"enabled": "auto", "initial_scale_power": 18, "hysteresis": 1}
    options = {**zero(stage, fp16=scaling), "fp16": True, "max_steps": 9, "lr_scheduler_type": "constant"}
    if rank == 0:
        tiny_model("llama").save_pretrained(folder / "model")
    dist.barrier()
    arguments = config(folder, **options)
    model = str(folder / "model") if stage == 3 else AutoModelForCausalLM.from_pretrained(folder / "model")
    trainer = BSSTrainer(model, arguments, train_dataset=ROWS, processing_class=Tokenizer())
    trained(trainer)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    left_out = [entry["skipped_steps"] for entry in logged]
    assert 0 < sum(left_out) < len(logged)
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float16}
    assert sum(left_out) == trainer.deepspeed.skipped_steps
    assert [math.isfinite(entry["grad_norm"]) for entry in logged] == [not one for one in left_out]
    begun = dict(tiny_model_of_one_process().named_parameters())
    moved = [(value.float() - begun[name]).norm() for name, value in whole_weights_of(trainer.model).items()]
    step = options["learning_rate"]  # at most, as gradients are clipped to a norm of 1
    assert step < torch.stack(moved).norm() <= step * left_out.count(0)


def tiny_model_of_one_process():
    forget_partitions()
    return tiny_model("llama")


def stops_at_broken_gradients(stage, folder, rank):
    trainer = bss(folder, **zero(stage))
    weight = trainer.model.model.layers[0].mlp.up_proj.weight
    weight.register_hook(lambda gradient: gradient * float("nan") if trainer.state.global_step == 1 else gradient)
    with pytest.raises(DivergedError, match=r"step 2: the norm of the gradients is (nan|inf)"):
        trainer.train()


def tells_of_missing_gradients(stage, folder, rank):
    model = tiny_model("llama")
    model.model.layers[1].extra = torch.nn.Parameter(torch.ones(7))
    told = []
    log = logging.getLogger("selfgen.training.weights")
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    log.addHandler(handler)
    trainer = bss(folder, model=model, **zero(stage))
    trainer.train()
    log.removeHandler(handler)
    assert [text[: text.index(", and")] for text in told] == ["1 of 22 trainable weights got no gradient in step 1"]
    assert "model.layers.1.extra" in told[0]


def comes_apart_again(stage, folder, rank):
    """After an exception inside whole weights, in one of the processes alone, training goes on."""
    options = zero(stage)
    trainer, seen = bss(folder / "a", **options), []

    def fail_inside():
        with whole_weights(trainer.model):
            for _ in range(3):
                trainer.model(input_ids=torch.arange(3, 9)[None])
            raise KeyError

    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in trainer.model.modules()]
            if rank == 0 and state.global_step == 2:
                with pytest.raises(KeyError):
                    fail_inside()
            elif state.global_step == 2:
                with whole_weights(trainer.model):  # the other one runs three forwards: none waits
                    assert is_whole(trainer.model)
            assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in trainer.model.modules()]
            seen.append(is_whole(trainer.model))
            if stage == 3:
                assert all(weight.numel() == 0 for weight in trainer.model.parameters()) or state.global_step != 2

    trainer.add_callback(Stops())
    found = trained(trainer)
    forget_partitions()
    other = trained(bss(folder / "b", **options))
    assert seen == [stage < 3] * 4
    assert found["loss"] == other["loss"]
    assert all(torch.equal(found["weights"][name], value) for name, value in other["weights"].items())
    weight = next(trainer.model.parameters())
    with torch.no_grad():  # the last number that a process has
        (local_part(weight) if rank == WORLD - 1 or stage < 3 else weight).view(-1)[-1:] = float("inf")
    with pytest.raises(DivergedError, match=r"embed_tokens.weight has values that are not finite"):
        trainer._stop_unless_weights_finite()


def waits_for_no_timer(stage, folder, rank):
    """DeepSpeed starts one at each forward of the model, and waits for the device there; passes are forwards, too."""
    trainer, started = bss(folder, **zero(stage)), []
    make = trainer.make_contexts

    class Begins(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            timer = trainer.deepspeed.tput_timer
            start = timer.start
            timer.start = lambda: started.append(start())

    def contexts(*args):
        before = len(started)
        made = make(*args)
        assert len(started) == before
        return made

    trainer.make_contexts = contexts
    trainer.add_callback(Begins())
    trainer.train()
    assert len(started) == 6  # micro-batches


def offloads(stage, folder, rank):
    """What is kept in the main memory makes no difference."""
    want = trained(bss(folder / "a", **zero(stage)))
    forget_partitions()
    moved = {"offload_optimizer": {"device": "cpu"}, **({"offload_param": {"device": "cpu"}} if stage == 3 else {})}
    found = trained(bss(folder / "b", **zero(stage, zero=moved, zero_force_ds_cpu_optimizer=False)))
    same(found, want, "offload")


def loaded_in_parts(stage, folder, rank):
    """From a folder, after the arguments are made: transformers partitions each weight as it loads it."""
    forget_partitions()
    if rank == 0:
        tiny_model("llama").save_pretrained(folder / "model")
    dist.barrier()
    for name in ("bss", "near", "near another"):
        more = {"kl_weight": 0.3, "kl_model": str(folder / "model")} if name == "near another" else {}
        options = options_of(name if not more else "bss", WORLD, **zero(stage), **more)[1]
        forget_partitions()
        want = trained(bss(folder / "whole", **options))
        forget_partitions()
        arguments = config(folder / "parts", **options)
        trainer = BSSTrainer(str(folder / "model"), arguments, train_dataset=ROWS, processing_class=Tokenizer())
        assert all(hasattr(weight, "ds_id") for weight in trainer.model.parameters())
        found = trained(trainer)
        same(found, want, name)


class ChangesBetween(TrainerCallback):
    """Changes weights between micro-batches, from the second step on: all of each, or the part that one process has."""

    def __init__(self, rank, whole):
        self.rank, self.whole = rank, whole

    @torch.no_grad()
    def on_substep_end(self, args, state, control, model=None, **kwargs):
        gathered = import_module("deepspeed").zero.GatheredParameters
        weights = [*model.parameters()]
        split = hasattr(weights[0], "ds_id")
        if state.global_step == 2 and self.whole:
            with gathered(weights, modifier_rank=0) if split else nullcontext():
                for weight in weights:
                    weight.data.mul_(0.9)
        elif state.global_step == 2 and (self.rank == 1 or not split):
            for weight in weights:
                local_part(weight).data.mul_(0.9)


def changed_between(stage, folder, rank):
    """What passes have computed is not reused then, in either process."""
    for whole in (True, False):
        found = []
        for reuse in (True, False):
            forget_partitions()
            trainer = bss(folder / f"{whole}-{reuse}", **zero(stage), reuse_passes=reuse)
            trainer.add_callback(ChangesBetween(rank, whole))
            found.append(trained(trainer))
        assert not found[0]["reuses"]
        assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)
        for name, weight in found[1]["weights"].items():
            assert (found[0]["weights"][name] - weight).abs().max() <= 1e-5 * weight.abs().max(), name


def communicates(folder):
    """A step gathers all weights once for its contexts, whose passes do not, and as always twice per micro-batch."""
    forget_partitions()
    little = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 3000}
    model = tiny_model("llama")
    size = sum(weight.numel() for weight in model.parameters())
    trainer = bss(folder, model=model, **zero(3, zero=little))
    counted, make, found, in_passes = Counted(), trainer.make_contexts, [], []

    def contexts(*args):
        before = counted.calls
        made = make(*args)
        in_passes.append(counted.calls - before)
        return made

    class Steps(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            found.append((counted.gathered / size, counted.reduced / size))
            counted.gathered = counted.reduced = 0

    trainer.make_contexts = contexts
    trainer.add_callback(Steps())
    with counted:
        trainer.train()
    assert trainer._reuse.on
    assert in_passes == [0] * 4
    gathered, reduced = found[3]  # a step without a look at what the model allows; it has one micro-batch
    assert gathered == pytest.approx(2 * 1 + 1, abs=0.02)
    assert reduced == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_and_its_ends(stage, tmp_path):
    in_ranks(lives, tmp_path, stage)


def launched(rank, folder, options):
    with deepspeed_on_cpus():
        forget_partitions()
        assert main(["train", *flags(options)]) == 0


@pytest.mark.parametrize("stage", [2, 3])
def test_launch_files(stage, arguments, tmp_path):
    """What examples/launch/deepspeed.sh starts, on two CPUs; the model that it leaves is whole."""
    shell = (ROOT / "examples" / "launch" / "deepspeed.sh").read_text()
    given = shlex.split(shell[shell.index("exec torchrun") :].replace("\\\n", " "))
    assert given[given.index("--deepspeed") + 1] == "$(dirname $0)/deepspeed_zero${ZERO:-2}.json"
    file = ROOT / "examples" / "launch" / f"deepspeed_zero{stage}.json"
    options = {
        **arguments,
        "deepspeed": str(file),
        "bf16": "yes",
        "per_device_train_batch_size": 2,
        "report_to": "none",
    }
    in_ranks(launched, tmp_path, options)
    out = Path(arguments["output_dir"])
    assert [entry["step"] for entry in history(out)] == [1, 2, 3]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert all(weight.numel() and weight.isfinite().all() for weight in model.parameters())


def left_out(rank, folder):
    from accelerate import Accelerator, DeepSpeedPlugin

    plugin = DeepSpeedPlugin(hf_ds_config={**zero_config(2), "train_micro_batch_size_per_gpu": 1})
    assert Accelerator(cpu=True, deepspeed_plugin=plugin).state.distributed_type != DistributedType.DEEPSPEED


def test_accelerate_still_leaves_deepspeed_out_on_cpus(tmp_path):
    """Else deepspeed_on_cpus and parallelism._IGNORED_ON are no longer needed."""
    in_ranks(left_out, tmp_path)
