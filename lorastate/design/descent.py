"""Descent of an objective over continuous fields, in logarithms of them, and how it ends."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from ..errors import SettingError
from ..setting.fields import BY_PATH, continuous_fields
from ..setting.paths import get, replace_all
from ..setting.stages import Setting
from ..solution.gradients import evaluate


class End(enum.Enum):
    """How a descent ended; the value is the sentence that says so."""

    small = "gradient norm below {tolerance:g}"
    unresolved = "gradient norm {norm:.1e}; no further decrease is resolved"
    boundary = "{field} runs off ({value:.3g}): its best value is at the boundary"
    away = "a field runs off to zero or infinity: there is no interior optimum in this direction"
    no_step = "no step along the descent direction lowers the objective (or every trial failed to solve)"
    no_step_within = "no step within the budgets lowers the objective (or every trial failed to solve)"
    max_steps = "no convergence in {steps} steps"
    max_rounds = "no convergence in {steps} rounds"


class Ending(NamedTuple):
    """How a descent ended, and the numbers that the sentence needs."""

    end: End
    told: dict[str, Any] = {}  # noqa: RUF012  never written to

    @property
    def message(self) -> str:
        return self.end.value.format(**self.told)


class Trial(NamedTuple):
    """A landscape at one point u."""

    u: np.ndarray
    setting: Setting
    value: float  # -overlap for the objective "overlap"
    slope: np.ndarray  # d value / du
    slopes: dict[str, float]  # by field
    good: bool
    jumps: bool = False  # minima do: value and slope are known up to error bars


#: The shortest share of a step that is tried; where minima jump, a shorter one is lost in the error bar.
_SHORTEST, _SHORTEST_OF_JUMPS = 1e-4, 0.03


def check_over(setting: Setting, over: Iterable[str]) -> tuple[str, ...]:
    """The paths, once each, if they are continuous fields inside their range; else `SettingError`."""
    over, known = tuple(dict.fromkeys(over)), continuous_fields(setting)
    for p in over:
        if p not in known:
            raise SettingError(f"over = {p!r} is not a continuous field; allowed: {', '.join(known)}")
        x, field = float(get(setting, p)), BY_PATH[p]
        if not 0 < x < field.high:
            raise SettingError(f"{p} = {x!r} is out of range; allowed: {field.allowed} when it is descended")
    return over


class Landscape:
    """The landscape of an objective over some fields in unbounded coordinates u (`Field.coordinate`)."""

    def __init__(self, setting: Setting, over: tuple[str, ...], objective: str, bar: tqdm):
        self.setting, self.over, self.objective, self.bar = setting, over, objective, bar
        self._over = [BY_PATH[p] for p in over]
        self.solves, self.size = 0, 0.0
        self.path: list[dict[str, float]] = []

    @property
    def start(self) -> np.ndarray:
        return np.array([field.coordinate(float(get(self.setting, field.path))) for field in self._over])

    def fields(self, u):
        """The inputs from the coordinates (JAX or NumPy)."""
        return [field.value(v) for field, v in zip(self._over, u, strict=True)]

    def replaced(self, u) -> Setting:
        return replace_all(self.setting, dict(zip(self.over, self.fields(u), strict=True)))

    def at(self, u: np.ndarray) -> Trial:
        self.solves += 1
        xs = [float(x) for x in self.fields(u)]
        s = replace_all(self.setting, dict(zip(self.over, xs, strict=True)))
        value, slopes, failed, jump = evaluate(s, self.objective)
        self.bar.update()
        slope = [slopes[field.path] * field.pace(x) for field, x in zip(self._over, xs, strict=True)]
        return Trial(np.array(u), s, value, np.array(slope), slopes, failed is None, bool(jump))

    def begin(self, u: np.ndarray) -> Trial:
        """`at` the start, whose value sets the scale that gradients are judged in."""
        first = self.at(u)
        self.size = abs(first.value)
        return first

    def relative(self, trial: Trial, norm: Any) -> float:
        """The norm of a gradient over the size of the objective."""
        return float(norm) / max(self.size, abs(trial.value), 1e-9)

    def boundary(self, trial: Trial) -> Ending | None:
        """The field that runs off where the gradient vanishes because the field does: the objective still falls half a
        unit further down its slope or, if that cannot be solved, Newton's step is far from short."""
        norm = float(np.linalg.norm(trial.slope))
        if norm == 0:
            return None
        down = -trial.slope / norm
        beyond = self.at(trial.u + 0.5 * down)
        if beyond.good:
            away = beyond.slope @ down < 0
        else:
            before = self.at(trial.u - 0.5 * down)
            away = before.good and 0.5 * norm > 0.05 * (-before.slope @ down - norm)
        if not away:
            return None
        k = int(np.argmax(np.abs(down)))
        return self.runs_off(trial, k)

    def runs_off(self, trial: Trial, k: int) -> Ending:
        return Ending(End.boundary, {"field": self.over[k], "value": float(self.fields(trial.u)[k])})

    def record(self, trial: Trial, norm: float) -> None:
        fields = (float(x) for x in self.fields(trial.u))
        self.path.append(dict(zip(self.over, fields, strict=True)) | {"value": trial.value, "gradient_norm": norm})
        self.bar.set_postfix_str(f"value {trial.value:.6g}, gradient {norm:.1e}")


_MEMORY = optax.scale_by_lbfgs(memory_size=8)
_next_direction = jax.jit(_MEMORY.update)  # as it is, every step would compile loops of its own


def descend(landscape: Landscape, now: Trial, tolerance: float, max_steps: int) -> tuple[Trial, Ending]:
    """L-BFGS from a trial; the last one, and why it ended."""
    state = _MEMORY.init(jnp.asarray(now.u))
    landscape.record(now, landscape.relative(now, np.linalg.norm(now.slope)))
    for _ in range(max_steps):
        u, value, slope = now.u, now.value, now.slope
        norm = float(np.linalg.norm(slope))
        if landscape.relative(now, norm) < tolerance:
            return now, landscape.boundary(now) or Ending(End.small, {"tolerance": tolerance})
        direction, state = _next_direction(jnp.asarray(slope), state, jnp.asarray(u))
        step = -np.asarray(direction)
        if not np.all(np.isfinite(step)) or step @ slope >= 0:
            step, state = -slope / norm, _MEMORY.init(jnp.asarray(u))
        if len(landscape.path) == 1:
            step = -slope / norm * 0.5  # no curvature known yet: half a unit of log
        step *= min(1.0, 1.5 / float(np.max(np.abs(step))))  # never more than a factor e^1.5 at once
        length, accepted = 1.0, False
        while length > (_SHORTEST_OF_JUMPS if now.jumps else _SHORTEST):
            trial = landscape.at(u + length * step)
            # Near the minimum the decrease drowns in rounding; the slope along the step still tells.
            enough = trial.value <= value + 1e-4 * length * (step @ slope)
            flat = abs(trial.value - value) <= 1e-12 * max(1.0, abs(value))
            closer = flat and float(np.linalg.norm(trial.slope)) < norm
            if trial.good and (enough or closer):
                accepted = True
                break
            length /= 3
        if not accepted:
            return now, Ending(End.no_step)
        now = trial
        landscape.record(now, landscape.relative(now, np.linalg.norm(now.slope)))
        if np.max(np.abs(now.u)) > 25:
            return now, Ending(End.away)
    return now, Ending(End.max_steps, {"steps": max_steps})
