"""Makes resized copies of all training pictures, for machines that cannot feed their GPU otherwise.

    python3 preprocess.py --shorter_side=256

writes `<path_to_save>/256/<path of the original below the training folder>`: shorter side 256
pixels, aspect kept, JPEG. `--shorter_side=all` makes the 33 sides 256, 263, … 480 and decodes each
original once. Started again, it continues where it stopped. You may skip it:
runtime_preprocessing.py then works from the originals. README says when copies help.

Other scripts import what stands here about pictures, in this order: the list of pictures and how
to work through it, dataset layouts, reading and decoding, cutting a crop, resized copies.
"""

import argparse
import contextlib
import csv
import errno
import functools
import io
import json
import os
import re
import shlex
import struct
import threading
import warnings
import zlib
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import utils
from utils import CROP, UserError, plural

import numpy as np
from PIL import Image, UnidentifiedImageError

SIDES = range(256, 481, 7)
"""The 33 shorter sides that training pictures are resized to: 256, 263, … 480 pixels."""


def main() -> None:
    args = parse_arguments()
    config = utils.load_config(args.config)
    pictures = training_pictures(config)
    root = utils.make_folder(config.preprocess.path_to_save)
    claim(root, pictures, args.shorter_side)
    utils.lock(
        root / COPIES_OF,
        f"{root}: another preprocess.py adds to the copies there, or runtime_preprocessing.py "
        f"makes batches from them; wait for its end or take another path_to_save",
    )
    folders = {side: root / str(side) for side in args.shorter_side}
    wanted = missing(pictures, folders)
    total = sum(int((wanted >> np.uint64(bit) & np.uint64(1)).sum()) for bit in range(len(folders)))
    print(
        f"{plural(len(pictures), 'training picture')}, {pictures.layout}; {total:,} of "
        f"{len(pictures) * len(folders):,} resized copies are still to be made"
    )
    failures = Failures(len(pictures))
    if total:
        say_room(pictures, folders, wanted, total)
        note_copies(root, folders, pictures, complete=False)
        write_all(pictures, folders, wanted, failures)
        os.sync()  # the note below must not survive a power failure that the copies do not
    note_copies(root, folders, pictures, complete=True)
    print(
        f"resized copies of {plural(len(pictures) - len(failures), 'picture')} in "
        f"{plural(len(folders), 'shorter side')} are in {root}; {failures}. "
        f"Next: runtime_preprocessing.py finds them there"
    )


def parse_arguments() -> argparse.Namespace:
    parser = utils.Parser(
        "Makes resized copies of all training pictures.",
        "preprocess.py --shorter_side=256",
    )
    parser.add_argument(
        "--shorter_side",
        type=sides,
        required=True,
        metavar="S",
        help="shorter side in pixels, one of 256, 263, … 480, or all",
    )
    return parser.parse()


def sides(text: str) -> list[int]:
    """Argument type: one side, or "all"."""
    if text == "all":
        return list(SIDES)
    side = utils.whole(1)(text)
    if side not in SIDES:
        raise argparse.ArgumentTypeError(f"expected all or one of {', '.join(map(str, SIDES))}")
    return [side]


# --- the list of pictures -------------------------------------------------------------------


