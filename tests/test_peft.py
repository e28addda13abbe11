"""Invariants of ftbook.peft: every method, on every model that it fits, in every dtype."""

import copy
import json
import os
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.utils import prune

from ftbook import finetune, peft, results
from ftbook.finetune import select
from ftbook.peft import IA3, BitFit, DoRA, Houlsby, LoRA, Pfeiffer, PrefixTuning, PromptTuning
from ftbook.studies import peft as study
from ftbook.train import Settings

EVERY = "*"  # layer that the method fits, outside of the head


class Conv(nn.Module):
    """A small CNN with BatchNorm and dropout."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, stride=2)
        self.bn = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=2, dilation=2, padding_mode="circular", bias=False)
        self.drop = nn.Dropout(0.3)
        self.lin1 = nn.Linear(8, 10)
        self.classifier = nn.Linear(10, 4)

    def forward(self, x):
        h = self.conv2(F.relu(self.bn(self.conv1(x)))).mean((2, 3))
        return self.classifier(F.relu(self.lin1(self.drop(h))))


class Bag(nn.Module):
    """An embedding and two linear layers, the second without bias."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(11, 6, padding_idx=0)
        self.lin1 = nn.Linear(6, 7, bias=False)
        self.norm = nn.LayerNorm(7)
        self.classifier = nn.Linear(7, 4)

    def forward(self, ids):
        return self.classifier(self.norm(self.lin1(self.emb(ids)).mean(1)))


def bert(cls="BertForTokenClassification", seed=0, **changes):
    import transformers

    torch.manual_seed(seed)
    sizes = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    more = dict(max_position_embeddings=24, num_labels=4, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    return getattr(transformers, cls)(transformers.BertConfig(**sizes | more | changes))


def gpt():
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=24, num_labels=4)
    return transformers.GPT2ForTokenClassification(config)


def make(name, dtype=torch.float32, mode="eval"):
    torch.manual_seed(0)
    model = {"cnn": Conv, "bag": Bag, "bert": bert, "gpt2": gpt}[name]().to(dtype)
    for module in model.modules():  # a fresh LayerNorm or bias hides mistakes
        if getattr(module, "bias", None) is not None and module.bias.is_floating_point():
            nn.init.normal_(module.bias, std=0.3)
    return model.train(mode == "train")


def inputs(name, dtype=torch.float32, n=3):
    g = torch.Generator().manual_seed(1)
    if name == "cnn":
        return {"x": torch.randn(n, 3, 8, 8, generator=g).to(dtype)}
    ids = torch.randint(1, 11, (n, 6), generator=g)
    if name == "bag":
        return {"ids": ids}
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def run(model, name, dtype=torch.float32):
    out = model(**inputs(name, dtype))
    return getattr(out, "logits", out)


METHODS = {
    "lora": LoRA("all-linear", r=2),
    "lora_all": LoRA(EVERY, r=2, alpha=3, rslora=True),
    "dora": DoRA(EVERY, r=2),
    "ia3": IA3(EVERY, feedforward="*[a-z][12en]"),
    "bitfit": BitFit(),
    "houlsby": Houlsby(EVERY, size=3),
    "pfeiffer": Pfeiffer(size=3),
    "prompt": PromptTuning(length=3),
    "prefix": PrefixTuning(length=3),
}
PROMPTS = ("prompt", "prefix")
MERGEABLE = ("lora", "lora_all", "dora", "ia3", "bitfit")
PAIRS = [(m, "bert") for m in METHODS]
PAIRS += [(m, b) for m in METHODS for b in ("cnn", "bag") if m not in (*PROMPTS, "pfeiffer")]
PAIRS += [(m, "gpt2") for m in ("lora_all", "dora", "ia3")]
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
each = pytest.mark.parametrize(("method", "base"), PAIRS)


def put(model, method, **kwargs):
    return peft.apply(model, METHODS[method], **{"head": "classifier"} | kwargs)


