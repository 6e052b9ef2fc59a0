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

import functools
import json
import os
import shutil
import struct
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import utils
from utils import CROP, SIDES, Pictures, Position, UserError, plural

REFILL_BELOW = 0.8
"""Share of buffer_size under which the buffer is filled up again."""


def main() -> None:
    args = parse_arguments()
    config = utils.load_config(args.config)
    worker, workers = utils.worker()
    pictures = utils.training_pictures(config)
    resized = resized_folders(config.preprocess.path_to_save, pictures)
    recipe = Recipe(
        pictures,
        args.batch_size,
        config.train.seed,
        *utils.mu_sigma(config),
        resized,
        worker,
        workers,
    )
    print(describe(recipe, args.epoch_end - args.epoch_start))
    if args.preview:
        draw_preview(recipe, args.preview, (args.epoch_start, 0))
        return
    folder = utils.make_folder(config.train.buffer_folder)
    # The lock is held until the process ends, however it ends.
    utils.lock(folder, f"{folder}: another runtime_preprocessing.py works here; give each its own")
    if args.benchmark:
        benchmark(recipe, folder)
        return
    buffer = Buffer(folder, recipe, args.epoch_start, args.epoch_end, config.train.buffer_size)
    buffer.check_room()
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


def resized_folders(root: Path, pictures: Pictures) -> dict[int, Path]:
    """The folders that preprocess.py has made of these pictures, by shorter side.

    While they are used it may not add to them: what a batch holds would depend on when it is made.
    """
    folders = {side: root / str(side) for side in SIDES if (root / str(side)).is_dir()}
    unused = None
    if utils.copies_of_others(root, pictures):
        unused = "its resized copies are of other pictures"
    elif folders and (root / utils.COPIES_OF).is_file():
        try:
            utils.lock(root / utils.COPIES_OF, "preprocess.py is at work here", shared=True)
        except UserError as error:
            unused = str(error)
    if unused:
        utils.warn(f"{root}: {unused}; the originals are used")
        return {}
    return folders


def describe(recipe: "Recipe", epochs: int) -> str:
    """What is going to happen."""
    pictures, sides = recipe.pictures, len(recipe.resized)
    source = "the originals"
    if sides:
        source = f"resized copies in {sides} of the {len(SIDES)} shorter sides, else {source}"
    if recipe.workers > 1:
        part = len(pictures) // recipe.workers
        source += (
            f"; worker {recipe.worker} of {recipe.workers}, {plural(part, 'picture')} are its part"
        )
    return (
        f"{plural(len(pictures.class_names), 'class')}, "
        f"{plural(len(pictures), 'training picture')}, {pictures.layout}; "
        f"{plural(recipe.batches, 'batch')} of {recipe.batch_size} an epoch, "
        f"{epochs * recipe.batches:,} in {plural(epochs, 'epoch')}, from {source}"
    )


# --- what a batch is made of ----------------------------------------------------------------


@dataclass
class Draws:
    """The random choices for the pictures of a batch, one row a picture."""

    side: np.ndarray
    """int64 [n], shorter side in pixels."""
    corner: np.ndarray
    """float64 [n, 2] in [0, 1): where the crop lies between left and right, top and bottom."""
    flip: np.ndarray
    """bool [n]."""
    alpha: np.ndarray
    """float64 [n, 3], standard deviation 0.1: strength of the three colour shifts."""


def draw(generator: np.random.Generator, count: int) -> Draws:
    """Draws for `count` pictures."""
    return Draws(
        generator.choice(np.array(SIDES), count),
        generator.random((count, 2)),
        generator.random(count) < 0.5,
        generator.normal(0, 0.1, (count, 3)),
    )


