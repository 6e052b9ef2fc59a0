"""Opening pictures by their content: formats, colours, odd shapes, and every way to be broken.

python3 -m pytest tests/test_pictures.py
"""

import base64
import errno
import io
import os
import struct
import subprocess
import sys
import threading
import tracemalloc
import zlib
from pathlib import Path

import toolkit
import utils
from utils import UserError

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, TiffImagePlugin

import preprocess
import preprocess_val
from preprocess import BrokenPicture

# As in the scripts: preprocess sets this filter when it is imported, pytest resets it.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]


def smooth(height: int = 96, width: int = 120, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, 3]: coloured gradients with a soft pattern, kind to JPEG."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    phase = np.random.default_rng(seed).uniform(0, 6, 3)
    waves = [np.sin(4 * x + p) + np.cos(5 * y - p) for p in phase]
    return np.uint8(128 + 50 * np.stack(waves, -1))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def opened(folder: Path, content: bytes) -> Image.Image:
    """The picture as the scripts see it, from a file whose name always says JPEG."""
    path = folder / "picture.JPEG"
    path.write_bytes(content)
    return preprocess.decode(preprocess.read_picture(path))


def pixels(folder: Path, content: bytes) -> np.ndarray:
    image = opened(folder, content)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Mean absolute difference in levels of 256."""
    assert found.shape == expected.shape
    return np.abs(found - expected.astype(int)).mean()


COLOUR = smooth()
GREY = COLOUR[:, :, 1]
PICTURE = Image.fromarray(COLOUR)


# --- formats ----------------------------------------------------------------------------------

FORMATS = {
    "JPEG": (encoded(PICTURE, "JPEG", quality=95), 2),
    "progressive JPEG": (encoded(PICTURE, "JPEG", quality=95, progressive=True), 2),
    "JPEG with restart markers": (
        encoded(PICTURE, "JPEG", quality=95, restart_marker_blocks=2),
        2,
    ),
    "JPEG with 4:4:4 colours": (encoded(PICTURE, "JPEG", quality=95, subsampling=0), 2),
    "two JPEGs in one (MPO)": (
        encoded(PICTURE, "MPO", save_all=True, append_images=[PICTURE.rotate(180)], quality=95),
        2,
    ),
    "PNG": (encoded(PICTURE, "PNG"), 0),
    "WebP": (encoded(PICTURE, "WEBP", quality=95), 3),
    "WebP without loss": (encoded(PICTURE, "WEBP", lossless=True), 0),
    "BMP": (encoded(PICTURE, "BMP"), 0),
    "TIFF": (encoded(PICTURE, "TIFF"), 0),
    "TIFF in LZW": (encoded(PICTURE, "TIFF", compression="tiff_lzw"), 0),
    "RGBA PNG": (encoded(PICTURE.convert("RGBA"), "PNG"), 0),
    "GIF": (encoded(PICTURE.convert("P", palette=Image.Palette.ADAPTIVE), "GIF"), 8),
    "animated GIF": (
        encoded(
            PICTURE.convert("P", palette=Image.Palette.ADAPTIVE),
            "GIF",
            save_all=True,
            append_images=[PICTURE.rotate(180).convert("P")],
        ),
        8,
    ),
}
"""Content, and the mean difference that the format's own loss may make."""


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_opened_by_its_content(name, tmp_path):
    content, loss = FORMATS[name]
    assert difference(pixels(tmp_path, content), COLOUR) <= loss


def test_the_format_registry_knows_what_is_asked_for():
    """One that Pillow does not register makes it fail for every format listed behind it."""
    Image.init()
    assert set(preprocess.FORMATS) <= set(Image.OPEN)


def test_formats_beyond_pictures_are_refused(tmp_path):
    for kind in ("PDF", "EPS", "ICO", "TGA"):
        with pytest.raises(BrokenPicture):
            opened(tmp_path, encoded(PICTURE.resize((32, 32)), kind))


# --- kinds of grey, palettes, transparency ----------------------------------------------------


def as_rgb_levels(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[:, :, None], 3, axis=2)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP"])
def test_grey_pictures_become_grey_rgb(kind, tmp_path):
    found = pixels(tmp_path, encoded(Image.fromarray(GREY), kind))
    assert difference(found, as_rgb_levels(GREY)) <= (2 if kind == "JPEG" else 0)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_of_grey_are_scaled_not_clipped(kind, tmp_path):
    deep = np.linspace(0, 65535, 96 * 120).reshape(96, 120).astype(np.uint16)
    found = pixels(tmp_path, encoded(Image.fromarray(deep), kind))
    assert np.abs(found - as_rgb_levels(deep / 257)).max() <= 1
    assert found.min() == 0 and found.max() == 255


