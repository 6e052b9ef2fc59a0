"""Fixtures: a toy dataset, a folder on the RAM disk, settings that name both."""

import functools
import os
import shutil
import signal
import tempfile
from pathlib import Path

import toolkit

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")


@functools.cache
def make_two_devices() -> None:
    """Two logical devices, so that two replicas fit on one processor; only possible before use."""
    import tensorflow as tf

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )


def pytest_pycollect_makemodule(module_path: Path) -> None:
    """Before a file of tests is imported. Importing TensorFlow takes longer than most tests."""
    if "\nimport tensorflow" in module_path.read_text():
        make_two_devices()


# A shell that starts the tests in the background makes all that they start deaf to Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """A dataset of 4 classes, 40 training and 8 validation pictures. Read only."""
    import toy_dataset

    folder = tmp_path_factory.mktemp("toy")
    toy_dataset.make(folder, train=10, val=2)
    return folder


@pytest.fixture
def ram():
    """A folder on the RAM disk where there is one."""
    shm = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="toolkit-test-", dir=shm if shm.is_dir() else None))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def config(tmp_path, toy, ram) -> Path:
    return toolkit.write_config(tmp_path, toy, ram)
