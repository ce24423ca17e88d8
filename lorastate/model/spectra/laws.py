"""Laws of the base teacher: one Wishart matrix, given eigenvalues, power laws, and free sums of all these.

One Wishart has closed forms (`wishart`). All others are laws of ``A + sum_i c_i W_i`` with an explicit A, `Atoms` or
`PowerLaw`: what they answer comes from the subordination map (`subordination`, `contour`, `bands`), to which they give
the Stieltjes transform of A. All functions are elementwise in delta >= 0 (0: the limit 0+), x, eps, broadcast, and run
under jit, vmap and differentiation anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ...errors import SettingError, is_concrete, require_float64
from ...validation import real
from . import bands, contour, subordination, wishart
from .base import BaseLaw
from .rules import gauss_legendre
from .subordination import Form

_LOG_NODES = 40  # Gauss-Legendre nodes on the support of a power law


class Wishart(BaseLaw):
    """``W W^T / sqrt(P D)``, entries N(0, 1), of rank ratio ``kappa0 = P / D > 0``; closed forms in `wishart`."""

    kappa0: Any

    def __init__(self, kappa0):
        require_float64()
        self.kappa0 = real("wishart.kappa0", kappa0, "kappa0 > 0", 0.0, vector=True)

    @property
    def mean(self):
        return jnp.sqrt(self.kappa0)

    @property
    def variance(self):
        return jnp.ones_like(self.kappa0)

    @property
    def second_moment(self):
        return 1.0 + self.kappa0

    def stieltjes(self, x, delta):
        return wishart.stieltjes(x, delta, self.kappa0)

    def J(self, delta, eps):
        return wishart.J(delta, eps, self.kappa0)

    def mass_below(self, eps, delta):
        return wishart.mass_below(eps, delta, self.kappa0)

    def edges(self, delta):
        return wishart.edges(delta, self.kappa0)

    def band_nodes(self, delta, n=64):
        return wishart.band_nodes(delta, self.kappa0, n)

    def pair_response(self, delta, eps, n=64):
        return wishart.pair_response(delta, eps, self.kappa0, n)


class _General(BaseLaw):
    """A law that reduces to a `Form`."""

    def form(self) -> Form:
        """What the subordination map is made of."""
        return _form(self)

    def stieltjes(self, x, delta):
        return subordination.stieltjes(self, x, delta)

    def J(self, delta, eps):
        return contour.J(self, delta, eps)

    def mass_below(self, eps, delta):
        return contour.mass_below(self, eps, delta)

    def edges(self, delta):
        return bands.edges(self, delta)

    def band_nodes(self, delta, n=64):
        return bands.band_nodes(self, delta, n)

    def pair_response(self, delta, eps, n=64):
        return bands.pair_response(self, delta, eps, n)


class Atoms(_General):
    """Eigenvalues `values`, (K,), with `weights`, (K,) > 0, that sum to one.

    The weights are divided by their sum wherever they are used: a derivative in one is along the simplex.
    """

    weights: Any
    values: Any

    def __init__(self, weights, values):
        require_float64()
        self.weights = real("atoms.weights", weights, "weights > 0", 0.0, vector=True)
        self.values = real("atoms.values", values, "real values", -np.inf, vector=True)
        if self.weights.ndim != 1 or self.weights.shape != self.values.shape or not self.weights.size:
            raise SettingError(
                f"atoms.weights and atoms.values have shapes {self.weights.shape} and {self.values.shape}; "
                "allowed: two vectors of one length, at least 1"
            )
        if is_concrete(self.weights) and abs(float(jnp.sum(self.weights)) - 1) > 1e-9:
            raise SettingError(f"atoms.weights sum to {float(jnp.sum(self.weights))!r}; allowed: 1 to within 1e-9")

    def eigenvalues(self, dimension: int) -> np.ndarray:
        """Eigenvalues of one matrix of that size: the quantiles at (k + 1/2) / dimension."""
        places = (np.arange(dimension) + 0.5) / dimension
        order = np.argsort(self.values)
        steps = np.cumsum(np.asarray(self.weights)[order])
        return np.asarray(self.values)[order][np.minimum(np.searchsorted(steps, places), len(steps) - 1)]

    @property
    def _shares(self):
        return self.weights / jnp.sum(self.weights)

    @property
    def mean(self):
        return jnp.sum(self._shares * self.values)

    @property
    def variance(self):
        return jnp.sum(self._shares * (self.values - self.mean) ** 2)

    def transform(self, u, factor):
        """Stieltjes transform of factor S and its derivative, Im u >= 0."""
        pole = 1 / (u[..., None] - factor * self.values)
        share = self._shares * pole
        return jnp.sum(share, -1), -jnp.sum(share * pole, -1)

    wide: ClassVar[bool] = False

    def cover(self, factor):
        """Ends, (K,) each, of the pieces of the real axis where the transform is not analytic."""
        x = factor * self.values
        return x, x

    def covers(self, a, factor):
        """Whether the law of factor S has density at a."""
        return jnp.zeros_like(a, bool)


class PowerLaw(_General):
    """Eigenvalues of density proportional to ``x^-(1 + s)`` on [low, high], 0 < low < high; `exponent` s is any real.

    ``P(eigenvalue > x) ~ x^-s`` up to the cut at high: the k-th largest eigenvalue falls as ``k^-gamma``, gamma = 1 / s
    (`PowerLaw.ranked`). s = 0 is flat in log x, s = -1 flat in x.
    """

    exponent: Any
    low: Any
    high: Any

    wide: ClassVar[bool] = True

    def __init__(self, exponent, low, high):
        require_float64()
        self.exponent = real("power_law.exponent", exponent, "a real number", -np.inf)
        self.low = real("power_law.low", low, "low > 0", 0.0)
        self.high = real("power_law.high", high, "high > low", 0.0)
        if is_concrete(self.low) and is_concrete(self.high) and not bool(self.low < self.high):
            raise SettingError(
                f"power_law.high = {float(self.high)!r} is not above low = {float(self.low)!r}; allowed: high > low"
            )

    @classmethod
    def ranked(cls, gamma, low, high) -> PowerLaw:
        """Eigenvalues that fall with their rank k as ``k^-gamma``, gamma > 0, from high to low."""
        return cls(1 / real("power_law.gamma", gamma, "gamma > 0", 0.0), low, high)

    def eigenvalues(self, dimension: int) -> np.ndarray:
        """Eigenvalues of one matrix of that size: the quantiles at (k + 1/2) / dimension."""
        places = (np.arange(dimension) + 0.5) / dimension
        s, length = float(self.exponent), float(np.log(self.high / self.low))
        # In t = log(x / low) the density is e^(-s t): its quantiles, also where s is near zero.
        t = places * length if abs(s) < 1e-9 else -np.log1p(places * np.expm1(-s * length)) / s
        return float(self.low) * np.exp(t)

    def _path(self) -> tuple[Array, Array, Array, Array]:
        """Nodes t = log(x / low) and weights on a path below the real axis; log(high / low); norm of the density.

        The integrand is entire in t but for the pole of the transform: the path may be bent away from it.
        """
        length = jnp.log(self.high / self.low)
        node, weight = (jnp.asarray(f, length.dtype) for f in gauss_legendre(_LOG_NODES))
        depth = lax.stop_gradient(jnp.minimum(length / 2, 1.0))
        t = lax.complex(length * node, -4 * depth * node * (1 - node))
        dt = weight * lax.complex(jnp.broadcast_to(length, node.shape), -4 * depth * (1 - 2 * node))
        norm = jnp.sum(weight * length * jnp.exp(-self.exponent * length * node))
        return t, dt, length, norm

    def _power(self, k: int) -> Array:
        """``Tr S^k / D``."""
        t, dt, _, norm = self._path()
        return self.low**k * jnp.real(jnp.sum(dt * jnp.exp((k - self.exponent) * t))) / norm

    @property
    def mean(self):
        return self._power(1)

    @property
    def variance(self):
        return self._power(2) - self._power(1) ** 2

    def transform(self, u, factor):
        """Stieltjes transform of factor S and its derivative, Im u >= 0."""
        # Of factor S: conjugation exchanges the half planes for a negative factor.
        negative = factor < 0
        u = u / (factor * self.low)
        u = jnp.where(negative, jnp.conj(u), u)
        g, dg = self._scaled(lax.complex(jnp.real(u), jnp.abs(jnp.imag(u))))
        g, dg = (jnp.where(negative, jnp.conj(f), f) for f in (g, dg))
        return g / (factor * self.low), dg / (factor * self.low) ** 2

    def _scaled(self, u):
        """Transform and its derivative in units of low, Im u >= 0.

        Gauss-Legendre in t, exact but for the pole at t = log u; that one is taken out and its logarithm put back.
        """
        s = self.exponent
        t, dt, length, norm = self._path()
        pole = 1 / (u[..., None] - jnp.exp(t))
        share = dt * jnp.exp(-s * t) * pole
        g, dg = jnp.sum(share, -1), -jnp.sum(share * pole, -1)
        size, angle = jnp.abs(u), jnp.angle(u)
        near = (size > 0.25) & (size < 4 * jnp.exp(length)) & (angle < 2.5)
        u = jnp.where(near, u, 0.5)
        there = jnp.log(u)
        away = 1 / (t - there[..., None])
        end, start = there - length, there
        good = (end != 0) & (start != 0)
        start, end = jnp.where(good, start, 1.0), jnp.where(good, end, 1.0)
        lack = jnp.sum(dt * away, -1) - jnp.log(end) + jnp.log(start)
        dlack = (jnp.sum(dt * away * away, -1) - 1 / end + 1 / start) / u
        p = jnp.exp(-s * there) / u
        g = g + jnp.where(near, p * lack, 0.0)
        dg = dg + jnp.where(near, p * (dlack - (1 + s) * lack / u), 0.0)
        return g / norm, dg / norm

    def cover(self, factor):
        """Ends, (K,) each, of the pieces of the real axis where the transform is not analytic."""
        a, b = factor * self.low, factor * self.high
        return jnp.minimum(a, b)[None], jnp.maximum(a, b)[None]

    def inner(self, t, factor):
        """The point of the support at the share t of the logarithm."""
        return factor * self.low * (self.high / self.low) ** t

    def covers(self, a, factor):
        """Whether the law of factor S has density at a."""
        low, high = self.cover(factor)
        return (a >= low[0]) & (a <= high[0])


class Part(eqx.Module):
    """One term of a free sum: ``factor * S``."""

    factor: Any
    law: BaseLaw


class FreeSum(_General):
    """Law of ``sum_i factor_i S_i`` of independent, rotationally invariant matrices S_i (free in the limit).

    `parts`: pairs (factor, law); a factor is any real number. At most one law may lack an explicit R-transform (a power
    law, or atoms at more than one value). The leaves are `parts[i].factor` and those of `parts[i].law`.
    """

    parts: tuple[Part, ...]

    def __init__(self, parts: Iterable):
        require_float64()
        parts = tuple((p.factor, p.law) if isinstance(p, Part) else tuple(p) for p in parts)
        if not parts:
            raise SettingError("free_sum.parts = () is empty; allowed: at least one (factor, law)")
        for i, p in enumerate(parts):
            if len(p) != 2 or not isinstance(p[1], BaseLaw):
                raise SettingError(f"free_sum.parts[{i}] = {p!r} is not a pair; allowed: (factor, law)")
        self.parts = tuple(
            Part(real(f"free_sum.parts[{i}].factor", c, "a real number", -np.inf), law)
            for i, (c, law) in enumerate(parts)
        )
        for factor, law in _terms(self, 1.0):
            if isinstance(law, Wishart):
                real("wishart.kappa0", law.kappa0, "kappa0 > 0 (a scalar in a free sum)", 0.0)
            elif isinstance(law, PowerLaw) and is_concrete(factor) and not bool(jnp.all(factor != 0)):
                raise SettingError("free_sum.parts has a power law with factor = 0.0; allowed: any other real number")
        self.form()

    @property
    def mean(self):
        return sum(p.factor * p.law.mean for p in self.parts)

    @property
    def variance(self):
        return sum(p.factor**2 * p.law.variance for p in self.parts)


def _terms(law: BaseLaw, factor: Any) -> list[tuple[Any, BaseLaw]]:
    """The terms of nested free sums, (factor, law) each."""
    if isinstance(law, FreeSum):
        return [t for p in law.parts for t in _terms(p.law, factor * p.factor)]
    return [(factor, law)]


def _form(law: BaseLaw) -> Form:
    """The one explicit law among the terms, the Wisharts, and the shift by single atoms."""
    one = jnp.asarray(1.0)
    terms = _terms(law, one)
    wisharts = [(f, t.kappa0) for f, t in terms if isinstance(t, Wishart)]
    points = [f * t.mean for f, t in terms if isinstance(t, Atoms) and t.values.shape[0] == 1]
    rest = [
        (f, t) for f, t in terms if not isinstance(t, Wishart) and not (isinstance(t, Atoms) and t.values.shape[0] == 1)
    ]
    if len(rest) > 1:
        names = " and ".join(type(t).__name__ for _, t in rest)
        raise SettingError(f"free_sum.parts has {names}; allowed: at most one law other than Wishart and a single atom")
    factor, explicit = rest[0] if rest else (one, _origin())
    c = jnp.asarray([f for f, _ in wisharts] or jnp.zeros(0))
    kappa = jnp.asarray([k for _, k in wisharts] or jnp.zeros(0))
    return Form(factor, explicit, sum(points, jnp.zeros(())), c, kappa)


def _origin() -> Atoms:
    """The law of the zero matrix."""
    return Atoms(jnp.ones(1), jnp.zeros(1))
