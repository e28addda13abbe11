"""Chapter 17's library: schedules equal scikit-learn's, estimators equal enumeration, searches that resume."""

import builtins
import itertools
import json
import math
import tempfile
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.model_selection import ParameterGrid, ParameterSampler

from ftbook import results, search
from ftbook.search import Options, Range
from ftbook.studies import search as study

SPACE = {"x": Range(1.0, 100.0, log=True), "k": Range(2, 9, integer=True), "kind": Options("a", "b")}


@pytest.fixture(autouse=True)
def own_results(tmp_path, monkeypatch):
    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path))


def test_draws_keep_to_the_space_and_extend():
    some = search.draw(SPACE, 500)
    assert all(1 <= s["x"] <= 100 and s["k"] in range(2, 10) and s["kind"] in "ab" for s in some)
    assert abs(np.mean([s["x"] < 10 for s in some]) - 0.5) < 0.08
    assert some[:7] == search.draw(SPACE, 7) and some[0] != search.draw(SPACE, 1, seed=1)[0]
    assert {s["kind"] for s in some} == {"a", "b"} and Options("a", "b").at(1.0) == "b"
    assert search.grid_choices(SPACE, 3) == {"x": [1.0, 10.0, 100.0], "k": [2, 6, 9], "kind": ["a", "b"]}
    assert Range(0, 2).grid(1) == [1.0]


@pytest.mark.parametrize("points", [1, 2, 3])
def test_a_grid_is_that_of_scikit_learn(points):
    choices = search.grid_choices(SPACE, points)
    ours = [dict(zip(choices, c, strict=True)) for c in itertools.product(*choices.values())]
    theirs = list(ParameterGrid(choices))
    assert len(ours) == len(theirs) and all(s in theirs for s in ours)


def test_random_settings_have_the_distribution_of_scikit_learn():
    space = {"lr": Range(1e-4, 1e-1, log=True), "dropout": Range(0.0, 0.6), "width": Range(16, 64, integer=True)}
    twins = {"lr": stats.loguniform(1e-4, 1e-1), "dropout": stats.uniform(0, 0.6), "width": stats.randint(16, 65)}
    ours, theirs = search.draw(space, 4000), list(ParameterSampler(twins, 4000, random_state=0))
    for name in space:
        assert stats.ks_2samp([s[name] for s in ours], [s[name] for s in theirs]).pvalue > 0.01


