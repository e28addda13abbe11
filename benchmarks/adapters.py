"""How long does it take to put a LoRA adapter into a model, to load it from a file, to merge it?"""

import copy
import gc
import tempfile

import _common as bench
import torch

from ftbook import peft as ours

PLACES = {"query, value": ("query", "value"), "all linears": ("query", "key", "value", "dense")}


def twin(model):
    """A copy of a model whose parameters share the original's memory: cheap, and enough where weights do not change."""
    return copy.deepcopy(model, {id(p): torch.nn.Parameter(p.detach()) for p in model.parameters()})


def peer_setup(peft, model, target, folder):
    """peft's side of the three questions, as its quick tour writes them."""
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=list(target))
    peft.get_peft_model(twin(model), config).save_pretrained(folder)
    return config


def timed(setup, act):
    """A function that returns the seconds of `act(setup())` without the set-up and without garbage collection."""

    def once():
        state, now = setup(), bench.clock_for()
        gc.disable()
        start = now()
        act(state)
        seconds = now() - start
        gc.enable()
        return seconds

    return once


def measure(model, peft, place: str, target, repeats: int) -> list:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        ours.apply(twin(model), ours.LoRA(target, r=8, alpha=16), head=()).save(f"{folder}/ours")
        if peft:
            config = peer_setup(peft, model, target, f"{folder}/peft")
        copied = lambda: twin(model)  # noqa: E731
        lora = ours.LoRA(target, r=8, alpha=16)
        wrapped = lambda: ours.apply(copied(), lora, head=())  # noqa: E731
        actions = {
            "wrap": (
                (copied, lambda m: ours.apply(m, lora, head=())),
                (copied, lambda m: peft.get_peft_model(m, config)),
                8,
            ),
            "load": (
                (copied, lambda m: ours.load(m, f"{folder}/ours")),
                (copied, lambda m: peft.PeftModel.from_pretrained(m, f"{folder}/peft")),
                5,
            ),
            "merge": (
                (wrapped, lambda a: a.remove(keep_merged=True)),
                (lambda: peft.get_peft_model(copied(), config), lambda m: m.merge_and_unload()),
                4,
            ),
        }
        for name, (own, other, target_ratio) in actions.items():
            sides = [timed(*own)] + ([timed(*other)] if peft else [])
            seconds = bench.paired(*sides, repeats=repeats)
            ratio = seconds[:, 1] / seconds[:, 0] if peft else None
            limit = f"ours {1e3 * bench.quartiles(seconds[:, 0])[0]:.1f} ms"
            limit += f", peft {1e3 * bench.quartiles(seconds[:, 1])[0]:.1f} ms" if peft else ""
            if name == "merge":
                undo = bench.paired(timed(wrapped, lambda a: a.merge()), repeats=repeats)
                limit += f"; `merge()`, which can be undone exactly, {1e3 * bench.quartiles(undo[:, 0])[0]:.1f} ms"
                limit += f"; adding the products B A alone {1e3 * products(model, target):.1f} ms"
            rows.append(
                bench.row(
                    f"adapter {name}, {place}",
                    target=f"≥ {target_ratio}×",
                    values=ratio,
                    peer="peft",
                    met=lambda v, t=target_ratio: v >= t,
                    limit=limit,
                )
            )
    return rows


def products(model, target) -> float:
    """Seconds of the unavoidable part of merging: W + B A in place, for every layer."""
    adapter = ours.apply(twin(model), ours.LoRA(target, r=8), head=())
    layers = [(w.base.weight.detach(), w.layers["default"]) for w in adapter.places.values()]
    parts = [(weight, x.lora_B.detach(), x.lora_A.detach()) for weight, x in layers]

    def add():
        for weight, B, A in parts:
            weight.addmm_(B, A)

    return bench.quartiles(bench.paired(add, repeats=5)[:, 0])[0]


def main(argv=None):
    args = bench.arguments(__doc__, argv)
    peft = bench.peer("peft")
    model = bench.bert(32, 2, 2, 100) if args.tiny else bench.bert()
    rows = []
    for place, target in PLACES.items():
        rows += measure(model.eval(), peft, place, target, 2 if args.tiny else 11)
    bench.save("adapters", rows, args)


if __name__ == "__main__":
    main()
