"""A campaign of faults: kills, full disks, broken pictures, a long run. Prints a table.

    python3 tests/campaigns/campaign.py    # all of it, about 40 minutes on two cores
    python3 tests/campaigns/campaign.py --only kill_preprocessor long_run

Each fault is tried many times with the real commands on a toy dataset; what comes out is compared
with what an undisturbed run makes. "Lost" counts whatever differs, and should be 0 everywhere.
"""

import argparse
import contextlib
import csv
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import toolkit
import utils

import numpy as np

# isort: split
import preprocess
import toy_dataset
from preprocess import side_box
from runtime_preprocessing import write_progress

PATIENCE = 180


class Place:
    """Folders for one fault, removed afterwards: settings, a dataset, a buffer on the RAM disk."""

    def __init__(self, train: int, val: int = 1, **values: object):
        self.folder = Path(tempfile.mkdtemp(prefix="campaign-"))
        shm = Path("/dev/shm")
        self.buffer = Path(
            tempfile.mkdtemp(prefix="campaign-", dir=shm if shm.is_dir() else self.folder)
        )
        toy_dataset.make(self.folder / "dataset", train=train, val=val)
        dataset = self.folder / "dataset"
        self.config = toolkit.write_config(self.folder, dataset, self.buffer, **values)
        self.log = self.folder / "log.txt"
        self.processes: list[subprocess.Popen] = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()
        shutil.rmtree(self.buffer, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, script: str, *arguments: str) -> subprocess.Popen:
        process = toolkit.start(script, self.config, *arguments, log=self.log)
        self.processes.append(process)
        return process

    def shell(self, text: str) -> subprocess.Popen:
        """Runs commands of the README, in the folder of the scripts."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        there = f"cd {shlex.quote(str(toolkit.ROOT))}\n{text}"
        process = toolkit.launch(["bash", "-c", there], self.log, PATH=path)
        self.processes.append(process)
        return process


def kill_at_random(process: subprocess.Popen, moments: random.Random, longest: float) -> bool:
    """Kills the process after up to `longest` seconds. False if it had ended by itself."""
    try:
        process.wait(timeout=moments.uniform(0, longest))
        return False
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True


def tree(folder: Path, leave_out: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Content of all files below the folder, by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(leave_out)
    }


def processes(place: Place, script: str = "") -> list[int]:
    """The processes, not dead ones, that were started with the settings of this place."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = os.fsdecode(path.read_bytes()).split("\0")
            is_script = not script or any(each.endswith(script) for each in arguments[:2])
            if is_script and f"--config={place.config}" in arguments:
                found.append(int(path.parent.name))
        except OSError:
            pass  # ended meanwhile
    return found


def left_in(buffer: Path) -> list[str]:
    """What lies in a buffer besides the empty lock files, which stay."""
    return [name for name in os.listdir(buffer) if not name.endswith(".lock")]


def span(epochs: int, batch_size: int) -> list[str]:
    return ["--epoch_start=0", f"--epoch_end={epochs}", f"--batch_size={batch_size}"]


# --- the faults: each returns (tried, lost) -----------------------------------------------------


def kill_preprocessor(tries: int = 200) -> tuple[int, int]:
    """SIGKILL to runtime_preprocessing.py while a stand-in for training reads batch after batch."""
    moments, lost, with_workers = random.Random(0), 0, 0
    with Place(10, train__buffer_size=6, runtime_preprocessing__sleep_time=0.02) as place:
        batches = toolkit.batches_of(place.config)
        spec = batches.spec
        number = 0

        def read_one() -> int:
            """Reads the batch that is next, if it is there. Returns how many were wrong."""
            nonlocal number
            paths = spec.files(place.buffer, number)
            if not paths[0].exists():
                return 0
            arrays = [np.load(path, allow_pickle=False) for path in paths]
            right = toolkit.made(batches, number)
            number += 1
            write_progress(place.buffer, spec, number)
            return sum(not np.array_equal(a, b) for a, b in zip(arrays, right, strict=True))

        for _ in range(tries):
            process = place.start("runtime_preprocessing.py", *span(1000, 4))
            end = time.monotonic() + moments.uniform(0.2, 1.5)
            while time.monotonic() < end:
                lost += read_one()
                time.sleep(0.002)
            with_workers += len(processes(place)) > 1
            process.kill()
            process.wait()
            with contextlib.suppress(TimeoutError):
                wait_for(lambda: not processes(place), 5)
            lost += len(processes(place))
        process = place.start("runtime_preprocessing.py", *span(1000, 4))
        goal, end = number + 20, time.monotonic() + PATIENCE
        while number < goal and time.monotonic() < end:
            lost += read_one()
        lost += number < goal
        write_progress(place.buffer, spec, spec.step(1000))
        lost += process.wait(timeout=PATIENCE) != 0
        lost += len(left_in(place.buffer))
        if lost:
            print(f"  at {number} of {goal}, {process.returncode}, {left_in(place.buffer)}")
            print(place.log.read_text()[-1000:])
        print(f"  {number} batches were read and compared; {with_workers} kills met workers")
    return tries, lost


