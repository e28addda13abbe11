"""The API reference, a page for each module, written from the docstrings without importing anything.

`pages()` gives the Markdown of every page; tools/stage.py lays them out beside the chapters.
"""

import ast
import copy
import re
from functools import cache
from pathlib import Path

from .settings import ROOT, chapters, settings

LIBRARY = ROOT / "ftbook"
MARK = re.compile(r"^# %% \.\./nbs/(\w+)\.ipynb #", re.M)
HEADING = re.compile(r"^(\S[^\n]*)\n-{3,}[ \t]*$", re.M)
DEFINITION = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef


@cache
def parsed(file: Path) -> ast.Module:
    """A module as a tree; its pages, its index and its links all read it."""
    return ast.parse(file.read_text(encoding="utf-8"))


def modules() -> dict:
    """Name -> file of every module with an `__all__`, in alphabetical order."""
    files = sorted(LIBRARY.glob("[!_]*.py"))
    return {f.stem: f for f in files if "\n__all__ = [" in f.read_text(encoding="utf-8")}


def listed(tree: ast.Module) -> list:
    """What `__all__` names."""
    found = [n.value for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"]
    return ast.literal_eval(found[0]) if found else []


def escaped(text: str) -> str:
    """Prose of a docstring as Markdown: code in backticks stays, marks of Markdown and HTML outside of it are letters."""
    pieces = re.split(r"(``[^`]+``|`[^`]+`)", text)
    return "".join(p if i % 2 else re.sub(r"([\\*$<>\[\]|_~{}])", r"\\\1", p) for i, p in enumerate(pieces))


def _paragraphs(text: str) -> str:
    """Paragraphs; what is set in, or begins with >>>, is code."""
    out = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        lines = block.split("\n")
        if block.lstrip().startswith(">>>") or all(line.startswith("    ") for line in lines):
            out.append(f"```python\n{block}\n```")
        elif len(lines) > 1 and not lines[0].startswith(" ") and lines[1].startswith("    "):
            out.append(_items(block))  # terms, and what is said of each set in below it
        else:
            out.append(escaped(block.strip()))
    return "\n\n".join(out)


def _coded(kind: str) -> str:
    """A type whose values in quotes are code: prose would get round quotes."""
    return re.sub(r"(?<![`\w])(\"[^\"`]*\"|'[^'`]*')(?![`\w])", r"`\1`", kind)


def _items(text: str) -> str:
    """`name : type` and what is said below it, as a list."""
    out: list = []
    for line in text.strip("\n").split("\n"):
        if line.strip() and not line.startswith(" "):
            name, colon, kind = line.partition(" : ")
            out.append(f"- **{escaped(name.strip())}**" + (f" (*{escaped(_coded(kind.strip()))}*)" if colon else ""))
        elif line.strip():
            joint = ": " if out and out[-1].startswith("- **") and out[-1].endswith(("**", "*)")) else " "
            out[-1:] = [(out[-1] if out else "-") + joint + escaped(line.strip())]
    return "\n".join(out)


def markdown(docstring: str) -> str:
    """A numpydoc docstring as Markdown."""
    parts = HEADING.split(docstring)
    out = [_paragraphs(parts[0])]
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        body = re.sub(r"\n\s*\n(?=\S)", "\n\n", body.strip("\n"))
        lists = title in {"Parameters", "Returns", "Raises", "Attributes", "Yields", "Other Parameters", "Warns"}
        out += [f"**{title}**", _items(body) if lists else _paragraphs(body)]
    return "\n\n".join(out)


def _without_self(arguments: ast.arguments) -> ast.arguments:
    """The arguments of a method as its caller sees them; the tree itself is kept and stays as it is."""
    seen = copy.copy(arguments)
    seen.args = arguments.args[arguments.args[:1] != [] and arguments.args[0].arg in ("self", "cls") :]
    return seen


def _is_set_later(field: ast.AnnAssign) -> bool:
    """Whether no caller gives a field of a dataclass its value: field(init=False), or ClassVar."""
    given = field.value.keywords if isinstance(field.value, ast.Call) else []
    return "ClassVar" in ast.unparse(field.annotation) or any(
        k.arg == "init" and not ast.literal_eval(k.value) for k in given
    )


def _fields(node: ast.ClassDef, made: dict) -> dict:
    """Name -> text of the fields that a dataclass is made with: those of the classes below it first."""
    found: dict = {}
    for base in node.bases:
        if isinstance(below := made.get(getattr(base, "id", "")), ast.ClassDef):
            found |= _fields(below, made)
    own = [m for m in node.body if isinstance(m, ast.AnnAssign) and not _is_set_later(m)]
    return found | {ast.unparse(m.target): ast.unparse(m) for m in own}


def signature(node, made: dict) -> str:
    """How it is called: a class by its `__init__`, a dataclass by its fields; `made` has the module's definitions by name."""
    if not isinstance(node, ast.ClassDef):
        return wrapped(node.name, _arguments(node.args), f" -> {ast.unparse(node.returns)}" if node.returns else "")
    init = next((m for m in node.body if isinstance(m, ast.FunctionDef) and m.name == "__init__"), None)
    if init:
        return "class " + wrapped(node.name, _arguments(_without_self(init.args)), "")
    fields = list(_fields(node, made).values())
    if fields and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
        return "class " + wrapped(node.name, fields, "")
    return f"class {node.name}"


def _arguments(given: ast.arguments) -> list:
    """The arguments of a call as they are written, with the marks / and * between them."""

    def one(arg, default=None, stars=""):
        kind = f": {ast.unparse(arg.annotation)}" if arg.annotation else ""
        value = "" if default is None else f" = {ast.unparse(default)}" if kind else f"={ast.unparse(default)}"
        return f"{stars}{arg.arg}{kind}{value}"

    before = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(before) - len(given.defaults)) + given.defaults
    out = [one(*pair) for pair in zip(before, defaults, strict=True)]
    if given.posonlyargs:
        out.insert(len(given.posonlyargs), "/")
    if given.vararg:
        out.append(one(given.vararg, stars="*"))
    elif given.kwonlyargs:
        out.append("*")
    out += [one(*pair) for pair in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    return out + ([one(given.kwarg, stars="**")] if given.kwarg else [])


def wrapped(name: str, pieces: list, returns: str) -> str:
    """A signature, an argument a line where one line would be long."""
    text = f"{name}({', '.join(pieces)}){returns}"
    return text if len(text) <= 80 else f"{name}(\n    " + ",\n    ".join(pieces) + f",\n){returns}"


def methods(node) -> list:
    """(signature, first line) of the public methods of a class."""
    found = []
    for m in node.body if isinstance(node, ast.ClassDef) else []:
        if isinstance(m, DEFINITION) and not m.name.startswith("_"):
            is_property = any("property" in ast.unparse(d) for d in m.decorator_list)
            call = m.name if is_property else f"{m.name}({', '.join(_arguments(_without_self(m.args)))})"
            found.append((call, (ast.get_docstring(m) or "").strip().split("\n")[0]))
    return found


def taken(tree: ast.Module) -> dict:
    """Name -> the module of the library that it is imported from."""
    found = [n for n in tree.body if isinstance(n, ast.ImportFrom) and n.module]
    own = [n for n in found if n.level == 1 or n.module.startswith("ftbook.")]
    return {a.asname or a.name: n.module.removeprefix("ftbook.") for n in own for a in n.names}


def value(entry: str, tree: ast.Module, source: str) -> str:
    """The lines that give a name its value; "" where there are many."""
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(t, ast.Name) and t.id == entry for target in targets for t in ast.walk(target)):
            text = ast.get_source_segment(source, node) or ""
            return f"```python\n{text}\n```" if text.count("\n") < 40 else ""
    return ""