@given(low=st.integers(-9, 9), size=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_every_whole_number_of_a_range_is_as_likely_as_the_next(low, size):
    part, n = Range(low, low + size - 1, integer=True), 840 * size
    found = [part.at((i + 0.5) / n) for i in range(n)]
    assert [found.count(k) for k in range(low, low + size)] == [840] * size
    assert part.at(0.0) == low and part.at(1.0) == low + size - 1 and part.grid(2) == [low, low + size - 1]


@given(low=st.integers(1, 50), size=st.integers(2, 60))
@settings(max_examples=60, deadline=None)
def test_with_log_a_whole_number_is_as_likely_as_its_share_of_the_logarithm(low, size):
    part, high, n = Range(low, low + size, log=True, integer=True), low + size, 20_000
    found = np.bincount([part.at((i + 0.5) / n) for i in range(n)], minlength=high + 1)[low:] / n
    share = np.diff(np.log(np.arange(low, high + 2) - 0.5)) / np.log((high + 0.5) / (low - 0.5))
    assert np.abs(found - share).max() < 1e-3


@given(
    ends=st.tuples(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6)),
    u=st.floats(0, 1),
    log=st.booleans(),
    integer=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_a_value_lies_in_its_range_and_whole_numbers_are_whole(ends, u, log, integer):
    low, high = sorted(ends)
    if integer and math.ceil(low) > math.floor(high):
        with pytest.raises(ValueError, match="no whole number"):
            Range(low, high, log, integer)
        return
    part = Range(low, high, log, integer)
    for value in (part.at(u), *part.grid(3)):
        assert low <= value <= high and (isinstance(value, int) or not integer)


def sklearn_schedule(candidates, most, least, factor):
    from sklearn.dummy import DummyClassifier
    from sklearn.experimental import enable_halving_search_cv  # noqa: F401
    from sklearn.model_selection import HalvingGridSearchCV

    class Dummy(DummyClassifier):
        def __init__(self, a=0, units=1):
            super().__init__(strategy="most_frequent")
            self.a, self.units = a, units

    found = HalvingGridSearchCV(
        Dummy(),
        {"a": list(range(candidates))},
        factor=factor,
        resource="units",
        cv=2,
        max_resources=most,
        min_resources=least,
        refit=False,
    )
    found.fit(np.zeros((4, 1)), [0, 0, 1, 1])
    return list(zip(found.n_candidates_, found.n_resources_, strict=True))


@pytest.mark.parametrize("candidates", [1, 2, 5, 9, 20])
@pytest.mark.parametrize(
    ("most", "least", "factor"), [(27, "exhaust", 3), (100, 1, 2), (600, "exhaust", 2), (50, 7, 3)]
)
def test_schedule_equals_scikit_learn(candidates, most, least, factor):
    ours = search.halving_schedule(candidates, most, 1 if least == "exhaust" else least, factor, least == "exhaust")
    assert ours == sklearn_schedule(candidates, most, least, factor)


@given(value=st.integers(1, 10**6), base=st.integers(2, 7))
@settings(max_examples=100, deadline=None)
def test_a_whole_logarithm_is_the_largest_power_that_fits(value, base):
    k = search._whole_log(value, base)
    assert base**k <= value < base ** (k + 1)


@given(scores=st.lists(st.floats(-5, 5), min_size=1, max_size=6), n=st.integers(1, 4))
@settings(max_examples=80, deadline=None)
def test_expected_best_equals_enumeration(scores, n):
    both = [max(p) for p in itertools.product(scores, repeat=n)]
    assert math.isclose(search.expected_best(scores, n, replacement=True), np.mean(both), abs_tol=1e-9)
    if n <= len(scores):
        subsets = list(itertools.combinations(scores, n))
        assert math.isclose(search.expected_best(scores, n), np.mean([max(s) for s in subsets]), abs_tol=1e-9)
        least = np.mean([min(s) for s in subsets])
        assert math.isclose(search.expected_best(scores, n, mode="min"), least, abs_tol=1e-9)


def test_best_of_equals_enumeration_and_brackets():
    rng = np.random.default_rng(0)
    valid, test = rng.random(8), rng.random(8)
    found = {r["n"]: r for r in search.best_of(valid, test, [1, 3, 8], resamples=200)}
    subsets = [max(s, key=lambda i: valid[i]) for s in itertools.combinations(range(8), 3)]
    assert math.isclose(found[3]["valid"][0], valid[subsets].mean()) and math.isclose(
        found[3]["test"][0], test[subsets].mean()
    )
    assert math.isclose(found[3]["gap"][0], (valid - test)[subsets].mean())
    assert (
        math.isclose(found[3]["added"][0], found[3]["gap"][0] - found[1]["gap"][0])
        and abs(found[1]["added"][0]) < 1e-12
    )
    assert math.isclose(found[1]["valid"][0], valid.mean()) and found[8]["valid"][0] == valid.max()
    assert all(r[k][1] <= r[k][2] for r in found.values() for k in ("valid", "test", "gap"))


def test_halving_finds_the_best_resumes_and_counts():
    calls = []

    def run(seed, x, steps):
        calls.append((x, steps))
        return {"score": -((x - 4) ** 2) - 3 / steps}

    def go(**more):
        return search.successive_halving(
            run,
            [{"x": x} for x in range(9)],
            resource="steps",
            schedule=search.halving_schedule(9, 9),
            metric="score",
            chapter="toy",
            name="h",
            **more,
        )

    first = go()
    assert first.best == {"x": 4} and [len(r) for r in first.rungs] == [9, 3, 1] and first.cost == 9 + 9 + 9
    assert len(calls) == 13 and go().best == {"x": 4} and len(calls) == 13
    assert go(mode="min").best["x"] in (0, 8)


SCORES = st.floats(-9, 9) | st.sampled_from([math.nan, math.inf, None])  # None: the run fails


@given(scores=st.lists(SCORES, min_size=9, max_size=9), mode=st.sampled_from(["max", "min"]))
@settings(max_examples=25, deadline=None)
def test_halving_ranks_a_score_that_is_no_number_last_and_loses_no_run(scores, mode):
    def run(seed, i, steps):
        if scores[i] is None:
            raise RuntimeError("diverged")
        return {"score": scores[i]}

    def go():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return search.successive_halving(
                run,
                [{"i": i} for i in range(9)],
                resource="steps",
                metric="score",
                mode=mode,
                schedule=search.halving_schedule(9, 9),
                chapter="toy",
                name="n",
            )

    ended = [i for i in range(9) if scores[i] is not None]
    numbers = [i for i in ended if math.isfinite(scores[i])]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("FTBOOK_RESULTS", folder)
        if not numbers:
            with pytest.raises(RuntimeError, match="no run with steps=1 ended with a number as 'score'"):
                go()
            return
        found = go()
        better = {"max": max, "min": min}[mode]
        assert scores[found.best["i"]] == better(scores[i] for i in numbers)
        assert sorted(r["i"] for r in found.rungs[0]) == ended
        assert [r["score"] is None for r in found.rungs[0]] == sorted(i not in numbers for i in ended)


def test_halving_goes_on_with_the_exact_setting_and_names_a_missing_metric():
    seen = []

    def run(seed, lr, steps):
        seen.append(lr)
        return {"score": lr}

    where = {"resource": "steps", "chapter": "toy", "name": "e"}
    settings = [{"lr": 1 / 3}, {"lr": 1 / 7}, {"lr": 1 / 9}]
    found = search.successive_halving(run, settings, schedule=[(3, 1), (1, 3)], metric="score", **where)
    assert found.best == {"lr": 1 / 3} and seen[-1] == 1 / 3
    with pytest.raises(ValueError, match="returned no 'accuracy'"):
        search.successive_halving(run, settings, schedule=[(3, 1)], metric="accuracy", **where)


@pytest.mark.parametrize(
    "call",
    [
        lambda: search.expected_best([0.1, math.nan], 1),
        lambda: search.best_of([0.1], [math.inf], [1]),
        lambda: search.expected_best([[0.1]], 1),
    ],
)
def test_estimates_refuse_scores_that_are_no_numbers(call):
    with pytest.raises(
        ValueError, match="no finite numbers; give one number per trial, a diverged trial that of chance"
    ):
        call()


def test_run_settings_keeps_what_ran(capsys):
    def run(seed, x):
        if x == 2:
            raise RuntimeError("no")
        return {"y": x + seed}

    with pytest.warns(UserWarning, match="failed"):
        rows = search.run_settings(run, [{"x": 1}, {"x": 2}], [0, 1], chapter="toy", name="s", progress=True)
    assert [(r["x"], r["seed"], r["y"]) for r in rows] == [(1, 0, 1.0), (1, 1, 2.0)]


def test_a_run_of_the_study_repeats_and_scores_the_test_questions_only_at_the_end():
    setting = {"lr": 1e-3, "weight_decay": 0.01, "warmup": 0.1, "dropout": 0.1}
    found = [study.run(0, steps=s, **setting) for s in (3, study.STEPS, study.STEPS)]
    assert found[1] == found[2] and "test_accuracy" in found[1] and "test_accuracy" not in found[0]
    small = [found[0][f"valid_{k}"] for k in range(study.FEW)]
    assert np.mean(small) == pytest.approx(found[0]["valid_accuracy"])


def test_the_study_stores_its_trials_searches_and_winners(tmp_path, monkeypatch):
    pytest.importorskip("optuna")

    def run(seed, steps=study.STEPS, **setting):
        score = -abs(math.log10(setting["lr"]) + 2) - 1 / steps
        return {"valid_accuracy": score, "valid_0": score, "test_accuracy": score}

    def run_winner(seed, split, search, C=None, **setting):
        return {"accuracy": C if C else -abs(math.log10(setting["lr"]) + 2)}

    monkeypatch.setattr(study, "run", run)
    monkeypatch.setattr(study, "run_winner", run_winner)
    with pytest.warns(UserWarning, match="at the edge"):
        study.main()
    stored = json.loads((tmp_path / "17_search.json").read_text())["quick"]
    assert len(stored["trials"]["value"]["runs"]) == study.TRIALS * len(study.RUNGS)
    halved = stored["halving"]["value"]
    assert len(halved) == study.REPEATS and {h["rungs reached by the best"] for h in halved} == {len(study.RUNGS)}
    assert all(h["best test"] == h["test"] and set(study.SPACE) < set(h) for h in halved)
    (one,) = stored["tpe"]["value"]
    assert len(one["valid"]) == study.EACH and one["lr"] > 0
    rows = results.load_study(study.CHAPTER, "winners").rows("accuracy")
    assert rows[0]["search"] == "bag of words" and rows[1]["lr"] == 1e-3 and len(rows) == 7
    with pytest.raises(ValueError, match="no study 'grid'; use trials, halving, tpe, winners"):
        study.main("grid")


def test_the_winner_of_a_search_trains_anew_on_the_labels_of_each_seed():
    one, two = (study.run_winner(s, "test", "by hand", **study.BY_HAND)["accuracy"] for s in (1, 2))
    assert len(one) == len(two) and (one != two).any()
    assert len(study.run_winner(1, "test", "bag of words", C=1.0)["accuracy"]) == len(one)


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_search_by_optuna_keeps_its_trials(sampler):
    pytest.importorskip("optuna")
    study = search.optuna_search(
        lambda seed, x, k, kind: {"loss": abs(x - 9) + k + (kind == "b")},
        SPACE,
        8,
        metric="loss",
        mode="min",
        sampler=sampler,
    )
    assert len(study.trials) == 8 and 2 <= study.best_params["k"] <= 9 and study.best_params["kind"] in "ab"


def test_without_optuna_the_message_helps(monkeypatch):
    real = builtins.__import__
    monkeypatch.setattr(
        builtins,
        "__import__",
        lambda name, *a, **k: (_ for _ in ()).throw(ImportError(name)) if name == "optuna" else real(name, *a, **k),
    )
    with pytest.raises(ImportError, match="pip install optuna"):
        search.optuna_search(lambda seed, **s: {"y": 0}, SPACE, 1, metric="y")


@pytest.mark.parametrize(
    "call",
    [
        lambda: Range(2, 1),
        lambda: Range(0, 1, log=True),
        lambda: Range(0, math.inf),
        lambda: Range(math.nan, 1),
        lambda: search.expected_best([1, 2], 1, mode="best"),
        lambda: Options(),
        lambda: search.draw(SPACE, 0),
        lambda: search.halving_schedule(0, 9),
        lambda: search.halving_schedule(9, 9, factor=1),
        lambda: search.selection_weights(5, 6),
        lambda: search.selection_weights(5, 0),
        lambda: search.best_of([1], [1, 2], [1]),
        lambda: search.optuna_search(None, SPACE, 1, metric="y", sampler="grid"),
        lambda: search.successive_halving(None, [], resource="r", schedule=[(1, 1)], metric="m", chapter="c", name="n"),
        lambda: search.successive_halving(
            None, [{}], resource="r", schedule=[(1, 1)], metric="m", chapter="c", name="n", mode="x"
        ),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError):
        call()
