"""Chapter 22: attacks in their balls, equal to foolbox; training, sanity checks, texts, edits, swaps, explanations, the studies."""

import copy
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupts import Interrupt
from torch import nn

from ftbook import adversarial as module
from ftbook import models, results
from ftbook.adversarial import (
    Agree,
    Attacked,
    FreeTraining,
    NearTexts,
    edit_attack,
    fgsm,
    pgd,
    project,
    sanity_checks,
    typos,
    with_synonyms,
    with_typos,
    withstands,
)
from ftbook.checkpoint import Checkpoint
from ftbook.explain import (
    SwapPairs,
    attention_rollout,
    attentions,
    counterparts,
    deletion,
    embedded,
    integrated_gradients,
    leave_one_out,
    swap_gaps,
)
from ftbook.studies import adversarial as study
from ftbook.texts import TextClassifier, encode_texts, sentence_vectors
from ftbook.train import Settings, fit

PLAN = Settings(precision="fp32", weight_decay=0.0, progress=False)
TEXTS = ["A dull film.", "A warm and clever story about nothing in particular.", "Fine."]


def network(seed=0, classes=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, classes)).eval()


@pytest.fixture(scope="module")
def pictures():
    torch.manual_seed(1)
    return torch.rand(12, 1, 4, 4), torch.randint(3, (12,))


@pytest.fixture(scope="module")
def bert():
    body, tokenizer = models.load("bert_mini_en")
    torch.manual_seed(0)
    return TextClassifier(copy.deepcopy(body)).eval(), encode_texts(TEXTS, tokenizer), tokenizer


def size(delta, norm):
    flat = delta.flatten(1)
    return flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)


# ---------------------------------------------------------------- the ball


@settings(deadline=None, max_examples=25)
@given(
    st.floats(0, 1),
    st.sampled_from(["linf", "l2"]),
    st.integers(1, 4),
    st.integers(1, 2),
    st.booleans(),
    st.floats(0.01, 3),
)
def test_an_attack_stays_in_its_ball_and_in_the_images_range(eps, norm, steps, restarts, start, step):
    net, x, y = network(), torch.rand(5, 1, 4, 4), torch.randint(3, (5,))
    found = pgd(net, x, y, eps, norm=norm, steps=steps, step=step, restarts=restarts, start=start)
    assert (size(found - x, norm) <= eps + 1e-5).all() and 0 <= found.min() and found.max() <= 1
    one = fgsm(net, x, y, eps, norm=norm)
    assert (size(one - x, norm) <= eps + 1e-5).all() and 0 <= one.min() and one.max() <= 1


@given(st.floats(0, 5), st.sampled_from(["linf", "l2"]))
def test_a_projection_is_the_nearest_point_and_leaves_what_is_inside(eps, norm):
    delta = torch.randn(6, 7)
    near = project(delta, eps, norm)
    assert (size(near, norm) <= eps + 1e-5).all()
    inside = size(delta, norm) <= eps
    assert torch.allclose(near[inside], delta[inside])
    assert torch.allclose(project(near, eps, norm), near, atol=1e-6)


@pytest.mark.parametrize("norm, dual", [("linf", 1), ("l2", 2)])
def test_against_a_linear_model_one_step_takes_the_dual_norm(norm, dual):
    w = torch.randn(1, 8)
    x, y = torch.zeros(1, 8), torch.tensor([1])

    def model(v):
        return torch.cat((torch.zeros(len(v), 1), v @ w.T), 1)

    for attack, close in ((fgsm, 1e-4), (pgd, 0.03)):  # many steps come near it
        found = attack(model, x, y, 0.3, norm=norm, bounds=None)
        fell = (model(x) - model(found))[0, 1].item()
        assert fell == pytest.approx(0.3 * w.norm(p=dual).item(), rel=close)


