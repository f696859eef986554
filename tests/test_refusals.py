"""What is split over processes or devices is refused by name, with what to do, and never trained in another way."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
import torch
import transformers as t
from helpers.cli import run
from helpers.processes import WORLD, in_ranks
from helpers.training import config, make_trainer
from models import BASE, tiny_model
from torch import nn

from selfgen import ContextGenerator
from selfgen.context import UnsupportedModelError
from selfgen.context.support import inspect_model
from selfgen.training.parallelism import check_deepspeed

GOOD = {"prompts": [[3, 4]], "references": [[5, 6, 7]], "self_prob": 1.0, "seed": 0, "sample_ids": [0]}


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_sharding_that_is_asked_for_is_refused_also_where_accelerate_would_ignore_it(tmp_path, name):
    """On CPUs it would train with DDP."""
    with pytest.raises(ValueError, match=rf"^{name}: on CPUs Accelerate would ignore it .*; leave it out"):
        config(tmp_path, **{name: {"fsdp": True, "deepspeed": {"zero_optimization": {"stage": 2}}}[name]})


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, r"FSDP \(ACCELERATE_USE_FSDP\)"),
        ({"ACCELERATE_USE_DEEPSPEED": "True"}, r"DeepSpeed \(ACCELERATE_USE_DEEPSPEED\)"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, r"Megatron-LM \(ACCELERATE_USE_MEGATRON_LM\)"),
        (
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"},
            r"context parallelism \(PARALLELISM_CONFIG_CP_SIZE=2\)",
        ),
    ],
)
def test_what_accelerates_launcher_asks_for_is_refused(tmp_path, monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path)


def test_what_accelerates_launcher_does_not_ask_for(tmp_path, monkeypatch):
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_PARALLELISM_CONFIG"):
        monkeypatch.setenv(name, "false")
    make_trainer(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cp_size", "context parallelism"),
        ("sp_size", "sequence parallelism"),
    ],
)
def test_parallelism_of_accelerate_is_refused(tmp_path, name, kind):
    parallelism = pytest.importorskip("accelerate.parallelism_config").ParallelismConfig
    if name not in {field.name for field in fields(parallelism)}:
        pytest.skip(f"this accelerate has no {name}")
    with pytest.raises(ValueError, match=rf"^{kind} \({name}=2\)"):
        config(tmp_path, parallelism_config=parallelism(**{name: 2}))
    config(tmp_path, parallelism_config=parallelism(**{name: 1}))


def test_tensor_parallelism_of_a_whole_model_is_refused(tmp_path, monkeypatch):
    parallelism = pytest.importorskip("accelerate.parallelism_config").ParallelismConfig
    with pytest.raises(ValueError, match=r"^tp_size is 2, but each weight of the model is split over 1 process:"):
        make_trainer(tmp_path, parallelism_config=parallelism(tp_size=2))
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "2")
    with pytest.raises(ValueError, match=r"^PARALLELISM_CONFIG_TP_SIZE is 2, but each weight .* \(--tp-size\)$"):
        make_trainer(tmp_path)


def test_the_command_line_says_so_before_it_loads_anything(tmp_path, capsys):
    command = ["train", "--model", "nowhere", "--dataset", "nothing.jsonl", "--output_dir", str(tmp_path / "out")]
    code, _, err = run([*command, "--use_cpu", "--fsdp", "full_shard"], capsys)
    assert code == 2
    assert err.rstrip().splitlines()[-1].startswith("selfgen train: error: fsdp: on CPUs Accelerate would ignore it")


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        (lambda model: setattr(model, "hf_split_points", []), "pipeline parallelism: accelerate's prepare_pippy"),
        (
            lambda model: setattr(
                model.model.layers, "1", type("FullyShardedDataParallel", (nn.Sequential,), {})(model.model.layers[1])
            ),
            "FSDP1: model.layers.1 is wrapped; FSDP2 works (fsdp_version: 2)",
        ),
    ],
)
def test_a_model_in_parts_is_refused(mark, message):
    """By the marks that these libraries leave, which need not be installed."""
    model = tiny_model("llama")
    mark(model)
    with pytest.raises(ValueError, match=rf"split over processes \({re.escape(message)}\).*use FSDP2.*one device"):
        ContextGenerator(model)


def test_a_partition_is_refused_where_contexts_are_made():
    """By the mark that DeepSpeed leaves."""
    model = tiny_model("llama")
    model.model.norm.weight.ds_id = 3
    for make in (lambda: ContextGenerator(model).contexts(**GOOD), lambda: ContextGenerator(model).answer([[3]])):
        with pytest.raises(ValueError, match=r"weights are sharded over processes: .*with selfgen.whole_weights"):
            make()


def loaded_in_parts(folder, sizes, message):
    from transformers.distributed import DistributedConfig

    model = t.AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**sizes))
    with pytest.raises(ValueError, match=rf"split over processes \({message}\), .*load the model whole"):
        ContextGenerator(model)


def sharded_by_torch(folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = t.AutoModelForCausalLM.from_pretrained(folder)
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    with pytest.raises(ValueError, match=r"weights are sharded over processes: .*with selfgen.whole_weights"):
        ContextGenerator(model).contexts(**GOOD)


def split_by_torch(folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = t.AutoModelForCausalLM.from_pretrained(folder)
    parallelize_module(model, init_device_mesh("cpu", (WORLD,)), {"lm_head": ColwiseParallel()})
    with pytest.raises(ValueError, match=r"\(tensor parallelism by hand: lm_head.weight is a DTensor\).*use FSDP2"):
        ContextGenerator(model)


def worker(rank, folder):
    sharded_by_torch(folder / "llama")
    split_by_torch(folder / "llama")
    known = _sizes()
    for family, sizes, message in (
        ("llama", {"pp_size": 2}, "pipeline parallelism: pp_size=2"),
        ("mixtral", {"fsdp_size": 2, "ep_size": 2}, "expert parallelism: ep_size=2"),
    ):
        if sizes.keys() <= known:
            loaded_in_parts(folder / family, sizes, message)


def _sizes() -> set[str]:
    from transformers.distributed import DistributedConfig

    return {field.name for field in fields(DistributedConfig)}


def test_models_that_were_split_when_they_were_loaded_are_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    mixtral = t.MixtralConfig(**BASE, num_local_experts=4, num_experts_per_tok=2)
    t.AutoModelForCausalLM.from_config(mixtral).save_pretrained(tmp_path / "mixtral")
    in_ranks(worker, tmp_path)


def test_layers_on_several_devices_are_refused_by_the_parallel_passes_alone():
    """Layers in the main memory or on a disk are brought to the device by accelerate, so these stay."""
    model = tiny_model("llama")
    expected = ContextGenerator(model, token_budget=8).contexts(**GOOD)
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "lm_head": "cpu"}
    with pytest.raises(UnsupportedModelError, match=r"layers on 2 devices \(device_map\).*sequential"):
        ContextGenerator(model, token_budget=8).contexts(**GOOD)
    found = ContextGenerator(model).contexts(**GOOD, method="sequential")
    assert torch.equal(found.tokens[0], expected.tokens[0])
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": 0}
    assert not inspect_model(model, 20).missing


def test_layers_on_a_disk(tmp_path):
    whole = tiny_model("llama")
    whole.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"], "cpu")
    model = t.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map={**places, "model.layers.1": "disk"}, offload_folder=tmp_path / "offload"
    )
    assert any(parameter.is_meta for parameter in model.parameters())
    for method in ("fixed_point", "sequential"):
        found, expected = (
            ContextGenerator(one, token_budget=8).contexts(**GOOD, method=method).tokens[0] for one in (model, whole)
        )
        assert torch.equal(found, expected)


ZERO3 = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_optimization": {}}, r"zero_optimization\.stage is 0; accepted: 1, 2 or 3 .*torchrun trains with DDP"),
        ({"zero_optimization": {"stage": 0}}, r"zero_optimization\.stage is 0"),
        ({"zero_optimization": {"stage": 3}}, r"no model would be saved unless .*16bit_weights_on_model_save is true"),
        ({"zero_optimization": {**ZERO3, "zero_hpz_partition_size": 8}}, r"zero_hpz_partition_size is 8"),
        ({"zero_optimization": {**ZERO3, "zero_quantized_weights": True}}, r"zero_quantized_weights is True"),
        ({"zero_optimization": {**ZERO3, "offload_param": {"device": "nvme"}}}, r"offload_param\.device is 'nvme'"),
        ({"tensor_parallel": {"autotp_size": 2}}, r"tensor_parallel\.autotp_size is 2"),
        ({"sequence_parallel_size": 2}, r"sequence_parallel_size is 2"),
        ({"expert_parallel": {"enabled": True}}, r"expert_parallel\.enabled is True"),
        ({"pipeline": {"stages": 2}}, r"pipeline is \{'stages': 2\}"),
        ({"torch_autocast": {"enabled": True}}, r"torch_autocast\.enabled is True"),
        ({"compile": {"deepcompile": True}}, r"compile\.deepcompile is True"),
    ],
)
def test_what_deepspeed_is_asked_for_in_vain(changes, message):
    with pytest.raises(ValueError, match=rf"^deepspeed: .*{message}"):
        check_deepspeed({"zero_optimization": {"stage": 2}, **changes})


def test_what_deepspeed_may_be_asked_for():
    off = {"zero_hpz_partition_size": 1, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "none"}}
    check_deepspeed({"zero_optimization": {**ZERO3, **off}, "torch_autocast": {"enabled": False}})
    for stage in (1, 2):
        check_deepspeed({"zero_optimization": {"stage": stage}, "bf16": {"enabled": "auto"}})
