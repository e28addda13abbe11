"""Chapter 24: scores against their definitions, counts, memory against measured peaks, labels, the studies."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ftbook import data, models, peft, results
from ftbook.choose import (
    agreement,
    ask,
    compare,
    cost,
    fertility,
    fits,
    h_score,
    knn_score,
    learning_curve,
    leep,
    logme,
    nce,
    overlap,
    probe_score,
    suspects,
)
from ftbook.studies import choose as study
from ftbook.studies import mlm as mlm_study
from ftbook.texts import TextClassifier


def cloud(n=60, width=5, classes=3, apart=1.0, seed=0):
    draws = np.random.default_rng(seed)
    y = np.arange(n) % classes
    return draws.normal(size=(n, width)) + apart * np.eye(classes, width)[y], y


@pytest.fixture(scope="module")
def bert():
    return models.load("bert_mini_en")


def classifier(bert):
    return TextClassifier(bert[0], 2)


# ------------------------------------------------------------------ counts


def test_operations_of_a_matrix_product_are_two_for_each_weight():
    net = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 2))
    found = cost(net, {"input": torch.zeros(3, 7)})
    assert found.flops == 2 * (7 * 5 + 5 * 2)
    assert found.parameters == 7 * 5 + 5 + 5 * 2 + 2
    assert found.megabytes == pytest.approx(4e-6 * found.parameters)
    assert found.milliseconds > 0


def test_asking_for_the_cost_leaves_the_mode_of_the_model():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    cost(net, {"input": torch.zeros(2, 2)})
    assert net.training and net[1].training


def test_fertility_counts_pieces_and_what_is_unknown(bert):
    known, strange = (fertility(bert[1], [t]) for t in ("the film the film", "漢字 the"))
    assert known.pieces == known.whole == 1 and known.unknown == 0
    assert strange.unknown == 0.5
    long = fertility(bert[1], ["incomprehensibilities"])
    assert long.pieces > 1 and long.whole == 0


def test_overlap_sees_shared_runs_of_words_whatever_their_case_and_punctuation():
    corpus = ["It was, as they say, the best of times."]
    found = overlap(["as they SAY the best", "the best of all times it was", "short"], corpus, 4)
    assert found == (0.5, 2)


def test_without_texts_that_can_be_judged_nothing_overlaps():
    assert overlap(["a b"], ["a b"], 3) == (0.0, 0)


# ------------------------------------------------------------------ scores


def test_nce_is_its_definition_by_counting():
    draws = np.random.default_rng(1)
    z, y = draws.integers(0, 4, 200), draws.integers(0, 3, 200)
    total = 0.0
    for a in range(4):
        for b in range(3):
            both = ((z == a) & (y == b)).mean()
            total += both * math.log(both / (z == a).mean())
    assert nce(z, y) == pytest.approx(total, abs=1e-12)


def test_leep_is_its_definition_by_loops():
    draws = np.random.default_rng(2)
    theta, y = draws.dirichlet(np.ones(4), 50), draws.integers(0, 3, 50)
    joint = np.zeros((3, 4))
    for p, k in zip(theta, y, strict=True):
        joint[k] += p / 50
    total = 0.0
    for p, k in zip(theta, y, strict=True):
        total += math.log(sum(p[z] * joint[k, z] / joint[:, z].sum() for z in range(4))) / 50
    assert leep(theta, y) == pytest.approx(total, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_leep_of_sure_answers_is_nce_and_both_are_at_most_0_and_at_least_minus_the_entropy(seed):
    draws = np.random.default_rng(seed)
    z, y = draws.integers(0, 5, 60), draws.integers(0, 3, 60)
    hot = np.eye(5)[z]
    share = np.bincount(y) / 60
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
    assert leep(hot, y) == pytest.approx(nce(z, y), abs=1e-12)
    assert -entropy - 1e-9 <= nce(z, y) <= 0


@pytest.mark.parametrize("n, width", [(60, 5), (12, 30)])
def test_logme_is_the_evidence_of_the_normal_distribution_at_its_maximum(n, width):
    from scipy.optimize import minimize
    from scipy.stats import multivariate_normal

    f, y = cloud(n, width)
    total = []
    for k in range(3):
        hot = (y == k).astype(float)

        def evidence(log_precisions, hot=hot):
            alpha, beta = np.exp(log_precisions)
            spread = np.eye(n) / beta + f @ f.T / alpha
            return -multivariate_normal.logpdf(hot, np.zeros(n), spread) / n

        starts = [[a, b] for a in (0.0, 3.0) for b in (1.0, 3.0)]
        total.append(
            -min(
                minimize(evidence, s, method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-10}).fun for s in starts
            )
        )
    assert logme(f, y) == pytest.approx(np.mean(total), abs=1e-4)


def test_h_score_is_its_definition():
    f, y = cloud()
    means = np.stack([f[y == k].mean(0) for k in y])
    wanted = np.trace(np.linalg.pinv(np.cov(f.T, bias=True)) @ np.cov(means.T, bias=True))
    assert h_score(f, y) == pytest.approx(wanted, abs=1e-9)


def test_with_fewer_rows_than_features_the_h_score_says_nothing_unless_shrunk():
    noise, y = cloud(30, 50, apart=0.0)
    good, _ = cloud(30, 50, apart=3.0)
    assert h_score(noise, y) == pytest.approx(2, abs=1e-6) == h_score(good, y)
    assert h_score(good, y, shrink=True) > h_score(noise, y, shrink=True) + 0.2


def test_the_h_score_does_not_change_with_an_invertible_map_and_logme_not_with_a_turn():
    f, y = cloud()
    map_ = np.random.default_rng(3).normal(size=(5, 5))
    turn = np.linalg.qr(map_)[0]
    assert h_score(f @ map_, y) == pytest.approx(h_score(f, y), abs=1e-8)
    assert logme(f @ turn, y) == pytest.approx(logme(f, y), abs=1e-6)


def test_neighbors_vote_as_in_scikit_learn():
    from sklearn.model_selection import LeaveOneOut, cross_val_score
    from sklearn.neighbors import KNeighborsClassifier

    f, y = cloud(45)
    theirs = cross_val_score(KNeighborsClassifier(1, metric="cosine"), f, y, cv=LeaveOneOut()).mean()
    assert knn_score(f, y, k=1) == pytest.approx(theirs)


def test_of_two_classes_five_neighbors_vote_as_in_scikit_learn():
    from sklearn.model_selection import LeaveOneOut, cross_val_score
    from sklearn.neighbors import KNeighborsClassifier

    f, y = cloud(44, classes=2)
    theirs = cross_val_score(KNeighborsClassifier(5, metric="cosine"), f, y, cv=LeaveOneOut()).mean()
    assert knn_score(f, y) == pytest.approx(theirs) != 1


@pytest.mark.parametrize("n, width", [(60, 5), (30, 50)])
def test_the_shrunk_h_score_is_the_authors_formula_by_scikit_learn(n, width):
    from sklearn.covariance import LedoitWolf

    f, y = cloud(n, width)
    fitted = LedoitWolf().fit(f)
    means = np.stack([f[y == k].mean(0) for k in y])
    spread = (1 - fitted.shrinkage_) * np.cov(means.T, bias=True)
    wanted = np.trace(np.linalg.inv(fitted.covariance_) @ spread)
    assert h_score(f, y, shrink=True) == pytest.approx(wanted, rel=1e-6)


def test_the_probe_is_scikit_learns_on_features_of_mean_length_root_d():
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    f, y = cloud()
    scaled = f / np.sqrt((f**2).sum(1)).mean() * np.sqrt(5)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    theirs = cross_val_score(LogisticRegression(), scaled, y, cv=folds).mean()
    assert probe_score(f, y) == pytest.approx(theirs) != 1


@pytest.mark.parametrize("score", [logme, lambda f, y: h_score(f, y, True), knn_score, probe_score])
def test_features_that_separate_the_classes_score_higher(score):
    (good, y), (bad, _) = cloud(apart=4.0), cloud(apart=0.0)
    assert score(good, y) > score(bad, y)


def test_the_probe_does_not_depend_on_the_scale_of_the_features():
    f, y = cloud()
    assert probe_score(f, y) == probe_score(1000 * f, y)


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda: leep([[0.5, 0.6]] * 2, [0, 1]), "add up to 1"),
        (lambda: logme([[1.0], [2.0]], [1, 1]), "two classes"),
        (lambda: logme([[1.0], [np.nan]], [0, 1]), "no finite numbers"),
        (lambda: h_score(np.zeros((3, 2)), [0, 1]), "a label to each row"),
        (lambda: knn_score([[1.0], [2.0]], [0, 1]), "k=5: give 1 to 1"),
        (lambda: probe_score([[1.0], [2.0]], [0, 1]), "the rarest class has 1"),
        (lambda: agreement([1.0], [1.0]), "two or more"),
        (lambda: overlap(["a"], ["a"], 0), "1 word or more"),
        (lambda: cost(nn.Linear(1, 1), {}), "give the tensors"),
        (lambda: compare({}, None), "no candidates"),
        (lambda: compare({"a": (None, None)}, data.load("sst2", "train", bundled=True), labels=3), "two or more"),
        (lambda: logme(np.zeros((4, 2)), [0, 1, 0, 1]), "all features are 0"),
        (lambda: probe_score([[1.0], [2.0]], [0, np.nan]), "no finite numbers"),
        (lambda: nce([1, 2, 3], [0, 1]), "3 source_labels and 2 labels"),
        (lambda: knn_score(np.eye(4), [0, 1, 0, 1], k=1.5), "k=1.5"),
        (lambda: agreement([1.0, np.nan], [0.1, 0.2]), "without a finite number"),
        (lambda: cost(nn.Linear(2, 2), {"input": torch.zeros(0, 2)}), "no examples"),
        (lambda: ask([[5.0, 2.0], [0.5, 0.5]], 1), "softmax of the logits"),
        (lambda: ask([[np.nan, 1.0]], 1), "softmax of the logits"),
        (lambda: suspects([[5.0, -1.0], [2.0, 8.0]], [0, 1]), "softmax of the logits"),
        (lambda: suspects([[0.5, 0.5]] * 2, [0.7, 1.0]), "whole numbers"),
        (lambda: learning_curve([1, 2, 3], [0.1, np.nan, 0.2]), "shares from 0 to 1"),
        (lambda: suspects([[0.5, 0.5]] * 2, [0, 2]), "labels from 0 to 1"),
        (lambda: ask([[0.5, 0.5]], 2), "n from 0 to N"),
        (lambda: ask([[0.5, 0.5]], 1, "luck"), "allowed are 'margin'"),
        (lambda: learning_curve([1, 2], [0.1, 0.2]), "three or more"),
        (lambda: learning_curve([1, 2, 3], [10, 20, 30]), "shares from 0 to 1"),
    ],
)
def test_what_cannot_be_scored_is_refused(call, told):
    with pytest.raises(ValueError, match=told):
        call()


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda: overlap("one two", ["one two"], 2), "one string"),
        (lambda: fertility(None, "a good film"), "one string"),
        (lambda: compare({"a": nn.Linear(1, 1)}, None), "a Linear; give"),
        (lambda: compare({"a": (None, None)}, "sst2"), "TextSet or an ImageSet"),
    ],
)
def test_what_is_of_the_wrong_kind_is_refused(call, told):
    with pytest.raises(TypeError, match=told):
        call()


# ------------------------------------------------------------- what counts


def test_a_perfect_order_has_no_regret_and_a_turned_one_has_all():
    truth = [0.7, 0.9, 0.8]
    assert agreement(truth, truth)[:2] == (1.0, 0.0)
    turned = agreement([-v for v in truth], truth)
    assert turned.tau == -1 and turned.regret == pytest.approx(0.2)


def test_rounding_orders_nothing():
    assert agreement([1.0, 1 + 1e-13, 1 - 1e-13], [0.1, 0.2, 0.3]).tau == 0


def test_a_score_that_is_constant_chooses_at_random():
    found = agreement([1.0, 1.0], [0.5, 0.9])
    assert found.tau == 0 and found.regret == pytest.approx(0.2)


def test_a_table_has_the_majority_and_a_recommendation_within_the_limits(bert):
    task = data.load("sst2", "train", bundled=True)
    found = compare(
        {"bert_mini_en": bert, "mine": bert}, task, labels=20, licenses=[models.card("bert_mini_en").license]
    )
    assert found.choice == "bert_mini_en" and "mine (license unknown)" in found.reasons[0]
    assert found.rows[-1]["candidate"] == "majority" and found.rows[-1]["probe"] == 0.5
    assert found.rows[-2]["candidate"] == "bag of words" and found.rows[0]["pieces a word"] >= 1
    assert compare({"mine": bert}, task, labels=20, max_mb=1.0).choice == ""


def test_a_part_of_a_model_has_its_license_and_heads_cost_nothing(bert):
    task = data.load("sst2", "train", bundled=True)
    own = models.card("bert_mini_en").license
    candidates = {"bert_mini_en": bert, "bert_mini_en, bare": (bert[0].base_model, bert[1]), "other": bert}
    found = compare(candidates, task, labels=4, licenses=own)
    with_head, bare, other = found.rows[:3]
    assert with_head["license"] == bare["license"] == own and other["license"] == "unknown"
    assert with_head["MFLOP"] == bare["MFLOP"] and "other (license unknown)" in found.reasons[0]
    assert "is known here of other" in compare({"other": bert}, task, labels=4).reasons[-1]


def test_where_words_tell_the_classes_apart_the_table_says_that_no_model_is_needed(bert):
    words = "lamp phone kettle jacket tent chair radio book".split()
    texts = [f"{end} the {w}" for w in words for end in ("refund", "repair")]
    task = data.TextSet(texts, torch.arange(16) % 2, ["money", "work"], "mails", "here")
    found = compare({"bert_mini_en": bert}, task, labels=16)
    assert found.rows[1]["probe"] == 1 and "above the bag of words (100.0%)" in found.reasons[-1]


def test_images_are_compared_too():
    task = data.load("cifar10", "test", bundled=True)
    found = compare({"cnn_small": models.load("cnn_small")}, task, labels=40)
    assert found.choice == "cnn_small" and found.rows[0]["MFLOP"] > 1
    assert [r["candidate"] for r in found.rows[1:]] == ["pixels", "majority"]


def test_a_reader_may_give_images_outside_0_to_1_and_the_model_keeps_its_head():
    task = data.load("cifar10", "test", bundled=True)
    net, prepare = models.load("cnn_small")
    found = compare({"mine": (net, lambda x: 4 * prepare(x) - 2)}, task, labels=40)
    assert found.choice == "mine" and net(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize("method", ["full", "head", "lora", "qlora"])
@pytest.mark.parametrize("batch, length", [(4, 16), (32, 64)])
def test_predicted_memory_is_within_15_percent_of_the_measured_peak(bert, method, batch, length):
    told = fits(classifier(bert), method, batch, length, measure=study.peak_of)
    assert told.peak == pytest.approx(told.measured[0], rel=0.15)


def test_every_row_of_the_memory_study_is_a_process_of_its_own(monkeypatch):
    kept = {}
    monkeypatch.setattr(study, "METHODS", ("lora", "qlora"))
    monkeypatch.setattr(results, "record", lambda chapter, key, value: kept.update({key: value}))
    study.main("memory")
    for row in kept["memory"]:
        assert row["peak"] == pytest.approx(row["measured"], rel=0.15)
        assert row["process"] > row["weights"], "it grew by more; of a model this small, pages of code weigh as much"


def test_lora_trains_the_head_as_well(bert):
    told = [fits(classifier(bert), how, 2, 8).gradients for how in ("lora", "head")]
    net = copy.deepcopy(classifier(bert))
    peft.apply(net, peft.LoRA(), head=())
    alone = sum(p.nbytes for p in net.parameters() if p.requires_grad) / 1e6
    assert told[0] == pytest.approx(alone + told[1])


def test_4_bit_layers_take_less_memory_for_weights_and_the_same_for_the_adapter(bert):
    lora, small = (fits(classifier(bert), how, 4, 16) for how in ("lora", "qlora"))
    assert small.weights < lora.weights and small.gradients == lora.gradients


def test_a_method_of_peft_and_inputs_of_ones_own_are_taken():
    net = models.load("cnn_small")[0]
    ask_for = lambda batch, size: {"x": torch.rand(batch, 3, size, size)}  # noqa: E731
    found = fits(net, "head", 8, 32, inputs=ask_for, examples=80, epochs=2, limit_mb=1e-3)
    assert found.fits is False and found.minutes == pytest.approx(found.seconds * 20 / 60)
    found = fits(
        nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 2)),
        peft.LoRA(target="0", r=2),
        2,
        9,
        inputs=lambda b, n: {"input": torch.rand(b, n)},
    )
    assert found.gradients > 0 and found.fits is None


def test_predicting_changes_neither_the_model_nor_the_draws(bert):
    net = classifier(bert)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net.requires_grad_(False)
    state = torch.get_rng_state()
    fits(net, "full", 2, 8)
    assert torch.equal(state, torch.get_rng_state())
    assert not any(p.requires_grad for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    "call, told",
    [
        (
            lambda: fits(nn.Linear(1, 1), "all", 2, 2, inputs=lambda b, n: {}),
            "allowed are 'full', 'head', 'lora', 'qlora'",
        ),
        (lambda: fits(nn.Linear(1, 1), "full", 0), "1 or more"),
        (lambda: fits(nn.Linear(1, 1), "full"), "give inputs"),
    ],
)
def test_what_cannot_be_predicted_is_refused(call, told):
    with pytest.raises(ValueError, match=told):
        call()


# ------------------------------------------------------------------ labels


@settings(max_examples=20, deadline=None)
@given(floor=st.floats(0.0, 0.2), scale=st.floats(0.3, 1.0), power=st.floats(0.2, 1.0))
def test_a_power_law_is_found_again(floor, scale, power):
    n = np.array([10, 20, 40, 80, 160])
    error = (floor + scale * n**-power).clip(0, 1)
    curve = learning_curve(n, error)
    assert curve.at(n) == pytest.approx(error, abs=2e-3)
    assert curve.at(320) == pytest.approx(floor + scale * 320**-power, abs=0.02)


def test_labels_for_an_error_are_the_inverse_and_no_number_reaches_the_floor():
    curve = learning_curve([10, 40, 160], [0.3, 0.2, 0.15])
    assert curve.labels_for(float(curve.at(500))) == pytest.approx(500, rel=1e-6)
    assert curve.labels_for(curve.floor) == math.inf


@pytest.mark.parametrize("how", ["margin", "entropy", "confidence"])
def test_the_least_certain_examples_are_asked_for_first(how):
    p = [[0.98, 0.01, 0.01], [0.4, 0.35, 0.25], [0.6, 0.3, 0.1]]
    assert ask(p, 3, how).tolist() == [1, 2, 0]


def test_chance_asks_for_others_with_another_seed():
    p = np.full((50, 2), 0.5)
    first, again, other = (ask(p, 10, "random", seed=s) for s in (0, 0, 1))
    assert first.tolist() == again.tolist() != other.tolist()
    assert len(set(first.tolist())) == 10


def test_flipped_labels_are_among_the_suspects_and_right_ones_hardly():
    draws = np.random.default_rng(0)
    y = np.arange(200) % 2
    p = np.where(np.eye(2)[y] > 0, 0.85, 0.15) + draws.normal(0, 0.03, (200, 1)) * [1, -1]
    wrong = draws.permutation(200)[:20]
    noisy = y.copy()
    noisy[wrong] = 1 - noisy[wrong]
    found = suspects(p, noisy)
    assert set(found[:20]) == set(wrong)


# ------------------------------------------------------------- the studies


def test_all_candidates_have_as_many_rates_and_take_them_from_the_first_task():
    for made, rates in ((study.rows(), study.RATES), (study.photo_rows(), study.PHOTO_RATES)):
        first = made[0]["task"]
        own = [r for r in made if r["task"] == first and "lr" in r]
        assert all(r["lr"] == rates for r in own)
        later = [r for r in made if r["task"] != first and "lr" in r]
        assert later and all(isinstance(r["lr"], results.ChosenFor) for r in later)


def test_untrained_candidates_are_as_large_and_draws_of_the_caller_stay():
    state = torch.get_rng_state()
    net, _ = study.network("CNN, clothes")
    assert torch.equal(state, torch.get_rng_state())
    assert not any(
        torch.equal(a, b)
        for a, b in zip(net.parameters(), study.network("CNN")[0].parameters(), strict=True)
        if a.ndim > 1
    )


def test_a_candidate_after_some_steps_is_the_network_of_chapter_6(monkeypatch):
    last = mlm_study.READ[-1]
    monkeypatch.setitem(study.ENCODERS, "on its way", ("bert_mini_en", 1, last))
    body, tokenizer = study.encoder("on its way")
    theirs = mlm_study.readers(0)[last].bert
    words = body.embeddings.word_embeddings.weight
    assert torch.equal(words, theirs.embeddings.word_embeddings.weight) and len(words) == len(tokenizer)
    assert not body.training and theirs.pooler is None


def test_the_encoder_of_chapter_5_reads_gray_photos_and_learns_without_labels(monkeypatch):
    name = next(iter(study.PHOTO_TASKS))
    for candidate, taught in (("coder", "fashion_mnist"), ("random coder", "none")):
        monkeypatch.setitem(study.NETWORKS, candidate, (study.CODER, -1, taught, 0))
    (coder, read), (random, _) = map(study.network, ("coder", "random coder"))
    x = read(study.photos(name, "test").x)
    assert x.shape[1:] == (1, 28, 28) and 0 <= x.min() < x.max() <= 1
    assert not torch.equal(coder.encoder(x), random.encoder(x))
    found = study.run_photo(0, "test", name, "coder", lr=1e-3)
    assert len(found["accuracy"]) == len(x)
    assert set(study._scored(name, "coder", 0, text=False)) & {"NCE", "LEEP"} == set()  # no classes of its own


@pytest.mark.parametrize("candidate", [*study.ENCODERS, study.MAJORITY])
def test_a_candidate_is_tuned_and_scored(candidate):
    lr = 1e-3 if candidate in study.ENCODERS else None
    found = study.run(0, "test", study.TASKS[0], candidate, lr=lr)
    assert set(found["accuracy"]) <= {0.0, 1.0} and len(found["accuracy"]) == len(
        study.sentences(study.TASKS[0], "test")
    )


def test_a_photo_model_is_tuned_and_pixels_are_a_baseline():
    name = next(iter(study.PHOTO_TASKS))
    for about in ({"candidate": "CNN", "lr": 1e-3}, {"candidate": study.PIXELS, "C": 1.0}):
        found = study.run_photo(0, "valid", name, **about)
        assert len(found["accuracy"]) == len(study.photos(name, "valid"))


def test_scores_of_a_headed_candidate_include_leep():
    f, y = cloud(30, 4)
    assert set(study.scores(f, y, torch.randn(30, 7))) == set(study.scores(f, y)) | {"NCE", "LEEP"}


def test_asking_starts_with_two_classes_and_labels_as_many_as_it_may():
    found = study.run_ask(0, "test", study.LABEL_TASKS[0], "margin")
    assert len(found["accuracy"]) == len(found["half"])


def test_flipped_labels_are_found_better_than_by_chance_or_not_at_all():
    found = study.run_wrong(0, "test", study.LABEL_TASKS[0], study.WAYS[1])
    assert 0 <= found["precision"] <= 1 and 0 <= found["recall"] <= 1


def test_an_unknown_part_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match="no study 'scale'"):
        study.main("criteria", "scale")
