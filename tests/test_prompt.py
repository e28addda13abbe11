"""Chapter 12: prompts scored by definition and from a cache, calibration, clozes, SetFit, the studies."""

import json
import os
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ftbook import causal, models, prompt, results
from ftbook.prompt import CONTENT_FREE, Prompt, SetFit, calibrate, cloze_scores, label_scores, pair_loss, plain_scores
from ftbook.studies import prompt as study

ASK = Prompt("Review: {text}\nSentiment:{label}", (" negative", " positive"))
MIXED = Prompt("Review: {text}\nSentiment:{label}", (" bad", " not so good", " of the first order"))
TEXTS = ["a film", "a warm and clever film", "dull", "", "the script is {text} {label} , twice"]
SHOTS = [("far too long", 0), ("a fine story", 1)]


@pytest.fixture(scope="module")
def small():
    """The bundled decoder and its tokenizer."""
    folder = models.path("decoder_mini_en")
    return causal.load_decoder(folder), models.load("decoder_mini_en")[1]


@pytest.fixture(scope="module")
def bert():
    return models.load("bert_mini_en")


# ---------------------------------------------------------------- prompts


def test_a_prompt_puts_text_and_label_in_their_places_and_leaves_braces_of_the_text_alone():
    assert ASK.filled("so {text} and {label}", " negative") == "Review: so {text} and {label}\nSentiment: negative"
    assert Prompt("{label} is it: {text}", ("a", "b")).filled("x", "a") == "a is it: x"


def test_examples_and_intro_stand_before_the_question():
    told = Prompt(ASK.template, ASK.words, intro="Judge.", between="\n")
    assert told.ask("fine", SHOTS[:1]) == (
        "Judge.\nReview: far too long\nSentiment: negative\nReview: fine\nSentiment:"
    )
    assert ASK.ask("fine") == "Review: fine\nSentiment:" and ASK.before() == ""


@pytest.mark.parametrize(
    "template, words, told",
    [
        ("no place", (" a", " b"), "has {text} 0 times"),
        ("{text}", (" a", " b"), "has {label} 0 times"),
        ("{text} {text}{label}", (" a", " b"), "has {text} 2 times"),
        ("{text}{label}", " ab", "one word for each"),
        ("{text}{label}", (" a",), "one word for each"),
        ("{text}{label}", (" a", " b", " a"), "a repeated one"),
        ("{text}{label}", (" a", ""), "an empty or a repeated one"),
    ],
)
def test_a_prompt_that_cannot_work_is_refused(template, words, told):
    with pytest.raises(ValueError) as error:
        Prompt(template, words)
    assert told in str(error.value)


