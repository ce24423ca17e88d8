"""Random settings over the whole space: does each converge, keep all bounds, and solve its equations?

    python benchmarks/robustness.py make robustness.jsonl --count 10000 --part 0/2
    python benchmarks/robustness.py make robustness.jsonl --count 10000 --part 1/2
    python benchmarks/robustness.py train robustness.jsonl --count 100
    python benchmarks/robustness.py report robustness.jsonl

alpha 1e-3 to 1e2, lambda 1e-4 to 1e2, delta 0 (one in eight) to 1e2, kappa0 0.05 to 5, alpha' 1e-2 to 1e2, lambda'
1e-3 to 1e2 (log-uniform), T 2 to 6, beta 0.2 to 10, every channel, ranks, tasks and laws of the base map. Settings of
one kind, which share their programs, follow one another: 100 of each of 100 kinds. `make` solves those of one part; the
residual of a solution is the step that one more sweep makes from it, inner minima searched from nothing. `train` trains
fine-tuning alone on solved ones, drawn at random; `report` counts. Stopped at any moment, the same command goes on.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_enable_x64", True)

import lorastate as ls  # noqa: E402
from lorastate.diagnosis.cross_check import map_image  # noqa: E402
from lorastate.evolution import finetuning as ft  # noqa: E402
from lorastate.evolution import finetuning_map  # noqa: E402
from lorastate.math.quadrature import mean, over_replicas  # noqa: E402
from lorastate.setting.files import setting_from_dict  # noqa: E402
from lorastate.solution.finetuning import LoraStage  # noqa: E402
from lorastate.solution.gradients import searches_scale, with_best_scale  # noqa: E402
from lorastate.solution.problem import Problem  # noqa: E402
from lorastate.solution.solve import answered, solve_alone  # noqa: E402

NUMERICS = {"nodes": 1024, "finetuning_nodes": 2048, "replicas": 4}
#: What fine-tuning does with inputs, beside its sample size.
CHANNELS: tuple[dict[str, Any], ...] = (
    {}, {"inputs": "reused"}, {"inputs": "reused", "label_noise": "fresh"}, {"inputs": "mixed"},
    {"inputs": "selected"}, {"inputs": "selected", "score": "without_shift"}, {"inputs": "bayes_optimal"},
    {"recalibration": "noise"}, {"recalibration": 0.7}, {"rank": 2}, {"rank": 2, "teacher_rank": 2},
    {"rank": 1, "teacher_rank": 2},
)  # fmt: skip
LAWS = ("wishart", "wishart", "task", "atoms", "power_law")
TOKENS, ACTIVATIONS = (2, 3, 4, 5, 6), ("softmax", "identity")
#: Settings of one kind.
EACH = 100
#: How far a bound may be passed, and a residual reach: in error bars, and beside them.
_BARS, _ROUNDING, _RESIDUAL = 4.0, 1e-6, 1e-4


def kind(number: int) -> tuple[int, str, dict[str, Any], str]:
    """Tokens, activation, channel and law of the settings of kind `number`: all of them in some order."""
    kinds = list(itertools.product(range(len(TOKENS)), ACTIVATIONS, range(len(CHANNELS)), range(len(LAWS))))
    tokens, activation, channel, law = kinds[np.random.default_rng(1).permutation(len(kinds))[number % len(kinds)]]
    return TOKENS[tokens], activation, CHANNELS[channel], LAWS[law]


def random_setting(index: int) -> dict[str, Any]:
    """Setting number `index`, as a file has it."""
    tokens, activation, channel, law = kind(index // EACH)
    rng = np.random.default_rng([2, index])

    def log(low: float, high: float) -> float:
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))

    fine: dict[str, Any] = dict(channel)
    pre: dict[str, Any] = {"alpha": log(1e-3, 1e2), "lam": log(1e-4, 1e2), "delta": log(1e-2, 1e2)}
    pre |= {"kappa0": log(0.05, 5), "tokens": tokens, "activation": activation}
    pre["kappa"] = 1.0 + pre["kappa0"]
    if rng.uniform() < 1 / 8:
        pre["delta"] = 0.0
    if activation == "softmax":
        pre["beta"] = log(0.2, 10)
    if law == "task":
        pre["task"] = {"a": float(rng.uniform(0, 1.5)), "c": log(0.05, 2), "kappa_perp": log(0.1, 3)}
    elif law == "atoms":
        weight = float(rng.uniform(0.05, 0.95))
        pre["base"] = {"law": "atoms", "weights": [weight, 1 - weight], "values": [log(0.1, 3), log(0.01, 1)]}
    elif law == "power_law":
        low = log(0.01, 0.5)
        pre["base"] = {"law": "power_law", "exponent": log(0.3, 3), "low": low, "high": low * log(2, 30)}
    if law in ("atoms", "power_law"):
        del pre["kappa0"]
        pre["kappa"] = 1.5
    fine["lam"] = log(1e-3, 1e2)
    if fine.get("inputs") == "selected":
        fine |= {"rho": log(1e-3, 0.5), "pool": log(3, 300)}
    else:
        fine["alpha"] = log(1e-2, 1e2)
    if fine.get("inputs") == "mixed":
        fine["reused_fraction"] = float(rng.uniform())
    return {"pretraining": pre, "finetuning": fine, "numerics": {**NUMERICS, "seed": index}}


@jax.jit
def map_residual(problem: Problem, x: Any) -> Any:
    """The step of pre-training's state evolution at x, inner minima searched from nothing."""
    return map_image(x, problem.pre, problem.nodes.pretraining) - x


