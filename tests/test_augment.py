"""Chapter 16's library: parity with torchvision, one draw per image, labels that follow, runs through fit."""

import copy
import json
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torchvision.transforms import v2

from ftbook import augment as au
from ftbook import data, images, mlm, models, results
from ftbook.models import SmallCNN
from ftbook.scoring import accuracy
from ftbook.studies import augment as study
from ftbook.tags import spans, to_iob2
from ftbook.texts import TextClassifier, encode_texts
from ftbook.train import Settings, fit

X = torch.rand(16, 3, 12, 10, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 5


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", ["MixUp", "CutMix"])
@pytest.mark.parametrize("seed", range(5))
def test_mixing_equals_torchvision(kind, seed):
    reference = getattr(v2, kind)(num_classes=5)
    torch.manual_seed(seed)
    want_x, want_y = reference(X, Y)
    torch.manual_seed(seed)
    drawn = reference.make_params([X])
    previous = torch.arange(16).roll(1)
    if kind == "MixUp":
        x, y = au.MixUp(5).mix(X, Y, drawn["lam"], previous)
    else:
        x, y = au.CutMix(5).paste(X, Y, torch.tensor(drawn["box"]), previous)
    torch.testing.assert_close(x, want_x, atol=1e-6, rtol=0)
    torch.testing.assert_close(y, want_y, atol=1e-6, rtol=0)


@given(b=st.floats(0, 2), c=st.floats(0, 2), s=st.floats(0, 2))
@settings(max_examples=20, deadline=None)
def test_color_equals_torchvision(b, c, s):
    f = v2.functional
    want = f.adjust_saturation(f.adjust_contrast(f.adjust_brightness(X, b), c), s)
    ours = images.adjust_color(X, *(torch.full((16,), v) for v in (b, c, s)))
    torch.testing.assert_close(ours, want, atol=2e-6, rtol=0)


def test_gray_images_keep_their_saturation():
    one, x = torch.ones(4), torch.rand(4, 1, 5, 5)
    torch.testing.assert_close(images.adjust_color(x, one, one, 0 * one), x)


@pytest.mark.parametrize("name", [n for n in au.STRENGTHS if n not in ("none", "flip", "upside down")])
def test_every_image_has_its_own_draw(name):
    same = X[:1].expand(16, -1, -1, -1).contiguous()
    transform = au.policy(name, 5)
    if transform.takes_target:
        x, y = transform(X, Y)
        assert y.shape == (16, 5) and torch.allclose(y.sum(1), torch.ones(16))
        assert len({tuple(row) for row in y.round(decimals=4).tolist()}) > 4
    else:
        x = transform(same)
        assert len({row.numpy().tobytes() for row in x}) > 4
    assert x.shape == X.shape and x.dtype == X.dtype and x.min() >= 0 and x.max() <= 1


def test_flip_crop_and_zoom():
    assert torch.equal(au.random_flip(X, 1.0, -2), v2.functional.vertical_flip(X))
    assert torch.equal(au.random_flip(X, 0.0), X) and torch.equal(au.random_crop(X, 0), X)
    share = (
        (au.random_flip(torch.arange(4.0).view(1, 1, 1, 4).expand(4000, -1, -1, -1))[:, 0, 0, 0] == 3).float().mean()
    )
    assert abs(share - 0.5) < 0.04
    windows = F.pad(X, [2] * 4).unfold(2, 12, 1).unfold(3, 10, 1).reshape(16, 3, 25, 12, 10)
    shifted = au.random_crop(X, 2)
    assert all((windows[i] == shifted[i][:, None]).all(0).all(-1).all(-1).any() for i in range(16))
    torch.testing.assert_close(au.random_resized_crop(X, (1.0, 1.0)), X)
    uint8 = (255 * X).to(torch.uint8)
    assert au.random_crop(uint8).dtype == torch.uint8 and au.random_flip(uint8).dtype == torch.uint8


def test_erasing_keeps_to_its_area_and_probability():
    ones = torch.ones(4000, 1, 20, 20)
    erased = (au.random_erasing(ones, p=0.3, area=(0.1, 0.2)) == 0).float().mean((1, 2, 3))
    assert abs((erased > 0).float().mean() - 0.3) < 0.04
    assert 0.05 < erased[erased > 0].min() and erased.max() < 0.25


def test_boxes_share_and_bounds():
    lam = torch.rand(500)
    boxes = au._draw_boxes(lam, 12, 10)
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 10 and boxes[:, 3].max() <= 12
    assert (au._box_mask(boxes, 12, 10).float().mean((1, 2, 3)) <= 1 - lam + 1e-6).all()


def test_soft_labels_and_accuracy():
    soft = torch.eye(5)[Y]
    x, y = au.MixUp(5).mix(X, soft, torch.full((16,), 0.5), torch.arange(16))
    torch.testing.assert_close(x, X)
    torch.testing.assert_close(y, soft)
    assert accuracy(soft, Y) == accuracy(soft, soft) == 1.0
    whole = au.MixUp(5, per_image=False)(X, Y)[1]
    assert len(whole.max(1).values.round(decimals=4).unique()) <= 2


def test_a_policy_joins_changes_and_groups_get_their_own_draws():
    x, y = au.policy("flip + mixup", 5)(X, Y)
    assert y.shape == (16, 5) and torch.equal(au.policy("none")(X), X)
    calls = []
    au.Grouped(lambda part: calls.append(len(part)) or part, 4)(X)
    au.Grouped(lambda part: calls.append(len(part)) or part)(X)
    assert calls == [4] * 4 + [1] * 16
    assert au.policy("randaugment")(X).shape == X.shape


@pytest.mark.parametrize(
    "call",
    [
        lambda: au.random_flip(X[0]),
        lambda: au.random_flip([1]),
        lambda: au.random_crop(X, -1),
        lambda: au.random_resized_crop(X, (0.0, 1.0)),
        lambda: au.MixUp(5, 0),
        lambda: au.Grouped(abs, 0),
        lambda: au._Operations(1, 31),
        lambda: au.eda("a film", 0.0),
        lambda: au.eda("a film", how=["translate"]),
        lambda: au.policy("sharpen"),
        lambda: au.text_policy("synonyms", None, None),
        lambda: au._WordSwap(None, 2),
        lambda: au._mix_labels(torch.tensor([3]), torch.tensor([0]), torch.tensor(1.0), 3),
        lambda: au.augment_tagged(["a"], ["O"], "shuffle"),
        lambda: au.augment_tagged(["a"], [], "swap"),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError):
        call()


def test_fit_takes_soft_targets():
    few = data.load("digits", "train").split([200, 200], seed=0)[0]
    model = SmallCNN(10, (1, 8))
    history = fit(
        model,
        few,
        epochs=3,
        lr=1e-2,
        metrics="accuracy",
        settings=Settings(transform=au.MixUp(10), progress=False),
    )
    assert history["train_loss"][-1] < history["train_loss"][0]


@pytest.mark.parametrize("kind", [au.MixUp, au.CutMix])
def test_an_untrained_net_of_ten_classes_is_right_in_one_of_ten_also_on_mixed_labels(kind):
    x, y = torch.rand(1000, 1, 4, 4), torch.arange(1000) % 10
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 10))
    how = Settings(transform=kind(10), weight_decay=0.0, progress=False)
    history = fit(net, (x, y), lr=0.0, metrics="accuracy", settings=how)
    assert abs(history["train_accuracy"][0] - 0.1) < 0.04


