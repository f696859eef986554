"""Models of people's own code that do odd things: each is computed as its own forward does, or refused with the cause.

The measure is the model's own forward over each prefix alone (``zoo/definition.py``).
"""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from models import BASE, VOCAB
from test_reuse_training import Gradients, distance, run, trainer_for
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers.models.llama.modeling_llama import LlamaMLP
from zoo.definition import SEED, contexts, rows, wrong_tokens

from selfgen import ContextGenerator, UnsupportedModelError
from selfgen.context import verification

METHODS = ("fixed_point", "sequential")


def make(kind, **changes):
    torch.manual_seed(0)
    return kind(LlamaConfig(**{**BASE, **changes})).eval()


def wrong(model, method, lengths=((40, 60), (5, 30), (3, 4))) -> int:
    """How many tokens of contexts are wrong."""
    prompts, references = rows(lengths)
    mixed = contexts(model, prompts, references, method=method)
    return wrong_tokens(model, *rows(lengths), mixed)


class HandsOn(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("method", METHODS)
def test_a_forward_that_hands_on_whatever_it_gets(method):
    assert wrong(make(HandsOn), method) == 0


class WritesIntoIds(HandsOn):
    def forward(self, input_ids=None, **kwargs):
        input_ids[input_ids >= 100] = 7
        return super().forward(input_ids=input_ids, **kwargs)


@pytest.mark.parametrize("method", METHODS)
def test_a_forward_that_writes_into_its_input(method):
    """The contexts have the tokens that were sampled."""
    model, (prompts, references) = make(WritesIntoIds), rows([(10, 40), (3, 5)])
    mixed = contexts(model, prompts, references, method=method)
    tokens = torch.cat(mixed.tokens)
    assert (tokens >= 100).any()
    assert torch.equal(tokens[~torch.cat(mixed.is_self)], torch.cat(references)[~torch.cat(mixed.is_self)])
    assert wrong(model, method) == 0


class ByLength(HandsOn):
    """Its logits are larger in rows of more than 97 tokens, of which its configuration says nothing."""

    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids=input_ids, **kwargs)
        if input_ids.shape[1] > 97:
            output.logits = output.logits * 3
        return output


def test_a_number_between_the_probe_and_the_longest_row():
    model = make(ByLength)
    with pytest.raises(UnsupportedModelError, match="over the ragged cache"):
        wrong(model, "fixed_point", [(60, 40)])
    assert wrong(model, "sequential", [(60, 40)]) == 0


class LastIsSpecial(HandsOn):
    def forward(self, input_ids=None, logits_to_keep=0, **kwargs):
        output = super().forward(input_ids=input_ids, **kwargs)
        output.logits = torch.cat([output.logits[:, :-1], 2 * output.logits[:, -1:]], dim=1)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        output.logits = output.logits[:, kept]
        return output


class ByParity(HandsOn):
    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids=input_ids, **kwargs)
        output.logits = output.logits * (1.0 + input_ids.shape[1] % 2)
        return output


@pytest.mark.parametrize("kind", [LastIsSpecial, ByParity])
def test_what_a_whole_row_does_not_show_of_its_prefixes(kind):
    model = make(kind)
    with pytest.raises(UnsupportedModelError, match="over the ragged cache"):
        wrong(model, "fixed_point")
    assert wrong(model, "sequential") == 0
    assert wrong_answers(model) == 0


class PenalizesFirst(HandsOn):
    """It says its first token less often, which is padding in a row that is padded."""

    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids=input_ids, **kwargs)
        penalty = torch.zeros(len(input_ids), 1, VOCAB).scatter_(2, input_ids[:, :1, None], 3.0)
        output.logits = output.logits - penalty
        return output


def test_answers_whose_other_tokens_have_other_logits():
    assert wrong_answers(make(PenalizesFirst)) == 0


def wrong_answers(model) -> int:
    prompts, _ = rows([(40, 1), (5, 1), (3, 1)])
    answers = ContextGenerator(model).answer(prompts, max_new_tokens=20, seed=SEED, eos_token_ids=[])
    definition = ContextGenerator(model).contexts(
        prompts, answers.tokens, 1.0, seed=SEED, sample_ids=range(3), method="sequential"
    )
    return sum(int((a != b).sum()) for a, b in zip(answers.tokens, definition.tokens, strict=True))


class KeepsState(HandsOn):
    calls = 0

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        self.calls += 1
        output.logits = output.logits * (1 + self.calls % 5)
        return output


class IsRandom(HandsOn):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + 0.3 * torch.randn_like(output.logits)
        return output


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [KeepsState, IsRandom])
def test_something_else_each_time_is_not_looking_ahead(kind, method):
    with pytest.raises(UnsupportedModelError, match="something else each time"):
        wrong(make(kind), method)


class KeepsAll(HandsOn):
    def forward(self, input_ids=None, logits_to_keep=0, **kwargs):
        return super().forward(input_ids=input_ids, **kwargs)


def test_a_model_that_gives_all_logits():
    model = make(KeepsAll)
    with pytest.raises(UnsupportedModelError, match="ignores logits_to_keep"):
        wrong(model, "fixed_point")
    assert wrong(model, "sequential") == 0
    assert wrong_answers(model) == 0
    long = [[5] * 200]
    mixed = ContextGenerator(model).contexts(long, [[6] * 56], 0.5, seed=0, sample_ids=[0], method="sequential")
    assert mixed.stats.self_tokens