def test_random_starts_fill_the_ball_and_come_again_with_the_seed():
    x = torch.zeros(4000, 2)
    for norm in ("linf", "l2"):
        away = module._drawn(x, 2.0, norm, torch.Generator().manual_seed(0))
        assert (size(away, norm) <= 2 + 1e-6).all()
        inner = (size(away, norm) <= 1).float().mean().item()
        assert inner == pytest.approx(0.25, abs=0.03), "a quarter of the area"
    net, x, y = network(), torch.rand(3, 16), torch.zeros(3).long()
    assert torch.equal(pgd(net, x, y, 0.1, seed=3), pgd(net, x, y, 0.1, seed=3))
    short = {"steps": 1, "step": 0.01}
    assert not torch.equal(pgd(net, x, y, 0.1, seed=3, **short), pgd(net, x, y, 0.1, seed=4, **short))


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda n, x, y: fgsm(n.train(), x, y, 0.1), "is in train mode: .* Call model.eval"),
        (lambda n, x, y: pgd(n.train(), x, y, 0.1), "is in train mode"),
        (lambda n, x, y: withstands(nn.Sequential(n, nn.Dropout()), x, y, 0.1), "is in train mode"),
        (lambda n, x, y: fgsm(n, x, y, -0.1), "eps=-0.1: the radius of a ball"),
        (lambda n, x, y: pgd(n, x, y, -0.1), "eps=-0.1: the radius of a ball"),
        (lambda n, x, y: pgd(n, x, y, math.nan), "eps=nan"),
        (lambda n, x, y: withstands(n, x, y, -1), "eps=-1"),
        (lambda n, x, y: Attacked(n, -0.1), "eps=-0.1"),
        (lambda n, x, y: FreeTraining(-0.1), "eps=-0.1"),
        (lambda n, x, y: NearTexts(n, -0.1), "eps=-0.1"),
        (lambda n, x, y: pgd(n, x, y, 8.0), "reaches beyond the whole range.*divide by 255"),
        (lambda n, x, y: pgd(n, x, y, 5.0, norm="l2"), "4 wide in l2"),
        (lambda n, x, y: pgd(n, 3 * x, y, 0.1), "its range is 0 to 1: attack what the camera saw"),
        (lambda n, x, y: pgd(n, x, y, 0.1, norm="l1"), 'allowed are "linf" and "l2"'),
        (lambda n, x, y: pgd(n, x, y, 0.1, steps=0), "1 or more steps"),
        (lambda n, x, y: pgd(n, x, y, 0.1, step=math.nan), "step=nan.*a finite length above 0"),
        (lambda n, x, y: pgd(n, x, y, 0.1, step=math.inf), "step=inf.*a finite length above 0"),
        (lambda n, x, y: withstands(n, x, n(x).argmax(1), 0.1, step=math.nan), "step=nan"),
        (lambda n, x, y: pgd(n, x, y.where(y > 0, -100), 0.1), "labels are below 0, the least is -100; leave out"),
        (lambda n, x, y: fgsm(n, x, y - 3, 0.1), "12 of 12 labels are below 0, the least is -3"),
        (lambda n, x, y: sanity_checks(n, x, y, 0.1, n, slack=2), "slack=2: .*a share of the examples"),
        (lambda n, x, y: sanity_checks(n, x, y, 0.1, n, slack=math.nan), "slack=nan"),
        (lambda n, x, y: sanity_checks(n, x, y, 0.1, n, bounds=None), r"bounds=None, .*: give \(low, high\)"),
        (lambda n, x, y: Agree(math.inf), "weight=inf"),
        (lambda n, x, y: FreeTraining(0.1, step=math.nan), "step=nan: give a length above 0"),
        (lambda n, x, y: pgd(lambda v: n(v).detach(), x, y, 0.1), "no gradient reaches the input"),
        (lambda n, x, y: Agree(-1.0), "a weight of 0 or more"),
        (lambda n, x, y: Agree(1.0, "both"), "trades"),
        (lambda n, x, y: FreeTraining(0.1, replays=0), "once or more"),
        (lambda n, x, y: NearTexts(n, 0.1, "free"), "freelb, vat, smart"),
        (lambda n, x, y: pgd(n, x.where(x != x[0, 0, 0, 0], math.nan), y, 0.1), "1 of 12 examples in x hold NaN"),
        (lambda n, x, y: fgsm(n, x * math.inf, y, 0.1, bounds=None), "12 of 12 examples in x hold NaN or infinity"),
        (lambda n, x, y: pgd(n, x, y, 0.1, bounds=(1, 0)), r"bounds=\(1, 0\): give \(low, high\)"),
        (lambda n, x, y: withstands(n, x, y, 0.0, bounds=(0.5, 0.5)), r"bounds=\(0.5, 0.5\)"),
        (lambda n, x, y: withstands(n, x, y[:11], 0.1), "x has 12 examples, y 11; give the right class of each"),
        (lambda n, x, y: pgd(n, x[:3], y, 0.1), "x has 3 examples, y 12"),
        (lambda n, x, y: fgsm(n, x, y[:1], 0.1), "x has 12 examples, y 1"),
        (lambda n, x, y: withstands(n, x, -y - 1, 0.1), "the least is -3; give class numbers"),
        (lambda n, x, y: withstands(n, x, y.float(), 0.1), r"\(12,\), torch.float32"),
        (lambda n, x, y: FreeTraining(8.0), "eps=8 reaches beyond the whole range, 1 wide.*divide by 255"),
        (lambda n, x, y: FreeTraining(0.1, step=-1), "step=-1: give a length above 0"),
        (lambda n, x, y: FreeTraining(0.1, step=0.0), "step=0.0: give a length above 0"),
        (lambda n, x, y: FreeTraining(0.1, bounds=(1.0, 0.0)), "the lowest value of an input first"),
    ],
)
def test_what_would_make_the_number_mean_something_else_is_refused(call, told, pictures):
    with pytest.raises(ValueError, match=told):
        call(network(), *pictures)


def test_bytes_are_no_images_for_an_attack(pictures):
    x, y = pictures
    with pytest.raises(TypeError, match="give floats, images as ftbook.images.as_images"):
        fgsm(network(), (255 * x).to(torch.uint8), y, 0.1)


