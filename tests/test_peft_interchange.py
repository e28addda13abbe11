"""Adapter files of ftbook.peft and of Hugging Face peft, read by each other, with the same outputs."""

import copy
import json
import time
import warnings

import pytest
import torch
from torch import nn

from ftbook import peft
from ftbook.peft import IA3, DoRA, LoRA

hf = pytest.importorskip("peft")


def bert(cls="BertForTokenClassification", labels=4):
    import transformers

    torch.manual_seed(0)
    sizes = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    config = transformers.BertConfig(**sizes, max_position_embeddings=24, num_labels=labels)
    return getattr(transformers, cls)(config).eval()


def gpt():
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=24, num_labels=4)
    return transformers.GPT2ForTokenClassification(config).eval()


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1, stride=2), nn.Conv2d(6, 8, 1)
        self.lin1, self.classifier = nn.Linear(8, 10), nn.Linear(10, 4)

    def forward(self, x):
        return self.classifier(self.lin1(self.conv2(self.conv1(x)).mean((2, 3))))


MODELS = {"bert": bert, "gpt2": gpt, "cnn": lambda: Conv().eval()}
FULL = dict(bert=["query", "dense"], gpt2=["c_attn", "c_fc"], cnn=["conv1", "conv2", "lin1"])
CASES = {
    "lora-bert": ("bert", LoRA(FULL["bert"], r=3, alpha=5), dict(r=3, lora_alpha=5)),
    "lora-gpt2": ("gpt2", LoRA(FULL["gpt2"], r=3, alpha=5), dict(r=3, lora_alpha=5, fan_in_fan_out=True)),
    "lora-cnn": ("cnn", LoRA(FULL["cnn"], r=2, alpha=5), dict(r=2, lora_alpha=5)),
    "lora-embedding": (
        "bert",
        LoRA("word_embeddings", r=2),
        dict(r=2, lora_alpha=16, target_modules=["word_embeddings"]),
    ),
    "rslora-bert": ("bert", LoRA(FULL["bert"], r=4, rslora=True), dict(r=4, lora_alpha=16, use_rslora=True)),
    "dora-bert": ("bert", DoRA(FULL["bert"], r=3), dict(r=3, lora_alpha=16, use_dora=True)),
    "dora-cnn": ("cnn", DoRA(FULL["cnn"], r=2), dict(r=2, lora_alpha=16, use_dora=True)),
    "dora-embedding": (
        "bert",
        DoRA("word_embeddings", r=2),
        dict(r=2, lora_alpha=16, use_dora=True, target_modules=["word_embeddings"]),
    ),
    "ia3-bert": (
        "bert",
        IA3(("key", "value", "output.dense"), ("output.dense",)),
        dict(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]),
    ),
    "ia3-gpt2": (
        "gpt2",
        IA3(("c_attn", "mlp.c_proj"), ("mlp.c_proj",)),
        dict(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True),
    ),
    "ia3-cnn": (
        "cnn",
        IA3(FULL["cnn"], ("conv2",)),
        dict(target_modules=FULL["cnn"], feedforward_modules=["conv2"]),
    ),
}


def out(model, base):
    g = torch.Generator().manual_seed(2)
    if base == "cnn":
        return model(torch.randn(3, 3, 8, 8, generator=g))
    return model(input_ids=torch.randint(1, 40, (3, 6), generator=g)).logits


def stir(parameters):
    torch.manual_seed(7)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.3 * torch.randn_like(p))


