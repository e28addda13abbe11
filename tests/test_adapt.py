"""Chapter 21: tests for a shift against their definitions, features made alike, corrections, statistics, the studies."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupts import Interrupt
from torch import nn

from ftbook import adapt as module
from ftbook import models, results
from ftbook.adapt import (
    Aligned,
    check_classes,
    continue_pretraining,
    coral,
    density_weights,
    effective_size,
    label_shift,
    mmd,
    mmd_test,
    pseudo_labels,
    reverse_gradient,
    reweigh,
    self_train,
    target_statistics,
    two_sample_test,
)
from ftbook.checkpoint import Checkpoint
from ftbook.finetune import freeze
from ftbook.studies import adapt as study
from ftbook.together import TaskBatches
from ftbook.train import Settings, fit

PLAN = Settings(precision="fp32", weight_decay=0.0, progress=False)


def Net(inputs=3, classes=2):
    return nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, classes))


def cloud(n, at=0.0, seed=0, width=3):
    return np.random.default_rng(seed).normal(at, size=(n, width))


# ---------------------------------------------------------------- domains


def test_domains_with_the_same_classes_in_the_same_order_pass():
    assert check_classes(["no", "yes"], ["no", "yes"]) == ["no", "yes"]


@pytest.mark.parametrize(
    "source, target, told",
    [
        (["no", "yes"], ["no", "maybe"], r"source alone has \['yes'\]; the target alone has \['maybe'\]"),
        (["a", "b"], ["a", "b", "c"], r"different labels: the target alone has \['c'\]"),
        (["no", "yes"], ["yes", "no"], "the same number means another class"),
        ([], [], "source and target have no classes; give"),
        ([], ["a"], "the target alone has"),
    ],
)
def test_domains_with_different_labels_are_refused(source, target, told):
    with pytest.raises(ValueError, match=told):
        check_classes(source, target)


# ---------------------------------------------------------------- is there a shift?


def test_a_classifier_tells_apart_what_differs_and_nothing_else():
    apart, same = two_sample_test(cloud(80), cloud(80, 2, 1)), two_sample_test(cloud(80), cloud(80, 0, 1))
    assert apart.accuracy > 0.9 and apart.p < 0.01 and apart.distance > apart.null
    assert same.p > 0.05 and same.distance <= same.null
    assert apart.distance == pytest.approx(2 * (1 - 2 * (1 - apart.accuracy)))


def test_without_a_shift_the_p_values_of_the_test_are_not_too_small():
    p = [two_sample_test(cloud(24, 0, s), cloud(24, 0, 1000 + s), rounds=99, seed=s).p for s in range(60)]
    assert np.mean(np.array(p) <= 0.2) < 0.2 + 3 * math.sqrt(0.2 * 0.8 / 60)


def test_a_small_domain_weighs_as_much_as_a_large_one():
    found = two_sample_test(cloud(300), cloud(20, 0, 1))
    assert abs(found.accuracy - 0.5) < 0.35 and found.p > 0.01  # naming the large one always would be 0.94 right


def by_definition(a, b, width):
    def k(u, v):
        return math.exp(-float(((u - v) ** 2).sum()) / 2 / width**2)

    n, m = len(a), len(b)
    own = sum(k(u, v) for i, u in enumerate(a) for j, v in enumerate(a) if i != j) / (n * (n - 1))
    other = sum(k(u, v) for i, u in enumerate(b) for j, v in enumerate(b) if i != j) / (m * (m - 1))
    return own + other - 2 * sum(k(u, v) for u in a for v in b) / (n * m)


@pytest.mark.parametrize("width", [0.5, 2.0])
def test_the_mmd_is_its_definition(width):
    a, b = cloud(6, 0, 1), cloud(4, 1, 2)
    wanted = by_definition(a, b, width)
    assert mmd(torch.tensor(a), torch.tensor(b), [width]).item() == pytest.approx(wanted, abs=1e-6)
    assert mmd_test(a, b, [width], rounds=5).value == pytest.approx(wanted, abs=1e-6)
    both = mmd(torch.tensor(a), torch.tensor(b), [width, 1.0]).item()
    assert both == pytest.approx((wanted + by_definition(a, b, 1.0)) / 2, abs=1e-6)


def test_the_mmd_has_no_bias():
    draws = [mmd(torch.tensor(cloud(5, 0, s)), torch.tensor(cloud(5, 0, 500 + s)), [1.0]).item() for s in range(300)]
    assert abs(np.mean(draws)) < 3 * np.std(draws) / math.sqrt(300) and min(draws) < 0


def test_the_mmd_is_the_same_both_ways_and_has_gradients():
    a, b = (torch.tensor(cloud(5, k, k)).float().requires_grad_() for k in (0, 1))
    assert torch.isclose(mmd(a, b), mmd(b, a), atol=1e-6)
    mmd(a, b).backward()
    assert a.grad.isfinite().all() and a.grad.abs().sum() > 0


def test_the_permutations_of_the_mmd_see_a_shift_and_no_other():
    assert mmd_test(cloud(40), cloud(40, 1, 1), rounds=200).p < 0.02
    same = mmd_test(cloud(40), cloud(40, 0, 3), rounds=200)
    assert same.p > 0.05 and same.value <= same.null


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda: two_sample_test(cloud(3), cloud(9)), r"source has the shape \(3, 3\).*at least 4"),
        (lambda: two_sample_test(cloud(9), cloud(9, width=2)), "describe both with one model"),
        (lambda: mmd_test(cloud(9) * np.nan, cloud(9)), "not all finite"),
        (lambda: mmd_test(cloud(9)[0], cloud(9)), r"give finite vectors \(N, D\)"),
        (lambda: mmd(torch.zeros(1, 2), torch.zeros(3, 2)), "at least two vectors of each"),
        (lambda: mmd(torch.zeros(2, 2), torch.zeros(3, 2), [0.0]), "give numbers above 0"),
        (lambda: coral(torch.zeros(2, 2), torch.zeros(1, 2)), "at least two vectors"),
        (lambda: coral(torch.zeros(2, 2), torch.zeros(2, 3)), r"target \(2, 3\).*with the same D"),
        (lambda: mmd(torch.zeros(2, 2), torch.zeros(2, 3)), r"source \(2, 2\), target \(2, 3\)"),
        (lambda: mmd(torch.full((2, 2), math.nan), torch.zeros(2, 2)), "2 of the 2 vectors of the source hold NaN"),
        (
            lambda: coral(torch.zeros(2, 2), torch.tensor([[1.0, math.inf], [0.0, 0.0]])),
            "1 of the 2 vectors of the tar",
        ),
        (lambda: two_sample_test(cloud(9), cloud(9), rounds=0), "rounds=0: without shuffles"),
        (lambda: mmd_test(cloud(9), cloud(9), rounds=-1), "rounds=-1: without shuffles.*give 1 or more"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(call, told):
    with pytest.raises(ValueError, match=told):
        call()


# ---------------------------------------------------------------- weights


def test_weights_of_the_density_ratio_are_near_the_true_ones():
    x = cloud(2000, 0, 1, 1)
    found = density_weights(x, cloud(2000, 0.5, 2, 1), C=1e3)
    true = np.exp(0.5 * x[:, 0] - 0.125)
    assert np.corrcoef(found, true)[0, 1] > 0.97 and found.mean() == pytest.approx(1)
    assert effective_size(found) == pytest.approx(2000 * math.exp(-0.25), rel=0.1)


def test_a_power_flattens_the_weights():
    a, b = cloud(60), cloud(60, 1, 1)
    sizes = [effective_size(density_weights(a, b, power)) for power in (0.0, 0.5, 1.0)]
    assert sizes[0] == pytest.approx(60) and sizes[0] > sizes[1] > sizes[2]


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=20), st.floats(0.1, 10))
def test_the_effective_size_lies_between_1_and_n_whatever_the_scale(weights, scale):
    size = effective_size(weights)
    assert 1 - 1e-9 <= size <= len(weights) + 1e-9
    assert effective_size(np.array(weights) * scale) == pytest.approx(size)


@pytest.mark.parametrize("weights", [[], [-1.0, 2.0], [0.0, 0.0], [[1.0]]])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="numbers of at least 0, not all 0"):
        effective_size(weights)


def test_a_negative_power_is_refused():
    with pytest.raises(ValueError, match="give 0 or more"):
        density_weights(cloud(20), cloud(20), -1.0)


# ---------------------------------------------------------------- features made alike


def test_coral_is_its_formula_and_does_not_see_means():
    a, b = (torch.tensor(cloud(7, k, k)) for k in (0, 1))
    gap = np.cov(a.numpy().T) - np.cov(b.numpy().T)
    assert coral(a, b).item() == pytest.approx((gap**2).sum() / (4 * 9), rel=1e-5)
    assert coral(a, a + 5).item() == pytest.approx(0, abs=1e-9)


@given(st.floats(0, 10))
@settings(max_examples=20)
def test_gradient_reversal_is_exact(weight):
    x = torch.linspace(-2, 2, 7, dtype=torch.float64).requires_grad_()
    (plain,) = torch.autograd.grad((x**3).sum(), x)
    (turned,) = torch.autograd.grad((reverse_gradient(x, weight) ** 3).sum(), x)
    assert torch.equal(turned, -weight * plain) and torch.equal(reverse_gradient(x, weight), x)


def pair(n=8, seed=0):
    draws = torch.Generator().manual_seed(seed)
    source = {"input": torch.randn(n, 3, generator=draws), "labels": torch.arange(n) % 2}
    return source, {"input": torch.randn(n, 3, generator=draws) + 1}


def test_one_backward_pass_gives_the_judge_its_own_gradient_and_the_body_the_turned_one():
    torch.manual_seed(0)
    net, (source, target) = Net(), pair()
    both = Aligned(net, "adversarial", 0.7)
    both(source=source, target=target).loss.backward()
    first, judge = net[0], both.judge
    got, told = first.weight.grad.clone(), judge[0].weight.grad.clone()

    features = [net[:2](p["input"]) for p in (source, target)]
    task = nn.functional.cross_entropy(net[2](features[0]), source["labels"])
    odds = judge(torch.cat(features))[:, 0]
    domain = torch.cat((torch.zeros(8), torch.ones(8)))
    apart = nn.functional.binary_cross_entropy_with_logits(odds, domain)
    (of_task,) = torch.autograd.grad(task, first.weight, retain_graph=True)
    (of_judge,) = torch.autograd.grad(apart, first.weight, retain_graph=True)
    assert torch.allclose(got, of_task - 0.7 * of_judge, atol=1e-6)
    assert torch.allclose(told, torch.autograd.grad(apart, judge[0].weight)[0], atol=1e-6)


@pytest.mark.parametrize("how, term", [("coral", coral), ("mmd", mmd)])
def test_the_loss_is_that_of_the_source_and_the_weighted_term(how, term):
    net, (source, target) = Net(), pair()
    out = Aligned(net, how, 3.0)(source=source, target=target)
    features = [net[:2](p["input"]) for p in (source, target)]
    task = nn.functional.cross_entropy(net[2](features[0]), source["labels"])
    assert torch.isclose(out.loss, task + 3 * term(*features), atol=1e-6)
    assert torch.isclose(out.apart, term(*features), atol=1e-6)


def test_without_a_term_the_target_changes_nothing_and_weights_multiply_losses():
    net, (source, target) = Net(), pair()
    plain = Aligned(net, None)(source=source)
    assert torch.equal(Aligned(net, None)(source=source, target=target).loss, plain.loss)
    weights = torch.tensor([2.0, 0.0] * 4)
    losses = nn.functional.cross_entropy(plain.logits, source["labels"], reduction="none")
    weighed = Aligned(net, None)(source=source | {"weights": weights}).loss
    assert torch.isclose(weighed, (weights * losses).mean(), atol=1e-6)


def test_the_weight_of_the_judge_rises_during_training_alone():
    net, (source, target) = Net(), pair()
    both = Aligned(net, "adversarial", 2.0, steps=10)
    assert both.rate() == 0
    both.eval()(source=source, target=target)
    assert both.rate() == 0
    both.train()
    rates = []
    for _ in range(12):
        both(source=source, target=target)
        rates.append(both.rate())
    assert rates == sorted(rates) and rates[-1] == pytest.approx(2.0, abs=1e-3)
    assert Aligned(net, "mmd", 2.0, steps=10).rate() == 2.0


def test_a_run_that_goes_on_after_a_stop_has_the_weight_it_would_have_had(tmp_path):
    source, target = pair(16)

    def trained(at=0):
        torch.manual_seed(0)
        both = Aligned(Net(), "adversarial", 2.0, steps=8)
        batches = TaskBatches({"source": [source], "target": [target]}, 8)
        about = {"loss": None, "epochs": 1, "lr": 0.02, "settings": PLAN}
        fit(both, batches, callbacks=[Checkpoint(tmp_path / f"{bool(at)}.pt", every=1), Interrupt(at)], **about)
        return both

    whole = trained()
    with pytest.raises(KeyboardInterrupt):
        trained(at=4)
    again = Aligned(Net(), "adversarial", 2.0, steps=8)
    batches = TaskBatches({"source": [source], "target": [target]}, 8)
    file = [Checkpoint(tmp_path / "True.pt", every=1), Interrupt(0)]
    fit(again, batches, loss=None, epochs=1, lr=0.02, settings=PLAN, callbacks=file)
    assert again.done == whole.done == 8 and again.rate() == whole.rate()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_no_hook_stays_on_the_head_whatever_happens():
    net, (source, _) = Net(), pair()
    with pytest.raises(RuntimeError):
        Aligned(net, "mmd")(source=source, target={"input": torch.zeros(4, 9)})
    assert not net[2]._forward_pre_hooks


def test_fit_trains_with_pairs_of_batches_and_matching_brings_features_together():
    source, target = pair(64)
    apart = {}
    for how, weight in ((None, 0.0), ("mmd", 20.0)):
        torch.manual_seed(0)
        net = Net()
        both = Aligned(net, how, weight)
        batches = TaskBatches({"source": [source], "target": [target]}, 60)
        history = fit(both, batches, loss=None, epochs=1, lr=0.02, settings=PLAN)
        assert math.isfinite(history["train_loss"][-1])
        with torch.no_grad():
            apart[how] = mmd(*(net[:2](p["input"]) for p in (source, target))).item()
    assert apart["mmd"] < apart[None] / 2


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda: Aligned(Net(), "dann"), "allowed are None, 'coral', 'mmd', 'adversarial'"),
        (lambda: Aligned(Net(), "mmd", -1.0), "give 0 or more of both"),
        (lambda: Aligned(Net(), "mmd")(source=pair()[0]), "there is no target"),
        (lambda: Aligned(Net(), None)(source=pair()[1]), 'a dict of tensors with "labels"'),
        (lambda: Aligned(Net(), "mmd")(source=pair()[0], target=pair()[0]), "the target has labels"),
        (lambda: Aligned(nn.Sequential(nn.ReLU()), "mmd"), "no linear layer"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(call, told):
    with pytest.raises(ValueError, match=told):
        call()


# ---------------------------------------------------------------- self-training


def test_pseudo_labels_are_the_sure_answers():
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.2], [0.0, 5.0]])
    assert pseudo_labels(logits, 0.8).tolist() == [0, -100, 1]
    assert pseudo_labels(logits, 0.0).tolist() == [0, 1, 1]


def means(data):
    x, y = data["x"], data["labels"]
    centers = torch.stack([x[y == k].mean(0) for k in (0, 1)])
    return lambda asked: -(asked["x"][:, None] - centers).square().sum(2)


def test_self_training_takes_over_what_is_sure_and_moves_toward_the_target():
    source = {"x": torch.tensor([[-1.0], [1.0]]), "labels": torch.arange(2)}
    target = {"x": torch.tensor([[-0.2], [3.0], [4.0], [0.8]])}
    before, none = self_train(means, source, target, rounds=0)
    after, added = self_train(means, source, target, threshold=0.9, rounds=3)
    assert none == [] and added[0] == 3 and len(added) == 3
    assert before(target).argmax(1).tolist() == [0, 1, 1, 1]
    assert after({"x": torch.tensor([[0.5]])}).argmax(1).item() == 0  # the border has moved to the right


def test_self_training_ends_where_nothing_is_sure():
    source = {"x": torch.tensor([[-1.0], [1.0]]), "labels": torch.arange(2)}
    answer, added = self_train(means, source, {"x": torch.zeros(3, 1)}, rounds=5)
    assert added == [0] and answer({"x": torch.ones(1, 1)}).argmax(1).item() == 1


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda: pseudo_labels(torch.zeros(3)), r"give logits \(N, C\)"),
        (lambda: pseudo_labels(torch.zeros(3, 2), 1.5), "a threshold from 0 to 1"),
        (lambda: pseudo_labels(torch.tensor([[0.0, math.nan], [0.0, 1.0]])), "1 of the 2 rows of logits hold NaN"),
        (lambda: pseudo_labels(torch.tensor([[0.0, math.inf]]), 0.0), "1 of the 1 rows of logits hold NaN or infinity"),
        (lambda: reverse_gradient(torch.ones(2), math.nan), "weight=nan: give a finite number"),
        (lambda: Aligned(Net(), "coral", math.inf), "a finite weight"),
        (lambda: self_train(means, {"x": torch.zeros(2, 1)}, {"x": torch.zeros(2, 1)}), '"labels" to the source'),
        (lambda: self_train(means, pair()[0], {"z": torch.zeros(2, 1)}), "the same names to both"),
        (lambda: self_train(means, *pair(), rounds=-1), "give 0 or more"),
    ],
)
def test_what_self_training_cannot_use_is_refused(call, told):
    with pytest.raises(ValueError, match=told):
        call()


# ---------------------------------------------------------------- shares of the classes


def sample(shares, n, seed, prior=None):
    """Logits of a model that is calibrated for classes in shares of `prior`, and classes in these shares."""
    draws = np.random.default_rng(seed)
    y = draws.choice(len(shares), n, p=shares)
    centers = 1.5 * np.eye(len(shares))
    x = centers[y] + draws.normal(size=(n, len(shares)))
    known = np.log(np.full(len(shares), 1 / len(shares)) if prior is None else prior)
    return torch.from_numpy(x @ centers.T - (centers**2).sum(1) / 2 + known), torch.from_numpy(y)


@pytest.mark.parametrize("how", ["moments", "likelihood"])
def test_shares_of_the_target_are_found_and_correct_the_answers(how):
    even, wanted = np.full(3, 1 / 3), np.array([0.7, 0.25, 0.05])
    (here, y), (there, true) = sample(even, 6000, 0), sample(wanted, 6000, 1)
    weights = label_shift(here, y, there, how)
    assert weights / 3 == pytest.approx(wanted, abs=0.04)
    right = [(z.argmax(1) == true).double().mean().item() for z in (there, reweigh(there, weights))]
    assert right[1] > right[0] + 0.02


@pytest.mark.parametrize("how", ["moments", "likelihood"])
def test_without_a_shift_the_weights_are_near_1(how):
    (here, y), (there, _) = (sample([0.5, 0.3, 0.2], 6000, s, [0.5, 0.3, 0.2]) for s in (0, 1))
    assert label_shift(here, y, there, how) == pytest.approx(1, abs=0.1)


def test_moments_solve_the_system_of_the_chapter():
    (here, y), (there, _) = sample([0.5, 0.5], 500, 0), sample([0.2, 0.8], 500, 1)
    joint = np.zeros((2, 2))
    for i, j in zip(here.argmax(1).tolist(), y.tolist(), strict=True):
        joint[i, j] += 1 / 500
    mu = np.bincount(there.argmax(1), minlength=2) / 500
    assert joint @ label_shift(here, y, there) == pytest.approx(mu)


def test_reweighing_is_bayes_rule():
    logits = torch.randn(5, 3, dtype=torch.float64)
    weights = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    wanted = logits.softmax(1) * weights
    assert torch.allclose(reweigh(logits, weights).softmax(1), wanted / wanted.sum(1, keepdim=True))
    assert torch.allclose(reweigh(logits, [3, 3, 3]).softmax(1), logits.softmax(1))


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda: label_shift(torch.eye(2), torch.arange(2), torch.eye(2), "em"), '"moments" and "likelihood"'),
        (lambda: label_shift(torch.eye(2), torch.zeros(2).long(), torch.eye(2)), "every class needs an example"),
        (lambda: label_shift(torch.eye(2), torch.arange(2), torch.eye(3)), "the same classes to both"),
        (lambda: label_shift(torch.eye(2), torch.arange(1), torch.eye(2)), "give a label to each row"),
        (lambda: label_shift(torch.ones(4, 2), torch.arange(4) % 2, torch.eye(2)), "nearly the same of all classes"),
        (lambda: label_shift(torch.eye(2), torch.tensor([0, -100]), torch.eye(2)), "the least is -100.*leave out"),
        (lambda: label_shift(torch.eye(2), torch.tensor([0.0, 1.0]), torch.eye(2)), "labels are torch.float32"),
        (lambda: label_shift(torch.eye(2), torch.arange(2), torch.eye(2)[:0]), "one row or more of both"),
        (lambda: label_shift(torch.eye(2)[:0], torch.arange(0), torch.eye(2)), "one row or more of both"),
        (lambda: label_shift(torch.eye(2) * math.nan, torch.arange(2), torch.eye(2)), "2 of the 2 rows of source"),
        (
            lambda: label_shift(torch.eye(2), torch.arange(2), torch.tensor([[math.nan, 0.0]]), "likelihood"),
            "1 of the 1 rows of target logits hold NaN",
        ),
        (lambda: label_shift(torch.eye(2) * math.inf, torch.arange(2), torch.eye(2)), "2 of the 2 rows of source"),
        (
            lambda: label_shift(torch.eye(2), torch.arange(2), torch.tensor([[math.inf, 0.0], [1.0, 0.0]])),
            "1 of the 2 rows of target logits hold NaN or infinity",
        ),
        (lambda: reweigh(torch.zeros(1, 2), [math.inf, 1.0]), "finite and not all 0"),
        (lambda: reweigh(torch.zeros(1, 2), [math.nan, 1.0]), "finite and not all 0"),
        (lambda: effective_size([1.0, math.inf]), "finite numbers of at least 0"),
        (lambda: reweigh(torch.zeros(1, 2), [1.0]), "one number of at least 0"),
        (lambda: reweigh(torch.zeros(1, 2), [-1.0, 1.0]), "one number of at least 0"),
    ],
)
def test_shares_that_cannot_be_told_are_refused(call, told):
    with pytest.raises(ValueError, match=told):
        call()


# ---------------------------------------------------------------- statistics


def normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5)).eval()


def test_statistics_of_the_target_hold_inside_the_block_and_no_longer():
    net, x = normed(), 3 * torch.randn(32, 3, 5, 5) + 2
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.no_grad(), target_statistics(net, x, batch_size=32):
        inside = net(x).unflatten(1, (4, -1))
        assert not net.training and inside.mean((0, 2)).abs().max() < 1e-4
        assert (inside.var((0, 2)) - 1).abs().max() < 1e-2
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_kept_statistics_are_mixed_in():
    net, x = normed(), torch.randn(16, 3, 5, 5) + 2
    own = net[1].running_mean.clone()
    with target_statistics(net, x):
        new = net[1].running_mean.clone()
    for keep in (0.25, 1.0):
        with target_statistics(net, x, keep):
            assert torch.allclose(net[1].running_mean, keep * own + (1 - keep) * new, atol=1e-6)


def test_statistics_come_back_after_an_error():
    net, before = normed(), copy.deepcopy(normed().state_dict())
    with pytest.raises(KeyError), target_statistics(net, torch.randn(8, 3, 5, 5)):
        raise KeyError("inside")
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_models_without_statistics_are_refused():
    with pytest.raises(ValueError, match="no batch normalization with running statistics"):
        target_statistics(Net(), torch.zeros(4, 3)).__enter__()
    with pytest.raises(ValueError, match="give a share from 0 to 1"):
        target_statistics(normed(), torch.zeros(4, 3, 5, 5), 2.0).__enter__()
    net, x = normed(), torch.zeros(4, 3, 5, 5)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x[1, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="a running_mean that is NaN or infinite; leave out"):
        target_statistics(net, x).__enter__()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    held = normed()
    freeze(held)
    with pytest.raises(ValueError, match="held by freeze"):
        target_statistics(held, torch.zeros(4, 3, 5, 5)).__enter__()


# ---------------------------------------------------------------- continued pretraining

TEXTS = ["The battery lasts for two days and the screen is bright."] * 8


@pytest.fixture(scope="module")
def bert():
    return models.load("bert_mini_en")


def test_an_encoder_without_a_head_for_words_gets_one_and_comes_back_as_it_was(bert):
    net, tokenizer = bert
    body = copy.deepcopy(net.bert)
    before = {k: v.clone() for k, v in body.state_dict().items()}
    about = {"steps": 2, "length": 32, "batch_size": 2, "settings": PLAN}
    read, history = continue_pretraining(body, tokenizer, TEXTS, **about)
    assert type(read) is type(body) and not read.training and len(history["train_loss"]) == 2
    assert all(torch.equal(v, before[k]) for k, v in body.state_dict().items()), "a copy is trained"
    assert any(not torch.equal(v, before[k]) for k, v in read.state_dict().items())


def test_the_new_head_begins_with_the_vectors_as_they_are_and_the_own_word_embeddings(bert):
    net = module._with_words(copy.deepcopy(bert[0].bert))
    embeddings = net.bert.embeddings.word_embeddings.weight
    assert net.cls.predictions.decoder.weight.data_ptr() == embeddings.data_ptr()
    dense = net.cls.predictions.transform.dense.weight
    assert torch.equal(dense, torch.eye(len(dense)))


def test_the_same_seed_reads_the_same_and_the_callers_draws_stay(bert):
    about = {"steps": 1, "length": 32, "batch_size": 2, "settings": PLAN}
    made = [continue_pretraining(*bert, TEXTS, seed=3, **about)[0].state_dict() for _ in range(2)]
    assert all(torch.equal(v, made[1][k]) for k, v in made[0].items())


def test_what_is_no_bert_is_refused(bert):
    with pytest.raises(TypeError, match="give a BertModel or a BertForMaskedLM"):
        continue_pretraining(Net(), bert[1], TEXTS, length=32)


# ---------------------------------------------------------------- the studies


def test_domains_are_drawn_once_and_keep_their_classes():
    films, products = (study.domain(name) for name in ("SST-2", "CR"))
    assert films["train"].classes == products["train"].classes
    assert set(films) == {"train", "valid", "test"} and study.other("CR") == "SST-2"


def test_lower_layers_then_upper_ones_are_the_whole_model():
    inputs = study.read("CR", "valid")
    upper = study._start(0)
    whole = study.plain_classifier(study.encoder()[0])
    whole.head.load_state_dict(upper.head.state_dict())
    texts = study.encode_texts(study.domain("CR")["valid"].texts, study.encoder()[1], study.LONG)
    assert torch.allclose(study.outputs(upper, inputs), study.outputs(whole, texts), atol=1e-4)


def test_all_ways_have_as_many_settings_to_choose_from():
    tried = {len(g) for g in study.STRENGTHS.values()} | {len(study.RATES)}
    assert len(tried) == 1
    assert study.mildest("self-training") > study.hardest("self-training")
    assert study.mildest("DANN") < study.hardest("DANN")


@pytest.mark.parametrize("way", [study.MAJORITY, study.ONLY, study.SHARES, study.WEIGHED, "DANN", study.SELF])
def test_a_way_scores_both_domains(way):
    lr = None if way == study.MAJORITY else 1e-3
    strength = study.STRENGTHS.get(way, [None])[0]
    found = study.run(0, "test", "CR", way, lr, strength)
    assert set(found) == {"home", "accuracy"} and all(set(v) <= {0.0, 1.0} for v in found.values())


def test_what_chooses_is_the_source_and_for_target_labels_the_target():
    answer = study._constant("SST-2")
    of = {w: study._judged(answer, "SST-2", w) for w in (study.ONLY, study.ORACLE)}
    assert of[study.ONLY]["known"].tolist() == study._right(answer, "SST-2", "valid").tolist()
    assert of[study.ORACLE]["known"].tolist() == study._right(answer, "CR", "valid").tolist()
    assert of[study.ONLY]["cheat"].tolist() == study._right(answer, "CR", "test").tolist()


def test_photos_of_the_parts_are_apart_and_changed_ones_are_the_same_photos():
    clean = {part: study.photo_part(study.CLEAN, part) for part in study.PHOTOS}
    dark, y = study.photo_part("darker", "test")
    assert torch.equal(y, clean["test"][1]) and dark.mean() < clean["test"][0].mean()
    assert not any((clean["test"][0][0] == x).all() for x in clean["pool"][0])


def test_a_study_goes_on_where_it_stopped(monkeypatch, tmp_path):
    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path))
    monkeypatch.setattr(study, "STRENGTH_OF", {"darker": 0.7})
    study.main("photos")
    ran = []
    monkeypatch.setattr(study, "run_photo", lambda **about: ran.append(about))
    study.main("photos")
    found = results.load_study(study.CHAPTER, "photos")
    assert not ran and {r["way"] for r in found.rows("accuracy")} >= {study.TRAINED, study.RENEWED, study.ORACLE}


def test_an_unknown_part_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match="no study 'words'; use distances, text"):
        study.main("words")
