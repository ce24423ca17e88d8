"""Bayes-optimal limits: the best that any estimator can do with the pre-training, and with the fine-tuning data.

Pre-training. With the signal-to-noise of a free matrix S* observed through N = alpha D^2 noisy quadratic forms,

    delta^2 = (Delta/2 + Q0 - Q) / (alpha n_eff),   Q = Q0 - MMSE(delta^2)
    MMSE(s) = s - (4 pi^2 / 3) s^2 int rho_s(x)^3 dx,   rho_s the density of S* + sqrt(s) Z

n_eff = T (T+1) for the identity and T (T+1) - 2 for softmax, which hides the common shift of Z (arXiv:2509.24914). The
noise is inside the activation, so the label reveals Y up to that and the formula is exact. No nodes: the integral is
a spectral quadrature on each band.

Fine-tuning on fresh inputs. With Delta_eff = Delta'/2 + Q0 - Q the label reveals
R = P(chi* chi*^T + sqrt(Delta_eff) GOE), P = 1, or for softmax the projection orthogonal to 11^T. With
chi* = omega + sqrt(s) g, omega ~ N(0, (1 - s) I), s = 1 - q,

    q' = alpha' E |<chi> - omega|^2 / s^2,    q = q'/(1 + q'),
    <.>: weights exp(-||P(R - chi chi^T)||_F^2 / (4 Delta_eff)) on chi = omega + sqrt(s) xi, xi ~ N(0, I)

Among the stable solutions the one of largest free entropy counts,

    (r - log(1 + r))/2 - r q/2 + alpha' E log E_xi exp(-||P(R - chi chi^T)||^2 / (4 Delta_eff)),    r = q/(1 - q)

and the errors are those of the posterior mean of the label, E = E || sigma(Y1) - sigma(Y2) ||^2 / 2 with two
independent draws from the posterior. The teacher of the update has rank one; the rank of the update plays no part.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import brentq

from ..errors import Code, SettingError, SolveError, require_float64, succeeded
from ..evolution.test_errors import node_dimension, row_error
from ..math.fixed_point import Method, fixed_point
from ..math.quadrature import Nodes, gaussian_nodes
from ..math.symmetric import complement, to_matrix
from ..model.activation import Activation, Custom, Identity, revealed
from ..model.spectra.laws import BaseLaw, Wishart
from ..runtime.program import Program
from ..setting.stages import Finetuning, Pretraining, Setting

_SMALL = 1e-8  # delta^2 at which the noiseless problem is tested for perfect recovery


class BayesPretraining(NamedTuple):
    """`Q` = Tr(S_BO^2)/D = Tr(S_BO S*)/D, `overlap` = sqrt(Q / Q0) and `delta2`, the variance delta^2 of the
    equivalent noise on S*; `code` of the solve (`lorastate.errors.Code`). With a task all this is about S_pre;
    `Q_down` is that of the best estimate of the S* of fine-tuning (Q without a task)."""

    Q: Any
    overlap: Any
    delta2: Any
    code: Any
    Q_down: Any


def mmse(s, law: BaseLaw | Any):
    """Minimal mean square error, per D, of S of that law (a number: Wishart) observed through S + sqrt(s) Z."""
    law = law if isinstance(law, BaseLaw) else Wishart(law)
    nodes = law.band_nodes(jnp.sqrt(s), 256)
    cube = jnp.sum(nodes.w * nodes.density**2, -1)
    return s - 4 * jnp.pi**2 / 3 * s**2 * cube


def _step(x, args, _):
    law, delta, alpha, n_eff = args
    s = jnp.exp(x[0])
    return jnp.log((delta / 2 + mmse(s, law)) / (alpha * n_eff))[None]


@jax.jit
def _solve(law, delta, alpha, n_eff):
    # MMSE(s)/s falls with s. Without noise and with more samples than its limit at zero, S* is recovered exactly;
    # the map then is a translation of log s without a fixed point, and nothing is solved.
    perfect = (delta == 0) & (mmse(jnp.asarray(_SMALL), law) / _SMALL < alpha * n_eff)
    noise = jnp.where(perfect, 1.0, delta)
    start = jnp.log((noise / 2 + law.second_moment) / (alpha * n_eff))[None]
    method = Method(tolerance=1e-11, burn_in=3, require_stable=False)
    sol = fixed_point(_step, method, start, (law, noise, alpha, n_eff))
    return jnp.where(perfect, 0.0, jnp.exp(sol.x[0])), sol.code


def bayes_optimal_pretraining(pre: Pretraining) -> BayesPretraining:
    """Bayes-optimal limit of `pre` (its `lam` and `kappa` play no part); differentiable, and works under vmap.

    Noiseless labels with more samples than unknowns give Q = Q0. Raises `SettingError` for an activation of one's own
    that hides more of Y than the common shift, or may do so; inside a transformation Q is then NaN.
    """
    require_float64()
    n_eff = revealed(pre.activation, pre.tokens)
    s, code = _solve(pre.law, pre.delta, pre.alpha, n_eff)
    Q = pre.Q0 + pre.delta / 2 - pre.alpha * n_eff * s
    down = Q if pre.task is None else pre.task.best_overlap(pre.downstream_law, jnp.sqrt(jnp.maximum(s, _SMALL)))
    return BayesPretraining(Q, jnp.sqrt(Q / pre.Q0), s, code, down)


# ---- fine-tuning -----------------------------------------------------------------------------------------------


class BayesFinetuning(NamedTuple):
    """`q` = E <w>.w*/D, `overlap` = sqrt(q), `effective_noise` Delta_eff, and the standard error of q."""

    q: float
    overlap: float
    effective_noise: float
    q_stderr: float


_REPLICAS, _OUTER = 8, 2**13  # replicas, nodes of all of them
_PAIRS = 16  # pairs of opposite samples from each of three laws, in each of two independent sets
_CLEAR = 0.3  # distance of log s from its image from which on one replica tells the sign
_NOISELESS = 1e-12  # Delta_eff below which q no longer depends on it


def _posterior(s, noise, normal, weight, key, tokens: int, shift: bool):
    """(E |<chi> - omega|^2 / s^2, E log Z) for one replica of nodes: omega, g (T each), then the label noise.

    The square is the product of two independent estimates of <chi>, without the bias of a squared mean.
    """
    t, e = tokens, complement(tokens, shift)
    g, n = normal[t : 2 * t], to_matrix(e.T @ normal[2 * t : 2 * t + len(e)])
    omega = jnp.sqrt(jnp.maximum(1 - s, 0.0)) * normal[:t]
    each = jax.random.split(key, normal.shape[1])

    def one(node):
        key, omega, g, n = node
        y, low = _peak(s, noise, omega, g, n, shift)
        xi = jax.random.normal(key, (2, _PAIRS, t))
        mean, log = jax.vmap(lambda xi: _posterior_mean(s, noise, omega, g, n, y, low, xi, shift))(xi)
        return mean[0] @ mean[1] / s, jax.nn.logsumexp(log) - jnp.log(2.0)

    size, log = jax.lax.map(one, (each, omega.T, g.T, jnp.moveaxis(n, -1, 0)), batch_size=256)
    return jnp.sum(weight * size), jnp.sum(weight * log)


def _peak(s, noise, omega, g, n, shift: bool):
    """A maximum of the posterior near the teacher, as y = (chi - omega)/sqrt(s), and the Cholesky factor of a little
    less than its curvature there.

    Gauss-Newton steps, shortened by the size of the residual: they need not end at the maximum where it is no peak.
    """
    t, root, ones = len(g), jnp.sqrt(s), jnp.ones((len(g), len(g)))
    eye, c = jnp.eye(t), omega + root * g

    def parts(y):
        d, chi = root * (y - g), omega + root * y
        gap = jnp.outer(d, c) + jnp.outer(c, d) + jnp.outer(d, d)
        curvature = (chi @ chi) * eye + jnp.outer(chi, chi)
        if shift:
            gap = gap - jnp.mean(gap) * ones
            curvature = curvature - 2 * jnp.mean(chi) ** 2 * ones
        return chi, gap - jnp.sqrt(2 * noise) * n, curvature

    def step(_, y):
        chi, residual, curvature = parts(y)
        slope = y + root / noise * (residual @ chi)
        low = _cholesky(eye + s / noise * (curvature + jnp.sqrt(jnp.sum(residual**2)) * eye))
        return y - _solve_transposed(low, _solve_lower(low, slope))

    y = jax.lax.fori_loop(0, 20, step, g)
    _, residual, curvature = parts(y)
    exact, convex = (_cholesky(0.8 * (eye + s / noise * a)) for a in (curvature + residual, curvature))
    return y, jnp.where(jnp.all(jnp.isfinite(exact)), exact, convex)


def _posterior_mean(s, noise, omega, g, n, peak, low, xi, shift: bool):
    """((<chi> - omega)/sqrt(s), log Z) from samples of the prior, around the peak of the posterior, and around its
    mirror image: the posterior is even in chi but for omega."""
    t, root = len(g), jnp.sqrt(s)
    c, center = omega + root * g, 2 * omega / root  # the image of y is -y - center
    around = _solve_transposed(low, xi.T).T
    up = jnp.concatenate([peak + around, peak - around])
    y = jnp.concatenate([xi, -xi, up, -up - center])
    log_det = jnp.sum(jnp.log(jnp.diag(low)))
    prior = -jnp.sum(y * y, 1) / 2
    peaks = (log_det - jnp.sum(((x - peak) @ low) ** 2, 1) / 2 for x in (y, -y - center))
    log_mixture = jax.nn.logsumexp(jnp.stack([prior, *peaks]), 0) - jnp.log(3.0)
    # chi = +-(c + d); D = chi chi^T - c c^T enters as ||P D||^2 - 2 sqrt(2 noise) <n, D>: exact also for small noise.
    near, far = root * (y - g), -root * (y + center + g)
    d = jnp.where(jnp.sum(near**2, 1, keepdims=True) <= jnp.sum(far**2, 1, keepdims=True), near, far)
    along, size = d @ c, jnp.sum(d * d, 1)
    square = 2 * (c @ c) * size + 2 * along**2 + 4 * along * size + size**2
    if shift:
        sums = jnp.sum(d, 1)
        square = square - (2 * jnp.sum(c) * sums + sums**2) ** 2 / t**2
    cross = 2 * d @ (n @ c) + jnp.sum((d @ n) * d, 1)
    log = (2 * jnp.sqrt(2 * noise) * cross - square) / (4 * noise) + prior - log_mixture
    return jax.nn.softmax(log) @ y, jax.nn.logsumexp(log) - jnp.log(len(y))


def _cholesky(a):
    """Lower triangular L with L L^T = a, for a few rows, without LAPACK."""
    n = a.shape[0]
    low: list[list[Any]] = [[jnp.zeros(())] * n for _ in range(n)]
    for i in range(n):
        for j in range(i + 1):
            rest = a[i, j] - sum((low[i][k] * low[j][k] for k in range(j)), jnp.zeros(()))
            low[i][j] = jnp.sqrt(rest) if i == j else rest / low[j][j]
    return jnp.stack([jnp.stack(row) for row in low])


def _solve_lower(low, b):
    """x with L x = b."""
    x: list[Any] = []
    for i in range(low.shape[0]):
        x.append((b[i] - sum((low[i, k] * x[k] for k in range(i)), jnp.zeros(()))) / low[i, i])
    return jnp.stack(x)


def _solve_transposed(low, b):
    """x with L^T x = b."""
    n = low.shape[0]
    x: list[Any] = [None] * n
    for i in reversed(range(n)):
        x[i] = (b[i] - sum((low[k, i] * x[k] for k in range(i + 1, n)), jnp.zeros(()))) / low[i, i]
    return jnp.stack(x)


@Program
def _response(log_s, noise, nodes: Nodes, tokens: int, shift: bool, count):
    """`_posterior` of each replica, (R,) each; NaN from replica `count` on."""
    normal, weight = jnp.asarray(nodes.normal), jnp.asarray(nodes.weight)

    def one(r, out):
        key = jax.random.fold_in(jax.random.key(0), r)
        found = _posterior(jnp.exp(log_s), noise, normal[r], weight[r], key, tokens, shift)
        return tuple(a.at[r].set(v) for a, v in zip(out, found, strict=True))

    none = jnp.full(len(weight), jnp.nan)
    return jax.lax.fori_loop(0, count, one, (none, none))


def _nodes(tokens: int, shift: bool) -> Nodes:
    """Nodes of (omega, g, label noise)."""
    return gaussian_nodes(2 * tokens + len(complement(tokens, shift)), _OUTER, _REPLICAS, 0)


def root_between(f, a: float, b: float, xtol: float = 1e-10) -> float:
    """Root of a function that changes sign between a and b."""
    found: Any = brentq(f, a, b, xtol=xtol)
    return float(found)


def _closed_in(excess, a: float, b: float) -> float:
    """Root of `excess(x)` between a and b: that of one replica first, from there a few secant steps with all."""

    def rough(x):
        return excess(x, 1)

    if rough(a) > 0 >= rough(b):
        x = root_between(rough, a, b, 1e-6)
        f, slope = excess(x), (rough(x + 1e-3) - rough(x - 1e-3)) / 2e-3
        for _ in range(6):
            step = -f / slope
            if not a <= x + step <= b:
                break
            x, before = x + step, f
            if abs(step) < 1e-10:
                return x
            f = excess(x)
            slope = (f - before) / step if f != before else slope
    return root_between(excess, a, b)


def bayes_optimal_finetuning(fine: Finetuning, effective_noise: float) -> BayesFinetuning:
    """Bayes-optimal limit of `fine` on fresh inputs with this Delta_eff (`lam` plays no part).

    `fine` with tokens and activation filled in (`Setting.finetuning_resolved`). Outside of JAX transformations only.
    Raises `SettingError` for an activation of one's own, which may hide more of the label than its shift, and for a
    teacher of higher rank; `SolveError` where no solution can be told from the errors of the averages.
    """
    require_float64()
    _rank_one(fine)
    t, shift = fine.tokens, _shift(fine.activation)
    alpha, given = float(fine.alpha), max(float(effective_noise), 0.0)
    noise, nodes = max(given, _NOISELESS), _nodes(t, shift)

    @functools.cache
    def at(log_s: float, count: int = _REPLICAS):
        given = jnp.asarray(log_s), jnp.asarray(noise), nodes, t, shift, jnp.asarray(count)
        return [np.asarray(v)[:count] for v in _response(*given)]

    def excess(log_s: float, count: int = _REPLICAS):
        """Distance of log s to its image."""
        return -float(np.log1p(alpha * np.mean(at(float(log_s), count)[0]))) - float(log_s)

    def height(log_s):
        """`excess`, of one replica where that tells its sign."""
        rough = excess(log_s, 1)
        return rough if abs(rough) > _CLEAR else excess(log_s)

    # No estimator knows more than the Fisher information, q' <= alpha' T (T+1) / noise: the image is larger there.
    low = -np.log1p(alpha * t * (t + 1) / noise) - 0.5
    ends = np.log1p(-np.array([0.5, 0.3, 0.15, 0.05, 0.01, 1e-3]))
    grid = np.concatenate([np.linspace(low, ends[0], max(10, round(ends[0] - low)), endpoint=False), ends])
    heights = [height(x) for x in grid[:-1]] + [excess(grid[-1])]
    # A stable solution is where the new s passes s from above; q = 0 is one if it does so at the end.
    solutions = [
        _closed_in(excess, float(a), float(b))
        for a, b, up, down in zip(grid, grid[1:], heights, heights[1:], strict=False)
        if up > 0 >= down
    ]
    if heights[-1] > 0:
        solutions.append(0.0)
    if not solutions:
        raise SolveError("bayes_optimal", Code.stalled, f"no q solves the equations at alpha' = {alpha:g}")

    def entropy(log_s):
        q = -np.expm1(log_s)
        return (q + log_s) / 2 + alpha * float(np.mean(at(log_s)[1]))

    best = max(solutions, key=entropy) if len(solutions) > 1 else solutions[0]
    if best == 0.0:
        return BayesFinetuning(0.0, 0.0, given, 0.0)
    q, h = -float(np.expm1(best)), 1e-3
    slope = (excess(best + h, 1) - excess(best - h, 1)) / (2 * h)
    images = np.log1p(alpha * at(best)[0])
    spread = float(np.std(images, ddof=1) / np.sqrt(_REPLICAS)) / abs(slope)
    return BayesFinetuning(q, float(np.sqrt(q)), given, (1 - q) * spread)


def weak_recovery_threshold(fine: Finetuning, effective_noise: float) -> float:
    """alpha'_c of the Bayes-optimal estimator: below it q = 0 is stable, and no better than nothing.

    q' is proportional to alpha' at given q, so that alpha'_c = lim q / (q'/alpha') as q -> 0; no search is needed.
    """
    require_float64()
    _rank_one(fine)
    t, shift, q = fine.tokens, _shift(fine.activation), 1e-3
    noise = max(float(effective_noise), _NOISELESS)
    given = jnp.asarray(np.log1p(-q)), jnp.asarray(noise), _nodes(t, shift), t, shift, jnp.asarray(_REPLICAS)
    return q / float(np.mean(_response(*given)[0]))


def _shift(activation: Activation) -> bool:
    if isinstance(activation, Custom):
        raise SettingError(
            "the Bayes-optimal limit of an activation of your own is not known; allowed: softmax and identity"
        )
    return activation.forgets_shift


def _rank_one(fine: Finetuning) -> None:
    if fine.teacher_rank > 1:
        raise SettingError(
            f"finetuning.teacher_rank = {fine.teacher_rank} is too high for the Bayes-optimal limit; allowed: 1"
        )


# ---- errors ----------------------------------------------------------------------------------------------------


@functools.partial(Program, quick=True)
def _posterior_error(activation: Activation, norm, noise, q, nodes: Nodes, tokens: int, lora: bool):
    """E || sigma(Y1) - sigma(Y2) ||^2 / 2 of every replica: Y = Z + sqrt(noise) GOE + chi chi^T given Z and omega."""
    fields = (norm + noise, norm, norm + noise)

    def one(n):
        x, weight = n
        chi, other = (x[0], q * x[0] + jnp.sqrt(jnp.maximum(1 - q**2, 0.0)) * x[1]) if lora else (0.0, 0.0)
        sizes = (chi**2, other**2)
        return row_error(activation, tokens, fields, (sizes[0], q * chi * other, sizes[1]), sizes, x[2:], weight) / 2

    return jax.lax.map(one, (jnp.asarray(nodes.normal), jnp.asarray(nodes.weight)))


def _error(activation, tokens, norm, noise, q=None) -> tuple[float, float]:
    """(error, its standard error) for a map of size `norm`; `q` of fine-tuning, None for pre-training."""
    if isinstance(activation, Identity):
        lora = 0.0 if q is None else 1 - q**2
        return (1 + 1 / tokens) * (noise + lora), 0.0
    lora = q is not None
    nodes = gaussian_nodes(node_dimension(activation, tokens), 2**17, _REPLICAS, 2)
    given = (jnp.asarray(v) for v in (norm, noise, q if lora else 0.0))
    values = np.asarray(_posterior_error(activation, *given, nodes, tokens, lora))
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(_REPLICAS))


class BayesLimits(NamedTuple):
    """{"pretraining": Q, overlap, test_error} and {"finetuning": q, overlap, test_error, effective_noise}, on fresh
    inputs with noisy labels; and the quadrature standard errors under the same names."""

    pretraining: dict[str, float]
    finetuning: dict[str, float]
    errors: dict[str, dict[str, float]]

    def summary(self) -> dict[str, dict[str, float]]:
        """Plain numbers for JSON."""
        return {"pretraining": dict(self.pretraining), "finetuning": dict(self.finetuning)}


def bayes_optimal(setting: Setting) -> BayesLimits:
    """Bayes-optimal limits of both stages, E_BO and E'_BO included: below every trained model on fresh inputs.

    Raises `SettingError` for activations of one's own and for a teacher of the update whose rank is above one, and
    `SolveError` if pre-training cannot be solved.
    """
    pre, fine = setting.pretraining, setting.finetuning_resolved
    _rank_one(fine)
    for stage in (pre, fine):
        _shift(stage.activation)
    best = bayes_optimal_pretraining(pre)
    if not succeeded(best.code):
        raise SolveError("bayes_optimal", Code(int(best.code)))
    Q, Q0 = float(best.Q), float(pre.Q0)
    error, bar = _error(pre.activation, pre.tokens, Q, float(pre.delta) / 2 + Q0 - Q)
    down = float(best.Q_down)
    noise = float(fine.delta) / 2 + float(pre.downstream_Q0) - down
    lora = bayes_optimal_finetuning(fine, noise)
    below, lora_bar = _error(fine.activation, fine.tokens, down, max(noise, 0.0), lora.q)
    if lora.q_stderr:  # what the error of q does to E'
        shifted, _ = _error(fine.activation, fine.tokens, down, noise, lora.q - min(lora.q_stderr, lora.q))
        lora_bar = float(np.hypot(lora_bar, shifted - below))
    return BayesLimits(
        {"Q": Q, "overlap": float(best.overlap), "test_error": error},
        {"q": lora.q, "overlap": lora.overlap, "test_error": below, "effective_noise": noise},
        {"pretraining": {"test_error": bar}, "finetuning": {"q": lora.q_stderr, "test_error": lora_bar}},
    )
