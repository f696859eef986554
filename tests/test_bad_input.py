"""Bad input gets an error that names what was given and what is accepted, and models that don't fit are refused."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers as t
from models import BASE, CONFIGS, VOCAB, tiny_model

from selfgen import ContextGenerator, UnsupportedModelError

model_of = cache(tiny_model)
GOOD = {"prompts": [[5, 6], [7]], "references": [[8, 9, 10], [11]], "self_prob": 0.5, "seed": 0, "sample_ids": [0, 1]}


@pytest.mark.parametrize("method", ["fixed_point", "sequential"])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"self_prob": 1.5}, ValueError, r"self_prob is 1\.5; a probability must be in \[0, 1\]"),
        ({"self_prob": -0.1}, ValueError, r"self_prob is -0\.1"),
        ({"self_prob": float("nan")}, ValueError, "self_prob is nan"),
        ({"self_prob": "much"}, TypeError, "self_prob is 'much'; give a number"),
        ({"self_prob": [0.1, 0.2, 0.3]}, ValueError, r"shape \(3,\).* each of 2 rows"),
        ({"prompts": [[], [7]]}, ValueError, r"prompts\[0\] is empty"),
        ({"references": [[8], []]}, ValueError, r"references\[1\] is empty"),
        ({"prompts": [[5, VOCAB], [7]]}, ValueError, rf"prompts\[0\] holds token id {VOCAB}; .* 0 to {VOCAB - 1}"),
        ({"references": [[8], [-1]]}, ValueError, r"references\[1\] holds token id -1"),
        ({"prompts": [[5]]}, ValueError, "1 prompts and 2 references"),
        ({"sample_ids": [0, 1, 2]}, ValueError, r"sample_ids has shape \(3,\); 2 rows need shape \(2,\)"),
        ({"sample_ids": [4, 4]}, ValueError, "sample id 4 occurs more than once"),
        ({"sample_ids": None}, TypeError, "sample_ids must be a 1-D tensor or a list"),
        ({"sample_ids": ["a", "b"]}, TypeError, "sample_ids must be a 1-D tensor or a list"),
        ({"sample_ids": [2**63, 0]}, TypeError, "64-bit integers"),
        ({"sample_ids": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "sample_ids is on meta"),
        ({"prompts": [], "references": [], "sample_ids": [], "self_prob": 3.0}, ValueError, r"self_prob is 3\.0"),
        ({"sample_ids": [0.5, 1.5]}, TypeError, "sample_ids has dtype torch.float32; .* int64 or int32"),
        ({"prompts": [torch.ones(2), [7]]}, TypeError, r"prompts\[0\] has dtype torch.float32"),
        ({"prompts": [[1.5], [7]]}, TypeError, r"prompts\[0\] has dtype"),
        ({"prompts": ["text", [7]]}, TypeError, r"prompts\[0\] is text; tokenize it"),
        ({"prompts": [5, 6]}, ValueError, r"prompts\[0\] has shape \(\)"),
        ({"prompts": torch.ones(2, 2, dtype=torch.int64)}, TypeError, "prompts must be a list"),
        ({"prompts": [torch.ones(1, 2, dtype=torch.int64), [7]]}, ValueError, r"prompts\[0\] has shape \(1, 2\)"),
        ({"prompts": [torch.ones(2, dtype=torch.int64, device="meta"), [7]]}, ValueError, r"prompts\[0\] is on meta"),
        ({"prompts": [list(range(3, 100)) * 3, [7]]}, ValueError, "row 0 has 294 tokens; the model has 256 positions"),
        ({"seed": 0.5}, TypeError, "seed is a float"),
        ({"seed": 2**64}, ValueError, "seed"),
        ({"method": "magic"}, ValueError, "method is 'magic'; it must be"),
    ],
)
def test_generate(method, changes, error, message):
    with pytest.raises(error, match=message):
        ContextGenerator(model_of("llama"), token_budget=8, balance=1).contexts(**{**GOOD, "method": method, **changes})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"temperature": -0.5}, ValueError, r"temperature is -0\.5; .* >= 0"),
        ({"temperature": float("inf")}, ValueError, "temperature is inf"),
        ({"temperature": "hot"}, ValueError, "temperature is 'hot'"),
        ({"token_budget": 0}, ValueError, "token_budget is 0; it must be an integer >= 1"),
        ({"temperature": True}, ValueError, "temperature is True"),
        ({"balance": 0.0}, ValueError, "balance is 0.0; it must be a finite number > 0"),
        ({"balance": float("nan")}, ValueError, "balance is nan"),
        ({"graph_memory": -0.1}, ValueError, r"graph_memory is -0\.1; it must be a share of the memory, from 0 to 1"),
        ({"graph_memory": 1.5}, ValueError, r"graph_memory is 1\.5"),
        ({"graph_memory": True}, ValueError, "graph_memory is True"),
        ({"graph_memory": "much"}, ValueError, "graph_memory is 'much'"),
        ({"token_budget": True}, ValueError, "token_budget is True"),
        ({"token_budget": 2.5}, ValueError, r"token_budget is 2\.5"),
        ({"vocab_size": 0}, ValueError, "vocab_size is 0; it must be an integer from 1 to 131, the number of rows"),
        ({"vocab_size": 132}, ValueError, "vocab_size is 132"),
        ({"vocab_size": 2.0}, ValueError, r"vocab_size is 2\.0"),
    ],
)
def test_generator(arguments, error, message):
    with pytest.raises(error, match=message):
        ContextGenerator(model_of("llama"), **arguments)


def test_not_a_transformers_model():
    with pytest.raises(TypeError, match="model is a Linear; give a transformers model"):
        ContextGenerator(torch.nn.Linear(2, 2))


def _base(**extra):
    return {**BASE, **extra}


UNSUPPORTED = {
    "chunked_attention": lambda: t.Llama4TextConfig(
        **_base(
            attention_chunk_size=8,
            num_local_experts=2,
            intermediate_size_mlp=48,
            layer_types=["chunked_attention", "full_attention"],
        )
    ),
    "positions that can't be given": lambda: t.BloomConfig(
        vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3
    ),
    r"positions that can't be given \(its forward takes no position_ids\): the": lambda: t.BartConfig(
        vocab_size=VOCAB,
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=48,
        max_position_embeddings=256,
        init_std=0.3,
        dropout=0.0,
        is_decoder=True,
        is_encoder_decoder=False,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
    ),
    "AttentionInterface": lambda: t.GPTNeoConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=256,
        initializer_range=0.3,
    ),
    "num_kv_shared_layers": lambda: t.Gemma3nTextConfig(
        **_base(
            num_kv_shared_layers=1,
            layer_types=["full_attention", "full_attention"],
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=VOCAB,
            laurel_rank=4,
            altup_num_inputs=2,
            activation_sparsity_pattern=[0.0, 0.0],
        )
    ),
    "rope_type 'dynamic' beyond 16 positions": lambda: t.LlamaConfig(
        **_base(
            rope_parameters={
                "rope_type": "dynamic",
                "rope_theta": 10000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 16,
            }
        )
    ),
    "layers of type conv": lambda: t.Lfm2Config(**_base(layer_types=["conv", "full_attention"])),
    "not a transformers KV cache": lambda: t.RwkvConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32
    ),
}


@pytest.mark.parametrize("feature", UNSUPPORTED)
def test_a_model_that_does_not_fit_is_refused_by_name_and_decodes_sequentially(feature):
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(UNSUPPORTED[feature]()).eval()
    generator = ContextGenerator(model, token_budget=8, balance=1)
    rows = {
        "prompts": [list(range(3, 9)), [4]],
        "references": [list(range(10, 24)), list(range(20, 28))],
        "self_prob": 0.5,
        "seed": 0,
    }
    with pytest.raises(UnsupportedModelError, match=feature):
        generator.contexts(**rows, sample_ids=[0, 1])
    together = generator.contexts(**rows, sample_ids=[0, 1], method="sequential")
    for i in range(2):
        alone = generator.contexts(
            rows["prompts"][i : i + 1], rows["references"][i : i + 1], 0.5, seed=0, sample_ids=[i], method="sequential"
        )
        assert torch.equal(alone.tokens[0], together.tokens[i])


@pytest.mark.parametrize("make", [*CONFIGS.values(), *UNSUPPORTED.values()])
def test_sequential_contexts_are_what_a_whole_forward_would_choose(make):
    """An oracle for the oracle: greedy self tokens are the argmax of one ordinary forward over the finished context."""
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(make()).eval()
    prompts, references = [list(range(3, 9)), [4]], [list(range(10, 24)), list(range(20, 28))]
    mixed = ContextGenerator(model, temperature=0.0).contexts(
        prompts, references, 0.5, seed=0, sample_ids=[0, 1], method="sequential"
    )
    for prompt, reference, tokens, is_self in zip(prompts, references, mixed.tokens, mixed.is_self, strict=True):
        whole = torch.cat([torch.tensor(prompt), tokens])
        with torch.no_grad():
            chosen = model(input_ids=whole[None]).logits[0].argmax(-1)[len(prompt) - 1 : -1]
        assert torch.equal(torch.where(is_self, chosen, torch.tensor(reference)), tokens)
        assert is_self.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_computes_something_else_over_the_ragged_cache_is_refused(dtype, monkeypatch):
    """The probe catches what no flag in a configuration tells."""
    model = tiny_model("llama").to(dtype)
    original = model.model.layers[1].self_attn.forward

    def depends_on_the_batch(hidden_states, **kwargs):
        return original(hidden_states - hidden_states.mean(1, keepdim=True) * ("ragged_pass" in kwargs), **kwargs)

    def nothing_but_nan(hidden_states, **kwargs):
        return original(hidden_states * (torch.nan if "ragged_pass" in kwargs else 1.0), **kwargs)

    for forward in (depends_on_the_batch, nothing_but_nan):
        monkeypatch.setattr(model.model.layers[1].self_attn, "forward", forward)
        with pytest.raises(UnsupportedModelError, match=r"computes something else over the ragged cache.*sequential"):
            ContextGenerator(model, token_budget=8, balance=1).contexts(**GOOD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_positions_may_be_off_in_half_precision(dtype, monkeypatch):
    """Rounding does that to a token that a model has hardly seen; in fp32 it would be a fault."""
    model = tiny_model("llama").to(dtype)
    original = model.model.layers[1].self_attn.forward

    def off_at_one_position(hidden_states, **kwargs):
        output, weights = original(hidden_states, **kwargs)
        output[:, 5:6] += 100.0 * ("ragged_pass" in kwargs)
        return output, weights

    monkeypatch.setattr(model.model.layers[1].self_attn, "forward", off_at_one_position)
    if dtype == torch.float32:
        with pytest.raises(UnsupportedModelError, match="computes something else"):
            ContextGenerator(model, token_budget=8, balance=1).contexts(**GOOD)
    else:
        ContextGenerator(model, token_budget=64, balance=8).contexts(**GOOD)


def test_an_error_inside_a_pass_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_model("llama").train()
    generator = ContextGenerator(model, token_budget=8, balance=1)
    generator.contexts(**GOOD)
    monkeypatch.setattr("selfgen.context.fixed_point.FixedPoint.commit", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generator.contexts(**GOOD)
    assert model.config._attn_implementation == "sdpa"
    assert all(module.training for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


NEW_KEYWORDS = {
    "sparse": False,
    "page_table": None,
    "output_attentions": True,
    "cu_seq_lens_q": torch.tensor([0, 4], dtype=torch.int32),
}


def test_new_keywords_of_an_attention_that_say_nothing_are_passed_over(monkeypatch):
    """A version of transformers that hands one to every attention must not shut every model out."""
    model = tiny_model("llama")
    expected = ContextGenerator(model, token_budget=8, balance=1).contexts(**GOOD)
    hand_to_attention(monkeypatch, **NEW_KEYWORDS)
    assert torch.equal(
        ContextGenerator(model, token_budget=8, balance=1).contexts(**GOOD).tokens[0], expected.tokens[0]
    )


@pytest.mark.parametrize("value", [0, 0.5, True, "sparse", torch.zeros(2)])
def test_new_keywords_of_an_attention_that_may_change_it_are_refused_by_name(monkeypatch, value):
    hand_to_attention(monkeypatch, **NEW_KEYWORDS, bias_of_heads=value)
    with pytest.raises(UnsupportedModelError, match=r"LlamaAttention uses bias_of_heads, which the ragged path"):
        ContextGenerator(tiny_model("llama"), token_budget=8, balance=1).contexts(**GOOD)


def hand_to_attention(monkeypatch, **keywords) -> None:
    """As a newer transformers may: every layer of a Llama hands ``keywords`` to the attention function."""
    original = t.models.llama.modeling_llama.LlamaAttention.forward

    def forward(self, *args, **kwargs):
        given = keywords if "ragged_pass" in kwargs else {}
        return original(self, *args, **kwargs, **given)

    monkeypatch.setattr(t.models.llama.modeling_llama.LlamaAttention, "forward", forward)


def test_prompt_learning_adapters_are_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny_model("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(ValueError, match="prompt-learning adapters"):
        ContextGenerator(model)
