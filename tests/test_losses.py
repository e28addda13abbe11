"""Every loss of chapter 2 against torch.nn.functional: values, gradients, extreme logits, bad input."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ftbook import losses

few = settings(max_examples=25, deadline=None)
reductions = st.sampled_from(["mean", "sum", "none"])


@few
@given(st.floats(0, 1), st.sampled_from([0.0, -0.0, 1e-30, -1e-30]))
def test_the_slope_at_a_logit_of_zero_is_prediction_minus_target(y, at):
    z = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    losses.bce_with_logits(z, torch.tensor(y, dtype=torch.float64)).backward()
    assert z.grad.item() == pytest.approx(0.5 - y, abs=1e-12)


def data(seed, *shape, scale=3.0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64) * scale, g


def same(ours, theirs, *inputs):
    """Equal value and equal gradient with respect to every input."""
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    slopes = [torch.autograd.grad(v.sum(), inputs, retain_graph=True) for v in (ours, theirs)]
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@few
@given(seed=st.integers(0, 10**6), n=st.integers(1, 6), reduction=reductions)
def test_mse_equals_torch(seed, n, reduction):
    x, g = data(seed, n, 3)
    y = torch.randn(n, 3, generator=g, dtype=torch.float64)
    x.requires_grad_()
    same(losses.mse(x, y, reduction=reduction), F.mse_loss(x, y, reduction=reduction), x)


@few
@given(seed=st.integers(0, 10**6), n=st.integers(1, 6), weighted=st.booleans(), reduction=reductions)
def test_bce_equals_torch(seed, n, weighted, reduction):
    z, g = data(seed, n, 3)
    y = torch.rand(n, 3, generator=g, dtype=torch.float64)
    z.requires_grad_()
    w = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64) if weighted else None
    theirs = F.binary_cross_entropy_with_logits(z, y, pos_weight=w, reduction=reduction)
    same(losses.bce_with_logits(z, y, pos_weight=w, reduction=reduction), theirs, z)


@few
@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(4,), (5, 4), (3, 4, 2), (2, 4, 3, 2)]),
    weighted=st.booleans(),
    ignored=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    reduction=reductions,
)
def test_cross_entropy_equals_torch(seed, shape, weighted, ignored, smoothing, reduction):
    z, g = data(seed, *shape)
    y = torch.randint(0, 4, shape[:1] + shape[2:] if len(shape) > 1 else (), generator=g)
    if ignored and y.numel() > 1:
        y.view(-1)[1] = -100
    z.requires_grad_()
    options = {
        "weight": torch.tensor([1.0, 0.2, 3.0, 0.7], dtype=torch.float64) if weighted else None,
        "label_smoothing": smoothing,
        "reduction": reduction,
    }
    same(losses.cross_entropy(z, y, **options), F.cross_entropy(z, y, **options), z)


@few
@given(seed=st.integers(0, 10**6), weighted=st.booleans(), smoothing=st.sampled_from([0.0, 0.2]), reduction=reductions)
def test_cross_entropy_with_probabilities_equals_torch(seed, weighted, smoothing, reduction):
    z, g = data(seed, 3, 4, 2)
    p = torch.rand(3, 4, 2, generator=g, dtype=torch.float64).softmax(1)
    z.requires_grad_()
    w = torch.tensor([1.0, 0.2, 3.0, 0.7], dtype=torch.float64) if weighted else None
    options = {"weight": w, "label_smoothing": smoothing, "reduction": reduction}
    same(losses.cross_entropy(z, p, **options), F.cross_entropy(z, p, **options), z)


def test_an_ignore_index_inside_the_classes():
    z, y = data(0, 6, 4)[0], torch.tensor([0, 1, 2, 3, 0, 2])
    torch.testing.assert_close(losses.cross_entropy(z, y, ignore_index=2), F.cross_entropy(z, y, ignore_index=2))


@few
@given(seed=st.integers(0, 10**6), smoothing=st.floats(0, 1), ignored=st.booleans())
def test_label_smoothing_equals_torch(seed, smoothing, ignored):
    z, g = data(seed, 5, 4)
    y = torch.randint(0, 4, (5,), generator=g)
    if ignored:
        y[0] = -100
    z.requires_grad_()
    same(losses.label_smoothing(z, y, smoothing), F.cross_entropy(z, y, label_smoothing=smoothing), z)


@few
@given(seed=st.integers(0, 10**6), temperature=st.floats(0.5, 8))
def test_distillation_equals_torch(seed, temperature):
    s, g = data(seed, 5, 4)
    t = torch.randn(5, 4, generator=g, dtype=torch.float64)
    s.requires_grad_()
    logq, logp = (s / temperature).log_softmax(1), (t / temperature).log_softmax(1)
    theirs = F.kl_div(logq, logp, log_target=True, reduction="batchmean") * temperature**2
    same(losses.distillation_kl(s, t, temperature=temperature), theirs, s)


def test_distillation_leaves_the_teacher_alone():
    s, t = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    losses.distillation_kl(s, t).backward()
    assert t.grad is None and s.grad.abs().sum() > 0


@few
@given(seed=st.integers(0, 10**6), gamma=st.sampled_from([0.0, 0.5, 1.0, 2.0, 5.0]), reduction=reductions)
def test_binary_focal_equals_torchvision(seed, gamma, reduction):
    from torchvision.ops import sigmoid_focal_loss

    z, g = data(seed, 6)
    y = torch.randint(0, 2, (6,), generator=g)
    z.requires_grad_()
    two = torch.stack([torch.zeros_like(z), z], 1)
    for a in (-1, 0.25):
        alpha = None if a < 0 else torch.tensor([1 - a, a], dtype=torch.float64)
        ours = losses.focal(two, y, gamma=gamma, alpha=alpha, reduction=reduction)
        theirs = sigmoid_focal_loss(z, y.double(), alpha=a, gamma=gamma, reduction=reduction)
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
        for u, v in zip(*(torch.autograd.grad(x.sum(), z, retain_graph=True) for x in (ours, theirs)), strict=True):
            torch.testing.assert_close(u, v, rtol=1e-5, atol=1e-7)


@few
@given(seed=st.integers(0, 10**6), reduction=reductions)
def test_focal_with_gamma_zero_is_cross_entropy(seed, reduction):
    z, g = data(seed, 5, 4, 2)
    y = torch.randint(0, 4, (5, 2), generator=g)
    y[1, 1] = -100
    z.requires_grad_()
    same(losses.focal(z, y, gamma=0, reduction=reduction), F.cross_entropy(z, y, reduction=reduction), z)


def pairs_of_rows(seed, n=5, d=3):
    a, g = data(seed, n, d)
    return a.requires_grad_(), torch.randn(n, d, generator=g, dtype=torch.float64).requires_grad_()


@few
@given(seed=st.integers(0, 10**6), n=st.integers(1, 6), temperature=st.floats(0.05, 2), reduction=reductions)
def test_info_nce_is_the_cross_entropy_of_cosines(seed, n, temperature, reduction):
    a, b = pairs_of_rows(seed, n)
    cosine = F.cosine_similarity(a[:, None], b[None], dim=2)
    theirs = F.cross_entropy(cosine / temperature, torch.arange(n), reduction=reduction)
    same(losses.info_nce(a, b, temperature=temperature, reduction=reduction), theirs, a, b)


def test_info_nce_of_two_pairs_by_hand_and_of_rows_that_are_all_alike():
    two = torch.eye(2, dtype=torch.float64)  # logits (1, 0) for both
    assert losses.info_nce(two, 7 * two, temperature=1.0).item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert losses.info_nce(torch.ones(8, 3), torch.ones(8, 3)).item() == pytest.approx(math.log(8), rel=1e-6)


def four(seed, n=6):
    g = torch.Generator().manual_seed(seed)
    return [(-20 + 5 * torch.randn(n, generator=g, dtype=torch.float64)).requires_grad_() for _ in range(4)]


@few
@given(seed=st.integers(0, 10**6), beta=st.floats(0.01, 5), reduction=reductions)
def test_dpo_is_the_formula_of_the_paper(seed, beta, reduction):
    chosen, rejected, ref_chosen, ref_rejected = values = four(seed)
    each = -F.logsigmoid(beta * (chosen - ref_chosen.detach()) - beta * (rejected - ref_rejected.detach()))
    theirs = {"mean": each.mean(), "sum": each.sum(), "none": each}[reduction]
    same(losses.dpo(*values, beta=beta, reduction=reduction), theirs, chosen, rejected)


def test_dpo_by_hand_and_no_gradient_for_the_reference():
    reference = torch.tensor([-20.0], requires_grad=True), torch.tensor([-18.0], requires_grad=True)
    chosen, rejected = torch.tensor([-17.0], requires_grad=True), torch.tensor([-19.0], requires_grad=True)
    loss = losses.dpo(chosen, rejected, *reference, beta=0.5)  # logit 0.5 (3 + 1) = 2
    loss.backward()
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-6)
    slope = 0.5 * (1 / (1 + math.exp(-2)) - 1)
    assert chosen.grad.item() == pytest.approx(slope, rel=1e-5)
    assert rejected.grad.item() == pytest.approx(-slope, rel=1e-5)
    assert reference[0].grad is None and reference[1].grad is None


@few
@given(seed=st.integers(0, 10**6), bins=st.integers(2, 20))
def test_reliability_has_the_points_of_scikit_learn(seed, bins):
    from sklearn.calibration import calibration_curve

    g = torch.Generator().manual_seed(seed)
    p = torch.randn(200, 3, generator=g, dtype=torch.float64).mul(2).softmax(1)
    y = torch.randint(0, 3, (200,), generator=g)
    stated, so, count = losses.reliability(p, y, bins)
    share, mean = calibration_curve(p.argmax(1) == y, p.amax(1), n_bins=bins)
    torch.testing.assert_close(so, torch.from_numpy(share))
    torch.testing.assert_close(stated, torch.from_numpy(mean))
    ece = (count * (so - stated).abs()).sum() / 200
    assert count.sum() == 200 and losses.calibration_error(p, y, bins) == pytest.approx(ece.item())


Y = torch.tensor([0, 3, -100, 2])
CASES = {
    "mse": lambda z: losses.mse(z, torch.ones_like(z)),
    "bce": lambda z: losses.bce_with_logits(z, torch.full_like(z, 0.3), pos_weight=z.new_tensor(2.0)),
    "cross_entropy": lambda z: losses.cross_entropy(z, Y, weight=z.new_tensor([1, 2, 3, 4])),
    "soft": lambda z: losses.cross_entropy(z, torch.full_like(z, 0.25), label_smoothing=0.1),
    "label_smoothing": lambda z: losses.label_smoothing(z, Y, 0.3),
    "focal": lambda z: losses.focal(z, Y, gamma=2.0, alpha=z.new_tensor([1, 2, 3, 4])),
    "focal_half": lambda z: losses.focal(z, Y, gamma=0.5),
    "info_nce": lambda z: losses.info_nce(z, z.flip(0).flip(1) + 0.5),
    "dpo": lambda z: losses.dpo(z[:, 0], z[:, 1], z.new_full((4,), -1.0), z.new_full((4,), 2.0)),
    "distillation": lambda z: losses.distillation_kl(z, z.new_tensor([3.0, -3, 1e4, 0]).expand_as(z), temperature=2.0),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_finite_differences(name):
    z = data(1, 4, 4, scale=1.0)[0].requires_grad_()
    assert torch.autograd.gradcheck(CASES[name], (z,))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_no_nan_at_ten_thousand(name, dtype):
    patterns = torch.tensor([[1, -1, -1, -1], [-1, 1, 1, -1], [1, 1, 1, 1], [-1, -1, -1, 1], [0, 1, 0, -1]])
    for row in patterns:
        for sign in (1e4, -1e4):
            z = (row * sign).to(dtype).repeat(4, 1).requires_grad_()
            value = CASES[name](z)
            value.backward()
            assert value.isfinite(), (row, sign)
            assert z.grad.isfinite().all(), (row, sign)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_bce_leaves_no_target_of_minus_100_out_and_says_how_to(dtype):
    z, y = torch.tensor([2.0, -1.0, 0.0]), torch.tensor([1, 0, -100]).to(dtype)
    with pytest.raises(ValueError, match="-100 to 1. None is left out .*: use reduction='none'"):
        losses.bce_with_logits(z, y)
    keep = y != -100  # as the message says
    each = losses.bce_with_logits(z, y.where(keep, 0), reduction="none")
    assert torch.equal(each[keep].mean(), losses.bce_with_logits(z[:2], y[:2]))


def test_bce_gradient_is_sigmoid_minus_target_even_at_zero():
    z = torch.tensor([0.0, 1e4, -1e4, 2.0], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0.25, 0.0, 1.0, 1.0], dtype=torch.float64)
    losses.bce_with_logits(z, y, reduction="sum").backward()
    torch.testing.assert_close(z.grad, z.detach().sigmoid() - y)


def test_half_precision_is_computed_in_float32():
    z, y = torch.randn(8, 5).bfloat16(), torch.randint(0, 5, (8,))
    out = losses.cross_entropy(z, y)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, F.cross_entropy(z.float(), y))


def test_integer_and_boolean_targets():
    z = torch.randn(4)
    expected = losses.bce_with_logits(z, torch.tensor([1.0, 0.0, 1.0, 0.0]))
    assert losses.bce_with_logits(z, torch.tensor([True, False, True, False])) == expected
    x = torch.randn(3, 4)
    assert losses.cross_entropy(x, torch.tensor([1, 2, 3], dtype=torch.int32)) == losses.cross_entropy(
        x, torch.tensor([1, 2, 3])
    )


def test_compiles_without_graph_break():
    f = torch.compile(lambda z, y: losses.cross_entropy(z, y, label_smoothing=0.1), fullgraph=True, backend="eager")
    z, y = torch.randn(4, 3), torch.tensor([0, 1, -100, 2])
    torch.testing.assert_close(f(z, y), F.cross_entropy(z, y, label_smoothing=0.1))


def test_calibration_error_is_what_was_reckoned_by_hand():
    right = torch.tensor([0, 1, 0, 1])
    certain = torch.eye(2)[right]
    assert losses.calibration_error(certain, right) == 0
    assert losses.calibration_error(certain, 1 - right) == 1
    p = torch.tensor([[0.7, 0.3]] * 10)
    y = torch.tensor([0] * 7 + [1] * 3)
    assert losses.calibration_error(p, y) < 1e-6


N3, INT3 = torch.randn(3, 4), torch.tensor([0, 1, 2])
BAD = [
    (lambda: losses.mse(torch.zeros(3), torch.zeros(3, 1)), ValueError, "no broadcasting"),
    (lambda: losses.mse([1.0], torch.zeros(1)), TypeError, "torch.as_tensor"),
    (lambda: losses.mse(torch.tensor([1]), torch.zeros(1)), TypeError, "floating point"),
    (lambda: losses.mse(torch.zeros(3), torch.zeros(3), reduction="avg"), ValueError, "'mean', 'sum' or 'none'"),
    (lambda: losses.bce_with_logits(torch.zeros(3), torch.zeros(3, 1)), ValueError, "squeeze"),
    (lambda: losses.bce_with_logits(torch.zeros(2), torch.tensor([0, 2])), ValueError, r"lie in \[0, 1\]"),
    (lambda: losses.bce_with_logits(torch.zeros(1), torch.tensor([float("nan")])), ValueError, r"lie in \[0, 1\]"),
    (lambda: losses.cross_entropy(N3, torch.tensor([0, 1, 4])), ValueError, r"0\.\.3 for 4 classes.*0 to 4"),
    (lambda: losses.cross_entropy(N3, torch.tensor([0, -1, 2])), ValueError, "-1 to 2"),
    (lambda: losses.cross_entropy(N3, INT3.float()), TypeError, r"target\.long\(\)"),
    (lambda: losses.cross_entropy(N3, [0, 1, 2]), TypeError, "list"),
    (lambda: losses.cross_entropy(N3, INT3[:2]), ValueError, r"shape \(3,\), got \(2,\)"),
    (lambda: losses.cross_entropy(torch.zeros(2, 5, 3), torch.zeros(2, 5).long()), ValueError, r"transpose\(1, -1\)"),
    (lambda: losses.cross_entropy(N3.long(), INT3), TypeError, r"logits\.float\(\)"),
    (lambda: losses.cross_entropy(torch.tensor(1.0), torch.tensor(0)), ValueError, "class dimension"),
    (lambda: losses.cross_entropy(N3, torch.full((3,), -100)), ValueError, "skip this batch"),
    (lambda: losses.cross_entropy(N3, torch.ones(3, 4)), ValueError, "sum to 1"),
    (lambda: losses.cross_entropy(N3, INT3, weight=torch.ones(3)), ValueError, r"shape \(4,\), got \(3,\)"),
    (lambda: losses.cross_entropy(N3, INT3, label_smoothing=1.5), ValueError, "1.5"),
    (lambda: losses.focal(N3, INT3, gamma=-1), ValueError, "gamma must be >= 0"),
    (lambda: losses.focal(torch.zeros(3, 1), INT3 * 0), ValueError, "two classes"),
    (lambda: losses.focal(N3, INT3, alpha=torch.ones(2)), ValueError, "alpha"),
    (lambda: losses.distillation_kl(N3, N3[:2]), ValueError, r"\(2, 4\)"),
    (lambda: losses.distillation_kl(N3, N3, temperature=0), ValueError, "temperature must be positive and finite"),
    (lambda: losses.info_nce(N3, N3[:2]), ValueError, r"\(2, 4\)"),
    (lambda: losses.info_nce(N3[0], N3[0]), ValueError, r"\(N, D\).*got \(4,\)"),
    (lambda: losses.info_nce(N3, N3, temperature=0.0), ValueError, "temperature must be positive and finite"),
    (lambda: losses.dpo(N3[0], N3[1], N3[2], N3[2], beta=0), ValueError, "beta must be positive and finite, got 0"),
    (lambda: losses.dpo(N3[0], N3[1], N3[2], N3[2, :1]), ValueError, "no broadcasting"),
    (lambda: losses.dpo(N3[0], -1.0, N3[2], N3[2]), TypeError, "rejected must be a torch.Tensor, got float"),
    (lambda: losses.calibration_error(N3, INT3), ValueError, "softmax"),
    (lambda: losses.calibration_error(N3.softmax(1), INT3[:2]), ValueError, r"\(N, C\)"),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input_is_refused_with_a_reason(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_small_binary_losses_do_not_cancel():
    z = torch.tensor([15.0, -15.0, 40.0])
    y = torch.tensor([1.0, 0.0, 1.0])
    exact = torch.nn.functional.softplus(-z.double().abs())
    ours = losses.bce_with_logits(z, y, reduction="none").double()
    assert torch.allclose(ours, exact, rtol=1e-5, atol=0)


def test_the_three_forms_of_the_maximum_differ_in_their_slope_at_zero():
    """What chapter 2's table shows; the library's form is right."""
    for y in (0.0, 0.25, 1.0):
        found = {}
        for name, positive in {
            "relu": F.relu,
            "clamp": lambda z: z.clamp(min=0),
            "maximum": lambda z: torch.maximum(z, torch.zeros_like(z)),
        }.items():
            z = torch.zeros((), dtype=torch.float64, requires_grad=True)
            (positive(z) - y * z + torch.log1p(torch.exp(-z.abs()))).backward()
            found[name] = z.grad.item()
        assert found["relu"] == -y and found["clamp"] in (-y, 1 - y) and found["maximum"] == 0.5 - y


def test_exercises_accept_the_solutions_and_say_what_is_off(capsys):
    from ftbook.exercises import math as check

    def per_class(z, y):
        target = F.one_hot(y, z.shape[1]).to(z)
        return losses.bce_with_logits(z, target, reduction="none").sum(1).mean()

    def two_sided(a, b):
        return (losses.info_nce(a, b) + losses.info_nce(b, a)) / 2

    def best_temperature(z, y):
        return min(torch.logspace(-1, 1, 81).tolist(), key=lambda T: losses.cross_entropy(z / T, y).item())

    assert check.factor(32) and check.by_hand((math.log(4), -0.75, 0.75)) and check.smoothed((0.1, 0.8, 0.1))
    assert check.per_class(per_class) and check.two_sided(two_sided) and check.temperature(best_temperature)
    assert capsys.readouterr().out == "correct\n" * 6
    for exercise in (check.factor, check.by_hand, check.smoothed, check.per_class, check.two_sided, check.temperature):
        assert not exercise(None)
    wrong = [check.factor(1 / 32), check.by_hand((1.386, 0.75, -0.75)), check.smoothed((0, 0.7, 0.3))]
    wrong += [check.per_class(F.cross_entropy), check.two_sided(losses.info_nce), check.temperature(lambda z, y: 1.0)]
    assert not any(wrong) and "correct" not in capsys.readouterr().out


def test_one_run_of_the_study_on_each_split():
    from ftbook.studies import math as study

    for split, count in (("valid", 200), ("test", 200)):
        for settings_ in ({"method": "focal", "lr": 1e-3}, {"method": "logistic, words", "C": 1.0}):
            found = study.run(0, split, **settings_, noise=0.2)
            assert found.keys() == {"accuracy", "nll", "confidence", "ece", "ece_noisy"}
            assert len(found["accuracy"]) == count
            assert all(math.isfinite(v) for k, v in found.items() if k != "accuracy")


def test_the_study_chooses_among_rates_and_has_a_row_per_loss_and_baseline(monkeypatch, tmp_path):
    from ftbook import results
    from ftbook.studies import math as study

    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path))
    monkeypatch.setattr(study, "vectors", lambda split: (None, torch.zeros(10)))

    def run(seed, split, method, lr=0.0, C=0.0, *, noise):
        good = torch.arange(10) < 9 - 1e4 * abs(lr - 1e-3) * (lr > 0) - (C > 0) * (C != 1)
        return {"accuracy": good.numpy(), "nll": noise + seed, "ece": 0.1, "ece_noisy": 0.1, "confidence": 0.9}

    monkeypatch.setattr(study, "run", run)
    study.main("flipped")
    rows = results.load_study("02_math", "flipped").rows("accuracy")
    assert [r["method"] for r in rows] == [*study.LOSSES, "logistic, words", "logistic, vectors"]
    assert all(r["lr"] == 1e-3 for r in rows[:4]) and all(r["C"] == 1 for r in rows[4:])
