"""What used to crash, late or in words of other libraries: it works, or is refused by name before training."""

from __future__ import annotations

import logging
import threading

import accelerate
import pytest
import torch
import transformers as t
from datasets import Dataset
from helpers.contexts import assert_equal, batch
from helpers.data import ROWS, TEMPLATE, make_tokenizer
from helpers.training import Tokenizer, config, make_trainer, rows, weights
from models import BASE, CONFIGS, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig

from selfgen import BSSTrainer, ContextGenerator
from selfgen.training.checkpoints import check_savable

# Configurations that can't be saved


def ends_elsewhere(model, folder, **changes) -> BSSTrainer:
    """A trainer that writes another end of answers into the model's generation configuration."""
    tokenizer = make_tokenizer(TEMPLATE.replace("<eos> <nl>", "<end> <nl>"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    options = config(folder, max_steps=2, save_strategy="steps", save_steps=1, **changes)
    return BSSTrainer(model, options, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False, "temperature": 0.7},
        {"do_sample": False, "top_p": 0.9, "top_k": 20, "min_p": 0.1},
        {"num_beams": 1, "length_penalty": 0.5},
        {"output_scores": True},
    ],
    ids=str,
)
@pytest.mark.each_value
def test_settings_without_effect_are_left_out(tmp_path, caplog, settings, adapter):
    """The checkpoints are written, and what has an effect stays."""
    model = tiny_model("llama")
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0, repetition_penalty=1.1, **settings)
    if adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    trainer = ends_elsewhere(model, tmp_path)
    assert "settings without effect, which are left out" in caplog.text
    trainer.train()
    saved = GenerationConfig.from_pretrained(tmp_path / "checkpoint-2")
    assert saved.repetition_penalty == 1.1
    assert 2 in saved.eos_token_id
    assert len(saved.eos_token_id) == 2


def test_settings_with_an_effect_stay(tmp_path, caplog):
    model = tiny_model("llama")
    model.generation_config = GenerationConfig(eos_token_id=2, do_sample=True, temperature=0.7)
    ends_elsewhere(model, tmp_path).train()
    assert "without effect" not in caplog.text
    assert GenerationConfig.from_pretrained(tmp_path / "checkpoint-1").temperature == 0.7


def test_what_can_not_be_mended_is_refused_at_once(tmp_path):
    model = tiny_model("llama")
    model.generation_config.num_return_sequences = 3
    with pytest.raises(ValueError, match=r"refuses to save model\.generation_config \(.*num_return_seq"):
        make_trainer(tmp_path, model=model)
    model = tiny_model("llama")
    check_savable(model, adapter=False)


# Metrics that no evaluation has

BEST = {
    "load_best_model_at_end": True,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
}


def with_sets(folder, sets, **changes) -> BSSTrainer:
    return BSSTrainer(
        tiny_model("llama"),
        config(folder, max_steps=2, **BEST, **changes),
        train_dataset=rows(),
        eval_dataset=sets,
        processing_class=Tokenizer(),
    )


def test_the_best_of_several_evaluation_sets(tmp_path):
    sets = {"a": rows(3), "b": rows(2)}
    with pytest.raises(ValueError, match=r"metric_for_best_model is 'loss', .* accepted: eval_a_loss, eval_b_loss"):
        with_sets(tmp_path, sets)
    trainer = with_sets(tmp_path, sets, metric_for_best_model="b_loss")
    trainer.train()
    found = [entry["eval_b_loss"] for entry in trainer.state.log_history if "eval_b_loss" in entry]
    assert trainer.state.best_metric == min(found)


def test_a_metric_of_nobody(tmp_path):
    with pytest.raises(ValueError, match=r"metric_for_best_model is 'accuracy', .* accepted: eval_loss"):
        with_sets(tmp_path, rows(3), metric_for_best_model="accuracy")
    with_sets(tmp_path, rows(3)).train()


# Routers, adapters that train tokens, weights that are elsewhere

