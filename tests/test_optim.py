"""The optimizers of chapter 3 against torch.optim and against the papers' listings; schedules; the range test."""

import copy
import io
import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ftbook import optim, train
from ftbook.studies import optim as study

SHAPES = [(3, 4), (5,), (4, 2), (7, 7)]
MATRICES = [(3, 4), (6, 2), (5, 5)]
PAIRS = {
    "gradient descent": (optim.SGD, torch.optim.SGD, {}),
    "gradient descent, L2": (optim.SGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.2}),
    "momentum": (optim.SGD, torch.optim.SGD, {"lr": 0.02, "momentum": 0.9}),
    "Nesterov": (optim.SGD, torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "AdaGrad": (optim.AdaGrad, torch.optim.Adagrad, {}),
    "AdaGrad, L2": (optim.AdaGrad, torch.optim.Adagrad, {"lr": 0.1, "weight_decay": 0.1}),
    "RMSProp": (optim.RMSProp, torch.optim.RMSprop, {}),
    "RMSProp, L2": (optim.RMSProp, torch.optim.RMSprop, {"lr": 1e-3, "alpha": 0.9, "weight_decay": 0.1}),
    "Adam": (optim.Adam, torch.optim.Adam, {}),
    "Adam, L2": (optim.Adam, torch.optim.Adam, {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}),
    "AdamW": (optim.AdamW, torch.optim.AdamW, {}),
    "AdamW, no decay": (optim.AdamW, torch.optim.AdamW, {"weight_decay": 0.0, "eps": 1e-3}),
    "Muon": (optim.Muon, torch.optim.Muon, {}),
    "Muon, plain": (optim.Muon, torch.optim.Muon, {"lr": 0.02, "nesterov": False, "weight_decay": 0.0}),
}


