"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg

SettingPath = Annotated[Positional[Path], arg(metavar="SETTING", help="Settings file (TOML).")]
Set = Annotated[
    UseAppendAction[tuple[str, ...]],
    arg(name="set", metavar="KEY=VALUE", help="Override a field, as pretraining.lam=0.02."),
]
#: What can be minimised and differentiated.
OBJECTIVE = (
    "test_error (E'), effective_noise, overlap, forgetting_error, test_error_best_factor or pretraining.test_error (E)"
)
Json = Annotated[bool, arg(help="Print JSON only.")]
Dimension = Annotated[int, arg(help="D of the simulated model.")]
Runs = Annotated[int, arg(help="Independent training runs.")]
Seed = Annotated[int, arg(help="Seed of the simulation.")]
