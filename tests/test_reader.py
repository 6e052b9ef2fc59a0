"""Reading in the trainer: memory that is used again, why a batch is not there, room, stopping.

The protocol itself is held by test_buffer.py.
"""

import contextlib
import dataclasses
import errno
import json
import os
import re
import signal
import threading
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import toolkit
import utils
from toolkit import recipe_of

import numpy as np
import pytest

import runtime_preprocessing
from runtime_preprocessing import (
    BatchReader,
    BatchSpec,
    Buffer,
    is_ram_disk,
    looks_like_a_ram_disk,
    preprocessor_command,
    why_missing,
)
from test_buffer import (
    assert_made_by,
    finish,
    next_batch,
    preprocessor,
    progress,
    said,
    settled,
    span,
    stock,
    there,
    wait_until,
)

ARGS = Namespace(epoch_start=0, epoch_end=2, batch_size=4, config=Path("my config.txt"))


@contextlib.contextmanager
def reading(buffer: Buffer, put, first: int = 0, sleep_time: float = 0.05):
    train = SimpleNamespace(buffer_folder=buffer.folder, sleep_time=sleep_time)
    steps = range(first, buffer.spec.step(2))
    with BatchReader(SimpleNamespace(train=train), buffer.spec, steps, put, ARGS) as reader:
        yield reader


# --- memory -----------------------------------------------------------------------------------


def test_tensors_stay_as_they_are_while_more_batches_are_read(config, ram):
    from train import shared

    buffer = stock(config, ram, 12)
    with reading(buffer, lambda images, labels: (shared(images), labels)) as reader:
        kept = [next_batch(reader) for _ in range(6)]
        for _ in range(4):
            assert next_batch(reader) is not None  # and forgotten: its memory is free again
        for number, (images, labels) in enumerate(kept):
            assert_made_by(buffer.recipe, (0, number), (images.numpy(), labels))


def test_memory_is_used_again_once_no_tensor_needs_it(config, ram):
    from train import shared

    buffer, places = stock(config, ram, 12), []

    def put(images: np.ndarray, labels: np.ndarray) -> object:
        places.append(images.ctypes.data)
        return shared(images)

    with reading(buffer, put) as reader:
        for _ in range(10):
            assert next_batch(reader) is not None
        assert len(places) >= 10 and len(set(places)) <= 4


def test_the_trainer_shares_a_batch_instead_of_copying_it(config, ram):
    """A copy into fresh memory takes longer than the reading, and holds Python's lock."""
    from train import shared

    buffer = stock(config, ram, 3)
    with reading(buffer, lambda images, labels: (images, shared(images))) as reader:
        images, tensor = next_batch(reader)
    images[2, 100, 100, 1] = 77
    assert float(tensor[2, 100, 100, 1]) == 77
    odd = np.zeros(100, np.float16)[next(i for i in range(100) if i % 32) :]
    np.testing.assert_array_equal(shared(odd).numpy(), odd)  # TensorFlow could not bear it shared


# --- looking ----------------------------------------------------------------------------------


def test_a_waiting_reader_looks_every_moment_whatever_sleep_time_says(config, ram, monkeypatch):
    buffer = stock(config, ram, 0)
    with reading(buffer, lambda *batch: batch, sleep_time=100) as reader:
        pauses, wait = [], reader._closed.wait
        monkeypatch.setattr(reader._closed, "wait", lambda s: (pauses.append(s), wait(s)))
        assert next_batch(reader, 0.5) is None
        assert pauses and max(pauses) <= 0.05


def test_buffer_json_is_read_again_only_when_it_has_changed(config, ram, monkeypatch):
    """It holds the names of all classes."""
    buffer, reads, read = stock(config, ram, 8), [], BatchSpec.read
    monkeypatch.setattr(BatchSpec, "read", lambda folder: (reads.append(folder), read(folder))[1])
    with reading(buffer, lambda *batch: batch) as reader:
        for _ in range(6):
            assert next_batch(reader) is not None
        assert len(reads) == 1
        dataclasses.replace(buffer.spec, seed=7).write(ram)
        with pytest.raises(utils.UserError, match="seed of its batches changed after this"):
            for _ in range(3):
                next_batch(reader)


def test_a_buffer_json_with_values_of_other_types_or_version_is_none(config, ram):
    stock(config, ram, 0)
    content = json.loads((ram / "buffer.json").read_text())
    assert BatchSpec.read(ram) == BatchSpec(**content)
    for name, wrong in (("batch_size", "4"), ("mu", None), ("epochs", 3), ("format", 2)):
        utils.write_text(ram / "buffer.json", json.dumps(content | {name: wrong}))
        assert BatchSpec.read(ram) is None


