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
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import gammainc, gammaln

from ...errors import SettingError, is_concrete, succeeded
from ...math.symmetric import complement, dimension, to_coordinates, to_matrix
from ...validation import real
from ..activation import Custom, Identity, revealed
from ..proximal import MapProblem, attach_minimum, locate_lowest, polish


class FrozenMap(NamedTuple):
    """What pre-training leaves behind: `overlap` M of the map with S*, its `norm` Q, and `Q0` of S*.

    Where its training inputs matter as well: `response` V, `label_size` Q0 + delta/2 and `activation` of pre-training,
    and, where that was on another task, `label_overlap` of the map with S_pre and `common` = Tr(S* S_pre)/D.
    """

    overlap: Any
    norm: Any
    Q0: Any
    response: Any = None
    label_size: Any = None
    activation: Any = None
    label_overlap: Any = None
    common: Any = None

    def scaled(self, b) -> FrozenMap:
        """The map b S as test inputs see it: (M, Q) -> (b M, b^2 Q)."""
        return self._replace(overlap=b * self.overlap, norm=b**2 * self.norm)


class Fields(NamedTuple):
    """Samples of the channel, (T, T, N) each: label pre-activation `y0` and frozen pre-activation `zw`."""

    y0: Any
    zw: Any


class Moments(NamedTuple):
    """E Y0^2, E Y0 Z_W, E Z_W^2 per entry, in units of (1 + delta_ab)."""

    yy: Any
    yz: Any
    zz: Any

    def effective_noise(self, b: Any = 1.0):
        """Variance of Y0 - b Z_W."""
        return self.yy - 2 * b * self.yz + b**2 * self.zz

    @property
    def best_scale(self):
        """The b that minimises it; 1 for a map that is zero."""
        live = self.zz > 1e-12
        return jnp.where(live, self.yz / jnp.where(live, self.zz, 1.0), 1.0)


def standard_fields(normal, tokens: int, drop_shift: bool, count: int = 2):
    """`count` independent GOE(T) fields of entry variance (1 + delta_ab), (T, T, N), from (count n_eff, N) nodes."""
    e = complement(tokens, drop_shift)
    n = len(e)
    # sqrt(2) times orthonormal standard-normal coordinates is GOE(T) of variance 1.
    return tuple(to_matrix(jnp.sqrt(2.0) * (e.T @ normal[k * n : (k + 1) * n])) for k in range(count))


def field_dimension(tokens: int, drop_shift: bool, count: int = 2) -> int:
    """Number of normal coordinates that `standard_fields` takes."""
    return count * len(complement(tokens, drop_shift))


def _root(square):
    """sqrt of a variance that may be zero: then what it multiplies vanishes, and nothing is divided by it."""
    return jnp.sqrt(jnp.maximum(square, 1e-20))


class Inputs(eqx.Module):
    """Where the fine-tuning inputs come from. Whatever a subclass leaves out is that of fresh inputs."""

    #: How settings files call it, and the keys that belong to it: those that are numbers, and all.
    name: ClassVar[str]
    numbers: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[tuple[str, ...]] = ()
    #: Whether fine-tuning is on the map that pre-training learns: it fails where that does.
    needs_map: ClassVar[bool] = True

    def freeze(self, pre, order, downstream: Any = None) -> FrozenMap:
        """The frozen map from pre-training and its order parameters; `downstream` = M_down if it was on a task."""
        size = pre.label_size
        overlap = order.overlap if downstream is None else downstream
        given = FrozenMap(overlap, order.norm(size), pre.downstream_Q0, order.response, size, pre.activation)
        return given._replace(label_overlap=order.overlap, common=pre.common)

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

    def search(self, frozen: FrozenMap, tokens: int, drop_shift: bool, normal, previous: Any = None) -> Any:
        """What `fields` needs and only a search can find, (..., N), without derivative; None if there is no such thing.

        With `previous`, found for a map very near this one, it is only brought up to date.
        """

    @abc.abstractmethod
    def fields(self, frozen: FrozenMap, delta, tokens: int, drop_shift: bool, normal, found: Any = None) -> Fields:
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
        noise = _root(frozen.norm - frozen.overlap**2 / size)
        return Fields(y0, frozen.overlap / size * y0 + noise * two)

    def moments(self, frozen, delta, tokens, drop_shift):
        return Moments(frozen.Q0 + delta / 2, frozen.overlap, frozen.norm)


class BayesOptimal(Fresh):
    """Fresh inputs on the Bayes-optimal map of the same pre-training data: M = Q = Q_BO."""

    name = "bayes_optimal"
    needs_map = False

    def check(self, pre, fine):
        revealed(pre.activation, pre.tokens)

    def freeze(self, pre, order, downstream=None):
        from ...bayes.pretraining import bayes_optimal_pretraining

        best = bayes_optimal_pretraining(pre)
        Q = jnp.where(succeeded(best.code), best.Q_down, jnp.nan)
        return FrozenMap(Q, Q, pre.downstream_Q0)


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
        noise = _root(frozen.norm - of_label**2 / size)
        omega = of_label / size * y + noise * fields[1]
        if self._same_label:
            return y, y, omega
        along = (frozen.overlap - of_label / size * yy_old) / noise
        rest = _root(yy - yy_old**2 / size - along**2)
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
        return Fields(_slope(M, Q) * zw + _root(size - M * _slope(M, Q)) * noise, zw)

    def moments(self, frozen, delta, tokens, drop_shift):
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


#: Channels by the name that settings files use.
CHANNELS: dict[str, type[Inputs]] = {kind.name: kind for kind in (Fresh, Reused, Mixed, Selected, BayesOptimal)}


def homes(key: str) -> str:
    """The channels that an option belongs to, for messages."""
    return " or ".join(f'"{kind.name}"' for kind in CHANNELS.values() if key in kind.options)


class Recalibration(eqx.Module):
    """Factor b on the frozen map, Z_W -> b Z_W (W -> sqrt(b) W), at training and at test time."""

    @abc.abstractmethod
    def factor(self, moments: Moments):
        """b, from the moments of the channel before."""


class FixedScale(Recalibration):
    """b itself (a differentiable leaf)."""

    b: Any

    def factor(self, moments):
        return self.b


class LeastNoise(Recalibration):
    """The b that minimises Delta_eff on the fine-tuning inputs: E Y0 Z_W / E Z_W^2, on fresh inputs M / Q."""

    def factor(self, moments):
        return moments.best_scale


class LeastError(Recalibration):
    """The b that minimises E'. It is found by `predict` and `gradient`, which put a `FixedScale` in its place."""

    def factor(self, moments):
        raise SettingError(
            "finetuning.recalibration = 'error' needs a search over b; allowed here: a number or 'noise' (predict and "
            "gradient, outside of jit, do the search)"
        )


#: The two that are not numbers, by the name that settings files use.
RECALIBRATIONS: dict[str, type[Recalibration]] = {"noise": LeastNoise, "error": LeastError}
