"""docs/theory.md: every function and every test that it names is where it says."""

import ast
import re
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "theory.md").read_text()


def defined(path):
    """Dotted names of all that a file defines: functions, classes, methods, what is assigned."""
    found = set()

    def walk(body, prefix):
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    walk(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update(prefix + t.id for t in targets if isinstance(t, ast.Name))

    walk(ast.parse(path.read_text()).body, "")
    return found


def test_functions_are_there():
    links = re.findall(r"\[`([\w.]+)`\]\(\.\./(lorastate/[\w/]+\.py)\)", PAGE)
    assert len(links) > 60
    for name, file in links:
        module = file.removeprefix("lorastate/").removesuffix(".py").replace("/", ".")
        assert name.startswith(module + "."), (name, file)
        assert name.removeprefix(module + ".") in defined(DOCS.parent / file), name


def test_tests_are_there():
    links = re.findall(r"\[(test_\w+)\]\(\.\./(tests/\w+\.py)\)", PAGE)
    assert len(links) > 40
    for name, file in links:
        assert name in defined(DOCS.parent / file), (name, file)


def test_equations_are_numbered_in_order():
    numbers = [int(n) for n in re.findall(r"\\tag\{(\d+)\}", PAGE)]
    assert numbers == list(range(1, len(numbers) + 1))
    # Every section of equations says where it is computed and what checks it.
    for part in PAGE.split("\n## ")[1:11]:
        assert "../lorastate/" in part and "../tests/" in part