@pytest.mark.parametrize("label", [-100, -1, 10])
def test_labels_that_no_class_has_cannot_be_mixed(label):
    with pytest.raises(ValueError, match=f"label {label} is out of range for n_classes=10"):
        au.MixUp(10)(torch.rand(2, 1, 2, 2), torch.tensor([0, label]))


def test_the_judge_sees_flips_and_puts_the_stream_back():
    digits = data.load("digits", "train")
    torch.manual_seed(0)
    net = SmallCNN(10, (1, 16, 32))
    fit(net, digits, epochs=6, lr=1e-2, settings=Settings(progress=False))
    state = torch.get_rng_state()
    before, after = au.changed_predictions(net, digits, au.policy("flip", strength=1.0))
    assert torch.equal(state, torch.get_rng_state()) and (before != after).float().mean() > 0.2
    same = au.changed_predictions(net, digits, au.policy("none"))
    assert torch.equal(*same) and au.changed_predictions(net, digits, au.policy("mixup"))[0].shape == same[0].shape
    wrong = data.ImageSet(digits.x, (digits.y + 1) % 10, digits.classes)
    with pytest.raises(ValueError, match="no image right"):
        au.changed_predictions(_Fixed(), wrong[wrong.y != 3], au.policy("none"))


class _Fixed(torch.nn.Module):
    def forward(self, x):
        return F.one_hot(torch.full((len(x),), 3), 10).float()


