"""Nsight Compute on the fused head and on the product that it is compared with: what bounds each kernel."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys

from .. import results
from ..lab import Lab

METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes.sum": "DRAM",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM, % of peak",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM, % of peak",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue slots, %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps, %",
    "launch__registers_per_thread": "registers",
    "launch__grid_size": "programs",
}
MOST = 40  # kernels of the second call of each case, which is all that is profiled


def run(lab: Lab) -> None:
    ncu = shutil.which("ncu")
    if ncu is None:
        lab.skip("there is no ncu on this machine's PATH")
    command = [ncu, "--csv", "--clock-control", "none", "--metrics", ",".join(METRICS), "--launch-count", str(MOST)]
    command += ["--profile-from-start", "off", sys.executable, "-m", "benchmarks.gpu.targets", "head"]
    command += ["--fake"] if lab.rehearsal else []
    done = subprocess.run(
        command, cwd=results.ROOT, capture_output=True, text=True, check=False, timeout=max(1.0, lab.left - 2)
    )
    print(done.stdout[-4000:], done.stderr[-4000:], sep="\n", flush=True)
    kernels = kernels_of(done.stdout)
    if not kernels:
        raise RuntimeError(f"ncu ended with {done.returncode} and no kernel: {(done.stderr or done.stdout)[-200:]}")
    for place, (name, values) in enumerate(kernels):
        lab.row("ncu: the head at 64 rows, kernel by kernel", {"": place, "kernel": name}, **values)


def kernels_of(text: str) -> list[tuple[str, dict[str, str]]]:
    """Kernels in the order of their launches with their metrics, of ncu's CSV, which its other lines stand around."""
    begin = text.find('"ID"')
    found: dict[str, tuple[str, dict[str, str]]] = {}
    for row in csv.DictReader(io.StringIO(text[begin:])) if begin >= 0 else ():
        name = METRICS.get(row.get("Metric Name") or "")
        if name:
            _, values = found.setdefault(row["ID"], (row["Kernel Name"][:60], {}))
            values[name] = f"{row['Metric Value']} {row['Metric Unit']}".strip().removesuffix(" %")
    return list(found.values())
