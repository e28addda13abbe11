"""Run the side-by-side measurements of benchmarks/, one script per question, and write their table."""

import os
import subprocess
import sys
import time

from .settings import ROOT

FOLDER = ROOT / "benchmarks"


def scripts(names: list) -> list:
    """The scripts asked for (all without a name)."""
    found = [s for s in sorted(FOLDER.glob("[!_]*.py")) if not names or s.stem in names]
    unknown = sorted(set(names) - {s.stem for s in found})
    if unknown or not found:
        known = ", ".join(s.stem for s in sorted(FOLDER.glob("[!_]*.py"))) or "none"
        raise SystemExit(f"bench: no script {' '.join(unknown)} in benchmarks/; there are: {known}")
    return found


def has_cuda() -> bool:
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.call([sys.executable, "-W", "ignore", "-c", code]) == 0


def main(names: list) -> int:
    chosen, failed, start = scripts(names), [], time.perf_counter()
    env = {"OMP_NUM_THREADS": "1", **os.environ}
    if any(s.stem == "gpu" for s in chosen) and not has_cuda():
        print("bench: gpu.py skipped, this machine has no CUDA device", flush=True)
        chosen = [s for s in chosen if s.stem != "gpu"]
    for script in chosen:
        print(f"bench: {script.relative_to(ROOT)}", flush=True)
        if subprocess.call([sys.executable, "-W", "ignore", str(script)], cwd=ROOT, env=env):
            failed.append(script.stem)
    if len(failed) < len(chosen) and subprocess.call([sys.executable, str(FOLDER / "_table.py")], cwd=ROOT, env=env):
        failed.append("the table")
    print(
        f"bench: {len(chosen)} scripts in {(time.perf_counter() - start) / 60:.1f} minutes"
        + (f"; failed: {', '.join(failed)}" if failed else ", table in benchmarks/README.md")
    )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
