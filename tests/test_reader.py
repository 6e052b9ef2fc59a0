"""Reading in the trainer: memory that is used again, why a batch is not there, room, stopping.

The protocol itself is held by test_buffer.py.
"""

import contextlib
import dataclasses
import errno
import fcntl
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
from toolkit import batches_of, wait_until

import numpy as np
import pytest

import runtime_preprocessing
from runtime_preprocessing import (
    BatchReader,
    BatchSpec,
    Buffer,
    is_ram_disk,
    preprocessor_command,
    take_buffer,
    why_missing,
    write_batch,
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
)

ARGS = Namespace(epoch_start=0, epoch_end=2, batch_size=4, config=Path("my config.txt"))


@contextlib.contextmanager
def reading(buffer: Buffer, to_device, first: int = 0, sleep_time: float = 0.05):
    train = SimpleNamespace(buffer_folder=buffer.folder, sleep_time=sleep_time)
    config, steps = SimpleNamespace(train=train), range(first, buffer.spec.step(2))
    if buffer.folder / ".trainer.lock" not in utils._locks:
        take_buffer(config)
    with BatchReader(config, buffer.spec, steps, to_device, ARGS) as reader:
        yield reader


def released(folder: Path, name: str) -> None:
    """As if the process that holds this lock had ended."""
    os.close(utils._locks.pop(folder / name))


# --- memory -----------------------------------------------------------------------------------


def test_tensors_stay_as_they_are_while_more_batches_are_read(config, ram):
    from train import shared

    buffer = stock(config, ram, 12)
    with reading(buffer, lambda images, labels: (shared(images), labels)) as reader:
        kept = [next_batch(reader) for _ in range(6)]
        for _ in range(4):
            assert next_batch(reader) is not None  # and forgotten: its memory is free again
        for number, (images, labels) in enumerate(kept):
            assert_made_by(buffer.batches, (0, number), (images.numpy(), labels))


def test_memory_is_used_again_once_no_tensor_needs_it(config, ram):
    from train import shared

    buffer, places = stock(config, ram, 12), []

    def to_device(images: np.ndarray, labels: np.ndarray) -> object:
        places.append(images.ctypes.data)
        return shared(images)

    with reading(buffer, to_device) as reader:
        for _ in range(10):
            assert next_batch(reader) is not None
        assert len(places) >= 10 and len(set(places)) <= 4


def test_a_device_that_refuses_a_batch_does_not_damage_it(config, ram):
    def refuse(*_: np.ndarray) -> None:
        raise ValueError("no such device")

    buffer = stock(config, ram, 3)
    with reading(buffer, refuse) as reader, pytest.raises(ValueError, match="no such device"):
        next_batch(reader)
    assert there(buffer.folder) == {0, 1, 2}


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
        utils.write_record(ram / "buffer.json", dataclasses.replace(buffer.spec, seed=7))
        with pytest.raises(utils.UserError, match="seed of its batches changed after this"):
            for _ in range(3):
                next_batch(reader)


def test_a_buffer_json_that_is_missing_for_a_moment_holds_nobody_up(config, ram):
    """A preprocessor that starts has set it aside, while it finds the pictures."""
    buffer = stock(config, ram, 4)
    with reading(buffer, lambda *batch: batch) as reader:
        assert next_batch(reader) is not None
        (ram / "buffer.json").unlink()
        for number in range(1, 4):
            assert_made_by(buffer.batches, (0, number), next_batch(reader))


def test_storage_that_fails_for_a_moment_is_read_again(config, ram, monkeypatch):
    """Not taken for a broken batch, which would be removed."""
    buffer, failures, open_ = stock(config, ram, 3), [errno.EIO, errno.ESTALE], os.open

    def failing(path: Path, *flags: int) -> int:
        if failures and Path(path).suffix == ".npy":
            raise OSError(failures.pop(), "fails for a moment")
        return open_(path, *flags)

    monkeypatch.setattr(os, "open", failing)
    monkeypatch.setattr(utils, "PAUSES", (0, 0, 0))
    with reading(buffer, lambda *batch: batch) as reader:
        for number in range(3):
            assert_made_by(buffer.batches, (0, number), next_batch(reader))
    assert not failures and len(there(ram)) == 3


def test_a_file_that_is_cut_off_while_it_is_read_is_made_again(config, ram, monkeypatch, capfd):
    """By whatever else writes there. A file that was mapped into memory would end the process."""
    buffer, cut, open_ = stock(config, ram, 3), [], os.open

    def opened_and_cut(path: Path, *flags: int) -> int:
        descriptor = open_(path, *flags)
        if Path(path).name == "X_0_1.npy" and not cut:
            cut.append(os.truncate(path, 1_000_000))
        return descriptor

    monkeypatch.setattr(os, "open", opened_and_cut)
    with reading(buffer, lambda *batch: batch) as reader:
        assert next_batch(reader) is not None
        assert next_batch(reader, 0.5) is None
        write_batch(buffer, 1)
        for number in (1, 2):
            assert_made_by(buffer.batches, (0, number), next_batch(reader))
    assert cut and "X_0_1.npy" in capfd.readouterr().err


def test_of_several_machines_none_stops_while_it_waits(config, ram):
    """The others have sent the step already. Its batch still comes, if there is who makes it."""
    share = with_other(batches_of(config, epochs=[0, 2]), workers=2, batches_per_epoch=5)
    buffer, spec = Buffer(ram, share, 20), share.spec
    buffer.claim()
    train = SimpleNamespace(train=SimpleNamespace(buffer_folder=ram, sleep_time=9))
    stop = utils.Stop()
    stop.set()
    take_buffer(train)
    utils.lock(ram / ".preprocessor.lock", "")
    arguments = train, spec, range(10), lambda *batch: batch, ARGS
    with ThreadPoolExecutor(1) as pool, BatchReader(*arguments) as reader:
        threading.Timer(0.3, write_batch, [buffer, 0]).start()
        assert pool.submit(reader.next, stop).result(20) is not None
        threading.Timer(0.3, released, [ram, ".preprocessor.lock"]).start()
        assert pool.submit(reader.next, stop).result(20) is None


