"""Chapter 6: pretrain the bundled checkpoint, ftbook/assets/bert-mini-en.

    python results/sweeps/06_mlm.py prepare                      # tokenizer and packed sequences, once
    torchrun --nproc-per-node 2 results/sweeps/06_mlm.py pretrain              # 8,000 steps
    python results/sweeps/06_mlm.py finish                       # test loss, results/06_mlm.json, the asset folder
    python results/sweeps/06_mlm.py                              # the small experiment: eight variants, three seeds

`pretrain` may be interrupted and started again, also with another number of processes: it goes on from its last
checkpoint. With `--seconds` it also has a deadline.
"""

import argparse
from pathlib import Path

import torch

from ftbook import Checkpoint, Settings, data, mlm
from ftbook.runtime import cache_dir
from ftbook.train import is_main

PEAK_LR, BATCH, RATE, SEED = 2e-3, 32, 0.3, 0
ASSET = Path(mlm.__file__).parent / "assets" / "bert-mini-en"
SLICE = 6_000_000  # characters of the excerpt in the small experiment


WORK = ""


def work(name: str = "") -> Path:
    """A folder of the cache for what is not part of the project."""
    folder = Path(WORK or cache_dir() / "bert-mini-en")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def prepare() -> None:
    """Train the tokenizer on the training documents and pack the three parts."""
    excerpt = mlm.read_documents(data.load("wiki_excerpt"))
    wikitext = mlm.read_documents(mlm.detokenize(data.load("wikitext2", "train")))
    parts = mlm.split_documents(excerpt + wikitext, held_out=0.01, seed=0)
    tokenizer = shipped() or mlm.train_tokenizer(parts[0], vocab_size=8192)
    tokenizer.save_pretrained(work("tokenizer"))
    for name, documents in zip(("train", "valid", "test"), parts, strict=True):
        ids = mlm.pack(documents, tokenizer, length=128)
        torch.save(ids.to(torch.int16), work(f"{name}.pt"))
        print(name, len(documents), "documents,", tuple(ids.shape), "pieces")


def shipped():
    """The tokenizer that the asset folder has: pieces of equal counts are drawn anew in every training."""
    from transformers import BertTokenizerFast

    return BertTokenizerFast.from_pretrained(ASSET) if (ASSET / "tokenizer.json").exists() else None


def packed(name: str) -> torch.Tensor:
    """Read one part."""
    return torch.load(work(f"{name}.pt"), weights_only=True).long()


def pretrain(seconds: float, steps: int, lr: float, name: str) -> None:
    """The long run."""
    from transformers import BertTokenizerFast

    torch.set_num_threads(1)
    tokenizer = BertTokenizerFast.from_pretrained(work("tokenizer"))
    model = mlm.small_bert(len(tokenizer), seed=SEED)
    train = packed("train")
    if not work(f"{name}.ckpt").exists():  # a resumed run reads its weights from the checkpoint
        mlm.start_from_counts(model, train, mlm.vocabulary(tokenizer))
    report = Report(name, model, tokenizer)
    mlm.pretrain(
        model,
        tokenizer,
        train,
        packed("valid")[:256],
        steps=steps,
        seconds=seconds,
        lr=lr,
        warmup=0.06,
        batch_size=BATCH,
        every=200,
        seed=SEED,
        masking={"probability": RATE},
        callbacks=[report, Checkpoint(work(f"{name}.ckpt"))],
        settings=Settings(progress=False),
    )


class Report:
    """Print each row of the history and keep it, with the weights, beside the checkpoint."""

    def __init__(self, name, model, tokenizer):
        self.name, self.model, self.tokenizer = name, model, tokenizer

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass

    def on_epoch_end(self, state) -> None:
        if is_main():
            print({k: round(v, 5) for k, v in state.row.items()}, flush=True)
            torch.save({"rows": state.history.rows, "model": self.model.state_dict()}, work(f"{self.name}.now.pt"))


