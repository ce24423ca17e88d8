"""Gradients of a prediction with respect to every continuous input, and descent over any of them.

All derivatives go through both fixed points by the implicit function theorem; positive inputs are descended in log
coordinates, shares between 0 and 1 in those of the logistic function.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from . import finetuning as ft
from . import pretraining as pt
from . import theory
from .activation import Identity
from .channel import LeastError, Selected
from .errors import Code, SettingError, SolveError, require_float64, succeeded
from .fixed_point import sensitivity
from .order import decode
from .program import Program
from .setting import Setting
from .setting_file import continuous_fields, get, replace
from .solution import Solution, predict, solve

#: Objectives by name, each to be minimised, as functions of the stage, the frozen map, the order parameters of
#: fine-tuning and the test nodes.
OBJECTIVES = {
    "test_error": theory.lora_error,
    "effective_noise": lambda fine, frozen, order, nodes: fine.effective_noise(frozen),
    "overlap": lambda fine, frozen, order, nodes: -theory.lora_overlap(fine, order),
}


def _read(path: str):
    """Leaf of (pre, fine) that a dotted path names; both stages are explicit there."""
    stage, name = path.split(".")
    index = 0 if stage == "pretraining" else 1

    def where(stages):
        node = stages[index]
        if name == "beta":
            return node.activation.beta
        if name == "recalibration":
            return node.recalibration.b
        # Fields of the channel by its own names; an alpha that follows from them is a leaf of the stage all the same.
        return getattr(node if hasattr(node, name) else node.inputs, name)

    return where


def value_and_slopes(objective: str, pre, fine, nodes, of_map, second):
    """An objective and its derivatives, shaped like (pre, fine), at the fixed points that were found.

    Few inputs and no tape: forward mode needs a tenth of the memory of reverse mode, and compiles faster. Each stage is
    differentiated once, in its own order parameters and in everything that it is given; the chain rule does the rest.
    """
    params, rest = eqx.partition((pre, fine), eqx.is_inexact_array)
    prepared = nodes.finetuning._replace(found=second.found)
    x, y = of_map.point.x, second.solved.point.x

    def map_step(x, params, inner):
        pre, _ = eqx.combine(params, rest)
        return pt.step(x, pre, None if nodes.pretraining is None else (nodes.pretraining, inner))

    def lora(x, params):
        pre, fine = eqx.combine(params, rest)
        return fine, fine.inputs.freeze(pre, decode(x))

    def lora_step(y, given, inner):
        return ft.step(y, lora(*given), (prepared, inner))

    def value(y, x, params):
        return OBJECTIVES[objective](*lora(x, params), decode(y), nodes.finetuning_test)

    each = jax.tree_util.tree_map
    dx = sensitivity(map_step, x, params, of_map.inner)
    by_x, by_params = sensitivity(lora_step, y, (x, params), second.solved.inner)
    dy = each(lambda partial, dx: partial + by_x @ dx, by_params, dx)
    at_y, at_x, partial = jax.jacfwd(value, argnums=(0, 1, 2))(y, x, params)
    return value(y, x, params), each(lambda p, dx, dy: p + at_x @ dx + at_y @ dy, partial, dx, dy)


_value_and_slopes = Program(value_and_slopes, quick=True)


def check_objective(name: str) -> str:
    if name not in OBJECTIVES:
        allowed = ", ".join(f'"{k}"' for k in OBJECTIVES)
        raise SettingError(f"objective = {name!r} is unknown; allowed: {allowed}")
    return name


class InexactGradient(UserWarning):
    """Some nodes have wells that they are not split between: part of the surface term is missing.

    So it is with wells of softmax off the line that nodes are split along, and with updates of rank r > 1.
    """


#: Share of nodes with two wells from which on gradients are warned about, but for rank one and the identity.
_VISIBLE_WELLS = 1e-3


def _inexact(setting: Setting, share: float) -> str:
    """What to say about gradients where that share of the nodes has two wells; nothing where they are exact."""
    fine = setting.finetuning_resolved
    if share <= _VISIBLE_WELLS or (fine.rank == 1 and isinstance(fine.activation, Identity)):
        return ""
    return (
        f"{share:.1%} of the nodes have two wells: the gradient lacks part of the surface term and can be off by "
        "tens of per cent; compare with differences of predictions over several steps"
    )


class _Point(NamedTuple):
    value: float  # -overlap for the objective "overlap"
    slopes: dict[str, float]  # total derivatives by path
    good: bool
    share: float  # of nodes with two wells


def total_slopes(setting: Setting, grads) -> dict[str, float]:
    """Total derivatives by dotted path, from partial ones shaped like (pre, resolved fine)."""
    fine = setting.finetuning_resolved
    slopes = {p: float(_read(p)(grads)) for p in continuous_fields(setting)}
    # Fields that follow pre-training move with it: their derivative is part of the pre-training field's.
    same_noise = setting.finetuning.delta is None or fine.inputs.keeps_noise
    if same_noise:
        slopes["pretraining.delta"] += float(grads[1].delta)
    if setting.finetuning.activation is None and "pretraining.beta" in slopes:
        slopes["pretraining.beta"] += slopes["finetuning.beta"]
    if isinstance(fine.inputs, Selected):  # alpha = rho pool
        by_alpha = float(grads[1].alpha)
        slopes["finetuning.rho"] += by_alpha * float(fine.inputs.pool)
        slopes["finetuning.pool"] += by_alpha * float(fine.inputs.rho)
    return slopes


def _evaluate(setting: Setting, objective: str) -> _Point:
    pre, fine = setting.pretraining, setting.finetuning_resolved
    nodes = theory.node_sets(pre, fine, setting.numerics)
    first, second = solve(pre, fine, setting.numerics, nodes)
    value, grads = _value_and_slopes(objective, pre, fine, nodes, first.solved, second)
    slopes = total_slopes(setting, grads)
    codes = first.status["code"], second.solved.point.code
    good = all(bool(succeeded(code)) for code in codes) and all(map(math.isfinite, slopes.values()))
    # The plain samples are as good as the split ones for this.
    return _Point(float(value), slopes, good, float(np.mean(second.solved.inner.two_wells[:, 0])))


def gradient(setting: Setting, of: str = "test_error") -> tuple[float, dict[str, float]]:
    """Value of a prediction ("test_error", "effective_noise", "overlap") and its derivative by every continuous field.

    Fine-tuning fields left to follow pre-training count in the pre-training field (as `replace` would move both);
    the fine-tuning entry is the partial derivative. Raises `SolveError` when a solve failed; warns with
    `InexactGradient` where the inner problem of softmax has double wells of visible weight.
    """
    require_float64()
    objective = check_objective(of)
    if searches_scale(setting):
        # E' is stationary in b: there is no need to differentiate the search.
        _only_of_error(of)
        setting = with_best_scale(setting)
        value, slopes, good, share = _evaluate(setting, objective)
        slopes.pop("finetuning.recalibration")
    else:
        value, slopes, good, share = _evaluate(setting, objective)
    if not good:
        predict(setting)  # names the stage and the code
        raise SolveError("gradient", Code.nonfinite, f"objective {of}")
    if text := _inexact(setting, share):
        warnings.warn(text, InexactGradient, stacklevel=2)
    sign = -1.0 if of == "overlap" else 1.0
    return sign * value, {k: sign * v for k, v in slopes.items()}


def searches_scale(setting: Setting) -> bool:
    """Whether the recalibration is "error": a b that has to be searched for."""
    return isinstance(setting.finetuning.recalibration, LeastError)


def _only_of_error(objective: str) -> None:
    if objective != "test_error":
        raise SettingError(
            f"finetuning.recalibration = 'error' goes with the objective test_error only, not with {objective}; "
            'allowed: a number or "noise"'
        )


_SCALE = "finetuning.recalibration"


def _high(path: str) -> float:
    """Largest value of a positive input: one for a share, otherwise none."""
    return 1.0 if path.endswith((".rho", ".reused_fraction")) else math.inf


def with_best_scale(setting: Setting) -> Setting:
    """The setting with recalibration "error" replaced by the b that minimises E', found by descent from b = 1."""
    best = optimize(replace(setting, _SCALE, 1.0), over=(_SCALE,), tolerance=1e-7)
    if not best.converged:
        raise SolveError("recalibration", Code.stalled, f"the search for the b that minimises E': {best.message}")
    return best.setting