def page(name: str, file: Path) -> str:
    """The page of a module."""
    source = file.read_text(encoding="utf-8")
    tree, cfg = parsed(file), settings()
    known = {f.stem for f in chapters()}
    made, origin = {n.name: n for n in tree.body if isinstance(n, DEFINITION)}, taken(tree)
    out = [f"# ftbook.{name}", markdown(ast.get_docstring(tree) or "")]
    where = next((m[1] for m in MARK.finditer(source) if m[1] in known), "")
    links = [f"[Where it is built](../nbs/{where}.ipynb)"] if where else []
    links.append(f"[Source]({cfg['repository']}/blob/{cfg['branch']}/ftbook/{file.name})")
    out.append(" · ".join(links))
    for entry in listed(tree):
        out.append(f"## {entry}")
        node = made.get(entry)
        if node is None:
            if below := origin.get(entry):
                out.append(
                    f"The same as in [`ftbook.{below}`]({below}.md#{entry.lower()}), which lies below this module."
                )
            else:
                out.append(
                    value(entry, tree, source) or "A value that the module sets; its chapter says what it holds."
                )
            continue
        out.append(f"```python\n{signature(node, made)}\n```")
        out.append(markdown(ast.get_docstring(node) or ""))
        if found := methods(node):
            out.append("\n".join(f"- `{call}`: {escaped(said)}" if said else f"- `{call}`" for call, said in found))
    return "\n\n".join(part for part in out if part) + "\n"


def pages() -> dict:
    """File name -> Markdown of the reference: an index and a page for each module."""
    known = modules()
    lines = [
        "# API reference",
        "Every module of the library and what it lists, from the docstrings. A chapter builds each of them.",
    ]
    rows = ["| module | what it is for |", "| :-- | :-- |"]
    for name, file in known.items():
        said = (ast.get_docstring(parsed(file)) or "").strip().split("\n\n")[0]
        rows.append(f"| [ftbook.{name}]({name}.md) | {escaped(' '.join(said.split()))} |")
    tree = "\n".join(["```{toctree}", ":hidden:", ":maxdepth: 1", "", *known, "```"])
    index = "\n\n".join([*lines, "\n".join(rows), tree]) + "\n"
    return {"index.md": index, **{f"{n}.md": page(n, f) for n, f in known.items()}}


@cache
def built_in(file: Path) -> set:
    """The notebooks that a module is exported from."""
    return {m[1] for m in MARK.finditer(file.read_text(encoding="utf-8"))}


def names(page: str = "") -> dict:
    """`module.name` -> address of its entry, seen from the page of a chapter or of a module; of the modules that the chapter builds, or
    of that module, also `name`.
    """
    found = {}
    for name, file in modules().items():
        for entry in listed(parsed(file)):
            address = f"../api/{name}.html#{entry.lower().replace('_', '-')}"
            found[f"{name}.{entry}"] = address
            if page == name or page in built_in(file):
                found.setdefault(entry, address)
        found[f"ftbook.{name}"] = f"../api/{name}.html"
    return found
