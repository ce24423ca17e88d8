"""Programs kept on disk: read back as they were, made anew where they cannot be, never mistaken for another."""

import dataclasses
import functools
import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorastate as ls
from lorastate import _version
from lorastate.evolution.pretraining import start
from lorastate.math.quadrature import gaussian_nodes
from lorastate.runtime import cores, program, room
from lorastate.runtime.program import Program
from lorastate.solution import lanes
from lorastate.solution import solve as solving
from lorastate.solution.pretraining import search_pretraining, solve_pretraining
from lorastate.solution.problem import Problem, frozen_at
from lorastate.solution.search import solve_broken, solve_symmetric
from lorastate.solution.stage import Described

NUMERICS = ls.Numerics(512, 1024, 2)


@pytest.fixture
def folder(tmp_path):
    config: Any = jax.config
    before = config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path / "lorastate-programs"
    jax.config.update("jax_compilation_cache_dir", before)


def solve(p, lam, **more):
    return p(problem(ls.Pretraining(0.1, lam, activation="identity", tokens=2, **more)))


def freeze(p, lam=0.1, **more):
    """A small program, `frozen_at`: of arrays and of what is none, as the large ones are."""
    pre = ls.Pretraining(0.1, lam, **{"tokens": 2} | more, activation="identity")
    fine = ls.Setting(pre, ls.Finetuning(3.0, 1.0)).finetuning_resolved
    return p(pre, fine, np.array([0.1, 0.5, 0.3]))


def problem(pre):
    return Problem.of_pretraining(pre, NUMERICS)


class Halved(eqx.Module):
    def __call__(self, z):
        return z / 2


def fail(*_):
    raise AssertionError("traced again")


def same(a, b):
    assert jax.tree_util.tree_structure(a) == jax.tree_util.tree_structure(b)
    for one, other in zip(jax.tree_util.tree_leaves(a), jax.tree_util.tree_leaves(b), strict=True):
        assert np.array_equal(one, other)


def test_a_second_start_does_not_trace(folder, monkeypatch):
    usual = jax.jit(search_pretraining)
    first = Program(search_pretraining, quick=True)
    found = solve(first, 0.1)
    (file,) = folder.iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(Program, "_export", fail)
        second = Program(search_pretraining, quick=True)
        same(solve(second, 0.1), found)
        # Other values, the same program; and what jit alone finds.
        want = usual(problem(ls.Pretraining(0.1, 0.2, activation="identity", tokens=2)))
        np.testing.assert_allclose(solve(second, 0.2).point.x, want.point.x, rtol=1e-12)
    assert list(folder.iterdir()) == [file]
    # Another function and another static field are other programs.
    small = Program(frozen_at)
    others: tuple[dict[str, Any], ...] = {"task": {"a": 1.0, "c": 0.2, "kappa_perp": 1.0}}, {"tokens": 3}, {"lam": 0.2}
    for more in ({}, *others):
        freeze(small, **more)
    assert len(list(folder.iterdir())) == 4


def test_a_damaged_or_foreign_file_is_made_anew(folder, monkeypatch):
    found = freeze(Program(frozen_at))
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"not a program"):
        file.write_bytes(damaged)
        same(freeze(Program(frozen_at)), found)
        assert len(file.read_bytes()) == len(whole)
    # Another version of the package reads nothing of this one.
    monkeypatch.setattr(program, "_version", lambda: "another")
    freeze(Program(frozen_at))
    assert len(list(folder.iterdir())) == 2


def test_what_cannot_be_known_again_is_not_kept(folder):
    def square(x):
        return x**2

    assert float(Program(square)(jnp.array(3.0))) == 9.0
    # Activations of the user's: a function, a class whose code may change from one start to the next.
    for activation in (lambda z: z / 2, jnp.tanh, Halved()):
        pre = ls.Pretraining(0.1, 0.1, activation=activation, tokens=2)
        assert not program._known((pre, NUMERICS)) and program._known((pre.lam, NUMERICS, None, {"a": [1.0]}))
        assert np.isfinite(Program(start)(pre)).all()  # of which nothing but the argument is the user's
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(folder):
    folder.write_text("a file in its place")
    assert np.all(np.isfinite(freeze(Program(frozen_at)).norm))
    assert folder.read_text() == "a file in its place"


class Planted:
    ran = False

    def __reduce__(self):
        return setattr, (Planted, "ran", True)


