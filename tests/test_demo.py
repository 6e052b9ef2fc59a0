"""The demonstration: its dataset, and that it leaves no process behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from toolkit import ROOT

import numpy as np
import pytest
from PIL import Image

import demo_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    demo_dataset.make(folder, train=6, val=2)
    return folder


def test_the_dataset_is_of_jpeg_files_of_ten_classes_and_various_shapes(dataset):
    for part, count in (("train", 6), ("val", 2)):
        classes = sorted(folder.name for folder in (dataset / part).iterdir())
        assert classes == sorted(demo_dataset.CLASSES)
        assert len(classes) >= 10
        for name in classes:
            assert len(list((dataset / part / name).iterdir())) == count
    sizes = set()
    for file in dataset.rglob("*.JPEG"):
        with Image.open(file) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
            sizes.add(image.size)
    assert len(sizes) > 3


def test_the_dataset_is_the_same_each_time_and_no_picture_is_there_twice(dataset, tmp_path):
    demo_dataset.make(tmp_path, train=6, val=2)
    contents = set()
    for file in dataset.rglob("*.JPEG"):
        contents.add(file.read_bytes())
        assert file.read_bytes() == (tmp_path / file.relative_to(dataset)).read_bytes()
    assert len(contents) == 8 * len(demo_dataset.CLASSES)


def test_the_hue_of_a_picture_says_nothing_about_its_class(dataset):
    """The nearest class by hue is the right one hardly more often than by chance, one in ten."""
    hues = {"train": [], "val": []}
    for part, classes in hues.items():
        for name in demo_dataset.CLASSES:
            files = sorted((dataset / part / name).iterdir())
            colours = np.array([np.asarray(Image.open(f), float).mean((0, 1)) for f in files])
            classes.append(colours - colours.mean(1, keepdims=True))
    centres = np.array([pictures.mean(0) for pictures in hues["train"]])
    right = [
        np.linalg.norm(centres - picture, axis=1).argmin() == label
        for label, pictures in enumerate(hues["val"])
        for picture in pictures
    ]
    assert np.mean(right) <= 0.3


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_a_killed_demonstration_leaves_no_process_behind():
    script = (
        "import sys, time, demo\n"
        "child = demo.start([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests" / "examples")}
    demonstration = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment
    )
    child = int(demonstration.stdout.readline())
    demonstration.kill()
    demonstration.wait()
    try:
        for _ in range(600):
            if not is_alive(child):
                return
            time.sleep(0.1)
        pytest.fail("the child runs on")
    finally:
        if is_alive(child):
            os.kill(child, signal.SIGKILL)


def is_alive(process: int) -> bool:
    """Whether there is such a process, and it is not merely waiting to be reaped."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
