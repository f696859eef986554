"""The demo: train SmolLM2-135M-Instruct online on its own tokens, and compare with plain fine-tuning, on a laptop.

    python -m examples.demo            (or: make demo)

Two runs have the same data, order, seed and steps: SFT (every context token is a reference token) and online
batch-scheduled sampling (BSS). Held-out problems are scored before, during and after training, under reference contexts
and under mixed contexts of the model. Everything printed is measured in this run.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging

from selfgen import BSSConfig, BSSTrainer, ContextGenerator, MixedContext
from selfgen.data import tokenize_rows
from selfgen.evaluation import held_out_losses
from tools.real_parts import gsm_symbolic, load_smollm2, smollm2_path

RUNS = ("SFT", "BSS")


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    started = time.perf_counter()
    transformers_logging.set_verbosity_error()
    out = Path(arguments.output_dir)
    out.mkdir(parents=True, exist_ok=True)

    print("SmolLM2-135M-Instruct, worked solutions of reasoning-gym's gsm_symbolic", flush=True)
    _, tokenizer = load_smollm2()
    train, held_out = data(tokenizer, arguments)
    results = {name: train_run(name, tokenizer, train, held_out, arguments) for name in RUNS}

    checkpoint = out / "BSS"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)  # the proof that the checkpoint is an ordinary one
    show_context(model, tokenizer, held_out[0], arguments)
    print(table(results, arguments))
    figure = plot(results, arguments, out / "demo.png")
    (out / "demo.json").write_text(json.dumps({"arguments": vars(arguments), "results": results}, indent=1))
    print(f"\nplot        {figure}\nfigures     {out / 'demo.json'}")
    print(f'checkpoint  {checkpoint}  (AutoModelForCausalLM.from_pretrained("{checkpoint}") loaded it above)')
    print(f"total       {time.perf_counter() - started:.0f} s")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=14, help="optimizer steps of each run")
    parser.add_argument("--batch", type=int, default=4, help="rows per step")
    parser.add_argument("--held-out", type=int, default=8, help="held-out problems")
    parser.add_argument(
        "--self-prob", type=float, default=0.5, help="probability of a self token in mixed contexts: 0 to 1"
    )
    parser.add_argument("--learning-rate", type=float, default=5e-5, help="learning rate of both runs")
    parser.add_argument("--seed", type=int, default=0, help="seed of data, order and contexts")
    parser.add_argument("--output-dir", default="outputs/demo", help="folder for checkpoints, plot and figures")
    return parser.parse_args(argv)


def data(tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """Training and held-out rows; no held-out problem is trained on."""
    train = gsm_symbolic(arguments.steps * arguments.batch, seed=arguments.seed)
    seen = set(train["prompt"])
    held_out = gsm_symbolic(2 * arguments.held_out, seed=arguments.seed + 1)
    held_out = held_out.filter(lambda row: row["prompt"] not in seen).select(range(arguments.held_out))
    rows = []
    for name, part in (("train", train), ("held out", held_out)):
        tokenized, report = tokenize_rows(part, tokenizer, max_length=512)
        print(f"{name}: {report}", flush=True)
        rows.append(tokenized)
    return rows[0], rows[1]


class HeldOutLoss(TrainerCallback):
    """Scores the held-out rows before the first step, halfway and at the end."""

    def __init__(self, generator: ContextGenerator, rows: Dataset, arguments: argparse.Namespace):
        self.generator, self.rows, self.arguments = generator, rows, arguments
        self.losses: dict[int, dict[str, float]] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self._score(0)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (state.max_steps // 2, state.max_steps):
            self._score(state.global_step)

    def _score(self, step: int) -> None:
        self_probs = {"reference": 0.0, "mixed": self.arguments.self_prob}
        losses = held_out_losses(self.generator, self.rows, self_probs, seed=1)
        self.losses[step] = {name: loss.mean for name, loss in losses.items()}


def train_run(
    name: str, tokenizer: PreTrainedTokenizerBase, train: Dataset, held_out: Dataset, arguments: argparse.Namespace
) -> dict:
    """Train from the same start; returns the figures of the run."""
    set_seed(arguments.seed)
    self_prob = arguments.self_prob if name == "BSS" else 0.0
    print(f"\n{name}: self_prob {self_prob}, {arguments.steps} steps of {arguments.batch} rows", flush=True)
    folder = Path(arguments.output_dir) / name
    config = BSSConfig(
        str(folder),
        self_prob=self_prob,
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
        logging_steps=1,
        save_strategy="no",
        use_cpu=not torch.accelerator.is_available(),
    )
    model = AutoModelForCausalLM.from_pretrained(smollm2_path())
    trainer = BSSTrainer(model, config, train_dataset=train, processing_class=tokenizer)
    scores = HeldOutLoss(trainer.generator, held_out, arguments)
    trainer.add_callback(scores)
    trainer.train()
    trainer.save_model(str(folder))
    return {
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "held_out": scores.losses,
    }


def mean(log: list[dict], key: str) -> float:
    return sum(entry[key] for entry in log) / len(log)


def table(results: dict[str, dict], arguments: argparse.Namespace) -> str:
    """SFT and BSS after the same steps, and where both began."""
    before = results["SFT"]["held_out"][0]
    own = f"mixed (p={arguments.self_prob})"
    lines = [
        f"{'':8}{'held-out loss under':^30}  {'wall time of a step':^36}",
        f"{'':8}{'reference':>14}{own:>16}  {'total':>12}{'contexts':>12}{'training':>12}",
        f"{'before':8}{before['reference']:14.4f}{before['mixed']:16.4f}",
    ]
    for name, result in results.items():
        after = result["held_out"][arguments.steps]
        context, training = (mean(result["log"], key) for key in ("context_seconds", "training_seconds"))
        times = f"{context + training:10.2f} s{context:10.2f} s{training:10.2f} s"
        lines.append(f"{name:8}{after['reference']:14.4f}{after['mixed']:16.4f}  {times}")
    log = results["BSS"]["log"]
    lines.append(
        f"\nBSS contexts: {mean(log, 'self_share'):.0%} self tokens, {mean(log, 'agreement'):.0%} of them equal to the "
        f"reference, {mean(log, 'passes'):.1f} passes per step, {mean(log, 'computed_per_token'):.2f} tokens computed "
        "per context token"
    )
    return "\n" + "\n".join(lines)


COLOURS = {"reference": "\033[0m", "self": "\033[32m", "disagrees": "\033[1;31m"}


def show_context(model, tokenizer: PreTrainedTokenizerBase, row: dict, arguments: argparse.Namespace) -> None:
    """Print one mixed context, coloured by where its tokens come from."""
    generator = ContextGenerator(model)
    mixed = generator.contexts(
        [row["prompt_ids"]], [row["answer_ids"]], arguments.self_prob, seed=2, sample_ids=[row["sample_id"]]
    )
    legend = ", ".join(
        f"{COLOURS[kind]}{text}{COLOURS['reference']}"
        for kind, text in (
            ("reference", "reference token"),
            ("self", "self token, equal to the reference"),
            ("disagrees", "self token, different (reference in brackets)"),
        )
    )
    print(f"\nOne held-out answer as the trained model's mixed context: {legend}")
    print(coloured(mixed, row["answer_ids"], tokenizer))


def coloured(mixed: MixedContext, reference: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    parts = []
    for token, is_self, expected in zip(mixed.tokens[0].tolist(), mixed.is_self[0].tolist(), reference, strict=True):
        text = tokenizer.decode([token])
        if not is_self:
            parts.append(text)
        elif token == expected:
            parts.append(f"{COLOURS['self']}{text}{COLOURS['reference']}")
        else:
            was = tokenizer.decode([expected]).strip() or repr(tokenizer.decode([expected]))
            parts.append(f"{COLOURS['disagrees']}{text}[{was}]{COLOURS['reference']}")
    return "".join(parts)


def plot(results: dict[str, dict], arguments: argparse.Namespace, file: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for name, result in results.items():
        log, losses = result["log"], result["held_out"]
        axes[0].plot([entry["step"] for entry in log], [entry["loss"] for entry in log], marker=".", label=name)
        line = axes[1].plot(
            list(losses), [v["reference"] for v in losses.values()], marker="o", label=f"{name}, reference"
        )
        axes[1].plot(
            list(losses),
            [v["mixed"] for v in losses.values()],
            marker="s",
            linestyle="--",
            color=line[0].get_color(),
            label=f"{name}, self tokens",
        )
    context, training = (
        [mean(r["log"], key) for r in results.values()] for key in ("context_seconds", "training_seconds")
    )
    axes[2].bar(list(results), training, label="training", color="tab:gray")
    axes[2].bar(list(results), context, bottom=training, label="contexts", color="tab:green")
    titles = (
        ("training loss (on each run's own contexts)", "step", "nats per token"),
        (f"held-out loss, {arguments.held_out} problems", "step", "nats per token"),
        ("wall time of a step", "", "seconds"),
    )
    for axis, (title, x, y) in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel=x, ylabel=y)
        axis.legend(fontsize=8)
    axes[2].set_ylim(bottom=0)
    figure.savefig(file, dpi=120)
    return file


if __name__ == "__main__":
    main()
