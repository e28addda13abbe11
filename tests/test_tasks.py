"""Chapter 27: recipes that run, pixels, spectrograms, search and boxes against definitions and reference libraries."""

import contextlib
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from ftbook import images, models, results
from ftbook.models import EfficientNetLite0
from ftbook.studies import tasks as study
from ftbook.tasks import (
    RECIPES,
    Detector,
    PairEncoder,
    Pyramid,
    Segmenter,
    SpecAugment,
    average_precision,
    class_weights,
    iou,
    log_mel,
    mel_filters,
    pixel_counts,
    point_targets,
    pseudo_values,
    recall_at,
)
from ftbook.train import Settings, fit

QUIET = Settings(precision="fp32", progress=False)

# ---------------------------------------------------------------- recipes

WORDS = ["a fine film", "a dull film", "good", "bad and long"] * 2


def inputs(name):
    """What the lines of a recipe expect, in small."""
    draws = torch.Generator().manual_seed(0)
    photos = torch.randint(0, 256, (4, 3, 64, 64), generator=draws, dtype=torch.uint8)
    y = torch.tensor([0, 1, 0, 1])
    return {
        "regression": {"texts": WORDS, "y": torch.linspace(-1, 1, 8)},
        "similarity": {"a": WORDS, "b": WORDS[::-1], "y": np.linspace(0, 1, 8)},
        "segmentation": {"photos": photos, "labels": torch.randint(0, 3, (4, 64, 64)), "n_classes": 3},
        "detection": {
            "photos": photos,
            "boxes": [torch.tensor([[8.0, 8, 40, 40]])] * 4,
            "labels": [torch.tensor([1])] * 4,
            "n_classes": 2,
        },
        "speech commands": {
            "waves": [torch.randn(3000 + 100 * i) for i in range(4)],
            "rate": 8000,
            "y": y,
            "n_classes": 2,
        },
        "retrieval": {"queries": WORDS[:4], "texts": WORDS[:4]},
        "question answering": {"questions": ["who ?"] * 4, "texts": WORDS[:4], "ends": torch.tensor([[4, 5]] * 4)},
        "titles": {"texts": WORDS[:2]},
        "labels without photos": {
            "photos": images.ImageSet(photos, y, ["ant", "bee"]),
            "names": ["ant", "bee", "wasp"],
        },
    }[name]


@pytest.mark.parametrize("name", list(RECIPES))
def test_the_lines_of_a_recipe_run(name, monkeypatch):
    load = models.load

    def small(wanted):
        if wanted == "minilm":
            return load("bert_mini_en")
        return EfficientNetLite0().eval(), lambda x: x / 255

    folder = models.path("decoder_mini_en")
    monkeypatch.setattr(models, "load", small)
    if name == "titles":
        monkeypatch.setattr(models, "path", lambda wanted: folder)
    about = inputs(name)
    exec(RECIPES[name].lines.replace("epochs=20", "epochs=1").replace("epochs=10", "epochs=1"), about)
    made = about.get("score", about.get("guess", about.get("found", about.get("net"))))
    assert made is not None


def test_a_recipe_is_whole_and_an_unknown_task_names_the_known_ones():
    assert all(len(r.lines.strip().splitlines()) <= 22 and all(r) for r in RECIPES.values())
    with pytest.raises(ValueError, match="unknown task 'translation'; known: regression, similarity, segmentation"):
        RECIPES["translation"]


# ---------------------------------------------------------------- pixels


def test_a_pyramid_gives_what_the_network_computes_on_its_way():
    torch.manual_seed(0)
    net = EfficientNetLite0().eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps = Pyramid(net).eval()(x)
        h = F.relu6(net._bn1(net._conv_head(maps[-1]))).mean((2, 3))
        assert torch.allclose(net._fc(h), net(x), atol=1e-5)
    assert [m.shape[1] for m in maps] == list(Pyramid.channels)
    assert [64 // m.shape[2] for m in maps] == list(Pyramid.strides)


def test_running_statistics_of_a_pyramid_follow_within_a_short_run():
    net = Pyramid(EfficientNetLite0())
    assert {m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}
    trunk, _ = study.trunk(study.FULL, 0)
    assert {m.momentum for m in trunk.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}


def test_a_segmenter_answers_for_every_pixel_and_learns():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 36, 52)
    y = (x[:, 0] > 0).long()
    net = Segmenter(Pyramid(EfficientNetLite0()), 2, width=16)
    history = fit(net, (x, y), epochs=4, batch_size=4, lr=3e-3, settings=QUIET)
    assert net(x).shape == (4, 2, 36, 52) and history["train_loss"][-1] < history["train_loss"][0]


def test_counts_and_iou_are_their_definitions():
    draws = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 4, (3, 5, 6), generator=draws)
    guess = torch.randint(0, 4, (3, 5, 6), generator=draws)
    counts = pixel_counts(guess, labels, 4)
    for n in range(3):
        for i in range(4):
            for j in range(4):
                assert counts[n, i, j] == ((labels[n] == i) & (guess[n] == j)).sum()
    for k in range(4):
        kept = labels >= 0
        a, b = (labels == k) & kept, (guess == k) & kept
        assert iou(counts)[k].item() == pytest.approx(((a & b).sum() / (a | b).sum()).item())
    assert torch.equal(pixel_counts(F.one_hot(guess, 4).permute(0, 3, 1, 2).float(), labels, 4), counts)


