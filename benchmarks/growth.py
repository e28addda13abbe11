"""How do time and memory grow? One figure each: tokens, rank, adapters, corpus, processes, steps."""

import os
import socket
import subprocess
import sys
import time

import _common as bench
import matplotlib
import numpy as np
import torch
from _corpus import conll_like, tokenizer
from adapters import twin
from lora_step import step_of

from ftbook import Settings, fit, plot
from ftbook import peft as lora
from ftbook.ner import WordPieces, encode
from ftbook.runtime import Meter, atomic_write

matplotlib.use("Agg")


def draw(name: str, part: dict, folder) -> None:
    """Write one SVG from the numbers of a part."""
    series = {k: bands(v) if isinstance(v[0], list) else v for k, v in part["series"].items()}
    x, log = part["x"], part.get("log", "")
    ax = plot.curves(series, x, xlabel=part["xlabel"], ylabel=part["ylabel"], logx="x" in log, logy="y" in log)
    ax.set_xticks(x, [f"{v:,}" for v in x])
    ax.minorticks_off()
    if "y" not in log:
        ax.set_ylim(bottom=0)
    with atomic_write(folder / f"growth_{name}.svg") as file:
        file.write_bytes(plot.figure_bytes(ax.figure))
    matplotlib.pyplot.close(ax.figure)


def best(run, repeats: int) -> list[float]:
    """[median, q1, q3] of the seconds of a function after one warm-up call."""
    return bench.quartiles(bench.paired(run, repeats=repeats)[:, 0])


def bands(found: list) -> tuple:
    """(median, q1, q3) rows -> what plot.curves takes."""
    return tuple(np.array(column) for column in zip(*found, strict=True))


def slope(x, y) -> float:
    """Exponent of growth between the last two points: 1 is linear."""
    return float(np.log(y[-1] / y[-2]) / np.log(x[-1] / x[-2]))


def tokens(args) -> dict:
    lengths, rows = ([8, 16], 2) if args.tiny else ([16, 32, 64, 128, 256, 512], 4)
    model = bench.bert(32, 2, 2, 100) if args.tiny else bench.bert(256, 4, 4)
    step = lambda n: step_of(model.train(), bench.token_batch(rows, n, 100))  # noqa: E731
    found = [[1e3 * v for v in best(step(n), 1 if args.tiny else 3)] for n in lengths]
    return {
        "x": lengths,
        "series": {"training step": found},
        "xlabel": f"tokens in a row ({rows} rows)",
        "ylabel": "milliseconds a step",
        "log": "xy",
        "says": f"Step time against tokens in a row (BERT 4×256, {rows} rows): the last "
        f"doubling multiplies it by {found[-1][0] / found[-2][0]:.2f}; attention's share grows with the square.",
    }


def rank(args) -> dict:
    ranks = [1, 4] if args.tiny else [1, 4, 16, 64, 256]
    model = bench.bert(32, 2, 2, 100, dropout=0.0) if args.tiny else bench.bert(256, 4, 4, dropout=0.0)
    batch = bench.token_batch(*((2, 8) if args.tiny else (8, 64)), 100)
    found = []
    for r in ranks:
        adapted = lora.apply(twin(model), lora.LoRA("all-linear", r=r), head=()).model.train()
        found.append([1e3 * v for v in best(step_of(adapted, batch), 1 if args.tiny else 5)])
    return {
        "x": ranks,
        "series": {"LoRA step": found},
        "xlabel": "rank r, all linear layers",
        "ylabel": "milliseconds a step",
        "log": "x",
        "says": f"LoRA step against rank (BERT 4×256, 8×64 tokens): from r = {ranks[0]} to "
        f"r = {ranks[-1]} it grows by {100 * (found[-1][0] / found[0][0] - 1):.0f} %.",
    }


def adapters(args) -> dict:
    counts = [1, 2] if args.tiny else [1, 2, 4, 8, 16]
    model = bench.bert(32, 2, 2, 100, dropout=0.0) if args.tiny else bench.bert(256, 4, 4, dropout=0.0)
    batch = bench.token_batch(*((2, 8) if args.tiny else (8, 64)), 100)
    held, steps, switches = twin(model), [], []
    for n in range(1, counts[-1] + 1):
        adapter = lora.apply(held, lora.LoRA("all-linear", r=8), name=f"a{n}", head=())
        if n in counts:
            switches.append([1e3 * v for v in best(adapter.activate, 2 if args.tiny else 9)])
            steps.append([1e3 * v for v in best(step_of(held.train(), batch), 1 if args.tiny else 5)])
    return {
        "x": counts,
        "series": {"training step": steps, "switch": switches},
        "xlabel": "LoRA adapters in one model, one of them active",
        "ylabel": "milliseconds",
        "log": "xy",
        "says": f"Adapters held by one model: with {counts[-1]} "
        f"instead of 1 a step takes {steps[-1][0] / steps[0][0]:.2f} times as long, a switch {switches[-1][0]:.1f} ms.",
    }


