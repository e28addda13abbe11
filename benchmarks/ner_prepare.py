"""How long does it take to turn tagged sentences into pieces and aligned labels, and is the result the same?"""

import _common as bench
import numpy as np
from _corpus import conll_like, tokenizer

from ftbook.ner import WordPieces, encode
from ftbook.tags import label_list

LABELS = label_list(["LOC", "MISC", "ORG", "PER"])
LENGTH, STRIDE = 128, 32


def run_ner(datasets, words, tags, tok):
    """The way of transformers' run_ner.py: a batched map over a table, a Python loop over word_ids for the labels."""
    number = {t: i for i, t in enumerate(LABELS)}
    table = datasets.Dataset.from_dict({"tokens": words, "ner_tags": [[number[t] for t in s] for s in tags]})

    def tokenize_and_align(examples):
        out = tok(examples["tokens"], padding=False, truncation=True, max_length=LENGTH, is_split_into_words=True)
        out["labels"] = []
        for i, labels in enumerate(examples["ner_tags"]):
            before, row = None, []
            for word in out.word_ids(batch_index=i):
                row.append(-100 if word is None or word == before else labels[word])
                before = word
            out["labels"].append(row)
        return out

    return lambda: table.map(tokenize_and_align, batched=True, load_from_cache_file=False)


def windows(words, tags, tok):
    """Ids and labels of overlapping windows as the tokenizer itself cuts them."""
    out = tok(
        words,
        truncation=True,
        max_length=LENGTH,
        stride=STRIDE,
        is_split_into_words=True,
        return_overflowing_tokens=True,
    )
    number, rows = {t: i for i, t in enumerate(LABELS)}, []
    for i, sentence in enumerate(out["overflow_to_sample_mapping"]):
        ids = out.word_ids(i)
        first = [w is not None and (j == 0 or ids[j - 1] != w) for j, w in enumerate(ids)]
        rows.append([number[tags[sentence][w]] if f else -100 for w, f in zip(ids, first, strict=True)])
    return out["input_ids"], rows


def rows_of(encoded) -> tuple[list, list]:
    """Ids and labels of an encoded corpus as lists."""
    cut = encoded.starts[1:-1]
    return [a.tolist() for a in np.split(encoded.ids, cut)], [a.tolist() for a in np.split(encoded.labels, cut)]


def same(own, ids, labels) -> bool:
    """Equal ids; equal labels, but for a window's first piece when its word began in the window before."""
    own_ids, own_labels = own
    return own_ids == list(ids) and all(
        a == b
        or [x for x, y in zip(a, b, strict=True) if x != -100 or y == -100]
        == [y for x, y in zip(a, b, strict=True) if x != -100 or y == -100]
        for a, b in zip(own_labels, labels, strict=True)
    )


def main(argv=None):
    args = bench.arguments(__doc__, argv)
    words, tags = conll_like(200 if args.tiny else 14_041)
    tok, datasets = tokenizer(), bench.peer("datasets")
    sides = [lambda: encode(words, WordPieces(tok), tags, LABELS, max_length=LENGTH, windows=False)]
    own = rows_of(sides[0]())
    checks = {
        "windows": same(
            rows_of(encode(words, WordPieces(tok), tags, LABELS, max_length=LENGTH, stride=STRIDE)),
            *windows(words, tags, tok),
        )
    }
    if datasets:
        datasets.disable_progress_bars()
        sides.append(run_ner(datasets, words, tags, tok))
        table = sides[1]()
        checks["run_ner.py"] = own == (list(map(list, table["input_ids"])), list(map(list, table["labels"])))
    if not all(checks.values()):
        raise AssertionError(f"ids or labels differ from the peer's: {checks}")
    known = WordPieces(tok)
    encode(words, known)
    sides.insert(1, lambda: encode(words, known, tags, LABELS, max_length=LENGTH, windows=False))
    t = bench.paired(*sides, repeats=1 if args.tiny else 7)
    own_ms, warm_ms = (1e3 * bench.quartiles(t[:, i])[0] for i in (0, 1))
    rows = [
        bench.row(
            f"NER preparation, {len(words):,} sentences",
            target="≥ 10×",
            values=t[:, 2] / t[:, 0] if datasets else None,
            digits=1,
            met=lambda v: v >= 10,
            peer="datasets.map as in run_ner.py",
            limit=f"ours {own_ms:.0f} ms; {warm_ms:.0f} ms when all words are known",
            note=f"Ids and labels equal to {' and '.join(checks)}: checked here. Generated sentences, lengths and "
            "vocabulary size like CoNLL-2003's.",
        )
    ]
    bench.save("ner_prepare", rows, args)


if __name__ == "__main__":
    main()
