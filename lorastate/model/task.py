"""The pre-training task: another base map than the one that fine-tuning needs.

    S_pre = a S* + c S_perp

S* is the base map of fine-tuning, S_perp an independent Wishart matrix of rank ratio kappa_perp. R-transforms add: the
law of S_pre is a free sum (`lorastate.model.spectra.laws`). What the learned map shares with S* is a derivative of the
potential of pre-training, M_down = Tr(S_hat S*)/D = (2/m^) dPsi/da. a = 1, c = 0 is pre-training on S* itself.
Source: arXiv:2606.05899, extended.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.numpy as jnp

from ..errors import SettingError, is_concrete
from ..validation import real
from .spectra.laws import BaseLaw, FreeSum, Wishart


class Task(eqx.Module):
    """S_pre = a S* + c S_perp; `a` >= 0 (share of the base map that fine-tuning needs), `c` >= 0 (of an unrelated one),
    `kappa_perp` > 0 (rank of the unrelated one / D). All three are differentiable; a = c = 0 is refused."""

    a: Any = 1.0
    c: Any = 0.0
    kappa_perp: Any = 1.0

    def __init__(self, a=1.0, c=0.0, kappa_perp=1.0):
        self.a = real("pretraining.task.a", a, "a >= 0", 0.0, closed=True)
        self.c = real("pretraining.task.c", c, "c >= 0", 0.0, closed=True)
        self.kappa_perp = real("pretraining.task.kappa_perp", kappa_perp, "kappa_perp > 0", 0.0)
        if is_concrete(a) and is_concrete(c) and float(a) == 0 and float(c) == 0:
            raise SettingError(
                "pretraining.task.a = 0 and pretraining.task.c = 0 leave nothing to learn; allowed: one of them > 0"
            )

    def law(self, base: BaseLaw) -> BaseLaw:
        """Law of S_pre, from that of S*."""
        return FreeSum([(self.a, base), (self.c, Wishart(self.kappa_perp))])

    def best_overlap(self, base: BaseLaw, delta) -> Any:
        """Tr(E[S* | A]^2)/D for A = S_pre + delta Z: what the best estimate of S* from noisy S_pre keeps of it.

        The estimate shares its eigenvectors with A; its eigenvalue at x is Im[g r(g)] / Im g, where g = g(x + i0) and
        a r(g) = R-transform of a S*, since Tr(a S* (z - A)^{-1}) = g R(g) for a free part of a sum. `base` Wishart.
        """
        if not isinstance(base, Wishart):
            raise SettingError("the Bayes-optimal limits with a task need a Wishart base map; allowed: kappa0")
        law = self.law(base)
        nodes = law.band_nodes(delta, 256)
        g = law.stieltjes(nodes.x, jnp.asarray(delta)[..., None])
        root = jnp.sqrt(base.kappa0)
        kept = jnp.imag(g * base.kappa0 / (root - self.a * g)) / jnp.where(jnp.imag(g) == 0, 1.0, jnp.imag(g))
        return jnp.sum(nodes.w * kept**2, -1)

    def common(self, base: BaseLaw) -> Any:
        """Tr(S* S_pre)/D = a Tr S*^2/D + c (Tr S*/D)(Tr S_perp/D)."""
        return self.a * base.second_moment + self.c * base.mean * jnp.sqrt(self.kappa_perp)
