"""`selfgen doctor`: what it finds where all is well, where parts are missing or broken, and of models."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch
import transformers as t
from helpers.cli import ROOT, refused, run, save_model

from selfgen import ContextGenerator, UnsupportedModelError
from selfgen.cli import doctor
from selfgen.context import models
from selfgen.context.models import check_there
from selfgen_kernels import backends
from selfgen_kernels.ops import OPS


def report_of(arguments: list[str], capsys) -> tuple[int, dict]:
    code, out, err = run(["doctor", "--json", *arguments], capsys)
    assert "Traceback" not in err
    return code, json.loads(out)


def found(arguments: list[str], capsys, part: str) -> tuple[int, dict]:
    """The exit code, and the lines of a part by their names."""
    code, report = report_of(arguments, capsys)
    return code, {line["name"]: line for line in report["parts"][part]}


@pytest.fixture
def quick(monkeypatch):
    """Without the parts that compute."""
    for part in ("_exactness", "_cost"):
        monkeypatch.setattr(doctor, part, lambda: iter(()))


def test_all_is_well(capsys):
    code, out, _ = run(["doctor"], capsys)
    assert (code, out.splitlines()[-1]) == (0, "all is well"), out
    assert not [line for line in out.splitlines() if line.startswith("!")]
    for part in ("versions", "devices", "kernels", "exactness", "cost of a pass"):
        assert f"\n{part}\n" in f"\n{out}"
    assert "with the same tokens" in " ".join(out.split())  # lines are wrapped
    assert f"torch                {torch.__version__} (supported: >=2.11)" in out


def test_the_backend_of_each_op_is_told(capsys, quick):
    code, report = report_of([], capsys)
    assert (code, report["ok"], report["broken"]) == (0, True, [])
    told = told_of_ops(report)
    assert told == {op: tuple(backends.chosen(op, "cpu")) for op in OPS}
    assert backends.chosen("rotary", "cpu") == ("reference", "it has no C++ kernel")


def told_of_ops(report: dict) -> dict[str, tuple[str, str]]:
    """The backend of each op on the CPU, and why."""
    lines = [line for line in report["parts"]["kernels"] if line["name"].startswith("cpu, by ")]
    return {op: (line["data"]["backend"], line["data"]["why"]) for line in lines for op in line["data"]["ops"]}


def test_the_choice_on_a_gpu(monkeypatch):
    """Without one: by what the dispatch of the Triton kernels asks."""
    targets = {0: "sm_90", 1: None}
    named = type("Properties", (), {"name": "an old GPU"})
    monkeypatch.setattr(backends, "target_at", targets.get)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: named)
    monkeypatch.setattr(backends, "find_spec", lambda _: object())
    assert backends.chosen("rotary", "cuda:0") == ("triton", "the sizes for sm_90 fit this GPU")
    assert backends.chosen("rotary", "cuda:1").why == "no sizes of the Triton kernels are known to fit an old GPU"
    assert backends.chosen("combine_shards", "cuda:0") == ("reference", "it has no Triton kernel")
    monkeypatch.setattr(backends, "find_spec", lambda _: None)
    assert backends.chosen("rotary", "cuda:0") == ("reference", "Triton is not installed")
    assert backends.chosen("rotary", "meta") == ("reference", "there are no kernels for meta")


@pytest.mark.parametrize(
    ("missing", "broken"),
    [(backends.cpu.NOT_BUILT, False), ("they were built with torch 2.1.0, and this is torch 2.13.0", True)],
)
def test_kernels_that_are_not_used(missing, broken, monkeypatch, capsys, quick):
    monkeypatch.setattr(backends.cpu, "missing", missing)
    code, report = report_of([], capsys)
    line = report["parts"]["kernels"][0]
    assert (code, line["name"], line["broken"]) == (int(broken), "C++", broken)
    assert missing.removeprefix("they were ") in line["text"]
    assert told_of_ops(report)["sample_mix"] == ("reference", f"of the C++ kernels, {missing}")


def test_a_version_that_is_not_supported(monkeypatch, capsys, quick):
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "2.5.0" if name == "torch" else real(name))
    code, report = report_of([], capsys)
    (line,) = (line for line in report["parts"]["versions"] if line["name"] == "torch")
    assert (code, line["broken"], line["text"]) == (
        1,
        True,
        "2.5.0 (not supported: >=2.11): pip install 'torch>=2.11'",
    )
    assert report["broken"] == ["versions: torch"]


def test_contexts_that_are_not_exact(monkeypatch, capsys):
    real = ContextGenerator.contexts

    def contexts(self, *given, method, seed, **how):
        return real(self, *given, method=method, seed=seed + (method == "sequential"), **how)

    monkeypatch.setattr(ContextGenerator, "contexts", contexts)
    monkeypatch.setattr(doctor, "_cost", lambda: iter(()))
    code, lines = found([], capsys, "exactness")
    assert code == 1
    assert "with other tokens" in lines["cpu"]["text"]


@pytest.mark.parametrize(
    ("absent", "told"),
    [
        ("torch", ("! error", "No module named 'torch'")),
        ("transformers", ("! error", "No module named 'transformers'")),
        ("packaging", ("! requirements", "pip install packaging")),
        ("yaml filelock tqdm transformers datasets accelerate", ("! error", "C++                  built")),
    ],
)
@pytest.mark.one_case
def test_what_is_missing_is_a_line(absent, told):
    """In a fresh process in which these can't be imported."""
    code = (
        "import importlib.abc, sys\n"
        "class Absent(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {absent.split()}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}')\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import selfgen.cli.doctor as doctor\n"
        + ("doctor._exactness = doctor._cost = lambda: iter(())\n" if absent == "packaging" else "")
        + "from selfgen.cli import main\nsys.exit(main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines()[-1].startswith("broken: ")
    for text in told:
        assert text in done.stdout


def test_a_package_that_is_broken(monkeypatch, tmp_path):
    (tmp_path / "flash_attn.py").write_text("raise OSError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    line = doctor._importable("flash-attn", "flash_attn", needed=False)
    assert (line.broken, line.text) == (True, "is installed, but can't be imported: OSError: undefined symbol")
    assert doctor._importable("none", "no_such_package", needed=True).broken


def test_kernels_of_another_torch_are_not_loaded(tmp_path):
    """By name: what they call may be there, and mean something else."""
    (tmp_path / "_C.so").write_bytes(b"no library")
    script = f"""
import importlib.util, sys, warnings
found = importlib.util.find_spec
library = importlib.util.spec_from_file_location("_C", {str(tmp_path / "_C.so")!r})
importlib.util.find_spec = lambda name, *rest: library if name.endswith("cpu._C") else found(name, *rest)
import torch, selfgen_kernels
print(selfgen_kernels.backends.cpu.missing, "|", selfgen_kernels.backends.cpu.level())
warnings.simplefilter("always")
for _ in range(2):
    selfgen_kernels.self_mask(0, torch.arange(3), torch.arange(3), 0.5)
"""

    def told(built_with: str) -> subprocess.CompletedProcess:
        (tmp_path / "_C.torch").write_text(built_with)
        return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    other = told("2.1.0+cu118")
    assert other.stdout == f"they were built with torch 2.1.0+cu118, and this is torch {torch.__version__} | None\n"
    assert other.stderr.count("several times slower") == 1
    major, minor, *_ = torch.__version__.split(".")
    assert "built with" not in told(f"{major}.{minor}.9").stdout  # it is loaded, which fails


# ---- Models ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_other_parts(monkeypatch, quick):
    for part in ("_versions", "_devices", "_kernels"):
        monkeypatch.setattr(doctor, part, lambda: iter(()))


def test_a_model_by_its_configuration(tmp_path, capsys, no_other_parts):
    save_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # is not asked for
    code, lines = found([str(tmp_path)], capsys, f"model {tmp_path}")
    assert code == 0
    assert lines["class"]["data"] == "LlamaForCausalLM"
    assert [lines[name]["data"] for name in ("fixed_point", "sequential", "reuse of passes")] == [True] * 3
    assert "64 tokens" in lines["fixed_point"]["text"]  # as many positions as it has
    assert "--weights" in lines["not known"]["text"]


def test_an_adapter_is_looked_at_by_its_base(tmp_path, capsys, no_other_parts):
    save_model(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    adapter = tmp_path / "adapter" / "adapter_config.json"
    adapter.write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "base")}))
    code, lines = found([str(adapter.parent)], capsys, f"model {adapter.parent}")
    assert (code, lines["adapter"]["data"]) == (0, str(tmp_path / "base"))
    assert lines["class"]["data"] == "LlamaForCausalLM"


