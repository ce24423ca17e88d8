"""The Bayes-optimal limit of pre-training: the best that any estimator can do with its data.

With the signal-to-noise of a free matrix S* observed through N = alpha D^2 noisy quadratic forms,

    delta^2 = (Delta/2 + Q0 - Q) / (alpha n_eff),   Q = Q0 - MMSE(delta^2)
    MMSE(s) = s - (4 pi^2 / 3) s^2 int rho_s(x)^3 dx,   rho_s the density of S* + sqrt(s) Z

n_eff = T (T+1) for the identity and T (T+1) - 2 for softmax, which hides the common shift of Z (arXiv:2509.24914). The
noise is inside the activation, so the label reveals Y up to that and the formula is exact. No nodes: the integral is
a spectral quadrature on each band.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..errors import Code, require_float64, succeeded
from ..math.implicit import attach
from ..math.roots import falling_root
from ..model.activation import revealed
from ..model.spectra.base import BaseLaw
from ..model.spectra.laws import Wishart
from ..runtime.program import Program
from ..setting.stages import Pretraining

_TOLERANCE = 1e-11  # of log delta^2
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


@functools.partial(Program, quick=True)
def _solved(pre: Pretraining, n_eff) -> BayesPretraining:
    s, code = _solve(pre.law, pre.delta, pre.alpha, n_eff)
    s = jnp.where(succeeded(code), s, jnp.nan)
    Q = pre.Q0 + pre.delta / 2 - pre.alpha * n_eff * s
    down = Q if pre.task is None else pre.task.best_overlap(pre.downstream_law, jnp.sqrt(jnp.maximum(s, _SMALL)))
    return BayesPretraining(Q, jnp.sqrt(Q / pre.Q0), s, code, down)


def _solve(law, delta, alpha, n_eff):
    # MMSE(s)/s falls with s. Without noise and with more samples than its limit at zero, S* is recovered exactly;
    # the map then is a translation of log s without a fixed point, and nothing is solved.
    perfect = (delta == 0) & (mmse(jnp.asarray(_SMALL), law) / _SMALL < alpha * n_eff)
    noise = jnp.where(perfect, 1.0, delta)
    # MMSE lies between zero and the second moment.
    args = law, noise, alpha, n_eff
    high = jnp.log((noise / 2 + law.second_moment) / (alpha * n_eff))
    low = jnp.where(noise > 0, jnp.log(noise / 2 / (alpha * n_eff)), jnp.log(_SMALL))
    still, low, high = jax.lax.stop_gradient((args, low, high))
    x, rest = falling_root(lambda x: _step(x[None], still, None)[0] - x, low, high, _TOLERANCE)
    code = jnp.where(jnp.abs(rest) <= _TOLERANCE, int(Code.ok), int(Code.stalled))
    return jnp.where(perfect, 0.0, jnp.exp(attach(_step, 0, x[None], args, None)[0])), code


def bayes_optimal_pretraining(pre: Pretraining) -> BayesPretraining:
    """Bayes-optimal limit of `pre` (its `lam` and `kappa` play no part); differentiable, and works under vmap.

    Noiseless labels with more samples than unknowns give Q = Q0. Where the solve failed all is NaN. Raises
    `SettingError` for an activation of one's own that hides more of Y than the common shift, or may do so; inside a
    transformation Q is then NaN.
    """
    require_float64()
    return _solved(pre, revealed(pre.activation, pre.tokens))