class Paths(Sequence[str]):
    """The paths of all pictures, as one block of bytes.

    As Python strings, the paths of ImageNet take 150 MB, in each process: to read a string is to
    change its reference count, so forked processes soon have a copy of their own.
    """

    def __init__(self, paths: Iterable[str]):
        block, ends = bytearray(), array("q", [0])
        for path in paths:
            block += os.fsencode(path)
            ends.append(len(block))
        self._block, self._ends = bytes(block), np.array(ends, np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return os.fsdecode(self._block[self._ends[index] : self._ends[index + 1]])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def checksum(self) -> int:
        return zlib.crc32(self._ends.tobytes(), zlib.crc32(self._block))


@dataclass(frozen=True)
class Pictures:
    """The pictures of the training or of the validation set, in a fixed order."""

    folder: Path
    paths: Paths
    """Relative to `folder`."""
    labels: np.ndarray
    """int32 [len(paths)]: the rank of the class in sorted order."""
    class_names: list[str]
    """Readable where the dataset comes with names, else the names of the class folders."""
    layout: str

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        return f"{self.folder}/{self.paths[index]}"

    @functools.cached_property
    def fingerprint(self) -> str:
        """Two checksums: of all names and labels, and of what is in the files.

        The first changes when a picture is added, removed, renamed or moved to another class. The
        second changes when pictures are replaced under their old names. It covers the sizes and
        first bytes of SAMPLED pictures, spread evenly; all would take minutes from a cold disk.
        """
        names = zlib.crc32(self.labels.tobytes(), self.paths.checksum())
        count = min(len(self), SAMPLED)
        sample = np.linspace(0, len(self) - 1, count).astype(int).tolist() if count else []

        def look(index: int) -> bytes:
            try:
                return unless_gone(beginning, self.folder, self.path(index))
            except MissingPicture:
                return b""

        with ThreadPoolExecutor(16) as pool:  # so that a slow disk may work on many at once
            beginnings = pool.map(look, sample)
            return f"{names:08x}-{zlib.crc32(b''.join(beginnings)):08x}"


SAMPLED = 2000
"""Pictures whose content is looked at to notice that they were replaced."""


def beginning(path: str, count: int = 1024) -> bytes:
    """A file's size and first bytes. Raises MissingPicture."""

    def read(path: str) -> bytes:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe must not block
        with open(descriptor, "rb", buffering=0) as file:
            return struct.pack("<q", os.fstat(descriptor).st_size) + (file.read(count) or b"")

    try:
        return utils.patiently(read, path)
    except OSError as error:
        if error.errno in NO_FILE:
            raise MissingPicture(os.strerror(error.errno).lower()) from None
        raise


class BrokenPicture(Exception):
    """A picture that is missing or cannot be decoded. The message says why, for people."""


class MissingPicture(BrokenPicture):
    """There is no such file."""


def unless_gone(work: Callable, folder: str | Path, picture: Any) -> Any:
    """`work(picture)`. A file that is missing is looked for again once `folder` is there.

    So a disk that is not mounted for a moment breaks no picture. Raises UserError if it stays away.
    """
    try:
        return work(picture)
    except MissingPicture:
        utils.patiently(_look_for, folder)
        return work(picture)


def _look_for(folder: str | Path) -> None:
    if not os.path.isdir(folder):
        raise OSError(errno.ESTALE, "no such folder")


class Failures:
    """Names each broken picture once, and counts them. Safe to use from threads."""

    def __init__(self, pictures: int):
        """`pictures` is the size of the set: more than 1 in 100 of it may not fail."""
        self.allowed = max(1, pictures // 100)
        self.pictures = pictures
        self.paths: set[str] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.paths)

    def add(self, path: str, error: BrokenPicture) -> None:
        """Raises UserError when too many have failed."""
        with self._lock:
            if path in self.paths:
                return
            self.paths.add(path)
            utils.warn(f"{path}: left out, {error}")
            if len(self.paths) > self.allowed or len(self.paths) == self.pictures:
                raise UserError(
                    f"{len(self.paths)} of {self.pictures} pictures could not be decoded, more "
                    f"than 1 in 100; the last was {path}. Replace those warned of, or remove them"
                )

    def __str__(self) -> str:
        return "all could be decoded" if not self.paths else f"{len(self)} could not be decoded"


def map_pictures(
    pictures: Pictures, indices: Sequence[int], load: Callable, work: Callable, failures: Failures
) -> Iterator:
    """`work(index, load(index))` for these pictures on all cores, results in order, with progress.

    `load` reads and decodes. A picture that it finds broken is added to `failures` and its result
    is None.
    """

    def each(index: int) -> object:
        try:
            loaded = unless_gone(load, pictures.folder, index)
        except BrokenPicture as error:
            failures.add(pictures.paths[index], error)
            return None
        return work(index, loaded)

    progress = utils.Progress(len(indices), "pictures")
    # More threads than cores: some of them wait for the disk.
    for result in utils.map_in_order(each, map(int, indices), 2 * utils.cores() + 4):
        progress.add()
        yield result


# --- dataset layouts ------------------------------------------------------------------------

PICTURE_SUFFIXES = (
    ".jpeg", ".jpg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jfif", ".jpe", ".jif",
    ".mpo", ".dib", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k",
)  # fmt: skip
"""Files that count as pictures. Their format is found by content, whatever the suffix."""

VALIDATION = ("val", "valid", "validation", "test")
"""What the folder of the validation set may be called, and its list file."""


def training_pictures(config: SimpleNamespace) -> Pictures:
    """Finds the training set below `ImageNet_folder`. Raises UserError."""
    root = _dataset_root(config.preprocess.ImageNet_folder)
    pictures = _listed(root, "train") if _has_lists(root) else _in_class_folders(root, "train")
    if _validation_part(root) is None:
        layout = f"{pictures.layout}, no validation set: nothing can be evaluated"
        pictures = replace(pictures, layout=layout)
    return _counted(pictures, "train", config.train.N)


def validation_pictures(config: SimpleNamespace) -> Pictures:
    """Finds the validation set below `ImageNet_folder`, labelled like the training set.

    Raises UserError, also where only the devkit's ground truth is there.
    """
    root = _dataset_root(config.preprocess.ImageNet_folder)
    part = _validation_part(root)
    if part is None:
        suffix = ".txt" if _has_lists(root) else "/"
        raise UserError(
            f"{root}: no validation set, found none of "
            f"{', '.join(name + suffix for name in VALIDATION)}; training works without one, but "
            f"nothing can be evaluated"
        )
    if _has_lists(root):
        pictures = _listed(root, part)
    else:
        classes = _subfolders(root / "train")
        in_folders = _subfolders(root / part)
        pictures = (
            _in_class_folders(root, part, classes)
            if in_folders
            else _flat_validation(root, root / part, classes)
        )
    return _counted(pictures, "preprocess", config.preprocess.N)


def _validation_part(root: Path) -> str | None:
    """The name of the validation set's list or folder; None if there is none."""
    if _has_lists(root):
        found = (name for name in VALIDATION if (root / f"{name}.txt").is_file())
    else:
        found = (name for name in VALIDATION if (root / name).is_dir())
    return next(found, None)


def _counted(pictures: Pictures, section: str, expected: int) -> Pictures:
    if not len(pictures):
        raise UserError(
            f"{pictures.folder}: no pictures found; expected class folders with "
            f"{', '.join(PICTURE_SUFFIXES)} files in them; {_content(pictures.folder)}"
        )
    if expected not in (0, len(pictures)):
        raise UserError(
            f"[{section}] N is {expected}, but {pictures.folder} holds {len(pictures)} pictures; "
            f"correct one of them, or set N = 0 to take what is found"
        )
    names = pictures.class_names
    counts = np.bincount(pictures.labels, minlength=len(names))
    if len(empty := np.flatnonzero(counts == 0)):
        utils.warn(
            f"{pictures.folder}: no pictures of {plural(len(empty), 'class')} of "
            f"{len(names):,} (labels count from 0), the first is {names[empty[0]]}"
        )
    return pictures


BELOW = (".", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
"""Where train/ and the lists may lie in a dataset's folder; Kaggle's tree is deep."""


def _dataset_root(folder: Path) -> Path:
    """The folder that holds train/ (or the lists)."""
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; [preprocess] ImageNet_folder must name the one that holds "
            f"train and val"
        )
    if root := _root_in(folder):
        return root
    near = [*list(folder.parents)[:2], *(folder / name for name in _subfolders(folder)[:1000])]
    meant = next((other for other in near if _root_in(other)), None)
    raise UserError(
        f"[preprocess] ImageNet_folder {folder}: found neither train/<class>/ nor "
        f"ILSVRC/Data/CLS-LOC/train/<class>/ nor train.txt in it; "
        + (f"did you mean {meant}?" if meant else _content(folder))
    )


def _root_in(folder: Path) -> Path | None:
    roots = (folder / below for below in BELOW)
    return next((root for root in roots if (root / "train").is_dir() or _has_lists(root)), None)


def _has_lists(root: Path) -> bool:
    """Whether train.txt lists the pictures.

    Beside class folders a text file may be anything, except that val.txt always is a list.
    """

    def has_classes(part: str) -> bool:
        return (root / part).is_dir() and bool(_subfolders(root / part))

    if not (root / "train.txt").is_file():
        return False
    listed = [name for name in VALIDATION if (root / f"{name}.txt").is_file()]
    if "val" in listed or any(not has_classes(name) for name in listed):
        return True
    if (root / "2012_train").is_dir():
        return True
    return (root / "train").is_dir() and not has_classes("train")


UNPACK_CLASSES = 'for f in *.tar; do mkdir -p "${f%.tar}" && tar -xf "$f" -C "${f%.tar}"; done'

ARCHIVES = {
    r"n\d{8}\.tar": f"ImageNet's classes, each still in its archive; unpack them: "
    f"cd FOLDER && {UNPACK_CLASSES}",
    r"ILSVRC2012_img_train.*\.tar": f"ImageNet's training pictures; unpack them: "
    f"cd FOLDER && mkdir -p train && tar -xf NAME -C train && cd train && {UNPACK_CLASSES}",
    r"ILSVRC2012_img_val\.tar": "ImageNet's validation pictures; unpack them: cd FOLDER && "
    "mkdir -p val && tar -xf NAME -C val, and put Kaggle's LOC_val_solution.csv beside",
    r".*\d{4}\.tar": "probably WebDataset shards, which are not read; unpack them and move each "
    "picture into train/<class>/, named by the .cls file beside it",
    r".*\.(tar|tar\.\w+|tgz|tbz2|txz|zip|rar|7z)": "an archive; unpack it, so that train/<class>/ "
    "holds the pictures",
    r".*\.(parquet|arrow)": "pictures in a table, which is not read; write each to "
    'train/<class>/ (Python: datasets.load_dataset("parquet", data_files=…), then image.save)',
    r".*\.tfrecords?|.*-of-\d{5}": "TFRecord files, which are not read; write each picture to "
    "train/<class>/ (Python: tf.data.TFRecordDataset and tf.train.Example)",
    r".*\.(h5|hdf5|lmdb|mdb|rec|beton|npz|pkl)": "made for another program and not read; write "
    "each picture to train/<class>/",
}
"""What people have instead of folders of pictures: pattern of the name, and the way out."""


def _content(folder: Path) -> str:
    """What lies in a folder that is no dataset, and what to do about it."""
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    for pattern, way_out in ARCHIVES.items():
        found = [name for name in names if re.fullmatch(pattern, name, re.IGNORECASE)]
        if found:
            others = f" and {plural(len(found) - 1, 'other')} are" if len(found) > 1 else " is"
            way_out = way_out.replace("FOLDER", shlex.quote(str(folder)))
            return f"{folder / found[0]}{others} {way_out.replace('NAME', shlex.quote(found[0]))}"
    if any(name.lower().endswith(PICTURE_SUFFIXES) for name in names):
        return "its pictures are not in class folders: move each into a folder of its class"
    with contextlib.suppress(OSError):  # it is only a hint
        below = [name for each in _subfolders(folder)[:3] for name in os.listdir(folder / each)]
        if any(name.lower().endswith(PICTURE_SUFFIXES) for name in below):
            return f"its folders look like classes: move them into {folder / 'train'}"
    more = f" and {plural(len(names) - 8, 'other')}" if len(names) > 8 else ""
    return f"it holds {', '.join(names[:8])}{more}" if names else "it is empty"


def _near(root: Path, *names: str) -> Path | None:
    """The first of these files in the folder, or in the three above it (Kaggle's root)."""
    for folder in (root, *list(root.resolve().parents)[:3]):
        for name in names:
            if (folder / name).is_file():
                return folder / name
    return None


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        folders = [
            e.name
            for e in entries
            if not e.is_file(follow_symlinks=False) and os.path.isdir(e.path)
        ]
    return sorted(name for name in folders if not name.startswith("."))


def _in_class_folders(root: Path, part: str, classes: list[str] | None = None) -> Pictures:
    """`root/part/<class>/**`, the classes numbered by their rank in `classes`, or in this part."""
    folder = root / part
    found = set(_subfolders(folder))
    classes = sorted(found) if classes is None else classes
    if unknown := sorted(found - set(classes)):
        raise UserError(
            f"{folder / unknown[0]}: a class that the training set does not have "
            f"({len(unknown)} such); validation needs the class folders of {root / 'train'}"
        )
    counts, left_out = [], LeftOut()

    def paths() -> Iterator[str]:
        for name in classes:
            in_class = _picture_files(folder, name, left_out) if name in found else []
            counts.append(len(in_class))
            yield from in_class

    all_paths = Paths(paths())
    for name in os.listdir(folder):
        if name not in found and not name.startswith("."):
            left_out.see(folder / name, even_usual=True)
    left_out.warn(folder)
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), np.array(counts, int))
    layout = "Kaggle layout" if root.parts[-2:] == ("Data", "CLS-LOC") else "class folders"
    return Pictures(folder, all_paths, labels, _readable(root, classes), layout)


