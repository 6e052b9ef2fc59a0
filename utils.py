"""Code that all the scripts use. It is imported, not run.

    config = utils.load_config(Path("config.txt"))      # every key known, typed and in range
    with utils.written_aside(path) as file: ...         # a file appears whole or not at all
    utils.lock(folder / ".lock", "another process works here")
    with utils.stop_on_signals() as stop: ...           # Ctrl-C, kill and a closed terminal
    for result in utils.map_in_order(work, items, 4): ...

Sections: what a script needs, output, errors and command lines, stopping, config.txt, files that
appear whole, files that are read back, locks, parallel work and progress, TensorFlow's devices and
events. Nothing here knows about pictures or training. The scripts import this module before other
packages, so that a missing package, or Ctrl-C meanwhile, gives only one line.
"""

import _signal  # built in; `signal` imports other modules first, and Ctrl-C may come meanwhile
import os
import sys

# --- Ctrl-C is one line, from the first statement on ----------------------------------------

_messages = 2
"""Descriptor of the terminal's messages."""


def script_name() -> str:
    return os.path.basename(sys.argv[0])


def _leave(_number: int, _frame: object) -> None:
    """Ctrl-C before `run`: nothing has begun yet. Packages do not expect exceptions on import."""
    os.write(_messages, f"{script_name()}: stopped\n".encode())
    os._exit(130)


_folders = [os.path.dirname(os.path.realpath(path)) for path in (sys.argv[0], __file__)]
if _folders[0] == _folders[1] and _signal.getsignal(_signal.SIGINT) != _signal.SIG_IGN:
    _signal.signal(_signal.SIGINT, _leave)

# isort: split
import argparse
import atexit
import contextlib
import csv
import dataclasses
import difflib
import errno
import fnmatch
import functools
import io
import json
import math
import platform
import queue
import re
import shutil
import signal
import stat
import threading
import time
import types
import typing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NoReturn

# --- what a script needs --------------------------------------------------------------------


def printable(text: object) -> str:
    """`text` with invisible characters escaped: line breaks, escape sequences, marks that reverse
    the direction of writing. The name of a file may contain any of them.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def _die(message: str, status: int = 2) -> None:
    print(f"{script_name()}: error: {printable(message)}", file=sys.stderr)
    sys.exit(status)


def _die_without(error: ImportError) -> None:
    """Prints what to install and ends the script. Re-raises the error of any other module."""
    if not isinstance(error, ModuleNotFoundError):  # no memory for it, or half installed
        _die(f"the package {error.name} cannot be loaded: {error}")
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
    import resource
    import tomllib

    import numpy as np
    import PIL  # noqa: F401
except ImportError as _error:
    _die_without(_error)


# If the shell has closed a standard stream (`>&-`), open it on /dev/null. Otherwise the next file
# that is opened would get the stream's number, and libraries would print into that file.
while (_descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
    pass
os.close(_descriptor)
_messages = os.dup(2)  # `quiet_tensorflow` hides what goes to 2


# --- output ---------------------------------------------------------------------------------


class _Writer(threading.Thread):
    """Writes to the standard streams. A terminal that takes no lines (Ctrl-S, a frozen multiplexer,
    a pipe that nobody reads) or a full disk costs lines, never a step.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.lines: queue.Queue = queue.Queue(1000)
        self.is_held = False

    def put(self, line: tuple[int, bytes] | None) -> None:
        """Waits a second for room, once. Until the terminal takes lines again, others are lost."""
        try:
            self.lines.put(line, timeout=0 if self.is_held else 1)
            self.is_held = False
        except queue.Full:
            self.is_held = True

    def drain(self) -> None:
        """Ends the thread once it has written all, or when it is held for a second."""
        self.put(None)
        left = None
        while self.is_alive() and left != (left := self.lines.qsize()):
            self.join(1)

    def run(self) -> None:
        while line := self.lines.get():
            with contextlib.suppress(OSError):  # nobody reads it, or the disk is full
                _write(*line)


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


_writer: _Writer | None = None
"""None where lines are written at once: before `run`, and in a forked process, which may end
without waiting for a thread."""


def _start_writer() -> None:
    global _writer
    writer = _Writer()
    with contextlib.suppress(RuntimeError):  # no more threads
        writer.start()
        _writer = writer


