"""A program that uses the public API, for type checkers in their strictest modes (tests/test_typing.py); not run."""

from __future__ import annotations

from typing import Any, assert_type

import torch
from torch import Tensor

import selfgen
import selfgen_kernels
from selfgen import (
    Answers,
    BASHTrainer,
    BSSConfig,
    BSSTrainer,
    ContextGenerator,
    ContextStats,
    Corrected,
    Masks,
    MixedContext,
    RACConfig,
    RACTrainer,
    UnsupportedModelError,
    answer,
    generate_corrected,
    load_contexts,
    lockstep,
    train_rounds,
    whole_weights,
    write_contexts,
)
from selfgen.data import RowOptions, load_rows, tokenize_rows
from selfgen.evaluation import Gap, free_running_gap
from selfgen_kernels import backends, linear_sample_mix, plan_pass, ragged_attention, sample_mix


def contexts(model: Any, prompts: list[Tensor], references: list[Tensor]) -> MixedContext:
    generator = ContextGenerator(model, temperature=0.7, masks=Masks("span", 8.0), precision="model")
    try:
        with whole_weights(generator.model), lockstep(generator.model):
            mixed = generator.contexts(prompts, references, 0.25, seed=0, sample_ids=[0, 1], method="fixed_point")
    except UnsupportedModelError as error:
        raise SystemExit(str(error)) from error
    assert_type(mixed.tokens, list[Tensor])
    assert_type(mixed.stats, ContextStats)
    assert_type(mixed.stats.passes, int)
    assert_type(generator.answer(prompts), Answers)
    return mixed


def trained(model: Any, rows: Any, tokenizer: Any) -> None:
    config = BSSConfig("out", max_steps=10, self_prob=0.25, self_prob_schedule="linear")
    trainer = BSSTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    RACTrainer(model, RACConfig("out"), train_dataset=rows).train()
    BASHTrainer(model, config, train_dataset=rows).train()
    assert_type(config.self_prob_at(3, 10), float)
    generator = trainer.generator
    assert_type(generator, ContextGenerator)
    assert_type(answer(generator, [[1, 2]]), Answers)
    assert_type(generate_corrected(generator, tokenizer, [[1, 2]]), Corrected)
    write_contexts(generator, rows, "contexts", self_prob=0.1, seed=0)
    load_contexts("contexts")
    train_rounds(lambda name: model, "model", rows, config, rounds=2, processing_class=tokenizer)
    assert_type(free_running_gap(generator, rows), Gap)
    tokenize_rows(load_rows("rows.jsonl"), tokenizer, max_length=512)
    RowOptions(max_length=512)


def ops(logits: Tensor, hidden: Tensor, weight: Tensor) -> None:
    ids = torch.arange(len(logits))
    tokens, is_self = sample_mix(logits, ids, 0.5, seed=0, sample_ids=ids, positions=ids, top_p=0.9)
    assert_type(tokens, Tensor)
    assert_type(is_self, Tensor)
    linear_sample_mix(hidden, weight, ids, 0.5, seed=0, sample_ids=ids, positions=ids, softcap=30.0)
    plan_pass(ids, ids, ids, logits[:, 0], 8)
    ragged_attention(hidden, hidden, hidden, ids.int(), ids[:, None], implementation="flash_attn")
    assert_type(backends.chosen("sample_mix", "cpu").why, str)
    print(selfgen_kernels.NOISE_VERSION + 1)


def mistakes(generator: ContextGenerator) -> None:
    """Each must be found: an ignore that is not needed is an error."""
    selfgen.BSSTrainr()  # type: ignore[attr-defined]
    selfgen_kernels.sample_mx()  # type: ignore[attr-defined]
    generator.contexts([[1]], [[2]], 0.5, seed=0, sample_ids=[0], method="guess")  # type: ignore[arg-type]
    generator.context([[1]])  # type: ignore[attr-defined]
    assert_type(selfgen.__version__, str)
