"""Chapter 18: votes and weights, stacking, soups and snapshots, several tasks in one model, the studies."""

import copy
import json

import numpy as np
import pytest
import torch
from bodies import Body
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupts import Interrupt
from torch import nn

from ftbook import results
from ftbook.studies import together as study
from ftbook.texts import TextClassifier
from ftbook.together import (
    MultiTask,
    Snapshots,
    Stacking,
    TaskBatches,
    ambiguity,
    gradient_cosines,
    greedy_soup,
    meta_features,
    out_of_fold,
    pcgrad,
    simplex_weights,
    soup,
    task_shares,
    vote,
)
from ftbook.train import Checkpoint, Settings, fit

SOME = settings(deadline=None, max_examples=40)
PLAN = Settings(precision="fp32", progress=False)


def drawn(models: int = 3, n: int = 20, classes: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(classes), size=(models, n))


# ---------------------------------------------------------------- votes


@SOME
@given(st.integers(1, 6), st.integers(2, 5), st.integers(0, 10_000))
def test_an_ensemble_does_not_care_about_the_order_of_its_members(models, classes, seed):
    p, draws = drawn(models, 7, classes, seed), np.random.default_rng(seed)
    order, w = draws.permutation(models), draws.random(models) + 0.01
    for hard in (False, True):
        assert np.allclose(vote(p, w, hard=hard), vote(p[order], w[order], hard=hard))
        assert np.allclose(vote(p, w, hard=hard).sum(1), 1)


@SOME
@given(st.integers(1, 6), st.integers(2, 5), st.integers(0, 10_000))
def test_the_error_of_the_mean_is_the_mean_error_minus_the_spread(models, classes, seed):
    p, draws = drawn(models, 9, classes, seed), np.random.default_rng(seed)
    y, w = draws.integers(classes, size=9), draws.random(models) + 0.01
    members, spread, together = ambiguity(p, y, w)
    assert np.allclose(together, members - spread) and (spread >= 0).all()
    logs = -np.log(p[:, np.arange(9), y])
    mean = -np.log(vote(p, w)[np.arange(9), y])
    assert (mean <= (w / w.sum()) @ logs + 1e-12).all(), "never worse than the average member by log-loss"


def test_votes_and_means_equal_those_of_scikit_learn():
    from sklearn.ensemble import VotingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import GaussianNB
    from sklearn.tree import DecisionTreeClassifier

    draws = np.random.default_rng(0)
    x, y = draws.normal(size=(60, 3)), draws.integers(3, size=60)
    pair = [("a", LogisticRegression()), ("b", GaussianNB()), ("c", DecisionTreeClassifier(max_depth=2))]
    for weights in (None, [3, 1, 2]):
        for kind in ("soft", "hard"):
            theirs = VotingClassifier(pair, voting=kind, weights=weights).fit(x, y)
            said = [m.predict_proba(x) for m in theirs.estimators_]
            ours = vote(said, weights, hard=kind == "hard")
            assert (ours.argmax(1) == theirs.predict(x)).all()
            if kind == "soft":
                assert np.allclose(ours, theirs.predict_proba(x))


@pytest.mark.parametrize(
    "given_, weights, told",
    [
        ([], None, "no model is given"),
        ([[[0.5, 0.5]], [[0.2, 0.3, 0.5]]], None, "the same classes in the same order"),
        ([[0.5, 0.5]], None, "give .N, K. for each"),
        ([[[2.0, -1.0]]], None, "take the softmax"),
        ([[[0.5, 0.6]]], None, "take the softmax"),
        ([[[0.5, 0.5]]], [1, 1], "give 1 numbers"),
        ([[[0.5, 0.5]]], [-1], "at least 0"),
        ([[[0.5, 0.5]]], [0], "not all 0"),
    ],
)
def test_what_cannot_be_joined_is_refused(given_, weights, told):
    with pytest.raises(ValueError, match=told):
        vote(given_, weights)


@pytest.mark.parametrize(
    "target, told",
    [
        ([0], "one class number for each of the 2"),
        ([0, 2], "has the class 2"),
        ([-1, 0], "has the class -1"),
        ([0.0, 1.0], "the type float64"),
    ],
)
def test_targets_that_are_no_classes_are_refused(target, told):
    for use in (ambiguity, simplex_weights):
        with pytest.raises(ValueError, match=told):
            use(drawn(2, 2, 2), target)


