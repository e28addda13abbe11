"""Chapter 23: what was kept and gained, importance of weights, memories, the sequence, its files, the gate, the studies."""

import copy
import json

import numpy as np
import pytest
import torch
from bodies import Body
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ftbook import results
from ftbook.continual import (
    AGEM,
    Method,
    PathImportance,
    Pull,
    Record,
    Remember,
    Replay,
    Reservoir,
    Router,
    Task,
    class_numbers,
    fisher,
    gate,
    learn,
    transfer,
)
from ftbook.regularize import l2_sp
from ftbook.studies import continual as study
from ftbook.together import MultiTask
from ftbook.train import Settings, fit

SOME = settings(deadline=None, max_examples=30)
PLAN = Settings(precision="fp32", weight_decay=0.0, progress=False)


class Net(nn.Module):
    """Two layers whose input has a name."""

    def __init__(self, inputs: int = 4, classes: int = 3, dropout: float = 0.0):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Dropout(dropout))
        self.head = nn.Linear(6, classes)

    def forward(self, x):
        return self.head(self.body(x))


def rows(n: int = 24, classes: int = 3, seed: int = 0) -> dict:
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=draws)
    return {"x": x, "labels": (x @ torch.randn(4, classes, generator=draws)).argmax(1)}


def texts(n: int = 16, classes: int = 2, seed: int = 0, length: int = 5) -> dict:
    draws = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, (n, length), generator=draws)
    mask = torch.ones(n, length, dtype=torch.long)
    mask[::2, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids[:, 0] % classes}


def tasks(n: int = 3, heads: bool = False) -> list:
    if heads:
        return [Task(f"t{i}", texts(seed=i, length=4 + i), texts(8, seed=9 + i), f"t{i}") for i in range(n)]
    return [Task(f"t{i}", rows(seed=i), rows(12, seed=9 + i)) for i in range(n)]


def model(heads: bool = False, **how) -> nn.Module:
    torch.manual_seed(0)
    return MultiTask(Body(), {f"t{i}": 2 for i in range(3)}, 8) if heads else Net(**how)


METHODS = {
    "plain": Method,
    "L2-SP": lambda: Pull(0.1, "equal"),
    "EWC": lambda: Pull(10.0, rows=8),
    "SI": lambda: Pull(0.1, "path"),
    "LwF": lambda: Remember(1.0),
    "replay": lambda: Replay(10, rows=4),
    "DER": lambda: Replay(10, logits=0.5, rows=4),
    "A-GEM": lambda: AGEM(10, rows=4),
}
each_method = pytest.mark.parametrize("name", METHODS)
FITTING = {"epochs": 2, "batch_size": 6, "lr": 0.05, "settings": PLAN}


# ---------------------------------------------------------------- what was kept


@SOME
@given(st.integers(2, 6), st.integers(0, 1000))
def test_transfer_is_what_its_equations_say(n, seed):
    r = np.random.default_rng(seed).random((n, n))
    before, alone = np.random.default_rng(seed + 1).random((2, n))
    found = transfer(r, before, alone)
    assert np.isclose(found["average"], sum(r[n - 1, j] for j in range(n)) / n)
    assert np.isclose(found["backward"], sum(r[n - 1, j] - r[j, j] for j in range(n - 1)) / (n - 1))
    worst = [max(r[i, j] for i in range(j, n - 1)) - r[n - 1, j] for j in range(n - 1)]
    assert np.isclose(found["forgetting"], sum(worst) / (n - 1)) and found["forgetting"] >= -found["backward"] - 1e-9
    assert np.isclose(found["forward"], sum(r[j - 1, j] - before[j] for j in range(1, n)) / (n - 1))
    assert np.isclose(found["learning"], sum(r[j, j] - alone[j] for j in range(1, n)) / (n - 1))


def test_what_lies_above_the_diagonal_need_not_be_known():
    found = transfer([[0.5, np.nan], [0.5, 1.0]])
    assert found == {"average": 0.75, "backward": 0.0, "forgetting": 0.0}
    assert transfer([[0.8]]) == {"average": 0.8}


