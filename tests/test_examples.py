"""Each example runs as its docstring says: with a tiny model in a few steps, and with the real one as it stands."""

from __future__ import annotations

import ast
import json
import runpy
import sys
from pathlib import Path

import pytest

from selfgen import cli
from tools.tiny_model import save_tiny_model

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PROGRAMS = {"demo", "side_by_side"}  # which tests/test_demo.py runs
FAST = {  # options by which an example is short; all but the first have a model
    "ops": [],
    "pytorch_loop": ["--steps", "2"],
    "accelerate_loop": ["--steps", "2"],
    "trl_sft": ["--max_steps", "2", "--use_cpu", "true", "--report_to", "none"],
    "lora": ["--max-steps", "2"],
    "rac": ["--max-steps", "2"],
    "offline_rounds": ["--rounds", "2"],
    "teacher": ["--max-steps", "2"],
}
NEEDS = {"trl_sft": "trl", "lora": "peft"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(str(folder))
    return folder


def run(name, options, model, monkeypatch, folder):
    pytest.importorskip(NEEDS.get(name, "torch"))
    monkeypatch.chdir(folder)  # where the example writes its outputs
    models = [] if name == "ops" else ["--model", str(model)]
    models += ["--teacher", str(model)] if name == "teacher" else []
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *models, *options])
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize("name", FAST)
def test_an_example_runs(name, tiny, monkeypatch, tmp_path, capfd):
    found = run(name, FAST[name], tiny, monkeypatch, tmp_path)
    trainer = found.get("trainer")
    if trainer is not None:
        assert trainer.state.global_step == 2
        assert sum(entry.get("self_share", 0) for entry in trainer.state.log_history) > 0 or name == "rac"
    if name in ("pytorch_loop", "accelerate_loop"):
        assert found["mixed"].stats.self_tokens > 0
        assert "step 2: loss" in capfd.readouterr().out
    if name == "rac":
        assert "corrected:" in capfd.readouterr().out
    if name == "offline_rounds":
        assert "round-1: 12 rows" in capfd.readouterr().out


def run_notebook(model, monkeypatch, folder, **variables):
    """The figures that the notebook leaves, as its last cell prints them."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for name, value in {"MODEL": str(model), **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(folder / "jupyter"))
    notebook = nbformat.read(EXAMPLES / "gap.ipynb", as_version=4)
    kernel = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], "language": "python"}
    spec = folder / "jupyter" / "kernels" / "this" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps(kernel | {"display_name": "this"}))
    nbclient.NotebookClient(notebook, kernel_name="this", resources={"metadata": {"path": str(folder)}}).execute()
    return [out["text"] for cell in notebook.cells for out in cell.get("outputs", []) if out.get("name") == "stdout"]


@pytest.mark.slow
def test_the_notebook_measures_the_gap_before_and_after(tiny, monkeypatch, tmp_path):
    *_, last = run_notebook(tiny, monkeypatch, tmp_path, STEPS="2", ROWS="4")
    before, after = last.splitlines()
    assert before.startswith("before: ")
    assert after.startswith("after:  ")
    assert "points lost by running freely" in before


def test_the_notebook_is_saved_without_outputs():
    for cell in json.loads((EXAMPLES / "gap.ipynb").read_text())["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.slow
def test_the_notebook_with_the_real_model(smollm2_folder, monkeypatch, tmp_path):
    assert run_notebook(smollm2_folder, monkeypatch, tmp_path)


@pytest.mark.slow
def test_quantized_weights(tiny, monkeypatch, tmp_path):
    pytest.importorskip("optimum.quanto")
    run("lora", ["--max-steps", "2", "--bits", "8"], tiny, monkeypatch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FAST.keys() - {"ops"}))
def test_an_example_runs_with_the_real_model(name, smollm2_folder, monkeypatch, tmp_path):
    options = ["--use_cpu", "true", "--report_to", "none"] if name == "trl_sft" else []
    run(name, options, smollm2_folder, monkeypatch, tmp_path)


def test_the_file_of_options_runs(tiny, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": "one two", "answer": "two one"}) + "\n" for _ in range(8)))
    given = [
        "--model",
        str(tiny),
        "--dataset",
        str(rows),
        "--dataset-config",
        "",
        "--use-cpu",
        "yes",
        "--max-steps",
        "2",
    ]
    assert cli.main(["train", str(EXAMPLES / "bss.yaml"), *given, "--output-dir", str(tmp_path / "out")]) in (0, None)
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 2


def test_examples_are_short_and_say_what_they_show():
    page = (EXAMPLES / "README.md").read_text()
    for file in EXAMPLES.iterdir():
        if file.suffix in (".py", ".yaml", ".ipynb") and file.stem not in PROGRAMS | {"__init__"}:
            assert f"]({file.name})" in page, f"examples/README.md does not list {file.name}"
        if file.suffix == ".py" and file.stem not in PROGRAMS | {"__init__"}:
            text = file.read_text()
            assert len(text.splitlines()) <= 60
            assert f"examples/{file.name}" in (ast.get_docstring(ast.parse(text)) or "")
            assert file.stem in FAST
        if file.suffix == ".ipynb":
            cells = json.loads(file.read_text())["cells"]
            assert sum(len(cell["source"]) for cell in cells if cell["cell_type"] == "code") <= 60
