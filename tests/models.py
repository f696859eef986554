"""Tiny random-weight models of the families that the exactness tests run over."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
import transformers as t
from packaging.version import Version
from transformers import PreTrainedModel

VOCAB = 131  # no multiple of the sampler's 64-token groups
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
    "initializer_range": 0.3,  # wide enough for the context to matter: tokens then change from pass to pass
}
ALTERNATING = ["sliding_attention", "full_attention"]


def _base(**extra) -> dict:
    return {**BASE, **extra}


def _without(*names: str, **extra) -> dict:
    return {key: value for key, value in _base(**extra).items() if key not in names}


CONFIGS = {
    "llama": lambda: t.LlamaConfig(**_base()),
    "mistral": lambda: t.MistralConfig(**_base(sliding_window=7)),
    "qwen2": lambda: t.Qwen2Config(**_without("head_dim")),
    "qwen3": lambda: t.Qwen3Config(**_base()),
    "gemma2": lambda: t.Gemma2Config(
        **_base(
            sliding_window=7,
            layer_types=ALTERNATING,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=3.0,
            query_pre_attn_scalar=8,
        )
    ),
    "gemma3": lambda: t.Gemma3TextConfig(**_base(sliding_window=7, layer_types=ALTERNATING, query_pre_attn_scalar=8)),
    "phi3": lambda: t.Phi3Config(**_without("head_dim", sliding_window=9)),
    "gpt2": lambda: t.GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "gpt_neox": lambda: t.GPTNeoXConfig(**_without("head_dim", "num_key_value_heads")),
    "olmo2": lambda: t.Olmo2Config(**_without("head_dim")),
    "gpt_oss": lambda: t.GptOssConfig(  # attention sinks and a mixture of experts
        **_base(
            sliding_window=7,
            layer_types=ALTERNATING,
            num_local_experts=4,
            num_experts_per_tok=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    ),
}


OPTIONS = {field.name for field in fields(t.TrainingArguments)}
CHECKPOINTING = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in OPTIONS)


# Older versions of transformers compute them in a way that the ragged path refuses.
SINCE = {"gemma2": "5.21", "gpt2": "5.1"}


SOME_FAMILIES = ("gemma2", "gpt2", "gpt_oss", "llama", "olmo2")
"""Those that differ most: windows and soft caps, layer norms and learned positions, experts and sinks, norms after."""


def each_family(*fast: str, but: tuple[str, ...] = ()):
    """The parameter ``family``; tests of all but the ``fast`` ones, by default SOME_FAMILIES, are slow."""
    return pytest.mark.parametrize(
        "family",
        [
            pytest.param(family, marks=() if family in (fast or SOME_FAMILIES) else pytest.mark.slow)
            for family in sorted(CONFIGS.keys() - {*but})
        ],
    )


def tiny_model(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A random-weight causal language model of ``family`` (a key of ``CONFIGS``), in eval mode."""
    if Version(t.__version__) < Version(SINCE.get(family, "0")):
        pytest.skip(f"{family} is refused before transformers {SINCE[family]}")
    torch.manual_seed(seed)
    return t.AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=dtype).eval()
