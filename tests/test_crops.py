"""preprocess_val.py as a command, against Pillow; what reads the crops.

python3 -m pytest tests/test_crops.py
"""

import fcntl
import json
import os
import re
import shutil
import signal
from pathlib import Path

import toolkit
import utils
from toolkit import wait_until
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
    tree,
    truncate,
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


# --- cutting the crops ------------------------------------------------------------------------


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
    assert changed == {"X10_4.npy", "X10_7.npy", "crops.json", "y.npy"}
    assert not (folder / ".X10_3.npy.aside-0123456789abcdef").exists()


def test_labels_are_written_when_the_crops_are_on_the_disk(settings, tmp_path, monkeypatch):
    folder, there, complete = tmp_path / "preprocessed/val", [], []

    def sync() -> None:
        there.extend(path.name for path in folder.iterdir())
        complete.append(note_of(folder)["complete"])

    monkeypatch.setattr(os, "sync", sync)
    in_process(preprocess_val, monkeypatch, settings)
    assert {f"X10_{i}.npy" for i in range(9)} <= set(there)
    assert "y.npy" not in there and (folder / "y.npy").exists()
    assert complete == [False] and note_of(folder)["complete"]
    utils._forget_locks()


def note_of(folder: Path) -> dict:
    return json.loads((folder / "crops.json").read_text())


def change_note(folder: Path, **values: object) -> None:
    (folder / "crops.json").write_text(json.dumps(note_of(folder) | values))


def test_old_crops_are_gone_before_the_new_note_is_written(settings, tmp_path, monkeypatch):
    """Or a kill between the two would make them crops of the new pictures."""
    in_process(preprocess_val, monkeypatch, settings)
    utils._forget_locks()  # as when the process ends
    folder, write_record, seen = tmp_path / "preprocessed/val", utils.write_record, []
    change_note(folder, fingerprint="of pictures that were replaced since")

    def write(path: Path, note: preprocess_val.Note) -> None:
        seen.append((note.complete, len(list(folder.glob("*.npy")))))
        write_record(path, note)

    monkeypatch.setattr(utils, "write_record", write)
    in_process(preprocess_val, monkeypatch, settings)
    utils._forget_locks()
    assert seen == [(False, 0), (True, 10)]


def test_the_note_says_of_which_pictures_the_crops_are(settings, mixed, tmp_path):
    result = run_well("preprocess_val.py", settings)
    assert f"9 validation pictures of 2 classes in {mixed / 'val'}, class folders" in result.stdout
    note = note_of(tmp_path / "preprocessed/val")
    assert sorted(note) == ["class_names", "complete", "fingerprint", "originals"]
    assert note["originals"] == str(mixed / "val") and note["class_names"] == ["a", "b"]


def test_a_second_time_nothing_is_to_be_cut(config):
    first, second = (run_well("preprocess_val.py", config).stdout for _ in range(2))
    assert "the crops of 8 are still to be cut" in first
    assert "still to be cut" not in second and "0 B" not in second


