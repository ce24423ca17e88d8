"""The theory's prescriptions put to a small transformer:  python benchmarks/small_transformer.py OUT [STAGE]

A character-level transformer (one layer, width 64, four heads) is pre-trained on prose that ships with Python (the
topics of `pydoc`) at several weight decays and two data sizes, then adapted by LoRA on queries and keys to another text
(sources of the standard library), five seeds throughout. Three questions, each a prescription of arXiv:2606.05899:

    decay     is the weight decay that is best for fine-tuning larger than the one that is best for pre-training?
    scale     does a factor b on the frozen attention logits help?
    select    do inputs with small frozen logits make better fine-tuning sets than random ones?

Stages: pretrain, decay, scale, select, report; all of them in this order without STAGE. Each keeps what it has
done in OUT and goes on from there. docs/small_transformer.md has the output and what it says. Nothing is downloaded.
"""

from __future__ import annotations

import functools
import json
import pydoc_data.topics
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

WIDTH, HEADS, HIDDEN, CONTEXT, VOCABULARY = 64, 4, 128, 32, 97
DECAYS = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0)
SIZES = {"16k": 16_000, "128k": 128_000}  # characters of pre-training
SEEDS = 5
STEPS, BATCH, RATE = 600, 16, 4e-3
#: LoRA: rank, sequences, steps, rate; weight decay on its factors.
RANK, EXAMPLES, LORA_STEPS, LORA_RATE, LORA_DECAY = 4, 128, 200, 4e-3, 0.1
POOL, SCALES = 4096, (0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0)
HELD_OUT = 512  # sequences that errors are measured on

# ---- texts -----------------------------------------------------------------------------------------------------


def encoded(text: str) -> np.ndarray:
    """Printable ASCII as 0 to 94, newline 95, all else 96."""
    codes = np.frombuffer(text.encode("latin-1", "replace"), np.uint8).astype(int)
    return np.where((codes >= 32) & (codes < 127), codes - 32, np.where(codes == 10, 95, 96))


def texts() -> tuple[np.ndarray, np.ndarray]:
    """The text of pre-training and that of fine-tuning."""
    topics = "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    folder = Path(sysconfig.get_path("stdlib"))
    sources = "\n".join(path.read_text("utf-8") for path in sorted(folder.glob("[a-d]*.py")))
    return encoded(topics), encoded(sources)


