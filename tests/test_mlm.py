"""Chapter 6: tokenizer, packing, masking, the head on masked positions, pretraining, checkpoints, measurements."""

import json
import math
import re
import time
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizer

from ftbook import Checkpoint, Settings, data, mlm, models, results
from ftbook.studies import mlm as study
from ftbook.texts import encodable, encode_texts, sentence_vectors, unpadded
from ftbook.train import fit

SENTENCES = (
    "The river runs past the old mill and into the lake.",
    "Anna wrote a letter to her brother in Paris.",
    "He bought bread, cheese and two bottles of milk.",
    "The club played its first match in 1902 and lost.",
    "Unbelievably, the unhappiest players were replaying it.",
)


@pytest.fixture(scope="module")
def documents():
    return ["\n".join(SENTENCES[(i + k) % 5] for k in range(4)) for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    """Words of up to four letters whole, longer ones in two pieces, and every letter.

    The trainer of `tokenizers` breaks ties as chance has it: what a test asserts of a small model would differ by run.
    """
    words = set(re.findall(r"\w+|[^\w\s]", " ".join(SENTENCES)))
    letters = {letter for word in words for letter in word}
    pieces = letters | {f"##{letter}" for letter in letters if letter.isalnum()}
    pieces |= {word[:4] for word in words} | {f"##{word[4:]}" for word in words if len(word) > 4}
    vocab = {piece: i for i, piece in enumerate([*mlm._SPECIAL, *sorted(pieces)])}
    return BertTokenizer(vocab=vocab, do_lower_case=False, strip_accents=False, model_max_length=256)


@pytest.fixture(scope="module")
def vocab(tokenizer):
    return mlm.vocabulary(tokenizer)


@pytest.fixture(scope="module")
def ids(documents, tokenizer):
    return mlm.pack(documents, tokenizer, length=16)


@pytest.fixture
def model(tokenizer):
    return mlm.small_bert(len(tokenizer), hidden=32, layers=2, heads=2, positions=32)


def test_detokenize_closes_up_punctuation():
    assert study.detokenize("in 1 @,@ 000 @.@ 5 well @-@ known") == "in 1,000.5 well-known"
    assert study.detokenize('he said " no " ; it was <unk> \'s ( old ) % .') == 'he said "no"; it was [UNK]\'s (old)%.'
    assert study.detokenize("they didn 't [ sic ] pay $ 5 !\n next") == "they didn't [sic] pay $5!\n next"


def test_read_documents_finds_titles_headings_and_empty_articles():
    text = "\n = One = \n\n first line \n = = Part = = \n\n second\n = Empty = \n\n = Two = \n x"
    assert mlm.read_documents(text) == ["One\nfirst line\nPart\nsecond", "Two\nx"]


def test_headings_lose_their_equals_signs_in_linear_time():
    text = "= A =\n= = Part = =\n= = = Deep one = = =\nx = y\n= half\n= 1 = 2"
    assert mlm.read_documents(text + "\n") == ["A\nPart\nDeep one\nx = y\n= half\n= 1 = 2"]
    start = time.process_time()
    mlm.read_documents("= A =\n = x" + " =" * 40_000 + " b\nlast")
    assert time.process_time() - start < 2


def test_read_documents_without_titles_cuts_by_lines():
    assert mlm.read_documents("a\nb\n\nc", lines=2) == ["a\nb", "c"]
    with pytest.raises(ValueError, match="empty"):
        mlm.read_documents(" \n")


def test_split_is_disjoint_complete_and_repeatable():
    docs = [str(i) for i in range(50)]
    parts = mlm.split_documents(docs, held_out=0.1, seed=3)
    assert sorted(sum(parts, [])) == sorted(docs) and [len(p) for p in parts] == [40, 5, 5]
    assert parts == mlm.split_documents(docs, held_out=0.1, seed=3)
    for bad in ((docs, 0.5), (docs[:2], 0.1)):
        with pytest.raises(ValueError, match="held_out"):
            mlm.split_documents(*bad)


def test_tokenizer_has_berts_special_tokens_and_keeps_case(documents):
    tokenizer = mlm.train_tokenizer(documents, vocab_size=160)
    assert tokenizer.convert_tokens_to_ids(list(mlm._SPECIAL)) == [0, 1, 2, 3, 4]
    assert len(tokenizer) <= 160
    encoded = tokenizer("Paris paris")["input_ids"]
    assert encoded[0] == 2 and encoded[-1] == 3 and tokenizer.decode(encoded[1:-1]) == "Paris paris"
    assert tokenizer("☃")["input_ids"] == [2, 1, 3]
    with pytest.raises(ValueError, match="list of strings"):
        mlm.train_tokenizer("one string")


def test_pack_loses_and_invents_nothing(documents, tokenizer, ids):
    stream = [i for d in documents for i in [*tokenizer(d, add_special_tokens=False)["input_ids"], 3]]
    assert (ids[:, 0] == 2).all() and (ids[:, -1] == 3).all() and not (ids == 0).any()
    body = ids[:, 1:-1].flatten().tolist()
    assert body == stream[: len(body)] and len(stream) - len(body) < 14


@settings(max_examples=15, deadline=None)
@given(st.integers(3, 40), st.integers(1, 9))
def test_pack_any_length(tokenizer, length, n):
    ids = mlm.pack(list(SENTENCES) * n, tokenizer, length=length)
    assert ids.shape[1] == length and ids.dtype == torch.int64


def test_pack_refuses_what_fills_no_sequence(tokenizer):
    with pytest.raises(ValueError, match="3 or more"):
        mlm.pack(["x"], tokenizer, length=2)
    with pytest.raises(ValueError, match="do not fill"):
        mlm.pack(["He bought"], tokenizer, length=64)
    with pytest.raises(ValueError, match="do not fill"):
        mlm.pack([], tokenizer)


def padded_copy(tokenizer):
    """A copy whose file says, as all-MiniLM-L6-v2's does: pad to 128 pieces and cut at 128, always."""
    odd = deepcopy(tokenizer)
    odd.backend_tokenizer.enable_padding(length=128, pad_id=0, pad_token="[PAD]")
    odd.backend_tokenizer.enable_truncation(128)
    return odd


def state(tokenizer):
    return tokenizer.backend_tokenizer.padding, tokenizer.backend_tokenizer.truncation


def test_padding_and_truncation_of_the_tokenizers_file_change_nothing(documents, tokenizer, model):
    odd, long = padded_copy(tokenizer), ["\n".join(documents[:20])] * 3  # more than 128 pieces each
    assert len(tokenizer(long[0])["input_ids"]) > 500 and len(odd.backend_tokenizer.encode("a")) == 128
    before = state(odd)
    assert torch.equal(mlm.pack(long, odd, length=16), mlm.pack(long, tokenizer, length=16))
    for texts in (["He bought bread.", "Anna"], long):
        ours, plain = (encode_texts(texts, t, max_length=40) for t in (odd, tokenizer))
        assert all(torch.equal(ours[k], plain[k]) for k in plain) and ours["input_ids"].shape[1] <= 40
    assert mlm.fill_mask("The [MASK] runs.", 2, model, odd) == mlm.fill_mask("The [MASK] runs.", 2, model, tokenizer)
    assert state(odd) == before and before[0]["length"] == before[1]["max_length"] == 128


def test_encoding_texts_leaves_the_tokenizer_as_it_was(documents, tokenizer):
    before = state(tokenizer)
    encode_texts(["He bought bread.", "Anna"], tokenizer, max_length=4)
    assert state(tokenizer) == before
    assert mlm.pack(documents, tokenizer, length=16).shape == mlm.pack(documents, deepcopy(tokenizer), length=16).shape


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_tokenizer_is_restored_whatever_happens(tokenizer, error):
    odd = padded_copy(tokenizer)
    before = state(odd)
    with pytest.raises(error), unpadded(odd) as backend:
        assert backend.padding is None and backend.truncation is None
        backend.enable_truncation(3)
        raise error
    assert state(odd) == before
    plain = deepcopy(tokenizer)
    plain.backend_tokenizer.no_padding()
    plain.backend_tokenizer.no_truncation()
    with unpadded(plain) as backend:
        backend.enable_padding(length=7)
    assert state(plain) == (None, None)
    with unpadded(object()) as backend:  # a tokenizer written in Python
        assert backend is None


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=20) | st.sampled_from(
    ["x\ud800", "\udfff \ud83d\ude00"]
)