def weights(shapes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def give_gradients(params, generator):
    scale = 10.0 ** torch.randint(-3, 3, (), generator=generator).item()
    for p in params:
        p.grad = scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def walk(params, rule, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        give_gradients(params, generator)
        rule.step()
        yield [p.detach().clone() for p in params]


@pytest.mark.parametrize("name", PAIRS)
def test_equal_to_torch_bit_by_bit_over_200_random_steps(name):
    ours, theirs, options = PAIRS[name]
    shapes = MATRICES if "Muon" in name else SHAPES
    a, b = weights(shapes), weights(shapes)
    if "gradient" in name and "lr" not in options:
        assert optim.SGD(a).defaults["lr"] == torch.optim.SGD(b).defaults["lr"]
    for left, right in zip(walk(a, ours(a, **options), 200), walk(b, theirs(b, **options), 200), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(left, right, strict=True))


@pytest.mark.parametrize("ours, theirs", list(dict.fromkeys((o, t) for o, t, _ in PAIRS.values())))
def test_defaults_are_those_of_torch(ours, theirs):
    shapes = MATRICES if ours is optim.Muon else SHAPES
    a, b = ours(weights(shapes)).defaults, theirs(weights(shapes)).defaults
    assert a.pop("dtype", torch.bfloat16) == torch.bfloat16, "Muon's products, as PyTorch takes them"
    assert a == b


def test_muon_with_the_scale_of_adamw_equals_torch():
    a, b = weights(MATRICES), weights(MATRICES)
    ours = walk(a, optim.Muon(a, adjust_lr_fn="match_rms_adamw"), 20)
    theirs = walk(b, torch.optim.Muon(b, adjust_lr_fn="match_rms_adamw"), 20)
    assert all(torch.equal(p, q) for x, y in zip(ours, theirs, strict=True) for p, q in zip(x, y, strict=True))


def test_lion_is_program_1_of_its_paper():
    (w,) = weights([(4, 3)])
    lr, beta1, beta2, decay, m, expected = 0.01, 0.9, 0.99, 0.1, torch.zeros(4, 3).double(), w.detach().clone()
    generator = torch.Generator().manual_seed(1)
    rule = optim.Lion([w], lr=lr, betas=(beta1, beta2), weight_decay=decay)
    for _ in range(200):
        give_gradients([w], generator)
        c = beta1 * m + (1 - beta1) * w.grad
        m = beta2 * m + (1 - beta2) * w.grad
        expected = expected - lr * (c.sign() + decay * expected)
        rule.step()
        assert torch.allclose(w, expected, rtol=0, atol=1e-12)


def test_newton_schulz_brings_singular_values_near_one():
    matrix = weights([(40, 15)], dtype=torch.float32)[0].detach()
    values = torch.linalg.svdvals(optim.orthogonalize(matrix, dtype=torch.float32))
    assert 0.6 < values.min() and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    exact = optim.orthogonalize(matrix.double(), steps=40, coefficients=(1.5, -0.5, 0.0), dtype=torch.float64)
    assert torch.allclose(exact, (u @ v).double(), atol=1e-4)
    assert optim.orthogonalize(torch.zeros(2, 3)).abs().max() == 0


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_every_optimizer_resumes_from_its_state_to_the_bit(name):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()

    whole, halted = model(), model()
    rule = optim.optimizer(name, whole, lr=0.01)
    path = list(walk(list(whole.parameters()), rule, 6))
    first = optim.optimizer(name, halted, lr=0.01)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        give_gradients(list(halted.parameters()), generator)
        first.step()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = optim.optimizer(name, halted, lr=0.5)
    second.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(3):
        give_gradients(list(halted.parameters()), generator)
        second.step()
    assert all(torch.equal(p, q) for p, q in zip(path[-1], halted.parameters(), strict=True))


EVERY = {
    "gradient descent": (optim.SGD, torch.optim.SGD, {"lr": 0.1}),
    "gradient ascent": (optim.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "maximize": True}),
    "Nesterov": (optim.SGD, torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "AdaGrad": (optim.AdaGrad, torch.optim.Adagrad, {"lr": 0.1, "weight_decay": 0.1}),
    "RMSProp": (optim.RMSProp, torch.optim.RMSprop, {"alpha": 0.9, "maximize": True}),
    "Adam": (optim.Adam, torch.optim.Adam, {"betas": (0.8, 0.95), "weight_decay": 0.1}),
    "Adam, amsgrad": (optim.Adam, torch.optim.Adam, {"amsgrad": True, "maximize": True}),
    "AdamW": (optim.AdamW, torch.optim.AdamW, {"lr": 0.01}),
    "AdamW, amsgrad": (optim.AdamW, torch.optim.AdamW, {"amsgrad": True, "weight_decay": 0.1}),
    "Muon": (optim.Muon, torch.optim.Muon, {"lr": 0.02}),
    "Muon, other": (
        optim.Muon,
        torch.optim.Muon,
        {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 3, "nesterov": False},
    ),
}


@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize("back", [False, True], ids=["to torch", "from torch"])
@pytest.mark.parametrize("name", EVERY)
def test_a_state_loads_into_torchs_optimizer_and_back_and_50_further_steps_are_equal(name, back, steps):
    first, other, options = EVERY[name]
    if back:
        first, other = other, first
    shapes = MATRICES if "Muon" in name else SHAPES
    a = weights(shapes)
    first = first(a, **options)
    for _ in walk(a, first, steps):
        pass
    b = [p.detach().clone().requires_grad_() for p in a]
    other = other(b)  # with the defaults: the state brings the options
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for left, right in zip(walk(a, first, 50, seed=2), walk(b, other, 50, seed=2), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(left, right, strict=True))


@pytest.mark.parametrize("name", EVERY)
def test_torchs_options_walk_with_torch(name):
    ours, theirs, options = EVERY[name]
    shapes = MATRICES if "Muon" in name else SHAPES
    a, b = weights(shapes), weights(shapes)
    for left, right in zip(walk(a, ours(a, **options), 50), walk(b, theirs(b, **options), 50), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(left, right, strict=True))


UNSUPPORTED = [
    (optim.SGD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1}, "dampening=0.1"),
    (optim.SGD, torch.optim.SGD, {"differentiable": True}, "differentiable=True"),
    (optim.AdaGrad, torch.optim.Adagrad, {"lr_decay": 0.1}, "lr_decay=0.1"),
    (optim.RMSProp, torch.optim.RMSprop, {"centered": True}, "centered=True"),
    (optim.RMSProp, torch.optim.RMSprop, {"momentum": 0.9}, "momentum=0.9"),
]


@pytest.mark.parametrize("ours, theirs, options, match", UNSUPPORTED)
def test_an_option_of_torch_that_is_not_supported_is_refused_wherever_it_comes_from(ours, theirs, options, match):
    params = weights(SHAPES)
    with pytest.raises(ValueError, match=match):
        ours(params, **options)
    with pytest.raises(ValueError, match=match):
        ours([{"params": params, **options}])
    rule, other = ours(params), theirs(params, **options)
    before = copy.deepcopy(rule.state_dict())
    with pytest.raises(ValueError, match=match):
        rule.load_state_dict(other.state_dict())
    assert str(rule.state_dict()) == str(before)


@pytest.mark.parametrize("ours, options, match", [(u[0], u[2], u[3]) for u in UNSUPPORTED])
def test_an_option_that_the_rule_would_ignore_is_refused_at_the_next_step_when_it_is_set_later(ours, options, match):
    rule = ours(weights(SHAPES))
    for p in rule.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    rule.step()
    rule.add_param_group({"params": [torch.ones(2, requires_grad=True)]})
    rule.param_groups[1].update(options, capturable=True, note="head")  # the last two change no rule
    with pytest.raises(ValueError, match=match):
        rule.step()
    rule.param_groups[1].update({k: rule.defaults[k] for k in options})
    rule.step()
    copy.deepcopy(rule).step()


@pytest.mark.parametrize(
    "kind, name, value, match",
    [
        (optim.RMSProp, "amsgrad", True, "amsgrad=True is not supported"),
        (optim.Lion, "nesterov", True, "nesterov=True is not supported"),
        (optim.Adam, "decoupled_weight_decay", True, "use the optimizer of torch.optim"),
        (optim.SGD, "nesterov", True, "momentum above 0"),
    ],
)
def test_an_option_of_another_rule_is_refused_when_it_is_set_later(kind, name, value, match):
    rule = kind(weights(SHAPES))
    rule.param_groups[0][name] = False
    rule.step()
    rule.param_groups[0][name] = value
    with pytest.raises(ValueError, match=match):
        rule.step()


@pytest.mark.parametrize(
    "group, match",
    [
        ({"amsgrad": True}, "amsgrad=True is not supported"),
        ({"betas": (0.9, 0.99)}, "betas=.* is not supported"),
        ({"nesterov": True, "momentum": 0.0}, "momentum above 0"),
        ({"lr": True}, "lr is True"),
        ({"momentum": 1.5}, "momentum is 1.5"),
    ],
)
def test_a_group_is_checked_like_the_optimizer(group, match):
    rule = optim.SGD(weights([(2,)]), momentum=0.9)
    with pytest.raises(ValueError, match=match):
        rule.add_param_group({"params": weights([(3,)]), **group})
    assert len(rule.param_groups) == 1
    rule.add_param_group({"params": weights([(3,)]), "dampening": 0, "amsgrad": False, "name": "head"})


def test_the_state_of_another_rule_is_refused():
    params = weights(SHAPES)
    with pytest.raises(ValueError, match="SGD: the state has no momentum, nesterov, so it is of another optimizer"):
        optim.SGD(params).load_state_dict(torch.optim.Adam(params).state_dict())
    with pytest.raises(ValueError, match="decoupled_weight_decay=True"):
        optim.Adam(params).load_state_dict(torch.optim.AdamW(params).state_dict())
    with pytest.raises(TypeError, match="SGD has no 'rate'; it has lr, momentum, nesterov, weight_decay, "):
        optim.SGD(params, rate=3)
    muon = optim.Muon(weights(MATRICES))
    with pytest.raises(ValueError, match="matrices"):
        muon.add_param_group({"params": weights([(3,)])})
    assert len(muon.param_groups) == 1


@given(st.sampled_from([np.float32, np.float64, np.float16, np.int64, int, float]), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_every_kind_of_real_number_is_a_learning_rate_and_is_kept_as_a_plain_one(kind, value):
    rule = optim.AdamW(weights([(2,)]), lr=kind(value), betas=[kind(0), np.float32(0.5)], weight_decay=kind(value))
    group = rule.param_groups[0]
    assert group["lr"] == group["weight_decay"] == value and group["betas"] == (0, 0.5)
    assert {type(v) for v in (group["lr"], group["weight_decay"], *group["betas"])} <= {int, float}
    file = io.BytesIO()
    torch.save(rule.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["param_groups"][0]["lr"] == value


@pytest.mark.parametrize("name", ["Nesterov", "Adam", "Lion"])
def test_missing_gradients_are_left_out_and_counted_apart(name):
    params = weights(SHAPES)
    rule = optim.optimizer(name, params, lr=0.1)
    before = [p.detach().clone() for p in params]
    params[0].grad = torch.ones_like(params[0])
    rule.step()
    assert not torch.equal(before[0], params[0])
    assert all(torch.equal(p, q) for p, q in zip(before[1:], params[1:], strict=True))
    assert params[1] not in rule.state
    if name == "Adam":  # a late gradient gets the first step's bias correction: a step of the full rate
        params[1].grad = torch.full_like(params[1], 7.0)
        rule.step()
        assert torch.allclose(before[1] - params[1], torch.tensor(0.1).double())
        assert rule.state[params[0]]["step"] == 2 and rule.state[params[1]]["step"] == 1


def test_no_gradient_at_all_is_no_step():
    params = weights(SHAPES)
    assert optim.Adam(params).step() is None


def test_the_gradients_are_left_as_they_are():
    for name in ("Nesterov", "Adam", "AdaGrad", "RMSProp", "Lion"):
        params = weights(SHAPES)
        rule = optim.optimizer(name, params, lr=0.1, weight_decay=0.1)
        give_gradients(params, torch.Generator().manual_seed(0))
        grads = [p.grad.clone() for p in params]
        rule.step()
        rule.step()
        assert all(torch.equal(g, p.grad) for g, p in zip(grads, params, strict=True)), name


def test_groups_have_their_own_options_and_a_closure_is_called():
    a, b = weights([(2,), (2,)])
    rule = optim.SGD([{"params": [a], "lr": 0.5}, {"params": [b]}], lr=0.0)
    before = b.detach().clone()

    def closure():
        rule.zero_grad()
        loss = (a**2).sum() + (b**2).sum()
        loss.backward()
        return loss

    loss = rule.step(closure)
    assert loss.item() > 0 and a.abs().max() == 0 and torch.equal(b, before)


def test_cutting_into_chunks_changes_nothing_and_types_stay_apart():
    params = [*weights([(300,)] * 5, dtype=torch.float32), *weights([(300,)])]
    for p in params:
        p.grad = torch.ones_like(p)
    assert [len(piece) for piece in optim._chunks(params, size=600)] == [2, 2, 1, 1]
    assert [len(piece) for piece in optim._chunks(params, size=1)] == [1] * 6
    assert [len(piece) for piece in optim._chunks(params, size=10**6)] == [5, 1]
    optim.Adam(params).step()
    assert list(optim._chunks([])) == []


def test_sparse_and_complex_gradients_are_refused():
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="sparse=False"):
        optim.Adam(table.parameters()).step()
    z = torch.zeros(2, dtype=torch.complex64, requires_grad=True)
    z.grad = torch.ones_like(z)
    with pytest.raises(TypeError, match="complex"):
        optim.SGD([z]).step()


@pytest.mark.parametrize(
    "kind, options, match",
    [
        (optim.SGD, {"lr": -1.0}, "lr is -1.0"),
        (optim.SGD, {"lr": math.nan}, "lr is nan"),
        (optim.SGD, {"lr": math.inf}, "lr is inf"),
        (optim.SGD, {"lr": "fast"}, "lr is 'fast'"),
        (optim.SGD, {"lr": True}, "lr is True"),
        (optim.SGD, {"lr": np.bool_(True)}, "lr is "),
        (optim.SGD, {"lr": (0.1,)}, "lr is (0.1,)"),
        (optim.SGD, {"lr": 1j}, "lr is 1j"),
        (optim.SGD, {"weight_decay": False}, "weight_decay is False"),
        (optim.Adam, {"betas": (True, 0.9)}, "betas is True"),
        (optim.SGD, {"momentum": 1.0}, "momentum is 1.0"),
        (optim.SGD, {"nesterov": True}, "momentum above 0"),
        (optim.Adam, {"betas": (0.9, 1.0)}, "betas"),
        (optim.Adam, {"betas": (0.9,)}, "two numbers"),
        (optim.Adam, {"betas": 0.9}, "two numbers"),
        (optim.Adam, {"eps": -1e-8}, "eps"),
        (optim.AdamW, {"weight_decay": -0.1}, "weight_decay"),
        (optim.RMSProp, {"alpha": 1.0}, "alpha"),
        (optim.Muon, {"adjust_lr_fn": "none"}, "match_rms_adamw"),
        (optim.Muon, {"dtype": "float32"}, "dtype is 'float32'; use a floating type"),
        (optim.MuonAdamW, {"dtype": torch.int64}, "dtype is torch.int64"),
    ],
)
def test_bad_hyper_parameters_are_refused(kind, options, match):
    with pytest.raises(ValueError, match=re.escape(match)):
        kind(weights([(2, 2)]), **options)


def test_bad_groups_are_refused():
    with pytest.raises(ValueError, match="Adam: lr is -1"):
        optim.Adam([{"params": weights([(2,)]), "lr": -1}])
    with pytest.raises(TypeError):
        optim.Adam([{"params": weights([(2,)])}, 3])
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        optim.Muon(weights([(2,)]))
    with pytest.raises(ValueError, match="unknown optimizer 'adamax'"):
        optim.optimizer("adamax", nn.Linear(2, 2))
    with pytest.raises(NotImplementedError, match="update"):
        params = weights([(2,)])
        params[0].grad = torch.ones(2).double()
        optim.Foreach(params, lr=0.1).step()


def test_muon_multiplies_in_the_type_it_is_given_and_a_state_keeps_it():
    steps = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        (p,) = weights([(5, 8)])
        before = p.detach().clone()
        give_gradients([p], torch.Generator().manual_seed(0))
        optim.Muon([p], lr=1.0, weight_decay=0.0, dtype=dtype).step()
        steps[dtype] = before - p.detach()
    off = {dtype: (step - steps[torch.float64]).abs().max() for dtype, step in steps.items()}
    assert off[torch.float32] < 1e-5 < off[torch.bfloat16] < 0.1
    rule, other = optim.Muon(weights(MATRICES), dtype=torch.float32), optim.Muon(weights(MATRICES))
    other.load_state_dict(rule.state_dict())
    assert other.param_groups[0]["dtype"] == torch.float32
    other.load_state_dict(torch.optim.Muon(weights(MATRICES)).state_dict())
    assert other.param_groups[0]["dtype"] == torch.bfloat16, "what torch.optim uses"
    with pytest.raises(ValueError, match="dtype is None"):
        other.add_param_group({"params": weights([(2, 2)]), "dtype": None})
    assert len(other.param_groups) == 1


def test_muon_with_adamw_is_both():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    twin = copy.deepcopy(net)
    both = optim.optimizer("Muon", net, lr=0.01)
    hidden = [twin[0].weight, twin[2].weight]
    others = [p for p in twin.parameters() if all(p is not h for h in hidden)]
    muon = torch.optim.Muon(hidden, lr=0.01, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=0.01)
    for seed in range(10):
        give_gradients(list(net.parameters()), torch.Generator().manual_seed(seed))
        give_gradients(list(twin.parameters()), torch.Generator().manual_seed(seed))
        for rule in (both, muon, adamw):
            rule.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))
    net[0].weight.requires_grad_(False)
    assert sum(len(g["params"]) for g in optim._muon_groups(net)) == 7
    assert [g["matrix"] for g in optim._muon_groups(nn.Linear(2, 2))] == [False]