@pytest.mark.parametrize("name", ["valid", "validation", "test"])
def test_it_names_the_folder_that_it_used(name, toy, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train").symlink_to(toy / "train")
    (tmp_path / "data" / name).symlink_to(toy / "val")
    config = toolkit.write_config(tmp_path, tmp_path / "data", tmp_path / "buffer")
    assert f"in {tmp_path / 'data' / name}, class" in run_well("preprocess_val.py", config).stdout


def test_crops_do_not_go_into_the_dataset(toy, tmp_path):
    dataset = copied(toy, tmp_path / "data")
    before = tree(dataset)
    config = toolkit.write_config(
        tmp_path, dataset, tmp_path / "buffer", preprocess__path_to_save=str(dataset)
    )
    result = toolkit.run("preprocess_val.py", config)
    toolkit.assert_one_line_error(result, "preprocess_val.py", "path_to_save", str(dataset))
    assert tree(dataset) == before


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


def test_a_dataset_that_has_moved_is_the_same(tmp_path, toy):
    config = toolkit.write_config(tmp_path, toy, tmp_path / "buffer")
    run_well("preprocess_val.py", config)
    folder = tmp_path / "preprocessed/val"
    times = mtimes(folder)
    moved = copied(toy, tmp_path / "moved")
    config = toolkit.write_config(tmp_path, moved, tmp_path / "buffer")
    run_well("preprocess_val.py", config)
    changed = {path.name for path, at in mtimes(folder).items() if times[path] != at}
    assert changed == {"crops.json", "y.npy"}
    assert note_of(folder)["originals"] == str(moved / "val")


def test_crops_of_another_dataset_with_the_same_names_are_kept(tmp_path, toy):
    toy_dataset.make(tmp_path / "other", train=1, val=2, seed=9)
    config = toolkit.write_config(tmp_path, toy, tmp_path / "buffer")
    run_well("preprocess_val.py", config)
    config = toolkit.write_config(tmp_path, tmp_path / "other", tmp_path / "buffer")
    result = toolkit.run("preprocess_val.py", config)
    toolkit.assert_one_line_error(result, "preprocess_val.py", "another dataset", str(toy / "val"))
    assert_crops_are_right(tmp_path / "preprocessed/val", toy)


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
    utils._forget_locks()  # as when the process ends
    monkeypatch.setattr(shutil, "disk_usage", disk_with(needed))
    in_process(preprocess_val, monkeypatch, settings)
    utils._forget_locks()
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


def test_all_broken_pictures_are_named_in_one_pass(tmp_path, toy):
    dataset = copied(toy, tmp_path / "data")
    for name in ("discs/discs_0", "stars/stars_1", "tiles/tiles_1"):
        truncate(dataset / f"val/{name}.JPEG")
    config = toolkit.write_config(tmp_path, dataset, tmp_path / "buffer")
    result = toolkit.run("preprocess_val.py", config)
    toolkit.assert_one_line_error(result, "preprocess_val.py", "3 of 8 pictures")
    for name in ("discs_0.JPEG", "stars_1.JPEG", "tiles_1.JPEG"):
        assert result.stderr.count(name) == 1
    folder = tmp_path / "preprocessed/val"
    assert not note_of(folder)["complete"]
    with pytest.raises(UserError, match="crops missing or incomplete; run preprocess_val.py"):
        preprocess_val.Crops(folder, 0)


STRANGERS = ["y.npy", "X10_0.npy", "X10_123456.npy", "crops.json"]


@pytest.mark.parametrize("content", [b"", b'{"key": 1}'])
@pytest.mark.parametrize("name", STRANGERS)
def test_files_of_strangers_are_kept_and_named(name, content, config, tmp_path):
    folder = tmp_path / "preprocessed/val"
    folder.mkdir(parents=True)
    (folder / name).write_bytes(content)
    result = toolkit.run("preprocess_val.py", config)
    toolkit.assert_one_line_error(result, "preprocess_val.py", str(folder / name))
    assert tree(folder) == {name: content}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_folder_of_a_files_name_is_named(name, config, tmp_path):
    (tmp_path / "preprocessed/val" / name / "within").mkdir(parents=True)
    result = toolkit.run("preprocess_val.py", config)
    toolkit.assert_one_line_error(result, "preprocess_val.py", name)


def test_no_file_is_written_through_a_link(config, tmp_path):
    folder, keys = tmp_path / "preprocessed/val", tmp_path / "keys"
    run_well("preprocess_val.py", config)
    keys.write_text("secret")
    for name in ("y.npy", "X10_3.npy", "crops.json"):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        if name == "crops.json":
            (tmp_path / "note").write_bytes(content)
        (folder / name).symlink_to(tmp_path / "note" if name == "crops.json" else keys)
    run_well("preprocess_val.py", config)
    assert keys.read_text() == "secret"
    assert not any(path.is_symlink() for path in folder.iterdir())
    (folder / ".preprocess_val.lock").unlink()
    (folder / ".preprocess_val.lock").symlink_to(keys)
    result = toolkit.run("preprocess_val.py", config)
    toolkit.assert_one_line_error(result, "preprocess_val.py", ".preprocess_val.lock", "link")
    assert keys.read_text() == "secret"


# --- reading the crops ------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path) -> Path:
    """Crops of three pictures of two classes."""
    note = preprocess_val.Note("/pictures", "1-2", True, ["cat", "dog"])
    utils.write_record(tmp_path / "crops.json", note)
    np.save(tmp_path / "y.npy", np.array([1, -1, 0]))
    for index in (0, 2):
        crops = np.arange(10, dtype=np.uint8)[:, None, None, None] + 10 * np.uint8(index)
        np.save(tmp_path / f"X10_{index}.npy", np.broadcast_to(crops, (10, 224, 224, 3)))
    return tmp_path


def test_crops_are_read_back(written):
    crops = preprocess_val.Crops(written, 3)
    assert (len(crops), crops.classes, crops.names) == (2, 2, ["cat", "dog"])
    assert crops.indices.tolist() == [0, 2] and crops.labels.tolist() == [1, -1, 0]
    ten = crops.load(crops.indices)
    assert ten.shape == (20, 224, 224, 3) and ten[:, 0, 0, 0].tolist()[8:12] == [8, 9, 20, 21]
    assert crops.load(crops.indices)[crops.centre :: crops.count][:, 5, 5, 1].tolist() == [8, 28]
    one = preprocess_val.Crops(written, 0, count=1)
    assert one.load(one.indices)[one.centre :: one.count][:, 5, 5, 1].tolist() == [8, 28]
    assert one.load(one.indices[:0]).shape == (0, 224, 224, 3)


@pytest.mark.parametrize(
    "content",
    [
        "", "null", "[]", "{}", "[" * 100_000, '{"complete": true}', "\x00",
        '{"originals": 1, "fingerprint": "", "complete": true, "class_names": ["a"]}',
        '{"originals": "", "fingerprint": "", "complete": 1, "class_names": ["a"]}',
        '{"originals": "", "fingerprint": "", "complete": true, "class_names": [0]}',
        '{"originals": "", "fingerprint": "", "complete": true, "class_names": null}',
        '{"originals": "", "fingerprint": "", "complete": false, "class_names": ["a", "b"]}',
        '{"originals": "", "fingerprint": "", "complete": true, "class_names": []}',
    ],
)  # fmt: skip
def test_a_note_of_any_content_is_one_line(content, written):
    (written / "crops.json").write_text(content)
    with pytest.raises(UserError, match="crops.json|preprocess_val.py"):
        preprocess_val.Crops(written, 0)


def header(text: str) -> bytes:
    """A .npy file of this header alone."""
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"PK\3\4", b"\x93NUMPY", header("{}"), header("__import__('os')"),
        header("{'descr': '<i8', 'fortran_order': False, 'shape': (100000000000,)}\n"),
        header("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n"),
        np.array([0.0, 1.0]), np.array([0, 1], np.int32), np.array([[0, 1]]), np.array(1),
        np.array([], np.int64), np.array([-1, -1]), np.array([0, 2]), np.array([0, -2]),
        np.array([0, 10**12]),
    ],
)  # fmt: skip
def test_labels_of_any_content_are_one_line(content, written):
    if isinstance(content, bytes):
        (written / "y.npy").write_bytes(content)
    else:
        np.save(written / "y.npy", content)
    with pytest.raises(UserError, match="y.npy: holds no labels; run preprocess_val.py again"):
        preprocess_val.Crops(written, 0)


