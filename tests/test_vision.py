"""Chapter 9's library: images in, weights found, predictions explained, strategies that move what they say."""

import copy
import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

from ftbook import models, results
from ftbook import vision as v
from ftbook.data import ChecksumError, File
from ftbook.finetune import tune
from ftbook.images import ImageSet, as_images
from ftbook.models import SmallCNN
from ftbook.studies import vision as study
from ftbook.train import Settings, fit, predict

QUIET = Settings(progress=False)


def images(n=24, classes=2, size=8, seed=0):
    "Bright squares and dark ones: easy to tell apart."
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    x = 60 + 120 * y[:, None, None, None] / max(classes - 1, 1) + 40 * torch.rand(n, 3, size, size, generator=generator)
    return ImageSet(x.to(torch.uint8), y, [f"class {i}" for i in range(classes)])


def small(classes=4, seed=0):
    torch.manual_seed(seed)
    return SmallCNN(classes, (3, 6, 8, 8)).eval()


# the source's network


def test_the_source_network_has_the_source_shapes():
    net = v.TwoConvCNN()
    assert {n: tuple(p.shape) for n, p in net.named_parameters() if n.endswith("weight")} == {
        "conv1.weight": (64, 3, 3, 3),
        "conv2.weight": (128, 64, 3, 3),
        "fc1.weight": (256, 128 * 8 * 8),
        "fc2.weight": (10, 256),
    }
    pooled_first = net.fc2(
        torch.relu(
            net.fc1(
                torch.relu(
                    torch.max_pool2d(
                        net.conv2(torch.relu(torch.max_pool2d(net.conv1(x := torch.rand(2, 3, 32, 32)), 2))), 2
                    )
                ).flatten(1)
            )
        )
    )
    torch.testing.assert_close(net(x), pooled_first)
    with pytest.raises(ValueError, match="size=32"):
        net(torch.rand(1, 3, 28, 28))
    with pytest.raises(ValueError, match="divisible by 4"):
        v.TwoConvCNN(size=30)


# backbones


def test_backbones_compute_what_torchvision_computes():
    import torchvision

    torch.manual_seed(3)
    ours = v.backbone("mobilenet_v2", weights=None).eval()
    torch.manual_seed(3)
    theirs = torchvision.models.mobilenet_v2().eval()
    x = torch.rand(2, 3, 64, 64)
    normalize = torchvision.transforms.Normalize(v._IMAGENET_MEAN, v._IMAGENET_STD)
    torch.testing.assert_close(ours(x), theirs(normalize(x)), rtol=1e-4, atol=1e-5)
    assert ours.origin == "random" and v.backbone("resnet18", None, n_classes=3)(x).shape == (2, 3)


def test_backbones_that_do_not_exist():
    with pytest.raises(ValueError, match="efficientnet_lite0, mobilenet_v2, resnet18, resnet50"):
        v.backbone("vgg16")
    with pytest.raises(ValueError, match="imagenet"):
        v.backbone("resnet18", weights="cifar")


