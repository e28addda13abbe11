"""Sweeps of chapter 17, hyper-parameter search: `make results CH=17` (resumable).

One random search of 81 runs and a grid of 27 on 1,000 labeled images, and five repetitions of successive halving over
27 settings. The test scores of all runs are stored to measure how optimistic the choice is; they choose nothing.
"""

from functools import cache

from ftbook import data, results, runtime, search
from ftbook.search import Range

CHAPTER = "17_search"
SPACE = {
    "lr": Range(1e-4, 1e-1, log=True),
    "weight_decay": Range(1e-4, 1.0, log=True),
    "width": Range(16, 256, log=True, integer=True),
    "dropout": Range(0.0, 0.6),
}
STEPS = runtime.pick(quick=27, cpu=400)
PARTS = runtime.pick(quick=[200, 200], cpu=[1_000, 1_000])  # training and validation images
TRIALS = runtime.pick(quick=3, cpu=81)
REPEATS = runtime.pick(quick=1, cpu=5)
ABOUT = {"chapter": CHAPTER, "n": 10_000, "budget": f"{STEPS} steps of 32 images", "progress": False}


@cache
def images():
    train, valid = data.load("fashion_mnist", "train", bundled=True).split(PARTS, seed=0)[:2]
    return {"train": train, "valid": valid}, data.load("fashion_mnist", "test", bundled=True)


def run(seed, steps=STEPS, **setting):
    parts, test = images()
    return search.mlp_run(seed, **parts, test=test, steps=steps, **setting)


def halving(repeat):
    """One search by successive halving over 27 fresh settings."""
    schedule = search.halving_schedule(27, STEPS)
    found = search.successive_halving(
        run,
        search.draw(SPACE, 27, seed=1_000 + repeat),
        resource="steps",
        schedule=schedule,
        metric="valid_1000_accuracy",
        name="halving_runs",
        **{k: v for k, v in ABOUT.items() if k != "progress"},
    )
    winner = found.rungs[-1][0]
    first = {str({k: r[k] for k in SPACE}): i for i, r in enumerate(found.rungs[0])}
    rank = first[str({k: winner[k] for k in SPACE})] + 1
    return {
        "repeat": repeat,
        "cost": found.cost,
        "valid": winner["valid_1000_accuracy"],
        "test": winner["test_accuracy"],
        "rank in rung 0": rank,
        **found.best,
    }


def main():
    rows = search.run_settings(run, search.draw(SPACE, TRIALS), name="random", **ABOUT)
    print("random", max(rows, key=lambda r: r["valid_1000_accuracy"]), sum(r["seconds"] for r in rows), flush=True)
    if runtime.profile() != "quick":
        choices = {**search.grid_choices(SPACE, 3), "dropout": [0.3]}
        grid = results.sweep(run, choices, [0], name="grid", **ABOUT)
        print("grid", format(grid.best("valid_1000_accuracy"), ".1%"), flush=True)
    found = []
    for repeat in range(REPEATS):
        found.append(halving(repeat))
        results.record(CHAPTER, "halving", found)
        print(found[-1], flush=True)


if __name__ == "__main__":
    main()
