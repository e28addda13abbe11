"""Export notebooks to ftbook/: `export.py [CHAPTER ...]`, all of them by default.

`#| default_exp data` names the module that a notebook's `#| export` cells make. `#| export images` makes a second one.
nbdev itself would only append to such a module, a second time at the next export; here it is written whole.
"""
import sys

from nbdev.config import add_init, get_config
from nbdev.doclinks import _build_modidx
from nbdev.export import nb_export
from nbdev.maker import ModuleMaker

from .settings import NBS, ROOT, find


class Whole(ModuleMaker):
    """Every module is made by one notebook, so every module is a new file."""

    def __init__(self, dest, name, nb_path, is_new=True, **options):
        super().__init__(dest, name, nb_path, is_new=True, **options)


def main(argv: list) -> int:
    library = get_config(ROOT).lib_path
    for file in [find(name) for name in argv] or sorted(NBS.glob("[!.]*.ipynb")):
        nb_export(str(file.relative_to(ROOT)), lib_path=library, mod_maker=Whole)
    add_init(library)
    _build_modidx()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