def test_an_attack_leaves_weights_gradients_and_input_as_they_are(pictures):
    net, (x, y) = network(), pictures
    before, x_before = copy.deepcopy(net.state_dict()), x.clone()
    found = pgd(net, x, y, 0.2, restarts=2)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items()) and torch.equal(x, x_before)
    assert all(p.grad is None for p in net.parameters()) and not found.requires_grad
    with torch.no_grad():
        assert not torch.equal(pgd(net, x, y, 0.2), x), "it also runs where gradients are switched off"


def test_more_steps_and_more_restarts_raise_the_loss(pictures):
    net, (x, y) = network(), pictures

    def loss(v):
        return F.cross_entropy(net(v), y, reduction="none")

    one, many = fgsm(net, x, y, 0.2), pgd(net, x, y, 0.2, seed=0)
    often = pgd(net, x, y, 0.2, restarts=4, seed=0)
    assert loss(x).mean() < loss(one).mean() <= loss(many).mean() + 1e-4
    assert (loss(often) >= loss(many) - 1e-4).all() or (net(often).argmax(1) != y).sum() >= (
        net(many).argmax(1) != y
    ).sum()


def test_restarts_keep_what_turned_an_example():
    tries = iter([0.5, 0.2, 0.9])

    def model(v):
        return torch.stack((0.3 - v[:, 0], v[:, 0] - 0.3), 1)

    def walk(*_):
        return torch.full((1, 1), next(tries)) - 0.1

    kept = module._drawn
    module._drawn = walk
    try:
        found = pgd(model, torch.full((1, 1), 0.1), torch.tensor([0]), 1.0, steps=1, step=1e-6, restarts=3)
    finally:
        module._drawn = kept
    assert found.item() == pytest.approx(0.9, abs=1e-4)


def test_right_at_radius_zero_is_accuracy_and_a_wrong_answer_is_not_attacked(pictures):
    net, (x, y) = network(), pictures
    right = net(x).argmax(1) == y
    assert torch.equal(withstands(net, x, y, 0.0), right)
    asked = []

    def attack(model, a, b, eps):
        asked.append(len(a))
        return a

    assert torch.equal(withstands(net, x, y, 0.1, attack=attack, batch_size=5), right)
    assert sum(asked) == int(right.sum())


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("steps", [1, 10])
def test_the_points_are_those_of_foolbox(norm, steps, pictures):
    foolbox = pytest.importorskip("foolbox", reason="foolbox is in the bench extra")
    net, (x, y) = network(), pictures
    eps = 0.2 if norm == "linf" else 0.7
    kind = foolbox.attacks.LinfPGD if norm == "linf" else foolbox.attacks.L2PGD
    attack = kind(rel_stepsize=0.25, steps=steps, random_start=False)
    wrapped = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    theirs = attack(wrapped, x, y, epsilons=eps)[1]
    ours = pgd(net, x, y, eps, norm=norm, steps=steps, step=0.25 * eps, start=False)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_one_step_is_foolboxs_fgsm(pictures):
    foolbox = pytest.importorskip("foolbox", reason="foolbox is in the bench extra")
    net, (x, y) = network(), pictures
    wrapped = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    theirs = foolbox.attacks.FGSM(random_start=False)(wrapped, x, y, epsilons=0.1)[1]
    assert torch.allclose(fgsm(net, x, y, 0.1), theirs, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_points_are_those_of_torchattacks(norm, pictures):
    torchattacks = pytest.importorskip(
        "torchattacks", reason="no extra has torchattacks, which pins an old requests: install it with --no-deps"
    )
    net, (x, y) = network(), pictures
    if norm == "linf":
        attack = torchattacks.PGD(net, eps=0.2, alpha=0.05, steps=10, random_start=False)
    else:
        attack = torchattacks.PGDL2(net, eps=0.7, alpha=0.2, steps=10, random_start=False)
    eps, step = (0.2, 0.05) if norm == "linf" else (0.7, 0.2)
    ours = pgd(net, x, y, eps, norm=norm, steps=10, step=step, start=False)
    assert torch.allclose(ours, attack(x, y), atol=1e-5)


# ---------------------------------------------------------------- training


def test_a_batch_is_attacked_in_eval_mode_and_trained_in_train_mode(pictures):
    x, y = pictures
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 3)).train()
    net[2].eval()
    seen = []

    def attack(model, a, b, eps):
        seen.append([m.training for m in model.modules()])
        return pgd(model, a, b, eps, steps=2)

    before = net[1].running_mean.clone()
    changed, same = Attacked(net, 0.1, attack)(x, y)
    assert not any(seen[0]) and net.training and not net[2].training and same is y
    assert torch.equal(net[1].running_mean, before), "batch norm has not seen the attack"
    assert (changed - x).abs().max() <= 0.1 + 1e-6


