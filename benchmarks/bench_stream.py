"""A stream of a million rows: memory that it takes beyond the first rows, and rows per second.

    make bench            (or: pytest benchmarks/bench_stream.py)

Short rows of JSON lines are written to a file, and read as training reads them: loaded, tokenized with the chat
template of SmolLM2, and padded into batches, in a process of its own. Nothing is trained, so the rows per second are
those at which a data loader without workers could feed a model. Fewer rows:

    python -m benchmarks.bench_stream 20000
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from selfgen.data import Collator, RowOptions, load_rows, pad_token_id
from selfgen.data.streams import StreamedRows
from tools.real_parts import ROOT, smollm2_path

ROWS = 1_000_000
FIRST = 20_000  # rows after which memory is looked at for the first time
BATCH = 32
MOST_GROWTH = 64 << 20  # bytes
RESET = Path("/proc/self/clear_refs")


def held_bytes(peak: bool) -> int:
    """Bytes of memory, not of a GPU's, that this process holds, or held at most since its peak was reset."""
    name = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def write_rows(file: Path, rows: int) -> None:
    """One in a thousand has an empty answer."""
    with file.open("w") as lines:
        for row in range(rows):
            answer = "" if row % 1000 == 999 else f"{row} + {row % 97} = {row + row % 97}"
            lines.write(json.dumps({"prompt": f"What is {row} + {row % 97}?", "completion": answer}) + "\n")


def measure(rows: int) -> dict[str, float]:
    """Seconds, and bytes: of the file, held after the first rows, and at the peak from there on."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(file, rows)
        tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
        stream = load_rows(file, streaming=True)
        given = iter(StreamedRows(stream, tokenizer, RowOptions(max_length=256), name="train", endless=True))
        collate = Collator(pad_token_id(tokenizer))
        read = kept = tokens = 0
        first = None
        started = time.perf_counter()
        while read + BATCH < rows:
            batch = collate(list(islice(given, BATCH)))
            report = batch.pop("read").report
            read, kept = read + report.rows, kept + report.kept
            tokens += int(batch["attention_mask"].sum())
            if first is None and read >= min(FIRST, rows // 2):
                first = held_bytes(peak=False)
                RESET.write_text("5")  # man 5 proc
        seconds = time.perf_counter() - started
        held = {"held": first or 0, "peak": held_bytes(peak=True), "file": file.stat().st_size}
    return {"rows": read, "kept": kept, "tokens": tokens, "seconds": seconds, **held}


@pytest.mark.skipif(not RESET.exists(), reason="the peak is read from Linux's /proc")
def test_stream(benchmark, report):
    found: dict[str, float] = {}

    def run() -> None:
        command = [sys.executable, "-m", "benchmarks.bench_stream", str(ROWS)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.update(json.loads(done.stdout.splitlines()[-1]))

    benchmark.pedantic(run, rounds=1)
    growth = found["peak"] - found["held"]
    row = {
        "rows": int(found["rows"]),
        "of it dropped": int(found["rows"] - found["kept"]),
        "file, MiB": int(found["file"]) >> 20,
        "tokens per row": round(found["tokens"] / found["kept"], 1),
        "rows / s": round(found["rows"] / found["seconds"]),
        f"held after {FIRST} rows, MiB": int(found["held"]) >> 20,
        "growth to the peak, MiB": round(growth / 2**20, 1),
    }
    benchmark.extra_info.update(row)
    report("a stream: loaded, tokenized and padded", [row])
    assert growth <= MOST_GROWTH


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]) if len(sys.argv) > 1 else ROWS)))
