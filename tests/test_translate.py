"""The Chinese edition: what is changed, missing or wrong is named, and what is not translated says so."""

import json

import pytest

from ftbook.results import Markdown
from tools import translate
from tools.filter import transform
from tools.translate import CHANGED, MISSING, Edition, blocks, edition, notebooks, stamp, text_of, texts, values


def markdown(key: str, source: str) -> dict:
    return {"cell_type": "markdown", "id": key, "metadata": {}, "source": source}


def sentence(key: str, template: str, said: str) -> dict:
    data = {"text/markdown": said, "text/plain": said}
    output = {
        "output_type": "execute_result",
        "data": data,
        "metadata": {"ftbook": {"template": template, "values": {}}},
    }
    return {"cell_type": "code", "id": key, "metadata": {}, "source": "say()", "outputs": [output]}


TITLE, SAID = "# A title\n\nOne line.", "It is {a:.1%} of {n}."
NOTEBOOK = {"cells": [markdown("t", TITLE), sentence("s", SAID, "It is 3.0 % [1.0, 5.0] of 9.")]}


def made(**found: str) -> Edition:
    """The edition of a notebook with these translations, stamped unless they say `old`."""
    english = {k: t for c in NOTEBOOK["cells"] for k, t in texts(c).items()}
    kept = {f"{k}:1": ("00000000" if t == "old" else stamp(english[f"{k}:1"]), t) for k, t in found.items()}
    return Edition(NOTEBOOK, kept, {"9": "九"}, "99_name")


def test_the_files_in_the_repository_are_whole():
    assert translate.problems() == []


@pytest.mark.parametrize("file", notebooks(), ids=lambda f: f.stem)
def test_fields_are_read_from_a_stored_sentence_as_results_writes_them(file):
    """The site is built without the packages that compute them, so tools/translate.py reads the sentence itself."""
    for cell in edition(file).nb["cells"]:
        for output in cell.get("outputs", []):
            about = output.get("metadata", {}).get("ftbook", {})
            if "template" not in about or file.stem not in translate.whole() and not text_of(output).startswith("1. "):
                continue
            said = "".join(output["data"]["text/markdown"])
            if Markdown(about).text != said:
                continue  # results/ is newer than the outputs: tests/test_notebooks.py says so
            for field, text in values(about["template"], said).items():
                assert Markdown({**about, "template": f"{{{field}}}"}).text == text, field


def test_a_changed_cell_is_named_and_shown_in_english():
    one = made(t="old", s="有 {n} 个的 {a:.1%}。")
    (told,) = one.problems()
    assert "nbs/zh/99_name.md" in told and "t:1" in told and "--stamp t:1" in told
    shown = one.cell(NOTEBOOK["cells"][0])["source"]
    assert '# <span lang="en">A title</span>' in shown and CHANGED in shown
    assert '<div lang="en">\n\n\nOne line.' in shown
    assert NOTEBOOK["cells"][0]["source"] == TITLE, "the notebook itself stays as it is"


def test_a_cell_without_translation_is_named_and_shown_in_english():
    one = made(t="# 标题")
    (told,) = one.problems()
    assert "s:1 is not translated" in told
    said = one.cell(NOTEBOOK["cells"][1])["outputs"][0]["data"]["text/markdown"]
    assert MISSING in said and '<div lang="en">' in said and "It is 3.0 % [1.0, 5.0] of 9." in said


def test_a_sentence_is_filled_from_the_stored_output():
    one = made(t="# 标题", s="{n} 个中的 {a:.1%}。")
    assert one.problems() == []
    assert one.cell(NOTEBOOK["cells"][1])["outputs"][0]["data"]["text/markdown"] == "九 个中的 3.0 % [1.0, 5.0]。"
    assert [c["id"] for c in transform(one.notebook(), "sphinx", "99_name")["cells"]] == ["t", "s"]


@pytest.mark.parametrize(
    ("chinese", "words"),
    [
        ("只有 {n}。", "{a:.1%} is missing"),
        ("{n}、{a:.1%}、{b}。", "{b} is not in the English"),
        ("{n} {a:.2%}", "{a:.1%} is missing"),
    ],
)
def test_a_field_too_few_or_too_many_is_named_with_its_block(chinese, words):
    one = made(t="# 标题", s=chinese)
    assert any("s:1" in line and words in line for line in one.problems())
    with pytest.raises(ValueError, match="99_name.md: s:1: the field"):
        one.notebook()


def test_links_and_formulas_are_those_of_the_english():
    english, chinese = "See [a](b.html) and $x^2$.", "见 [甲](c.html)。"
    told = "\n".join(translate.wrong("k:1", english, chinese, template=False))
    assert "'b.html'" in told and "'c.html'" in told and "'$x^2$'" in told


def test_a_sentence_that_can_be_read_in_two_ways_is_refused():
    assert values("{a}, {b}", "1 [2, 3], 4") == {"a": "1 [2, 3]", "b": "4"}
    with pytest.raises(ValueError, match="does not tell where its fields end"):
        values("{a}, {b}", "1, 2, 3")


def test_a_block_stands_once():
    assert blocks("<!-- a:1 0123abcd -->\n甲\n\n<!-- b:2 -->\n乙\n") == {"a:1": ("0123abcd", "甲"), "b:2": ("", "乙")}
    with pytest.raises(ValueError, match="a:1 stands twice"):
        blocks("<!-- a:1 -->\n甲\n<!-- a:1 -->\n乙\n")


def test_a_stamp_is_renewed_after_a_look(tmp_path, monkeypatch):
    """In a copy of the folder: the hash of a block becomes that of the English."""
    text = translate.file_of("04_train").read_text(encoding="utf-8")
    old = text.split("eec6af95:1 ")[1][:8]
    (tmp_path / "04_train.md").write_text(text.replace(old, "00000000"), encoding="utf-8")
    (tmp_path / "words.md").write_text("", encoding="utf-8")
    monkeypatch.setattr(translate, "FOLDER", tmp_path)
    file = next(f for f in notebooks() if f.stem == "04_train")
    assert any("eec6af95:1 changed" in line for line in edition(file).problems())
    assert translate.renew("eec6af95") == ["eec6af95:1"]
    assert edition(file).problems() == []
    with pytest.raises(SystemExit, match="no block 'nothing'"):
        translate.renew("nothing")


def test_no_code_cell_changes_and_every_summary_is_there():
    one = edition(notebooks()[1])
    for before, after in zip(one.nb["cells"], one.notebook()["cells"], strict=True):
        assert before["cell_type"] == "markdown" or before["source"] == after["source"]
    assert translate.summaries().count("\n## [") == sum(bool(edition(f).summary()) for f in notebooks())
    assert json.dumps(one.nb) == json.dumps(edition(notebooks()[1]).nb)
