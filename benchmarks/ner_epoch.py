"""How long is an epoch of token classification when rows of similar length share a batch?"""

import _common as bench
import numpy as np
import torch
from _corpus import conll_like, tokenizer
from ner_prepare import LABELS

from ftbook.mlm import small_bert
from ftbook.ner import BucketBatches, encode, token_classifier


def stepper(tiny: bool):
    """A function that trains one batch: a small BERT in fp32 with fused AdamW, the same for every way of batching."""
    model = token_classifier(small_bert(hidden=32 if tiny else 256, layers=1 if tiny else 4).config, LABELS).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(batch):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def evenly(rows: list, n: int, offset: float) -> list:
    """n batches at equal distances through a list of all batches."""
    return [rows[int((i + offset) * len(rows) / n)] for i in range(n)]


def main(argv=None):
    args = bench.arguments(__doc__, argv)
    words, tags = conll_like(120 if args.tiny else 14_041)
    encoded = encode(words, tokenizer(), tags, LABELS, max_length=128)
    sample, repeats = (2, 1) if args.tiny else (9, 4)
    bucket = BucketBatches(encoded, 32, shuffle=False).rows()
    order = np.random.default_rng(0).permutation(len(encoded))
    random = [order[i : i + 32] for i in range(0, len(order), 32)]
    step, epochs = stepper(args.tiny), []
    step(encoded.batch(bucket[-1]))
    for i in range(repeats):
        own, other = (evenly(rows, sample, (i + 0.5) / repeats) for rows in (bucket, random))
        now, seconds = bench.clock_for(), np.zeros(3)
        for a, b in zip(own, other, strict=True):
            for side, (rows, length) in enumerate(((a, None), (b, None), (b, 128))):
                start = now()
                step(encoded.batch(rows, length))
                seconds[side] += now() - start
        epochs.append(seconds * len(bucket) / sample)
    t, real = np.array(epochs), int(encoded.sizes.sum())
    padded = sum(len(rows) * int(encoded.sizes[rows].max()) for rows in bucket)
    seconds = np.median(t, 0)
    about = f"{len(encoded):,} rows, {sample} of {len(bucket)} batches timed in each of {repeats} rounds"
    rows = [
        bench.row(
            "NER epoch in length buckets, over all rows padded to 128",
            target="≥ 6.5×",
            values=t[:, 2] / t[:, 0],
            met=lambda v: v >= 6.5,
            peer="padding='max_length'",
            limit=f"ours {seconds[0]:.0f} s, padded to 128 {seconds[2]:.0f} s; {about}",
        ),
        bench.row(
            "NER epoch in length buckets, over random batches",
            target="≥ 3.3×",
            values=t[:, 1] / t[:, 0],
            met=lambda v: v >= 3.3,
            peer="DataCollatorForTokenClassification",
            limit=f"random {seconds[1]:.0f} s",
        ),
        bench.row(
            "computed pieces over real pieces in length buckets",
            target="≤ 1.10",
            values=[padded / real],
            unit="",
            digits=3,
            met=lambda v: v <= 1.10,
            limit=f"{real:,} pieces without any padding: 1",
        ),
    ]
    bench.save("ner_epoch", rows, args)


if __name__ == "__main__":
    main()
