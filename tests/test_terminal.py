"""Terminals that take no lines or are closed, signals, Ctrl-C at any moment, what names may hold.

python3 -m pytest tests/test_terminal.py
"""

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import toolkit
import utils
from toolkit import PATIENCE, wait_until

import pytest


def script(folder: Path, body: str) -> list[str]:
    """The command of a small script: its `main` has this body."""
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    (folder / "script.py").write_text(
        f"import sys\nsys.path.insert(0, {str(toolkit.ROOT)!r})\n"
        f"import utils\nimport os, time\nfrom pathlib import Path\nfrom utils import UserError\n"
        f"HERE = Path({str(folder)!r})\ndef main():\n{lines}\nutils.run(main)\n"
    )
    return [sys.executable, str(folder / "script.py")]


@contextlib.contextmanager
def terminal(columns: int = 80) -> Iterator[tuple[int, int]]:
    """A terminal of this width: what a user's program reads, and what scripts write to."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    try:
        yield ours, theirs
    finally:
        os.close(ours)
        os.close(theirs)


def start(command: list[str], output: int, **options: object) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, **options
    )


def screen(command: list[str], columns: int) -> tuple[list[str], list[str]]:
    """The lines that a terminal shows at the end, and all that its last line ever showed."""
    with terminal(columns) as (ours, theirs):
        process, content = start(command, theirs), bytearray()

        def read() -> None:
            with contextlib.suppress(OSError):
                while data := os.read(ours, 4096):
                    content.extend(data)
                    if b"THE END" in content:
                        return

        reader = threading.Thread(target=read)
        reader.start()
        assert process.wait(PATIENCE) == 0
        os.write(theirs, b"THE END")
        reader.join()
    text = content.decode().removesuffix("THE END").replace("\r\n", "\n")
    shown = text.split("\n")
    lasting = [re.split("\r\x1b\\[K", line)[-1] for line in shown]
    passing = [part for line in shown for part in re.split("\r\x1b\\[K", line)]
    return lasting, passing


# --- what names may hold ----------------------------------------------------------------------

NAMES = {
    "a title": "\x1b]0;OWNED\x07x.JPEG",
    "colours": "\x1b[31mred\x1b[0m",
    "an eight-bit escape": "\x9b31mred",
    "a line break": "a\nscript.py: error: b",
    "a return": "99% right\r00% wrong",
    "a backspace": "secret\b\b\b\b\b\b",
    "a tab and a bell": "a\tb\x07",
    "a mark that reverses": "x\u202eGEPJ.exe",
    "an isolate": "\u2066x\u2069",
    "invisible": "a\u200bb\ufeffc\u00ad",
    "a line separator": "a\u2028b\u2029c",
    "no UTF-8": "caf\udce9",
    "a zero": "a\0b",
}


@pytest.mark.parametrize("name", NAMES)
def test_what_a_name_holds_does_nothing_to_the_terminal(name, tmp_path):
    body = f"""
name = {NAMES[name]!r}
utils.warn(name)
print(utils.printable(name))
raise UserError(name)
"""
    result = subprocess.run(script(tmp_path, body), capture_output=True)
    assert result.returncode == 2
    out, err = result.stdout.decode(), result.stderr.decode()
    assert out.endswith("\n") and out[:-1].isprintable()
    assert err.count("\n") == 2 and err.replace("\n", "").isprintable()
    for line in err.splitlines():
        assert line.startswith("script.py: ")


def test_a_line_break_is_all_that_print_lets_through(tmp_path):
    names = [name for name in NAMES.values() if "\n" not in name]
    result = subprocess.run(script(tmp_path, f"print(*{names!r}, sep='|')"), capture_output=True)
    assert result.returncode == 0
    line = result.stdout.decode()
    assert line.endswith("\n") and line[:-1].isprintable() and "\\x1b]0;OWNED" in line


def test_what_can_be_seen_stays_as_it_is():
    for text in ("café", "猫.JPEG", "a b", "C:\\x", "100% … 'q'", "🐈"):
        assert utils.printable(text) == text
    assert utils.printable(Path("a\x1b")) == "a\\x1b"


# --- a terminal that takes no lines -----------------------------------------------------------

WORKING = """
step = 0
with utils.stop_on_signals() as stop:
    while not stop.is_set():
        print("step", step, "x" * 200)
        utils.show_status("at work")
        step += 1
        (HERE / "new").write_text(str(step))
        (HERE / "new").rename(HERE / "step")
        time.sleep(0.0005)
    (HERE / "saved").touch()
