"""Files and folders that appear whole, leftovers, locks, storage that fails, a container's limits.

python3 -m pytest tests/test_files.py
"""

import contextlib
import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import toolkit
import utils
from utils import UserError

import numpy as np
import pytest

TOKEN = "0123456789abcdef"


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@contextlib.contextmanager
def another_process(code: str, *arguments: object):
    """Runs Python code that prints a line and then waits in `input()`; until then it is held.

    Its process number means nothing here, as that of a process in another container.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", f"import os, sys, utils\nos.getpid = lambda: 4194304\n{code}"]
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
    "array": "with utils.array_written_aside(Path(sys.argv[1]), 'u1', (4,)) as file:\n"
    "    file.write(b'half'); file.flush(); print('ready', flush=True); input()",
    "file": "with utils.written_aside(Path(sys.argv[1])) as aside:\n"
    "    aside.write_text('half'); print('ready', flush=True); input()",
    "folder": "with utils.folder_written_aside(Path(sys.argv[1])) as aside:\n"
    "    (aside / 'part').write_text('half'); print('ready', flush=True); input()",
}
HOLDING = "utils.lock(Path(sys.argv[1]), 'refused'); print('ready', flush=True); input()"


# --- leftovers --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRITING)
def test_what_a_process_of_another_container_writes_is_no_leftover(kind, tmp_path):
    path = tmp_path / "thing"
    with another_process(f"from pathlib import Path\n{WRITING[kind]}", path) as process:
        half = names(tmp_path)
        assert half and path.name not in half
        utils.remove_leftovers(tmp_path)
        assert names(tmp_path) == half
        process.communicate("\n")
        assert process.returncode == 0
    assert names(tmp_path) == [path.name]
    assert (path / "part" if kind == "folder" else path).read_bytes()[-4:] == b"half"


@pytest.mark.parametrize("kind", WRITING)
def test_what_a_killed_process_left_is_removed(kind, tmp_path):
    with another_process(f"from pathlib import Path\n{WRITING[kind]}", tmp_path / "thing"):
        pass
    assert names(tmp_path)
    utils.remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_a_process_that_removes_leftovers_may_be_killed_halfway(tmp_path):
    """Its work is finished by the next: a folder without its lock file is a leftover."""
    folder = tmp_path / f".thing.aside-{TOKEN}"
    folder.mkdir()
    (folder / "part").write_text("half")
    utils.remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def write(path: Path, kind: str) -> None:
    if kind == "array":
        utils.save_array(path, np.frombuffer(b"whole", np.uint8))
    elif kind == "file":
        utils.write_text(path, "whole")
    else:
        with utils.folder_written_aside(path) as aside:
            (aside / "part").write_text("whole")
            utils.remove_leftovers(path.parent)


@pytest.mark.parametrize("kind", WRITING)
def test_a_file_not_yet_locked_may_be_removed_and_nothing_is_lost(kind, tmp_path, monkeypatch):
    """Removing leftovers at the worst moment, twice."""
    try_lock, moments = utils._try_lock, iter("12")

    def late(descriptor: int, *kind: int) -> bool:
        if next(moments, None):
            monkeypatch.setattr(utils, "_try_lock", try_lock)
            utils.remove_leftovers(tmp_path)
            assert names(tmp_path) == []
            monkeypatch.setattr(utils, "_try_lock", late)
        return try_lock(descriptor, *kind)

    monkeypatch.setattr(utils, "_try_lock", late)
    write(tmp_path / "thing", kind)
    assert next(moments, None) is None
    assert names(tmp_path) == ["thing"]


def test_removing_leftovers_all_the_time_disturbs_no_writer(ram):
    stop = threading.Event()

    def remove() -> None:
        while not stop.is_set():
            utils.remove_leftovers(ram)

    def write_all(thread: int) -> None:
        for number in range(50):
            for kind in WRITING:
                write(ram / f"{kind}_{thread}_{number}", kind)

    removers = [threading.Thread(target=remove) for _ in range(2)]
    for remover in removers:
        remover.start()
    try:
        for _ in utils.map_in_order(write_all, range(3), 3):
            pass
    finally:
        stop.set()
        for remover in removers:
            remover.join()
    files = [path for path in ram.rglob("*") if path.is_file()]
    assert len(files) == 450 and {path.read_bytes()[-5:] for path in files} == {b"whole"}
    assert not any(utils.is_leftover(name) for name in os.listdir(ram))


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
    (tmp_path / f".link.aside-{TOKEN}").symlink_to(target)
    (tmp_path / f".other.aside-{TOKEN}").symlink_to(target / "file")
    (tmp_path / f".ours.aside-{TOKEN}").write_text("half")
    before = names(tmp_path)
    utils.remove_leftovers(tmp_path)
    assert set(before) - set(names(tmp_path)) == {f".ours.aside-{TOKEN}"}
    assert (target / "file").exists()


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127, "€" * 85, ".", "…" + "\udcff" * 200])
def test_names_as_long_as_the_file_system_allows(name, tmp_path):
    name = "a" if name == "." else name
    assert len(os.fsencode(name)) <= 255
    with utils.written_aside(tmp_path / name) as aside:
        assert utils.is_leftover(aside.name) and len(os.fsencode(aside.name)) <= 140
        aside.write_text("whole")
    with utils.folder_written_aside(tmp_path / "above") as above:
        (above / name).write_text("whole")
    (tmp_path / name).unlink()
    with utils.folder_written_aside(tmp_path / name) as aside:
        (aside / "part").write_text("whole")
    assert names(tmp_path) == sorted(["above", name])


def test_temporary_names_never_repeat_not_even_after_a_fork(tmp_path):
    path = tmp_path / "thing"
    assert len({utils.aside_name(path) for _ in range(1000)}) == 1000
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.write(writing, os.fsencode(utils.aside_name(path)))
        os._exit(0)
    os.wait()
    assert os.read(reading, 1000) != os.fsencode(utils.aside_name(path))


def test_a_write_that_fails_leaves_nothing_and_the_old_file(tmp_path):
    utils.write_text(tmp_path / "thing", "old")
    with pytest.raises(OSError) as error, utils.written_aside(tmp_path / "thing") as aside:
        aside.write_text("new")
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
    with utils.written_aside(tmp_path / "thing", durable=True) as aside:
        aside.write_text("whole")
    assert history == [
        ("sync", str(aside)),
        ("name", str(tmp_path / "thing")),
        ("sync", str(tmp_path)),
    ]


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


# --- locks ------------------------------------------------------------------------------------


def test_a_lock_counts_as_held_if_the_storage_cannot_tell(tmp_path, monkeypatch):
    (tmp_path / "lock").touch()
    assert not utils.is_locked(tmp_path / "lock") and not utils.is_locked(tmp_path / "none")

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "open", fail)
    monkeypatch.setattr(os, "stat", fail)
    assert utils.is_locked(tmp_path / "lock")


def test_a_lock_is_one_process_s_and_ends_with_it(tmp_path):
    path = tmp_path / ".lock"
    with another_process(f"from pathlib import Path\n{HOLDING}", path):
        assert utils.is_locked(path)
        with pytest.raises(UserError, match="^taken$"):
            utils.lock(path, "taken")
    assert not utils.is_locked(path)
    utils.lock(path, "taken")
    assert utils.is_locked(path)


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
    path.chmod(0o444)
    utils.lock(path, "taken", shared=True)
    utils.lock(path, "taken", shared=True)
    path.chmod(0o644)
    with pytest.raises(UserError, match="taken"):
        utils.lock(path, "taken")
    assert path.read_text() == "content"


def test_a_lock_file_is_not_removed_while_another_process_holds_it(tmp_path):
    path = tmp_path / ".trainer.lock"
    with another_process(f"from pathlib import Path\n{HOLDING}", path):
        utils.remove_lock(path)
        with pytest.raises(UserError, match="taken"):
            utils.lock(path, "taken")
    utils.remove_lock(path)
    assert names(tmp_path) == []


def test_a_process_removes_its_own_lock_file(tmp_path):
    path = tmp_path / ".lock"
    for _ in range(2):
        utils.lock(path, "taken")
        utils.remove_lock(path)
        assert names(tmp_path) == []
    utils.remove_lock(path)


def test_a_lock_on_a_file_that_was_just_removed_is_taken_again(tmp_path, monkeypatch):
    """Else two processes hold "the" lock: one of a file without a name."""
    path, try_lock = tmp_path / ".lock", utils._try_lock

    def late(descriptor: int, *kind: int) -> bool:
        monkeypatch.setattr(utils, "_try_lock", try_lock)
        path.unlink()
        return try_lock(descriptor, *kind)

    monkeypatch.setattr(utils, "_try_lock", late)
    utils.lock(path, "taken")
    assert utils.is_locked(path)
    with another_process(f"from pathlib import Path\n{HOLDING}", tmp_path / "other"):
        utils.lock(path.with_name("third"), "taken")
    with pytest.raises(UserError, match="taken"):
        utils.lock(path, "taken")


def test_the_lock_file_of_a_newer_holder_is_not_removed(tmp_path, monkeypatch):
    """Who opened the old file, removed since, must not unlink the new one of the same name."""
    path, try_lock = tmp_path / ".lock", utils._try_lock
    path.touch()

    def late(descriptor: int, *kind: int) -> bool:
        monkeypatch.setattr(utils, "_try_lock", try_lock)
        path.unlink()
        utils.lock(path, "taken")
        return try_lock(descriptor, *kind)

    monkeypatch.setattr(utils, "_try_lock", late)
    with utils._unless_held(path) as free:
        assert not free
    assert utils.is_locked(path)


def test_a_look_at_a_lock_does_not_refuse_who_takes_it(tmp_path):
    """`is_locked` holds the lock for a moment."""
    path = tmp_path / ".lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    threading.Timer(0.05, os.close, [descriptor]).start()
    utils.lock(path, "taken")


LOCKLESS = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP]


@pytest.mark.parametrize("number", LOCKLESS)
def test_without_locks_files_are_written_and_nothing_is_removed(number, tmp_path, monkeypatch):
    def flock(_descriptor: int, _kind: int) -> None:
        raise OSError(number, os.strerror(number))

    leftover = tmp_path / f".thing.aside-{TOKEN}"
    leftover.write_text("perhaps only half of it")
    monkeypatch.setattr(fcntl, "flock", flock)
    utils.write_text(tmp_path / "file", "whole")
    with utils.folder_written_aside(tmp_path / "folder") as aside:
        (aside / "part").write_text("whole")
        utils.remove_leftovers(tmp_path)
        assert (aside / "part").exists()
    assert names(tmp_path) == sorted([leftover.name, "file", "folder"])
    with pytest.raises(UserError) as error:
        utils.lock(tmp_path / ".lock", "taken")
    words = ("does not support locks", os.strerror(number), "local disk", "NFS")
    for word in (str(tmp_path / ".lock"), *words):
        assert word in str(error.value)


def test_a_script_on_a_file_system_without_locks_says_so(config, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import errno, fcntl, os\n"
        "def flock(*_):\n    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))\n"
        "fcntl.flock = flock\n"
    )
    result = toolkit.run("preprocess.py", config, "--shorter_side=256", PYTHONPATH=str(tmp_path))
    toolkit.assert_one_line_error(
        result, "preprocess.py", str(tmp_path / "preprocessed"), "not support locks", "local disk"
    )


# --- storage that fails -----------------------------------------------------------------------


@pytest.fixture
def storage(tmp_path, monkeypatch):
    """A file on storage that fails as told: `storage.fail(errno, times)`; `storage.pauses`."""

    class Storage:
        path = tmp_path / "picture.JPEG"
        pauses: list[float] = []

        def fail(self, number: int, times: int, call: str = "read") -> None:
            real, left = getattr(os, call), [times]

            def fails(*arguments: object) -> object:
                left[0] -= 1
                if left[0] >= 0:
                    raise OSError(number, os.strerror(number))
                return real(*arguments)

            monkeypatch.setattr(os, call, fails)

    storage = Storage()
    storage.path.write_bytes(b"content")
    storage.pauses = []
    monkeypatch.setattr(time, "sleep", storage.pauses.append)
    return storage


@pytest.mark.parametrize("call", ["open", "read", "fstat"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_an_error_that_passes_is_not_noticed(number, call, storage):
    storage.fail(number, 3, call)
    assert utils.read_file(storage.path) == b"content"
    assert storage.pauses == [0.1, 0.5, 2.0]


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
    storage.fail(number, 1, "open")
    with pytest.raises(OSError) as error:
        utils.read_file(storage.path)
    assert error.value.errno == number and storage.pauses == []


def test_an_error_names_its_file(tmp_path):
    with pytest.raises(IsADirectoryError) as error:
        utils.read_file(tmp_path)
    assert error.value.filename == str(tmp_path)


def test_no_descriptor_is_lost_while_trying(storage):
    before = len(os.listdir("/proc/self/fd"))
    storage.fail(errno.EIO, 4)
    utils.read_file(storage.path)
    assert len(os.listdir("/proc/self/fd")) == before


# --- tables -----------------------------------------------------------------------------------


def test_rows_with_too_few_or_too_many_cells_are_left_out(tmp_path):
    """A row that was cut off, and one that was appended to the rest of such a row."""
    (tmp_path / "table.csv").write_text("a,b\n1,2\n3\n4,5,6\n7,8\n")
    rows = utils.read_csv(tmp_path / "table.csv", ["a", "b"])
    assert rows == [{"a": "1", "b": "2"}, {"a": "7", "b": "8"}]


def test_a_table_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    told, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (told.append("sync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (told.append("name"), replace(*names)))
    utils.write_csv(tmp_path / "table.csv", ["a"], [{"a": 1}])
    assert told[:2] == ["sync", "name"]


def test_a_table_that_a_power_failure_left_is_one_line(tmp_path):
    (tmp_path / "table.csv").write_bytes(b"a,b\n" + b"\0" * 200_000)
    with pytest.raises(utils.UserError, match="table.csv: .*move the file away"):
        utils.read_csv(tmp_path / "table.csv", ["a", "b"])


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
    "version 1": (
        {
            "proc/self/cgroup": "5:memory:/docker/1\n4:cpu,cpuacct:/docker/1\n1:name=systemd:/x",
            f"{GROUPS}/cpu/cpu.cfs_quota_us": "250000",
            f"{GROUPS}/cpu/cpu.cfs_period_us": "100000",
        },
        3,
    ),
    "version 1 without": (
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/",
            f"{GROUPS}/cpu/cpu.cfs_quota_us": "-1",
            f"{GROUPS}/cpu/cpu.cfs_period_us": "100000",
        },
        8,
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
VERSION_1 = {
    "proc/self/cgroup": "9:memory:/docker/1",
    f"{GROUPS}/memory/memory.limit_in_bytes": "4000000000",
    f"{GROUPS}/memory/memory.usage_in_bytes": "3500000000",
    f"{GROUPS}/memory/memory.stat": "inactive_file 5\ntotal_inactive_file 500000000",
}
MEMORIES = {
    "the machine's": ({"proc/meminfo": MEMINFO}, 8_192_000_000),
    "version 2": ({"proc/meminfo": MEMINFO} | VERSION_2, 2_500_000_000),
    "version 1": ({"proc/meminfo": MEMINFO} | VERSION_1, 1_000_000_000),
    "no limit": (
        {"proc/meminfo": MEMINFO} | VERSION_2 | {f"{GROUPS}/job/memory.max": "max"},
        8_192_000_000,
    ),
    "above the machine's": (
        {"proc/meminfo": MEMINFO} | VERSION_1
        | {f"{GROUPS}/memory/memory.limit_in_bytes": "9223372036854771712"},
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
