"""ftbook.ner: reading, alignment, batches, F1, decoding, the tagger, and the bundled corpus."""

import itertools
import random
import re
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics import classification_report
from seqeval.scheme import IOB2, IOBES
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from ftbook import ner
from ftbook.ner import (
    BucketBatches,
    Corpus,
    Entity,
    NERTagger,
    Sentence,
    WordPieces,
    decode,
    encode,
    entity_f1,
    iob2_transitions,
    label_list,
    learn_transitions,
    mistakes,
    read_conll,
    split_words,
    token_classifier,
    viterbi,
    write_conll,
)

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
def iob2(draw, max_size=12, types=("LOC", "PER", "creative-work")):
    """A well-formed IOB2 tag list."""
    tags, prev = [], "O"
    for _ in range(draw(st.integers(1, max_size))):
        choices = ["O"] + [f"B-{t}" for t in types] + (["I-" + prev[2:]] if prev != "O" else [])
        prev = draw(st.sampled_from(choices))
        tags.append(prev)
    return tags


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


@QUICK
@given(iob2(), st.sampled_from(["IOB1", "IOB2", "BIOES"]))
def test_schemes_convert_both_ways(tags, scheme):
    assert ner.to_iob2(ner.from_iob2(tags, scheme), scheme) == (tags, [])


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
        assert ner.to_iob2(s.tags, "IOB2") == (s.tags, []) and len(s.words) == len(s.tags)


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
    assert not (tmp_path / "g").exists()


# ---------------------------------------------------------------- words, bracket notation


@QUICK
@given(st.text(max_size=60))
def test_words_cover_all_but_white_space(text):
    found = split_words(text)
    assert all(text[a:b] == w and w for w, a, b in found)
    covered = {i for _, a, b in found for i in range(a, b)}
    assert all(c.isspace() for i, c in enumerate(text) if i not in covered)
    assert all(a[2] <= b[1] for a, b in itertools.pairwise(found))


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


# ---------------------------------------------------------------- F1


def same_report(report, reference):
    assert list(report) == list(reference)
    for row in reference:
        for name, value in reference[row].items():
            assert abs(report[row][name] - value) <= 1e-12 or (np.isnan(report[row][name]) and np.isnan(value)), (
                row,
                name,
            )


def seqeval_report(true, pred, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return classification_report(true, pred, output_dict=True, **kwargs)


def random_sequences(rng, n, letters, types):
    tags = ["O"] * 4 + [f"{a}-{t}" for a in letters for t in types]
    lengths = [rng.randint(1, 12) for _ in range(n)]
    true = [[rng.choice(tags) for _ in range(k)] for k in lengths]
    return true, [[t if rng.random() < 0.7 else rng.choice(tags) for t in s] for s in true]


@pytest.mark.parametrize(
    "letters,strict,n", [("BI", False, 10_000), ("BI", True, 10_000), ("BIES", False, 2_000), ("BIES", True, 2_000)]
)
def test_f1_equals_seqeval_on_ten_thousand_random_sequences(letters, strict, n):
    true, pred = random_sequences(random.Random(7), n, letters, ["PER", "ORG", "creative-work"])
    scheme = {"BI": "IOB2", "BIES": "BIOES"}[letters]
    reference = {"mode": "strict", "scheme": {"IOB2": IOB2, "BIOES": IOBES}[scheme]} if strict else {}
    for part in (slice(0, n - 100), *(slice(i, i + 1) for i in range(n - 100, n))):
        scores = entity_f1(true[part], pred[part], strict=strict, scheme=scheme)
        same_report(scores.report, seqeval_report(true[part], pred[part], **reference))
        assert scores["f1"] == pytest.approx(scores.report["micro avg"]["f1-score"], abs=1e-12)


TAGS = st.one_of(
    st.sampled_from(
        [
            "O",
            "B-PER",
            "I-PER",
            "B-LOC",
            "I-LOC",
            "E-PER",
            "S-LOC",
            "B",
            "I",
            "E",
            "S",
            "O-PER",
            "B-",
            "I-a-b",
            "X-PER",
            "X",
            ".",
            ".-LOC",
            "BPER",
        ]
    ),
    st.text(min_size=1, max_size=4),
)


@settings(max_examples=250, deadline=None)
@given(st.lists(st.lists(st.tuples(TAGS, TAGS), max_size=8), min_size=1, max_size=5))
def test_f1_equals_seqeval_on_anything(pairs):
    true, pred = [[a for a, _ in s] for s in pairs], [[b for _, b in s] for s in pairs]
    same_report(entity_f1(true, pred).report, seqeval_report(true, pred))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.lists(
            st.tuples(*2 * [st.sampled_from(["O", "B-P", "I-P", "B-L", "I-L", "I", "B"])]), min_size=1, max_size=8
        ),
        min_size=1,
        max_size=4,
    )
)
def test_strict_f1_equals_seqeval(pairs):
    true, pred = [[a for a, _ in s] for s in pairs], [[b for _, b in s] for s in pairs]
    same_report(entity_f1(true, pred, strict=True).report, seqeval_report(true, pred, mode="strict", scheme=IOB2))


