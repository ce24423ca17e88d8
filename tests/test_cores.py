"""One setting on several cores: the same numbers as on one, wherever its programs share them."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

import lorastate as ls
from lorastate.runtime import cores
from lorastate.solution import lanes

PROGRAM = """
    import json, sys, jax
    jax.config.update("jax_num_cpu_devices", 2)
    sys.path.insert(0, {tests!r})
    import conftest  # compiles as fast as here, in float64
    import test_cores
    print(json.dumps(test_cores.found()))
"""


def settings() -> dict[str, Any]:
    numerics = ls.Numerics(nodes=512, finetuning_nodes=1024, replicas=2)
    pre = ls.Pretraining(alpha=0.2, lam=0.1, tokens=2)

    def setting(alpha, lam):
        return ls.Setting(pre, ls.Finetuning(alpha, lam, activation="identity"), numerics)

    return {"smooth": setting(6.0, 1.0), "glass": setting(1.2, 0.15)}


def found() -> dict[str, Any]:
    """Predictions with error bars and slopes, the parts that were shared, and how many devices results are on."""
    lanes._MUCH, shared, mesh_of = 0, [], cores.mesh_of

    def seen(parts):
        mesh = mesh_of(parts)
        shared.append(mesh and mesh.size)
        return mesh

    lanes.mesh_of, out = seen, {}
    for name, setting in settings().items():
        solution = ls.predict(setting)
        slopes = ls.gradient(setting)[1] if name != "glass" else {}
        out[name] = {
            "values": {k: float(v) for k, v in solution.finetuning.items()},
            "errors": {k: float(v) for k, v in solution.errors["finetuning"].items()},
            "slopes": slopes,
            "symmetry": solution.symmetry,
            "devices": len(solution.finetuning["m"].devices()),
        }
    map_ = ls.pretrain(settings()["smooth"].pretraining, settings()["smooth"].numerics)
    out["map"] = {"values": {k: float(v) for k, v in map_.values.items()}, "devices": len(map_.x.devices())}
    return out | {"shared": sorted({s or 1 for s in shared})}


def test_cores_share_a_setting(monkeypatch):
    monkeypatch.setattr(lanes, "_MUCH", lanes._MUCH)
    monkeypatch.setattr(lanes, "mesh_of", lanes.mesh_of)
    program = textwrap.dedent(PROGRAM.format(tests=str(Path(__file__).parent)))
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        alone = found()
        said, _ = process.communicate()
    assert process.returncode == 0
    together = json.loads(said)
    assert alone.pop("shared") == [1] and 2 in together.pop("shared")
    assert set(together) == set(alone)
    for name, there in together.items():
        here = alone[name]
        assert here["devices"] == there["devices"] == 1
        assert here.get("symmetry") == there.get("symmetry")
        for table in ("values", "errors", "slopes"):
            for key, value in here.get(table, {}).items():
                # In a glass roundings decide which samples jump on the last step.
                near = 1e-9 + (0.1 * here["errors"].get(key, 0.0) if name == "glass" else 0.0)
                np.testing.assert_allclose(there[table][key], value, 1e-9, near, err_msg=f"{name} {table} {key}")


def test_as_many_cores_as_divide_the_parts(monkeypatch):
    cpu = jax.devices("cpu")[0]
    monkeypatch.setattr(jax, "local_devices", lambda: [cpu] * 6)
    monkeypatch.setattr(cores, "Mesh", lambda devices, names: SimpleNamespace(size=len(devices)))

    def count(*parts):
        mesh = cores.mesh_of(parts)
        return 1 if mesh is None else mesh.size

    assert count(32, 64, 8) == 4  # of six, a power of two
    assert count(6, 12) == 2
    assert count(3) == count() == 1
    with jax.default_device(cpu):
        assert count(32) == 1
