"""check_accuracy.py with models made here, whose answers are known; its charts.

python3 -m pytest tests/test_accuracy.py
"""

import csv
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import toolkit
import utils

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import check_accuracy
import resnet50
from check_accuracy import Model
from preprocess_val import Crops, Note
from resnet50 import ModelRecipe

CLASSES = 7
NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]
ACCURACIES = ("top1_10crop", "top5_10crop", "top1_centre", "top5_centre")
END = 9
SPAN = ["--run_folder=run", "--epoch_start=0"]


class Stand(tf.Module):
    """A model whose probabilities depend on the mean colours of a crop, through fixed weights."""

    def __init__(self, seed: int):
        super().__init__()
        rng = np.random.default_rng(seed)
        self.weights = tf.Variable(rng.normal(size=(3, CLASSES)) * 20, dtype=tf.float32)

    @tf.function(input_signature=[tf.TensorSpec([None, 224, 224, 3], tf.uint8, "images")])
    def classify(self, images):
        means = tf.reduce_mean(tf.cast(images, tf.float32) / 255, [1, 2])
        return {"probabilities": tf.nn.softmax(means @ self.weights)}


def save_model(folder: Path, seed: int, **facts: object) -> Stand:
    model = Stand(seed)
    tf.saved_model.save(model, str(folder), signatures=model.classify)
    (folder / "assets").mkdir(exist_ok=True)
    write_recipe(folder, **({"fingerprint": str(seed), "step": 100 * seed} | facts))
    return model


def write_recipe(folder: Path, **facts: object) -> None:
    facts = {"class_names": NAMES, "mu": [0.5] * 3, "sigma": [0.25] * 3, "flags": {}} | facts
    utils.write_record(folder / "assets" / "recipe.json", ModelRecipe(**facts))


@pytest.fixture
def prepared(tmp_path, toy, ram):
    """Settings, crops of 20 random pictures of 7 classes, and an empty run."""
    config = toolkit.write_config(tmp_path, toy, ram)
    folder = tmp_path / "preprocessed" / "val"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, 20)
    labels[0] = CLASSES - 1
    labels[3] = -1  # a picture that could not be decoded
    for index in np.flatnonzero(labels >= 0):
        low = rng.integers(0, 200, (10, 1, 1, 3))
        crops = low + rng.integers(0, 56, (10, 224, 224, 3))
        np.save(folder / f"X10_{index}.npy", crops.astype(np.uint8))
    np.save(folder / "y.npy", labels.astype(np.int64))
    utils.write_record(folder / "crops.json", Note("/pictures", "1-2", True, NAMES))
    run = tmp_path / "saved_models" / "run"
    run.mkdir(parents=True)
    return config, folder, run, labels


def expected_row(model: Stand, folder: Path, labels: np.ndarray) -> dict[str, float]:
    """Accuracies by sorting, in NumPy."""
    top, losses = {name: [] for name in ACCURACIES}, []
    for index in np.flatnonzero(labels >= 0):
        means = np.load(folder / f"X10_{index}.npy").mean(axis=(1, 2)) / 255
        logits = means @ model.weights.numpy()
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        for name, scores in (("10crop", p.mean(axis=0)), ("centre", p[8])):
            order = np.argsort(-scores)
            top[f"top1_{name}"].append(labels[index] in order[:1])
            top[f"top5_{name}"].append(labels[index] in order[:5])
        losses.append(-np.log(max(p[8][labels[index]], 1e-12)))
    accuracies = {name: float(np.mean(hits)) for name, hits in top.items()}
    return accuracies | {"loss_centre": float(np.mean(losses))}


@pytest.fixture
def check(monkeypatch):
    """Runs the script in this process, which spares it the start of TensorFlow."""

    def checked(config: Path, *arguments: str) -> None:
        command = ["check_accuracy.py", f"--config={config}", *arguments]
        monkeypatch.setattr(check_accuracy.sys, "argv", command)
        monkeypatch.setattr(check_accuracy, "open_device", lambda *_: None)
        try:
            check_accuracy.main()
        finally:
            utils._forget_locks()

    return checked