def test_missing_weights_say_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setenv("FTBOOK_DATA", str(tmp_path))
    monkeypatch.setenv("FTBOOK_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="(?s)resnet50-.*FTBOOK_OFFLINE is set.*load_bundled"):
        v.backbone("resnet50")
    assert not list((tmp_path / "weights").glob("*")) if (tmp_path / "weights").exists() else True


def test_weights_in_the_cache_folder_are_verified_before_they_are_used(tmp_path, monkeypatch):
    import torchvision

    monkeypatch.setenv("FTBOOK_DATA", str(tmp_path))
    official = v._official("mobilenet_v2")
    assert v._found("mobilenet_v2", official) is None
    (tmp_path / "weights").mkdir()
    path = tmp_path / official.path
    torch.save(torchvision.models.mobilenet_v2().state_dict(), path)
    with pytest.raises(ChecksumError, match="Move it away"):
        v.backbone("mobilenet_v2")
    right = File(official.path, hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size, ())
    monkeypatch.setattr(v, "_official", lambda name: right)
    model = v.backbone("mobilenet_v2")
    assert model.origin == official.name and model.classes[309:311] == ["bee", "ant"]


def test_efficientnet_comes_through_the_models_with_the_scaling_of_its_card(monkeypatch):
    torch.manual_seed(1)
    loaded = models.EfficientNetLite0().eval()
    loaded.classes = ["an ant", *map(str, range(999))]
    monkeypatch.setattr(models, "load", lambda name, progress: (loaded, None))
    model = v.backbone("efficientnet_lite0").eval()
    x = (255 * torch.rand(2, 3, 64, 64)).to(torch.uint8)
    card = models.card("efficientnet_lite0")
    wanted = loaded(models.Normalize(card.mean, card.std)(x))
    torch.testing.assert_close(model(as_images(x)), wanted, rtol=1e-4, atol=1e-5)
    assert model.origin == "efficientnet-lite0-57934424.pth" and model.classes == loaded.classes
    assert next(iter(v._BACKBONES)) == model.name == "efficientnet_lite0"
    tuned = v.backbone("efficientnet_lite0", n_classes=2)
    assert tuned(as_images(x)).shape == (2, 2) and not hasattr(tuned, "classes"), "a fresh head has no names"
    assert torch.equal(tuned.net._conv_stem.weight, loaded._conv_stem.weight)


def test_efficientnet_with_random_weights_needs_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("FTBOOK_DATA", str(tmp_path))
    monkeypatch.setenv("FTBOOK_OFFLINE", "1")
    torch.manual_seed(2)
    model = v.backbone("efficientnet_lite0", weights=None)
    torch.manual_seed(2)
    assert torch.equal(model.net._fc.weight, models.EfficientNetLite0()._fc.weight)
    assert model.origin == "random" and not hasattr(model, "classes") and not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="(?s)no weights for efficientnet_lite0.*weights=None.*load_bundled"):
        v.backbone("efficientnet_lite0")


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet18"])
@pytest.mark.parametrize("profile", ["cpu", "quick"])
def test_the_bundled_network_stands_in_only_where_the_caller_allows_it(name, profile, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "_stand_ins", {})
    monkeypatch.setenv("FTBOOK_DATA", str(tmp_path))
    monkeypatch.setenv("FTBOOK_OFFLINE", "1")
    monkeypatch.setenv("FTBOOK_PROFILE", profile)
    model = v.backbone(name, bundled=True)
    assert f"{name} replaced by the bundled network" in capsys.readouterr().out and name in results.substituted()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(x), v.load_bundled()(x)) and model.classes == v.load_bundled().classes
    assert model.origin.startswith("substitute") and v.load_cnn(v.save_cnn(model, tmp_path)).classes == model.classes
    assert v.backbone(name, n_classes=3, bundled=True)(x).shape == (2, 3)
    with pytest.raises(FileNotFoundError, match=f"no weights for {name}"):
        v.backbone(name)


def test_weights_are_downloaded_up_to_their_size_and_checked(tmp_path, monkeypatch):
    import torchvision

    monkeypatch.setenv("FTBOOK_DATA", str(tmp_path))
    asked = []

    def deliver(url, sink, seconds):
        asked.append((url, sink.limit))
        torch.save(torchvision.models.resnet18().state_dict(), sink.stream)

    monkeypatch.setattr("ftbook.data._transfer", deliver)
    with pytest.raises(
        FileNotFoundError,
        match="(?s)no weights for resnet18.*another resnet18-f37072fd.pth: expected f37072fd, got.*load_bundled",
    ):
        v.backbone("resnet18", progress=False)
    url, limit = asked[0]
    assert url.endswith("/resnet18-f37072fd.pth") and 46_827_520 <= limit < 46_900_000  # the file has 46,830,571 bytes
    assert [f for f in tmp_path.rglob("*") if f.is_file()] == []
    monkeypatch.setattr(v, "_official", lambda name: File("weights/resnet18-.pth", "", limit, (url,)))
    monkeypatch.setattr("ftbook.data.verify", lambda path, digits: path)
    model = v.backbone("resnet18", progress=False)
    assert model.origin == "resnet18-.pth" and len(model.classes) == 1000 and model.classes[309:311] == ["bee", "ant"]
    monkeypatch.setattr(v, "verify", lambda path, digits: path)
    assert not hasattr(v.backbone("resnet18", n_classes=2), "classes"), "a fresh head has no names"
    assert v.predict_topk(model, torch.rand(1, 3, 32, 32)).names[0][0] in model.classes


