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


@pytest.fixture(scope="module")
def gpu_rows(tmp_path_factory):
    """Rows of the decoders' and the ViT's work, in the smallest sizes."""
    with pytest.MonkeyPatch.context() as patch:
        out = tmp_path_factory.mktemp("gpu")
        patch.setenv("FTBOOK_RESULTS", str(out))
        importlib.import_module("gpu").main(["--tiny", "--part", "360M,ViT", "--out", str(out)])
        return results.load("gpu", "measured")["rows"]


@pytest.mark.parametrize("work", ["SFT of a 360M", "DPO of a 360M", "generation with a 360M", "ViT-B/16"])
def test_gpu_measures_ours_and_a_peer_in_each_work(gpu_rows, work):
    rows = [r for r in gpu_rows if r["work"].startswith(work)]
    ours, peers = ([r for r in rows if r["ours"] is own] for own in (True, False))
    assert ours and all(r["rounds"] == 1 for r in rows)
    if work.startswith("generation"):
        told = [r["note"] for r in ours if r["note"]]
        assert len(told) == 2 and all("100.0% of the pieces" in note for note in told), "equal greedy pieces"
    if peers:
        assert all(r["measured"][0] > 0 for r in rows)


def test_sft_and_dpo_end_with_the_loss_of_their_peers(gpu_rows):
    for work in ("SFT", "DPO"):
        rows = [r["limit"] for r in gpu_rows if r["work"].startswith(work)]
        losses = [float(text.rsplit(" ", 1)[1]) for text in rows]
        assert max(losses) - min(losses) < 0.02, (work, losses)


def test_gpu_without_trl_says_so(tmp_path, monkeypatch):
    pytest.importorskip("peft", reason="peft is not installed")
    gpu = importlib.import_module("gpu")
    monkeypatch.setitem(sys.modules, "trl", None)
    gpu.main(["--tiny", "--part", "SFT", "--out", str(tmp_path)])
    rows = results.load("gpu", "measured")["rows"]
    assert {r["peer"] for r in rows} == {"transformers and peft, plain loop"}
    assert all("TRL is not installed" in r["note"] for r in rows if r["ours"])


def test_the_gpu_table_says_what_is_ahead_and_what_is_not():
    table = importlib.import_module("_table")

    def line(name, ours, values, speed):
        about = {"work": "w", "ours": ours, "rounds": 3, "limit": f"1 ms, {speed} tokens/s"}
        return {"what": f"w, {name}", "measured": values, **about}

    peer = line("theirs", False, [1.0, 1.0, 1.0], 100)
    for values, told in (([2, 1.5, 3], "ahead"), ([0.5, 0.4, 0.6], "behind"), ([1.1, 0.9, 1.2], "no clear")):
        (said,) = table.standings([line("mine", True, values, 200), peer])
        assert told in said and "(mine) 200 tokens/s" in said and "(theirs) 100 tokens/s" in said


def test_gpu_is_skipped_with_one_line_where_there_is_no_cuda(tmp_path, monkeypatch, capsys):
    gpu = importlib.import_module("gpu")
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    gpu.main(["--out", str(tmp_path)])
    assert "skipped" in capsys.readouterr().out and not list(tmp_path.iterdir())