def test_a_class_that_is_nowhere_has_no_iou():
    assert iou(torch.tensor([[2, 0], [0, 0]])).isnan().tolist() == [False, True]


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=9))
def test_pseudo_values_of_a_mean_are_the_values(values):
    x = np.array(values)
    assert pseudo_values(lambda rows: x[rows].mean(), len(x)) == pytest.approx(x, abs=1e-6)


def test_pseudo_values_of_a_ratio_have_the_error_of_the_delta_method():
    draws = np.random.default_rng(0)
    down = draws.uniform(1, 2, 400)
    up = down * 0.4 + 0.1 * draws.normal(size=400)
    made = pseudo_values(lambda rows: up[rows].sum() / down[rows].sum(), 400)
    ratio = up.sum() / down.sum()
    assert made.mean() == pytest.approx(ratio, abs=1e-4)
    assert made.std() == pytest.approx(((up - ratio * down) / down.mean()).std(), rel=1e-2)


@given(st.floats(0, 1))
def test_weights_of_classes_have_mean_1_over_the_pixels(power):
    y = torch.tensor([0] * 8 + [1] * 3 + [2] + [-100] * 5)
    weight = class_weights(y, 4, power)
    assert weight[y[y >= 0]].mean().item() == pytest.approx(1, rel=1e-5) and weight[3] == 0
    assert weight[2] >= weight[1] >= weight[0] > 0
    if power == 1:
        assert torch.allclose(weight[:3] * torch.tensor([8, 3, 1]), torch.tensor(4.0))


# ---------------------------------------------------------------- spectrograms

# librosa 0.11: filters.mel(sr=8000, n_fft=32, n_mels=4) * 1e4, columns 0 to 7
MEL = [
    [0.0, 11.37292, 19.91172, 8.5388, 0.0, 0.0, 0.0, 0.0],
    [0.0, 0.0, 1.2631, 11.40041, 16.98043, 8.83, 0.67958, 0.0],
    [0.0, 0.0, 0.0, 0.0, 1.39767, 7.0063, 12.61494, 9.91219],
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.955],
]
# librosa 0.11: power_to_db(melspectrogram(sin(arange(800)**1.3 / 20), sr=8000, n_fft=256, hop_length=80, n_mels=8),
# ref=1.0, top_db=80), columns 0, 5 and 10
DECIBELS = [
    [9.3063, 3.4531, -11.1336],
    [-4.8601, 13.253, 8.63],
    [-28.4599, -6.5227, 5.9726],
    [-35.0845, -66.5939, -8.8567],
    [-40.4783, -66.5939, -13.1746],
    [-45.5752, -66.5939, -16.1369],
    [-50.3466, -66.5939, -18.4107],
    [-54.303, -66.5939, -20.0067],
]


def chirp():
    return torch.sin(torch.arange(800, dtype=torch.float64) ** 1.3 / 20)


def test_mel_filters_and_spectrograms_have_the_values_of_librosa():
    assert mel_filters(8000, 32, 4)[:, :8] * 1e4 == pytest.approx(np.array(MEL), abs=1e-5)
    made = log_mel(chirp(), 8000, n_mels=8)
    assert made[:, [0, 5, 10]].numpy() == pytest.approx(np.array(DECIBELS), abs=1e-3)


@pytest.mark.parametrize(
    "rate, n_fft, n_mels", [(8000, 256, 40), (16000, 512, 80), (22050, 1024, 128), (8000, 255, 40)]
)
def test_mel_filters_and_spectrograms_equal_librosas_where_it_is_installed(rate, n_fft, n_mels):
    librosa = pytest.importorskip("librosa", reason="librosa is in the bench extra")
    theirs = librosa.filters.mel(sr=rate, n_fft=n_fft, n_mels=n_mels, dtype=np.float64)
    assert mel_filters(rate, n_fft, n_mels) == pytest.approx(theirs, abs=1e-12)
    about = {"sr": rate, "n_fft": n_fft, "hop_length": 80, "n_mels": n_mels}
    power = librosa.feature.melspectrogram(y=chirp().numpy(), **about)
    wanted = librosa.power_to_db(power, ref=1.0, top_db=80)
    assert log_mel(chirp(), rate, n_mels, n_fft).numpy() == pytest.approx(wanted, abs=1e-5)