class LeftOut:
    """Counts the files that are not used although they are pictures."""

    SUFFIXES = (".heic", ".heif", ".avif", ".jxl", ".tga", ".psd", ".svg", ".dng", ".cr2", ".nef")
    BEGINNING = re.compile(
        rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP|II\*\0|MM\0\*|\0\0\0\x0cjP", re.DOTALL
    )

    def __init__(self):
        self.count, self.first, self._looks = 0, "", 1000

    def see(self, path: str | Path, even_usual: bool = False) -> None:
        """A file that is not used. Looks into 1,000 of those whose suffix does not tell."""
        suffix = os.path.splitext(path)[1].lower()
        is_picture = suffix in self.SUFFIXES or (even_usual and suffix in PICTURE_SUFFIXES)
        if not is_picture and self._looks and suffix not in PICTURE_SUFFIXES:
            self._looks -= 1
            with contextlib.suppress(OSError, MissingPicture):  # it is not needed
                is_picture = self.BEGINNING.match(beginning(str(path)), 8) is not None
        if is_picture:
            self.count += 1
            self.first = self.first or str(path)

    def warn(self, folder: Path) -> None:
        if self.count:
            utils.warn(
                f"{folder}: {plural(self.count, 'picture')} not used, the first is {self.first}; "
                f"used are those in class folders with the suffixes {', '.join(PICTURE_SUFFIXES)}"
            )


