"""The result of training fine-tuning alone on the theory's channel: `ChannelSimulation`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import Code
from ..setting.stages import Setting
from ..solution.solution import PretrainingSolution
from .runs import Runs
from .searches import SEARCHES

#: A minimum counts as worse than another if its loss is higher by this share, and its overlap lower.
_WORSE = 1e-3


@dataclass(frozen=True, eq=False)
class ChannelSimulation(Runs):
    """Training runs of fine-tuning on the law that the theory assumes.

    `searches[search][name]` holds one value per run, for each of `SEARCHES` ("informed", "random", "deep_random",
    "deep"): of the lowest minimum that the search has found, `train_loss` = L'/D and `train_error` without the penalty,
    `m`, `q`, `q_spare`, `overlap` as `Simulation` has them, and `test_error` = E' on fresh inputs as it follows from
    the overlaps. No minimum of another search is below that of "deep", which is `lowest`. `random_loss` and
    `random_overlap` (runs, starts) are those of every random start: the spread of minima. `codes[search]` say whether
    those descents reached a stationary point; `map` is the solved pre-training and `effective_noise` what it leaves.
    `seeds` are (seed, run): the run's key is `fold_in(key(seed), run)`.
    """

    PART = "search"
    STAGE = "finetuning"

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
    def tables(self) -> dict[str, dict[str, np.ndarray]]:
        return self.searches

    @property
    def lowest(self) -> dict[str, np.ndarray]:
        """The lowest minimum of every run, whatever search has found it."""
        return self.searches["deep"]

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


def collected(options: dict[str, Any], seed: int, outcomes: Mapping[int, dict]) -> ChannelSimulation:
    """The result of some runs, by number, from what is kept of each."""
    made = list(outcomes.values())

    def of_search(k: int) -> dict[str, np.ndarray]:
        names = made[0]["searches"][k]
        return {name: np.array([run["searches"][k][name] for run in made]) for name in names}

    return ChannelSimulation(
        **options,
        seeds=tuple((seed, run) for run in outcomes),
        searches={search: of_search(k) for k, search in enumerate(SEARCHES)},
        random_loss=np.array([run["random"]["train_loss"] for run in made]),
        random_overlap=np.array([run["random"]["overlap"] for run in made]),
        codes={search: tuple(Code(int(run["codes"][k])) for run in made) for k, search in enumerate(SEARCHES)},
        steps={search: np.array([int(run["steps"][k]) for run in made]) for k, search in enumerate(SEARCHES)},
        seconds=np.array([run["seconds"] for run in made]),
    )
