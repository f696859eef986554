"""What no configuration tells of a model is found out by running it: windows in masks, positions, batches, and order.

The measure is the model's own forward over each prefix alone (``zoo/definition.py``).
"""

from __future__ import annotations

import logging

import pytest
import torch
import transformers as t
from helpers.training import make_rac_trainer, make_trainer
from models import BASE, tiny_model
from zoo.definition import contexts, rows, wrong_tokens

from selfgen import ContextGenerator, UnsupportedModelError
from selfgen.context.sequential import ALONE, ROW_BY_ROW, TOGETHER
from selfgen.context.support import lengths_of
from selfgen.context.verification import Verification

NO_HEAD_DIM = {name: value for name, value in BASE.items() if name != "head_dim"}
OLD = {name: value for name, value in NO_HEAD_DIM.items() if name != "num_key_value_heads"}
EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 24}


def make(config):
    torch.manual_seed(0)
    if config.model_type == "paligemma":
        return t.PaliGemmaForConditionalGeneration(config).eval()
    return t.AutoModelForCausalLM.from_config(config).eval()


def qwen2_moe(window):
    return t.Qwen2MoeConfig(
        **NO_HEAD_DIM, **EXPERTS, shared_expert_intermediate_size=24, use_sliding_window=True, sliding_window=window
    )


def phimoe(window):
    return t.PhimoeConfig(**NO_HEAD_DIM, **EXPERTS, sliding_window=window)


def long_rows(window):
    return rows([(window + 6, 30), (5, window + 20), (3, 4)])


@pytest.mark.parametrize("window", [6, 24, 60])
@pytest.mark.parametrize("config", [qwen2_moe, phimoe])
@pytest.mark.each_value
def test_a_window_that_only_the_mask_has_is_refused_by_name(config, window):
    model = make(config(window))
    prompts, references = long_rows(window)
    with pytest.raises(UnsupportedModelError, match=r"MoeAttention|PhimoeAttention.* mask alone.*sequential"):
        contexts(model, prompts, references)
    mixed = contexts(model, prompts, references, method="sequential")
    assert wrong_tokens(model, prompts, references, mixed) == 0


@pytest.mark.parametrize("config", [qwen2_moe, phimoe])
def test_rows_inside_such_a_window_are_exact(config):
    model = make(config(60))
    prompts, references = rows([(30, 29), (3, 9)])
    assert wrong_tokens(model, prompts, references, contexts(model, prompts, references)) == 0
    generator = ContextGenerator(model, token_budget=16, balance=2)
    arguments = {"self_prob": 0.5, "seed": 0, "sample_ids": [0]}
    generator.contexts([[5] * 20], [[6] * 30], **arguments)
    with pytest.raises(UnsupportedModelError, match="mask alone"):  # later, when such a row comes
        generator.contexts([[5] * 40], [[6] * 30], **arguments)
    generator.contexts([[5] * 20], [[6] * 30], **arguments)


@pytest.mark.parametrize("window", [24, 60])
def test_windows_that_layers_tell_of_are_exact(window):
    """The counterpart: nothing is refused that the ragged path computes."""
    model = make(t.MistralConfig(**BASE, sliding_window=window))
    prompts, references = long_rows(window)
    assert wrong_tokens(model, prompts, references, contexts(model, prompts, references)) == 0


def test_answers_beyond_such_a_window():
    model = make(phimoe(24))
    prompt = [list(range(5, 25))]
    found = ContextGenerator(model, temperature=0.0).answer(prompt, max_new_tokens=40, eos_token_ids=[])
    context = torch.tensor(prompt[0])
    for token in found.tokens[0]:
        with torch.no_grad():
            assert token == model(input_ids=context[None]).logits[0, -1].argmax()
        context = torch.cat([context, token[None]])


def test_a_window_that_attention_is_told_of_but_does_not_have(monkeypatch):
    """A full mask and a window as keyword: torch's attention goes by the mask."""
    model = tiny_model("llama")
    hand_over = t.models.llama.modeling_llama.LlamaAttention.forward
    monkeypatch.setattr(
        t.models.llama.modeling_llama.LlamaAttention,
        "forward",
        lambda self, *args, **kwargs: hand_over(self, *args, **kwargs, sliding_window=40),
    )
    prompts, references = rows([(30, 30)])
    with pytest.raises(UnsupportedModelError, match="LlamaAttention restricts attention by its mask alone"):
        contexts(model, prompts, references)
    contexts(model, *rows([(20, 20)]))


