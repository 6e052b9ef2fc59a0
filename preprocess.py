"""Makes resized copies of all training pictures, for machines too slow to use the originals.

    python3 preprocess.py --shorter_side=256

writes `<path_to_save>/256/<path of the original inside the training folder>`: JPEG, shorter side
256 pixels, same aspect ratio. `--shorter_side=all` makes the 33 sides 256, 263, … 480 and decodes
each original only once. If started again, it continues where it stopped. This step is optional:
without copies, runtime_preprocessing.py uses the originals. The README says when copies help.

The other scripts import everything about pictures from here. Sections: the list of pictures,
dataset layouts, reading and decoding a picture, cutting a crop from a picture, resized copies.
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
        f"{root}: another preprocess.py is adding copies there, or runtime_preprocessing.py is "
        f"making batches from them; wait until it ends, or use another path_to_save",
    )
    folders = {side: root / str(side) for side in args.shorter_side}
    wanted = missing(pictures, folders)
    total = sum(bits.bit_count() for bits in wanted.tolist())
    print(
        f"{plural(len(pictures), 'training picture')}, {pictures.layout}; {total:,} of "
        f"{len(pictures) * len(folders):,} resized copies are still to be made"
    )
    failures = Failures(len(pictures))
    if total:
        say_room(pictures, folders, wanted, total)
        note_copies(root, folders, pictures, complete=False)
        write_all(pictures, folders, wanted, failures)
        os.sync()  # after a power failure, the note below must not exist without the copies
    note_copies(root, folders, pictures, complete=True)
    print(
        f"resized copies of {plural(len(pictures) - len(failures), 'picture')} at "
        f"{plural(len(folders), 'shorter side')} are in {root}; {failures}. "
        f"Next: run runtime_preprocessing.py, which will find them there"
    )


def parse_arguments() -> argparse.Namespace:
    parser = utils.Parser(
        "Makes resized copies of all training pictures.", "preprocess.py --shorter_side=256"
    )
    text = "shorter side in pixels, one of 256, 263, … 480, or all"
    parser.add("--shorter_side", sides, text, utils.REQUIRED)
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

    As Python strings, the paths of ImageNet take 150 MB in each process: reading a string changes
    its reference count, so every forked process soon has its own copy.
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
        index = range(len(self))[index]  # accepts negative indices, raises IndexError
        return os.fsdecode(self._block[self._ends[index] : self._ends[index + 1]])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def checksum(self) -> int:
        return zlib.crc32(self._ends.tobytes(), zlib.crc32(self._block))


@dataclass(frozen=True)
class Pictures:
    """The pictures of the training or the validation set, in a fixed order."""

    folder: Path
    paths: Paths
    """Relative to `folder`."""
    labels: np.ndarray
    """int32 [len(paths)]: the rank of the class in sorted order."""
    class_names: list[str]
    """Readable names if the dataset has them, else the names of the class folders."""
    layout: str

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        return f"{self.folder}/{self.paths[index]}"

    def decoded(self, index: int) -> Image.Image:
        """8-bit RGB. Raises BrokenPicture, and OSError if the storage fails."""
        return decode(read_picture(self.path(index)))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Two checksums: one of all names and labels, one of the files' contents.

        The first changes when a picture is added, removed, renamed or moved to another class. The
        second changes when pictures are replaced but keep their names. It covers the sizes and
        first bytes of SAMPLED pictures, evenly spaced: reading all from a cold disk takes minutes.
        """
        names = zlib.crc32(self.labels.tobytes(), self.paths.checksum())
        sample = np.linspace(0, len(self) - 1, min(len(self), SAMPLED)).astype(int).tolist()

        def look(index: int) -> bytes:
            try:
                return unless_gone(beginning, self.folder, self.path(index))
            except MissingPicture:
                return b""

        with ThreadPoolExecutor(16) as pool:  # a slow disk serves many requests at once
            beginnings = pool.map(look, sample)
            return f"{names:08x}-{zlib.crc32(b''.join(beginnings)):08x}"


SAMPLED = 2000
"""Number of pictures that the fingerprint reads."""


class BrokenPicture(Exception):
    """A picture that is missing or cannot be decoded. The message gives the reason."""


class MissingPicture(BrokenPicture):
    """There is no such file."""


