"""Averages over the posterior of the update, given one label: the scalar channel of Bayes-optimal fine-tuning.

The label reveals R = P(chi* chi*^T + sqrt(Delta_eff) GOE), P = 1, or for softmax the projection orthogonal to 11^T.
With chi* = omega + sqrt(s) g and omega known, the posterior is

    weights exp(-||P(R - chi chi^T)||_F^2 / (4 Delta_eff)) on chi = omega + sqrt(s) xi, xi ~ N(0, I)

and is sampled from three laws: the prior, and Gaussians around its peak and around the image of that.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from ..math.linear import cholesky, solve_lower, solve_transposed
from ..math.quadrature import Nodes, gaussian_nodes
from ..math.symmetric import complement, to_matrix
from ..runtime.program import Program

REPLICAS = 8
_OUTER = 2**13  # nodes of all replicas
_PART = 256  # nodes of a part, which tell what is far from a solution
_PAIRS = 16  # pairs of opposite samples from each of three laws, in each of two independent sets


def averages(s, noise, normal, weight, key, tokens: int, shift: bool):
    """(E |<chi> - omega|^2 / s^2, E log Z) for some nodes: omega, g (T each), then the label noise; and the variance of
    the first, at most, were the nodes drawn at random.

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

    size, log = jax.lax.map(one, (each, omega.T, g.T, jnp.moveaxis(n, -1, 0)), batch_size=_PART)
    return jnp.sum(weight * size), jnp.sum(weight * log), jnp.sum((weight * size) ** 2)


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
        low = cholesky(eye + s / noise * (curvature + jnp.sqrt(jnp.sum(residual**2)) * eye))
        return y - solve_transposed(low, solve_lower(low, slope))

    y = jax.lax.fori_loop(0, 20, step, g)
    _, residual, curvature = parts(y)
    exact, convex = (cholesky(0.8 * (eye + s / noise * a)) for a in (curvature + residual, curvature))
    return y, jnp.where(jnp.all(jnp.isfinite(exact)), exact, convex)


def _posterior_mean(s, noise, omega, g, n, peak, low, xi, shift: bool):
    """((<chi> - omega)/sqrt(s), log Z) from samples of the prior, around the peak of the posterior, and around its
    mirror image: the posterior is even in chi but for omega."""
    t, root = len(g), jnp.sqrt(s)
    c, center = omega + root * g, 2 * omega / root  # the image of y is -y - center
    around = solve_transposed(low, xi.T).T
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


@functools.partial(Program, quick=True)
def response(log_s, noise, nodes: Nodes, tokens: int, shift: bool, count):
    """`averages` of each part of the nodes, (P,) each; NaN from part `count` on."""
    normal, weight = jnp.asarray(nodes.normal), jnp.asarray(nodes.weight)

    def one(k, out):
        key = jax.random.fold_in(jax.random.key(0), k)
        found = averages(jnp.exp(log_s), noise, normal[k], weight[k], key, tokens, shift)
        return tuple(a.at[k].set(v) for a, v in zip(out, found, strict=True))

    none = jnp.full(len(weight), jnp.nan)
    return jax.lax.fori_loop(0, count, one, (none,) * 3)


def posterior_nodes(tokens: int, shift: bool) -> Nodes:
    """Nodes of (omega, g, label noise), in parts of a replica."""
    return gaussian_nodes(2 * tokens + len(complement(tokens, shift)), _OUTER, REPLICAS, 0, part=_PART)