def test_storage_that_fails_for_a_moment_is_read_again(config, ram, monkeypatch):
    """Not taken for a broken batch, which would be removed."""
    buffer, failures, readv = stock(config, ram, 3), [errno.EIO, errno.ESTALE], os.readv

    def failing(descriptor: int, buffers: list) -> int:
        if failures:
            raise OSError(failures.pop(), "fails for a moment")
        return readv(descriptor, buffers)

    monkeypatch.setattr(os, "readv", failing)
    monkeypatch.setattr(utils, "PAUSES", (0, 0, 0))
    with reading(buffer, lambda *batch: batch) as reader:
        for number in range(3):
            assert_made_by(buffer.recipe, (0, number), next_batch(reader))
    assert not failures and len(there(ram)) == 3


def test_of_several_machines_none_stops_while_it_waits(config, ram):
    """The others have sent the step already. Its batch still comes, if there is who makes it."""
    buffer = stock(config, ram, 0)
    spec = dataclasses.replace(buffer.spec, workers=2)
    spec.write(ram)
    train = SimpleNamespace(train=SimpleNamespace(buffer_folder=ram, sleep_time=9))
    stop = threading.Event()
    stop.set()
    utils.lock(ram / ".preprocessor.lock", "")
    arguments = train, spec, range(20), lambda *batch: batch, ARGS
    with ThreadPoolExecutor(1) as pool, BatchReader(*arguments) as reader:
        threading.Timer(0.3, buffer.make, [0]).start()
        assert pool.submit(reader.next, stop).result(20) is not None
        threading.Timer(0.3, utils.remove_lock, [ram / ".preprocessor.lock"]).start()
        assert pool.submit(reader.next, stop).result(20) is None


def test_the_end_is_told_without_room_and_without_a_lock(config, ram, monkeypatch):
    stock(config, ram, 20)
    write_text = utils.write_text

    def without_room(path: Path, text: str) -> None:
        if (ram / "X_1_9.npy").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        write_text(path, text)

    settings = SimpleNamespace(train=SimpleNamespace(buffer_folder=ram))
    assert runtime_preprocessing.take_buffer(settings) == ram
    monkeypatch.setattr(utils, "write_text", without_room)
    runtime_preprocessing.end_preprocessing(ram, 2)
    assert (ram / "training_progress.txt").read_text() == "2\n0\n"
    assert not (ram / ".trainer.lock").exists()


# --- why a batch is not there -----------------------------------------------------------------


def test_a_waiting_trainer_says_that_no_preprocessor_runs_and_how_to_start_one(config, ram, capsys):
    buffer = stock(config, ram, 1)
    with reading(buffer, lambda *batch: batch) as reader:
        assert next_batch(reader) is not None
        assert next_batch(reader, 0.4) is None
    out = capsys.readouterr().out
    assert "X_0_1.npy: no runtime_preprocessing.py is running; start python3 runtime_pre" in out
    assert "--epoch_start=0 --epoch_end=2 --batch_size=4 --config='my config.txt'" in out


@pytest.mark.parametrize(
    "epochs, first, words",
    [
        ((1, 2), 0, ("--epoch_start=1", "needs epoch 0", "again with --epoch_start=0")),
        ((0, 1), 10, ("--epoch_end=1", "needs epoch 1", "again with --epoch_end=2")),
    ],
)
def test_a_waiting_trainer_says_which_flag_is_wrong(
    tmp_path, toy, ram, capsys, epochs, first, words
):
    """At once, and while it waits."""
    config = toolkit.write_config(tmp_path, toy, ram, train__buffer_size=3)
    with preprocessor(config, *span(*epochs)) as process:
        wait_until(lambda: len(there(ram)) == 3, process, "buffer full")
        buffer = Buffer(ram, recipe_of(config, epochs=list(epochs)), 3)
        with reading(buffer, lambda *batch: batch, first) as reader:
            warning = capsys.readouterr().err
            assert all(word in warning for word in words), warning
            assert next_batch(reader, 0.4) is None
        waiting = capsys.readouterr().out
        if epochs == (1, 2):  # the other one takes training as ended, and leaves
            assert all(word in waiting for word in words), waiting
            wait_until(lambda: "training needs epoch 0, batch 0" in said(config), process, "")
            assert said(config).count("before --epoch_start=1") == 1


def test_a_waiting_trainer_says_that_the_preprocessor_is_at_work(config, ram):
    buffer = stock(config, ram, 1)
    utils.lock(ram / ".preprocessor.lock", "")
    progress(ram, 1)
    assert "at work" in why_missing(ram, 1, ARGS)
    progress(ram, 5)
    assert "no room for training_progress.txt" in why_missing(ram, 1, ARGS)
    assert "--epoch_end=2" in why_missing(ram, 20, ARGS)
    buffer.folder.joinpath("buffer.json").unlink()
    assert "starting" in why_missing(ram, 1, ARGS)
    utils.remove_lock(ram / ".preprocessor.lock")
    assert "no runtime_preprocessing.py is running" in why_missing(ram, 1, ARGS)


