"""Chapter 20: grids, rounding with inputs, pruning, shrinking, files."""

import copy
import importlib.util
import inspect
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ftbook import compress, models, results
from ftbook.compress import (
    Grid,
    Pruning,
    _scale_inputs,
    fake_quantize,
    head_gradients,
    input_ranges,
    low_rank,
    moments,
    prune,
    quantize_layers,
    read,
    round_columns,
    save,
    scales,
    shrink,
    simulate,
)
from ftbook.studies import compress as study
from ftbook.texts import TextClassifier
from ftbook.train import fit

ROOT = Path(__file__).parent.parent
GRIDS = [
    Grid(bits, per, 8, symmetric)
    for bits in (2, 3, 4, 8)
    for per in ("tensor", "channel", "group")
    for symmetric in (True, False)
]


@st.composite
def weights(draw):
    rows, groups = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    w = torch.randn(rows, 8 * groups, generator=generator)
    w = w * 10.0 ** draw(st.integers(-6, 6)) + draw(st.sampled_from([0.0, 1.0, -3.0]))
    if draw(st.booleans()):
        w[draw(st.integers(0, rows - 1))] = draw(st.sampled_from([0.0, 0.5]))
    return w


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def correlated(n=16, rows=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, n, generator=generator) @ torch.randn(n, n, generator=generator)
    return x * torch.linspace(0.1, 5, n)


@settings(max_examples=60, deadline=None)
@given(weights(), st.sampled_from(GRIDS))
def test_a_rounded_weight_is_off_by_half_a_step_at_most(w, grid):
    scale, zero = scales(w, grid)
    off = (grid.rows(fake_quantize(w, grid, scale, zero)) - grid.rows(w)).abs()
    # an affine grid rounds its zero point as well, by another half step at the ends
    most = 0.5 if grid.symmetric else 1.0
    assert bool((off <= most * scale * (1 + 1e-3) + 1e-6 * w.abs().max()).all())


@settings(max_examples=60, deadline=None)
@given(weights(), st.sampled_from(GRIDS))
def test_rounding_twice_is_rounding_once(w, grid):
    scale, zero = scales(w, grid)
    once = fake_quantize(w, grid, scale, zero)
    assert torch.equal(fake_quantize(once, grid, scale, zero), once)


