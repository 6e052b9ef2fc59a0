"""Keeps the buffer filled with batches that are ready to train on.

    python3 runtime_preprocessing.py --epoch_start=0 --epoch_end=30 --batch_size=64

writes `X_<epoch>_<batch>.npy` and `Y_<epoch>_<batch>.npy` to `buffer_folder`, up to `buffer_size`
batches ahead of `training_progress.txt`. It removes the batches that training has used, and ends
when training does. `--benchmark` measures pictures per second instead, and `--preview=sheet.png`
draws a batch as the network will see it.

Each picture goes through six steps: draw a shorter side s from 256, 263, … 480; resize the picture
so that its shorter side is s; cut out a random 224x224 crop; normalise; flip half of the time;
shift the colours a little. The first three happen together: only the crop's window is decoded and
resized.
"""

import contextlib
import dataclasses
import difflib
import functools
import gc
import json
import math
import mmap
import multiprocessing
import os
import random
import re
import select
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
import unicodedata
import weakref
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import get_origin

import utils
from utils import CROP, UserError, plural

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from preprocess import (
    SIDES,
    BrokenPicture,
    Failures,
    Pictures,
    crop_file,
    resized_folders,
    training_pictures,
    unless_gone,
)

REFILL_BELOW = 0.8
"""The buffer is refilled when it falls below this share of buffer_size."""