def unless_gone(work: Callable, folder: str | Path, picture: Any) -> Any:
    """Returns `work(picture)`. If the file is missing, waits for `folder` to exist, then retries.

    So no picture counts as broken because its disk was unmounted for a moment. Raises UserError if
    the folder does not come back.
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
    """Counts broken pictures, and warns about each one once. Thread-safe."""

    def __init__(self, pictures: int):
        """`pictures`: the size of the set. 1 in 100 may fail."""
        self.pictures, self.allowed = pictures, max(1, pictures // 100)
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
            if len(self) > self.allowed or len(self) == self.pictures:
                raise UserError(
                    f"{len(self)} of {self.pictures} pictures could not be decoded, more than 1 in "
                    f"100; the last was {path}. Replace or remove those named in the warnings"
                )

    def __str__(self) -> str:
        return "all could be decoded" if not self.paths else f"{len(self)} could not be decoded"


def map_pictures(
    pictures: Pictures, indices: Sequence[int], load: Callable, work: Callable, failures: Failures
) -> Iterator:
    """Yields `work(index, load(index))` for these pictures, in order, computed on all cores.

    `load` reads and decodes a picture. If it raises BrokenPicture, the picture is added to
    `failures` and its result is None.
    """

    def each(index: int) -> object:
        try:
            loaded = unless_gone(load, pictures.folder, index)
        except BrokenPicture as error:
            failures.add(pictures.paths[index], error)
            return None
        return work(index, loaded)

    progress = utils.Progress(len(indices), "pictures")
    # More threads than cores, because some wait for the disk.
    for result in utils.map_in_order(each, map(int, indices), 2 * utils.cores() + 4):
        progress.add()
        yield result


# --- dataset layouts ------------------------------------------------------------------------

PICTURE_SUFFIXES = (
    ".jpeg", ".jpg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jfif", ".jpe", ".jif",
    ".mpo", ".dib", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k",
)  # fmt: skip
"""Files with these suffixes count as pictures. Their content tells the format, not the suffix."""

VALIDATION = ("val", "valid", "validation", "test")
"""Possible names of the validation set's folder and of its list file."""


def training_pictures(config: SimpleNamespace) -> Pictures:
    """Finds the training set below `ImageNet_folder`. Raises UserError."""
    root = _dataset_root(config.preprocess.ImageNet_folder)
    pictures = _listed(root, "train") if _has_lists(root) else _in_class_folders(root, "train")
    if _validation_part(root) is None:
        layout = f"{pictures.layout}, no validation set: nothing can be evaluated"
        pictures = replace(pictures, layout=layout)
    return _checked(pictures, "train", config.train.N)


def validation_pictures(config: SimpleNamespace) -> Pictures:
    """Finds the validation set below `ImageNet_folder`, labelled like the training set.

    Raises UserError, also if only the devkit's ground truth says what the classes are.
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
    elif _subfolders(root / part):
        pictures = _in_class_folders(root, part)
    else:
        pictures = _flat_validation(root, part)
    return _checked(pictures, "preprocess", config.preprocess.N)


def _validation_part(root: Path) -> str | None:
    """The name of the validation set's list or folder; None if there is none."""
    if _has_lists(root):
        found = (name for name in VALIDATION if (root / f"{name}.txt").is_file())
    else:
        found = (name for name in VALIDATION if (root / name).is_dir())
    return next(found, None)


def _checked(pictures: Pictures, section: str, expected: int) -> Pictures:
    """The pictures. Raises UserError if [section] N is another number. Warns of empty classes."""
    if not len(pictures):
        raise UserError(
            f"{pictures.folder}: no pictures found; expected class folders with "
            f"{', '.join(PICTURE_SUFFIXES)} files in them; {_content(pictures.folder)}"
        )
    if expected not in (0, len(pictures)):
        raise UserError(
            f"[{section}] N is {expected}, but {pictures.folder} holds {len(pictures)} pictures; "
            f"correct one of them, or set N = 0 to accept any number"
        )
    names = pictures.class_names
    counts = np.bincount(pictures.labels, minlength=len(names))
    if len(empty := np.flatnonzero(counts == 0)):
        utils.warn(
            f"{pictures.folder}: no pictures in {plural(len(empty), 'class')} of "
            f"{len(names):,} (labels count from 0); the first is {names[empty[0]]}"
        )
    return pictures