def test_a_spectrogram_is_the_formula_of_the_chapter():
    wave, size = chirp()[:300], 64
    made = log_mel(wave, 8000, n_mels=6, n_fft=size, hop=50, top=300.0)
    padded = np.pad(wave.numpy(), size // 2)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    waves = np.exp(-2j * np.pi * np.outer(np.arange(size // 2 + 1), np.arange(size)) / size)
    for t in range(made.shape[1]):
        frame = padded[50 * t : 50 * t + size] * window
        power = mel_filters(8000, size, 6) @ np.abs(waves @ frame) ** 2
        assert made[:, t].numpy() == pytest.approx(10 * np.log10(np.maximum(power, 1e-10)), abs=1e-6)


def test_filters_have_area_1_and_each_frequency_in_the_middle_is_counted():
    filters = mel_filters(8000, 4096, 20)
    assert filters.sum(1) * 8000 / 4096 == pytest.approx(1, abs=0.02)


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_spec_augment_hides_whole_bands_and_stretches_and_nothing_else(bands, frames, masks):
    x = torch.rand(5, 3, 12, 15) + 1
    before = x.clone()
    made = SpecAugment(bands, frames, masks, value=-1.0)(x)
    hidden = made == -1
    assert torch.equal(x, before) and torch.equal(made[~hidden], x[~hidden])
    assert torch.equal(hidden[:, :1].expand_as(hidden), hidden), "all channels alike"
    rows, columns = hidden[:, 0].all(2), hidden[:, 0].all(1)
    assert torch.equal(rows[:, :, None] | columns[:, None], hidden[:, 0])
    if not masks or not (bands or frames):
        assert not hidden.any()
    if masks == 1 and bands < 12 and frames < 15:
        assert rows.sum(1).max() <= bands and columns.sum(1).max() <= frames


# ---------------------------------------------------------------- search


def test_recall_is_counted_and_a_tie_counts_against():
    scores = torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 0.0], [5.0, 4.0, 3.0]])
    assert recall_at(scores, 1).tolist() == [True, False, False]
    assert recall_at(scores, 2).tolist() == [True, True, False]
    assert recall_at(scores, 1, torch.tensor([1, 0, 0])).tolist() == [False, False, True]


@given(st.integers(1, 6), st.integers(1, 6))
def test_recall_grows_with_k_to_all(n, m):
    draws = torch.Generator().manual_seed(n + 7 * m)
    scores = torch.rand(n, m, generator=draws)
    partner = torch.randint(0, m, (n,), generator=draws)
    found = [recall_at(scores, k, partner).sum().item() for k in range(1, m + 1)]
    assert found == sorted(found) and found[-1] == n


@pytest.fixture(scope="module")
def bert():
    return models.load("bert_mini_en")


def test_the_loss_of_pairs_is_the_mean_of_both_directions(bert):
    net = PairEncoder(*bert, temperature=0.1).eval()
    queries, texts = ["one", "two cats", "three"], ["1 of them", "2", "3 or more of them"]
    with torch.no_grad():
        out = net(**net.encode(queries, texts))
    a, b = net.vectors(queries, 16), net.vectors(texts, 64)
    assert torch.allclose(out.logits, a @ b.T, atol=1e-5)
    y = torch.arange(3)
    wanted = (F.cross_entropy(a @ b.T / 0.1, y) + F.cross_entropy(b @ a.T / 0.1, y)) / 2
    assert torch.isclose(out.loss, wanted, atol=1e-4)


# ---------------------------------------------------------------- boxes


def test_targets_are_at_the_middle_and_the_smaller_box_wins():
    boxes = torch.tensor([[0.0, 0, 32, 32], [12, 12, 20, 20]])
    classes, where = point_targets(boxes, torch.tensor([5, 7]), (8, 8), stride=4, radius=1.5)
    grid = classes.view(8, 8)
    assert (grid[3:5, 3:5] == 7).all() and (grid == 7).sum() == 4
    assert (grid[2:6, 2:6] >= 0).all() and (grid >= 0).sum() == 16
    assert torch.equal(where[classes == 7], boxes[1].expand(4, 4))
    none = point_targets(torch.zeros(0, 4), torch.zeros(0).long(), (2, 3))
    assert none[0].tolist() == [-1] * 6


def test_the_boxes_of_a_detector_are_distances_from_its_places():
    net = Detector(Pyramid(EfficientNetLite0()), 2)
    output = torch.zeros(1, 6, 2, 3)
    output[0, 2:, 1, 2] = torch.tensor([0.5, 1.0, 0.25, 2.0]).log()
    boxes = net.boxes(output)[0].view(2, 3, 4)
    assert torch.allclose(boxes[0, 0], torch.tensor([-2.0, -2, 6, 6]))
    assert torch.allclose(boxes[1, 2], torch.tensor([10.0 - 2, 6 - 4, 10 + 1, 6 + 8]))


def test_the_loss_is_small_where_the_output_is_right_and_has_gradients():
    net = Detector(Pyramid(EfficientNetLite0()), 2)
    labels, boxes = point_targets(torch.tensor([[4.0, 4, 20, 20]]), torch.tensor([1]), (6, 6))
    output = torch.full((1, 6, 6, 6), -9.0)
    at = (labels >= 0).view(6, 6)
    output[0, 1][at] = 9.0
    places = (torch.arange(6) + 0.5) * 4
    y, x = torch.meshgrid(places, places, indexing="ij")
    edges = torch.stack((x - 4, y - 4, 20 - x, 20 - y)).clamp_min(0.1) / 4
    output[0, 2:] = edges.log()
    right = net.loss(output, labels[None], boxes[None])
    output[0, 1][at] = -9.0
    assert right < 0.01 < 1 < net.loss(output, labels[None], boxes[None])
    wrong = torch.zeros(1, 6, 6, 6, requires_grad=True)
    net.loss(wrong, labels[None], boxes[None]).backward()
    assert wrong.grad.isfinite().all() and wrong.grad[0, :2].abs().min() > 0


