"""Code that all the scripts use. It is imported, not run.

    config = utils.load_config(Path("config.txt"))      # every key known, typed and in range
    with utils.written_aside(path) as aside: ...        # a file appears whole or not at all
    utils.lock(folder / ".lock", "another process works here")
    for result in utils.map_in_order(work, items, 4): ...

Sections: what a script needs, errors and command lines, config.txt, files that appear whole, locks,
parallel work and progress, TensorFlow's devices and events. Nothing here knows about pictures or
training. The scripts import this module before other packages, so that a missing package is
reported in one line.
"""

import argparse
import contextlib
import csv
import difflib
import errno
import functools
import io
import json
import math
import os
import platform
import re
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NamedTuple, NoReturn

# --- what a script needs --------------------------------------------------------------------


def script_name() -> str:
    return Path(sys.argv[0]).name


def one_line(text: str) -> str:
    """`text` with its line breaks escaped. File names may contain them."""
    return "\\n".join(text.splitlines())


def _die(message: str) -> None:
    print(f"{script_name()}: error: {one_line(message)}", file=sys.stderr)
    sys.exit(2)


def _die_without(error: ModuleNotFoundError) -> None:
    """Prints what to install and ends the script. Re-raises the error of any other module."""
    package = {"PIL": "pillow"}.get(error.name, error.name)
    if error.name == "fcntl":
        _die(f"needs Linux or macOS, but this is {platform.system()}; use WSL or a container")
    if error.name == "tomllib":
        _die(
            f"needs Python 3.11 or newer, but this is {platform.python_version()}; install a newer "
            f"one and run the script with it: python3.12 {script_name()} ..."
        )
    if package in ("numpy", "pillow", "tensorflow"):
        requirements = Path(__file__).resolve().with_name("requirements.txt")
        _die(f"needs the package {package}: {sys.executable} -m pip install -r {requirements}")
    raise error


# Everything above this line must also run on older versions of Python.
try:
    import fcntl
    import tomllib

    import numpy as np
    import PIL  # noqa: F401
except ModuleNotFoundError as _error:
    _die_without(_error)


