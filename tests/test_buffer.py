"""The folder between the preprocessor and training: which batches lie there, when, and how whole.

The real command works on it; training is a stand-in that reads the batches in order.
"""

import contextlib
import ctypes
import dataclasses
import errno
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import toolkit
import utils
from toolkit import PATIENCE, batches_of, made, wait_until

import numpy as np
import pytest

import runtime_preprocessing
from preprocess import CROP
from runtime_preprocessing import (
    Batches,
    BatchReader,
    BatchSpec,
    Buffer,
    end_preprocessing,
    keep_full,
    misfit,
    read_progress,
    take_buffer,
    wait_for_buffer,
    worker_of_workers,
    write_batch,
    write_progress,
)

Position = tuple[int, int]
"""Epoch and batch."""

BATCHES = 10
"""In an epoch: 40 pictures in batches of 4."""


def span(epoch_start: int, epoch_end: int, batch_size: int = 4) -> list[str]:
    return [
        f"--epoch_start={epoch_start}",
        f"--epoch_end={epoch_end}",
        f"--batch_size={batch_size}",
    ]


@contextlib.contextmanager
def preprocessor(config: Path, *arguments: str) -> Iterator[subprocess.Popen]:
    """The real command, killed at the end if it still runs. What it says goes to log.txt."""
    log = config.with_name("log.txt")
    process = toolkit.start("runtime_preprocessing.py", config, *arguments, log=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def said(config: Path) -> str:
    return config.with_name("log.txt").read_text()


def finish(process: subprocess.Popen) -> int:
    """The exit status."""
    return process.wait(timeout=PATIENCE)


LOCKS = {".preprocessor.lock", ".trainer.lock"}
"""They stay, empty."""


def is_clean(folder: Path) -> bool:
    return set(os.listdir(folder)) <= LOCKS


def kept_full(buffer: Buffer, threads: int, sleep_time: float = 0.1) -> int:
    """Runs `keep_full` in this process, as the holder of the lock."""
    utils.lock(buffer.folder / ".preprocessor.lock", "held")
    return keep_full(buffer, threads, sleep_time, utils.Stop())


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def there(folder: Path, kind: str = "X", batches: int = BATCHES) -> set[int]:
    """Numbers, counted through all epochs, of the batches with a file of this kind."""
    found = [re.fullmatch(rf"{kind}_(\d+)_(\d+)\.npy", name) for name in os.listdir(folder)]
    return {int(match[1]) * batches + int(match[2]) for match in found if match}


def settled(folder: Path, window: range, batches: int = BATCHES) -> Callable[[], bool]:
    """Condition: exactly the batches of the window lie there, and nothing half-written."""

    def condition() -> bool:
        names = set(os.listdir(folder))
        expected = {
            f"{kind}_{number // batches}_{number % batches}.npy"
            for kind in "XY"
            for number in window
        }
        others = {"buffer.json", "training_progress.txt", *LOCKS}
        return expected <= names <= expected | others

    return condition


def progress(folder: Path, number: int, batches: int = BATCHES) -> None:
    epoch, batch = divmod(number, batches)
    utils.write_text(folder / "training_progress.txt", f"{epoch}\n{batch}\n")


def needed(folder: Path) -> Position | None:
    """The progress that training has written."""
    path = folder / "training_progress.txt"
    return tuple(map(int, path.read_text().split())) if path.exists() else None


def files(folder: Path, position: Position) -> list[Path]:
    epoch, batch = position
    return [folder / f"{kind}_{epoch}_{batch}.npy" for kind in "XY"]


def load(folder: Path, position: Position) -> tuple[np.ndarray, np.ndarray]:
    x, y = (np.load(path, allow_pickle=False) for path in files(folder, position))
    return x, y


def assert_made_by(batches: Batches, position: Position, batch: tuple[np.ndarray, np.ndarray]):
    expected = made(batches, batches.spec.step(*position))
    for array, right in zip(batch, expected, strict=True):
        assert array.dtype == right.dtype
        np.testing.assert_array_equal(array, right, err_msg=str(position))


def train(
    folder: Path,
    batches: Batches,
    numbers: range,
    process: subprocess.Popen,
    look: Callable[[int], None] = lambda number: None,
) -> None:
    """Reads the batches in order, checks each, calls `look`, and says that it needs the next."""
    progress(folder, numbers.start, batches.spec.batches_per_epoch)
    for number in numbers:
        position = divmod(number, batches.spec.batches_per_epoch)
        wait_until(files(folder, position)[0].exists, process, position)
        assert_made_by(batches, position, load(folder, position))
        look(number)
        progress(folder, number + 1, batches.spec.batches_per_epoch)


# --- the window -------------------------------------------------------------------------------


def test_window_across_epochs_and_a_clean_end(tmp_path, toy, ram):
    """Never a batch that lies buffer_size or more ahead, and in the end nothing at all."""
    config = toolkit.write_config(tmp_path, toy, ram, train__buffer_size=6)
    with preprocessor(config, *span(0, 3)) as process:
        wait_until(settled(ram, range(6)), process, "buffer full")

        def look(number):
            assert max(there(ram) | there(ram, "Y")) < min(number + 6, 30)

        train(ram, batches_of(config), range(30), process, look)
        assert finish(process) == 0
    assert is_clean(ram)


def test_window_is_exact_where_epochs_meet(tmp_path, toy, ram):
    config = toolkit.write_config(tmp_path, toy, ram, train__buffer_size=6)
    with preprocessor(config, *span(0, 3)) as process:
        for first in (0, 7, 9, 11, 18, 24):
            progress(ram, first)
            wait_until(settled(ram, range(first, first + 6)), process, first)


def test_nothing_is_made_while_80_percent_lie_ahead(tmp_path, toy, ram):
    config = toolkit.write_config(
        tmp_path, toy, ram, train__buffer_size=10, runtime_preprocessing__sleep_time=0.02
    )
    with preprocessor(config, *span(0, 3)) as process:
        wait_until(settled(ram, range(10)), process, "buffer full")
        wait_until(lambda: "10 batches ready" in said(config), process, "and knows it")
        for first in (1, 2):
            progress(ram, first)
            time.sleep(0.5)
            assert there(ram) == there(ram, "Y") == set(range(10))
        progress(ram, 3)
        wait_until(settled(ram, range(3, 13)), process, "buffer full again")


def test_the_closing_line_counts_broken_pictures(tmp_path, toy, ram):
    dataset = shutil.copytree(toy, tmp_path / "data")
    (dataset / "train/stars/stars_3.JPEG").write_bytes(b"this is no picture")
    config = toolkit.write_config(tmp_path, dataset, ram)
    with preprocessor(config, *span(0, 1)) as process:
        wait_until(lambda: "10 batches ready" in said(config), process, "buffer full")
        progress(ram, 10)
        assert finish(process) == 0
    assert "1 could not be decoded" in said(config).splitlines()[-1]


def test_starts_where_epoch_start_says(tmp_path, toy, ram):
    config = toolkit.write_config(tmp_path, toy, ram, train__buffer_size=3)
    with preprocessor(config, *span(7, 9)) as process:
        wait_until(settled(ram, range(70, 73)), process, "first window")
        assert_made_by(batches_of(config), (7, 1), load(ram, (7, 1)))


@pytest.mark.parametrize("size, end", [(1, 1), (1000, 2)])
def test_buffers_of_one_batch_and_larger_than_all(tmp_path, toy, ram, size, end):
    config = toolkit.write_config(tmp_path, toy, ram, train__buffer_size=size)
    batches = batches_of(config)
    with preprocessor(config, *span(0, end)) as process:
        wait_until(settled(ram, range(min(size, 10 * end))), process, "buffer full")
        train(ram, batches, range(10 * end), process)
        assert finish(process) == 0
    assert is_clean(ram)


def test_one_batch_an_epoch(tmp_path, toy, ram):
    config = toolkit.write_config(tmp_path, toy, ram, train__buffer_size=3)
    batches = batches_of(config, batch_size=40)
    assert batches.spec.batches_per_epoch == 1
    with preprocessor(config, *span(0, 4, 40)) as process:
        wait_until(settled(ram, range(3), batches=1), process, "buffer full")
        train(ram, batches, range(4), process)
        assert finish(process) == 0
    assert is_clean(ram)


def test_epoch_end_raised_and_started_again(tmp_path, toy, ram):
    """After an end, and after a kill: then the batches that lie there are kept."""
    config = toolkit.write_config(tmp_path, toy, ram, train__buffer_size=4)
    batches = batches_of(config)
    with preprocessor(config, *span(0, 1)) as process:
        train(ram, batches, range(10), process)
        assert finish(process) == 0
    with preprocessor(config, *span(1, 2)) as process:
        train(ram, batches, range(10, 18), process)
        wait_until(lambda: {18, 19} <= there(ram), process, "the last two")
    before = {path.name: path.stat().st_ino for path in ram.glob("[XY]_1_[89].npy")}
    assert len(before) == 4
    with preprocessor(config, *span(1, 3)) as process:
        wait_until(settled(ram, range(18, 22)), process, "buffer full")
        assert {name: (ram / name).stat().st_ino for name in before} == before
        assert "2 batches ready from an earlier run" in said(config)
        train(ram, batches, range(18, 30), process)
        assert finish(process) == 0
    assert is_clean(ram)


def test_progress_of_an_older_run_does_not_end_it(tmp_path, toy, ram):
    """An older run left a position behind this run's last epoch, or before its first, or after
    more batches than this run's epochs have.
    """
    config = toolkit.write_config(tmp_path, toy, ram, train__buffer_size=3)
    for stale in (20, 999, 4, 5):
        for path in ram.iterdir():
            path.unlink()
        progress(ram, stale)
        if stale == 5:
            utils.write_text(ram / "training_progress.txt", "1\n30\n")
        with preprocessor(config, *span(1, 2)) as process:
            wait_until(settled(ram, range(10, 13)), process, "first window")
    with preprocessor(config, *span(1, 2)) as process:
        train(ram, batches_of(config), range(10, 20), process)
        assert finish(process) == 0
    assert is_clean(ram)


MEANWHILE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv.pop(1))
import shutil, utils, runtime_preprocessing
find, file = runtime_preprocessing.training_pictures, Path(sys.argv.pop(1))
def find_while_something_happens(config):
    if file.name == "training_progress.txt":
        utils.write_text(file, "2\\n0\\n")
    else:
        shutil.rmtree(file)
    return find(config)
