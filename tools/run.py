"""Re-execute chapters in place, in the cpu profile unless FTBOOK_PROFILE says otherwise.

A notebook whose stored outputs belong to the present code is skipped, so a stopped run goes on where it was. A notebook is
replaced, in one step, only after all of its cells ran, and only if nothing stood in for its data. Minutes, peak memory and
the code's fingerprint go into results/NN_name.json under "run", where the chapter's line of facts reads them. In the quick
profile the cells run and nothing is stored.
"""

import argparse
import ast
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from .fingerprint import fingerprint
from .generate import is_generated
from .generate import main as generate
from .settings import NBS, RESULTS, ROOT, find, kernel_environment

os.environ.setdefault("FTBOOK_PROFILE", "cpu")
PROFILE = os.environ["FTBOOK_PROFILE"]
if PROFILE != "quick":
    os.environ.setdefault("FTBOOK_FRAMES", "1")  # what a control shows, for the page
MEMORY = "__import__('resource').getrusage(__import__('resource').RUSAGE_SELF).ru_maxrss"
SUBSTITUTED = "getattr(__import__('sys').modules.get('ftbook.results'), 'substituted', dict)()"
LEFTOVER = r"\.(tmp\w{8}|.+\.\d+-[0-9a-f]{8})\.ipynb"  # of a writer that was killed


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def stored_run(path: Path, profile: str = PROFILE) -> dict:
    """What the last run of this notebook left in results/, or {}."""
    file = RESULTS / f"{path.stem}.json"
    entry = load(file).get(profile, {}).get("run", {}) if file.exists() else {}
    return entry.get("value", entry) if isinstance(entry, dict) else {}


def is_fresh(path: Path) -> bool:
    run, now = stored_run(path), fingerprint(path)
    return (run.get("code"), run.get("library")) == (now["code"], now["library"])


def is_noise(output: dict) -> bool:
    """Progress bars and library warnings (stderr) and live widgets are for the one who runs, not for the page."""
    if output["output_type"] == "stream":
        return output["name"] == "stderr"
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def for_the_page(cell: dict) -> list:
    """Outputs of a cell that a page keeps: of what a widget drew only where the cell shows no picture or text of its own."""
    kept = [o for o in cell["outputs"] if not is_noise(o)]
    own = [o for o in kept if "live" not in o.get("metadata", {})]
    shows = any("ftbook" in o.get("metadata", {}) or o["output_type"] == "stream" for o in own)
    return [] if is_generated(cell) else own if shows else kept


