"""Law of the learned map's eigenvalues: the noisy teacher's, cut by the weight decay."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from .base import BaseLaw
from .elementwise import as_array, prepare
from .laws import Wishart


def _as_law(value: Any) -> BaseLaw:
    return value if isinstance(value, BaseLaw) else Wishart(value)


class LearnedSpectrum(eqx.Module):
    """Limiting law of the eigenvalues of the pre-trained matrix ``S_hat = W W^T / sqrt(P D)``.

    In law ``S_hat = eta * ReLU(S* + delta Z - eps)``: the noisy teacher cut at eps by the weight
    decay: an atom at 0 and a continuous part on s > 0 (arXiv:2509.24914, arXiv:2606.05899).
    `law` is that of S* (`lorastate.model.spectra.laws`), or a number, the kappa0 of a Wishart one. Units of S*,
    whose trace is then sqrt(kappa0) per D. Fields broadcast.
    """

    eta: Float[Array, "*shape"] = eqx.field(converter=as_array)
    delta: Float[Array, "*shape"] = eqx.field(converter=as_array)
    eps: Float[Array, "*shape"] = eqx.field(converter=as_array)
    law: Any = eqx.field(converter=_as_law)

    @property
    def atom(self) -> Float[Array, "*shape"]:
        """Weight of the eigenvalue 0: ``F_delta(eps)``, in [0, 1]."""
        return self.law.mass_below(self.eps, self.delta)

    @property
    def rank_fraction(self) -> Float[Array, "*shape"]:
        """Rank of S_hat over D, ``1 - F_delta(eps)``; the law holds while P / D is at least it."""
        return 1 - self.atom

    def density(self, s: ArrayLike) -> Float[Array, "*shape"]:
        """``rho_delta(eps + s / eta) / eta`` for s > 0, else 0; integrates to rank_fraction."""
        s, eta, eps = prepare(s, self.eta, self.eps)
        return jnp.where(s > 0, self.law.density(eps + s / eta, self.delta) / eta, 0.0)

    @property
    def edges(self) -> Float[Array, "*shape 2B"]:
        """Support of the continuous part, (..., 4) or more: ``eta max(edge - eps, 0)`` of each band left.

        Bands ascending, nan-padded; all nan when nothing is left (eps right of the support).
        """
        eta, delta, eps = prepare(self.eta, self.delta, self.eps)
        band = self.law.edges(delta)
        absent = jnp.isnan(band)
        x = eta[..., None] * (jnp.where(absent, 0.0, band) - eps[..., None])
        x = jnp.where(absent, 0.0, jnp.maximum(x, 0.0)).reshape(*eta.shape, -1, 2)
        order = jnp.argsort(~(x[..., 1] > 0), axis=-1, stable=True)
        x = jnp.take_along_axis(x, order[..., None], axis=-2)
        return jnp.where(x[..., 1:] > 0, x, jnp.nan).reshape(*eta.shape, -1)

    @property
    def moment1(self) -> Float[Array, "*shape"]:
        """``Tr S_hat / D = eta int (x - eps)_+ mu_delta = -(eta / 2) dJ/deps``, per D."""
        delta, eps = prepare(self.delta, self.eps)
        return self.eta * jax.jvp(lambda e: self.law.J(delta, e), (eps,), (eps * 0 - 0.5,))[1]

    @property
    def moment2(self) -> Float[Array, "*shape"]:
        """``Q = Tr S_hat^2 / D = eta^2 J(delta, eps)``, per D."""
        return self.eta**2 * self.law.J(self.delta, self.eps)
