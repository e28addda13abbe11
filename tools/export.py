"""Export notebooks to ftbook/: `export.py [CHAPTER ...]`, all of them by default.

`#| default_exp data` names the module that a notebook's `#| export` cells make. `#| export images` makes a second one.
nbdev itself would only append to such a module, a second time at the next export; here it is written whole.
The first exported cell may begin with the module's docstring (or set `__doc__`), and may set `__all__`. nbdev would leave
the docstring below its own list of names, where Python does not see it; here it stands first, and there is one `__all__`.
"""

import ast
import sys
from pathlib import Path

from nbdev.config import get_config
from nbdev.doclinks import _build_modidx
from nbdev.export import nb_export
from nbdev.maker import ModuleMaker

from .settings import NBS, ROOT, find

LISTED = "# %% auto #0\n"  # what nbdev writes above its own `__all__`


def _sets(node, name: str) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name


def arranged(module: str) -> str:
    """The source of a module, as nbdev wrote it, with docstring and `__all__` where Python and a reader look for them."""
    body, lines = ast.parse(module).body, module.splitlines(keepends=True)
    lists = [n for n in body if _sets(n, "__all__")]
    if not lists or LISTED not in lines:
        return module
    behind = body[body.index(lists[0]) + 1 :]
    docs = [n for n in behind[:1] if isinstance(n, ast.Expr)] + [n for n in behind if _sets(n, "__doc__")]
    docs = [n for n in docs if isinstance(n.value, ast.Constant) and isinstance(n.value.value, str)][:1]
    moved = "".join(f"{ast.get_source_segment(module, n.value)}\n\n" for n in docs)
    gone = [(n.lineno - 1, n.end_lineno) for n in docs]
    if len(lists) > 1:
        gone.append((lines.index(LISTED), lists[0].end_lineno))
    for start, end in gone:
        while end < len(lines) and not lines[end].strip():  # with the empty lines below
            end += 1
        lines[start:end] = [""] * (end - start)
    return moved + "".join(lines)


class Whole(ModuleMaker):
    """Every module is made by one notebook, so every module is a new file."""

    def __init__(self, dest, name, nb_path, is_new=True, **options):
        super().__init__(dest, name, nb_path, is_new=True, **options)

    def make(self, cells, all_cells=None, lib_path=None):
        super().make(cells, all_cells, lib_path)
        file = Path(self.fname)
        # nbdev's add_init would put a list of modules into the package's docstring
        (file.parent / "__init__.py").touch()
        file.write_text(arranged(file.read_text(encoding="utf-8")), encoding="utf-8")


def main(argv: list) -> int:
    library = get_config(ROOT).lib_path
    for file in [find(name) for name in argv] or sorted(NBS.glob("[!.]*.ipynb")):
        nb_export(str(file.relative_to(ROOT)), lib_path=library, mod_maker=Whole)
    _build_modidx()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