class Recipe:
    """Makes any batch of any epoch, as a pure function of its arguments and of (epoch, batch).

    Threads may call `make` at the same time.
    """

    def __init__(
        self,
        pictures: Pictures,
        batch_size: int,
        seed: int,
        mu: list[float],
        sigma: list[float],
        resized: dict[int, Path],
        worker: int = 0,
        workers: int = 1,
    ):
        self.pictures, self.batch_size, self.seed = pictures, batch_size, seed
        self.mu, self.sigma, self.resized = mu, sigma, resized
        self.worker, self.workers = worker, workers
        self.batches = utils.batches_per_epoch(len(pictures), batch_size, workers)
        self.failures = utils.Failures(len(pictures))
        self.order = functools.lru_cache(maxsize=3)(self._order)

    @property
    def description(self) -> dict:
        """All that the batches depend on, for buffer.json."""
        return {
            "format": utils.BUFFER_FORMAT,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "dataset": str(self.pictures.folder),
            "N": len(self.pictures),
            "classes": len(self.pictures.class_names),
            "mu": self.mu,
            "sigma": self.sigma,
            "worker": self.worker,
            "workers": self.workers,
            "pictures": self.pictures.fingerprint,
            "resized": sorted(self.resized),
            "class_names": self.pictures.class_names,
        }

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))

    def _order(self, epoch: int) -> np.ndarray:
        """int32 [N / workers]: this worker's part of the epoch's permutation of all pictures."""
        permutation = self._generator(0, epoch).permutation(len(self.pictures)).astype(np.int32)
        return permutation[self.worker :: self.workers]

    def make(self, position: Position) -> tuple[np.ndarray, np.ndarray]:
        """X: float16 [batch_size, 224, 224, 3], Y: int32 [batch_size]; see `parts`."""
        x, y = zip(*((x.copy(), y) for x, y in self.parts(position)), strict=True)
        return np.concatenate(x), np.concatenate(y)

    def parts(self, position: Position) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The batch in parts of GROUP pictures, each to be written before the next is made.

        X: float16 [n, 224, 224, 3], overwritten by the next part. Y: int32 [n]. Raises UserError
        when too many pictures fail.
        """
        epoch, batch = position
        first, size = batch * self.batch_size, self.batch_size
        chosen = self.order(epoch)[first : first + size].tolist()
        draws = draw(self._generator(1, epoch, batch, self.worker), size)
        # Plain numbers: those of NumPy take ten times as long to reckon with, one by one.
        sides, corners, flips = draws.side.tolist(), draws.corner.tolist(), draws.flip.tolist()
        x = np.empty((min(GROUP, size), CROP, CROP, 3), np.float16)
        for start in range(0, size, GROUP):
            part, crops = slice(start, min(start + GROUP, size)), []
            for slot in range(part.start, part.stop):
                crop = self._crop(chosen[slot], sides[slot], corners[slot])
                if crop is None:
                    substitutes = self._generator(2, epoch, batch, self.worker, slot)
                    while crop is None:
                        chosen[slot] = int(substitutes.choice(self.order(epoch)))
                        crop = self._crop(chosen[slot], sides[slot], corners[slot])
                if flips[slot]:
                    crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                crops.append(np.frombuffer(crop.tobytes(), np.uint8).reshape(CROP, CROP, 3))
            finish(crops, draws.alpha[part], self.mu, self.sigma, out=x[: len(crops)])
            yield x[: len(crops)], self.pictures.labels[chosen[part]]

    def _crop(self, index: int, side: int, corner: list[float]) -> Image.Image | None:
        """The crop of a picture, from its resized copy if there is one. None if it is broken."""
        path = self.pictures.paths[index]
        try:
            if side in self.resized:
                try:
                    return crop_file(f"{self.resized[side]}/{path}", side, corner)
                except utils.DECODING_ERRORS:
                    pass  # not resized yet, or broken: the original decides
            return crop_file(f"{self.pictures.folder}/{path}", side, corner)
        except utils.DECODING_ERRORS as error:
            self.failures.add(path, error)
            return None


# --- the six steps --------------------------------------------------------------------------


def crop_file(path: str | Path, side: int, corner: Sequence[float]) -> Image.Image:
    """Steps 1 to 3: the 224x224 RGB crop that lies at `corner` once the shorter side is `side`.

    `corner`: two numbers in [0, 1), where between left and right, between top and bottom. Resizing
    the crop's window alone gives what resizing all and cutting gives, at a fraction of the cost.
    Raises one of utils.DECODING_ERRORS.
    """
    content = utils.read_file(path)
    return crop_jpeg(content, side, corner) or crop_any(content, side, corner)


def crop_any(content: bytes, side: int, corner: Sequence[float]) -> Image.Image:
    """The crop of a file of any format."""
    with utils.picture_in(content) as image:
        return cut(utils.as_rgb(image), window(image.size, side, corner))


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
    return cut(utils.as_rgb(image), box)


def is_black(image: Image.Image, row: int) -> bool:
    """Whether a row is all zeros; its first pixel mostly tells."""
    first = image.getpixel((0, row))
    return first in (0, (0, 0, 0)) and image.crop((0, row, image.width, row + 1)).getbbox() is None


def window(size: Sequence[int], side: int, corner: Sequence[float]) -> tuple[float, ...]:
    """Left, top, right and bottom of the crop, in pixels of a picture of that width and height."""
    width, height = utils.resized_size(*size, side)
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
    read otherwise, and for sizes that utils.picture_in refuses.
    """
    at = 2 if content.startswith(b"\xff\xd8") else len(content)
    while at + 10 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker in FRAMES:
            bits, height, width, components = struct.unpack_from(">BHHB", content, at + 4)
            mode = MODES.get(components) if bits == 8 else None
            return (width, height, mode) if mode and utils.size_is_fit(width, height) else None
        if marker not in TABLES:
            return None
        at += 2 + int.from_bytes(content[at + 2 : at + 4])
    return None


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

    def __init__(self, folder: Path, recipe: Recipe, epoch_start: int, epoch_end: int, size: int):
        self.folder, self.recipe = folder, recipe
        self.start, self.end = epoch_start * recipe.batches, epoch_end * recipe.batches
        self.size = min(size, self.end - self.start)
        self.x_bytes = utils.array_file_size(np.float16, (recipe.batch_size, CROP, CROP, 3))
        self.y_bytes = utils.array_file_size(np.int32, (recipe.batch_size,))
        self._said_no_room = threading.Event()

    # A batch has a number that counts through all epochs, and a position (epoch, batch).
    def position(self, number: int) -> Position:
        return divmod(number, self.recipe.batches)

    def number(self, position: Position) -> int:
        return position[0] * self.recipe.batches + position[1]

    def claim(self) -> None:
        """Makes the folder this recipe's: removes batches of another making and leftovers.

        Raises UserError if files that are no batches have names of batches: somebody else's.
        """
        old, new = utils.read_json(self.folder / "buffer.json"), self.recipe.description
        names = self._batch_names()
        if old is None:
            for name in names:
                if not utils.is_batch_file(self.folder / name):
                    raise UserError(
                        f"{self.folder / name}: not a batch of this toolkit, and would be "
                        f"overwritten; give the buffer a folder of its own"
                    )
            making = "of unknown making"
        else:
            differing = [key for key in new if old.get(key) != new[key]]
            differing = [MEANING.get(key, key) for key in differing]
            making = f"made with another {', another '.join(differing)}"
        if old != new and names:
            print(f"{self.folder}: removing {plural(len(names), 'file')} {making}")
            self._remove(names)
        utils.remove_leftovers(self.folder)
        utils.write_text(self.folder / "buffer.json", json.dumps(new, indent=1))
        # A position outside of this run's epochs was left by an older run.
        if not self.start <= self.wanted_first() < self.end:
            self._remove(["training_progress.txt"])
        first = self.wanted_first()
        if ready := [n for n in self.ready() if first <= n < first + self.size]:
            print(f"{self.folder}: {plural(len(ready), 'batch')} ready since an earlier start")

    def check_room(self) -> None:
        """Says how much room the window needs. Raises UserError if it is not there."""
        own = sum(on_disk((self.folder / name).stat().st_size) for name in self._batch_names())
        there = shutil.disk_usage(self.folder).free + own - ROOM_FOR_SMALL_FILES
        batch = on_disk(self.x_bytes) + on_disk(self.y_bytes)
        needed = batch * self.size
        print(
            f"buffer: {plural(self.size, 'batch')} of {utils.file_size(batch)} in {self.folder}, "
            f"{utils.file_size(needed)} of the {utils.file_size(there)} there"
        )
        if needed > there:
            raise UserError(
                f"[train] buffer_size = {self.size} needs {utils.file_size(needed)}, but "
                f"buffer_folder {self.folder} has room for {utils.file_size(max(there, 0))}; "
                + (
                    f"the largest buffer_size that fits is {there // batch}"
                    if there >= batch
                    else "not even one batch fits: take another folder or a smaller --batch_size"
                )
            )

    def wanted_first(self) -> int:
        """Number of the batch that training needs next."""
        progress = utils.read_progress(self.folder)
        return self.start if progress is None else self.number(progress)

    def ready(self) -> set[int]:
        """Numbers of the batches that are there, both files complete."""
        complete: dict[str, set[int]] = {"X": set(), "Y": set()}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if batch := utils.parse_batch_name(entry.name):
                    kind, position = batch
                    size = self.x_bytes if kind == "X" else self.y_bytes
                    if position[1] < self.recipe.batches and _size(entry) == size:
                        complete[kind].add(self.number(position))
        return complete["X"] & complete["Y"]

    def remove_all_but(self, window: range) -> None:
        """Removes the batches that are not in the window: used ones and those of an older run."""
        names = []
        for name in os.listdir(self.folder):
            if batch := utils.parse_batch_name(name):
                _, position = batch
                if position[1] >= self.recipe.batches or self.number(position) not in window:
                    names.append(name)
        self._remove(names)

    def make(self, number: int) -> bool:
        """Makes a batch, labels first. Without room it says so, once, and returns False."""
        x_path, y_path = utils.batch_files(self.folder, self.position(number))
        shape, labels = (self.recipe.batch_size, CROP, CROP, 3), []
        try:
            with utils.array_written_aside(x_path, np.float16, shape) as file:
                for x, y in self.recipe.parts(self.position(number)):
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
        self._remove(["training_progress.txt", "buffer.json", ".trainer.lock"])

    def _batch_names(self) -> list[str]:
        return [name for name in os.listdir(self.folder) if utils.parse_batch_name(name)]

    def _remove(self, names) -> None:
        for name in names:
            (self.folder / name).unlink(missing_ok=True)


