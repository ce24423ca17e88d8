"""Activations sigma: Sym_T -> R^{T x T}, with the exact derivatives of ||sigma(Z) - t||_F^2.

Every method works on node-last arrays, (T, T, ...). Two are built in; `Custom` wraps any smooth callable.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..errors import SettingError, is_concrete
from ..math.symmetric import basis, dimension


class Activation(eqx.Module):
    """sigma, and what the inner minimisation needs of it."""

    #: Whether sigma(Z + c 11^T) = sigma(Z): the common shift is then never learned and carries no loss.
    forgets_shift: ClassVar[bool]
    #: How settings files call it.
    name: ClassVar[str]

    #: Whether row a of sigma(Z) depends on row a of Z alone; `row` is then that map.
    rowwise: ClassVar[bool] = False

    def row(self, z: Float[Array, "T *N"]) -> Float[Array, "T *N"]:
        """One row of sigma, (T, N) -> (T, N), for row-wise activations."""
        raise NotImplementedError

    @abc.abstractmethod
    def __call__(self, z: Float[Array | np.ndarray, "T T *N"]) -> Float[Array, "T T *N"]:
        """sigma(Z), (T, T, ...) -> (T, T, ...)."""

    @abc.abstractmethod
    def loss_terms(
        self, z: Float[Array, "T T *N"], target: Float[Array, "T T *N"]
    ) -> tuple[Float[Array, "*N"], Float[Array, "T T *N"], Float[Array, "T T *M"]]:
        """f = ||sigma(Z) - target||_F^2 with its derivatives in the entries of Z taken as independent.

        Returns `(f, G, H)` of shapes (N,), (T, T, N) and, for row-wise activations, (T, T, T, N):
        H[a, b, c] = d2f / dZ_ab dZ_ac. In general H is (T, T, T, T, N).
        """

    def gauss_newton(
        self, z: Float[Array, "T T *N"], target: Float[Array, "T T *N"]
    ) -> tuple[Float[Array, "T T *N"], Float[Array, "T T *M"]]:
        """`(G, H)` with the H of Gauss and Newton, which is that of labels that z fits: positive semidefinite."""
        return self.loss_terms(z, target)[1], self.loss_terms(z, self(z))[2]


class Softmax(Activation):
    """softmax(beta Z), row by row. `beta > 0` is the inverse temperature (a differentiable leaf); None, in fine-tuning
    alone, is that of pre-training, and 1 where it has none."""

    beta: Any = eqx.field(default=1.0, converter=lambda x: None if x is None else jnp.asarray(x, dtype=float))
    forgets_shift = True
    name = "softmax"
    rowwise = True

    @property
    def _scale(self):
        return 1.0 if self.beta is None else self.beta

    def row(self, z):
        return jax.nn.softmax(self._scale * z, axis=0)

    def __call__(self, z):
        return jax.nn.softmax(self._scale * z, axis=1)

    def loss_terms(self, z, target):
        p, r, s = self._residuals(z, target)
        return jnp.sum(r * r, axis=(0, 1)), 2 * self._scale * p * s, self._hessian(p, s + p)

    def gauss_newton(self, z, target):
        p, _, s = self._residuals(z, target)
        return 2 * self._scale * p * s, self._hessian(p, p)

    def _residuals(self, z, target):
        """p = sigma(z), r = p - target and s_c = r_c - r . p."""
        p = self(z)
        r = p - target
        return p, r, r - jnp.sum(p * r, axis=1, keepdims=True)

    def _hessian(self, p, t):
        """With t = s + p, or t = p where labels are fitted,

        dG_c/dZ_d = 2 beta^2 [ p_c delta_cd t_c - p_c p_d (t_c + t_d - p . p) ].
        """
        pi = jnp.sum(p * p, axis=1, keepdims=True)
        pp = p[:, :, None] * p[:, None, :]
        off = pp * (t[:, :, None] + t[:, None, :] - pi[:, :, None])
        eye = jnp.eye(len(p))[(None, ...) + (None,) * (p.ndim - 2)]
        return 2 * self._scale**2 * (eye * (p * t)[:, :, None] - off)


class Identity(Activation):
    """The rescaled identity sigma(Z) = Z / T."""

    forgets_shift = False
    name = "identity"
    rowwise = True

    def row(self, z):
        return z / z.shape[0]

    def __call__(self, z):
        return z / z.shape[0]

    def loss_terms(self, z, target):
        tokens = z.shape[0]
        r = z / tokens - target
        eye = jnp.eye(tokens)[(None, ...) + (None,) * (z.ndim - 2)] * (2 / tokens**2)
        h = jnp.broadcast_to(eye, (tokens, tokens, tokens, *z.shape[2:]))
        return jnp.sum(r * r, axis=(0, 1)), 2 * r / tokens, h


class Custom(Activation):
    """Any smooth callable on one T x T matrix, `fn(Z) -> (T, T)`; derivatives are taken by JAX.

    `fn` may be a plain function or a pytree (for instance an `equinox.Module`) whose array leaves
    are then differentiable inputs of the theory. Slower than the built-in activations.
    """

    fn: Any = eqx.field(converter=lambda f: f if not _is_plain(f) else jax.tree_util.Partial(f))
    forgets_shift = False  # true of no general map; costs nothing but two idle dimensions where it is
    name = "custom"

    def __call__(self, z):
        if z.ndim == 2:
            return self.fn(z)
        return jax.vmap(self.fn, in_axes=-1, out_axes=-1)(z)

    def loss_terms(self, z, target):
        def loss(z, t):
            return jnp.sum((self.fn(z) - t) ** 2)

        def one(z, t):
            return loss(z, t), jax.grad(loss)(z, t), jax.hessian(loss)(z, t)

        return jax.vmap(one, in_axes=-1, out_axes=(0, -1, -1))(z, target)


def _is_plain(f: Callable) -> bool:
    """A function without array leaves of its own: jax would not accept it as a pytree leaf."""
    return not isinstance(f, (eqx.Module, jax.tree_util.Partial))


def revealed(activation: Activation, tokens: int) -> Float[Array, ""]:
    """n_eff = T (T+1), less 2 where sigma hides the common shift of Z: twice the dimensions of Z that a label tells.

    Raises `SettingError` for an activation of one's own that hides more, or is not monotone and may do so; NaN, with
    no derivative, where it is traced.
    """
    n_eff = tokens * (tokens + 1.0)
    if not isinstance(activation, Custom):
        return jnp.asarray(n_eff - 2 * activation.forgets_shift)
    found = n_eff - 2 * _hidden(jax.lax.stop_gradient(activation), tokens)
    if is_concrete(found) and not jnp.isfinite(found):
        raise SettingError(
            f"pretraining.activation = {activation.fn} hides more of Z than its common shift, or is not monotone; "
            "allowed in Bayes-optimal limits and interpolation: softmax, identity and callables that do neither"
        )
    return found


@functools.partial(jax.jit, static_argnames="tokens")
def _hidden(activation: Activation, tokens: int):
    """Dimensions of Sym_T that sigma is blind to: 0, or 1 if that is 11^T. NaN where it is not one to one on the rest.

    A map whose Jacobian is definite (of one sign) everywhere is one to one; tried on 256 random Z.
    """
    b = basis(tokens)
    coordinates = np.random.default_rng(0).standard_normal((256, dimension(tokens)))
    jacobians = jax.vmap(jax.jacfwd(activation))(jnp.einsum("nk,kab->nab", coordinates, b))
    form = jnp.einsum("kab,nabcd,lcd->nkl", b, jacobians, b)
    form = (form + jnp.swapaxes(form, 1, 2)) / 2
    form = form * jnp.sign(jnp.trace(form[0]))
    shift = jnp.einsum("kab->k", b) / tokens
    size = jnp.max(jnp.abs(jacobians))
    blind = jnp.max(jnp.abs(jnp.sum(jacobians, (-2, -1)))) < 1e-12 * tokens**2 * size
    lowest = jnp.linalg.eigvalsh(form + blind * size * jnp.outer(shift, shift))[:, 0]
    return jnp.where(jnp.min(lowest) > 1e-12 * size, 1.0 * blind, jnp.nan)
