"""The book to write again: `python -m tools.recall [FOLDER]` makes notebooks in which the bodies of key functions are empty.

Signature and docstring stay, and a cell below each runs the docstring's examples with what the reader wrote. Outputs are left
out. A notebook that is already in the folder is kept: it may hold a reader's work.
"""

import ast
import json
import sys
from pathlib import Path

from .generate import cell, dump, is_generated
from .settings import NBS, ROOT

KEYS = {
    "02_math": "bce_with_logits cross_entropy info_nce dpo reliability",
    "03_optim": "orthogonalize schedule",
    "04_train": "split_batch shard accuracy",
    "05_autoencoder": "reconstruction_loss masked_patches",
    "06_mlm": "split_documents",
    "07_causal": "next_probabilities pack",
    "08_finetune": "blocks replace_head",
    "10_ner": "spans plain_f1 to_iob2 iob2_transitions",
    "12_prompt": "calibrate pair_loss",
    "13_sft": "encode_chats read_names",
    "14_preference": "group_advantages ppo_loss",
    "15_regularize": "_elastic_net _shrink mixout",
    "16_augment": "random_crop random_erasing replace_mentions",
    "17_search": "halving_schedule selection_weights expected_best",
    "18_together": "vote simplex_weights pcgrad",
    "19_distill": "layer_map hidden_loss changed_copies",
    "20_compress": "scales round_columns low_rank",
    "21_adapt": "coral pseudo_labels reweigh",
    "22_adversarial": "project typos attention_rollout",
    "23_continual": "transfer class_numbers gate",
    "24_choose": "overlap knn_score ask",
    "25_distributed": "zero_bytes bubble cost",
    "26_deploy": "psi drift_test field_calibration",
    "27_tasks": "iou pseudo_values recall_at",
}
NOTE = "> [!NOTE]\n> Recall edition: the bodies of {names} are yours to write. The cell below each says whether its examples hold."


def emptied(source: str, names: set) -> tuple:
    """(the source with empty bodies for these functions, their names in order)."""
    lines, found = source.split("\n"), []
    if not any(f"def {name}(" in source for name in names):
        return source, found
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.FunctionDef) and node.name in names and ast.get_docstring(node):
            found.insert(0, node.name)
            text = node.body[0]
            pad = " " * text.col_offset
            lines[text.end_lineno : node.end_lineno] = [
                f'{pad}raise NotImplementedError("write the body of {node.name}")'
            ]
    return "\n".join(lines), found


def recalled(nb: dict, names: list) -> dict:
    """A notebook whose key functions are empty, with a check below each and without outputs."""
    cells = []
    for c in nb["cells"]:
        c = dict(c)
        if c["cell_type"] != "code":
            cells.append(c)
            continue
        c |= {"outputs": [], "execution_count": None}
        source = "".join(c["source"])
        source, found = emptied(source, set(names)) if source.startswith("#|") else (source, [])
        c["source"] = source.splitlines(keepends=True)
        cells.append(c)
        for name in found:
            text = f"from ftbook.exercises import examples\n\ndone = examples({name})"
            cells.append(cell("code", text, f"recall-{name}".replace("_", "-")[:64]))
    if names:
        note = NOTE.format(names=", ".join(f"`{n}`" for n in names))
        at = next((i for i, c in enumerate(cells) if is_generated(c)), 1)
        cells.insert(at, cell("markdown", note, "recall-note"))
    return {**nb, "cells": cells}


def main(argv: list) -> int:
    folder = Path(argv[0] if argv else ROOT / "recall").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    written, kept = 0, 0
    for path in sorted(NBS.glob("[!.]*.ipynb")):
        if (folder / path.name).exists():
            kept += 1
            continue
        nb = json.loads(path.read_text(encoding="utf-8"))
        (folder / path.name).write_text(dump(recalled(nb, KEYS.get(path.stem, "").split())), encoding="utf-8")
        written += 1
    bodies = sum(len(names.split()) for names in KEYS.values())
    print(
        f"exercises: {written} notebooks in {folder}, {bodies} bodies to write"
        + (f"; {kept} kept as they are" if kept else "")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
