"""Quadrature rules of the spectral integrals: on bands, on contours, and about a point where two bands meet."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class BandNodes(NamedTuple):
    """Quadrature nodes ``x``, weights ``w`` of mu_delta and ``density`` at the nodes, (..., 2n) or more."""

    x: Float[Array, "*shape nodes"]
    w: Float[Array, "*shape nodes"]
    density: Float[Array, "*shape nodes"]


def gauss_legendre(n: int) -> tuple[Float[np.ndarray, "{n}"], Float[np.ndarray, "{n}"]]:
    """Nodes and weights on [0, 1]."""
    x, w = np.polynomial.legendre.leggauss(n)
    return (x + 1) / 2, w / 2


def double_exponential(n: int) -> list[np.ndarray]:
    """Nodes and weights on [0, 1] for integrands with corners at its ends."""
    tau, step = np.linspace(-3, 3, n, retstep=True)  # the rule's end weights are 1e-13 there
    slope = step * np.pi * np.cosh(tau) / (2 * np.cosh(np.pi / 2 * np.sinh(tau))) ** 2
    return [1 / (1 + np.exp(-np.pi * np.sinh(tau))), slope]


def pairs_across(above: tuple[Array, Array], below: tuple[Array, Array]) -> Array:
    """``int_{x > eps > y} ((x - eps) / (x - y))^2 mu(dx) mu(dy)`` from distances to eps and weights on both sides."""
    (u, wu), (v, wv) = above, below
    total = u[..., :, None] + v[..., None, :]
    share = u[..., :, None] / jnp.where(total > 0, total, 1.0)
    return jnp.einsum("...i,...j,...ij->...", wu, wv, share * share)