def test_fit_and_torch_schedulers_take_them():
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    for name in optim.OPTIMIZERS:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        rule = optim.optimizer(name, net, lr=0.05)
        history = train.fit(
            net,
            (x, y),
            epochs=8,
            batch_size=16,
            optimizer=rule,
            settings=train.Settings(schedule=optim.schedule("cosine", warmup=0.2), progress=False),
        )
        assert history["train_loss"][-1] < history["train_loss"][0], name
    by_class = train.fit(
        nn.Linear(3, 2), (x, y), epochs=2, lr=0.01, optimizer=optim.AdamW, settings=train.Settings(progress=False)
    )
    assert len(by_class) == 2
    rule = optim.SGD(nn.Linear(2, 1).parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(rule, 1, 0.5)
    rule.step()
    scheduler.step()
    assert rule.param_groups[0]["lr"] == 0.5


def rates(make, steps):
    rule = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0, momentum=0.9)
    scheduler, found = make(rule), []
    for _ in range(steps):
        found.append(rule.param_groups[0]["lr"])
        rule.step()
        scheduler.step()
    return found


T = 24
S = torch.optim.lr_scheduler
SAME = {
    "constant": (optim.SCHEDULES["constant"], lambda o: S.ConstantLR(o, factor=1.0)),
    "linear": (optim.SCHEDULES["linear"], lambda o: S.LinearLR(o, 1.0, 0.0, T)),
    "linear to a tenth": (optim.schedule("linear", end=0.1), lambda o: S.LinearLR(o, 1.0, 0.1, T)),
    "cosine": (optim.SCHEDULES["cosine"], lambda o: S.CosineAnnealingLR(o, T)),
    "cosine to a tenth": (optim.schedule("cosine", end=0.1), lambda o: S.CosineAnnealingLR(o, T, 0.1)),
    "exponential": (optim.SCHEDULES["exponential"], lambda o: S.ExponentialLR(o, 0.01 ** (1 / T))),
    "staircase": (optim.SCHEDULES["staircase"], lambda o: S.StepLR(o, T // 3, 0.1)),
    "one cycle": (optim.SCHEDULES["one_cycle"], lambda o: S.OneCycleLR(o, 1.0, T, cycle_momentum=False)),
    "warm-up": (
        optim.schedule("linear", warmup=0.25),
        lambda o: S.SequentialLR(o, [S.LinearLR(o, 1 / 6, 1.0, 5), S.LinearLR(o, 1.0, 0.0, 18)], [6]),
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_schedules_are_those_of_torch(name):
    ours, theirs = SAME[name]
    assert [ours(t, T) for t in range(T)] == pytest.approx(rates(theirs, T), abs=1e-12)


@given(st.sampled_from(sorted(optim.SCHEDULES)), st.integers(1, 300), st.floats(0, 0.9))
@settings(max_examples=60, deadline=None)
def test_factors_lie_between_zero_and_one(name, total, warmup):
    factor = optim.schedule(name, warmup=warmup)
    values = [factor(t, total) for t in range(total + 3)]
    assert all(-1e-12 <= v <= 1 + 1e-12 for v in values)
    assert max(values) == pytest.approx(1, abs=0.7 if name == "one_cycle" else 1e-9) or total < 4


def test_the_training_loop_takes_every_schedule_by_name():
    for name in optim.SCHEDULES:
        ours, theirs = optim.schedule(name, warmup=0.3), train._resolve_schedule(name, 0.3)
        assert [ours(t, 17) for t in range(17)] == [theirs(t, 17) for t in range(17)]
        assert theirs.__qualname__ == name


def test_schedules_refuse_what_they_do_not_know():
    with pytest.raises(ValueError, match="unknown schedule 'fast'"):
        optim.schedule("fast")
    with pytest.raises(ValueError, match="warmup is 1"):
        optim.schedule("linear", warmup=1)
    assert optim.schedule(lambda step, total: 0.5)(3, 10) == 0.5
    assert optim.SCHEDULES["one_cycle"](0, 1) == 1.0 and optim.SCHEDULES["one_cycle"](5, 5, rise=1.0) == 4e-6


def net_with_everything():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))


def test_the_range_test_leaves_the_model_as_it_was():
    net = net_with_everything()
    net[1].eval()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    modes = [m.training for m in net.modules()]
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    found = optim.range_test(net, [(x, (x[:, 0] > 0).long())], nn.functional.cross_entropy, steps=30, high=10.0)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert torch.equal(random, torch.get_rng_state()) and modes == [m.training for m in net.modules()]
    assert torch.equal(net[0].weight.grad, torch.ones(8, 3)) and net[0].bias.grad is None
    assert len(found.rates) == len(found.losses) == len(found.smooth) > 5
    assert len(found.plot().lines) >= 3


def test_the_range_test_restores_after_an_error_and_names_empty_batches():
    net = net_with_everything()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="empty"):
        optim.range_test(net, [], nn.functional.cross_entropy)
    with pytest.raises(ValueError, match="ran out"):
        optim.range_test(net, iter([(torch.ones(4, 3), torch.zeros(4).long())]), nn.functional.cross_entropy)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_the_range_test_of_a_dict_model():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))

        def forward(self, x):
            from types import SimpleNamespace

            return SimpleNamespace(loss=(self.w * x).square().mean())

    found = optim.range_test(Own(), [{"x": torch.ones(3)}], optimizer=optim.SGD, high=100.0, steps=60)
    assert found.rates[-1] < 100 and 1e-3 < found.suggestion < found.lowest < 100


