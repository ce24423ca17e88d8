"""Small linear algebra without LAPACK calls: under vmap, on a GPU, and at many nodes at once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.jit
def small_solve(a: Float[Array, "n n"], b: Float[Array, "n *k"]) -> Float[Array, "n *k"]:
    """Solves a x = b, a (n, n), b (n,) or (n, k), by elimination with row exchanges in a loop; no LAPACK call."""
    n, rows = a.shape[0], jnp.arange(a.shape[0])[:, None]

    def eliminate(k, both):
        column = jax.lax.dynamic_index_in_dim(both[0], k, 1)
        best = jnp.argmax(jnp.where(rows < k, -1.0, jnp.abs(column)))
        pivot = jax.lax.dynamic_index_in_dim(column, best, 0)
        factor = jnp.where(rows == best, column[k], jnp.where(rows == k, 0.0, column)) / pivot

        def eliminated(m):
            here, there = (jax.lax.dynamic_index_in_dim(m, i, 0) for i in (k, best))
            rest = jnp.where(rows == best, here, m) - factor * there
            return jnp.where(rows == k, there / pivot, rest)

        return tuple(map(eliminated, both))

    x = jax.lax.fori_loop(0, n, eliminate, (a, b[:, None] if b.ndim == 1 else b))[1]
    return x[:, 0] if b.ndim == 1 else x


def _log_norm_of_power(a, squarings: int):
    """log |a^(2^k)| / 2^k by repeated squaring, renormalised: tends to the log of the spectral radius."""

    def scaled(state, k):
        log, a = state
        norm = jnp.sqrt(jnp.sum(a * a))
        safe = jnp.where(norm > 0, norm, 1.0)
        return log + jnp.log(safe) * 0.5**k, a / safe, norm

    def square(k, state):
        log, a, _ = scaled(state, 1.0 * k)
        return log, a @ a

    log, _, norm = scaled(jax.lax.fori_loop(0, squarings, square, (jnp.zeros((), a.dtype), a)), squarings)
    return jnp.where(norm > 0, log, -jnp.inf)


def balanced(a):
    """D^-1 a D with a diagonal D that makes rows and columns about equally large: the eigenvalues of `a`, with norms
    that say something about them where coordinates differ by orders of magnitude (Osborne 1960)."""
    n, small = len(a), 1e-3  # what is smaller than that does not need to be
    others = 1.0 - jnp.eye(n, dtype=a.dtype)

    def once(k, a):
        here = jnp.arange(n) == k % n
        rest = jnp.abs(a) * others
        in_row, in_column = (jnp.sum(jnp.where(here, jnp.sum(rest, axis), 0.0)) for axis in (1, 0))
        factor = jnp.where(here, jnp.sqrt((in_row + small) / (in_column + small)), 1.0)
        return a * factor[None] / factor[:, None]

    return jax.lax.fori_loop(0, 6 * n, once, a)


@jax.jit
def spectral_bounds(jac: Float[Array, "n n"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Of a small matrix max |eigenvalue|, the contraction rate of a plain iteration, and max Re(eigenvalue), the
    stability of a damped one, from the growth of exp(s J). No eigensolver, so it runs under vmap and on a GPU."""
    n, jac = jac.shape[0], balanced(jac)
    radius = jnp.exp(_log_norm_of_power(jac, 10))
    scale = 1.0 + jnp.sqrt(jnp.sum(jac * jac))
    a = jac / (16 * scale)
    one = jnp.eye(n, dtype=jac.dtype)
    total = jax.lax.fori_loop(0, 8, lambda k, sum: one + a @ sum / (8.0 - k), one)
    return radius, 16 * scale * _log_norm_of_power(total, 18)


def _eliminate(low: list[list[Any]], inverted: Any) -> tuple[list[Any], list[Any]]:
    """Unrolled L D L^T of the lower rows of a symmetric matrix, which become those of L; the inverses of its pivots
    (as `inverted` makes them), and the pivots."""
    inverse: list[Any] = []
    for k in range(len(low)):
        inverse.append(inverted(low[k][k]))
        for i in range(k + 1, len(low)):
            raw = low[i][k]
            for j in range(k + 1, i):
                low[i][j] = low[i][j] - raw * low[j][k]
            low[i][k] = raw * inverse[k]
            low[i][i] = low[i][i] - raw * low[i][k]
    return inverse, [row[k] for k, row in enumerate(low)]


