"""What does an un-merged LoRA adapter on all linear layers cost at inference?"""

import _common as bench
import torch
from adapters import PLACES, twin
from lora_step import adapted, sizes


def main(argv=None):
    args = bench.arguments(__doc__, argv)
    model, batch = sizes(args.tiny)
    batch.pop("labels")
    peft = bench.peer("peft")
    models = [model, *(adapted(side, twin(model), PLACES["all linears"]) for side in ["ours"] + ["peft"] * bool(peft))]

    def run(m):
        def forward():
            with torch.inference_mode():
                m(**batch)

        m.eval()
        return forward

    t = bench.paired(*map(run, models), repeats=2 if args.tiny else 31)
    other = f"peft {bench.quartiles(t[:, 2] / t[:, 0])[0]:.2f}" if peft else ""
    rows = [
        bench.row(
            "un-merged LoRA inference, all linears, batch 16 × 64",
            target="≤ 1.05 of the base",
            values=t[:, 1] / t[:, 0],
            unit="",
            digits=3,
            met=lambda v: v <= 1.05,
            peer=other,
            limit=f"the base {1e3 * bench.quartiles(t[:, 0])[0]:.0f} ms",
        )
    ]
    bench.save("lora_inference", rows, args)


if __name__ == "__main__":
    main()
