"""Training of the second stage alone, on its asymptotic channel (arXiv:2606.05899).

The theory says that fine-tuning sees pre-training through the law of (Y0, Z_W) alone. Here that law is drawn and not
trained: (Y0, Z_W) for N' = alpha' D inputs from the channel of the setting, X Gaussian (N' x T x D), w* with
orthogonal columns of |w*_k|^2 = D, and

    L'(w)/D = (sum_mu ||sigma(b Z_W + chi chi^T) - sigma(Y0 + chi* chi*^T)||_F^2 + lambda' ||w||^2) / D

is minimised. What is left of finite D are the corrections of the second stage itself, at a D that a run of both
stages could not reach. E' is not measured on a sample but follows from m = w^T w*/D and q = w^T w/D.

Where labels are noisy and ridges weak the loss has many minima. Four searches are reported apart (`SEARCHES`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ..errors import Code, SettingError, SolveError, is_concrete
from ..evolution.test_errors import _distance, _fields, row_error
from ..math.quadrature import mean, over_replicas
from ..model.activation import Identity
from ..model.channel.inputs import FrozenMap, LeastError
from ..model.proximal import gram
from ..setting.stages import Finetuning, Setting
from ..solution import theory
from ..solution.solution import PretrainingSolution, pretrain
from .descents import LoraData, Minima, descend
from .simulate import _MEMORY, SimulationInterrupted, _key, _lora_overlaps, _whole, lora_update, theory_scale

#: informed: descents from w* and from points near it; random: from random starts, which is what a user has;
#: deep_random: perturb and descend from the lowest random one, without knowing w*; deep: the same from the lowest of
#: all, and the lowest that any of the four has found.
SEARCHES = ("informed", "random", "deep_random", "deep")
#: Perturbation of w* for informed starts, and those of a minimum in deep moves, one after the other, in units of |w|.
#: Smaller ones (0.3) nearly always fall back into the minimum that they leave, larger ones (3) forget it.
_NEAR, _MOVES = 0.1, (1.0, 1.5)
#: Informed starts, and descents that share a product with the inputs.
_INFORMED, _TOGETHER = 3, 12
#: A minimum counts as worse than another if its loss is higher by this share, and its overlap lower.
_WORSE = 1e-3


class Sample(NamedTuple):
    """A drawn fine-tuning problem: w* (D, r*) and the loss that is made of it."""

    teacher: Any
    data: LoraData


def draw_fields(key, fine: Finetuning, frozen: FrozenMap, samples: int):
    """(Y0, Z_W) of `samples` inputs, before recalibration: exactly the channel's law.

    Where the channel is a mixture every input belongs to one part, as many of them to each as its share says.
    """
    tokens, drop = fine.tokens, fine.activation.forgets_shift
    normal = jax.random.normal(key, (fine.inputs.dimension(tokens, drop), samples))
    found = fine.inputs.search(frozen, tokens, drop, normal)
    fields = fine.inputs.fields(frozen, fine.delta, tokens, drop, normal, found)
    ends = jnp.round(jnp.cumsum(jnp.asarray(fine.inputs.shares)) * samples)
    index = jnp.arange(samples)
    part = jnp.sum(index[:, None] >= ends[:-1], 1)
    return jax.tree_util.tree_map(lambda a: a[..., part * samples + index], fields)


def draw_teacher(key, dimension: int, rank: int):
    """w* (D, r*): orthogonal columns in random directions with |w*_k|^2 = D exactly."""
    frame, triangle = jnp.linalg.qr(jax.random.normal(key, (dimension, rank)))
    return np.sqrt(dimension) * frame * jnp.sign(jnp.diag(triangle))


@eqx.filter_jit
def _draw(key, fine: Finetuning, frozen: FrozenMap, dimension: int, samples: int) -> Sample:
    fields = draw_fields(_key(key, "channel"), fine, frozen, samples)
    teacher = draw_teacher(_key(key, "lora_teacher"), dimension, fine.teacher_rank)
    inputs = jax.random.normal(_key(key, "lora_inputs"), (samples, fine.tokens, dimension))
    target = fine.activation(fields.y0 + lora_update(inputs, teacher))
    rows = jnp.moveaxis(inputs, 1, 0).reshape(-1, dimension) / np.sqrt(dimension)
    return Sample(teacher, LoraData(rows, fine.scale(frozen) * fields.zw, target, fine.lam, fine.activation))


# ---- E' from the overlaps --------------------------------------------------------------------------------------


def overlap_error(fine: Finetuning, frozen: FrozenMap, m, q, nodes: Any):
    """E' of an update with m = w^T w*/D (r, r*) and q = w^T w/D (r, r), any matrices, on fresh inputs.

    As `generalization.finetuning_error`, which has symmetric m and q, on the same nodes (one replica; None for the
    identity): chi*_a is standard normal and omega_a = m chi*_a + (q - m m^T)^{1/2} g_a.
    """
    frozen, t = frozen.scaled(fine.scale(frozen)), fine.tokens
    assert t is not None
    rank, teacher_rank = m.shape
    law = (frozen.Q0 + fine.delta / 2, frozen.overlap, frozen.norm)
    if isinstance(fine.activation, Identity):
        gap, trace = law[0] - 2 * law[1] + law[2], jnp.trace(q)
        square = teacher_rank + jnp.sum(q**2) - 2 * jnp.sum(m**2)
        return (1 + 1 / t) * gap + ((t + 1) * square + (teacher_rank - trace) ** 2) / t
    sizes, frame = jnp.linalg.eigh(q - m @ m.T)
    noise = frame * jnp.sqrt(jnp.maximum(sizes, 0.0))
    x, count = nodes.normal, 1 if fine.activation.rowwise else t
    begin, end = teacher_rank * count, (teacher_rank + rank) * count
    chi, g = x[:begin].reshape(teacher_rank, count, -1), x[begin:end].reshape(rank, count, -1)
    omega = jnp.einsum("ij,jan->ian", m, chi) + jnp.einsum("ij,jan->ian", noise, g)
    if fine.activation.rowwise:
        one, two = chi[:, 0], omega[:, 0]
        own = jnp.sum(one**2, 0), jnp.sum(two**2, 0)
        update = own[0], jnp.sum((m @ one) * two, 0), jnp.sum((q @ two) * two, 0)
        return row_error(fine.activation, t, law, update, own, x[end:], nodes.weight)
    y, z = _fields(fine.activation, t, law, x[end:])
    y, z = (v + gram(u.reshape(-1, u.shape[-1]), t) for v, u in ((y, chi), (z, omega)))
    return _distance(fine.activation, y, z, nodes.weight)


@eqx.filter_jit
def _errors(fine: Finetuning, frozen: FrozenMap, m, q, nodes):
    """E' of several updates, (B,), averaged over the replicas of the nodes."""

    def one(pair):
        m, q = pair
        if nodes is None:
            return overlap_error(fine, frozen, m, q, None)
        return mean(over_replicas(lambda n: overlap_error(fine, frozen, m, q, n), nodes))

    return jax.lax.map(one, (m, q))