@settings(max_examples=80, deadline=None)
@given(st.lists(ANY_TEXT, min_size=1, max_size=4))
def test_any_str_can_be_encoded(tokenizer, texts):
    replaced = [re.sub("[\ud800-\udfff]", "\ufffd", t) for t in texts]
    assert [encodable(t) for t in texts] == replaced and all(encodable(t).encode() for t in texts if t)
    assert [len(encodable(t)) for t in texts] == [len(t) for t in texts]
    padded = encode_texts(texts, tokenizer)
    assert torch.equal(padded["input_ids"], encode_texts(replaced, tokenizer)["input_ids"])
    more = [*texts, *SENTENCES * 3]
    assert torch.equal(mlm.pack(more, tokenizer, 8), mlm.pack([*replaced, *SENTENCES * 3], tokenizer, 8))


def test_half_surrogates_reach_no_tokenizer(tokenizer, model, documents):
    assert mlm.fill_mask("The\ud800 [MASK] runs.", 1, model, tokenizer)
    trained = mlm.train_tokenizer([d + "\udc80" for d in documents], vocab_size=160)
    assert trained.decode(trained("Anna wrote")["input_ids"][1:-1]) == "Anna wrote"


def test_what_is_no_list_of_texts_is_refused_with_the_cure(tokenizer):
    for encode in (encode_texts, mlm.pack):
        with pytest.raises(TypeError, match="not the str 'one text'. Put a single text into a list"):
            encode("one text", tokenizer)
        with pytest.raises(TypeError, match="a text must be a str, not NoneType: None"):
            encode(["a", None], tokenizer)


