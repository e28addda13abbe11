"""Adapter files of ftbook.peft and of Hugging Face peft, read by each other, with the same outputs."""

import copy
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
    "lora-embedding": ("bert", LoRA("word_embeddings", r=2), dict(r=2, lora_alpha=16, target_modules=["word_embeddings"])),
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