class Compiled(nn.Module):
    """What torch.compile gives: a module around the network, which it calls `_orig_mod`."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model


def tuned(kind):
    """A network of every kind that can be stored, after a step of training, so that no tensor is as it was built."""
    torch.manual_seed(3)
    half = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    model = {
        "small": lambda: SmallCNN(2, (3, 6, 8, 8)),
        "small, normalized": lambda: v.Normalized(SmallCNN(2, (3, 4, 4)), *half),
        "source": lambda: v.Normalized(v.TwoConvCNN(2, (3, 4, 6), 10, size=32), *half),
        "compiled": lambda: Compiled(SmallCNN(2, (3, 6, 8, 8))),
    }.get(kind, lambda: v.backbone(kind, None, n_classes=2))()
    part = images(8, size=32)
    fit(getattr(model, "_orig_mod", model), part, epochs=1, lr=0.01, batch_size=4, settings=QUIET)
    return model, part


@pytest.mark.parametrize("kind", ["small", "small, normalized", "source", "compiled", "efficientnet_lite0", "resnet18"])
def test_a_tuned_network_is_stored_and_read_again_exactly(tmp_path, kind):
    model, part = tuned(kind)
    state = torch.get_rng_state()
    again = v.load_cnn(v.save_cnn(model, tmp_path / "cnn", classes=["ant", "bee"]))
    assert torch.equal(state, torch.get_rng_state()), "reading a network draws no random numbers"
    plain = getattr(model, "_orig_mod", model).eval()
    x = as_images(part.x)
    with torch.no_grad():
        assert torch.equal(again(x), plain(x)) and type(again) is type(plain)
    assert again.classes == ["ant", "bee"] and not again.training and all(p.requires_grad for p in again.parameters())
    assert v.predict_topk(again, x).names[0][0] in ("ant", "bee")
    fit(again, part, epochs=1, lr=0.01, batch_size=4, settings=QUIET)
    once_more = v.load_cnn(v.save_cnn(again, tmp_path / "cnn"))  # its classes and its kind are remembered
    assert once_more.classes == ["ant", "bee"] and getattr(once_more, "name", "") == getattr(plain, "name", "")


def test_half_the_bytes_are_the_readers_choice(tmp_path):
    model = small(2)
    model(torch.rand(8, 3, 8, 8))
    again = v.load_cnn(v.save_cnn(model, tmp_path / "cnn", dtype=torch.float16))
    x = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(again(x), model(x), rtol=5e-3, atol=5e-3)
    assert again.classes == ["0", "1"]
    model.body[0][1].running_var.fill_(1e6)
    with pytest.raises(
        ValueError, match="body.0.1.running_var has numbers too large for torch.float16; give dtype=torch.float32"
    ):
        v.save_cnn(model, tmp_path / "cnn", dtype=torch.float16)


def test_networks_that_cannot_be_stored_are_named(tmp_path):
    with pytest.raises(
        TypeError, match="knows SmallCNN, TwoConvCNN and what backbone.. gives, not Sequential; .*save_file"
    ):
        v.save_cnn(nn.Sequential(nn.Linear(2, 2)), tmp_path)
    with pytest.raises(TypeError, match="not Flatten"):
        v.save_cnn(v.Normalized(nn.Flatten()), tmp_path)
    with pytest.raises(ValueError, match="3 class names for 2 outputs"):
        v.save_cnn(small(2), tmp_path, classes="abc")
    changed = v.backbone("resnet18", None, n_classes=2)
    changed.net.conv1 = nn.Conv2d(3, 64, 3)
    with pytest.raises(ValueError, match="net.conv1.weight is not as in the architecture"):
        v.save_cnn(changed, tmp_path)
    extra = small(2)
    extra.body[0].adapter = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="body.0.adapter.weight is not as .* adapters"):
        v.save_cnn(extra, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_bundled_model_is_small_and_knows_ten_classes(root):
    folder = root / "ftbook" / "assets" / "cnn-small-cifar10"
    assert sum(f.stat().st_size for f in folder.iterdir()) < 2_000_000
    model = v.load_bundled()
    assert len(model.classes) == 10 and model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "license" in card.lower() and "test" in card and "{" not in card


# augmentation and shift


def test_augment_without_draws_is_the_identity_and_mirrors_exactly():
    x = torch.rand(16, 3, 9, 9)
    torch.testing.assert_close(v.Augment(zoom=0, shift=0, flip=0)(x), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(v.Augment(zoom=0, shift=0, flip=1)(x), x.flip(-1), rtol=0, atol=1e-5)
    torch.manual_seed(0)
    mixed = v.Augment(zoom=0, shift=0, flip=0.5)(x)
    same = [torch.allclose(a, b, atol=1e-4) for a, b in zip(mixed, x, strict=True)]
    mirrored = [torch.allclose(a, b.flip(-1), atol=1e-4) for a, b in zip(mixed, x, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True)) and 2 < sum(same) < 14


@settings(deadline=None, max_examples=15)
@given(st.floats(0, 1), st.floats(0, 0.5), st.floats(0, 4), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_augment_keeps_shape_and_range(zoom, shift, light, contrast, blur, noise):
    augment = v.Augment(zoom, shift, 0.5, light, contrast, blur, noise)
    y = augment(torch.rand(5, 3, 16, 16))
    assert y.shape == (5, 3, 16, 16) and y.isfinite().all() and 0 <= y.min() and y.max() <= 1


def test_augment_draws_for_every_image_and_repeats_with_the_seed():
    x = torch.full((6, 3, 8, 8), 0.5)
    augment = v.Augment(light=1.0)
    torch.manual_seed(1)
    first = augment(x)
    torch.manual_seed(1)
    assert torch.equal(first, augment(x)) and len(first.mean((1, 2, 3)).unique()) == 6
    with pytest.raises(ValueError, match="noise"):
        v.Augment(noise=2)


def test_augment_is_built_on_the_zoom_the_color_and_the_noise_of_images(monkeypatch):
    seen = []
    monkeypatch.setattr(v, "zoom_in", lambda x, *how: seen.append("zoom") or x)
    monkeypatch.setattr(v, "add_noise", lambda x, std: seen.append("noise") or x)
    monkeypatch.setattr(v, "adjust_color", lambda x, light, contrast: seen.append("color") or x)
    v.Augment(light=1.0, noise=0.1)(torch.rand(2, 3, 8, 8))
    assert seen == ["zoom", "color", "noise"], "the book has one zoom, one change of color and one noise"


def test_shifts_do_what_their_names_say():
    x = torch.rand(3, 3, 64, 64)
    blurred, noisy, darker = (v.SHIFTS[name] for name in ("blurred", "noisy", "darker"))
    assert blurred(x, 0.05).var() < 0.5 * x.var()
    assert torch.equal(noisy(x, seed=1), noisy(x, seed=1)) and not torch.equal(noisy(x), noisy(x, seed=1))
    flat = torch.full((2, 3, 64, 64), 0.5)
    assert float((noisy(flat, 0.1) - flat).std()) == pytest.approx(0.1, rel=0.05)
    torch.testing.assert_close(darker(x, 0.7), 0.3 * x)
    for change in v.SHIFTS.values():
        y = change((255 * x).to(torch.uint8))
        assert y.dtype == torch.float32 and 0 <= y.min() and y.max() <= 1


# predictions


@pytest.mark.parametrize("classes", [1, 2, 4, 5, 7])
def test_topk_gives_five_classes_or_all_if_they_are_fewer(classes):
    top = v.predict_topk(small(classes), torch.rand(3, 3, 8, 8))
    assert top.probability.shape == top.index.shape == (3, min(5, classes)) and len(top.names[0]) == min(5, classes)


def test_topk_is_sorted_named_and_sums_to_one():
    model, x = small(4), torch.rand(5, 3, 8, 8)
    top = v.predict_topk(model, x, k=4)
    assert (top.probability.diff(dim=1) <= 0).all() and top.probability.sum(1).allclose(torch.ones(5))
    assert top.index[:, 0].equal(model(x).argmax(1)) and top.names[0][0] == str(int(top.index[0, 0]))
    named = v.predict_topk(model, images(3, classes=4), k=1)
    assert named.names[0][0].startswith("class")
    with pytest.raises(ValueError, match="k is 5; the model has 4 classes, so give 1 to 4"):
        v.predict_topk(model, x, k=5)
    with pytest.raises(ValueError, match="k is 0"):
        v.predict_topk(model, x, k=0)
    model.classes = ["a", "b"]  # left over from another head: numbers are no lie
    assert v.predict_topk(model, images(3, classes=3), k=1).names[0][0].isdigit()
    with pytest.raises(ValueError, match="2 class names for 4 outputs"):
        v.predict_topk(model, x, k=1, classes=["a", "b"])


def test_saliency_is_the_gradient_of_the_logit():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2, bias=False))
    x = torch.rand(1, 3, 2, 2)
    with torch.no_grad():
        net[1].weight.copy_(torch.arange(24).reshape(2, 12) - 8.0)
    expected = net[1].weight[0].reshape(3, 2, 2).abs().amax(0)
    found = v.saliency(net, x, target=0)[0]
    top = expected.flatten().quantile(0.99)
    torch.testing.assert_close(found, (expected / top).clamp(max=1).detach())
    assert net[1].weight.grad is None


def test_saliency_and_grad_cam_are_those_of_captum():
    from captum.attr import LayerGradCam, Saliency

    for model, size in ((small(3), 16), (v.backbone("mobilenet_v2", weights=None, n_classes=3).eval(), 64)):
        x = torch.rand(3, 3, size, size)
        layer = v._last_spatial_layer(model, x)
        for target in (1, torch.tensor([2, 0, 1])):
            reference = Saliency(model).attribute(x.clone(), target).amax(1)
            top = reference.flatten(1).quantile(0.99, dim=1)[:, None, None]
            torch.testing.assert_close(v.saliency(model, x, target), (reference / top).clamp(max=1), rtol=0, atol=1e-5)
            cam = LayerGradCam(model, layer).attribute(x, target, relu_attributions=True).detach()
            cam = F.interpolate(cam, x.shape[2:], mode="bilinear", align_corners=False)[:, 0]
            cam = cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-12)
            torch.testing.assert_close(v.grad_cam(model, x, target), cam, rtol=0, atol=1e-5)


def test_explaining_leaves_the_model_as_it_was():
    model = small(3).train()
    state = {k: t.clone() for k, t in model.state_dict().items()}
    x = torch.rand(2, 3, 8, 8)
    for maps in (v.saliency(model, x), v.grad_cam(model, x, target=1), v.grad_cam(model, x, layer=model.body[0])):
        assert maps.shape == (2, 8, 8) and maps.min() >= 0 and maps.max() <= 1
    assert model.training and all(torch.equal(t, state[k]) for k, t in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_class_maps_add_up_to_the_logit_of_a_pooled_linear_head():
    model, x = small(3), torch.rand(4, 3, 8, 8)
    maps, logits = v._class_maps(model, x, target=2)
    torch.testing.assert_close(maps.sum((1, 2)), logits - model.head.bias[2].detach(), rtol=1e-4, atol=1e-5)
    assert v._last_spatial_layer(model, x) is model.body
    with pytest.raises(ValueError, match="more than one place"):
        v._last_spatial_layer(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.rand(1, 3, 2, 2))


def test_overlays_are_pictures():
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(v.overlay(x, torch.ones(2, 8, 8), strength=0.0), x.expand(-1, 3, -1, -1))
    assert v.overlay((255 * torch.rand(2, 3, 8, 8)).to(torch.uint8), torch.rand(2, 8, 8)).shape == (2, 3, 8, 8)


# strategies


def test_features_are_what_the_head_sees():
    model, part = small(3), images(6)
    x = as_images(part.x)
    seen = v.features(model, part, precision="fp32")
    torch.testing.assert_close(seen, model.body(x).mean((2, 3)).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.head(seen), model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(v.features(model, x, precision="fp32"), seen)
    assert all(p.is_contiguous() for p in model.parameters()), "the layout is put back"
    with pytest.raises(TypeError, match="must be a tensor"):
        v.features(model, part.x.numpy())
    with pytest.raises(ValueError, match="0..1"):
        v.features(model, part.x.float())


def test_features_of_efficientnet_are_what_its_last_layer_gets():
    torch.manual_seed(0)
    model, seen = v.backbone("efficientnet_lite0", weights=None).eval(), []
    x = torch.rand(3, 3, 64, 64)
    hook = model.net._fc.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(x)
    hook.remove()
    torch.testing.assert_close(v.features(model, x, precision="fp32"), seen[0].detach(), rtol=1e-4, atol=1e-5)


QUICK = Settings(precision="fp32", progress=False)


def test_a_head_on_cached_features_is_the_head_trained_in_place():
    part, heads = images(32), []
    for how in (v.CachedHead(), "head"):
        model = small(2)
        histories = tune(model, part, part, how=how, lr=0.05, epochs=3, batch_size=8, settings=QUICK)
        heads.append(model.state_dict() | {"loss": torch.tensor(histories[0]["valid_loss"])})
    for key in heads[0]:
        torch.testing.assert_close(heads[0][key], heads[1][key], rtol=1e-4, atol=1e-5)


def test_what_cached_features_cannot_do_is_refused():
    for settings_ in (Settings(transform=v.Augment()), Settings(params=[])):
        with pytest.raises(ValueError, match='settings.transform and settings.params must be left out; how="head"'):
            tune(small(2), images(8), how=v.CachedHead(), lr=0.1, settings=settings_)


def test_dropout_before_the_head_is_kept_in_cached_training():
    model = v.backbone("mobilenet_v2", weights=None, n_classes=2)
    (history,) = tune(model, images(8, size=32), how=v.CachedHead(), lr=0.01, settings=QUIET)
    assert len(history) == 1 and all(not p.requires_grad for n, p in model.named_parameters() if "classifier" not in n)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_probe_is_scikit_learns(classes):
    model, part = small(classes), images(30, classes=classes)
    assert tune(model, part, how=v.LinearProbe(strength=1.0), lr=0.1) == []
    seen = v.features(model, part).numpy()
    reference = LogisticRegression(C=1.0, max_iter=2000).fit(seen, part.y.numpy())
    ours = predict(model, as_images(part.x), precision="fp32").softmax(1)
    np.testing.assert_allclose(ours.numpy(), reference.predict_proba(seen), rtol=1e-3, atol=1e-4)


# the chapter's study


@pytest.fixture(scope="module")
def twelve():
    """A few photos and a small untrained EfficientNet in the place of the study's."""
    torch.manual_seed(0)
    part = images(12, size=32)
    seen = v.backbone("efficientnet_lite0", weights=None).eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "_photos", lambda: part)
        patch.setattr(study, "_untouched", lambda: seen)
        study._seen.cache_clear()
        yield part, seen
    study._seen.cache_clear()


