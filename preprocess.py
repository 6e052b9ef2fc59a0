"""Makes resized copies of all training pictures, for machines too slow to use the originals.

    python3 preprocess.py --shorter_side=256

writes `<path_to_save>/256/<path of the original inside the training folder>`: JPEG, shorter side
256 pixels, same aspect ratio. `--shorter_side=all` makes the 33 sides 256, 263, … 480 and decodes
each original only once. If started again, it continues where it stopped. This step is optional:
without copies, runtime_preprocessing.py uses the originals. The README says when copies help.

The other scripts import everything about pictures from here. Sections: the list of pictures,
dataset layouts, reading and decoding a picture, cutting a crop from a picture, resized copies.
"""

import os.path
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -I leaves it out

import utils  # first: it says which package is missing
from utils import UserError, plural

# isort: split
import codecs
import contextlib
import csv
import ctypes
import errno
import functools
import io
import logging
import math
import re
import struct
import threading
import unicodedata
import warnings
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

CROP = 224
"""Height and width in pixels of what the network sees."""

SHORTER_SIDE = 256
"""Validation pictures, and pictures to predict, are resized to this shorter side."""

SIDES = range(256, 481, 7)
"""The 33 shorter sides that training pictures are resized to: 256, 263, … 480 pixels."""


def main() -> None:
    parser = utils.Parser(
        "Makes resized copies of all training pictures.", "preprocess.py --shorter_side=256"
    )
    text = "shorter side in pixels: 256, 263, … 480, or all"
    parser.add("--shorter_side", ("all", *map(str, SIDES)), text, utils.REQUIRED)
    args = parser.parse()
    config = utils.load_config(args.config)
    pictures = training_pictures(config)
    root = output_root(config)
    refusal = f"{root}: another preprocess.py is adding copies there; wait until it ends"
    utils.lock(root / ".preprocess.lock", refusal)
    sides = SIDES if args.shorter_side == "all" else [int(args.shorter_side)]
    folders = {side: root / str(side) for side in sides}
    note = claim_copies(root, pictures, folders)
    print(f"{plural(len(pictures), 'training picture')}, {pictures.layout}")
    say_room(pictures, folders)
    failures = Failures(len(pictures))
    make_copies(pictures, folders, failures)
    os.sync()  # after a power failure, the note below must not exist without the copies
    note.complete = sorted({*note.complete, *sides})
    utils.write_record(root / NOTE, note)
    print(
        f"resized copies of {plural(len(pictures) - len(failures), 'picture')} at "
        f"{plural(len(folders), 'shorter side')} are in {root}; {failures}. "
        f"Next: run runtime_preprocessing.py, which will find them there"
    )


def output_root(config: SimpleNamespace) -> Path:
    """[preprocess] path_to_save, which is made if it is missing.

    Raises UserError if it is the dataset's own folder or inside its pictures: what is written there
    would look like a part of the dataset.
    """
    dataset, root = config.preprocess.ImageNet_folder, config.preprocess.path_to_save
    found, real = _dataset_root(dataset), root.resolve()
    parts = [found / name for name in ("train", "2012_train", "2012_val", *VALIDATION)]
    inside = any(part.resolve() in (real, *real.parents) for part in parts)
    if inside or real in (dataset.resolve(), found.resolve()):
        raise UserError(
            f"[preprocess] path_to_save {root}: this folder belongs to the dataset; use another, "
            f"such as {dataset.with_name(f'{dataset.name}_preprocessed')}"
        )
    return utils.make_folder(root)


# --- the list of pictures -------------------------------------------------------------------