def test_training_on_attacks_withstands_them():
    torch.manual_seed(0)
    y = torch.randint(2, (200,))
    far = y[:, None].float()
    weak = 0.45 + 0.1 * far + 0.002 * torch.randn(200, 20)  # many inputs, each a little bent by the class
    x, left = torch.cat((0.35 + 0.3 * far, weak), 1), []
    for attacked in (False, True):
        torch.manual_seed(0)
        net = nn.Linear(21, 2)
        plan = Settings(precision="fp32", progress=False, transform=Attacked(net, 0.1, steps=2) if attacked else None)
        fit(net, (x, y), epochs=30, lr=0.05, batch_size=100, settings=plan)
        assert (net.eval()(x).argmax(1) == y).all()
        left.append(withstands(net, x, y, 0.1, seed=0).float().mean().item())
    assert left[0] < 0.7 and left[1] > 0.95


def test_copies_for_agreement_carry_no_label_and_validation_is_plain(pictures):
    net, (x, y) = network(), pictures
    both, told = Attacked(net, 0.1, agree=True, steps=2)(x, y)
    assert torch.equal(both[:12], x) and (told[12:] == -100).all() and torch.equal(told[:12], y)
    logits = net(both)
    own, near = logits.chunk(2)
    kl = F.kl_div(near.log_softmax(1), own.log_softmax(1), reduction="batchmean", log_target=True)
    wanted = F.cross_entropy(own, y) + 3 * kl
    assert torch.isclose(Agree(3.0)(logits, told), wanted, atol=1e-6)
    back = F.kl_div(own.log_softmax(1), near.log_softmax(1), reduction="batchmean", log_target=True)
    assert torch.isclose(Agree(3.0, "smart")(logits, told), wanted + 3 * back, atol=1e-6)
    assert torch.isclose(Agree(3.0)(own, y), F.cross_entropy(own, y))
    assert kl > 0, "the attack looked for another answer"


@pytest.mark.parametrize("kind, held", [("trades", False), ("vat", True)])
def test_virtual_adversarial_training_holds_the_own_answer(kind, held):
    logits = torch.randn(4, 3, requires_grad=True)
    told = torch.tensor([0, 1, -100, -100])
    (with_term,) = torch.autograd.grad(Agree(2.0, kind)(logits, told), logits)
    (without,) = torch.autograd.grad(F.cross_entropy(logits[:2], told[:2]), logits)
    assert torch.allclose(with_term[:2], without[:2], atol=1e-7) is held


def test_trades_trains_with_fit_and_metrics_count_the_labeled_half(pictures):
    net, data = network(), pictures
    plan = Settings(precision="fp32", progress=False, transform=Attacked(net, 0.1, agree=True, steps=2))
    history = fit(net, data, data, loss=Agree(1.0), metrics="accuracy", epochs=3, lr=0.01, settings=plan)
    assert 0 <= history["train_accuracy"][-1] <= 1 and history["train_loss"][-1] < history["train_loss"][0]


def test_free_training_follows_the_gradient_of_the_pass_before():
    torch.manual_seed(0)
    net, x, y = nn.Linear(4, 2), torch.rand(6, 4), torch.randint(2, (6,))
    free = FreeTraining(0.1, replays=3)
    first, _ = free(x, y)
    assert torch.equal(first, x), "nothing is known yet"
    F.cross_entropy(net(first), y).backward()
    slope = first.grad.clone()
    second, _ = free(x, y)
    assert torch.allclose(second, (x + 0.1 * slope.sign()).clamp(0, 1))
    short, _ = free(x[:2], y[:2])
    assert torch.equal(short, x[:2]), "a batch of another size begins anew"


def test_free_training_uses_each_batch_as_often_as_it_says():
    batches = [(torch.rand(8, 3), torch.zeros(8).long()), (torch.rand(8, 3), torch.ones(8).long())]
    free = FreeTraining(0.1, replays=3)
    again = free.batches(batches)
    assert len(again) == 6 and [b[1][0].item() for b in again] == [0, 0, 0, 1, 1, 1]
    history = fit(nn.Linear(3, 2), again, epochs=2, settings=Settings(precision="fp32", progress=False, transform=free))
    assert history["steps"] == [6, 12]


@pytest.mark.parametrize("told", ["as transform", "as callback, too"])
def test_free_training_goes_on_bit_for_bit_after_a_stop(tmp_path, told):
    draws = torch.Generator().manual_seed(0)
    batches = [(torch.rand(8, 3, generator=draws), torch.arange(8) % 2) for _ in range(2)]

    def run(name, at=0):
        torch.manual_seed(0)
        net, free = nn.Linear(3, 2), FreeTraining(0.1, replays=3, step=0.03)
        plan = Settings(precision="fp32", progress=False, transform=free)
        files = [Checkpoint(tmp_path / name, every=1), Interrupt(at)]
        files += [free] if told == "as callback, too" else []
        fit(net, free.batches(batches), epochs=3, lr=0.1, callbacks=files, settings=plan)
        return net.state_dict() | {"delta": free.state_dict()["delta"]}

    whole = run("whole.pt")
    for at in (2, 3, 7):
        with pytest.raises(KeyboardInterrupt):
            run(f"{at}.pt", at)
        again = run(f"{at}.pt")
        assert all(torch.equal(value, again[name]) for name, value in whole.items()), at
    assert whole["delta"].abs().max() > 0


