"""Cutting a crop from a picture, against Pillow's resizing of the whole picture.

python3 -m pytest tests/test_cutting.py
"""

import io
from pathlib import Path

import toolkit

import numpy as np
import pytest
from PIL import Image

import preprocess
from preprocess import CROP, SIDES, BrokenPicture, area_box, crop, side_box


def textured(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coloured structure of all sizes, as in photographs: sums of noise at several scales."""
    rng = np.random.default_rng(seed)
    total = np.full((height, width, 3), 128, np.float32)
    for size, strength in ((2, 60), (5, 40), (17, 30), (60, 15), (200, 8)):
        grid = (strength * rng.standard_normal((size, size, 3))).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(grid[:, :, channel])
            layer = layer.resize((width, height), Image.Resampling.BICUBIC)
            total[:, :, channel] += np.asarray(layer)
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def reference_crop(path: Path, side: int, corner) -> np.ndarray:
    """Resizes the whole picture with Pillow, then cuts: int64 [224, 224, 3]."""
    with Image.open(path) as image:
        width, height = (round(pixels * side / min(image.size)) for pixels in image.size)
        assert min(width, height) == side
        picture = np.asarray(
            preprocess.as_rgb(image).resize((width, height), Image.Resampling.BILINEAR)
        )
    left, top = int(corner[0] * (width - CROP + 1)), int(corner[1] * (height - CROP + 1))
    return picture[top : top + CROP, left : left + CROP].astype(np.int64)


CORNERS = [(0.0, 0.0), (0.999999, 0.999999), (0.0, 0.999999), (0.43, 0.57)]

SECOND = Image.new("RGB", (90, 90))

FILES = {
    "500x375": (500, 375, "RGB", "a.jpg", {}),
    "portrait": (375, 500, "RGB", "a.jpg", {"subsampling": 2}),
    "4:4:4": (333, 500, "RGB", "a.jpg", {"subsampling": 0}),
    "4:2:2": (501, 335, "RGB", "a.jpg", {"subsampling": 1}),
    "progressive": (640, 480, "RGB", "a.jpg", {"progressive": True}),
    "restart markers": (500, 333, "RGB", "a.jpg", {"restart_marker_rows": 1}),
    "500x33": (500, 33, "RGB", "a.jpg", {}),
    "33x500": (33, 500, "RGB", "a.jpg", {}),
    "long": (2000, 100, "RGB", "a.jpg", {}),
    "tiny": (17, 23, "RGB", "a.jpg", {}),
    "one pixel": (1, 1, "RGB", "a.png", {}),
    "224x224": (224, 224, "RGB", "a.jpg", {}),
    "256x256": (256, 256, "RGB", "a.jpg", {}),
    "grey": (500, 375, "L", "a.jpg", {}),
    "CMYK": (500, 375, "CMYK", "a.jpg", {}),
    "just no draft": (1280, 1023, "RGB", "a.jpg", {}),
    "PNG": (500, 375, "RGB", "a.png", {}),
    "PNG named JPEG": (400, 300, "RGB", "a.JPEG", {"format": "PNG"}),
    "transparent PNG": (400, 300, "RGBA", "a.png", {}),
    "palette PNG": (400, 300, "P", "a.png", {}),
    "GIF": (400, 300, "P", "a.gif", {}),
    "grey and alpha": (300, 400, "LA", "a.png", {}),
    "two in one": (400, 300, "RGB", "a.mpo", {"save_all": True, "append_images": [SECOND]}),
}


@pytest.mark.parametrize("kind", FILES)
def test_crop_is_pillows_resize_then_crop(tmp_path, kind):
    width, height, mode, name, options = FILES[kind]
    textured(width, height).convert(mode).save(tmp_path / name, **{"quality": 90} | options)
    rng = np.random.default_rng(1)
    sides = [SIDES[0], SIDES[-1], *rng.choice(SIDES, 4)]
    for side, corner in zip(sides, [*CORNERS, *rng.random((2, 2))], strict=True):
        found = toolkit.crop_file(tmp_path / name, side_box(int(side), corner))
        assert (found.mode, found.size) == ("RGB", (CROP, CROP))
        difference = np.asarray(found) - reference_crop(tmp_path / name, int(side), corner)
        assert np.abs(difference).max() <= 2, (side, corner)
        assert np.abs(difference.mean()) < 0.1, (side, corner)


def test_crops_of_many_draws_are_pillows(toy):
    paths = sorted((toy / "train").rglob("*.JPEG"))
    rng = np.random.default_rng(2)
    for path in paths:
        side, corner = int(rng.choice(SIDES)), rng.random(2)
        difference = np.asarray(toolkit.crop_file(path, side_box(side, corner))) - reference_crop(
            path, side, corner
        )
        assert np.abs(difference).max() <= 2, (path, side, corner)


def test_sixteen_bits_of_grey_are_scaled(tmp_path):
    """Pillow's own conversion would clip nearly all of it to white."""
    ramp = np.tile(np.linspace(0, 65535, 300).astype(np.uint16), (300, 1))
    Image.fromarray(ramp).save(tmp_path / "a.png")
    found = np.asarray(toolkit.crop_file(tmp_path / "a.png", side_box(256, (0.0, 0.0))))
    assert found[0, 0].max() <= 1
    assert abs(int(found[0, 223, 1]) - 255 * 223 / 255) < 3
    assert (found[..., 0] == found[..., 2]).all()


def whole_then_cut(content: bytes, choose_box) -> np.ndarray:
    """The crop from the whole picture, int64 [224, 224, 3]: Pillow alone, nothing left out."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    box = choose_box(*image.size)
    return np.asarray(image.resize((CROP, CROP), Image.Resampling.BILINEAR, box), np.int64)


JPEGS = [kind for kind in FILES if FILES[kind][3] == "a.jpg"]


@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_decoded_in_part_gives_the_same_picture(kind):
    width, height, mode, _, options = FILES[kind]
    file = io.BytesIO()
    textured(width, height).convert(mode).save(file, "JPEG", **{"quality": 90} | options)
    draw = np.random.default_rng(3)
    for _ in range(12):
        for choose_box in (
            side_box(int(draw.choice(SIDES)), draw.random(2)),
            area_box(draw.random((10, 4))),
        ):
            left, top, right, bottom = choose_box(width, height)
            if min(right - left, bottom - top) < 2 * 2 * CROP:  # not halved while decoding
                found = np.asarray(crop(file.getvalue(), choose_box), np.int64)
                # Pillow chooses the order of its passes by the height: a level may differ.
                assert np.abs(found - whole_then_cut(file.getvalue(), choose_box)).max() <= 1


@pytest.mark.parametrize("kind", JPEGS)
def test_no_more_of_a_jpeg_is_decoded_than_the_box_needs(kind, monkeypatch):
    """The rows of the picture that the decoder fills, for a box in the upper half."""
    width, height, mode, _, options = FILES[kind]
    file = io.BytesIO()
    textured(width, height).convert(mode).save(file, "JPEG", **{"quality": 90} | options)
    decoded, frombytes = [], Image.Image.frombytes

    def note(image: Image.Image, *arguments: object) -> None:
        decoded.append(image.size)
        frombytes(image, *arguments)

    monkeypatch.setattr(Image.Image, "frombytes", note)
    crop(file.getvalue(), lambda width, height: (0, 0, width / 2, height / 2))
    if mode == "CMYK":
        assert not decoded
    else:
        (size,) = decoded
        assert size[0] == width and size[1] <= height / 2 + max(height / 2 / CROP, 1) + 2


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("first_black_row", [0, 100, 250, 374])
def test_a_black_bottom_is_no_broken_file(tmp_path, mode, first_black_row):
    pixels = np.array(textured(500, 375))
    pixels[first_black_row:] = 0
    Image.fromarray(pixels).convert(mode).save(tmp_path / "a.jpg", quality=95)
    for side, corner in ((256, (0.5, 0.9)), (480, (0.1, 0.0)), (480, (0.1, 0.5)), (361, (0.9, 1))):
        corner = np.minimum(corner, 0.999999)
        found = np.asarray(toolkit.crop_file(tmp_path / "a.jpg", side_box(side, corner)))
        difference = found - reference_crop(tmp_path / "a.jpg", side, corner)
        assert np.abs(difference).max() <= 2, (side, corner)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_crop_beyond_the_end_of_a_broken_file_is_refused(tmp_path, progressive):
    """Black or grey where the file ends must never be trained on."""
    file = io.BytesIO()
    textured(500, 375).save(file, "JPEG", quality=90, progressive=progressive)
    whole = file.getvalue()
    path = tmp_path / "a.jpg"
    for share, down in ((0.0, 0.9), (0.1, 0.999999), (0.1, 0.5), (0.5, 0.9), (0.8, 0.999999)):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(BrokenPicture):
            toolkit.crop_file(path, side_box(480, (0.5, down)))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(3200, 2400), (2051, 3333), (1025, 1931)])
def test_a_very_large_jpeg_is_right_without_decoding_all_of_it(tmp_path, mode, size):
    textured(*size).convert(mode).save(tmp_path / "a.jpg", quality=92)
    for side, corner in ((256, (0.0, 0.0)), (256, (0.999999, 0.999999)), (333, (0.4, 0.6))):
        found = np.asarray(toolkit.crop_file(tmp_path / "a.jpg", side_box(side, corner)))
        difference = found - reference_crop(tmp_path / "a.jpg", side, corner)
        assert np.abs(difference).mean() < 1, (side, corner)
        assert np.abs(difference.mean(axis=(0, 1))).max() < 0.15, (side, corner)


def test_orientation_and_broken_exif_are_ignored(tmp_path, capfd):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotated
    textured(500, 375).save(tmp_path / "turned.jpg", exif=exif.tobytes(), quality=90)
    textured(500, 375).save(tmp_path / "broken.jpg", exif=b"Exif\0\0II*\0\xff\xff", quality=90)
    textured(500, 375).save(tmp_path / "plain.jpg", quality=90)
    crops = [
        np.asarray(toolkit.crop_file(tmp_path / name, side_box(305, (0.2, 0.7))))
        for name in ("plain.jpg", "turned.jpg", "broken.jpg")
    ]
    np.testing.assert_array_equal(crops[0], crops[1])
    np.testing.assert_array_equal(crops[0], crops[2])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("progressive", [False, True])
def test_a_picture_that_is_damaged_below_the_crop_is_used(progressive, tmp_path):
    """A progressive JPEG is damaged everywhere."""
    file = io.BytesIO()
    textured(500, 375).save(file, "JPEG", quality=90, progressive=progressive)
    (tmp_path / "whole.jpg").write_bytes(file.getvalue())
    (tmp_path / "cut.jpg").write_bytes(file.getvalue()[: int(0.9 * len(file.getvalue()))])
    choose_box = side_box(480, (0.5, 0.1))
    if progressive:
        with pytest.raises(BrokenPicture):
            toolkit.crop_file(tmp_path / "cut.jpg", choose_box)
    else:
        found, expected = (
            toolkit.crop_file(tmp_path / name, choose_box) for name in ("cut.jpg", "whole.jpg")
        )
        assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("cut_short", [False, True])
def test_one_file_has_one_verdict(cut_short, tmp_path):
    """A JFIF segment of no content is all that Pillow needs to refuse a JPEG."""
    file = io.BytesIO()
    textured(300, 280).save(file, "JPEG", quality=90)
    content = file.getvalue()
    assert content[2:11] == b"\xff\xe0\0\x10JFIF\0"
    if cut_short:
        content = content[:4] + b"\0\7JFIF\0" + content[20:]
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    ways = (
        lambda: preprocess.decode(preprocess.read_picture(path)),
        lambda: toolkit.crop_file(path, side_box(256, (0, 0))),
        lambda: toolkit.crop_file(path, area_box([(0.5, 0.5, 0.5, 0.5)])),
    )
    for way in ways:
        if cut_short:
            with pytest.raises(BrokenPicture):
                way()
        else:
            assert way().mode == "RGB"


# --- where a box lies -------------------------------------------------------------------------


def test_boxes_reach_every_place_and_both_ends():
    """Of a picture of 300x256 that is not resized."""
    draw = np.random.default_rng(4)
    boxes = np.array([side_box(256, draw.random(2))(300, 256) for _ in range(4000)])
    assert (boxes[:, 2:] - boxes[:, :2] == CROP).all()
    for at, places in ((boxes[:, 0], 300 - CROP + 1), (boxes[:, 1], 256 - CROP + 1)):
        counts = np.bincount(at.astype(int), minlength=places)
        assert len(counts) == places and counts.min() > 0
        # Chi-squared: its mean is the degrees of freedom, its variance twice that.
        chi2 = ((counts - 4000 / places) ** 2 / (4000 / places)).sum()
        assert abs(chi2 - (places - 1)) < 5 * np.sqrt(2 * (places - 1))


def area_boxes(width: int, height: int, count: int) -> np.ndarray:
    """float64 [count, 4], drawn as the preprocessor draws them."""
    draw = np.random.default_rng(5)
    return np.array([area_box(draw.random((10, 4)))(width, height) for _ in range(count)])


def torchvisions_boxes(width: int, height: int, count: int) -> np.ndarray:
    """What torchvision's RandomResizedCrop.get_params says, for scale (0.08, 1), without rounding.

    Written from its documentation and Szegedy et al. 2014; NumPy's generator in place of torch's.
    """
    draw, boxes = np.random.default_rng(6), []
    while len(boxes) < count:
        for _ in range(10):
            target = width * height * draw.uniform(0.08, 1.0)
            ratio = np.exp(draw.uniform(np.log(3 / 4), np.log(4 / 3)))
            w, h = np.sqrt(target * ratio), np.sqrt(target / ratio)
            if w <= width and h <= height:
                x, y = draw.uniform(0, width - w), draw.uniform(0, height - h)
                boxes.append((x, y, x + w, y + h))
                break
        else:
            w = min(width, 4 / 3 * height)
            h = min(height, 4 / 3 * width)
            boxes.append(((width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2))
    return np.array(boxes)


def shapes_of(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    across, down = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    return across * down, across / down


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (300, 300), (500, 200), (33, 500)])
def test_areas_are_those_of_szegedy(size):
    """Area and aspect within bounds, inside the picture, distributed as torchvision's."""
    boxes, expected = area_boxes(*size, 4000), torchvisions_boxes(*size, 4000)
    area, aspect = shapes_of(boxes)
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= np.array(size) + 1e-9).all()
    assert aspect.min() > 3 / 4 - 1e-9 and aspect.max() < 4 / 3 + 1e-9
    if max(size) < 3 * min(size):
        assert 0.08 <= area.min() / np.prod(size) < 0.085 and area.max() <= np.prod(size)
    for found, theirs in zip((area, aspect), shapes_of(expected), strict=True):
        quantiles = np.linspace(0.05, 0.95, 19)
        span = np.quantile(theirs, 0.95) - np.quantile(theirs, 0.05)
        difference = np.quantile(found, quantiles) - np.quantile(theirs, quantiles)
        assert np.abs(difference).max() <= 0.05 * span + 1e-9
    centres, theirs = (each[:, :2] + each[:, 2:] for each in (boxes, expected))
    assert np.abs(centres.mean(0) - theirs.mean(0)).max() < 0.02 * max(size)
    assert np.abs(centres.std(0) - theirs.std(0)).max() < 0.02 * max(size)


