"""All tests, as CI runs them: ruff, then pytest (export, notebooks, wheel, site, library) with the coverage of ftbook/."""
import os
import subprocess
import sys
import time

from .settings import ROOT

ELSEWHERE = ("test_notebooks", "test_site", "test_filter", "test_package", "test_repository", "test_benchmarks")


def environment() -> dict:
    """One thread a worker, and threads that wait without spinning: the workers share the cores."""
    return {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "OMP_WAIT_POLICY": "PASSIVE"}


def library(*arguments: str) -> int:
    """The tests of the modules alone, with whatever versions this environment has."""
    files = [str(f) for f in sorted((ROOT / "tests").glob("test_*.py")) if f.stem not in ELSEWHERE]
    print(f"test: the library alone, {len(files)} files, Python {sys.version.split()[0]}", flush=True)
    pytest = [sys.executable, "-m", "pytest", "-q", "-n", "2", *files, *arguments]
    return subprocess.call(pytest, cwd=ROOT, env=environment())


def main() -> int:
    if "--library" in sys.argv[1:]:
        return library(*(a for a in sys.argv[1:] if a != "--library"))
    start = time.perf_counter()
    print("test: ruff, then pytest on two workers (library, notebooks in the quick profile, wheel, site in Chromium)", flush=True)
    if subprocess.call([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT):
        raise SystemExit("test: ruff found the lines above; `ruff check --fix .` mends some of them")
    pytest = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadgroup", "--durations=15",
              "--cov=ftbook", "--cov-report=term", *sys.argv[1:]]
    code = subprocess.call(pytest, cwd=ROOT, env=environment())
    print(f"test: {'passed' if code == 0 else 'FAILED'} after {(time.perf_counter() - start) / 60:.1f} minutes", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
