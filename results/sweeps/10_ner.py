"""Sweeps of chapter 10, named-entity recognition: `make results CH=10` (resumable).

Every row gets five learning rates, one chosen by entity F1 on the development split with seed 0; the seeds 1, 2, 3 are
then scored on the test split once. Wrong labels are for training only: all rows are scored on the right ones.
"""

import sys
from functools import cache

from ftbook import data, mlm, results, runtime
from ftbook.ner import Corpus, bert_base_cased, tagging_run

CHAPTER = "10_ner"
SEEDS = [1, 2, 3]
SETTINGS = runtime.pick(
    quick={"sentences": 64, "epochs": 1, "batch_size": 8, "max_length": 64},
    cpu={"sentences": 1_000, "epochs": 4, "batch_size": 8, "max_length": 64},
    gpu={"sentences": None, "epochs": 3, "batch_size": 32, "max_length": 128, "dropout": 0.1},
)
RATES = {
    "full": runtime.pick(quick=[5e-4], cpu=[1e-4, 2e-4, 5e-4, 1.2e-3, 3e-3], gpu=[1e-5, 2e-5, 3e-5, 5e-5, 1e-4]),
    "head": runtime.pick(quick=[3e-3], cpu=[1e-3, 3e-3, 1e-2, 3e-2, 1e-1], gpu=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2]),
}
RATES["top"] = RATES["full"]
SIZE = SETTINGS["sentences"] or "all"
BUDGET = f"{SIZE} sentences with a name, {SETTINGS['epochs']} epochs, {len(RATES['full'])} learning rates tried"
METHODS = [
    ("random", "full", "right"),
    ("pretrained", "full", "right"),
    ("pretrained", "head", "right"),
    ("pretrained", "top", "right"),
    ("pretrained", "full", "zipped"),
    ("pretrained", "full", "all pieces"),
    ("pretrained", "full", "padded"),
    ("pretrained", "full", "noisy types"),
]


@cache
def corpora():
    name = runtime.pick(quick="wnut17", cpu="wnut17", gpu="conll2003")
    train, valid, test = (data.load(name, split, bundled=True) for split in ("train", "valid", "test"))
    if SETTINGS["sentences"]:
        train = Corpus([s for s in train if s.entities][: SETTINGS["sentences"]], train.path)
    return train, valid, test


@cache
def body_and_tokenizer():
    return bert_base_cased() if runtime.profile() == "gpu" else mlm.load_bundled()


def run(seed, init, trained, target, lr, final=False):
    train, valid, test = corpora()
    body, tokenizer = body_and_tokenizer()
    options = {k: v for k, v in SETTINGS.items() if k != "sentences"}
    _, metrics = tagging_run(
        seed,
        body=body if init == "pretrained" else body.config,
        tokenizer=tokenizer,
        train_set=train,
        valid=valid,
        test=test if final else None,
        trained=trained,
        target=target,
        lr=lr,
        **options,
    )
    return metrics


def best_rate(init, trained, target):
    """The rate with the best development F1 of one seed."""
    choices = {"init": [init], "trained": [trained], "target": [target], "lr": RATES[trained]}
    return results.sweep(run, choices, [0], name="search", **about()).best("valid_f1")["lr"]


def about():
    return {"chapter": CHAPTER, "n": len(corpora()[2]), "budget": BUDGET, "progress": False}


def study(init, trained, target):
    method = {"init": [init], "trained": [trained], "target": [target]}
    choices = {**method, "lr": [best_rate(init, trained, target)], "final": [True]}
    for row in results.sweep(run, choices, SEEDS, name="final", **about()).rows:
        print(row, flush=True)


def main(methods=METHODS):
    for method in methods:
        study(*method)


if __name__ == "__main__":
    wanted = set(sys.argv[1:])
    main([m for m in METHODS if not wanted or wanted & set(m)])