def tiff(height: int, width: int, data: bytes, tags: dict[int, int | tuple[int, ...]]) -> bytes:
    """A TIFF file by hand. `tags` go beyond those of an uncompressed picture in one strip."""
    tags = {256: width, 257: height, 259: 1, 273: 8, 278: height, 279: len(data)} | tags
    end = 8 + len(data)
    more, entries = b"", b""
    for tag, value in sorted(tags.items()):
        values = value if isinstance(value, tuple) else (value,)
        packed = struct.pack(f"<{len(values)}I", *values)
        if len(values) > 1:
            more, packed = more + packed, struct.pack("<I", end + len(more))
        entries += struct.pack("<HHI", tag, 4, len(values)) + packed
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", end + len(more)) + data + more + directory


RAMP = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)


THREE = np.stack([RAMP, RAMP[::-1], RAMP.T], axis=2)


def test_16_bits_of_colour_pixel_by_pixel():
    content = tiff(64, 64, THREE.tobytes(), {258: (16, 16, 16), 262: 2, 277: 3, 284: 1})
    assert np.abs(np.asarray(preprocess.decode(content)) - THREE / 257).max() <= 1


def tiff12(grey: np.ndarray, bits: int = 12) -> bytes:
    """A grey TIFF of 12 bits a pixel: Pillow writes none. uint16 [height, even width]."""
    pairs = grey.reshape(-1, 2).astype(np.uint32)
    packed = np.stack(
        [pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], axis=1
    )
    data = packed.astype(np.uint8).tobytes()
    return tiff(*grey.shape, data, {258: bits, 262: 1, 277: 1})


def plane_by_plane() -> bytes:
    """A ramp of 16-bit colours, one colour after the other."""
    planes = np.moveaxis(THREE, 2, 0)
    tags = {258: (16, 16, 16), 262: 2, 277: 3, 284: 2}
    starts, size = tuple(8 + i * RAMP.nbytes for i in range(3)), (RAMP.nbytes,) * 3
    return tiff(64, 64, planes.tobytes(), tags | {273: starts, 279: size})


