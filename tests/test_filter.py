"""What the readers' copy of a notebook keeps and drops: tools/filter.py."""

import json
import subprocess
import sys

import pytest

from tools.filter import options_of, transform


def code(source, outputs=()):
    return {
        "cell_type": "code",
        "id": "a",
        "metadata": {},
        "execution_count": None,
        "source": source,
        "outputs": list(outputs),
    }


def text(source):
    return {"cell_type": "markdown", "id": "b", "metadata": {}, "source": source}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("#| default_exp losses", {"default_exp": "losses"}),
        ("#| export", {"export": ""}),
        ("#| echo: false", {"echo": "false"}),
        ("#|hide", {"hide": ""}),
        ("# | no", {}),
        ("x = 1", {}),
    ],
)
def test_directives_of_both_kinds_are_read(line, found):
    assert options_of([line, "y"]) == (found, ["y"] if found else [line, "y"])


def test_hidden_cells_go_and_directives_with_them():
    nb = {
        "cells": [
            text("# Title"),
            code("#| default_exp x"),
            code("#| hide\na"),
            code("#| include: false\nb"),
            code("#| export\nimport os"),
        ],
        "metadata": {},
    }
    for target in ("quarto", "sphinx"):
        kept = transform(nb, target)["cells"]
        assert ["".join(c["source"]) for c in kept if c["cell_type"] == "code"] == ["import os"]
        assert all(isinstance(c["source"], list) for c in kept), "one long string would lose its line ends in Quarto"


def test_alerts_become_callouts_of_the_builder():
    nb = {"cells": [text("> [!NOTE]\n> Mind **this**.\n\nAfter.")], "metadata": {}}
    quarto, sphinx = ("".join(transform(nb, t)["cells"][0]["source"]) for t in ("quarto", "sphinx"))
    assert (
        "callout-note" in quarto
        and "{note}" in sphinx
        and "Mind **this**." in quarto
        and "[!NOTE]" not in quarto + sphinx
    )


def test_it_works_on_standard_input_as_quarto_calls_it(root):
    nb = {"cells": [text("# Title")], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    run = subprocess.run(
        [sys.executable, root / "tools" / "filter.py"],
        input=json.dumps(nb),
        capture_output=True,
        text=True,
        cwd=root / "nbs",
    )
    assert "".join(json.loads(run.stdout)["cells"][0]["source"]).endswith("Title")


def test_formulas_of_several_lines_keep_their_number():
    formula = "$$ a \\begin{cases} 1 \\\\ 2 \\end{cases} \\tag{4.1} $$"
    nb = {"cells": [text(f"Text\n\n{formula}\n\nand $$ b $$ and\n\n$$ c \\tag{{2}} $$")], "metadata": {}}
    sphinx = "".join(transform(nb, "sphinx")["cells"][0]["source"])
    assert (
        "\\begin{equation*}\na \\begin{cases} 1 \\\\ 2 \\end{cases} \\tag{4.1}\n\\end{equation*}" in sphinx
        and "$$ c \\tag{2} $$" in sphinx
    )
    assert "\\qquad\\text{(4.1)}" in "".join(transform(nb, "quarto")["cells"][0]["source"])


@pytest.mark.parametrize("target", ["quarto", "sphinx"])
def test_a_cell_of_a_table_breaks_before_its_interval_only(target):
    rows = "| way | F1 |\n| :-- | --: |\n| all layers | 20.3 % [-19.4, +21.2] |\n\n*5 % of [1, 2]*"
    nb = {
        "cells": [code("1", [{"output_type": "display_data", "metadata": {}, "data": {"text/markdown": rows}}])],
        "metadata": {},
    }
    shown = "".join(transform(nb, target)["cells"][0]["outputs"][0]["data"]["text/markdown"])
    assert shown == rows.replace("20.3 %", "20.3\u00a0%").replace("-19.4, +", "-19.4,\u00a0+")
