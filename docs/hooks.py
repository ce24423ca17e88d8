"""What the site has beside docs/: pages that stand elsewhere in the repository, the code that they name, and MathJax.

Pages link to each other and to files of the repository by relative paths, as a reader of the repository expects. Here a
link to a notebook becomes one to its page, and a link to any other file of the repository one to a page that shows
this file, at the line that defines what the text of the link names. No link leaves the site.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import posixpath
import re
from pathlib import Path

import nbformat
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename

ROOT = Path(__file__).parent.parent
#: Pages that stand elsewhere in the repository, by their place in the site.
ELSEWHERE = {
    "changelog.md": "CHANGELOG.md",
    "benchmarks.md": "benchmarks/README.md",
    "contributing.md": "CONTRIBUTING.md",
}
NOTEBOOKS = {f"studies/{path.stem}.md": f"notebooks/{path.name}" for path in sorted(ROOT.glob("notebooks/*.ipynb"))}
#: A formula within a line and the punctuation around it; inline code with an option in it; a picture.
FORMULA = re.compile(r"(\(?<span class=\"arithmatex\">[^<]*</span>[,.;:!?)]+)")
CODE, OPTION = re.compile(r"(?<!<pre>)<code>([^<]*--\w[^<]*)</code>"), re.compile(r"(?<![\w-])(--[\w-]+)")
PICTURE = re.compile(r"<img [^>]*src=\"([^\"]+)\"[^>]*/?>")
#: `[text](target#anchor)`, not of an image.
LINK = re.compile(r"(?<!!)\[([^\[\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config) -> Files:
    """Adds what is not in docs/; pages of code last, once it is known which of them are linked to."""
    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for page, source in NOTEBOOKS.items():
        for name, content in _notebook(ROOT / source, page).items():
            files.append(File.generated(config, name, content=content))
    for file in _linked(files):
        files.append(File.generated(config, _code_page(file), content=_code(file)))
    for name, path in _mathjax().items():
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Links to files of the repository as links to pages of the site."""
    here = page.file.src_uri

    def there(match: re.Match) -> str:
        text, _, anchor = match.groups()
        file = _target(here, match)
        if file is None:
            return match[0]
        place = _place(file)
        if place == _code_page(file) and not anchor:
            line = _line(file, text.strip("`"))
            anchor = f"#line-{line}" if line else None
        return f"[{text}]({posixpath.relpath(place, posixpath.dirname(here) or '.')}{anchor or ''})"

    return LINK.sub(there, markdown)


def on_page_content(html: str, page, config, files) -> str:
    """Lines do not break before a full stop or within an option, and a picture can be opened at its own size."""
    keep = r'<span class="keep">\1</span>'
    html = CODE.sub(lambda match: f"<code>{OPTION.sub(keep, match[1])}</code>", FORMULA.sub(keep, html))
    return PICTURE.sub(r'<a class="picture" href="\1">\g<0></a>', html)


def _origin(page: str) -> str:
    """Where in the repository a page stands."""
    return ELSEWHERE.get(page) or NOTEBOOKS.get(page) or f"docs/{page}"


def _target(page: str, match: re.Match) -> str | None:
    """The file of the repository that a link leads to, unless the link works as it is."""
    file = posixpath.normpath(posixpath.join(posixpath.dirname(_origin(page)), match[2]))
    inside = file.startswith("docs/") and _origin(page).startswith("docs/")
    return None if inside or file.startswith("..") or not (ROOT / file).is_file() else file


def _place(file: str) -> str:
    """The page of the site that shows a file of the repository."""
    if file.startswith("docs/"):
        return file.removeprefix("docs/")
    pages = {source: page for page, source in (ELSEWHERE | NOTEBOOKS).items()}
    return pages.get(file) or ("index.md" if file == "README.md" else _code_page(file))


def _code_page(file: str) -> str:
    return f"code/{file}.md"


def _linked(files: Files) -> list[str]:
    """Files that any page links to and that no other page shows."""
    found = {}
    for page in files.documentation_pages():
        for match in LINK.finditer(page.content_string):
            file = _target(page.src_uri, match)
            if file is not None and _place(file) == _code_page(file):
                found[file] = None
    return list(found)


def _code(file: str) -> str:
    """A page that shows a file; every line has an id, which links are checked against."""
    name = posixpath.basename(file)
    lexer = get_lexer_for_filename(name, stripnl=False) if "." in name else TextLexer(stripnl=False)
    shown = HtmlFormatter(linenos="table", linespans="line", cssclass="highlight", wrapcode=True)
    html = highlight((ROOT / file).read_text(), lexer, shown)
    return f"---\ntitle: {file}\nsearch: {{exclude: true}}\nhide: [toc]\n---\n\n# `{file}`\n\n{html}\n"


def _line(file: str, name: str) -> int | None:
    """The line that defines a dotted name, whatever stands before its last parts."""
    lines, parts = _definitions(file), name.split(".")
    return next((lines[".".join(parts[k:])] for k in range(len(parts)) if ".".join(parts[k:]) in lines), None)


@functools.cache
def _definitions(file: str) -> dict[str, int]:
    found: dict[str, int] = {}

    def walk(body, prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found[prefix + node.name] = node.lineno
                if isinstance(node, ast.ClassDef):
                    walk(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update({prefix + t.id: node.lineno for t in targets if isinstance(t, ast.Name)})

    if file.endswith(".py"):
        walk(ast.parse((ROOT / file).read_text()).body, "")
    return found


def _notebook(path: Path, page: str) -> dict[str, str | bytes]:
    """A notebook as a page, and its pictures; of widgets, which need a server, there is nothing to show."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if not any("widget" in kind for kind in o.get("data", {}))]
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    pictures = {f"studies/{path.stem}_{name}": data for name, data in resources["outputs"].items()}
    for name in resources["outputs"]:
        text = text.replace(f"]({name})", f"]({path.stem}_{name})")
    return {page: re.sub(r"(?m)^!\[png\]", "![Figure]", text), **pictures}


def _mathjax() -> dict[str, Path]:
    """MathJax with its fonts, as the package django-static-mathjax ships it (nothing of Django is needed)."""
    spec = importlib.util.find_spec("mathjax")
    if spec is None or not spec.submodule_search_locations:
        raise PluginError("MathJax is missing: pip install '.[docs]'")
    home = Path(next(iter(spec.submodule_search_locations))) / "static" / "mathjax" / "es5"
    fonts = sorted((home / "output" / "chtml" / "fonts" / "woff-v2").glob("*.woff"))
    return {f"assets/mathjax/{path.relative_to(home).as_posix()}": path for path in (home / "tex-chtml.js", *fonts)}
