"""Chapter 7: byte pairs, the decoder, its cache, sampling, scoring, counting, training."""

import json
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ftbook import causal, results
from ftbook.studies import causal as study

TEXTS = ["the low river flows slowly, the lower one faster; 12 boats, twelve men"] * 3 + [
    "a newer river: no boats! naïve café, \t tabs\nand lines",
    "the widest newest lowest",
]


@pytest.fixture(scope="module")
def tokenizer():
    return causal.train_tokenizer(TEXTS * 5, 300)


@pytest.fixture(scope="module")
def llama():
    """A small model of transformers with random weights, grouped heads and another rotation base."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=300,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=80,
        max_position_embeddings=64,
        rope_parameters={"rope_theta": 5_000.0, "rope_type": "default"},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=0,
        bos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def pair(llama, tokenizer, tmp_path_factory):
    """transformers' model and ours, from one folder."""
    folder = tmp_path_factory.mktemp("llama")
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return llama, causal.load_decoder(folder)


@pytest.fixture
def ids():
    return torch.randint(1, 300, (3, 20), generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- pieces


def words_of(texts, tokenizer):
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    return [word for text in texts for word, _ in split(text)]


def test_byte_pairs_learn_the_merges_that_tokenizers_learns(tokenizer):
    words = Counter(words_of(TEXTS * 5, tokenizer))
    theirs = [tuple(m) for m in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    letters = len({letter for word in words for letter in word})
    assert causal.BytePairs.learn(words, letters + len(theirs)).merges == theirs and len(theirs) > 30


def test_byte_pairs_cut_words_as_tokenizers_does(tokenizer):
    inside = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    pairs = causal.BytePairs(sorted(inside["vocab"], key=inside["vocab"].get), inside["merges"])
    texts = [*TEXTS, "unseen words: quickly, 日本, 🙂"]
    ours = [[i for word in words_of([text], tokenizer) for i in pairs.encode(word)] for text in texts]
    assert ours == causal.encode(texts, tokenizer)
    assert [tokenizer.decode(ids) for ids in ours] == texts


def test_learning_stops_where_no_pair_is_left():
    pairs = causal.BytePairs.learn(Counter({"ab": 2}), size=100)
    assert pairs.symbols == ["a", "b", "ab"] and pairs.encode("abab") == [2, 2]
    with pytest.raises(ValueError, match="not in the alphabet"):
        pairs.encode("c")


def test_packing_joins_documents_and_shares_one_piece_between_rows():
    rows = causal.pack([[5, 6, 7], [8]], end=0, length=2)
    assert rows.tolist() == [[0, 5, 6], [6, 7, 0]] and rows.dtype == torch.int32
    with pytest.raises(ValueError, match="do not fill one row"):
        causal.pack([[5]], end=0, length=2)


def test_a_single_string_and_a_thing_that_is_no_tokenizer_are_refused(tokenizer):
    for function in (lambda: causal.encode("text", tokenizer), lambda: causal.train_tokenizer("text")):
        with pytest.raises(TypeError, match="one str"):
            function()
    with pytest.raises(TypeError, match="a transformers tokenizer is needed, not object"):
        causal.encode(["text"], object())
    with pytest.raises(ValueError, match="257"):
        causal.train_tokenizer(TEXTS, 200)


def test_a_lone_surrogate_is_replaced_before_a_tokenizer_sees_it(tokenizer):
    assert causal.encode(["a\ud800b"], tokenizer) == causal.encode(["a\ufffdb"], tokenizer)


# ---------------------------------------------------------------- the network


def test_the_decoder_gives_the_logits_of_transformers_and_its_gradients(pair, ids):
    peer, ours = pair
    mine, wanted = ours(ids), peer(ids).logits
    assert wanted.std() > 0.5 and (mine - wanted).abs().max() < 1e-4
    loss = F.cross_entropy(mine[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    theirs = peer(ids, labels=ids).loss
    assert torch.allclose(loss, theirs, atol=1e-5)
    names = [name for name, _ in ours.named_parameters()]
    given = torch.autograd.grad(loss, list(ours.parameters()))
    found = dict(peer.named_parameters())
    wanted = torch.autograd.grad(theirs, [found[f"model.{name}"] for name in names])
    for name, a, b in zip(names, given, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-4), name


def test_logits_are_computed_only_where_they_are_asked_for(pair, ids):
    _, ours = pair
    everywhere = ours(ids)
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    assert torch.allclose(ours(ids, mask), everywhere[mask], atol=1e-5)
    assert torch.allclose(ours(ids, (slice(None), -1)), everywhere[:, -1], atol=1e-5)


def test_no_position_sees_those_to_its_right(pair, ids):
    _, ours = pair
    other = ids.clone()
    other[:, 12:] = 7
    assert torch.allclose(ours(ids)[:, :12], ours(other)[:, :12], atol=1e-5)
    assert not torch.allclose(ours(ids)[:, 12:], ours(other)[:, 12:], atol=1e-2)


def test_a_turned_product_depends_on_the_distance_alone():
    draws = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 8, generator=draws, dtype=torch.float64)
    omega = 100.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)

    def product(a, b):
        q_, k_ = (causal.rotate(x, (p * omega).cos()[None], (p * omega).sin()[None]) for x, p in ((q, a), (k, b)))
        return (q_ * k_).sum()

    assert torch.isclose(product(9, 4), product(59, 54)) and not torch.isclose(product(9, 4), product(9, 3))


def test_sizes_count_their_weights_and_refuse_what_cannot_be_built():
    sizes = causal.Sizes(vocab=90, width=24, layers=3, heads=6, kv_heads=3, hidden=40)
    model = causal.Decoder(sizes)
    assert sizes.parameters == sum(p.numel() for p in model.parameters())
    with pytest.raises(ValueError, match="even number of dimensions"):
        causal.Sizes(vocab=90, width=20, heads=4)
    with pytest.raises(ValueError, match="cannot share 3"):
        causal.Sizes(vocab=90, width=16, heads=4, kv_heads=3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.empty(1, 0, dtype=torch.long), "at least one piece, for an empty prompt"),
        (torch.zeros(5, dtype=torch.long), r"give \(B, T\)"),
        (torch.zeros(1, 65, dtype=torch.long), "65 pieces, the context holds 64: cut the text on the left"),
        (torch.tensor([[300]]), "piece 300 of a model with 300 pieces: these ids come from another tokenizer"),
        (torch.tensor([[-100, 5]]), "piece -100: pieces are numbered from 0 on"),
    ],
)
def test_what_a_decoder_cannot_read_is_refused_in_words(pair, wrong, message):
    with pytest.raises(ValueError, match=message):
        pair[1](wrong)