class Paths(Sequence[str]):
    """The paths of all pictures, as one block of bytes.

    As Python strings, the paths of ImageNet take 150 MB in each process: reading a string changes
    its reference count, so every forked process soon has its own copy.
    """

    def __init__(self, paths: Iterable[str] = ()):
        self.block, self.ends = bytearray(), array("q", [0])
        self.extend(paths)

    def extend(self, paths: Iterable[str]) -> None:
        for path in paths:
            self.block += os.fsencode(path)
            self.ends.append(len(self.block))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]  # accepts negative indices, raises IndexError
        return os.fsdecode(bytes(self.block[self.ends[index] : self.ends[index + 1]]))


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

    def use(self, index: int, function: Callable, copies: Path | None = None) -> Image.Image:
        """`function(content)` of a picture's copy in the folder `copies`. Of the original if no
        folder is given, or if a power failure has left the copy missing or broken.

        Raises BrokenPicture.
        """
        path = self.paths[index]
        if copies:
            with contextlib.suppress(BrokenPicture):
                return function(read_picture(f"{copies}/{path}", copies))
        return function(read_picture(f"{self.folder}/{path}", self.folder))

    def decoded(self, index: int, copies: Path | None = None) -> Image.Image:
        """8-bit RGB. Raises BrokenPicture."""
        return self.use(index, decode, copies)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Two checksums: one of all names and labels, one of the sizes of SAMPLED files.

        The first changes when a picture is added, removed, renamed or moved to another class. The
        second changes when pictures are replaced but keep their names. The sampled pictures are
        evenly spaced: asking for all sizes on a cold disk takes minutes.
        """
        names = self.labels, self.paths.ends, self.paths.block
        sample = np.linspace(0, len(self) - 1, min(len(self), SAMPLED)).astype(int).tolist()
        with ThreadPoolExecutor(16) as pool:  # a slow disk serves many requests at once
            sizes = np.fromiter(pool.map(size_of_file, map(self.path, sample)), np.int64)
        return f"{zlib.crc32(b''.join(names)):08x}-{zlib.crc32(sizes.tobytes()):08x}"


SAMPLED = 2000
"""Number of pictures whose sizes make the fingerprint."""


class BrokenPicture(Exception):
    """A picture that is missing or cannot be decoded. The message gives the reason."""


class Failures:
    """Counts broken pictures, and warns about each path once. Thread-safe."""

    def __init__(self, pictures: int):
        """`pictures`: the size of the set. 1 in 100 may fail."""
        self.pictures, self.allowed = pictures, max(1, pictures // 100)
        self.paths: set[str] = set()
        self.failed: set[tuple[str, int]] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.failed)

    def add(self, path: str, error: BrokenPicture, index: int = 0) -> None:
        """`index`: of the picture; a list may name one path several times."""
        with self._lock:
            self.failed.add((path, index))
            if path not in self.paths:
                self.paths.add(path)
                utils.warn(f"{path}: left out, {error}")

    def check(self) -> None:
        """Raises UserError if too many have failed."""
        if len(self) > self.allowed or len(self) == self.pictures:
            raise UserError(
                f"{len(self)} of {self.pictures} pictures could not be decoded, more than 1 in "
                f"100; replace or remove those named in the warnings (get_mu_sigma.py names all)"
            )

    def __str__(self) -> str:
        return "all could be decoded" if not self.paths else f"{len(self)} could not be decoded"


def map_pictures(
    pictures: Pictures, indices: Sequence[int], load: Callable, work: Callable, failures: Failures
) -> Iterator:
    """Yields `work(index, load(index))` for these pictures, in order, computed on all cores.

    `load` reads and decodes a picture. If it raises BrokenPicture, the picture is added to
    `failures` and its result is None. Raises UserError after the last one if too many failed, so
    that all of them are named in one pass.
    """

    def each(index: int) -> object:
        try:
            loaded = load(index)
        except BrokenPicture as error:
            failures.add(pictures.paths[index], error, index)
            return None
        return work(index, loaded)

    progress = utils.Progress(len(indices), "pictures")
    # More threads than cores, because some wait for the disk.
    for result in utils.map_in_order(each, map(int, indices), 2 * utils.cores() + 4):
        progress.add()
        yield result
    failures.check()


# --- dataset layouts ------------------------------------------------------------------------

PICTURE_SUFFIXES = (
    ".jpeg", ".jpg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jfif", ".jpe", ".jif",
    ".mpo", ".dib", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k",
)  # fmt: skip
"""Files with these suffixes count as pictures. Their content tells the format, not the suffix."""

UNUSED_SUFFIXES = (
    ".heic", ".heif", ".avif", ".jxl", ".tga", ".psd", ".svg", ".dng", ".cr2", ".nef",
)  # fmt: skip
"""Pictures that are not used."""

HIDDEN = (".", "@eaDir", "__MACOSX", "lost+found")
"""Names that begin so are left out: they are made by operating systems, not by users."""

VALIDATION = ("val", "valid", "validation", "test")
"""Possible names of the validation set's folder and of its list file."""


def training_pictures(config: SimpleNamespace) -> Pictures:
    """Finds the training set below `ImageNet_folder`. Raises UserError."""
    root = _dataset_root(config.preprocess.ImageNet_folder)
    pictures = _listed(root, "train") if _has_lists(root) else _in_class_folders(root, "train")
    if _validation_part(root) is None:
        layout = f"{pictures.layout}, no validation set: nothing can be evaluated"
        pictures = replace(pictures, layout=layout)
    return _as_expected(pictures, "train", config.train.N)


