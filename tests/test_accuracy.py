"""check_accuracy.py with models made here, whose answers are known; its charts."""

import csv
import errno
import json
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
from preprocess_val import Crops

CLASSES = 7
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


def save_model(folder: Path, seed: int) -> Stand:
    model = Stand(seed)
    tf.saved_model.save(model, str(folder), signatures=model.classify)
    return model


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
    run = tmp_path / "saved_models" / "run"
    run.mkdir(parents=True)
    return config, folder, run, labels


def expected_row(model: Stand, folder: Path, labels: np.ndarray) -> dict[str, float]:
    """Accuracies by sorting, in NumPy."""
    top, losses = {name: [] for name in check_accuracy.ACCURACIES}, []
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
        for name in check_accuracy.ACCURACIES:
            shown = seen[f"accuracy/{name}", int(row["epoch"])]
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


def test_a_row_belongs_to_its_model_pictures_and_crops(prepared, capsys):
    _, folder, run, labels = prepared
    save_model(run / "0", 0)
    (run / "0" / "assets").mkdir(exist_ok=True)
    crops = Crops(folder, 0)
    row = check_accuracy.evaluate(run / "0", crops, 6)
    assert check_accuracy.current_row([row], run / "0", crops) is row
    assert check_accuracy.current_row([row], run / "0", Crops(folder, 0, 1)) is row
    only_centre = check_accuracy.evaluate(run / "0", Crops(folder, 0, 1), 6)
    assert check_accuracy.current_row([only_centre], run / "0", crops) is None
    assert "again" in capsys.readouterr().out
    shutil.rmtree(run / "0")
    assert check_accuracy.current_row([only_centre], run / "0", crops) is only_centre
    save_model(run / "0", 1)  # trained anew
    assert check_accuracy.current_row([row], run / "0", crops) is None


def test_corrected_labels_or_replaced_pictures_are_evaluated_again(prepared):
    _, folder, run, labels = prepared
    save_model(run / "0", 0)
    (folder / "pictures.txt").write_text("9 'a/b.jpg'\n")
    row = check_accuracy.evaluate(run / "0", Crops(folder, 0), 6)
    assert check_accuracy.current_row([row], run / "0", Crops(folder, 0)) is row
    (folder / "pictures.txt").write_text("8 'a/b.jpg'\n")
    assert check_accuracy.current_row([row], run / "0", Crops(folder, 0)) is None
    (folder / "pictures.txt").write_text("9 'a/b.jpg'\n")
    labels[[0, 1]] = labels[[1, 0]]
    np.save(folder / "y.npy", labels)
    assert check_accuracy.current_row([row], run / "0", Crops(folder, 0)) is None


def test_an_epoch_that_is_evaluated_again_has_one_row(prepared):
    config, folder, run, labels = prepared
    for epoch in range(2):
        save_model(run / str(epoch), epoch)
    command = ["check_accuracy.py", config, *SPAN, "--epoch_end=2"]
    assert toolkit.run(*command).returncode == 0
    before = rows(run)
    labels[[0, 1, 2, 4]] = labels[[4, 2, 0, 1]]
    np.save(folder / "y.npy", labels)
    assert toolkit.run(*command).returncode == 0
    assert [row["epoch"] for row in rows(run)] == ["0", "1"]
    assert all(one["crops"] != other["crops"] for one, other in zip(before, rows(run), strict=True))


def test_a_model_that_was_removed_is_not_waited_for(prepared, capsys):
    """As --keep_last does before a checker starts, or after one that saw only the centre crop."""
    config, _, run, _ = prepared
    for epoch in range(3):
        save_model(run / str(epoch), epoch)
    assert (
        toolkit.run("check_accuracy.py", config, *SPAN, "--epoch_end=1", "--crops=1").returncode
        == 0
    )
    for epoch in range(2):
        shutil.rmtree(run / str(epoch))
    utils.lock(run / ".train.lock", "")  # training goes on
    result = toolkit.run("check_accuracy.py", config, *SPAN, "--epoch_end=3", timeout=60)
    utils.remove_lock(run / ".train.lock")
    assert result.returncode == 0, result.stderr
    assert f"{run / '1'} does not exist, but later ones do" in result.stdout
    assert "epoch 0 keeps its row of other crops: its model is gone" in result.stdout
    assert (run / ".check_accuracy.lock").read_text() == "1"
    assert [(row["epoch"], row["top1_10crop"] == "") for row in rows(run)] == [
        *[("0", True), ("2", False)]
    ]


def test_a_row_is_not_believed_while_its_epoch_is_trained_again(prepared):
    _, folder, run, _ = prepared
    save_model(run / "0", 0)
    crops = Crops(folder, 0)
    row = check_accuracy.evaluate(run / "0", crops, 6)
    shutil.rmtree(run / "0")
    utils.lock(run / ".train.lock", "")
    assert check_accuracy.current_row([row], run / "0", crops) is None
    utils.remove_lock(run / ".train.lock")
    assert check_accuracy.current_row([row], run / "0", crops) is row


