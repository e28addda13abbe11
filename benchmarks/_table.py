"""Write benchmarks/README.md from the result files: called by tools/bench.py after the last script."""

import json
import os
import sys
from pathlib import Path

import _common as bench

from ftbook import results
from ftbook.runtime import atomic_write

ORDER = [
    "imports",
    "loop",
    "cnn_step",
    "batches",
    "lora_step",
    "adapters",
    "lora_inference",
    "ner_prepare",
    "ner_epoch",
    "run_ner",
    "entity_f1",
    "mlm",
    "optimizers",
]
GROWTH = {
    "tokens": "Milliseconds of a training step against the number of tokens in a row",
    "rank": "Milliseconds of a LoRA step against the rank",
    "adapters": "Milliseconds of a step and of a switch against the number of adapters in the model",
    "preparation": "Seconds of NER preparation against the number of sentences",
    "processes": "Seconds of the same training under torchrun with one and two processes",
    "memory": "Peak memory of fit against the number of training steps",
}
INTRO = """# Benchmarks

Written by `make bench`; do not edit. One script per question; `make bench CH=loop` or `python benchmarks/loop.py` runs
one (`--tiny`: in seconds, to see that it works). The sides of a comparison run in turns, A B A B, in one process; the
table shows the median of the paired ratio and its quartiles. Imports and peak memory are measured in fresh processes.
`make bench` uses one thread unless `OMP_NUM_THREADS` says otherwise, also in tokenizers. With one thread the clock is
CPU time, so that other programs on the machine count less; with more it is the wall clock. Peers are used as their
documentation says; a peer that is not installed leaves its rows unmeasured. `×` means how many times as fast as the
peer; a plain ratio is ours over the peer's. These are measurements, not timed tests: the tests only check that every
script runs.
"""


def load(folder: Path) -> dict:
    """name -> what was measured, of every result file."""
    os.environ["FTBOOK_RESULTS"] = str(folder)
    found = {p.stem: results.load(p.stem, "measured") for p in sorted(folder.glob("*.json"))}
    return {name: content for name, content in found.items() if not content["tiny"]}


def cells(row: dict) -> dict:
    """A row of the table: heading -> text."""
    met = {True: "met", False: "**not met**", None: "–"}[row["met"]]
    why = NOTES.get(row["what"], "") if row["met"] is False else ""
    note = " ".join(filter(None, (why, row["note"])))
    return {
        "question": row["what"],
        "target": row["target"] or "–",
        "measured: median [quartiles]": bench.shown(row),
        "peer": row["peer"] or "–",
        "how far from the limit": row["limit"] or "–",
        "met": f"{met}: {note}" if note else met,
    }


NOTES: dict[str, str] = {}  # row -> why its target is not met, from benchmarks/notes.json


