"""The three scripts that run once before training, as commands, against Pillow and NumPy.

python3 -m pytest tests/test_prepare.py
"""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import toolkit
import utils
from toolkit import wait_until
from utils import UserError

import numpy as np
import pytest
from PIL import Image

import get_mu_sigma
import preprocess
import toy_dataset

SIDES = range(256, 481, 7)
ARGUMENTS = {"preprocess.py": ["--shorter_side=256"]}


# --- datasets and helpers ---------------------------------------------------------------------


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """A toy picture scaled to a size of choice: edges and texture at any resolution."""
    name = list(toy_dataset.CLASSES)[seed % len(toy_dataset.CLASSES)]
    return toy_dataset.picture(name, np.random.default_rng(seed)).resize(size)


def mosaic(size: tuple[int, int]) -> Image.Image:
    """A picture with more detail than its resized copies can hold."""
    whole = Image.new("RGB", size)
    for i, y in enumerate(range(0, size[1], 100)):
        for j, x in enumerate(range(0, size[0], 150)):
            whole.paste(picture(10 * i + j, (150, 100)), (x, y))
    return whole


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def save_picture(path: Path, image: Image.Image, kind: str = "JPEG", **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "JPEG":
        options = {"quality": 92} | options
    image.save(path, kind, **options)


def make_mixed(folder: Path) -> None:
    """Nine pictures: what ImageNet holds beside plain JPEG files."""
    save_picture(folder / "a/plain.JPEG", picture(0, (400, 300)))
    save_picture(folder / "a/deep below/tall.JPEG", picture(1, (281, 419)))
    save_picture(folder / "a/square.jpg", picture(2, (256, 256)))
    save_picture(folder / "a/really png.JPEG", picture(3, (333, 250)), "PNG")
    save_picture(folder / "b/grey.JPEG", picture(4, (300, 401)).convert("L"))
    save_picture(folder / "b/cmyk.JPEG", picture(5, (390, 300)).convert("CMYK"))
    save_picture(folder / "b/large.JPEG", mosaic((1500, 1100)), exif=turned())
    save_picture(folder / "b/small.gif", picture(7, (50, 40)).convert("P"), "GIF")
    save_picture(folder / "b/wide.JPEG", picture(8, (300, 120)))


def as_pillow_opens(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def tree(folder: Path) -> dict[str, bytes]:
    """Content of every file below a folder, by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def is_leftover(name: str) -> bool:
    return ".aside-" in name


def mtimes(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


RUNTIME = ["--epoch_start=0", "--epoch_end=1", "--batch_size=4"]


def run_well(script: str, config: Path, *arguments: str) -> subprocess.CompletedProcess:
    result = toolkit.run(script, config, *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result


def in_process(module, monkeypatch, config: Path, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", f"--config={config}", *arguments])
    module.main()


def disk_with(free: int):
    return lambda _folder: SimpleNamespace(total=10**15, used=0, free=free)


def run_under(limit: str, script: str, config: Path, *arguments: str):
    """Runs a script after a line of Python that limits its process."""
    program = f"import os, resource, sys; {limit}; os.execv(sys.executable, sys.argv[1:])"
    command = toolkit.command(script, config, *arguments)
    return subprocess.run(
        [sys.executable, "-c", program, sys.executable, *command[1:]],
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """A dataset with the mixed pictures for training and for validation. Read only."""
    folder = tmp_path_factory.mktemp("mixed")
    make_mixed(folder / "train")
    make_mixed(folder / "val")
    return folder


@pytest.fixture(scope="module")
def copies(mixed, tmp_path_factory) -> SimpleNamespace:
    """All 33 sides of the mixed pictures, made in one go. Read only."""
    folder = tmp_path_factory.mktemp("copies")
    config = toolkit.write_config(folder, mixed, folder / "buffer")
    result = run_well("preprocess.py", config, "--shorter_side=all")
    return SimpleNamespace(folder=folder / "preprocessed", stdout=result.stdout)


@pytest.fixture
def settings(tmp_path, mixed) -> Path:
    return toolkit.write_config(tmp_path, mixed, tmp_path / "buffer")


def linked_dataset(folder: Path, toy: Path, part: str, count: int) -> Path:
    """A dataset whose pictures in `part` are `count` links to those of the toy dataset."""
    pictures = sorted((toy / "train").rglob("*.JPEG"))
    for i in range(count):
        original = pictures[i % len(pictures)]
        link = folder / part / original.parent.name / f"{i:04}.JPEG"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(original)
    if part != "train":
        (folder / "train").symlink_to(toy / "train")
    return folder


def truncate(path: Path) -> None:
    """Makes a picture broken that may be a link to a good one."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 3])


# --- preprocess.py ----------------------------------------------------------------------------


def originals(mixed: Path) -> list[str]:
    folder = mixed / "train"
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))


