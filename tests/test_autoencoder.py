"""Chapter 5's library: shapes, where gradients flow, what stays frozen, files, refusals."""

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from ftbook import autoencoder as ae
from ftbook import data, images, results
from ftbook.studies import autoencoder as study
from ftbook.train import Settings, fit

SMALL = (64, 16, 4)
SHAPE = (1, 8, 8)


def models():
    return [ae.Autoencoder(SMALL, SHAPE), ae.Autoencoder(SMALL, SHAPE, tied=True), ae.ConvAutoencoder((1, 4, 8), 4, 8)]


@pytest.fixture
def digits():
    return data.load("digits", "train")


@pytest.mark.parametrize("i", range(3))
def test_shapes_and_gradients_reach_every_parameter(i):
    model, x = models()[i], torch.rand(5, *SHAPE)
    out = model(x)
    assert out.shape == x.shape and model.encoder(x).shape == (5, 4) and model.encoder.out_features == 4
    ae.reconstruction_loss(out, x).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_source_network_has_the_sizes_of_the_source():
    shapes = [tuple(p.shape) for p in ae.Autoencoder().parameters()]
    assert shapes == [(256, 784), (256,), (32, 256), (32,), (256, 32), (256,), (784, 256), (784,)]


def test_tied_decoder_is_the_transposed_encoder_and_survives_deepcopy():
    model = copy.deepcopy(ae.Autoencoder(SMALL, SHAPE, tied=True))
    z = torch.rand(3, 4)
    first, second = model.encoder.layers
    by_hand = F.relu(z @ second.weight + model.decoder.biases[0]) @ first.weight + model.decoder.biases[1]
    torch.testing.assert_close(model.decoder(z), by_hand)
    with torch.no_grad():
        first.weight.zero_()
    assert torch.equal(model.decoder(z), model.decoder.biases[1].expand(3, -1))
    assert sum("weight" in k for k in model.state_dict()) == 2


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_equals_torch(reduction):
    a, b = torch.rand(6, 1, 8, 8), torch.rand(6, 1, 8, 8)
    want = F.mse_loss(a, b, reduction=reduction) / (6 if reduction == "sum" else 1)
    torch.testing.assert_close(ae.reconstruction_loss(a, b, reduction=reduction), want)


def test_masked_loss_ignores_visible_pixels():
    target = torch.rand(3, 1, 8, 8)
    masked, hidden = ae.masked_patches(target, patch=2, fraction=0.25)
    wrong_where_visible = torch.where(hidden, target, target + 7)
    assert ae.reconstruction_loss(wrong_where_visible, target, hidden) == 0
    wrong_where_hidden = torch.where(hidden, target + 2, target)
    torch.testing.assert_close(ae.reconstruction_loss(wrong_where_hidden, target, hidden), torch.tensor(4.0))
    color = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(
        ae.reconstruction_loss(color + 1, color, torch.ones(2, 1, 4, 4, dtype=torch.bool)), torch.tensor(1.0)
    )


def test_the_reconstruction_loss_refuses_shapes_reductions_and_empty_masks():
    with pytest.raises(ValueError, match="must be equal"):
        ae.reconstruction_loss(torch.rand(2, 3), torch.rand(2, 4))
    with pytest.raises(ValueError, match='"mean" and "sum"'):
        ae.reconstruction_loss(torch.rand(2, 3), torch.rand(2, 3), reduction="none")
    with pytest.raises(ValueError, match="no position is hidden"):
        ae.reconstruction_loss(torch.rand(2, 3), torch.rand(2, 3), torch.zeros(2, 3, dtype=torch.bool))


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 4),
    st.sampled_from([1, 2, 4]),
    st.integers(2, 5),
    st.integers(2, 5),
    st.floats(0.05, 0.95),
    st.integers(0, 99),
)
def test_masked_patches_hides_whole_patches_in_equal_number(batch, patch, rows, columns, fraction, seed):
    x = torch.rand(batch, 2, rows * patch, columns * patch) + 0.1
    k = round(fraction * rows * columns)
    generator = torch.Generator().manual_seed(seed)
    if not 0 < k < rows * columns:
        with pytest.raises(ValueError, match="at least one"):
            ae.masked_patches(x, patch, fraction, generator)
        return
    masked, hidden = ae.masked_patches(x, patch, fraction, generator)
    by_patch = F.avg_pool2d(hidden.float(), patch)
    assert ((by_patch == 0) | (by_patch == 1)).all() and (by_patch.sum((1, 2, 3)) == k).all()
    assert torch.equal(masked, torch.where(hidden, torch.zeros_like(x), x))


