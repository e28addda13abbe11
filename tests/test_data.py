"""Module data: registry, downloads from a server on the loopback address, readers, sets in memory, batches, status."""

import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import lzma
import os
import pathlib
import re
import signal
import tarfile
import threading
import time
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftbook import data, results
from ftbook.corpus import Sentence

CONTENT = b"the right bytes " * 400


def sha(raw):
    return hashlib.sha256(raw).hexdigest()


@pytest.fixture
def toy(monkeypatch):
    """Registers a data set "toy" of one file `sub/toy.bin` with the given addresses."""

    def make(*urls, content=CONTENT):
        file = data.File("sub/toy.bin", sha(content), len(content), urls)
        card = dataclasses.replace(data.card("wnut17"), name="toy", variants={"v": (file,)}, substitute="")
        monkeypatch.setitem(data._CARDS, "toy", card)
        return file

    return make


def files_under(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# ---------------------------------------------------------------- registry


def test_every_card_is_complete():
    wanted = {
        "digits",
        "fashion_mnist",
        "cifar10",
        "hymenoptera",
        "wnut17",
        "conll2003",
        "sst2",
        "cr",
        "subj",
        "trec",
        "wikitext2",
        "camvid",
        "fsdd",
    }
    assert wanted <= set(data.names())
    for name in data.names():
        card = data.card(name)
        assert card.name == name and card.flaws and card.splits and name in data._READERS
        assert all(len(text) > 3 for text in (card.title, card.task, card.origin, card.license, card.cite))
        for files in card.variants.values():
            assert len({file.path for file in files}) == len(files)
            for file in files:
                assert re.fullmatch("[0-9a-f]{64}", file.sha256) and file.size > 1000
                assert all(url.endswith(file.name.split("wiki.")[-1].replace("tokens", "txt")) for url in file.urls)
                assert all(url.startswith("http") for url in file.urls)
                assert name == "digits" or file.urls or all(o.urls for o in file.recipe.origins), "nobody can get it"
                assert not file.path.startswith("/") and ".." not in file.path


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="mnits.*fashion_mnist"):
        data.load("mnits")
    with pytest.raises(ValueError, match="no split 'valid'; it has: train, test"):
        data.load("digits", "valid")
    with pytest.raises(ValueError, match="no variant 'large'; it has: full, subset"):
        data._fetch("cifar10", "large")
    assert data._split_name("wnut17", "dev") == data._split_name("wnut17", "validation") == "valid"


def test_register_refuses_another_card_under_a_taken_name():
    assert data.register(data.card("digits")) is data.card("digits")
    with pytest.raises(ValueError, match="another data set named 'digits'"):
        data.register(dataclasses.replace(data.card("digits"), title="Other"))


def test_a_data_set_of_ones_own_is_loaded_by_its_reader(fake, monkeypatch):
    monkeypatch.setattr(data, "_CARDS", data.Registry("data set"))
    monkeypatch.setattr(data, "_READERS", {})
    card = data.Card("mine", "Mine", "texts", "me", "CC0", {"train": 1}, ("few",), "me", {"v1": ()})
    assert data.register(card) is data.card("mine") and data.names() == ["mine"]
    with pytest.raises(ValueError, match=r"'mine' has no reader; give one: data.register\(card, reader\)"):
        data.load("mine")
    data.register(card, lambda files, split, **options: f"{split} {sorted(options)}")
    text = data.load("mine")
    assert text == "train ['size', 'skip_corrupt']" and text.source == "v1 (cache)"


def test_cards_show_themselves():
    text = data.card("fashion_mnist")._repr_markdown_()
    assert "<https://arxiv.org/abs/1708.07747>" in text and "train-images-idx3-ubyte.gz" in text and "26 MB" in text
    assert "Known flaws" in text and "raw.githubusercontent.com" in text
    assert "made from" in data.card("cifar10")._repr_markdown_()
    assert "variant" not in data.card("digits")._repr_markdown_()
    assert repr(data.card("digits")) == "Card(digits: Digits (scikit-learn))"
    assert data._download_size("digits") == 0 and data._download_size("wiki_excerpt") == 0


# ---------------------------------------------------------------- cache and download


def test_download_once_then_cache(cache, server, toy, capsys):
    toy(server.base + "/toy.bin")
    server.answers["/toy.bin"] = [(200, CONTENT, None)]
    path = data._fetch("toy")["toy.bin"]
    assert path == cache / "sub" / "toy.bin" and path.read_bytes() == CONTENT
    assert "license: CC BY 4.0" in capsys.readouterr().out
    assert data._fetch("toy", progress=False) == {"toy.bin": path}
    assert server.requests == ["/toy.bin"] and files_under(cache) == ["sub/toy.bin"]