MISREAD = {
    "signed 16 bits": tiff(
        64, 64, (RAMP // 2).astype(np.int16).tobytes(), {258: 16, 262: 1, 277: 1, 339: 2}
    ),
    "signed 32 bits": encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
    "unsigned 32 bits": tiff(
        64, 64, (RAMP.astype(np.uint32) << 16).tobytes(), {258: 32, 262: 1, 277: 1, 339: 1}
    ),
    "floating point": encoded(Image.fromarray(RAMP.astype(np.float32) / 65535), "TIFF"),
    "signed 8 bits": tiff(
        64, 64, (RAMP // 512).astype(np.int8).tobytes(), {258: 8, 262: 1, 277: 1, 339: 2}
    ),
    "16-bit colours plane by plane": plane_by_plane(),
    "12 bits of grey": tiff12(RAMP >> 4),
    "16 bits of grey from white to black": tiff(64, 64, RAMP.tobytes(), {258: 16, 262: 0, 277: 1}),
    "floating-point PFM": encoded(Image.fromarray(RAMP.astype(np.float32) / 65535), "PPM"),
}
"""Ramps from black to white that Pillow opens without a word."""


@pytest.mark.parametrize("kind", MISREAD)
def test_numbers_that_pillow_reads_wrongly_are_refused(kind):
    image = Image.open(io.BytesIO(MISREAD[kind]))
    levels = np.asarray(image.convert("RGB")).astype(int)
    expected = THREE if "colours" in kind else np.repeat(RAMP[:, :, None], 3, axis=2)
    assert np.abs(levels - expected / 257).max() > 50  # so it would be used with wrong colours
    for use in (preprocess.decode, lambda content: preprocess.crop(content, WHOLE)):
        with pytest.raises(BrokenPicture, match="pixel format"):
            use(MISREAD[kind])


WHOLE = preprocess.side_box(256, (0, 0))


def test_16_bits_of_grey_in_the_other_byte_order(tmp_path):
    deep = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(">u2")
    content = encoded(Image.frombytes("I;16B", (64, 64), deep.tobytes()), "TIFF")
    assert np.abs(pixels(tmp_path, content) - as_rgb_levels(deep / 257)).max() <= 1


def png(width: int, height: int, depth: int, colour: int, data: bytes, *chunks: bytes) -> bytes:
    """A PNG file made by hand; `data` are the filtered rows."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *(chunk(c[:4], c[4:]) for c in chunks)]
    parts += [chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_16_bits_of_each_colour_are_scaled(tmp_path):
    deep = (COLOUR.astype(np.uint16) * 257).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    found = pixels(tmp_path, png(120, 96, 16, 2, rows))
    assert np.abs(found - COLOUR).max() <= 1


def test_one_bit_pictures_are_black_and_white(tmp_path):
    bits = GREY > 128
    for kind in ("PNG", "TIFF", "BMP"):
        found = pixels(tmp_path, encoded(Image.fromarray(bits), kind))
        assert np.array_equal(found, as_rgb_levels(255 * bits))


def test_grey_with_transparency(tmp_path):
    picture = Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (120, 96), 200)])
    assert difference(pixels(tmp_path, encoded(picture, "PNG")), as_rgb_levels(GREY)) == 0


@pytest.mark.parametrize("transparency", [1, b"\xff\x00\x80\xff"])
def test_palettes_with_transparency_keep_their_colours(transparency, tmp_path):
    palette = [(250, 10, 20), (10, 240, 30), (20, 30, 230), (240, 240, 60)]
    picture = Image.fromarray(GREY // 64)
    indexed = Image.frombytes("P", picture.size, picture.tobytes())
    indexed.putpalette([level for colour in palette for level in colour])
    found = pixels(tmp_path, encoded(indexed, "PNG", transparency=transparency))
    assert np.array_equal(found, np.array(palette)[GREY // 64])


# --- CMYK -------------------------------------------------------------------------------------

INKS = smooth(seed=1)
BLACK = smooth(seed=2)[:, :, 0] // 2
PRINTED = (255 - INKS.astype(float)) * (255 - BLACK[:, :, None].astype(float)) / 255
"""RGB of the inks: each takes its share of white, black takes its share of all."""


def cmyk_jpeg(inks: np.ndarray, black: np.ndarray) -> bytes:
    """As Photoshop writes it: Adobe marker, all four channels inverted."""
    picture = Image.merge("CMYK", [Image.fromarray(c) for c in (*np.moveaxis(inks, 2, 0), black)])
    content = encoded(picture, "JPEG", quality=95)
    assert b"Adobe" in content
    return content


def test_cmyk_of_adobe_has_the_right_colours(tmp_path):
    assert difference(pixels(tmp_path, cmyk_jpeg(INKS, BLACK)), PRINTED) < 3


def test_ycck_of_adobe_has_the_right_colours(tmp_path):
    """The same inks stored as brightness and colour differences: Adobe's transform 2."""
    ycc = np.asarray(Image.fromarray(INKS).convert("YCbCr"))
    content = cmyk_jpeg(255 - ycc, BLACK)
    at = content.index(b"Adobe") + 11
    assert content[at] == 0
    content = content[:at] + b"\x02" + content[at + 1 :]
    assert difference(pixels(tmp_path, content), PRINTED) < 4


def test_cmyk_tiff(tmp_path):
    picture = Image.merge("CMYK", [Image.fromarray(c) for c in (*np.moveaxis(INKS, 2, 0), BLACK)])
    assert difference(pixels(tmp_path, encoded(picture, "TIFF")), PRINTED) < 2


ARITHMETIC = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAYEBQYFBAYGBQYHBwYIChAKCgkJChQODwwQFxQYGBcUFhYaHSUfGhsjHBYW"
    "ICwgIyYnKSopGR8tMC0oMCUoKSj/2wBDAQcHBwoIChMKChMoGhYaKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgo"
    "KCgoKCgoKCgoKCgoKCgoKCgoKCgoKCj/yQARCAAQABgDASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwDR"
    "VEypgg9+XHc/fuJiNGGwR22GKq0GgFj3sP/Z"
)
"""A JPEG of 24x16 pixels, made by `cjpeg -arithmetic -quality 80`."""


def test_an_arithmetic_coded_jpeg(tmp_path):
    down = Image.linear_gradient("L").resize((24, 16))
    expected = np.dstack([down, down.rotate(180), down.transpose(Image.Transpose.FLIP_LEFT_RIGHT)])
    assert difference(pixels(tmp_path, base64.b64decode(ARITHMETIC)), expected) < 4


# --- what comes along with a picture ----------------------------------------------------------


def exif(orientation: int) -> bytes:
    values = Image.Exif()
    values[0x0112] = orientation
    values[0x010F] = "camera"
    return values.tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_orientation_is_ignored(kind, orientation, tmp_path):
    plain = pixels(tmp_path, encoded(PICTURE, kind))
    turned = pixels(tmp_path, encoded(PICTURE, kind, exif=exif(orientation)))
    assert np.array_equal(plain, turned)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_colour_profiles_change_nothing(kind, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = pixels(tmp_path, encoded(PICTURE, kind))
    assert np.array_equal(plain, pixels(tmp_path, encoded(PICTURE, kind, icc_profile=profile)))


def broken_exif() -> bytes:
    """A JPEG without resolution, whose Exif block promises values that are not there."""
    values = TiffImagePlugin.ImageFileDirectory_v2()
    values[282], values[296], values[0x0112] = 300.0, 2, 6
    block = io.BytesIO()
    values.save(block)
    content = b"Exif\0\0" + block.getvalue()[:20]
    jpeg = encoded(PICTURE, "JPEG")
    assert jpeg[2:4] == b"\xff\xe0"
    rest = jpeg[4 + int.from_bytes(jpeg[4:6], "big") :]
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content + rest


BROKEN_EXIF = broken_exif()
OPEN_PLAINLY = "import sys; from PIL import Image; Image.open(sys.argv[1]).getexif()"


def test_broken_exif_is_silent(tmp_path):
    (tmp_path / "data/train/cat").mkdir(parents=True)
    path = tmp_path / "data/train/cat/a.JPEG"
    path.write_bytes(BROKEN_EXIF)
    pillow = subprocess.run([sys.executable, "-c", OPEN_PLAINLY, str(path)], capture_output=True)
    assert b"UserWarning" in pillow.stderr  # so there is something to silence
    config = toolkit.write_config(tmp_path, tmp_path / "data", tmp_path / "buffer")
    for script, *arguments in (("get_mu_sigma.py",), ("preprocess.py", "--shorter_side=256")):
        result = toolkit.run(script, config, *arguments)
        assert result.returncode == 0 and result.stderr == "", result.stderr


NOISY = """
import io, os, sys
sys.path.insert(0, sys.argv[1])
from PIL import Image
if sys.argv[2] == "ours":
    import preprocess
content = sys.stdin.buffer.read()
for _ in range(2):
    child = os.fork()  # as workers are
    if sys.argv[2] == "ours":
        preprocess.crop(content, preprocess.side_box(256, (0, 0)))
        preprocess.decode(content)
    else:
        Image.open(io.BytesIO(content)).load()
    os.write(2, b"our own line\\n")
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.parametrize("whose", ["ours", "Pillow's"])
def test_libtiff_does_not_write_to_the_terminal(whose):
    """Nor does a worker's; and lines of the scripts are not lost by it."""
    content = encoded(PICTURE, "TIFF", compression="tiff_lzw", tiffinfo={305: "software"})
    entry = struct.pack("<HHI", 305, 2, len("software") + 1)
    assert content.count(entry) == 1
    content = content.replace(entry, struct.pack("<HHI", 0, 0, 0))
    result = subprocess.run(
        [sys.executable, "-c", NOISY, str(toolkit.ROOT), whose], input=content, capture_output=True
    )
    lines = result.stderr.decode().splitlines()
    assert result.returncode == 0 and lines.count("our own line") == 4, lines
    assert len(lines) == 4 if whose == "ours" else any("Tag 0" in line for line in lines), lines


# --- shapes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (500, 33), (33, 500), (1, 100), (1500, 20)])
def test_odd_shapes_are_fine(size, tmp_path):
    for kind in ("JPEG", "PNG"):
        assert opened(tmp_path, encoded(Image.new("RGB", size, "red"), kind)).size == size


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (20000, 20)])
def test_shapes_beyond_use_are_refused(size, tmp_path):
    for kind in ("JPEG", "PNG"):
        with pytest.raises(BrokenPicture, match=f"{size[0]}.{size[1]}"):
            opened(tmp_path, encoded(Image.new("RGB", size, "red"), kind))


