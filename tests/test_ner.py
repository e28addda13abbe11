"""ftbook.ner: alignment, batches, decoding, the tagger, and the study of chapter 10."""

import importlib.util
import itertools
import random
from collections import Counter
from types import SimpleNamespace

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

from ftbook import Settings, data, finetune, ner, peft, results
from ftbook.corpus import Corpus, Sentence, read_conll, word_shapes
from ftbook.finetune import Strategy
from ftbook.ner import (
    BucketBatches,
    NERTagger,
    WordPieces,
    align,
    decode,
    encode,
    iob2_transitions,
    mistakes,
    token_classifier,
    viterbi,
)
from ftbook.studies import ner as study
from ftbook.tags import entity_f1, label_list, to_iob2
from ftbook.train import Checkpoint, EarlyStopping, fit

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


@QUICK
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


def test_bucket_batches_hold_every_row_once_with_little_padding(tokenizer):
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
    step, start = (
        study.learn_transitions([["O", "B-A", "I-A"], ["B-B"], []], labels) if learnt else iob2_transitions(labels)
    )
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
    step, start = study.learn_transitions([["B-LOC", "I-LOC", "O"], ["O"]], LABELS)
    assert np.allclose(np.exp(step).sum(1), 1) and np.exp(start).sum() == pytest.approx(1)
    assert np.isinf(step[0, LABELS.index("I-LOC")]) and step[1, 2] > step[1, 1]


def test_class_weights_even_out_rare_labels():
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
    history = tagger.fit(
        town_corpus, town_corpus, epochs=6, lr=5e-3, batch_size=16, weight_power=0.3, settings=Settings(progress=False)
    )
    assert len(history.rows) == 6 and history.best["valid_f1"] == max(history["valid_f1"])
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
    tagger = NERTagger.from_pretrained("bert_mini_en", labels=LABELS)
    assert tagger.labels == LABELS and tagger.tag([["Rome", "sleeps"]])[0]
    with pytest.raises(ValueError, match="without a tagging head"):
        NERTagger.from_pretrained("bert_mini_en")
    small = tmp_path / "bert_mini_en"  # a folder of that name, given or in reach, comes first
    small.mkdir()
    with pytest.raises(ValueError, match="without a tagging head"):
        NERTagger.from_pretrained("bert_mini_en")
    with pytest.raises(FileNotFoundError, match="folder without config.json"):
        NERTagger.from_pretrained(small)


def test_names_that_are_no_bundled_model_are_not_taken_for_one(no_hub):
    for name in ("ner_corpus", "no-such-model", "../assets", "org/bert_mini_en", "cnn_small", "bert-mini-en"):
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


def test_entity_f1_is_a_value_that_early_stopping_can_monitor(tagger, town_corpus):
    found = [SimpleNamespace(f1=f, precision=f / 2, recall=1.0) for f in (0.3, 0.9, 0.2, 0.5, 0.1)]
    model, seen = torch.nn.Linear(2, 2), []
    scores = iter(found)
    watch = ner.EntityF1(SimpleNamespace(evaluate=lambda corpus: next(scores)), Corpus(town_corpus[:2]))
    keep = SimpleNamespace(on_epoch_end=lambda run: seen.append(model.weight.detach().clone()))
    stop = EarlyStopping("valid_f1", patience=2)
    data = torch.randn(8, 2), torch.tensor([0, 1] * 4)
    history = fit(model, data, epochs=9, lr=0.1, callbacks=[stop, watch, keep], settings=Settings(progress=False))
    assert history["valid_f1"] == [0.3, 0.9, 0.2, 0.5] and history["valid_precision"][1] == 0.45
    assert history.best["epoch"] == 2 and torch.equal(model.weight, seen[1])


def test_a_watch_serves_several_runs(town_corpus):
    scores = iter((0.9, 0.2, 0.5, 0.3))
    score = lambda corpus: SimpleNamespace(f1=next(scores), precision=0.0, recall=0.0)  # noqa: E731
    callbacks = [EarlyStopping("valid_f1", None), ner.EntityF1(SimpleNamespace(evaluate=score), town_corpus)]
    data = torch.randn(8, 2), torch.tensor([0, 1] * 4)
    options = {"epochs": 2, "callbacks": callbacks, "settings": Settings(progress=False)}
    best = [fit(torch.nn.Linear(2, 2), data, **options).best["valid_f1"] for _ in range(2)]
    assert best == [0.9, 0.5]