def final_state(run: Path, epoch: int) -> dict[str, np.ndarray]:
    import tensorflow as tf

    state = {}
    for part in ("variables/variables", "training_state/state"):
        reader = tf.train.load_checkpoint(str(run / str(epoch) / part))
        names = [name for name in reader.get_variable_to_shape_map() if "OBJECT_GRAPH" not in name]
        state |= {f"{part}/{name}": reader.get_tensor(name) for name in names}
    return state


def unequal(whole: Path, other: Path, epoch: int) -> int:
    """How many weights, averages and momenta of two runs differ after an epoch."""
    one, two = final_state(whole, epoch), final_state(other, epoch)
    return sum(not np.array_equal(one[name], two[name]) for name in one)


def kill_trainer(tries: int = 20, epochs: int = 30) -> tuple[int, int]:
    """SIGKILL to train.py, a state saved after each batch; resumed to the end each time."""
    moments, lost, kills = random.Random(1), 0, 0
    with Place(2) as place:
        arguments = [*span(epochs, 4), "--learning_rate=0.01", "--deterministic", "--log_seconds=0"]
        place.start("runtime_preprocessing.py", *span(epochs, 4))
        whole = place.start("train.py", "--run_folder=whole", *arguments)
        lost += whole.wait() != 0
        models = utils.load_config(place.config).train.path_for_saving
        place.start("runtime_preprocessing.py", *span(epochs, 4))
        table = models / "killed" / "training_log.csv"
        while True:
            more = ["--checkpoint_minutes=0", *["--resume"] * table.exists()]
            process = place.start("train.py", "--run_folder=killed", *arguments, *more)
            before = row_count(table)
            while kills < tries and process.poll() is None and row_count(table) <= before:
                time.sleep(0.05)
            if kills < tries and kill_at_random(process, moments, 3):
                kills += 1
                names = os.listdir(models / "killed")
                complete = [models / "killed" / name for name in names if not name.startswith(".")]
                lost += sum(incomplete(path) for path in complete if path.is_dir())
                continue
            lost += process.wait() != 0
            break
        lost += unequal(models / "whole", models / "killed", epochs - 1)
        with open(table, newline="") as file:
            batches = [int(row["epoch"]) * 2 + int(row["batch"]) for row in csv.DictReader(file)]
        lost += batches != list(range(2 * epochs))
    return kills, lost


def restart_loop(tries: int = 25, epochs: int = 2) -> tuple[int, int]:
    """README's restart loops: train.py killed; every fifth time the buffer removed."""
    readme = (toolkit.ROOT / "README.md").read_text()
    function, loop, prepare = re.findall(r"^ *((?:t\(\)|t;|until) .*)$", readme, re.MULTILINE)
    moments, lost, shaken = random.Random(3), 0, 0
    with Place(40, train__buffer_size=6) as place:
        flags = f"--config={place.config} --epoch_end={epochs} --batch_size=4"
        more = "--learning_rate=0.01 --lr_drop_epochs=1 --warmup_epochs=0.5 --deterministic"
        more += " --checkpoint_minutes=0 --log_seconds=0"
        models = utils.load_config(place.config).train.path_for_saving
        for run, events in (("whole", 0), ("shaken", tries)):
            table = models / run / "training_log.csv"
            own = function.replace('"$@"', f'--run_folder={run} {flags} {more} "$@"')
            scripts = [prepare.replace("; do", f" {flags}; do"), f"{own}\n{loop}"]
            preparing, training = (
                place.shell(script.replace("sleep 10", "sleep 1")) for script in scripts
            )
            for number in range(events):
                before = row_count(table)
                while training.poll() is None and row_count(table) <= before:
                    time.sleep(0.05)
                time.sleep(moments.uniform(0, 2))
                if number % 5 == 4:
                    shutil.rmtree(place.buffer, ignore_errors=True)
                else:
                    for pid in processes(place, "train.py"):
                        os.kill(pid, signal.SIGKILL)
                shaken += training.poll() is None
            lost += training.wait() != 0
            lost += preparing.wait() != 0
        lost += unequal(models / "whole", models / "shaken", epochs - 1)
    return shaken, lost