def _fail(error: OSError) -> None:
    raise error


def _picture_files(folder: Path, below: str, left_out: LeftOut) -> list[str]:
    """Relative paths of the pictures in folder/below and its subfolders, sorted, without hidden
    ones.

    Links to folders are not followed further down, so that a loop of links cannot trap.
    """
    found = []
    for parent, folders, files in os.walk(folder / below, onerror=_fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = os.path.relpath(parent, folder)
        for name in files:
            if name.startswith("."):
                continue
            if name.lower().endswith(PICTURE_SUFFIXES):
                found.append(f"{relative}/{name}")
            else:
                left_out.see(f"{parent}/{name}")
    return sorted(found)


def _lines_of(file: Path | None) -> list[str]:
    return file.read_text(encoding="utf-8", errors="replace").splitlines() if file else []


def _readable(root: Path, classes: list[str]) -> list[str]:
    """Names of the classes from LOC_synset_mapping.txt or synset_words.txt, where there is one."""
    lines = _lines_of(_near(root, "LOC_synset_mapping.txt", "synset_words.txt"))
    names = dict(line.split(maxsplit=1) for line in lines if len(line.split(maxsplit=1)) == 2)
    return [names.get(name, name) for name in classes]


def _flat_validation(root: Path, folder: Path, classes: list[str]) -> Pictures:
    """All pictures in val/ itself, their classes in Kaggle's LOC_val_solution.csv."""
    names = sorted(
        name
        for name in os.listdir(folder)
        if name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith(".")
    )
    solution = _near(root, "LOC_val_solution.csv")
    if solution is None:
        raise UserError(f"{folder}: {_why_no_classes(root, folder, names)}")
    with open(solution, newline="", encoding="utf-8", errors="replace") as file:
        rows = [row for row in csv.reader(file) if len(row) == 2 and row[1].strip()]
    wnids = {name: answer.split()[0] for name, answer in rows}
    ranks = {name: rank for rank, name in enumerate(classes)}
    for name in names:
        if ranks.get(wnids.get(Path(name).stem)) is None:
            raise UserError(
                f"{folder / name}: {solution} gives it no class that {root / 'train'} has"
            )
    labels = np.array([ranks[wnids[Path(name).stem]] for name in names], np.int32)
    return Pictures(folder, Paths(names), labels, _readable(root, classes), "Kaggle layout")


def _why_no_classes(root: Path, folder: Path, names: list[str]) -> str:
    """Why the classes of a flat validation set are not known, and what to do."""
    if not names:
        return f"no pictures found; {_content(folder)}"
    truth = _near(root, "ILSVRC2012_validation_ground_truth.txt") or next(
        iter(root.glob("*devkit*/**/ILSVRC2012_validation_ground_truth.txt")), None
    )
    why = (
        f"and {truth} does not help, because it numbers the classes in the devkit's own order, "
        f"not in sorted order"
        if truth
        else "and nothing says which class they belong to"
    )
    return (
        f"its pictures are not in class folders, {why}; put Kaggle's LOC_val_solution.csv into "
        f"{root}, or move the pictures into {folder}/<class>/ (for ImageNet the script valprep.sh "
        f"of soumith/imagenetloader.torch, run in {folder}, does it)"
    )


def _listed(root: Path, part: str) -> Pictures:
    """`train.txt` or `val.txt`: a line `filename label` for each picture."""
    near = [root / f"2012_{part}", root / f"2012_{part[:3]}", root / part]
    folder = next((each for each in near if each.is_dir()), None)
    if folder is None:
        raise UserError(
            f"{near[-1]}: no such folder; {root / part}.txt lists pictures that must lie there, or "
            f"in 2012_{part}/"
        )
    train, labels = _read_list(root / "train.txt")
    classes = 1 + int(labels.max())
    names = _names_of_labels(root, train, labels, classes)
    listed = {"train": (train, labels)}
    if validation := _validation_part(root):
        listed[validation] = _read_list(root / f"{validation}.txt")
        paths, val_labels = listed[validation]
        if len(beyond := np.flatnonzero(val_labels >= classes)):
            raise UserError(
                f"{root / validation}.txt: {paths[beyond[0]]} has label {val_labels[beyond[0]]}, "
                f"but the labels of {root / 'train.txt'} end with {classes - 1}"
            )
    return Pictures(folder, *listed[part], names, "list files")


def _names_of_labels(root: Path, train: Paths, labels: np.ndarray, classes: int) -> list[str]:
    """From the file with a line per class, else the folders in the list, else the labels."""
    lines = _lines_of(_near(root, "LOC_synset_mapping.txt", "synset_words.txt"))
    names = [line.split(maxsplit=1)[-1] for line in lines if line.strip()]
    if len(names) == classes:
        return names
    folders = dict(zip(labels.tolist(), map(os.path.dirname, train), strict=True))
    if len(folders) == len(set(folders.values())) == classes:
        return [folders[label] for label in range(classes)]
    return [str(label) for label in range(classes)]


def _read_list(file: Path) -> tuple[Paths, np.ndarray]:
    """The paths and labels, int32, in a file of `filename label` lines. Raises UserError."""
    labels = array("i")

    def paths() -> Iterator[str]:
        with open(file, "rb") as lines:
            for number, line in enumerate(map(os.fsdecode, lines), 1):
                if not line.strip():
                    continue
                match = re.fullmatch(r"\s*([^\0]*\S)\s+([0-9]{1,6})\s*", line)
                if not match:
                    raise UserError(
                        f"{file}: line {number}: expected 'filename label', not {line.rstrip()!r}"
                    )
                path, label = match.groups()
                if os.path.isabs(path) or ".." in Path(path).parts:
                    raise UserError(
                        f"{file}: line {number}: {path} lies outside the folder of pictures"
                    )
                labels.append(int(label))
                yield path

    listed = Paths(paths())
    if not len(listed):
        raise UserError(f"{file}: lists no pictures; expected 'filename label' lines")
    return listed, np.array(labels, np.int32)


# --- reading and decoding a picture ---------------------------------------------------------

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000")

LONGEST = 100
"""The longer side of a picture may be this many times the shorter. Beyond that a copy of 480 pixels
would not fit into a JPEG file (65,535 pixels), and hardly into memory."""

NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO)
"""Errors of reading that say what the path is, not what the storage does."""