@pytest.mark.parametrize("whole_word", [False, True])
def test_masking_has_the_stated_proportions(ids, vocab, whole_word):
    generator = torch.Generator().manual_seed(0)
    many = ids.repeat(300, 1)
    inputs, labels = mlm.mask_tokens(many, vocab, 0.15, whole_word, generator=generator)
    chosen, ordinary = labels != -100, ~vocab.special[many]
    n = int(chosen.sum())
    close = 0.02 if whole_word else 4 * math.sqrt(0.15 * 0.85 / int(ordinary.sum()))
    assert abs(n / int(ordinary.sum()) - 0.15) < close
    masked, changed = inputs == vocab.mask_id, (inputs != many) & (inputs != vocab.mask_id)
    tolerance = 4 * math.sqrt(0.25 / n)
    assert abs(float(masked[chosen].float().mean()) - 0.8) < tolerance
    assert abs(float(changed[chosen].float().mean()) - 0.1) < tolerance  # a random piece is rarely the true one
    assert torch.equal(labels[chosen], many[chosen]) and torch.equal(inputs[~chosen], many[~chosen])


def test_masking_never_touches_special_tokens(ids, vocab):
    inputs, labels = mlm.mask_tokens(ids, vocab, probability=1.0, replace=(0.5, 0.5))
    special = vocab.special[ids]
    assert torch.equal(inputs[special], ids[special]) and (labels[special] == -100).all()
    assert (labels[~special] >= 0).all()
    random = inputs[~special & (inputs != vocab.mask_id)]
    assert not vocab.special[random].any() and len(random.unique()) > 20


def test_whole_words_are_chosen_together(tokenizer, vocab):
    ids = mlm.pack(["unhappiest replaying unbelievably " * 40], tokenizer, length=32)
    assert vocab.continuation[ids].any()
    chosen = mlm._choose(ids, vocab, 0.5, True, torch.Generator().manual_seed(1))
    follows = vocab.continuation[ids[:, 1:]] & ~vocab.special[ids[:, :-1]]
    assert torch.equal(chosen[:, 1:][follows], chosen[:, :-1][follows])
    pieces = mlm._choose(ids, vocab, 0.5, False, torch.Generator().manual_seed(1))
    assert not torch.equal(pieces[:, 1:][follows], pieces[:, :-1][follows])
    assert 0.3 < float(chosen[~vocab.special[ids]].float().mean()) < 0.7


def test_masking_is_repeatable_and_checks_its_settings(ids, vocab, tokenizer):
    first, second = (mlm.mask_tokens(ids, v, generator=torch.Generator().manual_seed(5)) for v in (vocab, tokenizer))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for bad in ({"probability": 1.5}, {"replace": (0.9, 0.2)}, {"replace": (-0.1, 0.2)}):
        with pytest.raises(ValueError, match="in \\[0, 1\\]"):
            mlm.mask_tokens(ids, vocab, **bad)
    with pytest.raises(ValueError, match="mask token"):
        mlm.vocabulary(object())