def test_every_side_has_the_names_of_the_originals(copies, mixed):
    names = sorted(path.name for path in copies.folder.iterdir())
    assert names == [".preprocess.lock", *map(str, SIDES), "copies.json"]
    note = json.loads((copies.folder / "copies.json").read_text())
    pictures = preprocess.training_pictures(utils.load_config(copies.folder.parent / "config.txt"))
    assert note == {
        "originals": str(mixed / "train"),
        "fingerprint": pictures.fingerprint,
        "complete": list(SIDES),
    }
    for side in SIDES:
        assert sorted(tree(copies.folder / str(side))) == originals(mixed)


def test_shapes_are_exact_and_all_are_rgb_jpegs(copies, mixed):
    for name in originals(mixed):
        with Image.open(mixed / "train" / name) as original:
            width, height = original.size
        for side in SIDES:
            with Image.open(copies.folder / str(side) / name) as copy:
                assert (copy.format, copy.mode) == ("JPEG", "RGB")
                assert min(copy.size) == side
                exact = max(width, height) * side / min(width, height)
                assert abs(max(copy.size) - exact) <= 0.5
                assert (width - height) * (copy.width - copy.height) >= 0
                assert not copy.getexif()


def assert_contents_are_right(folder: Path, mixed: Path) -> None:
    for name in originals(mixed):
        copy = as_pillow_opens(folder / name)
        original = as_pillow_opens(mixed / "train" / name)
        expected = original.resize(copy.size, Image.Resampling.BILINEAR)
        difference = np.subtract(copy, expected, dtype=float)
        limit = 3.5 if "large" in name else 1.5  # its detail is hard on JPEG
        assert np.abs(difference).mean() < limit, (folder, name)
        assert np.abs(difference.mean((0, 1))).max() < 1, (folder, name)


@pytest.mark.parametrize("side", [256, 375, 480])
def test_contents_are_those_of_pillows_resize(side, copies, mixed):
    assert_contents_are_right(copies.folder / str(side), mixed)


def test_it_says_how_much_disk_it_needs_and_how_it_goes(copies, mixed):
    needed = re.search(rf"about ([\d.]+) (kB|MB) needed in {copies.folder}\b", copies.stdout)
    really = sum(len(content) for name, content in tree(copies.folder).items() if "/" in name)
    assert 0.7 < float(needed[1]) * {"kB": 1e3, "MB": 1e6}[needed[2]] / really < 1.4
    assert re.search(r"9 of 9 pictures, [\d,.]+/s, .* left", copies.stdout)
    assert "all could be decoded" in copies.stdout.splitlines()[-1]


def test_one_side_makes_that_side_alone(settings, mixed, tmp_path):
    result = run_well("preprocess.py", settings, "--shorter_side=263")
    made = tmp_path / "preprocessed"
    assert sorted(path.name for path in made.glob("[!.]*")) == ["263", "copies.json"]
    assert sorted(tree(tmp_path / "preprocessed/263")) == originals(mixed)
    assert re.search(r"9 of 9 pictures", result.stdout)
    assert_contents_are_right(tmp_path / "preprocessed/263", mixed)