def test_second_mirror_is_tried(cache, server, toy):
    toy(server.base + "/gone/toy.bin", server.base + "/bad/toy.bin", server.base + "/good/toy.bin")
    server.answers["/bad/toy.bin"] = [(200, b"other bytes", None)]
    server.answers["/good/toy.bin"] = [(200, CONTENT, None)]
    assert data._fetch("toy", progress=False)["toy.bin"].read_bytes() == CONTENT
    assert server.requests[-1] == "/good/toy.bin" and files_under(cache) == ["sub/toy.bin"]


def test_wrong_bytes_are_refused_and_not_kept(cache, server, toy):
    file = toy(server.base + "/toy.bin")
    server.answers["/toy.bin"] = [(200, b"other bytes", None)]
    with pytest.raises(FileNotFoundError) as caught:
        data._fetch("toy", progress=False)
    message = str(caught.value)
    assert f"expected {file.sha256}, got {sha(b'other bytes')}" in message and "another toy.bin" in message
    assert str(cache / "sub" / "toy.bin") in message and server.base + "/toy.bin" in message
    assert files_under(cache) == []


def test_error_page_with_status_200_is_named(cache, server, toy):
    toy(server.base + "/toy.bin")
    server.answers["/toy.bin"] = [(200, b"\n<!DOCTYPE html><title>busy</title>", None)]
    with pytest.raises(FileNotFoundError, match="HTML page instead of toy.bin"):
        data._fetch("toy", progress=False)
    assert files_under(cache) == []


def test_broken_connection_is_retried_and_leaves_nothing(cache, server, toy):
    toy(server.base + "/toy.bin")
    broken = (200, CONTENT[:1000], len(CONTENT))
    server.answers["/toy.bin"] = [broken]
    with pytest.raises(FileNotFoundError, match="tried http://127"):
        data._fetch("toy", progress=False)
    assert len(server.requests) == 2 and files_under(cache) == []
    server.answers["/toy.bin"] = [broken, (200, CONTENT, None)]
    assert data._fetch("toy", progress=False)["toy.bin"].read_bytes() == CONTENT
    assert len(server.requests) == 4 and files_under(cache) == ["sub/toy.bin"]


def drip(handler, before_headers=False):
    """One byte every 20 ms, for ever."""
    if not before_headers:
        handler.send_response(200)
        handler.end_headers()
    while True:
        handler.wfile.write(b"x")
        handler.wfile.flush()
        threading.Event().wait(0.02)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs signals of POSIX")
def test_interrupt_leaves_nothing(cache, server, toy):
    def interrupted(handler):  # a real signal, as of Ctrl-C: it wakes a thread that waits for bytes
        send = threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        send.start()
        drip(handler)

    toy(server.base + "/toy.bin")
    server.answers["/toy.bin"] = [interrupted]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # who starts tests in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            data._fetch("toy", progress=False)
    finally:
        signal.signal(signal.SIGINT, before)
    assert files_under(cache) == []


@pytest.mark.parametrize("how", ["without length", "with a length", "compressed"])
def test_a_body_that_is_larger_than_the_card_says_is_not_stored(cache, server, toy, how):
    toy(server.base + "/toy.bin", server.base + "/good/toy.bin")
    sent = []

    def answer(handler):
        handler.send_response(200)
        if how == "with a length":
            handler.send_header("Content-Length", str(10**12))
        if how == "compressed":  # 10 kB that become 10 MB
            handler.send_header("Content-Encoding", "gzip")
        handler.end_headers()
        while how == "compressed" and not sent:
            sent.append(handler.wfile.write(gzip.compress(bytes(10_000_000))))
        while how != "compressed":
            sent.append(handler.wfile.write(bytes(1 << 16)))

    server.answers["/toy.bin"] = [answer]
    server.answers["/good/toy.bin"] = [(404, b"", None)]
    with pytest.raises(
        FileNotFoundError, match="OSError: the server sends more than the 6,400 bytes that are on record"
    ):
        data._fetch("toy", progress=False)
    assert files_under(cache) == [] and sum(sent) < 50_000_000
    assert server.requests.count("/toy.bin") == 1  # such a server is not asked again
    server.answers["/good/toy.bin"] = [(200, CONTENT, None)]
    assert data._fetch("toy", progress=False)["toy.bin"].read_bytes() == CONTENT


@pytest.mark.parametrize("before_headers", [False, True])
def test_a_download_has_a_deadline_as_a_whole(cache, server, toy, before_headers):
    """The time limit per packet never ends a server that sends a byte now and then."""
    file = toy(server.base + "/slow/toy.bin", server.base + "/toy.bin")
    server.answers["/slow/toy.bin"] = [lambda handler: drip(handler, before_headers)]
    server.answers["/toy.bin"] = [(404, b"", None)]
    start = time.perf_counter()
    first, second = data._from_servers(file, cache, progress=False, retries=0, seconds=0.5)
    assert "/slow/toy.bin: TimeoutError: not complete after 0 seconds" in first and "404" in second
    assert time.perf_counter() - start < 5 and files_under(cache) == []
    server.answers["/toy.bin"] = [(200, CONTENT, None)]
    assert data._from_servers(file, cache, progress=False, seconds=0.5) == []