def test_the_tagger_keeps_its_best_f1_and_stops_early_on_it(tokenizer, town_corpus, monkeypatch):
    few, scores, seen = Corpus(town_corpus[:12]), iter((0.5, 0.0, 0.2, 0.9)), []
    monkeypatch.setattr(
        NERTagger, "evaluate", lambda self, corpus: SimpleNamespace(f1=next(scores), precision=0.0, recall=0.0)
    )
    tagger = NERTagger(token_classifier(small_body(tokenizer), few.labels, 0.0), tokenizer, max_length=24, stride=6)

    class Keep:
        def on_epoch_end(self, run):
            seen.append({k: v.clone() for k, v in tagger.model.state_dict().items()})

    callbacks = [Keep(), EarlyStopping("valid_f1", patience=2, restore=False)]
    history = tagger.fit(few, few, epochs=4, lr=5e-3, callbacks=callbacks, settings=Settings(progress=False))
    assert history["valid_f1"] == [0.5, 0.0, 0.2] and history.best["epoch"] == 1
    assert all(torch.equal(v, seen[0][k]) for k, v in tagger.model.state_dict().items())
    history = tagger.fit(few, epochs=1, settings=Settings(progress=False))
    assert history.best is None and "valid_f1" not in history.names()


def _small_tagger(tokenizer, corpus):
    model = token_classifier(small_body(tokenizer), corpus.labels, 0.0)
    return NERTagger(model, tokenizer, max_length=24, stride=6)


def _weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("how", ["full", "head", "layer-wise", Strategy(trained=["classifier"])])
def test_the_tagger_is_tuned_by_a_strategy_as_its_model_is(how, tokenizer, town_corpus):
    few, options = Corpus(town_corpus[:16]), {"epochs": 2, "lr": 5e-3, "seed": 3, "settings": Settings(progress=False)}
    ours, theirs = (_small_tagger(tokenizer, few) for _ in range(2))
    before = _weights(ours.model)
    history = ours.fit(few, how=how, batch_size=8, **options)
    batches = ner.BucketBatches(theirs.encode(few), 8, seed=3)
    (expected,) = finetune.tune(theirs.model, batches, how=how, loss=None, **options)
    assert history["train_loss"] == expected["train_loss"] and len(history.rows) == 2
    after, same = _weights(ours.model), _weights(theirs.model)
    assert all(torch.equal(after[n], same[n]) for n in same)
    moved = {n for n in after if not torch.equal(after[n], before[n])}
    assert moved == ({"classifier.weight", "classifier.bias"} if how not in ("full", "layer-wise") else set(after))


def test_the_tagger_is_tuned_by_an_adapter_that_its_model_knows(tokenizer, town_corpus, tmp_path):
    few, tagger = Corpus(town_corpus[:16]), _small_tagger(tokenizer, town_corpus)
    before = _weights(tagger.model.base_model)
    history = tagger.fit(few, few, how=peft.LoRA(r=2), epochs=2, lr=5e-3, settings=Settings(progress=False))
    handle = peft.handle(tagger.model)
    assert history.best["valid_f1"] == max(history["valid_f1"])
    assert handle.counts()["share"] < 0.5 and handle.save(tmp_path / "a").is_dir()
    tagged = tagger.tag(few)
    with handle.disable():
        assert all(torch.equal(before[n], p) for n, p in _weights(tagger.model.base_model).items() if n in before)
    assert handle.remove(keep_merged=True) is tagger.model and tagger.tag(few) == tagged
    tagger.save(tmp_path / "t")
    assert NERTagger.from_pretrained(tmp_path / "t").tag(few) == tagged


def test_the_tagger_gives_the_history_of_the_last_stage(tokenizer, town_corpus):
    few = Corpus(town_corpus[:8])
    history = _small_tagger(tokenizer, few).fit(few, how="two-stage", epochs=4, settings=Settings(progress=False))
    assert len(history.rows) == 2


@pytest.mark.parametrize("how", ["fastest", peft.LoRA, 3])
def test_the_tagger_refuses_an_unknown_way_in_the_tuners_words(how, tokenizer, town_corpus):
    tagger = _small_tagger(tokenizer, town_corpus)
    before = _weights(tagger.model)
    with pytest.raises(ValueError) as ours:
        tagger.fit(Corpus(town_corpus[:4]), how=how)
    with pytest.raises(ValueError) as tuners:
        finetune.tune(tagger.model, [], how=how, lr=1e-3)
    assert str(ours.value) == str(tuners.value) and "'layer-wise'" in str(ours.value)
    assert all(torch.equal(before[n], p) for n, p in _weights(tagger.model).items())