def conditions(found: dict) -> str:
    """Machine, threads, load and versions, one line per different condition."""
    found = {name: content for name, content in found.items() if name != "gpu"} or found  # another machine
    first = next(iter(found.values()))["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in first["versions"].items())
    listed = "; ".join(f"{n} {c['machine']['load']:.0f}" for n, c in found.items())
    threads = sorted({c["machine"]["threads"] for c in found.values()})
    total = sum(c["seconds"] for c in found.values())
    return (
        f"Machine: {first['device']}, {first['system']}, Python {first['python']}, threads of PyTorch: "
        f"{', '.join(map(str, threads))}, native bf16: {'yes' if first['native bf16'] else 'no'}. "
        f"Versions: {versions}.\n"
        f"Load average when each script ended (a load above the number of cores means that others were working): "
        f"{listed}.\nAll scripts together: {total / 60:.0f} minutes.\n"
    )


def growth(content: dict) -> list[str]:
    out = ["## Growth\n"]
    for name in (n for n in GROWTH if n in content["figures"]):
        says = content["figures"][name]["says"]
        out.append(f"{says}\n\n![{GROWTH[name]}](figures/growth_{name}.svg)\n")
    return out


def gpu(found: dict) -> list[str]:
    out = ["## GPU\n"]
    if "gpu" not in found:
        return out + [
            "Not measured: no CUDA device was at hand when this table was written. `python benchmarks/gpu.py` "
            "runs the same questions with full-size models (BERT-base token classification at 128 tokens, "
            "ResNet-50, ViT-B/16, LoRA on the first two, masked language modeling, SFT, DPO, generation), next to "
            "HF Trainer, TRL, peft and transformers on the same work. Weights are random, so nothing is downloaded.\n"
        ]
    content = found["gpu"]
    made, held = content["date"], content["machine"]["versions"]
    versions = ", ".join(f"{name} {version}" for name, version in held.items())
    out.append(
        f"One {content['gpu']}, measured bf16 matrix-product peak {content['matmul_peak_tflops']:.0f} TFLOP/s, "
        f"{made}. Versions: {versions}. Weights and data are random. A ratio is to the first peer of its work, paired "
        "by rounds, by the wall clock; the last column names the other peers.\n"
    )
    out += standings(content["rows"])
    missing = [name for name in content["works"] if name not in {r["work"] for r in content["rows"]}]
    out.append(f"\nNot measured on it: {', '.join(missing)}.\n" if missing else "")
    columns = {"question": "work and setting", "target": "target", "rounds": "rounds"}
    columns |= {"measured: median [quartiles]": "speed over the peer [quartiles]", "peer": "peer"}
    columns |= {"how far from the limit": "measured", "met": "met"}
    lines = [cells(r) | {"rounds": str(r["rounds"])} for r in content["rows"]]
    return out + [str(results.table(lines, columns=columns)), ""]


def standings(rows: list) -> list[str]:
    """One line per work: the fastest of ours beside the fastest peer, by the quartiles of their rounds."""
    out = []
    for work in dict.fromkeys(r["work"] for r in rows):
        measured = [r for r in rows if r["work"] == work and r["measured"]]
        ours, peers = ([r for r in measured if r["ours"] is own] for own in (True, False))
        if not ours or not peers:
            continue
        best, rival = (max(some, key=lambda r: r["measured"][0]) for some in (ours, peers))
        if best["rounds"] < 2:
            where = "ahead" if best["measured"][0] > rival["measured"][0] else "behind"
            where += " in the only round, which leaves the spread open"
        elif best["measured"][1] > rival["measured"][2]:
            where = "ahead"
        else:
            where = "behind" if best["measured"][2] < rival["measured"][1] else "no clear difference"
        (name, speed), (other, its) = ((r["what"][len(work) + 2 :], r["limit"].split(", ")[1]) for r in (best, rival))
        out.append(f"- {work}: **{where}**. Ours at its fastest ({name}) {speed}, the fastest peer ({other}) {its}.")
    return out


def render(folder: Path) -> str:
    """The whole page."""
    notes = bench.HERE / "notes.json"
    NOTES.update(json.loads(notes.read_text(encoding="utf-8")) if notes.is_file() else {})
    found = load(folder)
    if not found:
        raise SystemExit(f"bench: no result file in {folder}; run the scripts first")
    out = [
        INTRO,
        conditions(found),
        f"{NOTES.get('remark', '')}\n".lstrip(),
        str(results.table([cells(r) for name in ORDER if name in found for r in found[name]["rows"]])),
    ]
    missing = [name for name in ORDER if name not in found]
    out.append(f"\nNot run: {', '.join(missing)}.\n" if missing else "")
    out += growth(found["growth"]) if "growth" in found else []
    return "\n".join(out + gpu(found)).rstrip() + "\n"


def write(folder: Path = bench.RESULTS, page: Path = bench.HERE / "README.md") -> Path:
    """Render the page and replace the file in one step."""
    text = render(folder)
    with atomic_write(page) as file:
        file.write_text(text, encoding="utf-8")
    return page


if __name__ == "__main__":
    print(f"wrote {write(*map(Path, sys.argv[1:]))}")
