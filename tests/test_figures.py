"""Figures: what is drawn and written, from made-up predictions."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr

import lorastate as ls
from lorastate.errors import Code, SolveError
from lorastate.figures import curves, drawing, maps, published, questions

SETTING = ls.Setting(ls.Pretraining(0.1, 0.01), ls.Finetuning(3.0, 0.3))
PATH = "pretraining.lam"


@pytest.fixture
def theory(monkeypatch):
    """Predictions that break symmetry below lam = 0.03 and fail at the places that are added to `failing`."""
    failing, asked = {}, []

    def predict(setting, throw=True):
        lam = float(setting.pretraining.lam)
        codes = {"pretraining": Code.ok, "finetuning": Code.ok} | failing.get(round(lam, 6), {})
        broken = lam < 0.03

        class Made(SimpleNamespace):
            @property
            def rs(self):
                asked.append(lam)
                return {"test_error": 2 + lam, "overlap": 0.1, "free_energy": 1.0, "code": "ok"}

        values = {"broken": broken, "test_error": 1 + lam, "overlap": 0.5 + lam, "test_error_frozen": 3.0 + lam}
        return Made(finetuning=values, code=codes.get, stderr=lambda stage, name: 0.01, test_error=1 + lam)

    monkeypatch.setattr(curves, "predict", predict)
    return SimpleNamespace(failing=failing, asked=asked)


@pytest.fixture
def axes():
    return drawing.side_by_side(1, 4, 3)[1]


def test_backend_is_left_alone():
    words = "import sys, matplotlib; matplotlib.use('svg'); import lorastate.figures"
    words += "; assert matplotlib.get_backend() == 'svg' and 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", words], check=True)


def test_rows_say_phase_and_code(theory):
    theory.failing[0.02] = {"finetuning": Code.stalled}
    theory.failing[0.1] = {"pretraining": Code.max_steps, "finetuning": Code.max_steps}
    grid, names = (0.01, 0.02, 0.05, 0.1), ("test_error", "test_error_frozen")
    one, two, three, four = curves.scan(SETTING, PATH, grid, names)
    assert one == {PATH: 0.01, "code": "ok", "broken": True, "test_error": 1.01, "test_error_stderr": 0.01,
                   "test_error_frozen": 3.01, "test_error_frozen_stderr": 0.01}  # fmt: skip
    # What pre-training decides is there without fine-tuning.
    assert two["code"] == "finetuning: stalled" and two["broken"] is None and two["test_error"] is None
    assert two["test_error_frozen"] == 3.02
    assert three["broken"] is False
    assert four["code"] == "pretraining: max_steps" and four["test_error_frozen"] is None
    assert not theory.asked


def test_a_bar_that_is_not_there_is_none(theory, monkeypatch, axes):
    """JSON has no NaN, and a line is drawn without the bar."""
    made = curves.predict

    def predict(setting, throw=True):
        found = made(setting, throw)
        found.stderr = lambda stage, name: float("nan")
        return found

    monkeypatch.setattr(curves, "predict", predict)
    rows = curves.scan(SETTING, PATH, np.array([0.04, 0.05]), ("test_error",))
    assert rows[0]["test_error"] == 1.04 and rows[0]["test_error_stderr"] is None
    json.dumps(rows, allow_nan=False)
    curves.draw_line(axes, rows, PATH, "test_error", "C0")


def test_symmetric_values_at_every_second_broken_point(theory):
    grid = np.array([0.01, 0.015, 0.02, 0.025, 0.04, 0.05])
    rows = curves.scan(SETTING, PATH, grid, ("test_error",), symmetric=True)
    assert sorted(theory.asked) == [0.01, 0.02] and ["rs" in row for row in rows] == [True, False, True] + 3 * [False]
    x, y = curves._continuation(rows, PATH, "test_error")
    # Joined to the line where symmetry holds, and not drawn beyond.
    np.testing.assert_allclose(x, [0.01, 0.02, 0.04, 0.05])
    np.testing.assert_allclose(y, [2.01, 2.02, 1.04, np.nan])


def test_symmetric_values_at_fewer_points_of_a_fine_grid(theory):
    curves.scan(SETTING, PATH, np.linspace(0.001, 0.02, 48), ("test_error",), symmetric=True)
    assert len(theory.asked) == 12


def test_the_map_that_is_best_for_its_own_error(monkeypatch):
    """Between the points of a line; none where the best one is at an end, or nothing is known."""

    def pretrain(pre, numerics, throw):
        return SimpleNamespace(values={"test_error": math.log(float(pre.lam) / 0.03) ** 2})

    monkeypatch.setattr(published, "pretrain", pretrain)
    grid = np.geomspace(0.005, 0.3, 7)

    def rows(errors):
        return [{PATH: x, published._MAP_ERROR: e} for x, e in zip(grid, errors, strict=True)]

    errors = np.log(grid / 0.03) ** 2
    assert published._best_map(SETTING, PATH, rows(errors)) == pytest.approx(0.03, rel=1e-3)
    assert published._best_map(SETTING, PATH, rows(grid)) is None
    assert published._best_map(SETTING, PATH, rows([None] * 7)) is None


def test_lines(theory, axes):
    rows = curves.scan(SETTING, PATH, np.array([0.01, 0.02, 0.04, 0.05]), ("test_error",), symmetric=True)
    assert curves.draw_line(axes, rows, PATH, "test_error", "C0", "theory") is None  # it rises: no minimum inside
    solid, dotted = axes.lines
    assert solid.get_linestyle() == "-" and dotted.get_linestyle() == ":"
    assert dotted.get_color() == solid.get_color() and dotted.get_linewidth() < solid.get_linewidth()
    np.testing.assert_allclose(solid.get_ydata(), [1.01, 1.02, 1.04, 1.05])


def test_minimum_is_marked(axes):
    rows = [{PATH: x, "test_error": (x - 2.0) ** 2, "test_error_stderr": 0.1} for x in (1.0, 2.0, 3.0)]
    assert curves.draw_line(axes, rows, PATH, "test_error", "C0") == 2.0 and len(axes.lines) == 2


def test_a_figure(theory, tmp_path):
    theory.failing[0.003] = {"finetuning": Code.stalled}
    written = ls.figures.figure3(tmp_path, progress=False)
    assert [path.name for path in written] == ["figure3.png", "figure3.pdf", "figure3.json"]
    assert all(path.stat().st_size > 1000 for path in written)
    curves = json.loads(written[-1].read_text())["curves"]
    assert [len(c["rows"]) for c in curves] == [25, 25]
    assert [c["rows"][0]["code"] for c in curves] == ["finetuning: stalled"] * 2
    assert all(c["rows"][2]["rs"]["test_error"] > 2 for c in curves)


def test_one_legend_with_one_entry_for_what_is_unstable():
    figure, panels = drawing.side_by_side(2, 8, 4)
    for axes, color in zip(panels, ("C0", "C1"), strict=True):
        axes.plot([1, 2], [1, 2], label=drawing.SYMMETRIC, color=color)
        axes.plot([1, 2], [2, 1], label=f"line {color}")
    drawing.legend_below(figure, panels)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == ["line C0", "line C1", drawing.SYMMETRIC]
    assert legend.get_lines()[-1].get_color() == "0.3"


def test_squares_of_lowest_minima(axes, monkeypatch):
    asked = []

    def simulate(setting, **options):
        asked.append(options)
        return SimpleNamespace(
            dimension=options["dimension"], mean=lambda search, name: {"deep": 0.5}[search],
            stderr=lambda search, name: 0.01,
        )  # fmt: skip

    monkeypatch.setattr(published, "simulate", simulate)
    found = published._squares(axes, SETTING, ls.figures.Training(), progress=False)
    assert len(found) == 6 and found[0]["mean"] == 0.5 and {row["ridge"] for row in found} == {0.05, 1.0}
    wanted = {"stage": "finetuning", "dimension": 600, "runs": 4, "seed": 0, "starts": 4, "moves": 20}
    assert asked[0] == wanted


def test_training_that_failed_is_no_square(axes):
    def mean(search, name):
        raise SolveError("finetuning", Code.max_steps, "run 0")

    assert drawing.draw_square(axes, 1.0, SimpleNamespace(mean=mean, dimension=150), "test_error", "C0") is None
    assert not axes.containers


@pytest.mark.parametrize("failed", [False, True])
def test_where_symmetry_breaks(monkeypatch, failed):
    from lorastate.diagnosis import thresholds as stability

    def threshold(setting, path, low, high, rtol):
        if failed:
            raise SolveError("finetuning", Code.stalled, "between")
        return low + 0.1

    monkeypatch.setattr(stability, "instability_threshold", threshold)
    rows = [{PATH: x, "broken": b} for x, b in ((1.0, False), (4.0, True), (9.0, None), (16.0, True), (25.0, False))]
    places = maps._breaks(SETTING, PATH, rows)
    assert places == pytest.approx([2.0, 20.0] if failed else [1.1, 16.1])


# ---- what those who run LoRA ask


@pytest.fixture
def adapted(monkeypatch):
    """Predictions of the factor and the ridge of fine-tuning, and what training measures: the same and a tenth more."""

    def values(setting):
        c, ridge = (float(ls.get(setting, path)) for path in (questions._FACTOR, questions._RIDGE))
        return {"broken": False, "test_error": 1 + (c - ridge) ** 2, "forgetting_error": 2 + c / ridge,
                "best_adapter_factor": ridge, "test_error_best_factor": 1.0, "test_error_frozen": 1.5}  # fmt: skip

    def predict(setting, throw=True):
        return SimpleNamespace(finetuning=values(setting), pretraining={"test_error": 2.0}, code=lambda stage: Code.ok,
                               stderr=lambda stage, name: 0.01)  # fmt: skip

    def simulate(setting, dimension, **options):
        if float(ls.get(setting, questions._RIDGE)) == 3.0:
            return SimpleNamespace(mean=failing, dimension=dimension)
        mean = {name: 1.1 * value for name, value in values(setting).items()}
        return SimpleNamespace(
            mean=lambda stage, name: mean[name], stderr=lambda stage, name: np.nan, dimension=dimension
        )

    def failing(stage, name):
        raise SolveError(stage, Code.max_steps, "run 0")

    monkeypatch.setattr(curves, "predict", predict)
    monkeypatch.setattr(questions, "predict", predict)
    monkeypatch.setattr(questions, "simulate", simulate)


def test_forgetting(adapted, tmp_path):
    written = ls.figures.forgetting(tmp_path, ls.figures.Training(30, 2), progress=False)
    assert all(path.stat().st_size > 1000 for path in written)
    data = json.loads(written[-1].read_text())
    for name in ("identity", "softmax"):
        assert [line["setting"]["finetuning"]["alpha"] for line in data[name]] == [1.0, 3.0, 10.0]
        for line in data[name]:
            # From the ridge that is best for E', here the one nearest to c = 1.
            best = min(line["ridges"], key=lambda row: row["test_error"])["finetuning.lam"]
            assert abs(np.log(best)) < 0.2
            assert [row["forgetting_error"] for row in line["factors"]] == pytest.approx(
                [2 + row["finetuning.adapter_factor"] / best for row in line["factors"]]
            )
            first, _, failed = line["simulation"]
            assert first["test_error"] == pytest.approx(1.1 * 1.49) and first["test_error_stderr"] is None
            assert first["forgetting_error"] == pytest.approx(1.1 * (2 + 1 / 0.3))
            assert failed == {"finetuning.lam": 3.0}


def test_factor(adapted, tmp_path):
    data = json.loads(ls.figures.factor(tmp_path, ls.figures.Training(30, 2), progress=False)[-1].read_text())
    for name, most in (("softmax", 8.0), ("identity", 2.5)):
        for line, ridge in zip(data[name], (0.05, 0.5, 2.0), strict=True):
            c = [row["finetuning.adapter_factor"] for row in line["rows"]]
            assert (c[0], c[-1]) == pytest.approx((0.25, most))
            assert [row["test_error"] for row in line["rows"]] == pytest.approx([1 + (x - ridge) ** 2 for x in c])
            assert line["simulation"]["best_adapter_factor"] == pytest.approx(1.1 * ridge)
    assert "simulation" not in json.loads(ls.figures.factor(tmp_path, progress=False)[-1].read_text())["softmax"][0]


def test_lowest_point_of_a_grid():
    x, y = np.geomspace(0.1, 2.0, 7), np.geomspace(1.0, 30.0, 9)
    a, b = np.meshgrid(np.log(x / 0.4), np.log(y / 7.0), indexing="ij")
    assert questions.lowest([x, y], 3 + a**2 + a * b + 2 * b**2) == pytest.approx((0.4, 7.0), rel=1e-9)
    assert questions.lowest([x], (np.log(x / 0.4)) ** 2) == pytest.approx((0.4,), rel=1e-9)
    assert np.isnan(questions.lowest([x, y], a)).all()


def test_decay(monkeypatch, tmp_path):
    """Curves are means over seeds with their errors, optima that are none are left out, rings are lowest points."""
    place = {questions._LAM: lambda alpha: 0.01 * alpha**-0.2, questions._RIDGE: lambda alpha: 0.3 * alpha**0.1}

    def sweep(setting, grid, optimize=(), minimize="test_error", progress=True):
        coords = {path: list(values) for path, values in grid.items()}
        if not optimize:
            alpha, names = float(setting.pretraining.alpha), {1: "pretraining.test_error", 2: "finetuning.test_error"}
            logs = np.meshgrid(*(np.log(np.array(x) / place[path](alpha)) for path, x in grid.items()), indexing="ij")
            return xr.Dataset({names[len(grid)]: (tuple(grid), 1 + sum((log - 0.1) ** 2 for log in logs))}, coords)
        seed, alpha = np.meshgrid(grid["numerics.seed"], grid["pretraining.alpha"], indexing="ij")
        dims, end = ("numerics.seed", "pretraining.alpha"), np.where(alpha < 0.05, 0.0, 1.0)
        found = {f"optimum.{path}": (dims, place[path](alpha) * (1 + 0.01 * (seed - 1))) for path in optimize}
        return xr.Dataset(found | {"optimum.converged": (dims, end)}, coords)

    monkeypatch.setattr(questions, "sweep", sweep)
    data = json.loads(ls.figures.decay(tmp_path, progress=False)[-1].read_text())
    alphas = np.array(data["pretraining.alpha"])
    for minimize, paths in (("pretraining.test_error", [questions._LAM]), ("test_error", list(place))):
        for path in paths:
            lost = int(np.sum(alphas < 0.05))
            curve, want = data[minimize][path], place[path](alphas[lost:])
            assert curve["mean"][:lost] == [None] * lost and curve["mean"][lost:] == pytest.approx(want.tolist())
            assert curve["stderr"][lost:] == pytest.approx((0.01 / np.sqrt(3) * want).tolist())
        missing, *dense = data[minimize]["dense"]
        assert set(missing) == {"pretraining.alpha"} and len(dense) == 2
        for row in dense:
            here = {path: np.exp(0.1) * place[path](row["pretraining.alpha"]) for path in paths}
            assert {path: row[path] for path in paths} == pytest.approx(here, rel=1e-6)
