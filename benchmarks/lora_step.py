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
    """The model with LoRA of one side, in training mode, without dropout (so both sides do the same arithmetic)."""
    if side == "ours":
        return ours.apply(model, ours.LoRA(target, r=8, alpha=16), head=()).model.train()
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=list(target))).train()


def sizes(tiny: bool) -> tuple:
    model = bench.bert(32, 2, 2, 100, dropout=0.0) if tiny else bench.bert(dropout=0.0)
    return model, bench.token_batch(*((2, 8) if tiny else (16, 64)), vocab=100 if tiny else 8192)


def peak(side: str, tiny: bool) -> float:
    """Megabytes that the second step needs above what is there before it; one side per process."""
    model, batch = sizes(tiny)
    step = step_of(adapted(side, model, PLACES["all linears"]), batch)
    step()
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
        sides = [adapted(side, copy.deepcopy(model), target) for side in ["ours"] + ["peft"] * bool(peft)]
        frozen = copy.deepcopy(model).requires_grad_(False)
        frozen.classifier.requires_grad_(True)
        steps = [step_of(m, batch) for m in (*sides, frozen)]
        t = bench.paired(*steps, repeats=2 if args.tiny else 11)
        goal = TARGETS[place]
        rows.append(
            bench.row(
                f"LoRA step, {place}",
                target=f"≤ {goal}",
                values=t[:, 0] / t[:, 1] if peft else None,
                unit="",
                digits=3,
                met=lambda v, g=goal: v <= g,
                peer="peft",
                limit=f"ours {1e3 * bench.quartiles(t[:, 0])[0]:.0f} ms"
                + f"; forward pass and head of the base alone {1e3 * bench.quartiles(t[:, -1])[0]:.0f} ms",
            )
        )
        kept = [ours.training_memory(m, batch)["activations"] for m in sides]
    rows.append(
        bench.row(
            "memory kept for the backward pass, all linears",
            target="≤ 0.75",
            values=[kept[0] / kept[1]] if peft else None,
            unit="",
            met=lambda v: v <= 0.75,
            peer="peft",
            limit=f"ours {kept[0]:.1f} MiB"
            + (f", peft {kept[1]:.1f} MiB" if peft else "")
            + ", counted tensor by tensor",
        )
    )
    rounds = range(1 if args.tiny else 2) if peft else ()
    peaks = [[bench.in_fresh_process(__file__, side, args) for side in ("ours", "peft")] for _ in rounds]
    rows.append(
        bench.row(
            "peak memory of a step, all linears",
            target="≤ 0.75",
            values=[a / max(b, 1e-9) for a, b in peaks],
            unit="",
            met=lambda v: v <= 0.75,
            peer="peft",
            limit=f"ours {peaks[0][0]:.0f} MB, peft {peaks[0][1]:.0f} MB above the model, fresh processes"
            if peaks
            else "",
        )
    )
    bench.save("lora_step", rows, args)


if __name__ == "__main__":
    main()