# If the shell has closed a standard stream (`>&-`), open it on /dev/null. Otherwise the next file
# that is opened would get the stream's number, and libraries would print into that file.
while (_descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
    pass
os.close(_descriptor)

CROP = 224
"""Side of the network's input pictures, in pixels."""


# --- errors and command lines ---------------------------------------------------------------


class UserError(Exception):
    """A user's mistake or a broken input. The message names the thing and says what to do."""


class NoLocks(UserError):
    """The file system does not support locks."""


def run(main: Callable[[], None]) -> None:
    """Runs a script. Reports a `UserError` in one line on stderr and exits with status 2.

    Does the same for errors of the operating system, such as a missing file or a full disk.
    """
    sys.stdout, sys.stderr = _Output.stream(1), _Output.stream(2)
    try:
        main()
    except UserError as error:
        _die(str(error))
    except OSError as error:
        _die(": ".join(str(part) for part in (error.filename, error.strerror or error) if part))
    except MemoryError:
        _die("not enough memory; close other programs, or use fewer threads or smaller batches")
    except RuntimeError as error:
        if str(error) != "can't start new thread":  # Python has no special type for this
            raise
        _die(f"{error}: close other programs, or allow more memory or processes (ulimit -v, -u)")
    except KeyboardInterrupt:
        _stopped()


class _Output(io.FileIO):
    """Standard output or error. Drops what it cannot write, and never stops the script.

    For example, the reader of a pipe may have exited, or the disk may be full.
    """

    def write(self, data: bytes) -> int:
        try:
            return super().write(data) or len(data)
        except OSError:
            return len(data)

    @classmethod
    def stream(cls, descriptor: int) -> io.TextIOWrapper:
        """Line-buffered text output to the descriptor."""
        file = io.BufferedWriter(cls(descriptor, "w", closefd=False))
        return io.TextIOWrapper(file, "utf-8", "backslashreplace", line_buffering=True)


def _stopped() -> None:
    print(f"{script_name()}: stopped", file=sys.stderr)
    sys.exit(130)


def warn(message: str) -> None:
    print(f"{script_name()}: warning: {one_line(message)}", file=sys.stderr)


REQUIRED = object()
"""Pass this as the default of a flag that is required."""

MEANT = {
    "--learning_rate": "lr base_lr", "--lr_schedule": "sched schedule scheduler lr_scheduler",
    "--lr_drop_epochs": "lr_steps decay_epochs milestones", "--warmup_epochs": "warmup",
    "--label_smoothing": "smoothing", "--batch_size": "b batch bs",
    "--epoch_start and --epoch_end": "epochs num_epochs", "--epoch_start": "start_epoch",
    "--accumulation_steps": "accum_iter grad_accum_steps gradient_accumulation_steps",
    "--init_from": "pretrained finetune weights checkpoint", "--precision": "amp fp16 bf16",
    "--run_folder": "o output output_dir out_dir save_dir name experiment",
    "--gpu": "gpus device devices", "--log_seconds": "print_freq log_interval",
    "[runtime_preprocessing] num_of_threads": "j workers num_workers threads",
    "[l2] l2_penalty": "weight_decay wd", "[train] sgd_momentum": "momentum",
    "[train] seed": "seed", "[train] buffer_size": "buffer_size prefetch",
    "[preprocess] ImageNet_folder": "data data_path data_dir dataset root",
}  # fmt: skip
"""What other training programs call our flags and the keys of config.txt."""


def _meant(flag: str, known: Sequence[str]) -> str | None:
    """The flag or key that an unknown flag probably means, or None."""
    plain = flag.lstrip("-").replace("-", "_").lower()
    for ours, theirs in MEANT.items():
        if plain in theirs.split():
            where = "" if ours.split()[0] in known else " of train.py"
            return f"{ours} of config.txt" if ours.startswith("[") else ours + where
    return next(iter(difflib.get_close_matches(flag, known, 1)), None)


class Parser(argparse.ArgumentParser):
    """argparse with `--config`, an example below the flags, and one-line errors."""

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
        default = Path(sys.argv[0]).resolve().with_name("config.txt")
        self.add("--config", Path, "settings (default: config.txt next to the script)", default)

    def error(self, message: str) -> NoReturn:
        # Report an unknown flag first: a misspelled flag is often why a required one is missing.
        known = [flag for action in self._actions for flag in action.option_strings]
        for flag in re.findall(r"^(--[^=\s]+|-[a-zA-Z])", "\n".join(sys.argv[1:]), re.MULTILINE):
            if flag not in known and (meant := _meant(flag, known)):
                raise UserError(f"unrecognized argument {flag}; did you mean {meant}? See --help")
        raise UserError(f"{message}; see --help")

    def add(
        self, flag: str, kind: Callable | tuple | None, text: str, default: object = None
    ) -> None:
        """Adds a flag. `kind` is a function that parses the value, a tuple of allowed values, or
        None for a flag without a value. `default` may be REQUIRED.
        """
        if kind is None:
            self.add_argument(flag, action="store_true", help=text)
            return
        is_choice = isinstance(kind, tuple)
        self.add_argument(
            flag,
            help=text,
            type=None if is_choice else kind,
            choices=kind if is_choice else None,
            metavar="NAME" if is_choice else METAVARS.get(kind, "N"),
            required=default is REQUIRED,
            default=default,
        )

    def add_run(self) -> None:
        self.add("--run_folder", run_name, "name of the run, and of its folder", REQUIRED)

    def add_epochs(self) -> None:
        self.add("--epoch_start", whole(0), "first epoch, counting from 0", REQUIRED)
        self.add("--epoch_end", whole(1), "stop before this epoch", REQUIRED)

    def parse(self) -> argparse.Namespace:
        """The arguments. Raises UserError."""
        args = self.parse_args()
        for name, value in vars(args).items():
            if value == []:  # argparse returns this for --flag=--
                self.error(f"argument --{name}: expected one argument")
        if "epoch_end" in args and args.epoch_end <= args.epoch_start:
            raise UserError(
                f"--epoch_end={args.epoch_end} must be larger than "
                f"--epoch_start={args.epoch_start}, because --epoch_end is not included"
            )
        return args


def run_name(text: str) -> str:
    """Argument type: a plain name, which becomes a folder below path_for_saving."""
    if not re.fullmatch(r"[\w][\w.+ -]*", text):
        raise argparse.ArgumentTypeError(
            f"expected a plain name of letters, digits and . _ + -, not {text!r}"
        )
    return text


METAVARS = {Path: "FILE", run_name: "NAME"}


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
    """The allowed values of a key in config.txt. A key with a `default` is optional."""

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

    def accepts(self, value: object) -> bool:
        if self.type is Path:
            return isinstance(value, str) and value.strip() != "" and "\0" not in value
        if isinstance(value, bool) or not isinstance(value, (int, self.type)):
            return False
        return self.minimum <= value <= self.maximum


_COUNT = Key(int, 0, 10**12)
_SECONDS = Key(float, 0.01, 86_400)
_FRACTION = Key(float, 0, 1)
KEYS: dict[str, dict[str, Key]] = {
    "preprocess": {"ImageNet_folder": Key(Path), "path_to_save": Key(Path), "N": _COUNT},
    "get_mu_sigma": {"path_to_save": Key(Path)},
    "train": {
        "buffer_folder": Key(Path),
        "path_for_saving": Key(Path),
        "N": _COUNT,
        "sgd_momentum": Key(float, 0, 0.9999),
        "buffer_size": Key(int, 1, 10_000_000),
        "sleep_time": _SECONDS,
        "seed": Key(int, 0, 2**31 - 1, default=0),
    },
    "batch_renorm": {
        "moving_avgs_momentum": Key(float, 0, 0.999999),
        "rmax_max": Key(float, 1, 1e6),
        "dmax_max": Key(float, 0, 1e6),
        "start_relaxing_rmax": _COUNT, "reach_rmax_max": _COUNT,
        "start_relaxing_dmax": _COUNT, "reach_dmax_max": _COUNT,
    },
    "runtime_preprocessing": {"sleep_time": _SECONDS, "num_of_threads": Key(int, 1, 1024)},
    "utils": {
        "mu_0": _FRACTION, "mu_1": _FRACTION, "mu_2": _FRACTION,
        "sigma_0": Key(float, 0.001, 1), "sigma_1": Key(float, 0.001, 1),
        "sigma_2": Key(float, 0.001, 1),
    },
    "l2": {"l2_penalty": Key(float, 0, 1)},
}  # fmt: skip


def load_config(file: Path) -> SimpleNamespace:
    """Every section and key of `KEYS` as attributes: `load_config(f).train.buffer_size`.

    Adds `utils.mu` and `utils.sigma`, lists of the three channels' values. Paths become absolute
    `Path`s: `~` and environment variables are expanded, and relative paths start from the folder of
    `file`. Raises UserError, which names the file, section, key and expected value.
    """
    sections = _read_toml(file)
    _check_names(str(file), "section", sections, KEYS)
    config = SimpleNamespace()
    for section, keys in KEYS.items():
        values, where = sections[section], f"{file}: [{section}]"
        if not isinstance(values, dict):
            raise UserError(f"{file}: {section} must be a section: it needs a line [{section}]")
        _check_names(where, "key", values, keys)
        checked = {
            name: _checked(f"{where} {name}", values.get(name, key.default), key, file.parent)
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


def _read_toml(file: Path) -> dict:
    try:
        text = file.read_text(encoding="utf-8-sig")
        return tomllib.loads(text)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; give the settings file with --config") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start})") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{file}: {error}{_hint(text, str(error))}") from None
    except (ValueError, RecursionError):  # thousands of digits or brackets
        raise UserError(f"{file}: contains a value that is too long to read") from None


_HINTS = {
    r"\s*(\w+)\s*=\s*([~$./A-Za-z].*?)\s*(#.*)?$": r'text and paths need quotes: \1 = "\2"',
    ".*[“”„‘’]": 'write straight quotes: "',
    r".*=\s*\d+,\d": "write decimal numbers with a point",
    r".*\\": "a backslash in quotes starts an escape sequence: write paths with /",
    r"\s*\w+\s*:": "write key = value, not key: value",
    r'[^"]*"[^"]*$': "a closing quote is missing",
    r"\s*\[(\w+)\]": r"there must be only one section [\1]: replace the old one",
}
"""Patterns of lines that are not valid TOML, and how to fix them."""


def _hint(text: str, error: str) -> str:
    """How to fix the line that a TOML error points to; "" if that is unknown."""
    number = re.search(r"line (\d+)", error)
    line = text.splitlines()[int(number[1]) - 1] if number else ""
    for pattern, hint in _HINTS.items():
        if match := re.match(pattern, line):
            return f"; {match.expand(hint)}"
    return ""


def _check_names(where: str, kind: str, found: dict, known: dict) -> None:
    """Raises UserError for an unknown name, and for a missing one that has no default."""
    for name in found:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
            raise UserError(f"{where}: unknown {kind} {name}; {hint}")
    for name, key in known.items():
        if name not in found and (kind == "section" or key.default is None):
            expected = "" if kind == "section" else f"; expected {key.expected}"
            raise UserError(f"{where}: missing {kind} {name}{expected}")


def _checked(where: str, value: object, key: Key, folder: Path) -> object:
    """The value, converted to the type of its key. Raises UserError."""
    if not key.accepts(value):
        shown = json.dumps(value, default=str)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        raise UserError(f"{where}: expected {key.expected}, not {shown}")
    if key.type is not Path:
        return key.type(value)
    path = os.path.expanduser(os.path.expandvars(value))
    if unset := re.search(r"\$(\w+|\{\w+\})", path):
        raise UserError(f"{where}: the environment variable {unset[0]} is not set")
    return Path(os.path.abspath(folder / path))


# --- files that appear whole ----------------------------------------------------------------

PAUSES = (0.1, 0.5, 2.0, 5.0)
"""Seconds to wait before each retry of a read, after a storage error that may be temporary."""
_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)