def test_a_model_by_its_weights(tmp_path, capsys, no_other_parts):
    save_model(tmp_path)
    code, lines = found([str(tmp_path), "--weights"], capsys, f"model {tmp_path}")
    assert code == 0
    assert [lines[name]["data"] for name in ("causal", "lean loss")] == [True, True]
    assert lines["exactness"]["data"] == {"same": True}
    assert lines["cpu, balance"]["data"]["balance"] > 0


def test_a_model_that_fixed_point_refuses(tmp_path, capsys, no_other_parts):
    """With the words of the generator, which raises them."""
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = t.BloomConfig(**sizes)
    model = t.BloomForCausalLM(config)
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError) as error:
        ContextGenerator(model).contexts([[1]], [[2]], 0.5, seed=0, sample_ids=[0])
    code, lines = found([str(tmp_path)], capsys, f"model {tmp_path}")
    line = lines["fixed_point"]
    assert (code, line["data"]) == (0, False)
    assert line["text"].removeprefix("no, it has ").split(";")[0] in str(error.value)


def test_no_such_model(tmp_path, capsys, no_other_parts):
    code, lines = found([str(tmp_path / "none")], capsys, f"model {tmp_path / 'none'}")
    assert code == 1
    assert "there is no folder" in lines["error"]["text"]