def test_charts_that_cannot_be_written_are_a_warning(prepared):
    config, _, run, _ = prepared
    save_model(run / "0", 0)
    (run / "events").write_text("a file")
    result = toolkit.run("check_accuracy.py", config, *SPAN, "--epoch_end=1")
    assert result.returncode == 0, result.stderr
    assert "charts or events could not be written" in result.stderr.splitlines()[0]
    assert len(rows(run)) == 1


def test_the_crops_stay_as_they_are_while_a_checker_uses_them(tmp_path, toy):
    config = toolkit.write_config(tmp_path, toy, tmp_path / "buffer")
    folder = tmp_path / "preprocessed/val"
    assert toolkit.run("preprocess_val.py", config).returncode == 0
    Crops(folder, 0)
    assert toolkit.run("preprocess_val.py", config).returncode == 0  # nothing to do
    (folder / "X10_0.npy").unlink()
    result = toolkit.run("preprocess_val.py", config)
    toolkit.assert_one_line_error(result, "preprocess_val.py", "check_accuracy.py", "wait until")
    utils.remove_lock(folder / ".preprocess_val.lock")
    utils.lock(folder / ".preprocess_val.lock", "")
    with pytest.raises(utils.UserError, match="preprocess_val.py is at work"):
        Crops(folder, 0)
    utils.remove_lock(folder / ".preprocess_val.lock")


def test_storage_without_locks_can_hold_crops(prepared, monkeypatch):
    _, folder, _, _ = prepared
    (folder / ".preprocess_val.lock").touch()

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(utils.fcntl, "flock", unsupported)
    assert len(Crops(folder, 0)) == 19


def test_a_model_that_fails_is_left_out(prepared, monkeypatch):
    _, folder, run, _ = prepared
    save_model(run / "0", 0)

    def fails(**_: object) -> None:
        raise tf.errors.InternalError(None, None, "the device fails")

    monkeypatch.setattr(check_accuracy, "load_model", lambda _: (fails, CLASSES))
    with pytest.raises(utils.UserError, match="run/0: cannot be evaluated: the device fails"):
        check_accuracy.evaluate(run / "0", Crops(folder, 0), 6)


def test_a_model_that_names_its_weights_is_told_by_them(prepared):
    _, folder, run, _ = prepared
    for epoch, name in (("0", "aaaa"), ("1", "bbbb")):
        save_model(run / epoch, 0)
        (run / epoch / "assets").mkdir(exist_ok=True)
        recipe = {"fingerprint": name, "step": 77}
        (run / epoch / "assets" / "recipe.json").write_text(json.dumps(recipe))
    row = check_accuracy.evaluate(run / "0", Crops(folder, 0), 16)
    assert (row.model, row.step) == ("aaaa", 77)
    (run / "0").rename(run / "2")
    (run / "1").rename(run / "0")
    assert check_accuracy.current_row([row], run / "0", Crops(folder, 0)) is None


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


def test_a_model_with_other_classes_is_warned_of(prepared):
    config, folder, run, _ = prepared
    save_model(run / "0", 0)
    (run / "0" / "assets").mkdir(exist_ok=True)
    (run / "0" / "assets" / "class_names.txt").write_text("cat\nkäfer\nsea\n")
    for names, warnings in (["cat", "käfer", "sea"], 0), (["ant", "käfer", "sea"], 1):
        utils.write_lines(folder / "class_names.txt", names)
        (run / "accuracy.csv").unlink(missing_ok=True)
        result = toolkit.run("check_accuracy.py", config, *SPAN, "--epoch_end=1")
        assert result.returncode == 0
        assert result.stderr.count("its class 0 is cat, but ant in") == warnings


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


