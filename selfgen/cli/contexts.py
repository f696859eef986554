"""``selfgen contexts``."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from ..context import ContextGenerator
from ..context.generator import Method
from ..stored_contexts import write_contexts
from ..training.config import MaskOptions
from .options import DataArguments, ModelArguments, device, fail, make_parser, parse, show_log, source_of

logger = logging.getLogger(__name__)

PROG = "selfgen contexts"


@dataclass
class ContextArguments:
    """What to write, and how."""

    _argument_group_name = "contexts"

    output_dir: str = field(metadata={"help": "Folder for the contexts; if it has a part of them, the rest is added."})
    self_prob: float = field(
        default=0.25, metadata={"help": "Probability that a context token is the model's own, in [0, 1]."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the contexts."})
    sampling_temperature: float = field(
        default=1.0, metadata={"help": "Temperature of the model's own tokens; 0 is greedy."}
    )
    shard_rows: int = field(default=512, metadata={"help": "Rows per file; a kill loses at most the work on one file."})
    batch_size: int = field(default=32, metadata={"help": "Rows whose contexts are made at once."})
    context_method: Method = field(
        default="fixed_point",
        metadata={"help": "fixed_point (fast), or sequential (token by token, for models that the fast one refuses)."},
    )
    token_budget: int | None = field(
        default=None, metadata={"help": "Most tokens computed in one pass; measured on the device by default."}
    )
    balance: float | None = field(
        default=None,
        metadata={
            "help": "Tokens that cost as much as a pass by itself; speculation depends on it. Measured on the device "
            "by default."
        },
    )
    cuda_graphs: bool = field(
        default=True, metadata={"help": "On an NVIDIA GPU, replay passes as CUDA graphs, which takes some memory."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Run on the CPU even if there is an accelerator."})


def run(arguments: list[str]) -> int:
    show_log()
    parser = make_parser(
        (ModelArguments, DataArguments, ContextArguments, MaskOptions),
        prog=PROG,
        usage="selfgen contexts [CONFIG.yaml] --model NAME --dataset NAME --output-dir DIR [options]",
        description="Write mixed contexts as a data set, for selfgen train --method bash --contexts DIR.",
        epilog="After a kill, the same command continues where it stopped.",
    )
    try:
        model_arguments, data, options, mask_options = parse(parser, arguments)
        rows = data.load()
        model, tokenizer = model_arguments.load()
        rows, report = data.tokenize(rows, tokenizer)
        logger.log(report.level, "data: %s", report)
        record = write_contexts(
            ContextGenerator(
                model.to(device(options.use_cpu)),
                temperature=options.sampling_temperature,
                token_budget=options.token_budget,
                balance=options.balance,
                masks=mask_options.masks,
                cuda_graphs=options.cuda_graphs,
            ),
            rows,
            options.output_dir,
            self_prob=options.self_prob,
            seed=options.seed,
            batch_size=options.batch_size,
            shard_rows=options.shard_rows,
            method=options.context_method,
            provenance={"revision": model_arguments.commit(), **source_of(data)},
        )
    except (ValueError, TypeError, OSError, ImportError) as error:
        fail(error, PROG)
    statistics = record["statistics"]
    print(
        f"contexts of {len(rows)} rows are in {options.output_dir}: {statistics['self_share']:.1%} self tokens, "
        f"{statistics['agreement']:.1%} of them equal to the reference"
    )
    return 0
