"""The Bayes-optimal limit of fine-tuning on fresh inputs: the best that any estimator can do with its data.

With Delta_eff = Delta'/2 + Q0 - Q and s = 1 - q, averages over the posterior of the update (`posterior`) close the
equations

    q' = alpha' E |<chi> - omega|^2 / s^2,    q = q'/(1 + q')

Among the stable solutions the one of largest free entropy counts,

    (r - log(1 + r))/2 - r q/2 + alpha' E log E_xi exp(-||P(R - chi chi^T)||^2 / (4 Delta_eff)),    r = q/(1 - q)

The teacher of the update has rank one; the rank of the update plays no part.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ..errors import Code, SettingError, SolveError, require_float64
from ..math.roots import root_between
from ..model.activation import Activation, Custom
from ..setting.stages import Finetuning
from .posterior import REPLICAS, posterior_nodes, response

#: A few parts of the nodes tell the sign of the distance of log s from its image if that is so large, near q = 0 so
#: large a part of log s, and so many standard errors.
_CLEAR, _ERRORS = 0.3, 6
_SAME = 1e-5  # log s so near to each other share their averages; the next secant step is the square of this
_NOISELESS = 1e-12  # Delta_eff below which q no longer depends on it


class BayesFinetuning(NamedTuple):
    """`q` = E <w>.w*/D, `overlap` = sqrt(q), `effective_noise` Delta_eff, and the standard error of q."""

    q: float
    overlap: float
    effective_noise: float
    q_stderr: float


def known_shift(activation: Activation) -> bool:
    """Whether the activation hides the common shift of the label, where it is known what it hides."""
    if isinstance(activation, Custom):
        raise SettingError(
            "the Bayes-optimal limit of an activation of your own is not known; allowed: softmax and identity"
        )
    return activation.forgets_shift


def require_rank_one(fine: Finetuning) -> None:
    """A `SettingError` for a teacher of higher rank."""
    if fine.teacher_rank > 1:
        raise SettingError(
            f"finetuning.teacher_rank = {fine.teacher_rank} is too high for the Bayes-optimal limit; allowed: 1"
        )


# ---- the equation of log s -------------------------------------------------------------------------------------


class _Equation:
    """log s and its image, at one alpha' and Delta_eff; the averages at each log s are made once."""

    def __init__(self, fine: Finetuning, alpha: float, noise: float):
        t, shift = fine.tokens, known_shift(fine.activation)
        nodes = posterior_nodes(t, shift)
        self.alpha, self.noise, self.tokens = alpha, noise, t
        self._given = jnp.asarray(noise), nodes, t, shift
        self._mass = nodes.weight.sum(1)
        self.parts = len(self._mass)  # of all replicas
        self.rough = self.parts // REPLICAS  # those of one
        self._kept: dict[tuple[float, int], list[np.ndarray]] = {}

    def averages(self, log_s: float, count: int) -> list[np.ndarray]:
        """(q'/alpha', E log Z, variance of the first) of the first `count` parts, (count,) each."""
        if (log_s, count) not in self._kept:
            found = response(jnp.asarray(log_s), *self._given, jnp.asarray(count))
            self._kept[log_s, count] = [np.asarray(v)[:count] for v in found]
        return self._kept[log_s, count]

    def replicas(self, log_s: float) -> tuple[np.ndarray, np.ndarray]:
        """(q'/alpha', E log Z) of every replica, (R,) each, where all were last evaluated near this log s."""
        near = min((x for x, count in self._kept if count == self.parts), key=lambda x: abs(x - log_s), default=log_s)
        if abs(near - log_s) > _SAME:
            near = log_s
        size, log, _ = (v.reshape(REPLICAS, -1).mean(1) for v in self.averages(near, self.parts))
        return size, log

    def _image(self, log_s: float, count: int) -> tuple[float, float]:
        """Distance of log s to its image, log s = -log(1 + q'), and an error of it that is not too small."""
        size, _, square = self.averages(float(log_s), count)
        mass = np.sum(self._mass[:count])
        mean, error = self.alpha * np.sum(size) / mass, self.alpha * np.sqrt(np.sum(square)) / mass
        return -float(np.log1p(mean)) - float(log_s), float(error / (1 + mean))

    def excess(self, log_s: float, count: int | None = None) -> float:
        """Distance of log s to its image by `count` parts of the nodes, by default all."""
        return self._image(log_s, self.parts if count is None else count)[0]

    def height(self, log_s: float) -> float:
        """`excess`, of as few parts as tell its sign."""
        for count in sorted({1, self.rough}):
            rough, error = self._image(log_s, count)
            if abs(rough) > max(_CLEAR * min(1.0, -log_s), _ERRORS * error):
                return rough
        return self.excess(log_s)

    def entropy(self, log_s: float) -> float:
        """The free entropy at a solution, where r = q' and log(1 + r) = -log s."""
        q = -np.expm1(log_s)
        return (q + log_s) / 2 + self.alpha * float(np.mean(self.replicas(log_s)[1]))

    def solutions(self) -> list[float]:
        """Every stable one: there the new s passes s from above; q = 0 is one if it does so at the end."""
        # No estimator knows more than the Fisher information, q' <= alpha' T (T+1) / noise: the image is larger there.
        low = -np.log1p(self.alpha * self.tokens * (self.tokens + 1) / self.noise) - 0.5
        ends = np.log1p(-np.array([0.5, 0.3, 0.15, 0.05, 0.01, 1e-3]))
        grid = np.concatenate([np.linspace(low, ends[0], max(10, round(ends[0] - low)), endpoint=False), ends])
        heights = [self.height(x) for x in grid]
        found = [
            self._closed_in(float(a), float(b))
            for a, b, up, down in zip(grid, grid[1:], heights, heights[1:], strict=False)
            if up > 0 >= down
        ]
        return [*found, 0.0] if heights[-1] > 0 else found

    def _closed_in(self, a: float, b: float) -> float:
        """Root of `excess` between a and b by a few secant steps: from where the ends say that it is, or if not all
        nodes have been asked there, from that of one replica."""

        def rough(x):
            return self.excess(x, self.rough)

        if {(a, self.parts), (b, self.parts)} <= self._kept.keys():
            slope = (self.excess(b) - self.excess(a)) / (b - a)
            x = a - self.excess(a) / slope
        elif rough(a) > 0 >= rough(b):
            x = root_between(rough, a, b, 1e-4)
            slope = (rough(x + 1e-3) - rough(x - 1e-3)) / 2e-3
        else:
            return root_between(self.excess, a, b)
        f = self.excess(x)
        for _ in range(6):
            step = -f / slope
            if not a <= x + step <= b:
                break
            x, before = x + step, f
            if abs(step) < _SAME:
                return x
            f = self.excess(x)
            slope = (f - before) / step if f != before else slope
        return root_between(self.excess, a, b)

    def spread(self, log_s: float) -> float:
        """Standard error of log s at a solution, from the replicas."""
        h = 1e-3
        slope = (self.excess(log_s + h, self.rough) - self.excess(log_s - h, self.rough)) / (2 * h)
        images = np.log1p(self.alpha * self.replicas(log_s)[0])
        return float(np.std(images, ddof=1) / np.sqrt(REPLICAS)) / abs(slope)