def test_what_a_killed_download_leaves_is_removed_by_a_later_one_and_all_else_stays(cache, server, toy):
    file = toy(server.base + "/toy.bin")
    server.answers["/toy.bin"] = [(200, CONTENT, None)]
    place = (cache / file.path).parent
    place.mkdir(parents=True)
    for name in ("tmpab12_xyz", "tmp_live_99", "tmp12345678.txt", "tmpabc", "mytmpab12_xyz"):
        (place / name).write_bytes(b"part")
        if name != "tmp_live_99":  # another process is at it
            os.utime(place / name, (0, time.time() - 100_000))
    (place / "tmpfolder12").mkdir()
    os.utime(place / "tmpfolder12", (0, 0))
    assert data._fetch("toy", progress=False)["toy.bin"].read_bytes() == CONTENT
    left = {path.name for path in place.iterdir()}
    assert left == {"toy.bin", "tmp_live_99", "tmp12345678.txt", "tmpabc", "mytmpab12_xyz", "tmpfolder12"}


@pytest.mark.parametrize(
    "path",
    [
        "../x",
        "a/../../x",
        "/etc/x",
        "..",
        ".",
        "",
        "a/..",
        "./x",
        "a//b",
        "a/",
        "C:/x",
        "C:x",
        "a\\b",
        "\\\\server\\share",
        "a/b:stream",
        "nul\0byte",
    ],
)
def test_a_path_that_may_leave_the_cache_is_refused(path):
    with pytest.raises(ValueError, match="give its place below the cache folder"):
        data.File(path, "0" * 64, 1)


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("ab./\\:~ C\0"), max_size=12))
def test_every_path_of_a_card_stays_below_any_cache_folder(path):
    try:
        data.File(path, "0" * 64, 1)
    except ValueError:
        return
    for kind, folder in ((pathlib.PurePosixPath, "/cache"), (pathlib.PureWindowsPath, "D:/cache")):
        joined = kind(folder) / path
        assert joined.is_relative_to(folder) and ".." not in joined.parts and joined != kind(folder)


@pytest.mark.skipif(os.name == "nt", reason="links as on Linux and macOS")
def test_nothing_is_written_through_a_link_out_of_the_cache(cache, server, toy, tmp_path):
    toy(server.base + "/toy.bin")
    server.answers["/toy.bin"] = [(200, CONTENT, None)]
    outside = tmp_path / "outside"
    outside.mkdir()
    cache.mkdir()
    (cache / "sub").symlink_to(outside)
    with pytest.raises(FileNotFoundError, match="sub is a link that leads out of .*put a folder in its place"):
        data._fetch("toy", progress=False)
    assert files_under(outside) == [] and server.requests == []
    (outside / "toy.bin").write_bytes(CONTENT)  # what lies there may be read: its sum is checked
    assert data._fetch("toy") == {"toy.bin": cache / "sub" / "toy.bin"}
    (outside / "toy.bin").unlink()
    (cache / "sub").unlink()
    (cache / "elsewhere").mkdir()
    (cache / "sub").symlink_to("elsewhere")  # a link that stays inside
    assert data._fetch("toy", progress=False)["toy.bin"].read_bytes() == CONTENT


@pytest.mark.parametrize("value", ["0", "false", "No", ""])
def test_offline_set_to_no_means_online(cache, server, toy, monkeypatch, value):
    toy(server.base + "/toy.bin")
    server.answers["/toy.bin"] = [(200, CONTENT, None)]
    monkeypatch.setenv("FTBOOK_OFFLINE", value)
    assert data._fetch("toy", progress=False)["toy.bin"].read_bytes() == CONTENT


def test_one_file_is_downloaded_checked_and_found_again(cache, server, monkeypatch):
    file = data.File(
        "weights/a-1234.bin", sha(CONTENT)[:8], 10_000, (server.base + "/a.bin",)
    )  # first digits, a size in round numbers
    server.answers["/a.bin"] = [(200, CONTENT, None)]
    monkeypatch.setenv("FTBOOK_OFFLINE", "1")
    with pytest.raises(
        FileNotFoundError,
        match="(?s)no a-1234.bin: put http.*/a.bin into .*weights, or set FTBOOK_DATA.*FTBOOK_OFFLINE is set",
    ):
        data.download(file)
    monkeypatch.delenv("FTBOOK_OFFLINE")
    path = data.download(file, progress=False)
    assert path == cache / "weights" / "a-1234.bin" and data.download(file) == path and len(server.requests) == 1
    path.write_bytes(b"other")
    with pytest.raises(data.ChecksumError, match="does not match"):
        data.download(file)
    with pytest.raises(data.ChecksumError):
        data.verify(path, "")