def test_batches_cover_every_row_and_go_on_where_an_epoch_stopped(ids, vocab):
    batches = mlm.Masked(ids, vocab, batch_size=5, steps=4, seed=2)
    laps = math.ceil(len(ids) / 5) + 2
    seen = torch.cat([batches.rows(step) for step in range(laps)])
    assert torch.equal(seen[: len(ids)].sort().values, torch.arange(len(ids))) and len(batches) == 4
    first = list(batches)
    batches.set_epoch(1)
    second = list(batches)
    assert not torch.equal(first[0]["input_ids"], second[0]["input_ids"])
    batches.set_epoch(0)
    assert torch.equal(first[3]["input_ids"], list(batches)[3]["input_ids"])


def test_validation_batches_are_the_same_every_time(ids, vocab):
    batches = mlm.Masked(ids, vocab, batch_size=8, fixed=True)
    first = [b["labels"] for b in batches]
    batches.set_epoch(3)
    assert all(torch.equal(a, b["labels"]) for a, b in zip(first, batches, strict=True))
    assert sum(len(x) for x in first) == len(ids)


def test_head_on_masked_positions_equals_the_dense_head(model, ids, vocab):
    inputs, labels = mlm.mask_tokens(ids[:8], vocab, generator=torch.Generator().manual_seed(0))
    dense = model(input_ids=inputs, labels=labels)
    dense.loss.backward()
    wanted = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()
    ours = mlm.MaskedLM(model)(inputs, labels)
    ours.loss.backward()
    assert torch.allclose(ours.loss, dense.loss, atol=1e-6)
    assert torch.allclose(ours.logits, dense.logits[labels != -100], atol=1e-5)
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, wanted[name], atol=1e-6), name
    assert torch.equal(ours.target, labels[labels != -100])


def test_no_label_gives_no_loss_and_no_nan(model, ids):
    output = mlm.MaskedLM(model)(ids[:2], torch.full_like(ids[:2], -100))
    assert output.loss == 0 and mlm._masked_accuracy(output.logits, torch.full((2, 3), -100)) == 0.0


