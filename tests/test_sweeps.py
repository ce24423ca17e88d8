"""Sweeps: a lane is a prediction; what is interrupted goes on; what is shared out comes together."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import xarray

import lorastate as ls
from lorastate.cli import main as cli
from lorastate.cli.sweep import Sweep
from lorastate.model.spectra import laws as base_law
from lorastate.runtime.journal import Journal
from lorastate.setting.files import setting_to_dict
from lorastate.solution import gradients
from lorastate.sweeps import chunks
from lorastate.sweeps import sweep as sweeps
from lorastate.sweeps.dataset import summary
from lorastate.sweeps.grid import parse_axis


@pytest.fixture
def start(tmp_path_factory):
    """Starts a process; `said` is what it has written to stderr."""
    running = []

    def begin(program, *args):
        log = tmp_path_factory.mktemp("process") / "stderr"
        with open(log, "w") as file:
            process: Any = subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(program), *map(str, args)], stderr=file
            )
        process.said = log.read_text
        running.append(process)
        return process

    yield begin
    for process in running:
        process.kill()
        process.wait()


def setting():
    numerics = ls.Numerics(nodes=512, finetuning_nodes=1024, replicas=2)
    pre = ls.Pretraining(alpha=0.2, lam=0.1, activation="identity", tokens=2)
    return ls.Setting(pre, ls.Finetuning(alpha=3.0, lam=0.6), numerics)


# ---------------------------------------------------------------- real solves

GRID = {"pretraining.kappa": [0.3, 1.0], "pretraining.lam": [0.01, 0.1]}


@pytest.fixture(scope="module")
def swept():
    return ls.sweep(setting(), GRID, gradient="test_error", chunk=4)


def test_a_lane_is_the_setting_alone_and_a_failed_one_disturbs_nobody(swept):
    # kappa = 0.3 is too narrow for its own solution.
    for kappa in GRID["pretraining.kappa"]:
        for lam in GRID["pretraining.lam"]:
            here = ls.replace(ls.replace(setting(), "pretraining.kappa", kappa), "pretraining.lam", lam)
            lane = swept.sel({"pretraining.kappa": kappa, "pretraining.lam": lam})
            alone = ls.predict(here, throw=False)
            assert int(lane["pretraining.code"]) == alone.code("pretraining")
            assert int(lane["finetuning.code"]) == alone.code("finetuning")
            assert alone.ok == (kappa == 1.0)
            if not alone.ok:
                assert np.isnan(lane["finetuning.test_error"]) and np.isnan(lane["gradient.pretraining.lam"])
                continue
            for stage in ("pretraining", "finetuning"):
                for name, value in getattr(alone, stage).items():
                    np.testing.assert_allclose(lane[f"{stage}.{name}"], value, rtol=1e-12, atol=1e-12)
                    error = alone.errors[stage][name]
                    np.testing.assert_allclose(lane[f"{stage}.{name}_stderr"], error, rtol=1e-7, atol=1e-12)
            for path, slope in ls.gradient(here)[1].items():
                np.testing.assert_allclose(lane[f"gradient.{path}"], slope, rtol=1e-9, atol=1e-11)
    assert summary(swept)["failed"] == 2
    assert summary(swept)["codes"] == {"pretraining too_narrow": 2, "finetuning upstream": 2}


def test_a_lane_with_wells_among_smooth_ones(monkeypatch):
    """Each is searched as it is alone: the one with wells a second time, with broken symmetry, where roundings decide
    which samples jump on the last step. The others do not wait for it."""
    groups, run = [], sweeps.run

    def noted(*given):
        for rows in run(*given):
            groups.append(sorted(rows))
            yield rows

    monkeypatch.setattr(sweeps, "run", noted)
    base, alphas = ls.replace(setting(), "finetuning.lam", 0.5), [0.8, 6.0, 7.0, 8.0]
    found = ls.sweep(base, {"finetuning.alpha": alphas}, chunk=4)
    assert groups == [[1, 2, 3], [0]]
    broken = []
    for alpha in alphas:
        lane = found.sel({"finetuning.alpha": alpha})
        alone = ls.predict(ls.replace(base, "finetuning.alpha", alpha))
        jumps = 0.1 if alone.symmetry == "one-step broken" else 0.0
        for name, value in alone.finetuning.items():
            near = 1e-12 + jumps * np.nan_to_num(alone.stderr("finetuning", name))
            np.testing.assert_allclose(lane[f"finetuning.{name}"], value, rtol=1e-12, atol=near)
        broken.append(alone.symmetry)
    assert broken == ["one-step broken", *["replica symmetric"] * 3]


def test_other_chunks_devices_and_processes(swept, tmp_path, start):
    # Three devices in each of two processes, chunks of one, against one device and one chunk.
    program = f"""
        import sys, jax
        jax.config.update("jax_num_cpu_devices", 3)
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        import conftest  # compiles as fast as here, in float64
        import lorastate as ls
        import test_sweeps as t
        port, process = sys.argv[1:]
        jax.distributed.initialize(f"127.0.0.1:{{port}}", 2, int(process))
        ls.sweep(t.setting(), t.GRID, gradient="test_error", out={str(tmp_path)!r}, devices="all", chunk=1)
    """
    port = free_port()
    both = [start(program, port, k) for k in (0, 1)]
    assert [p.wait(300) for p in both] == [0, 0], [p.said() for p in both]
    together = xarray.load_dataset(tmp_path / "sweep.nc", engine="scipy")
    assert set(together) == set(swept)
    for name in swept:
        np.testing.assert_allclose(together[name], swept[name], rtol=1e-11, atol=1e-12, err_msg=name)


# ---------------------------------------------------------------- bookkeeping, with solves that cost nothing


def row(s):
    x = float(s.pretraining.lam) + 10 * float(s.finetuning.alpha)
    out = {}
    for stage in ("pretraining", "finetuning"):
        out |= {f"{stage}.test_error": np.sin(x), f"{stage}.test_error_stderr": 0.1 * x, f"{stage}.code": 0.0}
    return out


MANY = {"pretraining.lam": np.geomspace(0.01, 1, 6).tolist(), "finetuning.alpha": [1.0, 2.0, 3.0]}


@pytest.fixture
def solved(monkeypatch):
    """Settings solved so far; `stop` interrupts before the n-th chunk."""

    class Log(list):
        stop = None
        chunks = 0

    log = Log()

    def run(settings, objective, mesh, lanes):
        log.chunks += 1
        if log.chunks == log.stop:
            raise KeyboardInterrupt
        log.extend(settings)
        yield from ({k: row(s)} for k, s in enumerate(settings))

    monkeypatch.setattr(sweeps, "run", run)
    return log


def test_interrupted_and_continued(solved, tmp_path):
    whole = ls.sweep(setting(), MANY, out=tmp_path / "whole")
    solved.clear()
    solved.chunks, solved.stop = 0, 3
    with pytest.raises(ls.SweepInterrupted, match=r"8 of 18 points are finished.*goes on") as stop:
        ls.sweep(setting(), MANY, out=tmp_path / "part")
    assert stop.value.finished == len(solved) == 8
    # What a killed process leaves of its last record is dropped, and nothing that is whole is computed again.
    file = tmp_path / "part/points-0.bin"
    file.write_bytes(file.read_bytes()[:-5])
    solved.clear()
    again = ls.sweep(setting(), MANY, out=tmp_path / "part")
    assert len(solved) == 18 - 7
    xarray.testing.assert_identical(again, whole)
    assert (tmp_path / "part/sweep.nc").read_bytes() == (tmp_path / "whole/sweep.nc").read_bytes()
    solved.clear()
    ls.sweep(setting(), MANY, out=tmp_path / "part")
    assert not solved
    loaded = xarray.load_dataset(tmp_path / "part/sweep.nc", engine="scipy")
    np.testing.assert_array_equal(loaded["finetuning.test_error"], whole["finetuning.test_error"])
    assert json.loads(loaded.attrs["setting"]) == setting_to_dict(setting())


def test_a_damaged_record_is_computed_again(solved, tmp_path):
    whole = ls.sweep(setting(), MANY, out=tmp_path)
    file = tmp_path / "points-0.bin"
    data = bytearray(file.read_bytes())
    data[-20] ^= 255
    file.write_bytes(data)
    solved.clear()
    xarray.testing.assert_identical(ls.sweep(setting(), MANY, out=tmp_path), whole)
    assert len(solved) == 1


def test_no_flipped_bit_is_read_as_a_value(tmp_path):
    """Wherever it is: in the names of the columns, in an index, in a value or in a checksum."""
    columns = ["pretraining.V", "finetuning.test_error"]
    values = np.random.default_rng(0).normal(size=(6, 2))
    journal = Journal(tmp_path, {"source": "a"}, 0)
    journal.append(columns, dict(enumerate(values[:4])))
    journal.append(columns, dict(enumerate(values[4:], 4)))
    whole = journal.path.read_bytes()
    for place, bit in itertools.product(range(len(whole)), (0, 5, 7)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        journal.path.write_bytes(damaged)
        names, rows = journal.rows()
        assert names == columns or not rows
        assert all(np.array_equal(row, values[index]) for index, row in rows.items())
        assert len(rows) < 6 or names == columns
    journal.path.write_bytes(whole[:-3])  # and what is not whole is written again
    again = Journal(tmp_path, {"source": "a"}, 0)
    again.append(columns, {5: values[5]})
    assert journal.path.read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"setting": ("pretraining.delta", 0.7)}, ["pretraining.delta = 0.5", "pretraining.delta = 0.7"]),
        ({"grid": {"finetuning.alpha": [1.0]}}, ["grid.pretraining.lam"]),
        ({"gradient": "overlap"}, ["gradient = None", "gradient = overlap"]),
    ],
)
def test_another_sweep_is_refused(solved, tmp_path, change, words):
    ls.sweep(setting(), MANY, out=tmp_path)
    other = ls.replace(setting(), *change["setting"]) if "setting" in change else setting()
    with pytest.raises(ls.SettingError) as error:
        ls.sweep(other, change.get("grid", MANY), out=tmp_path, gradient=change.get("gradient"))
    assert all(word in str(error.value) for word in [*words, "another directory"]), error.value


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        # What follows pre-training is not the number that it follows.
        ({"fine": {"delta": None}}, {"fine": {"delta": 0.5}}, "finetuning.delta = None, not finetuning.delta = 0.5"),
        ({"fine": {"activation": None}}, {"fine": {"activation": "identity"}}, "finetuning.activation"),
        ({"fine": {"tokens": None}}, {"fine": {"tokens": 2}}, "finetuning.tokens"),
        # Laws that settings files do not know.
        ({"base": lambda: base_law.Wishart(1.0)}, {"base": lambda: base_law.Wishart(2.0)}, "base.kappa0 = 1.0, not"),
        (
            {"base": lambda: base_law.FreeSum([(1.0, base_law.Wishart(1.0))])},
            {"base": lambda: base_law.FreeSum([(1.0 + 1e-15, base_law.Wishart(1.0))])},
            "pretraining.base.parts",
        ),
    ],
)
def test_what_looks_the_same_is_another_sweep(solved, tmp_path, before, after, words):
    def made(base=lambda: None, fine=None):
        pre = ls.Pretraining(alpha=0.2, lam=0.1, activation="identity", tokens=2, base=base())
        return ls.Setting(pre, ls.Finetuning(alpha=3.0, lam=0.6, **(fine or {})), setting().numerics)

    grid = {"pretraining.delta": [0.5, 2.0]}
    ls.sweep(made(**before), grid, out=tmp_path)
    with pytest.raises(ls.SettingError) as error:
        ls.sweep(made(**after), grid, out=tmp_path)
    assert words in str(error.value) and "another directory" in str(error.value)
    solved.clear()
    ls.sweep(made(**before), grid, out=tmp_path)
    assert not solved


def test_another_source_is_another_sweep(solved, tmp_path, monkeypatch):
    ls.sweep(setting(), MANY, out=tmp_path)
    monkeypatch.setattr(sweeps, "SOURCE", "another")
    with pytest.raises(ls.SettingError, match=r"another version of lorastate.*another directory"):
        ls.sweep(setting(), MANY, out=tmp_path)
    monkeypatch.setattr(sweeps, "SOURCE", "")  # it could not be read: nobody knows whether it is the same
    ls.sweep(setting(), MANY, out=tmp_path / "new")
    with pytest.raises(ls.SettingError, match=r"another version of lorastate.*another directory"):
        ls.sweep(setting(), MANY, out=tmp_path / "new")


class Halved(ls.Activation):
    name = "custom"
    forgets_shift = False

    def __call__(self, z):
        return z / 2

    def loss_terms(self, z, target):
        raise NotImplementedError


@pytest.mark.parametrize("activation", [np.tanh, lambda z: z / 2, Halved()])
def test_code_of_ones_own_is_not_kept(solved, tmp_path, activation):
    pre = ls.Pretraining(alpha=0.2, lam=0.1, activation=activation, tokens=2)
    own = ls.Setting(pre, ls.Finetuning(alpha=3.0, lam=0.6), setting().numerics)
    with pytest.raises(ls.SettingError, match=r"code of your own.*allowed"):
        ls.sweep(own, MANY, out=tmp_path / "out")
    assert not solved and not (tmp_path / "out").exists()
    ls.sweep(own, MANY)
    assert len(solved) == 18


def test_two_sweeps_at_once_into_one_directory(solved, tmp_path, monkeypatch):
    run = sweeps.run

    def another_starts(*args):
        with pytest.raises(ls.SettingError, match=rf"in use by another sweep \(process {os.getpid()} on .*allowed"):
            ls.sweep(setting(), MANY, out=tmp_path)
        return run(*args)

    monkeypatch.setattr(sweeps, "run", another_starts)
    whole = ls.sweep(setting(), MANY, out=tmp_path)
    assert len(solved) == 18
    xarray.testing.assert_identical(ls.sweep(setting(), MANY, out=tmp_path), whole)


def test_words_and_numbers_as_axes(solved):
    grid = {"pretraining.lam": [0.1, 0.2], "finetuning.inputs": ["fresh", "reused"], "pretraining.tokens": [2, 3]}
    data = ls.sweep(setting(), grid)
    assert dict(data.sizes) == {k: 2 for k in grid} and len(solved) == 8
    assert {(s.finetuning.inputs.name, s.pretraining.tokens) for s in solved} == {
        (name, t) for name in ("fresh", "reused") for t in (2, 3)
    }
    assert data["finetuning.inputs"].values.tolist() == ["fresh", "reused"]


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({}, ["grid is empty"]),
        ({"pretraining.lam": []}, ["pretraining.lam has no values"]),
        ({"pretraining.lam": [0.1, 0.1]}, ["more than once"]),
        ({"pretraining.lam": [0.1, -1.0]}, ["pretraining.lam = -1.0"]),
        ({"pretraining.lam": [float("nan")]}, ["pretraining.lam = nan"]),
        ({"pretraining.lamda": [0.1]}, ["pretraining.lamda"]),
        ({"pretraining.lam": 0.1}, ["not a list"]),
        ({"pretraining.lam": [1, 1.0]}, ["more than once"]),
        ({"finetuning.delta": [None, 0.5]}, ["finetuning.delta", "None", "numbers or words"]),
        ({"pretraining.activation": [np.tanh]}, ["pretraining.activation", "numbers or words"]),
        ({"finetuning.rho": [0.1]}, ["finetuning.rho", "no meaning"]),
        ({"pretraining.tokens": [2, float("inf")]}, ["pretraining.tokens = inf", "whole number"]),
        (
            {f"pretraining.{name}": np.linspace(0.1, 1, 200) for name in ("lam", "alpha", "delta", "kappa0")},
            ["the grid has 1,600,000,000 points", "at most 1,000,000"],
        ),
    ],
)
def test_bad_grids(solved, grid, words):
    with pytest.raises(ls.SettingError) as error:
        ls.sweep(setting(), grid)
    assert all(word in str(error.value) for word in words), error.value
    assert not solved


@pytest.mark.parametrize("options", [{"devices": 99}, {"devices": "some"}, {"chunk": 0}, {"gradient": "E"}])
def test_bad_options(solved, options):
    with pytest.raises(ls.SettingError, match=next(iter(options)) if "gradient" not in options else "objective"):
        ls.sweep(setting(), MANY, **options)


def test_devices_follow_the_default_one(monkeypatch):
    cpu, asked = jax.devices("cpu"), []

    def local_devices(backend=None):
        asked.append(backend)
        return list(cpu)

    monkeypatch.setattr(jax, "local_devices", local_devices)
    for default, backend in ((None, None), (cpu[-1], "cpu"), ("cpu", "cpu")):
        with jax.default_device(default):
            assert chunks.chosen_devices(None) == [cpu[-1] if default is cpu[-1] else cpu[0]]
            assert chunks.chosen_devices("all") == list(cpu)
        assert asked == [backend] * 2
        asked.clear()


def test_no_more_lanes_than_points():
    """Eight points on 64 devices are not 256 lanes."""
    one, many = jax.devices("cpu")[:1], jax.devices("cpu")[:1] * 64
    assert [chunks.lanes_on(many, chunk, points) for chunk, points in ((None, 8), (None, 100), (None, 10**4))] == [
        64, 128, 256,
    ]  # fmt: skip
    assert [chunks.lanes_on(one, chunk, 8) for chunk in (None, 1, 16)] == [4, 1, 8]


def test_sizes_that_lag_are_no_death(solved, tmp_path, monkeypatch):
    """On a disk of the net the size of a file may be old: what another process has finished is read before it counts
    as dead."""
    ls.sweep(setting(), MANY, out=tmp_path)
    journal = sweeps.Journal(tmp_path, json.loads((tmp_path / "sweep.json").read_text()), 0)
    columns, rows = journal.rows()
    reads = iter([(columns, {0: rows[0]})])
    monkeypatch.setattr(journal, "rows", lambda: next(reads, (columns, rows)))
    monkeypatch.setattr(journal, "size", lambda: 1)
    bar = SimpleNamespace(n=0, refresh=lambda: None)
    task: Any = SimpleNamespace(count=18, share=lambda process, processes: range(process, 18, processes))
    assert sweeps._await(task, journal, 2, 0.0, bar) == (columns, rows)
    lost = {index: values for index, values in rows.items() if index != 3}
    monkeypatch.setattr(journal, "rows", lambda: (columns, lost))
    with pytest.raises(ls.SweepIncomplete, match=r"process 1 of 2 .* 1 of its points are missing; 17 of 18"):
        sweeps._await(task, journal, 2, 0.0, bar)


def test_axes_of_the_command_line():
    path, values = parse_axis("pretraining.lam=log:1e-3:1:4")
    assert path == "pretraining.lam"
    np.testing.assert_allclose(values, [1e-3, 1e-2, 1e-1, 1])
    assert parse_axis("a.b=lin:0:1:3")[1] == [0.0, 0.5, 1.0]
    assert parse_axis("a.b=fresh, 2,0.5")[1] == ["fresh", 2, 0.5]
    for bad in ("a.b", "a.b=", "a.b=log:0:1:4", "a.b=log:1:2", "a.b=cube:1:2:3", "a.b=lin:1:2:0", "a.b=lin:1:x:2"):
        with pytest.raises(ls.SettingError, match="allowed"):
            parse_axis(bad)


def test_processes_that_do_not_meet(monkeypatch):
    def fail(*_):
        raise RuntimeError("DEADLINE_EXCEEDED: nobody there\nand many words more")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    for address in ("nonsense", ":1234", "host:", "host:0", "host:99999999", "host:one"):
        with pytest.raises(ls.SettingError, match="is no address; allowed: HOST:PORT"):
            Sweep(Path("x.toml"), coordinator=address, processes=2, process=1)._join()
    with pytest.raises(ls.SettingError, match=r"'host:1234' does not answer.*(DEADLINE_EXCEEDED: nobody there)"):
        Sweep(Path("x.toml"), coordinator="host:1234", processes=2, process=1)._join()


def test_command(solved, tmp_path, capsys, monkeypatch):
    file = tmp_path / "setting.toml"
    lines = [
        f"[{section}]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in keys.items())
        for section, keys in setting_to_dict(setting()).items()
    ]
    file.write_text("\n".join(lines))
    monkeypatch.setattr(Sweep, "_prepare", lambda self: None)
    words = ["sweep", str(file), "--grid", "pretraining.lam=log:0.01:1:6", "finetuning.alpha=1,2,3"]
    out = tmp_path / "out"
    assert cli.main([*words, "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert "18 points, 0 of them not solved" in shown.out and "lowest E'" in shown.out
    assert {p.name for p in out.iterdir()} == {
        "sweep.json", "points-0.bin", "process-0.lock", "sweep.nc", "sweep.png", "sweep.pdf"
    }  # fmt: skip
    assert cli.main([*words, "--set", "pretraining.delta=1", "--out", str(out)]) == 2
    assert "holds a sweep with pretraining.delta = 0.5" in capsys.readouterr().err
    solved.chunks, solved.stop = 0, 2
    assert cli.main([*words, "--out", str(tmp_path / "again")]) == 130
    assert "interrupted: 4 of 18 points are finished" in capsys.readouterr().err


# ---------------------------------------------------------------- several processes

SHARED = f"""
    import sys, time, jax
    jax.config.update("jax_enable_x64", True)
    if hasattr(jax.config, "jax_enable_recoverability"):
        jax.config.update("jax_enable_recoverability", True)
    import lorastate as ls
    from lorastate.sweeps import sweep as sweeps
    port, process, slow, out = sys.argv[1:]
    sys.path.insert(0, {os.path.dirname(__file__)!r})
    import test_sweeps as t
    def run(settings, *_):
        time.sleep(float(slow))
        return [{{k: t.row(s)}} for k, s in enumerate(settings)]
    sweeps.run = run
    if port != "0":
        jax.distributed.initialize(f"127.0.0.1:{{port}}", 2, int(process))
    try:
        ls.sweep(t.setting(), t.MANY, out=out, chunk=1, patience=3)
    except ls.SweepIncomplete as lost:
        print(lost, file=sys.stderr, flush=True)
        import os
        os._exit(3)
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(file, size):
    """Until the file has more bytes than that."""
    for _ in range(1200):
        if file.exists() and file.stat().st_size > size:
            return
        time.sleep(0.05)
    raise AssertionError(f"{file} does not grow")


