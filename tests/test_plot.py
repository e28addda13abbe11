"""Figures: what is drawn, that nothing overlaps, that alternative text is asked for."""
import itertools
import re

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.patches import FancyBboxPatch

from ftbook import plot


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-50, 50), min_size=0, max_size=8), st.floats(0.5, 5))
def test_spread_keeps_the_gap_and_the_order(positions, gap):
    moved = plot.spread(positions, gap)
    order = np.argsort(positions, kind="stable")
    assert (np.diff(moved[order]) >= gap - 1e-6).all()
    if len(positions) < 2:
        assert moved.tolist() == list(positions)


def test_curves_lines_bands_labels_and_scales():
    steps = np.arange(1.0, 6.0)
    ax = plot.curves({"a": steps, "b": (steps, steps - 1, steps + 1), "gap": [1, 2, np.nan, 4, np.nan]}, x=steps, xlabel="epoch",
                     ylabel="loss", logx=True, logy=True)
    assert len(ax.lines) == 3 and len(ax.collections) == 1 and ax.get_xscale() == ax.get_yscale() == "log"
    assert [t.get_text() for t in ax.texts] == ["a", "b", "gap"] and ax.get_xlabel() == "epoch"
    heights = sorted(t.get_window_extent().y0 for t in ax.texts)
    assert (np.diff(heights) > 8).all(), "labels at the line ends must not overlap"
    other = plot.curves({"one": [1, 2], "two": [1, 2, 3]}, x={"one": [1, 2], "two": [2, 4, 6]}, xlabel="x", ylabel="y", ax=ax)
    assert other is ax
    assert not plot.curves({"none": [np.nan, np.nan]}, xlabel="x", ylabel="y").texts


def test_curves_refuse():
    for series, x in (({"a": [[1, 2], [3, 4]]}, None), ({"a": []}, None), ({"a": ([1, 2], [1], [1, 2])}, None), ({"a": [1, 2]}, [1])):
        with pytest.raises(ValueError, match="series 'a'"):
            plot.curves(series, x, xlabel="x", ylabel="y")


def test_more_series_than_colors_differ_by_dash():
    ax = plot.curves({str(i): [i, i] for i in range(len(plot.palette) + 1)}, xlabel="x", ylabel="y")
    first, last = ax.lines[0], ax.lines[-1]
    assert first.get_color() == last.get_color() and first.get_linestyle() != last.get_linestyle()


@pytest.mark.parametrize("images", [np.zeros((3, 8, 8)), torch.zeros(3, 1, 8, 8), torch.zeros(3, 3, 8, 8, dtype=torch.uint8)])
def test_image_grid_forms(images):
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


def test_intervals_labels():
    rows = [dict(metric="acc", values=[0.8, 0.9], mean=0.85, interval=[0.7, 1.0], method="full", lr=0.1),
            dict(metric="acc", values=[0.5], mean=0.5, interval=[None, None])]
    ax = plot.intervals(rows)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["method full, lr 0.1", "acc"] and ax.get_xlabel() == "acc"
    assert [t.get_text() for t in plot.intervals(rows, label=lambda r: "x", show_values=False).get_yticklabels()] == ["x", "x"]
    assert plot.intervals([{**rows[0], "name": "n"}]).get_yticklabels()[0].get_text() == "n"
    with pytest.raises(ValueError, match="no rows"):
        plot.intervals([])


def test_heatmap_ink_contrasts_with_the_cell():
    ax = plot.heatmap([[0.0, 1.0], [np.nan, 0.5]], ["short", "a longer name"], ["a", "b"], xlabel="x", ylabel="y")
    inks = {t.get_text(): t.get_color() for t in ax.texts}
    assert inks["0.00"] == "white" and inks["1.00"] == plot.INK
    assert not plot.heatmap([[1]], ["a"], ["b"], fmt="").texts


def test_scatter_names_classes_at_their_centers():
    ax = plot.scatter2d(torch.tensor([[0.0, 0.0], [2.0, 2.0], [9.0, 9.0]]), torch.tensor([0, 0, 2]))
    assert [(t.get_text(), t.xy) for t in ax.texts] == [("0", (1.0, 1.0)), ("2", (9.0, 9.0))]


NODES = {c: f"node {c} with some text" for c in "abcdefgh"}
EDGES = [("a", "b"), ("a", "c", "label"), ("b", "d"), ("c", "d"), ("d", "e"), ("a", "e"), ("f", "b"), ("g", "h"), ("e", "a")]


def boxes(ax):
    return list(dict.fromkeys(tuple(np.round(p.get_extents().bounds, 1)) for p in ax.patches if isinstance(p, FancyBboxPatch)))


@pytest.mark.parametrize("direction", ["LR", "TB"])
@pytest.mark.parametrize("layers", [None, [["a", "f", "g"], ["b", "c", "h"], ["d"], ["e"]]])
def test_concept_map_draws_every_box_apart(direction, layers):
    ax = plot.concept_map(NODES, EDGES, direction=direction, layers=layers)
    found = boxes(ax)
    assert len(found) == len(NODES)
    for (x, y, w, h), (u, v, s, t) in itertools.combinations(found, 2):
        assert x + w <= u or u + s <= x or y + h <= v or v + t <= y, "boxes overlap"
    assert "label" in [t.get_text() for t in ax.texts]


def test_concept_map_inside_one_layer_and_errors():
    plot.concept_map({"a": "A", "b": "B"}, [("a", "b")], layers=[["a", "b"]])
    for nodes, edges, options, message in [({}, [], {}, "no nodes"), ({"a": "A"}, [("a", "a")], {}, "two different nodes"),
                                           ({"a": "A"}, [("a", "b")], {}, "does not have"),
                                           ({"a": "A"}, [], {"direction": "RL"}, "'LR' or 'TB'"),
                                           ({"a": "A"}, [], {"layers": [[]]}, "exactly once")]:
        with pytest.raises(ValueError, match=message):
            plot.concept_map(nodes, edges, **options)


def test_ordering_never_adds_crossings():
    order, edges = [["a", "b", "c"], ["x", "y", "z"]], [("a", "z"), ("b", "y"), ("c", "x")]
    assert plot.crossings(order, edges) == 3 and plot.crossings(plot.ordering(order, edges), edges) == 0


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


def test_widget_leaves_a_note(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    plot.widget(lambda rate: None, rate=(0.0, 1.0, 0.1))
    assert "`rate`" in shown[0].data and "application/vnd.jupyter.widget-view+json" in shown[1]._repr_mimebundle_()
    shown.clear()
    monkeypatch.setitem(__import__("sys").modules, "ipywidgets", None)
    plot.widget(lambda rate: None, rate=(0.0, 1.0, 0.1))
    assert len(shown) == 1


def test_text_size_grows():
    assert plot.text_size("a\nb")[1] > plot.text_size("ab")[1] and plot.text_size("")[0] > 0


def test_numbers_in_words_keep_their_decimals():
    ax = plot.curves({"lr 0.0001": [0.00123456, 2]}, xlabel="0.00025", ylabel="y")
    svg = plot.figure_bytes(ax.figure).decode()
    assert "lr 0.0001" in svg and "0.00025" in svg
    plt.close(ax.figure)
