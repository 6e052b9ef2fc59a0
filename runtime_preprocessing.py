"""Keeps the buffer full of batches that are ready to train on, as fast as training takes them.

    python3 runtime_preprocessing.py --epoch_start=0 --epoch_end=30 --batch_size=64

writes `X_<epoch>_<batch>.npy` and `Y_<epoch>_<batch>.npy` into `buffer_folder`, `buffer_size` of
each ahead of `training_progress.txt`, removes what training has used, and ends with training.
With `--benchmark` it measures pictures per second instead, and with `--preview=sheet.png` it draws
a batch as the network will see it.

A picture goes through six steps: a shorter side s is drawn from 256, 263, … 480; the picture is
resized to it; a random crop of 224x224 is cut out; it is normalised; it is flipped in half of the
cases; its colours are shifted a little. The first three are one: only the window of the crop is
resized, straight from as much of the JPEG as the window needs.
"""

import contextlib
import dataclasses
import difflib
import functools
import json
import math
import mmap
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import unicodedata
import weakref
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
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
)

REFILL_BELOW = 0.8
"""Share of buffer_size under which the buffer is filled up again."""


def main() -> None:
    args = parse_arguments()
    config = utils.load_config(args.config)
    pictures = training_pictures(config)
    copies = resized_folders(config.preprocess.path_to_save, pictures)
    spec = spec_of(config, pictures, copies, args)
    recipe = Recipe(spec, pictures, copies)
    print(describe(recipe, args.epoch_end - args.epoch_start))
    if args.preview:
        draw_preview(recipe, args.preview, spec.step(args.epoch_start))
        return
    folder = utils.make_folder(config.train.buffer_folder)
    # The lock is held until the process ends, however it ends.
    utils.lock(
        folder / LOCK, f"{folder}: another runtime_preprocessing.py works here; give each its own"
    )
    if args.benchmark:
        benchmark(recipe, folder)
        return
    buffer = Buffer(folder, recipe, config.train.buffer_size)
    buffer.check_room()
    with stopping_says_what_stays(folder):
        buffer.claim()
        made = keep_full(
            buffer,
            config.runtime_preprocessing.num_of_threads,
            config.runtime_preprocessing.sleep_time,
        )
        buffer.leave()
    print(
        f"training has passed epoch {args.epoch_end - 1}; {folder} is empty again. "
        f"Batches made: {made:,}; {recipe.failures}"
    )


def parse_arguments():
    parser = utils.Parser(
        "Keeps the buffer full of batches that are ready to train on.",
        "runtime_preprocessing.py --epoch_start=0 --epoch_end=30 --batch_size=64",
    )
    parser.add_epochs()
    parser.add_argument(
        "--batch_size", type=utils.whole(1), required=True, metavar="B", help="pictures a batch"
    )
    parser.add_argument(
        "--preview", type=Path, metavar="FILE", help="draw a contact sheet of a batch and exit"
    )
    parser.add_argument(
        "--benchmark", action="store_true", help="measure pictures per second and exit"
    )
    return parser.parse()


def describe(recipe: "Recipe", epochs: int) -> str:
    """What is going to happen."""
    spec, sides = recipe.spec, len(recipe.copies)
    source = "the originals"
    if sides:
        source = f"resized copies in {sides} of the {len(SIDES)} shorter sides, else {source}"
    if spec.workers > 1:
        part = spec.N // spec.workers
        source += (
            f"; worker {spec.worker} of {spec.workers}, {plural(part, 'picture')} are its part"
        )
    return (
        f"{plural(spec.classes, 'class')}, {plural(spec.N, 'training picture')}, "
        f"{recipe.pictures.layout}; {plural(spec.batches_per_epoch, 'batch')} of "
        f"{spec.batch_size} an epoch, {epochs * spec.batches_per_epoch:,} in "
        f"{plural(epochs, 'epoch')}, from {source}"
    )


class Stopped(KeyboardInterrupt):
    """A signal that asks the script to stop. Its argument is the signal's number."""