def test_a_killed_sweep_goes_on(solved, tmp_path, start):
    process = start(SHARED, 0, 0, 0.3, tmp_path / "killed")
    wait_for(tmp_path / "killed/points-0.bin", 700)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed/sweep.nc").exists()
    assert start(SHARED, 0, 0, 0.0, tmp_path / "killed").wait(120) == 0
    ls.sweep(setting(), MANY, out=tmp_path / "whole")
    assert (tmp_path / "killed/sweep.nc").read_bytes() == (tmp_path / "whole/sweep.nc").read_bytes()


def test_a_process_that_dies_is_reported_and_a_restart_completes(tmp_path, start):
    port = free_port()
    first, second = (start(SHARED, port, k, slow, tmp_path) for k, slow in ((0, 0.0), (1, 0.5)))
    wait_for(tmp_path / "points-1.bin", 200)
    second.send_signal(signal.SIGKILL)
    assert first.wait(120) == 3
    message = first.said()
    assert "process 1 of 2 gives no sign of life" in message and "the same command completes them" in message, message
    port = free_port()
    both = [start(SHARED, port, k, 0.0, tmp_path) for k in (0, 1)]
    assert [p.wait(120) for p in both] == [0, 0], [p.said() for p in both]
    data = xarray.load_dataset(tmp_path / "sweep.nc", engine="scipy")
    assert np.all(np.isfinite(data["finetuning.test_error"]))