def validation_pictures(config: SimpleNamespace) -> Pictures:
    """Finds the validation set below `ImageNet_folder`, labelled like the training set.

    Raises UserError, also if only the devkit's ground truth says what the classes are.
    """
    root = _dataset_root(config.preprocess.ImageNet_folder)
    part = _validation_part(root)
    if part is None:
        kind = "list" if _has_lists(root) else "folder"
        raise UserError(
            f"{root}: no validation set, found no {kind} named {', '.join(VALIDATION)} "
            f"(lower case); training works without one, but nothing can be evaluated"
        )
    if _has_lists(root):
        pictures = _listed(root, part)
    elif _subfolders(root / part) or not _picture_names(root / part):
        pictures = _in_class_folders(root, part)
    else:
        pictures = _flat_validation(config.preprocess.ImageNet_folder, root, part)
    return _as_expected(pictures, "preprocess", config.preprocess.N)


def _validation_part(root: Path) -> str | None:
    """The name of the validation set's list or folder; None if there is none."""
    if _has_lists(root):
        return next((name for name in VALIDATION if (root / f"{name}.txt").is_file()), None)
    return next((name for name in VALIDATION if (root / name).is_dir()), None)


def _as_expected(pictures: Pictures, section: str, expected: int) -> Pictures:
    """The pictures. Raises UserError if [section] N is another number. Warns of empty classes."""
    if not len(pictures):
        raise UserError(f"{pictures.folder}: no pictures found; {_what_is_there(pictures.folder)}")
    if expected not in (0, len(pictures)):
        raise UserError(
            f"[{section}] N is {expected}, but {pictures.folder} holds {len(pictures)} pictures; "
            f"correct one of them, or set N = 0 to accept any number"
        )
    names = pictures.class_names
    counts = np.bincount(pictures.labels, minlength=len(names))
    empty = [names[label] for label in np.flatnonzero(counts == 0)]
    if empty:
        few = ", ".join(empty[:1000]) + ", …" * (len(empty) > 1000)
        utils.warn(
            f"{pictures.folder}: no pictures in {plural(len(empty), 'class')} of {len(names):,}: "
            f"{few}. The classes are those of the training set: begin a folder's name with a dot "
            f"there to leave it out; labels in lists count from 0"
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
        + (f"did you mean {meant}?" if meant else _what_is_there(folder))
    )