@settings(max_examples=30, deadline=None)
@given(weights(), st.sampled_from(GRIDS))
def test_codes_in_a_layer_stand_for_the_rounded_weight(w, grid):
    layer = nn.Linear(w.shape[1], w.shape[0])
    layer.weight.data.copy_(w)
    wanted = fake_quantize(w, grid)
    quantize_layers(nn.Sequential(layer), grid)
    torch.testing.assert_close(layer.weight, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_values_and_gradients_are_those_of_torch(symmetric):
    grid, w = Grid(symmetric=symmetric), torch.randn(6, 10)
    scale, zero = scales(w, grid)
    scale = scale * 0.7  # some are clipped
    mine, theirs = (w.clone().requires_grad_() for _ in range(2))
    ours = fake_quantize(mine, grid, scale, zero)
    reference = torch.fake_quantize_per_channel_affine(
        theirs, scale[:, 0], zero[:, 0].to(torch.int32), 0, grid.low, grid.high
    )
    torch.testing.assert_close(ours, reference)
    up = torch.randn_like(w)
    ours.backward(up)
    reference.backward(up)
    torch.testing.assert_close(mine.grad, theirs.grad)


def test_one_scale_for_all_is_torchs_per_tensor():
    w, grid = torch.randn(5, 7), Grid(per="tensor", symmetric=False)
    scale, zero = scales(w, grid)
    theirs = torch.fake_quantize_per_tensor_affine(w, float(scale), int(zero), 0, 255)
    torch.testing.assert_close(fake_quantize(w, grid), theirs)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.parametrize("per", ["tensor", "channel", "group"])
@pytest.mark.parametrize("bits", [8, 4])
def test_scales_and_rounded_weights_are_those_of_torchao(bits, per):
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    w, grid = torch.randn(6, 16), Grid(bits, per, 8)
    block = {"tensor": (6, 16), "channel": (1, 16), "group": (1, 8)}[per]
    ends = {"quant_min": grid.low, "quant_max": grid.high}
    kind = MappingType.SYMMETRIC_NO_CLIPPING_ERR
    step, zero = choose_qparams_affine(w, kind, block, torch.int8, **ends)
    torch.testing.assert_close(scales(w, grid)[0].flatten(), step.flatten())
    codes = quantize_affine(w, block, step, zero, torch.int8, **ends)
    theirs = dequantize_affine(codes, block, step, zero, torch.int8, **ends)
    torch.testing.assert_close(fake_quantize(w, grid), theirs)


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="ONNX Runtime is not installed")
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounded_weights_are_those_of_onnx_runtime(symmetric):
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    w, grid = torch.randn(6, 16), Grid(symmetric=symmetric)
    step, middle = (v.flatten() for v in scales(w, grid))
    middle = middle.to(torch.int8 if symmetric else torch.uint8)
    known = [
        numpy_helper.from_array(step.numpy(), "step"),
        numpy_helper.from_array(middle.numpy(), "middle"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "step", "middle"], ["codes"], axis=0),
        helper.make_node("DequantizeLinear", ["codes", "step", "middle"], ["made"], axis=0),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [6, 16]) for name in ("w", "made")]
    graph = helper.make_graph(nodes, "rounding", ends[:1], ends[1:], known)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {"w": w.numpy()})
    torch.testing.assert_close(fake_quantize(w, grid), torch.from_numpy(theirs))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_weight_of_zeros_stays_zero(grid):
    assert torch.equal(fake_quantize(torch.zeros(3, 8), grid), torch.zeros(3, 8))
    layer = nn.Linear(8, 3)
    nn.init.zeros_(layer.weight)
    quantize_layers(nn.Sequential(layer), grid, method="columns", data={"0": torch.zeros(8, 8)})
    assert torch.equal(layer.weight, torch.zeros(3, 8))


def test_without_correlation_columns_are_rounded_to_the_nearest():
    w = torch.randn(4, 16)
    made = round_columns(w, torch.eye(16), Grid(bits=3))
    torch.testing.assert_close(made, fake_quantize(w, Grid(bits=3)))


def test_columns_in_blocks_are_columns_one_by_one():
    grid, x = Grid(4), torch.randn(400, 150) @ torch.randn(150, 150)
    w, second = torch.randn(6, 150), x.mT @ x / len(x)
    scale, _ = scales(w, grid)
    order = second.diagonal().argsort(descending=True)
    h = second.double()[order][:, order]
    h.diagonal().add_(0.01 * h.diagonal().mean())
    left, made = w.double()[:, order], torch.empty_like(w)
    for i in range(150):  # what is left of the problem is solved anew for every column
        rest = torch.linalg.inv(h[i:, i:])
        q = (left[:, i] / scale[:, 0]).round().clamp(grid.low, grid.high) * scale[:, 0]
        made[:, order[i]] = q.float()
        left[:, i:] -= ((left[:, i] - q) / rest[0, 0])[:, None] * rest[0]
    same = torch.isclose(round_columns(w, second, grid), made, atol=1e-4)
    assert same.float().mean() > 0.98  # a number between two steps may go either way


@pytest.mark.parametrize("per", ["channel", "group"])
def test_columns_and_scaling_lose_less_than_rounding(per):
    sums = torch.zeros(3)
    for seed in range(6):
        x, grid = correlated(seed=seed), Grid(3, per, 8)
        w = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
        second = x.mT @ x / len(x)
        factor = _scale_inputs(w, second, grid)
        made = (
            fake_quantize(w, grid),
            round_columns(w, second, grid),
            fake_quantize(w * factor, grid) / factor,
        )
        off = torch.stack([((x @ (w - m).mT) ** 2).mean() for m in made])
        assert off[2] <= off[0] * (1 + 1e-5)  # one of its powers is 0
        sums += off / off[0]
    assert sums[1] < 0.8 * sums[0] and sums[2] < 0.9 * sums[0]


