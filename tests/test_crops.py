"""preprocess_val.py as a command, against Pillow; what reads the crops.

python3 -m pytest tests/test_crops.py
"""

import os
import re
import shutil
import signal
from pathlib import Path

import toolkit
import utils
from utils import UserError

import numpy as np
import pytest
from PIL import Image, ImageOps

import preprocess_val
import toy_dataset
from test_prepare import (
    as_pillow_opens,
    disk_with,
    in_process,
    linked_dataset,
    make_mixed,
    mtimes,
    picture,
    run_well,
    save_picture,
    truncate,
    wait_until,
)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """A dataset whose validation pictures are what ImageNet holds beside plain JPEG files."""
    folder = tmp_path_factory.mktemp("mixed")
    make_mixed(folder / "train")
    make_mixed(folder / "val")
    return folder


@pytest.fixture
def settings(tmp_path, mixed) -> Path:
    return toolkit.write_config(tmp_path, mixed, tmp_path / "buffer")


# --- the crops ---------------------------------------------------------------


def ten_crops(image: Image.Image) -> np.ndarray:
    """uint8 [10, 224, 224, 3], with Pillow's own crop and mirror."""
    scale = 256 / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    right, bottom = width - 224, height - 224
    corners = [(0, 0), (right, 0), (0, bottom), (right, bottom), (right // 2, bottom // 2)]
    crops = [resized.crop((x, y, x + 224, y + 224)) for x, y in corners]
    return np.stack([np.asarray(c) for crop in crops for c in (crop, ImageOps.mirror(crop))])


def validation_names(dataset: Path) -> list[Path]:
    """In the order of class and relative path."""
    return sorted((dataset / "val").rglob("*.*"), key=lambda path: str(path))


def assert_crops_are_right(folder: Path, dataset: Path) -> None:
    names = validation_names(dataset)
    files = {path.name for path in folder.iterdir() if path.suffix == ".npy"}
    assert files == {"y.npy", *(f"X10_{i}.npy" for i in range(len(names)))}
    labels = np.load(folder / "y.npy", allow_pickle=False)
    classes = sorted(path.name for path in (dataset / "train").iterdir())
    assert (labels.dtype, labels.shape) == (np.int64, (len(names),))
    for index, path in enumerate(names):
        crops = np.load(folder / f"X10_{index}.npy", allow_pickle=False)
        assert (crops.dtype, crops.shape) == (np.uint8, (10, 224, 224, 3))
        assert np.array_equal(crops, ten_crops(as_pillow_opens(path))), path
        assert classes[labels[index]] == path.relative_to(dataset / "val").parts[0]


def test_crops_are_those_of_pillow(settings, mixed, tmp_path):
    result = run_well("preprocess_val.py", settings)
    assert_crops_are_right(tmp_path / "preprocessed/val", mixed)
    assert re.search(r"9 of 9 pictures, [\d,.]+/s, .* left", result.stdout)
    assert re.search(r"13\.5 MB", result.stdout)


def test_crops_of_the_toy_dataset(config, toy, tmp_path):
    run_well("preprocess_val.py", config)
    assert_crops_are_right(tmp_path / "preprocessed/val", toy)


def test_a_restart_of_the_crops_keeps_what_is_finished(settings, mixed, tmp_path):
    folder = tmp_path / "preprocessed/val"
    run_well("preprocess_val.py", settings)
    times = mtimes(folder)
    (folder / "X10_4.npy").unlink()
    (folder / "X10_7.npy").write_bytes(b"half")
    (folder / "y.npy").unlink()
    (folder / ".X10_3.npy.aside-0123456789abcdef").write_bytes(b"half")
    run_well("preprocess_val.py", settings)
    assert_crops_are_right(folder, mixed)
    changed = {path.name for path, at in mtimes(folder).items() if times[path] != at}
    assert changed == {"X10_4.npy", "X10_7.npy", "class_names.txt", "y.npy"}
    assert not (folder / ".X10_3.npy.aside-0123456789abcdef").exists()


def test_labels_are_written_when_the_crops_are_on_the_disk(settings, tmp_path, monkeypatch):
    folder, there = tmp_path / "preprocessed/val", []
    monkeypatch.setattr(os, "sync", lambda: there.extend(path.name for path in folder.iterdir()))
    in_process(preprocess_val, monkeypatch, settings)
    assert {f"X10_{i}.npy" for i in range(9)} <= set(there)
    assert "y.npy" not in there and (folder / "y.npy").exists()


def test_old_crops_are_gone_before_the_new_list_is_written(settings, tmp_path, monkeypatch):
    """Or a kill between the two would make them crops of the new pictures."""
    in_process(preprocess_val, monkeypatch, settings)
    folder, write_text = tmp_path / "preprocessed/val", utils.write_text
    utils.remove_lock(folder / ".preprocess_val.lock")
    listing = folder / "pictures.txt"
    listing.write_text("1 " + listing.read_text().partition(" ")[2])  # the size of the first

    def write(path: Path, text: str) -> None:
        assert path != listing or not list(folder.glob("X10_*"))
        write_text(path, text)

    monkeypatch.setattr(utils, "write_text", write)
    in_process(preprocess_val, monkeypatch, settings)
    assert len(list(folder.glob("X10_*"))) == 9


def test_killed_and_started_again_it_cuts_the_same(tmp_path, toy):
    dataset = linked_dataset(tmp_path / "data", toy, "val", 80)
    config = toolkit.write_config(tmp_path, dataset, tmp_path / "buffer")
    folder = tmp_path / "preprocessed/val"
    process = toolkit.start("preprocess_val.py", config, log=tmp_path / "log.txt")
    wait_until(lambda: any(folder.glob("X10_*")), process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = list(folder.glob("X10_*"))
    assert 0 < len(finished) < 80
    times = {path: path.stat().st_mtime_ns for path in finished}
    assert not (folder / "y.npy").exists()
    run_well("preprocess_val.py", config)
    assert_crops_are_right(folder, dataset)
    assert times == {path: path.stat().st_mtime_ns for path in finished}


def copied(toy: Path, folder: Path) -> Path:
    shutil.copytree(toy / "val", folder / "val")
    (folder / "train").symlink_to(toy / "train")
    return folder


def add_first(dataset: Path) -> None:
    save_picture(dataset / "val/discs/aaa.JPEG", picture(20, (330, 300)))


def remove_one(dataset: Path) -> None:
    (dataset / "val/stars/stars_0.JPEG").unlink()


@pytest.mark.parametrize("change", [add_first, remove_one])
def test_crops_of_a_changed_dataset_are_cut_again(change, tmp_path, toy):
    dataset = copied(toy, tmp_path / "data")
    config = toolkit.write_config(tmp_path, dataset, tmp_path / "buffer")
    run_well("preprocess_val.py", config)
    change(dataset)
    run_well("preprocess_val.py", config)
    assert_crops_are_right(tmp_path / "preprocessed/val", dataset)


def test_crops_of_another_dataset_with_the_same_names_are_cut_again(tmp_path, toy):
    toy_dataset.make(tmp_path / "other", train=1, val=2, seed=9)
    for dataset in (toy, tmp_path / "other"):
        config = toolkit.write_config(tmp_path, dataset, tmp_path / "buffer")
        run_well("preprocess_val.py", config)
        assert_crops_are_right(tmp_path / "preprocessed/val", dataset)


def test_pictures_that_were_sorted_into_folders_are_the_same_dataset(tmp_path, toy):
    other = copied(toy, tmp_path / "other")
    config = toolkit.write_config(tmp_path, other, tmp_path / "buffer")
    run_well("preprocess_val.py", config)
    listing = tmp_path / "preprocessed/val/pictures.txt"
    lines = [f"{p.stat().st_size} 'x/{p.name}'\n" for p in sorted((toy / "val").glob("*/*"))]
    listing.write_text("".join(lines))
    run_well("preprocess_val.py", config)
    assert_crops_are_right(tmp_path / "preprocessed/val", other)


def test_crops_of_another_dataset_with_other_names_are_kept(tmp_path, toy):
    config = toolkit.write_config(tmp_path, toy, tmp_path / "buffer")
    run_well("preprocess_val.py", config)
    other = copied(toy, tmp_path / "other")
    for path in (other / "val").glob("*/*"):
        path.rename(path.with_name(f"other_{path.name}"))
    config = toolkit.write_config(tmp_path, other, tmp_path / "buffer")
    result = toolkit.run("preprocess_val.py", config)
    toolkit.assert_one_line_error(result, "preprocess_val.py", "another dataset", "path_to_save")
    assert_crops_are_right(tmp_path / "preprocessed/val", toy)


def test_the_crops_need_room(settings, mixed, tmp_path, monkeypatch):
    needed = 9 * (128 + 10 * 224 * 224 * 3)
    monkeypatch.setattr(shutil, "disk_usage", disk_with(needed - 1))
    with pytest.raises(UserError, match=r"preprocessed/val.*13\.5 MB"):
        in_process(preprocess_val, monkeypatch, settings)
    folder = tmp_path / "preprocessed/val"
    assert not list(folder.glob("*.npy"))
    utils.remove_lock(folder / ".preprocess_val.lock")  # as when the process ends
    monkeypatch.setattr(shutil, "disk_usage", disk_with(needed))
    in_process(preprocess_val, monkeypatch, settings)
    assert_crops_are_right(folder, mixed)


def test_a_broken_validation_picture_has_no_label(tmp_path, toy):
    dataset = copied(toy, tmp_path / "data")
    truncate(dataset / "val/stars/stars_1.JPEG")
    config = toolkit.write_config(tmp_path, dataset, tmp_path / "buffer")
    for _ in range(2):  # a restart tries it again, and says so again
        result = toolkit.run("preprocess_val.py", config)
        assert result.returncode == 0
        assert len(result.stderr.splitlines()) == 1
        assert "preprocess_val.py: warning: stars/stars_1.JPEG" in result.stderr
        assert "1 could not be decoded" in result.stdout.splitlines()[-1]
        labels = np.load(tmp_path / "preprocessed/val/y.npy")
        assert labels.tolist() == [0, 0, 1, -1, 2, 2, 3, 3]
    assert len(list((tmp_path / "preprocessed/val").glob("X10_*"))) == 7
