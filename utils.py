"""What the scripts share; imported, not run.

    config = utils.load_config("config.txt")            # every key known, typed and in range
    with utils.written_aside(path) as aside: ...        # a file appears whole or not at all
    for result in utils.map_in_order(work, items, 4): ...

In this order: errors and command lines, config.txt, files that appear whole, working through many
things, TensorFlow's devices and events. Nothing here knows pictures or training.
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
import sys
import threading
import time
import tomllib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import IO, NamedTuple

import numpy as np

CROP = 224
"""Side of the pictures that the network sees, in pixels."""


# --- errors and command lines ---------------------------------------------------------------


class UserError(Exception):
    """A mistake of the user's or a broken input. The message names the thing and what to do."""


def run(main: Callable[[], None]) -> None:
    """Runs a script: a `UserError` becomes one line on stderr and exit status 2, no traceback.

    So does an operating-system error (no such file, no permission, disk full), which names its
    file by itself.
    """
    sys.stdout, sys.stderr = _Output.stream(1), _Output.stream(2)
    try:
        main()
    except UserError as error:
        _die(str(error))
    except OSError as error:
        _die(": ".join(str(part) for part in (error.filename, error.strerror or error) if part))
    except KeyboardInterrupt:
        _stopped()


class _Output(io.FileIO):
    """A file that never fails to be written: a closed pipe or a full disk must not stop a script.

    What cannot be written is lost; the state of a training is not.
    """

    def write(self, data: bytes) -> int:
        try:
            return super().write(data) or len(data)
        except OSError:
            return len(data)

    @classmethod
    def stream(cls, descriptor: int) -> io.TextIOWrapper:
        """Text output to the descriptor, line by line; to nowhere if it is not open."""
        try:
            os.fstat(descriptor)
            file = cls(descriptor, "w", closefd=False)
        except OSError:
            file = cls(os.devnull, "w")
        return io.TextIOWrapper(
            io.BufferedWriter(file), "utf-8", "backslashreplace", line_buffering=True
        )


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


REQUIRED = object()
"""The default of a flag that has none."""


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

    def add(
        self, flag: str, kind: Callable | tuple | None, text: str, default: object = None
    ) -> None:
        """A flag: `kind` is the function that parses its value, a tuple of the values that it may
        have, or None for a flag without a value. It is required if `default` is REQUIRED.
        """
        if kind is None:
            self.add_argument(flag, action="store_true", help=text)
            return
        parse = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        need = {"required": True} if default is REQUIRED else {"default": default}
        self.add_argument(
            flag,
            help=text,
            metavar="NAME" if isinstance(kind, tuple) else METAVARS.get(kind, "N"),
            **parse,
            **need,
        )

    def add_run(self) -> None:
        self.add("--run_folder", run_name, "name of the run, and of its folder", REQUIRED)

    def add_epochs(self) -> None:
        self.add("--epoch_start", whole(0), "first epoch, counted from 0", REQUIRED)
        self.add("--epoch_end", whole(1), "epoch to stop before", REQUIRED)

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


def run_name(text: str) -> str:
    """Argument type: a plain name, which becomes a folder below path_for_saving."""
    if not re.fullmatch(r"[\w][\w.+ -]*", text):
        raise argparse.ArgumentTypeError(
            f"expected a plain name of letters, digits and . _ + -, not {text!r}"
        )
    return text


METAVARS = {str: "NAME", Path: "FILE", run_name: "NAME"}


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

    Also `utils.mu` and `utils.sigma`, the three channels' values in one list each.

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
    colours = config.utils
    colours.mu = [colours.mu_0, colours.mu_1, colours.mu_2]
    colours.sigma = [colours.sigma_0, colours.sigma_1, colours.sigma_2]
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


# --- files that appear whole ----------------------------------------------------------------


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
        aside.write_bytes(as_written(text))


def as_written(text: str) -> bytes:
    """UTF-8, with escapes for what came from names that are not."""
    return text.encode("utf-8", "backslashreplace")


def read_csv(path: Path, columns: Iterable[str] = ()) -> list[dict[str, str]]:
    """The whole rows of a table, as text by column; none if there is no such file.

    A row that was cut off or whose table lacks one of `columns` is left out.
    """
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        rows = list(csv.DictReader(file))
    return [
        row for row in rows if not {None} & {*row, *row.values()} and row.keys() >= set(columns)
    ]


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[dict]) -> None:
    """The table, written aside. Numbers that are not whole get six digits."""
    with written_aside(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: csv_cell(value) for name, value in row.items()} for row in rows)


def csv_cell(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


CLASS_NAMES = "class_names.txt"
"""Beside the validation crops and among the assets of a model: a name a line, by label."""


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """A line for each text; line breaks within one are escaped."""
    write_text(path, "".join(f"{one_line(line)}\n" for line in lines))


def read_lines(path: Path) -> list[str]:
    """What `write_lines` wrote; nothing if there is no such file."""
    return os.fsdecode(path.read_bytes()).splitlines() if path.is_file() else []


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


def read_json(path: Path) -> dict | None:
    """A JSON object from a file; None if the file is missing or holds anything else."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock on a file; not if there is no such file."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


# --- working through many things ------------------------------------------------------------


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


# --- TensorFlow's devices and events --------------------------------------------------------


@contextlib.contextmanager
def quiet_tensorflow() -> Iterator[None]:
    """Keeps what TensorFlow's libraries say while it is imported from the terminal.

    --verbose shows it. The flag is looked up here, before the command line is parsed, because
    TensorFlow reads its environment when it is imported. Ctrl-C meanwhile just ends the script.
    """
    # On processors without AVX-512 TensorFlow leaves oneDNN off, which makes a step a fifth slower.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
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


class EventFile:
    """Scalars for TensorBoard, without the tensorboard package. An event file is a TFRecord file.

    Each start writes all scalars anew into one file, so that none appears twice after a resume.
    Raises OSError or tf.errors.OpError where the folder cannot be written to.
    """

    def __init__(self, folder: Path):
        import tensorflow as tf

        self._tf = tf
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("events.out.tfevents.*.toolkit"):
            old.unlink()
        path = folder / f"events.out.tfevents.{time.time():.0f}.toolkit"
        self._records = tf.io.TFRecordWriter(str(path))
        self._write(tf.compat.v1.Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add(self, step: int, scalars: dict[str, float], wall_time: float | None = None) -> None:
        """TensorBoard groups the scalars by what stands before a slash in their names."""
        value = self._tf.compat.v1.Summary.Value
        summary = self._tf.compat.v1.Summary(
            value=[value(tag=tag, simple_value=scalar) for tag, scalar in scalars.items()]
        )
        time_of_event = wall_time or time.time()
        self._write(self._tf.compat.v1.Event(wall_time=time_of_event, step=step, summary=summary))

    def _write(self, event: object) -> None:
        self._records.write(event.SerializeToString())

    def flush(self) -> None:
        self._records.flush()

    def close(self) -> None:
        self._records.close()


def is_no_room(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