def test_a_model_of_another_kind_is_refused(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "'yarn'"),
        ({"num_hidden_layers": 4}, "weights that do not fit"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            causal.load_decoder(tmp_path)


def test_a_saved_decoder_is_read_by_us_and_by_transformers(tokenizer, ids, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = causal.Decoder(causal.Sizes(vocab=300, width=32, layers=2, theta=700.0), seed=2).eval()
    causal.save_decoder(model, tokenizer, tmp_path, dtype=torch.float32)
    ours, peer = causal.load_decoder(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert ours.sizes == model.sizes and torch.equal(ours(ids), model(ids))
    assert torch.allclose(peer(ids).logits, model(ids), atol=1e-5)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert causal.encode(TEXTS, again) == causal.encode(TEXTS, tokenizer)


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("cuts", [[20], [1] * 20, [7, 1, 1, 11]])
def test_with_a_cache_the_logits_are_those_of_one_reading(pair, ids, cuts):
    _, ours = pair
    cache = causal.Cache()
    parts = [ours(part, cache=cache) for part in ids.split(cuts, 1)]
    assert cache.length == 20 and torch.allclose(torch.cat(parts, 1), ours(ids), atol=1e-4)


def test_a_cache_that_is_full_is_refused(pair, ids):
    _, ours = pair
    cache = causal.Cache()
    ours(torch.zeros(1, 60, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="65 pieces"):
        ours(torch.zeros(1, 5, dtype=torch.long), cache=cache)


def test_greedy_text_is_that_of_transformers_with_and_without_a_cache(pair, ids):
    peer, ours = pair
    wanted = peer.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=15, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    for cached in (True, False):
        assert torch.equal(causal.generate(ours, ids, 15, temperature=0, cached=cached), wanted)


def test_a_text_ends_with_the_stop_piece_and_others_go_on(pair, ids):
    _, ours = pair
    free = causal.generate(ours, ids, 10, temperature=0)[:, 20:]
    stop = int(free[0, 2])
    given = causal.generate(ours, ids, 10, temperature=0, stop=stop)[:, 20:]
    for row, before in zip(given.tolist(), free.tolist(), strict=True):
        end = before.index(stop) + 1 if stop in before else len(row)
        assert row[:end] == before[:end] and set(row[end:]) <= {stop}


def test_the_same_seed_writes_the_same_and_another_seed_another_text(pair, ids):
    texts = [causal.generate(pair[1], ids, 10, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    with pytest.raises(ValueError, match="the context holds 64"):
        causal.generate(pair[1], ids, 60)


LOGITS = 3 * torch.randn(4, 300, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    ("warper", "value", "how"),
    [
        ("TemperatureLogitsWarper", 0.6, "temperature"),
        ("TopKLogitsWarper", 12, "top_k"),
        ("TopPLogitsWarper", 0.85, "top_p"),
        ("MinPLogitsWarper", 0.07, "min_p"),
        ("RepetitionPenaltyLogitsProcessor", 1.4, "repetition_penalty"),
    ],
)
def test_each_way_of_sampling_has_the_distribution_of_transformers(warper, value, how, ids):
    import transformers

    seen = torch.cat((ids, ids[:1]))
    wanted = getattr(transformers, warper)(value)(seen, LOGITS.clone()).softmax(-1)
    given = causal.next_probabilities(LOGITS, seen=seen, **{how: value})
    assert torch.allclose(given, wanted, atol=1e-6) and torch.allclose(given.sum(-1), torch.ones(4))


def test_what_is_drawn_follows_the_distribution():
    from scipy.stats import chisquare

    p = causal.next_probabilities(LOGITS[:1, :30], temperature=1.5, top_p=0.9)[0]
    drawn = torch.multinomial(p, 20_000, replacement=True, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=30).double().numpy()
    kept = (p > 0).numpy()
    assert counts[~kept].sum() == 0
    expected = p.double().numpy()[kept]
    assert chisquare(counts[kept], 20_000 * expected / expected.sum()).pvalue > 1e-3


def test_temperature_zero_takes_the_largest_and_more_than_all_pieces_is_all():
    p = causal.next_probabilities(LOGITS, temperature=0)
    assert torch.equal(p.argmax(-1), LOGITS.argmax(-1)) and (p.max(-1).values == 1).all()
    assert torch.allclose(causal.next_probabilities(LOGITS, top_k=10_000), LOGITS.softmax(-1))


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0 and finite, got -1.0"),
        ({"temperature": math.nan}, "temperature must be at least 0 and finite"),
        ({"top_k": 0}, "top_k must be an integer >= 1, got 0"),
        ({"top_p": 0.0}, "top_p=0.0, min_p=0.0: give shares"),
        ({"min_p": 2.0}, "top_p=1.0, min_p=2.0: give shares"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive"),
    ],
)
def test_a_way_of_sampling_that_leaves_nothing_to_draw_is_refused(pair, ids, how, told):
    with pytest.raises(ValueError, match=told):
        causal.next_probabilities(LOGITS, **how)
    with pytest.raises(ValueError, match=told):
        causal.generate(pair[1], ids, 2, **how)


# ---------------------------------------------------------------- scoring


def scored_by_hand(model, pieces, window, stride):
    """Each piece once, in the first window that holds it, one window at a time."""
    out, new, low, text = [], 0, 0, [0, *pieces]
    while new < len(pieces):
        high = min(low + window, len(pieces))
        logp = model(torch.tensor([text[low:high]]))[0].log_softmax(-1)
        out += [-logp[i - low, pieces[i]].item() for i in range(new, high)]
        low, new = low + stride, high
    return out


@pytest.mark.parametrize(("window", "stride"), [(64, 32), (16, 16), (16, 5), (10, 1)])
def test_windows_score_every_piece_once_as_by_hand(pair, window, stride):
    _, ours = pair
    draws = np.random.default_rng(0)
    documents = [draws.integers(1, 300, n).tolist() for n in (1, 9, 16, 17, 50, 90)]
    given = causal.losses(ours, documents, 0, window=window, stride=stride, batch_size=3)
    for pieces, found in zip(documents, given, strict=True):
        assert np.allclose(found, scored_by_hand(ours, pieces, window, stride), atol=1e-4)


def test_the_mode_of_a_model_survives_scoring_and_wrong_windows_are_refused(pair):
    model = causal.Decoder(causal.Sizes(vocab=50, width=16, layers=1)).train()
    causal.losses(model, [[1, 2, 3], []], 0)
    assert model.training
    for window, stride in ((65, 10), (10, 11), (10, 0)):
        with pytest.raises(ValueError, match="0 < stride <= window <= 64"):
            causal.losses(pair[1], [[1, 2]], 0, window=window, stride=stride)


def kneser_ney_by_hand(stream, order, vocab):
    """Probability of a piece after a context, straight from the definition."""

    def counts(n):
        grams = [tuple(stream[i : i + n]) for i in range(len(stream) - n + 1)]
        if n == order:
            return Counter(grams)
        longer = {tuple(stream[i : i + n + 1]) for i in range(len(stream) - n)}
        return Counter(g[1:] for g in longer)

    tables = {n: counts(n) for n in range(1, order + 1)}

    def p(piece, context):
        n = len(context) + 1
        table = tables[n]
        after = {g: c for g, c in table.items() if g[:-1] == context}
        total = sum(after.values())
        if n == 1:
            return (table[(piece,)] + 1) / (total + vocab)
        once, twice = (sum(c == k for c in table.values()) for k in (1, 2))
        discount = once / (once + 2 * twice) if once else 0.5
        lower = p(piece, context[1:])
        if not total:
            return lower
        kept = max(table[(*context, piece)] - discount, 0)
        return (kept + discount * len(after) * lower) / total

    return p


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_kneser_ney_is_its_definition_and_sums_to_one(order):
    draws = np.random.default_rng(1)
    stream = draws.integers(0, 6, 300).tolist()
    model, p = causal.KneserNey(stream, order, 6), kneser_ney_by_hand(stream, order, 6)
    new = draws.integers(0, 6, 40).tolist()
    given = model.losses(new)
    for i in range(order - 1, 40):
        assert math.isclose(given[i], -math.log(p(new[i], tuple(new[i - order + 1 : i]))), rel_tol=1e-9)
    context = new[: order - 1]
    chances = [math.exp(-model.losses([*context, x])[-1]) for x in range(6)]
    assert math.isclose(sum(chances), 1)


def test_longer_contexts_help_counting_where_the_text_has_order():
    stream = [0, 1, 2, 3] * 50 + [0, 2, 1, 3] * 50
    paid = [causal.KneserNey(stream, n, 5).losses(stream[:100]).mean() for n in (1, 2, 3)]
    assert paid[0] > paid[1] > paid[2]
    with pytest.raises(ValueError, match="order=0"):
        causal.KneserNey(stream, 0, 5)
    with pytest.raises(ValueError, match="order=3 on 2 pieces"):
        causal.KneserNey([1, 2], 3, 5)


def test_pieces_of_another_tokenizer_and_counts_below_one_are_refused(pair):
    for refused in (
        lambda: causal.KneserNey([0, 5, 1], 2, 3),
        lambda: causal.KneserNey([0, 1, 2, 0], 2, 5).losses([0, 5]),
        lambda: causal.losses(pair[1], [[1, 300]], 0),
    ):
        with pytest.raises(ValueError, match="these ids come from another tokenizer"):
            refused()
    with pytest.raises(ValueError, match="length must be an integer >= 1"):
        causal.pack([[1, 2]], 0, 0)
    with pytest.raises(ValueError, match="new must be an integer >= 1, got -1"):
        causal.generate(pair[1], torch.tensor([[1]]), -1)
    for ids in ([[1]], torch.tensor([[1.0]])):
        with pytest.raises(TypeError, match="give a tensor of integers"):
            pair[1](ids)
    with pytest.raises(ValueError, match="pieces must be an integer >= 1"):
        causal.pretrain(pair[1], torch.zeros(2, 9, dtype=torch.long), pieces=0)
    for wrong in ({"batch_size": 0}, {"rows_of_history": 0}):
        with pytest.raises(ValueError, match=f"{[*wrong][0]} must be an integer >= 1"):
            causal.pretrain(pair[1], torch.zeros(2, 9, dtype=torch.long), pieces=9, **wrong)
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1"):
        causal.losses(pair[1], [[1]], 0, batch_size=0)
    with pytest.raises(TypeError, match="float64; give whole numbers"):
        causal.KneserNey([0.5, 1, 2, 0], 2, 3)
    with pytest.raises(ValueError, match="heads must be an integer >= 1"):
        causal.Sizes(vocab=5, heads=0)


def test_a_tokenizer_with_more_pieces_than_the_model_is_not_saved_with_it(tokenizer, tmp_path):
    model = causal.Decoder(causal.Sizes(vocab=20, width=16, layers=1))
    with pytest.raises(ValueError, match=f"the model has 20 pieces, the tokenizer {len(tokenizer)}"):
        causal.save_decoder(model, tokenizer, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_counting_a_text_given_twice_leaves_every_piece_a_chance():
    rng = np.random.default_rng(0)
    once = rng.integers(0, 9, 60).tolist()
    model = causal.KneserNey(once * 2 + [once[0]], 3, 9)
    assert np.isfinite(model.losses(rng.integers(0, 9, 200))).all()
    chances = [math.exp(-model.losses([*once[:2], x])[-1]) for x in range(9)]
    assert math.isclose(sum(chances), 1) and min(chances) > 0


# ---------------------------------------------------------------- training


def test_training_reaches_the_entropy_of_a_toy_language_and_is_repeatable():
    rows = torch.tensor([[0, 1, 2], [0, 1, 3]] * 8)
    sizes = causal.Sizes(vocab=4, width=16, layers=1, hidden=32, context=2)
    models = [causal.Decoder(sizes, seed=3) for _ in range(2)]
    histories = [causal.pretrain(m, rows, rows, pieces=2_400, lr=0.02, seed=1) for m in models]
    assert abs(histories[0]["valid_loss"][-1] - math.log(2) / 2) < 0.01
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a, b)


def test_an_epoch_goes_on_where_the_last_one_ended_and_every_row_is_read_once_a_turn():
    stream = causal._Stream(torch.arange(30).reshape(10, 3), batch_size=4, steps=5, seed=0)
    first = torch.cat([x[:, 0] for x, _ in stream])
    stream.set_epoch(1)
    second = torch.cat([x[:, 0] for x, _ in stream])
    assert sorted(first[:10].tolist()) == sorted(first[10:].tolist()) == list(range(0, 30, 3))
    assert sorted(second[:10].tolist()) == list(range(0, 30, 3)) and not torch.equal(first, second)
    for x, y in stream:
        assert torch.equal(x[:, 1:], y[:, :-1])


# ---------------------------------------------------------------- the study


def test_attention_maps_are_weights_over_the_past(pair, ids):
    maps = study.attention_maps(pair[1], ids[:1])
    assert maps.shape == (3, 6, 20, 20) and torch.allclose(maps.sum(-1), torch.ones(3, 6, 20), atol=1e-5)
    assert maps.triu(1).abs().max() == 0
    peer = pair[0]
    peer.set_attn_implementation("eager")
    wanted = torch.cat(peer(ids[:1], output_attentions=True).attentions)
    peer.set_attn_implementation("sdpa")
    assert torch.allclose(maps, wanted, atol=1e-4)


def test_near_duplicates_are_found_and_others_are_not():
    draws = np.random.default_rng(0)
    words = [f"w{i}" for i in range(500)]
    texts = [" ".join(draws.choice(words, 60)) for _ in range(30)]
    texts[20] = texts[4] + " and some more words"
    found = study.near_duplicates(texts)
    assert [pair[:2] for pair in found] == [(4, 20)] and found[0][2] > 0.8
    assert study.near_duplicates(["", "one two"]) == []


def test_the_law_is_found_again_from_points_that_follow_it():
    n, d = (x.ravel() for x in np.meshgrid([0.1, 0.3, 1.0], [0.1, 0.4, 1.6, 6.4]))
    true = np.array([0.9, 0.6, 0.35, 0.5, 0.45])
    theta = study.fit_law(n, d, study.law(true, n, d))
    assert np.allclose(study.law(theta, 3.0, 20.0), study.law(true, 3.0, 20.0), rtol=0.01)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_run_of_each_kind_scores_every_held_out_article(split):
    for row in ({"model": "2-gram", "order": 2}, {"model": "small GPT", "lr": 1e-2}):
        bits, size = study.run(0, split, **row)["bits_per_byte"]
        assert bits.shape == size.shape and len(bits) > 1 and (bits > 0).all()
        assert 0.5 < bits.sum() / size.sum() < 9
    for text in study.TEXTS:
        found = study.run_text(0, split, text)
        assert set(found) == {"all", "sport", "the rest"}


def test_the_rows_are_well_formed(monkeypatch, tmp_path):
    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path))

    def run(seed, split, model, order=0, lr=0.0):
        bits = np.full(6, 2.0 - order / 10 + lr) + seed / 100
        return {"bits_per_byte": (bits, np.ones(6))}

    monkeypatch.setattr(study, "run", run)
    study.main("models")
    found = results.load_study(study.CHAPTER, "models")
    models = [row["model"] for row in found.rows("bits_per_byte")]
    assert models == [*(f"{n}-gram" for n in range(1, 6)), "small GPT", "SmolLM2-135M"]
    assert found.row("bits_per_byte", model="small GPT")["lr"] == min(study.RATES)


def test_rules_for_texts_tell_sport_and_prose():
    assert study.sport("The team won the league cup.") and not study.sport("A river of one.")
    assert study.tidy("A sentence.\nAnother one.") and not study.tidy("1 2 3\n4 5 6") and not study.tidy("a\nb\nc.")


# ---------------------------------------------------------------- the exercises


def test_exercises_accept_the_solutions_of_the_page_and_say_what_is_off(root, capsys):
    from ftbook.exercises import causal as check

    nb = json.loads((root / "nbs" / "07_causal.ipynb").read_text(encoding="utf-8"))
    page = "\n".join("".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "markdown")
    names: dict = {"torch": torch, "math": math}
    for code in re.findall(r"<details><summary>Solution \d</summary>\n\n```python\n(.*?)```", page, flags=re.S):
        exec(code, names)
    assert check.bits(0.9 / (4.1 * math.log(2))) and check.cache_bytes(names["answer"])
    assert check.merge(names["merge"]) and check.top_p(names["typical"]) and check.prefix(names["scores"])
    assert capsys.readouterr().out == "correct\n" * 5
    wrong = [
        check.bits(None),
        check.bits(0.9 / 4.1),
        check.cache_bytes(30 * 3 * 64 * 1_000 * 2),
        check.cache_bytes(30 * 2 * 9 * 64 * 1_000 * 2),
        check.merge(None),
        check.merge(lambda parts, pair: parts),
        check.top_p(lambda z, p: z.softmax(-1)),
        check.top_p(lambda z, p: causal.next_probabilities(z, top_p=p / 2)),
        check.prefix(lambda model, prompt, options: [0.0, 0.0, 0.0]),
    ]
    told = capsys.readouterr().out.splitlines()
    assert not any(wrong) and len(told) == 9 and all(line.startswith("not yet: ") for line in told)
    assert told[1].endswith("those are nats") and "which heads" in told[3] and "less than the share" in told[7]