def test_a_restart_keeps_what_is_finished_and_makes_what_is_missing(settings, tmp_path):
    folder = tmp_path / "preprocessed"
    run_well("preprocess.py", settings, "--shorter_side=256")
    whole, times = tree(folder), mtimes(folder)
    for name in ("a/plain.JPEG", "b/large.JPEG"):
        (folder / "256" / name).unlink()
    leftover = folder / "256/a/.plain.JPEG.aside-0123456789abcdef"
    leftover.write_bytes(b"half")
    (folder / "256/b/small.gif").write_bytes(b"")  # as a power failure leaves it
    run_well("preprocess.py", settings, "--shorter_side=256")
    assert tree(folder) == whole
    changed = {path for path, at in mtimes(folder).items() if times[path] != at}
    remade = {folder / "256" / name for name in ("a/plain.JPEG", "b/large.JPEG", "b/small.gif")}
    assert changed == remade | {folder / "copies.json"}


def test_a_restart_needs_room_for_what_is_missing_alone(settings, mixed):
    first = run_well("preprocess.py", settings, "--shorter_side=256").stdout
    assert not re.search(r"about 0 B needed", first)
    assert "about 0 B needed" in run_well("preprocess.py", settings, "--shorter_side=256").stdout


@pytest.fixture
def many(tmp_path, toy) -> Path:
    """Settings for pictures enough that preprocess.py --shorter_side=all takes some seconds."""
    dataset = linked_dataset(tmp_path / "data", toy, "train", 6)
    return toolkit.write_config(tmp_path, dataset, tmp_path / "buffer")


