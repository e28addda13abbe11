"""ftbook.ner: reading, alignment, batches, F1, decoding, the tagger, and the bundled corpus."""

import itertools
import json
import random
import re
import time
import unicodedata
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sequences import iob2, random_sequences
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from ftbook import Settings, ner
from ftbook.ner import (
    BucketBatches,
    Corpus,
    Entity,
    NERTagger,
    Sentence,
    WordPieces,
    align,
    decode,
    encode,
    iob2_transitions,
    learn_transitions,
    mistakes,
    read_conll,
    split_words,
    token_classifier,
    viterbi,
    write_conll,
)
from ftbook.tags import entity_f1, label_list, to_iob2
from ftbook.train import Checkpoint, fit

QUICK = settings(max_examples=60, deadline=None)
LABELS = label_list(["LOC", "ORG", "PER"])


@pytest.fixture(scope="module")
def tokenizer():
    """A WordPiece tokenizer of letters and pairs of letters: most words fall into several pieces."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,'!?-"
    pairs = [a + b for a in "abcdeo" for b in "nrst"]
    vocab = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *letters,
        *("##" + c for c in letters),
        *pairs,
        *("##" + p for p in pairs),
        "the",
        "Paris",
        "France",
    ]
    backend = Tokenizer(WordPiece({w: i for i, w in enumerate(vocab)}, unk_token="[UNK]"))
    backend.normalizer = BertNormalizer(lowercase=False)
    backend.pre_tokenizer = BertPreTokenizer()
    backend.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


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


def test_json_lines(tmp_path):
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


def test_bad_arguments(tmp_path):
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


def test_words_of_english():
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


def test_bracket_notation(tmp_path):
    s = ner.parse_brackets("[PER Ada King] of [LOC Ockham] isn't [MISC English].", doc=4)
    assert s.tags == ["B-PER", "I-PER", "O", "B-LOC", "O", "O", "B-MISC", "O"] and s.doc == 4
    for bad in ("[CITY Rome] .", "[PER] x", "[PER Ada", "Ada] x", "[PER [LOC x]]", "[LOC Par]is"):
        with pytest.raises(ValueError, match="here"):
            ner.parse_brackets(bad, place="here")
    (tmp_path / "f.txt").write_text("# one\n[PER Ada] sat.\n\n# two\nRain.\n")
    assert [(s.doc, len(s)) for s in ner.read_brackets(tmp_path / "f.txt")] == [(0, 3), (1, 2)]


# ---------------------------------------------------------------- alignment


def plain_encoding(tokenizer, words, tags, max_length, stride, all_pieces=False):
    """The alignment written out for one sentence: list of (ids, labels), one pair per window."""
    ids, labels = [], []
    for word, tag in zip(words, tags, strict=True):
        own = tokenizer(word, add_special_tokens=False)["input_ids"] or [tokenizer.unk_token_id]
        later = LABELS.index("I" + tag[1:]) if tag != "O" else 0
        ids += own
        labels += [LABELS.index(tag)] + [later if all_pieces else -100] * (len(own) - 1)
    out, room, start = [], max_length - 2, 0
    while True:
        part = slice(start, start + room)
        out.append(([2, *ids[part], 3], [-100, *labels[part], -100]))
        if start + room >= len(ids):
            return out
        start += room - stride


@st.composite
def encodings(draw):
    """Random words with random tags, a row length and a stride."""
    word = st.one_of(
        st.sampled_from(["Paris", "the", "France", "zebras", "12.5", "don't", "\u200b", "日本"]),
        st.text(st.characters(blacklist_categories=("Cs", "Zs", "Zl", "Zp", "Cc")), min_size=1, max_size=9),
    )
    tags = [draw(iob2(15, ("LOC", "ORG", "PER"))) for _ in range(draw(st.integers(1, 5)))]
    room = draw(st.integers(1, 14))
    return [[draw(word) for _ in s] for s in tags], tags, room + 2, draw(st.integers(0, room - 1))


@settings(max_examples=150, deadline=None)
@given(encodings(), st.booleans())
def test_alignment_loses_and_invents_nothing(tokenizer, case, all_pieces):
    words, tags, max_length, stride = case
    e = encode(
        words,
        tokenizer,
        tags,
        LABELS,
        max_length=max_length,
        stride=stride,
        label_pieces="all" if all_pieces else "first",
    )
    expected = [
        (i, *w)
        for i, (s, t) in enumerate(zip(words, tags, strict=True))
        for w in plain_encoding(tokenizer, s, t, max_length, stride, all_pieces)
    ]
    rows = [
        (int(s), e.ids[a:b].tolist(), e.labels[a:b].tolist())
        for s, a, b in zip(e.sentence, e.starts[:-1], e.starts[1:], strict=True)
    ]
    assert rows == expected
    assert e.dropped == 0 and e.sizes.max() <= max_length
    assert (np.sort(e.word[e.read]) == np.arange(sum(map(len, words)))).all()  # every word read exactly once
    gold = np.array([LABELS.index(t) for s in tags for t in s])
    assert (e.labels[e.read] == gold[e.word[e.read]]).all()  # with its own label
    assert ((e.labels != -100) <= (e.word >= 0)).all()  # special pieces never labelled


@settings(max_examples=60, deadline=None)
@given(encodings())
def test_pieces_equal_the_tokenizers_own_windows(tokenizer, case):
    words, tags, max_length, stride = case
    words = [[w for w in s if tokenizer(w, add_special_tokens=False)["input_ids"]] or ["the"] for s in words]
    own = tokenizer(
        words,
        is_split_into_words=True,
        truncation=True,
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
    )
    e = encode(words, tokenizer, max_length=max_length, stride=stride)
    assert [e.ids[a:b].tolist() for a, b in itertools.pairwise(e.starts)] == own["input_ids"]
    assert e.sentence.tolist() == own["overflow_to_sample_mapping"] and (e.labels == -100).all()


def test_truncation_equals_the_usual_script_and_counts_its_losses(tokenizer):
    rng = random.Random(0)
    words = [
        ["".join(rng.choices("abcdenrst", k=rng.randint(1, 7))) for _ in range(rng.randint(1, 25))] for _ in range(60)
    ]
    tags = [[rng.choice(LABELS) for _ in s] for s in words]
    usual = tokenizer(words, is_split_into_words=True, truncation=True, max_length=24)
    labels, lost = [], 0
    for i, s in enumerate(tags):  # as the run_ner.py example of transformers aligns
        row, previous = [], None
        for w in usual.word_ids(i):
            row.append(-100 if w is None or w == previous else LABELS.index(s[w]))
            previous = w
        labels.append(row)
        lost += len(s) - sum(x != -100 for x in row)
    e = encode(words, tokenizer, tags, LABELS, max_length=24, windows=False)
    assert [e.ids[a:b].tolist() for a, b in itertools.pairwise(e.starts)] == usual["input_ids"]
    assert [e.labels[a:b].tolist() for a, b in itertools.pairwise(e.starts)] == labels
    assert e.dropped == lost > 0
    assert encode(words, tokenizer, tags, LABELS, max_length=24, stride=8).dropped == 0


def test_pieces_are_learnt_once_and_the_tokenizer_is_left_alone(tokenizer):
    tokenizer(["Paris the", "a"], padding=True, truncation=True, max_length=3)
    state = (tokenizer.backend_tokenizer.padding, tokenizer.backend_tokenizer.truncation)
    pieces = WordPieces(tokenizer)
    encode([["zebras", "the"]], pieces)
    assert (tokenizer.backend_tokenizer.padding, tokenizer.backend_tokenizer.truncation) == state
    size = len(pieces.ids)
    e = encode([["the", "zebras", "the"]], pieces)
    assert len(pieces.ids) == size and e.ids.tolist() == tokenizer("the zebras the")["input_ids"]


def minilm_like(tokenizer):
    """A copy of the tokenizer whose file says, as all-MiniLM-L6-v2's does: pad to 128 pieces and cut at 128, always."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_padding(length=128, pad_id=0, pad_token="[PAD]")
    backend.enable_truncation(128)
    copy = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    copy.backend_tokenizer.enable_padding(length=128, pad_id=0, pad_token="[PAD]")
    copy.backend_tokenizer.enable_truncation(128)
    return copy