@pytest.mark.parametrize("method", METHODS)
def test_ids_that_the_head_has_and_the_embedding_has_not(method):
    model = make(LlamaForCausalLM)
    model.lm_head = torch.nn.Linear(32, VOCAB + 40, bias=False)
    prompts, references = rows([(4, 60)])
    mixed = contexts(model, prompts, references, 1.0, method=method)
    assert int(mixed.tokens[0].max()) < VOCAB
    assert ContextGenerator(model).vocab_size == VOCAB


class Scales(LlamaMLP):
    """It multiplies by a weight of the model, which is no part of its layer."""

    box: ClassVar[list] = []

    def forward(self, x):
        return super().forward(x) * (1 + self.box[0])


class Injects(LlamaMLP):
    """It adds what entered the first layer."""

    box: ClassVar[dict] = {}

    def forward(self, x):
        return super().forward(x) + 0.3 * self.box["embedded"]


class Remembers(LlamaMLP):
    """The second one adds what the first one computed."""

    box: ClassVar[dict] = {}

    def forward(self, x):
        output = super().forward(x)
        if not self.is_first:
            return output + self.box["output"]
        self.box["output"] = output
        return output


def with_mlps(kind):
    model = make(LlamaForCausalLM)
    for index, layer in enumerate(model.model.layers):
        layer.mlp.__class__ = kind
        layer.mlp.is_first = index == 0
    if kind is Scales:
        model.scale = torch.nn.Parameter(torch.tensor(0.3))
        Scales.box[:] = [model.scale]
        model.model.norm.register_forward_hook(lambda _module, _args, output: output * model.scale)
    embed = model.model.embed_tokens
    embed.register_forward_hook(lambda _module, _args, output: Injects.box.update(embedded=output))
    return model


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("kind", [Scales, Injects, Remembers])
@pytest.mark.each_value
def test_layers_that_share_more_than_hidden_states_are_not_reused(tmp_path, caplog, kind, batch_size):
    """The losses are the same, but a layer that is computed by itself gives no gradient to what it shares."""
    steps = []
    for reuse in (True, False):
        trainer = trainer_for(tmp_path, lambda: with_mlps(kind), reuse_passes=reuse, max_steps=2, learning_rate=1e-2,
                              per_device_train_batch_size=batch_size)  # fmt: skip
        gradients = Gradients()
        trainer.add_callback(gradients)
        trainer.train()
        steps.append(gradients.steps)
        assert not trainer._reuse.on
    assert "passes are not reused" in caplog.text
    assert distance(*steps) <= 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_is_changed_between_calls_is_looked_at_again(method, monkeypatch):
    model = make(LlamaForCausalLM)
    generator = ContextGenerator(model, token_budget=16, balance=2)
    prompts, references = rows([(10, 30)])
    tried = []
    monkeypatch.setattr(verification, "_check_causal", counting(verification._check_causal, tried))
    monkeypatch.setattr(verification, "_compare_ragged", counting(verification._compare_ragged, tried))

    def mixed():
        return generator.contexts(prompts, references, 0.5, seed=SEED, sample_ids=[0], method=method)

    for _ in range(2):
        mixed()
        model.train()
    assert len(tried) == 1
    hook = model.model.layers[0].register_forward_hook(lambda _module, _args, output: output.flip(1))
    with pytest.raises(UnsupportedModelError, match="looks ahead"):
        mixed()
    hook.remove()
    model.eval()
    assert wrong_tokens(model, prompts, references, mixed()) == 0
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(UnsupportedModelError, match="looks ahead"):
        mixed()


def counting(function, calls):
    def counted(*args):
        calls.append(args)
        return function(*args)

    return counted


class LooksAheadInTraining(HandsOn):
    """Each position gets a part of the next one's embedding."""

    def forward(self, input_ids=None, **kwargs):
        if not self.training:
            return super().forward(input_ids=input_ids, **kwargs)
        embedded = self.model.embed_tokens(input_ids)
        return super().forward(inputs_embeds=embedded + embedded.roll(-1, 1), **kwargs)


class CountsInTraining(HandsOn):
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, *args, **kwargs):
        self.calls += self.training
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * (1 + self.calls)
        return output


@pytest.mark.parametrize(("self_prob", "method"), [(0.0, "fixed_point"), (0.5, "fixed_point"), (0.5, "sequential")])
def test_looking_ahead_in_training_alone(tmp_path, self_prob, method):
    with pytest.raises(UnsupportedModelError, match="looks ahead in training mode"):
        trainer_for(tmp_path, lambda: make(LooksAheadInTraining), self_prob=self_prob, context_method=method)
    model = make(CountsInTraining)
    before = torch.get_rng_state()
    ContextGenerator(model).check_causal(in_training=True)
    assert model.calls == 0
    assert not model.training
    assert torch.equal(before, torch.get_rng_state())


class SwapsAdapters(TrainerCallback):
    def on_step_begin(self, args, state, control, model, **kwargs):
        model.set_adapter("ab"[state.global_step % 2])


def with_two_adapters():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make(LlamaForCausalLM), peft.LoraConfig(target_modules=["q_proj"]), adapter_name="a")
    model.add_adapter("b", peft.LoraConfig(target_modules=["down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_adapters_that_a_callback_swaps_as_a_step_begins(tmp_path):
    """The contexts, and the passes that are reused, are those of the adapter that the step trains."""
    results = []
    for reuse in (True, False):
        trainer = trainer_for(tmp_path, with_two_adapters, reuse_passes=reuse, max_steps=4)
        trainer.add_callback(SwapsAdapters())
        results.append(run(trainer))
    (losses, gradients), (want_losses, want_gradients) = results
    torch.testing.assert_close(losses, want_losses, rtol=1e-5, atol=0)
    assert distance(gradients, want_gradients) <= 1e-5
