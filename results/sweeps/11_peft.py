"""Sweeps of chapter 11, parameter-efficient fine-tuning: `make results CH=11` (resumable; studies as arguments).

Every method gets the same sentences, steps and number of learning rates; the rate is chosen by entity F1 on
development sentences with seed 0; seeds 1, 2, 3 are then scored on the test sentences once. The task is chapter 10's.
"""

import copy
import math
import sys
import time
from functools import cache

import torch

from ftbook import data, mlm, peft, results, runtime
from ftbook.ner import BucketBatches, Corpus, NERTagger, token_classifier

CHAPTER = "11_peft"
SEEDS = [1, 2, 3]
SIZE = runtime.pick(quick=48, cpu=800, gpu=1_000)
EPOCHS = runtime.pick(quick=1, cpu=4, gpu=5)
SCORED = runtime.pick(quick=24, cpu=1_287)
LAYER = r".*layer\.\d+\..*dense"
METHODS = {
    "full": "full",
    "LoRA": peft.LoRA(r=8, alpha=16),
    "head": "head",
    "BitFit": peft.BitFit(r"bert\..*"),
    "(IA)³": peft.IA3(),
    "Houlsby": peft.Houlsby(size=16),
    "Pfeiffer": peft.Pfeiffer(size=16),
    "prefix": peft.PrefixTuning(length=8),
    "prompt": peft.PromptTuning(length=8),
    "DoRA": peft.DoRA(r=8, alpha=16),
    "LoRA, 4-bit base": peft.LoRA(r=8, alpha=16),
}
RATES = dict.fromkeys(METHODS, (2e-3, 6e-3, 2e-2)) | {
    "full": (1e-4, 3e-4, 1e-3), "head": (2e-2, 6e-2, 2e-1), "(IA)³": (6e-3, 2e-2, 6e-2), "BitFit": (1e-2, 3e-2, 1e-1),
    "prefix": (1e-2, 3e-2, 1e-1), "prompt": (1e-2, 3e-2, 1e-1),
}  # fmt: skip
BUDGET = f"{SIZE} sentences with an entity, {EPOCHS} epochs of batches of 16, {len(RATES['full'])} learning rates tried"


@cache
def corpora():
    train, valid, test = (data.load("wnut17", s, bundled=True) for s in ("train", "valid", "test"))
    rich = [s for s in train if s.entities]  # two sentences in three have no entity: at few steps they teach little
    return Corpus(rich[:SIZE], train.path), Corpus(valid[:SCORED], valid.path), Corpus(test[:SCORED], test.path)


body_and_tokenizer = cache(mlm.load_bundled)


def tagger(labels):
    body, tokenizer = body_and_tokenizer()
    return NERTagger(token_classifier(body, labels), tokenizer, max_length=64, stride=16)


@cache
def masked_text():
    "Masked Wikipedia text that no run trains on: what forgetting is measured with."
    _, tokenizer = body_and_tokenizer()
    documents = mlm.read_documents(data.load("wikitext2", "valid", bundled=True))[: runtime.pick(quick=20, cpu=400)]
    ids = mlm.pack(documents, tokenizer, 64)[: runtime.pick(quick=8, cpu=128)]
    return list(mlm.Masked(ids, mlm.vocabulary(tokenizer), batch_size=32, seed=0, fixed=True))


def forgetting(body):
    "Masked-language-model loss in nats of a tuned body under the pretrained output head."
    model = copy.copy(body_and_tokenizer()[0])
    model._modules = dict(model._modules) | {"bert": body}
    return float(mlm.score(model, masked_text()).loss.mean())


def run(seed, method, lr, size=SIZE, final=False, r=None, alpha=None):
    train, valid, test = corpora()
    runtime.seed_everything(seed)
    net = tagger(train.labels)
    if method.endswith("4-bit base"):
        peft.quantize(net.model, bits=4, target=r"bert\.encoder\..*(query|key|value|dense)")
    spec = METHODS[method] if r is None else peft.LoRA(r=r, alpha=alpha)
    batches = BucketBatches(net.encode(Corpus(train[:size], train.path)), 16, seed=seed)
    epochs = EPOCHS * math.ceil(SIZE / size)  # the same number of steps for fewer sentences
    started = time.process_time()
    adapter = peft.tune(net.model, spec, batches, lr=lr, epochs=epochs, seed=seed)
    found = {"train_cpu_seconds": time.process_time() - started, "valid_f1": net.evaluate(valid).f1}
    if final:
        found |= {"test_f1": net.evaluate(test).f1, "mlm_loss": forgetting(net.model.bert)}
        trained = [p for p in net.model.parameters() if p.requires_grad]
        found["trained"] = sum(p.numel() for p in trained)
        counts = adapter.counts() if adapter else {"bytes": 4 * found["trained"]}
        found["file_kb"] = counts["bytes"] / 1024
    print(method, r, lr, size, seed, {k: round(v, 4) for k, v in found.items()}, flush=True)
    return found


def about(**more):
    return {"chapter": CHAPTER, "n": len(corpora()[2]), "budget": BUDGET, "progress": False} | more


def best_rate(method):
    "The rate with the best development F1 of one seed."
    search = results.sweep(run, {"method": [method], "lr": list(RATES[method])}, [0], name="search", **about())
    rows = [r for r in search.summary("valid_f1") if r["method"] == method]
    return max(rows, key=lambda r: r["mean"])["lr"]


