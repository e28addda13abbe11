"""ftbook.corpus: reading and writing tagged sentences, words, brackets, display, and the bundled corpus."""

import itertools
import json
import re
import time
import unicodedata
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sequences import iob2

from ftbook import corpus as cp
from ftbook import data
from ftbook.corpus import Corpus, Entity, Sentence, read_brackets, read_conll, show_sentence, split_words, write_conll
from ftbook.tags import to_iob2

QUICK = settings(max_examples=60, deadline=None)


# ---------------------------------------------------------------- reading and writing

WORDS = st.text(
    st.characters(blacklist_categories=("Cs",), blacklist_characters=" \t\r\n\ufeff"), min_size=1, max_size=6
).filter(lambda w: not w.startswith("-DOCSTART-"))


@st.composite
def corpora(draw):
    """A small corpus with documents numbered from 0."""
    doc, out = 0, []
    for i in range(draw(st.integers(1, 4))):
        tags = draw(iob2())
        doc += bool(i) and draw(st.booleans())
        out.append(Sentence([draw(WORDS) for _ in tags], tags, doc))
    return Corpus(out)


@QUICK
@given(corpora(), st.sampled_from(["IOB1", "IOB2", "BIOES"]), st.sampled_from([".conll", ".jsonl"]))
def test_what_is_written_is_read_back(tmp_path_factory, corpus, scheme, suffix):
    path = tmp_path_factory.mktemp("c") / ("x" + suffix)
    write_conll(corpus, path, scheme)
    back = read_conll(path, scheme)
    assert list(back) == list(corpus) and not back.repairs


def test_scheme_is_detected(tmp_path):
    cases = {
        "IOB1": "a I-PER\nb I-PER\nc B-PER\nd O\n",
        "IOB2": "a B-PER\nb I-PER\nc B-PER\n",
        "BIOES": "a S-PER\nb B-LOC\nc E-LOC\n",
    }
    for scheme, text in cases.items():
        (tmp_path / "f").write_text(text)
        assert read_conll(tmp_path / "f").scheme == scheme
    assert read_conll(tmp_path / "f")[0].entities == [("PER", 0, 1), ("LOC", 1, 3)]
    (tmp_path / "f").write_text("a U-PER\nb B-LOC\nc I-LOC\nd L-LOC\n")
    assert read_conll(tmp_path / "f")[0].tags == ["B-PER", "B-LOC", "I-LOC", "I-LOC"]


def test_columns_documents_and_line_ends(tmp_path):
    lines = [
        "-DOCSTART- -X- O O",
        "",
        "EU NNP I-NP I-ORG",
        "rejects VBZ I-VP O",
        "",
        "-DOCSTART- -X- O O",
        "",
        "Peter NNP I-NP I-PER",
        "",
    ]
    text = "\r\n".join(lines)
    (tmp_path / "f").write_bytes(b"\xef\xbb\xbf" + text.encode())
    corpus = read_conll(tmp_path / "f")
    assert corpus.words == [["EU", "rejects"], ["Peter"]] and [s.doc for s in corpus] == [0, 1]
    assert corpus.tags == [["B-ORG", "O"], ["B-PER"]] and corpus.labels == ["O", "B-ORG", "I-ORG", "B-PER", "I-PER"]
    assert len(corpus[0]) == 2


BAD = {
    "a B-PER\nb\n": "line 2: 1 column",
    "a x y z B-PER\n": "line 1: 5 column",
    "a B-PER\nb x O\n": "line 2: 3 column",
    "a O\nb B_PER\n": "line 2: unknown tag 'B_PER'",
    "a O\nb o\n": "line 2: unknown tag 'o'",
    "a O\n\nb B-PER\nc I-LOC\n": "line 4: tag 'I-LOC' of 'c' after 'B-PER'",
    "a B-LOC\nb O\nc I-LOC\nd B-PER\n": "line 3: tag 'I-LOC'",
    "a B-LOC\nb O\nc S-LOC\n": "line 2: tag 'O'",
    "\tO\nb O\n": "line 1: the word is empty",
    "": "is the file empty",
    "\n\n": "is the file empty",
}


@pytest.mark.parametrize("text", BAD)
def test_flaws_name_file_line_and_remedy(tmp_path, text):
    (tmp_path / "flawed.conll").write_text(text)
    with pytest.raises(ValueError, match=re.escape(BAD[text])) as error:
        read_conll(tmp_path / "flawed.conll")
    assert "flawed.conll" in str(error.value) and ("strict=False" in str(error.value) or "empty" in str(error.value))


