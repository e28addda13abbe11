"""How long does an import take in a fresh process?"""

import subprocess
import sys

import _common as bench
import numpy as np

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


def main(argv=None):
    args = bench.arguments(__doc__, argv)
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
    bench.save("imports", rows, args, clock="CPU time")


if __name__ == "__main__":
    main()