def test_free_training_forgets_the_run_before():
    free = FreeTraining(0.1)
    x, y = torch.rand(6, 4), torch.randint(2, (6,))
    F.cross_entropy(nn.Linear(4, 2)(free(x, y)[0]), y).backward()
    free.on_train_begin(None)
    assert torch.equal(free(x, y)[0], x)


# ---------------------------------------------------------------- sanity


@pytest.fixture(scope="module")
def digits():
    """Images that a small network tells apart, and two networks that do."""
    torch.manual_seed(0)
    shapes = torch.rand(3, 16).round()
    y = torch.arange(60) % 3
    x = (0.25 + 0.5 * shapes[y] + 0.1 * torch.randn(60, 16)).clamp(0, 1).view(60, 1, 4, 4)
    nets = []
    for seed in (0, 1):
        net = network(seed).train()
        fit(net, (x, y), epochs=40, lr=0.01, settings=PLAN)
        nets.append(net.eval())
    assert (nets[0](x).argmax(1) == y).all()
    return x, y, *nets


def test_an_honest_network_passes_the_checks_and_a_fake_defense_does_not(digits):
    x, y, net, other = digits
    honest = sanity_checks(net, x, y, 0.3, other)
    assert len(honest) == 5 and all(line["passed"] for line in honest), honest
    fake = study.Rounded(net, 4).eval()
    lines = {line["check"]: line for line in sanity_checks(fake, x, y, 0.3, other)}
    failed = {name for name, line in lines.items() if not line["passed"]}
    assert "its own gradients beat another model's" in failed and "without a limit nothing is left" in failed
    white = lines["gradients beat noise"]["is"]
    around = withstands(fake, x, y, 0.3, attack=lambda m, a, b, e: pgd(m.net, a, b, e, seed=0)).float().mean()
    assert around < white, "who knows of the rounding goes around it"


def test_the_checks_read_the_same_a_second_time(digits):
    x, y, net, other = digits
    assert sanity_checks(net, x, y, 0.2, other, steps=3) == sanity_checks(net, x, y, 0.2, other, steps=3)


# ---------------------------------------------------------------- texts


def test_freelb_is_the_mean_loss_on_the_way_uphill(bert):
    net, inputs, _ = bert
    y = torch.tensor([0, 1, 0])
    near = NearTexts(net, 0.5, "freelb", steps=3)
    torch.manual_seed(5)
    made = near(inputs | {"labels": y})
    assert len(made["labels"]) == 9 and torch.equal(made["labels"], y.repeat(3))
    own = net.get_input_embeddings()(inputs["input_ids"])
    seen = inputs["attention_mask"][..., None]
    deltas = (made["inputs_embeds"] - own.repeat(3, 1, 1)).detach()
    assert (size(deltas * seen.repeat(3, 1, 1), "l2") <= 0.5 + 1e-4).all()
    first, second = deltas[:3], deltas[3:6]
    seat = (own.detach() + first).requires_grad_()
    losses = F.cross_entropy(net(inputs_embeds=seat, attention_mask=inputs["attention_mask"]), y, reduction="sum")
    (slope,) = torch.autograd.grad(losses, seat)
    slope = slope * seen
    step = first + 0.5 * slope / slope.flatten(1).norm(dim=1)[:, None, None]
    assert torch.allclose(second, project(step, 0.5, "l2"), atol=1e-5)


@pytest.mark.parametrize("kind", ["vat", "smart"])
def test_a_neighbor_has_another_answer_and_padding_stays(kind, bert):
    net, inputs, _ = bert
    eps = 1.0 if kind == "vat" else 0.05
    made = NearTexts(net, eps, kind)(inputs | {"labels": torch.tensor([0, 1, 0])})
    own, near = made["inputs_embeds"].chunk(2)
    delta = (near - own).detach()
    hidden = inputs["attention_mask"] == 0
    assert (delta[hidden] == 0).all() and made["labels"].tolist() == [0, 1, 0, -100, -100, -100]
    norm = "l2" if kind == "vat" else "linf"
    assert (size(delta, norm) <= eps + 1e-5).all()
    mask = inputs["attention_mask"]
    answers = [net(inputs_embeds=v, attention_mask=mask).softmax(1) for v in (own, near)]
    noise = module._drawn(own, eps, norm, torch.Generator().manual_seed(0))
    noise = noise * mask[..., None]
    random_answer = net(inputs_embeds=own + noise, attention_mask=mask).softmax(1)
    moved = (answers[1] - answers[0]).abs().sum()
    assert moved > (random_answer - answers[0]).abs().sum()


def test_neighbors_train_with_fit_and_reach_the_embedding(bert):
    net, inputs, _ = bert
    net = copy.deepcopy(net)
    table = net.get_input_embeddings().weight
    before = table.detach().clone()
    data = [inputs | {"labels": torch.tensor([0, 1, 0])}]
    for kind, loss in (("freelb", "cross_entropy"), ("vat", Agree(1.0, "vat")), ("smart", Agree(1.0, "smart"))):
        plan = Settings(precision="fp32", progress=False, transform=NearTexts(net, 0.1, kind))
        history = fit(net, data, loss=loss, epochs=2, lr=1e-3, settings=plan)
        assert history["train_loss"][-1] < history["train_loss"][0]
    assert not torch.equal(table.detach(), before)


