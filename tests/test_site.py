"""Documentation: links lead somewhere, names and commands are there, snippets run and print what is said.

`mkdocs build --strict` checks the site itself: that every page is listed, that formulas and code are marked as such.
"""

import contextlib
import importlib.util
import io
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import documented
import pytest
import tyro
from documented import SNIPPET

import lorastate as ls
from lorastate.cli import exit_codes
from lorastate.cli.checks import check_fields
from lorastate.cli.commands import Command, spread
from lorastate.cli.figure import Figure
from lorastate.cli.practice import Practice
from lorastate.figures import FIGURES
from lorastate.sweeps.grid import parse_axis

ROOT = Path(__file__).parent.parent
PAGES = documented.PAGES | {"docs/commands_run.md": documented.LISTED.read_text()}
_FENCE = re.compile(r"(?ms)^```(\w*)[^\n]*\n(.*?)^```")


def anchors(text):
    """The anchors of a page's headings, as GitHub and the site make them."""
    titles = re.findall(r"(?m)^#+ (.+)$", _FENCE.sub("", text))
    return {re.sub(r"[ ]+", "-", re.sub(r"[^\w\- ]", "", title.lower()).strip()) for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    for _, target in re.findall(r"\[([^\[\]]*)\]\(([^)\s]+)\)", _FENCE.sub("", PAGES[page])):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.is_file(), target
        assert not anchor or anchor in anchors(path.read_text()), target


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_are_named_are_there(page):
    for name, file in re.findall(r"\[(test_\w+)\]\((?:\.\./)*(tests/\w+\.py)\)", PAGES[page]):
        assert re.search(rf"(?m)^def {name}\(", (ROOT / file).read_text()), (name, file)


def test_every_exit_code_is_listed():
    listed = {int(code) for code in re.findall(r"(?m)^\| (\d+) \|", PAGES["docs/commands.md"])}
    assert listed == {0, *(code for name, code in vars(exit_codes).items() if name.isupper())}


def test_reference_has_every_public_name():
    listed = [name for page in PAGES.values() for name in re.findall(r"(?m)^::: (\S+)$", page)]
    assert sorted(listed) == sorted(f"lorastate.{module}.{name}" for name, module in ls._HOME.items())
    overview = PAGES["docs/api/index.md"]
    assert [name for name in ls._HOME if f"`{name}`" not in overview] == []


# ---- commands ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line", [pytest.param(line, id=f"{name}: {line[:60]}") for name, line in documented.commands()]
)
def test_commands_are_understood(line):
    words = shlex.split(line.replace("--processes N", "--processes 2").replace("--process I", "--process 0"))[1:]
    words = ["examples/softmax.toml" if word == "SETTING" else word for word in words]
    command = tyro.cli(Command, args=spread(words), prog="lorastate")
    if isinstance(command, Figure):
        assert command.which in (*FIGURES, "all")
        return
    if isinstance(command, Practice):
        return
    setting = ls.load_setting(ROOT / command.setting, command.set)
    for axis in getattr(command, "grid", ()):
        path, values = parse_axis(axis)
        ls.replace(setting, path, values[0])
    if over := getattr(command, "over", ""):
        check_fields("--over", over.split(","), ls.continuous_fields(setting))


def test_every_command_was_run():
    """docs/commands_run.md has each, with its exit code, and has no other."""
    listed = re.findall(r"(?m)^\$ (lorastate .*)$", PAGES["docs/commands_run.md"])
    assert listed == documented.distinct()
    ended = re.findall(r"Exit code (\d+)", PAGES["docs/commands_run.md"])
    assert set(ended) == {"0"}


def test_kinds_of_commands_are_known():
    assert set(documented._NAMES.split("|")) == {kind.__origin__.__name__.lower() for kind in Command.__args__}


def test_every_command_and_option_is_listed():
    page = PAGES["docs/commands.md"]
    for kind in (command.__origin__ for command in Command.__args__):
        row = re.search(rf"(?m)^\| `{kind.__name__.lower()}` \|.*$", page)
        assert row, kind
        listed = set(re.findall(r"`(--[\w-]+)`", row[0]))
        options = {f"--{field.name.replace('_', '-')}" for field in fields(kind)} - {
            "--setting",
            "--set",
            "--which",
            "--files",
        }
        assert listed == options, kind