@dataclass
class Optimum:
    """Result of `optimize`: settings and solutions before and after, and the path between."""

    over: tuple[str, ...]
    minimize: str
    initial: Setting
    setting: Setting
    before: Solution
    after: Solution
    gradient_norm: float
    solves: int
    converged: bool
    message: str
    inexact: str = ""  # what is wrong with gradients at the optimum (double wells of softmax), if anything
    path: list[dict[str, float]] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {
            "over": list(self.over),
            "minimize": self.minimize,
            "converged": self.converged,
            "message": self.message,
            "inexact": self.inexact or None,
            "gradient_norm": self.gradient_norm,
            "solves": self.solves,
            "before": self.before.summary(),
            "after": self.after.summary(),
            "path": self.path,
        }


def optimize(
    setting: Setting,
    over: Sequence[str] = ("pretraining.lam", "finetuning.lam"),
    minimize: str = "test_error",
    *,
    tolerance: float = 1e-6,
    max_steps: int = 60,
    progress: bool = False,
) -> Optimum:
    """Minimises E' ("test_error"), Delta_eff ("effective_noise") or -o_w ("overlap") over continuous fields.

    L-BFGS directions (optax) in u = log(field), or log(x/(1 - x)) for a share x (rho, reused_fraction), with
    backtracking; a trial whose solve fails is shortened. Stops when the norm of the gradient in u is below `tolerance`;
    anything else is `converged = False` with a message. Recalibration "error" joins the descent. Raises `SettingError`
    for an unknown field and `SolveError` when the starting point itself cannot be solved.
    """
    require_float64()
    objective = check_objective(minimize)
    over = tuple(dict.fromkeys(over))
    if searches_scale(setting):
        # Both searches minimise E': they are one.
        _only_of_error(minimize)
        setting, over = replace(setting, _SCALE, 1.0), (*over, _SCALE)
    known = continuous_fields(setting)
    for p in over:
        if p not in known:
            raise SettingError(f"over = {p!r} is not a continuous field; allowed: {', '.join(known)}")
        x, high = float(get(setting, p)), _high(p)
        if not 0 < x < high:
            allowed = "> 0" if high == math.inf else f"above 0 and below {high:g}"
            raise SettingError(f"{p} = {x!r} is out of range; allowed: {allowed} when it is descended")
    if not over:
        raise SettingError("over = () is empty; allowed: at least one continuous field")

    solves = 0

    def fields(u):
        """The inputs from the coordinates: u = log x, or log(x / (1 - x)) for a share."""
        return [
            float(np.exp(x)) if _high(p) == math.inf else float(1 / (1 + np.exp(-x)))
            for p, x in zip(over, u, strict=True)
        ]

    def at(u):
        nonlocal solves
        solves += 1
        s = setting
        for p, x in zip(over, fields(u), strict=True):
            s = replace(s, p, x)
        value, slopes, good, _ = _evaluate(s, objective)
        # dx/du = x (1 - x / high)
        slope = [slopes[p] * x * (1 - x / _high(p)) for p, x in zip(over, fields(u), strict=True)]
        return s, value, np.array(slope), good

    before = predict(setting)
    start = np.array([float(get(setting, p)) for p in over])
    u = np.log(start) - np.log1p(-start / np.array([_high(p) for p in over]))
    current, value, slope, good = at(u)
    if not good:
        raise SolveError("optimize", Code.nonfinite, "the gradient at the starting point is not finite")
    path: list[dict[str, float]] = []

    def record():
        path.append(
            {**dict(zip(over, fields(u), strict=True)), "value": value, "gradient_norm": float(np.linalg.norm(slope))}
        )

    record()
    memory = optax.scale_by_lbfgs(memory_size=8)
    state = memory.init(jnp.asarray(u))
    bar = tqdm(desc="descent", unit="solve", disable=not progress)
    message = f"no convergence in {max_steps} steps"
    for _ in range(max_steps):
        norm = float(np.linalg.norm(slope))
        bar.set_postfix_str(f"value {value:.6g}, gradient {norm:.1e}")
        if norm < tolerance:
            message = f"gradient norm below {tolerance:g}"
            break
        direction, state = memory.update(jnp.asarray(slope), state, jnp.asarray(u))
        step = -np.asarray(direction)
        if not np.all(np.isfinite(step)) or step @ slope >= 0:
            step, state = -slope / norm, memory.init(jnp.asarray(u))
        if len(path) == 1:
            step = -slope / norm * 0.5  # no curvature known yet: half a unit of log
        step *= min(1.0, 1.5 / float(np.max(np.abs(step))))  # never more than a factor e^1.5 at once
        length, accepted = 1.0, False
        while length > 1e-4:
            trial = at(u + length * step)
            bar.update()
            # Near the minimum the decrease drowns in rounding; the slope along the step still tells.
            enough = trial[1] <= value + 1e-4 * length * (step @ slope)
            flat = abs(trial[1] - value) <= 1e-12 * max(1.0, abs(value))
            closer = flat and float(np.linalg.norm(trial[2])) < norm
            if trial[3] and (enough or closer):
                accepted = True
                break
            length /= 3
        if not accepted:
            message = "no step along the descent direction lowers the objective (or every trial failed to solve)"
            break
        u = u + length * step
        current, value, slope, _ = trial
        record()
        if np.max(np.abs(u)) > 25:
            message = "a field runs off to zero or infinity: there is no interior optimum in this direction"
            break
    bar.close()
    norm = float(np.linalg.norm(slope))
    converged = norm < tolerance
    if not converged and norm < 1e-5 and message.startswith("no step"):
        converged, message = True, f"gradient norm {norm:.1e}; no further decrease is resolved"
    after = predict(current)
    inexact = _inexact(current, float(after.finetuning["double_well_share"]))
    return Optimum(over, minimize, setting, current, before, after, norm, solves, converged, message, inexact, path)
