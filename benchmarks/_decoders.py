"""Decoders of SmolLM2-360M's size for gpu.py: instruction tuning and DPO with LoRA beside TRL and peft, generation.

Weights and texts are random, so nothing is downloaded; both sides hold the same weights in bfloat16 (adapters in
float32), the same texts, the same batch size, rate and LoRA on all linear layers.
"""

import copy
import gc
import math
import time
from typing import Any

import _common as bench
import numpy as np
import torch
from torch import Tensor, nn

from ftbook import Settings, causal, fit, losses, preference, sft
from ftbook import peft as lora

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, RATE = 8, 2e-4  # TRL's own batch size
PLAN = Settings(precision="fp32", weight_decay=0.0, clip_norm=1.0, schedule="linear", progress=False)
LORA = {"target_modules": "all-linear", "r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM"}


def sizes(tiny: bool) -> causal.Sizes:
    """Those of SmolLM2-360M."""
    if tiny:
        return causal.Sizes(vocab=300, width=32, layers=2, heads=4, kv_heads=2, hidden=48, context=128)
    return causal.Sizes(49_152, 960, 32, 15, 5, 2560, context=8192, theta=100_000.0)


def decoders(tiny: bool, lively: bool = False, peer: bool = True) -> tuple[causal.Decoder, Any]:
    """The book's decoder and transformers' Llama with the same weights, on the device, in float32.

    `lively`: larger weights, so that what is written varies.
    """
    s = sizes(tiny)
    ours = causal.Decoder(s).to(DEVICE)
    if lively:
        with torch.no_grad():
            for p in ours.layers.parameters():
                if p.dim() == 2:
                    p.mul_(5)
    if not peer:
        return ours, None
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=s.vocab,
        hidden_size=s.width,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads,
        intermediate_size=s.hidden,
        max_position_embeddings=s.context,
        rope_parameters={"rope_theta": s.theta, "rope_type": "default"},
        rms_norm_eps=s.eps,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    with torch.device(DEVICE):
        theirs = LlamaForCausalLM(config)
    state = {f"model.{name}": weight for name, weight in ours.state_dict().items()}
    missing = theirs.load_state_dict(state, strict=False)
    if missing.unexpected_keys or set(missing.missing_keys) - {"lm_head.weight"}:
        raise RuntimeError(f"weights do not fit: {missing}")
    return ours.eval(), theirs.eval()


def texts(tiny: bool, pairs: bool = False) -> list[tuple[list[int], ...]]:
    """Question and answer, or question, better and worse answer, as random pieces; the end of text ends answers."""
    n, ask, say = (4, (3, 9), (2, 6)) if tiny else (8, (64, 384), (32, 192))
    draw, vocab = np.random.default_rng(0), sizes(tiny).vocab

    def text(low: int, high: int) -> list[int]:
        return draw.integers(2, vocab, draw.integers(low, high)).tolist()

    return [(text(*ask), *([*text(*say), 0] for _ in range(1 + pairs))) for _ in range(n * BATCH)]