@jax.jit
def lora_residual(problem: Problem, map_x: Any, x: Any, found: Any, weight: Any) -> Any:
    """The same of fine-tuning, in log v, m, p and q."""
    fine, frozen = problem.fine, problem.frozen(map_x)
    order, nodes = ft.order_at(fine, x), problem.nodes_at(x, found, weight)
    none = finetuning_map.no_memory(fine, nodes, order.levels, order.levels == 0).found
    inner = jax.lax.map(lambda part: finetuning_map.locate_inner(fine, frozen, order, *part), (nodes, none))
    stage = LoraStage(fine, frozen)
    image = stage.image(mean(over_replicas(lambda *part: stage.part(x, *part), nodes, inner)), x)
    return stage.judged(image) - stage.judged(x)


def broken_bounds(setting: ls.Setting, found: ls.Solution) -> list[str]:
    """The bounds that the predictions of a solved setting do not keep, within their error bars."""
    pre, fine, out = found.pretraining, found.finetuning, []

    def at_most(what: str, small: Any, large: Any, *bars: float) -> None:
        room = _BARS * math.hypot(*(b for b in bars if math.isfinite(b)), 0.0)
        if not float(small) <= float(large) + room + _ROUNDING * (1 + abs(float(large))):
            out.append(f"{what}: {float(small):.6g} > {float(large):.6g}")

    def bar(stage: str, name: str) -> float:
        return found.stderr(stage, name)

    Q0 = float(setting.pretraining.Q0)
    at_most("M^2 <= Q Q0", pre["M"] ** 2, pre["Q"] * Q0, 2 * float(pre["M"]) * bar("pretraining", "M"))
    if float(pre["Q"]) > 0:  # a student that is zero has none
        at_most("O_W <= 1", pre["overlap"], 1.0, bar("pretraining", "overlap"))
    at_most("0 <= rank <= 1", pre["rank_fraction"], 1.0)
    at_most("L - penalty <= L", pre["train_error"], pre["train_loss"])
    at_most("m^2 <= q", fine["m"] ** 2, fine["q"], 2 * abs(float(fine["m"])) * bar("finetuning", "m"))
    at_most("p <= q", fine["p"], fine["q"], bar("finetuning", "p"))
    if math.isfinite(float(fine["overlap"])):
        at_most("o_w <= 1", abs(fine["overlap"]), 1.0, bar("finetuning", "overlap"))
    at_most("L' - penalty <= L'", fine["train_error"], fine["train_loss"])
    at_most("L' <= L' at w = 0", fine["train_loss"], _at_zero(setting, found), bar("finetuning", "train_loss"))
    spectrum = found.spectrum
    second, share = float(spectrum.moment2), 1 - float(spectrum.atom)
    at_most("moment of the spectrum is Q", abs(second - float(pre["Q"])), 1e-4 * second, bar("pretraining", "Q"))
    rank = float(pre["rank_fraction"])
    at_most("atom of the spectrum", abs(share - rank), 1e-6, bar("pretraining", "rank_fraction"))
    return out