def test_moments_see_visible_positions_only_and_leave_modes():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = nn.Linear(2, 1)

        def forward(self, x, attention_mask):
            return self.line(x)

    model = Reader().train()
    x = torch.tensor([[[1.0, 0.0], [9.0, 9.0]]])
    found = moments(model, [{"x": x, "attention_mask": torch.tensor([[1, 0]]), "labels": 0}])
    assert found["line"].tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert model.training and model.line.training


def test_whole_numbers_give_what_the_rounded_floats_give():
    model, x = net(), torch.randn(5, 7, 16)
    first = copy.deepcopy(model[0])
    quantize_layers(model, activations="dynamic")
    rounded = fake_quantize(x.reshape(-1, 16), Grid()).view_as(x)
    wanted = nn.functional.linear(rounded, fake_quantize(first.weight, Grid()), first.bias)
    torch.testing.assert_close(model[0](x), wanted, rtol=1e-4, atol=1e-5)


def test_static_activations_follow_their_range():
    model, x = net(), torch.randn(9, 16)
    wanted = model(x)
    ranges = {"0": (float(x.min()), float(x.max())), "2": (0.0, 6.0)}
    quantize_layers(model, activations="static", ranges=ranges)
    torch.testing.assert_close(model(x), wanted, rtol=0.1, atol=0.1)


def test_ranges_hold_all_inputs_or_all_but_the_share_that_is_clipped():
    model, x = net(), torch.randn(4, 50, 16)
    low, high = input_ranges(model, x)["0"]
    assert (low, high) == (float(x.min()), float(x.max()))
    low, high = input_ranges(model, [x], clip=0.01)["0"]
    assert int((x < low).sum()) == int((x > high).sum()) == 32


def test_convolutions_and_embeddings_are_coded_too():
    model = nn.Sequential(nn.Embedding(10, 8), nn.Conv1d(3, 3, 1), nn.Conv2d(2, 4, 3, padding=1))
    kept = copy.deepcopy(model)
    assert quantize_layers(model) == ["0", "2"]
    words, photo = torch.arange(10), torch.randn(2, 2, 5, 5)
    torch.testing.assert_close(model[0](words), kept[0](words), rtol=0.1, atol=0.03)
    torch.testing.assert_close(model[2](photo), kept[2](photo), rtol=0.1, atol=0.05)


def test_a_coded_model_is_copied_and_pickled(tmp_path):
    model, x = net(), torch.randn(3, 16)
    quantize_layers(model, activations="dynamic")
    torch.save(model, tmp_path / "whole")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "whole", weights_only=False)):
        assert torch.equal(other(x), model(x)) and other[0].codes is not model[0].codes


def test_training_on_the_grid_ends_on_the_grid():
    model, x = net(), torch.randn(128, 16)
    y = (x[:, 0] > 0).long()
    grid = Grid(bits=2)
    simulate(model, grid)
    history = fit(model, (x, y), epochs=12, lr=0.01)
    assert history["train_loss"][-1] < history["train_loss"][0]
    model.eval()
    before = model(x)
    assert simulate(model, grid, on=False) == ["0", "2"]
    quantize_layers(model, grid)
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_what_is_pruned_stays_pruned_through_fit(pattern):
    model, x = net(), torch.randn(64, 16)
    masks = prune(model, 0.5, pattern=pattern)
    before = {n: model.get_submodule(n).weight.detach().clone() for n in masks}
    fit(model, (x, (x[:, 1] > 0).long()), epochs=3, lr=0.01, callbacks=[Pruning(masks)])
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        assert not weight[~mask].any() and not torch.equal(weight, before[name])


@pytest.mark.parametrize("by", ["magnitude", "movement"])
def test_pruning_grows_to_its_share(by):
    model, x = net(), torch.randn(256, 16)
    how = Pruning(share=0.75, by=by)
    fit(model, (x, (x[:, 1] > 0).long()), epochs=6, batch_size=32, lr=0.01, callbacks=[how])
    gone = sum(int((model[i].weight == 0).sum()) for i in (0, 2))
    assert gone == round(0.75 * (16 * 32 + 32 * 4)) and not how._hooks


