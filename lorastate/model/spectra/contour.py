"""Integrals of mu_delta above eps, J and the spectral mass, as contour integrals in the subordination variable.

z and G_A are analytic above the real axis, so integrals over mu_delta above eps are contour integrals from
``u_e = u(eps + i0)`` to any real point right of all singularities: spectral accuracy, also where poles meet. The
integrand of J vanishes to third order at u_e: u_e and the contour are constants under differentiation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from .elementwise import limit, prepare
from .rules import gauss_legendre
from .subordination import Form, Point, evaluate, free_variance, lifted, locate, moving

_NODES = 72  # Gauss-Legendre nodes on the contour


def _sides(form: Form, u: Array, g: Array) -> tuple[Array, Array]:
    """Whether u is real and left, real and right of every singularity."""
    low, high = form.law.cover(form.factor)
    plain = (jnp.imag(u) == 0) & jnp.all(form.c * jnp.real(g)[..., None] < jnp.sqrt(form.kappa), -1)
    return plain & (jnp.real(u) < jnp.min(low)), plain & (jnp.real(u) > jnp.max(high))


def _contour(form: Form, delta: Array, u: Array, p: Point) -> tuple[Array, Array]:
    """Nodes and weights, (..., n), of an arc above the axis from u to a real point right of all singularities.

    A half circle over the chord, graded towards u, whose nearest singularity is at distance d: uniform accuracy in d.
    `p`: what z(u) is made of.
    """
    form, delta = lax.stop_gradient((form, delta))
    low, high = form.law.cover(form.factor)
    ends = jnp.concatenate([low, high])
    pole = jnp.abs(jnp.sqrt(form.kappa) - form.c * p.g[..., None]) / jnp.abs(form.c * p.dg[..., None])
    d = jnp.minimum(jnp.min(jnp.abs(u[..., None] - ends), -1), jnp.min(pole, -1, initial=jnp.inf))
    last = jnp.max(high) + jnp.max(form.c / jnp.sqrt(form.kappa), initial=0.0)
    reach = jnp.maximum(last - jnp.real(u), 0.0) + jnp.sqrt(free_variance(form, delta))
    stop = jnp.maximum(jnp.real(u), last) + reach
    grade = jnp.log1p(2 * reach / jnp.maximum(d, 1e-14 * reach))[..., None]
    node, weight = (jnp.asarray(w, d.dtype) for w in gauss_legendre(_NODES))
    t = jnp.expm1(grade * node) / jnp.expm1(grade)
    dt = weight * grade * jnp.exp(grade * node) / jnp.expm1(grade)
    chord, turn = (stop - u)[..., None], 1 / lax.complex(1 - t, t)
    return u[..., None] + 1j * t * turn * chord, 1j * dt * turn * turn * chord


class _Tail(NamedTuple):
    """``int_{x > eps} (x - eps)^k mu_delta(dx)``; whether eps is left, right of the support."""

    moment: Array
    left: Array
    right: Array


def _tail(form: Form, delta: Array, eps: Array, u: Array, power: int) -> _Tail:
    """``Im int (z - eps)^(k+1) G_A'(u) du / ((k+1) pi)`` from u = u_e; of no use, but finite, off the support."""
    p = evaluate(*lax.stop_gradient((form, delta, u)))
    left, right = _sides(*lax.stop_gradient((form, u)), p.g)
    # On either side the contour is replaced by a harmless one: its derivatives must be finite.
    begin = jnp.where(left | right, lifted(form, delta, u), u)
    node, weight = _contour(form, delta, begin, p)
    p = evaluate(form, delta[..., None], node)
    f = (node + p.r - eps[..., None]) ** (power + 1) * p.dg
    return _Tail(jnp.sum(jnp.imag(weight * f), -1) / ((power + 1) * jnp.pi), left, right)


@jax.jit
def J(law: Any, delta: ArrayLike, eps: ArrayLike) -> Array:
    """``J(delta, eps) = int_{x > eps} (x - eps)^2 mu_delta(dx)``."""
    delta, eps = prepare(delta, eps)
    delta = limit(delta)
    form = law.form()
    tail = _tail(form, delta, eps, lax.stop_gradient(locate(form, eps, delta)), 2)
    whole = (law.mean - eps) ** 2 + law.variance + delta**2
    return jnp.where(tail.left, whole, jnp.where(tail.right, 0.0, tail.moment))


def _above(form: Form, eps: Array, delta: Array, u: Array) -> Array:
    """``mu_delta((eps, inf))``, from u = u_e."""
    tail = _tail(form, delta, eps, u, 0)
    return jnp.where(tail.left, 1.0, jnp.where(tail.right, 0.0, tail.moment))


@jax.custom_jvp
def mass(form: Form, eps: Array, delta: Array, u: Array) -> Array:
    """``F_delta(eps) = mu_delta((-inf, eps])``, differentiable to any order, from u = u_e as `locate` finds it."""
    return jnp.clip(1 - _above(form, eps, delta, u), 0, 1)


@mass.defjvp
def _mass_jvp(primals, tangents):
    # The integrand vanishes at u_e: explicit partials only. Taking them on a contour from the differentiable u_e makes
    # the second and higher derivatives right too.
    *given, located = primals
    u = moving(*primals)
    _, dtail = jax.jvp(lambda f, e, d: _above(f, e, d, u), tuple(given), tuple(tangents[:3]))
    return mass(*given, located), -dtail


@jax.jit
def mass_below(law: Any, eps: ArrayLike, delta: ArrayLike) -> Array:
    """`mass` of a law."""
    eps, delta = prepare(eps, delta)
    delta = limit(delta)
    form = law.form()
    return mass(form, eps, delta, locate(form, eps, delta))
