"""The exercises of every chapter: enough of them, no answer beside its check, and solutions that the checks accept."""

import importlib
import json
import math
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tools.settings import NBS

CHAPTERS = sorted(NBS.glob("[0-9]*.ipynb"))
ASKED = re.compile(r"^\*\*(\d+) \((recall|compute|modify|open)\)\.\*\*", re.M)
SOLVED = re.compile(r"<details>\s*<summary>Solutions?\b.*?</details>", re.S)
CODE = re.compile(r"```python\n(.*?)```", re.S)
CALL = re.compile(r"^done = (check\.(\w+)\((\w+)\))$", re.M)
LIBRARY = {"math": "losses", "background": None}  # exercises -> the module that the chapter builds
MODULE = re.compile(r"from ftbook\.exercises import (\w+) as check")


def section(path) -> list:
    """The cells from the heading "Exercises" to the next one, those that a page hides left out."""
    found, on = [], False
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and re.search(r"^## ", source, re.M):
            on = "## Exercises" in source
            source = source[source.find("## Exercises") :]
        if on and not source.startswith("#| hide"):
            found.append((cell["cell_type"], source))
    return found


def checks() -> list:
    """(notebook, module, cell of the exercise, call, name of the checker, name of the answer, code of its solution)."""
    found = []
    for path in sorted(NBS.glob("[!.]*.ipynb")):
        cells, module = section(path), None
        for i, (kind, source) in enumerate(cells):
            module = (MODULE.search(source) or [None, module])[1]
            call = CALL.search(source) if kind == "code" else None
            if call:
                below = next((s for k, s in cells[i + 1 :] if k == "markdown"), "")
                solution = SOLVED.search(below)
                code = "\n".join(CODE.findall(solution[0])) if solution else ""
                found.append(pytest.param(path, module, source, *call.groups(), code, id=f"{path.stem}-{call[2]}"))
    return found


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_has_five_exercises_of_several_kinds_each_with_a_solution(path):
    text = "\n\n".join(source for _, source in section(path))
    asked = ASKED.findall(text)
    assert [int(n) for n, _ in asked] == list(range(1, len(asked) + 1)) and len(asked) >= 5
    assert {"compute", "modify"} <= {kind for _, kind in asked}
    assert len(SOLVED.findall(text)) == len(asked)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_no_answer_stands_on_the_page_outside_of_a_folded_solution(path):
    for kind, source in section(path):
        if kind == "code" and "#| code-fold: true" not in source:
            assert CALL.search(source), f"a cell that is no exercise: {source[:80]}"
            body = [line for line in source.split("\n") if line and not line.startswith(("from ", "done = "))]
            assert all(re.match(r"^\w+ = None  # ", line) for line in body), body


@pytest.mark.parametrize("path, module, source, call, checker, name, code", checks())
def test_a_check_refuses_no_answer_and_accepts_the_solution(path, module, source, call, checker, name, code, capsys):
    check = importlib.import_module(f"ftbook.exercises.{module}")
    assert not getattr(check, checker)(None)
    hint = capsys.readouterr().out
    assert hint.startswith("not yet: ") and len(hint) < 120
    library = LIBRARY.get(module, module)
    names = {library: importlib.import_module(f"ftbook.{library}")} if library else {}
    for found in list(names.values()):
        names |= vars(found)
    names |= {"math": math, "np": np, "torch": torch, "nn": nn, "F": F}
    exec(code, names)
    assert names.get(name) is not None, f"the solution of {checker} sets no `{name}`"
    assert getattr(check, checker)(names[name])
    assert capsys.readouterr().out == "correct\n"


def test_every_check_is_asked_for_by_its_chapter():
    asked = {}
    for parameter in checks():
        asked.setdefault(parameter.values[1], set()).add(parameter.values[4])
    for module, names in asked.items():
        assert set(importlib.import_module(f"ftbook.exercises.{module}").__all__) == names