runtime_preprocessing.training_pictures = find_while_something_happens
utils.run(runtime_preprocessing.main)
"""


def started_while_something_happens(config: Path, file: Path) -> subprocess.CompletedProcess:
    """Runs the preprocessor. While it looks for pictures, training ends or the folder goes."""
    words = [toolkit.ROOT, file, f"--config={config}", *span(0, 2)]
    command = [sys.executable, "-c", MEANWHILE, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


def test_a_folder_that_is_removed_while_it_starts_is_made_again(tmp_path, toy, ram):
    """By a logout, in the minutes that finding ImageNet's pictures takes on a cold disk."""
    config = toolkit.write_config(tmp_path, toy, ram / "batches", train__buffer_size=20)

    def train_when_ready() -> None:
        while not (ram / "batches" / "X_1_0.npy").exists():
            time.sleep(0.05)
        progress(ram / "batches", 20)

    threading.Thread(target=train_when_ready, daemon=True).start()
    result = started_while_something_happens(config, ram / "batches")
    assert result.returncode == 0, result.stderr
    assert is_clean(ram / "batches")


def test_an_end_written_while_it_started_is_believed(config, ram):
    """Else it would wait for ever for a training that has ended."""
    progress(ram, 19)
    result = started_while_something_happens(config, ram / "training_progress.txt")
    assert result.returncode == 0, result.stderr
    assert "training has passed epoch 1" in result.stdout
    assert is_clean(ram)


NEVER = 3600
"""A sleep_time far beyond PATIENCE: what has to happen must not wait for it."""


def test_sleep_time_never_keeps_training_waiting(tmp_path, toy, ram):
    """Through five buffers in a row, each of them full when training comes to it."""
    config = toolkit.write_config(
        tmp_path, toy, ram, train__buffer_size=5, runtime_preprocessing__sleep_time=NEVER
    )
    with preprocessor(config, *span(0, 3)) as process:
        for first in range(0, 25, 5):
            progress(ram, first)
            wait_until(settled(ram, range(first, first + 5)), process, first)
        progress(ram, 30)
        assert finish(process) == 0
    assert said(config).count("ready ahead of training") == 1  # a line each sleep_time


def test_a_buffer_that_never_gets_full_says_what_it_makes(config, ram, monkeypatch, capsys):
    """As when training is the faster side. The progress is looked at every moment."""
    monkeypatch.setattr(runtime_preprocessing, "SAY_FILLING", 0.2)
    buffer = Taken(ram, batches_of(config, epochs=[0, 2]), 20)
    utils.lock(ram / ".preprocessor.lock", "held")
    pauses, wait = [], runtime_preprocessing.wait

    def noted(jobs, pause, *more):
        pauses.append(pause)
        time.sleep(0.25)
        return wait(jobs, pause, *more)

    monkeypatch.setattr(runtime_preprocessing, "wait", noted)
    capsys.readouterr()
    keep_full(buffer, 1, 0.1, utils.Stop())
    assert max(pauses) < 0.05
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 3
    assert all(re.search(r"batch(es)? ready ahead of training, [1-9]", line) for line in lines)


def test_a_batch_that_training_removed_is_made_again_at_once(tmp_path, toy, ram):
    """Also one that lies further ahead, and one whose labels alone are lost."""
    config = toolkit.write_config(
        tmp_path, toy, ram, train__buffer_size=10, runtime_preprocessing__sleep_time=NEVER
    )
    with preprocessor(config, *span(0, 3)) as process:
        wait_until(settled(ram, range(10)), process, "buffer full")
        for name in ("X_0_0.npy", "X_0_5.npy", "Y_0_3.npy"):
            (ram / name).unlink()
            wait_until(settled(ram, range(10)), process, name)


class Taken(Buffer):
    """A buffer that counts how often its folder is listed, and whose training is fast."""

    looked = first = 0

    def look(self) -> dict[str, int]:
        self.looked += 1
        return super().look()

    def wanted_first(self) -> int:
        self.first += self.spec.files(self.folder, self.first)[0].exists()
        return self.first


def test_the_folder_is_not_listed_for_every_batch(config, ram, monkeypatch):
    monkeypatch.setattr(runtime_preprocessing, "LOOK_AGAIN", NEVER)
    buffer = Taken(ram, batches_of(config, epochs=[0, 3]), 6)
    assert kept_full(buffer, 2, NEVER) >= 28  # the last may come after training has passed
    assert buffer.looked == 1
    buffer.leave()
    assert is_clean(ram)


# --- processes --------------------------------------------------------------------------------


def gone(pids: list[int]) -> bool:
    """Whether none of the processes runs, whoever has to collect them."""
    states = [Path(f"/proc/{pid}/stat") for pid in pids]
    return all(not s.exists() or s.read_text().rpartition(")")[2].split()[0] == "Z" for s in states)


