"""The command `optimize`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import UseAppendAction, arg

from .._version import __version__
from .checks import check_fields, check_objective, check_simulation, directory
from .comparison import train_both
from .environment import drawing
from .exit_codes import FAILED
from .options import OBJECTIVE, Dimension, Runs, Seed, Set, SettingPath
from .output import cannot_write, say, warn, write_json
from .tables import (
    budget_table,
    describe,
    optimum_table,
    scan_table,
    sensitivity_table,
    simulation_tables,
    stability_lines,
)

if TYPE_CHECKING:
    from ..design.optimum import Optimum
    from ..setting.stages import Setting


@dataclass
class Optimize:
    """The best values of some fields of a setting, by gradient descent through the theory."""

    setting: SettingPath
    set: Set = ()
    over: Annotated[str, arg(help="Fields to optimise, separated by commas.")] = "pretraining.lam,finetuning.lam"
    minimize: Annotated[str, arg(help=f"{OBJECTIVE}; overlap is maximised.")] = "test_error"
    budget: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(
            metavar="SENTENCE",
            help="A constraint, as 'pretraining.alpha + 0.05 * finetuning.alpha <= 0.3', 'label_power <= 2.25', or "
            "'pairs' (labelled token pairs stay as many as they are).",
        ),
    ] = ()
    scan: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(metavar="KEY=VALUES", help="A discrete field and the values to try, as pretraining.tokens=2,3,4."),
    ] = ()
    sensitivities: Annotated[bool, arg(help="Also elasticities and curvatures at the optimum, with a chart.")] = False
    verify: Annotated[bool, arg(help="Also train the finite-size model at the optimum.")] = False
    dimension: Dimension = 150
    runs: Runs = 4
    seed: Seed = 0
    out: Annotated[Path, arg(help="Directory for result.json and the figure.")] = Path("results")

    def __call__(self) -> int:
        from ..design import optimize as design
        from ..design.sensitivities import sensitivities
        from ..errors import SettingError
        from ..setting.files import load_setting, setting_to_dict

        figures = drawing()
        setting = load_setting(self.setting, self.set)
        options = self._checked(setting)
        out = directory(self.out)

        optimum = design.optimize(setting, minimize=self.minimize, progress=True, **options)
        result = {
            **optimum.summary(),
            "initial_setting": setting_to_dict(optimum.initial),
            "setting": setting_to_dict(optimum.setting),
            "version": __version__,
        }
        _say_optimum(optimum)
        # What is found is on disk before the simulation, which takes minutes and may be interrupted.
        write_json(out / "result.json", result)

        simulation, status = None, 0
        if not optimum.converged:
            status = FAILED
            warn(f"the descent did not converge ({optimum.message}); gradient norm {optimum.gradient_norm:.2e}")
        optimum.after.require_ok()
        charts: list[Path] = []
        if self.sensitivities:
            found = sensitivities(optimum.setting, optimum.over, optimum.minimize)
            result["sensitivities"] = found.summary()
            write_json(out / "result.json", result)
            say(sensitivity_table(found))
            charts = figures.sensitivities(found, optimum, out)
        if self.verify:
            given = self.dimension, self.runs, self.seed
            simulation, compared, verified = train_both(optimum.setting, optimum.after.summary(), *given)
            status = status or verified
            result["verification"] = compared
            write_json(out / "result.json", result)
            say(simulation_tables(compared))
        try:
            written = figures.optimization(optimum, out, simulation=simulation)
        except OSError as error:
            raise SettingError(cannot_write(out, error)) from None
        say("written: " + ", ".join(str(path) for path in (out / "result.json", *charts, *written)))
        return status

    def _checked(self, setting: Setting) -> dict[str, Any]:
        """What the descent is given, once the options make sense."""
        from ..setting.fields import continuous_fields
        from ..sweeps.grid import parse_axis

        over = tuple(field.strip() for field in self.over.split(",") if field.strip())
        check_fields("--over", over, continuous_fields(setting))
        check_objective("--minimize", self.minimize)
        if self.verify:
            check_simulation(setting, self.dimension, self.runs, self.seed)
        options: dict[str, Any] = {"over": over}
        if self.budget:
            options["budgets"] = self.budget
        if self.scan:
            options["scan"] = dict(parse_axis(text, "scan") for text in self.scan)
        return options


def _say_optimum(optimum: Optimum) -> None:
    say("At the optimum\n" + describe(optimum.setting))
    say(optimum_table(optimum))
    for line in stability_lines(optimum.after.summary()):
        say(line)
    if optimum.budgets:
        say(budget_table(optimum))
    if optimum.scanned:
        say(scan_table(optimum))
