"""Plants one fault at a time into a copy of the scripts, and says which test sees it.

    python3 tests/campaigns/plant_faults.py

prints a line per fault: what it is, in which module, the test that fails, and how long that took;
at the end the faults that no test sees. Its status is 1 if there are any. `--only=WORD` takes those
whose module or name has the word, `--list` prints them all, `--jobs=2` runs two at a time. All of
them take half an hour on two cores. The scripts themselves are never changed.
"""

import argparse
import ast
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FAULTS = Path(__file__).with_name("faults")
SECONDS = 600
"""Tests that take longer are ended; the fault then counts as not seen."""


@dataclass(frozen=True)
class Fault:
    module: str
    name: str
    old: str
    """Stands exactly once in the module."""
    new: str
    file: str
    """Of the tests."""
    tests: str
    """pytest's -k expression: the quickest tests that should see it."""


def main() -> None:
    args = parse_arguments()
    faults = [fault for fault in read_faults() if args.only in f"{fault.module} {fault.name}"]
    wrong = [line for fault in faults if (line := why_wrong(fault))]
    if wrong or not faults:
        sys.exit("\n".join(wrong) or f"no fault of that name: {args.only}")
    if args.list:
        for fault in faults:
            print(f"{fault.module:26} {fault.name:46} {fault.file}: {fault.tests}")
        return
    check_tests(faults)
    start, survivors = time.monotonic(), []
    print(f"{'fault':46} {'module':26} {'killed by':80} seconds")
    with ThreadPoolExecutor(args.jobs) as pool:
        for fault, (killer, seconds) in zip(faults, pool.map(outcome, faults), strict=True):
            print(f"{fault.name:46} {fault.module:26} {killer[:80]:80} {seconds:7.1f}", flush=True)
            survivors += [fault] * (not killer.startswith("test_"))
    print(
        f"{len(faults)} faults, {len(faults) - len(survivors)} killed, {len(survivors)} not, in "
        f"{(time.monotonic() - start) / 60:.0f} min"
    )
    for fault in survivors:
        print(f"not killed: {fault.module}: {fault.name}")
    sys.exit(bool(survivors))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Plants faults, and says which test sees them.")
    parser.add_argument("--only", default="", metavar="WORD", help="of this module or name")
    parser.add_argument("--list", action="store_true", help="print the faults and exit")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="faults at a time")
    return parser.parse_args()


def read_faults() -> Iterator[Fault]:
    """The faults in the files of FAULTS, one per module. Raises ValueError for a strange line."""
    for path in sorted(FAULTS.glob("*.txt")):
        head, old, new = None, [], []
        for line in [*path.read_text().splitlines(), "end"]:
            if line.startswith("- "):
                old.append(line[2:])
            elif line.startswith("+ ") or line == "+":
                new.append(line[2:])
            elif line and not line.startswith("#"):
                if head:
                    module = path.with_suffix(".py").name
                    yield Fault(module, head[1], "\n".join(old), "\n".join(new), *head.groups()[1:])
                head, old, new = re.fullmatch(r"(.+?) +@ (\w+) (.+)", line), [], []
                if not head and line != "end":
                    raise ValueError(f"{path}: {line}")


def planted(fault: Fault) -> str:
    """The module with the fault in it."""
    return (ROOT / fault.module).read_text().replace(fault.old, fault.new)


def why_wrong(fault: Fault) -> str:
    """Why the fault cannot be planted; "" if it can."""
    count = (ROOT / fault.module).read_text().count(fault.old)
    if count != 1:
        return f"{fault.module}: {fault.name}: its text is found {count} times"
    try:
        ast.parse(planted(fault))
    except SyntaxError as error:
        return f"{fault.module}: {fault.name}: {error}"
    return ""


def check_tests(faults: list[Fault]) -> None:
    """Ends the command if a test fails without any fault."""
    for file in sorted({fault.file for fault in faults}):
        tests = {f"({fault.tests})" for fault in faults if fault.file == file}
        killer, seconds = outcome(Fault("", "", "", "", file, " or ".join(sorted(tests))))
        if killer != "nobody":
            sys.exit(f"test_{file}.py fails without a fault: {killer}")
        print(f"test_{file}.py passes without a fault, {seconds:.0f} s", flush=True)


def outcome(fault: Fault) -> tuple[str, float]:
    """The test that kills the fault, else "nobody" or "timeout"; and the seconds that it took."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as temporary:
        copy = Path(temporary) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "__pycache__", ".*cache"))
        if fault.module:
            (copy / fault.module).write_text(planted(fault))
        killer = run_tests(fault, copy)
    return killer, time.monotonic() - start


def run_tests(fault: Fault, copy: Path) -> str:
    """Runs the fault's tests in the copy. Ends all that they have started."""
    command = [sys.executable, "-m", "pytest", f"tests/test_{fault.file}.py", "-k", fault.tests]
    process = subprocess.Popen(
        [*command, "-x", "-q", "-p", "no:cacheprovider", f"--basetemp={copy.parent / 'files'}"],
        cwd=copy,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PATIENCE": "20"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return "timeout"
    finally:
        kill_group(process.pid)
        process.wait()
    if process.returncode == 0:
        return "nobody"
    failed = re.findall(r"^(?:FAILED|ERROR) \S+::(test_.*?)(?: - .*)?$", output, re.MULTILINE)
    return failed[0] if failed else f"no test ran: {output.strip()[-300:]}"


def kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
