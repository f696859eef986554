"""Odd runs over sharded weights: what others than the trainers do to a model, and steps that are broken off."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
from helpers.processes import WORLD, in_ranks
from helpers.runs import CASES, Case, compare, evaluate, lora, make_expected, tied
from helpers.sharded import another_run, fsdp_on_cpus
from helpers.training import make_trainer, rows
from models import VOCAB, _base, tiny_model
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, TrainerCallback

from selfgen import ContextGenerator, lockstep, whole_weights
from selfgen.context.sharding import local_part


class Fails(Exception):
    pass


class FailsBetween(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            raise Fails


def broken_off_between(trainer):
    """A run that ends after the first micro-batch of its second step; the next one begins anew."""
    callback = FailsBetween()
    trainer.add_callback(callback)
    with pytest.raises(Fails):
        trainer.train()
    trainer.remove_callback(callback)


def broken_off_within(trainer):
    """A run that ends in the middle of a backward, or of a forward where passes are not reused."""
    layer = trainer.generator.model.model.layers[1]
    make, made = trainer.make_contexts, []

    def make_contexts(*args):
        made.append(make(*args))
        return made[-1]

    def fail(*_):
        if len(made) == 2 and trainer.model.training and trainer._step.ready and torch.is_grad_enabled():
            raise Fails

    trainer.make_contexts = make_contexts
    hook = layer.mlp.register_forward_pre_hook(fail)
    with pytest.raises(Fails):
        trainer.train()
    hook.remove()
    trainer.make_contexts = make
    return evaluate(trainer)


class Changes(TrainerCallback):
    """Changes weights after the optimizer's step, or before a step's contexts are made."""

    def __init__(self, event: str):
        self.event = event

    @torch.no_grad()
    def _change(self, event, model):
        if event == self.event:
            for weight in model.parameters():
                local_part(weight).mul_(0.9)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self._change("begin", model)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self._change("optimizer", model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._change("end", model)


class Looks(TrainerCallback):
    """Evaluates and answers between micro-batches and between steps, each process other prompts."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_substep_end(self, args, state, control, **kwargs):
        with self.trainer._whole_weights():
            self.trainer.generator.answer([[3, 4]] * (1 + args.process_index), max_new_tokens=4)

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.predict(rows(5, seed=3))
        self.on_substep_end(args, state, control)


def changed(event):
    return lambda trainer: trainer.add_callback(Changes(event))


def only(*parts: str, make=lambda: tiny_model("llama")):
    """A model of which only these parts are trained."""

    def model():
        made = make()
        for name, weight in made.named_parameters():
            weight.requires_grad_(any(part in name for part in parts))
        return made

    return model


def mixtral():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**_base(num_local_experts=4, num_experts_per_tok=2))
    return AutoModelForCausalLM.from_config(config).eval()