def test_a_fifo_in_place_of_the_labels_does_not_hang(written):
    (written / "y.npy").unlink()
    os.mkfifo(written / "y.npy")
    with pytest.raises(UserError, match="y.npy"):
        preprocess_val.Crops(written, 0)


def test_crops_that_belong_to_another_user_can_be_read(written, monkeypatch):
    lock, open_ = written / ".preprocess_val.lock", os.open

    def refused(path, flags, *rest):
        makes = flags & os.O_CREAT and not os.path.exists(path)
        if makes or flags & (os.O_RDWR | os.O_WRONLY):
            raise PermissionError(13, "Permission denied", str(path))
        return open_(path, flags, *rest)

    lock.unlink(missing_ok=True)
    monkeypatch.setattr(os, "open", refused)
    assert len(preprocess_val.Crops(written, 0)) == 2
    with open(lock, "w") as at_work:
        assert len(preprocess_val.Crops(written, 0)) == 2
        utils._forget_locks()
        fcntl.flock(at_work, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="preprocess_val.py is at work"):
            preprocess_val.Crops(written, 0)


def test_class_names_of_any_kind_come_back(tmp_path, toy):
    names = ["a\nb", "käfer", "\x1b[31mred", "c\udcff", 'x,"y"']
    for name in names:
        for part in ("train", "val"):
            save_picture(tmp_path / "data" / part / name / "1.jpg", picture(0, (300, 256)))
    config = toolkit.write_config(tmp_path, tmp_path / "data", tmp_path / "buffer")
    result = run_well("preprocess_val.py", config)
    assert "\x1b" not in result.stdout
    assert preprocess_val.Crops(tmp_path / "preprocessed/val", 0).names == sorted(names)