def test_a_broken_off_run_equals_the_whole_one_with_its_best_f1(tokenizer, town_corpus, tmp_path):
    few = Corpus(town_corpus[:24])

    def run(*callbacks, stop=None):
        t = NERTagger(token_classifier(small_body(tokenizer), few.labels, 0.0), tokenizer, max_length=24, stride=6)

        class Breaks:
            def on_epoch_end(self, run):
                if len(run.history.rows) == stop:
                    raise KeyboardInterrupt

        options = {"epochs": 4, "lr": 5e-3, "batch_size": 8, "settings": Settings(progress=False)}
        return t, t.fit(few, few, callbacks=[Breaks(), *callbacks], **options)

    whole, history = run()
    with pytest.raises(KeyboardInterrupt):
        run(Checkpoint(tmp_path / "c.pt"), stop=3)
    resumed, again = run(Checkpoint(tmp_path / "c.pt"))
    assert again["valid_f1"] == history["valid_f1"] and again.best["epoch"] == history.best["epoch"]
    assert all(torch.equal(v, resumed.model.state_dict()[k]) for k, v in whole.model.state_dict().items())


def test_a_body_that_does_not_fit(tokenizer):
    body = small_body(tokenizer)
    body.base_model.encoder.layer.append(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="does not fit"):
        token_classifier(body, LABELS)
    random_one = token_classifier(small_body(tokenizer).config, LABELS)
    assert random_one.config.id2label[1] == "B-LOC"


def test_the_tagger_says_which_method_takes_what(tagger):
    with pytest.raises(TypeError, match="use predict"):
        tagger.tag(["a text"])
    with pytest.raises(TypeError, match="use tag"):
        tagger.predict([["a", "list"]])


# ---------------------------------------------------------------- the study


def test_labels_laid_from_zero_are_one_off(tokenizer):
    e = encode([["Paris", "zebras", "the"], ["the"]], tokenizer, [["B-LOC", "O", "B-PER"], ["B-ORG"]], LABELS)
    z = study.laid_from_zero(e)
    assert [z.labels[a:b][:4].tolist() for a, b in itertools.pairwise(z.starts)] == [
        [LABELS.index("B-LOC"), 0, LABELS.index("B-PER"), -100],
        [LABELS.index("B-ORG"), -100, -100],
    ]
    assert (e.labels[e.starts[:-1]] == -100).all()


def test_padded_batches_label_the_padding(tokenizer, town_corpus):
    e = encode(town_corpus, tokenizer)
    batches = study.PaddedBatches(e, 50, length=64, label=0)
    seen = list(batches)
    assert [b["labels"].shape for b in seen] == [(50, 64), (50, 64), (20, 64)]
    assert all((b["labels"][b["attention_mask"] == 0] == 0).all() for b in seen)
    assert sorted(np.concatenate(batches.rows())) == list(range(120))


def test_noise_changes_types_and_nothing_else(town_corpus):
    noisy = study.shuffle_types(town_corpus, 0.5, seed=1)
    pairs = [
        (a, b) for s, t in zip(town_corpus, noisy, strict=True) for a, b in zip(s.entities, t.entities, strict=True)
    ]
    assert all(a[1:] == b[1:] for a, b in pairs) and 0.4 < np.mean([a != b for a, b in pairs]) < 0.6
    assert list(study.shuffle_types(town_corpus, 0.0)) == list(town_corpus)


@pytest.mark.parametrize("target", ["right", "zipped", "padded", "all pieces", "noisy types"])
def test_a_tagger_is_fine_tuned_on_every_kind_of_labels(tokenizer, town_corpus, target):
    few, body = Corpus(town_corpus[:24]), small_body(tokenizer).config
    options = {"epochs": 1, "lr": 5e-4, "max_length": 32, "target": target}
    tagger, again = (study.fine_tuned(1, body, tokenizer, few, **options) for _ in range(2))
    same = again.model.state_dict()
    assert all(torch.equal(v, same[k]) for k, v in tagger.model.state_dict().items())
    assert tagger.max_length == 32 and tagger.stride == 8


def test_only_the_part_that_is_named_is_trained(tokenizer, town_corpus):
    few, body = Corpus(town_corpus[:8]), small_body(tokenizer)
    counts = []
    for part in ("head", "top", "full"):
        tagger = study.fine_tuned(1, body, tokenizer, few, part, epochs=1, lr=1e-3, max_length=32)
        counts.append(sum(p.numel() for p in tagger.model.parameters() if p.requires_grad))
    assert counts[0] == 33 * len(few.labels) and counts[0] <= counts[1] < counts[2]
    assert counts[2] == sum(p.numel() for p in tagger.model.parameters())


def test_scores_are_sums_over_sentences(tagger, town_corpus):
    few = Corpus([*town_corpus[:6], Sentence([], []), *town_corpus[6:9], Sentence([], [])])
    found = study.scores(tagger, few)
    whole = tagger.evaluate(few)
    for name, value in (("f1", whole.f1), ("precision", whole.precision), ("recall", whole.recall)):
        above, below = found[f"test_{name}"]
        assert len(above) == len(below) == 11 and above.sum() / below.sum() == pytest.approx(value)
    right, words = found["test_word_accuracy"]
    assert (right <= words).all() and words.tolist() == list(map(len, few))
    assert len(found["broken_sentences"]) == 11 and set(found) == SCORES


