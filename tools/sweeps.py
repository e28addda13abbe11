"""Run the long sweeps of a chapter: results/sweeps/NN_name.py fills results/NN_name.json, and goes on where it stopped."""

import os
import subprocess
import sys

from .settings import RESULTS, ROOT


def main(names: list) -> int:
    scripts = sorted((RESULTS / "sweeps").glob("[!_]*.py"))
    wanted = [s for s in scripts if not names or any(n in (s.stem, s.stem.split("_")[0]) for n in names)]
    if not wanted:
        known = ", ".join(s.stem for s in scripts) or "none"
        raise SystemExit(f"results: no sweep for {' '.join(names)}; chapters with sweeps: {known}")
    os.environ.setdefault("FTBOOK_PROFILE", "cpu")
    for script in wanted:
        profile = os.environ["FTBOOK_PROFILE"]
        place = "a temporary folder" if profile == "quick" else f"results/{script.stem}.json"
        print(f"results: sweeps of {script.stem} in the {profile} profile, rows into {place}", flush=True)
        code = subprocess.call([sys.executable, str(script)], cwd=ROOT)
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