def test_padding_and_truncation_of_the_tokenizers_file_change_nothing(tokenizer):
    odd = minilm_like(tokenizer)
    state = (odd.backend_tokenizer.padding, odd.backend_tokenizer.truncation)
    assert state[0]["length"] == 128 and state[1]["max_length"] == 128
    plain, pieces = WordPieces(tokenizer), WordPieces(odd)
    assert (pieces.prefix, pieces.suffix) == (plain.prefix, plain.suffix) == ([2], [3])
    words = [["zebras"] * 150, ["the", "Paris"]]
    a, b = encode(words, plain), encode(words, pieces)
    assert a.ids.tolist() == b.ids.tolist() and a.starts.tolist() == b.starts.tolist()
    assert align(words[1], ["O", "B-LOC"], odd) == align(words[1], ["O", "B-LOC"], tokenizer)
    assert (odd.backend_tokenizer.padding, odd.backend_tokenizer.truncation) == state


ANY_WORD = st.one_of(
    st.sampled_from(["x\ud800", "\udfff", "Paris", "\ud83d\ude00"]),
    st.text(st.characters(exclude_categories=()), max_size=6),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(ANY_WORD, max_size=5), max_size=4), st.lists(st.lists(ANY_WORD, max_size=5), max_size=4))
def test_any_str_is_a_word_and_words_never_get_other_words_pieces(tokenizer, first, second):
    pieces = WordPieces(tokenizer)
    for sentences in (first, second, first + second):
        e = encode(sentences, pieces)
        fresh = encode(sentences, tokenizer)
        assert e.ids.tolist() == fresh.ids.tolist() and e.dropped == 0
        for s, a, b in zip(e.sentence, e.starts[:-1], e.starts[1:], strict=True):
            assert e.ids[a:b].tolist() == align(sentences[s], ["O"] * len(sentences[s]), tokenizer)[0][:128]


