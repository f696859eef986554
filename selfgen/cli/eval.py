"""``selfgen eval``: the gap, answers, losses and self-corrections of a checkpoint, on rows it was not trained on."""

from __future__ import annotations

import json
import logging
import math
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..context import NOISE_VERSION, ContextGenerator
from ..context.generator import METHODS, PRECISIONS, Method, Precision
from ..context.masks import check_probability
from ..context.models import max_positions, unpadded_vocab_size
from ..correction import DEFAULT_CUE
from ..evaluation import (
    Corrections,
    Gap,
    PositionLoss,
    Share,
    compared,
    exact_match,
    exposure_bias,
    greedy_of,
    rouge,
    row_gaps,
    row_losses,
)
from ..evaluation.gap import SELF_TEMPERATURE
from ..evaluation.report import table, write_plots
from ..evaluation.symbolic import Undecided, decide, has_math_verify
from ..files import alone, check_folder, write_json, writing
from ..provenance import differences, rows_hash, versions, weights_hash
from ..sharing import in_turn, is_first, let_first_speak, rounding
from ..training.report import has_mixed
from .answers import answer_rows, is_empty, tell_of_answers
from .journal import NAMES, Journal, Make, check_known, read
from .options import (
    ROWS,
    DataArguments,
    ModelArguments,
    check_least,
    check_seed,
    check_temperature,
    device,
    fail,
    make_parser,
    parse,
    show_log,
)

logger = logging.getLogger(__name__)

PROG = "selfgen eval"
METRICS = ("gap", "exact_match", "rouge", "loss", "curve", "correction")

# What must be the same, with the model and the data, for more rows to be added to a file.
_SAMPLING = ("seed", "max_new_tokens", "temperature", "context_precision")
_CONTEXTS = ("seed", "self_prob", "sampling_temperature", "context_method", "context_precision")
_SETTINGS = {
    "gap": _CONTEXTS,
    "answers": _SAMPLING,
    "corrections": (*_SAMPLING, "rounds", "correction_cue"),
    "losses": _CONTEXTS,
}
_MEASURED = {
    "gap": {"gap"},
    "answers": {"exact_match", "rouge"},
    "corrections": {"correction"},
    "losses": {"loss", "curve"},
}
"""The metrics that are computed from each file."""
_CHUNK_BATCHES = 4  # of rows that one process makes and writes at a time, as answers that end make room for others
_WAIT = 600.0  # seconds for which another process may write the results


