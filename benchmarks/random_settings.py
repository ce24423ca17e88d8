"""Random settings: does the theory answer, in which phase, how fast, and does training agree?

    python benchmarks/random_settings.py survey --tokens 2 --count 200 --out survey2.json
    python benchmarks/random_settings.py train survey2.json --count 20 --dimension 300 --out trained2.json

alpha 0.02 to 1, lambda 1e-3 to 1, kappa0 0.2 to 2, alpha' 0.3 to 10, lambda' 0.02 to 2 (log-uniform), delta 0 to 3
(uniform); softmax and identity in turn. Both commands go on where they were stopped. Training is that of fine-tuning
alone, on the channel that the theory assumes; its lowest minimum is searched from w*, from random starts and by
perturbing what was found.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import jax
import numpy as np

jax.config.update("jax_enable_x64", True)

import lorastate as ls  # noqa: E402
from lorastate.setting.files import setting_from_dict, setting_to_dict  # noqa: E402

NUMERICS = ls.Numerics(nodes=8192, finetuning_nodes=16384)
NAMES = ("m", "p", "q", "overlap", "test_error", "free_energy", "breaking", "complexity", "double_well_share")


def random_setting(tokens: int, index: int) -> ls.Setting:
    rng = np.random.default_rng([tokens, index])

    def log(low, high):
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))

    activation = ("softmax", "identity")[index % 2]
    alpha, lam, kappa0, delta = log(0.02, 1), log(1e-3, 1), log(0.2, 2), float(rng.uniform(0, 3))
    pre = ls.Pretraining(alpha, lam, kappa0=kappa0, kappa=1.5, delta=delta, tokens=tokens, activation=activation)
    return ls.Setting(pre, ls.Finetuning(log(0.3, 10), log(0.02, 2)), NUMERICS)


def _write(path: Path, rows: list) -> None:
    path.write_text(json.dumps(rows, indent=0))


def survey(tokens: int, count: int, out: Path) -> None:
    rows = json.loads(out.read_text()) if out.exists() else []
    for index in range(len(rows), count):
        setting = random_setting(tokens, index)
        begin = time.perf_counter()
        found = ls.predict(setting, throw=False)
        jax.block_until_ready(found.finetuning)
        seconds = time.perf_counter() - begin
        summary = found.summary()
        row = {
            "index": index,
            "setting": setting_to_dict(setting),
            "seconds": seconds,
            "codes": [found.code(s).name for s in ("pretraining", "finetuning")],
            "symmetry": summary["symmetry"],
            **{name: summary["finetuning"].get(name) for name in NAMES},
            "stderr": {name: summary["quadrature_error"]["finetuning"].get(name) for name in NAMES},
        }
        rows.append(row)
        _write(out, rows)
        error = row["test_error"] if row["test_error"] is not None else float("nan")
        print(f"{index:4d} {seconds:6.1f} s {row['codes']} {row['symmetry']} E' {error:.4f}", flush=True)
    report(rows)


def report(rows: list) -> None:
    for activation in ("softmax", "identity"):
        some = [r for r in rows if r["setting"]["pretraining"]["activation"] == activation]
        solved = [r for r in some if r["codes"] == ["ok", "ok"]]
        broken = [r for r in solved if r["symmetry"] == "one-step broken"]
        for name, part in (("symmetric", [r for r in solved if r not in broken]), ("broken", broken)):
            seconds = [r["seconds"] for r in part] or [np.nan]
            print(f"{activation}: {len(part)} {name}, median {np.median(seconds):.2f} s, most {np.max(seconds):.1f} s")
        bad = [(r["index"], r["codes"]) for r in some if r not in solved]
        print(f"{activation}: {len(solved)} of {len(some)} solved; not: {bad}")


def train(path: Path, count: int, dimension: int, runs: int, moves: int, out: Path) -> None:
    rows = [r for r in json.loads(path.read_text()) if r["codes"] == ["ok", "ok"]]
    chosen = [rows[k] for k in np.linspace(0, len(rows) - 1, count).astype(int)]
    done = json.loads(out.read_text()) if out.exists() else []
    for row in chosen[len(done) :]:
        setting = setting_from_dict(row["setting"])
        found = ls.simulate(setting, stage="finetuning", dimension=dimension, runs=runs, starts=4, moves=moves)
        entry = {"index": row["index"], "symmetry": row["symmetry"], "theory": {}, "deep": {}, "informed": {}}
        for name in ("test_error", "overlap", "free_energy"):
            entry["theory"][name] = [row[name], row["stderr"][name]]
            trained = "train_loss" if name == "free_energy" else name
            for search in ("deep", "informed"):
                entry[search][name] = [found.mean(search, trained), found.stderr(search, trained)]
        done.append(entry)
        _write(out, done)
        (e, de), (t, dt) = entry["theory"]["test_error"], entry["deep"]["test_error"]
        print(f"{row['index']:4d} {row['symmetry']:17s} E' {e:.4f}({de:.4f}) trained {t:.4f}({dt:.4f}) "
              f"informed {entry['informed']['test_error'][0]:.4f}  {100 * (t / e - 1):+.1f} %  "
              f"{(t - e) / np.hypot(de, dt):+.1f} sigma  o_w {entry['theory']['overlap'][0] or 0.0:.3f} "
              f"{entry['deep']['overlap'][0]:.3f}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("survey")
    one.add_argument("--tokens", type=int, default=2)
    one.add_argument("--count", type=int, default=200)
    one.add_argument("--out", type=Path, required=True)
    two = commands.add_parser("train")
    two.add_argument("survey", type=Path)
    two.add_argument("--count", type=int, default=20)
    two.add_argument("--dimension", type=int, default=300)
    two.add_argument("--runs", type=int, default=4)
    two.add_argument("--moves", type=int, default=30)
    two.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.command == "survey":
        survey(given.tokens, given.count, given.out)
    else:
        train(given.survey, given.count, given.dimension, given.runs, given.moves, given.out)


if __name__ == "__main__":
    main()