def test_killed_and_started_again_it_makes_the_same(many, tmp_path):
    folder = tmp_path / "preprocessed"
    process = toolkit.start("preprocess.py", many, "--shorter_side=all", log=tmp_path / "log.txt")
    wait_until(lambda: sum(1 for _ in folder.rglob("[!.]*.*")) > 20, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    visible = {
        name: content
        for name, content in tree(folder).items()
        if not Path(name).name.startswith(".") and name != "copies.json"
    }
    run_well("preprocess.py", many, "--shorter_side=all")
    whole = tree(folder)
    shutil.rmtree(folder)
    run_well("preprocess.py", many, "--shorter_side=all")
    assert whole == tree(folder)  # as undisturbed
    assert 20 <= len(visible) < len(whole)
    assert visible.items() <= whole.items()


def test_ctrl_c_leaves_no_half_written_file(many, tmp_path):
    folder, log = tmp_path / "preprocessed", tmp_path / "log.txt"
    process = toolkit.start("preprocess.py", many, "--shorter_side=all", log=log)
    wait_until(lambda: sum(1 for _ in folder.rglob("[!.]*.*")) > 5, process)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert log.read_text().splitlines()[-1] == "preprocess.py: stopped"
    assert "Traceback" not in log.read_text()
    for path in folder.glob("*/**/*.*"):
        assert not is_leftover(path.name)
        as_pillow_opens(path)


def test_copies_of_another_dataset_are_refused_and_not_trained_on(settings, tmp_path, mixed):
    """With the same names, in the same path_to_save."""
    run_well("preprocess.py", settings, "--shorter_side=256")
    shutil.copytree(mixed, tmp_path / "other")
    other = toolkit.write_config(tmp_path, tmp_path / "other", tmp_path / "buffer")
    note = tmp_path / "preprocessed/copies.json"
    result = toolkit.run("preprocess.py", other, "--shorter_side=263")
    words = str(note), str(mixed / "train"), "remove", "another path_to_save"
    toolkit.assert_one_line_error(result, "preprocess.py", *words)
    assert not (tmp_path / "preprocessed/263").exists()
    result = preview(other, tmp_path)
    assert result.returncode == 0 and f"that were in {mixed / 'train'} then" in result.stderr
    assert "from the originals" in result.stdout
    result = toolkit.run("get_mu_sigma.py", other, "--shorter_side=256")
    toolkit.assert_one_line_error(result, "get_mu_sigma.py", "preprocessed/256: no copies")
    # The way out that the refusal names: the same pictures in another place.
    assert "have only moved" in toolkit.run("preprocess.py", other, "--shorter_side=263").stderr
    note.write_text(note.read_text().replace(str(mixed), str(tmp_path / "other")))
    run_well("preprocess.py", other, "--shorter_side=256")
    assert preview(other, tmp_path).stderr == ""


def test_a_second_preprocess_is_refused(many, tmp_path):
    copies = tmp_path / "preprocessed/256"
    making = toolkit.start("preprocess.py", many, "--shorter_side=all", log=tmp_path / "log.txt")
    wait_until(lambda: any(copies.rglob("[!.]*.*")), making)
    making.send_signal(signal.SIGSTOP)
    try:
        second = toolkit.run("preprocess.py", many, "--shorter_side=263")
    finally:
        making.kill()
        making.wait()
    toolkit.assert_one_line_error(second, "preprocess.py", "another preprocess.py")


def preview(config: Path, folder: Path) -> subprocess.CompletedProcess:
    """What runtime_preprocessing.py says at its start."""
    sheet = f"--preview={folder / 'sheet.png'}"
    return toolkit.run("runtime_preprocessing.py", config, *RUNTIME, sheet)


def test_copies_that_are_not_complete_are_not_trained_on(many, tmp_path):
    """A batch would be made from other files once they are complete, under the same description."""
    folder = tmp_path / "preprocessed"
    making = toolkit.start("preprocess.py", many, "--shorter_side=all", log=tmp_path / "log.txt")
    wait_until(lambda: sum(1 for _ in folder.rglob("[!.]*.JPEG")) > 40, making)
    making.kill()
    making.wait()
    result = preview(many, tmp_path)
    assert (
        "preprocessed/256: copies incomplete (and those at 32 other shorter sides); the"
        in result.stderr
    )
    assert "from the originals" in result.stdout
    run_well("preprocess.py", many, "--shorter_side=256")
    result = preview(many, tmp_path)
    assert (
        "preprocessed/263: copies incomplete (and those at 31 other shorter sides); the"
        in result.stderr
    )
    assert "resized copies for 1 of the 33 shorter sides" in result.stdout


def edit_pictures(folder: Path, how: str) -> None:
    if how == "added":
        save_picture(folder / "a/new.JPEG", picture(30, (300, 300)))
    elif how == "removed":
        (folder / "a/plain.JPEG").unlink()
    else:
        save_picture(folder / "a/plain.JPEG", picture(30, (400, 300)))


@pytest.mark.parametrize("how", ["added", "removed", "replaced"])
def test_copies_of_pictures_that_have_changed_since_are_refused(how, tmp_path, mixed):
    shutil.copytree(mixed, tmp_path / "data")
    config = toolkit.write_config(tmp_path, tmp_path / "data", tmp_path / "buffer")
    run_well("preprocess.py", config, "--shorter_side=256")
    edit_pictures(tmp_path / "data/train", how)
    reason = "copies.json: these are copies of the pictures that were in"
    for side in (256, 263):
        result = toolkit.run("preprocess.py", config, f"--shorter_side={side}")
        words = reason, "remove it and the folders 256 … 480", "another path_to_save"
        toolkit.assert_one_line_error(result, "preprocess.py", *words)
    result = preview(config, tmp_path)
    assert reason in result.stderr and "the originals are used" in result.stderr
    assert "from the originals" in result.stdout
    result = toolkit.run("get_mu_sigma.py", config, "--shorter_side=256")
    toolkit.assert_one_line_error(result, "get_mu_sigma.py", "preprocessed/256: no copies")
    (tmp_path / "preprocessed/copies.json").unlink()  # as the refusal says
    shutil.rmtree(tmp_path / "preprocessed/256")
    run_well("preprocess.py", config, "--shorter_side=256")
    if how == "replaced":
        assert_contents_are_right(tmp_path / "preprocessed/256", tmp_path / "data")


NOT_NOTES = ["", "[]", '{"256": {"pictures": "x", "complete": true}}', '{"originals": 1}']
NOT_NOTES += ['{"originals": "/a", "fingerprint": "x", "complete": [256, "all"]}', "[" * 9999]


@pytest.mark.parametrize("content", NOT_NOTES)
def test_a_note_of_any_content_is_one_line(content, settings, tmp_path):
    (tmp_path / "preprocessed/256").mkdir(parents=True)
    (tmp_path / "preprocessed/copies.json").write_text(content)
    result = toolkit.run("preprocess.py", settings, "--shorter_side=256")
    toolkit.assert_one_line_error(result, "preprocess.py", "copies.json: not what this toolkit")
    config = utils.load_config(settings)
    pictures = preprocess.training_pictures(config)
    assert preprocess.copies_for(tmp_path / "preprocessed", pictures) == {}


def test_many_copies_are_made_without_waiting_for_the_disk(settings, tmp_path, monkeypatch):
    """4.0 ms a copy instead of 0.4: one that a power failure spoils is made again. Only the two
    versions of the note, and their names in the folder, are waited for.
    """
    fsync = []
    monkeypatch.setattr(os, "fsync", fsync.append)
    in_process(preprocess, monkeypatch, settings, "--shorter_side=256")
    assert len(tree(tmp_path / "preprocessed/256")) == 9
    assert len(fsync) == 4


def test_a_copy_that_is_broken_or_missing_is_read_from_the_original(settings, mixed, tmp_path):
    folder = tmp_path / "preprocessed/256"
    run_well("preprocess.py", settings, "--shorter_side=256")
    (folder / "a/plain.JPEG").write_bytes(b"")
    (folder / "b/large.JPEG").write_bytes((folder / "b/large.JPEG").read_bytes()[:200])
    (folder / "b/wide.JPEG").unlink()
    result = run_well("get_mu_sigma.py", settings, "--shorter_side=256")
    assert "all could be decoded" in result.stdout
    for name in ("a/plain.JPEG", "b/large.JPEG", "b/wide.JPEG"):
        shutil.copy(mixed / "train" / name, folder / name)
    found = values_of(printed_section(result.stdout))
    assert np.abs(found - numpy_mu_sigma(folder)).max() < 6e-6


# Where the copies and crops must not go.

OWN_FOLDERS = {
    "the dataset's folder": "data",
    "the folder of Kaggle's parts": "data/ILSVRC/Data/CLS-LOC",
    "a class": "data/ILSVRC/Data/CLS-LOC/train/a",
    "a new class": "data/ILSVRC/Data/CLS-LOC/train/copies",
    "the validation pictures": "data/ILSVRC/Data/CLS-LOC/val",
    "a name that would be taken for validation pictures": "data/ILSVRC/Data/CLS-LOC/test",
    "a link": "link",
}


@pytest.mark.parametrize("script", ["preprocess.py", "preprocess_val.py"])
@pytest.mark.parametrize("kind", OWN_FOLDERS)
def test_the_datasets_own_folder_is_refused(script, kind, mixed, tmp_path):
    shutil.copytree(mixed, tmp_path / "data/ILSVRC/Data/CLS-LOC")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    before = tree(tmp_path / "data")
    save = tmp_path / OWN_FOLDERS[kind]
    config = toolkit.write_config(
        tmp_path, tmp_path / "data", tmp_path / "buffer", preprocess__path_to_save=str(save)
    )
    result = toolkit.run(script, config, *ARGUMENTS.get(script, []))
    words = f"path_to_save {save}: ", f"such as {tmp_path / 'data_preprocessed'}"
    toolkit.assert_one_line_error(result, script, *words)
    assert tree(tmp_path / "data") == before


@pytest.mark.parametrize("script", ["preprocess.py", "preprocess_val.py"])
@pytest.mark.parametrize("length", [239, 255])
def test_long_file_names_are_fine(script, length, tmp_path):
    for part in ("train", "val"):
        name = "ü" * 50 + "x" * (length - 105) + ".JPEG"
        save_picture(tmp_path / "data" / part / "a" / name, picture(0, (300, 256)))
    config = toolkit.write_config(tmp_path, tmp_path / "data", tmp_path / "buffer")
    run_well(script, config, *ARGUMENTS.get(script, []))
    assert len(list((tmp_path / "preprocessed").rglob("*.JPEG"))) == (script == "preprocess.py")


def test_notes_below_the_mean_and_deviation_are_kept(tmp_path):
    path, text = tmp_path / "mu_sigma.txt", get_mu_sigma.toml(np.full(3, 0.5), np.full(3, 0.25))
    path.write_text(text)
    get_mu_sigma.refuse_others_result(path)
    path.write_text(f"{text}# of the pictures of June\n")
    with pytest.raises(utils.UserError, match="mu_sigma.txt.*did not write"):
        get_mu_sigma.refuse_others_result(path)


# Somebody else's files of the names that the scripts write.

STRANGERS = {
    "preprocess.py": ["256/a/plain.JPEG", "256/notes.txt", "copies.json"],
    "get_mu_sigma.py": ["mu_sigma.txt"],
}  # fmt: skip


@pytest.mark.parametrize("content", [b"", b'{"key": 1}'])
@pytest.mark.parametrize(
    ("script", "name"), [(script, name) for script, names in STRANGERS.items() for name in names]
)
def test_files_of_strangers_are_kept_and_named(script, name, content, settings, tmp_path):
    folder = tmp_path / "preprocessed"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_bytes(content)
    result = toolkit.run(script, settings, *ARGUMENTS.get(script, []))
    named = folder / "256" if "256" in name else folder / name
    toolkit.assert_one_line_error(result, script, str(named))
    assert {path: kept for path, kept in tree(folder).items() if kept} == (
        {name: content} if content else {}
    )
    assert (folder / name).exists()


@pytest.mark.parametrize(
    ("script", "name"), [(script, name) for script, names in STRANGERS.items() for name in names]
)
def test_a_folder_of_a_files_name_is_named(script, name, settings, tmp_path):
    (tmp_path / "preprocessed" / name / "within").mkdir(parents=True)
    result = toolkit.run(script, settings, *ARGUMENTS.get(script, []))
    named = "256" if "256" in name else name
    toolkit.assert_one_line_error(result, script, str(tmp_path / "preprocessed" / named))


def test_a_disk_too_small_is_refused_beforehand(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", disk_with(50_000))
    with pytest.raises(UserError, match=r"preprocessed: .*need.* [\d.]+ [kM]B.*50 kB"):
        in_process(preprocess, monkeypatch, settings, "--shorter_side=256")
    assert sorted(tree(tmp_path / "preprocessed")) == [".preprocess.lock", "copies.json"]


def test_one_broken_picture_is_warned_of_and_counted(tmp_path, toy):
    dataset = linked_dataset(tmp_path / "data", toy, "train", 24)
    truncate(dataset / "train/discs/0000.JPEG")
    config = toolkit.write_config(tmp_path, dataset, tmp_path / "buffer")
    result = toolkit.run("preprocess.py", config, "--shorter_side=256")
    assert result.returncode == 0
    warnings = result.stderr.splitlines()
    assert len(warnings) == 1
    assert warnings[0].startswith("preprocess.py: warning: discs/0000.JPEG: ")
    last = result.stdout.splitlines()[-1]
    assert "of 23 pictures" in last and "1 could not be decoded" in last
    assert len(tree(tmp_path / "preprocessed/256")) == 23


@pytest.mark.parametrize("script", ["preprocess.py", "preprocess_val.py", "get_mu_sigma.py"])
def test_too_many_broken_pictures_are_all_named_and_stop_it(script, tmp_path, toy):
    part = "val" if script == "preprocess_val.py" else "train"
    dataset = linked_dataset(tmp_path / "data", toy, part, 40)
    broken = sorted((dataset / part).rglob("*.JPEG"))[::5]
    for path in broken:
        truncate(path)
    config = toolkit.write_config(tmp_path, dataset, tmp_path / "buffer")
    result = toolkit.run(script, config, *ARGUMENTS.get(script, []))
    toolkit.assert_one_line_error(result, script, "8 of 40 pictures", "1 in 100")
    named = re.findall(r"warning: (\S+): left out, cannot be decoded", result.stderr)
    assert sorted(named) == [str(path.relative_to(dataset / part)) for path in broken]
    assert not any(map(is_leftover, tree(tmp_path / "preprocessed")))


@pytest.mark.parametrize("script", ["preprocess.py", "preprocess_val.py", "get_mu_sigma.py"])
def test_a_list_of_one_broken_picture_alone_is_refused(script, tmp_path):
    """However often it names it. No mean of nothing is written."""
    for part in ("train", "val"):
        (tmp_path / "data" / part).mkdir(parents=True)
        (tmp_path / "data" / part / "a.JPEG").write_bytes(b"no picture")
        (tmp_path / "data" / f"{part}.txt").write_text("a.JPEG 0\na.JPEG 0\n")
    config = toolkit.write_config(tmp_path, tmp_path / "data", tmp_path / "buffer")
    result = toolkit.run(script, config, *ARGUMENTS.get(script, []))
    toolkit.assert_one_line_error(result, script, "2 of 2 pictures")
    assert result.stderr.count("a.JPEG: left out") == 1
    assert not list((tmp_path / "preprocessed").rglob("mu_sigma.txt"))


@pytest.mark.parametrize("script", ["preprocess.py", "preprocess_val.py"])
def test_a_disk_that_fills_up_is_one_line_that_names_the_file(script, settings, tmp_path):
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))"
    result = run_under(limit, script, settings, *ARGUMENTS.get(script, []))
    # Pillow writes the part of a JPEG that there is room for, and says nothing.
    reason = "only part of it could be written" if script == "preprocess.py" else "File too large"
    toolkit.assert_one_line_error(result, script, str(tmp_path / "preprocessed"), reason)
    assert [name for name in tree(tmp_path / "preprocessed") if "aside" in name] == []