def test_the_readers_own_file_is_kept(cache, server, toy):
    file = toy(server.base + "/toy.bin")
    own = cache / "sub" / "toy.bin"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"my own work")
    with pytest.raises(data.ChecksumError) as caught:
        data._fetch("toy")
    assert all(part in str(caught.value) for part in (str(own), file.sha256, sha(b"my own work")))
    assert own.read_bytes() == b"my own work" and server.requests == []
    own.write_bytes(CONTENT)  # changed since: hashed again
    assert data._fetch("toy") == {"toy.bin": own}


def test_no_network_and_no_cache_says_what_to_put_where(cache, monkeypatch, toy):
    monkeypatch.setenv("FTBOOK_OFFLINE", "1")
    with pytest.raises(FileNotFoundError) as caught:
        data.load("cifar10")
    message, full, subset = str(caught.value), *(data.card("cifar10").variants[v][0] for v in ("full", "subset"))
    for file in (full, subset):
        assert str(cache / file.path) in message and file.sha256 in message and f"{file.size:,}" in message
    assert full.urls[0] in message and "FTBOOK_DATA" in message
    assert f"{subset.recipe}, of which data.load('cifar10', variant='subset') makes it" in message
    assert "FTBOOK_OFFLINE is set" in message
    monkeypatch.delenv("FTBOOK_OFFLINE")
    toy("http://127.0.0.1:9/toy.bin")  # nobody listens there
    with pytest.raises(FileNotFoundError, match="tried http://127.0.0.1:9/toy.bin: ConnectionError"):
        data._fetch("toy", progress=False)
    toy()
    with pytest.raises(FileNotFoundError, match="no address is on record"):
        data._fetch("toy", progress=False)


def test_cache_folder_that_cannot_be_written(cache, server, toy, monkeypatch):
    toy(server.base + "/toy.bin")
    (cache.parent / "file").write_text("in the way")
    monkeypatch.setenv("FTBOOK_DATA", str(cache.parent / "file" / "cache"))
    with pytest.raises(FileNotFoundError, match=r"tried \w+Error"):
        data._fetch("toy", progress=False)
    assert server.requests == []


def test_nothing_is_written_without_a_download(cache, monkeypatch):
    data.load("digits")
    monkeypatch.setenv("FTBOOK_OFFLINE", "1")
    with contextlib.suppress(FileNotFoundError):
        data.load("wiki_excerpt")
    assert not cache.exists() or files_under(cache) == []


def test_first_variant_in_the_cache_wins(cache, fake):
    assert data._choose("cifar10") == "full" and data._choose("wiki_excerpt") == "excerpt"
    fake("cifar10", "subset", {"cifar10_subset.npz": b"x"})
    assert data._choose("cifar10") == "subset" and data._choose("cifar10", "full") == "full"
    fake("cifar10", "full", {"cifar-10-binary.tar.gz": b"y"})
    assert data._choose("cifar10") == "full"


# ---------------------------------------------------------------- readers


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def test_fashion_mnist_is_read_from_its_own_files(fake):
    x, y = np.arange(3 * 28 * 28).reshape(3, 28, 28) % 256, np.array([1, 0, 9])
    fake(
        "fashion_mnist",
        "official",
        {"t10k-images-idx3-ubyte.gz": gzip.compress(idx(x)), "t10k-labels-idx1-ubyte.gz": gzip.compress(idx(y))},
    )
    images = data.load("fashion_mnist", "test")
    assert np.array_equal(images.x[:, 0].numpy(), x) and images.y.tolist() == [1, 0, 9]
    assert images.classes[9] == "Ankle boot" and images.source == "official (cache)"
    assert data.load("fashion_mnist", "test", size=14).x.shape == (3, 1, 14, 14)
    with pytest.raises(ValueError, match="train-images-idx3-ubyte.gz: no IDX file"):
        data.load("fashion_mnist", "train")


def test_an_idx_file_must_be_as_long_as_its_header_says():
    assert data._read_idx(idx(np.arange(6).reshape(2, 3))).tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match="f: the header says"):
        data._read_idx(idx(np.arange(6))[:-1], "f")
    with pytest.raises(ValueError, match="no IDX file"):
        data._read_idx(b"PK")


def test_cifar10_subset_and_full(fake):
    generator = np.random.default_rng(0)
    x = generator.integers(256, size=(4, 32, 32, 3), dtype=np.uint8)
    y = np.array([3, 1, 0, 9], dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x_train=x, y_train=y, x_test=x[:2], y_test=y[:2])
    fake("cifar10", "subset", {"cifar10_subset.npz": buffer.getvalue()})
    subset = data.load("cifar10", "train")
    assert subset.source == "subset (cache)" and torch.equal(subset.x.permute(0, 2, 3, 1), torch.from_numpy(x))

    records = [bytes([label]) + image.transpose(2, 0, 1).tobytes() for image, label in zip(x, y, strict=True)]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for member, raw in (
            ("data_batch_2.bin", records[1]),
            ("data_batch_1.bin", records[0]),
            ("readme.html", b"r"),
            ("test_batch.bin", records[2] + records[3]),
        ):
            info = tarfile.TarInfo("cifar-10-batches-bin/" + member)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    fake("cifar10", "full", {"cifar-10-binary.tar.gz": buffer.getvalue()})
    full = data.load("cifar10", "train")
    assert full.source == "full (cache)" and torch.equal(full.x, subset.x[:2]) and full.y.tolist() == [3, 1]
    assert torch.equal(data.load("cifar10", "test").x, subset.x[2:])
    assert torch.equal(data.load("cifar10", "test", variant="subset").x, subset.x[:2])
    with pytest.raises(ValueError, match="3,073 bytes"):
        data._read_cifar_binary(b"123")


