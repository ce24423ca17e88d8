"""Thresholds: where fine-tuning starts to recover w*, where its branches cross, where pre-training can interpolate.

    alpha'_c       m = 0 is always a fixed point; d m_out / d m there grows with alpha' and passes one at alpha'_c
    alpha_interp   J_1(d, 0) / (2 d n_eff),  d from  Q0 + Delta/2 = J(d, 0) - (d/2) J_1(d, 0),  J_1 = dJ/d delta

All are roots found on the host. Source: arXiv:2606.05899, arXiv:2509.24914.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import finetuning as ft
from . import theory
from .bayes import bayes_optimal_pretraining, root_between
from .bayes import weak_recovery_threshold as bayes_threshold
from .errors import Code, SettingError, SolveError, require_float64, succeeded
from .fixed_point import Method, Stage, iterate
from .order import Order, from_norm
from .program import Program
from .quadrature import Slots
from .setting import Pretraining, Setting
from .setting_file import replace
from .solution import Solution, predict


def interpolation_threshold(pre: Pretraining) -> float:
    """alpha_interp: as lam -> 0 the training loss of pre-training vanishes below it, and V grows without bound.

    n_eff = T (T+1), or T (T+1) - 2 for softmax, which forgets the common shift. Infinite where there is no solution.
    """
    require_float64()
    law, size = pre.law, float(pre.label_size)

    def slope(d):
        return jax.grad(lambda x: law.J(x, jnp.zeros(())))(d)

    def excess(log_d):
        d = jnp.exp(log_d)
        return float(law.J(d, jnp.zeros(())) - d / 2 * slope(d)) - size

    # J - (d/2) J_1 = E[lambda_+ S*] is Q0 at d = 0 and grows with d.
    low, high = np.log(1e-4), np.log(1e4)
    if excess(low) > 0:
        return float("inf")
    d = jnp.exp(root_between(excess, low, high))
    n_eff = pre.tokens * (pre.tokens + 1) - (2 if pre.activation.forgets_shift else 0)
    return float(slope(d)) / (2 * float(d) * n_eff)


def _at_rest(fine, frozen, numerics, nodes, levels: int):
    """The fixed point with m = 0, and d m_out / d m there."""
    fine, frozen = jax.lax.stop_gradient((fine, frozen))
    nodes = ft.prepare(fine, frozen, nodes)
    method = Method(tolerance=1e-5 if levels else 1e-7, max_steps=numerics.max_steps, floor=5e-3, require_stable=False)
    start = ft.start_at_rest(fine)
    start = ft.without_overlap(fine, ft.broken_start(fine, start)) if levels else start
    stage = Stage.of(method, len(nodes.weight))._replace(hold=True)
    memory, n = Slots.of(ft.no_memory(fine, nodes, levels)), len(start)
    fmap = ft.state_evolution(fine, frozen, nodes, levels)
    point, jacobian, _ = iterate(fmap, stage, False, start, jnp.zeros((n, n)), memory)
    place = 1 + ft.spare(fine)  # of m among the coordinates
    return point, jacobian[place, place]


_solve_at_rest = Program(_at_rest, quick=True)


def recovery_slope(setting: Setting, solution: Solution | None = None) -> float:
    """d m_out / d m at the fixed point m = 0: above one w* is found from any start, below one m = 0 is stable.

    With one step of symmetry breaking where the setting, or `numerics.symmetry`, needs it; y is held there.
    """
    fine = setting.finetuning_resolved
    first = solution or predict(setting, throw=False)
    nodes = theory.node_sets(setting.pretraining, fine, setting.numerics)
    levels = int(setting.numerics.symmetry == "1rsb" or bool(first.finetuning["broken"]))
    if levels:
        nodes = theory.with_broken(nodes, fine, setting.numerics)
    given = fine, frozen_map(first, setting), setting.numerics.without_seed
    point, slope = _solve_at_rest(*given, nodes.broken if levels else nodes.finetuning, levels)
    if not bool(succeeded(point.code)):
        raise SolveError("finetuning at m = 0", Code(int(point.code)), f"alpha = {float(fine.alpha):g}")
    return float(slope)


def order_of(solution: Solution, stage: str) -> Order:
    """The order parameters of one stage."""
    p = getattr(solution, stage)
    if stage == "pretraining":
        return from_norm(p["V"], p["M"], p["Q"], solution.setting.pretraining.label_size)
    return theory.lora_order(p)


def frozen_map(solution: Solution, setting: Setting | None = None):
    """The frozen map of a solution, as the fine-tuning inputs of `setting` (default: its own) see it."""
    setting = setting or solution.setting
    pre = setting.pretraining
    if not bool(succeeded(solution.status["pretraining"]["code"])):
        raise SolveError("pretraining", Code(int(solution.status["pretraining"]["code"])))
    down = solution.pretraining["M_down"]
    return setting.finetuning_resolved.inputs.freeze(pre, order_of(solution, "pretraining"), down)


def weak_recovery_threshold(setting: Setting, solution: Solution | None = None) -> float:
    """alpha'_c of the trained update: the number of samples (per D) from which m = 0 is unstable.

    Found by root finding on `recovery_slope` over alpha' (over the pool, on selected inputs) between 0.01 and 100.
    Raises `SettingError` if the root is not in that range. `solution` of the same setting saves one solve.
    """
    first = solution or predict(setting, throw=False)
    path = "finetuning.pool" if "pool" in setting.finetuning.inputs.options else "finetuning.alpha"
    unit = float(getattr(setting.finetuning.inputs, "rho", 1.0))

    def excess(log_alpha):
        return np.log(max(recovery_slope(replace(setting, path, float(np.exp(log_alpha)) / unit), first), 1e-12))

    # The slope grows with alpha': step outwards from the guess n_eff alpha' ~ 1 until it passes one.
    low = high = np.log(0.3)
    below = above = excess(low)
    while below > 0 and low > np.log(0.01):
        high, above = low, below
        low -= 0.7
        below = excess(low)
    while above < 0 and high < np.log(100):
        low, below = high, above
        high += 0.7
        above = excess(high)
    if below > 0 or above < 0:
        raise SettingError(
            f"finetuning.alpha has no weak-recovery threshold between 0.01 and 100 (slope {np.exp(below):.3g} at "
            f"{np.exp(low):.3g}); allowed: settings that have one"
        )
    return float(np.exp(root_between(excess, low, high, xtol=1e-4)))


def bayes_recovery_threshold(setting: Setting) -> float:
    """alpha'_c of the Bayes-optimal estimator on the Bayes-optimal map (fresh inputs)."""
    pre, fine = setting.pretraining, setting.finetuning_resolved
    return bayes_threshold(fine, float(fine.delta / 2 + pre.downstream_Q0 - bayes_optimal_pretraining(pre).Q_down))


