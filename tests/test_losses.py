"""The loss of a training step: each option against its formula, written out; lean and plain alike."""

from __future__ import annotations

from functools import partial
from inspect import signature

import pytest
import torch
import torch.nn.functional as F
from helpers.training import Tokenizer, config, losses_of, make_trainer, rows
from models import VOCAB, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import BartConfig, BartForCausalLM
from transformers.trainer_pt_utils import LabelSmoother

from selfgen import BSSTrainer
from selfgen.data import Collator
from selfgen.training import losses
from selfgen.training.losses import AnswerLoss, Compared, why_not_lean
from selfgen.training.mixing import step_seed
from selfgen_kernels.backends.reference.philox import MASK, random_words

llama = partial(tiny_model, "llama")


def batch():
    columns = Collator(0)([*rows(4)])
    return {name: columns[name] for name in ("input_ids", "attention_mask", "labels")}


def log_probs(model, inputs):
    """[N, V] at the learned positions, with their targets [N] and rows [N]."""
    labels = inputs["labels"][:, 1:]
    learned = labels != -100
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    return logits[learned].log_softmax(-1), labels[learned], learned.nonzero()[:, 0]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 0.0, 0.5]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kl_weight", [0.0, 0.7])
@pytest.mark.parametrize("items", [None, 31])
@pytest.mark.each_pair
def test_is_its_formula(lean, weights, smoothing, kl_weight, items):
    model, frozen, inputs = llama(), llama(seed=1), batch()
    loss = AnswerLoss(model, label_smoothing=smoothing, kl_weight=kl_weight, frozen=frozen, lean=lean)
    assert loss.lean == lean
    states = loss.states_of(frozen, inputs) if kl_weight else None
    row_weights = None if weights is None else torch.tensor(weights)
    more = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    with loss.inside(compared=Compared(row_weights, states)):
        found = model(**inputs, **more).loss
    found_gradient = gradients(model, found)

    own, targets, row = log_probs(model, inputs)
    with torch.no_grad():
        other, _, _ = log_probs(frozen, inputs)
    per_token = -(1 - smoothing) * own.gather(1, targets[:, None])[:, 0] - smoothing * own.mean(1)
    per_token = per_token + kl_weight * (own.exp() * (own - other)).sum(1)
    weight = torch.ones(len(row)) if weights is None else torch.tensor(weights)[row]
    want = (weight * per_token).sum() / (len(row) if items is None else items)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found_gradient, gradients(model, want), rtol=1e-4, atol=1e-5)


def test_the_model_is_left_as_it_was():
    model, inputs = llama(), batch()
    want = model(**inputs)
    with AnswerLoss(model).inside():
        assert model(**inputs).logits.shape[-1] == model.config.hidden_size  # no logits
    again = model(**inputs)
    assert torch.equal(again.loss, want.loss)
    assert torch.equal(again.logits, want.logits)
    assert "_loss_function" not in vars(model)


@pytest.mark.parametrize(("family", "lean"), [("llama", True), ("gpt2", True), ("gemma2", False), ("phi3", True)])
def test_lean_where_logits_are_the_heads_product(family, lean):
    """Gemma 2 caps its logits."""
    assert (why_not_lean(tiny_model(family)) is None) == lean


def test_a_cap_that_small_logits_do_not_show():
    model = tiny_model("gemma2")
    model.config.final_logit_softcapping = 1e4
    assert "does more to its logits" in why_not_lean(model)