def test_small_bert_is_seeded_and_leaves_the_global_stream_alone():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    a, b = (mlm.small_bert(50, hidden=8, layers=1, heads=1, positions=8, seed=4) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert a.get_output_embeddings().weight is a.get_input_embeddings().weight


def test_budget_rises_falls_and_ends(monkeypatch):
    budget = mlm._Budget(warmup=0.5)
    factors = [budget(step, 100) for step in range(101)]
    assert max(factors) == pytest.approx(1.0, abs=0.03) and factors[-1] == 0 and 0 < factors[0] < 0.03
    now = [1000.0]
    monkeypatch.setattr(mlm.time, "time", lambda: now[0])
    timed, state = mlm._Budget(seconds=10, warmup=0.1), type("State", (), {"stop": False})()
    timed(0, 10**6)
    timed.on_step_end(state)
    assert not state.stop
    now[0] = 1011.0
    resumed = mlm._Budget(seconds=10, warmup=0.1)
    resumed.load_state_dict(timed.state_dict())
    assert resumed(5, 10**6) == 0
    resumed.on_step_end(state)
    assert state.stop
    for bad in ({"seconds": 0}, {"warmup": 0}, {"warmup": 1}):
        with pytest.raises(ValueError, match="warmup"):
            mlm._Budget(**bad)


def test_a_budget_gives_every_run_its_own_time_and_a_resumed_run_what_is_left(monkeypatch, tmp_path):
    now, budget, torn = [1000.0], mlm._Budget(seconds=10, warmup=0.1), []
    monkeypatch.setattr(mlm.time, "time", lambda: now[0])

    def second(run):
        now[0] += 1
        if run.step in torn:
            raise KeyboardInterrupt

    def steps(*callbacks):
        tick = SimpleNamespace(on_step_end=second, state_dict=dict, load_state_dict=lambda state: None)
        how = {"batch_size": 2, "epochs": 3, "settings": Settings(schedule=budget, progress=False)}
        data = torch.zeros(8, 2), torch.zeros(8).long()
        return fit(torch.nn.Linear(2, 2), data, callbacks=[tick, budget, *callbacks], **how).rows[-1]["steps"]

    assert (steps(), steps()) == (11, 11)
    torn.append(6)
    with pytest.raises(KeyboardInterrupt):
        steps(Checkpoint(tmp_path / "run.pt"))
    torn.clear()
    now[0] += 1  # 7 of the 10 seconds are used, and 4 steps are stored
    assert steps(Checkpoint(tmp_path / "run.pt")) == 8


def test_budget_agrees_across_processes(monkeypatch):
    monkeypatch.setattr(mlm.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(mlm.dist, "broadcast", lambda tensor, source: tensor.fill_(0.25))
    assert mlm._Budget().progress(1, 2) == 0.25


def test_pretraining_beats_both_counting_baselines(tokenizer, ids, vocab):
    model = mlm.small_bert(len(tokenizer), hidden=32, layers=2, heads=2, positions=16)
    history = mlm.pretrain(
        model, tokenizer, ids, ids, steps=250, every=50, lr=5e-3, batch_size=32, settings=Settings(progress=False)
    )
    assert [row["steps"] for row in history.rows] == [50, 100, 150, 200, 250]
    scored = mlm.score(model, mlm.Masked(ids, vocab, 16, fixed=True, seed=1))
    levels = mlm.NGram(ids, vocab).losses(scored.previous, scored.target)
    unigram, bigram = (x.mean().item() for x in levels)
    assert bigram < unigram and scored.loss.mean() < 0.8 * unigram
    assert history["valid_loss"][-1] < history["valid_loss"][0] and history["valid_accuracy"][-1] > 0.2
    assert history.rows[-1]["lr"] < 1e-4


def test_a_start_from_counts_knows_frequencies_and_looks_at_neighbors(tokenizer, ids, vocab):
    model = mlm.small_bert(len(tokenizer), hidden=64, layers=2, heads=2, positions=16)
    before = study.attention_shares(model, ids[:8], vocab).mean(1)
    noise = mlm.score(model, mlm.Masked(ids, vocab, 16, fixed=True)).loss.mean()
    mlm.start_from_counts(model, ids, vocab)
    after = study.attention_shares(model, ids[:8], vocab).mean(1)
    assert after[0, 0, 0] > 2 * before[0, 0, 0] and after[1, 0, 1] > 2 * before[1, 0, 1]
    assert mlm.score(model, mlm.Masked(ids, vocab, 16, fixed=True)).loss.mean() < noise - 0.3
    words = model.bert.embeddings.word_embeddings.weight
    assert torch.allclose(words[vocab.ordinary].norm(dim=1), torch.ones(len(vocab.ordinary)), atol=1e-4)
    assert model.get_output_embeddings().weight is words


def test_neighbor_heads_are_the_rotation_of_the_equation():
    model = mlm.small_bert(30, hidden=64, layers=1, heads=1, positions=40)
    mlm._look_at_neighbors(model, offsets=(3,), peak=12.0)
    attention = model.bert.encoder.layer[0].attention.self
    waves = mlm._sinusoids(40, 64)  # one head as wide as the model: every sinusoid takes part
    scores = (waves @ attention.query.weight.T) @ (waves @ attention.key.weight.T).T / 64**0.5
    assert torch.equal(scores[:37].argmax(1), torch.arange(37) + 3)
    assert torch.allclose(scores[10, 13], torch.tensor(12.0), atol=1e-3)


def test_ppmi_by_hand_and_similar_words_get_similar_vectors(vocab):
    counts = torch.tensor([[4.0, 0.0], [0.0, 4.0]])
    assert torch.allclose(mlm._ppmi(counts, smoothing=1.0), torch.log(torch.tensor([[2.0, 1.0], [1.0, 2.0]])))
    table = mlm._Vocabulary(4, torch.arange(9) < 5, torch.zeros(9).bool(), torch.arange(5, 9))
    ids = torch.tensor([[2, 5, 7, 3], [2, 6, 7, 3], [2, 8, 8, 3]]).repeat(20, 1)  # 5 and 6 are used alike
    vectors = mlm._count_embeddings(ids, table, 12)
    assert vectors.shape == (9, 12) and vectors[:5].abs().sum() == 0
    assert vectors[5] @ vectors[6] > vectors[5] @ vectors[8]
    assert torch.equal(mlm._pair_counts(ids, 2, 9)[5], torch.tensor([0, 0, 0, 20.0, 0, 0, 0, 0, 0]))


@pytest.mark.parametrize("features", [r["features"] for r in study.rows()])
def test_every_description_is_probed_on_both_splits(features):
    sizes = {split: len(part) for split, part in study._reviews().items()}
    for split in ("valid", "test"):
        right = study.run(0, split, features, 1.0, labels=40)["accuracy"]
        assert right.shape == (sizes[split],) and set(right) <= {0.0, 1.0}
    assert (study.run(0, "test", features, 1.0, labels=40)["accuracy"] == right).all()


def test_a_network_is_probed_before_and_while_it_reads(monkeypatch):
    monkeypatch.setattr(mlm, "start_from_counts", lambda model, ids, vocab: None)
    study.readers.cache_clear()
    networks = study.readers(0)
    assert set(networks) == {-1, 0, *study.READ} and not any(m.training for m in networks.values())
    words = "bert.embeddings.word_embeddings.weight"
    first, last = (networks[n].state_dict()[words] for n in (0, study.READ[-1]))
    assert not torch.equal(first, last), "it has read"
    n = len(study._reviews()["test"])
    for features, steps in (("pretrained", study.READ[-1]), ("random weights", 0), ("bag of words", 0)):
        found = study.run_after(0, "test", features, 1.0, steps)
        assert found["accuracy"].shape == (n,) and 0 <= found["accuracy"].min() <= found["accuracy"].max() <= 1
        assert ("loss" in found) == (features != "bag of words")
    assert set(study.run_after(0, "valid", "random weights", 1.0)) == {"accuracy"}
    study.readers.cache_clear()
    study._described_after.cache_clear()


def test_a_sentence_vector_is_the_mean_of_its_outputs_whatever_stands_beside_it(model, tokenizer):
    model.eval()
    both = sentence_vectors([SENTENCES[0], "Anna"], model, tokenizer)
    alone = sentence_vectors(["Anna"], model, tokenizer)
    ids = torch.tensor([tokenizer("Anna")["input_ids"]])
    with torch.no_grad():
        wanted = model.bert(ids).last_hidden_state[0].mean(0)
    assert both.shape == (2, 32) and torch.allclose(alone[0], wanted, atol=1e-5)
    assert torch.allclose(both[1], wanted, atol=1e-5)


def made_up(seed, split, features, strength, *, labels):
    """Scores in place of a run."""
    n = len(study._reviews()[split])
    right = {"MiniLM": 2, "bert-mini-en": 3}.get(features, 4)
    return {"accuracy": (torch.arange(n) % right > 0).double().numpy() - (strength not in (1e-2, 1e1))}


def made_up_after(seed, split, features, strength, steps=0):
    """Scores in place of a probe of a network that has read so much."""
    n = len(study._reviews()[split])
    right = np.full(n, 0.6) if features == "pretrained" else np.arange(n) % 2
    loss = {} if split == "valid" or features == "bag of words" else {"loss": 5.0 - steps}
    return {"accuracy": right - 0.2 * (strength not in (1e-2, 1e1)), **loss}


def test_the_study_has_a_row_for_each_description_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path))
    monkeypatch.setattr(study, "run", made_up)
    monkeypatch.setattr(study, "run_after", made_up_after)
    study.main()
    monkeypatch.setattr(study, "run", lambda *args, **options: pytest.fail("runs again"))
    study.main("probe")
    for labels in study.LABELS:
        found = results.load_study("06_mlm", f"probe_{labels}", "quick")
        rows = found.rows("accuracy")
        assert [r["features"] for r in rows] == [r["features"] for r in study.rows()]
        assert all(len(r["values"]) == 10 and r["tried"] == 6 and not r["edge"] for r in rows)
        assert [r["strength"] for r in rows] == [1e1, 1e-2, 1e-2, 1e-2]
        gaps = {r["features"]: r["verdict"] for r in found.compare("accuracy", features="bag of words")}
        assert gaps["MiniLM"] == "worse" and gaps["random BERT"] == "unclear"
    read = results.load_study("06_mlm", "steps", "quick")
    rows = [(r["features"], r.get("steps")) for r in read.rows("accuracy")]
    assert rows[2:-1] == [("pretrained", n) for n in (0, *study.READ)]
    assert rows[:2] == [("bag of words", None), ("random weights", None)] and rows[-1] == ("bert-mini-en", None)
    assert len(read.rows("loss")) == len(rows) - 1 and all(len(r["values"]) == 3 for r in read.rows("loss"))
    with pytest.raises(ValueError, match="no study 'nonsense'; use probe, .*finish"):
        study.main("probe", "nonsense")


