"""All that is to be known from a GPU in one run, most important first, so that an early end loses the least.

    python -m benchmarks.gpu [--section NAME ...] [--seconds S] [--output DIR] [--again] [--fake]

Each section runs in a process group of its own, which is killed at its limit, and writes what it finds line by line
into DIR/NAME.jsonl. A second run goes on where the first one ended: sections that are done are left as they are.
DIR/summary.md tells it all. ``--fake`` rehearses the sections on a CPU.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from pathlib import Path

from .runner import MixedError, Section, run_sections

SECTIONS = tuple(
    Section(name, f"benchmarks.gpu.sections.{name}", seconds)
    for name, seconds in (
        ("constants", 30),
        ("correctness", 90),
        ("kernels", 120),
        ("engine", 110),
        ("step", 110),
        ("answers", 40),
        ("curves", 90),
        ("profile", 40),
        ("sanitizer", 100),
        ("lifetime", 30),
    )
)
REHEARSAL = 3600  # seconds: limits that no section reaches, however busy the machine is


def main(argv: list[str] | None = None) -> int:
    names = [section.name for section in SECTIONS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--section", nargs="+", choices=names, default=[], metavar="NAME", help=", ".join(names))
    total = sum(section.seconds for section in SECTIONS)
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"for all sections together (default: {total:.0f} for all; {REHEARSAL} with --fake)",
    )
    parser.add_argument("--output", type=Path, help="folder (default: outputs/gpu, or outputs/gpu-fake)")
    parser.add_argument("--again", action="store_true", help="run sections again that are done")
    parser.add_argument("--fake", action="store_true", help="rehearse on the CPU with tiny sizes; measures nothing")
    args = parser.parse_args(argv)
    if not args.fake:
        import torch

        if not torch.cuda.is_available():
            print("benchmarks.gpu needs a CUDA device, and torch finds none here; --fake rehearses it", file=sys.stderr)
            return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which kills the section, and writes that it was stopped
    folder = args.output or Path("outputs") / ("gpu-fake" if args.fake else "gpu")
    try:
        status = run_sections(
            SECTIONS,
            folder.resolve(),
            chosen=args.section,
            seconds=REHEARSAL if args.fake and args.seconds is None else args.seconds,
            rehearsal=args.fake,
            again=args.again,
            command=shlex.join(["python", "-m", "benchmarks.gpu", *(sys.argv[1:] if argv is None else argv)]),
        )
    except MixedError as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 2
    print(f"==> {folder / 'summary.md'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
