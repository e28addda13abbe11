"""Run the long studies of a chapter: `ftbook/studies/NAME.py` fills results/NN_name.json, and goes on where it stopped."""

import os
import subprocess
import sys

from .settings import RESULTS, ROOT, chapters, find

STUDIES = ROOT / "ftbook" / "studies"
RUN = "import sys; from ftbook.studies import {name}; {name}.main(*sys.argv[1:])"


def commands() -> dict:
    """Chapter -> the command that runs its studies, in the order of the book."""
    found = {}
    for chapter in (f.stem for f in chapters()):
        name = chapter.split("_", 1)[1]
        script = RESULTS / "sweeps" / f"{chapter}.py"
        if (STUDIES / f"{name}.py").is_file():
            found[chapter] = ["-c", RUN.format(name=name)]
        elif script.is_file():
            found[chapter] = [str(script)]
    return found


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
        code = subprocess.call([sys.executable, *command, *names], cwd=ROOT)
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