def test_counting_and_the_model_are_scored_on_hidden_pieces_alone(model, ids, vocab):
    counts, batches = mlm.NGram(ids, vocab), mlm.Masked(ids, vocab, 8, fixed=True, seed=3)
    found, scored = study._on_hidden(model, counts, batches), mlm.score(model, batches)
    hidden = scored.shown == vocab.mask_id
    assert found["n"] == int(hidden.sum()) < len(hidden)
    mean, low, high = found["bert-mini-en"]["loss"]
    assert mean == pytest.approx(float(scored.loss[hidden].mean()), rel=1e-5) and low < mean < high
    unigram, bigram = (found[k]["accuracy"][0] for k in ("unigram", "bigram"))
    assert 0 <= unigram < bigram <= 1 and 0 <= found["kept"] <= 1


def test_the_best_next_piece_is_that_of_the_bigram_model(ids, vocab):
    counts = mlm.NGram(ids, vocab)
    previous = torch.tensor([2, 9, 30, 9, 3])
    every = vocab.ordinary
    wanted = [every[counts.losses(p.expand(len(every)), every)[1].argmin()] for p in previous]
    found = study._best_next(counts, previous)
    for got, best, p in zip(found, wanted, previous, strict=True):
        losses = counts.losses(p.expand(2), torch.stack([got, best]))[1]
        assert losses[0] == pytest.approx(float(losses[1]))


