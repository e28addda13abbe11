"""Sweeps of chapter 3, optimizers and schedules: `make results CH=03` (resumable; names of studies as arguments).

One task throughout: short sentences of SST-2, the bundled BERT with a fresh head on the mean of its vectors. The
embeddings and the two lower layers are frozen, and their output is computed once; the two upper layers are tuned.
Hyper-parameters are chosen by the loss on validation sentences with seed 0; the chosen setting is run with the other
seeds and scored on the test sentences. A seed draws the training sentences, their order, the head and the dropout.
"""

import copy
import math
import sys
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

from ftbook import data, mlm, optim, results, runtime, train

CHAPTER = "03_optim"
SEEDS = runtime.pick(quick=[1, 2], cpu=[1, 2, 3, 4, 5])
SIZE, PIECES, BATCH, FROZEN = runtime.pick(quick=64, cpu=1_600), 24, 16, 2
SCHEDULE = optim.schedule("linear", warmup=0.1)
FEW = SEEDS[:3]
RATES = {
    "gradient descent": [3e-2, 1e-1, 3e-1],
    "momentum": [3e-3, 1e-2, 3e-2],
    "Nesterov": [3e-3, 1e-2, 3e-2],
    "AdaGrad": [1e-3, 3e-3, 1e-2],
    "RMSProp": [1e-4, 3e-4, 1e-3],
    "Adam": [3e-4, 1e-3, 3e-3],
    "AdamW": [3e-4, 1e-3, 3e-3],
    "Lion": [3e-5, 1e-4, 3e-4],
    "Muon": [3e-4, 1e-3, 3e-3],
}
BUDGET = f"{SIZE} sentences, 1 epoch in batches of {BATCH}"
MULTIPLIERS = [0.1, 1.0, 10.0, 100.0]
HEAD_RATES = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]

bundled = cache(mlm.load_bundled)


def masked(mask):
    """Additive attention mask (B, 1, 1, T)."""
    return (1.0 - mask.float())[:, None, None, :] * torch.finfo(torch.float32).min


def through(layers, hidden, mask):
    for layer in layers:
        hidden = layer(hidden, attention_mask=masked(mask))
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return hidden


@cache
@torch.no_grad()
def task():
    """Short sentences of each split: output of the frozen layers (N, T, C), mask (N, T), labels (N,)."""
    model, tokenizer = bundled()
    keys = {"padding": "max_length", "truncation": True, "max_length": PIECES, "return_tensors": "pt"}
    splits = {}
    for split in ("train", "valid", "test"):
        texts = data.load("sst2", split, bundled=runtime.profile() == "quick")
        short = [i for i, ids in enumerate(tokenizer(texts.texts)["input_ids"]) if len(ids) <= PIECES]
        short = short[: runtime.pick(quick=96, cpu=len(short))]
        rows = tokenizer([texts.texts[i] for i in short], **keys)
        ids, mask = rows["input_ids"], rows["attention_mask"]
        lower = [
            through(model.bert.encoder.layer[:FROZEN], model.bert.embeddings(part), m)
            for part, m in zip(ids.split(64), mask.split(64), strict=True)
        ]
        splits[split] = torch.cat(lower), mask, texts.y[short]
    return splits


def batches(hidden, mask, y, order, size=BATCH, pool=64):
    """Dict batches in an order, sentences of similar length together, each batch cut to its longest one."""
    cut = []
    for part in order.split(pool):
        for rows in part[mask[part].sum(1).argsort(stable=True)].split(size):
            length = int(mask[rows].sum(1).max())
            cut.append({"hidden": hidden[rows, :length], "mask": mask[rows, :length], "labels": y[rows]})
    return cut


class Classifier(nn.Module):
    """The upper layers of the bundled body, the mean of their vectors over a sentence, and a fresh linear head."""

    def __init__(self, seed):
        super().__init__()
        runtime.seed_everything(seed)
        bert = bundled()[0].bert
        self.body = copy.deepcopy(bert.encoder.layer[FROZEN:])
        self.head = nn.Linear(bert.config.hidden_size, 2)

    def forward(self, hidden, mask):
        hidden = through(self.body, hidden, mask)
        return self.head((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def score(model, split):
    hidden, mask, y = task()[split]
    order = mask.sum(1).argsort(stable=True)
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(b["hidden"], b["mask"]) for b in batches(hidden, mask, y, order, 64)])
    y = y[order]
    return {
        f"{split}_loss": F.cross_entropy(logits, y).item(),
        f"{split}_accuracy": (logits.argmax(1) == y).float().mean().item(),
    }


