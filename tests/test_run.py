"""`make run`: a notebook's stored outputs are replaced by a whole run on the real data, and by nothing else."""

import json
import os
import sys
import time
import types
from pathlib import Path

import nbformat
import pytest

from ftbook.studies import __main__ as study_command
from tools import run, studies


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """Writes a notebook of some cells; `run` then works in a folder of its own, in the cpu profile."""
    folder = tmp_path / "nbs"
    folder.mkdir()
    monkeypatch.setattr(run, "NBS", folder)
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(run, "PROFILE", "cpu")
    monkeypatch.setattr(run, "generate", lambda names: None)
    monkeypatch.setenv("FTBOOK_PROFILE", "cpu")
    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path / "results"))

    def make(*cells):
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
        path = folder / "99_demo.ipynb"
        nbformat.write(nb, path)
        return path

    return make


STAND_IN = "from ftbook import results\nresults.substituted('wnut17', 'no network; https://example.org has it')"


@pytest.mark.slow
def test_a_run_with_substituted_data_replaces_neither_outputs_nor_results(notebook, tmp_path):
    path = notebook("print(1)", STAND_IN)
    before = path.read_bytes()
    with pytest.raises(
        RuntimeError, match="ran with substitutes of wnut17; .*stay as they are.*\n.*https://example.org has it"
    ):
        run.execute(path)
    assert path.read_bytes() == before and not (tmp_path / "results").exists()
    assert [f.name for f in path.parent.iterdir()] == ["99_demo.ipynb"]


@pytest.mark.slow
def test_a_run_on_the_real_data_replaces_the_outputs_and_stores_its_minutes(notebook, tmp_path):
    path = notebook("print(40 + 2)")
    made = run.execute(path)
    assert nbformat.read(path, 4).cells[0].outputs[0]["text"] == "42\n" and made["minutes"] >= 0
    stored = json.loads((tmp_path / "results" / "99_demo.json").read_text())["cpu"]["run"]["value"]
    assert stored["code"] == made["code"] and stored["peak_mb"] > 10
    assert run.stored_run(path, "cpu")["code"] == made["code"]
    assert [f.name for f in path.parent.iterdir()] == ["99_demo.ipynb"]


@pytest.mark.slow
def test_the_quick_profile_tries_out_and_stores_nothing(notebook, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "PROFILE", "quick")
    monkeypatch.setenv("FTBOOK_PROFILE", "quick")
    path = notebook("print(1)", STAND_IN)
    before = path.read_bytes()
    assert run.execute(path)["seconds"] > 0
    assert path.read_bytes() == before and not (tmp_path / "results").exists()


