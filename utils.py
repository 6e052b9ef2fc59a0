"""What the scripts share; imported, not run.

    config = utils.load_config("config.txt")            # every key known, typed and in range
    pictures = utils.training_pictures(config)          # whatever layout the dataset has
    with utils.open_picture(path) as image: ...         # by content, 8-bit RGB

In this order: errors and command lines, config.txt, the dataset on disk, opening pictures, files
that appear whole, working through many pictures, the buffer's files, and what runs need.
"""

import argparse
import contextlib
import csv
import difflib
import errno
import fcntl
import functools
import io
import json
import math
import os
import re
import shutil
import struct
import sys
import threading
import time
import tomllib
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import IO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

CROP = 224
"""Side of the pictures that the network sees, in pixels."""

SIDES = range(256, 481, 7)
"""The 33 shorter sides that training pictures are resized to: 256, 263, … 480 pixels."""


# --- errors and command lines ---------------------------------------------------------------


class UserError(Exception):
    """A mistake of the user's or a broken input. The message names the thing and what to do."""


def run(main: Callable[[], None]) -> None:
    """Runs a script: a `UserError` becomes one line on stderr and exit status 2, no traceback.

    So does an operating-system error (no such file, no permission, disk full), which names its
    file by itself.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        main()
    except UserError as error:
        _die(str(error))
    except OSError as error:
        _die(": ".join(str(part) for part in (error.filename, error.strerror or error) if part))
    except KeyboardInterrupt:
        _stopped()


def _stopped() -> None:
    print(f"{script_name()}: stopped", file=sys.stderr)
    sys.exit(130)


def _die(message: str) -> None:
    print(f"{script_name()}: error: {one_line(message)}", file=sys.stderr)
    sys.exit(2)


def script_name() -> str:
    return Path(sys.argv[0]).name


def one_line(text: str) -> str:
    """`text` with line breaks escaped: file names may hold any character."""
    return "\\n".join(text.splitlines())


def warn(message: str) -> None:
    print(f"{script_name()}: warning: {one_line(message)}", file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """argparse with `--config`, an example under the flags, and errors of one line."""

    def __init__(self, sentence: str, example: str):
        super().__init__(
            description=sentence,
            epilog=f"example:\npython3 {example}",
            allow_abbrev=False,
            usage=argparse.SUPPRESS,  # the example says it better
            formatter_class=functools.partial(
                argparse.RawDescriptionHelpFormatter, max_help_position=26
            ),
        )
        self.add_argument(
            "--config",
            type=Path,
            default=Path(sys.argv[0]).resolve().with_name("config.txt"),
            metavar="FILE",
            help="settings (default: the config.txt beside the script)",
        )

    def error(self, message: str):
        # A misspelt flag is worth more than what is then missing.
        known = [flag for action in self._actions for flag in action.option_strings]
        for flag in [part.partition("=")[0] for part in sys.argv[1:] if part.startswith("--")]:
            if flag not in known and (close := difflib.get_close_matches(flag, known, 1)):
                message = f"unrecognized argument {flag}, did you mean {close[0]}"
        raise UserError(f"{message}; see --help")

    def add_epochs(self) -> None:
        self.add_argument(
            "--epoch_start",
            type=whole(0),
            required=True,
            metavar="E",
            help="first epoch, counted from 0",
        )
        self.add_argument(
            "--epoch_end", type=whole(1), required=True, metavar="E", help="epoch to stop before"
        )

    def parse(self) -> argparse.Namespace:
        """The arguments. Raises UserError."""
        args = self.parse_args()
        for name, value in vars(args).items():
            if value == []:  # what argparse makes of --flag=--
                self.error(f"argument --{name}: expected one argument")
        if getattr(args, "epoch_end", None) is not None and args.epoch_end <= args.epoch_start:
            raise UserError(
                f"--epoch_end={args.epoch_end} must be larger than "
                f"--epoch_start={args.epoch_start}: it is the epoch to stop before"
            )
        return args


def whole(minimum: int) -> Callable[[str], int]:
    """Argument type: a whole number of at least `minimum`."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text) or int(text) < minimum:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {minimum}, not {text!r}"
            )
        return int(text)

    return parse


