"""check_accuracy.py with models made here, whose answers are known; its charts."""

import csv
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import check_accuracy
import toolkit
import utils

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
    top = {name: [] for name in check_accuracy.COLUMNS[1:5]}
    for index in np.flatnonzero(labels >= 0):
        means = np.load(folder / f"X10_{index}.npy").mean(axis=(1, 2)) / 255
        logits = means @ model.weights.numpy()
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        for name, scores in (("10crop", p.mean(axis=0)), ("centre", p[8])):
            order = np.argsort(-scores)
            top[f"top1_{name}"].append(labels[index] in order[:1])
            top[f"top5_{name}"].append(labels[index] in order[:5])
    return {name: float(np.mean(hits)) for name, hits in top.items()}


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
            assert float(row[name]) == pytest.approx(value, abs=1e-6)
        assert row["pictures"] == "19"
    assert rows(run)[0] != rows(run)[1]
    seen = toolkit.scalars(run / "events" / "accuracy")
    for row in rows(run):
        for name in check_accuracy.COLUMNS[1:5]:
            shown = seen[f"accuracy/{name}", int(row["epoch"])]
            assert shown == pytest.approx(float(row[name]), abs=1e-6)
    # What stands in the table is not evaluated again: without its model it would fail.
    before = (run / "accuracy.csv").read_bytes()
    (run / "0" / "saved_model.pb").unlink()
    again = toolkit.run("check_accuracy.py", config, *SPAN, "--epoch_end=2")
    assert again.returncode == 0, again.stderr
    assert (run / "accuracy.csv").read_bytes() == before
    assert (run / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_rows_of_other_validation_pictures_are_made_anew(prepared):
    config, folder, run, labels = prepared
    model = save_model(run / "0", 0)
    arguments = [*SPAN, "--epoch_end=1"]
    assert toolkit.run("check_accuracy.py", config, *arguments).returncode == 0
    labels = labels.copy()
    labels[10:] = -1
    np.save(folder / "y.npy", labels)
    result = toolkit.run("check_accuracy.py", config, *arguments)
    assert result.returncode == 0 and "other validation pictures" in result.stderr
    [row] = rows(run)
    assert row["pictures"] == "9"
    for name, value in expected_row(model, folder, labels).items():
        assert float(row[name]) == pytest.approx(value, abs=1e-6)


def test_a_model_with_other_classes_is_warned_of(prepared):
    config, folder, run, _ = prepared
    save_model(run / "0", 0)
    (run / "0" / "assets").mkdir(exist_ok=True)
    (run / "0" / "assets" / "class_names.txt").write_text("cat\nkäfer\nsea\n")
    for names, warnings in (["cat", "käfer", "sea"], 0), (["ant", "käfer", "sea"], 1):
        utils.write_class_names(folder / "class_names.txt", names)
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


def test_second_checker_on_a_run_is_refused(prepared):
    config, _, run, _ = prepared
    utils.lock(run / ".check_accuracy.lock", "taken")
    result = toolkit.run("check_accuracy.py", config, *SPAN, "--epoch_end=1")
    toolkit.assert_one_line_error(result, "check_accuracy.py", "another check_accuracy.py")


def test_rank_counts_ties_and_nan_against_the_model():
    labels = np.array([0, 1, 2, 0])
    p = np.array([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [0.5, 0.3, 0.2], [np.nan] * 3])
    assert check_accuracy.rank(p, labels).tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize("epochs", [1, 3, 30, 90])
def test_charts_of_any_length_use_their_colours(epochs, tmp_path):
    names = check_accuracy.COLUMNS[1:5]
    table = [
        {"epoch": e, "pictures": 9}
        | {n: min(1.0, 0.3 + 0.2 * i + e / 200) for i, n in enumerate(names)}
        for e in range(epochs)
    ]
    check_accuracy.draw_accuracy(table, [], tmp_path / "accuracy.png")
    image = check_accuracy.Image.open(tmp_path / "accuracy.png").convert("RGB")
    assert image.size == (1000, 600)
    colours = {colour for _, colour in image.getcolors(1_000_000)}
    assert check_accuracy.BLUE in colours and check_accuracy.ORANGE in colours


def test_ticks_are_round_and_few():
    assert check_accuracy.ticks(0, 1) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert check_accuracy.ticks(0, 89, whole=True) == [0, 20, 40, 60, 80]
    assert check_accuracy.ticks(0, 2, whole=True) == [0, 1, 2]
    for high in (1, 2, 3, 7, 29, 30, 89, 299):
        values = check_accuracy.ticks(0, high, whole=True)
        assert 2 <= len(values) <= 9 and all(value == int(value) for value in values)


def test_rate_drops_are_read_from_the_log(tmp_path):
    lines = ["epoch,batch,batches,learning_rate"]
    lines += [f"{e},{b},1,{0.1 if e < 3 else 0.01}" for e in range(5) for b in range(2)]
    (tmp_path / "training_log.csv").write_text("\n".join(lines))
    assert check_accuracy.learning_rate_drops(tmp_path) == [2.5]
    lines = lines[:1] + [f"{e},0,1,{0.1 / 6**e}" for e in range(5)]  # falls all the time
    (tmp_path / "training_log.csv").write_text("\n".join(lines))
    assert check_accuracy.learning_rate_drops(tmp_path) == []


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


def test_training_curves_of_a_long_run_are_drawn_from_averages(tmp_path):
    names = "epoch,batch,batches,loss,loss_without_l2,top1"
    lines = [
        f"{i // 100},{i % 100},1,{3 - i / 1000},{2 - i / 1000},{i / 2000}" for i in range(2000)
    ]
    log = tmp_path / "training_log.csv"
    log.write_text("\n".join([names, *lines]))
    check_accuracy.draw_training(log, tmp_path / "training.png")
    image = check_accuracy.Image.open(tmp_path / "training.png").convert("RGB")
    colours = {colour for _, colour in image.getcolors(1_000_000)}
    assert check_accuracy.BLUE in colours and check_accuracy.GREEN in colours
