"""Cuts ten crops from each validation picture. check_accuracy.py averages over them.

    python3 preprocess_val.py

resizes each picture to shorter side 256 and writes `<path_to_save>/val/X10_<index>.npy`, uint8
[10, 224, 224, 3]: top left, top right, bottom left, bottom right and centre, each followed by its
mirror image. It also writes `<path_to_save>/val/y.npy`, int64 [N]: the labels, -1 for a picture
that cannot be decoded. If started again, it continues where it stopped.
"""

import contextlib
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import utils
from utils import CROP, UserError, plural

import numpy as np
from PIL import Image

from preprocess import Failures, Pictures, map_pictures, resized_size, validation_pictures

SHORTER_SIDE = 256
CROP_FILE_BYTES = utils.array_file_size(np.uint8, (10, CROP, CROP, 3))


def main() -> None:
    parser = utils.Parser("Cuts the ten crops of each validation picture.", "preprocess_val.py")
    config = utils.load_config(parser.parse().config)
    pictures = validation_pictures(config)
    folder = utils.make_folder(config.preprocess.path_to_save / "val")
    jobs = missing(pictures, folder)
    needed = len(jobs) * CROP_FILE_BYTES
    print(
        f"{plural(len(pictures), 'validation picture')} of "
        f"{plural(len(pictures.class_names), 'class')}, {pictures.layout}; "
        f"the crops of {len(jobs):,} are still to be cut ({utils.file_size(needed)})"
    )
    utils.check_room(folder, needed, "the crops need")
    labels = pictures.labels.astype(np.int64)
    failures = write_all(pictures, folder, jobs, labels)
    if jobs:
        os.sync()  # after a power failure, y.npy must not exist without the crops
    utils.write_lines(folder / utils.CLASS_NAMES, pictures.class_names)
    utils.save_array(folder / "y.npy", labels)
    print(
        f"ten crops of {plural(len(pictures) - len(failures), 'picture')} are in {folder}; "
        f"{failures}. check_accuracy.py will find them there"
    )


LOCK = ".preprocess_val.lock"
LISTING = "pictures.txt"
"""File next to the crops: size and name of each original picture, one per line."""


def missing(pictures: Pictures, folder: Path) -> list[int]:
    """Indices of the pictures whose crops are still to be cut. Locks the folder if there are any.

    Removes the crops if the dataset has changed, and half-written files of killed processes. Raises
    UserError if the folder has the crops of another dataset, or files with these names that the
    toolkit did not write.
    """
    listing = folder / LISTING
    old = [n for n in os.listdir(folder) if re.fullmatch(r"X10_\d+\.npy|y\.npy", n)]
    check_own(folder, [*old, utils.CLASS_NAMES, LISTING])
    utils.remove_leftovers(folder)
    lines = [f"{_size(pictures.path(i))} {path!r}\n" for i, path in enumerate(pictures.paths)]
    before = listing.read_bytes().decode(errors="replace") if listing.is_file() else ""
    with os.scandir(folder) as entries:
        done = {entry.name for entry in entries if entry.stat().st_size == CROP_FILE_BYTES}
    if changed := before != "".join(lines):
        done = set()
    jobs = [index for index in range(len(pictures)) if f"X10_{index}.npy" not in done]
    if jobs:
        hold(
            folder, f"{folder}: check_accuracy.py or preprocess_val.py uses it; wait until it ends"
        )
    if changed:
        if old:
            check_same_dataset(folder, before.splitlines(), lines)
            print(f"{folder}: removing {plural(len(old), 'file')} made from other pictures")
        for name in old:
            (folder / name).unlink(missing_ok=True)
        utils.write_text(listing, "".join(lines))
    return jobs


def hold(folder: Path, refusal: str, shared: bool = False) -> None:
    """Locks the folder's crops, if its file system supports locks."""
    with contextlib.suppress(utils.NoLocks):
        utils.lock(folder / LOCK, refusal, shared)


def check_own(folder: Path, names: list[str]) -> None:
    """Raises UserError if one of these files exists but preprocess_val.py did not write it."""
    listing = folder / LISTING
    if listing.is_file():
        with open(listing, "rb") as file:
            if re.fullmatch(rb"-?\d+ ['\"].*['\"]\n", file.readline()):
                return
    for name in names:
        if os.path.lexists(folder / name):
            raise UserError(
                f"{folder / name}: preprocess_val.py did not write this file and would overwrite "
                f"it; use another path_to_save, or move the file"
            )


def check_same_dataset(folder: Path, before: list[str], now: list[str]) -> None:
    """Raises UserError if none of the pictures listed before is listed now.

    Pictures may have been moved to other folders, or replaced under their old names.
    """

    def keys(lines: list[str]) -> Iterator[object]:
        for line in lines:
            size, _, path = line.strip().partition(" ")
            yield path
            yield size, path.strip("'\"").split("/")[-1]

    if set(keys(before)).isdisjoint(keys(now)):
        raise UserError(
            f"{folder} holds the crops of another dataset, such as those of "
            f"{before[0].partition(' ')[2]}; give each dataset its own [preprocess] path_to_save, "
            f"or remove that folder"
        )


