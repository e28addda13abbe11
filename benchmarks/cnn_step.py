"""How much faster is a training step of the source text's CNN as `fit` runs it, and does it learn the same?"""

import time

import _common as bench
import numpy as np
import torch
from torch import nn

from ftbook import Settings, data, evaluate, fit, results

EPOCHS = 3


def cnn(seed: int = 0) -> nn.Module:
    """Two convolutions of 64 and 128 channels, two linear layers: 2.2 million parameters."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(64, 128, 3, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128 * 8 * 8, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


class Clock:
    """Notes the seconds of every step but the first."""

    def __init__(self):
        self.now, self.times, self.last = bench.clock_for(), [], None

    def on_step_end(self, state):
        now = self.now()
        if self.last is not None:
            self.times.append(now - self.last)
        self.last = now


def plain_steps(images, labels, steps: int) -> float:
    """Seconds of a step of the plain loop: fp32, contiguous images, AdamW as it comes."""
    model, clock = cnn(), Clock()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps + 1):
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.on_step_end(None)
    return float(np.median(clock.times))


def our_steps(images, labels, steps: int, **options) -> float:
    """Seconds of a step of `fit`."""
    clock = Clock()
    settings = Settings(progress=False, **options)
    fit(cnn(), [(images, labels)] * (steps + 1), callbacks=[clock], settings=settings)
    return float(np.median(clock.times))


def peak_share(images, labels, tiny: bool) -> float:
    """What one step a second is of the measured bf16 matrix-product peak."""
    model = cnn()
    work = bench.flops(lambda: nn.functional.cross_entropy(model(images), labels).backward())
    return work / bench.matmul_peak("bfloat16", 128 if tiny else 2048)


def accuracy(train, valid, seed: int, **options) -> float:
    model = cnn(seed)
    fit(model, train, epochs=EPOCHS, seed=seed, settings=Settings(progress=False, **options))
    return evaluate(model, valid, precision=options.get("precision", "auto"))["accuracy"]


def main(argv=None):
    args = bench.arguments(__doc__, argv)
    size, steps, repeats, seeds = (8, 1, 1, 2) if args.tiny else (128, 2, 5, 5)
    images, labels = torch.rand(size, 3, 32, 32), torch.randint(0, 10, (size,))
    t = bench.paired(
        lambda: our_steps(images, labels, steps),
        lambda: plain_steps(images, labels, steps),
        lambda: our_steps(images, labels, steps, precision="fp32"),
        repeats=repeats,
    )
    if args.tiny:
        train = valid = data.ImageSet((255 * images).byte(), labels, [str(i) for i in range(10)])
    else:
        train, valid = data.load("cifar10", "train", bundled=True).split(0.2, seed=0)
        train, valid = train.per_class(64, seed=0), valid.per_class(min(100, int(valid.y.bincount().min())), seed=0)
    source, started = train.source, time.perf_counter()
    fast = [accuracy(train, valid, s) for s in range(seeds)]
    plain = [accuracy(train, valid, s, precision="fp32", channels_last=False) for s in range(seeds)]
    gap = results.difference(fast, plain)
    share = peak_share(images, labels, args.tiny)
    low, high = gap["interval"]
    rows = [
        bench.row(
            "CNN step as `fit` runs it by default, batch 128",
            target="≥ 2×",
            values=t[:, 1] / t[:, 0],
            met=lambda v: v >= 2,
            peer="plain fp32 loop",
            limit=f"plain {1e3 * np.median(t[:, 1]):.0f} ms, "
            f"`fit` {1e3 * np.median(t[:, 0]):.0f} ms, `fit(precision='fp32')` {1e3 * np.median(t[:, 2]):.0f} ms; "
            f"{100 * share / np.median(t[:, 0]):.0f} % of the measured matrix-product peak",
        ),
        bench.row(
            "its validation accuracy minus that of fp32",
            target="0 in the 95 % interval",
            values=100 * (np.array(fast) - plain),
            unit=" %",
            met=lambda v: low <= 0 <= high,
            peer="precision='fp32'",
            limit=f"mean {100 * gap['mean']:+.2f} points, 95 % interval [{100 * low:.2f}, "
            f"{100 * high:.2f}] over {seeds} seeds; {len(train):,} images, {EPOCHS} epochs, {len(valid):,} "
            f"validation images of {source}",
        ),
    ]
    bench.save("cnn_step", rows, args, accuracy_seconds=round(time.perf_counter() - started, 1), source=source)


if __name__ == "__main__":
    main()
