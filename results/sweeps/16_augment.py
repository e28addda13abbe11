"""Sweeps of chapter 16, data augmentation: `make results CH=16` (resumable).

One learning rate per number of labels, chosen on validation data with the runs that do not augment (seed 100), serves
all methods, so the tuning favors the baseline. The seeds 0, 1 and 2 are then scored on the test data once.
"""

import sys
from functools import cache

from ftbook import augment, data, mlm, results, runtime
from ftbook.finetune import SmallCNN
from ftbook.train import Settings, evaluate, fit

CHAPTER = "16_augment"
LABELS = runtime.pick(quick=[5], cpu=[10, 50, 250])
METHODS = ["none", "flip", "crop + flip", "color", "erasing", "randaugment", "mixup", "cutmix"]
SEEDS = range(3)
RATES = [1e-3, 3e-3, 1e-2]
STEPS = runtime.pick(quick=10, cpu=500)
LONG = {"steps": runtime.pick(quick=20, cpu=1_200), "labels": LABELS[len(LABELS) // 2]}
TEXT_LABELS = runtime.pick(quick=[10], cpu=[50, 250])
TEXT_METHODS = ["none", "dropout", "swap", "embedding mixup"]
TEXT_RATES = [1e-4, 3e-4, 1e-3]
TEXT_STEPS = runtime.pick(quick=5, cpu=150)
KINDS = {
    "flip": [1.0],
    "upside down": [1.0],
    "crop": [0.125, 0.25, 0.375],
    "zoom": [0.25, 0.5, 0.75],
    "color": [0.2, 0.4, 0.8],
    "erasing": [0.1, 0.33, 0.6],
    "noise": [0.05, 0.1, 0.2],
    "randaugment": [0.1, 0.3, 0.6],
}
TEXT_SCORED = runtime.pick(quick=(20, 20), cpu=(100, 200))  # validation and test sentences per class


@cache
def images():
    pool, valid = data.load("cifar10", "train", bundled=True).split(0.16, seed=0)
    return pool, valid, data.load("cifar10", "test", bundled=True)


@cache
def texts():
    train, valid, test = (data.load("sst2", split, bundled=True) for split in ("train", "valid", "test"))
    return train, *(part.per_class(size, seed=0) for part, size in zip((valid, test), TEXT_SCORED, strict=True))


@cache
def bert():
    body, tokenizer = mlm.load_bundled()
    return {"body": body, "tokenizer": tokenizer, "vocab": mlm.vocabulary(tokenizer)}


def image_run(seed, method, labels, lr, test=False, steps=STEPS):
    train, valid, test_set = images()
    return augment.few_label_run(
        seed,
        train=train,
        valid=valid,
        test=test_set if test else None,
        method=method,
        labels=labels,
        lr=lr,
        steps=steps,
        batch_size=32,
    )


def text_run(seed, method, labels, lr, test=False):
    train, valid, test_set = texts()
    scored = {"test": test_set} if test else {"valid": valid}
    return augment.text_run(
        seed, **bert(), train=train, **scored, method=method, labels=labels, lr=lr, steps=TEXT_STEPS
    )


def rates(name, run, label_counts, tried):
    """The rate of each label count with the best validation accuracy of one run that does not augment."""
    return {
        k: results.sweep(
            run,
            {"method": ["none"], "labels": [k], "lr": tried},
            [100],
            chapter=CHAPTER,
            name=f"{name}_search",
            progress=False,
        ).best("valid_accuracy")["lr"]
        for k in label_counts
    }


def study(name, run, methods, label_counts, tried, seeds, n, budget):
    """Choose the rate of each label count, run all methods with it, store a row for every method and count so far."""
    lr = rates(name, run, label_counts, tried)
    for k in label_counts:
        choices = {"method": methods, "labels": [k], "lr": [lr[k]], "test": [True]}
        found = results.sweep(
            run, choices, seeds, chapter=CHAPTER, name=f"{name}_runs", n=n, budget=budget, progress=False
        )
        for row in found.summary("test_accuracy"):
            print(name, row["method"], row["labels"], row["lr"], format(row, ".1%"), flush=True)
    rows = results.load_sweep(CHAPTER, f"{name}_runs").summary("test_accuracy")
    results.record(CHAPTER, name, sorted(rows, key=lambda r: (r["labels"], methods.index(r["method"]))))


def longer():
    """More steps at the middle label count."""
    lr = rates("images", image_run, LABELS, RATES)[LONG["labels"]]
    choices = {
        "method": ["none", "crop + flip", "cutmix"],
        "labels": [LONG["labels"]],
        "lr": [lr],
        "test": [True],
        "steps": [LONG["steps"]],
    }
    rows = results.sweep(
        image_run,
        choices,
        range(3),
        chapter=CHAPTER,
        name="longer_runs",
        n=2_000,
        budget=f"{LONG['steps']} steps of 32 images",
        progress=False,
    ).summary("test_accuracy")
    print([(r["method"], format(r, ".1%")) for r in rows], flush=True)
    results.record(CHAPTER, "longer", rows)


def judges():
    """Three networks that saw the whole pool without augmentation, and what changes their mind."""
    pool, valid, _ = images()
    models = []
    for seed in range(3):
        runtime.seed_everything(seed)
        models.append(SmallCNN(10, (3, 16, 32, 64)))
        fit(models[-1], pool, epochs=4, lr=3e-3, seed=seed, settings=Settings(schedule="cosine", progress=False))
    scores = [evaluate(m, valid, metrics="accuracy")["accuracy"] for m in models]
    rows = []
    for method, strengths in KINDS.items():
        for s in strengths:
            pairs = [augment.changed_predictions(m, valid, augment.policy(method, strength=s)) for m in models]
            rows.append(
                results.row(
                    "changed",
                    [float((a != b).float().mean()) for a, b in pairs],
                    n=len(valid),
                    data="CIFAR-10",
                    method=method,
                    strength=s,
                )
            )
            print(method, s, format(rows[-1], ".1%"), flush=True)
    results.record(CHAPTER, "photo_judges", results.row("valid_accuracy", scores, n=len(valid)))
    results.record(CHAPTER, "photo_changes", rows)


def main(stages):
    pictures = {"seeds": SEEDS, "n": 2_000, "budget": f"{STEPS} steps of 32 images"}
    sentences = {"seeds": SEEDS, "n": 2 * TEXT_SCORED[1], "budget": f"{TEXT_STEPS} steps of 16 sentences"}
    todo = {
        "images": lambda: study("images", image_run, METHODS, LABELS[:2], RATES, **pictures),
        "judges": judges,
        "texts": lambda: study("texts", text_run, TEXT_METHODS, TEXT_LABELS[:1], TEXT_RATES, **sentences),
        "longer": longer,
        "more images": lambda: study("images", image_run, METHODS, LABELS, RATES, **pictures),
        "more texts": lambda: study("texts", text_run, TEXT_METHODS, TEXT_LABELS, TEXT_RATES, **sentences),
    }
    for stage in stages or todo:
        todo[stage]()


if __name__ == "__main__":
    main(sys.argv[1:])
