"""Files and folders that appear whole, leftovers, links, locks, files that are read back, storage
that fails, a container's limits.

python3 -m pytest tests/test_files.py
"""

import contextlib
import errno
import fcntl
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import toolkit
import utils
from utils import UserError

import numpy as np
import pytest

TOKEN = "0123456789abcdef"


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@contextlib.contextmanager
def another_process(code: str, *arguments: object) -> Iterator[subprocess.Popen]:
    """Runs Python code that prints a line and then waits in `input()`; until then it is held."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"import os, sys, utils\nfrom pathlib import Path\n{code}"]
        + [str(argument) for argument in arguments],
        cwd=toolkit.ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline().strip() == "ready"
        yield process
    finally:
        process.kill()
        process.communicate()


WRITING = {
    "file": "with utils.written_aside(Path(sys.argv[1])) as file:\n"
    "    file.write(b'half'); file.flush(); print('ready', flush=True); input()",
    "folder": "with utils.folder_written_aside(Path(sys.argv[1])) as aside:\n"
    "    (aside / 'part').write_text('half'); print('ready', flush=True); input()",
}
HOLDING = "utils.lock(Path(sys.argv[1]), 'refused'); print('ready', flush=True); input()"


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that another user can reach, which pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="toolkit-test-") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def as_another_user(function: Callable[[], object]) -> object:
    """What the function returns, a JSON value, in a process of a user without rights.

    Only root can become another user. Otherwise it is the same user, and the files' modes have to
    forbid what they should.
    """
    reading, writing = os.pipe()
    if os.fork() == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            os.write(writing, json.dumps(function()).encode())
        except Exception as error:
            os.write(writing, json.dumps(repr(error)).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as file:
        result = json.loads(file.read())
    os.wait()
    return result


# --- leftovers --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRITING)
def test_a_file_and_a_folder_appear_whole(kind, tmp_path):
    path = tmp_path / "thing"
    with another_process(WRITING[kind], path) as process:
        assert len(names(tmp_path)) == 1 and not path.exists()
        process.communicate("\n")
        assert process.returncode == 0
    assert names(tmp_path) == [path.name]
    assert (path / "part" if kind == "folder" else path).read_bytes() == b"half"


@pytest.mark.parametrize("kind", WRITING)
def test_what_a_killed_process_left_is_removed(kind, tmp_path):
    with another_process(WRITING[kind], tmp_path / "thing"):
        pass
    assert names(tmp_path)
    utils.remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_only_leftovers_of_the_names_that_a_lock_covers_are_removed(tmp_path):
    """Another process may be writing the others."""
    ours = [f".X_0_1.npy.aside-{TOKEN}", f".buffer.json.aside-{TOKEN}"]
    theirs = [f".training_progress.txt.aside-{TOKEN}", f".buffer.jsonl.aside-{TOKEN}"]
    for name in ours + theirs:
        (tmp_path / name).touch()
    utils.remove_leftovers(tmp_path, "[XY]_*.npy", "buffer.json")
    assert names(tmp_path) == sorted(theirs)


def test_leftovers_of_another_user_stay(shared_folder):
    """Where nobody may remove what is not theirs, as in /tmp."""
    (shared_folder / f".thing.aside-{TOKEN}").touch()
    inner = shared_folder / f".folder.aside-{TOKEN}"
    inner.mkdir()
    (inner / "part").touch()
    shared_folder.chmod(0o555)
    assert as_another_user(lambda: utils.remove_leftovers(shared_folder)) is None
    shared_folder.chmod(0o755)
    assert names(shared_folder) == sorted([inner.name, f".thing.aside-{TOKEN}"])


STRANGERS = [
    *(".thing.aside-12-34", ".thing.aside-", f".thing.aside-{TOKEN[:-1]}", ".thing.aside"),
    *(f"thing.aside-{TOKEN}", f".thing.aside-{TOKEN}0", f".thing.aside-{TOKEN}.txt", ".nfs0001"),
    *(f".thing.aside-{TOKEN.upper()}", f".aside-{TOKEN}", f"..aside-{TOKEN}.lock~", "thing.tmp"),
]


def test_strangers_files_stay(tmp_path):
    for name in STRANGERS:
        (tmp_path / name).write_text("somebody else's")
    target = tmp_path / "target"
    target.mkdir()
    (target / "file").write_text("somebody else's")
    links = [f".link.aside-{TOKEN}", f".other.aside-{TOKEN}"]
    (tmp_path / links[0]).symlink_to(target)
    (tmp_path / links[1]).symlink_to(target / "file")
    (tmp_path / f".ours.aside-{TOKEN}").write_text("half")
    before = names(tmp_path)
    utils.remove_leftovers(tmp_path)
    assert set(before) - set(names(tmp_path)) == {f".ours.aside-{TOKEN}", *links}
    assert (target / "file").exists()


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127, "€" * 85, "a", "…" + "\udcff" * 200])
def test_names_as_long_as_the_file_system_allows(name, tmp_path):
    assert len(os.fsencode(name)) <= 255
    with utils.written_aside(tmp_path / name) as file:
        (aside,) = names(tmp_path)
        assert len(os.fsencode(aside)) <= 140
        file.write(b"whole")
    assert names(tmp_path) == [name]
    (tmp_path / name).unlink()
    with utils.folder_written_aside(tmp_path / name) as aside:
        (aside / "part").write_text("whole")
    assert names(tmp_path) == [name]


def test_temporary_names_never_repeat_not_even_after_a_fork(tmp_path):
    path = tmp_path / "thing"
    assert len({utils._aside_name(path) for _ in range(1000)}) == 1000
    here = utils._aside_name(path)
    assert as_another_user(lambda: str(utils._aside_name(path))) != str(here)


def test_a_write_that_fails_leaves_nothing_and_the_old_file(tmp_path):
    utils.write_text(tmp_path / "thing", "old")
    with pytest.raises(OSError) as error, utils.written_aside(tmp_path / "thing") as file:
        file.write(b"new")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.filename == str(tmp_path / "thing")
    with pytest.raises(FileNotFoundError) as error:
        utils.save_array(tmp_path / "nowhere" / "array", np.zeros(3))
    assert error.value.filename == str(tmp_path / "nowhere" / "array")
    with pytest.raises(ZeroDivisionError), utils.folder_written_aside(tmp_path / "folder") as aside:
        (aside / "part").write_text("half")
        raise ZeroDivisionError
    assert names(tmp_path) == ["thing"]
    assert (tmp_path / "thing").read_text() == "old"


def test_a_full_disk_is_told_with_its_errno(tmp_path):
    """np.save loses it. The preprocessor waits for room, but stops at anything else."""
    with open("/dev/full", "wb", buffering=0) as full, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", lambda *_: os.dup(full.fileno()))
        with pytest.raises(OSError) as error:
            utils.save_array(tmp_path / "array.npy", np.zeros(100_000))
    assert utils.is_no_room(error.value)
    assert not utils.is_no_room(OSError(errno.EIO, ""))


def test_a_folder_is_removed_under_another_name(tmp_path, monkeypatch):
    folder = tmp_path / "3"
    folder.mkdir()
    (folder / "part").write_text("whole")

    def killed(path: Path, **_: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(utils.shutil, "rmtree", killed)
        utils.remove_folder(folder)
    assert not folder.exists() and len(names(tmp_path)) == 1
    utils.remove_leftovers(tmp_path)
    assert names(tmp_path) == []


# --- links and other users --------------------------------------------------------------------


@pytest.mark.parametrize("write", [utils.write_text, utils.save_array, utils.write_csv])
def test_a_link_planted_under_a_temporary_name_is_not_followed(write, tmp_path, monkeypatch):
    """In a folder that others may write to, somebody may guess the name."""
    victim, planted = tmp_path / "victim", tmp_path / f".thing.aside-{TOKEN}"
    victim.write_text("mine")
    planted.symlink_to(victim)
    monkeypatch.setattr(utils, "_aside_name", lambda _: planted)
    content = {"save_array": [np.zeros(3)], "write_csv": [["a"], []]}.get(write.__name__, ["x"])
    with pytest.raises(FileExistsError):
        write(tmp_path / "thing", *content)
    assert victim.read_text() == "mine"


def test_a_file_is_replaced_not_written_through_a_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("a\nmine\n")
    (tmp_path / "table.csv").symlink_to(victim)
    utils.write_csv(tmp_path / "table.csv", ["a"], [{"a": 1}])
    assert victim.read_text() == "a\nmine\n" and (tmp_path / "table.csv").read_text() == "a\n1\n"
    assert not (tmp_path / "table.csv").is_symlink()


@pytest.mark.parametrize("exists", [True, False])
def test_a_lock_is_never_opened_through_a_link(exists, tmp_path):
    """A run that somebody sends as a tar may hold one: .check_accuracy.lock -> ../../keys."""
    victim, lock = tmp_path / "keys", tmp_path / ".lock"
    if exists:
        victim.write_text("secret")
    lock.symlink_to(victim)
    with pytest.raises(UserError, match=r"\.lock: is a link.*remove it"):
        utils.lock(lock, "taken")
    assert not utils.is_locked(lock), "none of us holds a link"
    assert victim.read_text() == "secret" if exists else not victim.exists()


def test_a_pipe_in_the_place_of_a_file_holds_nothing_up(tmp_path):
    os.mkfifo(tmp_path / "X_0_0.npy")
    code = "import sys, utils; sys.exit(len(utils.read_file(sys.argv[1])))"
    command = [sys.executable, "-c", code, str(tmp_path / "X_0_0.npy")]
    subprocess.run(command, cwd=toolkit.ROOT, check=True, timeout=toolkit.PATIENCE)
    with pytest.raises(ValueError, match="does not hold"):
        utils.read_array(tmp_path / "X_0_0.npy", np.empty(3, np.uint8))
    with pytest.raises(UserError, match="not what this toolkit writes"):
        utils.read_record(Note, tmp_path / "X_0_0.npy")
    assert utils.read_csv(tmp_path / "X_0_0.npy", {"a": int}) == []
    utils.write_csv(tmp_path / "X_0_0.npy", ["a"], [])
    assert (tmp_path / "X_0_0.npy").read_text() == "a\n"


def test_a_pipe_is_no_lock_that_anybody_holds(tmp_path):
    os.mkfifo(tmp_path / "lock")
    assert not utils.is_locked(tmp_path / "lock")


def test_a_private_folder_is_made_for_its_user_alone(tmp_path):
    old = os.umask(0)
    try:
        folder = utils.make_folder(tmp_path / "above" / "batches", private=True)
    finally:
        os.umask(old)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert utils.make_folder(folder, private=True) == folder


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o702, 0o757])
def test_a_folder_that_everybody_may_write_to_is_refused(mode, tmp_path):
    """Such as the top of the RAM disk: others could plant links there."""
    folder = tmp_path / "shm"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(UserError, match=f"everybody may write.*chmod o-w.*{folder}/batches"):
        utils.make_folder(folder, private=True)
    assert utils.make_folder(folder) == folder


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o770, 0o775])
def test_the_group_may_write_to_a_private_folder(mode, tmp_path):
    (tmp_path / "batches").mkdir()
    (tmp_path / "batches").chmod(mode)
    utils.make_folder(tmp_path / "batches", private=True)


def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    (tmp_path / "batches").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(UserError, match="belongs to another user.*another folder"):
        utils.make_folder(tmp_path / "batches", private=True)


def test_a_folder_that_cannot_be_made_or_written_to_is_one_line(shared_folder):
    (shared_folder / "file").touch()
    with pytest.raises(UserError, match="file/inner: not a folder"):
        utils.make_folder(shared_folder / "file" / "inner")
    (shared_folder / "closed").mkdir()
    (shared_folder / "closed").chmod(0o555)
    said = as_another_user(lambda: utils.make_folder(shared_folder / "closed"))
    assert "cannot be written to" in said
    said = as_another_user(lambda: utils.make_folder(shared_folder / "closed" / "inner"))
    assert "cannot be created: Permission denied" in said


# --- power failure ----------------------------------------------------------------------------


@pytest.fixture
def history(monkeypatch) -> list[tuple[str, str]]:
    """What is synced and renamed, in order: the names of the files are those at the time."""
    events = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def path_of(descriptor: int) -> str:
        return os.readlink(f"/proc/self/fd/{descriptor}")

    monkeypatch.setattr(os, "fsync", lambda d: (events.append(("sync", path_of(d))), fsync(d)))
    monkeypatch.setattr(os, "replace", lambda *p: (events.append(("name", str(p[1]))), replace(*p)))
    monkeypatch.setattr(os, "rename", lambda *p: (events.append(("name", str(p[1]))), rename(*p)))
    return events


def test_a_durable_file_is_on_the_disk_before_its_name_is(tmp_path, history):
    with utils.written_aside(tmp_path / "thing", durable=True) as file:
        file.write(b"whole")
        (aside,) = tmp_path.iterdir()
    assert history == [
        ("sync", str(aside)),
        ("name", str(tmp_path / "thing")),
        ("sync", str(tmp_path)),
    ]


def test_a_record_is_on_the_disk_before_its_name_is(tmp_path, history):
    utils.write_record(tmp_path / "note.json", Note(1, 0.5, "a", True, [], {}))
    assert [kind for kind, _ in history] == ["sync", "name", "sync"]


def test_other_files_are_not_waited_for(tmp_path, history):
    utils.write_text(tmp_path / "thing", "whole")
    assert history == [("name", str(tmp_path / "thing"))]


def test_a_folder_is_on_the_disk_before_its_name_is(tmp_path, history):
    with utils.folder_written_aside(tmp_path / "folder") as aside:
        (aside / "inner").mkdir()
        (aside / "inner" / "part").write_text("whole")
    inside = {str(aside), str(aside / "inner"), str(aside / "inner" / "part")}
    assert {path for kind, path in history[:3] if kind == "sync"} == inside
    assert history[3:] == [("name", str(tmp_path / "folder")), ("sync", str(tmp_path))]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_only_a_file_system_that_knows_no_sync_of_folders_is_excused(number, tmp_path, monkeypatch):
    fsync = os.fsync

    def fails_for_folders(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):  # noqa: PTH112
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fails_for_folders)
    expected = contextlib.nullcontext() if number == errno.EINVAL else pytest.raises(OSError)
    with expected, utils.folder_written_aside(tmp_path / "folder") as aside:
        (aside / "part").write_text("whole")
    assert names(tmp_path) == (["folder"] if number == errno.EINVAL else [])


def test_a_file_whose_folder_cannot_be_synced_counts_as_written(tmp_path, monkeypatch):
    """It has its name: whoever took it for missing would meet it at the next try."""
    sync = utils._sync

    def fails_for_the_parent(path: Path) -> None:
        if path == tmp_path:
            raise OSError(errno.EIO, "Input/output error")
        sync(path)

    monkeypatch.setattr(utils, "_sync", fails_for_the_parent)
    with utils.folder_written_aside(tmp_path / "7") as aside:
        (aside / "part").write_text("whole")
    assert names(tmp_path) == ["7"]


# --- locks ------------------------------------------------------------------------------------


def test_a_lock_that_is_another_name_of_a_file_is_refused(tmp_path):
    """A hard link: a tar may hold one. What is written into the lock would replace the content."""
    (tmp_path / "keys").write_text("secret")
    os.link(tmp_path / "keys", tmp_path / ".lock")
    with pytest.raises(UserError, match=r"\.lock: not a lock file"):
        utils.lock(tmp_path / ".lock", "taken")
    os.mkfifo(tmp_path / ".fifo")
    with pytest.raises(UserError, match=r"\.fifo: not a lock file"):
        utils.lock(tmp_path / ".fifo", "taken")
    assert (tmp_path / "keys").read_text() == "secret"
    assert not any(path.parent == tmp_path for path in utils._locks)


def test_a_lock_is_shared_by_who_may_only_read_it(tmp_path):
    path = tmp_path / ".lock"
    path.touch(mode=0o444)
    tmp_path.chmod(0o755)
    for folder in tmp_path.parents:
        if folder.owner() == "root" and folder != folder.parent and os.geteuid() == 0:
            folder.chmod(folder.stat().st_mode | 0o055)

    def share() -> bool:
        utils.lock(path, "taken", shared=True)
        return path in utils._locks

    assert as_another_user(share) is True


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/full"])
def test_a_link_to_a_device_is_not_read_for_ever(device, tmp_path):
    (tmp_path / "x.JPEG").symlink_to(device)
    with pytest.raises(OSError, match=r"x\.JPEG") as raised:
        utils.read_file(tmp_path / "x.JPEG")
    assert raised.value.errno == errno.ENXIO


def test_the_target_of_a_link_is_made_again(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "ram" / "batches")
    assert utils.make_folder(tmp_path / "link", private=True) == tmp_path / "link"
    assert (tmp_path / "ram" / "batches").stat().st_mode & 0o777 == 0o700


def test_a_lock_counts_as_held_if_the_storage_cannot_tell(tmp_path, monkeypatch):
    (tmp_path / "lock").touch()
    assert not utils.is_locked(tmp_path / "lock") and not utils.is_locked(tmp_path / "none")

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "open", fail)
    assert utils.is_locked(tmp_path / "lock")


def test_a_lock_is_one_process_s_and_ends_with_it(tmp_path):
    path = tmp_path / ".lock"
    with another_process(HOLDING, path):
        assert utils.is_locked(path)
        with pytest.raises(UserError, match="^taken$"):
            utils.lock(path, "taken")
    assert not utils.is_locked(path)
    utils.lock(path, "taken")
    assert utils.is_locked(path) and names(tmp_path) == [".lock"]


def test_an_idle_lock_of_another_user_is_free(shared_folder):
    """It may be read, but not opened for writing."""
    path = shared_folder / ".train.lock"
    path.touch()
    path.chmod(0o444)
    assert as_another_user(lambda: utils.is_locked(path)) is False
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert as_another_user(lambda: utils.is_locked(path)) is True
    path.chmod(0)
    assert as_another_user(lambda: utils.is_locked(path)) is True, "we cannot tell"


def test_locks_are_on_files_open_for_writing_not_on_folders(tmp_path):
    """On NFS a folder's lock is known to one machine alone."""
    with pytest.raises(IsADirectoryError):
        utils.lock(tmp_path, "taken")
    utils.lock(tmp_path / ".lock", "taken")
    flags = fcntl.fcntl(utils._locks[tmp_path / ".lock"], fcntl.F_GETFL)
    assert flags & os.O_ACCMODE == os.O_RDWR


