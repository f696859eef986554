"""What only hardware shows of the engine: contexts, answers and training steps on a GPU, held against their oracles.

The ops alone are in kernels/test_gpu.py. TF32 is off, as is torch's default: fp32 means fp32.
"""

from __future__ import annotations

import pytest
import torch
from helpers.contexts import batch
from helpers.training import distance, gradients, make_rac_trainer, make_trainer, padded, rows, weights
from models import CONFIGS, tiny_model

from selfgen import ContextGenerator
from selfgen.context import Masks
from selfgen.training.reuse import reuse_passes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
FAMILIES = sorted(CONFIGS)


def contexts(generator, self_prob: float, method: str = "fixed_point", seed: int = 7):
    """(tokens, which are the model's own) of a batch."""
    prompts, references, sample_ids = batch()
    mixed = generator.contexts(prompts, references, self_prob, seed=seed, sample_ids=sample_ids, method=method)
    return torch.cat(mixed.tokens).cpu(), torch.cat(mixed.is_self).cpu()


def recordings(generator):
    return [replay for kind in generator._forward()._recorded.values() for replay in kind.replays.values()]


def assert_replays(generator):
    """But for gpt-oss, whose experts wait for the device: it runs as it is."""
    assert recordings(generator) or generator.model.config.model_type == "gpt_oss"


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_contexts_are_those_of_the_loop(family, cuda_graphs):
    model = tiny_model(family).cuda()
    for budget in (16, 64, 400):
        generator = ContextGenerator(model, token_budget=budget, balance=budget / 8, cuda_graphs=cuda_graphs)
        for seed, self_prob in enumerate((0.25, 1.0, 0.25, 0.5)):
            want, want_self = contexts(generator, self_prob, "sequential", seed)
            got, is_self = contexts(generator, self_prob, seed=seed)
            assert want_self.any()
            assert torch.equal(is_self, want_self)
            assert torch.equal(got, want)
        if cuda_graphs:
            assert_replays(generator)


@pytest.mark.parametrize("precision", ["fp32", "autocast"])
def test_recorded_passes_see_an_optimizers_step(precision):
    model = tiny_model("llama").cuda()
    generator, plain = (
        ContextGenerator(model, token_budget=100, balance=12.5, cuda_graphs=graphs) for graphs in (True, False)
    )

    def run(generator):
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "autocast"):
            return contexts(generator, 1.0)

    before = [run(generator) for _ in range(3)][-1]
    assert_replays(generator)
    old = recordings(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.0)
    after, plain = run(generator), run(plain)
    assert all(any(replay is one for one in recordings(generator)) for replay in old)
    assert not torch.equal(after[0], before[0])
    assert (after[0] != plain[0]).float().mean() <= (0 if precision == "fp32" else 0.5)


def test_every_pass_is_a_replay_from_the_second_generation_on():
    """Under another seed, with other rows, over what a training step still has."""
    model = tiny_model("llama").cuda()
    generator, plain = (
        ContextGenerator(model, token_budget=100, balance=12.5, cuda_graphs=graphs) for graphs in (True, False)
    )
    prompts, references, ids = batch()
    held = []
    for seed, count in enumerate((12, 12, 7, 12, 12)):
        how = {"seed": seed % 3, "sample_ids": ids[:count], "keep_hidden_states": True}
        got, want = (one.contexts(prompts[:count], references[:count], 0.5, **how) for one in (generator, plain))
        assert all(map(torch.equal, got.tokens, want.tokens))
        assert got.stats.captured + got.stats.replayed == got.stats.passes
        torch.testing.assert_close(got.hidden_states.states, want.hidden_states.states, rtol=1e-4, atol=1e-5)
        held.append((got.hidden_states, got.hidden_states.states.clone()))
    assert got.stats.replayed == got.stats.passes
    assert all(torch.equal(kept.states, states) for kept, states in held)


def test_the_invariant_loop_is_one_replay_per_token():
    model = tiny_model("llama", dtype=torch.bfloat16).cuda()
    generator = ContextGenerator(model, token_budget=64, balance=8, precision="invariant")
    prompts, references, ids = batch()
    for seed in range(3):
        how = {"seed": seed, "sample_ids": ids}
        loop = generator.contexts(prompts, references, 0.5, **how, method="sequential")
        mixed = generator.contexts(prompts, references, 0.5, **how)
        assert all(map(torch.equal, mixed.tokens, loop.tokens))
        assert (loop.stats.captured, loop.stats.replayed) == (seed == 0, loop.stats.passes - (seed == 0))


