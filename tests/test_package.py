"""The wheel: built, installed with its requirements into an empty environment, used from another folder."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tools import env
from tools.generate import install
from tools.settings import NBS, RESULTS, requirements, settings

METADATA = "settings.ini", "setup.py", "MANIFEST.in", "pyproject.toml", "README.md", "LICENSE"
PROGRAM = """
import sys, pathlib
import ftbook
assert "torch" not in sys.modules
assert "{env}" in ftbook.__file__, ftbook.__file__
from ftbook import corpus, data, train
import torch
x, y = torch.randn(64, 8), torch.randint(0, 2, (64,))
quiet = train.Settings(progress=False)
history = train.fit(torch.nn.Linear(8, 2), (x, y), epochs=1, settings=quiet)
sentences = corpus.read_conll(data.asset("ner_corpus/test.conll"))
print(len(history), len(sentences) > 50, ftbook.__version__)
"""


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory) -> Path:
    """`uv build` of a copy of what git tracks, so that no build leftover of the checkout gets in."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    files = subprocess.run(
        ["git", "ls-files", "-z", "ftbook", "results", *METADATA],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    for name in filter(None, files):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((root / name).read_bytes())
    assert not env.uv(sys.executable, "-m", "uv", "build", "--quiet", "--wheel", "--out-dir", str(folder), str(source))
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_library_its_assets_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "ftbook/assets/ner_corpus/train.conll" in names and "ftbook/assets/bert-mini-en/model.safetensors" in names
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"ftbook"}
    stored = {n.removeprefix("ftbook/assets/results/") for n in names if n.startswith("ftbook/assets/results/")}
    assert stored == {file.name for file in RESULTS.glob("*.json")}
    metadata = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert "Requires-Dist: torch>=" in metadata and "Provides-Extra: notebook" in metadata
    assert "License-Expression: Apache-2.0" in metadata or "License: Apache-2.0" in metadata
    for key, line in (("contact", "Author-email: "), ("site", "Project-URL: Documentation, ")):
        value = settings()[key]
        assert (line + value in metadata) if value else (line not in metadata)


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(wheel, root, tmp_path):
    where = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", where], check=True)
    python = where / "bin" / "python"
    assert not env.uv(
        sys.executable,
        "-m",
        "uv",
        "pip",
        "install",
        "--quiet",
        "--python",
        str(python),
        "--constraints",
        str(root / "requirements" / "all.lock"),
        str(wheel),
    )
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run = subprocess.run(
        [python, "-c", PROGRAM.format(env=where)], cwd=elsewhere, env=clean, capture_output=True, text=True
    )
    assert run.stdout.split()[:2] == ["1", "True"], run.stderr


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory) -> Path:
    """A folder with what the wheel holds and nothing else."""
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def without_checkout(unpacked, **settings) -> dict:
    """An environment in which Python finds the unpacked wheel before the checkout, and no results of ours."""
    guard = os.environ["PYTHONPATH"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("FTBOOK_RESULTS")}
    return {**env, "PYTHONPATH": os.pathsep.join([str(unpacked), guard]), **settings}


STORED = """
import ftbook, json, sys
from ftbook import results
assert ftbook.__file__.startswith(sys.argv[1]), ftbook.__file__
print(json.dumps([results.load(chapter, "run", profile="cpu")["minutes"] for chapter in sys.argv[2:]]))
"""