def test_leftovers_are_removed_when_they_are_surely_dead(tmp_path):
    old = [".tmpabc123_x.ipynb", ".05_demo.123-0a1b2c3d.ipynb"]
    kept = ["05_demo.ipynb", ".notes.ipynb", ".05_demo.99-ffffffff.ipynb", ".05_demo.123-0a1b2c3d.json"]
    for name in old + kept:
        (tmp_path / name).write_text("{}")
        if "99-ffffffff" not in name:
            os.utime(tmp_path / name, (time.time() - 7200,) * 2)
    run.remove_leftovers(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(kept)


def test_the_studies_say_where_their_rows_go(monkeypatch, capfd):
    command = ["-c", "import sys; print('ran demo', *sys.argv[1:]); raise SystemExit(3)"]
    monkeypatch.setattr(studies, "commands", lambda: {"99_demo": command})
    monkeypatch.setattr(studies, "find", lambda name: {"98": Path("98_other.ipynb"), "99": Path("99_demo.ipynb")}[name])
    for profile, place in (("cpu", "results/99_demo.json"), ("quick", "a temporary folder")):
        monkeypatch.setenv("FTBOOK_PROFILE", profile)
        assert studies.main(["99", "rates", "costs"]) == 3
        said = capfd.readouterr().out
        assert f"in the {profile} profile, rows into {place}" in said and "ran demo rates costs\n" in said
    monkeypatch.setenv("JOBS", "2")
    assert studies.main(["99", "rates"]) == 3 and "ran demo rates --jobs 2" in capfd.readouterr().out
    with pytest.raises(SystemExit, match="98_other has no study; chapters with studies: 99_demo"):
        studies.main(["98"])


def test_every_chapter_with_a_study_has_its_command():
    assert studies.commands()["10_ner"] == ["-m", "ftbook.studies", "ner"]
    assert set(studies.commands()) >= {"03_optim", "05_autoencoder", "11_peft", "17_search"}


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_study_runs_its_jobs_here_or_in_processes(jobs, monkeypatch):
    asked = []
    demo = types.SimpleNamespace(main=lambda *names, **options: asked.append((names, options)))
    monkeypatch.setitem(sys.modules, "ftbook.studies.demo", demo)
    monkeypatch.setattr(sys, "argv", ["studies", "demo", "rates", "--jobs", str(jobs)])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    study_command.main()
    ((names, options),) = asked
    assert names == ("rates",) and [type(v).__name__ for v in options.values()] == ["ProcessPoolExecutor"] * (jobs - 1)
    monkeypatch.setattr(sys, "argv", ["studies", "demo", "--jobs", "0"])
    with pytest.raises(SystemExit):
        study_command.main()


EARLY = "from ftbook import results\nresults.record('99_demo', 'loss', {old})\nresults.say('loss {{x}}', x=('99_demo', 'loss'))"
LATE = "results.record('99_demo', 'loss', 2.5)"


@pytest.mark.slow
def test_a_sentence_shown_before_its_number_was_stored_says_the_stored_one(notebook):
    path = notebook(EARLY.format(old=1.5), LATE)
    run.execute(path)
    [output] = run.stored_texts(nbformat.read(path, 4))
    assert output["data"]["text/markdown"] == "loss 2.5"


GAIN = """from ftbook import results
old, new = (results.row("accuracy", values) for values in ([0.7, 0.75], [0.8, 0.9]))
results.say("{gain:+.1%}", gain=results.difference(new, old))"""


@pytest.mark.slow
def test_a_row_that_stands_in_a_sentence_keeps_its_interval(notebook):
    path = notebook(GAIN)
    run.execute(path)
    [output] = run.stored_texts(nbformat.read(path, 4))
    assert output["data"]["text/markdown"].startswith("+12.5 points [")


@pytest.mark.slow
def test_a_file_that_could_not_be_replaced_stays_stale(notebook, monkeypatch):
    path = notebook("1 + 1")
    monkeypatch.setattr(run, "write", lambda nb, path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.execute(path)
    assert not run.is_fresh(path)


@pytest.mark.slow
def test_the_line_of_facts_shows_this_very_run(notebook):
    path = notebook("from ftbook import data\ndata.status('99_demo')")
    run.execute(path)
    [output] = run.stored_texts(nbformat.read(path, 4))
    assert output["data"]["text/markdown"].startswith("cpu profile: ")


def cell(source, *outputs):
    return {"source": source, "outputs": list(outputs)}


def shown(live=False, **about):
    return {
        "output_type": "display_data",
        "data": {"text/html": "<img>"},
        "metadata": {**about, **({"live": True} if live else {})},
    }


def test_a_page_keeps_what_a_widget_drew_only_where_the_cell_shows_nothing_else():
    note = {"output_type": "display_data", "data": {"text/markdown": "**Play:** run this cell"}, "metadata": {}}
    controls = {"output_type": "display_data", "data": {"application/vnd.jupyter.widget-view+json": {}}, "metadata": {}}
    drawn, own = shown(live=True, ftbook={"alt": "a"}), shown(ftbook={"alt": "b"})
    assert run.for_the_page(cell("widget()", note, controls, drawn)) == [note, drawn]
    assert run.for_the_page(cell("widget(); show()", note, controls, drawn, own)) == [note, own]
    printed = {"output_type": "stream", "name": "stdout", "text": "profile: cpu"}
    assert run.for_the_page(cell("print(); widget()", printed, note, controls, drawn)) == [printed, note]
    assert run.for_the_page(cell("# generated by tools/generate.py", printed)) == []


def test_a_second_build_finds_the_index_that_the_first_one_took_from_the_site(tmp_path, monkeypatch):
    """Sphinx adds the pages that changed to it, and warns where it is missing; a warning fails the build."""
    from tools import book, finish, stage

    out, found = tmp_path / "site", []

    def build(command, **_):
        index = out / "searchindex.js"
        found.append(index.read_text() if index.exists() else "")
        out.mkdir(exist_ok=True)
        index.write_text(found[-1] + "page ")
        return 0

    monkeypatch.setattr(book, "BUILD", tmp_path / "build")
    (tmp_path / "build").mkdir()
    monkeypatch.setattr(book.subprocess, "call", build)
    monkeypatch.setattr(stage, "STAGE", tmp_path / "source")
    monkeypatch.setattr(stage, "stage", lambda: [])
    monkeypatch.setattr(finish, "finish", lambda out: (out / "searchindex.js").unlink())
    assert [book.sphinx(out), book.sphinx(out)] == [0, 0] and found == ["", "page "]
    assert not (out / "searchindex.js").exists()