def jpeg(height, width, level):
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (level,) * 3).save(buffer, "JPEG")
    return buffer.getvalue()


def test_hymenoptera_is_read_from_its_archive(fake, capsys):
    def archive(**extra):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as z:
            members = {
                "train/bees/b.jpg": jpeg(40, 60, 200),
                "train/ants/a.jpg": jpeg(90, 30, 10),
                "val/ants/c.jpg": jpeg(20, 20, 90),
                "val/bees/d.jpg": jpeg(20, 20, 80),
                "train/ants/imageNotFound.gif": b"GIF",
                **extra,
            }
            for member, raw in members.items():
                z.writestr("hymenoptera_data/" + member, raw)
        return buffer.getvalue()

    fake("hymenoptera", "small", {"hymenoptera_data_256.zip": archive()})
    photos = data.load("hymenoptera", "train", size=32)
    assert photos.x.shape == (2, 3, 32, 32) and photos.y.tolist() == [0, 1] and photos.source == "small (cache)"
    assert abs(photos.x[0].float().mean() - 10) < 3 and abs(photos.x[1].float().mean() - 200) < 3
    assert data.load("hymenoptera", "val").x.shape == (2, 3, 224, 224)
    fake("hymenoptera", "small", {"hymenoptera_data_256.zip": archive(**{"train/bees/bad.jpg": b"<html>"})})
    with pytest.raises(ValueError, match="hymenoptera_data/train/bees/bad.jpg cannot be decoded"):
        data.load("hymenoptera", "train", size=32)
    part = data.load("hymenoptera", "train", size=32, skip_corrupt=True)
    assert len(part) == 2 and [path.name for path in part.skipped] == ["bad.jpg"]
    assert "left out 1 of 3 files that cannot be decoded: bad.jpg" in capsys.readouterr().out
    fake("hymenoptera", "small", {"hymenoptera_data_256.zip": archive(**{"val/ants/c.jpg": b"no"})})
    with pytest.raises(ValueError, match="no picture of the class ants can be decoded"):
        data.load("hymenoptera", "val", skip_corrupt=True)


def test_sst2_is_read_and_wrong_lines_are_named(fake):
    fake("sst2", "sentences", {"train.tsv": b'a fine film\t1\nsaid "so" , dull\t0\n', "dev.tsv": b"ok\t1\n"})
    train = data.load("sst2")
    assert train.texts == ["a fine film", 'said "so" , dull'] and train.y.tolist() == [1, 0]
    assert train.classes == ["negative", "positive"] and data.load("sst2", "dev").texts == ["ok"]
    for line in (b"no label here", b"an empty label\t", b"two digits\t01"):
        fake("sst2", "sentences", {"train.tsv": b"fine\t1\n" + line + b"\n"})
        with pytest.raises(ValueError, match=r"train.tsv: line 2 is not 'sentence<TAB>0 or 1'"):
            data.load("sst2")


def test_customer_reviews_are_shuffled_once_and_cut_into_three_parts(fake):
    lines = [f"sentence {i} . \n".encode() for i in range(3775)]
    fake("cr", "sentences", {"custrev.neg": b"".join(lines[:1368]), "custrev.pos": b"".join(lines[1368:])})
    parts = [data.load("cr", split) for split in ("train", "valid", "test")]
    assert [len(part) for part in parts] == [2275, 500, 1000]
    assert len({text for part in parts for text in part.texts}) == 3775
    for part in parts:
        assert part.classes == ["negative", "positive"]
        assert all((int(t.split()[1]) >= 1368) == y for t, y in zip(part.texts, part.y.tolist(), strict=True))


def test_subjectivity_is_shuffled_once_and_cut_into_three_parts(fake):
    lines = [f"sentence {i} . \n".encode() for i in range(10_000)]
    files = {"subj.objective": b"".join(lines[:5000]), "subj.subjective": b"".join(lines[5000:])}
    fake("subj", "sentences", files)
    parts = [data.load("subj", split) for split in ("train", "valid", "test")]
    assert [len(part) for part in parts] == [7000, 1000, 2000]
    assert len({text for part in parts for text in part.texts}) == 10_000
    for part in parts:
        assert part.classes == ["objective", "subjective"]
        assert all((int(t.split()[1]) >= 5000) == y for t, y in zip(part.texts, part.y.tolist(), strict=True))


