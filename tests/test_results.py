"""Rows, intervals, stored numbers, sentences made from them, sweeps, studies."""

import copy
import errno
import itertools
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ftbook import results, runtime


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path))
    monkeypatch.setenv("FTBOOK_PROFILE", "cpu")
    monkeypatch.setattr(results, "_stand_ins", {})
    monkeypatch.setattr(results, "_unsaved", {})
    return tmp_path


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_interval_equals_scipy(values, level):
    mean, low, high = results._mean_interval(values, level)
    error = stats.sem(values)
    expected = stats.t.interval(level, len(values) - 1, np.mean(values), error) if error > 0 else (mean, mean)
    assert np.allclose([mean, low, high], [np.mean(values), *expected], rtol=1e-9, atol=1e-9)


def test_an_interval_of_one_value_is_no_number_and_of_none_an_error():
    assert np.isnan(results._mean_interval([1.0])[1])
    with pytest.raises(ValueError):
        results._mean_interval([])
    with pytest.raises(ValueError):
        results._mean_interval([1, 2], level=1.5)


def test_prediction_interval_covers_a_new_run_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = [results.row("x", v[:-1]).agrees(v[-1]) for v in rng.normal(size=(2000, 6))]
    assert 0.93 < np.mean(hits) < 0.97
    once = results.row("x", [1.0])
    assert once.agrees(1.05, tolerance=0.1) and not once.agrees(1.2, tolerance=0.1)
    with pytest.raises(ValueError, match="tolerance"):
        once.agrees(1.0)


def test_row_formats_and_refuses():
    row = results.row("accuracy", [0.86, 0.87, 0.88], n=100, budget="1 epoch", method="lora", seeds=[0, 1, 2])
    assert f"{row:.1%}" == "87.0 % [84.5, 89.5]" and f"{row:.3f}" == "0.870 [0.845, 0.895]"
    assert row.varied == {"method": "lora"} and row.low < row.mean < row.high
    assert f"{results.row('accuracy', [0.5]):.0%}" == "50 % (one run)"
    with pytest.raises(ValueError, match="one seed per value"):
        results.row("a", [1, 2], seeds=[0])
    with pytest.raises(ValueError, match="name what was varied"):
        results.Row(results.row("a", [1], **{"interval": 3}))


def test_difference_pairs_by_seed():
    a = results.row("f1", [0.9, 0.8, 0.7], seeds=[2, 1, 0])
    b = results.row("f1", [0.6, 0.7, 0.8], seeds=[0, 1, 2])
    assert np.allclose(results.difference(a, b)["values"], [0.1, 0.1, 0.1])
    with pytest.raises(ValueError, match="needs the same"):
        results.difference(a, results.row("f1", [1, 2, 3], seeds=[0, 1, 3]))
    with pytest.raises(ValueError, match="same seeds"):
        results.difference([1, 2], [1])


def test_json_is_rounded_and_strict():
    value = {"a": 1 / 3, "b": float("inf"), "c": np.float32(0.5), "d": [True, None, "x", np.int64(3)]}
    assert results._to_json(value) == {"a": 0.333333, "b": None, "c": 0.5, "d": [True, None, "x", 3]}
    with pytest.raises(TypeError):
        results._to_json({"a": object()})


def test_record_and_load_keep_value_source_and_provenance(folder):
    row = results.record("05_demo", "acc", results.row("accuracy", [0.1, 0.2], n=3))
    again = results.load("05_demo", "acc")
    assert again == row and again.source == {"chapter": "05_demo", "key": "acc", "profile": "cpu"}
    stored = json.loads((folder / "05_demo.json").read_text())["cpu"]["acc"]
    assert set(stored) == {"value", "provenance"} and stored["provenance"]["profile"] == "cpu"
    before = (folder / "05_demo.json").read_bytes()
    results.record("05_demo", "acc", row)
    assert (folder / "05_demo.json").read_bytes() == before, "the same value changes no line"
    results.record("05_demo", "list", [row, row], seconds=1.23456)
    assert results.load("05_demo", "list")[1].source["path"] == [1]


def test_load_prefers_the_active_profile_and_falls_back_to_cpu(monkeypatch):
    results.record("05_demo", "x", 1.0)
    monkeypatch.setenv("FTBOOK_PROFILE", "quick")
    assert results.load("05_demo", "x") == 1.0
    results.record("05_demo", "x", 2.0)
    assert results.load("05_demo", "x") == 2.0 and results.load("05_demo", "x", profile="cpu") == 1.0
    with pytest.raises(KeyError, match="no stored result 'y'. Stored under quick: x; cpu: x"):
        results.load("05_demo", "y")
    with pytest.raises(KeyError, match="gpu: nothing"):
        results.load("05_demo", "x", profile="gpu")


def test_results_go_to_the_folder_of_the_project(monkeypatch, tmp_path):
    monkeypatch.delenv("FTBOOK_RESULTS")
    (tmp_path / "nbs" / "deep").mkdir(parents=True)
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    monkeypatch.chdir(tmp_path / "nbs" / "deep")
    assert results._checkout() == tmp_path and results._results_dir() == tmp_path / "results"
    assert results._results_dir("quick") != tmp_path / "results"
    monkeypatch.chdir("/")
    assert results._checkout() is None


def test_broken_file_and_bad_names_are_explained(folder):
    (folder / "05_demo.json").write_text("{")
    with pytest.raises(ValueError, match="no valid JSON"):
        results.load("05_demo", "x")
    with pytest.raises(ValueError, match="without folder or suffix"):
        results.record("nbs/05.ipynb", "x", 1)


def write_many(worker, folder):
    import os

    os.environ |= {"FTBOOK_RESULTS": str(folder), "FTBOOK_PROFILE": "cpu"}
    for i in range(10):
        results.record("05_demo", f"{worker}.{i}", i)


def test_two_processes_lose_nothing(folder):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=write_many, args=(w, folder)) for w in range(2)]
    [w.start() for w in workers]
    [w.join() for w in workers]
    assert len(json.loads((folder / "05_demo.json").read_text())["cpu"]) == 20


def test_say_renders_again_from_the_file():
    row = results.record("05_demo", "acc", results.row("accuracy", [0.86, 0.87, 0.88]))
    results.record("05_demo", "many", {"a": [0.25]})
    said = results.say(
        "{acc:.1%}, {r.mean:.2f}, {n} runs, {x:.0%}, {{}}",
        acc=row,
        r=("05_demo", "acc"),
        n=3,
        x=results.load("05_demo", "many")["a"][0],
    )
    assert str(said) == repr(said) == "87.0 % [84.5, 89.5], 0.87, 3 runs, 25 %, {}"
    data, metadata = said._repr_mimebundle_()
    assert data["text/markdown"] == str(results.Markdown(metadata["ftbook"]))
    results.record("05_demo", "acc", results.row("accuracy", [0.5, 0.6, 0.7]))
    assert str(results.Markdown(metadata["ftbook"])).startswith("60.0 %"), "a changed result shows"


def test_table_merges_metrics_and_escapes():
    rows = [
        results.row("accuracy", [0.8, 0.9], n=1000, method="a|b"),
        results.row("seconds", [1.0, 2.0], n=1000, method="a|b"),
        results.row("accuracy", [0.7, 0.8], method="c"),
    ]
    text = str(results.table(rows, caption="Takeaway."))
    assert r"a\|b" in text and text.count("\n| ") == 3 and "*Takeaway.*" in text and "| –" in text
    assert "| Method | n |" in str(results.table(rows[:1], columns={"method": "Method", "n": "n"}))
    assert "0.500" in str(results.table([{"x": 0.5}], fmt=".3f"))
    with pytest.raises(ValueError, match="no row has a column"):
        results.table(rows, columns=["nothing"])
    with pytest.raises(ValueError, match="at least one"):
        results.table([])


