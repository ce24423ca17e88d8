"""Finite-size training of the model that the theory describes (arXiv:2606.05899).

Inputs are arrays (N, T, D); pre-activations and outputs are node-last, (T, T, N), as activations take them.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ..errors import Code, SettingError, SolveError, is_concrete, require_float64
from ..math.lbfgs import Minimum, minimise
from ..model.channel.inputs import FixedScale, Fresh, LeastError, Mixed, Reused, Selected
from ..model.proximal import gram
from ..model.spectra.laws import Atoms, BaseLaw, FreeSum, PowerLaw, Wishart
from ..setting.files import replace
from ..setting.stages import Finetuning, Pretraining, Setting

if TYPE_CHECKING:
    from .on_channel import ChannelSimulation

_NAMES: dict[str, tuple[str, ...]] = {
    "pretraining": ("M", "Q", "M_down", "overlap", "train_loss", "train_error", "test_error", "test_error_noiseless",
                    "rank_fraction", "map_start_spread"),
    "finetuning": ("m", "q", "q_spare", "overlap", "train_loss", "train_error", "test_error", "test_error_frozen"),
}  # fmt: skip
#: Independent random streams of one run. Append only: the positions fix what a seed means.
_STREAMS = ("teacher", "inputs", "noise", "start", "lora_teacher", "lora_inputs", "lora_noise", "lora_start",
            "test", "lora_test", "task", "channel", "informed", "moves")  # fmt: skip
_MEMORY = 8 * 2**30


class Sizes(NamedTuple):
    """The whole numbers of a simulation: D, P0 = kappa0 D, P = kappa D, N = alpha D^2, N' = alpha' D, and
    kappa_perp D (0 without a task)."""

    dimension: int
    base_rank: int
    width: int
    samples: int
    lora_samples: int
    test_samples: int
    task_rank: int = 0


def _key(run_key, stream: str):
    return jax.random.fold_in(run_key, _STREAMS.index(stream))


def _centred(product, trace, dimension: int):
    return (product - trace * jnp.eye(product.shape[0])[:, :, None]) / np.sqrt(dimension)


def preactivation(inputs, matrix):
    """Z_ab = (x_a^T S x_b - delta_ab Tr S) / sqrt(D), from inputs (N, T, D) and symmetric S (D, D)."""
    product = jnp.einsum("nad,nbd->abn", inputs @ matrix, inputs)
    return _centred(product, jnp.trace(matrix), inputs.shape[2])


def factor_preactivation(inputs, W):
    """`preactivation` of S = W W^T / sqrt(P D), W of shape (D, P), by whichever of W and S is smaller."""
    dimension, width = W.shape
    scale = 1 / np.sqrt(width * dimension)
    if width >= dimension:
        return preactivation(inputs, scale * (W @ W.T))
    u = inputs @ W
    return _centred(scale * jnp.einsum("nap,nbp->abn", u, u), scale * _square(W), dimension)


def lora_update(inputs, w):
    """chi chi^T with chi_a = x_a . w / sqrt(D), (T, T, N), from w of shape (D, r), or (D,) for rank one."""
    samples, tokens, dimension = inputs.shape
    chi = inputs @ w.reshape(dimension, -1) / np.sqrt(dimension)
    return gram(jnp.moveaxis(chi, 0, -1).swapaxes(0, 1).reshape(-1, samples), tokens)


def label_noise(key, variance, tokens: int, samples: int):
    """Symmetric Gaussian noise with entry variance `variance` (1 + delta_ab), (T, T, N)."""
    g = jax.random.normal(key, (tokens, tokens, samples))
    return jnp.sqrt(variance / 2) * (g + jnp.swapaxes(g, 0, 1))


def _square(x):
    return jnp.sum(x * x)


def pretraining_loss(W, data):
    """L(W)/D^2 = (sum ||sigma(Z_W) - sigma(Y)||^2 + lam ||W||^2) / D^2; data = (x, sigma(Y), lam, sigma)."""
    inputs, target, lam, activation = data
    fit = _square(activation(factor_preactivation(inputs, W)) - target)
    return (fit + lam * _square(W)) / W.shape[0] ** 2


def finetuning_loss(w, data):
    """L'(w)/D, L' = sum ||sigma(Z_W + chi chi^T) - sigma(Y')||^2 + lam ||w||_F^2; data as unpacked below."""
    inputs, frozen, target, lam, activation = data
    fit = _square(activation(frozen + lora_update(inputs, w)) - target)
    return (fit + lam * _square(w)) / w.shape[0]


class _Batch(NamedTuple):
    inputs: Any  # (N, T, D)
    labels: Any  # (T, T, N), noisy pre-activation: Y in pre-training, Y0 = Z* + Xi' in fine-tuning


@functools.partial(jax.jit, static_argnames=("tokens", "samples"))
def _draw_batch(inputs_key, noise_key, base, delta, tokens, samples) -> _Batch:
    inputs = jax.random.normal(inputs_key, (samples, tokens, base.shape[0]))
    return _Batch(inputs, preactivation(inputs, base) + label_noise(noise_key, delta / 2, tokens, samples))


class _World(NamedTuple):
    """What pre-training leaves behind: the key of the run, S*, S_pre (S* without a task), the frozen S and the data."""

    key: Any
    base: Any
    task: Any
    learned: Any
    pretraining: _Batch


def _fresh(world: _World, fine: Finetuning, samples: int) -> _Batch:
    keys = _key(world.key, "lora_inputs"), _key(world.key, "lora_noise")
    return _draw_batch(*keys, world.base, fine.delta, fine.tokens, samples)


def _reused(world: _World, fine: Finetuning, samples: int, kind: Reused | None = None) -> _Batch:
    inputs, labels = world.pretraining.inputs[:samples], world.pretraining.labels[..., :samples]
    if not (kind or fine.inputs).keeps_noise:
        noise = label_noise(_key(world.key, "lora_noise"), fine.delta / 2, inputs.shape[1], samples)
        labels = preactivation(inputs, world.base) + noise
    elif world.task is not world.base:  # the same noise on another clean label
        labels = labels + preactivation(inputs, world.base - world.task)
    return _Batch(inputs, labels)


def _mixed(world: _World, fine: Finetuning, samples: int) -> _Batch:
    assert isinstance(fine.inputs, Mixed)
    many = round(float(fine.inputs.reused_fraction) * samples)
    old, new = _reused(world, fine, many, fine.inputs.reused), _fresh(world, fine, samples)
    inputs = jnp.concatenate([old.inputs, new.inputs[many:]])
    return _Batch(inputs, jnp.concatenate([old.labels, new.labels[..., many:]], -1))


def _selected(world: _World, fine: Finetuning, samples: int) -> _Batch:
    assert isinstance(fine.inputs, Selected)
    size = max(round(float(fine.inputs.pool) * world.base.shape[0]), samples)
    pool = _fresh(world, fine, size)
    zw = preactivation(pool.inputs, world.learned)
    score = jnp.sum(zw**2, (0, 1))
    if fine.inputs.score == "without_shift":
        score = score - jnp.sum(zw, (0, 1)) ** 2 / zw.shape[0] ** 2
    chosen = jnp.argsort(score)[:samples]
    return _Batch(pool.inputs[chosen], pool.labels[..., chosen])


#: For each kind of fine-tuning inputs, what draws them and their labels Y0.
_BATCHES: dict[type, Callable[[_World, Finetuning, int], _Batch]] = {
    Fresh: _fresh, Reused: _reused, Mixed: _mixed, Selected: _selected,
}  # fmt: skip


def _pretrain(key, batch: _Batch, pre: Any, sizes: Sizes, starts: int) -> tuple[Minimum, dict[str, Any]]:
    """The lowest of several descents from random W, and what they differ by."""
    data = (batch.inputs, pre.activation(batch.labels), pre.lam, pre.activation)
    shape, first = (sizes.dimension, sizes.width), _key(key, "start")
    keys = [first, *(jax.random.fold_in(first, k) for k in range(1, starts))]
    tried = [minimise(pretraining_loss, jax.random.normal(k, shape), data) for k in keys]
    # One that ended where it should counts before a lower one that did not.
    found = min(tried, key=lambda f: (f.code != Code.ok, f.value if np.isfinite(f.value) else np.inf))
    penalty = pre.lam * _square(found.x) / sizes.dimension**2
    row = {"train_loss": found.value, "train_error": found.value - penalty}
    if starts > 1:
        losses = np.array([f.value for f in tried])
        row["map_start_spread"] = (losses.max() - losses.min()) / losses.min()
    return found, row


def _finetune(world: _World, teacher, fine: Any, sizes: Sizes, starts: int) -> tuple[Minimum, dict[str, Any]]:
    """The lowest of several descents: from w*, then from random w of |w|^2/D = 0.01, 1, 0.01, ... a column.

    Columns that w has beyond those of w* start at random, those that w* has beyond those of w are left out.
    """
    batch = _BATCHES[type(fine.inputs)](world, fine, sizes.lora_samples)
    target = fine.activation(batch.labels + lora_update(batch.inputs, teacher))
    frozen = fine.recalibration.b * preactivation(batch.inputs, world.learned)
    data = (batch.inputs, frozen, target, fine.lam, fine.activation)
    points = jax.random.normal(_key(world.key, "lora_start"), (starts, sizes.dimension, fine.rank))
    both = teacher[:, : fine.rank]
    points = points.at[1::2].multiply(0.1).at[0, :, : both.shape[1]].set(both)
    tried = [minimise(finetuning_loss, x, data) for x in points]
    lowest = min((found.value for found in tried if np.isfinite(found.value)), default=np.nan)
    # Starts that met in one minimum differ by rounding: the one that converged stands for it.
    best = min(tried, key=lambda found: (not found.value <= lowest * (1 + 1e-6), found.code))
    penalty = fine.lam * _square(best.x) / sizes.dimension
    return best, {"train_loss": best.value, "train_error": best.value - penalty}


@functools.partial(jax.jit, static_argnames=("tokens", "samples"))
def _test(key, stage, base, learned, lora, tokens: int, samples: int):
    """Two errors on fresh inputs, chunk by chunk so that memory is bounded.

    Without `lora`: of sigma(Z_W) against sigma(Y) and against sigma(Z*). With `lora` = (w*, w), both against
    sigma(Y'): of sigma(Z_W + chi chi^T) and of sigma(Z_W).
    """
    dimension, sigma = base.shape[0], stage.activation
    chunk = min(max(2_000_000 // (dimension * tokens), 50), samples)
    chunks = -(-samples // chunk)

    def one(total, keys):
        inputs, labels = _draw_batch(keys[0], keys[1], base, stage.delta, tokens, chunk)
        frozen = preactivation(inputs, learned)
        if lora is None:
            pairs = (frozen, labels), (frozen, preactivation(inputs, base))
        else:
            labels = labels + lora_update(inputs, lora[0])
            pairs = (frozen + lora_update(inputs, lora[1]), labels), (frozen, labels)
        return total + jnp.stack([_square(sigma(out) - sigma(label)) for out, label in pairs]), None

    total, _ = jax.lax.scan(one, jnp.zeros(2), jax.random.split(key, (chunks, 2)))
    return total / (chunk * chunks)


def _overlaps(student, teacher, dimension: int) -> tuple[float, float, float]:
    """<s, t>/D, <s, s>/D and the cosine, set to 0 for a student shrunk to zero (<s, s>/D < 1e-6)."""
    pairs = (student, teacher), (student, student), (teacher, teacher)
    inner, size, known = (float(jnp.vdot(a, b)) / dimension for a, b in pairs)
    return inner, size, inner / np.sqrt(size * known) if not size < 1e-6 else 0.0


def _lora_overlaps(w, teacher) -> dict[str, float]:
    """m, q, q_spare (of columns of w beyond those of w*) and the overlap: what no rotation of w or of w* changes.

    With w^T w*/D = U diag(s) V^T, m is the mean of s, and q that of |w U|^2/D over the columns that follow the teacher.
    """
    dimension, rank = w.shape
    if not np.all(np.isfinite(w)):
        return dict.fromkeys(("m", "q", "overlap", "q_spare")[: 3 + (rank > teacher.shape[1])], np.nan)
    k = min(rank, teacher.shape[1])
    cross, own, known = (np.asarray(a.T @ b) / dimension for a, b in ((w, teacher), (w, w), (teacher, teacher)))
    u, s, _ = np.linalg.svd(cross)
    sizes = np.diag(u.T @ own @ u)
    norm = np.linalg.norm(own)
    cosine = np.linalg.norm(s) / np.sqrt(norm * np.linalg.norm(known)) if norm >= 1e-6 else 0.0
    spare = {"q_spare": float(sizes[k:].mean())} if rank > k else {}
    return {"m": float(s.mean()), "q": float(sizes[:k].mean()), "overlap": float(cosine), **spare}


def _rank_fraction(eigenvalues) -> float:
    """Share of eigenvalues above 1e-3 of the largest, and above 1e-6 (a map shrunk to zero has rank 0)."""
    share = float(np.mean(eigenvalues > max(1e-3 * eigenvalues[-1], 1e-6)))
    return share if np.isfinite(eigenvalues[-1]) else np.nan


class _Trained(NamedTuple):
    """A pre-trained run: its world, how the training ended, and the row of `_NAMES`."""

    world: _World
    found: Minimum
    row: dict[str, Any]


def _matrix(key, law: BaseLaw, dimension: int, rank: int):
    """A matrix of that law: of a Wishart one with `rank` factors, else with the law's quantiles for eigenvalues."""
    if isinstance(law, Wishart):
        return _wishart(key, dimension, rank)
    if isinstance(law, FreeSum):
        keys = jax.random.split(key, len(law.parts))
        ranks = [round(float(getattr(part.law, "kappa0", 0.0)) * dimension) for part in law.parts]
        terms = (p.factor * _matrix(k, p.law, dimension, r) for k, p, r in zip(keys, law.parts, ranks, strict=True))
        return sum(terms, jnp.zeros((dimension, dimension)))
    if not isinstance(law, Atoms | PowerLaw):
        raise SettingError(f"pretraining.base = {law} cannot be simulated; allowed: Wishart, Atoms, PowerLaw, FreeSum")
    frame, triangle = jnp.linalg.qr(jax.random.normal(key, (dimension, dimension)))
    frame = frame * jnp.sign(jnp.diag(triangle))
    return (frame * law.eigenvalues(dimension)) @ frame.T


def _wishart(key, dimension: int, rank: int):
    """W W^T / sqrt(rank D)."""
    factor = jax.random.normal(key, (dimension, rank))
    return factor @ factor.T / np.sqrt(rank * dimension)


def _train_map(pre: Any, sizes: Sizes, key, starts: int) -> _Trained:
    D = sizes.dimension
    base = _matrix(_key(key, "teacher"), pre.downstream_law, D, sizes.base_rank)
    task = base
    if pre.task is not None:
        task = pre.task.a * base + pre.task.c * _wishart(_key(key, "task"), D, sizes.task_rank)
    keys = _key(key, "inputs"), _key(key, "noise")
    batch = _draw_batch(*keys, task, pre.delta, pre.tokens, sizes.samples)
    found, row = _pretrain(key, batch, pre, sizes, starts)
    # Where the loss left the finite numbers, the last W means nothing: everything downstream becomes NaN.
    W = found.x * (np.nan if found.code == Code.nonfinite else 1.0)
    learned = W @ W.T / np.sqrt(sizes.width * D)
    row["M"], row["Q"], row["overlap"] = _overlaps(learned, task, D)
    row["M_down"] = _overlaps(learned, base, D)[0]
    row["eigenvalues"] = np.asarray(jnp.linalg.eigvalsh(learned))
    row["rank_fraction"] = _rank_fraction(row["eigenvalues"])
    row["test_error"], row["test_error_noiseless"] = _test(
        _key(key, "test"), pre, task, learned, None, pre.tokens, sizes.test_samples
    )
    return _Trained(_World(key, base, task, learned, batch), found, row)


def _fingerprint(pre, sizes: Sizes, key, starts: int) -> tuple:
    """Everything that a pre-trained run depends on, as a key of a dictionary."""
    leaves, kind = jax.tree_util.tree_flatten(pre)
    same = sizes._replace(lora_samples=0)
    return (str(kind), tuple(np.asarray(v).tobytes() for v in leaves), same, jax.random.key_data(key).tobytes(), starts)


def _one_run(setting: Setting, sizes: Sizes, key, starts: int, map_starts: int, bar, memory: dict) -> tuple[dict, dict]:
    """The rows of both stages: what `_NAMES` lists, and how the training went."""
    pre, D = setting.pretraining, sizes.dimension
    fine: Any = setting.finetuning_resolved
    began = time.perf_counter()
    bar.set_postfix_str("pre-training")
    name = _fingerprint(pre, sizes, key, map_starts)
    if name not in memory:
        memory[name] = _train_map(pre, sizes, key, map_starts)
    world, found, row = memory[name]
    row, base, learned = dict(row), world.base, world.learned
    teacher = jax.random.normal(_key(key, "lora_teacher"), (D, fine.teacher_rank))
    bar.update()

    bar.set_postfix_str("fine-tuning")
    best, lora_row = _finetune(world, teacher, fine, sizes, starts)
    w = best.x * (np.nan if best.code == Code.nonfinite else 1.0)
    bar.update()

    bar.set_postfix_str("measuring")
    lora_row |= _lora_overlaps(w, teacher)
    lora_row["test_error"], lora_row["test_error_frozen"] = _test(
        _key(key, "lora_test"),
        fine,
        base,
        fine.recalibration.b * learned,
        (teacher, w),
        fine.tokens,
        sizes.test_samples,
    )
    bar.update()
    row |= {"code": found.code, "steps": found.steps, "seconds": time.perf_counter() - began}
    lora_row |= {"code": best.code if found.code == Code.ok else Code.upstream, "steps": best.steps}
    return row, lora_row


@dataclass(frozen=True, eq=False)
class Simulation:
    """Finite-size training runs, measured under the names that the theory's predictions have.

    `pretraining` and `finetuning` map a name to an array of one value per run. With S = W W^T/sqrt(P D): `M` = Tr(S
    S*)/D (with a task, S_pre in the place of S* here and below), `M_down` = Tr(S S*)/D, `Q` = Tr(S^2)/D, `overlap`
    = M/sqrt(Q Tr(S*^2)/D), `train_loss` = L/D^2, `train_error` = the same without the penalty, `test_error` =
    E||sigma(Z_W) - sigma(Y)||_F^2 on fresh inputs with noisy labels, `test_error_noiseless` = against sigma(Z*)
    instead, `rank_fraction` = share of eigenvalues of S above 1e-3 of the largest and, with several starts of W,
    `map_start_spread` = (highest - lowest)/lowest loss that they end at. Fine-tuning: `m` = |w.w*|/D (the
    sign of w is free; without recovery m is of order D^(-1/2), not 0), `q` = |w|^2/D, `overlap` = |w.w*|/(|w||w*|),
    `train_loss` = L'/D, `train_error` without the penalty, `test_error` = E||sigma(Z_W + chi chi^T) -
    sigma(Y')||_F^2 on fresh inputs, `test_error_frozen` = the same at w = 0. For higher ranks `m` is the mean
    singular value of w^T w*/D, `q` the mean size of the columns of w that go with it, `q_spare` that of the others
    (r > r*), `overlap` = ||w^T w*||_F / sqrt(||w^T w||_F ||w*^T w*||_F). With r < r* training prefers the larger
    singular values of w*: a bias of order D^(-1/2) where it is otherwise 1/D. Source of the model:
    arXiv:2606.05899.

    `codes[stage]` says for each run whether its training reached a stationary point. A run that did not stays
    in the arrays (NaN where the loss was not finite) and makes `mean`, `stderr` and `summary` raise
    `SolveError`, unless told to leave it out. `seeds` are (seed, run): the run's key is
    `fold_in(key(seed), run)`. `eigenvalues` of S are (runs, D), ascending; `steps` count those of L-BFGS.
    """

    setting: Setting
    sizes: Sizes
    seeds: tuple[tuple[int, int], ...]
    pretraining: dict[str, np.ndarray]
    finetuning: dict[str, np.ndarray]
    eigenvalues: np.ndarray
    codes: dict[str, tuple[Code, ...]]
    steps: dict[str, np.ndarray]
    seconds: np.ndarray

    @property
    def dimension(self) -> int:
        """D."""
        return self.sizes.dimension

    def converged(self, stage: str) -> np.ndarray:
        """Which runs reached a stationary point in "pretraining" or "finetuning", (runs,) of bool."""
        if stage not in _NAMES:
            raise SettingError(f"stage = {stage!r} is unknown; allowed: {', '.join(_NAMES)}")
        return np.array([code == Code.ok for code in self.codes[stage]])

    def _sample(self, stage: str, name: str, only_converged: bool) -> np.ndarray:
        good = self.converged(stage)
        if name not in getattr(self, stage):
            raise SettingError(f"name = {name!r} is unknown; allowed: {', '.join(getattr(self, stage))}")
        if not good.all() and not only_converged:
            bad = np.flatnonzero(~good)
            where = f"in runs {bad.tolist()} of {len(good)}; only_converged=True leaves them out"
            raise SolveError(stage, self.codes[stage][bad[0]], where)
        return getattr(self, stage)[name][good]

    def mean(self, stage: str, name: str, only_converged: bool = False) -> float:
        """Mean over runs; `SolveError` if one did not converge, unless `only_converged` leaves it out."""
        sample = self._sample(stage, name, only_converged)
        return float(np.mean(sample)) if len(sample) else np.nan

    def stderr(self, stage: str, name: str, only_converged: bool = False) -> float:
        """Standard error of `mean` (ddof = 1); NaN for fewer than two runs."""
        sample = self._sample(stage, name, only_converged)
        return float(np.std(sample, ddof=1) / np.sqrt(len(sample))) if len(sample) > 1 else np.nan

    def summary(self, only_converged: bool = False) -> dict[str, dict[str, dict[str, float | None]]]:
        """{stage: {name: {"mean", "stderr"}}} of plain floats, None where undefined."""

        def entry(stage: str, name: str) -> dict[str, float | None]:
            pair = {"mean": self.mean, "stderr": self.stderr}
            values = {key: method(stage, name, only_converged) for key, method in pair.items()}
            return {key: x if np.isfinite(x) else None for key, x in values.items()}

        return {stage: {name: entry(stage, name) for name in getattr(self, stage)} for stage in _NAMES}


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
        raise SettingError(f"{name} = {value!r} is out of range; allowed: whole numbers, {low} to {high}")
    return int(value)


def _sizes(pre: Pretraining, fine: Any, D: int, test_samples: int) -> Sizes:
    for stage, part in (("pretraining", pre), ("finetuning", fine)):
        for name in ("alpha", "lam", "delta", "kappa0", "kappa"):
            value = getattr(part, name, 0.0)
            if not is_concrete(value) or np.ndim(value):
                raise SettingError(f"{stage}.{name} = {value} is not one known number; allowed: just one")

    def count(name: str, value, scale: int) -> int:
        if (rounded := round(float(value) * scale)) < 1:
            low = f"{name} >= {0.5 / scale:.2g} at dimension {D}"
            raise SettingError(f"{name} = {float(value):g} rounds to none at all; allowed: {low}")
        return rounded

    _check_memory(pre, fine, D)
    if not isinstance(fine.inputs, (Fresh, Selected)) and float(fine.alpha) * D > float(pre.alpha) * D**2:
        raise SettingError(
            f"finetuning.alpha = {float(fine.alpha):g} needs more samples than pre-training has to reuse at dimension "
            f"{D}; allowed: up to {float(pre.alpha) * D:g}"
        )
    ranks = count("pretraining.kappa0", pre.kappa0, D), count("pretraining.kappa", pre.kappa, D)
    samples = count("pretraining.alpha", pre.alpha, D**2), count("finetuning.alpha", fine.alpha, D)
    task_rank = 0 if pre.task is None else count("pretraining.task.kappa_perp", pre.task.kappa_perp, D)
    return Sizes(D, *ranks, *samples, test_samples, task_rank)


def _check_memory(pre: Pretraining, fine: Any, D: int, kept: int = 0, known: int = 0) -> None:
    """Raises `SettingError` if one run, what `kept` more runs leave and `known` bytes do not fit."""

    def needed(d: int) -> float:
        samples = float(pre.alpha) * d**2
        drawn = float(fine.inputs.pool if isinstance(fine.inputs, Selected) else fine.alpha)
        inputs = max(pre.tokens * samples * d, fine.tokens * drawn * d**2)
        left = 8 * (samples * (pre.tokens * d + pre.tokens**2) + (3 + float(pre.kappa)) * d**2)
        # Inputs, two temporaries; L-BFGS history of W.
        return 24 * inputs + 400 * float(pre.kappa) * d**2 + kept * left + known

    if needed(D) > _MEMORY:
        fits = max((d for d in range(1, D) if needed(d) <= _MEMORY), default=0)
        less = f"{_MEMORY >> 30} GiB, dimension <= {fits} (or a smaller alpha"
        raise SettingError(
            f"dimension = {D} needs {needed(D) / 2**30:.0f} GiB of memory here; allowed: up to "
            f"{less}{', or no memory that keeps all runs' if kept or known else ''})"
        )


@overload
def simulate(
    setting: Setting, *, stage: Literal["both"] = "both", dimension: int | None = None, runs: int = 4, seed: int = 0,
    starts: int | None = None, map_starts: int | None = None, test_samples: int | None = None, progress: bool = False,
    memory: dict | None = None,
) -> Simulation: ...  # fmt: skip


@overload
def simulate(
    setting: Setting, *, stage: Literal["finetuning"], dimension: int | None = None, runs: int = 4, seed: int = 0,
    starts: int | None = None, moves: int | None = None, progress: bool = False,
) -> ChannelSimulation: ...  # fmt: skip


def simulate(
    setting: Setting,
    *,
    stage: str = "both",
    dimension: int | None = None,
    runs: int = 4,
    seed: int = 0,
    starts: int | None = None,
    moves: int | None = None,
    map_starts: int | None = None,
    test_samples: int | None = None,
    progress: bool = False,
    memory: dict | None = None,
) -> Simulation | ChannelSimulation:
    """Trains the model of `setting` at finite size and measures it, whether or not the theory can be solved.

    `stage` "both" (D = 150 unless `dimension` says otherwise): P0 = round(kappa0 D), P = round(kappa D), N =
    round(alpha D^2), N' = round(alpha' D); `Simulation` says what is measured. Both losses are minimised by L-BFGS: W
    from `map_starts` random starts (default 1); w from `starts` starts (default 3), the first of them the teacher (so
    the informative branch is always tried); the lowest losses are kept. Standard errors cover the fluctuations from
    run to run, those of |w*|^2/D = 1 +- sqrt(2/D) included, but not the bias of finite D. `test_samples` per stage
    (default 20,000) are rounded up to whole chunks. Simulations that are given the same `memory` (a dict) and differ in
    their fine-tuning only are pre-trained once; it keeps the data of every run. Run r depends on (seed, r) and on the
    sizes, not on `runs`.

    `stage` "finetuning" (D = 600): fine-tuning alone, on the law of (Y0, Z_W) that the theory assumes, with `starts`
    random starts (default 6) and `moves` deep moves (default 10): see `asymptotic.train_on_channel`.

    Raises `SettingError` on bad input. A training that fails does not raise here: the result marks it. Ctrl-C after at
    least one run raises `SimulationInterrupted`, a KeyboardInterrupt that carries the finished runs. Of the theory the
    b of recalibration "error" and, for "noise" and on the asymptotic channel, pre-training are needed: `SolveError`
    where they cannot be solved.
    """
    _check_options(stage, moves=moves, map_starts=map_starts, test_samples=test_samples, memory=memory)
    usual: dict[str, Any] = {"runs": runs, "seed": seed, "progress": progress, "dimension": dimension, "starts": starts}
    if stage == "finetuning":
        from .on_channel import train_on_channel

        usual |= {"moves": moves}
        return train_on_channel(setting, **{name: v for name, v in usual.items() if v is not None})
    usual |= {"map_starts": map_starts, "test_samples": test_samples, "memory": memory}
    return _train_both(setting, **{name: v for name, v in usual.items() if v is not None})


#: What `simulate` can train, and the options that belong to one of them only.
STAGES = {"both": ("map_starts", "test_samples", "memory"), "finetuning": ("moves",)}


def _check_options(stage: str, **given: Any) -> None:
    if stage not in STAGES:
        raise SettingError(f"stage = {stage!r} is unknown; allowed: {', '.join(STAGES)}")
    for other, names in STAGES.items():
        for name in names:
            if other != stage and given[name] is not None:
                raise SettingError(f"{name} has no meaning for stage = {stage!r}; allowed: for {other!r} only")


def theory_scale(setting: Setting) -> Setting:
    """The setting with the b that the theory recommends, as a practitioner would take it, for its recalibration.

    The b of least Delta_eff needs pre-training alone, that of least E' all of the theory.
    """
    fine = setting.finetuning_resolved
    if isinstance(fine.recalibration, FixedScale):
        return setting
    from ..solution.solution import predict, pretrain

    if isinstance(fine.recalibration, LeastError):
        b: Any = predict(setting).finetuning["recalibration"]
    else:
        b = fine.scale(pretrain(setting.pretraining, setting.numerics).frozen(fine))
    return replace(setting, "finetuning.recalibration", float(b))


def _train_both(
    setting: Setting, *, dimension: int = 150, runs: int = 4, seed: int = 0, starts: int = 3, map_starts: int = 1,
    test_samples: int = 20_000, progress: bool = False, memory: dict | None = None,
) -> Simulation:  # fmt: skip
    """`simulate` of both stages."""
    require_float64()
    pre, fine = setting.pretraining, setting.finetuning_resolved
    if type(fine.inputs) not in _BATCHES:
        known = ", ".join(kind.__name__ for kind in _BATCHES)
        raise SettingError(f"finetuning.inputs = {fine.inputs!r} cannot be simulated; allowed: {known}")
    dimension, runs = _whole("dimension", dimension, 10, 10_000), _whole("runs", runs, 1, 10_000)
    seed, starts = _whole("seed", seed, 0, 2**32 - 1), _whole("starts", starts, 1, 100)
    sizes = _sizes(pre, fine, dimension, _whole("test_samples", test_samples, 1, 10**8))
    map_starts = _whole("map_starts", map_starts, 1, 100)
    keys = [jax.random.fold_in(jax.random.key(seed), run) for run in range(runs)]
    if memory is not None:
        new = sum(_fingerprint(pre, sizes, key, map_starts) not in memory for key in keys)
        known = sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree_util.tree_leaves(list(memory.values())))
        _check_memory(pre, fine, dimension, max(new - 1, 0), known)
    setting = theory_scale(setting)
    outcomes: list[tuple[dict, dict]] = []
    try:
        with tqdm(total=3 * runs, disable=not progress, desc="simulate", unit="stage") as bar:
            for key in keys:
                kept = {} if memory is None else memory
                outcomes.append(_one_run(setting, sizes, key, starts, map_starts, bar, kept))
    except KeyboardInterrupt:
        if not outcomes:
            raise
        raise SimulationInterrupted(_collected(setting, sizes, seed, outcomes)) from None
    return _collected(setting, sizes, seed, outcomes)


class SimulationInterrupted(KeyboardInterrupt):
    """Ctrl-C after at least one run of `simulate`: `finished` is what it would have returned for the complete ones."""

    def __init__(self, finished: Any):
        self.finished = finished
        super().__init__(f"{len(finished.seeds)} runs are complete")


def _collected(setting: Setting, sizes: Sizes, seed: int, outcomes: list[tuple[dict, dict]]) -> Simulation:
    rows = {stage: [outcome[i] for outcome in outcomes] for i, stage in enumerate(_NAMES)}

    def table(stage: str) -> dict[str, np.ndarray]:
        names = [name for name in _NAMES[stage] if name in rows[stage][0]]
        return {name: np.array([float(row[name]) for row in rows[stage]]) for name in names}

    return Simulation(
        setting,
        sizes,
        seeds=tuple((seed, run) for run in range(len(outcomes))),
        pretraining=table("pretraining"),
        finetuning=table("finetuning"),
        eigenvalues=np.stack([row["eigenvalues"] for row in rows["pretraining"]]),
        codes={stage: tuple(row["code"] for row in rows[stage]) for stage in _NAMES},
        steps={stage: np.array([row["steps"] for row in rows[stage]]) for stage in _NAMES},
        seconds=np.array([row["seconds"] for row in rows["pretraining"]]),
    )
