"""The frozen-map channel: the joint law of (Y0, Z_W) on a fine-tuning input.

This law is everything that LoRA sees of pre-training (Y0 = Z* + Xi' is the label pre-activation without the LoRA
teacher, Z_W the pre-activation of the frozen map), and the only interface between the two stages. A channel is a
small `Inputs` object that turns standard normal nodes into samples of it; a `Recalibration` then rescales Z_W. At test
time inputs are always fresh.

    Fresh           inputs that pre-training has not seen
    Reused          inputs of the pre-training set, with the same or with fresh label noise
    Mixed           a fraction of them reused
    Selected        the inputs of a pool on which the frozen map is smallest (active fine-tuning)
    BayesOptimal    fresh inputs, on the Bayes-optimal map instead of the learned one
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ...errors import SettingError, is_concrete
from ...math.symmetric import to_coordinates, to_matrix
from ...validation import real
from ..activation import Custom, Identity, revealed
from ..proximal import MapProblem, attach_minimum, locate_lowest, polish
from .fields import Fields, Moments, field_dimension, root, standard_fields
from .frozen_map import FrozenMap


class Inputs(eqx.Module):
    """Where the fine-tuning inputs come from. Whatever a subclass leaves out is that of fresh inputs."""

    #: How settings files call it, and the keys that belong to it: those that are numbers, and all.
    name: ClassVar[str]
    numbers: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[tuple[str, ...]] = ()
    #: Whether fine-tuning is on the map that pre-training learns: it fails where that does.
    needs_map: ClassVar[bool] = True

    def after(self, pre) -> Inputs:
        """The same inputs for fine-tuning after `pre`."""
        return self

    def check(self, pre, fine) -> None:
        """Raises `SettingError` where the two stages do not go together."""

    @property
    def keeps_noise(self) -> bool:
        """Whether the labels carry the noise of pre-training: delta' cannot then differ from delta."""
        return False

    @property
    def fresh_noise(self) -> Any:
        """Share of the inputs whose label noise the map has not seen."""
        return 1.0

    @property
    def shares(self) -> tuple:
        """Weights of the channel's parts: `fields` gives as many times the nodes."""
        return (1.0,)

    def dimension(self, tokens: int, drop_shift: bool) -> int:
        """Number of standard normal coordinates that `fields` takes."""
        return field_dimension(tokens, drop_shift)

    def search(
        self, frozen: FrozenMap, tokens: int, drop_shift: bool, normal: Float[Array, "d N"], previous: Any = None
    ) -> Any:
        """What `fields` needs and only a search can find, (..., N), without derivative; None if there is no such thing.

        With `previous`, found for a map very near this one, it is only brought up to date.
        """

    @abc.abstractmethod
    def fields(
        self, frozen: FrozenMap, delta, tokens: int, drop_shift: bool, normal: Float[Array, "d N"], found: Any = None
    ) -> Fields:
        """(Y0, Z_W) at the normal nodes (dimension, N) for label noise `delta`; `found` by `search`."""

    @abc.abstractmethod
    def moments(self, frozen: FrozenMap, delta, tokens: int, drop_shift: bool) -> Moments:
        """Second moments; for softmax on reused inputs, those that the identity would have."""


class Fresh(Inputs):
    """Inputs that pre-training has not seen: (Y0, Z_W) Gaussian, covariance [[Q0 + delta'/2, M], [M, Q]]."""

    name = "fresh"

    def fields(self, frozen, delta, tokens, drop_shift, normal, found=None):
        one, two = standard_fields(normal, tokens, drop_shift)
        size = frozen.Q0 + delta / 2
        y0 = jnp.sqrt(size) * one
        noise = root(frozen.norm - frozen.overlap**2 / size)
        return Fields(y0, frozen.overlap / size * y0 + noise * two)

    def moments(self, frozen, delta, tokens, drop_shift):
        return Moments(frozen.Q0 + delta / 2, frozen.overlap, frozen.norm)