def test_halves_cover_every_photo_once_class_by_class_and_change_with_the_seed():
    y = torch.tensor([0] * 11 + [1] * 8)
    (a, b), (c, d) = study.halves(y, seed=3)
    assert list(a) == list(d) and list(b) == list(c) and sorted([*a, *b]) == list(range(19))
    assert abs(int((y[a] == 0).sum()) - int((y[b] == 0).sum())) <= 1 and abs(len(a) - len(b)) <= 1
    assert set(study.halves(y, seed=4)[0][0]) != set(a) and list(study.halves(y, seed=3)[0][0]) == list(a)


@pytest.mark.parametrize("block", [0, 3, 11])
def test_a_cut_network_is_the_network(block):
    torch.manual_seed(0)
    model = v.backbone("efficientnet_lite0", weights=None, n_classes=2).eval()
    front, rear = study.cut(model, block)
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(rear.eval()(front.eval()(x)), model(x), rtol=1e-4, atol=1e-5)
    whole = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for m in (front, rear) for p in m.parameters()) == whole
    assert (sum(p.numel() for p in front.parameters()) == 0) == (block == 0)


def test_what_is_no_efficientnet_is_not_cut():
    model = v.Normalized(small(2))
    front, rear = study.cut(model, 3)
    assert isinstance(front, nn.Identity) and rear is model


