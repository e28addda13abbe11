"""Chapter 7's comparison of fine-tuning strategies: `make results CH=07` (resumable)."""

from functools import cache

import torch

from ftbook import data, results
from ftbook.finetune import STRATEGIES, old_accuracy, pretrained_cnn, take_classes, transfer_run

CHAPTER = "07_finetuning_strategies"
OLD, NEW = range(5), range(5, 10)
LABELS, EPOCHS = 20, 24
RATES = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
HEAD_RATES, BODY_RATES = [1e-3, 1e-2, 1e-1], [1e-4, 1e-3, 1e-2]
SEARCH_SEEDS, SEEDS = range(1), range(5)
BUDGET = "120 steps of 20 images, 5 learning rates tried"


@cache
def images():
    """Old classes to pretrain on, new classes to tune on; 1,000 validation images, 2,500 test images of each kind."""
    pool, valid = data.load("fashion_mnist", "train").split([55_000, 5_000], seed=0)
    test = data.load("fashion_mnist", "test")
    return {
        "old": take_classes(pool, OLD),
        "new": take_classes(pool, NEW),
        "valid": take_classes(valid, NEW)[:1000],
        "test": take_classes(test, NEW)[:2500],
        "old_test": take_classes(test, OLD)[:2500],
    }


@cache
def pretrained(seed):
    """The network trained on the five old classes; another seed draws other images and other weights."""
    return pretrained_cnn(images()["old"], seed=seed)


def run(seed, strategy, lr, head_lr=None, test=False):
    d = images()
    more = {"test": d["test"], "old": d["old_test"]} if test else {}
    return transfer_run(
        pretrained(seed), d["new"], d["valid"], **more, strategy=strategy, lr=lr, head_lr=head_lr,
        labels=LABELS, epochs=EPOCHS, seed=seed,
    )  # fmt: skip


def swept(name, choices, seeds, n):
    return results.sweep(run, choices, seeds, chapter=CHAPTER, name=name, n=n, budget=BUDGET, progress=False)


def before():
    """What the old classes had before any fine-tuning."""
    def score(seed):
        return {"old_accuracy": old_accuracy(pretrained(seed), pretrained(seed), images()["old_test"])}

    made = results.sweep(score, {}, SEEDS, chapter=CHAPTER, name="pretrained", n=2_500, progress=False)
    print("old classes, before", format(made.summary("old_accuracy")[0], ".1%"), flush=True)


def strategies():
    """Choose each strategy's rate on validation images with one seed; then five seeds, test images scored once."""
    rows = {"test_accuracy": [], "old_accuracy": [], "valid_accuracy": [], "trained": []}
    for strategy in ["scratch", *STRATEGIES]:
        search = swept("search", {"strategy": [strategy], "lr": RATES}, SEARCH_SEEDS, 1000)
        lr = search.best("valid_accuracy")["lr"]
        final = swept("final", {"strategy": [strategy], "lr": [lr], "test": [True]}, SEEDS, 2_500)
        for metric in set(rows) & set(final.metrics):
            rows[metric].append(final.row(metric))
        print(strategy, lr, format(final.row("test_accuracy"), ".1%"), flush=True)
    for metric, made in rows.items():
        results.record(CHAPTER, f"strategies_{metric}", made)


def rates():
    """Head rate against body rate, everything trained: validation accuracy."""
    choices = {"strategy": ["full"], "lr": BODY_RATES, "head_lr": HEAD_RATES}
    grid = swept("rates", choices, range(3), 1000)
    print(grid.best("valid_accuracy"), flush=True)


def main():
    torch.set_num_threads(1)
    before()
    strategies()
    rates()


if __name__ == "__main__":
    main()