def test_trec_keeps_its_test_part_and_sets_validation_questions_aside(fake):
    kinds = ["ABBR:exp", "DESC:def", "ENTY:food", "HUM:ind", "LOC:city", "NUM:date"]
    lines = [f"{kinds[i % 6]} Question {i % 6} {i} caf\xe9 ?\n".encode("latin-1") for i in range(5452)]
    fake("trec", "coarse", {"train_5500.label": b"".join(lines), "TREC_10.label": lines[4] + lines[0]})
    train, valid, test = (data.load("trec", split) for split in ("train", "valid", "test"))
    assert [len(train), len(valid)] == [4952, 500] and not set(train.texts) & set(valid.texts)
    assert test.texts == ["Question 4 4 café ?", "Question 0 0 café ?"] and test.y.tolist() == [4, 0]
    for part in (train, valid):
        assert all(int(t.split()[1]) == y for t, y in zip(part.texts, part.y.tolist(), strict=True))
    fake("trec", "coarse", {"train_5500.label": lines[0] + b"WHAT:kind Who is it ?\n"})
    with pytest.raises(ValueError, match="line 2 is not 'CLASS:fine question' with a class of ABBR, DESC"):
        data.load("trec")


def zipped(files: dict) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return packed.getvalue()


def picture(pixels, form: str) -> bytes:
    from PIL import Image

    packed = io.BytesIO()
    Image.fromarray(pixels).save(packed, form)
    return packed.getvalue()


def test_scenes_have_a_class_for_every_pixel_and_what_has_none_is_ignored(fake):
    marks = np.array([[0, 10, 11], [3, 3, 255]], np.uint8)
    photo = np.full((2, 3, 3), 77, np.uint8)
    files = {"CamVid/val/b.jpg": picture(photo, "JPEG"), "CamVid/valannot/b.png": picture(marks, "PNG")}
    fake("camvid", "half", {"camvid_240x180.zip": zipped(files)})
    found = data.load("camvid", "valid")
    assert found.x.shape == (1, 3, 2, 3) and found.y.tolist() == [[[0, 10, -100], [3, 3, -100]]]
    assert len(found[:1]) == 1 and found.classes[3] == "road" and found.name == "camvid"
    with pytest.raises(ValueError, match=r"give \(N, 3, H, W\) and \(N, H, W\)"):
        data._SceneSet(found.x, found.y[:, :1], found.classes)


def wav(samples, channels: int = 1) -> bytes:
    import wave

    packed = io.BytesIO()
    with wave.open(packed, "wb") as sound:
        sound.setnchannels(channels)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(np.array(samples, "<i2").tobytes())
    return packed.getvalue()


def test_recordings_know_digit_speaker_and_part(fake):
    files = {
        f"recordings/{d}_{who}_{n}.wav": wav([0, 16384, -32768])
        for d in (0, 7)
        for who in ("ada", "bob")
        for n in (4, 5)
    }
    fake("fsdd", "recordings", {"free-spoken-digit-dataset.zip": zipped(files)})
    train, test = data.load("fsdd", "train"), data.load("fsdd", "test")
    for part in (train, test):
        assert part.y.tolist() == [0, 0, 7, 7] and part.speakers == ["ada", "bob"] * 2 and part.rate == 8000
        assert part.waves[0].tolist() == [0.0, 0.5, -1.0]
    assert test[[1, 2]].speakers == ["bob", "ada"] and test.counts()["7"] == 2
    with pytest.raises(ValueError, match="2 channels of 16 bits; one channel of 16 bits can be read"):
        data._read_wave(wav([0, 0], channels=2), "x.wav")


def test_wikitext_is_read_from_files_and_archives(fake):
    fake("wikitext2", "files", {"wiki.valid.tokens": "\n = Title = \n ünder \n".encode()})
    text = data.load("wikitext2", "valid")
    assert text == "\n = Title = \n ünder \n" and text.source == "files (cache)" and text.name == "wikitext2"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("wikitext-2/wiki.valid.tokens", "from the zip")
    fake("wikitext2", "archive", {"wikitext-2-v1.zip": buffer.getvalue()})
    assert data.load("wikitext2", "val") == "from the zip"
    fake("wiki_excerpt", "excerpt", {"enwiki-excerpt.txt.xz": lzma.compress("= Ä =\n".encode())})
    assert data.load("wiki_excerpt") == "= Ä =\n"


def test_tagged_text_is_a_corpus(fake):
    fake("wnut17", "official", {"emerging.test.annotated": b"Rome\tB-location\n"})
    corpus = data.load("wnut17", "test")
    assert list(corpus) == [Sentence(["Rome"], ["B-location"])] and corpus.path.name == "emerging.test.annotated"
    assert (corpus.name, corpus.source) == ("wnut17", "official (cache)")
    fake("conll2003", "bio", {"valid.txt": b"-DOCSTART- -X- O O\n\nEU NNP I-NP I-ORG\n"})
    corpus = data.load("conll2003", "valid")
    assert corpus.scheme == "IOB1" and corpus.tags == [["B-ORG"]] and corpus.source == "bio (cache)"


