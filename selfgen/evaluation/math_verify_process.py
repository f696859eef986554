"""A process that runs the package math-verify: pairs of texts as lines of JSON in, whether they are the same out.

It is run as a script and imports nothing of selfgen, so that it starts fast.
"""

from __future__ import annotations

import json
import logging
import sys

from math_verify import parse, verify


def main() -> None:
    logging.disable()
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing else may write there
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        try:  # without its alarms: the process is ended by the one that asked
            reference, answer = (parse(text, parsing_timeout=None) for text in json.loads(line))
            same = bool(verify(reference, answer, timeout_seconds=None))
        except (Exception, RecursionError, MemoryError):
            same = False
        print(json.dumps(same), file=answers, flush=True)


if __name__ == "__main__":
    main()
