"""Keeps the buffer filled with batches that are ready to train on.

    python3 runtime_preprocessing.py --epoch_start=0 --epoch_end=30 --batch_size=64

writes `X_<epoch>_<batch>.npy` and `Y_<epoch>_<batch>.npy` to `buffer_folder`, up to `buffer_size`
batches ahead of `training_progress.txt`. It removes the batches that training has used, and ends
when training does. `--benchmark` measures pictures per second instead, and `--preview=sheet.png`
draws a batch as the network will see it.

The sections follow a batch on its way: what the buffer holds; the folder; the loop that keeps it
full, and its workers; one batch; `augment`, the six steps; its two files; train.py's side, which
reads it; benchmark and preview.
"""

import os.path
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -I leaves it out

import utils  # first: it says which package is missing
from utils import TryAgain, UserError, plural

# isort: split
import contextlib
import ctypes
import dataclasses
import functools
import gc
import itertools
import math
import mmap
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import threading
import time
import unicodedata
import weakref
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from preprocess import (
    CROP,
    SIDES,
    BoxChooser,
    BrokenPicture,
    Failures,
    Pictures,
    area_box,
    copies_for,
    crop,
    side_box,
    training_pictures,
)


def main() -> None:
    args = parse_arguments()
    config = utils.load_config(args.config)
    if args.preview:
        draw_preview(batches_for(config, args), args.preview)
        return
    folder = hold_folder(config.train.buffer_folder, LOCK)
    if args.benchmark:
        benchmark(batches_for(config, args), folder)
        return
    set_aside_older_run(folder, args)
    buffer = Buffer(folder, batches_for(config, args), config.train.buffer_size)
    hold_folder(folder, LOCK)  # a logout may have removed it while the pictures were looked for
    buffer.check_size()
    with utils.stop_on_signals() as stop:
        buffer.claim()
        settings = config.runtime_preprocessing
        made = keep_full(buffer, settings.num_of_threads, settings.sleep_time, stop)
        buffer.remove_leftovers()
    if stop.is_set():
        buffer.say_what_stays()
        print(f"{utils.script_name()}: stopped", file=sys.stderr)
        sys.exit(128 + stop.number)
    buffer.leave()
    print(
        f"training has passed epoch {args.epoch_end - 1}; {folder} is empty again. "
        f"Batches made: {made:,}; {buffer.batches.failures}"
    )


def parse_arguments() -> Namespace:
    parser = utils.Parser(
        "Keeps the buffer filled with batches that are ready to train on.",
        "runtime_preprocessing.py --epoch_start=0 --epoch_end=30 --batch_size=64",
    )
    parser.add_epochs()
    parser.add("--batch_size", utils.whole(1), "pictures per batch", utils.REQUIRED)
    parser.add("--preview", Path, "draw a contact sheet of a batch and exit")
    parser.add("--benchmark", None, "measure pictures per second and exit")
    args = parser.parse()
    if args.preview and args.preview.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"--preview={args.preview}: expected a name with .png or .jpg")
    return args