def test_digits_come_as_bytes_in_two_parts():
    train, test = data.load("digits"), data.load("digits", "test")
    assert (len(train), len(test)) == (1297, 500) and train.x.dtype == torch.uint8 and train.x.max() == 255
    assert train.x.unique().numel() == 17 and sum(test.counts().values()) == 500


# ---------------------------------------------------------------- substitutes


def test_quick_profile_uses_substitutes_without_cache_or_network(cache, monkeypatch, capsys):
    monkeypatch.setenv("FTBOOK_PROFILE", "quick")
    monkeypatch.setattr(data, "_fetch", lambda *args: pytest.fail("the cache was touched"))
    shapes = {"fashion_mnist": (1, 28, 28), "cifar10": (3, 32, 32), "hymenoptera": (3, 224, 224)}
    for name, shape in shapes.items():
        split = "valid" if name == "hymenoptera" else "test"
        images = data.load(name, split, bundled=True)
        assert images.x.shape[1:] == shape and images.x.dtype == torch.uint8 and images.x.max() > 200
        assert images.source.startswith("substitute: ") and min(images.counts().values()) > 40
        assert f"{name} ({split}) replaced by the bundled substitute" in capsys.readouterr().out
    assert data.load("hymenoptera", "train", bundled=True, size=64).x.shape[2:] == (64, 64)
    assert data.load("cifar10", "train", bundled=True).x.float().mean((0, 2, 3)).unique().numel() == 3
    reviews = data.load("sst2", "valid", bundled=True)
    assert (
        reviews.counts() == {"negative": 100, "positive": 100}
        and reviews.texts != data._substitute("sst2", "test").texts
    )


def test_bundled_corpus_serves_tags_and_text(cache, monkeypatch):
    monkeypatch.setenv("FTBOOK_PROFILE", "quick")
    corpus = data.load("wnut17", "valid", bundled=True)
    assert corpus.path.name == "dev.conll" and corpus == data.load("conll2003", "dev", bundled=True)
    assert corpus.name == "wnut17" and corpus.source == "substitute: the book's own small annotated corpus"
    text = data.load("wikitext2", "train", bundled=True)
    assert len(text.split()) > 300 and "\n" in text and "B-" not in text and text.source.startswith("substitute")


def test_substitute_only_where_allowed(cache, monkeypatch, capsys):
    monkeypatch.setenv("FTBOOK_OFFLINE", "1")
    with pytest.raises(FileNotFoundError):
        data.load("fashion_mnist", "test")
    images = data.load("fashion_mnist", "test", bundled=True)
    assert len(images) == 500 and images.classes[0] == "0" and "replaced by" in capsys.readouterr().out


def test_asset_lists_what_there_is():
    assert data.asset("ner_corpus").is_dir()
    with pytest.raises(FileNotFoundError, match="no bundled file 'nothing'; there are: .*ner_corpus"):
        data.asset("nothing")


# ---------------------------------------------------------------- sets in memory


def image_set(labels, classes="abc"):
    y = torch.tensor(labels)
    return data.ImageSet(torch.arange(len(y), dtype=torch.uint8).reshape(-1, 1, 1, 1), y, classes, "toy", "made up")


def test_text_sets_check_their_arguments():
    with pytest.raises(ValueError, match="2 texts but 1 labels"):
        data.TextSet(["a", "b"], torch.tensor([0]), "a")