def main() -> None:
    args = parse_arguments()
    config = utils.load_config(args.config)
    folder, settings = config.train.buffer_folder, config.runtime_preprocessing
    before = read_position(folder)
    pictures = training_pictures(config)
    copies = resized_folders(config.preprocess.path_to_save, pictures)
    recipe = Recipe(spec_of(config, pictures, copies, args), pictures, copies)
    print(describe(recipe))
    if args.preview:
        draw_preview(recipe, args.preview)
        return
    utils.make_folder(folder)
    # The system releases the lock when the process ends, even if it is killed.
    utils.lock(
        folder / LOCK,
        f"{folder}: another runtime_preprocessing.py uses this folder; give each its own",
    )
    if args.benchmark:
        benchmark(recipe, folder)
        utils.remove_lock(folder / LOCK)
        return
    buffer = Buffer(folder, recipe, config.train.buffer_size)
    buffer.check_room()
    with last_words(folder):
        buffer.claim(before)
        made = keep_full(buffer, settings.num_of_threads, settings.sleep_time)
        buffer.leave()
    print(
        f"training has passed epoch {args.epoch_end - 1}; {folder} is empty again. "
        f"Batches made: {made:,}; {recipe.failures}"
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
    return parser.parse()


def describe(recipe: "Recipe") -> str:
    """Says what will be made, and from what."""
    spec, source = recipe.spec, "the originals"
    if sides := len(recipe.copies):
        source = f"resized copies for {sides} of the {len(SIDES)} shorter sides, else {source}"
    if spec.workers > 1:
        part = plural(spec.N // spec.workers, "picture")
        source += f"; worker {spec.worker} of {spec.workers} takes {part} of each epoch"
    epochs = spec.epochs[1] - spec.epochs[0]
    return (
        f"{plural(spec.classes, 'class')}, {plural(spec.N, 'training picture')}, "
        f"{recipe.pictures.layout}; {plural(spec.batches_per_epoch, 'batch')} of "
        f"{spec.batch_size} per epoch, {epochs * spec.batches_per_epoch:,} in "
        f"{plural(epochs, 'epoch')}, from {source}"
    )


STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that ask the script to stop: Ctrl-C, kill, a closed terminal."""


@contextlib.contextmanager
def last_words(folder: Path) -> Iterator[None]:
    """On a signal to stop, prints how much room the buffer takes and how to free it.

    A second signal ends the process at once. Raises UserError if the folder was removed.
    """
    caught = [each for each in STOPPING if signal.getsignal(each) != signal.SIG_IGN]  # nohup

    def stop(number: int, _frame: object) -> None:
        for each in caught:
            # Not SIG_DFL: Python prints a traceback if the second signal is just coming in.
            signal.signal(each, lambda number, _frame: os._exit(128 + number))
        sys.exit(128 + number)

    for each in caught:
        signal.signal(each, stop)
    try:
        yield
    except SystemExit:
        with os.scandir(folder) as entries:
            size = sum(_size(entry) for entry in entries if BATCH_FILE.fullmatch(entry.name))
        if size:
            print(
                f"{utils.file_size(size)} of batches stay in {folder} for the next run; to delete "
                f"them: rm {shlex.quote(str(folder))}/[XY]_[0-9]*.npy"
            )
        print(f"{utils.script_name()}: stopped", file=sys.stderr)
        raise
    except FileNotFoundError:
        if folder.is_dir():
            raise
        raise UserError(f"{folder}: was removed; start again to recreate it") from None


# --- what a buffer holds ---------------------------------------------------------------------

BATCH_FILE = re.compile(r"([XY])_(0|[1-9][0-9]*)_(0|[1-9][0-9]*)\.npy")


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
    dtype: str = "float16"  # of the pictures
    layout: str = "NHWC, RGB, normalised; labels int32"
    format: int = 1  # version of the files; other versions are never read

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

    def changes(self, new: "BatchSpec") -> str:
        """Says in words what differs in `new`. Ignores the epochs."""
        words = []
        for name in self.differences(dataclasses.asdict(new)):
            if name in IN_WORDS:
                words.append(f"other {IN_WORDS[name]}")
            elif name != "epochs":
                words.append(f"{name} was {getattr(self, name)}, now {getattr(new, name)}")
        return "; ".join(words)

    def write(self, folder: Path) -> None:
        utils.write_text(folder / BUFFER_JSON, json.dumps(dataclasses.asdict(self), indent=1))

    @classmethod
    def read(cls, folder: Path) -> "BatchSpec | None":
        """The content of buffer.json; None if it is missing or has another version."""
        content = utils.read_json(folder / BUFFER_JSON) or {}
        types = {each.name: get_origin(each.type) or each.type for each in dataclasses.fields(cls)}
        if {name: type(value) for name, value in content.items()} != types:
            return None
        return cls(**content) if content["format"] == cls.format else None


BUFFER_JSON = "buffer.json"
PROGRESS = "training_progress.txt"
LOCK = ".preprocessor.lock"
TRAINER_LOCK = ".trainer.lock"

IN_WORDS = {"class_names": "class names", "pictures": "pictures", "resized": "resized copies"}
"""Fields of BatchSpec whose values are too long for a message."""


def spec_of(config: SimpleNamespace, pictures: Pictures, copies: Iterable[int], args) -> BatchSpec:
    """The batches that the settings and the command line ask for. Raises UserError."""
    worker, workers = worker_of_workers()
    share = len(pictures) // workers
    if args.batch_size > share:
        has = f"each of the {workers} workers takes {share} of the" if workers > 1 else "there are"
        raise UserError(
            f"--batch_size={args.batch_size} is too large: {has} {len(pictures)} training pictures"
        )
    return BatchSpec(
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
    )


def worker_of_workers() -> tuple[int, int]:
    """This machine's index and the number of machines that train together, from TF_CONFIG.

    (0, 1) if the variable is not set. The chief is worker 0. Raises UserError.
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
            f'"task": {{"type": "worker", "index": 0}}}}, not {utils.one_line(text)[:80]}'
        ) from None
    if task["type"] not in ("chief", "worker") or not 0 <= index < chiefs + others:
        raise UserError(f"TF_CONFIG: task {task} is not one of the cluster's {chiefs + others}")
    return index, chiefs + others


POSITION = re.compile(rb"\s*(\d{1,9})\s+(\d{1,9})\s*")
"""Epoch and batch in training_progress.txt."""


def write_progress(folder: Path, spec: BatchSpec, step: int) -> None:
    """Writes which batch training needs next."""
    epoch, batch = divmod(step, spec.batches_per_epoch)
    text = f"{epoch}\n{batch}\n"
    utils.patiently(lambda path: utils.write_text(path, text), folder / PROGRESS)


def read_progress(folder: Path, spec: BatchSpec) -> int | None:
    """The step that training needs next. None if the file is missing or malformed."""
    position = read_position(folder)
    return spec.step(*position) if position else None


def read_position(folder: Path) -> tuple[int, int] | None:
    """The same position, as (epoch, batch)."""
    try:
        text = utils.read_file(folder / PROGRESS)
    except (FileNotFoundError, NotADirectoryError):
        return None
    match = POSITION.fullmatch(text)
    return (int(match[1]), int(match[2])) if match else None


def is_own(path: Path) -> bool:
    """Whether this toolkit wrote the file, judging by its first bytes.

    Empty files and files of zeros count as its own. A power failure leaves them, and removing them
    loses nothing.
    """

    def read_start(path: Path) -> bytes:
        with open(path, "rb") as file:
            return file.read(4096)

    start = utils.patiently(read_start, path)
    if not start.strip(b"\0"):
        return True
    if path.name == BUFFER_JSON:
        return b'"batch_size"' in start
    if path.name == PROGRESS:
        return POSITION.fullmatch(start) is not None
    dtype, shape = ("<f2", f", {CROP}, {CROP}, 3)") if path.name[0] == "X" else ("<i4", ",)")
    return start.startswith(b"\x93NUMPY") and dtype.encode() in start and shape.encode() in start


# --- what a batch is made of ----------------------------------------------------------------


@dataclass
class Choices:
    """The random choices for a batch, one row per picture."""

    side: np.ndarray  # int64 [n]: shorter side in pixels
    corner: np.ndarray  # float64 [n, 2] in [0, 1): the crop's position, from the left, from the top
    flip: np.ndarray  # bool [n]
    alpha: np.ndarray  # float64 [n, 3], standard deviation 0.1: strength of the three colour shifts


def draw_choices(generator: np.random.Generator, count: int) -> Choices:
    """The choices for `count` pictures."""
    return Choices(
        generator.choice(np.array(SIDES), count),
        generator.random((count, 2)),
        generator.random(count) < 0.5,
        generator.normal(0, 0.1, (count, 3)),
    )


class Recipe:
    """Makes any batch. A batch depends only on the arguments below and on its step.

    Several threads may use it at the same time.
    """

    def __init__(self, spec: BatchSpec, pictures: Pictures, copies: dict[int, Path]):
        """`copies`: the folders of resized copies, by shorter side."""
        self.spec, self.pictures, self.copies = spec, pictures, copies
        self.failures = Failures(len(pictures))
        self.report: Callable[[str, BrokenPicture], None] = self.failures.add
        """Called for each picture that cannot be decoded."""
        self._order = functools.lru_cache(maxsize=2)(self._draw_order)
        self._one_at_a_time = threading.Lock()

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.spec.seed, spawn_key=key))

    def order(self, epoch: int) -> np.ndarray:
        """int32 [N / workers]: this worker's part of the epoch's permutation of all pictures."""
        with self._one_at_a_time:  # otherwise every thread would shuffle
            return self._order(epoch)

    def _draw_order(self, epoch: int) -> np.ndarray:
        order = np.arange(len(self.pictures), dtype=np.int32)
        self._generator(0, epoch).shuffle(order)
        return order[self.spec.worker :: self.spec.workers]

    def make(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """X: float16 [batch_size, 224, 224, 3], Y: int32 [batch_size]; see `parts`."""
        x, y = zip(*((x.copy(), y) for x, y in self.parts(step)), strict=True)
        return np.concatenate(x), np.concatenate(y)

    def parts(self, step: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the batch in parts of GROUP pictures. Use each part before asking for the next.

        X: float16 [n, 224, 224, 3], overwritten by the next part. Y: int32 [n]. Raises UserError
        if too many pictures are broken.
        """
        spec, size = self.spec, self.spec.batch_size
        epoch, batch = divmod(step, spec.batches_per_epoch)
        chosen = self.order(epoch)[batch * size : (batch + 1) * size].tolist()
        choices = draw_choices(self._generator(1, epoch, batch, spec.worker), size)
        # Python numbers: arithmetic with NumPy scalars takes ten times as long.
        sides, corners = choices.side.tolist(), choices.corner.tolist()
        x = np.empty((min(GROUP, size), CROP, CROP, 3), np.float16)
        for start in range(0, size, GROUP):
            part, crops = slice(start, min(start + GROUP, size)), []
            for slot in range(part.start, part.stop):
                crop = self._crop(chosen[slot], sides[slot], corners[slot])
                if crop is None:
                    substitutes = self._generator(2, epoch, batch, spec.worker, slot)
                    while crop is None:
                        chosen[slot] = int(substitutes.choice(self.order(epoch)))
                        crop = self._crop(chosen[slot], sides[slot], corners[slot])
                if choices.flip[slot]:
                    crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                crops.append(np.frombuffer(crop.tobytes(), np.uint8).reshape(CROP, CROP, 3))
            finish(crops, choices.alpha[part], spec.mu, spec.sigma, out=x[: len(crops)])
            yield x[: len(crops)], self.pictures.labels[chosen[part]]

    def _crop(self, index: int, side: int, corner: list[float]) -> Image.Image | None:
        """The crop of a picture, from its resized copy if there is one. None if it is broken."""
        path, folders = self.pictures.paths[index], [self.pictures.folder]
        if side in self.copies:
            folders.insert(0, self.copies[side])  # if the copy is broken, the original is used
        for folder in folders:
            try:
                return unless_gone(
                    lambda path: crop_file(path, side, corner), folder, f"{folder}/{path}"
                )
            except BrokenPicture as error:
                why = error
        self.report(path, why)
        return None


# --- the six steps --------------------------------------------------------------------------


GROUP = 32
"""Pictures finished together. A larger group makes colour shifts cheaper but takes more memory."""


def finish(
    crops: Sequence[np.ndarray], alpha: np.ndarray, mu: list, sigma: list, out: np.ndarray
) -> None:
    """Steps 4 and 6: normalises n crops and shifts their colours.

    `crops`: uint8 [224, 224, 3] each. `out`: float16 [n, 224, 224, 3]. A result depends only on the
    8-bit value, its channel and its crop. So looking it up in a table of 256 entries per channel
    scales, normalises, shifts and converts to float16 at once.
    """
    shifts = colour_shifts(crops, alpha, sigma)
    levels = (np.arange(256) / 255 - np.array(mu)[:, None]) / np.array(sigma)[:, None]
    tables = (levels + shifts[:, :, None]).astype(np.float16).reshape(len(crops), 3 * 256)
    # NumPy is faster with rows of 3 * 224 values than with pixels of 3. All crops share `index`:
    # allocating it for each would take as long as everything else.
    row = 3 * CROP
    channel = np.tile(np.arange(0, 3 * 256, 256, np.uint16), CROP)  # start of each channel's table
    index = np.empty((CROP, row), np.intp)
    for crop, table, x in zip(crops, tables, out, strict=True):
        np.add(crop.reshape(CROP, row), channel, out=index, dtype=np.uint16)
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
    for crop, its_grid in zip(crops, grid, strict=True):
        its_grid[:] = crop[::4, ::4].transpose(2, 0, 1)
    grid = grid.reshape(len(crops), 3, -1)
    grid -= grid.mean(axis=2, keepdims=True)
    # For matrices this small, matmul is slower and blocks other threads.
    covariance = np.einsum("nck,ndk->ncd", grid, grid).astype(np.float64) / grid.shape[2]
    covariance /= 255.0**2 * np.outer(sigma, sigma)
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    return np.einsum("nck,nk->nc", eigenvectors, alpha * eigenvalues)


# --- the buffer -----------------------------------------------------------------------------


class Buffer:
    """The folder of batches: knows which are needed and which are there, makes the missing ones.

    It reads and removes only files with the toolkit's own names.
    """

    _said_too_early = _said_no_room = False

    def __init__(self, folder: Path, recipe: Recipe, size: int):
        self.folder, self.recipe, self.spec = folder, recipe, recipe.spec
        self.start, self.end = (self.spec.step(epoch) for epoch in self.spec.epochs)
        self.size = min(size, self.end - self.start)
        self.x_bytes = utils.array_file_size(np.float16, self.spec.shape)
        self.y_bytes = utils.array_file_size(np.int32, self.spec.shape[:1])

    def claim(self, before: tuple[int, int] | None = None) -> None:
        """Prepares the folder for this recipe: removes leftovers and batches of other recipes.

        `before`: the epoch and batch in the progress file when this script started. Raises
        UserError if a file has one of the toolkit's names but was not written by it.
        """
        names, old = self._batch_names(), BatchSpec.read(self.folder)
        if old != self.spec:
            for path in (self.folder / name for name in (*names, BUFFER_JSON, PROGRESS)):
                if path.exists() and not is_own(path):
                    raise UserError(
                        f"{path}: not written by this toolkit, and would be overwritten; give the "
                        f"buffer a folder of its own ([train] buffer_folder)"
                    )
            if names:
                making = old.changes(self.spec) if old else "it is not known how they were made"
                print(f"{self.folder}: removing {plural(len(names), 'file')}: {making}")
            self._remove(names)
        utils.remove_leftovers(self.folder)
        self.spec.write(self.folder)
        # A position outside this run's epochs was left by an older run. But if it is new, training
        # has ended while this script was starting.
        step, is_new = read_progress(self.folder, self.spec), read_position(self.folder) != before
        if step is not None and not is_new and not self.start <= step < self.end:
            self._remove([PROGRESS])
        first = self.wanted_first()
        if ready := [n for n in self.ready() if first <= n < first + self.size]:
            print(f"{self.folder}: {plural(len(ready), 'batch')} ready from an earlier run")

    def check_room(self) -> None:
        """Prints how much room the buffer needs and how much there is. Raises UserError if too
        little.
        """
        folder, size_of = self.folder, utils.file_size
        own = sum(on_disk((folder / name).stat().st_size) for name in self._batch_names())
        room = shutil.disk_usage(folder).free + own
        room = max(room - 4096, 0)  # replacing training_progress.txt takes a page
        batch = on_disk(self.x_bytes) + on_disk(self.y_bytes)
        needed, in_memory = batch * self.size, is_ram_disk(folder)
        free = utils.available_memory() if in_memory else None
        memory = "" if free is None else f"; free memory: {size_of(free)}"
        print(
            f"buffer: {plural(self.size, 'batch')} of {size_of(batch)} in {folder}"
            f"{', a RAM disk' if in_memory else ''}: needs {size_of(needed)}, has room for "
            f"{size_of(room)}{memory}"
        )
        if not in_memory and looks_like_a_ram_disk(folder):
            utils.warn(
                f"[train] buffer_folder {folder} looks like a RAM disk, but is on a disk; "
                f"training may have to wait for it. Is the RAM disk mounted?"
            )
        limits = [(room, f"{folder} has room for {size_of(room)}")]
        if free is not None:
            # Leave a tenth of the free memory for training, but at least 1 GB and at most half.
            limit = free + own - min(max(10**9, free // 10), free // 2)
            why = f"{folder} is a RAM disk and may take {size_of(limit)} of memory"
            limits.append((limit, f"{why}: {size_of(free)} is free, and training needs some"))
        room, why = min(limits)
        if needed > room:
            way_out = f"the largest buffer_size that fits is {room // batch}"
            if room < batch:
                way_out = "not even one batch fits: use another folder or a smaller --batch_size"
            raise UserError(
                f"[train] buffer_size = {self.size} needs {size_of(needed)}, but "
                f"buffer_folder {why}; {way_out}"
            )

    def wanted_first(self) -> int:
        """The step that training needs next. Warns once if it is before this run's epochs."""
        step = read_progress(self.folder, self.spec)
        if step is None:
            return self.start
        if step < self.start and not self._said_too_early:
            utils.warn(
                f"training needs {self.spec.position(step)}, before --epoch_start="
                f"{self.spec.epochs[0]}; start this script again with "
                f"--epoch_start={step // self.spec.batches_per_epoch}"
            )
        self._said_too_early = step < self.start
        return step

    def ready(self) -> set[int]:
        """Steps of the batches whose two files both exist and are complete."""
        sizes = {"X": self.x_bytes, "Y": self.y_bytes}
        complete: dict[str, set[int]] = {"X": set(), "Y": set()}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                step, kind = self.spec.step_of(entry.name), entry.name[0]
                if step is not None and _size(entry) == sizes[kind]:
                    complete[kind].add(step)
        return complete["X"] & complete["Y"]

    def remove_all_but(self, window: range) -> None:
        """Removes all batches outside the window, no matter which run made them."""
        self._remove(name for name in self._batch_names() if self.spec.step_of(name) not in window)

    def remove(self, steps: Iterable[int]) -> None:
        """Removes these batches if they exist."""
        for step in steps:
            self._remove(path.name for path in self.spec.files(self.folder, step))

    def make(self, step: int) -> bool:
        """Makes a batch, labels first. If there is no room, waits a moment and returns False."""
        x_path, y_path = self.spec.files(self.folder, step)
        labels = []
        try:
            with utils.array_written_aside(x_path, np.float16, self.spec.shape) as file:
                for x, y in self.recipe.parts(step):
                    file.write(x.data)
                    labels.append(y)
                utils.save_array(y_path, np.concatenate(labels))
        except OSError as error:
            if not utils.is_no_room(error):
                raise
            time.sleep(1)
            return False
        return True

    def no_room(self) -> None:
        """Warns once that there is no room for a batch."""
        if not self._said_no_room:
            utils.warn(f"{self.folder}: no room for another batch; waiting for room")
        self._said_no_room = True

    def leave(self) -> None:
        """Removes all of the toolkit's files from the folder."""
        self.remove_all_but(range(0))
        utils.remove_leftovers(self.folder)
        self._remove([PROGRESS, BUFFER_JSON])
        for name in (TRAINER_LOCK, LOCK):
            utils.remove_lock(self.folder / name)

    def _batch_names(self) -> list[str]:
        return [name for name in os.listdir(self.folder) if BATCH_FILE.fullmatch(name)]

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            (self.folder / name).unlink(missing_ok=True)


def is_ram_disk(folder: Path) -> bool:
    """Whether Linux keeps the folder's file system in memory. False on other systems."""
    mounts, device = Path("/proc/self/mountinfo"), os.stat(folder).st_dev
    known = mounts.read_bytes() if mounts.exists() else b""
    line = rb"^\d+ \d+ %d:%d .*? - (\w+) " % (os.major(device), os.minor(device))
    mount = re.search(line, known, re.MULTILINE)
    return mount is not None and mount[1] in (b"tmpfs", b"ramfs", b"devtmpfs")


def looks_like_a_ram_disk(folder: Path) -> bool:
    """Whether part of the path is named, or almost named, like a RAM disk."""
    words = [re.sub("[^a-z]", "", part.lower()) for part in folder.parts]
    names = ("ramdisk", "ramfs", "tmpfs")
    close = any(difflib.get_close_matches(word, names, 1, 0.8) for word in words)
    meant = close or {"shm", "ram"} & {*words} or words[1:2] == ["run"]
    return sys.platform == "linux" and bool(meant)


def on_disk(size: int) -> int:
    """Bytes that a file of this size takes on a RAM disk, in whole pages."""
    return -(-size // 4096) * 4096


def _size(entry: os.DirEntry) -> int:
    try:
        return entry.stat().st_size
    except FileNotFoundError:  # removed after the folder was listed
        return 0


# --- keeping it full ------------------------------------------------------------------------

POLL = 0.01
"""Seconds between two checks of training's progress. A check takes 20 µs."""

SAY_FILLING = 30.0
"""At least this many seconds between two lines while the buffer is not full."""

LOOK_AGAIN = 1.0
"""Seconds between two listings of the folder, in case someone else has changed it. Listing 1,000
batches takes 6 ms."""


def keep_full(buffer: Buffer, threads: int, sleep_time: float, quiet: bool = False) -> int:
    """Keeps the buffer full until training has passed the last epoch. Returns the number of batches
    made. If `quiet`, it does not print what it makes.

    It always makes the missing batch that training needs first, whatever happens to the progress
    file or the folder.
    """
    stock = Stock(buffer, min(LOOK_AGAIN, sleep_time))
    diary, filling = Diary(buffer.spec.batch_size, sleep_time), False
    with Workers(buffer, threads) as workers:
        while (first := buffer.wanted_first()) < buffer.end:
            window = stock.follow(first)
            enough = min(window.start + REFILL_BELOW * buffer.size, window.stop)
            if not filling and stock.nearest_missing() < enough:
                filling = True
                diary.begin()
            if filling:
                stock.remove_used()
                # Two jobs per thread, so that no thread waits for this loop.
                while (
                    len(stock.under_way) < 2 * threads
                    and (step := stock.nearest_missing()) < window.stop
                ):
                    stock.under_way.add(step)
                    workers.submit(step)
                filling = bool(stock.under_way)
                if not quiet and (not filling or diary.is_due()):
                    ready = plural(len(stock.ready.intersection(window)), "batch")
                    diary.tell(f"{buffer.spec.position(first)}: {ready}")
            for step, done in workers.results(min(POLL, sleep_time)):
                stock.made(step, done)
                diary.made += done
    return diary.made


class Stock:
    """Tracks which batches of the window are ready, so that the folder is rarely listed."""

    def __init__(self, buffer: Buffer, look_again: float):
        self.buffer, self.look_again = buffer, look_again
        self.window = range(0)
        self.ready: set[int] = set()
        self.under_way: set[int] = set()
        self._look_at = 0.0  # when to list the folder again
        self._next = 0  # all batches before this step are ready or under way
        self._used: list[int] = []
        self._sweep = False

    def follow(self, first: int) -> range:
        """Moves the window to where training is, and returns it.

        Lists the folder if that is due, if training has jumped, or if the batch it needs was
        removed.
        """
        buffer, old = self.buffer, self.window
        first = max(first, buffer.start)
        self.window = range(first, min(first + buffer.size, buffer.end))
        jumped = not old.start <= first <= old.stop
        lost = first in self.ready and not buffer.spec.files(buffer.folder, first)[0].exists()
        if jumped or lost or time.monotonic() >= self._look_at:
            self._look()
        else:
            self._used += range(old.start, first)
            self._next = max(self._next, first)
        return self.window

    def _look(self) -> None:
        start = time.thread_time()
        self.ready = self.buffer.ready().intersection(self.window)
        self._next, self._used, self._sweep = self.window.start, [], True
        # Listing takes at most a hundredth of the time, however many batches there are.
        pause = max(self.look_again, 100 * (time.thread_time() - start))
        self._look_at = time.monotonic() + pause

    def nearest_missing(self) -> int:
        """The first step that is neither ready nor under way; the window's end if there is none."""
        while self._next < self.window.stop and (
            self._next in self.ready or self._next in self.under_way
        ):
            self._next += 1
        return self._next

    def made(self, step: int, done: bool) -> None:
        """Records that a job has ended. `done` is False if there was no room."""
        self.under_way.discard(step)
        if not done:
            self._next = self.window.start
            self.buffer.no_room()
        elif step in self.window:
            self.ready.add(step)
        else:
            self._used.append(step)

    def remove_used(self) -> None:
        """Removes used batches. After a listing, removes every batch outside the window."""
        if self._sweep:
            self.buffer.remove_all_but(self.window)
        self.buffer.remove(self._used)
        self._used, self._sweep = [], False


class Diary:
    """Counts the batches made and prints the count when the buffer is full, and now and then while
    it is not.
    """

    def __init__(self, batch_size: int, pause: float):
        """`pause`: minimum number of seconds between two lines."""
        self.batch_size, self.pause = batch_size, pause
        self.made = self._told = 0
        self._seconds, self._told_at = 0.0, -math.inf

    def begin(self) -> None:
        self._since = time.monotonic()

    def is_due(self) -> bool:
        """Whether it is time for a line although the buffer is not full yet."""
        return time.monotonic() >= self._since + max(self.pause, SAY_FILLING)

    def tell(self, what: str) -> None:
        """Prints a line, unless there is nothing new or the last line is less than `pause` ago.

        `what`: where training is, and how many batches are ready.
        """
        now, new = time.monotonic(), self.made - self._told
        self._seconds, self._since = self._seconds + now - self._since, now
        if new and now >= self._told_at + self.pause:
            rate = new * self.batch_size / max(self._seconds, 1e-9)
            print(f"{what} ready ahead of training, {new:,} just made at {rate:,.0f} pictures/s")
            self._told, self._seconds, self._told_at = self.made, 0.0, now


FORK = sys.platform == "linux"
"""Whether to make batches in forked processes. On macOS the system libraries break after a fork, so
all threads run in this process."""


class Workers:
    """Threads that make batches, spread over processes because of Python's global lock.

    A context manager. All threads read their jobs from one pipe. The batch needed first comes
    first. A job is a step in 8 bytes, which a pipe never splits. When this process ends, even if it
    is killed, the pipe closes and the other processes end at once.
    """

    def __init__(self, buffer: Buffer, threads: int):
        self.buffer = buffer
        self._jobs, self._submit = os.pipe()
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._results, self._running = [], []
        gc.freeze()  # garbage collection would copy the shared memory into each process
        count = min(threads, utils.cores()) if FORK else 1
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # only this process handles them
        for share in [len(range(i, threads, count)) for i in range(count)]:
            ours, theirs = multiprocessing.Pipe(duplex=False)
            self._results.append(ours)
            if FORK:
                fork = multiprocessing.get_context("fork")
                process = fork.Process(target=self._process, args=(share, theirs), daemon=True)
                process.start()
                self._running.append(process)
                theirs.close()
            else:
                self._running += self._threads(share, theirs)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        os.close(self._submit)
        for each in self._running:
            each.join()
        os.close(self._jobs)
        for connection in self._results:
            connection.close()
        utils.remove_leftovers(self.buffer.folder)

    def submit(self, step: int) -> None:
        os.write(self._submit, step.to_bytes(8))

    def results(self, timeout: float) -> list[tuple[int, bool]]:
        """Steps whose jobs have ended, each with whether there was room for the batch.

        Raises the exception of a thread, and UserError if too many pictures are broken.
        """
        done = []
        for connection in multiprocessing.connection.wait(self._results, timeout):
            try:
                message = connection.recv()
            except EOFError:
                raise UserError(
                    "a process that made batches was killed, perhaps for lack of memory; start "
                    "again; if it happens again, use a smaller num_of_threads"
                ) from None
            if isinstance(message, Exception):
                raise message
            if isinstance(message[1], BrokenPicture):
                self.buffer.recipe.failures.add(*message)
            else:
                done.append(message)
        return done

    def _process(self, threads: int, results: Connection) -> None:
        """Runs in each forked process, until the job pipe closes."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        kept = (0, 1, 2, self._jobs, results.fileno())
        for descriptor in {*map(int, os.listdir("/dev/fd"))}.difference(kept):
            with contextlib.suppress(OSError):
                os.close(descriptor)  # a lock is held while any process has its file open
        self.buffer.recipe.report = lambda *broken: self._send(results, broken)
        self._threads(threads, results)
        hung_up = select.poll()
        hung_up.register(self._jobs, 0)
        hung_up.poll()
        os._exit(0)

    def _threads(self, count: int, results: Connection) -> list[threading.Thread]:
        threads = [
            threading.Thread(target=self._make, args=[results], daemon=True) for _ in range(count)
        ]
        for thread in threads:
            thread.start()
        return threads

    def _make(self, results: Connection) -> None:
        """Runs in each thread: one job after another. The main process raises its exceptions."""
        try:
            while not self._stopped.is_set() and (job := os.read(self._jobs, 8)):
                step = int.from_bytes(job)
                self._send(results, (step, self.buffer.make(step)))
        except Exception as error:
            error.add_note(traceback.format_exc())
            self._send(results, error)

    def _send(self, results: Connection, message: object) -> None:
        """`message`: a step and whether there was room, a path and why it is broken, or an
        exception.
        """
        with self._lock:
            results.send(message)


# --- taking batches from the buffer ----------------------------------------------------------


def take_buffer(config: SimpleNamespace) -> Path:
    """Locks the buffer's folder. Raises UserError if another train.py holds the lock."""
    folder = utils.make_folder(config.train.buffer_folder)
    utils.lock(folder / TRAINER_LOCK, f"{folder}: another train.py uses this buffer")
    return folder


def end_preprocessing(folder: Path, epoch_end: int) -> None:
    """Tells runtime_preprocessing.py that training has passed its last epoch, and releases the
    buffer.
    """
    if spec := BatchSpec.read(folder):
        for path in spec.files(folder, spec.step(epoch_end) - 1):
            path.unlink(missing_ok=True)  # makes room, in case there is none
        write_progress(folder, spec, spec.step(epoch_end))
    utils.remove_lock(folder / TRAINER_LOCK)


def check_spec(spec: BatchSpec, config: SimpleNamespace, batch_size: int, folder: Path) -> None:
    """Raises UserError if the buffer's batches do not fit this training, and says why."""
    worker, workers = worker_of_workers()
    ours = {
        "batch_size": batch_size,
        "seed": config.train.seed,
        "N": config.train.N or spec.N,
        "mu": config.utils.mu,
        "sigma": config.utils.sigma,
        "worker": worker,
        "workers": workers,
    }
    for key in spec.differences(ours):
        raise UserError(
            f"{folder}: its batches were made with {key} = {getattr(spec, key)}, this training "
            f"has {key} = {ours[key]}; start both scripts with the same value"
        )


LOOK = 0.02
"""Seconds between two checks while training waits for a file."""


def wait_for_buffer(config: SimpleNamespace, args: Namespace) -> BatchSpec:
    """Locks the buffer, waits for its buffer.json, and returns what that says.

    `args`: the trainer's epoch_start, epoch_end, batch_size and config. Raises UserError if another
    train.py uses the buffer, or if its batches do not fit this training.
    """
    folder, say_at = take_buffer(config), 0.0
    while (spec := BatchSpec.read(folder)) is None:
        if time.monotonic() >= say_at:
            state = "runtime_preprocessing.py is starting"
            if not utils.is_locked(folder / LOCK):
                state = f"start {preprocessor_command(args)}"
            print(f"no batches in {folder} yet; {state}")
            say_at = time.monotonic() + config.train.sleep_time
        time.sleep(LOOK)
    check_spec(spec, config, args.batch_size, folder)
    return spec


def preprocessor_command(args: Namespace) -> str:
    """The command that makes the batches for train.py with these arguments."""
    return (
        f"python3 runtime_preprocessing.py --epoch_start={args.epoch_start} "
        f"--epoch_end={args.epoch_end} --batch_size={args.batch_size} "
        f"--config={shlex.quote(str(args.config))}"
    )


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
        put: Callable[[np.ndarray, np.ndarray], object],
        args: Namespace,
    ):
        """`put` moves a batch's images and labels to the training device. It need not copy the
        images: their memory is not reused while anything refers to it. `args`: as in
        `wait_for_buffer`.
        """
        self.folder, self.sleep_time = config.train.buffer_folder, config.train.sleep_time
        self.spec, self.steps, self.put, self.args = spec, steps, put, args
        self._to_read = iter(steps)
        self._closed = threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self._ahead: deque[Future] = deque()
        self._free: list[mmap.mmap] = []
        self._checked: tuple[int, ...] = ()
        self._say_at = 0.0

    def __enter__(self) -> "BatchReader":
        self._tell(self.steps.start)
        first, last = self.steps.start, self.steps.stop - 1
        if line := out_of_reach(self.spec, first) or out_of_reach(self.spec, last):
            utils.warn(line)
        self._read_ahead()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._pool.shutdown(cancel_futures=True)

    def next(self, stop: threading.Event) -> object:
        """Returns what `put` returned for the next batch, or None if `stop` is set while waiting.

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
        """Waits for the batch and returns what `put` makes of it. None if the reader is closed."""
        say_at = time.monotonic() + min(1, self.sleep_time)
        self._tell(step)
        while not self._closed.is_set():
            try:
                self._check()
                return self.put(*read_batch(self.folder, self.spec, step, self._free_memory()))
            except FileNotFoundError:
                pass  # not made yet
            except ValueError as error:
                utils.warn(f"{error}; removed, so that it is made again")
                for path in self.spec.files(self.folder, step):
                    path.unlink(missing_ok=True)
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
        status = utils.patiently(os.stat, self.folder / BUFFER_JSON)
        version = (status.st_ino, status.st_mtime_ns, status.st_size)
        if version == self._checked:  # reading 1,000 class names for every batch takes too long
            return
        spec = BatchSpec.read(self.folder)
        if spec is None:
            raise FileNotFoundError
        for key in self.spec.differences(dataclasses.asdict(spec)):
            if key not in ("epochs", "resized"):
                raise UserError(
                    f"{self.folder}: {key} of its batches changed after this training began; "
                    f"stop runtime_preprocessing.py, or start this training again"
                )
        self._checked = version

    def _tell(self, step: int) -> None:
        """Writes which batch is needed next. If there is no room, `_read` tries again later."""
        try:
            write_progress(self.folder, self.spec, step)
        except OSError as error:
            if not utils.is_no_room(error):
                raise


def why_missing(folder: Path, step: int, args: Namespace) -> str:
    """Why a batch is missing, judging by the buffer's files, and what to do about it."""
    if not utils.is_locked(folder / LOCK):
        return f"no runtime_preprocessing.py is running; start {preprocessor_command(args)}"
    spec = BatchSpec.read(folder)
    if spec is None:
        return "runtime_preprocessing.py is starting"
    if line := out_of_reach(spec, step):
        return line
    if read_progress(folder, spec) != step:
        return f"there is no room for {PROGRESS}, which says what to make; free some space"
    return "runtime_preprocessing.py is at work; its output says why this takes so long"


def out_of_reach(spec: BatchSpec, step: int) -> str | None:
    """What to do if the preprocessor was started with epochs that lack this step, else None."""
    epoch, (start, end) = step // spec.batches_per_epoch, spec.epochs
    if start <= epoch < end:
        return None
    flag = f"--epoch_start={start}" if epoch < start else f"--epoch_end={end}"
    better = f"--epoch_start={epoch}" if epoch < start else f"--epoch_end={epoch + 1} or more"
    return (
        f"runtime_preprocessing.py was started with {flag}, but this training needs epoch {epoch}; "
        f"stop it and start it again with {better}"
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
    utils.patiently(lambda path: read_array(path, images), x_path)
    labels = utils.load_array(y_path, np.int32, spec.shape[:1])
    if labels.min() < 0 or labels.max() >= spec.classes:
        raise ValueError(f"{y_path}: labels outside 0 … {spec.classes - 1}")
    return images, labels


def read_array(path: Path, array: np.ndarray) -> None:
    """Fills a contiguous array from a .npy file. Raises ValueError as `utils.load_array` does."""
    header = utils.npy_header(array.dtype, array.shape)
    start, content = bytearray(len(header)), array.reshape(-1).view(np.uint8).data
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe must not block
    try:
        if os.fstat(descriptor).st_size != len(header) + len(content):
            raise ValueError(f"{path}: is cut off, or longer than its array")
        count = os.readv(descriptor, [start, content]) - len(start)
        while 0 <= count < len(content) and (more := os.readv(descriptor, [content[count:]])):
            count += more
    finally:
        os.close(descriptor)
    if start != header or count < len(content):
        raise ValueError(f"{path}: does not hold {array.dtype} {list(array.shape)}")


# --- benchmark and preview ------------------------------------------------------------------


def benchmark(recipe: Recipe, folder: Path, seconds: float = 8.0) -> None:
    """Prints pictures per second for 1, 2, 4 … threads. They fill a buffer just as for training.

    With slow storage, more threads than cores can help, so it continues as long as they do. Raises
    UserError if there is no room.
    """
    utils.remove_leftovers(folder)
    threads, most, rates = 1, max(4 * utils.cores(), 8), {}
    # The system caches files, so every benchmark and every number of threads reads new pictures.
    step = recipe.spec.step(random.randrange(1000, 1_000_000))
    while threads <= most or rates[threads // 2] > 1.1 * rates[threads // 4]:
        rates[threads], made = measure(recipe, folder, threads, step, seconds)
        step += made + 3 * threads  # beyond every batch that was begun
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
    recipe: Recipe, folder: Path, threads: int, step: int, seconds: float
) -> tuple[float, int]:
    """Makes batches from `step` on. Returns pictures per second and the number of batches made."""
    aside = utils.aside_name(folder / "benchmark")
    aside.mkdir()
    try:
        buffer = TakenBuffer(aside, recipe, threads, step, seconds)
        made = keep_full(buffer, threads, POLL, quiet=True)
    finally:
        shutil.rmtree(aside)
    return buffer.rate, made


class TakenBuffer(Buffer):
    """A buffer with a stand-in for training, which takes each batch as soon as it is ready."""

    def __init__(self, folder: Path, recipe: Recipe, threads: int, step: int, seconds: float):
        super().__init__(folder, recipe, 3 * threads)
        self.start, self.end, self.size = step, sys.maxsize, 3 * threads
        self.first, self.threads, self.seconds = step, threads, seconds
        self._began = self.rate = 0.0

    def wanted_first(self) -> int:
        """The next step to take, or the end when the time is up.

        All threads finish their batches at about the same time. So only whole rounds count, one
        batch per thread, and the first round is left out.
        """
        while self.spec.files(self.folder, self.first)[0].exists():
            self.first += 1
            taken, now = self.first - self.start - self.threads, time.perf_counter()
            if taken == 0:
                self._began = now
            elif taken > 0 and taken % self.threads == 0:
                self.rate = taken * self.spec.batch_size / (now - self._began)
                if now >= self._began + self.seconds:
                    return self.end
        return self.first

    def no_room(self) -> None:
        raise UserError(f"{self.folder.parent}: no room for three batches per thread")


def draw_preview(recipe: Recipe, file: Path, most: int = 32) -> None:
    """Draws a contact sheet of the first batch as the network will see it, with class names."""
    spec = recipe.spec
    step = spec.step(spec.epochs[0])
    x, y = recipe.make(step)
    pixels = x[:most].astype(np.float32) * np.float32(spec.sigma) + np.float32(spec.mu)
    pixels = np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)
    gap, head, columns = 12, 40, min(8, len(pixels))
    width, height = CROP + gap, CROP + 26 + gap  # of a picture with its caption
    font, small = ImageFont.load_default(18), ImageFont.load_default(16)
    size = (gap + columns * width, head + -(-len(pixels) // columns) * height)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    shown = f"first {len(pixels)} of {len(x)} pictures" if len(x) > most else f"{len(x)} pictures"
    title = f"{spec.position(step)}: {shown}, as the network sees them"
    pen.text((gap, 10), title, "black", font)
    for i, (picture, label) in enumerate(zip(pixels, y, strict=False)):
        left, top = gap + i % columns * width, head + i // columns * height
        sheet.paste(Image.fromarray(picture), (left, top))
        name = shortened(spec.class_names[label], small, CROP)
        pen.text((left, top + CROP + 4), name, "black", small)
    if file.is_dir():
        raise UserError(f"--preview={file} is a folder, not a file")
    try:
        with utils.written_aside(file.absolute()) as aside:
            sheet.save(aside, format="PNG")
    except FileNotFoundError:
        raise UserError(f"--preview={file}: no such folder") from None
    print(f"wrote {file}")


def shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """`text` in ASCII, cut to at most `width` pixels. Pillow's own font has only ASCII."""
    text = unicodedata.normalize("NFKD", utils.one_line(text).replace("ß", "ss"))
    text = "".join(c for c in text if not unicodedata.combining(c))
    text = text.encode("ascii", "backslashreplace").decode()
    while font.getlength(text) > width:
        text = text.rstrip("…")[:-1] + "…"
    return text


if __name__ == "__main__":
    utils.run(main)
