"""ftbook.tags: schemes, spans and the entity F1, by definition and by tables."""

import random
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics import classification_report
from seqeval.scheme import IOB2, IOBES
from sequences import iob2, random_sequences

from ftbook import tags as tg
from ftbook.tags import entity_f1, label_list, plain_f1, spans

QUICK = settings(max_examples=60, deadline=None)
LABELS = label_list(["LOC", "ORG", "PER"])
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


# ---------------------------------------------------------------- schemes


@QUICK
@given(iob2(), st.sampled_from(["IOB1", "IOB2", "BIOES"]))
def test_schemes_convert_both_ways(tags, scheme):
    assert tg.to_iob2(tg.from_iob2(tags, scheme), scheme) == (tags, [])


@QUICK
@given(st.lists(iob2(), min_size=30, max_size=30), st.sampled_from(["IOB1", "IOB2", "BIOES"]))
def test_a_few_odd_tags_do_not_change_the_scheme_of_a_corpus(corpus, scheme):
    corpus = [["B-LOC", "I-LOC", "O", "B-PER"], *corpus]
    spelled = [tg.from_iob2(s, scheme) for s in corpus]
    assert tg.detect_scheme(spelled) == scheme
    odd = {"IOB1": [["O", "B-PER"]], "IOB2": [["O", "I-PER"]], "BIOES": [["O", "B-PER"], ["I-LOC"]]}[scheme]
    assert tg.detect_scheme(spelled + odd) == scheme == tg.detect_scheme(odd + spelled)
    assert tg.detect_scheme([*spelled, ["S-LOC", "O", "O"]]) == scheme


def test_the_scheme_of_the_original_conll_2003_file_is_iob1():
    sentence = ["I-ORG", "O", "I-MISC", "O", "O", "I-PER", "I-PER"]
    assert tg.detect_scheme([sentence] * 1000 + [["O", "B-LOC"], ["B-PER", "O"]]) == "IOB1"
    assert tg.detect_scheme([]) == tg.detect_scheme([["O", "O"]]) == "IOB2"


@QUICK
@given(
    st.lists(st.sampled_from(["O", *(f"{a}-{t}" for a in "BIES" for t in ("LOC", "PER"))]), max_size=12),
    st.sampled_from(["IOB1", "IOB2", "BIOES"]),
)
def test_repaired_tags_are_iob2_and_the_broken_places_exist(tags, scheme):
    out, broken = tg.to_iob2(tags, scheme)
    assert tg.to_iob2(out, "IOB2") == (out, []) and len(out) == len(tags)
    assert [t[1:] for t in out] == [t[1:] for t in tags] and all(0 <= i < len(tags) for i in broken)


# ---------------------------------------------------------------- F1


@settings(max_examples=250, deadline=None)
@given(st.lists(st.lists(st.tuples(*2 * [st.sampled_from(["O", *LABELS])]), max_size=9), max_size=5))
def test_the_fast_f1_equals_the_plain_definition(pairs):
    true, pred = [[a for a, _ in s] for s in pairs], [[b for _, b in s] for s in pairs]
    assert entity_f1(true, pred).f1 == pytest.approx(plain_f1(true, pred), abs=1e-12)


def test_the_plain_definition_by_hand():
    assert plain_f1([["B-PER", "I-PER", "O", "B-LOC"]], [["B-PER", "I-PER", "O", "B-ORG"]]) == 0.5
    assert plain_f1([["B-A", "B-A"]], [["B-A", "I-A"]]) == plain_f1([], []) == 0.0
    assert plain_f1([["O", "I-A", "I-A"]], [["O", "B-A", "I-A"]]) == 1.0  # the lenient reading
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        plain_f1([["O"], ["O"]], [["O"]])


def names_by_table(tags, strict=False):
    ids = np.arange(len(tags))
    first, last, kind, types = tg.find_entities(ids, np.array([len(tags)]), tags, strict)
    return [(types[k], a, b + 1) for a, b, k in zip(first.tolist(), last.tolist(), kind, strict=True)]


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_the_names_of_a_sentence_are_those_that_the_tables_find(data):
    anything = data.draw(st.lists(TAGS, max_size=9))
    assert spans(anything) == names_by_table(anything)
    tags = data.draw(st.lists(st.sampled_from(["O", "B-a-b", "I-a-b", "B-L", "I-L", "B", "I", "B-", "I-"]), max_size=9))
    assert spans(tags) == names_by_table(tags) and spans(tags, strict=True) == names_by_table(tags, strict=True)


def test_a_tag_that_is_no_tag_is_refused():
    with pytest.raises(TypeError, match="non-empty strings"):
        spans(["O", ""])
    with pytest.raises(ValueError, match="do not exist in IOB2"):
        spans(["S-PER"], strict=True)


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


def test_scores_are_read_by_name_and_shown_as_a_table():
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
    for average, values in (("micro", tg.prf(draws.sum(1))[:, 2]), ("macro", tg.prf(draws).mean(1)[:, 2])):
        low, high = scores.interval(n=2000, average=average)["f1"]
        assert abs(low - np.quantile(values, 0.025)) < 0.01 and abs(high - np.quantile(values, 0.975)) < 0.01
    assert scores.interval(seed=5) == scores.interval(seed=5)
    with pytest.raises(ValueError, match="micro"):
        scores.interval(average="weighted")
    with pytest.raises(ValueError, match="no sentence"):
        entity_f1([], []).interval()