# ---------------------------------------------------------------- weights and stacking


@SOME
@given(st.integers(2, 4), st.integers(0, 1_000))
def test_weights_on_the_simplex_are_as_good_as_those_of_a_general_solver(models, seed):
    from scipy.optimize import minimize

    p, y = drawn(models, 40, 3, seed), np.random.default_rng(seed).integers(3, size=40)
    right = p[:, np.arange(40), y]

    def loss(w):
        return -np.log(np.maximum(w @ right, 1e-12)).mean()

    ours = simplex_weights(p, y, steps=5000)
    theirs = minimize(
        loss,
        np.full(models, 1 / models),
        bounds=[(0, 1)] * models,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        method="SLSQP",
    )
    assert ours.min() >= 0 and abs(ours.sum() - 1) < 1e-9
    assert loss(ours) <= loss(theirs.x) + 1e-5


def test_weights_of_no_examples_are_refused():
    with pytest.raises(ValueError, match="examples to learn from"):
        simplex_weights(drawn(2, 0, 2), np.zeros(0, int))


class _Remembers:
    """Says what it saw, and nothing certain of what it did not see."""

    def fit(self, x, y):
        self.classes_, self.known = np.unique(y), dict(zip(map(str, x), y, strict=True))
        return self

    def predict_proba(self, x):
        found = np.full((len(x), len(self.classes_)), 1 / len(self.classes_))
        for i, one in enumerate(x):
            if str(one) in self.known:
                found[i] = self.classes_ == self.known[str(one)]
        return found


@pytest.mark.parametrize("x", [[f"text {i}" for i in range(30)], np.arange(30.0)[:, None]], ids=["texts", "array"])
def test_out_of_fold_no_example_is_predicted_by_a_model_that_saw_it(x):
    y = np.arange(30) % 3
    assert (_Remembers().fit(x, y).predict_proba(x).max(1) == 1).all()
    assert np.allclose(out_of_fold(_Remembers, x, y, 5), 1 / 3)


def test_stacking_equals_that_of_scikit_learn_on_the_same_folds():
    from sklearn.ensemble import StackingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.naive_bayes import GaussianNB

    draws = np.random.default_rng(0)
    x = draws.normal(size=(90, 4))
    for classes in (2, 3):
        y = (x[:, 0] > 0).astype(int) + (classes == 3) * (x[:, 1] > 0.5)
        cut = StratifiedKFold(3, shuffle=True, random_state=7)
        inner = out_of_fold(GaussianNB, x, y, 3, 7)
        assert np.allclose(inner, cross_val_predict(GaussianNB(), x, y, cv=cut, method="predict_proba"))
        pair = {"a": LogisticRegression, "b": GaussianNB}
        ours = Stacking(pair, C=0.5, folds=3, seed=7).fit(x, y)
        final = LogisticRegression(C=0.5, max_iter=2000)
        theirs = StackingClassifier([(n, m()) for n, m in pair.items()], final, cv=cut).fit(x, y)
        assert np.allclose(ours.predict_proba(x), theirs.predict_proba(x), atol=1e-6)
        assert (ours.predict(x) == theirs.predict(x)).all()
        assert meta_features([inner, inner]).shape == (90, 2 if classes == 2 else 6)


def test_stacking_refuses_what_it_cannot_do():
    from sklearn.naive_bayes import GaussianNB

    x, y = np.zeros((5, 1)), np.array([0, 0, 0, 1, 1])
    with pytest.raises(ValueError, match="the rarest class has 2 examples; give 2 to 2"):
        out_of_fold(GaussianNB, x, y, 5)
    with pytest.raises(ValueError, match="give 2 to 2"):
        out_of_fold(GaussianNB, x, y, 1)
    with pytest.raises(ValueError, match="5 examples and 4 labels"):
        out_of_fold(GaussianNB, x, y[1:], 2)
    for members in ({}, {"a": GaussianNB()}):
        with pytest.raises(ValueError, match="makes a fresh model"):
            Stacking(members)


