"""Figures: what is drawn, that nothing overlaps, that alternative text is asked for."""

import base64
import json
import math
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from ftbook import plot
from tools.filter import LEGIBLE, WIDE, _texts
from tools.filter import PLAY as KEPT

ROOT = Path(__file__).resolve().parent.parent


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-50, 50), min_size=0, max_size=8), st.floats(0.5, 5))
def test_spread_keeps_the_gap_and_the_order(positions, gap):
    moved = plot.spread(positions, gap)
    order = np.argsort(positions, kind="stable")
    assert (np.diff(moved[order]) >= gap - 1e-6).all()
    if len(positions) and np.diff(np.sort(positions)).min(initial=np.inf) >= gap:
        np.testing.assert_allclose(moved, positions, atol=1e-9)
    if len(positions) < 2:
        assert moved.tolist() == list(positions)


def test_curves_lines_bands_labels_and_scales():
    steps = np.arange(1.0, 6.0)
    ax = plot.curves(
        {"a": steps, "b": (steps, steps - 1, steps + 1), "gap": [1, 2, np.nan, 4, np.nan]},
        x=steps,
        xlabel="epoch",
        ylabel="loss",
        logx=True,
        logy=True,
    )
    assert len(ax.lines) == 3 and len(ax.collections) == 1 and ax.get_xscale() == ax.get_yscale() == "log"
    assert [t.get_text() for t in ax.texts] == ["a", "b", "gap"] and ax.get_xlabel() == "epoch"
    heights = sorted(t.get_window_extent().y0 for t in ax.texts)
    assert (np.diff(heights) > 8).all(), "labels at the line ends must not overlap"
    other = plot.curves(
        {"one": [1, 2], "two": [1, 2, 3]}, x={"one": [1, 2], "two": [2, 4, 6]}, xlabel="x", ylabel="y", ax=ax
    )
    assert other is ax
    assert not plot.curves({"none": [np.nan, np.nan]}, xlabel="x", ylabel="y").texts


def test_curves_refuse():
    for series, x in (
        ({"a": [[1, 2], [3, 4]]}, None),
        ({"a": []}, None),
        ({"a": ([1, 2], [1], [1, 2])}, None),
        ({"a": [1, 2]}, [1]),
    ):
        with pytest.raises(ValueError, match="series 'a'"):
            plot.curves(series, x, xlabel="x", ylabel="y")


def test_more_series_than_colors_differ_by_dash():
    ax = plot.curves({str(i): [i, i] for i in range(len(plot.palette) + 1)}, xlabel="x", ylabel="y")
    first, last = ax.lines[0], ax.lines[-1]
    assert first.get_color() == last.get_color() and first.get_linestyle() != last.get_linestyle()


@pytest.mark.parametrize(
    "images", [np.zeros((3, 8, 8)), torch.zeros(3, 1, 8, 8), torch.zeros(3, 3, 8, 8, dtype=torch.uint8)]
)
def test_an_image_grid_takes_every_form_of_image(images):
    assert len(plot.image_grid(images, titles=["a", "b", "c\nd"], ncols=2).images) == 3


def test_image_grid_and_scatter_and_heatmap_refuse():
    with pytest.raises(ValueError, match="give one per image"):
        plot.image_grid(np.zeros((3, 8, 8)), titles=["a"])
    for shape in ((8, 8), (2, 4, 8, 8), (0, 8, 8)):
        with pytest.raises(ValueError, match="images has shape"):
            plot.image_grid(np.zeros(shape))
    with pytest.raises(ValueError, match=r"give \(N, 2\)"):
        plot.scatter2d([[1, 2, 3]], [0])
    with pytest.raises(ValueError, match="1 ylabels"):
        plot.heatmap([[1, 2]], ["a"], ["b"])


def test_intervals_are_labeled_by_what_differs():
    rows = [
        dict(metric="acc", values=[0.8, 0.9], mean=0.85, interval=[0.7, 1.0], method="full", lr=0.1),
        dict(metric="acc", values=[0.5], mean=0.5, interval=[None, None]),
    ]
    ax = plot.intervals(rows)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["method full, lr 0.1", "acc"] and ax.get_xlabel() == "acc"
    assert [t.get_text() for t in plot.intervals(rows, label=lambda r: "x", show_values=False).get_yticklabels()] == [
        "x",
        "x",
    ]
    assert plot.intervals([{**rows[0], "name": "n"}]).get_yticklabels()[0].get_text() == "n"
    with pytest.raises(ValueError, match="no rows"):
        plot.intervals([])


