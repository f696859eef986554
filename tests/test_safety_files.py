"""No file runs code: not checkpoints, weights, models with code of their own, nor data; and no new way to do so."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from helpers.cli import ROOT, flags, refused, run, save_model
from helpers.data import write_jsonl
from safetensors.torch import load_file

from selfgen.files import code_in
from selfgen.training.shards import MODEL, fault_of_shards
from tools import licences

ROWS = [{"prompt": "a b", "completion": "c d"}, {"prompt": "e", "completion": "f g h"}] * 4
STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


class Evil:
    """Writes a file where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path):
    """What is there when code has run; it never is."""
    yield tmp_path / "mark"
    assert not (tmp_path / "mark").exists()


def arguments(folder: Path) -> dict:
    small = {"max_steps": 2, "save_steps": 1, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "use_cpu": True}
    quiet = {"disable_tqdm": True, "report_to": "none", "logging_steps": 1, "max_length": 32, "token_budget": 32}
    names = {"model": folder / "model", "dataset": folder / "train.jsonl", "output_dir": folder / "out"}
    return {**names, **small, **quiet, "balance": 4, "self_prob": 0.5}


@pytest.fixture
def cli(tmp_path):
    """Options of `selfgen train` on a tiny checkpoint."""
    save_model(tmp_path / "model")
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    return arguments(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps."""
    from selfgen.cli import main

    folder = tmp_path_factory.mktemp("trained")
    save_model(folder / "model")
    write_jsonl(folder / "train.jsonl", ROWS)
    assert main(["train", *flags(arguments(folder))]) == 0
    return folder


def test_a_pickle_does_run_code(tmp_path):
    """So that the tests below show something."""
    torch.save({"python": Evil(tmp_path / "ran")}, tmp_path / "evil.pt")
    assert code_in(tmp_path / "evil.pt") == ["posix.mkdir"]
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (tmp_path / "ran").is_dir()


def copy_of(trained: Path, folder: Path) -> dict:
    shutil.copytree(trained / "out" / "checkpoint-1", folder / "out" / "checkpoint-1")
    return {**arguments(trained), "output_dir": folder / "out"}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("raw", [False, True], ids=["archive", "pickle"])
@pytest.mark.each_value
def test_a_checkpoint_with_code_in_it(tmp_path, trained, mark, capsys, name, raw):
    options = copy_of(trained, tmp_path)
    file = tmp_path / "out" / "checkpoint-1" / name
    if raw:
        file.write_bytes(pickle.dumps(Evil(mark)))
    else:
        torch.save({"python": Evil(mark)}, file)
    line = refused(["train", *flags(options), "--resume-from-checkpoint", "last"], capsys)
    assert f"{name} is broken" in line
    assert raw or "loading it would run posix.mkdir, so it isn't loaded" in line


def calling(module: str, name: str, argument: Path) -> bytes:
    """A pickle that calls what ``name`` is in ``module``."""
    return f"c{module}\n{name}\n(V{argument}\ntR.".encode()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "mkdir"),
        ("torch.distributed.checkpoint.filesystem", "os.mkdir"),
        ("torch.distributed.checkpoint.filesystem", "FileSystemWriter"),
        ("torch.distributed.checkpoint.metadata", "os.mkdir"),
        ("torch", "os.mkdir"),
        ("torch", "load"),
        ("pathlib", "os.mkdir"),
    ],
)
@pytest.mark.parametrize("protocol", [b"", b"\x80\x04"])  # from the fourth on, names may have dots
def test_a_list_of_shards_with_code_in_it(tmp_path, mark, module, name, protocol):
    (tmp_path / MODEL).mkdir()
    (tmp_path / MODEL / ".metadata").write_bytes(protocol + calling(module, name, mark))
    fault = fault_of_shards(tmp_path / MODEL)
    assert f"loading it would run {module}.{name}, so it isn't loaded" in fault


def test_states_of_a_run_hold_no_code(trained):
    for name in STATES:
        assert code_in(trained / "out" / "checkpoint-2" / name) == []


def test_arguments_that_the_trainer_pickles_are_not_read(tmp_path, trained, mark, capsys):
    options = copy_of(trained, tmp_path)
    (tmp_path / "out" / "checkpoint-1" / "training_args.bin").write_bytes(pickle.dumps(Evil(mark)))
    assert run(["train", *flags(options), "--resume-from-checkpoint", "last"], capsys)[0] == 0


@pytest.mark.parametrize("command", ["train", "generate"])
@pytest.mark.parametrize("raw", [False, True], ids=["archive", "pickle"])
def test_weights_with_code_in_them(cli, mark, capsys, raw, command):
    file = cli["model"] / "pytorch_model.bin"
    (cli["model"] / "model.safetensors").unlink()
    if raw:
        file.write_bytes(pickle.dumps(Evil(mark)))
    else:
        torch.save({"x": Evil(mark)}, file)
    line = refused([command, *flags(of_command(cli, command))], capsys)
    assert f"{file} {'is no archive' if raw else 'would run posix.mkdir'}" in line
    assert "weights_only" not in line  # no advice to take the risk


def of_command(options: dict, command: str) -> dict:
    if command == "train":
        return options
    output = {"generate": "output_file"}.get(command, "output_dir")
    return {"model": options["model"], "dataset": options["dataset"], output: options["output_dir"], "use_cpu": True}


def test_weights_of_torch_are_read_and_saved_as_safetensors(cli, capsys):
    weights = cli["model"] / "model.safetensors"
    torch.save(load_file(weights), cli["model"] / "pytorch_model.bin")
    weights.unlink()
    assert run(["train", *flags(cli)], capsys)[0] == 0
    files = {file.name for file in cli["output_dir"].rglob("*") if file.is_file()}
    assert {"model.safetensors", "optimizer.pt"} <= files
    binary = {name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl", ".pickle", ".npy", ".npz"))}
    assert binary == {*STATES, "training_args.bin"}  # the Trainer's


# Code that comes with a model, or with data


def with_code(folder: Path, file: str, changes: dict, mark: Path) -> None:
    found = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(found | changes))
    (folder / "theirs.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")


CODE = {
    "a model": ("config.json", {"auto_map": {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"}}),
    "a new model": (
        "config.json",
        {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"}},
    ),
    "a tokenizer": (
        "tokenizer_config.json",
        {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["theirs.T", None]}},
    ),
}


@pytest.mark.parametrize("command", ["train", "generate", "eval", "contexts"])
@pytest.mark.parametrize("what", ["a new model", "a tokenizer"])
def test_code_of_a_model_is_not_run_unasked(cli, mark, capsys, what, command):
    with_code(cli["model"], *CODE[what], mark)
    line = refused([command, *flags(of_command(cli, command))], capsys)
    assert "comes with code of its own, which is not run by itself: read it, and give --trust-remote-code yes" in line


def test_a_known_model_that_also_brings_code_is_the_known_one(cli, mark, capsys):
    with_code(cli["model"], *CODE["a model"], mark)
    assert run(["train", *flags(cli)], capsys)[0] == 0


def test_code_of_a_model_is_run_if_asked(cli, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with_code(cli["model"], *CODE["a new model"], tmp_path / "ran")
    line = refused(["train", *flags(cli), "--trust-remote-code", "yes"], capsys)
    assert "theirs" in line  # it has no class C
    assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize("name", ["", "script.py"])
def test_code_of_a_data_set_is_not_run(cli, tmp_path, mark, capsys, name):
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    refused(["train", *flags(cli | {"dataset": tmp_path / "script" / name})], capsys)


# No new ways


SOURCES = ("selfgen", "selfgen_kernels", "benchmarks", "tools", "examples", "setup.py")
PICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
MAY_PICKLE = {
    "selfgen/training/processes.py",  # for itself, in a folder that only its user can read
    "selfgen/training/shards.py",  # reads a list of names and sizes, and nothing else
}
RUNNING = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_VALUES = {
    ("weights_only", False), ("allow_pickle", True), ("trust_remote_code", True), ("safe_serialization", False),
    ("shell", True),
}  # fmt: skip
FORBIDDEN_CALLS = {
    "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "torch.save",
    "torch.hub.load", "pandas.read_pickle", "pd.read_pickle",
}  # fmt: skip


def dangers(text: str, file: str) -> list[str]:
    """Calls and imports by which a file could run what others wrote."""
    found = []
    for node in ast.walk(ast.parse(text)):
        what = None
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            if PICKLING & {name.split(".")[0] for name in names} and file not in MAY_PICKLE:
                what = f"imports {', '.join(names)}; write JSON or safetensors"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {one.arg: getattr(one.value, "value", None) for one in node.keywords}
            if (isinstance(node.func, ast.Name) and called in RUNNING) or called in FORBIDDEN_CALLS:
                what = f"calls {called}"
            elif called == "torch.load" and given.get("weights_only") is not True:
                what = "calls torch.load without weights_only=True"
            elif wrong := FORBIDDEN_VALUES & {
                (name, value) for name, value in given.items() if isinstance(value, bool)
            }:
                what = f"gives {wrong}"
        if what:
            found.append(f"{file}:{getattr(node, 'lineno', 0)}: {what}")
    return found


def test_no_source_runs_what_others_wrote():
    files = [
        file for name in SOURCES for file in ([ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("*.py"))
    ]
    assert len(files) > 100
    assert [one for file in files for one in dangers(file.read_text(), str(file.relative_to(ROOT)))] == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from joblib import load",
        "x = eval(text)",
        "exec(code)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=known)",
        "np.load(f, allow_pickle=True)",
        "yaml.load(f, Loader=yaml.Loader)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "model.save_pretrained(folder, safe_serialization=False)",
        "subprocess.run(line, shell=True)",
        "os.system(line)",
    ],
)
def test_a_new_way_is_found(text):
    assert dangers(text, "selfgen/new.py")


@pytest.mark.parametrize(
    "text", ["model.eval()", "torch.load(f, weights_only=True)", "yaml.safe_load(f)", "re.compile(x)"]
)
def test_what_is_no_danger(text):
    assert dangers(text, "selfgen/new.py") == []


# Licences


def test_licences_are_permissive_and_on_their_page():
    assert licences.faults(licences.licences(), licences.PAGE.read_text()) == []


@pytest.mark.parametrize(
    ("expression", "permissive"),
    [
        ("MIT", True),
        ("Apache-2.0 AND MIT", True),
        ("GPL-3.0-only OR MIT", True),
        ("MIT AND GPL-2.0-only", False),
        ("MIT AND (GPL-3.0-only OR Zlib)", False),
        ("LGPL-3.0-or-later", False),
        ("Proprietary", False),
    ],
)
def test_permissive_licences(expression, permissive):
    assert licences.is_permissive(expression) is permissive
    fault = licences.Licence("thing", licences.RUNTIME, expression).fault
    assert (fault is None) is permissive
    assert permissive or fault.startswith(f"thing: {expression} is not among")


def test_a_licence_that_nobody_knows_is_a_fault():
    unknown = licences.Licence("thing", licences.RUNTIME, None)
    assert unknown.fault == "thing: its metadata name no licence"
    assert any("no row for thing" in fault for fault in licences.faults([unknown], licences.PAGE.read_text()))