def test_stored_numbers_are_found_from_any_folder(unpacked, root, tmp_path):
    names = ["04_train", "10_ner", "17_search"]
    wanted = [json.loads((RESULTS / f"{n}.json").read_text())["cpu"]["run"]["value"]["minutes"] for n in names]
    for package in (unpacked, root):  # installed; used from a checkout that is not the present folder
        run = subprocess.run(
            [sys.executable, "-c", STORED, str(package), *names],
            cwd=tmp_path,
            env=without_checkout(package),
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0 and json.loads(run.stdout) == wanted, run.stderr


@pytest.mark.slow
def test_a_chapter_runs_in_a_bare_folder_with_only_the_wheel(unpacked, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", without_checkout(unpacked, FTBOOK_DATA=str(tmp_path / "cache")))
    bare = tmp_path / "bare"
    bare.mkdir()
    nb = nbformat.read(NBS / "17_search.ipynb", as_version=4)
    nb.metadata["kernelspec"] = {"display_name": "python3", "language": "python", "name": "python3"}
    check = f"import ftbook; assert ftbook.__file__.startswith({str(unpacked)!r}), ftbook.__file__"
    nb.cells.append(nbformat.v4.new_code_cell(check))
    resources = {"metadata": {"path": str(bare)}}
    NotebookClient(
        nb, timeout=240, resources=resources, extra_arguments=["--IPKernelApp.log_level=40"], store_widget_state=True
    ).execute()
    assert not list(bare.iterdir()), "a quick run leaves nothing in the reader's folder"


def packed(folder, name) -> None:
    """A wheel of a pure distribution that is installed here."""
    found = distribution(name)
    left_out = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"}
    with zipfile.ZipFile(folder / f"{name}-{found.version}-py3-none-any.whl", "w") as archive:
        for file in found.files:
            if file.suffix != ".pyc" and file.name not in left_out:
                archive.write(found.locate_file(file), str(file))
        archive.writestr(f"{name}-{found.version}.dist-info/RECORD", "")


def stub(folder, name, version, needs=()) -> None:
    """A wheel with a name, a version and requirements, and nothing in it."""
    base = f"{name.replace('-', '_')}-{version}"
    info = f"{base}.dist-info/"
    about = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {n}" for n in needs)]
    with zipfile.ZipFile(folder / f"{base}-py3-none-any.whl", "w") as archive:
        archive.writestr(info + "METADATA", "\n".join(about) + "\n")
        archive.writestr(
            info + "WHEEL", "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(info + "RECORD", "")


# a stack as Colab has it; pooch and gguf are not there, transformers and ipython are older than what the book asks for
STACK = {
    "torch": "2.9.0+cu126",
    "torchvision": "0.24.0+cu126",
    "transformers": "4.57.1",
    "numpy": "2.0.2",
    "scikit-learn": "1.6.1",
    "matplotlib": "3.10.0",
    "tqdm": "4.67.1",
    "safetensors": "0.6.2",
    "scipy": "1.16.3",
    "pillow": "11.3.0",
    "filelock": "4.1.0",
    "tokenizers": "0.22.1",
    "ipython": "7.34.0",
    "joblib": "1.5.2",
}
REPLAY = """
import sys, types
sys.modules["google.colab"] = types.ModuleType("google.colab")
exec(open(sys.argv[1]).read())
import importlib.metadata, json
print(json.dumps({d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}))
"""
OPENED = """
import sys, types
sys.modules["google.colab"] = types.ModuleType("google.colab")
sys.path += sys.argv[2:]  # the packages themselves: in this environment they are names and versions
import json
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for cell in json.load(open(sys.argv[1])):
    shell.run_cell(cell, store_history=True).raise_error()
import ftbook, transformers
print(json.dumps([ftbook.__file__, transformers.__version__]))
"""


@pytest.fixture
def colab(wheel, tmp_path):
    """colab(ipywidgets, *others) makes an environment with such a stack; it gives a function that runs the first cell in it."""
    index, folder, python = tmp_path / "index", tmp_path / "content", tmp_path / "env" / "bin" / "python"
    index.mkdir()
    folder.mkdir()
    for name in ("torch", "transformers", "numpy", "ipywidgets"):  # to see whether anything is moved to these
        stub(index, name, "99.0")
    stub(index, "pooch", "1.8.2", ["numpy", "tqdm"])
    stub(index, "gguf", "0.17.1", ["numpy>=1.17"])
    stub(index, "gguf", "0.99.0", ["numpy>=90", "ipywidgets>=8"])
    packed(index, "packaging")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_", "FTBOOK_", "PYTHONPATH"))}
    environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_CONFIG_FILE": os.devnull}
    gone = f"url.file://{tmp_path}/gone/.insteadOf"  # no network, and nothing at the address
    environment |= {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": gone, "GIT_CONFIG_VALUE_0": "https://"}
    cell, _, rest = install("17_search.ipynb").partition("\nimport ftbook\n")
    assert rest.strip().startswith("ftbook.models.require(")
    (tmp_path / "cell.py").write_text(cell)

    def run(*command):
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    def make(ipywidgets, *others):
        subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
        for name, version in {**STACK, "ipywidgets": ipywidgets}.items():
            stub(index, name, version)
        stack = [*others, *(f"{n}=={v}" for n, v in {**STACK, "ipywidgets": ipywidgets}.items())]
        made = run(python, "-m", "pip", "install", "-q", "--no-deps", *stack)
        assert made.returncode == 0, made.stderr
        return lambda: run(python, "-c", REPLAY, str(tmp_path / "cell.py"))

    make.folder, make.wheel, make.environment = folder, wheel, environment
    return make


@pytest.mark.slow
@pytest.mark.parametrize("ipywidgets, others", [("7.7.1", ["packaging"]), ("8.1.5", [])])
def test_the_first_cell_adds_to_colab_what_is_missing_and_moves_nothing(colab, ipywidgets, others):
    first_cell = colab(ipywidgets, *others)
    (colab.folder / colab.wheel.name).write_bytes(colab.wheel.read_bytes())
    for again in range(2):
        run = first_cell()
        assert run.returncode == 0, run.stderr
        *told, found = run.stdout.splitlines()
        found = {name.lower(): version for name, version in json.loads(found).items()}
        assert {name: found[name] for name in STACK} == STACK and found["ipywidgets"] == ipywidgets
        assert set(found) - {*STACK, "ipywidgets", "pip", "setuptools", "packaging"} == {"ftbook", "pooch", "gguf"}
        assert found["gguf"] == "0.17.1", "the newest that fits what is there"
        assert [line.split(";")[0] for line in told] == ["transformers stays 4.57.1", "ipython stays 7.34.0"], again
    names = {line.split(">")[0] for line in requirements("")}
    assert names == {*STACK, "pooch", "gguf"}, "the stack of this test has a version of every requirement"


def first_cells(path) -> list:
    """The code of a chapter up to its second figure."""
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    shown = [i for i, c in enumerate(cells) if any("<img" in o.get("data", {}).get("text/html", "") for o in c.outputs)]
    return [c.source for c in cells[: shown[1] + 1]]


@pytest.mark.slow
@pytest.mark.parametrize("chapter, count", [("17_search", 8), ("06_mlm", 8)])
def test_a_chapter_begins_there_with_the_older_transformers(colab, root, chapter, count, tmp_path):
    """The first cell runs, then those up to the second figure: with the wheel, and with Colab's transformers itself."""
    first_cell, older = colab("7.7.1", "packaging"), tmp_path / "older"
    real = [f"{name}=={STACK[name]}" for name in ("transformers", "tokenizers")] + ["huggingface-hub==0.36.0"]
    where = ("--target", str(older), "--python", sys.executable)
    assert not env.uv(sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-deps", *where, *real)
    (colab.folder / colab.wheel.name).write_bytes(colab.wheel.read_bytes())
    assert first_cell().returncode == 0
    cells = first_cells(NBS / f"{chapter}.ipynb")
    assert len(cells) >= count and "google.colab" in cells[0]
    (tmp_path / "cells.json").write_text(json.dumps(cells))
    settings = {"FTBOOK_PROFILE": "quick", "FTBOOK_DATA": str(tmp_path / "cache"), "MPLBACKEND": "agg"}
    run = subprocess.run(
        [tmp_path / "env/bin/python", "-c", OPENED, tmp_path / "cells.json", older, sysconfig.get_path("purelib")],
        cwd=colab.folder,
        env={**colab.environment, **settings, "PYTHONPATH": str(root / "tests" / "guard")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert "figure: " in run.stdout
    found, version = json.loads(run.stdout.splitlines()[-1])
    assert found.startswith(str(tmp_path / "env")) and version == STACK["transformers"]


@pytest.mark.slow
def test_the_first_cell_says_what_to_do_where_the_repository_is_not_to_be_had(colab):
    run = colab("7.7.1")()
    assert run.returncode and f"could not be installed from git+{settings()['repository']}@" in run.stderr
    assert "pip wheel --no-deps ." in run.stderr and "upload the file ftbook-*.whl" in run.stderr


def test_bundled_tokenizers_are_of_classes_that_an_older_transformers_has_too(root):
    """Colab's transformers stays where it is, and may be of the version before."""
    found = {json.loads(f.read_text())["tokenizer_class"] for f in root.glob("ftbook/assets/*/tokenizer_config.json")}
    assert found == {"BertTokenizer", "PreTrainedTokenizerFast"}