def test_weights_go_with_a_model(capsys):
    assert "--weights goes with a model" in refused(["doctor", "--weights"], capsys)


# ---- Names of models -------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A hub that can't be reached; what it was asked."""
    asked = []

    def ask(url, timeout):
        asked.append(url)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(models.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(models, "get_hf_file_metadata", ask)
    return asked


@pytest.mark.parametrize("name", ["./modle", "out/run/checkpoint-7", "../out", "/no/such/folder", "out/", "a\\b"])
def test_what_can_only_be_a_folder_is_not_looked_for_on_the_hub(name, hub):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        check_there(name)
    assert hub == []


def test_a_mistyped_folder_is_told_at_once(tmp_path, hub, capsys, monkeypatch):
    """By every command, with the one that is meant, and after one question to the hub where it may be a name there."""
    save_model(tmp_path / "SmolLM2-135M")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "one", "completion": "two"}\n')
    monkeypatch.chdir(tmp_path)
    out = {"train": "--output-dir", "contexts": "--output-dir", "generate": "--output-file", "eval": "--output-dir"}
    for command, option in out.items():
        started = time.monotonic()
        for name in ("./SmolLM-135M", "SmolLM-135M"):
            asked = [command, "--model", name, "--dataset", "rows.jsonl", option, f"{command}.out"]
            line = refused(asked, capsys, said=True)
            assert f"there is no folder '{name}'" in line
            assert f"did you mean '{Path.cwd() / 'SmolLM2-135M'}'?" in line
        assert len(hub) == 1, hub
        assert "SmolLM-135M/resolve/main/config.json" in hub.pop()
        assert time.monotonic() - started < 10


def test_a_hub_that_answers_is_left_to_transformers(monkeypatch, hub):
    def answers(url, timeout):
        raise models.HfHubHTTPError("not found", response=type("Response", (), {"headers": {}, "request": None})())

    monkeypatch.setattr(models, "get_hf_file_metadata", answers)
    check_there("somebody/some-model")