def known(width: int) -> Router:
    router = Router()
    router.add("a", torch.zeros(1, width))
    return router


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda: transfer([[0.5, 0.5]]), "shape \\(1, 2\\)"),
        (lambda: transfer([[0.5, 0.5], [np.nan, 0.5]]), "every task is scored after itself"),
        (lambda: transfer([[50, 50], [50, 50]]), "from 0 to 1"),
        (lambda: transfer(np.eye(2), before=[0.5]), "before has the shape \\(1,\\)"),
        (lambda: transfer(np.eye(2), before=50), "before has the shape \\(\\)"),
        (lambda: transfer(np.eye(2), before=[50, 50]), "before is \\[50.0, 50.0\\].*50 % is 0.5"),
        (lambda: transfer(np.eye(2), alone=[0.5, np.nan]), "alone is .*from 0 to 1"),
        (
            lambda: transfer([[0.5, np.nan], [0.5, 1.0]], before=[0.5, 0.5]),
            "learn with ahead=True, or leave out before",
        ),
        (lambda: class_numbers({"a": ["x"], "b": ["x"]}), "'x' belongs to 'a' and to 'b'.*call it 'b: x'"),
        (lambda: class_numbers({"a": ["x", "x"]}), "a list of different names"),
        (lambda: class_numbers({"a": "xy"}), "a list of different names"),
        (lambda: Task("a", rows(4), {"x": torch.zeros(2, 4)}), "test of task 'a'"),
        (lambda: Task("a", rows(4) | {"x": torch.zeros(2, 4)}, rows(4)), "train of task 'a' has the rows"),
        (lambda: Task("a", rows(4), rows(0)), "test of task 'a' has no rows"),
        (lambda: Task("a", rows(0), rows(4)), "train of task 'a' has no rows"),
        (lambda: fisher(model(), rows(4), labels="wrong"), "labels='wrong'"),
        (lambda: fisher(model(), {"labels": torch.zeros(4)}), "rows {'labels': 4}; give what the net reads"),
        (
            lambda: fisher(model(), {"x": torch.zeros(4, 4)}, labels="true"),
            'reads "labels" and the data have x; give them',
        ),
        (lambda: fisher(model(), {"x": torch.zeros(4, 4), "labels": torch.zeros(3)}), "as many rows of each"),
        (lambda: fisher(model().requires_grad_(False), rows(4)), "Net has no parameter that is trained"),
        (lambda: fisher(model(), rows(4), group=2, at_once=2), "one of group and at_once as 1"),
        (lambda: Pull(-1.0), "strength must be at least 0 and finite, got -1"),
        (lambda: Pull(1.0, "weights"), "importance must be one of 'equal', 'fisher', 'path', got 'weights'"),
        (lambda: Pull(np.inf), "strength must be at least 0 and finite, got inf"),
        (lambda: Pull(1.0, labels="foo"), "labels must be one of 'model', 'all', 'true', got 'foo'"),
        (lambda: Pull(1.0, rows=0), "rows must be an integer >= 1"),
        (lambda: Pull(1.0, damping=np.nan), "damping must be positive and finite"),
        (lambda: Remember(np.nan), "strength=nan"),
        (lambda: Remember(1.0, np.inf), "temperature=inf"),
        (lambda: Remember(1.0, 0.0), "temperature greater than 0"),
        (lambda: Reservoir(0), "size must be an integer >= 1, got 0"),
        (lambda: Reservoir(2.5), "size must be an integer >= 1, got 2.5"),
        (lambda: Reservoir(2).add(rows(4) | {"labels": torch.zeros(3)}), "rows {'x': 4, 'labels': 3}; give as many"),
        (lambda: Reservoir(2).add({}), "rows {}; give as many of each, of one name at least"),
        (lambda: Replay(2.5), "size must be an integer >= 1"),
        (lambda: Replay(5, rows=0), "rows must be an integer >= 1"),
        (lambda: Replay(5, np.inf), "strength must be at least 0 and finite"),
        (lambda: Replay(5, logits=-1.0), "logits must be at least 0"),
        (lambda: Router()(torch.zeros(1, 2)), "knows no task"),
        (lambda: Router().add("a", torch.zeros(2)), "shape \\(2,\\)"),
        (lambda: known(2).add("b", torch.zeros(1, 3)), "shape \\(1, 3\\), those of the tasks so far \\(N, 2\\)"),
        (lambda: known(2)(torch.zeros(4, 3)), "shape \\(4, 3\\).*features of one model"),
        (lambda: known(2)(torch.zeros(2)), "shape \\(2,\\)"),
        (lambda: Router().add("a", torch.tensor([[0.0, np.nan], [0.0, 1.0]])), "1 of the 2 rows of features hold NaN"),
        (lambda: known(2)(torch.full((3, 2), np.inf)), "3 of the 3 rows of features hold NaN or infinity"),
        (lambda: gate({"a": [True, True]}, {"b": [True, True]}), "give the same"),
        (lambda: gate({"a": [True] * 3}, {"a": [True] * 2}), "same two or more"),
        (lambda: gate({"a": [True] * 3}, {"a": [True] * 3}, margin=-1), "a margin from 0 to 1"),
        (lambda: gate({"a": [True] * 3}, {"a": [True] * 3}, margin=3), "margin=3.*3 points are 0.03"),
        (lambda: gate({"a": [True] * 3}, {"a": [True] * 3}, margin=np.nan), "margin=nan"),
        (lambda: gate({"a": [0.9, 0.8]}, {"a": [1, 0]}), "set 'a' holds 0.9; give True or False"),
        (lambda: gate({"a": [1, 0]}, {"a": [1, np.nan]}), "set 'a' holds nan"),
        (lambda: gate({"a": [1, 0]}, {"a": [2, 1]}), "set 'a' holds 2; .*whether the model is right"),
        (lambda: learn(model(), []), "at least one"),
        (lambda: learn(model(), [*tasks(1), *tasks(1)]), "a name of its own"),
        (lambda: learn(model(), tasks(1), loss="mse"), "come from the method"),
        (lambda: learn(model(), tasks(1, heads=True)), "Net has no heads by name"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason(call, told):
    with pytest.raises((ValueError, TypeError), match=told):
        call()


@pytest.mark.parametrize("which", ["train", "test"])
@pytest.mark.parametrize(
    "bad, told", [(3, "from 0 to 3; its head knows 3 classes"), (-1, "from -1 to"), (0.5, "float32")]
)
def test_labels_that_cannot_be_in_a_later_task_stop_it_before_the_first_is_trained(which, bad, told):
    net, data = model(), tasks(2)
    before = copy.deepcopy(net.state_dict())
    part = {k: v.clone() for k, v in getattr(data[1], which).items()}
    part["labels"] = part["labels"].float() if bad == 0.5 else part["labels"]
    part["labels"][1] = bad
    parts = {"train": data[1].train, "test": data[1].test, which: part}
    with pytest.raises(ValueError, match=f"{which} of task 't1' has labels .*{told}"):
        learn(net, [data[0], Task("t1", **parts)], **FITTING)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_what_a_gate_cannot_compare_stops_it_before_training():
    net = model()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="a margin from 0 to 1"):
        learn(net, tasks(1), guards={"g": tasks(1)[0]}, margin=-1, **FITTING)
    with pytest.raises(ValueError, match="two or more"):
        learn(net, tasks(1), guards={"g": Task("g", rows(1), rows(1))}, **FITTING)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_classes_of_one_name_are_one_class_only_where_that_is_said():
    classes, numbers = class_numbers({"a": ["no", "yes"], "b": ["yes", "no", "so"]}, shared=True)
    assert classes == ["no", "yes", "so"] and numbers["b"].tolist() == [1, 0, 2]