def test_corruptions_are_reproducible_and_bounded():
    x = torch.rand(4, 1, 8, 8)
    noise = ae._CORRUPTIONS["noise"]
    seeded = [noise(x, torch.Generator().manual_seed(3))[0] for _ in range(2)]
    assert torch.equal(seeded[0], images.add_noise(x, 0.3, torch.Generator().manual_seed(3))), "the book has one noise"
    assert torch.equal(*seeded) and seeded[0].min() >= 0 and seeded[0].max() <= 1 and not torch.equal(seeded[0], x)
    with pytest.raises(ValueError, match="divides both sides"):
        ae.masked_patches(x, patch=3)


@pytest.mark.parametrize("corruption", ["none", "noise", "mask"])
def test_pretraining_lowers_the_validation_loss(corruption, digits):
    torch.manual_seed(0)
    history = ae.pretrain(
        ae.ConvAutoencoder((1, 4, 8), 8, 8),
        digits[:600],
        digits[600:800],
        corruption=corruption,
        epochs=3,
        lr=5e-3,
        settings=Settings(progress=False),
    )
    assert history["valid_loss"][-1] < history["valid_loss"][0]


def test_pretraining_never_sees_the_labels(digits):
    def weights(images):
        torch.manual_seed(0)
        model = ae.Autoencoder(SMALL, SHAPE)
        ae.pretrain(model, images, epochs=1, settings=Settings(progress=False))
        return model.state_dict()

    few = digits[:128]
    assert all(torch.equal(a, b) for a, b in zip(weights(few).values(), weights(few.x).values(), strict=True))


def test_pretext_is_the_same_puzzle_in_every_validation(digits):
    pretext = ae._Pretext(ae.Autoencoder(SMALL, SHAPE), ae.masked_patches).eval()
    x = torch.rand(6, *SHAPE)
    assert torch.equal(pretext(x)[1], pretext(x)[1])
    pretext.train()
    assert not torch.equal(pretext(x)[1], pretext(x)[1])


def test_pretrain_refuses_bad_images():
    model = ae.Autoencoder(SMALL, SHAPE)
    with pytest.raises(ValueError, match="must lie in 0..1"):
        ae.pretrain(model, 3 * torch.rand(4, 1, 8, 8), settings=Settings(progress=False))
    with pytest.raises(ValueError, match="not empty"):
        ae.pretrain(model, torch.rand(0, 1, 8, 8), settings=Settings(progress=False))
    with pytest.raises(ValueError, match="none, noise, mask"):
        ae.pretrain(model, torch.rand(4, 1, 8, 8), corruption="blur", settings=Settings(progress=False))
    with pytest.raises(ValueError, match=r"\(B, 1, 8, 8\)"):
        ae.pretrain(model, torch.rand(4, 1, 9, 9), settings=Settings(progress=False))
    with pytest.raises(ValueError, match="floating-point"):
        model(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))


def test_bad_architectures_are_refused():
    with pytest.raises(ValueError, match="784"):
        ae.Autoencoder((100, 10))
    with pytest.raises(ValueError, match="at least two"):
        ae.Autoencoder((784,))
    with pytest.raises(ValueError, match="divisible by 8"):
        ae.ConvAutoencoder((1, 4, 8, 16), size=28)
    with pytest.raises(ValueError, match="do not tile"):
        ae.MaskedViT(size=10, patch=4)
    with pytest.raises(ValueError, match="visible"):
        ae.MaskedViT(size=8, patch=4, fraction=1.0, dim=8, heads=2)