def test_a_format_for_the_metrics_leaves_the_digits_of_a_small_learning_rate():
    small = results.row("loss", [0.51234, 0.6], lr=2e-5) | {"p": 0.00001234}
    shown = str(results.table([results.Row(small)], ["lr", "loss", "p"], fmt=".3f")).split("\n")[2]
    assert shown.startswith("| 2e-05 | 0.556 [") and shown.endswith("| 1.234e-05 |")
    assert "| 0.00002 |" in str(results.table([results.Row(small)], fmt={"lr": ".5f"})), "a dict names it"


def test_a_plain_row_shows_its_own_columns_whatever_a_study_calls_its_own():
    shown = str(results.table([{"name": "a", "verdict": "holds", "n": 3}]))
    assert "verdict" in shown and "holds" in shown and "| n |" not in shown


def test_call_payload_only_calls_public_functions():
    with pytest.raises(ValueError, match="no public function"):
        str(results.Markdown({"call": {"function": "os.system", "arguments": {"command": "true"}}}))
    payload = {"call": {"function": "ftbook.data.status_text", "arguments": {"chapter": "99_none"}}}
    assert str(results.Markdown(payload)) == "not run yet"


@pytest.mark.parametrize(
    "function",
    [
        "ftbook.peft.save_file",
        "ftbook.results.record",
        "ftbook.data.load",
        "ftbook.data",
        "ftbook.data._in_cache",
        "ftbook.runtime.os.system",
        ".status_text",
        "",
    ],
)
def test_render_calls_nothing_but_what_is_made_for_it(function, folder):
    with pytest.raises(ValueError, match="no public function of ftbook that gives a page's text"):
        str(
            results.Markdown(
                {"call": {"function": function, "arguments": {"chapter": "05_demo", "key": "x", "value": 1}}}
            )
        )
    assert list(folder.iterdir()) == []


def test_a_template_reaches_no_private_attribute():
    for field in ("x.__class__", "x.__class__.__init__.__globals__", "x:{x.__class__}"):
        with pytest.raises(ValueError, match="names that begin with _"):
            results.say("{" + field + "}", x=1)


HTML = [
    "<script>alert(1)</script>",
    "a <b>bold</b> word",
    "x < y",
    "<!-- gone -->",
    "`code` <i>",
    "\\`<b>`",
    "`a\n<b>`",
    "x ` y\n`<b>`",
    "```<b>`x`",
    "&lt;b>",
    "<http://a b><b>",
    "a` <b> `b",
    "\\\\`a`<b>`",
]


def shown(text):
    """The HTML that a reader's CommonMark renderer makes of a text."""
    return pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"html": True}).enable("table").render(text)


@pytest.mark.parametrize("text", HTML)
def test_html_in_a_value_is_shown_and_not_obeyed_in_sentences_tables_and_captions(text):
    for made in (
        results.say("value: {x}", x=text),
        results.say("`{x}`", x=text),
        results.table([{"a": text}]),
        results.table([{text: 1}]),
        results.table([{"a": 1}], caption=text),
    ):
        html = shown(str(made))
        assert not [tag for tag in ("<script", "<b>", "<i>", "<!--") if tag in html], html
    assert "x &lt; y" in shown(str(results.say("{x}", x="x < y")))
    assert "<code>a < b" not in shown(str(results.say("{x}", x="`a < b`"))) and "`a < b`" in str(
        results.say("{x}", x="`a < b`")
    )
    assert str(results.say("see <https://example.org/a>")) == "see <https://example.org/a>"


@settings(deadline=None, max_examples=200)
@given(st.text("`\\<b>&; |\n", max_size=14), st.sampled_from(["{x}", "`{x}`", "a `b` {x}", "{x} `"]))
def test_no_text_brings_html_onto_a_page(text, template):
    assert "<b>" not in shown(str(results.say(template, x=text)))
    assert "<b>" not in shown(str(results.table([{"a": text, "b": 1}])))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.text("ab|\\`\n\r ", min_size=1, max_size=8), min_size=1, max_size=3, unique=True))
def test_every_heading_and_cell_stays_one_cell(texts):
    names = [t + str(i) for i, t in enumerate(texts)]
    table = str(results.table([dict(zip(names, texts, strict=True))] * 2))
    assert len(table.split("\n")) == 4
    html = shown(table)
    assert html.count("<th") - html.count("<thead") == len(texts) and html.count("<td") == 2 * len(texts)


def test_a_heading_given_for_a_column_is_escaped_too():
    table = str(results.table([{"x": 1}], columns={"x": "two\nlines | a bar"}))
    assert table.startswith("| two lines \\| a bar |\n| ---: |\n")


# ---------------------------------------------------------------- what is stored

TEXT = st.text(st.characters(blacklist_categories=["Cs"]), max_size=30)
VALUES = st.recursive(
    TEXT | st.integers(-(10**20), 10**20) | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, max_examples=150)
@given(VALUES)
def test_text_and_structure_survive_exactly(value):
    text = results._text({"k": value})
    assert json.loads(text) == {"k": value}
    assert json.loads(json.dumps({"k": value})) == json.loads(text)


@pytest.mark.parametrize(
    "value", ["a [ b ] c", "[ 1, 2 ]", "[\n 1\n]", 'say "[ x ]"', "\ud800 half", ["[ a ]", ["b ] [ c"]], "a  b"]
)
def test_text_with_brackets_comes_back_as_it_was(value):
    results.record("05_demo", "k", value)
    assert results.load("05_demo", "k") == value


def test_the_layout_of_the_committed_files_is_kept(root):
    for file in sorted((root / "results").glob("*.json")):
        text = file.read_text(encoding="utf-8")
        assert results._text(json.loads(text)) + "\n" == text, f"{file.name} would change without a new number"


def test_keys_that_are_one_as_text_are_refused():
    with pytest.raises(ValueError, match="one as text, such as 1 and '1'"):
        results.record("05_demo", "k", {1: "a", "1": "b"})


def test_a_stored_value_is_copied_and_sent_as_a_plain_one():
    value = results.record("05_demo", "k", {"lr": 0.1, "n": 3, "names": ["a"]})
    for plain in (pickle.loads(pickle.dumps(value)), copy.deepcopy(value)):
        assert plain == value and type(plain) is dict and type(plain["lr"]) is float
    assert value["names"][0].source["path"] == ["names", 0] and isinstance(value["n"], int) and value["lr"] + 1 == 1.1


def test_what_a_row_was_varied_in_is_exact_and_what_was_measured_is_rounded():
    row = results.record("05_demo", "r", results.row("loss", [1 / 3, 2 / 3], lr=1 / 3))
    assert row["lr"] == 1 / 3 and results.load("05_demo", "r")["lr"] == 1 / 3 and row["values"] == [0.333333, 0.666667]


# ---------------------------------------------------------------- the lock, the disk, what killed writers leave


def write_with_own_temporary_folder(worker, folder, temporary):
    os.environ |= {"FTBOOK_RESULTS": str(folder), "FTBOOK_PROFILE": "cpu", "TMPDIR": str(temporary)}
    tempfile.tempdir = None
    for i in range(30):
        results.record("05_demo", f"{worker}.{i}", i)


def test_processes_with_different_temporary_folders_lose_nothing_and_leave_no_lock(folder):
    context = multiprocessing.get_context("fork")
    workers = []
    for w in range(4):
        (folder / f"tmp{w}").mkdir()
        workers.append(context.Process(target=write_with_own_temporary_folder, args=(w, folder, folder / f"tmp{w}")))
    [w.start() for w in workers]
    [w.join() for w in workers]
    assert len(json.loads((folder / "05_demo.json").read_text())["cpu"]) == 120
    assert sorted(f.name for f in folder.iterdir()) == ["05_demo.json", "tmp0", "tmp1", "tmp2", "tmp3"]


