"""Gaussian expectations: scrambled Sobol nodes in independent replicas, with moment-matched weights.

A node set is deterministic for a given seed, so a discretised expectation is an ordinary smooth function and
implicit differentiation of the discretised theory is exact. Each replica is an independent, unbiased estimate
of the same expectation: the spread over replicas is the quadrature error bar.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from scipy.special import ndtri
from scipy.stats import qmc


class Nodes(NamedTuple):
    """Standard normal nodes (dimension, N) and weights (N,); replica r owns the r-th block of N/replicas nodes."""

    normal: Any
    weight: Any


@functools.lru_cache(maxsize=16)
def gaussian_nodes(dimension: int, nodes: int, replicas: int, seed: int, stream: int = 0) -> Nodes:
    """Scrambled Sobol nodes for E f(G), G ~ N(0, I); each replica of `nodes / replicas` nodes is scrambled apart.

    Half of a replica is the mirror image of the other half, so odd functions are integrated exactly; the weights
    make all second moments exact as well (least change of the uniform weights: a quadratic control
    variate, with its coefficients fitted once and for all functions). Weights of a replica sum to one.
    """
    per = nodes // replicas
    blocks, weights = [], []
    for child in np.random.SeedSequence([seed, stream]).spawn(replicas):
        sobol = qmc.Sobol(dimension, scramble=True, bits=52, rng=np.random.default_rng(child))
        half = ndtri(np.clip(sobol.random(per // 2), 2.0**-53, 1 - 2.0**-53))
        blocks.append(np.concatenate([half, -half]).T)
        half_weight = _matched_weights(half)
        weights.append(np.concatenate([half_weight, half_weight]) / 2)
    return Nodes(np.concatenate(blocks, 1), np.concatenate(weights))


def _matched_weights(x: np.ndarray) -> np.ndarray:
    """Weights nearest to 1/n for which 1 and all products x_i x_j have their Gaussian expectations."""
    n, d = x.shape
    i, j = np.triu_indices(d)
    features = np.concatenate([np.ones((n, 1)), x[:, i] * x[:, j] - (i == j)], 1)
    target = np.zeros(features.shape[1])
    target[0] = 1.0
    if features.shape[1] > n / 4:  # too few nodes to afford the constraints: only normalise
        return np.full(n, 1.0 / n)
    gap = target - features.mean(0)
    coefficients = np.linalg.lstsq(features.T @ features / n, gap, rcond=None)[0]
    return (1.0 + features @ coefficients) / n


def replicas_of(nodes: Nodes, replicas: int) -> Nodes:
    """The same nodes with a leading replica axis: (replicas, dimension, n) and (replicas, n)."""
    d = nodes.normal.shape[0]
    return Nodes(nodes.normal.reshape(d, replicas, -1).swapaxes(0, 1), nodes.weight.reshape(replicas, -1))
