"""NVIDIA's compute-sanitizer over one small call of every op: memory out of bounds, then races in shared memory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

from .. import results
from ..lab import Lab

TOOLS = ("memcheck", "racecheck", "synccheck")


class SanitizerError(Exception):
    """A tool has found something."""


def run(lab: Lab) -> None:
    binary = shutil.which("compute-sanitizer")
    if binary is None:
        lab.skip("there is no compute-sanitizer on this machine's PATH")
    bad = []
    for place, tool in enumerate(TOOLS):
        log = lab.folder / f"sanitizer-{tool}.log"
        command = [binary, "--tool", tool, sys.executable, "-m", "benchmarks.gpu.targets", "ops"]
        command += ["--fake"] if lab.rehearsal else []
        limit = max(1.0, (lab.left - 2) / (len(TOOLS) - place))
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that each tensor has bounds of its own
        with log.open("w+") as output:
            try:
                code = subprocess.run(
                    command, cwd=results.ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False,
                    timeout=limit,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                code = None
        errors, called = found_in(text := log.read_text(errors="replace"))
        lab.row("compute-sanitizer", {"tool": tool}, errors=errors, ops=called, ended=code is not None)
        if errors or (code not in (0, None)):
            bad.append(f"{tool}: {errors} errors, ended with {code} ({text.strip().splitlines()[-1:]})")
    if bad:
        raise SanitizerError("; ".join(bad))


def found_in(text: str) -> tuple[int | None, int]:
    """Errors that a tool reports (None where it did not get to its summary), and how many calls have been made."""
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    return int(summary[1]) if summary else None, len(re.findall(r"^called ", text, re.MULTILINE))
