"""Measures whether training ever waits for its batches, and what keeping the buffer costs.

    python3 tests/benchmarks/benchmark_pacing.py FOLDER_OF_JPEGS --threads 2 --seconds 20

prints pictures per second of threads that make batches and nothing else beside the same threads
filling a buffer of 1,000 batches that is read as fast as it fills; then, for each buffer_size and
batch size, the share of its time that a training at 70% of the rate waits. `sleep_time` is the
shipped one. The two of each comparison take turns, as other programs disturb both. With
`--delay=10` it prints instead what each number of threads reaches if every read takes 10 ms.
"""

import argparse
import contextlib
import dataclasses
import io
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, wait
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import toolkit
import utils

from benchmark_pipeline import batches_of, pictures_below, ram_disk
from runtime_preprocessing import (
    Batches,
    Buffer,
    benchmark,
    keep_full,
    make,
    workers,
    write_progress,
)

SLEEP_TIME = utils.load_config(toolkit.ROOT / "config.txt").runtime_preprocessing.sleep_time
SHARE = 0.7
"""Of the preprocessor's rate: what the stand-in for training takes."""


def main() -> None:
    args = parse_arguments()
    pictures = pictures_below(args.folder)
    if args.delay:
        measure_slow_storage(batches_of(pictures, batch_size=16), args)
        return
    print(f"{len(pictures)} JPEGs, {args.threads} threads, load {os.getloadavg()[0]:.1f} before")
    for batch_size in args.batch:
        batches = batches_of(pictures, batch_size=batch_size)
        rate = measure_upkeep(batches, args)
        for size in args.sizes:
            waited = statistics.median(
                measure_waiting(batches, size, SHARE * rate, args) for _ in range(args.rounds)
            )
            print(f"batch {batch_size}, buffer_size {size:5}: waits {waited:7.2%}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="searched for *.JPEG and *.jpg")
    parser.add_argument("--threads", type=int, default=utils.cores())
    parser.add_argument("--seconds", type=float, default=20, help="for each figure")
    parser.add_argument("--rounds", type=int, default=1, help="median of so many")
    parser.add_argument("--delay", type=float, default=0, help="milliseconds that a read takes")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--sizes", type=int, nargs="+", default=[20, 50, 200, 1000])
    return parser.parse_args()


# --- what it costs to keep the buffer ---------------------------------------------------------


class Filled(Buffer):
    """A large buffer, three quarters full, whose training takes a batch whenever one is made."""

    def __init__(self, folder: Path, batches: Batches, size: int):
        super().__init__(folder, batches, size)
        self.claim()
        self.start, self.end, self.size = 0, sys.maxsize, size
        self.first, self.ahead, self.until = 0, 3 * size // 4, 0.0
        for step in range(self.ahead):
            x, y = self.spec.files(folder, step)
            for path, length in zip((x, y), self.sizes.values(), strict=True):
                with open(path, "wb") as file:
                    os.posix_fallocate(file.fileno(), 0, length)  # with pages of its own

    def wanted_first(self) -> int:
        while self.spec.files(self.folder, self.first + self.ahead)[0].exists():
            self.first += 1
        return self.end if time.monotonic() > self.until else self.first


def measure_upkeep(batches: Batches, args: argparse.Namespace) -> float:
    """Prints and returns pictures per second, made alone; beside them those of a kept buffer."""
    turns = {alone: [], kept: []}
    for turn in range(max(3, args.rounds)):
        for system in list(turns)[:: -1 if turn % 2 else 1]:
            with tempfile.TemporaryDirectory(prefix="benchmark-", dir=ram_disk()) as name:
                turns[system].append(system(batches, Path(name), args))
    (rate, cpu_rate), (kept_rate, kept_cpu_rate) = (
        [statistics.median(each) for each in zip(*speeds, strict=True)] for speeds in turns.values()
    )
    ratios = [after[0] / before[0] for before, after in zip(*turns.values(), strict=True)]
    print(
        f"batch {batches.spec.batch_size}: {rate:,.0f} pictures/s made alone, {kept_rate:,.0f} "
        f"into a buffer of {max(args.sizes):,}: {kept_rate / rate:.3f} of it, turn by turn "
        f"{', '.join(f'{ratio:.3f}' for ratio in ratios)}; {kept_cpu_rate / cpu_rate:.3f} of it "
        f"per second of processor",
        flush=True,
    )
    return rate


def rate_of(work: Callable[[float], int], batches: Batches, seconds: float) -> tuple[float, float]:
    """Pictures per second, and per second of processor, of what returns its number of batches."""
    start, cpu_start = time.perf_counter(), sum(os.times()[:4])
    pictures = work(time.monotonic() + seconds) * batches.spec.batch_size
    return pictures / (time.perf_counter() - start), pictures / (sum(os.times()[:4]) - cpu_start)


def alone(batches: Batches, folder: Path, args: argparse.Namespace) -> tuple[float, float]:
    """The threads make batches as above, an old one removed for each, and nothing else happens.

    In the same memory: a small part of it, used again and again, is faster.
    """
    buffer = Filled(folder, batches, max(args.sizes))

    def work(until: float) -> int:
        made, ahead = 0, buffer.ahead
        with workers(buffer, args.threads) as pool:
            under_way = set()
            while time.monotonic() < until:
                while len(under_way) < 2 * args.threads:
                    under_way.add(pool.submit(make, ahead))
                    ahead += 1
                done, under_way = wait(under_way, 1, FIRST_COMPLETED)
                for _ in done:
                    buffer.remove_batches([made])
                    made += 1
        return made

    return rate_of(work, batches, args.seconds)


def kept(batches: Batches, folder: Path, args: argparse.Namespace) -> tuple[float, float]:
    """The same threads, and all that keeps the largest buffer."""
    buffer = Filled(folder, batches, max(args.sizes))

    def work(until: float) -> int:
        buffer.until = until
        with contextlib.redirect_stdout(io.StringIO()):
            utils.lock(folder / ".preprocessor.lock", "held")
            keep_full(buffer, args.threads, SLEEP_TIME, utils.Stop())
        return buffer.first

    return rate_of(work, batches, args.seconds)


def measure_slow_storage(batches: Batches, args: argparse.Namespace) -> None:
    """The script's own benchmark, each read delayed: more threads hide what storage takes."""
    read_file = utils.read_file

    def slow(path: str) -> bytes:
        time.sleep(args.delay / 1000)
        return read_file(path)

    utils.read_file = slow
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=ram_disk()) as name:
        benchmark(batches, Path(name), args.seconds)