# ---- snippets ----------------------------------------------------------------------------------------------------

_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def same(said: str, printed: str) -> bool:
    """Whether a page says what was printed, up to what few nodes change of numbers."""
    if _NUMBER.sub("#", said).split() != _NUMBER.sub("#", printed).split():
        return False
    pairs = zip(_NUMBER.findall(said), _NUMBER.findall(printed), strict=True)
    return all(abs(float(a) - float(b)) <= 0.05 + 0.1 * abs(float(a)) for a, b in pairs)


def test_same_sees_what_differs():
    assert same("E' = 0.386 +- 0.0004\n", "E' = 0.385  +- 0.0041")
    assert not same("E' = 0.386", "E' = 0.586") and not same("E' = 0.386", "E = 0.386")
    assert not same("3 minima", "3 minima and 2 more")


#: What all snippets are solved with, whatever they say: numbers to ten per cent, and one kind of program for all pages.
FEW = {"nodes": 1024, "finetuning_nodes": 2048, "replicas": 4}


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """A directory with the examples, and all that is read or made solved with few nodes."""
    documented.copy_examples(tmp_path)
    monkeypatch.chdir(tmp_path)
    few, read = ls.Numerics(**FEW), ls.load_setting

    def load(path, overrides=()):
        return read(path, [*overrides, *(f"numerics.{name}={value}" for name, value in FEW.items())])

    monkeypatch.setattr(ls, "Numerics", lambda *_, **__: few)
    monkeypatch.setattr(ls, "load_setting", load)


@pytest.mark.solve
@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if SNIPPET.search(text)])
def test_snippets(page, examples):
    """All snippets of a page, one after the other, as a reader would paste them."""
    names: dict = {}
    for code, said in SNIPPET.findall(PAGES[page]):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, page, "exec"), names)
        assert not said or same(said, printed.getvalue()), printed.getvalue()
    if page == "README.md":
        assert 0.3 < float(names["best"].after.test_error) < float(names["solution"].test_error)


@pytest.mark.solve
def test_adding_a_prediction(examples, tmp_path):
    """The lines that the page adds, added to a copy of the package."""
    shutil.copytree(ROOT / "lorastate", tmp_path / "lorastate")
    page = PAGES["docs/how_to/add_a_prediction.md"]
    hunks = re.findall(r"(?ms)^```diff\n(.*?)^```", page)
    for file, hunk in zip(("predictions.py", "solution/finetuning.py"), hunks, strict=True):
        path, lines = tmp_path / "lorastate" / file, hunk.splitlines()
        kept = [line[1:] for line in lines if line.startswith(" ")]
        text = path.read_text()
        assert text.count("\n".join(kept)) == 1
        path.write_text(text.replace("\n".join(kept), "\n".join(line[1:] for line in lines)))
    # Bayes-optimal limits take seconds and have no row here.
    code = (
        "from lorastate.cli import main, predict\n"
        "predict.limits_of = lambda setting: None\n"
        "raise SystemExit(main.main())"
    )
    few = [f"numerics.{name}={value}" for name, value in FEW.items()]
    words = [sys.executable, "-c", code, "predict", "examples/identity.toml", "--set", *few]
    shown = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    said, found = (re.search(r"(?m)^ *angle +(\S+) +\S+ +(.*)$", text) for text in (page, shown))
    assert said and found
    assert abs(float(found[1]) - float(said[1])) < 0.1 * float(said[1]) and found[2] == said[2]


def test_where_lines_of_the_site_may_not_break():
    """Formulas keep their full stop and options their dashes; in blocks of code nothing is touched."""
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec and spec.loader
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    formula, block = r'<span class="arithmatex">\(x\)</span>', "<pre><code>run --all</code></pre>"
    html = f'({formula}), {formula} y <code>run --all-of it</code> {block} <img alt="" src="a.png" />'
    assert hooks.on_page_content(html, None, None, None) == (
        f'<span class="keep">({formula}),</span> {formula} y <code>run <span class="keep">--all-of</span> it</code> '
        f'{block} <a class="picture" href="a.png"><img alt="" src="a.png" /></a>'
    )