def test_waiting_is_said_every_sleep_time(config, ram, capsys):
    with reading(stock(config, ram, 0), lambda *batch: batch, sleep_time=0.1) as reader:
        assert next_batch(reader, 1) is None
    assert capsys.readouterr().out.count("waiting for ") > 3


def test_slow_batches_are_not_each_said_to_be_late(config, ram, capsys):
    buffer = stock(config, ram, 1)
    with reading(buffer, lambda *batch: batch, sleep_time=100) as reader:
        for number in range(1, 8):
            assert next_batch(reader) is not None
            time.sleep(0.1)
            buffer.make(number)
    assert "waiting" not in capsys.readouterr().out


def test_the_preprocessors_lock_tells_whether_it_is_at_work(tmp_path, toy, ram):
    """A file of the folder: locks on folders are unknown to other machines on NFS."""
    config = toolkit.write_config(tmp_path, toy, ram, train__buffer_size=3)
    with preprocessor(config, *span(0, 2)) as process:
        wait_until(settled(ram, range(3)), process, "buffer full")
        assert utils.is_locked(ram / ".preprocessor.lock")
    # Not at once on a busy machine: a process that was just forked first closes what it inherited.
    deadline = time.monotonic() + 60
    while utils.is_locked(ram / ".preprocessor.lock"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- room -------------------------------------------------------------------------------------


def test_a_window_too_large_for_the_free_memory_is_refused(config, ram, monkeypatch, capsys):
    """A RAM disk may be larger than the memory that is left."""
    monkeypatch.setattr(runtime_preprocessing, "is_ram_disk", lambda folder: True)
    monkeypatch.setattr(utils, "available_memory", lambda: 24_000_000)
    buffer = stock(config, ram, 3)
    large = Buffer(ram, buffer.recipe, 20)
    batch = large.x_bytes + large.y_bytes
    with pytest.raises(utils.UserError, match="24 MB is free") as error:
        large.check_room()
    size = int(re.search(r"largest buffer_size that fits is (\d+)", str(error.value))[1])
    # Half of so little memory is left to training; three batches are there already.
    assert size == 12_000_000 // batch + 3
    assert "free memory: 24 MB" in capsys.readouterr().out
    Buffer(ram, buffer.recipe, size).check_room()
    with pytest.raises(utils.UserError):
        Buffer(ram, buffer.recipe, size + 1).check_room()
    monkeypatch.setattr(utils, "available_memory", lambda: None)
    large.check_room()


def test_ram_disks_are_told_by_their_file_system(tmp_path):
    assert is_ram_disk(Path("/dev/shm"))
    assert not is_ram_disk(Path("/proc"))


@pytest.mark.parametrize(
    "folder, looks",
    [
        ("/mnt/ramdisk/batches", True), ("/mnt/ramdsk", True), ("/mnt/RAM_disk/x", True),
        ("/tmp/ram", True), ("/dev/shm/batches", True), ("/run/user/0/batches", True),
        ("/mnt/tmpfs1", True), ("/data/batches", False), ("/home/ramona/program", False),
        ("/", False), ("/home/sham/run", False),
    ],
)  # fmt: skip
def test_folders_that_are_named_as_ram_disks_are(folder, looks):
    assert looks_like_a_ram_disk(Path(folder)) == looks


def test_a_disk_that_looks_meant_as_a_ram_disk_is_warned_of(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runtime_preprocessing, "is_ram_disk", lambda folder: False)
    for name, warned in (("ramdisk", True), ("batches", False)):
        folder = tmp_path / name
        folder.mkdir()
        Buffer(folder, recipe_of(config), 2).check_room()
        err = capsys.readouterr().err
        assert (f"buffer_folder {folder} looks like a RAM disk" in err) == warned


# --- stopping ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_it_says_what_stays_and_how_to_free_it(tmp_path, toy, ram, number):
    config = toolkit.write_config(tmp_path, toy, ram, train__buffer_size=3)
    with preprocessor(config, *span(0, 2)) as process:
        wait_until(settled(ram, range(3)), process, "buffer full")
        process.send_signal(number)
        assert finish(process) == 128 + number
    assert there(ram) == there(ram, "Y") == {0, 1, 2}
    lines = said(config).splitlines()
    assert lines[-1] == "runtime_preprocessing.py: stopped"
    assert f"3.61 MB of batches stay in {ram} for the next run" in lines[-2]
    assert f"rm {ram}/[XY]_[0-9]*.npy" in lines[-2]
    assert "Traceback" not in said(config)


def test_under_nohup_a_logout_does_not_stop_it(tmp_path):
    before = {each: signal.getsignal(each) for each in runtime_preprocessing.STOPPING}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with runtime_preprocessing.last_words(tmp_path):
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


# --- somebody else's files --------------------------------------------------------------------


def test_what_differs_is_said_with_both_values(config, ram, capsys):
    old = stock(config, ram, 2)
    spec = dataclasses.replace(old.spec, seed=5, mu=[0.5, 0.5, 0.5], pictures="x", epochs=[0, 9])
    Buffer(ram, runtime_preprocessing.Recipe(spec, old.recipe.pictures, {}), 3).claim()
    assert (
        "removing 4 files: seed was 0, now 5; other pictures; "
        "mu was [0.4818, 0.44969, 0.39839], now [0.5, 0.5, 0.5]" in capsys.readouterr().out
    )


@pytest.mark.parametrize("name", ["X_0_0.npy", "Y_3_2.npy", "buffer.json", "training_progress.txt"])
def test_somebody_elses_files_of_the_same_names_are_refused(config, ram, name):
    """Also beside batches of the toolkit's own, made with other settings."""
    recipe = recipe_of(config)
    for own in (False, True):
        if own:
            stock(config, ram, 1)
        (ram / name).write_text('{"thesis": "years of work"}')
        before = {path.name: path.read_bytes() for path in ram.iterdir()}
        buffer = Buffer(ram, with_other(recipe, seed=3), 3)
        with pytest.raises(utils.UserError, match=f"{name}: not written by this toolkit"):
            buffer.claim()
        assert {path.name: path.read_bytes() for path in ram.iterdir()} == before
        (ram / name).unlink()


def with_other(recipe, **changes):
    spec = dataclasses.replace(recipe.spec, **changes)
    return runtime_preprocessing.Recipe(spec, recipe.pictures, recipe.copies)


def test_a_passing_error_of_the_storage_makes_no_file_a_strangers(config, ram, monkeypatch):
    buffer, failures = stock(config, ram, 1), [errno.EIO, errno.ESTALE]

    def failing(*arguments: object):
        if failures:
            raise OSError(failures.pop(), "fails for a moment")
        return open(*arguments)

    monkeypatch.setattr(runtime_preprocessing, "open", failing, raising=False)
    monkeypatch.setattr(utils, "PAUSES", (0, 0))
    Buffer(ram, with_other(buffer.recipe, seed=3), 3).claim()
    assert not failures and not there(ram)


def test_what_a_power_failure_leaves_is_no_strangers(config, ram):
    buffer = stock(config, ram, 2)
    for name in ("X_0_0.npy", "Y_0_1.npy", "buffer.json", "training_progress.txt"):
        (ram / name).write_bytes(b"" if name[0] != "b" else b"\0" * 400)
    Buffer(ram, buffer.recipe, 3).claim()
    assert BatchSpec.read(ram) == buffer.spec and not there(ram)


# --- other frameworks -------------------------------------------------------------------------


def test_the_preprocessor_serves_a_reader_that_knows_only_the_files(tmp_path, toy, ram):
    """What README promises to other frameworks, in NumPy alone."""
    config = toolkit.write_config(tmp_path, toy, ram, train__buffer_size=3)
    with preprocessor(config, *span(0, 2)) as process:
        wait_until((ram / "buffer.json").exists, process, "buffer.json")
        info = json.loads((ram / "buffer.json").read_text())
        labels = []
        for epoch in range(*info["epochs"]):
            for batch in range(info["batches_per_epoch"]):
                utils.write_text(ram / "training_progress.txt", f"{epoch}\n{batch}\n")
                file = ram / f"X_{epoch}_{batch}.npy"
                wait_until(file.exists, process, file)
                x, y = np.load(file), np.load(ram / f"Y_{epoch}_{batch}.npy")
                assert x.shape == (info["batch_size"], 224, 224, 3) and x.dtype == info["dtype"]
                assert len(y) == info["batch_size"] and y.max() < info["classes"]
                labels += y.tolist()
        utils.write_text(ram / "training_progress.txt", f"{info['epochs'][1]}\n0\n")
        assert finish(process) == 0
    assert np.bincount(labels).tolist() == [20] * len(info["class_names"])


def test_the_command_that_is_named_can_be_pasted():
    assert preprocessor_command(ARGS) == (
        "python3 runtime_preprocessing.py --epoch_start=0 --epoch_end=2 --batch_size=4 "
        "--config='my config.txt'"
    )
