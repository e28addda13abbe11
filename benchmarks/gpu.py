"""The same questions on CUDA with full-size models: step time, tokens/s, peak memory, share of the matrix peak.

Weights are random, so nothing is downloaded; the work of a step is that of a pretrained model. Each workload runs in
five settings that add up (fp32, bf16, fused optimizer, pinned asynchronous transfer, torch.compile) and next to its
peer on the same batches. `--tiny` runs everything once on the CPU with small models and proves only that it works.
"""

import gc
import time

import _common as bench
import numpy as np
import torch
from torch import nn

from ftbook import Settings, fit
from ftbook import peft as lora
from ftbook.mlm import MaskedLM


def vocabulary(tiny: bool) -> int:
    """Pieces of bert-base-cased."""
    return 200 if tiny else 28_996


def bert_config(tiny: bool, labels: int = 9):
    """The configuration of bert-base-cased; a very small one where only the script is tested."""
    from transformers import BertConfig

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertConfig(
        vocab_size=vocabulary(tiny), num_labels=labels, attn_implementation="sdpa", **(small if tiny else {})
    )


def tagging_model(tiny: bool) -> nn.Module:
    from transformers import BertForTokenClassification

    return BertForTokenClassification(bert_config(tiny))


def mlm_model(tiny: bool) -> nn.Module:
    from transformers import BertForMaskedLM

    return BertForMaskedLM(bert_config(tiny))


def resnet_model(tiny: bool) -> nn.Module:
    from torchvision.models import resnet18, resnet50

    return resnet18(num_classes=10) if tiny else resnet50(num_classes=1000)


def token_batches(tiny: bool, n: int, masked: bool = False) -> list:
    """n batches of 32 rows of 128 pieces; with `masked`, labels on 15 % of them."""
    rows, length = (2, 16) if tiny else (32, 128)
    found = []
    for seed in range(n):
        batch = bench.token_batch(rows, length, vocabulary(tiny), seed=seed)
        if masked:
            hidden = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < 0.15
            batch["labels"] = batch["input_ids"].masked_fill(~hidden, -100)
            batch["input_ids"] = batch["input_ids"].masked_fill(hidden, 103)
        found.append(batch)
    return found


def image_batches(tiny: bool, n: int) -> list:
    rows, side, classes = (2, 32, 10) if tiny else (64, 224, 1000)
    g = torch.Generator().manual_seed(0)
    return [
        (
            torch.randint(0, 256, (rows, 3, side, side), dtype=torch.uint8, generator=g),
            torch.randint(0, classes, (rows,), generator=g),
        )
        for _ in range(n)
    ]


def with_lora(model: nn.Module) -> nn.Module:
    conv = any(isinstance(m, nn.Conv2d) for m in model.modules())
    target = "layer[0-9].*conv[0-9]" if conv else ("query", "key", "value", "dense")
    return lora.apply(model, lora.LoRA(target, r=8, alpha=16), head="fc" if conv else "classifier").model


WORK = {  # name -> (model, batches, loss of fit, what one example is)
    "BERT-base token classification": (tagging_model, token_batches, None, "tokens"),
    "ResNet-50": (resnet_model, image_batches, "cross_entropy", "images"),
    "LoRA on BERT-base": (lambda tiny: with_lora(tagging_model(tiny)), token_batches, None, "tokens"),
    "LoRA on ResNet-50": (lambda tiny: with_lora(resnet_model(tiny)), image_batches, "cross_entropy", "images"),
    "MLM on BERT-base": (
        lambda tiny: MaskedLM(mlm_model(tiny)),
        lambda tiny, n: token_batches(tiny, n, masked=True),
        None,
        "tokens",
    ),
}


class Pinned:
    """Batches in page-locked memory, so that `fit` copies the next one while the GPU computes."""

    def __init__(self, batches):
        pin = lambda t: t.pin_memory() if torch.cuda.is_available() else t  # noqa: E731
        self.batches = [
            {k: pin(v) for k, v in b.items()} if isinstance(b, dict) else tuple(map(pin, b)) for b in batches
        ]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


SETTINGS = {
    "fp32": {"precision": "fp32", "optimizer": "plain"},
    "bf16, SDPA": {"precision": "bf16", "optimizer": "plain"},
    "+ fused AdamW": {"precision": "bf16"},
    "+ pinned, asynchronous": {"precision": "bf16", "pinned": True},
    "+ torch.compile": {"precision": "bf16", "pinned": True, "compile": True},
}


class StepClock:
    """Seconds of each step; waits for the GPU only at the beginning and at the end of the measured steps."""

    def __init__(self, warmup: int):
        self.warmup, self.count, self.start = warmup, 0, None

    def on_step_end(self, state=None):
        self.count += 1
        if self.count == self.warmup:
            bench.synchronize()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            self.start = time.perf_counter()

    def seconds(self) -> float:
        bench.synchronize()
        return (time.perf_counter() - self.start) / (self.count - self.warmup)


def peak_mb() -> float:
    return torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else float("nan")


