"""Run by test_train.py in processes of its own: one training run, its weights written to a file.

train_script.py OUT [--checkpoint FILE] [--slow SECONDS]     also under torchrun
"""

import argparse
import os
import time

import torch
from torch import nn

from ftbook.train import Checkpoint, EarlyStopping, Settings, fit, is_main


class Slow:
    """Stretches a step, so that a kill can come at any moment."""

    def __init__(self, seconds):
        self.seconds = seconds

    def on_step_end(self, run):
        time.sleep(self.seconds)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Stop(Slow):
    """Breaks the run off after a step."""

    def on_step_end(self, run):
        if run.step == self.seconds:
            raise KeyboardInterrupt


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(203, 8, generator=generator)
    return x, (x[:, 0] + x[:, 1] > 0).long() + (x[:, 2] > 0.5).long()


def with_ignored(x, y):
    """Batches in a fixed order; in every third the second of two processes has nothing to score."""
    batches = [[x[i : i + 16], y[i : i + 16].clone()] for i in range(0, len(x), 16)]
    for _, labels in batches[::3]:
        labels[1::2] = -100
    return [tuple(b) for b in batches]


def model(dropout):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 3))


def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--checkpoint")
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--stop", type=int, default=-1)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--ignored", action="store_true")
    args = parser.parse_args(argv)
    x, y = data()
    net, train = model(args.dropout), (x[:150], y[:150])
    callbacks = [Slow(args.slow), Stop(args.stop), EarlyStopping(patience=4)]
    if args.checkpoint:
        callbacks.append(Checkpoint(args.checkpoint, every=1))
    settings = Settings(
        schedule="cosine", warmup=0.1, clip_norm=1.0, accumulate=args.accumulate, device="cpu", progress=False
    )
    try:
        history = fit(
            net,
            with_ignored(*train) if args.ignored else train,
            (x[150:], y[150:]),
            epochs=6,
            lr=0.02,
            batch_size=16,
            metrics="accuracy",
            callbacks=callbacks,
            settings=settings,
        )
    except KeyboardInterrupt:
        return
    if is_main():
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in history.rows]
        torch.save({"weights": net.state_dict(), "rows": rows, "processes": history.settings["processes"]}, args.out)
        print("saved", args.out)


def one_of_two(rank, port, argv):
    """`main` as one of two processes, without torchrun."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        main(argv)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
