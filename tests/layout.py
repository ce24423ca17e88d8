"""What the package looks like: files, lines, functions, who imports whom. `python tests/layout.py` prints it."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent / "lorastate"

#: What may be imported by what comes later; packages on one line are siblings that do not know each other.
LAYERS = [
    names.split()
    for names in (
        "_version errors", "validation", "predictions", "runtime", "math", "model", "setting", "evolution", "bayes",
        "solution", "design simulation diagnosis practice", "sweeps", "verification", "figures", "cli",
        "__init__ __main__",
    )
]  # fmt: skip


def modules() -> dict[str, Path]:
    """Every file by its dotted name inside the package."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports(name: str, path: Path, known) -> set[str]:
    """Which files of the package the one of this name imports, wherever in it, but for what only types need."""
    tree, inside = ast.parse(path.read_text()), set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    if name == "__init__":
        package = []
    typing = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    skipped = {id(n) for block in typing for n in ast.walk(block)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level or id(node) in skipped:
            continue
        base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
        for alias in node.names:
            full = ".".join([*base, alias.name])
            inside.add(full if full in known else ".".join(base))
    return inside - {name, ""}


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(name, path, known) for name, path in known.items()}


def circles(edges) -> list[list[str]]:
    """Sets of files that import each other, directly or not (Tarjan's strongly connected components)."""
    index, low, stack, out = {}, {}, [], []

    def visit(v):
        index[v] = low[v] = len(index)
        stack.append(v)
        for w in edges.get(v, ()):
            if w not in index:
                visit(w)
                low[v] = min(low[v], low[w])
            elif w in stack:
                low[v] = min(low[v], index[w])
        if low[v] == index[v]:
            found = [stack.pop()]
            while found[-1] != v:
                found.append(stack.pop())
            if len(found) > 1:
                out.append(sorted(found))

    for v in edges:
        if v not in index:
            visit(v)
    return out


def upwards(edges) -> list[str]:
    """Imports that go up, or to a sibling that should not be known."""
    place = {name: k for k, names in enumerate(LAYERS) for name in names}
    found = []
    for name, others in edges.items():
        one = name.split(".")[0]
        for other in others:
            two = other.split(".")[0]
            if one != two and place[two] >= place[one]:
                found.append(f"{name} -> {other}")
    return sorted(found)


def functions() -> dict[str, int]:
    """Lines of every function, from its first decorator on."""
    out = {}
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                assert node.end_lineno is not None
                out[f"{name}.{node.name}"] = node.end_lineno - first + 1
    return out


def lines() -> dict[str, int]:
    return {name: len(path.read_text().splitlines()) for name, path in modules().items()}


def main() -> None:
    size, length, edges = lines(), functions(), graph()
    print(f"{len(size)} files, {sum(size.values())} lines; {len(length)} functions")
    for title, table in (("largest files", size), ("longest functions", length)):
        print(title + ": " + ", ".join(f"{k} {v}" for k, v in sorted(table.items(), key=lambda kv: -kv[1])[:12]))
    print(f"circles: {circles(edges)}")
    print(f"imports that go up: {upwards(edges)}")


if __name__ == "__main__":
    sys.exit(main())
