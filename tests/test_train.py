import contextlib
import copy
import ctypes
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import train_script
from hypothesis import given
from hypothesis import settings as example_budget
from hypothesis import strategies as st
from torch import nn

from ftbook import batches, checkpoint, compute, losses, scoring
from ftbook import train as T
from ftbook.data import Batches, ImageSet
from ftbook.optim import OPTIMIZERS
from ftbook.studies import train as study
from ftbook.train import Checkpoint, EarlyStopping, History, Run, Settings, evaluate, fit, predict


def toy(n=100, seed=0, classes=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator)
    return x, (x @ torch.randn(6, classes, generator=generator)).argmax(1)


def net(seed=0, dropout=0.0, classes=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, classes))


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def quiet(model, data, *args, **options):
    """fit on the CPU without a bar; the fields of Settings may be given flat."""
    names = {f.name for f in dataclasses.fields(Settings)} & set(options)
    chosen = {"progress": False, "device": "cpu", **{name: options.pop(name) for name in names}}
    return fit(model, data, *args, settings=Settings(**chosen), **options)


class Stop(Exception):
    pass


class Bomb:
    def __init__(self, step):
        self.step = step

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass

    def on_step_end(self, state):
        if state.step == self.step:
            raise Stop


# ---------------------------------------------------------------- the loop itself


def test_equals_a_bare_loop_bit_for_bit():
    data, ours, bare = toy(), net(), net()
    quiet(ours, data, toy(40, 1), epochs=2, batch_size=32, metrics="accuracy", seed=5)
    optimizer = torch.optim.AdamW(T._decay_groups(bare, 0.01), lr=1e-3, fused=True)
    batches = Batches(*data, batch_size=32, shuffle=True, seed=5)
    for _ in range(2):
        for x, y in batches:
            F.cross_entropy(bare(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same(ours, bare)


def test_learns_and_records():
    data, model = toy(300), net()
    history = quiet(model, data, toy(100, 1), epochs=10, lr=0.02, batch_size=32, metrics="accuracy")
    assert history["epoch"] == list(range(1, 11)) and history["steps"][-1] == 100
    assert history["train_loss"][-1] < 0.5 * history["train_loss"][0]
    assert history["train_accuracy"][-1] > 0.8
    assert history["lr"] == [0.02] * 10 and all(s > 0 for s in history["seconds"])
    assert evaluate(model, toy(100, 1))["accuracy"] == pytest.approx(history["valid_accuracy"][-1])
    assert history.settings["precision"] == "fp32" and "small" in history.settings["precision_reason"]
    assert history.settings["steps"] == 100 and "10 epochs" in repr(history) and len(history) == 10
    with pytest.raises(KeyError, match="valid_f1.*not measured.*train_loss"):
        history["valid_f1"]


def test_train_metrics_are_means_over_examples():
    data, model = toy(100), net()
    metrics = {"right": scoring.accuracy, "one": lambda output, target: 1.0}
    history = quiet(model, data, lr=0.0, weight_decay=0.0, batch_size=32, metrics=metrics)
    score = evaluate(model, data)
    assert history["train_loss"][0] == pytest.approx(score["loss"], rel=1e-5)
    assert history["train_right"][0] == pytest.approx(score["accuracy"]) and history["train_one"] == [1.0]


def test_same_seed_same_weights_and_the_callers_streams_stay():
    torch.manual_seed(9)
    np.random.seed(9)
    random.seed(9)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(9)
    np.random.seed(9)
    random.seed(9)
    a, b, c = net(), net(), net()
    torch.manual_seed(9)
    quiet(a, toy(), epochs=2, seed=1)
    assert (torch.rand(1), np.random.rand(), random.random()) == expected
    quiet(b, toy(), epochs=2, seed=1)
    quiet(c, toy(), epochs=2, seed=2)
    assert same(a, b) and not same(a, c)


def test_validation_does_not_change_training():
    a, b = net(dropout=0.3), net(dropout=0.3)
    quiet(a, toy(), epochs=3, batch_size=16)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*toy(50, 1)), batch_size=8, shuffle=True)
    quiet(b, toy(), loader, epochs=3, batch_size=16, metrics="accuracy")
    assert same(a, b)


@example_budget(max_examples=12, deadline=None)
@given(n=st.integers(5, 70), batch=st.integers(1, 20), accumulate=st.integers(1, 5))
def test_accumulation_equals_the_big_batch(n, batch, accumulate):
    a, b = net().double(), net().double()
    x, y = toy(n)
    quiet(a, (x.double(), y), batch_size=batch, accumulate=accumulate, optimizer="sgd", lr=0.1)
    quiet(b, (x.double(), y), batch_size=batch * accumulate, optimizer="sgd", lr=0.1)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


def test_accumulation_weighs_tokens_not_batches():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 5, 6, generator=generator), torch.randint(0, 3, (8, 5), generator=generator)
    y[:3, 1:] = -100
    a, b = net(), net()
    h = quiet(a, (x, y), batch_size=2, accumulate=4, optimizer="sgd", lr=0.1, metrics="accuracy")
    g = quiet(b, (x, y), batch_size=8, optimizer="sgd", lr=0.1, metrics="accuracy")
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert h["train_loss"][0] == pytest.approx(g["train_loss"][0], rel=1e-5)
    assert h["train_accuracy"][0] == pytest.approx(g["train_accuracy"][0])
    assert evaluate(a, (x, y))["n"] == int((y != -100).sum())


def test_a_batch_without_targets_is_skipped():
    x, y = torch.randn(4, 5, 6), torch.full((4, 5), -100)
    y[2:] = 1
    a = net()
    history = quiet(a, Batches(x, y, batch_size=2))
    assert math.isfinite(history["train_loss"][0])
    with pytest.raises(ValueError, match="train has nothing to score: every target is -100"):
        quiet(a, Batches(x[:2], y[:2]))
    with pytest.raises(ValueError, match="only targets of -100"):
        quiet(a, [(x[:2], y[:2])])
    with pytest.raises(ValueError, match="nothing to score"):
        evaluate(a, (x[:2], y[:2]))


def test_clipping_bounds_the_gradient():
    norms = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            norms.append(torch.stack([p.grad.norm() for g in self.param_groups for p in g["params"]]).norm().item())
            return super().step(closure)

    x, y = toy()
    quiet(net(), (x * 100, y), optimizer=lambda p: Spy(p, lr=0.01), clip_norm=0.5, batch_size=25)
    assert len(norms) == 4 and max(norms) <= 0.5 + 1e-5


# ---------------------------------------------------------------- what counts


def labeled(n, ignored, classes=3, seed=0):
    """Examples in float64, the class numbers of some of them -100."""
    x, y = toy(n, seed, classes)
    y[torch.rand(n, generator=torch.Generator().manual_seed(seed + 1)) < ignored] = -100
    return x.double(), y


class WeightedModel(nn.Module):
    """Computes its own loss with class weights, and says so."""

    def __init__(self, weight):
        super().__init__()
        self.body, self.weight = net().double(), weight

    def forward(self, x, labels):
        logits = self.body(x)
        return {"logits": logits, "loss": F.cross_entropy(logits, labels, self.weight)}

    def weight_of(self, target):
        return self.weight[target[target != -100]].sum()


WEIGHT = torch.tensor([0.2, 3.0, 5.0], dtype=torch.float64)
LOSS_FORMS = {
    "by name": "cross_entropy",
    "focal": "focal",
    "class weights": nn.CrossEntropyLoss(weight=WEIGHT),
    "smoothed class weights": nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1),
    "keywords": functools.partial(F.cross_entropy, weight=WEIGHT),
    "chapter 2": functools.partial(losses.cross_entropy, weight=WEIGHT),
    "another mark": nn.CrossEntropyLoss(ignore_index=-100, weight=None),
    "its own": None,
}


@example_budget(max_examples=60, deadline=None)
@given(
    n=st.integers(4, 40),
    batch=st.integers(1, 9),
    accumulate=st.integers(1, 4),
    ignored=st.sampled_from([0.0, 0.3, 0.8]),
    form=st.sampled_from(list(LOSS_FORMS)),
)
def test_micro_batches_equal_the_joint_batch_whatever_counts_how_much(n, batch, accumulate, ignored, form):
    x, y = labeled(n, ignored)
    y[0], y[-1] = 1, 2
    loss = LOSS_FORMS[form]
    data = {"x": x, "labels": y} if loss is None else (x, y)
    a, b = (WeightedModel(WEIGHT) if loss is None else net().double() for _ in range(2))
    g = quiet(a, data, batch_size=batch, accumulate=accumulate, optimizer="sgd", lr=0.1, loss=loss)
    h = quiet(b, data, batch_size=batch * accumulate, optimizer="sgd", lr=0.1, loss=loss)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)
    assert g["train_loss"][0] == pytest.approx(h["train_loss"][0], rel=1e-9)
    found = [evaluate(b, data, loss=loss, metrics="accuracy", batch_size=size) for size in (batch, n)]
    assert found[0] == pytest.approx(found[1], rel=1e-9) and found[0]["n"] == int((y != -100).sum())


def test_ignored_targets_of_one_dimension_do_not_count():
    assert scoring.accuracy(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, -100])) == 1.0
    x, y = labeled(24, 0.0)
    y[4:16] = -100
    whole = F.cross_entropy(net().double()(x), y).item()
    for size in (1, 4, 8, 24):
        score = evaluate(net().double(), (x, y), batch_size=size)
        assert score["n"] == 12 and score["loss"] == pytest.approx(whole)
    a, b = net().double(), net().double()
    history = quiet(a, (x, y), batch_size=4, metrics="accuracy", lr=0.0, weight_decay=0.0)
    quiet(b, [(x[i : i + 4], y[i : i + 4]) for i in range(0, 24, 4)])
    batches = [(x[i : i + 3], y[i : i + 3]) for i in range(0, 24, 3)]
    listed = quiet(net().double(), batches, metrics="accuracy", lr=0.0, weight_decay=0.0)
    for name in ("train_loss", "train_accuracy"):
        assert listed[name][0] == pytest.approx(history[name][0])
    assert history["train_loss"][0] == pytest.approx(whole)
    assert history["train_accuracy"][0] == pytest.approx(evaluate(net().double(), (x, y))["accuracy"])
    assert torch.isfinite(b[0].weight).all() and not same(b, net().double())


def test_a_class_weight_of_zero_skips_the_batch_that_has_nothing_else():
    x, y = toy(12)
    y[:4] = 0
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.0, 1.0, 1.0]))
    batches = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 12, 4)]
    assert math.isfinite(quiet(net(), batches, loss=loss)["train_loss"][0])
    assert evaluate(net(), batches, loss=loss)["loss"] == pytest.approx(loss(net()(x), y).item(), rel=1e-5)


