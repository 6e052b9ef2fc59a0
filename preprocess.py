"""Makes resized copies of all training pictures, for machines that cannot feed their GPU otherwise.

    python3 preprocess.py --shorter_side=256

writes `<path_to_save>/256/<path of the original below the training folder>`: shorter side 256
pixels, aspect kept, JPEG. `--shorter_side=all` makes the 33 sides 256, 263, … 480, decoding each
original once. Started again, it goes on where it stopped. Nobody needs it: what is not there,
runtime_preprocessing.py takes from the originals; README says what it brings.
"""

import argparse
import contextlib
import csv
import errno
import io
import os
import re
import shutil
import struct
import threading
import warnings
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, UnidentifiedImageError

import utils
from utils import CROP, UserError, plural

SIDES = range(256, 481, 7)
"""The 33 shorter sides that training pictures are resized to: 256, 263, … 480 pixels."""

END_OF_IMAGE = b"\xff\xd9"
"""The last bytes of every JPEG."""

QUALITY = {"quality": 95, "subsampling": 0}
"""JPEG settings: a mean error of 1.1 levels of 256 on photographs (44 dB), which nobody sees.
Quality 90 with halved colour resolution would take 0.56 of the disk, at 1.9 levels (39 dB)."""


@dataclass(frozen=True)
class Pictures:
    """The pictures of the training or of the validation set, in a fixed order."""

    folder: Path
    paths: list[str]
    """Relative to `folder`."""
    labels: np.ndarray
    """int32 [len(paths)]: the rank of the class in sorted order."""
    class_names: list[str]
    """Readable where the dataset comes with names, else the names of the class folders."""
    layout: str

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def fingerprint(self) -> str:
        """Changes when a picture is added, removed, renamed or moved to another class."""
        checksum = zlib.crc32(self.labels.tobytes())
        for path in self.paths:
            checksum = zlib.crc32(os.fsencode(path), checksum)
        return f"{checksum:08x}"


def main() -> None:
    args = parse_arguments()
    config = utils.load_config(args.config)
    pictures = training_pictures(config)
    root = config.preprocess.path_to_save
    check_source(root, pictures)
    utils.lock(
        root / COPIES_OF,
        f"{root}: another preprocess.py adds to the copies there, or runtime_preprocessing.py "
        f"makes batches from them; wait for its end or take another path_to_save",
    )
    folders = {side: root / str(side) for side in args.shorter_side}
    jobs = missing(pictures, folders)
    total = sum(len(sides) for _, sides in jobs)
    print(
        f"{plural(len(pictures), 'training picture')}, {pictures.layout}; {total:,} of "
        f"{len(pictures) * len(folders):,} resized copies are still to be made"
    )
    failures = Failures(len(pictures))
    if total:
        check_room(pictures, jobs, total, root)
        write_all(pictures, folders, jobs, total, failures)
    print(
        f"resized copies of {plural(len(pictures) - len(failures), 'picture')} in "
        f"{plural(len(folders), 'shorter side')} are in {root}; {failures}. "
        f"Next: runtime_preprocessing.py finds them there"
    )


def parse_arguments():
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


def check_source(root: Path, pictures: Pictures) -> None:
    """Notes in `root` which pictures its copies are of. Raises UserError if they are of others."""
    utils.make_folder(root)
    note = root / COPIES_OF
    if copies_of_others(root, pictures):
        others = utils.one_line(note.read_text(errors="replace"))
        raise UserError(
            f"{root} holds copies of pictures in {others}, not in {pictures.folder}; take another "
            f"path_to_save, or remove {note} if the pictures have only moved"
        )
    if not note.exists():
        utils.write_text(note, str(pictures.folder))


def missing(pictures: Pictures, folders: dict[int, Path]) -> list[tuple[int, tuple[int, ...]]]:
    """For each picture with copies still to be made: its index and their sides.

    Creates the folders, and removes what a killed process left half-written.
    """
    in_folder = defaultdict(list)
    for index, path in enumerate(pictures.paths):
        in_folder[os.path.dirname(path)].append(index)
    jobs, same = [], {}  # equal tuples are kept once: there may be millions
    for relative, indices in in_folder.items():
        done = {}
        for side, folder in folders.items():
            utils.make_folder(folder / relative)
            utils.remove_leftovers(folder / relative)
            done[side] = set(os.listdir(folder / relative))
        for index in indices:
            name = os.path.basename(pictures.paths[index])
            if wanted := tuple(side for side in folders if name not in done[side]):
                jobs.append((index, same.setdefault(wanted, wanted)))
    jobs.sort()
    return jobs