def test_a_wrong_label_of_an_example_and_a_template_that_goes_on_are_refused(small):
    with pytest.raises(ValueError, match="an example has label 2; with 2 words labels are 0 to 1"):
        ASK.ask("x", [("y", 2)])
    with pytest.raises(ValueError, match="put {label} at the end, or use `cloze_scores`"):
        label_scores(*small, Prompt("It was {label}. {text}", (" a", " b")), ["x"])


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("shots", [(), SHOTS], ids=["zero-shot", "two examples"])
@pytest.mark.parametrize("ask", [ASK, MIXED, Prompt(ASK.template, ASK.words, intro="Judge.")], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_scores_from_the_cache_equal_the_definition(small, ask, shots, normalize):
    plain = plain_scores(*small, ask, TEXTS, shots, normalize=normalize)
    for size in (1, 3, 16):
        fast = label_scores(*small, ask, TEXTS, shots, normalize=normalize, batch_size=size)
        assert torch.allclose(plain, fast, atol=1e-4), size


def test_scores_equal_those_of_transformers_logits(small):
    """Ten lines with transformers: the whole text at once, logits at all places."""
    peer, tokenizer = models.load("decoder_mini_en")
    ours = label_scores(*small, MIXED, TEXTS, SHOTS)
    for i, text in enumerate(TEXTS):
        ask = "<|endoftext|>" + MIXED.ask(text, SHOTS)
        before = len(tokenizer(ask)["input_ids"])
        for k, word in enumerate(MIXED.words):
            ids = torch.tensor([tokenizer(ask + word)["input_ids"]])
            with torch.no_grad():
                logits = peer(ids).logits[0, before - 1 : -1]
            assert abs(-F.cross_entropy(logits, ids[0, before:]) - ours[i, k]) < 1e-4


def test_pieces_of_the_parts_are_those_of_the_whole(small):
    _, first, asks, words = prompt._pieces(small[1], MIXED, TEXTS, SHOTS)
    for text, ask in zip(TEXTS, asks, strict=True):
        for word, pieces in zip(MIXED.words, words, strict=True):
            assert causal.encode([MIXED.ask(text, SHOTS) + word], small[1]) == [first + ask + pieces]


def test_the_beginning_is_read_once_and_no_logits_are_computed_that_nobody_scores(small, monkeypatch):
    read, given = [], []
    forward = causal.Decoder.forward

    def counted(self, ids, where=None, cache=None):
        out = forward(self, ids, where, cache)
        read.append(ids.numel())
        given.append(out.shape[:-1].numel())
        return out

    monkeypatch.setattr(causal.Decoder, "forward", counted)
    label_scores(*small, MIXED, TEXTS, SHOTS)
    _, first, asks, words = prompt._pieces(small[1], MIXED, TEXTS, SHOTS)
    assert read[0] == 1 + len(first) and given[0] == 0
    more = sum(len(word) - 1 for word in words)
    assert sum(given) == len(TEXTS) * (1 + more), "one row for the first pieces, one for each further piece"
    assert sum(read[1:]) == sum(map(len, asks)) + len(TEXTS) * more
    read.clear()
    plain_scores(*small, MIXED, TEXTS, SHOTS)
    assert sum(read) > 4 * (1 + len(first) + sum(map(len, asks)))


def test_no_text_gives_no_row_and_modes_stay_as_they_were(small):
    small[0].train()
    assert label_scores(*small, ASK, []).shape == (0, 2) and small[0].training
    small[0].eval()


def test_a_single_string_a_long_prompt_and_a_foreign_tokenizer_are_refused(small, bert):
    for score in (label_scores, plain_scores):
        with pytest.raises(TypeError, match="put a single text into a list"):
            score(*small, ASK, "a film")
        with pytest.raises(TypeError, match="a text is None of type NoneType; give str"):
            score(*small, ASK, ["a film", None])
    for count in (0, -1):
        with pytest.raises(ValueError, match="batch_size must be an integer >= 1"):
            label_scores(*small, ASK, ["fine"], batch_size=count)
        with pytest.raises(ValueError, match="batch_size must be an integer >= 1"):
            cloze_scores(*bert, Prompt("{text} It was {label}.", ("good", "bad")), ["fine"], batch_size=count)
    with pytest.raises(ValueError, match=r"the longest prompt has \d+ pieces, the context holds 128"):
        label_scores(*small, ASK, ["fine"], SHOTS * 12)
    with pytest.raises(ValueError, match="no piece <|endoftext|>"):
        label_scores(small[0], bert[1], ASK, ["fine"])


def test_bfloat16_scores_are_close(small):
    import copy

    half = copy.deepcopy(small[0]).to(torch.bfloat16)
    fast = label_scores(half, small[1], MIXED, TEXTS, SHOTS)
    assert fast.dtype == torch.float32
    assert torch.allclose(fast, label_scores(*small, MIXED, TEXTS, SHOTS), atol=0.15)


@pytest.mark.slow
def test_smollm2_scores_equal_those_of_transformers_logits(monkeypatch):
    monkeypatch.setenv("FTBOOK_DATA", os.environ.get("FTBOOK_TEST_MODELS", ""))
    if models._missing(models.card("smollm2")):
        pytest.skip("smollm2 is not in the cache: `make models` fetches it")
    peer, tokenizer = models.load("smollm2")
    ours = label_scores(causal.load_decoder(models.path("smollm2")), tokenizer, MIXED, TEXTS[:2], SHOTS)
    for i, text in enumerate(TEXTS[:2]):
        ask = "<|endoftext|>" + MIXED.ask(text, SHOTS)
        before = len(tokenizer(ask)["input_ids"])
        for k, word in enumerate(MIXED.words):
            ids = torch.tensor([tokenizer(ask + word)["input_ids"]])
            with torch.no_grad():
                logits = peer(ids).logits[0, before - 1 : -1]
            assert abs(-F.cross_entropy(logits, ids[0, before:]) - ours[i, k]) < 1e-4


# ---------------------------------------------------------------- calibration


def test_calibration_is_the_one_of_its_paper():
    scores, empty = torch.randn(6, 3), torch.randn(len(CONTENT_FREE), 3)
    p, prior = scores.softmax(1), empty.softmax(1).mean(0)
    theirs = p @ torch.diag(1 / prior)  # W = diag(p_cf)^-1, b = 0
    ours = calibrate(scores, empty)
    assert torch.equal(ours.argmax(1), theirs.argmax(1))
    assert torch.allclose(ours.exp(), theirs / theirs.sum(1, keepdim=True), atol=1e-6)


def test_a_prompt_that_is_undecided_about_nothing_is_not_changed():
    scores = torch.randn(5, 4)
    assert torch.allclose(calibrate(scores, torch.zeros(2, 4)), scores.log_softmax(1), atol=1e-6)


@pytest.mark.parametrize(
    "scores, empty, told",
    [
        (torch.zeros(2, 3), torch.zeros(1, 2), "the same labels"),
        (torch.zeros(3), torch.zeros(1, 3), "give .N, K. and .M, K."),
        (torch.zeros(2, 3), torch.zeros(0, 3), "score CONTENT_FREE"),
        (torch.full((2, 3), torch.nan), torch.zeros(1, 3), "scores hold NaN"),
        (torch.zeros(2, 3), torch.full((1, 3), torch.nan), "empty hold NaN"),
        (torch.zeros(2, 2), torch.tensor([[0.0, -torch.inf]]), "probability 0 in every row of empty"),
    ],
)
def test_scores_that_cannot_be_calibrated_are_refused(scores, empty, told):
    with pytest.raises(ValueError, match=told):
        calibrate(scores, empty)


# ---------------------------------------------------------------- cloze


def test_a_cloze_is_scored_at_its_masks_as_transformers_scores_it(bert):
    model, tokenizer = bert
    ask = Prompt("{text} It was {label}.", ("good", "very old", "extraordinarily"))
    sizes = [len(tokenizer(w, add_special_tokens=False)["input_ids"]) for w in ask.words]
    assert len(set(sizes)) > 1
    texts = ["A small town.", "The [MASK] river, a long one in the north of the country."]
    ours = cloze_scores(*bert, ask, texts, batch_size=1)
    assert torch.allclose(ours, cloze_scores(*bert, ask, texts), atol=1e-5)
    for i, text in enumerate(texts):
        for k, (word, size) in enumerate(zip(ask.words, sizes, strict=True)):
            ids = tokenizer(ask.filled(text, " ".join(["[MASK]"] * size)), return_tensors="pt")["input_ids"]
            wanted = torch.tensor(tokenizer(word, add_special_tokens=False)["input_ids"])
            with torch.no_grad():
                found = model(ids).logits.log_softmax(-1)
            places = (ids[0] == tokenizer.mask_token_id).nonzero()[-size:, 0]
            assert abs(found[0, places, wanted].mean() - ours[i, k]) < 1e-4


def test_a_gap_before_a_text_with_a_mask_of_its_own_is_the_gap_of_the_template(bert):
    ask = Prompt("It was {label}. {text}", ("good", "bad"))
    with_mask, without = cloze_scores(*bert, ask, ["A [MASK] town.", "A small town."])
    ids = bert[1](ask.filled("A [MASK] town.", "[MASK]"), return_tensors="pt")["input_ids"]
    place = (ids[0] == bert[1].mask_token_id).nonzero()[0, 0]
    wanted = bert[1].convert_tokens_to_ids(["good", "bad"])
    with torch.no_grad():
        found = bert[0](ids).logits[0, place].log_softmax(-1)[wanted]
    assert torch.allclose(found, with_mask, atol=1e-4) and without.shape == (2,)


def test_a_text_that_is_too_long_loses_its_end_and_not_the_gap(bert):
    ask = Prompt("{text} It was {label}.", ("good", "bad"))
    scores = cloze_scores(*bert, ask, ["a long story " * 300, "a long story"])
    assert scores.shape == (2, 2) and bool(scores.isfinite().all())
    with pytest.raises(ValueError, match="the template alone is longer"):
        cloze_scores(*bert, Prompt("so " * 600 + "{text} {label}", ("good", "bad")), ["x"])


def test_a_cloze_refuses_a_string_and_a_model_without_a_mask(bert, small):
    ask = Prompt("{text} It was {label}.", ("good", "bad"))
    with pytest.raises(TypeError, match="put a single text into a list"):
        cloze_scores(*bert, ask, "a film")
    with pytest.raises(ValueError, match="a decoder takes `label_scores`"):
        cloze_scores(*small, ask, ["a film"])


# ---------------------------------------------------------------- pairs


def test_the_loss_of_all_pairs_equals_the_loop_over_them():
    z, y = torch.randn(9, 5), torch.tensor([0, 0, 1, 2, 1, 2, 2, 0, 3])
    errors = {True: [], False: []}
    for i, j in combinations(range(9), 2):
        same = bool(y[i] == y[j])
        errors[same].append((torch.cosine_similarity(z[i], z[j], dim=0) - float(same)) ** 2)
    by_hand = sum(torch.stack(e).mean() for e in errors.values()) / 2
    assert torch.isclose(pair_loss(z, y), by_hand, atol=1e-6)


def test_with_one_kind_of_pair_it_is_the_cosine_loss_of_sentence_transformers():
    z = torch.randn(2, 4, requires_grad=True)
    for y, target in (([1, 1], 1.0), ([0, 1], 0.0)):
        ours = pair_loss(z, torch.tensor(y))
        theirs = F.mse_loss(torch.cosine_similarity(z[:1], z[1:]), torch.tensor([target]))
        assert torch.isclose(ours, theirs, atol=1e-6)
        mine, other = (torch.autograd.grad(loss, z)[0] for loss in (ours, theirs))
        assert torch.allclose(mine, other, atol=1e-6)


@pytest.mark.parametrize(
    "vectors, labels, told",
    [
        (torch.zeros(3, 2), torch.zeros(2), "give .B, H. and .B,."),
        (torch.zeros(3), torch.zeros(3), "give .B, H. and .B,."),
        (torch.zeros(1, 2), torch.zeros(1), "at least two"),
    ],
)
def test_vectors_that_make_no_pairs_are_refused(vectors, labels, told):
    with pytest.raises(ValueError, match=told):
        pair_loss(vectors, labels)


FEW = ["a fine story", "a warm , clever film", "great fun", "dull and long", "a poor script", "tedious"]
LABELS = [1, 1, 1, 0, 0, 0]


def test_without_steps_setfit_is_a_linear_probe(bert):
    from sklearn.linear_model import LogisticRegression

    from ftbook.texts import sentence_vectors

    few = SetFit(*bert, steps=0, C=3.0).fit(FEW, LABELS)
    x = F.normalize(sentence_vectors(FEW, *bert), dim=1).numpy()
    theirs = LogisticRegression(C=3.0, max_iter=2000).fit(x, LABELS)
    assert np.allclose(few.predict_proba(FEW), theirs.predict_proba(x), atol=1e-6)
    assert few.predict(["a film"]).shape == (1,)


def test_setfit_pulls_classes_together_leaves_the_given_model_alone_and_repeats(bert):
    before = {k: v.clone() for k, v in bert[0].state_dict().items()}
    made = [SetFit(*bert, steps=6, lr=1e-3, seed=s).fit(FEW, LABELS) for s in (1, 1, 2)]
    loss = [float(pair_loss(torch.from_numpy(m.vectors(FEW)), torch.tensor(LABELS))) for m in made]
    start = float(pair_loss(torch.from_numpy(SetFit(*bert, steps=0).vectors(FEW)), torch.tensor(LABELS)))
    assert max(loss) < start and loss[0] == loss[1] != loss[2]
    assert all(torch.equal(v, before[k]) for k, v in bert[0].state_dict().items())


def test_batches_are_drawn_evenly_from_the_classes(bert):
    y = torch.tensor([0] * 20 + [1] * 20 + [2] * 3)
    plan = SetFit(*bert, steps=5, batch_size=9)
    batches = list(prompt._Even({"labels": y, "row": torch.arange(43)}, plan))
    assert len(batches) == 5
    for batch in batches:
        assert batch["labels"].bincount().tolist() == [3, 3, 3] and len(batch["row"].unique()) == 9
    plan = SetFit(*bert, steps=1, batch_size=12)
    (batch,) = prompt._Even({"labels": y, "row": torch.arange(43)}, plan)
    assert len(batch["labels"]) == 12 and int((batch["labels"] == 2).sum()) == 3


def test_setfit_refuses_what_it_cannot_fit(bert):
    with pytest.raises(ValueError, match="at least two texts in a batch"):
        SetFit(*bert, batch_size=1)
    with pytest.raises(ValueError, match="at least two texts in a batch"):
        SetFit(*bert, steps=-1)
    with pytest.raises(ValueError, match="2 texts and 3 labels"):
        SetFit(*bert).fit(["a", "b"], [0, 1, 1])
    with pytest.raises(ValueError, match="all labels are the same"):
        SetFit(*bert).fit(["a", "b"], [1, 1])
    with pytest.raises(TypeError, match="labels are torch.float32; give class numbers"):
        SetFit(*bert).fit(["a", "b"], [0.5, 1.5])
    with pytest.raises(ValueError, match="call fit"):
        SetFit(*bert).predict(["a"])
    with pytest.raises(TypeError, match="put a single text into a list"):
        SetFit(*bert).vectors("abc")


def test_a_label_between_two_classes_is_refused():
    with pytest.raises(ValueError, match="an example has label 0.7; with 2 words"):
        ASK.ask("a film", [("a fine story", 0.7)])


# ---------------------------------------------------------------- studies


def test_rates_are_chosen_on_the_first_task_alone(monkeypatch):
    monkeypatch.setattr(study, "_chosen", lambda method, name: 7.0)
    first, second = (study.rows(task) for task in study.TASKS[:2])
    grids = [row for row in first if any(isinstance(v, list) for v in row.values())]
    assert [row["method"] for row in grids] == ["bag of words", "probe", "SetFit", "full"]
    assert {row["labels"] for row in grids} == {study.COUNTS[-2]}
    assert not any(isinstance(v, list | results.ChosenFor) for row in second for v in row.values())
    for made in (first, second):
        assert {row["labels"] for row in made if row["method"] == "majority"} == set(study.COUNTS)


def test_a_problem_is_solved_by_its_steps_and_its_answer_is_the_last_number_written(monkeypatch):
    for _, work, answer in study.items(3, 50):
        assert work.endswith(f"The answer is {answer}.") and answer >= 0
    told = ["3 + 4 = 7. The answer is 7.", "no number"]
    monkeypatch.setattr(study, "said", lambda seed, thinking: told)
    monkeypatch.setattr(study, "items", lambda seed, n: [("", "", 7), ("", "", 7)])
    assert study.run_thought(1, "test", "step by step")["accuracy"].tolist() == [True, False]


def test_pet_tunes_a_copy_on_each_cloze_and_its_logits_are_those_of_the_words_in_the_gap():
    masked, tokenizer = models.load("bert_mini_en")
    words = tokenizer.convert_tokens_to_ids(["bad", "good"])
    inputs = tokenizer(["a film . It was [MASK].", "It was [MASK]. so so"], padding=True, return_tensors="pt")
    given = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    holes = given["input_ids"] == tokenizer.mask_token_id
    masked.eval()
    with torch.no_grad():
        found = study._Gap(masked, tokenizer.mask_token_id, words)(**given)
        whole = masked(**given).logits[holes][:, words]
    assert torch.allclose(found, whole, atol=1e-5)
    before = {k: v.clone() for k, v in masked.state_dict().items()}
    few = study.part("sst2", "train").per_class(2, seed=1)
    guess = study._pet("valid", few, lr=1e-3, seed=1, steps=1)
    assert guess.shape == study.part("sst2", "valid").y.shape
    assert all(torch.equal(before[k], v) for k, v in models.load("bert_mini_en")[0].state_dict().items())


@pytest.mark.slow
def test_the_studies_run_store_their_rows_and_do_not_run_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path))
    study.main()
    stored = json.loads((tmp_path / "12_prompt.json").read_text())["quick"]
    assert {"map_sst2", "map_cr", "longer_cr", "wordings", "examples", "cloze", "pet", "thought"} <= set(stored)
    assert {"sst2", "cr"} <= set(study.measured())
    for task in study.TASKS:
        found = results.load_study(study.CHAPTER, f"map_{task}")
        assert {r["method"] for r in found.rows("accuracy")} == set(study.METHODS)
        assert all(len(r["values"]) == 2 for r in found.rows("accuracy", method="SetFit"))
    for name in ("run", "run_longer", "run_words", "run_shots", "run_cloze", "run_pet", "run_thought"):
        monkeypatch.setattr(study, name, lambda **_: pytest.fail("it ran again"))
    study.main()
    with pytest.raises(
        ValueError, match="no study 'map_mr'; use map_sst2, map_cr, longer, prompts, cloze, pet, thought, samples"
    ):
        study.main("map_mr")
