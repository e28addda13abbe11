"""Chapter 12's comparison of regularizers: `make results CH=12` (resumable; methods as arguments)."""

import sys

import torch

from ftbook import data, mlm
from ftbook.regularize import METHODS, compare_methods, sentiment_task


def main(*methods):
    torch.set_num_threads(1)
    body, tokenizer = mlm.load_bundled()
    sets = [data.load("sst2", split, bundled=True) for split in ("train", "valid", "test")]
    task = sentiment_task(body.bert, tokenizer, *sets)
    for method in methods or METHODS:
        found = compare_methods(task, chapter="12_regularize", methods=[method])
        row, error = found["test_accuracy"][method], found["test_ece"][method]
        print(method, row["strength"], format(row, ".1%"), "ECE", format(error, ".1%"), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
