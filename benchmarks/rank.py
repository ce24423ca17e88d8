"""Updates of higher rank, theory against training: `python benchmarks/rank.py` prints a Markdown table.

Over-ranked, under-ranked and matched updates of identity and softmax, each trained on the same pre-trained maps.
"""

from __future__ import annotations

import argparse

NAMES = ("test_error", "overlap", "train_loss", "m", "q", "q_spare")
RANKS = ((1, 1), (2, 2), (3, 3), (2, 1), (3, 2), (1, 2), (2, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dimension", type=int, default=150)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--starts", type=int, default=4)
    options = parser.parse_args()
    import jax

    jax.config.update("jax_enable_x64", True)
    import lorastate as ls

    print("| activation | r, r* | " + " | ".join(NAMES) + " | replicon |")
    print("|---" * (len(NAMES) + 3) + "|")
    numerics = ls.Numerics(nodes=8192, finetuning_nodes=16384, replicas=16)
    for activation, lam in (("identity", 0.1), ("softmax", 0.02)):
        pre = ls.Pretraining(alpha=0.1, lam=lam, activation=activation)
        memory: dict = {}
        for rank, teacher_rank in RANKS:
            fine = ls.Finetuning(alpha=3.0, lam=0.3, rank=rank, teacher_rank=teacher_rank)
            setting = ls.Setting(pre, fine, numerics)
            theory = ls.predict(setting)
            found = ls.simulate(
                setting, dimension=options.dimension, runs=options.runs, starts=options.starts, memory=memory
            )
            cells = []
            for name in NAMES:
                if name not in found.finetuning:
                    cells.append("")
                    continue
                mean, bar = (f("finetuning", name, True) for f in (found.mean, found.stderr))
                cells.append(f"{float(theory.finetuning[name]):.3f} / {mean:.3f}({bar:.3f})")
            replicon = float(theory.finetuning["replicon"])
            row = (activation, f"{rank}, {teacher_rank}", *cells, f"{replicon:.2f}")
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