class Zeros:
    def __init__(self):
        self.seen = []

    def on_step_end(self, run):
        self.seen.append(sum(int((m.weight == 0).sum()) for m in run.model if isinstance(m, nn.Linear)))


@pytest.mark.parametrize("by", ["magnitude", "movement"])
@pytest.mark.parametrize(("wait", "first", "last"), [(0.0, 1, 10), (0.25, 6, 12), (0.5, 11, 15), (0.99, 20, 20)])
def test_nothing_is_cut_in_the_wait_and_all_is_cut_half_way_from_its_end(by, wait, first, last):
    model, x, zeros = net(), torch.randn(320, 16), Zeros()
    how = Pruning(share=0.75, by=by, wait=wait)
    fit(model, (x, (x[:, 1] > 0).long()), epochs=2, batch_size=32, lr=0.01, callbacks=[how, zeros])
    whole = round(0.75 * (16 * 32 + 32 * 4))
    assert not any(zeros.seen[: first - 1]) and zeros.seen[first - 1] > 0
    assert zeros.seen == sorted(zeros.seen) and (zeros.seen[first - 1] < whole or first == last)
    assert set(zeros.seen[last - 1 :]) == {whole}


def test_scores_gather_while_nothing_is_cut():
    model, x, scored = net(), torch.randn(64, 16), []
    how = Pruning(share=0.75, by="movement", wait=0.5)

    class Look:
        def on_step_end(self, run):
            scored.append(how.scores["0"].abs().sum().item())

    fit(model, (x, (x[:, 1] > 0).long()), epochs=4, batch_size=32, lr=0.01, callbacks=[how, Look()])
    assert 0 < scored[0] != scored[1]


@settings(max_examples=30, deadline=None)
@given(weights())
def test_two_of_every_four_are_kept_and_none_smaller_than_a_lost_one(w):
    model = nn.Sequential(nn.Linear(w.shape[1], w.shape[0]))
    model[0].weight.data.copy_(w)
    kept = prune(model, pattern="2:4")["0"].reshape(-1, 4)
    assert bool((kept.sum(1) == 2).all())
    four = w.reshape(-1, 4).abs()
    assert bool((four.masked_fill(~kept, 1e30).amin(1) >= four.masked_fill(kept, -1).amax(1)).all())


def bert():
    body, tokenizer = models.load("bert_mini_en")
    body = getattr(body, "bert", body)
    batch = dict(tokenizer(["A warm film.", "A dull and very long one."], padding=True, return_tensors="pt"))
    return body, batch


def test_a_shrunk_bert_runs_and_is_smaller_and_one_without_loss_is_the_same():
    body, batch = bert()
    data = moments(body, [batch])
    small = shrink(body, data, heads=0.5, neurons=0.5)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in body.parameters())
    assert small(**batch).last_hidden_state.isfinite().all()
    same = shrink(body, data)
    torch.testing.assert_close(same(**batch).last_hidden_state, body(**batch).last_hidden_state)


def test_gradients_of_heads_are_finite_differences_of_their_masks():
    body, batch = bert()
    torch.manual_seed(0)
    model = TextClassifier(body, 2).double().eval()
    given = {k: batch[k] for k in ("input_ids", "attention_mask")} | {"labels": torch.tensor([1, 0])}
    found = head_gradients(model, [given])
    layers, step = model.body.encoder.layer, 1e-5
    size = layers[0].attention.self.attention_head_size
    for layer, head in ((0, 0), (1, 2), (len(layers) - 1, 1)):
        sizes = []
        for row in range(2):
            losses = []
            for mask in (1 + step, 1 - step):

                def scale(module, args, mask=mask, head=head):
                    x = args[0].clone()
                    x[..., size * head : size * (head + 1)] *= mask
                    return (x,)

                hook = layers[layer].attention.output.dense.register_forward_pre_hook(scale)
                one = {k: given[k][row : row + 1] for k in ("input_ids", "attention_mask")}
                losses.append(nn.functional.cross_entropy(model(**one), given["labels"][row : row + 1]))
                hook.remove()
            sizes.append(float((losses[0] - losses[1]).detach().abs() / (2 * step)))
        score = found[f"body.encoder.layer.{layer}"][head]
        assert float(score) == pytest.approx(sum(sizes) / 2, rel=1e-4, abs=1e-9)
    assert not model.training and all(not m._forward_pre_hooks for m in model.modules())


