"""Chapter 15's comparisons of regularizers: `make results CH=15` (resumable; tasks or methods as arguments)."""

import sys

import torch

from ftbook import data, mlm
from ftbook.finetune import two_tasks
from ftbook.regularize import METHODS, compare_methods, digits_task, sentiment_task

DIGITS = {"search_seeds": (0, 1, 2), "seeds": (3, 4, 5, 6, 7), "epochs": 20, "batch_size": 10, "lr": 5e-3}


def digits(methods):
    "All methods on digits 5 to 9, the network pretrained on 0 to 4."
    task = digits_task(two_tasks(data.load("digits", "train"), data.load("digits", "test"), held_out=297))
    for method in methods:
        yield method, compare_methods(task, chapter="15_regularize", methods=[method], prefix="digits_", **DIGITS)


def sentiment(methods):
    "200 sentences of SST-2 with the bundled BERT."
    body, tokenizer = mlm.load_bundled()
    sets = [data.load("sst2", split, bundled=True) for split in ("train", "valid", "test")]
    task = sentiment_task(body.bert, tokenizer, *sets)
    for method in methods:
        yield method, compare_methods(task, chapter="15_regularize", methods=[method])


def main(*names):
    torch.set_num_threads(1)
    tasks = {"digits": digits, "sentiment": sentiment}
    methods = [n for n in names if n in METHODS] or list(METHODS)
    for task in [n for n in names if n in tasks] or tasks:
        for method, found in tasks[task](methods):
            row, error = found["test_accuracy"][method], found["test_ece"][method]
            print(task, method, row["strength"], format(row, ".1%"), "ECE", format(error, ".1%"), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