class Interrupted:
    """A tokenizer whose core stops with an error at some of its calls."""

    def __init__(self, tokenizer, error):
        self.tokenizer, self.error, self.broken = tokenizer, error, False
        self.backend_tokenizer = self

    def encode_batch(self, *args, **kwargs):
        if self.broken:
            raise self.error
        return self.tokenizer.backend_tokenizer.encode_batch(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.tokenizer.backend_tokenizer, name, None) or getattr(self.tokenizer, name)

    padding = property(lambda self: self.tokenizer.backend_tokenizer.padding)
    truncation = property(lambda self: self.tokenizer.backend_tokenizer.truncation)
    pad_token_id, unk_token_id = 0, 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), RuntimeError("no")])
def test_an_interrupt_while_words_are_learned_leaves_what_was_known(tokenizer, error):
    odd = Interrupted(minilm_like(tokenizer), error)
    state = (odd.padding, odd.truncation)
    pieces = WordPieces(odd)
    encode([["the", "Paris"]], pieces)
    odd.broken = True
    with pytest.raises(type(error)):
        encode([["Paris", "zebras", "France"]], pieces)
    assert list(pieces.index) == ["the", "Paris"] and (odd.padding, odd.truncation) == state
    odd.broken = False
    again = [["France", "the", "zebras", "Paris"]]
    assert encode(again, pieces).ids.tolist() == encode(again, tokenizer).ids.tolist()


@pytest.mark.parametrize("at", ["_table", "index"])
def test_an_interrupt_between_the_two_steps_of_learning_does_no_harm(tokenizer, monkeypatch, at):
    class Stopped(WordPieces):
        armed = False

        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if self.armed and name == at:
                raise KeyboardInterrupt

    class Names(dict):
        armed = False

        def update(self, *args, **kwargs):
            if self.armed:
                raise KeyboardInterrupt
            super().update(*args, **kwargs)

    pieces = Stopped(tokenizer)
    pieces.index = Names()
    encode([["the"]], pieces)
    pieces.armed = pieces.index.armed = True
    with pytest.raises(KeyboardInterrupt):
        encode([["zebras", "Paris"]], pieces)
    pieces.armed = pieces.index.armed = False
    again = [["France", "the", "Paris", "zebras"]]
    assert encode(again, pieces).ids.tolist() == encode(again, tokenizer).ids.tolist()


@settings(max_examples=100, deadline=None)
@given(encodings())
def test_the_fast_way_equals_the_plain_aligner(tokenizer, case):
    words, tags, *_ = case
    e = encode(words, tokenizer, tags, LABELS, max_length=1000)
    for i, (s, t) in enumerate(zip(words, tags, strict=True)):
        pieces, labels = align(s, t, tokenizer)
        row = slice(e.starts[i], e.starts[i + 1])
        assert e.ids[row].tolist() == pieces
        assert [None if k < 0 else LABELS[k] for k in e.labels[row]] == labels