MOE = {
    "mixtral": lambda: t.MixtralConfig(**BASE, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True),
    "qwen2_moe": lambda: t.Qwen2MoeConfig(
        **{name: value for name, value in BASE.items() if name != "head_dim"}, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=24, shared_expert_intermediate_size=24, output_router_logits=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", MOE)
@pytest.mark.one_case
def test_router_logits_are_for_training_only(tmp_path, family):
    """They are left out while contexts and answers are made; the loss of the router stays in training."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MOE[family]()).eval()
    prompts, references, ids = batch(6)
    generator = ContextGenerator(model, token_budget=64, balance=4)
    fast, slow = (
        generator.contexts(prompts, references, 0.5, seed=0, sample_ids=ids, method=method)
        for method in ("fixed_point", "sequential")
    )
    assert_equal(fast, slow)
    assert len(generator.answer(prompts, max_new_tokens=4).tokens) == 6
    assert model.config.output_router_logits
    for method in ("fixed_point", "sequential"):
        trainer = make_trainer(tmp_path, model=model, context_method=method, max_steps=1)
        trainer.train()
        assert trainer.state.global_step == 1


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.one_case
def test_adapters_that_train_a_few_tokens(tmp_path, tied):
    """PEFT's trainable_token_indices: contexts are exact, the tokens learn, and the adapter comes back."""
    torch.manual_seed(0)
    base = t.LlamaForCausalLM(t.LlamaConfig(**BASE, tie_word_embeddings=tied)).eval()
    base.save_pretrained(tmp_path / "base")
    tokens = {"embed_tokens": [5, 6]}
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=4, trainable_token_indices=tokens))
    prompts, references, ids = batch(8)
    generator = ContextGenerator(model, token_budget=64, balance=4)
    fast, slow = (
        generator.contexts(prompts, references, 0.5, seed=0, sample_ids=ids, method=method)
        for method in ("fixed_point", "sequential")
    )
    assert_equal(fast, slow)
    before = model.get_base_model().get_input_embeddings()(torch.tensor([4, 5])).detach().clone()
    trainer = make_trainer(tmp_path / "run", model=model, max_steps=3)
    trainer.train()
    after = model.get_base_model().get_input_embeddings()(torch.tensor([4, 5])).detach()
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])
    trainer.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    given = torch.tensor([[3, 5, 6]])
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(given).logits, model.eval()(given).logits, rtol=1e-5, atol=1e-5)


def offloaded(how: str, folder):
    model, cpu = tiny_model("llama"), torch.device("cpu")
    if how == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device=cpu)
    if how == "disk_offload":
        return accelerate.disk_offload(model, str(folder), execution_device=cpu)
    if how == "with a hook":
        return accelerate.cpu_offload_with_hook(model, execution_device=cpu)[0]
    devices = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
               "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    return accelerate.dispatch_model(model, devices, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "with a hook", "device_map"])
def test_offloaded_weights_are_refused_by_name(tmp_path, how):
    model = offloaded(how, tmp_path)
    if how != "device_map":  # where it is a layer only, passes run its own forward
        with pytest.raises(ValueError, match=r"weights of the model are offloaded .*accelerate.*load the model whole"):
            ContextGenerator(model)
    with pytest.raises(ValueError, match=r"weights of the model are offloaded .*accelerate.*load the model whole"):
        make_trainer(tmp_path, model=model)


def test_weights_without_values_are_refused():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight has no values yet"):
        ContextGenerator(model)


# Threads


def test_generators_of_one_model_take_turns():
    """Contexts, answers and losses in four threads are those of one after the other; modes come back."""
    model = tiny_model("gemma3").train()
    prompts, references, ids = batch(8)

    def contexts(seed, method="fixed_point"):
        generator = ContextGenerator(model, token_budget=48, balance=4)
        given = {"seed": seed, "sample_ids": ids, "method": method}
        return generator.contexts(prompts, references, 0.5, **given)

    def answers():
        return ContextGenerator(model, token_budget=48, balance=4).answer(prompts, max_new_tokens=6).tokens

    want = {seed: contexts(seed) for seed in range(4)}
    want_answers, found, faults = answers(), {}, []

    def work(seed):
        try:
            for _ in range(3):
                found[seed] = contexts(seed, "sequential" if seed == 3 else "fixed_point")
                found["answers", seed] = answers()
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    for seed in range(4):
        assert_equal(found[seed], want[seed])
        assert all(map(torch.equal, found["answers", seed], want_answers))
    assert all(module.training for module in model.modules())


# Values that are not finite


def test_broken_logits_keep_the_references(caplog):
    """In contexts and in answers, by both methods: counted, and told."""
    model = tiny_model("llama")
    model.lm_head.weight.data[7] = float("nan")
    prompts, references, ids = batch(5)
    generator = ContextGenerator(model, token_budget=64, balance=4)
    for method in ("fixed_point", "sequential"):
        mixed = generator.contexts(prompts, references, 1.0, seed=0, sample_ids=ids, method=method)
        assert mixed.stats.invalid == mixed.stats.self_tokens == sum(map(len, references))
        assert all(map(torch.equal, mixed.tokens, references))
    with caplog.at_level(logging.WARNING):
        answers = generator.answer(prompts, max_new_tokens=3)
    assert answers.invalid > 0
    assert "tokens of answers are arbitrary" in caplog.text


def test_a_model_that_ends_at_once(tmp_path):
    """Its answers are one token each, its contexts are as long as the references, and training goes on."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[2] = 1.0
        model.model.norm.weight.fill_(1.0)
    prompts, references, ids = batch(5)
    generator = ContextGenerator(model, temperature=0.0, token_budget=64, balance=4)
    mixed = generator.contexts(prompts, references, 1.0, seed=0, sample_ids=ids)
    assert [len(row) for row in mixed.tokens] == [len(row) for row in references]
    assert all(len(answer) <= 8 for answer in generator.answer(prompts, max_new_tokens=8).tokens)
    trainer = make_trainer(tmp_path, model=model, self_prob=1.0, max_steps=2)
    trainer.train()
    assert torch.isfinite(weights(trainer.model)).all()