"""
"""What train.py does: lines, a status line, and at the end a state that is saved."""


def step_of(folder: Path) -> int:
    file = folder / "step"
    return int(file.read_text()) if file.exists() else 0


@pytest.mark.parametrize("how", ["nobody reads", "Ctrl-S"])
def test_work_goes_on_and_ends_in_order_on_a_held_terminal(how, tmp_path):
    with terminal() as (ours, theirs):
        if how == "Ctrl-S":
            os.write(ours, b"\x13")
        process = start(script(tmp_path, WORKING), theirs)
        wait_until(lambda: step_of(tmp_path) > 3000, process)  # 600 kB; a terminal takes 64 at most
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    assert (tmp_path / "saved").exists()


def test_work_goes_on_when_the_terminal_is_gone(tmp_path):
    """Every write fails then."""
    with terminal() as (_, theirs):
        process = start(script(tmp_path, WORKING), theirs)
        wait_until(lambda: step_of(tmp_path) > 10, process)
    wait_until(lambda: step_of(tmp_path) > 1000, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0 and (tmp_path / "saved").exists()


def test_an_output_that_nobody_reads_leaves_the_other_alone(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    body = "for i in range(100): print(i)\ntime.sleep(0.2)\nutils.warn('mind')"
    result = subprocess.run(script(tmp_path, body), stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (result.returncode, result.stderr) == (0, b"script.py: warning: mind\n")


@pytest.mark.parametrize(
    "command", [["preprocess.py", "--shorter_side=256"], ["preprocess_val.py"]]
)
def test_scripts_end_on_a_terminal_that_nobody_reads(command, config, tmp_path):
    with terminal() as (ours, theirs):
        os.write(ours, b"\x13")
        process = start(toolkit.command(command[0], config, *command[1:]), theirs)
        assert process.wait(PATIENCE) == 0
    made = {path.suffix for path in (tmp_path / "preprocessed").rglob("*.*")}
    assert made & {".JPEG", ".npy"}


def test_no_line_of_a_burst_is_lost_to_who_reads(tmp_path):
    """Such as the names of all broken pictures, into a file or through a pipe."""
    command = script(tmp_path, "for i in range(20_000): print(i, 'x' * 100)")
    through_a_pipe = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout
    with open(tmp_path / "log", "w+") as log:
        subprocess.run(command, stdout=log)
        log.seek(0)
        assert through_a_pipe == log.read()
    assert [int(line.split()[0]) for line in through_a_pipe.splitlines()] == list(range(20_000))


def test_a_script_whose_lines_are_its_product_waits_for_its_reader(tmp_path):
    """As `resnet50.py … | less` does."""
    command = script(tmp_path, "for i in range(3_000): print(i, 'x' * 100)")
    path = Path(command[1])
    path.write_text(
        path.read_text().replace("utils.run(main)", "utils.run(main, lines_are_product=True)")
    )
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        time.sleep(4)  # a script that may lose lines gives up after a second
        lines = process.stdout.read().splitlines()
    assert [int(line.split()[0]) for line in lines] == list(range(3_000))
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2 and "No space left on device" in result.stderr
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=PATIENCE) == 1 and process.stderr.read() == b""


def test_threads_print_whole_lines(tmp_path):
    body = """
import threading
def lines(name):
    for _ in range(300):
        sys.stdout.write(name * 20)
        time.sleep(0)
        sys.stdout.write(chr(10))
threads = [threading.Thread(target=lines, args=[name]) for name in "abcd"]
for each in threads: each.start()
for each in threads: each.join()
"""
    result = subprocess.run(script(tmp_path, body), stdout=subprocess.PIPE, text=True)
    assert sorted(result.stdout.split()) == sorted([name * 20 for name in "abcd"] * 300)


def test_lines_of_forked_processes_are_printed_once(tmp_path):
    body = """
print("before")
if os.fork() == 0:
    print("in the child")
    os._exit(0)
