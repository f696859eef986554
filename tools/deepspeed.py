"""Install DeepSpeed into an environment of its own, and run what is tested with it: two processes on CPUs, by gloo.

It is no dependency of selfgen, and compiles what it needs when it is first used, so neither `make test` nor CI has it.
"""

from __future__ import annotations

import os
import subprocess
import sys

from .versions import ROOT, Environment

DEEPSPEED = "deepspeed==0.19.8"
NEEDS = ("hjson", "ninja", "py-cpuinfo", "msgpack", "pydantic", "einops", "psutil", "packaging")


def main(arguments: list[str]) -> int:
    environment = Environment("deepspeed")
    environment.pip(*NEEDS)
    environment.pip("--no-deps", DEEPSPEED, DS_BUILD_OPS="0")  # torch is there
    command = [environment.python, "-m", "pytest", "-q", "-m", "", "tests/test_deepspeed.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main(sys.argv[1:]))
