"""What is learned besides the reference: each target against its formula, written out in fp64, and in training."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from helpers.data import TEMPLATE, make_tokenizer
from helpers.training import losses_of, make_bash_trainer, make_rac_trainer, make_trainer, rows, weights
from models import VOCAB, tiny_model
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BartConfig, BartForCausalLM, LlamaForCausalLM

from selfgen import BSSConfig, BSSTrainer
from selfgen.data import Collator
from selfgen.training import losses
from selfgen.training.divergences import Divergence
from selfgen.training.losses import AnswerLoss, Compared
from selfgen.training.targets import PRIVILEGED_CUE, REFERENCES


def llama(seed: int = 0, **changes):
    """A model whose configuration is another one by ``changes``."""
    config = tiny_model("llama").config
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


STILL = {"learning_rate": 0.0, "max_steps": 1}
"""One step, whose losses can be computed again."""
KINDS = [
    {"divergence": "forward_kl"},
    {"divergence": "reverse_kl"},
    {"divergence": "jsd", "divergence_beta": 0.3},
    {"divergence": "jsd", "teacher_top_k": 5, "teacher_temperature": 0.5},
    {"teacher_top_k": 3},
    {"divergence": "reverse_kl", "teacher_top_k": VOCAB, "teacher_temperature": 2.0},
]


def naive(p, q, *, divergence="forward_kl", divergence_beta=0.5, teacher_top_k=None, teacher_temperature=1.0):
    """[N] of logits [N, V] of the target and the model, position by position."""
    found = []
    for target, own in zip(p.double(), q.double(), strict=True):
        target, own = (target / teacher_temperature).softmax(-1), own.softmax(-1)
        if teacher_top_k is not None and teacher_top_k < len(target):
            top = target.topk(teacher_top_k).indices
            target, own = (torch.cat([one[top], 1 - one[top].sum(0, keepdim=True)]) for one in (target, own))
        mixture = divergence_beta * target + (1 - divergence_beta) * own
        forward, reverse = (target * (target / own).log()).sum(), (own * (own / target).log()).sum()
        both = divergence_beta * (target * (target / mixture).log()).sum()
        both = both + (1 - divergence_beta) * (own * (own / mixture).log()).sum()
        found.append({"forward_kl": forward, "reverse_kl": reverse, "jsd": both}[divergence])
    return torch.stack(found)


def batch():
    columns = Collator(0)([*rows(4)])
    return {name: columns[name] for name in ("input_ids", "attention_mask", "labels")}


def logits_of(model, input_ids, labels, attention_mask):
    """[N, V] at the learned positions of a copy in fp64, and where they are."""
    learned = labels[:, 1:] != -100
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
    return logits[learned], learned


def in_fp64(model):
    return copy.deepcopy(model).double().eval()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()


# ---------------------------------------------------------------------------------------------------------------------
# Divergences


@pytest.mark.parametrize("kind", KINDS)
def test_divergences_and_their_gradients(kind):
    torch.manual_seed(0)
    own, target = torch.randn(6, VOCAB) * 3, torch.randn(6, VOCAB) * 3
    options = BSSConfig("out", target="teacher", use_cpu=True, **kind)
    found, want = own.clone().requires_grad_(), own.clone().double().requires_grad_()
    one = options.divergence_over(None)(found.log_softmax(-1), target)
    other = naive(target, want, **kind)
    torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-6)
    one.sum().backward()
    other.sum().backward()
    torch.testing.assert_close(found.grad.double(), want.grad, rtol=1e-3, atol=1e-6)


def test_the_limits_of_jsd_are_the_kls():
    torch.manual_seed(0)
    own, target = (torch.randn(6, VOCAB, dtype=torch.float64) for _ in range(2))
    own = own.log_softmax(-1)
    for beta, kind in ((1e-6, "forward_kl"), (1 - 1e-6, "reverse_kl")):
        scaled = Divergence("jsd", beta)(own, target) / min(beta, 1 - beta)
        torch.testing.assert_close(scaled, Divergence(kind)(own, target), rtol=1e-4, atol=0)


def test_top_ids_and_the_rest_are_a_lower_bound():
    """It rises with their number, and is 0 where distributions are equal."""
    torch.manual_seed(0)
    own, target = torch.randn(6, VOCAB) * 2, torch.randn(6, VOCAB) * 2
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        found = [Divergence(kind, top_k=k)(own.log_softmax(-1), target) for k in (1, 2, 8, 64, None)]
        assert all((one <= other + 1e-6).all() for one, other in pairwise(found))
        assert Divergence(kind, top_k=4)(own.log_softmax(-1), own).abs().max() < 1e-5


@pytest.mark.parametrize("temperature", [1e-3, 1e-40])
def test_a_target_of_a_low_temperature_is_its_likeliest_id(temperature):
    torch.manual_seed(0)
    own, target = torch.randn(6, VOCAB, requires_grad=True), torch.randn(6, VOCAB)
    nll = F.cross_entropy(own, target.argmax(1), reduction="none")
    mixture = 0.5 + 0.5 * (-nll).exp()
    away = Divergence(temperature=temperature)(own.log_softmax(-1), target)
    torch.testing.assert_close(away, nll)
    away = Divergence("jsd", temperature=temperature)(own.log_softmax(-1), target)
    rest = 0.5 * ((-nll).exp() * (-nll - mixture.log()) - (1 - (-nll).exp()) * math.log(0.5))
    torch.testing.assert_close(away, rest - 0.5 * mixture.log(), rtol=1e-4, atol=1e-5)
    away.sum().backward()
    assert own.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS[:1] + KINDS[2:5])
def test_a_target_that_rules_ids_out(kind):
    """As models do that set logits to -inf."""
    torch.manual_seed(0)
    own, target = torch.randn(6, VOCAB), torch.randn(6, VOCAB)
    finite = target.clone()
    target[:, 5], finite[:, 5] = -math.inf, -200.0  # of which fp64 still knows the logarithm
    options = BSSConfig("out", target="teacher", use_cpu=True, **kind)
    found, want = own.clone().requires_grad_(), own.clone().double().requires_grad_()
    one = options.divergence_over(None)(found.log_softmax(-1), target)
    other = naive(finite, want, **kind)
    torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-6)
    one.sum().backward()
    other.sum().backward()
    torch.testing.assert_close(found.grad.double(), want.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", [*KINDS, {"divergence": "reverse_kl", "teacher_top_k": VOCAB - 3}])
def test_ids_that_both_models_rule_out_have_no_part(kind):
    """As of a model that stays near itself."""
    torch.manual_seed(0)
    own, target = torch.randn(6, VOCAB), torch.randn(6, VOCAB)
    ruled_out = [one.clone() for one in (own, target)]
    for one in ruled_out:
        one[:, -5:] = -math.inf
    options = BSSConfig("out", target="teacher", use_cpu=True, **kind)
    found, want = ruled_out[0].requires_grad_(), own[:, :-5].clone().double().requires_grad_()
    one = options.divergence_over(None)(found.log_softmax(-1), ruled_out[1])
    other = naive(target[:, :-5], want, **kind)
    torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-6)
    one.sum().backward()
    other.sum().backward()
    torch.testing.assert_close(found.grad.double()[:, :-5], want.grad, rtol=1e-3, atol=1e-6)
    assert not found.grad[:, -5:].any()


def test_ids_that_both_heads_have():
    torch.manual_seed(0)
    own, target = torch.randn(6, VOCAB), torch.randn(6, VOCAB + 9)
    found = Divergence(ids=100)(own.log_softmax(-1), target)
    torch.testing.assert_close(found.double(), naive(target[:, :100], own[:, :100]), rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("row_weights", [None, [1.0, 0.5, 0.0, 0.5]])
@pytest.mark.parametrize("kind", KINDS[:4])
@pytest.mark.each_pair
def test_the_loss_from_a_teacher_is_its_formula(lean, row_weights, kind, monkeypatch):
    """With a teacher of another hidden size, smoothing and a model to stay near, in chunks of which some are short."""
    monkeypatch.setattr(losses, "_CHUNK_BYTES", 1)  # 64 positions
    monkeypatch.setattr(losses, "_chunk", lambda width, device: 7)
    model, frozen, teacher, inputs = llama(), llama(seed=1), llama(seed=2, hidden_size=48), batch()
    options = BSSConfig("out", target="teacher", use_cpu=True, **kind)
    loss = AnswerLoss(
        model, label_smoothing=0.1, kl_weight=0.3, frozen=frozen, target="divergence", target_weight=0.4,
        teacher=teacher, divergence=options.divergence_over(None), lean=lean,
    )  # fmt: skip
    assert loss.lean == lean
    given = None if row_weights is None else torch.tensor(row_weights)
    states = [loss.states_of(one, inputs) for one in (frozen, teacher)]
    with loss.inside(compared=Compared(given, *states)):
        found = model(**inputs, num_items_in_batch=torch.tensor(31)).loss
    gradient = gradients(model, found)
    assert all(p.grad is None for one in (frozen, teacher) for p in one.parameters())

    model = in_fp64(model)
    own, learned = logits_of(model, **inputs)
    with torch.no_grad():
        near, target = (logits_of(in_fp64(one), **inputs)[0] for one in (frozen, teacher))
    per_token = 0.6 * F.cross_entropy(own, inputs["labels"][:, 1:][learned], reduction="none", label_smoothing=0.1)
    per_token = per_token + 0.3 * naive(near, own, divergence="reverse_kl") + 0.4 * naive(target, own, **kind)
    weight = torch.ones(len(own)) if given is None else given[learned.nonzero()[:, 0]]
    want = (weight * per_token).sum() / 31
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, gradients(model, want), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_dft_is_its_formula(lean, weight):
    """Its gradient is that of the cross-entropy, times the probability of the reference."""
    model, inputs = llama(), batch()
    loss = AnswerLoss(model, target="dft", target_weight=weight, lean=lean)
    with loss.inside():
        found = model(**inputs).loss
    gradient = gradients(model, found)
    model = in_fp64(model)
    own, learned = logits_of(model, **inputs)
    nll = F.cross_entropy(own, inputs["labels"][:, 1:][learned], reduction="none")
    probability = (-nll).exp().detach()
    want = ((1 - weight) * nll + weight * probability * nll).mean()
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, gradients(model, want), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("kind", KINDS[:3])
def test_the_model_as_its_own_target_has_no_gradient_there(lean, kind):
    """Not even its head, which makes both logits. Where there is no target, the reference has all of the weight."""
    model, inputs = llama(), batch()
    other = {**inputs, "input_ids": inputs["input_ids"].flip(1)}
    has_target = torch.rand(inputs["input_ids"].shape, generator=torch.Generator().manual_seed(0)) < 0.5
    options = BSSConfig("out", target="teacher_forced", use_cpu=True, **kind)
    loss = AnswerLoss(
        model, target="divergence", target_weight=0.5, divergence=options.divergence_over(None), lean=lean
    )
    with loss.inside(compared=Compared(None, None, loss.states_of(model, other), has_target)):
        found = model(**inputs).loss
    gradient = gradients(model, found)
    model = in_fp64(model)
    own, learned = logits_of(model, **inputs)
    with torch.no_grad():
        target = logits_of(model, **other)[0]
    nll = F.cross_entropy(own, inputs["labels"][:, 1:][learned], reduction="none")
    both = 0.5 * nll + 0.5 * naive(target, own, **kind)
    want = torch.where(has_target[:, :-1][learned], both, nll).mean()
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, gradients(model, want), rtol=1e-3, atol=1e-5)


class Sizes(TorchDispatchMode):
    """The sizes of all tensors that are made inside."""

    def __init__(self):
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves(result)
        self.found.extend(x.numel() for x in leaves if isinstance(x, torch.Tensor))
        return result


@pytest.mark.parametrize("kind", [{}, {"divergence": "jsd", "teacher_top_k": 5}])
@pytest.mark.parametrize("target", ["dft", "divergence"])
def test_logits_never_lie_in_memory_as_a_whole(monkeypatch, target, kind):
    """Neither the model's nor the teacher's, in the forward and the backward."""
    model, teacher = llama(), llama(seed=2, hidden_size=48)
    monkeypatch.setattr(losses, "_CHUNK_BYTES", 4 * VOCAB * 200)
    states, others = torch.randn(3, 1000, 32, requires_grad=True), torch.randn(3, 1000, 48)
    options = BSSConfig("out", target="teacher", use_cpu=True, **kind)
    loss = AnswerLoss(
        model, kl_weight=0.1, frozen=teacher, target=target, target_weight=0.5, teacher=teacher,
        divergence=options.divergence_over(None),
    )  # fmt: skip
    with Sizes() as sizes:
        given = Compared(None, others, others)
        loss._loss(states, torch.randint(0, VOCAB, (3, 1000)), None, given).backward()
    assert max(sizes.found) <= max(100 * VOCAB, 3000 * 48)
    assert states.grad.abs().sum() > 0


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize(
    "change", [{"target": "dft"}, {"target": "divergence", "target_weight": 1.0}, {"kl_weight": 1.0}]
)
@pytest.mark.parametrize("kind", KINDS[3:5])
def test_where_nothing_is_learned_each_weight_has_a_gradient_of_zeros(lean, change, kind):
    """DDP waits for those of all weights, where it is not told to look for unused ones."""
    model, inputs = llama(), batch()
    divergence = BSSConfig("out", target="teacher", use_cpu=True, **kind).divergence_over(None)
    loss = AnswerLoss(model, frozen=model, divergence=divergence, lean=lean, **{"target_weight": 0.5, **change})
    states = loss.states_of(model, inputs)
    with loss.inside(compared=Compared(None, states, states)):
        found = model(**{**inputs, "labels": torch.full_like(inputs["labels"], -100)}).loss
    found.backward()
    assert found == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# In training


def lora(base=None, seed=1):
    torch.manual_seed(seed)
    adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(base or llama(), adapters)


def tokenizer():
    return make_tokenizer(TEMPLATE, size=VOCAB)


def make(folder, model=None, teacher=None, tokenizer=None, **changes):
    """A trainer; with ``teacher`` given from Python, and with a tokenizer that can make prompts."""
    if teacher is None and tokenizer is None:
        return make_trainer(folder, model=model, **changes)

    def trainer(model, config, **given):
        return BSSTrainer(model, config, **{**given, **({"processing_class": tokenizer} if tokenizer else {})},
                          **({} if teacher is None else {"teacher": teacher}))  # fmt: skip

    return make_trainer(folder, model=model, trainer=trainer, **changes)


def total(found):
    return sum(loss for loss, _ in found).double()


def parts(inputs):
    """Rows of a micro-batch: prompt, mixed context and reference."""
    lengths = zip(inputs["prompt_length"].tolist(), inputs["answer_length"].tolist(), strict=True)
    for row, (prompt, answer) in enumerate(lengths):
        span = slice(prompt, prompt + answer)
        yield inputs["input_ids"][row, :prompt], inputs["input_ids"][row, span], inputs["labels"][row, span]


def row_logits(model, prompt, answer):
    """[T, V], that the model gives to each place of an answer."""
    with torch.no_grad():
        logits = in_fp64(model)(input_ids=torch.cat([prompt, answer])[None]).logits[0]
    return logits[len(prompt) - 1 : -1]


def expected(found, model, target, weight=0.5, **kind):
    """The loss of a step, row by row; ``target`` gives the logits of a row's target, and where it has any."""
    sums, count = 0.0, 0
    for _, inputs in found:
        for prompt, context, reference in parts(inputs):
            own = row_logits(model, prompt, context)
            nll = F.cross_entropy(own, reference, reduction="none")
            of_target, there = target(prompt, context, reference)
            away = naive(of_target, own, **kind)
            sums = sums + torch.where(there, (1 - weight) * nll + weight * away, nll).sum()
            count += len(reference)
    return sums / count


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("kind", [{}, {"divergence": "jsd", "teacher_top_k": 4, "target_weight": 0.7}])
@pytest.mark.each_value
def test_a_teacher_that_is_named(tmp_path, lean, kind):
    """Of another hidden size; it is loaded, and learned from under the mixed context."""
    other = llama(seed=5, hidden_size=48)
    other.save_pretrained(tmp_path / "other")
    named = {"target": "teacher", "teacher_model": str(tmp_path / "other"), "lean_loss": lean, **kind}
    trainer = make(tmp_path / "out", **STILL, **named)
    found = losses_of(trainer)
    assert trainer._reuse.on
    assert trainer._answer_loss.lean == lean
    assert not any(p.requires_grad or p.grad is not None for p in trainer._answer_loss.teacher.parameters())
    everywhere = torch.tensor(True)
    weight = kind.pop("target_weight", 0.5)
    want = expected(found, llama(), lambda p, c, r: (row_logits(other, p, c), everywhere), weight, **kind)
    torch.testing.assert_close(total(found), want, rtol=1e-5, atol=1e-6)