def number(minimum: float, maximum: float = math.inf) -> Callable[[str], float]:
    """Argument type: a finite number in [minimum, maximum]."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and minimum <= value <= maximum):
            span = f"of at least {minimum}" if maximum == math.inf else f"{minimum} to {maximum}"
            raise argparse.ArgumentTypeError(f"expected a number {span}, not {text!r}")
        return value

    return parse


# --- config.txt -----------------------------------------------------------------------------


class Key(NamedTuple):
    """What a key of config.txt may hold. A key with a `default` may be left out."""

    type: type
    minimum: float = -math.inf
    maximum: float = math.inf
    default: object = None

    @property
    def expected(self) -> str:
        if self.type is Path:
            return 'a path in quotes, such as "/data/imagenet"'
        kind = "a whole number" if self.type is int else "a number"
        if self.maximum < math.inf:
            return f"{kind} from {self.minimum:g} to {self.maximum:g}"
        return f"{kind} of at least {self.minimum:g}"


_FRACTION = Key(float, 0, 1)
KEYS: dict[str, dict[str, Key]] = {
    "preprocess": {
        "ImageNet_folder": Key(Path),
        "path_to_save": Key(Path),
        "N": Key(int, 0, 10**12),
    },
    "get_mu_sigma": {"path_to_save": Key(Path)},
    "train": {
        "buffer_folder": Key(Path),
        "path_for_saving": Key(Path),
        "N": Key(int, 0, 10**12),
        "sgd_momentum": Key(float, 0, 0.9999),
        "buffer_size": Key(int, 1, 10_000_000),
        "sleep_time": Key(float, 0.01, 86_400),
        "seed": Key(int, 0, 2**31 - 1, default=0),
    },
    "batch_renorm": {
        "moving_avgs_momentum": Key(float, 0, 0.999999),
        "rmax_max": Key(float, 1, 1e6),
        "dmax_max": Key(float, 0, 1e6),
        "start_relaxing_rmax": Key(int, 0, 10**12),
        "reach_rmax_max": Key(int, 0, 10**12),
        "start_relaxing_dmax": Key(int, 0, 10**12),
        "reach_dmax_max": Key(int, 0, 10**12),
    },
    "runtime_preprocessing": {
        "sleep_time": Key(float, 0.01, 86_400),
        "num_of_threads": Key(int, 1, 1024),
    },
    "utils": {
        "mu_0": _FRACTION, "mu_1": _FRACTION, "mu_2": _FRACTION,
        "sigma_0": Key(float, 0.001, 1), "sigma_1": Key(float, 0.001, 1),
        "sigma_2": Key(float, 0.001, 1),
    },
    "l2": {"l2_penalty": Key(float, 0, 1)},
}  # fmt: skip


def load_config(file: Path) -> SimpleNamespace:
    """Every section and key of `KEYS` as attributes: `load_config(f).train.buffer_size`.

    Paths are absolute `Path`s: `~` and environment variables expanded, relative ones taken from
    the folder of `file`. Raises UserError: a line that names file, section, key and expectation.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
        sections = tomllib.loads(text)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; --config names the settings to use") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start})") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{file}: {error}{_quoting_hint(text, str(error))}") from None
    except (ValueError, RecursionError):  # thousands of digits, or of brackets
        raise UserError(f"{file}: holds a value that is too long to be read") from None
    _check_names(str(file), "section", sections, KEYS)
    config = SimpleNamespace()
    for section, keys in KEYS.items():
        values = sections[section]
        where = f"{file}: [{section}]"
        if not isinstance(values, dict):
            raise UserError(f"{file}: {section} must be a section: a line [{section}] of its own")
        _check_names(where, "key", values, keys)
        checked = {
            name: _check_value(f"{where} {name}", values.get(name, key.default), key, file.parent)
            for name, key in keys.items()
        }
        setattr(config, section, SimpleNamespace(**checked))
    for limit in ("rmax", "dmax"):
        start = getattr(config.batch_renorm, f"start_relaxing_{limit}")
        reach = getattr(config.batch_renorm, f"reach_{limit}_max")
        if reach < start:
            raise UserError(
                f"{file}: [batch_renorm] reach_{limit}_max is {reach}, before "
                f"start_relaxing_{limit} = {start}; expected the same step or a later one"
            )
    return config


