"""What the scripts share; imported, not run.

    config = utils.load_config("config.txt")            # every key known, typed and in range
    with utils.written_aside(path) as aside: ...        # a file appears whole or not at all
    utils.lock(folder / ".lock", "another one is at work here")
    for result in utils.map_in_order(work, items, 4): ...

In this order: what a script needs, errors and command lines, config.txt, files that appear whole,
locks, working through many things, TensorFlow's devices and events. Nothing here knows pictures or
training. The scripts import this module before the packages, so that a missing one gets one line.
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
    """`text` with line breaks escaped: file names may hold any character."""
    return "\\n".join(text.splitlines())


def _die(message: str) -> None:
    print(f"{script_name()}: error: {one_line(message)}", file=sys.stderr)
    sys.exit(2)


def _die_without(error: ModuleNotFoundError) -> None:
    """Ends the script with what to install. Raises the error again if it is about anything else."""
    package = {"PIL": "pillow"}.get(error.name, error.name)
    if error.name == "fcntl":
        _die(f"needs Linux or macOS, this is {platform.system()}; use WSL or a container")
    if error.name == "tomllib":
        _die(
            f"needs Python 3.11 or newer, this is {platform.python_version()}; install a newer one "
            f"and start the script with it: python3.12 {script_name()} ..."
        )
    if package in ("numpy", "pillow", "tensorflow"):
        requirements = Path(__file__).resolve().with_name("requirements.txt")
        _die(f"needs the package {package}: {sys.executable} -m pip install -r {requirements}")
    raise error


# What stands above this line also runs on an older Python.
try:
    import fcntl
    import tomllib

    import numpy as np
    import PIL  # noqa: F401
except ModuleNotFoundError as _error:
    _die_without(_error)


def _open_closed_streams() -> None:
    """Opens what the shell has closed (`>&-`) to nowhere.

    Otherwise the next file to be opened gets its number, and what libraries print goes into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != descriptor:
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


_open_closed_streams()

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
    except MemoryError:
        _die("not enough memory; close other programs, or use fewer threads or smaller batches")
    except RuntimeError as error:
        if str(error) != "can't start new thread":  # Python has no type of its own for this
            raise
        _die(f"{error}: close other programs, or allow more memory or processes (ulimit -v, -u)")
    except KeyboardInterrupt:
        _stopped()


class _Output(io.FileIO):
    """A file that never fails to be written: a closed pipe or a full disk must not stop a script.

    What cannot be written is lost, but the work goes on.
    """

    def write(self, data: bytes) -> int:
        try:
            return super().write(data) or len(data)
        except OSError:
            return len(data)

    @classmethod
    def stream(cls, descriptor: int) -> io.TextIOWrapper:
        """Text output to the descriptor, line by line."""
        file = io.BufferedWriter(cls(descriptor, "w", closefd=False))
        return io.TextIOWrapper(file, "utf-8", "backslashreplace", line_buffering=True)


def _stopped() -> None:
    print(f"{script_name()}: stopped", file=sys.stderr)
    sys.exit(130)


def warn(message: str) -> None:
    print(f"{script_name()}: warning: {one_line(message)}", file=sys.stderr)


REQUIRED = object()
"""The default of a flag that has none."""

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
"""Flags of other trainers by what they are here: a flag, or a section and key of config.txt."""


def _meant(flag: str, known: Sequence[str]) -> str | None:
    """What was probably meant by an unknown flag, or None."""
    plain = flag.lstrip("-").replace("-", "_").lower()
    for ours, theirs in MEANT.items():
        if plain in theirs.split():
            where = "" if ours.split()[0] in known else " of train.py"
            return f"{ours} of config.txt" if ours.startswith("[") else ours + where
    return next(iter(difflib.get_close_matches(flag, known, 1)), None)


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
        default = Path(sys.argv[0]).resolve().with_name("config.txt")
        self.add("--config", Path, "settings (default: the config.txt beside the script)", default)

    def error(self, message: str) -> NoReturn:
        # A misspelt flag comes first: that another one is missing often follows from it.
        known = [flag for action in self._actions for flag in action.option_strings]
        for flag in re.findall(r"^(--[^=\s]+|-[a-zA-Z])", "\n".join(sys.argv[1:]), re.MULTILINE):
            if flag not in known and (meant := _meant(flag, known)):
                raise UserError(f"unrecognized argument {flag}, did you mean {meant}; see --help")
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

