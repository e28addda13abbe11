"""Chapter 15's library: every regularizer against its definition or the reference library, and gone without a trace."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import ElasticNet, Lasso, Ridge
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torchvision.ops import stochastic_depth
from transformers import BertConfig, BertModel, BertTokenizerFast

from ftbook import peft
from ftbook import regularize as rg
from ftbook.data import ImageSet, TextSet
from ftbook.train import EarlyStopping, Settings, fit


def net(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 8), nn.ReLU(),
                         nn.Linear(8, 3))


def examples(n=60, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=g)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


QUIET = Settings(weight_decay=0.0, progress=False)
HOW = {"epochs": 3, "lr": 0.05, "batch_size": 20, "settings": QUIET}


def trained(model, **options):
    fit(model, examples(), **{**HOW, **options})
    return [p.detach() for p in model.parameters()]


def same(a, b, tolerance=0.0):
    return all(torch.allclose(p, q, rtol=0, atol=tolerance) for p, q in zip(a, b, strict=True))


# dropout


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("theirs", "shared"), [
    (lambda x, p: F.dropout(x, p, True), ()),
    (lambda x, p: F.dropout2d(x, p, True), (2, 3)),
    (lambda x, p: stochastic_depth(x, p, "row"), (1, 2, 3)),
    (lambda x, p: stochastic_depth(x, p, "batch"), (-1, -2, -3, -4)),
])
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
    for call in (lambda: rg.drop(torch.ones(2), p), lambda: rg.set_dropout(net(), p), lambda: rg.mixout(net(), p=p),
                 lambda: rg.drop_outputs(net(), "0", p=p)):
        with pytest.raises(ValueError, match="probability"):
            call()


def test_dropout_layer_is_the_identity_in_evaluation_mode():
    layer, x = rg.Dropout(0.5, shared=(1,)), torch.ones(50, 4)
    assert torch.equal(layer.eval()(x), x) and "p=0.5" in repr(layer)
    rows = layer.train()(x)
    assert all(len(set(r.tolist())) == 1 for r in rows) and set(rows.flatten().tolist()) == {0.0, 2.0}


def test_set_dropout_changes_all_rates_and_puts_them_back():
    model = nn.Sequential(nn.Dropout(0.1), rg.Dropout(0.2), nn.Dropout2d(0.3))
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


@pytest.mark.parametrize("attach", [lambda m: rg.mixout(m, p=0.5), lambda m: rg.drop_connect(m, p=0.3),
                                    lambda m: rg.drop_outputs(m, "4", p=0.3)])
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
    rg.elastic_net([w], l1=0.5, l2=3.0).backward()
    assert torch.equal(w.grad, torch.tensor([3.5, -6.5, 0.0]))
    with pytest.raises(ValueError, match="no parameters"):
        rg.elastic_net([])


def test_a_penalty_enters_training_only():
    model = net()
    plain = nn.functional.cross_entropy(model(examples()[0]), examples()[1])
    loss = rg.Penalized("cross_entropy", rg.penalty(model, l2=1.0))
    added = 0.5 * sum(model[k].weight.square().sum() for k in (0, 4, 6))
    assert torch.allclose(loss(model(examples()[0]), examples()[1]), plain + added)
    with torch.no_grad():
        assert torch.equal(loss(model(examples()[0]), examples()[1]), plain)
    assert len(rg.penalty(model, "0").args[0]) == 1


def test_an_l2_penalty_is_torchs_weight_decay_for_sgd():
    models = [net().double() for _ in range(2)]
    names = ["0.weight", "4.weight", "6.weight"]

    def sgd(decay):
        def make(parameters, model):
            named = dict(model.named_parameters())
            groups = [{"params": [named[n] for n in names], "weight_decay": decay},
                      {"params": [p for n, p in named.items() if n not in names], "weight_decay": 0.0}]
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


@pytest.mark.parametrize(("theirs", "l1", "l2"), [
    (Lasso(alpha=0.1, tol=1e-12, max_iter=100_000), 0.1, 0.0),
    (ElasticNet(alpha=0.2, l1_ratio=0.5, tol=1e-12, max_iter=100_000), 0.1, 0.1),
    (Ridge(alpha=80 * 0.3, tol=1e-12), 0.0, 0.3),
])
def test_proximal_steps_find_scikit_learns_solution_zero_for_zero(theirs, l1, l2):
    x, y = problem()
    w, b = rg.linear_elastic_net(x, y, l1, l2, steps=4000)
    theirs.fit(x.numpy(), y.numpy())
    assert torch.allclose(w, torch.from_numpy(theirs.coef_), atol=1e-9) and abs(float(b) - theirs.intercept_) < 1e-9
    assert torch.equal(w == 0, torch.from_numpy(theirs.coef_ == 0))


def test_subgradient_steps_come_close_but_never_to_zero():
    x, y = problem()
    exact, _ = rg.linear_elastic_net(x, y, l1=0.1)
    rough, _ = rg.linear_elastic_net(x, y, l1=0.1, steps=4000, proximal=False)
    assert int((exact == 0).sum()) >= 6 and int((rough == 0).sum()) == 0 and (exact - rough).abs().max() < 0.05


@settings(deadline=None, max_examples=30)
@given(st.floats(-5, 5), st.floats(0, 3), st.floats(0, 3))
def test_shrink_minimizes_what_it_should(v, l1, l2):
    v = torch.tensor(v, dtype=torch.float64)
    grid = torch.linspace(-6, 6, 24_001, dtype=torch.float64)
    best = grid[((grid - v) ** 2 / 2 + l1 * grid.abs() + l2 / 2 * grid**2).argmin()]
    assert abs(rg.shrink(v, l1, l2) - best) < 1e-3


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
    ours = rg.clip_gradients(models[0].parameters(), limit)
    theirs = nn.utils.clip_grad_norm_(models[1].parameters(), limit)
    assert torch.equal(ours, theirs)
    assert same([p.grad for p in models[0].parameters()], [p.grad for p in models[1].parameters()])


def test_clipping_nothing_and_refusals():
    assert rg.clip_gradients([nn.Parameter(torch.ones(1))], 1.0) == 0
    with pytest.raises(ValueError, match="positive"):
        rg.clip_gradients([], 0.0)
    with pytest.raises(ValueError, match="variance"):
        rg.GradientNoise(-1.0)


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
    noise.load_state_dict({"count": 7})
    assert noise.state_dict() == {"count": 7} and noise.deviation(3) == pytest.approx(0.1)


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


def test_averaging_starts_and_strides_as_asked_and_resumes():
    model, average = net(), rg.WeightAverage(start=0.5, every=2)
    kept = []

    class Keep:
        def on_step_end(self, state):
            kept.append([p.detach().clone() for p in state.model.parameters()])

    trained(model, callbacks=[Keep(), average])  # 9 steps: averaging begins after the fourth
    mean = [torch.stack(ps).mean(0) for ps in zip(*(kept[i] for i in (4, 6, 8)), strict=True)]
    assert average.count == 3 and same(model.parameters(), mean, 1e-6)
    again = rg.WeightAverage()
    again.load_state_dict(average.state_dict())
    assert again.count == 3
    for bad in ({"decay": 1.0}, {"start": 1.0}, {"every": 0}):
        with pytest.raises(ValueError):
            rg.WeightAverage(**bad)


def test_batchnorm_statistics_equal_torchs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.0), nn.Linear(6, 3))
    other = copy.deepcopy(model)
    x, y = examples()
    batches = [(x[i:i + 20], y[i:i + 20]) for i in range(0, 60, 20)]
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
    return rg.digits_task({"old": part, "new": part, "valid": part, "test": part}, labels=5, epochs=2)


def test_every_method_runs_and_leaves_a_plain_model():
    plain = task()
    keys = list(plain.start(0).state_dict())
    for method, (strengths, _) in rg.METHODS.items():
        model, start = rg.tune_regularized(plain, method, strengths[-1], seed=1, epochs=2, batch_size=5, lr=1e-2)
        assert list(model.state_dict()) == keys == list(start) and not model.dropout.p, method
        assert not any(m._forward_hooks for m in model.modules()), method
    with pytest.raises(ValueError, match="method is 'hope'"):
        rg.tune_regularized(plain, "hope")


def test_the_comparison_chooses_on_validation_and_reports_test():
    found = rg.compare_methods(task(), chapter="12_trial", methods=["none", "dropout"], seeds=(1, 2), epochs=1)
    assert found["test_accuracy"]["dropout"]["strength"] in (0.1, 0.3) and found["test_accuracy"]["none"]["n"] == 40
    gap, train = found["test_gap"]["none"], found["train_accuracy"]["none"]
    assert gap["mean"] == pytest.approx(train["mean"] - found["test_accuracy"]["none"]["mean"])
    assert 0 <= found["test_ece"]["none"]["mean"] <= 1 and found["moved"]["none"]["mean"] > 0


def test_the_sentiment_task_is_balanced_and_pads_little(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    texts = TextSet(["good film", "bad"] * 20, torch.tensor([1, 0] * 20), ["negative", "positive"])
    torch.manual_seed(0)
    encoder = BertModel(BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
                                   intermediate_size=8, max_position_embeddings=16), add_pooling_layer=False)
    made = rg.sentiment_task(encoder, tokenizer, texts, texts, texts, labels=8, scored=(10, 12))
    assert len(made.valid["labels"]) == 10 and made.test["labels"].sum() == 6
    assert made.train(1)["attention_mask"].sum(1).diff().min() >= 0
    model = made.start(0).eval()
    ids, mask = made.test["input_ids"][:6], made.test["attention_mask"][:6]
    assert torch.allclose(model(ids, mask), model(ids[:, :3], mask[:, :3]), atol=1e-6)
    assert all(m.p == 0 for m in model.modules() if isinstance(m, nn.Dropout))
    for method in ("stochastic depth", "feature dropout", "mixout", "L2-SP"):
        found = rg.regularized_run(made, method, 0.3, seed=1, test=True, epochs=1, batch_size=4)
        assert 0 <= found["test_accuracy"] <= 1
