"""Module derive: files made of files that are served, checked by the sum of their content."""

import dataclasses
import io
import lzma
import zipfile
from functools import partial

import numpy as np
import pytest
from PIL import Image

from ftbook import data, derive

PAGES = (
    """<doc id="1" url="?curid=1" title="Salt &amp; pepper">
Salt &amp; pepper

Salt () and pepper stand , as a rule , on the table ( or beside it ) .

Use.
Cooks<br> &lt;b&gt;taste&lt;/b&gt; first.\u200e

</doc>
<doc id="2" url="?curid=2" title="Empty">
Empty


</doc>
""",
    """<doc id="3" url="?curid=3" title="Spoon">
Spoon

A&nbsp;spoon  has a bowl ; it has a handle .

</doc>
""",
)
TEXT = """= Salt & pepper =
Salt and pepper stand, as a rule, on the table ( or beside it).
Use.
Cooks <b>taste</b> first.

= Spoon =
A spoon has a bowl; it has a handle.

"""


def zipped(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, raw in members.items():
            archive.writestr(name, raw)
    return buffer.getvalue()


def jpeg(width, height, level=128):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (level, 0, 255 - level)).save(buffer, "JPEG")
    return buffer.getvalue()


def copies(count=3):
    names = [(s, c, i) for s in ("train", "test") for c in ("cat", "ant") for i in range(count)]
    return {
        "images-abc/README.md": b"read me",
        **{f"images-abc/{s}/{c}/{i:04}.jpg": jpeg(32, 32, 80 * i) for s, c, i in names},
    }


def test_a_content_sum_does_not_depend_on_the_packer(tmp_path):
    same = []
    for level in (1, 9):
        path = tmp_path / f"{level}.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=level) as archive:
            for name in "ab" if level == 1 else "ba":
                archive.writestr(name, name * 5000)
        same.append(derive.content_sum(path))
    assert same[0] == same[1]
    (tmp_path / "t.xz").write_bytes(lzma.compress(b"text"))
    (tmp_path / "t.txt").write_bytes(b"text")
    assert derive.content_sum(tmp_path / "t.xz") == derive.content_sum(tmp_path / "t.txt")


def test_the_subset_is_the_first_images_of_every_class_in_the_order_of_names(tmp_path):
    (tmp_path / "images.zip").write_bytes(zipped(copies()))
    derive.cifar10_subset([tmp_path / "images.zip"], tmp_path / "made.npz", train=2, test=1)
    with np.load(tmp_path / "made.npz") as made:
        assert made["classes"].tolist() == ["ant", "cat"] and made["y_train"].tolist() == [0, 0, 1, 1]
        assert made["x_train"].shape == (4, 32, 32, 3) and made["x_train"].dtype == np.uint8
        assert made["x_test"].shape == (2, 32, 32, 3) and made["y_test"].dtype == np.uint8
        assert abs(int(made["x_train"][1, 0, 0, 0]) - 80) < 4, "the second image is the second by name"
    with pytest.raises(KeyError, match="0003.jpg"):
        derive.cifar10_subset([tmp_path / "images.zip"], tmp_path / "made.npz", train=4, test=1)


def test_photos_get_a_short_side_and_are_never_enlarged(tmp_path):
    photos = {"d/val/bees/b.jpg": jpeg(80, 40), "d/train/ants/a.jpg": jpeg(30, 16), "d/train/ants/none.gif": b"GIF"}
    (tmp_path / "all.zip").write_bytes(zipped(photos))
    derive.small_photos([tmp_path / "all.zip"], tmp_path / "small.zip", side=20)
    with zipfile.ZipFile(tmp_path / "small.zip") as made:
        assert made.namelist() == ["d/train/ants/a.jpg", "d/val/bees/b.jpg"]
        sizes = [Image.open(io.BytesIO(made.read(name))).size for name in made.namelist()]
    assert sizes == [(30, 16), (40, 20)]


def test_articles_are_cleaned_and_short_ones_left_out(tmp_path):
    lines = [line for page in PAGES for line in page.split("\n")]
    assert derive.clean_articles(lines, least=8) == TEXT
    assert derive.clean_articles(lines, least=10) == TEXT[: TEXT.index("= Spoon")]
    for i, page in enumerate(PAGES):
        (tmp_path / str(i)).write_text(page, encoding="utf-8")
    derive.wiki_excerpt([tmp_path / "0", tmp_path / "1"], tmp_path / "made.xz")
    assert lzma.open(tmp_path / "made.xz", "rt").read() == "", "no article has 50 words"


def test_blocks_of_a_text_come_in_the_order_on_record(tmp_path, monkeypatch):
    text = " \n = One = \n \n a = b \n = = Part = = \n c \n = Two = \n d \n"
    blocks = derive._blocks(text)
    assert "".join(blocks) == text and [b.strip()[:5] for b in blocks[1:]] == ["= One", "= Two"]
    path, keys = tmp_path / "block", []
    for block in blocks:
        path.write_text(block, encoding="utf-8", newline="")
        keys.append(derive.content_sum(path)[:8])
    assert derive.reordered(text, [keys[2], keys[0], keys[1]]) == blocks[2] + blocks[0] + blocks[1]
    with pytest.raises(KeyError):
        derive.reordered(text, ["00000000"])


def test_the_order_on_record_is_that_of_629_blocks():
    order = data.asset("wikitext2_order.txt").read_text(encoding="ascii").split()
    assert len(order) == 630 and {len(key) for key in order} == {8}