def _check_names(where: str, kind: str, found: dict, known: dict) -> None:
    """Raises UserError for a name that is unknown, or known and missing without a default."""
    for name in found:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
            raise UserError(f"{where}: unknown {kind} {name}; {hint}")
    for name, key in known.items():
        if name not in found and (kind == "section" or key.default is None):
            expected = "" if kind == "section" else f"; expected {key.expected}"
            raise UserError(f"{where}: missing {kind} {name}{expected}")


def _check_value(where: str, value: object, key: Key, folder: Path) -> object:
    """The value in the type of its key. Raises UserError."""
    accepted = {Path: str, int: int, float: (int, float)}[key.type]
    if not isinstance(value, accepted) or isinstance(value, bool):
        raise UserError(f"{where}: expected {key.expected}, not {_toml(value)}")
    if key.type is Path:
        if not value.strip() or "\0" in value:
            raise UserError(f"{where}: expected {key.expected}, not {_toml(value)}")
        path = os.path.expanduser(os.path.expandvars(value))
        if unset := re.search(r"\$(\w+|\{\w+\})", path):
            raise UserError(f"{where}: the environment variable {unset[0]} is not set")
        return Path(os.path.abspath(folder / path))
    if not key.minimum <= value <= key.maximum:
        raise UserError(f"{where}: expected {key.expected}, not {_toml(value)}")
    return key.type(value)