@pytest.mark.parametrize("script", ["preprocess.py", "preprocess_val.py", "get_mu_sigma.py"])
def test_files_are_made_with_the_users_umask(script, settings, tmp_path):
    assert (
        run_under("os.umask(0o027)", script, settings, *ARGUMENTS.get(script, [])).returncode == 0
    )
    made = list((tmp_path / "preprocessed").rglob("*"))
    assert made
    for path in made:
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


@pytest.mark.parametrize("script", ["preprocess.py", "preprocess_val.py", "get_mu_sigma.py"])
def test_a_file_in_place_of_the_folder_is_named(script, settings, tmp_path):
    (tmp_path / "preprocessed").write_text("")
    result = toolkit.run(script, settings, *ARGUMENTS.get(script, []))
    toolkit.assert_one_line_error(result, script, str(tmp_path / "preprocessed"))


def test_copies_count_as_complete_when_they_are_on_the_disk(settings, tmp_path, monkeypatch):
    said, write = [], utils.write_record
    monkeypatch.setattr(os, "sync", lambda: said.append("sync"))

    def noted(path: Path, note: preprocess.CopiesNote) -> None:
        said.append(note.complete)
        write(path, note)

    monkeypatch.setattr(utils, "write_record", noted)
    in_process(preprocess, monkeypatch, settings, "--shorter_side=256")
    assert said == [[], "sync", [256]]