class BayesOptimal(Fresh):
    """Fresh inputs on the Bayes-optimal map of the same pre-training data, M = Q = Q_BO
    (`lorastate.bayes.frozen_map`)."""

    name = "bayes_optimal"
    needs_map = False

    def check(self, pre, fine):
        revealed(pre.activation, pre.tokens)


def _noise_kind(value: Any) -> str:
    if value not in ("same", "fresh"):
        raise SettingError(f'finetuning.label_noise = {value!r} is unknown; allowed: "same", "fresh"')
    return value


class Reused(Inputs):
    """Inputs of the pre-training set. Z_W is then the train-time pre-activation, the minimiser over Sym_T of

        ||sigma(Z) - sigma(Y)||_F^2 + ||Z - Omega||_F^2 / (4 V)

    at the order parameters of pre-training; identity: (a Y + Omega)/(1 + a) with a = 4 V/T^2. `label_noise` "same":
    Y0 = Y; "fresh": Y0 = Z* + Xi' with noise of its own. Source: arXiv:2606.05899.
    """

    label_noise: str = eqx.field(static=True, default="same", converter=_noise_kind)
    #: Whether pre-training was on another task: its labels are then made of S_pre, those of fine-tuning of S*.
    other_task: bool = eqx.field(static=True, default=False)
    name = "reused"
    options = ("label_noise",)

    @property
    def keeps_noise(self):
        return self.label_noise == "same"

    @property
    def fresh_noise(self):
        return 1.0 - self.keeps_noise

    @property
    def _same_label(self) -> bool:
        """Whether Y0 = Y: the same noise on the same base map."""
        return self.keeps_noise and not self.other_task

    def after(self, pre):
        return Reused(self.label_noise, pre.task is not None)

    def check(self, pre, fine):
        if fine.tokens != pre.tokens:
            raise SettingError(
                f"finetuning.tokens = {fine.tokens} differs from pretraining.tokens = {pre.tokens} although inputs are "
                "reused; allowed: the same"
            )
        if isinstance(pre.activation, Custom) and fine.activation.forgets_shift:
            raise SettingError(
                f"finetuning.activation = {fine.activation.name!r} cannot follow a pre-training activation of your own "
                "where inputs are reused; allowed: one that keeps the common shift"
            )
        known = is_concrete(pre.delta) and is_concrete(fine.delta)
        if self.keeps_noise and known and float(pre.delta) != float(fine.delta):
            raise SettingError(
                f"finetuning.delta = {float(fine.delta)!r} differs from pretraining.delta = {float(pre.delta)!r} "
                'although the labels keep their noise; allowed: leave delta out, or label_noise = "fresh"'
            )

    def dimension(self, tokens, drop_shift):
        return field_dimension(tokens, drop_shift, 2 if self._same_label else 3)

    def _covariances(self, frozen, delta):
        """E Y0^2, E Y0 Y, and E Omega Y = M of pre-training; E Omega Y0 is `frozen.overlap`."""
        of_label = frozen.overlap if frozen.label_overlap is None else frozen.label_overlap
        if self._same_label:
            return frozen.label_size, frozen.label_size, of_label
        common = frozen.Q0 if frozen.common is None else frozen.common
        return frozen.Q0 + delta / 2, common + (delta / 2 if self.keeps_noise else 0.0), of_label

    def _laws(self, frozen, delta, tokens, drop_shift, normal):
        """(Y0, Y, Omega) at the nodes: jointly Gaussian; Y0 follows given the other two."""
        size, (yy, yy_old, of_label) = frozen.label_size, self._covariances(frozen, delta)
        fields = standard_fields(normal, tokens, drop_shift, 2 if self._same_label else 3)
        y = jnp.sqrt(size) * fields[0]
        noise = root(frozen.norm - of_label**2 / size)
        omega = of_label / size * y + noise * fields[1]
        if self._same_label:
            return y, y, omega
        along = (frozen.overlap - of_label / size * yy_old) / noise
        rest = root(yy - yy_old**2 / size - along**2)
        return yy_old / size * y + along * fields[1] + rest * fields[2], y, omega

    def _problem(self, frozen, y, omega) -> MapProblem:
        return MapProblem(frozen.activation, omega, frozen.activation(y), frozen.response)

    def search(self, frozen, tokens, drop_shift, normal, previous=None):
        if isinstance(frozen.activation, Identity):
            return None
        _, y, omega = self._laws(frozen, 0.0, tokens, drop_shift, normal)
        problem = jax.lax.stop_gradient(self._problem(frozen, y, omega))
        if previous is not None:
            return polish(problem, previous)
        return locate_lowest(problem, [to_coordinates(omega), to_coordinates(y)])

    def fields(self, frozen, delta, tokens, drop_shift, normal, found=None):
        y0, y, omega = self._laws(frozen, delta, tokens, drop_shift, normal)
        if isinstance(frozen.activation, Identity):
            a = _pull(frozen, tokens)
            return Fields(y0, (a * y + omega) / (1 + a))
        return Fields(y0, to_matrix(attach_minimum(self._problem(frozen, y, omega), found)))

    def moments(self, frozen, delta, tokens, drop_shift):
        """Of Y0 and Z_W = (a Y + Omega)/(1 + a), a = 4 V/T^2 (identity). With the same noise on the same task and b = 1
        they make Delta_eff = (Delta/2 + Q0 - 2 M + Q)/(1 + 4 V/T^2)^2."""
        a, (yy, yy_old, of_label) = _pull(frozen, tokens), self._covariances(frozen, delta)
        zz = (a**2 * frozen.label_size + 2 * a * of_label + frozen.norm) / (1 + a) ** 2
        return Moments(yy, (a * yy_old + frozen.overlap) / (1 + a), zz)