@pytest.mark.parametrize("freeze", [True, False])
def test_frozen_encoder_stays_bit_identical_and_tuned_one_moves(freeze, digits):
    model = ae.classifier_from(models()[2].encoder, 10, freeze=freeze)
    before = copy.deepcopy(model.state_dict())
    fit(model, digits[:128], epochs=2, lr=1e-2, settings=Settings(progress=False))
    same = {k: torch.equal(v, before[k]) for k, v in model.state_dict().items()}
    assert not same["head.weight"] and not same["head.bias"]
    assert all(v is freeze for k, v in same.items() if k.startswith("encoder."))
    assert all((p.grad is None) for p in model.encoder.parameters()) or not freeze


def test_frozen_encoder_ignores_train_mode():
    model = ae.classifier_from(ae.Autoencoder(SMALL, SHAPE).encoder, 3, freeze=True).train()
    assert not model.encoder.training and model.head.training
    assert not model.eval().head.training
    assert ae.classifier_from(ae.Autoencoder(SMALL, SHAPE).encoder, 3).train().encoder.training


def test_classifier_copies_the_encoder_and_refuses_others():
    whole = ae.Autoencoder(SMALL, SHAPE)
    model = ae.classifier_from(whole.encoder, 10)
    assert model(torch.rand(2, *SHAPE)).shape == (2, 10)
    assert model.encoder is not whole.encoder and whole.encoder.layers[0].weight.requires_grad
    with pytest.raises(TypeError, match="pass its .encoder"):
        ae.classifier_from(whole, 10)
    with pytest.raises(TypeError, match="out_features"):
        ae.classifier_from(torch.nn.ReLU(), 10)
    with pytest.raises(ValueError, match="at least 2"):
        ae.classifier_from(whole.encoder, 1)


@pytest.mark.parametrize("i", range(3))
def test_save_and_load_round_trip(i, tmp_path):
    model, x = models()[i], torch.rand(3, *SHAPE)
    path = ae.save(model, tmp_path / "model.safetensors")
    again = ae.load(path)
    assert type(again) is type(model) and again.config == model.config and torch.equal(again(x), model(x))
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["architecture"])["class"] == type(model).__name__
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_loading_into_another_architecture_names_keys_and_shapes(tmp_path):
    path = ae.save(ae.Autoencoder((64, 16, 4), SHAPE), tmp_path / "a.safetensors")
    other = ae.Autoencoder((64, 8, 4), SHAPE)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"encoder.layers.0.weight: file has \(16, 64\), model \(8, 64\)"):
        ae.load_weights(other, path)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    with pytest.raises(ValueError, match="missing encoder.convs.0.weight(.|\n)*unexpected encoder.layers.0.weight"):
        ae.load_weights(models()[2], path)


def test_files_without_architecture_and_foreign_models_are_refused(tmp_path):
    save_file({"w": torch.zeros(2)}, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="no architecture"):
        ae.load(tmp_path / "bare.safetensors")
    save_file({"w": torch.zeros(2)}, tmp_path / "other.safetensors", {"architecture": '{"class": "Diffusion"}'})
    with pytest.raises(ValueError, match="holds a 'Diffusion'; load knows Autoencoder, ConvAutoencoder"):
        ae.load(tmp_path / "other.safetensors")
    with pytest.raises(TypeError, match="known are"):
        ae.save(torch.nn.Linear(2, 2), tmp_path / "x.safetensors")


def test_vit_encodes_only_visible_patches_and_fills_the_hidden_ones():
    torch.manual_seed(0)
    vit = ae.MaskedViT(size=8, channels=2, patch=2, dim=16, depth=1, heads=2, decoder_dim=16, decoder_depth=1).eval()
    x = torch.rand(3, 2, 8, 8)
    out, hidden = vit(x)
    assert out.shape == x.shape and hidden.shape == (3, 1, 8, 8) and hidden.float().mean() == 0.75
    other = torch.where(hidden, torch.rand_like(x), x)
    assert torch.equal(vit(other)[0], out), "hidden pixels must not reach the output"
    assert not torch.equal(vit(torch.where(hidden, x, x + 0.1))[0], out)
    assert vit.encoder(x).shape == (3, 16) and ae.classifier_from(vit.encoder, 5)(x).shape == (3, 5)


