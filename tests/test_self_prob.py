"""A self-probability that follows what steps measure: a budget of differing tokens, after a loss that has settled."""

from __future__ import annotations

import copy
import json
import math
import random
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from helpers.processes import in_ranks
from helpers.runs import EASY, compare, make_expected
from helpers.training import SMALL, Tokenizer, config, make_bash_trainer, make_rac_trainer, make_trainer, rows, weights
from models import BASE, VOCAB, tiny_model
from transformers import (
    HfArgumentParser,
    MixtralConfig,
    MixtralForCausalLM,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.loss.loss_utils import ForCausalLMLoss

from selfgen import BSSConfig, BSSTrainer, RACConfig
from selfgen.cli.contexts import ContextArguments
from selfgen.training import self_prob
from selfgen.training.checkpoints import ResumeError
from selfgen.training.config import GENTLE, RECIPE, with_fixed_self_prob
from selfgen.training.processes import meet
from selfgen.training.self_prob import DifferenceBudget, expected_disagreement, least_steps, settled

FILE = "selfgen_self_prob.json"
AUTO = {"self_prob": "auto", "difference_target": 0.3, "self_prob_cap": 0.9}
FALLING = {"self_prob": 0.9, "self_prob_schedule": "disagreement"}


# The budget


def follow(share_of, target=0.02, cap=0.5, tokens=2000, steps=200, seed=0):
    """p, and the share of all tokens that differ, at each step of a model whose self tokens differ by ``share_of``."""
    draw, budget, found = random.Random(seed), DifferenceBudget(target, cap), []
    for step in range(steps):
        p = budget.self_prob
        self_tokens = sum(draw.random() < p for _ in range(tokens))
        differing = sum(draw.random() < share_of(step / steps) for _ in range(self_tokens))
        found.append((p, differing / tokens))
        budget.count(self_tokens, differing)
    return found


@pytest.mark.parametrize("share", [0.02, 0.1, 0.66, 1.0])
def test_the_share_of_differing_tokens_comes_to_the_target(share):
    found = follow(lambda _: share)
    p = min(0.5, 0.02 / share)
    assert median(one for one, _ in found[50:]) == pytest.approx(p, rel=0.1)
    assert sum(differing for _, differing in found[50:]) / 150 == pytest.approx(p * share, rel=0.1)
    assert all(one <= 0.5 for one, _ in found)


def test_it_begins_at_the_target_and_does_not_overshoot():
    assert DifferenceBudget(0.02, 0.5).self_prob == 0.02
    assert DifferenceBudget(0.02, 0.01).self_prob == 0.01
    assert max(differing for _, differing in follow(lambda _: 1.0)) < 0.035  # three standard deviations


def test_it_follows_a_model_that_gets_better():
    found = follow(lambda progress: 0.8 - 0.7 * progress, steps=1000, tokens=1000)
    late = [differing for _, differing in found[20:]]
    assert sum(late) / len(late) == pytest.approx(0.02, rel=0.1)
    assert found[-1][0] > 5 * found[20][0]


def test_a_model_that_never_differs_gets_the_cap():
    assert follow(lambda _: 0.0)[-1][0] == 0.5


def test_steps_without_self_tokens_are_no_reason_to_change():
    budget = DifferenceBudget(0.02, 0.5)
    for _ in range(100):
        budget.count(0, 0)
    assert budget.self_prob == 0.02


# A loss that has settled


def curve(of, steps=1000, noise=0.0, seed=0):
    draw = random.Random(seed)
    return [of(step / steps) * (1 + draw.gauss(0, noise)) for step in range(steps)]


def first_settled(losses, warmup=0, run=None):
    least = least_steps(warmup, run or len(losses))
    return next((step for step in range(1, len(losses) + 1) if settled(losses[:step], least)), math.inf)


def fast(progress):
    return 0.4 + 4 * math.exp(-16 * progress)


def line(progress):
    return 4 - 3 * progress


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.1])
@pytest.mark.parametrize("steps", [300, 1000])
def test_a_toy_task_settles_within_the_run(steps, noise):
    assert 0.5 < first_settled(curve(fast, steps, noise)) / steps < 0.95


def test_a_cosine_learning_rate():
    """Losses go on falling until the rate is 0, by less and less."""

    def cosine(progress):
        return 4.5 * math.exp(-12 * (progress / 2 + math.sin(math.pi * progress) / 2 / math.pi)) + 1

    assert 0.5 < first_settled(curve(cosine, 1000, 0.05)) / 1000 < 0.9


def test_a_short_run_never_settles():
    assert all(first_settled(curve(lambda _: 1.0, 63, 0.1, seed)) == math.inf for seed in range(20))
    falling = [first_settled(curve(lambda x: 0.6 + 0.7 * math.exp(-3 * x), 100, 0.15, seed)) for seed in range(20)]
    assert falling.count(math.inf) >= 18  # chance may have it settle early


