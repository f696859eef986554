"""Training on a stream: its data loader, what was read of it so far, and the row at which a resumed run goes on."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from ..data import DataError, DataReport
from ..data.streams import Read, StreamedRows
from ..provenance import differences
from .config import BSSConfig
from .processes import meet

logger = logging.getLogger(__name__)

_FILE = "selfgen_stream_{}.json"  # of each process, in every checkpoint


def check_stream(args: TrainingArguments) -> None:
    """Raise ValueError if these arguments can't go with a stream of training rows."""
    if args.max_steps <= 0:
        raise ValueError("the length of a stream is not known, so training needs max_steps: give a number of steps")
    if sorts_by_length(args):
        raise ValueError("the rows of a stream can't be sorted by length: leave out group_by_length, or streaming")


def sorts_by_length(args: TrainingArguments) -> bool:
    """Whether the Trainer asks for the rows' lengths: by a switch in old versions of transformers."""
    strategy = getattr(args, "train_sampling_strategy", None)
    return strategy in ("group_by_length", "batch_rebalance") or getattr(args, "group_by_length", False)


def stream_loader(rows: StreamedRows, args: BSSConfig, batch_size: int, collate: Callable) -> DataLoader:
    """Batches of rows on the device. Rows to train on are split over processes already, and endless.

    Rows to evaluate on are dealt out batch by batch, so that all processes have as many; the last ones may be the first
    rows again.
    """
    asked = args.dataloader_num_workers
    workers = rows.workers(asked)
    if workers < asked and args.process_index == 0:
        files = "the %s data can be read by %d at a time: one per file (shard)"
        logger.warning(f"dataloader_num_workers is %d, but {files}", asked, rows.name, workers)
    loader = DataLoader(
        rows,
        batch_size=batch_size,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers and workers > 0,
        prefetch_factor=args.dataloader_prefetch_factor if workers else None,
        multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None) if workers else None,
    )
    share, shared = (0, 1) if rows.endless else args.row_share
    return prepare_data_loader(
        loader,
        args.device,
        num_processes=shared,
        process_index=share,
        put_on_device=True,
        dispatch_batches=False,  # batches of different lengths can't be joined
    )


class StreamProgress:
    """What was read of a stream so far, for the log and for a run that goes on.

    Args:
        rows: what is trained on.
        args: of the run.
        batch_size: rows of a micro-batch.
        checkpoint: the one that the run is resumed from, if any.

    Raises:
        DataError: the checkpoint is of a run that read its stream in another way; processes see different streams.
    """

    def __init__(self, rows: StreamedRows, args: BSSConfig, batch_size: int, checkpoint: str | None):
        self.args, self.name = args, rows.name
        self.report = DataReport(0, 0, 0, {}, rows.options.max_length)
        self.places: dict[int, int] | None = {}  # reader -> what stands for the rows it has given; None: not known
        self._told: set[str] = set()
        self.checkpoint = checkpoint
        self._settings = {
            "processes": args.row_share[1],
            "dataloader_num_workers": rows.workers(args.dataloader_num_workers),
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
        }
        if args.world_size > 1 and len(set(meet(say=rows.first()))) > 1:
            raise DataError("the processes see different streams: give shuffle a seed, the same in all of them")
        if checkpoint and args.ignore_data_skip:
            logger.warning(
                "ignore_data_skip: the stream begins anew, so the first rows are trained on again; leave it out to go "
                "on at the row where %s was written",
                checkpoint,
            )
        elif checkpoint:
            self._load(Path(checkpoint))

    def take(self, batches: list[dict[str, Any]]) -> None:
        """Take what was read out of the micro-batches of a step, and check that it is what follows.

        Raises:
            DataError: there is no batch, or another row than in the run that is resumed.
        """
        if not batches:
            raise DataError(f"the {self.name} data has no usable row: see the warnings above")
        for read in [batch.pop("read", None) for batch in batches]:
            if read is None:  # of a collator that is the user's
                continue
            self._check(read)
            self.report += read.report

    def _check(self, read: Read) -> None:
        if self.places is None:
            self.places = {}
        elif read.before != self.places.get(read.reader, 0):
            raise DataError(
                f"the stream gives other rows than in the run that wrote {self.checkpoint}, so it can't go on at the "
                "same row: give its shuffle a seed and leave its files as they were, or start another run with the "
                "checkpoint as its model"
            )
        self.places[read.reader] = read.after

    def logs(self) -> dict[str, int]:
        """Rows that were read so far, by all processes, and what became of them; a warning names new reasons."""
        report = self.gathered()
        if self.args.process_index == 0 and (new := set(report.dropped) - self._told):
            self._told |= new
            logger.warning("%s data, so far: %s", self.name, report)
        counts = {"rows_read": report.rows, "rows_kept": report.kept, "rows_truncated": report.truncated}
        counts["rows_dropped"] = sum(report.dropped.values())
        return counts | {f"rows_dropped/{reason}": number for reason, number in report.dropped.items()}

    def tell(self) -> None:
        """Say at the end of training what became of all rows."""
        report = self.gathered()
        if self.args.process_index == 0:
            logger.log(report.level, "%s data: %s", self.name, report)

    def gathered(self) -> DataReport:
        """Of all processes, which must all ask for it."""
        told = meet(say=self.report)
        first, *others = told[:: len(told) // self.args.row_share[1]]  # each row once
        return sum(others, first)

    def save(self, folder: str | Path) -> None:
        """Write what `_load` reads; every process has a file of its own."""
        state = {"settings": self._settings, "places": self.places, "report": asdict(self.report)}
        (Path(folder) / _FILE.format(self.args.process_index)).write_text(json.dumps(state, indent=1) + "\n")

    def _load(self, folder: Path) -> None:
        states = {
            rank: json.loads(file.read_text())
            for rank in {0, self.args.process_index}
            if (file := folder / _FILE.format(rank)).is_file()
        }
        before: Mapping[str, Any] = next(iter(states.values()), {"settings": self._settings})
        if other := differences(before["settings"], self._settings):
            raise DataError(
                f"{folder} comes from a run that read its stream in another way ({'; '.join(other)}), so the same row "
                "can't be found: resume with the former settings, or start another run with the checkpoint as its model"
            )
        mine = states.get(self.args.process_index)
        if mine is None:
            logger.warning("%s does not tell what was read of the stream, so this can't be checked", folder)
            self.places = None
            return
        self.places = {int(reader): place for reader, place in mine["places"].items()}
        self.report = DataReport(**mine["report"])


def message_of(error: DataError) -> str:
    """Its own text; from a worker of a data loader, it comes after a traceback."""
    return str(error).rsplit("DataError: ", 1)[-1].strip()