def test_the_long_run_packs_trains_and_writes_a_checkpoint(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setenv("FTBOOK_DATA", str(tmp_path))
    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path / "results"))
    before = {f: f.stat().st_mtime_ns for f in study.ASSET.iterdir()}
    try:
        study.main("prepare", "pretrain", "finish")
    finally:
        torch.set_num_threads(threads)
    assert before == {f: f.stat().st_mtime_ns for f in study.ASSET.iterdir()}, "quick runs leave the asset alone"
    folder = tmp_path / "bert-mini-en" / "checkpoint"
    card, facts = (folder / "README.md").read_text(encoding="utf-8"), results.load("06_mlm", "bert_mini")
    assert facts["steps"] == 4 and "| training | 4 steps of 32 sequences: 16,384 pieces" in card
    assert f"n = {results.load('06_mlm', 'bert_mini_n'):,})" in card and "| license" not in card
    check_checkpoint(folder)


def check_checkpoint(folder):
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    model = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert mlm.fill_mask("The [MASK] runs.", 2, model, tokenizer)
    assert model.config.hidden_dropout_prob == 0.1
    assert (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()[4] == "[MASK]"


def test_the_card_of_the_bundled_checkpoint_says_what_is_stored(root):
    stored = json.loads((root / "results" / "06_mlm.json").read_text(encoding="utf-8"))["cpu"]
    facts = {k: stored[f"bert_mini_{k}"]["value"] for k in ("loss", "unigram", "bigram", "n", "accuracy", "top5")}
    card = (study.ASSET / "README.md").read_text(encoding="utf-8")
    assert study._carded(card, stored["bert_mini"]["value"], facts) == card
    assert 'make results CH="06 prepare pretrain finish"' in card


def test_pretraining_resumes_to_the_same_weights(tokenizer, ids, tmp_path):
    def make():
        return mlm.small_bert(len(tokenizer), hidden=16, layers=1, heads=1, positions=16)

    class Crash:
        def __init__(self, at):
            self.at = at

        def on_step_end(self, state):
            if state.step == self.at:
                raise KeyboardInterrupt

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    whole, broken = make(), make()
    options = {
        "steps": 16,
        "every": 4,
        "batch_size": 4,
        "masking": {"whole_word": True},
        "settings": Settings(progress=False),
    }
    mlm.pretrain(whole, tokenizer, ids, callbacks=[Checkpoint(tmp_path / "a")], **options)
    with pytest.raises(KeyboardInterrupt):
        mlm.pretrain(broken, tokenizer, ids, callbacks=[Crash(9), Checkpoint(tmp_path / "b")], **options)
    resumed = make()
    mlm.pretrain(resumed, tokenizer, ids, callbacks=[Crash(None), Checkpoint(tmp_path / "b")], **options)
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_a_stored_checkpoint_gives_the_same_answers(model, tokenizer, ids, tmp_path):
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    model.eval()
    study._save(model, tokenizer, tmp_path / "m", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    check_checkpoint(tmp_path / "m")
    other = AutoModelForMaskedLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    assert torch.allclose(other(ids[:2]).logits, model(ids[:2]).logits, atol=1e-2)  # float16 rounding
    text = "The unhappiest club, ☃ in Paris."
    assert AutoTokenizer.from_pretrained(tmp_path / "m")(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert model.config.hidden_dropout_prob == 0.0 and model.dtype == torch.float32


def test_bundled_checkpoint_loads_everywhere_and_knows_some_english():
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    model, tokenizer = models.load("bert_mini_en")
    folder = data.asset("bert-mini-en")
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 12e6 and (folder / "README.md").is_file()
    other = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    batch = tokenizer("The capital of France is [MASK].", return_tensors="pt")
    assert torch.equal(model(**batch).logits, other(**batch).logits)
    assert AutoTokenizer.from_pretrained(folder)("Bush").input_ids == tokenizer("Bush").input_ids
    text = ["He was born in the year of his father 's death, and he died in 1950."] * 40
    ids = mlm.pack(text, tokenizer, length=32)
    vocab = mlm.vocabulary(tokenizer)
    loss = mlm.score(model, mlm.Masked(ids, vocab, fixed=True)).loss.mean()
    assert loss < 2
    for sentence, word in (
        ("He played for the club [MASK] 1998 to 2001.", "from"),
        ("They [MASK] not want to go.", "do"),
        ("The film was [MASK] by John Smith.", "directed"),
    ):
        assert mlm.fill_mask(sentence, 1)[0][0].piece == word


def test_fill_mask_returns_sorted_probabilities_and_checks_its_input(model, tokenizer):
    first, second = mlm.fill_mask("The [MASK] runs past the [MASK].", 4, model, tokenizer)
    for guesses in (first, second):
        p = [g.probability for g in guesses]
        assert len(p) == 4 and p == sorted(p, reverse=True) and 0 < sum(p) <= 1
    assert model.training
    with pytest.raises(ValueError, match="no \\[MASK\\]"):
        mlm.fill_mask("nothing hidden", model=model, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="reads up to 32"):
        mlm.fill_mask("[MASK] " * 40, model=model, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="both"):
        mlm.fill_mask("[MASK]", model=model)


def test_counting_equals_what_was_reckoned_by_hand(tokenizer):
    vocab = mlm._Vocabulary(4, torch.tensor([1, 1, 1, 1, 1, 0, 0, 0]).bool(), torch.zeros(8).bool(), torch.arange(5, 8))
    counts = mlm.NGram(torch.tensor([[2, 5, 6, 5, 6, 3]]), vocab)
    assert torch.allclose(counts.unigram[5:], torch.tensor([3.0, 3.0, 1.0]) / 7) and counts.unigram[:5].sum() == 0
    unigram, bigram = counts.losses(torch.tensor([5, 5, 7]), torch.tensor([6, 7, 6]))
    assert torch.allclose(unigram.exp(), torch.tensor([7 / 3, 7, 7 / 3]).double())
    # after 5 came 6 twice and nothing else: (2 + 1 * 3/7) / (2 + 1), (0 + 1 * 1/7) / 3; 7 has no follower: unigram
    assert torch.allclose((-bigram).exp(), torch.tensor([17 / 21, 1 / 21, 3 / 7]).double())


def test_score_agrees_with_the_loss_and_restores_the_mode(model, ids, vocab):
    batches = mlm.Masked(ids[:12], vocab, 5, fixed=True)
    scored = mlm.score(model, batches)
    assert model.training
    with torch.no_grad():
        total = sum(mlm.MaskedLM(model)(**b).loss * (b["labels"] != -100).sum() for b in batches)
    assert float(scored.loss.sum()) == pytest.approx(float(total), rel=1e-4)
    flat = ids[:12]
    labels = torch.cat([b["labels"] for b in batches])
    assert torch.equal(scored.previous, flat.roll(1, 1)[labels != -100])
    assert ((scored.rank == 0) <= (scored.loss < math.log(len(vocab.special)))).all()


def test_attention_shares_of_a_uniform_head(model, ids, vocab):
    flat = mlm.small_bert(len(vocab.special), hidden=32, layers=2, heads=2, positions=32)
    for layer in flat.bert.encoder.layer:
        torch.nn.init.zeros_(layer.attention.self.query.weight)
    shares = study.attention_shares(flat, ids[:6], vocab)
    assert shares.shape == (len(study.TARGETS), 6, 2, 2)
    assert torch.allclose(shares[2], torch.full_like(shares[2], 1 / 16), atol=1e-6)
    assert (shares[4] >= 1 / 16 - 1e-6).all()
    assert flat.config._attn_implementation == "sdpa"


def test_a_tokenizer_does_wherever_its_table_does(tokenizer, vocab, ids):
    assert mlm.vocabulary(vocab) is vocab
    assert torch.equal(mlm.NGram(ids, tokenizer).unigram, mlm.NGram(ids, vocab).unigram)
    first, second = (mlm.small_bert(len(tokenizer), hidden=32, layers=1, heads=2, positions=16) for _ in range(2))
    mlm.start_from_counts(first, ids, tokenizer)
    mlm.start_from_counts(second, ids, vocab)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