@pytest.fixture
def subset(server, monkeypatch):
    """Puts a small subset with its recipe onto the card of CIFAR-10; the server has its origin."""
    server.answers["/images.zip"] = [(200, zipped(copies()), None)]

    def make(content, urls=("/images.zip",)):
        card = data.card("cifar10")
        origin = data.File("cifar10/images.zip", "", 100_000, tuple(server.base + u for u in urls))
        recipe = data._Recipe((origin,), partial(derive.cifar10_subset, train=2, test=1), content)
        file = dataclasses.replace(card.variants["subset"][0], recipe=recipe)
        variants = {**card.variants, "subset": (file,)}
        monkeypatch.setitem(data._CARDS, "cifar10", dataclasses.replace(card, variants=variants))
        return file

    return make


def test_load_makes_what_nobody_serves_and_keeps_it(cache, server, subset, tmp_path, capsys):
    (tmp_path / "images.zip").write_bytes(zipped(copies()))
    derive.cifar10_subset([tmp_path / "images.zip"], tmp_path / "made.npz", train=2, test=1)
    file = subset(derive.content_sum(tmp_path / "made.npz"))
    images = data.load("cifar10", variant="subset")
    assert images.x.shape == (4, 3, 32, 32) and images.y.tolist() == [0, 0, 1, 1]
    assert [p.name for p in cache.rglob("*") if p.is_file()] == [file.name], "the origin is not kept"
    assert "license" in capsys.readouterr().out
    data._checked.clear()
    data.load("cifar10", "test", variant="subset")  # packed otherwise than on record, the content counts
    assert server.requests == ["/images.zip"]


def test_an_origin_in_the_cache_is_not_fetched(cache, server, subset, monkeypatch, tmp_path):
    (tmp_path / "images.zip").write_bytes(zipped(copies()))
    derive.cifar10_subset([tmp_path / "images.zip"], tmp_path / "made.npz", train=2, test=1)
    subset(derive.content_sum(tmp_path / "made.npz"))
    monkeypatch.setenv("FTBOOK_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="FTBOOK_OFFLINE is set"):
        data.load("cifar10", variant="subset")
    (cache / "cifar10").mkdir(parents=True, exist_ok=True)
    (cache / "cifar10" / "images.zip").write_bytes(zipped(copies()))
    assert len(data.load("cifar10", variant="subset")) == 4 and server.requests == []


def test_what_comes_out_otherwise_is_refused_and_not_kept(cache, server, subset):
    subset("0" * 64)
    with pytest.raises(FileNotFoundError, match=r"content with the SHA-256 sum [0-9a-f]{64}; on record is 0000"):
        data.load("cifar10", variant="subset", progress=False)
    assert [p for p in cache.rglob("*") if p.is_file()] == []
    subset("0" * 64, urls=("/gone.zip",))
    with pytest.raises(FileNotFoundError, match="gone.zip: HTTPError"):
        data.load("cifar10", variant="subset", progress=False)


def test_another_file_in_its_place_is_refused_and_left_alone(cache, subset):
    file = subset("0" * 64)
    (cache / file.path).parent.mkdir(parents=True)
    (cache / file.path).write_bytes(b"something else")
    with pytest.raises(data.ChecksumError, match="left as it is"):
        data.load("cifar10", variant="subset")


def test_a_card_says_of_what_a_file_is_made():
    text = data.card("wiki_excerpt")._repr_markdown_()
    assert "made from [raw.githubusercontent.com](https://raw.githubusercontent.com/" in text
    assert str(data.card("wiki_excerpt").variants["excerpt"][0].recipe).endswith("wiki_00 and 63 more")


def png(pixels) -> bytes:
    packed = io.BytesIO()
    Image.fromarray(pixels).save(packed, "PNG")
    return packed.getvalue()


def test_scenes_are_halved_and_their_labels_stay_labels(tmp_path):
    labels = np.repeat(np.repeat(np.array([[0, 3], [11, 3]], np.uint8), 4, 0), 4, 1)
    photo = np.full((8, 8, 3), 200, np.uint8)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("root/CamVid/train/a.png", png(photo))
        archive.writestr("root/CamVid/trainannot/a.png", png(labels))
        archive.writestr("root/CamVid/train.txt", "no photo")
        archive.writestr("root/other/train/b.png", png(photo))
    derive.half_scenes([tmp_path / "all.zip"], tmp_path / "half.zip")
    with zipfile.ZipFile(tmp_path / "half.zip") as made:
        assert sorted(made.namelist()) == ["CamVid/train/a.jpg", "CamVid/trainannot/a.png"]
        half = np.asarray(Image.open(io.BytesIO(made.read("CamVid/trainannot/a.png"))))
        assert half.tolist() == labels[::2, ::2].tolist()
        assert Image.open(io.BytesIO(made.read("CamVid/train/a.jpg"))).size == (4, 4)


def test_recordings_are_taken_as_they_are(tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("root/recordings/0_ada_1.wav", b"sound")
        archive.writestr("root/recordings/notes.txt", b"text")
        archive.writestr("root/acquire_data/1_ada_1.wav", b"other")
    derive.recordings([tmp_path / "all.zip"], tmp_path / "made.zip")
    with zipfile.ZipFile(tmp_path / "made.zip") as made:
        assert made.namelist() == ["recordings/0_ada_1.wav"] and made.read(made.namelist()[0]) == b"sound"