def test_the_end_is_told_without_room(config, ram, monkeypatch):
    stock(config, ram, 20)
    write_text = utils.write_text

    def without_room(path: Path, text: str) -> None:
        if (ram / "X_1_9.npy").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        write_text(path, text)

    monkeypatch.setattr(utils, "write_text", without_room)
    runtime_preprocessing.end_preprocessing(ram, BatchSpec.read(ram), 2)
    assert (ram / "training_progress.txt").read_text() == "2\n0\n"


def test_a_trainer_whose_place_was_taken_stops(config, ram):
    buffer = stock(config, ram, 4)
    with reading(buffer, lambda *batch: batch) as reader:
        assert next_batch(reader) is not None
        with (
            open(ram / "theirs", "w") as theirs,
            pytest.raises(utils.UserError, match="another train.py uses this folder"),
        ):
            fcntl.flock(theirs, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.replace(ram / "theirs", ram / ".trainer.lock")  # free at no moment
            for _ in range(4):
                next_batch(reader)


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
        ((1, 2), 0, ("--epoch_start=1 --epoch_end=2", "needs epoch 0", "start python3 runtime_")),
        ((0, 1), 10, ("--epoch_start=0 --epoch_end=1", "needs epoch 1", "start python3 runtime_")),
    ],
)
def test_a_waiting_trainer_says_which_flag_is_wrong(
    tmp_path, toy, ram, capsys, epochs, first, words
):
    """At once, and while it waits."""
    config = toolkit.write_config(tmp_path, toy, ram, train__buffer_size=3)
    with preprocessor(config, *span(*epochs)) as process:
        wait_until(lambda: len(there(ram)) == 3, process, "buffer full")
        buffer = Buffer(ram, batches_of(config, epochs=list(epochs)), 3)
        with reading(buffer, lambda *batch: batch, first) as reader:
            warning = capsys.readouterr().err
            assert all(word in warning for word in words), warning
            assert next_batch(reader, 0.4) is None
        waiting = capsys.readouterr().out
        if epochs == (1, 2):  # the other one takes training as ended, and leaves
            assert all(word in waiting for word in words), waiting


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
    released(ram, ".preprocessor.lock")
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
            write_batch(buffer, number)
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
    large = Buffer(ram, buffer.batches, 20)
    batch = sum(large.sizes.values()) + 2 * 4096  # whole pages
    with pytest.raises(utils.UserError, match="24 MB of memory is free") as error:
        large.check_size()
    size = int(re.search(r"largest buffer_size that fits is (\d+)", str(error.value))[1])
    # Half of so little memory is left to training; three batches are there already.
    assert size == 12_000_000 // batch + 3
    Buffer(ram, buffer.batches, size).check_size()
    assert "24 MB of memory is free" in capsys.readouterr().out
    with pytest.raises(utils.UserError):
        Buffer(ram, buffer.batches, size + 1).check_size()
    monkeypatch.setattr(utils, "available_memory", lambda: None)
    large.check_size()


def test_ram_disks_are_told_by_their_file_system(tmp_path):
    assert is_ram_disk(Path("/dev/shm"))
    assert not is_ram_disk(Path("/proc"))


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


def test_under_nohup_a_logout_does_not_stop_it(tmp_path, toy, ram):
    config = toolkit.write_config(tmp_path, toy, ram, train__buffer_size=3)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does; processes inherit it
    try:
        with preprocessor(config, *span(0, 2)) as process:
            wait_until(settled(ram, range(3)), process, "buffer full")
            process.send_signal(signal.SIGHUP)
            progress(ram, 5)
            wait_until(settled(ram, range(5, 8)), process, "goes on")
            process.send_signal(signal.SIGTERM)
            assert finish(process) == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)


# --- batches of another making ----------------------------------------------------------------


def with_other(batches, **changes):
    spec = dataclasses.replace(batches.spec, **changes)
    return runtime_preprocessing.Batches(spec, batches.pictures, batches.copies)


def test_what_differs_is_said(config, ram, capsys):
    old = stock(config, ram, 2)
    changes = {"seed": 5, "mu": [0.5, 0.5, 0.5], "pictures": "x", "epochs": [0, 9]}
    Buffer(ram, with_other(old.batches, **changes), 3).claim()
    assert "removing 4 files, made with other seed, pictures, mu" in capsys.readouterr().out
    assert not there(ram) and not there(ram, "Y")


def test_a_buffer_json_of_somebody_else_is_refused_before_anything_is_touched(config, ram):
    stock(config, ram, 1)
    (ram / "buffer.json").write_text('{"thesis": "years of work"}')
    before = {path.name: path.read_bytes() for path in ram.iterdir()}
    with pytest.raises(utils.UserError, match="buffer.json: not what this toolkit writes"):
        runtime_preprocessing.set_aside_older_run(ram, ARGS)
    assert {path.name: path.read_bytes() for path in ram.iterdir()} == before


def test_batches_that_a_power_failure_has_emptied_are_made_again(config, ram):
    buffer = stock(config, ram, 3)
    for name in ("X_0_0.npy", "Y_0_1.npy", "training_progress.txt"):
        (ram / name).write_bytes(b"")
    Buffer(ram, buffer.batches, 3).claim()
    assert BatchSpec.read(ram) == buffer.spec and buffer.ready(buffer.files()) == {2}


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