PILLOW_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, ArithmeticError,
    struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip
"""What Pillow raises for broken files of its formats; caught around calls of Pillow alone."""

SPARE_MEMORY = 1 << 26
"""Bytes that must be free before a failure to decode is blamed on the picture."""

# Broken EXIF data does not matter here; a picture of over 89 million pixels is refused.
warnings.filterwarnings("ignore", module="PIL")
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def read_picture(path: str | Path) -> bytes:
    """A picture's file. Raises MissingPicture if there is no such file.

    Other OSErrors pass: the storage fails, and says nothing about the picture.
    """
    try:
        return utils.read_file(path)
    except OSError as error:
        if error.errno in NO_FILE:
            raise MissingPicture(os.strerror(error.errno).lower()) from None
        error.filename = error.filename or os.fspath(path)
        raise


@contextlib.contextmanager
def pillow_decodes() -> Iterator[None]:
    """Turns what Pillow raises for a broken file into BrokenPicture.

    Only calls of Pillow go inside. Elsewhere such an error is a mistake of ours and must surface.
    """
    try:
        yield
    except UnidentifiedImageError:
        raise BrokenPicture(f"cannot be decoded: is none of {', '.join(FORMATS)}") from None
    except PILLOW_ERRORS as error:
        # Decoders say "broken data" also when memory runs out. Then this raises MemoryError.
        np.empty(SPARE_MEMORY, np.uint8)
        reason = str(error) or type(error).__name__
        raise BrokenPicture(f"cannot be decoded: {reason}") from error