# ---------------------------------------------------------------- edits


@given(st.text(alphabet="abcdefgh", min_size=1, max_size=9))
def test_a_typo_keeps_first_and_last_letter_and_is_one_slip_away(word):
    made = typos(word)
    assert len(made) == len(set(made)) and word not in made and (len(word) > 3 or not made)
    for new in made:
        assert new[0] == word[0] and new[-1] == word[-1] and abs(len(new) - len(word)) <= 1


def test_copies_with_typos_differ_in_one_word_each():
    text = "a charming and often affecting journey"
    made = with_typos(text, 6, random.Random(0))
    assert len(made) == len(set(made)) == 6 and made == with_typos(text, 6, random.Random(0))
    for new in made:
        assert sum(a != b for a, b in zip(text.split(), new.split(), strict=True)) == 1
    assert with_typos("is it so", 3, random.Random(0)) == [], "short words stay"


def test_synonyms_that_move_the_meaning_far_are_left_out():
    encoder = models.load("bert_mini_en")
    text = "a charming and often affecting journey"
    every = with_synonyms(text, 8, random.Random(0))
    assert every and all(t != text for t in every)
    assert with_synonyms(text, 8, random.Random(0), encoder, -1.0) == every
    assert with_synonyms(text, 8, random.Random(0), encoder, 1.01) == []
    some = with_synonyms(text, 8, random.Random(0), encoder, 0.97)
    vectors = sentence_vectors([text, *some], *encoder)
    assert (F.cosine_similarity(vectors[1:], vectors[:1]) >= 0.97 - 1e-6).all()


def counter(texts):
    return torch.tensor([[0.0, t.count("e") - 1.5] for t in texts])


def test_an_edit_attack_is_greedy_and_keeps_to_its_budget():
    def propose(text):
        return [text[:i] + text[i + 1 :] for i in range(len(text))]

    found = edit_attack(counter, "eleven", 1, propose, edits=1)
    assert not found.won and found.edits == 1 and found.text.count("e") == 2 and found.asked == 7
    found = edit_attack(counter, "eleven", 1, propose, edits=3)
    assert found.won and found.edits == 2 and found.text.count("e") == 1 and found.asked == 12
    assert edit_attack(counter, "none", 1, propose).won and edit_attack(counter, "none", 1, propose).edits == 0
    stuck = edit_attack(counter, "eleven", 1, lambda t: [t + "e"])
    assert not stuck.won and stuck.edits == 0, "a copy that helps the right class is not taken"
    assert edit_attack(counter, "eleven", 1, lambda t: []).text == "eleven"
    with pytest.raises(ValueError, match="allow 1 edit or more"):
        edit_attack(counter, "eleven", 1, propose, edits=0)
    for y in (-1, 2):
        with pytest.raises(ValueError, match=f"y={y}, and the model has 2 classes; .* 0 to 1"):
            edit_attack(counter, "eleven", y, propose)


# ---------------------------------------------------------------- groups


def test_counterparts_are_the_same_sentence_about_two():
    a, b = counterparts(["{} sang.", "we saw {}."], ["ann", "kate"], ["bill", "jeff"])
    assert a == ["ann sang.", "kate sang.", "we saw ann.", "we saw kate."] and b[3] == "we saw jeff."
    with pytest.raises(ValueError, match="2 and 1 names"):
        counterparts(["{}"], ["a", "b"], ["c"])
    with pytest.raises(ValueError, match="must have {} once"):
        counterparts(["nobody"], ["a"], ["b"])


def test_a_gap_is_the_difference_in_log_odds():
    table = {"a": [1.0, 2.0, 0.5], "b": [1.5, 0.0, 0.5]}

    def answer(texts):
        return torch.tensor([table[t] for t in texts])

    gaps = swap_gaps(answer, ["a"], ["b"])
    p = [torch.tensor(table[k]).softmax(0)[1] for k in "ab"]
    wanted = (p[0] / (1 - p[0])).log() - (p[1] / (1 - p[1])).log()
    assert torch.isclose(gaps.difference, wanted).all() and gaps.flipped.tolist() == [True]
    with pytest.raises(ValueError, match="1 and 2 texts; give pairs"):
        swap_gaps(answer, ["a"], ["b", "a"])


def test_pairs_that_should_be_alike_become_so(bert):
    net, inputs, tokenizer = bert
    a, b = counterparts(["{} sang.", "we saw {} there."], ["ann", "kate"], ["bill", "jeff"])
    both = [encode_texts(t, tokenizer) for t in (a, b)]
    data, left = [inputs | {"labels": torch.tensor([0, 1, 0])}], []
    for weight in (0.0, 30.0):
        tuned = copy.deepcopy(net)
        pairs = SwapPairs(*both, weight=weight, per_batch=4)
        plan = Settings(precision="fp32", progress=False, transform=pairs.transform)
        fit(tuned, data, loss=pairs.loss, epochs=8, lr=3e-4, settings=plan)
        tuned.eval()
        gaps = swap_gaps(lambda t, m=tuned: m(**encode_texts(t, tokenizer)), a, b)
        left.append(gaps.difference.abs().mean().item())
    assert left[1] < left[0] / 2