def _stop_writer() -> None:
    global _writer
    writer, _writer = _writer, None
    if writer is not None:
        writer.drain()


def _put(descriptor: int, text: str) -> None:
    if writer := _writer:
        writer.put((descriptor, text.encode()))
    else:
        with contextlib.suppress(OSError):
            _write(descriptor, text.encode())


_ERASE = "\r\x1b[K"
"""Erases the status line of a terminal."""


class _Output(io.TextIOBase):
    """Standard output or error: whole lines, in UTF-8, with only printable characters.

    If the lines are a script's product, they are written at once, and errors are raised.
    """

    encoding = "utf-8"

    def __init__(self, descriptor: int, is_product: bool = False):
        self._is_product = is_product
        self._descriptor, self._begun = descriptor, threading.local()  # each thread's own line
        self._start = _ERASE if self.isatty() else ""

    def write(self, text: str) -> int:
        *lines, self._begun.line = (getattr(self._begun, "line", "") + text).split("\n")
        ended = "".join(f"{self._start}{printable(line)}\n" for line in lines)
        if ended and self._is_product:
            _write(self._descriptor, ended.encode())
        elif ended:
            _put(self._descriptor, ended)
        return len(text)

    def flush(self) -> None:
        if getattr(self._begun, "line", ""):
            self.write("\n")

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)


def show_status(text: str) -> None:
    """Shows a line, cut to the terminal's width, that the next line replaces. Nothing if standard
    output is not a terminal.
    """
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        _put(1, _ERASE + printable(text)[:width])


# --- errors and command lines ---------------------------------------------------------------


class UserError(Exception):
    """A user's mistake or a broken input. The message names the thing and says what to do."""

    status = 2


class TryAgain(UserError):
    """Trouble that a user need not fix: starting again may be enough."""

    status = 1


def run(main: Callable[[], None], lines_are_product: bool = False) -> None:
    """Runs a script. Reports a `UserError` in one line on stderr and exits with its status.

    Does the same for errors of the operating system, such as a missing file or a full disk. If the
    printed lines are the script's product, none is lost, and it ends when nobody reads them.
    """
    sys.stdout, sys.stderr = _Output(1, lines_are_product), _Output(2)
    _start_writer()
    atexit.register(_stop_writer)
    # Only one thread goes into a fork.
    os.register_at_fork(before=_stop_writer, after_in_parent=_start_writer)
    if signal.getsignal(signal.SIGINT) == _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except UserError as error:
        _die(str(error), error.status)
    except BrokenPipeError:
        os._exit(1)
    except OSError as error:
        _die(": ".join(str(part) for part in (error.filename, error.strerror or error) if part))
    except MemoryError:
        _die("not enough memory; close other programs, or use fewer threads or smaller batches")
    except RuntimeError as error:
        if str(error) != "can't start new thread":  # Python has no special type for this
            raise
        _die(f"{error}: close other programs, or allow more memory or processes (ulimit -v, -u)")
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
        print(f"{script_name()}: stopped", file=sys.stderr)
        sys.exit(130)


def warn(message: str) -> None:
    print(f"{script_name()}: warning: {printable(message)}", file=sys.stderr)


REQUIRED = object()
"""Pass this as the default of a flag that is required."""


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
        # Report a misspelled flag first: it is often why a required one is missing.
        known = [flag for action in self._actions for flag in action.option_strings]
        for argument in sys.argv[1:]:
            flag, equals, _ = argument.partition("=")
            close = difflib.get_close_matches(flag, known, 1, 0.7)
            if close and flag not in known and (equals or flag.startswith("-")):
                raise UserError(
                    f"unrecognized argument {flag}; did you mean {close[0]}? See --help"
                )
        if match := re.fullmatch(r"unrecognized arguments: (\S+\.(txt|toml))", message):
            raise UserError(f"unrecognized argument {match[1]}; did you mean --config={match[1]}?")
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
            metavar="NAME" if is_choice or flag == "--run_folder" else METAVARS.get(kind, "N"),
            required=default is REQUIRED,
            default=default,
        )

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