def test_a_causal_model_of_transformers_counts_the_shifted_labels():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=20,
        n_positions=8,
        n_embd=8,
        n_layer=1,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    ids = torch.randint(0, 20, (8, 6), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:3, 2:] = -100
    data, models = {"input_ids": ids, "labels": labels}, []
    for size in (2, 8):
        torch.manual_seed(0)
        models.append(transformers.GPT2LMHeadModel(config))
        quiet(models[-1], data, loss=None, batch_size=size, accumulate=8 // size, optimizer="sgd", lr=0.5)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_losses_that_are_no_mean_are_refused():
    for loss in (nn.CrossEntropyLoss(reduction="sum"), functools.partial(F.cross_entropy, reduction="none")):
        with pytest.raises(ValueError, match="must be 'mean'"):
            quiet(net(), toy(), loss=loss)

    class OwnMean(nn.CrossEntropyLoss):
        def forward(self, output, target):
            return super().forward(output, target).mean()

    assert quiet(net(), toy(), loss=OwnMean(reduction="none")).rows


def test_soft_targets_are_right_where_the_largest_class_is():
    output = torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    assert scoring.accuracy(output, torch.tensor([[0.6, 0.4, 0.0], [0.5, 0.2, 0.3]])) == 0.5
    assert scoring.accuracy(output, torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])) == pytest.approx(5 / 6)
    x = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0))
    y = torch.arange(4000) % 10

    def mix(x, y):
        return 0.7 * x + 0.3 * x.flip(0), 0.7 * F.one_hot(y, 10).float() + 0.3 * F.one_hot(y.flip(0), 10).float()

    mix.takes_target = True
    history = quiet(net(classes=10), (x, y), lr=0.0, metrics="accuracy", transform=mix)
    assert history["train_accuracy"][0] == pytest.approx(0.1, abs=0.03)
    one_hot = F.one_hot(torch.arange(6) % 3, 3).float()
    decisions = evaluate(net(), (toy(6)[0], one_hot), loss="bce", metrics="accuracy")["accuracy"]
    assert decisions == pytest.approx(((net()(toy(6)[0]) > 0) == (one_hot > 0.5)).float().mean().item())


@pytest.mark.parametrize(
    "shape, dim",
    [
        ((2, 4), 1),
        ((2, 5, 4), 2),
        ((2, 4, 4), 2),
        ((2, 4, 5), 1),
        ((2, 4, 3, 5), 1),
        ((2, 4, 4, 4), 1),
        ((2, 3, 5, 4), 3),
    ],
)
def test_loss_and_accuracy_read_the_classes_from_the_same_dimension(shape, dim):
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(shape, generator=generator, dtype=torch.float64)
    wanted = {(2, 4, 5): (2, 5), (2, 3, 5, 4): (2, 3, 5)}.get(shape, shape[:dim] + shape[dim + 1 :])
    target = torch.randint(0, 4, wanted, generator=generator)
    target.view(-1)[0] = -100
    assert scoring.class_dim(output, target) == dim
    moved = output.movedim(dim, 1)
    assert scoring._LOSSES["cross_entropy"](output, target) == pytest.approx(F.cross_entropy(moved, target).item())
    for name in ("focal", "label_smoothing"):
        theirs = getattr(losses, name)(moved, target)
        assert scoring._LOSSES[name](output, target).item() == pytest.approx(theirs.item())
    hit = (output.argmax(dim) == target).sum().item()
    assert scoring.accuracy(output, target) == pytest.approx(hit / (target.numel() - 1))
    soft = torch.softmax(torch.randn(shape, generator=generator, dtype=torch.float64), dim)
    theirs = F.cross_entropy(moved, soft.movedim(dim, 1))
    if dim == (len(shape) - 1 if len(shape) < 4 else 1):
        assert scoring._LOSSES["cross_entropy"](output, soft).item() == pytest.approx(theirs.item())


def test_results_do_not_lose_a_metric_by_its_name():
    for name in ("loss", "n"):
        for call in (lambda m: quiet(net(), toy(), metrics=m), lambda m: evaluate(net(), toy(), metrics=m)):
            with pytest.raises(ValueError, match=f"cannot be named '{name}'"):
                call({name: scoring.accuracy})


# ---------------------------------------------------------------- optimizers and schedules


def test_fit_takes_every_form_of_optimizer():
    data = toy()
    for optimizer in ("adamw", "sgd", *OPTIMIZERS, torch.optim.RMSprop, lambda p: torch.optim.SGD(p, lr=0.1)):
        model = net()
        assert quiet(model, data, optimizer=optimizer, epochs=2, lr=0.01)["train_loss"][1] > 0
        assert not same(model, net())
    model = net()
    own = torch.optim.Adagrad(model.parameters(), lr=0.1)
    assert quiet(model, data, optimizer=own).settings["optimizer"] == "Adagrad" and own.state
    model = net()
    before = model[0].weight.clone()
    groups = [{"params": model[3].parameters(), "lr": 0.5}]
    history = quiet(model, data, params=groups, schedule=lambda step, total: 0.5)
    assert torch.equal(before, model[0].weight) and history["lr"] == [0.25]
    fused = {n for n in OPTIMIZERS if T.build_optimizer(n, net(), 0.1).defaults.get("fused")}
    assert fused == {"gradient descent", "momentum", "Nesterov", "Adam", "AdamW"}
    built = T.build_optimizer("adamw", net(), 0.1, 0.3)
    assert [(g["weight_decay"], len(g["params"])) for g in built.param_groups] == [(0.3, 2), (0.0, 2)]
    assert T.build_optimizer(torch.optim.SGD, net(), 0.1, 0.3).param_groups[0]["weight_decay"] == 0.3
    with pytest.raises(ValueError, match="unknown optimizer 'lamb'.*AdamW"):
        quiet(net(), data, optimizer="lamb")
    with pytest.raises(ValueError, match="unfreeze"):
        quiet(net().requires_grad_(False), data)


@pytest.mark.parametrize("value", [None, "high", {"a": 1}, [0.5, 0.5]])
def test_a_metric_that_gives_no_number_is_named(value):
    with pytest.raises(TypeError, match="metric 'mine' gave .*one number for a batch"):
        quiet(net(), toy(), metrics={"mine": lambda output, target: value})
    with pytest.raises(TypeError, match="metric 'mine' gave"):
        evaluate(net(), toy(), metrics={"mine": lambda output, target: value})


def test_an_optimizer_of_another_model_is_refused():
    other = net()
    for how in (
        {"optimizer": torch.optim.SGD(other.parameters(), lr=0.1)},
        {"params": list(other.parameters())},
        {"optimizer": lambda params: torch.optim.SGD(other.parameters(), lr=0.1)},
    ):
        with pytest.raises(ValueError, match="no trainable parameter of this model"):
            quiet(net(), toy(), **how)


def test_messages_about_a_run_that_does_not_learn_name_the_appendix():
    x, y = toy()
    frozen, nothing = net().requires_grad_(False), torch.full_like(y, -100)
    other = torch.optim.SGD(net().parameters(), lr=0.1)
    for kind, call in (
        (ValueError, lambda: quiet(frozen, (x, y))),
        (ValueError, lambda: quiet(net(), (x, y), optimizer=other)),
        (FloatingPointError, lambda: quiet(net(), (x * math.nan, y))),
        (ValueError, lambda: quiet(net(classes=2), (x, y))),
        (ValueError, lambda: quiet(net(), (x, nothing))),
        (ValueError, lambda: quiet(net(), [(x, nothing)])),
        (ValueError, lambda: quiet(net(), (x, y), [(x, nothing)])),
    ):
        with pytest.raises(kind) as caught:
            call()
        assert str(caught.value).endswith("See the appendix 'It does not learn'")


def test_settings_check_themselves_and_serve_again():
    bad = {
        "schedule": "step",
        "warmup": 1.5,
        "weight_decay": -1,
        "clip_norm": 0,
        "accumulate": 0,
        "precision": "fp64",
        "channels_last": "yes",
        "max_steps": 2.5,
        "progress": 1,
    }
    for name, value in bad.items():
        with pytest.raises(ValueError, match=name):
            Settings(**{name: value})
    with pytest.raises(TypeError, match="transform"):
        Settings(transform="crop")
    with pytest.raises(TypeError, match="settings must be Settings"):
        fit(net(), toy(), settings={"progress": False})
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().progress = False
    a, b = net(), net()
    how = Settings(
        params=({"params": layer.parameters(), "lr": 0.1} for layer in (a[0], a[3])),
        schedule="linear",
        device="cpu",
        progress=False,
    )
    first = fit(a, toy(), epochs=2, settings=how)
    assert first["lr"] == fit(a, toy(), epochs=2, settings=how)["lr"] and set(how.params[0]) == {"params", "lr"}
    assert not same(a, b)


