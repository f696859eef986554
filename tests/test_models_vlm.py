"""Models that also see or hear, on rows of text: their decoder is reused, and they get what they need beside tokens."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from helpers.data import TEMPLATE, make_tokenizer
from helpers.training import (
    Tokenizer,
    config,
    distance,
    generate,
    gradients,
    losses_of,
    make_rac_trainer,
    make_trainer,
    padded,
    rows,
    weights,
)
from models import VOCAB, tiny_model
from transformers import AutoModelForCausalLM
from zoo.definition import SEED, wrong_tokens
from zoo.families import decoder, multimodal, multimodal_families

from selfgen import BSSTrainer, ContextGenerator, UnsupportedModelError
from selfgen.cli.options import ModelArguments
from selfgen.context.hidden_states import ReuseError, decoder_layers
from selfgen.context.models import auto_class_of, cache_argument, text_inputs, text_positions
from selfgen.data import DataError
from selfgen.evaluation.losses import held_out_losses
from selfgen.training.reuse import reuse_passes


@pytest.fixture
def tiny():
    def build(name):
        if name not in multimodal_families():
            pytest.skip(f"{name} is not in this version of transformers")
        return multimodal(name)

    return build


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("gemma3", "model.language_model.layers.0 model.language_model.layers.1"),
        ("phi4_multimodal", "model.layers.0 model.layers.1"),
        ("mllama", "model.language_model.layers.0 model.language_model.layers.2"),  # 1 attends to an image
    ],
)
@pytest.mark.one_case
def test_decoder_layers_are_those_that_text_goes_through(tiny, name, layers):
    model = tiny(name)
    names = {module: name for name, module in model.named_modules()}
    assert " ".join(names[layer] for layer in decoder_layers(model)) == layers


def test_the_decoder_alone_leaves_out_what_attends_to_an_image():
    model = decoder("mllama")
    assert decoder_layers(model) == [model.model.layers[0], model.model.layers[2]]


def test_noise_in_a_tower_is_none_of_the_texts(tiny):
    model = tiny("gemma3")
    dropout = torch.nn.Dropout(0.5)
    model.model.vision_tower.add_module("dropout", dropout)
    assert len(decoder_layers(model)) == 2
    model.model.language_model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(ReuseError, match=r"attention_dropout of model\.language_model\.layers\.0\.self_attn is 0\.1"):
        decoder_layers(model)


@pytest.mark.parametrize("name", ["gemma3", "mllama", "molmo2", "phi4_multimodal", "qwen2_audio", "qwen2_vl"])
def test_loss_and_gradients_are_those_of_the_ordinary_step(tiny, name):
    model, data = tiny(name), rows(5)
    mixed = generate(model, data, keep_hidden_states=True)
    inputs, slots = padded(model, data, mixed)
    model.train()
    inputs |= text_inputs(model, inputs["input_ids"])
    ordinary = model(**inputs).loss
    ordinary.backward()
    want = gradients(model)
    with reuse_passes(mixed.hidden_states, slots) as taken:
        reused = model(**inputs).loss
    reused.backward()
    assert taken == list(range(len(mixed.hidden_states.layers)))
    torch.testing.assert_close(reused, ordinary, rtol=1e-5, atol=0)
    assert distance(gradients(model), want) <= 1e-5


@pytest.mark.parametrize("name", ["gemma3", "molmo2", "qwen2_vl"])
def test_only_what_is_demanded_is_given(tiny, name):
    """Molmo 2 wants types in training, and Gemma 3 in older versions of transformers; later it takes them only."""
    model, ids = tiny(name), torch.tensor([[5, 6, 7]])
    before = torch.get_rng_state()
    assert text_inputs(model.eval(), ids) == {}
    found = text_inputs(model.train(), ids)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(types, torch.zeros_like(ids)) for types in found.values())
    assert bool(found) or name != "molmo2"
    with pytest.raises(ValueError, match=next(iter(found))) if found else nullcontext():
        model(input_ids=ids)


def demanding(model, *, always: bool = False):
    """Make a Gemma 3 want types in training, as transformers 5.0's does, or always."""
    own = type(model.model).forward

    def forward(self, *args, token_type_ids=None, **kwargs):
        if token_type_ids is None and (self.training or always):
            raise ValueError("`token_type_ids` is required as a model input when training")
        return own(self, *args, token_type_ids=token_type_ids, **kwargs)

    model.model.forward = forward.__get__(model.model)
    return model


@pytest.mark.parametrize(("always", "reuse"), [(False, True), (True, False)])
@pytest.mark.one_case
def test_a_model_that_demands_types_is_trained(tiny, tmp_path, always, reuse):
    def trainer(folder, model):
        options = {"max_steps": 2, "report_to": [], "reuse_passes": reuse, "kl_weight": 0.1}
        return make_trainer(tmp_path / folder, model, **options)

    plain = losses_of(trainer("plain", tiny("gemma3")))
    found = losses_of(trainer("demanding", demanding(tiny("gemma3"), always=always)))
    for (loss, _), (want, _) in zip(found, plain, strict=True):
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)