def test_a_teacher_that_caps_its_logits(tmp_path):
    """They are made as a whole, and the model's are not."""
    teacher = tiny_model("gemma2")
    trainer = make(tmp_path, teacher=teacher, target="teacher", **STILL)
    assert trainer._answer_loss.lean
    everywhere = torch.tensor(True)
    found = losses_of(trainer)
    want = expected(found, llama(), lambda p, c, r: (row_logits(teacher, p, c), everywhere))
    torch.testing.assert_close(total(found), want, rtol=1e-5, atol=1e-6)


def test_a_model_whose_loss_is_its_own(tmp_path):
    """Bart's, whose logits the loss is computed of."""
    config = BartConfig(
        vocab_size=VOCAB, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16,
        max_position_embeddings=64, dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BartForCausalLM(config).eval()
    trainer = make(tmp_path, model=model, target="teacher_forced", context_method="sequential", **STILL)
    want = trainer.evaluate(rows(6))["eval_loss"]
    found = losses_of(trainer)
    assert trainer._answer_loss.outside
    torch.testing.assert_close(total(found), expected(found, model, under_the_reference(model)), rtol=1e-5, atol=1e-6)
    assert trainer.evaluate(rows(6))["eval_loss"] == pytest.approx(want)


def test_a_teacher_from_python_learns_nothing(tmp_path):
    teacher = llama(seed=5, hidden_size=48)
    before = weights(teacher).clone()
    trainer = make(tmp_path, teacher=teacher, target="teacher", max_steps=2)
    trainer.train()
    assert trainer._answer_loss.teacher is teacher
    assert torch.equal(weights(teacher), before)
    assert not torch.equal(weights(trainer.model), weights(llama()))


@pytest.mark.parametrize("near", [0.0, 0.5])
def test_a_model_with_an_adapter_learns_from_itself_without_it(tmp_path, near):
    trainer = make(tmp_path, model=lora(), target="teacher", kl_weight=near, **STILL)
    assert trainer._answer_loss.teacher is trainer.generator.model
    found = losses_of(trainer)
    everywhere = torch.tensor(True)
    base = llama()
    model = lora()
    want = expected(found, model, lambda p, c, r: (row_logits(base, p, c), everywhere))
    if near:
        away = [naive(row_logits(base, p, c), row_logits(model, p, c), divergence="reverse_kl")
                for _, inputs in found for p, c, _ in parts(inputs)]  # fmt: skip
        want = want + near * torch.cat(away).mean()
    torch.testing.assert_close(total(found), want, rtol=1e-5, atol=1e-6)


def adapted(**changes):
    torch.manual_seed(1)
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **changes}
    return get_peft_model(tiny_model("qwen2"), LoraConfig(**options))