@pytest.mark.parametrize("family", FAMILIES)
def test_contexts_are_those_of_the_cpu(family):
    model = tiny_model(family)
    want, want_self = contexts(ContextGenerator(model, token_budget=64, balance=8), 0.5)
    got, is_self = contexts(ContextGenerator(model.cuda(), token_budget=64, balance=8), 0.5)
    assert torch.equal(is_self, want_self)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    "masks",
    [
        Masks("span", span_length=3),
        Masks("prefix"),
        Masks("sequence"),
        Masks(curve="rising"),
        Masks(min_reference_prob=0.01),
    ],
    ids=str,
)
def test_contexts_under_every_mask_are_those_of_the_loop(masks):
    generator = ContextGenerator(tiny_model("llama").cuda(), token_budget=64, balance=8, masks=masks)
    want = contexts(generator, 0.5, "sequential")
    assert want[1].any()
    for _ in range(3):
        assert all(map(torch.equal, contexts(generator, 0.5), want))


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_bf16_contexts_are_the_loops_but_for_near_ties(family):
    """A tie that turns changes all behind it in its row, so rows are counted."""
    generator = ContextGenerator(tiny_model(family, dtype=torch.bfloat16).cuda(), token_budget=64, balance=8)
    lengths = [len(reference) for reference in batch()[1]]
    want = contexts(generator, 0.25, "sequential")
    got = [contexts(generator, 0.25) for _ in range(3)][-1]
    assert_replays(generator)
    assert torch.equal(got[1], want[1])
    differing = sum(not torch.equal(a, b) for a, b in zip(got[0].split(lengths), want[0].split(lengths), strict=True))
    assert differing <= len(lengths) // 3


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_greedy_answers_are_those_of_transformers(family):
    model = tiny_model(family).cuda()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    prompts = batch()[0]
    generator = ContextGenerator(model, temperature=0.0)
    answers = generator.answer(prompts, max_new_tokens=20, batch_size=5, eos_token_ids=[]).tokens
    assert_replays(generator)
    for prompt, answer in zip(prompts, answers, strict=True):
        alone = prompt[None].cuda()
        want = model.generate(alone, attention_mask=torch.ones_like(alone), max_new_tokens=20, do_sample=False)
        assert torch.equal(answer, want[0, len(prompt) :])


@pytest.mark.parametrize("family", FAMILIES)
def test_reuse_gives_loss_and_gradients_of_the_ordinary_step(family):
    model, data = tiny_model(family).cuda(), rows(5)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):  # GPT-2's default
            module.p = 0.0
    columns = [list(data[name]) for name in ("prompt_ids", "answer_ids")]
    generator = ContextGenerator(model, token_budget=16, balance=2)
    for seed in range(4):
        how = {"seed": seed, "sample_ids": data["sample_id"], "keep_hidden_states": True}
        mixed = generator.contexts(*columns, 0.5, **how)
    assert_replays(generator)
    inputs, slots = padded(model, data, mixed)
    inputs = {name: values.cuda() for name, values in inputs.items()}
    model.train()
    ordinary = model(**inputs).loss
    ordinary.backward()
    want = gradients(model)
    with reuse_passes(mixed.hidden_states, slots.cuda()):
        reused = model(**inputs).loss
    reused.backward()
    torch.testing.assert_close(reused, ordinary, rtol=1e-5, atol=0)
    assert distance(gradients(model), want) <= 1e-4


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("lean", [False, True])
def test_training_with_and_without_reuse_is_the_same(tmp_path, caplog, bf16, lean):
    """Off by far less than what the steps change; by more in bf16, where Adam makes rounding as large as a gradient."""

    def trained(reuse):
        how = {"use_cpu": False, "bf16": bf16, "lean_loss": lean, "reuse_passes": reuse, "learning_rate": 1e-3}
        trainer = make_trainer(tmp_path, **how)
        assert trainer.model.device.type == "cuda"
        before = weights(trainer.model).clone()
        trainer.train()
        return weights(trainer.model) - before

    got, want = trained(True), trained(False)
    assert (got - want).norm() <= (0.3 if bf16 else 0.01) * want.norm()
    assert "without CUDA graphs" not in caplog.text


def test_rac_trains_on_own_answers(tmp_path):
    trainer = make_rac_trainer(tmp_path, use_cpu=False, bf16=True, learning_rate=1e-2)
    before = weights(trainer.model)
    trainer.train()
    assert trainer.model.device.type == "cuda"
    assert not torch.equal(weights(trainer.model).cpu(), before.cpu())
