"""The second campaign of faults: a user's worst month with storage, containers and neighbours.

    sudo python3 tests/campaigns/campaign_storage.py    # all of it, about 15 minutes on two cores
    sudo python3 tests/campaigns/campaign_storage.py --only containers closed_output

Each fault is tried on the real commands with a toy dataset. It must end in a result equal to that
of an undisturbed run, or in one line that says what to do, after which the same command gives the
equal result. "Lost" counts whatever else happens, and should be 0 everywhere. Rows that mount,
limit or change users need root; some need a C compiler. Without them a row says so and tries less.
"""

import atexit
import contextlib
import dataclasses
import functools
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import toolkit
import utils

import numpy as np

from campaign import (
    PATIENCE,
    Place,
    final_state,
    left_in,
    print_table,
    processes,
    span,
    tree,
    wait_for,
)  # fmt: skip
from runtime_preprocessing import Batches, read_progress, write_progress

PREPARING = {
    "preprocess.py": ["--shorter_side=256"],
    "preprocess_val.py": [],
    "get_mu_sigma.py": [],
}
"""The scripts that make something in advance and end."""

ANOTHER_USER = 12345
"""The number of a user who is nobody else."""


SCRATCH = tempfile.TemporaryDirectory(prefix="campaign-")
"""For the faults' own files; removed in the end."""


# --- tools ----------------------------------------------------------------------------------


@functools.cache
def bad_storage() -> Path | None:
    """The compiled library of bad_storage.c; None without a compiler."""
    library = Path(SCRATCH.name) / "bad_storage.so"
    source = Path(__file__).with_suffix("").with_name("bad_storage.c")
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        print("  no C compiler: the faults of bad_storage.c are left out")
        return None
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


class BadDisk:
    """The environment that puts these folders on a bad disk, and a count of its faults."""

    def __init__(self, *folders: Path, every: int = 0, clock: int = 0):
        self.aside = Path(tempfile.mkdtemp(dir=SCRATCH.name))
        self.flag = self.aside / "readonly"
        self.environment = {
            "LD_PRELOAD": str(bad_storage()),
            "FAULT_FOLDERS": ":".join(map(str, folders)),
            "FAULT_EVERY": str(every),
            "FAULT_CLOCK": str(clock),
            "FAULT_COUNT": str(self.aside / "count"),
            "FAULT_READONLY": str(self.flag),
        }

    @property
    def faults(self) -> int:
        path = self.aside / "count"
        return path.stat().st_size if path.exists() else 0

    @contextlib.contextmanager
    def readonly(self) -> Iterator[None]:
        self.flag.touch()
        yield
        self.flag.unlink()


def launch(
    place: Place,
    script: str,
    *arguments: str,
    before: tuple[str, ...] = (),
    preexec: Callable | None = None,
    python: str = sys.executable,
    **environment: str,
) -> subprocess.Popen:
    """Starts a script, perhaps by another command `before` it. Its output goes to a log."""
    log = place.folder / f"log-{len(place.processes)}.txt"
    with open(log, "w") as file:
        process = subprocess.Popen(
            [*before, python, *toolkit.command(script, place.config, *arguments)[1:]],
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | environment,
            preexec_fn=preexec,
        )
    process.log, process.script = log, script
    place.processes.append(process)
    return process


def ends_in_a_line(process: subprocess.Popen, expected: int = 2) -> bool:
    """Waits for the process. Whether it failed as a user may expect: one line, and this status: 2,
    or 1 if starting again may be enough.
    """
    status = process.wait(timeout=PATIENCE)
    text = process.log.read_text(errors="replace")
    lines = re.findall(rf"^{re.escape(process.script)}: error: .", text, re.MULTILINE)
    if status == expected and len(lines) == 1 and "Traceback" not in text:
        return True
    print(f"  {process.script} ended with {status}: {text[-600:]}")
    return False


def ends_well(process: subprocess.Popen) -> bool:
    """Waits for the process. Whether it did its work and left no traceback."""
    status = process.wait(timeout=PATIENCE)
    text = process.log.read_text(errors="replace")
    if status == 0 and "Traceback" not in text:
        return True
    print(f"  {process.script} ended with {status}: {text[-600:]}")
    return False


def ends(process: subprocess.Popen) -> bool:
    """Whether the process ended well, or in a line."""
    return ends_well(process) if process.wait(timeout=PATIENCE) == 0 else ends_in_a_line(process)