METAVARS = {Path: "PATH"}


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a flag, a key of config.txt or a cell of a table may hold."""

    expected: str
    read: Callable[[str], Any]  # raises ValueError

    def __call__(self, text: str) -> Any:
        try:
            return self.read(text)
        except ValueError:
            wrong = f"expected {self.expected}, not {text[:60]!r}"
            raise argparse.ArgumentTypeError(wrong) from None


def whole(minimum: int, maximum: int = 10**18) -> Kind:
    """A whole number in [minimum, maximum]."""
    return _number("a whole number", int, minimum, maximum)


def number(minimum: float, maximum: float = 1e300) -> Kind:
    """A finite number in [minimum, maximum]."""
    return _number("a number", float, minimum, maximum)


def _number(name: str, kind: type, minimum: float, maximum: float) -> Kind:
    def read(text: str) -> float:
        if not minimum <= (value := kind(text)) <= maximum:
            raise ValueError
        return value

    limits = f"of at least {minimum}" if maximum >= 10**18 else f"from {minimum} to {maximum}"
    return Kind(f"{name} {limits}", read)


# --- stopping -------------------------------------------------------------------------------


class Stop:
    """Whether a signal has asked the script to stop, and which. Not a `threading.Event`: setting
    that in a signal handler can wait for ever for the thread that was interrupted.
    """

    number = 0
    """The signal's number."""
    _at = 0.0

    def is_set(self) -> bool:
        return self.number != 0

    def set(self, number: int = signal.SIGTERM) -> None:
        """The first signal stops. Only a second Ctrl-C, a second or more later, ends at once: a
        terminal that closes sends SIGHUP twice, systemd sends SIGTERM and then SIGHUP.
        """
        if not self.is_set():
            self.number, self._at = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() >= self._at + 1:
            os._exit(128 + number)

    def wait(self, seconds: float) -> bool:
        """Waits until it is set, at most `seconds`. Returns whether it is set."""
        end = time.monotonic() + seconds
        while not self.is_set() and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.02))
        return self.is_set()


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Turns Ctrl-C, SIGTERM and SIGHUP into a `Stop`. `nohup` makes a script deaf to SIGHUP."""
    stop, before = Stop(), {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, lambda number, _frame: stop.set(number))
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- config.txt -----------------------------------------------------------------------------


class Epochs(float):
    """A number of epochs, where a whole number would count updates."""


def _read_path(text: str) -> Path:
    path = json.loads(text)
    if not isinstance(path, str) or not path.strip() or "\0" in path:
        raise ValueError
    return Path(path)


def _read_when(text: str) -> Epochs | int:
    epochs = re.fullmatch(r'"\s*([0-9]{1,6}(?:\.[0-9]+)?)\s*epochs?\s*"', text)
    return Epochs(epochs[1]) if epochs else whole(0, 10**12).read(text)


def _read_crop(text: str) -> str:
    if text not in ('"side"', '"area"'):
        raise ValueError
    return text.strip('"')


_PATH = Kind('a path in quotes, such as "/data/imagenet"', _read_path)
_WHEN = Kind('epochs in quotes, such as "3 epochs", or a whole number of updates', _read_when)
_COUNT, _SECONDS, _FRACTION = whole(0, 10**12), number(0.01, 86_400), number(0, 1)
_SIGMA = number(0.001, 1)
KEYS: dict[str, dict[str, Kind]] = {
    "preprocess": {"ImageNet_folder": _PATH, "path_to_save": _PATH, "N": _COUNT},
    "get_mu_sigma": {"path_to_save": _PATH},
    "train": {
        "buffer_folder": _PATH,
        "path_for_saving": _PATH,
        "N": _COUNT,
        "sgd_momentum": number(0, 0.9999),
        "buffer_size": whole(1, 10_000_000),
        "sleep_time": _SECONDS,
        "seed": whole(0, 2**31 - 1),
    },
    "batch_renorm": {
        "moving_avgs_momentum": number(0, 0.999999),
        "rmax_max": number(1, 1_000_000),
        "dmax_max": number(0, 1_000_000),
        "start_relaxing_rmax": _WHEN, "reach_rmax_max": _WHEN,
        "start_relaxing_dmax": _WHEN, "reach_dmax_max": _WHEN,
    },
    "runtime_preprocessing": {
        "sleep_time": _SECONDS,
        "num_of_threads": whole(1, 1024),
        "crop": Kind('"side" or "area"', _read_crop),
    },
    "utils": {
        "mu_0": _FRACTION, "mu_1": _FRACTION, "mu_2": _FRACTION,
        "sigma_0": _SIGMA, "sigma_1": _SIGMA, "sigma_2": _SIGMA,
    },
    "l2": {"l2_penalty": _FRACTION},
}  # fmt: skip
"""Every section and key. A value is read from its text in JSON, so that quotes count."""
OPTIONAL = {("train", "seed"): 0, ("runtime_preprocessing", "crop"): "side"}
"""The keys that may be missing, with their defaults."""


def load_config(file: Path) -> SimpleNamespace:
    """Every section and key of `KEYS` as attributes: `load_config(f).train.buffer_size`.

    Adds `utils.mu` and `utils.sigma`, lists of the three channels' values. Paths become absolute
    `Path`s: `~` and environment variables are expanded, and relative paths start from the folder of
    `file`. "3 epochs" becomes `Epochs(3)`. Raises UserError, which names the file, section, key and
    expected value.
    """
    sections = _read_toml(file)
    _check_names(str(file), "section", sections, KEYS)
    config = SimpleNamespace()
    for section, kinds in KEYS.items():
        values, where = sections[section], f"{file}: [{section}]"
        if not isinstance(values, dict):
            raise UserError(f"{file}: {section} must be a section: it needs a line [{section}]")
        defaults = {name: value for (part, name), value in OPTIONAL.items() if part == section}
        values = defaults | values
        _check_names(where, "key", values, kinds)
        converted = {}
        for name, kind in kinds.items():
            try:
                value = kind(json.dumps(values[name], default=lambda date: [str(date)]))
            except (argparse.ArgumentTypeError, ValueError) as error:
                raise UserError(f"{where} {name}: {error}") from None
            if isinstance(value, Path):
                value = _absolute(f"{where} {name}", value, file.parent)
            converted[name] = value
        setattr(config, section, SimpleNamespace(**converted))
    colours = config.utils
    colours.mu = [colours.mu_0, colours.mu_1, colours.mu_2]
    colours.sigma = [colours.sigma_0, colours.sigma_1, colours.sigma_2]
    return config


def _read_toml(file: Path) -> dict:
    try:
        if file.is_fifo():
            raise UserError(f"{file}: a pipe; write the settings into a file")
        text = read_file(file).decode("utf-8-sig")
        return tomllib.loads(text.replace("\r\n", "\n"))
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
    r".*=\s*\d+,\d": "write numbers without commas: 1000000, 0.5",
    r"\s*(\w+)\s*=.*\nCannot overwrite": r"\1 appears twice in this section: remove one",
    r"\s*\[(\w+)\].*\nCannot declare": r"there must be only one section [\1]: replace the old one",
}
"""What is often wrong, and how to mend it: patterns of a line and tomllib's message below it."""


