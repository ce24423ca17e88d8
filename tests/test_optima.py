"""Curves of optima: every point of a sweep descended, from its neighbour, and against a dense grid."""

import json

import numpy as np
import pytest

import lorastate as ls
from lorastate.cli import main as cli
from lorastate.cli.sweep import Sweep
from lorastate.design.descent import End
from lorastate.setting.files import setting_to_dict
from lorastate.sweeps import optima
from lorastate.sweeps.dataset import summary
from lorastate.sweeps.sweep import SweepInterrupted

OVER = ("pretraining.lam", "finetuning.lam")
GRID = {"numerics.seed": [0, 1], "pretraining.alpha": [0.1, 0.2, 0.4]}


def setting(**pre):
    numerics = ls.Numerics(nodes=512, finetuning_nodes=1024, replicas=2)
    pre = {"alpha": 0.2, "lam": 0.1, "activation": "identity", "tokens": 2, **pre}
    return ls.Setting(ls.Pretraining(**pre), ls.Finetuning(alpha=6.0, lam=0.6), numerics)


@pytest.fixture(scope="module")
def curve():
    return ls.sweep(setting(), GRID, optimize=OVER)


def at(data, **where):
    return data.sel({"numerics.seed": where.get("seed", 0), "pretraining.alpha": where["alpha"]})


def test_every_point_is_an_optimum(curve):
    assert np.all(curve["optimum.converged"] == 1) and np.all(curve["optimum.gradient_norm"] < 1e-5)
    assert set(curve["optimum.end"].values.ravel()) <= {list(End).index(e) for e in (End.small, End.unresolved)}
    for alpha in GRID["pretraining.alpha"]:
        point = at(curve, alpha=alpha)
        alone = ls.optimize(ls.replace(setting(), "pretraining.alpha", alpha), OVER)
        for path in OVER:
            assert float(point[f"optimum.{path}"]) == pytest.approx(float(ls.get(alone.setting, path)), rel=1e-3), path
        # Every prediction is that of the setting with these fields.
        there = {path: float(point[f"optimum.{path}"]) for path in OVER} | {"pretraining.alpha": alpha}
        here = setting()
        for path, value in there.items():
            here = ls.replace(here, path, value)
        solution = ls.predict(here)
        for stage in ("pretraining", "finetuning"):
            for name, value in getattr(solution, stage).items():
                np.testing.assert_allclose(point[f"{stage}.{name}"], value, rtol=1e-6, atol=1e-7, err_msg=name)
        assert float(point["finetuning.test_error_stderr"]) == pytest.approx(
            solution.stderr("finetuning", "test_error"), rel=1e-3
        )


def test_against_a_dense_grid(curve):
    lams = [float(at(curve, alpha=0.2)[f"optimum.{path}"]) for path in OVER]
    factors = np.exp(np.linspace(-0.6, 0.6, 7))
    dense = ls.sweep(
        ls.replace(setting(), "pretraining.alpha", 0.2),
        {path: (lam * factors).tolist() for path, lam in zip(OVER, lams, strict=True)},
    )
    values = dense["finetuning.test_error"].values
    assert np.unravel_index(values.argmin(), values.shape) == (3, 3)
    assert values[3, 3] == pytest.approx(float(at(curve, alpha=0.2)["finetuning.test_error"]), rel=1e-9)
    # And the optimum is where a parabola through the grid has its minimum.
    for k, line in enumerate((values[:, 3], values[3])):
        fit = np.polynomial.Polynomial.fit(np.log(factors[1:-1]), line[1:-1], 4)
        near = [z.real for z in fit.deriv().roots() if abs(z.imag) < 1e-9 and abs(z) < 0.3]
        assert near and min(map(abs, near)) < 0.01, k


def test_identity_needs_no_other_lambda(curve):
    """On fresh inputs fine-tuning sees Delta_eff alone, which is E but for a factor: what is best for E is for E'."""
    before = ls.sweep(setting(), {"pretraining.alpha": [0.2]}, optimize=["pretraining.lam"],
                      minimize="pretraining.test_error")  # fmt: skip
    lam, low = float(before["optimum.pretraining.lam"][0]), float(before["pretraining.test_error"][0])
    for factor in (0.9, 1.1):
        assert float(ls.predict(ls.replace(setting(), "pretraining.lam", factor * lam)).pretraining["test_error"]) > low
    # (The nodes see a little more than Delta_eff.)
    assert lam == pytest.approx(float(at(curve, alpha=0.2)["optimum.pretraining.lam"]), rel=1e-2)