def test_encoding_refuses_nonsense(tokenizer):
    for kwargs in ({"max_length": 2}, {"stride": 126}, {"stride": -1}, {"label_pieces": "last"}):
        with pytest.raises(ValueError, match="need room"):
            encode([["a"]], tokenizer, **kwargs)
    with pytest.raises(ValueError, match="one tag per word"):
        encode([["a"]], tokenizer, [["O", "O"]], LABELS)
    with pytest.raises(ValueError, match="'B-CITY' is not among"):
        encode([["a"]], tokenizer, [["B-CITY"]], LABELS)
    with pytest.raises(TypeError, match="backend_tokenizer"):
        WordPieces(object())
    with pytest.raises(TypeError, match="a text must be a str, not int: 7"):
        encode([["a", 7]], tokenizer)


def test_bucket_batches(tokenizer):
    rng = random.Random(0)
    corpus = Corpus(
        [Sentence(["Paris"] * (n := min(60, 1 + int(rng.expovariate(0.06)))), ["O"] * n) for _ in range(999)]
    )
    e = encode(corpus, tokenizer)
    batches = BucketBatches(e, 32, seed=1)
    padded = sum(b["input_ids"].numel() for b in batches)
    real = int(e.sizes.sum())
    assert real <= padded <= 1.1 * real and len(list(batches)) == len(batches) == 32
    assert sum(int(b["attention_mask"].sum()) for b in batches) == real
    rows = batches.rows()
    assert sorted(np.concatenate(rows)) == list(range(999))
    assert all((a == b).all() for a, b in zip(rows, batches.rows(), strict=True))
    batches.set_epoch(1)
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(rows, batches.rows(), strict=True))
    b = e.batch([0, 1], length=70)
    assert b["input_ids"].shape == (2, 70) and b["labels"][0, -1] == -100 and b["input_ids"][0, -1] == e.pad
    with pytest.raises(ValueError, match="at least 1"):
        BucketBatches(e, 0)


# ---------------------------------------------------------------- decoding


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(0, 10_000), st.booleans())
def test_viterbi_finds_the_best_of_all_sequences(T, seed, learnt):
    rng, labels = np.random.default_rng(seed), label_list(["A", "B"])
    step, start = learn_transitions([["O", "B-A", "I-A"], ["B-B"], []], labels) if learnt else iob2_transitions(labels)
    scores, lengths = rng.normal(size=(3, T, 5)), rng.integers(1, T + 1, 3)
    found = viterbi(scores, step, start, lengths)
    for row, n, s in zip(found, lengths, scores, strict=True):

        def value(p, s=s):
            return (
                start[p[0]] + sum(s[t, k] for t, k in enumerate(p)) + sum(step[a, b] for a, b in itertools.pairwise(p))
            )

        best = max(itertools.product(range(5), repeat=n), key=value)
        assert value(tuple(row[:n])) == pytest.approx(value(best))


def test_batches_put_together_equal_the_joint_batch_with_class_weights(tokenizer):
    e = encode([["the", "the"], ["Paris", "Ada", "zebras"]], tokenizer, [["O", "O"], ["B-LOC", "B-PER", "O"]], LABELS)
    body, weight = small_body(tokenizer), torch.tensor([0.2, 3, 1, 1, 1, 5, 1])

    def step(batches, accumulate):
        loss = ner.TagLoss(token_classifier(body, LABELS, 0.0), weight)
        loss.model.classifier.load_state_dict({"weight": torch.ones(7, 32) / 9, "bias": torch.zeros(7)})
        start = [p.clone() for p in loss.parameters()]
        settings = Settings(accumulate=accumulate, progress=False, weight_decay=0.0)
        fit(loss, batches, loss=None, lr=1.0, optimizer="sgd", settings=settings)
        return torch.cat([(a - b).flatten() for a, b in zip(start, loss.parameters(), strict=True)])

    joint, apart = step([e.batch([0, 1])], 1), step([e.batch([0]), e.batch([1])], 2)
    assert torch.allclose(joint, apart, atol=1e-5) and joint.abs().max() > 0.01
    labels = e.batch([0, 1])["labels"]
    assert ner.TagLoss(torch.nn.Identity(), weight).weight_of(labels) == pytest.approx(3 * 0.2 + 3 + 5)
    assert ner.TagLoss(torch.nn.Identity()).weight_of(labels) == 5