def with_trained(model, part):
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.requires_grad_(True)
    return model


ITSELF = ({"target": "teacher"}, {"kl_weight": 0.5})


@pytest.mark.parametrize(
    ("make_model", "weight"),
    [
        (lambda: adapted(bias="all"), r"q_proj\.\S*bias"),
        (lambda: with_trained(adapted(), "layernorm"), "layernorm"),
    ],
)
def test_a_model_that_changes_without_its_adapter_is_nothing_to_keep_to(tmp_path, make_model, weight):
    for change in ITSELF:
        with pytest.raises(ValueError, match=rf"without its adapter, but \S*{weight}\S*, which is no part of"):
            make(tmp_path, model=make_model(), **change)
    make(tmp_path, model=make_model(), teacher=llama(), target="teacher", **STILL).train()


def test_weights_that_an_adapter_has_taken_a_part_of_are_nothing_to_keep_to(tmp_path):
    for begun, change in (("pissa", ITSELF[0]), ("pissa_niter_4", ITSELF[1]), ("olora", ITSELF[0])):
        with pytest.raises(ValueError, match=rf"init_lora_weights is '{begun}', .* give \S+_model$"):
            make(tmp_path, model=adapted(init_lora_weights=begun), **change)
    make(tmp_path, model=adapted(init_lora_weights="gaussian"), target="teacher")


