"""How long is a step of the optimizers that chapter 3 builds, next to those of torch.optim?"""

import inspect

import _common as bench
import torch

NAMES = {
    "SGD": ("SGD", {"momentum": 0.9}),
    "AdaGrad": ("Adagrad", {}),
    "RMSProp": ("RMSprop", {}),
    "Adam": ("Adam", {}),
    "AdamW": ("AdamW", {}),
}
FUSED = ("SGD", "Adam", "AdamW")  # torch has one kernel for the whole rule, also on a CPU


def setting(cls, shapes, options: dict):
    """An optimizer over tensors with gradients."""
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=g).requires_grad_() for s in shapes]
    for p in tensors:
        p.grad = torch.randn(p.shape, generator=g)
    known = inspect.signature(cls).parameters
    return cls(tensors, lr=1e-3, **{k: v for k, v in options.items() if k in known})


def main(argv=None):
    args = bench.arguments(__doc__, argv)
    shapes, rows = [(10, 10) if args.tiny else (250, 400)] * (3 if args.tiny else 100), []
    try:
        from ftbook import optim
    except ImportError:
        optim = None
        print("  ftbook.optim is not there: its rows stay empty", flush=True)
    for name, (theirs, options) in NAMES.items():
        ours = getattr(optim, name, None)
        if ours is not None:
            sides = [
                setting(ours, shapes, options).step,
                setting(getattr(torch.optim, theirs), shapes, {**options, "foreach": True}).step,
            ]
            t = bench.paired(*sides, repeats=2 if args.tiny else 21)
        rows.append(
            bench.row(
                f"{name} step, 10M parameters in 100 tensors",
                target="≤ 1.05",
                values=t[:, 0] / t[:, 1] if ours else None,
                unit="",
                met=lambda v: v <= 1.05,
                peer=f"torch.optim.{theirs}(foreach=True)",
                limit="ours {:.1f} ms, torch {:.1f} ms".format(*(1e3 * bench.quartiles(side)[0] for side in t.T))
                if ours
                else "",
            )
        )
    for name in FUSED if optim is not None else ():
        theirs, options = NAMES[name]
        sides = [
            setting(lambda params, lr, n=name: optim.optimizer(n, params, lr=lr, fast=True), shapes, {}).step,
            setting(getattr(torch.optim, theirs), shapes, {**options, "fused": True}).step,
            setting(getattr(optim, name), shapes, options).step,
        ]
        t = bench.paired(*sides, repeats=2 if args.tiny else 21)
        rows.append(
            bench.row(
                f"{name} step as `fit` makes it, `optimizer({name!r}, fast=True)`",
                target="≤ 1.1",
                values=t[:, 0] / t[:, 1],
                unit="",
                met=lambda v: v <= 1.1,
                peer=f"torch.optim.{theirs}(fused=True)",
                limit="it is torch's own kernel: ours {:.1f} ms, torch {:.1f} ms; the class written out in chapter 3 "
                "{:.1f} ms".format(*(1e3 * bench.quartiles(side)[0] for side in t.T)),
            )
        )
    bench.save("optimizers", rows, args)


if __name__ == "__main__":
    main()