def test_heads_with_the_lowest_given_scores_go():
    body, batch = bert()
    data = moments(body, [batch])
    names = [n for n, m in body.named_modules() if hasattr(m, "intermediate")]
    heads = body.config.num_attention_heads
    small = shrink(body, data, heads=0.5, scores=dict.fromkeys(names, torch.arange(float(heads))))
    own, size = body.encoder.layer[0].attention.self, body.encoder.layer[0].attention.self.attention_head_size
    kept = own.query.weight[size * (heads - heads // 2) :]
    assert torch.equal(small.encoder.layer[0].attention.self.query.weight, kept)
    with pytest.raises(ValueError, match="head_gradients"):
        shrink(body, data, heads=0.5, scores={})
    with pytest.raises(ValueError, match="no labels"):
        head_gradients(body, [batch])


def test_a_silent_neuron_goes_first_and_is_not_missed():
    body, batch = bert()
    layer = body.encoder.layer[0]
    size = layer.output.dense.weight.shape[1]
    with torch.no_grad():
        for each in body.encoder.layer:
            each.output.dense.weight[:, : size // 4] = 0
    wanted = body(**batch).last_hidden_state
    small = shrink(body, moments(body, [batch]), neurons=0.25)
    torch.testing.assert_close(small(**batch).last_hidden_state, wanted, rtol=1e-4, atol=1e-4)


def test_full_rank_inputs_lose_nothing_and_fewer_directions_need_less_rank():
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 32), torch.randn(200, 4) @ torch.randn(4, 32)
    model = nn.Sequential(layer)
    wanted = model(x)
    data = moments(model, [x])
    assert low_rank(model, 4, data=data) == ["0"]
    torch.testing.assert_close(model(x), wanted, rtol=1e-2, atol=1e-2)


def test_low_rank_is_the_best_of_its_rank():
    model = nn.Sequential(nn.Linear(12, 12, bias=False))
    weight = model[0].weight.detach().clone()
    low_rank(model, 3)
    made = model[0][1].weight @ model[0][0].weight
    s = torch.linalg.svdvals(weight)
    torch.testing.assert_close((weight - made).norm(), s[3:].norm(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_file_gives_the_weights_back(tmp_path, grid):
    model, x = net(), torch.randn(3, 16)
    quantize_layers(model, grid)
    save(model, tmp_path / "net")
    plain = net(1)
    plain.load_state_dict(read(tmp_path / "net"))
    torch.testing.assert_close(plain(x), model(x))


def test_a_scaled_and_a_sparse_model_come_back(tmp_path):
    model, x = net(), torch.randn(3, 16)
    data = moments(model, [correlated()])
    prune(model, 0.75)
    size = save(model, tmp_path / "sparse")
    plain = net(1)
    whole = save(plain, tmp_path / "whole")
    plain.load_state_dict(read(tmp_path / "sparse"))
    assert torch.equal(plain(x), model(x)) and size < 0.6 * whole
    model = net()
    quantize_layers(model, Grid(4, "group", 8), method="scaled", data=data)
    save(model, tmp_path / "scaled")
    plain.load_state_dict(read(tmp_path / "scaled"))
    torch.testing.assert_close(plain(x), model(x))


def test_the_reader_works_where_the_book_is_not(tmp_path):
    model = net()
    quantize_layers(model, Grid(4, "group", 8))
    save(model, tmp_path / "net")
    script = "\n".join(
        [
            "import json, math, os, sys",
            "sys.modules['ftbook'] = None",
            "import torch",
            "from torch import Tensor, nn",
            "from safetensors import safe_open",
            f"_NAMES = {compress._NAMES!r}",
            inspect.getsource(read),
            "net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))",
            f"net.load_state_dict(read({str(tmp_path / 'net')!r}))",
            "print(float(net(torch.ones(1, 16)).sum()))",
        ]
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(said.stdout) == pytest.approx(float(model(torch.ones(1, 16)).sum()), abs=1e-5)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda: Grid(bits=1), "2 to 8"),
        (lambda: Grid(per="row"), "'channel'"),
        (lambda: scales(torch.ones(2, 10), Grid(per="group", group=4)), "do not divide"),
        (lambda: scales(torch.tensor([[float("nan")]]), Grid()), "not finite"),
        (lambda: fake_quantize(torch.ones(1, 2), Grid(), torch.zeros(1, 1)), "greater than 0"),
        (lambda: moments(net(), []), "at least one batch"),
        (lambda: input_ranges(net(), [torch.ones(1, 16)], clip=0.5), "less than 0.5"),
        (lambda: head_gradients(net(), []), "built like BERT"),
        (lambda: round_columns(torch.ones(2, 3), torch.eye(2), Grid()), "n_in"),
        (lambda: quantize_layers(nn.ReLU()), "no layer left"),
        (lambda: quantize_layers(net(), method="columns"), "moments"),
        (lambda: quantize_layers(net(), activations="static"), "ranges lack"),
        (lambda: quantize_layers(net(), activations="often"), "'dynamic'"),
        (lambda: simulate(nn.ReLU(), Grid()), "no linear"),
        (lambda: prune(net(), 1.0), "without any weight"),
        (lambda: prune(net(), 0.5, pattern="1:4"), "'2:4'"),
        (lambda: Pruning(by="luck"), "'movement'"),
        (lambda: Pruning(wait=1.0), "wait is 1.0; give a share of the steps, 0 or more and less than 1"),
        (lambda: Pruning(wait=-0.1), "wait is -0.1"),
        (lambda: shrink(net(), {}, heads=0.5), "built like BERT"),
        (lambda: low_rank(net(), 0), "at least 1"),
    ],
)
def test_what_cannot_be_is_said(wrong, told):
    with pytest.raises(ValueError, match=told):
        wrong()


def test_tied_weights_are_refused_and_nothing_is_changed():
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="share one weight"):
        quantize_layers(model)
    assert type(model[0]) is nn.Embedding and type(model[1]) is nn.Linear


@pytest.fixture
def stored(monkeypatch, tmp_path):
    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path))
    (tmp_path / "08_finetune.json").write_text((ROOT / "results" / "08_finetune.json").read_text())
    return tmp_path