PAUSES = (0.1, 0.5, 2.0, 5.0)
"""Seconds before a read is tried again, after an error of the storage that may pass."""
_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)


def patiently(function: Callable, path: str | Path) -> Any:
    """`function(path)`, tried again where the storage fails for a moment (a disk, a network).

    Raises UserError if the storage keeps failing. That is no OSError, so code that skips broken
    files does not take this one for broken. Other errors are raised at once.
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
                    f"{path}: cannot be read, tried {len(PAUSES) + 1} times: {error.strerror}; "
                    f"check the disk or the network, then start again"
                ) from error
            time.sleep(pause)


def read_file(path: str | Path) -> bytes:
    """The file's content. A failing storage is tried again, see `patiently`.

    Raises UserError if it keeps failing. Raises OSError otherwise: there is no such file, or no
    file handle (EMFILE, ENFILE) or memory (ENOMEM) is left. None of these means a broken file.
    """
    return patiently(_read_once, path)


def _read_once(path: str | Path) -> bytes:
    """In the fewest system calls: each hands Python's lock to another thread."""
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


def aside_name(path: Path, suffix: str = "") -> Path:
    """A temporary name beside `path`, different each time, on whatever machine.

    It is short enough for every file system, however long the name of `path` is.
    """
    start = os.fsencode(path.name)[:100].decode("utf-8", "ignore")
    return path.with_name(f".{start or '_'}.aside-{os.urandom(8).hex()}{suffix}")


def is_leftover(name: str) -> bool:
    """Whether this is the name of something that is being written, or was left half-written."""
    return _ASIDE.fullmatch(name) is not None


def _make_held(path: Path, suffix: str = "") -> tuple[Path, int]:
    """A new file with a temporary name beside `path`, and the descriptor that holds its lock.

    The lock ends with the process; if that has forked, with the last one to have the descriptor.
    """
    while True:
        aside = aside_name(path, suffix)
        with _errors_name(path):
            descriptor = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            if _try_lock(descriptor) and aside.exists():
                return aside, descriptor
        except OSError:  # no locks here, so nobody removes leftovers either
            return aside, descriptor
        os.close(descriptor)  # `remove_leftovers` was faster


@contextlib.contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Errors of what is written aside name the file that it is to become."""
    try:
        yield
    except OSError as error:
        if error.filename is None or is_leftover(os.path.basename(error.filename)):
            error.filename, error.filename2 = str(path), None
        raise


@contextlib.contextmanager
def _held_name(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, for a file or a folder that is removed in the end.

    A file beside it holds the lock: it is there before and goes after. (On SMB a file that is
    itself locked cannot be opened by its name and written to.)
    """
    holder, descriptor = _make_held(path, ".lock")
    aside = holder.with_suffix("")
    try:
        yield aside
    finally:
        _remove(aside)
        holder.unlink(missing_ok=True)
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def written_aside(path: Path, durable: bool = False) -> Iterator[Path]:
    """A temporary path in the same folder, renamed to `path` when all went well, else removed.

    So a file under its own name is always complete, whenever the process is killed; if `durable`,
    also after a power failure.
    """
    with _held_name(path) as aside, _errors_name(path):
        yield aside
        if durable:
            _sync(aside)
        os.replace(aside, path)
        if durable:
            _sync(path.parent)