def test_threads_lose_nothing(folder):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: results.record("05_demo", f"k{i}", i), range(40)))
    assert len(json.loads((folder / "05_demo.json").read_text())["cpu"]) == 40 and len(list(folder.iterdir())) == 1


def test_the_lock_is_ignored_by_git(root):
    check = subprocess.run(["git", "check-ignore", "results/.05_demo.json.lock"], cwd=root, capture_output=True)
    assert check.returncode == 0 or not (root / ".git").exists()


def die_while_writing(folder):
    @contextmanager
    def cut(path, write=runtime.atomic_write):
        with write(path) as temporary:
            temporary.write_text("half")
            os._exit(1)
        yield

    os.environ |= {"FTBOOK_RESULTS": str(folder), "FTBOOK_PROFILE": "cpu"}
    runtime.atomic_write = cut
    results.record("05_demo", "k", 1)


def test_what_a_killed_writer_leaves_is_removed_by_the_next_and_others_files_stay(folder):
    for name in ("05_demo", "05_demo_b"):
        (folder / f".{name}.4-beef.json").write_text("live" if name.endswith("b") else "half")
    (folder / ".05_demo.notes.json").write_text("a reader's")
    process = multiprocessing.get_context("fork").Process(target=die_while_writing, args=(folder,))
    process.start()
    process.join()
    assert process.exitcode == 1
    results.record("05_demo", "k", 2)
    assert results.load("05_demo", "k") == 2
    assert sorted(f.name for f in folder.iterdir()) == [".05_demo.notes.json", ".05_demo_b.4-beef.json", "05_demo.json"]


def full_disk(monkeypatch, after=0):
    """The disk is full from some write on; returns a function that makes room."""
    left = itertools.count()

    @contextmanager
    def write(path, real=runtime.atomic_write):
        if next(left) >= after:
            raise OSError(errno.ENOSPC, "No space left on device")
        with real(path) as temporary:
            yield temporary

    patch = pytest.MonkeyPatch()
    patch.setattr(runtime, "atomic_write", write)
    return patch.undo


def test_a_value_that_cannot_be_written_is_kept_and_written_with_the_next(monkeypatch):
    make_room = full_disk(monkeypatch)
    with pytest.raises(OSError, match="No space left.*kept in memory, 1 value"):
        results.record("05_demo", "a", 1)
    with pytest.raises(OSError, match="2 value"):
        results.record("05_demo", "b", 2)
    make_room()
    results.record("05_demo", "c", 3)
    assert [results.load("05_demo", k) for k in "abc"] == [1, 2, 3]


def test_what_many_threads_could_not_write_at_once_is_written_with_the_next(monkeypatch):
    def store(i):
        with pytest.raises(OSError, match="kept in memory"):
            results.record("05_demo", f"k{i}", i)

    make_room = full_disk(monkeypatch)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(store, range(20)))
    make_room()
    results.record("05_demo", "last", 20)
    assert [results.load("05_demo", f"k{i}") for i in range(20)] == list(range(20))


def test_a_value_outlives_a_broken_file(folder):
    (folder / "05_demo.json").write_text("{")
    with pytest.raises(ValueError, match="no valid JSON"):
        results.record("05_demo", "a", 1)
    (folder / "05_demo.json").unlink()
    results.record("05_demo", "b", 2)
    assert [results.load("05_demo", k) for k in "ab"] == [1, 2]


def test_a_full_disk_stops_a_sweep_at_once_and_loses_no_run(monkeypatch):
    calls = []

    def run(seed, lr):
        calls.append(lr)
        return {"loss": lr}

    choices, where = {"lr": [float(i) for i in range(1, 21)]}, {"chapter": "05_demo", "name": "s", "progress": False}
    make_room = full_disk(monkeypatch, after=3)
    with pytest.raises(OSError, match="kept in memory"):
        results.sweep(run, choices, [0], **where)
    assert len(calls) == 4, "no run after the one that could not be stored"
    make_room()
    assert len(results.sweep(run, choices, [0], **where).rows) == 20
    assert sorted(calls) == choices["lr"], "every run once"


def test_a_run_that_meets_a_full_disk_stops_the_sweep_too():
    def run(seed, lr):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        results.sweep(run, {"lr": [1, 2]}, [0], chapter="05_demo", name="s", progress=False)


# ---------------------------------------------------------------- data that stand in for others


def test_numbers_of_substituted_data_are_not_stored_under_the_real_name(folder, monkeypatch):
    results.record("10_demo", "known", {"names": 13204})
    before = (folder / "10_demo.json").read_bytes()
    results.substituted("wnut17", "no network; get it from https://example.org")
    for store in (
        lambda: results.record("10_demo", "known", {"names": 91}),
        lambda: results.sweep(noisy, {"lr": [0.1], "method": ["full"]}, [0], chapter="10_demo", name="s"),
        lambda: compare([{"method": "a", "lr": 0.1}]),
    ):
        with pytest.raises(
            RuntimeError, match="stands in for wnut17 .*https://example.org.*FTBOOK_PROFILE=quick.*substitute="
        ):
            store()
    assert (folder / "10_demo.json").read_bytes() == before and list(folder.iterdir()) == [folder / "10_demo.json"]
    assert list(results.substituted()) == ["wnut17"]
    monkeypatch.setenv("FTBOOK_PROFILE", "quick")
    assert results.record("10_demo", "known", {"names": 91})["names"] == 91
    assert json.loads((folder / "10_demo.json").read_text())["cpu"]["known"]["value"] == {"names": 13204}


@pytest.mark.parametrize("bundled", [True, False])
def test_a_chapter_without_a_network_does_not_overwrite_measured_numbers(folder, cache, monkeypatch, bundled):
    data = pytest.importorskip("ftbook.data")
    monkeypatch.setenv("FTBOOK_OFFLINE", "1")
    results.record("10_demo", "known", 13204)
    if not bundled:
        with pytest.raises(FileNotFoundError):
            data.load("wnut17", "train")
        assert results.substituted() == {} and results.record("10_demo", "known", 13204) == 13204
        return
    data.load("wnut17", "train", bundled=True)
    with pytest.raises(RuntimeError, match="wnut17"):
        results.record("10_demo", "known", 91)
    assert results.load("10_demo", "known") == 13204
    monkeypatch.setenv("FTBOOK_PROFILE", "quick")
    results._stand_ins.clear()
    data.load("digits"), data.load("fashion_mnist", bundled=True)
    assert list(results.substituted()) == ["fashion_mnist"], "what was asked for is no substitute"


def test_a_value_made_with_a_named_substitute_does_not_replace_a_measured_one(folder):
    results.record("10_demo", "known", 13204)
    before = (folder / "10_demo.json").read_bytes()
    results.substituted("wnut17")
    with pytest.raises(ValueError, match="'known' of 10_demo was measured, .*'bundled corpus'; give it another key"):
        results.record("10_demo", "known", 91, substitute="bundled corpus")
    assert (folder / "10_demo.json").read_bytes() == before
    results.record("10_demo", "known.bundled", 91, substitute="bundled corpus")
    results.record("10_demo", "known.bundled", 92, substitute="another corpus")
    results._stand_ins.clear()
    results.record("10_demo", "known.bundled", 13204)  # measured at last
    assert [results.load("10_demo", k) for k in ("known", "known.bundled")] == [13204, 13204]