def test_from_the_neighbour_and_on_after_an_interruption(curve, tmp_path, monkeypatch):
    started, true = [], optima.optimize

    def counted(stop):
        def optimize(s, over, minimize):
            if len(started) == stop:
                raise KeyboardInterrupt
            started.append([float(ls.get(s, path)) for path in over])
            return true(s, over, minimize)

        return optimize

    monkeypatch.setattr(optima, "optimize", counted(2))
    with pytest.raises(SweepInterrupted) as stop:
        ls.sweep(setting(), GRID, optimize=OVER, out=tmp_path)
    assert (stop.value.finished, stop.value.total) == (2, 6)
    monkeypatch.setattr(optima, "optimize", counted(99))
    again = ls.sweep(setting(), GRID, optimize=OVER, out=tmp_path)
    assert len(started) == 6
    assert again.equals(curve)
    assert started[0] == [0.1, 0.6]  # the setting's own
    values = [curve[f"optimum.{path}"].values for path in OVER]
    for k, (seed, place) in enumerate([(0, 1), (0, 2), (1, 0), (1, 1), (1, 2)], 1):
        near = (seed, place - 1) if place else (seed - 1, 0)
        np.testing.assert_allclose(started[k], [v[near] for v in values], rtol=1e-12)
    with pytest.raises(ls.SettingError, match="another directory"):
        ls.sweep(setting(), GRID, optimize=OVER, minimize="overlap", out=tmp_path)


def test_what_cannot_be_solved_disturbs_nobody():
    found = ls.sweep(setting(), {"pretraining.kappa": [0.2, 1.0]}, optimize=["finetuning.lam"])
    narrow, wide = (found.sel({"pretraining.kappa": kappa}) for kappa in (0.2, 1.0))
    assert int(narrow["pretraining.code"]) == ls.Code.too_narrow and float(narrow["optimum.converged"]) == 0
    assert np.isnan(narrow["optimum.finetuning.lam"]) and int(narrow["optimum.end"]) == -1
    assert float(wide["optimum.converged"]) == 1
    assert summary(found)["no_optimum"] == 1 and summary(found)["failed"] == 1


def test_the_point_before():
    shape = (2, 3, 4)
    chain = [23]
    while chain[-1]:
        chain.append(optima.before(chain[-1], shape))
    assert [np.unravel_index(i, shape) for i in chain] == [
        (1, 2, 3), (1, 2, 2), (1, 2, 1), (1, 2, 0), (1, 1, 0), (1, 0, 0), (0, 0, 0)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "given, words",
    [({"optimize": ["pretraining.alpha"]}, "an axis of the grid"),
     ({"optimize": ["pretraining.tokens"]}, "not a continuous field"),
     ({"optimize": "pretraining.lam"}, "names no fields"),
     ({"optimize": OVER, "minimize": "loss"}, "allowed: \"test_error\""),
     ({"optimize": OVER, "gradient": "test_error"}, "beside optimize")],
)  # fmt: skip
def test_bad_options(given, words):
    with pytest.raises(ls.SettingError, match=words):
        ls.sweep(setting(), GRID, **given)


def test_a_searched_recalibration_is_refused():
    with pytest.raises(ls.SettingError, match=r"finetuning\.recalibration in optimize"):
        ls.sweep(ls.replace(setting(), "finetuning.recalibration", "error"), GRID, optimize=OVER)


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Sweep, "_prepare", lambda self: None)
    toml = tmp_path / "s.toml"
    lines = []
    for section, values in setting_to_dict(setting()).items():
        lines += [f"[{section}]", *(f"{k} = {json.dumps(v)}" for k, v in values.items())]
    toml.write_text("\n".join(lines))
    args = ["sweep", str(toml), "--grid", "pretraining.alpha=0.1,0.2,0.4", "--out", str(tmp_path), "--devices", "1"]
    assert cli.main([*args, "--optimize", "pretraining.lam,finetuning.lam"]) == 0
    said = capsys.readouterr().out
    assert "3 points, 0 of them not solved" in said and "no optimum" not in said
    assert (tmp_path / "sweep.nc").exists() and (tmp_path / "sweep.png").stat().st_size > 10_000
    assert cli.main([*args, "--optimize", "pretraining.lan"]) == 2
    assert "did you mean pretraining.lam" in capsys.readouterr().err