# ---- searches --------------------------------------------------------------------------------------------------


def _best(minima: Minima, among: Any = None) -> int:
    """The lowest one, of those that converged if any has; where several met in one minimum, the first of them."""
    index = np.arange(len(minima.loss)) if among is None else np.asarray(among)
    good = [i for i in index if minima.codes[i] == Code.ok] or [i for i in index if np.isfinite(minima.loss[i])]
    return int(min(good, key=lambda i: minima.loss[i])) if good else int(index[0])


def _take(minima: Minima, index) -> Minima:
    return Minima(minima.w[index], minima.loss[index], tuple(minima.codes[i] for i in index), minima.steps[index])


def _joined(parts: list[Minima]) -> Minima:
    w, loss, codes, steps = zip(*parts, strict=True)
    return Minima(np.concatenate(w), np.concatenate(loss), sum(codes, ()), np.concatenate(steps))


def _starts(key, teacher, rank: int, starts: int):
    """w* and points near it, then random w of |w|^2/D = 1, 0.01, 1, ... a column, (3 + starts, D, r).

    Columns that w has beyond those of w* start at random, those that w* has beyond those of w are left out.
    """
    dimension, k = teacher.shape[0], min(teacher.shape[1], rank)
    informed = jax.random.normal(_key(key, "informed"), (_INFORMED, dimension, rank))
    near = teacher[:, :k] + _NEAR * informed[:, :, :k].at[0].set(0.0)
    scattered = jax.random.normal(_key(key, "lora_start"), (starts, dimension, rank))
    return jnp.concatenate([informed.at[:, :, :k].set(near), scattered.at[1::2].multiply(0.1)])