# --- waiting for batches ----------------------------------------------------------------------


def measure_waiting(batches: Batches, size: int, rate: float, args: argparse.Namespace) -> float:
    """Share of its time that a training which takes so many pictures per second waits.

    It begins with a full buffer, and takes one and a half buffers, or more in `args.seconds`.
    """
    batches = without_end(batches)
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=ram_disk()) as name:
        buffer = Buffer(Path(name), batches, size)
        work = multiprocessing.get_context("fork").Process(target=follow, args=(buffer, args))
        work.start()
        try:
            while not buffer.spec.files(buffer.folder, size - 1)[0].exists():
                time.sleep(0.05)
            time.sleep(0.5)
            return train(buffer, batches.spec.batch_size / rate, args.seconds)
        finally:
            write_progress(buffer.folder, buffer.spec, buffer.end)
            work.join()


def without_end(batches: Batches) -> Batches:
    spec = dataclasses.replace(batches.spec, epochs=[0, 1_000_000])
    return Batches(spec, batches.pictures, batches.copies)


def follow(buffer: Buffer, args: argparse.Namespace) -> None:
    utils.lock(buffer.folder / ".preprocessor.lock", "held")
    with contextlib.redirect_stdout(io.StringIO()):
        keep_full(buffer, args.threads, SLEEP_TIME, utils.Stop())


def train(buffer: Buffer, pause: float, seconds: float) -> float:
    """Needs a batch every `pause` seconds. Returns the share of the time that it waited."""
    start, waited, step = time.perf_counter(), 0.0, 0
    due = start
    while (now := time.perf_counter()) < start + seconds or step < 1.5 * buffer.size:
        write_progress(buffer.folder, buffer.spec, step)
        while not buffer.spec.files(buffer.folder, step)[0].exists():
            time.sleep(0.001)
        late = time.perf_counter() - now
        waited += late if late > 0.0015 else 0.0
        due = max(due, now) + pause + late
        time.sleep(max(0.0, due - time.perf_counter()))
        step += 1
    return waited / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
