"""Chapter 15's library: every regularizer against its definition or the reference library, and gone without a trace."""

import copy
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupts import Interrupt
from sklearn.linear_model import ElasticNet, Lasso, Ridge
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torchvision.ops import stochastic_depth

from ftbook import peft, results
from ftbook import regularize as rg
from ftbook.data import ImageSet
from ftbook.finetune import freeze, tune
from ftbook.studies import regularize as study
from ftbook.train import Checkpoint, EarlyStopping, Settings, evaluate, fit


def net(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    )


def examples(n=60, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=g)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


QUIET = Settings(weight_decay=0.0, progress=False)
HOW = {"epochs": 3, "lr": 0.05, "batch_size": 20, "settings": QUIET}


def trained(model, train=None, **options):
    fit(model, train or examples(), **{**HOW, **options})
    return [p.detach() for p in model.parameters()]


def same(a, b, tolerance=0.0):
    return all(torch.allclose(p, q, rtol=0, atol=tolerance) for p, q in zip(a, b, strict=True))


# dropout


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(
    ("theirs", "shared"),
    [
        (lambda x, p: F.dropout(x, p, True), ()),
        (lambda x, p: F.dropout2d(x, p, True), (2, 3)),
        (lambda x, p: stochastic_depth(x, p, "row"), (1, 2, 3)),
        (lambda x, p: stochastic_depth(x, p, "batch"), (-1, -2, -3, -4)),
    ],
)
def test_drop_equals_torch_given_the_same_noise(theirs, shared, p):
    x = torch.randn(6, 3, 5, 4)
    torch.manual_seed(3)
    a = theirs(x, p)
    torch.manual_seed(3)
    assert torch.equal(rg.drop(x, p, shared), a)


@settings(deadline=None, max_examples=20)
@given(st.floats(0.05, 0.9), st.integers(0, 100))
def test_drop_keeps_the_mean_and_has_the_variance_of_the_formula(p, seed):
    torch.manual_seed(seed)
    y = rg.drop(torch.full((20_000,), 2.0, dtype=torch.float64), p)
    deviation = 2 * math.sqrt(p / (1 - p))
    assert abs(y.mean() - 2) < 5 * deviation / math.sqrt(20_000)
    assert set(y.tolist()) <= {0.0, 2 / (1 - p)} or torch.allclose(y[y != 0], torch.tensor(2 / (1 - p)).double())


@pytest.mark.parametrize("p", [-0.1, 1.1])
def test_rates_outside_zero_to_one_are_refused(p):
    for call in (
        lambda: rg.drop(torch.ones(2), p),
        lambda: rg.set_dropout(net(), p),
        lambda: rg.mixout(net(), p=p),
        lambda: rg.drop_outputs(net(), "0", p=p),
    ):
        with pytest.raises(ValueError, match="probability"):
            call()


def test_set_dropout_changes_all_rates_and_puts_them_back():
    model = nn.Sequential(nn.Dropout(0.1), nn.AlphaDropout(0.2), nn.Dropout2d(0.3))
    with rg.set_dropout(model, 0.7):
        assert [m.p for m in model] == [0.7] * 3
    assert [m.p for m in model] == [0.1, 0.2, 0.3]
    with pytest.raises(ValueError, match="no dropout layers"):
        rg.set_dropout(nn.Linear(2, 2), 0.1)


def test_stochastic_depth_rises_with_depth_and_goes_without_a_trace():
    model, x = net(), torch.randn(4000, 4)
    before = model(x)
    keys = list(model.state_dict())
    with rg.drop_outputs(model, "0", "4", p=0.6, shared="rows"):
        outs = {}
        hooks = [model[k].register_forward_hook(lambda m, i, o, k=k: outs.update({k: o})) for k in (0, 4)]
        model(x)
        dropped = [float((outs[k] == 0).all(1).float().mean()) for k in (0, 4)]
        assert abs(dropped[0] - 0.3) < 0.04 and abs(dropped[1] - 0.6) < 0.04
        assert torch.equal(model.eval()(x), before)
        for hook in hooks:
            hook.remove()
    assert torch.equal(model.train()(x), before) and list(model.state_dict()) == keys
    with pytest.raises(ValueError, match="matches no module of Sequential; near names: "):
        rg.drop_outputs(model, "nothing", p=0.1)


def test_of_modules_inside_each_other_the_inner_ones_drop_and_a_shared_one_drops_once():
    shared = nn.Linear(4, 4, bias=False)
    model = nn.Sequential(nn.Sequential(shared), nn.Sequential(shared), nn.Linear(4, 2))
    assert rg._modules(model, ("*",)) == [shared, model[2]]
    assert rg._modules(model, ("0",)) == [model[0]] and rg._modules(model, ("*", "!2")) == [shared]
    with rg.drop_outputs(model, "*", p=0.5):
        assert [len(m._forward_hooks) for m in (shared, model[2])] == [1, 1]


def test_modules_that_are_never_called_or_return_no_tensor_are_refused_and_attention_drops_its_output():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    with pytest.raises(ValueError, match="never called.*'self_attn' instead"):
        rg.drop_outputs(layer, "out_proj", p=0.1)
    x = torch.randn(2, 3, 8)
    with rg.drop_outputs(layer, "self_attn", p=1.0):
        assert not layer.self_attn(x, x, x)[0].any() and layer.self_attn(x, x, x)[1] is not None
    lstm = nn.Sequential(nn.ModuleDict({"inner": nn.Linear(2, 2)}))
    lstm[0].forward = lambda x: {"y": x}
    with rg.drop_outputs(lstm, "0", p=0.1), pytest.raises(TypeError, match="returns a dict"):
        lstm(x)