def test_the_class_part_is_torchvisions_focal_loss():
    ops = pytest.importorskip("torchvision.ops")
    net = Detector(Pyramid(EfficientNetLite0()), 3)
    logits = torch.randn(1, 7, 4, 4)
    empty = torch.full((1, 16), -1), torch.zeros(1, 16, 4)
    wanted = ops.sigmoid_focal_loss(logits[:, :3], torch.zeros(1, 3, 4, 4), reduction="sum")
    assert torch.isclose(net.loss(logits, *empty), wanted, rtol=1e-5)


def test_a_detector_learns_one_picture_and_finds_its_box():
    torch.manual_seed(0)
    x, box = torch.zeros(2, 3, 64, 64), torch.tensor([[16.0, 20, 44, 48]])
    x[:, :, 20:48, 16:44] = 2.0
    net = Detector(Pyramid(EfficientNetLite0()), 2, width=16)
    labels, boxes = point_targets(box, torch.tensor([1]), (16, 16))
    data = {"x": x, "labels": labels.expand(2, -1), "boxes": boxes.expand(2, -1, -1)}
    history = fit(net, data, loss=None, epochs=12, batch_size=2, lr=5e-3, settings=QUIET)
    assert history["train_loss"][-1] < history["train_loss"][0] / 2
    found = net.find(x[:1], least=0.0)[0]
    assert set(found) == {"boxes", "scores", "labels"} and (found["scores"].diff() <= 0).all()
    assert found["boxes"].min() >= 0 and found["boxes"].max() <= 64 and len(found["boxes"]) <= 100


def drawn(seed, n=12, classes=3):
    """Boxes found and true at random; with odd seeds many scores tie."""
    draws, found, truth = np.random.default_rng(seed), [], []
    for _ in range(n):
        m, f = draws.integers(0, 5), draws.integers(0, 9)
        low = draws.uniform(0, 60, (m, 2)).round()
        true = np.concatenate([low, low + draws.uniform(8, 30, (m, 2)).round()], 1)
        label = draws.integers(0, classes, m)
        if m:
            which = draws.integers(0, m, f)
            box, said = true[which] + draws.normal(0, 3, (f, 4)).round(), label[which]
            said = np.where(draws.random(f) < 0.8, said, draws.integers(0, classes, f))
        else:
            box = np.concatenate([draws.uniform(0, 30, (f, 2)), draws.uniform(40, 80, (f, 2))], 1)
            said = draws.integers(0, classes, f)
        box[:, 2:] = np.maximum(box[:, 2:], box[:, :2] + 1)
        score = (10 * draws.random(f)).round() / 10 if seed % 2 else draws.random(f)
        truth.append({"boxes": torch.tensor(true).view(-1, 4).float(), "labels": torch.tensor(label)})
        found.append({"boxes": torch.tensor(box).float(), "labels": torch.tensor(said)})
        found[-1]["scores"] = torch.tensor(score).float()
    return found, truth


