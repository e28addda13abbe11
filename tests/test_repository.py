"""What must agree in this repository: notebooks and library, pages and results, settings and everything made from them."""
import ast
import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version as installed
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tools.fingerprint import fingerprint
from tools.generate import main as generate
from tools.run import stored_run
from tools.settings import EXTRAS, NBS, ROOT, chapters, requirements, settings

NOTEBOOKS = sorted(NBS.glob("[!.]*.ipynb"))
FLOORS = [["runtime"], ["plot"], ["results"], ["data"], ["losses", "optim"], ["train"], ["finetune"],
          ["autoencoder", "mlm", "vision", "ner", "peft", "regularize", "augment", "search"]]


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(path: Path) -> list:
    return [c for c in load(path)["cells"] if c["cell_type"] == "code"]


def outputs(path: Path) -> list:
    return [o for c in code_cells(path) for o in c["outputs"]]


each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> Path:
    """A copy of the checkout after a fresh export and `nbdev-clean`."""
    copy = tmp_path_factory.mktemp("fresh") / "ftbook"
    copy.mkdir()
    for name in ("pyproject.toml", "settings.ini", "setup.py", "README.md"):
        shutil.copy(ROOT / name, copy)
    for name in ("nbs", "tools"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns(".*", "kernel-ipc*", "__pycache__"))
    (copy / "ftbook").mkdir()
    shutil.copy(ROOT / "ftbook" / "__init__.py", copy / "ftbook")
    subprocess.run(["git", "init", "-q"], cwd=copy, check=True)
    for command in ([sys.executable, "-m", "tools.export"], [Path(sys.executable).with_name("nbdev-clean")]):
        subprocess.run(command, cwd=copy, check=True, capture_output=True)
    return copy