def preparation(args) -> dict:
    sizes = [100, 200] if args.tiny else [10_000, 30_000, 100_000, 300_000, 1_000_000]
    (words, _), tok, found, memory = conll_like(min(sizes[-1], 100_000)), tokenizer(), [], []
    for n in sizes:
        corpus = (words * (1 + n // len(words)))[:n]
        now = bench.clock_for()
        with Meter("cpu") as meter:
            start = now()
            rows = encode(corpus, WordPieces(tok))
            found.append(now() - start)
        memory.append(1e6 * meter.peak_mb / n)
        del rows
    return {
        "x": sizes,
        "series": {"encode": found},
        "xlabel": "sentences",
        "ylabel": "seconds",
        "log": "xy",
        "bytes a sentence": memory,
        "says": f"Preparation against corpus size: "
        f"{sizes[-1]:,} sentences in {found[-1]:.1f} s, growth to the power {slope(sizes, found):.2f} at the end; peak "
        f"memory {memory[-1] / 1000:.2f} kB a sentence (at {sizes[-2]:,} {memory[-2] / 1000:.2f}).",
    }


def workload(tiny: bool) -> float | None:
    """Run by torchrun: seconds of `fit` on the same work, whatever the number of processes."""
    from ftbook.train import is_main

    torch.set_num_threads(1)
    torch.manual_seed(0)
    n, width = (64, 16) if tiny else (2_048, 512)
    model = torch.nn.Sequential(*(m for _ in range(4) for m in (torch.nn.Linear(width, width), torch.nn.ReLU())))
    x, y = torch.randn(n, width), torch.randint(0, 10, (n,))
    fit(model, (x, y), batch_size=256, settings=Settings(precision="fp32", max_steps=2, progress=False))
    start = time.perf_counter()
    fit(model, (x, y), epochs=1 if tiny else 3, batch_size=256, settings=Settings(precision="fp32", progress=False))
    return time.perf_counter() - start if is_main() else None


def processes(args) -> dict:
    counts, found = [1, 2], []
    for n in counts:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(n),
            "--master-port",
            str(port),
            __file__,
            "--part",
            "workload",
        ] + ["--tiny"] * args.tiny
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode or not done.stdout.strip():
            raise RuntimeError(f"torchrun with {n} processes failed:\n{done.stderr[-1500:]}")
        found.append(float(done.stdout))
    return {
        "x": counts,
        "series": {"fit": found},
        "xlabel": "processes under torchrun, one thread each",
        "ylabel": "seconds for the same work",
        "says": f"`fit` under torchrun, the same batches shared out: 2 processes take "
        f"{found[1] / found[0]:.2f} of the time of 1 (0.5 would be perfect).",
    }


def memory(args) -> dict:
    steps = [2, 4] if args.tiny else [50, 100, 200, 400, 800]
    x, y = torch.randn(1024, 256), torch.randint(0, 10, (1024,))
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    fit(model, (x, y), batch_size=64, metrics="accuracy", settings=Settings(max_steps=2, progress=False))
    peaks = []
    for n in steps:
        with Meter("cpu") as meter:
            fit(
                model,
                (x, y),
                epochs=n,
                batch_size=64,
                metrics="accuracy",
                settings=Settings(max_steps=n, progress=False),
            )
        peaks.append(meter.peak_mb)
    return {
        "x": steps,
        "series": {"fit": peaks},
        "xlabel": "training steps",
        "ylabel": "peak memory above the start (MB)",
        "log": "x",
        "says": f"Peak memory of `fit` against steps: {peaks[0]:.1f} MB at {steps[0]}, "
        f"{peaks[-1]:.1f} MB at {steps[-1]}: it stays flat."
        if peaks[-1] < peaks[0] + 8
        else f"Peak memory of `fit` grows from {peaks[0]:.1f} to {peaks[-1]:.1f} MB.",
    }


PARTS = {f.__name__: f for f in (tokens, rank, adapters, preparation, processes, memory)}


def main(argv=None):
    args = bench.arguments(__doc__, argv)
    if args.part == "workload":
        if (seconds := workload(args.tiny)) is not None:  # one process speaks: lines of two could mix
            print(seconds, flush=True)
        return
    found = {}
    for name, part in PARTS.items():
        if name == "processes" and not torch.distributed.is_available():
            continue
        found[name] = part(args)
        draw(name, found[name], args.out if args.tiny else bench.FIGURES)
        print(f"  {found[name]['says']}", flush=True)
    bench.save("growth", [], args, figures=found)


if __name__ == "__main__":
    main()
