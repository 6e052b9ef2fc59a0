"""What the tests share: settings for a toy dataset, and running the scripts as a user would."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "examples")]


def write_config(folder: Path, dataset: Path, buffer: Path, **values: object) -> Path:
    """A copy of the shipped config.txt for a toy dataset, with other values for some keys.

    `values` are `section__key=value`; in a value of None the line is left out.
    """
    values = {
        "preprocess__ImageNet_folder": str(dataset),
        "preprocess__path_to_save": str(folder / "preprocessed"),
        "preprocess__N": 0,
        "get_mu_sigma__path_to_save": str(folder / "preprocessed"),
        "train__buffer_folder": str(buffer),
        "train__path_for_saving": str(folder / "saved_models"),
        "train__N": 0,
        "train__sleep_time": 0.2,
        "runtime_preprocessing__sleep_time": 0.1,
        "runtime_preprocessing__num_of_threads": 2,
    } | values
    section, lines = "", []
    for line in (ROOT / "config.txt").read_text().splitlines():
        if match := re.match(r"\[(\w+)\]", line):
            section = match[1]
        if (match := re.match(r"(\w+) = ", line)) and f"{section}__{match[1]}" in values:
            value = values.pop(f"{section}__{match[1]}")
            if value is None:
                continue
            line = f"{match[1]} = {json.dumps(value)}"
        lines.append(line)
    for name, value in values.items():  # keys that the shipped file leaves at their defaults
        section, key = name.split("__")
        lines.insert(lines.index(f"[{section}]") + 1, f"{key} = {value}")
    config = folder / "config.txt"
    config.write_text("\n".join(lines) + "\n")
    return config


def batches_of(config: Path, batch_size: int = 4, **changes: object):
    """The runtime_preprocessing.Batches that the command makes with this config.txt."""
    import utils

    import runtime_preprocessing

    args = SimpleNamespace(batch_size=batch_size, epoch_start=0, epoch_end=3)
    batches = runtime_preprocessing.batches_for(utils.load_config(config), args)
    share = len(batches.pictures) // changes.get("workers", 1)
    changes["batches_per_epoch"] = share // batch_size
    spec = dataclasses.replace(batches.spec, **changes)
    return runtime_preprocessing.Batches(spec, batches.pictures, batches.copies)


def made(batches, step: int):
    """A batch's pictures and labels: float16 [batch_size, 224, 224, 3], int32 [batch_size]."""
    import numpy as np

    broken = []
    parts = [(x.copy(), y) for x, y in batches.parts(step, broken)]
    for path, error in broken:
        batches.failures.add(path, error)
    x, y = zip(*parts, strict=True)
    return np.concatenate(x), np.concatenate(y)


def crop_file(path: Path, choose_box: object):
    """The crop of a picture's file that `choose_box` chooses, as batches have it."""
    import preprocess

    return preprocess.crop(preprocess.read_picture(path), choose_box)


def command(script: str, config: Path | None, *arguments: str) -> list[str]:
    settings = [f"--config={config}"] if config else []
    return [sys.executable, str(ROOT / script), *settings, *arguments]


def run(
    script: str, config: Path | None, *arguments: str, timeout: float = 300, **environment: str
):
    """Runs a script to its end. Returns the CompletedProcess, output as text."""
    return subprocess.run(
        command(script, config, *arguments),
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        env=os.environ | environment,
        errors="backslashreplace",
    )


def start(script: str, config: Path | None, *arguments: str, log: Path, **environment: str):
    """Starts a script, its output going to `log`. Returns the Popen."""
    return launch(command(script, config, *arguments), log, **environment)


def launch(arguments: list[str], log: Path, **environment: str) -> subprocess.Popen:
    """Starts a command, its output going to `log`."""
    with open(log, "a") as file:
        return subprocess.Popen(
            arguments,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | environment,
        )


PATIENCE = float(os.environ.get("PATIENCE", 60))
"""Seconds after which what should happen counts as not happening; fewer for plant_faults.py."""


def wait_until(
    condition: Callable[[], object],
    process: subprocess.Popen | None = None,
    what: object = "what it waits for",
    seconds: float = PATIENCE,
) -> None:
    """Raises AssertionError if it does not happen, or if the process ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        ended = process is not None and process.poll() is not None and not condition()
        assert not ended, f"ended with status {process.returncode}, before: {what}"
        assert time.monotonic() < deadline, f"did not happen: {what}"
        time.sleep(0.005)


def assert_one_line_error(result: subprocess.CompletedProcess, script: str, *words: str) -> None:
    """Status 2, and on stderr exactly one line of error (after warnings), naming these words."""
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    lines = [line for line in result.stderr.splitlines() if ": warning: " not in line]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith(f"{script}: error: "), lines[0]
    for word in words:
        assert word in lines[0], (word, lines[0])


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """The scalars in the event files of a folder, by name and step, as TensorBoard reads them: a
    session that starts at a step makes it forget the steps from there on. None may appear twice.
    """
    import tensorflow as tf

    seen = {}
    for file in sorted(folder.iterdir()):
        for event in tf.compat.v1.train.summary_iterator(str(file)):
            if event.session_log.status == tf.compat.v1.SessionLog.START:
                seen = {key: value for key, value in seen.items() if key[1] < event.step}
            for value in event.summary.value:
                assert value.HasField("simple_value")
                assert (value.tag, event.step) not in seen
                seen[value.tag, event.step] = value.simple_value
    return seen


def make_pipe(path: Path) -> None:
    """Replaces a file by a pipe. Whoever waits for a writer gets one, so that the test ends."""
    path.unlink()
    os.mkfifo(path)

    def write() -> None:
        while True:
            os.close(os.open(path, os.O_WRONLY))

    threading.Thread(target=write, daemon=True).start()