def split(text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sequences (n, CONTEXT + 1) for training, and the last sixth of the text to measure on."""
    rows = text[: len(text) // (CONTEXT + 1) * (CONTEXT + 1)].reshape(-1, CONTEXT + 1)
    cut = len(rows) * 5 // 6
    held = rows[cut:]
    return rows[:cut], held[np.random.default_rng(0).permutation(len(held))[:HELD_OUT]]


# ---- model -----------------------------------------------------------------------------------------------------


def initial(key):
    """Weights of one model."""
    shapes = {
        "embed": (VOCABULARY, WIDTH), "place": (CONTEXT, WIDTH), "q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH),
        "v": (WIDTH, WIDTH), "o": (WIDTH, WIDTH), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH),
        "out": (WIDTH, VOCABULARY),
    }  # fmt: skip
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(k, shape) * (0.5 if name in ("embed", "place") else shape[0] ** -0.5)
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def initial_lora(key):
    """Factors of one LoRA on queries and keys: an update of zero."""
    a, b = jax.random.split(key)
    zero = jnp.zeros((RANK, WIDTH))
    return {"q_in": jax.random.normal(a, (WIDTH, RANK)) / 8, "q_out": zero,
            "k_in": jax.random.normal(b, (WIDTH, RANK)) / 8, "k_out": zero}  # fmt: skip


def normed(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def heads(x):
    return x.reshape(*x.shape[:-1], HEADS, -1)


def logits(q, k):
    """Attention logits (N, HEADS, T, T) of queries and keys (N, T, WIDTH)."""
    return jnp.einsum("nahd,nbhd->nhab", heads(q), heads(k)) * (HEADS / WIDTH) ** 0.5


def frozen_logits(p, tokens):
    """Attention logits of the pre-trained model, before the causal mask, on sequences (N, T)."""
    x = normed(p["embed"][tokens] + p["place"][: tokens.shape[1]])
    return logits(x @ p["q"], x @ p["k"])


def loss(p, rows, lora=None, b=1.0):
    """Mean cross-entropy (nats a character) on rows (N, CONTEXT + 1); `b` on the frozen logits, the update as it is."""
    tokens, target = rows[:, :-1], rows[:, 1:]
    x = p["embed"][tokens] + p["place"]
    h = normed(x)
    q, k = h @ p["q"], h @ p["k"]
    z = logits(q, k)
    if lora is not None:
        moved = logits(q + h @ lora["q_in"] @ lora["q_out"], k + h @ lora["k_in"] @ lora["k_out"])
        z = b * z + (moved - z)
    z = jnp.where(jnp.tril(jnp.ones((CONTEXT, CONTEXT), bool)), z, -1e9)
    mixed = jnp.einsum("nhab,nbhd->nahd", jax.nn.softmax(z), heads(h @ p["v"])).reshape(x.shape)
    x = x + mixed @ p["o"]
    x = x + jax.nn.gelu(normed(x) @ p["up"]) @ p["down"]
    scores = normed(x) @ p["out"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, target))


# ---- training, many models side by side ---------------------------------------------------------------------------


def _adam(steps: int, rate: float):
    return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.99)), (
        optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20, steps, 0.0)
    )


def _step(objective, optimiser, schedule, decay, state, batch):
    """One step of AdamW."""
    x, moments, t = state
    updates, moments = optimiser.update(jax.grad(objective)(x, batch), moments)
    x = jax.tree.map(lambda v, u: v - schedule(t) * (u + decay * v), x, updates)
    return x, moments, t + 1


@jax.jit
def pretrain_steps(state, batches, decay):
    """Steps of all models: `batches` (steps, models, BATCH, CONTEXT + 1), `decay` (models,)."""
    optimiser, schedule = _adam(STEPS, RATE)
    each = jax.vmap(functools.partial(_step, loss, optimiser, schedule), (0, 0, 0))
    return jax.lax.scan(lambda s, rows: (each(decay, s, rows), None), state, batches)[0]


@jax.jit
def finetune(p, key, rows, b):
    """LoRA of every model on its rows (models, EXAMPLES, CONTEXT + 1), with its factor b."""
    optimiser, schedule = _adam(LORA_STEPS, LORA_RATE)

    def one(p, key, rows, b):
        lora = initial_lora(key)
        order = jax.random.randint(jax.random.fold_in(key, 1), (LORA_STEPS, BATCH), 0, len(rows))

        def step(state, chosen):
            def objective(x, batch):
                return loss(p, batch, x, b)

            return _step(objective, optimiser, schedule, LORA_DECAY, state, rows[chosen]), None

        return jax.lax.scan(step, (lora, optimiser.init(lora), 0), order)[0][0]

    return jax.vmap(one)(p, key, rows, b)


@jax.jit
def measured(p, rows):
    return jax.lax.map(lambda p: loss(p, rows), p)


@jax.jit
def measured_lora(p, lora, b, rows):
    return jax.lax.map(lambda a: loss(a[0], rows, a[1], a[2]), (p, lora, b))


# ---- stages ----------------------------------------------------------------------------------------------------


def keep(path: Path, tree) -> None:
    leaves = jax.tree.leaves(tree)
    arrays: dict[str, Any] = {f"{i:03d}": np.asarray(v) for i, v in enumerate(leaves)}
    np.savez(path.with_suffix(".part.npz"), **arrays)
    path.with_suffix(".part.npz").replace(path)


def kept(path: Path, like):
    with np.load(path) as file:
        leaves = [jnp.asarray(file[name]) for name in sorted(file.files)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _models() -> list[tuple[int, int]]:
    """(decay, seed) of the models that stand side by side."""
    return [(i, s) for i in range(len(DECAYS)) for s in range(SEEDS)]


def pretrain(out: Path, size: str) -> None:
    """All models of one data size; seeds differ in their data too, decays of one seed do not."""
    rows, held = split(texts()[0])
    many, path = SIZES[size] // (CONTEXT + 1), out / f"pretrained_{size}.npz"
    data = np.stack([np.random.default_rng(s).permutation(rows)[:many] for s in range(SEEDS)])
    decay = jnp.array([DECAYS[i] for i, _ in _models()])
    params = jax.vmap(initial)(jnp.stack([jax.random.key(s) for _, s in _models()]))
    state = params, jax.vmap(_adam(STEPS, RATE)[0].init)(params), jnp.zeros(len(decay), int)
    if path.exists():
        state = kept(path, state)
    chunk = 50
    for done in range(int(state[2][0]), STEPS, chunk):
        began = time.perf_counter()
        picks = np.stack([np.random.default_rng([s, done]).integers(many, size=(chunk, BATCH)) for s in range(SEEDS)])
        batches = np.stack([data[s][picks[s]] for _, s in _models()], 1)
        state = jax.block_until_ready(pretrain_steps(state, jnp.asarray(batches), decay))
        keep(path, state)
        print(f"pretrain {size}: {done + chunk} of {STEPS} steps, {time.perf_counter() - began:.0f} s", flush=True)
    _write(out, f"pretrained_{size}", {"test": _grid(measured(state[0], jnp.asarray(held)))})


def _grid(values) -> list:
    return np.asarray(values, float).reshape(len(DECAYS), SEEDS).tolist()


def _write(out: Path, name: str, value) -> None:
    (out / f"{name}.json").write_text(json.dumps(value))


def _pretrained(out: Path, size: str):
    params = jax.vmap(initial)(jnp.stack([jax.random.key(s) for _, s in _models()]))
    state = params, jax.vmap(_adam(STEPS, RATE)[0].init)(params), jnp.zeros(len(_models()), int)
    return kept(out / f"pretrained_{size}.npz", state)[0]


def _tuned(params, rows, b, held, seed_of) -> np.ndarray:
    """Held-out loss after a LoRA of each model."""
    key = jnp.stack([jax.random.key(1000 + s) for s in seed_of])
    b = jnp.broadcast_to(jnp.asarray(b, float), (len(seed_of),))
    lora = finetune(params, key, jnp.asarray(rows), b)
    return np.asarray(measured_lora(params, lora, b, jnp.asarray(held)))


def _random_rows(rows, seed: int) -> np.ndarray:
    return np.random.default_rng([7, seed]).permutation(rows)[:EXAMPLES]


def decay(out: Path, size: str) -> None:
    """Held-out loss of the other text, before and after LoRA, at every decay of pre-training."""
    rows, held = split(texts()[1])
    params, seeds = _pretrained(out, size), [s for _, s in _models()]
    data = np.stack([_random_rows(rows, s) for s in seeds])
    after = _tuned(params, data, 1.0, held, seeds)
    _write(out, f"decay_{size}", {"before": _grid(measured(params, jnp.asarray(held))), "after": _grid(after)})


def _best(out: Path, size: str):
    """The models of the decay that is best for pre-training, one a seed."""
    test = np.mean(json.loads((out / f"pretrained_{size}.json").read_text())["test"], 1)
    i = int(np.argmin(test))
    return jax.tree.map(lambda v: v[i * SEEDS : (i + 1) * SEEDS], _pretrained(out, size)), DECAYS[i]


def scale(out: Path, size: str) -> None:
    """Held-out loss after LoRA with each factor b."""
    rows, held = split(texts()[1])
    params, chosen = _best(out, size)
    data = np.stack([_random_rows(rows, s) for s in range(SEEDS)])
    after = [_tuned(params, data, b, held, range(SEEDS)).tolist() for b in SCALES]
    _write(out, f"scale_{size}", {"decay": chosen, "after": after})


def select(out: Path, size: str) -> None:
    """Held-out loss after LoRA on random rows and on those of a pool with the smallest and largest frozen logits."""
    rows, held = split(texts()[1])
    params, chosen = _best(out, size)
    lower = np.tril(np.ones((CONTEXT, CONTEXT), bool))
    found: dict[str, list] = {"random": [], "smallest": [], "flattest": [], "largest": []}
    sets: dict[str, list] = {name: [] for name in found}
    for s in range(SEEDS):
        pool = np.random.default_rng([11, s]).permutation(rows)[:POOL]
        one = jax.tree.map(lambda v, s=s: v[s], params)
        z = np.concatenate([np.asarray(frozen_logits(one, part[:, :-1])) for part in np.split(pool, 16)])
        order = np.argsort(np.sum(np.where(lower, z, 0.0) ** 2, (1, 2, 3)))
        # Softmax forgets the mean of a row.
        mean = np.sum(np.where(lower, z, 0.0), -1, keepdims=True) / lower.sum(-1)[:, None]
        flat = np.argsort(np.sum(np.where(lower, z - mean, 0.0) ** 2, (1, 2, 3)))
        sets["random"].append(pool[:EXAMPLES])
        sets["smallest"].append(pool[order[:EXAMPLES]])
        sets["flattest"].append(pool[flat[:EXAMPLES]])
        sets["largest"].append(pool[order[-EXAMPLES:]])
    for name, chosen_rows in sets.items():
        found[name] = _tuned(params, np.stack(chosen_rows), 1.0, held, range(SEEDS)).tolist()
    _write(out, f"select_{size}", {"decay": chosen, "after": found})


# ---- what came out ---------------------------------------------------------------------------------------------


def mean_pm(values) -> str:
    """Mean and standard error over seeds."""
    v = np.asarray(values, float)
    return f"{v.mean():.4f}({v.std(ddof=1) / len(v) ** 0.5:.4f})"


def lowest(x: np.ndarray, y: np.ndarray) -> float:
    """Where a parabola through the lowest of the points y(x) and its neighbours is least; at an end, the end."""
    i = int(np.argmin(y))
    if i in (0, len(x) - 1):
        return float(x[i])
    a, b, _ = np.polyfit(x[i - 1 : i + 2] - x[i], y[i - 1 : i + 2], 2)
    return float(x[i] - b / (2 * a))


def report(out: Path, size: str) -> None:
    def read(name):
        return json.loads((out / f"{name}_{size}.json").read_text())

    print(f"\npre-training on {size} characters; mean(standard error) over {SEEDS} seeds, nats a character")
    test, tuned = np.array(read("pretrained")["test"]), read("decay")
    print("decay    pre-training    other text       after LoRA")
    for i, d in enumerate(DECAYS):
        print(f"{d:<8g}", *(mean_pm(v[i]) for v in (test, tuned["before"], tuned["after"])), sep=" ")
    logs = np.log(DECAYS)
    best = {name: np.array([lowest(logs, np.array(v)[:, s]) for s in range(SEEDS)])
            for name, v in (("pre-training", test), ("LoRA", tuned["after"]))}  # fmt: skip
    gap = best["LoRA"] - best["pre-training"]
    print({name: np.round(np.exp(v), 3).tolist() for name, v in best.items()})
    print(f"log(best decay for LoRA / best for pre-training) = {mean_pm(gap)}")
    scaled = read("scale")
    values = np.array(scaled["after"])
    base = values[SCALES.index(1.0)]
    print(f"decay {scaled['decay']}: loss with b less loss with b = 1")
    for b, v in zip(SCALES, values, strict=True):
        print(f"b = {b:<5g} {mean_pm(v - base)}")
    print("best b:", mean_pm(np.exp([lowest(np.log(SCALES), values[:, s]) for s in range(SEEDS)])))
    chosen = {name: np.array(v) for name, v in read("select")["after"].items()}
    for name, v in chosen.items():
        if name != "random":
            print(f"{name} frozen logits less random: {mean_pm(v - chosen['random'])}")


def figure(out: Path):
    """Loss against decay, against b, and for the ways of selection."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 3, figsize=(11, 3.2), constrained_layout=True)

    def draw(axis, x, values, **style):
        values = np.array(values)
        axis.errorbar(x, values.mean(1), values.std(1, ddof=1) / SEEDS**0.5, capsize=2, **style)

    for k, size in enumerate(SIZES):
        test, tuned, scaled, selected = (
            json.loads((out / f"{name}_{size}.json").read_text()) for name in ("pretrained", "decay", "scale", "select")
        )
        for name, values, mark in (("pre-training", test["test"], "o--"), ("after LoRA", tuned["after"], "s-")):
            values = np.array(values) - np.array(values).mean(1).min()
            draw(axes[0], DECAYS, values, fmt=mark, color=f"C{k}", ms=4, label=f"{name}, {size}")
        after = np.array(scaled["after"])
        draw(axes[1], SCALES, after - after[SCALES.index(1.0)], fmt="s-", color=f"C{k}", ms=4, label=size)
        chosen = {name: np.array(v) for name, v in selected["after"].items()}
        names = [name for name in chosen if name != "random"]
        gaps = [chosen[name] - chosen["random"] for name in names]
        draw(axes[2], np.arange(len(names)) + 0.1 * k, gaps, fmt="s", color=f"C{k}", ms=4, label=size)
        axes[2].set_xticks(range(len(names)), names)
    axes[0].set(
        xscale="log", xlabel="weight decay of pre-training", ylabel="held-out loss above its least", ylim=(-0.01, 0.55)
    )
    axes[1].set(xlabel="b on the frozen logits", ylabel="loss after LoRA less that at b = 1")
    axes[2].set(xlabel="frozen logits of the examples", ylabel="loss after LoRA less random's", xlim=(-0.4, 2.5))
    for axis in axes:
        axis.legend(fontsize=7)
        axis.axhline(0, color="grey", lw=0.6)
    return fig


STAGES = {"pretrain": pretrain, "decay": decay, "scale": scale, "select": select, "report": report}


def main(words: list[str]) -> int:
    if not words or any(stage not in STAGES for stage in words[1:2]):
        print(__doc__)
        return 2
    out = Path(words[0])
    out.mkdir(parents=True, exist_ok=True)
    for stage in words[1:2] or STAGES:
        for size in words[2:3] or SIZES:
            STAGES[stage](out, size)
    if not words[1:]:
        import matplotlib

        matplotlib.use("Agg")
        figure(out).savefig(Path(__file__).parent.parent / "docs" / "small_transformer.png", dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
