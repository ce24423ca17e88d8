"""Coordinates on Sym_T, the symmetric T x T matrices with the Frobenius inner product.

Arrays over quadrature nodes carry the node axis *last*: a field is (T, T, N), its coordinates (n_T, N).
Small matrix algebra is then a few wide elementwise operations, on a CPU and on a GPU alike.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def dimension(tokens: int) -> int:
    """n_T = T(T+1)/2."""
    return tokens * (tokens + 1) // 2


@functools.lru_cache
def basis(tokens: int) -> Float[np.ndarray, "n_T T T"]:
    """Orthonormal basis B_k of Sym_T, (n_T, T, T): unit diagonals first, then (E_ab + E_ba)/sqrt(2)."""
    out = []
    for a in range(tokens):
        e = np.zeros((tokens, tokens))
        e[a, a] = 1.0
        out.append(e)
    for a in range(tokens):
        for b in range(a + 1, tokens):
            e = np.zeros((tokens, tokens))
            e[a, b] = e[b, a] = np.sqrt(0.5)
            out.append(e)
    return np.stack(out)


@functools.lru_cache
def complement(tokens: int, drop_shift: bool) -> Float[np.ndarray, "n_eff n_T"]:
    """Orthonormal rows (n_eff, n_T) spanning Sym_T, or Sym_T without the common shift 11^T."""
    n = dimension(tokens)
    if not drop_shift:
        return np.eye(n)
    shift = np.einsum("kab->k", basis(tokens)) / tokens
    q, _ = np.linalg.qr(np.column_stack([shift, np.eye(n)]))
    return q[:, 1:n].T.copy()


def to_matrix(c: Float[Array | np.ndarray, "n_T *N"]) -> Float[Array, "T T *N"]:
    """Coordinates (n_T, ...) -> symmetric matrices (T, T, ...)."""
    tokens = int((np.sqrt(8 * c.shape[0] + 1) - 1) / 2 + 0.5)
    rows: list[list[Any]] = [[c[a] if a == b else None for b in range(tokens)] for a in range(tokens)]
    k = tokens
    for a in range(tokens):
        for b in range(a + 1, tokens):
            rows[a][b] = rows[b][a] = c[k] * np.sqrt(0.5)
            k += 1
    return jnp.stack([jnp.stack(r) for r in rows])


def to_coordinates(z: Float[Array | np.ndarray, "T T *N"]) -> Float[Array, "n_T *N"]:
    """Matrices (T, T, ...) -> coordinates (n_T, ...) of their symmetric part (the adjoint of `to_matrix`)."""
    tokens = z.shape[0]
    out = [z[a, a] for a in range(tokens)]
    for a in range(tokens):
        out += [(z[a, b] + z[b, a]) * np.sqrt(0.5) for b in range(a + 1, tokens)]
    return jnp.stack(out)


def hessian_to_coordinates(h: Float[Array | np.ndarray, "T T T *N"]) -> Float[Array, "n_T n_T *M"]:
    """Row Hessians H[a, b, c] = d2 f / dZ_ab dZ_ac (T, T, T, ...) -> (n_T, n_T, ...) in coordinates.

    A general Hessian H[a, b, c, d] = d2 f / dZ_ab dZ_cd (T, T, T, T, N) is accepted as well (rank 5).
    """
    tokens = h.shape[0]
    b = basis(tokens)
    if h.ndim == 5:
        return jnp.einsum("kab,abcdn,lcd->kln", b, h, b)
    n, index, weight = b.shape[0], *_row_terms(tokens)
    if tokens > _UNROLLED:
        rows = h.reshape(tokens**3, *h.shape[3:])
        wide = (2, n * n) + (1,) * (h.ndim - 3)
        return jnp.sum(weight.reshape(wide) * rows[index.reshape(2, -1)], 0).reshape(n, n, *h.shape[3:])
    out: list[list] = [[None] * n for _ in range(n)]
    for k in range(n):
        for l in range(k + 1):
            terms = [
                w * h[np.unravel_index(i, (tokens,) * 3)]
                for i, w in zip(index[:, k, l], weight[:, k, l], strict=True)
                if w
            ]
            out[k][l] = out[l][k] = sum(terms[1:], terms[0]) if terms else jnp.zeros_like(h[0, 0, 0])
    return jnp.stack([jnp.stack(r) for r in out])


#: Tokens up to which a Hessian is put together entry by entry, which is faster; with more the program grows too large.
_UNROLLED = 4


@functools.lru_cache
def _row_terms(tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Where (in H without its last axes, flattened) and with which weight each entry of a Hessian in coordinates finds
    its terms, (2, n_T, n_T): only rows that both basis matrices touch contribute, of which there are two at most."""
    b = basis(tokens)
    n = len(b)
    index, weight = np.zeros((2, n, n), int), np.zeros((2, n, n))
    products = np.einsum("kai,laj->klaij", b, b).reshape(n, n, -1)
    for k, l in np.ndindex(n, n):
        (found,) = np.nonzero(products[k, l])
        index[: len(found), k, l], weight[: len(found), k, l] = found, products[k, l, found]
    return index, weight