def decode(content: bytes) -> Image.Image:
    """The picture in a file's content, 8-bit RGB. EXIF orientation is ignored, as other loaders do.

    Raises BrokenPicture for what is no picture or of a shape beyond use.
    """
    return decode_reduced(content, None)[0]


def decode_reduced(content: bytes, side: int | None) -> tuple[Image.Image, tuple, tuple]:
    """The same, but a large JPEG is reduced while it is decoded, to not less than twice `side`.

    Twice the pixels needed are enough to resize from. Returns the picture, its original size, and
    the box within the decoded pixels that the original fills.
    """
    with pillow_decodes():
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    if not size_is_fit(*image.size):
        raise BrokenPicture(
            f"cannot be used: {image.width}×{image.height} pixels is too long and thin"
        )
    size = image.size
    least = resized_size(*size, 2 * side) if side else size
    with pillow_decodes():
        reduced = image.draft(image.mode, least)
        image.load()
    return as_rgb(image), size, reduced[1] if reduced else (0, 0, *image.size)


def size_is_fit(width: int, height: int) -> bool:
    """Whether a picture has pixels, no more than Pillow allows, and is not too long and thin."""
    shorter, longer = min(width, height), max(width, height)
    return 0 < longer <= LONGEST * shorter and width * height <= Image.MAX_IMAGE_PIXELS


def as_rgb(image: Image.Image) -> Image.Image:
    """A decoded picture as 8-bit RGB: grey, palette, CMYK, 16-bit and transparent ones too."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip, not scale
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255)
        image = Image.fromarray(grey.astype(np.uint8))
    with pillow_decodes():
        return image.convert("RGB")


def resized_size(width: int, height: int, side: int) -> tuple[int, int]:
    """Width and height after resizing the shorter side to `side`, aspect kept, in pixels."""
    shorter = min(width, height)
    return round(width * side / shorter), round(height * side / shorter)


# --- cutting a crop from a picture ----------------------------------------------------------


def crop_file(path: str | Path, side: int, corner: Sequence[float]) -> Image.Image:
    """Steps 1 to 3: the 224x224 RGB crop that lies at `corner` once the shorter side is `side`.

    `corner`: two numbers in [0, 1), where between left and right, between top and bottom. To resize
    the crop's window alone gives what resizing all and cutting gives, at a fraction of the cost.
    Raises BrokenPicture, and OSError if the storage fails.
    """
    content = read_picture(path)
    return crop_jpeg(content, side, corner) or crop_any(content, side, corner)


def crop_any(content: bytes, side: int, corner: Sequence[float]) -> Image.Image:
    """The crop of a file of any format. Raises BrokenPicture."""
    image = decode(content)
    return cut(image, window(image.size, side, corner))


def crop_jpeg(content: bytes, side: int, corner: Sequence[float]) -> Image.Image | None:
    """The same for a usual JPEG, decoding no more than is needed. None: `crop_any` must do it.

    libjpeg halves a large picture while decoding, as long as twice the pixels needed remain.
    Told that the picture ends where the window ends, Pillow's decoder stops there, which saves a
    fifth of the work, and complains of the data left over. The last row says whether that was
    all: it has been decoded unless it is still black.
    """
    frame = jpeg_frame(content)
    if frame is None:
        return None
    *size, mode = frame
    factor = next(f for f in (8, 4, 2, 1) if min(size) >= 2 * f * side or f == 1)
    width, height = -(-size[0] // factor), -(-size[1] // factor)
    box = tuple(edge / factor for edge in window(size, side, corner))
    # Antialiasing reaches beyond the window by one output pixel; one more for rounding.
    rows = min(int(box[3] + max((box[3] - box[1]) / CROP, 1)) + 2, height)
    image = Image.new(mode, (width, rows))
    try:
        image.frombytes(content, "jpeg", (mode, "", factor, 0))
    except ValueError:
        if rows == height or is_black(image, rows - 1):
            return None
    return cut(as_rgb(image), box)


def is_black(image: Image.Image, row: int) -> bool:
    """Whether a row is all zeros; its first pixel mostly tells."""
    first = image.getpixel((0, row))
    return first in (0, (0, 0, 0)) and image.crop((0, row, image.width, row + 1)).getbbox() is None


def window(size: Sequence[int], side: int, corner: Sequence[float]) -> tuple[float, ...]:
    """Left, top, right and bottom of the crop, in pixels of a picture of that width and height."""
    width, height = resized_size(*size, side)
    left, top = int(corner[0] * (width - CROP + 1)), int(corner[1] * (height - CROP + 1))
    across, down = size[0] / width, size[1] / height
    return left * across, top * down, (left + CROP) * across, (top + CROP) * down


def cut(image: Image.Image, box: tuple[float, ...]) -> Image.Image:
    """The window, resized to 224x224."""
    if box[2] - box[0] == CROP == box[3] - box[1]:  # it has its size already
        return image.crop(tuple(map(int, box)))
    return image.resize((CROP, CROP), Image.Resampling.BILINEAR, box)


MODES = {1: "L", 3: "RGB"}
"""Pillow's name for the colours of a JPEG with so many components."""