@pytest.mark.parametrize(
    "y, told",
    [
        ([0, 2] * 4, "{0, 2}"),
        ([1, 2] * 4, "{1, 2}"),
        ([-1, 0] * 4, "{-1, 0}"),
        ([0.0, 1.0] * 4, "{0.0, 1.0}"),
        (["no", "yes"] * 4, "{'no', 'yes'}"),
        ([False, True] * 4, "{False, True}"),
        ([[0], [1]] * 4, "{0, 1}"),
        ([], "{}"),
    ],
)
def test_labels_that_are_no_whole_row_of_classes_are_refused_before_a_fit(y, told):
    from sklearn.naive_bayes import GaussianNB

    for run in (
        lambda x: out_of_fold(GaussianNB, x, y, 2),
        lambda x: Stacking({"a": GaussianNB}, folds=2).fit(x, y),
    ):
        with pytest.raises(ValueError) as error:
            run(np.zeros((len(y), 1)))
        assert str(error.value) == f"labels are {told}; give classes 0 to K - 1, each at least once"


def test_tables_and_sparse_matrices_give_what_an_array_gives():
    import pandas as pd
    from scipy import sparse
    from sklearn.linear_model import LogisticRegression

    draws = np.random.default_rng(0)
    x, y = draws.poisson(1.0, (40, 3)).astype(float), draws.permutation([0, 1] * 20)
    due = out_of_fold(LogisticRegression, x, y, 4)
    places = np.arange(40) + 7
    for other in (pd.DataFrame(x, index=places), sparse.csr_matrix(x), sparse.coo_matrix(x)):
        assert np.allclose(out_of_fold(LogisticRegression, other, y, 4), due, atol=1e-4)
    assert np.allclose(out_of_fold(LogisticRegression, x, pd.Series(y, index=places, dtype=object), 4), due)
    with pytest.raises(ValueError, match="40 examples and 39 labels"):
        out_of_fold(LogisticRegression, sparse.csr_matrix(x), y[1:], 4)


# ---------------------------------------------------------------- one model's price


def test_a_soup_of_many_short_numbers_is_added_up_in_long_ones():
    states = [{"w": torch.tensor([1.0 + i / 100]).bfloat16()} for i in range(20)]
    made = soup(states)["w"]
    due = torch.stack([s["w"].float() for s in states]).mean(0)
    assert made.dtype == torch.bfloat16 and torch.equal(made, due.bfloat16())
    assert soup([{"w": torch.ones(1).double()}])["w"].dtype == torch.float64


def test_a_greedy_soup_refuses_a_score_that_is_none():
    states = [{"w": torch.tensor([w])} for w in (0.0, 1.0)]
    with pytest.raises(ValueError, match="scores are .0.0, nan.; give a number for each state"):
        greedy_soup(states, lambda s: float("nan") if s["w"].item() else 0.0)


def test_a_soup_equals_the_average_of_torch_and_keeps_counters():
    from torch.optim.swa_utils import AveragedModel

    nets = [nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)) for _ in range(3)]
    theirs = AveragedModel(nets[0])
    for net in nets:
        theirs.update_parameters(net)
    ours = soup([net.state_dict() for net in nets])
    assert all(torch.allclose(p, ours[k]) for k, p in theirs.module.named_parameters())
    assert ours["1.num_batches_tracked"].dtype == torch.int64
    nets[0].load_state_dict(ours)
    one = soup([net.state_dict() for net in nets], [0, 2, 0])
    assert torch.equal(one["0.weight"], nets[1][0].weight)


def test_a_soup_of_other_architectures_is_refused():
    small, large = nn.Linear(2, 2).state_dict(), nn.Linear(3, 2).state_dict()
    with pytest.raises(ValueError, match="state 1 differs from the first in 'weight'"):
        soup([small, large])
    with pytest.raises(ValueError, match="differs from the first in 'bias'"):
        soup([small, {"weight": small["weight"]}])
    with pytest.raises(ValueError, match="no state is given"):
        soup([])


def test_a_greedy_soup_is_never_worse_than_its_best_member():
    states = [{"w": torch.tensor([w])} for w in (0.0, 2.0, 9.0, 1.1)]

    def score(state):
        return -abs(state["w"].item() - 1)

    best, chosen = greedy_soup(states, score)
    assert chosen[0] == 3 and score(best) >= max(map(score, states)) and 2 not in chosen