def test_the_range_test_of_a_step_function_stops_when_it_diverges():
    position = [1.0]

    def step(rate):
        loss = position[0] ** 2
        position[0] -= rate * 2 * position[0]
        return loss

    found = optim._rising_rate(step, 1e-3, 1e3, steps=80)
    assert found.rates[-1] < 100 and found.suggestion < found.lowest < 30
    with pytest.raises(ValueError, match="needs 0 < low < high"):
        optim._rising_rate(step, 1.0, 0.1)
    with pytest.raises(ValueError, match="start lower"):
        optim._rising_rate(lambda rate: math.nan)
    assert optim._steepest([1.0, 2.0], [0.0, 1.0]) == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_run_of_the_study_scores_one_split(split):
    found = study.run(1, split, "Lion", 1e-4, head=10.0, decay=0.1)
    assert set(found) == {f"{split}_loss", f"{split}_accuracy"} and math.isfinite(found[f"{split}_loss"])
    assert found[f"{split}_accuracy"].shape == study.task()[split].y.shape, "a value for every sentence"


@pytest.mark.parametrize("split", ["valid", "test"])
def test_the_bag_of_words_sees_the_sentences_of_the_seed(split):
    found = study.run(1, split, study.WORDS, C=10.0)
    assert set(found) == {f"{split}_loss", f"{split}_accuracy"} and 0 < found[f"{split}_loss"] < 2
    assert found[f"{split}_accuracy"].shape == study.task()[split].y.shape
    assert found[f"{split}_loss"] != study.run_words(2, split, 10.0)[f"{split}_loss"], "another seed, other sentences"