def test_the_library_equals_a_fresh_export(fresh):
    ours = {f.name: f.read_text(encoding="utf-8") for f in (ROOT / "ftbook").glob("*.py")}
    theirs = {f.name: f.read_text(encoding="utf-8") for f in (fresh / "ftbook").glob("*.py")}
    assert set(ours) == set(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == [], "run `make export`"


def test_notebooks_are_clean(fresh):
    changed = [f.name for f in NOTEBOOKS if f.read_bytes() != (fresh / "nbs" / f.name).read_bytes()]
    assert changed == [], "run `make export`, which cleans them"


def test_generated_cells_and_readme_agree_with_settings():
    assert generate(["--check"]) == 0, "run `make export`"
    cfg = settings()
    for path in NOTEBOOKS:
        if path.name != "index.ipynb":
            text = path.read_text(encoding="utf-8")
            assert f"{cfg['repository'].removeprefix('https://github.com/')}/blob/{cfg['branch']}/nbs/{path.name}" in text
            assert f"git+{cfg['repository']}@{cfg['branch']}" in text


def test_the_repository_address_stands_once():
    address = settings()["repository"]
    allowed = {"settings.ini", "README.md", "CITATION.cff", *(f"nbs/{p.name}" for p in NOTEBOOKS)}
    assert {f for f in tracked() if address in read(f)} <= allowed
    assert f'repository-code: "{address}"' in read("CITATION.cff")


def tracked() -> list:
    out = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return [f for f in out if f and (ROOT / f).is_file()]


def read(name: str) -> str:
    try:
        return (ROOT / name).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def test_modules_import_only_from_floors_below():
    floor = {module: i for i, modules in enumerate(FLOORS) for module in modules}
    wrong = []
    for file in sorted((ROOT / "ftbook").glob("[!_]*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom) and (node.level == 1 or (node.module or "").startswith("ftbook")):
                inner = (node.module or "").removeprefix("ftbook").strip(".")
                names = [inner.split(".")[0]] if inner else [a.name for a in node.names]
                wrong += [f"{file.stem} imports the private {a.name} of {inner}" for a in node.names if a.name.startswith("_")]
            elif isinstance(node, ast.Import):
                names = [a.name.split(".")[1] for a in node.names if a.name.startswith("ftbook.")]
            wrong += [f"{file.stem} imports {n}" for n in names if floor.get(n, 99) >= floor[file.stem]]
    assert wrong == []


def test_the_version_is_one():
    import ftbook

    assert ftbook.__version__ == settings()["version"]
    assert re.search(rf"^## {re.escape(ftbook.__version__)}\b", read("CHANGELOG.md"), flags=re.M)
    assert f"version: {ftbook.__version__}" in read("CITATION.cff")


def test_every_public_name_resolves_and_is_listed():
    import ftbook

    for name in ftbook.__all__:
        assert getattr(ftbook, name) is not None and name in dir(ftbook)
    with pytest.raises(AttributeError, match="its modules are runtime"):
        ftbook.nothing  # noqa: B018
    modules = {f.stem for f in (ROOT / "ftbook").glob("[!_]*.py")}
    assert modules == set(ftbook.PUBLIC)


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, ftbook; print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'numpy', 'transformers', 'matplotlib'}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"
    code = "import sys; from ftbook import fit; print(sorted(set(sys.modules) & {'transformers', 'torchvision', 'IPython', 'peft'}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


@each_notebook
def test_stored_sentences_and_tables_equal_the_results(path):
    from ftbook.results import render

    for output in outputs(path):
        payload = output.get("metadata", {}).get("ftbook", {})
        if "text/markdown" in output.get("data", {}) and payload and "alt" not in payload:
            assert render(payload) == "".join(output["data"]["text/markdown"])


@each_notebook
def test_outputs_belong_to_the_present_code(path):
    if path.name == "index.ipynb":
        return
    run = stored_run(path, "cpu")
    assert run, f"never run in the cpu profile: make run CH={path.stem}"
    assert run["code"] == fingerprint(path)["code"], f"its outputs are older than its code: make run CH={path.stem}"


def length(source: str) -> int:
    """Lines of a cell without its docstrings."""
    return len(re.sub(r'^\s*[rf]?""".*?"""$\n?', "", source, flags=re.S | re.M).strip("\n").split("\n"))


@each_notebook
def test_form_of_a_notebook(path):
    nb = load(path)
    assert path.stat().st_size < 2_000_000
    prose = re.sub(r"```.*?```", "", "\n\n".join("".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "markdown"), flags=re.S)
    ids = [c["id"] for c in nb["cells"]]
    assert len(set(ids)) == len(ids)
    assert len(re.findall(r"^# ", prose, flags=re.M)) == 1
    long = {c["source"][1][:50]: n for c in code_cells(path) if (n := length("".join(c["source"]))) > 40}
    assert long == {}, "cells of more than 40 lines, docstrings aside"
    assert not re.search(r"TODO|FIXME|lorem ipsum|^:::", prose, flags=re.I | re.M)
    for output in outputs(path):
        assert output["output_type"] != "error"
        kinds = set(output.get("data", {}))
        assert not kinds & {"image/png", "image/svg+xml", "image/jpeg"}, "show pictures with plot.show, which asks for alt text"
        if "<img" in "".join(output.get("data", {}).get("text/html", "")):
            assert re.search(r'<img[^>]* alt="[^"]{10,}"', "".join(output["data"]["text/html"]))


def test_the_book_lists_every_notebook_once():
    assert sorted(chapters()) == [p for p in NOTEBOOKS if p.name != "index.ipynb"]


def test_links_between_notebooks_lead_somewhere():
    glossary = {m for c in load(NBS / "A7_glossary.ipynb")["cells"] for m in re.findall(r"^### (.+)$", "".join(c["source"]), flags=re.M)}
    dead = []
    for path in NOTEBOOKS:
        text = "\n".join("".join(c["source"]) for c in load(path)["cells"] if c["cell_type"] == "markdown")
        for target, anchor in re.findall(r"\]\(([\w-]+\.ipynb)(?:#([^)]*))?\)", text):
            if not (NBS / target).is_file() or (target == "A7_glossary.ipynb" and anchor and anchor not in glossary):
                dead.append(f"{path.stem}: {target}#{anchor}")
    assert dead == []


def test_lock_files_hold_every_requirement_and_no_address():
    for name, groups in {"book": ("book",), "all": ("", *EXTRAS)}.items():
        text = read(f"requirements/{name}.lock")
        assert not re.search(r"://|\bindex-url|find-links", text)
        locked = {}
        for package, number in re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?==([^\s;\\]+)", text, flags=re.M):
            locked.setdefault(package.lower().replace("_", "-"), set()).add(number)
        for line in requirements(*groups):
            need = Requirement(line)
            found = locked.get(need.name.lower().replace("_", "-"), set())
            assert found and all(need.specifier.contains(n, prereleases=True) for n in found), line
        assert text.count("==") <= text.count("--hash=sha256:")


def test_installed_packages_satisfy_the_requirements():
    for line in requirements("", "notebook", "dev"):
        need = Requirement(line)
        assert need.specifier.contains(installed(need.name), prereleases=True), f"{line}, installed {installed(need.name)}"


def test_nothing_of_this_machine_is_committed():
    pattern = re.compile("|".join(["/wo" + "rk/", "/ro" + "ot/", "/tmp/b" + "ash_jobs", "py" + r"pi\.org", "registry" + r"\.npmjs",
                                   "deb\\." + "debian"]))
    assert [f for f in tracked() if pattern.search(read(f))] == []