def row_count(table: Path) -> int:
    return len(table.read_text().splitlines()) if table.is_file() else 0


def incomplete(folder: Path) -> bool:
    """Whether a state or model folder lacks what training needs to go on."""
    if folder.name == "events":
        return False
    state = folder / "training_state"
    needed = [state / "state.json", state / "state.index"]
    if folder.name.isdigit():
        needed += [folder / "saved_model.pb", folder / "variables" / "variables.index"]
    else:
        needed.append(state / "weights.index")
    return not all(path.is_file() for path in needed)


def kill_checker(tries: int = 20, epochs: int = 6) -> tuple[int, int]:
    """SIGKILL to check_accuracy.py between and within epochs."""
    from test_accuracy import save_model

    moments, lost, kills = random.Random(2), 0, 0
    with Place(1, val=6) as place:
        run = utils.load_config(place.config).train.path_for_saving / "run"
        lost += toolkit.run("preprocess_val.py", place.config).returncode != 0
        for epoch in range(epochs):
            save_model(run / str(epoch), epoch)
        arguments = ["--run_folder=run", "--epoch_start=0", f"--epoch_end={epochs}"]
        lost += place.start("check_accuracy.py", *arguments).wait() != 0
        whole = (run / "accuracy.csv").read_bytes()
        (run / "accuracy.csv").unlink()
        while kills < tries:
            if kill_at_random(place.start("check_accuracy.py", *arguments), moments, 12):
                kills += 1
            elif (run / "accuracy.csv").read_bytes() != whole:
                lost += 1
            else:
                (run / "accuracy.csv").unlink()
        lost += place.start("check_accuracy.py", *arguments).wait() != 0
        lost += (run / "accuracy.csv").read_bytes() != whole
        left = [name for name in os.listdir(run) if ".aside-" in name]
        lost += len(left)
    return kills, lost


def kill_preparation(tries: int = 20) -> tuple[int, int]:
    """SIGKILL to preprocess.py, preprocess_val.py and get_mu_sigma.py, so many times each."""
    moments, lost, kills = random.Random(3), 0, 0
    for script, more in (
        ("preprocess.py", ["--shorter_side=all"]),
        ("preprocess_val.py", []),
        ("get_mu_sigma.py", []),
    ):
        with Place(6, val=20) as place:
            result = utils.load_config(place.config).preprocess.path_to_save
            lost += place.start(script, *more).wait() != 0
            whole = tree(result)
            shutil.rmtree(result)
            for _ in range(tries):
                kills += kill_at_random(place.start(script, *more), moments, 1.0)
            lost += place.start(script, *more).wait() != 0
            lost += tree(result) != whole
    return kills, lost


def flip_bytes(tries: int = 2000) -> tuple[int, int]:
    """Random bytes of JPEG files changed: a crop, or an error that counts as a broken picture."""
    rng, lost, broken = np.random.default_rng(4), 0, 0
    with Place(2) as place:
        files = sorted((place.folder / "dataset").rglob("*.JPEG"))
        target = place.folder / "flipped.JPEG"
        for _ in range(tries):
            content = bytearray(files[rng.integers(len(files))].read_bytes())
            for _ in range(rng.integers(1, 9)):
                content[rng.integers(len(content))] = rng.integers(256)
            target.write_bytes(content)
            try:
                side = int(rng.choice(preprocess.SIDES))
                crop = toolkit.crop_file(target, side_box(side, rng.random(2)))
                lost += crop.size != (224, 224) or crop.mode != "RGB"
            except preprocess.BrokenPicture:
                broken += 1
        print(f"  {broken} could not be decoded, {tries - broken} gave a crop")
    return tries, lost


