"""``selfgen generate``: free-running answers, corrected by the model itself if asked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..context import NOISE_VERSION, ContextGenerator
from ..context.generator import PRECISIONS, Precision
from ..context.models import room_for_answers, unpadded_vocab_size
from ..correction import DEFAULT_CUE, CorrectionCue
from ..data import sample_ids_of
from ..files import check_file
from ..provenance import rows_hash, weights_hash
from ..sharing import in_turn, is_first, let_first_speak, rounding
from .answers import answer_rows, tell_of_answers
from .journal import Journal, check_known
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

PROG = "selfgen generate"
_MAY_CHANGE = ("output_file", "batch_size", "chunk_rows", "use_cpu")  # answers do not depend on these


@dataclass
class GenerateArguments:
    """How prompts are answered."""

    _argument_group_name = "generation"

    output_file: str = field(
        metadata={
            "help": "File of JSON lines: the columns of each row (null where it has none), own_answer, corrected with "
            "--correct, and finished, whether the answer ended by itself (in place of columns of these names). "
            "Required. It can be trained on: --method rac --own-answer column."
        }
    )
    correct: bool = field(default=False, metadata={"help": "Let the model correct its own answers (RAC)."})
    rounds: int = field(
        default=1, metadata={"help": "For --correct: number of corrections, each of the answer before it."}
    )
    correction_cue: str = field(
        default=DEFAULT_CUE, metadata={"help": "For --correct: the text that asks for it, as in training."}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Most tokens of an answer; longer ones are broken off."})
    temperature: float = field(default=0.0, metadata={"help": "Temperature of the answers; 0 is greedy."})
    top_k: int | None = field(default=None, metadata={"help": "Sample from the k most likely tokens only."})
    top_p: float | None = field(
        default=None, metadata={"help": "Sample from the most likely tokens, up to this total probability, only."}
    )
    batch_size: int = field(default=32, metadata={"help": "Rows that are answered at a time. Fewer take less memory."})
    chunk_rows: int = field(
        default=256,
        metadata={
            "help": "Rows that one process answers and writes at a time; a kill loses at most these. A file keeps the "
            "number that it began with."
        },
    )
    context_precision: Precision = field(
        default="model",
        metadata={
            "help": "invariant: an answer in bf16 or fp16 has the same tokens in any batch, which takes longer, and is "
            "refused where a model can't have it. model: rounding may turn near ties."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of the answers."})
    use_cpu: bool = field(default=False, metadata={"help": "Run on the CPU even if there is an accelerator."})

    def __post_init__(self) -> None:
        check_least(self, 1, "rounds", "max_new_tokens", "top_k", "batch_size", "chunk_rows")
        check_temperature(self, "temperature")
        check_seed(self.seed)
        if self.context_precision not in PRECISIONS:
            raise ValueError(f"context_precision is {self.context_precision!r}; accepted: {', '.join(PRECISIONS)}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not self.correct and (self.rounds, self.correction_cue) != (1, DEFAULT_CUE):
            raise ValueError("rounds and correction_cue need --correct: add it, or leave them out")


def run(arguments: list[str]) -> int:
    show_log()
    let_first_speak()
    parser = make_parser(
        (ModelArguments, DataArguments, GenerateArguments),
        prog=PROG,
        usage="selfgen generate [CONFIG.yaml] --model NAME --dataset NAME --output-file FILE.jsonl [--correct]",
        description="Write answers to prompts. After a kill, the same command continues where it stopped. Processes "
        "that have one --output-file, under torchrun or not, share the work.",
        first=("model", *ROWS, "output_file", "max_new_tokens", "temperature", "correct"),
    )
    try:
        model, data, how = parse(parser, arguments)
        answer(model, data, how)
    except (ValueError, TypeError, OSError, ImportError) as error:
        fail(error, PROG)
    return 0


def answer(model_arguments: ModelArguments, data: DataArguments, how: GenerateArguments) -> None:
    file = Path(how.output_file)
    check_file(file, "output_file")
    settings = asdict(model_arguments) | asdict(data)
    settings |= {name: value for name, value in asdict(how).items() if name not in _MAY_CHANGE}
    settings["noise_version"] = NOISE_VERSION
    check_known(file, settings)
    tokenizer = model_arguments.load_tokenizer()
    with in_turn():
        given = data.load()
        rows, report = data.tokenize_prompts(given, tokenizer)
    place_of = {sample_id: place for place, sample_id in enumerate(sample_ids_of(given))}
    if is_first():
        logger.log(report.level, "data: %s", report)
    model = model_arguments.load_model()
    vocab_size = unpadded_vocab_size(model, tokenizer)
    cue = CorrectionCue.of(tokenizer, how.correction_cue, options=data) if how.correct else None
    room_for_answers(model, rows["prompt_ids"], len(cue.ids) if cue else 0)  # an error before hours of work
    settings |= {"weights": weights_hash(model), "rows": rows_hash(rows), "vocab_size": vocab_size}
    journal = Journal(file, settings)
    model = model.to(device(how.use_cpu))
    generator = ContextGenerator(
        model, temperature=how.temperature, vocab_size=vocab_size, precision=how.context_precision
    )

    correction = {"rounds": how.rounds, "cue": how.correction_cue}
    sampling = {name: getattr(how, name) for name in ("max_new_tokens", "seed", "batch_size", "top_k", "top_p")}

    def lines_of(part: list[dict], done: Callable[[int], object]) -> list[dict]:
        asked = correction if how.correct else None
        columns = answer_rows(generator, tokenizer, part, data, asked, progress=partial(done, 1), **sampling)
        found = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        ids = [row["sample_id"] for row in part]
        return [given[place_of[one]] | {"sample_id": one} | line for one, line in zip(ids, found, strict=True)]

    def agree(found: Mapping[str, Any]) -> dict[str, Any]:
        return rounding(found, generator, how.batch_size)

    journal.complete(rows, how.chunk_rows, lines_of, "Rows", agree)
    if is_first():
        tell_of_answers(journal.rows(), "corrected" if how.correct else "own_answer")
        print(f"answers are in {how.output_file}")