# with adapters, in any order


ATTACHED = {
    "drop_outputs": lambda m, p: rg.drop_outputs(m, "0", p=p),
    "drop_connect": lambda m, p: rg.drop_connect(m, "0", p=p),
    "mixout": lambda m, p: rg.mixout(m, "0", p=p, reference={"0.weight": torch.zeros(8, 4)}),
}
ADAPTERS = {
    "LoRA": peft.LoRA(r=2, target=("0",)),
    "DoRA": peft.DoRA(r=2, target=("0",)),
    "BitFit": peft.BitFit(("0",)),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("first", ["adapter", "regularizer"])
@pytest.mark.parametrize("name", ATTACHED)
def test_regularizers_and_adapters_go_together_and_come_off_in_any_order(name, first, adapter):
    x, model = examples()[0], net()
    before, keys, bias = model(x), list(model.state_dict()), model[0].bias
    p = 0.5 if adapter == "DoRA" else 1.0
    attach = {
        "adapter": lambda: peft.apply(model, ADAPTERS[adapter], head=()).remove,
        "regularizer": lambda: ATTACHED[name](model, p).remove,
    }
    model.eval()  # DoRA reads the weights' lengths: of the whole weights
    undo = [attach[kind]() for kind in sorted(attach, reverse=first == "regularizer")]
    out = model.train()[:1](x)
    if p == 1.0:
        assert torch.allclose(out, 0 * bias if name == "drop_outputs" else bias.expand_as(out))
    assert torch.allclose(model.eval()(x), before, atol=1e-6)
    model.train()(x).sum().backward()
    for back in undo:
        back()
    assert list(model.state_dict()) == keys and torch.equal(model(x), before)
    assert not any(m._forward_hooks for m in model.modules()) and type(model[0]) is nn.Linear


def test_what_an_adapter_adds_stays_whole_and_rates_count_each_layer_once():
    model = net()
    adapter = peft.apply(model, peft.LoRA(r=2, target=("0", "4")), head=())
    with rg.drop_connect(model, p=0.5):
        named = [n for n, _ in model.named_parameters() if "original" in n]
        assert named == ["0.base.parametrizations.weight.original", "4.base.parametrizations.weight.original"]
    plain = {n.replace(".base", ""): p for n, p in model.named_parameters()}
    with rg.mixout(model, "0", "4", p=0.0, reference=plain):
        pass
    with pytest.raises(ValueError, match="reference has no '4.weight'"):
        rg.mixout(model, "0", "4", p=0.5, reference={"0.weight": model[0].base.weight})
    assert not any("original" in n for n, _ in model.named_parameters())
    x = torch.ones(4000, 4)
    with rg.drop_outputs(model, "0", "4", p=0.6, shared="rows"), torch.no_grad():
        dropped = (model[:1](x) == 0).all(1).float().mean()
        assert abs(float(dropped) - 0.3) < 0.04
    adapter.remove()


def test_mixout_first_does_not_make_drop_outputs_drop_the_weights():
    model = net()
    with rg.mixout(model, "0", p=0.0), rg.drop_outputs(model, "0", p=1.0):
        assert not model[:1](torch.ones(2, 4)).any() and model[0].weight.all()


def test_a_parametrization_that_is_refused_leaves_nothing_behind():
    model = net()
    with rg.drop_connect(model, "4", p=0.5):
        with pytest.raises(ValueError, match="parametrization already"):
            rg.mixout(model, "0", "4", p=0.5)
        assert type(model[0]) is nn.Linear
    assert type(model[4]) is nn.Linear


# DropConnect and mixout


def test_mixout_is_the_model_at_0_and_the_pretrained_one_at_1():
    model, pretrained = net(1), dict(net(2).named_parameters())
    x = torch.randn(5, 4)
    plain = model(x)
    with rg.mixout(model, "*", p=0.0, reference=pretrained):
        assert torch.equal(model(x), plain)
    with rg.mixout(model, "0", "4", p=1.0, reference=pretrained):
        assert torch.equal(model[0].weight, pretrained["0.weight"])
        assert torch.equal(model[4].weight, pretrained["4.weight"])
        assert torch.equal(model.eval()(x), plain)


def test_mixout_keeps_the_mean_weight_and_equals_its_definition():
    w, u = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    step = rg._DropToward(0.7, u)
    torch.manual_seed(5)
    found = step(w)
    torch.manual_seed(5)
    keep = torch.empty_like(w).bernoulli_(0.3)
    assert torch.allclose(found, ((1 - keep) * u + keep * w - 0.7 * u) / 0.3)
    mean = torch.stack([step(w) for _ in range(20_000)]).mean(0)
    assert (mean - w).abs().max() < 5 * (w - u).abs().max() * math.sqrt(0.7 / 0.3 / 20_000)


def test_drop_connect_drops_weights_and_leaves_biases():
    model = net()
    with rg.drop_connect(model, p=0.5):
        assert 0.2 < float((model[4].weight == 0).float().mean()) < 0.8
        assert not rg.parametrize.is_parametrized(model[1]) and not rg.parametrize.is_parametrized(model[6])
        with pytest.raises(ValueError, match="parametrization already"):
            rg.mixout(model, p=0.5)


@pytest.mark.parametrize(
    "attach",
    [lambda m: rg.mixout(m, p=0.5), lambda m: rg.drop_connect(m, p=0.3), lambda m: rg.drop_outputs(m, "4", p=0.3)],
)
def test_what_is_attached_trains_and_leaves_keys_order_and_class_as_they_were(attach):
    model = net()
    keys, classes, weights = list(model.state_dict()), [type(m) for m in model], [p for p in model.parameters()]
    names = [n for n, _ in model.named_parameters()]
    before = copy.deepcopy(model.state_dict())
    with attach(model):
        fit(model, examples(), examples(seed=2), callbacks=[EarlyStopping("valid_loss", patience=None)], **HOW)
    assert list(model.state_dict()) == keys and [type(m) for m in model] == classes
    assert [n for n, _ in model.named_parameters()] == names
    assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))
    assert not torch.equal(model[4].weight, before["4.weight"])
    copy.deepcopy(model).load_state_dict(before)


