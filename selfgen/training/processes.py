"""What one of several processes does for all of them: they end together where it fails."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

T = TypeVar("T")
_KINDS = (TypeError, ImportError, FileNotFoundError, OSError, ValueError)


def meet(error: Exception | None = None, say: Any = None) -> list[Any]:
    """Wait for all processes, and return what each of them says, by rank.

    Raises:
        Exception: what one of them has met, in all of them: of its kind, and with its message.
    """
    state = PartialState()
    if state.num_processes == 1:
        told = [(None, None, say)]
    else:
        kind = next((one for one in _KINDS if isinstance(error, one)), RuntimeError)
        told = gather_object([(None, None, say) if error is None else (kind, str(error), None)])
    if error is not None:
        raise error
    for other, message, _ in told:
        if other is not None:
            raise other(message)
    return [said for *_, said in told]


def once_per_machine(make: Callable[[], T]) -> T:
    """What ``make`` makes in the first process of each machine; the others read it there. All processes must call it.

    What is read is a pickle. Of a data set it has the paths of cache files, or the rows where these are in memory.
    """
    state = PartialState()
    if state.num_processes == 1:
        return make()
    error: Exception | None = None
    made: Any = None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "made"
        if state.is_local_main_process:
            try:
                made = make()
                with file.open("wb") as stream:
                    pickle.dump(made, stream)
            except Exception as reason:
                error = reason
        files = meet(error, file)
        if not state.is_local_main_process:
            try:
                with files[state.process_index - state.local_process_index].open("rb") as stream:
                    made = pickle.load(stream)
            except Exception as reason:
                error = reason
        meet(error)  # nobody removes its folder before all have read
    return made