def test_a_model_that_uses_what_it_takes_for_logits():
    """Bart's loss is its own: no lean loss, and no crash."""
    config = BartConfig(
        vocab_size=VOCAB, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16,
        max_position_embeddings=64,
    )  # fmt: skip
    assert why_not_lean(BartForCausalLM(config).eval())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_half_precision_sums_in_fp32(smoothing):
    """The loss over many positions is that of the plain path."""
    torch.manual_seed(0)
    model = llama().bfloat16()
    states, targets = torch.randn(4000, 32, dtype=torch.bfloat16), torch.randint(0, VOCAB, (4000,))
    want = F.cross_entropy(model.lm_head(states).float(), targets, reduction="sum", label_smoothing=smoothing)
    found = AnswerLoss(model, label_smoothing=smoothing)._cross_entropy(states, targets)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_under_autocast_the_head_is_autocasts(smoothing):
    """As in the plain path; the head in fp32 would give another loss."""
    torch.manual_seed(0)
    model = llama()
    states, targets = torch.randn(4000, 32), torch.randint(0, VOCAB, (4000,))
    loss = AnswerLoss(model, label_smoothing=smoothing)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss._cross_entropy(states, targets)
        want = F.cross_entropy(model.lm_head(states).float(), targets, reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(found, want, rtol=1e-7, atol=0)
    assert abs(found - loss._cross_entropy(states, targets)) > 1e-6 * want


@pytest.mark.parametrize("lean", [True, False])
def test_evaluation_is_smoothed_as_the_trainers(tmp_path, lean):
    """Whatever the loss of the training: evaluations of different methods can be compared."""
    found = [
        make_trainer(tmp_path, label_smoothing_factor=0.3, self_prob=p, lean_loss=lean).evaluate(rows(8))["eval_loss"]
        for p in (0.5, 0.0)
    ]
    trainer = make_trainer(tmp_path, label_smoothing_factor=0.3, lean_loss=lean, learning_rate=0.0)
    trainer.train()
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert trainer.evaluate(rows(8))["eval_loss"] == pytest.approx(found[1], rel=1e-6)


def test_a_lean_loss_has_no_logits_to_return(tmp_path):
    """What a subclass of the user's would take for them is what enters the head."""

    class Own(BSSTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            assert outputs.logits.shape[-1] == VOCAB
            return (loss, outputs) if return_outputs else loss

    trainer = make_trainer(tmp_path, trainer=Own, max_steps=1)
    trainer.evaluate(rows(3))
    with pytest.raises(ValueError, match=r"the loss is lean, so that there are no logits .* give lean_loss=False"):
        trainer.train()
    make_trainer(tmp_path, trainer=Own, max_steps=1, lean_loss=False).train()


def test_a_loss_of_a_subclass_does_not_drop_what_is_asked_for(tmp_path):
    class Own(BSSTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            names = ("input_ids", "attention_mask", "labels")
            outputs = model(**{name: inputs[name] for name in names}, num_items_in_batch=num_items_in_batch)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    make_trainer(tmp_path, trainer=Own, max_steps=1).train()
    for name, value in {"kl_weight": 0.1, "target": "dft"}.items():
        trainer = make_trainer(tmp_path, trainer=Own, max_steps=1, **{name: value})
        with pytest.raises(ValueError, match=f"compute_loss of Own takes the place of the loss that {name} would"):
            trainer.train()


def test_a_model_with_a_loss_of_its_own():
    model = llama()
    with pytest.raises(ValueError, match="lean_loss"), AnswerLoss(model).inside():
        model(input_ids=batch()["input_ids"])


def test_logits_never_lie_in_memory_as_a_whole(monkeypatch):
    """The largest tensor that the loss makes is smaller than the logits of all learned positions would be."""
    model = tiny_model("llama")
    monkeypatch.setattr(losses, "_CHUNK_BYTES", 4 * VOCAB * 100)
    hidden = torch.randn(3000, 32, requires_grad=True)
    sizes = []
    loss = AnswerLoss(model)
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor))
            return result

    with Sizes():
        loss._cross_entropy(hidden, torch.randint(0, VOCAB, (3000,))).backward()
    assert max(sizes) <= max(100 * VOCAB, 3000 * 32)


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("change", [{}, {"label_smoothing_factor": 0.1}, {"kl_weight": 0.5}])
@pytest.mark.each_value
def test_lean_training_is_plain_training(tmp_path, reuse, change):
    counts = "num_items_in_batch" in signature(LabelSmoother.__call__).parameters
    if "label_smoothing_factor" in change and not counts:
        pytest.skip("this Trainer smooths without regard to gradient accumulation")
    runs = [
        losses_of(make_trainer(tmp_path, learning_rate=1e-3, reuse_passes=reuse, lean_loss=lean, **change))
        for lean in (True, False)
    ]
    for (lean, _), (plain, _) in zip(*runs, strict=True):
        torch.testing.assert_close(lean, plain, rtol=1e-4, atol=1e-6)


def test_kl_is_to_the_model_as_it_begins(tmp_path):
    """At a learning rate of 0 it is nothing; later it is what the formula says."""
    still = [
        [loss for loss, _ in losses_of(make_trainer(tmp_path, learning_rate=0.0, kl_weight=weight))]
        for weight in (0.0, 5.0)
    ]
    torch.testing.assert_close(*map(torch.stack, still), rtol=1e-5, atol=1e-6)
    trainer = make_trainer(tmp_path, kl_weight=5.0, gradient_accumulation_steps=1, max_steps=3)
    frozen = llama()
    (*_, (loss, inputs)) = losses_of(trainer)
    assert loss > 0
    frozen_weights, kept = frozen.state_dict(), trainer._answer_loss.frozen.state_dict()
    assert all(torch.equal(kept[name], weight) for name, weight in frozen_weights.items())
    assert inputs["input_ids"].shape[0] == 2


def test_kl_of_adapters_is_to_the_model_without_them(tmp_path):
    """No second model in memory; the adapters are on again for the step, and its forward may reuse passes."""
    adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    model = get_peft_model(llama(), adapters)
    trainer = make_trainer(tmp_path, model=model, kl_weight=2.0, learning_rate=0.0, max_steps=1)
    assert trainer._answer_loss.frozen is trainer.generator.model
    found = losses_of(trainer)
    assert trainer._reuse.on
    total, divergence, count = torch.zeros(()), torch.zeros(()), 0
    for _, inputs in found:
        with torch.no_grad():
            own, targets, _ = log_probs(model.eval(), inputs)
            other, _, _ = log_probs(llama(), inputs)
        divergence = divergence + (own.exp() * (own - other)).sum()
        total, count = total + F.nll_loss(own, targets, reduction="sum"), count + len(targets)
    assert divergence / count > 0.01
    want = (total + 2.0 * divergence) / count
    torch.testing.assert_close(sum(loss for loss, _ in found), want, rtol=1e-5, atol=1e-6)


def after_self(is_self, _):
    return [bool(is_self[:place].any()) for place in range(len(is_self))]


def after_switch(is_self, uniform):
    """By the definition of prefixes, from the row's uniform number."""
    length = len(is_self)
    places = [(place + 0.5) / length for place in range(length)]
    prefix = [uniform < 0.6 + 0.4 * (1 - 2 * place) for place in places]
    assert is_self.tolist() == prefix
    return [not one for one in prefix]


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize(
    ("options", "learned"),
    [
        ({"loss_on": "after_self", "self_prob": 0.2}, after_self),
        ({"loss_on": "after_switch", "self_prob": 0.6, "granularity": "prefix"}, after_switch),
    ],
    ids=["after_self", "after_switch"],
)
@pytest.mark.each_value
def test_only_a_part_is_learned(tmp_path, options, learned, lean):
    """Labels stay where the option says, and the loss is the mean over these."""
    trainer = make_trainer(tmp_path, learning_rate=0.0, max_steps=1, lean_loss=lean, **options)
    masks = {}
    generate = trainer.generator.contexts

    def recorded(*args, **kwargs):
        mixed = generate(*args, **kwargs)
        masks.update(zip(kwargs["sample_ids"], mixed.is_self, strict=True))
        return mixed

    trainer.generator.contexts = recorded
    found = losses_of(trainer)
    total, count, parts = torch.zeros(()), 0, []
    for _, inputs in found:
        for row in range(2):
            begin, length = (int(inputs[name][row]) for name in ("prompt_length", "answer_length"))
            labels = inputs["labels"][row, begin : begin + length]
            is_self = masks[int(inputs["sample_id"][row])]
            word = random_words(step_seed(42, 0), inputs["sample_id"][row, None], torch.zeros(1, dtype=int), 1, MASK)
            assert (labels != -100).tolist() == learned(is_self, int(word) / 2**32)
            parts.append(labels != -100)
        own, targets, _ = log_probs(llama(), inputs)
        total, count = total + F.nll_loss(own, targets, reduction="sum"), count + len(targets)
    assert 0 < count < torch.cat(parts).numel()
    torch.testing.assert_close(sum(loss for loss, _ in found), total / count, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.each_value
def test_rows_without_a_token_to_learn_cost_nothing(tmp_path, caplog, lean, bf16):
    """Some rows are self tokens to their ends: in a micro-batch of their own, and, in the last step, all of them."""
    options = {"granularity": "prefix", "loss_on": "after_switch", "lean_loss": lean, "bf16": bf16}
    step = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 2}
    schedule = {"self_prob": 1.0, "self_prob_start": 0.6, "self_prob_schedule": "linear"}
    trainer = make_trainer(tmp_path, **options, **step, **schedule)
    found = losses_of(trainer)
    learned = [int((inputs["labels"] != -100).sum()) for _, inputs in found]
    assert {bool(count) for count in learned[:4]} == {False, True}
    assert learned[4:] == [0] * 4
    for (loss, _), count in zip(found, learned, strict=True):
        assert (loss > 0) if count else (loss == 0)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["grad_norm"] > 0 for entry in logs] == [True, False]
    assert logs[1]["loss"] == 0
    assert caplog.text.count("learns no token") == 1
    assert "step 2 learns no token, as loss_on=after_switch finds none" in caplog.text


