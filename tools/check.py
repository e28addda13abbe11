"""The tests: `python -m tools.check` runs all of them as CI does, `--quick` what one runs while working, `--library` the modules alone."""

import os
import subprocess
import sys
import time

from .settings import NBS, ROOT

ELSEWHERE = (
    "test_notebooks",
    "test_lab",
    "test_site",
    "test_filter",
    "test_package",
    "test_repository",
    "test_benchmarks",
    "test_edition",
    "test_quarto",
    "test_recall",
    "test_translate",
)


def environment() -> dict:
    """One thread a worker, and threads that wait without spinning: the workers share the cores."""
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "OMP_WAIT_POLICY": "PASSIVE"}
    return {**os.environ, **threads}


def pytest(*arguments: str) -> int:
    return subprocess.call([sys.executable, "-m", "pytest", "-q", "-n", "2", *arguments], cwd=ROOT, env=environment())


def library_files() -> list:
    """The test files of the modules, without those of the repository, the notebooks and the site."""
    return [str(f) for f in sorted((ROOT / "tests").glob("test_*.py")) if f.stem not in ELSEWHERE]


def lint() -> None:
    """ruff and mypy; stops at the first that finds something."""
    for name, command, cure in (
        ("ruff check", ["ruff", "check", "."], "`ruff check --fix .` mends some of it"),
        ("ruff format", ["ruff", "format", "--check", "--quiet", "."], "`ruff format .` mends it"),
        ("mypy", ["mypy"], "every method and argument of ftbook/ is checked"),
    ):
        if subprocess.call([sys.executable, "-m", *command], cwd=ROOT):
            raise SystemExit(f"test: {name} found the lines above; {cure}")


def changed_chapters() -> list:
    """Names of the notebooks whose stored outputs are older than their code or than the library they reach."""
    from .run import is_fresh

    return [f.stem for f in sorted(NBS.glob("[!.]*.ipynb")) if not is_fresh(f)]


def quick() -> int:
    lint()
    stale = changed_chapters()
    print(f"check: the library, the repository, and {', '.join(stale) or 'no chapter: none changed'}", flush=True)
    code = pytest(*library_files(), "tests/test_repository.py", "tests/test_filter.py")
    if stale:
        code = pytest("tests/test_notebooks.py", "-k", " or ".join(stale)) or code
    return code


def everything(arguments: list) -> int:
    print(
        "test: ruff, mypy, then pytest on two workers (library, notebooks in the quick profile, wheel, site in Chromium)",
        flush=True,
    )
    lint()
    return pytest(
        "--dist",
        "loadfile",
        "--no-loadscope-reorder",
        "--durations=15",
        "--cov=ftbook",
        "--cov-report=term",
        *arguments,
    )


def main(arguments: list) -> int:
    start = time.perf_counter()
    rest = [a for a in arguments if a not in ("--library", "--quick")]
    if "--library" in arguments:
        print(f"test: the library alone, Python {sys.version.split()[0]}", flush=True)
        code = pytest(*library_files(), *rest)
    elif "--quick" in arguments:
        code = quick()
    else:
        code = everything(rest)
    print(
        f"test: {'passed' if code == 0 else 'FAILED'} after {(time.perf_counter() - start) / 60:.1f} minutes",
        flush=True,
    )
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