def test_embeddings_stay_whole_unless_named():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    assert rg._matrices(model, ()) == ["1.weight"] and rg._matrices(model, ("0",)) == ["0.weight"]
    assert rg._head_names(model) == {"2.weight", "2.bias"}


# penalties and proximal steps


def test_penalties_by_hand_and_their_gradients():
    w = torch.tensor([1.0, -2.0, 0.0], requires_grad=True)
    rg._elastic_net([w], l1=0.5, l2=3.0).backward()
    assert torch.equal(w.grad, torch.tensor([3.5, -6.5, 0.0]))
    with pytest.raises(ValueError, match="no parameters"):
        rg._elastic_net([])


def test_a_penalty_enters_training_only():
    model = net()
    plain = nn.functional.cross_entropy(model(examples()[0]), examples()[1])
    loss = rg.Penalized("cross_entropy", rg.penalty(model, l2=1.0))
    added = 0.5 * sum(model[k].weight.square().sum() for k in (0, 4, 6))
    assert torch.allclose(loss(model(examples()[0]), examples()[1]), plain + added)
    with torch.no_grad():
        assert torch.equal(loss(model(examples()[0]), examples()[1]), plain)
    assert len(rg.penalty(model, "0").args[0]) == 1


def test_a_penalized_loss_is_weighed_and_checked_like_its_plain_loss():
    x, y = examples(40)
    weights = torch.tensor([0.2, 3.0, 5.0])
    zero = rg.penalty(net(), l2=0.0)

    def accumulated(loss):
        """Losses and weights after four batches of 10, one step."""
        model = net()
        batches = [(x[i : i + 10], y[i : i + 10]) for i in range(0, 40, 10)]
        how = {"optimizer": "sgd", "lr": 0.1, "settings": replace(QUIET, accumulate=4)}
        history = fit(model, batches, (x, y), loss=loss, **how)
        measured = evaluate(model, (x, y), loss=loss, metrics=None, batch_size=7)
        return [history["train_loss"], history["valid_loss"], measured["loss"]], list(model.parameters())

    for plain in (
        nn.CrossEntropyLoss(weights),
        nn.CrossEntropyLoss(ignore_index=0),
        partial(F.cross_entropy, weight=weights),
    ):
        bare, wrapped = accumulated(plain), accumulated(rg.Penalized(rg.Penalized(plain, zero), zero))
        assert bare[0] == wrapped[0] and same(bare[1], wrapped[1])
    for plain in ("cross_entropy", "focal", nn.CrossEntropyLoss()):
        with pytest.raises(ValueError, match="label 4 is out of range"):
            fit(net(), (x, y + 2), loss=rg.Penalized(plain, zero), **HOW)
    rows = (x, torch.tensor([[1.0, 0.0, 0.0]] * 40))
    counted = [evaluate(net(), rows, loss=loss, metrics="accuracy") for loss in ("bce", rg.Penalized("bce", zero))]
    assert counted[0] == counted[1]
    with pytest.raises(ValueError, match="reduction='sum'"):
        rg.Penalized(nn.CrossEntropyLoss(reduction="sum"), zero)
    with pytest.raises(TypeError, match="loss is None"):
        rg.Penalized(None, zero)