def test_several_share_a_lock_that_nobody_has_alone(tmp_path):
    path = tmp_path / "note"
    path.write_text("content")
    utils.lock(path, "taken", shared=True)
    utils.lock(path, "taken", shared=True)
    with pytest.raises(UserError, match="taken"):
        utils.lock(path, "taken")
    assert path.read_text() == "content"


def test_a_look_at_a_lock_does_not_refuse_who_takes_it(tmp_path):
    """`is_locked` holds the lock for a moment."""
    path = tmp_path / ".lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    threading.Timer(0.05, os.close, [descriptor]).start()
    utils.lock(path, "taken")


def test_a_process_that_outlives_its_parent_does_not_keep_the_lock(tmp_path):
    """A forked worker has the lock's file open as well."""
    code = (
        "utils.lock(Path(sys.argv[1]), 'refused')\n"
        "import time\n"
        "worker = os.fork()\n"
        "if worker == 0: time.sleep(600); os._exit(0)\n"
        "print('ready', flush=True); print(worker, flush=True); input()"
    )
    with another_process(code, tmp_path / ".lock") as process:
        worker = int(process.stdout.readline())
        assert utils.is_locked(tmp_path / ".lock")
        process.kill()
        process.wait()
        try:  # it may have been forked just now, and must only get to its first instruction
            toolkit.wait_until(lambda: not utils.is_locked(tmp_path / ".lock"))
            assert Path(f"/proc/{worker}").exists()
        finally:
            os.kill(worker, 9)


