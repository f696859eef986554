"""A model, not a measurement: what an optimizer step of online BSS costs against SFT on GPUs that are not here.

    python -m benchmarks.roofline [--achievable 0.6] [--layer-host-us 400] [--json FILE]
    python -m benchmarks.roofline --check [--bench outputs/bench.json]    the same formula against this CPU
    python -m benchmarks.roofline --measure                               writes results/passes.json, which it reads

The formula is the docstring of ``costs.py``. What goes into it:

- What each pass carries is measured: SmolLM2-135M on 32 GSM8K rows. It depends on the rows, p, the budget and how often
  the model agrees with the reference, not on the device. A model of 70B is assumed to agree as often as SmolLM2 does.
- The token budget is what ``measure_budget`` finds if a forward takes what the formula says, and the passes
  are those of the nearest budget measured.
- `--achievable` of the data sheet's FLOP rate and of its bandwidth; it cancels out where launching takes no time.
- Passes are launched by one of ``costs.ENGINES``: with no launch costs, which is a bound; with one graph a pass, whose
  nodes tests count on a CPU; with a graph of the model alone, and with none, as measured on an H200 (results/gpu.md).
  The table of a pass has these measurements beside what the formula gives: its two constants, of a graph's node and of
  a launch, were inferred from them, so other models and GPUs are extrapolations.
- `--layer-host-us` of host time per layer and training forward: about 40 launches of 10 microseconds each through
  Python and eager torch, an assumption. It is 0 where launches cost nothing.
- Weights in fp32 under autocast are cast in each training forward, and for passes once a generation: the last table.
- Weights, gradients and AdamW's state (16 bytes per parameter) lie on the fewest GPUs that hold them, in perfect tensor
  parallelism: each has its share of all FLOPs and bytes. Communication costs nothing, activations take no memory.
- Rows of a step are trained on in micro-batches of 8 without padding. It would add to all but the passes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from selfgen import ContextGenerator
from selfgen.context.packed import packed_linears
from selfgen.data import tokenize_rows
from tools.real_parts import gsm8k, load_smollm2

from .costs import (
    AUTOCAST,
    BF16,
    ENGINES,
    FP32,
    GPUS,
    MEASURED,
    NO_GRAPH,
    SHAPES,
    SMOLLM2,
    Costs,
    Device,
    Engine,
    Pass,
    Precision,
    Shape,
    micro_batches,
)

PASSES = Path(__file__).parent / "results" / "passes.json"
SELF_PROBS = 0.1, 0.25, 0.5, 1.0
BUDGETS = 256, 512, 1024, 2048, 4096, 8192  # about a CPU's, and those of GPUs
ROWS = 32  # of an optimizer step, as in bench_step
CHECK, OFF_BY = "The model against this machine", "predicted / measured"
STEP_RATIOS = {"BSS / SFT, checkpointing": True, "BSS / SFT": False}  # columns of bench_step
FACTOR = 1.5  # found: 0.87 to 1.31
H200 = Device("H200, rates as measured", 790e12, 4.3e12, 141e9)
SMALL = Pass(64, 16, 1600, 64 * 200)  # of 8 rows of 200
PASS_TITLE = "A pass of 64 tokens in bf16, ms: the formula at an H200's measured rates, and what was measured"
MEASURED_MS = {MEASURED.name: "4.6 to 8.7", NO_GRAPH.name: "33"}  # SmolLM2 in bf16: results/gpu.md


def nearest_run(measured: dict[str, Any], self_prob: float, budget: int) -> dict[str, Any]:
    runs = [run for run in measured["runs"] if run["p"] == self_prob]
    return min(runs, key=lambda run: abs(math.log(run["budget"] / budget)))


def passes_table(measured: dict[str, Any]) -> list[dict[str, Any]]:
    rows = {run["budget"]: {"budget": run["budget"]} for run in measured["runs"]}
    for run in measured["runs"]:
        computed = sum(tokens for tokens, *_ in run["passes"]) / sum(measured["lengths"])
        rows[run["budget"]][f"p = {run['p']}"] = f"{len(run['passes'])}, {computed:.2f}"
    return list(rows.values())


def predict(
    shape: Shape,
    gpu: Device,
    measured: dict[str, Any],
    achievable: float,
    layer_host: float,
    engine: Engine = ENGINES[0],
    precision: Precision = BF16,
) -> dict[str, Any]:
    """One row of the model's table. ``layer_host`` in seconds."""
    gpus = math.ceil(precision.state * shape.parameters / gpu.memory)
    device, host = gpu.times(achievable * gpus), layer_host * shape.layers
    costs = Costs(shape, device, precision, host, engine.seconds(shape))
    batches = micro_batches(measured["lengths"])
    row: dict[str, Any] = {"GPU": gpu.name, "model": shape.name, "GPUs": gpus, "budget": costs.token_budget()}
    for p in SELF_PROBS:
        run = nearest_run(measured, p, row["budget"])
        bss = costs.bss(batches, [Pass(*work) for work in run["passes"]])
        ratios = [bss / costs.sft(batches, checkpointing=checkpointing) for checkpointing in (True, False)]
        row[f"p = {p}"] = " / ".join(f"{ratio:.2f}" for ratio in ratios)
    return row


