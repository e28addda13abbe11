"""How long do entity-level scores take, and do they agree with seqeval?"""

import _common as bench
import numpy as np
from _corpus import conll_like
from ner_prepare import LABELS

from ftbook.tags import entity_f1


def largest_gap(a: dict, b: dict) -> float:
    """The largest difference between two reports with the same keys."""
    if a.keys() != b.keys():
        raise AssertionError(f"reports differ in their rows: {sorted(a)} and {sorted(b)}")
    return max(abs(float(a[k][m]) - float(b[k][m])) for k in a for m in ("precision", "recall", "f1-score", "support"))


def middle(run) -> float:
    """Median seconds of five calls, so that one round compares a long run with a short one that is as well known."""
    return float(np.median(bench.paired(run, repeats=5, warmup=0)))


def setting(n: int) -> tuple:
    """True and predicted tags as lists and as label numbers, and words per sentence; one tag in ten is wrong."""
    _, true = conll_like(n)
    rng, flat = np.random.default_rng(1), np.array([t for s in true for t in s], object)
    wrong = rng.random(len(flat)) < 0.1
    guess = np.where(wrong, np.array(LABELS, object)[rng.integers(len(LABELS), size=len(flat))], flat)
    lengths = np.array([len(s) for s in true])
    pred = [a.tolist() for a in np.split(guess, lengths.cumsum()[:-1])]
    number = {t: i for i, t in enumerate(LABELS)}
    return true, pred, [np.array([number[t] for t in tags], np.int64) for tags in (flat, guess)], lengths


def main(argv=None):
    args = bench.arguments(__doc__, argv)
    true, pred, ids, lengths = setting(300 if args.tiny else 50_000)
    metrics, rows = bench.peer("seqeval.metrics"), []
    for strict in (False, True):
        ours = (
            lambda s=strict: entity_f1(true, pred, strict=s).report,
            lambda s=strict: entity_f1(*ids, strict=s, labels=LABELS, lengths=lengths).report,
        )
        sides, peers = [lambda run=run: middle(run) for run in ours], []
        if metrics:
            from seqeval.scheme import IOB2

            options = {"mode": "strict", "scheme": IOB2} if strict else {}
            report = lambda o=options: metrics.classification_report(  # noqa: E731
                true, pred, output_dict=True, zero_division=0, **o
            )
            sides.append(lambda run=report, found=peers: found.append(run()))
        t = bench.paired(*sides, repeats=1 if args.tiny else 3 - strict, warmup=0)
        gap = max((largest_gap(run(), found) for run in ours for found in peers), default=0.0)
        if gap > 1e-12:
            raise AssertionError(f"strict={strict}: the reports differ by {gap}")
        for i, (source, target) in enumerate((("strings", 50), ("label numbers", 250))):
            limit = f"ours {1e3 * np.median(t[:, i]):.1f} ms"
            if metrics:
                limit += f", seqeval {np.median(t[:, 2]):.1f} s; largest difference of any number {gap:.0e}"
            rows.append(
                bench.row(
                    f"entity F1 report of {len(true):,} sentences, {'strict' if strict else 'lenient'}, from {source}",
                    target=f"≥ {target}×",
                    digits=0,
                    values=t[:, 2] / t[:, i] if metrics else None,
                    met=lambda v, g=target: v >= g,
                    peer="seqeval",
                    limit=limit,
                )
            )
    bench.save("entity_f1", rows, args)


if __name__ == "__main__":
    main()