def test_waiting_says_whether_training_is_at_work_and_ends_with_it(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    (run / "1" / "assets").mkdir(parents=True)
    naps = []

    def sleep(_: float) -> None:
        naps.append(0)
        assert len(naps) < 9, "waits for ever"
        if len(naps) == 1:
            utils.remove_lock(run / ".train.lock")  # the training stops
        elif len(naps) == 2:  # it went on, and was asked for two epochs, which are there
            (run / "1" / "assets" / "recipe.json").write_text('{"epoch_end": 2}')

    utils.lock(run / ".train.lock", "")
    monkeypatch.setattr(check_accuracy.time, "sleep", sleep)
    assert check_accuracy.wait_for(run / "2") is None
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3
    assert "train.py is training this run" in said[0] and "no train.py is running" in said[1]
    assert "training ended before epoch 2" in said[2]
    (run / "1" / "assets" / "recipe.json").write_text('{"epoch_end": 9}')
    monkeypatch.setattr(check_accuracy.time, "sleep", lambda _: (run / "2").mkdir())
    assert check_accuracy.wait_for(run / "2")


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
    (run / "0").mkdir()
    save_model(run / "1", 1)
    pb = run / "1" / "saved_model.pb"
    pb.write_bytes(pb.read_bytes()[: pb.stat().st_size // 2])
    save_model(run / "2", 2)
    result = toolkit.run("check_accuracy.py", config, *SPAN, "--epoch_end=3")
    toolkit.assert_one_line_error(result, "check_accuracy.py", "2 epochs could not be evaluated")
    warnings = [line for line in result.stderr.splitlines() if ": warning: " in line]
    assert len(warnings) == 2 and f"{run / '0'}: not a model" in warnings[0]
    assert [row["epoch"] for row in rows(run)] == ["2"]


def test_too_few_classes_are_an_error_of_that_epoch(prepared):
    config, folder, run, labels = prepared
    labels[1] = CLASSES
    np.save(folder / "y.npy", labels.astype(np.int64))
    save_model(run / "0", 0)
    result = toolkit.run("check_accuracy.py", config, *SPAN, "--epoch_end=1")
    assert result.returncode == 2
    assert f"a model of {CLASSES} classes" in result.stderr


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


def test_on_the_cpu_the_checker_is_the_more_polite_process(monkeypatch):
    told = []
    monkeypatch.setattr(utils, "choose_gpus", lambda wanted, required: [])
    monkeypatch.setattr(check_accuracy.os, "nice", told.append)
    assert check_accuracy.open_device(None) == "the CPU, at low priority"
    assert told == [10]


def test_the_chart_names_the_best_epoch(tmp_path, monkeypatch):
    notes = {}
    curve = lambda self, points, colour, name, said: notes.update({name: said})  # noqa: E731
    monkeypatch.setattr(check_accuracy.Chart, "curve", curve)
    rows = [table_row(e, top1, 1, top1, 1) for e, top1 in enumerate([0.2, 0.8, 0.6])]
    check_accuracy.draw_accuracy(rows, [], tmp_path / "chart.png")
    assert notes["top-1, 10 crops"] == ["last 60.00%", "best 80.00% (epoch 1)"]


def test_gpu_1_is_the_default_because_gpu_0_trains(monkeypatch):
    asked = []

    def choose(wanted: list[int], required: bool) -> list[int]:
        asked.append((wanted, required))
        return wanted

    monkeypatch.setattr(utils, "choose_gpus", choose)
    assert [check_accuracy.open_device(gpu) for gpu in (None, 0)] == ["GPU 1", "GPU 0"]
    assert asked == [([1], False), ([0], True)]


def test_second_checker_on_a_run_is_refused(prepared):
    config, _, run, _ = prepared
    utils.lock(run / ".check_accuracy.lock", "taken")
    result = toolkit.run("check_accuracy.py", config, *SPAN, "--epoch_end=1", timeout=60)
    toolkit.assert_one_line_error(result, "check_accuracy.py", "another check_accuracy.py")


def test_rank_counts_ties_and_nan_against_the_model():
    labels = np.array([0, 1, 2, 0])
    p = np.array([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [0.5, 0.3, 0.2], [np.nan] * 3])
    assert check_accuracy.rank(p, labels).tolist() == [0, 1, 2, 2]


def table_row(epoch: int, *accuracies: float, loss: float = 1.0) -> SimpleNamespace:
    values = dict(zip(check_accuracy.ACCURACIES, accuracies, strict=True))
    return SimpleNamespace(
        epoch=epoch, step=epoch, pictures=9, crops="", model="", loss_centre=loss, **values
    )


class Drawn:
    """A chart read back from its pixels: values are reckoned from grid lines and tick marks."""

    def __init__(self, path: Path, y_of_lines: list[float], x_of_ticks: list[float]):
        self.pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
        assert self.pixels.shape == (600, 1000, 3)
        faint = self.near(check_accuracy.FAINT, 20).sum(axis=1)  # a line may lie across two rows
        rows = np.flatnonzero(faint > 400)
        ink = self.near(check_accuracy.INK)
        bottom = np.flatnonzero(ink[:, 200:700].sum(axis=1) > 400)[-1]
        columns = 88 + np.flatnonzero(ink[bottom + 4, 88:])  # not the labels beside the axis
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
    check_accuracy.draw_accuracy(rows, [], tmp_path / "accuracy.png")
    # The line of 0% is the axis.
    drawn = Drawn(tmp_path / "accuracy.png", [0.2, 0.4, 0.6, 0.8, 1.0], [0, 1, 2])
    colours = [getattr(check_accuracy, c) for c in ("ORANGE", "BLUE", "LIGHT_ORANGE", "LIGHT_BLUE")]
    for i, colour in enumerate(colours):
        right = [row[i] for row in values]
        assert drawn.values(colour, [0, 1, 2]) == pytest.approx(right, abs=0.012)
        halfway = [(right[0] + right[1]) / 2, (right[1] + right[2]) / 2]
        assert drawn.values(colour, [0.5, 1.5]) == pytest.approx(halfway, abs=0.012)


@pytest.mark.parametrize("epochs", [1, 30, 90])
def test_charts_of_any_length_are_drawn(epochs, tmp_path):
    rows = [
        table_row(e, *(min(1.0, 0.3 + 0.2 * i + e / 200) for i in range(4))) for e in range(epochs)
    ]
    rows[0].top1_10crop = rows[0].top5_10crop = None  # evaluated with --crops=1
    check_accuracy.draw_accuracy(rows, [0.5], tmp_path / "accuracy.png")
    assert Image.open(tmp_path / "accuracy.png").size == (1000, 600)


def log_rows(count: int, rate=lambda i: 0.1) -> list[SimpleNamespace]:
    """A falling loss and a rising top-1 over 4 epochs."""
    return [
        SimpleNamespace(
            epoch=4 * i // count,
            batch=i % (count // 4),
            loss=3 - 2 * i / count,
            loss_without_l2=2.5 - 2 * i / count,
            top1=i / count,
            learning_rate=rate(i),
        )
        for i in range(count)
    ]


def test_training_curves_are_drawn_where_they_belong(tmp_path):
    rows = [table_row(e, 0, 0, 0, 0, loss=2.8 - 0.5 * e) for e in range(4)]
    check_accuracy.draw_training(log_rows(2000), rows, tmp_path / "training.png")
    drawn = Drawn(tmp_path / "training.png", [0.5, 1.0, 1.5, 2.0, 2.5, 3.0], [0, 1, 2, 3, 4])
    for colour, right in (
        (check_accuracy.BLUE, [2.5, 2.0, 1.5]),
        (check_accuracy.LIGHT_BLUE, [2.0, 1.5, 1.0]),
        (check_accuracy.ORANGE, [2.8, 2.3, 1.8]),
        (check_accuracy.GREEN, [0.75, 1.5, 2.25]),  # top-1, whose 100% is the highest loss
    ):
        assert drawn.values(colour, [1, 2, 3]) == pytest.approx(right, abs=0.04)


def test_events_are_by_training_step_where_the_model_tells_it(tmp_path):
    rows = [table_row(epoch, 0.1, 0.2, 0.3, 0.4) for epoch in range(2)]
    rows[0].step, rows[1].step = 700, None
    check_accuracy.show(tmp_path, rows)
    seen = toolkit.scalars(tmp_path / "events" / "accuracy")
    assert {step for _, step in seen} == {700, 1}


def test_ticks_are_round_and_few():
    assert check_accuracy.ticks(0, 1) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert check_accuracy.ticks(0, 89, whole=True) == [0, 20, 40, 60, 80]
    assert check_accuracy.ticks(0, 2, whole=True) == [0, 1, 2]
    for high in (1, 2, 3, 7, 29, 30, 89, 299):
        values = check_accuracy.ticks(0, high, whole=True)
        assert 2 <= len(values) <= 9 and all(value == int(value) for value in values)


def test_rate_drops_are_read_from_the_log():
    drops = check_accuracy.learning_rate_drops
    assert drops(log_rows(8, lambda i: 0.1 if i < 6 else 0.01)) == [2.5]
    assert drops(log_rows(8, lambda i: 0.1 / 6**i)) == []  # falls all the time


def test_a_log_that_was_edited_is_drawn_as_far_as_it_can_be_read(tmp_path):
    path = tmp_path / "training_log.csv"
    assert check_accuracy.read_training_log(path) == []
    path.write_text(
        "epoch,batch,loss,loss_without_l2,top1,learning_rate\n0,0,3,2,0.1,0.1\n0,1,?,2,0.1,0.1\n0,2,3\n"
    )
    (row,) = check_accuracy.read_training_log(path)
    assert (row.loss, row.top1) == (3, 0.1)


def test_subprocess_is_quiet(prepared):
    config, _, run, _ = prepared
    save_model(run / "0", 0)
    result = toolkit.run("check_accuracy.py", config, *SPAN, "--epoch_end=1")
    assert isinstance(result, subprocess.CompletedProcess)
    assert result.stderr == ""


def test_a_run_that_does_not_appear_is_an_error_that_lists_what_is_there(tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(utils.UserError, match="mytest: no such run; .* has other"):
        check_accuracy.wait_for_run(tmp_path / "mytest", seconds=0.1)
    with pytest.raises(utils.UserError, match="has no runs yet"):
        check_accuracy.wait_for_run(tmp_path / "none" / "mytest", seconds=0.1)