@contextlib.contextmanager
def stopping_says_what_stays(folder: Path) -> Iterator[None]:
    """Makes Ctrl-C, SIGTERM and SIGHUP say how much the buffer still takes, and how to free it.

    A second signal ends the process at once.
    """
    signals, process = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP), os.getpid()
    caught = [each for each in signals if signal.getsignal(each) != signal.SIG_IGN]  # nohup

    def stop(number: int, _frame: object) -> None:
        for each in caught:
            signal.signal(each, signal.SIG_DFL)
        if os.getpid() != process:  # forked since
            os.kill(os.getpid(), number)
        raise Stopped(number)

    for each in caught:
        signal.signal(each, stop)
    try:
        yield
    except Stopped as stopped:
        with os.scandir(folder) as entries:
            size = sum(max(_size(each), 0) for each in entries if BATCH_FILE.fullmatch(each.name))
        if size:
            print(
                f"{utils.file_size(size)} of batches stay in {folder} for the next start; to free "
                f"them: rm {shlex.quote(str(folder))}/[XY]_[0-9]*.npy"
            )
        if stopped.args[0] == signal.SIGINT:
            raise  # Python's own
        print(f"{utils.script_name()}: stopped", file=sys.stderr)
        sys.exit(128 + stopped.args[0])


# --- what a buffer holds ---------------------------------------------------------------------

BATCH_FILE = re.compile(r"([XY])_(0|[1-9][0-9]*)_(0|[1-9][0-9]*)\.npy")


@dataclass(frozen=True)
class BatchSpec:
    """What the batches of a buffer are, and all that they depend on: the content of buffer.json.

    It also tells a reader of another framework what to expect. Steps count the batches from 0
    through all epochs; only file names and messages say epoch and batch.
    """

    batch_size: int
    seed: int
    dataset: str
    """Folder of the pictures."""
    N: int
    """Training pictures."""
    pictures: str
    """Fingerprint of the training pictures."""
    classes: int
    """Labels are 0 … classes - 1."""
    class_names: list[str]
    """By label."""
    mu: list[float]
    sigma: list[float]
    """Mean and standard deviation that the pixels are normalised with; R, G, B, scaled to 0…1."""
    resized: list[int]
    """Shorter sides whose resized copies are used instead of the originals."""
    worker: int
    workers: int
    """Of several machines each makes its own part of every epoch."""
    batches_per_epoch: int
    epochs: list[int] = field(compare=False)
    """The first epoch, and the one to stop before."""
    dtype: str = "float16"
    """Of the pictures."""
    layout: str = "NHWC, RGB, normalised; labels int32"
    """Of X: pictures, rows, columns, channels."""
    format: int = 1
    """Of the files. Another version's batches are never read."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the pictures of a batch."""
        return self.batch_size, CROP, CROP, 3

    def step(self, epoch: int, batch: int = 0) -> int:
        return epoch * self.batches_per_epoch + batch

    def position(self, step: int) -> str:
        """The step as messages say it."""
        epoch, batch = divmod(step, self.batches_per_epoch)
        return f"epoch {epoch}, batch {batch}"

    def files(self, folder: Path, step: int) -> tuple[Path, Path]:
        """Paths of the pictures and of the labels of a batch."""
        epoch, batch = divmod(step, self.batches_per_epoch)
        return folder / f"X_{epoch}_{batch}.npy", folder / f"Y_{epoch}_{batch}.npy"

    def step_of(self, name: str) -> int | None:
        """The step of a batch file; None for any other name, and for a batch no epoch has."""
        match = BATCH_FILE.fullmatch(name)
        if not match or int(match[3]) >= self.batches_per_epoch:
            return None
        return self.step(int(match[2]), int(match[3]))

    def differences(self, expected: Mapping[str, object]) -> list[str]:
        """Names of the fields that are not as expected."""
        return [name for name, value in expected.items() if getattr(self, name) != value]

    def changes(self, new: "BatchSpec") -> str:
        """What differs in another description, in words; epochs aside."""
        words = []
        for name in self.differences(dataclasses.asdict(new)):
            values = f"{getattr(self, name)}, now {getattr(new, name)}"
            if name in IN_WORDS:
                words.append(f"other {IN_WORDS[name]}")
            elif name != "epochs":
                words.append(f"{name} was {values}")
        return "; ".join(words)

    def write(self, folder: Path) -> None:
        utils.write_text(folder / BUFFER_JSON, json.dumps(dataclasses.asdict(self), indent=1))

    @classmethod
    def read(cls, folder: Path) -> "BatchSpec | None":
        """The buffer's description; None if there is none, or one of another version."""
        content = utils.read_json(folder / BUFFER_JSON) or {}
        types = {each.name: get_origin(each.type) or each.type for each in dataclasses.fields(cls)}
        if {name: type(value) for name, value in content.items()} != types:
            return None
        return cls(**content)


BUFFER_JSON = "buffer.json"
PROGRESS = "training_progress.txt"
LOCK = ".preprocessor.lock"
TRAINER_LOCK = ".trainer.lock"

IN_WORDS = {
    "class_names": "class names",
    "pictures": "pictures",
    "resized": "resized copies",
}
"""Fields of BatchSpec whose values are too long for a message."""


