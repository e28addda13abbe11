"""Run the long studies of a chapter: `ftbook/studies/NAME.py` fills results/NN_name.json, and goes on where it stopped.

JOBS=2 in the environment makes two runs at a time.
"""

import os
import subprocess
import sys

from .settings import ROOT, chapters, find, kernel_environment

STUDIES = ROOT / "ftbook" / "studies"


def commands() -> dict:
    """Chapter -> the command that runs its studies, in the order of the book."""
    names = {f.stem: f.stem.split("_", 1)[1] for f in chapters()}
    return {k: ["-m", "ftbook.studies", n] for k, n in names.items() if (STUDIES / f"{n}.py").is_file()}


def main(arguments: list) -> int:
    known = commands()
    wanted, names = known, arguments[1:]
    if arguments:
        chapter = find(arguments[0]).stem
        if chapter not in known:
            raise SystemExit(f"results: {chapter} has no study; chapters with studies: {', '.join(known)}")
        wanted = {chapter: known[chapter]}
    os.environ.setdefault("FTBOOK_PROFILE", "cpu")
    for chapter, command in wanted.items():
        profile = os.environ["FTBOOK_PROFILE"]
        place = "a temporary folder" if profile == "quick" else f"results/{chapter}.json"
        print(f"results: studies of {chapter} in the {profile} profile, rows into {place}", flush=True)
        jobs = ["--jobs", os.environ["JOBS"]] if os.environ.get("JOBS") else []
        code = subprocess.call([sys.executable, *command, *names, *jobs], cwd=ROOT, env=kernel_environment())
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