def tokenizer(vocab: int):
    """A word for each piece: texts for the peers, which want texts, become the same pieces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<end>": 0, "<pad>": 1} | {f"w{i}": i for i in range(2, vocab)}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>", unk_token="<pad>")


def written(pieces: list[int]) -> str:
    return "".join(f" w{i}" for i in pieces if i)


def dataset(rows: list, names: tuple):
    from datasets import Dataset

    return Dataset.from_list([dict(zip(names, map(written, row), strict=True)) for row in rows])


class Clock:
    """Seconds of the steps after the first epoch, and the megabytes that it takes, its copy of the model included."""

    def __init__(self, warmup: int):
        self.warmup, self.count, self.start = warmup, 0, math.nan
        self.before = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, state=None):
        self.count += 1
        if self.count == self.warmup:
            bench.synchronize()
            self.start = time.perf_counter()

    def seconds(self) -> float:
        """Of one step."""
        bench.synchronize()
        return (time.perf_counter() - self.start) / (self.count - self.warmup)

    def peak_mb(self) -> float:
        return (torch.cuda.max_memory_allocated() - self.before) / 1e6 if DEVICE == "cuda" else math.nan


def free() -> None:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def trained_by_trl(trainer: Any, clock: Clock, names: tuple, rows: list, per_epoch: int) -> tuple[float, float, float]:
    """Seconds of a step, peak and the loss of the last epoch of a TRL trainer that got the same pieces."""
    import transformers

    ticks = type("Ticks", (transformers.TrainerCallback,), {"on_step_end": lambda *a, **k: clock.on_step_end()})
    trainer.add_callback(ticks())
    first = trainer.train_dataset[0]
    got = [first[name] for name in names]
    want = [rows[0][0], *rows[0][1:]] if len(names) > 1 else [rows[0][0] + rows[0][1]]
    if got != want:
        raise RuntimeError(f"TRL has other pieces: {got} instead of {want}")
    with bench.silent():
        trainer.train()
    log = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    return clock.seconds(), clock.peak_mb(), float(log[-1])


def trl_settings(kind: Any, folder: str, steps: int, epochs: int, **more: Any) -> Any:
    """TRL's defaults but for the rate, which both sides share, and what concerns files and the console."""
    return kind(
        folder,
        num_train_epochs=epochs,
        learning_rate=RATE,
        per_device_train_batch_size=BATCH,
        save_strategy="no",
        logging_steps=steps,
        report_to="none",
        disable_tqdm=True,
        **({} if DEVICE == "cuda" else {"use_cpu": True, "bf16": False}),
        **more,
    )


def loop(net: nn.Module, batches: Any, loss: Any, epochs: int, clock: Clock) -> float:
    """A plain training loop on dicts of tensors; the mean loss of the last epoch."""
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    total = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
    net.train()
    for _ in range(epochs):
        kept = []
        for batch in batches:
            value = loss({k: v.to(DEVICE) for k, v in batch.items()})
            value.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            kept.append(value.detach())
            clock.on_step_end()
    return float(torch.stack(kept).mean())


