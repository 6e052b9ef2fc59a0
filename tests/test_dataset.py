"""The layouts that datasets have on disk: what is found, how it is labelled, what is refused.

python3 -m pytest tests/test_dataset.py
"""

import io
import os
import re
import shutil
from pathlib import Path

import toolkit
import utils
from utils import UserError

import numpy as np
import pytest
from PIL import Image

import preprocess
from preprocess import Pictures

WNIDS = ("n02", "n10", "n01")
"""Classes, deliberately not in sorted order: n01 has label 0, n02 label 1, n10 label 2."""

NAMES = {"n01": "tench, Tinca tinca", "n02": "goldfish", "n10": "great white shark"}
TRAIN = {f"{wnid}_{i}.JPEG": wnid for wnid in WNIDS for i in (3, 1, 2)}
VAL = {f"ILSVRC2012_val_0000000{i}.JPEG": WNIDS[i % 3] for i in range(1, 7)}


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (90, 60, 30)).save(file, "JPEG")
    return file.getvalue()


JPEG = jpeg()


def put(path: Path, content: bytes = JPEG) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


# --- the layouts ------------------------------------------------------------------------------


def rank(wnid: str) -> int:
    return sorted(WNIDS).index(wnid)


def mapping_text() -> str:
    return "".join(f"{wnid} {name}\n" for wnid, name in sorted(NAMES.items()))


def make_class_folders(root: Path) -> None:
    for name, wnid in TRAIN.items():
        put(root / "train" / wnid / name)
    for name, wnid in VAL.items():
        put(root / "val" / wnid / name)


def make_kaggle_tree(root: Path, below: str = "ILSVRC/Data/CLS-LOC") -> None:
    """As `kaggle competitions download imagenet-object-localization-challenge` unpacks it."""
    for name, wnid in TRAIN.items():
        put(root / below / "train" / wnid / name)
    for name in VAL:
        put(root / below / "val" / name)
    put(root / below / "test" / "ILSVRC2012_test_00000001.JPEG")
    boxes = "{0} 85 1 499 272 {0} 1 2 3 4 "
    rows = [f"{Path(name).stem},{boxes.format(wnid)}\n" for name, wnid in reversed(VAL.items())]
    (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(rows))
    (root / "LOC_synset_mapping.txt").write_text(mapping_text())
    (root / "LOC_sample_submission.csv").write_text("ImageId,PredictionString\n")


def make_list_files(root: Path, train: str, val: str) -> None:
    for name, wnid in TRAIN.items():
        put(root / train / wnid / name)
    for name in VAL:
        put(root / val / name)
    lines = [f"{wnid}/{name} {rank(wnid)}\n" for name, wnid in TRAIN.items()]
    (root / "train.txt").write_text("".join(lines))
    (root / "val.txt").write_text("".join(f"{name} {rank(w)}\n" for name, w in VAL.items()))


LAYOUTS = {
    "class folders": (make_class_folders, "."),
    "Kaggle's tree at its root": (make_kaggle_tree, "."),
    "Kaggle's tree at ILSVRC": (make_kaggle_tree, "ILSVRC"),
    "Kaggle's tree at CLS-LOC": (make_kaggle_tree, "ILSVRC/Data/CLS-LOC"),
    "Kaggle's tree without ILSVRC": (lambda root: make_kaggle_tree(root, "Data/CLS-LOC"), "."),
    "list files and 2012_train": (lambda r: make_list_files(r, "2012_train", "2012_val"), "."),
    "list files and train": (lambda root: make_list_files(root, "train", "val"), "."),
}


@pytest.fixture
def settings(tmp_path):
    """A function: the config for a dataset folder, any number of pictures."""

    def load(dataset: Path, **values):
        return utils.load_config(
            toolkit.write_config(tmp_path, dataset, tmp_path / "buffer", **values)
        )

    return load


