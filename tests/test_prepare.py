"""The three scripts that run once before training, as commands, against Pillow and NumPy.

python3 -m pytest tests/test_prepare.py
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import toolkit
import utils
from utils import UserError

import numpy as np
import pytest
from PIL import Image

import get_mu_sigma
import preprocess
import toy_dataset

SIDES = range(256, 481, 7)


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


def mtimes(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


RUNTIME = ["--epoch_start=0", "--epoch_end=1", "--batch_size=4"]


def run_well(script: str, config: Path, *arguments: str) -> subprocess.CompletedProcess:
    result = toolkit.run(script, config, *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, "it was over before it could be stopped"
        time.sleep(0.001)


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
    assert names == [*map(str, SIDES), "copies.json", "copies_of.txt"]
    assert (copies.folder / "copies_of.txt").read_text() == str(mixed / "train")
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
    assert sorted(path.name for path in made.iterdir()) == ["263", "copies.json", "copies_of.txt"]
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
    assert utils.is_leftover(leftover.name)
    result = run_well("preprocess.py", settings, "--shorter_side=256")
    assert "2 of 9 resized copies are still to be made" in result.stdout
    assert tree(folder) == whole
    changed = {path for path, at in mtimes(folder).items() if times[path] != at}
    remade = {folder / "256/a/plain.JPEG", folder / "256/b/large.JPEG"}
    assert changed == remade | {folder / "copies.json"}
    result = run_well("preprocess.py", settings, "--shorter_side=256")
    assert "0 of 9 resized copies are still to be made" in result.stdout


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
        assert not utils.is_leftover(path.name)
        as_pillow_opens(path)


def test_copies_of_another_dataset_are_refused_and_not_trained_on(settings, tmp_path, mixed):
    """With the same names, in the same path_to_save."""
    run_well("preprocess.py", settings, "--shorter_side=256")
    shutil.copytree(mixed, tmp_path / "other")
    other = toolkit.write_config(tmp_path, tmp_path / "other", tmp_path / "buffer")
    result = toolkit.run("preprocess.py", other, "--shorter_side=263")
    toolkit.assert_one_line_error(result, "preprocess.py", str(mixed / "train"), "copies_of.txt")
    preview = f"--preview={tmp_path / 'sheet.png'}"
    result = toolkit.run("runtime_preprocessing.py", other, *RUNTIME, preview)
    assert result.returncode == 0 and "are of other pictures" in result.stderr
    assert "from the originals" in result.stdout
    result = toolkit.run("get_mu_sigma.py", other, "--shorter_side=256")
    toolkit.assert_one_line_error(result, "get_mu_sigma.py", "of other pictures")


def test_copies_under_way_are_not_trained_on(many, tmp_path):
    """What a batch holds would depend on how many of them there are when it is made."""
    copies = tmp_path / "preprocessed/256"
    making = toolkit.start("preprocess.py", many, "--shorter_side=all", log=tmp_path / "log.txt")
    wait_until(lambda: any(copies.rglob("[!.]*.*")), making)
    making.send_signal(signal.SIGSTOP)
    try:
        preview = f"--preview={tmp_path / 'sheet.png'}"
        result = toolkit.run("runtime_preprocessing.py", many, *RUNTIME, preview)
        second = toolkit.run("preprocess.py", many, "--shorter_side=263")
    finally:
        making.kill()
        making.wait()
    assert result.returncode == 0 and "preprocess.py is running here" in result.stderr
    assert "from the originals" in result.stdout
    toolkit.assert_one_line_error(second, "preprocess.py", "another preprocess.py")


def test_copies_are_not_added_to_while_batches_are_made_from_them(settings, tmp_path):
    run_well("preprocess.py", settings, "--shorter_side=256")
    buffer = tmp_path / "buffer"
    log = tmp_path / "log.txt"
    runtime = toolkit.start("runtime_preprocessing.py", settings, *RUNTIME, log=log)
    wait_until(lambda: any(buffer.glob("X_*")), runtime)
    try:
        result = toolkit.run("preprocess.py", settings, "--shorter_side=263")
    finally:
        runtime.kill()
        runtime.wait()
    toolkit.assert_one_line_error(result, "preprocess.py", "runtime_preprocessing.py is making")
    assert not (tmp_path / "preprocessed/263").exists()
    run_well("preprocess.py", settings, "--shorter_side=263")


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
    assert "preprocessed/256: copies incomplete (also in 32 other shorter sides)" in result.stderr
    assert "from the originals" in result.stdout
    run_well("preprocess.py", many, "--shorter_side=256")
    result = preview(many, tmp_path)
    assert "preprocessed/263: copies incomplete (also in 31 other shorter sides)" in result.stderr
    assert "from resized copies for 1 of the 33 shorter sides" in result.stdout
    assert toolkit.recipe_of(many).spec.resized == [256]


def test_it_says_how_many_copies_are_missing(settings, tmp_path, mixed):
    run_well("preprocess.py", settings, "--shorter_side=256")
    assert preview(settings, tmp_path).stderr == ""
    shutil.copytree(mixed, tmp_path / "more")
    more = toolkit.write_config(tmp_path, tmp_path / "more", tmp_path / "buffer")
    (tmp_path / "preprocessed/copies_of.txt").unlink()  # as the refusal says
    assert "0 of 9 resized" in run_well("preprocess.py", more, "--shorter_side=256").stdout
    assert preview(more, tmp_path).stderr == ""  # the same pictures in another place
    for i in range(3):
        save_picture(tmp_path / f"more/train/a/new{i}.JPEG", picture(i, (300, 300)))
    result = preview(more, tmp_path)
    assert "256: copies incomplete, 3 missing; the originals are used" in result.stderr
    assert "preprocess.py --shorter_side=256" in result.stderr
    assert "3 of 12 resized" in run_well("preprocess.py", more, "--shorter_side=256").stdout
    assert preview(more, tmp_path).stderr == ""


def test_copies_of_pictures_that_were_replaced_since_are_refused(tmp_path, mixed):
    shutil.copytree(mixed, tmp_path / "data")
    config = toolkit.write_config(tmp_path, tmp_path / "data", tmp_path / "buffer")
    run_well("preprocess.py", config, "--shorter_side=256")
    save_picture(tmp_path / "data/train/a/plain.JPEG", picture(30, (400, 300)))
    result = toolkit.run("preprocess.py", config, "--shorter_side=256")
    toolkit.assert_one_line_error(result, "preprocess.py", "preprocessed/256", "were replaced")
    assert (
        "were replaced after these copies were made; the originals"
        in preview(config, tmp_path).stderr
    )
    result = toolkit.run("get_mu_sigma.py", config, "--shorter_side=256")
    toolkit.assert_one_line_error(result, "get_mu_sigma.py", "were replaced")
    run_well("preprocess.py", config, "--shorter_side=263")
    shutil.rmtree(tmp_path / "preprocessed/256")
    run_well("preprocess.py", config, "--shorter_side=256")
    assert_contents_are_right(tmp_path / "preprocessed/256", tmp_path / "data")


def test_a_copy_of_length_0_is_made_again(settings, tmp_path):
    """As a power failure left it."""
    run_well("preprocess.py", settings, "--shorter_side=256")
    whole = tree(tmp_path / "preprocessed/256")
    (tmp_path / "preprocessed/256/a/plain.JPEG").write_bytes(b"")
    result = run_well("preprocess.py", settings, "--shorter_side=256")
    assert "1 of 9 resized copies are still to be made" in result.stdout
    assert tree(tmp_path / "preprocessed/256") == whole


def test_a_copy_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd)), fsync(fd)))

    def renamed(aside, path):
        status = os.stat(aside)
        assert any((s.st_ino, s.st_size) == (status.st_ino, status.st_size) for s in synced)
        replace(aside, path)

    monkeypatch.setattr(os, "replace", renamed)
    preprocess.save_jpeg(picture(0, (300, 256)), tmp_path / "a.JPEG")
    assert (tmp_path / "a.JPEG").stat().st_size


@pytest.mark.parametrize("script", ["preprocess.py", "preprocess_val.py"])
@pytest.mark.parametrize("length", [239, 255])
def test_long_file_names_are_fine(script, length, tmp_path):
    for part in ("train", "val"):
        name = "ü" * 50 + "x" * (length - 105) + ".JPEG"
        save_picture(tmp_path / "data" / part / "a" / name, picture(0, (300, 256)))
    config = toolkit.write_config(tmp_path, tmp_path / "data", tmp_path / "buffer")
    run_well(script, config, *(["--shorter_side=256"] if script == "preprocess.py" else []))
    assert len(list((tmp_path / "preprocessed").rglob("*.JPEG"))) == (script == "preprocess.py")


def test_looking_for_missing_copies_takes_little_memory(tmp_path):
    """One folder of many pictures stands for all 33 sides: its names are held once at most."""
    count = 1000
    names = [f"{i:06}.JPEG" for i in range(count)]
    (tmp_path / "256").mkdir()
    for name in names[: count - 10]:
        (tmp_path / "256" / name).write_bytes(b"x")
    for side in SIDES[1:]:
        (tmp_path / str(side)).symlink_to(tmp_path / "256")
    pictures = preprocess.Pictures(
        tmp_path, preprocess.Paths(names), np.zeros(count, np.int32), ["a"], "one folder"
    )
    tracemalloc.start()
    wanted = preprocess.missing(pictures, {side: tmp_path / str(side) for side in SIDES})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert wanted.tolist() == [0] * (count - 10) + [2**33 - 1] * 10
    assert peak < 400 * count  # the names of 33 sides as text take 3,000 bytes per picture


# Somebody else's files of the names that the scripts write.

STRANGERS = {
    "preprocess.py": ["256/a/plain.JPEG", "256/notes.txt", "copies_of.txt", "copies.json"],
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
    arguments = ["--shorter_side=256"] if script == "preprocess.py" else []
    result = toolkit.run(script, settings, *arguments)
    named = folder / "256" if "256" in name else folder / name
    toolkit.assert_one_line_error(result, script, str(named), "path_to_save")
    assert tree(folder) == {name: content}


@pytest.mark.parametrize(
    ("script", "name"), [(script, name) for script, names in STRANGERS.items() for name in names]
)
def test_a_folder_of_a_files_name_is_named(script, name, settings, tmp_path):
    (tmp_path / "preprocessed" / name / "within").mkdir(parents=True)
    arguments = ["--shorter_side=256"] if script == "preprocess.py" else []
    result = toolkit.run(script, settings, *arguments)
    named = "256" if "256" in name else name
    toolkit.assert_one_line_error(result, script, str(tmp_path / "preprocessed" / named))


def test_a_disk_too_small_is_refused_beforehand(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", disk_with(50_000))
    with pytest.raises(UserError, match=r"preprocessed: .*need.* [\d.]+ [kM]B.*50 kB"):
        in_process(preprocess, monkeypatch, settings, "--shorter_side=256")
    assert list(tree(tmp_path / "preprocessed")) == ["copies_of.txt"]


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
def test_too_many_broken_pictures_stop_it(script, tmp_path, toy):
    part = "val" if script == "preprocess_val.py" else "train"
    dataset = linked_dataset(tmp_path / "data", toy, part, 12)
    for path in sorted((dataset / part).rglob("*.JPEG"))[:2]:
        truncate(path)
    config = toolkit.write_config(tmp_path, dataset, tmp_path / "buffer")
    arguments = ["--shorter_side=256"] if script == "preprocess.py" else []
    result = toolkit.run(script, config, *arguments)
    toolkit.assert_one_line_error(result, script, "2 of 12 pictures", "1 in 100")
    assert result.stderr.count("left out, cannot be decoded") == 2
    assert not any(utils.is_leftover(Path(name).name) for name in tree(tmp_path / "preprocessed"))


@pytest.mark.parametrize("script", ["preprocess.py", "preprocess_val.py"])
def test_a_disk_that_fills_up_is_one_line_that_names_the_file(script, settings, tmp_path):
    arguments = ["--shorter_side=256"] if script == "preprocess.py" else []
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))"
    result = run_under(limit, script, settings, *arguments)
    # Pillow writes the part of a JPEG that there is room for, and says nothing.
    reason = "only part of it could be written" if script == "preprocess.py" else "File too large"
    toolkit.assert_one_line_error(result, script, str(tmp_path / "preprocessed"), reason)
    assert [name for name in tree(tmp_path / "preprocessed") if "aside" in name] == []


@pytest.mark.parametrize("script", ["preprocess.py", "preprocess_val.py", "get_mu_sigma.py"])
def test_files_are_made_with_the_users_umask(script, settings, tmp_path):
    arguments = ["--shorter_side=256"] if script == "preprocess.py" else []
    assert run_under("os.umask(0o027)", script, settings, *arguments).returncode == 0
    made = list((tmp_path / "preprocessed").rglob("*"))
    assert made
    for path in made:
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


@pytest.mark.parametrize("script", ["preprocess.py", "preprocess_val.py", "get_mu_sigma.py"])
def test_a_file_in_place_of_the_folder_is_named(script, settings, tmp_path):
    (tmp_path / "preprocessed").write_text("")
    arguments = ["--shorter_side=256"] if script == "preprocess.py" else []
    result = toolkit.run(script, settings, *arguments)
    toolkit.assert_one_line_error(result, script, str(tmp_path / "preprocessed"))


def test_copies_count_as_complete_when_they_are_on_the_disk(settings, tmp_path, monkeypatch):
    told, note = [], preprocess.note_copies
    monkeypatch.setattr(os, "sync", lambda: told.append("sync"))

    def noted(*arguments: object, complete: bool) -> None:
        told.append(complete)
        note(*arguments, complete=complete)

    monkeypatch.setattr(preprocess, "note_copies", noted)
    in_process(preprocess, monkeypatch, settings, "--shorter_side=256")
    assert told == [False, "sync", True]


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
    results = []
    for cores in (1, 2, 5):
        monkeypatch.setattr(utils, "cores", lambda cores=cores: cores)
        results.append(get_mu_sigma.mu_sigma(pictures, preprocess.Failures(len(pictures))))
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
