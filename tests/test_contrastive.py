"""SimCLR and DINO: the loss against its formula, what gets a gradient, what collapses, refusals."""

import math

import pytest
import torch
from torch.nn import functional as F

from ftbook import contrastive as co
from ftbook import data
from ftbook.autoencoder import ConvAutoencoder
from ftbook.train import Settings


def encoder():
    torch.manual_seed(0)
    return ConvAutoencoder((1, 4, 8), 6, size=8).encoder


def shifted(x):
    return x.roll(int(torch.randint(0, 2, ())), -1)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_the_loss_and_its_gradients_are_those_of_the_formula(temperature):
    draw = torch.Generator().manual_seed(1)
    a, b = (torch.randn(4, 3, generator=draw, dtype=torch.float64).requires_grad_() for _ in range(2))
    z, n = F.normalize(torch.cat([a, b]), dim=1), 4
    total = 0.0
    for i in range(2 * n):
        e = [(z[i] @ z[j] / temperature).exp() for j in range(2 * n) if j != i]
        total = total - ((z[i] @ z[(i + n) % (2 * n)] / temperature).exp() / sum(e)).log()
    loss = co.nt_xent(a, b, temperature)
    torch.testing.assert_close(loss, total / (2 * n))
    for ours, theirs in zip(
        torch.autograd.grad(loss, (a, b)), torch.autograd.grad(total / (2 * n), (a, b)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_loss_does_not_see_lengths_or_the_order_of_the_views_and_equal_vectors_pay_the_guess():
    a, b = torch.randn(5, 3), torch.randn(5, 3)
    torch.testing.assert_close(co.nt_xent(a, b), co.nt_xent(7 * b, 0.1 * a))
    assert co.nt_xent(torch.ones(5, 3), torch.ones(5, 3)).item() == pytest.approx(math.log(9))


def test_bad_vectors_and_temperatures_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\), b \(3, 3\)"):
        co.nt_xent(torch.rand(2, 3), torch.rand(3, 3))
    with pytest.raises(ValueError, match="N >= 2"):
        co.nt_xent(torch.rand(1, 3), torch.rand(1, 3))
    with pytest.raises(ValueError, match="temperature is 0"):
        co.nt_xent(torch.rand(2, 3), torch.rand(2, 3), 0)


@pytest.mark.parametrize("kind", [co.SimCLR, co.DINO])
def test_pretraining_lowers_the_loss_or_moves_the_encoder_and_never_sees_labels(kind):
    images = data.load("digits")[:256]

    def trained(given):
        torch.manual_seed(0)
        method = kind(encoder(), shifted)
        first = [p.clone() for p in method.parameters()]
        history = co.pretrain_views(method, given, epochs=2, lr=3e-3, settings=Settings(progress=False))
        assert all(math.isfinite(v) for v in history["train_loss"])
        assert sum(not torch.equal(p, q) for p, q in zip(first, method.parameters(), strict=True)) > len(first) - 3
        return method.state_dict()

    assert all(torch.equal(p, q) for p, q in zip(trained(images).values(), trained(images.x).values(), strict=True))


@pytest.mark.parametrize("kind", [co.SimCLR, co.DINO])
def test_both_train_where_layers_answer_in_bf16(kind):
    method = kind(encoder(), shifted)
    settings = Settings(precision="bf16", progress=False)
    history = co.pretrain_views(method, data.load("digits")[:128], epochs=1, lr=1e-3, settings=settings)
    assert math.isfinite(history["train_loss"][-1])


def test_the_teacher_follows_the_student_gets_no_gradient_and_the_center_is_a_running_mean():
    method, x = co.DINO(encoder(), lambda x: x, prototypes=5, momentum=0.75), torch.rand(6, 1, 8, 8)
    with torch.no_grad():
        method.student[1].directions.add_(1.0)
    before, student = method.teacher[1].directions.clone(), method.student[1].directions
    method(x).backward()
    torch.testing.assert_close(method.teacher[1].directions, 0.75 * before + 0.25 * student.detach())
    assert all(p.grad is None for p in method.teacher.parameters()) and student.grad is not None
    with torch.no_grad():
        said = method.teacher(torch.cat([x, x]))
    torch.testing.assert_close(method.center, 0.1 * said.mean(0))


def test_the_loss_of_dino_is_the_cross_entropy_of_the_other_view():
    method, x = co.DINO(encoder(), lambda x: x, prototypes=5).eval(), torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        q = (method.teacher(x) / 0.04).softmax(1)
        p = (method.student(x) / 0.1).softmax(1)
    torch.testing.assert_close(method(x).detach(), -(q * p.log()).sum(1).mean())
    assert torch.equal(method.center, torch.zeros(5)), "evaluation changes nothing"