SCORES = {"test_f1", "test_f1_argmax", "test_precision", "test_recall", "test_word_accuracy", "broken_sentences"}


def test_a_run_of_either_study_scores_what_its_split_says(monkeypatch):
    parts = [Corpus(part[:12]) for part in study.corpora()]
    monkeypatch.setattr(study, "corpora", lambda: parts)
    for row, length in ((study.ROWS[1], {}), (study.STARTS[0], study.LONG), (study.STARTS[3], study.LONG)):
        row = {**row, "lr": row["lr"][0], **length}
        assert set(study.run(0, "valid", **row)) == {"valid_f1"}
        found = study.run(1, "test", **row)
        assert set(found) == SCORES and len(found["test_f1"][0]) == 12


def made_up(seed, split, lr, target, **row):
    """Scores in place of a run."""
    if split == "valid":
        return {"valid_f1": 0.5 - lr}
    hits = np.arange(len(study.corpora()[2])) % 2 * (0 if target == "zipped" else 1)
    return {"test_f1": (2 * hits, 2 + 0 * hits)}


def test_a_linear_model_sees_the_shapes_of_words():
    first, last = word_shapes(["NATO", "met"])
    assert first["upper"] and not first["title"] and first["before"] == "" and first["after"] == "met"
    assert last["end"] == "met" and last["before"] == "nato" and last["after"] == ""


def test_the_studies_store_a_row_for_each_way(tmp_path, monkeypatch):
    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path))
    monkeypatch.setattr(study, "SHAPES", results.Baseline(model="word shapes", C=[1.0]))
    monkeypatch.setattr(study, "run", made_up)
    study.main()
    for name, rows in (("ways", study.ROWS), ("models", study.STARTS)):
        found = results.load_study("10_ner", name, "quick")
        trained = [r for r in found.rows("test_f1") if r.get("model") != "word shapes"]
        assert len(trained) == len(rows) == {"ways": 8, "models": 5}[name]
        assert all(r["seeds"] == [1, 2, 3] and r["n"] == len(study.corpora()[2]) for r in trained)
        if name == "ways":
            assert found.row("test_f1", target="zipped")["mean"] == 0.0
        else:
            assert 0 < found.row("test_f1", model="word shapes").mean < 1
    with pytest.raises(ValueError, match="no study 'bert'; use models, ways"):
        study.main("bert")


def columns(sentences):
    """CoNLL-2003's four columns with IOB1 tags, as its original files have them."""
    rows = [
        [f"{w} NNP I-NP {t.replace('B-', 'I-')}\n" for w, t in zip(s.words, s.tags, strict=True)] for s in sentences
    ]
    return ("-DOCSTART- -X- -X- O\n\n" + "\n".join("".join(lines) for lines in rows)).encode()


def test_the_study_on_conll_2003_in_the_gpu_profile(fake, tokenizer, tmp_path, monkeypatch):
    corpus = read_conll(data.asset("ner_corpus/train.conll"))
    parts = {"train": 0, "valid": 8, "test": 16}
    fake("conll2003", "bio", {f"{name}.txt": columns(corpus[i : i + 8]) for name, i in parts.items()})
    monkeypatch.setenv("FTBOOK_PROFILE", "gpu")
    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path / "results"))
    spec = importlib.util.spec_from_file_location("ftbook.studies.ner_gpu", study.__file__)
    gpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu)  # a second copy, with the settings of the gpu profile
    monkeypatch.setattr(gpu, "_base", {"bert_base_cased": (small_body(tokenizer), tokenizer)}.get)
    monkeypatch.setitem(gpu.SETTINGS, "epochs", 1)
    monkeypatch.setattr(gpu, "ROWS", gpu.ROWS[:2])
    assert gpu.SENTENCES is None and gpu.SETTINGS["dropout"] == 0.1
    gpu.main("ways")
    found = results.load_study("10_ner", "ways", "gpu")
    assert [r["init"] for r in found.rows("test_f1")] == ["random", "pretrained"]
    row = found.row("test_f1", init="random")
    assert row["n"] == 8 and row["tried"] == 5 and row["budget"].startswith("all sentences")
    assert len(found.search.runs) == 10 and len(found.final.runs) == 6


# ---------------------------------------------------------------- mistakes


def test_every_mistake_has_its_kind():
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
    assert {k: v["found"] for k, v in study.by_length(corpus, pred).items()} == {1: 1, 2: 1}
    assert {k: v["recall"] for k, v in study.by_novelty(corpus, pred, training).items()} == {
        "other type": 1.0,
        "seen": 0.0,
        "unseen": 1.0,
    }
