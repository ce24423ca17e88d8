"""The inner minimisation (proximal step) at every quadrature node, and its implicit derivative.

Both stages minimise, node by node, a smooth function of a few unknowns u in R^n:

    pre-training   u = coordinates of Z in Sym_T :  ||sigma(Z) - t||^2 + ||Z - Omega||_F^2 / (4 V)
    fine-tuning    u = chi in R^T                :  ||sigma(Z_W + chi chi^T) - t||^2 + ||chi - omega||^2 / (2 v)

A `terms(u, params) -> (f, g, H)` function describes the problem; arrays are node-last.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .activation import Activation
from .symmetric import hessian_to_coordinates, to_coordinates, to_matrix


class MapProblem(NamedTuple):
    """Pre-training proximal step: nodes `omega`, `target` (T, T, N), response `V`."""

    activation: Activation
    omega: Any
    target: Any
    V: Any

    def take(self, index):
        """The same problem on a subset of the nodes."""
        return self._replace(omega=self.omega[..., index], target=self.target[..., index])

    def terms(self, u):
        f, g, h = self.activation.loss_terms(to_matrix(u), self.target)
        d = u - to_coordinates(self.omega)
        n = u.shape[0]
        hess = hessian_to_coordinates(h) + jnp.eye(n)[:, :, None] / (2 * self.V)
        return f + jnp.sum(d * d, 0) / (4 * self.V), to_coordinates(g) + d / (2 * self.V), hess


class VectorProblem(NamedTuple):
    """Fine-tuning proximal step: frozen `zw`, `target` (T, T, N), `omega` (T, N), response `v`."""

    activation: Activation
    zw: Any
    omega: Any
    target: Any
    v: Any

    def take(self, index):
        """The same problem on a subset of the nodes."""
        return self._replace(zw=self.zw[..., index], omega=self.omega[..., index], target=self.target[..., index])

    def terms(self, u):
        f, g, h = self.activation.loss_terms(self.zw + u[:, None] * u[None, :], self.target)
        s = g + jnp.swapaxes(g, 0, 1)
        d = u - self.omega
        grad = jnp.sum(s * u[None], 1) + d / self.v
        eye = jnp.eye(u.shape[0])[:, :, None]
        # dZ_ab = du_a u_b + u_a du_b, so a row Hessian H_a enters as u^T H_a u, u_a H_a u and u_a^2 H_a.
        if h.ndim == 5:
            hu = jnp.sum(h * u[None, None, None, :], 3)
            uhu = jnp.einsum("abcn,bn->acn", hu, u)
            cross = jnp.einsum("abcn,an->bcn", hu, u)
            cross = cross + jnp.swapaxes(cross, 0, 1)
            last = jnp.einsum("abcdn,an,cn->bdn", h, u, u)
            curvature = uhu + cross + last
        else:
            hu = jnp.sum(h * u[None, None], 2)
            uhu = jnp.sum(hu * u[None], 1)
            cross = u[:, None] * hu
            curvature = jnp.sum(h * (u * u)[:, None, None], 0) + eye * uhu + cross + jnp.swapaxes(cross, 0, 1)
        hess = s + curvature + eye / self.v
        return f + jnp.sum(d * d, 0) / (2 * self.v), grad, hess


def ldl_solve(h, g, shift: Any = 0.0, floor: Any = 0.0):
    """Solves (H + shift) x = g at every node by an unrolled L D L^T; no LAPACK call.

    H (n, n, N) symmetric, g (n, N). Pivots d become max(|d|, floor), so that with `floor > 0` the matrix is
    positive definite and -x a descent direction even where H is not (Gill and Murray's modification).
    Returns x (n, N) and the smallest original pivot (N,), negative where H + shift is indefinite.
    """
    n = h.shape[0]
    low = [[h[i, j] + shift if i == j else h[i, j] for j in range(i + 1)] for i in range(n)]
    inverse, original = [], []
    for k in range(n):
        d = low[k][k]
        original.append(d)
        inverse.append(1.0 / jnp.maximum(jnp.abs(d), floor))
        for i in range(k + 1, n):
            raw = low[i][k]
            for j in range(k + 1, i):
                low[i][j] = low[i][j] - raw * low[j][k]
            low[i][k] = raw * inverse[k]
            low[i][i] = low[i][i] - raw * low[i][k]
    x = [g[i] for i in range(n)]
    for i in range(n):
        for k in range(i):
            x[i] = x[i] - low[i][k] * x[k]
    x = [xi * inv for xi, inv in zip(x, inverse, strict=True)]
    for i in reversed(range(n)):
        for k in range(i + 1, n):
            x[i] = x[i] - low[k][i] * x[k]
    smallest = original[0]
    for d in original[1:]:
        smallest = jnp.minimum(smallest, d)
    return jnp.stack(x), smallest


class _State(NamedTuple):
    u: Any
    f: Any
    g: Any
    h: Any
    mu: Any
    done: Any
    step: Any


def _newton(problem, start, limit):
    """Damped Newton at all nodes at once; a node that has converged is left alone."""
    tiny = 1e-12

    def cond(s):
        return (s.step < limit) & ~jnp.all(s.done)

    def body(s):
        scale = jnp.max(jnp.abs(jnp.stack([s.h[i, i] for i in range(s.u.shape[0])])), 0)
        x, _ = ldl_solve(s.h, s.g, s.mu * scale, 1e-3 * scale)
        size = jnp.max(jnp.abs(x), 0) / (1.0 + jnp.max(jnp.abs(s.u), 0))
        trial = s.u - x
        f, g, h = problem.terms(trial)
        good = ((f <= s.f + tiny * (1.0 + jnp.abs(f))) | (size < 1e-10)) & ~s.done
        mu = jnp.where(good, jnp.where(s.mu < 1e-2, 0.0, 0.1 * s.mu), jnp.maximum(4.0 * s.mu, 0.3))
        # Quadratic convergence: after a pure Newton step of 1e-8 the error is at rounding level.
        done = s.done | (good & (size < 1e-8) & (s.mu == 0.0) & (s.step > 0))
        return _State(
            jnp.where(good, trial, s.u),
            jnp.where(good, f, s.f),
            jnp.where(good, g, s.g),
            jnp.where(good, h, s.h),
            jnp.where(s.done, s.mu, mu),
            done,
            s.step + 1,
        )

    # The first pass of the loop evaluates at the start (step x = 0): one compiled copy of `terms` serves all.
    n, nodes = start.shape
    far = jnp.full((nodes,), jnp.inf, start.dtype)
    eye = jnp.broadcast_to(jnp.eye(n, dtype=start.dtype)[:, :, None], (n, n, nodes))
    first = _State(start, far, jnp.zeros_like(start), eye, jnp.zeros_like(far), jnp.isnan(far), 0)
    out = jax.lax.while_loop(cond, body, first)
    return out.u, out.f, out.done


#: Newton steps that all nodes take together; after them only the unfinished ones go on, in groups.
_TOGETHER, _GROUP = 7, 8


def _descend(problem, start, max_steps):
    """Minimises at all nodes. A few per cent of the nodes need many more steps than the rest: after a few common
    steps those are gathered into small groups, so that they do not hold the others."""
    nodes = start.shape[1]
    u, f, done = _newton(problem, start, min(_TOGETHER, max_steps))
    group = max(nodes // _GROUP, min(nodes, 64))
    rounds = -(-nodes // group)

    def cond(s):
        return (s[4] < rounds) & ~jnp.all(s[2] | s[3])

    def body(s):
        u, f, done, seen, k = s
        # Nodes still to do come first; one that has had its turn is not asked again.
        index = jnp.argsort(done | seen, stable=True)[:group]
        sub_u, sub_f, sub_done = _newton(problem.take(index), u[:, index], max_steps)
        return (
            u.at[:, index].set(sub_u),
            f.at[index].set(sub_f),
            done.at[index].set(sub_done),
            seen.at[index].set(True),
            k + 1,
        )

    u, f, done, _, _ = jax.lax.while_loop(cond, body, (u, f, done, jnp.zeros_like(done), 0))
    return u, f, done


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def minimise(problem, start, max_steps: int = 100):
    """Local minimiser reached from `start` (n, N) by a monotone damped Newton descent.

    Returns `(u, f, converged)`: u (n, N), the minimum f (N,) and a flag per node. Differentiable to any order
    in every leaf of `problem` by the implicit function theorem, du = -H^{-1} d(grad); the start carries no
    derivative.
    """
    return _descend(problem, jax.lax.stop_gradient(start), max_steps)


@minimise.defjvp
def _minimise_jvp(max_steps, primals, tangents):
    problem, start = primals
    u, f, done = minimise(problem, start, max_steps)
    (dg, df) = jax.jvp(lambda p: _gradient_and_value(p, u), (problem,), (tangents[0],))[1]
    du = -ldl_solve(problem.terms(u)[2], dg)[0]
    return (u, f, done), (du, df, np.zeros(done.shape, jax.dtypes.float0))


def _gradient_and_value(problem, u):
    f, g, _ = problem.terms(u)
    return g, f