def test_what_is_saved_beside_an_adapter_is_a_part_of_it(tmp_path):
    ids = torch.arange(3, 20)[None]
    for change in ITSELF:
        model = adapted(modules_to_save=["norm", "embed_tokens", "lm_head"])
        with model.disable_adapter(), torch.no_grad():
            before = model(ids).logits
        make(tmp_path, model=model, max_steps=2, **change).train()
        with model.disable_adapter(), torch.no_grad():
            assert torch.equal(model.eval()(ids).logits, before)


def test_a_part_of_an_adapter_that_is_frozen_stays_so(tmp_path):
    """Else its gradients, by which nothing is changed, would count in the norm by which all are clipped."""
    norms = []
    for change in ({}, *({**one, "target_weight": 1e-9} if "target" in one else {"kl_weight": 1e-9} for one in ITSELF)):
        model = lora()
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
        trainer = make(tmp_path, model=model, max_steps=2, lean_loss=True, **change)
        trainer.train()
        assert not any(p.requires_grad for name, p in model.named_parameters() if "lora_A" in name)
        norms.append([entry["grad_norm"] for entry in trainer.state.log_history[:2]])
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert norms[2] == pytest.approx(norms[0], rel=1e-4)


def test_a_teacher_that_shares_weights_is_refused(tmp_path):
    model, teacher = llama(), llama(seed=2)
    teacher.model.embed_tokens = model.model.embed_tokens
    with pytest.raises(ValueError, match=r"shares the weight model\.embed_tokens\.weight .* give a copy"):
        make(tmp_path, model=model, teacher=teacher, target="teacher")
    assert model.model.embed_tokens.weight.requires_grad