def stir(adapter, seed=3, size=0.3):
    """Move every trained parameter away from its start."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(size * torch.randn_like(p))
    return adapter


@each
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_step_zero_equals_the_base(method, base, dtype):
    model = make(base, dtype)
    before = run(model, base, dtype)
    put(model, method)
    after = run(model, base, dtype)
    assert after.shape == before.shape and after.dtype == before.dtype
    assert torch.equal(after, before) == (method not in PROMPTS)


@each
def test_dropout_of_the_base_is_drawn_as_before(method, base):
    model = make(base, mode="train")
    if base == "cnn":
        model.bn.eval()
    torch.manual_seed(5)
    before = run(model, base)
    put(model, method)
    torch.manual_seed(5)
    after = run(model, base)
    assert method in PROMPTS or torch.equal(after, before)
    assert any(m.training and isinstance(m, nn.Dropout) for m in model.modules()) or base == "bag"


@each
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_only_the_adapter_moves(method, base, dtype):
    model = make(base, dtype, "train")
    frozen = {id(t): (t, t.clone()) for t in [*model.parameters(), *model.buffers()]}
    adapter = put(model, method)
    mine = {id(p) for p in adapter.parameters()}
    assert mine == {id(p) for p in model.parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)
    start = {n: p.clone() for n, p in adapter.named_parameters()}
    for _ in range(3):
        model.train()
        run(model, base, dtype).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(t, copy) and t.grad is None for t, copy in frozen.values())
    assert len(optimizer.state) == len(mine)
    still = [n for n, p in adapter.named_parameters() if torch.equal(p, start[n])]
    assert not still, still


@each
@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_equals_unmerged(method, base, dtype):
    model = make(base, dtype)
    adapter = stir(put(model, method))
    if method not in MERGEABLE:
        with pytest.raises(TypeError, match="does not merge"):
            adapter.merge()
        assert not adapter.merged
        return
    modules = dict(model.named_modules())
    weights = {n: p.clone() for n, p in model.named_parameters()}
    apart = run(model, base, dtype)
    merged = run(adapter.merge().model, base, dtype)
    size = apart.float().abs().max()
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.1}[dtype]
    assert (merged - apart).abs().max() <= tolerance * max(1, size)
    assert torch.equal(run(adapter.merge().model, base, dtype), merged)
    adapter.unmerge().unmerge()
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert torch.equal(run(model, base, dtype), apart)


@each
def test_disable_restores_the_base(method, base):
    model = make(base)
    before = run(model, base)
    adapter = stir(put(model, method))
    adapted = run(model, base)
    assert not torch.allclose(adapted, before)
    with adapter.disable() as inside:
        assert inside is model and torch.equal(run(model, base), before)
    assert torch.equal(run(model, base), adapted)
    if method in MERGEABLE:
        merged = run(adapter.merge().model, base)
        with adapter.disable():
            assert torch.equal(run(model, base), before)
        assert adapter.merged and torch.equal(run(model, base), merged)


@each
def test_remove_gives_the_original_back(method, base):
    model = make(base, mode="train")
    model.classifier.bias.requires_grad_(False)
    modules, types = dict(model.named_modules()), [type(m) for m in model.modules()]
    state = [(n, p, p.clone(), p.requires_grad) for n, p in model.named_parameters()]
    attributes = set(model.__dict__)
    stir(put(model, method)).remove()
    assert dict(model.named_modules()) == modules and [type(m) for m in model.modules()] == types
    now = dict(model.named_parameters())
    assert all(now[n] is p and torch.equal(p, c) and p.requires_grad == r for n, p, c, r in state)
    assert set(model.__dict__) == attributes and all(m.training for m in model.modules())


@pytest.mark.parametrize(("method", "base"), [p for p in PAIRS if p[0] in MERGEABLE])
def test_merged_and_removed_is_a_plain_model(method, base):
    model = make(base)
    names = [n for n, _ in model.named_parameters()]
    adapter = stir(put(model, method))
    expected = run(model, base)
    adapter.remove(keep_merged=True)
    assert [n for n, _ in model.named_parameters()] == names
    assert torch.allclose(run(model, base), expected, atol=2e-5)
    assert all(p.requires_grad for p in model.parameters())


def test_lora_is_absorbed_in_place_but_never_into_a_tensor_that_others_hold():
    free, tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    for model, shared in ((free, False), (tied, True)):
        before, x = model[0].weight, torch.randn(3, 4)
        old, other = before.clone(), model[1].weight.clone()
        adapter = stir(peft.apply(model, LoRA(target="0", r=2)))
        expected = model(x)
        adapter.remove(keep_merged=True)
        assert torch.allclose(model(x), expected, atol=1e-6) and not torch.equal(model[0].weight, old)
        assert torch.equal(model[1].weight, other) and (model[0].weight is before) != shared
        assert all(p.requires_grad for p in model.parameters())


def test_a_tensor_that_the_model_itself_holds_is_not_changed_in_place():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.twin = model[0].weight
    old = model.twin.clone()
    stir(peft.apply(model, LoRA(target="0", r=2))).remove(keep_merged=True)
    assert torch.equal(model.twin, old) and not torch.equal(model[0].weight, old)


def test_what_cannot_be_absorbed_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    peft.quantize(model, bits=4, target="1")
    adapter, first = stir(peft.apply(model, LoRA(target=("0", "1"), r=2))), model[0].base.weight.clone()
    with pytest.raises(TypeError, match="quantized"):
        adapter.remove(keep_merged=True)
    assert torch.equal(model[0].base.weight, first) and not adapter.merged


@each
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_save_and_load_with_the_head(method, base, dtype, tmp_path):
    model = make(base, dtype)
    adapter = stir(put(model, method))
    expected = run(model, base, dtype)
    files = {f.name for f in adapter.save(tmp_path / "new" / "folder").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    other = make(base, dtype)
    nn.init.normal_(other.classifier.weight)  # a fresh head, as after from_pretrained
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*other weights")
        loaded = peft.load(other, tmp_path / "new" / "folder", "again")
    assert torch.equal(run(other, base, dtype), expected)
    assert loaded.heads == ["classifier"] and type(loaded.method) is type(METHODS[method])
    stir(loaded, seed=9)
    assert not torch.equal(run(other, base, dtype), expected)
    assert torch.equal(run(loaded.load(tmp_path / "new" / "folder").model, base, dtype), expected)


@each
def test_deepcopy_and_state_dict(method, base):
    model = make(base)
    adapter = stir(put(model, method))
    expected = run(model, base)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, base), expected)
    stir(peft.handle(twin))
    assert not torch.equal(run(twin, base), expected) and torch.equal(run(model, base), expected)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(run(twin, base), expected)
    peft.handle(twin).remove()
    assert not peft._wrappers(twin) and peft._wrappers(model)
    assert adapter.counts() == peft.handle(model).counts()


COMPILED = [("lora", "bert"), ("prefix", "bert")]
COMPILED += [(m, "cnn") for m in ("lora_all", "dora", "ia3", "bitfit", "houlsby")]


@pytest.mark.parametrize(("method", "base"), COMPILED)
def test_an_adapted_model_compiles(method, base):
    model = make(base)
    if base == "bert":
        del model.bert.encoder.layer[1]
    stir(put(model, method))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.allclose(run(compiled, base), run(model, base), atol=1e-5)
    run(model, base).square().mean().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    run(compiled, base).square().mean().backward()
    assert expected
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[n], expected[n], atol=1e-5) for n in expected)


def _ddp(rank, size, port, queue):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    model = make("cnn", mode="train")
    adapter = put(model, "lora_all")
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.5)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(rank))
    for _ in range(2):
        optimizer.zero_grad()
        model.drop.eval()
        wrapped(x).square().mean().backward()
        optimizer.step()
    if rank == 0:
        queue.put({n: p.detach().tolist() for n, p in adapter.named_parameters()})
    torch.distributed.destroy_process_group()


def test_an_adapter_trains_in_distributed_data_parallel():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = torch.multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    jobs = [context.Process(target=_ddp, args=(rank, 2, port, queue)) for rank in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0, 0]
    found = queue.get()
    model = make("cnn", mode="train")
    adapter = put(model, "lora_all")
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.5)
    x = torch.cat([torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(rank)) for rank in range(2)])
    for _ in range(2):
        optimizer.zero_grad()
        model.drop.eval()
        model(x).square().mean().backward()
        optimizer.step()
    for n, p in adapter.named_parameters():
        assert torch.allclose(p, torch.tensor(found[n]), atol=1e-5), n


def test_several_adapters_switched_by_name(tmp_path):
    model = make("bert")
    base = run(model, "bert")
    outputs, handles = {}, {}
    for seed, (name, method) in enumerate({"ner": "lora", "tone": "ia3", "other": "prefix"}.items()):
        handles[name] = stir(put(model, method, name=name), seed)
        outputs[name] = run(model, "bert")
    for name in ("ner", "other", "tone", "ner"):
        handles[name].activate()
        assert torch.equal(run(model, "bert"), outputs[name])
        assert {id(p) for p in handles[name].parameters()} == {id(p) for p in model.parameters() if p.requires_grad}
        with handles[name].disable():
            assert torch.equal(run(model, "bert"), base)
    handles["ner"].merge()
    with pytest.raises(ValueError, match="merged"):
        handles["tone"].activate()
    with pytest.raises(ValueError, match="merged"):
        put(model, "lora", name="late")
    with pytest.raises(ValueError, match="other, tone|tone, other"):
        handles["ner"].remove(keep_merged=True)
    handles["tone"].remove()
    assert handles["ner"].merged
    assert torch.allclose(run(model, "bert"), outputs["ner"], atol=1e-5)
    handles["ner"].remove()
    assert torch.equal(run(model, "bert"), base) and list(model.peft_adapters) == ["other"]
    with pytest.raises(ValueError, match="it has: other"):
        peft.handle(model, "ner")
    handles["other"].activate().remove()
    assert not hasattr(model, "peft_adapters")
    with pytest.raises(ValueError, match="it has: none"):
        peft.handle(model)


def test_tied_embedding_is_untied_while_merged():
    model = bert("BertForMaskedLM").eval()
    adapter = stir(peft.apply(model, LoRA("word_embeddings", r=2), head=()))
    ids = inputs("bert")
    expected = model(**ids).logits
    merged = adapter.merge().model(**ids).logits
    assert torch.allclose(merged, expected, atol=1e-5)
    adapter.unmerge()
    assert model.get_output_embeddings().weight is model.bert.embeddings.word_embeddings.base.weight


def test_shared_module_is_adapted_once():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    adapter = stir(peft.apply(model, LoRA(("0", "2"), r=2)))
    x = torch.randn(5, 4)
    low = adapter.layers["0"]
    once = lambda h: shared(h) + 8 * h @ low.lora_A.T @ low.lora_B.T  # noqa: E731
    assert len(adapter.layers) == 1 and torch.allclose(model(x), once(F.relu(once(x))), atol=1e-5)
    adapter.remove()
    assert model[0] is shared and model[2] is shared


@settings(max_examples=25, deadline=None)
@given(
    n_in=st.integers(1, 9), n_out=st.integers(1, 9), rows=st.integers(1, 5), seed=st.integers(0, 99),
    bias=st.booleans(), data=st.data(),
)  # fmt: skip
def test_custom_function_equals_autograd(n_in, n_out, rows, seed, bias, data):
    torch.manual_seed(seed)
    r = data.draw(st.integers(1, min(n_in, n_out)))
    base = nn.Linear(n_in, n_out, bias, dtype=torch.float64).requires_grad_(False)
    A, B = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((r, n_in), (n_out, r)))
    x = torch.randn(2, rows, n_in, dtype=torch.float64, requires_grad=True)
    call = lambda x, A, B: peft._fused(x, A, B, base, 1.7)  # noqa: E731
    plain = F.linear(x, base.weight, base.bias) + 1.7 * x @ A.T @ B.T
    assert torch.allclose(call(x, A, B), plain)
    assert torch.autograd.gradcheck(call, (x, A, B))


@pytest.mark.parametrize("kind", ["linear", "conv1d", "codes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_without_gradients_many_rows_see_the_sum_and_few_the_thin_products(kind, dtype, monkeypatch):
    """Both ways give what training computes; bfloat16 and codes never build the sum, which would be rounded."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    base = (Conv1D(24, 16) if kind == "conv1d" else nn.Linear(16, 24)).to(dtype)
    model = nn.Sequential(peft._QuantLinear(base, 8, 8) if kind == "codes" else base)
    adapter = stir(peft.apply(model, LoRA("0", r=3)))
    sums, addmm = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a, **k: sums.append(1) or addmm(*a, **k))
    for rows, whole in ((9, False), (10, True)):  # 9 (16 + 24) < 16 × 24 < 10 (16 + 24)
        x = torch.randn(rows, 16, dtype=dtype)
        trained = model(x)
        before = len(sums)
        with torch.no_grad():
            y = model(x)
        assert (len(sums) > before) == (whole and kind != "codes" and dtype != torch.bfloat16)
        assert y.dtype == trained.dtype and torch.allclose(y, trained, atol=1e-6 if dtype != torch.bfloat16 else 0)
        x = x.view(rows, 1, 16)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            before = len(sums)
            model(x)
            assert len(sums) == before or dtype == torch.float64
    with torch.no_grad():
        for p in adapter.parameters():
            p.zero_()
        x = torch.randn(40, 16, dtype=dtype)
        assert torch.equal(model(x), model[0].base(x)), "a start at 0 is the base, bit for bit"


@settings(max_examples=15, deadline=None)
@given(
    kernel=st.integers(1, 3), stride=st.integers(1, 2), dilation=st.integers(1, 2), r=st.integers(1, 3),
    mode=st.sampled_from(("zeros", "reflect")), seed=st.integers(0, 99),
)  # fmt: skip
def test_convolution_update_is_a_convolution(kernel, stride, dilation, r, mode, seed):
    torch.manual_seed(seed)
    conv = nn.Conv2d(3, 5, kernel, stride, 1, dilation, padding_mode=mode)
    model = nn.Sequential(conv)
    adapter = stir(peft.apply(model, LoRA("0", r=r)))
    x = torch.randn(2, 3, 9, 9)
    layer = adapter.layers["0"]
    whole = conv._conv_forward(x, conv.weight + layer.update(conv).view_as(conv.weight), conv.bias)
    assert torch.allclose(model(x), whole, atol=1e-5)
    assert torch.linalg.matrix_rank(layer.update(conv)) <= r


def test_autocast_gradients_are_close():
    reference = torch.zeros(())
    for dtype in (torch.float32, torch.bfloat16):
        model = make("bert", mode="eval")
        adapter = stir(put(model, "lora"))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = run(model, "bert").float().square().mean()
        loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in adapter.parameters())
        grads = torch.cat([p.grad.flatten() for p in adapter.parameters()])
        reference = grads if dtype == torch.float32 else reference
    assert (grads - reference).norm() <= 0.05 * reference.norm()


def saved_bytes(model, name):
    found = {}
    keep = lambda t: found.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) and t  # noqa: E731
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        run(model, name)
    return sum(n for pointer, n in found.items() if pointer not in known)