def _hint(text: str, message: str) -> str:
    """How to fix the line that a TOML error points to; "" if that is unknown."""
    number = re.search(r"line (\d+)", message)
    line = text.splitlines()[int(number[1]) - 1] if number else ""
    for pattern, hint in _HINTS.items():
        if match := re.match(pattern, f"{line}\n{message}", re.MULTILINE):
            return f"; {match.expand(hint)}"
    return ""


def _check_names(where: str, kind: str, found: dict, known: dict) -> None:
    """Raises UserError for an unknown name, and for a missing one."""
    for name in found:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
            raise UserError(f"{where}: unknown {kind} {name}; {hint}")
    for name in known:
        if name not in found:
            expected = "" if kind == "section" else f"; expected {known[name].expected}"
            raise UserError(f"{where}: missing {kind} {name}{expected}")


def _absolute(where: str, value: Path, folder: Path) -> Path:
    path = os.path.expanduser(os.path.expandvars(value))
    if unset := re.search(r"\$(\w+|\{\w+\})", path):
        raise UserError(f"{where}: the environment variable {unset[0]} is not set")
    if path.startswith("~"):
        raise UserError(f"{where}: no home folder is known for {value}; write the whole path")
    path = os.path.abspath(folder / path)
    try:
        path.encode(), os.fsencode(path)  # TensorFlow takes UTF-8 only
    except UnicodeEncodeError:
        raise UserError(
            f"{where}: {path} is not UTF-8, or not a name in this locale; rename it, or set "
            f"LC_ALL=C.UTF-8"
        ) from None
    return Path(path)