def under_the_reference(model):
    def target(prompt, context, reference):
        differs = F.pad((context != reference).cumsum(0) > 0, (1, 0))[:-1]  # of the tokens before
        return row_logits(model, prompt, reference), differs

    return target


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.each_value
def test_teacher_forced_is_its_formula(tmp_path, lean, adapter):
    """Where the context so far is the reference, there is nothing else to learn than the reference."""
    model = lora if adapter else llama
    trainer = make(tmp_path, model=model(), target="teacher_forced", lean_loss=lean, **STILL)
    found = losses_of(trainer)
    assert trainer._reuse.on
    torch.testing.assert_close(
        total(found), expected(found, model(), under_the_reference(model())), rtol=1e-5, atol=1e-6
    )


def test_teacher_forced_after_self_tokens(tmp_path):
    """Labels that are not learned do not hide what the reference is."""
    trainer = make(tmp_path, target="teacher_forced", loss_on="after_self", self_prob=0.3, **STILL)
    found = losses_of(trainer)
    sums, count, model = 0.0, 0, llama()
    known = {row["sample_id"]: row for row in rows()}
    for _, inputs in found:
        for (prompt, context, labels), one in zip(parts(inputs), inputs["sample_id"].tolist(), strict=True):
            learned, reference = labels != -100, torch.tensor(known[one]["answer_ids"])
            of_target, there = under_the_reference(model)(prompt, context, reference)
            own = row_logits(model, prompt, context)
            nll = F.cross_entropy(own, reference, reduction="none")
            per_token = torch.where(there, 0.5 * nll + 0.5 * naive(of_target, own), nll)
            sums, count = sums + per_token[learned].sum(), count + int(learned.sum())
    torch.testing.assert_close(total(found), sums / count, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change", [{}, {"lean_loss": True}, {"lean_loss": False}, {"label_smoothing_factor": 0.1}, {"kl_weight": 0.1}]
)
@pytest.mark.one_case
def test_teacher_forced_at_p_zero_is_plain(tmp_path, change):
    runs = [teacher_forced_or_not(tmp_path, target, **change) for target in ("reference", "teacher_forced")]
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


