"""Every script of benchmarks/ runs in its tiny setting, offline, with or without its peers; speed is not tested."""

import importlib
import sys
from pathlib import Path

import pytest

from ftbook import results
from tools.settings import ROOT

FOLDER = ROOT / "benchmarks"
SCRIPTS = sorted(s.stem for s in FOLDER.glob("[!_]*.py"))


@pytest.fixture(scope="module", autouse=True)
def on_the_path():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """The scripts say where results go; after the test that is forgotten."""
    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path))


def run(name: str, out: Path) -> dict:
    importlib.import_module(name).main(["--tiny", "--out", str(out)])
    return results.load(name, "measured")


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_script_runs(name, tmp_path):
    content = run(name, tmp_path)
    assert content["tiny"] and content.source["chapter"] == name and content["machine"]["threads"] >= 1
    assert content["rows"] or content["figures"]
    for row in content["rows"]:
        assert row["what"] and (row["measured"] is None or len(row["measured"]) == 3)
    for figure in content.get("figures", {}):
        assert (tmp_path / f"growth_{figure}.svg").stat().st_size > 1000


@pytest.mark.parametrize("name", ["adapters", "entity_f1", "lora_inference", "lora_step", "ner_prepare"])
def test_a_missing_peer_leaves_its_rows_empty(name, tmp_path, monkeypatch, capsys):
    importlib.import_module(name)
    for missing in ("peft", "seqeval", "seqeval.metrics", "datasets"):
        monkeypatch.setitem(sys.modules, missing, None)
    content = run(name, tmp_path)
    assert "is not installed" in capsys.readouterr().out
    assert all(row["met"] is None for row in content["rows"] if row["target"] and row["measured"] is None)


def test_paired_measurements_alternate():
    common, calls = importlib.import_module("_common"), []
    seconds = common.paired(lambda: calls.append("a"), lambda: calls.append("b"), repeats=3, warmup=0)
    assert "".join(calls) == "abbaab" and seconds.shape == (3, 2)
    assert common.paired(lambda: 1.0, lambda: 2.0, repeats=2)[:, 1].tolist() == [2.0, 2.0]


def test_the_table_says_what_is_met_and_what_is_not(tmp_path, monkeypatch):
    common, table = importlib.import_module("_common"), importlib.import_module("_table")
    args = common.arguments("", ["--out", str(tmp_path)])
    rows = [
        common.row("fast thing", target="≥ 2×", values=[3, 3, 4], met=lambda v: v >= 2),
        common.row("slow thing", target="≥ 2×", values=[1, 1, 1], met=lambda v: v >= 2, note="because"),
        common.row("thing without its peer", target="≥ 2×", values=None, met=lambda v: v >= 2),
    ]
    common.save("loop", rows, args)
    table.write(tmp_path, tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| fast thing | ≥ 2× | 3.00× [3.00, 3.50] | – | – | met |" in text
    assert "**not met**: because" in text and "not measured" in text and "Not run: imports" in text


def test_the_committed_table_is_that_of_the_committed_results():
    table = importlib.import_module("_table")
    if not table.load(FOLDER / "results"):
        pytest.skip("`make bench` has not run yet")
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == table.render(FOLDER / "results")


def test_gpu_is_skipped_with_one_line_where_there_is_no_cuda(tmp_path, monkeypatch, capsys):
    gpu = importlib.import_module("gpu")
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    gpu.main(["--out", str(tmp_path)])
    assert "skipped" in capsys.readouterr().out and not list(tmp_path.iterdir())