def finish(name: str) -> None:
    """Score the run on the test articles, store the numbers, write the asset folder and its card."""
    from transformers import BertTokenizerFast

    from ftbook import results

    saved = torch.load(work(f"{name}.now.pt"), weights_only=True)
    tokenizer = BertTokenizerFast.from_pretrained(work("tokenizer"))
    model = mlm.small_bert(len(tokenizer))
    model.load_state_dict(saved["model"])
    folder = mlm.save(model, tokenizer, ASSET, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    model, tokenizer = mlm.load_pretrained(folder)  # what is scored is what is shipped, float16 rounding included
    vocab, train, rows = mlm.vocabulary(tokenizer), packed("train"), saved["rows"]
    counts = mlm.ngram(train, vocab)
    now = mlm.score(model, mlm.Masked(packed("valid")[:256], vocab, 32, fixed=True, seed=1, probability=RATE))
    levels = [losses.mean().item() for losses in mlm.ngram_losses(counts, now.previous, now.target)]
    test = mlm.score(model, mlm.Masked(packed("test"), vocab, 32, fixed=True, seed=5))
    unigram, bigram = (losses.mean().item() for losses in mlm.ngram_losses(counts, test.previous, test.target))
    facts = {
        "loss": test.loss.mean().item(),
        "unigram": unigram,
        "bigram": bigram,
        "n": len(test.target),
        "accuracy": (test.rank == 0).float().mean().item(),
        "top5": (test.rank < 5).float().mean().item(),
    }
    about = {
        "steps": rows[-1]["steps"],
        "pieces": rows[-1]["steps"] * BATCH * 128,
        "train_pieces": train.numel(),
        "minutes": round(sum(row["seconds"] for row in rows) / 60, 1),
        "batch_size": BATCH,
        "length": 128,
        "learning_rate": PEAK_LR,
        "rate": RATE,
        "seed": SEED,
        "unigram_rate": levels[0],
        "bigram_rate": levels[1],
    }
    results.record("06_mlm", "bert_mini", {"rows": rows, **about})
    for key, value in facts.items():
        results.record("06_mlm", f"bert_mini_{key}", value)
    (folder / "model.safetensors").chmod(0o644)
    text = CARD.format(share=about["pieces"] / train.numel(), **about, **facts)
    (folder / "README.md").write_text(text, encoding="utf-8")
    print(facts, about)


CARD = """---
license: cc-by-sa-3.0
language: en
library_name: transformers
pipeline_tag: fill-mask
---
# bert-mini-en

A small English BERT that comes with ftbook: 4 layers of width 256, 4 heads, feed-forward width 1024, 8192 cased
WordPiece pieces, at most 256 positions, weights in float16. Load it with `ftbook.mlm.load_bundled()` or with
`transformers.AutoModelForMaskedLM.from_pretrained(folder)`.

| | |
|---|---|
| text | an excerpt of English Wikipedia (24,318 articles begun in 2018) and the training part of WikiText-2; 1 % of the articles each held out for validation and test |
| objective | masked language model, {rate:.0%} of the pieces chosen, 80/10/10, packed sequences of 128 |
| start | log frequencies, word vectors from counts, first-layer heads set to look at neighbors (chapter 6) |
| training | {steps:,} steps of {batch_size} sequences: {pieces:,} pieces, {share:.2f} passes over the text; AdamW, peak learning rate {learning_rate}, linear decay to 0, no dropout, bf16; seed {seed} |
| hardware | one or two x86 CPU cores with native bf16, shared with other work, {minutes} minutes |
| test loss | {loss:.3f} nats per hidden piece at 15 % (unigram {unigram:.3f}, bigram {bigram:.3f}; n = {n:,}) |
| test accuracy | {accuracy:.1%}; true piece among the first five: {top5:.1%} |
| code | `results/sweeps/06_mlm.py` |

**License.** The weights are released under CC BY-SA 3.0, the license of the text they were trained on, by Wikipedia's
contributors; WikiText-2 by Merity et al. (2017), arXiv:1609.07843.

**Limits.** The training was short: BERT saw more than a thousand times as many pieces. The model knows common grammar
and collocations, few facts, and the topics of articles begun in 2018: many biographies, sport, places. It reflects the
biases of that text. It is meant for teaching and for tests.

**Settings.** The stored configuration has dropout 0.1, for fine-tuning; pretraining used none.
"""  # noqa: E501


def variants() -> None:
    """The small experiment: eight ways to pretrain, three seeds, equal budget."""
    from ftbook import results

    part = mlm.prepare(mlm.read_documents(data.load("wiki_excerpt")[:SLICE]))
    results.sweep(
        lambda seed, variant: mlm.variant_run(part, variant, seed),
        {"variant": list(mlm.VARIANTS)},
        range(3),
        chapter="06_mlm",
        name="variants",
        n=int(part.valid.numel()),
        budget="120 steps of 32 sequences of 64 pieces, 2 layers of width 128",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", default="variants", choices=["prepare", "pretrain", "finish", "variants"])
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--lr", type=float, default=PEAK_LR)
    parser.add_argument("--name", default="run")
    parser.add_argument("--work", default="")
    args = parser.parse_args()
    WORK = args.work
    if args.what == "pretrain":
        pretrain(args.seconds, args.steps, args.lr, args.name)
    elif args.what == "finish":
        finish(args.name)
    else:
        {"prepare": prepare, "variants": variants}[args.what]()
