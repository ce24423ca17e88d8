"""Finite-size training of the model that the theory describes: `simulate`, of both stages or of fine-tuning alone."""

from __future__ import annotations

import os
from typing import Any, Literal, overload

from ..errors import SettingError
from ..setting.stages import Setting
from .channel_result import ChannelSimulation
from .data import Data
from .on_channel import train_on_channel
from .result import Simulation
from .two_stages import train_both

#: What `simulate` can train, and the options that belong to one of them only.
STAGES = {"both": ("map_starts", "test_samples", "memory", "data"), "finetuning": ("moves",)}


@overload
def simulate(
    setting: Setting, *, stage: Literal["both"] = "both", dimension: int | None = None, runs: int = 4, seed: int = 0,
    first: int = 0, starts: int | None = None, map_starts: int | None = None, test_samples: int | None = None,
    progress: bool = False, memory: dict | None = None, data: Data | None = None,
    out: str | os.PathLike[str] | None = None,
) -> Simulation: ...  # fmt: skip


@overload
def simulate(
    setting: Setting, *, stage: Literal["finetuning"], dimension: int | None = None, runs: int = 4, seed: int = 0,
    first: int = 0, starts: int | None = None, moves: int | None = None, progress: bool = False,
    out: str | os.PathLike[str] | None = None,
) -> ChannelSimulation: ...  # fmt: skip


def simulate(
    setting: Setting,
    *,
    stage: str = "both",
    dimension: int | None = None,
    runs: int = 4,
    seed: int = 0,
    first: int = 0,
    starts: int | None = None,
    moves: int | None = None,
    map_starts: int | None = None,
    test_samples: int | None = None,
    progress: bool = False,
    memory: dict | None = None,
    data: Data | None = None,
    out: str | os.PathLike[str] | None = None,
) -> Simulation | ChannelSimulation:
    """Trains the model of `setting` at finite size and measures it, whether or not the theory can be solved.

    `stage` "both" (D = 150 unless `dimension` says otherwise): P0 = round(kappa0 D), P = round(kappa D), N =
    round(alpha D^2), N' = round(alpha' D); `Simulation` says what is measured. Both losses are minimised by L-BFGS: W
    from `map_starts` random starts (default 1); w from `starts` starts (default 3), the first of them the teacher (so
    the informative branch is always tried); the lowest losses are kept. Standard errors cover the fluctuations from
    run to run, those of |w*|^2/D = 1 +- sqrt(2/D) included, but not the bias of finite D. `test_samples` per stage
    (default 20,000) are rounded up to whole chunks. Simulations that are given the same `memory` (a dict) and differ in
    their fine-tuning only are pre-trained once; it keeps the data of every run. `data` says what tokens and noise are
    made of if they are not Gaussian (`Data`); the theory knows Gaussian ones only. The runs are `first`, `first` + 1,
    ...; run r depends on (seed, r), the sizes and `data` alone, so that they can be made one by one.

    `stage` "finetuning" (D = 600): fine-tuning alone, on the law of (Y0, Z_W) that the theory assumes, with `starts`
    random starts (default 6) and `moves` deep moves (default 10): see `on_channel.train_on_channel`.

    With `out`, a directory, every run is written at once, and the same call goes on from there after any interruption,
    also with more runs.

    Raises `SettingError` on bad input. A training that fails does not raise here: the result marks it. Ctrl-C after at
    least one run raises `SimulationInterrupted`, a KeyboardInterrupt that carries the finished runs. Of the theory the
    b of recalibration "error" and, for "noise" and on the asymptotic channel, pre-training are needed: `SolveError`
    where they cannot be solved.
    """
    check_options(stage, moves=moves, map_starts=map_starts, test_samples=test_samples, memory=memory, data=data)
    usual: dict[str, Any] = {"runs": runs, "seed": seed, "first": first, "progress": progress}
    usual |= {"dimension": dimension, "starts": starts, "out": out}
    if stage == "finetuning":
        usual |= {"moves": moves}
        return train_on_channel(setting, **{name: v for name, v in usual.items() if v is not None})
    usual |= {"map_starts": map_starts, "test_samples": test_samples, "memory": memory, "data": data}
    return train_both(setting, **{name: v for name, v in usual.items() if v is not None})


def check_options(stage: str, **given: Any) -> None:
    """A `SettingError` for an option, not None, that belongs to the other stage."""
    if stage not in STAGES:
        raise SettingError(f"stage = {stage!r} is unknown; allowed: {', '.join(STAGES)}")
    for other, names in STAGES.items():
        for name in names:
            if other != stage and given[name] is not None:
                raise SettingError(f"{name} has no meaning for stage = {stage!r}; allowed: for {other!r} only")