def _toml(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _quoting_hint(text: str, error: str) -> str:
    """A hint where the line that TOML stumbled over looks like an unquoted path."""
    number = re.search(r"line (\d+)", error)
    line = text.splitlines()[int(number[1]) - 1] if number else ""
    if match := re.match(r"\s*(\w+)\s*=\s*([~$./A-Za-z].*?)\s*(#.*)?$", line):
        return f'; text and paths need quotes: {match[1]} = "{match[2]}"'
    if re.search("[“”„‘’]", line):
        return '; write straight quotes: "'
    if re.search(r"=\s*\d+,\d", line):
        return "; write decimal numbers with a point"
    if "\\" in line:
        return "; a backslash in quotes begins an escape: write paths with /"
    if re.match(r"\s*\w+\s*:", line):
        return "; write key = value, not key: value"
    return ""


# --- the dataset on disk --------------------------------------------------------------------

PICTURE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Files that count as pictures. What is inside is found by looking, whatever the suffix."""


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
        warn(
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


CLASS_NAMES = "class_names.txt"
"""Beside the validation crops and among the assets of a model: a name a line, by label."""


def write_class_names(file: Path, names: list[str]) -> None:
    write_text(file, "\n".join(map(one_line, names)) + "\n")


def warn_of_other_classes(model: Path, names: list[str], where: str) -> None:
    """Warns where a saved model has another name for a class: its labels may mean other things."""
    file = model / "assets" / CLASS_NAMES
    known = file.read_bytes().splitlines() if file.is_file() else []
    for label, (its, name) in enumerate(zip(known, map(one_line, names), strict=False)):
        if its != _as_written(name):
            warn(
                f"{model}: its class {label} is {os.fsdecode(its)}, but {name} in {where}; unless "
                f"these are two names of the same thing, the labels do not fit"
            )
            return


COPIES_OF = "copies_of.txt"
"""Beside the resized copies: the folder of the pictures they were made from."""


def copies_of_others(root: Path, pictures: Pictures) -> bool:
    """Whether preprocess.py filled `root` from another dataset, in which names may be the same."""
    note = root / COPIES_OF
    return note.is_file() and note.read_bytes() != _as_written(str(pictures.folder))


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
    return picture_in(read_file(path))


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


def read_file(path: str | Path) -> bytes:
    """The file's content, in the fewest system calls: between threads, each costs a hand-over."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe must not block
    try:
        size = os.fstat(descriptor).st_size
        content = os.read(descriptor, size)
        while len(content) < size and (more := os.read(descriptor, size - len(content))):
            content += more
        return content
    finally:
        os.close(descriptor)


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


# --- files that appear whole ----------------------------------------------------------------

_ASIDE = re.compile(r"\..+\.aside-(\d+)-\d+")


def aside_name(path: Path) -> Path:
    """A name beside `path`, this thread's own, that `remove_leftovers` knows."""
    return path.with_name(f".{path.name}.aside-{os.getpid()}-{threading.get_ident()}")


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, renamed to `path` when all went well, else removed.

    So a file under its own name is always complete, whenever the process is killed.
    """
    aside = aside_name(path)
    try:
        yield aside
        os.replace(aside, path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a write that failed, because the disk is full
        raise


@functools.cache
def npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """What a .npy file of such an array begins with."""
    file, form = io.BytesIO(), np.lib.format
    descr = form.dtype_to_descr(np.dtype(dtype))
    content = {"descr": descr, "fortran_order": False, "shape": shape}
    form.write_array_header_1_0(file, content)
    return file.getvalue()


def array_file_size(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of the .npy file of such an array."""
    return len(npy_header(dtype, shape)) + math.prod(shape) * np.dtype(dtype).itemsize


@contextlib.contextmanager
def array_written_aside(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> Iterator[IO[bytes]]:
    """A .npy file of such an array, open for its content; `path` once that is written.

    Raises OSError with its errno, which np.save swallows.
    """
    with written_aside(path) as aside, open(aside, "wb") as file:
        file.write(npy_header(dtype, shape))
        yield file


def save_array(path: Path, array: np.ndarray) -> None:
    """What np.save writes."""
    with array_written_aside(path, array.dtype, array.shape) as file:
        file.write(np.ascontiguousarray(array).data)


def load_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The array in a .npy file. Raises ValueError if it holds anything else than expected.

    Header and length are compared with what they must be, and never interpreted: whatever lies in
    the file, nothing is executed and no memory is taken for it.
    """
    content, header = read_file(path), npy_header(dtype, shape)
    if not content.startswith(header):
        raise ValueError(f"{path}: does not hold {np.dtype(dtype)} {list(shape)}")
    if len(content) != array_file_size(dtype, shape):
        raise ValueError(f"{path}: is cut off, or longer than its array")
    return np.frombuffer(content, dtype, offset=len(header)).reshape(shape)


@contextlib.contextmanager
def folder_written_aside(folder: Path) -> Iterator[Path]:
    """The same for a folder, which must not be there yet. Its files are on the disk, not only in
    memory, before it appears: not even a power failure leaves half a folder.
    """
    aside = aside_name(folder)
    try:
        aside.mkdir()
        yield aside
        for path in aside.rglob("*"):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        os.rename(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def is_leftover(name: str) -> bool:
    """Whether a file of this name was left by a process that was killed within `written_aside`.

    Not if that process is still at work.
    """
    match = _ASIDE.fullmatch(name)
    alive = match and int(match[1]) != os.getpid() and Path(f"/proc/{match[1]}").exists()
    return match is not None and not alive


def write_text(path: Path, text: str) -> None:
    with written_aside(path) as aside:
        aside.write_bytes(_as_written(text))


def _as_written(text: str) -> bytes:
    """UTF-8, with escapes for what came from names that are not."""
    return text.encode("utf-8", "backslashreplace")


def remove_leftovers(folder: Path) -> None:
    """Removes what processes killed within `written_aside` or `folder_written_aside` left here."""
    for path in folder.iterdir():
        if is_leftover(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def make_folder(folder: Path) -> Path:
    """Creates the folder where it is missing. Raises UserError where it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{folder}: not a folder, but a file lies there or above it") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be created: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: cannot be written to: Permission denied")
    return folder


def lock(path: Path, refusal: str, shared: bool = False) -> int:
    """Takes the lock on a file (made where missing) or folder until the process ends.

    Several may share a lock that nobody has alone. Returns the descriptor that holds it. Raises
    UserError with `refusal` if another has it.
    """
    flags = os.O_RDONLY if shared or path.is_dir() else os.O_RDWR | os.O_CREAT
    descriptor = os.open(path, flags, 0o666)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(refusal) from None
    return descriptor


# --- working through many pictures ----------------------------------------------------------


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
            warn(f"{path}: left out, cannot be decoded: {reason}")
            if len(self.paths) > self.allowed or len(self.paths) == self.pictures:
                raise UserError(
                    f"{len(self.paths)} of {self.pictures} pictures could not be decoded, more "
                    f"than 1 in 100; the last was {path}. Replace those warned of, or remove them"
                )

    def __str__(self) -> str:
        return "all could be decoded" if not self.paths else f"{len(self)} could not be decoded"


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


def map_in_order(function: Callable, items: Iterable, threads: int) -> Iterator:
    """`function(item)` for each item, on so many threads, results in the order of the items.

    Holds a few results a thread at a time, however many items there are.
    """
    pool = ThreadPoolExecutor(threads)
    pending = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= 4 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class Progress:
    """Shows done/total, rate and time left: a bar on a terminal, else a line now and then."""

    def __init__(self, total: int, unit: str, done: int = 0):
        self.total, self.unit, self.done = total, unit, done
        self._start, self._first = time.monotonic(), done
        self._terminal = sys.stdout.isatty()
        self._next, self._pause = 0.0, 0.2 if self._terminal else 5.0

    def add(self, count: int = 1) -> None:
        self.done += count
        now = time.monotonic()
        if now >= self._next or self.done == self.total:
            self._next = now + self._pause
            self._show()
            if not self._terminal:
                self._pause = min(60.0, self._pause * 1.5)

    @property
    def rate(self) -> float:
        """Items a second since the start."""
        return (self.done - self._first) / max(time.monotonic() - self._start, 1e-9)

    def _show(self) -> None:
        left = duration((self.total - self.done) / self.rate) if self.rate else "?"
        rate = f"{self.rate:,.0f}" if self.rate >= 10 else f"{self.rate:.1f}"
        text = f"{self.done:,} of {self.total:,} {self.unit}, {rate}/s, {left} left"
        if self._terminal:
            filled = round(30 * self.done / max(self.total, 1))
            end = "\n" if self.done == self.total else ""
            print(f"\r{'█' * filled}{'░' * (30 - filled)} {text}  ", end=end, flush=True)
        else:
            print(text, flush=True)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 45 s, 3 min 20 s, 2 h 05 min, 6 d 4 h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    if seconds < 86_400:
        return f"{seconds // 3600} h {seconds // 60 % 60:02d} min"
    return f"{seconds // 86_400} d {seconds // 3600 % 24} h"


_PLURALS = {"class": "classes", "batch": "batches"}


def plural(count: int, noun: str) -> str:
    """A number and its noun: 1 epoch, 2 epochs, 1,000 classes."""
    return f"1 {noun}" if count == 1 else f"{count:,} {_PLURALS.get(noun, noun + 's')}"


def file_size(count: float) -> str:
    """Bytes as a person says them: 512 B, 19.3 MB, 1.2 TB (powers of 1000, as disks are sold)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


# --- the buffer -----------------------------------------------------------------------------

BUFFER_FORMAT = 1
_BATCH_FILE = re.compile(r"([XY])_(0|[1-9][0-9]*)_(0|[1-9][0-9]*)\.npy")
Position = tuple[int, int]
"""(epoch, batch), both counted from 0."""


def batch_files(folder: Path, position: Position) -> tuple[Path, Path]:
    """Paths of the pictures and of the labels of a batch."""
    epoch, batch = position
    return folder / f"X_{epoch}_{batch}.npy", folder / f"Y_{epoch}_{batch}.npy"


def parse_batch_name(name: str) -> tuple[str, Position] | None:
    """("X" or "Y", position) of a batch file's name, None for any other name."""
    match = _BATCH_FILE.fullmatch(name)
    return (match[1], (int(match[2]), int(match[3]))) if match else None


def is_batch_file(path: Path) -> bool:
    """Whether a file of a batch's name begins as one does, whatever its size."""
    dtype, rest = ("<f2", f", {CROP}, {CROP}, 3)") if path.name[0] == "X" else ("<i4", ",)")
    with open(path, "rb") as file:
        start = file.read(128)
    return start.startswith(b"\x93NUMPY") and dtype.encode() in start and rest.encode() in start


def write_progress(folder: Path, position: Position) -> None:
    """Says which batch training needs next."""
    write_text(folder / "training_progress.txt", f"{position[0]}\n{position[1]}\n")


def read_progress(folder: Path) -> Position | None:
    """The batch that training needs next; None if the file is missing or holds anything else."""
    try:
        text = (folder / "training_progress.txt").read_bytes()
    except FileNotFoundError:
        return None
    match = re.fullmatch(rb"\s*(\d{1,9})\s+(\d{1,9})\s*", text)
    return (int(match[1]), int(match[2])) if match else None


def read_json(path: Path) -> dict | None:
    """A JSON object from a file; None if the file is missing or holds anything else."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def mu_sigma(config: SimpleNamespace) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the three channels, RGB, pixels scaled to 0…1."""
    values = config.utils
    return [values.mu_0, values.mu_1, values.mu_2], [values.sigma_0, values.sigma_1, values.sigma_2]


def batches_per_epoch(pictures: int, batch_size: int, workers: int = 1) -> int:
    """Raises UserError if the pictures do not make a single batch."""
    if batch_size > pictures // workers:
        share = f"a {workers}-th of " if workers > 1 else ""
        raise UserError(
            f"--batch_size={batch_size} is larger than {share}the {pictures} training pictures"
        )
    return pictures // workers // batch_size


def worker() -> tuple[int, int]:
    """This machine's index and the number of machines that train together, from TF_CONFIG.

    (0, 1) where the variable is not set. The chief is worker 0. Raises UserError.
    """
    text = os.environ.get("TF_CONFIG", "")
    if not text.strip():
        return 0, 1
    try:
        settings = json.loads(text)
        cluster, task = settings["cluster"], settings["task"]
        chiefs, others = len(cluster.get("chief", [])), len(cluster.get("worker", []))
        index = int(task["index"]) + (chiefs if task["type"] == "worker" else 0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            'TF_CONFIG: expected {"cluster": {"worker": ["host:port", …]}, '
            f'"task": {{"type": "worker", "index": 0}}}}, not {one_line(text)[:80]}'
        ) from None
    if task["type"] not in ("chief", "worker") or not 0 <= index < chiefs + others:
        raise UserError(f"TF_CONFIG: task {task} is none of the cluster's {chiefs + others}")
    return index, chiefs + others


# --- runs, devices, events: what train.py and check_accuracy.py share -------------------------


def run_folder(config: SimpleNamespace, name: str) -> Path:
    """The folder of a run. Raises UserError for a name that would lead elsewhere."""
    if not re.fullmatch(r"[\w][\w.+ -]*", name):
        raise UserError(
            f"--run_folder={name}: expected a plain name of letters, digits and . _ + -, which "
            f"becomes a folder below path_for_saving"
        )
    return config.train.path_for_saving / name


@contextlib.contextmanager
def quiet_tensorflow() -> Iterator[None]:
    """Keeps what TensorFlow's libraries say while it is imported from the terminal.

    With --verbose on the command line it is shown. Ctrl-C meanwhile ends the script without ado.
    """
    if "--verbose" in sys.argv:
        yield
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    terminal = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    except KeyboardInterrupt:
        os.dup2(terminal, 2)
        _stopped()
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)


