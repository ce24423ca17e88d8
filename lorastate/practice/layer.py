"""The attention layer as the theory has it: one symmetric matrix S, whatever weights it comes from.

The pre-activation of the theory is Z_ab = (x_a^T S x_b - delta_ab Tr S)/sqrt(D). It is symmetric. Logits of a layer
with separate queries and keys, x_a^T W_Q W_K^T x_b / sqrt(d), are not, and what is antisymmetric in them is lost here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ..errors import SettingError
from .files import numbers


class Layer(NamedTuple):
    """`S` (D, D); the weights that it is made of; `lost`, the share of ||A||_F^2 in the antisymmetric part of the map A
    of the logits; `negative`, the share of Tr S^2 in negative eigenvalues, of which a map W W^T has none."""

    S: np.ndarray
    source: str
    lost: float
    negative: float


def layer_of(arrays: Mapping[str, np.ndarray], dimension: int, heads: int = 1, head: int = 0) -> Layer:
    """The layer from `W` (D, P), from `S` (D, D), or from `W_Q` and `W_K` (D, columns of all heads).

    S = W W^T/sqrt(P D); of the other two the symmetric part, S of itself and sqrt(D) A for A = W_Q W_K^T/sqrt(d), d
    columns a head. D is that of the tokens. Raises `SettingError` where shapes do not agree.
    """
    given = [name for name in ("W", "S", "W_Q", "W_K") if name in arrays]
    if given not in (["W"], ["S"], ["W_Q", "W_K"]):
        have = ", ".join(given) or "none of them"
        raise SettingError(f"the weights are {have}; allowed: W alone, S alone, or W_Q and W_K")
    weights = [numbers(name, arrays[name]) for name in given]
    for name, array in zip(given, weights, strict=True):
        square = name == "S"
        if array.ndim != 2 or array.shape[0] != dimension or not array.size or (square and array.shape[1] != dimension):
            shape = f"({dimension}, {dimension})" if square else f"({dimension}, columns)"
            raise SettingError(
                f"{name} has shape {array.shape}; allowed: {shape}, as X has {dimension} entries a token"
            )
    if given == ["W"]:
        A = weights[0] @ weights[0].T / np.sqrt(weights[0].shape[1] * dimension)
    elif given == ["S"]:
        A = weights[0]
    else:
        A = np.sqrt(dimension) * _one_head(weights[0], weights[1], heads, head)
    S = (A + A.T) / 2
    size = np.sum(A**2)
    if not size > 0:
        raise SettingError(f"the map of {' and '.join(given)} is zero; allowed: weights of a layer that does something")
    values = np.linalg.eigvalsh(S)
    negative = np.sum(values[values < 0] ** 2) / max(np.sum(values**2), np.finfo(float).tiny)
    return Layer(S, " and ".join(given), float(1 - np.sum(S**2) / size), float(negative))


def _one_head(query: np.ndarray, key: np.ndarray, heads: int, head: int) -> np.ndarray:
    """W_Q W_K^T/sqrt(d) of one head; several heads of queries may share one of keys."""
    if heads < 1 or query.shape[1] % heads or not 0 <= head < heads:
        raise SettingError(
            f"head = {head} of heads = {heads} is out of range; allowed: heads that divide {query.shape[1]} columns "
            "of W_Q, head from 0 to heads - 1"
        )
    d = query.shape[1] // heads
    shared = key.shape[1] // d
    if key.shape[1] % d or not shared or heads % shared:
        raise SettingError(
            f"W_K has {key.shape[1]} columns and W_Q {heads} heads of {d}; allowed: as many, or heads of keys that are "
            "each shared by as many heads of queries"
        )
    first, second = head * d, head * shared // heads * d
    return query[:, first : first + d] @ key[:, second : second + d].T / np.sqrt(d)