WRONG = [
    ("background", "kinds", ["supervised"] * 4),
    ("background", "memory", (1.6, 1.6)),
    ("background", "transfer", (3, 5)),
    ("optim", "scale", {"Adam"}),
    ("optim", "scale", {"momentum"}),
    ("optim", "rate", (0.02, 0)),
    ("optim", "rate", (0.04, 1)),
    ("optim", "search", (0.02, 0.02)),
    ("train", "steps", (4, 3)),
    ("train", "schedule", lambda step, total_steps: 1.0),
    ("train", "callback", type("Never", (), {})),
    ("train", "optimism", 0.4),
    ("autoencoder", "remaining", (3, 0)),
    ("autoencoder", "band", lambda x: (0 * x, torch.ones_like(x).bool())),
    ("autoencoder", "band", lambda x: (x, torch.ones_like(x).bool())),
    ("autoencoder", "band", lambda x: (x[:1], x[:1])),
    ("mlm", "reason", "a"),
    ("mlm", "count", (19.2, 19.2)),
    ("mlm", "spans", lambda ids, vocab, p, g: torch.ones_like(ids).bool()),
    ("mlm", "spans", lambda ids, vocab, p, g: ids < 0),
    ("mlm", "spans", lambda ids, vocab, p, g: (torch.rand(ids.shape, generator=g) < p) & ~vocab.special[ids]),
    ("finetune", "buffers", {"weight"}),
    ("finetune", "buffers", {"running_mean"}),
    ("finetune", "opens", {0: 4}),
    ("vision", "mirrored", range(33)),
    ("vision", "parameters", 2_175_626),
    ("vision", "brightens", lambda x, strength: x),
    ("vision", "brightens", lambda x, strength: 1 - (1 - x.float()) * (1 - strength)),
    ("ner", "merges", lambda tags: tags),
    ("peft", "both_zero", (0, 1)),
    ("peft", "rank", lambda n_in, n_out: 1),
    ("peft", "merged", lambda w, a, b, s: w.add_(s * b @ a)),
    ("peft", "merged", lambda w, a, b, s: w + b @ a),
    ("peft", "merged", lambda w, a, b, s: w[0]),
    ("regularize", "acting", {"dropout"}),
    ("regularize", "shrinks", lambda x, t: x - t * x / x.norm(dim=1, keepdim=True)),
    ("regularize", "shrinks", lambda x, t: x),
    ("augment", "mixing", {"crop"}),
    ("augment", "turns", lambda x: x),
    ("augment", "turns", lambda x: x + 1),
    ("augment", "turns", lambda x: x[0]),
    ("search", "splits", {"test"}),
    ("search", "splits", {"training"}),
    ("search", "rungs", [(16, 4)]),
    ("search", "rungs", [(32, 4)]),
    ("search", "trials", 20),
    ("search", "hyperband", lambda total, factor: []),
    ("search", "hyperband", lambda total, factor: [[(27, 1)], [(9, 3)], [(3, 9)], [(1, 27)]]),
    ("together", "cheap", {"soup", "snapshots"}),
    ("together", "shares", (0.5, 0.3, 0.2)),
    ("together", "select", lambda p, y, rounds: (0, 1, 2, 3)),
    ("together", "select", lambda p, y, rounds: [0] * rounds),
    ("compress", "faster", {"8 bits", "low rank"}),
    ("compress", "bits", 4.5),
    ("compress", "rounded", (1.0, -0.4, 0.2)),
    ("compress", "rank", 192),
    ("compress", "clipped_scale", lambda w, bits, share: w.abs().max() / 2 ** (bits - 1)),
    ("adapt", "visible", {"covariate"}),
    ("adapt", "distance", 0.6),
    ("adapt", "positive", 0.31),
    ("adapt", "surest", lambda logits, share: logits.argmax(1)),
    ("adversarial", "failing", {"steps", "noise"}),
    ("adversarial", "lowest", 0.35),
    ("adversarial", "projected", [3, 0, -4]),
    ("adversarial", "passes", 35_000),
    ("adversarial", "toward", lambda model, x, goal, eps: x),
    ("adversarial", "toward", lambda model, x, goal, eps: x + 1),
    ("choose", "headed", {"LEEP"}),
    ("choose", "entropy", -0.56),
    ("choose", "peak", 396),
    ("choose", "labels", 64),
    ("choose", "spread", lambda p, group, n: list(range(n))),
    ("continual", "memories", {"replay", "LwF"}),
    ("continual", "kept", (0.73, 0.2)),
    ("continual", "balance", 4.0),
    ("continual", "enough", 340),
    ("continual", "balanced", lambda labels, size: list(range(size))),
    ("tasks", "falls", "both"),
    ("tasks", "overlap", 0.75),
    ("tasks", "frames", 118),
    ("tasks", "area", 0.5),
    ("tasks", "reciprocal", lambda scores: 1.0),
    ("deploy", "belongs", {"labels", "pickle"}),
    ("deploy", "throughput", 33.3),
    ("deploy", "index", 0.14),
    ("deploy", "weekly", 5.04),
    ("deploy", "groups", lambda lengths, size: [[i] for i in range(len(lengths))]),
    ("deploy", "groups", lambda lengths, size: [list(range(len(lengths)))]),
    (
        "deploy",
        "groups",
        lambda lengths, size: [list(range(i, min(i + size, len(lengths)))) for i in range(0, len(lengths), size)],
    ),
    ("distributed", "cut", {"weights", "optimizer"}),
    ("distributed", "gigabytes", 24.0),
    ("distributed", "ring", 0.75),
    ("distributed", "micro", 62),
    ("distributed", "scattered", lambda parts, rank: parts[rank]),
]


@pytest.mark.parametrize("module, checker, answer", WRONG)
def test_a_wrong_answer_gets_a_hint_and_not_the_answer(module, checker, answer, capsys):
    assert not getattr(importlib.import_module(f"ftbook.exercises.{module}"), checker)(answer)
    assert re.match(r"^not yet: \S", capsys.readouterr().out)


def test_numbers_reads_one_or_several_numbers_and_nothing_else():
    from ftbook.exercises import numbers

    assert numbers(3) == [3.0] and numbers(("1", 2), 2) == [1.0, 2.0]
    assert numbers(None) is None and numbers("two") is None and numbers((1, 2)) is None