@pytest.mark.parametrize(
    ("path", "values", "apart"),
    [
        ("finetuning.rank", [1, 2], True),
        ("pretraining.tokens", [2, 3], True),
        ("numerics.seed", [0, 1], True),
        ("finetuning.inputs", ["fresh", "reused"], True),
        ("pretraining.lam", [0.1, 0.2], False),
        ("pretraining.task.c", [0.1, 0.5], False),
        ("finetuning.delta", [0.1, 0.5], False),
    ],
)
def test_static_axes_need_programs_of_their_own(path, values, apart):
    one, other = (chunks.kind(ls.replace(setting(), path, value)) for value in values)
    assert (one != other) == apart


# ---------------------------------------------------------------- points that cannot be


def test_a_point_without_an_optimum_is_a_point_that_failed(tmp_path, monkeypatch):
    """The search for the b that minimises E' fails at one of four points."""
    search, searched = gradients.with_best_scale, []

    def lost(s):
        searched.append(s)
        if float(s.pretraining.lam) < 0.2:
            raise ls.SolveError("recalibration", ls.Code.stalled)
        return search(s)

    monkeypatch.setattr(gradients, "with_best_scale", lost)
    base = ls.replace(setting(), "finetuning.recalibration", "error")
    grid = {"pretraining.lam": [0.1, 0.3, 0.31, 0.32]}
    for _ in range(2):  # of four lanes, as above
        found = ls.sweep(base, grid, out=tmp_path, gradient="test_error", chunk=4)
    assert len(searched) == 4  # once each: the other time they are read
    assert found["finetuning.code"].values.tolist() == [ls.Code.stalled, *[ls.Code.ok] * 3]
    assert np.isfinite(found["pretraining.M"]).all()
    assert np.isnan(found["finetuning.recalibration_stderr"]).all()  # of a search: not known, which is not zero
    for name in ("finetuning.test_error", "finetuning.q_stderr", "gradient.pretraining.lam"):
        assert np.isfinite(found[name]).values.tolist() == [False, True, True, True], name
    assert summary(found)["codes"] == {"finetuning stalled": 1}
    with pytest.raises(ls.SettingError, match="test_error only"):
        ls.sweep(base, {"pretraining.lam": [0.1]}, gradient="overlap")