@jax.jit
def ldl_solve(
    h: Float[Array, "n n N"], g: Float[Array, "n N"], shift: Any = 0.0, floor: Any = 0.0
) -> tuple[Float[Array, "n N"], Float[Array, " N"]]:
    """Solves (H + shift) x = g at every node by L D L^T; no LAPACK call.

    H (n, n, N) symmetric, g (n, N). Pivots d become max(|d|, floor), so that with `floor > 0` the matrix is
    positive definite and -x a descent direction even where H is not (Gill and Murray's modification).
    Returns x (n, N) and the smallest original pivot (N,), negative where H + shift is indefinite.
    """
    if h.shape[0] > UNROLLED:
        return _ldl_loops(h, g, shift, floor)
    n = h.shape[0]
    low = [[h[i, j] + shift if i == j else h[i, j] for j in range(i + 1)] for i in range(n)]
    inverse, original = _eliminate(low, lambda d: 1.0 / jnp.maximum(jnp.abs(d), floor))
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


def symmetric_inverse(h: Float[Array, "n n N"]) -> list[list[Float[Array, " N"]]]:
    """The entries of H^{-1} at every node, H (n, n, N) symmetric, for a few rows: L^{-T} D^{-1} L^{-1}, unrolled.

    A tenth of the time of n solves: nothing is held in memory on the way.
    """
    n = h.shape[0]
    low = [[h[i, j] for j in range(i + 1)] for i in range(n)]
    pivots, _ = _eliminate(low, lambda d: 1.0 / d)
    m: list[list[Any]] = [[1.0 if i == j else None for j in range(n)] for i in range(n)]  # L^{-1}
    for j in range(n):
        for i in range(j + 1, n):
            m[i][j] = -sum((low[i][k] * m[k][j] for k in range(j + 1, i)), low[i][j])
    out: list[list[Any]] = [[None] * n for _ in range(n)]
    for i in range(n):
        for j in range(i + 1):
            out[i][j] = out[j][i] = sum((pivots[k] * m[k][i] * m[k][j] for k in range(i + 1, n)), pivots[i] * m[i][j])
    return out


#: Rows up to which elimination is unrolled: above, the program would be larger than what it saves.
UNROLLED = 10


def _ldl_loops(h, g, shift, floor):
    """`ldl_solve` in loops over rows: a program of the same size whatever n is."""
    n = h.shape[0]
    rows = jnp.arange(n)[:, None]
    a = jnp.where(jnp.eye(n, dtype=bool)[:, :, None], h + shift, h)

    def eliminate(a, k):
        d = a[k, k]
        inverse = 1.0 / jnp.maximum(jnp.abs(d), floor)
        raw = jnp.where(rows > k, a[:, k], 0.0)
        column = raw * inverse
        return a - raw[:, None] * column[None], (column, inverse, d)

    _, (low, inverse, original) = jax.lax.scan(eliminate, a, jnp.arange(n))  # low[k]: column k
    x = jax.lax.fori_loop(0, n, lambda k, x: x - low[k] * x[k], g) * inverse

    def back(k, x):
        i = n - 1 - k
        return jnp.where(rows == i, x - jnp.sum(low[i] * x, 0), x)

    return jax.lax.fori_loop(0, n, back, x), jnp.min(original, 0)


def cholesky(a):
    """Lower triangular L with L L^T = a, for a few rows, without LAPACK."""
    n = a.shape[0]
    low: list[list[Any]] = [[jnp.zeros(())] * n for _ in range(n)]
    for i in range(n):
        for j in range(i + 1):
            rest = a[i, j] - sum((low[i][k] * low[j][k] for k in range(j)), jnp.zeros(()))
            low[i][j] = jnp.sqrt(rest) if i == j else rest / low[j][j]
    return jnp.stack([jnp.stack(row) for row in low])


def solve_lower(low, b):
    """x with L x = b, L lower triangular."""
    x: list[Any] = []
    for i in range(low.shape[0]):
        x.append((b[i] - sum((low[i, k] * x[k] for k in range(i)), jnp.zeros(()))) / low[i, i])
    return jnp.stack(x)


def solve_transposed(low, b):
    """x with L^T x = b, L lower triangular."""
    n = low.shape[0]
    x: list[Any] = [None] * n
    for i in reversed(range(n)):
        x[i] = (b[i] - sum((low[k, i] * x[k] for k in range(i + 1, n)), jnp.zeros(()))) / low[i, i]
    return jnp.stack(x)