def patiently(function: Callable, path: str | Path) -> Any:
    """Returns `function(path)`. Tries again if the storage (a disk, a network) fails for a moment.

    Raises UserError if it keeps failing. That is not an OSError, because code that skips broken
    files must not skip this one. Raises other errors at once.
    """
    pauses = iter(PAUSES)
    while True:
        try:
            return function(path)
        except OSError as error:
            if error.errno not in _PASSING:
                error.filename = error.filename or str(path)
                raise
            if (pause := next(pauses, None)) is None:
                raise UserError(
                    f"{path}: its storage failed {len(PAUSES) + 1} times: {error.strerror}; "
                    f"check the disk or the network, then start again"
                ) from error
            time.sleep(pause)


def read_file(path: str | Path) -> bytes:
    """The file's content, read `patiently`.

    Raises OSError if the file is missing, or if file handles (EMFILE, ENFILE) or memory (ENOMEM)
    run out. None of these means that the file is broken.
    """
    return patiently(_read_once, path)


def _read_once(path: str | Path) -> bytes:
    """Makes as few system calls as possible: each one hands the GIL to another thread."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe must not block
    try:
        size = os.fstat(descriptor).st_size
        content = os.read(descriptor, size)
        while len(content) < size and (more := os.read(descriptor, size - len(content))):
            content += more
        return content
    finally:
        os.close(descriptor)


_ASIDE = re.compile(r"\..+\.aside-[0-9a-f]{16}(\.lock)?", re.DOTALL)


def aside_name(path: Path) -> Path:
    """A temporary name next to `path`, unique across processes and machines.

    It is short enough for every file system, even if the name of `path` is very long.
    """
    start = os.fsencode(path.name)[:100].decode("utf-8", "ignore")
    return path.with_name(f".{start or '_'}.aside-{os.urandom(8).hex()}")


def is_leftover(name: str) -> bool:
    """Whether this is the name of a file or folder that is being written, or left half-written."""
    return _ASIDE.fullmatch(name) is not None


@contextlib.contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A temporary name next to `path`. At the end, removes the file or folder that still has it.

    A lock file marks the name as in use. It is created first and removed last. Errors show `path`
    instead of the temporary name.
    """
    try:
        aside, descriptor = _hold_name(path)
        try:
            yield aside
        finally:
            try:
                _remove(aside)
                _lock_of(aside).unlink(missing_ok=True)
            finally:
                os.close(descriptor)
    except OSError as error:
        if error.filename is None or is_leftover(os.path.basename(error.filename)):
            error.filename = str(path)
            del error.filename2  # otherwise Python prints `None`
        raise