def test_the_names_of_variants_belong_to_one_study_each():
    parts = [study.names(name) for name in ("bits", "inputs", "cuts", "peers")]
    flat = [way for part in parts for way in part]
    assert len(flat) == len(set(flat)) and set(flat) == set(study.CHANGES)
    with pytest.raises(ValueError, match="allowed are bits, inputs, cuts, peers"):
        study.names("sums")
    with pytest.raises(ValueError, match="allowed are 32 bits"):
        study.smaller(0, "1 bit")


def test_the_picture_has_a_price_and_a_score_for_every_variant():
    known = {study.WORDS, *study.CHANGES, *study.ORDER}
    assert set(study.PICTURE) <= known


def test_making_a_variant_leaves_the_tuned_model_as_it_is(stored):
    before = copy.deepcopy(study.tuned(0).state_dict())
    for way in ("4 bits, per group", "70% of weights zero", "50% of heads gone, by gradient", "50% by rank, weighted"):
        study.smaller(0, way)
    study._combined(0, "DPQ", 1e-4, 1e-4)
    after = study.tuned(0).state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], v) for k, v in before.items())


def test_costs_are_kept_one_by_one_and_measured_once(stored, monkeypatch):
    monkeypatch.setattr(study, "ProcessPoolExecutor", lambda *a, **_: ThreadPoolExecutor(1))
    made = []

    def make(way):
        made.append(way)
        if way == "broken" and len(made) == 2:
            raise RuntimeError("killed")
        return nn.Linear(4, 2), None, {1: [torch.ones(1, 4)] * 3}, 40

    with pytest.raises(RuntimeError, match="killed"):
        study._in_turn("costs", ("first", "broken"), make)
    study._in_turn("costs", ("broken", "first"), make)
    assert made == ["first", "broken", "broken"]
    found = results.load(study.CHAPTER, "costs")
    assert list(found) == ["broken", "first"] and set(found["first"]) == {
        "memory",
        "p50 of 1",
        "p95 of 1",
        "megabytes",
    }