def theirs(case):
    base, method, options = CASES[case]
    config = (hf.IA3Config if isinstance(method, IA3) else hf.LoraConfig)(
        **{"target_modules": FULL[base], "modules_to_save": ["classifier"]} | options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = hf.get_peft_model(MODELS[base](), config).eval()
    stir(p for p in model.parameters() if p.requires_grad)
    return model


@pytest.mark.parametrize("case", CASES)
def test_ours_read_by_theirs(case, tmp_path):
    base, method, _ = CASES[case]
    model = MODELS[base]()
    adapter = peft.apply(model, method, head="classifier")
    stir(adapter.parameters())
    expected = out(model, base)
    adapter.save(tmp_path)
    other = MODELS[base]()
    nn.init.normal_(other.classifier.weight)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        loaded = hf.PeftModel.from_pretrained(other, str(tmp_path)).eval()
    assert not [str(w.message) for w in seen if "missing" in str(w.message) or "Unexpected" in str(w.message)]
    assert torch.allclose(out(loaded, base), expected, atol=1e-5)
    assert torch.allclose(out(adapter.merge().model, base), expected, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_theirs_read_by_ours(case, tmp_path):
    base, method, _ = CASES[case]
    model = theirs(case)
    expected = out(model, base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(tmp_path))
    other = MODELS[base]()
    nn.init.normal_(other.classifier.weight)
    adapter = peft.load(other, tmp_path)
    assert type(adapter.method) is type(method) and adapter.heads == ["classifier"]
    assert torch.allclose(out(other, base), expected, atol=1e-5)
    assert torch.allclose(out(adapter.merge().model, base), expected, atol=1e-5)


def test_task_types_name_the_head(tmp_path):
    model = hf.get_peft_model(bert(), hf.LoraConfig(task_type="TOKEN_CLS", r=2, target_modules=["query"])).eval()
    stir(p for p in model.parameters() if p.requires_grad)
    model.save_pretrained(str(tmp_path))
    other = bert()
    adapter = peft.load(other, tmp_path)
    assert adapter.heads == ["classifier"]
    assert torch.allclose(out(other, "bert"), out(model, "bert"), atol=1e-5)


def test_gradients_equal_theirs():
    """One step from the same start gives the same gradients."""
    for case in ("lora-bert", "dora-bert", "ia3-bert", "lora-cnn"):
        base = CASES[case][0]
        model = theirs(case)
        ours = copy.deepcopy(MODELS[base]())
        adapter = peft.apply(ours, CASES[case][1], head="classifier")
        known = {
            n.removeprefix("base_model.model.").replace(".default", "").replace(".modules_to_save", ""): p
            for n, p in model.named_parameters()
            if p.requires_grad
        }
        for path, layer in adapter.layers.items():
            for key, tensor in layer.tensors().items():
                wanted = known.get(f"{path}.{key}", known.get(f"{path}.{key}.weight"))
                tensor.copy_(wanted.detach())
        out(model, base).square().mean().backward()
        out(ours, base).square().mean().backward()
        a = torch.cat([p.grad.flatten() for _, p in sorted(known.items())]).norm()
        b = torch.cat([p.grad.flatten() for p in adapter.parameters()]).norm()
        assert torch.allclose(a, b, rtol=1e-4), case


def kept(model, folder, **options):
    """An adapter of peft in a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder), **options)
    return folder


def peft_of(base, config, size=0.3):
    """A model with an adapter of peft whose tensors are no longer those of the start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = hf.get_peft_model(base, config).eval()
    torch.manual_seed(7)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(size * torch.randn_like(p))
    return model


def state(model):
    return [(n, p.clone(), p.requires_grad) for n, p in model.named_parameters()]


def unchanged(model, before):
    now = dict(model.named_parameters())
    return not peft._wrappers(model) and all(torch.equal(now[n], p) and now[n].requires_grad == r for n, p, r in before)


STARTS = {
    "pissa-bert": ("bert", dict(init_lora_weights="pissa", target_modules=["query", "dense", "word_embeddings"])),
    "pissa-gpt2": ("gpt2", dict(init_lora_weights="pissa", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    "pissa-dora": ("bert", dict(init_lora_weights="pissa", target_modules=["query"], use_dora=True)),
    "pissa-rslora": ("bert", dict(init_lora_weights="pissa", target_modules=["query"], use_rslora=True)),
    "olora-bert": ("bert", dict(init_lora_weights="olora", target_modules=["query", "dense"])),
    "olora-rslora": ("bert", dict(init_lora_weights="olora", target_modules=["value"], use_rslora=True)),
}


@pytest.mark.parametrize("case", STARTS)
def test_an_adapter_that_began_as_a_part_of_the_base_computes_what_it_computes_in_peft(case, tmp_path):
    which, options = STARTS[case]
    make = MODELS[which]
    config = hf.LoraConfig(r=3, lora_alpha=5, modules_to_save=["classifier"], **options)
    kept(peft_of(make(), config), tmp_path / "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = out(hf.PeftModel.from_pretrained(make(), str(tmp_path / "theirs")).eval(), which)
    model = make()
    before, start = state(model), out(model, which)
    adapter = peft.load(model, tmp_path / "theirs")
    assert (out(model, which) - start).abs().max() > 0.1
    assert torch.allclose(out(model, which), expected, atol=1e-5)
    assert adapter.method.r == 6 and adapter.method.scale == pytest.approx(5 / (3**0.5 if "rslora" in case else 3))
    assert torch.allclose(out(adapter.merge().model, which), expected, atol=1e-5)
    adapter.unmerge()
    with adapter.disable():
        assert torch.equal(out(model, which), start)
    adapter.save(tmp_path / "ours")  # an ordinary LoRA on the base as it is, for both
    again = hf.PeftModel.from_pretrained(make(), str(tmp_path / "ours")).eval()
    assert torch.allclose(out(again, which), expected, atol=1e-5)
    adapter.remove()
    assert unchanged(model, before)


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", "eva", "mica", False])
def test_a_start_that_leaves_the_base_alone_is_read(start, tmp_path):
    model = peft_of(bert(), hf.LoraConfig(r=2, target_modules=["query"]))
    kept(model, tmp_path)
    rewrite(tmp_path, init_lora_weights=start)
    other = bert()
    peft.load(other, tmp_path)
    assert torch.allclose(out(other, "bert"), out(model, "bert"), atol=1e-5)


def rewrite(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("start", ["pissa_niter_4", "loftq", "corda", "lora_ga", "something new"])
def test_a_start_that_changed_the_base_beyond_repeating_is_refused(start, tmp_path):
    kept(peft_of(bert(), hf.LoraConfig(r=2, target_modules=["query"])), tmp_path)
    rewrite(tmp_path, init_lora_weights=start)
    model = bert()
    before = state(model)
    with pytest.raises(ValueError, match=f"init_lora_weights={start!r}.*path_initial_model_for_weight_conversion"):
        peft.load(model, tmp_path)
    assert unchanged(model, before)


def test_a_start_on_layers_where_peft_does_otherwise_is_refused(tmp_path):
    model = peft_of(gpt(), hf.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    kept(model, tmp_path)
    rewrite(tmp_path, init_lora_weights="olora")
    with pytest.raises(ValueError, match="olora.*Conv1D.*weight_conversion"):
        peft.load(gpt(), tmp_path)
    adapter = peft.apply(gpt(), LoRA("c_attn", r=2, alpha=8), head=())
    with pytest.raises(ValueError, match="use peft.load"):
        adapter.load(tmp_path)


@pytest.mark.parametrize("changes", [dict(lora_alpha=9), dict(use_rslora=True), dict(use_dora=True)])
def test_a_file_of_another_method_is_not_read_into_an_adapter(changes, tmp_path):
    adapter = peft.apply(bert(), LoRA("query", r=2, alpha=8), head=())
    stir(adapter.parameters())
    adapter.save(tmp_path)
    start = [p.clone() for p in adapter.parameters()]
    assert adapter.load(tmp_path) is adapter
    rewrite(tmp_path, **changes)
    with pytest.raises(ValueError, match="use peft.load"):
        adapter.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), start, strict=True))


def wide(labels=4, **changes):
    """A BERT whose vocabulary has grown."""
    model = bert(**changes)
    torch.manual_seed(5)
    model.resize_token_embeddings(50)
    return model


@pytest.mark.parametrize("cls", ["BertForTokenClassification", "BertForMaskedLM"])
def test_an_embedding_that_peft_saved_whole_comes_along(cls, tmp_path):
    model = peft_of(wide(cls=cls), hf.LoraConfig(r=2, target_modules=["query"]))
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_()
    kept(model, tmp_path, save_embedding_layers=True)
    other = wide(cls=cls)
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(1.0)
    before, start = state(other), out(other, "bert")
    adapter = peft.load(other, tmp_path)
    assert torch.allclose(out(other, "bert"), out(model, "bert"), atol=1e-5)
    assert "bert.embeddings.word_embeddings" in adapter.heads
    adapter.save(tmp_path / "again")
    third = wide(cls=cls)
    peft.load(third, tmp_path / "again")
    assert torch.allclose(out(third, "bert"), out(model, "bert"), atol=1e-5)
    adapter.remove()
    assert unchanged(other, before) and torch.equal(out(other, "bert"), start)
    with pytest.raises(ValueError, match=r"has shape \(50, 16\) in the file.*resize_token_embeddings\(50\)"):
        peft.load(bert(cls=cls), tmp_path)


def test_an_adapted_embedding_with_another_base_is_refused_with_the_cure(tmp_path):
    model = peft_of(wide(), hf.LoraConfig(r=2, target_modules=["word_embeddings"]))
    kept(model, tmp_path, save_embedding_layers=True)
    other = wide()
    peft.load(other, tmp_path)  # the file's copy is the model's own
    assert torch.allclose(out(other, "bert"), out(model, "bert"), atol=1e-5)
    with pytest.raises(ValueError, match=r"resize_token_embeddings\(50\)"):
        peft.load(bert(), tmp_path)
    other = wide()
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(1.0)
    before = state(other)
    with pytest.raises(ValueError, match=r"Copy it into the model first: (.*\))$") as error:
        peft.load(other, tmp_path)
    assert unchanged(other, before)
    cure = str(error.value).split("first: ")[1]
    import safetensors.torch

    eval(cure, {"model": other, "safetensors": safetensors})
    peft.load(other, tmp_path)
    assert torch.allclose(out(other, "bert"), out(model, "bert"), atol=1e-5)


def test_several_saved_modules_and_names_that_match_several(tmp_path):
    config = hf.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier", "LayerNorm"])
    model = peft_of(bert(), config)
    kept(model, tmp_path)
    other = bert()
    adapter = peft.load(other, tmp_path)
    assert len(adapter.heads) == 6 and sum(h.endswith("LayerNorm") for h in adapter.heads) == 5
    assert torch.allclose(out(other, "bert"), out(model, "bert"), atol=1e-5)
    third = bert()
    ours = peft.apply(third, LoRA("query", r=2), head=("classifier", "LayerNorm"))
    assert ours.heads == adapter.heads
    stir(ours.parameters())
    expected = out(third, "bert")
    ours.save(tmp_path / "ours")
    again = hf.PeftModel.from_pretrained(bert(), str(tmp_path / "ours")).eval()
    assert torch.allclose(out(again, "bert"), expected, atol=1e-5)


class Deep(nn.Module):
    """A head of two layers, and another module whose name ends as the head's does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.my_classifier = nn.Linear(4, 6), nn.Linear(6, 6)
        self.classifier = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))

    def forward(self, x):
        return self.classifier(self.my_classifier(self.body(x)))


def test_a_saved_module_with_modules_inside_is_one_head(tmp_path):
    model = peft_of(Deep(), hf.LoraConfig(r=2, target_modules=["body"], modules_to_save=["classifier"]))
    kept(model, tmp_path)
    other, x = Deep(), torch.randn(3, 4)
    adapter = peft.load(other, tmp_path)
    assert adapter.heads == ["my_classifier", "classifier"]  # peft goes by the end of a name
    assert torch.allclose(other(x), model(x), atol=1e-6)


def test_adapters_of_compiled_models(tmp_path):
    compiled = torch.compile(bert(), backend="eager")
    model = peft_of(compiled, hf.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]))
    kept(model, tmp_path / "theirs")
    expected = out(model.base_model.model._orig_mod, "bert")
    for other in (bert(), torch.compile(bert(), backend="eager")):
        adapter = peft.load(other, tmp_path / "theirs")
        assert torch.allclose(out(other, "bert"), expected, atol=1e-5)
        adapter.save(tmp_path / "ours")
        again = hf.PeftModel.from_pretrained(bert(), str(tmp_path / "ours")).eval()
        assert torch.allclose(out(again, "bert"), expected, atol=1e-5)
        assert peft.handle(other).remove() is adapter.model


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.three = nn.Conv1d(2, 4, 3), nn.Conv3d(2, 4, 3)
        self.some, self.lin = nn.Conv2d(4, 4, 3, groups=2), nn.Linear(4, 2)


@pytest.mark.parametrize(("name", "what"), [("one", "a Conv1d"), ("three", "a Conv3d"), ("some", "groups=2")])
def test_layers_that_are_not_known_are_named(name, what, tmp_path):
    kept(peft_of(Layers(), hf.LoraConfig(r=2, target_modules=[name, "lin"])), tmp_path)
    model = Layers()
    before = state(model)
    with pytest.raises(ValueError, match=f"{name} is .*{what}.*LoRA cannot adapt; it knows nn.Linear"):
        peft.load(model, tmp_path)
    assert unchanged(model, before)


def test_multihead_attention_of_peft_is_refused(tmp_path):
    make = lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)  # noqa: E731
    kept(peft_of(make(), hf.LoraConfig(r=2, target_modules=["self_attn", "linear1"])), tmp_path)
    with pytest.raises(ValueError, match="self_attn is a MultiheadAttention, which LoRA cannot adapt"):
        peft.load(make(), tmp_path)
    adapter = peft.apply(make(), LoRA("linear1", r=2))
    adapter.save(tmp_path / "ours")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "ours" / "adapter_model.safetensors"
    tensors = {k.replace("linear1", "self_attn.out_proj"): t for k, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match="output layer, which is never called"):
        peft.load(make(), tmp_path / "ours")


OTHERS = {
    "PROMPT_TUNING": lambda: hf.PromptTuningConfig(task_type="TOKEN_CLS", num_virtual_tokens=3),
    "PREFIX_TUNING": lambda: hf.PrefixTuningConfig(task_type="TOKEN_CLS", num_virtual_tokens=3),
    "VERA": lambda: hf.VeraConfig(r=2, target_modules=["query"]),
}


@pytest.mark.parametrize("which", OTHERS)
def test_methods_of_peft_that_are_not_known_are_named(which, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept(hf.get_peft_model(bert(), OTHERS[which]()), tmp_path)
    with pytest.raises(ValueError, match=f"method '{which}', which ftbook does not know; it reads LORA, IA3"):
        peft.load(bert(), tmp_path)


@pytest.mark.parametrize(
    "changes", [dict(rank_pattern={"query": 4}), dict(bias="all"), dict(kasa_config={"a": 1}), dict(new_option="x")]
)
def test_options_of_peft_that_are_not_known_are_named(changes, tmp_path):
    kept(peft_of(bert(), hf.LoraConfig(r=2, target_modules=["query"])), tmp_path)
    rewrite(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"option {next(iter(changes))}=.*does not know; load the adapter with"):
        peft.load(bert(), tmp_path)


def test_some_layers_only_is_read(tmp_path):
    model = peft_of(bert(), hf.LoraConfig(r=2, target_modules=["query"], layers_to_transform=[1]))
    kept(model, tmp_path)
    other = bert()
    assert list(peft.load(other, tmp_path).layers) == ["bert.encoder.layer.1.attention.self.query"]
    assert torch.allclose(out(other, "bert"), out(model, "bert"), atol=1e-5)


def test_inner_modules_named_by_an_expression_are_known_by_their_shapes(tmp_path):
    options = dict(target_modules=r".*(key|value|output\.dense)", feedforward_modules=r".*output\.dense")
    model = peft_of(bert(), hf.IA3Config(**options))
    kept(model, tmp_path)
    assert isinstance(json.loads((tmp_path / "adapter_config.json").read_text())["feedforward_modules"], str)
    other = bert()
    adapter = peft.load(other, tmp_path)
    assert all(layer.inside == name.endswith("output.dense") for name, layer in adapter.layers.items())
    assert torch.allclose(out(other, "bert"), out(model, "bert"), atol=1e-5)
    model = peft_of(Conv(), hf.IA3Config(target_modules="conv2", feedforward_modules="conv2"))
    kept(model, tmp_path / "cnn")
    with pytest.raises(ValueError, match="do not show whether conv2 is one"):
        peft.load(Conv(), tmp_path / "cnn")
    rewrite(tmp_path / "cnn", feedforward_modules=["conv2"])
    other = Conv().eval()
    peft.load(other, tmp_path / "cnn")
    assert torch.allclose(out(other, "cnn"), out(model, "cnn"), atol=1e-5)


SLOW = "(([a-z]|\\.|\\d)+)+!"


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("all-linear", {"r": 5}),  # without a task type the classifier of 4 rows, too
        ("all-linear", {"r": 5, "use_dora": True}),
        ("query", {"r": 12, "init_lora_weights": "pissa"}),  # 24 here, on 16 rows
        ("query", {"r": 12, "init_lora_weights": "olora"}),
    ],
)
def test_a_file_has_its_modules_and_its_rank_whatever_they_are(target, options, tmp_path):
    config = hf.LoraConfig(target_modules=target if target == "all-linear" else [target], **options)
    model = hf.get_peft_model(bert(), config).eval()
    stir(p for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path / "theirs")
    ours, again = bert(), bert()
    adapter = peft.load(ours, tmp_path / "theirs")
    assert ("classifier" in adapter.layers) == (target == "all-linear")
    peft.load(again, adapter.save(tmp_path / "ours"))
    for loaded in (ours, again, adapter.merge().model):
        assert torch.allclose(out(loaded, "bert"), out(model, "bert"), atol=1e-5)


@pytest.mark.parametrize("field", ["feedforward_modules", "modules_to_save", "target_modules"])
def test_an_expression_in_a_file_is_never_run(field, tmp_path):
    kept(peft_of(bert(), hf.IA3Config(target_modules=["key"], feedforward_modules=[])), tmp_path)
    rewrite(tmp_path, **{field: SLOW})
    other = bert()
    start = time.perf_counter()
    assert len(peft.load(other, tmp_path).layers) == 2
    assert time.perf_counter() - start < 5
