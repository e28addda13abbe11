"""A file of one's own: what `read_table` takes, and what it says of the rest."""

import json

import pytest

from ftbook.texts import read_table

ROWS = [
    ("Das Paket für Müller, bestellt im Mai", "delivery"),
    ('it says "delivered" 😡', "delivery"),
    ("charged twice\nfor one order; why?", "payment"),
]
WANTED = [{"text": text, "label": label} for text, label in ROWS]


def written(tmp_path, text: str, name: str = "mails.csv", encoding: str = "utf-8"):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return path


def as_csv(sign: str = ",", end: str = "\r\n", names=("text", "label")) -> str:
    cells = ['"' + cell.replace('"', '""') + '"' for row in (names, *ROWS) for cell in row]
    return "".join(f"{a}{sign}{b}{end}" for a, b in zip(cells[::2], cells[1::2], strict=True))


@pytest.mark.parametrize("sign", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_what_spreadsheets_write_is_read_as_it_stands(tmp_path, sign, end, encoding):
    assert read_table(written(tmp_path, as_csv(sign, end), encoding=encoding)) == WANTED


def test_rows_of_json_are_read_one_a_line_or_as_a_list(tmp_path):
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in WANTED)
    assert read_table(written(tmp_path, lines + "\r\n\r\n", "mails.jsonl")) == WANTED
    assert read_table(written(tmp_path, json.dumps(WANTED, indent=1), "mails.json")) == WANTED
    lists = read_table(written(tmp_path, '{"text": "a", "day": []}', "x.jsonl"), ["text", "day"])
    assert lists == [{"text": "a", "day": []}]


def test_a_break_that_json_keeps_inside_a_text_ends_no_line(tmp_path):
    path = written(tmp_path, '{"text": "one\u2028two", "label": "a"}\n', "x.jsonl")
    assert read_table(path) == [{"text": "one\u2028two", "label": "a"}]


def test_empty_lines_and_other_columns_are_passed_over(tmp_path):
    text = "\nid,text,label\n1,late,delivery\n\n,,\n2,twice,payment\n"
    assert [row["text"] for row in read_table(written(tmp_path, text))] == ["late", "twice"]
    assert read_table(written(tmp_path, text), "text") == [{"text": "late"}, {"text": "twice"}]


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "mails.csv has no row; give the columns text, label"),
        ("text,label\n", "has no row"),
        ("mail,topic\nlate,delivery\n", "line 2 has no 'text', only 'mail', 'topic'"),
        ("text,label\nlate,delivery\ntwice\n", "line 3: 'label' is empty"),
        ("text,label\nlate,delivery\n ,payment\n", "line 3: 'text' is empty; fill it in, or take the row out"),
        ("text,label\nlate, and wet,delivery\n", "line 2 has 1 cells more than the first row"),
        ('text,label\n"late,delivery\ntwice,payment\n', "a quotation mark in a text in quotes is written twice"),
        ('{"text": "late", "label": "a"}\n{"text": "twice"}', "line 2 has no 'label', only 'text'"),
        ('{"text": "late", "label": null}', "line 1: 'label' is empty"),
        ('{"text": "late", "label": "a"}\n{oops}', "line 2 is no JSON"),
        ('["late", "twice"]', "line 1 is 'late', no object with the columns text, label"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_line(tmp_path, text, says):
    with pytest.raises(ValueError) as caught:
        read_table(written(tmp_path, text))
    assert says in str(caught.value)


def test_a_file_in_another_encoding_is_refused_with_the_cure(tmp_path):
    with pytest.raises(ValueError, match="is no UTF-8 .*save it again"):
        read_table(written(tmp_path, "text,label\nMüller,a\n", encoding="latin-1"))
    with pytest.raises(FileNotFoundError, match="nothing.csv"):
        read_table(tmp_path / "nothing.csv")