def test_the_rate_follows_its_schedule():
    data, seen = toy(), []

    class Spy:
        def on_step_end(self, state):
            seen.append(state.optimizer.param_groups[0]["lr"])

    quiet(net(), data, schedule="linear", warmup=0.25, epochs=2, batch_size=25, lr=1.0, callbacks=[Spy()])
    assert seen == pytest.approx([0.5, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert T._resolve_schedule("constant") is None and T._resolve_schedule(None) is None
    assert T._resolve_schedule("constant", 0.5)(3, 4) == 1.0 and T._resolve_schedule("cosine")(5, 10) == pytest.approx(
        0.5
    )
    with pytest.raises(ValueError, match="unknown schedule 'step'.*cosine"):
        T._resolve_schedule("step")
    with pytest.raises(ValueError, match="share of all steps"):
        T._resolve_schedule("linear", 10)
    with pytest.raises(ValueError, match="pass max_steps="):
        quiet(net(), (b for b in [data]), schedule="cosine")
    history = quiet(net(), (b for b in [data] * 9), schedule="cosine", max_steps=3)
    assert history["steps"] == [3] and history.settings["steps"] == 3


# ---------------------------------------------------------------- data


def test_fit_takes_every_form_of_data():
    x, y = toy()
    dataset = torch.utils.data.TensorDataset(x, y)
    for data in (
        (x, y),
        Batches(x, y, batch_size=10),
        [(x, y), (x[:7], y[:7])],
        torch.utils.data.DataLoader(dataset, batch_size=30),
    ):
        assert math.isfinite(quiet(net(), data, data, epochs=2)["valid_loss"][1])
    auto = nn.Linear(6, 6)
    history = quiet(auto, x, loss="mse", epochs=3, lr=0.05)
    assert history["train_loss"][-1] < history["train_loss"][0]

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()

        def forward(self, a, b):
            return self.body(a + b)

    assert quiet(Two(), (x, x, y)).rows and predict(Two(), (x, x)).shape == (100, 3)


def images(n=20, side=8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=generator)
    return ImageSet(x, torch.arange(n) % 4, ["a", "b", "c", "d"])


def small_conv(view=False):
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
            self.head = nn.Linear(512, 4)

        def forward(self, x):
            assert x.dtype == torch.float32 and x.max() <= 1.0
            x = self.norm(self.conv(x)).relu()
            return self.head(x.view(len(x), -1) if view else x.flatten(1))

    return Net()


def test_images_are_scaled_and_laid_out():
    pictures = images()
    model = small_conv()
    history = quiet(model, pictures, pictures, metrics="accuracy")
    assert history.settings["channels_last"] is True and history.settings["precision"] == "fp32"
    assert all(p.is_contiguous() for p in model.parameters())
    other = small_conv()
    assert quiet(other, (pictures.x.float() / 255, pictures.y), channels_last=False).settings["channels_last"] is False
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
    assert quiet(small_conv(view=True), pictures).settings["channels_last"] is False
    assert quiet(small_conv(), (b for b in [(pictures.x, pictures.y)])).settings["channels_last"] is False
    assert torch.equal(predict(model, pictures), predict(model, pictures.x))
    with pytest.raises(RuntimeError, match="shape|channels"):
        quiet(nn.Sequential(nn.Conv2d(5, 2, 3), nn.Flatten()), pictures)
    flat = nn.Sequential(nn.Flatten(), nn.Conv1d(1, 1, 1))
    assert compute.wants_channels_last("auto", flat, (torch.ones(2, 3), 0)) is False
    assert compute.wants_channels_last("auto", small_conv(), (torch.ones(2, 3), 0)) is False


def test_optimizer_state_follows_the_layout():
    pictures, a, b = images(), small_conv(), small_conv()
    own = [torch.optim.AdamW(m.parameters(), lr=1e-2, fused=True) for m in (a, b)]
    quiet(a, pictures, optimizer=own[0], channels_last=False, batch_size=5)
    quiet(a, pictures, optimizer=own[0], channels_last=True, batch_size=5)
    for _ in range(2):
        quiet(b, pictures, optimizer=own[1], channels_last=False, batch_size=5)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)


def test_transform_in_training_only():
    calls = []

    def double(x):
        calls.append(len(x))
        return 2 * x

    quiet(net(), toy(), toy(40, 1), transform=double, batch_size=50)
    assert calls == [50, 50]

    def mix(x, y):
        return x, (y + 1) % 3

    mix.takes_target = True
    a, b = net(), net()
    quiet(a, toy(), transform=mix)
    x, y = toy()
    quiet(b, (x, (y + 1) % 3))
    assert same(a, b)
    quiet(nn.Linear(6, 6), x, loss="mse", transform=lambda x: x + 1)
    assert batches.prepare_batch({"x": x}, torch.device("cpu"), transform=lambda b: {"y": b["x"]}).keys() == {"y"}


class Output(dict):
    __getattr__ = dict.get


class DictModel(nn.Module):
    """Like a token classifier of transformers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.seen = nn.Embedding(20, 8), nn.Linear(8, 3), None

    def forward(self, input_ids, labels=None):
        self.seen = labels
        logits = self.head(self.embed(input_ids))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return Output(logits=logits, loss=loss)


def test_batches_that_are_dicts_reach_the_model_by_name():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 20, (30, 4), generator=generator)
    data = {"input_ids": ids, "labels": ids % 3}
    a, b = DictModel(), DictModel()
    quiet(a, data, data, loss=None, epochs=3, lr=0.05, metrics="accuracy", batch_size=10)
    assert a.seen is not None
    history = quiet(b, data, data, epochs=3, lr=0.05, metrics="accuracy", batch_size=10)
    assert b.seen is None and same(a, b) and history["valid_accuracy"][-1] > 0.5
    own, ours = evaluate(a, data, loss=None, metrics="accuracy"), evaluate(b, data)
    assert own["loss"] == pytest.approx(ours["loss"], rel=1e-6) and own["accuracy"] == ours["accuracy"]
    assert predict(a, data).shape == (30, 4, 3) and predict(a, [data]).shape == (30, 4, 3)
    quiet(a, [data], loss=lambda output, target: F.cross_entropy(output.transpose(1, 2), target))
    with pytest.raises(ValueError, match="'labels'"):
        quiet(a, [{"input_ids": ids}], loss=None)
    with pytest.raises(ValueError, match="label 2 is out of range"):
        model = DictModel()
        model.head = nn.Linear(8, 2)
        quiet(model, data)


def test_a_model_of_transformers_trains_on_its_own_loss():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    torch.manual_seed(0)
    model = transformers.BertForTokenClassification(config)
    ids = torch.randint(0, 30, (12, 5))
    data = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids % 3}
    for loss in (None, "cross_entropy"):
        history = quiet(model, data, data, loss=loss, epochs=2, batch_size=4, metrics="accuracy", lr=0.01)
        assert history["train_loss"][1] < history["train_loss"][0]
    assert model.training and predict(model, {k: data[k] for k in ("input_ids", "attention_mask")}).shape == (12, 5, 3)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(zip(*toy(30), strict=True))


def test_a_stream_without_a_length_is_used_as_it_is():
    loader = torch.utils.data.DataLoader(Stream(), batch_size=8)
    history = quiet(net(), loader, loader, epochs=2)
    assert history["steps"] == [4, 8] and history.settings["steps"] is None
    assert evaluate(net(), loader)["n"] == 30 and predict(net(), loader).shape == (30, 3)


def test_batches_keep_their_kinds_of_containers():
    from collections import namedtuple

    pair, cpu = namedtuple("pair", "x y"), torch.device("cpu")
    packed = nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(2, 2)])
    assert batches.to_device(packed, cpu) is packed and isinstance(batches.to_device(pair(*toy()), cpu), pair)
    assert isinstance(batches.to_device([torch.ones(1)], cpu), list)

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.rnn, self.head = nn.GRU(2, 4), nn.Linear(4, 3)

        def forward(self, sequences):
            return self.head(self.rnn(sequences)[1][0])

    assert quiet(Last(), [(packed, torch.tensor([0, 1]))] * 2, epochs=2).rows
    with pytest.raises(TypeError, match="DistributedSampler"):
        batches.shard((packed, torch.tensor([0, 1])), 0, 2)


def test_outputs_may_be_dicts_with_logits():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()

        def forward(self, x):
            return {"logits": self.body(x)}

    a, b = Named(), net()
    assert quiet(a, toy(), toy(), metrics="accuracy").rows and quiet(b, toy()).rows and same(a.body, b)
    assert torch.equal(predict(a, toy()[0]), predict(b, toy()[0]))


def test_what_only_looks_like_data_is_refused_with_the_cure():
    x, y = toy()
    arrays = x.numpy(), y.numpy()
    cases = [
        ([x, y], TypeError, r"pass the tuple \(x, y\)"),
        (arrays, TypeError, r"train\[0\] is a numpy array.*from_numpy"),
        (arrays[0], TypeError, "train is a numpy array"),
        ((x, y.tolist()), TypeError, "tensors only"),
        ({"x": x, "labels": y.tolist()}, TypeError, "tensors only"),
        ([arrays], TypeError, "batch holds a numpy array"),
        ((x, y.float()), TypeError, r"cross-entropy takes class numbers: pass y.long\(\)"),
        ([(x, y.double())], TypeError, "class numbers"),
        ((x, y[:, None]), ValueError, r"targets of shape \(100, 1\) do not fit outputs of shape \(100, 3\)"),
        ((x, torch.full_like(y, -100)), ValueError, "train has nothing to score"),
    ]
    for data, kind, message in cases:
        model = net()
        with pytest.raises(kind, match=message):
            quiet(model, data)
        assert same(model, net())
    with pytest.raises(TypeError, match="class numbers"):
        evaluate(net(), (x, y.float()))
    for kind in (torch.int32, torch.uint8, torch.int16):
        a, b = net(), net()
        quiet(a, (x, y.to(kind)))
        quiet(b, (x, y))
        assert same(a, b)
    with pytest.raises(ValueError, match="nothing to predict"):
        predict(net(), iter([]))


def test_a_last_batch_of_one_example_is_refused_before_the_first_step():
    def normalized():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

    x, y = toy(33)
    dataset = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader
    for data in ((x, y), Batches(x, y, batch_size=16), loader(dataset, batch_size=16, shuffle=True)):
        model = normalized()
        with pytest.raises(ValueError, match="one example.*another batch_size"):
            quiet(model, data, batch_size=16)
        assert same(model, normalized())
    for data in ((x[:32], y[:32]), loader(dataset, batch_size=16, drop_last=True)):
        assert quiet(normalized(), data, batch_size=16).rows
    assert quiet(net(), (x, y), batch_size=16).rows
    pictures = images(5)
    assert quiet(small_conv(), pictures, batch_size=4).rows, "64 values a channel have a variance"

    class Hold:
        def on_epoch_begin(self, run):
            run.model[1].eval()

    assert quiet(normalized(), (x, y), batch_size=16, callbacks=[Hold()]).rows


# ---------------------------------------------------------------- evaluation


def test_evaluate_leaves_no_trace():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4).eval(), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3))
    F.cross_entropy(model(toy()[0]), toy()[1]).backward()
    modes, state = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    grads = [p.grad.clone() for p in model.parameters()]
    streams = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

    def noisy():
        for _ in range(2):
            torch.rand(1), np.random.rand(), random.random()
            yield toy()

    score = evaluate(model, noisy())
    assert score["n"] == 200
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, model.parameters(), strict=True))
    assert torch.equal(streams[0], torch.get_rng_state()) and (streams[1] == np.random.get_state()[1]).all()
    assert streams[2] == random.getstate()
    with pytest.raises(ZeroDivisionError):
        evaluate(model, toy(), metrics={"bad": lambda o, t: 1 / 0})
    assert [m.training for m in model.modules()] == modes


def test_evaluation_equals_the_loss_of_the_whole():
    model, (x, y) = net(), toy(77)
    score = evaluate(model, (x, y), batch_size=10, device="cpu")
    assert score["loss"] == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-5)
    assert score["accuracy"] == pytest.approx((model(x).argmax(1) == y).float().mean().item())
    assert evaluate(nn.Linear(6, 6), (x, x), loss="mse").keys() == {"loss", "n"}
    assert evaluate(model, (x, y), loss=lambda o, t: o.sum() * 0, metrics=["accuracy"])["accuracy"] == score["accuracy"]
    torch.testing.assert_close(predict(model, x, batch_size=9), model.eval()(x), rtol=1e-5, atol=1e-6)
    assert compute.device_of(nn.Flatten(), None).type == "cpu"


def test_accuracy_is_defined_for_every_form_of_output():
    logits = torch.tensor([2.0, -1.0, 3.0])
    assert scoring.accuracy(logits, torch.tensor([1.0, 1.0, 1.0])) == pytest.approx(2 / 3)
    assert scoring.accuracy(torch.eye(3)[None], torch.tensor([[0, 2, -100]])) == 0.5
    assert scoring.accuracy(torch.eye(3)[None], torch.full((1, 3), -100)) == 0.0


# ---------------------------------------------------------------- early stopping and callbacks


class Fake:
    """Writes given values into the row."""

    def __init__(self, values):
        self.values = list(values)

    def on_epoch_end(self, state):
        state.row["score"] = self.values[state.epoch - 1]


@pytest.mark.parametrize("mode, values, best", [("max", [1, 3, 2, 2, 9], 2), ("min", [5, 3, 4, 4, 1], 2)])
def test_early_stopping_restores_the_best(mode, values, best):
    stopped, reference = net(), net()
    stopper = EarlyStopping("score", patience=2, mode=mode)
    history = quiet(stopped, toy(), epochs=5, callbacks=[stopper, Fake(values)])
    assert len(history) == 4 and history.best["epoch"] == best and history["score"] == values[:4]
    quiet(reference, toy(), epochs=best)
    assert same(stopped, reference)


def test_early_stopping_does_what_its_options_say():
    a, b = net(), net()
    stop = EarlyStopping("score", patience=1, restore=False)
    quiet(a, toy(), epochs=4, callbacks=[Fake([3, 2, 1, 0]), stop])
    quiet(b, toy(), epochs=2)
    assert same(a, b)
    stop = EarlyStopping("score", patience=1, min_delta=0.5)
    history = quiet(net(), toy(), epochs=4, callbacks=[Fake([1, 1.4, 3, 4]), stop])
    assert len(history) == 2 and stop.best == 1
    assert len(quiet(net(), toy(), epochs=4, callbacks=[Fake([1, 1.4, 3, 4]), stop])) == 2, "an object serves again"
    assert EarlyStopping("perplexity").mode == "min" and EarlyStopping("valid_f1").mode == "max"
    assert EarlyStopping("valid_mse").mode == "min" and EarlyStopping().monitor == "valid_loss"
    assert quiet(net(), toy(), toy(30, 1), epochs=2, callbacks=[EarlyStopping(patience=1)]).best is not None
    keep = EarlyStopping("train_accuracy", patience=None)
    assert quiet(net(), toy(), epochs=2, callbacks=[keep], metrics="accuracy").best["train_accuracy"] > 0
    frozen = net()
    frozen[0].requires_grad_(False)
    assert set(T._trained_weights(frozen)) == {"3.weight", "3.bias"}
    for bad in ({"mode": "up"}, {"patience": 0}, {"min_delta": -1}):
        with pytest.raises(ValueError, match="mode|patience|min_delta"):
            EarlyStopping(**bad)
    with pytest.raises(ValueError, match="'other' was not measured in epoch 1, which has .*'lr'.*run.row"):
        quiet(net(), toy(), epochs=3, callbacks=[EarlyStopping("other"), Fake([1])])


def test_early_stopping_takes_a_value_that_another_callback_measures():
    scores, weights = iter((0.2, 0.9, 0.5, 0.4)), []

    class Scores:
        def on_epoch_end(self, run):
            run.row["valid_f1"] = next(scores)
            weights.append(run.model[0].weight.detach().clone())

    class OneStep:
        def on_step_end(self, run):
            run.stop = True

    model, stopper = net(), EarlyStopping("valid_f1", patience=2)
    history = quiet(model, toy(), epochs=9, callbacks=[stopper, Scores()])  # whatever the order
    assert history["valid_f1"] == [0.2, 0.9, 0.5, 0.4] and history.best["epoch"] == 2
    assert torch.equal(model[0].weight, weights[1])
    silent = OneStep()  # cannot add to a row: refused before the first step
    with pytest.raises(ValueError, match="'train_f1' will not be measured"):
        quiet(net(), toy(), callbacks=[EarlyStopping("train_f1"), silent])


def test_best_weights_include_what_was_unfrozen_later():
    model = net()
    model[0].requires_grad_(False)
    start = model[0].weight.clone()

    class Unfreeze:
        def on_epoch_begin(self, state):
            if state.epoch == 1:
                model[0].requires_grad_(True)
                state.optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.1, "fused": True})

    fake = Fake([3, 2, 1])
    quiet(
        model,
        toy(),
        epochs=3,
        callbacks=[EarlyStopping("score", patience=None), Unfreeze(), fake],
        clip_norm=1.0,
        schedule="linear",
    )
    reference = net()
    reference[0].requires_grad_(False)
    quiet(reference, toy(), max_steps=1, clip_norm=1.0)
    assert torch.equal(model[0].weight, start) and same(model, reference)


@pytest.mark.parametrize(
    "values, best", [([math.nan, 0.1, 0.5, 0.9], 4), ([0.4, math.nan, 0.5, math.nan], 3), ([math.nan] * 4, None)]
)
def test_a_value_that_is_no_number_is_never_the_best(values, best):
    stop, model, reference = EarlyStopping("score", patience=None), net(), net()
    history = quiet(model, toy(), epochs=4, callbacks=[Fake(values), stop])
    assert (history.best and history.best["epoch"]) == best and stop.best == (best and values[best - 1])
    quiet(reference, toy(), epochs=best or 4)
    assert same(model, reference)
    waiting = EarlyStopping("score", patience=2)
    assert len(quiet(net(), toy(), epochs=9, callbacks=[Fake([1, *[math.nan] * 8]), waiting])) == 3


def test_validation_data_without_anything_to_score_are_no_best_ever():
    class Once:
        """Looks like a loader, but can be read only once."""

        def __init__(self):
            self.batches = iter([toy(20, 1)])

        def __iter__(self):
            return self.batches

    x, y = toy(20, 1)
    for valid, when in (
        (Once(), "after epoch 2"),
        ([(x, torch.full_like(y, -100))], "after epoch 1"),
        ((b for b in ()), "after epoch 1"),
    ):
        epochs = 1 if hasattr(valid, "__next__") else 3
        with pytest.raises(ValueError, match=f"valid has nothing to score {when}"):
            quiet(net(), toy(), valid, epochs=epochs, callbacks=[EarlyStopping()])
    model = net()
    with pytest.raises(ValueError, match="valid has nothing to score: every target is -100"):
        quiet(model, toy(), (x, torch.full_like(y, -100)))
    assert same(model, net())


class Average:
    """The mean of the weights after every step, as the protocol wants it."""

    def __init__(self, every=1):
        self.mean, self.count, self.every = None, 0, every

    def on_train_begin(self, run):
        self.mean, self.count = None, 0

    def on_step_end(self, run):
        self.count += 1
        now = [p.detach().clone() for p in run.model.parameters()]
        if self.mean is None:
            self.mean = now
        else:
            torch._foreach_lerp_(self.mean, now, 1 / self.count)

    def swap(self, model):
        with torch.no_grad():
            for k, p in enumerate(model.parameters()):
                self.mean[k], _ = p.detach().clone(), p.copy_(self.mean[k])

    @contextlib.contextmanager
    def evaluation_weights(self, run):
        self.swap(run.model)
        yield
        self.swap(run.model)

    def on_train_end(self, run):
        self.swap(run.model)

    def state_dict(self):
        return {"mean": self.mean, "count": self.count}

    def load_state_dict(self, state):
        vars(self).update(state)


@pytest.mark.parametrize("order", [1, -1])
def test_early_stopping_keeps_the_best_average_not_the_best_raw_weights(order):
    data, valid, seen = toy(), toy(40, 1), []

    class Look:
        def on_epoch_end(self, run):
            seen.append(copy.deepcopy(run.model))

    model, average, stop = net(), Average(), EarlyStopping(patience=None)
    history = quiet(model, data, valid, epochs=6, lr=0.3, batch_size=20, callbacks=[average, stop, Look()][::order])
    reference, weights = net(), []

    class Collect:
        def on_step_end(self, run):
            weights.append([p.detach().clone() for p in run.model.parameters()])

    quiet(reference, data, epochs=6, lr=0.3, batch_size=20, callbacks=[Collect()])
    for epoch in range(6):
        means = [torch.stack(w).mean(0) for w in zip(*weights[: 5 * (epoch + 1)], strict=True)]
        for p, q in zip(seen[epoch].parameters(), means, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        assert evaluate(seen[epoch], valid)["loss"] == pytest.approx(history["valid_loss"][epoch], rel=1e-5)
    best = history["valid_loss"].index(min(history["valid_loss"]))
    assert history.best["epoch"] == best + 1 and same(model, seen[best])
    plain = net()
    quiet(
        plain,
        data,
        valid,
        epochs=6,
        lr=0.3,
        batch_size=20,
        callbacks=[Average(), EarlyStopping(restore=False, patience=None)],
    )
    assert same(plain, seen[-1])


def test_close_is_called_whatever_happens():
    log = []

    class Hooked:
        def __init__(self, name, fails=None):
            self.name, self.fails = name, fails

        def on_train_begin(self, run):
            log.append(f"{self.name} begins")
            if self.fails:
                raise self.fails

        def on_train_end(self, run):
            log.append(f"{self.name} ends")

        def close(self, run):
            log.append(f"{self.name} closes")

    def outcome(callbacks, error=None):
        log.clear()
        if error is None:
            quiet(net(), toy(), callbacks=callbacks)
        else:
            with pytest.raises(error):
                quiet(net(), toy(), callbacks=callbacks)
        return log

    a, b = Hooked("a"), Hooked("b")
    assert outcome([a, b]) == ["a begins", "b begins", "a ends", "b ends", "b closes", "a closes"]
    assert outcome([a, Bomb(1)], Stop) == ["a begins", "a closes"]
    broken = Hooked("c", fails=KeyboardInterrupt())
    assert outcome([a, broken, b], KeyboardInterrupt) == ["a begins", "c begins", "c closes", "a closes"]


def test_a_run_that_fails_leaves_the_model_as_it_was_found():
    model = net().requires_grad_(True)

    class Freeze:
        def on_epoch_begin(self, run):
            run.model[0].requires_grad_(False)

    with pytest.raises(Stop):
        quiet(model, toy(), callbacks=[Freeze(), Bomb(1)])
    assert all(p.requires_grad for p in model.parameters())
    quiet(model, toy(), callbacks=[Freeze()])
    assert not model[0].weight.requires_grad


def test_an_optimizer_serves_again_after_a_schedule():
    model = net()
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    quiet(model, toy(), optimizer=own, schedule="linear", epochs=2)
    assert own.param_groups[0]["lr"] == 0.1
    assert quiet(model, toy(), optimizer=own)["lr"] == [0.1]


def test_callbacks_see_the_run_and_can_stop_it():
    log = []

    class Log:
        def on_train_begin(self, state):
            log.append(("train", state.epoch, state.model.training))

        def on_epoch_begin(self, state):
            log.append(("epoch", state.epoch))

        def on_step_end(self, state):
            log.append(("step", state.step))
            state.stop = state.step == 3

        def on_epoch_end(self, state):
            log.append(("end", state.row["steps"]))

        def on_train_end(self, state):
            log.append(("done", len(state.history)))

    quiet(net(), toy(), epochs=9, batch_size=50, callbacks=[Log()])
    assert log == [
        ("train", 0, True),
        ("epoch", 0),
        ("step", 1),
        ("step", 2),
        ("end", 2),
        ("epoch", 1),
        ("step", 3),
        ("end", 3),
        ("done", 2),
    ]


def test_modules_frozen_in_eval_mode_stay_so():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

    class Freeze:
        def on_train_begin(self, state):
            state.model[1].eval()

    quiet(model, toy(), toy(30, 1), epochs=2, callbacks=[Freeze()])
    assert model[1].num_batches_tracked == 0 and model[2].training and not model[1].training


def test_progress_bar_and_plot(capsys):
    class Nap:
        def on_step_end(self, state):
            time.sleep(0.12)

    quiet(net(), toy(), batch_size=50, callbacks=[Nap()], progress=True)
    history = quiet(net(), toy(), toy(20, 1), epochs=2, metrics="accuracy")
    for names in ((), ("valid_accuracy",)):
        ax = history.plot(*names)
        assert ax.get_xlabel() == "epoch"
        import matplotlib.pyplot as plt

        plt.close(ax.figure)


# ---------------------------------------------------------------- precision


def test_precision_follows_the_model_and_the_machine(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(compute, "native_bf16", lambda device: True)
    assert compute.choose_precision("auto", nn.Linear(512, 512), cpu)[0] == "bf16"
    assert compute.choose_precision("auto", nn.Conv2d(64, 64, 3), cpu) == ("bf16", "native bf16 and convolution")
    assert "attention" in compute.choose_precision("auto", nn.TransformerEncoderLayer(8, 2, 8), cpu)[1]
    monkeypatch.setattr(compute, "native_bf16", lambda device: False)
    assert compute.choose_precision("auto", nn.Linear(512, 512), cpu) == ("fp32", "cpu without native bf16")
    assert compute.choose_precision("bf16", nn.Linear(2, 2), cpu) == ("bf16", "asked for")
    with pytest.raises(ValueError, match="'fp64'"):
        compute.choose_precision("fp64", nn.Linear(2, 2), cpu)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_close_to_fp32(precision, tmp_path):
    data, half, full = toy(300), net(), net()
    options = {"epochs": 8, "lr": 0.02, "batch_size": 50}
    history = quiet(
        half, data, data, precision=precision, clip_norm=5.0, callbacks=[Checkpoint(tmp_path / "a.pt")], **options
    )
    reference = quiet(full, data, data, precision="fp32", clip_norm=5.0, **options)
    assert history.settings["precision"] == precision
    assert history["valid_loss"][-1] == pytest.approx(reference["valid_loss"][-1], abs=0.05)
    assert all(p.dtype == torch.float32 for p in half.parameters()) and predict(half, data[0]).dtype == torch.float32
    again = quiet(
        half, data, data, precision=precision, clip_norm=5.0, callbacks=[Checkpoint(tmp_path / "a.pt")], **options
    )
    assert again.rows == history.rows


# ---------------------------------------------------------------- errors


def test_wrong_input_is_refused_before_the_first_step():
    x, y = toy()
    cases = [
        (dict(train=(x[:0], y[:0])), ValueError, "empty"),
        (dict(train=[]), ValueError, "empty"),
        (dict(train=(x, y[:7])), ValueError, "same number of rows.*100.*7"),
        (dict(train=5), TypeError, "int"),
        (dict(train=[x[0, 0].item()]), TypeError, "batch is a tuple"),
        (dict(train=(x, y + 1)), ValueError, "label 3 is out of range.*3 classes"),
        (dict(train=(x, y - 1)), ValueError, "label -1 is out of range"),
        (dict(train=(x, y), valid=(x, y + 5)), ValueError, "valid: label 7"),
        (dict(train=[(x, y + 1)]), ValueError, "label 3"),
        (dict(train=(x, y), metrics="f1"), ValueError, "unknown metric 'f1'.*accuracy"),
        (dict(train=(x, y), metrics={"a": 1}), TypeError, "not callable"),
        (dict(train=(x, y), loss="hinge"), ValueError, "unknown loss 'hinge'.*cross_entropy"),
        (dict(train=(x, y), callbacks=[EarlyStopping("train_accuracy")]), ValueError, "will not be measured"),
        (dict(train=(x, y), callbacks=[EarlyStopping("valid_loss")]), ValueError, "needs validation data"),
        (dict(train=(x, y), epochs=0), ValueError, "epochs"),
        (dict(train=(x, y), batch_size=2.5), ValueError, "batch_size"),
        (dict(train=(x, y), epochs=True), ValueError, "epochs"),
        (dict(train=(x, y), lr=-1.0), ValueError, "lr must be at least 0"),
        (dict(train=(x, y), lr=True), ValueError, "lr must be"),
        (dict(train=(x, y), callbacks=EarlyStopping()), TypeError, "a list of objects, got EarlyStopping"),
        (dict(train=(x, y), callbacks=[Fake]), TypeError, "the class Fake"),
        (dict(train=(x, y), callbacks=[Checkpoint("a"), Checkpoint("b")]), ValueError, "2 Checkpoints"),
        (dict(train=(b for b in [(x, y)]), epochs=2), ValueError, "read only once"),
        (dict(train=iter([])), ValueError, "nothing to learn"),
        (dict(train=(x, y.float()[:, None]), loss="mse"), ValueError, "shape"),
    ]
    for options, kind, message in cases:
        model = net()
        with pytest.raises(kind, match=message):
            quiet(model, **{"data": options.pop("train"), **options})
        assert same(model, net()), options
    with pytest.raises(TypeError, match="Module"):
        quiet(lambda x: x, (x, y))
    T._check_labels(torch.tensor([-100]), 2)


def test_nan_names_epoch_step_and_batch():
    x, y = toy(60)
    batches = [(x[i : i + 10], y[i : i + 10]) for i in range(0, 60, 10)]
    bad = [*batches[:4], (x[:10] * math.nan, y[:10]), batches[5]]

    class Loader:
        epoch = 0

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __len__(self):
            return 6

        def __iter__(self):
            return iter(bad if self.epoch else batches)

    for precision in ("fp32", "bf16"):
        with pytest.raises(FloatingPointError, match=r"nan in epoch 2, step 11, batch 5 .*clip_norm"):
            quiet(net(), Loader(), epochs=3, precision=precision)


def test_values_on_an_accelerator_are_read_late_but_name_the_step():
    run = a_run()
    run.device, run._on_cpu, run._sums = torch.device("cuda"), False, {"loss": 0.0}
    run.optimizer = torch.optim.SGD(net().parameters(), lr=0.1)
    for run.step in range(60):
        run.batch = run.step
        T._account(run, 0, torch.tensor(math.nan if run.step == 55 else 2.0), None, None, 3, 3)
    assert run._sums["loss"] == 300 and run._weight == 150 and len(run._pending) == 10
    with pytest.raises(FloatingPointError, match="step 56, batch 56"):
        T._settle(run)


def a_run(model=None, train=None, **options):
    """A Run as fit makes it, before anything is resolved."""
    given = {
        "valid": None,
        "loss": "cross_entropy",
        "metrics": None,
        "epochs": 1,
        "batch_size": 128,
        "lr": 1e-3,
        "optimizer": "adamw",
        "callbacks": (),
        "seed": 0,
        "settings": Settings(device="cpu"),
        **options,
    }
    return Run(model or net(), toy() if train is None else train, **given)


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("kind", ["tensors", "loader"])
@pytest.mark.parametrize("step", [1, 4, 7, 12])
def test_resume_equals_never_stopped(tmp_path, step, kind):
    def data():
        if kind == "tensors":
            return toy()
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*toy()), batch_size=20, shuffle=True)

    options = {"epochs": 4, "batch_size": 20, "lr": 0.05, "schedule": "cosine", "metrics": "accuracy"}
    whole, broken = net(dropout=0.4), net(dropout=0.4)
    a = quiet(whole, data(), toy(40, 1), callbacks=[Bomb(-1), EarlyStopping(patience=2)], **options)
    more = [EarlyStopping(patience=2), Checkpoint(tmp_path / "run.pt", every=3)]
    with pytest.raises(Stop):
        quiet(broken, data(), toy(40, 1), callbacks=[Bomb(step), *more], **options)
    fresh = net(seed=7, dropout=0.4) if step > 3 else broken
    if step <= 3:
        fresh = net(dropout=0.4)
    b = quiet(fresh, data(), toy(40, 1), callbacks=[Bomb(-1), *more], **options)
    assert same(whole, fresh)
    strip = [[{k: v for k, v in r.items() if k != "seconds"} for r in h.rows] for h in (a, b)]
    assert strip[0] == strip[1] and b.best["epoch"] == a.best["epoch"]


def test_resume_in_channels_last(tmp_path):
    options, file = {"epochs": 3, "batch_size": 5}, Checkpoint(tmp_path / "c.pt", every=1)
    whole, broken = small_conv(), small_conv()
    quiet(whole, images(), epochs=3, batch_size=5)
    with pytest.raises(Stop):
        quiet(broken, images(), callbacks=[Bomb(7), file], **options)
    again = small_conv()
    quiet(again, images(), callbacks=[Bomb(-1), file], **options)
    assert same(whole, again)


def test_a_finished_run_is_not_repeated_and_can_be_extended(tmp_path):
    file = tmp_path / "run.pt"
    a = net()
    quiet(a, toy(), epochs=2, callbacks=[Checkpoint(file)])
    b = net(1)
    assert len(quiet(b, toy(), epochs=2, callbacks=[Checkpoint(str(file))])) == 2 and same(a, b)
    longer, c = net(2), net()
    quiet(longer, toy(), epochs=4, callbacks=[Checkpoint(file)])
    quiet(c, toy(), epochs=4)
    assert same(longer, c)
    d = net()
    quiet(d, toy(), epochs=4, callbacks=[Checkpoint(file, resume=False)])
    assert same(d, c) and list(tmp_path.iterdir()) == [file]


def test_foreign_checkpoints_are_refused(tmp_path):
    file = tmp_path / "run.pt"
    quiet(net(), toy(), callbacks=[Checkpoint(file)])
    before = file.read_bytes()
    with pytest.raises(ValueError, match="another model.*3.weight.*resume=False"):
        quiet(net(classes=4), toy(classes=4), callbacks=[Checkpoint(file)])
    for options, name in (
        ({"lr": 0.1}, "groups"),
        ({"seed": 3}, "seed"),
        ({"batch_size": 64}, "batch_size"),
        ({"loss": "focal"}, "loss"),
        ({"schedule": "cosine"}, "schedule"),
    ):
        with pytest.raises(ValueError, match=f"another configuration: {name} was"):
            quiet(net(), toy(), callbacks=[Checkpoint(file)], **options)
    assert file.read_bytes() == before
    file.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="not a checkpoint of fit.*delete it"):
        quiet(net(), toy(), callbacks=[Checkpoint(file)])
    torch.save({"model": 1}, file)
    with pytest.raises(ValueError, match="KeyError"):
        quiet(net(), toy(), callbacks=[Checkpoint(file)])


class Turns:
    """Trains head and body in turn, the body's normalization held; opens a new group of the optimizer late."""

    def __init__(self):
        self.epoch = None

    def on_epoch_begin(self, run):
        self.epoch = run.epoch
        for name, p in run.model.named_parameters():
            p.requires_grad_(
                name.startswith("4.") is (run.epoch % 2 == 0) and (run.epoch > 1 or not name.startswith("0."))
            )
        run.model[1].train(run.epoch % 2 == 1)
        held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
        late = [p for p in run.model.parameters() if p.requires_grad and id(p) not in held]
        if late:
            run.optimizer.add_param_group({"params": late, "lr": 0.03, "initial_lr": 0.03})

    def on_epoch_end(self, run):
        run.row["turn"] = np.float64(self.epoch)

    def state_dict(self):
        return {"epoch": np.int64(self.epoch)}

    def load_state_dict(self, state):
        self.epoch = state["epoch"]


def turning():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    model[0].requires_grad_(False)
    return model


def rows_of(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history.rows]


@pytest.mark.parametrize(
    "step, again", [(1, "a new model"), *itertools.product(range(2, 15), ["a new model", "the same model"])]
)
def test_what_is_frozen_and_every_callback_go_on_too(tmp_path, step, again):
    options = {
        "epochs": 5,
        "batch_size": 34,
        "lr": 0.05,
        "schedule": "cosine",
        "metrics": {"right": lambda output, target: np.float64(scoring.accuracy(output, target))},
    }
    whole, broken, file = turning(), turning(), Checkpoint(tmp_path / "run.pt", every=1)
    a = quiet(whole, toy(), toy(40, 1), callbacks=[Turns(), Average(), EarlyStopping(), Bomb(-1)], **options)
    with pytest.raises(Stop):
        quiet(broken, toy(), toy(40, 1), callbacks=[Turns(), Average(), EarlyStopping(), Bomb(step), file], **options)
    fresh = broken if again == "the same model" else turning()
    b = quiet(fresh, toy(), toy(40, 1), callbacks=[Turns(), Average(), EarlyStopping(), Bomb(-1), file], **options)
    assert same(whole, fresh) and rows_of(a) == rows_of(b) and a.best["epoch"] == b.best["epoch"]
    assert [p.requires_grad for p in whole.parameters()] == [p.requires_grad for p in fresh.parameters()]


@pytest.mark.parametrize("step", [1, 5, 6, 11])
def test_a_loaders_own_generator_goes_on_too(tmp_path, step):
    def loaders():
        def loader(data, seed, **options):
            generator = torch.Generator().manual_seed(seed)
            return torch.utils.data.DataLoader(
                torch.utils.data.TensorDataset(*data), shuffle=True, generator=generator, **options
            )

        return loader(toy(), 3, batch_size=20), loader(toy(40, 1), 4, batch_size=13)

    whole, broken, fresh, file = (
        net(dropout=0.2),
        net(dropout=0.2),
        net(dropout=0.2),
        Checkpoint(tmp_path / "run.pt", every=1),
    )
    a = quiet(whole, *loaders(), epochs=4, callbacks=[Bomb(-1)])
    with pytest.raises(Stop):
        quiet(broken, *loaders(), epochs=4, callbacks=[Bomb(step), file])
    b = quiet(fresh, *loaders(), epochs=4, callbacks=[Bomb(-1), file])
    assert same(whole, fresh) and rows_of(a) == rows_of(b)
    with pytest.raises(ValueError, match="generators was 2, now it is 0"):
        plain = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*toy()), batch_size=20, shuffle=True)
        quiet(net(dropout=0.2), plain, toy(40, 1), epochs=4, callbacks=[Bomb(-1), file])