def clean(nb) -> None:
    from nbdev.clean import clean_nb
    from nbdev.config import get_config

    cfg = get_config(path=ROOT)
    for cell in nb["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = for_the_page(cell)
    nb["metadata"].pop("widgets", None)
    clean_nb(
        nb,
        False,
        cfg.get("allowed_metadata_keys"),
        cfg.get("allowed_cell_metadata_keys"),
        cfg.clean_ids,
        cfg.get("allowed_out_metadata_keys"),
    )


def write(nb, path: Path) -> None:
    """One rename: a reader or a killed run never sees half a notebook."""
    import nbformat
    from fastcore.nbio import dict2nb
    from nbdev.clean import write_nb

    from ftbook.runtime import atomic_write

    with atomic_write(path) as temporary:
        write_nb(dict2nb(json.loads(nbformat.writes(nb))), str(temporary))


def remove_leftovers(folder: Path, age: float = 3600) -> None:
    """Writing takes milliseconds: a temporary file of an hour ago has no writer any more, on this machine or another."""
    for file in folder.glob(".*.ipynb"):
        if re.fullmatch(LEFTOVER, file.name) and time.time() - file.stat().st_mtime > age:
            file.unlink(missing_ok=True)


class Progress:
    """One line that says how far the chapter is, where somebody watches."""

    def __init__(self, name: str, total: int):
        self.name, self.total, self.live = name, total, sys.stdout.isatty()

    def __call__(self, cell, cell_index, **_):
        if self.live:
            print(f"\r{self.name:<24} cell {cell_index + 1}/{self.total}", end="", flush=True)


def execute(path: Path) -> dict:
    """Run one notebook and, outside the quick profile, put the result in its place. Returns minutes, peak_mb, versions."""
    import nbformat
    from nbclient import NotebookClient

    from ftbook.results import Markdown

    generate([path.stem])
    before = path.read_bytes()
    nb = nbformat.reads(before.decode(), as_version=4)
    nb.metadata["kernelspec"] = {"display_name": "python3", "language": "python", "name": "python3"}
    client = NotebookClient(
        nb,
        timeout=1_800,  # a cell: a kernel whose messages got lost would be waited for forever
        store_widget_state=True,
        resources={"metadata": {"path": str(NBS)}},
        on_cell_execute=Progress(path.stem, len(nb.cells)),
        extra_arguments=["--IPKernelApp.log_level=40"],
    )
    start = time.perf_counter()
    with client.setup_kernel(env=kernel_environment()):
        for index, cell in enumerate(nb.cells):
            client.execute_cell(cell, index)
        seconds = time.perf_counter() - start
        run = {
            "minutes": round(seconds / 60, 2),
            "peak_mb": round(peak(client)),
            **fingerprint(path),
            "seconds": round(seconds, 1),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
        }
        if PROFILE == "quick":
            return run
        refuse_stand_ins(path, value(client, SUBSTITUTED))
        refuse_edited(path, before)
        earlier = stored_run(path, PROFILE)
        keep(path, run)
    try:
        for output in stored_texts(nb):
            payload = json.loads(json.dumps(output["metadata"]["ftbook"]))  # nbformat reads dicts of a kind of its own
            output["data"]["text/markdown"] = Markdown(payload).text
        clean(nb)
        refuse_edited(path, before)
        write(nb, path)
    except BaseException:  # the file stays as it was, so the record of its run does, too
        keep(path, earlier or {**run, "code": "", "library": ""})
        raise
    return run


def stored_texts(nb) -> Iterator[dict]:
    """The outputs whose text is made of stored numbers: sentences, tables, the line of facts.

    Some are shown before the cell that stores their numbers, the minutes of this very run among them.
    """
    for cell in nb["cells"]:
        for output in cell.get("outputs", []):
            payload = output.get("metadata", {}).get("ftbook", {})
            if "text/markdown" in output.get("data", {}) and payload and "alt" not in payload:
                yield output


def refuse_edited(path: Path, before: bytes) -> None:
    if path.read_bytes() != before:
        raise RuntimeError(f"{path.name} was edited while it ran; run it again")


def refuse_stand_ins(path: Path, found: dict) -> None:
    """The page would show numbers of something else under the name of the data that its text is about."""
    if found:
        told = "\n".join(f"{name}: {reason}" for name, reason in found.items())
        raise RuntimeError(
            f"{path.name} ran with substitutes of {', '.join(found)}; its stored outputs and numbers stay as they "
            f"are. Get the data and run it again, or try it out with FTBOOK_PROFILE=quick\n{told}"
        )


def value(client, expression: str):
    """What an expression is worth in the notebook's kernel."""
    msg_id = client.kc.execute("", silent=True, user_expressions={"it": expression})
    reply = client.wait_for_reply(msg_id)
    return ast.literal_eval(reply["content"]["user_expressions"]["it"]["data"]["text/plain"])


def peak(client) -> float:
    """Largest resident size of the kernel's process so far, in MB."""
    return value(client, MEMORY) / (2**20 if sys.platform == "darwin" else 2**10)


def keep(path: Path, run: dict) -> None:
    """Through ftbook.results, so that the row carries the same provenance as every other number of the book."""
    from ftbook.results import record

    record(path.stem, "run", run)


def main(argv: list) -> int:
    parser = argparse.ArgumentParser(prog="run", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="notebooks such as 05 or A1; all without a name")
    parser.add_argument("--list", action="store_true", help="only say which are stale")
    parser.add_argument("--force", action="store_true", help="run those that are up to date, too")
    args = parser.parse_args(argv)
    paths = [find(n) for n in args.names] or sorted(NBS.glob("[!.]*.ipynb"))
    if not paths:
        raise SystemExit("run: nbs/ holds no notebook yet")
    if args.list:
        print("\n".join(f"{p.stem:<24} {'up to date' if is_fresh(p) else 'stale'}" for p in paths))
        return 0
    remove_leftovers(NBS)
    stored = "nothing is stored" if PROFILE == "quick" else "outputs stored in place"
    print(f"run: {len(paths)} notebook(s) of nbs/ in the {PROFILE} profile, {stored}", flush=True)
    failed = []
    for path in paths:
        if is_fresh(path) and not args.force:
            print(f"{path.stem:<24} up to date ({stored_run(path)['minutes']} min when it ran)", flush=True)
            continue
        clear = "\r" if sys.stdout.isatty() else ""
        try:
            run = execute(path)
        except Exception as err:
            failed.append(path.stem)
            text = str(err) if os.environ.get("VERBOSE") else "\n".join(str(err).strip().splitlines()[-25:])
            print(f"{clear}{path.stem:<24} FAILED, the file is as it was\n{text}", flush=True)
        else:
            print(f"{clear}{path.stem:<24} {run['seconds']:8.1f} s {run['peak_mb']:8.0f} MB", flush=True)
    if failed:
        print(f"run: failed: {', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
