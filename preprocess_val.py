"""Cuts ten crops from each validation picture. check_accuracy.py averages over them.

    python3 preprocess_val.py

resizes each picture to shorter side 256 and writes `<path_to_save>/val/X10_<index>.npy`, uint8
[10, 224, 224, 3]: top left, top right, bottom left, bottom right and centre, each followed by its
mirror image. It also writes `<path_to_save>/val/y.npy`, int64 [N]: the labels, -1 for a picture
that cannot be decoded. If started again, it continues where it stopped.
"""

import os.path
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -I leaves it out

import utils  # first: it says which package is missing
from utils import UserError, plural

# isort: split
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from preprocess import (
    CROP,
    SHORTER_SIDE,
    Failures,
    Pictures,
    map_pictures,
    output_root,
    resized_size,
    validation_pictures,
)

LABELS = "y.npy"
OURS = re.compile(r"X10_\d+\.npy|y\.npy")
CROP_FILE_BYTES = utils.array_file_size(np.uint8, (10, CROP, CROP, 3))


def main() -> None:
    parser = utils.Parser("Cuts the ten crops of each validation picture.", "preprocess_val.py")
    config = utils.load_config(parser.parse().config)
    pictures = validation_pictures(config)
    print(
        f"{plural(len(pictures), 'validation picture')} of "
        f"{plural(len(pictures.class_names), 'class')} in {pictures.folder}, {pictures.layout}"
    )
    folder = utils.make_folder(output_root(config) / "val")
    jobs = take_folder(folder, pictures)
    if jobs:
        needed = len(jobs) * CROP_FILE_BYTES
        print(f"the crops of {len(jobs):,} are still to be cut ({utils.file_size(needed)})")
        utils.check_room(folder, needed, "the crops need")
    labels = pictures.labels.astype(np.int64)
    failures = write_crops(pictures, folder, jobs, labels)
    os.sync()  # after a power failure, the labels must not exist without the crops
    utils.save_array(folder / LABELS, labels)
    write_note(folder, pictures, complete=True)
    print(
        f"ten crops of {plural(len(pictures) - len(failures), 'picture')} are in {folder}; "
        f"{failures}. check_accuracy.py will find them there"
    )


# --- the folder of the crops ------------------------------------------------------------------

NOTE = "crops.json"
LOCK = ".preprocess_val.lock"


@dataclass
class Note:
    """crops.json: of which pictures the crops are."""

    originals: str
    """The folder of the pictures."""
    fingerprint: str
    """Of the pictures and their labels: see `Pictures.fingerprint`."""
    complete: bool
    """Whether every picture that can be decoded has its crops, and y.npy is there."""
    class_names: list[str]


def take_folder(folder: Path, pictures: Pictures) -> list[int]:
    """Locks the folder. Returns the indices of the pictures whose crops are still to be cut.

    Removes the crops of pictures that have changed. Raises UserError if the folder holds the crops
    of another dataset, or files of these names that preprocess_val.py did not write.
    """
    note = utils.read_record(Note, folder / NOTE)
    old = sorted(path for path in folder.iterdir() if OURS.fullmatch(path.name))
    if old and not note:
        raise UserError(
            f"{old[0]}: preprocess_val.py did not write this file and would overwrite it; use "
            f"another path_to_save, or move the file"
        )
    changed = note and note.fingerprint != pictures.fingerprint
    if changed and note.originals != str(pictures.folder):
        raise UserError(
            f"{folder} holds the crops of another dataset, the pictures in {note.originals}; give "
            f"each dataset its own [preprocess] path_to_save, or remove {folder}"
        )
    refusal = f"{folder}: check_accuracy.py or preprocess_val.py uses it; wait until it ends"
    utils.lock(folder / LOCK, refusal)
    utils.remove_leftovers(folder)
    if changed:
        print(f"{folder}: removing {plural(len(old), 'file')} made from other pictures")
        for path in old:
            path.unlink(missing_ok=True)
    write_note(folder, pictures, complete=False)
    with os.scandir(folder) as entries:
        sizes = {entry.name: entry.stat(follow_symlinks=False).st_size for entry in entries}
    return [i for i in range(len(pictures)) if sizes.get(f"X10_{i}.npy") != CROP_FILE_BYTES]


def write_note(folder: Path, pictures: Pictures, complete: bool) -> None:
    originals, names = str(pictures.folder), list(pictures.class_names)
    utils.write_record(folder / NOTE, Note(originals, pictures.fingerprint, complete, names))


# --- cutting the crops ------------------------------------------------------------------------


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


def write_crops(pictures: Pictures, folder: Path, jobs: list[int], labels: np.ndarray) -> Failures:
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


# --- reading the crops ------------------------------------------------------------------------


class Crops:
    """The validation crops in a folder that `main` has filled."""

    def __init__(self, folder: Path, expected: int, count: int = 10):
        """`count`: 10, or 1 for the centre crop alone.

        Raises UserError if crops are missing, or if their number is not `expected` (0: any number).
        """
        self.folder, self.count = folder, count
        if (folder / LOCK).exists():  # without it, we might not be allowed to make it
            refusal = f"{folder}: preprocess_val.py is at work; wait until it ends"
            utils.lock(folder / LOCK, refusal, shared=True)
        note = utils.read_record(Note, folder / NOTE)
        if not (note and note.complete):
            raise UserError(f"{folder}: crops missing or incomplete; run preprocess_val.py first")
        self.names, self.classes = note.class_names, len(note.class_names)
        self.labels = read_labels(folder / LABELS, self.classes)
        """int64 [pictures]: -1 for a picture that could not be decoded."""
        if expected not in (0, len(self.labels)):
            raise UserError(
                f"[preprocess] N is {expected}, but {folder} holds the crops of "
                f"{plural(len(self.labels), 'picture')}"
            )
        self.indices = np.flatnonzero(self.labels >= 0)
        checksum = zlib.crc32(self.labels.tobytes(), zlib.crc32(note.fingerprint.encode()))
        self.fingerprint = f"{checksum:08x}"
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
        ten = np.empty((10, CROP, CROP, 3), np.uint8)
        for slot, index in enumerate(indices):
            path = self.folder / f"X10_{index}.npy"
            try:
                utils.read_array(path, ten)
            except (ValueError, FileNotFoundError):
                raise UserError(
                    f"{path}: missing or broken; remove it and run preprocess_val.py again"
                ) from None
            crops[slot] = ten if self.count == 10 else ten[8:9]
        return crops.reshape(-1, CROP, CROP, 3)


def read_labels(path: Path, classes: int) -> np.ndarray:
    """int64 [pictures], each label in [-1, classes). Raises UserError for any other content."""
    try:
        size = path.stat().st_size - utils.array_file_size(np.int64, (0,))
        labels = utils.read_array(path, np.empty(max(size, 0) // 8, np.int64))
        if labels.min() < -1 or not 0 <= labels.max() < classes:  # ValueError if there are none
            raise ValueError
    except (ValueError, FileNotFoundError):
        raise UserError(f"{path}: holds no labels; run preprocess_val.py again") from None
    return labels


if __name__ == "__main__":
    utils.run(main)
