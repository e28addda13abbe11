"""The wheel: built, installed with its requirements into an empty environment, used from another folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools import env
from tools.settings import settings

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
        ["git", "ls-files", "-z", "ftbook", "settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"],
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