def test_a_checkpoint_holds_what_a_penalized_loss_learns(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.log = nn.Parameter(torch.zeros(()))

        def forward(self, output, target):
            return F.cross_entropy(output * self.log.exp(), target)

    def run(epochs, *callbacks):
        plain, model = Scaled(), net()
        optimizer = torch.optim.SGD([*model.parameters(), plain.log], lr=0.1)
        loss = rg.Penalized(plain, rg.penalty(model, l2=0.1))
        fit(model, examples(), loss=loss, optimizer=optimizer, callbacks=callbacks, **HOW | {"epochs": epochs})
        return plain.log.item()

    file = Checkpoint(tmp_path / "run.pt")
    assert run(1, file) != 0
    assert run(2, file) == run(2)


def test_an_l2_penalty_is_torchs_weight_decay_for_sgd():
    models = [net().double() for _ in range(2)]
    names = ["0.weight", "4.weight", "6.weight"]

    def sgd(decay):
        def make(parameters, model):
            named = dict(model.named_parameters())
            groups = [
                {"params": [named[n] for n in names], "weight_decay": decay},
                {"params": [p for n, p in named.items() if n not in names], "weight_decay": 0.0},
            ]
            return torch.optim.SGD(groups, lr=0.1)

        return make

    data = tuple(t.double() if t.is_floating_point() else t for t in examples())
    for model, decay in zip(models, (0.0, 0.3), strict=True):
        loss = rg.Penalized("cross_entropy", rg.penalty(model, l2=0.3)) if not decay else "cross_entropy"
        fit(model, data, loss=loss, optimizer=lambda p, m=model, d=decay: sgd(d)(p, m), **HOW)
    assert same(models[0].parameters(), models[1].parameters(), 1e-12)


def test_decoupled_decay_with_adam_is_adamw():
    ours, theirs = net().double(), net().double()
    data = tuple(t.double() if t.is_floating_point() else t for t in examples())
    how = HOW | {"settings": replace(QUIET, schedule="cosine")}
    fit(ours, data, optimizer=torch.optim.Adam, callbacks=[rg.DecoupledDecay(ours, 0.5)], **how)
    fit(theirs, data, optimizer="adamw", **(how | {"settings": replace(QUIET, schedule="cosine", weight_decay=0.5)}))
    assert same(ours.parameters(), theirs.parameters(), 1e-12)


def test_decoupled_pull_moves_toward_the_start_and_spares_the_head():
    free, held = net(), net()
    start = [p.detach().clone() for p in held.parameters()]
    trained(free)
    trained(held, callbacks=[rg.DecoupledDecay(held, 19.0, toward="start")])
    far = [float((p.detach() - s).norm()) for p, s in zip(free.parameters(), start, strict=True)]
    near = [float((p.detach() - s).norm()) for p, s in zip(held.parameters(), start, strict=True)]
    assert sum(near[:-2]) < 0.5 * sum(far[:-2]) and near[-2] > 0.5 * far[-2]
    with pytest.raises(ValueError, match="toward"):
        rg.DecoupledDecay(held, 1.0, toward="nowhere")


def test_l2_sp_by_hand_excludes_the_head():
    model = net()
    term = rg.l2_sp(model, alpha=2.0, beta=4.0)
    head = sum(float(p.detach().square().sum()) for p in model[6].parameters())
    assert torch.allclose(term(), torch.tensor(2 * head))
    with torch.no_grad():
        model[0].weight.add_(1.0)
    assert torch.allclose(term(), torch.tensor(32.0 + 2 * head), rtol=1e-5)
    other = dict(net(3).named_parameters())
    away = sum(float((p - other[n]).square().sum()) for n, p in model.named_parameters() if not n.startswith("6"))
    assert torch.allclose(rg.l2_sp(model, alpha=2.0, reference=other)(), torch.tensor(away), rtol=1e-5)


def problem(n=80, d=12):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=g, dtype=torch.float64) * torch.linspace(0.5, 2, d)
    w = torch.zeros(d, dtype=torch.float64)
    w[:4] = torch.tensor([2.0, -1.0, 0.5, 0.3])
    return x, x @ w + 0.7 + 0.5 * torch.randn(n, generator=g, dtype=torch.float64)


@pytest.mark.parametrize(
    ("theirs", "l1", "l2"),
    [
        (Lasso(alpha=0.1, tol=1e-12, max_iter=100_000), 0.1, 0.0),
        (ElasticNet(alpha=0.2, l1_ratio=0.5, tol=1e-12, max_iter=100_000), 0.1, 0.1),
        (Ridge(alpha=80 * 0.3, tol=1e-12), 0.0, 0.3),
    ],
)
def test_proximal_steps_find_scikit_learns_solution_zero_for_zero(theirs, l1, l2):
    x, y = problem()
    w, b = rg._linear_elastic_net(x, y, l1, l2, steps=4000)
    theirs.fit(x.numpy(), y.numpy())
    assert torch.allclose(w, torch.from_numpy(theirs.coef_), atol=1e-9) and abs(float(b) - theirs.intercept_) < 1e-9
    assert torch.equal(w == 0, torch.from_numpy(theirs.coef_ == 0))


def test_subgradient_steps_come_close_but_never_to_zero():
    x, y = problem()
    exact, _ = rg._linear_elastic_net(x, y, l1=0.1)
    rough, _ = rg._linear_elastic_net(x, y, l1=0.1, steps=4000, proximal=False)
    assert int((exact == 0).sum()) >= 6 and int((rough == 0).sum()) == 0 and (exact - rough).abs().max() < 0.05


@settings(deadline=None, max_examples=30)
@given(st.floats(-5, 5), st.floats(0, 3), st.floats(0, 3))
def test_shrink_minimizes_what_it_should(v, l1, l2):
    v = torch.tensor(v, dtype=torch.float64)
    grid = torch.linspace(-6, 6, 24_001, dtype=torch.float64)
    best = grid[((grid - v) ** 2 / 2 + l1 * grid.abs() + l2 / 2 * grid**2).argmin()]
    assert abs(rg._shrink(v, l1, l2) - best) < 1e-3


def test_proximal_callback_gives_exact_zeros_where_the_penalty_gives_none():
    sparse, penalized = net(), net()
    trained(sparse, callbacks=[rg.Proximal(sparse, l1=0.5)])
    trained(penalized, loss=rg.Penalized("cross_entropy", rg.penalty(penalized, l1=0.5)))
    zeros = [sum(int((m[k].weight == 0).sum()) for k in (0, 4, 6)) for m in (sparse, penalized)]
    assert zeros[0] > 20 and zeros[1] == 0 and int((sparse[4].bias == 0).sum()) == 0