@pytest.mark.parametrize("text", [t for t in BAD if t.strip()])
def test_flaws_are_repaired_and_counted(tmp_path, text):
    (tmp_path / "f").write_text(text)
    corpus = read_conll(tmp_path / "f", strict=False)
    assert sum(corpus.repairs.values()) >= 1
    for s in corpus:
        assert to_iob2(s.tags, "IOB2") == (s.tags, []) and len(s.words) == len(s.tags)


# a file in which most names begin with I-; two begin with a B- that IOB1 would not write
CONLL_2003 = "EU I-ORG\nrejects O\n\nPeter I-PER\nBlackburn I-PER\n\n" * 50 + "in O\nRome B-LOC\n\nAda B-PER\nsat O\n"


@pytest.mark.parametrize("strict", [True, False])
def test_the_scheme_is_what_most_names_say_and_odd_lines_are_reported(tmp_path, strict):
    (tmp_path / "eng.train").write_text(CONLL_2003)
    with pytest.warns(UserWarning, match=r"2 tag\(s\) are not as IOB1.*eng.train, line 302: tag 'B-LOC' of 'Rome'"):
        corpus = read_conll(tmp_path / "eng.train", strict=strict)
    assert corpus.scheme == "IOB1" and len(corpus) == 102 and not corpus.repairs
    assert corpus.tags[-2:] == [["O", "B-LOC"], ["B-PER", "O"]] and corpus.tags[1] == ["B-PER", "I-PER"]
    assert [re.search(r"eng.train, line \d+", p)[0] for p in corpus.problems] == [
        "eng.train, line 302",
        "eng.train, line 304",
    ]


def test_a_stray_tag_is_named_instead_of_the_rest_of_the_file(tmp_path):
    (tmp_path / "f").write_text("a B-PER\nb I-PER\n\n" * 20 + "c S-LOC\n")
    with pytest.raises(ValueError, match="line 61: tag 'S-LOC' of 'c' .*breaks IOB2"):
        read_conll(tmp_path / "f")
    corpus = read_conll(tmp_path / "f", strict=False)
    assert corpus.tags[-1] == ["B-LOC"] and corpus.problems == [
        f"{tmp_path / 'f'}, line 61: tag 'S-LOC' of 'c' after the start of the sentence breaks IOB2"
    ]


COMMENTED = """#begin document (one); part 000
# text = Rome sleeps .
# O
Rome B-LOC
sleeps O
# a remark in between
. O

#
#\thttp://example.org/# O\t[2009-10-17]
# O
1 O
#end document
"""


@pytest.mark.parametrize("strict", [True, False])
def test_comments_are_never_words(tmp_path, strict):
    (tmp_path / "f").write_text(COMMENTED)
    corpus = read_conll(tmp_path / "f", strict=strict)
    assert corpus.words == [["#", "Rome", "sleeps", "."], ["#", "1"]]  # "# O" is a word with its tag
    assert corpus.tags == [["O", "B-LOC", "O", "O"], ["O", "O"]] and not corpus.problems


def test_a_file_whose_lines_end_as_on_an_old_mac_is_read_line_by_line(tmp_path):
    path = tmp_path / "mac.txt"
    path.write_bytes(b"A B-PER\rb O\r\rc O\r")
    assert read_conll(path).words == [["A", "b"], ["c"]]
    path.write_bytes(b"A B-PER\r\r\nb O\r\r\n\r\r\nc O\r\r\n")  # converted twice
    assert read_conll(path).words == [["A", "b"], ["c"]]
    for text, line in ((b"A B-PER\rb X\r", 2), (b"A O\r\rc O\rd\xff O\r", 4)):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=f"line {line}"):
            read_conll(path)


def test_lines_are_counted_across_comments(tmp_path):
    (tmp_path / "f").write_text("# one\na O\n# two\nb O\nc I-LOC\nd B-LOC\ne B-PER\n")
    with pytest.raises(ValueError, match="line 5: tag 'I-LOC'"):
        read_conll(tmp_path / "f")
    (tmp_path / "f").write_text("a O\n#\nb O\n")  # a word that lost its tag
    with pytest.raises(ValueError, match="line 2: 1 column"):
        read_conll(tmp_path / "f")


