"""Whether the frozen pre-activations of a layer follow the law that the theory assumes of them.

The theory: the coordinates of Z_W in an orthonormal basis of Sym_T are independent, Gaussian, of mean zero and variance
2 Q (softmax: those orthogonal to the common shift, which it forgets). A finite layer comes near that. The test is
against standard Gaussian tokens in the same layer, as many and standardised in the same way.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.stats import norm

from ..math.symmetric import basis, complement
from .tokens import Standard, standard_of

#: Most inputs that the test looks at, and samples of Gaussian tokens that it compares with.
_INPUTS, _SAMPLES = 2000, 199
#: The largest departures that still count as nearly Gaussian.
NEARLY = {"mean": 0.1, "size": 0.1, "shape": 0.03, "correlation": 0.1}


class Law(NamedTuple):
    """The law of Z_W against that of the theory.

    `departures`: largest |mean| of a coordinate over its standard deviation sqrt(2 Q); |log| of the mean square over
    2 Q; Kolmogorov-Smirnov distance of all coordinates, scaled to unit mean square, from a Gaussian; largest
    correlation of two of them. `expected`: what Gaussian tokens in this layer have of each, on average. `p_value`: how
    often one of theirs is as far out as the worst of these (Bonferroni over the four). `verdict`: "Gaussian" where that
    happens at all, else "nearly Gaussian" where all departures are below `NEARLY`, or "not Gaussian".
    """

    departures: dict[str, float]
    expected: dict[str, float]
    p_value: float
    verdict: str


def preactivation(x: np.ndarray, S: np.ndarray) -> np.ndarray:
    """Z_ab = (x_a^T S x_b - delta_ab Tr S)/sqrt(D), (N, T, T), of inputs (N, T, D); S (D, D), or (D,) of a diagonal."""
    moved, trace = (x * S, S.sum()) if S.ndim == 1 else (x @ S, np.trace(S))
    return (np.matmul(moved, x.swapaxes(1, 2)) - trace * np.eye(x.shape[1])) / np.sqrt(x.shape[2])


def frame(tokens: int, drop_shift: bool) -> np.ndarray:
    """An orthonormal basis (n, T, T) of Sym_T, or of what is orthogonal to the common shift."""
    return np.einsum("jk,kab->jab", complement(tokens, drop_shift), basis(tokens))


def coordinates(z: np.ndarray, drop_shift: bool) -> np.ndarray:
    """Orthonormal coordinates (N, n) of the symmetric part of matrices (N, T, T), without the common shift if asked."""
    return np.einsum("nab,kab->nk", z, frame(z.shape[-1], drop_shift))


def law_of(x: np.ndarray, S: np.ndarray, standard: Standard, Q: float, drop_shift: bool, seed: int = 0) -> Law:
    """The law of the pre-activations of standardised inputs x (N, T, D) under the standardised map S (D, D)."""
    x = x[:_INPUTS]
    tokens, dimension = x.shape[1:]
    seen = _departures(coordinates(preactivation(x, S), drop_shift), Q)
    rng = np.random.default_rng(seed)
    # Gaussian tokens look the same in every frame, and so do means and covariances taken out of them.
    S = S if standard.kind == "diagonal" else np.linalg.eigvalsh(S)

    def sample() -> np.ndarray:
        drawn = rng.standard_normal((len(x) * tokens, dimension))
        drawn = standard_of(drawn, standard.kind).tokens(drawn) if _possible(standard, drawn) else drawn
        return _departures(coordinates(preactivation(drawn.reshape(x.shape), S), drop_shift), Q)

    null = np.array([sample() for _ in range(_SAMPLES)])
    p = (1 + np.sum(null >= seen, 0)) / (1 + _SAMPLES)
    worst = min(1.0, float(p.min()) * len(seen))
    names = tuple(NEARLY)
    departures = dict(zip(names, map(float, seen), strict=True))
    if worst > len(seen) / (1 + _SAMPLES):  # the least that so many samples can say
        verdict = "Gaussian"
    else:
        verdict = "nearly Gaussian" if all(departures[k] <= NEARLY[k] for k in names) else "not Gaussian"
    return Law(departures, dict(zip(names, map(float, null.mean(0)), strict=True)), worst, verdict)


def _possible(standard: Standard, drawn: np.ndarray) -> bool:
    """Whether so few tokens can be standardised as all of them were."""
    return standard.kind != "full" or len(drawn) >= 2 * drawn.shape[1]


def _departures(y: np.ndarray, Q: float) -> np.ndarray:
    """The four departures of coordinates (N, n), in the order of `NEARLY`."""
    scale = np.sqrt(2 * Q)
    size = np.sqrt(np.mean(y**2))
    spread = np.sort((y / size).ravel())
    steps = np.arange(len(spread) + 1) / len(spread)
    gap = norm.cdf(spread)
    shape = max(np.max(steps[1:] - gap), np.max(gap - steps[:-1]))
    moments = y.T @ y / len(y)
    cosines = moments / np.sqrt(np.outer(np.diag(moments), np.diag(moments)))
    off = np.abs(cosines - np.diag(np.diag(cosines))).max() if len(cosines) > 1 else 0.0
    return np.array([np.abs(y.mean(0)).max() / scale, abs(2 * np.log(size / scale)), shape, off])
