"""Active fine-tuning: inputs that the frozen map makes least of, out of a pool."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import gammainc, gammaln

from ...errors import SettingError
from ...math.symmetric import complement, dimension, to_matrix
from ...validation import real
from .fields import Fields, Moments, field_dimension, root, standard_fields
from .inputs import Inputs


class Selected(Inputs):
    """Active fine-tuning: of a pool of `pool` D fresh inputs the fraction `rho` with the lowest score is labelled.

    alpha' = rho pool. `score` "frobenius": ||Z_W||_F^2 / (2 Q), chi-squared with n = T(T+1)/2 degrees of freedom;
    "without_shift" (softmax): without the component along 11^T, which softmax forgets, n - 1 of them. Z_W has a
    radius from the chi-squared law below its rho-quantile and a uniform direction, and Y0 follows given Z_W.
    """

    rho: Any
    pool: Any
    score: str = eqx.field(static=True)
    name = "selected"
    numbers = ("rho", "pool")
    options = ("rho", "pool", "score")

    def __init__(self, rho, pool, score="frobenius"):
        self.rho = real("finetuning.rho", rho, "0 < rho <= 1", 0.0, high=1.0)
        self.pool = real("finetuning.pool", pool, "pool > 0 (inputs in the pool / D)", 0.0)
        if score not in ("frobenius", "without_shift"):
            raise SettingError(f'finetuning.score = {score!r} is unknown; allowed: "frobenius", "without_shift"')
        self.score = score

    @property
    def alpha(self):
        """Labelled inputs / D, rho pool."""
        return self.rho * self.pool

    def check(self, pre, fine):
        if self.score == "without_shift" and not fine.activation.forgets_shift:
            raise SettingError(
                f"finetuning.score = 'without_shift' has no meaning for the {fine.activation.name} activation; "
                "allowed: softmax only, or score = 'frobenius'"
            )

    def _scored(self, tokens) -> int:
        """Degrees of freedom of the score."""
        return dimension(tokens) - (self.score == "without_shift")

    def dimension(self, tokens, drop_shift):
        return self._scored(tokens) + field_dimension(tokens, drop_shift, 1)

    def search(self, frozen, tokens, drop_shift, normal, previous=None):
        if previous is not None:
            return previous  # depends on the nodes and on rho alone
        n = self._scored(tokens)
        share = gammainc(n / 2, jnp.sum(normal[:n] ** 2, 0) / 2)
        return jnp.stack([share, quantile(n / 2, jax.lax.stop_gradient(self.rho) * share)])

    def fields(self, frozen, delta, tokens, drop_shift, normal, found=None):
        n = self._scored(tokens)
        z, rest = normal[:n], normal[n:]
        share, radius = found
        radius = attach_quantile(n / 2, self.rho * share, radius)
        z = z * jnp.sqrt(2 * radius / jnp.sum(z * z, 0))
        M, Q, size = frozen.overlap, frozen.norm, frozen.Q0 + delta / 2
        e = complement(tokens, self.score == "without_shift")
        zw = jnp.sqrt(2 * jnp.maximum(Q, 1e-20)) * to_matrix(e.T @ z)
        (noise,) = standard_fields(rest, tokens, drop_shift, 1)
        return Fields(_slope(M, Q) * zw + root(size - M * _slope(M, Q)) * noise, zw)

    def moments(self, frozen, delta, tokens, drop_shift):
        """E Z_W^2 = s Q, E Y0 Z_W = s M, E Y0^2 = Q0 + delta'/2 - (1 - s) M^2/Q, with s = P(n/2 + 1, y)/rho at the
        rho-quantile y of the Gamma(n/2) law, P its regularised incomplete gamma function."""
        half = self._scored(tokens) / 2
        edge = attach_quantile(half, self.rho, quantile(half, jax.lax.stop_gradient(self.rho)))
        # E |z|^2 given |z|^2 <= edge, over n: the chi-squared law with n + 2 degrees of freedom.
        shrink = gammainc(half + 1, edge) / self.rho
        M, Q = frozen.overlap, frozen.norm
        yy = frozen.Q0 + delta / 2 + (shrink - 1) * M * _slope(M, Q)
        return Moments(yy, shrink * M, shrink * Q)


def _slope(M, Q):
    """M / Q, zero for a map that is zero."""
    live = Q > 1e-12
    return jnp.where(live, M / jnp.where(live, Q, 1.0), 0.0)


def quantile(a, p):
    """y with gammainc(a, y) = p, for 0 < p < 1 (any shape; p = 1 is cut to 1 - 1e-15), without derivative.

    Newton's method on log P in log y, which is concave and increasing: from the left it climbs monotonically.
    """
    p = jnp.clip(p, 1e-300, 1 - 1e-15)
    t = (jnp.log(p) + gammaln(a + 1)) / a  # P <= y^a / Gamma(a + 1)

    def body(_, t):
        y = jnp.exp(t)
        P = gammainc(a, y)
        slope = jnp.exp(a * t - y - gammaln(a)) / P
        return t + jnp.clip((jnp.log(p) - jnp.log(P)) / slope, -1.0, 1.0)

    return jnp.exp(jax.lax.fori_loop(0, 60, body, t))


@jax.custom_jvp
def attach_quantile(a, p, y):
    """Returns `y`, the p-quantile of the Gamma(a) law, and gives it its derivative dp / density in p."""
    return y


@attach_quantile.defjvp
def _attach_quantile_jvp(primals, tangents):
    a, p, y = primals
    y = attach_quantile(a, p, y)
    density = jnp.exp((a - 1) * jnp.log(y) - y - gammaln(a))
    return y, tangents[1] / density
