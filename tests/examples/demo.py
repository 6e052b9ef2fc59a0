"""The main job at toy size: prepares a dataset, then runs all three processes at the same time.

    python3 tests/examples/demo.py

takes up to five minutes on two cores, ends with a table of accuracies, and says where the charts
lie and what to do next. Everything is written below `.demo` in the repository and started afresh
each time; it is the same each time on the same kind of processor. Each command that it prints can
be copied and run. README.md's pictures are from such a run: `accuracy.png` and `training.png` of
`.demo/saved_models/demo`, and

    python3 runtime_preprocessing.py --config=.demo/config.txt --epoch_start=0 --epoch_end=1 \\
        --batch_size=24 --preview=tests/pictures/sheet.png
"""

import argparse
import ctypes
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import toolkit
import utils

TRAIN, VAL = 14, 5  # pictures of each class
EPOCHS = 6
RECIPE = ["--learning_rate=0.007", "--lr_schedule=cosine", "--warmup_epochs=0.5", "--deterministic"]
SETTINGS = {
    "train__buffer_size": 40,
    "train__seed": 1,
    # With plain batch normalization of 8 pictures, the accuracy fell by 20 points in the middle of
    # training. So the limits are relaxed early.
    "batch_renorm__moving_avgs_momentum": 0.9,
    "batch_renorm__start_relaxing_rmax": "0.5 epochs",
    "batch_renorm__start_relaxing_dmax": "0.5 epochs",
    "batch_renorm__reach_rmax_max": "2 epochs",
    "batch_renorm__reach_dmax_max": "2 epochs",
}
BATCH = "--batch_size=8"
RUN_FOLDER = ["--run_folder=demo"]
SPAN = ["--epoch_start=0", f"--epoch_end={EPOCHS}"]
NAME = {"train.py": "train", "check_accuracy.py": "accuracy", "runtime_preprocessing.py": "buffer"}
FOLDER = toolkit.ROOT / ".demo"
RUN = FOLDER / "saved_models" / "demo"


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    utils.lock(toolkit.ROOT / ".demo.lock", "another demonstration runs here")
    remove_the_last()
    make_dataset()
    buffer = make_buffer()
    try:
        config = toolkit.write_config(FOLDER, FOLDER / "dataset", buffer, **SETTINGS)
        for script in ("preprocess_val.py", "get_mu_sigma.py"):
            command = toolkit.command(script, config)
            show(command)
            subprocess.run(command, check=True)
        train_and_check(config)
        check_with_ten_crops(config)
    finally:
        shutil.rmtree(buffer, ignore_errors=True)
    keep_last_model()
    print_table(RUN / "accuracy.csv")
    print_what_next()
    print(f"All of it took {time.monotonic() - started:.0f} seconds.")


def remove_the_last() -> None:
    """What the last demonstration left, its buffer too, should it have been killed."""
    if (FOLDER / "config.txt").is_file():
        buffer = Path(tomllib.loads((FOLDER / "config.txt").read_text())["train"]["buffer_folder"])
        if buffer.name.startswith("demo-buffer-"):
            shutil.rmtree(buffer, ignore_errors=True)
    shutil.rmtree(FOLDER, ignore_errors=True)


def make_dataset() -> None:
    import demo_dataset  # needs NumPy and Pillow; `utils` has said so in a line if they are absent

    classes = len(demo_dataset.CLASSES)
    print(
        f"making a dataset of {classes} classes, {classes * TRAIN} training and {classes * VAL} "
        f"validation pictures",
        flush=True,
    )
    demo_dataset.make(FOLDER / "dataset", TRAIN, VAL)


def make_buffer() -> Path:
    shm = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="demo-buffer-", dir=shm if shm.is_dir() else FOLDER))


def train_and_check(config: Path) -> None:
    """Preprocessor, trainer and checker as separate processes, their lines shown as they come."""
    arguments = {
        "runtime_preprocessing.py": [*SPAN, BATCH],
        "train.py": [*RUN_FOLDER, *SPAN, BATCH, *RECIPE, "--log_seconds=10"],
        "check_accuracy.py": [*RUN_FOLDER, SPAN[0], f"--epoch_end={EPOCHS - 1}", "--crops=1"],
    }
    processes = {}
    for script in arguments:
        command = toolkit.command(script, config, *arguments[script])
        show(command)
        processes[script] = start(command)
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
        for process in processes.values():
            process.wait()


def check_with_ten_crops(config: Path) -> None:
    """The last model: ten times the work of the centre crop, which the epochs before it got."""
    span = [f"--epoch_start={EPOCHS - 1}", SPAN[1]]
    command = toolkit.command("check_accuracy.py", config, *RUN_FOLDER, *span)
    show(command)
    subprocess.run(command, check=True)


def start(command: list[str]) -> subprocess.Popen:
    """Starts a process that ends when this one does, even by SIGKILL (on Linux).

    It does not get the terminal's Ctrl-C, but the SIGTERM that follows.
    """
    set_process_option = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
    die_with_parent = 1  # PR_SET_PDEATHSIG in <sys/prctl.h>
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=set_process_option
        and (lambda: set_process_option(die_with_parent, signal.SIGTERM)),
    )


def relay(script: str, process: subprocess.Popen) -> None:
    for line in process.stdout:
        print(f"{NAME[script]:>9} | {line}", end="", flush=True)


def short(text: object) -> str:
    """With the paths below the current folder relative to it."""
    return str(text).replace(f"{Path.cwd()}/", "")


def show(command: list[str]) -> None:
    print(f"\n$ {shlex.join(short(part) for part in command)}", flush=True)


def keep_last_model() -> None:
    """Removes the models of the other epochs, 190 MB each."""
    for epoch in range(EPOCHS - 1):
        shutil.rmtree(RUN / str(epoch))


def print_table(path: Path) -> None:
    columns = ("top1_centre", "top5_centre", "top1_10crop", "top5_10crop")
    print("\n epoch   centre crop: top-1   top-5   10 crops: top-1   top-5")
    for row in utils.read_csv(path, dict.fromkeys(["epoch", *columns], str)):
        cells = [f"{float(row[name]):.1%}" if row[name] else "" for name in columns]
        print("{:>6} {:>20} {:>7} {:>17} {:>7}".format(row["epoch"], *cells))


def print_what_next() -> None:
    size = sum(path.lstat().st_size for path in FOLDER.rglob("*"))
    picture = next((FOLDER / "dataset" / "val").glob("*/*"))
    predict = [sys.executable, toolkit.ROOT / "resnet50.py", RUN / str(EPOCHS - 1), picture]
    print(f"""
Next: look at the charts

    {short(RUN / "accuracy.png")}
    {short(RUN / "training.png")}

ask the model what it sees in a picture

    {shlex.join(map(short, predict))}

and train on pictures of your own: see README.md, "Pictures of your own". The commands above can be
run again; train.py and check_accuracy.py then need another --run_folder.

{short(FOLDER)} holds {size / 1e6:,.0f} MB: the dataset, its crops and the last model, with its
training state. The models of the other epochs are removed. To free it: rm -r {short(FOLDER)}
""")


if __name__ == "__main__":
    utils.run(main)
