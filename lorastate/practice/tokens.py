"""Token embeddings brought to what the theory assumes of them: mean zero and unit covariance.

Tokens x = mu + C^(1/2) x~ with x~ standard; the map moves with them, S~ = C^(1/2) S C^(1/2), so that x~^T S~ x~ is what
x - mu gives in the layer. The terms of a logit that are linear in mu are lost.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..errors import SettingError

#: How tokens can be standardised: what `mean` and covariance are estimated, if any.
KINDS = ("auto", "none", "diagonal", "full")
#: Tokens per entry that a covariance matrix needs.
_PER_ENTRY = 2


class Standard(NamedTuple):
    """Tokens are `mean` + `root` x~: `root` (D, D) symmetric, or (D,) of a diagonal; `kind` says how it was found."""

    kind: str
    mean: np.ndarray
    root: np.ndarray

    def tokens(self, x: np.ndarray) -> np.ndarray:
        """x~, (..., D)."""
        centred = x - self.mean
        if self.root.ndim == 1:
            return centred / self.root
        return np.linalg.solve(self.root, centred.reshape(-1, len(self.mean)).T).T.reshape(x.shape)

    def matrix(self, S: np.ndarray) -> np.ndarray:
        """S~ (D, D)."""
        if self.root.ndim == 1:
            return self.root[:, None] * S * self.root
        return self.root @ S @ self.root


def standard_of(x: np.ndarray, kind: str = "auto") -> Standard:
    """How the tokens x (n, D) are standardised.

    "none": left as they are; "diagonal": mean and variance of every entry; "full": mean and covariance matrix, which
    takes n >= 2 D tokens; "auto": none where mean and covariance are those of standard Gaussian tokens as far as n of
    them tell, else full, or diagonal where there are too few.
    """
    n, dimension = x.shape
    if kind not in KINDS:
        raise SettingError(f"standardise = {kind!r} is unknown; allowed: {', '.join(KINDS)}")
    enough = n >= _PER_ENTRY * dimension
    if kind == "auto":
        kind = "none" if looks_standard(x) else "full" if enough else "diagonal"
    if kind == "full" and not enough:
        raise SettingError(
            f"standardise = 'full' needs {_PER_ENTRY * dimension} tokens of {dimension} entries and X has {n}; "
            "allowed here: diagonal, none"
        )
    if kind == "none":
        return Standard(kind, np.zeros(dimension), np.ones(dimension))
    mean = x.mean(0)
    if kind == "diagonal":
        root = x.std(0)
        least = root.min() / max(root.max(), np.finfo(float).tiny)
    else:
        values, frame = np.linalg.eigh(np.cov(x, rowvar=False, bias=True))
        root = (frame * np.sqrt(np.maximum(values, 0))) @ frame.T
        least = np.sqrt(max(values[0], 0) / max(values[-1], np.finfo(float).tiny))
    if least < 1e-7:
        raise SettingError(
            "the tokens X do not move at all in some direction, which then has no unit; allowed: drop it from X and "
            "from the weights, or standardise = 'none'"
        )
    return Standard(kind, mean, root)


def looks_standard(x: np.ndarray) -> bool:
    """Whether mean, total variance and the largest eigenvalue of the covariance are those of n standard Gaussian
    tokens, with room for fluctuations that such a sample practically never shows."""
    n, dimension = x.shape
    mean = n * np.sum(x.mean(0) ** 2) / dimension
    total = np.mean(x**2)
    if abs(mean - 1) > 6 * np.sqrt(2 / dimension) or abs(total - 1) > 6 * np.sqrt(2 / (n * dimension)):
        return False
    edge = (1 + np.sqrt(dimension / n)) ** 2
    return np.linalg.norm(x, 2) ** 2 / n < edge + 6 * edge * min(n, dimension) ** (-2 / 3)


def map_size(S: np.ndarray, standard: Standard, n: int) -> float:
    """Q = Tr S~^2/D, without what the noise of a covariance from n tokens adds to it: (Tr S~)^2/(n D) on average."""
    dimension = len(S)
    moved = standard.matrix(S)
    Q = float(np.sum(moved**2)) / dimension
    return Q - float(np.trace(moved)) ** 2 / (n * dimension) if standard.kind == "full" else Q