# ---------------------------------------------------------------- importance of weights


def by_hand(net, data, labels) -> dict:
    """Squared gradients of each example, by one call of autograd each."""
    total = {k: torch.zeros_like(p) for k, p in net.named_parameters()}
    for i, x in enumerate(data["x"]):
        z = net(x=x[None]).log_softmax(1)[0]
        ways = [(1.0, int(data["labels"][i]))] if labels == "true" else [(v.exp().item(), k) for k, v in enumerate(z)]
        for share, k in ways:
            for (name, _), g in zip(
                net.named_parameters(), torch.autograd.grad(z[k], net.parameters(), retain_graph=True), strict=True
            ):
                total[name] += share * g**2 / len(data["x"])
    return total


@pytest.mark.parametrize("labels", ["all", "true"])
@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_fisher_equals_autograd_example_by_example(labels, at_once):
    net, data = model(), rows(10)
    ours, theirs = fisher(net, data, labels=labels, at_once=at_once), by_hand(net, data, labels)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[k], theirs[k], atol=1e-7, rtol=1e-4) for k in ours)


def test_labels_that_are_drawn_give_the_fisher_information_on_average():
    net, data = model(), rows(6)
    many = [fisher(net, data, seed=s, at_once=6) for s in range(300)]
    exact = fisher(net, data, labels="all")
    for k, v in exact.items():
        draws = torch.stack([m[k] for m in many])
        error = draws.std(0) / len(many) ** 0.5
        assert ((draws.mean(0) - v).abs() <= 5 * error + 1e-6).all(), k
    first, again = (fisher(net, data, at_once=n) for n in (1, 3))
    assert all(torch.allclose(first[k], again[k], atol=1e-7) for k in first), "the draw belongs to the example"


def test_squaring_the_gradient_of_a_batch_is_another_thing():
    torch.manual_seed(0)
    net, data = model(), rows(400)
    right, shortcut = fisher(net, data, at_once=400), fisher(net, data, group=20)
    ratio = sum(v.sum() for v in shortcut.values()) / sum(v.sum() for v in right.values())
    assert 0.02 < ratio < 0.12, "gradients of labels from the model itself cancel: about one in twenty is left"
    one = fisher(net, {k: v[:20] for k, v in data.items()}, labels="true", group=20)
    loss = nn.functional.cross_entropy(net(x=data["x"][:20]), data["labels"][:20])
    for (k, _), g in zip(net.named_parameters(), torch.autograd.grad(loss, net.parameters()), strict=True):
        assert torch.allclose(one[k], g.square(), atol=1e-8)


def test_fisher_leaves_modes_and_gradients_alone_and_skips_what_is_frozen():
    net = model(dropout=0.5).train()
    net.head.requires_grad_(False)
    found = fisher(net, rows(4))
    assert set(found) == {"body.0.weight", "body.0.bias"}
    assert net.training and all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("precise", [{"optimizer": torch.optim.SGD}, {}])
def test_the_path_adds_up_gradient_times_movement(precise):
    net, seen = model(), []
    watch = PathImportance(net)

    class Look:
        def on_train_begin(self, run):
            run.optimizer.register_step_pre_hook(self.before)

        def before(self, optimizer, args, kwargs):
            self.kept = [(p.grad.clone(), p.detach().clone()) for p in net.parameters()]

        def on_step_end(self, run):
            seen.append([-g * (p.detach() - w) for (g, w), p in zip(self.kept, net.parameters(), strict=True)])

    fit(net, rows(), callbacks=[watch, Look()], **{**FITTING, **precise})
    for i, k in enumerate(watch.path):
        assert torch.allclose(watch.path[k], sum(s[i] for s in seen), atol=1e-7)
    if precise:  # plain gradient descent never goes uphill along its own gradient
        assert all((v >= 0).all() for v in watch.path.values())
    assert not net.zero_grad() and all((v >= 0).all() for v in watch.importance().values())


