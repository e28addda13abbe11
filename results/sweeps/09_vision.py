"""Sweeps of chapter 9, fine-tuning CNNs: `make results CH=09` (resumable), or some of them by name.

bundled   trains ftbook/assets/cnn-small-cifar10 and writes its card
source    the network and the recipe of source 000 on CIFAR-10, at its rate and at thirty times that rate
classes   that network pretrained on five classes, fine-tuned on the other five with few labels
photos    ants and bees: rates chosen per strategy on folds of the training photos, then test photos, three seeds
memory    peak memory of every strategy, each in a process of its own
"""

import functools
import multiprocessing
import sys
import time
from pathlib import Path

import torch

from ftbook import data, images, results, runtime, vision
from ftbook.finetune import SmallCNN, fresh_head, old_accuracy, two_tasks
from ftbook.train import Settings, evaluate, fit

CHAPTER = "09_vision"
SEEDS = [1, 2, 3]
PHOTOS = runtime.pick(
    cpu={"backbone": "mobilenet_v2", "size": 128, "epochs": 3, "batch_size": 32},
    gpu={"backbone": "resnet50", "size": 224, "epochs": 10, "batch_size": 32},
)
CIFAR = runtime.pick(
    cpu={"train": 2_000, "old": 600, "labels": [10]}, gpu={"train": 40_000, "old": 4_000, "labels": [10, 50, 250]}
)
RATES = [1e-4, 1e-3, 1e-2]
STRENGTHS = [1e-3, 1e-2, 1e-1]


def bundled(epochs=24, lr=3e-3, seed=0):
    """Train the small CNN that the package ships, on all of CIFAR-10's training images that are at hand."""
    pictures, test = data.load("cifar10"), data.load("cifar10", "test")
    pool, valid = pictures.split([len(pictures) - 1_000, 1_000], seed=0)
    runtime.seed_everything(seed)
    model = SmallCNN(10, (3, 64, 128, 256))
    started = time.process_time()
    augment = vision.Augment(zoom=0.15, shift=0.06)
    history = fit(
        model,
        pool,
        valid,
        epochs=epochs,
        lr=lr,
        batch_size=128,
        metrics="accuracy",
        seed=seed,
        settings=Settings(schedule="cosine", warmup=0.1, weight_decay=0.05, transform=augment, progress=False),
    )
    facts = {
        "epochs": epochs,
        "lr": lr,
        "seed": seed,
        "minutes": (time.process_time() - started) / 60,
        "train_images": len(pool),
        "valid_accuracy": history["valid_accuracy"][-1],
        "train_accuracy": history["train_accuracy"][-1],
    }
    folder = Path(vision.__file__).parent / "assets" / "cnn-small-cifar10"
    vision.save_cnn(model, folder, test.classes, torch.float16)
    facts |= {
        "test_accuracy": evaluate(vision.load_cnn(folder), test, precision="fp32")["accuracy"],
        "n": len(test),
        "parameters": sum(p.numel() for p in model.parameters()),
        "source": pool.source,
    }
    results.record(CHAPTER, "bundled", facts)
    (folder / "README.md").write_text(CARD.format(**facts), encoding="utf-8")
    print(facts)


CARD = """---
license: mit
library_name: pytorch
pipeline_tag: image-classification
datasets: [cifar10]
---
# cnn-small-cifar10

A small image classifier that comes with ftbook: three 3 × 3 convolutions of 64, 128 and 256 channels, each with batch
normalization and ReLU, the mean over all places, a linear head; {parameters:,} parameters, stored in float16. Load it with
`ftbook.vision.load_bundled()`; images (N, 3, 32, 32) in 0 to 1 go in, logits of ten classes come out.

| | |
|---|---|
| data | CIFAR-10: {train_images:,} training images of a subset of 12,000, the other 1,000 for validation, 2,000 test images (decoded from JPEG, so a little blurred) |
| training | {epochs} epochs, batches of 128, AdamW, weight decay 0.05, peak learning rate {lr}, a tenth warm-up, then half a cosine; random zoom, shift and mirror; seed {seed} |
| hardware | one x86 CPU core with native bf16, {minutes:.1f} minutes |
| accuracy | test {test_accuracy:.1%} (n = {n:,}, the stored float16 weights), validation {valid_accuracy:.1%}, training {train_accuracy:.1%} (augmented) |
| code | `results/sweeps/09_vision.py bundled` |

**License.** The weights are released under the MIT license of this project. CIFAR-10 states no license; cite
A. Krizhevsky (2009), *Learning Multiple Layers of Features from Tiny Images*.

**Limits.** It saw a fifth of CIFAR-10 and no other images. It is meant for teaching, for tests and for work without a network, not for use.
"""  # noqa: E501


@functools.cache
def cifar():
    return two_tasks(data.load("cifar10"), data.load("cifar10", "test"), held_out=2_000)