def _pull(frozen, tokens):
    """a = 4 V / T^2: how strongly a training label pulls its pre-activation."""
    return 4 * frozen.response / tokens**2


class Mixed(Inputs):
    """A fraction `reused_fraction` of the inputs is `Reused`, the rest `Fresh`."""

    reused_fraction: Any
    reused: Reused
    name = "mixed"
    numbers = ("reused_fraction",)
    options = ("reused_fraction", "label_noise")

    def __init__(self, reused_fraction, label_noise="same", other_task=False):
        self.reused_fraction = real("finetuning.reused_fraction", reused_fraction, "0 to 1", 0.0, True, high=1.0)
        self.reused = Reused(label_noise, other_task)

    @property
    def label_noise(self):
        return self.reused.label_noise

    @property
    def keeps_noise(self):
        return self.reused.keeps_noise

    @property
    def fresh_noise(self):
        return 1 - self.reused_fraction * self.reused.keeps_noise

    @property
    def shares(self):
        return 1 - self.reused_fraction, self.reused_fraction

    def after(self, pre):
        return Mixed(self.reused_fraction, self.label_noise, pre.task is not None)

    def check(self, pre, fine):
        self.reused.check(pre, fine)

    def dimension(self, tokens, drop_shift):
        return self.reused.dimension(tokens, drop_shift)

    def search(self, frozen, tokens, drop_shift, normal, previous=None):
        return self.reused.search(frozen, tokens, drop_shift, normal, previous)

    def _parts(self, method: str, *args):
        return tuple(getattr(part, method)(*args) for part in (Fresh(), self.reused))

    def fields(self, frozen, delta, tokens, drop_shift, normal, found=None):
        one, two = self._parts("fields", frozen, delta, tokens, drop_shift, normal, found)
        return Fields(*(jnp.concatenate(pair, -1) for pair in zip(one, two, strict=True)))

    def moments(self, frozen, delta, tokens, drop_shift):
        r = self.reused_fraction
        one, two = self._parts("moments", frozen, delta, tokens, drop_shift)
        return Moments(*((1 - r) * a + r * b for a, b in zip(one, two, strict=True)))
