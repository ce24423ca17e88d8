"""Laws of the pre-activations, on test and on training inputs: samples of them.

    test    (Z*, Z_W) Gaussian, covariance [[Q0, M], [M, Q]] x (1 + delta_ab);  (chi*, chi) Gaussian, [[q0, m], [m, q]]
    train   pre-training: Z_W = argmin of the inner problem at (Y, Omega); fine-tuning: chi = argmin at (Y0, Z_W, omega)

A training input has been seen: its pre-activation is pulled from the test law towards the label. arXiv:2606.05899.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..errors import SettingError
from ..evolution import finetuning as ft
from ..evolution.order import Order, matched
from ..math.quadrature import Nodes
from ..math.symmetric import dimension
from ..model import proximal as prox
from ..model.channel.fields import standard_fields
from ..model.channel.frozen_map import learned_map
from ..model.channel.inputs import Fresh, Reused
from ..setting.stages import Finetuning
from ..solution.solution import Solution
from .thresholds import frozen_map, order_of

_KINDS = ("test", "train")


def sample_pretraining(
    solution: Solution, inputs: str = "test", samples: int = 10_000, seed: int = 0
) -> dict[str, Float[Array, "T T samples"]]:
    """Samples (T, T, samples) of label `Y` (noise included) and map `Z_W` on test or training inputs.

    On test inputs also the clean label `Z_star`. Raises `SettingError` for an unknown kind of inputs.
    """
    _check(inputs)
    pre, order = solution.setting.pretraining, order_of(solution, "pretraining")
    t, key = pre.tokens, jax.random.key(seed)
    if inputs == "test":
        clean, other, noise = standard_fields(_normal(key, 3 * dimension(t), samples), t, False, 3)
        z = jnp.sqrt(pre.Q0) * clean
        norm = order.norm(pre.label_size)
        zw = order.overlap / pre.Q0 * z + jnp.sqrt(jnp.maximum(norm - order.overlap**2 / pre.Q0, 0.0)) * other
        return {"Y": z + jnp.sqrt(pre.delta / 2) * noise, "Z_star": z, "Z_W": zw}
    # Training inputs of pre-training are those that a fine-tuning on reused inputs sees.
    reused, frozen = Reused("same"), learned_map(pre, order)
    x = _normal(key, reused.dimension(t, False), samples)
    y, zw = reused.fields(
        frozen, pre.delta, t, False, x, jax.jit(reused.search, static_argnums=(1, 2))(frozen, t, False, x)
    )
    return {"Y": y, "Z_W": zw}


def sample_finetuning(
    solution: Solution, inputs: str = "test", samples: int = 10_000, seed: int = 0
) -> dict[str, Float[Array, "*T samples"]]:
    """Samples of `chi_star`, `chi` (T, samples), `Y0`, `Z_W` (T, T, samples; recalibrated) on test or training inputs.

    Training inputs are those of the setting (fresh, reused, ...); samples of a mixture carry `weight` (samples,).
    """
    _check(inputs)
    fine, order = solution.setting.finetuning_resolved, order_of(solution, "finetuning")
    t, frozen, key = fine.tokens, frozen_map(solution), jax.random.key(seed)
    if inputs == "test":
        b = fine.scale(frozen)
        clean = Finetuning(
            fine.alpha, fine.lam, fine.delta, fine.activation, t, Fresh(),
            recalibration=b, rank=fine.rank, teacher_rank=fine.teacher_rank,
        )  # fmt: skip
        x = _normal(key, ft.node_dimension(clean), samples)
        d = ft.draws(clean, frozen, Nodes(x, jnp.full(samples, 1 / samples)))
        return {"chi_star": d.teacher, "chi": ft.student(order.merged, d), "Y0": d.fields.y0, "Z_W": d.fields.zw}
    half = -(-samples // 2)
    x = np.array(_normal(key, ft.node_dimension(fine), half))
    flip = np.ones((len(x), 1))
    flip[slice(*ft.mirrored(fine))] = -1.0
    x = np.concatenate([x, flip * x], 1)
    nodes = Nodes(jnp.asarray(x), jnp.full(2 * half, 0.5 / half))
    d = ft.draws(fine, frozen, ft.refresh_nodes(fine, frozen, nodes))
    chi = _in_a_minimum(fine, order, d, jax.random.fold_in(key, 1))
    return {"chi_star": d.teacher, "chi": chi, "Y0": d.fields.y0, "Z_W": d.fields.zw, "weight": d.weight}


#: Minima that are looked at for a sample where symmetry is broken.
_MINIMA = 32


def _in_a_minimum(fine: Finetuning, order: Order, d: ft.Draws, key):
    """chi (r T, N) at the draws, in one minimum: where symmetry is broken one of several, drawn with its weight
    exp(-y f)."""
    many, n = _MINIMA if order.levels else 1, d.weight.shape[-1]
    z = _normal(key, len(d.noise) * many, n).reshape(len(d.noise), many, n)
    d = d._replace(inner=(z,) * order.levels)
    problem = ft.sampled_problem(fine, order, d)
    guess = jnp.tile(matched(d.teacher, len(d.noise)), (1, many))
    axes = [s * 2.0 * e[:, None] * jnp.ones_like(guess) for e in jnp.eye(len(guess)) for s in (1, -1)]
    chi = jax.jit(prox.locate_lowest)(problem, [problem.omega, guess, -guess, *axes])
    if not order.levels:
        return chi
    depth = problem.terms(chi)[0].reshape(many, n)
    index = jax.random.categorical(jax.random.fold_in(key, 1), -order.breaking[0] * depth, axis=0)
    return jnp.take_along_axis(chi.reshape(-1, many, n), index[None, None], 1)[:, 0]


def _normal(key, rows: int, columns: int):
    return jax.random.normal(key, (rows, columns))


def _check(inputs: str) -> None:
    if inputs not in _KINDS:
        raise SettingError(f"inputs = {inputs!r} is unknown; allowed: {', '.join(_KINDS)}")