# --- files that appear whole ----------------------------------------------------------------

PAUSES = (0.1, 0.5, 2.0, 5.0)
"""Seconds to wait before each retry of a read, after a storage error that may be temporary."""
_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)


def patiently(function: Callable, path: str | Path) -> Any:
    """Returns `function(path)`. Tries again if the storage (a disk, a network) fails for a moment.

    Raises TryAgain if it keeps failing. That is not an OSError, because code that skips broken
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
                raise TryAgain(
                    f"{path}: its storage failed {len(PAUSES) + 1} times: {error.strerror}; "
                    f"check the disk or the network, then start again"
                ) from error
            time.sleep(pause)


def read_file(path: str | Path) -> bytes:
    """The file's content, read `patiently`.

    Raises OSError if the file is missing or has more than LARGEST bytes (EFBIG), or if file handles
    (EMFILE, ENFILE) or memory (ENOMEM) run out.
    """
    return patiently(_read_once, path)


LARGEST = 1_000_000_000
"""No file that we read whole has so many bytes. A sparse file may claim more than the memory."""


def _not_blocking(path: str, flags: int) -> int:
    """Opens a file to read it. Does not wait for the other end of a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def _read_once(path: str | Path) -> bytes:
    with open(path, "rb", buffering=0, opener=_not_blocking) as file:
        status = os.fstat(file.fileno())
        if stat.S_ISCHR(status.st_mode):  # /dev/zero never ends
            raise OSError(errno.ENXIO, "a device, not a file", str(path))
        if status.st_size > LARGEST:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
        return file.read() or b""


def _aside_name(path: Path) -> Path:
    """A temporary name next to `path`, unique across processes and machines.

    It is short enough for every file system, even if the name of `path` is very long.
    """
    start = os.fsencode(path.name)[:100].decode("utf-8", "ignore")
    return path.with_name(f".{start or '_'}.aside-{os.urandom(8).hex()}")


_ASIDE = re.compile(r"\.(.+)\.aside-[0-9a-f]{16}", re.DOTALL)


@contextlib.contextmanager
def _aside(path: Path, durable: bool) -> Iterator[Path]:
    """A temporary name next to `path`. On success it is renamed to `path`, otherwise removed.

    Errors show `path` instead of the temporary name.
    """
    aside = _aside_name(path)
    try:
        yield aside
        if durable:
            for each in (*aside.rglob("*"), aside):
                _sync(each)
        os.rename(aside, path)
        if durable:
            with contextlib.suppress(OSError):  # it has its name: it must not count as not written
                _sync(path.parent)
    except OSError as error:
        if error.filename is None or _ASIDE.fullmatch(os.path.basename(error.filename)):
            error.filename = str(path)
            del error.filename2  # otherwise Python prints `None`
        raise
    finally:
        _remove(aside)


@contextlib.contextmanager
def written_aside(path: Path, durable: bool = False) -> Iterator[IO[bytes]]:
    """A new file, open for writing, that is named `path` when all is written.

    So the file at `path` is always complete, even if the process is killed. If `durable`, that is
    also true after a power failure.
    """
    with _aside(path, durable) as aside:
        # A link that somebody has planted under this name is not followed.
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with open(os.open(aside, flags, 0o666), "w+b") as file:
            yield file