@dataclass
class EvalArguments:
    """What is measured, and how."""

    _argument_group_name = "evaluation"

    output_dir: str = field(
        metadata={"help": "Folder for results.json, plots, and files with one line per row. Required."}
    )
    metrics: list[str] = field(
        default_factory=lambda: ["gap", "exact_match", "loss", "curve"],
        metadata={
            "help": "One or more of gap (what the model loses when it runs freely), exact_match (with symbolic_match, "
            "where math-verify is installed) and rouge (of free-running answers), loss (under reference, mixed and "
            "self contexts), curve (loss by position), correction (for models trained with RAC)."
        },
    )
    self_prob: float = field(
        default=0.25,
        metadata={
            "help": "Probability that a token of a mixed context is a self token, in [0, 1]. The default is above that "
            "of contexts to train on, 0.1, as more self tokens are measured on fewer rows. Give the same value for "
            "models that you compare."
        },
    )
    gap_rows: int = field(
        default=256,
        metadata={"help": "For gap: rows that it is measured on, the first ones. A later call with more adds to them."},
    )
    max_new_tokens: int = field(
        default=256, metadata={"help": "Most tokens of a free-running answer; longer ones are broken off."}
    )
    temperature: float = field(default=0.0, metadata={"help": "Temperature of the answers; 0 is greedy."})
    sampling_temperature: float = field(
        default=SELF_TEMPERATURE,
        metadata={
            "help": "Temperature of self tokens in contexts; 0 is greedy. 0.7 is that of training without --self-prob; "
            "give 1 for a model that was trained with a number for it."
        },
    )
    context_method: Method = field(
        default="fixed_point",
        metadata={"help": "How contexts are made: fixed_point (fast), or sequential (for models that it refuses)."},
    )
    context_precision: Precision = field(
        default="model",
        metadata={
            "help": "invariant: contexts and answers in bf16 or fp16 have the same tokens in any batch, which takes "
            "longer, and is refused where a model can't have it. model: rounding may turn near ties."
        },
    )
    rounds: int = field(
        default=1, metadata={"help": "For correction: number of corrections, each of the answer before it."}
    )
    correction_cue: str = field(
        default=DEFAULT_CUE, metadata={"help": "For correction: the text that asks for it, as in training."}
    )
    batch_size: int | None = field(
        default=None, metadata={"help": "Rows at a time; by default 32 for answers, 8 for losses."}
    )
    seed: int = field(
        default=0, metadata={"help": "Seed of all that is sampled; use one seed for models that are compared."}
    )
    limit: int | None = field(
        default=None, metadata={"help": "Evaluate on this many rows, the first ones; by default all."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Run on the CPU even if there is an accelerator."})

    def __post_init__(self) -> None:
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown or not self.metrics:
            said = " ".join(unknown) or "none"
            of_package = "; symbolic_match comes with exact_match" if "symbolic_match" in unknown else ""
            raise ValueError(
                f"metrics are {said}; accepted: {', '.join(METRICS)} (with spaces between them){of_package}"
            )
        check_probability("self_prob", self.self_prob)
        check_temperature(self, "temperature", "sampling_temperature")
        check_seed(self.seed)
        if self.context_method not in METHODS:
            raise ValueError(f"context_method is {self.context_method!r}; accepted: {', '.join(METHODS)}")
        if self.context_precision not in PRECISIONS:
            raise ValueError(f"context_precision is {self.context_precision!r}; accepted: {', '.join(PRECISIONS)}")
        check_least(self, 1, "gap_rows", "max_new_tokens", "rounds", "batch_size", "limit")
        if "correction" not in self.metrics and (self.rounds, self.correction_cue) != (1, DEFAULT_CUE):
            raise ValueError("rounds and correction_cue need the metric correction: add it, or leave them out")

    @property
    def files(self) -> list[str]:
        """The kinds of lines that the metrics are made from."""
        return [name for name, metrics in _MEASURED.items() if metrics & set(self.metrics)]


def run(arguments: list[str]) -> int:
    show_log()
    let_first_speak()
    parser = make_parser(
        (ModelArguments, DataArguments, EvalArguments),
        prog=PROG,
        usage="selfgen eval [CONFIG.yaml] --model NAME --dataset NAME --output-dir DIR [--metrics NAME ...]",
        description="Evaluate a model. After a kill, the same command continues where it stopped. Processes that have "
        "one --output-dir, under torchrun or not, share the work.",
        first=("model", *ROWS, "output_dir", "metrics", "limit"),
    )
    try:
        model_arguments, data, how = parse(parser, arguments)
        check_folder(how.output_dir, "output_dir")
        results = evaluate(model_arguments, data, how, shlex.join([*PROG.split(), *arguments]))
        if results is None:
            return 0
        folder = Path(how.output_dir)
        with alone(folder, wait=_WAIT):
            write_json(folder / "results.json", results)
            print(table(results))
            plots = _plots(results, folder)
    except (ValueError, TypeError, OSError, ImportError) as error:
        fail(error, PROG)
    print(f"\nresults are in {', '.join(map(str, [folder / 'results.json', *plots]))}; row by row in {folder}/*.jsonl")
    return 0


def _plots(results: dict[str, Any], folder: Path) -> list[Path]:
    try:
        with writing(folder):
            return write_plots(results, folder)
    except ImportError as error:
        logger.warning("no plots: %s", error)
        return []


def evaluate(
    model_arguments: ModelArguments, data: DataArguments, how: EvalArguments, command: str
) -> dict[str, Any] | None:
    """All numbers, with those of earlier commands on this folder, and what they were made with.

    None in other processes than the first of a job, which have made some of the lines.
    """
    if "rouge" in how.metrics:
        rouge("", "")  # a missing package shows here, not after hours
    if data.assistant_turns != "last":
        raise ValueError("assistant_turns=all is for training: the answer that is evaluated is the last turn")
    made = {name: {key: getattr(how, key) for key in keys} for name, keys in _SETTINGS.items()}
    what = asdict(model_arguments) | asdict(data) | {"limit": how.limit, "noise_version": NOISE_VERSION}
    folder = Path(how.output_dir)
    before = _results(folder)
    for name in how.files:
        check_known(folder / f"{name}.jsonl", what | made[name])
    tokenizer = model_arguments.load_tokenizer()
    with in_turn():
        dataset = data.load()
        rows, report = data.tokenize(dataset.select(range(min(how.limit or len(dataset), len(dataset)))), tokenizer)
    if is_first():
        logger.log(report.level, "data: %s", report)
    if report.truncated and {"answers", "corrections"} & set(how.files):
        raise ValueError(
            f"{report.truncated} reference answers do not fit into max_length={data.max_length}, so that "
            "answers can't be compared with their ends; give a larger --max-length, or measure only gap, loss and curve"
        )
    model = model_arguments.load_model().to(device(how.use_cpu))
    vocab_size = unpadded_vocab_size(model, tokenizer)
    limit = max_positions(model)
    if limit is not None and data.max_length is not None and data.max_length > limit:
        raise ValueError(f"max_length is {data.max_length}, but the model has {limit} positions")

    made_with: dict[str, Any] = {"vocab_size": vocab_size, "precision": how.context_precision}
    free = ContextGenerator(model, temperature=how.temperature, **made_with)
    mixing = ContextGenerator(model, temperature=how.sampling_temperature, **made_with)
    if {"gap", "losses"} & set(how.files):
        longest = max(len(row["prompt_ids"]) + len(row["answer_ids"]) for row in rows)
        mixing.check_method(how.context_method, longest)  # before anything is written
    greedy = free if how.temperature == 0 else greedy_of(free)
    made_by: dict[str, tuple[ContextGenerator, int, Method | None, Make]] = {
        "gap": (mixing, how.batch_size or 8, how.context_method, partial(gaps, mixing, greedy, tokenizer, data, how)),
        "answers": (free, how.batch_size or 32, None, partial(answers, free, tokenizer, data, how)),
        "corrections": (free, how.batch_size or 32, None, partial(corrections, free, tokenizer, data, how)),
        "losses": (mixing, how.batch_size or 8, how.context_method, partial(losses, mixing, how)),
    }
    what |= {"weights": weights_hash(model), "rows": rows_hash(rows), "vocab_size": vocab_size}
    # All of them first, so that an error shows before hours of work.
    journals = {name: Journal(folder / f"{name}.jsonl", what | made[name]) for name in how.files}
    for name, journal in journals.items():
        generator, batch_size, method, make = made_by[name]
        agree = partial(rounding, generator=generator, batch_size=batch_size, method=method)
        part = rows
        if name == "gap":  # what is there of more rows stays
            part = rows.select(range(min(len(rows), max(how.gap_rows, len(journal.rows())))))
        journal.complete(part, batch_size * _CHUNK_BATCHES, make, name.capitalize(), agree)
    if not is_first():
        return None
    lines = {name: journal.rows() for name, journal in journals.items()}
    for name in [name for name in _SETTINGS if name not in lines]:  # what is there already, of the same model and rows
        settings, found = read(folder / f"{name}.jsonl")
        enough = len(found) == len(rows) or (name == "gap" and found)
        if enough and not differences(settings, settings | what, ignore=NAMES):
            lines[name], made[name] = found, {key: settings[key] for key in _SETTINGS[name]}
    asked = {*how.metrics, *before.get("metrics", [])}
    metrics = [name for name in METRICS if name in asked & set().union(*(_MEASURED[kind] for kind in lines))]
    commands = before.get("commands", []) if set(metrics) - set(how.metrics) else []
    return {
        "commands": list(dict.fromkeys([*commands, command])),
        "metrics": metrics,
        "settings": what | {name: made[name] for name in lines},
        "versions": versions("selfgen", "torch", "transformers"),
        "device": str(model.device),
        "data": asdict(report),
    } | measure(lines, metrics, made["losses"]["self_prob"], after_bss=has_mixed(model_arguments.model))


def _results(folder: Path) -> dict[str, Any]:
    """What an earlier command has left; ValueError if the file is of another program."""
    file = folder / "results.json"
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, IsADirectoryError):
        found = None
    if not isinstance(found, dict) or not {"metrics", "commands", "settings"} <= found.keys():
        raise ValueError(f"selfgen eval did not write {file}, or it is broken: give another output_dir, or remove it")
    return found


def answers(
    generator: ContextGenerator,
    tokenizer: PreTrainedTokenizerBase,
    data: DataArguments,
    how: EvalArguments,
    rows: list[dict],
    done: Callable[[int], object],
) -> list[dict[str, Any]]:
    """Free-running answers of some rows."""
    found = answer_rows(generator, tokenizer, rows, data, progress=partial(done, 1), **_sampling(how))
    lines = []
    for row, text, finished in zip(rows, found["own_answer"], found["finished"], strict=True):
        line = _asked(tokenizer, data, row)
        lines.append(line | _judged("generated", text, line["reference"]) | {"finished": finished})
    return lines


def corrections(
    generator: ContextGenerator,
    tokenizer: PreTrainedTokenizerBase,
    data: DataArguments,
    how: EvalArguments,
    rows: list[dict],
    done: Callable[[int], object],
) -> list[dict[str, Any]]:
    """Answers of some rows, before and after the model has looked at them again."""
    correction = {"rounds": how.rounds, "cue": how.correction_cue}
    found = answer_rows(generator, tokenizer, rows, data, correction, progress=partial(done, 1), **_sampling(how))
    lines = []
    for row, first, corrected in zip(rows, found["own_answer"], found["corrected"], strict=True):
        line = _asked(tokenizer, data, row)
        judged = _judged("first", first, line["reference"]) | _judged("corrected", corrected, line["reference"])
        lines.append(line | judged)
    return lines


def gaps(
    generator: ContextGenerator,
    greedy: ContextGenerator,
    tokenizer: PreTrainedTokenizerBase,
    data: DataArguments,
    how: EvalArguments,
    rows: list[dict],
    _: Callable[[int], object],
) -> list[dict[str, Any]]:
    """How many tokens of some rows are right under references, and how many running freely."""
    return row_gaps(
        generator,
        rows,
        greedy=greedy,
        self_prob=how.self_prob,
        seed=how.seed,
        method=how.context_method,
        eos_token_ids=sorted(data.answer_ends(tokenizer, generator.eos_token_ids)),
        batch_size=how.batch_size or 8,
        answer_batch_size=how.batch_size or 32,
    )


def losses(
    generator: ContextGenerator, how: EvalArguments, rows: list[dict], done: Callable[[int], object]
) -> list[dict[str, Any]]:
    """Losses of each reference token of some rows, by kind of context."""
    lines: list[dict[str, Any]] = []
    batch_size, self_probs = how.batch_size or 8, _self_probs(how.self_prob)
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        found = row_losses(generator, batch, self_probs, seed=how.seed, method=how.context_method)
        lines += [
            {"sample_id": row["sample_id"]}
            | {name: [round(loss, 6) for loss in row_of.tolist()] for name, row_of in zip(found, values, strict=True)}
            for row, values in zip(batch, zip(*found.values(), strict=True), strict=True)
        ]
        done(len(batch))
    return lines


def measure(
    lines: dict[str, list[dict[str, Any]]], metrics: list[str], self_prob: float, *, after_bss: bool
) -> dict[str, Any]:
    """The numbers of the metrics, from the lines of all rows; ``self_prob`` is that of mixed contexts."""
    results: dict[str, Any] = {}
    if "gap" in metrics:
        results["gap"] = Gap.of(lines["gap"], after_bss).to_dict()
    if made := lines.get("answers"):
        if "exact_match" in metrics:
            results["exact_match"] = Share(sum(line["generated_right"] for line in made), len(made)).to_dict()
            if found := _symbolic(made):
                results["symbolic_match"] = found
        results["finished"] = Share(sum(line["finished"] for line in made), len(made)).to_dict()
        results["empty"] = Share(sum(is_empty(line["generated"]) for line in made), len(made)).to_dict()
        tell_of_answers(made, "generated")
        if "rouge" in metrics:
            scores = [rouge(line["generated"], line["reference"]) for line in tqdm(made, desc="ROUGE", disable=None)]
            results["rouge"] = {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}
    if made := lines.get("corrections"):
        results["correction"] = Corrections.of(
            (line["first_right"], line["corrected_right"]) for line in made
        ).to_dict()
    if made := lines.get("losses"):
        self_probs = _self_probs(self_prob)
        found = {name: PositionLoss.of(_numbers(line[name]) for line in made) for name in self_probs}
        if "loss" in metrics:
            results["loss"] = {
                name: {"self_prob": self_prob, "loss": found[name].mean, "tokens": found[name].tokens}
                for name, self_prob in self_probs.items()
            }
            for name in self_probs:
                broken = sum(not math.isfinite(loss) for line in made for loss in _numbers(line[name]))
                if broken:
                    results["loss"][name]["not_finite"] = broken
                    logger.warning("loss under %s contexts: %d tokens have none, as it is not finite", name, broken)
        if "curve" in metrics:
            results["curve"] = exposure_bias(found["reference"], found["own"])
    return results


def _symbolic(lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """How many answers math-verify finds right, and how many it could not decide; None where it is not installed."""
    if not has_math_verify():
        logger.info("no symbolic_match, as math-verify is not installed: pip install 'selfgen[eval]'")
        return None
    right = undecided = 0
    for line in tqdm(lines, desc="math-verify", disable=None, leave=False):
        try:
            right += decide(line["generated"], line["reference"])
        except Undecided:
            undecided += 1
    if undecided:
        logger.warning("symbolic_match: %d answers could not be compared in time, and count as wrong", undecided)
    return Share(right, len(lines)).to_dict() | {"undecided": undecided}


def _numbers(losses: list[float | None]) -> list[float]:
    """Losses as they were before they were JSON, which has no NaN."""
    return [float("nan") if loss is None else loss for loss in losses]


def _self_probs(self_prob: float) -> dict[str, float]:
    return {"reference": 0.0, "mixed": self_prob, "own": 1.0}


def _sampling(how: EvalArguments) -> dict[str, Any]:
    return {"max_new_tokens": how.max_new_tokens, "seed": how.seed, "batch_size": how.batch_size or 32}


def _asked(tokenizer: PreTrainedTokenizerBase, data: DataArguments, row: dict) -> dict[str, Any]:
    """What a row asks, as the model reads it, and what it should say."""
    (reference,) = data.answer_texts(tokenizer, [row["answer_ids"]])
    asked = {
        "sample_id": row["sample_id"],
        "prompt": tokenizer.decode(row["prompt_ids"]),
        "reference": reference,
    }
    expected = compared(reference, reference)[1]
    return asked if expected is None else asked | {"reference_answer": expected}


def _judged(name: str, text: str, reference: str) -> dict[str, Any]:
    """What the model said, the answer in it, if there is one in the reference, and whether that is right."""
    found, expected = compared(text, reference)
    answer = {} if expected is None else {f"{name}_answer": found}
    return {name: text, **answer, f"{name}_right": exact_match(text, reference)}