GERMEVAL = """#\thttp://de.example.org/Schartau [2009-10-17]
1\tSchartau\tB-PER\tO
2\tsagte\tO\tO
3\tdem\tO\tO
4\tBerliner\tB-ORG\tB-LOCderiv
5\tVerlag\tI-ORG\tO

#\thttp://de.example.org/1 [2009-10-18]
1\t1\tO\tO
2\tTag\tO\tO
"""


@pytest.mark.parametrize("strict", [True, False])
def test_numbered_rows_are_found(tmp_path, strict):
    (tmp_path / "f").write_text(GERMEVAL)
    corpus = read_conll(tmp_path / "f", strict=strict)
    assert corpus.words == [["Schartau", "sagte", "dem", "Berliner", "Verlag"], ["1", "Tag"]]
    assert corpus.tags[0] == ["B-PER", "O", "O", "B-ORG", "I-ORG"] and not corpus.problems
    assert read_conll(tmp_path / "f", columns=(1, 3)).tags[0] == ["O", "O", "O", "B-LOCderiv", "O"]
    (tmp_path / "f").write_text("0 EU NNP I-NP I-ORG\n1 rejects VBZ I-VP O\n\n0 Peter NNP I-NP I-PER\n")
    corpus = read_conll(tmp_path / "f", strict=strict)
    assert corpus.words == [["EU", "rejects"], ["Peter"]] and corpus.tags == [["B-ORG", "O"], ["B-PER"]]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("more", ["", "\tO"], ids=["one tag", "two tags"])
def test_ranges_and_empty_nodes_of_conll_u_are_no_words(tmp_path, more, strict):
    rows = ["1-2\tdu\t_", "1\tde\tO", "2\tle\tO", "3\tNil\tB-LOC", "3.1\test\t_"]
    first = "".join(f"{row}{more}\n" for row in rows)
    second = f"1\tvu\tO{more}\n2-3\tau\t_\t_\t_\n2\ta\tO{more}\n3\tle\tO{more}\n"
    for text in (f"{first}\n{second}", f"{second}\n{first}", f"0.1\ty\t_{more}\n{second}\n{first}"):
        (tmp_path / "f").write_text(text)
        corpus = read_conll(tmp_path / "f", strict=strict)
        assert sorted(corpus.words) == [["de", "le", "Nil"], ["vu", "a", "le"]] and not corpus.problems
        assert sorted(corpus.tags) == [["O", "O", "B-LOC"], ["O", "O", "O"]]


def test_ranges_that_are_words_stay_words(tmp_path):
    for text in ("1-2 CD O\nwins NN O\n3-4 CD O\n", "1-2 O\n1 O\n2 O\n", "1.5 CD I-NP O\n", "3-4 CD O\n" * 3):
        (tmp_path / "f").write_text(text)
        assert read_conll(tmp_path / "f").words == [[line.split()[0] for line in text.splitlines()]]


def test_numbers_that_are_words_stay_words(tmp_path):
    (tmp_path / "f").write_text("1 CD O\n, , O\n2 CD O\n\n1 CD O\n")
    assert read_conll(tmp_path / "f").words == [["1", ",", "2"], ["1"]]
    (tmp_path / "f").write_text("1 O\n2 O\n\n1 O\n2 O\n")
    assert read_conll(tmp_path / "f").words == [["1", "2"], ["1", "2"]]
    (tmp_path / "f").write_text("1 CD I-NP O\n")
    assert read_conll(tmp_path / "f").words == [["1"]]


def test_a_flaw_in_a_numbered_file_is_named_and_mended(tmp_path):
    (tmp_path / "f").write_text(
        GERMEVAL + "\n1\tIm\tO\n2\tMai\tO\tO\nBonn\tB-LOC\tO\n" + "\n1\tEin\tO\tO\n2\tWort\tO\tO\n" * 20
    )
    with pytest.raises(
        ValueError, match="line 12: 3 column.* where 4 .*The word stands in column 2 and the tag in column 3"
    ):
        read_conll(tmp_path / "f")
    corpus = read_conll(tmp_path / "f", strict=False)
    assert (
        corpus.words[2] == ["Im", "Mai", "Bonn"]
        and len(corpus.problems) == corpus.repairs["wrong number of columns"] == 2
    )