def spec_of(config: SimpleNamespace, pictures: Pictures, copies: Iterable[int], args) -> BatchSpec:
    """The batches that this configuration and command line ask for. Raises UserError."""
    worker, workers = worker_of_workers()
    share = len(pictures) // workers
    if args.batch_size > share:
        part = f"a {workers}-th of " if workers > 1 else ""
        raise UserError(
            f"--batch_size={args.batch_size} is larger than {part}the {len(pictures)} training "
            f"pictures"
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
            f'"task": {{"type": "worker", "index": 0}}}}, not {utils.one_line(text)[:80]}'
        ) from None
    if task["type"] not in ("chief", "worker") or not 0 <= index < chiefs + others:
        raise UserError(f"TF_CONFIG: task {task} is none of the cluster's {chiefs + others}")
    return index, chiefs + others


POSITION = re.compile(rb"\s*(\d{1,9})\s+(\d{1,9})\s*")
"""Epoch and batch in training_progress.txt."""


def write_progress(folder: Path, spec: BatchSpec, step: int) -> None:
    """Says which batch training needs next."""
    epoch, batch = divmod(step, spec.batches_per_epoch)
    utils.write_text(folder / PROGRESS, f"{epoch}\n{batch}\n")


def read_progress(folder: Path, spec: BatchSpec) -> int | None:
    """The step that training needs next; None if the file is missing or holds anything else."""
    try:
        text = (folder / PROGRESS).read_bytes()
    except FileNotFoundError:
        return None
    match = POSITION.fullmatch(text)
    return spec.step(int(match[1]), int(match[2])) if match else None


def is_own(path: Path) -> bool:
    """Whether this toolkit wrote a file of one of the buffer's names, as far as its start tells.

    What a power failure leaves, zeros or nothing, may be anybody's and is no loss.
    """
    with open(path, "rb") as file:
        start = file.read(4096)
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
    """The random choices for the pictures of a batch, one row a picture."""

    side: np.ndarray
    """int64 [n], shorter side in pixels."""
    corner: np.ndarray
    """float64 [n, 2] in [0, 1): where the crop lies between left and right, top and bottom."""
    flip: np.ndarray
    """bool [n]."""
    alpha: np.ndarray
    """float64 [n, 3], standard deviation 0.1: strength of the three colour shifts."""


def draw_choices(generator: np.random.Generator, count: int) -> Choices:
    """Choices for `count` pictures."""
    return Choices(
        generator.choice(np.array(SIDES), count),
        generator.random((count, 2)),
        generator.random(count) < 0.5,
        generator.normal(0, 0.1, (count, 3)),
    )