os.wait()
print("after")
"""
    result = subprocess.run(script(tmp_path, body), stdout=subprocess.PIPE, text=True)
    assert result.stdout.splitlines() == ["before", "in the child", "after"]


@pytest.mark.parametrize("columns", [20, 80])
def test_a_status_line_fits_and_leaves_no_residue(columns, tmp_path):
    body = """
utils.show_status("a long status " * 20)
utils.show_status("short")
print("a line")
utils.show_status("another status " * 20)
utils.warn("mind")
"""
    lasting, passing = screen(script(tmp_path, body), columns)
    assert lasting == ["a line", "script.py: warning: mind", ""]
    assert [part for part in passing if part.startswith("a long")]
    assert all(len(part) < columns for part in passing if "status" in part)


def test_there_is_no_status_line_in_a_file(tmp_path):
    result = subprocess.run(
        script(tmp_path, "utils.show_status('at work')\nprint('done')"), stdout=subprocess.PIPE
    )
    assert result.stdout == b"done\n"


PROGRESS = """
progress = utils.Progress(1_281_167, "pictures")
progress.add()
progress._next = 0
progress.add(600_000)
progress.add(681_166)
"""


@pytest.mark.parametrize("columns", [30, 80, 200])
def test_progress_is_a_bar_that_ends_as_a_line(columns, tmp_path):
    lasting, passing = screen(script(tmp_path, PROGRESS), columns)
    assert len(lasting) == 2 and lasting[1] == ""
    assert lasting[0].startswith("1,281,167 of 1,281,167 pictures, ")
    bars = [part for part in passing if "█" in part or "░" in part]
    assert bars and all(len(part) < columns for part in bars)


def test_progress_in_a_file_is_lines(tmp_path):
    result = subprocess.run(script(tmp_path, PROGRESS), stdout=subprocess.PIPE, text=True)
    assert [line.split(" of")[0] for line in result.stdout.splitlines()] == [
        "1", "600,001", "1,281,167"
    ]  # fmt: skip
    assert "\r" not in result.stdout and "█" not in result.stdout


# --- signals ----------------------------------------------------------------------------------

STOPPING = """
with utils.stop_on_signals() as stop:
    (HERE / "ready").touch()
    while not stop.wait(0.05):
        pass
    (HERE / "stopping").touch()
    while not (HERE / "go").exists():  # it saves
        time.sleep(0.005)
(HERE / "saved").touch()
sys.exit(128 + stop.number)
"""
HUP, INT, TERM = signal.SIGHUP, signal.SIGINT, signal.SIGTERM


@pytest.fixture
def stopping(tmp_path) -> Iterator[subprocess.Popen]:
    process = start(script(tmp_path, STOPPING), subprocess.DEVNULL, start_new_session=True)
    wait_until((tmp_path / "ready").exists, process)
    yield process
    process.kill()
    process.wait()


GENTLE = [[HUP, 0.0003, HUP], [TERM, 0, HUP], [HUP, 0, TERM], [INT, 0.3, INT], [INT, 0, TERM]]
GENTLE += [[TERM, 1.2, HUP], [HUP, 1.2, HUP], [INT, 1.2, TERM], [TERM]]


@pytest.mark.parametrize("signals", GENTLE, ids=str)
def test_the_first_signal_stops_and_the_next_changes_nothing(signals, stopping, tmp_path):
    """A terminal that closes sends SIGHUP twice, systemd SIGTERM and then SIGHUP."""
    for each in signals:
        if isinstance(each, float):
            time.sleep(each)
        elif each:
            stopping.send_signal(each)
    wait_until((tmp_path / "stopping").exists, stopping)
    (tmp_path / "go").touch()
    # Of signals that come at the same time, Python handles the one with the lower number first.
    assert stopping.wait(PATIENCE) in {128 + each for each in signals if each >= 1}
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("first", [INT, TERM, HUP])
def test_a_second_ctrl_c_after_a_second_ends_at_once(first, stopping, tmp_path):
    stopping.send_signal(first)
    wait_until((tmp_path / "stopping").exists, stopping)
    time.sleep(1.1)
    stopping.send_signal(INT)
    assert stopping.wait(PATIENCE) == 130
    assert not (tmp_path / "saved").exists()


def test_nohup_makes_it_deaf_to_a_terminal_that_closes(tmp_path):
    command = ["nohup", *script(tmp_path, STOPPING)]
    process = start(command, subprocess.DEVNULL)
    wait_until((tmp_path / "ready").exists, process)
    for _ in range(2):
        process.send_signal(HUP)
    (tmp_path / "go").touch()
    time.sleep(0.2)  # it would have ended
    assert process.poll() is None
    process.send_signal(TERM)
    assert process.wait(PATIENCE) == 128 + TERM


def test_what_was_before_is_there_again():
    before = [signal.getsignal(number) for number in (INT, TERM, HUP)]
    with utils.stop_on_signals() as stop:
        assert not stop.wait(0.01) and not stop.is_set()
        os.kill(os.getpid(), TERM)
        assert stop.wait(PATIENCE) and stop.number == TERM
    assert [signal.getsignal(number) for number in (INT, TERM, HUP)] == before


def test_a_closed_terminal_stops_a_script_in_order(tmp_path):
    """The kernel sends SIGHUP to all that run there."""
    code = "import pty, sys; pty.spawn(sys.argv[1:])"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, *script(tmp_path, STOPPING)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    wait_until((tmp_path / "ready").exists)
    holder.kill()  # the terminal goes with it
    holder.wait()
    wait_until((tmp_path / "stopping").exists)
    (tmp_path / "go").touch()
    wait_until((tmp_path / "saved").exists)


# --- Ctrl-C while a script starts -------------------------------------------------------------

INTERRUPT = """
import os, signal, sys
utils_seen = False
def hook(event, arguments):
    global utils_seen
    if event == "import":
        utils_seen |= arguments[0] == "utils"
        if utils_seen and arguments[0] == os.environ["DURING"]:
            os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(hook)
