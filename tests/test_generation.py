"""Free-running generation: the sequential loop's tokens and transformers' greedy ones, in any batch; corrections."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import pytest
import torch
import transformers as t
from helpers.contexts import PER_FAMILY, batches, checked_as
from helpers.data import TEMPLATE, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from models import BASE, VOCAB, each_family, tiny_model
from transformers import AutoTokenizer

from selfgen import ContextGenerator, answer, generate_corrected
from selfgen.context import generator as engine
from selfgen.context.models import room_for_answers
from selfgen.correction import CorrectionCue
from selfgen_kernels import sample_mix

model_of = cache(tiny_model)


@cache
def generator_of(family: str):
    return ContextGenerator(model_of(family))


EOS = 2


def until_eos(tokens: torch.Tensor, stop: list[int]) -> torch.Tensor:
    ends = torch.isin(tokens, torch.tensor(stop, dtype=torch.int64)).nonzero()[:, 0].tolist()
    return tokens[: ends[0] + 1] if ends else tokens


@each_family()
@PER_FAMILY
@given(
    batch=batches(max_rows=8),
    temperature=st.sampled_from([0.0, 1.0]),
    batch_size=st.integers(1, 9),
    longest=st.integers(1, 20),
    stop=st.lists(st.integers(0, VOCAB - 1), max_size=12),
)
def test_answers_are_the_sequential_loops(family, batch, temperature, batch_size, longest, stop):
    """With p = 1, up to where they end, however few places there are."""
    prompts, _, ids = batch
    generator = checked_as(ContextGenerator(model_of(family), temperature=temperature), generator_of(family))
    nothing = [torch.zeros(longest, dtype=torch.int64)] * len(prompts)
    expected = generator.contexts(prompts, nothing, 1.0, seed=7, sample_ids=ids, method="sequential")
    answers = generator.answer(
        prompts, max_new_tokens=longest, seed=7, sample_ids=ids, batch_size=batch_size, eos_token_ids=stop
    )
    for found, want, finished in zip(answers.tokens, expected.tokens, answers.finished, strict=True):
        assert torch.equal(found, until_eos(want, stop))
        assert finished == (int(found[-1]) in stop)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_greedy_answers_are_transformers(family):
    model = model_of(family)
    prompts = [torch.arange(3, 3 + length) for length in (1, 4, 9, 2, 6)]
    answers = answer(model, prompts, max_new_tokens=15, batch_size=2)
    for prompt, found in zip(prompts, answers.tokens, strict=True):
        want = model.generate(prompt[None], max_new_tokens=15, do_sample=False)[0, len(prompt) :]
        assert torch.equal(found, want)


def test_places_are_taken_again():
    """A short row's place goes to the next prompt at once: fewer passes than batches one after the other would take."""
    model = model_of("llama")
    prompts = [[token] for token in range(3, 23)]
    lengths = [len(row) for row in answer(model, prompts, max_new_tokens=40, eos_token_ids=range(0, VOCAB, 9)).tokens]
    assert len(set(lengths)) > 4
    answers = answer(model, prompts, max_new_tokens=40, eos_token_ids=range(0, VOCAB, 9), batch_size=4)
    assert [len(row) for row in answers.tokens] == lengths
    assert answers.passes < sum(max(lengths[first : first + 4]) for first in range(0, 20, 4))
    assert answers.passes >= sum(lengths) / 4
    assert answers.tokens_computed == sum(lengths)  # prompts of one token; the last one is not computed


def test_filters():
    model = model_of("llama")
    generator = ContextGenerator(model)
    best = answer(model, [[5]], max_new_tokens=10).tokens[0]
    assert torch.equal(generator.answer([[5]], max_new_tokens=10, top_k=1).tokens[0], best)
    assert torch.equal(generator.answer([[5]], max_new_tokens=10, min_p=1.0).tokens[0], best)
    assert not torch.equal(generator.answer([[5]], max_new_tokens=10).tokens[0], best)


def test_no_more_tokens_than_the_model_has_positions():
    model = model_of("llama")  # 256
    answers = answer(model, [[3] * 250, [4] * 10], max_new_tokens=300, eos_token_ids=[])
    assert [len(row) for row in answers.tokens] == [6, 246]
    assert answers.finished == [False, False]