# gradients


@settings(deadline=None, max_examples=20)
@given(st.floats(1e-3, 1e3), st.integers(0, 50))
def test_clipping_equals_torch(limit, seed):
    models = [net(seed), net(seed)]
    for model in models:
        F.cross_entropy(model(examples()[0]), examples()[1]).backward()
    ours = rg._clip_gradients(models[0].parameters(), limit)
    theirs = nn.utils.clip_grad_norm_(models[1].parameters(), limit)
    assert torch.equal(ours, theirs)
    assert same([p.grad for p in models[0].parameters()], [p.grad for p in models[1].parameters()])


def test_clipping_nothing_and_refusals():
    assert rg._clip_gradients([nn.Parameter(torch.ones(1))], 1.0) == 0
    with pytest.raises(ValueError, match="positive"):
        rg._clip_gradients([], 0.0)
    with pytest.raises(ValueError, match="variance"):
        rg.GradientNoise(-1.0)


@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_a_step_of_sam_takes_the_gradient_at_the_weights_uphill(rho):
    data, ours, theirs = examples(20), net().double(), net().double()
    data = (data[0].double(), data[1])
    sam = rg.SAM(rho)
    how = HOW | {"epochs": 1, "settings": replace(QUIET, precision="fp32")}
    fit(ours, data, loss=sam, callbacks=[sam], optimizer=lambda p: torch.optim.SGD(p, lr=0.05), **how)
    weights = list(theirs.parameters())
    first = torch.autograd.grad(F.cross_entropy(theirs(data[0]), data[1]), weights)
    length = torch.cat([g.flatten() for g in first]).norm()
    above = copy.deepcopy(theirs)
    with torch.no_grad():
        for w, g in zip(above.parameters(), first, strict=True):
            w.add_(g, alpha=rho / float(length))
    second = torch.autograd.grad(F.cross_entropy(above(data[0]), data[1]), list(above.parameters()))
    assert same(ours.parameters(), [w - 0.05 * g for w, g in zip(weights, second, strict=True)], 1e-12)
    assert not ours._forward_pre_hooks and sam.count == 1


def test_sam_refuses_what_it_cannot_see_and_leaves_no_hook_behind():
    model, sam = net(), rg.SAM()
    with pytest.raises(ValueError, match="pass it as loss= too"):
        trained(model, callbacks=[sam])
    with pytest.raises(ValueError, match="accumulate=2"):
        trained(model, loss=sam, callbacks=[sam], settings=replace(QUIET, accumulate=2))
    with pytest.raises(ValueError, match="not negative"):
        rg.SAM(-0.1)
    with pytest.raises(KeyboardInterrupt):
        trained(model, loss=sam, callbacks=[sam, Interrupt(2)])
    assert not model._forward_pre_hooks
    assert evaluate(model, examples(), loss=sam)["loss"] > 0
    with pytest.raises(ValueError, match="label 4 is out of range"):
        trained(model, (examples()[0], examples()[1] + 2), loss=sam, callbacks=[sam])


def test_r_drop_is_its_definition_on_doubled_batches_and_plain_in_validation():
    model, (x, y) = net(dropout=0.5), examples(20)
    with rg.RDrop(model, alpha=2.0) as loss:
        assert len(model(x)) == 40 and len(model.eval()(x)) == 20
        p, q = model.train()(x).chunk(2)
        found = loss(torch.cat([p, q]), y)
        assert torch.equal(loss(p, y), F.cross_entropy(p, y))
        trained(model, loss=loss, valid=examples(seed=2))
    a, b = p.log_softmax(1), q.log_softmax(1)
    both = (F.cross_entropy(p, y) + F.cross_entropy(q, y)) / 2
    apart = F.kl_div(a, b, reduction="batchmean", log_target=True) + F.kl_div(
        b, a, reduction="batchmean", log_target=True
    )
    assert torch.allclose(found, both + apart / 2) and apart > 0
    assert len(model(x)) == 20 and not model._forward_pre_hooks
    with pytest.raises(ValueError, match="alpha is -1"):
        rg.RDrop(model, -1.0)


def test_r_drop_with_no_weight_and_no_noise_trains_as_the_plain_loss():
    plain, model = net(), net()
    with rg.RDrop(model, alpha=0.0) as loss:
        trained(model, loss=loss)
    trained(plain)
    assert same(model.parameters(), plain.parameters(), 1e-6)


def test_gradient_noise_has_its_variance_and_is_gone_after_training():
    model = nn.Linear(100, 100, bias=False)
    start = model.weight.detach().clone()
    x = torch.zeros(4, 100)
    noise = rg.GradientNoise(eta=0.04, gamma=1.0)

    def sgd(parameters):
        sgd.made = torch.optim.SGD(parameters, lr=1.0)
        return sgd.made

    fit(
        model,
        (x, torch.zeros(4, 100)),
        loss="mse",
        optimizer=sgd,
        epochs=1,
        batch_size=2,
        callbacks=[noise],
        settings=Settings(progress=False),
    )
    moved = (model.weight - start).flatten()
    assert abs(float(moved.std()) / math.sqrt(0.04 + 0.02) - 1) < 0.05 and noise.count == 2
    assert not sgd.made._optimizer_step_pre_hooks
    assert noise.deviation(3) == pytest.approx(0.1)


# averaging