def test_the_first_try_that_fits_is_taken():
    fits, too_wide = (0.5, 0.5, 0.25, 0.75), (0.999, 0.999, 0.0, 0.0)
    expected = area_box([fits])(200, 200)
    assert area_box([too_wide, fits, (0.1, 0.1, 0.1, 0.1)])(200, 200) == expected
    side = np.sqrt(200 * 200 * 0.54)
    left, top = 0.25 * (200 - side), 0.75 * (200 - side)
    assert expected == pytest.approx((left, top, left + side, top + side))


@pytest.mark.parametrize("size", [(900, 100), (100, 900)])
def test_the_middle_of_a_long_picture_is_taken(size):
    box = area_box([(0.999, 0.5, 0.0, 0.0)] * 10)(*size)
    long, short = (400 / 3, 100) if size[0] == 900 else (100, 400 / 3)
    assert (box[2] - box[0], box[3] - box[1]) == pytest.approx((long, short))
    assert (box[0] + box[2], box[1] + box[3]) == pytest.approx(size)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.gif"])
def test_a_crop_by_area_is_pillows(name, tmp_path):
    """Also where it is made larger: 8% of a small picture."""
    for width, height in ((500, 375), (120, 90), (33, 500)):
        textured(width, height).save(tmp_path / name, quality=90)
        draw = np.random.default_rng(7)
        for choose_box in (area_box(draw.random((10, 4))) for _ in range(6)):
            found = np.asarray(toolkit.crop_file(tmp_path / name, choose_box), np.int64)
            expected = whole_then_cut((tmp_path / name).read_bytes(), choose_box)
            assert np.abs(found - expected).max() <= 1
