"""The process that one section is run in.

python -m benchmarks.gpu.child SPECIFICATION      (the runner starts it)
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from importlib import import_module
from pathlib import Path

from . import results
from .lab import Lab, Skip


def main(argv: list[str]) -> int:
    """Run the section and write how it ended. What it leaves running is killed by the runner."""
    what = json.loads(argv[0])
    started = time.monotonic()
    _die_with(what["parent"])
    lab = Lab(what["section"], Path(what["folder"]), what["limit_s"], rehearsal=what["rehearsal"])
    file, (module, _, function) = results.file_of(lab.folder, lab.name), what["call"].partition(":")
    state, reason = "ended", None
    try:
        getattr(import_module(module), function or "run")(lab)
    except Skip as why:
        state, reason = "skipped", str(why)
    except Exception as error:
        traceback.print_exc()
        state, reason = "failed", f"{type(error).__name__}: {error}"[:500]
    results.append(file, "end", state=state, reason=reason, seconds=time.monotonic() - started)
    return int(state == "failed")


def _die_with(parent: int) -> None:
    """End this process and all that it has started when the runner is gone, whatever ended that."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os.killpg(0, 9)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # tearing a device down may take long, or hang, and all is written
