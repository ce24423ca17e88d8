"""Bayes-optimal limits of both stages: the overlaps, and the test errors that no estimator can go below.

The errors are those of the posterior mean of the label, E = E || sigma(Y1) - sigma(Y2) ||^2 / 2 with two independent
draws from the posterior.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import Code, SolveError, succeeded
from ..evolution.test_errors import node_dimension, row_error
from ..math.quadrature import Nodes, gaussian_nodes
from ..model.activation import Activation, Identity
from ..runtime.program import Program
from ..setting.stages import Setting
from .finetuning import bayes_optimal_finetuning, known_shift, require_rank_one
from .posterior import REPLICAS
from .pretraining import bayes_optimal_pretraining


@functools.partial(Program, quick=True)
def _posterior_error(activation: Activation, norm, noise, q, nodes: Nodes, tokens: int, lora: bool, count):
    """E || sigma(Y1) - sigma(Y2) ||^2 / 2 of every replica, NaN from replica `count` on: Y = Z + sqrt(noise) GOE +
    chi chi^T given Z and omega."""
    fields = (norm + noise, norm, norm + noise)

    normal, weights = jnp.asarray(nodes.normal), jnp.asarray(nodes.weight)

    def one(r, out):
        x, weight = normal[r], weights[r]
        none = jnp.zeros_like(weight)
        chi, other = (x[0], q * x[0] + jnp.sqrt(jnp.maximum(1 - q**2, 0.0)) * x[1]) if lora else (none, none)
        sizes = (chi**2, other**2)
        products = sizes[0], q * chi * other, sizes[1]
        return out.at[r].set(row_error(activation, tokens, fields, products, sizes, x[2:], weight) / 2)

    return jax.lax.fori_loop(0, count, one, jnp.full(len(weights), jnp.nan))


def _error(activation, tokens, norm, noise, q=None, q_stderr: float = 0.0) -> tuple[float, float]:
    """(error, its standard error, with what that of q does to it) for a map of size `norm`; `q` of fine-tuning, None
    for pre-training."""

    def exact(q):
        return (1 + 1 / tokens) * (noise + (0.0 if q is None else 1 - q**2))

    def at(q, count):
        given = (jnp.asarray(v) for v in (norm, noise, q if lora else 0.0))
        return np.asarray(_posterior_error(activation, *given, nodes, tokens, lora, jnp.asarray(count)))[:count]

    lora, lower = q is not None, None if q is None else max(q - q_stderr, 0.0)
    if isinstance(activation, Identity):
        return exact(q), abs(exact(lower) - exact(q))
    nodes = gaussian_nodes(node_dimension(activation, tokens), 2**17, REPLICAS, 2)
    values = at(q, REPLICAS)
    moved = float(at(lower, 1)[0] - values[0]) if q_stderr else 0.0
    return float(values.mean()), float(np.hypot(values.std(ddof=1) / np.sqrt(REPLICAS), moved))


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
    require_rank_one(fine)
    for stage in (pre, fine):
        known_shift(stage.activation)
    best = jax.device_get(bayes_optimal_pretraining(pre))
    if not succeeded(best.code):
        raise SolveError("bayes_optimal", Code(int(best.code)))
    Q, Q0 = float(best.Q), float(pre.Q0)
    error, bar = _error(pre.activation, pre.tokens, Q, float(pre.delta) / 2 + Q0 - Q)
    down = float(best.Q_down)
    noise = float(fine.delta) / 2 + float(pre.downstream_Q0) - down
    lora = bayes_optimal_finetuning(fine, noise)
    below, lora_bar = _error(fine.activation, fine.tokens, down, max(noise, 0.0), lora.q, lora.q_stderr)
    return BayesLimits(
        {"Q": Q, "overlap": float(best.overlap), "test_error": error},
        {"q": lora.q, "overlap": lora.overlap, "test_error": below, "effective_noise": noise},
        {"pretraining": {"test_error": bar}, "finetuning": {"q": lora.q_stderr, "test_error": lora_bar}},
    )