def test_a_steady_fall_never_settles():
    assert first_settled(curve(line)) == math.inf
    noisy = [first_settled(curve(line, noise=0.03, seed=seed)) for seed in range(10)]
    assert noisy.count(math.inf) >= 8


@pytest.mark.parametrize("head", [[12, 8, 5, 3.5], [30.0], [2 + 8 * math.exp(-step / 8) for step in range(50)]])
@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_a_steep_beginning_makes_no_plateau_of_the_slow_fall_after_it(head, noise):
    """As of a new format, learned in a few steps, after which the loss falls by half."""
    for seed in range(5):
        losses = [*head, *curve(lambda x: 1 + 1.2 * math.exp(-3 * x), noise=noise, seed=seed)]
        assert first_settled(losses) == math.inf


def test_noise_delays():
    clean = first_settled(curve(fast))
    found = [first_settled(curve(fast, noise=0.2, seed=seed)) for seed in range(9)]
    assert median(found) > clean
    assert sorted(found)[1] > 0.7 * clean


@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_chance_is_no_plateau(noise):
    """However often one looks, as a rise by chance is not subtracted from the error."""
    falling = [first_settled(curve(line, 500, noise, seed)) for seed in range(6)]
    slow = [first_settled(curve(lambda x: 0.6 + 0.4 * math.exp(-4 * x), 500, noise, seed)) for seed in range(6)]
    assert {*falling} == {math.inf}
    assert min(slow) > 250
    flat = [first_settled(curve(lambda _: 1.0, 500, noise, seed)) for seed in range(6)]
    assert min(flat) > 2 * 4 * (noise / 0.02) ** 2 * 0.7  # two quarters whose difference is known to 2%


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.1])
def test_epochs_over_few_rows(noise):
    """Of 50 steps each, whose losses drop from one to the next: it settles within one of them, or never."""
    means = (0.72, 0.58, 0.46, 0.36, 0.29, 0.24)

    def memorised(progress):
        return means[int(6 * progress)] + 0.7 * math.exp(-75 * progress)

    found = [first_settled(curve(memorised, 300, noise, seed)) for seed in range(9)]
    assert all(64 <= step <= 150 or step == math.inf for step in found)


@pytest.mark.parametrize("of", [lambda x: 1.0, lambda x: 1 + x, lambda x: 1e-9])
def test_a_loss_that_does_not_fall_has_settled(of):
    assert first_settled(curve(of, 600, 0.02)) < 100


def test_a_long_run_waits_for_a_tenth_of_its_steps():
    losses = curve(lambda x: 2 + 6 / (1 + 3000 * x), 10_000, 0.05)[:1001]
    assert first_settled(losses, run=1000) < 1000
    assert first_settled(losses, run=10_000) == 1000


def test_the_warm_up_of_the_learning_rate_is_no_plateau():
    losses = [5.0] * 100 + curve(fast, 400)
    assert first_settled(losses) < 100
    assert first_settled(losses, warmup=100) > 250


# Training


def logged(trainer, *names):
    timed = ("context_seconds", "training_seconds", "tokens_per_second", "train_runtime", "train_samples_per_second")
    names = names or {name for entry in trainer.state.log_history for name in entry} - {
        *timed,
        "train_steps_per_second",
    }
    return [{name: entry[name] for name in names if name in entry} for entry in trainer.state.log_history[:-1]]


@pytest.fixture
def knows(monkeypatch):
    """As if the tiny model, whose weights are random, knew something."""
    monkeypatch.setattr(self_prob, "_OF_GUESSING", math.inf)


def asked(trainer):
    """The probabilities that contexts are made with, from here on."""
    found, generate = [], trainer.generator.contexts
    trainer.generator.contexts = lambda *args, **kwargs: (found.append(args[2]), generate(*args, **kwargs))[1]
    return found


def mixed(trainer):
    """What mixing returns, step by step, from here on."""
    made, mix = [], trainer.mix
    trainer.mix = lambda batches: (made.append(mix(batches)), made[-1])[1]
    return made


def test_p_follows_what_steps_measure(tmp_path):
    trainer = make_trainer(tmp_path, data=EASY, **AUTO, self_prob_warmup=2, max_steps=8)
    made = mixed(trainer)
    found = asked(trainer)
    trainer.train()
    log, budget = logged(trainer), DifferenceBudget(0.3, 0.9)
    assert [entry["self_prob"] for entry in log] == [0.0, 0.0, *found]
    for p, entry, (stats, _) in zip(found, log[2:], made[2:], strict=True):
        assert p == budget.self_prob
        differing = stats.self_tokens - round(stats.agreement * stats.self_tokens)
        assert entry["differing_share"] == differing / stats.answer_tokens
        budget.count(stats.self_tokens, differing)
    assert found[0] == 0.3
    assert len({*found}) > 3