@contextlib.contextmanager
def at_work(config: Path) -> Iterator[tuple[subprocess.Popen, list[int]]]:
    """A preprocessor with a batch half done, and the processes that it started."""
    with preprocessor(config, *span(0, 30)) as process:
        wait_until(lambda: there(utils.load_config(config).train.buffer_folder), process, "begins")
        pids = children(process.pid)
        assert len(pids) == 2
        yield process, pids


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_preprocessor_leaves_no_process(tmp_path, toy, ram, number):
    config = toolkit.write_config(tmp_path, toy, ram, train__buffer_size=300)
    with at_work(config) as (process, pids):
        process.send_signal(number)
        process.wait(timeout=PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while not gone(pids):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    names = os.listdir(ram)
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        assert not any(".aside-" in name for name in names), names
        assert f"rm {ram}/" in said(config) and "MB of batches stay in" in said(config)
        assert "Traceback" not in said(config)
    with preprocessor(config, *span(0, 30)) as process:  # the lock is free at once
        wait_until(lambda: len(there(ram)) > len(names) // 2, process, "goes on")


def test_a_process_that_is_killed_ends_it_in_one_line(tmp_path, toy, ram):
    config = toolkit.write_config(tmp_path, toy, ram, train__buffer_size=300)
    with at_work(config) as (process, pids):
        os.kill(pids[0], signal.SIGKILL)
        assert finish(process) == 1  # may be started again
    assert said(config).count("error: a process that made batches was killed") == 1
    assert "Traceback" not in said(config)
    assert gone(pids)


def test_an_error_in_a_process_is_raised_with_its_traceback(config, ram, monkeypatch):
    def broken(batches, step, failed):
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(Batches, "parts", broken)
    with pytest.raises(ZeroDivisionError, match="planted") as error:
        kept_full(Buffer(ram, batches_of(config, epochs=[0, 1]), 3), 2)
    assert "in broken" in str(error.value.__cause__)
    assert multiprocessing.active_children() == []
    assert not there(ram) and not leftovers(ram)


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if ".aside-" in name]


def hung(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_a_worker_that_hangs_is_said_and_does_not_hold_up_the_end(config, ram):
    """Stopped, as by a dead network disk. A signal ends the script and all of them."""
    stuck = "import sys; sys.path.insert(0, sys.argv.pop(1)); import runtime_preprocessing as r; "
    stuck += "r.STUCK = 0.5; r.utils.run(r.main)"
    words = [sys.executable, "-c", stuck, str(toolkit.ROOT), f"--config={config}", *span(0, 99)]
    log = config.with_name("log.txt")
    with open(log, "w") as file, subprocess.Popen(words, stdout=file, stderr=file) as process:
        try:
            wait_until(lambda: len(children(process.pid)) == 2, process, "workers")
            pids = children(process.pid)
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            wait_until(lambda: all(map(hung, pids)), process, "stopped")
            wait_until(lambda: "no batch was made for" in said(config), process, "said")
            process.send_signal(signal.SIGTERM)
            assert finish(process) == 128 + signal.SIGTERM
            assert gone(pids)
        finally:
            process.kill()
    assert not leftovers(ram) and "Traceback" not in said(config)


def test_threads_do_the_same_where_processes_cannot_be_forked(config, ram, monkeypatch):
    monkeypatch.setattr(runtime_preprocessing, "FORK", False)
    batches = batches_of(config, epochs=[0, 1])
    buffer = Buffer(ram, batches, 10)
    buffer.wanted_first = lambda: 10 if len(there(ram)) == 10 else 0
    before = threading.active_count()
    # All ten may be there before this thread has heard of each.
    assert 0 < kept_full(buffer, 3) <= 10
    assert threading.active_count() == before
    for number in range(10):
        assert_made_by(batches, (0, number), load(ram, (0, number)))


# --- healing ----------------------------------------------------------------------------------


def test_heals_whatever_happens_to_the_progress_file(tmp_path, toy, ram):
    config = toolkit.write_config(
        tmp_path, toy, ram, train__buffer_size=4, runtime_preprocessing__sleep_time=0.02
    )
    file, start = ram / "training_progress.txt", range(10, 14)
    with preprocessor(config, *span(1, 4)) as process:
        progress(ram, 15)
        wait_until(settled(ram, range(15, 19)), process, "training has begun")
        for garbage in (b"", b"garbage\n", b"\xff\xfe\x00", b"1\n", b"1\n-3\n", b"9" * 5000):
            file.write_bytes(garbage)
            wait_until(settled(ram, start), process, garbage[:9])
            progress(ram, 20)
            wait_until(settled(ram, range(20, 24)), process, "progress is right again")
        file.unlink()
        wait_until(settled(ram, start), process, "no progress file")
        for number in (36, 12, 30, 27, 36):  # jumps ahead and back
            progress(ram, number)
            wait_until(settled(ram, range(number, number + 4)), process, number)
        file.write_bytes(b"1 \r\n 7")  # as an editor may leave it
        wait_until(settled(ram, range(17, 21)), process, "white space")
        assert_made_by(batches_of(config), (2, 0), load(ram, (2, 0)))
        progress(ram, 40)
        assert finish(process) == 0
    assert is_clean(ram)


def test_heals_whatever_happens_to_the_batches(tmp_path, toy, ram):
    config = toolkit.write_config(
        tmp_path, toy, ram, train__buffer_size=5, runtime_preprocessing__sleep_time=0.02
    )
    batches = batches_of(config)
    damages = {
        "deleted": os.unlink,
        "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
        "emptied": lambda path: os.truncate(path, 0),
    }
    with preprocessor(config, *span(0, 2)) as process:
        wait_until(settled(ram, range(5)), process, "buffer full")
        for kind in "XY":
            for name, damage in damages.items():
                path = ram / f"{kind}_0_2.npy"
                size = path.stat().st_size
                damage(path)
                wait_until(
                    lambda path=path, size=size: path.exists() and path.stat().st_size == size,
                    process,
                    f"{path.name} {name}, made again",
                )
                wait_until(settled(ram, range(5)), process, "nothing else")
                assert_made_by(batches, (0, 2), load(ram, (0, 2)))
        for path in ram.iterdir():
            path.unlink()
        wait_until(lambda: there(ram) == set(range(5)), process, "all deleted, all made again")
        train(ram, batches, range(20), process)
        assert finish(process) == 0
    assert is_clean(ram)


def test_a_clock_set_back_changes_nothing(tmp_path, toy, ram):
    """All that lies in the buffer seems to come from tomorrow, as the clock then says."""
    config = toolkit.write_config(
        tmp_path, toy, ram, train__buffer_size=5, runtime_preprocessing__sleep_time=0.02
    )
    tomorrow = time.time() + 86400
    with preprocessor(config, *span(0, 2)) as process:
        wait_until(settled(ram, range(5)), process, "buffer full")
        made = {path: path.stat().st_ino for path in ram.glob("[XY]_*")}
        for path in ram.iterdir():
            os.utime(path, (tomorrow, tomorrow))
    with preprocessor(config, *span(0, 2)) as process:  # started again
        wait_until(lambda: said(config).count("buffer: 5 batches") == 2, process, "again")
        wait_until(settled(ram, range(5)), process, "still full")
        assert {path: path.stat().st_ino for path in ram.glob("[XY]_*")} == made
        train(ram, batches_of(config), range(20), process)
        assert finish(process) == 0


REMOVALS = {
    "buffer.json": lambda folder: (folder / "buffer.json").unlink(),
    "the files": lambda folder: [
        path.unlink(missing_ok=True) for path in folder.iterdir() if path.name[0] != "."
    ],
    "everything in it": lambda folder: [path.unlink(missing_ok=True) for path in folder.iterdir()],
    "the folder": lambda folder: shutil.rmtree(folder.rename(folder.with_name("removed"))),
}
"""What a user's rm does, or a logout of systemd."""


def made_again(folder: Path, window: range, spec: BatchSpec) -> Callable[[], bool]:
    def condition() -> bool:
        lock = folder / ".preprocessor.lock"
        there_again = folder.is_dir() and settled(folder, window)() and lock.exists()
        return there_again and BatchSpec.read(folder) == spec and utils.is_locked(lock)

    return condition


@pytest.mark.parametrize("what", REMOVALS)
def test_what_is_removed_is_made_again(tmp_path, toy, ram, what):
    """The folder, the lock, buffer.json and the batches; the folder for its user alone."""
    folder = ram / "batches"
    config = toolkit.write_config(tmp_path, toy, folder, train__buffer_size=3)
    batches = batches_of(config, epochs=[0, 2])
    with preprocessor(config, *span(0, 2)) as process:
        wait_until(lambda: folder.is_dir() and settled(folder, range(3))(), process, "full")
        for _ in range(2):
            REMOVALS[what](folder)
            wait_until(made_again(folder, range(3), batches.spec), process, "made again")
        assert folder.stat().st_mode & 0o777 == 0o700
        result = toolkit.run("runtime_preprocessing.py", config, *span(0, 2), timeout=PATIENCE)
        toolkit.assert_one_line_error(result, "runtime_preprocessing.py", "another")
        with reading(Buffer(folder, batches, 3)) as reader:
            assert_made_by(batches, (0, 0), next_batch(reader))
            REMOVALS[what](folder)
            for number in range(1, 20):
                assert_made_by(batches, divmod(number, 10), next_batch(reader))
            assert utils.is_locked(folder / ".trainer.lock")
        end_preprocessing(folder, batches.spec, 2)
        assert finish(process) == 0
    assert is_clean(folder) and "Traceback" not in said(config)


def sleep_while_emptied(process: subprocess.Popen, folder: Path) -> None:
    """The process sleeps, as with its machine. Somebody removes all that is in its folder."""
    process.send_signal(signal.SIGSTOP)
    for path in folder.iterdir():
        path.unlink()


def test_a_preprocessor_whose_place_was_taken_stops(tmp_path, toy, ram):
    """Everything is removed, and another one starts. Not one batch of the first is trained on."""
    (tmp_path / "other").mkdir()
    config = toolkit.write_config(
        tmp_path, toy, ram, train__buffer_size=8, runtime_preprocessing__sleep_time=0.02
    )
    other = toolkit.write_config(tmp_path / "other", toy, ram, train__buffer_size=8, train__seed=7)
    batches = batches_of(other, epochs=[0, 2])
    with preprocessor(config, *span(0, 2)) as first:
        wait_until(settled(ram, range(8)), first, "buffer full")
        sleep_while_emptied(first, ram)
        with preprocessor(other, *span(0, 2)) as second:
            wait_until(lambda: there(ram), second, "begins")
            first.send_signal(signal.SIGCONT)
            assert finish(first) == 2
            train(ram, batches, range(20), second)
            assert finish(second) == 0
    assert "another runtime_preprocessing.py uses this folder" in said(config)
    assert is_clean(ram)


def test_a_batch_is_not_named_once_the_buffer_is_another(config, ram):
    """A worker may finish a batch after another preprocessor has taken the folder."""
    buffer = stock(config, ram, 1)
    (ram / "buffer.json").unlink()
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            write_batch(buffer, 1)
        other = dataclasses.replace(buffer.spec, seed=7)
        utils.write_record(ram / "buffer.json", other)
    assert there(ram) == there(ram, "Y") == {0} and not leftovers(ram)


def test_a_folder_that_is_moved_away_and_back_is_gone_on_with(tmp_path, toy, ram):
    """Its lock files are not those that the scripts have made meanwhile, but nobody holds them."""
    folder, away = ram / "batches", ram / "away"
    config = toolkit.write_config(tmp_path, toy, folder, train__buffer_size=3)
    batches = batches_of(config, epochs=[0, 2])
    with preprocessor(config, *span(0, 2)) as process:
        wait_until(made_again(folder, range(3), batches.spec), process, "full")
        with reading(Buffer(folder, batches, 3)) as reader:
            assert_made_by(batches, (0, 0), next_batch(reader))
            folder.rename(away)
            for number in range(1, 4):
                assert_made_by(batches, (0, number), next_batch(reader))
            assert all(utils.is_locked(folder / name) for name in LOCKS)
            exchange(folder, away)
            for number in range(4, 20):
                assert_made_by(batches, divmod(number, 10), next_batch(reader))
        end_preprocessing(folder, batches.spec, 2)
        assert finish(process) == 0
    assert is_clean(folder)


def exchange(one: Path, other: Path) -> None:
    """Gives two folders each other's name at once."""
    exchanging = 2  # RENAME_EXCHANGE
    names = -100, bytes(one), -100, bytes(other)
    assert ctypes.CDLL(None).renameat2(*names, exchanging) == 0


def test_batches_that_another_has_left_meanwhile_are_removed(tmp_path, toy, ram):
    """The first sleeps as with its machine, while another one takes its place, and ends."""
    (tmp_path / "other").mkdir()
    config = toolkit.write_config(tmp_path, toy, ram, train__buffer_size=4)
    other = toolkit.write_config(tmp_path / "other", toy, ram, train__buffer_size=8, train__seed=7)
    with preprocessor(config, *span(0, 2)) as first:
        wait_until(settled(ram, range(4)), first, "buffer full")
        sleep_while_emptied(first, ram)
        with preprocessor(other, *span(0, 2)) as second:
            wait_until(settled(ram, range(8)), second, "buffer full")
        first.send_signal(signal.SIGCONT)
        wait_until(made_again(ram, range(4), batches_of(config).spec), first, "made again")
        train(ram, batches_of(config), range(20), first)
        assert finish(first) == 0
    assert "made with other seed" in said(config) and is_clean(ram)


@pytest.mark.parametrize(
    "change, named", [({"train__seed": 5}, "seed"), ({"utils__mu_0": 0.3}, "mu")]
)
def test_batches_of_another_making_are_removed(tmp_path, toy, ram, change, named):
    config = toolkit.write_config(tmp_path, toy, ram, train__buffer_size=4)
    with preprocessor(config, *span(0, 1)) as process:
        wait_until(settled(ram, range(4)), process, "buffer full")
    assert "removing" not in said(config)
    config = toolkit.write_config(tmp_path, toy, ram, train__buffer_size=4, **change)
    batches = batches_of(config)
    with preprocessor(config, *span(0, 1)) as process:
        wait_until(lambda: BatchSpec.read(ram) == batches.spec, process, "")
        train(ram, batches, range(10), process)
        assert finish(process) == 0
    (line,) = [line for line in said(config).splitlines() if "removing" in line]
    assert line.endswith(f"removing 8 files, made with other {named}")
    assert is_clean(ram)


OTHERS = {
    "batch_size": 5, "N": 41, "classes": 5, "class_names": [*"abcd"], "mu": [0.1] * 3,
    "sigma": [0.1] * 3, "resized": [256], "worker": 1, "workers": 2, "batches_per_epoch": 9,
    "epochs": [3, 4], "crop": "area", "seed": 9, "dataset": "other", "pictures": "other",
    "layout": "other",
}  # fmt: skip


def test_every_field_but_the_epochs_makes_another_buffer(config):
    spec = batches_of(config, workers=2).spec
    same = {"dtype", "format"}  # other values are refused
    assert {each.name for each in dataclasses.fields(spec)} - same == set(OTHERS)
    for name, value in OTHERS.items():
        changes = {name: value}
        if name == "classes":
            changes["class_names"] = [*"abcde"]
        elif name == "workers":
            changes["workers"] = 1
        other = dataclasses.replace(spec, **changes)
        assert (other == spec) == (name == "epochs"), name


def test_what_a_killed_preprocessor_left_is_removed_at_the_next_start(config, ram):
    aside = [
        ram / f".{name}.aside-{'0' * 16}" for name in ("X_0_0.npy", "Y_3_1.npy", "buffer.json")
    ]
    others = [ram / f".{name}.aside-{'0' * 16}" for name in ("training_progress.txt", "thesis.txt")]
    for path in (*aside, *others):
        path.write_bytes(b"half")
    Buffer(ram, batches_of(config, epochs=[0, 2]), 3).claim()
    assert not any(path.exists() for path in aside)
    assert all(path.exists() for path in others)  # another lock covers these names, or none
    take_buffer(utils.load_config(config))
    assert [path.exists() for path in others] == [False, True]


def test_a_start_that_was_killed_while_it_looked_for_pictures_loses_nothing(config, ram):
    """Meanwhile buffer.json has another name, so that no training takes it for the new one."""
    made = stock(config, ram, 3).spec
    args = Namespace(epoch_start=0, epoch_end=2)
    for _ in range(2):  # killed the first time
        runtime_preprocessing.set_aside_older_run(ram, args)
        assert BatchSpec.read(ram) is None
    Buffer(ram, batches_of(config, epochs=[0, 2]), 3).claim()
    assert BatchSpec.read(ram) == made and there(ram) == {0, 1, 2}


def test_batches_without_buffer_json_are_refused(tmp_path, toy, ram):
    """Nobody knows how they were made, or whose they are. A buffer_folder set by mistake loses
    nothing.
    """
    config = toolkit.write_config(tmp_path, toy, ram, train__buffer_size=2)
    (ram / "X_0_0.npy").write_bytes(b"a thesis")
    result = toolkit.run("runtime_preprocessing.py", config, *span(0, 1))
    toolkit.assert_one_line_error(
        result, "runtime_preprocessing.py", "X_0_0.npy", "buffer.json", f"rm {ram}/[XY]_[0-9]*.npy"
    )
    assert (ram / "X_0_0.npy").read_bytes() == b"a thesis"


FOREIGN = [
    "notes.txt", "X_foo.npy", "X_1_1.npy.bak", "x_0_0.npy", "X_0_0.npz", "Z_0_0.npy", "X_0.npy",
    "X_-1_0.npy", "X_0_0_0.npy", ".hidden", "progress.txt", "training_progress.txt.bak",
]  # fmt: skip


def test_foreign_files_are_never_touched(tmp_path, toy, ram):
    config = toolkit.write_config(tmp_path, toy, ram, train__buffer_size=3)
    for name in FOREIGN:
        (ram / name).write_text(name)
    (ram / "folder").mkdir()
    (ram / "folder" / "X_0_0.npy").write_text("inside")
    before = {name: (ram / name).stat() for name in FOREIGN}
    with preprocessor(config, *span(0, 1)) as process:
        train(ram, batches_of(config), range(10), process)
        assert finish(process) == 0
    assert set(os.listdir(ram)) - LOCKS == {*FOREIGN, "folder"}
    for name in FOREIGN:
        after = (ram / name).stat()
        assert (after.st_ino, after.st_mtime_ns) == (before[name].st_ino, before[name].st_mtime_ns)
        assert (ram / name).read_text() == name
    assert (ram / "folder" / "X_0_0.npy").read_text() == "inside"


# --- whole files only -------------------------------------------------------------------------


def test_files_appear_whole_and_labels_first(tmp_path, toy, ram):
    """Looked at all the time while the buffer fills: what has its name can be trained on."""
    config = toolkit.write_config(
        tmp_path, toy, ram, train__buffer_size=40, runtime_preprocessing__num_of_threads=4
    )
    looks, whole = 0, set()
    with preprocessor(config, *span(0, 8, 8)) as process:
        deadline = time.monotonic() + PATIENCE
        while len(whole) < 40:
            assert process.poll() is None and time.monotonic() < deadline
            for number in there(ram, batches=5) - whole:
                x, y = load(ram, divmod(number, 5))
                assert (x.dtype, x.shape) == (np.float16, (8, CROP, CROP, 3))
                assert (y.dtype, y.shape) == (np.int32, (8,))
                whole.add(number)
            looks += 1
    assert looks > 40


def test_makes_the_nearest_first(tmp_path, toy, ram):
    config = toolkit.write_config(tmp_path, toy, ram, train__buffer_size=30)
    with preprocessor(config, *span(0, 3)) as process:
        while len(made := there(ram)) < 30:
            assert process.poll() is None
            assert not made or max(made) < len(made) + 2  # two threads
            time.sleep(0.002)
    times = [(ram / f"X_{n // 10}_{n % 10}.npy").stat().st_mtime_ns for n in range(30)]
    assert times[0] < times[10] < times[20]


def test_killed_at_any_moment(tmp_path, toy, ram):
    """Ten SIGKILLs while training goes on: every batch is what an undisturbed run makes.

    Five come while it starts or soon after, five after it has made the batch that was missing.
    """
    config = toolkit.write_config(
        tmp_path, toy, ram, train__buffer_size=6, runtime_preprocessing__sleep_time=0.02
    )
    batches, moments, number = batches_of(config, batch_size=8), random.Random(3), 0
    for life in range(10):
        with preprocessor(config, *span(0, 40, 8)) as process:
            if life % 2:
                train(ram, batches, range(number, number + 1), process)
                number += 1
            killed_at = time.monotonic() + moments.uniform(0, 0.4 if life % 2 else 0.8)
            while time.monotonic() < killed_at and number < 150:
                if number in there(ram, batches=5):
                    train(ram, batches, range(number, number + 1), process)
                    number += 1
                time.sleep(0.005)
    with preprocessor(config, *span(0, 40, 8)) as process:
        train(ram, batches, range(number, number + 3), process)
        train(ram, batches, range(196, 200), process)
        assert finish(process) == 0
    assert is_clean(ram)


# --- refusals ---------------------------------------------------------------------------------


def test_second_preprocessor_is_refused(tmp_path, toy, ram):
    config = toolkit.write_config(tmp_path, toy, ram, train__buffer_size=3)
    with preprocessor(config, *span(0, 2)) as process:
        wait_until(settled(ram, range(3)), process, "buffer full")
        before = {path.name: path.stat().st_mtime_ns for path in ram.iterdir()}
        result = toolkit.run("runtime_preprocessing.py", config, *span(0, 2, 5), timeout=PATIENCE)
        toolkit.assert_one_line_error(result, "runtime_preprocessing.py", str(ram), "another")
        assert {path.name: path.stat().st_mtime_ns for path in ram.iterdir()} == before
        assert process.poll() is None
    with preprocessor(config, *span(0, 2)) as process:  # the lock died with its process
        train(ram, batches_of(config), range(4), process)


def test_a_folder_that_others_may_write_to_is_refused(tmp_path, toy, ram):
    config = toolkit.write_config(tmp_path, toy, ram)
    ram.chmod(0o777)
    result = toolkit.run("runtime_preprocessing.py", config, *span(0, 1))
    toolkit.assert_one_line_error(result, "runtime_preprocessing.py", str(ram), "chmod o-w")
    with pytest.raises(utils.UserError, match="chmod o-w"):
        take_buffer(utils.load_config(config))
    assert os.listdir(ram) == []


def test_links_are_not_followed(tmp_path, toy, ram):
    """Planted under names that the toolkit uses, they would let it overwrite any file."""
    config = toolkit.write_config(tmp_path, toy, ram, train__buffer_size=2)
    theirs = tmp_path / "keys"
    theirs.write_text("secret")
    (ram / ".preprocessor.lock").symlink_to(theirs)
    result = toolkit.run("runtime_preprocessing.py", config, *span(0, 1))
    toolkit.assert_one_line_error(result, "runtime_preprocessing.py", "is a link")
    (ram / ".preprocessor.lock").unlink()
    for name in ("X_0_0.npy", "Y_0_1.npy", "training_progress.txt"):
        (ram / name).symlink_to(theirs)
    (ram / "buffer.json").write_text(json.dumps(dataclasses.asdict(batches_of(config).spec)))
    with preprocessor(config, *span(0, 1)) as process:
        batches = [path for number in range(2) for path in files(ram, (0, number))]
        wait_until(
            lambda: all(path.exists() and not path.is_symlink() for path in batches),
            process,
            "made in place of the links",
        )
        train(ram, batches_of(config), range(10), process)
        assert finish(process) == 0
    assert theirs.read_text() == "secret" and is_clean(ram)


def test_a_pipe_with_the_name_of_a_batch_holds_nobody_up(config, ram):
    """Neither the preprocessor nor the reader."""
    buffer = stock(config, ram, 3)
    with preprocessor(config, *span(0, 2)) as process:
        wait_until(settled(ram, range(20)), process, "buffer full")
    for name in ("X_0_0.npy", "Y_0_1.npy", "training_progress.txt"):
        (ram / name).unlink(missing_ok=True)
        os.mkfifo(ram / name)
    with preprocessor(config, *span(0, 2)) as process:
        with reading(buffer) as reader:
            for number in range(20):
                assert_made_by(buffer.batches, divmod(number, 10), next_batch(reader))
        end_preprocessing(ram, BatchSpec.read(ram), 2)
        assert finish(process) == 0
    assert is_clean(ram)


def test_batch_larger_than_the_dataset(config):
    result = toolkit.run("runtime_preprocessing.py", config, *span(0, 1, 41))
    toolkit.assert_one_line_error(
        result, "runtime_preprocessing.py", "--batch_size=41", "40 training pictures"
    )


def test_batch_larger_than_a_workers_share(config):
    cluster = {"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 1}}
    result = toolkit.run(
        "runtime_preprocessing.py", config, *span(0, 1, 21), TF_CONFIG=json.dumps(cluster)
    )
    toolkit.assert_one_line_error(result, "runtime_preprocessing.py", "--batch_size=21", "40")


@pytest.fixture
def small_disk(tmp_path):
    """Makes a RAM disk of so many kilobytes. Skips where mounting is not permitted."""
    folders = []

    def mount(kilobytes: int) -> Path:
        folder = tmp_path / f"disk{len(folders)}"
        folder.mkdir()
        call = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k,mode=700", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(call, capture_output=True).returncode:
            pytest.skip("mounting a file system is not permitted here")
        folders.append(folder)
        return folder

    yield mount
    for path in [path for path in utils._locks if path.parent in folders]:
        os.close(utils._locks.pop(path))
    for folder in folders:
        subprocess.run(["umount", str(folder)], check=True)


def test_window_too_large_for_the_disk_is_refused_with_one_that_fits(tmp_path, toy, small_disk):
    """4 batches and a little: files take whole pages, and the small files need room too."""
    recipe_bytes = 128 + 4 * CROP * CROP * 3 * 2
    disk = small_disk((4 * recipe_bytes + 9000) // 1024)
    config = toolkit.write_config(tmp_path, toy, disk, train__buffer_size=500)
    result = toolkit.run("runtime_preprocessing.py", config, *span(0, 100))
    toolkit.assert_one_line_error(
        result, "runtime_preprocessing.py", "buffer_size", "500 batches", "MB", str(disk)
    )
    size = int(re.search(r"largest buffer_size that fits is (\d+)", result.stderr)[1])
    assert size in (3, 4)
    config = toolkit.write_config(tmp_path, toy, disk, train__buffer_size=size)
    with preprocessor(config, *span(0, 2)) as process:
        wait_until(settled(disk, range(size)), process, "buffer full")
        train(disk, batches_of(config), range(20), process)
        assert finish(process) == 0
    assert "no room" not in said(config)
    assert is_clean(disk)


def test_disk_too_small_for_one_batch(tmp_path, toy, small_disk):
    config = toolkit.write_config(tmp_path, toy, small_disk(600), train__buffer_size=3)
    result = toolkit.run("runtime_preprocessing.py", config, *span(0, 1))
    toolkit.assert_one_line_error(result, "runtime_preprocessing.py", "buffer", "room", " kB")
    assert "use another folder or a smaller --batch_size" in result.stderr


def test_batches_already_there_count_as_room(tmp_path, toy, small_disk):
    disk = small_disk(5 * 1300)
    config = toolkit.write_config(tmp_path, toy, disk, train__buffer_size=4)
    for life in (1, 2):
        with preprocessor(config, *span(0, 1)) as process:
            wait_until(
                lambda life=life: said(config).count("buffer: 4 batches") == life,
                process,
                "room for them",
            )
            wait_until(settled(disk, range(4)), process, "buffer full")
            time.sleep(0.3)
            assert process.poll() is None, said(config)


def fill(disk: Path, but: int) -> Path:
    """A file that leaves so many bytes free."""
    with open(disk / "other.bin", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - but)
    return disk / "other.bin"


def test_waits_for_room_and_goes_on(tmp_path, toy, small_disk):
    """Something else fills the RAM disk while the preprocessor runs."""
    disk = small_disk(10 * 1300)
    config = toolkit.write_config(tmp_path, toy, disk, train__buffer_size=5)
    with preprocessor(config, *span(0, 2)) as process:
        wait_until(settled(disk, range(5)), process, "buffer full")
        filler = fill(disk, but=500_000)
        (disk / "X_0_1.npy").rename(disk / "other.npy")
        wait_until(lambda: "no room" in said(config), process, "says that there is no room")
        # The last makes room for one that is needed before.
        wait_until(lambda: there(disk) == {0, 1, 2, 3}, process, "makes what is needed first")
        filler.unlink()
        wait_until(lambda: there(disk) == set(range(5)), process, "goes on")
        train(disk, batches_of(config), range(20), process)
        assert finish(process) == 0
    assert said(config).count("no room") == 1, said(config)
    assert set(os.listdir(disk)) - LOCKS == {"other.npy"}


def test_waits_for_room_under_a_limit(tmp_path, toy, ram):
    """The same where nothing can be mounted: files may not become as large as a batch."""
    config = toolkit.write_config(tmp_path, toy, ram, train__buffer_size=3)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with preprocessor(config, *span(0, 1)) as process:
        wait_until(settled(ram, range(3)), process, "buffer full")
        workers = children(process.pid)
        assert len(workers) == 2
        for pid in workers:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (1_000_000, hard))
        progress(ram, 3)
        wait_until(lambda: "no room" in said(config), process, "says that there is no room")
        time.sleep(1.5)
        assert process.poll() is None
        assert not there(ram) - {0, 1, 2}
        for pid in workers:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
        train(ram, batches_of(config), range(3, 10), process)
        assert finish(process) == 0
    assert said(config).count("no room") == 1, said(config)
    assert is_clean(ram)


# --- the training side ------------------------------------------------------------------------


def stock(config: Path, folder: Path, batches: int = 4) -> Buffer:
    """A buffer with the first batches, as the preprocessor leaves them."""
    buffer = Buffer(folder, batches_of(config, epochs=[0, 2]), 20)
    buffer.claim()
    for number in range(batches):
        write_batch(buffer, number)
    return buffer


@contextlib.contextmanager
def reading(buffer: Buffer, first: Position = (0, 0)):
    """A reader whose batches come out as NumPy arrays."""
    spec = buffer.spec
    steps = range(spec.step(*first), spec.step(2))
    train = SimpleNamespace(buffer_folder=buffer.folder, sleep_time=0.05)
    args = Namespace(epoch_start=0, epoch_end=2, batch_size=spec.batch_size, config="config.txt")
    config = SimpleNamespace(train=train)
    if buffer.folder / ".trainer.lock" not in utils._locks:
        take_buffer(config)
    with BatchReader(config, spec, steps, lambda *batch: batch, args) as reader:
        yield reader


def next_batch(reader, patience: float = 20) -> tuple[np.ndarray, np.ndarray] | None:
    """The reader's next batch, None if none comes in so many seconds."""
    stop = utils.Stop()
    timer = threading.Timer(patience, stop.set)
    timer.start()
    try:
        return reader.next(stop)
    finally:
        timer.cancel()


def test_reader_hands_out_the_batches_in_order(config, ram):
    buffer = stock(config, ram, 12)
    with reading(buffer, (0, 8)) as reader:
        for number in range(8, 12):
            batch = next_batch(reader)
            assert_made_by(buffer.batches, divmod(number, 10), batch)
            needs = buffer.spec.step(*needed(ram))
            assert number < needs <= number + 3  # one handed out, one waiting, one being read
        assert next_batch(reader, 0.3) is None
        assert needed(ram) == (1, 2)
        write_batch(buffer, 12)
        assert_made_by(buffer.batches, (1, 2), next_batch(reader))


def test_reader_waits_where_the_preprocessor_has_left(config, ram, capsys):
    """It may have been started for fewer epochs; a new one goes on."""
    buffer = stock(config, ram, 2)
    with reading(buffer) as reader:
        for _ in range(2):
            assert next_batch(reader) is not None
        buffer.leave()
        assert next_batch(reader, 0.3) is None
        assert "waiting for" in capsys.readouterr().out
        stock(config, ram, 3)
        assert_made_by(buffer.batches, (0, 2), next_batch(reader))


def test_waiting_reader_says_again_what_it_needs(config, ram):
    """Else both would wait for ever once the progress file is lost."""
    buffer = stock(config, ram, 9)
    with reading(buffer, (0, 8)) as reader:
        assert next_batch(reader) is not None
        assert next_batch(reader, 0.3) is None
        (ram / "training_progress.txt").unlink()
        deadline = time.monotonic() + 10
        while needed(ram) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert needed(ram) == (0, 9)


def test_reader_goes_on_without_room_for_the_progress_file(tmp_path, toy, small_disk):
    """It removes the batches that were used, and so makes room to say what it needs."""
    disk = small_disk(10 * 1300)
    buffer = stock(toolkit.write_config(tmp_path, toy, disk), disk, 5)
    with reading(buffer) as reader:
        assert next_batch(reader) is not None
        fill(disk, but=0)
        for number in range(1, 5):
            assert_made_by(buffer.batches, (0, number), next_batch(reader))
        deadline = time.monotonic() + 10
        while needed(disk) != (0, 5) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert needed(disk) == (0, 5)
        assert 0 not in there(disk)


def test_a_full_disk_does_not_stand_still(tmp_path, toy, small_disk):
    """Something else takes all the room while a preprocessor and a reader are at work."""
    disk = small_disk(8 * 1300)
    config = toolkit.write_config(tmp_path, toy, disk, train__buffer_size=5)
    batches = batches_of(config, epochs=[0, 2])
    with preprocessor(config, *span(0, 2)) as process:
        wait_until(settled(disk, range(5)), process, "buffer full")
        fill(disk, but=0)
        with reading(Buffer(disk, batches, 5)) as reader:
            for number in range(20):
                assert_made_by(batches, divmod(number, 10), next_batch(reader, PATIENCE))
        end_preprocessing(disk, BatchSpec.read(disk), 2)
        assert finish(process) == 0


def saved(save: Callable, *arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    save(file, *arrays)
    return file.getvalue()


WRONG = {
    "X": {
        "cut": lambda right: right[:-1],
        "longer": lambda right: right + b"\0",
        "only a header": lambda right: right[:128],
        "empty": lambda right: b"",
        "zeros": lambda right: b"\0" * len(right),
        "text": lambda right: b"not a batch at all\n",
        "broken header": lambda right: right.replace(b"(4, 224", b"(4((224"),
        "header without end": lambda right: right.replace(b"}", b" "),
        "huge shape": lambda right: right.replace(b"(4, 224, 224, 3)", b"(9, 9999999, 224)"),
        "zip": lambda right: saved(np.savez, np.zeros(3)),
        "objects": lambda right: saved(np.save, np.array([{}], object)),
        "float32": lambda right: saved(np.save, np.zeros((4, CROP, CROP, 3), np.float32)),
        "fewer pictures": lambda right: saved(np.save, np.zeros((3, CROP, CROP, 3), np.float16)),
        "channels first": lambda right: saved(np.save, np.zeros((4, 3, CROP, CROP), np.float16)),
    },
    "Y": {
        "cut": lambda right: right[:-1],
        "longer": lambda right: right + b"\0",
        "int64": lambda right: saved(np.save, np.zeros(4, np.int64)),
        "float32": lambda right: saved(np.save, np.zeros(4, np.float32)),
        "class too high": lambda right: saved(np.save, np.array([0, 1, 4, 2], np.int32)),
        "class below 0": lambda right: saved(np.save, np.array([0, 1, -1, 2], np.int32)),
    },
}


@pytest.mark.parametrize("kind, damage", [(kind, name) for kind in WRONG for name in WRONG[kind]])
def test_reader_removes_what_is_no_batch_and_says_so(config, ram, capfd, kind, damage):
    buffer = stock(config, ram, 3)
    path = ram / f"{kind}_0_1.npy"
    right = path.read_bytes()
    path.write_bytes(WRONG[kind][damage](right))
    assert path.read_bytes() != right
    with reading(buffer) as reader:
        assert_made_by(buffer.batches, (0, 0), next_batch(reader))
        assert next_batch(reader, 0.3) is None
        assert not (ram / "X_0_1.npy").exists() and not (ram / "Y_0_1.npy").exists()
        write_batch(buffer, 1)
        for number in (1, 2):
            assert_made_by(buffer.batches, (0, number), next_batch(reader))
    output = capfd.readouterr()
    (line,) = output.err.splitlines()
    assert path.name in line and "removed" in line
    assert output.out.count("waiting for") >= 1


def test_reader_and_preprocessor_heal_a_batch_together(tmp_path, toy, ram):
    """A file of the right length with anything in it: only training can see that it is wrong."""
    config = toolkit.write_config(tmp_path, toy, ram, train__buffer_size=5)
    batches = batches_of(config)
    with preprocessor(config, *span(0, 2)) as process:
        wait_until(settled(ram, range(5)), process, "buffer full")
        path = ram / "X_0_3.npy"
        path.write_bytes(b"\1" * path.stat().st_size)
        with reading(Buffer(ram, batches_of(config, epochs=[0, 2]), 5)) as reader:
            for number in range(20):
                assert_made_by(batches, divmod(number, 10), next_batch(reader))
        assert process.poll() is None
        end_preprocessing(ram, BatchSpec.read(ram), 2)
        assert finish(process) == 0
    assert is_clean(ram)


ARGS = Namespace(epoch_start=0, epoch_end=2, batch_size=4, config=Path("config.txt"))


def settings_of(config: Path, **changes: object) -> SimpleNamespace:
    """The trainer's settings; `changes` are `section__key=value`."""
    settings = utils.load_config(config)
    for name, value in changes.items():
        section, key = name.split("__")
        setattr(getattr(settings, section), key, value)
    return settings


@pytest.mark.parametrize(
    "key, value, changes",
    [
        ("batch_size", 8, {}),
        ("seed", 3, {"train__seed": 3}),
        ("N", 41, {"train__N": 41}),
        ("mu", [0.1, 0.2, 0.3], {"utils__mu": [0.1, 0.2, 0.3]}),
        ("sigma", [0.1, 0.2, 0.3], {"utils__sigma": [0.1, 0.2, 0.3]}),
        ("crop", "area", {"runtime_preprocessing__crop": "area"}),
    ],
)
def test_training_with_other_settings_is_told_both_values(config, ram, key, value, changes):
    spec, settings = stock(config, ram, 0).spec, settings_of(config, **changes)
    assert not misfit(spec, settings_of(config), 4)
    utils.lock(ram / ".preprocessor.lock", "held")
    args = Namespace(**vars(ARGS) | {"batch_size": 8 if key == "batch_size" else 4})
    with pytest.raises(utils.UserError) as error:
        wait_for_buffer(settings, args)
    both = f"{key} = {getattr(spec, key)}, this training has {key} = {value}"
    assert both in str(error.value)


def test_training_waits_where_a_stopped_preprocessor_left_other_batches(config, ram, capsys):
    """Nothing holds the folder: the right preprocessor may still come."""
    wrong = dataclasses.replace(stock(config, ram, 2).spec, batch_size=8, batches_per_epoch=5)
    utils.write_record(ram / "buffer.json", wrong)
    threading.Timer(0.5, Buffer(ram, batches_of(config, epochs=[0, 2]), 3).claim).start()
    assert wait_for_buffer(settings_of(config), ARGS) == batches_of(config).spec
    out = capsys.readouterr().out
    assert "batch_size = 8, this training has batch_size = 4; start python3 runtime_pre" in out


def test_training_waits_for_a_preprocessor_that_is_about_to_replace_the_batches(
    config, ram, monkeypatch
):
    """It holds the lock, and finds the pictures first, which may take minutes."""
    monkeypatch.setattr(runtime_preprocessing, "SAY_WAITING", 0.1)
    wrong = dataclasses.replace(stock(config, ram, 2).spec, batch_size=8, batches_per_epoch=5)
    utils.write_record(ram / "buffer.json", wrong)
    utils.lock(ram / ".preprocessor.lock", "held")
    runtime_preprocessing.set_aside_older_run(ram, ARGS)
    threading.Timer(0.5, Buffer(ram, batches_of(config, epochs=[0, 2]), 3).claim).start()
    assert wait_for_buffer(settings_of(config), ARGS) == batches_of(config).spec


def test_a_preprocessor_that_has_just_taken_the_lock_may_replace_other_batches(config, ram):
    wrong = dataclasses.replace(stock(config, ram, 2).spec, batch_size=8, batches_per_epoch=5)
    utils.write_record(ram / "buffer.json", wrong)
    utils.lock(ram / ".preprocessor.lock", "held")
    threading.Timer(0.5, Buffer(ram, batches_of(config, epochs=[0, 2]), 3).claim).start()
    assert wait_for_buffer(settings_of(config), ARGS) == batches_of(config).spec


BAD_SPECS = {
    "batch_size": [0, -1, 41, "4", None, 1e9], "classes": [0, -1, 10**12, 5], "N": [0, "40"],
    "mu": [[0.5], [0.5, 0.5, "x"], None, [0.5, 0.5, float("inf")]], "sigma": [[0.1, 0.1, 0]],
    "batches_per_epoch": [0, -3, 41], "epochs": [[], [2, 2], [-1, 3], ["0", 1], 3],
    "worker": [1, -1], "workers": [0], "class_names": [[1, 2, 3, 4], {}, "abcd"],
    "crop": ["middle", None], "format": [2, "1"], "dtype": ["float32"], "seed": [None, 1.5],
}  # fmt: skip


@pytest.mark.parametrize("key", BAD_SPECS)
def test_a_buffer_json_out_of_range_is_one_line(config, ram, key):
    stock(config, ram, 0)
    content = json.loads((ram / "buffer.json").read_text())
    assert BatchSpec.read(ram) == BatchSpec(**content)
    for value in BAD_SPECS[key]:
        (ram / "buffer.json").write_text(json.dumps(content | {key: value}))
        with pytest.raises(utils.UserError, match="buffer.json: not what"):
            BatchSpec.read(ram)
    del content[key]
    (ram / "buffer.json").write_text(json.dumps(content))
    if key not in ("crop", "format", "dtype"):  # buffers from before there was a choice
        with pytest.raises(utils.UserError, match=f"{key} is missing"):
            BatchSpec.read(ram)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "\0" * 99, "[" * 99_999, "\xff"])
def test_anything_else_in_buffer_json_is_one_line(tmp_path, toy, ram, text):
    config = toolkit.write_config(tmp_path, toy, ram)
    (ram / "buffer.json").write_bytes(text.encode("latin1"))
    result = toolkit.run("runtime_preprocessing.py", config, *span(0, 1))
    toolkit.assert_one_line_error(result, "runtime_preprocessing.py", str(ram / "buffer.json"))
    assert (ram / "buffer.json").read_bytes() == text.encode("latin1")


def test_batches_of_another_dataset_do_not_fit(config, ram):
    """A user corrects ImageNet_folder and starts train.py before the preprocessor."""
    spec = stock(config, ram, 0).spec
    other = settings_of(config, preprocess__ImageNet_folder=ram / "other")
    assert not misfit(spec, settings_of(config), 4)
    wrong = f"made from {spec.dataset}, this training has {ram / 'other'}"
    assert wrong in misfit(spec, other, 4)


def test_the_end_is_not_told_to_who_prepares_another_training(config, ram):
    mine = stock(config, ram, 2).spec
    for changes, told in ({"seed": 7}, False), ({"epochs": [0, 9], "resized": [256]}, True):
        utils.write_record(ram / "buffer.json", dataclasses.replace(mine, **changes))
        end_preprocessing(ram, mine, 2)
        assert (needed(ram) == (2, 0)) == told == (there(ram) == set())


def tf_config(kind: str, index: int, **cluster: list[str]) -> str:
    return json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}})


