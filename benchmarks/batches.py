"""How long does one epoch of in-memory batches take, without any model?"""

import _common as bench
import torch
from torch.utils.data import DataLoader, TensorDataset

from ftbook.data import Batches, Normalize


def epoch(batches, transform=None):
    for x, _ in batches:
        if transform is not None:
            transform(x)


def main(argv=None):
    args = bench.arguments(__doc__, argv)
    n = 1_280 if args.tiny else 60_000
    x, y = torch.randint(0, 256, (n, 1, 28, 28), dtype=torch.uint8), torch.randint(0, 10, (n,))
    normalize = Normalize(0.286, 0.353)
    loader = DataLoader(TensorDataset(x, y), batch_size=128, shuffle=True)

    def selected():
        order = torch.randperm(n)
        for i in range(0, n, 128):
            x.index_select(0, order[i : i + 128])
            y.index_select(0, order[i : i + 128])

    own, repeats = lambda: epoch(Batches(x, y, shuffle=True)), 2 if args.tiny else 9  # noqa: E731
    raw = bench.paired(own, lambda: epoch(loader), selected, repeats=repeats)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    shared = bench.paired(own, lambda: epoch(loader), selected, repeats=repeats)
    torch.set_num_threads(threads)
    scaled = bench.paired(
        lambda: epoch(Batches(x, y, shuffle=True, transform=normalize)),
        lambda: epoch(loader, normalize),
        repeats=repeats,
    )
    rows = []
    parts = (("raw", raw, 20), ("raw, two threads", shared, 20), ("normalized", scaled, 9))
    for what, t, target in parts:
        own, other = (1e3 * bench.quartiles(t[:, i])[0] for i in (0, 1))
        limit = f"ours {own:.1f} ms, DataLoader {other:.0f} ms"
        limit += f"; index_select alone {1e3 * bench.quartiles(t[:, 2])[0]:.1f} ms" if t.shape[1] > 2 else ""
        rows.append(
            bench.row(
                f"in-memory batches of {n:,} images, {what}",
                target=f"≥ {target}×",
                values=t[:, 1] / t[:, 0],
                met=lambda v, g=target: v >= g,
                peer="torch DataLoader",
                limit=limit,
            )
        )
    bench.save("batches", rows, args)


if __name__ == "__main__":
    main()