# ---- what is asked for -----------------------------------------------------------------------------------------


def _checked(fine: Finetuning, effective_noise: float) -> float:
    """The noise, once stage and noise make sense. What rounding has put below zero is zero."""
    require_float64()
    require_rank_one(fine)
    fine.require("activation", "tokens")
    noise = float(effective_noise)
    if not -1e-9 <= noise < np.inf:
        raise SettingError(f"effective_noise = {noise} is out of range; allowed: effective_noise >= 0, finite")
    return max(noise, 0.0)


def bayes_optimal_finetuning(fine: Finetuning, effective_noise: float) -> BayesFinetuning:
    """Bayes-optimal limit of `fine` on fresh inputs with this Delta_eff (`lam` plays no part).

    `fine` with tokens and activation filled in (`Setting.finetuning_resolved`). Outside of JAX transformations only.
    Raises `SettingError` for an activation of one's own, which may hide more of the label than its shift, for a teacher
    of higher rank, and where a number is missing or out of range; `SolveError` where no solution can be told from the
    errors of the averages.
    """
    given = _checked(fine, effective_noise)
    equation = _Equation(fine, float(fine.alpha), max(given, _NOISELESS))
    solutions = equation.solutions()
    if not solutions:
        raise SolveError("bayes_optimal", Code.stalled, f"no q solves the equations at alpha' = {equation.alpha:g}")
    best = max(solutions, key=equation.entropy) if len(solutions) > 1 else solutions[0]
    if best == 0.0:
        return BayesFinetuning(0.0, 0.0, given, 0.0)
    q = -float(np.expm1(best))
    return BayesFinetuning(q, float(np.sqrt(q)), given, (1 - q) * equation.spread(best))


def bayes_optimal_threshold(fine: Finetuning, effective_noise: float) -> float:
    """alpha'_c of the Bayes-optimal estimator: below it q = 0 is stable, and no better than nothing.

    q' is proportional to alpha' at given q, so that alpha'_c = lim q / (q'/alpha') as q -> 0; no search is needed.
    """
    q, equation = 1e-3, _Equation(fine, 1.0, max(_checked(fine, effective_noise), _NOISELESS))
    return q / float(np.mean(equation.replicas(float(np.log1p(-q)))[0]))