def test_snapshots_are_kept_at_the_ends_of_cycles_and_the_rate_is_that_of_torch():
    from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    restarts, rates = CosineAnnealingWarmRestarts(optimizer, T_0=3), []
    for _ in range(12):
        rates.append(restarts.get_last_lr()[0])
        optimizer.step()
        restarts.step()
    kept = Snapshots(4)
    assert np.allclose(rates, [kept.schedule(t, 12) for t in range(12)])
    net, seen = nn.Linear(2, 2), []

    class Watch:
        def on_step_end(self, run):
            seen.append(copy.deepcopy(run.model.state_dict()))

    plan = Settings(schedule=kept.schedule, precision="fp32", progress=False)
    data = (torch.randn(24, 2), torch.arange(24) % 2)
    fit(net, data, batch_size=2, lr=0.1, callbacks=[kept, Watch()], settings=plan)
    assert len(kept.states) == 4
    for state, step in zip(kept.states, (3, 6, 9, 12), strict=True):
        assert torch.equal(state["weight"], seen[step - 1]["weight"])
    assert torch.equal(kept.states[-1]["weight"], net.weight)


def test_cycles_of_unequal_length_end_with_the_run_and_too_many_are_refused():
    kept = Snapshots(3)
    assert [kept.schedule(t, 7) for t in (0, 2, 4)] == [1.0, 1.0, 1.0] and kept.schedule(7, 7) == 0
    with pytest.raises(ValueError, match="give at least 1"):
        Snapshots(0)
    with pytest.raises(ValueError, match="9 cycles in 2 steps"):
        fit(nn.Linear(2, 2), (torch.rand(4, 2), torch.tensor([0, 1, 0, 1])), batch_size=2, callbacks=[Snapshots(9)])


def test_snapshots_of_a_run_broken_off_are_those_of_the_unbroken_one(tmp_path):
    data = (torch.randn(6, 2), torch.arange(6) % 2)

    def run(path, at=0, seed=0):
        torch.manual_seed(seed)
        kept = Snapshots(3)
        plan = Settings(schedule=kept.schedule, precision="fp32", progress=False)
        callbacks = [kept, Checkpoint(path, every=1), Interrupt(at)]
        fit(nn.Linear(2, 2), data, batch_size=2, epochs=3, lr=0.1, callbacks=callbacks, settings=plan)
        return kept.states

    whole = run(tmp_path / "whole.pt")
    for at in (2, 4, 7):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / f"{at}.pt", at)
        found = run(tmp_path / f"{at}.pt", seed=5)
        assert all(torch.equal(a["weight"], b["weight"]) for a, b in zip(whole, found, strict=True)), at


# ---------------------------------------------------------------- several tasks


def part(n: int = 6, classes: int | None = 3, seed: int = 0, length: int = 5, tags: bool = False) -> dict:
    draws = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, (n, length), generator=draws)
    mask = torch.ones(n, length, dtype=torch.long)
    mask[::2, -2:] = 0
    shape = (n, length) if tags else (n,)
    labels = torch.randint(classes or 2, shape, generator=draws)
    if tags:
        labels[mask == 0] = -100
    return {"input_ids": ids, "attention_mask": mask} | ({"labels": labels} if classes else {})


def model(**how) -> MultiTask:
    torch.manual_seed(0)
    return MultiTask(Body(), {"a": 3, "b": 3, "tags": 4}, 8, tokens=["tags"], **how)


PARTS = {"a": part(seed=1), "b": part(4, seed=2), "tags": part(5, 4, seed=3, tags=True)}


def test_the_loss_is_the_mean_over_the_tasks_and_each_reads_its_own_head():
    net = model()
    out = net(**PARTS)
    plain = [
        nn.functional.cross_entropy(
            net.only(t)(**{k: v for k, v in PARTS[t].items() if k != "labels"}).flatten(0, -2),
            PARTS[t]["labels"].flatten(),
        )
        for t in PARTS
    ]
    assert torch.allclose(out["loss"], torch.stack(plain).mean())
    assert {t: tuple(z.shape) for t, z in out["logits"].items()} == {"a": (6, 3), "b": (4, 3), "tags": (5, 5, 4)}
    weighted = model(weights={"a": 2.0, "tags": 0.0})(**PARTS)["loss"]
    assert torch.allclose(weighted, (2 * plain[0] + plain[1]) / 3)


