"""Every kind of adapter of the installed PEFT: contexts are those of PEFT's own forward, or it is refused by name."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from helpers.training import make_trainer
from models import BASE, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig
from zoo.definition import contexts, rows, wrong_tokens
from zoo.document import reason, table, write_section

from selfgen import ContextGenerator, UnsupportedModelError
from selfgen.context.models import active_adapters

peft = pytest.importorskip("peft")
mapping = pytest.importorskip("peft.mapping")

KINDS = sorted(mapping.PEFT_TYPE_TO_CONFIG_MAPPING, key=str)
OPTIONS = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 1, "target_modules": None},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 100},
    "IA3": {"feedforward_modules": []},
    "MISS": {"r": 4},
    "PSOFT": {"r": 8},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [5, 6, 7], "target_modules": None},
    "VBLORA": {"vector_length": 8, "num_vectors": 16},
    "WAVEFT": {"n_frequency": 100},
}
REFUSED = {
    "ADAPTION_PROMPT": "type ADAPTION_PROMPT",
    "CARTRIDGE": "prompt-learning",
    "CPT": "prompt-learning",
    "LILY": "type LILY",
    "MULTITASK_PROMPT_TUNING": "prompt-learning",
    "POLY": "type POLY",
    "PREFIX_TUNING": "prompt-learning",
    "PROMPT_TUNING": "prompt-learning",
    "P_TUNING": "prompt-learning",
    "SHADOW": "type SHADOW",
    "XLORA": "type XLORA",
}


def with_adapter(config, model=None):
    """A model whose adapter has been trained, as new ones often change nothing."""
    torch.manual_seed(1)
    model = peft.get_peft_model(model or tiny_model("llama"), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def config_of(kind: str):
    config_class = mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
    given = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], "num_virtual_tokens": 2}
    known = {field.name for field in fields(config_class)}
    given |= {"init_lora_weights": False, "init_weights": False} | OPTIONS.get(kind, {})
    return config_class(**{name: value for name, value in given.items() if name in known and value is not None})


def x_lora(tmp_path):
    peft.get_peft_model(tiny_model("llama"), lora()).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**BASE | {"use_cache": False})).eval()
    return peft.get_peft_model(
        model, peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, xlora_depth=2, adapters={"0": str(tmp_path)})
    )


def exact(model, method: str) -> bool:
    """Also, the adapter must have changed something."""
    prompts, references = rows([(30, 9), (3, 9), (5, 20)])
    mixed = contexts(model, prompts, references, method=method)
    changed = wrong_tokens(tiny_model("llama"), prompts, references, mixed) > 0
    return changed and wrong_tokens(model, prompts, references, mixed) == 0


@pytest.mark.slow
def test_the_table_of_adapters(tmp_path):
    """Every kind is looked at without being told what is expected of it."""
    found = []
    for kind in [kind.value for kind in KINDS]:
        try:
            model = x_lora(tmp_path) if kind == "XLORA" else with_adapter(config_of(kind))
            methods = [exact(model, method) for method in ("fixed_point", "sequential")]
            found.append([kind, "exact" if all(methods) else "WRONG"])
        except ImportError as error:
            found.append([kind, f"not built ({reason(error)})"])
        except ValueError as error:
            found.append([kind, f"refused ({reason(error)})"])
    lines = [
        "Every type of the installed PEFT, on a Llama, with weights that change what it computes: `fixed_point` and",
        "`sequential` are compared with PEFT's own forward.",
        "",
        f"peft {peft.__version__}, {len(found)} entries.",
        "",
        *table(["type", "contexts"], found),
    ]
    write_section("Adapters", lines)
    assert {kind for kind, status in found if status.startswith("refused")} == set(REFUSED)
    assert not [kind for kind, status in found if status == "WRONG"]


@pytest.mark.parametrize("kind", [kind.value for kind in KINDS])
def test_every_kind(kind, tmp_path):
    try:
        model = x_lora(tmp_path) if kind == "XLORA" else with_adapter(config_of(kind))
    except ImportError as error:
        pytest.skip(str(error))
    for method in ("fixed_point", "sequential"):
        if kind in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[kind]):
                contexts(model, *rows([(5, 9)]), method=method)
        else:
            assert exact(model, method)


def lora(**options):
    return peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4, **options)


VARIANTS = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "bias": {"bias": "all"},
    "head": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [5, 6, 7]},
    "ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}},
    "layers": {"layers_to_transform": [1]},
    "weights": {"target_parameters": ["lm_head.weight", "gate_proj.weight"]},  # changed while a layer is computed
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_lora(variant):
    assert exact(with_adapter(lora(**VARIANTS[variant])), "fixed_point")
    assert exact(with_adapter(lora(**VARIANTS[variant])), "sequential")


@pytest.mark.parametrize("method", ["fixed_point", "sequential"])
def test_activated_lora_is_refused(method):
    """It is on from its invocation tokens on, in PEFT's own forward."""
    model = with_adapter(lora(alora_invocation_tokens=[7, 8]))
    with pytest.raises(ValueError, match=r"'default' is an activated LoRA \(alora_invocation_tokens\).*train a LoRA"):
        contexts(model, *rows([(5, 9)]), method=method)