def test_the_path_does_not_count_the_penaltys_own_gradient():
    net, how = model(), Pull(5.0, "path")
    data = tasks(2)
    learn(net, data[:1], how, **FITTING)
    kept = copy.deepcopy(net)
    plan = how.begin(net, data[1], lambda d: [d])
    fit(plan.model, plan.train, loss=plan.loss, callbacks=plan.callbacks, lr=0.05, settings=PLAN)
    loss = nn.functional.cross_entropy(kept(x=data[1].train["x"]), data[1].train["labels"])
    for (k, w), g in zip(kept.named_parameters(), torch.autograd.grad(loss, kept.parameters()), strict=True):
        moved = dict(net.named_parameters())[k] - w
        assert torch.allclose(how._watch.path[k], -g * moved, atol=1e-7)


def test_a_pull_on_all_weights_alike_is_l2_sp():
    net, how = model(), Pull(0.3, "equal")
    how.begin(net, tasks(1)[0], lambda d: [d])
    theirs = l2_sp(net, 0.3, beta=0.0)
    with torch.no_grad():
        for p in net.body.parameters():
            p.add_(torch.randn_like(p))
    assert torch.isclose(how.term(net), theirs(), rtol=1e-5)


@pytest.mark.parametrize("kind", ["fisher", "path"])
def test_a_strong_pull_holds_what_mattered(kind):
    moved = []
    for strength in (0.0, 1e4):
        net, how = model(), Pull(strength, kind)
        learn(net, tasks(1), how, **FITTING)
        before = copy.deepcopy(dict(net.named_parameters()))
        weight = how.weight
        plan = how.begin(net, tasks(2)[1], lambda d: [d])
        fit(plan.model, plan.train, loss=plan.loss, callbacks=plan.callbacks, epochs=30, lr=0.01, settings=PLAN)
        gone = {k: (p - before[k]).square() for k, p in net.named_parameters()}
        moved.append(sum((weight[k] * gone[k]).sum() for k in weight).item())
    assert moved[1] < 0.1 * moved[0]


def test_importance_adds_up_over_tasks_and_the_goal_is_the_last():
    net, how = model(), Pull(1.0, labels="all", rows=100)
    learn(net, tasks(1), how, **FITTING)
    first = how.weight
    learn(net, tasks(2)[1:], how, **FITTING)
    second = fisher(net, tasks(2)[1].train, labels="all")
    assert all(torch.allclose(how.weight[k], first[k] + second[k], atol=1e-7) for k in second)
    assert all(torch.equal(how.goal[k], p) for k, p in net.named_parameters())
    assert how.nbytes() == 2 * sum(p.nbytes for p in net.parameters())


# ---------------------------------------------------------------- memories


@SOME
@given(st.integers(1, 8), st.integers(0, 30), st.integers(0, 100))
def test_a_reservoir_holds_different_examples_of_what_it_was_offered(size, n, seed):
    memory = Reservoir(size, seed)
    for part in torch.arange(n).split(4):
        memory.add({"x": part.float(), "labels": part})
    kept = [int(row["labels"]) for _, row in memory.rows]
    assert len(set(kept)) == len(kept) == min(size, n) and memory.offered == n


def test_a_reservoir_keeps_every_example_with_the_same_probability():
    size, n, times = 5, 20, 4000
    counts, data = np.zeros(n), {"labels": torch.arange(n)}
    for seed in range(times):
        memory = Reservoir(size, seed)
        memory.add(data)
        counts[[int(row["labels"]) for _, row in memory.rows]] += 1
    p = size / n
    # places of one memory exclude each other, so the sum of squares is smaller than of independent counts
    chi = ((counts - times * p) ** 2).sum() / (times * p * (1 - p)) * (n - 1) / n
    assert 5.4 < chi < 43.8, "the 0.1 % and 99.9 % points of chi-square with 19 degrees of freedom"