def no_room_for_models(tries: int = 3) -> tuple[int, int]:
    """A disk too small for a second state: training goes on, keeps the first, and ends well."""
    lost = 0
    for _ in range(tries):
        with Place(2) as place:
            disk = place.folder / "disk"
            disk.mkdir()
            if subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "size=900m", "tmpfs", disk]
            ).returncode:
                print("  a small disk cannot be mounted here (needs root)")
                return 0, 0
            try:
                values = {"train__path_for_saving": str(disk)}
                place.config = toolkit.write_config(
                    place.folder, place.folder / "dataset", place.buffer, **values
                )
                filler = disk / "filler"
                arguments = [*span(2, 4), "--learning_rate=0.01", "--checkpoint_minutes=0"]
                place.start("runtime_preprocessing.py", *span(2, 4))
                process = place.start("train.py", "--run_folder=r", *arguments)
                wait_for(lambda disk=disk: (disk / "r" / "0").is_dir())
                free = shutil.disk_usage(disk).free
                with open(filler, "wb") as file:
                    os.posix_fallocate(file.fileno(), 0, max(1, free - 50_000_000))
                # Of a state within an epoch, or of a model: then it is tried again in a minute.
                wait_for(
                    lambda place=place: (
                        "not saved" in place.log.read_text()
                        or "cannot be saved yet" in place.log.read_text()
                    )
                )
                filler.unlink()
                lost += process.wait(timeout=PATIENCE) != 0
                lost += sum(incomplete(disk / "r" / str(epoch)) for epoch in range(2))
                lost += "Traceback" in place.log.read_text()
            finally:
                for process in place.processes:
                    process.kill()
                    process.wait()
                subprocess.run(["umount", disk], check=True)
    return tries, lost


def wait_for(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.02)


def long_run(tries: int = 20_000) -> tuple[int, int]:
    """So many tiny batches: memory, open files and threads stay flat, files within the window."""
    lost, size = 0, 30
    with Place(10, train__buffer_size=size, runtime_preprocessing__sleep_time=0.01) as place:
        epochs, spec = tries // 40, toolkit.batches_of(place.config, 1).spec
        process = place.start("runtime_preprocessing.py", *span(epochs, 1))
        seen = []
        for number in range(epochs * 40):
            x, _ = spec.files(place.buffer, number)
            wait_for(x.exists)
            write_progress(place.buffer, spec, number + 1)
            if number % 500 == 0:
                seen.append(resources(process.pid))
            if number % 100 == 0:
                names = [n for n in os.listdir(place.buffer) if n.startswith("X_")]
                # Batches under way when progress moved on may still arrive.
                lost += len(names) > size + 4
        lost += process.wait(timeout=PATIENCE) != 0
        lost += len(left_in(place.buffer))
        later = seen[len(seen) // 4 :]
        for name in ("memory", "files", "threads"):
            values = [each[name] for each in later]
            print(f"  {name}: {min(values):,} to {max(values):,}")
            lost += max(values) > 1.1 * min(values) + 2
    return epochs * 40, lost


def resources(pid: int) -> dict[str, int]:
    """Resident memory in kilobytes, open files, threads."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return {
        "memory": int(status["VmRSS"].split()[0]),
        "files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
    }


FAULTS = [
    kill_preprocessor, kill_trainer, restart_loop, kill_checker, kill_preparation, flip_bytes,
    no_room_for_models, long_run,
]  # fmt: skip


def print_table(faults: list[Callable], text: str) -> None:
    """The command of a campaign: tries the faults and prints a table. Exits with 1 if any lost."""
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    names = [fault.__name__ for fault in faults]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--tries", type=int, help="instead of each fault's own number")
    args = parser.parse_args()
    rows = []
    for fault in faults:
        if fault.__name__ in args.only:
            print(f"{fault.__name__}: {fault.__doc__}", flush=True)
            start = time.monotonic()
            try:
                tried, lost = fault(args.tries) if args.tries else fault()
            except Exception:  # the other rows are tried all the same
                traceback.print_exc()
                tried, lost = 1, 1
            seconds = time.monotonic() - start
            rows.append((fault, tried, lost, seconds))
            print(f"  tried {tried}, lost {lost}, {seconds:.0f} s", flush=True)
    print("\n| row | fault | tried | survived | lost | seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    for fault, tried, lost, seconds in rows:
        what = fault.__doc__.splitlines()[0]
        print(f"| {fault.__name__} | {what} | {tried} | {tried - lost} | {lost} | {seconds:.0f} |")
    sys.exit(any(lost for _, _, lost, _ in rows))


if __name__ == "__main__":
    print_table(FAULTS, __doc__)
