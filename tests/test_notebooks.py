"""Every notebook runs from its first cell to its last: quick profile, fresh kernel, no network, nothing written here."""

import ast
import builtins
import hashlib
import json
import os
import re
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellTimeoutError, DeadKernelError

from tools.generate import NEEDS, is_generated
from tools.settings import NBS, RESULTS, kernel_environment

NOTEBOOKS = sorted(NBS.glob("[!.]*.ipynb"))


def state() -> dict:
    files = [f for folder in (NBS, RESULTS) for f in folder.rglob("*") if f.is_file() and "kernel-ipc" not in f.name]
    return {f: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs_in_the_quick_profile(path):
    before = state()
    nb = nbformat.read(path, as_version=4)
    nb.metadata["kernelspec"] = {"display_name": "python3", "language": "python", "name": "python3"}
    for attempt in (1, 2):  # once more where the kernel's messages got lost; an error in a cell fails at once
        client = NotebookClient(
            nb,
            timeout=240,
            store_widget_state=True,
            resources={"metadata": {"path": str(NBS)}},
            extra_arguments=["--IPKernelApp.log_level=40", "--HistoryManager.hist_file=:memory:"],
        )
        try:
            client.execute(env=kernel_environment())
            break
        except (CellTimeoutError, DeadKernelError):
            if attempt == 2:
                raise
    ran = [c for c in nb.cells if c.cell_type == "code" and c.source.strip()]
    assert all(c.execution_count for c in ran)
    assert not any(o.output_type == "error" for c in ran for o in c.outputs)
    assert state() == before, "a quick run must not write into nbs/ or results/"


CHAPTERS = [path for path in NOTEBOOKS if path.name != "index.ipynb"]
each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
# named in the chapter, but not loaded in the cpu profile: of the gpu profile, of a study only, of an example
NAMED = {
    "06_mlm": {"minilm"},
    "10_ner": {"conll2003"},
    "16_augment": {"trec"},
    "A1_data": {"conll2003"},
    "A2_models": {"cifar10"},
    "A4_results": {"wnut17"},
}


def code_of(path) -> list:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [("".join(c["source"]), is_generated(c)) for c in cells if c["cell_type"] == "code"]


@each_chapter
def test_offline_in_the_cpu_profile_a_chapter_stops_at_once_and_says_what_to_do(path, cache, monkeypatch, capsys):
    monkeypatch.setenv("FTBOOK_OFFLINE", "1")
    first, generated = code_of(path)[0]
    assert generated, "the first cell of code is the generated one"
    if not NEEDS.get(path.stem):
        exec(first, {})
        assert capsys.readouterr().out == "profile: cpu\n"
        return
    with pytest.raises(FileNotFoundError) as stopped:
        exec(first, {})
    told, shown = str(stopped.value), capsys.readouterr()
    assert shown.out == "profile: cpu\n" and "replaced" not in shown.err
    for name in set(NEEDS[path.stem].split()) - {"wiki_excerpt", "camvid", "fsdd"}:  # nobody serves these as they are
        assert name in told.split(":")[0]
    assert "FTBOOK_OFFLINE is set" in told and " from https://" in told and str(cache) in told
    assert "models.require(" in told and told.endswith("FTBOOK_PROFILE=quick before Python starts.")
    assert stopped.value._render_traceback_() == told.split("\n"), "a notebook shows the message and nothing else"
    assert not list(cache.rglob("*")), "nothing was written"


@each_chapter
def test_the_first_cell_asks_for_all_that_the_chapter_loads(path):
    from ftbook import data, models

    known = {n for n in data.names() if any(data.card(n).variants.values())}
    known |= {n for n in models.names("cpu") if models.card(n).files}
    named = set()
    for source, generated in code_of(path):
        if not generated:
            tree = ast.parse(re.sub(r"^[%!].*$", "pass", source, flags=re.M))
            named |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and n.value in known}
    missing = named - set(NEEDS.get(path.stem, "").split()) - NAMED.get(path.stem, set())
    assert not missing, f"add {', '.join(sorted(missing))} to NEEDS in tools/generate.py, or to NAMED above"


def _names(source: str) -> tuple[set, set]:
    """Names that code makes, and names that it takes."""
    made, taken = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            (taken if isinstance(node.ctx, ast.Load) else made).add(node.id)
        elif isinstance(node, ast.arg):
            made.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            made.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            made |= {(a.asname or a.name).split(".")[0] for a in node.names}
    return made, taken


def _recipe(path) -> tuple[str, list[str], str]:
    """The first text of "On your data", its code cells, and all code above it."""
    cells = [(c.cell_type, c.source) for c in nbformat.read(path, as_version=4).cells]
    begin = [i for i, (kind, s) in enumerate(cells) if kind == "markdown" and s.startswith("## On your data")]
    if not begin:
        return "", [], ""
    part = []
    for kind, source in cells[begin[0] + 1 :]:
        if kind == "markdown" and re.search(r"^## ", source, re.M):
            break
        part += [source] if kind == "code" else []
    above = "\n".join(re.sub(r"^[%!].*$", "pass", s, flags=re.M) for k, s in cells[: begin[0]] if k == "code")
    return cells[begin[0]][1], part, above


LEFT_OUT = [p for p in CHAPTERS if re.search(r"leave (it|the first cell) out", _recipe(p)[0])]


@pytest.mark.parametrize("path", LEFT_OUT, ids=lambda p: p.stem)
def test_a_recipe_needs_nothing_from_the_cell_that_its_reader_leaves_out(path):
    text, (_, *kept), above = _recipe(path)
    made, taken = _names("\n".join(kept))
    given = set(re.findall(r"`(\w+)`", text)) | set(dir(builtins)) | _names(above)[0]
    missing = taken - made - given - {"mine", "my_file"}
    assert not missing, f"NameError for {', '.join(sorted(missing))}: make it in the second cell, or above the section"


@pytest.mark.parametrize(
    "call",
    [
        "socket.create_connection(('192.0.2.1', 80), 2)",
        "socket.getaddrinfo('example.org', 80)",
        "urllib.request.urlopen('http://192.0.2.1/', timeout=2)",
    ],
)
def test_the_guard_refuses_other_hosts(call):
    code = f"import socket, urllib.request\n{call}"
    run = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True)
    assert run.returncode and "was blocked" in run.stderr


def test_the_guard_lets_this_machine_through():
    code = (
        "import socket, threading\ns = socket.create_server(('127.0.0.1', 0))\n"
        "socket.create_connection(s.getsockname()).close()\nprint('connected')"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True).stdout
        == "connected\n"
    )