@QUICK
@given(st.integers(0, 10_000))
def test_constrained_output_is_always_iob2(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 9, 6)
    scores = rng.normal(size=(lengths.sum(), len(LABELS)))
    ids = decode(scores, lengths, iob2_transitions(LABELS), batch=2)
    for part in np.split(ids, np.cumsum(lengths)[:-1]):
        tags = [LABELS[i] for i in part]
        assert to_iob2(tags, "IOB2") == (tags, [])
    assert (decode(scores, lengths) == scores.argmax(1)).all()


def test_learnt_transitions_are_probabilities():
    step, start = learn_transitions([["B-LOC", "I-LOC", "O"], ["O"]], LABELS)
    assert np.allclose(np.exp(step).sum(1), 1) and np.exp(start).sum() == pytest.approx(1)
    assert np.isinf(step[0, LABELS.index("I-LOC")]) and step[1, 2] > step[1, 1]


def test_class_weights():
    ids = np.array([0] * 90 + [1] * 9 + [2] + [-100] * 50)
    assert ner.class_weights(ids, 3, 0.0).tolist() == [1, 1, 1]
    w = ner.class_weights(ids, 3, 1.0).numpy()
    assert np.allclose(w * [90, 9, 1], (w * [90, 9, 1])[0]) and np.dot(w, [90, 9, 1]) == pytest.approx(100)


# ---------------------------------------------------------------- the tagger


def small_body(tokenizer):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
    )
    return BertForMaskedLM(config)


@pytest.fixture(scope="module")
def town_corpus():
    rng, out = random.Random(0), []
    names, towns = ["Ada", "Bert", "Cato"], ["Paris", "France", "Rome"]
    for _ in range(120):
        n = rng.randint(1, 4)
        words = [w for _ in range(n) for w in (rng.choice(names), "sat", "in", rng.choice(towns), ".")]
        out.append(Sentence(words, ["B-PER", "O", "O", "B-LOC", "O"] * n))
    return Corpus(out)


@pytest.fixture(scope="module")
def tagger(tokenizer, town_corpus):
    body = small_body(tokenizer)
    tagger = NERTagger(token_classifier(body, town_corpus.labels, dropout=0.0), tokenizer, max_length=24, stride=6)
    same = tagger.model.base_model.state_dict()
    assert all(torch.equal(v, same[k]) for k, v in body.base_model.state_dict().items())
    history, watch = tagger.fit(
        town_corpus, town_corpus, epochs=6, lr=5e-3, batch_size=16, weight_power=0.3, settings=Settings(progress=False)
    )
    assert len(history.rows) == 6 and watch.best == max(watch.history) == watch.history[watch.best_epoch]
    return tagger


def test_the_tagger_learns_and_reads_text(tagger, town_corpus):
    assert tagger.evaluate(town_corpus).f1 > 0.95
    text = "Ada sat in Rome.  Bert sat in Paris."
    found = tagger.predict(text)
    assert [(e.text, e.type) for e in found] == [("Ada", "PER"), ("Rome", "LOC"), ("Bert", "PER"), ("Paris", "LOC")]
    assert all(text[e.start : e.end] == e.text and 0 < e.score <= 1 for e in found)
    assert tagger.predict([text, "", "of the"])[0] == found and tagger.predict([]) == [] and tagger.predict("") == []
    assert tagger.tag([["Cato", "sat"], []])[1] == []


@pytest.mark.parametrize("windows", [True, False])
def test_blocks_join_into_the_same_corpus(tokenizer, monkeypatch, windows):
    g = random.Random(0)
    words = [["".join(g.choices("abcdeT.", k=g.randint(1, 9))) for _ in range(g.randint(1, 12))] for _ in range(25)]
    tags = [[g.choice(LABELS) for _ in s] for s in words]
    options = {"max_length": 14, "stride": 4, "label_pieces": "all", "windows": windows}
    whole = encode(words, tokenizer, tags, LABELS, **options)
    monkeypatch.setattr(ner, "_BLOCK", 4)
    parts = encode(words, tokenizer, tags, LABELS, **options)
    for name in ("ids", "labels", "word", "read", "starts", "sentence", "lengths"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name), err_msg=name)
    assert (whole.dropped, whole.pad) == (parts.dropped, parts.pad) and (whole.dropped > 0) != windows