def test_looking_at_a_first_batch_leaves_the_loaders_order(tmp_path):
    pictures, orders = images(), []
    for choice in (False, "auto"):
        dataset = torch.utils.data.TensorDataset(pictures.x, pictures.y)
        generator = torch.Generator().manual_seed(0)
        loader = torch.utils.data.DataLoader(dataset, batch_size=5, shuffle=True, generator=generator)
        quiet(small_conv(), loader, channels_last=choice)
        orders.append(generator.get_state())
    assert torch.equal(*orders)


def test_numbers_of_numpy_do_not_make_a_checkpoint_unreadable(tmp_path):
    class Counts:
        def __init__(self):
            self.seen, self.loaded = np.zeros(3), None

        def on_epoch_end(self, run):
            self.seen += 1
            run.row |= {"a": np.float32(0.5), "b": np.int64(3), "c": np.bool_(True), "d": np.arange(2)}

        def state_dict(self):
            return {"seen": self.seen, "deep": [{"x": (np.float64(1.5), None, "text")}], np.int64(7): {np.str_("k"): 1}}

        def load_state_dict(self, state):
            self.loaded = state

    metrics = {"right": lambda output, target: np.float64(scoring.accuracy(output, target))}
    file, counts = Checkpoint(tmp_path / "run.pt"), Counts()
    quiet(net(), toy(), epochs=2, seed=np.int64(3), lr=np.float32(0.01), metrics=metrics, callbacks=[counts, file])
    again = Counts()
    history = quiet(
        net(), toy(), epochs=3, seed=np.int64(3), lr=np.float32(0.01), metrics=metrics, callbacks=[again, file]
    )
    assert again.loaded["seen"].tolist() == [2, 2, 2] and again.loaded["deep"] == [{"x": (1.5, None, "text")}]
    assert again.loaded[7] == {"k": 1} and [type(history.rows[0][k]) for k in "abc"] == [float, int, bool]
    assert all(isinstance(v, float) for v in history["train_right"])


