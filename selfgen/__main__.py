"""``python -m selfgen`` is ``selfgen``."""

from .cli import main

raise SystemExit(main())
