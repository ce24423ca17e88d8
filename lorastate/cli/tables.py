"""Tables and sentences: settings, predictions, optima, sweeps and simulations as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..predictions import prediction

if TYPE_CHECKING:
    from ..setting.stages import Setting

TITLE = {"pretraining": "Pre-training", "finetuning": "Fine-tuning"}


def number(value: float | None, digits: int = 6) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}g}"


def bar(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.1e}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, numbers to the right, one without a title to the left."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    lines.insert(1, ["-" * width if title else "" for width, title in zip(widths, head, strict=True)])

    def cell(i: int, text: str) -> str:
        return text.ljust(widths[i]) if i == 0 or not head[i] else text.rjust(widths[i])

    return "\n".join("  ".join(cell(i, text) for i, text in enumerate(line)).rstrip() for line in lines) + "\n"


def describe(setting: Setting) -> str:
    """The setting in two lines."""
    from ..setting.files import setting_to_dict

    lines = []
    for stage, title in TITLE.items():
        values = dict(setting_to_dict(setting)[stage])
        activation = f"{values.pop('activation')}"
        beta = values.pop("beta", None)
        shown = [activation if beta is None else f"{activation}(beta={beta:g})"]
        shown += [f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()]
        lines.append(f"{title + ':':<14}{', '.join(shown)}")
    return "\n".join(lines) + "\n"


def prediction_table(stage: str, summary: Mapping[str, Any]) -> str:
    errors = summary["quadrature_error"].get(stage, {})
    rows = [
        (name, number(value), bar(errors.get(name)), prediction(stage, name).meaning)
        for name, value in summary[stage].items()
    ]
    return table((TITLE[stage], "value", "+- quadrature", ""), rows)


def limits_table(limits: Any) -> str:
    rows = [
        (f"{stage} {name}", number(value), bar(limits.errors[stage].get(name)))
        for stage, values in limits.summary().items()
        for name, value in values.items()
    ]
    return table(("Bayes-optimal, fresh inputs", "value", "+- quadrature"), rows)


def status_line(status: Mapping[str, Mapping[str, Any]]) -> str:
    from ..errors import Code

    def one(stage: str) -> str:
        code, residual, steps = (status[stage].get(key) for key in ("code", "residual", "steps"))
        name = code if isinstance(code, str) else Code(int(code or 0)).name
        return f"{TITLE[stage]} {name}, residual {number(residual, 2)}, {steps} steps"

    return "; ".join(one(stage) for stage in TITLE if stage in status) + "."


def stability_lines(summary: Mapping[str, Any]) -> list[str]:
    """Where the theory takes many minima for one: what there is to see of it."""
    from ..diagnosis.page import double_wells

    lines = []
    for stage, title in TITLE.items():
        replicon = summary.get(stage, {}).get("replicon")
        if replicon is not None and replicon >= 1:
            unstable = f"replica symmetry is unstable (replicon {replicon:.3g}, stable below 1)"
            lines.append(f"{title}: {unstable}: training may differ from these numbers.")
    share = double_wells(summary)
    if share is not None:
        lines.append(
            f"Pre-training has many minima ({100 * share:.2g} % of its nodes have two wells), which its"
            " replica-symmetric theory takes for one: training may differ by some per cent."
        )
    return lines


def symmetry_lines(summary: Mapping[str, Any]) -> str:
    """In which phase fine-tuning is, and what to think of pre-training."""
    lines = stability_lines(summary)
    if summary["rs"]:
        rs = ", ".join(f"{name} {number(summary['rs'][name], 4)}" for name in ("test_error", "overlap", "free_energy"))
        lines.append(
            "Fine-tuning is a glass: many minima, one-step broken replica symmetry. Numbers are those of the lowest;"
            f" training from a random start may end higher.\nReplica-symmetric, unstable: {rs}."
        )
        lines += _depth_lines(summary)
    else:
        lines.append(f"Fine-tuning is {summary['symmetry']}.")
    return "\n".join(lines)


def _depth_lines(summary: Mapping[str, Any]) -> list[str]:
    """How deep the glass is, and what a second step of breaking changes if that was asked for."""
    from ..solution.nodes import DEEP

    p, q = summary["finetuning"]["p"], summary["finetuning"]["q"]
    lines = []
    if p < (1 - DEEP) * q:
        lines.append(f"The glass is deep (p/q = {p / q:.2g}): training has to search long to come near these minima.")
    if "breaking_error" in summary:
        change = summary["breaking_error"]
        if change is None:
            lines.append("Two steps of breaking found no solution.")
        else:
            parts = (f"{name} by {change[name]:+.2g}" for name in ("test_error", "overlap", "free_energy"))
            lines.append(f"A second step of breaking changes {', '.join(parts)}.")
    return lines


def branch_line(branches: Any) -> str:
    """Both branches of fine-tuning with m and free energy, and which one was taken."""
    from ..errors import Code

    parts = []
    for k, name in enumerate(("informative", "small")):
        energy, m = float(branches.free_energy[k]), float(branches.overlap[k])
        code = Code(int(branches.code[k])).name
        mark = " (taken)" if int(branches.chosen) == k else ""
        parts.append(f"{name} start {code}, m {number(m, 4)}, phi {number(energy)}{mark}")
    if abs(float(branches.free_energy[0]) - float(branches.free_energy[1])) < 1e-9:
        return "Branches: both starts lead to the same one."
    return f"Branches: {'; '.join(parts)}."


def optimum_table(optimum: Any) -> str:
    from ..setting.paths import get

    before, after = optimum.before.summary(), optimum.after.summary()
    names = {"pretraining.lam": "lambda", "finetuning.lam": "lambda'"}
    rows: list[tuple[str, ...]] = []
    for path in (*names, *(path for path in optimum.over if path not in names)):
        old, new = (number(float(get(setting, path))) for setting in (optimum.initial, optimum.setting))
        rows.append((names.get(path, path), old, "", new, ""))
    quantities = (
        ("finetuning", "effective_noise"),
        ("pretraining", "test_error"),
        ("finetuning", "test_error"),
        ("finetuning", "overlap"),
        ("pretraining", "overlap"),
    )
    for stage, name in quantities:
        pairs = [(s[stage].get(name), s["quadrature_error"].get(stage, {}).get(name)) for s in (before, after)]
        values = (text for value, error in pairs for text in (number(value), bar(error)))
        rows.append((prediction(stage, name).symbol, *values))
    first = optimum.path[0].get("gradient_norm") if optimum.path else None
    rows.append(("gradient norm", bar(first) or "-", "", bar(optimum.gradient_norm) or "-", ""))
    rows.append(("solves used", "", "", str(optimum.solves), ""))
    return table((f"Optimum ({optimum.minimize})", "before", "+- quadrature", "after", "+- quadrature"), rows)


def budget_table(optimum: Any) -> str:
    rows = [
        (entry["budget"], "yes" if entry["binds"] else "no", number(entry["excess"]), number(entry["price"]))
        for entry in optimum.budgets
    ]
    title = f"gain in {optimum.minimize} per unit of relaxation"
    return table(("budget", "binds", "excess", title), rows)


def scan_table(optimum: Any) -> str:
    keys = [key for key in optimum.scanned[0] if key not in ("value", "converged", "message")]
    rows = [
        (
            *(str(entry[key]) if isinstance(entry.get(key), int) else number(entry.get(key)) for key in keys),
            number(entry["value"]),
            "yes" if entry["converged"] else entry["message"],
        )
        for entry in optimum.scanned
    ]
    return table((*keys, optimum.minimize, "converged"), rows)


def sensitivity_table(found: Any) -> str:
    ordered = sorted(found.elasticities.items(), key=lambda item: -abs(item[1]))
    text = table(("field", "elasticity"), [(path, number(value)) for path, value in ordered])
    rows = []
    for k, curvature in enumerate(found.curvatures):
        weights = sorted(zip(found.over, found.directions[:, k], strict=True), key=lambda item: -abs(item[1]))
        name = ", ".join(f"{weight:+.2f} {path}" for path, weight in weights if abs(weight) > 0.1)
        rows.append((name, number(float(curvature))))
    return text + "\n\n" + table(("direction (in logarithms)", "curvature"), rows)


def simulation_tables(compared: Mapping[str, Any]) -> str:
    head = ("theory", "+- quadrature", "simulation", "+- stderr", "gap")
    tables = []
    for stage, title in TITLE.items():
        rows = [
            (
                name,
                number(entry["theory"]),
                bar(entry["quadrature_error"]),
                number(entry["mean"]),
                bar(entry["stderr"]),
                "" if entry["gap"] is None else f"{entry['gap']:+.1f}",
            )
            for name, entry in compared[stage].items()
        ]
        tables.append(table((title, *head), rows))
    runs, D = compared["runs"], compared["dimension"]
    tables.append(
        f"Simulation at D = {D}, {runs} run{'s' if runs > 1 else ''}, seed {compared['seed']}; the gap is "
        "simulation minus theory in units of the combined error bar.\n"
    )
    return "\n".join(tables)


def channel_tables(compared: Mapping[str, Any]) -> str:
    searches = compared["searches"]
    titles = {"deep_random": "deep, from random", "deep": "deep = lowest"}
    head = ["Fine-tuning alone", "theory", "+- quadrature"]
    for search in searches:
        head += [titles.get(search, search), "+- stderr"]
    rows = []
    for name, entry in searches["deep"].items():
        row = [name, number(entry["theory"]), bar(entry["quadrature_error"])]
        for found in searches.values():
            row += [number(found[name]["mean"]), bar(found[name]["stderr"])]
        rows.append(row)
    runs, D, starts = compared["runs"], compared["dimension"], compared["starts"]
    told = (
        f"Trained on the asymptotic channel at D = {D}, {runs} run{'s' if runs > 1 else ''}, seed {compared['seed']}; "
        f"in each the lowest minimum reached from w*, from {starts} random start{'s' if starts > 1 else ''}, and by "
        f"{compared['moves']} deep moves (perturb and descend) from the lowest random one and from the lowest of all.\n"
    )
    return "\n".join([table(head, rows), told] + ([compared["verdict"] + "\n"] if compared["verdict"] else []))


def verification_tables(found: Any) -> str:
    """Every quantity of each way of training, and the verdict."""
    from ..verification.result import WAYS

    head = ("theory", "+- quadrature", "D -> infinity", "+- stderr", "gap", "off", "slope", "from D", "")
    tables = []
    for way, title in WAYS.items():
        rows = [
            (
                prediction(row.stage, row.name).symbol,
                number(row.theory), bar(row.theory_error), number(row.law.limit), bar(row.law.limit_error),
                f"{row.gap:+.1f}", f"{100 * row.share:+.2f} %" if row.theory else "",
                number(row.law.slope, 3), str(row.law.smallest), row.verdict,
            )
            for row in found.rows
            if row.way == way
        ]  # fmt: skip
        if not rows:
            continue
        runs = ", ".join(f"{n} at D = {d}" for d, n in found.runs[way].items())
        tables.append(table((title[0].upper() + title[1:], *head), rows))
        failed = f", {found.failed[way]} of which failed and are left out" if found.failed[way] else ""
        tables.append(f"Runs: {runs}{failed}.\n")
    return "\n".join([*tables, found.verdict])


def sweep_lines(found: Mapping[str, Any]) -> str:
    lines = [f"{found['points']} points, {found['failed']} of them not solved"]
    for reason, count in found["codes"].items():
        lines.append(f"  {reason}: {count}")
    if found["no_optimum"]:
        lines.append(f"  no optimum: {found['no_optimum']} (see optimum.end)")
    if found["best"]:
        at = ", ".join(f"{path} = {v if isinstance(v, str) else number(v)}" for path, v in found["best"]["at"].items())
        error = f"{found['best']['test_error']:.6g} +- {found['best']['stderr']:.1e}"
        lines.append(f"lowest E' = {error} at {at}")
    return "\n".join(lines)


def cross_check_table(found: dict[str, Any]) -> str:
    """What another solver finds, beside ours."""
    rows = {"E'": found["value"], **{f"dE'/d {path}": slope for path, slope in found["gradient"].items()}}
    names = ("ours", "other", "difference")
    cells = [[name, *(number(row[key]) for key in names)] for name, row in rows.items()]
    return table(["another solver (jaxopt)", *names], cells)
