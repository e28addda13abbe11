"""Chapter 7's library: what is frozen stays bit-identical, groups cover, schedules open what they say."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models import mobilenet_v2, resnet18, vit_b_16
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification, BertModel

from ftbook import finetune as ft
from ftbook.train import fit


def bert(cls=BertForSequenceClassification, layers=3):
    return cls(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
        )
    )


class Small(nn.Module):
    "A CNN with batch normalization, small enough to train in a test."

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


def batch(n=24):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n, 1, 6, 6, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def trainable(model):
    return [n for n, p in model.named_parameters() if p.requires_grad]


MODELS = {
    "bert": bert,
    "bert-tokens": lambda: bert(BertForTokenClassification),
    "resnet18": resnet18,
    "mobilenet": mobilenet_v2,
    "small": Small,
    "stack": lambda: nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 2)),
}


@pytest.mark.parametrize("name", MODELS)
def test_blocks_partition_the_parameters_in_order(name):
    model = MODELS[name]()
    cut = ft.blocks(model)
    names = [n for block in cut.values() for n in block]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters()) and len(cut) > 1


def test_blocks_of_known_models():
    assert list(ft.blocks(bert())) == [
        "bert.embeddings",
        "bert.encoder.layer.0",
        "bert.encoder.layer.1",
        "bert.encoder.layer.2",
        "bert.pooler",
        "classifier",
    ]
    assert list(ft.blocks(resnet18())) == ["conv1", *[f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)], "fc"]
    assert ft.blocks(resnet18())["conv1"] == ["conv1.weight", "bn1.weight", "bn1.bias"]
    assert list(ft.blocks(mobilenet_v2()))[-1] == "classifier.1"
    vit = ft.blocks(vit_b_16(image_size=32, weights=None))
    assert vit["(own)"] == ["class_token", "encoder.pos_embedding"] and "heads.head" in vit


def test_matching_by_name_pattern_module_and_its_errors():
    model = bert()
    assert ft.matching(model, model.classifier) == ["classifier.weight", "classifier.bias"]
    assert ft.matching(model, "*.query.weight") == [
        f"bert.encoder.layer.{i}.attention.self.query.weight" for i in range(3)
    ]
    with pytest.raises(ValueError, match="near names: .*bert.encoder.layer.1"):
        ft.matching(model, "bert.encoder.layers.1")
    with pytest.raises(ValueError, match="classifier"):
        ft.matching(model, "clasifier")
    with pytest.raises(ValueError, match="own submodules"):
        ft.matching(model, nn.Linear(2, 2))


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(sorted(MODELS)), st.data())
def test_groups_cover_every_trainable_parameter_exactly_once(name, draw):
    model = MODELS[name]()
    n_blocks = len(ft.blocks(model))
    depth = draw.draw(st.integers(1, n_blocks - 1))
    ft.freeze(model, depth=depth)
    decay = draw.draw(st.sampled_from([None, 0.5, 1.0]))
    head_lr = draw.draw(st.sampled_from([None, 0.1]))
    groups = ft.param_groups(model, 1e-3, 0.05, layer_decay=decay, head_lr=head_lr)
    names = [n for g in groups for n in g["names"]]
    assert sorted(names) == sorted(trainable(model)) and len(set(names)) == len(names)
    assert [id(p) for g in groups for p in g["params"]] == [id(dict(model.named_parameters())[n]) for n in names]
    for g in groups:
        for p in g["params"]:
            assert (g["weight_decay"] == 0.0) is (p.ndim < 2)
    everything = ft.param_groups(model, 1e-3, frozen=True)
    assert sum(len(g["params"]) for g in everything) == len(list(model.parameters()))


def test_layer_wise_rates_follow_the_equation():
    rates = {g["block"]: g["lr"] for g in ft.param_groups(bert(), 1.0, layer_decay=0.5)}
    assert list(rates.values()) == [0.5**5, 0.5**4, 0.5**3, 0.5**2, 0.5, 1.0]
    assert {g["lr"] for g in ft.param_groups(bert(), 1e-3, head_lr=0.1) if g["block"] == "classifier"} == {0.1}
    with pytest.raises(ValueError, match="layer_decay"):
        ft.param_groups(bert(), 1.0, layer_decay=1.5)


def test_embedding_and_matrices_decay_norms_and_biases_do_not():
    plain = ft.undecayed(bert())
    assert "bert.embeddings.word_embeddings.weight" not in plain and "bert.embeddings.LayerNorm.weight" in plain
    assert "classifier.bias" in plain and "classifier.weight" not in plain


@pytest.mark.parametrize("batchnorm", ["eval", "train"])
def test_frozen_parts_stay_bit_identical_through_fit(batchnorm):
    model = Small()
    ft.freeze(model, "conv*", "bn*", batchnorm=batchnorm)
    before = copy.deepcopy(model.state_dict())
    fit(model, batch(), epochs=2, lr=0.1, progress=False)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    moving = {f"bn{i}.{b}" for i in (1, 2) for b in ("running_mean", "running_var", "num_batches_tracked")}
    assert changed == {"fc.weight", "fc.bias"} | (moving if batchnorm == "train" else set())
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("fc"))


def test_held_batchnorm_survives_train_copy_and_state_dict_and_is_released():
    model = Small()
    ft.freeze(model, "conv1", "bn1")
    twin = copy.deepcopy(model.train())
    assert not twin.bn1.training and twin.bn2.training and isinstance(twin.bn1, nn.BatchNorm2d)
    assert list(twin.state_dict()) == list(Small().state_dict())
    ft.unfreeze(twin, "bn1")
    assert type(twin.bn1) is nn.BatchNorm2d and twin.train().bn1.training
    with pytest.raises(ValueError, match='"eval"'):
        ft.freeze(model, batchnorm="off")


def test_freeze_by_depth_from_both_ends_and_its_errors():
    model = bert()
    ft.freeze(model)
    assert trainable(model) == []
    ft.unfreeze(model, depth=-2)
    assert {n.rsplit(".", 1)[0] for n in trainable(model)} == {"bert.pooler.dense", "classifier"}
    for wrong in ({"depth": 0}, {"depth": 7}):
        with pytest.raises(ValueError, match="1 to 6"):
            ft.freeze(model, **wrong)
    with pytest.raises(ValueError, match="patterns or a depth"):
        ft.freeze(model, "classifier", depth=1)


@pytest.mark.parametrize("name", ["bert", "bert-tokens", "resnet18", "mobilenet", "small"])
def test_replace_head(name):
    model = MODELS[name]()
    new = ft.replace_head(model, 11)
    assert ft.find_head(model)[1] is new and new.out_features == 11
    if name.startswith("bert"):
        assert model.config.num_labels == 11
        shape = model(torch.zeros(2, 5, dtype=torch.long)).logits.shape
        assert shape == ((2, 11) if name == "bert" else (2, 5, 11))


def test_replace_head_errors():
    with pytest.raises(ValueError, match="at least 1"):
        ft.replace_head(Small(), 0)
    with pytest.raises(ValueError, match="backbone without a classifier"):
        ft.find_head(nn.Sequential(nn.Conv2d(1, 2, 3)))
    assert ft.find_head(BertModel(bert().config))[0] == "pooler.dense"


def record_open():
    class Record:
        seen = []

        def on_epoch_end(self, state):
            self.seen.append(trainable(state.model))

    return Record()


@pytest.mark.parametrize(("plan", "expected"), [(1, [1, 2, 3, 3]), (2, [1, 1, 2, 2]), ({0: 1, 3: 3}, [1, 1, 1, 3])])
def test_gradual_unfreezing_opens_exactly_the_blocks_it_says(plan, expected):
    model, seen, callback = Small(), record_open(), ft.GradualUnfreezing(plan)
    before = copy.deepcopy(model.state_dict())
    fit(
        model,
        batch(),
        epochs=4,
        params=ft.param_groups(model, 0.05, frozen=True),
        callbacks=[callback, seen],
        progress=False,
    )
    cut = list(ft.blocks(model).values())
    for open_names, n in zip(seen.seen, expected, strict=True):
        assert sorted(open_names) == sorted(name for block in cut[-n:] for name in block)
    assert [len(o) for o in callback.opened] == expected
    never = [name for block in cut[: len(cut) - max(expected)] for name in block]
    assert all(torch.equal(model.state_dict()[n], before[n]) for n in never)
    seen.seen.clear()


def test_gradual_unfreezing_refuses_an_optimizer_without_the_parameters_and_bad_plans():
    model = Small()
    ft.freeze(model)
    ft.unfreeze(model, "fc")
    with pytest.raises(ValueError, match="frozen=True"):
        fit(
            model,
            batch(),
            epochs=3,
            params=ft.param_groups(model, 0.1),
            callbacks=[ft.GradualUnfreezing(1)],
            progress=False,
        )
    for plan in (0, {}, {1: 2}, {0: 0}):
        with pytest.raises(ValueError, match="plan is"):
            ft.GradualUnfreezing(plan)


def test_alternating_moves_head_then_body():
    model = Small()
    states = []

    class Keep:
        def on_epoch_end(self, state):
            states.append(copy.deepcopy(state.model.state_dict()))

    start = copy.deepcopy(model.state_dict())
    fit(
        model,
        batch(),
        epochs=2,
        params=ft.param_groups(model, 0.05, frozen=True),
        callbacks=[ft.Alternating(), Keep()],
        progress=False,
    )
    moved = [{k for k in a if not torch.equal(a[k], b[k])} for a, b in [(start, states[0]), (states[0], states[1])]]
    assert moved[0] == {"fc.weight", "fc.bias"}
    assert not moved[1] & {"fc.weight", "fc.bias"} and "conv1.weight" in moved[1]


def test_two_stage_trains_the_head_first():
    model = Small()
    first, second = ft.two_stage(model, batch(), batch(), head_epochs=2, epochs=1, head_lr=0.1, lr=0.01, progress=False)
    assert len(first) == 2 and len(second) == 1 and len(trainable(model)) == len(list(model.parameters()))


def test_report_names_what_is_trained_and_what_no_group_holds():
    model = Small()
    ft.freeze(model, depth=1)
    text = str(ft.report(model, torch.optim.SGD(ft.param_groups(model, 0.1, layer_decay=0.5))))
    assert "| conv1 | 0 |" in text and "0.05" in text and "1 batch normalizations held" in text
    lost = str(ft.report(model, torch.optim.SGD([model.fc.weight], lr=0.1)))
    assert "1 tensors in no group" in lost
    assert "learning rate" not in str(ft.report(model))


def test_plain_model_unwraps_ddp():
    model = Small()
    assert ft.plain_model(model) is model