def test_p_is_given_times_the_disagreement(tmp_path):
    trainer = make_trainer(tmp_path, data=EASY, **FALLING, self_prob_warmup=2, max_steps=8)
    made = mixed(trainer)
    found = asked(trainer)
    trainer.train()
    assert [entry["self_prob"] for entry in logged(trainer)] == [0.0, 0.0, *found]
    self_tokens = differing = 0.0
    for p, (stats, _) in zip(found, made[2:], strict=True):
        assert p == 0.9 * ((1 + differing) / (1 + self_tokens))
        self_tokens = 0.95 * self_tokens + stats.self_tokens
        differing = 0.95 * differing + stats.self_tokens - round(stats.agreement * stats.self_tokens)
    assert found[0] == 0.9
    assert found[-1] < 0.8  # the model has learned some


def test_one_p_for_all_contexts_of_a_step(tmp_path):
    """However many micro-batches have theirs made at once."""
    options = {**AUTO, "data": EASY, "self_prob_warmup": 1, "max_steps": 5}
    whole = make_trainer(tmp_path / "a", **options)
    parts = make_trainer(tmp_path / "b", context_micro_batches=1, **options)
    found = [asked(trainer) for trainer in (whole, parts)]
    for trainer in (whole, parts):
        trainer.train()
    assert found[1] == [p for p in found[0] for _ in range(2)]
    assert len({*found[0]}) > 2
    names = ("self_prob", "self_share", "differing_share")
    assert logged(parts, *names) == logged(whole, *names)


def test_passes_are_tried_though_a_callback_has_changed_p_since(tmp_path):
    """Where contexts are made before a step begins."""

    class Change(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            args.self_prob = 0.5 - args.self_prob

    trainer = make_trainer(tmp_path, loss_on="after_self", max_steps=1)
    trainer.add_callback(Change())
    found = asked(trainer)
    trainer.train()
    assert found == [0.5]
    assert trainer._reuse.on
    assert trainer._reuse.verified


@pytest.mark.usefixtures("knows")
def test_until_the_loss_has_settled_nothing_is_mixed(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="selfgen")
    monkeypatch.setattr(self_prob, "settled", lambda losses, least: len(losses) == 3)
    trainer = make_trainer(tmp_path, **AUTO, max_steps=6)
    trainer.train()
    log = logged(trainer)
    assert [entry["self_prob"] > 0 for entry in log] == [False] * 3 + [True] * 3
    assert [entry["passes"] > 0 for entry in log] == [False] * 3 + [True] * 3
    assert "settled after 3 steps" in caplog.text


@pytest.mark.parametrize(
    "how", [AUTO, FALLING | {"self_prob_warmup": "settled"}, AUTO | {"target": "teacher_forced"}], ids=str
)
@pytest.mark.one_case
def test_a_model_that_knows_nothing_has_nothing_to_wait_for(tmp_path, caplog, how):
    """Whatever its loss does later; and one that begins a little better than by guessing waits."""
    caplog.set_level("INFO", logger="selfgen")
    trainer = make_trainer(tmp_path / "random", **how, max_steps=4)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0.95 * math.log(VOCAB)
    assert [entry["self_prob"] > 0 for entry in logged(trainer)] == [False, True, True, True]
    assert "is that of guessing" in caplog.text

    taught = make_trainer(tmp_path / "taught", data=EASY, self_prob=0.0, learning_rate=0.03, max_steps=8)
    taught.train()
    waits = make_trainer(tmp_path / "waits", model=taught.model, data=EASY, **how, max_steps=4)
    waits.train()
    assert waits.state.log_history[0]["loss"] < 0.95 * math.log(VOCAB)
    assert not any(entry["self_prob"] for entry in logged(waits))


@pytest.mark.usefixtures("knows")
def test_a_model_that_has_waited_begins_with_what_its_loss_tells(tmp_path, monkeypatch):
    """Not with the p of one that knows nothing; a budget does, as it must not be spent before it is known."""
    monkeypatch.setattr(self_prob, "settled", lambda losses, least: len(losses) == 9)
    waits = {"data": EASY, "learning_rate": 0.01, "max_steps": 11, "self_prob_warmup": "settled"}
    trainer = make_trainer(tmp_path / "falls", **FALLING, **waits)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history[:9]]
    expected = 1 - math.exp(-sum(losses[-2:]) / 2)
    found = [entry["self_prob"] for entry in logged(trainer)]
    assert 0 < expected < 0.9
    assert found[8:10] == [0, pytest.approx(0.9 * expected, rel=1e-6)]
    assert found[10] > 0

    trainer = make_trainer(tmp_path / "auto", **AUTO, **waits)
    trainer.train()
    assert logged(trainer)[9]["self_prob"] == pytest.approx(0.3)


