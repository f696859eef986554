"""The loss of a linear head, chunk by chunk, against autograd over all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import tiny_model

from selfgen.training import losses
from selfgen.training.linear_loss import linear_cross_entropy

N, D, V = 23, 8, 41


def parts(dtype=torch.float32, bias=True, trainable=("states", "weight", "bias")):
    draw = torch.Generator().manual_seed(0)
    given = {"states": (N, D), "weight": (V, D)} | ({"bias": (V,)} if bias else {})
    found = {name: torch.randn(*shape, generator=draw).to(dtype) for name, shape in given.items()}
    for name, one in found.items():
        one.requires_grad_(name in trainable)
    return found, torch.randint(V, (N,), generator=draw)


def plain(given, targets, smoothing):
    logits = F.linear(given["states"], given["weight"], given.get("bias"))
    return F.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=smoothing)


def chunked(given, targets, smoothing, chunk):
    return linear_cross_entropy(
        given["states"], given["weight"], given.get("bias"), targets, smoothing=smoothing, chunk=chunk
    )


def gradients(loss, given, scale=0.3):
    leaves = [one for one in given.values() if one.requires_grad]
    return torch.autograd.grad(scale * loss, leaves)


@pytest.mark.parametrize("chunk", [1, 7, N, 100])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_is_that_of_all_logits(chunk, smoothing, bias):
    given, targets = parts(bias=bias)
    want, got = plain(given, targets, smoothing), chunked(given, targets, smoothing, chunk)
    torch.testing.assert_close(got, want)
    for one, other in zip(gradients(got, given), gradients(want, given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trainable", [("states",), ("weight",), ("bias",), ("states", "bias"), ()])
def test_what_is_frozen_has_no_gradient(trainable):
    """A frozen head, as under LoRA; and where nothing has one, nothing is computed for it."""
    given, targets = parts(trainable=trainable)
    got = chunked(given, targets, 0.1, 5)
    torch.testing.assert_close(got, plain(given, targets, 0.1))
    assert got.requires_grad == bool(trainable)
    for one, other in zip(
        gradients(got, given) if trainable else (),
        gradients(plain(given, targets, 0.1), given) if trainable else (),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_in_bf16(weights):
    """Under autocast over fp32 weights, or with weights in bf16: within the rounding of bf16 of what fp32 gives."""
    given, targets = parts(weights)
    exact = {name: one.detach().float().requires_grad_() for name, one in given.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        got = chunked(given, targets, 0.1, 7)
    assert got.dtype == torch.float32
    want = plain(exact, targets, 0.1)
    torch.testing.assert_close(got, want, rtol=1e-2, atol=0)
    for one, other in zip(gradients(got, given), gradients(want, exact), strict=True):
        assert one.dtype == weights
        assert (one.float() - other).norm() < 0.02 * other.norm()


def test_without_positions_all_weights_have_a_gradient():
    given, _ = parts()
    given["states"] = torch.zeros(0, D, requires_grad=True)
    loss = chunked(given, torch.zeros(0, dtype=torch.int64), 0.0, 5)
    assert loss == 0
    assert all(not one.any() for one in gradients(loss, given))


def test_ids_that_no_answer_may_have():
    """Logits of -inf, as of rows that only pad the embedding, take part in nothing; a target that has one shows it."""
    given, targets = parts()
    with torch.no_grad():
        given["bias"][3] = -torch.inf
    others = targets.clone()
    others[others == 3] = 4
    loss = chunked(given, others, 0.0, 5)
    assert loss.isfinite()
    assert all(one.isfinite().all() for one in gradients(loss, given))
    others[0] = 3
    assert chunked(given, others, 0.0, 5) == torch.inf


def test_gradients_are_given_once():
    """They are computed in the forward, and scaled in place in the backward."""
    given, targets = parts()
    loss = chunked(given, targets, 0.0, 5)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()


def test_evaluation_computes_no_gradients(monkeypatch):
    given, targets = parts()
    products = []
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda *_: products.append(1))
    with torch.no_grad():
        got = chunked(given, targets, 0.0, 5)
    assert not got.requires_grad
    assert not products


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp16_is_scaled_before_it_is_multiplied(dtype, monkeypatch):
    """Its gradients would vanish, were they computed before the loss is scaled."""
    used = []
    ours = losses.linear_cross_entropy
    monkeypatch.setattr(losses, "linear_cross_entropy", lambda *args, **how: used.append(1) or ours(*args, **how))
    model = tiny_model("llama")
    ids = torch.arange(1, 9)[None]
    with torch.autocast("cpu", dtype), losses.AnswerLoss(model).inside():
        loss = model(input_ids=ids, labels=ids).loss
    assert loss.isfinite()
    assert bool(used) == (dtype == torch.bfloat16)


def test_in_a_compiled_function():
    given, targets = parts()
    compiled = torch.compile(lambda states: 2 * linear_cross_entropy(
        states, given["weight"], given["bias"], targets, smoothing=0.0, chunk=5), backend="eager")  # fmt: skip
    got, want = compiled(given["states"]), 2 * plain(given, targets, 0.0)
    torch.testing.assert_close(got, want)
    for one, other in zip(gradients(got, given), gradients(want, given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
