"""Measures the input pipeline beside what else could feed a network, in one run.

    python3 tests/benchmarks/benchmark_pipeline.py FOLDER_OF_JPEGS --threads 2 --seconds 8

prints images per second of Pillow decoding alone, of runtime_preprocessing.py making whole batches
on the RAM disk, and of tf.data without and with antialiasing, which leaves out the colour step.
They take turns, so that a busy machine is busy for all of them. With `--scale` it measures start,
memory and rounds at the size of ImageNet, with `--prepare` the scripts that work in advance.
"""

import argparse
import contextlib
import io
import itertools
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import toolkit

import numpy as np
from PIL import Image

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import utils

import get_mu_sigma
import preprocess
import preprocess_val
import runtime_preprocessing
from preprocess import CROP, SIDES, Paths, Pictures
from runtime_preprocessing import Batches, BatchSpec, Buffer

BATCH = 64
MU, SIGMA = [0.48180, 0.44969, 0.39839], [0.27336, 0.26435, 0.27563]
ROUNDS = 4
"""Turns that each of the compared systems gets."""

IMAGENET, CLASSES = 1_281_167, 1000


def main() -> None:
    args = parse_arguments()
    pictures = pictures_below(args.folder)
    print(
        f"{len(pictures)} JPEGs in {args.folder}, {utils.cores()} cores, load "
        f"{os.getloadavg()[0]:.1f} before the start"
    )
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=ram_disk()) as name:
        if args.scale:
            measure_scale(pictures, Path(name))
        elif args.prepare:
            measure_preparation(pictures, Path(name), args.seconds)
        else:
            compare_throughput(pictures, Path(name), args.threads, args.seconds)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="searched for *.JPEG and *.jpg")
    parser.add_argument("--threads", type=int, default=utils.cores())
    parser.add_argument("--seconds", type=float, default=8, help="for each system in all")
    parser.add_argument("--scale", action="store_true", help="at 1,281,167 pictures")
    parser.add_argument("--prepare", action="store_true", help="the scripts that work in advance")
    return parser.parse_args()


def ram_disk() -> Path | None:
    return Path("/dev/shm") if Path("/dev/shm").is_dir() else None


def pictures_below(folder: Path, most: int | None = None) -> Pictures:
    found = sorted(p for p in folder.rglob("*") if p.suffix in (".JPEG", ".jpg", ".jpeg"))[:most]
    if not found:
        sys.exit(f"{folder}: no JPEGs")
    paths = Paths(str(path.relative_to(folder)) for path in found)
    return Pictures(folder, paths, np.zeros(len(paths), np.int32), ["all"], "one class")


def batches_of(
    pictures: Pictures, resized: dict[int, Path] | None = None, batch_size: int = BATCH
) -> Batches:
    batch_size = min(batch_size, len(pictures))
    spec = BatchSpec(
        batch_size=batch_size,
        seed=0,
        dataset=str(pictures.folder),
        N=len(pictures),
        pictures=pictures.fingerprint,
        classes=len(pictures.class_names),
        class_names=pictures.class_names,
        mu=MU,
        sigma=SIGMA,
        resized=sorted(resized or {}),
        worker=0,
        workers=1,
        batches_per_epoch=len(pictures) // batch_size,
        epochs=[0, 30],
    )
    return Batches(spec, pictures, resized or {})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# --- throughput -------------------------------------------------------------------------------