def test_a_lock_whose_file_was_removed_is_taken_again(tmp_path):
    """`rm -f` of everything in the folder, or a logout, which removes the folder itself."""
    folder = tmp_path / "batches"
    folder.mkdir()
    path = folder / ".preprocessor.lock"
    utils.lock(path, "taken")
    utils.hold_lock(path, "lost")
    path.unlink()
    utils.hold_lock(path, "lost")
    assert utils.is_locked(path)
    path.unlink()
    folder.rmdir()
    with pytest.raises(FileNotFoundError):
        utils.hold_lock(path, "lost")
    folder.mkdir()
    utils.hold_lock(path, "lost")
    assert utils.is_locked(path)
    open_files = [
        os.readlink(each) for each in Path("/proc/self/fd").iterdir() if each.is_symlink()
    ]
    ours = [name for name in open_files if name.startswith(str(folder))]
    assert ours == [str(path)], "the files that are gone are closed"


def test_a_lock_whose_place_was_taken_is_lost(tmp_path):
    """Two preprocessors would write batches of two seeds into one folder."""
    path = tmp_path / ".preprocessor.lock"
    utils.lock(path, "taken")
    path.unlink()
    with another_process(HOLDING, path), pytest.raises(UserError, match="^lost$"):
        utils.hold_lock(path, "lost")