def test_a_rate_that_diverges_is_worse_than_no_knowledge():
    assert study.run(1, "valid", "gradient descent", 1e30)["valid_loss"] > math.log(2)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_head_alone_is_trained_on_vectors_of_the_untouched_body(split):
    found, again = (study.run_head(1, split, "chosen", 1e-2) for _ in range(2))
    assert set(found) == {f"{split}_loss", f"{split}_accuracy"} and found[f"{split}_loss"] == again[f"{split}_loss"]
    assert found[f"{split}_accuracy"].shape == study.task()[split].y.shape, "a value for every sentence"


def test_batches_hold_every_sentence_once_and_no_more_than_its_length():
    hidden, mask = torch.arange(24.0).view(4, 3, 2), torch.tensor([[1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0]])
    cut = study.batches(hidden, mask, torch.arange(4), torch.tensor([2, 1, 0, 3]), size=2)
    assert [b["hidden"].shape for b in cut] == [(2, 1, 2), (2, 3, 2)]
    assert sorted(y for b in cut for y in b["labels"].tolist()) == [0, 1, 2, 3]


def test_each_row_of_the_study_chooses_on_validation_data_from_as_many_settings(tmp_path, monkeypatch):
    def run(seed, split, optimizer, lr=0.0, head=1.0, decay=None, C=None):
        away = abs(lr - 1e-3) if C is None else abs(math.log10(C) - 1)
        return {f"{split}_loss": away + 0.01 * seed, f"{split}_accuracy": 0.5}

    def run_head(seed, split, rule, lr):
        return {f"{split}_loss": abs(lr - 1e-1) + 0.01 * seed, f"{split}_accuracy": 0.5}

    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path))
    monkeypatch.setattr(study, "run", run)
    monkeypatch.setattr(study, "run_head", run_head)
    threads = torch.get_num_threads()
    with pytest.warns(UserWarning, match="widen the grid"):
        study.main()
    torch.set_num_threads(threads)
    stored = json.loads((tmp_path / "03_optim.json").read_text())["quick"]
    found = {name: stored[name]["value"]["test_loss"] for name in ("optimizers", "heads", "decay")}
    assert [r["optimizer"] for r in found["optimizers"]] == [*optim.OPTIMIZERS, study.WORDS]
    assert found["optimizers"][-1]["C"] == 10.0 and {len(rates) for rates in study.RATES.values()} == {7}
    assert {name: {r["tried"] for r in rows} for name, rows in found.items()} == {
        "optimizers": {7},
        "heads": {6},
        "decay": {16},
    }
    assert [r["head"] for r in found["heads"]] == study.MULTIPLIERS and {r["lr"] for r in found["heads"]} == {1e-3}
    alone = [(r["rule"], r["lr"], r["tried"]) for r in stored["alone"]["value"]["test_loss"]]
    assert alone == [("chosen", 1e-1, len(study.HEAD_RATES)), ("as for BERT", 1e-4, 1)]
    with pytest.raises(ValueError, match="no study 'rates'; use alone, optimizers, heads, decay"):
        study.main("rates")