class StandIn:
    """Takes batch after batch as train.py does, and compares each with what it must be."""

    def __init__(self, place: Place, batch_size: int = 4, tells: bool = True):
        """`tells`: whether it writes its progress."""
        self.place, self.tells = place, tells
        self.batches = mirrored(place, toolkit.batches_of(place.config, batch_size))
        self.spec, self.number, self.lost = self.batches.spec, 0, 0
        self.arguments = span(1000, batch_size)

    def start(self, **how: object) -> subprocess.Popen:
        return launch(self.place, "runtime_preprocessing.py", *self.arguments, **how)

    def take(self, count: int, process: subprocess.Popen | None = None) -> bool:
        """Takes so many batches. False if they do not come, or the process ends."""
        goal, end = self.number + count, time.monotonic() + PATIENCE
        while self.number < goal:
            paths = self.spec.files(self.place.buffer, self.number)
            try:
                arrays = [np.load(path, allow_pickle=False) for path in paths]
            except (OSError, ValueError):  # not there, or somebody else's
                if time.monotonic() > end or process and process.poll() is not None:
                    return False
                self.tell()
                time.sleep(0.002)
                continue
            right = toolkit.made(self.batches, self.number)
            self.lost += any(not np.array_equal(a, b) for a, b in zip(arrays, right, strict=True))
            self.number += 1
            self.tell()
        return True

    def tell(self) -> None:
        """Says which batch is next, where that is not said."""
        with contextlib.suppress(OSError):
            if self.tells and read_progress(self.place.buffer, self.spec) != self.number:
                write_progress(self.place.buffer, self.spec, self.number)

    def finish(self, process: subprocess.Popen) -> int:
        """Ends the preprocessor as training does, at work. Returns all that was lost."""
        self.lost += not self.take(8, process)  # more than lay ready: it is at work
        write_progress(self.place.buffer, self.spec, self.spec.step(1000))
        self.lost += not ends_well(process)
        left = left_in(self.place.buffer)
        self.lost += len(left) + len(processes(self.place))
        if self.lost:
            print(f"  lost {self.lost}; left in the buffer: {left}")
        return self.lost


def mirrored(place: Place, batches: Batches) -> Batches:
    """The same batches from copies of the pictures, which no fault touches."""
    mirror, folder = place.folder / "mirror", batches.pictures.folder
    shutil.copytree(folder, mirror / "originals", dirs_exist_ok=True)
    copies = {side: mirror / str(side) for side in batches.copies}
    for side, copy in copies.items():
        shutil.copytree(batches.copies[side], copy, dirs_exist_ok=True)
    pictures = dataclasses.replace(batches.pictures, folder=mirror / "originals")
    return Batches(batches.spec, pictures, copies)


def buffer_place(**values: object) -> Place:
    return Place(10, val=5, train__buffer_size=6, runtime_preprocessing__sleep_time=0.02, **values)


def results(place: Place) -> Path:
    return utils.load_config(place.config).preprocess.path_to_save


@functools.cache
def undisturbed() -> dict[str, dict[str, bytes]]:
    """What the scripts of PREPARING make of the dataset of `buffer_place`."""
    made = {}
    for script, more in PREPARING.items():
        with buffer_place() as place:
            assert ends_well(launch(place, script, *more))
            made[script] = result_tree(place)
    return made


def result_tree(place: Place) -> dict[str, bytes]:
    """All results. The notes about the dataset name its folder, which is another each time."""
    made = tree(results(place)) if results(place).is_dir() else {}
    dataset = os.fsencode(place.folder / "dataset")
    return {name: content.replace(dataset, b"DATASET") for name, content in made.items()}


def is_equal(place: Place, script: str) -> bool:
    made, right = result_tree(place), undisturbed()[script]
    if made != right:
        differ = sorted(set(made) ^ set(right)) or [n for n in made if made[n] != right[n]]
        print(f"  {script}: {len(differ)} files differ, such as {differ[:3]}")
    return made == right


def ends_equal(place: Place, script: str, process: subprocess.Popen) -> bool:
    """Whether a script of PREPARING ended well or in a line, and then made the equal result."""
    if process.wait(timeout=PATIENCE) == 0:
        return ends_well(process) and is_equal(place, script)
    again = PREPARING[script]
    return (
        ends_in_a_line(process)
        and ends_well(launch(place, script, *again))
        and is_equal(place, script)
    )