class Growing:
    """A transform that changes from batch to batch, and keeps what it is."""

    def __init__(self):
        self.last, self.begun = torch.zeros(()), 0

    def __call__(self, x):
        self.last = 0.9 * self.last + x.mean()
        return x + self.last

    def on_train_begin(self, run):
        self.begun += 1
        self.last = torch.zeros(())

    def state_dict(self):
        return {"last": self.last}

    def load_state_dict(self, state):
        self.last = state["last"]


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("step", [1, 4, 6])
def test_the_state_of_a_transform_goes_on_too(tmp_path, step, listed):
    def run(model, callbacks):
        change = Growing()
        told = [change] if listed else []
        options = {"epochs": 3, "batch_size": 20, "lr": 0.05, "transform": change}
        quiet(model, toy(), callbacks=[*callbacks, *told], **options)
        assert change.begun == 1, "as one callback, though it is named twice"
        return change.last

    file, whole, again = Checkpoint(tmp_path / "run.pt", every=1), net(), net()
    last = run(whole, [])
    with pytest.raises(Stop):
        run(net(), [Bomb(step), file])
    assert torch.equal(run(again, [Bomb(-1), file]), last) and same(whole, again)


class Keeping(nn.Module):
    """A transform that is a module, with weights that nothing moves."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        self.scale = self.scale * 1.01
        return self.scale * x


def test_a_transform_that_is_a_module_goes_on_too(tmp_path):
    def run(model, callbacks):
        options = {"epochs": 2, "batch_size": 20, "lr": 0.05, "transform": Keeping()}
        quiet(model, toy(), callbacks=callbacks, **options)

    file, whole, again = Checkpoint(tmp_path / "run.pt", every=1), net(), net()
    run(whole, [])
    with pytest.raises(Stop):
        run(net(), [Bomb(3), file])
    run(again, [Bomb(-1), file])
    assert same(whole, again)


def test_what_a_checkpoint_cannot_keep_is_named(tmp_path):
    class Lost:
        def __init__(self):
            self.count = 0

    class Strange(Lost):
        def state_dict(self):
            return {"path": [tmp_path]}

        def load_state_dict(self, state):
            pass

    with pytest.raises(TypeError, match=r"Lost has attributes \(count\).*state_dict\(\)"):
        quiet(net(), toy(), callbacks=[Lost(), Checkpoint(tmp_path / "a.pt")])
    with pytest.raises(TypeError, match=r"Strange.state_dict\(\) holds a PosixPath|WindowsPath"):
        quiet(net(), toy(), callbacks=[Strange(), Checkpoint(tmp_path / "a.pt")])
    assert quiet(net(), toy(), callbacks=[Lost()]).rows and list(tmp_path.iterdir()) == []


def test_checkpoints_refuse_options_outside_their_range(tmp_path):
    for options, kind in (({"every": 0}, ValueError), ({"keep": 2}, ValueError), ({"resume": None}, ValueError)):
        with pytest.raises(kind, match=next(iter(options))):
            Checkpoint("run.pt", **options)
    with pytest.raises(TypeError, match="file name, got int"):
        Checkpoint(3)
    file = Checkpoint(tmp_path / "run.pt", every=1, keep=False)
    with pytest.raises(Stop):
        quiet(net(), toy(), batch_size=20, callbacks=[Bomb(3), file])
    assert file.path.exists()
    a, b = net(), net()
    quiet(a, toy(), batch_size=20, callbacks=[Bomb(-1), file])
    quiet(b, toy(), batch_size=20)
    assert same(a, b) and not file.path.exists()


def test_other_parameters_in_the_optimizer_are_another_configuration(tmp_path):
    file = Checkpoint(tmp_path / "run.pt")
    model = net()
    quiet(model, toy(), params=list(model[0].parameters()), callbacks=[file])
    model = net()
    with pytest.raises(ValueError, match="group 0 of the optimizer held.*0.weight.*now it holds.*3.weight"):
        quiet(model, toy(), epochs=2, params=list(model[3].parameters()), callbacks=[file])
    frozen = net()
    frozen[0].requires_grad_(False)
    with pytest.raises(ValueError, match="frozen was"):
        quiet(frozen, toy(), epochs=2, params=list(frozen[3].parameters()), callbacks=[file])


def test_only_leftovers_of_this_checkpoint_are_cleared(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    alive = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        kept = [
            f".lr0.1.{gone.pid}-deadbeef.pt",
            f".lr0.{alive.pid}-deadbeef.pt",
            f".lr01.{gone.pid}-deadbeef.pt",
            "lr0.pt.old",
        ]
        cleared = [f".lr0.{gone.pid}-deadbeef.pt"]
        for name in kept + cleared:
            (tmp_path / name).write_bytes(b"x")
        checkpoint.clear_leftovers(tmp_path / "lr0.pt")
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept)
        (tmp_path / f".run[1].{gone.pid}-deadbeef.pt").write_bytes(b"x")
        checkpoint.clear_leftovers(tmp_path / "run1.pt")
        assert (tmp_path / f".run[1].{gone.pid}-deadbeef.pt").exists()
        checkpoint.clear_leftovers(tmp_path / "run[1].pt")
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept)
    finally:
        alive.communicate(b"\n")


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train_script", "torch._dynamo"])


def start(*args):
    process = FORKS.Process(target=train_script.main, args=([str(a) for a in args],))
    process.start()
    return process


def result(process, out):
    process.join(300)
    assert process.exitcode == 0
    return torch.load(out, weights_only=True)


def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    """SIGKILL at random moments after progress was saved; every step saves, so some kills hit the writing."""
    options = ["--dropout", 0.3, "--slow", 0.01]
    want = result(start(tmp_path / "whole.pt", *options), tmp_path / "whole.pt")
    file, out, chance = tmp_path / "ck" / "run.pt", tmp_path / "killed.pt", random.Random()
    kills = 0
    while kills < 6:
        before = file.stat().st_mtime_ns if file.exists() else 0
        process = start(out, "--checkpoint", file, *options)
        while process.is_alive() and (not file.exists() or file.stat().st_mtime_ns == before):
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        process.join()
        if out.exists():
            break
        kills += 1
    assert kills >= 2
    got = result(start(out, "--checkpoint", file, *options), out)
    assert got["rows"] == want["rows"]
    assert all(torch.equal(want["weights"][k], v) for k, v in got["weights"].items())
    assert [p.name for p in file.parent.iterdir()] == ["run.pt"]


def test_killed_while_writing(tmp_path, monkeypatch):
    """A write that dies half-way leaves the old checkpoint, and the next run clears what was left."""
    file = tmp_path / "run.pt"
    quiet(net(), toy(), callbacks=[Checkpoint(file)])
    whole = file.read_bytes()

    def die(state, path):
        Path(path).write_bytes(b"half")
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(torch, "save", die)
        quiet(net(), toy(), epochs=2, callbacks=[Checkpoint(file)])
    assert file.read_bytes() == whole
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / f".run.{gone.pid}-deadbeef.pt").write_bytes(b"left by a killed process")
    a, b = net(), net()
    quiet(a, toy(), epochs=2, callbacks=[Checkpoint(file)])
    quiet(b, toy(), epochs=2)
    assert same(a, b) and list(tmp_path.iterdir()) == [file]


# ---------------------------------------------------------------- several processes


def test_torchrun_equals_one_process(tmp_path):
    root = Path(__file__).resolve().parents[1]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(Path(train_script.__file__)),
        str(tmp_path / "two.pt"),
        "--checkpoint",
        str(tmp_path / "ck.pt"),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.count("saved") == 1, done.stderr
    got = torch.load(tmp_path / "two.pt", weights_only=True)
    train_script.main([str(tmp_path / "one.pt")])
    one = torch.load(tmp_path / "one.pt", weights_only=True)
    assert got["processes"] == 2 and one["processes"] == 1
    for k, v in one["weights"].items():
        torch.testing.assert_close(got["weights"][k], v, rtol=1e-4, atol=1e-5)
    for a, b in zip(got["rows"], one["rows"], strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


def two(out, *args):
    """A run of the script in two processes; its result, None where it was broken off."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pair = [
        FORKS.Process(target=train_script.one_of_two, args=(rank, port, [str(a) for a in (out, *args)]))
        for rank in (0, 1)
    ]
    for process in pair:
        process.start()
    for process in pair:
        process.join(300)
        assert process.exitcode == 0
    return torch.load(out, weights_only=True) if out.exists() else None


