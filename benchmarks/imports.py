"""How long does an import take in a fresh process?"""

import compileall
import json
import os
import pkgutil
import subprocess
import sys

import _common as bench
import numpy as np

import ftbook

OURS = {
    "import ftbook": "import ftbook",
    "from ftbook import fit, ...": "from ftbook import fit, evaluate, predict, Batches",
}
PEERS = {
    "peft": "import peft",
    "lightning": "import lightning",
    "fastai": "from fastai.basics import Learner",
    "transformers": "from transformers import Trainer, TrainingArguments",
}
CODE = "import sys, time; {}; t = time.process_time(); {}; print(time.process_time() - t)"


def seconds(statement: str, after: str = "pass") -> float:
    """CPU seconds of one statement in a new interpreter, `after` another; nan when a module is missing."""
    command = [sys.executable, "-W", "ignore", "-c", CODE.format(after, statement)]
    done = subprocess.run(command, capture_output=True, text=True)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else float("nan")


DRAWS = "plot"  # begins with matplotlib, which the others load where something is drawn
EACH = """
import json, os, sys, time, torch
found = {}
for statement in sys.argv[1:]:
    out, into = os.pipe()
    if not os.fork():
        start = time.process_time()
        exec(statement)
        os.write(into, repr(time.process_time() - start).encode())
        os._exit(0)
    os.wait(), os.close(into)
    found[statement] = float(os.read(out, 99))
print(json.dumps(found))
"""


def beyond_torch(rounds: int) -> tuple[dict, float]:
    """Median CPU seconds of each module's import after torch's, each in a copy of one process; and matplotlib's."""
    names = [m.name for m in pkgutil.iter_modules(ftbook.__path__) if not m.name.startswith("_") and not m.ispkg]
    statements, drawing = [f"import ftbook.{name}" for name in names], "import matplotlib.pyplot"
    command = [sys.executable, "-W", "ignore", "-c", EACH, *statements, drawing]
    runs = [json.loads(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(rounds)]
    found = {s: [run[s] for run in runs] for s in (*statements, drawing)}
    return dict(zip(names, (found[s] for s in statements), strict=True)), float(np.median(found[drawing]))


def main(argv=None):
    args = bench.arguments(__doc__, argv)
    compileall.compile_dir(ftbook.__path__[0], quiet=1)  # as pip does when it installs a package
    light, whole = OURS.values()
    calls = (light, "pass"), (whole, "import torch"), ("import torch", "pass")
    light, beyond, torch = np.array([[seconds(*c) for c in calls] for _ in range(1 if args.tiny else 9)]).T
    peers = {} if args.tiny else {name: [seconds(code) for _ in range(1)] for name, code in PEERS.items()}
    listed = ", ".join(f"{name} {min(values):.1f} s" for name, values in peers.items() if values[0] == values[0])
    rows = [
        bench.row(
            "`import ftbook`",
            target="≤ 0.05 s",
            values=light,
            unit="s",
            digits=3,
            met=lambda v: v <= 0.05,
            limit="an empty module: 0 s",
        ),
        bench.row(
            "`from ftbook import fit, ...` beyond `import torch`",
            target="≤ 0.1 s",
            values=beyond,
            unit="s",
            digits=3,
            met=lambda v: v <= 0.1,
            peer=listed,
            limit=f"torch alone {np.median(torch):.2f} s",
        ),
    ]
    if hasattr(os, "fork"):
        each, matplotlib = beyond_torch(1 if args.tiny else 5)
        drawing = np.median(each.pop(DRAWS))
        slowest = max(each, key=lambda name: np.median(each[name]))
        rows.append(
            bench.row(
                f"the slowest of {len(each)} modules beyond `import torch`",
                target="≤ 0.1 s",
                values=each[slowest],
                unit="s",
                digits=3,
                met=lambda v: v <= 0.1,
                limit=f"it is `ftbook.{slowest}`; `ftbook.{DRAWS}` takes {drawing:.2f} s, matplotlib alone "
                f"{matplotlib:.2f} s; torch alone {np.median(torch):.2f} s",
            )
        )
    bench.save("imports", rows, args, clock="CPU time")


if __name__ == "__main__":
    main()
