"""What all measurements share: arguments, paired timing, peers that may be missing, fresh processes, stored rows."""

import argparse
import contextlib
import importlib
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

from ftbook import results, runtime

HERE = Path(__file__).resolve().parent
RESULTS, FIGURES = HERE / "results", HERE / "figures"
PACKAGES = ("torch", "transformers", "numpy", "peft", "accelerate", "trl", "lightning", "fastai", "datasets", "seqeval")
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}


def arguments(doc: str, argv=None) -> argparse.Namespace:
    """`--tiny` runs everything in seconds and proves nothing; `--out` says where the result file goes."""
    os.environ.update({k: v for k, v in QUIET.items() if k not in os.environ})
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes: shows that the script runs, no more")
    parser.add_argument("--out", type=Path, help="folder of the result file (default: benchmarks/results)")
    parser.add_argument("--part", help="internal: the part that runs in a fresh process")
    args = parser.parse_args(argv)
    if args.out is None:
        args.out = Path(tempfile.mkdtemp(prefix="ftbook-bench-")) if args.tiny else RESULTS
    os.environ["FTBOOK_RESULTS"] = str(args.out)
    warnings.filterwarnings("ignore")
    return args


def peer(module: str):
    """A peer's module, or None and one visible line when it is not installed."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return importlib.import_module(module)
    except ImportError:
        print(f"  {module.split('.')[0]} is not installed: its rows stay empty (pip install -e '.[bench]')", flush=True)
        return None


def clock_for(kind: str = "auto"):
    """CPU time where one thread works, since other programs do not count in it; else the wall clock."""
    if kind == "auto":
        torch = sys.modules.get("torch")
        kind = "cpu" if torch is not None and torch.get_num_threads() == 1 else "wall"
    return time.process_time if kind == "cpu" else time.perf_counter


def paired(*sides, repeats: int = 15, warmup: int = 1, clock: str = "auto") -> np.ndarray:
    """Seconds of several functions, taken in turns, A B A B, every second round in reverse: (repeats, sides).

    A function may return its own seconds (a float) when only a part of it is to be measured.
    """
    now, out = clock_for(clock), np.empty((repeats, len(sides)))
    for side in sides:
        for _ in range(warmup):
            side()
    for i in range(repeats):
        order = range(len(sides)) if i % 2 == 0 else reversed(range(len(sides)))
        for j in order:
            start = now()
            own = sides[j]()
            out[i, j] = own if isinstance(own, float) else now() - start
    return out


def quartiles(values) -> list[float]:
    """[median, first quartile, third quartile]."""
    values = np.asarray(values, float)
    return [float(np.quantile(values, q)) for q in (0.5, 0.25, 0.75)]


def row(
    what: str,
    *,
    target: str,
    values=None,
    unit: str = "×",
    digits: int = 2,
    met=None,
    peer: str = "",
    limit: str = "",
    note: str = "",
) -> dict:
    """One line of the table; `met` gets the median and says whether the target is reached."""
    measured = quartiles(values) if values is not None and len(values) else None
    reached = bool(met(measured[0])) if measured and callable(met) else None
    line = {
        "what": what,
        "target": target,
        "measured": measured,
        "unit": unit,
        "digits": digits,
        "peer": peer,
        "limit": limit,
        "met": reached,
        "note": note,
    }
    print(
        f"  {what}: {shown(line)} (target {target or 'none'}; { {True: 'met', False: 'NOT met', None: '-'}[reached] })"
        f"{'; limit: ' + limit if limit else ''}",
        flush=True,
    )
    return line


def shown(line: dict) -> str:
    """'2.31× [2.20, 2.40]' for a measured line."""
    if not line["measured"]:
        return "not measured"
    m, a, b = (f"{v:,.{line['digits']}f}" for v in line["measured"])
    unit = line["unit"]
    return f"{m}{unit if unit in ('×', ' %') else ' ' + unit if unit else ''} [{a}, {b}]"


def machine() -> dict:
    """Where the numbers come from."""
    import torch

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return {
        "device": runtime.device_name("cpu"),
        "threads": torch.get_num_threads(),
        "load": round(load, 1),
        "python": platform.python_version(),
        "system": platform.system(),
        "versions": runtime.versions(*PACKAGES),
        "native bf16": runtime.native_bf16("cpu"),
    }


def save(name: str, rows: list, args, **extra) -> None:
    """Store what was measured; `make bench` turns all of it into the table."""
    seconds = round(time.perf_counter() - STARTED, 1)
    content = {"rows": rows, "tiny": args.tiny, "seconds": seconds, "machine": machine(), **extra}
    results.record(name, "measured", content, substitute="; ".join(results.substituted()) or None)
    print(f"  {name}: {seconds:.0f} s", flush=True)


STARTED = time.perf_counter()


def in_fresh_process(script: str, part: str, args, env=()) -> dict:
    """Run `script --part NAME` in a new interpreter and read the JSON of its last line."""
    command = [sys.executable, "-W", "ignore", script, "--part", part] + (["--tiny"] if args.tiny else [])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **dict(env)}, cwd=HERE.parent)
    if done.returncode:
        raise RuntimeError(f"{Path(script).name} --part {part} failed:\n{done.stderr[-1500:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


@contextlib.contextmanager
def silent():
    """No output of peers inside."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def bert(
    hidden: int = 384,
    layers: int = 6,
    heads: int = 6,
    vocab: int = 8192,
    positions: int = 512,
    labels: int = 9,
    dropout: float = 0.1,
    seed: int = 0,
):
    """A BERT token classifier with random weights: no download, the same work as a pretrained one."""
    import torch
    from transformers import BertConfig, BertForTokenClassification

    torch.manual_seed(seed)
    return BertForTokenClassification(
        BertConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * hidden,
            max_position_embeddings=positions,
            num_labels=labels,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )


def token_batch(rows: int, length: int, vocab: int = 8192, labels: int = 9, seed: int = 0) -> dict:
    """Random pieces, full rows, a label on every piece."""
    import torch

    g = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(5, vocab, (rows, length), generator=g),
        "attention_mask": torch.ones(rows, length, dtype=torch.long),
        "labels": torch.randint(0, labels, (rows, length), generator=g),
    }


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    torch = sys.modules["torch"]
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul_peak(dtype: str, n: int) -> float:
    """Measured floating-point operations a second of an n × n matrix product: the ceiling for every model."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(n, n, device=device, dtype=getattr(torch, dtype)) for _ in range(2))

    def products():
        for _ in range(4):
            a @ b
        synchronize()

    clock = "wall" if device == "cuda" else "auto"  # a GPU's work is not in the processor's time
    return 4 * 2 * n**3 / float(paired(products, repeats=5, clock=clock).min())


def flops(step) -> float:
    """Floating-point operations of a function, counted by PyTorch."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())
