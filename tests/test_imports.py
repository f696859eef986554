"""What is imported when, in fresh processes: nothing heavy before it is needed, and the help without it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

import selfgen
from selfgen.cli.help import FILE, text_of
from selfgen.cli.terminal import HelpFormatter

HEAVY = ("torch", "transformers", "datasets", "accelerate", "numpy", "pandas", "triton")


def imported_by(code: str, *, without: tuple[str, ...] = ()) -> set[str]:
    """The modules that a fresh process has loaded after ``code``, in which ``without`` can't be imported."""
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in without)
    told = "\nprint('loaded', *(name for name, module in sys.modules.items() if module is not None))"
    done = subprocess.run([sys.executable, "-c", f"import sys\n{blocked}{code}{told}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "a warning, or something else, was said"
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_selfgen_loads_nothing_by_itself():
    assert not imported_by("import selfgen; selfgen.__version__, dir(selfgen)") & {*HEAVY, "selfgen_kernels"}


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["train", "--method", "rac", "-h"],
        ["eval", "--help"],
        ["doctor", "--help"],
    ],
    ids=" ".join,
)
def test_help_and_version_load_nothing(arguments):
    code = f"from selfgen.cli import main\ntry: main({arguments})\nexcept SystemExit: pass"
    assert not imported_by(code) & {*HEAVY, "selfgen_kernels"}


def test_an_unknown_command_is_told_at_once():
    code = "from selfgen.cli import main\ntry: main(['trian'])\nexcept SystemExit as stop: assert stop.code == 2"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nassert 'torch' not in sys.modules"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr


def test_kernels_need_torch_alone():
    """Nothing else is there, and nothing of torch is loaded that `import torch` doesn't load."""
    others = ("transformers", "datasets", "accelerate", "peft", "triton", "filelock", "yaml", "pyarrow", "tqdm")
    use = "selfgen_kernels.gumbel_noise(0, torch.arange(2), torch.arange(2), 4, stream=1)"
    torch_alone = imported_by("import torch")
    more = imported_by("import selfgen_kernels", without=others) - torch_alone
    assert {name for name in more if not name.startswith("selfgen_kernels")} == set()
    imported_by(f"import torch, selfgen_kernels\n{use}", without=others)


def test_every_public_name_is_found():
    names = "; ".join(f"assert selfgen.{name}" for name in selfgen.__all__)
    assert "selfgen.training" in imported_by(f"import selfgen\n{names}\nfrom selfgen import *\nassert BSSTrainer")
    rooms = ("context", "correction", "data", "evaluation", "generation", "stored_contexts", "training")
    for room in rooms:  # as attributes, which they were when selfgen loaded them all
        assert getattr(selfgen, room).__name__ == f"selfgen.{room}"
    assert {*selfgen.__all__, *rooms} <= set(dir(selfgen))
    with pytest.raises(AttributeError, match="has no attribute 'BSSTrainr'"):
        selfgen.BSSTrainr  # noqa: B018


def test_the_kept_help_is_what_the_parsers_show(monkeypatch):
    """The commands show it in place of their parsers, which take seconds to make."""
    from tools.help import everything, parser_of

    kept, now = json.loads(FILE.read_text()), everything()
    assert kept.keys() == now.keys()
    for kind in now:
        assert kept[kind] == now[kind], f"an option of selfgen {kind} has changed: python -m tools.help"
    for width in (60, 80, 130):
        monkeypatch.setattr(shutil, "get_terminal_size", lambda width=width: shutil.os.terminal_size((width, 24)))
        for kind in now:
            parser = parser_of(kind)
            assert parser.formatter_class is HelpFormatter
            assert text_of(kept[kind]) == parser.format_help()