@contextlib.contextmanager
def folder_written_aside(folder: Path) -> Iterator[Path]:
    """`written_aside` for a folder, which must not exist yet. Always durable."""
    with _aside(folder, durable=True) as aside:
        aside.mkdir()
        yield aside


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


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Removes a folder. Renames it first, so that `folder` is never incomplete."""
    aside = _aside_name(folder)
    folder.rename(aside)
    _remove(aside)


def remove_leftovers(folder: Path, *names: str) -> None:
    """Removes what killed processes left half-written under these names (patterns; none: all).

    Call it only while holding the lock that makes this process the only writer of these names.
    Leaves the leftovers of other users.
    """
    for path in list(folder.iterdir()):
        match = _ASIDE.fullmatch(path.name)
        if match and (not names or any(fnmatch.fnmatch(match[1], name) for name in names)):
            with contextlib.suppress(PermissionError):
                _remove(path)


def is_no_room(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def make_folder(folder: Path, private: bool = False) -> Path:
    """Creates the folder if it is missing. Raises UserError if it cannot be written to.

    A `private` folder is made for its user alone. It must not belong to another user, nor may
    everybody write to it: they could plant links there.
    """
    other = "; choose another [train] buffer_folder" if private else ""
    try:
        target = Path(os.path.realpath(folder))  # of a link, the folder may have to be made again
        target.parent.mkdir(parents=True, exist_ok=True)
        target.mkdir(mode=0o700 if private else 0o777, exist_ok=True)
        status, link = target.stat(), folder.lstat()
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{folder}: not a folder; this path or one above it is a file") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be created: {error.strerror}{other}") from None
    inside = f"use a folder inside it, such as {folder / 'batches'}"
    if private and {status.st_uid, link.st_uid} != {os.geteuid()}:
        raise UserError(f"{folder}: belongs to another user; {inside}, or another folder")
    if private and status.st_mode & stat.S_IWOTH:
        raise UserError(f"{folder}: everybody may write to it; chmod o-w {folder}, or {inside}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: cannot be written to{other}")
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


# --- files that are read back ---------------------------------------------------------------


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


def save_array(path: Path, array: np.ndarray) -> None:
    """Writes what np.save writes, aside. Raises OSError with its errno, which np.save loses."""
    with written_aside(path) as file:
        file.write(npy_header(array.dtype, array.shape))
        file.write(np.ascontiguousarray(array).data)


def read_array(path: Path, array: np.ndarray) -> np.ndarray:
    """Fills `array` from a .npy file and returns it. Raises ValueError if the file holds anything
    else.

    Compares the header and the length with the expected ones, and never interprets them. So a
    malicious file can neither run code nor allocate memory.
    """
    header = npy_header(array.dtype, array.shape)

    def read(path: Path) -> np.ndarray:
        with open(path, "rb", opener=_not_blocking) as file:
            begins = file.read(len(header)) == header
            if not begins or file.readinto(array.data) != array.nbytes or file.read(1):
                raise ValueError(f"{path}: does not hold {array.dtype} {list(array.shape)} whole")
        return array

    return patiently(read, path)


def write_text(path: Path, text: str, durable: bool = False) -> None:
    """Writes `text` aside, in UTF-8. Escapes what UTF-8 cannot encode."""
    with written_aside(path, durable) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def record_text(record: object) -> str:
    """A dataclass as a JSON object, in ASCII."""
    return json.dumps(dataclasses.asdict(record), indent=1)


def write_record(path: Path, record: object) -> None:
    """Writes a dataclass as a JSON object, aside and durably."""
    write_text(path, record_text(record), durable=True)


def read_record(kind: type, path: Path) -> Any:
    """The JSON object in a file, as a dataclass of this `kind`; None if there is no such file.

    Raises UserError unless every field has its type, and the values that `kind` accepts.
    """
    try:
        content = read_file(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return as_record(kind, content, f"{path}: not what this toolkit writes")


def as_record(kind: type, text: str | bytes, wrong: str) -> Any:
    """A JSON object as a dataclass of this `kind`, whose annotations are the types. Other names in
    the object are ignored.

    Raises UserError, which begins with `wrong`. A `kind` checks ranges itself, in `__post_init__`,
    and raises ValueError.
    """
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("no JSON object")
        arguments = {}
        for field in dataclasses.fields(kind):
            if field.name in values:
                if not _fits(values[field.name], field.type):
                    name = field.type.__name__ if isinstance(field.type, type) else field.type
                    raise ValueError(f"{field.name} is not {name}")
                arguments[field.name] = values[field.name]
            elif field.default is dataclasses.MISSING:
                raise ValueError(f"{field.name} is missing")
        return kind(**arguments)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are
        raise UserError(f"{wrong}: {error}") from None


def _fits(value: object, hint: Any) -> bool:
    """Whether a value from JSON has the type of an annotation."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind is types.UnionType:
        return any(_fits(value, each) for each in inner)
    if kind is list:
        return isinstance(value, list) and all(_fits(each, inner[0]) for each in value)
    if kind is dict:
        return isinstance(value, dict) and all(_fits(each, inner[1]) for each in value.values())
    if hint is float:
        return type(value) in (int, float) and abs(value) < 1e300
    return hint is Any or type(value) is hint