@pytest.fixture(scope="module")
def bert():
    body, tokenizer = models.load("bert_mini_en")
    return {"body": body, "tokenizer": tokenizer, "vocab": mlm.vocabulary(tokenizer)}


TEXTS = ["an unpretentious film about friendship", "dull", "never boring , and quite charming from start to end"]


def words(batch, tokenizer):
    rows = (
        tokenizer.convert_ids_to_tokens(i[m == 1].tolist())
        for i, m in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    )
    return [" ".join(r[1:-1]).replace(" ##", "").split() for r in rows]


def test_words_are_swapped_dropped_and_hidden_whole(bert):
    batch = encode_texts(TEXTS, bert["tokenizer"])
    number = au._word_numbers(batch, bert["vocab"])
    assert (number.max(1).values + 1).tolist() == [len(t.split()) for t in TEXTS]
    plain = words(batch, bert["tokenizer"])
    swap = words(au._WordSwap(bert["vocab"], 1.0)(batch), bert["tokenizer"])
    assert all(sorted(a) == sorted(b) for a, b in zip(plain, swap, strict=True)) and swap[2] != plain[2]
    for a, b in zip(plain, swap, strict=True):
        assert all(abs(a.index(w) - i) <= 1 for i, w in enumerate(b) if a.count(w) == 1)
    dropped = words(au._WordDropout(bert["vocab"], 0.5)(batch), bert["tokenizer"])
    assert all(set(b) <= set(a) and b for a, b in zip(plain, dropped, strict=True))
    assert words(au._WordDropout(bert["vocab"], 1.0)(batch), bert["tokenizer"]) == plain
    hidden = au._WordMasking(bert["vocab"], 1.0)(batch)["input_ids"]
    assert ((hidden == bert["vocab"].mask_id) == (number >= 0)).all()
    for change in (au._WordSwap, au._WordDropout, au._WordMasking):
        same = change(bert["vocab"], 0.0)(batch)
        assert torch.equal(same["input_ids"], batch["input_ids"])


def test_pieces_of_a_word_stay_together(bert):
    batch = encode_texts(TEXTS * 20, bert["tokenizer"])
    vocab = bert["vocab"]
    for change in (au._WordSwap(vocab, 0.5), au._WordDropout(vocab, 0.5)):
        out = change(batch)
        number = au._word_numbers(out, vocab)
        pieces = [
            [tuple(i[n == k].tolist()) for k in range(int(n.max()) + 1)]
            for i, n in zip(out["input_ids"], number, strict=True)
        ]
        known = au._word_numbers(batch, vocab)
        for row, found in enumerate(pieces):
            whole = {tuple(batch["input_ids"][row][known[row] == k].tolist()) for k in range(int(known[row].max()) + 1)}
            assert set(found) <= whole