@pytest.mark.parametrize("way", list(study.WAYS))
def test_every_way_tunes_a_copy_and_says_what_it_took(way, twelve):
    part, untouched = twelve
    before = copy.deepcopy(untouched.state_dict())
    chosen = {"strength": 1.0} if way in (*study.SOLVED, "LP-FT") else {}
    chosen |= {} if way in study.SOLVED else {"lr": 1e-3}
    model, spent = study.tuned_by(way, np.arange(8), seed=1, **chosen)
    assert all(torch.equal(t, before[k]) for k, t in untouched.state_dict().items()), "the original was changed"
    assert model.eval()(study._seen(study.WAYS[way]).float()).shape == (12, 2)
    assert spent["trained"] == sum(p.numel() for p in model.parameters())
    assert ("train_loss" in spent) == (way not in study.SOLVED)


def test_lp_ft_starts_where_the_linear_probe_ends(twelve):
    part, _ = twelve
    probe, _ = study.tuned_by("linear probe", np.arange(8), seed=1, strength=1.0)
    started, _ = study.tuned_by("LP-FT", np.arange(8), seed=1, lr=1e-30, strength=1.0)
    torch.testing.assert_close(started.head.weight, probe.weight, rtol=1e-3, atol=1e-4)
    reference = LogisticRegression(C=1.0, max_iter=2000).fit(study._seen("features")[:8], part.y[:8])
    ours = probe(study._seen("features")).softmax(1).detach()
    np.testing.assert_allclose(ours, reference.predict_proba(study._seen("features")), rtol=1e-3, atol=1e-4)