def rows(run: Path) -> list[dict]:
    with open(run / "accuracy.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_accuracies_against_numpy_and_restart_skips_what_is_done(prepared):
    config, folder, run, labels = prepared
    models = [save_model(run / str(epoch), epoch) for epoch in range(2)]
    result = toolkit.run("check_accuracy.py", config, *SPAN, "--epoch_end=2", "--pictures=6")
    assert result.returncode == 0, result.stderr
    for model, row in zip(models, rows(run), strict=True):
        for name, value in expected_row(model, folder, labels).items():
            assert float(row[name]) == pytest.approx(value, rel=1e-4)
        assert row["pictures"] == "19"
    assert rows(run)[0] != rows(run)[1]
    seen = toolkit.scalars(run / "events" / "accuracy")
    for row in rows(run):
        for name in ACCURACIES:
            shown = seen[f"accuracy/{name}", 100 * int(row["epoch"])]
            assert shown == pytest.approx(float(row[name]), abs=1e-6)
    # What stands in the table is not evaluated again: --keep_last may have removed the model.
    before = (run / "accuracy.csv").read_bytes()
    assert b"\r" not in before
    shutil.rmtree(run / "0")
    again = toolkit.run("check_accuracy.py", config, *SPAN, "--epoch_end=2")
    assert again.returncode == 0, again.stderr
    assert "pictures, epoch 1" in result.stdout + result.stderr
    assert "pictures, epoch 1" not in again.stdout + again.stderr
    assert (run / "accuracy.csv").read_bytes() == before
    assert (run / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert toolkit.scalars(run / "events" / "accuracy") == pytest.approx(seen, rel=1e-5)


def results(run: Path, crops: Crops, *rows: dict) -> check_accuracy.Results:
    made = check_accuracy.Results(run, crops)
    made.rows = {row["epoch"]: row for row in rows}
    return made


def test_a_row_belongs_to_its_model_pictures_and_crops(prepared, capsys):
    _, folder, run, labels = prepared
    save_model(run / "0", 0)
    crops, centre = Crops(folder, 0), Crops(folder, 0, 1)
    row, _ = check_accuracy.evaluate(run / "0", crops, 6)
    assert results(run, crops, row).is_done(0, END)
    assert results(run, centre, row).is_done(0, END)
    assert not results(run, centre, row).is_done(1, END)
    only_centre, _ = check_accuracy.evaluate(run / "0", centre, 6)
    assert not results(run, crops, only_centre).is_done(0, END)
    assert "again" in capsys.readouterr().out
    shutil.rmtree(run / "0")
    assert results(run, crops, only_centre).is_done(0, END)
    save_model(run / "0", 1)  # trained anew
    assert not results(run, crops, row).is_done(0, END)
    (run / "0/assets/recipe.json").write_text("{")  # broken: evaluating it says why
    assert not results(run, crops, row).is_done(0, END)


def test_corrected_labels_or_replaced_pictures_are_evaluated_again(prepared):
    _, folder, run, labels = prepared
    save_model(run / "0", 0)
    row, _ = check_accuracy.evaluate(run / "0", Crops(folder, 0), 6)
    assert results(run, Crops(folder, 0), row).is_done(0, END)
    utils.write_record(folder / "crops.json", Note("/pictures", "1-3", True, NAMES))
    assert not results(run, Crops(folder, 0), row).is_done(0, END)
    utils.write_record(folder / "crops.json", Note("/moved", "1-2", True, NAMES))
    assert results(run, Crops(folder, 0), row).is_done(0, END)
    labels[[0, 1]] = labels[[1, 0]]
    np.save(folder / "y.npy", labels)
    assert not results(run, Crops(folder, 0), row).is_done(0, END)


def test_an_epoch_that_is_evaluated_again_has_one_row(prepared, check):
    config, folder, run, labels = prepared
    for epoch in range(2):
        save_model(run / str(epoch), epoch)
    check(config, *SPAN, "--epoch_end=2")
    before = rows(run)
    labels[[0, 1, 2, 4]] = labels[[4, 2, 0, 1]]
    np.save(folder / "y.npy", labels)
    check(config, *SPAN, "--epoch_end=2")
    assert [row["epoch"] for row in rows(run)] == ["0", "1"]
    assert all(one["crops"] != other["crops"] for one, other in zip(before, rows(run), strict=True))


def test_a_model_that_was_removed_is_not_waited_for(prepared, check):
    """As --keep_last does before a checker starts, or after one that saw only the centre crop."""
    config, _, run, _ = prepared
    for epoch in range(3):
        save_model(run / str(epoch), epoch)
    check(config, *SPAN, "--epoch_end=1", "--crops=1")
    for epoch in range(2):
        shutil.rmtree(run / str(epoch))
    utils.lock(run / ".train.lock", "")  # training goes on
    result = toolkit.run("check_accuracy.py", config, *SPAN, "--epoch_end=3", timeout=60)
    utils._forget_locks()
    assert result.returncode == 0, result.stderr
    assert f"{run / '1'} does not exist, but later ones do" in result.stdout
    assert "epoch 0 keeps its row of other crops: its model is gone" in result.stdout
    assert [(row["epoch"], row["top1_10crop"] == "") for row in rows(run)] == [
        *[("0", True), ("2", False)]
    ]


def test_a_row_is_not_believed_while_its_epoch_is_trained_again(prepared):
    _, folder, run, _ = prepared
    save_model(run / "0", 0)
    crops = Crops(folder, 0)
    row, _ = check_accuracy.evaluate(run / "0", crops, 6)
    shutil.rmtree(run / "0")
    utils.lock(run / ".train.lock", "")
    assert not results(run, crops, row).is_done(0, END)
    utils._forget_locks()
    assert results(run, crops, row).is_done(0, END)


def test_charts_that_cannot_be_written_are_a_warning(prepared):
    config, _, run, _ = prepared
    save_model(run / "0", 0)
    (run / "events").write_text("a file")
    result = toolkit.run("check_accuracy.py", config, *SPAN, "--epoch_end=1")
    assert result.returncode == 0, result.stderr
    assert "a chart, table or event could not be written" in result.stderr
    assert len(rows(run)) == 1
    assert (run / "accuracy.png").is_file() and (run / "mistakes.png").is_file()


def test_the_crops_stay_as_they_are_while_a_checker_uses_them(tmp_path, toy):
    config = toolkit.write_config(tmp_path, toy, tmp_path / "buffer")
    folder = tmp_path / "preprocessed/val"
    assert toolkit.run("preprocess_val.py", config).returncode == 0
    Crops(folder, 0)
    result = toolkit.run("preprocess_val.py", config)
    toolkit.assert_one_line_error(result, "preprocess_val.py", "check_accuracy.py", "wait until")
    utils._forget_locks()
    utils.lock(folder / ".preprocess_val.lock", "")
    with pytest.raises(utils.UserError, match="preprocess_val.py is at work"):
        Crops(folder, 0)
    utils._forget_locks()


def test_a_model_that_fails_is_left_out(prepared, monkeypatch):
    _, folder, run, _ = prepared
    save_model(run / "0", 0)

    def fails(**_: object) -> None:
        raise tf.errors.InternalError(None, None, "the device fails")

    recipe = resnet50.model_recipe(run / "0")
    monkeypatch.setattr(resnet50, "load_model", lambda _: (fails, recipe))
    with pytest.raises(utils.UserError, match="run/0: cannot be evaluated: the device fails"):
        check_accuracy.evaluate(run / "0", Crops(folder, 0), 6)


def test_a_model_that_names_its_weights_is_told_by_them(prepared):
    _, folder, run, _ = prepared
    for epoch, name in (("0", "aaaa"), ("1", "bbbb")):
        save_model(run / epoch, 0, fingerprint=name, step=77)
    crops = Crops(folder, 0)
    row, _ = check_accuracy.evaluate(run / "0", crops, 16)
    assert (row["model"], row["step"]) == ("aaaa", 77)
    (run / "0").rename(run / "2")
    (run / "1").rename(run / "0")
    assert not results(run, crops, row).is_done(0, END)


def test_the_centre_crop_alone(prepared):
    config, folder, run, labels = prepared
    models = [save_model(run / str(epoch), epoch) for epoch in range(5)]
    result = toolkit.run(
        "check_accuracy.py", config, *SPAN, "--epoch_end=5", "--crops=1", "--every=2"
    )
    assert result.returncode == 0, result.stderr
    assert [row["epoch"] for row in rows(run)] == ["1", "3", "4"]
    assert "10 crops" not in result.stdout
    for row in rows(run):
        right = expected_row(models[int(row["epoch"])], folder, labels)
        assert row["top1_10crop"] == row["top5_10crop"] == ""
        for name in ("top1_centre", "top5_centre", "loss_centre"):
            assert float(row[name]) == pytest.approx(right[name], rel=1e-4)


def test_a_model_with_other_classes_is_warned_of(prepared, check, capsys):
    config, folder, run, _ = prepared
    save_model(run / "0", 0, class_names=["käfer", *NAMES[1:]])
    for first, warnings in ("käfer", 0), ("ant", 1):
        utils.write_record(folder / "crops.json", Note("", "", True, [first, *NAMES[1:]]))
        (run / "accuracy.csv").unlink(missing_ok=True)
        check(config, *SPAN, "--epoch_end=1")
        assert capsys.readouterr().err.count("its class 0 is käfer, but ant in") == warnings


def test_waits_for_an_epoch_saying_so(prepared, tmp_path):
    config, _, run, _ = prepared
    save_model(run / "0", 0)
    log = tmp_path / "log"
    process = toolkit.start("check_accuracy.py", config, *SPAN, "--epoch_end=2", log=log)
    try:
        end = time.monotonic() + 90
        while f"waiting for {run / '1'}" not in log.read_text():
            assert time.monotonic() < end and process.poll() is None, log.read_text()
            time.sleep(0.1)
        save_model(run / ".aside", 1)
        (run / ".aside").rename(run / "1")
        assert process.wait(timeout=60) == 0, log.read_text()
    finally:
        process.kill()
    assert [row["epoch"] for row in rows(run)] == ["0", "1"]


def test_waiting_says_whether_training_is_at_work(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    made(run / "1")
    naps = []

    def sleep(_: float) -> None:
        naps.append(0)
        if len(naps) == 2:
            utils._forget_locks()  # the training stops
        elif len(naps) == 4:
            made(run / "2")

    utils.lock(run / ".train.lock", "")
    monkeypatch.setattr(check_accuracy.time, "sleep", sleep)
    assert check_accuracy.wait_for(run, 2, END)
    said = capsys.readouterr().out.splitlines()
    assert len(naps) == 4 and len(said) == 2
    assert "train.py is training this run" in said[0] and "no train.py is running" in said[1]
    assert not check_accuracy.wait_for(run, 0, END)
    assert "0 does not exist, but later ones do" in capsys.readouterr().out


def made(folder: Path) -> None:
    """What looks like an epoch's model from outside."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "saved_model.pb").write_bytes(b"a model")


def test_other_numbers_in_a_runs_folder_are_no_epochs(tmp_path):
    """Backups of finished models, of folders and of files, later and earlier."""
    run = tmp_path / "run"
    for name in ("2", "20260101", "99", "9"):
        made(run / name)
    (run / "7").write_text("a file")
    (run / "8").mkdir()
    (run / "03").mkdir()
    states = [check_accuracy.state_of(run, epoch, END) for epoch in (1, 2, 3, 7, 8)]
    assert states == [Model.REMOVED, Model.SAVED, Model.IDLE, Model.IDLE, Model.IDLE]
    utils.lock(run / ".train.lock", "")
    assert check_accuracy.state_of(run, 3, END) is Model.TRAINING
    utils._forget_locks()


def test_an_idle_lock_of_another_user_is_not_held(tmp_path, monkeypatch):
    """It can be read, not written."""
    made(tmp_path / "run/0")
    lock = tmp_path / "run/.train.lock"
    lock.touch()
    open_ = os.open

    def refused(path, flags, *rest):
        if flags & (os.O_RDWR | os.O_WRONLY):
            raise PermissionError(13, "Permission denied", str(path))
        return open_(path, flags, *rest)

    monkeypatch.setattr(os, "open", refused)
    assert check_accuracy.state_of(tmp_path / "run", 3, END) is Model.IDLE


def test_nothing_is_written_through_a_link(prepared, tmp_path, check):
    """A run that somebody sends as a tar may hold any links."""
    config, _, run, _ = prepared
    save_model(run / "0", 0)
    keys = tmp_path / "keys"
    keys.write_text("secret")
    for name in ("accuracy.png", "classes.csv", "mistakes.png", "training.png"):
        (run / name).symlink_to(keys)
    lock = run / ".check_accuracy.lock"
    lock.symlink_to(keys)
    result = toolkit.run("check_accuracy.py", config, *SPAN, "--epoch_end=1")
    toolkit.assert_one_line_error(result, "check_accuracy.py", str(lock), "link")
    assert keys.read_text() == "secret"
    lock.unlink()
    check(config, *SPAN, "--epoch_end=1")
    assert keys.read_text() == "secret"
    assert not (run / "mistakes.png").is_symlink()


def test_killed_and_started_again_nothing_is_lost_or_doubled(prepared, tmp_path):
    config, _, run, _ = prepared
    for epoch in range(4):
        save_model(run / str(epoch), epoch)
    arguments = [*SPAN, "--epoch_end=4", "--pictures=1"]
    for count in (1, 3):
        process = toolkit.start("check_accuracy.py", config, *arguments, log=tmp_path / "log")
        while process.poll() is None and not _has_rows(run, count):
            time.sleep(0.01)
        process.kill()
        process.wait()
    assert toolkit.run("check_accuracy.py", config, *arguments).returncode == 0
    assert [row["epoch"] for row in rows(run)] == ["0", "1", "2", "3"]


def _has_rows(run: Path, count: int) -> bool:
    return (run / "accuracy.csv").exists() and len(rows(run)) >= count


def test_broken_models_are_named_and_left_out(prepared):
    config, _, run, _ = prepared
    (run / "0").mkdir()  # no epoch
    save_model(run / "1", 1)
    pb = run / "1" / "saved_model.pb"
    pb.write_bytes(pb.read_bytes()[: pb.stat().st_size // 2])
    save_model(run / "2", 2)
    (run / "2/assets/recipe.json").write_text("[" * 100_000)
    save_model(run / "3", 3)
    result = toolkit.run("check_accuracy.py", config, *SPAN, "--epoch_end=4")
    toolkit.assert_one_line_error(result, "check_accuracy.py", "2 epochs could not be evaluated")
    assert f"{run / '0'} does not exist, but later ones do" in result.stdout
    warnings = [line for line in result.stderr.splitlines() if ": warning: " in line]
    assert len(warnings) == 2
    assert f"{run / '1'}: the model is damaged" in warnings[0]
    assert f"{run / '2' / 'assets' / 'recipe.json'}: " in warnings[1]
    assert [row["epoch"] for row in rows(run)] == ["3"]


def test_too_few_classes_are_an_error_of_that_epoch(prepared, check, capsys):
    config, folder, run, labels = prepared
    utils.write_record(folder / "crops.json", Note("", "", True, [*NAMES, "owl"]))
    save_model(run / "0", 0)
    with pytest.raises(utils.UserError, match="1 epoch could not be evaluated"):
        check(config, *SPAN, "--epoch_end=1")
    warning = f"a model of {CLASSES} classes, but the validation pictures have 8"
    assert warning in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "y.npy").unlink(), ["y.npy", "preprocess_val.py"]),
        (lambda folder: (folder / "X10_5.npy").unlink(), ["X10_5.npy", "preprocess_val.py"]),
        (lambda folder: (folder / "X10_5.npy").write_bytes(b"no"), ["X10_5.npy"]),
        (lambda folder: np.save(folder / "y.npy", np.zeros(3)), ["y.npy"]),
        (lambda folder: (folder / "y.npy").write_bytes(b"PK\3\4"), ["y.npy"]),
    ],
)
def test_missing_or_broken_crops_are_one_line(prepared, damage, words):
    config, folder, run, _ = prepared
    save_model(run / "0", 0)
    damage(folder)
    result = toolkit.run("check_accuracy.py", config, *SPAN, "--epoch_end=1")
    assert result.returncode == 2
    for word in words:
        assert word in result.stderr
    assert "Traceback" not in result.stderr


def test_another_number_of_crops_than_n_is_told_both_numbers(prepared):
    _, folder, _, labels = prepared
    assert len(Crops(folder, len(labels)).labels) == 20
    with pytest.raises(utils.UserError, match=r"\[preprocess\] N is 21, .* 20 pictures"):
        Crops(folder, 21)


def test_the_command_compares_n(prepared):
    config, _, run, _ = prepared
    save_model(run / "0", 0)
    config.write_text(config.read_text().replace("N = 0", "N = 21", 1))
    result = toolkit.run("check_accuracy.py", config, *SPAN, "--epoch_end=1")
    toolkit.assert_one_line_error(result, "check_accuracy.py", "N is 21", "20 pictures")


def test_each_accuracy_is_said_by_its_own_name():
    said = check_accuracy.describe(table_row(3, 0.11, 0.22, 0.33, 0.44, loss=5.5))
    assert said == (
        "epoch 3: 10 crops top-1 11.00%, top-5 22.00%; centre crop top-1 33.00%, top-5 44.00%, "
        "loss 5.500"
    )


@pytest.fixture
def gpus(monkeypatch):
    """A machine with as many GPUs as asked for, opened by open_device."""

    def opened(gpu: int | None, run: Path, count: int) -> None:
        monkeypatch.setattr(
            utils, "choose_gpus", lambda wanted, required: [g for g in wanted if g < count]
        )
        check_accuracy.open_device.cache_clear()
        check_accuracy.open_device(gpu, run)

    monkeypatch.setattr(check_accuracy.os, "nice", lambda _: print("nice"))
    return opened


@pytest.mark.parametrize(
    ("training", "gpu", "count", "said"),
    [
        (None, None, 2, "evaluating on GPU 1"),
        (None, None, 1, "nice, evaluating on the CPU, at low priority"),
        ([0], None, 2, "evaluating on GPU 1"),
        ([0, 1], None, 2, "nice, evaluating on the CPU, at low priority"),
        ([1], None, 4, "nice, evaluating on the CPU, at low priority"),
        ([0, 1], 1, 2, "evaluating on GPU 1"),  # as asked for
        (None, 0, 2, "evaluating on GPU 0"),
    ],
)
def test_the_gpus_of_training_are_left_alone(training, gpu, count, said, tmp_path, gpus, capsys):
    if training:
        utils.lock(tmp_path / ".train.lock", "")
        resnet50.write_lock_note(tmp_path / ".train.lock", resnet50.LockNote(gpus=training))
    gpus(gpu, tmp_path, count)
    utils._forget_locks()
    assert ", ".join(capsys.readouterr().out.splitlines()) == said


def test_the_gpus_of_a_training_that_has_ended_are_free(tmp_path, gpus, capsys):
    (tmp_path / ".train.lock").write_text('{"gpus": [0, 1], "epochs": []}')
    gpus(None, tmp_path, 2)
    assert capsys.readouterr().out == "evaluating on GPU 1\n"
    utils.lock(tmp_path / ".train.lock", "")  # it is just starting: its GPUs are not known yet
    (tmp_path / ".train.lock").write_text("")
    gpus(None, tmp_path, 2)
    utils._forget_locks()
    assert "CPU" in capsys.readouterr().out


def test_the_device_is_chosen_when_a_model_is_there(prepared, monkeypatch, tmp_path):
    """A training that starts after the checker has named its GPUs by then."""
    config, _, run, _ = prepared
    order = []
    monkeypatch.setattr(check_accuracy, "wait_for", lambda *_: order.append("there") or True)
    monkeypatch.setattr(check_accuracy, "open_device", lambda *_: order.append("opened"))
    arguments = ["check_accuracy.py", f"--config={config}", *SPAN, "--epoch_end=1"]
    monkeypatch.setattr(check_accuracy.sys, "argv", arguments)
    with pytest.raises(utils.UserError):  # there is no model
        check_accuracy.main()
    utils._forget_locks()
    assert order == ["there", "opened"]


def test_the_lock_says_what_will_be_evaluated(prepared, check):
    config, _, run, _ = prepared
    save_model(run / "2", 0)
    check(config, "--run_folder=run", "--epoch_start=2", "--epoch_end=3", "--every=5")
    lock = run / ".check_accuracy.lock"
    assert json.loads(lock.read_text()) == {"gpus": [], "epochs": [2]}
    assert resnet50.read_lock_note(lock).epochs == []  # the checker has ended
    utils.lock(lock, "")
    assert resnet50.read_lock_note(lock).epochs == [2]
    for text in ("1", "", '{"gpus": [], "epochs": ["2"]}', '{"epoch_start": 2}'):
        lock.write_text(text)
        note = resnet50.read_lock_note(lock)
        assert 12345 in note.epochs and 1 in note.gpus
    utils._forget_locks()


def test_every_kth_epoch_and_the_last_are_wanted():
    assert check_accuracy.epochs_wanted(2, 20, 5) == [4, 9, 14, 19]
    assert check_accuracy.epochs_wanted(3, 7, 4) == [3, 6]
    assert check_accuracy.epochs_wanted(10**6 - 2, 10**17, 1) == [10**6 - 2, 10**6 - 1]


def test_the_chart_names_the_best_epoch(tmp_path, monkeypatch):
    notes = {}
    curve = lambda self, points, colour, name, said: notes.update({name: said})  # noqa: E731
    monkeypatch.setattr(check_accuracy.Chart, "curve", curve)
    rows = [table_row(e, top1, 1, top1, 1) for e, top1 in enumerate([0.2, 0.8, 0.6])]
    check_accuracy.draw_accuracy(rows, {}, (-1, 2), 7, tmp_path / "chart.png")
    assert notes["top-1, 10 crops"] == ["last 60.00%", "best 80.00% (epoch 1)"]


def test_a_folder_in_the_place_of_a_result_is_named(prepared, check, capsys):
    """The table's at once: without it nothing is left of an evaluation."""
    config, _, run, _ = prepared
    save_model(run / "0", 0)
    for name in ("accuracy.csv", "classes.csv"):
        (run / name).mkdir()
    with pytest.raises(utils.UserError, match="accuracy.csv: is a folder"):
        check(config, *SPAN, "--epoch_end=1")
    assert "epoch 0" not in capsys.readouterr().out  # before anything is evaluated
    (run / "accuracy.csv").rmdir()
    check(config, *SPAN, "--epoch_end=1")
    (warning,) = capsys.readouterr().err.splitlines()
    assert str(run / "classes.csv") in warning
    assert len(rows(run)) == 1
    assert (run / "accuracy.png").is_file() and (run / "mistakes.png").is_file()


def test_second_checker_on_a_run_is_refused(prepared):
    config, _, run, _ = prepared
    utils.lock(run / ".check_accuracy.lock", "taken")
    result = toolkit.run("check_accuracy.py", config, *SPAN, "--epoch_end=1", timeout=60)
    toolkit.assert_one_line_error(result, "check_accuracy.py", "another check_accuracy.py")


def test_rank_counts_ties_and_nan_against_the_model():
    labels = np.array([0, 1, 2, 0])
    p = np.array([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [0.5, 0.3, 0.2], [np.nan] * 3])
    assert check_accuracy.rank(p, labels).tolist() == [0, 1, 2, 2]


def table_row(epoch: int, *accuracies: float | None, loss: float = 1.0) -> dict:
    values = dict(zip(ACCURACIES, accuracies, strict=True))
    return values | {
        **{"epoch": epoch, "step": epoch, "pictures": 9, "crops": "", "model": ""},
        "loss_centre": loss,
    }


class Drawn:
    """A chart read back from its pixels: values are reckoned from grid lines and tick marks."""

    def __init__(self, path: Path, y_of_lines: list[float], x_of_ticks: list[float]):
        self.pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
        assert self.pixels.shape == (600, 1000, 3)
        faint = self.near(check_accuracy.FAINT, 20).sum(axis=1)  # a line may lie across two rows
        rows = np.flatnonzero(faint > 400)
        ink = self.near(check_accuracy.INK)
        bottom = np.flatnonzero(ink[:, 200:700].sum(axis=1) > 400)[-1]
        ticks = self.near(check_accuracy.INK, 130)[bottom + 4]  # a tick may lie across two columns
        columns = 88 + np.flatnonzero(ticks[88:735])  # not the labels beside the axes
        self.y = np.polyfit(middles(rows), y_of_lines[::-1], 1)
        self.x = np.polyfit(middles(columns), x_of_ticks, 1)

    def near(self, colour: tuple, levels: int = 12) -> np.ndarray:
        return np.abs(self.pixels - colour).max(axis=2) < levels

    def values(self, colour: tuple, at: list[float]) -> list[float]:
        """Where the curve of this colour passes, at each x."""
        found, drawn = [], self.near(colour, 5)  # a blue line's edges are nearly light blue
        for x in at:
            column = round((x - self.x[1]) / self.x[0])
            column = min(max(column, 93), 727)  # not on the axis
            ys = np.flatnonzero(drawn[:, column - 1 : column + 2].any(axis=1))
            assert len(ys), (colour, x)
            found.append(float(np.polyval(self.y, ys.mean())))
        return found


def middles(places: np.ndarray) -> list[float]:
    """The middle of each run of adjacent pixels."""
    return [run.mean() for run in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)]


def test_accuracies_are_drawn_where_they_belong(tmp_path):
    values = [(0.1, 0.4, 0.05, 0.32), (0.3, 0.62, 0.2, 0.5), (0.7, 0.9, 0.55, 0.8)]
    rows = [table_row(epoch, *row) for epoch, row in enumerate(values)]
    check_accuracy.draw_charts(tmp_path, rows, classes=7)
    # The line of 0% is the axis.
    drawn = Drawn(tmp_path / "accuracy.png", [0.2, 0.4, 0.6, 0.8, 1.0], [0, 1, 2])
    colours = [getattr(check_accuracy, c) for c in ("ORANGE", "BLUE", "LIGHT_ORANGE", "LIGHT_BLUE")]
    for i, colour in enumerate(colours):
        right = [row[i] for row in values]
        assert drawn.values(colour, [0, 1, 2]) == pytest.approx(right, abs=0.012)
        halfway = [(right[0] + right[1]) / 2, (right[1] + right[2]) / 2]
        assert drawn.values(colour, [0.5, 1.5]) == pytest.approx(halfway, abs=0.012)


@pytest.mark.parametrize(("classes", "top5"), [(3, False), (5, False), (6, True)])
def test_top_5_of_a_few_classes_is_not_drawn(classes, top5, tmp_path):
    rows = [table_row(epoch, 0.3, 1.0, 0.2, 1.0) for epoch in range(3)]
    check_accuracy.draw_charts(tmp_path, rows, classes)
    pixels = np.asarray(Image.open(tmp_path / "accuracy.png")).astype(int)
    for colour in (check_accuracy.BLUE, check_accuracy.LIGHT_BLUE):
        assert (np.abs(pixels - colour).max(axis=2) < 5).any() == top5
    assert (np.abs(pixels - check_accuracy.ORANGE).max(axis=2) < 5).any()


@pytest.mark.parametrize("epochs", [1, 30, 90])
def test_charts_of_any_length_are_drawn(epochs, tmp_path):
    rows = [
        table_row(e, *(min(1.0, 0.3 + 0.2 * i + e / 200) for i in range(4))) for e in range(epochs)
    ]
    rows[0]["top1_10crop"] = rows[0]["top5_10crop"] = None  # evaluated with --crops=1
    check_accuracy.draw_charts(tmp_path, rows, classes=7)
    assert Image.open(tmp_path / "accuracy.png").size == (1000, 600)
    assert not (tmp_path / "training.png").exists()


def write_log(run: Path, count: int) -> None:
    """A falling loss and a rising top-1 over 4 epochs."""
    others = {name: 1 for name in resnet50.LOG_COLUMNS}
    rows = [
        others
        | {
            "step": i,
            "epoch": 4 * i // count,
            "batch": i % (count // 4),
            "loss": 3 - 2 * i / count,
            "loss_without_l2": 2.5 - 2 * i / count,
            "top1": i / count,
            "learning_rate": 0.1,
        }
        for i in range(count)
    ]
    utils.write_csv(run / "training_log.csv", resnet50.LOG_COLUMNS, rows)


def test_training_curves_are_drawn_where_they_belong(tmp_path):
    """Both charts have the same epochs at the same places."""
    rows = [table_row(e, 0.1, 0.3, 0.1, 0.3, loss=2.3 - 0.5 * e) for e in range(4)]
    write_log(tmp_path, 2000)
    check_accuracy.draw_charts(tmp_path, rows, classes=7)
    drawn = Drawn(tmp_path / "training.png", [0.5, 1.0, 1.5, 2.0, 2.5], [0, 1, 2, 3])
    for colour, right in (
        (check_accuracy.BLUE, [2.0, 1.5, 1.0]),  # without L2
        (check_accuracy.ORANGE, [2.3, 1.8, 1.3]),
    ):
        assert drawn.values(colour, [0, 1, 2]) == pytest.approx(right, abs=0.04)
    accuracy = Drawn(tmp_path / "accuracy.png", [0.2, 0.4, 0.6, 0.8, 1.0], [0, 1, 2, 3])
    assert accuracy.x == pytest.approx(drawn.x)
    top1 = accuracy.values(check_accuracy.GREEN, [0, 1, 2])
    assert top1 == pytest.approx([0.25, 0.5, 0.75], abs=0.02)


def test_the_l2_part_of_the_loss_is_a_number(tmp_path, monkeypatch):
    notes = {}
    curve = lambda self, points, colour, name, said: notes.update({name: said})  # noqa: E731
    monkeypatch.setattr(check_accuracy.Chart, "curve", curve)
    write_log(tmp_path, 400)
    check_accuracy.draw_charts(tmp_path, [table_row(0, 0, 0, 0, 0)], classes=7)
    assert notes["training"][1] == "L2 adds 0.500"


def test_events_are_by_training_step_each_once(prepared):
    """Over restarts, epochs that are evaluated again, and others that were evaluated before."""
    _, folder, run, _ = prepared
    rows = [table_row(epoch, 0.1, 0.2, 0.3, 0.4 + epoch / 100) for epoch in range(4)]
    for epoch, row in enumerate(rows):
        row["step"] = 700 * (epoch + 1)
    first = results(run, Crops(folder, 0), *rows[:2])
    first.write_events()
    utils._forget_locks()
    second = results(run, Crops(folder, 0), *rows)
    second.rows[0] = rows[0] | {"top1_centre": 0.9}
    second.write_events()
    seen = toolkit.scalars(run / "events" / "accuracy")
    assert {step for _, step in seen} == {700, 1400, 2100, 2800}
    assert seen["accuracy/top1_centre", 700] == pytest.approx(0.9)
    assert seen["accuracy/top5_centre", 2800] == pytest.approx(0.43)


def test_ticks_are_round_and_few():
    assert check_accuracy.ticks(0, 1) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert check_accuracy.ticks(0, 89, whole=True) == [0, 20, 40, 60, 80]
    assert check_accuracy.ticks(0, 2, whole=True) == [0, 1, 2]
    for high in (1, 2, 3, 7, 29, 30, 89, 299):
        values = check_accuracy.ticks(0, high, whole=True)
        assert 2 <= len(values) <= 9 and all(value == int(value) for value in values)


def test_charts_without_a_readable_log_are_a_warning(prepared, check, capsys):
    config, _, run, _ = prepared
    save_model(run / "0", 0)
    write_log(run, 40)
    log = run / "training_log.csv"
    log.write_text(log.read_text().replace("0.1", "fast", 1))
    check(config, *SPAN, "--epoch_end=1")
    assert len(rows(run)) == 1
    (warning,) = capsys.readouterr().err.splitlines()
    assert "could not be written" in warning and str(log) in warning


BROKEN_TABLES = {
    "text": "x" * 1000,
    "columns": "epoch,step\n0,1\n",
    "nan": "{head}\n0,1,0.1,0.2,nan,0.4,1.5,19,a,b\n",
    "inf": "{head}\n0,1,0.1,0.2,0.3,0.4,inf,19,a,b\n",
    "empty": "{head}\n0,1,0.1,0.2,,,,,,\n",
    "beyond": "{head}\n0,1,0.1,2.5,0.3,0.4,1.5,19,a,b\n",
    "negative": "{head}\n-1,1,0.1,0.2,0.3,0.4,1.5,19,a,b\n",
    "long": "{head}\n0,1,0.1,0.2,0.3,0.4,1.5,19,a," + "b" * 200_000 + "\n",
}


@pytest.mark.parametrize("name", BROKEN_TABLES)
def test_a_table_that_is_not_ours_is_one_line_and_kept(name, prepared):
    config, folder, run, _ = prepared
    content = BROKEN_TABLES[name].replace("{head}", ",".join(resnet50.ACCURACY_COLUMNS))
    (run / "accuracy.csv").write_text(content)
    with pytest.raises(utils.UserError, match="accuracy.csv: .*correct it, or move the file away"):
        check_accuracy.Results(run, Crops(folder, 0))
    utils._forget_locks()
    assert (run / "accuracy.csv").read_text() == content


def test_a_row_that_was_cut_off_is_evaluated_again(prepared):
    _, folder, run, _ = prepared
    head = ",".join(resnet50.ACCURACY_COLUMNS)
    (run / "accuracy.csv").write_text(f"{head}\n0,1,,,0.3,0.4,1.5,19,a,b\n1,2,0.1")
    made = check_accuracy.Results(run, Crops(folder, 0))
    assert list(made.rows) == [0] and made.rows[0]["top1_10crop"] is None
    utils._forget_locks()


# --- where the model errs ---------------------------------------------------------------------


def confident_wrong(model: Stand, folder: Path, labels: np.ndarray, count: int) -> list[tuple]:
    """(probability, index, label, guess) of each wrong answer, the most confident first."""
    wrong = []
    for index in np.flatnonzero(labels >= 0):
        crops = np.load(folder / f"X10_{index}.npy")
        means = (crops if count == 10 else crops[8:9]).mean(axis=(1, 2)) / 255
        logits = means @ model.weights.numpy()
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p = (p / p.sum(axis=1, keepdims=True)).mean(axis=0)
        if p.argmax() != labels[index]:
            wrong.append((p.max(), index, labels[index], p.argmax()))
    return sorted(wrong, reverse=True)


@pytest.mark.parametrize("count", [10, 1])
def test_classes_and_mistakes_of_the_newest_epoch(count, prepared, check):
    config, folder, run, labels = prepared
    models = [save_model(run / str(epoch), epoch) for epoch in range(2)]
    check(config, *SPAN, "--epoch_end=2", f"--crops={count}")
    wrong = confident_wrong(models[1], folder, labels, count)
    with open(run / "classes.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["label"], row["name"]) for row in table] == [
        (str(label), name) for label, name in enumerate(NAMES)
    ]
    for label, row in enumerate(table):
        its = int((labels == label).sum())
        taken = [NAMES[guess] for _, _, right, guess in wrong if right == label]
        assert int(row["pictures"]) == its
        if its:
            assert float(row["top1"]) == pytest.approx(1 - len(taken) / its, abs=1e-5)
            assert float(row["top1"]) <= float(row["top5"]) <= 1
        most = max(map(taken.count, taken), default=0)
        assert row["times"] == (str(most) if taken else "")
        assert not taken or taken.count(row["taken_for"]) == most
    top1 = sum(float(row["top1"] or 0) * int(row["pictures"]) for row in table) / 19
    column = "top1_10crop" if count == 10 else "top1_centre"
    assert top1 == pytest.approx(float(rows(run)[1][column]), abs=1e-5)
    sheet = np.asarray(Image.open(run / "mistakes.png"))
    assert len(wrong) >= 6
    for place, (_, index, _, _) in enumerate(wrong[:20]):
        centre = np.load(folder / f"X10_{index}.npy")[8]
        row, column = divmod(place, 5)
        lines = [
            y for y in range(row * 224, sheet.shape[0] - 224) if found(sheet, y, column, centre)
        ]
        assert len(lines) == 1, place


def found(sheet: np.ndarray, top: int, column: int, picture: np.ndarray) -> bool:
    """Whether a picture stands there in a row of five."""
    left = 12 + column * 236
    return np.array_equal(sheet[top : top + 224, left : left + 224], picture)


def test_mistakes_name_the_right_class_and_the_guess(prepared, monkeypatch):
    _, folder, run, labels = prepared
    model, sheets = save_model(run / "0", 3), []

    def sheet(pictures, captions, title, columns):
        sheets.append((len(pictures), captions, title))
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(check_accuracy, "contact_sheet", sheet)
    crops = Crops(folder, 0)
    row, answers = check_accuracy.evaluate(run / "0", crops, 4)
    results(run, crops).add(row, answers)
    utils._forget_locks()
    wrong = confident_wrong(model, folder, labels, 10)
    ((count, captions, title),) = sheets
    assert count == len(captions) == len(wrong)
    assert f"run, epoch 0: {len(wrong)} of 19 answers are wrong" in title
    shares = [int(answer.split("%")[0]) for _, answer in captions]
    assert shares == sorted(shares, reverse=True)
    expected = [[NAMES[label], f"{share:.0%} {NAMES[guess]}"] for share, _, label, guess in wrong]
    assert sorted(captions) == sorted(expected)


def test_a_model_without_mistakes_or_with_more_classes(prepared):
    """The validation set may lack classes of the model."""
    _, folder, run, labels = prepared
    crops = Crops(folder, 0)
    utils._forget_locks()
    right = crops.labels[crops.indices]
    answers = {"label": right, "guess": right, "probability": np.ones(19), "rank": 0 * right}
    answers = SimpleNamespace(**answers)
    check_accuracy.draw_mistakes(answers, crops, "run", run / "mistakes.png")
    assert Image.open(run / "mistakes.png").size[0] > 224
    answers.guess = right + CLASSES
    check_accuracy.write_classes(answers, ["\x1b[31m", "c\udcff", *NAMES[2:]], run / "classes.csv")
    text = (run / "classes.csv").read_text()
    assert "class 7" in text and "\\x1b[31m" in text and "\x1b" not in text
    check_accuracy.draw_mistakes(answers, crops, "run", run / "mistakes.png")


def test_an_older_epoch_leaves_the_mistakes_of_the_newest(prepared, check):
    config, _, run, _ = prepared
    for epoch in range(2):
        save_model(run / str(epoch), epoch)
    check(config, "--run_folder=run", "--epoch_start=1", "--epoch_end=2")
    before = (run / "mistakes.png").read_bytes(), (run / "classes.csv").read_bytes()
    check(config, *SPAN, "--epoch_end=1")
    assert ((run / "mistakes.png").read_bytes(), (run / "classes.csv").read_bytes()) == before
    assert [row["epoch"] for row in rows(run)] == ["0", "1"]


def test_charts_are_drawn_once_for_each_epoch(prepared, monkeypatch, check):
    config, _, run, _ = prepared
    for epoch in range(2):
        save_model(run / str(epoch), epoch)
    drawn = []
    monkeypatch.setattr(check_accuracy, "draw_charts", lambda *_: drawn.append(1))
    for count in (2, 3):  # started again, it draws them although nothing is evaluated
        check(config, *SPAN, "--epoch_end=2")
        assert len(drawn) == count


def test_subprocess_is_quiet(prepared):
    config, _, run, _ = prepared
    save_model(run / "0", 0)
    result = toolkit.run("check_accuracy.py", config, *SPAN, "--epoch_end=1")
    assert isinstance(result, subprocess.CompletedProcess)
    assert result.stderr == ""


def test_a_run_that_does_not_appear_is_an_error_that_lists_what_is_there(tmp_path):
    (tmp_path / "other" / "0").mkdir(parents=True)
    with pytest.raises(utils.UserError, match="mytest: no such run; .* has other"):
        check_accuracy.wait_for_run(tmp_path / "mytest", seconds=0.1)
    with pytest.raises(utils.UserError, match="has no runs yet"):
        check_accuracy.wait_for_run(tmp_path / "none" / "mytest", seconds=0.1)
