"""A generated corpus as large as CoNLL-2003's training part, for questions in which only counts and lengths matter."""

import numpy as np

from ftbook import data


def tokenizer():
    """The book's own tokenizer (8,192 cased English pieces), read from the package."""
    from transformers import BertTokenizerFast

    return BertTokenizerFast.from_pretrained(data.asset("bert-mini-en"), local_files_only=True)


def lengths(n: int, seed: int = 0) -> np.ndarray:
    """Words per sentence: log-normal, median 10, mean 14.4, at most 113, as in CoNLL-2003's training part."""
    rng = np.random.default_rng(seed)
    return np.clip(np.exp(rng.normal(np.log(10.4), 0.83, n)).round(), 1, 113).astype(int)


def vocabulary(size: int, seed: int = 0) -> list[str]:
    """Words, frequent ones first: whole pieces of the tokenizer, then compounds of two or three pieces."""
    pieces = [p.strip() for p in (data.asset("bert-mini-en") / "vocab.txt").read_text(encoding="utf-8").splitlines()]
    whole = [p for p in pieces if p.isalpha() and len(p) > 1]
    parts = [p[2:] for p in pieces if p.startswith("##") and p[2:].isalpha()]
    rng, made = np.random.default_rng(seed), dict.fromkeys(whole)
    while len(made) < size:
        made[
            "".join(
                [
                    whole[rng.integers(len(whole))],
                    *(parts[i] for i in rng.integers(len(parts), size=rng.integers(1, 3))),
                ]
            )
        ] = None
    return list(made)[:size]


def conll_like(n: int = 14_041, types: int = 23_600, seed: int = 0) -> tuple[list, list]:
    """Word lists and IOB2 tag lists: word frequencies after Zipf, one word in six in an entity."""
    rng, size = np.random.default_rng(seed), lengths(n, seed)
    words = np.array(vocabulary(types, seed), object)
    chance = 1 / (np.arange(types) + 2.7)
    drawn = words[rng.choice(types, size.sum(), p=chance / chance.sum())]
    kinds = np.array(["LOC", "MISC", "ORG", "PER"])
    begin = rng.random(size.sum()) < 0.115
    inside = np.r_[False, begin[:-1] & ~begin[1:] & (rng.random(size.sum() - 1) < 0.45)]
    kind = rng.integers(4, size=size.sum())
    first = np.r_[0, size.cumsum()[:-1]]
    inside[first] = False
    kind[inside] = kind[np.flatnonzero(inside) - 1]
    tags = np.where(begin, "B-", np.where(inside, "I-", "O")).astype(object)
    tags = np.where(begin | inside, tags + kinds[kind].astype(object), tags)
    cut = size.cumsum()[:-1]
    return [a.tolist() for a in np.split(drawn, cut)], [a.tolist() for a in np.split(tags, cut)]