def test_labels_of_columns_turn_only_where_two_would_touch():
    def turned(names, fmt=".2f"):
        ax = plot.heatmap(np.zeros((2, len(names))), names, ["a", "b"], fmt)
        return {t.get_rotation() for t in ax.get_xticklabels()} == {45}

    assert not turned([str(k) if k % 8 == 0 else "" for k in range(40)], fmt="")
    assert not turned(["previous", "next"]) and turned([f"a longer name {k}" for k in range(6)])
    images = np.zeros((12, 8, 8))
    wide = plot.image_grid(images, titles=["twelve letters"] * 12, ncols=6).figure.get_size_inches()[0]
    first = plot.image_grid(images, titles=["twelve letters", "", ""] * 4, ncols=6).figure.get_size_inches()[0]
    assert wide > 6.5 and first == plot._WIDTH


def test_heatmap_ink_contrasts_with_the_cell():
    ax = plot.heatmap([[0.0, 1.0], [np.nan, 0.5]], ["short", "a longer name"], ["a", "b"], xlabel="x", ylabel="y")
    inks = {t.get_text(): t.get_color() for t in ax.texts}
    assert inks["0.00"] == "white" and inks["1.00"] == plot.INK
    assert set(inks) == {"0.00", "1.00", "0.50"}, "a cell without a number stays empty"
    assert not plot.heatmap([[1]], ["a"], ["b"], fmt="").texts


def test_scatter_names_classes_at_their_centers():
    ax = plot.scatter2d(torch.tensor([[0.0, 0.0], [2.0, 2.0], [9.0, 9.0]]), torch.tensor([0, 0, 2]))
    assert [(t.get_text(), t.xy) for t in ax.texts] == [("0", (1.0, 1.0)), ("2", (9.0, 9.0))]


def boxes(ax):
    return [p.get_bbox() for p in ax.patches if isinstance(p, FancyBboxPatch)]


def on_edge(box, point):
    """Whether a point lies on the edge of a box, to a hundredth of a point."""
    away = np.abs(point - box.get_points().mean(0)) - np.array(box.size) / 2
    return abs(away.max()) < 0.01


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=7, unique=True), st.data())
def test_arrows_run_from_the_edge_of_one_box_to_the_edge_of_the_other(places, data):
    names = [f"n{i}" for i in range(len(places))]
    nodes = {name: (f"box {name}\nof text", place) for name, place in zip(names, places, strict=True)}
    start, end = data.draw(st.permutations(names))[:2]
    bends = data.draw(st.lists(st.tuples(st.floats(5, 9), st.floats(-2, 6)), max_size=2))
    try:
        ax = plot.concept_map(nodes, [(start, end, "", bends)])
    except ValueError as error:
        assert "runs through box" in str(error)
        return
    (path,) = (p._path_original.vertices for p in ax.patches if isinstance(p, FancyArrowPatch))
    drawn = dict(zip(names, boxes(ax), strict=True))
    assert on_edge(drawn[start], path[0]) and on_edge(drawn[end], path[-1])
    assert len(path) == len(bends) + 2
    grid = np.array([120, -52])
    for name, place in zip(names, places, strict=True):
        np.testing.assert_allclose(drawn[name].get_points().mean(0), grid * place, atol=1e-9)
    plt.close(ax.figure)


def test_a_box_holds_its_text_and_a_data_unit_is_a_point():
    texts = {"a": "i", "b": "a wide line of text", "c": "three\nlines of\ntext", "d": ""}
    ax = plot.concept_map(
        {n: (t, (0, i)) for i, (n, t) in enumerate(texts.items())}, [("a", "b", "a label")], cell=(200, 90)
    )
    figure = ax.figure
    np.testing.assert_allclose(figure.get_size_inches() * 72, [np.ptp(ax.get_xlim()), np.ptp(ax.get_ylim())])
    figure.canvas.draw()
    for box, text in zip(boxes(ax), ax.texts, strict=False):
        written = text.get_window_extent().transformed(ax.transData.inverted())
        assert box.x0 <= written.x0 and written.x1 <= box.x1 and box.y0 <= written.y0 and written.y1 <= box.y1
    label = ax.texts[-1]
    assert label.get_text() == "a label" and boxes(ax)[0].y0 > label.get_position()[1] > boxes(ax)[1].y1