def test_a_reservoir_that_was_kept_goes_on_as_if_nothing_had_been():
    whole, first = Reservoir(4, 1), Reservoir(4, 1)
    data = rows(30)
    whole.add(data)
    first.add({k: v[:13] for k, v in data.items()})
    again = Reservoir(4, 7)
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    again.add({k: v[13:] for k, v in data.items()})
    for (_, a), (_, b) in zip(whole.rows, again.rows, strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert whole.nbytes() == 4 * (4 * 4 + 8)


def test_what_is_kept_is_a_copy():
    data, memory = rows(3), Reservoir(3)
    memory.add(data)
    data["x"].zero_()
    assert all(row["x"].any() for _, row in memory.rows)


def test_examples_of_several_heads_and_lengths_are_drawn_as_a_batch_for_each_head():
    memory = Reservoir(40)
    memory.add(texts(6, length=4), "a")
    memory.add(texts(6, length=7), "a")
    memory.add(texts(6, length=5), "b")
    found = memory.draw(18, np.random.default_rng(0))
    assert list(found) == ["a", "b"] and found["a"]["input_ids"].shape == (12, 7)
    assert found["b"]["attention_mask"].shape == (6, 5) and found["a"]["labels"].shape == (12,)
    assert (found["a"]["attention_mask"][:, 4:].sum(1) > 0).sum() == 6, "what is filled up stays hidden"


def test_old_answers_are_held_at_old_heads_alone():
    net, data = model(heads=True), tasks(2, heads=True)
    how = Remember(3.0)
    learn(net, data[:1], how, **FITTING)
    before = net.only("t0")(**{k: v for k, v in data[1].train.items() if k != "labels"}).detach()
    (batch,) = how.begin(net, data[1], lambda d: [d]).train
    assert torch.allclose(batch["told.t0"], before, atol=1e-6)
    out = how.begin(net, data[1], lambda d: [d]).model(**batch)
    plain = nn.functional.cross_entropy(out["logits"], batch["labels"])
    assert torch.isclose(out["loss"], plain, atol=1e-6), "nothing has moved yet"
    with torch.no_grad():
        net.heads["t0"].bias.add_(torch.tensor([1.0, 0.0]))
    moved = how.begin(net, data[1], lambda d: [d]).model
    assert moved(**batch)["loss"] > plain + 0.01


def test_of_one_head_only_the_old_classes_are_held():
    net = model()
    first, second = rows(30), rows(30, seed=1)
    first, second = ({k: v[d["labels"] != c] for k, v in d.items()} for d, c in ((first, 2), (second, 0)))
    how = Remember(2.0)
    learn(net, [Task("a", first, first)], how, **FITTING)
    assert how.seen == {"": [0, 1]}
    plan = how.begin(net, Task("b", second, second), lambda d: [d])
    with torch.no_grad():
        net.head.bias[2] += 5.0  # a class that it has not seen
    (batch,) = plan.train
    out = plan.model(**batch)
    assert torch.isclose(out["loss"], nn.functional.cross_entropy(out["logits"], batch["labels"]), atol=1e-5)


def test_replay_is_the_sum_of_both_losses_over_heads_and_lengths():
    net, data = model(heads=True), tasks(3, heads=True)
    how = Replay(12, 0.7, logits=0.3, rows=12)
    learn(net, data[:2], how, **FITTING)
    plan = how.begin(net, data[2], lambda d: [d])
    (batch,) = plan.train
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
        loss, now = plan.model(**batch)["loss"], batch["now"]
        said = net.only("t2")(**{k: v for k, v in now.items() if k != "labels"})
        wanted = nn.functional.cross_entropy(said, now["labels"])
        many = sum(len(part["labels"]) for part in batch["old"].values())
        assert many == 12
        for head, part in batch["old"].items():
            given = {k: part[k] for k in ("input_ids", "attention_mask")}
            z, share = net.only(head)(**given), len(part["labels"]) / many
            wanted += share * 0.7 * nn.functional.cross_entropy(z, part["labels"])
            wanted += share * 0.3 * (z - part["told"]).square().mean()
    assert torch.isclose(loss, wanted, atol=1e-5)


def test_a_projected_gradient_does_not_oppose_the_memory_and_is_left_alone_where_it_agrees():
    net, data = model(), tasks(2)
    how = AGEM(24, rows=24)
    learn(net, data[:1], how, **{**FITTING, "epochs": 30})
    met = set()
    for seed in range(20):
        flip = {"x": data[0].train["x"], "labels": (data[0].train["labels"] + seed % 2) % 3}
        plan = how.begin(net, Task("b", flip, flip), lambda d: [d])
        (batch,) = plan.train
        net.zero_grad()
        loss = plan.model(**batch)["loss"]
        loss.backward()
        given = torch.cat([p.grad.flatten() for p in net.parameters()])
        new, old = (
            torch.cat([g.flatten() for g in torch.autograd.grad(v, list(net.parameters()), retain_graph=True)])
            for v in plan.model.parts(**batch)
        )
        met.add(bool(new @ old < 0))
        if new @ old < 0:
            assert torch.isclose(given @ old, torch.zeros(()), atol=1e-5)
            assert torch.allclose(given, new - (new @ old) / (old @ old) * old, atol=1e-5)
        else:
            assert torch.allclose(given, new, atol=1e-6)
        assert torch.isclose(loss, nn.functional.cross_entropy(net(x=flip["x"]), flip["labels"]), atol=1e-5)
    assert met == {True, False}


def test_a_router_knows_clouds_apart_and_names_only_once():
    draws = torch.Generator().manual_seed(0)
    router, clouds = Router(), {k: c + 0.1 * torch.randn(20, 3, generator=draws) for k, c in (("a", 0.0), ("b", 2.0))}
    for k, x in clouds.items():
        router.add(k, x)
    assert all(router(x) == [k] * 20 for k, x in clouds.items())
    with pytest.raises(ValueError, match="knows 'a' already"):
        router.add("a", clouds["a"])


# ---------------------------------------------------------------- the sequence


@each_method
@pytest.mark.parametrize("heads", [False, True])
def test_every_method_learns_tasks_with_heads_and_without(name, heads):
    net, data = model(heads), tasks(3, heads)
    record = learn(net, data, METHODS[name](), ahead=True, **{**FITTING, "epochs": 4})
    assert record.matrix().shape == (3, 3) and not np.isnan(record.matrix()).any()
    own = net.only("t2") if heads else net
    said = own(**{k: v for k, v in data[2].train.items() if k != "labels"}).argmax(1)
    assert (said == data[2].train["labels"]).float().mean() > 0.5
    found = transfer(record.matrix(), record.before())
    assert set(found) == {"average", "backward", "forgetting", "forward"}


def test_plain_fine_tuning_equals_fit_called_task_by_task():
    ours, theirs = model(), model()
    learn(ours, tasks(), **FITTING)
    for task in tasks():
        fit(theirs, dict(task.train), **FITTING)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("how", [lambda: Pull(0.0), lambda: Remember(0.0), lambda: Replay(5, 0.0)])
def test_a_method_of_no_strength_is_plain_fine_tuning(how):
    ours, theirs = model(), model()
    learn(ours, tasks(), how(), **FITTING)
    learn(theirs, tasks(), **FITTING)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-4)