def test_f1_from_numbers_and_its_refusals():
    true, pred = random_sequences(random.Random(1), 50, "BI", ["LOC", "ORG", "PER"])
    flat = [np.array([LABELS.index(t) for s in side for t in s]) for side in (true, pred)]
    lengths = [len(s) for s in true]
    by_number = entity_f1(*flat, labels=LABELS, lengths=lengths)
    assert by_number.report == entity_f1(true, pred).report
    assert entity_f1(flat[0], flat[0], labels=LABELS).f1 == 1.0
    with pytest.raises(ValueError, match="0..6"):
        entity_f1(flat[0] - 100, flat[1], labels=LABELS, lengths=lengths)
    with pytest.raises(ValueError, match="differ in shape"):
        entity_f1(flat[0], flat[1], labels=LABELS, lengths=lengths[:-1])
    with pytest.raises(ValueError, match="sentence 1 has 1 and 2 tags"):
        entity_f1([["O"], ["O"]], [["O"], ["O", "O"]])
    with pytest.raises(ValueError, match="1 and 2 sentences"):
        entity_f1([["O"]], [["O"], ["O"]])
    with pytest.raises(TypeError, match="list of tag lists"):
        entity_f1(["O", "B-PER"], ["O", "B-PER"])
    with pytest.raises(TypeError, match="list of tag lists"):
        entity_f1("O", "O")
    with pytest.raises(TypeError, match="non-empty strings"):
        entity_f1([[""]], [["O"]])
    with pytest.raises(ValueError, match="do not exist in IOB2"):
        entity_f1([["S-PER"]], [["O"]], strict=True)
    with pytest.raises(ValueError, match="allowed are 'IOB2'"):
        entity_f1([["O"]], [["O"]], scheme="IOB1")


def test_more_than_256_tags():
    true = [[f"B-t{i}" for i in range(300)]]
    pred = [true[0][:150] + ["O"] * 150]
    scores = entity_f1(true, pred)
    assert (scores.precision, scores.recall, scores.support) == (1.0, 0.5, 300)


def test_scores_object():
    scores = entity_f1([["B-PER", "O", "B-LOC"]], [["B-PER", "O", "O"]])
    assert dict(scores)["recall"] == 0.5 and "| PER | 1.000 |" in scores._repr_markdown_()
    with pytest.raises(KeyError, match="precision, recall"):
        scores["accuracy"]
    assert (scores.per_sentence() == [[[0, 0, 1], [1, 1, 1]]]).all()


def test_bootstrap_matches_drawing_sentences():
    true, pred = random_sequences(random.Random(3), 300, "BI", ["LOC", "PER"])
    scores = entity_f1(true, pred)
    rows = scores.per_sentence()
    assert (rows.sum(0) == scores.counts).all()
    draws = rows[np.random.default_rng(1).integers(0, 300, (2000, 300))].sum(1)
    for average, values in (("micro", ner.prf(draws.sum(1))[:, 2]), ("macro", ner.prf(draws).mean(1)[:, 2])):
        low, high = scores.interval(n=2000, average=average)["f1"]
        assert abs(low - np.quantile(values, 0.025)) < 0.01 and abs(high - np.quantile(values, 0.975)) < 0.01
    assert scores.interval(seed=5) == scores.interval(seed=5)
    with pytest.raises(ValueError, match="micro"):
        scores.interval(average="weighted")
    with pytest.raises(ValueError, match="no sentence"):
        entity_f1([], []).interval()


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


@QUICK
@given(st.integers(0, 10_000))
def test_constrained_output_is_always_iob2(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 9, 6)
    scores = rng.normal(size=(lengths.sum(), len(LABELS)))
    ids = decode(scores, lengths, iob2_transitions(LABELS), batch=2)
    for part in np.split(ids, np.cumsum(lengths)[:-1]):
        tags = [LABELS[i] for i in part]
        assert ner.to_iob2(tags, "IOB2") == (tags, [])
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
        town_corpus, town_corpus, epochs=6, lr=5e-3, batch_size=16, weight_power=0.3, progress=False
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