def pass_table() -> list[dict[str, Any]]:
    """Milliseconds of a pass of 64 tokens in bf16 on an H200, by engine; measured ones beside them."""
    shapes = [SMOLLM2, *(shape for shape in SHAPES if shape.name in ("Llama-3.2-1B", "Llama-3.1-8B"))]
    rows = []
    for engine in ENGINES:
        row = {"passes": engine.name, "their counts are": engine.basis}
        for shape in shapes:
            plain, casting = (
                Costs(shape, H200, precision, 0.0, engine.seconds(shape), casts=True) for precision in (BF16, AUTOCAST)
            )
            row[shape.name] = f"{1e3 * plain.a_pass(SMALL):.2f}"
            row[f"{shape.name}, casting"] = f"{1e3 * casting.a_pass(SMALL):.2f}"
        row[f"{SMOLLM2.name}, measured"] = MEASURED_MS.get(engine.name, "")
        rows.append(row)
    return rows


def title_of(engine: Engine, precision: Precision, host: float) -> str:
    """Of a table of steps; ``host`` in microseconds."""
    weights = ", weights in fp32 under autocast" if precision.cast else ""
    passes = f"passes: {engine.name} ({engine.basis})"
    return (
        f"Model, not measured: BSS / SFT with checkpointing, BSS / SFT{weights}; {passes}; "
        f"host time a layer of a training forward {host:g} us"
    )


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[Pass]]:
    """The passes that ``model`` computes inside, those of the generator's probe included."""
    passes: list[Pass] = []

    def note(_module: nn.Module, _args: tuple, arguments: dict[str, Any]) -> None:
        if (ragged := arguments.get("ragged_pass")) is not None:
            keys = ragged.kv_ranges[ragged.cu_seqlens_q.diff() > 0, 1]
            pairs = ragged.position_ids + 1
            passes.append(Pass(ragged.num_tokens, len(arguments["logits_to_keep"]), int(keys.sum()), int(pairs.sum())))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield passes
    finally:
        hook.remove()


def load_rows(rows: int) -> tuple[nn.Module, list[list]]:
    """SmolLM2 and the columns that ``ContextGenerator.contexts`` takes."""
    model, tokenizer = load_smollm2()
    tokenized, _ = tokenize_rows(gsm8k("train", 1000, 1000 + rows), tokenizer, max_length=1024)
    return model, [list(tokenized[name]) for name in ("prompt_ids", "answer_ids", "sample_id")]


def measure() -> str:
    """Run the engine at each probability and budget and count what its passes carry: JSON, one run per line."""
    model, (prompts, references, ids) = load_rows(ROWS)
    runs = []
    for p, budget in itertools.product(SELF_PROBS, BUDGETS):
        generator = ContextGenerator(model, token_budget=budget, balance=budget / 8)
        with recorded(model) as passes:
            mixed = generator.contexts(prompts, references, p, seed=0, sample_ids=ids, keep_hidden_states=True)
        stats = mixed.stats
        run = {"p": p, "budget": budget, "agreement": round(stats.agreement, 3), "passes": passes[-stats.passes :]}
        runs.append(json.dumps(run))
        print(f"p = {p}, budget {budget}: {stats.passes} passes, {stats.seconds:.1f} s", flush=True)
    about = {
        "command": "python -m benchmarks.roofline --measure",
        "model": "SmolLM2-135M-Instruct, fp32, temperature 1",
        "data": f"GSM8K train rows 1000 to {999 + ROWS}",
        "seed": 0,
        "versions": {m.__name__: m.__version__ for m in (torch, transformers)} | {"python": platform.python_version()},
        "lengths": [len(prompt) + len(answer) for prompt, answer in zip(prompts, references, strict=True)],
        "columns of passes": Pass._fields,
    }
    return json.dumps(about)[:-1] + ',\n"runs": [\n' + ",\n".join(runs) + "\n]}\n"


def best_seconds(run: Callable[[], object], repeats: int = 5) -> float:
    def once() -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    return min(once() for _ in range(repeats + 1))


@torch.no_grad()
def this_cpu(tokens: int) -> tuple[Device, Device]:
    """What this machine does in training, and in passes over ``tokens``."""
    large = torch.randn(2048, 2048)
    flops = 2 * 2048**3 / best_seconds(lambda: large @ large)
    source, target = torch.randn(64 << 20), torch.empty(64 << 20)
    bandwidth = 2 * 4 * len(source) / best_seconds(lambda: target.copy_(source))

    s = SMOLLM2
    sizes = [(s.hidden, s.hidden), (s.hidden, s.kv_heads * s.head_dim)] * 2
    sizes += [(s.hidden, s.intermediate)] * 2 + [(s.intermediate, s.hidden)]
    layers = nn.ModuleList(nn.Linear(*size, bias=False) for _ in range(s.layers) for size in sizes)
    inputs = [torch.randn(tokens, size_in) for _ in range(s.layers) for size_in, _ in sizes]
    with packed_linears(layers):
        packed = best_seconds(lambda: [layer(x) for layer, x in zip(layers, inputs, strict=True)])
    training = Device(f"CPU, {torch.get_num_threads()} threads", flops, bandwidth, math.inf)
    return training, training._replace(flops=2 * tokens * s.layer_weights / packed)