class Broken:
    """Batches that break off after so many, over all tasks."""

    def __init__(self, left: int):
        self.left = left

    def __call__(self, data: dict) -> "Broken._Loader":
        return Broken._Loader(self, data)

    class _Loader:
        def __init__(self, count, data):
            self.count, self.data, self.epoch = count, data, 0

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __len__(self):
            return 4

        def __iter__(self):
            order = torch.randperm(len(self.data["labels"]), generator=torch.Generator().manual_seed(self.epoch))
            for at in order.split(-(-len(order) // 4)):
                if self.count.left == 0:
                    raise KeyboardInterrupt
                self.count.left -= 1
                yield {k: v[at] for k, v in self.data.items()}


def state_of(net, how, record) -> list:
    found = [*net.state_dict().values(), *(t for stage in record.right for t in stage.values())]

    def walk(value):
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, dict):
            for k in sorted(value):
                walk(value[k])
        elif isinstance(value, (list, tuple)):
            for v in value:
                walk(v)
        else:
            found.append(torch.tensor(hash(str(value)) % 2**31))

    walk(how.state_dict())
    return found


def run(path, name, left=-1, heads=True, **more):
    net, how = model(heads), METHODS[name]()
    made = {"batches": Broken(left), "path": path, "every": 1, **more}
    record = learn(net, tasks(3, heads), how, epochs=2, lr=0.05, settings=PLAN, **made)
    return state_of(net, how, record)


@each_method
def test_a_run_killed_at_any_batch_goes_on_bit_for_bit(tmp_path, name):
    whole = run(None, name)
    for left in (3, 13):
        folder = tmp_path / str(left)
        with pytest.raises(KeyboardInterrupt):
            run(folder, name, left)
        torch.manual_seed(left)
        found = run(folder, name)
        assert len(whole) == len(found)
        assert all(torch.equal(a, b) for a, b in zip(whole, found, strict=True)), left


@pytest.mark.parametrize("name", ["EWC", "DER", "SI"])
@pytest.mark.parametrize("where", ["begin", "end", "save"])
def test_a_run_killed_between_tasks_goes_on_bit_for_bit(tmp_path, monkeypatch, name, where):
    from ftbook import continual

    whole = run(None, name)
    owner = continual._Kept if where == "save" else type(METHODS[name]())
    plain, calls = getattr(owner, where), []

    def stop(*args, **about):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(*args, **about)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, where, stop)
        run(tmp_path, name)
    found = run(tmp_path, name)
    assert all(torch.equal(a, b) for a, b in zip(whole, found, strict=True))
    again = run(tmp_path, name, left=0)  # all is done: no batch is asked for
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    assert [f.name for f in tmp_path.iterdir()] == ["sequence.pt"]


def test_a_run_killed_in_its_first_task_goes_on_with_the_same_model(tmp_path):
    whole, net = model(), model()
    about = {"epochs": 2, "lr": 0.05, "settings": PLAN, "every": 1}

    def go(net, left, **more):
        learn(net, tasks(2), Pull(5.0, "equal"), batches=Broken(left), **about, **more)

    go(whole, -1)
    with pytest.raises(KeyboardInterrupt):
        go(net, 3, path=tmp_path)
    go(net, -1, path=tmp_path)  # weights that were half trained are not what the penalty pulls to
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), net.state_dict().values(), strict=True))


def test_a_folder_of_another_run_is_refused(tmp_path):
    run(tmp_path, "EWC")
    with pytest.raises(ValueError, match="stored is method: Pull.*this call has method: Remember.*give another folder"):
        run(tmp_path, "LwF")


def other(**how):
    """One call into a folder, of which one thing may be another."""
    about = {"strength": 1.0, "size": 10, "seed": 0, "shift": 0, "margin": 0.5, "names": "ab", "decay": 0.0} | how
    about |= {"lr": how.get("lr", 0.05), "guard": how.get("guard", 0), "ahead": how.get("ahead", False)}
    data = [Task(k, rows(seed=i + about["shift"]), rows(12, seed=9 + i)) for i, k in enumerate(about["names"])]
    guards = {"g": Task("g", rows(), rows(40, seed=about["guard"]))}
    method = Replay(about["size"], about["strength"], rows=4, seed=about["seed"])
    plan = Settings(precision="fp32", weight_decay=about["decay"], progress=bool(how.get("progress")))
    fitting = {"epochs": 1, "batch_size": 6, "lr": about["lr"], "settings": plan, "ahead": about["ahead"]}
    return learn(model(), data, method, path=how["path"], guards=guards, margin=about["margin"], **fitting)


