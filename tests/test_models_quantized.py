"""Quantized bases with an adapter (QLoRA), by every backend that runs on a CPU: ``pip install selfgen[quantized]``."""

from __future__ import annotations

import pytest
import torch
import transformers as t
from datasets import Dataset
from helpers.cli import refused, save_model
from helpers.data import ROWS, make_tokenizer, write_jsonl
from helpers.training import SMALL, losses_of, make_trainer
from models import BASE
from transformers import AutoModelForCausalLM, TrainerCallback
from zoo.definition import SEED, contexts, rows, wrong_tokens

from selfgen import BSSConfig, BSSTrainer, ContextGenerator
from selfgen.cli import main
from selfgen.context.models import keep_4bit_layout
from selfgen.context.packed import packed_linears
from selfgen.context.precision import full_precision, how_quantized
from selfgen.provenance import weights_hash
from selfgen.training.losses import why_not_lean
from selfgen.training.weights import not_finite

peft = pytest.importorskip("peft")


def by_config(make):
    def load(folder):
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=make(), dtype=torch.float32)

    return load


def bitsandbytes(**options):
    return "bitsandbytes", by_config(lambda: t.BitsAndBytesConfig(**options))


def quanto(weights: str):
    return "optimum.quanto", by_config(lambda: t.QuantoConfig(weights=weights))


def torchao(name: str):
    def config():
        return t.TorchAoConfig(getattr(pytest.importorskip("torchao.quantization"), name)())

    return "torchao", by_config(config)


def hqq(folder):
    quantize = pytest.importorskip("hqq.models.hf.base").AutoHQQHFModel.quantize_model
    config = pytest.importorskip("hqq.core.quantize").BaseQuantizeConfig(nbits=4, group_size=64)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    quantize(
        model, quant_config=config, compute_dtype=torch.float32, device="cpu"
    )  # transformers 5.24 has no other way
    return model