@contextlib.contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """A new folder of a temporary name beside `path`, removed in the end."""
    with _held_name(path) as aside:
        aside.mkdir()
        yield aside


@contextlib.contextmanager
def folder_written_aside(folder: Path) -> Iterator[Path]:
    """`written_aside` for a folder, which must not be there yet. Always durable."""
    with folder_aside(folder) as aside:
        yield aside
        for path in (*aside.rglob("*"), aside):
            _sync(path)
        os.rename(aside, folder)
        _sync(folder.parent)


def _sync(path: Path) -> None:
    """Returns when the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that knows no fsync of folders
            raise
    finally:
        os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Removes a folder so that it is never half there under its own name."""
    aside = aside_name(folder)
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left half-written here, and nothing that is being written.

    The lock tells which is which, whatever machine or container its holder runs on. What another
    user left stays.
    """
    for path in [path for path in folder.iterdir() if is_leftover(path.name)]:
        holds_another = path.suffix == ".lock"
        if not holds_another and path.with_name(f"{path.name}.lock").exists():
            continue
        with contextlib.suppress(PermissionError):
            if path.is_dir():
                _remove(path)
                continue
            with _unless_held(path) as free:
                if free and holds_another:
                    _remove(path.with_suffix(""))
                if free:
                    path.unlink(missing_ok=True)


def is_no_room(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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

    Raises OSError with its errno, which np.save swallows. As there are many of these, the file
    itself holds the lock.
    """
    aside, descriptor = _make_held(path)
    try:
        with _errors_name(path):
            with open(descriptor, "wb", closefd=False) as file:
                file.write(npy_header(dtype, shape))
                yield file
            os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


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


def write_text(path: Path, text: str) -> None:
    with written_aside(path) as aside:
        aside.write_bytes(as_written(text))


def as_written(text: str) -> bytes:
    """UTF-8, with escapes for what came from names that are not."""
    return text.encode("utf-8", "backslashreplace")


def read_csv(path: Path, columns: Iterable[str] = ()) -> list[dict[str, str]]:
    """The whole rows of a table, as text by column; none if there is no such file.

    A row that was cut off is left out. Raises UserError if the table lacks one of `columns`: it is
    somebody else's, and must not be written over.
    """
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        table = csv.DictReader(file)
        rows = list(table)
    if missing := set(columns).difference(table.fieldnames or columns):
        raise UserError(
            f"{path}: another table than expected, without the column {min(missing)}; move it away"
        )
    return [row for row in rows if None not in row and None not in row.values()]


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[dict]) -> None:
    """The table, written aside, durable. Numbers that are not whole get six digits."""
    with written_aside(path, True) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
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
    return os.fsdecode(read_file(path)).splitlines() if path.is_file() else []


def read_json(path: Path) -> dict | None:
    """A JSON object from a file; None if the file is missing or holds anything else."""
    try:
        value = json.loads(read_file(path))
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None


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


# --- locks ----------------------------------------------------------------------------------
# Locks are on files that are open for writing, never on folders: on NFS only those are known to all
# machines. A lock ends with its holder, however that ends. Only the holder of a lock removes its
# file, and after taking a lock one checks that the file is still there.

_locks: dict[Path, int] = {}
"""The descriptors that hold this process's locks."""


def lock(path: Path, refusal: str, shared: bool = False) -> None:
    """Takes the lock on a file until the process ends; makes the file where it is missing.

    Several processes may have a shared lock at once, but not beside one that is not shared; it
    needs a file that is there, and may be read. Raises UserError with `refusal` if another process
    has the lock, and where the file system has no locks.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    flags = os.O_RDONLY if shared else os.O_RDWR | os.O_CREAT
    for attempt in range(5):  # `is_locked` holds the lock for a moment
        time.sleep(0.05 * bool(attempt))
        descriptor = os.open(path, flags, 0o666)
        try:
            if _try_lock(descriptor, kind) and _is_at(descriptor, path):
                _locks[path] = os.dup(descriptor)  # has the same lock
                return
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            raise UserError(
                f"{path}: this file system has no locks ({error.strerror}); put {path.parent} on "
                f"one that has: a local disk, a RAM disk, or NFS with its lock service"
            ) from None
        finally:
            os.close(descriptor)
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

    True where that cannot be told: another user's file, or a file system without locks.
    """
    with _unless_held(path) as free:
        return not free and path.exists()