def read_csv(path: Path, kinds: dict[str, Callable[[str], Any]]) -> list[dict[str, Any]]:
    """The rows of a table. `kinds`: its columns, each with the function that reads a cell.

    Skips rows that were cut off. Empty if there is no such file. Raises UserError if a column is
    missing or a cell cannot be read. Then the file is not ours, and must not be overwritten.
    """
    try:
        text = read_file(path).decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    text = text[: text.rfind("\n") + 1] or text  # a power failure cuts a row off anywhere
    rows, table = [], csv.DictReader(io.StringIO(text, newline=""))
    try:
        if missing := set(kinds).difference(table.fieldnames or kinds):
            raise ValueError(f"not the expected table (no column {min(missing)})")
        for row in table:
            if None not in row and None not in row.values():
                rows.append({name: kind(row[name]) for name, kind in kinds.items()})
    except (csv.Error, ValueError, argparse.ArgumentTypeError) as error:
        where = f"line {table.line_num}: {error}"
        raise UserError(f"{path}: {where}; correct it, or move the file away") from None
    return rows


def write_csv(path: Path, columns: Iterable[str], rows: Iterable[dict]) -> None:
    """Writes a table aside, durably. Floats get six significant digits.

    Raises UserError if it would overwrite a table with other columns, which is not ours.
    """
    columns = list(columns)
    if path.is_file() and not path.is_symlink():  # a link is replaced, not what it names
        with open(path, encoding="utf-8", errors="replace") as old:
            if (head := old.readline(10_000).strip()) not in ("", ",".join(columns)):
                raise UserError(f"{path}: another table ({head[:80]}); move the file away")
    with written_aside(path, durable=True) as file:
        text = io.TextIOWrapper(file, "utf-8", "backslashreplace", newline="")
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: csv_cell(value) for name, value in row.items()} for row in rows)
        text.detach()