class InOrder:
    """Rows of a data set, padded in their order: the batches of the plain loop."""

    def __init__(self, rows: list, join: Any):
        self.parts = [join(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self):
        return iter(self.parts)


def as_labels(rows: list) -> dict[str, Tensor]:
    """transformers' batch of questions and answers."""
    ids, scored = preference.join_answers(*zip(*rows, strict=True), pad=1)
    return {"input_ids": ids, "attention_mask": (ids != 1).long(), "labels": ids.masked_fill(~scored, -100)}


def log_ratio(logits: Tensor, ids: Tensor, scored: Tensor) -> Tensor:
    """Log-probability of each answer, (B,)."""
    said = -nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (said.view(ids[:, 1:].shape) * scored[:, 1:]).sum(1)


class SFT:
    """Instruction tuning with LoRA, r = 8, on all linear layers."""

    name, unit, target = "SFT of a 360M decoder with LoRA", "tokens", 3.0

    def __init__(self, tiny: bool, folder: str):
        self.tiny, self.folder, self.rows = tiny, folder, texts(tiny)
        self.steps, self.epochs = len(self.rows) // BATCH, 2 if tiny else 3
        self.size = sum(len(a) + len(b) for a, b in self.rows) / self.steps
        self.ours, self.theirs = (m and m.to(torch.bfloat16) for m in decoders(tiny))
        self.chats = [([*a, *b][:-1], [-100] * (len(a) - 1) + b) for a, b in self.rows]

    def book(self, batches: Any) -> tuple:
        clock, net = Clock(self.steps), sft.AnswerLoss(copy.deepcopy(self.ours))
        how = lora.LoRA("all-linear", r=8, alpha=16)
        about: dict[str, Any] = {"lr": RATE, "settings": PLAN, "callbacks": [clock]}
        history = sft.teach(net, batches, how=how, steps=self.epochs * self.steps, **about)
        return clock.seconds(), clock.peak_mb(), history["train_loss"][-1]

    def trl(self, **more: Any) -> tuple:
        import peft
        import trl

        clock = Clock(self.steps)
        with bench.silent():
            trainer = trl.SFTTrainer(
                copy.deepcopy(self.theirs),
                trl_settings(trl.SFTConfig, self.folder, self.steps, self.epochs, **more),
                train_dataset=dataset(self.rows, ("prompt", "completion")),
                processing_class=tokenizer(sizes(self.tiny).vocab),
                peft_config=peft.LoraConfig(**LORA),
            )
        return trained_by_trl(trainer, clock, ("input_ids",), self.rows, self.steps)

    def plain(self) -> tuple:
        """transformers and peft in a plain loop."""
        import peft

        clock = Clock(self.steps)
        net = peft.get_peft_model(copy.deepcopy(self.theirs), peft.LoraConfig(**LORA))
        last = loop(net, InOrder(self.rows, as_labels), lambda batch: net(**batch).loss, self.epochs, clock)
        return clock.seconds(), clock.peak_mb(), last

    def sides(self) -> dict:
        found = {
            "buckets": lambda: self.book(sft.Buckets(self.chats, BATCH)),
            "joined rows": lambda: self.book(sft.Joined(self.chats, BATCH)),
        }
        return found | peers_of(self)


class DPO:
    """Direct preference optimization with LoRA on all linear layers; the reference is the model without it."""

    name, unit, target = "DPO of a 360M decoder with LoRA", "tokens", 1.5

    def __init__(self, tiny: bool, folder: str):
        self.tiny, self.folder, self.rows = tiny, folder, texts(tiny, pairs=True)
        self.steps, self.epochs = len(self.rows) // BATCH, 2 if tiny else 3
        self.size = sum(2 * len(a) + len(b) + len(c) for a, b, c in self.rows) / self.steps
        self.ours, self.theirs = (m and m.to(torch.bfloat16) for m in decoders(tiny))

    def book(self) -> tuple:
        """`fit` on `Policy`. The reference scores all pairs once; that time counts as if there were one epoch."""
        clock, policy = Clock(self.steps), preference.Policy(copy.deepcopy(self.ours))
        lora.apply(policy, lora.LoRA("all-linear", r=8, alpha=16), head=(), dtype=torch.float32)
        order = sorted(range(len(self.rows)), key=lambda i: sum(map(len, self.rows[i])))
        bench.synchronize()
        start, batches = time.perf_counter(), []
        for i in range(0, len(order), BATCH):
            part = [self.rows[k] for k in order[i : i + BATCH]]
            answers = [answer for _, *both in part for answer in both]
            ids, scored = preference.join_answers([row[0] for row in part for _ in "ab"], answers, pad=1)
            batches.append((ids, scored, preference.score_answers(policy, ids, scored).sum(1)))
        scoring = (time.perf_counter() - start) / self.steps

        def loss(logp: Tensor, reference: Tensor) -> Tensor:
            sums = logp.sum(1)
            return losses.dpo(sums[::2], sums[1::2], reference[::2], reference[1::2], beta=0.1)

        about: dict[str, Any] = {"lr": RATE, "settings": PLAN, "callbacks": [clock]}
        history = fit(policy, batches, loss=loss, epochs=self.epochs, **about)
        return clock.seconds() + scoring, clock.peak_mb(), history["train_loss"][-1]

    def trl(self, **more: Any) -> tuple:
        import peft
        import trl

        clock = Clock(self.steps)
        with bench.silent():
            trainer = trl.DPOTrainer(
                copy.deepcopy(self.theirs),
                None,
                trl_settings(trl.DPOConfig, self.folder, self.steps, self.epochs, **more),
                train_dataset=dataset(self.rows, ("prompt", "chosen", "rejected")),
                processing_class=tokenizer(sizes(self.tiny).vocab),
                peft_config=peft.LoraConfig(**LORA),
            )
        return trained_by_trl(trainer, clock, ("prompt_ids", "chosen_ids", "rejected_ids"), self.rows, self.steps)

    def plain(self) -> tuple:
        """transformers and peft in a plain loop; the reference is computed in each step, without the adapter."""
        import peft

        clock = Clock(self.steps)
        net = peft.get_peft_model(copy.deepcopy(self.theirs), peft.LoraConfig(**LORA))

        def batch(rows: list) -> dict[str, Tensor]:
            answers = [row[k] for k in (1, 2) for row in rows]
            ids, scored = preference.join_answers([row[0] for row in rows] * 2, answers, pad=1)
            return {"ids": ids, "scored": scored}

        def loss(batch: dict) -> Tensor:
            ids, scored = batch["ids"], batch["scored"]
            about = {"input_ids": ids, "attention_mask": (ids != 1).long()}
            with torch.no_grad(), net.disable_adapter():
                before = log_ratio(net(**about).logits, ids, scored)
            gain = log_ratio(net(**about).logits, ids, scored) - before
            good, bad = gain.chunk(2)
            return -nn.functional.logsigmoid(0.1 * (good - bad)).mean()

        last = loop(net, InOrder(self.rows, batch), loss, self.epochs, clock)
        return clock.seconds(), clock.peak_mb(), last

    def sides(self) -> dict:
        return {"fit": self.book} | peers_of(self)


def peers_of(work: Any) -> dict:
    """TRL as it is by default, without recomputing activations, and a plain loop; what is missing is left out."""
    found = {}
    have = bench.peer("peft") is not None
    if have and bench.peer("trl") is not None and bench.peer("accelerate") is not None:
        found["TRL and peft, defaults"] = work.trl
        found["TRL and peft, no gradient checkpointing"] = lambda: work.trl(gradient_checkpointing=False)
    if have:
        found["transformers and peft, plain loop"] = work.plain
    return found


class Fixed(causal.Cache):
    """A cache with room for all positions, written at `at`: tensors keep their place, as a CUDA graph needs."""

    def __init__(self, read: causal.Cache, length: int):
        super().__init__()
        self.at = torch.tensor([read.length], device=DEVICE)
        for name in ("keys", "values"):
            for i, t in getattr(read, name).items():
                room = t.new_zeros(*t.shape[:2], length, t.shape[3])
                room[:, :, : t.shape[2]] = t
                getattr(self, name)[i] = room

    def add(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[layer].index_copy_(2, self.at, k)
        self.values[layer].index_copy_(2, self.at, v)
        return self.keys[layer], self.values[layer]


@torch.no_grad()
def graphed(model: causal.Decoder, ids: Tensor, new: int) -> Tensor:
    """Greedy generation whose step is recorded once and then replayed: no Python between the kernels."""
    rows, start = ids.shape
    first = causal.Cache()
    piece = model(ids, (slice(None), -1), first).argmax(-1, keepdim=True)
    cache = Fixed(first, start + new)
    out = torch.zeros(rows, start + new, dtype=torch.long, device=DEVICE)
    out[:, :start], out[:, start] = ids, piece[:, 0]
    places = torch.arange(start + new, device=DEVICE)

    def step() -> None:
        hidden = model.read(piece, cache.at, cache, (places <= cache.at)[None, None, None])
        piece.copy_(model.logits(hidden[:, -1]).argmax(-1, keepdim=True))
        cache.at.add_(1)
        out.index_copy_(1, cache.at, piece)

    if DEVICE != "cuda":
        for _ in range(new - 1):
            step()
        return out
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        done = min(2, new - 1)
        for _ in range(done):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(new - 1 - done):
        graph.replay()
    return out


class Generation:
    """Greedy continuation of 32 prompts of 128 pieces by 128 pieces, in bfloat16."""

    name, unit, target = "generation with a 360M decoder", "tokens", 1.0

    def __init__(self, tiny: bool, folder: str):
        rows, prompt, self.new = (2, 5, 6) if tiny else (32, 128, 128)
        self.tiny, self.size = tiny, rows * self.new
        draws = torch.Generator().manual_seed(0)
        self.ids = torch.randint(2, sizes(tiny).vocab, (rows, prompt), generator=draws).to(DEVICE)
        self.ours, self.theirs = decoders(tiny, lively=True)
        self.equal = self.agreement()
        self.ours, self.theirs = self.ours.to(torch.bfloat16), self.theirs.to(torch.bfloat16)

    def transformers(self, **more: Any) -> Tensor:
        about = {"do_sample": False, "max_new_tokens": self.new, "min_new_tokens": self.new, "pad_token_id": 1}
        return self.theirs.generate(self.ids, attention_mask=torch.ones_like(self.ids), **about, **more)

    def agreement(self) -> str:
        """In float32: how many of the pieces are those of transformers, and how many different ones there are."""
        theirs = self.transformers()[:, self.ids.shape[1] :]
        mine = self.mine()[:, self.ids.shape[1] :]
        return (
            f"in fp32 {float((mine == theirs).float().mean()):.1%} of the pieces are those of transformers.generate "
            f"({len(theirs.unique())} different ones in {theirs.numel()})"
        )

    def mine(self) -> Tensor:
        return self.book()

    def book(self) -> Tensor:
        return causal.generate(self.ours, self.ids, self.new, temperature=0)

    def graph(self) -> Tensor:
        return graphed(self.ours, self.ids, self.new)

    def timed(self, run: Any, **more: Any) -> tuple:
        bench.synchronize()
        clock = Clock(0)
        start = time.perf_counter()
        out = run(**more)
        bench.synchronize()
        if out.shape[1] != self.ids.shape[1] + self.new:
            raise RuntimeError(f"{out.shape[1] - self.ids.shape[1]} new pieces instead of {self.new}")
        weights = sum(p.numel() * p.element_size() for p in self.ours.parameters()) / 1e6
        return time.perf_counter() - start, clock.peak_mb() + weights, math.nan

    def sides(self) -> dict:
        return {
            "`causal.generate`": lambda: self.timed(self.book),
            "transformers.generate": lambda: self.timed(self.transformers),
        }


class Recorded(Generation):
    """The same with steps that are prepared once: a CUDA graph, and transformers' static cache, which compiles."""

    name = "generation with a 360M decoder, prepared steps"

    def agreement(self) -> str:
        told = "ours records the graph in each call, transformers compiles once, in a round that does not count"
        return f"{super().agreement()}; {told}"

    def mine(self) -> Tensor:
        return self.graph()

    def sides(self) -> dict:
        static = {"cache_implementation": "static"}
        return {
            "the book's decoder in a CUDA graph": lambda: self.timed(self.graph),
            "transformers.generate, static cache": lambda: self.timed(self.transformers, **static),
        }


WORK = (SFT, DPO, Generation, Recorded)


def measure(kind: Any, tiny: bool, folder: str):
    """Rounds of all sides, interleaved; after each round the rows so far."""
    work = kind(tiny, folder)
    sides = work.sides()
    found: dict[str, list] = {name: [] for name in sides}
    trained = hasattr(work, "steps")  # generation compiles in its first round, which does not count
    for turn in range(1 if tiny else 3 if trained else 4):
        for name, run in sides.items():
            free()
            start = time.perf_counter()
            value = run()
            print(f"  round {turn}, {name}: {time.perf_counter() - start:.1f} s", flush=True)
            if turn or tiny or trained:
                found[name].append(value)
        if all(found.values()):
            yield lines_of(work, found)
    free()


def lines_of(work: Any, found: dict) -> list:
    """One line per side: the ratio to the first peer, and in the note to the others."""
    ours = [n for n in found if not n.startswith(("TRL", "transformers"))]
    peers = [n for n in found if n not in ours]
    seconds = {n: np.array([v[0] for v in values]) for n, values in found.items()}
    goal = work.target
    lines = []
    for name, values in found.items():
        step, memory = float(np.median(seconds[name])), float(np.median([v[1] for v in values]))
        last = float(np.mean([v[2] for v in values]))
        own = name in ours
        other = peers[0] if peers else None
        ratios = ", ".join(f"{float(np.median(seconds[p] / seconds[name])):.2f}× {p}" for p in peers if p != other)
        note = "; ".join(
            filter(
                None,
                (
                    f"beside the others: {ratios}" if own and ratios else "",
                    getattr(work, "equal", "") if own and name == ours[0] else "",
                    "TRL is not installed" if own and "TRL" not in str(peers) and goal > 1 else "",
                ),
            )
        )
        limit = f"{1e3 * step:,.1f} ms{'' if math.isnan(last) else ' a step'}, {work.size / step:,.0f} {work.unit}/s"
        limit += f", peak {memory:,.0f} MB" if DEVICE == "cuda" else ""
        limit += "" if math.isnan(last) else f", loss of the last epoch {last:.3f}"
        line = bench.row(
            f"{work.name}, {name}",
            target=f"≥ {goal:g}×" if own else "",
            values=seconds[other] / seconds[name] if other else None,
            met=(lambda v, g=goal: v >= g) if own else None,
            peer=other or "",
            limit=limit,
            note=note,
        )
        lines.append(line | {"ours": own, "rounds": len(values)})
    return lines