def teacher_forced_or_not(folder, target, model=None, **changes):
    trainer = make(folder, target=target, model=model, **{"self_prob": 0.0, "max_steps": 3, **changes})
    trainer.train()
    return weights(trainer.model), [entry.get("loss") for entry in trainer.state.log_history]


def test_before_contexts_are_mixed_it_is_plain_too(tmp_path):
    """Also where the loss is not lean, as the model caps its logits."""
    options = {"self_prob": 0.5, "self_prob_warmup": 2, "max_steps": 2}
    runs = [
        teacher_forced_or_not(tmp_path, one, tiny_model("gemma2"), **options) for one in ("reference", "teacher_forced")
    ]
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


@pytest.mark.parametrize("self_prob", [0.5, 0.0])
@pytest.mark.parametrize("name", ["dft", "teacher"])
@pytest.mark.each_value
def test_a_target_without_a_weight_is_the_reference(tmp_path, name, self_prob):
    """Bit for bit, and no other model is loaded."""
    changes = {"self_prob": self_prob, "max_steps": 3}
    want, found = make(tmp_path, **changes), one_of_each(tmp_path, name, target_weight=0.0, **changes)
    for one in (want, found):
        one.train()
    assert torch.equal(weights(want.model), weights(found.model))
    assert [entry.get("loss") for entry in want.state.log_history] == [
        entry.get("loss") for entry in found.state.log_history
    ]


def test_the_default_is_the_reference(tmp_path):
    config = BSSConfig(str(tmp_path), use_cpu=True)
    assert (config.target, config.weight_of_target, config.compares) == ("reference", 0.0, False)


def test_the_reference_is_smoothed_where_it_is_learned_alone(tmp_path):
    """Though the target has all of the weight elsewhere."""
    options = {"target": "teacher_forced", "target_weight": 1.0, "label_smoothing_factor": 0.2, **STILL}
    found = losses_of(make(tmp_path, self_prob=0.3, **options))
    sums, count, model = 0.0, 0, llama()
    for _, inputs in found:
        for prompt, context, reference in parts(inputs):
            own, (of_target, there) = (
                row_logits(model, prompt, context),
                under_the_reference(model)(prompt, context, reference),
            )
            nll = F.cross_entropy(own, reference, reduction="none", label_smoothing=0.2)
            sums, count = sums + torch.where(there, naive(of_target, own), nll).sum(), count + len(reference)
    torch.testing.assert_close(total(found), sums / count, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lean", [True, False])
def test_privileged_is_a_forward_over_rows_by_hand(tmp_path, lean):
    words = tokenizer()
    trainer = make(
        tmp_path, tokenizer=words, target="privileged", privileged_cue="h g", lean_loss=lean, divergence="reverse_kl",
        **STILL,
    )  # fmt: skip
    found = losses_of(trainer)
    assert trainer._reuse.on
    model = llama()
    end = words.convert_tokens_to_ids("<eos>")
    between = words("<eos> <nl> <user> h g <eos> <nl> <assistant>", add_special_tokens=False).input_ids

    def target(prompt, context, reference):
        shown = reference.tolist()
        shown = shown[: shown.index(end)] if end in shown else shown
        return row_logits(model, torch.tensor([*prompt.tolist(), *shown, *between]), context), torch.tensor(True)

    want = expected(found, model, target, divergence="reverse_kl")
    torch.testing.assert_close(total(found), want, rtol=1e-5, atol=1e-6)


def test_privileged_rows_that_are_too_long_are_counted(tmp_path):
    """They learn the reference alone."""
    options = {"tokenizer": tokenizer(), "target": "privileged", "privileged_cue": "h", **STILL}
    trainer = make(tmp_path, max_length=20, **options)
    found = losses_of(trainer)
    share = trainer.state.log_history[0]["privileged_too_long"]
    cue, model = trainer._privileged.cue, llama()
    rows_seen = [row for _, inputs in found for row in parts(inputs)]
    fits = [len(p) + len(r) + len(cue.ids) + len(r) <= 20 for p, _, r in rows_seen]
    assert 0 < share < 1
    assert share == 1 - sum(fits) / len(fits)

    def target(prompt, context, reference):
        there = len(prompt) + 2 * len(reference) + len(cue.ids) <= 20
        before = torch.tensor(cue.prompt(prompt.tolist(), reference.tolist()))
        return row_logits(model, before, context), torch.tensor(there)

    torch.testing.assert_close(total(found), expected(found, model, target), rtol=1e-5, atol=1e-6)


def test_the_cue_is_a_paragraph_without_a_template(tmp_path):
    trainer = make(tmp_path, tokenizer=make_tokenizer(size=VOCAB), target="privileged", **STILL)
    trainer.train()
    assert trainer._privileged.cue.ids
    assert PRIVILEGED_CUE


TARGETS = {
    "dft": {"target": "dft"},
    "teacher_forced": {"target": "teacher_forced", "divergence": "jsd"},
    "teacher": {"target": "teacher", "teacher_temperature": 0.8},
    "privileged": {"target": "privileged", "teacher_top_k": 8},
}
"""One of each kind, for what all have in common."""


def each(*fast: str):
    """Tests of all targets, of which the others are slow."""
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in TARGETS]
    )


