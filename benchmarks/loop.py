"""What does `fit` cost over a bare PyTorch loop, with metrics and bar on, on a model that takes no time itself?"""

import tempfile

import _common as bench
import numpy as np
import torch
from torch import nn

from ftbook import fit
from ftbook.train import build_optimizer


def batches_of(steps: int) -> list:
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(128, 8, generator=g), torch.randint(0, 10, (128,), generator=g)) for _ in range(steps)]


def bare(batches):
    """The four lines that every loop is made of, with the optimizer that `fit` makes: fused, no decay on the bias."""
    model = nn.Linear(8, 10)
    optimizer = build_optimizer("adamw", model, 1e-3)
    for x, y in batches:
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def ours(batches):
    fit(nn.Linear(8, 10), batches, metrics="accuracy")


def hugging_face(transformers, folder):
    """Trainer with its defaults (bar on, a line every 500 steps); no files, no reports."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 10)

        def forward(self, x, labels):
            logits = self.linear(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(self.train_dataset, batch_size=None)

    def run(batches):
        settings = transformers.TrainingArguments(
            folder, num_train_epochs=1, save_strategy="no", report_to="none", use_cpu=True
        )
        data = [{"x": x, "labels": y} for x, y in batches]
        with bench.silent():
            Trainer(Model(), settings, train_dataset=data).train()

    return run


def lightning(lightning, folder):
    """Trainer with its defaults: bar on; loss and accuracy logged to it."""

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 10)

        def training_step(self, batch, _):
            x, y = batch
            logits = self.linear(x)
            loss = nn.functional.cross_entropy(logits, y)
            self.log_dict({"loss": loss, "accuracy": (logits.argmax(1) == y).float().mean()}, prog_bar=True)
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)

    def run(batches):
        with bench.silent():
            trainer = lightning.Trainer(
                max_epochs=1,
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                default_root_dir=folder,
            )
            trainer.fit(Model(), torch.utils.data.DataLoader(batches, batch_size=None))

    return run


def fastai(basics):
    """Learner with its defaults: recorder and bar on."""

    def run(batches):
        loader = torch.utils.data.DataLoader(batches, batch_size=None)
        with bench.silent():
            learner = basics.Learner(
                basics.DataLoaders(loader, []),
                nn.Linear(8, 10),
                loss_func=nn.functional.cross_entropy,
                train_bn=False,
            )
            learner.fit(1, lr=1e-3)

    return run


def main(argv=None):
    args = bench.arguments(__doc__, argv)
    steps, repeats = (5, 2) if args.tiny else (250, 41)
    few, many = batches_of(1), batches_of(steps)
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "transformers": lambda m: hugging_face(m, folder),
            "lightning": lambda m: lightning(m, folder),
            "fastai.basics": fastai,
        }
        times = {}

        def measure(name: str, run) -> None:
            runs = [lambda f=f, b=b: f(b) for f in (bare, run) for b in (few, many)]
            t = 1e3 * bench.paired(*runs, repeats=repeats if run is ours else 3)
            step, start = (t[:, 1::2] - t[:, 0::2]) / (steps - 1 or 1), t[:, 0::2]
            times[name] = step[:, 1] - step[:, 0], start[:, 1] - start[:, 0], step[:, 0]

        measure("ours", ours)  # before peers are imported: after lightning's import a bare step takes twice as long
        for name, make in found.items() if not args.tiny else ():
            module = bench.peer(name)
            if module:
                measure(name.split(".")[0], make(module))
    more, start, alone = times["ours"]
    peers = [name for name in times if name != "ours"]
    others = [", ".join(f"{n} +{np.median(times[n][i]):.{d}f} ms" for n in peers) for i, d in ((0, 2), (1, 0))]
    rows = [
        bench.row(
            "loop overhead of `fit`, a step",
            target="≤ 0.03 ms",
            values=more,
            unit="ms",
            digits=3,
            met=lambda v: v <= 0.03,
            peer=others[0],
            limit=f"a bare step {np.median(alone):.3f} ms",
            note="The loss of every step is read and checked, each batch and target counted: a bare loop does neither.",
        ),
        bench.row(
            "start-up of `fit`",
            target="< 5 ms",
            values=start,
            unit="ms",
            digits=1,
            met=lambda v: v < 5,
            peer=others[1],
            limit="0",
        ),
    ]
    bench.save("loop", rows, args)


if __name__ == "__main__":
    main()