def test_a_substitute_that_is_named_is_stored_and_stands_in_the_provenance(folder):
    results.substituted("wnut17")
    results.record("10_demo", "known", 91, substitute="bundled corpus")
    where = {"chapter": "10_demo", "name": "s", "progress": False}
    results.sweep(noisy, {"lr": [0.1], "method": ["full"]}, [0], substitute="bundled corpus", **where)
    compare([{"method": "a", "lr": 0.1}], substitute="bundled corpus")
    stored = json.loads((folder / "10_demo.json").read_text())["cpu"]
    assert stored["known"]["provenance"]["substitute"] == "bundled corpus"
    assert stored["s"]["provenance"][0]["substitute"] == stored["s"]["value"]["substitute"] == "bundled corpus"
    for other in ("another corpus", None):
        results._stand_ins.clear()
        with pytest.raises(ValueError, match="has substitute 'bundled corpus', this one"):
            results.sweep(noisy, {"lr": [0.1], "method": ["full"]}, [1], substitute=other, **where)
        with pytest.raises(ValueError, match="has substitute 'bundled corpus', this one"):
            compare([{"method": "a", "lr": 0.1}], substitute=other)


def loads_a_substitute(seed, lr):
    results.substituted("wnut17", "in the run")
    return {"loss": lr}


def test_data_substituted_within_a_run_are_noticed_before_the_run_is_stored(folder):
    with pytest.raises(RuntimeError, match="wnut17: in the run"):
        results.sweep(loads_a_substitute, {"lr": [1, 2]}, [0], chapter="10_demo", name="s", progress=False)
    assert list(folder.iterdir()) == []


# ---------------------------------------------------------------- sweeps


def noisy(seed, lr, method):
    if method == "broken":
        raise RuntimeError("diverged")
    return {"valid": lr + 0.01 * seed, "test": 10 * lr}


def test_sweep_keeps_each_run_resumes_and_chooses():
    calls = []

    def run(**settings):
        calls.append(settings)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return noisy(**settings)

    choices = {"lr": [0.1, 0.2], "method": ["full"]}
    with pytest.raises(KeyboardInterrupt):
        results.sweep(run, choices, [0, 1], chapter="05_demo", name="s", progress=False)
    done = results.sweep(run, choices, [0, 1], chapter="05_demo", name="s", n=50, budget="1 epoch", progress=True)
    assert len(calls) == 5 and len(done.rows) == 4 and set(done.metrics) == {"valid", "test"}
    assert {r["seconds"] >= 0 for r in done.rows} == {True}
    best = done.best("valid", by="method", report="test")
    assert [round(b["mean"], 3) for b in best] == [2.0] and done.best("valid", mode="min")["lr"] == 0.1
    wider = results.sweep(run, {**choices, "lr": [0.1, 0.2, 0.3]}, [0, 1], chapter="05_demo", name="s", progress=False)
    assert len(calls) == 7 and "6 runs" in repr(wider)
    stored = results.load_sweep("05_demo", "s")
    assert len(stored.rows) == 6 and stored.row("valid", lr=0.3)["n"] == 50
    said = results.say("{best:.2f}", best=stored.row("test", lr=0.3))
    assert str(results.Markdown(said.payload)) == "3.00 [3.00, 3.00]"
    assert "lr" in str(stored.table("valid")) and len(stored.plot("valid").get_yticklabels()) == 3


@pytest.mark.parametrize(
    "options, once",
    [
        ([1, 1.0], [1]),
        ([0.5, 0.5, 2], [0.5, 2]),
        ([1, True, "1"], [1, True, "1"]),
        ([2**60, 2**60 + 1], [2**60, 2**60 + 1]),
    ],
)
def test_options_that_are_stored_as_one_run_are_run_once(options, once):
    tried = []

    def run(seed, lr):
        tried.append(lr)
        return {"loss": 1.0}

    found = results.sweep(run, {"lr": options}, [0], chapter="05_demo", name="s", progress=False)
    assert list(map(repr, tried)) == list(map(repr, once))
    assert len(found.rows) == len(found.summary("loss")) == len(once)


def test_an_option_that_stands_twice_in_a_row_of_a_study_is_tried_once():
    found = compare([{"method": "a", "lr": [0.1, 1, 1.0]}, {"method": "b", "lr": [0.1, 1]}])
    assert [r["tried"] for r in found.rows("score")] == [2, 2]


def test_a_sweep_hands_its_runs_to_an_executor():
    def run(seed, lr):
        if lr == 3:
            raise ValueError("too large")
        return {"loss": lr + seed}

    how = {"chapter": "00_demo", "progress": False}
    with (
        ThreadPoolExecutor(2) as pool,
        pytest.warns(UserWarning, match=r"sweep many: .*'lr': 3.*, seed 0 failed: Value"),
    ):
        many = results.sweep(run, {"lr": [1, 2, 3]}, [0, 1], name="many", executor=pool, **how)
    with pytest.warns(UserWarning):
        one = results.sweep(run, {"lr": [1, 2, 3]}, [0, 1], name="one", **how)
    bare = [[{k: v for k, v in r.items() if k in ("choice", "seed", "metrics")} for r in s.runs] for s in (many, one)]
    assert bare[0] == bare[1] and len(bare[0]) == 4 and len(many.failed) == len(one.failed) == 2


def test_sweep_reports_failures_and_refuses_wrong_questions():
    with pytest.warns(UserWarning, match="diverged"):
        done = results.sweep(
            noisy, {"lr": [0.1], "method": ["full", "broken"]}, [0], chapter="05_demo", name="f", progress=False
        )
    assert len(done.rows) == 1 and "RuntimeError: diverged" in done.failed[0]["error"]
    with pytest.warns(UserWarning, match="must return a dict"):
        results.sweep(lambda seed, a: 3, {"a": [1]}, [0], chapter="05_demo", name="g", progress=False)
    with pytest.raises(ValueError, match="no metric 'loss'"):
        done.summary("loss")
    with pytest.raises(ValueError, match="0 rows match"):
        done.row("valid", lr=7)
    with pytest.raises(ValueError, match="'max' or 'min'"):
        done.best("valid", mode="high")
    results.record("05_demo", "number", 1)
    with pytest.raises(ValueError, match="no sweep"):
        results.load_sweep("05_demo", "number")
    with pytest.raises(KeyError, match="no run of"):
        source = {**done.row("valid").source, "seeds": [7]}
        str(results.Markdown({"template": "{x}", "values": {"x": {"source": source}}}))


def test_settings_are_all_combinations_and_wrong_choices_are_refused():
    choices = {"a": [1, 2, 3], "b": ["x", None]}
    assert len(results._settings(choices)) == 6
    for wrong, error in (
        ({"a": "abc"}, ValueError),
        ({"a": []}, ValueError),
        ({"a": [object()]}, TypeError),
        ({"a": [float("inf")]}, ValueError),
        ({"seed": [1]}, ValueError),
        ({"metric": [1]}, ValueError),
    ):
        with pytest.raises(error):
            results._settings(wrong)


def test_results_do_not_import_torch():
    code = "import sys; import ftbook.results; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_a_sweep_does_not_mix_budgets(folder):
    kept = {"chapter": "00_demo", "name": "mixed", "progress": False}
    results.sweep(lambda seed: {"loss": 1.0}, {}, [0], budget="1 epoch", n=5, **kept)
    assert len(results.sweep(lambda seed: {"loss": 1.0}, {}, [0, 1], budget="1 epoch", n=5, **kept).rows) == 2
    with pytest.raises(ValueError, match="budget '1 epoch', this one '2 epochs'; give it another name"):
        results.sweep(lambda seed: {"loss": 1.0}, {}, [0], budget="2 epochs", n=5, **kept)
    with pytest.raises(ValueError, match="n 5, this one 6"):
        results.sweep(lambda seed: {"loss": 1.0}, {}, [0], budget="1 epoch", n=6, **kept)


def test_whole_numbers_take_the_format_of_their_column():
    shown = results.table([{"way": "a", "pieces": 12345}], fmt={"pieces": ","})
    assert "12,345" in str(getattr(shown, "data", shown))
    plain = results.table([{"way": "a", "pieces": 12345}])
    assert "12345" in str(getattr(plain, "data", plain))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(1e-8, 1e3), min_size=1, max_size=5, unique=True))
