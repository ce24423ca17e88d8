"""The commands that the documentation shows.  `python tests/documented.py OUT [SECONDS]` runs them, on few nodes, and
writes docs/commands_run.md with what they print.

Each runs once, in a directory with the examples; what is done is kept in OUT, a file, and SECONDS ends a run early.
Figures are not drawn again, as the gallery has them.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: The page that lists them with their output.
LISTED = ROOT / "docs" / "commands_run.md"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
    if path != LISTED
}
#: A snippet and, right after it, what it prints.
SNIPPET = re.compile(r"(?ms)^```python\n(.*?)^```(?:\s*^```text\n(.*?)^```)?")
#: Numerics of the examples while what is documented runs: those of test_theory, what is compiled there serves here.
FEW = {"nodes": 2048, "finetuning_nodes": 4096, "replicas": 8}
_NAMES = "predict|gradient|optimize|sweep|explain|simulate|verify|practice|figure"
#: What a test runs, at smaller sizes where they are large.
TESTED = {
    "--coordinator": "tests/test_sweeps.py",
    "finetuning.alpha=0.5,1,2,4": "tests/test_sweeps.py",
    "lorastate verify": "tests/test_verification.py",
}
#: Pages that show, after these commands, all that they print.
SHOWN = {
    "lorastate predict examples/softmax.toml": "docs/tutorial.md",
    "lorastate optimize examples/softmax.toml --verify --out results": "docs/tutorial.md",
    "lorastate practice layer.npz --activation identity --ridge 0.2": "docs/how_to/your_own_layer.md",
    "lorastate optimize examples/softmax.toml --set finetuning.teacher_rank=2 finetuning.alpha=6 --over finetuning.lam "
    "--scan finetuning.rank=1,2,3,4 --out results": "docs/how_to/rank.md",
}


def commands() -> Iterator[tuple[str, str]]:
    """Page and command line, without those in which something stands for something else."""
    for name, page in PAGES.items():
        shown = re.findall(rf"(?m)^(?:    |\$ )?(?:.*&& )?(lorastate (?:{_NAMES}) (?:.*\\\n)*.*)$", page)
        for line in [*shown, *re.findall(rf"`(lorastate (?:{_NAMES}) [^`]+)`", page)]:
            line = re.sub(r"\\\n *", "", line)
            if "..." not in line and "$" not in line:
                yield name, line


def distinct() -> list[str]:
    return list(dict.fromkeys(line for _, line in commands()))


def is_elsewhere(line: str) -> str:
    """The sentence about a command whose outcome is somewhere else; nothing for others."""
    if line.startswith("lorastate figure"):
        return "What it draws is in the [gallery](gallery.md)."
    if line in SHOWN:
        return f"Its output is on [that page]({_from_docs(SHOWN[line])})."
    for word, test in TESTED.items():
        if word in line:
            return f"Its kind is run, on a smaller scale, by [{Path(test).name}](../{test})."
    return ""


def copy_examples(directory: Path) -> None:
    """The examples, with few nodes."""
    (directory / "examples").mkdir()
    for path in (ROOT / "examples").glob("*.toml"):
        text = re.sub(r"(?ms)^\[numerics\].*", "", path.read_text())
        few = "\n".join(f"{key} = {value}" for key, value in FEW.items())
        (directory / "examples" / path.name).write_text(f"{text}\n[numerics]\n{few}\n")


def run(line: str, home: Path) -> dict:
    """Exit code, seconds and output of a command, in a directory of its own results."""
    words = ["examples/softmax.toml" if word == "SETTING" else word for word in shlex.split(line)[1:]]
    for old in (home / "results", home / "best_for_finetuning", home / "best_for_pretraining"):
        subprocess.run(["rm", "-rf", str(old)], check=True)
    began = time.perf_counter()
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "lorastate", *words], cwd=home, env=env, text=True, capture_output=True
    )
    said = done.stdout if done.returncode == 0 else done.stdout + done.stderr
    return {"code": done.returncode, "seconds": time.perf_counter() - began, "said": said.strip("\n"),
            "date": datetime.date.today().isoformat()}  # fmt: skip


def page(done: dict[str, dict]) -> str:
    """Every command with the end of what it printed."""
    pages: dict[str, list[str]] = {}
    for name, line in commands():
        pages.setdefault(line, []).append(name)
    parts = [_HEAD]
    for line, names in pages.items():
        links = ", ".join(f"[{name}]({_from_docs(name)})" for name in dict.fromkeys(names))
        parts.append(f"```text\n$ {line}\n```\n\nIn {links}. {_outcome(line, done)}\n")
    return "\n".join(parts)


def _from_docs(name: str) -> str:
    return name.removeprefix("docs/") if name.startswith("docs/") else f"../{name}"


def _outcome(line: str, done: dict[str, dict]) -> str:
    if elsewhere := is_elsewhere(line):
        return elsewhere
    found = done[line]
    end = found["said"].splitlines()[-_SHOWN:]
    head = f"Exit code {found['code']} after {found['seconds']:.0f} s, {found['date']}."
    return f"{head} The end of its output:\n\n```text\n" + "\n".join(end) + "\n```"


#: Lines of output that the page shows.
_SHOWN = 12
_HEAD = """# Every command, run

`python tests/documented.py OUT` runs every command that these pages show, and writes this one. The settings are those
of the examples on few nodes (2048 and 4096), so numbers are not as sharp as elsewhere. Times are on one shared core,
compilation included where nothing was compiled before.
"""


def main(words: list[str]) -> int:
    out, limit = Path(words[0]), float(words[1]) if len(words) > 1 else float("inf")
    done = json.loads(out.read_text()) if out.exists() else {}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        copy_examples(home)
        _snippet_of_the_layer(home)
        for line in distinct():
            if line in done or is_elsewhere(line) or time.perf_counter() - began > limit:
                continue
            done[line] = run(line, home)
            out.write_text(json.dumps(done, indent=1))
            print(f"{done[line]['code']} {done[line]['seconds']:6.0f} s  {line}", flush=True)
    if all(line in done or is_elsewhere(line) for line in distinct()):
        LISTED.write_text(page(done))
    return max((found["code"] for found in done.values()), default=0)


def _snippet_of_the_layer(home: Path) -> None:
    """layer.npz, which a page makes before its command reads it."""
    code = SNIPPET.findall(PAGES["docs/how_to/your_own_layer.md"])[0][0].split("found = ls.assess")[0]
    with contextlib.chdir(home), contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, "your_own_layer.md", "exec"), {})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