def test_training_builds_no_full_matrix_and_frees_the_frozen_layers():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    x = torch.randn(8, 64)
    peft.apply(model, LoRA(("0", "1", "2"), r=2))
    sizes, own = [], {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(t):
        sizes.append(0 if t.untyped_storage().data_ptr() in own else t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(x)
    assert max(sizes) == 8 * 64  # rows of x; never a new 64 × 64
    model = make("bert", mode="train")
    full = saved_bytes(model, "bert")
    put(model, "lora", head=())
    assert saved_bytes(model, "bert") < full


def test_unfrozen_base_still_gets_its_gradient():
    model = nn.Sequential(nn.Linear(4, 4))
    peft.apply(model, LoRA("0", r=2))
    model[0].base.weight.requires_grad_(True)
    model(torch.randn(3, 4)).sum().backward()
    assert model[0].base.weight.grad is not None


def test_lora_dropout_acts_in_training_only():
    for method in (LoRA("lin1", r=2, dropout=0.5), DoRA("lin1", r=2, dropout=0.5)):
        model = make("bag")
        stir(peft.apply(model, method, head=()))
        assert torch.equal(run(model, "bag"), run(model, "bag"))
        model.train()
        assert not torch.equal(run(model, "bag"), run(model, "bag"))


def test_dora_normalizes_the_whole_matrix():
    model = nn.Sequential(nn.Linear(6, 5))
    adapter = stir(peft.apply(model, DoRA("0", r=2, alpha=2)))
    layer, base = adapter.layers["0"], model[0].base
    whole = base.weight + layer.lora_B @ layer.lora_A
    assert torch.allclose(layer.row_norms(base), whole.norm(dim=1), atol=1e-5)
    expected = layer.lora_magnitude_vector[:, None] * whole / whole.norm(dim=1, keepdim=True)
    x = torch.randn(4, 6)
    assert torch.allclose(model(x), F.linear(x, expected, base.bias), atol=1e-5)
    assert torch.allclose(adapter.merge().model[0].base.weight, expected, atol=1e-5)


def test_scale_is_alpha_over_r():
    assert LoRA(r=4, alpha=8).scale == 2 and LoRA(r=16, alpha=8, rslora=True).scale == 2
    model = nn.Sequential(nn.Linear(6, 5))
    layer = stir(peft.apply(model, LoRA("0", r=4, alpha=8))).layers["0"]
    assert torch.allclose(layer.update(model[0].base), 2 * layer.lora_B @ layer.lora_A)


def test_prompt_does_not_change_what_is_seen_of_padding():
    """Attention to padded keys stays shut, with and without an explicit mask."""
    for method in PROMPTS:
        for attention in ("sdpa", "eager"):
            model = bert(attn_implementation=attention).eval()
            put(model, method)
            full = inputs("bert")
            ids, mask = full["input_ids"][:1], full["attention_mask"][:1]
            padded = model(input_ids=ids, attention_mask=mask).logits[:, :4]
            alone = model(input_ids=ids[:, :4]).logits
            assert torch.allclose(padded, alone, atol=1e-5), (method, attention)
    with pytest.raises(TypeError, match="cannot be extended"):
        peft._lengthen(torch.ones(2, 3), 1, True)
    with pytest.raises(TypeError, match="past_key_values"):
        model.bert.encoder.layer[0].attention.self(torch.zeros(1, 2, 16), past_key_values=object())


def test_pooled_classifier_reads_the_same_position_with_a_prompt():
    model = bert("BertForSequenceClassification").eval()
    put(model, "prompt")
    assert model(**inputs("bert")).logits.shape == (3, 4)


QUANTIZED = [(bits, block, "normal") for bits in (4, 8) for block in (16, 64)] + [(4, 32, "even"), (8, 16, "even")]


@pytest.mark.parametrize(("bits", "block", "levels"), QUANTIZED)
def test_an_adapter_sits_on_a_quantized_base(bits, block, levels, tmp_path):
    model = make("bert")
    exact, size = run(model, "bert"), sum(p.numel() * 4 for p in model.bert.encoder.parameters())
    names = peft.quantize(model, bits, block, levels=levels)
    assert len(names) == 12 and "classifier" not in names
    rough = run(model, "bert")
    assert (rough - exact).abs().max() < {4: 0.6, 8: 0.03}[bits]
    assert sum(t.numel() * t.element_size() for t in model.bert.encoder.state_dict().values()) < size / 2
    adapter = peft.apply(model, LoRA(("query", "dense"), r=2), head="classifier")
    assert torch.allclose(run(model, "bert"), rough, atol=1e-5)
    codes = {n: b.clone() for n, b in model.named_buffers()}
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        loss = F.cross_entropy(run(model, "bert").flatten(0, 1), torch.arange(18) % 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(torch.equal(b, codes[n]) for n, b in model.named_buffers())
    state = [id(m) for m in model.modules()]
    with pytest.raises(TypeError, match="quantized base cannot be merged"):
        adapter.merge()
    assert [id(m) for m in model.modules()] == state and not adapter.merged
    expected = run(model, "bert")
    adapter.save(tmp_path)
    other = make("bert")
    peft.quantize(other, bits, block, levels=levels)
    peft.load(other, tmp_path)
    assert torch.equal(run(other, "bert"), expected)
    with pytest.raises(ValueError, match="quantize the base first"):
        peft.quantize(model)


def test_quantized_gradient_equals_that_of_the_decoded_layer():
    torch.manual_seed(0)
    linear = nn.Linear(24, 10)
    coded = peft._QuantLinear(linear, 4, 16)
    plain = nn.Linear(24, 10)
    plain.weight.data, plain.bias.data = coded.weight, linear.bias.data
    x = torch.randn(3, 24, requires_grad=True)
    assert torch.allclose(coded(x), plain(x), atol=1e-6)
    (a,), (b,) = (torch.autograd.grad(m(x).square().sum(), x) for m in (coded, plain))
    assert torch.allclose(a, b, atol=1e-5)
    again = peft._QuantLinear(plain, 4, 16)
    assert torch.allclose(again.weight, coded.weight, atol=1e-6)  # coding what was decoded changes nothing


def test_even_levels_find_the_codes_of_a_file_in_q4_1_again():
    codes = torch.randint(0, 16, (24, 32), generator=torch.Generator().manual_seed(0))
    codes[:, 3], codes[:, 17] = 0, 15  # rounding to Q4_1 gives the ends of a block these
    step, low = torch.rand(2, 24, 1, generator=torch.Generator().manual_seed(1)).half().float()
    linear = nn.Linear(96, 8)
    linear.weight.data = (codes * step - low).view(8, 96)
    coded = peft._QuantLinear(linear, 4, 32, "even")
    assert torch.equal(coded.weight, linear.weight)
    assert coded.codes.nbytes + coded.scale.nbytes == 24 * 20  # as in the file: 16 bytes of codes and two float16
    flat = nn.Linear(32, 2)
    flat.weight.data.fill_(0.25)
    assert torch.equal(peft._QuantLinear(flat, 4, 32, "even").weight, flat.weight)


def test_quantize_refuses_unknown_levels():
    model = make("bert")
    with pytest.raises(ValueError, match="levels='odd': use 'normal'"):
        peft.quantize(model, levels="odd")
    assert not any(isinstance(m, peft._Coded) for m in model.modules())


def test_normal_float_levels_are_the_published_ones():
    published = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
    published += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
    assert torch.allclose(peft._normal_float(), torch.tensor(published), atol=2e-4)


@pytest.mark.parametrize("options", [{"bits": 3}, {"block": 1}, {"block": 7}])
def test_quantize_refuses(options):
    model = make("bert")
    state = [id(m) for m in model.modules()]
    with pytest.raises(ValueError, match="bits"):
        peft.quantize(model, **options)
    assert [id(m) for m in model.modules()] == state


BAD = [
    (LoRA("qeury"), "near names: .*query"),
    (LoRA(("attention",)), "attention, a BertAttention, which LoRA cannot adapt; it knows .*near names: .*"),
    (LoRA("query", r=17), r"query: rank r=17 on a matrix of 16 × 16: choose 1 to 16"),
    (Houlsby(size=17), "bottleneck size=17"),
    (PromptTuning("query"), "cannot adapt"),
]


@pytest.mark.parametrize(("method", "message"), BAD)
def test_bad_method_leaves_the_model_as_it_was(method, message):
    model = make("bert")
    before, grads = [id(m) for m in model.modules()], [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        peft.apply(model, method, head="classifier")
    assert [id(m) for m in model.modules()] == before and [p.requires_grad for p in model.parameters()] == grads
    assert not hasattr(model, "peft_before")


def test_methods_refuse_values_outside_their_range():
    for wrong in (dict(r=0), dict(r=1.5), dict(alpha=0), dict(dropout=1), dict(dropout=-0.1)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LoRA(**wrong)
    with pytest.raises(ValueError, match="act="):
        Houlsby(act="swish")
    with pytest.raises(ValueError, match="length"):
        PromptTuning(length=0)
    model = make("bert")
    with pytest.raises(ValueError, match="matches no module of Bert.*near names: .*classifier"):
        peft.apply(model, LoRA(), head="clasifier")
    with pytest.raises(ValueError, match="dropout' matches no module with parameters; near names: .*"):
        peft.apply(model, LoRA("query"), head="bert.embeddings.dropout")
    with pytest.raises(ValueError, match="matches no module of Bert.* outside of the head; near names: .*query"):
        peft.apply(model, LoRA(("query", "classifier")), head="classifier")
    for name in ("a.b", "keys", "1st"):
        with pytest.raises(ValueError, match="adapter name"):
            peft.apply(model, LoRA(), name, head=())
    put(model, "lora")
    with pytest.raises(ValueError, match="already has"):
        put(model, "lora")


def test_forgotten_head_is_named():
    with pytest.warns(UserWarning, match="'classifier' stays frozen"):
        peft.apply(make("bert"), LoRA())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft.apply(make("bert"), LoRA(), head=())


def test_all_linear_leaves_the_output_layer():
    assert set(peft._chosen(bert("BertForMaskedLM"), LoRA("all-linear"))) == {
        f"bert.encoder.layer.{i}.{n}"
        for i in (0, 1)
        for n in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
                  "intermediate.dense", "output.dense")
    } | {"cls.predictions.transform.dense"}  # fmt: skip
    assert "classifier" not in peft._chosen(make("bert"), LoRA("all-linear"))


def test_multihead_attention_output_is_left_alone():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    assert set(peft._chosen(nn.Sequential(layer), LoRA("all-linear"))) == {"0.linear1", "0.linear2"}
    assert peft._kind(nn.Conv2d(4, 4, 3, groups=2)) is None


def test_loading_onto_another_base(tmp_path):
    stir(put(make("bert"), "lora")).save(tmp_path)
    for changes in (dict(hidden_size=32), dict(num_attention_heads=4), dict(num_hidden_layers=1)):
        other = bert(**changes)
        before = [id(m) for m in other.modules()]
        with pytest.raises(ValueError, match="configuration|no module"):
            peft.load(other, tmp_path)
        assert [id(m) for m in other.modules()] == before and all(p.requires_grad for p in other.parameters())
    other = bert(num_labels=7)
    with pytest.raises(ValueError, match=r"classifier\.\w+ has shape"):
        peft.load(other, tmp_path)
    assert not peft._wrappers(other) and all(p.requires_grad for p in other.parameters())
    with pytest.raises(ValueError, match="no module for .*; its own are conv1, .*: load the adapter onto"):
        peft.load(make("cnn"), tmp_path)
    with pytest.warns(UserWarning, match="other weights"):
        peft.load(bert(seed=5), tmp_path)
    with pytest.raises(ValueError, match="lacks|missing"):
        put(make("bert"), "lora", head=()).load(tmp_path)
    stir(put(make("cnn"), "ia3")).save(tmp_path / "cnn")
    smaller = make("cnn")
    smaller.conv1 = nn.Conv2d(3, 4, 3)
    with pytest.raises(ValueError, match="configuration"):
        peft.load(smaller, tmp_path / "cnn")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json and no adapter_model.safetensors"):
        peft.load(make("bert"), tmp_path)
    put(make("bert"), "lora").save(tmp_path)
    path = tmp_path / "adapter_config.json"
    good = json.loads(path.read_text())
    bad = [{"peft_type": "VERA"}, {"bias": "all"}, {"rank_pattern": {"query": 4}}]
    bad += [{"peft_type": "FTBOOK", "method": "X"}]
    for change in bad:
        path.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match="does not know"):
            peft.load(make("bert"), tmp_path)


def test_adapter_trains_with_fit():
    from ftbook.train import Settings, fit

    torch.manual_seed(0)
    model = make("cnn")
    x, y = torch.randn(64, 3, 8, 8), torch.arange(64) % 4
    adapter = put(model, "lora_all")
    frozen = {n: b.clone() for n, b in model.named_buffers()}
    settings = Settings(params=list(adapter.parameters()), progress=False, precision="fp32")
    history = fit(model, (x, y), epochs=2, lr=1e-2, batch_size=16, settings=settings)
    assert history["train_loss"][-1] < history["train_loss"][0]
    assert all(torch.equal(b, frozen[n]) for n, b in model.named_buffers())


def tagged_batches():
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 40, (4, 3, 6), generator=g)
    return [{"input_ids": i, "labels": i % 4} for i in ids]


@pytest.mark.parametrize("loss", [None, "cross_entropy"])
@pytest.mark.parametrize("how", ["full", "head", "lora", "bitfit", "prefix"])
def test_the_one_tuner_trains_a_model_that_returns_its_own_loss(how, loss):
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    quiet = Settings(schedule="linear", warmup=0.1, weight_decay=0.0, clip_norm=1.0, progress=False)
    start = {n: t.clone() for n, t in model.state_dict().items()}
    options = dict(lr=1e-2, epochs=3, loss=loss, settings=quiet)
    (history,) = finetune.tune(model, tagged_batches(), how=METHODS.get(how, how), **options)
    assert history["train_loss"][-1] < history["train_loss"][0]
    if how == "head":
        moved = [n for n, t in model.state_dict().items() if not torch.equal(t, start[n])]
        assert moved == ["classifier.weight", "classifier.bias"]
    elif how != "full":
        adapter = peft.handle(model)
        assert adapter.heads == ["classifier"] and adapter.method == METHODS[how]
        with adapter.disable():
            assert all(torch.equal(p, start[n]) for n, p in adapter.remove().state_dict().items())


def test_the_one_tuner_trains_pixels_and_repeats_by_its_seed():
    x, y = torch.randn(32, 3, 8, 8), torch.arange(32) % 4
    losses = []
    for seed in (1, 1, 2):
        model = make("cnn")
        how = LoRA("*", r=2)
        (history,) = finetune.tune(
            model, (x, y), how=how, lr=1e-2, epochs=2, seed=seed, settings=Settings(progress=False, precision="fp32")
        )
        losses.append(history["train_loss"])
        assert peft.handle(model).heads == ["classifier"]
    assert losses[0] == losses[1] != losses[2]
    with pytest.raises(ValueError, match="already has an adapter 'default'"):
        finetune.tune(model, (x, y), how=how, lr=1e-2, settings=Settings(progress=False, precision="fp32"))


def test_a_method_applies_itself_with_the_models_own_head():
    model = torch.compile(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), backend="eager")
    adapter = LoRA("0", r=2).apply(model)
    assert adapter.heads == ["1"] and list(adapter.layers) == ["0", "1"]
    with pytest.raises(ValueError, match="a backbone without a classifier"):
        LoRA("0", r=2).apply(
            nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.ReLU(), nn.LayerNorm(4)).append(nn.LSTM(4, 4))
        )