@pytest.mark.parametrize("script", ["preprocess.py", "get_mu_sigma.py"])
def test_python_may_leave_out_the_folder_of_the_script(script, settings):
    """python -I, and PYTHONSAFEPATH."""
    command = toolkit.command(script, settings, *ARGUMENTS.get(script, []))
    isolated = subprocess.run([command[0], "-I", *command[1:]], capture_output=True, text=True)
    assert isolated.returncode == 0 and isolated.stderr == ""
    run_well(script, settings, *ARGUMENTS.get(script, []))


# --- get_mu_sigma.py --------------------------------------------------------------------------


def numpy_mu_sigma(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """float64 [3] each: every picture weighs the same, pixels scaled to 0…1."""
    pictures = [np.asarray(as_pillow_opens(path), np.float64) / 255 for path in folder.rglob("*.*")]
    mu = np.mean([x.mean((0, 1)) for x in pictures], 0)
    variance = np.mean([((x - mu) ** 2).mean((0, 1)) for x in pictures], 0)
    return mu, np.sqrt(variance)


def printed_section(stdout: str) -> str:
    return re.search(r"\[utils\]\n(?:\w+ = [\d.]+\n)+", stdout)[0]


def values_of(section: str) -> np.ndarray:
    """float64 [2, 3]: mu and sigma."""
    values = tomllib.loads(section)["utils"]
    assert list(values) == ["mu_0", "mu_1", "mu_2", "sigma_0", "sigma_1", "sigma_2"]
    return np.reshape(list(values.values()), (2, 3))


def test_mu_and_sigma_are_numpys(settings, mixed, tmp_path):
    result = run_well("get_mu_sigma.py", settings)
    section = printed_section(result.stdout)
    assert np.abs(values_of(section) - numpy_mu_sigma(mixed / "train")).max() < 6e-6
    files = tree(tmp_path / "preprocessed")
    assert list(files.values()) == [section.encode()]
    assert str(tmp_path / "preprocessed" / next(iter(files))) in result.stdout


def test_the_printed_section_can_be_pasted(settings):
    section = printed_section(run_well("get_mu_sigma.py", settings).stdout)
    text = settings.read_text(encoding="utf-8")
    start, end = text.index("[utils]"), text.index("[l2]")
    settings.write_text(text[:start] + section + "\n" + text[end:], encoding="utf-8")
    values = utils.load_config(settings).utils
    mu, sigma = values.mu, values.sigma
    assert np.array_equal([mu, sigma], values_of(section))


def test_any_number_of_cores_gives_the_same_bits(settings, mixed, monkeypatch):
    pictures = preprocess.training_pictures(utils.load_config(settings))
    results, of_all = [], functools.partial(get_mu_sigma.mu_sigma, pictures)
    for cores in (1, 2, 5):
        monkeypatch.setattr(utils, "cores", lambda cores=cores: cores)
        results.append(of_all(preprocess.Failures(len(pictures))))
    for result in results:
        assert np.array_equal(result, results[0])
        assert np.allclose(result, numpy_mu_sigma(mixed / "train"), rtol=1e-10, atol=0)


def test_one_core_alone_gives_the_same_output(settings, tmp_path):
    whole = run_well("get_mu_sigma.py", settings)
    core = min(os.sched_getaffinity(0))
    alone = run_under(f"os.sched_setaffinity(0, [{core}])", "get_mu_sigma.py", settings)
    assert alone.returncode == 0
    assert printed_section(alone.stdout) == printed_section(whole.stdout)


def test_the_resized_copies_can_be_read_instead(settings, mixed, tmp_path):
    result = toolkit.run("get_mu_sigma.py", settings, "--shorter_side=256")
    toolkit.assert_one_line_error(result, "get_mu_sigma.py", str(tmp_path / "preprocessed/256"))
    run_well("preprocess.py", settings, "--shorter_side=256")
    expected = numpy_mu_sigma(tmp_path / "preprocessed/256")
    result = run_well("get_mu_sigma.py", settings, "--shorter_side=256")
    found = values_of(printed_section(result.stdout))
    assert np.abs(found - expected).max() < 6e-6
    assert np.abs(found - numpy_mu_sigma(mixed / "train")).max() > 1e-4


def test_a_broken_picture_is_left_out_of_the_mean(tmp_path, toy):
    dataset = linked_dataset(tmp_path / "data", toy, "train", 12)
    broken = dataset / "train/discs/0000.JPEG"
    truncate(broken)
    config = toolkit.write_config(tmp_path, dataset, tmp_path / "buffer")
    result = toolkit.run("get_mu_sigma.py", config)
    assert result.returncode == 0
    assert len(result.stderr.splitlines()) == 1
    assert "warning: discs/0000.JPEG" in result.stderr
    assert "1 could not be decoded" in result.stdout
    broken.unlink()
    expected = numpy_mu_sigma(dataset / "train")
    assert np.abs(values_of(printed_section(result.stdout)) - expected).max() < 6e-6