def test_a_step_without_a_token_to_learn_is_none_to_a_loss_of_the_user(tmp_path):
    """Which is not the library's, and divides by the number of learned tokens."""

    def own(outputs, labels, num_items_in_batch):
        logits, targets = outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return F.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch

    args = config(tmp_path, granularity="prefix", loss_on="after_switch", self_prob=1.0, max_steps=2)
    trainer = BSSTrainer(llama(), args, train_dataset=rows(), processing_class=Tokenizer(), compute_loss_func=own)
    assert [float(loss) for loss, _ in losses_of(trainer)] == [0.0] * 4


@pytest.mark.parametrize(
    "how", [{"loss_on": "after_self"}, {"loss_on": "after_switch", "granularity": "prefix"}], ids=str
)
def test_at_p_zero_everything_is_learned(tmp_path, how):
    found = losses_of(make_trainer(tmp_path, self_prob=0.0, max_steps=1, **how))
    assert all((inputs["labels"] != -100).sum() == inputs["answer_length"].sum() for _, inputs in found)


def test_kl_to_another_model(tmp_path):
    """The named model is loaded, frozen, and what the loss is held to; one with other ids is refused."""
    other = llama(seed=5)
    other.save_pretrained(tmp_path / "other")
    options = {"learning_rate": 0.0, "max_steps": 1}
    plain = sum(loss for loss, _ in losses_of(make_trainer(tmp_path, **options)))
    named = {"kl_weight": 0.5, "kl_model": str(tmp_path / "other")}
    found = losses_of(make_trainer(tmp_path, **options, **named))
    divergence, count = torch.zeros(()), 0
    for _, inputs in found:
        with torch.no_grad():
            own, targets, _ = log_probs(llama(), inputs)
            of_other, _, _ = log_probs(other, inputs)
        divergence, count = divergence + (own.exp() * (own - of_other)).sum(), count + len(targets)
    torch.testing.assert_close(sum(loss for loss, _ in found), plain + 0.5 * divergence / count, rtol=1e-5, atol=1e-6)
    other.resize_token_embeddings(VOCAB + 9)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=f"kl_model has {VOCAB + 9} ids, but the model has {VOCAB}"):
        make_trainer(tmp_path, **named)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_on": "some"}, "accepted: all, after_self, after_switch"),
        ({"loss_on": "after_self", "context_micro_batches": 1}, "context_micro_batches"),
        ({"loss_on": "after_switch", "granularity": "prefix", "context_micro_batches": 1}, "context_micro_batches"),
        ({"loss_on": "after_switch", "granularity": "span"}, "give granularity=prefix, or loss_on=after_self"),
        ({"kl_weight": -1.0}, ">= 0"),
        ({"kl_model": "x"}, "kl_weight is 0"),
    ],
)
def test_bad_arguments(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **change)