def _hold_name(path: Path) -> tuple[Path, int]:
    """A temporary name next to `path`, and a descriptor that holds its lock.

    The lock lasts until this process and those forked from it have closed the descriptor. We lock a
    separate file, because on SMB a locked file cannot be opened again by name for writing.
    """
    while True:
        aside = aside_name(path)
        descriptor = os.open(_lock_of(aside), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            # It is enough that the name exists, because nobody else creates a file of this name.
            # Inode numbers would not help: some network file systems change them.
            if _try_lock(descriptor) and _lock_of(aside).exists():
                return aside, descriptor
        except OSError:  # no locks here, so nobody removes leftovers either
            return aside, descriptor
        os.close(descriptor)  # `remove_leftovers` took the lock first


def _lock_of(aside: Path) -> Path:
    return aside.with_name(f"{aside.name}.lock")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def written_aside(path: Path, durable: bool = False) -> Iterator[Path]:
    """A temporary path in the same folder. On success it is renamed to `path`, otherwise removed.

    So the file at `path` is always complete, even if the process is killed. If `durable`, that is
    also true after a power failure.
    """
    with _aside(path) as aside:
        yield aside
        if durable:
            _sync(aside)
        os.replace(aside, path)
        if durable:
            _sync(path.parent)


@contextlib.contextmanager
def folder_written_aside(folder: Path) -> Iterator[Path]:
    """`written_aside` for a folder, which must not exist yet. Always durable."""
    with _aside(folder) as aside:
        aside.mkdir()
        yield aside
        for path in (*aside.rglob("*"), aside):
            _sync(path)
        os.rename(aside, folder)
        _sync(folder.parent)


def _sync(path: Path) -> None:
    """Waits until the content of a file, or the list of files in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # the file system cannot sync folders
            raise
    finally:
        os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Removes a folder. Renames it first, so that `folder` is never incomplete."""
    aside = aside_name(folder)
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Removes half-written files and folders of killed processes, but not those being written.

    The lock tells them apart, even if its holder runs on another machine or in another container.
    Leaves the leftovers of other users.
    """
    for path in [path for path in folder.iterdir() if is_leftover(path.name)]:
        if _lock_of(path).exists():
            continue  # removed together with its lock
        with contextlib.suppress(PermissionError):
            if path.is_dir():
                _remove(path)
                continue
            with _unless_held(path) as free:
                if free and path.suffix == ".lock":
                    _remove(path.with_suffix(""))
                if free:
                    path.unlink(missing_ok=True)


def is_no_room(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@functools.cache
def npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """The header of a .npy file for an array of this type and shape."""
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    file, content = io.BytesIO(), {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, content)
    return file.getvalue()


def array_file_size(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    """Size in bytes of a .npy file for an array of this type and shape."""
    return len(npy_header(dtype, shape)) + math.prod(shape) * np.dtype(dtype).itemsize


@contextlib.contextmanager
def array_written_aside(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> Iterator[IO[bytes]]:
    """`written_aside` for a .npy file. Writes the header; the caller writes the array's bytes.

    Raises OSError with its errno, which np.save loses.
    """
    with written_aside(path) as aside, open(aside, "wb") as file:
        file.write(npy_header(dtype, shape))
        yield file


def save_array(path: Path, array: np.ndarray) -> None:
    """Writes the same file as np.save, aside."""
    with array_written_aside(path, array.dtype, array.shape) as file:
        file.write(np.ascontiguousarray(array).data)


def load_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The array in a .npy file. Raises ValueError if the file contains anything else.

    Compares the header and the length with the expected ones, and never interprets them. So a
    malicious file can neither run code nor allocate memory.
    """
    content, header = read_file(path), npy_header(dtype, shape)
    if not content.startswith(header):
        raise ValueError(f"{path}: does not hold {np.dtype(dtype)} {list(shape)}")
    if len(content) != array_file_size(dtype, shape):
        raise ValueError(f"{path}: is cut off, or longer than its array")
    return np.frombuffer(content, dtype, offset=len(header)).reshape(shape)


def write_text(path: Path, text: str) -> None:
    with written_aside(path) as aside:
        aside.write_bytes(as_written(text))


def as_written(text: str) -> bytes:
    """`text` in UTF-8. Escapes what UTF-8 cannot encode, which some file names contain."""
    return text.encode("utf-8", "backslashreplace")


def read_csv(path: Path, columns: Iterable[str] = ()) -> list[dict[str, str]]:
    """The rows of a table, as text by column. Skips rows that were cut off.

    Empty if there is no such file. Raises UserError if one of `columns` is missing. Then the file
    is not ours, and must not be overwritten.
    """
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        table = csv.DictReader(file)
        try:
            rows = list(table)
        except csv.Error as error:  # a huge cell, such as zeros after a power failure
            raise UserError(f"{path}: {error}; move the file away") from None
    if missing := set(columns).difference(table.fieldnames or columns):
        raise UserError(
            f"{path}: not the expected table (no column {min(missing)}); move the file away"
        )
    return [row for row in rows if None not in row and None not in row.values()]


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[dict]) -> None:
    """Writes a table aside, durably. Floats get six significant digits."""
    with written_aside(path, True) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: csv_cell(value) for name, value in row.items()} for row in rows)


