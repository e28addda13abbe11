"""The edition whose key bodies are empty: its checks fail before, and pass once the original body is back."""

import importlib
import json
import re

import pytest

from tools.recall import KEYS, emptied, main, recalled
from tools.settings import NBS

CASES = [(chapter, name) for chapter, names in KEYS.items() for name in names.split()]


def cells_of(chapter) -> list:
    cells = json.loads((NBS / f"{chapter}.ipynb").read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


def definition(chapter, name) -> tuple:
    """(source of the exported cell that defines a name, the module it goes to)."""
    sources = cells_of(chapter)
    default = next(m[1] for s in sources if (m := re.search(r"^#\| default_exp (\w+)", s, re.M)))
    source = next(s for s in sources if re.search(rf"^#\| export.*(\n.*)*^def {name}\(", s, re.M))
    module = re.search(r"^#\| export ?(\w*)", source, re.M)[1] or default
    return source, importlib.import_module(f"ftbook.{module}")


@pytest.mark.parametrize("chapter, name", CASES)
def test_a_check_fails_before_and_passes_with_the_original_body(chapter, name, capsys):
    from ftbook.exercises import examples

    source, module = definition(chapter, name)
    empty, found = emptied(source, {name})
    assert found == [name] and empty != source
    for text, right in ((empty, False), (source, True)):
        space = dict(vars(module))
        exec(compile(text, f"<{name}>", "exec"), space)
        assert space[name].__doc__ == getattr(module, name).__doc__
        assert examples(space[name]) is right
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"not yet: the body of `{name}` is still empty" and second == "correct"


def test_a_wrong_body_is_told_by_the_first_example_that_differs(capsys):
    from ftbook.exercises import examples

    def twice(x):
        """Twice a number.

        >>> twice(1)
        2
        >>> twice(3)
        6
        >>> twice("a")
        Traceback (most recent call last):
        TypeError: a number
        """
        return x * x + 1

    assert not examples(twice)
    assert capsys.readouterr().out == "not yet: `twice(3)` gives 10\n"


def test_the_notebooks_keep_what_a_reader_wrote_and_hold_a_check_below_each_empty_body(tmp_path, capsys):
    (tmp_path / "02_math.ipynb").write_text("mine")
    assert main([str(tmp_path)]) == 0
    assert (tmp_path / "02_math.ipynb").read_text() == "mine" and "1 kept" in capsys.readouterr().out
    assert {f.name for f in tmp_path.glob("*.ipynb")} == {f.name for f in NBS.glob("*.ipynb")}
    nb = json.loads((tmp_path / "17_search.ipynb").read_text(encoding="utf-8"))
    sources = ["".join(c["source"]) for c in nb["cells"]]
    for name in KEYS["17_search"].split():
        at = next(i for i, s in enumerate(sources) if f'NotImplementedError("write the body of {name}")' in s)
        assert f"examples({name})" in "".join(sources[at + 1 : at + 4])
    assert all(not c["outputs"] for c in nb["cells"] if c["cell_type"] == "code")
    assert "Recall edition" in sources[1]
    assert len({c["id"] for c in nb["cells"]}) == len(nb["cells"])


def test_a_chapter_without_keys_stays_as_it_is_but_for_its_outputs():
    nb = json.loads((NBS / "A7_glossary.ipynb").read_text(encoding="utf-8"))
    assert [c["source"] for c in recalled(nb, [])["cells"]] == [c["source"] for c in nb["cells"]]