@pytest.mark.parametrize(
    "index, words",
    [
        (1, "worker = 0, this training has worker = 1"),
        (0, "workers = 1, this training has workers = 2"),
    ],
)
def test_training_as_another_worker_is_told_both_values(config, ram, monkeypatch, index, words):
    """Also the chief, of a preprocessor that was started without TF_CONFIG."""
    spec = stock(config, ram, 0).spec
    monkeypatch.setenv("TF_CONFIG", tf_config("worker", index, worker=["a:1", "b:1"]))
    assert words in misfit(spec, utils.load_config(config), 4)


def test_the_chief_is_worker_0(monkeypatch):
    cluster = {"chief": ["a:1"], "worker": ["b:1", "c:1"]}
    for task, expected in ((("chief", 0), 0), (("worker", 0), 1), (("worker", 1), 2)):
        monkeypatch.setenv("TF_CONFIG", tf_config(*task, **cluster))
        assert worker_of_workers() == (expected, 3)
    monkeypatch.setenv("TF_CONFIG", tf_config("worker", 1, worker=["b:1", "c:1"]))
    assert worker_of_workers() == (1, 2)
    wrong = [
        {"cluster": cluster, "task": task}
        for task in (
            None,
            [],
            {},
            {"type": "worker"},
            {"type": "worker", "index": None},
            {"type": "worker", "index": -1},
            {"type": ["worker"], "index": 0},
            {"type": "worker", "index": 2},
            {"type": "ps", "index": 0},
        )
    ]
    task = {"type": "worker", "index": 0}
    wrong += [
        {"cluster": each, "task": task}
        for each in (None, [], {"worker": None}, {"worker": 3}, {"worker": ["localhost"]})
    ]
    for text in ("{}", "x", "[" * 99_999, "null", "3", *map(json.dumps, wrong)):
        monkeypatch.setenv("TF_CONFIG", text)
        with pytest.raises(utils.UserError, match="TF_CONFIG: expected"):
            worker_of_workers()