def csv_cell(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


CLASS_NAMES = "class_names.txt"
"""File next to the validation crops and in a model's assets: one name per line, by label."""


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes one text per line. Escapes line breaks within a text."""
    write_text(path, "".join(f"{one_line(line)}\n" for line in lines))


def read_lines(path: Path) -> list[str]:
    """What `write_lines` wrote; empty if there is no such file."""
    return os.fsdecode(read_file(path)).splitlines() if path.is_file() else []


def read_json(path: Path) -> dict | None:
    """The JSON object in a file; None if the file is missing or contains anything else."""
    try:
        value = json.loads(read_file(path))
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def make_folder(folder: Path) -> Path:
    """Creates the folder if it is missing. Raises UserError if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{folder}: not a folder; this path or one above it is a file") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be created: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: cannot be written to: Permission denied")
    return folder


def check_room(folder: Path, needed: float, what: str) -> int:
    """Free bytes on the disk of a folder. Raises UserError if fewer than `needed`.

    `what` is the subject and verb of the message: "the crops need".
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: {what} {file_size(needed)}, but only {file_size(free)} are free"
        )
    return free


# --- locks ----------------------------------------------------------------------------------
# We lock only files that are open for writing, never folders: on NFS, other machines see no other
# locks. A lock ends with the process that holds it, even if that process is killed. Only the holder
# of a lock removes its file. So after taking a lock, we check that its file still exists.

_locks: dict[Path, int] = {}
"""The descriptors that hold this process's locks."""