def say_what_is_made(spec: "BatchSpec", layout: str) -> None:
    source = "the originals" if spec.crop == "side" else 'the originals, crop = "area"'
    if sides := len(spec.resized):
        source = f"resized copies for {sides} of the {len(SIDES)} shorter sides, else {source}"
    if spec.workers > 1:
        part = plural(spec.N // spec.workers, "picture")
        source += f"; worker {spec.worker} of {spec.workers} takes {part} of each epoch"
    print(
        f"{plural(spec.classes, 'class')}, {plural(spec.N, 'training picture')}, {layout}; "
        f"{plural(spec.batches_per_epoch, 'batch')} of {spec.batch_size} per epoch, from {source}"
    )


# --- what the buffer holds -------------------------------------------------------------------

BATCH_FILE = re.compile(r"([XY])_(0|[1-9][0-9]*)_(0|[1-9][0-9]*)\.npy")
BUFFER_JSON = "buffer.json"
OLDER_JSON = ".buffer.json.older"
"""The buffer.json of an older run, while a preprocessor starts and looks for the pictures."""
PROGRESS = "training_progress.txt"
BENCHMARK = ".benchmark-batches"
LOCK = ".preprocessor.lock"
TRAINER_LOCK = ".trainer.lock"
HOLDERS = {LOCK: "runtime_preprocessing.py", TRAINER_LOCK: "train.py"}


@dataclass(frozen=True)
class BatchSpec:
    """Describes a buffer's batches and everything they depend on. This is what buffer.json holds.

    Readers in other frameworks can use it too. A step is a batch's number, counted from 0 across
    all epochs. Only file names and messages use epoch and batch.
    """

    batch_size: int
    seed: int
    dataset: str  # folder of the pictures
    N: int  # training pictures
    pictures: str  # their fingerprint
    classes: int  # labels are 0 … classes - 1
    class_names: list[str]  # by label
    mu: list[float]  # mean of the pixels, scaled to 0…1: R, G, B
    sigma: list[float]  # their standard deviation
    resized: list[int]  # shorter sides that are read from resized copies
    worker: int  # index of this machine; each makes its own part of every epoch
    workers: int
    batches_per_epoch: int
    epochs: list[int] = field(compare=False)  # the first, and one past the last
    crop: str = "side"  # or "area": how crops are chosen
    dtype: str = "float16"  # of the pictures
    layout: str = "NHWC, RGB, normalised; labels int32"
    format: int = 1  # version of the files; other versions are never read

    def __post_init__(self) -> None:
        """Raises ValueError if a value is out of range."""
        fits = {
            "batch_size": 1 <= self.batch_size <= self.N <= 10**12,
            "classes": 1 <= self.classes == len(self.class_names),
            "mu": len(self.mu) == 3,
            "sigma": len(self.sigma) == 3 and min(self.sigma) > 0,
            "worker": 0 <= self.worker < self.workers,
            "batches_per_epoch": 1 <= self.batches_per_epoch <= self.N,
            "epochs": len(self.epochs) == 2 and 0 <= self.epochs[0] < self.epochs[1],
            "crop": self.crop in ("side", "area"),
            "dtype": self.dtype == BatchSpec.dtype,
            "format": self.format == BatchSpec.format,
        }
        for name, good in fits.items():
            if not good:
                raise ValueError(f"{name} cannot be {str(getattr(self, name))[:60]}")

    @classmethod
    def read(cls, folder: Path) -> "BatchSpec | None":
        """What buffer.json says; None if there is none. Raises UserError if it is not ours."""
        return utils.read_record(cls, folder / BUFFER_JSON)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of a batch's pictures."""
        return self.batch_size, CROP, CROP, 3

    def step(self, epoch: int, batch: int = 0) -> int:
        return epoch * self.batches_per_epoch + batch

    def position(self, step: int) -> str:
        """The step as epoch and batch, for messages."""
        epoch, batch = divmod(step, self.batches_per_epoch)
        return f"epoch {epoch}, batch {batch}"

    def files(self, folder: Path, step: int) -> tuple[Path, Path]:
        """Paths of a batch's pictures and labels."""
        epoch, batch = divmod(step, self.batches_per_epoch)
        return folder / f"X_{epoch}_{batch}.npy", folder / f"Y_{epoch}_{batch}.npy"

    def step_of(self, name: str) -> int | None:
        """The step of a batch file. None for other names and if the batch number is too large."""
        match = BATCH_FILE.fullmatch(name)
        if not match or int(match[3]) >= self.batches_per_epoch:
            return None
        return self.step(int(match[2]), int(match[3]))

    def differences(self, expected: Mapping[str, object]) -> list[str]:
        """Names of the fields that differ from `expected`."""
        return [name for name, value in expected.items() if getattr(self, name) != value]

    def changed_to(self, other: "BatchSpec") -> list[str]:
        """Names of the fields that differ and matter to a training that has begun."""
        names = self.differences(dataclasses.asdict(other))
        return [name for name in names if name not in ("epochs", "resized")]


def batches_for(config: SimpleNamespace, args: Namespace) -> "Batches":
    """The batches that the settings and the command line ask for. Says what they are made of.

    Raises UserError.
    """
    pictures, how = training_pictures(config), config.runtime_preprocessing.crop
    copies = copies_for(config.preprocess.path_to_save, pictures) if how == "side" else {}
    worker, workers = worker_of_workers()
    share = len(pictures) // workers
    if args.batch_size > share:
        has = f"each of the {workers} workers takes {share} of the" if workers > 1 else "there are"
        raise UserError(
            f"--batch_size={args.batch_size} is too large: {has} {len(pictures)} training pictures"
        )
    spec = BatchSpec(
        batch_size=args.batch_size,
        seed=config.train.seed,
        dataset=str(pictures.folder),
        N=len(pictures),
        pictures=pictures.fingerprint,
        classes=len(pictures.class_names),
        class_names=pictures.class_names,
        mu=config.utils.mu,
        sigma=config.utils.sigma,
        resized=sorted(copies),
        worker=worker,
        workers=workers,
        batches_per_epoch=share // args.batch_size,
        epochs=[args.epoch_start, args.epoch_end],
        crop=how,
    )
    say_what_is_made(spec, pictures.layout)
    return Batches(spec, pictures, copies)


@dataclass
class TFConfig:
    """What the environment variable TF_CONFIG says of several machines that train together."""

    cluster: dict[str, list[str]]  # their addresses, by job
    task: dict[str, Any]  # job and index of this machine

    def __post_init__(self) -> None:
        addresses = {job: self.cluster.get(job, []) for job in ("chief", "worker")}
        machines = [(job, index) for job in addresses for index in range(len(addresses[job]))]
        this = self.task.get("type"), self.task.get("index")
        if this not in machines:
            raise ValueError(f"task {self.task} is not one of the cluster's {len(machines)}")
        for address in itertools.chain(*self.cluster.values()):
            if not re.fullmatch(r".+:[0-9]{1,5}", address):
                raise ValueError(f"{address!r} is not host:port")
        self.worker, self.workers = machines.index(this), len(machines)


def worker_of_workers() -> tuple[int, int]:
    """This machine's index and the number of machines that train together, from TF_CONFIG.

    (0, 1) if the variable is not set. The chief is worker 0. Raises UserError.
    """
    text = os.environ.get("TF_CONFIG", "").strip()
    example = '{"cluster": {"worker": ["host:port", …]}, "task": {"type": "worker", "index": 0}}'
    machines = utils.as_record(TFConfig, text, f"TF_CONFIG: expected {example}") if text else None
    return (machines.worker, machines.workers) if machines else (0, 1)


POSITION = re.compile(rb"\s*(\d{1,9})\s+(\d{1,9})\s*")
"""Epoch and batch in training_progress.txt."""


def write_progress(folder: Path, spec: BatchSpec, step: int) -> None:
    """Writes which batch training reads next. The batches before it may be removed."""
    epoch, batch = divmod(step, spec.batches_per_epoch)
    text = f"{epoch}\n{batch}\n"
    utils.patiently(lambda path: utils.write_text(path, text), folder / PROGRESS)


def read_progress(folder: Path, spec: BatchSpec) -> int | None:
    """The step that training needs next. None if the file is missing or malformed, or if it counts
    more batches in an epoch than there are, as after a run with smaller batches.
    """
    position = read_position(folder)
    if position is None or position[1] >= spec.batches_per_epoch:
        return None
    return spec.step(*position)


def read_position(folder: Path) -> tuple[int, int] | None:
    """The same position, as (epoch, batch)."""
    try:
        text = utils.read_file(folder / PROGRESS)
    except (FileNotFoundError, NotADirectoryError):
        return None
    match = POSITION.fullmatch(text)
    return (int(match[1]), int(match[2])) if match else None


def set_aside_older_run(folder: Path, args: Namespace) -> None:
    """Finding the pictures can take minutes. Until then, nothing of an older run may be taken for
    this one's: neither its buffer.json, nor a position outside this run's epochs.

    Raises UserError if buffer.json is not ours.
    """
    if BatchSpec.read(folder):
        os.rename(folder / BUFFER_JSON, folder / OLDER_JSON)
    position = read_position(folder)
    if position and not args.epoch_start <= position[0] < args.epoch_end:
        (folder / PROGRESS).unlink(missing_ok=True)


# --- the folder -------------------------------------------------------------------------------


def hold_folder(folder: Path, lock: str) -> Path:
    """Makes and locks the folder, again if needed: somebody may remove or move it at any time.

    Raises UserError if another process holds this lock.
    """
    utils.make_folder(folder, private=True)
    way_out = "stop it, or give each its own [train] buffer_folder"
    refusal = f"{folder}: another {HOLDERS[lock]} uses this folder; {way_out}"
    utils.hold_lock(folder / lock, refusal)
    return folder


PAGE = 4096
"""Bytes. A RAM disk stores files in whole pages, so a file takes at most this much more."""


class Buffer:
    """The folder of batches: which are needed, which are ready, and how much room the rest need.

    It reads and removes only files with the toolkit's own names.
    """

    def __init__(self, folder: Path, batches: "Batches", size: int):
        self.folder, self.batches, self.spec = folder, batches, batches.spec
        self.start, self.end = (self.spec.step(epoch) for epoch in self.spec.epochs)
        self.size = min(size, self.end - self.start)
        self.sizes = {
            "X": utils.array_file_size(np.float16, self.spec.shape),
            "Y": utils.array_file_size(np.int32, self.spec.shape[:1]),
        }
        """Bytes of a file."""
        self.json = utils.record_text(self.spec)
        self.pattern = f"{shlex.quote(str(folder))}/[XY]_[0-9]*.npy"
        """What the shell calls the batches."""
        self.said_no_room = False

    def files(self) -> dict[str, int]:
        """The batch files in the folder, with their sizes in bytes."""
        found = {}
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                if BATCH_FILE.fullmatch(entry.name):
                    with contextlib.suppress(FileNotFoundError):  # removed just now
                        found[entry.name] = entry.stat(follow_symlinks=False).st_size
        return found

    def ready(self, files: dict[str, int]) -> set[int]:
        """Steps of the batches whose two files are complete."""
        complete = [name for name, size in files.items() if size == self.sizes[name[0]]]
        x, y = ({self.spec.step_of(name) for name in complete if name[0] == kind} for kind in "XY")
        return (x & y) - {None}

    def check_size(self) -> None:
        """Prints how much room the buffer needs and has. Raises UserError if it has too little."""
        folder, size_of = self.folder, utils.file_size
        own = sum(size + PAGE for size in self.files().values())
        batch = sum(size + PAGE for size in self.sizes.values())
        room = shutil.disk_usage(folder).free + own - PAGE  # for the progress file
        there = f"{folder} has room for {size_of(max(room, 0))}"
        free = utils.available_memory() if is_ram_disk(folder) else None
        if free is not None:
            there += f"; it is a RAM disk, and {size_of(free)} of memory is free"
            # Leave a tenth of the free memory for training, but at least 1 GB and at most half.
            room = min(room, free + own - min(max(10**9, free // 10), free // 2))
        needs = f"{plural(self.size, 'batch')} of {size_of(batch)}"
        if batch * self.size > room:
            way_out = "use another folder or a smaller --batch_size"
            if room >= batch:
                way_out = f"the largest buffer_size that fits is {room // batch}"
            raise UserError(f"[train] buffer_size: no room for {needs}: {there}; {way_out}")
        print(f"buffer: {needs}, together {size_of(batch * self.size)}; {there}")

    def claim(self) -> None:
        """Prepares the folder: removes leftovers, and batches made with other settings.

        Raises UserError if nothing says how the batches there were made.
        """
        files, older = self.files(), self.folder / OLDER_JSON
        old = BatchSpec.read(self.folder) or utils.read_record(BatchSpec, older)
        if files and old is None:
            raise UserError(
                f"{self.folder / min(files)}: no {BUFFER_JSON} says how it was made; remove it (rm "
                f"{self.pattern}), or give the buffer a folder of its own ([train] buffer_folder)"
            )
        if files and old != self.spec:
            others = ", ".join(old.differences(dataclasses.asdict(self.spec)))
            print(f"{self.folder}: removing {plural(len(files), 'file')}, made with other {others}")
            self.remove(files)
        self.remove_leftovers()
        utils.write_text(self.folder / BUFFER_JSON, self.json)
        self.remove([OLDER_JSON])
        if ready := self.ready(self.files()).intersection(self.window(self.wanted_first())):
            print(f"{self.folder}: {plural(len(ready), 'batch')} ready from an earlier run")

    def is_ours(self) -> bool:
        """Whether buffer.json is this buffer's: another preprocessor may have taken the folder."""
        with contextlib.suppress(FileNotFoundError):
            return utils.read_file(self.folder / BUFFER_JSON) == self.json.encode()
        return False

    def look(self) -> dict[str, int]:
        """Returns the batch files. Makes again what somebody has removed: the folder, the lock,
        buffer.json. Raises UserError if another preprocessor was faster.
        """
        with contextlib.suppress(FileNotFoundError):  # removed just now; the next look makes it
            hold_folder(self.folder, LOCK)
            if not (self.folder / BUFFER_JSON).exists():
                utils.write_text(self.folder / BUFFER_JSON, self.json)
            elif not self.is_ours():  # another preprocessor was here, and has ended
                self.claim()
        return self.files()

    def wanted_first(self) -> int:
        """The step that training needs next, or this run's first."""
        step = read_progress(self.folder, self.spec)
        return self.start if step is None else max(step, self.start)

    def window(self, first: int) -> range:
        """The steps that the buffer should hold when training needs `first`."""
        return range(first, min(first + self.size, self.end))

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def remove_batches(self, steps: Iterable[int]) -> None:
        for step in steps:
            self.remove(path.name for path in self.spec.files(self.folder, step))

    def remove_leftovers(self) -> None:
        """Removes what a killed process left half-written. The lock makes this process the only
        writer of these names.
        """
        utils.remove_leftovers(self.folder, "[XY]_*", BUFFER_JSON)
        shutil.rmtree(self.folder / BENCHMARK, ignore_errors=True)

    def leave(self) -> None:
        """Removes everything but the empty lock files."""
        self.remove([*self.files(), PROGRESS, BUFFER_JSON])

    def say_what_stays(self) -> None:
        """Prints how much memory the batches take, and how to free it."""
        if size := sum(self.files().values()):
            print(
                f"{utils.file_size(size)} of batches stay in {self.folder} for the next run; to "
                f"delete them: rm {self.pattern}"
            )


def is_ram_disk(folder: Path) -> bool:
    """Whether Linux keeps the folder's file system in memory. False on other systems."""
    mounts, device = Path("/proc/self/mountinfo"), os.stat(folder).st_dev
    known = mounts.read_bytes() if mounts.exists() else b""
    line = rb"^\d+ \d+ %d:%d .*? - (\w+) " % (os.major(device), os.minor(device))
    mount = re.search(line, known, re.MULTILINE)
    return mount is not None and mount[1] in (b"tmpfs", b"ramfs", b"devtmpfs")


# --- keeping it full --------------------------------------------------------------------------

REFILL_BELOW = 0.8
"""The buffer is refilled when it falls below this share of buffer_size."""

POLL = 0.01
"""Seconds between two checks of training's progress. A check takes 20 µs."""

LOOK_AGAIN = 1.0
"""Seconds between two listings of the folder, in case someone else has changed it. Listing 1,000
batches takes 6 ms."""

SAY_FILLING = 30.0
"""At least this many seconds between two lines while the buffer is not full."""

STUCK = 60.0
"""Seconds without a new batch after which something must hang."""


def keep_full(buffer: Buffer, threads: int, sleep_time: float, stop: utils.Stop) -> int:
    """Keeps the batches that training needs next in the folder, until training has passed the last
    epoch or `stop` is set. Returns the number of batches made.

    The missing batch that training needs first is made first, whatever happens to the progress file
    or the folder.
    """
    ready: set[int] = set()
    under_way: dict[int, Future] = {}
    diary, filling, look_at = Diary(buffer, sleep_time), False, 0.0
    with workers(buffer, threads) as pool:
        while (first := buffer.wanted_first()) < buffer.end and not stop.is_set():
            window = buffer.window(first)
            if is_due := time.monotonic() >= look_at:
                files, look_at = buffer.look(), time.monotonic() + LOOK_AGAIN
                ready = buffer.ready(files)
            missing = [step for step in window if step not in ready and step not in under_way]
            if missing and missing[0] < window.start + REFILL_BELOW * buffer.size:
                filling = True
            if filling:
                if is_due:
                    buffer.remove(name for name in files if buffer.spec.step_of(name) not in window)
                buffer.remove_batches(ready.difference(window))
                ready.intersection_update(window)
                # Two jobs per thread, so that no thread waits for this loop.
                for step in missing[: 2 * threads - len(under_way)]:
                    under_way[step] = pool.submit(make, step)
                filling = bool(under_way)
            wait(under_way.values(), POLL, "FIRST_COMPLETED") if under_way else stop.wait(POLL)
            done = [step for step in under_way if under_way[step].done()]
            made = [step for step in done if collect(step, under_way.pop(step), buffer, ready)]
            if made != done:
                look_at = 0.0  # another batch or the folder was removed
            ready.update(made)
            diary.report(first, len(ready), len(made), filling)
    return diary.made


def collect(step: int, job: Future, buffer: Buffer, ready: set[int]) -> bool:
    """Whether a job has made its batch. Adds the batch's broken pictures to the failures. If there
    was no room, removes the batch that is needed last.

    Raises the exception of a worker, and UserError if too many pictures are broken.
    """
    try:
        broken = job.result()
    except FileNotFoundError:
        return False
    except OSError as error:
        if not utils.is_no_room(error):
            raise
        if not buffer.said_no_room:
            utils.warn(f"{buffer.folder}: no room for another batch; waiting for room")
        buffer.said_no_room = True
        buffer.remove_batches([last] if (last := max(ready, default=step)) > step else [])
        return False
    for path, error in broken:
        buffer.batches.failures.add(path, error)
    buffer.batches.failures.check()
    return True


class Diary:
    """Says how many batches were made, when the buffer is full and now and then while it is not."""

    def __init__(self, buffer: Buffer, pause: float):
        """`pause`: at least this many seconds between two lines."""
        self.buffer, self.pause = buffer, pause
        self.made = self._told = 0
        self._say_at = 0.0
        self._began = self._alive_at = time.monotonic()

    def report(self, first: int, ready: int, made: int, filling: bool) -> None:
        """Called in each round: where training is, how many batches are ready, how many were just
        made, and whether more are wanted.
        """
        now = time.monotonic()
        # A short refill prints no line. What it made is left out of the next line, too.
        self.made += made
        new, passed = self.made - self._told, now - self._began
        is_due = now >= self._say_at and (not filling or passed >= max(self.pause, SAY_FILLING))
        if new and is_due:
            print(
                f"{self.buffer.spec.position(first)}: {plural(ready, 'batch')} ready ahead of "
                f"training, {new:,} just made at "
                f"{new * self.buffer.spec.batch_size / passed:,.0f} pictures/s"
            )
            self._say_at = now + self.pause
        if not filling or (new and is_due):
            self._told, self._began = self.made, now
        if made or not filling:
            self._alive_at = now
        elif now >= self._alive_at + STUCK:
            self._alive_at = now
            utils.warn(
                f"no batch was made for {STUCK:.0f} s, although training needs some: a process or "
                f"the storage of {self.buffer.batches.pictures.folder} hangs, or there is no room"
            )


FORK = sys.platform == "linux"
"""Whether to make batches in processes, because of Python's global lock. On macOS the system
libraries break after a fork, so all threads run in this process."""


@contextlib.contextmanager
def workers(buffer: Buffer, threads: int) -> Iterator[Executor]:
    """A pool that runs `make`. On Linux it ends at once, whatever its workers are doing."""
    global _buffer
    _buffer = buffer
    gc.freeze()  # garbage collection would copy the shared memory into each process
    if FORK:
        # Forks all processes at the first job, before it starts any thread.
        fork = multiprocessing.get_context("fork")
        pool = ProcessPoolExecutor(threads, fork, begin_work)
    else:
        pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    except BrokenProcessPool:
        raise TryAgain(
            "a process that made batches was killed, perhaps for lack of memory; start again; if "
            "it happens again, use a smaller num_of_threads"
        ) from None
    finally:
        if FORK:
            for process in multiprocessing.active_children():
                process.kill()  # it may hang
        pool.shutdown(cancel_futures=True)


_buffer: Buffer
"""What the workers make batches for."""


def begin_work() -> None:
    """Runs first in each process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the main process decides
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: when the parent ends
    if os.getppid() != multiprocessing.parent_process().pid:  # it has ended before
        os._exit(1)


def make(step: int) -> list[tuple[str, BrokenPicture]]:
    """Runs in a worker; see `write_batch`."""
    return write_batch(_buffer, step)


# --- one batch --------------------------------------------------------------------------------

GROUP = 32
"""Pictures augmented together. A larger group makes colour shifts cheaper but takes more memory."""

TRIES = 100
"""Pictures that are tried for one place: the picture itself, then substitutes."""


class Batches:
    """Makes any batch. A batch depends only on the arguments below and on its step.

    Several threads may use it at the same time.
    """

    def __init__(self, spec: BatchSpec, pictures: Pictures, copies: dict[int, Path]):
        """`copies`: the folders of resized copies, by shorter side."""
        self.spec, self.pictures, self.copies = spec, pictures, copies
        self.failures = Failures(len(pictures))
        # 5 MB for ImageNet, in each process: the last one is kept.
        self.order = functools.lru_cache(maxsize=1)(self._draw_order)

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.spec.seed, spawn_key=key))

    def _draw_order(self, epoch: int) -> np.ndarray:
        """int32 [N / workers]: this worker's part of the epoch's permutation of all pictures."""
        order = np.arange(len(self.pictures), dtype=np.int32)
        self._generator(0, epoch).shuffle(order)
        return order[self.spec.worker :: self.spec.workers]

    def parts(self, step: int, broken: list) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the batch in parts of GROUP pictures. Use each part before asking for the next.

        X: float16 [n, 224, 224, 3], overwritten by the next part. Y: int32 [n]. Adds the path and
        the error of each broken picture to `broken`. Raises UserError if no substitute is found.
        """
        spec, size = self.spec, self.spec.batch_size
        epoch, batch = divmod(step, spec.batches_per_epoch)
        chosen = np.zeros(size, np.intp)
        choices = draw_choices(self._generator(1, epoch, batch, spec.worker), size, spec.crop)

        def cut_out(slot: int, choice: Choice) -> Image.Image:
            for index in itertools.islice(self._candidates(epoch, batch, slot), TRIES):
                chosen[slot] = index
                try:
                    return self._crop(index, choice)
                except BrokenPicture as error:
                    broken.append((self.pictures.paths[index], error))
            path, error = broken[-1]
            raise UserError(f"{path}: {error}; {TRIES - 1} others, tried before it, failed too")

        x = np.empty((min(GROUP, size), CROP, CROP, 3), np.float16)
        for start in range(0, size, GROUP):
            group = slice(start, min(start + GROUP, size))
            slots = range(group.start, group.stop)
            augment(cut_out, slots, choices[group], spec.mu, spec.sigma, out=x)
            yield x[: len(slots)], self.pictures.labels[chosen[group]]

    def _candidates(self, epoch: int, batch: int, slot: int) -> Iterator[int]:
        """The picture at this place of a batch, and then, in case it is broken, substitutes."""
        order = self.order(epoch)
        yield int(order[batch * self.spec.batch_size + slot])
        generator = self._generator(2, epoch, batch, self.spec.worker, slot)
        while True:
            yield int(generator.choice(order))

    def _crop(self, index: int, choice: "Choice") -> Image.Image:
        """The crop of a picture, from its resized copy if there is one. Raises BrokenPicture."""
        cut_out = functools.partial(crop, choose_box=choice.box)
        return self.pictures.use(index, cut_out, self.copies.get(choice.side))


# --- the six steps ----------------------------------------------------------------------------


class Choice(NamedTuple):
    """The random choices for a picture."""

    side: int  # shorter side in pixels; 0 with crop = "area"
    box: BoxChooser  # where the crop is, in a picture of a given width and height
    flip: bool
    alpha: np.ndarray  # float64 [3], standard deviation 0.1: strength of the three colour shifts


def draw_choices(generator: np.random.Generator, count: int, how: str) -> list[Choice]:
    """The choices for `count` pictures. `how`: "side" or "area", as in config.txt."""
    # Python numbers: arithmetic with NumPy scalars takes ten times as long.
    if how == "side":
        sides = generator.choice(np.array(SIDES), count).tolist()
        corners = generator.random((count, 2)).tolist()
        boxes = list(map(side_box, sides, corners))
    else:
        sides = [0] * count
        boxes = list(map(area_box, generator.random((count, 10, 4)).tolist()))
    flips = (generator.random(count) < 0.5).tolist()
    alphas = generator.normal(0, 0.1, (count, 3))
    return list(map(Choice, sides, boxes, flips, alphas))


def augment(
    cut_out: Callable[[int, Choice], Image.Image],
    slots: Sequence[int],
    choices: Sequence[Choice],
    mu: list[float],
    sigma: list[float],
    out: np.ndarray,
) -> None:
    """The six steps, for n pictures at a time. Each time a picture is used:

    1. draw a shorter side from 256, 263, … 480;
    2. resize the picture so that its shorter side has this length;
    3. cut out a random 224x224 crop (with crop = "area", 8 to 100% of the picture, in place of
       steps 1 to 3);
    4. normalise: subtract `mu` and divide by `sigma`;
    5. flip it half of the time;
    6. shift its colours a little.

    `cut_out` returns the crop of the picture at one of the `slots` of the batch, 8-bit RGB,
    224x224. `out`: float16 [at least n, 224, 224, 3].
    """
    crops = []
    for slot, choice in zip(slots, choices, strict=True):
        # Steps 1 to 3 at once: no more is decoded and resized than the crop.
        picture = cut_out(slot, choice)
        if choice.flip:  # step 5, which is fastest now
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        crops.append(np.frombuffer(picture.tobytes(), np.uint8).reshape(CROP, CROP, 3))
    # Steps 4 and 6. A result depends only on the 8-bit value, its channel and its picture. So
    # looking it up in a table of 256 entries per channel scales, normalises, shifts and converts to
    # float16 at once.
    levels = (np.arange(256) / 255 - np.array(mu)[:, None]) / np.array(sigma)[:, None]
    shifts = colour_shifts(crops, np.stack([choice.alpha for choice in choices]), sigma)
    tables = (levels + shifts[:, :, None]).astype(np.float16).reshape(len(crops), 3 * 256)
    # NumPy is faster with rows of 3 * 224 values than with pixels of 3. All crops share `index`:
    # allocating it for each would take as long as everything else.
    row = 3 * CROP
    channel = np.tile(np.arange(0, 3 * 256, 256, np.uint16), CROP)  # start of each channel's table
    index = np.empty((CROP, row), np.intp)
    for pixels, table, x in zip(crops, tables, out, strict=False):
        np.add(pixels.reshape(CROP, row), channel, out=index, dtype=np.uint16)
        # Every index is inside the table. "wrap" is NumPy's fastest way of checking that.
        table.take(index, out=x.reshape(CROP, row), mode="wrap")


def colour_shifts(crops: Sequence[np.ndarray], alpha: np.ndarray, sigma: list) -> np.ndarray:
    """Colour shifts as in Krizhevsky et al. 2012, section 4.1, but per crop: float64 [n, 3].

    shift = Σ αᵢ λᵢ vᵢ, where λᵢ and vᵢ are the eigenvalues and eigenvectors of the covariance of
    the crop's normalised pixels. The covariance is estimated from every 4th pixel in both
    directions. On photographs this changes the shifts by 1%, 0.04 levels of 256. Every 8th pixel
    would save a fiftieth of the time per batch, but is far off on regular patterns.
    """
    grid = np.empty((len(crops), 3, CROP // 4, CROP // 4), np.float32)
    for pixels, its_grid in zip(crops, grid, strict=True):
        its_grid[:] = pixels[::4, ::4].transpose(2, 0, 1)
    grid = grid.reshape(len(crops), 3, -1)
    grid -= grid.mean(axis=2, keepdims=True)
    # For matrices this small, matmul is slower and blocks other threads.
    covariance = np.einsum("nck,ndk->ncd", grid, grid).astype(np.float64) / grid.shape[2]
    covariance /= 255.0**2 * np.outer(sigma, sigma)
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    return np.einsum("nck,nk->nc", eigenvectors, alpha * eigenvalues)


# --- the two files of a batch -------------------------------------------------------------------


def write_batch(buffer: Buffer, step: int) -> list[tuple[str, BrokenPicture]]:
    """Makes a batch and writes its two files, labels first: a batch with pictures is whole.

    Returns the broken pictures. Raises FileNotFoundError if the folder is no longer this buffer's.
    Waits a moment before it raises OSError for want of room.
    """
    x_path, y_path = buffer.spec.files(buffer.folder, step)
    labels, broken = [], []
    try:
        with utils.written_aside(x_path) as file:
            file.write(utils.npy_header(np.float16, buffer.spec.shape))
            for x, y in buffer.batches.parts(step, broken):
                file.write(x.data)
                labels.append(y)
            if not buffer.is_ours():
                raise FileNotFoundError(f"{buffer.folder / BUFFER_JSON}: was removed or replaced")
            utils.save_array(y_path, np.concatenate(labels))
    except OSError as error:
        if utils.is_no_room(error):
            time.sleep(1)
        raise
    return broken


# --- train.py's side ----------------------------------------------------------------------------

LOOK = 0.02
"""Seconds between two checks while training waits for a file."""

SAY_WAITING = 3.0
"""Seconds after which a missing batch is worth a line. A preprocessor whose lock was removed
restores it within one second."""


def take_buffer(config: SimpleNamespace) -> Path:
    """Locks the buffer's folder. Raises UserError if another train.py holds the lock."""
    folder = hold_folder(config.train.buffer_folder, TRAINER_LOCK)
    utils.remove_leftovers(folder, PROGRESS)
    return folder


def wait_for_buffer(config: SimpleNamespace, args: Namespace) -> BatchSpec:
    """Locks the buffer, waits for its buffer.json, and returns what that says.

    `args`: the trainer's epoch_start, epoch_end, batch_size and config. Raises UserError if another
    train.py uses the buffer, or if a preprocessor is making batches that do not fit this training.
    """
    folder, say_at = take_buffer(config), 0.0
    while True:
        spec = BatchSpec.read(folder)
        wrong = misfit(spec, config, args.batch_size) if spec else ""
        if spec and not wrong:
            return spec
        state = f"start {preprocessor_command(args)}"
        if utils.is_locked(folder / LOCK):
            state = "runtime_preprocessing.py is starting"
            time.sleep(SAY_WAITING if wrong else 0)  # one that has just begun replaces buffer.json
            if wrong and BatchSpec.read(folder) == spec and utils.is_locked(folder / LOCK):
                raise UserError(f"{folder}: {wrong}; start both scripts with the same value")
        if time.monotonic() >= say_at:
            print(f"no batches in {folder} yet; {wrong}{'; ' if wrong else ''}{state}")
            say_at = time.monotonic() + config.train.sleep_time
        time.sleep(LOOK)


def misfit(spec: BatchSpec, config: SimpleNamespace, batch_size: int) -> str:
    """Why the buffer's batches do not fit a training; "" if they do."""
    folder = config.preprocess.ImageNet_folder
    if not Path(spec.dataset).is_relative_to(folder):
        return f"its batches were made from {spec.dataset}, this training has {folder}"
    worker, workers = worker_of_workers()
    ours = {
        "batch_size": batch_size,
        "seed": config.train.seed,
        "N": config.train.N or spec.N,
        "mu": config.utils.mu,
        "sigma": config.utils.sigma,
        "crop": config.runtime_preprocessing.crop,
        "worker": worker,
        "workers": workers,
    }
    for key in spec.differences(ours):
        made, wanted = getattr(spec, key), ours[key]
        return f"its batches were made with {key} = {made}, this training has {key} = {wanted}"
    return ""


def preprocessor_command(args: Namespace) -> str:
    """The command that makes the batches for train.py with these arguments."""
    return (
        f"python3 runtime_preprocessing.py --epoch_start={args.epoch_start} "
        f"--epoch_end={args.epoch_end} --batch_size={args.batch_size} "
        f"--config={shlex.quote(str(args.config))}"
    )


def end_preprocessing(folder: Path, spec: BatchSpec, epoch_end: int) -> None:
    """Tells runtime_preprocessing.py that training has passed its last epoch.

    Only for a training that holds the lock, and that has used the batches of this buffer. Somebody
    may have removed the folder or buffer.json just now, or prepare another training in it.
    """
    if spec.changed_to(BatchSpec.read(folder) or spec):
        return
    end = spec.step(epoch_end)
    utils.make_folder(folder, private=True)
    remove_batches_before(folder, spec, end)  # makes room, in case there is none
    write_progress(folder, spec, end)


class BatchReader:
    """Reads the batches in order, in its own thread, two batches ahead of training.

    A context manager. It reuses memory as soon as no array or tensor needs it. New memory would
    cost three times as much as reading, because the system clears every page. Reading does not hold
    Python's lock, so the training thread keeps running.
    """

    def __init__(
        self,
        config: SimpleNamespace,
        spec: BatchSpec,
        steps: range,
        to_device: Callable[[np.ndarray, np.ndarray], object],
        args: Namespace,
    ):
        """`to_device` moves a batch's images and labels to the training device. It need not copy
        the images: their memory is not reused while anything refers to it. `args`: as in
        `wait_for_buffer`.
        """
        self.folder, self.sleep_time = config.train.buffer_folder, config.train.sleep_time
        self.spec, self.steps, self.to_device, self.args = spec, steps, to_device, args
        self._to_read = iter(steps)
        self._closed = threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self._ahead: deque[Future] = deque()
        self._free: list[mmap.mmap] = []
        self._checked: tuple[int, ...] = ()
        self._say_at = 0.0

    def __enter__(self) -> "BatchReader":
        self._tell(self.steps.start)
        for step in (self.steps.start, self.steps.stop - 1):
            if line := out_of_reach(self.spec, step, self.args):
                utils.warn(line)
                break
        self._read_ahead()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._pool.shutdown(cancel_futures=True)

    def next(self, stop: utils.Stop) -> object:
        """Returns what `to_device` returned for the next batch, or None if `stop` is set while
        waiting.

        With several machines `stop` counts only if the preprocessor has ended, because all machines
        must take the same steps. Raises UserError or OSError.
        """
        batch, alone = self._ahead[0], self.spec.workers == 1
        while not wait([batch], timeout=0.1).done:
            if stop.is_set() and (alone or not utils.is_locked(self.folder / LOCK)):
                return None
        self._ahead.popleft()
        self._read_ahead()
        return batch.result()

    def _read_ahead(self) -> None:
        while len(self._ahead) < 2 and (step := next(self._to_read, None)) is not None:
            self._ahead.append(self._pool.submit(self._read, step))

    def _read(self, step: int) -> object:
        """Waits for the batch and moves it to the device. None if the reader is closed."""
        say_at = time.monotonic() + min(SAY_WAITING, self.sleep_time)
        self._tell(step)
        while not self._closed.is_set():
            try:
                batch = read_batch(self.folder, self.spec, step, self._free_memory())
                self._check()  # after reading: new batches come after the new buffer.json
            except FileNotFoundError:
                self._check()  # not made yet, or never, if the buffer has become another
            except ValueError as error:
                utils.warn(f"{error}; removed, so that it is made again")
                for path in self.spec.files(self.folder, step):
                    path.unlink(missing_ok=True)
            else:
                return self.to_device(*batch)
            if time.monotonic() >= max(say_at, self._say_at):
                file = self.spec.files(self.folder, step)[0]
                print(f"waiting for {file}: {why_missing(self.folder, step, self.args)}")
                self._say_at = time.monotonic() + self.sleep_time
            self._closed.wait(LOOK)
            if read_progress(self.folder, self.spec) != step:  # lost, or there was no room
                self._tell(step)
        return None

    def _free_memory(self) -> np.ndarray:
        """float16 [batch_size, 224, 224, 3] in memory that nothing else uses, aligned to a page."""
        shape = self.spec.shape
        memory = self._free.pop() if self._free else mmap.mmap(-1, 2 * math.prod(shape))
        # Every view of this array keeps it alive, including TensorFlow's.
        array = np.frombuffer(memory, np.float16)
        weakref.finalize(array, self._free.append, memory)
        return array.reshape(shape)

    def _check(self) -> None:
        """Raises UserError if the buffer's batches are not those that training began with."""
        try:
            status = utils.patiently(os.stat, self.folder / BUFFER_JSON)
        except FileNotFoundError:
            return  # a preprocessor is starting; it first removes batches that do not fit
        version = (status.st_ino, status.st_mtime_ns, status.st_size)
        if version != self._checked:  # reading 1,000 class names for every batch takes too long
            found = BatchSpec.read(self.folder) or self.spec
            for key in self.spec.changed_to(found):
                raise UserError(
                    f"{self.folder}: {key} of its batches changed after this training began; "
                    f"stop runtime_preprocessing.py, or start this training again"
                )
        self._checked = version

    def _tell(self, step: int) -> None:
        """Writes which batch is needed next, in a folder that may have been removed.

        If there is no room, removes the batches that training has used: the preprocessor cannot
        know them. `_read` tries again.
        """
        try:
            hold_folder(self.folder, TRAINER_LOCK)
            write_progress(self.folder, self.spec, step)
        except FileNotFoundError:
            pass  # removed just now
        except OSError as error:
            if not utils.is_no_room(error):
                raise
            remove_batches_before(self.folder, self.spec, step)


def remove_batches_before(folder: Path, spec: BatchSpec, step: int) -> None:
    for name in os.listdir(folder):
        if spec.step_of(name) in range(step):
            (folder / name).unlink(missing_ok=True)


def why_missing(folder: Path, step: int, args: Namespace) -> str:
    """Why a batch is missing, judging by the buffer's files, and what to do about it."""
    if not utils.is_locked(folder / LOCK):
        return f"no runtime_preprocessing.py is running; start {preprocessor_command(args)}"
    spec = BatchSpec.read(folder)
    if spec is None:
        return "runtime_preprocessing.py is starting"
    if line := out_of_reach(spec, step, args):
        return line
    if read_progress(folder, spec) != step:
        return f"there is no room for {PROGRESS}, which says what to make; free some space"
    return "runtime_preprocessing.py is at work; its output says why this takes so long"


def out_of_reach(spec: BatchSpec, step: int, args: Namespace) -> str:
    """What to do if the preprocessor was started with epochs that lack this step, else ""."""
    epoch, (start, end) = step // spec.batches_per_epoch, spec.epochs
    if start <= epoch < end:
        return ""
    return (
        f"runtime_preprocessing.py was started with --epoch_start={start} --epoch_end={end}, but "
        f"this training needs epoch {epoch}; stop it and start {preprocessor_command(args)}"
    )


def read_batch(
    folder: Path, spec: BatchSpec, step: int, images: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Reads a batch into `images`, float16 [batch_size, 224, 224, 3]. Returns it and the labels,
    int32 [batch_size].

    Raises FileNotFoundError if a file is missing, ValueError if it holds anything else, and
    UserError if the storage keeps failing.
    """
    x_path, y_path = spec.files(folder, step)
    labels = np.empty(spec.batch_size, np.int32)
    utils.read_array(x_path, images)
    utils.read_array(y_path, labels)
    if labels.min() < 0 or labels.max() >= spec.classes:
        raise ValueError(f"{y_path}: labels outside 0 … {spec.classes - 1}")
    return images, labels


# --- benchmark and preview ----------------------------------------------------------------------


def benchmark(batches: Batches, folder: Path, seconds: float = 8.0) -> None:
    """Prints pictures per second for 1, 2, 4 … threads.

    With slow storage, more threads than cores can help, so it continues as long as they do. Raises
    UserError if there is no room.
    """
    threads, most, rates = 1, max(4 * utils.cores(), 8), {}
    # The system caches files, so every benchmark and every number of threads reads new pictures.
    step = batches.spec.step(random.randrange(1000, 1_000_000))
    while threads <= most or rates[threads // 2] > 1.1 * rates[threads // 4]:
        rates[threads], begun = measure(batches, folder, threads, step, seconds)
        step += begun
        print(
            f"{plural(threads, 'thread'):>10} {rates[threads]:8,.0f} pictures/s "
            f"{rates[threads] / threads:8,.0f} per thread   x{rates[threads] / rates[1]:.2f}"
        )
        threads *= 2
    best = next(n for n in rates if rates[n] > 0.98 * max(rates.values()))
    print(
        f"this machine prepares {rates[best]:,.0f} pictures/s with num_of_threads = {best}; if "
        f"`train.py --synthetic` trains fewer, the GPU will not wait for data"
    )


def measure(
    batches: Batches, folder: Path, threads: int, step: int, seconds: float
) -> tuple[float, int]:
    """Makes batches from `step` on, and removes each. Returns pictures per second and the number of
    batches begun.

    All threads finish their batches at about the same time. So only whole rounds count, one batch
    per thread, and the first round is left out.
    """
    buffer, under_way, made = Buffer(folder / BENCHMARK, batches, threads), {}, 0
    shutil.rmtree(buffer.folder, ignore_errors=True)  # of a benchmark that was killed
    buffer.folder.mkdir()
    try:
        buffer.claim()
        with workers(buffer, threads) as pool:
            while True:
                while len(under_way) < 2 * threads:  # as in `keep_full`
                    begun = made + len(under_way)
                    under_way[pool.submit(make, step + begun)] = step + begun
                job = wait(under_way, return_when="FIRST_COMPLETED").done.pop()
                done = under_way.pop(job)
                if not collect(done, job, buffer, set()):
                    raise UserError(f"{folder}: no room for two batches per thread")
                buffer.remove_batches([done])
                made += 1
                if made == threads:
                    start = time.perf_counter()
                elif made % threads == 0 and (passed := time.perf_counter() - start) >= seconds:
                    begun = made + len(under_way)
                    return (made - threads) * batches.spec.batch_size / passed, begun
    finally:
        shutil.rmtree(buffer.folder)


def draw_preview(batches: Batches, file: Path) -> None:
    """Draws a contact sheet of the first batch as the network will see it, with class names."""
    spec = batches.spec
    step = spec.step(spec.epochs[0])
    broken = []
    x, y = next(batches.parts(step, broken))
    for path, error in broken:
        batches.failures.add(path, error)
    pixels = x.astype(np.float32) * np.float32(spec.sigma) + np.float32(spec.mu)
    pixels = np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)
    title = (
        f"{spec.position(step)}: {len(x)} of {plural(spec.batch_size, 'picture')}, as the network "
        f"sees them"
    )
    captions = [[spec.class_names[label]] for label in y]
    sheet = contact_sheet(pixels, captions, title, columns=min(8, len(pixels)))
    with utils.written_aside(file.absolute()) as aside:
        sheet.save(aside, "PNG" if file.suffix.lower() == ".png" else "JPEG", quality=95)
    print(f"wrote {file}")


def contact_sheet(
    pictures: np.ndarray, captions: Sequence[Sequence[str]], title: str, columns: int
) -> Image.Image:
    """Pictures in rows, with lines of text below each. pictures: uint8 [n, 224, 224, 3], RGB."""
    gap, line, head, lines = 12, 20, 40, max(map(len, captions), default=1)
    width, height = CROP + gap, CROP + line * lines + gap  # of a picture with its caption
    font, small = ImageFont.load_default(18), ImageFont.load_default(16)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (gap + columns * width, head + rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((gap, 10), shortened(title, font, sheet.width - gap), "black", font)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = gap + i % columns * width, head + i // columns * height
        sheet.paste(Image.fromarray(picture), (left, top))
        for number, text in enumerate(caption):
            at = (left, top + CROP + 4 + line * number)
            pen.text(at, shortened(text, small, CROP), "black", small)
    return sheet


def shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """`text` in ASCII, cut to at most `width` pixels. Pillow's own font has only ASCII."""
    text = unicodedata.normalize("NFKD", utils.printable(text).replace("ß", "ss"))
    text = "".join(c for c in text if not unicodedata.combining(c))
    text = text.encode("ascii", "backslashreplace").decode()[:200]
    while font.getlength(text) > width:
        text = text.rstrip("…")[:-1] + "…"
    return text


if __name__ == "__main__":
    utils.run(main)