def test_an_adapter_that_is_switched_on_later_is_looked_at():
    model = with_adapter(lora())
    model.add_adapter("activated", lora(alora_invocation_tokens=[7, 8]))
    generator = ContextGenerator(model, token_budget=16, balance=2)
    arguments = {"prompts": [[5, 6]], "references": [[7, 8, 9]], "self_prob": 1.0, "seed": 0, "sample_ids": [0]}
    generator.contexts(**arguments)
    model.set_adapter("activated")
    for method in ("fixed_point", "sequential"):
        with pytest.raises(ValueError, match="'activated' is an activated LoRA"):
            generator.contexts(**arguments, method=method)
    with pytest.raises(ValueError, match="'activated' is an activated LoRA"):
        generator.answer([[5, 6]])
    model.set_adapter("default")
    generator.contexts(**arguments)


def test_several_adapters():
    model = with_adapter(lora())
    model.add_adapter("other", lora(init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    assert exact(model, "fixed_point")
    assert exact(model, "sequential")


def test_mixed_adapters():
    model = peft.get_peft_model(tiny_model("llama"), lora(init_lora_weights=False), mixed=True).eval()
    model.add_adapter("other", peft.LoHaConfig(target_modules=["q_proj"], r=2, init_weights=False))
    model.set_adapter(["default", "other"])
    assert exact(model, "fixed_point")
    assert exact(model, "sequential")


@pytest.mark.parametrize("method", ["fixed_point", "sequential"])
def test_what_pefts_own_forward_does_is_found_where_it_is_not_known_by_name(method, monkeypatch):
    model = with_adapter(lora())
    original = type(model).forward

    def forward(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        output.logits = output.logits.flip(-1)
        return output

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(UnsupportedModelError, match=r"adapter \(LORA\) computes something else in the forward of Peft"):
        contexts(model, *rows([(5, 9)]), method=method)
    with pytest.raises(UnsupportedModelError, match=r"adapter \(LORA\)"):
        ContextGenerator(model).answer([[5, 6]])


def test_a_trainer_with_such_an_adapter(tmp_path):
    with pytest.raises(ValueError, match="activated LoRA"):
        make_trainer(tmp_path, peft.get_peft_model(tiny_model("llama"), lora(alora_invocation_tokens=[7, 8])))


def test_an_adapters_folder(tmp_path):
    """transformers loads it by itself, into a model that is none of PEFT's."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    with_adapter(lora(), AutoModelForCausalLM.from_pretrained(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert active_adapters(model) == ("default",)
    assert exact(model, "fixed_point")
