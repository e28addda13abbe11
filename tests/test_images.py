"""Module images: one decoder for every picture, folders, zip archives, checks, sets of images in memory."""

import ast
import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from ftbook import data, images

many = settings(max_examples=40, deadline=None)
posix = pytest.mark.skipif(os.name == "nt", reason="links and pipes as on Linux and macOS")


def encoded(picture, kind="PNG", **options):
    """The bytes of a picture (an Image or an array)."""
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def plain(shade=90, size=(40, 24), kind="JPEG"):
    return encoded(Image.new("RGB", size, (shade,) * 3), kind)


def noise(height=9, width=13, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)


def decoded(raw, size):
    """uint8 (size, size, 3), as numpy has it."""
    return images.decode_image(raw, size=size).permute(1, 2, 0).numpy()


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_that_declares(width, height):
    """A PNG of a hundred bytes whose header says that it is large."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


# ---------------------------------------------------------------- one picture


def test_there_is_one_decoder_in_the_library(root):
    """Whoever reads pictures asks `ftbook.images`; no other module opens them itself."""
    readers = {"open", "imread", "read_image", "decode_image", "decode_jpeg", "decode_png", "ImageFolder"}
    found = []
    for file in sorted((root / "ftbook").glob("**/[!_]*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        found += [
            file.stem
            for n in ast.walk(tree)
            if isinstance(n, (ast.ImportFrom, ast.Import))
            and any("PIL" in (getattr(n, "module", "") or "") + a.name for a in n.names)
        ]
        found += [
            f"{file.stem}: {ast.unparse(n)}"
            for n in ast.walk(tree)
            if isinstance(n, ast.Attribute)
            and n.attr in readers
            and ast.unparse(n.value) in ("Image", "io", "torchvision.io", "plt", "cv2", "imageio")
        ]
    packs_its_own_drawings = {"plot", "plot: Image.open"}
    makes_archives_of_a_known_sum = {"derive", "derive: Image.open"}
    reads_maps_of_classes = {"data", "data: Image.open"}  # CamVid's: numbers that no color conversion may touch
    others = {f for f in found if not f.startswith("images")}
    assert others == packs_its_own_drawings | makes_archives_of_a_known_sum | reads_maps_of_classes


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM"])
def test_pictures_are_decoded_square(kind, tmp_path):
    raw = plain(kind=kind)
    x = images.decode_image(raw, size=12)
    assert x.shape == (3, 12, 12) and x.dtype == torch.uint8 and (x.int() - 90).abs().max() <= 2
    (tmp_path / "a.jpg").write_bytes(raw)  # the content decides, not the name
    assert torch.equal(images.decode_image(tmp_path / "a.jpg", size=12), x)
    with pytest.raises(ValueError, match="cannot be decoded"):
        images.decode_image(raw[: len(raw) // 3], size=12)


@many
@given(arrays(np.uint16, (6, 6)))
def test_sixteen_bits_become_eight_by_their_range(values):
    expected = np.round(values / 257).astype(np.uint8)
    for raw in (encoded(values), encoded(values, "TIFF")):
        assert np.array_equal(decoded(raw, 6), np.repeat(expected[..., None], 3, 2))


def test_sixteen_bits_of_other_formats_too():
    values = np.linspace(0, 65_535, 16).round().astype(">u2").reshape(4, 4)
    expected = np.round(values.astype(float) / 257)
    pgm = b"P5 4 4 65535\n" + values.tobytes()
    ten_bits = b"P5 4 4 1023\n" + np.round(values / 65_535 * 1023).astype(">u2").tobytes()
    rows = b"".join(b"\0" + np.repeat(row[:, None], 3, 1).tobytes() for row in values)
    color = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    for raw, slack in ((pgm, 0), (ten_bits, 1), (color, 1)):
        assert np.abs(decoded(raw, 4)[..., 0] - expected).max() <= slack


@pytest.mark.parametrize("values", [np.ones((4, 4), np.float32), np.full((4, 4), 70_000, np.int32)])
def test_values_without_a_scale_are_refused(values):
    with pytest.raises(ValueError, match="t.tif cannot be decoded .*no fixed scale; save it with 8 or 16 bits"):
        images.decode_image(encoded(values, "TIFF"), "t.tif", 4)


def turned_by(orientation, x):
    """What a viewer shows of the stored pixels `x`, by the EXIF standard: where row 0 and column 0 lie."""
    return {
        1: x,
        2: x[:, ::-1],
        3: x[::-1, ::-1],
        4: x[::-1],
        5: x.swapaxes(0, 1),
        6: x.swapaxes(0, 1)[:, ::-1],
        7: x.swapaxes(0, 1)[::-1, ::-1],
        8: x.swapaxes(0, 1)[::-1],
    }[orientation]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(kind, orientation):
    x = np.zeros((8, 8, 3), np.uint8)
    x[:4, :4], x[:4, 4:], x[4:, :4] = 250, 170, 90  # four quarters, all different
    tag = Image.Exif()
    tag[0x0112] = orientation
    options = {"quality": 100} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    raw = encoded(x, kind, exif=tag, **options)
    assert np.abs(decoded(raw, 8).astype(int) - turned_by(orientation, x)).max() <= 3
    sixteen = encoded(x[..., 0].astype(np.uint16) * 257, exif=tag)
    assert np.array_equal(decoded(sixteen, 8), turned_by(orientation, x))


@pytest.mark.parametrize(
    "block",
    [
        b"Exif\0\0",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x07\0",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x02\0\x06\0\x06\0\0\0\0",
    ],
)
def test_a_broken_exif_block_costs_no_picture(block):
    x = images.decode_image(encoded(np.full((8, 8, 3), 90, np.uint8), "JPEG", exif=block), size=8)
    assert (x.int() - 90).abs().max() <= 1


def test_palette_gray_alpha_and_ink_become_color():
    rgb = noise(8, 8)
    palette = Image.fromarray(rgb).quantize(16)
    assert np.array_equal(decoded(encoded(palette), 8), np.asarray(palette.convert("RGB")))
    gray = noise(8, 8, 1)
    assert np.array_equal(decoded(encoded(gray), 8), np.repeat(gray[..., None], 3, 2))
    two = Image.fromarray(gray > 127)
    assert np.array_equal(decoded(encoded(two), 8)[..., 0], np.asarray(two) * 255)
    inks = decoded(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100), 8)
    assert np.abs(inks.astype(int) - (255, 0, 0)).max() <= 3  # magenta and yellow are red


@many
@given(arrays(np.uint8, (5, 5, 4)))
def test_what_is_transparent_is_shown_on_white(pixels):
    alpha = pixels[..., 3:].astype(float) / 255
    expected = pixels[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(decoded(encoded(pixels), 5) - expected).max() <= 1
    gray = np.stack([pixels[..., 0], pixels[..., 3]], 2)
    shown = decoded(encoded(Image.fromarray(gray, "LA")), 5)
    assert np.abs(shown - (gray[..., :1] * alpha + 255 * (1 - alpha))).max() <= 1


def test_a_transparent_color_of_a_palette_is_white():
    picture = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P")
    picture.putpalette([10, 20, 30, 200, 100, 50])
    shown = decoded(encoded(picture, transparency=0), 2)
    assert shown[0, 0].tolist() == [255, 255, 255] and shown[0, 1].tolist() == [200, 100, 50]


@pytest.mark.parametrize(
    ("size", "reason"), [((60_000, 60_000), ""), ((20_000, 8_000), "160,000,000|160000000|20,000 x 8,000")]
)
def test_decompression_bombs_are_refused(size, reason, tmp_path):
    raw = png_that_declares(*size)
    for setting in (Image.MAX_IMAGE_PIXELS, None):  # also where Pillow's own limit was switched off
        old, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, setting
        try:
            with pytest.raises(ValueError, match=f"bomb.png cannot be decoded.*{reason}"):
                images.decode_image(raw, "bomb.png", 8)
        finally:
            Image.MAX_IMAGE_PIXELS = old


def test_a_long_strip_is_cut_before_it_is_enlarged():
    strip = Image.new("L", (60_000, 1), 7)  # 224 pixels high it would have 3 GB
    x = images.decode_image(encoded(strip), size=224)
    assert x.shape == (3, 224, 224) and bool((x == 7).all())
    ramp = np.tile(np.arange(40_000, dtype=np.float32) / 40_000 * 255, (2, 1)).round().astype(np.uint8)
    middle = images.decode_image(encoded(ramp), size=4)
    assert (middle.int() - 127).abs().max() <= 1  # the middle is still the middle


def test_fit_square_equals_torchvision():
    from torchvision.transforms import v2

    for height, width in ((61, 90), (90, 61), (30, 47), (40, 40), (20, 320)):
        x = torch.randint(256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        reference = v2.Compose([v2.Resize(40, antialias=True), v2.CenterCrop(40)])(x)
        ours = images.fit_square(x, 40)
        assert ours.shape == (3, 40, 40) and (ours.int() - reference.int()).abs().max() <= 1
    square = torch.randint(256, (3, 40, 40), dtype=torch.uint8)
    assert torch.equal(images.fit_square(square, 40), square)
    with pytest.raises(ValueError, match="size is 0"):
        images.fit_square(square, 0)


WHOLE = [
    plain(60, (12, 10)),
    plain(kind="PNG"),
    encoded(noise(6, 6, 4)),
    plain(kind="WEBP"),
    plain(kind="TIFF"),
    plain(kind="BMP"),
]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(WHOLE),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    st.floats(0, 1),
)
def test_a_damaged_file_is_a_picture_or_a_named_error(raw, changes, part):
    raw = bytearray(raw[: max(1, int(part * len(raw)))] if part > 0.5 else raw)
    for place, value in changes:
        raw[int(place * len(raw))] = value
    try:
        assert images.decode_image(bytes(raw), "a.jpg", 8).shape == (3, 8, 8)
    except ValueError as error:
        assert str(error).startswith("a.jpg cannot be decoded (")


@given(st.binary(max_size=200))
def test_other_content_is_a_named_error(raw):
    with pytest.raises(ValueError, match="a.jpg cannot be decoded"):
        images.decode_image(raw, "a.jpg", 8)


@posix
def test_what_is_no_file_is_named(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to("nowhere")
    (tmp_path / "round.jpg").symlink_to("round.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")  # reading it would wait for ever
    for name, what in {
        "folder": "a folder",
        "link": "a link to nothing",
        "round": "a link to nothing",
        "pipe": "no regular file",
        "none": "no such file",
    }.items():
        with pytest.raises(ValueError, match=rf"{name}.jpg cannot be decoded \({what}\)"):
            images.decode_image(tmp_path / f"{name}.jpg")


# ---------------------------------------------------------------- folders


def folder(place, **classes):
    for name, contents in classes.items():
        (place / name).mkdir(parents=True)
        for i, raw in enumerate(contents):
            (place / name / f"{i}.jpg").write_bytes(raw)
    return place


def test_a_folder_of_photos(tmp_path, capsys):
    part = images.read_folder(folder(tmp_path / "photos", bees=[plain(200)] * 2, ants=[plain(10)]), size=8)
    assert part.classes == ["ants", "bees"] and part.y.tolist() == [0, 1, 1] and part.skipped == {}
    assert part.x[0].float().mean() < 20 < 190 < part.x[1].float().mean() and capsys.readouterr().out == ""
    assert part.name == "photos" and part.source == str(tmp_path / "photos")


NAMES = st.sampled_from(
    ["a.jpg", "B.JPG", "b.png", "c.jpeg", "notes.txt", "x.tiff", "Z.bmp", "10.jpg", "9.jpg", "é.png"]
)
LAYOUT = st.dictionaries(
    st.sampled_from(["ant", "Bee", "cat", "9", "10"]),
    st.sets(st.tuples(st.sampled_from(["", "sub", "sub/deep", "0"]), NAMES), min_size=1),
    min_size=1,
)


@settings(max_examples=25, deadline=None)
@given(LAYOUT)
def test_classes_and_order_are_those_of_torchvisions_image_folder(tmp_path_factory, layout):
    from torchvision.datasets import ImageFolder

    place, shade = tmp_path_factory.mktemp("layout"), 0
    for kind, files in layout.items():
        for inner, name in sorted(files) + [("", "always.jpg")]:
            (place / kind / inner).mkdir(parents=True, exist_ok=True)
            shade += 1
            (place / kind / inner / name).write_bytes(plain(shade, (4, 4), "PNG"))
    theirs, ours = ImageFolder(place), images.read_folder(place, 4)
    assert ours.classes == theirs.classes and ours.y.tolist() == theirs.targets
    assert ours.x[:, 0, 0, 0].tolist() == [int(np.asarray(picture)[0, 0, 0]) for picture, _ in theirs]


@posix
def test_hidden_files_and_links_in_a_circle_are_left_out(tmp_path):
    place = folder(tmp_path, ants=[plain(10)], bees=[plain(200)])
    (place / "ants" / "._0.jpg").write_bytes(b"what macOS leaves on other file systems")
    (place / ".ipynb_checkpoints").mkdir()
    (place / "ants" / "again").symlink_to(".", target_is_directory=True)
    (place / "ants" / "x.jpg").mkdir()  # a folder, whatever its name
    (place / "ants" / "x.jpg" / "in.png").write_bytes(plain(12))
    part = images.read_folder(place, size=8)
    assert part.classes == ["ants", "bees"] and part.y.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    "what", ["text", "half", "bomb", "empty", pytest.param("dangling", marks=posix), pytest.param("pipe", marks=posix)]
)
def test_skip_corrupt_leaves_out_and_says_why(tmp_path, capsys, what):
    place = folder(tmp_path, ants=[plain(), plain()], bees=[plain()])
    broken = place / "ants" / "0.jpg"
    broken.unlink()
    if what == "dangling":
        broken.symlink_to("nowhere")
    elif what == "pipe":
        os.mkfifo(broken)
    else:
        broken.write_bytes(
            {"text": b"no picture", "half": plain()[:300], "empty": b"", "bomb": png_that_declares(60_000, 60_000)}[
                what
            ]
        )
    with pytest.raises(ValueError, match="0.jpg cannot be decoded.*skip_corrupt=True leaves such files out"):
        images.read_folder(place, size=8)
    part = images.read_folder(place, size=8, skip_corrupt=True)
    assert part.y.tolist() == [0, 1] and list(part.skipped) == [broken]
    assert "cannot be decoded" in part.skipped[broken]
    assert "left out 1 of 3 files that cannot be decoded: 0.jpg" in capsys.readouterr().out
    assert images.resized(part, 4).skipped == part.skipped and part[:1].skipped == {}


def test_a_long_list_of_skipped_files_is_cut(tmp_path, capsys):
    place = folder(tmp_path, ants=[plain(), *[b"?"] * 9])
    assert len(images.read_folder(place, 8, skip_corrupt=True).skipped) == 9
    assert "5.jpg, ... (.skipped says why)" in capsys.readouterr().out


def test_a_file_that_may_not_be_read_is_skipped_too(tmp_path, monkeypatch):
    place = folder(tmp_path, ants=[plain(), plain()])

    def refuse(source, **options):
        if Path(source).name == "0.jpg":
            raise PermissionError(13, "Permission denied", str(source))
        return opened(source, **options)

    opened = Image.open
    monkeypatch.setattr(Image, "open", refuse)
    part = images.read_folder(place, 8, skip_corrupt=True)
    assert len(part) == 1 and "Permission denied" in part.skipped[place / "ants" / "0.jpg"]


def test_folders_that_do_not_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        images.read_folder(tmp_path / "none")
    with pytest.raises(ValueError, match="no class folders"):
        images.read_folder(tmp_path)
    place = folder(tmp_path, ants=[plain()], bees=[])
    with pytest.raises(ValueError, match="no pictures in the class bees"):
        images.read_folder(place)
    (place / "bees" / "0.jpg").write_bytes(b"?")
    with pytest.raises(ValueError, match="class bees can be decoded"):
        images.read_folder(place, size=8, skip_corrupt=True)
    with pytest.raises(ValueError, match="none of the 1 pictures can be decoded; the first: .*0.jpg"):
        images.load_images([place / "bees" / "0.jpg"], skip_corrupt=True)
    with pytest.raises(FileNotFoundError, match="1 of 2 files do not exist"):
        images.load_images([place / "ants" / "0.jpg", place / "x.jpg"])
    x, skipped = images.load_images(
        [place / "x.jpg", str(place / "ants" / "0.jpg"), place / "x.jpg"], 8, skip_corrupt=True
    )
    assert x.shape == (1, 3, 8, 8) and list(skipped) == [place / "x.jpg"]


# ---------------------------------------------------------------- zip archives


def zipped(path, members, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, raw in members.items():
            archive.writestr(name, raw)
    return path


def test_a_zip_archive_of_photos(tmp_path):
    path = zipped(
        tmp_path / "photos.zip",
        {
            "set/train/bees/b.jpg": plain(200),
            "set/train/ants/a.jpg": plain(10),
            "set/train/ants/deep/c.png": plain(12, kind="PNG"),
            "set/valid/ants/d.jpg": plain(90),
            "set/train/ants/note.gif": b"GIF",
            "set/train/loose.jpg": plain(),
            "__MACOSX/set/train/ants/._a.jpg": b"?",
            "set/train/ants/.hidden.jpg": b"?",
            "set/train/cats/e.jpg": plain(55),
        },
    )
    part = images.read_zip(path, "train", ["ants", "bees"], size=8)
    assert part.classes == ["ants", "bees"] and part.y.tolist() == [0, 0, 1] and part.name == "photos"
    assert [round(float(x.float().mean()), -1) for x in part.x] == [10, 10, 200]
    assert images.read_zip(path, "train", size=8).classes == ["ants", "bees", "cats"]
    assert images.read_zip(path, "train", ["bees", "ants"], size=8).y.tolist() == [0, 1, 1]
    assert images.read_zip(path, "set/train", ["cats"], size=8).x.shape == (1, 3, 8, 8)
    top = zipped(tmp_path / "top.zip", {"a\\1.jpg": plain(), "b/1.jpg": plain()})
    assert images.read_zip(top, size=8).classes == ["a", "b"]


def test_archives_that_do_not_do(tmp_path):
    with pytest.raises(ValueError, match="no pictures under train/ for the classes ants"):
        images.read_zip(zipped(tmp_path / "empty.zip", {"ants.jpg": b""}), "train", ["ants"])
    with pytest.raises(ValueError, match="no pictures in the class bees"):
        images.read_zip(zipped(tmp_path / "one.zip", {"train/ants/1.jpg": plain()}), "train", ["ants", "bees"])
    (tmp_path / "text.zip").write_text("<html>")
    with pytest.raises(ValueError, match="text.zip is no zip archive"):
        images.read_zip(tmp_path / "text.zip")
    with pytest.raises(FileNotFoundError, match="none.zip"):
        images.read_zip(tmp_path / "none.zip")


def test_an_archive_that_grows_a_thousandfold_is_refused_before_it_is_read(tmp_path, monkeypatch):
    bomb = zlib.compressobj(9, wbits=-15)
    megabyte = bytes(1 << 20)
    raw = b"".join([*(bomb.compress(megabyte) for _ in range(400)), bomb.flush()])
    path = tmp_path / "bomb.zip"
    zipped(path, {"train/ants/1.jpg": plain()})
    with zipfile.ZipFile(path, "a") as archive:  # thirteen members share one kind of content: 5.4 GB
        for i in range(13):
            info = zipfile.ZipInfo(f"train/ants/{i + 2}.jpg")
            info.compress_type = zipfile.ZIP_STORED
            archive.writestr(info, raw)
            info.compress_type, info.file_size = zipfile.ZIP_DEFLATED, 400 << 20
            archive._didModify = True
    assert path.stat().st_size < 10_000_000
    monkeypatch.setattr(images, "_content", lambda archive, info: pytest.fail("something was read"))
    for skip in (False, True):
        with pytest.raises(
            ValueError,
            match=r"bomb.zip: its pictures take 5,4\d\d,\d{3},\d{3} bytes unpacked, and .* give a larger limit",
        ):
            images.read_zip(path, "train", size=8, skip_corrupt=skip)


def test_the_limit_can_be_raised_and_lowered(tmp_path):
    path = zipped(tmp_path / "a.zip", {"train/ants/1.bmp": encoded(Image.new("RGB", (400, 400)), "BMP")})
    assert len(images.read_zip(path, "train", size=8)) == 1
    with pytest.raises(ValueError, match="480,054 bytes unpacked, and 400,000 are allowed"):
        images.read_zip(path, "train", size=8, limit=400_000)


def test_no_member_is_read_past_the_size_it_declares(tmp_path):
    """A central directory can lie: 200 bytes declared, 100 MB inside."""
    path = zipped(tmp_path / "lie.zip", {"train/ants/1.jpg": bytes(100_000_000), "train/ants/2.jpg": plain()})
    raw = path.read_bytes()
    size = struct.pack("<I", 100_000_000)
    assert raw.count(size) == 2
    path.write_bytes(raw.replace(size, struct.pack("<I", 200)))
    with pytest.raises(ValueError, match="1.jpg cannot be read"):
        images.read_zip(path, "train", size=8)
    part = images.read_zip(path, "train", size=8, skip_corrupt=True)
    assert len(part) == 1 and [p.name for p in part.skipped] == ["1.jpg"]

    class Endless:
        """An archive whose reader does not stop by itself."""

        def open(self, info):
            self.stream = io.BytesIO(bytes(10_000))
            return self.stream

    archive, info = Endless(), zipfile.ZipInfo("a.jpg")
    info.file_size = 500
    with pytest.raises(ValueError, match="holds more than the 500 bytes that it declares"):
        images._content(archive, info)


@pytest.mark.parametrize("what", ["bzip2", "huge", "encrypted", "damaged"])
def test_members_that_cannot_be_read_are_named_or_skipped(tmp_path, what, monkeypatch):
    method = zipfile.ZIP_BZIP2 if what == "bzip2" else zipfile.ZIP_STORED
    path = zipped(tmp_path / "a.zip", {"train/ants/1.jpg": plain()}, method)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("train/ants/2.jpg", plain(), zipfile.ZIP_STORED)
    raw = bytearray(path.read_bytes())
    if what == "encrypted":
        for mark in (b"PK\x03\x04", b"PK\x01\x02"):
            raw[raw.index(mark) + (6 if mark[2] == 3 else 8)] |= 1
    elif what == "damaged":
        raw[200] ^= 255
    elif what == "huge":
        monkeypatch.setattr(images, "_LARGEST_FILE", 10)
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="1.jpg cannot be read"):
        images.read_zip(path, "train", size=8)
    if what != "huge":
        part = images.read_zip(path, "train", size=8, skip_corrupt=True)
        assert len(part) == 1 and [str(p) for p in part.skipped] == ["train/ants/1.jpg"]


# ---------------------------------------------------------------- checks


@pytest.mark.parametrize(
    "x, error, message",
    [
        (np.zeros((1, 3, 4, 4)), TypeError, "as_tensor"),
        (torch.zeros(3, 3), ValueError, "not empty"),
        (torch.zeros(0, 3, 4, 4), ValueError, "not empty"),
        (torch.zeros(1, 4, 4, 3), ValueError, "permute"),
        (torch.zeros(1, 1, 4, 4), ValueError, "1 channels, the model takes 3$"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.int32), TypeError, "uint8"),
        (torch.full((1, 3, 4, 4), 200.0), ValueError, "divide by 255"),
        (torch.full((1, 3, 4, 4), -1.0), ValueError, "normalization"),
        (torch.full((1, 3, 4, 4), float("nan")), ValueError, "nan"),
    ],
)
def test_wrong_images_are_named(x, error, message):
    with pytest.raises(error, match=message):
        images.as_images(x)


def test_right_images_become_floats():
    assert images.as_images(torch.full((3, 2, 2), 51, dtype=torch.uint8)).flatten()[0] == pytest.approx(0.2)
    assert images.as_images(torch.rand(2, 1, 4, 4), channels=None).shape == (2, 1, 4, 4)
    assert images.as_images(torch.rand(2, 3, 4, 4).double()).dtype == torch.float32


def test_noise_has_its_deviation_and_repeats_with_its_generator():
    flat = torch.full((2, 3, 64, 64), 0.5)
    one, two = (images.add_noise(flat, 0.1, torch.Generator().manual_seed(s)) for s in (1, 1))
    assert torch.equal(one, two) and float((one - flat).std()) == pytest.approx(0.1, rel=0.05)
    torch.manual_seed(0)
    assert not torch.equal(images.add_noise(flat), images.add_noise(flat))
    assert images.add_noise(flat, 9.0).max() == 1 and images.add_noise(flat.double()).dtype == torch.float64


def test_noise_and_color_take_a_strength_for_every_image():
    flat = torch.full((3, 3, 64, 64), 0.5)
    torch.manual_seed(0)
    noisy = images.add_noise(flat, torch.tensor([0.0, 0.05, 0.1]).view(3, 1, 1, 1))
    assert noisy.std((1, 2, 3)).tolist() == pytest.approx([0, 0.05, 0.1], rel=0.05)
    factors = torch.tensor([1.0, 0.5, 2.0])
    assert images.adjust_color(flat, factors, torch.ones(3)).mean((1, 2, 3)).tolist() == pytest.approx([0.5, 0.25, 1.0])
    ramp = torch.rand(3, 5, 4, 4)  # five channels: gray is their mean
    torch.testing.assert_close(images.adjust_color(ramp, torch.ones(3), torch.ones(3)), ramp)
    with pytest.raises(ValueError, match="as_images"):
        images.adjust_color(flat.byte(), factors, factors)


def test_images_are_resized():
    part = image_set([0, 1])
    assert images.resized(part, 16).x.shape == (2, 1, 16, 16) and images.resized(part, 16).source == "made up"


# ---------------------------------------------------------------- sets in memory


def image_set(labels, classes="abc"):
    y = torch.tensor(labels)
    return images.ImageSet(torch.arange(len(y), dtype=torch.uint8).reshape(-1, 1, 1, 1), y, classes, "toy", "made up")


def test_image_set_checks_its_arguments():
    x, y = torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])
    with pytest.raises(TypeError, match="uint8"):
        images.ImageSet(x.float(), y, "ab")
    with pytest.raises(TypeError, match="int64"):
        images.ImageSet(x, y.int(), "ab")
    with pytest.raises(ValueError, match=r"\(N, C, H, W\)"):
        images.ImageSet(x[:, 0], y, "ab")
    with pytest.raises(ValueError, match="1 classes"):
        images.ImageSet(x, y, "a")
    assert "2 images (1, 4, 4), 2 classes" in repr(images.ImageSet(x, y, "ab", "n"))


def test_parts_are_selected_by_position_slice_and_mask():
    part = image_set([0, 1, 2, 0, 1])
    assert part[1:3].x.flatten().tolist() == [1, 2] and part[-1].y.tolist() == [1] and len(part[:0]) == 0
    assert part[part.y == 0].x.flatten().tolist() == [0, 3] and part[[4, 0]].x.flatten().tolist() == [4, 0]
    assert part[np.array([2, -1])].y.tolist() == [2, 1] and part[1:].source == "made up"
    with pytest.raises(IndexError, match="0 to 4, got 5"):
        part[5]
    with pytest.raises(ValueError, match="a mask needs shape"):
        part[torch.tensor([True])]
    texts = data.TextSet(list("vwxyz"), part.y, "abc", "t", "s")
    assert texts[[3, 1]].texts == ["y", "w"] and "5 texts, 3 classes" in repr(texts)
    assert texts.per_class(1).counts() == {"a": 1, "b": 1, "c": 1}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=4, max_size=60), st.floats(0.1, 0.9), st.integers(0, 9))
def test_split_is_disjoint_complete_and_stratified(labels, fraction, seed):
    part = image_set(labels)
    count = round(fraction * len(labels))
    if not 1 <= count < len(labels):
        return
    rest, held_out = part.split(fraction, seed=seed)
    assert len(held_out) == count
    assert sorted(rest.x.flatten().tolist() + held_out.x.flatten().tolist()) == list(range(len(labels)))
    for name, number in part.counts().items():
        assert abs(held_out.counts()[name] - number * count / len(labels)) <= 1
    again = part.split(fraction, seed=seed)[1]
    assert torch.equal(again.x, held_out.x)


def test_split_into_several_parts():
    part = image_set([0] * 60 + [1] * 40)
    a, b, c = part.split(10, 20, 0.5, seed=1)
    assert [len(p) for p in (a, b, c)] == [10, 20, 50] and a.counts() == {"a": 6, "b": 4, "c": 0}
    assert [len(p) for p in part.split((0.5, 0.5), stratified=False)] == [50, 50]
    assert not torch.equal(part.split(50, seed=0)[1].x, part.split(50, seed=1)[1].x)
    assert part.split(50)[1].y[:20].unique().numel() == 2  # random order, not class after class
    for parts in ((0,), (100,), (0.7, 0.7), (), (60, 60)):
        with pytest.raises(ValueError, match="cannot cut 100 examples"):
            part.split(*parts)


def test_every_class_gives_as_many_examples():
    part = image_set([0] * 9 + [1] * 5 + [2] * 4)
    few = part.per_class(4, seed=3)
    assert few.counts() == {"a": 4, "b": 4, "c": 4} and few.x.unique().numel() == 12
    assert torch.equal(few.x, part.per_class(4, seed=3).x) and few.y.tolist() != sorted(few.y.tolist())
    for n in (0, 5):
        with pytest.raises(ValueError, match="'c': 4"):
            part.per_class(n)


def test_normalization_equals_torchvision():
    from torchvision.transforms.v2 import functional as F

    x = torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    part = images.ImageSet(x, torch.zeros(20, dtype=torch.int64), ["only"])
    mean, std = part.stats()
    reference = x.double() / 255
    torch.testing.assert_close(mean.double(), reference.mean((0, 2, 3)), rtol=0, atol=1e-6)
    torch.testing.assert_close(std.double(), reference.std((0, 2, 3), correction=0), rtol=0, atol=1e-6)
    expected = F.normalize(x.float() / 255, mean.tolist(), std.tolist())
    torch.testing.assert_close(part.float(mean, std), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(part.float(), x.float() / 255)
    with pytest.raises(ValueError, match="both mean and std"):
        part.float(mean)
    with pytest.raises(ValueError, match="std must be positive"):
        images.Normalize(0.5, [0.2, 0.0, 0.1])
    normalize = images.Normalize(mean, std)
    assert normalize(x.to("meta")).device.type == "meta" and normalize.scale.device.type == "meta"


def test_zoom_in_shows_the_part_that_is_meant():
    x = torch.arange(64.0).reshape(1, 1, 8, 8).repeat(3, 1, 1, 1)
    side, center = torch.tensor([1.0, 0.5, 0.5]), torch.tensor([[0.0, -0.5, 0.5], [0.0, 0.5, -0.5]])
    y = images.zoom_in(x, side, center)
    large = torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(y[0], x[0])
    torch.testing.assert_close(y[1, :, 1:7, 1:7], large[1, :, 9:15, 1:7])
    torch.testing.assert_close(y[2, :, 1:7, 1:7], large[2, :, 1:7, 9:15])
    mirrored = images.zoom_in(x, side, torch.zeros(2, 3), -torch.ones(3))
    torch.testing.assert_close(mirrored, images.zoom_in(x, side, torch.zeros(2, 3)).flip(-1))


@pytest.mark.parametrize("edge", ["border", "reflection", "zeros"])
def test_zoom_in_keeps_the_type_and_fills_what_lies_beyond(edge):
    x, out = torch.ones(2, 3, 4, 4), torch.full((2,), 2.0)
    assert images.zoom_in(x.double(), out, torch.zeros(2, 2), edge=edge).dtype == torch.float64
    corner = images.zoom_in(x, out, torch.zeros(2, 2), edge=edge)[:, :, 0, 0]
    assert torch.equal(corner, torch.zeros(2, 3) if edge == "zeros" else torch.ones(2, 3))


def test_a_picture_that_says_it_is_larger_than_allowed_is_refused():
    raw = plain(kind="PNG")
    with pytest.raises(images.TooManyPixels, match="cannot be decoded .*pixels, more than the 10 allowed"):
        images.decode_image(raw, max_pixels=10)
    assert images.decode_image(raw, size=8, max_pixels=10_000_000).shape == (3, 8, 8)
