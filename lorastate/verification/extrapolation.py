"""From training at several D to infinite D: the law x(D) = limit + slope / D^power, fitted to means over runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy.special import chdtrc

#: The law is given up from the smallest D on where its chi-squared is less likely than this.
_UNLIKELY = 0.01


class Law(NamedTuple):
    """limit + slope / D^power with standard errors, chi-squared, its degrees of freedom and how likely a larger one is
    (1 where two D leave none), the smallest D that the law holds from, and the power."""

    limit: float
    limit_error: float
    slope: float
    slope_error: float
    chi2: float
    freedom: int
    likelihood: float
    smallest: int
    power: float


class Points(NamedTuple):
    """Means over the runs at every D, ascending, with standard errors."""

    size: np.ndarray
    mean: np.ndarray
    bar: np.ndarray


def points(runs: Mapping[int, np.ndarray]) -> Points | None:
    """From {D: values}, without those D that have one run only; None where fewer than two are left."""
    known = {d: np.asarray(runs[d], float) for d in sorted(runs) if len(runs[d]) > 1}
    if len(known) < 2:
        return None
    bar = scatter(known) / np.sqrt([len(x) for x in known.values()])
    return Points(np.array(list(known), float), np.array([np.mean(x) for x in known.values()]), bar)


def scatter(runs: Mapping[int, np.ndarray]) -> np.ndarray:
    """Standard deviation from run to run at every D, as one law a D^-g through all of them.

    With few runs at a D its own deviation is known to tens of per cent, and a mean that by chance has a small one would
    weigh far too much in a fit. g between 0 and 1.5 is the most likely one of Gaussian runs.
    """
    size, n = np.array(list(runs), float), np.array([len(x) - 1 for x in runs.values()], float)
    variance = np.array([np.var(x, ddof=1) for x in runs.values()])
    powers = np.linspace(0, 1.5, 61)
    a2 = np.array([np.sum(n * variance * size ** (2 * g)) / np.sum(n) for g in powers])
    with np.errstate(divide="ignore"):
        likely = -np.sum(n) * np.log(a2) / 2 + powers * np.sum(n * np.log(size))
    best = int(np.argmax(likely))
    return np.sqrt(a2[best]) * size ** -powers[best]


def _line(x, y, bar) -> tuple[np.ndarray, np.ndarray, float]:
    """(limit, slope) of y = limit + slope x by least squares, their covariance, chi-squared."""
    design = np.stack([np.ones_like(x), x], 1) / bar[:, None]
    covariance = np.linalg.inv(design.T @ design)
    found = covariance @ design.T @ (y / bar)
    return found, covariance, float(np.sum((design @ found - y / bar) ** 2))


def extrapolate(runs: Mapping[int, np.ndarray], power: float = 1.0) -> Law | None:
    """The law through {D: values of the runs there}; None where fewer than two D have two runs each.

    Corrections of higher order may show at small D: the smallest ones are left out, one by one, as long as chi-squared
    is unlikely and three others are left.
    """
    known = points(runs)
    if known is None:
        return None
    size, mean, bar = known
    bar = np.maximum(bar, 1e-12 * np.max(np.abs(mean)) + 1e-300)  # what is the same in every run
    for k in range(max(len(size) - 2, 1)):
        found, covariance, chi2 = _line(size[k:] ** -power, mean[k:], bar[k:])
        freedom = len(size) - k - 2
        likelihood = float(chdtrc(freedom, chi2)) if freedom else 1.0
        if likelihood > _UNLIKELY:
            break
    error = np.sqrt(np.diag(covariance))
    limit, slope = map(float, found)
    limit_error, slope_error = map(float, error)
    return Law(limit, limit_error, slope, slope_error, chi2, freedom, likelihood, int(size[k]), power)


def rate(runs: Mapping[int, np.ndarray], limit: float) -> tuple[float, float]:
    """g and its standard error where mean - limit falls as D^-g, from the D at which it is at least three of its
    standard errors; NaN where there are fewer than two."""
    known = points(runs)
    if known is None or not math.isfinite(limit):
        return math.nan, math.nan
    gap = known.mean - limit
    seen = np.abs(gap) > 3 * known.bar
    if np.sum(seen) < 2 or len(set(np.sign(gap[seen]))) > 1:
        return math.nan, math.nan
    relative = (known.bar / np.abs(gap))[seen]
    found, covariance, _ = _line(np.log(known.size[seen]), np.log(np.abs(gap[seen])), relative)
    return float(-found[1]), float(np.sqrt(covariance[1, 1]))