def test_vit_pretrains(digits):
    torch.manual_seed(0)
    vit = ae.MaskedViT(size=8, channels=1, patch=2, dim=16, depth=1, heads=2, decoder_dim=16, decoder_depth=1)
    history = ae.pretrain(vit, digits[:400], digits[400:500], epochs=3, lr=3e-3, settings=Settings(progress=False))
    assert history["valid_loss"][-1] < history["valid_loss"][0]


def test_few_label_run_scores_and_leaves_the_encoder_alone(digits):
    train, valid = digits.split([1000, 200], seed=0)
    encoder = ae.Autoencoder(SMALL, SHAPE).encoder
    before = copy.deepcopy(encoder.state_dict())
    run, same = (
        study.few_label_run(encoder, train, valid, valid, labels=5, steps=60, lr=1e-2, seed=1) for _ in range(2)
    )
    assert run["valid_accuracy"].shape == (200,) and run["valid_accuracy"].mean() > 0.3
    for other in (run["test_accuracy"], same["valid_accuracy"]):
        assert (run["valid_accuracy"] == other).all()
    assert set(study.few_label_run(encoder, train, valid, labels=5, lr=1e-3, steps=5)) == {"valid_accuracy"}
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_latents_leave_every_part_in_its_own_mode(digits):
    encoder = ae.Autoencoder(SMALL, SHAPE).encoder
    encoder.train().layers[1].eval()
    assert ae.latents(encoder, digits[:200]).shape == (200, 4)
    assert encoder.training and not encoder.layers[1].training, "every part is in its own mode again"


@pytest.mark.parametrize("split", ["valid", "test"])
def test_one_run_of_every_study_scores_the_images_of_its_split(split):
    scores = study.label_run(0, split, "pretrained", labels=2, lr=1e-2, architecture="conv")
    assert set(scores) == {"valid_accuracy"} | {f"{split}_accuracy"} and 0 <= scores["valid_accuracy"] <= 1
    assert split == "valid" or 0.1 < scores["test_accuracy"].mean() < 1
    for features in ("pixels", "pca"):
        scores = study.baseline_run(0, split, features=features, labels=2, C=1.0)
        assert set(scores) == {f"{split}_accuracy"} and 0.2 < scores[f"{split}_accuracy"].mean() < 1


@pytest.mark.parametrize("features", ["pixels", "untrained", "masked autoencoder", "SimCLR", "DINO"])
def test_a_probe_scores_every_image_of_its_split(features):
    right = study.probe_run(0, "valid", features=features, labels=2, C=0.1, lr=1e-3)["valid_accuracy"]
    assert right.shape == (200,) and 0.1 < right.mean() < 1


def test_the_studies_fill_their_rows(monkeypatch, tmp_path):
    def run(seed, split, method, labels, lr, architecture):
        return {"valid_accuracy": 0.5 + lr, f"{split}_accuracy": 0.5 + lr}

    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path))
    monkeypatch.setattr(study, "label_run", run)
    monkeypatch.setattr(
        study,
        "probe_run",
        lambda seed, split, features, labels, C, lr=0.0: {f"{split}_accuracy": np.full(4, 0.5 - 0.1 * C + lr)},
    )
    monkeypatch.setattr(study, "baseline_run", lambda seed, split, features, labels, C: {f"{split}_accuracy": 0.5 - C})
    with pytest.warns(UserWarning, match="at the edge"):
        study.main()
    for architecture in ("mlp", "conv"):
        rows = results.load_study(study.CHAPTER, architecture).rows("test_accuracy")
        assert len(rows) == 2 * len(study.LABELS) and all(r["lr"] == 0.03 and r["tried"] == 5 for r in rows)
        assert {len(r["values"]) for r in rows} == {10}
    probes = results.load_study(study.CHAPTER, "views").rows("test_accuracy")
    assert [r["features"] for r in probes] == [*study.FEATURES[1:], "untrained", "pixels"]
    assert {len(r["values"]) for r in probes} == {3}
    linear = results.load_study(study.CHAPTER, "baselines").rows("test_accuracy")
    assert [r["C"] for r in linear] == [0.1] * 2 * len(study.LABELS)
    with pytest.raises(ValueError, match="no study 'label'; use mlp, conv, baselines, views"):
        study.main("label")
