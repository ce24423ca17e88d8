"""The command `practice`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from .._version import __version__
from .options import Json
from .output import print_json, say
from .tables import number, table


@dataclass
class Practice:
    """What the theory says about a layer of your own: Delta_eff, the factor b, inputs to label, the E' to expect."""

    files: Annotated[
        Positional[tuple[Path, ...]],
        arg(metavar="FILE", help="Arrays (.npz, .safetensors): W, S, or W_Q and W_K; X; if there are any, labels."),
    ]
    examples: Annotated[int | None, arg(help="Examples of the LoRA (as many as are labelled).")] = None
    ridge: Annotated[float, arg(help="Ridge lam' on w, in the sum of losses.")] = 0.1
    rank: Annotated[int, arg(help="Rank of the LoRA, 1 to 4.")] = 1
    teacher_rank: Annotated[int, arg(help="Rank of the update that the labels ask for, 1 to 4.")] = 1
    tokens: Annotated[int | None, arg(help="Tokens of an input, 2 to 8, where X is a list of tokens.")] = None
    activation: Annotated[Literal["softmax", "identity"], arg(help="What attention is made with.")] = "softmax"
    beta: Annotated[float | None, arg(help="Inverse temperature of softmax (1).")] = None
    labels_are: Annotated[
        Literal["auto", "attention", "preactivation"], arg(help="Rows that sum to one, or logits; auto looks.")
    ] = "auto"
    update_size: Annotated[
        float | None, arg(help="Strength |w*|^2/D of the update; else estimated, from labels that are centred.")
    ] = None
    standardise: Annotated[
        Literal["auto", "none", "diagonal", "full"], arg(help="How tokens are brought to mean 0, covariance 1.")
    ] = "auto"
    score: Annotated[Literal["frobenius", "without_shift"], arg(help="What selection is by.")] = "frobenius"
    layer: Annotated[str, arg(help="What the names of the layer's arrays start with, in a checkpoint of many.")] = ""
    heads: Annotated[int, arg(help="Heads of queries in W_Q.")] = 1
    head: Annotated[int, arg(help="The head to look at, from 0.")] = 0
    draws: Annotated[int, arg(help="Resamples carried through the theory; 0 for no forecast of E'.")] = 24
    seed: Annotated[int, arg(help="Seed of the test and of resamples.")] = 0
    json: Json = False

    def __call__(self) -> int:
        from ..practice.assess import assess

        options = {name: value for name, value in vars(self).items() if name not in ("files", "json")}
        facts = assess(self.files, **options).summary()
        if self.json:
            print_json({**facts, "version": __version__})
        else:
            say(_page(facts))
        return 0


def _page(facts: Mapping[str, Any]) -> str:
    """An assessment in words and tables."""
    parts = [_layer_lines(facts), _law_lines(facts)]
    if facts["labelled"] is None:
        parts.append("No labels: effective noise, b and E' need some (the array labels).\n")
    else:
        parts.append(_labelled(facts))
    if facts["forecasts"]:
        parts.append(_forecasts(facts))
    elif facts["no_forecast"]:
        parts.append(f"No forecast of E': {facts['no_forecast']}.\n")
    return "\n".join([*parts, _selected(facts["selected"])])


def _layer_lines(facts: Mapping[str, Any]) -> str:
    lines = [f"Layer: D = {facts['dimension']}, {facts['tokens']} tokens an input, map from {facts['weights']}."]
    if facts["lost_antisymmetric"] > 1e-12:
        lines.append(
            f"Lost: {100 * facts['lost_antisymmetric']:.3g} % of the map (squared norm) is antisymmetric; the theory's "
            "logits are symmetric."
        )
    if facts["negative"] > 1e-6:
        lines.append(f"{100 * facts['negative']:.3g} % of Q is in negative eigenvalues, which a map W W^T has not.")
    how = {
        "none": "used as they are",
        "diagonal": "mean and variance of every entry taken out, and the map moved along",
        "full": "mean and covariance taken out, and the map moved along",
    }
    lines.append(f"Tokens: {how[facts['standardised']]}.\nQ = Tr S^2/D = {number(facts['Q'], 4)}.\n")
    return "\n".join(lines)


def _law_lines(facts: Mapping[str, Any]) -> str:
    law = facts["law"]
    words = {
        "Gaussian": "Frozen outputs are Gaussian, as the theory assumes",
        "nearly Gaussian": "Frozen outputs are nearly Gaussian: the departure is certain but small",
        "not Gaussian": "Frozen outputs are NOT Gaussian: the theory's numbers are rough guides here, not predictions",
    }
    meaning = {
        "mean": "largest mean of an entry, in standard deviations",
        "size": "|log| of their mean square over Q",
        "shape": "Kolmogorov-Smirnov distance from a Gaussian",
        "correlation": "largest correlation of two entries",
    }
    rows = [(meaning[k], number(v, 3), number(law["expected"][k], 3)) for k, v in law["departures"].items()]
    return f"{words[law['verdict']]} (p = {law['p_value']:.2g}).\n\n" + table(
        ("Departure from the law assumed", "here", "Gaussian tokens"), rows
    )


def _labelled(facts: Mapping[str, Any]) -> str:
    meaning = {
        "effective_noise": "Delta_eff, label noise that the frozen map leaves",
        "least_noise": "Delta_eff at the b below",
        "best_scale": "b = M/Q, factor on the frozen logits of least Delta_eff",
        "strength": "|w*|^2/D, strength of the update that labels ask for",
        "frozen_error": "error of the frozen layer on the examples",
    }
    rows = [(text, number(facts["labelled"][k][0], 4), f"{facts['labelled'][k][1]:.2g}") for k, text in meaning.items()]
    lost = facts["lost_labels"]
    more = f"{100 * lost:.3g} % of the labels (squared) is antisymmetric and left out.\n" if lost > 1e-9 else ""
    return table(("From the labelled examples", "value", "+-"), rows) + more


def _forecasts(facts: Mapping[str, Any]) -> str:
    lora = facts["lora"]
    rows = [
        (f["name"], number(f["b"], 3), number(f["test_error"], 4), f"{f['stderr']:.2g}", number(f["overlap"], 3),
         f["symmetry"])
        for f in facts["forecasts"]
    ]  # fmt: skip
    title = f"LoRA of rank {lora['rank']} on {lora['examples']} examples, ridge {lora['ridge']:g}"
    text = table((title, "b", "E'", "+-", "o_w", ""), rows)
    return text + f"Without a LoRA: {number(facts['forecasts'][0]['frozen'], 4)}.\n"


def _selected(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:12])) + (", ..." if len(indices) > 12 else "")
    return f"To label first (smallest frozen output, {len(indices)} inputs of X): {shown}"