@functools.cache
def source_data():
    pictures = data.load("cifar10")
    pool, valid = pictures.split([len(pictures) - 2_000, 2_000], seed=0)
    return pool.per_class(CIFAR["train"] // 10, seed=0), valid, data.load("cifar10", "test")


def source():
    train, valid, test = source_data()
    about = {"chapter": CHAPTER, "n": len(test), "budget": f"10 epochs, {len(train):,} images", "progress": False}

    def run(seed, lr, final=False):
        return vision.source_run(train, valid, test if final else None, lr=lr, seed=seed)[1]

    show(results.sweep(run, {"lr": [0.001, 0.03], "final": [True]}, SEEDS, name="source", **about))


@functools.cache
def pretrained(seed):
    old = cifar()["old"].per_class(CIFAR["old"], seed=seed)
    model, _ = vision.source_run(old, cifar()["old_valid"], lr=1e-3, optimizer="adamw", epochs=6, seed=seed)
    return model


def classes():
    tasks = cifar()
    about = {"chapter": CHAPTER, "budget": "120 steps of 25 images, 3 learning rates tried", "progress": False}

    def run(seed, way, lr, labels, test=False):
        original, steps = pretrained(seed), labels * 5 // 25
        model, metrics = vision.way_run(
            original,
            tasks["new"],
            tasks["valid"],
            tasks["test"] if test else None,
            way=way,
            lr=lr,
            seed=seed,
            labels=labels,
            epochs=120 // steps,
            batch_size=25,
        )
        if test and way != "scratch":
            metrics["old_accuracy"] = old_accuracy(model, original, tasks["old_test"])
        return metrics

    def untuned(seed):
        return {"old_accuracy": old_accuracy(pretrained(seed), pretrained(seed), tasks["old_test"])}

    show(results.sweep(untuned, {}, SEEDS, name="classes_before", n=len(tasks["old_test"]), **about))
    for labels in CIFAR["labels"]:
        for way in ("scratch", "head", "full"):
            at = {"way": [way], "labels": [labels]}
            found = results.sweep(
                run, {**at, "lr": [3e-4, 1e-3, 3e-3]}, [1], name="classes_search", n=len(tasks["valid"]), **about
            )
            best = min(found.summary("valid_loss", way=way, labels=labels), key=lambda r: r["mean"])["lr"]
            show(
                results.sweep(
                    run, {**at, "lr": [best], "test": [True]}, SEEDS, name="classes", n=len(tasks["test"]), **about
                )
            )


@functools.cache
def photos():
    train, test = (data.load("hymenoptera", part, size=PHOTOS["size"]) for part in ("train", "valid"))
    return train, test


@functools.cache
def original():
    return vision.backbone(PHOTOS["backbone"])


@functools.cache
def old_task():
    pictures = images.resized(data.load("cifar10").per_class(90, seed=0), 64)
    train, test = pictures.split([600, 300], seed=0)
    return vision.OldTask(original(), train, test)


SHIFTED = ("head", "full", "full, augmented")
BUDGET = f"{PHOTOS['epochs']} epochs of batches of {PHOTOS['batch_size']}, {PHOTOS['size']} pixels, 3 rates tried"
LENGTH = {k: PHOTOS[k] for k in ("epochs", "batch_size")}


def search_run(seed, way, lr):
    train, valid = vision.hold_out(photos()[0], seed)
    return vision.way_run(original(), train, valid, way=way, lr=lr, seed=seed, **LENGTH)[1]


def final_run(seed, way, lr):
    train, test = photos()
    return vision.way_run(
        original(), train, None, test, old_task(), way=way, lr=lr, seed=seed, shifted=way in SHIFTED, **LENGTH
    )[1]


def chosen(way, folds=(0,)):
    """The rate with the smallest mean validation loss over the folds."""
    if way.startswith("full,"):
        return chosen("full", folds)
    if way == "head, moving statistics":
        return chosen("head", folds)
    rates = STRENGTHS if way == "linear probe" else RATES
    found = results.sweep(
        search_run,
        {"way": [way], "lr": rates},
        folds,
        chapter=CHAPTER,
        name="photo_search",
        n=len(vision.hold_out(photos()[0], 0)[1]),
        budget=BUDGET,
        progress=False,
    )
    return min(found.summary("valid_loss", way=way), key=lambda r: r["mean"])["lr"]


def photo_sweep(ways=(*vision.WAYS, "head, moving statistics")):
    about = {"chapter": CHAPTER, "budget": BUDGET, "n": len(photos()[1]), "progress": False}
    untouched = old_task().measure(original())
    results.record(CHAPTER, "photo_before", untouched | {"n": len(old_task().test)})
    for way in ways:
        show(results.sweep(final_run, {"way": [way], "lr": [chosen(way)]}, SEEDS, name="photos", **about))


def memory_run(seed, way):
    """Peak memory above the start of a process that tunes on one batch, after one small step as warm-up."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return {"peak_mb": pool.apply(peak_of, (way,))}


def peak_of(way):
    train = photos()[0].split([PHOTOS["batch_size"], 212], seed=0)[0]
    model = fresh_head(original(), 2, 0)
    with runtime.Meter() as meter:
        vision.tune_way(
            model, train, way, lr=1e-4, epochs=4, batch_size=PHOTOS["batch_size"], settings=Settings(progress=False)
        )
    return meter.peak_mb


def memory():
    ways = [w for w in vision.WAYS if w != "full, augmented"]
    show(
        results.sweep(
            memory_run,
            {"way": ways},
            [0],
            chapter=CHAPTER,
            name="memory",
            progress=False,
            budget=f"4 steps of {PHOTOS['batch_size']} photos of {PHOTOS['size']} pixels",
        )
    )


def show(found):
    for row in found.rows[-3:]:
        print({k: v for k, v in row.items() if "loss_" not in k and "accuracy_" not in k}, flush=True)


STUDIES = {"bundled": bundled, "photos": photo_sweep, "classes": classes, "source": source, "memory": memory}

if __name__ == "__main__":
    torch.set_num_threads(int(runtime.pick(cpu=1, gpu=8)))
    for study in sys.argv[1:] or [name for name in STUDIES if name != "bundled"]:
        STUDIES[study]()