def test_a_field_that_is_found_may_be_an_axis():
    """b stands beside the word that asks for it."""
    grid = {"finetuning.recalibration": ["noise", 0.7], "pretraining.lam": [0.1, 0.2, 0.3, 0.4]}
    found = ls.sweep(setting(), grid, chunk=4)
    assert list(found["finetuning.recalibration"].values) == ["noise", "0.7"]
    noise, given = found["finetuning.recalibration_value"].values
    assert np.all(given == 0.7)
    np.testing.assert_allclose(noise, (found["pretraining.M"] / found["pretraining.Q"])[0], rtol=1e-12)


def test_a_bad_point_is_found_before_any_is_solved(solved, tmp_path):
    grid = {"pretraining.delta": [0.5, 1.0], "finetuning.delta": [0.5, 0.7], "finetuning.inputs": ["fresh", "reused"]}
    with pytest.raises(ls.SettingError, match="keep their noise"):
        ls.sweep(setting(), grid, out=tmp_path / "out")
    with pytest.raises(ls.SettingError, match="no meaning for the identity"):
        ls.sweep(setting(), {"pretraining.activation": ["softmax", "identity"], "pretraining.beta": [1.0, 2.0]})
    assert not solved and not (tmp_path / "out").exists()


def test_a_million_points_are_planned_at_once():
    """Of points that differ in numbers only the corners are looked at."""
    lams, fines = np.geomspace(0.05, 0.5, 1000).tolist(), np.linspace(1, 2, 500).tolist()
    axes = {"pretraining.lam": lams, "finetuning.lam": fines, "finetuning.inputs": ["fresh", "reused"]}
    began = time.perf_counter()
    task = sweeps._task(setting(), axes, None, None)
    assert time.perf_counter() - began < 5
    assert task.count == 10**6 and [len(numbers) for numbers in task.kinds.values()] == [500_000, 500_000]
    last = task.at(10**6 - 1)
    assert (float(last.pretraining.lam), float(last.finetuning.lam)) == (0.5, 2.0)
    assert isinstance(last.finetuning.inputs, ls.Reused)
    assert list(task.share(3, 8))[:3] == [3, 11, 19]
    for path, values in (("pretraining.lam", [0.1, 0.2, np.nan, 0.3]), ("pretraining.lam", [0.1, -0.2, 0.3])):
        with pytest.raises(ls.SettingError, match=r"pretraining\.lam = (nan|-0\.2)"):
            sweeps._task(setting(), axes | {path: values}, None, None)


