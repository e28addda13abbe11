"""How many tokens a second does masked-language-model pretraining process, and does bf16 learn the same?"""

import tempfile

import _common as bench
import numpy as np
import torch
from _corpus import tokenizer
from cnn_step import Clock

from ftbook import Settings, mlm

HIDDEN, LAYERS, ROWS, LENGTH = 256, 4, 32, 128


class ClockCallback:
    """Makes the clock a callback of the Trainer."""

    def __new__(cls, transformers, clock):
        methods = {"on_step_end": lambda self, *args, **kwargs: clock.on_step_end(None)}
        return type("Clocked", (transformers.TrainerCallback,), methods)()


def hugging_face(transformers, ids, tok, hidden, layers, rows, folder):
    """The way of run_mlm.py: Trainer with its defaults and DataCollatorForLanguageModeling on packed sequences."""
    config = transformers.BertConfig(
        vocab_size=len(tok),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * hidden,
        max_position_embeddings=256,
    )
    collator = transformers.DataCollatorForLanguageModeling(tok, mlm_probability=0.15)
    data = [{"input_ids": row} for row in ids.tolist()]

    def seconds(steps: int) -> float:
        clock = Clock()
        settings = transformers.TrainingArguments(
            folder,
            per_device_train_batch_size=rows,
            max_steps=steps + 1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        with bench.silent():
            transformers.Trainer(
                transformers.BertForMaskedLM(config),
                settings,
                train_dataset=data,
                data_collator=collator,
                callbacks=[ClockCallback(transformers, clock)],
            ).train()
        return float(np.mean(clock.times))

    return seconds


def ours(ids, tok, hidden, layers, rows, precision):
    """`ftbook.mlm.pretrain` as chapter 6 calls it: no dropout, the head on masked positions only."""

    def seconds(steps: int) -> float:
        clock = Clock()
        model = mlm.small_bert(len(tok), hidden, layers, 4)
        mlm.pretrain(
            model,
            tok,
            ids,
            steps=steps + 1,
            batch_size=rows,
            callbacks=[clock],
            settings=Settings(precision=precision, progress=False),
        )
        return float(np.mean(clock.times))

    return seconds


def peak_share(ids, tok, hidden, layers, tiny: bool) -> dict[str, float]:
    """What one token a second is of the measured matrix-product peak, for each precision."""
    masked = next(iter(mlm.Masked(ids, mlm.vocabulary(tok), len(ids), steps=1)))
    model = mlm.MaskedLM(mlm.small_bert(len(tok), hidden, layers, 4))
    model.model.set_attn_implementation("eager")  # the fused kernel's products are not counted
    work = bench.flops(lambda: model(**masked).loss.backward()) / ids.numel()
    names = {"fp32": "float32", "bf16": "bfloat16"}
    return {precision: work / bench.matmul_peak(dtype, 128 if tiny else 2048) for precision, dtype in names.items()}


def curve(ids, tok, precision: str, seed: int, steps: int) -> np.ndarray:
    """Training loss in ten parts of a short run of a small model."""
    model = mlm.small_bert(len(tok), 64, 2, 4, seed=seed)
    history = mlm.pretrain(
        model,
        tok,
        ids[:, :64].contiguous(),
        steps=steps,
        every=max(1, steps // 10),
        batch_size=16,
        lr=2e-3,
        seed=seed,
        settings=Settings(precision=precision, progress=False),
    )
    return np.array(history["train_loss"])


def main(argv=None):
    args = bench.arguments(__doc__, argv)
    hidden, layers, rows, length = (32, 1, 2, 16) if args.tiny else (HIDDEN, LAYERS, ROWS, LENGTH)
    tok = tokenizer()
    g = torch.Generator().manual_seed(0)
    order = torch.multinomial(1 / torch.arange(3.0, len(tok) - 2), 256 * length, True, generator=g) + 5
    ids = order.view(256, length)
    ids[:, 0], ids[:, -1] = tok.cls_token_id, tok.sep_token_id
    transformers, lines = bench.peer("transformers"), []
    bench.peer("accelerate")
    with tempfile.TemporaryDirectory() as folder:
        sides = [lambda p=p: ours(ids, tok, hidden, layers, rows, p)(2) for p in ("fp32", "bf16")]
        try:
            other = hugging_face(transformers, ids, tok, hidden, layers, rows, folder)
            other(1)
            sides.append(lambda: other(2))
        except ImportError as error:
            print(f"  HF Trainer cannot run ({error}): its rows stay empty", flush=True)
        t = bench.paired(*sides, repeats=1 if args.tiny else 5, warmup=0)
    share = peak_share(ids[:rows], tok, hidden, layers, args.tiny)
    speed = [rows * length / np.median(t[:, i]) for i in range(t.shape[1])]
    for i, (precision, target) in enumerate((("fp32", 1.8), ("bf16", 3.8))):
        lines.append(
            bench.row(
                f"MLM pretraining, BERT {layers}×{hidden}, {rows}×{length} tokens, {precision}",
                target=f"≥ {target}×",
                values=t[:, 2] / t[:, i] if t.shape[1] > 2 else None,
                met=lambda v, g=target: v >= g,
                peer="HF Trainer, run_mlm.py's way",
                limit=f"ours {speed[i]:,.0f} tokens/s, {100 * share[precision] * speed[i]:.0f} % of the measured "
                "matrix-product peak" + (f"; HF {speed[2]:,.0f} tokens/s" if len(speed) > 2 else ""),
            )
        )
    steps, seeds = (10, 2) if args.tiny else (60, 5)
    full = np.array([curve(ids, tok, "fp32", s, steps) for s in range(seeds)])
    half = np.array([curve(ids, tok, "bf16", s, steps) for s in range(min(3, seeds))]).mean(0)
    low, high = full.min(0), full.max(0)
    inside = 100 * float(np.mean((half >= low) & (half <= high)))
    lines.append(
        bench.row(
            "bf16 loss curve inside the range of the fp32 seeds",
            target="100 %",
            values=[inside],
            unit=" %",
            digits=0,
            met=lambda v: v == 100,
            peer="precision='fp32'",
            limit=f"{seeds} seeds of fp32, mean of {min(3, seeds)} of bf16, 10 "
            f"points of {steps} steps of BERT 2×64; largest gap of the means {abs(half - full.mean(0)).max():.4f} nats",
        )
    )
    bench.save("mlm", lines, args)


if __name__ == "__main__":
    main()
