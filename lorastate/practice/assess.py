"""A user's layer as the theory sees it: what its map is worth to a LoRA, and what to do about it (arXiv:2606.05899)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SettingError, SolveError, require_float64
from ..model.activation import Activation
from ..setting.named import as_activation
from ..setting.numerics import Numerics
from ..setting.stages import MAX_RANK
from ..validation import real, whole
from . import files
from .forecast import DRAWS, Forecast, Lora, forecast
from .labels import RESAMPLES, Measured, label_preactivations, measure
from .law import Law, coordinates, law_of, preactivation
from .layer import Layer, layer_of
from .tokens import Standard, map_size, standard_of


@dataclass(frozen=True)
class Assessment:
    """What the theory says about a layer.

    `layer`: the map, and what was lost on the way to it; `standard`: how tokens were standardised; `tokens` T; `Q` =
    Tr S~^2/D of the standardised map; `law`: of its pre-activations against that of the theory; `selected`: the inputs
    of X that active selection takes, fewest frozen output first. With labelled examples also `measured`, the moments of
    (Y0, Z_W); `frozen_error`, the frozen layer's error on them, ||sigma(Z_W) - sigma(Y')||_F^2, and its standard error;
    `lost_labels`, the antisymmetric share of the labels; `forecasts` of E', or `no_forecast`, why there are none.
    """

    layer: Layer
    standard: Standard
    tokens: int
    Q: float
    law: Law
    lora: Lora
    selected: np.ndarray
    measured: Measured | None = None
    lost_labels: float = 0.0
    frozen_error: tuple[float, float] | None = None
    forecasts: tuple[Forecast, ...] = ()
    no_forecast: str = ""

    @property
    def effective_noise(self) -> tuple[float, float] | None:
        """Delta_eff = E (Y0 - Z_W)^2 of the frozen map as it is, and its standard error; None without labels."""
        return self._estimate(lambda m: m.effective_noise())

    @property
    def least_noise(self) -> tuple[float, float] | None:
        """Delta_eff at the recommended factor b = M/Q, and its standard error."""
        return self._estimate(lambda m: m.effective_noise(m.best_scale))

    @property
    def best_scale(self) -> tuple[float, float] | None:
        """b = M/Q, the factor on the frozen map of least effective noise, and its standard error."""
        return self._estimate(lambda m: m.best_scale)

    @property
    def strength(self) -> tuple[float, float] | None:
        """|w*|^2/D of each direction of the update that the labels ask for, and its standard error (0 if given)."""
        return self._estimate(lambda m: m.strength)

    def _estimate(self, f) -> tuple[float, float] | None:
        return None if self.measured is None else (float(f(self.measured.moments)), self.measured.stderr(f))

    def summary(self) -> dict[str, Any]:
        """Plain numbers for JSON; estimates as [value, standard error]."""
        labelled = {
            "effective_noise": self.effective_noise, "least_noise": self.least_noise, "best_scale": self.best_scale,
            "strength": self.strength, "frozen_error": self.frozen_error,
        }  # fmt: skip
        return {
            "weights": self.layer.source, "lost_antisymmetric": self.layer.lost, "negative": self.layer.negative,
            "standardised": self.standard.kind, "dimension": self.lora.dimension, "tokens": self.tokens, "Q": self.Q,
            "law": self.law._asdict(), "lora": self.lora._asdict(), "lost_labels": self.lost_labels,
            "labelled": None if self.measured is None else labelled,
            "forecasts": [f._asdict() | {"stderr": f.stderr} for f in self.forecasts],
            "no_forecast": self.no_forecast or None, "selected": self.selected.tolist(),
        }  # fmt: skip


def assess(
    source: str | Path | Sequence[str | Path] | Mapping[str, Any], *, examples: int | None = None, ridge: float = 0.1,
    rank: int = 1, teacher_rank: int = 1, tokens: int | None = None, activation: Any = "softmax",
    beta: float | None = None, labels_are: str = "auto", update_size: float | None = None, standardise: str = "auto",
    score: str = "frobenius", layer: str = "", heads: int = 1, head: int = 0, seed: int = 0, draws: int = DRAWS,
    numerics: Numerics | None = None,
) -> Assessment:  # fmt: skip
    """Assesses a layer from files (`.npz`, `.safetensors`) or a mapping of arrays.

    Arrays: the weights as `W` (D, P), `S` (D, D), or `W_Q` and `W_K` (D, columns); the token embeddings `X`, (N, T, D)
    inputs of T tokens or (n, D) tokens, of which `tokens` after each other make one input; if there are any, `labels`
    (N', T, T) of the first N' inputs, as attention or as pre-activations (`labels_are`).

    `examples`: of the LoRA that E' is expected for (as many as are labelled); `ridge` lam' on w in the sum of losses;
    `update_size`: the strength of the update, if it is not to be estimated; `draws`: resamples that are carried through
    the theory, 0 for no forecast of E'. Selection is among inputs without labels, if there are any.

    Raises `SettingError`, one sentence, for files and arrays that do not fit.
    """
    require_float64()
    arrays = _arrays(source, layer)
    kind = as_activation("practice", activation, beta)
    inputs, labels = _inputs(arrays, tokens)
    n, T, D = inputs.shape
    found = layer_of(arrays, D, heads, head)
    standard = standard_of(inputs.reshape(-1, D), standardise)
    x, S = standard.tokens(inputs), standard.matrix(found.S)
    Q, drop = map_size(found.S, standard, n * T), kind.forgets_shift
    if not Q > 0:
        raise SettingError(f"Q = {Q:.3g} of the standardised map; allowed: > 0 (are there enough tokens in X?)")
    rank, teacher_rank = whole("rank", rank, 1, MAX_RANK), whole("teacher_rank", teacher_rank, 1, MAX_RANK)
    many = whole("examples", examples if examples is not None else len(labels) or max(1, n // 10), 1, 10**9)
    lora = Lora(D, many, float(real("ridge", ridge, "ridge > 0", 0.0)), rank, teacher_rank)
    if update_size is not None:
        update_size = float(real("update_size", update_size, "update_size > 0", 0.0))
    z = preactivation(x, S)
    pool = np.arange(len(labels) if len(labels) < n else 0, n)
    chosen = _selected(z[pool], lora.examples, score, drop)
    base = Assessment(found, standard, T, Q, law_of(x, S, standard, Q, drop, seed), lora, pool[chosen])
    if not len(labels):
        return base
    y, lost = label_preactivations(labels, kind, labels_are)
    trace = float(np.trace(S)) / D
    measured = measure(x[: len(y)], y, z[: len(y)], Q, trace, drop, teacher_rank, update_size, seed)
    selection = None
    if len(chosen) < len(pool):
        selection = {"inputs": "selected", "rho": len(chosen) / len(pool), "pool": len(pool) / D, "score": score}
    ways = _ways(selection) if whole("draws", draws, 0, RESAMPLES) else []
    numerics = Numerics(1024, 16384) if numerics is None else numerics
    forecasts, why = [], "" if ways else "none was asked for"
    try:
        forecasts = [forecast(name, measured, lora, kind, T, given, b, numerics, draws) for name, given, b in ways]
    except (SettingError, SolveError) as error:
        why = str(error)
    known = {"measured": measured, "lost_labels": lost, "frozen_error": _frozen_error(z, y, kind)}
    return Assessment(**{**vars(base), **known, "forecasts": tuple(forecasts), "no_forecast": why})


def _arrays(source: Any, layer: str) -> dict[str, np.ndarray]:
    if isinstance(source, Mapping):
        unknown = [name for name in source if name not in files.NAMES]
        if unknown:
            raise SettingError(f"array {unknown[0]!r} is unknown; allowed: {', '.join(files.NAMES)}")
        return {name: files.numbers(name, value) for name, value in source.items() if value is not None}
    return files.read([source] if isinstance(source, str | Path) else source, layer)


#: Fewest inputs, and labelled ones, that anything can be said about.
_FEWEST = 20


def _inputs(arrays: Mapping[str, np.ndarray], tokens: int | None) -> tuple[np.ndarray, np.ndarray]:
    """X (N, T, D), and labels (N', T, T), N' = 0 where there are none."""
    if "X" not in arrays:
        raise SettingError("the token embeddings X are missing; allowed: X (N, T, D), or (n, D)")
    X, labels = arrays["X"], arrays.get("labels")
    if labels is not None and (labels.ndim != 3 or labels.shape[1] != labels.shape[2]):
        raise SettingError(f"labels have shape {labels.shape}; allowed: (examples, T, T)")
    T = tokens if tokens is not None else labels.shape[1] if labels is not None else None
    if X.ndim == 2:
        if T is None:
            raise SettingError(f"X has shape {X.shape}, tokens without inputs; allowed: (N, T, D), or give tokens")
        T = whole("tokens", T, 2, 8)
        X = X[: len(X) // T * T].reshape(-1, T, X.shape[1])
    if X.ndim != 3 or not 2 <= X.shape[1] <= 8 or X.shape[2] < 2 or len(X) < _FEWEST:
        raise SettingError(
            f"X makes inputs of shape {X.shape}; allowed: (N, T, D), N >= {_FEWEST}, T from 2 to 8 (cut longer ones)"
        )
    if T is not None and X.shape[1] != T:
        raise SettingError(f"X has inputs of {X.shape[1]} tokens, labels or the option tokens say {T}; allowed: one T")
    if labels is None:
        return X, np.zeros((0, X.shape[1], X.shape[1]))
    if not _FEWEST <= len(labels) <= len(X):
        raise SettingError(
            f"there are {len(labels)} labels for {len(X)} inputs; allowed: {_FEWEST} or more, of the first inputs of X"
        )
    return X, labels


def _selected(z: np.ndarray, many: int, score: str, drop_shift: bool) -> np.ndarray:
    """The places of the inputs with the smallest frozen output, at most `many`, smallest first."""
    if score not in ("frobenius", "without_shift") or (score == "without_shift" and not drop_shift):
        raise SettingError(f"score = {score!r} is unknown here; allowed: frobenius, and without_shift for softmax")
    sizes = np.sum(coordinates(z, score == "without_shift") ** 2, 1)
    return np.argsort(sizes, kind="stable")[:many]


def _ways(selection: dict[str, Any] | None) -> list[tuple[str, dict[str, Any], float | str]]:
    """What is forecast: name, inputs and factor b."""
    fresh = {"inputs": "fresh"}
    ways: list[tuple[str, dict[str, Any], float | str]] = [
        ("as it is", fresh, 1.0), ("b of least noise", fresh, "noise"), ("b of least E'", fresh, "error"),
    ]  # fmt: skip
    return ways if selection is None else [*ways, ("selected inputs", selection, 1.0)]


def _frozen_error(z: np.ndarray, y: np.ndarray, activation: Activation) -> tuple[float, float]:
    """Mean of ||sigma(Z_W) - sigma(Y')||_F^2 over the examples, and its standard error."""
    out, label = (np.asarray(activation(np.moveaxis(a, 0, -1))) for a in (z[: len(y)], y))
    each = np.sum((out - label) ** 2, (0, 1))
    return float(each.mean()), float(each.std(ddof=1) / np.sqrt(len(each)))