def test_one_task_of_many_equals_a_text_classifier():
    from ftbook import models

    body, tokenizer = models.load("bert_mini_en")
    body = body.bert.eval()
    single = TextClassifier(body, 2).eval()
    both = MultiTask(body, {"x": 2, "y": 5}, body.config.hidden_size).eval()
    both.heads["x"] = single.head
    from ftbook.texts import encode_texts

    inputs = encode_texts(["a fine film", "it rains and rains and rains"], tokenizer)
    assert torch.allclose(both.only("x")(**inputs), single(**inputs), atol=1e-5)


def test_labels_that_are_missing_in_some_tasks_lose_nothing():
    net, half = model(), copy.deepcopy(PARTS)
    half["a"]["labels"][3:] = -100
    first = {k: v[:3] for k, v in PARTS["a"].items()}
    assert torch.allclose(net(a=half["a"])["loss"], net(a=first)["loss"])
    half["b"]["labels"][:] = -100
    assert torch.allclose(net(a=half["a"], b=half["b"])["loss"], net(a=first)["loss"])
    assert "loss" not in net(a={k: v for k, v in PARTS["a"].items() if k != "labels"})
    with pytest.raises(ValueError, match="no part of b has a label that counts"):
        net(b=half["b"])


@pytest.mark.parametrize("surgery", [False, True])
@pytest.mark.parametrize("joint", [False, True])
def test_fit_learns_all_tasks(joint, surgery):
    net = model(surgery=surgery)
    loaders = {t: [p] for t, p in PARTS.items()}
    batches = TaskBatches(loaders, 60, None if joint else dict.fromkeys(PARTS, 1.0))
    before = net(**PARTS)["loss"].item()
    fit(net, batches, loss=None, lr=1e-2, settings=PLAN)
    assert net(**PARTS)["loss"].item() < 0.7 * before


def test_learned_weights_move_and_the_others_stay():
    net = model(weights="uncertainty")
    fit(net, TaskBatches({t: [p] for t, p in PARTS.items()}, 5), loss=None, lr=1e-2, settings=PLAN)
    assert (net.log_variance != 0).all()
    plain = model()
    fit(plain, TaskBatches({t: [p] for t, p in PARTS.items()}, 5), loss=None, lr=1e-2, settings=PLAN)
    assert (plain.log_variance == 0).all()
    losses = {t: torch.tensor(float(i + 1)) for i, t in enumerate(PARTS)}
    s = net.log_variance.detach()
    by_hand = sum(torch.exp(-s[i]) * (i + 1) + s[i] / 2 for i in range(3)) / 3
    assert torch.allclose(net.joined(losses), by_hand)


@pytest.mark.parametrize(
    "how, told",
    [
        ({"tokens": ["c"]}, "tokens and weights name .'c'."),
        ({"weights": {"c": 1.0}}, "tokens and weights name .'c'."),
        ({"weights": "even"}, "'uncertainty', or a dict"),
        ({"weights": {"a": -1.0}}, "weights are {'a': -1.0}; give numbers of at least 0, not all 0"),
        ({"weights": {"a": float("nan")}}, "weights are {'a': nan}"),
        ({"weights": {"a": float("inf")}}, "weights are {'a': inf}"),
        ({"weights": {"a": 0}}, "weights are {'a': 0}; give numbers of at least 0, not all 0"),
    ],
)
def test_a_model_that_cannot_be_is_refused(how, told):
    with pytest.raises(ValueError, match=told):
        MultiTask(Body(), {"a": 2}, 8, **how)
    with pytest.raises(ValueError, match="those of heads: none"):
        MultiTask(Body(), {}, 8)


