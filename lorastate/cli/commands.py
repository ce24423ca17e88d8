"""The commands by name, and how their words are read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

from tyro.conf import subcommand

from .figure import Figure
from .optimize import Optimize
from .practice import Practice
from .predict import Explain, Gradient, Predict
from .simulate import Simulate
from .sweep import Sweep
from .verify import Verify

Command = (
    Annotated[Predict, subcommand("predict")]
    | Annotated[Optimize, subcommand("optimize")]
    | Annotated[Gradient, subcommand("gradient")]
    | Annotated[Sweep, subcommand("sweep")]
    | Annotated[Explain, subcommand("explain")]
    | Annotated[Simulate, subcommand("simulate")]
    | Annotated[Verify, subcommand("verify")]
    | Annotated[Figure, subcommand("figure")]
    | Annotated[Practice, subcommand("practice")]
)


def spread(words: Sequence[str]) -> list[str]:
    """`--set a.b=1 c.d=2` as `--set a.b=1 --set c.d=2`: one flag, --set or --grid, may carry several fields."""
    out: list[str] = []
    inside = ""
    for i, word in enumerate(words):
        if word in ("--set", "--grid"):
            inside = word
        elif inside and i and words[i - 1] != inside:
            inside = inside if re.match(r"\w+\.\w+=", word) else ""
            if inside:
                out.append(inside)
        out.append(word)
    return out