@pytest.mark.parametrize("decay", [None, 0.8])
def test_averages_equal_torchs(decay):
    model = net().double()
    how = {} if decay is None else {"multi_avg_fn": get_ema_multi_avg_fn(decay)}
    theirs = AveragedModel(model, **how)

    class Theirs:
        def on_step_end(self, state):
            theirs.update_parameters(state.model)

    average = rg.WeightAverage(decay=decay)
    data = tuple(t.double() if t.is_floating_point() else t for t in examples())
    fit(model, data, callbacks=[Theirs(), average], **HOW)
    assert same(model.parameters(), theirs.module.parameters(), 1e-12)
    last = [p.detach().clone() for p in model.parameters()]
    average.exchange(model)
    assert not same(model.parameters(), last)
    average.exchange(model)
    assert same(model.parameters(), last)


def test_averaging_starts_and_strides_as_asked():
    model, average = net(), rg.WeightAverage(start=0.5, every=2)
    kept = []

    class Keep:
        def on_step_end(self, run):
            kept.append([p.detach().clone() for p in run.model.parameters()])

    trained(model, callbacks=[Keep(), average])  # 9 steps: averaging begins after the fourth
    mean = [torch.stack(ps).mean(0) for ps in zip(*(kept[i] for i in (4, 6, 8)), strict=True)]
    assert average.count == 3 and same(model.parameters(), mean, 1e-6)
    for bad in ({"decay": 1.0}, {"start": 1.0}, {"every": 0}):
        with pytest.raises(ValueError):
            rg.WeightAverage(**bad)


def test_a_share_of_the_steps_needs_their_number_and_averaging_that_never_began_warns():
    x, y = examples()
    stream = [(x[:20], y[:20])]
    endless = type("Endless", (), {"__iter__": lambda self: iter(stream)})()
    with pytest.raises(ValueError, match="no len.*: pass max_steps= to fit, or start=0"):
        trained(net(), train=endless, callbacks=[rg.WeightAverage(start=0.75)])
    model = net()
    trained(model, train=endless, callbacks=[rg.WeightAverage()])
    with pytest.warns(UserWarning, match="nothing was averaged: training ended after 3 steps.*start=0.9 of 9"):
        stopper = EarlyStopping("train_loss", patience=1, min_delta=99.0)
        fit(net(), (x, y), callbacks=[rg.WeightAverage(start=0.9), stopper, Stops(3)], **HOW)


class Stops:
    "Ends a run after so many steps."

    def __init__(self, at):
        self.at = at

    def on_step_end(self, run):
        run.stop = run.stop or run.step == self.at


class Averages:
    "What the model held whenever an epoch was looked at, and what its own weights were."

    def __init__(self):
        self.seen, self.raw = [], []

    def on_step_end(self, run):
        self.last = [p.detach().clone() for p in run.model.parameters()]

    def on_epoch_end(self, run):
        self.seen.append([p.detach().clone() for p in run.model.parameters()])
        self.raw.append(self.last)


@pytest.mark.parametrize("first", ["average", "stopper"])
def test_early_stopping_measures_and_keeps_the_best_average(first):
    model, average, watch = net(), rg.WeightAverage(decay=0.9), Averages()
    stopper = EarlyStopping("valid_loss", patience=2)
    both = [average, stopper] if first == "average" else [stopper, average]
    valid = (examples(seed=2)[0], examples(seed=3)[1])  # wrong labels: soon it gets worse
    history = fit(model, examples(), valid, callbacks=[watch, *both], **{**HOW, "epochs": 12, "lr": 0.2})
    best = history.best["epoch"] - 1
    assert best < len(history) - 1, "it must have stopped, or the test shows nothing"
    assert same(model.parameters(), watch.seen[best]) and not same(model.parameters(), watch.raw[best], 1e-3)
    assert history["valid_loss"][best] == min(history["valid_loss"])
    assert evaluate(model, valid)["loss"] == pytest.approx(history["valid_loss"][best], rel=1e-5)


def test_the_weights_come_back_bit_for_bit_after_validation_even_after_an_error():
    plain, averaged = net(), net()
    trained(plain)
    seen = Averages()
    average = rg.WeightAverage(decay=0.5)
    fit(averaged, examples(), examples(seed=2), callbacks=[average, seen], **HOW)
    average.exchange(averaged)
    assert same(averaged.parameters(), plain.parameters()), "validating the average has not changed the run"
    run = SimpleNamespace(model=averaged)
    before = [p.detach().clone() for p in averaged.parameters()]
    with pytest.raises(KeyboardInterrupt), average.evaluation_weights(run):
        assert not same(averaged.parameters(), before)
        raise KeyboardInterrupt
    assert same(averaged.parameters(), before)
    with rg.WeightAverage().evaluation_weights(run):
        assert same(averaged.parameters(), before), "nothing is averaged yet"


def test_with_data_for_them_the_statistics_are_those_of_the_average_in_validation_and_at_the_end():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    seen, batches = [], [examples()]

    class Look:
        def on_step_end(self, run):
            self.own = model[1].running_mean.clone()

        def on_epoch_end(self, run):
            other = copy.deepcopy(model)
            update_bn(batches, other)
            assert torch.allclose(other[1].running_mean, model[1].running_mean, atol=1e-6)
            seen.append(model[1].running_mean.clone())

        def on_epoch_begin(self, run):
            if seen:
                assert torch.equal(self.own, model[1].running_mean)

    stopper = EarlyStopping("valid_loss", patience=None)
    average = rg.WeightAverage(decay=0.9, train=batches)
    history = fit(model, examples(), examples(seed=2), callbacks=[average, Look(), stopper], **HOW)
    assert torch.equal(model[1].running_mean, seen[history.best["epoch"] - 1])