def test_what_is_trained_is_read_from_its_file_the_next_time(stored, monkeypatch, tmp_path):
    monkeypatch.setattr(study, "_place", lambda name: tmp_path / "kept" / name)
    first, again, other = (nn.Linear(2, 2) for _ in range(3))
    study._kept(first, lambda: None, 1e-3, "P")
    study._kept(again, lambda: pytest.fail("it was trained again"), 1e-3, "P")
    assert torch.equal(first.weight, again.weight)
    trained = []
    study._kept(other, lambda: trained.append(1), 1e-4, "P")
    assert trained


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torchao", "onnxruntime", "onnxscript"))),
    reason="torchao and ONNX Runtime are not installed",
)
def test_other_libraries_round_the_same_model(stored):
    inputs = {k: v for k, v in study._inputs("test").items() if k != "labels"}
    wanted = study.outputs(study.tuned(0), inputs)
    for way in study.PEERS:
        made = study.outputs(study.smaller(0, way), inputs)
        assert (made - wanted).norm() < 0.1 * wanted.norm(), way


def test_studies_run_in_the_quick_profile_and_do_not_run_twice(stored, monkeypatch):
    study.main("order", "decoder", "samples", "scores")
    for name, metric in (("order", "accuracy"), ("decoder", "nats"), ("scores", "accuracy")):
        assert len(results.load_study(study.CHAPTER, name).rows(metric)) > 2
    waited = [r for r in results.load_study(study.CHAPTER, "scores").rows("accuracy") if r["way"] in study.SCORED_BY]
    assert [r["steps"] for r in waited] == [study.LONGER] * 2 and all(r["tried"] > 1 for r in waited)
    for name in ("run_order", "run_decoder", "run_trained"):
        monkeypatch.setattr(study, name, lambda *a, **_: pytest.fail("it ran again"))
    study.main("order", "decoder", "scores")
    with pytest.raises(ValueError, match="no study 'sums'"):
        study.main("sums")


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def is_as_before(model, before):
    return list(model.state_dict()) == list(before) and all(
        torch.equal(v.nan_to_num(9), before[k].nan_to_num(9)) for k, v in model.state_dict().items()
    )


@pytest.mark.parametrize(("inputs", "share"), [((4,), 0.9), ((80,), 0.995), ((1,), 0.5001)])
def test_a_share_that_leaves_no_weight_is_refused(inputs, share):
    model = nn.Sequential(nn.Linear(*inputs, 1))
    before, n = state(model), inputs[0]
    with pytest.raises(ValueError, match=f"of {n} weights leaves none"):
        prune(model, share)
    assert is_as_before(model, before)
    assert int(prune(model, (n - 1) / n)["0"].sum()) == 1
    with pytest.raises(ValueError, match="leaves none"):
        fit(model, (torch.ones(2, n), torch.zeros(2).long()), epochs=1, callbacks=[Pruning(share=share)])


def spoiled():
    model = net()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    return model


