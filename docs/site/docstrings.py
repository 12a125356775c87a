"""Docstrings as Markdown: roles of Sphinx become code, lines that go on below Raises are indented as such."""

from __future__ import annotations

import re
from typing import Any

import griffe

GOES_ON = re.compile(r"^(Raises:(?:\n .*)*)\n    (?![\w., ]+: )(?=\S)", re.MULTILINE)
ROLE = re.compile(r":(?:func|class|meth|mod|attr):`~?([\w.]+)`")


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = ROLE.sub(r"`\1`", obj.docstring.value)
            while GOES_ON.search(text):
                text = GOES_ON.sub(r"\1\n        ", text)
            obj.docstring.value = text.replace("``", "`")