def test_averaging_goes_on_over_weights_that_are_frozen_for_a_while():
    model = net().double()
    theirs = AveragedModel(model)

    class Theirs:
        def on_step_end(self, run):
            theirs.update_parameters(run.model)

    data = tuple(t.double() if t.is_floating_point() else t for t in examples())
    tune(model, data, how="alternating", lr=0.05, epochs=4, callbacks=[Theirs(), rg.WeightAverage()], settings=QUIET)
    assert same(model.parameters(), theirs.module.parameters(), 1e-12)


def test_held_statistics_stay_as_they_are():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    freeze(model, "0", "1")
    before = model[1].running_mean.clone()
    assert rg.refresh_batchnorm(model, examples()) == 1
    assert torch.equal(model[1].running_mean, before) and model[3].running_mean.any()

    def broken(module, inputs):
        raise KeyboardInterrupt

    model[4].register_forward_pre_hook(broken)
    with pytest.raises(KeyboardInterrupt):
        rg.refresh_batchnorm(model, examples())
    assert model[3].momentum == 0.1 and model[3].training and not model[1].training


# resuming, and what is left behind


CALLBACKS = {
    "noise": lambda m: rg.GradientNoise(1e-2),
    "decay": lambda m: rg.DecoupledDecay(m, 0.5),
    "decay toward the start": lambda m: rg.DecoupledDecay(m, 1.0, toward="start"),
    "proximal": lambda m: rg.Proximal(m, l1=0.05),
    "EMA": lambda m: rg.WeightAverage(0.9),
    "SWA": lambda m: rg.WeightAverage(start=0.5, every=2),
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_run_broken_off_after_any_step_ends_as_the_unbroken_one(name, tmp_path):
    def run(path, at=0, seed=0):
        model = net(seed)
        callbacks = [CALLBACKS[name](model), Checkpoint(path, every=1), Interrupt(at)]
        fit(model, examples(), callbacks=callbacks, **HOW)
        return model.state_dict()

    whole = run(tmp_path / "whole.pt")
    for at in (2, 4, 5, 9):  # epochs end after 3, 6 and 9
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / f"{at}.pt", at)
        found = run(tmp_path / f"{at}.pt", seed=5)  # whatever weights the later process starts from
        assert all(torch.equal(whole[k], found[k]) for k in whole), at


@pytest.mark.parametrize("name", ["noise", "decay"])
def test_hooks_never_outlive_a_run_and_a_second_beginning_adds_none(name):
    model = net()
    callback = CALLBACKS[name](model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(KeyboardInterrupt):
        fit(model, examples(), optimizer=optimizer, callbacks=[callback, Interrupt(2)], **HOW)
    assert not optimizer._optimizer_step_pre_hooks
    run = SimpleNamespace(step=0, optimizer=optimizer, model=model)
    callback.on_train_begin(run)
    callback.on_train_begin(run)
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    callback.close(run)
    callback.close(run)
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_pretrained_weights_follow_the_model_to_its_device():
    for make in (
        lambda m: {"callbacks": [rg.DecoupledDecay(m, 1.0, toward="start")]},
        lambda m: {"loss": rg.Penalized("cross_entropy", rg.l2_sp(m, 1.0))},
    ):
        model = net()
        fit(model, examples(), **make(model), **{**HOW, "settings": replace(QUIET, device="cuda")})


def test_batchnorm_statistics_equal_torchs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.0), nn.Linear(6, 3))
    other = copy.deepcopy(model)
    x, y = examples()
    batches = [(x[i : i + 20], y[i : i + 20]) for i in range(0, 60, 20)]
    assert rg.refresh_batchnorm(model.eval(), batches) == 1 and model[1].momentum == 0.1 and not model[1].training
    update_bn(batches, other)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(model[1], name), getattr(other[1], name))
    assert rg.refresh_batchnorm(net(), batches) == 0
    average = rg.WeightAverage(train=batches)
    fit(model, (x, y), callbacks=[average], **HOW)
    moved = copy.deepcopy(model)
    update_bn(batches, moved)
    assert torch.equal(moved[1].running_mean, model[1].running_mean)


# the comparison


def digits():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(40) % 2
    x = (torch.rand(40, 1, 4, 4, generator=g) * 100 + 100 * y.view(-1, 1, 1, 1)).byte()
    return ImageSet(x, y, ["a", "b"])


def task():
    part = digits()
    return study.digits_task({"old": part, "new": part, "valid": part, "test": part}, labels=5, epochs=2)


def test_every_method_runs_and_leaves_a_plain_model():
    plain = task()
    keys = list(plain.start(0).state_dict())
    for method, (strengths, _) in study.METHODS.items():
        model, how = plain.start(1), study.Regularized(method, strengths[-1], plain)
        (history,) = tune(model, plain.train(1), how=how, lr=1e-2, epochs=2, batch_size=5, seed=1, settings=QUIET)
        assert list(model.state_dict()) == keys and not model.dropout.p and len(history), method
        assert not any(m._forward_hooks for m in model.modules()), method
    with pytest.raises(ValueError, match="method is 'hope'; allowed are none, temperature"):
        study.Regularized("hope", 1.0, plain)