def resized_copies(path: Path, wanted: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
    """A picture, decoded once, at each of the shorter sides in turn.

    Raises one of DECODING_ERRORS, before the first copy.
    """
    with open_picture(path) as image:
        # Twice the pixels needed are enough to resize from; libjpeg halves while decoding.
        size = resized_size(*image.size, 2 * max(wanted))
        original_size = image.size
        drafted = image.draft(image.mode, size)
        extent = drafted[1] if drafted else (0, 0, *image.size)
        picture = as_rgb(image)

    def resized(side: int) -> Image.Image:
        size = resized_size(*original_size, side)
        return picture.resize(size, Image.Resampling.BILINEAR, extent)

    return ((side, resized(side)) for side in wanted)


def save_jpeg(image: Image.Image, path: Path) -> None:
    """Straight into the file: into memory, Pillow would compress one picture at a time.

    Raises OSError, also where Pillow overlooks that the disk took only a part.
    """
    with utils.written_aside(path) as aside, open(aside, "w+b") as file:
        image.save(file, "JPEG", **QUALITY)
        file.seek(-len(END_OF_IMAGE), os.SEEK_END)
        if file.read() != END_OF_IMAGE:
            raise OSError(errno.ENOSPC, "only a part could be written; is the disk full?")


def check_room(pictures: Pictures, jobs: list, total: int, folder: Path, samples: int = 16) -> None:
    """Says about how much disk the copies will take. Raises UserError if it is not there."""
    sizes = []
    for index, wanted in jobs[:: max(1, len(jobs) // samples)]:
        try:
            for _, image in resized_copies(pictures.folder / pictures.paths[index], wanted):
                copy = io.BytesIO()
                image.save(copy, "JPEG", **QUALITY)
                sizes.append(len(copy.getvalue()))
        except DECODING_ERRORS:
            continue  # reported when its turn comes
    needed = total * sum(sizes) / max(len(sizes), 1)
    there = shutil.disk_usage(folder).free
    print(f"about {utils.file_size(needed)} needed in {folder}, {utils.file_size(there)} there")
    if needed > there:
        raise UserError(
            f"{folder}: the copies need about {utils.file_size(needed)}, but only "
            f"{utils.file_size(there)} are free"
        )


def write_all(pictures: Pictures, folders: dict, jobs: list, total: int, failures) -> None:
    """Makes the copies, each under its name only when it is whole."""

    def write(job: tuple[int, tuple[int, ...]]) -> int:
        index, wanted = job
        path = pictures.paths[index]
        try:
            copies = resized_copies(pictures.folder / path, wanted)
        except DECODING_ERRORS as error:
            failures.add(path, error)
            return len(wanted)
        for side, image in copies:
            save_jpeg(image, folders[side] / path)
        return len(wanted)

    progress = utils.Progress(total, "copies")
    for count in utils.map_in_order(write, jobs, utils.cores()):
        progress.add(count)


# --- the dataset on disk --------------------------------------------------------------------

PICTURE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Files that count as pictures. What is inside is found by looking, whatever the suffix."""


def training_pictures(config: SimpleNamespace) -> Pictures:
    """Finds the training set below `ImageNet_folder`. Raises UserError."""
    root = _dataset_root(config.preprocess.ImageNet_folder)
    pictures = _listed(root, "train") if _has_lists(root) else _in_class_folders(root)
    return _counted(pictures, "train", config.train.N)


def validation_pictures(config: SimpleNamespace) -> Pictures:
    """Finds the validation set below `ImageNet_folder`, labelled like the training set.

    Raises UserError, also where only the devkit's ground truth is there.
    """
    root = _dataset_root(config.preprocess.ImageNet_folder)
    if _has_lists(root):
        pictures = _listed(root, "val")
    else:
        classes = _subfolders(_existing(root / "train"))
        val = _existing(root / "val")
        pictures = _in_class_folders(root, "val", classes) if _subfolders(val) else None
        pictures = pictures or _flat_validation(root, val, classes)
    return _counted(pictures, "preprocess", config.preprocess.N)


def _counted(pictures: Pictures, section: str, expected: int) -> Pictures:
    if not len(pictures):
        raise UserError(
            f"{pictures.folder}: no pictures found; expected class folders with "
            f"{', '.join(PICTURE_SUFFIXES)} files in them"
        )
    if expected not in (0, len(pictures)):
        raise UserError(
            f"[{section}] N is {expected}, but {pictures.folder} holds {len(pictures)} pictures; "
            f"correct one of them, or set N = 0 to take what is found"
        )
    names = pictures.class_names
    if empty := sorted(set(range(len(names))) - set(pictures.labels.tolist())):
        utils.warn(
            f"{pictures.folder}: no pictures of {plural(len(empty), 'class')} of "
            f"{len(names):,} (labels count from 0), the first is {names[empty[0]]}"
        )
    return pictures


def _dataset_root(folder: Path) -> Path:
    """The folder that holds train/ and val/ (or the lists)."""
    _existing(folder)
    for root in (folder, folder / "ILSVRC/Data/CLS-LOC", folder / "Data/CLS-LOC"):
        if (root / "train").is_dir() or _has_lists(root):
            return root
    hint = f"; did you mean {folder.parent}?" if (folder.parent / "train").is_dir() else ""
    raise UserError(
        f"[preprocess] ImageNet_folder {folder}: found neither train/<class>/ nor "
        f"ILSVRC/Data/CLS-LOC/train/<class>/ nor train.txt and val.txt in it{hint}"
    )


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; [preprocess] ImageNet_folder must name the one that holds "
            f"train and val"
        )
    return folder


def _has_lists(root: Path) -> bool:
    return (root / "train.txt").is_file() and (root / "val.txt").is_file()


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


def _in_class_folders(root: Path, part: str = "train", classes: list[str] | None = None):
    """`root/part/<class>/**`, the classes numbered by their rank in `classes`, or in this part."""
    folder = root / part
    found = _subfolders(folder)
    classes = found if classes is None else classes
    if unknown := sorted(set(found) - set(classes)):
        raise UserError(
            f"{folder / unknown[0]}: a class that the training set does not have "
            f"({len(unknown)} such); validation needs the class folders of {root / 'train'}"
        )
    paths, labels = [], []
    for label, name in enumerate(classes):
        in_class = sorted(_picture_files(folder, name)) if name in found else []
        paths += in_class
        labels.append(np.full(len(in_class), label, np.int32))
    layout = "Kaggle layout" if root.parts[-2:] == ("Data", "CLS-LOC") else "class folders"
    labels = np.concatenate(labels) if labels else np.empty(0, np.int32)
    return Pictures(folder, paths, labels, _readable(root, classes), layout)


def _fail(error: OSError) -> None:
    raise error


def _picture_files(folder: Path, below: str) -> Iterator[str]:
    """Relative paths of the pictures in folder/below and the folders in it, hidden ones left out.

    Links to folders are not followed further down, so that a loop of links cannot trap.
    """
    for parent, folders, files in os.walk(folder / below, onerror=_fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = os.path.relpath(parent, folder)
        for name in files:
            if name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith("."):
                yield f"{relative}/{name}"


def _readable(root: Path, classes: list[str]) -> list[str]:
    """Names of the classes from LOC_synset_mapping.txt or synset_words.txt, where there is one."""
    file = _near(root, "LOC_synset_mapping.txt", "synset_words.txt")
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file else []
    names = dict(line.split(maxsplit=1) for line in lines if len(line.split(maxsplit=1)) == 2)
    return [names.get(name, name) for name in classes]


def _flat_validation(root: Path, folder: Path, classes: list[str]) -> Pictures:
    """All pictures in val/ itself, their classes in Kaggle's LOC_val_solution.csv."""
    solution = _near(root, "LOC_val_solution.csv")
    if solution is None:
        truth = _near(root, "ILSVRC2012_validation_ground_truth.txt") or next(
            iter(root.glob("*devkit*/**/ILSVRC2012_validation_ground_truth.txt")), None
        )
        why = (
            f"and {truth} does not help, because it numbers the classes in the devkit's own order, "
            f"not in sorted order"
            if truth
            else "and nothing says which class they belong to"
        )
        raise UserError(
            f"{folder}: its pictures are not in class folders, {why}; add Kaggle's "
            f"LOC_val_solution.csv or move the pictures into {folder}/<class>/"
        )
    with open(solution, newline="", encoding="utf-8", errors="replace") as file:
        rows = [row for row in csv.reader(file) if len(row) == 2 and row[1].strip()]
    wnids = {name: answer.split()[0] for name, answer in rows}
    ranks = {name: rank for rank, name in enumerate(classes)}
    names = sorted(
        name
        for name in os.listdir(folder)
        if name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith(".")
    )
    for name in names:
        if ranks.get(wnids.get(Path(name).stem)) is None:
            raise UserError(
                f"{folder / name}: {solution} gives it no class that {root / 'train'} has"
            )
    labels = np.array([ranks[wnids[Path(name).stem]] for name in names], np.int32)
    return Pictures(folder, names, labels, _readable(root, classes), "Kaggle layout")


def _listed(root: Path, part: str) -> Pictures:
    """`train.txt` or `val.txt`: a line `filename label` for each picture."""
    folder = root / f"2012_{part}"
    if not folder.is_dir():
        folder = _existing(root / part)
    train, val = _read_list(root / "train.txt"), _read_list(root / "val.txt")
    classes = 1 + max(label for _, label in train)
    for path, label in val:
        if label >= classes:
            raise UserError(
                f"{root / 'val.txt'}: {path} has label {label}, but the labels of "
                f"{root / 'train.txt'} end with {classes - 1}"
            )
    listed = train if part == "train" else val
    paths, labels = [path for path, _ in listed], np.array([n for _, n in listed], np.int32)
    return Pictures(folder, paths, labels, _names_of_labels(root, train, classes), "list files")


def _names_of_labels(root: Path, train: list[tuple[str, int]], classes: int) -> list[str]:
    """From the file with a line a class, else the folders in the list, else the labels."""
    file = _near(root, "LOC_synset_mapping.txt", "synset_words.txt")
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file else []
    names = [line.split(maxsplit=1)[-1] for line in lines if line.strip()]
    if len(names) == classes:
        return names
    folders = {label: os.path.dirname(path) for path, label in train}
    if len(folders) == len(set(folders.values())) == classes:
        return [folders[label] for label in range(classes)]
    return [str(label) for label in range(classes)]


def _read_list(file: Path) -> list[tuple[str, int]]:
    listed = []
    for number, line in enumerate(os.fsdecode(file.read_bytes()).split("\n"), 1):
        if not line.strip():
            continue
        match = re.fullmatch(r"\s*(.*\S)\s+([0-9]{1,6})\s*", line)
        if not match:
            raise UserError(f"{file}: line {number}: expected 'filename label', not {line!r}")
        path, label = match.groups()
        if os.path.isabs(path) or ".." in Path(path).parts:
            raise UserError(f"{file}: line {number}: {path} lies outside the folder of pictures")
        listed.append((path, int(label)))
    if not listed:
        raise UserError(f"{file}: lists no pictures; expected 'filename label' lines")
    return listed


COPIES_OF = "copies_of.txt"
"""Beside the resized copies: the folder of the pictures they were made from."""


def copies_of_others(root: Path, pictures: Pictures) -> bool:
    """Whether preprocess.py filled `root` from another dataset, in which names may be the same."""
    note = root / COPIES_OF
    return note.is_file() and note.read_bytes() != utils.as_written(str(pictures.folder))


# --- opening pictures -----------------------------------------------------------------------

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
LONGEST = 100
"""Pictures more than so many times as long as wide are refused: at 480 pixels of shorter side they
would not fit into a JPEG file (65,535 pixels), and hardly into memory."""

DECODING_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, ArithmeticError,
    struct.error, zlib.error, MemoryError, Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)  # fmt: skip
"""What Pillow raises for broken files of its formats."""

# Broken EXIF data is none of our business; a picture of over 89 million pixels is refused.
warnings.filterwarnings("ignore", module="PIL")
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def open_picture(path: str | Path) -> contextlib.AbstractContextManager[Image.Image]:
    """`picture_in` the file. Raises OSError besides."""
    return picture_in(utils.read_file(path))


@contextlib.contextmanager
def picture_in(content: bytes) -> Iterator[Image.Image]:
    """The picture in a file's content, not decoded yet. EXIF orientation is ignored, as in other
    loaders.

    Raises one of DECODING_ERRORS for what is no picture or of a shape beyond use.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"is none of {', '.join(FORMATS)}") from None
    with image:
        if not size_is_fit(*image.size):
            raise ValueError(f"{image.width}×{image.height} pixels is too long and thin")
        yield image


def size_is_fit(width: int, height: int) -> bool:
    """Whether a picture has pixels, no more than Pillow allows, and is not too long and thin."""
    shorter, longer = min(width, height), max(width, height)
    return 0 < longer <= LONGEST * shorter and width * height <= Image.MAX_IMAGE_PIXELS


def as_rgb(image: Image.Image) -> Image.Image:
    """The picture as 8-bit RGB, decoded: grey, palette, CMYK, 16-bit and transparent ones too."""
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip, not scale
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255)
        image = Image.fromarray(grey.astype(np.uint8))
    return image.convert("RGB")


def resized_size(width: int, height: int, side: int) -> tuple[int, int]:
    """Width and height after resizing the shorter side to `side`, aspect kept, in pixels."""
    shorter = min(width, height)
    return round(width * side / shorter), round(height * side / shorter)


class Failures:
    """Names each picture that cannot be decoded once, and counts. Safe to use from threads."""

    def __init__(self, pictures: int):
        """`pictures` is the size of the set: more than 1 in 100 of it may not fail."""
        self.allowed = max(1, pictures // 100)
        self.pictures = pictures
        self.paths: set[str] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.paths)

    def add(self, path: str, error: Exception) -> None:
        """Raises UserError when too many have failed."""
        with self._lock:
            if path in self.paths:
                return
            self.paths.add(path)
            reason = str(error) or type(error).__name__
            utils.warn(f"{path}: left out, cannot be decoded: {reason}")
            if len(self.paths) > self.allowed or len(self.paths) == self.pictures:
                raise UserError(
                    f"{len(self.paths)} of {self.pictures} pictures could not be decoded, more "
                    f"than 1 in 100; the last was {path}. Replace those warned of, or remove them"
                )

    def __str__(self) -> str:
        return "all could be decoded" if not self.paths else f"{len(self)} could not be decoded"


# --- cutting a window from a picture --------------------------------------------------------


def crop_file(path: str | Path, side: int, corner: Sequence[float]) -> Image.Image:
    """Steps 1 to 3: the 224x224 RGB crop that lies at `corner` once the shorter side is `side`.

    `corner`: two numbers in [0, 1), where between left and right, between top and bottom. Resizing
    the crop's window alone gives what resizing all and cutting gives, at a fraction of the cost.
    Raises one of DECODING_ERRORS.
    """
    content = utils.read_file(path)
    return crop_jpeg(content, side, corner) or crop_any(content, side, corner)


def crop_any(content: bytes, side: int, corner: Sequence[float]) -> Image.Image:
    """The crop of a file of any format."""
    with picture_in(content) as image:
        return cut(as_rgb(image), window(image.size, side, corner))


def crop_jpeg(content: bytes, side: int, corner: Sequence[float]) -> Image.Image | None:
    """The same for a usual JPEG, decoding no more than is needed. None: `crop_any` must see to it.

    A large picture is halved by libjpeg while decoding, as long as twice the pixels needed remain.
    Told that the picture ends where the window ends, Pillow's decoder stops there, a fifth of the
    work before the end, and complains of the data left over. The last row says whether that was
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


if __name__ == "__main__":
    utils.run(main)