def test_the_old_task_sees_forgetting():
    original, part = small(4), images(24, classes=3)
    old = study.OldTask(original, part, part)
    assert old.measure(original)["agreement"] == 1.0
    other = small(4, seed=9)
    assert 0 <= old.measure(other)["agreement"] <= 1 and 0 <= old.measure(other)["old_probe"] <= 1


def test_one_run_of_the_plain_network_scores_the_images_of_its_split():
    for split in ("valid", "test"):
        scores = study.source_run(0, split, lr=0.01)
        assert f"{split}_accuracy" in scores and (split == "test") == any("test" in k for k in scores)


def test_a_run_scores_every_photo_by_the_network_that_did_not_see_it(twelve, monkeypatch):
    part, _ = twelve
    trained = []
    tuned_by = study.tuned_by

    def told(way, train, **options):
        trained.append(set(train))
        return tuned_by(way, train, **options)

    monkeypatch.setattr(study, "tuned_by", told)
    monkeypatch.setattr(study, "_forgotten", lambda way, model: {"agreement": 0.5})
    found = study.photo_run(1, "test", way="linear probe", strength=1.0)
    assert len(trained) == 2 and not trained[0] & trained[1] and len(trained[0] | trained[1]) == 12
    assert {len(v) for v in found.values() if np.ndim(v)} == {12} and "agreement" not in found
    assert {f"{c}_accuracy" for c in study.CHANGES} < set(found) and set(found["accuracy"]) <= {0.0, 1.0}
    moved = study.photo_run(1, "test", way="last stage", lr=1e-3)
    assert moved["agreement"] == 0.5 and "noisy_accuracy" not in moved
    trained.clear()
    found = study.photo_run(1, "valid", way="linear probe", strength=1.0)
    assert len(trained) == 1 and len(trained[0]) == 4 and len(found["loss"]) == 2 and "noisy_accuracy" not in found