def run_ours(name: str, setting: dict, tiny: bool, steps: int, warmup: int) -> tuple[float, float]:
    """Seconds of a step of `fit` and peak megabytes of the card."""
    make, batches, loss, _ = WORK[name]
    torch.manual_seed(0)
    options, model, data = dict(setting), make(tiny), batches(tiny, 4)
    if options.pop("pinned", False):
        data = Pinned(data)
    if options.pop("compile", False) and not tiny:
        model.compile()
    if options.get("optimizer") == "plain":
        options["optimizer"] = lambda params: torch.optim.AdamW(params, lr=1e-5)
    clock = StepClock(warmup)
    fit(
        model,
        data,
        loss=loss,
        lr=1e-5,
        epochs=-(-(steps + warmup) // 4),
        callbacks=[clock],
        settings=Settings(precision=options.pop("precision"), max_steps=steps + warmup, progress=False),
        **options,
    )
    return clock.seconds(), peak_mb()


class ForTrainer(nn.Module):
    """An image model in the form that HF Trainer trains: scales the images, returns a loss."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, labels):
        logits = self.model(pixel_values.float().div_(255))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def peer_model(name: str, tiny: bool) -> nn.Module | None:
    """The peer's side: the same model, with peft's LoRA on the same layers; None where a peer is missing."""
    images = "ResNet" in name
    model = resnet_model(tiny) if images else mlm_model(tiny) if "MLM" in name else tagging_model(tiny)
    if bench.peer("accelerate") is None or ("LoRA" in name and bench.peer("peft") is None):
        return None
    if "LoRA" in name:
        import peft

        target = r"layer\d\..*conv\d" if images else ["query", "key", "value", "dense"]
        head = ["fc"] if images else ["classifier"]
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=target, modules_to_save=head)
        )
    return ForTrainer(model) if images else model


def run_peer(name: str, tiny: bool, steps: int, warmup: int, folder: str) -> tuple[float, float] | None:
    """HF Trainer (and peft for the adapters) on the same batches, bf16 where the device has it."""
    import transformers

    torch.manual_seed(0)
    model = peer_model(name, tiny)
    if model is None:
        return None
    clock = StepClock(warmup)
    ticks = type("Ticks", (transformers.TrainerCallback,), {"on_step_end": lambda *a, **k: clock.on_step_end()})()
    batches = WORK[name][1](tiny, 4)
    batches = [b if isinstance(b, dict) else dict(zip(("pixel_values", "labels"), b, strict=True)) for b in batches]
    rows = [{k: v[i] for k, v in b.items()} for b in batches for i in range(len(b["labels"]))]
    settings = transformers.TrainingArguments(
        folder,
        per_device_train_batch_size=len(rows) // 4,
        max_steps=steps + warmup,
        save_strategy="no",
        learning_rate=1e-5,
        report_to="none",
        disable_tqdm=True,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )
    with bench.silent():
        transformers.Trainer(model, settings, train_dataset=rows, callbacks=[ticks]).train()
    return clock.seconds(), peak_mb()


def work_of(name: str, tiny: bool) -> tuple[float, int]:
    """Floating-point operations of a training step, and examples (tokens or images) in it."""
    make, batches, loss, unit = WORK[name]
    model, batch = make(tiny), batches(tiny, 1)[0]
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")  # the fused kernel of the CPU is not counted
    if isinstance(batch, dict):
        return bench.flops(lambda: model(**batch).loss.backward()), batch["input_ids"].numel()
    logits = lambda: model(batch[0].float() / 255)  # noqa: E731
    return bench.flops(lambda: nn.functional.cross_entropy(logits(), batch[1]).backward()), len(batch[0])


def measure(name: str, args, ceiling: float, folder: str) -> list:
    """One line per setting and one for the peer, rounds interleaved."""
    steps, warmup, rounds = (1, 1, 1) if args.tiny else (20, 10, 3)
    flops, size = work_of(name, args.tiny)
    sides = {s: lambda s=s: run_ours(name, SETTINGS[s], args.tiny, steps, warmup) for s in SETTINGS}
    sides["peer"] = lambda: run_peer(name, args.tiny, steps, warmup, folder)
    found: dict[str, list] = {s: [] for s in sides}
    for _ in range(rounds):
        for s, run in sides.items():
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            value = run()
            if value is not None:
                found[s].append(value)
    other, lines = np.array([seconds for seconds, _ in found["peer"]]), []
    for s, values in found.items():
        if not values:
            continue
        seconds, memory = np.array(values).T
        step = float(np.median(seconds))
        label = s if s != "peer" else "HF Trainer" + (" and peft" if "LoRA" in name else "")
        lines.append(
            bench.row(
                f"{name}, {label}",
                target="",
                values=other / seconds if len(other) else None,
                peer="HF Trainer" if len(other) else "",
                limit=f"{1e3 * step:.1f} ms a step, {size / step:,.0f} "
                f"{WORK[name][3]}/s, peak {np.median(memory):,.0f} MB, {100 * flops / step / ceiling:.0f} % of the "
                "measured matrix-product peak",
            )
        )
    return lines


def main(argv=None):
    import tempfile

    args = bench.arguments(__doc__, argv)
    if not torch.cuda.is_available() and not args.tiny:
        print("  gpu: skipped, this machine has no CUDA device", flush=True)
        return
    ceiling, rows = bench.matmul_peak("bfloat16", 128 if args.tiny else 8192), []
    with tempfile.TemporaryDirectory() as folder:
        for name in WORK:
            rows += measure(name, args, ceiling, folder)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    bench.save("gpu", rows, args, gpu=device, matmul_peak_tflops=round(ceiling / 1e12, 3))


if __name__ == "__main__":
    main()