def instability_threshold(setting: Setting, path: str, low: float, high: float, rtol: float = 1e-3) -> float:
    """Where along the field `path`, between `low` and `high`, replica symmetry of fine-tuning breaks: the line of de
    Almeida and Thouless, or that on which minimisers begin to jump.

    Bisection (of the logarithm) on the phase of the theory. Raises `SettingError` unless the two ends are in different
    phases, and `SolveError` where a solve fails.
    """

    def broken(value: float) -> bool:
        return predict(replace(setting, path, value)).symmetry == "one-step broken"

    if not 0 < low < high:
        raise SettingError(f"low = {low!r}, high = {high!r} are no range; allowed: 0 < low < high")
    first = broken(low)
    if first == broken(high):
        phase = "one-step broken" if first else "replica symmetric"
        raise SettingError(f"{path} = {low:g} and {high:g} are both {phase}; allowed: a range across the line")
    a, b = np.log(low), np.log(high)
    while b - a > rtol:
        middle = (a + b) / 2
        a, b = (middle, b) if broken(float(np.exp(middle))) == first else (a, middle)
    return float(np.exp((a + b) / 2))


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


def branch_crossing(setting: Setting, alphas: Any = None) -> float | None:
    """alpha' at which the free energies of two coexisting branches cross; None where they never coexist.

    Looks on `alphas` (default: 9 values from 0.05 to 3), then closes in by root finding.
    """
    grid = np.geomspace(0.05, 3.0, 9) if alphas is None else np.asarray(alphas)

    def difference(alpha):
        pair = branches(predict(replace(setting, "finetuning.alpha", float(alpha)), throw=False))
        return pair.free_energy[0] - pair.free_energy[1] if pair.distinct else np.nan

    found = [(a, difference(a)) for a in grid]
    both = [(a, d) for a, d in found if np.isfinite(d)]
    for (a, up), (b, down) in itertools.pairwise(both):
        if up * down < 0:
            return root_between(lambda x: float(np.nan_to_num(difference(x))), a, b, xtol=1e-3)
    return None