def labels_by_name(pictures: Pictures) -> dict[str, int]:
    return {
        Path(path).name: int(label)
        for path, label in zip(pictures.paths, pictures.labels, strict=True)
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_the_same_pictures_and_labels(layout, tmp_path, settings):
    make, below = LAYOUTS[layout]
    make(tmp_path / "data")
    config = settings(tmp_path / "data" / below, train__N=len(TRAIN), preprocess__N=len(VAL))
    train, val = preprocess.training_pictures(config), preprocess.validation_pictures(config)
    assert labels_by_name(train) == {name: rank(wnid) for name, wnid in TRAIN.items()}
    assert labels_by_name(val) == {name: rank(wnid) for name, wnid in VAL.items()}
    for pictures in (train, val):
        assert pictures.labels.dtype == np.int32
        assert len(pictures) == len(set(pictures.paths)) == len(pictures.labels)
        assert len(pictures.class_names) == len(WNIDS)
        for path in pictures.paths:
            assert (pictures.folder / path).read_bytes() == JPEG


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_command_finds_each_layout(layout, tmp_path):
    make, below = LAYOUTS[layout]
    make(tmp_path / "data")
    config = toolkit.write_config(tmp_path, tmp_path / "data" / below, tmp_path / "buffer")
    result = toolkit.run("preprocess_val.py", config)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    labels = np.load(tmp_path / "preprocessed" / "val" / "y.npy")
    assert sorted(labels.tolist()) == [0, 0, 1, 1, 2, 2]


def test_the_order_does_not_depend_on_the_order_of_creation(tmp_path, settings):
    make_class_folders(tmp_path / "a")
    for path in sorted((tmp_path / "a").rglob("*.JPEG"), reverse=True):
        put(tmp_path / "b" / path.relative_to(tmp_path / "a"))
    one, other = (preprocess.training_pictures(settings(tmp_path / name)) for name in "ab")
    assert list(one.paths) == list(other.paths) and one.fingerprint == other.fingerprint


def test_the_fingerprint_tells_datasets_apart(tmp_path, settings):
    make_class_folders(tmp_path)
    found = [preprocess.training_pictures(settings(tmp_path)).fingerprint]
    picture = tmp_path / "train/n01/n01_1.JPEG"
    picture.rename(tmp_path / "train/n01/n01_9.JPEG")
    found.append(preprocess.training_pictures(settings(tmp_path)).fingerprint)
    (tmp_path / "train/n01/n01_9.JPEG").rename(tmp_path / "train/n02/n01_9.JPEG")
    found.append(preprocess.training_pictures(settings(tmp_path)).fingerprint)
    (tmp_path / "train/n02/n01_9.JPEG").unlink()
    found.append(preprocess.training_pictures(settings(tmp_path)).fingerprint)
    assert len(set(found)) == 4


# --- names of the classes ---------------------------------------------------------------------


@pytest.mark.parametrize("file", ["LOC_synset_mapping.txt", "synset_words.txt"])
@pytest.mark.parametrize("layout", ["class folders", "list files and train"])
def test_class_names_come_from_the_mapping(file, layout, tmp_path, settings):
    LAYOUTS[layout][0](tmp_path / "data")
    (tmp_path / "data" / file).write_text(mapping_text(), encoding="utf-8")
    for find in (preprocess.training_pictures, preprocess.validation_pictures):
        names = find(settings(tmp_path / "data")).class_names
        assert names == ["tench, Tinca tinca", "goldfish", "great white shark"]


@pytest.mark.parametrize("below", [".", "ILSVRC", "ILSVRC/Data/CLS-LOC"])
def test_class_names_come_with_kaggles_tree(below, tmp_path, settings):
    make_kaggle_tree(tmp_path / "data")
    names = preprocess.validation_pictures(settings(tmp_path / "data" / below)).class_names
    assert names == ["tench, Tinca tinca", "goldfish", "great white shark"]


def test_class_names_are_the_folders_where_no_mapping_is(tmp_path, settings):
    make_class_folders(tmp_path)
    assert preprocess.training_pictures(settings(tmp_path)).class_names == ["n01", "n02", "n10"]


def test_a_mapping_that_lacks_a_class_leaves_its_folder_name(tmp_path, settings):
    make_class_folders(tmp_path)
    (tmp_path / "synset_words.txt").write_text("n02 goldfish\nn99 unicorn\n\nn01\n")
    assert preprocess.training_pictures(settings(tmp_path)).class_names == [
        "n01",
        "goldfish",
        "n10",
    ]


def test_class_names_of_lists_without_mapping_are_their_folders(tmp_path, settings):
    make_list_files(tmp_path, "train", "val")
    for pictures in (preprocess.training_pictures, preprocess.validation_pictures):
        assert pictures(settings(tmp_path)).class_names == ["n01", "n02", "n10"]


NOT_CLASSES = {
    "none": [("a.JPEG", 0), ("b.JPEG", 1), ("c.JPEG", 2)],
    "one of two classes": [("a/a.JPEG", 0), ("a/b.JPEG", 1), ("b/c.JPEG", 2)],
    "one of all cameras": [
        (f"cam{i}/{i}{j}.JPEG", (i + j) % 3) for i in range(3) for j in range(3)
    ],
    "two of a class": [("a/a.JPEG", 0), ("b/b.JPEG", 1), ("c/c.JPEG", 2), ("d/d.JPEG", 2)],
    "a dot": [("./a.JPEG", 0), ("b/b.JPEG", 1), ("c/c.JPEG", 2)],
}


@pytest.mark.parametrize("folders", NOT_CLASSES)
def test_class_names_of_lists_are_the_labels_where_folders_do_not_tell(folders, tmp_path, settings):
    make_list_files(tmp_path, "train", "val")
    lines = [f"{path} {label}\n" for path, label in NOT_CLASSES[folders]]
    (tmp_path / "train.txt").write_text("".join(lines))
    assert preprocess.training_pictures(settings(tmp_path)).class_names == ["0", "1", "2"]


def test_a_label_beyond_those_of_training_is_refused(tmp_path, settings):
    make_list_files(tmp_path, "train", "val")
    with open(tmp_path / "val.txt", "a") as file:
        file.write("more.JPEG 3\n")
    with pytest.raises(utils.UserError, match=r"val\.txt: more\.JPEG has label 3, .* is 2$"):
        preprocess.validation_pictures(settings(tmp_path))


def test_labels_counted_from_1_are_warned_of(tmp_path, settings, capsys):
    make_list_files(tmp_path, "train", "val")
    for name in ("train.txt", "val.txt"):
        lines = [line.split() for line in (tmp_path / name).read_text().splitlines()]
        (tmp_path / name).write_text("".join(f"{path} {int(n) + 1}\n" for path, n in lines))
    preprocess.training_pictures(settings(tmp_path))
    warning = capsys.readouterr().err
    assert (
        "no pictures in 1 class of 4: 0. " in warning and "labels in lists count from 0" in warning
    )


# --- N ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["class folders", "Kaggle's tree at its root"])
def test_a_wrong_n_is_refused_with_both_numbers(layout, tmp_path, settings):
    LAYOUTS[layout][0](tmp_path / "data")
    with pytest.raises(UserError, match=r"\[train\] N is 1281167\b.*\b9\b"):
        preprocess.training_pictures(settings(tmp_path / "data", train__N=1281167))
    with pytest.raises(UserError, match=r"\[preprocess\] N is 50000\b.*\b6\b"):
        preprocess.validation_pictures(settings(tmp_path / "data", preprocess__N=50000))


def test_real_commands_refuse_a_wrong_n(tmp_path):
    make_class_folders(tmp_path / "data")
    config = toolkit.write_config(
        tmp_path, tmp_path / "data", tmp_path / "buffer", train__N=10, preprocess__N=5
    )
    for script, arguments, words in (
        ("get_mu_sigma.py", [], ["[train]", "N is 10", " 9 pictures"]),
        ("preprocess.py", ["--shorter_side=256"], ["[train]", "N is 10", " 9 pictures"]),
        ("preprocess_val.py", [], ["[preprocess]", "N is 5", " 6 pictures"]),
    ):
        result = toolkit.run(script, config, *arguments)
        toolkit.assert_one_line_error(result, script, *words)
    assert not (tmp_path / "preprocessed").exists()


# --- what counts as a picture -----------------------------------------------------------------


def test_hidden_files_and_other_files_are_left_out(tmp_path, settings):
    make_class_folders(tmp_path)
    folder = tmp_path / "train/n01"
    for name in ("README.txt", "Thumbs.db", ".DS_Store", "._n01_1.JPEG", ".hidden.JPEG", "JPEG"):
        put(folder / name)
    put(folder / ".thumbnails" / "n01_1.JPEG")
    put(tmp_path / "train" / ".git" / "n01_1.JPEG")
    put(tmp_path / "train" / "stray.JPEG")
    put(tmp_path / "val/n01/notes.csv")
    config = settings(tmp_path, train__N=len(TRAIN), preprocess__N=len(VAL))
    assert set(labels_by_name(preprocess.training_pictures(config))) == set(TRAIN)
    assert set(labels_by_name(preprocess.validation_pictures(config))) == set(VAL)


def test_all_usual_suffixes_count_in_any_case(tmp_path, settings):
    names = ["a.JPEG", "b.jpg", "c.PNG", "d.webp", "e.gif", "f.bmp", "g.tif", "h.tiff", "i.Jpg"]
    for name in names:
        put(tmp_path / "train" / "cat" / name)
    assert set(labels_by_name(preprocess.training_pictures(settings(tmp_path)))) == set(names)


def test_folders_within_a_class_belong_to_it(tmp_path, settings):
    put(tmp_path / "train/cat/persian/kittens/a.jpg")
    put(tmp_path / "train/cat/b.jpg")
    put(tmp_path / "train/dog/poodle/c.jpg")
    pictures = preprocess.training_pictures(settings(tmp_path))
    assert labels_by_name(pictures) == {"a.jpg": 0, "b.jpg": 0, "c.jpg": 1}
    assert pictures.class_names == ["cat", "dog"]
    for path in pictures.paths:
        assert (pictures.folder / path).is_file()


def test_an_empty_class_is_warned_of_and_keeps_its_rank(tmp_path, settings, capsys):
    make_class_folders(tmp_path)
    (tmp_path / "train/n015").mkdir()
    config = settings(tmp_path)
    train = preprocess.training_pictures(config)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 and "no pictures in 1 class of 4: n015. " in warnings[0]
    val = preprocess.validation_pictures(config)
    (warning,) = capsys.readouterr().err.splitlines()
    assert "1 class of 4: n015. The classes are those of the training set" in warning
    expected = {"n01": 0, "n02": 2, "n10": 3}
    assert labels_by_name(train) == {name: expected[wnid] for name, wnid in TRAIN.items()}
    assert labels_by_name(val) == {name: expected[wnid] for name, wnid in VAL.items()}
    assert train.class_names == val.class_names == ["n01", "n015", "n02", "n10"]


def test_all_classes_without_pictures_are_named_and_how_to_leave_them_out(
    tmp_path, settings, capsys
):
    make_class_folders(tmp_path)
    for name in ("notes", "n00 empty", "labels\x1b[31m"):
        put(tmp_path / "train" / name / "read me.txt")
    config = settings(tmp_path)
    assert len(preprocess.training_pictures(config).class_names) == 6
    (warning,) = capsys.readouterr().err.splitlines()
    assert "3 classes of 6: labels\\x1b[31m, n00 empty, notes. " in warning
    assert "begin a folder's name with a dot" in warning
    for name in ("notes", "n00 empty", "labels\x1b[31m"):  # as the warning says
        (tmp_path / "train" / name).rename(tmp_path / "train" / f".{name}")
    assert preprocess.training_pictures(config).class_names == ["n01", "n02", "n10"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("junk", ["@eaDir", "__MACOSX", "lost+found"])
def test_folders_that_systems_make_are_no_classes(junk, tmp_path, settings):
    """Synology's thumbnails end in .jpg, and lie in a folder beside each picture, too."""
    make_class_folders(tmp_path)
    put(tmp_path / "train" / junk / "n01_1.JPEG" / "SYNOPHOTO_THUMB_M.jpg")
    put(tmp_path / "train/n01" / junk / "n01_1.JPEG" / "SYNOPHOTO_THUMB_M.jpg")
    put(tmp_path / "val" / junk / "._a.JPEG")
    train = preprocess.training_pictures(settings(tmp_path))
    assert train.class_names == ["n01", "n02", "n10"] and len(train) == len(TRAIN)
    assert len(preprocess.validation_pictures(settings(tmp_path))) == len(VAL)


def test_one_name_in_two_unicode_normal_forms_is_explained(tmp_path, settings):
    """As a Mac writes one half of the dataset."""
    put(tmp_path / "train/caf\u00e9/a.jpg")
    put(tmp_path / "train/tea/a.jpg")
    put(tmp_path / "val/cafe\u0301/a.jpg")
    put(tmp_path / "val/tea/a.jpg")
    with pytest.raises(UserError, match="val/cafe\u0301: not a class .* to the letter"):
        preprocess.validation_pictures(settings(tmp_path))


def test_two_classes_that_print_alike_are_refused(tmp_path, settings):
    for name in ("caf\u00e9", "cafe\u0301", "tea"):
        put(tmp_path / "train" / name / "a.jpg")
    with pytest.raises(UserError, match=r"train: two class folders look alike .*; merge them"):
        preprocess.training_pictures(settings(tmp_path))


STRANGE = [
    "with space",
    "it's",
    'say "cheese"',
    "line\nbreak",
    "ünï",
    "-rf",
    "100%",
    "a,b",
    "$HOME",
]


def test_names_may_hold_any_character(tmp_path, settings):
    for name in STRANGE:
        put(tmp_path / "train" / name / f"{name}.jpg")
    strange_bytes = os.fsencode(tmp_path / "train") + b"/caf\xe9"
    os.mkdir(strange_bytes)
    Path(os.fsdecode(strange_bytes + b"/\xff\xfe.jpg")).write_bytes(JPEG)
    pictures = preprocess.training_pictures(settings(tmp_path))
    assert len(pictures) == len(STRANGE) + 1 == len(pictures.class_names)
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{8}", pictures.fingerprint)
    for path, label in zip(pictures.paths, pictures.labels, strict=True):
        assert path.split("/")[0] == pictures.class_names[label]
        assert utils.read_file(pictures.folder / path) == JPEG


def test_a_command_works_on_names_of_any_character(tmp_path):
    for name in STRANGE:
        put(tmp_path / "data/train" / name / f"{name}.jpg")
        put(tmp_path / "data/val" / name / f"{name}.jpg")
    os.mkdir(os.fsencode(tmp_path / "data/train") + b"/caf\xe9")
    os.mkdir(os.fsencode(tmp_path / "data/val") + b"/caf\xe9")
    for part in ("train", "val"):
        name = os.fsencode(tmp_path / "data" / part) + b"/caf\xe9/\xff\xfe.jpg"
        Path(os.fsdecode(name)).write_bytes(JPEG)
    config = toolkit.write_config(tmp_path, tmp_path / "data", tmp_path / "buffer")
    for script, *arguments in (
        ("preprocess.py", "--shorter_side=256"),
        ("preprocess_val.py",),
        ("preprocess_val.py",),
        ("get_mu_sigma.py", "--shorter_side=256"),
    ):
        result = toolkit.run(script, config, *arguments)
        assert result.returncode == 0 and result.stderr == "", (script, result.stderr)
    labels = np.load(tmp_path / "preprocessed/val/y.npy")
    assert labels.tolist() == list(range(len(STRANGE) + 1))


# --- links ------------------------------------------------------------------------------------


def test_links_to_class_folders_and_pictures_are_followed(tmp_path, settings):
    put(tmp_path / "disk1/cats/a.jpg")
    put(tmp_path / "disk2/b.jpg")
    (tmp_path / "data/train/dog").mkdir(parents=True)
    (tmp_path / "data/train/cat").symlink_to(tmp_path / "disk1/cats")
    (tmp_path / "data/train/dog/b.jpg").symlink_to(tmp_path / "disk2/b.jpg")
    pictures = preprocess.training_pictures(settings(tmp_path / "data"))
    assert labels_by_name(pictures) == {"a.jpg": 0, "b.jpg": 1}


def test_a_linked_dataset_is_found(tmp_path, settings):
    make_class_folders(tmp_path / "disk")
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    assert len(preprocess.training_pictures(settings(tmp_path / "data"))) == len(TRAIN)


def test_a_link_to_the_pictures_of_kaggles_tree_is_enough(tmp_path, settings):
    make_kaggle_tree(tmp_path / "disk")
    (tmp_path / "data").symlink_to(tmp_path / "disk/ILSVRC/Data/CLS-LOC")
    pictures = preprocess.validation_pictures(settings(tmp_path / "data"))
    assert labels_by_name(pictures) == {name: rank(wnid) for name, wnid in VAL.items()}


def test_a_mapping_above_other_datasets_is_not_theirs(tmp_path, settings):
    """A file in /data or /tmp, perhaps of somebody else."""
    make_class_folders(tmp_path / "data")
    (tmp_path / "LOC_synset_mapping.txt").write_text("n01 wolf\n")
    names = preprocess.training_pictures(settings(tmp_path / "data")).class_names
    assert names == ["n01", "n02", "n10"]


@pytest.mark.parametrize("content", ['"' + "x" * 200_000, 'a,"b\n' * 99_999])
def test_a_table_of_kaggles_that_is_broken_is_one_line(content, tmp_path, settings):
    make_kaggle_tree(tmp_path)
    (tmp_path / "LOC_val_solution.csv").write_text(content)
    with pytest.raises(UserError, match="LOC_val_solution.csv"):
        preprocess.validation_pictures(settings(tmp_path))


def test_a_list_with_a_huge_label_is_a_short_warning(tmp_path, settings, capsys):
    make_list_files(tmp_path, "train", "val")
    with open(tmp_path / "train.txt", "a") as file:
        file.write((tmp_path / "train.txt").read_text().splitlines()[0].split()[0] + " 999999\n")
    preprocess.training_pictures(settings(tmp_path))
    assert "no pictures in 999,9" in (said := capsys.readouterr().err) and len(said) < 20_000


def test_loops_of_links_do_not_trap(tmp_path, settings):
    make_class_folders(tmp_path)
    (tmp_path / "train/n01/again").symlink_to(tmp_path / "train")
    (tmp_path / "train/n01/here").symlink_to(".")
    pictures = preprocess.training_pictures(settings(tmp_path))
    assert labels_by_name(pictures) == {name: rank(wnid) for name, wnid in TRAIN.items()}
    assert len(pictures) == len(TRAIN)


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("below", [".", "n01", "n01/deeper"])
@pytest.mark.parametrize("target", ["itself", "not there"])
def test_a_link_that_leads_nowhere_is_an_error(target, below, part, tmp_path, settings):
    """Without a class, the labels of those behind it would be others; without a folder of a class,
    its pictures would be missing. An unmounted disk looks like that.
    """
    make_class_folders(tmp_path)
    put(tmp_path / part / "n01/deeper/a.JPEG")
    (tmp_path / part / below / "itself").symlink_to(target)
    find = preprocess.training_pictures if part == "train" else preprocess.validation_pictures
    with pytest.raises(UserError, match=r"/itself: this link leads nowhere") as error:
        find(settings(tmp_path))
    assert str(tmp_path / part) in str(error.value)


def test_a_class_of_training_that_leads_nowhere_is_an_error_for_validation_too(tmp_path, settings):
    make_class_folders(tmp_path)
    (tmp_path / "train/n00").symlink_to("not there")
    with pytest.raises(UserError, match=r"train/n00: this link leads nowhere"):
        preprocess.validation_pictures(settings(tmp_path))


def test_links_to_folders_inside_a_class_are_followed(tmp_path, settings):
    """Also where the same folder is linked twice, once in another folder, and within a link."""
    put(tmp_path / "data/train/cat/a.jpg")
    put(tmp_path / "more/b.jpg")
    put(tmp_path / "more/deeper/c.jpg")
    put(tmp_path / "still more/d.jpg")
    (tmp_path / "more/on another disk").symlink_to(tmp_path / "still more")
    (tmp_path / "data/train/cat/part2").symlink_to(tmp_path / "more")
    (tmp_path / "data/train/cat/zz").symlink_to(tmp_path / "more/deeper")
    (tmp_path / "data/train/cat/part1").symlink_to(tmp_path / "more")
    pictures = preprocess.training_pictures(settings(tmp_path / "data"))
    assert labels_by_name(pictures) == {f"{name}.jpg": 0 for name in "abcd"}
    assert len(pictures) == 4
    for path in pictures.paths:
        assert (pictures.folder / path).read_bytes() == JPEG


def test_a_link_to_a_folder_above_the_linked_class_is_a_loop(tmp_path, settings):
    put(tmp_path / "disk/cats/a.jpg")
    put(tmp_path / "disk/dogs/b.jpg")
    (tmp_path / "disk/cats/up").symlink_to("..")
    (tmp_path / "disk/dogs/cats").symlink_to("../cats")
    (tmp_path / "data/train").mkdir(parents=True)
    (tmp_path / "data/train/cat").symlink_to(tmp_path / "disk/cats")
    (tmp_path / "data/train/dog").symlink_to(tmp_path / "disk/dogs")
    pictures = preprocess.training_pictures(settings(tmp_path / "data"))
    assert list(pictures.paths) == ["cat/a.jpg", "dog/b.jpg", "dog/cats/a.jpg"]


def test_a_class_that_cannot_be_read_is_an_error(tmp_path, settings, monkeypatch):
    """A class must not vanish from training because a disk failed for a moment."""
    make_class_folders(tmp_path)
    scandir = os.scandir

    def failing(path="."):
        if Path(os.fsdecode(path)).name == "n02":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises((OSError, UserError), match="n02"):
        preprocess.training_pictures(settings(tmp_path))


# --- what is refused --------------------------------------------------------------------------

TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def test_the_devkits_ground_truth_is_refused_with_the_reason(tmp_path, settings):
    make_kaggle_tree(tmp_path, ".")
    (tmp_path / "LOC_val_solution.csv").unlink()
    put(tmp_path / TRUTH, b"".join(b"%d\n" % (1 + i % 3) for i in range(len(VAL))))
    with pytest.raises(UserError, match=f"LOC_val_solution.csv.*{TRUTH} does not help.*own order"):
        preprocess.validation_pictures(settings(tmp_path))
    assert len(preprocess.training_pictures(settings(tmp_path))) == len(TRAIN)


def test_kaggles_solution_is_wanted_in_the_folder_of_the_settings(tmp_path, settings):
    make_kaggle_tree(tmp_path / "data")
    (tmp_path / "data/LOC_val_solution.csv").unlink()
    with pytest.raises(UserError, match=f"LOC_val_solution.csv into {tmp_path / 'data'}, "):
        preprocess.validation_pictures(settings(tmp_path / "data"))


def test_a_flat_validation_folder_without_classes_is_refused(tmp_path):
    make_kaggle_tree(tmp_path / "data", ".")
    (tmp_path / "data/LOC_val_solution.csv").unlink()
    config = toolkit.write_config(tmp_path, tmp_path / "data", tmp_path / "buffer")
    toolkit.assert_one_line_error(
        toolkit.run("preprocess_val.py", config),
        "preprocess_val.py",
        str(tmp_path / "data/val"),
        "LOC_val_solution.csv",
    )


@pytest.mark.parametrize("row", ["", "ILSVRC2012_val_00000001,n77 1 2 3 4\n"])
def test_a_picture_without_a_known_class_in_the_solution_is_named(row, tmp_path, settings):
    make_kaggle_tree(tmp_path)
    solution = tmp_path / "LOC_val_solution.csv"
    text = solution.read_text()
    solution.write_text(re.sub("ILSVRC2012_val_00000001.*\n", row, text))
    with pytest.raises(UserError, match=r"ILSVRC2012_val_00000001\.JPEG.*LOC_val_solution"):
        preprocess.validation_pictures(settings(tmp_path))


def test_a_validation_class_that_training_lacks_is_named(tmp_path, settings):
    make_class_folders(tmp_path)
    put(tmp_path / "val/n05/a.JPEG")
    with pytest.raises(utils.UserError, match=r"val/n05.*training"):
        preprocess.validation_pictures(settings(tmp_path))


def remove(root: Path, name: str) -> None:
    root.joinpath(name).rename(root / "elsewhere")


ABSENT = {
    "no dataset": (lambda root: remove(root.parent, "data"), r"ImageNet_folder"),
    "no train": (lambda root: remove(root, "train"), r"ImageNet_folder.*train"),
    "no val": (
        lambda root: remove(root, "val"),
        r"data: no validation set, .* named val, valid, validation, test \(lower case\); ",
    ),
    "a file for a folder": (
        lambda root: (remove(root.parent, "data"), root.write_text("")),
        r"ImageNet_folder",
    ),
}


@pytest.mark.parametrize("name", ABSENT)
def test_what_is_absent_is_named(name, tmp_path, settings):
    make_class_folders(tmp_path / "data")
    break_it, message = ABSENT[name]
    break_it(tmp_path / "data")
    with pytest.raises(UserError, match=message):
        preprocess.validation_pictures(settings(tmp_path / "data"))


def test_a_dataset_without_pictures_is_refused(tmp_path, settings):
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
    with pytest.raises(UserError, match="no pictures"):
        preprocess.training_pictures(settings(tmp_path))
    put(tmp_path / "train/cat/README.txt")
    with pytest.raises(UserError, match="no pictures"):
        preprocess.training_pictures(settings(tmp_path))


# --- list files -------------------------------------------------------------------------------

BAD_LINES = {
    "no label": "n01/n01_1.JPEG",
    "only a label": "3",
    "label as text": "n01/n01_1.JPEG cat",
    "negative label": "n01/n01_1.JPEG -1",
    "fractional label": "n01/n01_1.JPEG 1.0",
    "absolute path": "/etc/passwd.jpg 1",
    "path upwards": "../secret.jpg 1",
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_of_a_list_is_named_with_its_number(name, tmp_path, settings):
    make_list_files(tmp_path, "train", "val")
    lines = (tmp_path / "train.txt").read_text().splitlines()
    (tmp_path / "train.txt").write_text("\n".join([*lines[:2], BAD_LINES[name], *lines[3:]]))
    with pytest.raises(UserError, match=r"train\.txt.*\b3\b"):
        preprocess.training_pictures(settings(tmp_path))


def test_an_empty_list_is_refused(tmp_path, settings):
    make_list_files(tmp_path, "train", "val")
    (tmp_path / "val.txt").write_text("\n")
    with pytest.raises(utils.UserError, match=r"val\.txt"):
        preprocess.validation_pictures(settings(tmp_path))


def test_lists_may_hold_spaces_windows_line_ends_and_any_bytes(tmp_path, settings):
    names = ["a b.jpg", "caf\udce9.jpg", "next\x85line.jpg", "para\u2029graph.jpg"]
    for name in names:
        put(tmp_path / "train" / name)
        put(tmp_path / "val" / name)
    text = "".join(f"{name} {label}\r\n" for label, name in enumerate(names))
    for part in ("train", "val"):
        (tmp_path / f"{part}.txt").write_bytes(os.fsencode(text + "\r\n"))
    pictures = preprocess.training_pictures(settings(tmp_path))
    assert list(pictures.paths) == names
    assert pictures.labels.tolist() == [0, 1, 2, 3]


def test_a_list_in_utf_16_is_named_with_the_way_out(tmp_path, settings):
    make_list_files(tmp_path, "train", "val")
    text = (tmp_path / "train.txt").read_text()
    (tmp_path / "train.txt").write_text(text, encoding="utf-16")
    with pytest.raises(UserError, match=r"train\.txt: line 1: expected .* in UTF-8, not "):
        preprocess.training_pictures(settings(tmp_path))


@pytest.mark.parametrize("encoded", ["with a byte-order mark", "without"])
def test_a_byte_order_mark_is_no_part_of_a_name(encoded, tmp_path, settings):
    mark = b"\xef\xbb\xbf" if encoded == "with a byte-order mark" else b""
    make_list_files(tmp_path, "train", "val")
    for file in ("train.txt", "val.txt"):
        (tmp_path / file).write_bytes(mark + (tmp_path / file).read_bytes())
    (tmp_path / "LOC_synset_mapping.txt").write_bytes(mark + mapping_text().encode())
    for find in (preprocess.training_pictures, preprocess.validation_pictures):
        pictures = find(settings(tmp_path))
        assert pictures.class_names == ["tench, Tinca tinca", "goldfish", "great white shark"]
        for path in pictures.paths:
            assert (pictures.folder / path).read_bytes() == JPEG


def test_a_byte_order_mark_in_kaggles_tables(tmp_path, settings):
    make_kaggle_tree(tmp_path)
    solution, mapping = (
        tmp_path / f"LOC_{name}" for name in ("val_solution.csv", "synset_mapping.txt")
    )
    rows = solution.read_bytes().split(b"\n", 1)[1]  # without the line of headings
    solution.write_bytes(b"\xef\xbb\xbf" + rows)
    mapping.write_bytes(b"\xef\xbb\xbf" + mapping.read_bytes())
    pictures = preprocess.validation_pictures(settings(tmp_path))
    assert labels_by_name(pictures) == {name: rank(wnid) for name, wnid in VAL.items()}
    assert pictures.class_names[0] == "tench, Tinca tinca"


def test_lists_may_separate_with_tabs_or_several_spaces(tmp_path, settings):
    make_list_files(tmp_path, "train", "val")
    for part, gap in (("train", "\t"), ("val", "   ")):
        file = tmp_path / f"{part}.txt"
        file.write_text(file.read_text().replace(" ", gap))
    config = settings(tmp_path)
    assert set(labels_by_name(preprocess.training_pictures(config))) == set(TRAIN)
    assert set(labels_by_name(preprocess.validation_pictures(config))) == set(VAL)


# --- the validation set -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["valid", "validation", "test"])
@pytest.mark.parametrize("layout", ["class folders", "list files and 2012_train", "list files"])
def test_the_validation_set_may_have_other_names(layout, name, tmp_path, settings):
    if layout == "class folders":
        make_class_folders(tmp_path)
    else:
        make_list_files(tmp_path, *(("2012_train", "2012_val") if "2012" in layout else LIST_PARTS))
        (tmp_path / "val.txt").rename(tmp_path / f"{name}.txt")
    old = "2012_val" if "2012" in layout else "val"
    (tmp_path / old).rename(tmp_path / old.replace("val", name))
    pictures = preprocess.validation_pictures(settings(tmp_path))
    assert labels_by_name(pictures) == {name: rank(wnid) for name, wnid in VAL.items()}


LIST_PARTS = ("train", "val")


def test_val_comes_before_the_test_set(tmp_path, settings):
    make_class_folders(tmp_path)
    put(tmp_path / "test" / "n01" / "other.JPEG")
    assert len(preprocess.validation_pictures(settings(tmp_path))) == len(VAL)


@pytest.mark.parametrize("layout", ["class folders", "list files and train"])
def test_training_without_a_validation_set_says_so(layout, tmp_path):
    LAYOUTS[layout][0](tmp_path / "data")
    (tmp_path / "data/val").rename(tmp_path / "elsewhere")
    if (tmp_path / "data/val.txt").exists():
        (tmp_path / "data/val.txt").unlink()
        (tmp_path / "data/train.txt").write_text(
            "".join(f"{name} {rank(wnid)}\n" for name, wnid in TRAIN.items())
        )
        for path in (tmp_path / "data/train").glob("*/*"):
            path.rename(tmp_path / "data/train" / path.name)
        for wnid in WNIDS:
            (tmp_path / "data/train" / wnid).rmdir()
    config = toolkit.write_config(tmp_path, tmp_path / "data", tmp_path / "buffer")
    for script, *arguments in (
        ("get_mu_sigma.py",),
        (
            "runtime_preprocessing.py",
            "--epoch_start=0",
            "--epoch_end=1",
            "--batch_size=2",
            f"--preview={tmp_path / 'a.png'}",
        ),
    ):
        result = toolkit.run(script, config, *arguments)
        assert result.returncode == 0, result.stderr
        assert "no validation set: nothing can be evaluated" in result.stdout
    result = toolkit.run("preprocess_val.py", config)
    expected = f"no {'folder' if layout == 'class folders' else 'list'} named val, valid, "
    toolkit.assert_one_line_error(result, "preprocess_val.py", "no validation set", expected)


def test_a_note_called_train_txt_beside_class_folders_is_named(tmp_path, settings):
    put(tmp_path / "train/cat/a.jpg")
    for text in ("", "\n", "Downloaded on Monday.\n", "cat/a\ncat/b\n"):
        (tmp_path / "train.txt").write_text(text)
        with pytest.raises(UserError, match=r"train\.txt: .* no list of pictures, rename it"):
            preprocess.training_pictures(settings(tmp_path))


@pytest.mark.parametrize("start", ["", "\ufeff", "\n \n"])
def test_a_list_beside_folders_needs_no_list_of_validation(start, tmp_path, settings):
    """The folders are no classes, but cameras: training on them would look like success."""
    lines = [f"cam{camera}/{label}.jpg {label}\n" for camera in (1, 2) for label in (2, 0, 1)]
    for line in lines:
        put(tmp_path / "train" / line.split()[0])
    (tmp_path / "train.txt").write_text(start + "".join(lines), encoding="utf-8")
    pictures = preprocess.training_pictures(settings(tmp_path))
    assert pictures.labels.tolist() == [2, 0, 1, 2, 0, 1]
    assert pictures.class_names == ["0", "1", "2"]


# --- what lies there instead of a dataset -----------------------------------------------------


def refusal(settings, folder: Path) -> str:
    with pytest.raises(UserError) as error:
        preprocess.training_pictures(settings(folder))
    assert "\n" not in str(error.value)
    return str(error.value)


INSTEAD = {
    "ILSVRC2012_img_train.tar": "unpack it as the section of README.md about ImageNet says",
    "n01440764.tar": "it holds ImageNet's archive n01440764.tar; unpack it",
    "imagenet1k-train-0003.tar": "no archives or tables",
    "archive.zip": "no archives or tables",
    "train-00000-of-00294.parquet": "no archives or tables",
    "train-00000-of-01024": "no archives or tables",
    "train.beton": "no archives or tables",
    "notes.txt": "it holds notes.txt",
}


@pytest.mark.parametrize("place", [".", "train"])
@pytest.mark.parametrize("name", INSTEAD)
def test_what_lies_there_instead_is_named_with_the_way_out(name, place, tmp_path, settings):
    put(tmp_path / "data" / place / name, b"")
    put(tmp_path / "data" / place / ".hidden", b"")
    message = refusal(settings, tmp_path / "data")
    assert INSTEAD[name] in message and name in message
    assert "found neither train/<class>/" in message or "no pictures found" in message


@pytest.mark.parametrize("below", ["train", "train/n01", "val"])
def test_one_folder_too_deep_is_named(below, tmp_path, settings):
    make_class_folders(tmp_path / "data")
    assert refusal(settings, tmp_path / "data" / below).endswith(f"mean {tmp_path / 'data'}?")


def test_one_folder_too_high_is_named(tmp_path, settings):
    make_class_folders(tmp_path / "downloads/flowers")
    (tmp_path / "downloads/other").mkdir()
    message = refusal(settings, tmp_path / "downloads")
    assert message.endswith(f"did you mean {tmp_path / 'downloads/flowers'}?")


def test_the_way_out_of_a_flat_validation_set_is_named(tmp_path, settings):
    make_kaggle_tree(tmp_path, ".")
    (tmp_path / "LOC_val_solution.csv").unlink()
    put(tmp_path / TRUTH, b"1\n")
    with pytest.raises(UserError, match=r"LOC_val_solution\.csv into .*valprep\.sh"):
        preprocess.validation_pictures(settings(tmp_path))


def test_validation_pictures_still_in_their_archive_are_named(tmp_path, settings):
    make_class_folders(tmp_path)
    shutil.rmtree(tmp_path / "val")
    put(tmp_path / "val" / "ILSVRC2012_img_val.tar", b"")
    with pytest.raises(UserError, match=r"no pictures found; .*archive ILSVRC2012_img_val\.tar"):
        preprocess.validation_pictures(settings(tmp_path))


# --- pictures of less usual names -------------------------------------------------------------


def encoded(kind: str, **options) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (90, 60, 30)).save(file, kind, **options)
    return file.getvalue()


LESS_USUAL = {
    "a.jfif": JPEG, "b.jpe": JPEG, "c.ppm": encoded("PPM"), "d.pnm": encoded("PPM"),
    "e.jp2": encoded("JPEG2000"), "f.PGM": b"P5 2 2 255\n\x10\x20\x30\x40", "g.dib": encoded("DIB"),
    "h.pbm": b"P1 2 2 1 0 0 1\n", "i.j2k": encoded("JPEG2000", no_jp2=True), "j.mpo": JPEG,
}  # fmt: skip


def test_pictures_of_less_usual_suffixes_are_used(tmp_path, settings, capsys):
    for name, content in LESS_USUAL.items():
        put(tmp_path / "train" / "cat" / name, content)
    pictures = preprocess.training_pictures(settings(tmp_path))
    assert set(labels_by_name(pictures)) == set(LESS_USUAL)
    for index in range(len(pictures)):
        assert preprocess.decode(utils.read_file(pictures.path(index))).mode == "RGB"
    assert capsys.readouterr().err == ""


UNUSED = {
    "by suffix": "train/cat/b.heic",
    "outside of the class folders": "train/b.jpg",
    "a name with an escape sequence": "train/cat/\x1b]0;OWNED\x07.heic",
}


@pytest.mark.parametrize("kind", UNUSED)
def test_a_picture_that_is_not_used_is_named(kind, tmp_path, settings, capsys):
    put(tmp_path / "train/cat/a.jpg")
    put(tmp_path / "train/cat/a.txt", b"a caption")
    put(tmp_path / "train/cat/a.xml", b"<object/>")
    os.mkfifo(tmp_path / "train/cat/pipe")
    put(tmp_path / UNUSED[kind], b"x")
    assert len(preprocess.training_pictures(settings(tmp_path))) == 1
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 and "1 picture not used" in warnings[0]
    assert utils.printable(tmp_path / UNUSED[kind]) in warnings[0]
    assert warnings[0].index("convert") < warnings[0].index(".j2k")  # first the advice


def test_the_suffixes_are_listed_once(tmp_path):
    for name in ("a.heic", "b.heic"):
        put(tmp_path / "data/train/cat" / name)
    config = toolkit.write_config(tmp_path, tmp_path / "data", tmp_path / "buffer")
    result = toolkit.run("get_mu_sigma.py", config)
    toolkit.assert_one_line_error(result, "get_mu_sigma.py", "no pictures found")
    assert result.stderr.count(".j2k") == 1 and "2 pictures not used" in result.stderr


# --- the fingerprint --------------------------------------------------------------------------


def test_pictures_replaced_under_their_old_names_change_the_fingerprint(tmp_path, settings):
    make_class_folders(tmp_path)
    path = tmp_path / "train/n01/n01_1.JPEG"
    found = [preprocess.training_pictures(settings(tmp_path)).fingerprint]
    path.write_bytes(JPEG + b"\0")
    found.append(preprocess.training_pictures(settings(tmp_path)).fingerprint)
    path.unlink()
    path.symlink_to("gone")
    found.append(preprocess.training_pictures(settings(tmp_path)).fingerprint)
    assert len(set(found)) == 3
    assert len({fingerprint.split("-")[0] for fingerprint in found}) == 1
    path.unlink()
    path.write_bytes(JPEG)
    assert preprocess.training_pictures(settings(tmp_path)).fingerprint == found[0]


def test_the_fingerprint_looks_at_the_whole_set(tmp_path, settings, monkeypatch):
    """Of many pictures only some are looked at, but from the first to the last."""
    monkeypatch.setattr(preprocess, "SAMPLED", 5)
    looked_at = []

    def note(path):
        looked_at.append(path)
        return 0

    monkeypatch.setattr(preprocess, "size_of_file", note)
    make_class_folders(tmp_path)
    pictures = preprocess.training_pictures(settings(tmp_path))
    assert pictures.fingerprint
    assert sorted(looked_at) == sorted(pictures.path(i) for i in (0, 2, 4, 6, 8))