class Recipe:
    """Makes any batch, as a pure function of its arguments and of the batch's step.

    Threads may call `make` at the same time.
    """

    def __init__(self, spec: BatchSpec, pictures: Pictures, copies: dict[int, Path]):
        """`copies`: the folders of resized copies, by shorter side."""
        self.spec, self.pictures, self.copies = spec, pictures, copies
        self.failures = Failures(len(pictures))
        self.order = functools.lru_cache(maxsize=3)(self._order)

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.spec.seed, spawn_key=key))

    def _order(self, epoch: int) -> np.ndarray:
        """int32 [N / workers]: this worker's part of the epoch's permutation of all pictures."""
        permutation = self._generator(0, epoch).permutation(len(self.pictures)).astype(np.int32)
        return permutation[self.spec.worker :: self.spec.workers]

    def make(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """X: float16 [batch_size, 224, 224, 3], Y: int32 [batch_size]; see `parts`."""
        x, y = zip(*((x.copy(), y) for x, y in self.parts(step)), strict=True)
        return np.concatenate(x), np.concatenate(y)

    def parts(self, step: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The batch in parts of GROUP pictures, each to be written before the next is made.

        X: float16 [n, 224, 224, 3], overwritten by the next part. Y: int32 [n]. Raises UserError
        when too many pictures fail.
        """
        spec = self.spec
        epoch, batch = divmod(step, spec.batches_per_epoch)
        first, size = batch * spec.batch_size, spec.batch_size
        chosen = self.order(epoch)[first : first + size].tolist()
        choices = draw_choices(self._generator(1, epoch, batch, spec.worker), size)
        # Plain numbers: those of NumPy take ten times as long to reckon with, one by one.
        sides, corners = choices.side.tolist(), choices.corner.tolist()
        flips = choices.flip.tolist()
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
                if flips[slot]:
                    crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                crops.append(np.frombuffer(crop.tobytes(), np.uint8).reshape(CROP, CROP, 3))
            finish(crops, choices.alpha[part], spec.mu, spec.sigma, out=x[: len(crops)])
            yield x[: len(crops)], self.pictures.labels[chosen[part]]

    def _crop(self, index: int, side: int, corner: list[float]) -> Image.Image | None:
        """The crop of a picture, from its resized copy if there is one. None if it is broken."""
        path = self.pictures.paths[index]
        try:
            if side in self.copies:
                try:
                    return crop_file(f"{self.copies[side]}/{path}", side, corner)
                except BrokenPicture:
                    pass  # not resized yet, or broken: the original decides
            return crop_file(f"{self.pictures.folder}/{path}", side, corner)
        except BrokenPicture as error:
            self.failures.add(path, error)
            return None


# --- the six steps --------------------------------------------------------------------------


GROUP = 32
"""Pictures finished at a time. More make colour shifts cheaper, fewer take less memory a thread."""


def finish(
    crops: Sequence[np.ndarray], alpha: np.ndarray, mu: list, sigma: list, out: np.ndarray
) -> None:
    """Steps 4 and 6: n crops, uint8 [224, 224, 3], to normalised, colour-shifted float16 `out`.

    After its colour shift every value of a channel is a function of its 8 bits, so one table of 256
    entries a channel does scaling, normalisation, shift and conversion to float16 at once.
    """
    shifts = colour_shifts(crops, alpha, sigma)
    levels = (np.arange(256) / 255 - np.array(mu)[:, None]) / np.array(sigma)[:, None]
    tables = (levels + shifts[:, :, None]).astype(np.float16).reshape(len(crops), 3 * 256)
    # Rows of 3 * 224 values, not pixels of 3, make NumPy's inner loops long. The memory is used
    # again for each crop; new memory would take as long as the work.
    row = 3 * CROP
    channel = np.tile(np.arange(0, 3 * 256, 256, np.uint16), CROP)  # where its table begins
    index = np.empty((CROP, row), np.intp)
    for crop, table, x in zip(crops, tables, out, strict=True):
        np.add(crop.reshape(CROP, row), channel, out=index, dtype=np.uint16)
        # No index lies outside; of NumPy's ways to see to that, "wrap" is the fastest.
        table.take(index, out=x.reshape(CROP, row), mode="wrap")


def colour_shifts(crops: Sequence[np.ndarray], alpha: np.ndarray, sigma: list) -> np.ndarray:
    """Krizhevsky et al. 2012, section 4.1, with each crop's own colours: float64 [n, 3].

    shift = Σ αᵢ λᵢ vᵢ with the eigenvalues and eigenvectors of the covariance of the crop's
    normalised pixels. A grid of every 4th pixel in both directions stands for the crop: the
    shifts are 1% off those of all pixels, 0.04 levels of 256 on photographs; every 8th pixel
    would be a fiftieth faster in all, and far off on regular patterns.
    """
    grid = np.empty((len(crops), 3, CROP // 4, CROP // 4), np.float32)
    for crop, its_grid in zip(crops, grid, strict=True):
        its_grid[:] = crop[::4, ::4].transpose(2, 0, 1)
    grid = grid.reshape(len(crops), 3, -1)
    grid -= grid.mean(axis=2, keepdims=True)
    # Not by matmul: for so small a matrix its library is slower, and keeps other threads waiting.
    covariance = np.einsum("nck,ndk->ncd", grid, grid).astype(np.float64) / grid.shape[2]
    covariance /= 255.0**2 * np.outer(sigma, sigma)
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    return np.einsum("nck,nk->nc", eigenvectors, alpha * eigenvalues)


# --- the buffer -----------------------------------------------------------------------------


class Buffer:
    """The folder of batches: which are wanted, which are there, and making those that are missing.

    Only files of the toolkit's own names are ever looked at or removed.
    """

    _said_too_early = False

    def __init__(self, folder: Path, recipe: Recipe, size: int):
        self.folder, self.recipe, self.spec = folder, recipe, recipe.spec
        self.start, self.end = (self.spec.step(epoch) for epoch in self.spec.epochs)
        self.size = min(size, self.end - self.start)
        self.x_bytes = utils.array_file_size(np.float16, self.spec.shape)
        self.y_bytes = utils.array_file_size(np.int32, self.spec.shape[:1])
        self._said_no_room = threading.Event()

    def claim(self) -> None:
        """Makes the folder this recipe's: removes batches of another making and leftovers.

        Raises UserError if somebody else's files have the names of the toolkit's.
        """
        names, old = self._batch_names(), BatchSpec.read(self.folder)
        if old != self.spec:
            for name in (*names, BUFFER_JSON, PROGRESS):
                path = self.folder / name
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
        # A position outside of this run's epochs was left by an older run.
        step = read_progress(self.folder, self.spec)
        if step is not None and not self.start <= step < self.end:
            self._remove([PROGRESS])
        first = self.wanted_first()
        if ready := [n for n in self.ready() if first <= n < first + self.size]:
            print(f"{self.folder}: {plural(len(ready), 'batch')} ready since an earlier start")

    def check_room(self) -> None:
        """Says how much room the window needs and how much there is. Raises UserError if less."""
        own = sum(on_disk((self.folder / name).stat().st_size) for name in self._batch_names())
        there = max(shutil.disk_usage(self.folder).free + own - ROOM_FOR_SMALL_FILES, 0)
        batch = on_disk(self.x_bytes) + on_disk(self.y_bytes)
        needed, place, free = batch * self.size, "", None
        if is_ram_disk(self.folder):
            place, free = ", a RAM disk", getattr(utils, "available_memory", lambda: None)()
        elif looks_like_a_ram_disk(self.folder):
            utils.warn(
                f"[train] buffer_folder {self.folder} looks like a RAM disk, but is on a disk; "
                f"training may have to wait for it. Is a file system mounted there?"
            )
        memory = "" if free is None else f"; free memory: {utils.file_size(free)}"
        print(
            f"buffer: {plural(self.size, 'batch')} of {utils.file_size(batch)} in {self.folder}"
            f"{place}: needs {utils.file_size(needed)}, has room for {utils.file_size(there)}"
            f"{memory}"
        )
        room, why = there, f"{self.folder} has room for {utils.file_size(there)}"
        if free is not None and (limit := free + own - memory_for_training(free)) < there:
            room = limit
            why = (
                f"{self.folder} is a RAM disk and may take {utils.file_size(limit)} of memory: "
                f"{utils.file_size(free)} is free, and training needs some"
            )
        if needed > room:
            way_out = f"the largest buffer_size that fits is {room // batch}"
            if room < batch:
                way_out = "not even one batch fits: take another folder or a smaller --batch_size"
            raise UserError(
                f"[train] buffer_size = {self.size} needs {utils.file_size(needed)}, but "
                f"buffer_folder {why}; {way_out}"
            )

    def wanted_first(self) -> int:
        """Number of the batch that training needs next. Says so, once, if nobody will make it."""
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
        """Steps of the batches that are there, both files complete."""
        complete: dict[str, set[int]] = {"X": set(), "Y": set()}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if (step := self.spec.step_of(entry.name)) is not None:
                    kind = entry.name[0]
                    if _size(entry) == (self.x_bytes if kind == "X" else self.y_bytes):
                        complete[kind].add(step)
        return complete["X"] & complete["Y"]

    def remove_all_but(self, window: range) -> None:
        """Removes the batches that are not in the window: used ones and those of an older run."""
        self._remove(name for name in self._batch_names() if self.spec.step_of(name) not in window)

    def make(self, step: int) -> bool:
        """Makes a batch, labels first. Without room it says so, once, and returns False."""
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
            if not self._said_no_room.is_set():
                self._said_no_room.set()
                utils.warn(f"{self.folder}: no room for another batch; waiting for room")
            time.sleep(1)
            return False
        return True

    def leave(self) -> None:
        """Leaves the folder clean."""
        self.remove_all_but(range(0))
        utils.remove_leftovers(self.folder)
        self._remove([PROGRESS, BUFFER_JSON])
        for name in (TRAINER_LOCK, LOCK):
            utils.remove_lock(self.folder / name)

    def _batch_names(self) -> list[str]:
        return [name for name in os.listdir(self.folder) if BATCH_FILE.fullmatch(name)]

    def _remove(self, names) -> None:
        for name in names:
            (self.folder / name).unlink(missing_ok=True)


ROOM_FOR_SMALL_FILES = 4096
"""Bytes left free for training_progress.txt while it is replaced."""


def memory_for_training(free: int) -> int:
    """Bytes of the free memory that the buffer leaves to training."""
    return min(max(10**9, free // 10), free // 2)


def is_ram_disk(folder: Path) -> bool:
    """Whether the folder's file system is kept in memory, as Linux tells; False elsewhere."""
    mounts, device = Path("/proc/self/mountinfo"), os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in mounts.read_bytes().splitlines() if mounts.exists() else []:
        mount, _, kind = line.decode(errors="replace").partition(" - ")
        if mount.split()[2] == number:
            return kind.split()[0] in ("tmpfs", "ramfs", "devtmpfs")
    return False


def looks_like_a_ram_disk(folder: Path) -> bool:
    """Whether a part of the path is named as RAM disks are, or almost."""
    words = [re.sub("[^a-z]", "", part.lower()) for part in folder.parts]
    names = ("ramdisk", "ramfs", "tmpfs")
    close = any(difflib.get_close_matches(word, names, 1, 0.8) for word in words)
    meant = close or {"shm", "ram"} & {*words} or words[1:2] == ["run"]
    return sys.platform == "linux" and bool(meant)


def on_disk(size: int) -> int:
    """Bytes that a file takes on a RAM disk: whole pages."""
    return -(-size // 4096) * 4096


def _size(entry: os.DirEntry) -> int:
    try:
        return entry.stat().st_size
    except FileNotFoundError:  # removed since the folder was listed
        return -1


def keep_full(buffer: Buffer, threads: int, sleep_time: float) -> int:
    """Follows training until it has passed the last epoch. Returns the number of batches made.

    Looks at progress and folder anew before each batch, so whatever happens to either, the next
    batch made is the nearest one missing.
    """
    total, made, filling, started = 0, 0, False, time.monotonic()
    under_way: dict[Future, int] = {}
    with ThreadPoolExecutor(threads) as pool:
        while (first := buffer.wanted_first()) < buffer.end:
            window = range(max(first, buffer.start), min(first + buffer.size, buffer.end))
            ready = buffer.ready()
            ahead = next((i for i, n in enumerate(window) if n not in ready), len(window))
            enough = min(REFILL_BELOW * buffer.size, len(window))
            if not filling and ahead < enough:
                filling, made, started = True, 0, time.monotonic()
            if filling:
                buffer.remove_all_but(window)
            missing = [n for n in window if n not in ready and n not in under_way.values()]
            if filling and not missing and not under_way:
                filling = False
                rate = made * buffer.spec.batch_size / (time.monotonic() - started)
                print(
                    f"{buffer.spec.position(first)}: "
                    f"{plural(len(window), 'batch')} ready ahead of training, {made:,} just made "
                    f"at {rate:,.0f} pictures/s"
                )
            if not filling:
                time.sleep(sleep_time)
                continue
            for number in missing[: threads - len(under_way)]:
                under_way[pool.submit(buffer.make, number)] = number
            done, _ = wait(under_way, timeout=sleep_time, return_when=FIRST_COMPLETED)
            for future in done:
                del under_way[future]
                done_well = future.result()
                made, total = made + done_well, total + done_well
    return total


# --- taking batches from the buffer ----------------------------------------------------------


def take_buffer(config: SimpleNamespace) -> Path:
    """The buffer's folder, this process's own from here on. Raises UserError if another has it."""
    folder = utils.make_folder(config.train.buffer_folder)
    utils.lock(folder / TRAINER_LOCK, f"{folder}: another train.py takes batches from here")
    return folder


def end_preprocessing(folder: Path, epoch_end: int) -> None:
    """Tells a runtime_preprocessing.py that training has passed its last epoch."""
    if spec := BatchSpec.read(folder):
        write_progress(folder, spec, spec.step(epoch_end))


def check_spec(spec: BatchSpec, config: SimpleNamespace, batch_size: int, folder: Path) -> None:
    """Raises UserError, with both values, if the batches do not fit this training."""
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
            f"has {key} = {ours[key]}; start both scripts with the same"
        )


LOOK = 0.02
"""Seconds between two looks of a waiting trainer."""


def wait_for_buffer(config: SimpleNamespace, args: Namespace) -> BatchSpec:
    """Takes the buffer for this process and returns what it holds, waiting for it if need be.

    `args`: the trainer's epoch_start, epoch_end, batch_size and config. Raises UserError if another
    training uses the buffer, or if it does not fit this one.
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
    """The command that makes the batches of a training with these arguments."""
    return (
        f"python3 runtime_preprocessing.py --epoch_start={args.epoch_start} "
        f"--epoch_end={args.epoch_end} --batch_size={args.batch_size} "
        f"--config={shlex.quote(str(args.config))}"
    )


class BatchReader:
    """Reads batch after batch, two ahead of training, in a thread of its own.

    A context manager; `next` returns the batches in order.

    Pictures are read into memory that is used again as soon as no array or tensor uses it. Fresh
    memory would cost three times as much as the reading, because the system clears every page. A
    read does not hold Python's lock, so the training thread runs on meanwhile.
    """

    def __init__(
        self,
        config: SimpleNamespace,
        spec: BatchSpec,
        steps: range,
        put: Callable[[np.ndarray, np.ndarray], object],
        args: Namespace,
    ):
        """`put` takes a batch's images and labels to where they are trained on; it may go on using
        the images' memory instead of copying it. `args`: as for `wait_for_buffer`.
        """
        self.folder, self.sleep_time = config.train.buffer_folder, config.train.sleep_time
        self.spec, self.steps, self.put, self.args = spec, steps, put, args
        self._to_read = iter(steps)
        self._closed = threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self._ahead: deque[Future] = deque()
        self._memory: list[tuple[mmap.mmap, weakref.ref]] = []
        self._checked: tuple[int, ...] = ()
        self._say_at = 0.0

    def __enter__(self) -> "BatchReader":
        self._tell(self.steps.start)
        first, last = (out_of_reach(self.spec, n) for n in (self.steps.start, self.steps.stop - 1))
        if first or last:
            utils.warn(first or last)
        self._read_ahead()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._pool.shutdown(cancel_futures=True)

    def next(self, stop: threading.Event) -> object:
        """What `put` made of the next batch, or None when `stop` was set while waiting.

        Raises UserError.
        """
        batch = self._ahead[0]
        while not batch.done() and not stop.is_set():
            wait([batch], timeout=0.1)
        if not batch.done():
            return None
        self._ahead.popleft()
        self._read_ahead()
        return batch.result()

    def _read_ahead(self) -> None:
        while len(self._ahead) < 2 and (step := next(self._to_read, None)) is not None:
            self._ahead.append(self._pool.submit(self._read, step))

    def _read(self, step: int) -> object:
        """The batch, waiting for it if need be; None once the reader is closed."""
        say_at = time.monotonic() + min(1, self.sleep_time)
        self._tell(step)
        while not self._closed.is_set():
            try:
                self._check()
                return self.put(*read_batch(self.folder, self.spec, step, self._free_memory()))
            except FileNotFoundError:
                pass  # not made yet
            except ValueError as error:
                utils.warn(f"{error}; removed, to be made again")
                for path in self.spec.files(self.folder, step):
                    path.unlink(missing_ok=True)
            if time.monotonic() >= max(say_at, self._say_at):
                file = self.spec.files(self.folder, step)[0]
                print(f"waiting for {file}: {why_missing(self.folder, step, self.args)}")
                self._say_at = time.monotonic() + self.sleep_time
            self._closed.wait(LOOK)
            if read_progress(self.folder, self.spec) != step:  # lost, or there was no room for it
                self._tell(step)
        return None

    def _free_memory(self) -> np.ndarray:
        """float16 [batch_size, 224, 224, 3] in memory that nothing else uses, aligned to a page."""
        shape, free = self.spec.shape, len(self._memory)
        for i, (_, user) in enumerate(self._memory):
            if user() is None:
                free = i
        if free == len(self._memory):
            memory = mmap.mmap(-1, 2 * math.prod(shape))
        else:
            memory, _ = self._memory.pop(free)
        # Every view of this array keeps it alive, those that TensorFlow holds included.
        array = np.frombuffer(memory, np.float16)
        self._memory.append((memory, weakref.ref(array)))
        return array.reshape(shape)

    def _check(self) -> None:
        """Raises UserError if the buffer has become another one than when training began."""
        status = os.stat(self.folder / BUFFER_JSON)
        version = (status.st_ino, status.st_mtime_ns, status.st_size)
        if version == self._checked:  # for every batch: it holds all the names of the classes
            return
        spec = BatchSpec.read(self.folder)
        if spec is None:
            raise FileNotFoundError
        for key in self.spec.differences(dataclasses.asdict(spec)):
            if key not in ("epochs", "resized"):
                raise UserError(
                    f"{self.folder}: its batches are of other {key} than when this training began; "
                    f"stop runtime_preprocessing.py, or start this training again"
                )
        self._checked = version

    def _tell(self, step: int) -> None:
        """Says which batch is needed next; without room for that, it is said while waiting."""
        try:
            write_progress(self.folder, self.spec, step)
        except OSError as error:
            if not utils.is_no_room(error):
                raise


def why_missing(folder: Path, step: int, args: Namespace) -> str:
    """Why a batch is not there, as far as the files tell, and what to do."""
    if not utils.is_locked(folder / LOCK):
        return f"no runtime_preprocessing.py is running; start {preprocessor_command(args)}"
    spec = BatchSpec.read(folder)
    if spec is None:
        return "runtime_preprocessing.py is starting"
    if line := out_of_reach(spec, step):
        return line
    if read_progress(folder, spec) != step:
        return (
            f"there is no room for {PROGRESS}, so runtime_preprocessing.py cannot know; make room"
        )
    return "runtime_preprocessing.py is at work; what it says tells why it takes so long"


def out_of_reach(spec: BatchSpec, step: int) -> str | None:
    """What to do if the preprocessor that described the buffer was not started for this step."""
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
    """Fills `images`, float16 [batch_size, 224, 224, 3]. Returns it and int32 [batch_size].

    Raises FileNotFoundError, and ValueError for anything else than such a batch.
    """
    x_path, y_path = spec.files(folder, step)
    read_array(x_path, images)
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
    """Prints pictures per second for 1, 2, 4 … threads, batches written and removed again.

    Raises UserError if there is no room for a batch a thread.
    """
    utils.remove_leftovers(folder)
    cores = utils.cores()
    counts = sorted({2**i for i in range(cores.bit_length())} | {cores})
    rates = {}
    for threads in counts:
        aside = utils.aside_name(folder / "benchmark")
        aside.mkdir()
        try:
            buffer = Buffer(aside, recipe, recipe.spec.batches_per_epoch)
            make = functools.partial(make_and_remove, buffer)
            rates[threads] = measure(make, threads, recipe, seconds)
        finally:
            shutil.rmtree(aside)
        print(
            f"{plural(threads, 'thread'):>10} {rates[threads]:8,.0f} pictures/s "
            f"{rates[threads] / threads:8,.0f} a thread   x{rates[threads] / rates[1]:.2f}"
        )
    best = max(rates, key=rates.get)
    print(
        f"this machine feeds {rates[best]:,.0f} pictures/s with num_of_threads = {best}; if "
        f"`train.py --synthetic` trains fewer than that, the GPU will not wait for data"
    )


def measure(make: Callable[[int], None], threads: int, recipe: Recipe, seconds: float) -> float:
    """Pictures per second of `threads` threads that make batches for so many seconds."""

    def work(thread: int) -> float:
        number, count, start = thread, 0, time.perf_counter()
        while time.perf_counter() < start + seconds:
            make(number % recipe.spec.batches_per_epoch)
            number, count = number + threads, count + 1
        return count * recipe.spec.batch_size / (time.perf_counter() - start)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(make, (i % recipe.spec.batches_per_epoch for i in range(threads))))  # warm up
        return sum(pool.map(work, range(threads)))


def make_and_remove(buffer: Buffer, step: int) -> None:
    """What training does to a batch, for measuring. Raises UserError without room."""
    if not buffer.make(step):
        raise UserError(f"{buffer.folder.parent}: no room for a batch of each thread")
    for path in buffer.spec.files(buffer.folder, step):
        path.unlink(missing_ok=True)


def draw_preview(recipe: Recipe, file: Path, step: int, most: int = 32) -> None:
    """A contact sheet of a batch as the network will see it, with the names of the classes."""
    x, y = recipe.make(step)
    mu, sigma = np.float32(recipe.spec.mu), np.float32(recipe.spec.sigma)
    pixels = x[:most].astype(np.float32) * sigma + mu
    pixels = np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)
    gap, caption, columns = 12, 26, min(8, len(pixels))
    rows = -(-len(pixels) // columns)
    font, small = ImageFont.load_default(18), ImageFont.load_default(16)
    width, head = gap + columns * (CROP + gap), 40
    sheet = Image.new("RGB", (width, head + rows * (CROP + caption + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    shown = f"first {len(pixels)} of {len(x)} pictures" if len(x) > most else f"{len(x)} pictures"
    title = f"{recipe.spec.position(step)}: {shown}, as the network sees them"
    pen.text((gap, 10), title, "black", font)
    for i, (picture, label) in enumerate(zip(pixels, y, strict=False)):
        left = gap + i % columns * (CROP + gap)
        top = head + i // columns * (CROP + caption + gap)
        sheet.paste(Image.fromarray(picture), (left, top))
        name = shortened(recipe.pictures.class_names[label], small, CROP)
        pen.text((left, top + CROP + 4), name, "black", small)
    if file.is_dir():
        raise UserError(f"--preview={file}: a folder, not a file")
    try:
        with utils.written_aside(file.absolute()) as aside:
            sheet.save(aside, format="PNG")
    except FileNotFoundError:
        raise UserError(f"--preview={file}: no such folder") from None
    print(f"wrote {file}")


def shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """`text`, cut so that it is at most so many pixels wide."""
    # Pillow's own font knows ASCII alone.
    text = unicodedata.normalize("NFKD", utils.one_line(text).replace("ß", "ss"))
    text = "".join(c for c in text if not unicodedata.combining(c))
    text = text.encode("ascii", "backslashreplace").decode()
    while font.getlength(text) > width:
        text = text.rstrip("…")[:-1] + "…"
    return text


if __name__ == "__main__":
    utils.run(main)