def test_every_rate_is_a_setting_of_its_own_to_the_last_bit(rates):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("FTBOOK_RESULTS", folder)
        rates = [*rates, np.nextafter(rates[0], 2), np.float32(rates[0]).item()]
        done = results.sweep(
            lambda seed, lr: {"loss": lr}, {"lr": rates}, [0], chapter="05_demo", name="s", progress=False
        )
        assert len(done.rows) == len(set(rates))
        for found in (done, results.load_sweep("05_demo", "s")):
            assert all(found.row("loss", lr=r)["lr"] == r for r in rates)


def test_whole_numbers_find_their_floats_and_truth_is_no_number():
    where = {"chapter": "05_demo", "name": "s", "progress": False}
    results.sweep(lambda seed, a: {"x": 1}, {"a": [1, True, np.int64(2)]}, [0], **where)
    done = results.sweep(lambda seed, a: pytest.fail("ran again"), {"a": [1.0, True, 2.0]}, [0], **where)
    assert len(done.rows) == 3 and done.row("x", a=1.0)["a"] == 1 and done.row("x", a=True)["a"] is True


OLD = {
    "cpu": {
        "s": {
            "provenance": [{"python": "3.11", "date": "2026-01-01"}],
            "value": {
                "n": 5,
                "runs": [
                    {
                        "choice": {"lr": 0.333333, "m": "a"},
                        "seed": s,
                        "metrics": {"loss": 1.0 + s},
                        "seconds": 1.0,
                        "origin": 0,
                    }
                    for s in (0, 1)
                ],
            },
        }
    }
}


def test_runs_that_were_stored_with_six_digits_are_found_by_the_exact_rate(folder):
    (folder / "05_demo.json").write_text(json.dumps(OLD))
    where = {"chapter": "05_demo", "name": "s", "n": 5, "progress": False}
    done = results.sweep(lambda **k: pytest.fail("ran again"), {"lr": [1 / 3], "m": ["a"]}, [0, 1], **where)
    assert done.row("loss", lr=1 / 3)["values"] == [1.0, 2.0] and results.load_sweep("05_demo", "s").row(
        "loss", lr=1 / 3
    )
    calls = []
    results.sweep(
        lambda **k: calls.append(k["lr"]) or {"loss": 0}, {"lr": [0.3333331, 0.3333332], "m": ["a"]}, [0], **where
    )
    assert calls == [0.3333331, 0.3333332], "one old run cannot stand for two rates"


def test_rows_are_in_the_order_of_numbers():
    choices = {"labels": [100, 10, 1, 30, 3], "m": ["b", "a", None]}
    done = results.sweep(
        lambda seed, labels, m: {"x": labels}, choices, [10, 9], chapter="05_demo", name="s", progress=False
    )
    for found in (done, results.load_sweep("05_demo", "s")):
        assert [r["labels"] for r in found.summary("x", m="a")] == [1, 3, 10, 30, 100]
        assert found.rows[0] | {"seconds": 0} == {"labels": 1, "m": None, "seed": 9, "x": 1, "seconds": 0}
        assert [row.split("|")[1].strip() for row in str(found.table("x")).split("\n")[2::3]] == [
            "1",
            "3",
            "10",
            "30",
            "100",
        ]


def test_a_setting_that_diverged_is_shown_and_never_the_best():
    scores = {1.0: float("nan"), 2.0: 0.5, 3.0: 0.4}
    done = results.sweep(
        lambda seed, lr: {"acc": scores[lr] if seed else 0.6},
        {"lr": list(scores)},
        [0, 1],
        chapter="05_demo",
        name="s",
        progress=False,
    )
    assert np.isnan(done.row("acc", lr=1).mean), "the seed that is left is not the mean"
    assert done.best("acc")["lr"] == 2 and done.best("acc", mode="min")["lr"] == 3
    alone = results.sweep(
        lambda seed, lr: {"acc": float("inf")}, {"lr": [1]}, [0], chapter="05_demo", name="t", progress=False
    )
    with pytest.raises(ValueError, match="'acc' is no number in any run"):
        alone.best("acc")


# ---------------------------------------------------------------- studies

ASKED = []


def measure(seed, split, method="a", lr=0.0, labels=10):
    """A made-up method: its own random numbers, so that it is the same in a thread and in a process."""
    ASKED.append((split, method, lr, seed))
    noise = np.random.default_rng([seed, labels, len(split)]).normal(0, 1e-3)
    peak = {"a": 0.2, "b": 1 / 3, "none": 0.1}.get(method, 0.2)
    return {"score": 1 - abs(lr - peak) + noise, "loss": abs(lr - peak), "steps": 50}