def test_a_label_stands_on_the_longest_part_of_its_arrow():
    nodes = {"a": ("A", (0, 0)), "b": ("B", (3, 1))}
    ax = plot.concept_map(nodes, [("a", "b", "way", [(0, 1)])], cell=(100, 50))
    x, y = ax.texts[-1].get_position()
    assert y == -50 and 100 < x < 200


LINE = {"a": ("A", (0, 0)), "b": ("B", (1, 0)), "c": ("C", (2, 0))}


@pytest.mark.parametrize(
    ("nodes", "edges", "options", "message"),
    [
        ({}, [], {}, "no nodes"),
        ({"a": "A"}, [], {}, r"node 'a' is 'A'; give \(text, \(column, row\)\)"),
        ({"a": ("A", 3)}, [], {}, r"give \(text, \(column, row\)\)"),
        ({"a": ("A", (1, 2, 3))}, [], {}, r"give \(text, \(column, row\)\)"),
        (LINE, [("a", "a")], {}, "two nodes that differ"),
        (LINE, [("a",)], {}, r"give \(from, to\)"),
        (LINE, [("a", "b", "", (), 1)], {}, r"or \(from, to, label, bends\)"),
        (LINE, [("a", "x"), ("b", "y")], {}, r"edges names \['x', 'y'\].*nodes has \['a', 'b', 'c'\]"),
        (LINE, [], {"colors": {"z": 1}}, r"colors names \['z'\]"),
        (
            {**LINE, "d": ("D", (0.1, 0)), "e": ("E", (2, 0.2))},
            [],
            {},
            "box 'a' overlaps box 'd'; box 'c' overlaps box 'e': move a box",
        ),
        (LINE, [("a", "c")], {}, "arrow 'a' to 'c' runs through box 'b': .*bend an arrow"),
        (LINE, [("a", "b", "a long label between")], {}, "box 'a' overlaps label 'a long label between'"),
        (LINE, [("a", "b", "", [(2, 0)])], {}, "arrow 'a' to 'b' runs through box 'c'"),
        (LINE, [("a", "b", "", [(0, 0)])], {}, "arrow 'a' to 'b' runs through box 'a'"),
        (LINE, [("a", "b", "", [(1.02, 0)])], {}, "arrow 'a' to 'b' runs through box 'b'"),
    ],
)
def test_a_map_that_cannot_be_read_is_refused_by_name(nodes, edges, options, message):
    open_figures = plt.get_fignums()
    with pytest.raises(ValueError, match=message):
        plot.concept_map(nodes, edges, **options)
    assert plt.get_fignums() == open_figures


def test_an_arrow_goes_around_a_box_by_its_bends():
    ax = plot.concept_map(LINE, [("a", "c", "", [(0, 1), (2, 1)])], colors={"c": 2})
    assert len(boxes(ax)) == 3
    last = [p for p in ax.patches if isinstance(p, FancyBboxPatch)][-1]
    assert mpl.colors.same_color(last.get_edgecolor(), plot.palette[2])