# ---- what the wrapped layer itself does


class Half(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, x):
        return super().forward(x) * 0.5


class HalfConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 0.5


class HalfEmbedding(nn.Embedding):
    def forward(self, x):
        return super().forward(x) * 0.5


def strange(which, change):
    """A layer that does more than its formula, an input, and how often a hook has fired."""
    torch.manual_seed(0)
    fired = []
    own = change == "subclass"
    layer, x = {
        "linear": lambda: ((Half if own else nn.Linear)(6, 5), torch.randn(4, 6)),
        "conv": lambda: ((HalfConv if own else nn.Conv2d)(3, 5, 3), torch.randn(2, 3, 6, 6)),
        "embedding": lambda: ((HalfEmbedding if own else nn.Embedding)(7, 5), torch.randint(7, (2, 3))),
    }[which]()
    if change == "zeroed":
        layer.register_forward_hook(lambda m, args, y: fired.append(1) or y * 0)
    elif change == "input":
        layer.register_forward_pre_hook(lambda m, args: fired.append(1) or (args[0] * 2 % 7,))
    elif change == "backward":
        layer.register_full_backward_hook(lambda m, gi, go: fired.append(1) and None)
    elif change == "instance":
        inside = layer.forward
        layer.forward = lambda x: fired.append(1) or inside(x) * 0.5
    elif change == "parametrized":
        nn.utils.parametrizations.weight_norm(layer)
    elif change == "pruned":
        prune.random_unstructured(layer, "weight", 0.5)
    return layer, x, fired


CHANGES = ("subclass", "zeroed", "input", "backward", "instance", "parametrized", "pruned")
TWO = {
    "lora": LoRA("0", r=2),
    "dora": DoRA("0", r=2),
    "ia3": IA3("0", ()),
    "bitfit": BitFit("0"),
    "houlsby": Houlsby("0", size=2),
}
FITTING = [(m, w) for m in TWO for w in ("linear", "conv", "embedding") if w != "embedding" or "ra" in m]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("method", "which"), FITTING)
def test_what_a_layer_does_besides_its_formula_it_does_under_an_adapter(method, which, change):
    layer, x, fired = strange(which, change)
    expected = layer(x)
    expected.sum().backward()
    times, fired[:] = len(fired), []
    model = nn.Sequential(layer)
    peft.apply(model, TWO[method])
    after = model(x)
    assert torch.equal(after, expected)
    if change == "backward" and x.is_floating_point():
        x.requires_grad_(True)
        model(x).sum().backward()
    assert len(fired) == (times if which != "embedding" or change != "backward" else 0)  # a frozen table has none


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", ["linear", "conv", "embedding"])
def test_the_update_is_added_to_what_the_layer_returns(which, change):
    layer, x, _ = strange(which, change)
    own = layer(x)
    adapter = stir(peft.apply(nn.Sequential(layer), LoRA("0", r=2)))
    low = adapter.layers["0"]
    added = peft._low_rank(layer, x, low.lora_A, low.lora_B, low.spec.scale)
    assert torch.allclose(adapter.model(x), own + added, atol=1e-6)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("method", "which"), [p for p in FITTING if p[0] != "houlsby"])
def test_merging_keeps_the_outputs_or_is_refused(method, which, change):
    layer, x, _ = strange(which, change)
    model = nn.Sequential(layer).eval()
    adapter = stir(peft.apply(model, TWO[method]))
    apart, state = model(x), {n: p.clone() for n, p in model.named_parameters()}
    if change in ("parametrized", "backward"):
        assert torch.allclose(adapter.merge().model(x), apart, atol=1e-5)
        adapter.unmerge()
        assert torch.equal(model(x), apart) and model[0].base is layer
        adapter.remove(keep_merged=True)
        assert torch.allclose(model(x), apart, atol=1e-5) and not nn.utils.parametrize.is_parametrized(model[0])
        assert all(p.requires_grad for p in model.parameters())
        return
    for attempt in (adapter.merge, lambda: adapter.remove(keep_merged=True)):
        with pytest.raises(TypeError, match="cannot be merged, its outputs would change; it has"):
            attempt()
    assert torch.equal(model(x), apart) and not adapter.merged
    assert all(torch.equal(p, state[n]) for n, p in model.named_parameters())
    assert adapter.remove()[0] is layer


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("method", [LoRA("0", r=2), DoRA("0", r=2), IA3("0", ()), IA3("0", "0"), BitFit("0")])
def test_a_random_parametrization_is_measured_and_merged_as_it_is_in_evaluation(method, keep):
    from ftbook.regularize import mixout

    x, model = torch.randn(5, 4), nn.Sequential(nn.Linear(4, 3))
    mixout(model, "0", p=0.5, reference={"0.weight": torch.randn(3, 4), "0.bias": torch.randn(3)})
    base = model.eval()(x)
    adapter = peft.apply(model.train(), method)
    assert torch.equal(model.eval()(x), base)
    expected, stream = stir(adapter).model(x), torch.get_rng_state()
    model.train()
    samples = [peft._sample_weights(peft._named(model), ["0"]) for _ in range(2)]
    adapter.remove(keep_merged=True) if keep else adapter.merge()
    assert samples[0] == samples[1] and torch.equal(torch.get_rng_state(), stream)
    assert all(m.training for m in model.modules())
    assert torch.allclose(model.eval()(x), expected, atol=1e-5)


def test_a_weight_that_is_drawn_in_evaluation_too_is_not_merged():
    class Noise(nn.Module):
        def forward(self, weight):
            return weight + torch.randn_like(weight)

    layer = nn.Linear(4, 3)
    nn.utils.parametrize.register_parametrization(layer, "weight", Noise())
    model = nn.Sequential(nn.Linear(4, 4), layer).eval()
    adapter = stir(peft.apply(model, LoRA("*", r=2)))
    state = {n: p.clone() for n, p in model.named_parameters()}
    for attempt in (adapter.merge, lambda: adapter.remove(keep_merged=True)):
        with pytest.raises(TypeError, match="draws anew at every call"):
            attempt()
    assert not adapter.merged and all(torch.equal(p, state[n]) for n, p in model.named_parameters())


def test_a_layer_dropped_by_a_hook_stays_dropped():
    from ftbook.regularize import drop_outputs

    model = nn.Sequential(nn.Linear(4, 3)).train()
    drop_outputs(model, "0", p=1.0)
    peft.apply(model, LoRA("0", r=2))
    assert torch.equal(model(torch.randn(5, 4)), torch.zeros(5, 3))


def test_hooks_for_all_modules_see_the_adapted_layer():
    model, seen = nn.Sequential(nn.Linear(4, 3)), []
    peft.apply(model, LoRA("0", r=2))
    hook = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(type(m)))
    model(torch.randn(2, 4))
    hook.remove()
    assert nn.Linear in seen