def compare(rows, run=measure, **options):
    given = {"chapter": "10_demo", "name": "study", "choose": "score", "budget": "50 steps", "seeds": [1, 2, 3]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return results.study(run, rows, **given | options)


RATES = [0.1, 0.2, 1 / 3, 0.5]
ROWS = [
    {"method": "a", "lr": RATES},
    {"method": "b", "lr": RATES},
    {"method": "fixed", "lr": 0.2},
    {"method": "like b", "lr": results.ChosenFor(method="b")},
]


def content(folder):
    """What a study stored, without what differs between two runs of the same thing."""
    stored = json.loads((folder / "10_demo.json").read_text())["cpu"]
    for part in ("study.search", "study.final"):
        for run in stored[part]["value"]["runs"]:
            assert run.pop("seconds") >= 0
    for rows in stored["study"]["value"].values():
        for row in rows:
            assert row.pop("minutes") >= 0
    return {k: v["value"] for k, v in stored.items()}


def test_a_study_chooses_on_validation_data_and_scores_the_test_data_once():
    ASKED.clear()
    found = compare(ROWS, n={"valid": 50, "test": 200})
    chosen = {"a": 0.2, "b": 1 / 3, "fixed": 0.2, "like b": 1 / 3}
    search = [a for a in ASKED if a[0] == "valid"]
    assert search == [("valid", m, lr, 0) for m in "ab" for lr in RATES], "one seed, and only what is searched"
    assert [a for a in ASKED if a[0] == "test"] == [("test", m, lr, s) for m, lr in chosen.items() for s in (1, 2, 3)]
    for row in found.rows("score"):
        assert (
            row["lr"] == chosen[row["method"]]
            and row["n"] == 200
            and row["seeds"] == [1, 2, 3]
            and row["budget"] == "50 steps"
        )
        assert row["tried"] == (4 if row["method"] in "ab" else 1) and row["edge"] == [] and row["minutes"] >= 0
        assert row.varied == {"method": row["method"], "lr": chosen[row["method"]]}
    assert found.search.stored["n"] == 50 and len(found.search.rows) == 8 and len(found.final.rows) == 12
    again = results.load_study("10_demo", "study")
    assert again.rows("score") == found.rows("score") and again.metrics == ["loss", "score", "steps"]
    said = results.say("{x:.2f} at {r:.4f}", x=again.row("score", method="b"), r=again.row("score", method="b")["lr"])
    assert str(results.Markdown(said.payload)).endswith("at 0.3333") and "study" in repr(found) and not found.failed
    assert "| a | 0.2 |" in str(found.table("score", "loss", columns=["method", "lr", "score"]))
    assert len(found.plot("score").get_yticklabels()) == 4
    ASKED.clear()
    compare(ROWS, n={"valid": 50, "test": 200})
    assert ASKED == [], "nothing runs twice"


@settings(deadline=None, max_examples=8)
@given(st.data())
def test_a_study_that_was_killed_anywhere_and_goes_on_equals_the_unbroken_one(data):
    stops = data.draw(st.lists(st.integers(0, 19), max_size=3))
    with (
        tempfile.TemporaryDirectory() as first,
        tempfile.TemporaryDirectory() as second,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("FTBOOK_RESULTS", first)
        compare(ROWS)
        patch.setenv("FTBOOK_RESULTS", second)
        tests = []
        for stop in [*stops, 99]:
            left = itertools.count()

            def run(seed, split, stop=stop, left=left, **settings):
                if next(left) == stop:
                    raise KeyboardInterrupt
                if split == "test":
                    tests.append((*settings.values(), seed))
                return measure(seed, split, **settings)

            try:
                compare(ROWS, run)
            except KeyboardInterrupt:
                pass
        assert len(tests) == len(set(tests)) == 12, "each test score once, however often the study was stopped"
        assert content(results.Path(first)) == content(results.Path(second))


@pytest.mark.parametrize(
    "pool",
    [lambda: ThreadPoolExecutor(3), lambda: ProcessPoolExecutor(2, multiprocessing.get_context("fork"))],
    ids=["threads", "processes"],
)
def test_an_executor_gives_the_rows_of_one_process(pool, tmp_path, monkeypatch):
    folders = tmp_path / "here", tmp_path / "pool"
    monkeypatch.setenv("FTBOOK_RESULTS", str(folders[0]))
    compare(ROWS)
    monkeypatch.setenv("FTBOOK_RESULTS", str(folders[1]))
    with pool() as executor:
        compare(ROWS, executor=executor)
    assert content(folders[0]) == content(folders[1])


def stands_in(seed, split, lr):
    results.substituted("wnut17", "in another process")
    return {"score": lr}


def another_profile(seed, split, lr):
    os.environ["FTBOOK_PROFILE"] = "quick"
    return {"score": lr}


def ends_its_process(seed, split, lr):
    os._exit(1)


@pytest.mark.parametrize(
    "run, match",
    [
        (stands_in, "wnut17: in another process"),
        (another_profile, "in the quick profile, the study in cpu"),
        (ends_its_process, "the executor could not do a run .BrokenProcessPool"),
        (lambda seed, split, lr: {"score": 1}, "must be importable there"),
    ],
)
def test_what_goes_wrong_in_another_process_is_told_and_nothing_is_stored(run, match, folder):
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as executor:
        with pytest.raises(RuntimeError, match=match):
            compare([{"lr": 0.1}], run, executor=executor)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "options, edge",
    [
        ([0.2, 0.3, 0.4], ["lr"]),
        ([0.1, 0.15, 0.2], ["lr"]),
        ([0.1, 0.2, 0.3], []),
        ([0.2], []),
        ([0.0, 0.5, 1.0], []),
        ([0.4, 0.2, 0.1], []),
    ],
)
def test_a_choice_at_the_edge_of_its_grid_is_warned_of_and_stands_in_the_row(options, edge):
    given = {"chapter": "10_demo", "name": "edge", "choose": "score", "budget": "b", "seeds": [1]}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = results.study(measure, [{"method": "a", "lr": options}], **given)
    assert found.row("score")["edge"] == edge
    assert [str(w.message) for w in told] == (
        [f"study edge.search: for {{'method': 'a'}} the best lr is 0.2, at the edge of {options}; widen the grid"]
        if edge
        else []
    )


def test_names_have_no_edge_and_several_settings_are_searched_together():
    def run(seed, split, kind, lr, flag):
        return {"score": {"x": 0, "y": 2, "z": 1}[kind] - abs(lr - 2) + flag}

    row = compare([{"kind": ["x", "z", "y"], "lr": (1, 2, 3), "flag": [False, True]}], run).row("score")
    assert row.varied == {"kind": "y", "lr": 2, "flag": True} and row["tried"] == 18 and row["edge"] == []


def test_a_lower_score_may_be_the_better_and_several_seeds_may_search():
    found = compare([{"method": "b", "lr": RATES}], choose="loss", mode="min", search_seeds=[7, 8])
    assert found.row("loss")["lr"] == 1 / 3 and len(found.search.rows) == 8


@pytest.mark.parametrize(
    "rows, match",
    [
        ([], "no rows"),
        (
            [{"method": "a", "lr": [1, 2]}, {"method": "b", "lr": [1, 2, 3]}],
            "different numbers of settings: 2 for .*; 3 for",
        ),
        ([{"method": "a", "lr": [1, 2]}, {"method": "a", "lr": [3, 4]}], "2 rows do not differ in what is fixed"),
        (
            [{"method": "a", "lr": results.ChosenFor(method="c")}],
            "takes lr from another, and 0 rows have {'method': 'c'}",
        ),
        (
            [
                {"method": "a", "lr": [1, 2]},
                {"method": "b", "lr": results.ChosenFor(method="a")},
                {"method": "c", "lr": results.ChosenFor(method="b")},
            ],
            "0 rows have {'method': 'b'}",
        ),
        ([{"split": "test"}], "'split' is a field of every row"),
        ([{"lr": []}], "at least one option"),
    ],
)
def test_rows_that_cannot_be_compared_are_refused_before_the_first_run(rows, match):
    with pytest.raises(ValueError, match=match):
        compare(rows, lambda **k: pytest.fail("ran"))


@pytest.mark.parametrize(
    "options, match",
    [
        ({"mode": "best"}, "'max' or 'min'"),
        ({"seeds": []}, "at least one seed"),
        ({"search_seeds": []}, "at least one seed"),
    ],
)
def test_wrong_options_of_a_study_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        compare(ROWS, lambda **k: pytest.fail("ran"), **options)


def test_a_study_mixes_neither_budgets_nor_numbers_of_examples():
    compare(ROWS[:1], n={"valid": 5, "test": 9})
    for other, match in (
        ({"budget": "60 steps"}, "budget '50 steps', this one '60 steps'"),
        ({"n": {"test": 8}}, "n 9, this one 8"),
        ({"n": {"valid": 4, "test": 9}}, "n 5, this one 4"),
    ):
        with pytest.raises(ValueError, match=match):
            compare(ROWS[:1], **{"n": {"valid": 5, "test": 9}} | other)


def test_rows_that_take_more_steps_than_others_are_found_out():
    def run(seed, split, method, lr):
        return {"score": lr, "steps": 60 if method == "b" else 50}

    with pytest.raises(
        ValueError, match="budgets differ: 60 steps for {'method': 'b', 'lr': 0.1}, 50 for {'method': 'a'"
    ):
        compare(ROWS[:2], run)


def test_a_search_run_that_fails_or_diverges_comes_last_and_a_final_run_that_fails_is_told():
    trouble = {"final": True}

    def run(seed, split, method, lr):
        if lr == 0.2 or (trouble["final"] and split == "test" and seed == 2):
            raise RuntimeError("diverged")
        return {"score": float("nan") if lr == 0.1 else lr}

    rows = [{"method": "a", "lr": RATES}, {"method": "b", "lr": RATES}]
    with pytest.raises(RuntimeError, match="2 final run.s. of study study failed, for example .*diverged"):
        compare(rows, run)
    trouble["final"] = False
    found = compare(rows, run)
    assert [r["lr"] for r in found.rows("score")] == [0.5, 0.5] and len(found.failed) == 2
    with pytest.raises(RuntimeError, match="no run of .* gave a number as 'score'"):
        compare([{"lr": [0.1, 0.2]}], lambda seed, split, lr: {"score": float("nan")}, name="none")
    with pytest.raises(ValueError, match="run.. returned score, loss, steps for .*'accuracy' is to choose"):
        compare(ROWS, name="other", choose="accuracy")


def test_a_study_is_asked_for_what_it_has():
    found = compare(ROWS)
    with pytest.raises(ValueError, match="no metric 'f1'; it has loss, score, steps"):
        found.rows("f1")
    with pytest.raises(ValueError, match="4 rows match {}; they differ in"):
        found.row("score")
    assert [r["method"] for r in found.rows("score", lr=1 / 3)] == ["b", "like b"]
    results.record("10_demo", "number", 1)
    for key in ("number", "study.final"):
        with pytest.raises(ValueError, match="is no study"):
            results.load_study("10_demo", key)
    assert repr(results.ChosenFor(method="b", labels=3)) == "ChosenFor(method='b', labels=3)"


def test_a_widened_grid_runs_only_what_is_new_and_the_rows_follow():
    compare([{"method": "a", "lr": [0.1, 0.15]}])
    ASKED.clear()
    row = compare([{"method": "a", "lr": [0.1, 0.15, 0.2, 0.3]}]).row("score")
    assert [a[:3] for a in ASKED] == [("valid", "a", 0.2), ("valid", "a", 0.3)] + [("test", "a", 0.2)] * 3
    assert row["lr"] == 0.2 and row["edge"] == [] and row["tried"] == 4
    assert len(results.load_study("10_demo", "study").final.rows) == 3, "final runs of the former choice do not count"


# ---------------------------------------------------------------- seeds and examples


def outcomes(seed, split, method="a", lr=0.0, n=300):
    """What a made-up method gets right: hard examples are hard for all, and method b is a little better."""
    hard = np.random.default_rng(len(split)).normal(size=n)
    noise = np.random.default_rng([seed, len(method), ord(method[0])]).normal(size=n)
    right = {"a": 0.5, "b": 1.2, "c": 0.5}.get(method, 0.0) + hard + 0.7 * noise > 0
    there, found = np.arange(n) % 3, np.arange(n) % 3 + (~right).astype(int)
    return {"score": right, "f1": (2 * np.minimum(there, found), there + found), "loss": 1.0 - right.mean()}


def test_a_final_run_keeps_what_it_scored_and_a_search_run_its_score(folder):
    found = compare([{"method": "a", "lr": [0.1, 0.2, 0.3]}, {"method": "b", "lr": [0.1, 0.2, 0.3]}], outcomes)
    stored = json.loads((folder / "10_demo.json").read_text())["cpu"]
    assert not any("outcomes" in r for r in stored["study.search"]["value"]["runs"])
    run = stored["study.final"]["value"]["runs"][0]
    made = outcomes(run["seed"], "test", run["choice"]["method"])
    up, down = made["f1"]
    assert run["metrics"]["score"] == pytest.approx(made["score"].mean(), abs=1e-6)
    assert run["metrics"]["f1"] == pytest.approx(up.sum() / down.sum(), abs=1e-6)
    kept = run["outcomes"]
    assert set(kept) == {"score", "f1"} and np.array_equal(results._unpack(kept["score"][0]), made["score"])
    assert np.array_equal([results._unpack(t) for t in kept["f1"]], [up, down])
    row = found.row("score", method="a")
    assert row["n"] == 300 and row.over == "seeds and examples" and row.varied == {"method": "a", "lr": row["lr"]}
    assert found.row("loss", method="a").over == "seeds" and "over" not in found.row("loss", method="a")
    assert found.final.row("score", method="a")["interval"] == row["interval"]
    narrow = results.row("score", row["values"])
    assert row.high - row.low >= (narrow.high - narrow.low) * 0.2 and row.mean == pytest.approx(narrow.mean, abs=1e-6)


@pytest.mark.parametrize(
    "value",
    [
        np.array([True, False, True]),
        np.array([0.0, 1.0]),
        np.array([-3, 127, 0]),
        np.array([300, -32_767]),
        np.array([1e6, 2.0]),
        np.array([0.1, np.nan, np.inf], dtype=np.float32),
        np.arange(1000) % 2 == 0,
    ],
)
def test_outcomes_come_back_as_they_were(value):
    assert np.array_equal(results._unpack(results._pack(value)), value.astype(float), equal_nan=True)


def test_scores_may_be_tensors_and_wrong_ones_are_told():
    import torch

    assert results._measured("x", torch.tensor([True, False]))[0] == 0.5
    assert results._measured("x", torch.tensor(0.25, dtype=torch.bfloat16)) == (0.25, [])
    assert results._measured("x", (torch.tensor([2, 0]), torch.tensor([3, 1])))[0] == 0.5
    assert np.isnan(results._measured("x", (np.zeros(2), np.zeros(2)))[0])
    for wrong in (np.zeros((2, 2)), np.zeros(0), (np.zeros(2), np.zeros(3)), (1, 2, 3), np.array(["a", "b"])):
        with pytest.raises(ValueError, match="the score 'x' is .* give a number, a 1-D array"):
            results._measured("x", wrong)


def test_rows_and_seeds_score_the_same_examples():
    def run(seed, split, method):
        return {"score": np.ones(9 if seed == 2 and method == "b" else 10)}

    with pytest.raises(ValueError, match="'score' has 9 examples for {'method': 'b'}, seed 2, 10 for {'method': 'a'}"):
        compare([{"method": "a"}, {"method": "b"}], run)


def test_a_study_with_outcomes_stays_small(folder):
    rng = np.random.default_rng(0)
    rows = [{"method": f"method {i}"} for i in range(3)]
    compare(rows, lambda seed, split, method: {"score": rng.random(1_821) < 0.8}, seeds=range(30))
    assert (folder / "10_demo.json").stat().st_size * 4 < 400_000, "a quarter of 12 rows"


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 6), st.integers(2, 40), st.integers(0, 10_000))
def test_the_interval_is_never_narrower_than_over_seeds_or_examples_alone(seeds, examples, draw):
    z = np.random.default_rng(draw).normal(size=(seeds, examples))
    error = results._spread(z)[1]
    alone = [results._spread(x)[1] for x in (z.mean(1, keepdims=True), z.mean(0, keepdims=True))]
    assert error >= max(alone) - 1e-12
    assert alone == pytest.approx([stats.sem(z.mean(1)), stats.sem(z.mean(0))])