def test_what_a_loss_tells_of_self_tokens():
    """An upper limit, which sampled tokens confirm, between 1% and all."""
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4000, 20, generator=draw)
    references = torch.distributions.Categorical(logits=logits).sample()
    loss = float(torch.nn.functional.cross_entropy(logits, references))
    sampled = torch.distributions.Categorical(logits=logits).sample()
    differing = float((sampled != references).float().mean())
    assert differing < expected_disagreement([9.0] * 12 + [loss] * 4) < differing + 0.25
    assert expected_disagreement([0.0]) == expected_disagreement([-3.0]) == 0.01
    assert expected_disagreement([1e9]) == 1.0


def test_by_default_a_short_run_of_a_model_that_knows_something_is_plain_fine_tuning(tmp_path):
    """So that it can't lose; and one with random weights mixes from its second step on."""
    taught = make_trainer(tmp_path / "taught", data=EASY, self_prob=0.0, learning_rate=0.03, max_steps=8)
    taught.train()

    def trained(model, **given):
        args = BSSConfig(str(tmp_path / "run"), **SMALL, max_steps=4, learning_rate=1e-2, lean_loss=True, **given)
        trainer = BSSTrainer(copy.deepcopy(model), args, train_dataset=EASY, processing_class=Tokenizer())
        trainer.train()
        return trainer

    plain, default, random = trained(taught.model, self_prob=0.0), trained(taught.model), trained(tiny_model("llama"))
    assert torch.equal(weights(default.model), weights(plain.model))
    assert [entry["self_prob"] > 0 for entry in logged(random)] == [False, True, True, True]


@pytest.mark.parametrize("change", [{"kl_weight": 0.5}, {"target": "dft"}])
def test_a_loss_that_is_no_cross_entropy_tells_nothing_of_guessing(tmp_path, change):
    trainer = make_trainer(tmp_path, **AUTO, **change, max_steps=3)
    trainer.train()
    assert not any(entry["self_prob"] for entry in logged(trainer))


def smoothed(folder, model):
    """Which gives much to ids that a model finds unlikely."""
    return make_trainer(folder, model, **SETTLED, label_smoothing_factor=0.9)


def loss_of_users(folder, model):
    model.loss_function = lambda *given, **options: 1e9 * ForCausalLMLoss(*given, **options)
    return make_trainer(folder, model, **SETTLED)


def computed_by_users(folder, model):
    class Own(BSSTrainer):
        def compute_loss(self, *args, **kwargs):
            return 1e9 * super().compute_loss(*args, **kwargs)

    return make_trainer(folder, model, trainer=Own, **SETTLED)


def loss_of_model(folder, model):
    forward = model.forward

    def own(input_ids, attention_mask=None, labels=None, **options):
        found = forward(input_ids, attention_mask=attention_mask, **options)
        if labels is not None:
            logits, following = found.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            found.loss = torch.nn.functional.cross_entropy(logits, following, reduction="sum") * 1e9
        return found

    model.forward = own
    return make_trainer(folder, model, **SETTLED)


def losses_of_routers(folder, model):
    config = MixtralConfig(**BASE, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=1e9)
    return make_trainer(folder, MixtralForCausalLM(config), **SETTLED)


SETTLED = {**FALLING, "self_prob_warmup": "settled", "data": EASY, "learning_rate": 1e-9, "max_steps": 2}


@pytest.mark.parametrize("make", [smoothed, loss_of_users, computed_by_users, loss_of_model, losses_of_routers])
@pytest.mark.one_case
def test_nor_does_one_that_is_higher_than_that_of_the_tokens(tmp_path, make):
    taught = make_trainer(tmp_path / "taught", data=EASY, self_prob=0.0, learning_rate=0.03, max_steps=8)
    taught.train()
    trainer = make(tmp_path / "waits", taught.model)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > math.log(VOCAB)
    assert not any(entry["self_prob"] for entry in logged(trainer))


def test_nor_does_one_that_learns_rows_twice(tmp_path):
    """Corrections and the rows as they were: the loss of a step is the sum of two means."""
    for direct_weight, waits in ((1.0, True), (0.0, False)):
        trainer = make_rac_trainer(tmp_path, **AUTO, direct_weight=direct_weight, max_steps=3)
        trainer.train()
        assert any(entry["self_prob"] for entry in logged(trainer)) != waits