@pytest.mark.parametrize("method", au._TEXT_STRENGTHS)
def test_fit_takes_every_change_of_sentences(bert, method):
    model = TextClassifier(copy.deepcopy(bert["body"]), 2)
    batch = {**encode_texts(TEXTS, bert["tokenizer"]), "labels": torch.tensor([1, 0, 1])}
    change = au.text_policy(method, bert["vocab"], model)
    history = fit(model, batch, epochs=2, batch_size=3, settings=Settings(transform=change, progress=False))
    assert all(math.isfinite(v) for v in history["train_loss"])


def test_classifier_ignores_what_is_hidden(bert):
    net = TextClassifier(bert["body"]).eval()
    batch = encode_texts(TEXTS, bert["tokenizer"])
    alone = encode_texts(TEXTS[1:2], bert["tokenizer"])
    torch.testing.assert_close(net(**batch)[1:2], net(**alone), atol=1e-4, rtol=1e-4)


TAGS = st.lists(st.sampled_from(["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]), max_size=12)


def orphans(tags):
    return len(to_iob2(tags, "IOB2")[1])


@given(tags=TAGS, seed=st.integers(0, 99), how=st.sampled_from(["swap", "delete", "crop"]))
@settings(max_examples=200, deadline=None)
def test_whole_mentions_survive(tags, seed, how):
    while orphans(tags):
        tags = [t if not (t[0] == "I" and (not i or tags[i - 1][1:] != t[1:])) else "O" for i, t in enumerate(tags)]
    text = [f"w{i}" for i in range(len(tags))]
    new, new_tags = au.augment_tagged(text, tags, how, 0.5, random.Random(seed))
    assert orphans(new_tags) == 0 and len(new) == len(new_tags)
    before = {(k, tuple(text[a:b])) for k, a, b in spans(tags, strict=True)}
    after = {(k, tuple(new[a:b])) for k, a, b in spans(new_tags, strict=True)}
    assert after <= before and (how == "crop" or after == before)
    assert all(tags[int(w[1:])] == t for w, t in zip(new, new_tags, strict=True))


def test_word_by_word_breaks_labels():
    rng = random.Random(0)
    broken = sum(
        orphans(au.augment_tagged(["New", "York", "x"], ["B-LOC", "I-LOC", "O"], how, 0.5, rng, False)[1])
        for how in ("swap", "delete", "crop")
        for _ in range(50)
    )
    assert broken > 20


def test_replacing_mentions():
    sentences = [(["in", "New", "York", "with", "Ann"], ["O", "B-LOC", "I-LOC", "O", "B-PER"]), (["Oslo"], ["B-LOC"])]
    table = au.mention_table(sentences)
    assert table == {"LOC": [("New", "York"), ("Oslo",)], "PER": [("Ann",)]}
    rng = random.Random(0)
    for _ in range(20):
        new, tags = au.replace_mentions(*sentences[0], table, 1.0, rng)
        assert [k for k, *_ in spans(tags, strict=True)] == ["LOC", "PER"] and orphans(tags) == 0
        assert len(new) == len(tags) and new[0] == "in" and new[-1] == "Ann"
    assert au.replace_mentions(*sentences[0], {}, 1.0) == tuple(map(list, sentences[0]))


def test_trivial_and_rand_augment_equal_torchvision_on_the_same_draws():
    eight_bit = (X * 255).round() / 255
    for seed in range(200):
        one, wide = eight_bit[seed % 16][None], seed % 2 == 0
        reference = v2.TrivialAugmentWide() if wide else v2.RandAugment(num_ops=1, magnitude=21)
        torch.manual_seed(seed)
        want = reference(one)
        torch.manual_seed(seed)
        which = torch.randint(len(au._REACH), (1,))
        name = list(au._REACH)[which]
        first, narrow, last = au._REACH[name]
        size = {"TranslateX": 10, "TranslateY": 12}.get(name, 1)
        last = last if wide else narrow * size
        m = torch.zeros(1)
        if first != last:
            step = torch.randint(31, ()) if wide else torch.tensor(21)
            m = torch.linspace(first, last, 31)[step].view(1)
            if first == 0 and torch.rand(()) <= 0.5:
                m = -m
        torch.testing.assert_close(au._Operations().change(one, which, m), want, msg=name)


def test_magnitudes_are_drawn_out_of_their_ranges_and_go_both_ways():
    x = torch.rand(4000, 1, 6, 4)
    for transform, column in ((au._Operations(), 2), (au._Operations(2, 30), 1)):
        which, m = transform.draw(x)
        assert which.unique().numel() == len(au._REACH)
        for k, (name, reach) in enumerate(au._REACH.items()):
            size = {"TranslateX": 4, "TranslateY": 6}.get(name, 1) if column == 1 else 1
            ends = sorted((reach[0], reach[column] * size))
            low, high = m[which == k].min(), m[which == k].max()
            assert low >= (-ends[1] if reach[0] == 0 else ends[0]) - 1e-5 and high <= ends[1] + 1e-5, name
            assert reach[0] != 0 or ends[1] == 0 or (low < 0 < high), name


def test_the_last_of_several_changes_takes_the_strength():
    torch.manual_seed(0)
    strong = au.policy("flip + crop", strength=0.0)(X)
    torch.manual_seed(0)
    assert torch.equal(strong, au.random_flip(X, 0.5))


SENTENCE = "a charming and unpretentious little film about friendship"


@pytest.mark.parametrize("kind", au._EDITS)
def test_eda_changes_as_many_words_as_it_says(kind):
    plain = SENTENCE.split()
    table = {"film": ("movie",), "charming": ("delightful",), "little": ("small",), "and": ("plus",)}
    made = au.eda(SENTENCE, 0.25, 30, [kind], table, random.Random(0))
    assert len(made) == 30 and len(set(made)) > 1
    new = {"movie", "delightful", "small"}
    for text in made:
        found = text.split()
        if kind == "synonyms":
            assert len(found) == 8 and sum(a != b for a, b in zip(plain, found, strict=True)) == 2
        if kind == "insertion":
            assert len(found) == 10 and len(new & set(found)) == 2
        if kind == "swap":
            assert sorted(found) == sorted(plain)
        if kind == "deletion":
            assert 1 <= len(found) <= 8 and set(found) <= set(plain)
        assert "plus" not in found, "stop words have no synonyms"


def test_eda_takes_turns_and_keeps_to_its_seed():
    one, two = (au.eda(SENTENCE, 0.1, 8, rng=random.Random(3)) for _ in range(2))
    assert one == two and len(one) == 8
    assert all(sorted(s.split()) == sorted(SENTENCE.split()) for s in one[2::4])
    assert au.eda("", copies=4) == [""] * 4 and au.eda("dull", 1.0, 1, ["deletion"]) == ["dull"]


def test_synonyms_come_from_wordnet_and_are_never_the_word_itself():
    table = au._thesaurus()
    assert "movie" in table["film"] and "movie" in table["films"] and "the" not in table
    assert all(word not in found and found for word, found in table.items())


def test_a_run_of_the_study_repeats_and_scores_the_split_that_is_asked_for():
    found = [
        study.run(3, split, "flip + crop + cutmix", 3e-3, 0.3, labels=study.FEW) for split in ("valid", "test", "test")
    ]
    _, valid, test = study.photos()
    assert set(found[0]) == {"accuracy"} and len(found[0]["accuracy"]) == len(valid)
    assert len(found[1]["accuracy"]) == len(test) and {"train_accuracy", "valid_at_1"} < set(found[1])
    assert (found[1]["accuracy"] == found[2]["accuracy"]).all()
    linear = study.run(3, "test", "linear model on pixels", C=1e-3, labels=study.FEW)["accuracy"]
    assert linear.mean() > 0.5


@pytest.mark.parametrize("how", ["none", "EDA", "written", "written, filtered"])
def test_enlarged_sets_weigh_what_they_say(how, monkeypatch):
    made = [{"text": f"film {i}", "label": i % 2, "reads": i / 10} for i in range(10)]
    monkeypatch.setattr(results, "load", lambda *_: made)
    texts, y, weight = study.enlarged("sst2", 4, 0, how, 0.5)
    assert len(texts) == len(y) == len(weight) and weight.sum().item() == pytest.approx(8, rel=1e-5)
    if how == "EDA":
        assert len(texts) == 8 * (study.COPIES + 1) and weight.unique().numel() == 1
    if how.startswith("written"):
        assert weight[8:].sum() / weight[:8].sum() == pytest.approx(0.5, rel=1e-5)
        assert len(texts) == 8 + (10 if how == "written" else len(study.written(filtered=True)))


def test_the_filter_keeps_the_surest_half_of_each_label(monkeypatch):
    made = [{"text": str(i), "label": i % 2, "reads": i / 10} for i in range(10)]
    monkeypatch.setattr(results, "load", lambda *_: made)
    kept = [(r["label"], r["reads"]) for r in study.written(filtered=True)]
    assert kept == [(0, 0.0), (0, 0.2), (0, 0.4), (1, 0.9), (1, 0.7), (1, 0.5)]


def test_written_sentences_are_cut_after_the_first():
    assert study._first_sentence('"A  fine film. And more<|im_end|>') == "A fine film."
    assert study._first_sentence("\n\nWhat a film!<|im_end|>") == "What a film!" and study._first_sentence("") == ""


@pytest.mark.parametrize("method", ["majority", "bag of words", "probe", "probe + swap", "bag of words + EDA"])
def test_a_run_with_sentences_scores_one_split(method):
    for split in ("valid", "test"):
        right = study.run_words(0, split, "sst2", 4, method, C=1.0, strength=0.2)["accuracy"]
        assert right.shape == (len(study.sentences("sst2", split)),) and right.dtype == bool


@pytest.mark.parametrize("method", ["none", "deletion", "embedding mixup"])
def test_a_tuned_run_repeats(method):
    one, two = (study.run_tuned(0, "test", 4, method, 1e-3, 0.2)["accuracy"] for _ in range(2))
    assert (one == two).all()


def test_methods_take_the_rate_that_the_plain_run_chose(tmp_path, monkeypatch):
    def run(seed, split, method, lr=0.0, strength=None, C=None, labels=None, times=1):
        assert method in ("none", "linear model on pixels") or lr == 3e-3
        best = 0.5 - abs(lr - 3e-3) - abs((C or 1e-3) - 1e-3) + 0.01 * seed
        return {"accuracy": best - abs((strength or 0.3) - 0.3), "train_accuracy": 1.0}

    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path))
    monkeypatch.setattr(study, "run", run)
    study.main("images", "images_longer", "few")
    stored = json.loads((tmp_path / "16_augment.json").read_text())["quick"]
    rows = stored["images"]["value"]["accuracy"]
    assert [r["method"] for r in rows] == ["linear model on pixels", *study.METHODS]
    assert {r["lr"] for r in rows[1:]} == {3e-3} and all(r["seeds"] == study.SEEDS for r in rows[1:])
    assert {r["seed"] for r in stored["images.search"]["value"]["runs"]} == {100}
    twice = stored["images_longer"]["value"]["accuracy"]
    assert [r["method"] for r in twice] == study.LONGER and {r["times"] for r in twice} == {2}
    assert {r["labels"] for r in stored["few"]["value"]["accuracy"]} == {study.FEW}
    with pytest.raises(ValueError, match="no study 'sounds'; use few, few_longer, images"):
        study.main("sounds")


def test_judges_say_which_changes_keep_a_label(tmp_path, monkeypatch):
    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path))
    pool, valid, test = study.photos()
    monkeypatch.setattr(study, "photos", lambda: (pool[:500], valid[:100], test))
    monkeypatch.setattr(study, "PHOTO_KINDS", {"flip": [1.0], "noise": [0.05]})
    study.main("judges")
    stored = json.loads((tmp_path / "16_augment.json").read_text())["quick"]
    assert [r["method"] for r in stored["photo_changes"]["value"]] == ["flip", "noise"]
    assert all(0 <= v <= 1 for r in stored["photo_changes"]["value"] for v in r["values"])
