"""Executes the notebooks and writes their outputs back:  python notebooks/run.py [NAME ...]

All of them, or those named. Each checks its own message: the command fails where a cell does. One compilation cache is
shared by all; `pip install '.[test]'` brings what this needs.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def execute(path: Path) -> float:
    """Runs one notebook in its own directory, keeps outputs without times and identities; seconds that it took."""
    began = time.perf_counter()
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=1800, record_timing=False, resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    # Only what does not change from machine to machine: pieces of one printed text end where the clock said.
    for cell in notebook.cells:
        pieces, cell_outputs = cell.get("outputs", []), []
        for piece in pieces:
            last = cell_outputs[-1] if cell_outputs else None
            if last and last.output_type == piece.output_type == "stream" and last.name == piece.name:
                last.text += piece.text
            else:
                cell_outputs.append(piece)
        if pieces:
            cell.outputs = cell_outputs
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    path.write_text(nbformat.writes(notebook, indent=1) + "\n")
    return time.perf_counter() - began


def main(names: list[str]) -> int:
    paths = {path.stem: path for path in sorted(HERE.glob("*.ipynb"))}
    if unknown := [name for name in names if name not in paths]:
        print(f"no notebook {', '.join(unknown)}; allowed: {', '.join(paths)}")
        return 2
    with tempfile.TemporaryDirectory(prefix="lorastate-notebooks-") as cache:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        for name in names or paths:
            print(f"{name:20s} {execute(paths[name]):6.0f} s  {paths[name].stat().st_size / 1e3:5.0f} kB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
