"""The same questions on CUDA with full-size models: step time, tokens/s, peak memory, share of the matrix peak.

Weights are random, so nothing is downloaded; the work of a step is that of a pretrained model. Each workload runs in
five settings that add up (fp32, bf16, fused optimizer, pinned asynchronous transfer, torch.compile) and next to its
peer on the same batches; instruction tuning, DPO and generation are in _decoders.py. `--tiny` runs everything once
with small models, also on a CPU, and proves only that it works. `--part BERT,DPO` measures the works with BERT or
DPO in their names anew and keeps the stored rows of the others.
"""

import gc
import time

import _common as bench
import _decoders
import numpy as np
import torch
from torch import nn

from ftbook import Settings, fit, results
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


def vit_model(tiny: bool) -> nn.Module:
    from torchvision.models import VisionTransformer, vit_b_16

    if tiny:
        return VisionTransformer(32, 16, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=10)
    return vit_b_16(num_classes=1000)


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
    "ViT-B/16": (vit_model, image_batches, "cross_entropy", "images"),
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
    images = WORK[name][3] == "images"
    bare = {"ResNet": resnet_model, "ViT": vit_model, "MLM": mlm_model, "": tagging_model}
    model = next(make for part, make in bare.items() if part in name)(tiny)
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


def run_loop(name: str, tiny: bool, steps: int, warmup: int) -> tuple[float, float]:
    """A plain loop on images with all of the fast settings but torch.compile, which `fit` has to equal."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, clock = WORK[name][0](tiny).to(device).train(), StepClock(warmup)
    batches = list(Pinned(image_batches(tiny, 4)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    for step in range(steps + warmup):
        x, y = (t.to(device, non_blocking=True) for t in batches[step % 4])
        with torch.autocast(device, torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x.float().div_(255)), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.on_step_end()
    return clock.seconds(), peak_mb()


def work_of(name: str, tiny: bool) -> tuple[float, int]:
    """Floating-point operations of a training step, and examples (tokens or images) in it."""
    make, batches, loss, unit = WORK[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, batch = make(tiny).to(device), batches(tiny, 1)[0]
    if isinstance(batch, dict):
        batch = {k: v.to(device) for k, v in batch.items()}
    else:
        batch = tuple(t.to(device) for t in batch)
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")  # the fused kernel of the CPU is not counted
    if isinstance(batch, dict):
        return bench.flops(lambda: model(**batch).loss.backward()), batch["input_ids"].numel()
    logits = lambda: model(batch[0].float() / 255)  # noqa: E731
    return bench.flops(lambda: nn.functional.cross_entropy(logits(), batch[1]).backward()), len(batch[0])


def measure(name: str, args, ceiling: float, folder: str):
    """Rounds of all settings and the peer, interleaved; after each round the rows so far."""
    steps, warmup, rounds = (1, 1, 1) if args.tiny else (20, 10, 3)
    flops, size = work_of(name, args.tiny)
    sides = {s: lambda s=s: run_ours(name, SETTINGS[s], args.tiny, steps, warmup) for s in SETTINGS}
    if "ViT" in name:
        sides["plain loop, bf16"] = lambda: run_loop(name, args.tiny, steps, warmup)
    sides["peer"] = lambda: run_peer(name, args.tiny, steps, warmup, folder)
    found: dict[str, list] = {s: [] for s in sides}
    for turn in range(rounds):
        for s, run in sides.items():
            gc.collect()
            torch._dynamo.reset()  # a new model is compiled anew, however often
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            start = time.perf_counter()
            value = run()
            print(f"  round {turn}, {s}: {time.perf_counter() - start:.1f} s", flush=True)
            if value is not None:
                found[s].append(value)
        yield lines_of(name, found, flops, size, ceiling)


def lines_of(name: str, found: dict, flops: float, size: int, ceiling: float) -> list:
    """One line per setting and one for the peer."""
    other, lines = np.array([seconds for seconds, _ in found["peer"]]), []
    for s, values in found.items():
        if not values:
            continue
        seconds, memory = np.array(values).T
        step = float(np.median(seconds))
        label = s if s != "peer" else "HF Trainer" + (" and peft" if "LoRA" in name else "")
        own, half = s in SETTINGS, "fp32" not in s  # the peer computes in bf16
        line = bench.row(
            f"{name}, {label}",
            target="≥ 1×" if own and half else "",
            values=other / seconds if len(other) else None,
            met=(lambda v: v >= 1) if own and half else None,
            peer="HF Trainer" if len(other) else "",
            limit=f"{1e3 * step:.1f} ms a step, {size / step:,.0f} "
            f"{WORK[name][3]}/s, peak {np.median(memory):,.0f} MB, {100 * flops / step / ceiling:.0f} % of the "
            "measured matrix-product peak",
        )
        lines.append(line | {"ours": own, "rounds": len(values)})
    return lines


def main(argv=None):
    import tempfile

    args = bench.arguments(__doc__, argv)
    if not torch.cuda.is_available() and not args.tiny:
        print("  gpu: skipped, this machine has no CUDA device", flush=True)
        return
    ceiling = bench.matmul_peak("bfloat16", 128 if args.tiny else 8192)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    about = {"gpu": device, "matmul_peak_tflops": round(ceiling / 1e12, 3)}
    with tempfile.TemporaryDirectory() as folder:
        works = {kind.name: lambda kind=kind: _decoders.measure(kind, args.tiny, folder) for kind in _decoders.WORK}
        works |= {name: lambda name=name: measure(name, args, ceiling, folder) for name in WORK}
        about |= {"works": list(works), "date": time.strftime("%Y-%m-%d")}
        stored = kept(device) if args.part else []
        for name, run in works.items():
            if args.part and not any(part in name for part in args.part.split(",")):
                continue
            for rows in run():  # stored after each round: a run that is broken off keeps what it has
                stored = [r for r in stored if r["work"] != name] + [r | {"work": name} for r in rows]
                stored.sort(key=lambda r: list(works).index(r["work"]))
                bench.save("gpu", stored, args, **about)


def kept(device: str) -> list:
    """The rows stored for this device."""
    try:
        content = results.load("gpu", "measured")
    except (KeyError, FileNotFoundError):
        return []
    return list(content["rows"]) if content["gpu"] == device else []


if __name__ == "__main__":
    main()