"""
"""Ctrl-C when a module begins to be imported after `utils` did."""

DURING = {
    "preprocess.py": ["argparse", "tomllib", "numpy", "PIL", "PIL.Image", "ctypes"],
    "preprocess_val.py": ["dataclasses", "fcntl", "numpy.linalg", "preprocess"],
    "get_mu_sigma.py": ["csv", "concurrent.futures.thread", "preprocess"],
    "runtime_preprocessing.py": ["queue", "typing", "preprocess"],
    "train.py": ["shutil", "tensorflow", "resnet50"],
    "check_accuracy.py": ["preprocess_val"],
    "resnet50.py": ["tensorflow.python"],
}


@pytest.mark.parametrize(
    ("script", "module"), [(name, each) for name in DURING for each in DURING[name]]
)
def test_ctrl_c_while_a_script_starts_is_one_line(script, module, config, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(INTERRUPT)
    result = toolkit.run(
        script,
        config,
        "--help",
        PYTHONPATH=str(tmp_path),
        DURING=module,
        PYTHONDONTWRITEBYTECODE="1",
    )
    assert result.stderr == f"{script}: stopped\n"
    assert result.returncode == 130 and result.stdout == ""


def test_ctrl_c_later_is_one_line_too(tmp_path):
    command = script(tmp_path, "(HERE / 'ready').touch()\ntime.sleep(100)")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_until((tmp_path / "ready").exists, process)
    process.send_signal(INT)
    assert process.communicate(timeout=PATIENCE)[1] == "script.py: stopped\n"
    assert process.returncode == 130


# --- Python that looks for modules elsewhere --------------------------------------------------


@pytest.mark.parametrize("script", [*DURING])
def test_scripts_find_their_modules_in_an_isolated_python(script, tmp_path):
    command = [sys.executable, "-I", str(toolkit.ROOT / script), "--help"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "example:" in result.stdout


@pytest.mark.parametrize("script", [*DURING][:4])
def test_scripts_find_their_modules_on_a_safe_path_and_through_a_link(script, tmp_path):
    (tmp_path / "linked.py").symlink_to(toolkit.ROOT / script)
    result = subprocess.run(
        [sys.executable, str(tmp_path / "linked.py"), "--help"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_what_lies_in_the_current_folder_is_not_imported(tmp_path):
    for name in ("utils", "preprocess", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a stranger')\n")
    result = subprocess.run(
        toolkit.command("preprocess.py", None, "--help"), cwd=tmp_path, capture_output=True
    )
    assert result.returncode == 0
