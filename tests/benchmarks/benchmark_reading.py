"""How fast training reads batches from the RAM disk, and how long that holds its own thread up.

    python3 tests/benchmarks/benchmark_reading.py [--batch_sizes=64,128,256] [--folder=/dev/shm]

For each batch size, alternately: the trainer's BatchReader with the trainer's way to a tensor, and
the plain way, which reads a file into fresh memory and copies it with tf.constant. Per row:

- images/s from file to tensor while nothing else runs, by the clock, and by the processor time of
  the reading thread alone, which is what the clock shows on a machine that nobody else uses;
- hold-up: milliseconds per batch that a training thread, busy in Python meanwhile, waits for
  Python's lock (the median of the batches, and the worst). Linux counts how long a thread ran
  and how long it waited for a processor; all other time it waited for the lock.

Targets: 8,000 images/s at each batch size, less than 5 ms per batch.
"""

import argparse
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections import deque
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import toolkit  # noqa: F401  (finds the toolkit's modules)

import numpy as np

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import utils  # noqa: E402

import runtime_preprocessing  # noqa: E402
from runtime_preprocessing import BatchReader, BatchSpec  # noqa: E402
from train import shared, tf  # noqa: E402

FILES = 6
"""Different files; batches beyond are links to the same."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Reading batches in the trainer.")
    parser.add_argument("--batch_sizes", default="64,128,256")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    print(f"{processor}, {utils.cores()} cores, load {os.getloadavg()[0]:.1f} at the start")
    print(
        f"{'batch':>5} {'way':>7} {'images/s':>9} {'by processor time':>18} "
        f"{'hold-up, median':>16} {'worst':>9}"
    )
    for size in map(int, args.batch_sizes.split(",")):
        with tempfile.TemporaryDirectory(dir=args.folder, prefix="benchmark-") as folder:
            spec = stock(Path(folder), size)
            utils.lock(Path(folder) / ".trainer.lock", "held")
            rows: dict[type, list] = {PlainReader: [], TimedReader: []}
            for _ in range(args.rounds):
                for way, figures in rows.items():
                    figures.append((*rate(way, Path(folder), spec), *hold_up(way, folder, spec)))
            for way, figures in rows.items():
                clock, processor, median, _ = map(statistics.median, zip(*figures, strict=True))
                worst = max(row[3] for row in figures)
                name = "ours" if way is TimedReader else "plain"
                print(
                    f"{size:>5} {name:>7} {clock:>9,.0f} {processor:>18,.0f} {median:>13.2f} ms "
                    f"{worst:>6.1f} ms"
                )


class TimedReader(BatchReader):
    """The trainer's reader; counts the processor time of its thread."""

    seconds = 0.0

    def _read(self, step: int) -> object:
        start = time.thread_time()
        try:
            return self._timed(step)
        finally:
            self.seconds += time.thread_time() - start

    def _timed(self, step: int) -> object:
        return super()._read(step)


class PlainReader(TimedReader):
    """Fresh memory for each batch, twice."""

    def _timed(self, step: int) -> object:
        x, y = self.spec.files(self.folder, step)
        images = utils.read_array(x, np.empty(self.spec.shape, np.float16))
        labels = utils.read_array(y, np.empty(self.spec.batch_size, np.int32))
        return tf.constant(images), tf.constant(labels)


def stock(folder: Path, size: int) -> BatchSpec:
    """A buffer of as many batches as are measured."""
    batches = max(12, 4096 // size)
    spec = BatchSpec(
        size, 0, "", size * batches, "", 1000, [f"n{i:08}" for i in range(1000)], [0.5] * 3,
        [0.25] * 3, [], 0, 1, batches, [0, 1],
    )  # fmt: skip
    utils.write_record(folder / "buffer.json", spec)
    generator = np.random.default_rng(0)
    for step in range(batches):
        x, y = spec.files(folder, step)
        if step < FILES:
            utils.save_array(x, generator.integers(-2, 3, spec.shape, np.int8).astype(np.float16))
            utils.save_array(y, generator.integers(0, 1000, size).astype(np.int32))
        else:
            for path, old in zip((x, y), spec.files(folder, step % FILES), strict=True):
                path.hardlink_to(old)
    return spec


def reader_of(way: type, folder: Path, spec: BatchSpec) -> TimedReader:
    config = SimpleNamespace(train=SimpleNamespace(buffer_folder=Path(folder), sleep_time=100))
    args = Namespace(epoch_start=0, epoch_end=1, batch_size=spec.batch_size, config="config.txt")
    steps = range(spec.batches_per_epoch)

    def to_device(images: np.ndarray, labels: np.ndarray) -> tuple:
        return tf.identity(shared(images)), tf.constant(labels)  # as train.py does

    return way(config, spec, steps, to_device, args)


def rate(way: type, folder: Path, spec: BatchSpec) -> tuple[float, float]:
    """Images per second by the clock, and per second of the reading thread's processor time.

    The first four batches, for which a reader takes its memory, are left out.
    """
    stop, held, steps = utils.Stop(), deque(maxlen=1), range(spec.batches_per_epoch)
    with reader_of(way, folder, spec) as reader:
        for step in steps:
            if step == 4:
                start, seconds = time.perf_counter(), reader.seconds
            held.append(reader.next(stop))
        images = (len(steps) - 4) * spec.batch_size
        return (
            images / (time.perf_counter() - start),
            images / (reader.seconds - seconds),
        )


def hold_up(way: type, folder: Path, spec: BatchSpec) -> tuple[float, float]:
    """Milliseconds per batch in which a busy thread waits for Python's lock: median and worst."""
    stop, waited = utils.Stop(), []
    with reader_of(way, folder, spec) as reader:
        for _ in range(spec.batches_per_epoch):
            batch = reader.next(stop)
            waited.append(1000 * waiting_while_busy(reader))
            del batch
    return statistics.median(waited), max(waited)


def waiting_while_busy(reader: BatchReader) -> float:
    """Works in Python until the next batches are read. Seconds of waiting for Python's lock."""
    start, before = time.perf_counter(), able_to_run()
    while not all(batch.done() for batch in reader._ahead):
        sum(range(200))
    return max(time.perf_counter() - start - (able_to_run() - before), 0.0)


def able_to_run() -> float:
    """Seconds that this thread has run, or waited for a processor."""
    path = f"/proc/self/task/{threading.get_native_id()}/schedstat"
    with open(path) as file:
        ran, waited, _ = map(int, file.read().split())
    return (ran + waited) / 1e9


if __name__ == "__main__":
    if not sys.platform.startswith("linux"):
        sys.exit("needs Linux, which says what a thread waits for")
    runtime_preprocessing.LOOK = 0.001
    main()