def one_of_each(folder, name, **changes):
    teacher = llama(seed=5, hidden_size=48) if name == "teacher" else None
    return make(folder, teacher=teacher, tokenizer=tokenizer(), **{**TARGETS[name], **changes})


@each("teacher_forced")
def test_accumulated_steps_are_one_big_batch(tmp_path, name):
    runs = []
    for size, accumulated in ((4, 1), (2, 2), (1, 4)):
        more = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        found = losses_of(one_of_each(tmp_path, name, **STILL, **more))
        runs.append(total(found))
    torch.testing.assert_close(runs[1:], runs[:1] * 2, rtol=1e-5, atol=1e-6)


@each("privileged")
def test_a_lean_run_is_a_plain_one(tmp_path, name):
    runs = []
    for change in ({}, {"lean_loss": False}, {"reuse_passes": False}, {"context_micro_batches": 1}):
        runs.append([loss for loss, _ in losses_of(one_of_each(tmp_path, name, learning_rate=1e-3, **change))])
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], rtol=1e-4, atol=1e-6)


@each("teacher_forced", "privileged")
@pytest.mark.one_case
def test_a_resumed_run_is_the_unbroken_one(tmp_path, name):
    saved = {"save_strategy": "steps", "save_steps": 2, "loss_on": "all"}
    whole = one_of_each(tmp_path / "whole", name, **saved, max_steps=4)
    whole.train()
    one_of_each(tmp_path / "broken", name, **saved, max_steps=4).train()
    resumed = one_of_each(tmp_path / "broken", name, **saved, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-2"))
    assert torch.equal(weights(whole.model), weights(resumed.model))
    times = ("context_seconds", "training_seconds", "tokens_per_second", "train_runtime")
    for one, other in zip(whole.state.log_history[2:4], resumed.state.log_history[2:4], strict=True):
        assert {k: v for k, v in one.items() if k not in times} == {k: v for k, v in other.items() if k not in times}


def test_another_teacher_is_refused(tmp_path):
    options = {"target": "teacher", "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make(tmp_path, teacher=llama(seed=5), **options).train()
    with pytest.raises(ValueError, match=r"learns from another model \(target=teacher\): resume with the former --tea"):
        make(tmp_path, teacher=llama(seed=6), **options | {"max_steps": 3}).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="divergence was 'forward_kl', is 'jsd'"):
        make(tmp_path, teacher=llama(seed=5), **options, divergence="jsd").train(resume_from_checkpoint=True)
    make(tmp_path, teacher=llama(seed=5), **options | {"max_steps": 3}).train(resume_from_checkpoint=True)


def test_another_teacher_than_the_model_without_its_adapter_is_refused(tmp_path):
    options = {"target": "teacher", "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make(tmp_path, model=lora(), **options).train()
    resumed = make(tmp_path, model=lora(), teacher=llama(seed=6), **options | {"max_steps": 3})
    with pytest.raises(ValueError, match="learns from another model"):
        resumed.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("name", TARGETS)
def test_evaluation_is_by_the_reference(tmp_path, name):
    want = make(tmp_path, **STILL).evaluate(rows(6))["eval_loss"]
    assert one_of_each(tmp_path, name, **STILL).evaluate(rows(6))["eval_loss"] == pytest.approx(want, rel=1e-6)


@each("teacher")
def test_under_autocast(tmp_path, name):
    found, want = (total(losses_of(one_of_each(tmp_path, name, bf16=bf16, **STILL))) for bf16 in (True, False))
    assert float((found - want).abs() / want) < 0.1


def test_on_stored_contexts(tmp_path):
    """Where the contexts are in the rows as they are read."""
    found = losses_of(make_bash_trainer(tmp_path, **STILL, **TARGETS["teacher_forced"]))
    want = expected(found, llama(), under_the_reference(llama()), divergence="jsd")
    torch.testing.assert_close(total(found), want, rtol=1e-5, atol=1e-6)
    assert all((inputs["input_ids"] != inputs[REFERENCES]).any() for _, inputs in found)


@pytest.mark.parametrize("name", ["dft", "teacher_forced", "privileged"])
def test_with_corrections(tmp_path, name):
    trainer = make_rac_trainer(tmp_path, self_prob=0.5, direct_weight=0.5, max_length=64, **TARGETS[name])
    ((loss, _), *_) = losses_of(trainer)
    assert loss.isfinite()


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "some"}, "accepted: reference, dft, teacher_forced, teacher, privileged"),
        ({"target": "dft", "target_weight": 1.5}, "from 0 to 1"),
        ({"target_weight": 0.5}, "target is reference"),
        ({"target": "teacher", "divergence": "tv"}, "accepted: forward_kl, reverse_kl, jsd"),
        ({"target": "teacher", "divergence": "jsd", "divergence_beta": 1.0}, "between 0 and 1"),
        ({"target": "teacher", "divergence_beta": 0.3}, "goes with divergence=jsd"),
        ({"target": "teacher", "teacher_top_k": 0}, "at least 1"),
        ({"target": "teacher", "teacher_top_k": 3.0}, r"teacher_top_k is 3\.0; it must be a whole number, at least 1"),
        ({"target": "teacher", "teacher_temperature": 0.0}, "> 0"),
        ({"target": "dft", "divergence": "jsd"}, "no distribution"),
        ({"teacher_top_k": 3}, "no distribution"),
        ({"target": "dft", "teacher_model": "x"}, "goes with target=teacher"),
        ({"target": "dft", "privileged_cue": "x"}, "goes with target=privileged"),
        ({"target": "dft", "label_smoothing_factor": 0.1}, "leaves none to the cross-entropy"),
        (
            {"target": "teacher", "target_weight": 1.0, "label_smoothing_factor": 0.1},
            "leaves none to the cross-entropy",
        ),
        ({"target": "privileged", "assistant_turns": "all"}, "the last turn"),
        (
            {"target": "teacher"},
            r"has no adapter, .*Give teacher_model \(--teacher-model\), or a model with an adapter",
        ),
        ({"target": "dft", "use_liger_kernel": True}, "that target would change"),
    ],
)
def test_bad_arguments(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **change)