def gpu_list(text: str) -> list[int]:
    """Argument type: "0" or "0,1"."""
    gpus = [whole(0)(part) for part in text.split(",")]
    if len(set(gpus)) < len(gpus):
        raise argparse.ArgumentTypeError(f"expected different GPUs, not {text!r}")
    return gpus


def choose_gpus(wanted: list[int], required: bool) -> list:
    """Makes TensorFlow see these GPUs alone, their memory taken as needed. None there: the CPU.

    Raises UserError if the GPUs are `required` and one is not there.
    """
    import tensorflow as tf

    there = tf.config.list_physical_devices("GPU")
    if required and max(wanted) >= len(there):
        raise UserError(
            f"--gpu={','.join(map(str, wanted))}: TensorFlow finds "
            f"{f'{len(there)} GPUs, counted from 0' if there else 'no GPU'} on this machine"
        )
    chosen = [there[i] for i in wanted if i < len(there)]
    tf.config.set_visible_devices(chosen, "GPU")
    for gpu in chosen:
        tf.config.experimental.set_memory_growth(gpu, True)
    return chosen


def write_event(name: str, value: float) -> None:
    """A scalar for TensorBoard, to the default writer, without the tensorboard package.

    TensorBoard shows those of a group together, whose name stands before a slash.
    """
    import tensorflow as tf

    metadata = tf.compat.v1.SummaryMetadata(
        plugin_data=tf.compat.v1.SummaryMetadata.PluginData(plugin_name="scalars")
    )
    tf.summary.write(name, tf.constant(value, tf.float32), metadata=metadata)


def is_no_room(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
