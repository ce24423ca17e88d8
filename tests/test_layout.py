"""The house: imports go down, no file and no function is long, every module says what is in it."""

import ast

import layout


def test_imports_go_down():
    edges = layout.graph()
    assert layout.circles(edges) == []
    assert layout.upwards(edges) == []


def test_circles_and_climbs_are_seen():
    assert layout.circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]
    edges = {"math.nodes": {"solution.solve"}, "design.scan": {"simulation.sizes"}, "cli.main": {"math"}}
    assert layout.upwards(edges) == ["design.scan -> simulation.sizes", "math.nodes -> solution.solve"]


def test_files_and_functions_are_short():
    assert {k: v for k, v in layout.lines().items() if v > 400} == {}
    assert {k: v for k, v in layout.functions().items() if v > 60} == {}


def test_every_module_says_what_it_is():
    silent = [name for name, path in layout.modules().items() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == []
