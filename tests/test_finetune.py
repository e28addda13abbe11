"""Chapter 8's library: what is frozen stays bit-identical, groups cover, schedules open what they say."""

import contextlib
import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch import nn
from torchvision import models as zoo
from torchvision.models import mobilenet_v2, resnet18, squeezenet1_1, vit_b_16
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

from ftbook import finetune as ft
from ftbook import models as pretrained
from ftbook import results
from ftbook.compute import undecayed
from ftbook.data import ImageSet
from ftbook.studies import finetune as study
from ftbook.texts import TextClassifier, encode_texts
from ftbook.train import Checkpoint, Settings, build_optimizer, fit


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
    "bert-tied": lambda: bert(BertForMaskedLM),
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


NAME = st.lists(st.sampled_from(["a", "b", "ab", "0", "10"]), min_size=1, max_size=4).map(".".join)


@settings(deadline=None, max_examples=60)
@given(st.lists(NAME, min_size=1, max_size=8, unique=True), st.data())
def test_a_pattern_means_the_whole_name_or_else_every_name_with_that_end(names, draw):
    name = draw.draw(st.sampled_from(names))
    assert ft.select(names, name) == [name]
    end = name.split(".", draw.draw(st.integers(0, name.count("."))))[-1]
    expected = [end] if end in names else [n for n in names if n.endswith("." + end)]
    assert ft.select(names, end) == expected
    assert ft.select(names, "!" + end) == [n for n in names if n not in expected]
    assert ft.select(names, "*") == names and ft.select(names, "*", "!*") == []
    assert ft.select(names, "*", "!" + end, end) == names


def test_patterns_are_no_regular_expressions_and_cannot_hang():
    assert ft.select(["a.b", "axb"], "a.b") == ["a.b"] and ft.select(["a+", "aa"], "a+") == ["a+"]
    with pytest.raises(ValueError, match="matches no module of Net; near names"):
        ft.select(["a" * 60 + "!"], "*a*a*a*a*a*a*a*a*a*a*b", what="module of Net")
    with pytest.raises(ValueError, match="there are none"):
        ft.select([], "a")


def test_a_thing_of_several_names_is_meant_by_any_and_a_collection_means_just_its_names():
    shared = [("encoder.embed", "decoder.embed"), "head"]
    assert ft.select(shared, "decoder.*") == ft.select(shared, "embed") == ["encoder.embed"]
    assert ft.select(shared, "!decoder.embed") == ["head"]
    assert ft.select(shared, {"head", "encoder.embed"}, "!decoder.embed") == ft.select(shared, ["head"]) == ["head"]


def test_near_names_end_like_the_pattern_or_are_like_all_of_it():
    for wrong, near in {
        "qeury": "query",
        "encoder.layer.9.attention.self.query": r"layer.\d.attention.self.query",
    }.items():
        with pytest.raises(ValueError, match=f"matches no parameter of Bert.*near names: [^,]*{near}"):
            ft.select(bert(), wrong)


def test_matching_by_name_pattern_module_and_its_errors():
    model = bert()
    assert ft.select(model, "query.weight") == ft.select(model, "*.query.weight")
    assert ft.select(model, "encoder.layer.0") == ft.select(model, "bert.encoder.layer.0")
    dense = ft.select(model, "output.dense", "!attention.output.dense", "!bias")
    assert dense == [f"bert.encoder.layer.{i}.output.dense.weight" for i in range(3)]
    assert ft.select(model, "!bert") == ["classifier.weight", "classifier.bias"]
    assert ft.select(model, model.classifier) == ["classifier.weight", "classifier.bias"]
    assert ft.select(model, "*.query.weight") == [
        f"bert.encoder.layer.{i}.attention.self.query.weight" for i in range(3)
    ]
    with pytest.raises(ValueError, match="near names: .*bert.encoder.layer.1"):
        ft.select(model, "bert.encoder.layers.1")
    with pytest.raises(ValueError, match="classifier"):
        ft.select(model, "clasifier")
    with pytest.raises(ValueError, match="own submodules"):
        ft.select(model, nn.Linear(2, 2))


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
    plain = undecayed(bert())
    assert "bert.embeddings.word_embeddings.weight" not in plain and "bert.embeddings.LayerNorm.weight" in plain
    assert "classifier.bias" in plain and "classifier.weight" not in plain


@pytest.mark.parametrize("name", [*MODELS, "norm of a matrix"])
def test_the_loop_and_the_groups_leave_the_same_out_of_weight_decay(name):
    model = MODELS[name]() if name in MODELS else nn.Sequential(nn.Linear(3, 3), nn.LayerNorm([2, 3]))
    names = {id(p): n for n, p in model.named_parameters()}
    groups = ft.param_groups(model, 1e-3), build_optimizer("adamw", model, 1e-3).param_groups
    plain = [{names[id(p)] for g in made if not g["weight_decay"] for p in g["params"]} for made in groups]
    assert plain[0] == plain[1] == undecayed(model) and set(names.values()) - plain[0]


def test_what_is_called_fc_is_a_head_wherever_it_was_registered():
    model = nn.Module()
    model.fc, model.body = nn.Linear(4, 2), nn.Linear(3, 4)
    assert list(ft.blocks(model)) == ["body", "fc"] and ft.find_head(model)[0] == "fc"


def test_a_held_batch_normalization_can_be_sent_to_another_process():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    ft.freeze(net)
    again = pickle.loads(pickle.dumps(net))
    assert type(again[1]) is type(net[1]) and not again.train()[1].training and "FrozenBatchNorm2d(4" in repr(again)


@pytest.mark.parametrize("batchnorm", ["eval", "train"])
def test_frozen_parts_stay_bit_identical_through_fit(batchnorm):
    model = Small()
    ft.freeze(model, "conv*", "bn*", batchnorm=batchnorm)
    before = copy.deepcopy(model.state_dict())
    fit(model, batch(), epochs=2, lr=0.1, settings=Settings(progress=False))
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
def test_a_new_head_stands_where_the_old_one_stood(name):
    model = MODELS[name]()
    new = ft.replace_head(model, 11)
    assert ft.find_head(model)[1] is new and new.out_features == 11
    if name.startswith("bert"):
        assert model.config.num_labels == 11
        shape = model(torch.zeros(2, 5, dtype=torch.long)).logits.shape
        assert shape == ((2, 11) if name == "bert" else (2, 5, 11))


def test_no_head_is_put_on_a_bare_backbone():
    with pytest.raises(ValueError, match="at least 1"):
        ft.replace_head(Small(), 0)
    with pytest.raises(ValueError, match="backbone without a classifier"):
        ft.find_head(nn.Sequential(nn.Conv2d(1, 2, 3)))
    assert ft.find_head(BertModel(bert().config))[0] == "pooler.dense"


class Conv(nn.Module):
    "A classifier of timm's form whose last layer is a convolution."

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 1), nn.Module()
        self.head.norm, self.head.fc = nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1)


class HeadFirst(nn.Module):
    "Sets up its head before its body, and has a second one for distillation, as timm's distilled models."

    def __init__(self):
        super().__init__()
        self.head, self.body, self.head_dist = nn.Linear(4, 5), nn.Linear(3, 4), nn.Linear(4, 5)


def transformer(name, **config):
    def make():
        import transformers

        cls = getattr(transformers, name)
        return cls(cls.config_class(num_labels=5, pad_token_id=0, **config))

    return make


BERTS = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
HEADS = {
    "alexnet": ("classifier.6", lambda: zoo.alexnet(num_classes=5)),
    "vgg11": ("classifier.6", lambda: zoo.vgg11(num_classes=5, init_weights=False)),
    "vgg11_bn": ("classifier.6", lambda: zoo.vgg11_bn(num_classes=5, init_weights=False)),
    "resnet18": ("fc", lambda: zoo.resnet18(num_classes=5)),
    "squeezenet1_1": ("classifier.1", lambda: zoo.squeezenet1_1(num_classes=5)),
    "densenet121": ("classifier", lambda: zoo.densenet121(num_classes=5)),
    "googlenet": ("fc", lambda: zoo.googlenet(num_classes=5, init_weights=False)),
    "shufflenet": ("fc", lambda: zoo.shufflenet_v2_x0_5(num_classes=5)),
    "mobilenet_v2": ("classifier.1", lambda: zoo.mobilenet_v2(num_classes=5)),
    "mobilenet_v3": ("classifier.3", lambda: zoo.mobilenet_v3_small(num_classes=5)),
    "mnasnet": ("classifier.1", lambda: zoo.mnasnet0_5(num_classes=5)),
    "efficientnet": ("classifier.1", lambda: zoo.efficientnet_b0(num_classes=5)),
    "convnext": ("classifier.2", lambda: zoo.convnext_tiny(num_classes=5)),
    "vit": ("heads.head", lambda: zoo.vit_b_32(num_classes=5)),
    "swin": ("head", lambda: zoo.swin_t(num_classes=5)),
    "maxvit": ("classifier.5", lambda: zoo.maxvit_t(num_classes=5)),
    "timm, convolution": ("head.fc", Conv),
    "timm, distilled": ("head", HeadFirst),
    "bert": ("classifier", transformer("BertForSequenceClassification", **BERTS)),
    "bert, tokens": ("classifier", transformer("BertForTokenClassification", **BERTS)),
    "distilbert": ("classifier", transformer("DistilBertForSequenceClassification", dim=8, n_layers=1, n_heads=2)),
    "roberta": ("classifier.out_proj", transformer("RobertaForSequenceClassification", **BERTS)),
    "roberta, tokens": ("classifier", transformer("RobertaForTokenClassification", **BERTS)),
    "xlm-roberta": ("classifier.out_proj", transformer("XLMRobertaForSequenceClassification", **BERTS)),
    "xlm-roberta, tokens": ("classifier", transformer("XLMRobertaForTokenClassification", **BERTS)),
    "camembert": ("classifier.out_proj", transformer("CamembertForSequenceClassification", **BERTS)),
    "electra": ("classifier.out_proj", transformer("ElectraForSequenceClassification", **BERTS)),
    "deberta": ("classifier", transformer("DebertaV2ForSequenceClassification", **BERTS)),
    "modernbert": ("classifier", transformer("ModernBertForSequenceClassification", **BERTS)),
    "gpt2": ("score", transformer("GPT2ForSequenceClassification", vocab_size=20, n_embd=8, n_layer=1, n_head=2)),
    "gpt2, tokens": ("classifier", transformer("GPT2ForTokenClassification", vocab_size=20, n_embd=8, n_layer=1, n_head=2)),
    "llama": ("score", transformer("LlamaForSequenceClassification", **BERTS, num_key_value_heads=2)),
    "qwen2": ("score", transformer("Qwen2ForSequenceClassification", **BERTS, num_key_value_heads=2)),
    "gpt-neox": ("score", transformer("GPTNeoXForSequenceClassification", **BERTS)),
    "t5": ("classification_head.out_proj", transformer("T5ForSequenceClassification", vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)),
    "bart": ("classification_head.out_proj", transformer("BartForSequenceClassification", vocab_size=20, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)),
    "xlnet": ("logits_proj", transformer("XLNetForSequenceClassification", vocab_size=20, d_model=8, n_layer=1, n_head=2, d_inner=8)),
    "vit, transformers": ("classifier", transformer("ViTForImageClassification", hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)),
    "resnet, transformers": ("classifier.1", transformer("ResNetForImageClassification", embedding_size=8, hidden_sizes=[8], depths=[1])),
}  # fmt: skip


@pytest.mark.parametrize("architecture", HEADS)
def test_the_head_of_every_architecture_is_found_replaced_and_stays_the_last_block(architecture):
    expected, make = HEADS[architecture]
    with torch.device("meta"):
        model = make()
    name, head = ft.find_head(model)
    assert name == expected and len(head.weight) == 5
    new = ft.replace_head(model, 7)
    assert ft.find_head(model) == (expected, new) and len(new.weight) == 7 and type(new) is type(head)
    assert (new.bias is None) is (head.bias is None) and new.weight.device.type == "meta"
    assert (name + ".").startswith(list(ft.blocks(model))[-1] + ".")
    if hasattr(model, "config"):
        assert model.config.num_labels == model.num_labels == 7


@pytest.mark.parametrize("architecture", ["gpt2", "xlm-roberta"])
def test_a_model_with_another_head_gives_that_many_logits_and_the_loss_of_its_new_task(architecture):
    model, ids = HEADS[architecture][1]().eval(), torch.ones(2, 4, dtype=torch.long)
    ft.replace_head(model, 1)
    model(input_ids=ids, labels=torch.zeros(2))  # transformers notes "regression" in the configuration
    ft.replace_head(model, 7)
    out = model(input_ids=ids, labels=torch.tensor([6, 0]))
    assert out.logits.shape == (2, 7)
    assert torch.allclose(out.loss, nn.functional.cross_entropy(out.logits, torch.tensor([6, 0])))
    model.config.problem_type = "multi_label_classification"
    ft.replace_head(model, 3)
    assert model.config.problem_type == "multi_label_classification"


def test_the_configuration_follows_the_head_inside_a_wrapper():
    inner = bert()
    model = nn.ModuleDict({"net": inner})
    ft.replace_head(model, 9)
    assert inner.config.num_labels == inner.num_labels == 9 and inner.classifier.out_features == 9


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
        callbacks=[callback, seen],
        settings=Settings(params=ft.param_groups(model, 0.05, frozen=True), progress=False),
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
            callbacks=[ft.GradualUnfreezing(1)],
            settings=Settings(params=ft.param_groups(model, 0.1), progress=False),
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
        callbacks=[ft._Alternating(), Keep()],
        settings=Settings(params=ft.param_groups(model, 0.05, frozen=True), progress=False),
    )
    moved = [{k for k in a if not torch.equal(a[k], b[k])} for a, b in [(start, states[0]), (states[0], states[1])]]
    assert moved[0] == {"fc.weight", "fc.bias"}
    assert not moved[1] & {"fc.weight", "fc.bias"} and "conv1.weight" in moved[1]


def test_the_tuner_and_its_error_list_every_strategy():
    assert all(f'"{name}"' in ft.tune.__doc__ for name in ft.STRATEGIES)
    assert all(strategy.about for strategy in ft.STRATEGIES.values())


def test_a_strategy_of_ones_own_trains_its_patterns_at_its_rates():
    model, seen = bert(), {}

    class See:
        def on_epoch_end(self, run):
            names = {id(p): n for n, p in run.model.named_parameters()}
            seen.update({names[id(p)]: g["lr"] for g in run.optimizer.param_groups for p in g["params"]})

    ids = {"input_ids": torch.ones(4, 3, dtype=torch.long), "labels": torch.tensor([0, 1, 0, 1])}
    how = ft.Strategy(trained=("layer.2", "!output", "classifier"), layer_decay=0.5, head_lr=0.1)
    ft.tune(model, ids, how=how, lr=0.01, loss=None, callbacks=[See()])
    assert sorted(seen) == sorted(trainable(model)) and not any(".output." in n for n in seen)
    assert {seen[n] for n in seen if "layer.2" in n} == {0.01 * 0.5**2} and seen["classifier.bias"] == 0.1


class Doubling(nn.Module):
    "A stand-in for an adapter: a trained factor on a frozen layer."

    def __init__(self, base):
        super().__init__()
        self.base, self.factor = base.requires_grad_(False), nn.Parameter(torch.rand(()))

    def forward(self, x):
        return self.factor * self.base(x)


class Adapts:
    def apply(self, model):
        model.requires_grad_(False)
        model[0] = Doubling(model[0])
        return "a handle"


def test_an_object_with_apply_is_tuned_and_what_it_draws_follows_the_seed():
    data, first = (torch.rand(8, 2), torch.tensor([0, 1] * 4)), []
    for seed in (0, 1, 0):
        torch.manual_seed(7)
        model = nn.Sequential(nn.Linear(2, 2))
        state = torch.get_rng_state()
        (history,) = ft.tune(model, data, how=Adapts(), lr=1e-9, epochs=2, seed=seed)
        assert len(history) == 2 and trainable(model) == ["0.factor"] and torch.equal(state, torch.get_rng_state())
        first.append(model[0].factor.item())
    assert first[0] == first[2] != first[1]


def test_an_object_with_tune_does_it_all():
    class Own:
        def tune(self, model, train, valid=None, **options):
            return [options]

    found = ft.tune(Small(), "train", how=Own(), lr=0.1, epochs=3, seed=1)
    assert found == [{"lr": 0.1, "epochs": 3, "seed": 1}]


def test_two_stage_trains_the_head_first():
    model, states = Small(), []

    class Keep:
        def on_epoch_end(self, run):
            states.append((trainable(run.model), run.lr))

    how = ft.TwoStage(share=0.75, slower=4.0)
    first, second = ft.tune(model, batch(), batch(), how=how, lr=0.1, epochs=4, callbacks=[Keep()])
    assert [len(first), len(second)] == [3, 1] and len(trainable(model)) == len(list(model.parameters()))
    assert states == [(["fc.weight", "fc.bias"], 0.1)] * 3 + [(trainable(model), 0.025)]


class Interrupt:
    "Breaks off after so many steps, counted over all stages."

    def __init__(self, after):
        self.left = after

    def on_step_end(self, run):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def tuned(how, path, after=0, keep=True, every=1):
    "A tuned network, its callbacks, rows and trainable names; broken off after some steps and gone on with."
    for steps in (after, 0) if after else (0,):
        torch.manual_seed(steps)  # a network of a later process starts from the same weights, whatever was drawn before
        model = pretrained.SmallCNN(3, (1, 4, 4, 4))
        torch.manual_seed(0)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        kept = [Checkpoint(path, every=every, keep=keep), Interrupt(steps)]
        try:
            histories = ft.tune(
                model, batch(12), how=how, lr=0.05, epochs=4, batch_size=4, metrics="accuracy", callbacks=kept,
                settings=Settings(precision="fp32", progress=False),
            )  # fmt: skip
        except KeyboardInterrupt:
            assert steps
    rows = [{k: v for k, v in row.items() if k != "seconds"} for h in histories for row in h.rows]
    return model.state_dict(), rows, trainable(model)


@pytest.mark.parametrize("how", ["gradual", "alternating", "two-stage", "head, moving statistics"])
def test_a_run_broken_off_after_any_step_ends_as_the_unbroken_one(how, tmp_path):
    state, rows, names = tuned(how, tmp_path / "whole.pt")
    for after in (1, 3, 4, 6, 8, 11):  # epochs end after 3, 6, 9 and 12
        found, found_rows, found_names = tuned(how, tmp_path / f"{after}.pt", after)
        assert all(torch.equal(state[k], found[k]) for k in state), after
        assert (found_rows, found_names) == (rows, names), after


def test_gradual_unfreezing_remembers_what_was_open_in_the_epochs_before_a_break(tmp_path):
    plan = ft.GradualUnfreezing(1)
    for left in (8, 0):
        model = Small()
        groups, plan = ft.param_groups(model, 0.05, frozen=True), ft.GradualUnfreezing(1)
        callbacks = [plan, Checkpoint(tmp_path / "c.pt", every=1), Interrupt(left)]
        with contextlib.suppress(KeyboardInterrupt):
            fit(model, batch(12), epochs=4, batch_size=4, callbacks=callbacks, settings=Settings(params=groups))
    assert [len(names) for names in plan.opened] == [1, 2, 3, 3] and plan._model is None


@pytest.mark.parametrize("keep", [True, False])
def test_both_stages_have_files_of_their_own_that_go_when_they_are_not_to_be_kept(keep, tmp_path):
    tuned("two-stage", tmp_path / "run.pt", after=8, keep=keep)
    files = ["run.stage1.pt", "run.stage2.pt"] if keep else []
    assert sorted(p.name for p in tmp_path.iterdir()) == files


def test_report_names_what_is_trained_and_what_no_group_holds():
    model = Small()
    ft.freeze(model, depth=1)
    text = str(ft.report(model, torch.optim.SGD(ft.param_groups(model, 0.1, layer_decay=0.5))))
    assert "| conv1 | 0 |" in text and "0.05" in text and "1 batch normalizations held" in text
    lost = str(ft.report(model, torch.optim.SGD([model.fc.weight], lr=0.1)))
    assert "1 tensors in no group" in lost
    assert "learning rate" not in str(ft.report(model))


class Counting(nn.BatchNorm2d):
    "A subclass, as users write them; it must come back as what it was."


def test_held_batchnorm_keeps_subclasses_and_follows_its_module_without_weights():
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 2, 3), Counting(2), nn.BatchNorm2d(2, affine=False)), nn.Linear(2, 2)
    )
    ft.freeze(model, "1")
    assert type(model[0][1]) is Counting and model.train()[0][2].training
    assert ft.hold_batchnorm(model) == []
    ft.freeze(model, "0")
    assert isinstance(model[0][1], Counting) and type(model[0][1]) is not Counting
    assert not any(m.training for m in model.train()[0][1:])
    ft.unfreeze(model)
    assert type(model[0][1]) is Counting and type(model[0][2]) is nn.BatchNorm2d and model.train()[0][2].training


def test_pointwise_convolution_is_a_head_only_where_it_is_the_last_block():
    model = squeezenet1_1(num_classes=4).eval()
    new = ft.replace_head(model, 3)
    assert isinstance(new, nn.Conv2d) and model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def toy_images(n=12):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 255, (4 * n, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageSet(x, torch.arange(4).repeat(n), list("abcd"))


class Opened:
    "Which blocks were open in each epoch, and at which rate."

    def __init__(self):
        self.rates = []

    def on_epoch_end(self, state):
        rate = {id(p): g["lr"] for g in state.optimizer.param_groups for p in g["params"] if p.requires_grad}
        own = dict(state.model.named_parameters())
        self.rates.append([rate.get(id(own[names[0]]), 0.0) for names in ft.blocks(state.model).values()])


MAPS = {
    "head": [[0, 0, 0, 1]] * 4,
    "head, moving statistics": [[0, 0, 0, 1]] * 4,
    "last block": [[0, 0, 1, 1]] * 4,
    "gradual": [[0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]],
    "layer-wise": [[0.512, 0.64, 0.8, 1]] * 4,
    "two-stage": [[0, 0, 0, 1]] * 2 + [[0.1] * 4] * 2,
    "alternating": [[0, 0, 0, 1], [1, 1, 1, 0]] * 2,
    "full": [[1] * 4] * 4,
}


@pytest.mark.parametrize("strategy", ft.STRATEGIES)
def test_every_strategy_moves_the_blocks_at_the_rates_it_says(strategy):
    model, seen = pretrained.SmallCNN(4), Opened()
    statistics = model.body[0][1].running_mean.clone()
    histories = ft.tune(
        model, toy_images(), how=strategy, lr=1.0, epochs=4, callbacks=[seen], settings=Settings(progress=False)
    )
    assert torch.allclose(torch.tensor(seen.rates), torch.tensor(MAPS[strategy], dtype=torch.float))
    assert len(histories) == (2 if strategy == "two-stage" else 1)
    held = strategy in ("head", "last block")
    assert torch.equal(statistics, model.body[0][1].running_mean) is held


@pytest.mark.parametrize("how", ft.STRATEGIES)
def test_every_strategy_tunes_a_language_model_whose_head_is_its_embedding(how):
    model = bert(BertForMaskedLM)
    table = model.bert.embeddings.word_embeddings.weight
    assert model.cls.predictions.decoder.weight is table
    before = table.detach().clone()
    ids = torch.randint(0, 50, (4, 6), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": ids, "labels": ids}]
    ft.tune(model, batches, how=how, lr=1e-2, epochs=2, loss=None, settings=Settings(progress=False))
    kept = how in ("head", "head, moving statistics", "last block")  # it is of the first block
    assert torch.equal(before, table) == kept and model.cls.predictions.decoder.weight is table


def test_a_parameter_of_several_modules_is_of_the_block_of_its_first_name():
    cut = ft.blocks(bert(BertForMaskedLM))
    assert cut["cls"][0] == "cls.predictions.bias" and len(cut["cls"]) == 5
    assert "| cls | 354 | 0 |" in str(ft.report(bert(BertForMaskedLM)))
    twice = nn.Linear(2, 2)
    assert list(ft.blocks(nn.Sequential(twice, nn.ReLU(), nn.Linear(2, 2), twice))) == ["0", "2"]


def test_tune_refuses_what_it_does_not_know():
    for wrong in ("slow", ft.Strategy, 3, None):
        with pytest.raises(ValueError, match=r"allowed are 'head', .*'full', and objects: Strategy.*ftbook.peft.LoRA"):
            ft.tune(pretrained.SmallCNN(4), toy_images(), how=wrong, lr=1.0)
    with pytest.raises(ValueError, match="two stages needs one: give more epochs"):
        ft.tune(pretrained.SmallCNN(4), toy_images(), how="two-stage", lr=1.0, epochs=1)
    net = pretrained.SmallCNN(4)
    with pytest.raises(ValueError, match="a strategy chooses what is trained"):
        ft.tune(net, toy_images(), lr=1.0, settings=Settings(params=list(net.parameters())))


def test_the_reviews_have_as_many_of_each_class_and_so_has_a_draw():
    for part in study.reviews().values():
        assert part.y.bincount().tolist() == [len(part) // 2] * 2
    rows = study.draw(3, 5)
    assert study.reviews()["train"].y[rows].bincount().tolist() == [5, 5] and len(set(rows.tolist())) == 10
    assert torch.equal(rows, study.draw(3, 5)) and not torch.equal(rows, study.draw(4, 5))


def test_batches_hold_every_sentence_once_and_similar_lengths():
    inputs = study.coded("train")
    batches = study.ByLength(inputs, size=16, seed=0)
    first = list(batches)
    assert len(first) == len(batches) == 5 and sum(len(b["labels"]) for b in first) == 80
    rows = sorted(tuple(r) for b in first for r in b["input_ids"].tolist())
    assert rows == sorted(tuple(r) for r in inputs["input_ids"].tolist())
    spread = [float(b["attention_mask"].sum(1).float().std()) for b in first]
    assert sum(spread) / len(spread) < float(inputs["attention_mask"].sum(1).float().std())
    batches.set_epoch(1)
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, batches, strict=True))


def test_what_the_frozen_layers_give_can_be_computed_once_for_training_too():
    inputs = {k: v[:24] for k, v in study.coded("train").items()}
    whole, plan = study.classifier(0), {"lr": 1e-3, "epochs": 2, "seed": 0, "settings": study.PLAN}
    layers = len(whole.body.encoder.layer)
    upper = study.Upper(copy.deepcopy(whole))
    below = study.lower(inputs, layers - study.TOP)
    assert torch.allclose(study.outputs(upper, below), study.outputs(whole, inputs), atol=1e-5)
    top = ft.Strategy(trained=(f"layer.{layers - 2}", f"layer.{layers - 1}", "head"))
    ft.tune(whole, study.ByLength(inputs, size=8), how=top, **plan)
    ft.tune(upper, study.ByLength(below, size=8), how="full", **plan)
    assert torch.allclose(upper.head.weight, whole.head.weight, atol=1e-4)
    assert torch.allclose(study.outputs(upper, below), study.outputs(whole, inputs), atol=1e-2)


def test_one_run_of_the_study_scores_the_split_it_is_told():
    n = len(study.reviews()["valid"])
    for how in ({"method": "majority"}, {"method": "bag of words", "C": 1.0}, {"method": "probe", "C": 1.0}):
        found = study.run(0, "valid", **how)
        assert list(found) == ["accuracy"] and found["accuracy"].shape == (n,) and found["accuracy"].dtype == bool
    found = study.run(0, "test", "top layers", lr=1e-3)
    assert list(found) == ["accuracy", "shifted"] and len(found["shifted"]) == len(study.reviews()["shifted"])
    assert study.run(0, "valid", "majority")["accuracy"].mean() == 0.5


@pytest.mark.filterwarnings("ignore:.*at the edge")
def test_the_study_has_a_row_for_every_way_with_as_many_rates(tmp_path, monkeypatch):
    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path))

    def fake(seed, split, method, lr=0.0, C=0.0, per_class=1, epochs=1):
        n, shifted = (len(study.reviews()[part]) for part in (split, "shifted"))
        return {"accuracy": np.arange(n) < 2 + 1e3 * lr + C / 10, "shifted": np.arange(shifted) < 2}

    monkeypatch.setattr(study, "run", fake)
    study.main("text")
    rows = results.load_study(study.CHAPTER, "text").rows("accuracy")
    assert [r["method"] for r in rows] == [r["method"] for r in study.rows()]
    assert {r["tried"] for r in rows if "lr" in r} == {2} and {r["n"] for r in rows} == {len(study.reviews()["test"])}
    study.main("labels", "more")
    assert len(results.load_study(study.CHAPTER, "labels").rows("accuracy")) == 2 * len(study.PER_CLASS)
    many = results.load_study(study.CHAPTER, "more").rows("accuracy")
    assert [r["method"] for r in many] == ["bag of words", "probe", "full"]
    with pytest.raises(ValueError, match="no study 'rate'; use text"):
        study.main("rate")


def test_a_probe_written_into_a_head_says_what_the_logistic_regression_says():
    few = {k: v[:40] for k, v in study.coded("train").items()}
    frozen = study.below(few)
    net, h = study.Upper(study.classifier(0)), study.features(frozen)
    ft.put_probe(net.head, h, few["labels"], C=0.5)
    said = LogisticRegression(C=0.5, max_iter=2000).fit(h, few["labels"]).predict_proba(h)
    assert np.allclose(study.outputs(net, frozen).softmax(1).numpy(), said, atol=1e-4)
    assert torch.allclose(net.head.weight.sum(0), torch.zeros(h.shape[1]), atol=1e-6)


def test_a_probe_of_several_classes_is_the_logistic_regression_and_needs_them_all():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 5, generator=generator), torch.arange(60) % 3
    head = nn.Linear(5, 3)
    ft.put_probe(head, x, y, C=0.5)
    theirs = LogisticRegression(C=0.5, max_iter=2000).fit(x, y).predict_proba(x)
    assert np.allclose(head(x).softmax(1).detach(), theirs, atol=1e-5)
    with pytest.raises(ValueError, match="y has 2 classes and the head 3 outputs: give examples of every class"):
        ft.put_probe(head, x, y.clamp(max=1), C=0.5)


def test_every_way_of_the_study_tunes_and_a_probe_first_begins_where_the_probe_is():
    rows = study.draw(0)
    for method in (study.PROBED, "gradual", "layer-wise", "full"):
        assert study._tuned(0, method, 1e-4, rows)("valid").shape == (len(study.reviews()["valid"]), 2)
    still = study._tuned(0, study.PROBED, 1e-12, rows)("valid").argmax(1).numpy()
    assert (still == study._linear("probe", rows, 1.0)("valid")).mean() > 0.95


