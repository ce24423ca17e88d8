"""What labelled examples say of the frozen map: effective noise, overlap with the labels, strength of the update.

Label pre-activations Y' = Y0 + chi* chi*^T, in orthonormal coordinates of Sym_T (all, or those that softmax does not
forget). There, means apart, all parts are isotropic, and for D -> infinity the update is independent of Y0 and Z_W:

    E Z_W^2 = 2 Q,   E Y0 Z_W = 2 M,   E Y0^2 = 2 L,  L = Q0 + delta'/2,   variance of the update 2 r* s^2

where s = |w*|^2/D is the strength of each of its r* directions. To tell it from noise, an update A = w w^T is fitted
to one half of the examples and put to the other, Y' = c Z_W + g x^T A x/D + rest, and the other way round. Then
c = M/Q, and with k_ij = Tr A_i A_j/D^2, as the two fits err independently,

    r* s^2 = g_1 k_11 g_2 k_22 / k_12,     L - M^2/Q = Var(rest)/2 - (r* s^2 - g^2 k_ii)

What Y0 has beyond Z_W, a map R, is not quite orthogonal to the update at finite D. The leading eigenvector of
s w w^T/|w|^2 + R/sqrt(D) explains (s + rho)^2 + 2 Tr R^2/D^2, rho = Tr R/D^(3/2), of which 2 s rho is no error. So
L - M^2/Q is too small by 2 Tr R^2/D^2, and by more where fits are poor: by (2 + 28 t) Tr R^2/D^2 in simulated worlds,
t = (1 - cos^2)/cos^2 of the angle between fit and update. Which share of L - M^2/Q is R, the rest being noise, is
unknown: half of it is put back, and none to all of it is in the error bar. And s is too large by rho: the trace of R is
unknown, at most D times the root of L - M^2/Q, which is in the error bar of s. What the fits miss of the update,
1 - cos^2, passes for frozen map where that has a trace: c is too large by as much of r* s Tr S/(D^(3/2) Q), which is
taken off.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize

from ..errors import SettingError
from ..model.activation import Activation, Softmax
from .law import coordinates, frame

#: Resamples of the examples that error bars come from.
RESAMPLES = 200
#: See above: what poor fits add, measured at T = 2 and 3, D = 60 to 200, three sizes of label noise.
_AMPLIFIED = 28.0
#: Cosine of two fits above which they see the same update.
_SEEN = 0.15


class Moments(NamedTuple):
    """Of labels and frozen map, per entry in units of (1 + delta_ab): `label_size` L, `overlap` M, `norm` Q, and the
    `strength` s of the update, NaN where the examples do not show it."""

    label_size: float
    overlap: float
    norm: float
    strength: float

    @property
    def best_scale(self) -> float:
        """M/Q, the b of least effective noise."""
        return self.overlap / self.norm

    def effective_noise(self, b: float = 1.0) -> float:
        """Delta_eff = L - 2 b M + b^2 Q."""
        return self.label_size - 2 * b * self.overlap + b**2 * self.norm


class Measured(NamedTuple):
    """`Moments` of the examples, and of resamples of them (with replacement); `agreement`: the cosine of the two fits
    of the update."""

    moments: Moments
    resampled: tuple[Moments, ...]
    agreement: float

    def stderr(self, f) -> float:
        """Standard error of f(moments)."""
        return float(np.std([f(m) for m in self.resampled], ddof=1))


class _Half(NamedTuple):
    """Half of the examples: coordinates (n, N) of labels, frozen map and the update fitted to the other half."""

    label: np.ndarray
    frozen: np.ndarray
    update: np.ndarray


def measure(
    x: np.ndarray, y: np.ndarray, z: np.ndarray, Q: float, trace: float, drop_shift: bool, teacher_rank: int,
    strength: float | None = None, seed: int = 0,
) -> Measured:  # fmt: skip
    """Moments from standardised inputs (N, T, D) with label and frozen pre-activations (N, T, T); Q and the `trace`
    Tr S/D of the map are known.

    The strength is estimated unless given.
    """
    rng = np.random.default_rng(seed)
    order, D = rng.permutation(len(x)), x.shape[2]
    parts = order[::2], order[1::2]
    labels, frozen = coordinates(y, drop_shift), coordinates(z, drop_shift)
    fits = [fitted(x[p], labels[p], frozen[p], drop_shift, teacher_rank, rng) for p in parts]
    k = np.array([[np.sum((a.T @ b) ** 2) for b in fits] for a in fits]) / D**2
    agreement = float(k[0, 1] / np.sqrt(k[0, 0] * k[1, 1])) if k[0, 0] * k[1, 1] > 0 else 0.0
    halves = [
        _Half(labels[p], frozen[p], coordinates(_update(x[p], w), drop_shift))
        for p, w in zip(parts, reversed(fits), strict=True)
    ]
    seen = strength is not None or agreement > _SEEN
    missed = 1 - float(np.sqrt(max(agreement, _SEEN)))  # of the update by either fit
    power = None if strength is None else teacher_rank * strength**2

    def of(one: np.ndarray, two: np.ndarray, beyond: float, share: float) -> Moments:
        """Of the examples with these places in each half; `beyond`: the unknown trace, in units of its spread;
        `share`: the unknown one of R in L - M^2/Q."""
        (c1, g1, v1), (c2, g2, v2) = _regressed(halves[0], one), _regressed(halves[1], two)
        both = g1 * k[1, 1] * g2 * k[0, 0] / k[0, 1] if power is None and seen else power
        if both is None or not both > 0:
            return Moments(np.nan, (c1 + c2) / 2 * Q, Q, np.nan)
        slope = (c1 + c2) / 2 - float(np.sqrt(both * teacher_rank / D)) * missed * trace / Q
        least = (v1 + v2) / 2 - both + (g1**2 * k[1, 1] + g2**2 * k[0, 0]) / 2
        s = float(np.sqrt(both / teacher_rank))
        if strength is None:
            s += beyond * float(np.sqrt(max(least, 0.0) / D))
            least *= 1 + share * (2 + _AMPLIFIED * missed / (1 - missed)) / D
        return Moments(least + slope**2 * Q, slope * Q, Q, s)

    n1, n2 = (len(p) for p in parts)
    resampled = tuple(
        of(rng.integers(n1, size=n1), rng.integers(n2, size=n2), rng.standard_normal(), rng.uniform())
        for _ in range(RESAMPLES)
    )
    return Measured(of(np.arange(n1), np.arange(n2), 0.0, 0.5), resampled, agreement)


def _regressed(half: _Half, index: np.ndarray) -> tuple[float, float, float]:
    """(c, g, Var(rest)/2) of the labels on frozen map and update, all less their means."""
    a, z, u = (v[index] - v[index].mean(0) for v in half)
    rows = np.stack([z.ravel(), u.ravel()])
    gram = rows @ rows.T
    gram[1, 1] += np.finfo(float).tiny  # an update that is zero explains nothing
    c, g = np.linalg.solve(gram, rows @ a.ravel())
    return float(c), float(g), float(np.mean((a - c * z - g * u) ** 2)) / 2


def _update(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """chi chi^T (N, T, T), chi = x w/sqrt(D)."""
    chi = x @ w / np.sqrt(x.shape[2])
    return chi @ chi.swapaxes(1, 2)


def fitted(x, label, frozen, drop_shift: bool, rank: int, rng: np.random.Generator) -> np.ndarray:
    """w (D, rank) of least squares of the labels less c Z_W, with a ridge of the size of what is to be explained.

    From the leading eigenvectors of sum_ab (Y' - c Z_W)_ab x_a x_b^T, by L-BFGS.
    """
    _, tokens, D = x.shape
    basis = frame(tokens, drop_shift)
    a, z = label - label.mean(0), frozen - frozen.mean(0)
    a = a - np.sum(a * z) / np.sum(z * z) * z
    ridge = float(np.mean(a**2))
    mixed = np.einsum("nk,kab->nab", a, basis) @ x
    lead = np.einsum("nad,nae->de", x, mixed)
    start = np.linalg.eigh((lead + lead.T) / 2)[1][:, -rank:] * np.sqrt(D)
    start = start + 0.01 * rng.standard_normal(start.shape)

    def loss(flat: np.ndarray) -> tuple[float, Any]:
        w = flat.reshape(D, rank)
        chi = x @ w / np.sqrt(D)
        u = coordinates(chi @ chi.swapaxes(1, 2), drop_shift)
        gap = u - u.mean(0) - a
        slope = 4 * np.einsum("nk,kab->nab", gap, basis) @ chi
        back = np.einsum("nad,nar->dr", x, slope) / np.sqrt(D)
        return float(np.sum(gap**2) + ridge * np.sum(w**2)), (back + 2 * ridge * w).ravel()

    return minimize(loss, start.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 200}).x.reshape(D, rank)


def label_preactivations(labels: np.ndarray, activation: Activation, kind: str = "auto") -> tuple[np.ndarray, float]:
    """Symmetric Y' (N, T, T) from labels, and the share of their squared deviations that is antisymmetric, lost.

    `kind` "attention": rows of softmax(beta Y'), of which the common shift of Y' cannot be had back and is left out;
    "preactivation": Y' itself; "auto": attention where all entries are positive and all rows sum to one.
    """
    if kind not in ("auto", "attention", "preactivation"):
        raise SettingError(f"labels_are = {kind!r} is unknown; allowed: auto, attention, preactivation")
    rows = np.allclose(labels.sum(-1), 1, atol=1e-3) and labels.min() >= 0
    if kind == "attention" and not rows:
        raise SettingError("labels are not attention: rows that sum to one, of numbers that are not negative")
    if kind == "auto" and rows:
        kind = "attention"
    y = labels
    if kind == "attention":
        if not isinstance(activation, Softmax):
            raise SettingError("labels are attention, rows that sum to one; allowed with softmax only")
        if labels.min() <= 0:
            raise SettingError(
                "labels have zeros, as a causal mask leaves them; allowed: attention that is positive everywhere"
            )
        y = np.log(labels) / float(activation.beta)
        # Each row is known up to a constant: the one that makes the whole as symmetric as it can be.
        gap = y.swapaxes(1, 2) - y
        y = y + gap.mean(2)[:, :, None]
        y = y - y.mean((1, 2), keepdims=True)
    symmetric = (y + y.swapaxes(1, 2)) / 2
    size = np.sum((y - y.mean()) ** 2)
    return symmetric, float(np.sum((y - symmetric) ** 2) / size) if size > 0 else 0.0