def methods(*names):
    for method in names or METHODS:
        choice = {"method": [method], "lr": [best_rate(method)], "final": [True]}
        results.sweep(run, choice, SEEDS, name="methods", **about())
    return results.record(CHAPTER, "mlm_before", forgetting(body_and_tokenizer()[0].bert))


def costs():
    "Processor seconds per step and memory of every method on one batch, taken in turns."
    train, _, _ = corpora()
    rounds = runtime.pick(quick=1, cpu=5)
    steps, rows = {}, []
    for method, spec in METHODS.items():
        net = tagger(train.labels)
        if method.endswith("4-bit base"):
            peft.quantize(net.model, bits=4, target=r"bert\.encoder\..*(query|key|value|dense)")
        batch = next(iter(BucketBatches(net.encode(Corpus(train[:64], train.path)), 16, shuffle=False)))
        peft.tune(net.model, spec, [batch], lr=1e-4)
        steps[method] = stepper(net.model.train(), batch)
        rows.append({"method": method, **peft.training_memory(net.model, batch)})
    seconds = {m: [] for m in METHODS}
    for _ in range(rounds):
        for method, step in steps.items():
            start = time.process_time()
            step()
            seconds[method].append(time.process_time() - start)
    relative = {m: sorted(a / b for a, b in zip(v, seconds["full"], strict=True)) for m, v in seconds.items()}
    for row in rows:
        row["relative_time"] = relative[row["method"]][rounds // 2]
    return results.record(CHAPTER, "costs", rows)


def stepper(model, batch):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)

    def step():
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def labels():
    "Full fine-tuning and LoRA with fewer sentences, at the same number of steps."
    for size in runtime.pick(quick=[24], cpu=[100]):
        for method in ("full", "LoRA"):
            choice = {"method": [method], "lr": [best_rate(method)], "size": [size], "final": [True]}
            results.sweep(run, choice, SEEDS, name="labels", **about())


def ranks():
    "Rank, alpha and learning rate of LoRA."
    choice = {
        "method": ["LoRA"],
        "r": runtime.pick(quick=[2], cpu=[1, 16]),
        "alpha": [4, 16],
        "lr": list(RATES["LoRA"][:2]),
    }
    results.sweep(run, choice, SEEDS, name="ranks", **about())


def tone(seed, method, lr):
    "Sentiment of SST-2 on the same base: the second task."
    train, valid = data.load("sst2", "train", bundled=True), data.load("sst2", "valid", bundled=True)
    body, tokenizer = body_and_tokenizer()
    runtime.seed_everything(seed)
    model = peft_classifier(body)
    n = len(train.texts)
    picked = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: 2 * SIZE].tolist()
    batches = text_batches([train.texts[i] for i in picked], train.y[picked], tokenizer)
    peft.tune(model, METHODS[method], batches, lr=lr, epochs=1, seed=seed)
    model.eval()
    with torch.no_grad():
        rows = text_batches(valid.texts, valid.y, tokenizer)
        right = sum(int((model(**b).logits.argmax(1) == b["labels"]).sum()) for b in rows)
    found = {"accuracy": right / len(valid.y)}
    print("tone", method, lr, seed, found, flush=True)
    return found


def peft_classifier(body, labels=2):
    from transformers import BertForSequenceClassification

    config = copy.deepcopy(body.config)
    config.num_labels = labels
    model = BertForSequenceClassification(config)
    model.bert.load_state_dict(body.bert.state_dict(), strict=False)
    return model


def text_batches(texts, y, tokenizer, size=16):
    "Batches of dicts, sorted by length so that little is padded."
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    cut = [order[i : i + size] for i in range(0, len(order), size)]
    mixed = torch.randperm(len(cut), generator=torch.Generator().manual_seed(0)).tolist()
    keys = dict(padding=True, truncation=True, max_length=64, return_tensors="pt", return_token_type_ids=False)
    return [dict(tokenizer([texts[i] for i in cut[k]], **keys)) | {"labels": y[cut[k]]} for k in mixed]


def tasks():
    "Sentiment with LoRA and with full fine-tuning, at the rates that named entities chose."
    for method in ("LoRA", "full"):
        choice = {"method": [method], "lr": [best_rate(method)]}
        results.sweep(tone, choice, SEEDS, name="tasks", **about(n=len(data.load("sst2", "valid", bundled=True).y)))


def spectrum():
    "Singular values of what full fine-tuning changed, per query and value matrix."
    train, _, _ = corpora()
    net = tagger(train.labels)
    start = {n: p.detach().clone() for n, p in net.model.named_parameters()}
    batches = BucketBatches(net.encode(train), 16, seed=1)
    peft.tune(net.model, "full", batches, lr=best_rate("full"), epochs=EPOCHS, seed=1)
    found = {}
    for name, p in net.model.named_parameters():
        if name.endswith(("query.weight", "value.weight")):
            change = torch.linalg.svdvals(p.detach() - start[name])
            weight = torch.linalg.svdvals(start[name])
            found[name] = {k: [round(float(x), 6) for x in v] for k, v in (("change", change), ("weight", weight))}
    results.record(CHAPTER, "spectrum_rate", best_rate("full"))
    return results.record(CHAPTER, "spectrum", found)


STUDIES = {f.__name__: f for f in (methods, costs, spectrum, tasks, labels, ranks)}


def main(*names):
    torch.set_num_threads(1)
    for name in names or STUDIES:
        print("==", name, flush=True)
        STUDIES[name]()


if __name__ == "__main__":
    main(*sys.argv[1:])