def test_room_for_answers():
    model = model_of("llama")  # 256
    assert room_for_answers(model, [[3] * 250, torch.tensor([4])]) == [6, 255]
    assert room_for_answers(model, [[3] * 250], cue_length=5) == [1]
    with pytest.raises(ValueError, match=r"prompts\[1\] has 256 tokens; the model has 256 .*: shorten the prompt$"):
        room_for_answers(model, [[3], [3] * 256])
    with pytest.raises(ValueError, match=r"prompts\[0\] has 250 tokens and the cue 6; .* the prompt or the cue$"):
        room_for_answers(model, [[3] * 250], cue_length=6)
    without = SimpleNamespace(config=t.BloomConfig())
    assert room_for_answers(without, [[3]], cue_length=2) == [2**31 - 3]


ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 6}
REFUSED = {
    "gpt_neo": lambda: t.GPTNeoConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64,
        initializer_range=0.3,
    ),
    "bloom": lambda: t.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3),
    "mamba": lambda: t.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, initializer_range=0.3),
    "mpt": lambda: t.MptConfig(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4, initializer_range=0.3),
    "rwkv": lambda: t.RwkvConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
    "git": lambda: t.GitConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.3,
    ),
    "longrope": lambda: t.LlamaConfig(
        **BASE, rope_parameters=ROPE | {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    ),
    "nemotron": lambda: t.NemotronConfig(**BASE),  # which only the probe refuses
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("family", REFUSED)
@pytest.mark.each_value
def test_models_that_the_ragged_path_refuses(family, temperature):
    """Their answers are those of whole contexts computed anew at every token, whatever is computed together."""
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(REFUSED[family]()).eval()
    model.generation_config.repetition_penalty = 5.0  # not asked for
    prompts = [[5, 6], [7], [8, 9], [4, 4, 4], [10, 3], [11]]
    stop = list(range(0, VOCAB, 6))
    assert engine.inspect_model(model, 20).missing or not ContextGenerator(model)._runs_ragged()
    found = ContextGenerator(model, temperature=temperature).answer(
        prompts, max_new_tokens=12, seed=3, sample_ids=range(20, 26), eos_token_ids=stop, batch_size=3
    )
    assert len(set(map(len, found.tokens))) > 1
    assert any(found.finished)
    for row, (prompt, tokens) in enumerate(zip(prompts, found.tokens, strict=True)):
        context = torch.tensor(prompt)
        for place, token in enumerate(tokens.tolist()):
            with torch.no_grad():
                logits = model(input_ids=context[None]).logits[:, -1]
            want, _ = sample_mix(
                logits, context[-1:], 1.0, seed=3, sample_ids=torch.tensor([20 + row]),
                positions=torch.tensor([place]), temperature=temperature,
            )  # fmt: skip
            assert token == int(want)
            context = torch.cat([context, want])
        assert found.finished[row] == (int(tokens[-1]) in stop)
        assert found.finished[row] or len(tokens) == 12
    assert model.generation_config.repetition_penalty == 5.0


def test_the_model_is_left_as_it_was():
    model = tiny_model("llama").train()
    before, random = model.config._attn_implementation, torch.get_rng_state()
    answer(model, [[5]], max_new_tokens=3, temperature=1.0)
    assert model.training
    assert model.config._attn_implementation == before
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, "empty"),
        ([[VOCAB]], {}, "vocabulary"),
        ([[3] * 256], {}, "none is left"),
        ([[3]], {"max_new_tokens": 0}, ">= 1"),
        ([[3]], {"batch_size": 0}, ">= 1"),
        ([[3], [4]], {"sample_ids": [1, 1]}, "unique"),
    ],
)
def test_bad_arguments(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        answer(model_of("llama"), prompts, **{"max_new_tokens": 4} | options)


def test_nothing_to_do():
    assert answer(model_of("llama"), [], max_new_tokens=4).tokens == []


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(TEMPLATE, size=VOCAB)


def test_corrections_answer_the_conversation(tokenizer):
    """Each round is the answer to the prompt, the answer before it and the cue, token for token as the template's."""
    model = model_of("llama")
    prompt = [5, 6, 7]
    found = generate_corrected(model, tokenizer, [prompt], rounds=2, cue="Again", max_new_tokens=8, temperature=0.0)
    between = CorrectionCue.of(tokenizer, "Again")
    want = first = answer(model, [prompt], max_new_tokens=8).tokens[0]
    for _ in range(2):
        want = answer(model, [between.prompt(prompt, want.tolist())], max_new_tokens=8).tokens[0]
    assert torch.equal(found.first[0], first)
    assert torch.equal(found.corrected[0], want)


def test_the_cue_is_that_of_smollm2s_template(smollm2_folder):
    """Prompt, answer and cue are the ids of the rendered conversation."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    turns = [
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": "It is 3."},
        {"role": "user", "content": "Look again."},
    ]
    prompt, answer = (
        tokenizer(text, add_special_tokens=False).input_ids
        for text in (tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=False), "It is 3.")
    )
    whole = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    between = CorrectionCue.of(tokenizer, "Look again.")
    want = tokenizer(whole, add_special_tokens=False).input_ids
    assert between.prompt(prompt, answer) == want
    assert between.prompt(prompt, [*answer, tokenizer.eos_token_id]) == want  # as the model ends it


def test_the_plain_call(tokenizer):
    """With no options at all; what ends a tokenizer's text ends an answer, too, whatever the model's own stop ids."""
    model = tiny_model("llama")
    found = generate_corrected(model, tokenizer, ["a b", "c"])
    assert all(map(len, found.corrected))
    model.generation_config.eos_token_id = [127]
    found = generate_corrected(model, tokenizer, [[5, place] for place in range(3, 30)], max_new_tokens=48)
    for tokens in found.first + found.corrected:
        assert not torch.isin(tokens[:-1], torch.tensor([tokenizer.eos_token_id, 127])).any()


def test_a_long_answer_is_shown_cut(tokenizer, caplog):
    """A row with few positions left does not stop the others; one with none behind the cue is named."""
    model = model_of("llama")
    limit, between = model.config.max_position_embeddings, CorrectionCue.of(tokenizer, "Again")
    prompts = [[5] * (limit - 60), [6] * 5]
    options = {"cue": "Again", "max_new_tokens": 56, "eos_token_ids": [], "temperature": 0.0}
    found = generate_corrected(model, tokenizer, prompts, **options)
    left = 60 - len(between.ids)
    first = found.first[0].tolist()
    whole = len(between.ended(first))
    assert found.cut == [whole > left // 2, False]
    asked = between.prompt(prompts[0], between.ended(first)[: left // 2])
    want = answer(model, [asked], max_new_tokens=56, eos_token_ids=sorted(between.stop_ids)).tokens[0]
    assert torch.equal(found.corrected[0], want)
    assert ("1 of 2 answers were shown cut" in caplog.text) == found.cut[0]
    with pytest.raises(ValueError, match=r"prompts\[1\] has .* tokens and the cue"):
        generate_corrected(model, tokenizer, [[5], [5] * (limit - len(between.ids))], **options)


def test_answers_of_logits_that_are_not_finite_are_told_of(caplog):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    answer(model, [[5, 6]], max_new_tokens=4)
    assert "logits were not finite" in caplog.text


@pytest.mark.parametrize(("rounds", "cue", "message"), [(0, None, ">= 1"), (1, "  ", "empty")])
def test_bad_corrections(tokenizer, rounds, cue, message):
    with pytest.raises(ValueError, match=message):
        generate_corrected(model_of("llama"), tokenizer, [[3]], rounds=rounds, cue=cue, max_new_tokens=4)


@pytest.mark.slow
def test_smollm2_answers_as_transformers_does(smollm2, math_rows):
    model, _ = smollm2
    prompts = math_rows[0][:6]
    answers = answer(model, prompts, max_new_tokens=60, batch_size=4)
    for prompt, found in zip(prompts, answers.tokens, strict=True):
        row = torch.tensor(prompt)[None]
        want = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=60, do_sample=False)
        assert torch.equal(found, want[0, len(prompt) :])