def test_what_changes_with_the_position_is_tried_where_it_changes(monkeypatch):
    """A scale that counts tokens of the pass instead of positions, from the 30th on, as Llama 4 has one."""
    model = tiny_model("llama")
    model.config.floor_scale = 30
    own = model.model.layers[0].forward

    def scaled(hidden_states, **kwargs):
        place = torch.arange(hidden_states.shape[1])[None, :, None]
        return own(hidden_states * (1 + (place >= 30)), **kwargs)

    monkeypatch.setattr(model.model.layers[0], "forward", scaled)
    prompts, references = rows([(20, 9)])
    contexts(model, prompts, references)
    with pytest.raises(UnsupportedModelError, match="computes something else over the ragged cache"):
        contexts(model, *rows([(20, 12)]))


def test_which_numbers_of_a_configuration_a_row_may_grow_beyond():
    assert lengths_of(tiny_model("llama")) == []
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    assert 64 in lengths_of(make(t.LlamaConfig(**BASE, rope_parameters=rope)))
    assert 24 in lengths_of(make(t.MistralConfig(**BASE, sliding_window=24)))
    model = tiny_model("llama")
    model.config.some_new_option = {"local_size": 30, "deeper": [77]}
    assert lengths_of(model) == [30, 77]


ELSEWHERE = {  # positions that begin after the padding id
    "roberta": lambda: t.RobertaConfig(**OLD | {"pad_token_id": 1}, is_decoder=True),
    "xlm-roberta": lambda: t.XLMRobertaConfig(**OLD, is_decoder=True),
    "camembert": lambda: t.CamembertConfig(**OLD | {"pad_token_id": 5}, is_decoder=True),
    "xlm-roberta-xl": lambda: t.XLMRobertaXLConfig(**OLD | {"pad_token_id": 1}, is_decoder=True),
    "data2vec-text": lambda: t.Data2VecTextConfig(**OLD | {"pad_token_id": 1}, is_decoder=True),
}


@pytest.mark.parametrize("family", ELSEWHERE)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.each_value
def test_positions_that_begin_elsewhere(family, temperature):
    model = make(ELSEWHERE[family]())
    prompts, references = rows([(30, 9), (3, 9), (5, 30)])
    prompts[0][7] = model.config.pad_token_id
    generator = ContextGenerator(model, temperature=temperature, token_budget=16, balance=2)
    arguments = {"self_prob": 0.5, "seed": 3, "sample_ids": [0, 1, 2]}
    mixed = generator.contexts(prompts, references, **arguments, method="sequential")
    assert wrong_tokens(model, prompts, references, mixed, temperature) == 0
    with pytest.raises(UnsupportedModelError, match="computes something else"):
        generator.contexts(prompts, references, **arguments)


def test_rows_end_where_positions_do():
    """RoBERTa's first token is at the padding id + 1."""
    model = make(t.RobertaConfig(**OLD | {"pad_token_id": 1, "max_position_embeddings": 32}, is_decoder=True))
    contexts(model, [[5] * 10], [[6] * 20], method="sequential")
    with pytest.raises(ValueError, match="row 0 has 31 tokens; the model has 30 positions"):
        contexts(model, [[5] * 11], [[6] * 20], method="sequential")


def llama4(**extra):
    return t.Llama4TextConfig(
        **BASE, intermediate_size_mlp=48, num_local_experts=2, num_experts_per_tok=1, attention_chunk_size=128,
        no_rope_layers=[0, 0], layer_types=["full_attention"] * 2, **extra,
    )  # fmt: skip


def test_a_temperature_that_counts_padding():
    model = make(llama4(floor_scale=16, attn_scale=2.0, attn_temperature_tuning=True))
    prompts, references = rows([(30, 9), (3, 9), (5, 30)])
    mixed = contexts(model, prompts, references, method="sequential")
    assert wrong_tokens(model, prompts, references, mixed) == 0
    with pytest.raises(UnsupportedModelError):
        contexts(model, prompts, references)


def test_how_rows_are_decoded(caplog):
    def strategy(model):
        with torch.no_grad():
            return Verification(model).strategy(60)

    assert strategy(tiny_model("llama")) == TOGETHER
    with caplog.at_level(logging.WARNING):
        assert strategy(make(llama4(floor_scale=16, attn_scale=2.0, attn_temperature_tuning=True))) == ROW_BY_ROW
    assert "row by row, over a cache, which is slower" in caplog.text
    assert strategy(make(ELSEWHERE["roberta"]())) == ALONE


AHEAD = {
    "bert": lambda: t.BertConfig(**OLD),
    "gemma3": lambda: t.Gemma3TextConfig(**BASE, use_bidirectional_attention=True, sliding_window=7),
    "doge": lambda: t.DogeConfig(**NO_HEAD_DIM, is_moe=True, num_experts=16, num_experts_per_tok=4),
    "not causal": lambda: t.LlamaConfig(**BASE, is_causal=False),
    "paligemma": lambda: t.PaliGemmaConfig(
        text_config=t.GemmaConfig(**BASE).to_dict(),
        vision_config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"image_size": 16, "patch_size": 8, "projection_dim": 32, "model_type": "siglip_vision_model"},
        image_token_index=130,
        projection_dim=32,
        hidden_size=32,
    ),
}


