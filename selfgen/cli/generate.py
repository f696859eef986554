"""``selfgen generate``: free-running answers, corrected by the model itself if asked."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..context import ContextGenerator
from ..correction import DEFAULT_CUE
from ..provenance import rows_hash, weights_hash
from .answers import answer_rows
from .journal import Journal
from .options import DataArguments, ModelArguments, device, fail, make_parser, parse, show_log

logger = logging.getLogger(__name__)

PROG = "selfgen generate"
_FREE = ("output_file", "batch_size", "chunk_rows", "use_cpu")  # do not change answers


@dataclass
class GenerateArguments:
    """How to answer."""

    _argument_group_name = "generation"

    output_file: str = field(
        metadata={
            "help": "JSON lines: each row's columns, own_answer, corrected, and whether the answer was finished (in "
            "place of columns of these names). It is training data, too: --method rac --own-answer column."
        }
    )
    correct: bool = field(default=False, metadata={"help": "Let the model correct its answers (RAC)."})
    rounds: int = field(default=1, metadata={"help": "Corrections, each of the answer before it."})
    correction_cue: str = field(default=DEFAULT_CUE, metadata={"help": "What asks for a correction, as in training."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer, in tokens."})
    temperature: float = field(default=0.0, metadata={"help": "Temperature of the sampling; 0 is greedy."})
    top_k: int | None = field(default=None, metadata={"help": "Sample among the k best tokens."})
    top_p: float | None = field(default=None, metadata={"help": "Sample among the best tokens of this probability."})
    batch_size: int = field(default=32, metadata={"help": "Most rows at a time."})
    chunk_rows: int = field(default=256, metadata={"help": "Rows between two writes; what a kill loses at most."})
    seed: int = field(default=0, metadata={"help": "Of the sampling."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU where there is an accelerator, too."})

    def __post_init__(self) -> None:
        if not self.correct and (self.rounds, self.correction_cue) != (1, DEFAULT_CUE):
            raise ValueError("rounds and correction_cue go with --correct")


def run(arguments: list[str]) -> int:
    show_log()
    parser = make_parser(
        (ModelArguments, DataArguments, GenerateArguments),
        prog=PROG,
        usage="selfgen generate [CONFIG.yaml] --model NAME --dataset NAME --output-file FILE.jsonl [--correct]",
        description="Answer prompts, and write the answers. A killed run goes on where it was.",
    )
    try:
        model, data, how = parse(parser, arguments)
        answer(model, data, how)
    except (ValueError, TypeError, OSError, ImportError) as error:
        fail(error, PROG)
    return 0


def answer(model_arguments: ModelArguments, data: DataArguments, how: GenerateArguments) -> None:
    model, tokenizer = model_arguments.load()
    given = data.load()
    rows, report = data.tokenize_prompts(given, tokenizer)
    ids = given["sample_id"] if "sample_id" in given.column_names else range(len(given))
    place_of = {sample_id: place for place, sample_id in enumerate(ids)}
    logger.log(report.level, "data: %s", report)
    settings = asdict(model_arguments) | asdict(data) | {k: v for k, v in asdict(how).items() if k not in _FREE}
    settings |= {"weights": weights_hash(model), "rows": rows_hash(rows)}
    journal = Journal(Path(how.output_file), settings)
    generator = ContextGenerator(model.to(device(how.use_cpu)), temperature=how.temperature)

    correction = {"rounds": how.rounds, "cue": how.correction_cue, "apply_chat_template": data.apply_chat_template}
    sampling = {name: getattr(how, name) for name in ("max_new_tokens", "seed", "batch_size", "top_k", "top_p")}

    def lines_of(part: list[dict]) -> list[dict]:
        columns = answer_rows(generator, tokenizer, part, correction if how.correct else None, **sampling)
        found = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        ids = [row["sample_id"] for row in part]
        return [given[place_of[one]] | {"sample_id": one} | line for one, line in zip(ids, found, strict=True)]

    journal.complete(rows, how.chunk_rows, lines_of, "Rows")
    print(f"answers are in {how.output_file}")