@pytest.mark.parametrize(
    "more, told",
    [
        ({"strength": 2.0}, "stored is method's strength: 1.0; this call has method's strength: 2.0. Call again"),
        ({"size": 20}, "stored is method's memory: 10; this call has method's memory: 20"),
        ({"seed": 1}, "method's seed: 0"),
        ({"shift": 5}, "data of task 'a': .* this call has data of task 'a': "),
        ({"guard": 3}, "data of guard 'g'"),
        ({"margin": 0.4}, "stored is margin: 0.5; this call has margin: 0.4"),
        ({"names": "ac"}, "stored is tasks: a, b.*this call has tasks: a, c"),
        ({"lr": 0.01}, "stored is lr: 0.05; this call has lr: 0.01"),
        ({"decay": 0.1}, "weight_decay: 0.0"),
        ({"ahead": True}, "ahead: False"),
    ],
)
def test_a_folder_is_for_one_method_its_settings_its_data_and_its_guards(tmp_path, more, told):
    first = other(path=tmp_path)
    again = other(path=tmp_path, progress=True)  # how it looks is free
    assert again.matrix().tolist()[1] == first.matrix().tolist()[1]
    with pytest.raises(ValueError, match=told):
        other(path=tmp_path, **more)


def test_a_memory_of_another_size_is_not_taken_over():
    small, large = Reservoir(4), Reservoir(9)
    small.add(rows(6))
    with pytest.raises(ValueError, match="room for 4 examples, this one for 9; make it with size=4"):
        large.load_state_dict(small.state_dict())
    assert not len(large) and not large.offered


# ---------------------------------------------------------------- a model in use


def test_a_gate_refuses_what_is_worse_and_what_too_few_examples_cannot_show():
    rng = np.random.default_rng(0)
    old = rng.random(2000) < 0.8
    same = old ^ (rng.random(2000) < 0.02)
    assert gate({"g": old}, {"g": same}, margin=0.02).accepted
    assert not gate({"g": old[:20]}, {"g": old[:20] ^ (np.arange(20) == 3)}, margin=0.02).accepted
    found = gate({"g": old, "n": old}, {"g": old, "n": old & (rng.random(2000) < 0.9)}, margin=0.02)
    assert not found.accepted and -0.002 < found.sets["g"][2] < 0 and found.sets["n"][2] < -0.05


@pytest.mark.parametrize("n", [2, 10, 32, 98, 99, 400])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_answers_that_are_all_equal_pass_only_where_so_many_show_it(n, level):
    same = {"g": np.arange(n) % 3 > 0}
    found = gate(same, same, margin=0.03, level=level)
    low = found.sets["g"][2]
    assert np.isclose((1 + low) ** n, 1 - level), "a loss of that size stays unseen as often as the level allows"
    assert found.accepted == (low >= -0.03) == (n >= (99 if level == 0.95 else 53))


@SOME
@given(st.integers(2, 300), st.integers(0, 3), st.integers(0, 3), st.integers(0, 100))
def test_the_lower_limit_is_what_its_equation_says(n, better, worse, seed):
    old, new = np.ones(n, bool), np.ones(n, bool)
    order = np.random.default_rng(seed).permutation(n)
    old[order[:better]], new[order[::-1][:worse]] = False, False
    d = new.astype(float) - old
    low = d.mean() - max(1.6448536269514722 * d.std(ddof=1) / n**0.5, 1 - 0.05 ** (1 / n))
    assert np.isclose(gate({"g": old}, {"g": new}).sets["g"][2], low)


def test_a_harmful_model_passes_no_gate_by_having_shown_too_little():
    rng, passed = np.random.default_rng(0), 0
    for n in (2, 10, 32, 100, 148):  # each answer is turned to wrong in 2 % of the cases, the whole margin
        for _ in range(200):
            passed += gate({"g": [True] * n}, {"g": rng.random(n) >= 0.02}, margin=0.02).accepted
    assert not passed


def test_a_gate_lets_a_model_pass_that_is_too_bad_at_most_as_often_as_it_says():
    rng, passed = np.random.default_rng(0), 0
    for _ in range(1000):
        old = rng.random(400) < 0.8
        turned = rng.random(400)
        new = np.where(old, turned > 0.0625 + 0.025, turned < 0.15)  # worse by 4 points: 0.8 · 0.0875 - 0.2 · 0.15
        passed += gate({"g": old}, {"g": new}, margin=0.04).accepted
    assert passed < 75, "5 % of 1,000, and chance"


def test_a_round_that_makes_it_worse_is_refused_and_leaves_no_trace():
    net, good = model(), rows(200)
    fit(net, dict(good), epochs=40, lr=0.05, settings=PLAN)
    wrong = {"x": good["x"], "labels": (good["labels"] + 1) % 3}
    rounds = [Task("wrong", wrong, wrong), Task("right", good, good)]
    how, before = Replay(20), copy.deepcopy(net.state_dict())
    guards = {"guard": Task("guard", good, good)}
    record = learn(net, rounds[:1], how, guards=guards, **FITTING)
    assert [v.accepted for v in record.verdicts] == [False] and not len(how.memory) and not how.seen
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert set(record.verdicts[0].sets) == {"guard"}, "its own labels, which are wrong, are not asked"
    record = learn(net, rounds, how, guards=guards, margin=0.05, **FITTING)
    assert [v.accepted for v in record.verdicts] == [False, True] and len(how.memory) == 20


