"""What the readers' copy of a notebook keeps and drops: tools/filter.py."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest

from tools.filter import PLAY, collapsed, is_folded, options_of, outline, transform
from tools.generate import with_cells
from tools.mathml import equation, formula, statements


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
            code("#| export\nx = os.sep"),
        ],
        "metadata": {},
    }
    for target in ("quarto", "sphinx"):
        kept = transform(nb, target)["cells"]
        assert ["".join(c["source"]) for c in kept if c["cell_type"] == "code"] == ["x = os.sep"]
        assert all(isinstance(c["source"], list) for c in kept), "one long string would lose its line ends in Quarto"


@pytest.mark.parametrize(
    ("source", "folded"),
    [
        ("import os\nfrom math import pi", True),
        ("'A docstring.'\n__all__ = ['f']\nimport os", True),
        ("rows = load()\nresults.table(rows)", True),
        ("ax = plot.curves(x)\nplot.show(ax, alt='a')", True),
        ("results.say('x') if rows else missing('y')", True),
        ("from ftbook import data\n\ndata.status('01_x')", True),
        ("def _help(x):\n    return x", True),
        ("def helpful(x):\n    return x", False),
        ("def _help(x):\n    return x\n\n\nassert _help(1)", False),
        ("assert 1 < 2\nplot.show(ax, alt='a')", False),
        ("history = fit(net, data)", False),
        ("%time\nthis is no Python", False),
    ],
)
def test_what_only_imports_helps_or_shows_is_folded(source, folded):
    assert is_folded(source.split("\n")) is folded
    for target in ("quarto", "sphinx"):
        (cell,) = transform({"cells": [code(source)], "metadata": {}}, target)["cells"]
        text = "".join(cell["source"])
        assert ("code-fold: true" in text or "hide-input" in cell["metadata"].get("tags", [])) is folded


def test_what_a_cell_says_about_folding_counts_more_than_the_rule():
    for value, folded in (("true", True), ("false", False)):
        nb = {"cells": [code(f"#| code-fold: {value}\nimport os")], "metadata": {}}
        (cell,) = transform(nb, "sphinx")["cells"]
        assert ("hide-input" in cell["metadata"].get("tags", [])) is folded


LONG = '''@decorated
class Box:
    """What it holds.

    More about it.
    """

    def __init__(self, size: int = 1):
        self.size = size

    def open(self, *, wide: bool = False) -> "Box":
        """Open it."""
{body}
        return self

    def _private(self):
        return 1'''.format(body="\n".join(f"        x{i} = {i}" for i in range(20)))


def test_of_a_long_definition_the_signature_stays():
    assert outline("def f():\n    return 1".split("\n")) == []
    shown = "\n".join(outline(LONG.split("\n")))
    assert shown.startswith('@decorated\nclass Box:\n    """What it holds."""')
    assert 'def open(self, *, wide: bool = False) -> "Box":' in shown and "__init__(self, size" in shown
    assert "_private" not in shown and "x1" not in shown
    for target in ("quarto", "sphinx"):
        opening, body = transform({"cells": [code(f"#| export\n{LONG}")], "metadata": {}}, target)["cells"]
        assert opening["cell_type"] == "markdown" and "".join(opening["source"]).startswith("```python\n@decorated")
        assert "Show the whole code" in str(body)
        (alone,) = transform({"cells": [code(LONG)], "metadata": {}}, target)["cells"]
        assert "Show code" in str(alone), "a chapter's own helper is no library: one need not know how it is called"


@pytest.mark.parametrize("data", [{"image/png": "AA=="}, {"text/html": ["<figure>", "<img alt='a'></figure>"]}])
def test_a_page_opens_with_a_picture_and_not_with_the_code_that_draws_it(data):
    picture = {"output_type": "display_data", "data": data, "metadata": {"alt": "a"}}
    drawing = "def name(r):\n    return r\n\n\nx = name(1)\nassert x"
    cells = [code(drawing), code(drawing, [picture]), code(drawing)]
    for target, mark in (("quarto", "code-fold: true"), ("sphinx", "hide-input")):
        kept = transform({"cells": cells, "metadata": {}}, target)["cells"]
        assert [mark in str(c) for c in kept] == [True, True, False]
        kept = transform({"cells": cells[::2], "metadata": {}}, target)["cells"]
        assert [mark in str(c) for c in kept] == [False, False], "no picture, nothing to wait for"


SVG = '<svg width="72pt" viewBox="0 0 72 36" xmlns="http://www.w3.org/2000/svg">\n<rect width="{}" height="9"/>\n</svg>'
KEPT = {
    "controls": [
        {"name": "rate", "values": ["0", "0.5", "1", "2"], "start": 1, "slider": True},
        {"name": "kind", "values": ["a", "<b> & c"], "start": 0, "slider": False},
        {"name": "seed", "values": ["3"], "start": 0, "slider": True},
    ],
    "frames": ["0 1", "0 2", "0 3", "0 4", "0 1", "0 2", "0 3", "0 4"],
    "parts": [
        {"text": "0"},
        *({"svg": f"1 {3 + k} 2", "alt": f"Bar {k}.", "caption": f"{k} < 9 & more", "width": 96} for k in range(4)),
    ],
    "lines": ["a </script> b", *SVG.split("\n")[::2], *(SVG.split("\n")[1].format(9 * k + 9) for k in range(4))],
}


def play_cell(*outputs):
    note = {"output_type": "display_data", "metadata": {}, "data": {PLAY: KEPT, "text/markdown": "**Play:** run it"}}
    return code("plot.widget(draw, rate=(0, 2))", [note, *outputs])


@pytest.mark.parametrize("target", ["quarto", "sphinx"])
def test_controls_of_a_notebook_are_controls_of_the_page(target):
    live = {"output_type": "display_data", "metadata": {"live": True}, "data": {"text/html": "<img alt='last'>"}}
    (cell,) = transform({"cells": [play_cell(live)], "metadata": {}}, target)["cells"]
    (output,) = cell["outputs"]
    (page,) = ("".join(text) for text in output["data"].values())
    assert "run it" not in page and "last" not in page and page.startswith("```{=html}") is (target == "quarto")
    box = ET.fromstring(page.strip("`").removeprefix("{=html}").strip())  # well-formed, as EPUB asks
    (slider,) = box.iter("input")
    assert slider.attrib.items() >= {"type": "range", "value": "1", "max": "3", "aria-valuetext": "0.5"}.items()
    (menu,) = box.iter("select")
    assert [o.text for o in menu] == ["a", "<b> & c"] and menu[0].get("selected")
    (picture,) = box.iter("img")
    assert picture.get("alt") == "Bar 2." and (picture.get("width"), picture.get("height")) == ("96", "48")
    assert next(box.iter("figcaption")).text == "2 < 9 & more" and next(box.iter("pre")).text == "a </script> b"
    (script,) = box.iter("script")
    assert json.loads(script.text) == KEPT and script.get("type") == "application/json"


@pytest.mark.parametrize("source", ["def draw(x):\n    return x\n\n\nplot.widget(draw, x=(0, 1))", "widget(f, x=[1])"])
def test_what_draws_for_controls_is_folded(source):
    assert is_folded(source.split("\n"))


def test_html_of_outputs_is_a_raw_block_for_quarto():
    """As an output of its own Quarto would load jQuery and require.js from another host for it."""
    page = {
        "output_type": "display_data",
        "metadata": {},
        "data": {"text/html": "<b>```</b><br><img alt='a > b' src=x>"},
    }
    (cell,) = transform({"cells": [code("1", [page])], "metadata": {}}, "quarto")["cells"]
    assert "".join(cell["outputs"][0]["data"]["text/markdown"]) == (
        "````{=html}\n<b>```</b><br /><img alt='a > b' src=x />\n````"
    )
    assert "text/html" not in cell["outputs"][0]["data"]


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
    assert formula in "".join(transform(nb, "sphinx")["cells"][0]["source"])
    assert "\\qquad\\text{(4.1)}" in "".join(transform(nb, "quarto")["cells"][0]["source"])
    page = equation(r"a \begin{cases} 1 \\ 2 \end{cases} \tag{4.1}")
    assert page.count("<mtr>") == 2 and page.endswith('<span class="eqno">(4.1)</span></div>')


def test_a_formula_that_is_not_understood_stops_the_build():
    with pytest.raises(ValueError, match=r"unheardof"):
        formula(r"\unheardof{x}")


def labels(nb: dict, target: str = "sphinx") -> list:
    """What stands on the fold of each code cell, None on an open one."""
    kept = [c for c in transform(nb, target)["cells"] if c["cell_type"] == "code"]
    return [c["metadata"].get("mystnb", {}).get("code_prompt_show") for c in kept]


def test_the_rest_of_a_module_shows_names():
    body = 'def f(x):\n    """Say it."""\n    return x\n\n\ndef _g(x):\n    return x'
    body = f"#| export\n{body}"
    cells = [text("## A"), code(body), text("## The rest of the module"), code(body), text("## B"), code(body)]
    assert labels({"cells": cells, "metadata": {}}) == [None, "Show code: f", None]


def test_a_fold_says_what_lies_in_it():
    many = "\n\n\n".join(f"def _f{i}():\n    return {i}" for i in range(6))
    cells = [text("## The rest of the module"), code(many), code("for x in (1, 2):\n    assert x"), code("print(1)")]
    wanted = ["Show code: _f0, _f1, _f2, _f3, …", "Show code: checks", "Show code"]
    assert labels({"cells": cells, "metadata": {}}) == wanted


def test_a_study_and_a_long_cell_are_folded_and_a_directive_opens_what_the_chapter_is_about():
    long = "\n".join(f"x{i} = {i}" for i in range(26))
    study, helper = "def run(seed):\n    return seed\n\n\nROWS = []", "def _helper():\n    return 1"
    cells = [code(f"#| export studies.ner\n{study}"), code(study), code(long), code(long[:-9])]
    cells += [code(helper), code(f"#| code-fold: false\n{helper}"), code(f"#| code-fold: false\n{LONG}")]
    cells += [code(f"#| export\n#| code-fold: true\n{LONG}")]
    nb = {"cells": cells, "metadata": {}}
    assert labels(nb) == [
        "Show code of the study: run",
        None,
        "Show code",
        None,
        "Show code: _helper",
        None,
        None,
        "Show code: Box",
    ]
    assert not any(c["cell_type"] == "markdown" for c in transform(nb, "sphinx")["cells"]), (
        "no signature above code that a directive opens or folds"
    )
    for cell, kept in zip(cells, transform(nb, "quarto")["cells"], strict=True):
        assert ("code-fold: true" in str(kept)) is (labels({"cells": [cell], "metadata": {}}) != [None])


@pytest.mark.parametrize("target", ["quarto", "sphinx"])
def test_a_cell_of_a_table_breaks_before_its_interval_only(target):
    rows = "| way | F1 |\n| :-- | --: |\n| all layers | 20.3 % [-19.4, +21.2] |\n\n*5 % of [1, 2]*"
    nb = {
        "cells": [code("1", [{"output_type": "display_data", "metadata": {}, "data": {"text/markdown": rows}}])],
        "metadata": {},
    }
    shown = "".join(transform(nb, target)["cells"][0]["outputs"][0]["data"]["text/markdown"])
    assert shown == rows.replace("20.3 %", "20.3\u00a0%").replace("-19.4, +", "-19.4,\u00a0+")


def test_jupyterlab_and_colab_close_what_the_page_folds():
    sources = {
        "imports": "#| export\nimport os",
        "says": 'results.say("it", 1)',
        "checks": "assert fit(1) == 1",
        "opened": "#| code-fold: false\nimport os",
        "hidden": "#| hide\nx = 1",
        "named": "#| echo: false\nprint(1)",
        "long": LONG,
    }
    cells = [{**code(source), "id": name} for name, source in sources.items()]
    cells = [
        text("# Title"),
        *cells,
        text("## The rest of the module"),
        {**code("def f(x):\n    return x"), "id": "rest"},
    ]
    closed = ["imports", "says", "hidden", "named", "rest"]
    assert collapsed({"cells": cells}) == closed
    cells[3]["metadata"] = {
        "jupyter": {"source_hidden": True},
        "tags": ["slow"],
    }  # closed by hand: it checks, so it opens
    done = with_cells({"cells": cells, "metadata": {}}, "01_background.ipynb")["cells"]
    drawn = {
        **code("ax = draw()"),
        "id": "drawn",
        "outputs": [{"output_type": "display_data", "data": {"image/png": "iVBO"}}],
    }
    first = {**code("rows = load()"), "id": "first"}
    many = {**code("\n".join(f"x{i} = {i}" for i in range(26))), "id": "many"}
    assert collapsed({"cells": [first, drawn, {**first, "id": "below"}, many]}) == ["first", "drawn", "many"]
    hidden = [c["id"] for c in done if c["metadata"].get("jupyter", {}).get("source_hidden")]
    assert hidden == ["ftbook01", *closed] and done[5]["metadata"] == {"tags": ["slow"]}


def test_on_a_phone_a_picture_of_several_panels_keeps_legible_text():
    svg = '<svg xmlns="http://www.w3.org/2000/svg" width="{w}pt" height="90pt" viewBox="0 0 {w} 90"></svg>'
    outputs = [{"output_type": "display_data", "data": {"image/svg+xml": svg.format(w=w)}} for w in (410, 660)]
    outputs.append(
        {"output_type": "display_data", "data": {"text/html": '<img alt="Nine panels." width="900" src="x.png">'}}
    )
    kept = transform({"cells": [{**code("draw()"), "outputs": outputs}], "metadata": {}}, "sphinx")["cells"][0][
        "outputs"
    ]
    opened = ["".join(o["data"]["text/html"]).split("<img")[0] for o in kept]
    assert opened == [
        '<figure class="plot">',
        *(f'<figure class="plot wide" style="--least: {n}px">' for n in (528, 540)),
    ]


def test_words_in_a_formula_are_set_apart_from_letters_beside_them():
    def row(tex):
        return re.sub("</?(math|mrow)[^>]*>", "", formula(tex))

    thin, none = 'lspace="0.167em"', 'rspace="0"'
    assert f'<mo {thin} rspace="0.167em">log</mo><mi>p</mi>' in row(r"p_c \log p")
    assert f'<mo lspace="0" {none}>max</mo><mo stretchy="false">(' in row(r"\max(z, 0)")
    assert '<mo lspace="0" rspace="0.167em">arg</mo><msub><mo lspace="0" rspace="0.167em">min</mo>' in row(
        r"\operatorname{arg}\min_\theta L"
    )
    assert row(r"x_{\max}") == f'<msub><mi>x</mi><mo lspace="0" {none}>max</mo></msub>'
    assert f"<mo {thin} {none}>exp</mo>" in row(r"2\exp\left(x\right)")
    with pytest.raises(ValueError, match="may align"):
        formula(r"\begin{aligned} a &= b \end{aligned}")


def test_equations_side_by_side_are_cut_where_a_short_line_may_break():
    line = r"a_{x \qquad y} = \begin{cases} 1 \qquad 2 \end{cases}, \qquad b = \left( c \right), \qquad d = 1 \tag{1.2}"
    said = statements(line.replace(r" \tag{1.2}", ""))
    assert said == [*said[:1], r"b = \left( c \right),", "d = 1"] and said[0].count("qquad") == 2
    page = equation(r"a = b, \qquad c = d \tag{1.2}")
    assert page.count("<math ") == 2 and page.count("(1.2)") == 1


def test_no_line_breaks_between_a_number_and_its_unit_or_in_an_interval():
    from tools.finish import joined

    said = joined('<p title="1 %">+12.9 % [+10.0, +15.8], 1.3 MB on 2026-11-27 at 3e-05; <code>1 %</code> in 1, 2</p>')
    assert "+12.9\xa0% [+10.0,\xa0+15.8], 1.3\xa0MB" in said
    assert '<span class="held">2026-11-27</span> at <span class="held">3e-05</span>' in said
    assert 'title="1 %"' in said and "<code>1 %</code> in 1, 2" in said


def test_below_a_folded_signature_stands_the_first_sentence_to_its_end():
    from tools.filter import outline

    body = [f"    x = {i}" for i in range(40)]
    lines = ["def f(x):", '    """One sentence', "    on two lines. Another.", "", "    More.", '    """', *body]
    assert outline(lines)[1:] == ['    """One sentence', '    on two lines."""', "    ..."]