@pytest.mark.parametrize(
    ("notebook", "maps"), [("01_background", 4), ("06_mlm", 1), ("07_causal", 1), ("12_prompt", 1), ("A1_data", 1)]
)
def test_the_maps_of_the_book_are_legible_at_360_pixels(notebook, maps):
    cells = json.loads((ROOT / "nbs" / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    seen = []
    stub = SimpleNamespace(concept_map=plot.concept_map, show=lambda ax, **about: seen.append(ax))
    scope = {"plot": stub}
    for cell in cells:
        if cell["cell_type"] == "code" and "plot.concept_map(" in "".join(cell["source"]):
            exec("".join(cell["source"]), scope)
    assert len(seen) == maps
    for ax in seen:
        assert smallest(plot.figure_bytes(ax.figure).decode(), ax.figure.get_size_inches()[0] * 100) >= 9
        plt.close(ax.figure)


PHONE = 334  # what a page 360 pixels wide leaves to a figure; 2 less below controls, which have a frame


def smallest(svg: str, width: float, room: int = PHONE) -> float:
    """Height in pixels of the smallest text of a figure on a phone; `width` is what it has where there is room."""
    shown = min(width, room) if width <= WIDE else max(room, LEGIBLE * width)
    sizes = [float(size) for size in re.findall(r"font(?:-size)?:[^;\"]*?([\d.]+)px", svg)]
    unit = shown / float(re.search(r'viewBox="0 0 ([\d.]+) ', svg)[1])
    return round(min(sizes, default=math.inf) * unit, 1)


def drawings(notebook) -> list:
    """(cell, SVG, width, room) of the figures that a notebook shows and of those that its controls choose."""
    found = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        for data in (output.get("data", {}) for output in cell.get("outputs", [])):
            page = "".join(data.get("text/html", ""))
            if kept := re.search(r'width="(\d+)" src="data:image/svg\+xml;base64,([^"]+)"', page):
                found.append((cell["id"], base64.b64decode(kept[2]).decode(), int(kept[1]), PHONE))
            play = data.get(KEPT, {"parts": []})
            parts = [part for part in play["parts"] if "svg" in part]
            found += [(cell["id"], _texts(play, part["svg"]), part["width"], PHONE - 2) for part in parts]
    return found


def test_the_text_of_every_figure_has_nine_pixels_on_a_phone():
    """Where this fails, the named cells were drawn before the style changed: run the chapters."""
    small = {}
    for notebook in sorted((ROOT / "nbs").glob("[!.]*.ipynb")):
        for cell, *figure in drawings(notebook):
            if (height := smallest(*figure)) < 9:
                small.setdefault(notebook.stem, {})[cell] = height
    assert small == {}


def test_names_of_two_lines_keep_their_room():
    moved = plot.spread([0.0, 0.0, 0.0], gap=[28.0, 14.0, 14.0])
    assert np.diff(moved).tolist() == [21.0, 14.0]
    lines = {"validation, of 1,000 images": [1, 1], "two": [1, 1], "three": [1, 1]}
    ax = plot.curves(lines, xlabel="x", ylabel="y")
    ax.figure.canvas.draw()
    one, two, three = (t.get_window_extent() for t in ax.texts)
    assert ax.texts[0].get_text() == "validation,\nof 1,000 images"
    assert not one.overlaps(two) and not two.overlaps(three)
    rows = [dict(metric="acc", values=[0.5], mean=0.5, interval=[None, None], name=name) for name in lines]
    assert plot.intervals(rows).get_yticklabels()[0].get_text() == ax.texts[0].get_text()


@pytest.mark.parametrize(
    "low, high, names",
    [(0.015, 0.7, "0.02 0.05 0.1 0.2 0.5"), (1e-3, 10, "0.001 0.01 0.1 1 10"), (1e-5, 10, "1e-05 0.001 0.1 10")],
)
def test_a_logarithmic_axis_says_plain_numbers_that_do_not_touch(low, high, names):
    ax = plot.curves({"a": [1, 2]}, x=[low, high], xlabel="x", ylabel="y", logx=True)
    ax.figure.canvas.draw()
    seen = [t for t in ax.get_xticklabels() if t.get_text() and low <= t.get_position()[0] * 1.001 <= high * 1.01]
    assert " ".join(t.get_text() for t in seen) == names
    boxes = [t.get_window_extent() for t in seen]
    assert all(a.x1 + 3 < b.x0 for a, b in pairwise(boxes))


def test_style_is_used_inside_and_left_alone_outside():
    before = dict(mpl.rcParams)
    ax = plot.curves({"a": [1, 2]}, xlabel="x", ylabel="y")
    assert mpl.colors.to_hex(ax.figure.get_facecolor()).upper() == plot.CARD.upper()
    assert dict(mpl.rcParams) == before
    with mpl.rc_context():
        plot.use_style()
        assert mpl.rcParams["svg.hashsalt"] == "ftbook"


def test_show_asks_for_alt_and_displays_once(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    ax = plot.curves({"a": [1, 2]}, xlabel="x", ylabel="y")
    assert plot.show(ax, alt="A line that <rises>.", caption="Takeaway.") is None
    picture, caption = shown
    data, metadata = picture._repr_mimebundle_()
    assert 'alt="A line that &lt;rises&gt;."' in data["text/html"] and metadata["ftbook"]["caption"] == "Takeaway."
    assert caption.data == "*Takeaway.*" and not plt.fignum_exists(ax.figure.number)
    plot.show(plot.image_grid(np.zeros((1, 4, 4))).figure, alt="A black square.", format="png")
    assert "image/png" in shown[-1]._repr_mimebundle_()[0]["text/html"]
    for wrong in ({"alt": "short"}, {"alt": None}, {"alt": "long enough text", "format": "gif"}):
        with pytest.raises(ValueError):
            plot.show(ax, **wrong)


def test_equal_figures_are_equal_files():
    files = [plot.figure_bytes(plot.curves({"a": [1, 2]}, xlabel="x", ylabel="y").figure) for _ in range(2)]
    assert files[0] == files[1] and not re.search(rb"\d{4}-\d\d-\d\dT", files[0])


WIDGET_7 = """
import sys, types
from ipywidgets import widgets
ipywidgets = sys.modules["ipywidgets"]
del ipywidgets.Widget._repr_mimebundle_  # what 7.7 does not have
"""
PLAY = """
from ftbook import plot
from tools.filter import LEGIBLE, WIDE, _texts
from tools.filter import PLAY as KEPT
def draw(rate=0.5, kind="a"):
    if kind == "b":
        raise ValueError("no b here")
    print("rate", rate)
    plot.show(plot.curves({"a": [0, rate]}, xlabel="x", ylabel="y"), alt=f"A line that ends at {rate}.", caption="Up.")
plot.widget(draw, rate=(0.0, 1.0, 0.25), kind=["a", "b"])
"""
MOVE = """
import gc, ipywidgets
[control] = [w for w in gc.get_objects() if isinstance(w, ipywidgets.{kind})]
control.value = {value}
"""


def played(*cells) -> list:
    """The outputs of a notebook, one list per cell, after all cells ran in a kernel."""
    import nbformat
    from nbclient import NotebookClient

    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nb.metadata["kernelspec"] = {"display_name": "python3", "language": "python", "name": "python3"}
    NotebookClient(nb, timeout=120, extra_arguments=["--IPKernelApp.log_level=40"]).execute()
    return [cell.outputs for cell in nb.cells]


VIEW = "application/vnd.jupyter.widget-view+json"


@pytest.mark.slow
@pytest.mark.parametrize("version", ["", WIDGET_7], ids=["ipywidgets 8", "ipywidgets 7"])
def test_a_saved_notebook_keeps_the_last_picture_of_a_widget(version):
    note, controls, text, picture, caption = played(version + PLAY, MOVE.format(kind="FloatSlider", value=0.75))[0]
    assert note["data"]["text/markdown"].startswith("**Play:**") and "`rate`, `kind`" in note["data"]["text/markdown"]
    assert controls["data"][VIEW]["model_id"] and text["data"]["text/plain"] == "rate 0.75"
    assert 'alt="A line that ends at 0.75."' in picture["data"]["text/html"]
    assert picture["metadata"]["ftbook"]["caption"] == "Up." and caption["data"]["text/markdown"] == "*Up.*"


@pytest.mark.slow
def test_an_error_of_a_moved_widget_stands_where_its_picture_was():
    first, second = played("import ipywidgets" + PLAY, MOVE.format(kind="Dropdown", value="'b'"))
    texts = [o["data"].get("text/plain") for o in first[2:]]
    assert (
        texts == ["ValueError: no b here", "", ""] and not any("text/html" in o["data"] for o in first) and not second
    )


def test_without_a_notebook_a_widget_is_what_ipywidgets_makes_of_it(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda what, **raw: shown.append(what))
    plot.widget(lambda rate: None, rate=(0.0, 1.0, 0.1))
    assert "`rate`" in shown[0]["text/markdown"] and VIEW in shown[1]._repr_mimebundle_()
    shown.clear()
    monkeypatch.setitem(__import__("sys").modules, "ipywidgets", None)
    plot.widget(lambda rate: None, rate=(0.0, 1.0, 0.1))
    assert len(shown) == 1


FRAMES = """
import os, random
os.environ["FTBOOK_FRAMES"] = "1"
import numpy as np
random.seed(1); np.random.seed(1)
"""
SEEDED = """
    random.seed(rate); np.random.seed(int(100 * rate))
"""


@pytest.mark.slow
def test_a_run_for_the_page_keeps_a_drawing_for_each_value():
    body = PLAY.replace('raise ValueError("no b here")', "kind = 'c'").replace("\n    print", SEEDED + "    print")
    first, second = played(FRAMES + body, "random.random(), np.random.random()")
    kept = first[0]["data"][plot._PLAY]
    assert [(c["name"], c["values"], c["start"], c["slider"]) for c in kept["controls"]] == [
        ("rate", ["0", "0.25", "0.5", "0.75", "1"], 2, True),
        ("kind", ["a", "b"], 0, False),
    ]
    assert len(kept["frames"]) == 10 and kept["frames"][0] == kept["frames"][1]  # a and b draw the same
    shown = [[kept["parts"][int(i)] for i in frame.split()] for frame in kept["frames"]]
    assert all(sorted(part[0]) == ["text"] and {"svg", "alt", "caption", "width"} <= set(part[1]) for part in shown)

    def text(ranges):
        ends = [list(map(int, r.split("-"))) for r in ranges.split()]
        return "\n".join("\n".join(kept["lines"][e[0] : e[-1] + 1]) for e in ends)

    picture = next(o for o in first if "alt" in o["metadata"].get("ftbook", {}))
    assert text(shown[4][0]["text"]) == "rate 0.5"
    svg = base64.b64encode(text(shown[4][1]["svg"]).encode()).decode()
    assert svg in picture["data"]["text/html"], "the frame at the start is the picture that stays"
    assert len(kept["lines"]) < 2.5 * text(shown[4][1]["svg"]).count("\n"), "what pictures share is kept once"
    drawn = FRAMES.replace('os.environ["FTBOOK_FRAMES"] = "1"', "") + body
    assert second[0]["data"] == played(drawn, "random.random(), np.random.random()")[1][0]["data"]


def test_what_a_slider_offers_is_thinned_and_menus_are_not():
    offered = {"a": [(str(k), k) for k in range(101)], "b": [("x", "x"), ("y", "y")]}
    kept = plot._thinned(offered, {"a": 33, "b": 1}, {"a"})
    assert len(kept["a"]) == 24 and {0, 33, 100} <= set(kept["a"]) and kept["b"] == [0, 1]
    with pytest.raises(ValueError, match="frames="):
        plot._thinned({"b": [("x", k) for k in range(60)]}, {"b": 0}, set())


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_a_photo_is_kept_as_small_as_the_page_shows_it(kind):
    noise, smooth = np.random.default_rng(0).random((16, 16)), np.add.outer(np.arange(200), np.arange(200)) / 400
    figure = plot.image_grid((noise if kind == "png" else smooth)[None, None]).figure
    png = plot.figure_bytes(figure, "png")
    store = plot._Frames()
    store.add([plot._Picture(png, "A square.", None, "png", 320)._repr_mimebundle_()])
    (part,) = map(json.loads, store.parts)
    assert part["width"] == 320 and part["image"].startswith(f"data:image/{kind};base64,")
    assert len(part["image"]) <= len(base64.b64encode(png)) + 40
    plt.close(figure)


def test_values_of_an_unknown_control_are_refused():
    with pytest.raises(ValueError, match=r"\['rat'\]; the controls are \['rate'\]"):
        plot.widget(lambda rate: None, rate=(0.0, 1.0, 0.1), frames={"rat": [1]})


def test_numbers_in_words_keep_their_decimals():
    ax = plot.curves({"lr 0.0001": [0.00123456, 2]}, xlabel="0.00025", ylabel="y")
    svg = plot.figure_bytes(ax.figure).decode()
    assert "lr 0.0001" in svg and "0.00025" in svg
    plt.close(ax.figure)
