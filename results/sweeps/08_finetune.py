"""Chapter 8's comparison of fine-tuning strategies: `make results CH=08` (resumable)."""

from ftbook import data
from ftbook.finetune import compare_strategies, two_tasks


def main():
    tasks = two_tasks(data.load("fashion_mnist", "train"), data.load("fashion_mnist", "test"), held_out=5_000)
    for strategy, row in compare_strategies(tasks, chapter="08_finetune")["test_accuracy"].items():
        print(strategy, row["lr"], format(row, ".1%"))


if __name__ == "__main__":
    main()