def test_a_stream_with_a_gate_goes_on_bit_for_bit(tmp_path):
    guards = {"guard": tasks(1, heads=True)[0]}
    whole = run(None, "DER", guards=guards, margin=0.5)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "DER", 13, guards=guards, margin=0.5)
    found = run(tmp_path, "DER", guards=guards, margin=0.5)
    assert all(torch.equal(a, b) for a, b in zip(whole, found, strict=True))


def test_a_record_is_the_same_after_it_was_kept():
    first = Record(["a"])
    first.right = [{}, {"a": torch.tensor([True, False])}]
    first.verdicts = [gate({"g": [True, False]}, {"g": [True, True]}, margin=1.0)]
    again = Record([])
    again.load_state_dict(first.state_dict())
    assert again.matrix().tolist() == [[0.5]] and again.verdicts == first.verdicts


# ---------------------------------------------------------------- the studies


def test_every_row_that_chooses_has_as_many_settings_and_every_table_its_baselines():
    for made in (study.rows("tasks"), study.rows("classes"), study.photo_rows()):
        plain = [r for r in made if not isinstance(r, results.Baseline)]
        grids = [[len(v) for v in r.values() if isinstance(v, list)] for r in plain]
        assert len({int(np.prod(g)) for g in grids if g}) == 1
        assert {"majority", "probe"} <= {r["way"] for r in made if isinstance(r, results.Baseline)}
        assert {study.PLAINLY, study.JOINT} <= {r["way"] for r in plain}


def test_every_order_has_all_tasks_and_in_one_head_no_two_share_a_class():
    assert study.order_of(0) == study.TASKS and len({study.order_of(s) for s in study.SEEDS}) > 1
    given = study.sequence(1, "test", "classes")
    seen = [set(t.train["labels"].tolist()) for t in given]
    assert not set.intersection(*seen) and [t.name for t in given] == list(study.order_of(1))
    net = study.fresh(1, "classes")
    assert net.heads["all"].out_features == len(set.union(*seen))


def test_a_prompt_is_trained_alone_with_its_head_and_padding_changes_nothing():
    net = study._part(study.PROMPTS, 1, study.TASKS[0]).eval()
    own = {k for k, p in net.named_parameters() if p.requires_grad}
    assert own == {"prompt", "head.weight", "head.bias"} and len(net.prompt) == study.PROMPT
    some = {k: v[:3] for k, v in study.sentences(study.TASKS[0], "valid").items() if k != "labels"}
    one = {k: v[:1] for k, v in some.items()}
    with torch.no_grad():
        assert torch.allclose(net(**some)[:1], net(**one), atol=1e-5)
        before = net(**some)
        net.prompt.add_(1.0)
        assert not torch.allclose(net(**some), before), "it is read"


def test_who_is_not_told_the_task_asks_the_router():
    asked = study.sequence(1, "test", "tasks")
    told, sent = (study._parts(1, asked, way, 1e-3) for way in (study.PROMPTS, study.SENT))
    assert set(told) == set(sent) == set(study.TASKS)
    assert all((told[t] | ~sent[t]).all() for t in told), "right is right at the right task"


@pytest.mark.parametrize("setup", ["tasks", "classes"])
def test_merging_one_model_with_all_its_share_is_that_model(setup):
    one = study.sequence(1, "test", setup)[:1]
    right = study._alone(1, one, setup, 1e-3)["right"]
    assert (study._merged(1, one, setup, 1e-3, 1.0)[one[0].name] == right[one[0].name]).all()


def test_reviews_of_both_kinds_share_two_classes():
    given = study.sequence(1, "test", "opinions", study.KINDS)
    net, record = study.trained(1, given, "opinions", study.PLAINLY, 1e-3, ahead=True)
    assert net.heads["all"].out_features == 2 and {t.head for t in given} == {"all"}
    assert -1 <= transfer(record.matrix(), record.before())["forward"] <= 1


def test_in_one_round_of_the_stream_all_labels_are_turned_and_nowhere_else():
    found = study.stream(1, "test")
    assert len(found) == study.ROUNDS
    pool = study._pool(1, "test")
    known = {
        tuple(h.flatten()[:64].tolist()): int(y)
        for k in study.KINDS
        for h, y in zip(pool[k]["hidden"], pool[k]["labels"], strict=True)
    }
    for number, task in enumerate(found):
        for rows_ in (task.train, task.test):
            for h, y in zip(rows_["hidden"], rows_["labels"], strict=True):
                true = known[tuple(h.flatten()[:64].tolist())]
                assert (int(y) != true) == (number == study.WRONG)


@pytest.mark.slow
def test_the_studies_run_store_their_rows_and_do_not_run_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path))
    study.main()
    stored = json.loads((tmp_path / "23_continual.json").read_text())["quick"]
    assert set(study.PARTS) <= set(stored)
    found = results.load_study(study.CHAPTER, "tasks")
    assert {"average", "backward", "fresh"} <= set(found.metrics)
    for name in ("run", "run_photos", "run_stream"):
        monkeypatch.setattr(study, name, lambda **_: pytest.fail("it ran again"))
    study.main("tasks", "classes", "photos", "stream")
    with pytest.raises(ValueError, match="no study 'orders'"):
        study.main("orders")