def lock(path: Path, refusal: str, shared: bool = False) -> None:
    """Locks a file until the process ends. Creates the file if it is missing.

    Several processes can hold the lock if all of them pass `shared`. Then the file must exist and
    be readable. Raises UserError with `refusal` if another process holds the lock, or NoLocks.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    flags = os.O_RDONLY if shared else os.O_RDWR | os.O_CREAT
    for _ in range(5):
        descriptor = os.open(path, flags, 0o666)
        try:
            if _try_lock(descriptor, path, kind):
                _locks[path] = os.dup(descriptor)  # holds the same lock
                return
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            raise NoLocks(
                f"{path}: this file system does not support locks ({error.strerror}); put "
                f"{path.parent} on one that does: a local disk, a RAM disk, or NFS with its lock "
                f"service"
            ) from None
        finally:
            os.close(descriptor)
        time.sleep(0.05)  # `is_locked` in another process holds the lock for a moment
    raise UserError(refusal)


def remove_lock(path: Path) -> None:
    """Removes a lock file, unless another process holds it."""
    if path in _locks:
        path.unlink(missing_ok=True)
        os.close(_locks.pop(path))
        return
    with _unless_held(path) as free:
        if free:
            path.unlink(missing_ok=True)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock on a file; False if there is no such file.

    Also True if we cannot tell: for another user's file, or on a file system without locks.
    """
    with _unless_held(path) as free:
        if free:
            return False
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    except OSError:
        pass  # we cannot tell
    return True