def csv_cell(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


# --- locks ----------------------------------------------------------------------------------
# A lock ends with the process that holds it, even if that process is killed. Lock files are never
# removed. Over NFS, other machines see locks on files, but none on folders.

_locks: dict[Path, int] = {}
"""The descriptors that hold this process's locks."""


def lock(path: Path, refusal: str, shared: bool = False) -> None:
    """Locks a file until the process ends. Creates the file if it is missing.

    Several processes can hold the lock if all of them pass `shared`; for that they need only be
    able to read the file. Raises UserError: with `refusal` if another process holds the lock.
    """
    if os.path.islink(path):
        raise UserError(f"{path}: is a link, which this toolkit never makes; remove it")
    mode = os.O_RDONLY if shared else os.O_RDWR
    descriptor = os.open(path, mode | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:  # another name for another file
        os.close(descriptor)
        raise UserError(f"{path}: not a lock file of this toolkit; remove it")
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    for _ in range(5):
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            _locks[path] = descriptor
            return
        except BlockingIOError:
            time.sleep(0.05)  # `is_locked` in another process holds the lock for a moment
        except OSError as error:
            os.close(descriptor)
            raise UserError(
                f"{path}: this file system does not support locks ({error.strerror}); use a local "
                f"disk, a RAM disk, or NFS with its lock service"
            ) from None
    os.close(descriptor)
    raise UserError(refusal)


def hold_lock(path: Path, refusal: str) -> None:
    """Locks a file again if somebody has removed it, alone or with its folder.

    Raises UserError with `refusal` if another process has taken the lock meanwhile.
    """
    held = _locks.get(path)
    if held is not None:
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(held), os.stat(path)):
                return
    lock(path, refusal)
    if held is not None:
        os.close(held)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock on a file; False if there is no such file.

    Also True if we cannot tell: for a file that we may not read, or without locks.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:  # a link is not ours, so none of us holds it
        return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(descriptor)


def _forget_locks() -> None:
    """In a forked process: a lock is held as long as any process has its file open."""
    while _locks:
        os.close(_locks.popitem()[1])


os.register_at_fork(after_in_child=_forget_locks)


# --- parallel work and progress -------------------------------------------------------------


def cores(root: Path = Path("/")) -> int:
    """CPU cores that this process may use. A container's quota counts, rounded up."""
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        count = len(os.sched_getaffinity(0))
    for group in _control_groups(root):
        if match := re.fullmatch(r"(\d+) (\d+)", _content(group / "cpu.max")):  # quota, period
            count = min(count, -(-int(match[1]) // int(match[2])))
    return max(count, 1)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory that this process can still allocate, within a container's limit.

    The file cache counts as free; files on a RAM disk do not. None if unknown (macOS).
    """
    free = []
    if match := re.search(r"MemAvailable:\s+(\d+) kB", _content(root / "proc/meminfo")):
        free.append(1024 * int(match[1]))
    for group in _control_groups(root):
        limit, used = _content(group / "memory.max"), _content(group / "memory.current")
        cached = re.findall(r"inactive_file (\d+)", _content(group / "memory.stat"))
        if limit.isdigit() and used.isdigit():
            free.append(int(limit) - int(used) + max(map(int, cached), default=0))
    return max(min(free), 0) if free else None


def _control_groups(root: Path) -> Iterator[Path]:
    """The folders of the Linux control groups that limit this process."""
    top = root / "sys/fs/cgroup"
    for group in re.findall(r"^0::/(.*)$", _content(root / "proc/self/cgroup"), re.MULTILINE):
        inner = top / group  # missing if a container sees only its own group
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
        if self._terminal and self.done < self.total:
            show_status(f"{bar(self.done / self.total)} {text}")
        else:
            print(text)
            self._pause = min(60.0, self._pause * 1.5)


def bar(share: float, width: int = 20) -> str:
    """A bar of which this share is filled: ████░░░░."""
    filled = round(width * min(max(share, 0.0), 1.0))
    return "█" * filled + "░" * (width - filled)


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
    command line is parsed. A missing TensorFlow is reported in one line.
    """
    # TensorFlow turns oneDNN off on CPUs without AVX-512, which makes a step a fifth slower.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    # TensorFlow imports Keras. We do not use it, so no settings meant for it may end the import.
    os.environ |= {"KERAS_BACKEND": "tensorflow", "KERAS_HOME": os.devnull}
    os.environ.pop("TF_USE_LEGACY_KERAS", None)
    if 0 <= resource.getrlimit(resource.RLIMIT_AS)[0] < 2_000_000_000:  # its import may hang
        _die("TensorFlow needs more memory than `ulimit -v` allows; allow at least 2000000")
    if "--verbose" not in sys.argv:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
    try:
        try:
            yield
        finally:
            os.dup2(_messages, 2)
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
        raise UserError(
            f"--gpu={asked}: TensorFlow finds {found} on this machine; leave out --gpu, or choose "
            f"another"
        )
    chosen = [there[i] for i in wanted if i < len(there)]
    tf.config.set_visible_devices(chosen, "GPU")
    for gpu in chosen:
        tf.config.experimental.set_memory_growth(gpu, True)
    return chosen


class Events:
    """Scalars for TensorBoard, which need not be installed. Names are grouped by the part before
    the slash.

    Each start has a file of its own. Its session log tells readers that the steps from `first_step`
    on begin again, so none is seen twice after a resume. Raises OSError or tf.errors.OpError if the
    folder cannot be written to.
    """

    def __init__(self, folder: Path, first_step: int):
        import tensorflow as tf

        self._summary, log = tf.compat.v1.Summary, tf.compat.v1.SessionLog
        folder.mkdir(parents=True, exist_ok=True)
        with tf.Graph().as_default():  # TensorFlow's writer exists only for graphs
            # Files are named by whole seconds: a start within the same second gets its own.
            suffix = f".{time.time_ns()}"
            self._writer = tf.compat.v1.summary.FileWriter(str(folder), filename_suffix=suffix)
        self._writer.add_session_log(log(status=log.START), first_step)

    def add(self, step: int, scalars: dict[str, float]) -> None:
        value = self._summary.Value
        values = [value(tag=tag, simple_value=scalar) for tag, scalar in scalars.items()]
        self._writer.add_summary(self._summary(value=values), step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
