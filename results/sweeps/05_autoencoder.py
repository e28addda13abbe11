"""Label-efficiency sweeps of chapter 5: `make results CH=05` (resumable)."""

from functools import cache

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from ftbook import Settings, data, results, runtime
from ftbook.autoencoder import Autoencoder, ConvAutoencoder, few_label_run, pretrain

CHAPTER = "05_autoencoder"
LABELS = [10, 30, 100, 300, 1000]
RATES = [1e-3, 3e-3, 1e-2]
STRENGTHS = [0.01, 0.1, 1.0]
SEEDS = range(5)
PRETEXT = {"mlp": "none", "conv": "mask"}
BUDGET = "300 steps of 64 images, 3 learning rates tried"
PRETEXT_STEPS = 1_720  # four epochs over the 55,000 images of the pool at batch 128; the same number for a tenth of it


@cache
def images():
    pool, valid = data.load("fashion_mnist", "train").split([55_000, 5_000], seed=0)
    return pool, valid, data.load("fashion_mnist", "test")


@cache
def encoder(architecture, corruption, pool_size, seed):
    """A pretrained encoder (fresh for pool_size 0), the same number of steps whatever the pool."""
    runtime.seed_everything(seed)
    model = Autoencoder() if architecture == "mlp" else ConvAutoencoder()
    if pool_size:
        few = images()[0][:pool_size]
        epochs = -(-PRETEXT_STEPS * 128 // pool_size)
        pretrain(
            model,
            few,
            corruption=corruption,
            epochs=epochs,
            seed=seed,
            settings=Settings(schedule="cosine", max_steps=PRETEXT_STEPS, progress=False),
        )
    return model.encoder


def run(seed, architecture, method, pool, labels, lr, corruption=None, test=False):
    train, valid, test_set = images()
    body = encoder(architecture, corruption or PRETEXT[architecture], pool, seed)
    return few_label_run(
        body, train, valid, test_set if test else None, labels=labels, freeze=method == "probe", lr=lr, seed=seed
    )


def chosen(name, seeds, **fixed):
    """The best of the rates by mean validation accuracy over `seeds`, as a Row that says which."""
    choices = {k: [v] for k, v in fixed.items()}
    return results.sweep(
        run, {**choices, "lr": RATES}, seeds, chapter=CHAPTER, name=name, n=5_000, budget=BUDGET, progress=False
    ).best("valid_accuracy")


def label_efficiency():
    """Choose the rate on validation data with one seed, then score five seeds on the test images once."""
    rows = []
    for architecture in PRETEXT:
        for method, pool in [("scratch", 0)] + [(m, p) for m in ("probe", "full") for p in (5_500, 55_000)]:
            for labels in LABELS:
                fixed = {"architecture": architecture, "method": method, "pool": pool, "labels": labels}
                lr = chosen("search", [0], **fixed)["lr"]
                final = results.sweep(
                    run,
                    {k: [v] for k, v in {**fixed, "lr": lr, "test": True}.items()},
                    SEEDS,
                    chapter=CHAPTER,
                    name="final",
                    n=10_000,
                    budget=BUDGET,
                    progress=False,
                )
                rows.append(final.row("test_accuracy"))
                if (architecture, method, pool, labels) == ("conv", "full", 5_500, 30):
                    results.record(CHAPTER, "live_reference", final.row("valid_accuracy"))
                results.record(CHAPTER, "label_efficiency", rows)
                print(architecture, method, pool, labels, lr, format(rows[-1], ".1%"), flush=True)


def ablation():
    """Every pretext task on the convolutional encoder, 30 labels a class, rate chosen on validation data."""
    rows = []
    for architecture in ["conv"]:
        for corruption in ("none", "noise", "mask"):
            for method in ("probe", "full"):
                rows.append(
                    chosen(
                        "ablation_runs",
                        [0, 1, 2],
                        architecture=architecture,
                        method=method,
                        pool=55_000,
                        labels=30,
                        corruption=corruption,
                    )
                )
                results.record(CHAPTER, "ablation", rows)
                print(architecture, corruption, method, format(rows[-1], ".1%"), flush=True)


def baselines():
    """Logistic regression on pixels and on 32 principal components of the pool, three strengths tried."""
    pool, valid, test = images()
    pca = PCA(32, random_state=0).fit(pool.float().flatten(1).numpy())
    rows = []
    for features, change in (("pixels", lambda v: v), ("pca", pca.transform)):

        def xy(part, change=change):
            return change(part.float().flatten(1).numpy()), part.y.numpy()

        def fitted(labels, seed, strength, xy=xy):
            return LogisticRegression(C=strength, max_iter=100).fit(*xy(pool.per_class(labels, seed=seed)))

        for labels in LABELS:
            score = {c: np.mean([fitted(labels, s, c).score(*xy(valid)) for s in (0, 1)]) for c in STRENGTHS}
            best = max(score, key=score.get)
            values = [fitted(labels, s, best).score(*xy(test)) for s in SEEDS]
            rows.append(
                results.row(
                    "test_accuracy",
                    values,
                    n=10_000,
                    budget="3 strengths tried",
                    features=features,
                    labels=labels,
                    C=best,
                )
            )
            results.record(CHAPTER, "baselines", rows)
            print(features, labels, best, format(rows[-1], ".1%"), flush=True)


def main():
    label_efficiency()
    ablation()
    baselines()


if __name__ == "__main__":
    main()