def _root_in(folder: Path) -> Path | None:
    """`folder` itself, or the folder inside it that Kaggle's archive uses; None if neither fits."""
    roots = (folder / below for below in (".", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC"))
    return next((root for root in roots if (root / "train").is_dir() or _has_lists(root)), None)


def _has_lists(root: Path) -> bool:
    """Whether train.txt lists the pictures."""
    return (root / "train.txt").is_file()


IMAGENET_TAR = re.compile(r"(n\d{8}|ILSVRC2012_img_.*)\.tar")
"""The archives that ImageNet comes in."""


def _what_is_there(folder: Path) -> str:
    """What is in a folder that is not a dataset, and what to do about it."""
    names = sorted(entry.name for entry in _visible(folder))
    if archive := next(filter(IMAGENET_TAR.fullmatch, names), None):
        return (
            f"it holds ImageNet's archive {archive}; unpack it as the section of README.md about "
            f"ImageNet says"
        )
    more = f" and {plural(len(names) - 8, 'other')}" if len(names) > 8 else ""
    holds = f"it holds {', '.join(names[:8])}{more}" if names else "it is empty"
    return f"{holds}. Only picture files in train/<class>/ are supported, no archives or tables"


def is_picture_name(name: str) -> bool:
    return name.lower().endswith(PICTURE_SUFFIXES)


def _picture_names(folder: Path) -> list[str]:
    """Sorted names of the pictures in `folder`, without its subfolders."""
    return sorted(entry.name for entry in _visible(folder) if is_picture_name(entry.name))


def _visible(folder: Path) -> Iterator[os.DirEntry]:
    """The files and folders in a folder that are not hidden, in no particular order."""
    with os.scandir(folder) as entries:
        yield from (entry for entry in entries if not entry.name.startswith(HIDDEN))


def _is_folder(entry: os.DirEntry) -> bool:
    """Whether this is a folder or a link to one."""
    return not entry.is_file(follow_symlinks=False) and os.path.isdir(entry.path)


def _subfolders(folder: Path) -> list[str]:
    """Sorted names of the visible folders in `folder`; empty if `folder` is not a folder."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in _visible(folder) if _is_folder(entry))


def _refuse_broken_links(folder: Path, names: Iterable[str]) -> None:
    """Raises UserError if one of the names in a folder is a link that leads nowhere. Without a
    class, the labels of all later classes would change.
    """
    for path in (folder / name for name in names):
        if not path.exists():
            raise UserError(f"{path}: this link leads nowhere; mount its disk, or remove it")


def files_below(folder: Path, below: str, here: str, seen: set[str]) -> Iterator[str]:
    """Paths, relative to `folder`, of all files in folder/below and its subfolders.

    Follows links to folders, but not to one that contains the link, nor twice to the same.
    `here`: the real path of folder/below. `seen`: the real paths of all folders so far.
    """
    seen.add(here)
    folders = []
    for entry in _visible(folder / below):
        if _is_folder(entry):
            folders.append(entry)
        else:
            yield f"{below}/{entry.name}"
    for entry in sorted(folders, key=lambda entry: (entry.is_symlink(), entry.name)):
        real = os.path.realpath(entry.path)
        if real not in seen and not f"{here}/".startswith(f"{real}/"):
            yield from files_below(folder, f"{below}/{entry.name}", real, seen)


def _near(root: Path, *names: str) -> Path | None:
    """The first of these files in `root` or, in Kaggle's tree, the three folders above it."""
    real, folders = root.resolve(), [root]
    if real.parts[-2:] == ("Data", "CLS-LOC"):
        folders += list(real.parents)[:3]
    paths = (folder / name for folder in folders for name in names)
    return next((path for path in paths if path.is_file()), None)


def _mapping(root: Path) -> list[list[str]]:
    """[class folder, readable name] for each line of the mapping file; empty if there is none."""
    file = _near(root, "LOC_synset_mapping.txt", "synset_words.txt")
    lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines() if file else []
    return [line.split(maxsplit=1) for line in lines if line.strip()]


def _ranks(root: Path) -> dict[str, int]:
    """The label of each class folder: its rank among the folders of the training set.

    Raises UserError if two of them look alike: a copy between systems may have split a class.
    """
    folder = root / "train"
    _refuse_broken_links(folder, (entry.name for entry in _visible(folder)))
    names = _subfolders(folder)
    if len({unicodedata.normalize("NFC", name) for name in names}) < len(names):
        raise UserError(f"{folder}: two class folders look alike (Unicode NFC and NFD); merge them")
    return {name: rank for rank, name in enumerate(names)}


def readable_names(root: Path, classes: Iterable[str]) -> list[str]:
    """The readable names of the classes. A class that the mapping lacks keeps its folder's name."""
    names = dict(pair for pair in _mapping(root) if len(pair) == 2)
    return [names.get(name, name) for name in classes]


def _in_class_folders(root: Path, part: str) -> Pictures:
    """The pictures in `root/part/<class>/**`. The label is the class's rank in the training set."""
    folder, rank, others = root / part, _ranks(root), []
    found = _subfolders(folder)
    if unknown := sorted(set(found).difference(rank)):
        raise UserError(
            f"{folder / unknown[0]}: not a class of the training set ({len(unknown)} such); "
            f"validation must use the class folders of {root / 'train'}, to the letter (macOS "
            f"writes accents in another way)"
        )
    paths, counts = Paths(), []
    for name in found:
        files = sorted(files_below(folder, name, os.path.realpath(folder / name), set()))
        used = list(filter(is_picture_name, files))
        others += sorted(set(files).difference(used))
        paths.extend(used)
        counts.append(len(used))
    others += sorted({entry.name for entry in _visible(folder)}.difference(found))
    _refuse_broken_links(folder, others)  # a picture that is missing is named when it is read
    _warn_of_unused(folder, others)
    layout = "Kaggle layout" if root.parts[-2:] == ("Data", "CLS-LOC") else "class folders"
    labels = np.repeat(np.array([rank[name] for name in found], np.int32), counts)
    return Pictures(folder, paths, labels, readable_names(root, rank), layout)


def _warn_of_unused(folder: Path, others: list[str]) -> None:
    """Warns if some of the files that are not used are pictures, by their suffixes."""
    unused = [path for path in others if path.lower().endswith(PICTURE_SUFFIXES + UNUSED_SUFFIXES)]
    if unused:
        utils.warn(
            f"{folder}: {plural(len(unused), 'picture')} not used, the first is "
            f"{folder / unused[0]}; move them into class folders, and convert other formats to "
            f"JPEG or PNG. Suffixes that are used: {', '.join(PICTURE_SUFFIXES)}"
        )


def _flat_validation(home: Path, root: Path, part: str) -> Pictures:
    """All pictures directly in val/, with their classes from Kaggle's LOC_val_solution.csv."""
    folder, rank = root / part, _ranks(root)
    names, solution = _picture_names(folder), _near(root, "LOC_val_solution.csv")
    if solution is None:
        raise UserError(
            f"{folder}: its pictures are not in class folders; put Kaggle's LOC_val_solution.csv "
            f"into {home}, or move the pictures into {folder}/<class>/ (for ImageNet, run "
            f"valprep.sh from soumith/imagenetloader.torch in {folder}). The devkit's "
            f"ILSVRC2012_validation_ground_truth.txt does not help: it numbers the classes in the "
            f"devkit's own order, not in sorted order"
        )
    with open(solution, newline="", encoding="utf-8-sig", errors="replace") as file:
        try:
            rows = [row for row in csv.reader(file) if len(row) == 2 and row[1].strip()]
        except csv.Error as error:
            raise UserError(f"{solution}: {error}; copy it anew from Kaggle") from None
    wnids = {name: answer.split()[0] for name, answer in rows}
    labels = [rank.get(wnids.get(Path(name).stem), -1) for name in names]
    if -1 in labels:
        raise UserError(
            f"{folder / names[labels.index(-1)]}: {solution} gives no class for it that is in "
            f"{root / 'train'}"
        )
    labels = np.array(labels, np.int32)
    return Pictures(folder, Paths(names), labels, readable_names(root, rank), "Kaggle layout")


def _listed(root: Path, part: str) -> Pictures:
    """The pictures in `train.txt` or `val.txt`. Each line is `filename label`."""
    near = [root / name for name in (f"2012_{part}", f"2012_{part[:3]}", part)]
    folder = next((each for each in near if each.is_dir()), None)
    if folder is None:
        raise UserError(
            f"{near[-1]}: no such folder; the pictures in {root / part}.txt must be there, or in "
            f"2012_{part}/"
        )
    paths, labels = trained = _read_list(root / "train.txt")
    if part != "train":
        paths, labels = _read_list(root / f"{part}.txt")
        last = trained[1].max()
        if len(beyond := np.flatnonzero(labels > last)):
            raise UserError(
                f"{root / part}.txt: {paths[beyond[0]]} has label {labels[beyond[0]]}, but the "
                f"largest label in {root / 'train.txt'} is {last}"
            )
    return Pictures(folder, paths, labels, _names_of_labels(root, *trained), "list files")


def _names_of_labels(root: Path, paths: Paths, labels: np.ndarray) -> list[str]:
    """Class names: from a mapping with one line per class, else the folders, else the labels."""
    mapping, classes = _mapping(root), 1 + int(labels.max())
    if len(mapping) == classes:
        return [pair[-1] for pair in mapping]
    of_each = (os.path.dirname(os.path.normpath(path)) for path in paths)
    pairs = set(zip(labels.tolist(), of_each, strict=True))
    folders = dict(pairs)
    one_to_one = len(pairs) == len(folders) == len(set(folders.values())) == classes
    if one_to_one and all(folders.values()):
        return [folders[label] for label in range(classes)]
    return [str(label) for label in range(classes)]


LIST_LINE = re.compile(r"\s*([^\0]*\S)\s+([0-9]{1,6})\s*")
"""Of a list of pictures: `filename label`."""


def _read_list(file: Path) -> tuple[Paths, np.ndarray]:
    """The paths and the labels, int32 [n], in `filename label` lines. Raises UserError."""
    paths, labels = Paths(), array("i")
    content = utils.read_file(file).removeprefix(codecs.BOM_UTF8)
    for number, line in enumerate(map(os.fsdecode, io.BytesIO(content)), 1):
        where = f"{file}: line {number}"
        if match := LIST_LINE.fullmatch(line):
            if os.path.isabs(match[1]) or ".." in Path(match[1]).parts:
                raise UserError(f"{where}: {match[1]} is outside the picture folder")
            paths.extend([match[1]])
            labels.append(int(match[2]))
        elif line.strip():
            raise UserError(
                f"{where}: expected 'filename label' in UTF-8, not {line.strip()!r}; if this is no "
                f"list of pictures, rename it"
            )
    if not labels:
        raise UserError(f"{file}: lists no pictures; if it is no list of pictures, rename it")
    return paths, np.array(labels, np.int32)


# --- reading and decoding a picture ---------------------------------------------------------

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000")

LONGEST = 100
"""Largest ratio of a picture's longer side to its shorter side. Copies of longer pictures would not
fit into a JPEG file (65,535 pixels), and barely into memory."""

NO_FILE = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO,
    errno.EFBIG,
)  # fmt: skip
"""These errors mean that the path is no picture's. All others mean that the storage failed."""

PILLOW_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, ArithmeticError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow raises for broken files. Caught only around calls to Pillow."""

# Decoders' own messages would name no picture, and come in each epoch again. Pillow's warnings are
# about broken EXIF data. Pillow passes libtiff's messages on to nobody, so libtiff prints them.
warnings.filterwarnings("ignore", module="PIL")
logging.getLogger("PIL").addHandler(logging.NullHandler())
with contextlib.suppress(OSError, AttributeError):  # a Pillow without libtiff
    _libraries = ctypes.CDLL(Image.core.__file__)
    _libraries.TIFFSetWarningHandler(None)
    _libraries.TIFFSetErrorHandler(None)


def read_picture(path: str | Path, folder: str | Path = "/") -> bytes:
    """The content of a picture's file.

    Raises BrokenPicture if there is no such file, or if it is too large for a picture. If `folder`,
    which holds the pictures, is missing too, its disk may be unmounted for a moment: waits for it,
    and raises UserError if it does not come back. Any other OSError comes from the storage too, and
    does not mean that the picture is broken.
    """

    def read(path: str | Path) -> bytes:
        for _ in range(2):  # the folder may come back after the first look, before the question
            try:
                return utils.read_file(path)
            except OSError as error:
                if error.errno not in NO_FILE:
                    raise
                reason = os.strerror(error.errno).lower()
            if not os.path.isdir(folder):
                raise OSError(errno.ESTALE, "no such folder", str(folder))
        raise BrokenPicture(reason)

    return utils.patiently(read, path)


def size_of_file(path: str | Path) -> int:
    """Bytes; -1 if there is no such file."""
    try:
        return utils.patiently(os.path.getsize, path)
    except OSError as error:
        if error.errno not in NO_FILE:
            raise
        return -1


def broken(error: Exception) -> BrokenPicture:
    """What Pillow's error says about a picture.

    Catch PILLOW_ERRORS only around calls to Pillow: anywhere else, such an error is a bug and must
    not be hidden.
    """
    if isinstance(error, UnidentifiedImageError):
        return BrokenPicture(f"cannot be decoded: damaged, or not one of {', '.join(FORMATS)}")
    # Decoders also report "broken data" if memory runs out. Then this line raises MemoryError.
    np.empty(1 << 26, np.uint8)
    return BrokenPicture(f"cannot be decoded: {str(error) or type(error).__name__}")


def opened(content: bytes) -> Image.Image:
    """A picture of which only the header is read. Raises BrokenPicture if it cannot be used."""
    try:
        if content.startswith(b"\xff\xd8\xff"):  # Image.open would take a third longer for a JPEG
            image, is_misread = JpegImageFile(io.BytesIO(content)), False
        else:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            is_misread = misread(image)
    except PILLOW_ERRORS as error:
        raise broken(error) from error
    shorter, longer = sorted(image.size)
    if longer > LONGEST * shorter or shorter * longer > Image.MAX_IMAGE_PIXELS:
        why = "too long and thin" if longer > LONGEST * shorter else "too large"
        raise BrokenPicture(f"cannot be used: {image.width}×{image.height} pixels is {why}")
    if is_misread:
        raise BrokenPicture("cannot be used: its pixel format is not supported; convert it to PNG")
    return image


def misread(image: Image.Image) -> bool:
    """Whether Pillow opens the picture, but with wrong colours: as signed, floating-point, 12-bit
    or 32-bit numbers, as 16-bit colours one after the other, or as 16-bit grey from white to black.
    """
    tags = getattr(image, "tag_v2", {})
    bits = max(tags.get(BITS_PER_SAMPLE, (8,)))
    apart = (tags.get(PLANAR_CONFIGURATION), tags.get(COMPRESSION, 1)) == (2, 1)
    unsigned = set(tags.get(SAMPLE_FORMAT, (1,))) <= {1, 4}  # 4: undefined
    deep = bits > 8 and (bits != 16 or apart or tags.get(PHOTOMETRIC) == 0)
    return image.mode == "F" or not unsigned or deep


def decode(content: bytes) -> Image.Image:
    """The picture in a file's content, 8-bit RGB. Ignores EXIF orientation, as other loaders do.

    Raises BrokenPicture if it is not a picture, is too large, or is too long and thin.
    """
    return as_rgb(opened(content))


def as_rgb(image: Image.Image) -> Image.Image:
    """Decodes the pixels, 8-bit RGB, also if grey, palette, CMYK, 16-bit or transparent."""
    try:
        image.load()
        if image.mode == "RGB":
            return image
        if not image.mode.startswith("I"):
            return image.convert("RGB")
    except PILLOW_ERRORS as error:
        raise broken(error) from error
    # Grey of 16 bits: Pillow would clip it, not scale it.
    grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255)
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


BITS_PER_SAMPLE, COMPRESSION, PHOTOMETRIC, PLANAR_CONFIGURATION, SAMPLE_FORMAT = (
    258, 259, 262, 284, 339,
)  # fmt: skip
"""TIFF's tags."""


def resized_size(width: int, height: int, side: int) -> tuple[int, int]:
    """Width and height in pixels after resizing the shorter side to `side`, aspect ratio kept."""
    shorter = min(width, height)
    return round(width * side / shorter), round(height * side / shorter)


# --- cutting a crop from a picture ----------------------------------------------------------

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels."""

BoxChooser = Callable[[int, int], Box]
"""Where to cut a crop from a picture of this width and height."""


def side_box(side: int, corner: Sequence[float]) -> BoxChooser:
    """The 224x224 crop at `corner` of the picture when its shorter side is resized to `side`.

    `corner`: position from left to right and from top to bottom, two numbers in [0, 1).
    """

    def choose(width: int, height: int) -> Box:
        resized = resized_size(width, height, side)
        left, top = (int(corner[i] * (resized[i] - CROP + 1)) for i in range(2))
        across, down = width / resized[0], height / resized[1]
        return left * across, top * down, (left + CROP) * across, (top + CROP) * down

    return choose


def area_box(tries: Sequence[Sequence[float]]) -> BoxChooser:
    """A box of 8 to 100% of the area and an aspect of 3/4 to 4/3 (Szegedy et al. 2014).

    `tries`: float [n, 4] in [0, 1): area, aspect, and position from left to right and from top to
    bottom. The first box that fits into the picture is taken. If none does, because the picture is
    long and thin, its middle is taken.
    """

    def choose(width: int, height: int) -> Box:
        for area, aspect, x, y in tries:
            pixels, ratio = width * height * (0.08 + 0.92 * area), (4 / 3) ** (2 * aspect - 1)
            across, down = math.sqrt(pixels * ratio), math.sqrt(pixels / ratio)
            if across <= width and down <= height:
                left, top = x * (width - across), y * (height - down)
                return left, top, left + across, top + down
        across, down = min(width, height * 4 / 3), min(height, width * 4 / 3)
        left, top = (width - across) / 2, (height - down) / 2
        return left, top, left + across, top + down

    return choose


def crop(content: bytes, choose_box: BoxChooser) -> Image.Image:
    """A part of a picture, resized to 224x224, RGB. Raises BrokenPicture.

    Decodes and resizes no more than that part needs. These differences remain, in levels of 256:
    - at most 1, in one crop of twenty, from the same box of the whole picture, because Pillow
      chooses the order of its two passes by the height;
    - at most 2, on average 0.01, from resizing the whole picture and then cutting;
    - on average 0.6, in single pixels up to 20, if a JPEG of four times the size is halved while
      it is decoded, as copies are, too;
    - on average 1.1 if the crop is cut from a resized copy, see QUALITY.
    """
    image = opened(content)
    box = choose_box(*image.size)
    if image.format == "JPEG" and image.mode in ("L", "RGB"):
        image, box = top_of_jpeg(content, image, box) or (image, box)
    return cut(as_rgb(image), box)


def top_of_jpeg(content: bytes, image: Image.Image, box: Box) -> tuple[Image.Image, Box] | None:
    """A JPEG from its top to the bottom of the box, and the box in pixels of that part.

    libjpeg halves a large picture while decoding, as long as twice the needed pixels remain. We
    tell Pillow's decoder that the picture ends at the bottom of the box. It stops there, which
    saves a fifth of the work. It raises ValueError for the data left over, but also for broken
    data. If the last row is still black, the data may be broken: then returns None. So a picture
    that is damaged only below the box is used.
    """
    scale = min(box[2] - box[0], box[3] - box[1]) / CROP
    factor = next(f for f in (8, 4, 2, 1) if scale >= 2 * f or f == 1)
    width, height = -(-image.width // factor), -(-image.height // factor)
    box = tuple(edge / factor for edge in box)
    # Antialiasing reaches one output pixel beyond the box. One more row is for rounding.
    rows = min(int(box[3] + max((box[3] - box[1]) / CROP, 1)) + 2, height)
    part = Image.new(image.mode, (width, rows))
    try:
        part.frombytes(content, "jpeg", (image.mode, "", factor, 0))
    except ValueError:
        if rows == height or part.crop((0, rows - 1, width, rows)).getbbox() is None:
            return None
    return part, box


def cut(image: Image.Image, box: Box) -> Image.Image:
    """The part of the picture in `box`, resized to 224x224."""
    if box[2] - box[0] == CROP == box[3] - box[1]:  # nothing to resize
        return image.crop(tuple(map(int, box)))
    return image.resize((CROP, CROP), Image.Resampling.BILINEAR, box)


# --- resized copies -------------------------------------------------------------------------

NOTE = "copies.json"
"""File next to the resized copies: a `CopiesNote`."""

QUALITY = {"quality": 95, "subsampling": 0}
"""JPEG settings. The mean error on photographs is 1.1 of 256 levels (44 dB), which is invisible.
Quality 90 with halved colour resolution takes 0.56 of the disk space, at 1.9 levels (39 dB)."""


@dataclass
class CopiesNote:
    """What the resized copies in a folder are made of."""

    originals: str
    """The folder of the original pictures."""
    fingerprint: str
    complete: list[int]
    """The shorter sides at which every picture that can be decoded has a copy."""


def note_about(root: Path, pictures: Pictures) -> CopiesNote | None:
    """The note in `root`; None if there is none. Raises UserError if it is about other pictures."""
    note = utils.read_record(CopiesNote, root / NOTE)
    if note and (note.originals, note.fingerprint) != (str(pictures.folder), pictures.fingerprint):
        raise UserError(
            f"{root / NOTE}: these are copies of the pictures that were in {note.originals} then, "
            f"not of those now in {pictures.folder}; remove it and the folders 256 … 480 beside "
            f"it, or use another path_to_save (if the pictures have only moved, correct that file)"
        )
    return note


def claim_copies(root: Path, pictures: Pictures, folders: dict[int, Path]) -> CopiesNote:
    """The note about the copies in `root`, which is written if it is missing.

    Raises UserError if `root` holds copies of other pictures, or folders that preprocess.py did not
    make.
    """
    note = note_about(root, pictures)
    if note is None:
        if strange := next(filter(os.path.lexists, folders.values()), None):
            raise UserError(
                f"{strange}: not made by preprocess.py, which would have left {root / NOTE}; use "
                f"another path_to_save, or remove it"
            )
        note = CopiesNote(str(pictures.folder), pictures.fingerprint, [])
        utils.write_record(root / NOTE, note)
    return note


def copies_for(root: Path, pictures: Pictures) -> dict[int, Path]:
    """The folders with copies of all these pictures, by shorter side. Warns if some are not used.

    A single copy may be missing or broken, after a power failure: then use the original.
    """
    folders = {side: root / str(side) for side in SIDES if (root / str(side)).is_dir()}
    if not folders:
        return {}
    try:
        note = note_about(root, pictures)
    except UserError as error:
        utils.warn(f"{error}. Until then, the originals are used")
        return {}
    complete = note.complete if note else []
    if unused := [side for side in folders if side not in complete]:
        more = f" (and those at {plural(len(unused) - 1, 'other shorter side')})"
        utils.warn(
            f"{folders[unused[0]]}: copies incomplete{more * (len(unused) > 1)}; the originals are "
            f"used. Run preprocess.py --shorter_side={unused[0]} to make the copies"
        )
    return {side: folder for side, folder in folders.items() if side in complete}


def missing_copies(pictures: Pictures, folders: dict[int, Path], index: int) -> Iterator:
    """Yields shorter side and picture for each copy of a picture that is missing or empty.

    Decodes the original once, a large JPEG only to twice the size that is needed. Raises
    BrokenPicture right away, not when the first copy is requested.
    """
    name = pictures.paths[index]
    wanted = [s for s, folder in folders.items() if size_of_file(f"{folder}/{name}") <= 0]
    if not wanted:
        return iter(())
    image = pictures.use(index, opened)
    size, enough = image.size, resized_size(*image.size, 2 * max(wanted))
    reduced = image.draft(image.mode, enough)
    picture, box = as_rgb(image), reduced[1] if reduced else None
    bilinear = Image.Resampling.BILINEAR
    return ((side, picture.resize(resized_size(*size, side), bilinear, box)) for side in wanted)


def save_jpeg(image: Image.Image, path: str) -> None:
    """Saves directly to the file: to memory, Pillow would compress only one picture at a time.

    Raises OSError, also for a full disk, which Pillow does not notice.
    """
    with utils.written_aside(Path(path)) as file:
        image.save(file, "JPEG", **QUALITY)
        file.seek(-2, os.SEEK_END)
        if file.read() != b"\xff\xd9":  # the end of every JPEG
            raise OSError(errno.ENOSPC, "only part of it could be written; is the disk full?")


def say_room(pictures: Pictures, folders: dict[int, Path]) -> None:
    """Prints roughly how much disk space the missing copies need, from a sample of the pictures.

    Raises UserError if it is not free.
    """
    sizes, sample = 0, range(0, len(pictures), max(1, len(pictures) // 16))
    for index in sample:
        with contextlib.suppress(BrokenPicture):  # `make_copies` reports it
            for _, image in missing_copies(pictures, folders, index):
                copy = io.BytesIO()
                image.save(copy, "JPEG", **QUALITY)
                sizes += copy.tell()
    needed = sizes * len(pictures) / len(sample)
    root = next(iter(folders.values())).parent
    free = utils.check_room(root, needed, "the copies need about")
    print(f"about {utils.file_size(needed)} needed in {root}, {utils.file_size(free)} free")


def make_copies(pictures: Pictures, folders: dict[int, Path], failures: Failures) -> None:
    """Makes the copies that are missing. Each gets its name only when it is complete."""
    for parent in {os.path.dirname(path) for path in pictures.paths}:
        for folder in folders.values():
            utils.remove_leftovers(utils.make_folder(folder / parent))

    def load(index: int) -> Iterator:
        return missing_copies(pictures, folders, index)

    def save(index: int, copies: Iterator) -> None:
        for side, image in copies:
            save_jpeg(image, f"{folders[side]}/{pictures.paths[index]}")

    for _ in map_pictures(pictures, range(len(pictures)), load, save, failures):
        pass


if __name__ == "__main__":
    utils.run(main)