def compare_throughput(pictures: Pictures, folder: Path, threads: int, seconds: float) -> None:
    """Images per second of each system, in turns of `seconds / ROUNDS`."""
    systems = {
        "decode floor (Pillow)": lambda t: decoding_speed(pictures, threads, t),
        "runtime_preprocessing": lambda t: batch_speed(batches_of(pictures), folder, threads, t),
        "tf.data, no antialias": lambda t: tf_data_speed(pictures, threads, t, antialias=False),
        "tf.data, antialias": lambda t: tf_data_speed(pictures, threads, t, antialias=True),
    }
    turns = in_turns(systems, seconds)
    floor = median_speed(turns["decode floor (Pillow)"])
    print(f"\n{threads} threads, {ROUNDS} turns of {seconds / ROUNDS:.1f} s each; medians")
    print(
        f"{'':22} {'images/s':>9} {'a thread':>9} {'of floor':>9}   {'turns':15} "
        f"{'images a CPU second':>20} {'of floor':>9}"
    )
    for name in systems:
        speed, rates = median_speed(turns[name]), [turn.rate for turn in turns[name]]
        print(
            f"{name:22} {speed.rate:9,.0f} {speed.rate / threads:9,.0f} "
            f"{speed.rate / floor.rate:9.2f}   {f'{min(rates):,.0f} … {max(rates):,.0f}':15} "
            f"{speed.cpu_rate:20,.0f} {speed.cpu_rate / floor.cpu_rate:9.2f}"
        )


class Speed(NamedTuple):
    rate: float
    """Images per second: what a user sees, and what other programs on the machine disturb."""
    cpu_rate: float
    """Images per second of the processor's time, hardly disturbed; waiting costs nothing here."""


def median_speed(turns: list[Speed]) -> Speed:
    return Speed(*(statistics.median(values) for values in zip(*turns, strict=True)))


def in_turns(systems: dict[str, Callable[[float], Speed]], seconds: float) -> dict:
    """The speeds of each system's turns; every other round goes backwards."""
    turns = {name: [] for name in systems}
    for turn in range(ROUNDS):
        for name in list(systems)[:: -1 if turn % 2 else 1]:
            turns[name].append(systems[name](seconds / ROUNDS))
    return turns


def speed_of(next_batch: Callable[[], object], images: int, seconds: float) -> Speed:
    """The speed of something that gives `images` a call, after two calls of warm-up."""
    next_batch(), next_batch()
    count, start, cpu_start = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        next_batch()
        count += images
    return Speed(count / (time.perf_counter() - start), count / (time.process_time() - cpu_start))


def decode(path: Path) -> None:
    with Image.open(path) as image:
        image.convert("RGB").load()


def decoding_speed(pictures: Pictures, threads: int, seconds: float) -> Speed:
    endless = itertools.cycle([pictures.folder / path for path in pictures.paths])
    with ThreadPoolExecutor(threads) as pool:
        return speed_of(
            lambda: list(pool.map(decode, itertools.islice(endless, BATCH))), BATCH, seconds
        )


def batch_speed(batches: Batches, folder: Path, threads: int, seconds: float) -> Speed:
    """Whole batches in a buffer on the RAM disk, taken as soon as they are there."""
    cpu_start = sum(os.times()[:4])
    with quiet():
        rate, begun = runtime_preprocessing.measure(batches, folder, threads, 0, seconds)
    return Speed(rate, begun * batches.spec.batch_size / (sum(os.times()[:4]) - cpu_start))


def tf_data_speed(pictures: Pictures, threads: int, seconds: float, antialias: bool) -> Speed:
    """The same crops as tf.data would be asked for them; no colour shift."""
    with utils.quiet_tensorflow():
        import tensorflow as tf

    def load(path):
        jpeg = tf.io.read_file(path)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(jpeg),
            tf.zeros([1, 0, 4]),
            aspect_ratio_range=(0.99, 1.01),
            area_range=(0.15, 0.75),
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.concat([begin[:2], size[:2]], 0)
        image = tf.image.decode_and_crop_jpeg(jpeg, window, channels=3)
        image = tf.image.random_flip_left_right(image)
        image = tf.image.resize(image, [CROP, CROP], antialias=antialias)
        return tf.cast((image / 255 - MU) / SIGMA, tf.float16)

    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    files = [str(pictures.folder / path) for path in pictures.paths]
    data = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files)).repeat()
    data = data.map(load, num_parallel_calls=threads, deterministic=False)
    batches = iter(data.batch(BATCH).prefetch(2).with_options(options))
    return speed_of(lambda: next(batches), BATCH, seconds)


# --- at the size of ImageNet ------------------------------------------------------------------