def test_a_lock_whose_place_nobody_holds_is_taken_again(tmp_path):
    """The folder was moved away, made again, and has come back with its old lock file."""
    path = tmp_path / ".preprocessor.lock"
    utils.lock(path, "taken")
    path.rename(tmp_path / "away")
    utils.hold_lock(path, "lost")
    (tmp_path / "away").rename(path)
    utils.hold_lock(path, "lost")
    assert utils.is_locked(path)


def test_a_lock_that_another_took_first_is_lost(tmp_path, monkeypatch):
    """Between the look and the new lock."""
    path = tmp_path / ".lock"
    utils.lock(path, "taken")
    path.unlink()
    look = os.stat

    def too_late(name: Path, **options: object) -> os.stat_result:
        try:
            return look(name, **options)
        finally:
            holder.__enter__()

    holder = another_process(HOLDING, path)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="^lost$"):
        patch.setattr(os, "stat", too_late)
        utils.hold_lock(path, "lost")
    holder.__exit__(None, None, None)


LOCKLESS = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP]


@pytest.mark.parametrize("number", LOCKLESS)
def test_a_file_system_without_locks_is_named(number, tmp_path, monkeypatch):
    def flock(_descriptor: int, _kind: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    utils.write_text(tmp_path / "file", "whole")
    assert names(tmp_path) == ["file"] and utils.is_locked(tmp_path / "file")
    with pytest.raises(UserError) as error:
        utils.lock(tmp_path / ".lock", "taken")
    words = ("does not support locks", os.strerror(number), "local disk", "NFS")
    for word in (str(tmp_path / ".lock"), *words):
        assert word in str(error.value)


# --- storage that fails -----------------------------------------------------------------------


@pytest.fixture
def storage(tmp_path, monkeypatch):
    """A file on storage that fails as told: `storage.fail(errno, times)`; `storage.pauses`."""

    class Storage:
        path = tmp_path / "picture.JPEG"
        pauses: list[float] = []

        def fail(self, number: int, times: int) -> None:
            real, left = os.open, [times]

            def fails(*arguments: object) -> object:
                left[0] -= 1
                if left[0] >= 0:
                    raise OSError(number, os.strerror(number))
                return real(*arguments)

            monkeypatch.setattr(os, "open", fails)

    storage = Storage()
    storage.path.write_bytes(b"content")
    storage.pauses = []
    monkeypatch.setattr(time, "sleep", storage.pauses.append)
    return storage


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_an_error_that_passes_is_not_noticed(number, storage):
    storage.fail(number, 3)
    assert utils.read_file(storage.path) == b"content"
    assert storage.pauses == [0.1, 0.5, 2.0]


def test_no_descriptor_is_lost_when_a_read_fails(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(IsADirectoryError):
        utils.read_file(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_error_that_stays_is_the_storages_not_the_files(storage):
    """Not an OSError, which says that a picture is broken."""
    storage.fail(errno.EIO, 1000)
    with pytest.raises(UserError) as error:
        utils.read_file(storage.path)
    for word in (str(storage.path), "5 times", "Input/output error"):
        assert word in str(error.value)
    assert sum(storage.pauses) < 10


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOENT])
def test_other_errors_are_raised_at_once(number, storage):
    storage.fail(number, 1)
    with pytest.raises(OSError) as error:
        utils.read_file(storage.path)
    assert error.value.errno == number and storage.pauses == []


def test_an_error_names_its_file(tmp_path):
    with pytest.raises(IsADirectoryError) as error:
        utils.read_file(tmp_path)
    assert error.value.filename == str(tmp_path)


# --- files that are read back -----------------------------------------------------------------


@dataclass
class Note:
    count: int
    share: float
    name: str
    done: bool
    labels: list[str]
    sides: dict[str, int]
    step: int | None = None
    rest: Any = None

    def __post_init__(self) -> None:
        if not 0 <= self.count <= 10**9:
            raise ValueError(f"count is {self.count}")


NOTE = {
    "count": 3, "share": 0.5, "name": "é", "done": True, "labels": ["a", "b"], "sides": {"256": 1}
}  # fmt: skip


def test_a_record_comes_back_as_it_was(tmp_path):
    note = Note(**NOTE, rest={"any": [1, None]})
    utils.write_record(tmp_path / "note.json", note)
    assert utils.read_record(Note, tmp_path / "note.json") == note
    assert utils.read_record(Note, tmp_path / "none.json") is None
    assert utils.read_record(Note, tmp_path / "note.json" / "below") is None


def test_names_of_a_later_version_are_passed_over():
    assert utils.as_record(Note, json.dumps(NOTE | {"new": 1}), "") == Note(**NOTE)
    whole = utils.as_record(Note, json.dumps(NOTE | {"share": 1, "step": 7}), "")
    assert whole.share == 1 and whole.step == 7


def changed(**values: object) -> str:
    return json.dumps(NOTE | values)


HOSTILE = {
    "empty": "",
    "blank": "\n",
    "zeros": "\0" * 4096,
    "cut off": json.dumps(NOTE)[:-5],
    "null": "null",
    "a number": "3",
    "a text": '"count"',
    "a list": json.dumps([NOTE]),
    "deep lists": "[" * 200_000,
    "deep objects": '{"a":' * 100_000,
    "deep inside": json.dumps(NOTE)[:-1] + ', "rest": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "a name is missing": json.dumps({**NOTE, "count": 3, "share": 1}).replace('"done"', '"gone"'),
    "not UTF-8": json.dumps(NOTE).encode().replace(b"256", b"\xff56"),
    "a number of 10,000 digits": changed(count=0).replace('"count": 0', '"count": ' + "9" * 10_000),
    "two objects": json.dumps(NOTE) * 2,
    "a comment": json.dumps(NOTE) + " # so",
    "null for a number": changed(count=None),
    "null for a list": changed(labels=None),
    "null for an object": changed(sides=None),
    "a text for a number": changed(count="3"),
    "a fraction for a whole number": changed(count=3.0),
    "yes for a number": changed(count=True),
    "yes for a fraction": changed(share=False),
    "a number for yes": changed(done=1),
    "a number for a text": changed(name=3),
    "a text for a list": changed(labels="ab"),
    "an object for a list": changed(labels={"0": "a"}),
    "a list for an object": changed(sides=[256]),
    "numbers in a list of texts": changed(labels=["a", 1]),
    "a list in a list of texts": changed(labels=["a", ["b"]]),
    "null in a list of texts": changed(labels=[None]),
    "texts in an object of numbers": changed(sides={"256": "1"}),
    "a text for a number or nothing": changed(step="7"),
    "NaN": changed(share=float("nan")),
    "infinity": changed(share=float("inf")),
    "infinity in other words": changed(share=0).replace('"share": 0', '"share": 1e999'),
    "beyond floats": changed(share=10**310),
    "below its range": changed(count=-1),
    "above its range": changed(count=10**12),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_a_file_holds_is_a_record_or_one_line(name, tmp_path):
    content = HOSTILE[name]
    path = tmp_path / "note.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        utils.read_record(Note, path)
    assert str(error.value).startswith(f"{path}: not what this toolkit writes")
    assert len(utils.printable(error.value)) < 300


def test_any_damaged_record_is_a_record_or_one_line():
    draw, read = random.Random(5), 0
    parts = ["[", "]", "{", "}", ",", ":", '"', "null", "-1", "1e999", "NaN", "\\ud800", "\0", "é"]
    for _ in range(3000):
        text = json.dumps(NOTE)
        for _ in range(draw.choice((1, 1, 2, 4))):
            at = draw.randrange(len(text))
            text = text[:at] + draw.choice([*parts, ""]) + text[at + draw.randrange(4) :]
        try:
            note = utils.as_record(Note, text, "wrong")
        except UserError as error:
            assert str(error).startswith("wrong: ")
            continue
        assert type(note.count) is int and 0 <= note.count <= 10**9
        assert abs(note.share) < 1e300 and all(type(label) is str for label in note.labels)
        read += 1
    assert 50 < read < 2900


def test_rows_with_too_few_or_too_many_cells_are_left_out(tmp_path):
    """A row that was cut off, and one that was appended to the rest of such a row."""
    (tmp_path / "table.csv").write_text("a,b\n1,2\n3\n4,5,6\n7,8\n")
    rows = utils.read_csv(tmp_path / "table.csv", {"a": int, "b": str})
    assert rows == [{"a": 1, "b": "2"}, {"a": 7, "b": "8"}]
    assert utils.read_csv(tmp_path / "none.csv", {"a": int}) == []
    (tmp_path / "empty.csv").touch()
    assert utils.read_csv(tmp_path / "empty.csv", {"a": int}) == []


@pytest.mark.parametrize("rest", [b"5,6", b"5,", b"5", b"\0" * 200_000])
def test_what_a_power_failure_left_of_a_row_is_skipped(tmp_path, rest):
    (tmp_path / "table.csv").write_bytes(b"a,b\n3,4\n" + rest)
    rows = utils.read_csv(tmp_path / "table.csv", {"a": utils.whole(0), "b": utils.number(0)})
    assert rows == [{"a": 3, "b": 4}]


TABLES = {
    "no column": b"a,c\n1,2\n",
    "another table": b"name,accuracy\nresnet,77\n",
    "a text for a number": b"a,b\nx,2\n",
    "an empty cell": b"a,b\n,2\n",
    "NaN": b"a,b\n1,nan\n",
    "infinity": b"a,b\n1,inf\n",
    "a fraction": b"a,b\n1.5,2\n",
    "5,000 digits": b"a,b\n" + b"9" * 5000 + b",2\n",
    "zeros": b"a,b\n" + b"\0" * 200_000 + b"\n",
    "a huge cell": b"a,b\n1," + b"2" * 200_000 + b"\n",
    "not UTF-8": b"a,b\n1,\xff\n",
    "a picture": b"\xff\xd8\xff\xe0" + bytes(range(256)) * 9,
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_is_not_ours_is_one_line_and_stays(name, tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(TABLES[name])
    with pytest.raises(UserError, match="table.csv: line .*move the file away"):
        utils.read_csv(path, {"a": utils.whole(0), "b": utils.number(0)})
    assert path.read_bytes() == TABLES[name]


def test_a_table_of_somebody_else_is_not_overwritten(tmp_path):
    """Nor one of ours to which somebody has added a column."""
    for head in ("name,price", "a,b,my notes"):
        (tmp_path / "table.csv").write_text(f"{head}\n1,2\n")
        with pytest.raises(UserError, match="table.csv: another table"):
            utils.write_csv(tmp_path / "table.csv", ["a", "b"], [])
        assert (tmp_path / "table.csv").read_text() == f"{head}\n1,2\n"
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    utils.write_csv(tmp_path / "table.csv", ["a", "b"], [{"a": 3, "b": 4}])
    assert (tmp_path / "table.csv").read_text() == "a,b\n3,4\n"


def test_a_folder_in_the_place_of_a_table_is_named(tmp_path):
    (tmp_path / "table.csv").mkdir()
    for use in (
        lambda: utils.read_csv(tmp_path / "table.csv", {"a": int}),
        lambda: utils.write_csv(tmp_path / "table.csv", ["a"], []),
    ):
        with pytest.raises(IsADirectoryError) as error:
            use()
        assert error.value.filename == str(tmp_path / "table.csv")
    assert names(tmp_path) == ["table.csv"]


def test_a_table_that_may_not_be_written_is_named(shared_folder):
    shared_folder.chmod(0o555)

    def write() -> list:
        try:
            utils.write_csv(shared_folder / "table.csv", ["a"], [])
        except PermissionError as error:
            return [error.filename, error.strerror]

    expected = [f"{shared_folder}/table.csv", "Permission denied"]
    assert as_another_user(write) == expected


def test_a_table_is_on_the_disk_before_its_name_is(tmp_path, history):
    utils.write_csv(tmp_path / "table.csv", ["a"], [{"a": 1 / 3}])
    assert [kind for kind, _ in history] == ["sync", "name", "sync"]
    assert (tmp_path / "table.csv").read_text() == "a\n0.333333\n"


ARRAYS = {
    "empty": b"",
    "no header": bytes(4096),
    "pickled": b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (3,), }",
    "a header of code": b"\x93NUMPY\x01\x00v\x00__import__('os').system('true')",
    "of another type": utils.npy_header(np.dtype(np.int8), (3,)) + bytes(3),
    "of another shape": utils.npy_header(np.dtype(np.uint8), (1, 3)) + bytes(3),
    "cut off": utils.npy_header(np.dtype(np.uint8), (3,)) + bytes(2),
    "too long": utils.npy_header(np.dtype(np.uint8), (3,)) + bytes(4),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_of_anything_else_is_told(name, tmp_path):
    (tmp_path / "y.npy").write_bytes(ARRAYS[name])
    with pytest.raises(ValueError, match="y.npy: "):
        utils.read_array(tmp_path / "y.npy", np.empty(3, np.uint8))


@pytest.mark.parametrize("kind", [np.float16, np.int32, np.uint8, np.int64, bool])
def test_arrays_are_what_numpy_writes(kind, tmp_path):
    array = np.arange(24).reshape(2, 3, 4).astype(kind)[:, ::2]
    utils.save_array(tmp_path / "ours.npy", array)
    np.save(tmp_path / "numpys.npy", np.ascontiguousarray(array))
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "numpys.npy").read_bytes()
    assert (tmp_path / "ours.npy").stat().st_size == utils.array_file_size(kind, array.shape)
    again = np.empty(array.shape, kind)
    assert utils.read_array(tmp_path / "ours.npy", again) is again
    assert np.array_equal(again, array)


# --- a container's limits ---------------------------------------------------------------------


def machine(folder: Path, files: dict[str, str]) -> Path:
    """A root folder with these files."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{text}\n")
    return folder


GROUPS = "sys/fs/cgroup"
QUOTAS = {
    "version 2": ({"proc/self/cgroup": "0::/", f"{GROUPS}/cpu.max": "200000 100000"}, 2),
    "rounded up": ({"proc/self/cgroup": "0::/", f"{GROUPS}/cpu.max": "150000 100000"}, 2),
    "a tenth": ({"proc/self/cgroup": "0::/", f"{GROUPS}/cpu.max": "10000 100000"}, 1),
    "none": ({"proc/self/cgroup": "0::/", f"{GROUPS}/cpu.max": "max 100000"}, 8),
    "more than there are": ({"proc/self/cgroup": "0::/", f"{GROUPS}/cpu.max": "1600000 100000"}, 8),
    "of a group around": (
        {
            "proc/self/cgroup": "0::/system.slice/docker-1.scope",
            f"{GROUPS}/system.slice/docker-1.scope/cpu.max": "max 100000",
            f"{GROUPS}/system.slice/cpu.max": "300000 100000",
        },
        3,
    ),
    "no control groups": ({}, 8),
}


@pytest.mark.parametrize("name", QUOTAS)
def test_cores_are_those_of_the_containers_quota(name, tmp_path, monkeypatch):
    files, expected = QUOTAS[name]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert utils.cores(machine(tmp_path, files)) == expected


def test_cores_where_affinity_is_unknown_as_on_macos(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert utils.cores(tmp_path) == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert utils.cores(tmp_path) == 1


MEMINFO = "MemTotal:       16000000 kB\nMemFree:          100000 kB\nMemAvailable:    8000000 kB"
VERSION_2 = {
    "proc/self/cgroup": "0::/job",
    f"{GROUPS}/job/memory.max": "4000000000",
    f"{GROUPS}/job/memory.current": "3500000000",
    f"{GROUPS}/job/memory.stat": "anon 1\nshmem 7\nactive_file 5\ninactive_file 2000000000",
}
MEMORIES = {
    "the machine's": ({"proc/meminfo": MEMINFO}, 8_192_000_000),
    "version 2": ({"proc/meminfo": MEMINFO} | VERSION_2, 2_500_000_000),
    "no limit": (
        {"proc/meminfo": MEMINFO} | VERSION_2 | {f"{GROUPS}/job/memory.max": "max"},
        8_192_000_000,
    ),
    "above the machine's": (
        {"proc/meminfo": MEMINFO} | VERSION_2
        | {f"{GROUPS}/job/memory.max": "9223372036854771712"},
        8_192_000_000,
    ),
    "over the limit": (VERSION_2 | {f"{GROUPS}/job/memory.current": "9000000000"}, 0),
    "unknown": ({}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", MEMORIES)
def test_available_memory_is_that_of_the_container(name, tmp_path):
    files, expected = MEMORIES[name]
    assert utils.available_memory(machine(tmp_path, files)) == expected


def test_this_machine_has_cores_and_memory():
    assert 1 <= utils.cores() <= os.cpu_count()
    assert utils.available_memory() > 10**8


# --- working through many things --------------------------------------------------------------


def test_results_come_in_the_order_of_the_items():
    def work(item: int) -> int:
        time.sleep(0.002 * (7 * item % 5))
        return item

    assert list(utils.map_in_order(work, range(30), 3)) == list(range(30))


def test_only_a_few_results_are_held_at_a_time():
    """The crops of ImageNet's validation pictures take 75 GB."""
    begun = []
    results = utils.map_in_order(begun.append, range(1000), 2)
    for _ in range(10):
        next(results)
    assert len(begun) < 40
    results.close()


@pytest.mark.skipif(sys.platform != "linux", reason="the size of a process is read from /proc")
def test_a_thread_that_cannot_start_is_one_line():
    code = """
import resource, threading
import utils
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2_000_000,) * 2)  # a thread's stack takes 8 MB
def main():
    threading.Thread(target=print).start()
utils.run(main)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=toolkit.ROOT, capture_output=True, text=True
    )
    toolkit.assert_one_line_error(result, "-c", "can't start new thread", "memory or processes")