def test_the_variance_is_that_of_the_pigeonhole_bootstrap():
    rng = np.random.default_rng(0)
    z = 0.2 * rng.normal(size=(20, 1)) + rng.normal(size=(1, 400)) + 0.3 * rng.normal(size=(20, 400))
    means = [z[np.ix_(rng.integers(20, size=20), rng.integers(400, size=400))].mean() for _ in range(1_000)]
    assert np.std(means) == pytest.approx(results._spread(z)[1], rel=0.1)


def test_the_linear_shares_of_a_ratio_have_the_spread_of_its_bootstrap():
    rng = np.random.default_rng(1)
    down = rng.poisson(3, 500) + 1.0
    up = rng.binomial(down.astype(int), 0.6).astype(float)
    z = results._shares([results._pack(up), results._pack(down)])
    picks = rng.integers(500, size=(2_000, 500))
    assert z.mean() == pytest.approx(up.sum() / down.sum())
    assert results._spread(z[None])[1] == pytest.approx(np.std(up[picks].sum(1) / down[picks].sum(1)), rel=0.1)


THREE = [{"method": "a", "lr": 0.1}, {"method": "b", "lr": 0.1}, {"method": "c", "lr": 0.1}]


def test_a_study_compares_its_rows_with_one_of_them():
    found = compare([results.Baseline(method="words"), *THREE], outcomes)
    gaps = found.compare("score", method="a")
    assert [g["method"] for g in gaps] == ["words", "b", "c"] and [g["verdict"] for g in gaps] == [
        "worse",
        "better",
        "unclear",
    ]
    assert [g["better"] for g in gaps] == [False, True, False] and gaps[1].low > 0 > gaps[0].high
    assert gaps[1].mean == pytest.approx(
        found.row("score", method="b").mean - found.row("score", method="a").mean, abs=1e-5
    )
    assert [g["p_holm"] for g in gaps] == results._holm([g["p"] for g in gaps]) and gaps[0]["p_holm"] >= gaps[0]["p"]
    assert found.row("score", method="words")["seeds"] == [1] and found.row("score", method="words").over == "examples"
    both = [outcomes(s, "test", "b")["score"].astype(float) - outcomes(1, "test", "words")["score"] for s in (1, 2, 3)]
    against = found.compare("score", method="words")[1]
    assert against["interval"] == pytest.approx(list(results._limits(np.stack(both)))) and against["seeds"] == [1, 2, 3]
    with pytest.raises(ValueError, match="rows match"):
        found.compare("score", method="nothing")


