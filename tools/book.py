"""Build the site from the stored outputs: `book.py [--builder auto|sphinx|quarto] [--out FOLDER]`."""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from .env import locked
from .settings import ROOT

INPUTS = (
    "_quarto.yml",
    "index.qmd",
    "README.md",
    "settings.ini",
    "nbs/*.ipynb",
    "nbs/zh/*.md",
    "ftbook/*.py",
    "site/**/*",
    "tools/*.py",
    "requirements/book.lock",
)
BUILD = ROOT / "build" / "book"


def state(builder: str, patterns=INPUTS) -> str:
    """Hash of everything the site is made of, or of what some patterns mean."""
    digest = hashlib.sha256(f"{builder} {sys.version}".encode())
    for pattern in patterns:
        for file in sorted(ROOT.glob(pattern)):
            if file.is_file() and "__pycache__" not in file.parts and ".ipynb_checkpoints" not in file.parts:
                digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def sphinx(out: Path) -> int:
    """Sphinx, warnings counted as errors; after an error the next build starts afresh."""
    from .finish import finish
    from .stage import STAGE, stage

    old = {f.relative_to(STAGE) for f in STAGE.rglob("*") if f.is_file()} if STAGE.exists() else set()
    new = {f.relative_to(STAGE) for f in stage() if STAGE in f.parents}
    if old != new:  # a page came or went: every page's contents list changes
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(BUILD / "doctrees", ignore_errors=True)
    index, kept = out / "searchindex.js", BUILD / "searchindex.js"
    if not kept.exists():
        shutil.rmtree(BUILD / "doctrees", ignore_errors=True)
    elif out.exists():  # finish() takes it from the site; Sphinx adds the pages that changed to it
        shutil.copy(kept, index)
    code = subprocess.call(
        [
            sys.executable,
            "-m",
            "sphinx",
            "-b",
            "html",
            "-W",
            "--keep-going",
            "-q",
            "-j",
            "auto",
            "-c",
            str(ROOT / "site"),
            "-d",
            str(BUILD / "doctrees"),
            str(STAGE),
            str(out),
        ],
        env={**os.environ, "PYDEVD_DISABLE_FILE_VALIDATION": "1"},
    )
    (out / "objects.inv").unlink(missing_ok=True)
    if code:
        shutil.rmtree(BUILD / "doctrees", ignore_errors=True)
    else:
        if index.exists():
            shutil.copy(index, kept)
        finish(out)
    return code


def quarto(out: Path) -> int:
    """Quarto; it writes into _docs/ as _quarto.yml says."""
    from .quarto import finish

    code = subprocess.call(["quarto", "render", "--output-dir", str(out), "--no-execute"], cwd=ROOT)
    if not code:
        finish(out)
    return code


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--builder", choices=["auto", "sphinx", "quarto"], default="auto")
    parser.add_argument("--out", type=Path, default=ROOT / "_docs")
    args = parser.parse_args()
    builder = args.builder
    if builder == "auto":
        builder = "quarto" if shutil.which("quarto") else "sphinx"
    elif builder == "quarto" and not shutil.which("quarto"):
        raise SystemExit("book: there is no quarto on the PATH; `make book BUILDER=sphinx` needs none")
    out, start = args.out.resolve(), time.perf_counter()
    shown = out.relative_to(ROOT) if ROOT in out.parents else out
    stamp, now = out / ".built", state(builder)
    if stamp.exists() and stamp.read_text() == now:
        print(f"book: {shown}/ is up to date ({builder}); `make serve` shows it")
        return 0
    print(f"book: building {shown}/ with {builder} from the outputs stored in nbs/ (nothing is executed)", flush=True)
    makers = state(builder, ("tools/*.py", "site/*.py"))

    def build() -> int:
        if (
            stamp.exists() and makers != (out / ".builder").read_text()
        ):  # kept pages would be as the old tools left them
            shutil.rmtree(out)
            shutil.rmtree(BUILD / "doctrees", ignore_errors=True)
        return {"sphinx": sphinx, "quarto": quarto}[builder](out)

    BUILD.mkdir(parents=True, exist_ok=True)
    if locked(str(BUILD), build):  # two builds at a time share build/book/
        raise SystemExit(f"book: {builder} found the problems above; warnings count as errors")
    from .pages import problems

    lines = problems(out)
    if lines:
        raise SystemExit("\n".join([*lines, f"book: {len(lines)} problem(s) on the built pages"]))
    (out / ".builder").write_text(makers)
    stamp.write_text(now)
    pages = len([*out.glob("nbs/*.html"), *out.glob("zh/*.html")]) + 1
    print(
        f"book: {pages} pages in {shown}/ after {time.perf_counter() - start:.0f} s; "
        f"serve them: python3 -m http.server --bind 127.0.0.1 -d {shown} 8000"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