def test_two_processes_go_on_in_mid_epoch_each_with_its_own_sums(tmp_path):
    want = two(tmp_path / "whole.pt", "--dropout", 0.2)
    file = tmp_path / "run.pt"
    assert two(tmp_path / "broken.pt", "--dropout", 0.2, "--checkpoint", file, "--stop", 14) is None and file.exists()
    got = two(tmp_path / "again.pt", "--dropout", 0.2, "--checkpoint", file)
    assert got["processes"] == 2 and got["rows"] == want["rows"]
    assert all(torch.equal(v, got["weights"][k]) for k, v in want["weights"].items())
    one = tmp_path / "one.pt"
    train_script.main([str(one), "--dropout", "0.2", "--checkpoint", str(file)])
    assert torch.load(one, weights_only=True)["rows"] == want["rows"], (
        "a finished run is read by any number of processes"
    )


def test_a_process_without_anything_to_score_waits_for_the_others(tmp_path):
    got = two(tmp_path / "two.pt", "--ignored", "--accumulate", 2)
    train_script.main([str(tmp_path / "one.pt"), "--ignored", "--accumulate", "2"])
    one = torch.load(tmp_path / "one.pt", weights_only=True)
    for k, v in one["weights"].items():
        torch.testing.assert_close(got["weights"][k], v, rtol=1e-4, atol=1e-5)
    for a, b in zip(got["rows"], one["rows"], strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


def test_a_checkpoint_has_the_keys_that_every_version_reads(tmp_path):
    """Written out by hand, as the first version wrote it: a run goes on from it."""
    data, path = toy(n=16), tmp_path / "run.pt"
    model = torch.nn.Linear(data[0].shape[1], 3)
    options = {"epochs": 3, "batch_size": 8, "lr": 0.01, "optimizer": "sgd"}
    whole = copy.deepcopy(model)
    rows = quiet(whole, data, **options).rows
    quiet(model, data, callbacks=[Checkpoint(path)], **options | {"epochs": 1})
    found = torch.load(path, weights_only=True)
    streams = found["processes"][0][0]
    names = ["weight"], ["bias"]
    momentum = [{"momentum_buffer": found["optimizer"]["state"][i]["momentum_buffer"]} for i in (0, 1)]
    by_hand = {
        "signature": {
            "model": [["weight", [3, data[0].shape[1]], "torch.float32"], ["bias", [3], "torch.float32"]],
            "config": {
                "loss": "cross_entropy",
                "optimizer": "SGD",
                "groups": [{"initial_lr": 0.01, "weight_decay": 0.01}, {"initial_lr": 0.01, "weight_decay": 0.0}],
                "seed": 0,
                "batch_size": 8,
                "frozen": [],
                "accumulate": 1,
                "clip_norm": None,
                "precision": "fp32",
                "metrics": [],
                "schedule": None,
                "warmup": 0.0,
                "batches": 2,
                "max_steps": None,
                "total_steps": None,
                "transform": None,
                "generators": 0,
                "callbacks": [],
            },
        },
        "processes": [[[streams[0], streams[1]], None, found["processes"][0][2], found["processes"][0][3]]],
        "epoch": 1,
        "step": 2,
        "batch": 0,
        "stop": False,
        "trained": {"weight": True, "bias": True},
        "modes": {"": True},
        "groups": [*names],
        "history": [[{**rows[0]}], None],
        "callbacks": [],
        "scaler": {},
        "optimizer": {"state": dict(enumerate(momentum)), "param_groups": found["optimizer"]["param_groups"]},
        "model": {"weight": model.weight.detach(), "bias": model.bias.detach()},
        "loss": {},
    }
    assert set(found) == set(by_hand) and found["signature"] == by_hand["signature"]
    torch.save(by_hand, path)
    again = torch.nn.Linear(data[0].shape[1], 3)
    history = quiet(again, data, callbacks=[Checkpoint(path)], **options)
    assert torch.equal(again.weight, whole.weight) and history["train_loss"] == [r["train_loss"] for r in rows]


def test_the_sums_of_two_processes_go_to_one(tmp_path):
    run = a_run()
    run._generators, run.batch, run.device = [], 3, torch.device("cpu")
    run._scaler = torch.amp.GradScaler("cpu", enabled=False)
    streams = [compute.rng_state(run.device)] * 2
    state = run.state() | {"processes": [[streams, {"loss": 2.0}, 3, 4], [streams, {"loss": 5.0}, 1, 2]]}
    run.load_state(state)
    assert (run._sums, run._count, run._weight) == ({"loss": 7.0}, 4, 6)
    run._rank, run._size = 1, 3
    run.load_state(state)
    assert (run._sums, run._count, run._weight) == ({"loss": 0.0}, 0, 0)


def test_process_group_of_one(monkeypatch):
    """The code of several processes, run by one: collectives, shards and wrapping give the same weights."""
    import torch.distributed as dist

    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        monkeypatch.setattr(T, "join_group", lambda: (0, 1))
        run = T._prepare(a_run())
        run._size = 2
        assert T._shares_of(run, [3, 5]) == [3 / 4, 5 / 4]
        assert T._reduce(run, {"loss": 6.0, "right": 4.0}, 2, 3) == {"loss": 2.0, "right": 2.0}
        assert T._reduce(run, {"loss": 0.0}, 0, 0) is None
    finally:
        dist.destroy_process_group()


def test_leaving_the_group_lets_its_threads_finish(monkeypatch):
    """A thread of the group that still needs the interpreter gets it, before the script ends."""
    freed = []
    late = threading.Thread(target=lambda: (time.sleep(0.03), freed.append(1)), daemon=True)
    monkeypatch.setattr(T.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(T.dist, "destroy_process_group", late.start)
    T._leave()
    assert freed == [1]
    monkeypatch.setattr(T.dist, "is_initialized", lambda: False)
    start = time.perf_counter()
    T._leave()
    assert time.perf_counter() - start < 0.1  # a script alone does not wait


@example_budget(max_examples=20, deadline=None)
@given(n=st.integers(1, 20), size=st.integers(1, 5))
def test_shards_are_a_partition(n, size):
    x = torch.arange(n)
    for batch in ((x, x), {"x": x, "n": 3}, x):
        parts = [batches.shard(batch, rank, size) for rank in range(size)]
        rows = [p["x"] if isinstance(p, dict) else p if torch.is_tensor(p) else p[0] for p, _ in parts]
        if n < size:
            assert all(torch.equal(r, x) for r in rows) and sum(share for _, share in parts) == pytest.approx(1)
        else:
            assert torch.cat(rows).sort().values.equal(x) and {share for _, share in parts} == {1.0}


def test_fit_has_twelve_parameters_and_all_are_documented():
    import inspect

    parameters = inspect.signature(fit).parameters
    assert len(parameters) == 12 and all(name in fit.__doc__ for name in parameters)
    assert {f.name for f in dataclasses.fields(Settings)} == {
        "schedule",
        "warmup",
        "weight_decay",
        "params",
        "clip_norm",
        "accumulate",
        "precision",
        "channels_last",
        "device",
        "transform",
        "max_steps",
        "progress",
        "parallel",
    }
    assert all(f"    {f.name} : " in Settings.__doc__ for f in dataclasses.fields(Settings))
    public = [f.name for f in dataclasses.fields(Run) if not f.name.startswith("_")]
    assert all(name in Run.__doc__ for name in public)
    assert isinstance(History().rows, list) and T.__doc__ and repr(a_run()).startswith("Run(epoch 0")


@pytest.mark.parametrize(("precision", "inside"), [("bf16", "eager"), ("fp32", "sdpa")])
def test_attention_is_plain_while_training_in_bf16_on_a_cpu(precision, inside):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    model, seen = transformers.BertForTokenClassification(config), []
    batch = {"input_ids": torch.randint(0, 20, (4, 6)), "labels": torch.randint(0, 3, (4, 6))}

    class Look:
        def on_step_end(self, state):
            seen.append(model.bert.config._attn_implementation)
            if len(seen) == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quiet(model, [batch] * 3, precision=precision, callbacks=[Look()])
    assert seen == [inside] * 2 and model.config._attn_implementation == "sdpa"
    history = quiet(model, [batch], precision=precision)
    assert history.settings["plain_attention"] == (inside == "eager")


# -------------------------------------------- what a reviewer tried and broke


class RandomOrder(torch.utils.data.Sampler):
    """An order from a generator of its own, which is not one of torch."""

    def __init__(self, n, rng):
        self.n, self.rng = n, rng

    def __len__(self):
        return self.n

    def __iter__(self):
        order = list(range(self.n))
        self.rng.shuffle(order)
        return iter(order)


@pytest.mark.parametrize(
    "rng",
    [
        lambda: np.random.default_rng(3),
        lambda: np.random.Generator(np.random.MT19937(3)),
        lambda: np.random.RandomState(3),
        lambda: random.Random(3),
    ],
    ids=["numpy", "mersenne", "old numpy", "python"],
)
@pytest.mark.parametrize("step", [2, 5, 8])
def test_an_order_drawn_by_numpy_or_python_goes_on_too(tmp_path, rng, step):
    def loader():
        data = torch.utils.data.TensorDataset(*toy(40))
        return torch.utils.data.DataLoader(data, batch_size=10, sampler=RandomOrder(40, rng()))

    file = Checkpoint(tmp_path / "run.pt", every=1)
    whole, broken = net(dropout=0.1), net(dropout=0.1)
    quiet(whole, loader(), epochs=3, lr=0.05)
    with pytest.raises(Stop):
        quiet(broken, loader(), epochs=3, lr=0.05, callbacks=[Bomb(step), file])
    broken = net(dropout=0.1)
    quiet(broken, loader(), epochs=3, lr=0.05, callbacks=[Bomb(-1), file])
    assert same(whole, broken)


class Scaled(nn.Module):
    """A loss with a weight and a buffer of its own, which training changes."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, output, target):
        self.seen += 1
        return F.cross_entropy(output * self.log_scale.exp(), target)


@pytest.mark.parametrize("step", [3, 5])
def test_a_loss_with_weights_of_its_own_goes_on_too(tmp_path, step):
    def run(*callbacks):
        model, loss = net(), Scaled()
        params = [*model.parameters(), *loss.parameters()]
        how = {"epochs": 3, "batch_size": 25, "lr": 0.05, "params": params}
        with contextlib.suppress(Stop):
            quiet(model, toy(), loss=loss, callbacks=callbacks, **how)
        return model, loss

    file = Checkpoint(tmp_path / "run.pt", every=1)
    whole, loss = run(Bomb(-1))
    run(Bomb(step), file)
    again, restored = run(Bomb(-1), file)
    assert same(whole, again) and same(loss, restored) and restored.seen == 12


def test_weights_that_a_checkpoint_would_lose_are_refused(tmp_path):
    class Shadow:
        def __init__(self, model):
            self.shadow = copy.deepcopy(model)

    class Slotted:
        __slots__ = ("count",)

        def __init__(self):
            self.count = 0

    class Looks:
        def __init__(self, model):
            self.model = model

    model, other, file = net(), nn.Linear(2, 2), Checkpoint(tmp_path / "run.pt")
    with pytest.raises(TypeError, match=r"Shadow has attributes \(shadow\)"):
        quiet(model, toy(), callbacks=[Shadow(model), file])
    with pytest.raises(TypeError, match=r"Slotted has attributes \(count\)"):
        quiet(model, toy(), callbacks=[Slotted(), file])
    with pytest.raises(ValueError, match="neither model nor loss"):
        quiet(model, toy(), params=[*model.parameters(), *other.parameters()], callbacks=[file])
    assert same(model, net()) and list(tmp_path.iterdir()) == []
    assert quiet(model, toy(), callbacks=[Looks(model[0]), file]).rows


def test_extra_state_of_a_module_is_kept_as_plain_values(tmp_path):
    class Counted(nn.Linear):
        calls: object = 0

        def forward(self, x):
            self.calls = np.int64(self.calls + 1)
            return super().forward(x)

        def get_extra_state(self):
            return {"calls": self.calls}

        def set_extra_state(self, state):
            self.calls = state["calls"]

    file = Checkpoint(tmp_path / "run.pt")
    quiet(Counted(6, 3), toy(), batch_size=50, callbacks=[file])
    model = Counted(6, 3)
    quiet(model, toy(), batch_size=50, epochs=2, callbacks=[file])
    assert model.calls == 4


@pytest.mark.parametrize("order", [1, -1])
def test_whoever_keeps_the_best_weights_restores_them_over_an_average(order):
    class Best:
        best, weights = math.inf, None

        def on_epoch_end(self, run):
            if run.row["valid_loss"] < self.best:
                self.best, self.weights = run.row["valid_loss"], copy.deepcopy(run.model.state_dict())

        def on_train_end(self, run):
            run.model.load_state_dict(self.weights)

    class Spoil:
        def on_epoch_begin(self, run):
            if run.epoch == 2:
                with torch.no_grad():
                    for p in run.model.parameters():
                        p.add_(torch.randn_like(p))

    model, valid, best = net(), toy(40, 1), Best()
    quiet(model, toy(), valid, epochs=3, lr=0.05, batch_size=20, callbacks=[Spoil(), *[Average(), best][::order]])
    assert evaluate(model, valid)["loss"] == pytest.approx(best.best)


def test_outputs_that_are_no_tensor_name_the_cure():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    x, y = toy()
    for call in (
        lambda: quiet(Pair(6, 3), (x, y)),
        lambda: quiet(Pair(6, 3), (x, y), loss=nn.CrossEntropyLoss()),
        lambda: quiet(Pair(6, 6), (x, x), loss="mse"),
        lambda: evaluate(Pair(6, 3), (x, y)),
        lambda: predict(Pair(6, 3), x),
    ):
        with pytest.raises(TypeError, match="returned a tuple.*'logits'"):
            call()
    assert quiet(Pair(6, 3), (x, y), loss=lambda out, target: F.cross_entropy(out[0], target)).rows


def test_a_list_with_a_batch_of_one_example_is_refused_before_the_first_step():
    model, (x, y) = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), toy(33)
    before = copy.deepcopy(model)
    for cuts in ([16, 16, 1], [16, 1, 16]):
        parts = list(zip(x.split(cuts), y.split(cuts), strict=True))
        with pytest.raises(ValueError, match="one example.*another batch_size"):
            quiet(model, parts)
        assert same(model, before)
    assert quiet(model, [(x[:16], y[:16]), (x[16:], y[16:])]).rows


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("setting", [{"lr": 1e-2, "batch_size": 32, "schedule": "linear"}, {"C": 0.1}])
def test_a_run_of_the_study_scores_the_images_of_one_split(split, setting):
    found = study.run(1, split, "a row", **setting)
    assert found["accuracy"].shape == study.images()[split][1].shape and math.isfinite(found["loss"])


def test_the_study_chooses_a_rate_for_every_row_on_validation_images(tmp_path, monkeypatch):
    splits = []

    def run(seed, split, setup, lr=None, C=None, **setting):
        splits.append((split, seed))
        away = abs(lr - 3e-3) if lr else abs(C - 0.1) if C else 1.0
        return {"loss": away + 0.01 * seed, "accuracy": torch.ones(4)}

    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path))
    monkeypatch.setattr(study, "run", run)
    threads = torch.get_num_threads()
    study.main()
    torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "04_train.json").read_text())["quick"]["choices"]["value"]["loss"]
    assert [r["setup"] for r in rows] == [r["setup"] for r in study.rows()]
    assert [r.get("lr", r.get("C")) for r in rows] == [3e-3] * 5 + [None, 0.1]
    assert {r["tried"] for r in rows[:5]} == {len(study.RATES)}
    assert {s for split, s in splits if split == "valid"} == {0}, "test images are scored by other seeds"
    with pytest.raises(ValueError, match="no study 'rates'; use choices"):
        study.main("rates")


def test_memory_that_a_step_frees_is_kept_unless_the_user_has_decided(monkeypatch):
    for name in [k for k in os.environ if k.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    known = hasattr(ctypes.CDLL(None), "mallopt")
    assert T._keep_memory() is known and T._keep_memory(False) is known
    assert T._keep_memory() is known
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    assert T._keep_memory() is False
