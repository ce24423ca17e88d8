"""Docstrings as pages show them: they are plain text for a terminal, in which S* and ||x|| are no markup."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

#: What stands in backticks is left alone.
_CODE = re.compile(r"(``.+?``|`[^`\n]+`)", re.S)


class Plain(Extension):
    """Asterisks, bars and backslashes stand for themselves, outside of code."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is None:
            return
        pieces = _CODE.split(obj.docstring.value)
        pieces[::2] = [re.sub(r"([*\\|~<])", r"\\\1", piece) for piece in pieces[::2]]
        obj.docstring.value = "".join(pieces)