def test_the_study_of_photos_takes_the_probes_strength_for_lp_ft(monkeypatch, tmp_path):
    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path))
    asked = []

    def run(seed, split, way, lr=None, strength=None):
        asked.append((split, way))
        n = 6 if split == "valid" else 9
        return {"loss": np.full(n, abs((lr or strength) - 0.001)), "accuracy": np.ones(n)}

    monkeypatch.setattr(study, "photo_run", run)
    study.main("photos", "whole")
    found = results.load_study(study.CHAPTER, "photos")
    rows = {r["way"]: r for r in found.rows("accuracy")}
    assert list(rows) == [way for way in study.WAYS if way != "every weight"]
    assert rows["LP-FT"]["strength"] == rows["linear probe"]["strength"]
    assert len(asked) == 6 * 4 + 6 * 3 + 1 and asked[-1] == ("test", "every weight")
    alone = results.load_study(study.CHAPTER, "whole").row("accuracy")
    assert alone["lr"] == rows["whole network"]["lr"] and alone["seeds"] == [1]
    with pytest.raises(ValueError, match="no study 'photo'; use source, recipe, photos, whole"):
        study.main("photo")


def test_the_plain_networks_study_shows_both_rates(monkeypatch, tmp_path):
    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path))
    monkeypatch.setattr(study, "source_run", lambda seed, split, lr: {f"{split}_accuracy": lr})
    study.main("source")
    assert results.load_study(study.CHAPTER, "source").row("test_accuracy", lr=0.03).mean == 0.03