def test_types_are_given_to_every_forward(tiny, tmp_path):
    model = demanding(tiny("gemma3"), always=True)
    generator, data = ContextGenerator(model, token_budget=16, balance=2), rows(4)
    losses = held_out_losses(generator, data, {"reference": 0.0, "own": 1.0}, progress=False)
    want = held_out_losses(ContextGenerator(tiny("gemma3")), data, {"reference": 0.0, "own": 1.0}, progress=False)
    assert losses["own"].mean == pytest.approx(want["own"].mean, rel=1e-5)
    trainer = BSSTrainer(
        model, config(tmp_path / "bss", report_to=[]), train_dataset=data, eval_dataset=data,
        processing_class=Tokenizer(),
    )  # fmt: skip
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses["reference"].mean, rel=1e-4)
    make_rac_trainer(tmp_path / "rac", model=tiny("molmo2"), own_answer="generated").train()


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_5"])  # the second one is decoded one token at a time
@pytest.mark.one_case
def test_text_does_not_see_a_shift_that_a_forward_over_images_left(tiny, name, tmp_path):
    prompts, references = [[5, 6, 7, 8], [9, 10]], [[11, 12, 13], [14, 15, 16, 17]]
    method = "sequential" if name == "qwen3_5" else "fixed_point"

    def everything(model):
        generator = ContextGenerator(model, token_budget=16, balance=2)
        mixed = generator.contexts(prompts, references, 1.0, seed=SEED, sample_ids=[0, 1], method=method)
        answers = generator.answer(prompts, max_new_tokens=6, seed=SEED, eos_token_ids=[])
        trainer = make_trainer(tmp_path, model, max_steps=1, context_method=method, report_to=[])
        return mixed, [*mixed.tokens, *answers.tokens, *(loss for loss, _ in losses_of(trainer))]

    model, shifted = tiny(name), tiny(name)
    mixed, want = everything(model)
    tensors = [list(map(torch.tensor, part)) for part in (prompts, references)]
    assert wrong_tokens(tiny(name), *tensors, mixed) == 0
    shifted.model.rope_deltas = deltas = torch.tensor([[40]])
    _, found = everything(shifted)
    assert all(map(torch.equal, found, want))
    assert shifted.model.rope_deltas is deltas


def test_positions_are_put_aside_and_come_back(tiny):
    """A forward over a cache adds the shift of the last forward over images, whatever its tokens are."""
    model = tiny("qwen2_vl")
    ids = torch.tensor([[5, 6, 7, 8]])

    def over_a_cache():
        with torch.no_grad():
            first = model(input_ids=ids[:, :3], use_cache=True)
            cache = first.get("cache", first.get("past_key_values"))
            return model(input_ids=ids[:, 3:], use_cache=True, **{cache_argument(model): cache}).logits[0, -1]

    with torch.no_grad():
        want = model(input_ids=ids).logits[0, -1]
    model.model.rope_deltas = deltas = torch.tensor([[40]])
    assert (over_a_cache() - want).abs().max() > 1e-2
    with text_positions(model):
        torch.testing.assert_close(over_a_cache(), want)
    assert model.model.rope_deltas is deltas
    with pytest.raises(RuntimeError), text_positions(model):
        raise RuntimeError
    assert model.model.rope_deltas is deltas


@pytest.mark.parametrize("name", ["video_llama_3", "moss_transcribe_diarize", "qwen2_vl", "llava_onevision"])
def test_answers_are_those_of_the_models_own_forward(tiny, name):
    """Also of a class that takes no logits_to_keep, or hands position_ids on."""
    model = tiny(name)
    prompts = [torch.arange(4, 9), torch.arange(20, 23)]
    answers = ContextGenerator(model, temperature=0.0).answer(prompts, max_new_tokens=5, eos_token_ids=[])
    for prompt, answer in zip(prompts, answers.tokens, strict=True):
        context = prompt
        for token in answer:
            with torch.no_grad():
                assert model(input_ids=context[None]).logits[0, -1].argmax() == token
            context = torch.cat([context, token[None]])


def test_a_class_that_needs_an_image_is_refused_by_name(tiny):
    generator = ContextGenerator(tiny("idefics"))
    for method in ("fixed_point", "sequential"):
        with pytest.raises(UnsupportedModelError, match=r"Idefics\w+ .*pixel_values.*give a causal language model"):
            generator.contexts([[5, 6]], [[7]], 1.0, seed=0, sample_ids=[0], method=method)


def test_a_row_with_an_image_is_dropped_and_counted_or_refused(tiny, tmp_path, caplog):
    text = [{"type": "text", "text": "a b"}]
    data = Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": text}]}
            for parts in (text, [{"type": "image", "url": "cat.png"}, *text])
        ]
    )

    def trainer(**options):
        return BSSTrainer(
            tiny("gemma3"), config(tmp_path, report_to=[], **options), train_dataset=data,
            processing_class=make_tokenizer(TEMPLATE, size=VOCAB),
        )  # fmt: skip

    assert trainer(max_steps=1).train().training_loss > 0
    assert "1 kept, 1 dropped (1 a content part of type 'image', which is not text: row 1)" in caplog.text
    with pytest.raises(DataError, match=r"strict_data.*1 dropped \(1 a content part of type 'image'"):
        trainer(strict_data=True)


def test_such_a_model_is_loaded_by_name(tiny, tmp_path):
    """`AutoModelForCausalLM` does not know Qwen2-VL."""
    tokenizer = make_tokenizer(TEMPLATE, size=VOCAB)
    for part in (tiny("qwen2_vl"), tokenizer):
        part.save_pretrained(tmp_path / "model")
    trainer = make_trainer(tmp_path / "run", str(tmp_path / "model"), max_steps=1, report_to=[])
    assert type(trainer.model).__name__ == "Qwen2VLForConditionalGeneration"
    assert trainer.train().training_loss > 0
    trainer.save_model(tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")
    model = ModelArguments(str(tmp_path / "trained")).load_model()
    assert type(model) is type(trainer.model)
    assert torch.equal(weights(model), weights(trainer.model))


def test_others_are_loaded_as_ever(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    assert auto_class_of(str(tmp_path)) is AutoModelForCausalLM
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        auto_class_of(str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match=r"config\.json is a file: give the folder of a checkpoint"):
        auto_class_of(str(tmp_path / "config.json"))
