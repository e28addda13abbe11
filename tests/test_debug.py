"""The appendix 'It does not learn': every fault is shown and repaired, found from what a reader sees, and named by `fit`."""

import ast
import json
import re

import pytest

from ftbook import train
from tools.settings import NBS

CELLS = json.loads((NBS / "A8_debug.ipynb").read_text(encoding="utf-8"))["cells"]


def sections() -> dict:
    """Heading of the third level -> the code below it, of the part on the faults."""
    found, heading, inside = {}, None, False
    for cell in CELLS:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            for level, name in re.findall(r"^(##+) (.+)$", source, flags=re.M):
                inside = name == "The faults" if level == "##" else inside
                heading = name if level == "###" and inside else None
        elif heading:
            found[heading] = found.get(heading, "") + source + "\n"
    return found


FAULTS = sections()


def slug(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_there_are_at_least_fifteen_faults_and_the_title_counts_them():
    assert len(FAULTS) >= 15
    promise = "".join(CELLS[0]["source"])
    words = {20 + i: f"twenty-{w}" for i, w in enumerate("one two three four five six".split(), 1)}
    assert words[len(FAULTS)] in promise


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_shown_and_repaired_by_asserts(name):
    tree = ast.parse(FAULTS[name])
    said = {n.msg.value for n in ast.walk(tree) if isinstance(n, ast.Assert) and isinstance(n.msg, ast.Constant)}
    assert {"symptom", "repair"} <= said
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", None) == "case"]
    assert [ast.literal_eval(n.args[0]) for n in calls] == [name]
    assert all(len(n.args) == 4 for n in calls), "what one sees, the check with its number, the repaired run"


def test_every_fault_is_found_from_what_a_reader_sees():
    (index,) = ["".join(c["source"]) for c in CELLS if "\n| you see | likely causes |\n" in "".join(c["source"])]
    rows = re.findall(r"^\| (?!you see)([^|]+) \| (.+) \|$", index, flags=re.M)
    linked = {target for _, causes in rows for target in re.findall(r"\]\(#([^)]+)\)", causes)}
    assert len(rows) >= 10
    assert {slug(name) for name in FAULTS} <= linked
    headings = [
        name
        for c in CELLS
        if c["cell_type"] == "markdown"
        for name in re.findall(r"^##+ (.+)$", "".join(c["source"]), flags=re.M)
    ]
    assert linked <= {slug(name) for name in headings}


def test_the_messages_of_fit_name_this_appendix():
    title = "".join(CELLS[0]["source"]).split("\n")[0].removeprefix("# ").strip()
    assert train._SEE == f". See the appendix '{title}'"