@pytest.mark.parametrize(
    ("make", "change", "told"),
    [
        (
            net,
            lambda m: quantize_layers(m, activations="static", ranges={"0": (0.0, 1.0), "2": (0.0, float("nan"))}),
            "range of 2",
        ),
        (
            net,
            lambda m: quantize_layers(m, activations="static", ranges={"0": (0.0, 1.0), "2": (0.0, 1.0, 2.0)}),
            "two finite",
        ),
        (
            net,
            lambda m: quantize_layers(m, activations="static", ranges={"0": (0.0, 0.0), "2": (0.0, 1.0)}),
            "not both 0",
        ),
        (spoiled, lambda m: simulate(m, Grid()), "not finite"),
        (net, lambda m: prune(m, scores={"0": torch.ones(32, 16), "2": torch.ones(2, 2)}), "2 has a weight of shape"),
        (net, lambda m: prune(m, scores={}), "scores lack 0, 2"),
        (net, lambda m: low_rank(m, 2, data={"0": torch.eye(16), "2": torch.eye(3)}), "2: the weight is"),
        (net, lambda m: quantize_layers(m, method="columns", data={}), "moments of nothing, none of the layers 0, 2"),
        (net, lambda m: quantize_layers(m, method="scaled", data={"a": torch.eye(2)}), "moments of a, none"),
        (
            net,
            lambda m: quantize_layers(m, method="scaled", data={"0": torch.eye(16), "2": torch.eye(32) * torch.nan}),
            "2: the moments",
        ),
    ],
)
def test_what_fails_is_checked_before_anything_changes(make, change, told):
    model = make()
    before = state(model)
    with pytest.raises(ValueError, match=told):
        change(model)
    assert is_as_before(model, before)


@pytest.mark.parametrize(
    "use",
    [
        lambda: quantize_layers(net(), skip="head"),
        lambda: simulate(net(), Grid(), skip="head"),
        lambda: prune(net(), skip="head"),
        lambda: Pruning(skip="head"),
        lambda: low_rank(net(), 2, skip="head"),
    ],
)
def test_one_str_as_skip_is_refused(use):
    with pytest.raises(TypeError, match=r"put it in a list: \['head'\]"):
        use()


def test_empty_masks_prune_nothing_and_masks_of_another_shape_are_refused():
    model, data = net(), (torch.randn(8, 16), torch.zeros(8).long())
    fit(model, data, epochs=2, callbacks=[Pruning({})])
    assert all((model[i].weight != 0).all() for i in (0, 2))
    with pytest.raises(ValueError, match="0 has a weight of shape"):
        fit(model, data, epochs=1, callbacks=[Pruning({"0": torch.ones(2, 2, dtype=torch.bool)})])


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(2, 1)

    def forward(self, x, attention_mask):
        return self.line(x)


def test_a_layer_that_sees_nothing_or_no_number_is_named():
    hidden = [{"x": torch.ones(1, 3, 2), "attention_mask": torch.zeros(1, 3)}]
    for read_inputs in (moments, input_ranges):
        with pytest.raises(ValueError, match="line read no visible position"):
            read_inputs(Masked(), hidden)
        with pytest.raises(ValueError, match="0 reads numbers that are not finite"):
            read_inputs(net(), [torch.full((2, 16), torch.nan)])


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda: Grid(bits=4.0), "whole numbers"),
        (lambda: Grid(group=2.5), "whole numbers"),
        (lambda: fake_quantize(torch.ones(1, 2), Grid(), torch.full((1, 1), torch.nan)), "greater than 0"),
        (lambda: fake_quantize(torch.ones(4, 8), Grid(), torch.ones(8)), r"needs \(4, 1\)"),
        (lambda: fake_quantize(torch.ones(4, 8), Grid(), torch.ones(4, 1), torch.ones(8)), r"needs \(4, 1\)"),
        (lambda: round_columns(torch.ones(3), torch.eye(3), Grid()), "n_in"),
        (lambda: round_columns(torch.ones(2, 3), torch.eye(3) * torch.nan, Grid()), "not finite"),
        (lambda: round_columns(torch.ones(2, 3), torch.eye(3), Grid(), damp=-1), "0 or more"),
        (lambda: prune(nn.Sequential(nn.Linear(6, 2)), pattern="2:4"), "name the layer in skip"),
        (lambda: low_rank(net(), 1.5), "between 0 and 1"),
        (lambda: low_rank(net(), 2.0), "between 0 and 1"),
        (lambda: low_rank(nn.Linear(8, 8), 2), "nn.Sequential"),
    ],
)
def test_wrong_numbers_and_shapes_are_said(wrong, told):
    with pytest.raises(ValueError, match=told):
        wrong()


def test_a_simulated_model_is_not_saved(tmp_path):
    model = net()
    simulate(model, Grid())
    with pytest.raises(ValueError, match="on=False"):
        save(model, tmp_path / "net")
    assert not (tmp_path / "net").exists()