def compressed(folder):
    """A checkpoint that carries its configuration."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    scheme = pytest.importorskip("compressed_tensors.quantization")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = scheme.QuantizationArgs(num_bits=8, symmetric=True, strategy="channel")
    group = scheme.QuantizationScheme(targets=["Linear"], weights=weights)
    config = scheme.QuantizationConfig(config_groups={"all": group}, ignore=["lm_head"], format="int-quantized")
    scheme.apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data = module.weight.detach().abs().amax(1, keepdim=True) / 127
    compressor = compressors.ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder / "compressed")
    compressor.update_config(folder / "compressed")
    return AutoModelForCausalLM.from_pretrained(folder / "compressed", dtype=torch.float32)


BACKENDS = {
    "bitsandbytes-fp4": bitsandbytes(load_in_4bit=True),
    "bitsandbytes-nf4": bitsandbytes(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
    "bitsandbytes-int8": bitsandbytes(load_in_8bit=True),
    "quanto-int8": quanto("int8"),
    "quanto-int4": quanto("int4"),
    "torchao-int8": torchao("Int8WeightOnlyConfig"),
    "torchao-float8": torchao("Float8WeightOnlyConfig"),
    "hqq": ("hqq", hqq),
    "compressed-tensors": ("compressed_tensors", compressed),
}
# quanto compiles C++ for four bits, which takes a minute at first
TRIED = [pytest.param(name, marks=[pytest.mark.slow] * (name == "quanto-int4")) for name in BACKENDS]
LOW_PRECISION = {"bitsandbytes-nf4", "bitsandbytes-int8"}  # they multiply in bf16 and fp16
NOT_REUSED = {"bitsandbytes-int8"}  # on a CPU it multiplies in int8 in inference, and in fp32 in training


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    t.LlamaForCausalLM(t.LlamaConfig(**BASE | sizes)).save_pretrained(folder)
    return folder


def quantized(folder, backend):
    package, load = BACKENDS[backend]
    pytest.importorskip(package)
    model = load(folder).eval()
    keep_4bit_layout(model)  # as a trainer does
    return model


def q_lora(folder, backend):
    model = quantized(folder, backend)
    if backend == "compressed-tensors":
        model(torch.tensor([[5]]))  # its linear layers have weights from then on
    torch.manual_seed(1)
    model = peft.prepare_model_for_kbit_training(model)
    targets = ["q_proj", "v_proj", "down_proj"]
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, r=4, init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


LENGTHS = [(30, 9), (3, 9), (5, 20)]


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("backend", TRIED)
def test_contexts_and_answers_are_those_of_the_models_own_forward(folder, backend, adapter):
    model = (q_lora if adapter else quantized)(folder, backend)
    assert how_quantized(model)
    prompts, references = rows(LENGTHS)
    for method in ("fixed_point", "sequential"):
        made = contexts(model, prompts, references, method=method)
        few = made.stats.self_tokens / 8 if backend in LOW_PRECISION else 0
        assert wrong_tokens(model, prompts, references, made) <= few
    if backend not in LOW_PRECISION:
        generator = ContextGenerator(model)
        answers = generator.answer(prompts, max_new_tokens=6, seed=SEED).tokens
        again = generator.contexts(
            prompts, answers, 1.0, seed=SEED, sample_ids=range(len(prompts)), method="sequential"
        )  # of the same tokens by themselves
        assert all(map(torch.equal, answers, again.tokens))


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.found = {name: weight.grad.clone() for name, weight in weights.items() if weight.grad is not None}
        self.wanted = set(weights)


def step(model, folder, **how):
    trainer, gradients = make_trainer(folder, model, max_steps=1, **how), Gradients()
    trainer.add_callback(gradients)
    losses = torch.stack([loss for loss, _ in losses_of(trainer)])
    assert set(gradients.found) == gradients.wanted
    assert all(gradient.norm() > 0 for gradient in gradients.found.values())
    return losses, gradients.found, trainer


@pytest.mark.parametrize("backend", TRIED)
def test_a_step_is_the_same_over_reused_passes(folder, tmp_path, backend, caplog):
    losses, gradients, _ = step(q_lora(folder, backend), tmp_path / "plain", reuse_passes=False, lean_loss=False)
    found, of_reused, trainer = step(q_lora(folder, backend), tmp_path / "reused", lean_loss=True)
    assert trainer._reuse.on == (backend not in NOT_REUSED)
    assert ("training and inference differ" in caplog.text) == (backend in NOT_REUSED)
    torch.testing.assert_close(found, losses, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        assert (of_reused[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("backend", ["bitsandbytes-nf4", "quanto-int8", "torchao-int8"])
def test_an_adapter_is_saved_and_loaded(folder, tmp_path, backend):
    model = q_lora(folder, backend)
    trainer = make_trainer(tmp_path / "run", model, max_steps=2)
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(quantized(folder, backend), tmp_path / "adapter").eval()
    for norm in (module for name, module in again.named_modules() if name.endswith("norm")):
        norm.float()
    row = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(row).logits, model.eval()(row).logits)


@pytest.mark.parametrize(
    "backend", sorted(BACKENDS.keys() - {"compressed-tensors"})
)  # whose weights transformers trains
def test_quantized_weights_are_not_trained(folder, tmp_path, backend):
    with pytest.raises(
        ValueError, match=r"the model is quantized \(.*\), and quantized weights can't be trained: train"
    ):
        make_trainer(tmp_path, quantized(folder, backend))


@pytest.mark.parametrize("backend", TRIED)
def test_what_looks_at_weights(folder, backend):
    model = quantized(folder, backend)
    assert not full_precision(model)
    assert not_finite(model) is None
    before = weights_hash(model)
    assert weights_hash(model) == before
    with packed_linears(model):
        packed = [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert "lm_head" in packed
    assert not any("_proj" in name for name in packed) or backend == "compressed-tensors"  # whose forward is its own
    model.lm_head.weight.data += 1
    assert weights_hash(model) != before


def test_a_quantized_head(folder):
    torchao = pytest.importorskip("torchao.quantization")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())  # the head, too
    assert "is quantized (Int8Tensor)" in why_not_lean(model)
    prompts, references = rows(LENGTHS)
    assert wrong_tokens(model, prompts, references, contexts(model, prompts, references)) == 0


def test_4bit_weights_that_are_laid_out_for_inference(folder, tmp_path):
    """On some CPUs the first forward in eval mode does that for good, and no gradient passes any more."""
    model = q_lora(folder, "bitsandbytes-fp4")
    linears = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for module in linears:
        module.support_avx512bf16_for_cpu = pytest.importorskip("bitsandbytes.functional").has_avx512bf16()
    laid_out = linears[0].support_avx512bf16_for_cpu
    contexts(model, *rows(LENGTHS))
    assert all(module.support_avx512bf16_for_cpu == laid_out for module in linears)  # as it was
    step(model, tmp_path / "fresh")
    assert not any(module.support_avx512bf16_for_cpu for module in linears)  # an evaluation would do it
    if laid_out:
        linears[0].support_avx512bf16_for_cpu = True
        with torch.no_grad():
            model.eval()(torch.arange(3, 20)[None])
        assert contexts(model, *rows(LENGTHS)).stats.self_tokens
        with pytest.raises(ValueError, match="can't be trained through: a forward in eval mode has laid out"):
            make_trainer(tmp_path / "after", model)


def test_a_quantized_checkpoint_from_the_command_line(tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    save_model(tmp_path / "plain")
    config = t.BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)
    model.save_pretrained(tmp_path / "model")
    t.AutoTokenizer.from_pretrained(tmp_path / "plain").save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    arguments = ["--model", tmp_path / "model", "--dataset", tmp_path / "rows.jsonl", "--use_cpu", "yes"]
    assert main(["contexts", *map(str, arguments), "--output_dir", str(tmp_path / "contexts")]) == 0
    assert main(["generate", *map(str, arguments), "--output_file", str(tmp_path / "answers.jsonl")]) == 0
    capsys.readouterr()
    line = refused(["train", *arguments, "--output_dir", tmp_path / "out", "--max_steps", 1], capsys)
    assert "the model is quantized (bitsandbytes), and quantized weights can't be trained" in line


def test_an_adapters_folder_from_the_command_line(tmp_path):
    """Its configuration names the quantized checkpoint that it belongs to."""
    pytest.importorskip("bitsandbytes")
    save_model(tmp_path / "plain")
    config = t.BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)
    model.save_pretrained(tmp_path / "base")
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4, init_lora_weights=False)
    model = peft.get_peft_model(peft.prepare_model_for_kbit_training(model), lora)
    config = BSSConfig(str(tmp_path / "run"), **SMALL | {"max_length": 32}, max_steps=1, self_prob=0.5)
    trainer = BSSTrainer(model, config, train_dataset=Dataset.from_list(ROWS), processing_class=make_tokenizer())
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    keep_4bit_layout(loaded)  # as in the trainer
    row = torch.arange(3, 8)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(row).logits, trainer.model.eval()(row).logits)
    arguments = ["--dataset", tmp_path / "rows.jsonl", "--use_cpu", "yes", "--output_file", tmp_path / "answers.jsonl"]
    assert main(["generate", "--model", str(tmp_path / "adapter"), *map(str, arguments)]) == 0