def test_parts_that_do_not_fit_their_task_are_refused():
    net = model()
    with pytest.raises(ValueError, match="task 'a' has the label -1; its head has 3 classes"):
        net(a=PARTS["a"] | {"labels": torch.full_like(PARTS["a"]["labels"], -1)})
    with pytest.raises(ValueError, match="task 'a' has labels of torch.float32; give class numbers"):
        net(a=PARTS["a"] | {"labels": PARTS["a"]["labels"] + 0.7})
    with pytest.raises(ValueError, match="task 'a' has no attention_mask, only input_ids, labels"):
        net(a={k: PARTS["a"][k] for k in ("input_ids", "labels")})
    with pytest.raises(ValueError, match="there is no task 'c'; it has a, b, tags"):
        net(c=PARTS["a"])
    with pytest.raises(ValueError, match="one label for each position"):
        net(tags=PARTS["a"])
    with pytest.raises(ValueError, match="one label for each row"):
        net(a=PARTS["tags"])
    with pytest.raises(ValueError, match="task 'a' has the label 3; its head has 3 classes"):
        net(a=PARTS["a"] | {"labels": torch.full((6,), 3)})


# ---------------------------------------------------------------- which task, which gradient


@SOME
@given(st.integers(1, 6), st.integers(1, 200), st.floats(0, 2), st.integers(0, 1_000))
def test_every_task_gets_its_share_of_the_batches_to_within_one(tasks, steps, power, seed):
    sizes = dict(zip("abcdef", np.random.default_rng(seed).integers(1, 500, tasks).tolist(), strict=False))
    shares = task_shares(sizes, power)
    batches = TaskBatches({t: [{"labels": t}] for t in sizes}, steps, shares, seed)
    met = [task for batch in batches for task in batch]
    assert len(met) == len(batches) == steps and abs(sum(shares.values()) - 1) < 1e-9
    for task, share in shares.items():
        assert met.count(task) == batches.counts()[task] and abs(met.count(task) - share * steps) < 1


def test_batches_repeat_with_a_seed_are_mixed_anew_in_an_epoch_and_ask_loaders_for_another_order():
    class Loader:
        def __init__(self):
            self.turns = []

        def set_epoch(self, epoch):
            self.turns.append(epoch)

        def __iter__(self):
            return iter([{"labels": k} for k in range(3)])

    loaders = {"a": Loader(), "b": [{"labels": 7}]}
    batches = TaskBatches(loaders, 12, {"a": 2, "b": 1}, seed=3)
    first, again = ([list(b)[0] for b in batches] for _ in range(2))
    assert first == again and loaders["a"].turns == [0, 1, 2, 0, 1, 2]
    batches.set_epoch(1)
    assert [list(b)[0] for b in batches] != first and loaders["a"].turns[-1] == 1002
    joint = list(TaskBatches(loaders, 4))
    assert all(list(b) == ["a", "b"] for b in joint) and [b["a"]["labels"] for b in joint] == [0, 1, 2, 0]


def test_task_batches_refuse_what_they_cannot_draw():
    with pytest.raises(ValueError, match="give both for the same tasks"):
        TaskBatches({"a": [1]}, 3, {"b": 1.0})
    with pytest.raises(ValueError, match="at least one step"):
        TaskBatches({"a": [1]}, 0)
    with pytest.raises(ValueError, match="shares are .-1, 2.; give 2 numbers of at least 0, one for each task"):
        TaskBatches({"a": [1], "b": [1]}, 3, {"a": -1, "b": 2})
    with pytest.raises(ValueError, match="loader of 'a' gave no batch"):
        list(TaskBatches({"a": iter([1])}, 3))
    with pytest.raises(ValueError, match="at least one example"):
        task_shares({"a": 3, "b": 0})


def official_pcgrad(g, orders):
    """The algorithm of arXiv:2001.06782, line by line."""
    made = [v.clone() for v in g]
    for i, order in enumerate(orders):
        for j in order:
            if j != i and torch.dot(made[i], g[j]) < 0:
                made[i] -= torch.dot(made[i], g[j]) / g[j].norm() ** 2 * g[j]
    return torch.stack(made)


