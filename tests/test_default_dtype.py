"""torch's default dtype is the user's: nothing that is computed depends on it."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from helpers.training import losses_of, make_rac_trainer, make_trainer, weights
from models import VOCAB, tiny_model
from zoo.definition import contexts, rows

from selfgen import ContextGenerator

OTHERS = [torch.bfloat16, torch.float16, torch.float64]


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", OTHERS)
@pytest.mark.one_case
def test_contexts_and_answers(dtype):
    model, of_rows = tiny_model("llama"), rows([(5, 9), (3, 230), (12, 4)], VOCAB)
    generator = ContextGenerator(model, token_budget=32, balance=2)
    want = [generator.contexts(*of_rows, 0.5, seed=3, sample_ids=[0, 1, 2]), generator.answer(of_rows[0], seed=1)]
    with default_dtype(dtype):
        measured = ContextGenerator(model)
        found = [measured.contexts(*of_rows, 0.5, seed=3, sample_ids=[0, 1, 2]), measured.answer(of_rows[0], seed=1)]
        sequential = contexts(model, *of_rows, method="sequential")
    for one, other in zip(want, found, strict=True):
        assert all(map(torch.equal, one.tokens, other.tokens))
    assert all(map(torch.equal, want[0].tokens, sequential.tokens))


@pytest.mark.parametrize("dtype", OTHERS)
@pytest.mark.parametrize("make", [make_trainer, make_rac_trainer])
@pytest.mark.each_value
def test_training(make, dtype, tmp_path):
    options = {"max_steps": 2, "learning_rate": 1e-2, "self_prob": 0.5, "kl_weight": 0.1, "label_smoothing_factor": 0.1}
    found = []
    for used in (torch.float32, dtype):
        trainer = make(tmp_path, model=tiny_model("llama"), **options)
        with default_dtype(used):
            found.append([*(loss for loss, _ in losses_of(trainer)), weights(trainer.model)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6, check_dtype=False)
