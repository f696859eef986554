"""Work that several processes share out among themselves, through a folder that they all see.

They may be of one `torchrun`, or begun by hand on several machines. No process group is needed: a process locks the
next file that nobody makes, and makes it. The lock ends with the process, whatever ends that, so another one then makes
the file. What a file says depends on its number alone, so it does not matter who makes it.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from tqdm.auto import tqdm

from .context import ContextGenerator
from .context.generator import Method
from .data.loading import cache_folder
from .files import alone, taken
from .provenance import differences

logger = logging.getLogger(__name__)

_PAUSE = 0.2  # seconds between two looks at files that others make
_PATIENCE = 300  # such looks before the log says what is waited for
_LOOK = 10.0  # seconds between two looks at all that others have made, for the bar


def is_first() -> bool:
    """Whether this process speaks for all of its job: `torchrun` and `accelerate launch` number them."""
    return os.environ.get("RANK", "0") == "0"


def let_first_speak() -> None:
    """In other processes than the first, show warnings alone; there, and in a file, no bars of transformers."""
    if not is_first():
        logging.getLogger("selfgen").setLevel(logging.WARNING)
    if not (is_first() and sys.stderr.isatty()):
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()


@contextmanager
def no_bars() -> Iterator[None]:
    """Inside, transformers and datasets show no bars, as for loading, tokenizing and saving."""
    before = transformers.utils.logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if before[0]:
            transformers.utils.logging.enable_progress_bar()
        if not before[1]:
            datasets.enable_progress_bars()


@contextmanager
def in_turn() -> Iterator[None]:
    """One process of a machine at a time: the others find in the cache of `datasets` what the first one has made."""
    if "LOCAL_RANK" not in os.environ:
        yield
        return
    with alone(cache_folder(), wait=-1):
        yield


class Parts:
    """The files of a job, each made of some rows by one process or another.

    Args:
        files: all in one folder, which is there.
        rows: how many rows each file is made of.
        is_whole: whether the file of this number needs not be made. It is asked again once the file is locked.
    """

    def __init__(self, files: Sequence[Path], rows: Sequence[int], is_whole: Callable[[int], bool]):
        self.files, self.rows, self.is_whole = files, rows, is_whole
        self._left = deque(range(len(files)))  # not known to be whole
        self._done = 0  # rows of the others

    def complete(self, make: Callable[[int, Callable[[int], object]], object], title: str, progress: bool) -> None:
        """Return when all files are whole: made here, or by other processes.

        ``make`` takes the number of a file, and what it calls with a number of rows whenever these are done. The bar
        counts the rows of all processes.
        """
        self._look()
        show = progress and is_first()
        with tqdm(total=sum(self.rows), initial=self._done, desc=title, unit="row", disable=not show) as bar:
            looked, own, idle = time.monotonic(), 0, 0

            def tell(rows: int = 0) -> None:
                nonlocal looked, own
                own += rows
                if show and time.monotonic() - looked > _LOOK:
                    self._look()
                    looked = time.monotonic()
                bar.update(self._done + own - bar.n)

            while self._left:
                number = self._left[0]
                if self._is_whole_now(number, partial(make, number, tell)):
                    self._left.remove(number)
                    self._done += self.rows[number]
                    own, idle = 0, 0
                    tell()
                    continue
                self._left.rotate(-1)
                idle += 1
                if idle >= len(self._left):  # others make all that is left, or have died: then their locks are free
                    time.sleep(_PAUSE)
                if idle == len(self._left) + _PATIENCE:
                    logger.info("waiting for %s, which another process makes", self.files[number])

    def _is_whole_now(self, number: int, make: Callable[[], object]) -> bool:
        """Whether a file is whole, made now unless another process has taken it."""
        if self.is_whole(number):
            return True
        with taken(self.files[number]) as is_ours:
            if is_ours and not self.is_whole(number):
                make()
        return is_ours

    def _look(self) -> None:
        """Find out what others have made."""
        self._left = deque(number for number in self._left if not self.is_whole(number))
        self._done = sum(self.rows) - sum(self.rows[number] for number in self._left)


def rounding(
    found: Mapping[str, Any], generator: ContextGenerator, batch_size: int, method: Method | None = None
) -> dict[str, Any]:
    """What turns near ties in a low precision, and so must be the same in all processes of a job; nothing in fp32.

    Args:
        found: what the first process has noted down, if this is not the first. The generator takes its budget from
            there unless one was given.
        generator: of contexts, or of answers.
        batch_size: rows at a time.
        method: of the contexts; None for answers.

    Raises:
        ValueError: something differs from what is noted down.
    """
    if generator.dtype in (torch.float32, torch.float64) or generator.precision == "invariant":
        return {}
    now: dict[str, Any] = {"batch_size": batch_size} | ({} if method is None else {"method": method})
    if method == "fixed_point":
        if {"token_budget", "balance"} <= found.keys():
            generator.take_budget(found["token_budget"], found["balance"])
        now |= {"token_budget": generator.budget.tokens, "balance": generator.budget.balance}
    other = differences(found, now, ignore=(found.keys() | now.keys()) - (found.keys() & now.keys()))
    if other:
        raise ValueError(
            f"contexts and answers in {str(generator.dtype).removeprefix('torch.')} depend on how rows are "
            f"computed together ({'; '.join(other)}): give the former values, or another place"
        )
    return now