@pytest.mark.parametrize("method", ["fixed_point", "sequential"])
@pytest.mark.parametrize("family", AHEAD)
def test_models_that_look_ahead_are_refused_by_every_method(family, method):
    model = make(AHEAD[family]())
    with pytest.raises(UnsupportedModelError, match=r"looks ahead: other tokens at the end .*see the answer"):
        contexts(model, *rows([(5, 9), (3, 4)]), method=method)


def test_a_model_that_is_not_run_on_tokens_alone_is_refused_in_one_line():
    model = tiny_model("llama")

    def forward(input_ids=None, pixel_values=None, **kwargs):
        raise ValueError("give\npixel_values")

    model.forward = forward
    for method in ("fixed_point", "sequential"):
        with pytest.raises(UnsupportedModelError, match=r"rows of tokens alone \(ValueError: give pixel_values\)"):
            contexts(model, *rows([(5, 9)]), method=method)


def test_answers_are_looked_at_again_where_padding_or_a_length_is_new():
    """Rows of one length, then padded ones: RoBERTa's positions are right in the first alone."""
    model = make(ELSEWHERE["roberta"]())
    generator = ContextGenerator(model, temperature=0.0)
    alike, ragged = rows([(6, 1)] * 4)[0], rows([(4, 1), (25, 1), (2, 1)])[0]
    for prompts in (alike, alike, ragged):
        found = generator.answer(prompts, max_new_tokens=40, eos_token_ids=[])
        for prompt, tokens in zip(prompts, found.tokens, strict=True):
            context = torch.cat([prompt, tokens])
            with torch.no_grad():
                want = model(input_ids=context[None]).logits[0, len(prompt) - 1 : -1].argmax(-1)
            assert torch.equal(tokens, want)


def test_a_vocabulary_of_special_tokens_alone():
    model = make(t.LlamaConfig(**BASE | {"vocab_size": 3}))
    mixed = contexts(model, [torch.tensor([1, 2])], [torch.tensor([0, 1, 2])])
    assert len(mixed.tokens[0]) == 3


@pytest.mark.parametrize("self_prob", [0.0, 0.5])
@pytest.mark.parametrize("make_one", [make_trainer, make_rac_trainer])
@pytest.mark.parametrize("family", ["bert", "doge", "not causal", "paligemma"])
def test_models_that_look_ahead_are_not_trained(family, make_one, self_prob, tmp_path):
    """Also on references alone: the loss of a model that sees the answer teaches nothing."""
    with pytest.raises(UnsupportedModelError, match=r"looks ahead: .*see the answer that it learns to predict"):
        make_one(tmp_path, model=make(AHEAD[family]()), self_prob=self_prob, max_length=64)


def test_what_was_found_is_not_tried_again(monkeypatch):
    model = make(phimoe(24))
    generator = ContextGenerator(model, token_budget=16, balance=2)
    arguments = {"self_prob": 0.5, "seed": 0, "sample_ids": [0]}
    forwards: list[int] = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    for tried in (True, False):
        forwards.clear()
        with pytest.raises(UnsupportedModelError, match="mask alone"):
            generator.contexts([[5] * 20], [[6] * 30], **arguments)
        assert bool(forwards) == tried


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_of_nan_is_not_what_is_refused(dtype):
    """Its contexts keep the reference, and count the tokens."""
    model = tiny_model("llama").to(dtype)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    for method in ("fixed_point", "sequential"):
        mixed = contexts(model, *rows([(5, 9)]), 1.0, method=method)
        assert mixed.stats.invalid == 9


def test_few_positions():
    model = make(t.LlamaConfig(**BASE | {"max_position_embeddings": 8}))
    gpt2 = make(t.GPT2Config(vocab_size=131, n_embd=32, n_layer=2, n_head=4, n_positions=8, initializer_range=0.3))
    for one in (model, gpt2):
        prompts, references = rows([(3, 5), (1, 1)])
        for method in ("fixed_point", "sequential"):
            mixed = contexts(one, prompts, references, method=method)
            assert wrong_tokens(one, prompts, references, mixed) == 0


@pytest.mark.parametrize("method", ["fixed_point", "sequential"])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.one_case
def test_modules_compiled_in_place_run_as_they_are(whole, method):
    """Passes come in ever new sizes, so a compiler would be at it all the time."""
    model = tiny_model("llama")

    def compiler(*args):
        raise AssertionError("compiled")

    for module in [model] if whole else model.model.layers:
        module.compile(backend=compiler)
    prompts, references = rows([(5, 9), (3, 14)])
    mixed = contexts(model, prompts, references, method=method)
    assert wrong_tokens(tiny_model("llama"), prompts, references, mixed) == 0
    with pytest.raises(Exception, match="compiled"):
        model(prompts[0][None])