def test_nothing_in_the_folder_is_run(folder):
    found = freeze(Program(frozen_at))
    (file,) = folder.iterdir()
    plants = pickle.dumps(Planted())
    for planted in (plants, hashlib.sha256(plants).digest() + plants):
        file.write_bytes(planted)
        same(freeze(Program(frozen_at)), found)
    assert not Planted.ran
    # Not even a class of another package, or what is not a class of values.
    here = "lorastate.runtime.program"
    for name in (["subprocess", "Popen"], [here, "Program"], [here, "_load"]):
        with pytest.raises(TypeError):
            program._tree({"class": name, "fields": []})


def test_a_changed_byte_is_seen(folder):
    found = freeze(Program(frozen_at))
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    for place in (3, 40, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(OSError, match="damaged"):
            program._read(file)
    same(freeze(Program(frozen_at)), found)


def test_trees_survive(folder):
    pre = ls.Pretraining(0.1, 0.1, tokens=2, task={"a": 1.0, "c": 0.2})
    tree = {"b": (pre, [None, 1, 2.5, "words", True]), "a": Described({"x": 1.0}, {}, None, None), "": ()}
    assert jax.tree_util.tree_structure(tree) == jax.tree_util.tree_structure(
        program._tree(
            program._words(jax.tree_util.tree_map(lambda x: program._Place() if eqx.is_array(x) else x, tree))
        )
    )
    for odd in ({1: 2}, {1, 2}, np.float64(1.0), eqx.Module, Halved()):
        with pytest.raises(TypeError):
            program._words([odd])


@pytest.mark.skipif(os.name != "posix", reason="permissions are different there")
def test_a_folder_of_others_is_not_used(folder, monkeypatch):
    freeze(Program(frozen_at))
    assert folder.stat().st_mode & 0o777 == 0o700
    (file,) = folder.iterdir()
    for mode in (0o770, 0o777, 0o702):
        folder.chmod(mode)
        with pytest.raises(PermissionError, match="others may write"):
            program._read(file)
        file.rename(tmp := folder.with_name("away"))
        assert np.isfinite(freeze(Program(frozen_at)).norm).all()
        assert not list(folder.iterdir())
        tmp.rename(file)
    folder.chmod(0o700)
    program._read(file)
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(PermissionError, match="others may write"):
        program._read(file)


def test_the_oldest_makes_room(folder, monkeypatch):
    monkeypatch.setattr(program, "_MOST", 1000)
    for k in range(5):
        program._store(folder / str(k), bytes(250))
        os.utime(folder / str(k), (k, k))
    assert {file.name for file in folder.iterdir()} == {"2", "3", "4"}
    program._load(folder / "2")  # what is used is not old
    program._store(folder / "5", bytes(250))
    assert {file.name for file in folder.iterdir()} == {"2", "4", "5"}


def test_what_was_edited_since_it_was_imported_is_not_kept(folder, monkeypatch):
    found = freeze(Program(frozen_at))
    (file,) = folder.iterdir()
    file.unlink()
    with monkeypatch.context() as patched:
        patched.setattr(program, "source_on_disk", lambda: "edited")
        same(freeze(Program(frozen_at)), found)
        np.testing.assert_array_equal(program.kept_arrays("some", lambda: (np.ones(3),))[0], np.ones(3))
    assert not list(folder.iterdir()) and not nodes_kept(folder)


def test_source_is_read_before_it_is_imported(tmp_path):
    """A package that is edited between its import and its first use."""
    copy = tmp_path / "lorastate"
    shutil.copytree(Path(program.__file__).parents[1], copy, ignore=shutil.ignore_patterns("__pycache__"))
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import lorastate
        from lorastate._version import SOURCE, source_on_disk
        assert lorastate.__file__.startswith({str(tmp_path)!r}) and SOURCE == source_on_disk()
        with open({str(copy / "solution" / "stage.py")!r}, "a") as file:
            file.write("# edited")
        from lorastate.runtime import cores, program, room
        assert SOURCE in program._version() and source_on_disk() not in (SOURCE, "")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_source_of_which_nothing_is_left(tmp_path, monkeypatch):
    """Installations that have what Python has made of the source alone, or not even that on disk."""
    monkeypatch.setattr(_version, "_FOLDER", tmp_path)
    assert _version.source_on_disk() == ""
    (tmp_path / "part.pyc").write_bytes(b"one")
    first = _version.source_on_disk()
    (tmp_path / "part.pyc").write_bytes(b"another")
    assert "" != first != _version.source_on_disk()


def nodes_kept(folder):
    return list(folder.with_name("lorastate-nodes").glob("*"))


def test_kept_arrays(folder):
    def make():
        return np.arange(3.0), np.ones((2, 2))

    first = program.kept_arrays("some", make)
    again = program.kept_arrays("some", fail)
    for a, b, c in zip(make(), first, again, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
    with pytest.raises(AssertionError, match="traced again"):
        program.kept_arrays("some other", fail)
    (file,) = nodes_kept(folder)
    file.write_bytes(file.read_bytes()[:40])  # what is broken is made anew
    np.testing.assert_array_equal(program.kept_arrays("some", make)[0], np.arange(3.0))
    np.testing.assert_array_equal(program.kept_arrays("some", fail)[0], np.arange(3.0))


def test_nodes_read_back_are_the_same(folder):
    key = (4, 1024, 2, 0, (1, 3), (1, 0, 3, 2), 128)
    gaussian_nodes.cache_clear()
    made = gaussian_nodes(*key)
    assert len(nodes_kept(folder)) == 1
    gaussian_nodes.cache_clear()
    same(gaussian_nodes(*key), made)
    gaussian_nodes.cache_clear()
    gaussian_nodes(4, 1024, 2, 7)  # those of other seeds would only fill the disk
    assert len(nodes_kept(folder)) == 1


def test_programs_of_many_tokens_are_not_much_larger():
    """Lines of the lowered searches, which is what compiling takes time for: an elimination of 36 unknowns that was
    unrolled made 99,000 of them at T = 8."""

    def lines(tokens):
        def size(f, *args):
            return len(eqx.filter_jit(f).lower(*args).as_text().splitlines())

        setting = ls.Setting(ls.Pretraining(0.1, 0.1, tokens=tokens), ls.Finetuning(3.0, 0.1), NUMERICS)
        both = Problem.of(setting).with_broken()
        shape = eqx.filter_eval_shape(solve_pretraining, both.pretraining_alone)
        first = jax.tree_util.tree_map(lambda s: jnp.zeros(s.shape, s.dtype), shape)
        begin = eqx.filter_eval_shape(solve_symmetric, both, first).begin
        begin = jax.tree_util.tree_map(lambda s: jnp.zeros(s.shape, s.dtype), begin)
        maps = size(search_pretraining, both.pretraining_alone)
        return np.array([maps, size(solve_symmetric, both, first), size(solve_broken, both, first, begin)])

    few = np.array([9200, 7800, 11_500])  # of three tokens; of eight 16,200, 11,300, 14,100
    assert (lines(8) < np.minimum(20_000, 2 * few)).all()


def test_undefined_numbers_are_not_bugs():
    """JAX_DEBUG_NANS is for the user's own programs."""
    narrow = ls.Setting(
        ls.Pretraining(0.1, 0.1, kappa=0.05, activation="identity", tokens=2), ls.Finetuning(1.0, 1.0), NUMERICS
    )
    with jax.debug_nans(True), jax.debug_infs(True):
        assert ls.predict(narrow, throw=False).code("pretraining") == ls.Code.too_narrow
        with pytest.raises(FloatingPointError):
            jnp.log(jnp.array(-1.0))


def test_strict_promotion_is_not_for_these_programs():
    setting = ls.Setting(ls.Pretraining(0.1, 0.1, activation="identity", tokens=2), ls.Finetuning(3.0, 1.0), NUMERICS)
    want, slopes = ls.gradient(setting)
    jax.clear_caches()
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        assert (float(ls.predict(setting).test_error), *ls.gradient(setting)) == (want, want, slopes)
        with pytest.raises(ValueError, match="promotion"):
            jnp.add(jnp.ones(3, jnp.int32), jnp.ones(3, jnp.float32))


@pytest.mark.skipif(not room._MAPS.exists(), reason="Linux only")
def test_programs_make_room_for_others(monkeypatch):
    traced = []

    def twice(x):
        traced.append(x.shape)
        return 2 * x

    program, one = Program(twice), jnp.ones(())
    assert float(program(one)) == float(program(one)) == 2.0 and traced == [()]
    monkeypatch.setattr(room, "_FULL", 0.0)
    monkeypatch.setattr(room, "_left", [0])
    monkeypatch.setattr(room, "_STEP", 0.0)
    program(jnp.ones(3))
    assert float(program(one)) == 2.0 and traced == [(), (3,), ()]
    monkeypatch.setattr(room, "_STEP", 1.0)  # what is left is not to be had
    program(jnp.ones(4))
    assert float(program(one)) == 2.0 and traced == [(), (3,), (), (4,)]


def first_of_two(pre, x):
    return {"square": pre.alpha * x @ x, "weak": jnp.where(pre.lam > 0, 2.0, 3.0), "still": 3}


def second_of_two(pre, found):
    assert found["still"] == 3
    return found["square"] * found["weak"] + pre.delta


@pytest.mark.parametrize("kept", [False, True])
def test_what_is_compiled_ahead_is_what_is_called(folder, monkeypatch, caplog, kept):
    """Each is handed the shapes of what the one before it will return; nothing is compiled a second time."""
    config: Any = jax.config
    if kept:  # as functions of the package are
        for f in (first_of_two, second_of_two):
            monkeypatch.setattr(Program, "_ours", lambda self: True)
            monkeypatch.setattr(f, "__module__", "lorastate.first" if f is first_of_two else "lorastate.second")
    else:
        config.update("jax_compilation_cache_dir", None)
    pre, x = ls.Pretraining(0.1, 0.1), np.ones((7, 7))
    first, second = Program(first_of_two), Program(second_of_two)
    shapes = first.ahead(pre, x)
    assert shapes["square"].shape == (7, 7) and shapes["still"] == 3
    assert second.ahead(pre, shapes).shape == (7, 7)
    jax.block_until_ready(jnp.zeros(3) + 1)
    with jax.log_compiles():
        found = second(pre, first(pre, x))
    np.testing.assert_allclose(found, 0.7 * 2 + float(pre.delta))
    made = [record.getMessage() for record in caplog.records if "Finished XLA compilation" in record.getMessage()]
    assert not [m for m in made if "flat" in m or "call" in m], made
    assert not first._under_way and not second._under_way
    assert bool(folder.exists() and len(list(folder.iterdir())) == 2) == kept


def test_a_prediction_compiled_ahead(monkeypatch):
    setting = ls.Setting(ls.Pretraining(0.1, 0.1, activation="identity", tokens=2), ls.Finetuning(3.0, 1.0), NUMERICS)
    want, slopes = float(ls.predict(setting).test_error), ls.gradient(setting)
    monkeypatch.setattr(solving, "_AHEAD", True)
    monkeypatch.setattr(solving, "_COMPILED", set())
    monkeypatch.setattr(lanes, "_programs", functools.cache(lambda f: (Program(f, quick=True), Program(f))))
    assert float(ls.predict(setting).test_error) == pytest.approx(want, rel=1e-12)
    assert ls.gradient(setting)[0] == pytest.approx(slopes[0], rel=1e-12)
    assert len(solving._COMPILED) == 2


# ---------------------------------------------------------------- what JAX computes on


@pytest.fixture
def accelerator(monkeypatch):
    """A machine whose default backend is CUDA, as JAX names it; what there is is a CPU all the same."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.export, "default_export_platform", lambda: "cuda")


def test_a_cuda_machine_has_its_own_programs(folder, accelerator):
    # Here a program for CUDA cannot run: then it is compiled as usual.
    assert np.isfinite(freeze(Program(frozen_at)).norm).all()
    (file,) = folder.iterdir()
    assert program._read(file)[0].platforms == ("cuda",) and program.platform() == "cuda"


def test_a_cuda_machine_reads_its_programs_back(folder, accelerator, monkeypatch):
    """What JAX runs on is "cuda" to an export: one for "gpu" is refused when it is called. A CPU stands for it here."""
    export = jax.export.export

    def named(f, platforms):
        exported = export(f, platforms=["cpu"])
        return lambda *given: dataclasses.replace(
            exported(*given), platforms=tuple("cpu" if p == "cuda" else p for p in platforms)
        )

    monkeypatch.setattr(jax.export, "export", named)
    found = freeze(Program(frozen_at))
    monkeypatch.setattr(Program, "_export", fail)
    second = Program(frozen_at)
    same(freeze(second), found)
    (used,) = second._made.values()
    assert used.kept


def test_programs_follow_the_default_device(folder, accelerator):
    cpu = jax.devices("cpu")[0]
    for device in (cpu, "cpu"):
        with jax.default_device(device):
            freeze(Program(frozen_at))
            assert list(cores.together(lambda _: program.platform(), range(3))) == ["cpu"] * 3
    assert program.platform([np.ones(3), jax.device_put(1.0, cpu)]) == "cpu"
    (file,) = folder.iterdir()
    assert program._read(file)[0].platforms == ("cpu",)


@pytest.mark.parametrize(
    ("told", "granted"),
    [
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "20000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 16),
        ({"cpu.max": "9000000 100000"}, 16),
        ({"quota": "400000", "period": "100000"}, 4),
        ({"quota": "-1", "period": "100000"}, 16),
        ({}, 16),
    ],
)
def test_cores_are_those_that_a_container_grants(tmp_path, monkeypatch, told, granted):
    for name, text in told.items():
        (tmp_path / name).write_text(text + "\n")
    files = ("cpu.max",), ("quota", "period")
    monkeypatch.setattr(cores, "_QUOTAS", tuple(tuple(str(tmp_path / name) for name in row) for row in files))
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(range(16)))
    assert cores.cores() == granted
