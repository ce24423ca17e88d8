"""What a law of the teacher's eigenvalues answers to: `BaseLaw`."""

from __future__ import annotations

import abc

import equinox as eqx
from jaxtyping import Array, ArrayLike, Complex, Float

from .elementwise import density_of
from .rules import BandNodes


class BaseLaw(eqx.Module):
    """Law of the eigenvalues of a symmetric matrix S; ``mu_delta = law of S + delta * (semicircle of variance 1)``.

    Continuous parameters are leaves. All methods are elementwise in delta >= 0 and x or eps (broadcast); leaves are
    scalars (vectors for atoms): map over laws with `jax.vmap`.
    """

    @property
    @abc.abstractmethod
    def mean(self) -> Float[Array, ""]:
        """``Tr S / D``."""

    @property
    @abc.abstractmethod
    def variance(self) -> Float[Array, ""]:
        """``Tr S^2 / D - (Tr S / D)^2``."""

    @property
    def second_moment(self) -> Float[Array, ""]:
        """``Tr S^2 / D``."""
        return self.variance + self.mean**2

    @abc.abstractmethod
    def stieltjes(self, x: ArrayLike, delta: ArrayLike) -> Complex[Array, "*shape"]:
        """``g(x + i0) = int mu_delta(dt) / (x + i0 - t)``, complex, ``Im g <= 0``; real off the support."""

    @abc.abstractmethod
    def J(self, delta: ArrayLike, eps: ArrayLike) -> Float[Array, "*shape"]:
        """``J(delta, eps) = int_{x > eps} (x - eps)^2 mu_delta(dx)``.

        ``(mean - eps)^2 + variance + delta^2`` left of the support, exactly 0 right of it. Derivatives through the
        third order, in delta, eps and every leaf, are exact and finite everywhere; higher ones would miss terms.
        """

    @abc.abstractmethod
    def mass_below(self, eps: ArrayLike, delta: ArrayLike) -> Float[Array, "*shape"]:
        """Spectral mass ``F_delta(eps) = mu_delta((-inf, eps])``, in [0, 1]."""

    @abc.abstractmethod
    def edges(self, delta: ArrayLike) -> Float[Array, "*shape 2B"]:
        """Band edges of mu_delta, ascending and nan-padded, (..., 2 B): left, right, left, right, ..."""

    @abc.abstractmethod
    def band_nodes(self, delta: ArrayLike, n: int = 64) -> BandNodes:
        """Nodes x, weights w and density, (..., B n): ``sum w f(x) = int f dmu_delta``, spectrally accurate, f smooth.

        n nodes on B panels (the bands of one Wishart; else two a singularity of N, eight more on the support
        of a power law): 1e-13 at n = 64; where a steep power law turns into its tail, 1e-7. Not in the order of x.
        """

    @abc.abstractmethod
    def pair_response(self, delta: ArrayLike, eps: ArrayLike, n: int = 64) -> Float[Array, "*shape"]:
        """``int int ((r(x) - r(y)) / (x - y))^2 mu_delta(dx) mu_delta(dy)``, ``r(x) = ReLU(x - eps)``.

        The spectral factor of the stability (replicon) condition (arXiv:2509.24914): 1 left of the support, 0 right of
        it. n double-exponential nodes a panel and side of eps: about 1e-7 at n = 64. Memory (B n)^2 per setting.
        """

    def density(self, x: ArrayLike, delta: ArrayLike) -> Float[Array, "*shape"]:
        """Density ``-Im g(x + i0) / pi`` of mu_delta; exactly 0 off the support, infinite at an atom."""
        return density_of(self.stieltjes(x, delta), delta)