def test_a_buffer_that_becomes_another_stops_training(config, ram):
    buffer = stock(config, ram, 1)
    with reading(buffer) as reader:
        assert next_batch(reader) is not None
        other = dataclasses.replace(buffer.spec, epochs=[0, 9])  # as a message advises
        utils.write_record(ram / "buffer.json", other)
        buffer.json = (ram / "buffer.json").read_text()
        write_batch(buffer, 1)
        assert next_batch(reader) is not None
        other = dataclasses.replace(buffer.spec, class_names=["cats"] * 4)
        utils.write_record(ram / "buffer.json", other)
        with pytest.raises(utils.UserError, match="class_names of its batches changed"):
            next_batch(reader)


def test_a_passing_error_of_the_storage_does_not_hide_the_progress(config, ram, monkeypatch):
    spec, failures, open_ = batches_of(config).spec, [errno.EIO, errno.ESTALE], os.open
    write_progress(ram, spec, 13)

    def fails_twice(*arguments: object) -> int:
        if failures:
            raise OSError(failures.pop(), "the storage fails")
        return open_(*arguments)

    monkeypatch.setattr(utils, "PAUSES", (0, 0))
    monkeypatch.setattr(os, "open", fails_twice)
    assert read_progress(ram, spec) == 13
    assert not failures  # they were met


def test_a_passing_error_of_the_storage_does_not_lose_the_progress(config, ram, monkeypatch):
    spec, failures, rename = batches_of(config).spec, [errno.EIO, errno.ESTALE], os.rename

    def fails_twice(*arguments: object) -> None:
        if failures:
            raise OSError(failures.pop(), "the storage fails")
        rename(*arguments)

    monkeypatch.setattr(utils, "PAUSES", (0, 0))
    monkeypatch.setattr(os, "rename", fails_twice)
    write_progress(ram, spec, 13)
    assert read_progress(ram, spec) == 13
    assert not failures  # they were met