def test_the_mean_of_states_is_a_state_and_its_ends_are_the_given_ones():
    states = [{"w": torch.tensor([0.0, 2.0])}, {"w": torch.tensor([4.0, 2.0])}]
    assert study._mixed(states, [1.0, 0.0])["w"].tolist() == [0.0, 2.0]
    assert study._mixed(states, [0.75, 0.25])["w"].tolist() == [1.0, 2.0]
    assert all(sum(weights) == pytest.approx(1) for weights in study.MIXES.values())


def test_adam_without_bias_correction_is_adam_with_another_schedule():
    steps, beta1, beta2, lr = 12, 0.9, 0.999, 1e-3
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(steps, 5, generator=generator)
    w = nn.Parameter(torch.zeros(5))
    optimizer = torch.optim.AdamW([w], lr=lr, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: study._uncorrected(step, steps))
    plain, m, v = torch.zeros(5), torch.zeros(5), torch.zeros(5)
    for t, g in enumerate(gradients):
        w.grad = g.clone()
        optimizer.step()
        rate.step()
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        plain -= lr * (1 - t / steps) * m / (v.sqrt() + 1e-8)
    assert torch.allclose(w.detach(), plain, rtol=1e-4)


def test_a_repeated_run_follows_its_seed():
    plan = {"epochs": 1, "care": "none", "lr": 1e-3}
    first, again = (study._run_short(1, "valid", **plan)["accuracy"] for _ in range(2))
    assert (first == again).all() and first.shape == (len(study.reviews()["valid"]) // 2,)


def test_the_tail_continues_what_the_frozen_blocks_give():
    found = study._run_photo(0, "valid", "probe", C=1.0)
    assert list(found) == ["accuracy"] and len(found["accuracy"]) == 100
    assert list(study._run_photo(0, "test", "last block", lr=1e-3)) == ["accuracy", "noisy", "blurred"]


def test_a_text_classifier_sees_no_padding():
    body, tokenizer = pretrained.load("bert_mini_en")
    net = TextClassifier(body, 3).eval()
    texts = ["Short.", "This one has a few more words than the other one."]
    both, alone = (encode_texts(t, tokenizer) for t in (texts, texts[:1]))
    assert both["input_ids"].shape == both["attention_mask"].shape and len(alone["input_ids"]) == 1
    with torch.no_grad():
        logits = net(**both)
        assert logits.shape == (2, 3) and torch.allclose(logits[:1], net(**alone), atol=1e-5)
        embedded = net.get_input_embeddings()(both["input_ids"])
        assert torch.allclose(logits, net(attention_mask=both["attention_mask"], inputs_embeds=embedded), atol=1e-5)
    assert ft.find_head(net)[0] == "head"
    cut = encode_texts(["word " * 99], tokenizer, max_length=8)
    assert cut["input_ids"].shape == (1, 8)