@pytest.mark.usefixtures("knows")
def test_the_losses_are_those_of_the_log(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(self_prob, "settled", lambda losses, least: seen.append(([*losses], least)))
    trainer = make_trainer(tmp_path, **AUTO, max_steps=4, warmup_steps=40)
    trainer.train()
    assert seen[-1][0] == pytest.approx([entry["loss"] for entry in logged(trainer)], rel=1e-6)
    assert seen[-1][1] == 80


@pytest.mark.usefixtures("knows")
def test_a_fixed_p_may_wait_too(tmp_path, monkeypatch):
    monkeypatch.setattr(self_prob, "settled", lambda losses, least: len(losses) == 2)
    trainer = make_trainer(tmp_path, self_prob=0.4, self_prob_warmup="settled", max_steps=4)
    found = asked(trainer)
    trainer.train()
    assert found == [0.4, 0.4]
    assert [entry["self_prob"] for entry in logged(trainer)] == [0.0, 0.0, 0.4, 0.4]


@pytest.mark.usefixtures("knows")
def test_a_run_that_never_settles_is_plain_fine_tuning(tmp_path, caplog):
    plain = make_trainer(tmp_path / "sft", self_prob=0.0, lean_loss=True)
    auto = make_trainer(tmp_path / "auto", self_prob="auto")
    found = asked(auto)
    for trainer in (plain, auto):
        trainer.train()
    assert not found
    assert torch.equal(weights(auto.model), weights(plain.model))
    assert not any(entry["passes"] or entry["self_prob"] for entry in logged(auto))
    assert caplog.text.count("nothing was mixed, as the loss of 4 steps has not settled") == 1
    assert not any(entry["context_seconds"] for entry in logged(auto, "context_seconds"))


@pytest.mark.usefixtures("knows")
@pytest.mark.parametrize(("max_steps", "told"), [(64, 1), (65, 0)])
def test_a_run_too_short_to_settle_is_told_when_it_begins(tmp_path, caplog, max_steps, told):
    prob = make_trainer(tmp_path, **AUTO)._self_prob
    prob.on_train_begin(None, TrainerState(max_steps=max_steps), TrainerControl())
    assert caplog.text.count("give self_prob a number (--self-prob 0.1)") == told
    for steps in range(1, max_steps):  # losses stand still at 0
        prob._learn(steps, max_steps)
        assert caplog.text.count("no contexts will be mixed") == told
    assert (prob.at(max_steps - 1, max_steps) > 0) != told  # of the last step


def test_a_loss_that_overflows_is_not_that_of_guessing(tmp_path):
    """As those of fp16's first steps, which its scaler leaves out."""
    prob = make_trainer(tmp_path, **AUTO)._self_prob
    for loss in (math.inf, 1.0, math.inf, 1.0):
        prob._loss = loss
        prob._learn(1, 1000)
    assert prob.at(4, 1000) == 0


def test_of_a_long_run_not_every_step_is_looked_at(tmp_path, monkeypatch):
    """As a look reads the losses of all steps so far."""
    looks = []
    monkeypatch.setattr(self_prob, "settled", lambda losses, least: looks.append(len(losses)))
    prob = make_trainer(tmp_path, **AUTO)._self_prob
    for steps in range(1, 10_001):
        prob._learn(steps, 10_000)
    assert looks[:512] == [*range(1, 513)]
    assert len(looks) < 2000
    assert max(after / one for one, after in pairwise(looks[64:])) < 1.02


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def resumed_equals_whole(folder, step, how=AUTO, **options):
    """A run that is broken off after ``step``, in the middle of an interval of the log, and resumed."""
    options = {**how, "data": EASY, "max_steps": 8, "logging_steps": 4, "report_to": [], **options}
    whole = make_trainer(folder / "whole", **options)
    whole.train()
    options |= {"save_strategy": "steps", "save_steps": step}
    stopped = make_trainer(folder / "run", **options)
    stopped.add_callback(Stop(step))
    stopped.train()
    resumed = make_trainer(folder / "run", model=tiny_model("llama", seed=9), **options)
    found = asked(resumed)
    resumed.train(resume_from_checkpoint=str(folder / "run" / f"checkpoint-{step}"))
    assert torch.equal(weights(resumed.model), weights(whole.model))
    if whole.is_world_process_zero():  # which writes the log of all
        assert logged(resumed) == logged(whole)
    return found


@pytest.mark.usefixtures("knows")
@pytest.mark.parametrize(
    ("step", "options"),
    [
        (5, {}),
        (5, {"how": FALLING}),
        pytest.param(2, {}, marks=pytest.mark.slow),
        pytest.param(6, {"context_micro_batches": 1, "gradient_accumulation_steps": 4}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.one_case
def test_a_resumed_run_is_the_unbroken_one(tmp_path, monkeypatch, step, options):
    monkeypatch.setattr(self_prob, "settled", lambda losses, least: len(losses) == 4)
    found = resumed_equals_whole(tmp_path, step, **options)
    assert len({*found}) > 1


def test_a_second_run_begins_anew(tmp_path):
    trainer = make_trainer(tmp_path, **AUTO, self_prob_warmup=0, max_steps=2)
    found = asked(trainer)
    trainer.train()
    trainer.train()
    assert found[0] == found[2] == 0.3


class Break(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise InterruptedError


def test_a_run_after_one_that_was_broken_off_counts_its_own_steps_only(tmp_path):
    trainer = make_trainer(tmp_path, **AUTO, self_prob_warmup=2, max_steps=4, logging_steps=2)
    trainer.add_callback(Break())
    with pytest.raises(InterruptedError):
        trainer.train()
    trainer.remove_callback(Break)
    trainer.train()
    first = logged(trainer, "self_prob", "self_share", "differing_share", "passes", "computed_per_token")[0]
    assert not any(first.values())


@pytest.mark.parametrize("number", [np.float32, torch.tensor])
@pytest.mark.one_case
def test_numbers_of_other_kinds(tmp_path, number):
    """They are none that JSON knows, in which checkpoints have what was counted."""
    saved = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    auto = {"difference_target": number(0.25), "self_prob_cap": number(0.5), "self_prob_warmup": 0}
    expected = make_trainer(tmp_path / "a", self_prob=0.25, **saved)
    scheduled = make_trainer(
        tmp_path / "b", trainer=partial(BSSTrainer, schedule=lambda start, end, progress: number(0.25)), **saved
    )
    followed = make_trainer(tmp_path / "c", self_prob="auto", **auto, max_steps=1, save_strategy="epoch")
    for trainer in (expected, scheduled, followed):
        trainer.train()
    assert logged(scheduled) == logged(expected)
    assert logged(followed, "self_prob", "self_share") == logged(expected, "self_prob", "self_share")[:1]


def test_a_callback_may_have_p_follow_the_steps_from_now_on(tmp_path):
    class Follow(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            args.self_prob = "auto"

    trainer = make_trainer(tmp_path, data=EASY, max_steps=4)
    trainer.add_callback(Follow())
    found = asked(trainer)
    trainer.train()
    assert found[0] == 0.5
    assert all(0 < p < 0.1 for p in found[1:])


def test_corrections(tmp_path):
    trainer = make_rac_trainer(tmp_path, **AUTO, self_prob_warmup=1, max_steps=6, learning_rate=1e-2)
    found = asked(trainer)
    trainer.train()
    assert [entry["self_prob"] for entry in logged(trainer)] == [0.0, *found]
    assert found[0] == 0.3
    assert len({*found}) > 1


def test_stored_contexts_are_trained_on_as_they_are(tmp_path):
    trainer = make_bash_trainer(tmp_path, self_prob="auto", max_steps=2)
    trainer.train()
    assert all("self_prob" not in entry and entry["differing_share"] > 0.4 for entry in logged(trainer))


# Checkpoints


def checkpoint(folder, **options) -> Path:
    options = {**AUTO, "self_prob_warmup": 0, "max_steps": 2, "save_strategy": "steps", "save_steps": 2, **options}
    make_trainer(folder, **options).train()
    return folder / "checkpoint-2"


def resume(folder, found, **options):
    make_trainer(folder, **{**AUTO, "self_prob_warmup": 0, "max_steps": 3, **options}).train(
        resume_from_checkpoint=str(found)
    )


def test_a_checkpoint_without_what_was_counted(tmp_path, caplog):
    found = checkpoint(tmp_path)
    (found / FILE).unlink()
    with pytest.raises(ResumeError, match=f"checkpoint-2 can't be continued from, as {FILE} is missing"):
        resume(tmp_path, found)
    (found / "selfgen.json").unlink()  # as of another program
    resume(tmp_path, found)
    assert "counted from this step on" in caplog.text


@pytest.mark.parametrize(
    ("content", "fault"),
    [(None, "is missing"), ('{"los', "is broken"), ("[]", "is no JSON object"), ("{}", "lacks losses")],
)
@pytest.mark.one_case
def test_a_checkpoint_whose_counts_are_broken_is_passed_over(tmp_path, caplog, content, fault):
    found = checkpoint(tmp_path, save_steps=1)
    (found / FILE).unlink() if content is None else (found / FILE).write_text(content)
    caplog.clear()
    resume(tmp_path, "last")
    assert f"checkpoint-2 is passed over, as {FILE} {fault}" in caplog.text
    assert f"goes on from {tmp_path / 'checkpoint-1'}" in caplog.text


def test_a_checkpoint_with_another_target_is_refused(tmp_path):
    found = checkpoint(tmp_path)
    for change in ({"difference_target": 0.1}, {"self_prob_cap": 0.5}, {"self_prob_warmup": 1}):
        with pytest.raises(ResumeError, match=next(iter(change))):
            resume(tmp_path, found, **change)


def test_a_checkpoint_with_a_number_goes_on_with_it(tmp_path):
    """Also one of an earlier version, which has no file and no new names."""
    number = {name: config(tmp_path, self_prob=0.5).__dict__[name] for name in AUTO} | {"self_prob_warmup": None}
    found = checkpoint(tmp_path, **number)
    assert not (found / FILE).exists()
    settings = json.loads((found / "selfgen.json").read_text())
    assert settings["self_prob_warmup"] == 0.0
    for name in ("difference_target", "self_prob_cap"):
        del settings[name]
    (found / "selfgen.json").write_text(json.dumps(settings))
    resume(tmp_path, found, **number)
    with pytest.raises(ResumeError, match=r"self_prob was 0\.5, is 'auto'"):
        resume(tmp_path, found)


# Several processes


def _resume_in_ranks(rank, folder):
    self_prob.settled = lambda losses, least: len(losses) == 3
    found = resumed_equals_whole(folder, 5, gradient_accumulation_steps=1)
    assert len({*found}) > 1
    assert len({*map(tuple, meet(say=found))}) == 1


@pytest.mark.slow
def test_a_resumed_run_of_two_processes(tmp_path):
    in_ranks(_resume_in_ranks, tmp_path)


def _compare_in_ranks(rank, folder):
    compare(rank, folder, ["auto"], 2)


@pytest.mark.slow
def test_two_processes(tmp_path):
    """They have one p, which is that of one process with the rows of both."""
    make_expected(tmp_path, ["auto"], 2)
    log = torch.load(tmp_path / "auto.pt")["log"]
    assert len({entry["self_prob"] for entry in log}) > 1
    in_ranks(_compare_in_ranks, tmp_path)


# Options


def test_what_is_used_where_nothing_is_given(tmp_path):
    """A number is the paper's p, throughout; and the arguments that a run was made with give the same one again."""
    plain = {"use_cpu": True, "report_to": []}
    names = ("self_prob", "self_prob_schedule", "warm_up", "sampling_temperature")
    p, temperature = RECIPE["self_prob"], RECIPE["sampling_temperature"]

    def used(method=BSSConfig, **given):
        found = method(str(tmp_path), **plain, **given)
        return tuple(getattr(found, name) for name in names), found

    recipe, found = used()
    assert recipe == tuple(RECIPE.values())
    assert used(**{name: getattr(found, name) for name in RECIPE})[0] == recipe
    assert used(self_prob=0.3)[0] == (0.3, "constant", 0.0, 1.0)
    assert used(self_prob="auto")[0] == ("auto", "constant", "settled", 1.0)
    assert used(self_prob=p, self_prob_schedule="disagreement")[0] == (p, "disagreement", 0.0, 1.0)
    assert used(self_prob_schedule="disagreement")[0] == recipe
    assert used(self_prob_warmup=3)[0] == (p, "disagreement", 3, temperature)
    assert used(sampling_temperature=1.0)[0] == (p, "disagreement", "settled", 1.0)
    assert used(sampling_temperature=0.0)[0] == (p, "disagreement", "settled", 0.0)
    assert used(self_prob=0.3, sampling_temperature=0.5)[0] == (0.3, "constant", 0.0, 0.5)
    assert used(self_prob_schedule="linear")[0] == (GENTLE, "linear", 0.0, 1.0)
    assert used(self_prob_schedule="constant")[0] == (GENTLE, "constant", 0.0, 1.0)
    assert used(RACConfig)[0] == (0.0, "constant", 0.0, 1.0)
    assert used(RACConfig, sampling_temperature=0.4)[0] == (0.0, "constant", 0.0, 0.4)


def test_contexts_of_the_default_are_sampled_at_its_temperature(tmp_path):
    """And those that are made beforehand at 1, if no other is given."""
    given = {"use_cpu": True, "report_to": [], "output_dir": str(tmp_path)}
    for options, temperature in (({}, RECIPE["sampling_temperature"]), ({"self_prob": 0.3}, 1.0)):
        found = BSSConfig(**given, **options)
        assert found.generator(tiny_model("llama")).temperature == temperature
        assert with_fixed_self_prob(found).generator(tiny_model("llama")).temperature == 1.0
    cold = with_fixed_self_prob(BSSConfig(**given, sampling_temperature=0.2))
    assert cold.generator(tiny_model("llama")).temperature == 0.2


def test_none_is_the_default_of_the_method(tmp_path):
    plain = {"use_cpu": True, "report_to": []}
    for method in (BSSConfig, RACConfig):
        given, missing = method(str(tmp_path), **plain, self_prob=None), method(str(tmp_path), **plain)
        for name in ("self_prob", "self_prob_schedule", "warm_up", "follows_steps"):
            assert getattr(given, name) == getattr(missing, name)
    assert missing.self_prob == 0.0


@pytest.mark.parametrize("how", [FALLING, FALLING | {"self_prob_warmup": "settled"}, {"self_prob_warmup": "settled"}])
def test_where_p_is_zero_nothing_is_said_of_mixing(tmp_path, caplog, how):
    caplog.set_level("INFO", logger="selfgen")
    trainer = make_trainer(tmp_path, **{**how, "self_prob": 0.0}, max_steps=3)
    trainer.train()
    assert not any(entry["self_prob"] for entry in logged(trainer))
    assert "mixed" not in caplog.text


def test_the_parser_of_transformers_takes_numbers_and_words(tmp_path):
    def parsed(*given):
        given = ["--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none", *given]
        return HfArgumentParser(BSSConfig).parse_args_into_dataclasses(given)[0]

    assert parsed().self_prob_schedule == "disagreement"
    number = parsed("--self_prob", "0.1", "--self_prob_warmup", "20")
    assert (number.self_prob, number.warm_up) == (0.1, 20.0)
    words = parsed("--self_prob", "auto", "--self_prob_warmup", "settled")
    assert (words.self_prob, words.warm_up) == ("auto", "settled")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"self_prob": "half"}, "self_prob is 'half'; accepted: a number, or auto"),
        ({"self_prob_warmup": "late"}, "self_prob_warmup is 'late'; accepted: a number, or settled"),
        ({"self_prob": "25%"}, "self_prob is '25%'; accepted: a number, or auto"),
        ({"self_prob": True}, "self_prob is True; accepted: a number, or auto"),
        ({"self_prob_warmup": True}, "self_prob_warmup is True; accepted: a number, or settled"),
        ({"self_prob": "nan"}, "self_prob is nan; give a number"),
        ({"self_prob": "auto", "self_prob_cap": "auto"}, "self_prob_cap is 'auto'; accepted: a number"),
        ({"self_prob_start": "auto"}, "self_prob_start is 'auto'; accepted: a number"),
        ({"self_prob": "auto", "difference_target": "2%"}, "difference_target is '2%'; accepted: a number"),
        ({"difference_target": 0.1}, r"difference_target goes with self_prob=auto, but self_prob is 0\.5"),
        ({"self_prob_cap": 0.1}, "self_prob_cap goes with self_prob=auto"),
        ({"self_prob": "auto", "difference_target": 0.0}, r"difference_target is 0\.0; it must be above 0"),
        ({"self_prob": "auto", "difference_target": 1.5}, "at most 1"),
        ({"self_prob": "auto", "self_prob_cap": 1.5}, r"self_prob_cap is 1\.5"),
        ({"self_prob": "auto", "self_prob_schedule": "linear"}, "schedule is 'linear', but self_prob is auto"),
        ({"self_prob": "auto", "self_prob_start": 0.1}, r"start is 0\.1, but self_prob is auto"),
        ({"self_prob_warmup": "settled", "self_prob_schedule": "cosine"}, "but self_prob_warmup is settled"),
        (
            {"self_prob": "auto", "self_prob_schedule": "disagreement"},
            "schedule is 'disagreement', but self_prob is auto",
        ),
        ({**FALLING, "self_prob_start": 0.1}, r"start is 0\.1, but self_prob_schedule is disagreement"),
        ({"self_prob": "auto", "self_prob_warmup": math.nan}, "self_prob_warmup is nan"),
    ],
)
def test_what_does_not_go_together(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **change)


def test_a_function_is_no_schedule_of_auto(tmp_path):
    trainer = make_trainer(tmp_path, self_prob="auto")
    with pytest.raises(ValueError, match="schedule is given, but self_prob is auto"):
        type(trainer)(
            trainer.model,
            trainer.args,
            train_dataset=rows(),
            processing_class=trainer.processing_class,
            schedule=lambda start, end, progress: end,
        )
    trainer.schedule = lambda start, end, progress: end
    with pytest.raises(ValueError, match="schedule is given"):
        trainer.train()


def test_contexts_that_no_training_needs_have_a_number(tmp_path):
    with pytest.raises(ValueError, match=r"self_prob is auto, .* here nothing is trained: give a probability"):
        ContextArguments(str(tmp_path), self_prob="auto")


def test_what_auto_gives_is_not_known_beforehand(tmp_path):
    with pytest.raises(ValueError, match="not known beforehand: see self_prob in the log"):
        config(tmp_path, self_prob="auto").self_prob_at(0, 10)
    assert config(tmp_path, self_prob=0.3).warm_up == 0.0
    assert config(tmp_path, self_prob="auto").warm_up == "settled"
    assert config(tmp_path, self_prob="auto", self_prob_warmup=3).warm_up == 3