def test_kinds_are_those_of_every_point():
    axes = {"pretraining.lam": [0.3, 0.1, 0.2], "finetuning.inputs": ["fresh", "reused"], "finetuning.rank": [1, 2],
            "finetuning.lam": [1.0, 2.0]}  # fmt: skip
    task = sweeps._task(setting(), axes, None, None)
    one_by_one: dict[Any, list[int]] = {}
    for index in range(task.count):
        one_by_one.setdefault(chunks.kind(task.at(index)), []).append(index)
    assert task.kinds == one_by_one and len(one_by_one) == 4


def test_a_word_among_numbers_is_of_its_own_kind():
    task = sweeps._task(setting(), {"finetuning.recalibration": [0.7, "noise", 0.8]}, None, None)
    assert list(task.kinds.values()) == [[0, 2], [1]]


@pytest.mark.filterwarnings("ignore:finetuning.alpha:UserWarning")
def test_axes_that_need_each_other(solved):
    ls.sweep(setting(), {"finetuning.reused_fraction": [0.1, 0.2], "finetuning.inputs": ["mixed"]})
    assert [float(s.finetuning.inputs.reused_fraction) for s in solved] == [0.1, 0.2]
    solved.clear()
    ls.sweep(setting(), {"finetuning.rho": [0.1], "finetuning.pool": [5.0, 9.0], "finetuning.inputs": ["selected"]})
    assert sorted(float(s.finetuning.alpha) for s in solved) == pytest.approx([0.5, 0.9])
    solved.clear()
    ls.sweep(setting(), {"pretraining.task.a": [0.0], "pretraining.task.c": [1.0]})
    ls.sweep(setting(), {"numerics.replicas": [3], "numerics.nodes": [768], "numerics.finetuning_nodes": [1536]})
    base = ls.Pretraining(0.1, 0.1, activation="identity", tokens=2, base={"law": "power_law", "exponent": 1.0,
                                                                          "low": 0.1, "high": 1.0})  # fmt: skip
    law = ls.Setting(base, setting().finetuning, setting().numerics)
    ls.sweep(law, {"pretraining.base.low": [2.0], "pretraining.base.high": [3.0]})
    assert len(solved) == 3


def test_whole_numbers_on_an_axis(solved):
    for values in (parse_axis("pretraining.tokens=lin:2:4:3")[1], np.linspace(2, 4, 3), [2, 3.0, 4]):
        data = ls.sweep(setting(), {"pretraining.tokens": values})
        assert [s.pretraining.tokens for s in solved] == data["pretraining.tokens"].values.tolist() == [2, 3, 4]
        solved.clear()
    ls.sweep(setting(), {"numerics.nodes": parse_axis("a.b=log:512:2048:3")[1]})
    assert [s.numerics.nodes for s in solved] == [512, 1024, 2048]
    with pytest.raises(ls.SettingError, match=r"tokens = 2.5 is not a whole number"):
        ls.sweep(setting(), {"pretraining.tokens": [2, 2.5]})
    assert ls.sweep(setting(), {"pretraining.lam": [1.0, 2.0]})["pretraining.lam"].dtype == float
