"""Invariants of ftbook.peft: every method, on every model that it fits, in every dtype."""

import copy
import json
import os
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from ftbook import peft
from ftbook.peft import IA3, BitFit, DoRA, Houlsby, LoRA, Pfeiffer, PrefixTuning, PromptTuning

LINEAR = (r".*(query|value|dense|c_attn|c_fc|lin\d)",)
WIDE = (r".*(query|value|dense|c_attn|c_fc|lin\d|conv\d|emb|word_embeddings)",)
SCALED = (r".*(query|value|dense|c_attn|lin\d|conv\d)",)


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
    "lora": LoRA(LINEAR, r=2),
    "lora_all": LoRA(WIDE, r=2, alpha=3, rslora=True),
    "dora": DoRA(WIDE, r=2),
    "ia3": IA3(SCALED, feedforward=(r".*(dense|lin1|conv2)",)),
    "bitfit": BitFit(),
    "houlsby": Houlsby(SCALED, size=3),
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
    assert not peft.wrappers(twin) and peft.wrappers(model)
    assert adapter.counts() == peft.handle(model).counts()


COMPILED = [("lora", "bert"), ("prefix", "bert")]
COMPILED += [(m, "cnn") for m in ("lora_all", "dora", "ia3", "bitfit", "houlsby")]


@pytest.mark.parametrize(("method", "base"), COMPILED)
def test_compiles(method, base):
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


def test_distributed_data_parallel():
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
    sizes = []
    keep = lambda t: sizes.append(t.numel()) or t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(x)
    assert max(sizes) == 8 * 64  # rows of x; never 64 × 64
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
        peft.lengthen(torch.ones(2, 3), 1, True)
    with pytest.raises(TypeError, match="past_key_values"):
        model.bert.encoder.layer[0].attention.self(torch.zeros(1, 2, 16), past_key_values=object())


def test_pooled_classifier_reads_the_same_position_with_a_prompt():
    model = bert("BertForSequenceClassification").eval()
    put(model, "prompt")
    assert model(**inputs("bert")).logits.shape == (3, 4)


QUANTIZED = [(bits, block) for bits in (4, 8) for block in (16, 64)]


@pytest.mark.parametrize(("bits", "block"), QUANTIZED)
def test_quantized_base(bits, block, tmp_path):
    model = make("bert")
    exact, size = run(model, "bert"), sum(p.numel() * 4 for p in model.bert.encoder.parameters())
    names = peft.quantize(model, bits, block)
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
    peft.quantize(other, bits, block)
    peft.load(other, tmp_path)
    assert torch.equal(run(other, "bert"), expected)
    with pytest.raises(ValueError, match="quantize the base first"):
        peft.quantize(model)


def test_quantized_gradient_equals_that_of_the_decoded_layer():
    torch.manual_seed(0)
    linear = nn.Linear(24, 10)
    coded = peft.QuantLinear(linear, 4, 16)
    plain = nn.Linear(24, 10)
    plain.weight.data, plain.bias.data = coded.weight, linear.bias.data
    x = torch.randn(3, 24, requires_grad=True)
    assert torch.allclose(coded(x), plain(x), atol=1e-6)
    (a,), (b,) = (torch.autograd.grad(m(x).square().sum(), x) for m in (coded, plain))
    assert torch.allclose(a, b, atol=1e-5)
    again = peft.QuantLinear(plain, 4, 16)
    assert torch.allclose(again.weight, coded.weight, atol=1e-6)  # coding what was decoded changes nothing


def test_normal_float_levels():
    published = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
    published += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
    assert torch.allclose(peft.normal_float(), torch.tensor(published), atol=2e-4)


@pytest.mark.parametrize("options", [{"bits": 3}, {"block": 1}, {"block": 7}])
def test_quantize_refuses(options):
    model = make("bert")
    state = [id(m) for m in model.modules()]
    with pytest.raises(ValueError, match="bits"):
        peft.quantize(model, **options)
    assert [id(m) for m in model.modules()] == state


BAD = [
    (LoRA("qeury"), "near names: .*query"),
    (LoRA(("attention",)), "cannot adapt"),
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


def test_bad_values():
    for wrong in (dict(r=0), dict(r=1.5), dict(alpha=0), dict(dropout=1), dict(dropout=-0.1)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LoRA(**wrong)
    with pytest.raises(ValueError, match="act="):
        Houlsby(act="swish")
    with pytest.raises(ValueError, match="length"):
        PromptTuning(length=0)
    model = make("bert")
    with pytest.raises(ValueError, match="near names: .*classifier"):
        peft.apply(model, LoRA(), head="clasifier")
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
    assert set(peft.chosen(bert("BertForMaskedLM"), LoRA("all-linear"))) == {
        f"bert.encoder.layer.{i}.{n}"
        for i in (0, 1)
        for n in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
                  "intermediate.dense", "output.dense")
    } | {"cls.predictions.transform.dense"}  # fmt: skip
    assert "classifier" not in peft.chosen(make("bert"), LoRA("all-linear"))


def test_multihead_attention_output_is_left_alone():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    assert set(peft.chosen(nn.Sequential(layer), LoRA("all-linear"))) == {"0.linear1", "0.linear2"}
    assert peft.kind(nn.Conv2d(4, 4, 3, groups=2)) is None


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
    assert not peft.wrappers(other) and all(p.requires_grad for p in other.parameters())
    with pytest.raises(ValueError, match="no module for.*near names"):
        peft.load(make("cnn"), tmp_path)
    with pytest.warns(UserWarning, match="other weights"):
        peft.load(bert(seed=5), tmp_path)
    with pytest.raises(ValueError, match="lacks|missing"):
        put(make("bert"), "lora_all").load(tmp_path)
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