def test_columns_can_be_named(tmp_path):
    (tmp_path / "f").write_text("O a b c d e EU B-ORG\nO a b c d e calls O\n")
    assert read_conll(tmp_path / "f", columns=(6, -1)).words == [["EU", "calls"]]
    assert read_conll(tmp_path / "f", columns=(6, 0)).tags == [["O", "O"]]
    with pytest.raises(ValueError, match="line 1: 8 column.* name other columns with columns="):
        read_conll(tmp_path / "f")
    for columns in ((1, 1), (1,), 3, ("a", "b")):
        with pytest.raises(ValueError, match="columns=.*two different numbers"):
            read_conll(tmp_path / "f", columns=columns)


def test_bytes_that_are_not_utf8(tmp_path):
    (tmp_path / "f").write_bytes("a O\nZürich B-LOC\n".encode("latin1"))
    with pytest.raises(ValueError, match="line 2: byte 0xfc is not UTF-8.*iconv"):
        read_conll(tmp_path / "f")
    corpus = read_conll(tmp_path / "f", strict=False)
    assert corpus[0].words[1] == "Z\ufffdrich" and corpus.repairs["bytes that are not UTF-8"] == 1


def test_json_lines_are_read_and_wrong_ones_are_named(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text('{"tokens": ["Rome"], "ner_tags": ["B-LOC"], "doc": 3}\n\n{"words": [], "tags": []}\n')
    assert list(read_conll(path)) == [Sentence(["Rome"], ["B-LOC"], 3)]
    path.write_text('{"words": ["Rome"], "tags": ["B-LOC"]}\n{"words": ["a", "b"], "tags": ["O"]}\n[1]\nnot json\n')
    with pytest.raises(ValueError, match="line 2: expected one JSON object"):
        read_conll(path)
    assert read_conll(path, strict=False).repairs["JSON lines skipped"] == 3
    path.write_text('{"words": ["Rome"], "tags": ["I-LOC"]}\n{"words": ["a"], "tags": ["B-LOC"]}\n')
    with pytest.raises(ValueError, match="line 1: tag 'I-LOC'"):
        read_conll(path, scheme="IOB2")


@pytest.mark.parametrize("doc", ["null", '"three"', "[1]", "true", "1.5", "NaN", '{"a": 0}'])
def test_a_document_that_is_no_number_is_named_by_file_and_line(tmp_path, doc):
    path = tmp_path / "f.jsonl"
    path.write_text('{"words": ["a"], "tags": ["O"], "doc": 2}\n{"words": ["b"], "tags": ["O"], "doc": ' + doc + "}\n")
    with pytest.raises(ValueError, match='f.jsonl, line 2: "doc" is .*, not a whole number.*strict=False'):
        read_conll(path)
    corpus = read_conll(path, strict=False)
    assert (
        [s.doc for s in corpus] == [2, 0]
        and corpus.repairs == {"document numbers": 1}
        and "line 2" in corpus.problems[0]
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from(["O", "B-LOC"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["words", "tags", "doc", "tokens"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@QUICK
@given(st.lists(JSON | st.fixed_dictionaries({"words": JSON, "tags": JSON, "doc": JSON}), max_size=3))
def test_any_json_is_read_or_refused_with_file_and_line(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("j") / "f.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    for strict in (True, False):
        try:
            corpus = read_conll(path, strict=strict)
            assert all(len(s.words) == len(s.tags) > 0 and type(s.doc) is int for s in corpus)
        except ValueError as error:
            assert re.search(r"f.jsonl, line \d+: |f.jsonl: no sentence", str(error))


def test_json_that_is_nested_too_deeply_is_refused_too(tmp_path):
    (tmp_path / "f.jsonl").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="line 1: expected one JSON object"):
        read_conll(tmp_path / "f.jsonl")


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(alphabet="ab#1 \t\n-OBILPERDCTSA[]", max_size=12), max_size=8), st.booleans())
def test_any_text_is_read_or_refused_with_file_and_line(tmp_path_factory, parts, strict):
    path = tmp_path_factory.mktemp("t") / "f.conll"
    path.write_text("\n".join(parts), newline="")
    try:
        corpus = read_conll(path, strict=strict)
        assert all(to_iob2(s.tags, "IOB2") == (s.tags, []) and all(s.words) for s in corpus)
        assert len(corpus.problems) >= (not strict) * sum(corpus.repairs.values()) and not (strict and corpus.repairs)
    except ValueError as error:
        assert re.search(r"f.conll, line \d+: |f.conll: no sentence", str(error))


def test_reading_refuses_missing_files_and_unknown_schemes(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a file"):
        read_conll(tmp_path / "none")
    (tmp_path / "f").write_text("a E-PER\nb O\n")
    with pytest.raises(ValueError, match="allowed are None"):
        read_conll(tmp_path / "f", scheme="IOE")
    with pytest.raises(ValueError, match="breaks IOB2"):
        read_conll(tmp_path / "f", scheme="IOB2")
    with pytest.raises(ValueError, match="scheme"):
        write_conll([], tmp_path / "g", "IOE")
    with pytest.raises(ValueError, match="white space"):
        write_conll([Sentence(["a b"], ["O"])], tmp_path / "g")
    with pytest.raises(ValueError, match="2 words but 1 tags"):
        write_conll([Sentence(["a", "b"], ["O"])], tmp_path / "g")
    with pytest.raises(ValueError, match="surrogate pair"):
        write_conll([Sentence(["a\ud800"], ["O"])], tmp_path / "g.jsonl")
    with pytest.raises(ValueError, match="marks a new document"):
        write_conll([Sentence(["-DOCSTART-"], ["O"])], tmp_path / "g")
    assert not (tmp_path / "g").exists() and not (tmp_path / "g.jsonl").exists()


# ---------------------------------------------------------------- words, bracket notation


@QUICK
@given(st.text(max_size=60))
def test_words_cover_all_but_white_space(text):
    found = split_words(text)
    assert all(text[a:b] == w and w for w, a, b in found)
    covered = {i for _, a, b in found for i in range(a, b)}
    assert all(c.isspace() for i, c in enumerate(text) if i not in covered)
    assert all(a[2] <= b[1] for a, b in itertools.pairwise(found))


WRITTEN = [
    "José",
    "naïve",
    "हिन्दी",
    "தமிழ்",
    "ภาษาไทย",
    "שָׁלוֹם",
    "می\u200cخواهم",
    "क्\u200dष",
    "re\u00adsume",
    "Việt",
    "Ελλάς",
    "한국",
]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_word_with_combining_marks_or_joiners_is_one_word(form):
    words = [unicodedata.normalize(form, w) for w in WRITTEN]
    assert [w for w, _, _ in split_words(" ".join(words))] == words
    assert [w for w, _, _ in split_words(unicodedata.normalize(form, "(José's) ❤\ufe0f!"))] == [
        "(",
        unicodedata.normalize(form, "José"),
        "'s",
        ")",
        "❤\ufe0f",
        "!",
    ]


def test_every_combining_mark_and_joiner_of_unicode_belongs_to_its_word():
    marks = [
        c for c in map(chr, range(0x110000)) if unicodedata.category(c)[0] == "M" or c in "\u00ad\u200c\u200d\u2060"
    ]
    assert len(marks) > 2000
    assert [f"{ord(c):x}" for c in marks if [w for w, _, _ in split_words(f"a{c}b")] != [f"a{c}b"]] == []


@QUICK
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_a_mark_never_begins_a_word_unless_a_space_stands_before_it(text):
    for w, a, _ in split_words(text):
        assert unicodedata.category(w[0])[0] != "M" or a == 0 or text[a - 1].isspace()


def seconds_to_split(text):
    """Processor time, the shorter of two."""
    start = time.process_time()
    split_words(text)
    middle = time.process_time()
    split_words(text)
    return min(middle - start, time.process_time() - middle)


@pytest.mark.parametrize(
    "part",
    [
        "a.",
        "a@",
        "a-",
        "a+",
        "www.",
        "http://.",
        "a'",
        "1,",
        "A.",
        "n't",
        "é.",
        "e\u0301.",
        "-@",
        "a_.@",
        "'s",
        "'",
        "\u0301",
    ],
)
def test_words_are_cut_in_linear_time(part):
    text = part * (40_000 // len(part))
    short, long = seconds_to_split(text), seconds_to_split(text * 3)
    assert short < 1 and long < 6 * max(short, 0.01)  # three times as long; a quadratic cut takes nine times as long


def test_english_text_is_split_into_words():
    text = (
        "Prof. O'Hara can't mail kim@uni.edu at 10:30, it's U.S.-made; see https://a.org/b. Rock-and-roll! "
        "@nasa AT&T 'quoted'"
    )
    words = [w for w, _, _ in split_words(text)]
    for w in (
        "Prof.",
        "O'Hara",
        "ca",
        "n't",
        "kim@uni.edu",
        "10:30",
        "'s",
        "https://a.org/b",
        "Rock-and-roll",
        "@nasa",
        "AT&T",
    ):
        assert w in words
    assert words[-3:] == ["'", "quoted", "'"]


def test_brackets_mark_entities_and_wrong_ones_are_refused(tmp_path):
    s = cp._parse_brackets("[PER Ada King] of [LOC Ockham] isn't [MISC English].", doc=4)
    assert s.tags == ["B-PER", "I-PER", "O", "B-LOC", "O", "O", "B-MISC", "O"] and s.doc == 4
    for bad in ("[CITY Rome] .", "[PER] x", "[PER Ada", "Ada] x", "[PER [LOC x]]", "[LOC Par]is"):
        with pytest.raises(ValueError, match="here"):
            cp._parse_brackets(bad, place="here")
    (tmp_path / "f.txt").write_text("# one\n[PER Ada] sat.\n\n# two\nRain.\n")
    assert [(s.doc, len(s)) for s in read_brackets(tmp_path / "f.txt")] == [(0, 3), (1, 2)]


# ---------------------------------------------------------------- display


def test_html_is_escaped_and_static():
    text = "<b>Ada & Co</b> in Rome"
    page = cp._entities_html(text, [Entity("Ada & Co", "ORG", 3, 11, 0.5), Entity("Rome", "odd<type", 19, 23, 0.5)])
    assert "&lt;b&gt;" in page and "Ada &amp; Co" in page and "odd&lt;type" in page and "<script" not in page
    assert "color:inherit" in page
    shown = show_sentence(Sentence(["Ada", "in", "Rome"], ["B-PER", "O", "B-LOC"]))
    assert repr(shown) == "[PER Ada] in [LOC Rome]" and "<mark" in shown._repr_html_()
    assert repr(show_sentence(Sentence(["Ada"], ["B-PER"]), ["O"])) == "Ada"


# ---------------------------------------------------------------- the bundled corpus


@pytest.fixture(scope="module")
def bundled():
    return {s: read_conll(data.asset(f"ner_corpus/{s}.conll")) for s in ("train", "dev", "test")}


def test_conll_files_equal_the_bracket_source(bundled):
    source = data.asset("ner_corpus") / "corpus.txt"
    for split, corpus in bundled.items():
        assert list(read_brackets(source, split)) == list(corpus) and corpus.scheme == "IOB2"
    assert len(read_brackets(source)) == sum(map(len, bundled.values()))


def test_the_corpus_is_as_large_and_varied_as_its_card_says(bundled):
    everything = [s for c in bundled.values() for s in c]
    texts = [" ".join(s.words) for s in everything]
    assert len(everything) >= 640 and len(set(texts)) == len(texts)
    documents = [Counter(s.doc for s in c) for c in bundled.values()]
    assert sum(map(len, documents)) >= 90 and all(4 <= n <= 12 for d in documents for n in d.values())
    assert all(
        sum(e[0] == t for s in c for e in s.entities) >= 10
        for c in bundled.values()
        for t in ("PER", "ORG", "LOC", "MISC")
    )
    trigrams = Counter(g for s in everything for g in zip(*(s.words[i:] for i in range(3)), strict=False))
    assert len(trigrams) / sum(trigrams.values()) > 0.9  # nothing is a template
    openings = Counter(tuple(s.words[:3]) for s in everything)
    assert openings.most_common(1)[0][1] <= 4
    words = [w.lower() for s in everything for w in s.words if w.isalpha()]
    assert len(set(words)) / len(words) > 0.3
    card = (data.asset("ner_corpus") / "README.md").read_text(encoding="utf-8")
    for split, c in bundled.items():
        kinds = Counter(e[0] for s in c for e in s.entities)
        row = [
            len({s.doc for s in c}),
            len(c),
            f"{sum(map(len, c)):,}",
            *(kinds[t] for t in ("PER", "ORG", "LOC", "MISC")),
        ]
        assert f"| {split} | " + " | ".join(map(str, row)) + " |" in card


def test_ambiguous_names_occur_with_several_types(bundled):
    types = {}
    for c in bundled.values():
        for s in c:
            for kind, a, b in s.entities:
                types.setdefault(" ".join(s.words[a:b]), set()).add(kind)
    assert types["Washington"] == types["Jordan"] == types["Paris"] == {"PER", "ORG", "LOC"}
    assert types["Amazon"] == {"ORG", "LOC"} and types["Apple"] == {"ORG", "PER"} and types["Ada"] >= {"MISC"}
