"""Notebooks: the quickstart runs, the studies are complete and listed in the README, sliders move what they should."""

import base64
import importlib
import re
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import nbformat
import pytest

import lorastate as ls

ROOT = Path(__file__).parent.parent


def test_readme_is_short():
    """One screen and a little; its snippet runs in test_site."""
    assert len((ROOT / "README.md").read_text().splitlines()) < 120


NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
STUDIES = [name for name in NOTEBOOKS if name not in ("quickstart", "interactive")]


@pytest.fixture
def fresh_start(monkeypatch):
    """What a notebook finds: its own folder, no screen, and the precision that JAX begins with."""
    config: Any = jax.config
    monkeypatch.chdir(ROOT / "notebooks")
    plt.switch_backend("Agg")
    config.update("jax_enable_x64", False)
    yield config
    config.update("jax_enable_x64", True)
    plt.close("all")


@pytest.mark.filterwarnings("ignore")
def test_quickstart(fresh_start, monkeypatch):
    """Cell after cell, here, on few nodes: `notebooks/run.py` does it as it is, in a kernel."""
    read = ls.load_setting
    few = "numerics.nodes=512", "numerics.finetuning_nodes=1024", "numerics.replicas=2"
    monkeypatch.setattr(ls, "load_setting", lambda path, overrides: read(path, [*overrides, *few]))
    notebook = nbformat.read(NOTEBOOKS["quickstart"], as_version=4)
    names: dict[str, Any] = {"__name__": "__main__"}
    for k, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            exec(compile(cell.source, f"quickstart, cell {k}", "exec"), names)
    assert fresh_start.jax_enable_x64
    assert len(names["values"]) == 9 and names["best"].converged


@pytest.mark.parametrize("name", STUDIES)
def test_study(name):
    """Executing them takes minutes, `python notebooks/run.py`; here, that they were executed as they are."""
    text = NOTEBOOKS[name].read_text()
    assert len(text) < 120_000
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ") and "**Message.**" in first.source
    assert "Regime:" in first.source
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert {output.output_type for output in outputs} <= {"stream", "display_data"}  # no errors
    assert all(output.name == "stdout" for output in outputs if output.output_type == "stream")
    assert not re.search(r"/(tmp|home|root|work|usr)/", text) and "\r" not in printed
    # One figure, in the last cell, and training beside theory with its error.
    figures = [output for output in outputs if output.output_type == "display_data"]
    assert len(figures) == 1 and figures[0] in cells[-1].outputs
    assert base64.b64decode(figures[0].data["image/png"])[:4] == b"\x89PNG"
    assert "training" in printed and "+-" in printed
    # What the message says is asserted where it is computed.
    assert any(re.search(r"(?m)^ *assert ", cell.source) for cell in cells)


def test_sliders():
    """Executed as it is, with its sliders and one picture, without errors; `notebooks/run.py` measures the redraw."""
    notebook = nbformat.read(NOTEBOOKS["interactive"], as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert "median redraw below half a second: True" in "".join(o.get("text", "") for o in outputs)
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 1
    assert len(NOTEBOOKS["interactive"].read_text()) < 120_000


def test_studies_are_listed():
    readme = (ROOT / "README.md").read_text()
    assert len(STUDIES) >= 5
    assert [name for name in STUDIES if f"(notebooks/{name}.ipynb)" not in readme] == []
    assert "python notebooks/run.py" in readme


def test_a_channel_of_ones_own(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    flipped_labels = importlib.import_module("flipped_labels")
    flipped_labels.test_theory_agrees_with_training()
    assert len((ROOT / "examples" / "flipped_labels.py").read_text().splitlines()) < 80
