"""The main job at toy size: prepares a dataset, then runs all three processes at the same time.

    python3 tests/demo.py

takes a few minutes on two cores, ends with a table of accuracies, and says where the chart lies.
Everything is written below `.demo` in the repository and started afresh each time.
"""

import csv
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import toolkit
import utils

import toy_dataset

EPOCHS = 5
BATCH = "--batch_size=8"
SPAN = ["--epoch_start=0", f"--epoch_end={EPOCHS}"]
NAME = {"train.py": "train", "check_accuracy.py": "accuracy", "runtime_preprocessing.py": "buffer"}


def main() -> None:
    started = time.monotonic()
    folder = toolkit.ROOT / ".demo"
    utils.lock(toolkit.ROOT / ".demo.lock", "another demonstration runs here")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    print("making a dataset of 4 classes, 96 training and 24 validation pictures", flush=True)
    toy_dataset.make(folder / "dataset")
    shm = Path("/dev/shm")
    buffer = Path(tempfile.mkdtemp(prefix="demo-buffer-", dir=shm if shm.is_dir() else folder))
    config = toolkit.write_config(folder, folder / "dataset", buffer, train__buffer_size=40)
    try:
        for script in ("preprocess_val.py", "get_mu_sigma.py"):
            show(script, "")
            subprocess.run(toolkit.command(script, config), check=True)
        run = folder / "saved_models" / "demo"
        train_and_check(config)
    finally:
        shutil.rmtree(buffer, ignore_errors=True)
    print_table(run / "accuracy.csv")
    print(f"\nThe chart: {run / 'accuracy.png'}\nTraining:  {run / 'training.png'}")
    print(f"All of it took {time.monotonic() - started:.0f} seconds.")


def train_and_check(config: Path) -> None:
    """Preprocessor, trainer and checker as separate processes, their lines shown as they come."""
    commands = {
        "runtime_preprocessing.py": [*SPAN, BATCH],
        "train.py": ["--run_folder=demo", *SPAN, BATCH, "--learning_rate=0.02",
                     "--lr_schedule=cosine", "--warmup_epochs=1", "--log_seconds=10"],
        "check_accuracy.py": ["--run_folder=demo", *SPAN],
    }  # fmt: skip
    processes = {}
    for script, arguments in commands.items():
        show(script, " ".join(arguments))
        processes[script] = subprocess.Popen(
            toolkit.command(script, config, *arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        threading.Thread(target=relay, args=(script, processes[script]), daemon=True).start()
    try:
        while any(process.poll() is None for process in processes.values()):
            for script, process in processes.items():
                if process.poll():
                    sys.exit(f"{script} ended with status {process.returncode}")
            time.sleep(0.2)
    finally:
        for process in processes.values():
            process.terminate()


def relay(script: str, process: subprocess.Popen) -> None:
    for line in process.stdout:
        print(f"{NAME[script]:>9} | {line}", end="", flush=True)


def show(script: str, arguments: str) -> None:
    print(f"\n$ python3 {script} {arguments}", flush=True)


def print_table(path: Path) -> None:
    print("\n epoch   10 crops: top-1   top-5   centre crop: top-1   top-5")
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            cells = [float(row[name]) for name in row if name.startswith("top")]
            print("{:>6} {:>17.1%} {:>7.1%} {:>20.1%} {:>7.1%}".format(row["epoch"], *cells))


if __name__ == "__main__":
    utils.run(main)