# ---------------------------------------------------------------- batches


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.booleans(), st.booleans(), st.integers(0, 5))
def test_batches_deliver_every_example_once(n, size, shuffle, drop_last, epoch):
    x = torch.arange(n)
    batches = data.Batches(x, 10 * x, batch_size=size, shuffle=shuffle, seed=2, drop_last=drop_last).set_epoch(epoch)
    parts = list(batches)
    assert len(parts) == len(batches) == (n // size if drop_last else -(-n // size))
    seen = [i for a, b in parts for i in a.tolist()]
    assert all(torch.equal(10 * a, b) for a, b in parts) and len(set(seen)) == len(seen)
    assert drop_last or sorted(seen) == list(range(n))
    assert shuffle or seen == list(range(len(seen)))
    assert batches.epoch == epoch + 1


def flat(batches):
    return [i for (batch,) in batches for i in batch.tolist()]


def test_order_depends_on_seed_and_epoch_only():
    def make(seed):
        return data.Batches(torch.arange(100), batch_size=9, shuffle=True, seed=seed)

    batches = make(5)
    state = torch.get_rng_state()
    first, second = flat(batches), flat(batches)
    assert torch.equal(state, torch.get_rng_state())  # the global generator is left alone
    assert first != second and first != flat(make(6))
    torch.manual_seed(123)
    assert first == flat(make(5)) and second == flat(make(5).set_epoch(1))


def test_a_pass_can_be_resumed_and_peeking_changes_nothing():
    batches = data.Batches(torch.arange(20), batch_size=3, shuffle=True, seed=1)
    whole = flat(batches)
    running = data.Batches(torch.arange(20), batch_size=3, shuffle=True, seed=1)
    iterator = iter(running)
    head = next(iterator)[0].tolist() + next(iterator)[0].tolist()
    state = json.loads(json.dumps(running.state_dict()))
    assert state == {"seed": 1, "epoch": 0, "position": 2}
    resumed = data.Batches(torch.arange(20), batch_size=3, shuffle=True, seed=99)
    resumed.load_state_dict(state)
    assert head + flat(resumed) == whole and resumed.epoch == 1
    next(iter(running))
    assert flat(running) == whole  # a pass broken off starts again, in the same epoch


def test_batches_transform_device_and_errors():
    x, y = torch.arange(6), torch.arange(6)
    doubled = list(data.Batches(x, y, batch_size=4, transform=lambda t: 2 * t, device="cpu"))
    assert doubled[0][0].tolist() == [0, 2, 4, 6] and doubled[0][1].tolist() == [0, 1, 2, 3]
    meta = data.Batches(x, y, batch_size=4, shuffle=True, device="meta")
    assert [b[0].shape[0] for b in meta] == [4, 2] and meta.tensors[0].device.type == "meta"
    copied = data.Batches(x, y, batch_size=4)
    copied.device = torch.device("meta")  # as for tensors that stay in pinned memory
    assert next(iter(copied))[1].device.type == "meta"
    with pytest.raises(ValueError, match=r"lengths \[6, 5\]"):
        data.Batches(x, y[:5])
    with pytest.raises(ValueError, match=r"lengths \[\]"):
        data.Batches()
    for size in (0, 2.5):
        with pytest.raises(ValueError, match="positive integer"):
            data.Batches(x, batch_size=size)


def test_place_keeps_large_tensors_in_pinned_memory(monkeypatch):
    class Pinned(torch.Tensor):
        def pin_memory(self):
            return "pinned"

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 100))
    large = torch.zeros(60, dtype=torch.uint8).as_subclass(Pinned)
    assert data._place((large,), torch.device("cuda")) == ("pinned",)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_batches_are_equal_whether_or_not_they_fit_on_the_gpu(monkeypatch):
    x, y = torch.randint(256, (1000, 1, 4, 4), dtype=torch.uint8), torch.arange(1000)
    expected = list(data.Batches(x, y, shuffle=True, transform=data.Normalize(0.5, 0.5)))
    for free in (10**9, 1):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        batches = data.Batches(x, y, shuffle=True, transform=data.Normalize(0.5, 0.5), device="cuda")
        assert batches.tensors[0].is_pinned() == (free == 1)
        for ours, theirs in zip(batches, expected, strict=True):
            assert ours[0].is_cuda and torch.allclose(ours[0].cpu(), theirs[0])
            assert torch.equal(ours[1].cpu(), theirs[1])


# ---------------------------------------------------------------- tables


def test_status_before_and_after_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path))
    monkeypatch.setenv("FTBOOK_PROFILE", "cpu")
    shown = data.status("99_demo", data=["fashion_mnist", "digits"], needs=["04_train", "A3_runtime", "index"])
    text = str(shown)
    assert text.endswith(" · not run yet") and "profile" not in text
    assert "builds on [4 train](04_train.ipynb), [A3 runtime](A3_runtime.ipynb), [index](index.ipynb)" in text
    assert "download: 31 MB" in text and "data: [Fashion-MNIST](A1_data.ipynb) (MIT (Zalando SE)), " in text
    results.record("99_demo", "run", {"minutes": 3.14159, "peak_mb": 1234.5, "date": "2026-02-03", "versions": {}})
    payload = json.loads(json.dumps(shown._repr_mimebundle_()[1]["ftbook"]))
    after = results.Markdown(payload).text
    assert after.startswith("cpu profile: 3.1 minutes, 1,234 MB · ") and after.endswith(" · last run 2026-02-03")
    assert "gpu" not in after, "what was not measured is not mentioned"
    with pytest.raises(ValueError, match="unknown data set 'mnits'"):
        data.status("99_demo", data=["mnits"])
    assert data.status_text("99_none") == "not run yet"


def test_only_functions_of_the_book_are_rendered():
    for function in ("os.system", "ftbook.data._in_cache", "ftbooks.x"):
        with pytest.raises(ValueError, match="no public function of ftbook"):
            results.Markdown({"call": {"function": function, "arguments": {}}})


def test_no_card_brings_html():
    shown = dataclasses.replace(data.card("sst2"), task="<script>x</script>", flaws=("<img src=x>",))._repr_markdown_()
    assert "<script>" not in shown and "<img" not in shown