# --- pictures of enormous size ----------------------------------------------------------------


def bomb(width: int, height: int, kind: str) -> bytes:
    """A small file that says it holds so many pixels."""
    if kind == "PNG":
        return png(width, height, 8, 2, b"\0" * 50_000)
    content = bytearray(encoded(PICTURE, kind))
    if kind == "JPEG":
        at = content.index(b"\xff\xc0")
        content[at + 5 : at + 9] = struct.pack(">HH", height, width)
    elif kind == "GIF":
        content[6:10] = struct.pack("<HH", width, height)
    else:
        content[18:26] = struct.pack("<ii", width, height)
    return bytes(content)


@pytest.fixture
def never_decoded(monkeypatch):
    def load(image):
        pytest.fail(f"{image.size} was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP"])
@pytest.mark.parametrize("size", [(60000, 50000), (14000, 14000), (10000, 9500)])
def test_enormous_pictures_are_refused_unseen(kind, size, tmp_path, never_decoded):
    with pytest.raises(BrokenPicture):
        opened(tmp_path, bomb(*size, kind))


def test_a_crop_of_an_enormous_picture_is_refused_too(tmp_path):
    Image.new("L", (9600, 9400), 200).save(tmp_path / "a.jpg")
    with pytest.raises(BrokenPicture):
        toolkit.crop_file(tmp_path / "a.jpg", preprocess.side_box(256, (0.5, 0.5)))