FRAMES = (0xC0, 0xC1, 0xC2)
"""Markers of frame headers: baseline, extended and progressive, all of them Huffman-coded."""

TABLES = (0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0))
"""Markers of what may come before: tables, restart interval, comment, application data."""


def jpeg_frame(content: bytes) -> tuple[int, int, str] | None:
    """Width, height and mode of a JPEG of the usual kinds, from its frame header.

    Its segments are walked through as in ITU-T T.81, annex B. None at anything that libjpeg could
    read otherwise, and for sizes that picture_in refuses.
    """
    at = 2 if content.startswith(b"\xff\xd8") else len(content)
    while at + 10 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker in FRAMES:
            bits, height, width, components = struct.unpack_from(">BHHB", content, at + 4)
            mode = MODES.get(components) if bits == 8 else None
            return (width, height, mode) if mode and size_is_fit(width, height) else None
        if marker not in TABLES:
            return None
        at += 2 + int.from_bytes(content[at + 2 : at + 4])
    return None


# --- resized copies -------------------------------------------------------------------------

COPIES_OF = "copies_of.txt"
"""Beside the resized copies: the folder of the pictures they were made from."""

COPIES = "copies.json"
"""Also beside them: for each shorter side, the fingerprint of the pictures, and whether all of them
have a copy, apart from those that cannot be decoded."""

QUALITY = {"quality": 95, "subsampling": 0}
"""JPEG settings: a mean error of 1.1 levels of 256 on photographs (44 dB), which nobody sees.
Quality 90 with halved colour resolution would take 0.56 of the disk, at 1.9 levels (39 dB)."""

END_OF_IMAGE = b"\xff\xd9"
"""The last bytes of every JPEG."""


def copies_of_others(root: Path, pictures: Pictures) -> bool:
    """Whether preprocess.py filled `root` from another dataset, in which names may be the same."""
    note = root / COPIES_OF
    return note.exists() and note.read_bytes() != utils.as_written(str(pictures.folder))


def claim(root: Path, pictures: Pictures, wanted: list[int]) -> None:
    """Writes down in `root` which pictures its copies are of.

    Raises UserError if what lies there are copies of other pictures, of pictures that have been
    replaced since, or somebody else's files.
    """
    note = root / COPIES_OF
    if copies_of_others(root, pictures):
        others = utils.one_line(note.read_text(errors="replace"))[:200]
        raise UserError(
            f"{root} holds copies of pictures in {others}, not in {pictures.folder}; take another "
            f"path_to_save, or remove {note} if the pictures have only moved"
        )
    if (root / COPIES).exists() and not states_of(root):
        raise UserError(f"{root / COPIES}: not written by preprocess.py; take another path_to_save")
    for side in wanted:
        folder = root / str(side)
        is_ours = note.exists() or side in states_of(root)
        if not is_ours and folder.exists() and not (folder.is_dir() and is_empty(folder)):
            raise UserError(
                f"{folder}: not made by preprocess.py, which would have left {note}; take another "
                f"path_to_save, or remove it"
            )
        if folder.exists() and "replaced" in (reason := why_unused(root, side, pictures)):
            raise UserError(f"{folder}: {reason}; remove that folder and start again")
    if not note.exists():
        utils.write_text(note, str(pictures.folder))


