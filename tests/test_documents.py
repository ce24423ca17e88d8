"""The README's example and the notebooks run as printed."""

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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebook(path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