@pytest.mark.parametrize("wrong", [nn.GroupNorm(2, 4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)])
def test_a_changed_bias_is_added_to_its_channels(wrong):
    model = nn.Sequential(wrong).eval()
    adapter = stir(peft.apply(model, BitFit()))
    x = torch.randn(2, 4, 5, 5)
    apart = model(x)
    assert torch.allclose(adapter.merge().model(x), apart, atol=1e-5)
    if isinstance(wrong, nn.Conv2d):
        assert torch.allclose(model(x[0]), adapter.unmerge().model(x[0]), atol=1e-5)


class Swapped(nn.LayerNorm):
    """A norm over the channels in front, as torchvision and ConvNeXt have one."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def test_a_norm_whose_axes_are_not_known_is_left_out_of_bitfit():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Swapped(4))
    assert list(peft.apply(model, BitFit()).layers) == ["0"]
    with pytest.raises(ValueError, match="1, a Swapped, which BitFit cannot adapt"):
        peft.apply(nn.Sequential(nn.Conv2d(3, 4, 1), Swapped(4)), BitFit("1"))


# ---- modules that read their layers' weights


FUSED = {
    "lora": LoRA(("linear1", "linear2"), r=2),
    "dora": DoRA(("linear1", "linear2"), r=2),
    "ia3": IA3(("linear1",), ()),
    "bitfit": BitFit(),
    "houlsby": Houlsby(("linear2",), size=3),
}


@pytest.mark.parametrize("method", FUSED)
@pytest.mark.parametrize("first", [True, False])
def test_a_transformer_layer_of_torch_is_the_same_in_evaluation_and_training(method, first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=first)
    x = torch.randn(3, 5, 16)
    adapter = stir(peft.apply(layer, FUSED[method]))
    training = layer.train()(x)
    layer.eval()
    with torch.no_grad():
        evaluation = layer(x)
        with adapter.disable():
            base = layer(x)
        if method in MERGEABLE:
            assert torch.allclose(adapter.merge().model(x), training, atol=1e-5)
        assert torch.equal(adapter.remove()(x), base)
    assert torch.allclose(evaluation, training, atol=1e-5)
    assert (training - base).abs().max() > 0.05


@pytest.mark.parametrize("target", ["layers.1.linear1", "layers.0.linear1", "linear2"])
def test_a_transformer_encoder_with_padding_is_the_same_in_evaluation_and_training(target):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model, x, padded = nn.TransformerEncoder(layer, 2).eval(), torch.randn(3, 5, 16), torch.zeros(3, 5).bool()
    padded[0, 3:] = True
    run = lambda: model(x, src_key_padding_mask=padded)[~padded]  # noqa: E731
    with torch.no_grad():
        base = run()
        adapter = stir(peft.apply(model, LoRA(target, r=2)))
        evaluation = run()
        model.train()
        assert torch.allclose(run(), evaluation, atol=1e-5) and not torch.allclose(evaluation, base, atol=0.01)
        model.eval()
        with adapter.disable():
            assert torch.equal(run(), base)
        adapter.remove()
        assert model.use_nested_tensor and torch.equal(run(), base)


def test_a_transformer_layer_compiles_with_an_adapter():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    stir(peft.apply(layer, LoRA(("linear1", "linear2"), r=2)))
    x = torch.randn(3, 5, 16)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(x), layer(x), atol=1e-5)


@pytest.mark.parametrize("target", [("out_proj",), ("linear1", "out_proj"), "*out_proj"])
def test_the_output_layer_of_attention_is_refused(target):
    model = nn.TransformerEncoderLayer(8, 2, 16)
    before = [id(m) for m in model.modules()]
    with pytest.raises(ValueError, match="nn.MultiheadAttention's output layer, which is never called.*cannot adapt"):
        peft.apply(model, LoRA(target, r=2))
    assert [id(m) for m in model.modules()] == before and all(p.requires_grad for p in model.parameters())


def test_attention_or_its_output_layer_as_a_head():
    for head in ("self_attn", "out_proj"):
        torch.manual_seed(0)
        model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        x = torch.randn(2, 3, 8)
        start = model(x)
        adapter = stir(peft.apply(model, LoRA("linear1", r=2), head=head))
        training = model(x)
        assert (training - start).abs().max() > 0.05
        assert torch.allclose(model.eval()(x), training, atol=1e-5)
        training.sum().backward()
        assert all(p.grad is not None for n, p in adapter.named_parameters() if "in_proj" in n or "out_proj" in n)


class Reader(nn.Module):
    """Uses a layer's weight and never calls the layer, as Swin does with qkv."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.out(F.linear(x, self.qkv.weight, self.qkv.bias))


def test_a_layer_whose_weight_is_used_without_calling_it_is_an_error():
    model, x = Reader(), torch.randn(2, 4)
    start = model(x)
    adapter = peft.apply(model, LoRA(("qkv", "out"), r=2))
    with pytest.raises(TypeError, match="would have no effect.*leave this layer out of target"):
        model(x)
    weight, kept = model.qkv.weight, model.qkv.base.weight.clone()
    assert (weight.shape, weight.dtype, weight.device.type, len(weight)) == ((4, 4), torch.float32, "cpu", 4)
    assert isinstance(weight, Tensor) and model.qkv.in_features == 4
    for use in (weight.sum, lambda: weight.data, lambda: weight.T, lambda: nn.init.zeros_(weight)):
        with pytest.raises(TypeError, match="no effect"):
            use()
    assert torch.equal(model.qkv.base.weight, kept)
    with adapter.disable():
        assert torch.equal(model(x), start)
    stir(adapter)
    low = adapter.layers["qkv"]
    inside = model.qkv.base(x) + peft._low_rank(model.qkv.base, x, low.lora_A, low.lora_B, low.spec.scale)
    assert torch.allclose(adapter.merge().model(x), model.out(inside), atol=1e-5)
    adapter.unmerge().remove()
    assert torch.equal(model(x), start)
    stir(peft.apply(model, LoRA("out", r=2)))
    assert not torch.equal(model(x), start)


def test_swin_of_torchvision_says_that_its_attention_cannot_be_adapted():
    from torchvision.models.swin_transformer import ShiftedWindowAttention

    attention = ShiftedWindowAttention(8, [2, 2], [0, 0], 2).eval()
    peft.apply(attention, LoRA(("qkv", "proj"), r=2))
    with pytest.raises(TypeError, match="Swin with qkv"):
        attention(torch.randn(1, 4, 4, 8))


# ---- after the layer, and beyond the first derivative


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (4,)])
@pytest.mark.parametrize("method", TWO)
def test_what_follows_a_layer_may_work_in_place(method, shape):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))
    adapter = stir(peft.apply(model, TWO[method]))
    x, found = torch.randn(shape), []
    for inplace in (True, False):
        model[1].inplace = inplace
        model.zero_grad()
        model(x).square().sum().backward()
        found.append([p.grad.clone() for p in adapter.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


def test_what_follows_a_quantized_layer_may_work_in_place():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))
    peft.quantize(model, target="0", block=16)
    x = torch.randn(2, 3, 8, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None


@settings(max_examples=15, deadline=None)
@given(
    n_in=st.integers(1, 5), n_out=st.integers(1, 5), rows=st.integers(0, 3), seed=st.integers(0, 99),
    bias=st.booleans(), quantized=st.booleans(), data=st.data(),
)  # fmt: skip
def test_the_second_derivative_is_that_of_ordinary_operations(n_in, n_out, rows, seed, bias, quantized, data):
    torch.manual_seed(seed)
    r = data.draw(st.integers(1, min(n_in, n_out)))
    base = nn.Linear(n_in, n_out, bias, dtype=torch.float64).requires_grad_(False)
    if quantized:
        base = peft._QuantLinear(base, 8, 4)
    make = dict(dtype=torch.float64, requires_grad=True)
    A, B, x = (torch.randn(s, **make) for s in ((r, n_in), (n_out, r), (2, rows, n_in)))
    fused = lambda x, A, B: peft._fused(x, A, B, base, 1.7)  # noqa: E731
    plain = lambda x, A, B: F.linear(x, base.weight.double(), base.bias) + 1.7 * x @ A.T @ B.T  # noqa: E731
    found = []
    for f in (fused, plain):
        first = torch.autograd.grad(f(x, A, B).pow(3).sum(), (x, A, B), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, A, B))
        found.append((*first, *second))
    assert all(torch.allclose(a, b) for a, b in zip(*found, strict=True))


TRANSFORMED = [("lora", "linear"), ("lora", "conv"), ("dora", "linear"), ("ia3", "linear"), ("bitfit", "conv")]


@pytest.mark.parametrize(("method", "which"), [*TRANSFORMED, ("lora", "quantized")])
def test_torch_func_and_forward_mode(method, which):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, 3) if which == "conv" else nn.Linear(6, 5)
    x = torch.randn(4, 3, 4, 4) if which == "conv" else torch.randn(4, 6)
    model = nn.Sequential(layer)
    if which == "quantized":
        peft.quantize(model, block=6, target="0")
    adapter = stir(peft.apply(model, TWO[method]))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    loss = lambda p, x: torch.func.functional_call(model, p, (x,)).square().sum()  # noqa: E731
    loss(trained, x).backward()
    found = torch.func.grad(loss)(trained, x)
    assert all(torch.allclose(found[n], p.grad, atol=1e-4) for n, p in trained.items())
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(trained, x)
    assert all(torch.allclose(each[n].sum(0), found[n], atol=1e-4) for n in trained)
    assert torch.allclose(torch.func.vmap(model)(x), model(x), atol=1e-5)
    direction = torch.randn_like(x)
    _, along = torch.func.jvp(model, (x,), (direction,))
    assert torch.allclose(along, (model(x + direction) - model(x - direction)) / 2, atol=1e-4)
    with forward_ad.dual_level():
        dual = model(forward_ad.make_dual(x, direction))
        assert torch.allclose(forward_ad.unpack_dual(dual).tangent, along, atol=1e-5)
    assert len(list(adapter.parameters())) == len(trained)


def test_weights_that_were_exchanged_for_one_call_give_their_own_gradient():
    """The gradient is taken after the call, when the module holds its own weights again."""
    model = nn.Sequential(nn.Linear(4, 3))
    stir(peft.apply(model, LoRA("0", r=2)))
    other = torch.randn(3, 4)
    x = torch.randn(2, 4, requires_grad=True)
    torch.func.functional_call(model, {"0.base.weight": other}, (x,)).sum().backward()
    low = model[0].layers["default"]
    assert torch.allclose(x.grad[0], (other + low.update(model[0].base)).sum(0), atol=1e-5)


