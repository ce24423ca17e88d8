"""The command `simulate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from .checks import check_simulation, directory
from .comparison import theory_of, train_alone, train_both
from .options import Json, Runs, Seed, Set, SettingPath
from .output import cannot_write, print_json, say, with_setting
from .tables import channel_tables, describe, simulation_tables


@dataclass
class Simulate:
    """Train the finite-size model and show it beside the theory, where there is one."""

    setting: SettingPath
    set: Set = ()
    stage: Annotated[
        Literal["both", "finetuning"],
        arg(help="finetuning: the second stage alone, on the law of the frozen map that the theory assumes."),
    ] = "both"
    dimension: Annotated[int | None, arg(help="D of the simulated model (150; 600 for fine-tuning alone).")] = None
    runs: Runs = 4
    seed: Seed = 0
    starts: Annotated[int | None, arg(help="Starts of fine-tuning (3; 6 random ones for fine-tuning alone).")] = None
    moves: Annotated[int | None, arg(help="Deep moves, for fine-tuning alone (10).")] = None
    map_starts: Annotated[int | None, arg(help="Random starts of pre-training, of which the lowest counts (1).")] = None
    out: Annotated[
        Path | None,
        arg(help="Directory where finished runs are kept: stopped at any moment, the same command goes on."),
    ] = None
    json: Json = False

    def __call__(self) -> int:
        from ..errors import SettingError
        from ..setting.files import load_setting
        from ..simulation.simulate import check_options

        setting = load_setting(self.setting, self.set)
        dimension = self.dimension if self.dimension is not None else 150 if self.stage == "both" else 600
        options = {"starts": self.starts, "moves": self.moves, "map_starts": self.map_starts}
        check_options(self.stage, **options, test_samples=None, memory=None, data=None)
        numbers = {name: value for name, value in options.items() if value is not None}
        alone, options = self.stage == "finetuning", dict[str, Any](numbers)
        check_simulation(setting, dimension, self.runs, self.seed, alone, **numbers)
        if self.out is not None:
            options["out"] = directory(self.out)
        train, tables = (train_alone, channel_tables) if alone else (train_both, simulation_tables)
        try:
            _, compared, status = train(setting, theory_of(setting), dimension, self.runs, self.seed, **options)
        except OSError as error:
            if self.out is None:
                raise
            raise SettingError(cannot_write(self.out, error)) from None
        if self.json:
            print_json(with_setting(compared, setting))
        else:
            say(describe(setting))
            say(tables(compared))
        return status