MEANING = {"resized": "set of resized copies", "pictures": "list of pictures"}
"""What keys of buffer.json stand for that do not speak for themselves."""

ROOM_FOR_SMALL_FILES = 4096
"""Bytes left free for training_progress.txt while it is replaced."""


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
                rate = made * buffer.recipe.batch_size / (time.monotonic() - started)
                print(
                    f"epoch {buffer.position(first)[0]}, batch {buffer.position(first)[1]}: "
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
            buffer = Buffer(aside, recipe, 0, 1, recipe.batches)
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
            make(number % recipe.batches)
            number, count = number + threads, count + 1
        return count * recipe.batch_size / (time.perf_counter() - start)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(make, (i % recipe.batches for i in range(threads))))  # warm up
        return sum(pool.map(work, range(threads)))


def make_and_remove(buffer: Buffer, number: int) -> None:
    """What training does to a batch, for measuring. Raises UserError without room."""
    if not buffer.make(number):
        raise UserError(f"{buffer.folder.parent}: no room for a batch of each thread")
    for path in utils.batch_files(buffer.folder, buffer.position(number)):
        path.unlink(missing_ok=True)


def draw_preview(recipe: Recipe, file: Path, position: Position, most: int = 32) -> None:
    """A contact sheet of a batch as the network will see it, with the names of the classes."""
    x, y = recipe.make(position)
    pixels = x[:most].astype(np.float32) * np.float32(recipe.sigma) + np.float32(recipe.mu)
    pixels = np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)
    gap, caption, columns = 12, 26, min(8, len(pixels))
    rows = -(-len(pixels) // columns)
    font, small = ImageFont.load_default(18), ImageFont.load_default(16)
    width, head = gap + columns * (CROP + gap), 40
    sheet = Image.new("RGB", (width, head + rows * (CROP + caption + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    shown = f"first {len(pixels)} of {len(x)} pictures" if len(x) > most else f"{len(x)} pictures"
    title = f"epoch {position[0]}, batch {position[1]}: {shown}, as the network sees them"
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
