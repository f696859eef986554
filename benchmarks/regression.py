"""Did ours get slower compared with the peers? This compares ratios, which depend on the machine less than seconds do.

    python -m benchmarks.regression outputs/bench.json [--update]

A ratio is a peer's seconds over ours (``extra_info["ratios"]`` of a benchmark). Exits with 1 if one fell by more than
the tolerance below the committed baseline; ``--update`` writes what was measured into that.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

BASELINE = Path(__file__).parent / "results" / "baseline.json"
TOLERANCE = 0.25
"""By which part a ratio may fall: two runs of the smallest shapes on a shared machine differ by up to a fifth."""

Ratios = dict[str, dict[str, float]]  # benchmark -> peer -> its seconds over ours


class Comparison(NamedTuple):
    """One line each."""

    worse: list[str]
    new: list[str]  # measured, not in the baseline
    missing: list[str]  # in the baseline, not measured
    compared: int


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, help="what pytest --benchmark-json wrote")
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE)
    parser.add_argument("--update", action="store_true", help="replace the baseline by the measured ratios")
    options = parser.parse_args(arguments)

    results = json.loads(options.results.read_text())
    machine, measured = machine_of(results["machine_info"]), ratios_of(results)
    baseline = json.loads(options.baseline.read_text()) if options.baseline.is_file() else None
    if options.update:
        update(options.baseline, baseline, machine, measured)
        print(f"{options.baseline}: {sum(map(len, measured.values()))} ratios written")
        return 0
    if baseline is None:
        print(f"no baseline ({options.baseline}); --update makes one")
        return 0
    found = compare(measured, baseline["ratios"], options.tolerance)
    for title, lines in (("not in the baseline", found.new), ("not measured this time", found.missing)):
        if lines:
            print(f"{len(lines)} ratios {title}:", *lines[:10], *(["..."] if len(lines) > 10 else []), sep="\n  ")
    print(f"{found.compared} ratios compared, {len(found.worse)} worse by more than {options.tolerance:.0%}")
    print(*(f"  {line}" for line in found.worse), sep="\n")
    if machine != baseline["machine"]:
        print(
            f"the baseline comes from another machine ({baseline['machine']}; this is {machine}), so nothing fails here"
        )
        return 0
    return 1 if found.worse else 0


def ratios_of(results: dict[str, Any]) -> Ratios:
    """Of each benchmark that has some."""
    ratios = {entry["fullname"]: entry["extra_info"].get("ratios", {}) for entry in results["benchmarks"]}
    return {name: dict(peers) for name, peers in ratios.items() if peers}


def machine_of(info: dict[str, Any]) -> str:
    """What has to be the same for ratios to be: the processor, threads and the GPU."""
    cpu = info.get("cpu", {})
    processor = f"{cpu.get('brand_raw', info.get('machine'))} (family {cpu.get('family')}, model {cpu.get('model')})"
    return ", ".join(filter(None, [processor, f"{info.get('threads', cpu.get('count'))} threads", info.get("gpu")]))


def compare(measured: Ratios, baseline: Ratios, tolerance: float) -> Comparison:
    now, before = (
        {(name, peer): ratio for name, peers in ratios.items() for peer, ratio in peers.items()}
        for ratios in (measured, baseline)
    )
    worse = [
        f"{key[0]}: {key[1]} / ours is {now[key]:.2f}, was {before[key]:.2f} ({now[key] / before[key] - 1:+.0%})"
        for key in before
        if key in now and now[key] < before[key] * (1 - tolerance)
    ]
    new, missing = (
        [f"{name}: {peer}" for name, peer in some if (name, peer) not in others]
        for some, others in ((now, before), (before, now))
    )
    return Comparison(worse, new, missing, len(now.keys() & before.keys()))


def update(file: Path, baseline: dict[str, Any] | None, machine: str, measured: Ratios) -> None:
    """Replace the measured benchmarks' entries; another machine's baseline goes as a whole."""
    kept = baseline["ratios"] if baseline and baseline["machine"] == machine else {}
    ratios = {**kept, **{name: {p: float(f"{r:.4g}") for p, r in peers.items()} for name, peers in measured.items()}}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"machine": machine, "ratios": dict(sorted(ratios.items()))}, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