def by_coco(found, truth, classes):
    """pycocotools' table of AP, overlaps x classes."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def plain(boxes):
        return [[a, b, c - a, d - b] for a, b, c, d in boxes.tolist()]

    marks, said = [], []
    for i, (f, t) in enumerate(zip(found, truth, strict=True), 1):
        for box, k in zip(plain(t["boxes"]), t["labels"].tolist(), strict=True):
            mark = {"id": len(marks) + 1, "image_id": i, "category_id": k + 1, "bbox": box, "iscrowd": 0}
            marks.append(mark | {"area": box[2] * box[3]})
        for box, s, k in zip(plain(f["boxes"]), f["scores"].tolist(), f["labels"].tolist(), strict=True):
            said.append({"image_id": i, "category_id": k + 1, "bbox": box, "score": s})
    with contextlib.redirect_stdout(io.StringIO()):
        truth_of = COCO()
        kinds = [{"id": k + 1, "name": str(k)} for k in range(classes)]
        pictures = [{"id": i + 1, "width": 100, "height": 100} for i in range(len(truth))]
        truth_of.dataset = {"images": pictures, "annotations": marks, "categories": kinds}
        truth_of.createIndex()
        judged = COCOeval(truth_of, truth_of.loadRes(said), "bbox")
        judged.evaluate()
        judged.accumulate()
    table = judged.eval["precision"][:, :, :, 0, 2]
    return np.where(table < 0, np.nan, table).mean(1)


@pytest.mark.parametrize("seed", range(6))
def test_average_precision_equals_pycocotools_where_it_is_installed(seed):
    pytest.importorskip("pycocotools", reason="pycocotools is in the bench extra")
    found, truth = drawn(seed)
    assert average_precision(found, truth, 3) == pytest.approx(by_coco(found, truth, 3), abs=1e-9, nan_ok=True)


def plain_ap(found, truth, k, least):
    """The definition: one list of boxes by score, each claims the best free true box."""
    from torchvision.ops import box_iou

    said = [
        (s.item(), i, b)
        for i, f in enumerate(found)
        for s, b, c in zip(*map(f.get, ("scores", "boxes", "labels")), strict=True)
        if c == k
    ]
    said.sort(key=lambda t: (-t[0], t[1]))
    free = {(i, j) for i, t in enumerate(truth) for j in range(len(t["boxes"])) if t["labels"][j] == k}
    total, right, points = len(free), 0, []
    for rank, (_, i, box) in enumerate(said, 1):
        mine = [(box_iou(box[None], truth[i]["boxes"][j][None]).item(), j) for n, j in free if n == i]
        best = max(mine, default=(0.0, -1))
        if best[0] >= least:
            free.discard((i, best[1]))
            right += 1
        points.append((right / total, right / rank))
    levels = np.linspace(0, 1, 101)
    return np.mean([max((p for r, p in points if r >= level), default=0.0) for level in levels])


@pytest.mark.parametrize("seed", [0, 2])
def test_average_precision_is_its_definition(seed):
    found, truth = drawn(seed)
    table = average_precision(found, truth, 3, [0.5, 0.75])
    for row, least in zip(table, (0.5, 0.75), strict=True):
        for k in range(3):
            assert row[k] == pytest.approx(plain_ap(found, truth, k, least), abs=1e-9)


def test_a_class_without_a_true_box_has_no_ap_and_finding_nothing_is_0():
    nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0).long()}
    one = {"boxes": torch.tensor([[0.0, 0, 5, 5]]), "labels": torch.tensor([1])}
    table = average_precision([nothing], [one], 2, [0.5])
    assert math.isnan(table[0, 0]) and table[0, 1] == 0


TRUE = {"boxes": torch.tensor([[0.0, 0, 5, 5]]), "labels": torch.tensor([0])}
SAID = TRUE | {"scores": torch.ones(1)}


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda: pixel_counts(torch.zeros(1, 2, 2).long(), torch.zeros(1, 3, 2).long(), 2), r"labels \(1, 3, 2\)"),
        (lambda: pixel_counts(torch.full((1, 2, 2), 5), torch.zeros(1, 2, 2).long(), 2), "give 0 to 1"),
        (lambda: pseudo_values(lambda rows: 0.0, 1), "needs at least 2"),
        (lambda: pixel_counts(torch.randn(1, 3, 2, 2), torch.zeros(1, 2, 2).long(), 2), r"logits \(N, 2, H, W\)"),
        (
            lambda: pixel_counts(torch.full((1, 2, 1, 1), torch.nan), torch.zeros(1, 1, 1).long(), 2),
            "2 logits are no num",
        ),
        (lambda: iou(torch.ones(2, 3)), r"counts are \(2, 3\)"),
        (lambda: iou(-torch.ones(2, 2)), "0 or more"),
        (lambda: pseudo_values(lambda rows: 0.0, 2.5), "n must be an integer"),
        (lambda: class_weights(torch.tensor([-100]), 2), "none of 1 labels is one of 2 classes"),
        (lambda: class_weights(torch.tensor([0, 1]), 2, math.inf), "power must be at least 0 and finite"),
        (lambda: mel_filters(8000, 256, 40, high=5000.0), "give 0 <= low < high <= 4000"),
        (lambda: log_mel(torch.zeros(2, 50), 8000), r"shape \(2, 50\); give one recording"),
        (lambda: log_mel(torch.tensor([0.0, torch.nan]), 8000), "1 of 2 samples are no finite number"),
        (lambda: log_mel(torch.zeros(50), 8000, hop=0), "hop must be an integer >= 1"),
        (lambda: log_mel(torch.zeros(50), 8000, top=-5.0), "top must be positive"),
        (lambda: SpecAugment(-1), "whole numbers of 0 or more"),
        (lambda: SpecAugment(1.5), "whole numbers of 0 or more"),
        (lambda: SpecAugment()(torch.ones(8, 8)), r"of one alone x\[None\]"),
        (lambda: recall_at(torch.zeros(2, 2), 0), "k must be an integer >= 1"),
        (lambda: recall_at(torch.full((2, 2), torch.nan)), "4 scores are no numbers"),
        (lambda: recall_at(torch.zeros(1, 2), 1, torch.tensor([2])), "there are 2 texts"),
        (lambda: point_targets(torch.zeros(1, 3), torch.zeros(1), (2, 2)), r"give \(n, 4\) and \(n,\)"),
        (lambda: point_targets(torch.tensor([[8.0, 0, 0, 8]]), torch.tensor([1]), (2, 2)), "ends before it begins"),
        (lambda: point_targets(torch.full((1, 4), torch.nan), torch.tensor([1]), (2, 2)), "is no number"),
        (lambda: average_precision([], [{}], 1), "0 images were looked at and 1 are labeled"),
        (lambda: average_precision([TRUE], [TRUE], 1), r"found\[0\] lacks scores"),
        (lambda: average_precision([SAID | {"scores": torch.full((1,), torch.nan)}], [TRUE], 1), "no numbers"),
        (lambda: average_precision([SAID | {"scores": torch.ones(2)}], [TRUE], 1), r"beside them \(1,\), \(2,\)"),
        (lambda: average_precision([SAID], [TRUE | {"labels": torch.tensor([3])}], 1), r"truth\[0\] has labels \[3\]"),
        (lambda: average_precision([SAID], [TRUE], 1, [2.0]), "above 0 to 1"),
        (lambda: Segmenter(Pyramid(models.EfficientNetLite0()), 0), "n_classes"),
        (lambda: Pyramid(models.EfficientNetLite0(), momentum=2.0), "momentum=2.0"),
        (lambda: PairEncoder(nn.Linear(1, 1), None, temperature=0.0), "temperature must be positive"),
        (lambda: PairEncoder(nn.Linear(1, 1), None).encode(["a"], []), "1 queries and 0 texts; give pairs"),
    ],
)
def test_what_does_not_fit_is_refused(call, told):
    with pytest.raises(ValueError, match=told):
        call()


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda: pixel_counts(torch.zeros(1, 1, 1).long(), torch.zeros(1, 1, 1), 2), "labels are torch.float32"),
        (lambda: class_weights([0, 1], 2), "labels are list"),
        (lambda: log_mel(np.zeros(9), 8000), "a tensor of real numbers"),
        (lambda: recall_at(torch.zeros(2, 2), 1, torch.tensor([0.0, 1.0])), "partners are torch.float32"),
        (lambda: point_targets(TRUE["boxes"], torch.ones(1), (2, 2)), "labels are torch.float32"),
        (lambda: average_precision([{k: v.numpy() for k, v in SAID.items()}], [TRUE], 1), "must be tensors"),
        (lambda: Pyramid(nn.Linear(1, 1)), "Linear is no EfficientNet-Lite0"),
        (lambda: PairEncoder(nn.Linear(1, 1), None).encode("ab", "cd"), "give lists of texts"),
        (lambda: PairEncoder(nn.Linear(1, 1), None).vectors("ab"), "give a list of texts"),
    ],
)
def test_another_kind_of_data_is_refused(call, told):
    with pytest.raises(TypeError, match=told):
        call()


def test_a_recording_of_integers_has_decibels_with_decimals():
    wave = (1000 * chirp()).round().short()
    made = log_mel(wave, 8000)
    assert made.dtype == torch.float32 and (made != made.round()).any()
    assert made.numpy() == pytest.approx(log_mel(wave.double(), 8000).numpy(), abs=1e-4)


# ---------------------------------------------------------------- the studies


def test_a_mirrored_photo_has_a_mirrored_map():
    x = torch.arange(6.0).expand(8, 3, 4, 6).clone()
    y = torch.arange(6).expand(8, 4, 6).clone()
    seen = [(a, b) for a, b in study.Mirrored(x, y, 4, seed=1)]
    assert len(seen) == 2 and any(a[i, 0, 0, 0] > 0 for a, _ in seen for i in range(4))
    assert all(torch.equal(a[:, 0].long(), b) for a, b in seen)
    assert torch.equal(x[0, 0, 0], torch.arange(6.0)), "the photos themselves stay"


@pytest.mark.parametrize("way", [study.TOP, study.PLACE, study.COLOR, study.FROZEN, study.WEIGHTED])
def test_a_way_colors_streets(way):
    about = {study.COLOR: {"C": 1.0}, study.FROZEN: {"lr": 1e-3}, study.WEIGHTED: {"lr": 1e-3, "power": 1.0}}
    found = study.run_scenes(0, "test", way, **about.get(way, {}))
    n = len(study.scenes("test")[0])
    assert found["mIoU"].shape == (n,) and found["pixels"][0].sum() <= found["pixels"][1].sum()
    assert 0 <= found["IoU sky"] <= 1


def test_a_frozen_trunk_stays_as_it_is():
    net, _ = study.trunk(study.FROZEN, 0)
    again, _ = study.trunk(study.FULL, 1)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))


def test_nobody_who_is_tested_is_heard_before_except_where_the_row_says_so():
    _, _, who, number, names = study.spoken()
    judge = len(names) - 1
    for seed in study.FOLDS:
        for split in ("valid", "test"):
            train, score = study._speech_parts(seed, split, study.FULL)
            assert not set(who[train].tolist()) & set(who[score].tolist())
            assert judge not in who[train] and seed not in who[train]
            assert set(who[score].tolist()) == {judge if split == "valid" else seed}
        train, score = study._speech_parts(seed, "test", study.HEARD)
        assert seed in who[train] and not set(train.tolist()) & set(score.tolist())


@pytest.mark.parametrize("way", [study.TOP, study.LINE, study.MASKED])
def test_a_way_understands_digits(way):
    about = {study.LINE: {"C": 1.0}, study.MASKED: {"lr": 1e-3, "mask": 4}}
    found = study.run_speech(0, "test", way, **about.get(way, {}))["accuracy"]
    assert len(found) == 10 * study.ASKED and set(found) <= {0.0, 1.0}


def test_parts_of_the_articles_share_none():
    parts = study.articles()
    texts = [set(texts) for _, texts in parts.values()]
    assert len(set.union(*texts)) == sum(study.SIZES.values())


def test_bm25_is_its_formula():
    texts = ["a b b c", "a c", "b d"]
    idf = math.log(1 + (3 - 2 + 0.5) / 2.5)
    low = 1.5 * (0.25 + 0.75 * 4 / (8 / 3))
    assert study.bm25(["b"], texts)[0, 0].item() == pytest.approx(idf * 2 * 2.5 / (2 + low))


@pytest.mark.parametrize("way", [study.CHANCE, study.WORDS, study.RANKED, study.ASIS, study.BOTH])
def test_a_way_searches(way):
    about = {"lr": 1e-5, "share": 0.5} if way == study.BOTH else {}
    found = study.run_search(0, "test", way, **about)
    assert (found["recall at 10"] >= found["recall at 1"]).all() and len(found["recall at 1"]) == study.SIZES["test"]


def test_scenes_are_the_same_every_time_and_boxes_lie_inside():
    made = study.make_scenes("test")
    study.make_scenes.cache_clear()
    assert torch.equal(study.make_scenes("test")["x"], made["x"])
    for truth in made["truth"]:
        assert len(truth["boxes"]) >= 1 and truth["boxes"].min() >= 0 and truth["boxes"].max() <= study.CANVAS


def test_windows_stand_where_their_boxes_say():
    x = torch.zeros(1, 3, 64, 64)
    x[:, :, 16:32, 32:48] = 255.0
    cut, boxes = study.windows(x, 16)
    assert cut.shape == (1, len(boxes), 128) and (boxes[:, 2:] - boxes[:, :2] == 16).all()
    at = (boxes == torch.tensor([32.0, 16, 48, 32])).all(1).nonzero()
    seen = cut[0, at[0, 0]].view(8, 4, 4)  # directions, cells: edges at the sides, above and below
    assert len(at) == 1 and torch.allclose(seen[0], seen[0].flip(1), atol=1e-4)
    assert torch.allclose(seen[4], seen[0].mT, atol=1e-4) and seen[0].sum() > 1 > seen[2].sum()
    empty = (boxes[:, :2] >= 50).all(1)
    assert len(boxes[empty]) == 0 or cut[0, empty].abs().max() == 0


@pytest.mark.parametrize("way", [study.TOP, study.WINDOW, study.FULL])
def test_a_way_finds_boxes(way):
    about = {study.WINDOW: {"C": 1.0}, study.FULL: {"lr": 1e-3}}
    found = study.run_boxes(0, "test", way, **about.get(way, {}))
    assert len(found["AP50"]) == study.MADE["test"] and 0 <= found["AP"] <= 1


def test_a_study_goes_on_where_it_stopped(monkeypatch, tmp_path):
    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path))
    study.main("search")
    ran = []
    monkeypatch.setattr(study, "run_search", lambda **about: ran.append(about))
    study.main("search")
    found = results.load_study(study.CHAPTER, "search")
    assert not ran and {r["way"] for r in found.rows("recall at 1")} >= {study.WORDS, study.TUNED, study.BOTH}


def test_an_unknown_part_is_refused_before_anything_runs():
    told = "use scenes, speech, search, boxes, samples, answers, tilts, pairs, headlines, names, shown"
    with pytest.raises(ValueError, match=f"no study 'sounds'; {told}"):
        study.main("sounds")


# ---------------------------------------------------------------- the five smaller tasks


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_question_asks_for_the_only_name_of_its_kind_and_pieces_lead_back_to_it(split):
    given, places = study._pieces(split)
    for i, (kind, words, a, b) in enumerate(study._asked(split)):
        text = study.encoder()[1].decode(given["input_ids"][i])
        assert kind.split("-")[0] in text and 0 <= a < b <= len(words)
        seen = [w for w in places[i] if w is not None]
        assert seen == sorted(seen) and set(seen) == set(range(max(seen) + 1)), "words in order, none left out"


@pytest.mark.parametrize(
    "text, span",
    [("we met Ada Lovelace there", (2, 4)), ("in Oslo, Norway", (1, 2)), ("nobody here", (0, 1)), ("NASA", (0, 1))],
)
def test_the_first_capitalized_words_end_at_a_comma(text, span):
    assert study._capitalized(text.split()) == span


@pytest.mark.parametrize("way", [study.CAPITALS, study.SHAPED, study.HEAD, study.TUNED])
def test_a_way_answers_with_words_of_the_text(way):
    found = study._run_answers(0, "test", way, lr=1e-3 if way in (study.HEAD, study.TUNED) else None)
    assert len(found["F1"]) == len(study._asked("test")) and (found["F1"] <= 1).all()
    assert (found["exact"] <= found["F1"]).all() and ((found["F1"] == 1) == (found["exact"] == 1)).all()


def test_answers_are_scored_by_the_words_they_share(monkeypatch):
    monkeypatch.setattr(study, "_asked", lambda split: [("person", ["a", "B", "C", "d"], 1, 3)] * 3)
    spans = iter([(1, 3), (2, 4), (0, 1)])
    monkeypatch.setattr(study, "_capitalized", lambda words: next(spans))
    found = study._run_answers(0, "test", study.CAPITALS)
    assert found["F1"].tolist() == [1.0, 0.5, 0.0] and found["exact"].tolist() == [1.0, 0.0, 0.0]


def test_a_photo_is_turned_by_the_angle_that_is_asked_for_and_its_corners_are_gray(monkeypatch):
    class Set:
        x = torch.zeros(6, 3, 60, 80, dtype=torch.uint8)

    Set.x[:, :, 30:] = 255  # a horizon
    monkeypatch.setattr(study.data, "load", lambda *a, **k: Set)
    study._tilted.cache_clear()
    x, angle = study._tilted("test")
    study._tilted.cache_clear()
    side = x.shape[-1]
    assert (x[:, :, 0, 0] == 128).all() and angle.abs().max() <= study.TILT
    line = torch.linspace(-1, 1, side)
    below = [
        (v[0, :, side // 4].float() < 128).float().mean() for v in x
    ]  # how far down the horizon is, left of the middle
    rise = torch.stack(below) * 2 - 1
    expected = -torch.tan(angle.deg2rad()) * line[side // 4]
    assert torch.corrcoef(torch.stack((rise, expected)))[0, 1].abs() > 0.98
    bins = study._edge_directions(x).argmax(1) * 5.0 + 2.5
    off = (bins - 90 - angle).abs().min((bins - 90 + angle).abs())
    assert (off < 6).all(), "the edge runs across the horizon"


@pytest.mark.parametrize("way", [study.MEAN, study.EDGES, study.FROZEN, study.FULL])
def test_a_way_guesses_tilts(way):
    found = study._run_tilts(0, "test", way, lr=1e-3 if way == study.FULL else None)["degrees"]
    assert len(found) == len(study._tilted("test")[1]) and (found >= 0).all()


def test_a_question_stands_in_one_pair_and_about_half_are_alike():
    a, b, y = study._pairs("test")
    assert len(a) == len(b) == len(y) and 0.3 < y.mean() < 0.7
    found = study.data.load("sst2", "test", bundled=True)
    kinds = dict(zip(found.texts, found.y.tolist(), strict=True))
    assert [float(kinds[p] == kinds[q]) for p, q in zip(a, b, strict=True)] == y.tolist()


def test_pairs_of_two_kinds_are_of_any_two_kinds(monkeypatch):
    y = torch.arange(600) % 6
    some = study.data.TextSet([f"q{i}" for i in range(600)], y, list("abcdef"), "made", "ftbook")
    monkeypatch.setattr(study.data, "load", lambda *a, **k: some)
    monkeypatch.setattr(study.runtime, "pick", lambda quick, cpu: cpu)
    a, b, same = study._pairs.__wrapped__("train")
    kinds = [(int(p[1:]) % 6, int(q[1:]) % 6) for p, q in zip(a, b, strict=True)]
    met = {pair for pair, alike in zip(kinds, same, strict=True) if not alike}
    assert met >= {(i, j) for i in range(6) for j in range(6) if i != j and abs(i - j) == 1}
    assert len(met) > 25 and 0.45 < same.mean() < 0.55


@pytest.mark.parametrize("way", [study.DRAWN, study.FIRST, study.WORDS, study.ASIS, study.JOINT, study.TUNED])
def test_a_way_compares_questions(way):
    found = study._run_pairs(0, "test", way, lr=1e-4 if way == study.TUNED else None)
    assert len(found["AUC"]) == len(study._pairs("test")[2]) and math.isfinite(found["AUC"].mean())


@pytest.mark.parametrize(
    "said, right, score",
    [("a b", "a b", 1.0), ("a a b", "a", 0.5), ("", "a", 0.0), ("", "", 0.0), ("Fox!", "fox", 1.0)],
)
def test_rouge_counts_words_as_often_as_they_stand(said, right, score):
    assert study.rouge(said, right) == pytest.approx(score)


@pytest.mark.parametrize("way", [study.COPIED, study.CAPITALS, study.WRITTEN])
def test_a_way_gives_titles(way):
    found = study._run_headlines(0, "test", way, k=2)
    assert len(found["exact"]) == study.LEADS["test"] and (found["exact"] <= found["ROUGE-1"] + 1e-9).all()
    assert way != study.COPIED or found["ROUGE-1"].mean() == 1, "the bundled titles are the first two words"


def test_classes_that_are_tested_without_photos_choose_nothing_and_train_nothing(monkeypatch):
    chosen = {k for pair in study.COUPLES["valid"] for k in pair}
    assert not chosen & {k for pair in study.COUPLES["test"] for k in pair}
    x, y = study._known("train")
    spoiled = x.copy()
    spoiled[np.isin(y, study.COUPLES["test"][3])] = 99.0
    before = {w: study._run_names(3, "test", w)["accuracy"] for w in (study.WEIGHED, study.MAPPED)}
    judged = study._known("test")
    monkeypatch.setattr(study, "_known", lambda split: (spoiled, y) if split == "train" else judged)
    for way, values in before.items():
        assert np.array_equal(study._run_names(3, "test", way)["accuracy"], values), way


@pytest.mark.parametrize("way", [study.DRAWN, study.WEIGHED, study.MAPPED, study.BOTH_SEEN])
@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_way_names_photos(way, split):
    found = study._run_names(1, split, way)["accuracy"]
    assert len(found) and set(found) <= {0.0, 1.0}