def test_long_texts_go_through_windows(tagger):
    text = "Ada sat in Rome. " * 40
    found = tagger.predict(text)
    assert [e.text for e in found].count("Rome") >= 36 and found[-1].start > 24 * 20


def test_save_and_load_give_the_same_output(tagger, tmp_path, town_corpus):
    tagger.save(tmp_path / "t")
    assert not list((tmp_path / "t").glob("*.bin"))
    back = NERTagger.from_pretrained(tmp_path / "t")
    assert back.tag(town_corpus) == tagger.tag(town_corpus) and back.max_length == 24 and back.stride == 6
    assert np.array_equal(back.transitions[0], tagger.transitions[0])
    free = NERTagger(tagger.model, tagger.tokenizer, transitions=None)
    assert free.max_length == 40
    free.save(tmp_path / "u")
    assert NERTagger.from_pretrained(tmp_path / "u").transitions is None


def test_an_encoder_needs_labels(tokenizer, tmp_path, monkeypatch):
    folder = tmp_path / "models" / "small"
    body = small_body(tokenizer)
    body.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    monkeypatch.setenv("FTBOOK_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="label_list"):
        NERTagger.from_pretrained("small")
    fresh = NERTagger.from_pretrained("small", labels=LABELS)
    assert fresh.labels == LABELS
    again = NERTagger.from_pretrained(folder, labels=LABELS, transitions=None)
    weights = again.model.base_model.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in body.base_model.state_dict().items())


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """Fails on any request to the hub, and gives an empty cache."""
    import huggingface_hub.utils as hub

    def refuse(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(hub, "get_session", refuse)
    monkeypatch.setattr("huggingface_hub.file_download.get_session", refuse, raising=False)
    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("FTBOOK_DATA", str(tmp_path))


def test_bundled_names_come_before_the_hub_and_need_no_network(no_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tagger = NERTagger.from_pretrained("bert-mini-en", labels=LABELS)
    assert tagger.labels == LABELS and tagger.tag([["Rome", "sleeps"]])[0]
    with pytest.raises(ValueError, match="without a tagging head"):
        NERTagger.from_pretrained("bert-mini-en")
    small = tmp_path / "bert-mini-en"  # a folder of that name, given or in reach, comes first
    small.mkdir()
    with pytest.raises(ValueError, match="without a tagging head"):
        NERTagger.from_pretrained("bert-mini-en")
    with pytest.raises(FileNotFoundError, match="folder without config.json"):
        NERTagger.from_pretrained(small)


def test_names_that_are_no_bundled_model_are_not_taken_for_one(no_hub):
    for name in ("ner_corpus", "no-such-model", "../assets", "org/bert-mini-en"):
        assert ner._folder_of(name) is None


def test_tags_are_predicted_in_float32_unless_asked_otherwise(tagger, town_corpus, monkeypatch):
    monkeypatch.setattr(ner, "native_bf16", lambda where: True)
    encoded = tagger.encode(town_corpus.words)
    exact = tagger.word_scores(encoded, precision="fp32")
    assert np.array_equal(tagger.word_scores(encoded), exact)
    rounded = [tagger.word_scores(encoded, precision=p) for p in ("bf16", "auto")]
    assert np.array_equal(*rounded) and not np.array_equal(rounded[0], exact)
    assert tagger.tag(town_corpus[:3], precision="bf16") == tagger.tag(town_corpus[:3])
    with pytest.raises(ValueError, match="precision='half'; allowed are 'fp32', 'bf16', 'auto'"):
        tagger.predict("Rome", precision="half")


def test_texts_with_half_surrogates_are_tagged_at_their_places(tagger):
    text = "Ada\ud800 sat in Rome. \udfff Bert sat in Paris."
    found = tagger.predict(text)
    assert all(text[e.start : e.end] == e.text for e in found) and {"Rome", "Paris"} <= {e.text for e in found}


def test_the_watch_goes_on_from_its_checkpoint(tagger, town_corpus):
    few, before = Corpus(town_corpus[:20]), {k: v.clone() for k, v in tagger.model.state_dict().items()}
    watch = ner.EntityF1(tagger, few)
    watch.on_epoch_end(None)
    saved = watch.state_dict()
    again = ner.EntityF1(tagger, few)
    again.load_state_dict(saved)
    assert again.best == watch.best > 0.9 and again.best_epoch == 0 and again.history == watch.history
    with torch.no_grad():
        for p in tagger.model.parameters():
            p.zero_()
    again.on_epoch_end(None)  # a worse epoch
    again.on_train_end(None)
    assert again.best_epoch == 0 and len(again.history) == 2
    assert all(torch.equal(v, before[k]) for k, v in tagger.model.state_dict().items())


def test_a_broken_off_run_equals_the_whole_one_with_its_best_f1(tokenizer, town_corpus, tmp_path):
    few = Corpus(town_corpus[:24])

    def run(*callbacks, stop=None):
        t = NERTagger(token_classifier(small_body(tokenizer), few.labels, 0.0), tokenizer, max_length=24, stride=6)

        class Breaks:
            def on_epoch_end(self, state):
                if len(state.history.rows) == stop:
                    raise KeyboardInterrupt

        options = {"epochs": 4, "lr": 5e-3, "batch_size": 8, "settings": Settings(progress=False)}
        return t, *t.fit(few, few, callbacks=[Breaks(), *callbacks], **options)

    whole, _, watch = run()
    with pytest.raises(KeyboardInterrupt):
        run(Checkpoint(tmp_path / "c.pt"), stop=3)
    resumed, _, again = run(Checkpoint(tmp_path / "c.pt"))
    assert again.history == watch.history and (again.best, again.best_epoch) == (watch.best, watch.best_epoch)
    assert all(torch.equal(v, resumed.model.state_dict()[k]) for k, v in whole.model.state_dict().items())


def test_a_body_that_does_not_fit(tokenizer):
    body = small_body(tokenizer)
    body.base_model.encoder.layer.append(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="does not fit"):
        token_classifier(body, LABELS)
    random_one = token_classifier(small_body(tokenizer).config, LABELS)
    assert random_one.config.id2label[1] == "B-LOC"


def test_tagger_input_types(tagger):
    with pytest.raises(TypeError, match="use predict"):
        tagger.tag(["a text"])
    with pytest.raises(TypeError, match="use tag"):
        tagger.predict([["a", "list"]])


# ---------------------------------------------------------------- the experiment


def test_zipped_labels_are_one_off(tokenizer):
    e = encode([["Paris", "zebras", "the"], ["the"]], tokenizer, [["B-LOC", "O", "B-PER"], ["B-ORG"]], LABELS)
    z = ner.relabel(e, "zipped")
    assert [z.labels[a:b][:4].tolist() for a, b in itertools.pairwise(z.starts)] == [
        [LABELS.index("B-LOC"), 0, LABELS.index("B-PER"), -100],
        [LABELS.index("B-ORG"), -100, -100],
    ]
    assert ner.relabel(e, "right") is e and (e.labels[e.starts[:-1]] == -100).all()
    with pytest.raises(ValueError, match="'zipped'"):
        ner.relabel(e, "other")


def test_padded_batches_label_the_padding(tokenizer, town_corpus):
    e = encode(town_corpus, tokenizer)
    batches = ner.PaddedBatches(e, 50, length=64, label=0)
    seen = list(batches)
    assert [b["labels"].shape for b in seen] == [(50, 64), (50, 64), (20, 64)]
    assert all((b["labels"][b["attention_mask"] == 0] == 0).all() for b in seen)
    assert sorted(np.concatenate(batches.rows())) == list(range(120))


def test_what_is_trained(tokenizer):
    model = token_classifier(small_body(tokenizer), LABELS)
    counts = [ner.train_only(model, part) for part in ("head", "top", "full")]
    assert counts[0] == 33 * len(LABELS) < counts[1] < counts[2] == sum(p.numel() for p in model.parameters())
    with pytest.raises(ValueError, match="'head', 'top', 'full'"):
        ner.train_only(model, "none")


def test_noise_changes_types_and_nothing_else(town_corpus):
    noisy = ner.shuffle_types(town_corpus, 0.5, seed=1)
    pairs = [
        (a, b) for s, t in zip(town_corpus, noisy, strict=True) for a, b in zip(s.entities, t.entities, strict=True)
    ]
    assert all(a[1:] == b[1:] for a, b in pairs) and 0.4 < np.mean([a != b for a, b in pairs]) < 0.6
    assert list(ner.shuffle_types(town_corpus, 0.0)) == list(town_corpus)


@pytest.mark.parametrize("target", ["right", "zipped", "padded", "all pieces", "noisy types"])
def test_a_run_of_the_experiment(tokenizer, town_corpus, target):
    few = Corpus(town_corpus[:24])
    options = {
        "body": small_body(tokenizer).config,
        "tokenizer": tokenizer,
        "train_set": few,
        "valid": few,
        "epochs": 1,
        "max_length": 32,
        "target": target,
    }
    tagger, found = ner.tagging_run(1, **options, test=few)
    assert set(found) == {
        "valid_f1",
        "test_f1",
        "test_precision",
        "test_recall",
        "test_f1_argmax",
        "test_word_accuracy",
        "broken_sentences",
    }
    assert found["valid_f1"] == found["test_f1"] and 0 <= found["broken_sentences"] <= 1
    if target == "right":
        assert ner.tagging_run(1, **options)[1] == {"valid_f1": found["valid_f1"]}


# ---------------------------------------------------------------- mistakes


def test_kinds_of_mistakes():
    true = [["B-PER", "I-PER", "O", "B-LOC", "O", "B-ORG", "I-ORG", "O", "B-LOC", "O", "O"]]
    pred = [["B-PER", "O", "O", "B-ORG", "O", "B-LOC", "O", "O", "O", "O", "B-PER"]]
    assert Counter(m.kind for m in mistakes(true, pred)) == Counter(
        ["boundary", "type", "boundary and type", "missed", "spurious"]
    )


def test_mistakes_need_lists_of_tag_lists():
    with pytest.raises(TypeError, match="lists of tag lists"):
        mistakes(["O"], ["O"])


@QUICK
@given(st.integers(0, 10_000))
def test_mistakes_add_up_to_the_scores(seed):
    true, pred = random_sequences(random.Random(seed), 8, "BI", ["LOC", "PER"])
    scores, found = entity_f1(true, pred), mistakes(true, pred)
    hit, n_pred, n_true = scores.counts.sum(0) if len(scores.types) else (0, 0, 0)
    assert sum(m.true is not None for m in found) == n_true - hit
    assert sum(m.pred is not None for m in found) == n_pred - hit


def test_recall_by_length_and_novelty():
    corpus = Corpus(
        [Sentence(["Ada", "King", "of", "Rome"], ["B-PER", "I-PER", "O", "B-LOC"]), Sentence(["Oslo"], ["B-LOC"])]
    )
    training = Corpus([Sentence(["ROME", "Oslo"], ["B-LOC", "B-PER"])])
    pred = [["B-PER", "I-PER", "O", "O"], ["B-LOC"]]
    assert {k: v["found"] for k, v in ner.by_length(corpus, pred).items()} == {1: 1, 2: 1}
    assert {k: v["recall"] for k, v in ner.by_novelty(corpus, pred, training).items()} == {
        "other type": 1.0,
        "seen": 0.0,
        "unseen": 1.0,
    }


# ---------------------------------------------------------------- display


def test_html_is_escaped_and_static():
    text = "<b>Ada & Co</b> in Rome"
    page = ner.entities_html(text, [Entity("Ada & Co", "ORG", 3, 11, 0.5), Entity("Rome", "odd<type", 19, 23, 0.5)])
    assert "&lt;b&gt;" in page and "Ada &amp; Co" in page and "odd&lt;type" in page and "<script" not in page
    assert "color:inherit" in page
    shown = ner.show_sentence(Sentence(["Ada", "in", "Rome"], ["B-PER", "O", "B-LOC"]))
    assert repr(shown) == "[PER Ada] in [LOC Rome]" and "<mark" in shown._repr_html_()
    assert repr(ner.show_sentence(Sentence(["Ada"], ["B-PER"]), ["O"])) == "Ada"


# ---------------------------------------------------------------- the bundled corpus


@pytest.fixture(scope="module")
def bundled():
    return {s: ner.bundled_corpus(s) for s in ("train", "dev", "test")}


def test_conll_files_equal_the_bracket_source(bundled):
    source = ner.data.asset("ner_corpus") / "corpus.txt"
    for split, corpus in bundled.items():
        assert list(ner.read_brackets(source, split)) == list(corpus) and corpus.scheme == "IOB2"
    assert len(ner.read_brackets(source)) == sum(map(len, bundled.values()))
    with pytest.raises(ValueError, match="'train', 'dev', 'test'"):
        ner.bundled_corpus("valid")


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
    card = (ner.data.asset("ner_corpus") / "README.md").read_text(encoding="utf-8")
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