def test_commands_refuse_enormous_pictures_unseen(tmp_path):
    folder = tmp_path / "data/train/cat"
    folder.mkdir(parents=True)
    (folder / "bomb.JPEG").write_bytes(bomb(10_000, 9_500, "PNG"))
    for i in range(3):
        (folder / f"{i}.JPEG").write_bytes(FORMATS["JPEG"][0])
    config = toolkit.write_config(tmp_path, tmp_path / "data", tmp_path / "buffer")
    result = toolkit.run("get_mu_sigma.py", config)
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert "warning: cat/bomb.JPEG" in lines[0] and "10000×9500 pixels is too large" in lines[0]
    assert "1 could not be decoded" in result.stdout


# --- broken files -----------------------------------------------------------------------------


SINGLE = [name for name in FORMATS if not name.startswith(("animated", "two"))]
"""Of several pictures in a file the first, which counts, is whole before the file ends."""


@pytest.mark.parametrize("name", SINGLE)
def test_a_truncated_picture_is_refused(name, tmp_path):
    content, _ = FORMATS[name]
    for sixteenth in range(16):
        with pytest.raises(BrokenPicture):
            opened(tmp_path, content[: len(content) * sixteenth // 16])


NO_PICTURES = {
    "nothing": b"",
    "text": b"<html><body>404 Not Found</body></html>\n" * 20,
    "zeros": bytes(5000),
    "noise": np.random.default_rng(0).bytes(5000),
    "a JPEG's start and noise": b"\xff\xd8\xff\xe0" + np.random.default_rng(1).bytes(5000),
    "a PNG's start alone": b"\x89PNG\r\n\x1a\n",
    "a JPEG without its start": encoded(PICTURE, "JPEG")[2:],
}


@pytest.mark.parametrize("name", NO_PICTURES)
def test_what_is_no_picture_is_refused(name, tmp_path):
    with pytest.raises(BrokenPicture):
        opened(tmp_path, NO_PICTURES[name])


def test_a_missing_file_counts_as_a_broken_picture(tmp_path):
    with pytest.raises(BrokenPicture, match="no such file"):
        preprocess.read_picture(tmp_path / "gone.JPEG")
    (tmp_path / "folder.JPEG").mkdir()
    with pytest.raises(BrokenPicture, match="is a directory"):
        preprocess.read_picture(tmp_path / "folder.JPEG")
    (tmp_path / "loop.JPEG").symlink_to("loop.JPEG")
    with pytest.raises(BrokenPicture, match="symbolic links"):
        preprocess.read_picture(tmp_path / "loop.JPEG")


def test_a_file_too_large_for_a_picture_is_one_broken_picture(tmp_path):
    """A sparse file takes no room, and would not fit into memory."""
    path = tmp_path / "data/train/cat/huge.JPEG"
    path.parent.mkdir(parents=True)
    path.touch()
    os.truncate(path, 300 * 10**9)
    with pytest.raises(BrokenPicture, match="file too large"):
        preprocess.read_picture(path)
    for i in range(3):
        (path.parent / f"{i}.JPEG").write_bytes(FORMATS["JPEG"][0])
    config = toolkit.write_config(tmp_path, tmp_path / "data", tmp_path / "buffer")
    for script, *arguments in (("get_mu_sigma.py",), ("preprocess.py", "--shorter_side=256")):
        result = toolkit.run(script, config, *arguments)
        assert result.returncode == 0, result.stderr
        (warning,) = result.stderr.splitlines()
        assert "cat/huge.JPEG: left out, file too large" in warning


def test_a_pipe_is_a_broken_picture_and_blocks_nobody(tmp_path):
    folder = tmp_path / "data/train/cat"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "pipe.JPEG")
    for i in range(3):
        (folder / f"{i}.JPEG").write_bytes(FORMATS["JPEG"][0])
    config = toolkit.write_config(tmp_path, tmp_path / "data", tmp_path / "buffer")
    for script, *arguments in (("get_mu_sigma.py",), ("preprocess.py", "--shorter_side=256")):
        result = toolkit.run(script, config, *arguments, timeout=60)
        assert result.returncode == 0, result.stderr
        (warning,) = result.stderr.splitlines()
        assert "cat/pipe.JPEG: left out, cannot be decoded" in warning


def damaged(content: bytes, draw: np.random.Generator) -> bytes:
    """Some bytes changed, more often near the beginning, where the headers are."""
    broken = bytearray(content)
    for _ in range(draw.choice([1, 2, 4, 16])):
        end = len(broken) if draw.random() < 0.5 else min(len(broken), 300)
        broken[draw.integers(end)] = draw.choice([draw.integers(256), 0, 255])
    return bytes(broken)


def open_damaged(folder: Path, content: bytes, part: bool) -> str:
    path = folder / "damaged.JPEG"
    path.write_bytes(content)
    try:
        content, choose_box = preprocess.read_picture(path), preprocess.side_box(256, (0.5, 0.5))
        image = preprocess.crop(content, choose_box) if part else preprocess.decode(content)
        assert image.mode == "RGB"
        return "decoded"
    except BrokenPicture:
        return "refused"


def test_2000_damaged_jpegs_raise_only_the_known_errors(ram):
    draw = np.random.default_rng(7)
    small = Image.fromarray(smooth(40, 56))
    kinds = [
        encoded(small, "JPEG"),
        encoded(small, "JPEG", progressive=True, exif=exif(6)),
        encoded(small.convert("L"), "JPEG"),
        encoded(small.convert("CMYK"), "JPEG"),
    ]
    outcomes = [
        open_damaged(ram, damaged(kinds[i % len(kinds)], draw), i % 3 == 0) for i in range(2000)
    ]
    assert outcomes.count("decoded") > 200 and outcomes.count("refused") > 200


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damaged_pictures_of_other_formats_raise_only_the_known_errors(kind, ram):
    draw = np.random.default_rng(8)
    small = Image.fromarray(smooth(40, 56))
    variant = {"lossless": True} if kind == "WEBP" else {}
    second = small if kind == "WEBP" else small.convert("P")
    kinds = [encoded(small, kind), encoded(second, kind, **variant)]
    outcomes = [open_damaged(ram, damaged(kinds[i % 2], draw), False) for i in range(400)]
    assert outcomes.count("refused") > 40


# --- counting failures ------------------------------------------------------------------------


def warnings_of(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if ": warning: " in line]


def test_each_failing_picture_is_named_once(capsys):
    failures = preprocess.Failures(1000)
    for path in ("cat/a.JPEG", "cat/b.JPEG", "cat/a.JPEG", "cat/a.JPEG"):
        failures.add(path, BrokenPicture("cannot be decoded: image file is truncated"))
    lines = warnings_of(capsys)
    assert len(lines) == len(failures) == 2
    assert "cat/a.JPEG" in lines[0] and "truncated" in lines[0]
    assert "cat/b.JPEG" in lines[1]
    assert str(failures).startswith("2 ")


@pytest.mark.parametrize(("pictures", "allowed"), [(100, 1), (299, 2), (1000, 10), (50_000, 500)])
def test_more_than_1_in_100_failing_is_the_end(pictures, allowed, capsys):
    failures = preprocess.Failures(pictures)
    for i in range(allowed):
        failures.add(f"{i}.JPEG", BrokenPicture("broken"))
        failures.add(f"{i}.JPEG", BrokenPicture("broken"))
        failures.check()
    for count in (allowed + 1, allowed + 2):
        failures.add(f"more{count}.JPEG", BrokenPicture("broken"))
        with pytest.raises(UserError, match=f"{count} of {pictures} pictures could not"):
            failures.check()


def test_a_single_failure_does_not_stop_a_small_set(capsys):
    failures = preprocess.Failures(8)
    failures.add("a.JPEG", BrokenPicture("broken"))
    failures.check()
    failures.add("b.JPEG", BrokenPicture("broken"))
    with pytest.raises(UserError):
        failures.check()


def test_a_set_of_which_nothing_can_be_decoded_is_refused(capsys):
    failures = preprocess.Failures(1)
    failures.add("a.JPEG", BrokenPicture("broken"))
    with pytest.raises(UserError, match="1 of 1 pictures"):
        failures.check()


def test_threads_name_each_failing_picture_once(capsys):
    failures = preprocess.Failures(10_000)

    def add_all() -> None:
        for i in range(50):
            failures.add(f"{i}.JPEG", BrokenPicture("broken"))

    threads = [threading.Thread(target=add_all) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = warnings_of(capsys)
    assert len(lines) == len(set(lines)) == len(failures) == 50


@pytest.mark.parametrize("name", NO_PICTURES)
def test_the_reason_is_for_people(name, tmp_path, capsys):
    """One line, and not the address of a Python object."""
    path = tmp_path / "line\nbreak.JPEG"
    path.write_bytes(NO_PICTURES[name])
    with pytest.raises(BrokenPicture) as error:
        preprocess.decode(preprocess.read_picture(path))
    preprocess.Failures(1000).add("cat/line\nbreak.JPEG", error.value)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "cat/line\\nbreak.JPEG" in lines[0]
    assert "object at 0x" not in lines[0] and not lines[0].endswith(": ")


# --- sizes ------------------------------------------------------------------------------------


def test_the_shorter_side_is_exact_and_the_longer_nearest():
    draw = np.random.default_rng(3)
    for width, height in draw.integers(1, 6000, (3000, 2)).tolist():
        for side in (256, 319, 480):
            size = preprocess.resized_size(width, height, side)
            assert min(size) == side
            exact = max(width, height) * side / min(width, height)
            assert abs(max(size) - exact) <= 0.5
            assert (width - height) * (size[0] - size[1]) >= 0


# --- broken pictures, errors of our own, and storage that fails -------------------------------


@pytest.fixture
def ten(tmp_path):
    """Settings for a dataset of ten training and ten validation pictures."""
    for part in ("train", "val"):
        (tmp_path / "data" / part / "cat").mkdir(parents=True)
        for i in range(10):
            (tmp_path / "data" / part / "cat" / f"{i}.JPEG").write_bytes(FORMATS["JPEG"][0])
    return toolkit.write_config(tmp_path, tmp_path / "data", tmp_path / "buffer")


OWN_ERRORS = {
    "preprocess.py": (preprocess, "resized_size", ["--shorter_side=256"]),
    "preprocess.py, decoding": (preprocess, "as_rgb", ["--shorter_side=256"]),
    "preprocess.py, writing": (preprocess, "save_jpeg", ["--shorter_side=256"]),
    "preprocess_val.py": (preprocess_val, "ten_crops", []),
    "get_mu_sigma.py": (Image.Image, "histogram", []),
}


def planted(kind: type[Exception]):
    def fail(*_args, **_kwargs):
        raise kind("an error of our own")

    return fail


def run_in_process(monkeypatch, name: str, config: Path, arguments: list[str]) -> None:
    script = name.split(",")[0]
    monkeypatch.setattr(sys, "argv", [script, f"--config={config}", *arguments])
    __import__(script.removesuffix(".py")).main()


@pytest.mark.parametrize("kind", [TypeError, ValueError, KeyError])
@pytest.mark.parametrize("name", OWN_ERRORS)
def test_an_error_of_our_own_is_no_broken_picture(name, kind, ten, monkeypatch):
    module, function, arguments = OWN_ERRORS[name]
    monkeypatch.setattr(module, function, planted(kind))
    with pytest.raises(kind, match="an error of our own"):
        run_in_process(monkeypatch, name, ten, arguments)


@pytest.mark.parametrize("function", ["resized_size", "cut", "top_of_jpeg", "as_rgb"])
def test_an_error_of_our_own_in_a_crop_is_no_broken_picture(function, tmp_path, monkeypatch):
    (tmp_path / "a.JPEG").write_bytes(FORMATS["JPEG"][0])
    monkeypatch.setattr(preprocess, function, planted(TypeError))
    with pytest.raises(TypeError, match="an error of our own"):
        toolkit.crop_file(tmp_path / "a.JPEG", preprocess.side_box(256, (0, 0)))


NO_FAULT_OF_THE_PICTURE = {
    "a disk that fails": OSError(errno.EIO, "Input/output error"),
    "no file handle left": OSError(errno.EMFILE, "Too many open files"),
    "no memory left in the system": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "no memory left": MemoryError(),
    "no permission": PermissionError(errno.EACCES, "Permission denied"),
}


@pytest.mark.parametrize("name", OWN_ERRORS)
@pytest.mark.parametrize("reason", NO_FAULT_OF_THE_PICTURE)
def test_what_is_no_fault_of_the_picture_stops_the_script(name, reason, ten, monkeypatch, capsys):
    error = NO_FAULT_OF_THE_PICTURE[reason]

    def failing(_path):
        raise error

    monkeypatch.setattr(utils, "read_file", failing)
    monkeypatch.setattr(utils.time, "sleep", lambda _seconds: None)
    with pytest.raises((type(error), UserError)):
        run_in_process(monkeypatch, name, ten, OWN_ERRORS[name][2])
    with pytest.raises((type(error), UserError)):
        toolkit.crop_file(ten.parent / "data/train/cat/0.JPEG", lambda *_: (0, 0, 9, 9))
    assert "left out" not in capsys.readouterr().err


def test_want_of_memory_is_no_broken_picture(monkeypatch):
    """Pillow's decoders report it as broken data."""

    def no_memory(*_args, **_kwargs):
        raise MemoryError

    content = FORMATS["JPEG"][0][:-200]
    with pytest.raises(BrokenPicture):
        preprocess.decode(content)
    monkeypatch.setattr(np, "empty", no_memory)
    with pytest.raises(MemoryError):
        preprocess.decode(content)


def test_want_of_memory_is_one_line():
    program = "import utils\ndef main():\n    raise MemoryError\nutils.run(main)"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=toolkit.ROOT
    )
    assert result.returncode == 2
    assert "error: not enough memory" in result.stderr and result.stderr.count("\n") == 1


def test_a_file_that_the_storage_fails_to_read_is_named(tmp_path, monkeypatch):
    """os.read, other than os.open, raises errors without a name."""
    (tmp_path / "a.JPEG").touch()
    monkeypatch.setattr(utils, "read_file", planted_oserror)
    with pytest.raises(OSError) as error:
        preprocess.read_picture(tmp_path / "a.JPEG")
    assert error.value.filename == str(tmp_path / "a.JPEG")


def planted_oserror(_path):
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


def test_a_folder_that_comes_back_is_waited_for(tmp_path, monkeypatch):
    """Its disk was unmounted for a moment. A file that is missing alone is not waited for."""
    folder, away = tmp_path / "train", tmp_path / "away"
    away.mkdir()
    (away / "a.JPEG").write_bytes(b"content")
    pauses = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        away.rename(folder)

    monkeypatch.setattr(utils.time, "sleep", pause)
    assert preprocess.read_picture(folder / "a.JPEG", folder) == b"content"
    assert len(pauses) == 1
    with pytest.raises(BrokenPicture, match="no such file"):
        preprocess.read_picture(folder / "b.JPEG", folder)
    assert len(pauses) == 1


def test_a_folder_that_stays_away_stops_the_script(tmp_path, monkeypatch):
    monkeypatch.setattr(utils.time, "sleep", lambda _seconds: None)
    paths = preprocess.Paths(["a.JPEG", "b.JPEG"])
    pictures = preprocess.Pictures(tmp_path / "gone", paths, np.zeros(2, np.int32), ["a"], "")
    with pytest.raises(UserError, match="a.JPEG: its storage failed 5 times: no such folder"):
        pictures.decoded(0)


# --- the paths of all pictures ----------------------------------------------------------------


def test_paths_are_a_sequence_of_strings():
    texts = ["a/b.jpg", "", "ünï/\udce9.jpg", "line\nbreak"]
    paths = preprocess.Paths(iter(texts))
    assert (len(paths), list(paths), paths[-1], paths[2]) == (4, texts, texts[-1], texts[2])
    assert "a/b.jpg" in paths and "b.jpg" not in paths
    for beyond in (4, -5):
        with pytest.raises(IndexError):
            paths[beyond]
    assert not len(preprocess.Paths([]))
    one, other = (
        preprocess.Pictures(Path("/"), preprocess.Paths(names), np.zeros(2, np.int32), ["a"], "")
        for names in (["ab", "c"], ["a", "bc"])
    )
    assert one.fingerprint != other.fingerprint


def test_paths_take_little_more_memory_than_their_letters():
    texts = [f"n{i:08}/n{i:08}_{i}.JPEG" for i in range(20_000)]
    tracemalloc.start()
    paths = preprocess.Paths(texts)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    letters = sum(map(len, texts))
    assert size < 1.05 * letters + 8 * len(paths) + 10_000