def measure_scale(pictures: Pictures, folder: Path) -> None:
    """Start, memory, rounds and deletion with 1,281,167 pictures and 1,000 batches of 64."""
    seconds = timed(lambda: make_tree(folder / "imagenet", pictures.folder / pictures.paths[0]))
    print(f"made a tree of {IMAGENET:,} hard links in {CLASSES:,} folders in {seconds:.0f} s")
    (folder / "buffer").mkdir()
    config = toolkit.write_config(
        folder, folder / "imagenet", folder / "buffer", train__buffer_size=4
    )
    measure_start_and_memory(config, folder / "buffer")
    batches = measure_reading(config)
    measure_rounds(Buffer(folder / "buffer", batches, 1000))
    measure_command_lines()


def make_tree(root: Path, picture: Path) -> None:
    """Class folders with the names of ImageNet's; every file is the same picture."""
    root.mkdir()
    shutil.copy(picture, root / "picture")
    for label in range(CLASSES):
        folder = root / "train" / f"n{label + 1_440_000:08d}"
        folder.mkdir(parents=True)
        for i in range(IMAGENET // CLASSES + (label < IMAGENET % CLASSES)):
            os.link(root / "picture", f"{folder}/{folder.name}_{i}.JPEG")


def measure_start_and_memory(config: Path, buffer: Path) -> None:
    """The real command, from its start to its first batch, and through some epochs."""
    start = time.perf_counter()
    arguments = ("--epoch_start=0", "--epoch_end=30", f"--batch_size={BATCH}")
    process = toolkit.start(
        "runtime_preprocessing.py", config, *arguments, log=config.with_name("log")
    )
    try:
        for epoch in range(6):
            utils.write_text(buffer / "training_progress.txt", f"{epoch}\n0\n")
            while not (buffer / f"X_{epoch}_3.npy").exists():
                if process.poll() is not None:
                    sys.exit(config.with_name("log").read_text())
                if epoch == 0 and start and (buffer / "X_0_0.npy").exists():
                    print(f"start to first batch: {time.perf_counter() - start:.1f} s")
                    start = 0
                time.sleep(0.01)
            print(f"memory in epoch {epoch}: {memory(process.pid):.0f} MB")
    finally:
        process.kill()
        process.wait()
    for path in buffer.iterdir():
        path.unlink()


def memory(process: int) -> float:
    """Megabytes of main memory of a process and its children; what they share counts once."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    total = 0
    for each in (process, *children):
        (line,) = re.findall(
            r"^Pss: +(\d+) kB", Path(f"/proc/{each}/smaps_rollup").read_text(), re.M
        )
        total += int(line) * 1024
    return total / 1e6


def measure_reading(config: Path) -> Batches:
    settings = utils.load_config(config)
    start = time.perf_counter()
    pictures = preprocess.training_pictures(settings)
    listed = time.perf_counter()
    batches = batches_of(pictures)
    fingerprint = timed(lambda: pictures.fingerprint)
    permutation = statistics.median(timed(lambda e=e: batches.order(e)) for e in range(5))
    print(
        f"listing the pictures {listed - start:.1f} s, their fingerprint {fingerprint:.2f} s, "
        f"one epoch's permutation {1000 * permutation:.0f} ms"
    )
    return batches


def measure_rounds(buffer: Buffer, count: int = 1000, written: int = 32) -> None:
    """Looking at a full buffer (files of the right length without content), and deleting it."""
    for number in range(count):
        x, y = buffer.spec.files(buffer.folder, number)
        for path, size in zip((x, y), buffer.sizes.values(), strict=True):
            path.touch()
            os.truncate(path, size)

    def look() -> None:
        first = buffer.wanted_first()
        files = buffer.files()
        assert buffer.ready(files) == set(range(first, first + count))

    rounds = [timed(look) for _ in range(20)]
    emptying = timed(lambda: buffer.remove(buffer.files()))
    for number in range(written):
        x, _ = buffer.spec.files(buffer.folder, number)
        x.write_bytes(b"\1" * buffer.sizes["X"])
    deleting = timed(lambda: buffer.remove(buffer.files())) / written
    print(
        f"one round over {count:,} batches {1000 * statistics.median(rounds):.1f} ms (slowest "
        f"{1000 * max(rounds):.1f} ms); deleting {count:,} batches: their names "
        f"{1000 * emptying:.0f} ms, with their content {1000 * count * deleting:.0f} ms"
    )


def measure_command_lines() -> None:
    """Seconds until --help and a mistake are answered, for scripts that need no TensorFlow."""
    for script in (
        "preprocess.py",
        "preprocess_val.py",
        "get_mu_sigma.py",
        "runtime_preprocessing.py",
    ):
        seconds = {
            argument: statistics.median(
                timed(lambda s=script, a=argument: answer(s, a)) for _ in range(5)
            )
            for argument in ("--help", "--epoch_strat=0")
        }
        print(f"{script:26} {', '.join(f'{a} {s:.2f} s' for a, s in seconds.items())}")


def answer(script: str, argument: str) -> None:
    subprocess.run([sys.executable, toolkit.ROOT / script, argument], capture_output=True)


# --- the scripts that work in advance ---------------------------------------------------------


def measure_preparation(pictures: Pictures, folder: Path, seconds: float) -> None:
    measure_resizing(pictures, folder, seconds)
    measure_readers(pictures, folder, seconds)
    measure_resized_folders(pictures_below(pictures.folder, 128), folder, seconds)


def print_speeds(systems: dict, seconds: float) -> dict[str, Speed]:
    """Measures the systems in turns and prints each beside the first."""
    speeds = {name: median_speed(turns) for name, turns in in_turns(systems, seconds).items()}
    first = next(iter(speeds.values()))
    for name, speed in speeds.items():
        print(
            f"{name:28} {speed.rate:8,.1f} pictures/s  x{speed.rate / first.rate:.3f}   "
            f"{speed.cpu_rate:8,.1f} a CPU second  x{speed.cpu_rate / first.cpu_rate:.3f}"
        )
    return speeds


def endless_paths(pictures: Pictures) -> Iterator[Path]:
    return itertools.cycle([pictures.folder / path for path in pictures.paths])


def work_speed(
    work: Callable[[Path], object], pictures: Pictures, threads: int, seconds: float
) -> Speed:
    """The speed of `work` on each picture, spread over threads as the scripts do it."""
    end = time.perf_counter() + seconds
    paths = itertools.takewhile(lambda _: time.perf_counter() < end, endless_paths(pictures))
    start, cpu_start = time.perf_counter(), time.process_time()
    count = sum(1 for _ in utils.map_in_order(work, paths, threads))
    return Speed(count / (time.perf_counter() - start), count / (time.process_time() - cpu_start))


def resize_at_once(path: Path, sides: list[int], folder: Path) -> None:
    one = Pictures(path.parent, Paths([path.name]), np.zeros(1, np.int32), ["any"], "")
    missing = dict.fromkeys(sides, folder / "none")
    for side, copy in preprocess.missing_copies(one, missing, 0):
        preprocess.save_jpeg(copy, folder / f"{side}_{path.name}")


def resize_in_separate_runs(path: Path, sides: list[int], folder: Path) -> None:
    for side in sides:
        resize_at_once(path, [side], folder)


def resize_with_skimage(path: Path, sides: list[int], folder: Path) -> None:
    """As scikit-image does it: antialiased, in double precision. Pillow reads and writes."""
    for side, copy in skimage_copies(decoded(path), sides):
        image = Image.fromarray(np.rint(copy * 255).astype(np.uint8))
        preprocess.save_jpeg(image, folder / f"{side}_{path.name}")


def decoded(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def skimage_copies(pixels: np.ndarray, sides: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    from skimage.transform import resize

    for side in sides:
        width, height = preprocess.resized_size(pixels.shape[1], pixels.shape[0], side)
        yield side, resize(pixels, (height, width), anti_aliasing=True)


def pillow_copies(image: Image.Image, sides: list[int]) -> Iterator[Image.Image]:
    for side in sides:
        yield image.resize(preprocess.resized_size(*image.size, side), Image.Resampling.BILINEAR)


def measure_resizing(pictures: Pictures, folder: Path, seconds: float) -> None:
    """One side and all 33: of one core, of all, in 33 runs, and as scikit-image does it."""

    def system(work: Callable, sides: list[int], threads: int) -> Callable[[float], Speed]:
        return lambda t: work_speed(lambda path: work(path, sides, folder), pictures, threads, t)

    cores = utils.cores()
    for title, sides in (("256", [256]), ("all", list(SIDES))):
        systems = {
            "preprocess.py, 1 core": system(resize_at_once, sides, 1),
            f"preprocess.py, {cores} cores": system(resize_at_once, sides, cores),
            "scikit-image, 1 core": system(resize_with_skimage, sides, 1),
        }
        if len(sides) > 1:
            systems["33 separate runs, 1 core"] = system(resize_in_separate_runs, sides, 1)
        print(f"\npreprocess.py --shorter_side={title}")
        speeds = print_speeds(systems, seconds)
        ours, theirs = speeds["preprocess.py, 1 core"], speeds["scikit-image, 1 core"]
        print(
            f"{ours.rate / theirs.rate:.1f} times scikit-image on one core, "
            f"{ours.cpu_rate / theirs.cpu_rate:.1f} times a CPU second"
        )
    pixels = [decoded(pictures.folder / path) for path in itertools.islice(pictures.paths, 16)]
    images = [Image.fromarray(each) for each in pixels]
    ours = timed(lambda: [list(pillow_copies(each, list(SIDES))) for each in images])
    theirs = timed(lambda: [list(skimage_copies(each, list(SIDES))) for each in pixels])
    print(f"resizing alone, without files: {theirs / ours:.1f} times scikit-image")


def measure_readers(pictures: Pictures, folder: Path, seconds: float) -> None:
    """get_mu_sigma.py and preprocess_val.py against decoding alone, on all cores."""
    cores = utils.cores()
    failures = preprocess.Failures(len(pictures))
    (folder / "val").mkdir()

    def repeated(work: Callable[[], object]) -> Callable[[float], Speed]:
        def speed(seconds: float) -> Speed:
            with quiet():
                return speed_of(work, len(pictures), seconds)

        return speed

    def cut_ten_crops() -> None:
        everything = list(range(len(pictures)))
        preprocess_val.write_crops(pictures, folder / "val", everything, pictures.labels.copy())

    systems = {
        "decode floor (Pillow)": lambda t: decoding_speed(pictures, cores, t),
        "get_mu_sigma.py": repeated(lambda: get_mu_sigma.mu_sigma(pictures, failures)),
        "preprocess_val.py": repeated(cut_ten_crops),
    }
    print(f"\nreading all pictures on {cores} cores")
    print_speeds(systems, seconds)
    shutil.rmtree(folder / "val")


def measure_resized_folders(pictures: Pictures, folder: Path, seconds: float) -> None:
    """Bytes of the resized copies, and batches from them against batches from the originals."""
    resized = {side: folder / "resized" / str(side) for side in SIDES}

    def write(index: int) -> int:
        path, total = pictures.paths[index], 0
        for side, copy in preprocess.missing_copies(pictures, resized, index):
            (resized[side] / path).parent.mkdir(parents=True, exist_ok=True)
            preprocess.save_jpeg(copy, resized[side] / path)
            total += (resized[side] / path).stat().st_size
        return total

    copies = sum(utils.map_in_order(write, range(len(pictures)), utils.cores()))
    originals = sum((pictures.folder / path).stat().st_size for path in pictures.paths)
    print(
        f"\nan original takes {utils.file_size(originals / len(pictures))} on average, its 33 "
        f"copies {utils.file_size(copies / len(pictures))}: "
        f"{utils.file_size(copies / len(pictures) * IMAGENET)} for ImageNet's {IMAGENET:,}"
    )
    threads = utils.cores()
    (folder / "batches").mkdir()
    systems = {
        "from the originals": lambda t: batch_speed(
            batches_of(pictures), folder / "batches", threads, t
        ),
        "from the resized folders": lambda t: batch_speed(
            batches_of(pictures, resized), folder / "batches", threads, t
        ),
    }
    print(f"\nbatches on {threads} threads")
    print_speeds(systems, seconds)


if __name__ == "__main__":
    main()