def run(seed, optimizer, lr, head=1.0, decay=None, final=False):
    """Fine-tune once; `head` multiplies the learning rate of the head, `decay` is the weight decay."""
    model = Classifier(seed)
    hidden, mask, y = task()["train"]
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:SIZE]
    options = {"lr": lr} | ({} if decay is None else {"weight_decay": decay})
    if head == 1.0:
        rule = optim.optimizer(optimizer, model, **options)
    else:
        groups = [{"params": model.body.parameters()}, {"params": model.head.parameters(), "lr": lr * head}]
        rule = optim.optimizer(optimizer, groups, **options)
    try:
        train.fit(
            model,
            batches(hidden, mask, y, order),
            optimizer=rule,
            seed=seed,
            settings=train.Settings(schedule=SCHEDULE, precision="auto", progress=False),
        )
    except FloatingPointError:  # diverged: scored as a model that knows nothing
        return {"valid_loss": 9.0, "valid_accuracy": 0.5} | ({"test_loss": 9.0, "test_accuracy": 0.5} if final else {})
    return score(model, "valid") | (score(model, "test") if final else {})


def told(**choice):
    found = run(**choice)
    print(*choice.values(), {k: round(v, 3) for k, v in found.items()}, flush=True)
    return found


def tuned(name, choices, seeds):
    """Seed 0 for every choice; the one with the lowest validation loss again with the other seeds, scored on test."""
    tried = math.prod(len(v) for v in choices.values())
    about = {"chapter": CHAPTER, "budget": f"{BUDGET}, {tried} settings tried", "progress": False}
    search = results.sweep(told, choices, [0], name=f"{name}.search", n=len(task()["valid"][2]), **about)
    best = min(search.rows, key=lambda r: r["valid_loss"])
    choice = {k: [best[k]] for k in choices} | {"final": [True]}
    results.sweep(told, choice, seeds, name=f"{name}.final", n=len(task()["test"][2]), **about)


def optimizers(seeds=SEEDS):
    for name, rates in RATES.items():
        tuned("optimizers", {"optimizer": [name], "lr": rates}, seeds)


def optimizers_first():
    """The first seeds of every optimizer: an interrupted run then has a whole table."""
    optimizers(FEW)


def best_rate(name="AdamW"):
    search = results.sweep(
        told, {"optimizer": [name], "lr": RATES[name]}, [0], chapter=CHAPTER, name="optimizers.search", progress=False
    )
    return min(search.rows, key=lambda r: r["valid_loss"])["lr"]


def decay():
    """Erratum 13: L2 inside Adam against decoupled decay, coefficient and rate tuned for each."""
    lr = best_rate()
    for name, coefficients in (("Adam", [0.0, 1e-4, 1e-2]), ("AdamW", [0.0, 0.1, 1.0])):
        tuned("decay", {"optimizer": [name], "lr": [lr, lr / 3], "decay": coefficients}, FEW)


def heads():
    """Erratum 18: the rate of a fresh head against the body's."""
    lr = best_rate()
    for head in MULTIPLIERS:
        tuned("heads", {"optimizer": ["AdamW"], "lr": [lr / 3, lr], "head": [head]}, FEW)


def head_only(seed, lr):
    """Train the head alone on the sentence vectors of the untouched body (no dropout: they are computed once)."""
    runtime.seed_everything(seed)
    (x, y), (x_valid, y_valid), (x_test, y_test) = (vectors()[s] for s in ("train", "valid", "test"))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:SIZE]
    head = nn.Linear(x.shape[1], 2)
    rule = optim.AdamW(head.parameters(), lr=lr)
    train.fit(
        head,
        (x[order], y[order]),
        optimizer=rule,
        batch_size=BATCH,
        seed=seed,
        settings=train.Settings(schedule=SCHEDULE, progress=False),
    )
    found = {}
    with torch.no_grad():
        for split, inputs, target in (("valid", x_valid, y_valid), ("test", x_test, y_test)):
            logits = head(inputs)
            found[f"{split}_loss"] = F.cross_entropy(logits, target).item()
            found[f"{split}_accuracy"] = (logits.argmax(1) == target).float().mean().item()
    return found


@cache
@torch.no_grad()
def vectors():
    model = Classifier(0).eval()
    found = {}
    for split, (hidden, mask, y) in task().items():
        means = [
            (through(model.body, h, m) * m[..., None]).sum(1) / m.sum(1, keepdim=True)
            for h, m in zip(hidden.split(64), mask.split(64), strict=True)
        ]
        found[split] = torch.cat(means), y
    return found


def alone():
    """Erratum 18, second half: the rate of a head that is tuned alone."""
    results.sweep(
        head_only,
        {"lr": HEAD_RATES},
        SEEDS,
        chapter=CHAPTER,
        name="alone",
        n=len(task()["test"][2]),
        budget=BUDGET,
        progress=False,
    )


STUDIES = {f.__name__: f for f in (alone, optimizers_first, heads, decay, optimizers)}


def main(*names):
    torch.set_num_threads(1)
    for name in names or STUDIES:
        print("==", name, flush=True)
        STUDIES[name]()


if __name__ == "__main__":
    main(*sys.argv[1:])
