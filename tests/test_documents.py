"""The README's example and the quickstart run as printed; the studies are complete and listed in the README."""

import base64
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent


def test_readme(monkeypatch, tmp_path):
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 120
    # With fewer nodes, the ones of test_theory: what is compiled there serves here.
    setting = (ROOT / "examples/softmax.toml").read_text()
    for key, value in {"nodes": 2048, "finetuning_nodes": 4096, "replicas": 8}.items():
        setting, found = re.subn(rf"(?m)^{key} = \d+", f"{key} = {value}", setting)
        assert found == 1
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples/softmax.toml").write_text(setting)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(block, names)
    assert 0.3 < float(names["best"].after.test_error) < float(names["solution"].test_error)


NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
STUDIES = [name for name in NOTEBOOKS if name != "quickstart"]


@pytest.mark.filterwarnings("ignore")
def test_quickstart():
    path = NOTEBOOKS["quickstart"]
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()


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


def test_studies_are_listed():
    readme = (ROOT / "README.md").read_text()
    assert len(STUDIES) >= 5
    assert [name for name in STUDIES if f"(notebooks/{name}.ipynb)" not in readme] == []
    assert "python notebooks/run.py" in readme


def test_a_channel_of_ones_own(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import flipped_labels

    flipped_labels.test_theory_agrees_with_training()
    assert len((ROOT / "examples" / "flipped_labels.py").read_text().splitlines()) < 80