def check(measured: dict[str, Any], layer_host: float, bench: Path | None) -> list[dict[str, Any]]:
    """The formula against this machine: seconds of a generation and, from `bench_step`'s figures, ratios of steps."""
    model, (prompts, references, ids) = load_rows(8)
    generator = ContextGenerator(model)
    budget = generator.budget.tokens
    with recorded(model) as passes:
        runs = [generator.contexts(prompts, references, 0.25, seed=0, sample_ids=ids).stats for _ in range(3)]
    seconds, passes = statistics.median(run.seconds for run in runs), passes[-runs[0].passes :]

    cpu, cpu_in_passes = this_cpu(round(statistics.mean(work.tokens for work in passes)))
    host = layer_host * SMOLLM2.layers
    costs = Costs(SMOLLM2, cpu, FP32, host, launching=host)
    in_passes = costs._replace(device=cpu_in_passes)
    print(f"{cpu.name}: {cpu.flops / 1e9:.0f} GFLOP/s, in passes {cpu_in_passes.flops / 1e9:.0f}", end="; ")
    print(f"{cpu.bandwidth / 1e9:.1f} GB/s; token budget {budget}")
    predicted = sum(in_passes.a_pass(work, reuse=False) for work in passes)
    rows = [check_row("contexts of 8 rows, p = 0.25, s", predicted, seconds)]

    batches = micro_batches(measured["lengths"], padded=True)
    found = {} if bench is None else steps_of(json.loads(bench.read_text()))
    for p, (name, checkpointing) in itertools.product(SELF_PROBS, STEP_RATIOS.items()):
        work = [Pass(*work) for work in nearest_run(measured, p, budget)["passes"]]
        ratio = costs.bss(batches, work, generator=in_passes) / costs.sft(batches, checkpointing=checkpointing)
        rows.append(check_row(f"{name}, p = {p}", ratio, found.get(p, {}).get(name)))
    return rows


def check_row(name: str, predicted: float, found: float | None) -> dict[str, Any]:
    off_by = None if found is None else round(predicted / found, 2)
    return {"": name, "predicted": round(predicted, 2), "measured": found and round(found, 2), OFF_BY: off_by}


def steps_of(report: dict[str, Any]) -> dict[float, dict[str, float]]:
    """What `bench_step` found at each probability, from pytest-benchmark's report."""
    rows = [row for entry in report["benchmarks"] for row in entry["extra_info"].get("steps", [])]
    return {row["p"]: row for row in rows if STEP_RATIOS.keys() <= row.keys()}


def table(rows: list[dict[str, Any]]) -> str:
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--achievable",
        type=float,
        default=0.6,
        help="share of data sheets' rates and bandwidths that is reached, 0 to 1",
    )
    parser.add_argument("--layer-host-us", type=float, default=400.0, help="host time per layer and pass, microseconds")
    parser.add_argument("--measure", action="store_true", help=f"count the passes anew and write {PASSES.name}")
    parser.add_argument("--check", action="store_true", help="compare the formula with this CPU")
    parser.add_argument("--bench", type=Path, help="with --check: pytest-benchmark's JSON of bench_step")
    parser.add_argument("--json", type=Path, help="also write the tables to this file")
    args = parser.parse_args(argv)
    if args.measure:
        PASSES.parent.mkdir(exist_ok=True)
        PASSES.write_text(measure())
    if not PASSES.is_file():
        parser.error(f"{PASSES} is not there; --measure writes it (minutes)")
    measured = json.loads(PASSES.read_text())
    title = f"Measured, {measured['model']}, {measured['data']}: passes, tokens computed a context token"
    tables = {title: passes_table(measured)}
    if args.check:
        tables[CHECK] = check(measured, args.layer_host_us * 1e-6, args.bench)
    tables[PASS_TITLE] = pass_table()
    ways = [*((engine, BF16) for engine in ENGINES), (ENGINES[1], AUTOCAST)]
    for engine, precision in ways:
        host = 0.0 if engine == ENGINES[0] else args.layer_host_us
        tables[title_of(engine, precision, host)] = [
            predict(shape, gpu, measured, args.achievable, host * 1e-6, engine, precision)
            for gpu in GPUS
            for shape in SHAPES
        ]
    print("\n\n".join(f"{title}\n\n{table(rows)}" for title, rows in tables.items()))
    if args.json:
        arguments = {"achievable": args.achievable, "layer_host_us": args.layer_host_us}
        args.json.write_text(json.dumps({"arguments": arguments, "tables": tables}, indent=1))
    return int(any(row[OFF_BY] and not 1 / FACTOR <= row[OFF_BY] <= FACTOR for row in tables.get(CHECK, ())))


if __name__ == "__main__":
    sys.exit(main())