def test_weights_changed_between_forward_and_backward_are_an_error():
    model = nn.Sequential(nn.Linear(4, 3))
    peft.apply(model, LoRA("0", r=2))
    y = model(torch.randn(2, 4, requires_grad=True))
    with torch.no_grad():
        model[0].base.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_double_precision_stays_under_autocast():
    model = nn.Sequential(nn.Linear(4, 3)).double()
    x = torch.randn(2, 4).double()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        peft.apply(model, LoRA("0", r=2))
        assert model(x).dtype == expected.dtype and torch.equal(model(x), expected)


def test_an_adapter_in_another_precision_keeps_that_of_the_output():
    for layer, x in ((nn.Linear(4, 3), torch.randn(2, 4)), (nn.Embedding(4, 3), torch.tensor([1, 2]))):
        for method in (LoRA("0", r=2), DoRA("0", r=2)):
            model = nn.Sequential(copy.deepcopy(layer)).to(torch.bfloat16)
            x = x.to(torch.bfloat16) if x.is_floating_point() else x
            stir(peft.apply(model, method, dtype=torch.float32))
            assert model(x).dtype == torch.bfloat16


@pytest.mark.parametrize(("method", "which"), FITTING)
def test_an_empty_batch_passes_through_every_method(method, which):
    layer, x, _ = strange(which, "none")
    model = nn.Sequential(layer)
    expected = model(x[:0])
    adapter = peft.apply(model, TWO[method])
    found = model(x[:0])
    assert found.shape == expected.shape and found.dtype == expected.dtype
    found.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in adapter.parameters())
    if which == "linear":
        assert model(x[None, :0]).shape == (1, 0, 5)


@pytest.mark.parametrize("which", ["linear", "conv", "embedding"])
def test_dora_on_rows_of_zeros(which):
    layer, x, _ = strange(which, "none")
    with torch.no_grad():
        peft._matrix(layer)[1] = 0
    model = nn.Sequential(layer)
    expected = model(x)
    adapter = peft.apply(model, DoRA("0", r=2))
    assert torch.equal(model(x), expected)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        (model(x) - 1).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in adapter.parameters())
        optimizer.step()
    axis = 1 if which == "conv" else -1
    assert (model(x) - expected).select(axis, 1).abs().max() > 0  # the row learns
    assert torch.allclose(adapter.merge().model(x), adapter.unmerge().model(x), atol=1e-5)


def test_an_embedding_with_max_norm():
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=0.5))
    x = torch.arange(5)
    adapter = stir(peft.apply(model, LoRA("0", r=2)))
    apart = model(x)
    with pytest.raises(TypeError, match="max_norm.*torch.renorm"):
        adapter.merge()
    model[0].base.max_norm = None  # the rows were cut by the look-up
    assert torch.allclose(adapter.merge().model(x), apart, atol=1e-6)
    with pytest.raises(ValueError, match="0: DoRA on an embedding with max_norm.*choose LoRA"):
        peft.apply(nn.Sequential(nn.Embedding(5, 4, max_norm=0.5)), DoRA("0", r=2))


# ---- prefix tuning and the releases of transformers


def attention(forward):
    """A self-attention with a forward of some release."""
    cls = type("Attention", (nn.Module,), {"forward": forward})
    module = cls()
    module.num_attention_heads, module.attention_head_size, module.lin = 2, 4, nn.Linear(8, 8)
    return nn.ModuleDict({"attention": nn.ModuleDict({"self": module})})


def test_a_prefix_takes_the_place_of_the_cache_under_each_of_its_names():
    def before(self, hidden_states, attention_mask=None, past_key_values=None, **kwargs):
        return past_key_values, kwargs

    def since(self, hidden_states, attention_mask=None, cache=None, **kwargs):
        return cache, kwargs

    for forward, name in ((before, "past_key_values"), (since, "cache")):
        model = attention(forward)
        peft.apply(model, PrefixTuning(length=3))
        layer = model["attention"]["self"]
        cache, rest = layer(torch.zeros(1, 2, 8), other=1, **{name: None})
        key, value = cache.update(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4), 0)
        assert key.shape == value.shape == (1, 2, 8, 4) and rest == {"other": 1}
        for wrong in ("cache", "past_key_values"):
            with pytest.raises(TypeError, match=f"call the model without {wrong}"):
                layer(torch.zeros(1, 2, 8), **{wrong: object()})


def test_a_prefix_is_refused_where_it_cannot_stand():
    import transformers

    def none(self, hidden_states, attention_mask=None, **kwargs):
        return hidden_states

    def back(self, hidden_states, attention_mask=None, cache=None):
        return hidden_states

    model = attention(none)
    with pytest.raises(TypeError, match=f"Attention of transformers {transformers.__version__} takes no cache"):
        peft.apply(model, PrefixTuning())
    assert all(p.requires_grad for p in model.parameters()) and not hasattr(model, "peft_before")
    model = attention(back)
    model["attention"]["self"].is_causal = True
    with pytest.raises(TypeError, match="looks back only"):
        peft.apply(model, PrefixTuning())


# ---- names: shared, grouped, tied, nested


