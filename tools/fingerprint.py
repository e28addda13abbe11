"""Which code do a notebook's outputs belong to? A hash of its code cells and of the definitions of ftbook they reach."""

import ast
import hashlib
import json
import re
from functools import cache
from pathlib import Path

from .generate import MARK
from .settings import ROOT

LIBRARY = ROOT / "ftbook"


class _Bare(ast.NodeTransformer):
    """Drops docstrings: rewording one does not make a chapter's outputs stale."""

    def visit(self, node):
        self.generic_visit(node)
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if isinstance(body[0], ast.Expr) and isinstance(getattr(body[0], "value", None), ast.Constant):
                node.body = body[1:] or [ast.Pass()]
        return node


def _file(module: str) -> Path | None:
    """The file of a module of ftbook, for "studies.vision" and for the package "studies"; None where there is none."""
    path = LIBRARY.joinpath(*module.split("."))
    return next((f for f in (path.with_suffix(".py"), path / "__init__.py") if module and f.is_file()), None)


def _imports(tree, package: tuple = ()) -> dict:
    """local name -> (module, name or None) for what a piece of code in a package of ftbook imports from ftbook."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "ftbook"):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            inner = (node.module or "").split(".")[0 if node.level else 1 :]
            module = ".".join([*base, *filter(None, inner)])
            for a in node.names:
                below = f"{module}.{a.name}" if module else a.name
                is_module = not module or _file(below) is not None
                found[a.asname or a.name] = (below, None) if is_module else (module, a.name)
        elif isinstance(node, ast.Import):
            for a in node.names:
                if a.name.startswith("ftbook"):
                    found[a.asname or "ftbook"] = (a.name.partition(".")[2] if a.asname else "", None)
    return found


def _uses(tree, imports: dict) -> set:
    """The (module, name) pairs that a piece of code touches, given what stands for modules of ftbook."""
    pairs = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in imports:
            pairs.add(imports[node.id])
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imports:
            module, name = imports[node.value.id]
            pairs.discard((module, name))
            if name is None:
                pairs.add((module, node.attr))
    return pairs


@cache
def _public() -> dict:
    """name -> module, from the table of ftbook/__init__.py."""
    namespace: dict = {}
    tree = ast.parse((LIBRARY / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "PUBLIC":
            namespace = ast.literal_eval(node.value)
    return {name: module for module, names in namespace.items() for name in names.split()}


@cache
def _module(name: str) -> tuple:
    """(definitions: name -> (hashable dump, names used inside the module), imports) of one module of ftbook."""
    file = _file(name)
    assert file is not None
    tree = _Bare().visit(ast.parse(file.read_text(encoding="utf-8")))
    imports, parts = _imports(tree, file.parent.relative_to(LIBRARY).parts), {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            names = [node.name]
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)] or [""]
        else:
            continue
        for each in names:
            if each != "__all__":
                parts.setdefault(each, []).append(node)
    return parts, imports


def reached(trees: list) -> set:
    """Every (module, definition) of ftbook that the given code can reach."""
    todo, seen = [], set()
    imports = _imports(ast.Module(body=[n for t in trees for n in t.body], type_ignores=[]))
    for tree in trees:
        todo += _uses(tree, imports)
    while todo:
        module, name = todo.pop()
        if _file(module) is None:
            if module in _public():
                todo.append((_public()[module], module))
            elif not module and name in _public():
                todo.append((_public()[name], name))
            continue
        parts, imports = _module(module)
        if (module, name) in seen or name not in parts:
            continue
        seen.add((module, name))
        for node in parts[name]:
            todo += _uses(node, imports)
            todo += [(module, n.id) for n in ast.walk(node) if isinstance(n, ast.Name) and n.id in parts]
    return seen


def cells_of(path: Path) -> list:
    nb = json.loads(path.read_text(encoding="utf-8"))
    sources = ["".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "code"]
    return [s for s in sources if MARK not in s]


def _tree(source: str):
    """The cell without comments, magics and docstrings; None where it is no Python."""
    source = re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.M)
    try:
        return _Bare().visit(ast.parse(source))
    except SyntaxError:
        return None


def fingerprint(path: Path) -> dict:
    """{"code": hash of the notebook's own code, "library": hash of what it reaches in ftbook}."""
    sources = cells_of(path)
    trees = [(s, _tree(s)) for s in sources]
    own = "\n".join(s if t is None else ast.dump(t) for s, t in trees)
    lines = []
    for module, name in sorted(reached([t for _, t in trees if t is not None])):
        lines += [f"{module}.{name}:{ast.dump(node)}" for node in _module(module)[0][name]]
    return {
        "code": hashlib.sha256(own.encode()).hexdigest()[:16],
        "library": hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16],
    }