@contextlib.contextmanager
def _unless_held(path: Path) -> Iterator[bool]:
    """Whether the file is there and nobody holds its lock. If so, the lock is held meanwhile."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:  # gone, or another user's
        yield False
        return
    try:
        free = _try_lock(descriptor) and _is_at(descriptor, path)
    except OSError:  # no locks
        free = False
    try:
        yield free
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Whether the lock was free, and is now held. Raises OSError where there are no locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one that `path` names."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


# --- working through many things ------------------------------------------------------------


def cores(root: Path = Path("/")) -> int:
    """Processor cores that this process may use, a container's quota (rounded up) included."""
    # macOS knows no affinity.
    known = hasattr(os, "sched_getaffinity")
    count = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    for group in _control_groups(root, "cpu"):
        old = f"{_content(group / 'cpu.cfs_quota_us')} {_content(group / 'cpu.cfs_period_us')}"
        for text in (_content(group / "cpu.max"), old):  # quota and period
            if match := re.fullmatch(r"(\d+) (\d+)", text):
                count = min(count, -(-int(match[1]) // int(match[2])))
    return max(count, 1)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory that this process may still take, a container's limit included.

    The cache of files counts as free, the files of a RAM disk do not. None if unknown (macOS).
    """
    free = []
    if match := re.search(r"MemAvailable:\s+(\d+) kB", _content(root / "proc/meminfo")):
        free.append(1024 * int(match[1]))
    for group in _control_groups(root, "memory"):
        cached = re.findall(r"inactive_file (\d+)", _content(group / "memory.stat"))
        for names in (("max", "current"), ("limit_in_bytes", "usage_in_bytes")):
            limit, used = (_content(group / f"memory.{name}") for name in names)
            if limit.isdigit() and used.isdigit():
                free.append(int(limit) - int(used) + max(map(int, cached), default=0))
    return max(min(free), 0) if free else None


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of Linux's control groups (version 2, version 1) that limit this process."""
    mounts = root / "sys/fs/cgroup"
    for line in _content(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = mounts / controller if controllers else mounts
        inner = top / group.lstrip("/")  # not there where a container sees its own group alone
        yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(top))


def _content(path: Path) -> str:
    """A small file's text, without the line break at its end; "" if it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


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
            room = shutil.get_terminal_size().columns - len(text) - 4
            width = min(30, room) if room >= 10 else 0  # a line that wraps is never overwritten
            filled = round(width * self.done / max(self.total, 1))
            end = "\n" if self.done == self.total else ""
            print(f"\r{'█' * filled}{'░' * (width - filled)} {text}  ", end=end, flush=True)
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
    TensorFlow reads its environment when it is imported. Ctrl-C meanwhile just ends the script,
    and a TensorFlow that is not there gets one line.
    """
    # On processors without AVX-512 TensorFlow leaves oneDNN off, which makes a step a fifth slower.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    terminal = os.dup(2)
    if "--verbose" not in sys.argv:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
    try:
        yield
    except (KeyboardInterrupt, ModuleNotFoundError) as error:
        os.dup2(terminal, 2)
        if isinstance(error, KeyboardInterrupt):
            _stopped()
        _die_without(error)
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


def check_room(folder: Path, needed: float, what: str) -> int:
    """The bytes that are free in a folder. Raises UserError if fewer are than needed.

    `what` begins the sentence: "the crops need".
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: {what} {file_size(needed)}, but only {file_size(free)} are free"
        )
    return free