def bloom():
    """It runs sequentially alone."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.3}
    config = transformers.BloomConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return AutoModelForCausalLM.from_config(config).eval()


def saving(*names: str):
    return lambda: lora(modules_to_save=[*names])


SGD = {"optim": "sgd", "optim_args": "momentum=0.9"}
MANY = {"context_micro_batches": 1, "gradient_accumulation_steps": 4}
ODD = {
    "broken off between": Case({"weights": "gathered"}, before=broken_off_between),
    "broken off within": Case({"weights": "gathered", "eval_dataset": rows(5, seed=3)}, before=broken_off_within),
    "broken off within a forward": Case(
        {"reuse_passes": False, "max_grad_norm": 0.0, "eval_dataset": rows(5, seed=3)},
        before=broken_off_within,
        reused=False,
    ),
    "only the head": Case(SGD, model=only("lm_head")),
    "only the embedding": Case(model=only("embed_tokens")),
    "only the tied embedding": Case(model=only("embed_tokens", make=lambda: tied("llama"))),
    "only the last layer": Case(model=only("layers.1.", make=lambda: tied("llama"))),
    "only norms": Case(MANY, model=only("norm")),
    "saved with lora": Case({"kl_weight": 0.3}, model=saving("embed_tokens", "lm_head"), lean=False),
    "checkpointed lora": Case({"kl_weight": 0.3, "gradient_checkpointing": True}, model=lora),
    "dora": Case(model=lambda: lora(use_dora=True)),
    "changed at the beginning": Case(before=changed("begin")),
    "changed before the optimizer": Case(before=changed("optimizer")),
    "changed at the end": Case(before=changed("end")),
    "looked at": Case(before=lambda trainer: trainer.add_callback(Looks(trainer))),
    "gemma3": Case(model=lambda: tiny_model("gemma3")),
    "gpt_oss": Case(model=lambda: tiny_model("gpt_oss")),
    "mixtral": Case(model=mixtral),
    "bloom": Case({"context_method": "sequential"}, model=bloom, reused=False),
    "greedy spans": Case({"sampling_temperature": 0.0, "granularity": "span"}),
    "evaluated on a stream": Case(
        {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": rows(5).to_iterable_dataset()}
    ),
}
FAST = ("broken off between", "broken off within", "saved with lora")
SHARDED = tuple(name for name, case in ODD.items() if "weights" not in case.changes)
CASES |= ODD


def compared(rank, folder, names, engine):
    fsdp_on_cpus()
    compare(rank, folder, names, WORLD, fsdp=True, **engine)


@pytest.mark.slow
def test_all_gathered(tmp_path):
    make_expected(tmp_path, ODD, WORLD)
    in_ranks(compared, tmp_path, list(ODD), {})


@pytest.mark.slow
def test_all_sharded(tmp_path):
    make_expected(tmp_path, SHARDED, WORLD)
    in_ranks(compared, tmp_path, SHARDED, {"weights": "sharded"})


COMPILED = {
    "compiled": Case({"reuse_passes": False}, reused=False),
    "compiled, lora": Case({"kl_weight": 0.3}, model=lora, reused=False),
}
CASES |= COMPILED


@pytest.mark.slow
def test_compiled_and_sharded(tmp_path):
    make_expected(tmp_path, COMPILED, WORLD)
    compiled = {"torch_compile": True, "torch_compile_backend": "eager", "weights": "sharded"}
    in_ranks(compared, tmp_path, list(COMPILED), compiled)


INPUTS = torch.arange(3, 9)[None]
ROWS = {"prompts": [[3, 4, 5]], "references": [[5, 6, 7, 8]], "self_prob": 0.7, "seed": 1, "sample_ids": [0]}


def loss_of(model):
    return model(input_ids=INPUTS, labels=INPUTS).loss


def sharded():
    model = tiny_model("llama")
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def no_backward_inside(model, whole, caplog):
    """It would lose gradients, or add them to those of the next step."""
    for around in (whole_weights, lockstep):
        for keep in (False, True):
            refused = pytest.raises(RuntimeError, match="Run the training forward and the backward after the block")
            with refused, around(model, keep=keep):
                loss_of(model).backward()
            with around(model, keep=keep):
                loss = loss_of(model)
            with refused:
                loss.backward()
            loss_of(model).backward()
            for own, other in zip(model.parameters(), whole.parameters(), strict=True):
                assert (own.grad.full_tensor() - other.grad).abs().max() <= 1e-5 * other.grad.abs().max()
            model.zero_grad()


def not_in_one_another(model, whole, caplog):
    with pytest.raises(ValueError, match="leave one of the two out"), lockstep(model), whole_weights(model):
        pass
    with whole_weights(model), whole_weights(model), lockstep(model):
        ContextGenerator(model).contexts(**ROWS)
    with lockstep(torch.compile(model, backend="eager")):
        ContextGenerator(model).contexts(**ROWS)


def no_change_inside(model, whole, caplog):
    for keep in (False, True):
        caplog.clear()
        with whole_weights(model, keep=keep), torch.no_grad():
            model.lm_head.weight.mul_(2)
        assert "1 weights were changed inside whole_weights" in caplog.text
    loss_of(model).backward()
    assert torch.equal(model.lm_head.weight.full_tensor(), whole.lm_head.weight)
    caplog.clear()
    with whole_weights(model):
        ContextGenerator(model).contexts(**ROWS)
    assert "changed" not in caplog.text


def nothing_outside(model, whole, caplog):
    generator = ContextGenerator(model)
    for ask in (
        lambda: generator.budget,
        lambda: generator.dtype,
        lambda: generator.check_causal(),
        lambda: generator.touch(),
        lambda: generator.answer([[3]]),
        lambda: generator.contexts(**ROWS),
        lambda: generator.contexts(**ROWS, method="sequential"),
    ):
        with pytest.raises(ValueError, match="the model's weights are sharded over processes"):
            ask()


def in_a_loop_of_ones_own(rank, folder):
    whole, caplog = tiny_model("llama"), Logged()
    loss_of(whole).backward()
    logging.getLogger("selfgen").addHandler(caplog)
    for check in (nothing_outside, no_backward_inside, not_in_one_another, no_change_inside):
        check(sharded(), whole, caplog)
    compared(rank, folder, FAST, {})
    another_run()
    with pytest.raises(ValueError, match="auto_find_batch_size is given, and weights are split"):
        make_trainer(folder / "auto", fsdp=True, auto_find_batch_size=True)


class Logged(logging.Handler):
    """What is logged, in a process without pytest."""

    def __init__(self):
        super().__init__()
        self.clear()

    def clear(self):
        self.text = ""

    def emit(self, record):
        self.text += record.getMessage()


def test_what_would_be_lost(tmp_path):
    make_expected(tmp_path, FAST, WORLD)
    in_ranks(in_a_loop_of_ones_own, tmp_path)