def test_the_recipe_on_all_images_stands_beside_the_usual_rate_and_the_pixels(monkeypatch, tmp_path):
    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path))
    asked = []

    def run(seed, split, way, lr=None, strength=None):
        asked.append((split, way))
        near, n = 1 - abs(np.log10((lr or strength) / 0.03)) / 4, 100 if split == "test" else 50
        return {"accuracy": (np.arange(n) < 0.9 * n * near).astype(float)}

    monkeypatch.setattr(study, "recipe_run", run)
    images = ImageSet(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, dtype=torch.long), ["a"])
    part = images[torch.zeros(100, dtype=torch.long)]
    monkeypatch.setattr(study, "_cifar", lambda: (part, part[:50], part))
    study.main("recipe")
    rows = {r["way"]: r for r in results.load_study(study.CHAPTER, "recipe").rows("accuracy")}
    assert {w: r.get("lr") or r["strength"] for w, r in rows.items()} == {
        study.SEARCHED: 0.03,
        study.USUAL: 0.001,
        study.PIXELS: 0.01,
    }
    assert asked.count(("test", study.USUAL)) == 3 and asked.count(("test", study.PIXELS)) == 1


@pytest.mark.parametrize("how", [{"lr": 0.01}, {"strength": 0.1}], ids=["network", "pixels"])
def test_a_run_of_the_recipe_scores_every_image_of_its_split(how):
    for split, part in zip(("valid", "test"), study._cifar()[1:], strict=True):
        found = study.recipe_run(0, split, "any", **how)
        assert found["accuracy"].shape == (len(part),) and set(found["accuracy"]) <= {0.0, 1.0}
        assert ("valid_accuracy_1" in found) is ("lr" in how)
