"""How long is a LoRA training step, and how much memory does it keep, next to Hugging Face peft?"""

import copy
import json

import _common as bench
import torch
from adapters import PLACES

from ftbook import peft as ours
from ftbook.runtime import Meter

TARGETS = {"query, value": 0.97, "all linears": 0.90}


def step_of(model, batch):
    """One training step as a function; the same optimizer for both sides."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)

    def step():
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def adapted(side: str, model, target):
    """The model with LoRA of one side, in training mode, without dropout (so both sides do the same arithmetic).

    "base" trains one bias before the first layer instead: gradients pass through every layer, and nothing is added.
    """
    if side == "base":
        model.requires_grad_(False).base_model.embeddings.LayerNorm.bias.requires_grad_(True)
        return model.train()
    if side == "ours":
        return ours.apply(model, ours.LoRA(target, r=8, alpha=16), head=()).model.train()
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=list(target))).train()


def sizes(tiny: bool) -> tuple:
    model = bench.bert(32, 2, 2, 100, dropout=0.0) if tiny else bench.bert(dropout=0.0)
    return model, bench.token_batch(*((2, 8) if tiny else (16, 64)), vocab=100 if tiny else 8192)


def peak(side: str, tiny: bool) -> float:
    """Megabytes that the first step needs above the model (a later one reuses memory); one side per process."""
    model, batch = sizes(tiny)
    step = step_of(adapted(side, model, PLACES["all linears"]), batch)
    with Meter("cpu") as meter:
        step()
    return meter.peak_mb


def main(argv=None):
    args = bench.arguments(__doc__, argv)
    if args.part:
        print(json.dumps(peak(args.part, args.tiny)))
        return
    peft, rows = bench.peer("peft"), []
    for place, target in PLACES.items():
        model, batch = sizes(args.tiny)
        names = ["ours", "base"] + ["peft"] * bool(peft)
        sides = [adapted(side, copy.deepcopy(model), target) for side in names]
        t = bench.paired(*(step_of(m, batch) for m in sides), repeats=2 if args.tiny else 9)
        goal = TARGETS[place]
        rows.append(
            bench.row(
                f"LoRA step, {place}",
                target=f"≤ {goal}",
                values=t[:, 0] / t[:, 2] if peft else None,
                unit="",
                digits=3,
                met=lambda v, g=goal: v <= g,
                peer="peft",
                limit=f"ours {1e3 * bench.quartiles(t[:, 0])[0]:.0f} ms"
                + f"; the base with gradients but without adapters {1e3 * bench.quartiles(t[:, 1])[0]:.0f} ms",
            )
        )
    model, batch = sizes(args.tiny)
    for precision in ("fp32", "bf16"):
        sides = [adapted(side, copy.deepcopy(model), PLACES["all linears"]) for side in names]
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            kept = [ours.training_memory(m, batch)["activations"] for m in sides]
        own, base, other = (*kept, float("nan"))[:3]
        rows.append(
            bench.row(
                f"memory kept for the backward pass beyond the base's, all linears, {precision}",
                target="≤ 0.75",
                values=[(own - base) / (other - base)] if peft else None,
                unit="",
                met=lambda v: v <= 0.75,
                peer="peft",
                limit=f"ours {own:.0f} MiB, base {base:.0f}, peft {other:.0f}, counted tensor by tensor",
            )
        )
    rounds = range(1 if args.tiny else 2) if peft else ()
    peaks = [[bench.in_fresh_process(__file__, side, args) for side in ("ours", "base", "peft")] for _ in rounds]
    own, base, other = peaks[0] if peaks else (float("nan"),) * 3
    rows.append(
        bench.row(
            "extra memory of a step at its peak, all linears",
            target="≤ 0.75",
            values=[a / max(c, 1e-9) for a, _, c in peaks],
            unit="",
            met=lambda v: v <= 0.75,
            peer="peft",
            limit=f"above the model in fresh processes: ours {own:.0f} MB, base {base:.0f}, peft {other:.0f}",
        )
    )
    bench.save("lora_step", rows, args)


if __name__ == "__main__":
    main()
