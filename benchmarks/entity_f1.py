"""How long do entity-level scores take, and do they agree with seqeval?"""
import _common as bench
import numpy as np
from _corpus import conll_like
from ner_prepare import LABELS

from ftbook.ner import entity_f1


def largest_gap(a: dict, b: dict) -> float:
    """The largest difference between two reports with the same keys."""
    if a.keys() != b.keys():
        raise AssertionError(f"reports differ in their rows: {sorted(a)} and {sorted(b)}")
    return max(abs(float(a[k][m]) - float(b[k][m])) for k in a for m in ("precision", "recall", "f1-score", "support"))


def main(argv=None):
    args = bench.arguments(__doc__, argv)
    _, true = conll_like(300 if args.tiny else 50_000)
    rng, flat = np.random.default_rng(1), [t for s in true for t in s]
    wrong = rng.random(len(flat)) < 0.1
    guess = np.where(wrong, np.array(LABELS, object)[rng.integers(len(LABELS), size=len(flat))], np.array(flat, object))
    lengths = np.array([len(s) for s in true])
    pred = [a.tolist() for a in np.split(guess, lengths.cumsum()[:-1])]
    number = {t: i for i, t in enumerate(LABELS)}
    ids = [np.array([number[t] for t in tags], np.int64) for tags in (flat, guess)]
    metrics, rows = bench.peer("seqeval.metrics"), []
    for mode, strict in (("lenient", False), ("strict", True)):
        sides = [lambda s=strict: entity_f1(true, pred, strict=s).report,
                 lambda s=strict: entity_f1(*ids, strict=s, labels=LABELS, lengths=lengths).report]
        if metrics:
            from seqeval.scheme import IOB2

            options = {"mode": "strict", "scheme": IOB2} if strict else {}
            sides.append(lambda o=options: metrics.classification_report(true, pred, output_dict=True, zero_division=0, **o))
            gap = max(largest_gap(sides[i](), sides[2]()) for i in (0, 1)) if not strict or args.tiny else None
        t = bench.paired(*sides, repeats=1 if args.tiny else 3, warmup=0)
        if metrics and gap is None:
            gap = max(largest_gap(sides[i](), sides[2]()) for i in (0, 1))
        if metrics and gap > 1e-12:
            raise AssertionError(f"{mode}: the reports differ by {gap}")
        fast = bench.paired(*sides[:2], repeats=2 if args.tiny else 15)
        for i, (source, target) in enumerate((("strings", 50), ("label numbers", 250))):
            own = np.median(fast[:, i])
            rows.append(bench.row(
                f"entity F1 report of {len(true):,} sentences, {mode}, from {source}", target=f"≥ {target}×", digits=0,
                values=t[:, 2] / own if metrics else None, met=lambda v, g=target: v >= g, peer="seqeval",
                limit=f"ours {1e3 * own:.1f} ms" + (f", seqeval {np.median(t[:, 2]):.1f} s; largest difference of any "
                                                    f"number {gap:.0e}" if metrics else "")))
    bench.save("entity_f1", rows, args)


if __name__ == "__main__":
    main()