@contextlib.contextmanager
def small_disk(folder: Path, size: str = "64m") -> Iterator[bool]:
    """A file system of its own at the folder; False where it cannot be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = not subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder],
                                 stderr=subprocess.DEVNULL).returncode  # fmt: skip
    if mounted:
        folder.chmod(0o700)  # a new tmpfs is everybody's
    else:
        print("  a small disk cannot be mounted here (needs root)")
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path, leave: int) -> Path:
    """A file that takes all of a disk but so many bytes."""
    filler = folder / "filler"
    with open(filler, "wb") as file, contextlib.suppress(OSError):  # others write meanwhile
        while (size := shutil.disk_usage(folder).free - leave) > 0:
            os.posix_fallocate(file.fileno(), file.tell(), size)
            file.seek(size, os.SEEK_CUR)
    return filler


# --- a training to compare with -------------------------------------------------------------


class Trainings:
    """Short trainings on one dataset, each a run of its own, compared with the first."""

    epochs = 2

    def __init__(self):
        self.place = Place(2, val=2, train__buffer_size=4, runtime_preprocessing__sleep_time=0.1)
        atexit.register(self.place.__exit__)
        self.models = utils.load_config(self.place.config).train.path_for_saving
        assert not self.lost("whole", *self.pair("whole"))
        self.right = final_state(self.models / "whole", self.epochs - 1)

    def preprocessor(self, **how: object) -> subprocess.Popen:
        return launch(self.place, "runtime_preprocessing.py", *span(self.epochs, 4), **how)

    def trainer(self, name: str, *more: str, **how: object) -> subprocess.Popen:
        arguments = [
            f"--run_folder={name}", *span(self.epochs, 4), "--learning_rate=0.01",
            "--deterministic", "--log_seconds=0", *more,
        ]  # fmt: skip
        return launch(self.place, "train.py", *arguments, **how)

    def pair(self, name: str, *more: str, **how: object) -> tuple[subprocess.Popen, ...]:
        return self.preprocessor(**how), self.trainer(name, *more, **how)

    def lost(self, name: str, preprocessor: subprocess.Popen, trainer: subprocess.Popen) -> int:
        """Waits for both. Returns how much they lost against the undisturbed run."""
        lost = (not ends_well(trainer)) + (not ends_well(preprocessor))
        if hasattr(self, "right") and not lost:
            state = final_state(self.models / name, self.epochs - 1)
            differ = [n for n in self.right if not np.array_equal(state[n], self.right[n])]
            if differ:
                print(f"  {name}: {len(differ)} variables differ")
            lost += len(differ)
        return lost


@functools.cache
def trainings() -> Trainings:
    return Trainings()


# --- the faults: each returns (tried, lost) -----------------------------------------------------

CONTAINER = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
"""What is started so has processes of its own: it is number 1, and sees no others."""


def containers(tries: int = 30) -> tuple[int, int]:
    """Each script is process 1 of its container; a second one is refused, the first is killed."""
    tried = lost = 0
    with buffer_place() as place:
        stand_in = StandIn(place)
        process = stand_in.start(before=CONTAINER)
        for turn in range(tries):
            lost += not stand_in.take(4, process)
            if turn % 6 == 5:
                lost += not ends_in_a_line(stand_in.start(before=CONTAINER))
                process.kill()
                process.wait()
                process = stand_in.start(before=CONTAINER)
            tried += 1
        lost += stand_in.finish(process)
    for script, more in PREPARING.items():
        with buffer_place() as place:
            both = [launch(place, script, *more, before=CONTAINER) for _ in range(2)]
            lost += sum(not ends(process) for process in both)
            lost += not is_equal(place, script)
            tried += 2
    return tried, lost


def errors_of_storage(tries: int = 2000) -> tuple[int, int]:
    """EIO on one read in 1000 (so many batches), then in 50: the scripts without TensorFlow."""
    if not bad_storage():
        return 0, 0
    tried = lost = 0
    for every, batches in ((1000, tries), (50, tries // 8)):
        with buffer_place() as place:
            disk = BadDisk(place.folder / "dataset", every=every)
            stand_in = StandIn(place)
            process = stand_in.start(**disk.environment)
            lost += not stand_in.take(batches, process)
            lost += stand_in.finish(process)
            print(f"  one in {every}: {disk.faults} errors in {batches} batches")
            tried += disk.faults
    for script, more in PREPARING.items():
        with buffer_place() as place:
            disk = BadDisk(place.folder / "dataset", every=12)
            process = launch(place, script, *more, **disk.environment)
            lost += not (ends_well(process) and is_equal(place, script))
            tried += disk.faults
    return tried, lost


def errors_of_storage_training(tries: int = 1) -> tuple[int, int]:
    """EIO on one read in 50 of pictures and batches through a whole training."""
    if not bad_storage():
        return 0, 0
    tried = lost = 0
    for turn in range(tries):
        name, place = f"eio{turn}", trainings().place
        disk = BadDisk(place.folder / "dataset", place.buffer, every=50)
        lost += trainings().lost(name, *trainings().pair(name, **disk.environment))
        tried += disk.faults
    return tried, lost


def full_disk(tries: int = 5) -> tuple[int, int]:
    """The disk fills up under each script, so many times, and has room again."""
    moments, tried, lost = random.Random(1), 0, 0
    for script, more in PREPARING.items():
        for _ in range(tries):
            with buffer_place() as place, small_disk(results(place)) as mounted:
                if not mounted:
                    return 0, 0
                process = launch(place, script, *more)
                time.sleep(moments.uniform(0, 0.8))
                filler = fill(results(place), moments.choice([0, 4096, 100_000]))
                ended = ends(process)
                filler.unlink()
                lost += not (ended and ends_well(launch(place, script, *more)))
                lost += not is_equal(place, script)
                tried += 1
    with buffer_place() as place, small_disk(place.buffer, "32m") as mounted:
        stand_in = StandIn(place)
        process = stand_in.start()
        for _ in range(2 * tries):
            lost += not stand_in.take(8, process)
            filler = fill(place.buffer, moments.choice([0, 4096, 100_000]))
            time.sleep(moments.uniform(0, 0.5))
            filler.unlink()
            tried += 1
        lost += not stand_in.take(20, process)
        lost += stand_in.finish(process)
    return tried, lost


def readonly_disk(tries: int = 5) -> tuple[int, int]:
    """The disk is read-only at the start of each script (remounted), or becomes so under it."""
    moments, tried, lost = random.Random(2), 0, 0
    for script, more in PREPARING.items():
        with buffer_place() as place, small_disk(results(place)) as mounted:
            if mounted:
                remount(results(place), "ro")
                lost += not ends_in_a_line(launch(place, script, *more))
                remount(results(place), "rw")
                lost += not ends_well(launch(place, script, *more)) or not is_equal(place, script)
                tried += 1
        for _ in range(tries if bad_storage() else 0):
            with buffer_place() as place:
                disk = BadDisk(results(place))
                process = launch(place, script, *more, **disk.environment)
                time.sleep(moments.uniform(0, 0.8))
                with disk.readonly():
                    time.sleep(moments.uniform(0, 0.8))
                lost += not ends_equal(place, script, process)
                tried += 1
    more_tried, more_lost = readonly_buffer(tries, moments)
    return tried + more_tried, lost + more_lost


def readonly_buffer(tries: int, moments: random.Random) -> tuple[int, int]:
    """The same under runtime_preprocessing.py."""
    tried = lost = 0
    with buffer_place() as place:
        stand_in, disk = StandIn(place), BadDisk(place.buffer)
        for _ in range(2 * tries if bad_storage() else 0):
            process = stand_in.start(**disk.environment)
            lost += not stand_in.take(8, process)
            with disk.readonly():
                stand_in.take(8, process)
                time.sleep(moments.uniform(0, 0.3))
            stand_in.take(2, process)
            if process.poll() is not None:
                lost += not ends_in_a_line(process)
            else:
                process.terminate()
                process.wait()
            tried += 1
        process = stand_in.start()
        lost += not stand_in.take(8, process)
        lost += stand_in.finish(process)
    return tried, lost


def remount(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", folder], check=True)


def readonly_models(tries: int = 1) -> tuple[int, int]:
    """The disk of the models is read-only now and then while training saves after each batch."""
    tried = lost = 0
    for turn in range(tries if bad_storage() else 0):
        name = f"readonly{turn}"
        disk = BadDisk(trainings().models / name)
        pair = trainings().pair(name, "--checkpoint_minutes=0", **disk.environment)
        wait_for(lambda pair=pair: "images/s" in pair[1].log.read_text())
        while pair[1].poll() is None:
            with disk.readonly():
                time.sleep(0.6)
            time.sleep(8.0)  # longer than a model takes to be saved
        tried += disk.faults
        lost += trainings().lost(name, *pair)
    return tried, lost


def children(process: subprocess.Popen) -> list[int]:
    listing = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(number) for number in listing.read_text().split()] if listing.exists() else []


def pause(process: subprocess.Popen, seconds: float, which: str = "parent") -> None:
    """SIGSTOP and SIGCONT to a process, its children, or all."""
    chosen = {"parent": [process.pid], "children": children(process)}
    chosen["all"] = chosen["parent"] + chosen["children"]
    for number, sleep in ((signal.SIGSTOP, seconds), (signal.SIGCONT, 0)):
        for pid in chosen[which]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        time.sleep(sleep)


def stopped_and_continued(tries: int = 40) -> tuple[int, int]:
    """SIGSTOP, up to 3 s, SIGCONT: the preprocessor or its workers, the scripts that prepare."""
    moments, tried, lost = random.Random(3), 0, 0
    with buffer_place() as place:
        stand_in = StandIn(place)
        process = stand_in.start()
        for turn in range(tries):
            lost += not stand_in.take(4, process)
            which = ("parent", "children", "all")[turn % 3]
            pause(process, 3 if turn % 20 == 0 else moments.uniform(0, 0.5), which)
            tried += 1
        lost += not stand_in.take(20, process)
        lost += stand_in.finish(process)
    for script, more in PREPARING.items():
        with buffer_place() as place:
            process = launch(place, script, *more)
            while process.poll() is None:
                time.sleep(moments.uniform(0, 0.1))
                pause(process, moments.uniform(0, 0.3))
                tried += 1
            lost += not (ends_well(process) and is_equal(place, script))
    return tried, lost


def stopped_training(tries: int = 1) -> tuple[int, int]:
    """The same to the trainer and to its preprocessor, through a whole training."""
    moments, tried, lost = random.Random(4), 0, 0
    for turn in range(tries):
        pair = trainings().pair(f"stopped{turn}", "--checkpoint_minutes=0")
        while pair[1].poll() is None:
            pause(moments.choice(pair), moments.uniform(0, 1))
            time.sleep(moments.uniform(0, 0.5))
            tried += 1
        lost += trainings().lost(f"stopped{turn}", *pair)
    return tried, lost


@contextlib.contextmanager
def away(folder: Path) -> Iterator[None]:
    """A folder that is somewhere else for a moment."""
    elsewhere = folder.with_name(f"{folder.name}-elsewhere")
    folder.rename(elsewhere)
    yield
    elsewhere.rename(folder)


def dataset_away(tries: int = 10) -> tuple[int, int]:
    """The dataset's folder is gone for a moment, and for long, under each script."""
    moments, tried, lost = random.Random(5), 0, 0
    for copies in (False, True):
        with buffer_place() as place:
            folder = place.folder / "dataset"
            if copies:
                assert ends_well(launch(place, "preprocess.py", "--shorter_side=all"))
                folder = results(place)
            stand_in = StandIn(place)
            process = stand_in.start()
            for _ in range(tries):
                lost += not stand_in.take(8, process)
                with away(folder):
                    stand_in_takes = threading.Thread(target=stand_in.take, args=(8, process))
                    stand_in_takes.start()
                    time.sleep(moments.uniform(0, 1))
                stand_in_takes.join()
                if process.poll() is not None:  # too long for its patience: it must say so
                    lost += not ends_in_a_line(process, expected=1)
                    process = stand_in.start()
                tried += 1
            with away(folder):
                stand_in.take(30, process)
                lost += not ends_in_a_line(process, expected=1)
            process = stand_in.start()
            lost += not stand_in.take(20, process)
            lost += stand_in.finish(process)
            tried += 1
    for script, more in PREPARING.items():
        for _ in range(tries // 2):
            with buffer_place() as place:
                process = launch(place, script, *more)
                time.sleep(moments.uniform(0, 0.8))
                with away(place.folder / "dataset"):
                    time.sleep(moments.uniform(0, 1))
                lost += not ends_equal(place, script, process)
                tried += 1
    return tried, lost


def wrong_clock(tries: int = 50) -> tuple[int, int]:
    """The clock jumps by years at each look, files are from the past and the future."""
    moments, tried, lost = random.Random(6), 0, 0
    clock = BadDisk(clock=10**8).environment if bad_storage() else {}
    with buffer_place() as place:
        stand_in = StandIn(place)
        process = stand_in.start(**clock)
        for _ in range(tries):
            lost += not stand_in.take(4, process)
            for path in [*place.buffer.iterdir(), *(place.folder / "dataset").rglob("*.JPEG")]:
                with contextlib.suppress(FileNotFoundError):
                    os.utime(path, (moments.uniform(0, 4e9),) * 2)
            tried += 1
        lost += stand_in.finish(process)
    for script, more in PREPARING.items():
        with buffer_place() as place:
            lost += not ends_well(launch(place, script, *more, **clock))
            for path in results(place).rglob("*"):
                os.utime(path, (moments.uniform(0, 4e9),) * 2)
            lost += not ends_well(launch(place, script, *more, **clock))
            lost += not is_equal(place, script)
            tried += 2
    return tried, lost


def wrong_clock_training(tries: int = 1) -> tuple[int, int]:
    """A whole training with such a clock."""
    lost = 0
    clock = BadDisk(clock=10**8).environment if bad_storage() else {}
    for turn in range(tries):
        lost += trainings().lost(f"clock{turn}", *trainings().pair(f"clock{turn}", **clock))
    return tries, lost


def limit(which: int, value: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(which, (value, value))


def few_files_and_little_memory(tries: int = 8) -> tuple[int, int]:
    """64 open files and fewer; memory just above and below what is needed (RLIMIT_AS, halving)."""
    tried = lost = 0
    for files in (64, 40, 24, 16, 12, 8):
        lost += not each_script(limit(resource.RLIMIT_NOFILE, files), must_work=files == 64)
        tried += len(PREPARING) + 1
    for script in (*PREPARING, "runtime_preprocessing.py"):
        low, high = 0, 4_000_000_000
        for _ in range(tries):  # what is enough to start, and no more
            middle = (low + high) // 2
            with buffer_place() as place:
                how = {"preexec": limit(resource.RLIMIT_AS, middle)}
                starts = launch(place, script, "--help", **how).wait() == 0
            low, high = (low, middle) if starts else (middle, high)
        start = high
        for step in range(tries):
            low = start + step * 60_000_000
            lost += not run_once(script, limit(resource.RLIMIT_AS, low))
            tried += 1
    return tried, lost


def each_script(preexec: Callable, must_work: bool) -> bool:
    scripts = (*PREPARING, "runtime_preprocessing.py")
    return all([run_once(script, preexec, must_work) for script in scripts])


def run_once(script: str, preexec: Callable, must_work: bool = False) -> bool:
    """Whether a script under a limit gives the equal result, or ends in a line."""
    with buffer_place() as place:
        if script in PREPARING:
            process = launch(place, script, *PREPARING[script], preexec=preexec)
            if process.wait(timeout=PATIENCE) and must_work:
                print(f"  {process.log.read_text()}")
                return False
            return ends_equal(place, script, process)
        stand_in = StandIn(place)
        process = stand_in.start(preexec=preexec)
        if stand_in.take(20, process):
            return not stand_in.finish(process)
        return not must_work and ends_in_a_line(process) and not stand_in.lost


def limited_training(tries: int = 1) -> tuple[int, int]:
    """A whole training with 64 open files, in a control group with 5% more memory than it needs."""
    tried = lost = 0
    files = limit(resource.RLIMIT_NOFILE, 64)
    with control_group() as group:
        for turn in range(tries):
            for kind, memory in (("free", None), ("limited", 1.05)):
                name = f"{kind}{turn}"
                if memory and group:
                    most = int((group / "memory.max_usage_in_bytes").read_text())
                    (group / "memory.limit_in_bytes").write_text(str(int(memory * most)))
                    print(f"  {most:,} bytes were needed")

                def enter() -> None:
                    files()
                    if group:
                        (group / "cgroup.procs").write_text(str(os.getpid()))

                lost += trainings().lost(name, *trainings().pair(name, preexec=enter))
                tried += 1 + bool(memory and group)
    return tried, lost


@contextlib.contextmanager
def control_group() -> Iterator[Path | None]:
    """A new control group of version 1; None where there are none."""
    group = Path("/sys/fs/cgroup/memory") / f"campaign-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        print("  no control group can be made here: open files are limited alone")
        yield None
        return
    try:
        yield group
    finally:
        wait_for(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def become_another_user() -> None:
    os.setgroups([])
    os.setgid(ANOTHER_USER)
    os.setuid(ANOTHER_USER)


def as_another_user() -> dict[str, object] | None:
    """How to launch a script as another user; None if there is no Python that they may start."""
    packages = str(Path(np.__file__).parent.parent)
    for python in (sys.executable, "/usr/bin/python3"):
        with contextlib.suppress(OSError):
            test = subprocess.run(
                [python, "-c", "import numpy, PIL.Image"],
                env=os.environ | {"PYTHONPATH": packages},
                preexec_fn=become_another_user,
                stderr=subprocess.DEVNULL,
            )
            if test.returncode == 0:
                how = {"python": python, "preexec": become_another_user}
                return how | {"PYTHONPATH": packages, "HOME": "/tmp"}
    return None


def two_users(tries: int = 3) -> tuple[int, int]:
    """Another user starts each script with the same config, beside the first and after it."""
    if os.getuid() or not (how := as_another_user()):
        print("  needs root, and a Python that another user may start")
        return 0, 0
    tried = lost = 0
    with buffer_place() as place:
        place.folder.chmod(0o755)
        for script, more in PREPARING.items():
            assert ends_well(launch(place, script, *more))
        before, stand_in = tree(results(place)), StandIn(place)
        for killed in (False, True):
            os.chmod(place.buffer, 0o755)
            process = stand_in.start()
            lost += not stand_in.take(8, process)
            if killed:
                process.kill()
                process.wait()
            for mode in (0o755, 0o1777) if killed else (0o755,):  # it stops if all may write there
                os.chmod(place.buffer, mode)
                begins = [stand_in.start(**how) for _ in range(tries)]
                lost += sum(not ends_in_a_line(each) for each in begins)
                again = [launch(place, *command(s), **how) for s in [*PREPARING] * tries]
                lost += sum(not ends(each) for each in again)  # perhaps there is nothing to do
                tried += len(begins) + len(again)
            if not killed:
                for script in ("train.py", "check_accuracy.py"):
                    lost += not ends_in_a_line(launch(place, *command(script), **how))
                    tried += 1
                lost += not stand_in.take(20, process)
                process.terminate()
                process.wait()
        lost += tree(results(place)) != before
        os.chmod(place.buffer, 0o700)
        lost += stand_in.finish(stand_in.start())
    return tried, lost


def command(script: str) -> list[str]:
    """A script with its flags."""
    training = ["--run_folder=r", "--epoch_start=0", "--epoch_end=2"]
    flags = PREPARING | {
        "check_accuracy.py": training,
        "train.py": [*training, "--batch_size=4", "--learning_rate=0.1"],
    }
    return [script, *flags[script]]


def buffer_deleted(tries: int = 20) -> tuple[int, int]:
    """The buffer's folder, or all that lies in it, is removed under a running preprocessor."""
    lost = 0
    with buffer_place() as place:
        stand_in = StandIn(place)
        process = stand_in.start()
        for turn in range(tries):
            lost += not stand_in.take(6, process)
            if turn % 2:
                shutil.rmtree(place.buffer, ignore_errors=True)
            else:
                remove_content(place.buffer)
        lost += not stand_in.take(8, process)
        lost += stand_in.finish(process)
    return tries, lost


def remove_content(folder: Path) -> None:
    """rm -f folder/* folder/.*"""
    for path in folder.iterdir():
        path.unlink(missing_ok=True)


def buffer_deleted_training(tries: int = 2) -> tuple[int, int]:
    """The buffer is removed under a pair, as a logout does; both go on."""
    lost = 0
    for turn in range(tries):
        pair = trainings().pair(f"deleted{turn}", "--checkpoint_minutes=0")
        wait_for(lambda p=pair, n=1 + 2 * turn: p[1].log.read_text().count("images/s") >= n)
        shutil.rmtree(trainings().place.buffer, ignore_errors=True)
        lost += trainings().lost(f"deleted{turn}", *pair)
    return tries, lost


def outputs() -> dict[str, str]:
    """Ways in which what a script prints cannot be written, in the shell's words."""
    streams = {"output": ">", "errors": "2>", "both": ">&- 2>"}
    kinds = {f"{name} closed": f"{sign}&-" for name, sign in streams.items()}
    kinds |= {f"{name} on a full disk": f"{sign} /dev/full" for name, sign in streams.items()}
    return kinds | {"a pipe that nobody reads": "| true", "both to such a pipe": "2>&1 | true"}


def shell(place: Place, script: str, more: list[str], redirection: str) -> tuple[str, ...]:
    words = " ".join(map(repr, toolkit.command(script, place.config, *more)))
    return ("bash", "-c", f"set -o pipefail; {words} {redirection}")


def closed_output(tries: int = 1) -> tuple[int, int]:
    """Nothing of what a script prints can be written: closed, a full disk, a pipe nobody reads."""
    tried = lost = 0
    for kind, redirection in outputs().items():
        for script, more in [*PREPARING.items()] * tries:
            with buffer_place() as place:
                command = shell(place, script, more, redirection)
                status = subprocess.run(command, stderr=subprocess.DEVNULL, timeout=PATIENCE)
                bad = status.returncode != 0 or not is_equal(place, script)
                if bad:
                    print(f"  {script}, {kind}: {status.returncode}")
                lost += bad
                tried += 1
        with buffer_place() as place:
            stand_in = StandIn(place)
            command = shell(place, "runtime_preprocessing.py", stand_in.arguments, redirection)
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            process.script, process.log = f"runtime_preprocessing.py, {kind}", Path("/dev/null")
            place.processes.append(process)
            lost += not stand_in.take(20, process)
            lost += stand_in.finish(process)
            tried += 1
    return tried, lost


def closed_output_training(tries: int = 1) -> tuple[int, int]:
    """The same for train.py and check_accuracy.py, of a training's two models."""
    tried = lost = 0
    place, models = trainings().place, trainings().models
    assert ends_well(launch(place, "preprocess_val.py"))
    epochs = ["--epoch_start=0", f"--epoch_end={trainings().epochs}"]
    kinds = list(outputs().items())
    for turn in range(tries):
        for kind, redirection in (kinds[2], kinds[-1]):
            name = f"output{turn}{kinds.index((kind, redirection))}"
            arguments = [
                f"--run_folder={name}", *epochs, "--batch_size=4", "--learning_rate=0.01",
                "--deterministic",
            ]  # fmt: skip
            preprocessor = trainings().preprocessor()
            command = shell(place, "train.py", arguments, redirection)
            trainer = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            trainer.script, trainer.log = f"train.py, {kind}", Path("/dev/null")
            lost += trainings().lost(name, preprocessor, trainer)
            command = shell(place, "check_accuracy.py", [f"--run_folder={name}", *epochs],
                            redirection)  # fmt: skip
            lost += subprocess.run(command, stderr=subprocess.DEVNULL).returncode != 0
            rows = utils.read_csv(models / name / "accuracy.csv", {"epoch": int})
            lost += len(rows) != trainings().epochs
            tried += 2
    return tried, lost


STRANGERS = {
    "buffer": ["X_0_0.npy", "Y_0_0.npy", "buffer.json", "training_progress.txt",
               ".preprocessor.lock", ".trainer.lock"],
    "results": ["256", "256/discs", "256/discs/discs_0.JPEG", "val", "val/y.npy", "val/X10_0.npy",
                "val/crops.json", "val/.preprocess_val.lock", "copies.json", ".preprocess.lock",
                "mu_sigma.txt"],
}  # fmt: skip
"""Names of the toolkit's own files, in each folder of the config."""

PRECIOUS = b"a stranger's own words\n"


def strange(path: Path, kind: str, treasure: Path) -> None:
    """Somebody else's file, folder or link of this name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "file":
        path.write_bytes(PRECIOUS)
    elif kind == "folder":
        path.mkdir()
        (path / "own.txt").write_bytes(PRECIOUS)
    else:
        path.symlink_to(treasure)


def strangers_files(tries: int = 1) -> tuple[int, int]:
    """Somebody else's file, folder or link has a name of the toolkit's, in each folder."""
    tried = lost = 0
    for where, names in STRANGERS.items():
        for name in [*names, "all of them"] * tries:
            for kind in ("file", "folder", "link"):
                with buffer_place() as place:
                    folder = place.buffer if where == "buffer" else results(place)
                    treasure = place.folder / "treasure"
                    treasure.write_bytes(PRECIOUS)
                    chosen = [n for n in names if n not in ("256", "256/discs", "val")]
                    for each in chosen if name == "all of them" else [name]:
                        strange(folder / each, kind, treasure)
                    lost += not strangers_survive(place, where, folder, treasure)
                    tried += 1
    return tried, lost


def strangers_survive(place: Place, where: str, folder: Path, treasure: Path) -> bool:
    """Whether the scripts leave strangers' files alone, and work or end in a line."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if where == "buffer":
        stand_in = StandIn(place, tells=False)
        process = stand_in.start()
        if well := stand_in.take(4, process):
            well = not stand_in.lost
            process.terminate()
            process.wait()
        else:
            well = ends_in_a_line(process)
    else:
        well = all([ends(launch(place, script, *more)) for script, more in PREPARING.items()])
    after = {path: path.read_bytes() for path in before if path.is_file()}
    gone = [str(path) for path in before if after.get(path) != before[path]]
    if gone or treasure.read_bytes() != PRECIOUS:
        print(f"  changed or gone: {gone or treasure}")
    return well and not gone and treasure.read_bytes() == PRECIOUS


RUN_NAMES = ["accuracy.csv", "accuracy.png", "training.png", "training_log.csv", "classes.csv",
             "mistakes.png", "events", ".train.lock", ".check_accuracy.lock"]  # fmt: skip
"""Names of the toolkit's own files in a run's folder."""


def strangers_in_a_run(tries: int = 1) -> tuple[int, int]:
    """Files of such names in a run's folder, which train.py and check_accuracy.py are given."""
    tried = lost = 0
    for kind in ("file", "folder", "link") * tries:
        with Place(1, val=1) as place:
            run = utils.load_config(place.config).train.path_for_saving / "run"
            treasure = place.folder / "treasure"
            treasure.write_bytes(PRECIOUS)
            for name in RUN_NAMES:
                strange(run / name, kind, treasure)
            assert ends_well(launch(place, "preprocess_val.py"))
            before = tree(run)
            arguments = ["--run_folder=run", "--epoch_start=0", "--epoch_end=1"]
            training = ["--batch_size=4", "--learning_rate=0.1"]
            preprocessor = launch(place, "runtime_preprocessing.py", *span(1, 4))
            ended = [
                ends_in_a_line(launch(place, "train.py", *arguments, *training)),
                ends_in_a_line(launch(place, "check_accuracy.py", *arguments)),
            ]
            preprocessor.terminate()
            changed = [name for name in before if tree(run).get(name) != before[name]]
            if changed:
                print(f"  {kind}: changed or gone: {changed}")
            lost += ended.count(False) + len(changed) + (treasure.read_bytes() != PRECIOUS)
            tried += 2 * len(RUN_NAMES)
    return tried, lost


def checker_disturbed(tries: int = 8) -> tuple[int, int]:
    """check_accuracy.py: stopped and continued, storage that fails, a wrong clock, few files."""
    from test_accuracy import save_model

    moments, lost, tried, epochs = random.Random(7), 0, 0, 3
    with Place(1, val=6) as place:
        run = utils.load_config(place.config).train.path_for_saving / "run"
        assert ends_well(launch(place, "preprocess_val.py"))
        for epoch in range(epochs):
            save_model(run / str(epoch), epoch)
        arguments = ["--run_folder=run", "--epoch_start=0", f"--epoch_end={epochs}"]
        table, whole = run / "accuracy.csv", None
        disk = BadDisk(results(place) / "val", every=12, clock=10**8)
        environment = disk.environment if bad_storage() else {}
        hows = [{}, {"preexec": limit(resource.RLIMIT_NOFILE, 64)}, {"before": CONTAINER}]
        hows += [environment] * 2 + [{}] * 2
        for turn, how in enumerate(hows):
            process = launch(place, "check_accuracy.py", *arguments, **how)
            while turn > len(hows) - 3 and process.poll() is None and tried < 100:
                pause(process, moments.uniform(0, 2 / tries))
                time.sleep(0.1)
                tried += 1
            lost += not ends_well(process)
            whole = whole or table.read_bytes()
            lost += table.read_bytes() != whole
            table.unlink()
            tried += turn > 0
        tried += disk.faults
        disk = BadDisk(run)
        process = launch(place, "check_accuracy.py", *arguments, **environment | disk.environment)
        with disk.readonly():
            lost += not ends_in_a_line(process)
        lost += not ends_well(launch(place, "check_accuracy.py", *arguments))
        lost += table.read_bytes() != whole
        tried += 1
    return tried, lost


FAULTS = [
    containers, errors_of_storage, full_disk, readonly_disk, stopped_and_continued, dataset_away,
    wrong_clock, few_files_and_little_memory, two_users, buffer_deleted, closed_output,
    strangers_files, checker_disturbed,
    errors_of_storage_training, stopped_training, wrong_clock_training, buffer_deleted_training,
    readonly_models, limited_training, closed_output_training, strangers_in_a_run,
]  # fmt: skip


if __name__ == "__main__":
    print_table(FAULTS, __doc__)
