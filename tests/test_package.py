"""Every name of the package is there in a fresh process, its modules too."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import lorastate as ls


def fresh(code):
    """What a new process prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_names_and_modules_in_a_fresh_process():
    code = """if True:
        import sys, lorastate as ls
        assert "jax" not in sys.modules
        for name in ("model", "figures", "design", "setting"):
            assert getattr(ls, name).__name__ == f"lorastate.{name}"
        for name in dir(ls):
            getattr(ls, name)
        assert not hasattr(ls, "nothing") and not hasattr(ls, "__wrapped__")
    """
    fresh(code)
    assert not set(ls.__all__) & set(ls._modules())


def test_names_in_documents_and_scripts():
    root = Path(__file__).parent.parent
    documents = (root / "README.md", *root.glob("docs/**/*.md"))
    for path in (*documents, *root.glob("benchmarks/*.py"), *root.glob("notebooks/*.ipynb")):
        text = path.read_text()
        if "import lorastate as ls" in text:
            missing = [name for name in re.findall(r"\bls\.([A-Za-z]\w*)", text) if not hasattr(ls, name)]
            assert not missing, (path, missing)


def test_all_that_a_setting_is_made_of_is_exported():
    from lorastate.model import activation
    from lorastate.model.channel import inputs, recalibration, selected
    from lorastate.model.spectra import laws

    homes = {laws: ls.BaseLaw, inputs: ls.Inputs, selected: ls.Inputs, recalibration: ls.Recalibration,
             activation: ls.Activation}  # fmt: skip
    for module, kinds in homes.items():
        for name, kind in vars(module).items():
            if isinstance(kind, type) and issubclass(kind, kinds) and not name.startswith("_"):
                assert getattr(ls, name) is kind
    assert issubclass(ls.SettingWarning, UserWarning)


@pytest.fixture
def setting():
    pre = ls.Pretraining(0.1, 0.01, kappa0=2.0, activation="identity")
    return ls.Setting(pre, ls.Finetuning(3.0, 0.05), ls.Numerics(512, 1024, 2))


def test_task_and_base_are_fields(setting):
    task = ls.Task(a=0.5, c=0.2)
    assert ls.get(setting, "pretraining.task") is None and ls.get(setting, "pretraining.base") is None
    for given in (task, {"a": 0.5, "c": 0.2}):
        other = ls.replace(setting, "pretraining.task", given)
        assert ls.setting_to_dict(other)["pretraining"]["task"] == {"a": 0.5, "c": 0.2, "kappa_perp": 1.0}
    assert ls.setting_to_dict(ls.replace(other, "pretraining.task", None)) == ls.setting_to_dict(setting)
    law = {"law": "atoms", "weights": [0.5, 0.5], "values": [1.0, 2.0]}
    for given in (ls.Atoms([0.5, 0.5], [1.0, 2.0]), law):
        other = ls.replace(setting, "pretraining.base", given)
        assert ls.setting_to_dict(other)["pretraining"]["base"] == law
        assert isinstance(ls.get(other, "pretraining.base"), ls.Atoms)
    assert ls.setting_to_dict(ls.setting_from_dict(ls.setting_to_dict(other))) == ls.setting_to_dict(other)
    assert ls.replace(other, "pretraining.base", None).pretraining.base is None
    with pytest.raises(ls.SettingError, match=r"kappa0 = 1.0 has no meaning beside pretraining.base"):
        ls.replace(other, "pretraining.kappa0", 1.0)
    with pytest.raises(ls.SettingError, match=r"pretraining.task = 3 is not a task"):
        ls.replace(setting, "pretraining.task", 3)
    with pytest.raises(ls.SettingError, match=r"unknown key finetuning.task"):
        ls.replace(setting, "finetuning.task", task)


def test_task_as_a_field_is_differentiable(setting):
    def square(a):
        return ls.get(ls.replace(setting, "pretraining.task", ls.Task(a=a)), "pretraining.task.a") ** 2

    assert np.isclose(float(jax.grad(square)(3.0)), 6.0)


@pytest.mark.parametrize("of", [3, None, ["test_error"], "loss"])
def test_an_objective_is_a_name(setting, of):
    with pytest.raises(ls.SettingError, match=r"objective = .* is unknown; allowed"):
        ls.gradient(setting, of=of)