def test_pairs_add_to_the_loss_what_they_are_apart():
    one = {"input_ids": torch.ones(3, 4).long(), "attention_mask": torch.ones(3, 4).long()}
    pairs = SwapPairs(one, one, weight=2.0, per_batch=2)
    batch = {"input_ids": torch.ones(2, 6).long(), "attention_mask": torch.ones(2, 6).long()}
    made = pairs.transform(batch | {"labels": torch.tensor([0, 1])})
    assert made["input_ids"].shape == (6, 6) and made["attention_mask"][2:, 4:].sum() == 0
    logits = torch.randn(6, 2)
    p, q = (v.log_softmax(1) for v in (logits[2:4], logits[4:]))
    apart = F.kl_div(q, p, reduction="batchmean", log_target=True) + F.kl_div(
        p, q, reduction="batchmean", log_target=True
    )
    wanted = F.cross_entropy(logits[:2], torch.tensor([0, 1])) + 2 * apart
    assert torch.isclose(pairs.loss(logits, made["labels"]), wanted, atol=1e-5)
    with pytest.raises(ValueError, match="as many texts on both sides"):
        SwapPairs(one, {k: v[:2] for k, v in one.items()}, weight=1.0)


# ---------------------------------------------------------------- explanations


def test_integrated_gradients_are_captums_and_sum_to_the_growth(pictures):
    captum = pytest.importorskip("captum.attr")
    net, (x, y) = network(), pictures
    base = torch.full_like(x, 0.2)
    ours = integrated_gradients(net, x, y, base, steps=20)
    theirs = captum.IntegratedGradients(net).attribute(x, base, y, n_steps=20, method="riemann_middle")
    assert torch.allclose(ours, theirs.float(), atol=1e-5)
    grown = (net(x) - net(base)).gather(1, y[:, None])[:, 0]
    many = integrated_gradients(net, x, y, base, steps=200)
    assert torch.allclose(many.flatten(1).sum(1), grown, atol=1e-3)