def _at_zero(setting: ls.Setting, found: ls.Solution) -> float:
    """The loss per D of no update at all: alpha' times the error on training inputs, known for fresh ones only."""
    fine: Any = setting.finetuning_resolved
    fresh = type(fine.inputs) is ls.Fresh
    return float(fine.alpha) * float(found.finetuning["test_error_frozen"]) * 1.02 if fresh else math.inf


def worst_residual(found: ls.Solution, solves: Any) -> tuple[float, float]:
    """The largest residuals: of pre-training as it is, or where its nodes have two wells, between which minimisers
    jump, in error bars of its order parameters; of fine-tuning in error bars, or `_RESIDUAL` beside them."""
    problem, second = solves.problem, solves.second
    x, pre, errors = solves.first.x, found.pretraining, found.errors["pretraining"]
    steps = jnp.abs(map_residual(problem.pretraining_alone, x))[:3]
    if float(pre["double_well_share"]) > 0:
        steps /= _RESIDUAL + jnp.stack([errors["V"] / pre["V"], errors["M"], errors["Q"] / (2 * jnp.abs(x[2]))])
    of_map = float(jnp.max(steps))
    of_lora = lora_residual(problem.found, solves.first.x, second.solved.point.x, second.found, second.solved.weight)
    values, bars = found.finetuning, found.errors["finetuning"]
    kinds = ("", "_spare") if ft.spare(problem.fine) else ("",)
    room = []
    for name in (n + kind for n in "vmpq" for kind in kinds):
        room.append(bars.get(name, 0.0) / (values[name] if name[0] == "v" else 1.0))  # m of spare directions is zero
    return of_map, float(jnp.max(jnp.abs(of_lora) / (_RESIDUAL + jnp.stack([jnp.asarray(r) for r in room]))))


def solved(setting: ls.Setting) -> tuple[ls.Solution, Any]:
    """What `lorastate.predict` says, and the solves behind it."""
    if searches_scale(setting):
        setting = with_best_scale(setting)
    problem = Problem.of(setting)
    solves = solve_alone(problem, answered(problem))
    values, errors, status, branches = solves.answer()
    return ls.Solution(setting, values["pretraining"], values["finetuning"], errors, status, branches), solves


def one(index: int) -> dict[str, Any]:
    """The row of a setting: codes, seconds, phase, residuals, and what is wrong with it."""
    given = random_setting(index)
    row: dict[str, Any] = {"index": index, "setting": given}
    began = time.perf_counter()
    try:
        setting = setting_from_dict(given)
        found, solves = solved(setting)
    except (ls.SettingError, ls.SolveError) as error:
        return {**row, "refused": str(error)}
    codes = [found.code(stage).name for stage in ("pretraining", "finetuning")]
    row |= {"codes": codes, "seconds": time.perf_counter() - began, "symmetry": found.symmetry}
    if codes == ["ok", "ok"]:
        bad = broken_bounds(setting, found)
        row |= {name: float(found.finetuning[name]) for name in ("test_error", "overlap", "free_energy", "q")}
        row["stderr"] = {name: found.stderr("finetuning", name) for name in ("test_error", "overlap", "free_energy")}
        row["unstable"] = found.pretraining_symmetry == "unstable"
        row["residuals"] = of_map, of_lora = worst_residual(found, solves)
        if not of_map < (_BARS if float(found.pretraining["double_well_share"]) > 0 else 1e-6):
            bad.append(f"residual of pre-training {of_map:.1e}")
        if not of_lora < _BARS:
            bad.append(f"residual of fine-tuning {of_lora:.1e} of its room")
        row["wrong"] = bad
    return row