def is_empty(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return next(entries, None) is None


def states_of(root: Path) -> dict[int, tuple[str, bool]]:
    """By shorter side what COPIES says: fingerprint of the pictures, and whether all have copies.

    Empty if the file is missing or holds anything else.
    """
    try:
        states = (utils.read_json(root / COPIES) or {}).items()
        return {int(side): (str(s["pictures"]), s["complete"] is True) for side, s in states}
    except (ValueError, TypeError, KeyError):
        return {}


def note_copies(root: Path, sides: Iterable[int], pictures: Pictures, complete: bool) -> None:
    """Writes down that these sides have copies of all the pictures, or not yet."""
    states = states_of(root) | dict.fromkeys(sides, (pictures.fingerprint, complete))
    content = {side: {"pictures": p, "complete": c} for side, (p, c) in sorted(states.items())}
    utils.write_text(root / COPIES, json.dumps(content, indent=1))


def why_unused(root: Path, side: int, pictures: Pictures) -> str:
    """Why the copies at this shorter side cannot stand for all the pictures; "" if they can."""
    copied, complete = states_of(root).get(side, ("", False))
    if copied == pictures.fingerprint and complete:
        return ""
    if copied != pictures.fingerprint and copied[:9] == pictures.fingerprint[:9]:
        return "pictures were replaced since these copies were made"
    return "copies incomplete"


def resized_folders(root: Path, pictures: Pictures) -> dict[int, Path]:
    """The folders with resized copies of all these pictures, by shorter side.

    Says why a folder is not used. preprocess.py may not add to folders that are used: otherwise the
    content of a batch would depend on when it is made.
    """
    folders = {side: root / str(side) for side in SIDES if (root / str(side)).is_dir()}
    unused = None
    if copies_of_others(root, pictures):
        unused = "its resized copies are of other pictures"
    elif folders and (root / COPIES_OF).is_file():
        try:
            utils.lock(root / COPIES_OF, "preprocess.py is at work here", shared=True)
        except UserError as error:
            unused = str(error)
    if unused:
        utils.warn(f"{root}: {unused}; the originals are used")
        return {}
    reasons = {side: why_unused(root, side, pictures) for side in folders}
    if named := {side: reason for side, reason in reasons.items() if reason}:
        side, reason = next(iter(named.items()))
        if len(named) > 1:
            reason += f" (also in {plural(len(named) - 1, 'other shorter side')})"
        elif "incomplete" in reason:
            reason += f", {np.count_nonzero(missing(pictures, {side: folders[side]})):,} missing"
        utils.warn(
            f"{folders[side]}: {reason}; the originals are used. Run preprocess.py "
            f"--shorter_side={side} to make the copies"
        )
    return {side: folder for side, folder in folders.items() if not reasons[side]}


def missing(pictures: Pictures, folders: dict[int, Path]) -> np.ndarray:
    """uint64 [pictures]: bit i is set if the copy at the i-th side is still to be made.

    Names are compared by 64 bits of their hashes: as text, those of all sides would take 5 GB.
    """
    members, names = defaultdict(lambda: array("q")), defaultdict(lambda: array("q"))
    for index, path in enumerate(pictures.paths):
        relative, name = os.path.split(path)
        members[relative].append(index)
        names[relative].append(hash(name))
    wanted = np.zeros(len(pictures), np.uint64)
    for relative, indices in members.items():
        for bit, folder in enumerate(folders.values()):
            done = np.isin(np.array(names[relative]), finished(folder / relative))
            wanted[np.array(indices)[~done]] |= np.uint64(1 << bit)
    return wanted


def finished(folder: Path) -> np.ndarray:
    """int64: hashes of the names of the files in a folder. Empty files do not count.

    A power failure may have left them before copies were flushed to the disk before their renaming.
    """
    hashes = array("q")
    if folder.is_dir():
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.stat().st_size:
                    hashes.append(hash(entry.name))
    return np.array(hashes, np.int64)


def prepare(pictures: Pictures, folders: dict[int, Path]) -> None:
    """Makes the folders of the copies, and removes what a killed process left half-written."""
    for relative in {os.path.dirname(path) for path in pictures.paths}:
        for folder in folders.values():
            utils.make_folder(folder / relative)
            utils.remove_leftovers(folder / relative)


def resized_copies(path: str | Path, wanted: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
    """A picture, decoded once, at each of the shorter sides in turn.

    Raises BrokenPicture, before the first copy.
    """
    picture, size, box = decode_reduced(read_picture(path), max(wanted))

    def resized(side: int) -> Image.Image:
        return picture.resize(resized_size(*size, side), Image.Resampling.BILINEAR, box)

    return ((side, resized(side)) for side in wanted)


def save_jpeg(image: Image.Image, path: Path) -> None:
    """Straight into the file: into memory, Pillow would compress one picture at a time.

    The copy is on the disk before it gets its name: not even a power failure leaves half of one.
    Raises OSError, also where Pillow overlooks that the disk took only a part.
    """
    with utils.written_aside(path) as aside, open(aside, "w+b") as file:
        image.save(file, "JPEG", **QUALITY)
        file.seek(-len(END_OF_IMAGE), os.SEEK_END)
        if file.read() != END_OF_IMAGE:
            raise OSError(errno.ENOSPC, "only a part could be written; is the disk full?")
        os.fsync(file.fileno())


def sides_of(bits: int, folders: dict[int, Path]) -> list[int]:
    """The sides whose bits are set."""
    return [side for bit, side in enumerate(folders) if int(bits) >> bit & 1]


def say_room(pictures: Pictures, folders: dict, wanted: np.ndarray, total: int) -> None:
    """Says about how much disk the copies will take. Raises UserError if it is not free."""
    sizes, indices = [], np.flatnonzero(wanted)
    for index in indices[:: max(1, len(indices) // 16)].tolist():
        try:
            copies = resized_copies(pictures.path(index), sides_of(wanted[index], folders))
        except BrokenPicture:
            continue  # reported when its turn comes
        for _, image in copies:
            copy = io.BytesIO()
            image.save(copy, "JPEG", **QUALITY)
            sizes.append(len(copy.getvalue()))
    needed = total * sum(sizes) / max(len(sizes), 1)
    root = next(iter(folders.values())).parent
    free = utils.check_room(root, needed, "the copies need about")
    print(f"about {utils.file_size(needed)} needed in {root}, {utils.file_size(free)} free")


def write_all(pictures: Pictures, folders: dict, wanted: np.ndarray, failures: Failures) -> None:
    """Makes the copies, each under its name only when it is whole."""

    def load(index: int) -> Iterator[tuple[int, Image.Image]]:
        return resized_copies(pictures.path(index), sides_of(wanted[index], folders))

    def write(index: int, copies: Iterator[tuple[int, Image.Image]]) -> None:
        for side, image in copies:
            save_jpeg(image, folders[side] / pictures.paths[index])

    prepare(pictures, folders)
    for _ in map_pictures(pictures, np.flatnonzero(wanted), load, write, failures):
        pass


if __name__ == "__main__":
    utils.run(main)
