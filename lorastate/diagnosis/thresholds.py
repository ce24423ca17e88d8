"""Thresholds: where fine-tuning starts to recover w*, where symmetry breaks, where pre-training can interpolate.

    alpha'_c       from which on the lowest minima have m > 0; m = 0 is always a fixed point
    alpha_interp   J_1(d, 0) / (2 d n_eff),  d from  Q0 + Delta/2 = J(d, 0) - (d/2) J_1(d, 0),  J_1 = dJ/d delta

All are roots found on the host. Source: arXiv:2606.05899, arXiv:2509.24914.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..bayes.finetuning import bayes_optimal_threshold
from ..bayes.frozen_map import frozen_map as seen_map
from ..bayes.pretraining import bayes_optimal_pretraining
from ..errors import Code, SettingError, SolveError, require_float64, succeeded
from ..evolution.order import Order, from_norm
from ..math.roots import change_between, root_between
from ..model.activation import revealed
from ..setting.paths import replace
from ..setting.stages import Pretraining, Setting
from ..solution.finetuning import lora_order
from ..solution.solution import Solution, predict


def interpolation_threshold(pre: Pretraining) -> float:
    """alpha_interp: as lam -> 0 the training loss of pre-training vanishes below it, and V grows without bound.

    n_eff = T (T+1), or T (T+1) - 2 for softmax, which forgets the common shift. Without noise d = 0 and the limit
    J_1 / d -> 2 - p^2 counts, p the share of zero eigenvalues of S*; with much noise J_1 / d -> 1.
    """
    require_float64()
    law, size = pre.law, float(pre.label_size)

    def slope(d):
        return jax.grad(lambda x: law.J(x, jnp.zeros(())))(d)

    def excess(log_d):
        d = jnp.exp(log_d)
        return float(law.J(d, jnp.zeros(())) - d / 2 * slope(d)) - size

    # J - (d/2) J_1 = E[lambda_+ S*] is Q0 at d = 0 and grows with d. Beyond these ends the limits are as good.
    low, high = np.log(1e-4), np.log(1e4)
    if excess(low) > 0:
        d = jnp.asarray(1e-7)
    else:
        d = jnp.exp(root_between(excess, low, high) if excess(high) > 0 else high)
    return float(slope(d) / (2 * d * revealed(pre.activation, pre.tokens)))


def order_of(solution: Solution, stage: str) -> Order:
    """The order parameters of one stage."""
    p = getattr(solution, stage)
    if stage == "pretraining":
        return from_norm(p["V"], p["M"], p["Q"], solution.setting.pretraining.label_size)
    return lora_order(p)


def frozen_map(solution: Solution, setting: Setting | None = None):
    """The frozen map of a solution, as the fine-tuning inputs of `setting` (default: its own) see it."""
    setting = setting or solution.setting
    pre, inputs = setting.pretraining, setting.finetuning_resolved.inputs
    if inputs.needs_map and not bool(succeeded(solution.status["pretraining"]["code"])):
        raise SolveError("pretraining", Code(int(solution.status["pretraining"]["code"])))
    down = solution.pretraining["M_down"]
    return seen_map(inputs, pre, order_of(solution, "pretraining"), down)


#: Overlap o_w from which on w* counts as found: it grows as the root of the distance from the threshold, so that this
#: is about one per cent above it.
_FOUND = 0.1


def weak_recovery_threshold(setting: Setting, solution: Solution | None = None) -> float:
    """alpha'_c of the trained update: the number of samples (per D) from which the lowest minima know w*.

    Bisection (of the logarithm, to 1 %) on o_w of direct solves over alpha' (over the pool, on selected inputs) between
    0.01 and 100: whatever the phase, and whether m grows out of zero or jumps. Raises `SettingError` if there is no
    such point, `SolveError` where a solve fails. `solution` of the same setting saves one solve.
    """
    path = "finetuning.pool" if "pool" in setting.finetuning.inputs.options else "finetuning.alpha"
    unit = float(getattr(setting.finetuning.inputs, "rho", 1.0))
    known: dict[float, bool] = {}
    if solution is not None and solution.ok:
        known[math.log(float(setting.finetuning_resolved.alpha))] = abs(float(solution.overlap)) > _FOUND

    def found(log_alpha: float) -> bool:
        if log_alpha not in known:
            here = predict(replace(setting, path, math.exp(log_alpha) / unit), throw=False)
            # A solution that repels is m = 0 above the threshold.
            code = here.code("finetuning")
            if code is not Code.unstable:
                here.require_ok()
            known[log_alpha] = code is Code.unstable or abs(float(here.overlap)) > _FOUND
        return known[log_alpha]

    low = high = next(iter(known), math.log(0.3))
    while found(low) and low > math.log(0.01):
        high, low = low, low - 0.7
    while not found(high) and high < math.log(100):
        low, high = high, high + 0.7
    if found(low) or not found(high):
        side = "above" if found(low) else "below"
        raise SettingError(
            f"finetuning.alpha has no weak-recovery threshold between 0.01 and 100 (o_w {side} {_FOUND:g} throughout); "
            "allowed: settings that have one"
        )
    return math.exp(change_between(found, low, high, 0.01))


def bayes_recovery_threshold(setting: Setting) -> float:
    """alpha'_c of the Bayes-optimal estimator on the Bayes-optimal map (fresh inputs)."""
    pre, fine = setting.pretraining, setting.finetuning_resolved
    return bayes_optimal_threshold(
        fine, float(fine.delta / 2 + pre.downstream_Q0 - bayes_optimal_pretraining(pre).Q_down)
    )


def instability_threshold(setting: Setting, path: str, low: float, high: float, rtol: float = 1e-3) -> float:
    """Where along the field `path`, between `low` and `high`, replica symmetry of fine-tuning breaks: the line of de
    Almeida and Thouless, or that on which minimisers begin to jump.

    Bisection (of the logarithm) on the phase of the theory. Raises `SettingError` unless the two ends are in different
    phases, and `SolveError` where a solve fails.
    """

    @functools.cache
    def broken(log_value: float) -> bool:
        return predict(replace(setting, path, math.exp(log_value))).symmetry == "one-step broken"

    if not 0 < low < high:
        raise SettingError(f"low = {low!r}, high = {high!r} are no range; allowed: 0 < low < high")
    ends = math.log(low), math.log(high)
    if broken(ends[0]) == broken(ends[1]):
        phase = "one-step broken" if broken(ends[0]) else "replica symmetric"
        raise SettingError(f"{path} = {low:g} and {high:g} are both {phase}; allowed: a range across the line")
    return math.exp(change_between(broken, *ends, rtol))


class BranchPair(NamedTuple):
    """Both branches of fine-tuning: m, q, free energy and code of the informative and the small start."""

    m: tuple[float, float]
    q: tuple[float, float]
    free_energy: tuple[float, float]
    code: tuple[Code, Code]
    distinct: bool


def branches(solution: Solution) -> BranchPair:
    """Both branches of a solution; they are distinct where the two starts lead to different solutions."""
    b = solution.branches
    m, q, energy = ([float(v) for v in row] for row in (b.overlap, b.norm, b.free_energy))
    codes = [Code(int(c)) for c in b.code]
    return BranchPair(_pair(m), _pair(q), _pair(energy), _pair(codes), abs(abs(m[0]) - abs(m[1])) > 1e-3)


def _pair(values: list) -> Any:
    return values[0], values[1]
