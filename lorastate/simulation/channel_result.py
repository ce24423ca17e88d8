"""The result of training fine-tuning alone on the theory's channel: `ChannelSimulation`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import Code, SettingError, SolveError
from ..setting.stages import Setting
from ..solution.solution import PretrainingSolution
from .measures import mean_of, stderr_of
from .searches import SEARCHES

#: A minimum counts as worse than another if its loss is higher by this share, and its overlap lower.
_WORSE = 1e-3


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
        return mean_of(sample)

    def stderr(self, search: str, name: str, only_converged: bool = False) -> float:
        """Standard error of `mean` (ddof = 1); NaN for fewer than two runs."""
        sample = self._sample(search, name, only_converged)
        return stderr_of(sample)

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


def collected(options: dict[str, Any], seed: int, outcomes: list[dict]) -> ChannelSimulation:
    """The result of the runs, from what is kept of each."""

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
