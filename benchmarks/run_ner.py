"""Does a tagger trained here find as much as one trained by transformers' run_ner.py, and in which time?"""

import tempfile
from itertools import pairwise
from statistics import median

import _common as bench
import numpy as np
import torch

from ftbook import data, models, results, runtime
from ftbook.corpus import Corpus
from ftbook.ner import NERTagger, token_classifier
from ftbook.tags import entity_f1, to_iob2
from ftbook.train import Settings

SENTENCES, EPOCHS, BATCH, RATE, LENGTH, SEEDS = 1_000, 3, 16, 1e-4, 128, (1, 2, 3)


def ours(corpora, base, seed: int):
    """The tagger of chapter 10 as its study trains it: batches of like length, Viterbi decoding; tags and seconds."""
    train, test = corpora
    body, tokenizer = base
    runtime.seed_everything(seed)
    now, tagger = bench.clock_for(), NERTagger(token_classifier(body, train.labels), tokenizer, max_length=LENGTH)
    start = now()
    settings = Settings(schedule="linear", warmup=0.1, clip_norm=1.0, progress=False)
    tagger.fit(train, epochs=EPOCHS, lr=RATE, batch_size=BATCH, seed=seed, settings=settings)
    seconds = now() - start
    return tagger.tag(test.words), seconds


def theirs(transformers, corpora, base, seed: int):
    """run_ner.py: labels on first pieces, padding by its collator, Trainer's defaults, arg max; tags and seconds."""
    train, test = corpora
    body, tokenizer = base
    labels = list(train.labels)
    transformers.set_seed(seed)
    config = body.config.__class__(**body.config.to_dict())
    config.num_labels = len(labels)
    model = transformers.BertForTokenClassification(config)
    encoder = getattr(body, "bert", body)
    model.bert.load_state_dict(encoder.state_dict(), strict=False)
    now = bench.clock_for()
    start = now()

    def row(sentence):
        made = tokenizer(sentence.words, is_split_into_words=True, truncation=True, max_length=LENGTH, padding=False)
        words = made.word_ids()
        first = [w is not None and w != v for v, w in pairwise([None, *words])]
        tags = [labels.index(t) for t in sentence.tags]
        made["labels"] = [tags[w] if f else -100 for w, f in zip(words, first, strict=True)]
        return made

    options = transformers.TrainingArguments(
        tempfile.mkdtemp(),
        num_train_epochs=EPOCHS,
        learning_rate=RATE,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=64,
        seed=seed,
        bf16=runtime.native_bf16("cpu"),
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    collate = transformers.DataCollatorForTokenClassification(tokenizer)
    with bench.silent():
        trainer = transformers.Trainer(model, options, train_dataset=[row(s) for s in train], data_collator=collate)
        trainer.train()
        seconds = now() - start
        logits, gold, _ = trainer.predict([row(s) for s in test])
    tags = []
    for sentence, line, known in zip(test, logits.argmax(-1), gold, strict=True):
        found = [labels[i] for i in line[known != -100]]
        found += ["O"] * (len(sentence.words) - len(found))  # what truncation cut off
        tags.append(to_iob2(found, "IOB2")[0])
    return tags, seconds


def main(argv=None):
    args = bench.arguments(__doc__, argv)
    transformers, accelerate = bench.peer("transformers"), bench.peer("accelerate")
    whole = [data.load("wnut17", s, bundled=args.tiny) for s in ("train", "test")]
    n = [24, 24] if args.tiny else [SENTENCES, len(whole[1])]
    corpora = [Corpus(part[:k], part.path) for part, k in zip(whole, n, strict=True)]
    base = models.load("bert_mini_en" if args.tiny else "minilm", bundled=args.tiny)

    def run(seed, split, side):
        if side == "ftbook":
            tags, took = ours(corpora, base, seed)
        else:
            tags, took = theirs(transformers, corpora, base, seed)
        hits, pred, true = entity_f1(corpora[1].tags, tags).per_sentence().sum(1).T
        return {"test_f1": (2 * hits, pred + true), "seconds": took}

    sides = ["ftbook"] + ["run_ner.py"] * (accelerate is not None)
    about = {"chapter": "run_ner", "name": "f1", "choose": "test_f1", "n": len(corpora[1])}
    about["budget"] = f"{n[0]:,} sentences, {EPOCHS} epochs of batches of {BATCH}, rate {RATE:g}"
    about["substitute"] = "; ".join(results.substituted()) or None
    seeds = SEEDS[:1] if args.tiny else SEEDS
    study = results.study(run, [{"side": s} for s in sides], seeds=seeds, **about)
    seconds = {s: study.row("seconds", side=s)["values"] for s in sides}
    f1 = {s: study.row("test_f1", side=s) for s in sides}
    told = "; ".join(f"{s} {f1[s]:.1%}, {median(seconds[s]) / 60:.1f} minutes" for s in sides)
    gaps = study.compare("test_f1", side="run_ner.py") if len(sides) > 1 else []
    rows = [
        bench.row(
            "MiniLM on WNUT-17, F1 minus that of run_ner.py",
            target="0 in the 95 % interval",
            values=[100 * v for v in gaps[0]["values"]] if gaps else None,
            unit=" %",
            met=lambda _: gaps[0].low <= 0 <= gaps[0].high,
            peer="Trainer, run_ner.py's way",
            limit=f"{told}; difference {gaps[0]:.1%} over {len(seeds)} seeds and {len(corpora[1]):,} test sentences"
            if gaps
            else told,
            note=about["budget"],
        ),
        bench.row(
            "its minutes of training",
            target="",
            values=np.divide(seconds["run_ner.py"], seconds["ftbook"]) if gaps else None,
            peer="Trainer, run_ner.py's way",
            limit=f"threads: {torch.get_num_threads()}",
        ),
    ]
    bench.save("run_ner", rows, args)


if __name__ == "__main__":
    main()
