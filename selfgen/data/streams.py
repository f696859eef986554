"""Rows that are read when they are needed, and that nothing keeps: `datasets.IterableDataset`, for a training loop."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from datasets import IterableDataset, IterableDatasetDict
from datasets.distributed import split_dataset_by_node
from torch.utils.data import get_worker_info

from .tokenizing import TOKENIZED, DataError, DataReport, RowOptions, columns_of, report_of, tokenize_stream

logger = logging.getLogger(__name__)

_PATIENCE = 20  # epochs without a usable row, of a reader of some of the shards: each epoch may give it others
_ROW = (*sorted(TOKENIZED), "is_learned")


@dataclass(frozen=True)
class Read:
    """What one reader, a worker of a data loader, has read for some rows that follow one another.

    ``report`` counts them and the dropped rows before them. ``before`` and ``after`` stand for all rows that the reader
    has given, in their order: up to these rows, and with them.
    """

    report: DataReport
    reader: int
    before: int
    after: int

    def __add__(self, later: Read) -> Read:
        return Read(self.report + later.report, self.reader, self.before, later.after)


class StreamedRows(torch.utils.data.IterableDataset):
    """The usable rows of a stream as `tokenize_rows` gives them, each with `read` beside its columns (`Read`).

    Several processes share them. If the number of shards (files) is a multiple of theirs, each reads its own shards.
    Otherwise every process reads all rows, and they are dealt out one by one. A stream that is split over processes
    already stays as it is.

    Args:
        stream: rows, or tokenized rows.
        options: of rows, with the `max_length` of these.
        name: what they are called in the log.
        endless: whether the stream begins again when it has ended, with the next epoch (`set_epoch`).
        rank, processes: which one of how many processes this is.

    Raises:
        DataError: the stream has no row, or, when it is read, none that is usable.
    """

    def __init__(
        self,
        stream: IterableDataset,
        tokenizer,
        options: RowOptions,
        *,
        name: str,
        endless: bool,
        rank: int = 0,
        processes: int = 1,
    ):
        names = columns_of(stream)
        self.options, self.name, self.endless = options, name, endless
        self.rank, self.step, self.processes = rank, 1, processes
        self.rows = stream.with_format(None)
        if not set(names) >= TOKENIZED:
            self.rows = tokenize_stream(stream, tokenizer, options)
        self._whole = None if self.rows._distributed else self.rows
        if self.rows._distributed and not endless:
            raise DataError(f"the {name} data is split over processes already: give a stream as a whole to evaluate on")
        if processes > 1 and not self.rows._distributed:
            if self.rows.num_shards % processes == 0:
                self.rows = split_dataset_by_node(self.rows, rank, processes)
            else:
                self.step = processes

    def workers(self, asked: int) -> int:
        """How many workers can read at a time: one per shard at most."""
        return min(asked, self.rows.num_shards)

    def first(self) -> int | None:
        """The sample id of the first row before the stream is split: the same in all processes if they share it.

        None if the stream came split.
        """
        return None if self._whole is None else next((row["sample_id"] for row in self._whole), None)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        reader, readers = (worker.id, worker.num_workers) if worker else (0, 1)
        rows = self.rows.with_format(None)  # with an epoch of its own, which workers would share otherwise
        total = since = DataReport(0, 0, 0, {}, self.options.max_length)
        place = kept = in_vain = 0
        for epoch in count() if self.endless else range(1):
            rows.set_epoch(epoch)
            before = kept
            for row in rows:
                report = self._report(row)
                total, since = total + report, since + report
                report.check(self.options.strict_data)
                if not report.kept:
                    continue
                kept += 1
                if (kept - 1) % self.step == (self.rank if self.step > 1 else 0):
                    after = _next(place, row["sample_id"])
                    yield {name: row[name] for name in _ROW if name in row} | {
                        "read": Read(since, reader, place, after)
                    }
                    place = after
                since = DataReport(0, 0, 0, {}, self.options.max_length)
            in_vain = 0 if kept > before else in_vain + 1
            if in_vain == (1 if readers == 1 and (self.processes == 1 or self.step > 1) else _PATIENCE):
                if readers > 1:  # the others may have some
                    part = f"reader {reader + 1} of {readers}"
                    logger.warning("%s data: no usable row is left for %s: %s", self.name, part, total)
                    return
                again = f" when it is read again (epoch {epoch})" if kept else ""
                raise DataError(
                    f"the {self.name} data has no usable row{again}: {total}. Check the columns and "
                    f"max_length={self.options.max_length}"
                )
            if self.endless and self.rank == 0 and not in_vain:
                logger.info(
                    "%s data: epoch %d of the stream ends after %d usable rows", self.name, epoch, kept - before
                )
        if self.rank == 0:
            part = f" (reader {reader + 1} of {readers})" if readers > 1 else ""
            logger.log(total.level, "%s data%s: %s", self.name, part, total)

    def _report(self, row: dict[str, Any]) -> DataReport:
        if "outcome" in row:
            return report_of(row, self.options.max_length)
        return DataReport(1, 1, 0, {}, self.options.max_length)  # of rows that were tokenized beforehand


def refuse_stream(rows: Any, what: str) -> None:
    """Raise TypeError if ``rows`` are a stream, of which ``what`` can't be."""
    if isinstance(rows, IterableDataset | IterableDatasetDict):
        raise TypeError(
            f"{what} can't be of a stream, as they need all rows: leave out streaming, or keep a part of the rows with "
            "datasets.Dataset.from_list(list(stream.take(n)))"
        )


def _next(place: int, sample_id: int) -> int:
    """What stands for rows and the row with this id after them."""
    return (place * 0x5851F42D4C957F2D + sample_id + 1) & 0xFFFFFFFFFFFFFFFF