@pytest.mark.parametrize("mode, better", [("max", ["better", "worse"]), ("min", ["worse", "better"])])
def test_differences_to_several_rows_are_judged_as_one_family(mode, better):
    found = compare(THREE, outcomes, mode=mode)
    two = [r for r in found.compare("score", method="a") if r["method"] == "b"]
    two += [r for r in found.compare("score", method="b") if r["method"] == "a"]
    assert two[0].mean == -two[1].mean and two[0]["p"] == pytest.approx(two[1]["p"])
    one = found.compare("score", method="a")
    assert found.judge("score", two) is two and [r["verdict"] for r in two] == better
    assert [r["p_holm"] for r in two] == results._holm([r["p"] for r in two])
    many = found.judge("score", [*two, *one, *found.compare("score", method="c")])
    assert all(r["p_holm"] >= r["p"] for r in many) and many[0]["p_holm"] == pytest.approx(6 * many[0]["p"], rel=1)
    assert two[0].source["against"] == {"method": "a"}, "where it was found stays known"


def test_a_study_compares_each_row_with_the_one_of_its_group():
    rows = [{"method": m, "lr": lr} for lr in (0.1, 0.2) for m in ("a", "b")]
    found = compare(rows, outcomes)
    gaps = found.compare("score", "lr", method="a")
    assert [(g["method"], g["lr"]) for g in gaps] == [("b", 0.1), ("b", 0.2)]
    for g in gaps:
        pair = [found.row("score", method=m, lr=g["lr"]).mean for m in ("b", "a")]
        assert g.mean == pytest.approx(pair[0] - pair[1], abs=1e-5)
    assert [g["p_holm"] for g in gaps] == results._holm([g["p"] for g in gaps])
    shown = results.table(gaps)
    assert results.Markdown(json.loads(json.dumps(shown.payload))).text == str(shown)


def test_holm_is_the_step_down_correction():
    assert results._holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert results._holm([0.9, np.nan, 0.8])[0] == 1.0 and np.isnan(results._holm([0.9, np.nan])[1])
    assert results._holm([]) == []


def test_without_outcomes_the_comparison_is_the_paired_t_test():
    def run(seed, split, method):
        return {
            "score": {"a": 0.5, "b": 0.6}.get(method, 0.4) + np.random.default_rng([seed, ord(method)]).normal(0, 0.02)
        }

    found = compare([results.Baseline(method="z", seeds=[7]), {"method": "a"}, {"method": "b"}], run, seeds=range(5))
    a, b = (found.row("score", method=m)["values"] for m in "ab")
    (old, new) = found.compare("score", method="a")
    assert new["p"] == pytest.approx(stats.ttest_rel(b, a)[1]) and new.over == "seeds" and new["better"]
    assert new["interval"] == pytest.approx(results.difference(b, a)["interval"])
    z = found.row("score", method="z")["values"][0]
    assert old["p"] == pytest.approx(stats.ttest_1samp(np.subtract(a, z), 0)[1]) and len(old["values"]) == 5
    once = compare([{"method": "a"}, {"method": "b"}], run, seeds=[1], name="once").compare("score", method="a")[0]
    assert np.isnan(once["p"]) and not once["better"] and once["verdict"] == "unclear"


def test_two_rows_with_different_numbers_of_seeds_are_not_paired():
    rows = [results.Baseline(method="words", seeds=[1, 2]), THREE[0]]
    with pytest.raises(ValueError, match="has 3 seeds, {'method': 'words'} has 2; a comparison needs as many"):
        compare(rows, outcomes).compare("score", method="words")


def test_lower_may_be_better_for_one_metric_or_for_all():
    for mode, verdicts in ({"loss": "min"}, ["better", "better"]), ("min", ["worse", "better"]):
        found = compare(THREE[:2], outcomes, mode=mode, choose="loss", name=str(mode)[:3].strip("{'"))
        assert [found.compare(m, method="a")[0]["verdict"] for m in ("score", "loss")] == verdicts


def test_a_table_against_a_row_shows_differences_and_verdicts_and_is_rendered_again():
    found = compare(THREE, outcomes)
    shown = found.table("score", against={"method": "a"}, caption="Three.", fmt=".3f")
    lines = str(shown).split("\n")
    assert lines[0] == "| lr | method | score | difference in score | verdict |" and len(lines) == 7
    assert lines[2].endswith("| – | – |") and lines[3].endswith("| better |") and lines[4].endswith("| unclear |")
    assert "*Three. Intervals are 95 %, over seeds and examples; better or worse: p &lt; 0.05 after" in lines[-1]
    assert "for 2 comparisons" in lines[-1]
    assert results.Markdown(json.loads(json.dumps(shown.payload))).text == str(shown)
    compare([*THREE[:2], {"method": "d", "lr": 0.1}], outcomes)
    again = results.Markdown(shown.payload).text.split("\n")[4]
    assert "| d |" in again and again.endswith("| worse |"), "what is shown follows what is stored"
    for metrics in ((), ("score", "f1")):
        with pytest.raises(ValueError, match="give one"):
            found.table(*metrics, against={"method": "a"})


def test_runs_of_before_without_outcomes_leave_the_interval_over_seeds():
    compare(THREE[:1], lambda **k: {"score": float(outcomes(**k)["score"].mean())}, seeds=[1])
    assert compare(THREE[:1], outcomes).row("score").over == "seeds"


def test_a_baseline_has_its_own_grid_and_seeds():
    ASKED.clear()
    rows = [
        results.Baseline(method="none", lr=[0.1, 0.15]),
        *ROWS[:2],
        results.Baseline(seeds=[8, 9], method="z", lr=0.2),
    ]
    found = compare(rows)
    assert found.row("score", method="none")["tried"] == 2 and found.row("score", method="a")["tried"] == 4
    assert found.row("score", method="none")["seeds"] == [1] and found.row("score", method="z")["seeds"] == [8, 9]
    assert [a for a in ASKED if a[1] == "none"] == [
        ("valid", "none", 0.1, 0),
        ("valid", "none", 0.15, 0),
        ("test", "none", 0.1, 1),
    ]
    assert repr(rows[0]) == "{'method': 'none', 'lr': [0.1, 0.15]}"
    assert found.row("score", method="none") == results.load_study("10_demo", "study").row("score", method="none")
    ASKED.clear()
    compare(rows)
    assert ASKED == []


def test_differences_of_shares_are_in_points():
    gap = results.difference([0.90, 0.92, 0.91], [0.88, 0.89, 0.88])
    assert f"{gap:.1%}" == "2.7 points [1.2, 4.1]" and f"{gap:+.1%}".startswith("+2.7 points [+1.2")
    assert f"{gap:.3f}" == "0.027 [0.012, 0.041]"
    one = results.row("difference in accuracy", [0.009, 0.011])
    assert f"{one:+.0%}".startswith("+1 point [") and f"{one:+.1%}".startswith("+1.0 points [")
    signed = results.table([{"way": "a", "gap": "+1"}, {"way": "b", "gap": "-1"}])
    assert "| :--- | ---: |" in str(signed)