@contextlib.contextmanager
def _unless_held(path: Path) -> Iterator[bool]:
    """Whether the file exists and is not locked. If so, holds its lock inside the `with`."""
    with contextlib.ExitStack() as stack:
        free = False
        with contextlib.suppress(OSError):  # gone, another user's, or without locks
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            stack.callback(os.close, descriptor)
            free = _try_lock(descriptor, path)
        yield free


def _try_lock(descriptor: int, path: Path | None = None, kind: int = fcntl.LOCK_EX) -> bool:
    """Takes the lock on an open file. False if it is held, or if `path` no longer names that file.

    Raises OSError if the file system does not support locks.
    """
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        return path is None or os.path.samestat(os.fstat(descriptor), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        return False


# --- parallel work and progress -------------------------------------------------------------


def cores(root: Path = Path("/")) -> int:
    """CPU cores that this process may use. A container's quota counts, rounded up."""
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        count = len(os.sched_getaffinity(0))
    for group in _control_groups(root, "cpu"):
        quota = _content(group / "cpu.max") or (
            f"{_content(group / 'cpu.cfs_quota_us')} {_content(group / 'cpu.cfs_period_us')}"
        )
        if match := re.fullmatch(r"(\d+) (\d+)", quota):  # quota and period
            count = min(count, -(-int(match[1]) // int(match[2])))
    return max(count, 1)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory that this process can still allocate, within a container's limit.

    The file cache counts as free; files on a RAM disk do not. None if unknown (macOS).
    """
    free = []
    if match := re.search(r"MemAvailable:\s+(\d+) kB", _content(root / "proc/meminfo")):
        free.append(1024 * int(match[1]))
    for group in _control_groups(root, "memory"):
        limit = _content(group / "memory.max") or _content(group / "memory.limit_in_bytes")
        used = _content(group / "memory.current") or _content(group / "memory.usage_in_bytes")
        cached = re.findall(r"inactive_file (\d+)", _content(group / "memory.stat"))
        if limit.isdigit() and used.isdigit():
            free.append(int(limit) - int(used) + max(map(int, cached), default=0))
    return max(min(free), 0) if free else None


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of the Linux control groups, version 2 or 1, that limit this process."""
    mounts = root / "sys/fs/cgroup"
    for line in _content(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = mounts / controller if controllers else mounts
        inner = top / group.lstrip("/")  # missing if a container sees only its own group
        yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(top))


def _content(path: Path) -> str:
    """The text of a small file, without the final line break; "" if it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def map_in_order(function: Callable, items: Iterable, threads: int) -> Iterator:
    """Yields `function(item)` for each item, in order, computed by `threads` threads.

    Holds at most four results per thread.
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
    """Prints done/total, rate and time left: a bar on a terminal, otherwise a line now and then."""

    def __init__(self, total: int, unit: str):
        self.total, self.unit, self.done = total, unit, 0
        self._start, self._next = time.monotonic(), 0.0
        self._terminal = sys.stdout.isatty()
        self._pause = 0.2 if self._terminal else 5.0

    def add(self, count: int = 1) -> None:
        self.done += count
        now = time.monotonic()
        if now < self._next and self.done < self.total:
            return
        self._next = now + self._pause
        rate = self.done / max(now - self._start, 1e-9)
        left = duration((self.total - self.done) / rate) if rate else "?"
        rate = f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"
        text = f"{self.done:,} of {self.total:,} {self.unit}, {rate}/s, {left} left"
        if self._terminal:
            self._show_bar(text)
        else:
            print(text, flush=True)
            self._pause = min(60.0, self._pause * 1.5)

    def _show_bar(self, text: str) -> None:
        room = shutil.get_terminal_size().columns - len(text) - 4
        width = min(30, room) if room >= 10 else 0  # \r cannot overwrite a line that wraps
        filled = round(width * self.done / max(self.total, 1))
        end = "\n" if self.done == self.total else ""
        print(f"\r{'█' * filled}{'░' * (width - filled)} {text}  ", end=end, flush=True)


def duration(seconds: float) -> str:
    """Seconds as text: 45 s, 3 min 20 s, 2 h 05 min, 6 d 4 h."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


_PLURALS = {"class": "classes", "batch": "batches"}


def plural(count: int, noun: str) -> str:
    """A number and its noun: 1 epoch, 2 epochs, 1,000 classes."""
    return f"1 {noun}" if count == 1 else f"{count:,} {_PLURALS.get(noun, noun + 's')}"


def file_size(count: float) -> str:
    """Bytes as text: 512 B, 19.3 MB, 1.2 TB (powers of 1000, as disks are sold)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


# --- TensorFlow's devices and events --------------------------------------------------------


@contextlib.contextmanager
def quiet_tensorflow() -> Iterator[None]:
    """Hides what TensorFlow's libraries print during import, unless --verbose is given.

    Searches sys.argv for the flag: TensorFlow reads its environment variables on import, before the
    command line is parsed. Ctrl-C during the import ends the script without a traceback. A missing
    TensorFlow is reported in one line.
    """
    # TensorFlow turns oneDNN off on CPUs without AVX-512, which makes a step a fifth slower.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    terminal = os.dup(2)
    if "--verbose" not in sys.argv:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
    try:
        try:
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
    except KeyboardInterrupt:
        _stopped()
    except ModuleNotFoundError as error:
        _die_without(error)


def choose_gpus(wanted: list[int], required: bool) -> list:
    """Lets TensorFlow see only these GPUs and allocate memory as needed. Returns those it found.

    If `required`, raises UserError if one of them is missing.
    """
    import tensorflow as tf

    there = tf.config.list_physical_devices("GPU")
    if required and max(wanted) >= len(there):
        found = f"{len(there)} GPUs, counted from 0" if there else "no GPU"
        asked = ",".join(map(str, wanted))
        raise UserError(f"--gpu={asked}: TensorFlow finds {found} on this machine")
    chosen = [there[i] for i in wanted if i < len(there)]
    tf.config.set_visible_devices(chosen, "GPU")
    for gpu in chosen:
        tf.config.experimental.set_memory_growth(gpu, True)
    return chosen


def new_event_file(folder: Path) -> Any:
    """A new tf.io.TFRecordWriter for `event`s. TensorBoard reads them, but need not be installed.

    Removes the file of an earlier start. Each start writes all events again, so that none appears
    twice after a resume. Raises OSError or tf.errors.OpError if the folder cannot be written to.
    """
    import tensorflow as tf

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("events.out.tfevents.*.toolkit"):
        old.unlink()
    now = time.time()
    events = tf.io.TFRecordWriter(str(folder / f"events.out.tfevents.{now:.0f}.toolkit"))
    head = tf.compat.v1.Event(wall_time=now, file_version="brain.Event:2")
    events.write(head.SerializeToString())
    return events


def event(step: int, scalars: dict[str, float], wall_time: float | None = None) -> bytes:
    """The scalars of a step, serialized. TensorBoard groups names by the part before the slash."""
    import tensorflow as tf

    value = tf.compat.v1.Summary.Value
    summary = tf.compat.v1.Summary(
        value=[value(tag=tag, simple_value=scalar) for tag, scalar in scalars.items()]
    )
    wall_time = wall_time or time.time()
    return tf.compat.v1.Event(wall_time=wall_time, step=step, summary=summary).SerializeToString()
