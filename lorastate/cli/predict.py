"""The commands `predict`, `gradient` and `explain`."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from .._version import __version__
from .checks import check_objective
from .exit_codes import FAILED
from .options import OBJECTIVE, Json, Set, SettingPath
from .output import print_json, say, warn, with_setting
from .tables import (
    TITLE,
    branch_line,
    cross_check_table,
    describe,
    limits_table,
    number,
    prediction_table,
    stability_lines,
    status_line,
    symmetry_lines,
    table,
)

if TYPE_CHECKING:
    from ..setting.stages import Setting


@dataclass
class Predict:
    """Order parameters, losses and errors of both stages."""

    setting: SettingPath
    set: Set = ()
    breaking_error: Annotated[
        bool, arg(help="In a glass, also what a second step of symmetry breaking would change (a minute more).")
    ] = False
    cross_check: Annotated[
        bool, arg(help="Both fixed points and all gradients of E' once more, by another solver (a minute more).")
    ] = False
    only: Annotated[
        Literal["both", "pretraining", "limits"],
        arg(help="Pre-training alone, or its and fine-tuning's Bayes-optimal limits alone: no other solve is made."),
    ] = "both"
    json: Json = False

    def __call__(self) -> int:
        from ..setting.files import load_setting

        setting = load_setting(self.setting, self.set)
        return {"both": self._both, "pretraining": self._pretraining, "limits": self._limits}[self.only](setting)

    def _pretraining(self, setting: Setting) -> int:
        import jax

        from ..solution.solution import pretrain

        found = jax.device_get(pretrain(setting.pretraining, setting.numerics, throw=False))
        summary = found.summary()
        if self.json:
            print_json(with_setting(summary, setting))
        elif found.ok:
            say(describe(setting))
            say(prediction_table("pretraining", summary))
        found.require_ok()
        if not self.json:
            say("\n".join([status_line(summary["status"]), *stability_lines(summary)]))
        return 0

    def _limits(self, setting: Setting) -> int:
        from ..bayes.limits import bayes_optimal

        found = bayes_optimal(setting)
        if self.json:
            print_json(with_setting(found.summary(), setting))
        else:
            say(describe(setting))
            say(limits_table(found))
        return 0

    def _both(self, setting: Setting) -> int:
        import jax

        from ..diagnosis import second_step
        from ..runtime.progress import listening
        from ..solution import solution

        pool, seen = ThreadPoolExecutor(2), set()
        # What else is asked for is made beside it, the replica-symmetric solution by the programs that it compiles.
        under_way = {limits_of: pool.submit(limits_of, setting)}

        def begin(name: str, _: bool = False) -> None:
            seen.add(name)
            if name == "answer" and "solve_broken" in seen and solution.symmetric_solution not in under_way:
                under_way[solution.symmetric_solution] = pool.submit(solution.symmetric_solution, setting)

        try:
            with listening(begin):
                found = jax.device_get(solution.predict(setting, throw=False))  # operations on arrays are compiled
            limits, summary = under_way[limits_of].result(), found.summary()
            broken = summary["symmetry"] == "one-step broken"
            summary["rs"] = under_way[solution.symmetric_solution].result() if broken else None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        summary["bayes_optimal"] = limits.summary() if limits else None
        if self.breaking_error and found.ok:
            summary["breaking_error"] = second_step.breaking_error(found)
        if self.cross_check and found.ok:
            summary["cross_check"] = checked(setting)
        if self.json:
            print_json(with_setting(summary, setting))
        else:
            say(describe(setting))
            for stage in TITLE:
                if summary["status"][stage]["code"] == "ok":
                    say(prediction_table(stage, summary))
        found.require_ok()
        if not self.json:
            if limits:
                say(limits_table(limits))
            say(status_line(summary["status"]))
            say(symmetry_lines(summary))
            say(branch_line(found.branches))
            if other := summary.get("cross_check"):
                say(cross_check_table(dict(other)))
        return 0


def checked(setting: Setting) -> dict[str, Any] | None:
    """What another solver says; None, and why, where it has nothing to say."""
    from ..diagnosis.cross_check import cross_check
    from ..errors import SettingError

    try:
        return cross_check(setting)
    except SettingError as error:
        warn(f"no cross-check: {error}")
        return None


def limits_of(setting: Setting) -> Any:
    """Bayes-optimal limits; None where there is no formula (activations of one's own) or the solve failed."""
    from ..bayes.limits import bayes_optimal
    from ..errors import SettingError, SolveError

    try:
        return bayes_optimal(setting)
    except (SettingError, SolveError):
        return None


@dataclass
class Gradient:
    """A prediction and its derivatives in every continuous field."""

    setting: SettingPath
    set: Set = ()
    of: Annotated[str, arg(help=f"{OBJECTIVE}.")] = "test_error"
    json: Json = False

    def __call__(self) -> int:
        from ..setting.files import load_setting
        from ..setting.paths import get
        from ..solution import gradients

        setting = load_setting(self.setting, self.set)
        check_objective("--of", self.of)
        value, gradient = gradients.gradient(setting, of=self.of)
        value, gradient = float(value), {path: float(slope) for path, slope in gradient.items()}
        if self.json:
            print_json(with_setting({"value": value, "gradient": gradient, "of": self.of}, setting))
        else:
            say(describe(setting))
            rows = [(path, number(float(get(setting, path))), number(slope)) for path, slope in gradient.items()]
            say(f"{self.of} = {number(value)}\n")
            say(table(("field", "value", f"d {self.of} / d field"), rows))
        bad = [path for path, slope in gradient.items() if not math.isfinite(slope)]
        if bad or not math.isfinite(value):
            warn(f"{self.of} has no finite derivative in {', '.join(bad) or 'any field'}")
            return FAILED
        return 0


@dataclass
class Explain:
    """One page about a setting: what LoRA sees of pre-training, what to change, how far it can be trusted."""

    setting: SettingPath
    set: Set = ()
    json: Json = False

    def __call__(self) -> int:
        from ..diagnosis import explain as report
        from ..diagnosis.page import page
        from ..setting.files import load_setting

        setting = load_setting(self.setting, self.set)
        facts = report.explain(setting, progress=True)
        if self.json:
            print_json({**facts, "version": __version__})
        else:
            say(describe(setting))
            say(page(facts))
        return 0