class Shared(nn.Module):
    """A block under two names, and a layer of it under a third."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.a, self.b, self.c, self.d = block, block, block[0], nn.Linear(4, 4)

    def forward(self, x):
        return self.d(self.c(self.b(self.a(x))))


@pytest.mark.parametrize("target", ["a.0", "b.0", "c", ("a.0", "b.0", "c"), "all-linear", "[abc]*"])
def test_a_module_under_several_names_is_adapted_once_and_at_all_of_them(target):
    model, x = Shared(), torch.randn(3, 4)
    start, lin = model(x), model.c
    adapter = stir(peft.apply(model, LoRA(target, r=2)))
    assert [p for p in adapter.layers if p != "d"] == ["a.0"]
    assert model.a[0] is model.b[0] is model.c and isinstance(model.c, peft._Adapted)
    h, low = x, adapter.layers["a.0"]
    for act in (torch.tanh, torch.tanh, lambda h: h):
        h = act(lin(h) + peft._low_rank(lin, h, low.lora_A, low.lora_B, low.spec.scale))
    assert torch.allclose(model(x), model.d(h), atol=1e-5)
    expected = model(x)
    assert torch.allclose(adapter.merge().model(x), expected, atol=1e-5)
    adapter.unmerge().remove()
    assert model.a[0] is model.b[0] is model.c is lin and torch.equal(model(x), start)
    adapter = stir(peft.apply(model, LoRA(target, r=2)))
    expected = model(x)
    adapter.remove(keep_merged=True)
    assert torch.allclose(model(x), expected, atol=1e-5) and model.a[0] is model.b[0] is model.c


@pytest.mark.parametrize("head", ["2", "2.0"])
def test_a_module_that_a_head_shares_is_not_adapted_besides(head):
    lin = nn.Linear(4, 4)
    model = nn.Sequential(nn.Sequential(lin), nn.Linear(4, 4), nn.Sequential(lin, nn.Linear(4, 2)))
    before = [id(m) for m in model.modules()]
    with pytest.raises(ValueError, match="matches no module"):
        peft.apply(model, LoRA("0.0", r=2), head=head)
    assert [id(m) for m in model.modules()] == before
    adapter = peft.apply(model, LoRA("[01]*", r=2), head=head)
    assert {n: type(x) for n, x in adapter.layers.items()} == {
        "1": peft._LoRALayer, adapter.heads[0]: peft._HeadLayer
    }  # fmt: skip
    assert sum(p.numel() for p in adapter.parameters()) == 16 + (30 if head == "2" else 20)


def test_a_module_under_several_names_is_quantized_at_all_of_them():
    model, x = Shared(), torch.randn(3, 4)
    assert peft.quantize(model, 8, 4) == ["a.0", "d"]
    assert model.a[0] is model.b[0] is model.c and isinstance(model.c, peft._QuantLinear)
    assert torch.allclose(model(x), Shared()(x), atol=0.05)


def test_only_plain_layers_are_quantized():
    half, hooked = Half(4, 4), nn.Linear(4, 4)
    hooked.register_forward_hook(lambda m, a, y: y * 2)
    model = nn.Sequential(half, hooked, nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    assert peft.quantize(model) == ["2"]
    with pytest.raises(ValueError, match="0, a Half.*knows nn.Linear without hooks"):
        peft.quantize(model, target="0")
    with pytest.raises(ValueError, match="'all-linear' matches no module"):
        peft.quantize(model)


def grouped():
    return nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4), nn.Flatten())


def test_a_layer_that_is_named_and_cannot_be_adapted_is_an_error():
    for target in (("0", "1"), ("0", "2"), ("1",), ("0", "1", "3")):
        model = grouped()
        with pytest.raises(ValueError, match=r"cannot adapt.*it knows nn.Linear, nn.Conv2d with groups=1"):
            peft.apply(model, LoRA(target, r=2))
        assert not peft._wrappers(model) and all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="a Conv2d with groups=2"):
        peft.apply(grouped(), LoRA(("0", "1"), r=2))
    with pytest.raises(ValueError, match="'5' matches no module"):
        peft.apply(grouped(), LoRA(("0", "5"), r=2))
    assert list(peft.apply(grouped(), LoRA("*", r=2)).layers) == ["0"]  # a pattern selects
    two = {"x": nn.Conv2d(4, 4, 1), "y": nn.Conv2d(4, 4, 1, groups=2)}
    several = nn.ModuleDict({name: nn.ModuleDict({"conv": conv}) for name, conv in two.items()})
    with pytest.raises(ValueError, match="y.conv is a Conv2d with groups=2"):
        peft.apply(several, LoRA("conv", r=2))


def test_targets_speak_the_pattern_language_of_the_book():
    model = bert()
    wanted = {
        "query": 2,
        "bert.encoder.layer.0.*": 6,
        ("output.dense", "!attention.output.dense"): 2,
        ("all-linear", "!layer.1.*"): 6,
        "!*.intermediate.dense": 13,
        "*.layer.[0-9].*.[kv]?*": 4,
    }
    for target, n in wanted.items():
        names = list(peft._chosen(model, LoRA(target, r=1), ["classifier"]))
        fitting = [k for k, m in peft._named(model).items() if peft._kind(m) and k != "classifier"]
        if target != ("all-linear", "!layer.1.*"):
            assert names == [
                k for k in select(peft._named(model), *[target] * isinstance(target, str) or target) if k in fitting
            ]
        assert len(names) == n, (target, names)
    with pytest.raises(ValueError, match=r"'\(a\|b\)' matches no module of BertForTokenClassification; near names"):
        peft.apply(model, LoRA("(a|b)"), head=())
    with pytest.raises(ValueError, match="leaves no module"):
        peft.apply(model, LoRA(("query", "!query")), head=())
    with pytest.raises(ValueError, match="'kye' matches no module, as feedforward"):
        peft.apply(model, IA3("key", feedforward="kye"), head=())
    inner = peft.apply(model, IA3(), head=()).layers
    assert [n for n, layer in inner.items() if layer.inside] == [f"bert.encoder.layer.{i}.output.dense" for i in (0, 1)]


def test_every_module_that_a_head_name_means_is_trained():
    model = make("bert")
    adapter = put(model, "lora", head=("classifier", "LayerNorm"))
    norms = [n for n in peft._named(model) if n.endswith("LayerNorm")]
    assert len(norms) == 5 and adapter.heads == [*norms, "classifier"]
    nested = nn.ModuleDict({"head": nn.ModuleDict({"head": nn.Linear(2, 2)}), "lin": nn.Linear(2, 2)})
    assert peft.apply(nested, LoRA("lin", r=1), head="head").heads == ["head"]


def test_a_head_with_an_adapter_of_another_name_inside_is_copied_without_it(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    x, plain = torch.randn(3, 4), copy.deepcopy(model)
    stir(peft.apply(model, LoRA("1.0", r=2), "inside"))
    adapter = peft.apply(model, LoRA("0", r=2), "whole", head="1")
    assert torch.equal(model(x), plain(x))
    expected = stir(adapter).model(x)
    adapter.save(tmp_path)
    peft.load(plain, tmp_path)
    assert torch.equal(plain(x), expected)


def test_a_head_with_tied_tensors_inside_is_saved(tmp_path):
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
        model[1][1].weight = model[1][0].weight
        return model

    model, x = make(), torch.randn(3, 4)
    stir(peft.apply(model, LoRA("0", r=2), head="1")).save(tmp_path)
    other = make()
    peft.load(other, tmp_path)
    assert torch.equal(other(x), model(x))


def words(cls="BertForMaskedLM", **changes):
    import transformers

    torch.manual_seed(0)
    if cls == "T5ForConditionalGeneration":
        sizes = dict(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()
    return bert(cls, **changes).eval()


TIED = [
    ("BertForMaskedLM", "word_embeddings", ()),
    ("BertForMaskedLM", "cls.predictions.decoder", ()),
    ("BertForMaskedLM", "query", "cls"),
    ("T5ForConditionalGeneration", "embed_tokens", ()),
    ("T5ForConditionalGeneration", "shared", ()),
]


@pytest.mark.parametrize(("cls", "target", "head"), TIED)
def test_merged_words_are_not_tied_again_when_the_model_is_read(cls, target, head, tmp_path):
    model = words(cls)
    ids = torch.randint(0, 40, (2, 6))
    more = {"decoder_input_ids": ids} if "T5" in cls else {}
    adapter = stir(peft.apply(model, LoRA(target, r=2), head=head))
    expected = model(input_ids=ids, **more).logits
    adapter.remove(keep_merged=True)
    assert torch.allclose(model(input_ids=ids, **more).logits, expected, atol=1e-5)
    assert model.config.tie_word_embeddings is False and all(p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.allclose(again(input_ids=ids, **more).logits, expected, atol=1e-5)


def test_words_stay_tied_where_the_merge_does_not_touch_them():
    model = words()
    stir(peft.apply(model, LoRA("query", r=2), head=())).remove(keep_merged=True)
    assert model.config.tie_word_embeddings
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_model_that_needs_tied_words_refuses_to_part_them():
    model = words()
    inside = type(model).forward

    def forward(self, *args, **kwargs):
        assert self.config.tie_word_embeddings
        return inside(self, *args, **kwargs)

    model.__class__ = type("Scaled", (type(model),), {"forward": forward})
    adapter = stir(peft.apply(model, LoRA("word_embeddings", r=2), head=()))
    with pytest.raises(ValueError, match="Scaled computes otherwise when its words are not tied.*use merge"):
        adapter.remove(keep_merged=True)
    assert not adapter.merged and model.config.tie_word_embeddings
    adapter.merge().unmerge().remove()


def test_names_that_cannot_be_used_leave_the_model_as_it_was():
    for name in ("training", "_modules", "forward", "a b", "", None, 3):
        model = make("cnn", mode="train")
        before = [(n, type(m), m.training) for n, m in model.named_modules()]
        with pytest.raises(ValueError, match="adapter name"):
            peft.apply(model, LoRA("lin1", r=2), name, head=())
        assert before == [(n, type(m), m.training) for n, m in model.named_modules()]
        assert all(p.requires_grad for p in model.parameters()) and not hasattr(model, "peft_before")


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 4)))
        self.norm, self.last = nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.body[0].bias.requires_grad_(False)

    def forward(self, x):
        return self.last(self.norm(self.body(x)))


def everything(model):
    return (
        [(n, id(m), type(m), m.training, set(vars(m))) for n, m in model.named_modules()],
        [(n, id(p), p.requires_grad) for n, p in model.named_parameters()],
    )


@settings(max_examples=40, deadline=None)
@given(
    applied=st.permutations(["whole", "body", "block"]), removed=st.permutations(["whole", "body", "block"]),
    absent=st.sampled_from([None, "whole", "body", "block"]),
)  # fmt: skip
def test_adapters_of_a_model_and_of_its_parts_in_any_order(applied, removed, absent):
    torch.manual_seed(0)
    model = Nested()
    before, x = everything(model), torch.randn(3, 4)
    start = model.eval()(x)
    model.train()
    parts = {"whole": model, "body": model.body, "block": model.body[2]}
    targets = {"whole": ("body.2.0", "last"), "body": ("0", "2.0"), "block": ("0",)}
    handles = {n: peft.apply(parts[n], LoRA(targets[n], r=2), n, head=()) for n in applied if n != absent}
    for n in removed:
        if n in handles:
            held = [m for h in handles.values() for m in [h.model]]
            for m in held:
                mine = {id(p) for h in handles.values() for p in h.parameters()}
                assert not any(p.requires_grad for p in m.parameters() if id(p) not in mine)
            adapter = handles.pop(n)
            assert set(adapter.layers) == set(targets[n])
            adapter.activate()
            assert all(p.requires_grad for p in adapter.parameters())
            adapter.remove()
    assert everything(model) == before
    assert torch.equal(model.eval()(x), start)


def test_an_adapter_of_a_part_may_not_have_the_name_of_one_around_it():
    model = Nested()
    peft.apply(model, LoRA("body.0", r=2), head=())
    with pytest.raises(ValueError, match="already has an adapter 'default', by itself or in one of its parts"):
        peft.apply(model.body, LoRA("0", r=2), head=())
    peft.apply(model.body[2], LoRA("0", r=2), head=())  # none of the other's places
    assert list(peft.handle(model).layers) == ["body.0"]
    assert peft.handle(model).remove() is model and list(peft.handle(model.body[2]).layers) == ["0"]


@pytest.mark.parametrize("inner", [False, True])
def test_compiled_models_keep_their_names(inner, tmp_path):
    plain = make("bert")
    model = make("bert")
    model.bert.encoder.layer[0] = torch.compile(model.bert.encoder.layer[0], backend="eager") if inner else (
        model.bert.encoder.layer[0])  # fmt: skip
    given = model if inner else torch.compile(model, backend="eager")
    adapter = stir(put(given, "lora"))
    expected = run(given, "bert")
    adapter.save(tmp_path)
    assert set(peft.load(plain, tmp_path).layers) == set(adapter.layers)
    assert torch.allclose(run(plain, "bert"), expected, atol=1e-5)
    assert peft.handle(given).model is adapter.model
    adapter.remove()
    assert not hasattr(model, "peft_before")


# ---- all-linear


def small_head(first, name="classifier"):
    model = nn.Module()
    model.features = nn.Conv2d(3, 4, 3)
    setattr(model, name, nn.Sequential(nn.Dropout(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2)))
    return model


@pytest.mark.parametrize("name", ["classifier", "head", "heads", "fc"])
def test_all_linear_leaves_out_the_last_layer_of_a_head_alone(name):
    assert set(peft._chosen(small_head(4, name), LoRA("all-linear"))) == {f"{name}.1", f"{name}.3"}
    with pytest.raises(ValueError, match="'all-linear' matches no module.*the output layer apart"):
        peft._chosen(nn.ModuleDict({name: nn.Linear(4, 2)}), LoRA("all-linear"))


VISION = [("alexnet", ["classifier.1", "classifier.4"]), ("vgg11", ["classifier.0", "classifier.3"]),
          ("mobilenet_v3_small", ["classifier.0"])]  # fmt: skip


@pytest.mark.parametrize(("name", "expected"), VISION)
def test_all_linear_on_classifiers_of_torchvision(name, expected):
    import torchvision

    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
    assert list(peft._chosen(model, LoRA("all-linear"))) == expected


def test_all_linear_on_heads_of_transformers():
    import transformers

    sizes = dict(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=24, num_labels=4)
    model = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**sizes))
    found = peft._chosen(model, LoRA("all-linear"))
    assert "score" not in found and len(found) == 4 and model.score.bias is None
    adapter = peft.apply(model, LoRA("all-linear", r=2), head="score")
    assert adapter.heads == ["score"] and len(adapter.layers) == 5
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    config = transformers.RobertaConfig(vocab_size=40, **sizes)
    found = peft._chosen(transformers.RobertaForSequenceClassification(config), LoRA("all-linear"))
    assert "classifier.dense" in found and "classifier.out_proj" not in found
    untied = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=False))  # fmt: skip
    assert "lm_head" not in peft._chosen(untied, LoRA("all-linear"))


# ---- hostile or broken files


def rewrite(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


HUGE = [
    ("prompt", dict(length=20_000_000), "prompt has shape .*length=20000000"),
    ("prefix", dict(length=20_000_000), "prefix has shape .*length=20000000"),
    ("houlsby", dict(size=16), "down.weight has shape .*size=16"),
]


@pytest.mark.parametrize(("method", "changes", "message"), HUGE)
def test_sizes_are_compared_before_anything_is_allocated(method, changes, message, tmp_path, monkeypatch):
    adapter = put(make("bert"), method)
    adapter.save(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())["fields"]
    rewrite(tmp_path, fields=fields | changes)
    model = make("bert")
    monkeypatch.setattr(peft, "_build", None)
    with pytest.raises(ValueError, match=message):
        peft.load(model, tmp_path)
    assert not peft._wrappers(model)


def test_a_rank_that_the_file_does_not_have(tmp_path):
    put(make("bert"), "lora").save(tmp_path)
    rewrite(tmp_path, r=16)
    with pytest.raises(ValueError, match="lora_A.weight has shape .*says r=16"):
        peft.load(make("bert"), tmp_path)


BROKEN = [
    (dict(r=None), "does not describe an adapter"),
    (dict(r="8"), "does not describe an adapter"),
    (dict(r=0), "rank r=0"),
    (dict(lora_alpha=None), "alpha must be positive"),
    (dict(peft_type="FTBOOK", method="PromptTuning", fields={"lenght": 3}), "does not describe an adapter"),
    (dict(peft_type="FTBOOK", method="IA3", fields={"feedforward": "(a+)+b"}), "method 'IA3', which ftbook does not"),
    (dict(peft_type="FTBOOK", method=["x"]), "does not know"),
    (dict(peft_type=None), "does not know"),
    (dict(init_lora_weights=["x"]), "init_lora_weights"),
    (dict(r=1.5), "rank r=1.5: give a whole number"),
    (dict(r=float("inf")), "rank r=inf: give a whole number"),
    *((dict(modules_to_save=names), "modules_to_save=.*names as a list") for names in (5, [5], {"a": 1}, "", [""])),
    (dict(peft_type="IA3", feedforward_modules=5), "feedforward_modules=5: write"),
    (dict(peft_type="FTBOOK", method="PromptTuning", fields=[1]), "does not describe an adapter .*correct it"),
    (dict(peft_type="FTBOOK", method="PromptTuning"), r"does not describe an adapter \(no 'fields'\)"),
]


@pytest.mark.parametrize(("changes", "message"), BROKEN)
def test_a_configuration_that_makes_no_sense_is_an_error_of_value(changes, message, tmp_path):
    put(make("bert"), "lora").save(tmp_path)
    rewrite(tmp_path, **changes)
    model = make("bert")
    with pytest.raises(ValueError, match=message):
        peft.load(model, tmp_path)
    assert not peft._wrappers(model) and all(p.requires_grad for p in model.parameters())


def test_a_broken_file_is_named_with_the_cure(tmp_path):
    put(make("bert"), "lora").save(tmp_path)
    texts = {p: p.read_bytes() for p in tmp_path.iterdir()}
    tensors = safetensors.torch.load(texts[tmp_path / "adapter_model.safetensors"])

    def noted(note):
        return safetensors.torch.save(tensors, {"ftbook": note})

    broken = [("adapter_config.json", b) for b in (b"", b"{", b"[1]", b"5", b"\xff{}")]
    notes = ("{", "[1]", '{"sample": 5}', '{"sample": ["x"]}')
    broken += [("adapter_model.safetensors", b) for b in (b"", b"x" * 99, *map(noted, notes))]
    broken += [("adapter_model.safetensors", texts[tmp_path / "adapter_model.safetensors"][:-8])]
    for name, content in broken:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} cannot be read \(.+\): copy it again, or save"):
            peft.load(make("bert"), tmp_path)
        (tmp_path / name).write_bytes(texts[tmp_path / name])
    peft.load(make("bert"), tmp_path)


def test_whole_numbers_may_be_written_as_floats(tmp_path):
    for method, field in (("lora", "r"), ("houlsby", "size"), ("prefix", "length")):
        model = make("bert")
        adapter = stir(put(model, method))
        adapter.save(tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        holder = config if field in config else config["fields"]
        holder[field] = float(holder[field])
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        other = make("bert")
        assert getattr(peft.load(other, tmp_path).method, field) == getattr(adapter.method, field)
        assert torch.equal(run(other, "bert"), run(model, "bert"))


def test_files_with_tensors_that_belong_nowhere(tmp_path):
    from safetensors.torch import load_file, save_file

    put(make("bert"), "lora").save(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {k: t.clone() for k, t in load_file(file).items()}  # the file itself is written below
    extra = peft._PREFIX + "bert.encoder.layer.0.output.dense.weight"
    save_file(tensors | {extra: torch.zeros(2, 2)}, file)
    with pytest.raises(ValueError, match="no part of an adapter, and no module of modules_to_save"):
        peft.load(make("bert"), tmp_path)
    save_file({k: t for k, t in tensors.items() if "layer.0.attention.self.query.lora_A" not in k}, file)
    with pytest.raises(ValueError, match="lacks .*query.lora_A.weight"):
        peft.load(make("bert"), tmp_path)


# ---- the study


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_run_of_the_study_scores_its_split_and_nothing_else(split):
    whole = study.run(1, split, "LoRA", 6e-3, size=12)
    hits, pairs = whole.pop("test_f1") if split == "test" else (whole.pop("valid_f1"), 1)
    assert 0 <= np.sum(hits) <= np.sum(pairs)
    assert sorted(whole) == (["file_kb", "trained"] if split == "test" else [])
    assert split == "valid" or set(study.run(1, split, "LoRA" + study.HALF, 6e-3, size=12)["probe"]) <= {0.0, 1.0}
    if split == "test":
        assert whole["file_kb"] * 1024 == 4 * whole["trained"]
    linear = study.run(1, split, "word shapes", C=1.0, size=12)
    assert f"{split}_f1" in linear and study.run(1, split, "word shapes", C=1.0, size=12).keys() == linear.keys()


@pytest.mark.parametrize("base", ["16 bits", study.FILE])
def test_a_decoder_answers_on_every_base(base):
    found = study.run_decoder(1, "test", "LoRA", base, lr=1e-3)
    assert set(found["accuracy"].tolist()) <= {True, False} and found["text_loss"] > 0
    assert list(study.run_decoder(1, "valid", "LoRA", base, lr=1e-3)) == ["accuracy"]


def test_logits_are_computed_where_an_answer_stands_and_nowhere_else():
    y = torch.tensor([1, 0, 1])
    (batch,) = study.asks(["a fine film", "dull", "what a joy it was"], y)
    model, tokenizer = study.decoder()
    words = study.causal.encode(list(study.PROMPT.words), tokenizer)
    answers = sorted(words[k] for k in y.tolist())
    rows = zip(batch["ids"], batch["scored"], strict=True)
    assert sorted(ids[where].tolist() for ids, where in rows) == answers
    places = []
    watch = model.norm.register_forward_hook(lambda module, x, out: places.append(out.shape[:-1].numel()))
    try:
        loss = study.Answers(model)(**batch).loss
    finally:
        watch.remove()
    assert places == [int(batch["scored"].sum())]
    logits = model(batch["ids"][:, :-1])
    where, target = batch["scored"][:, 1:], batch["ids"][:, 1:]
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits[where], target[where]))


def test_the_study_chooses_a_rate_for_every_way_and_others_take_it(tmp_path, monkeypatch):
    def run(seed, split, method, lr=None, C=None, size=0, r=8):
        assert size or r != 8 or (split == "valid") == (seed in study.TRIES)
        best = 0.1 if lr is None else 0.5 - abs(lr - study.RATES[method.removesuffix(study.HALF)][1])
        return {f"{split}_f1": best + 0.001 * seed}

    def answer(seed, split, method, base, lr=None, C=None):
        best = 0.1 if lr is None else 0.5 - abs(lr - study.STEPS[1])
        return {"accuracy": best} | ({"text_loss": 3.0} if lr and split == "test" else {})

    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path))
    monkeypatch.setattr(study, "run", run)
    monkeypatch.setattr(study, "run_decoder", answer)
    monkeypatch.setattr(study, "probe", lambda body: np.ones(3))
    monkeypatch.setattr(study, "_forgetting", lambda net: 3.0)
    threads = torch.get_num_threads()
    try:
        study.main("methods", "labels", "ranks", "decoder")
    finally:
        torch.set_num_threads(threads)
    shapes, *rows = results.load_study("11_peft", "methods").rows("test_f1")
    rows, halved = rows[: len(study.RATES)], rows[len(study.RATES) :]
    assert shapes["method"] == "word shapes" and [r["method"] for r in rows] == list(study.RATES)
    assert [r["method"] for r in halved] == [m + study.HALF for m in list(study.RATES)[1:3]]
    assert [r["lr"] for r in halved] == [r["lr"] for r in rows[1:3]]  # run() halves it
    assert all(r["lr"] == study.RATES[r["method"]][1] and r["tried"] == 4 and not r["edge"] for r in rows)
    assert all(r["seeds"] == study.SEEDS for r in [shapes, *rows])
    few = results.load_study("11_peft", "labels").rows("test_f1")
    assert [r["method"] for r in few] == ["full", "LoRA" + study.HALF]
    assert [r["lr"] for r in few] == [study.RATES[m][1] for m in ("full", "LoRA")]
    assert len(results.load_sweep("11_peft", "ranks").rows) == len(study.TRIES)
    tuned = results.load_study("11_peft", "decoder").rows("text_loss")
    assert [r["base"] for r in tuned] == ["16 bits", study.FILE]
    assert tuned[0]["lr"] == tuned[1]["lr"]  # on 4 bits it is what was chosen for 16
    with pytest.raises(ValueError, match="no study 'sizes'; use methods, decoder, costs, decoder_costs, spectrum"):
        study.main("sizes")


def test_costs_and_singular_values_are_stored_once(tmp_path, monkeypatch):
    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path))
    monkeypatch.setattr(study, "_rate", lambda method: 1e-4)
    study._costs()
    study._spectrum()
    study._decoder_costs()
    costs = results.load("11_peft", "costs")
    assert [c["method"] for c in costs] == list(study.METHODS)
    full, lora = costs[0], costs[1]
    assert full["relative_time"] == 1 and lora["optimizer"] < full["optimizer"] / 10
    spectrum = results.load("11_peft", "spectrum")
    assert len(spectrum) == 8 and all(v["change"][0] >= v["change"][-1] >= 0 for v in spectrum.values())
    whole, unpacked, file = results.load("11_peft", "decoder_costs")
    assert whole["trained"] > 10 * unpacked["trained"] == 10 * file["trained"]
    assert file["weights"] < unpacked["weights"]