def _descend_all(points, data: LoraData, bar) -> Minima:
    """Descents from all points, in groups of nearly equal size."""
    groups = -(-len(points) // _TOGETHER)
    found = []
    for part in np.array_split(np.asarray(points), groups):
        found.append(descend(part, data))
        bar.update(len(part))
    return _joined(found)


def _deepened(key, pair: Minima, data: LoraData, moves: int, bar) -> Minima:
    """Minima below those of `pair`: perturb by Gaussian noise, descend, keep what is lower, and again."""
    for move in range(moves):
        noise = np.asarray(jax.random.normal(jax.random.fold_in(key, move), pair.w.shape))
        size = np.sqrt(np.mean(pair.w**2, (1, 2), keepdims=True))
        new = descend(pair.w + _MOVES[move % len(_MOVES)] * size * noise, data)
        both = _joined([pair, new])
        lower = [k + 2 * (new.codes[k] == Code.ok and new.loss[k] < pair.loss[k]) for k in range(2)]
        pair = _take(both, lower)
        bar.update(2)
    return pair


def _searched(key, sample: Sample, rank: int, starts: int, moves: int, bar) -> tuple[Minima, Minima]:
    """The minimum of each of `SEARCHES`, and those of all random starts."""
    found = _descend_all(_starts(key, sample.teacher, rank, starts), sample.data, bar)
    scattered = range(_INFORMED, _INFORMED + starts)
    informed, random, lowest = _best(found, range(_INFORMED)), _best(found, scattered), _best(found)
    pair = _deepened(_key(key, "moves"), _take(found, [random, lowest]), sample.data, moves, bar)
    deep = _joined([_take(found, [informed, random]), _take(pair, [0]), _take(pair, [_best(pair)])])
    return deep, _take(found, list(scattered))


def _measured(fine: Any, sample: Sample, minima: Minima) -> list[dict[str, float]]:
    """Everything about each minimum but E'."""
    rows = []
    for w, loss in zip(minima.w, minima.loss, strict=True):
        penalty = float(fine.lam) * np.sum(w**2) / len(w)
        row = {"train_loss": loss, "train_error": loss - penalty}
        rows.append({key: float(x) for key, x in (row | _lora_overlaps(w, np.asarray(sample.teacher))).items()})
    return rows


def _overlap_matrices(w, teacher):
    """m (B, r, r*) and q (B, r, r), with w and w* turned so that m is diagonal and >= 0.

    E' does not depend on it, but its nodes do: -w must have the error of w to all digits.
    """
    cross, own = np.swapaxes(w, 1, 2) @ teacher / len(teacher), np.swapaxes(w, 1, 2) @ w / len(teacher)
    u, sizes, _ = np.linalg.svd(cross)
    m, k = np.zeros_like(cross), np.arange(sizes.shape[1])
    m[:, k, k] = sizes
    return m, np.swapaxes(u, 1, 2) @ own @ u


def _one_run(fine: Any, frozen: FrozenMap, nodes, dimension: int, samples: int, key, starts: int, moves: int, bar):
    began = time.perf_counter()
    sample = _draw(key, fine, frozen, dimension, samples)
    best, scattered = _searched(key, sample, fine.rank, starts, moves, bar)
    rows = _measured(fine, sample, best)
    m, q = _overlap_matrices(best.w, np.asarray(sample.teacher))
    for row, error in zip(rows, np.asarray(_errors(fine, frozen, m, q, nodes)), strict=True):
        row["test_error"] = float(error)
    all_rows = _measured(fine, sample, scattered)
    return {
        "searches": rows,
        "codes": best.codes,
        "steps": best.steps,
        "random": {name: [row[name] for row in all_rows] for name in ("train_loss", "overlap")},
        "seconds": time.perf_counter() - began,
    }


# ---- the result ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ChannelSimulation:
    """Training runs of fine-tuning on the law that the theory assumes.

    `searches[search][name]` holds one value per run, for each of `SEARCHES` ("informed", "random", "deep_random",
    "deep"): of the lowest minimum that the search has found, `train_loss` = L'/D and `train_error` without the penalty,
    `m`, `q`, `q_spare`, `overlap` as `Simulation` has them, and `test_error` = E' on fresh inputs as it follows from
    the overlaps. No minimum of another search is below that of "deep", which is `lowest`. `random_loss` and
    `random_overlap` (runs, starts) are those of every random start: the spread of minima. `codes[search]` say whether
    those descents reached a stationary point; `map` is the solved pre-training and `effective_noise` what it leaves.
    `seeds` are (seed, run): the run's key is `fold_in(key(seed), run)`.
    """

    setting: Setting
    map: PretrainingSolution
    dimension: int
    samples: int
    starts: int
    moves: int
    seeds: tuple[tuple[int, int], ...]
    searches: dict[str, dict[str, np.ndarray]]
    random_loss: np.ndarray
    random_overlap: np.ndarray
    codes: dict[str, tuple[Code, ...]]
    steps: dict[str, np.ndarray]
    seconds: np.ndarray

    @property
    def lowest(self) -> dict[str, np.ndarray]:
        """The lowest minimum of every run, whatever search has found it."""
        return self.searches["deep"]

    def converged(self, search: str) -> np.ndarray:
        """In which runs the minimum of a search is a stationary point, (runs,) of bool."""
        if search not in SEARCHES:
            raise SettingError(f"search = {search!r} is unknown; allowed: {', '.join(SEARCHES)}")
        return np.array([code == Code.ok for code in self.codes[search]])

    def _sample(self, search: str, name: str, only_converged: bool) -> np.ndarray:
        good = self.converged(search)
        if name not in self.searches[search]:
            raise SettingError(f"name = {name!r} is unknown; allowed: {', '.join(self.searches[search])}")
        if not good.all() and not only_converged:
            bad = np.flatnonzero(~good)
            where = f"{search} search, in runs {bad.tolist()} of {len(good)}; only_converged=True leaves them out"
            raise SolveError("finetuning", self.codes[search][bad[0]], where)
        return self.searches[search][name][good]

    def mean(self, search: str, name: str, only_converged: bool = False) -> float:
        """Mean over runs; `SolveError` if one did not converge, unless `only_converged` leaves it out."""
        sample = self._sample(search, name, only_converged)
        return float(np.mean(sample)) if len(sample) else np.nan

    def stderr(self, search: str, name: str, only_converged: bool = False) -> float:
        """Standard error of `mean` (ddof = 1); NaN for fewer than two runs."""
        sample = self._sample(search, name, only_converged)
        return float(np.std(sample, ddof=1) / np.sqrt(len(sample))) if len(sample) > 1 else np.nan

    @property
    def worse_starts(self) -> dict[str, float]:
        """Random starts that end in clearly worse minima than the lowest one of their run: how many there are, `share`
        of all, their mean relative `excess` in the loss, and their mean `overlap` beside that of the `lowest`."""
        loss, overlap = self.lowest["train_loss"][:, None], self.lowest["overlap"][:, None]
        excess = (self.random_loss - loss) / np.abs(loss)
        worse = (excess > _WORSE) & (self.random_overlap < overlap)
        out = {"count": int(worse.sum()), "share": float(worse.mean())}
        if worse.any():
            there = np.broadcast_to(overlap, worse.shape)[worse]
            values = {"excess": excess[worse], "overlap": self.random_overlap[worse], "lowest_overlap": there}
            out |= {key: float(np.mean(v)) for key, v in values.items()}
        return out

    @property
    def verdict(self) -> str | None:
        """One sentence where random starts, which are what a user has, end in clearly worse minima; else None."""
        worse = self.worse_starts
        if not worse["count"]:
            return None
        count, loss = f"{worse['count']} of {self.random_loss.size}", f"{100 * worse['excess']:.2g} %"
        return (
            f"{count} random starts, which are what a user has, end in worse minima than the lowest one found: their "
            f"loss is {loss} higher on average, and their o_w {worse['overlap']:.3f} instead of "
            f"{worse['lowest_overlap']:.3f}."
        )

    def summary(self, only_converged: bool = False) -> dict[str, Any]:
        """{search: {name: {"mean", "stderr"}}} of plain floats, None where undefined."""

        def entry(search: str, name: str) -> dict[str, float | None]:
            pair = {"mean": self.mean, "stderr": self.stderr}
            values = {key: method(search, name, only_converged) for key, method in pair.items()}
            return {key: x if np.isfinite(x) else None for key, x in values.items()}

        return {search: {name: entry(search, name) for name in rows} for search, rows in self.searches.items()}


def _collected(options: dict[str, Any], seed: int, outcomes: list[dict]) -> ChannelSimulation:
    def of_search(k: int) -> dict[str, np.ndarray]:
        names = outcomes[0]["searches"][k]
        return {name: np.array([run["searches"][k][name] for run in outcomes]) for name in names}

    return ChannelSimulation(
        **options,
        seeds=tuple((seed, run) for run in range(len(outcomes))),
        searches={search: of_search(k) for k, search in enumerate(SEARCHES)},
        random_loss=np.array([run["random"]["train_loss"] for run in outcomes]),
        random_overlap=np.array([run["random"]["overlap"] for run in outcomes]),
        codes={search: tuple(run["codes"][k] for run in outcomes) for k, search in enumerate(SEARCHES)},
        steps={search: np.array([run["steps"][k] for run in outcomes]) for k, search in enumerate(SEARCHES)},
        seconds=np.array([run["seconds"] for run in outcomes]),
    )


def channel_samples(fine: Any, dimension: int, starts: int = 6) -> int:
    """N' = round(alpha' D), if there is at least one and the memory is enough; else a `SettingError`."""
    for name in ("alpha", "lam", "delta"):
        value = getattr(fine, name)
        if not is_concrete(value) or np.ndim(value):
            raise SettingError(f"finetuning.{name} = {value} is not one known number; allowed: just one")
    alpha, tokens = float(fine.alpha), fine.tokens
    if (samples := round(alpha * dimension)) < 1:
        low = f"finetuning.alpha >= {0.5 / dimension:.2g} at dimension {dimension}"
        raise SettingError(f"finetuning.alpha = {alpha:g} rounds to none at all; allowed: {low}")

    def memory(d: int) -> float:
        # The inputs, drawn and rearranged; what each descent keeps of every input, and its history.
        many = min(_INFORMED + starts, _TOGETHER)
        return 8 * (3 * alpha * tokens * d**2 + many * d * (4 * alpha * tokens * fine.rank + 60 * fine.rank))

    if memory(dimension) > _MEMORY:
        fits = max((d for d in range(1, dimension) if memory(d) <= _MEMORY), default=0)
        raise SettingError(
            f"dimension = {dimension} needs {memory(dimension) / 2**30:.0f} GiB of memory here; allowed: up to "
            f"{_MEMORY >> 30} GiB, dimension <= {fits} (or a smaller alpha)"
        )
    return samples


def train_on_channel(
    setting: Setting, *, dimension: int = 600, runs: int = 4, seed: int = 0, starts: int = 6, moves: int = 10,
    progress: bool = False,
) -> ChannelSimulation:  # fmt: skip
    """Trains fine-tuning alone, on the law that the theory assumes; `ChannelSimulation` says what is measured.

    `starts` random starts a run (beside w* and two points near it), then `moves` times from the lowest random minimum
    and from the lowest of all: perturb, descend, keep what is lower. Run r depends on (seed, r) and on the sizes, not
    on `runs`. Needs the first stage only: raises `SolveError` where that cannot be solved, `SettingError` on bad input.
    Ctrl-C after at least one run raises `SimulationInterrupted`, which carries the finished runs.
    """
    fine: Any = setting.finetuning_resolved
    dimension, runs = _whole("dimension", dimension, 10, 10_000), _whole("runs", runs, 1, 10_000)
    seed, starts = _whole("seed", seed, 0, 2**32 - 1), _whole("starts", starts, 1, 100)
    moves = _whole("moves", moves, 0, 1000)
    samples = channel_samples(fine, dimension, starts)
    solved = pretrain(setting.pretraining, setting.numerics, throw=fine.inputs.needs_map)
    if isinstance(fine.recalibration, LeastError):  # the only b that needs all of the theory
        fine = theory_scale(setting).finetuning_resolved
    frozen = solved.frozen(fine)
    nodes = theory.test_nodes(fine, setting.numerics)
    options = {"setting": setting, "map": solved, "dimension": dimension, "samples": samples, "starts": starts}
    options["moves"] = moves
    outcomes: list[dict] = []
    total = runs * (_INFORMED + starts + 2 * moves)
    try:
        with tqdm(total=total, disable=not progress, desc="simulate", unit="descent") as bar:
            for run in range(runs):
                key = jax.random.fold_in(jax.random.key(seed), run)
                outcomes.append(_one_run(fine, frozen, nodes, dimension, samples, key, starts, moves, bar))
    except KeyboardInterrupt:
        if not outcomes:
            raise
        raise SimulationInterrupted(_collected(options, seed, outcomes)) from None
    return _collected(options, seed, outcomes)