def test_cues_that_can_not_be_asked_with(tmp_path):
    template = "{% if messages | length > 2 %}{{ raise_exception('once') }}{% endif %}" + TEMPLATE
    for given, cue, message in ((template, "h", "rejects a question"), (TEMPLATE, " ", "the cue is empty")):
        with pytest.raises(
            ValueError, match=f"target=privileged asks for the answer again by privileged_cue: .*{message}"
        ):
            make(tmp_path, tokenizer=make_tokenizer(given, size=VOCAB), target="privileged", privileged_cue=cue)


def test_bad_teachers(tmp_path):
    with pytest.raises(ValueError, match="teacher is given, but target is reference"):
        make(tmp_path, teacher=llama(seed=1))
    with pytest.raises(ValueError, match="teacher is given, but teacher_model is 'x'"):
        make(tmp_path, teacher=llama(seed=1), target="teacher", teacher_model="x")
    nowhere = str(tmp_path / "nowhere")
    for given in ({"target": "teacher", "teacher_model": nowhere}, {"kl_weight": 0.1, "kl_model": nowhere}):
        with pytest.raises(ValueError, match=r"(teacher|kl)_model is '.*nowhere', which can't be loaded"):
            make(tmp_path, **given)
    model = llama()
    with pytest.raises(ValueError, match="teacher is the model that is trained"):
        make(tmp_path, model=model, teacher=model, target="teacher")
    with pytest.raises(ValueError, match="the teacher has 32 positions, but rows have up to max_length=64"):
        make(tmp_path, teacher=llama(max_position_embeddings=32), target="teacher")
    larger = llama()
    larger.resize_token_embeddings(VOCAB + 9)
    with pytest.raises(ValueError, match=f"teacher has {VOCAB + 9} ids, but the model has {VOCAB}"):
        make(tmp_path, teacher=larger, target="teacher")


def test_tokenizers_are_compared(tmp_path):
    """The same tokenizer may go with heads that are padded to other sizes."""
    larger = llama(seed=5)
    larger.resize_token_embeddings(VOCAB + 9)
    larger.save_pretrained(tmp_path / "larger")
    tokenizer().save_pretrained(tmp_path / "larger")
    named = {"target": "teacher", "teacher_model": str(tmp_path / "larger"), "tokenizer": tokenizer()}
    trainer = make(tmp_path / "out", **STILL, **named)
    assert trainer._answer_loss.divergence.ids == VOCAB
    found = losses_of(trainer)
    everywhere = torch.tensor(True)
    want = expected(found, llama(), lambda p, c, r: (row_logits(larger, p, c)[:, :VOCAB], everywhere))
    torch.testing.assert_close(total(found), want, rtol=1e-5, atol=1e-6)
    other = make_tokenizer(TEMPLATE, size=VOCAB - 1)
    other.add_tokens(["<new>"])
    other.save_pretrained(tmp_path / "larger")
    with pytest.raises(ValueError, match="teacher_model has another tokenizer: the token '<130>' has the id None"):
        make(tmp_path / "out", **STILL, **named)


def test_a_teacher_that_is_the_model_to_stay_near_is_loaded_once(tmp_path):
    llama(seed=5).save_pretrained(tmp_path / "other")
    named = {one: str(tmp_path / "other") for one in ("teacher_model", "kl_model")}
    loss = make(tmp_path / "out", target="teacher", kl_weight=0.1, **named)._answer_loss
    assert loss.teacher is loss.frozen