def _size(path: str) -> int:
    """File size in bytes; -1 if there is no such file. Distinguishes pictures of the same name."""
    try:
        return utils.patiently(os.stat, path).st_size
    except (FileNotFoundError, NotADirectoryError):
        return -1


def ten_crops(image: Image.Image) -> np.ndarray:
    """uint8 [10, 224, 224, 3]: corners and centre of an RGB picture, each with its mirror image."""
    size = resized_size(*image.size, SHORTER_SIDE)
    resized = image.resize(size, Image.Resampling.BILINEAR)
    # Mirror the whole picture with Pillow: NumPy takes three times as long for 3-byte pixels.
    picture = np.asarray(resized)
    mirror = np.asarray(resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    right, bottom = size[0] - CROP, size[1] - CROP
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)]
    crops = np.empty((10, CROP, CROP, 3), np.uint8)
    for i, (y, x) in enumerate(corners):
        crops[2 * i] = picture[y : y + CROP, x : x + CROP]
        crops[2 * i + 1] = mirror[y : y + CROP, right - x : right - x + CROP]
    return crops


def write_all(pictures: Pictures, folder: Path, jobs: list[int], labels: np.ndarray) -> Failures:
    """Cuts the crops of the pictures in `jobs`. Sets the labels of those that fail to -1."""
    failures = Failures(len(pictures))

    def write(index: int, image: Image.Image) -> bool:
        utils.save_array(folder / f"X10_{index}.npy", ten_crops(image))
        return True

    written = map_pictures(pictures, jobs, pictures.decoded, write, failures)
    for index, is_written in zip(jobs, written, strict=True):
        if not is_written:
            labels[index] = -1
    return failures


# --- reading the crops -----------------------------------------------------------------------


class Crops:
    """The validation crops in a folder that `main` has filled."""

    def __init__(self, folder: Path, expected: int, count: int = 10):
        """`count`: 10, or 1 for the centre crop alone.

        Raises UserError if files are missing, or if their number is not `expected` (0: any number).
        """
        self.folder, self.count = folder, count
        file = folder / "y.npy"
        if (folder / LOCK).exists():
            hold(folder, f"{folder}: preprocess_val.py is at work; wait until it ends", shared=True)
        try:
            with open(file, "rb") as content:
                self.labels = np.lib.format.read_array(content, allow_pickle=False)
        except FileNotFoundError:
            raise UserError(f"{file}: no such file; run preprocess_val.py first") from None
        except ValueError as error:
            raise UserError(f"{file}: {error}; run preprocess_val.py again") from None
        if self.labels.dtype != np.int64 or self.labels.ndim != 1:
            raise UserError(f"{file}: holds no labels; run preprocess_val.py again")
        if expected not in (0, len(self.labels)):
            raise UserError(
                f"[preprocess] N is {expected}, but {folder} holds the crops of "
                f"{len(self.labels)} pictures"
            )
        self.indices = np.flatnonzero(self.labels >= 0)
        there = set(os.listdir(folder))
        if absent := [i for i in self.indices if f"X10_{i}.npy" not in there]:
            raise UserError(
                f"{folder / f'X10_{absent[0]}.npy'}: no such file; the crops of "
                f"{plural(len(absent), 'picture')} are missing; run preprocess_val.py again"
            )
        if not len(self.indices):
            raise UserError(f"{folder}: no pictures to evaluate; run preprocess_val.py")
        self.classes = int(self.labels.max()) + 1
        self.names = utils.read_lines(folder / utils.CLASS_NAMES)
        listing = folder / LISTING
        pictures = utils.read_file(listing) if listing.is_file() else b""
        self.fingerprint = f"{zlib.crc32(pictures, zlib.crc32(self.labels.tobytes())):08x}"
        """Changes with the pictures and their labels."""

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def centre(self) -> int:
        """Index of the centre crop among the `count` crops. Of ten, its mirror image comes next."""
        return 8 if self.count == 10 else 0

    def load(self, indices: np.ndarray) -> np.ndarray:
        """uint8 [count * len(indices), 224, 224, 3]. Raises UserError for a broken file."""
        crops = np.empty((len(indices), self.count, CROP, CROP, 3), np.uint8)
        for slot, index in enumerate(indices):
            path = self.folder / f"X10_{index}.npy"
            try:
                ten = utils.load_array(path, np.uint8, (10, CROP, CROP, 3))
            except (ValueError, FileNotFoundError):
                raise UserError(
                    f"{path}: broken; remove it and run preprocess_val.py again"
                ) from None
            crops[slot] = ten if self.count == 10 else ten[8:9]
        return crops.reshape(-1, CROP, CROP, 3)


if __name__ == "__main__":
    utils.run(main)