def test_integrated_gradients_of_embeddings_are_captums(bert):
    captum = pytest.importorskip("captum.attr")
    net, inputs, tokenizer = bert
    vectors, blanks, answer = embedded(net, inputs, tokenizer.mask_token_id)
    target = torch.tensor([0, 1, 1])
    ours = integrated_gradients(answer, vectors, target, blanks, steps=8)
    theirs = captum.IntegratedGradients(answer).attribute(
        vectors, blanks, target, n_steps=8, method="riemann_middle", internal_batch_size=3
    )
    assert torch.allclose(ours, theirs.float(), atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(answer(vectors), net(**inputs), atol=1e-5)
    assert torch.equal(blanks[:, 0], vectors[:, 0]), "the first piece stays"


def test_leaving_one_out_is_captums_ablation(bert):
    captum = pytest.importorskip("captum.attr")
    net, inputs, tokenizer = bert
    target = torch.tensor([0, 1, 1])
    ours = leave_one_out(net, inputs, target, tokenizer.mask_token_id)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    theirs = captum.FeatureAblation(lambda v: net(v, mask)).attribute(
        ids, baselines=tokenizer.mask_token_id, target=target
    )
    inner = mask.bool().clone()
    inner[:, 0] = False
    inner[torch.arange(3), mask.sum(1) - 1] = False
    assert torch.allclose(ours[inner], theirs.float()[inner], atol=1e-4)
    assert (ours[~inner] == 0).all()


def test_rolled_out_attention_is_followed_piece_by_piece(bert):
    net, inputs, _ = bert
    layers, mask = attentions(net, inputs), inputs["attention_mask"]
    ours = attention_rollout(layers, mask)
    for row in range(3):
        n = int(mask[row].sum())
        share = np.eye(mask.shape[1])
        for layer in layers:
            mean, after = layer[row].mean(0).numpy(), np.zeros_like(share)
            for i in range(n):
                for j in range(n):
                    after[i] += (mean[i, j] / 2 + (i == j) / 2) * share[j]
            share = after
        assert np.allclose(ours[row].numpy(), share[:n].mean(0), atol=1e-5)
    assert torch.allclose(ours.sum(1), torch.ones(3), atol=1e-4)
    assert (ours[mask == 0].abs() < 1e-6).all()


def test_deleting_what_counts_lowers_the_probability_most(bert):
    net, inputs, tokenizer = bert
    net = copy.deepcopy(net)
    with torch.no_grad():
        net.head.weight *= 30
    blank, mask = tokenizer.mask_token_id, inputs["attention_mask"]
    target = net(**inputs).argmax(1)
    best = leave_one_out(net, inputs, target, blank)
    down = deletion(net, inputs, best, blank, shares=(0.05,))
    up = deletion(net, inputs, -best, blank, shares=(0.05,))
    assert (down[:, 1] <= up[:, 1] + 1e-6).all()
    whole = net(**inputs).softmax(1).gather(1, target[:, None])[:, 0]
    assert torch.allclose(down[:, 0], whole, atol=1e-5)
    every = deletion(net, inputs, best, blank, shares=(1.0,))[:, 1]
    ids = inputs["input_ids"].clone()
    for row in range(3):
        ids[row, 1 : int(mask[row].sum()) - 1] = blank
    assert torch.allclose(every, net(ids, mask).softmax(1).gather(1, target[:, None])[:, 0], atol=1e-5)


def test_an_explanation_of_a_model_in_train_mode_is_refused(bert, pictures):
    net, inputs, tokenizer = bert
    with pytest.raises(ValueError, match="is in train mode"):
        embedded(copy.deepcopy(net).train(), inputs, tokenizer.mask_token_id)
    blank, target = tokenizer.mask_token_id, torch.zeros(3, dtype=torch.long)
    for part in ("", "body", "body.encoder.layer.1"):
        active = copy.deepcopy(net)
        active.get_submodule(part).train()
        with pytest.raises(ValueError, match="is in train mode"):
            leave_one_out(active, inputs, target, blank)
        with pytest.raises(ValueError, match="is in train mode"):
            deletion(active, inputs, torch.zeros(inputs["input_ids"].shape), blank)
    x, y = pictures
    with pytest.raises(ValueError, match="in train mode"):
        integrated_gradients(network().train(), x, y)
    inside = network()
    inside[2].train()
    with pytest.raises(ValueError, match="in train mode, its part '2' at least, .* call eval"):
        integrated_gradients(inside, x, y)
    with pytest.raises(ValueError, match="a baseline of the shape of x"):
        integrated_gradients(network(), x, y, x[:1])
    with pytest.raises(ValueError, match="one score for each piece"):
        deletion(net, inputs, torch.zeros(3, 2), tokenizer.mask_token_id)


# ---------------------------------------------------------------- the studies


def test_every_way_of_the_first_study_gives_its_scores(monkeypatch):
    monkeypatch.setattr(study, "_chosen", lambda *a, **k: {"lr": 1e-3})
    for method in ("linear", "plain", "noise", study.START, study.FREE, study.MANY, study.TRADES):
        found = study.run(0, "test", method, 1e-3, 1.0)
        sizes = {len(v) for v in found.values()}
        assert {"chooses", "clean", "one step", "at 0.1"} <= set(found) and len(sizes) == 1
    assert set(study.run(0, "valid", "plain", 1e-3)) == {"chooses"}
    passes = {m: study.PASSES // study.COST.get(m, 1) for m in (study.MANY, study.TRADES)}
    assert passes[study.MANY] >= passes[study.TRADES]


def test_rows_have_baselines_and_as_many_settings_each():
    made = study.rows()
    assert isinstance(made[0], results.Baseline) and isinstance(made[1], results.Baseline)
    tried = {len(r["lr"]) for r in made[2:] if isinstance(r["lr"], list)}
    assert len(tried) == 1
    texts = [r for r in study.text_rows() if not isinstance(r, results.Baseline)]
    grids = {len(v) for r in texts for v in r.values() if isinstance(v, list)}
    assert len(grids) == 1


def test_a_body_is_frozen_where_only_the_head_is_trained(monkeypatch):
    monkeypatch.setattr(study, "_chosen", lambda *a, **k: {"lr": 1e-3})
    study._body.cache_clear()
    body = study._body(0, "plain")
    kept = copy.deepcopy(body.state_dict())
    found = study.run_transfer(0, "test", "plain", "head", 1e-2)
    assert set(found) == {"chooses", "clean", "robust"}
    assert all(torch.equal(kept[k], v) for k, v in body.state_dict().items())
    study._body.cache_clear()


def test_people_of_training_and_test_are_different():
    for lists in study.PEOPLE.values():
        train, test = ({n for side in lists[part] for n in side} for part in ("train", "test"))
        assert not train & test and all(len(lists[p][0]) == len(lists[p][1]) for p in lists)
    assert not set(study.SAID["train"]) & set(study.SAID["test"])


def test_edits_and_swaps_and_reasons_give_a_score_for_each_text(monkeypatch):
    monkeypatch.setattr(study, "_chosen", lambda *a, **k: {"lr": 1e-3})
    study._reader.cache_clear()
    net = study.tuned(0, study.SHORT, 1e-3)
    for kind in study.EDITS:
        assert len(study._edited(net, kind)) == len(study._to_edit())
    found = study.run_swaps(0, "test", study.ALIKE, 1.0)
    assert len(found["apart"]) == len(found["flipped"]) and set(study.PEOPLE) <= set(found)
    for method in study.REASONS:
        made = study.run_reasons(0, "test", method)
        assert len(made["mean"]) == len(study._to_edit()) and 0 <= made["mean"].min() <= made["mean"].max() <= 1
    study._reader.cache_clear()


def test_an_unknown_study_is_named():
    with pytest.raises(ValueError, match="no study 'pictures'; use images, fast"):
        study.main("pictures")