def _rows(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def make(path: Path, count: int, part: str) -> None:
    mine, parts = (int(v) for v in part.split("/"))
    done = {row["index"] for row in _rows(path)}
    for number in range(mine, -(-count // EACH), parts):
        for index in range(number * EACH, min((number + 1) * EACH, count)):
            if index not in done:
                row = one(index)
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                said = row.get("codes", row.get("refused"))
                seconds = row.get("seconds", math.nan)
                print(index, f"{seconds:.1f} s", row.get("symmetry", ""), said, row.get("wrong", ""), flush=True)
        jax.clear_caches()  # the programs of a kind that is done


#: Samples that a training may have: with more, D is smaller.
_MOST_SAMPLES = 3000


def train(path: Path, count: int, dimension: int, runs: int, moves: int) -> None:
    """Solved settings, drawn at random, trained on the channel that the theory of fine-tuning assumes."""
    out = path.with_suffix(".trained.jsonl")
    done = {row["index"] for row in _rows(out)}
    rows = [row for row in _rows(path) if row.get("codes") == ["ok", "ok"]]
    for k in np.random.default_rng(3).permutation(len(rows))[:count]:
        row = rows[k]
        if row["index"] in done:
            continue
        setting = setting_from_dict(row["setting"])
        size = max(20, min(dimension, int(_MOST_SAMPLES / float(setting.finetuning_resolved.alpha))))
        found = ls.simulate(setting, stage="finetuning", dimension=size, runs=runs, starts=3, moves=moves)
        entry: dict[str, Any] = {"index": row["index"], "symmetry": row["symmetry"], "dimension": size}
        for name in ("test_error", "overlap", "free_energy"):
            trained = "train_loss" if name == "free_energy" else name
            entry[name] = [row[name], row["stderr"][name], found.mean("deep", trained), found.stderr("deep", trained)]
        with out.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        e, de, t, dt = entry["test_error"]
        off = (e - t) / max(math.hypot(de, dt), 1e-6 * abs(t))  # training rounds, too
        print(f"{row['index']} D = {size} {row['symmetry']}: E' {e:.4f}({de:.4f}), trained {t:.4f}({dt:.4f}), "
              f"{100 * (e / t - 1):+.1f} %, {off:+.1f} sigma", flush=True)  # fmt: skip


def report(path: Path) -> None:
    rows = _rows(path)
    good, others = ([row for row in rows if (row.get("codes") == ["ok", "ok"]) == yes] for yes in (True, False))
    refused = [row for row in others if "refused" in row]
    print(f"{len(rows)} settings, {len(refused)} refused, {len(good)} of {len(rows) - len(refused)} solved")
    print(f"  symmetric {sum(row['symmetry'] == 'replica symmetric' for row in good)}, pre-training unstable "
          f"{sum(row['unstable'] for row in good)}")  # fmt: skip
    codes = collections.defaultdict(list)
    for row in others:
        codes[" ".join(row["codes"]) if "codes" in row else row["refused"].split(";")[0]].append(row["index"])
    for code, which in sorted(codes.items(), key=lambda item: -len(item[1])):
        print(f"  {code}: {len(which)}, such as {which[:8]}")
    for row in good:
        for what in row["wrong"]:
            print(f"  {row['index']}: {what}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("make", "train", "report"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--part", default="0/1", help="which part of how many")
    parser.add_argument("--dimension", type=int, default=200)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--moves", type=int, default=10)
    given = parser.parse_args()
    if given.command == "make":
        make(given.file, given.count, given.part)
    elif given.command == "train":
        train(given.file, given.count, given.dimension, given.runs, given.moves)
    else:
        report(given.file)


if __name__ == "__main__":
    main()
