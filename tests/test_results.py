"""Rows, intervals, stored numbers, sentences made from them, sweeps."""
import json
import multiprocessing
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ftbook import results


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path))
    monkeypatch.setenv("FTBOOK_PROFILE", "cpu")
    return tmp_path


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_interval_equals_scipy(values, level):
    mean, low, high = results.mean_interval(values, level)
    error = stats.sem(values)
    expected = stats.t.interval(level, len(values) - 1, np.mean(values), error) if error > 0 else (mean, mean)
    assert np.allclose([mean, low, high], [np.mean(values), *expected], rtol=1e-9, atol=1e-9)


def test_interval_edges():
    assert np.isnan(results.mean_interval([1.0])[1])
    with pytest.raises(ValueError):
        results.mean_interval([])
    with pytest.raises(ValueError):
        results.mean_interval([1, 2], level=1.5)


def test_prediction_interval_covers_a_new_run_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = [results.inside(v[-1], list(v[:-1])) for v in rng.normal(size=(2000, 6))]
    assert 0.93 < np.mean(hits) < 0.97
    assert results.inside(1.05, [1.0], tolerance=0.1) and not results.inside(1.2, [1.0], tolerance=0.1)
    with pytest.raises(ValueError, match="tolerance"):
        results.inside(1.0, [1.0])


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
    assert results.to_json(value) == {"a": 0.333333, "b": None, "c": 0.5, "d": [True, None, "x", 3]}
    with pytest.raises(TypeError):
        results.to_json({"a": object()})


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


def test_where_results_go(monkeypatch, tmp_path):
    monkeypatch.delenv("FTBOOK_RESULTS")
    (tmp_path / "nbs" / "deep").mkdir(parents=True)
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    monkeypatch.chdir(tmp_path / "nbs" / "deep")
    assert results.checkout() == tmp_path and results.results_dir() == tmp_path / "results"
    assert results.results_dir("quick") != tmp_path / "results"
    monkeypatch.chdir("/")
    assert results.checkout() is None


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
    said = results.say("{acc:.1%}, {r.mean:.2f}, {n} runs, {x:.0%}, {{}}", acc=row, r=("05_demo", "acc"), n=3,
                       x=results.load("05_demo", "many")["a"][0])
    assert str(said) == repr(said) == "87.0 % [84.5, 89.5], 0.87, 3 runs, 25 %, {}"
    data, metadata = said._repr_mimebundle_()
    assert data["text/markdown"] == results.render(metadata["ftbook"])
    results.record("05_demo", "acc", results.row("accuracy", [0.5, 0.6, 0.7]))
    assert results.render(metadata["ftbook"]).startswith("60.0 %"), "a changed result shows"


def test_table_merges_metrics_and_escapes():
    rows = [results.row("accuracy", [0.8, 0.9], n=1000, method="a|b"), results.row("seconds", [1.0, 2.0], n=1000, method="a|b"),
            results.row("accuracy", [0.7, 0.8], method="c")]
    text = str(results.table(rows, caption="Takeaway."))
    assert r"a\|b" in text and text.count("\n| ") == 3 and "*Takeaway.*" in text and "| –" in text
    assert "| Method | n |" in str(results.table(rows[:1], columns={"method": "Method", "n": "n"}))
    assert "0.500" in str(results.table([{"x": 0.5}], fmt=".3f"))
    with pytest.raises(ValueError, match="no row has a column"):
        results.table(rows, columns=["nothing"])
    with pytest.raises(ValueError, match="at least one"):
        results.table([])


def test_call_payload_only_calls_public_functions():
    with pytest.raises(ValueError, match="no public function"):
        results.render({"call": {"function": "os.system", "arguments": {"command": "true"}}})
    payload = {"call": {"function": "ftbook.results.format_number", "arguments": {"x": 0.5, "spec": ".0%"}}}
    assert results.render(payload) == "50 %"


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
    assert results.render(said.payload) == "3.00 [3.00, 3.00]"
    assert "lr" in str(stored.table("valid")) and len(stored.plot("valid").get_yticklabels()) == 3


def test_sweep_reports_failures_and_refuses_wrong_questions():
    with pytest.warns(UserWarning, match="diverged"):
        done = results.sweep(noisy, {"lr": [0.1], "method": ["full", "broken"]}, [0], chapter="05_demo", name="f", progress=False)
    assert len(done.rows) == 1 and "RuntimeError: diverged" in done.failed[0]["error"]
    with pytest.warns(UserWarning, match="must return a dict"):
        results.sweep(lambda seed, a: 3, {"a": [1]}, [0], chapter="05_demo", name="g", progress=False)
    with pytest.raises(ValueError, match="no metric 'loss'"):
        done.summary("loss")
    with pytest.raises(ValueError, match="0 settings match"):
        done.row("valid", lr=7)
    with pytest.raises(ValueError, match="'max' or 'min'"):
        done.best("valid", mode="high")
    results.record("05_demo", "number", 1)
    with pytest.raises(ValueError, match="no sweep"):
        results.load_sweep("05_demo", "number")
    with pytest.raises(KeyError, match="no run of"):
        source = {**done.row("valid").source, "seeds": [7]}
        results.render({"template": "{x}", "values": {"x": {"source": source}}})


def test_settings_grid_random_and_errors():
    choices = {"a": [1, 2, 3], "b": ["x", None]}
    assert len(results.settings(choices)) == 6
    few, more = (results.settings(choices, "random", n) for n in (2, 4))
    assert more[:2] == few and len({json.dumps(s) for s in more}) == 4
    for wrong, error in (({"a": "abc"}, ValueError), ({"a": []}, ValueError), ({"a": [object()]}, TypeError)):
        with pytest.raises(error):
            results.settings(wrong)
    for search, trials in (("best", None), ("random", None)):
        with pytest.raises(ValueError):
            results.settings(choices, search, trials)


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
