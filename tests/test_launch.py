"""Runs that torchrun and accelerate start, and how they end: together, and with the message of the one that failed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from helpers.cli import flags
from helpers.versions import FSDP2_ONCE
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "examples" / "launch"
ON_CPUS = "from helpers.sharded import fsdp_on_cpus\nfsdp_on_cpus()\n"
COMMAND = "import sys\nfrom selfgen.cli import main\nsys.exit(main(sys.argv[1:]))\n"


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return {
        **os.environ,
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


def torchrun(script: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    return subprocess.Popen(
        [*command, *arguments], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


FAILS = """
import os, signal, sys
from pathlib import Path
from helpers.runs import CASES
from selfgen.context.forward import Forward

trainer = CASES["plain"].trainer(Path(sys.argv[1]), 1, fsdp=True)
run, calls = Forward.logits, []


def fails(*args, **kwargs):
    calls.append(trainer.state.global_step)
    if os.environ["RANK"] == "1" and calls.count(1) == 2:
        if sys.argv[2] == "SIGINT":
            os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("a pass has failed in the second process")
    return run(*args, **kwargs)


Forward.logits = fails
trainer.train()
"""


@pytest.mark.parametrize("how", ["error", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_all_processes_end(tmp_path, how):
    """Where one of them fails in the middle of a pass."""
    script = tmp_path / "fails.py"
    script.write_text(ON_CPUS + FAILS)
    process = torchrun(script, str(tmp_path / "out"), how)
    output, _ = process.communicate(timeout=150)
    assert process.returncode != 0
    assert ("KeyboardInterrupt" if how == "SIGINT" else "a pass has failed in the second process") in output
    assert "[rank1]" in output


@pytest.mark.slow
def test_an_error_of_all_processes_is_told_once(arguments, tmp_path):
    """And again at the end, in the summary of torchrun."""
    script = tmp_path / "train.py"
    script.write_text(COMMAND)
    output, _ = torchrun(script, "train", *flags(arguments), "--weights", "some").communicate(timeout=150)
    error = "selfgen train: error: weights is 'some'; accepted: auto, gathered, sharded"
    assert [line for line in output.splitlines() if line.startswith("selfgen train")] == [error]
    assert error in output.rpartition("Root Cause")[2]


def trained(arguments, command: list[str], **more: str) -> str:
    """What a command says that trains in two processes."""
    given = {name: value for name, value in arguments.items() if name != "token_budget"}
    saves = {"save_strategy": "no"} if FSDP2_ONCE else {"save_strategy": "steps", "save_steps": 1}
    options = flags({**given, "max_steps": 2, **saves})
    env = environment() | more
    done = subprocess.run([*command, *options], env=env, text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr
    AutoModelForCausalLM.from_pretrained(arguments["output_dir"])
    return done.stdout + done.stderr


@pytest.mark.slow
def test_ddp(arguments):
    said = trained(arguments, [str(LAUNCH / "ddp.sh")], GPUS="2")
    assert "weights: whole in each of 2 processes (DDP)" in said


def test_the_file_for_fsdp2_is_accelerates():
    config = load_config_from_file(str(LAUNCH / "fsdp2.yaml"))
    assert config.fsdp_config["fsdp_version"] == 2
    assert {name.removeprefix("fsdp_") for name in config.fsdp_config} <= _options_of_launch()


@pytest.mark.slow  # test_fsdp.py trains in two processes, too
def test_fsdp2(arguments, tmp_path):
    """As the file says, but for the number of processes, and on CPUs."""
    script = tmp_path / "train.py"
    script.write_text(ON_CPUS + COMMAND)
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli"]
    launch = [*accelerate, "launch", "--config_file", str(LAUNCH / "fsdp2.yaml"), "--num_processes", "2"]
    said = trained(arguments, [*launch, "--num_cpu_threads_per_process", "1", str(script), "train"])
    assert "weights: sharded over 2 processes (FSDP2)" in said
    assert "FSDP2 computes with weights in bfloat16" in said
    checkpoint = Path(arguments["output_dir"]) / "checkpoint-2"
    assert FSDP2_ONCE or (checkpoint / "pytorch_model_fsdp_0" / ".metadata").is_file()


def _options_of_launch() -> set[str]:
    parser = launch_command_parser()
    known = {action.dest for action in parser._actions}
    return {name.removeprefix("fsdp_") for name in known if name.startswith("fsdp_")}