def _dataset_root(folder: Path) -> Path:
    """The folder that holds train/ or the lists."""
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; [preprocess] ImageNet_folder must be the folder that "
            f"contains train and val"
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
    """`folder` itself, or the folder inside it that Kaggle's archive uses; None if neither fits."""
    roots = (folder / below for below in (".", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC"))
    return next((root for root in roots if (root / "train").is_dir() or _has_lists(root)), None)


def _has_lists(root: Path) -> bool:
    """Whether train.txt lists the pictures.

    If there are class folders too, train.txt may be any text. A val.txt or a 2012_train/ shows that
    it is a list.
    """
    if not (root / "train.txt").is_file():
        return False
    listed = [name for name in VALIDATION if (root / f"{name}.txt").is_file()]
    return (
        "val" in listed
        or (root / "2012_train").is_dir()
        or not all(_subfolders(root / name) for name in listed)
        or ((root / "train").is_dir() and not _subfolders(root / "train"))
    )


UNPACK_CLASSES = 'for f in *.tar; do mkdir -p "${f%.tar}" && tar -xf "$f" -C "${f%.tar}"; done'

ARCHIVES = {
    r"n\d{8}\.tar": f"ImageNet's classes, each still in its archive; unpack them: "
    f"cd FOLDER && {UNPACK_CLASSES}",
    r"ILSVRC2012_img_train.*\.tar": f"ImageNet's training pictures; unpack them: "
    f"cd FOLDER && mkdir -p train && tar -xf NAME -C train && cd train && {UNPACK_CLASSES}",
    r"ILSVRC2012_img_val\.tar": "ImageNet's validation pictures; unpack them: cd FOLDER && "
    "mkdir -p val && tar -xf NAME -C val, and put Kaggle's LOC_val_solution.csv next to val",
    r".*\d{4}\.tar": "probably WebDataset shards, which are not supported; unpack them and move "
    "each picture into train/<class>/; the .cls file next to it gives the class",
    r".*\.(tar|tar\.\w+|tgz|tbz2|txz|zip|rar|7z)": "an archive; unpack it, so that train/<class>/ "
    "holds the pictures",
    r".*\.(parquet|arrow)": "pictures in a table, which is not supported; write each to "
    'train/<class>/ (Python: datasets.load_dataset("parquet", data_files=…), then image.save)',
    r".*\.tfrecords?|.*-of-\d{5}": "TFRecord files, which are not supported; write each picture "
    "to train/<class>/ (Python: tf.data.TFRecordDataset and tf.train.Example)",
    r".*\.(h5|hdf5|lmdb|mdb|rec|beton|npz|pkl)": "made for another program, and not supported; "
    "write each picture to train/<class>/",
}
"""Files that people have instead of folders of pictures: name, what they are, what to do."""


def _content(folder: Path) -> str:
    """What is in a folder that is not a dataset, and what to do about it."""
    names = sorted(entry.name for entry in _visible(folder))
    for pattern, way_out in ARCHIVES.items():
        found = [name for name in names if re.fullmatch(pattern, name, re.IGNORECASE)]
        if found:
            others = f" and {plural(len(found) - 1, 'other')} are" if len(found) > 1 else " is"
            way_out = way_out.replace("FOLDER", shlex.quote(str(folder)))
            return f"{folder / found[0]}{others} {way_out.replace('NAME', shlex.quote(found[0]))}"
    if any(map(_is_picture_name, names)):
        return "its pictures are not in class folders: move each into a folder for its class"
    with contextlib.suppress(OSError):  # it is only a hint
        below = [e.name for name in _subfolders(folder)[:3] for e in _visible(folder / name)]
        if any(map(_is_picture_name, below)):
            return f"its folders look like classes: move them into {folder / 'train'}"
    more = f" and {plural(len(names) - 8, 'other')}" if len(names) > 8 else ""
    return f"it holds {', '.join(names[:8])}{more}" if names else "it is empty"


def _is_picture_name(name: str) -> bool:
    return name.lower().endswith(PICTURE_SUFFIXES)


def _visible(folder: Path) -> Iterator[os.DirEntry]:
    """The files and folders in a folder that are not hidden, in no particular order."""
    with os.scandir(folder) as entries:
        yield from (entry for entry in entries if not entry.name.startswith("."))


def _is_folder(entry: os.DirEntry) -> bool:
    """Whether this is a folder or a link to one. A broken link is not, and is no error."""
    return not entry.is_file(follow_symlinks=False) and os.path.isdir(entry.path)


def _subfolders(folder: Path) -> list[str]:
    """Sorted names of the visible folders in `folder`; empty if `folder` is not a folder."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in _visible(folder) if _is_folder(entry))


def _files(folder: Path, below: str) -> Iterator[str]:
    """Paths, relative to `folder`, of all files in folder/below and its subfolders.

    Does not follow links to folders, which may form loops.
    """
    for entry in _visible(folder / below):
        path = f"{below}/{entry.name}"
        if not _is_folder(entry):
            yield path
        elif not entry.is_symlink():
            yield from _files(folder, path)


def _near(root: Path, *names: str) -> Path | None:
    """The first of these files in `root` or the three folders above it (Kaggle's root)."""
    folders = (root, *list(root.resolve().parents)[:3])
    paths = (folder / name for folder in folders for name in names)
    return next((path for path in paths if path.is_file()), None)


def _mapping(root: Path) -> list[list[str]]:
    """[class folder, readable name] for each line of the mapping file; empty if there is none."""
    file = _near(root, "LOC_synset_mapping.txt", "synset_words.txt")
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file else []
    return [line.split(maxsplit=1) for line in lines if line.strip()]


def _labels(root: Path) -> dict[str, int]:
    """The label of each class folder: its rank among the folders of the training set."""
    return {name: rank for rank, name in enumerate(_subfolders(root / "train"))}


def _readable(root: Path, classes: Iterable[str]) -> list[str]:
    """The readable names of the classes. A class that the mapping lacks keeps its folder's name."""
    names = dict(pair for pair in _mapping(root) if len(pair) == 2)
    return [names.get(name, name) for name in classes]


def _in_class_folders(root: Path, part: str) -> Pictures:
    """The pictures in `root/part/<class>/**`. The label is the class's rank in the training set."""
    folder, classes, others = root / part, _labels(root), []
    found = _subfolders(folder)
    if unknown := sorted(set(found).difference(classes)):
        raise UserError(
            f"{folder / unknown[0]}: not a class of the training set ({len(unknown)} such); "
            f"validation must use the class folders of {root / 'train'}"
        )

    def labelled() -> Iterator[tuple[str, int]]:
        for name in found:
            for path in sorted(_files(folder, name)):
                if _is_picture_name(path):
                    yield path, classes[name]
                else:
                    others.append(path)

    paths, labels = _collected(labelled())
    others += sorted({entry.name for entry in _visible(folder)}.difference(found))
    _warn_of_unused(folder, others)
    layout = "Kaggle layout" if root.parts[-2:] == ("Data", "CLS-LOC") else "class folders"
    return Pictures(folder, paths, labels, _readable(root, classes), layout)


def _collected(labelled: Iterable[tuple[str, int]]) -> tuple[Paths, np.ndarray]:
    """The paths, and the labels as int32 [n]."""
    labels = array("i")

    def paths() -> Iterator[str]:
        for path, label in labelled:
            labels.append(label)
            yield path

    return Paths(paths()), np.array(labels, np.int32)


UNUSED_SUFFIXES = (
    ".heic", ".heif", ".avif", ".jxl", ".tga", ".psd", ".svg", ".dng", ".cr2", ".nef",
)  # fmt: skip
BEGINNINGS = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP|II\*\0|MM\0\*|\0\0\0\x0cjP", re.DOTALL
)


def _warn_of_unused(folder: Path, others: list[str]) -> None:
    """Warns if some of the files that are not used are pictures.

    If the suffix does not tell, looks at the content, of at most 1,000 files.
    """
    unused, looks = [], 1000
    for path in others:
        if path.lower().endswith(PICTURE_SUFFIXES + UNUSED_SUFFIXES):
            unused.append(path)
        elif looks:
            looks -= 1
            with contextlib.suppress(OSError, MissingPicture):  # it is only for a warning
                if BEGINNINGS.match(beginning(f"{folder}/{path}"), 8):
                    unused.append(path)
    if unused:
        utils.warn(
            f"{folder}: {plural(len(unused), 'picture')} not used, the first is "
            f"{folder / unused[0]}; only files in class folders with these suffixes are used: "
            f"{', '.join(PICTURE_SUFFIXES)}"
        )


def _flat_validation(root: Path, part: str) -> Pictures:
    """All pictures directly in val/, with their classes from Kaggle's LOC_val_solution.csv."""
    folder, classes = root / part, _labels(root)
    names = sorted(e.name for e in _visible(folder) if _is_picture_name(e.name))
    solution = _near(root, "LOC_val_solution.csv")
    if solution is None:
        raise UserError(f"{folder}: {_why_no_classes(root, folder, names)}")
    with open(solution, newline="", encoding="utf-8", errors="replace") as file:
        rows = [row for row in csv.reader(file) if len(row) == 2 and row[1].strip()]
    wnids = {name: answer.split()[0] for name, answer in rows}
    labels = [classes.get(wnids.get(Path(name).stem), -1) for name in names]
    if -1 in labels:
        raise UserError(
            f"{folder / names[labels.index(-1)]}: {solution} gives no class for it that is in "
            f"{root / 'train'}"
        )
    labels = np.array(labels, np.int32)
    return Pictures(folder, Paths(names), labels, _readable(root, classes), "Kaggle layout")


def _why_no_classes(root: Path, folder: Path, names: list[str]) -> str:
    """Why the classes of a flat validation set are not known, and what to do."""
    if not names:
        return f"no pictures found; {_content(folder)}"
    name = "ILSVRC2012_validation_ground_truth.txt"
    why = "and nothing says which class they belong to"
    if truth := _near(root, name) or next(root.glob(f"*devkit*/**/{name}"), None):
        why = (
            f"and {truth} does not help, because it numbers the classes in the devkit's own order, "
            f"not in sorted order"
        )
    return (
        f"its pictures are not in class folders, {why}; put Kaggle's LOC_val_solution.csv into "
        f"{root}, or move the pictures into {folder}/<class>/ (for ImageNet, run valprep.sh from "
        f"soumith/imagenetloader.torch in {folder})"
    )


def _listed(root: Path, part: str) -> Pictures:
    """The pictures in `train.txt` or `val.txt`. Each line is `filename label`."""
    near = [root / f"2012_{part}", root / f"2012_{part[:3]}", root / part]
    folder = next((each for each in near if each.is_dir()), None)
    if folder is None:
        raise UserError(
            f"{near[-1]}: no such folder; the pictures in {root / part}.txt must be there, or in "
            f"2012_{part}/"
        )
    listed = {}
    for name in filter(None, ("train", _validation_part(root))):
        file = root / f"{name}.txt"
        paths, labels = listed[name] = _collected(_read_list(file))
        if not len(paths):
            raise UserError(f"{file}: lists no pictures; expected 'filename label' lines")
        last = listed["train"][1].max()
        if len(beyond := np.flatnonzero(labels > last)):
            raise UserError(
                f"{file}: {paths[beyond[0]]} has label {labels[beyond[0]]}, but the largest label "
                f"in {root / 'train.txt'} is {last}"
            )
    return Pictures(folder, *listed[part], _names_of_labels(root, *listed["train"]), "list files")


def _names_of_labels(root: Path, paths: Paths, labels: np.ndarray) -> list[str]:
    """Class names: from a mapping with one line per class, else the folders, else the labels."""
    mapping, classes = _mapping(root), 1 + int(labels.max())
    if len(mapping) == classes:
        return [pair[-1] for pair in mapping]
    folders = dict(zip(labels.tolist(), map(os.path.dirname, paths), strict=True))
    if len(folders) == len(set(folders.values())) == classes:
        return [folders[label] for label in range(classes)]
    return [str(label) for label in range(classes)]


def _read_list(file: Path) -> Iterator[tuple[str, int]]:
    """Path and label of each `filename label` line. Raises UserError."""
    with open(file, "rb") as lines:
        for number, line in enumerate(map(os.fsdecode, lines), 1):
            match = re.fullmatch(r"\s*([^\0]*\S)\s+([0-9]{1,6})\s*", line)
            where = f"{file}: line {number}"
            if match:
                path, label = match.groups()
                if os.path.isabs(path) or ".." in Path(path).parts:
                    raise UserError(f"{where}: {path} is outside the picture folder")
                yield path, int(label)
            elif line.strip():
                raise UserError(f"{where}: expected 'filename label', not {line.rstrip()!r}")


# --- reading and decoding a picture ---------------------------------------------------------

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000")

LONGEST = 100
"""Largest ratio of a picture's longer side to its shorter side. Copies of longer pictures would not
fit into a JPEG file (65,535 pixels), and barely into memory."""

NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO)
"""These errors mean that the path is wrong. All others mean that the storage failed."""

PILLOW_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, ArithmeticError,
    struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip
"""What Pillow raises for broken files. Caught only around calls to Pillow."""

# Ignore broken EXIF data, but refuse pictures of over 89 million pixels.
warnings.filterwarnings("ignore", module="PIL")
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def read_picture(path: str | Path) -> bytes:
    """The content of a picture's file. Raises MissingPicture if there is no such file.

    Any other OSError comes from the storage, and does not mean that the picture is broken.
    """
    with _no_file_is_missing(path):
        return utils.read_file(path)


def beginning(path: str) -> bytes:
    """A file's size and first bytes. Raises MissingPicture."""

    def read(path: str) -> bytes:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe must not block
        with open(descriptor, "rb", buffering=0) as file:
            return struct.pack("<q", os.fstat(descriptor).st_size) + (file.read(1024) or b"")

    with _no_file_is_missing(path):
        return utils.patiently(read, path)


@contextlib.contextmanager
def _no_file_is_missing(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in NO_FILE:
            raise MissingPicture(os.strerror(error.errno).lower()) from None
        error.filename = error.filename or os.fspath(path)
        raise


@contextlib.contextmanager
def pillow_decodes() -> Iterator[None]:
    """Turns what Pillow raises for a broken file into BrokenPicture.

    Wrap only calls to Pillow: anywhere else, such an error is a bug and must not be hidden.
    """
    try:
        yield
    except UnidentifiedImageError:
        raise BrokenPicture(f"cannot be decoded: not one of {', '.join(FORMATS)}") from None
    except PILLOW_ERRORS as error:
        # Decoders also report "broken data" if memory runs out. Then this line raises MemoryError.
        np.empty(1 << 26, np.uint8)
        reason = str(error) or type(error).__name__
        raise BrokenPicture(f"cannot be decoded: {reason}") from error


def decode(content: bytes) -> Image.Image:
    """The picture in a file's content, 8-bit RGB. Ignores EXIF orientation, as other loaders do.

    Raises BrokenPicture if it is not a picture, is too large, or is too long and thin.
    """
    return decode_reduced(content, None)[0]


def decode_reduced(content: bytes, side: int | None) -> tuple[Image.Image, tuple, tuple]:
    """Like `decode`, but reduces a large JPEG while decoding, to no less than twice `side`.

    That is enough for resizing to `side`. Returns the picture, its original size, and the box that
    the original fills in the decoded pixels.
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
    """Whether a picture is not empty, not larger than Pillow allows, and not too long and thin."""
    shorter, longer = min(width, height), max(width, height)
    return 0 < longer <= LONGEST * shorter and width * height <= Image.MAX_IMAGE_PIXELS


def as_rgb(image: Image.Image) -> Image.Image:
    """Converts a decoded picture to 8-bit RGB, also if grey, palette, CMYK, 16-bit, transparent."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip, not scale
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255)
        image = Image.fromarray(grey.astype(np.uint8))
    with pillow_decodes():
        return image.convert("RGB")


def resized_size(width: int, height: int, side: int) -> tuple[int, int]:
    """Width and height in pixels after resizing the shorter side to `side`, aspect ratio kept."""
    shorter = min(width, height)
    return round(width * side / shorter), round(height * side / shorter)


# --- cutting a crop from a picture ----------------------------------------------------------


def crop_file(path: str | Path, side: int, corner: Sequence[float]) -> Image.Image:
    """The 224x224 RGB crop at `corner` of a picture whose shorter side is resized to `side`.

    `corner`: position from left to right and from top to bottom, two numbers in [0, 1). Resizing
    only the crop's window gives the same pixels as resizing the whole picture, at a fraction of the
    cost. Raises BrokenPicture, and OSError if the storage fails.
    """
    content = read_picture(path)
    return crop_jpeg(content, side, corner) or crop_any(content, side, corner)


def crop_any(content: bytes, side: int, corner: Sequence[float]) -> Image.Image:
    """The crop from a file of any format. Raises BrokenPicture."""
    image = decode(content)
    return cut(image, window(image.size, side, corner))


def crop_jpeg(content: bytes, side: int, corner: Sequence[float]) -> Image.Image | None:
    """The crop from an ordinary JPEG, decoded only as far as needed. None if `crop_any` must do it.

    libjpeg halves a large picture while decoding, as long as twice the needed pixels remain. We
    tell Pillow's decoder that the picture ends at the bottom of the window. It stops there, which
    saves a fifth of the work. It raises ValueError for the data left over, but also for broken
    data. If the last row is still black, the data may be broken.
    """
    frame = jpeg_frame(content)
    if frame is None:
        return None
    *size, mode = frame
    factor = next(f for f in (8, 4, 2, 1) if min(size) >= 2 * f * side or f == 1)
    width, height = -(-size[0] // factor), -(-size[1] // factor)
    box = tuple(edge / factor for edge in window(size, side, corner))
    # Antialiasing reaches one output pixel beyond the window. One more row is for rounding.
    rows = min(int(box[3] + max((box[3] - box[1]) / CROP, 1)) + 2, height)
    image = Image.new(mode, (width, rows))
    try:
        image.frombytes(content, "jpeg", (mode, "", factor, 0))
    except ValueError:
        if rows == height or is_black(image, rows - 1):
            return None
    return cut(as_rgb(image), box)


def is_black(image: Image.Image, row: int) -> bool:
    return image.crop((0, row, image.width, row + 1)).getbbox() is None


def window(size: Sequence[int], side: int, corner: Sequence[float]) -> tuple[float, ...]:
    """Left, top, right and bottom of the crop, in pixels of the original picture of this size."""
    width, height = resized_size(*size, side)
    left, top = int(corner[0] * (width - CROP + 1)), int(corner[1] * (height - CROP + 1))
    across, down = size[0] / width, size[1] / height
    return left * across, top * down, (left + CROP) * across, (top + CROP) * down


def cut(image: Image.Image, box: tuple[float, ...]) -> Image.Image:
    """The part of the picture in `box`, resized to 224x224."""
    if box[2] - box[0] == CROP == box[3] - box[1]:  # nothing to resize
        return image.crop(tuple(map(int, box)))
    return image.resize((CROP, CROP), Image.Resampling.BILINEAR, box)


FRAMES = (0xC0, 0xC1, 0xC2)
"""Markers of frame headers: baseline, extended and progressive, all with Huffman coding."""

TABLES = (0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0))
"""Markers that may precede a frame header: tables, restart interval, comment, application data."""


def jpeg_frame(content: bytes) -> tuple[int, int, str] | None:
    """Width, height and mode of an ordinary JPEG, from its frame header (ITU-T T.81, annex B).

    None for anything that libjpeg might read differently, and for sizes that `decode` refuses.
    """
    at = 2 if content.startswith(b"\xff\xd8") else len(content)
    while at + 10 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker in FRAMES:
            bits, height, width, components = struct.unpack_from(">BHHB", content, at + 4)
            mode = {1: "L", 3: "RGB"}.get(components) if bits == 8 else None
            return (width, height, mode) if mode and size_is_fit(width, height) else None
        if marker not in TABLES:
            return None
        at += 2 + int.from_bytes(content[at + 2 : at + 4])
    return None


# --- resized copies -------------------------------------------------------------------------

COPIES_OF = "copies_of.txt"
"""File next to the resized copies: the folder of the original pictures."""

COPIES = "copies.json"
"""File next to the resized copies: for each shorter side, the fingerprint of the original pictures,
and whether every picture that can be decoded has a copy."""

QUALITY = {"quality": 95, "subsampling": 0}
"""JPEG settings. The mean error on photographs is 1.1 of 256 levels (44 dB), which is invisible.
Quality 90 with halved colour resolution takes 0.56 of the disk space, at 1.9 levels (39 dB)."""


def copies_of_others(root: Path, pictures: Pictures) -> bool:
    """Whether the copies in `root` are of another dataset, whose files may have the same names."""
    note = root / COPIES_OF
    return note.exists() and note.read_bytes() != utils.as_written(str(pictures.folder))


def claim(root: Path, pictures: Pictures, wanted: list[int]) -> None:
    """Records in `root` where the originals of its copies are.

    Raises UserError if `root` holds copies of other pictures, copies of pictures that were replaced
    since, or files that preprocess.py did not make.
    """
    note, states = root / COPIES_OF, states_of(root)
    if copies_of_others(root, pictures):
        others = utils.one_line(note.read_text(errors="replace"))[:200]
        raise UserError(
            f"{root} holds copies of pictures in {others}, not in {pictures.folder}; use another "
            f"path_to_save, or remove {note} if the pictures have only moved"
        )
    if (root / COPIES).exists() and not states:
        raise UserError(f"{root / COPIES}: not written by preprocess.py; use another path_to_save")
    for side in wanted:
        folder = root / str(side)
        is_ours = note.exists() or side in states
        if not is_ours and (any(folder.iterdir()) if folder.is_dir() else folder.exists()):
            raise UserError(
                f"{folder}: not made by preprocess.py, which would have left {note}; use another "
                f"path_to_save, or remove the folder"
            )
        if folder.exists() and "replaced" in (reason := why_unused(root, side, pictures)):
            raise UserError(f"{folder}: {reason}; remove that folder and start again")
    if not note.exists():
        utils.write_text(note, str(pictures.folder))


def states_of(root: Path) -> dict[int, tuple[str, bool]]:
    """What COPIES says, by shorter side: fingerprint of the pictures, and whether all have copies.

    Empty if the file is missing or contains anything else.
    """
    try:
        states = (utils.read_json(root / COPIES) or {}).items()
        return {int(side): (str(s["pictures"]), s["complete"] is True) for side, s in states}
    except (ValueError, TypeError, KeyError):
        return {}


def note_copies(root: Path, sides: Iterable[int], pictures: Pictures, complete: bool) -> None:
    """Records whether these sides have copies of all the pictures."""
    states = states_of(root) | dict.fromkeys(sides, (pictures.fingerprint, complete))
    content = {side: {"pictures": p, "complete": c} for side, (p, c) in sorted(states.items())}
    utils.write_text(root / COPIES, json.dumps(content, indent=1))


def why_unused(root: Path, side: int, pictures: Pictures) -> str:
    """Why the copies at this shorter side cannot replace the pictures; "" if they can."""
    copied, complete = states_of(root).get(side, ("", False))
    if copied == pictures.fingerprint and complete:
        return ""
    if copied != pictures.fingerprint and copied[:9] == pictures.fingerprint[:9]:
        return "pictures were replaced after these copies were made"
    return "copies incomplete"


def resized_folders(root: Path, pictures: Pictures) -> dict[int, Path]:
    """The folders with resized copies of all these pictures, by shorter side.

    Warns about folders that are not used. Locks the others against preprocess.py: the content of a
    batch must not depend on when it is made.
    """
    folders = {side: root / str(side) for side in SIDES if (root / str(side)).is_dir()}
    try:
        if copies_of_others(root, pictures):
            raise UserError("its resized copies are of other pictures")
        if folders and (root / COPIES_OF).is_file():
            utils.lock(root / COPIES_OF, "preprocess.py is running here", shared=True)
    except UserError as error:
        utils.warn(f"{root}: {error}; the originals are used")
        return {}
    unused = {side: reason for side in folders if (reason := why_unused(root, side, pictures))}
    if unused:
        side, reason = next(iter(unused.items()))
        if len(unused) > 1:
            reason += f" (also in {plural(len(unused) - 1, 'other shorter side')})"
        elif "incomplete" in reason:
            reason += f", {np.count_nonzero(missing(pictures, {side: folders[side]})):,} missing"
        utils.warn(
            f"{folders[side]}: {reason}; the originals are used. Run preprocess.py "
            f"--shorter_side={side} to make the copies"
        )
    return {side: folder for side, folder in folders.items() if side not in unused}


def missing(pictures: Pictures, folders: dict[int, Path]) -> np.ndarray:
    """uint64 [pictures]: bit i is set if the copy at the i-th side is missing.

    Compares 64-bit hashes: the names of all copies would take 5 GB as text.
    """
    hashes = np.fromiter((hash(os.path.split(path)) for path in pictures.paths), np.int64)
    parents = {os.path.dirname(path) for path in pictures.paths}
    wanted = np.zeros(len(pictures), np.uint64)
    for bit, folder in enumerate(folders.values()):
        done = np.fromiter(finished(folder, parents), np.int64)
        wanted[~np.isin(hashes, done)] |= np.uint64(1 << bit)
    return wanted


def finished(folder: Path, parents: Iterable[str]) -> Iterator[int]:
    """A hash of (subfolder, name) for each copy in these subfolders.

    Ignores empty files, which a power failure may leave behind.
    """
    for parent in parents:
        if (folder / parent).is_dir():
            with os.scandir(folder / parent) as entries:
                yield from (hash((parent, e.name)) for e in entries if e.stat().st_size)


def resized_copies(path: str | Path, wanted: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
    """Decodes a picture once, and yields it at each of the shorter sides.

    Raises BrokenPicture right away, not when the first copy is requested.
    """
    picture, size, box = decode_reduced(read_picture(path), max(wanted))
    bilinear = Image.Resampling.BILINEAR
    return ((side, picture.resize(resized_size(*size, side), bilinear, box)) for side in wanted)


def save_jpeg(image: Image.Image, path: Path) -> None:
    """Saves directly to the file: to memory, Pillow would compress only one picture at a time.

    The copy is on the disk before it gets its name, so a power failure leaves no incomplete file.
    Raises OSError, also for a full disk, which Pillow does not notice.
    """
    with utils.written_aside(path) as aside, open(aside, "w+b") as file:
        image.save(file, "JPEG", **QUALITY)
        file.seek(-2, os.SEEK_END)
        if file.read() != b"\xff\xd9":  # the end of every JPEG
            raise OSError(errno.ENOSPC, "only part of it could be written; is the disk full?")
        os.fsync(file.fileno())


def sides_of(bits: int, folders: dict[int, Path]) -> list[int]:
    """The sides whose bits are set."""
    return [side for bit, side in enumerate(folders) if int(bits) >> bit & 1]


def say_room(pictures: Pictures, folders: dict, wanted: np.ndarray, total: int) -> None:
    """Prints roughly how much disk space the copies need. Raises UserError if it is not free."""
    sizes, indices = [], np.flatnonzero(wanted)
    for index in indices[:: max(1, len(indices) // 16)].tolist():
        with contextlib.suppress(BrokenPicture):  # `write_all` reports it
            sides = sides_of(wanted[index], folders)
            for _, image in resized_copies(pictures.path(index), sides):
                copy = io.BytesIO()
                image.save(copy, "JPEG", **QUALITY)
                sizes.append(copy.tell())
    needed = total * sum(sizes) / max(len(sizes), 1)
    root = next(iter(folders.values())).parent
    free = utils.check_room(root, needed, "the copies need about")
    print(f"about {utils.file_size(needed)} needed in {root}, {utils.file_size(free)} free")


def write_all(pictures: Pictures, folders: dict, wanted: np.ndarray, failures: Failures) -> None:
    """Makes the copies. Each gets its name only when it is complete."""
    for parent in {os.path.dirname(path) for path in pictures.paths}:
        for folder in folders.values():
            utils.remove_leftovers(utils.make_folder(folder / parent))

    def load(index: int) -> Iterator[tuple[int, Image.Image]]:
        return resized_copies(pictures.path(index), sides_of(wanted[index], folders))

    def write(index: int, copies: Iterator[tuple[int, Image.Image]]) -> None:
        for side, image in copies:
            save_jpeg(image, folders[side] / pictures.paths[index])

    for _ in map_pictures(pictures, np.flatnonzero(wanted), load, write, failures):
        pass


if __name__ == "__main__":
    utils.run(main)
