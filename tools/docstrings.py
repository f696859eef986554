"""The extension by which griffe, which reads docstrings for the site, takes ``Example:`` for what it calls Examples."""

from __future__ import annotations

import re

import griffe


class Examples(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