@SOME
@given(st.integers(1, 5), st.integers(0, 10_000))
def test_surgery_equals_the_algorithm_of_its_paper(tasks, seed):
    g = torch.randn(tasks, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.manual_seed(seed)
    orders = [torch.randperm(tasks).tolist() for _ in range(tasks)]
    torch.manual_seed(seed)
    assert torch.allclose(pcgrad(g), official_pcgrad(g, orders))
    if tasks == 2:
        assert (pcgrad(g) @ g.T >= -1e-9).all(), "of two tasks no step is against the other"


def test_gradients_that_agree_and_gradients_of_zero_are_left_alone():
    agree = torch.tensor([[1.0, 0.2], [0.5, 0.1]])
    assert torch.equal(pcgrad(agree), agree)
    assert torch.equal(pcgrad(torch.tensor([[1.0, 0.0], [0.0, 0.0]])), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="give .T, P."):
        pcgrad(torch.zeros(3))


def gradients(net, parts):
    net.zero_grad()
    torch.manual_seed(5)
    loss = net(**parts)["loss"]
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("weights", [None, {"a": 0.5}, "uncertainty"])
def test_surgery_changes_the_gradient_of_the_body_and_nothing_else(weights):
    net = model(weights=weights)
    plain_loss, plain = gradients(net, PARTS)
    net.surgery = True
    loss, changed = gradients(net, PARTS)
    assert abs(loss - plain_loss) < 1e-6 and set(plain) == set(changed)
    rows = []
    for task in PARTS:
        net.surgery = False
        own = gradients(net, {task: PARTS[task]})[1]
        rows.append(torch.cat([own[n].flatten() for n, _ in net.named_parameters() if n.startswith("body")]))
    torch.manual_seed(5)
    wanted = pcgrad(torch.stack(rows)).mean(0)
    got = torch.cat([changed[n].flatten() for n, _ in net.named_parameters() if n.startswith("body")])
    assert torch.allclose(got, wanted, atol=1e-6)
    for name in plain:
        if not name.startswith("body"):
            assert torch.allclose(plain[name], changed[name], atol=1e-6), name


def test_a_body_that_is_not_trained_has_no_gradients_to_compare():
    net = model(surgery=True)
    net.body.requires_grad_(False)
    for run in (lambda: net(**PARTS), lambda: gradient_cosines(net, PARTS)):
        with pytest.raises(ValueError, match="no weight of the body is trained"):
            run()


def test_cosines_are_symmetric_and_leave_the_model_alone():
    net = model()
    before = copy.deepcopy(net.state_dict())
    tasks, cosines = gradient_cosines(net, PARTS | {"b": PARTS["a"]})
    assert tasks == ["a", "b", "tags"] and torch.allclose(cosines, cosines.T)
    assert torch.allclose(cosines.diagonal(), torch.ones(3)) and cosines.abs().max() < 1 + 1e-5
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    net.heads["b"].load_state_dict(net.heads["a"].state_dict())
    assert gradient_cosines(net, {"a": PARTS["a"], "b": PARTS["a"]})[1].min() > 1 - 1e-5
    assert cosines.abs().max() <= 1


# ---------------------------------------------------------------- studies


def test_rates_are_chosen_for_the_ways_that_train_and_taken_by_those_that_join():
    ways = {(r["way"], r.get("models", 1)): r for r in study.rows()}
    chosen = [w for (w, _), r in ways.items() if isinstance(r.get("lr"), list)]
    assert chosen[:4] == ["one model", "SWA", "trained longer", "snapshots"]
    assert chosen[4:] == ["snapshots, one run", "mean, own rate", "soup, own rate"]
    taken = [r for r in ways.values() if isinstance(r.get("lr"), results.ChosenFor)]
    assert len(taken) == len(ways) - 10 and all(r["models"] > 1 for r in taken)
    for made in (study.kind_rows(), study.task_rows(), study.pair_rows()):
        assert any(isinstance(r, results.Baseline) for r in made)


def test_snapshots_of_one_run_have_its_epochs_and_the_others_as_many_as_all_members(monkeypatch):
    seen = []
    monkeypatch.setattr(study, "fit", lambda *_, epochs, callbacks, **about: seen.append((epochs, len(callbacks))))
    for how in ("", "snapshots, one run", "snapshots", "longer"):
        study._tuned(1, 0, 1e-3, how)
    once, long = seen[0][0], seen[0][0] * study.EQUAL
    assert seen == [(once, 0), (once, 1), (long, 1), (long, 0)]


def test_learned_weights_have_a_rate_of_their_own_and_all_else_is_trained_as_before():
    about = {"tasks": tuple(study.TRAIN), "lr": 1e-3, "steps": 2, "weights": "uncertainty"}
    shared, same, apart = (study.trained(1, own=own, **about).state_dict() for own in (None, 1e-3, 0.1))
    assert all(torch.allclose(same[k], v, atol=1e-6) for k, v in shared.items())
    assert apart["log_variance"].abs().min() > 10 * shared["log_variance"].abs().max()
    by_way = {r["way"]: r for r in study.task_rows() if "own" in r}
    assert set(by_way) == {"all, uncertainty"} and isinstance(by_way["all, uncertainty"]["lr"], results.ChosenFor)


def test_the_weights_of_the_losses_are_told_where_they_are_learned():
    found = study.run_tasks(1, "valid", "all, uncertainty", 1e-3, own=0.1)
    weights = [found[f"weight of {t}"] for t in study.TRAIN]
    assert min(weights) > 0 and max(abs(w - 1) for w in weights) > 0.01
    assert not any(k.startswith("weight") for k in study.run_tasks(1, "valid", "all tasks a step", 1e-3))


def test_one_model_at_the_chosen_rate_is_the_first_of_those_that_are_joined():
    lr = study.RATES[0]
    alone = study._joined(1, "one model", 1, lr, chosen=False)
    first, mean = (study._joined(1, way, 1, lr, chosen=True) for way in ("one model", "mean"))
    assert len(alone) == len(first) == 1 and first[0] is mean[0]
    assert all(np.array_equal(alone[0][split], first[0][split]) for split in ("valid", "test"))


def test_the_layers_that_the_studies_train_attend_in_plain_steps_and_the_pretrained_ones_do_not():
    for model in (study.Shared(), study._tuned(1, 0, 1e-3)[0]):
        assert {layer.attention.self.config._attn_implementation for layer in model.layers} == {"eager"}
    assert study.encoder()[0].config._attn_implementation == "sdpa"


def test_the_tags_of_kept_states_are_scored_as_a_tagger_scores_them():
    from types import SimpleNamespace

    from ftbook.ner import NERTagger
    from ftbook.studies import ner
    from ftbook.studies.finetune import below

    torch.manual_seed(0)
    net = study.trained(1, (study.TAGS,), 1e-3, 2)
    labels = ner.corpora()[0].labels

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.only = net.only(study.TAGS)
            self.config = SimpleNamespace(num_labels=len(labels), id2label=dict(enumerate(labels)))

        def forward(self, input_ids, attention_mask):
            return SimpleNamespace(
                logits=self.only(**below({"input_ids": input_ids, "attention_mask": attention_mask}))
            )

    tagger = NERTagger(Whole(), study.encoder()[1], study.LONG, study.LONG // 4)
    theirs = ner.scores(tagger, study._tagged("valid")[0])["test_f1"]
    ours = study.right(net, study.TAGS, "valid")
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.slow
def test_the_studies_run_store_their_rows_and_do_not_run_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path))
    study.main()
    stored = json.loads((tmp_path / "18_together.json").read_text())["quick"]
    assert {"ways", "kinds", "tasks", "pairs", "conflict"} <= set(stored)
    ways = results.load_study(study.CHAPTER, "ways")
    parts = [[r.mean for r in ways.rows(m)] for m in ("brier_members", "brier_spread", "brier")]
    assert np.allclose(np.subtract(*parts[:2]), parts[2], atol=1e-5)
    tasks = results.load_study(study.CHAPTER, "tasks")
    assert {*study.TRAIN, "mean"} <= set(tasks.metrics)
    assert {r["way"] for r in tasks.rows("mean")} >= {*study.WAYS, "a model for each", "majority"}
    for name in ("run", "run_kinds", "run_tasks", "run_pair"):
        monkeypatch.setattr(study, name, lambda **_: pytest.fail("it ran again"))
    study.main("ways", "kinds", "tasks", "pairs")
    with pytest.raises(ValueError, match="no study 'soups'; use ways, kinds, tasks, pairs, conflict"):
        study.main("soups")