def test_a_method_is_detached_and_its_hook_removed_when_training_breaks_off():
    plain, model = task(), task().start(0)

    def broken(output, target):
        raise KeyboardInterrupt

    for method in ("mixout", "stochastic depth", "gradient noise"):
        how = study.Regularized(method, 0.5, plain)
        with pytest.raises(KeyboardInterrupt):
            tune(model, plain.train(0), how=how, lr=1e-2, metrics={"x": broken}, settings=QUIET)
        assert not any(m._forward_hooks for m in model.modules()) and type(model.stem) is nn.Linear


def test_a_temperature_makes_the_labels_likeliest_and_changes_no_guess():
    torch.manual_seed(0)
    logits = 3 * torch.randn(500, 4)
    y = (logits / 2.5).softmax(1).multinomial(1)[:, 0]
    t = study.temperature(logits, y)
    assert 2 < t < 3 and study.temperature(logits / 2.5, y) == pytest.approx(t / 2.5, rel=0.05)
    plain, found = study.scores(logits, y), study.scores(logits, y, t)
    assert (plain["accuracy"] == found["accuracy"]).all() and plain["nll"][0].sum() == found["nll"][0].sum()
    assert found["nll_scaled"][0].sum() < found["nll"][0].sum() and found["ece_scaled"] < found["ece"]
    assert found["nll"][0].mean() / 100 == pytest.approx(float(F.cross_entropy(logits, y)), abs=1e-3)


def test_one_run_of_the_study_scores_the_split_it_is_told():
    found = study.run(1, "valid", "dropout", 0.3, lr=1e-3)
    assert len(found["accuracy"]) == study.SIZES["valid"] and found["moved"] > 0 and found["t"] > 0
    found = study.run(1, "test", "L1 proximal", 1.0, lr=1e-3)
    assert 0 <= found["ece"] <= 1 and 0 <= found["valid_accuracy"] <= 1 and found["zeros"] > 0
    plain, cooled = (study.run(1, "test", m, lr=1e-3) for m in ("none", "temperature"))
    assert (plain["accuracy"] == cooled["accuracy"]).all()
    assert (plain["nll_scaled"][0] == cooled["nll"][0]).all() and plain["ece_scaled"] == cooled["ece"]
    for baseline in ("majority", "bag of words", "probe"):
        C = None if baseline == "majority" else 1.0
        assert len(study.run(1, "test", baseline, C=C)["accuracy"]) == study.SIZES["test"]


def test_the_study_gives_every_method_as_many_tries(tmp_path, monkeypatch):
    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path))

    def fake(seed, split, method, strength=0.0, lr=None, C=None):
        return {"accuracy": 0.5, "nll_scaled": strength + (lr or 0) + (C or 0)}

    monkeypatch.setattr(study, "run", fake)
    with pytest.warns(UserWarning, match="at the edge"):
        study.main("questions")
    rows = results.load_study(study.CHAPTER, "questions").rows("accuracy")
    assert [r["method"] for r in rows[:4]] == ["majority", "bag of words", "probe", "none"]
    assert {r["method"] for r in rows[3:]} == set(study.METHODS) and len(rows) == len(study.METHODS) + 3
    assert {r["tried"] for r in rows[3:]} == {1, 2} and {r["lr"] for r in rows[3:]} == {min(study.RATES)}
    assert all(r.get("strength", 0.0) == min(study.METHODS[r["method"]][0]) for r in rows[3:])
    with pytest.raises(ValueError, match="no study 'sst2'; use questions"):
        study.main("sst2")


def test_every_method_has_four_strengths_in_a_row_or_none():
    for method, (strengths, _) in study.METHODS.items():
        assert len(strengths) in (1, 4) and list(strengths) == sorted(strengths), method


def test_facts_about_weights_look_at_the_bodys_matrices():
    model = net()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        model[0].weight.zero_()
        model[6].weight.zero_()  # the head does not count
    found = study._weight_facts(model, start)
    assert found["zeros"] == 32 / (32 + 64)
    body = [v for n, v in start.items() if not n.startswith("6")]
    norm = math.sqrt(sum(float(v.square().sum()) for v in body))
    assert found["moved"] == pytest.approx(float(start["0.weight"].norm()) / norm, rel=1e-5)


def test_the_task_trains_the_upper_layers_alone_on_balanced_draws():
    task = study.questions_task()
    few = task.train(1)
    assert few["labels"].bincount().tolist() == [study.PER_CLASS] * len(study.texts("train").classes)
    assert "input_ids" not in few and few["hidden"].shape[:2] == few["attention_mask"].shape
    model = task.start(0).eval()
    assert len(model.layers) == 2 and all(m.p == 0 for m in model.modules() if isinstance(m, nn.Dropout))
    hidden, mask = task.test["hidden"][:6], task.test["attention_mask"][:6]
    shorter = int(mask.sum(1).max())
    assert torch.allclose(model(hidden, mask), model(hidden[:, :shorter], mask[:, :shorter]), atol=1e-6)
    rest = {tuple(s.split()) for s in study.texts("rest").texts}
    assert rest and len(study.texts("valid")) == study.SIZES["valid"]
    for method in study.METHODS:
        found = study._tuned(1, method, study.METHODS[method][0][0], 1e-3)
        assert torch.isfinite(found["test"]).all(), method
