"""Cutting a crop from part of a JPEG, against cutting it from the whole, on damaged files.

    python3 -m pytest tests/test_fuzz.py
    python3 tests/test_fuzz.py 600 [SEED]     # for ten minutes, and from another seed

`crop` stops decoding where the crop's box ends. Whatever bytes a file holds, it must give the
crop that the whole picture gives, or refuse what Pillow refuses.
"""

import io
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator

import toolkit  # noqa: F401  the scripts can be imported

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFile

from preprocess import (
    SIDES,
    BrokenPicture,
    as_rgb,
    crop,
    cut,
    decode,
    opened,
    resized_size,
    side_box,
    top_of_jpeg,
)

SEED, FILES = 20, 500


def textured(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Discs of many colours and sizes: edges wherever a crop may lie, and no row that is black."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (width, height), (200, 180, 90))
    pen = ImageDraw.Draw(image)
    for _ in range(60):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        radius = rng.uniform(2, 3 + max(width, height) / 8)
        colour = tuple(rng.integers(30, 256, 3).tolist())
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], colour)
    return image.convert(mode)


def jpeg(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 85} | options)
    return file.getvalue()


# --- the 37 variants --------------------------------------------------------------------------


def segments(content: bytes) -> list[tuple[int, int]]:
    """Start and end of each marker segment before the first scan."""
    found, at = [], 2
    while at + 4 <= len(content) and content[at] == 0xFF and content[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(content[at + 2 : at + 4])
        found.append((at, end))
        at = end
    return found


def adobe(content: bytes, transform: int) -> bytes:
    """With Adobe's marker in place of JFIF's: 0 RGB or CMYK, 1 YCbCr, 2 YCCK."""
    marker = b"\xff\xee\x00\x0eAdobe" + struct.pack(">HHHB", 100, 0, 0, transform)
    start, end = segments(content)[0]
    rest = content[end:] if content[start + 1] == 0xE0 else content[2:]
    return content[:2] + marker + rest


def sampled(content: bytes, horizontal: int, vertical: int) -> bytes:
    """The frame header's first component with other factors: other blocks belong together."""
    at = next(start for start, _ in segments(content) if content[start + 1] in (0xC0, 0xC2))
    return content[: at + 11] + bytes([horizontal << 4 | vertical]) + content[at + 12 :]


def relabelled(content: bytes, names: bytes) -> bytes:
    """Components called R, G, B, which libjpeg takes for RGB where no marker tells."""
    start, end = segments(content)[0]
    content = bytearray(content[:start] + content[end:])  # without JFIF
    frame = next(start for start, _ in segments(content) if content[start + 1] in (0xC0, 0xC2))
    scan = content.index(b"\xff\xda")
    for i, name in enumerate(names):
        content[frame + 10 + 3 * i] = content[scan + 5 + 2 * i] = name
    return bytes(content)


def with_segment(content: bytes, marker: int, data: bytes) -> bytes:
    return (
        content[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data + content[2:]
    )


def without_end(content: bytes) -> bytes:
    return content[:-2]


def variants() -> dict[str, bytes]:
    """Files that are no plain JPEG, but whole: whatever else cameras and programs write."""
    photo, tall, large = (
        textured(500, 375),
        textured(281, 419, seed=1),
        textured(1400, 1100, seed=2),
    )
    plain, full = jpeg(photo), jpeg(photo, subsampling=0)
    grey = jpeg(photo.convert("L"))
    return {
        "plain": plain,
        "tall": jpeg(tall),
        "large, halved while decoding": jpeg(large),
        "4:4:4": full,
        "4:2:2": jpeg(photo, subsampling=1),
        "4:1:1": jpeg(photo, subsampling="4:1:1"),
        "progressive": jpeg(photo, progressive=True),
        "progressive, large": jpeg(large, progressive=True),
        "progressive and 4:4:4": jpeg(photo, progressive=True, subsampling=0),
        "restart markers by blocks": jpeg(photo, restart_marker_blocks=3),
        "restart markers by rows": jpeg(photo, restart_marker_rows=1),
        "restart markers, progressive": jpeg(photo, restart_marker_blocks=5, progressive=True),
        "quality 1": jpeg(photo, quality=1),
        "quality 100": jpeg(photo, quality=100, subsampling=0),
        "optimised tables": jpeg(photo, optimize=True),
        "RGB-coded": jpeg(photo, keep_rgb=True),
        "RGB-coded, progressive": jpeg(photo, keep_rgb=True, progressive=True),
        "components R, G, B": relabelled(full, b"RGB"),
        "components 0, 1, 2": relabelled(full, b"\0\1\2"),
        "Adobe transform 0": adobe(full, 0),
        "Adobe transform 1": adobe(plain, 1),
        "Adobe transform 2": adobe(plain, 2),
        "grey": grey,
        "grey, progressive": jpeg(photo.convert("L"), progressive=True),
        "grey with factors of 2": sampled(grey, 2, 2),
        "CMYK": jpeg(photo.convert("CMYK")),
        "CMYK, Adobe transform 2": adobe(jpeg(photo.convert("CMYK")), 2),
        "junk behind the end": plain + bytes(range(256)) * 9,
        "another JPEG behind the end": plain + jpeg(tall),
        "no end-of-image marker": without_end(plain),
        "a comment": with_segment(plain, 0xFE, b"\xff\xc0 not a frame" * 3),
        "a thumbnail in Exif": with_segment(plain, 0xE1, b"Exif\0\0" + jpeg(textured(60, 40))),
        "fill bytes before a marker": plain[:2] + b"\xff\xff" + plain[2:],
        "one pixel": jpeg(textured(1, 1)),
        "17x23": jpeg(textured(17, 23)),
        "500x33": jpeg(textured(500, 33)),
        "8x799": jpeg(textured(8, 799)),
    }


VARIANTS = variants()


def test_the_variants_are_what_they_say():
    assert len(VARIANTS) == 37
    modes = {name: Image.open(io.BytesIO(content)).mode for name, content in VARIANTS.items()}
    assert {name for name, mode in modes.items() if mode == "CMYK"} == {
        "CMYK", "CMYK, Adobe transform 2"
    }  # fmt: skip
    assert {name for name, mode in modes.items() if mode == "L"} == {
        "grey", "grey, progressive", "grey with factors of 2"
    }  # fmt: skip
    for name, content in VARIANTS.items():
        assert bool(Image.open(io.BytesIO(content)).info.get("progressive")) == (
            "progressive" in name
        ), name
    colours = [np.asarray(Image.open(io.BytesIO(VARIANTS[f"Adobe transform {i}"]))) for i in (0, 1)]
    assert np.abs(colours[0].astype(int) - colours[1]).mean() > 20


# --- damage -----------------------------------------------------------------------------------


def flip(content: bytearray, at: int, rng: np.random.Generator) -> None:
    content[at] ^= 1 << rng.integers(8)


def change(content: bytearray, at: int, rng: np.random.Generator) -> None:
    content[at] = rng.choice([0, 255, 0xD9, rng.integers(256)])


def insert(content: bytearray, at: int, rng: np.random.Generator) -> None:
    content[at:at] = rng.bytes(rng.integers(1, 9))


def delete(content: bytearray, at: int, rng: np.random.Generator) -> None:
    del content[at : at + rng.integers(1, 9)]


def zero(content: bytearray, at: int, rng: np.random.Generator) -> None:
    """As a lost block of the disk."""
    length = min(int(rng.integers(1, 600)), len(content) - at)
    content[at : at + length] = bytes(length)


def cut_off(content: bytearray, at: int, rng: np.random.Generator) -> None:
    del content[max(at, len(content) // 3, 3) :]


def repeat_segment(content: bytearray, at: int, rng: np.random.Generator) -> None:
    if found := segments(bytes(content)):
        start, end = found[rng.integers(len(found))]
        target = found[rng.integers(len(found))][0]
        content[target:target] = content[start:end]


def drop_segment(content: bytearray, at: int, rng: np.random.Generator) -> None:
    if found := segments(bytes(content)):
        start, end = found[rng.integers(len(found))]
        del content[start:end]


def resize_frame(content: bytearray, at: int, rng: np.random.Generator) -> None:
    """Another height or width in the frame header than the scan has."""
    frames = [start for start, _ in segments(bytes(content)) if content[start + 1] in (0xC0, 0xC2)]
    if frames:
        content[frames[0] + rng.choice([5, 6, 7, 8])] = rng.integers(256)


def marker(content: bytearray, at: int, rng: np.random.Generator) -> None:
    """A marker amid the scan: restart, end, another scan or table."""
    content[at : at + 2] = bytes([0xFF, rng.choice([0xD0, 0xD3, 0xD9, 0xDA, 0xC4, 0xDB, 0xDC])])


DAMAGE: tuple[Callable, ...] = (
    flip, change, insert, delete, zero, cut_off, repeat_segment, drop_segment, resize_frame, marker
)  # fmt: skip


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """One to three damages, half of them near the beginning, where the headers are."""
    broken = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        if len(broken) < 4:  # hardly anything is left
            break
        end = len(broken) if rng.random() < 0.5 else min(len(broken), 700)
        DAMAGE[rng.integers(len(DAMAGE))](broken, int(rng.integers(2, end)), rng)
    return bytes(broken)


# --- the comparison ---------------------------------------------------------------------------


def whole_crop(content: bytes, side: int, corner: tuple[float, float]) -> np.ndarray:
    """The crop of the whole picture, halved while decoding as `crop` does it."""
    image = opened(content)
    width, height = image.size
    draft = image.draft(image.mode, resized_size(width, height, 2 * side))
    across, down = (draft[1][2] / width, draft[1][3] / height) if draft else (1, 1)
    left, top, right, bottom = side_box(side, corner)(width, height)
    found = cut(as_rgb(image), (left * across, top * down, right * across, bottom * down))
    return np.asarray(found).astype(int)


def compare(content: bytes, side: int, corner: tuple[float, float]) -> str:
    """Raises AssertionError if the crop is not that of the whole picture."""
    choose_box = side_box(side, corner)
    try:
        found = crop(content, choose_box)
    except BrokenPicture:
        with pytest.raises(BrokenPicture):
            decode(content)
        return "refused by both"
    image = opened(content)
    if image.mode == "CMYK" or top_of_jpeg(content, image, choose_box(*image.size)) is None:
        return "decoded whole"
    outcome = "equal"
    try:
        expected = whole_crop(content, side, corner)
    except BrokenPicture:  # the damage may lie below the crop
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
            expected = whole_crop(content, side, corner)
        outcome = "equal, above the damage"
    assert (found.mode, found.size) == ("RGB", (224, 224))
    difference = np.abs(np.asarray(found) - expected).max()
    assert difference <= 1, f"{difference} levels off at side {side}, corner {corner}"
    return outcome


def places(rng: np.random.Generator) -> Iterator[tuple[int, tuple[float, float]]]:
    """Sides and corners: the top, where much is left undecoded, and the bottom."""
    for down in (0.0, float(rng.random()), 0.999999):
        yield int(rng.choice(SIDES)), (float(rng.random()), down)


@pytest.mark.parametrize("name", VARIANTS)
def test_crops_of_each_variant_are_those_of_the_whole_picture(name):
    rng = np.random.default_rng(3)
    outcomes = {compare(VARIANTS[name], *place) for _ in range(2) for place in places(rng)}
    if name != "no end-of-image marker":  # for Pillow it is cut off
        assert outcomes <= {"equal", "decoded whole"}
    if name in ("plain", "tall", "progressive", "4:4:4", "grey", "large, halved while decoding"):
        assert "equal" in outcomes


def fuzz(rng: np.random.Generator, contents: list[bytes]) -> Counter:
    """One damaged file of each of `contents`, at three places each."""
    outcomes = Counter()
    for number, content in enumerate(contents):
        broken = damaged(content, rng)
        for place in places(rng):
            try:
                outcomes[compare(broken, *place)] += 1
            except Exception:
                with open("fuzz_failure.jpg", "wb") as file:
                    file.write(broken)
                print(f"file {number} of {list(VARIANTS)[number % 37]} at {place}")
                raise
    return outcomes


def test_crops_of_damaged_files_are_those_of_the_whole_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a failing file is kept
    rng = np.random.default_rng(SEED)
    small = [name for name in VARIANTS if "large" not in name]
    outcomes = fuzz(rng, [VARIANTS[small[i % len(small)]] for i in range(FILES)])
    assert outcomes["equal"] > FILES / 2
    assert outcomes["refused by both"] > FILES / 5
    assert outcomes["decoded whole"] > FILES / 20
    assert outcomes["equal, above the damage"] > FILES / 50


def main() -> None:
    seconds, seed = float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else SEED + 1
    rng, outcomes, end = np.random.default_rng(seed), Counter(), time.monotonic() + seconds
    while time.monotonic() < end:
        outcomes += fuzz(rng, list(VARIANTS.values()))
    print(f"{outcomes.total() // 3} damaged files, seed {seed}: {dict(outcomes)}")


if __name__ == "__main__":
    main()
