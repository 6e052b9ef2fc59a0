"""train.py: real runs at toy size, killed and resumed; precision, replicas, workers; schedules."""

import argparse
import csv
import functools
import json
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import toolkit
import utils

import numpy as np
import pytest
import tensorflow as tf

import resnet50
import toy_dataset
import train

RATE = "--learning_rate=0.01"
BATCH = "--batch_size=4"
EPOCH = 2
"""Batches an epoch: 8 pictures in batches of 4."""


@pytest.fixture(scope="module")
def eight(tmp_path_factory) -> Path:
    """A dataset of 8 training pictures."""
    folder = tmp_path_factory.mktemp("eight")
    toy_dataset.make(folder, train=2, val=1)
    return folder


@pytest.fixture
def training(tmp_path, eight, ram):
    """Runs train.py with its preprocessor; ends the preprocessors afterwards."""
    training = Training(tmp_path, eight, ram)
    yield training
    for process in training.processes:
        process.kill()
        process.wait()


class Training:
    def __init__(self, folder: Path, dataset: Path, buffer: Path):
        self.folder, self.models = folder, folder / "saved_models"
        self.config = toolkit.write_config(folder, dataset, buffer, train__buffer_size=20)
        self.processes = []

    def preprocess(self, end: int) -> None:
        span = ["--epoch_start=0", f"--epoch_end={end}", BATCH]
        log = self.folder / "preprocessing.log"
        script = "runtime_preprocessing.py"
        self.processes.append(toolkit.start(script, self.config, *span, log=log))

    def arguments(self, run: str, start: int, end: int, *more: str) -> list[str]:
        span = [f"--epoch_start={start}", f"--epoch_end={end}"]
        return [f"--run_folder={run}", *span, BATCH, RATE, "--deterministic", *more]

    def run(self, run: str, start: int, end: int, *more: str):
        """Trains from epoch `start` to `end`, to the end of the command."""
        self.preprocess(end)
        return toolkit.run("train.py", self.config, *self.arguments(run, start, end, *more))

    def start(self, run: str, start: int, end: int, *more: str):
        log = self.folder / f"{run}.log"
        arguments = self.arguments(run, start, end, *more)
        return toolkit.start("train.py", self.config, *arguments, log=log)

    def state(self, run: str, epoch: int) -> dict[str, np.ndarray]:
        """All that an epoch's model and training state hold, by name."""
        folder, found = self.models / run / str(epoch), {}
        for path in (folder / "variables" / "variables", folder / "training_state" / "state"):
            reader = tf.train.load_checkpoint(str(path))
            names = [n for n in reader.get_variable_to_shape_map() if "OBJECT_GRAPH" not in n]
            found |= {f"{path.name}/{name}": reader.get_tensor(name) for name in names}
        return found

    def log(self, run: str) -> list[dict]:
        with open(self.models / run / "training_log.csv", newline="") as file:
            return list(csv.DictReader(file))


def assert_same_state(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not np.array_equal(one[name], other[name])]
    assert not different, different[:5]


# --- whole runs -----------------------------------------------------------------------------


def test_epochs_in_one_go_and_in_two_end_with_the_same_weights(training):
    assert training.run("whole", 0, 4).returncode == 0
    assert training.processes[-1].wait(timeout=300) == 0  # the preprocessor ends with training
    assert training.run("parts", 0, 2).returncode == 0
    second = training.run("parts", 2, 4)
    assert second.returncode == 0, second.stderr
    whole, parts = training.state("whole", 3), training.state("parts", 3)
    assert len(whole) > 4 * 53  # weights, averages, momentum
    assert_same_state(whole, parts)
    changed = training.state("whole", 2)
    assert any(not np.array_equal(whole[name], changed[name]) for name in whole)


def test_killed_at_ten_random_moments_and_resumed_as_if_never_killed(training):
    """SIGKILL, saving included: a state is saved after each batch."""
    moments = random.Random(1)
    training.preprocess(1000)  # more than can be trained before the last kill
    log = training.models / "killed" / "training_log.csv"
    arguments = ["--checkpoint_minutes=0", "--log_seconds=0"]
    for kill in range(10):
        before = max(_lines(log), 1)
        process = training.start("killed", 0, 1000, *arguments, *["--resume"] * (kill > 0))
        if kill % 2:  # at any moment of the start; else soon after a batch
            time.sleep(moments.uniform(0, 6))
        else:
            _wait_until(lambda before=before: _lines(log) > before)
            time.sleep(moments.uniform(0, 2))
        assert process.poll() is None, (training.folder / "killed.log").read_text()
        process.kill()
        process.wait()
    epochs = int(training.log("killed")[-1]["epoch"]) + 2
    process = training.start("killed", 0, epochs, *arguments, "--resume")
    assert process.wait() == 0, (training.folder / "killed.log").read_text()
    assert training.run("undisturbed", 0, epochs, "--log_seconds=0").returncode == 0
    one, other = (training.state(run, epochs - 1) for run in ("undisturbed", "killed"))
    assert_same_state(one, other)
    batches = [(row["epoch"], row["batch"]) for row in training.log("killed")]
    assert batches == [(str(e), str(b)) for e in range(epochs) for b in range(EPOCH)]
    losses = [[row["loss"] for row in training.log(run)] for run in ("undisturbed", "killed")]
    assert losses[0] == losses[1]
    run = training.models / "killed"
    left = [path.name for path in run.iterdir() if path.name.startswith((".", "state_"))]
    assert left == [resnet50.RUN_LOCK]


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.is_file() else 0


def _wait_until(condition, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_save_the_exact_batch_and_resume_goes_on_there(training, number):
    training.preprocess(40)
    process = training.start("stopped", 0, 40, "--log_seconds=0")
    log = training.folder / "stopped.log"
    _wait_until(lambda: "epoch 0, 2 of 2" in log.read_text())
    process.send_signal(number)
    assert process.wait(timeout=300) == 128 + number
    assert "with --resume" in log.read_text()
    rows = training.log("stopped")
    done = int(rows[-1]["epoch"]) * EPOCH + int(rows[-1]["batch"]) + 1
    resumed = training.run("stopped", 0, done // EPOCH + 1, "--resume", "--log_seconds=0")
    assert resumed.returncode == 0, resumed.stderr
    batches = [int(r["epoch"]) * EPOCH + int(r["batch"]) for r in training.log("stopped")]
    assert batches == list(range(len(batches)))


def test_a_closed_pipe_costs_no_step(training):
    """`train.py … | tee log` and Ctrl-C: both get the signal, and the pipe is gone first."""
    training.preprocess(40)
    arguments = training.arguments("piped", 0, 40, "--log_seconds=0", "--keep_last=1")
    process = subprocess.Popen(
        toolkit.command("train.py", training.config, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        if "epoch 0, 2 of 2" in line:
            break
    process.stdout.close()
    _wait_until(lambda: len(training.log("piped")) > 2)  # trains on without a reader
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=300) == 128 + signal.SIGINT
    rows, run = training.log("piped"), training.models / "piped"
    done = int(rows[-1]["step"]) + 1
    epoch, batch = divmod(done, EPOCH)
    saved = run / (f"state_{epoch}_{batch}" if batch else str(epoch - 1))
    state = json.loads((saved / "training_state" / "state.json").read_text())
    assert state["step"] == done


def test_models_are_not_overwritten_and_a_missing_epoch_is_named(training):
    assert training.run("run", 0, 1).returncode == 0
    again = toolkit.run("train.py", training.config, *training.arguments("run", 0, 1))
    toolkit.assert_one_line_error(again, "train.py", "run/0", "--resume")
    gap = toolkit.run("train.py", training.config, *training.arguments("run", 5, 6))
    toolkit.assert_one_line_error(gap, "train.py", "--epoch_start=5", "the run has epochs: 0")


def test_a_loss_that_is_not_finite_stops_before_a_bad_model_is_saved(training):
    result = training.run("nan", 0, 2, "--learning_rate=1e30")
    toolkit.assert_one_line_error(result, "train.py", "epoch 0, batch 1", "the loss is")
    assert not (training.models / "nan" / "0").exists()


def test_saved_model_gives_probabilities_of_the_network_and_names(training):
    assert training.run("model", 0, 1).returncode == 0
    model = tf.saved_model.load(str(training.models / "model" / "0"))
    recipe = resnet50.model_recipe(training.models / "model" / "0")
    assert recipe.class_names == sorted(toy_dataset.CLASSES)
    images = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3)).astype(np.uint8)
    probabilities = model.signatures["serving_default"](images=tf.constant(images))
    probabilities = probabilities["probabilities"].numpy()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    trainer = make_trainer(classes=4)
    config = utils.load_config(training.config)
    train.load_state(trainer, training.models / "model" / "0", averaged=False)
    mu, sigma = config.utils.mu, config.utils.sigma
    x = ((images / 255 - mu) / sigma).astype(np.float32)
    logits = trainer.network(tf.constant(x)).numpy().astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)


def test_log_csv_and_events_agree(training):
    result = training.run("log", 0, 1, "--log_seconds=0")
    assert result.returncode == 0
    rows = training.log("log")
    assert [row["batch"] for row in rows] == ["0", "1"]
    seen = toolkit.scalars(training.models / "log" / "events" / "training_2_steps_per_epoch")
    for step, row in enumerate(rows):
        for name in ("loss", "top1", "learning_rate", "waiting_for_data", "r_max", "d_max"):
            assert seen[f"training/{name}", step] == pytest.approx(float(row[name]), rel=1e-4)


def test_buffer_of_another_batch_size_stops_training_with_both_values(training):
    training.preprocess(2)
    _wait_until((training.folder / "preprocessing.log").exists)
    _wait_until(lambda: "ready ahead" in (training.folder / "preprocessing.log").read_text())
    arguments = [a.replace(BATCH, "--batch_size=2") for a in training.arguments("b", 0, 2)]
    result = toolkit.run("train.py", training.config, *arguments)
    toolkit.assert_one_line_error(result, "train.py", "batch_size = 4", "batch_size = 2")


def test_second_trainer_on_a_run_is_refused_and_leaves_it_alone(training):
    first = training.start("run", 0, 1)  # waits for a buffer, its folder still empty
    try:
        _wait_until(lambda: "no batches in" in (training.folder / "run.log").read_text())
        second = toolkit.run("train.py", training.config, *training.arguments("run", 0, 1))
        toolkit.assert_one_line_error(second, "train.py", "another train.py is training this run")
        assert (training.models / "run").is_dir()
    finally:
        first.kill()
        first.wait()


def test_second_trainer_on_a_buffer_is_refused(training):
    training.preprocess(100)
    first = training.start("first", 0, 100, "--log_seconds=0")
    _wait_until(lambda: "epoch 0, 1 of 2" in (training.folder / "first.log").read_text())
    second = toolkit.run("train.py", training.config, *training.arguments("second", 0, 1))
    first.kill()
    first.wait()
    toolkit.assert_one_line_error(second, "train.py", "another train.py")


def test_synthetic_needs_no_buffer_and_saves_nothing(training):
    arguments = ["--run_folder=none", "--epoch_start=0", "--epoch_end=1", "--batch_size=1", RATE]
    result = toolkit.run("train.py", training.config, *arguments, "--synthetic")
    assert result.returncode == 0, result.stderr
    assert "images/s" in result.stdout
    assert not training.models.exists()


# --- several machines -----------------------------------------------------------------------


class Workers:
    """Two workers on the loopback interface, each with its preprocessor and its buffer."""

    def __init__(self, folder: Path, dataset: Path, ram: Path):
        self.folder, self.models, self.processes = folder, folder / "saved_models", []
        self.configs = []
        for index in range(2):
            for path in (folder / str(index), ram / str(index)):
                path.mkdir()
            self.configs.append(
                toolkit.write_config(
                    folder / str(index),
                    dataset,
                    ram / str(index),
                    train__path_for_saving=str(self.models),
                )
            )

    def start(self, end: int, *more: str) -> list:
        """Starts all four processes and returns the two trainers."""
        sockets = [socket.socket() for _ in range(2)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        workers = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
        for each in sockets:
            each.close()
        trainers = []
        span = ["--epoch_start=0", f"--epoch_end={end}", BATCH]
        for index, config in enumerate(self.configs):
            task = {"type": "worker", "index": index}
            setting = {"TF_CONFIG": json.dumps({"cluster": {"worker": workers}, "task": task})}
            log = self.folder / f"{index}.log"
            self.processes.append(
                toolkit.start("runtime_preprocessing.py", config, *span, log=log, **setting)
            )
            arguments = ["--run_folder=two", *span, RATE, "--log_seconds=0", *more]
            trainers.append(toolkit.start("train.py", config, *arguments, log=log, **setting))
        self.processes += trainers
        return trainers

    def log(self, index: int) -> str:
        path = self.folder / f"{index}.log"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def workers(tmp_path, toy, ram):
    workers = Workers(tmp_path, toy, ram)
    yield workers
    for process in workers.processes:
        process.kill()
        process.wait()


def test_two_workers_lose_one_stop_clearly_and_resume(workers):
    trainers = workers.start(2, "--checkpoint_minutes=0")
    _wait_until(lambda: "epoch 0, 2 of" in workers.log(0), 180)
    trainers[1].kill()
    assert trainers[0].wait(timeout=120) == 1, workers.log(0)  # may be started again
    assert "another machine of TF_CONFIG stopped answering" in workers.log(0)
    assert "Traceback" not in workers.log(0)
    for process in workers.processes:
        process.kill()
        process.wait()
    for trainer in workers.start(1, "--resume"):
        assert trainer.wait(timeout=180) == 0, workers.log(0) + workers.log(1)
    assert "continuing from" in workers.log(1)
    assert (workers.models / "two" / "0" / "saved_model.pb").is_file()
    saved = f"saved {workers.models / 'two' / '0'}"
    assert saved in workers.log(0)
    assert saved not in workers.log(1)  # only the chief writes


def test_a_stop_of_one_worker_stops_all_at_the_same_step_and_unequal_ones_do_not_begin(workers):
    trainers = workers.start(40, "--checkpoint_minutes=60")
    _wait_until(lambda: "epoch 0, 2 of" in workers.log(0))
    trainers[1].send_signal(signal.SIGTERM)
    for trainer in trainers:
        assert trainer.wait(timeout=300) == 128 + signal.SIGTERM, workers.log(0) + workers.log(1)
    stops = [re.findall("stopped before (.*);", workers.log(index)) for index in range(2)]
    assert stops[0] == stops[1] != []
    run = workers.models / "two"
    assert list(run.glob("state_*")) or (run / "0").exists()
    for process in workers.processes:
        process.kill()
        process.wait()
    # The second machine's folder is another one, with an older state.
    other = workers.folder / "own"
    shutil.copytree(run, other / "two")
    for state in (other / "two").glob("state_*"):
        shutil.rmtree(state)
    text = workers.configs[1].read_text()
    workers.configs[1].write_text(text.replace(str(workers.models), str(other)))
    for trainer in workers.start(40, "--resume"):
        assert trainer.wait(timeout=300) == 2, workers.log(0) + workers.log(1)
    assert "has a different first step" in workers.log(0) + workers.log(1)
    assert "Traceback" not in workers.log(0) + workers.log(1)


# --- the step, in this process --------------------------------------------------------------


@functools.cache
def two_replicas() -> tf.distribute.Strategy:
    """One for all tests: two strategies in a process mix up each other's collective operations."""
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def make_trainer(strategy=None, precision="float32", classes=8, **options):
    given = [f"--{name}={value}" for name, value in options.items() if not isinstance(value, bool)]
    given += [f"--{name}" for name, value in options.items() if value is True]
    usual = ["--run_folder=x", "--epoch_start=0", "--epoch_end=9", BATCH, RATE]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *usual, f"--precision={precision}", *given])
        args = train.parse_arguments()
    config = utils.load_config(toolkit.ROOT / "config.txt")
    strategy = strategy or tf.distribute.get_strategy()
    return train.Trainer(strategy, config, classes, 1000, args)


def small_batch(seed: int = 0):
    """Four pictures of 64x64: the network takes any size."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(4, 64, 64, 3)).astype(np.float16), np.arange(4, dtype=np.int32)


@pytest.fixture
def small_network(monkeypatch):
    """Two blocks, one of them with stride and projection, where more would only take longer."""
    monkeypatch.setattr(resnet50, "STAGES", [(1, 64, 256, 1), (1, 128, 512, 2)])


def metrics(values: tf.Tensor) -> dict[str, float]:
    return dict(zip(train.METRICS, values.numpy().tolist(), strict=True))


def weights(trainer) -> np.ndarray:
    return np.concatenate([v.numpy().ravel() for v in trainer.network.trainable_variables])


def normalise_with_averages(trainer) -> None:
    """Makes normalisation in training use the moving averages, as at inference."""
    network = trainer.network

    class Fixed(type(network)):
        def __call__(self, x, limits=None):
            if limits is None:
                return super().__call__(x)
            averages = [(norm.moving_mean + 0, norm.moving_std + 0) for norm in self.norms]
            return super().__call__(x), averages

    network.__class__ = Fixed


def test_two_replicas_take_the_step_of_one_with_the_whole_batch(small_network):
    results = []
    for strategy in (None, two_replicas()):
        trainer = make_trainer(strategy)
        normalise_with_averages(trainer)
        start = weights(trainer)
        batch = trainer.to_device(*small_batch())
        values = [trainer.train_batch(*batch, 0.01).numpy() for _ in range(2)]
        results.append((weights(trainer), values))
    assert np.abs(results[0][0] - start).max() > 1e-3
    np.testing.assert_allclose(results[0][0], results[1][0], atol=1e-6)
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-5)


def test_each_replica_gets_its_share_on_its_own_device(small_network):
    trainer = make_trainer(two_replicas())
    images, labels = small_batch()
    for whole, shares in zip((images, labels), trainer.to_device(images, labels), strict=True):
        assert [share.device[-5:] for share in shares.values] == ["CPU:0", "CPU:1"]
        np.testing.assert_array_equal(np.concatenate([s.numpy() for s in shares.values]), whole)


def test_synthetic_measures_steps_as_training_takes_them(capsys):
    """A step is sent while the one before is under way: its value is waited for afterwards."""
    sent, waited = [], []

    class Stand:
        args = SimpleNamespace(batch_size=2, precision="float32")

        def to_device(self, *batch):
            return batch

        def train_batch(self, *_):
            number = len(sent)
            sent.append(number)

            def numpy():
                waited.append((number, len(sent)))
                time.sleep(0.001)

            return SimpleNamespace(numpy=numpy)

    train.measure_speed(Stand(), seconds=0.1)
    assert len(waited) > 4
    for number, then in waited[2:]:  # the first two build the step
        assert then == number + 2
    assert "images/s" in capsys.readouterr().out


def test_averages_of_two_replicas_are_those_of_the_mean_statistics(small_network):
    trainer = make_trainer(two_replicas())
    images, labels = small_batch()
    expected = []
    for half in (images[:2], images[2:]):
        y = trainer.network.stem.convolve(
            tf.constant(half.astype(np.float32)), trainer.network.stem.kernel
        )
        expected.append(tf.reduce_mean(y, [0, 1, 2]).numpy())
    trainer.train_batch(*trainer.to_device(images, labels), 0.0)
    moved = trainer.network.stem.norm.moving_mean.numpy()
    np.testing.assert_allclose(moved, 0.9 * np.mean(expected, axis=0), atol=1e-5)


@pytest.mark.parametrize(("precision", "most"), [("mixed_float16", 0.1), ("mixed_bfloat16", 0.25)])
def test_a_step_in_mixed_precision_is_close_to_float32(precision, most):
    """Within 2% in the loss; the step differs by 5% of its length with float16, 14% with bfloat16.

    It is a hard case: the last stages normalise over the 16 values of four tiny pictures.
    """
    steps, losses = [], []
    for kind in ("float32", precision):
        trainer = make_trainer(precision=kind)
        before = weights(trainer)
        losses.append(trainer.train_batch(*trainer.to_device(*small_batch()), 0.01).numpy()[0])
        steps.append(weights(trainer) - before)
        for variable in trainer.network.variables:
            assert variable.dtype == tf.float32
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert np.linalg.norm(steps[1] - steps[0]) < most * np.linalg.norm(steps[0])


@pytest.mark.parametrize("replicas", [1, 2])
def test_an_overflow_skips_the_step_and_halves_the_scale(replicas, small_network, tmp_path):
    strategy = two_replicas() if replicas > 1 else None
    trainer = make_trainer(strategy, "mixed_float16")
    trainer.train_batch(*trainer.to_device(*small_batch()), 0.01)
    trainer.loss_scale.assign(2.0**100)
    before = weights(trainer)
    momentum = [slot.numpy() for slot in trainer.momentum]
    loss = metrics(trainer.train_batch(*trainer.to_device(*small_batch()), 0.01))
    assert np.isfinite(loss["loss"]) and loss["skipped_steps"] == 1
    for slot, then in zip(trainer.momentum, momentum, strict=True):
        np.testing.assert_array_equal(slot.numpy(), then)
    assert np.array_equal(weights(trainer), before)
    assert float(trainer.loss_scale.numpy()) == 2.0**99
    trainer.state(averaged=False).write(str(tmp_path / "state"))
    restored = make_trainer(precision="mixed_float16")
    status = restored.state(averaged=False).read(str(tmp_path / "state"))
    status.assert_existing_objects_matched()
    assert float(restored.loss_scale.numpy()) == 2.0**99


def test_an_overflow_skips_the_step_of_an_optimizer_without_momentum(small_network, monkeypatch):
    config = utils.load_config(toolkit.ROOT / "config.txt")
    config.train.sgd_momentum = 0.0
    monkeypatch.setattr(utils, "load_config", lambda _: config)
    trainer = make_trainer(precision="mixed_float16")
    before = weights(trainer)
    trainer.train_batch(*trainer.to_device(*small_batch()), 0.01)
    after = weights(trainer)
    assert not np.array_equal(after, before)
    trainer.loss_scale.assign(2.0**100)
    assert (
        metrics(trainer.train_batch(*trainer.to_device(*small_batch()), 0.01))["skipped_steps"] == 1
    )
    assert np.array_equal(weights(trainer), after)


def test_xla_takes_the_same_step(small_network):
    results = []
    for jit in (False, True):
        trainer = make_trainer(jit_compile=jit)
        trainer.train_batch(*trainer.to_device(*small_batch()), 0.01)
        results.append(weights(trainer))
    np.testing.assert_allclose(results[0], results[1], atol=1e-4)


def test_loss_against_numpy_with_label_smoothing_and_l2(small_network):
    trainer = make_trainer(label_smoothing=0.1)
    normalise_with_averages(trainer)
    images, labels = small_batch()
    logits = trainer.network(tf.constant(images.astype(np.float32))).numpy().astype(np.float64)
    squares = sum((v.numpy().astype(np.float64) ** 2).sum() for v in trainer.network.kernels)
    targets = np.full((4, 8), 0.1 / 8)
    targets[np.arange(4), labels] += 0.9
    log_softmax = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    plain = -(targets * log_softmax).sum(axis=1).mean()
    values = metrics(trainer.train_batch(*trainer.to_device(images, labels), 0.0))
    assert values["loss_without_l2"] == pytest.approx(plain, rel=1e-5)
    assert values["loss"] == pytest.approx(plain + 0.0001 / 2 * squares, rel=1e-5)
    assert values["top1"] == pytest.approx((logits.argmax(axis=1) == labels).mean())


def test_sgd_with_momentum_against_numpy(small_network):
    """v = m v - rate g, w = w + v: as the rate of the command line is, not as one saved."""
    trainer = make_trainer()
    normalise_with_averages(trainer)
    images, labels = small_batch()
    bias = trainer.network.dense_bias
    expected, velocity = bias.numpy().astype(np.float64), 0
    for rate in (0.1, 0.1, 0.01):
        x = tf.constant(images.astype(np.float32))
        with tf.GradientTape() as tape:
            logits = trainer.network(x)
            loss = tf.reduce_mean(
                tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
            )
        velocity = 0.9 * velocity - rate * tape.gradient(loss, bias).numpy()
        expected = expected + velocity
        trainer.train_batch(*trainer.to_device(images, labels), rate)
        np.testing.assert_allclose(bias.numpy(), expected, atol=1e-5)


# --- schedules and small parts --------------------------------------------------------------


def rates(batches: int = 10, epochs: int = 6, **options) -> list[float]:
    args = {"learning_rate": 0.1, "lr_schedule": "constant", "warmup_epochs": 0}
    args = SimpleNamespace(**args | {"lr_drop_epochs": (), "epoch_end": epochs} | options)
    return [train.learning_rate(step, args, batches) for step in range(batches * epochs)]


def test_learning_rate_schedules():
    assert rates() == [0.1] * 60
    steps = rates(lr_schedule="step", lr_drop_epochs=(2, 4))
    np.testing.assert_allclose(steps, [0.1] * 20 + [0.01] * 20 + [0.001] * 20)
    cosine = rates(lr_schedule="cosine")
    np.testing.assert_allclose(cosine, 0.05 * (1 + np.cos(np.pi * np.arange(60) / 60)))
    half = rates(batches=7, epochs=2, warmup_epochs=0.5)
    np.testing.assert_allclose(half[:4], [0.1 / 3.5, 0.2 / 3.5, 0.3 / 3.5, 0.1])  # never above
    warm = rates(lr_schedule="cosine", warmup_epochs=2)
    np.testing.assert_allclose(warm[:20], np.arange(1, 21) / 20 * 0.1)
    np.testing.assert_allclose(warm[20:], 0.05 * (1 + np.cos(np.pi * np.arange(40) / 40)))


@pytest.mark.parametrize("name", ["../out", "a/b", "/tmp/x", "", ".hidden", "..", "a\nb"])
def test_run_folder_cannot_lead_elsewhere(name):
    with pytest.raises(argparse.ArgumentTypeError):
        resnet50.run_name(name)


def test_a_broken_model_is_named_and_made_again_once_it_is_removed(training):
    assert training.run("run", 0, 2).returncode == 0
    checkpoint = next((training.models / "run/1/training_state").glob("state.data*"))
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    result = training.run("run", 0, 3, "--resume")
    words = f"remove {training.models / 'run/1'}, and --resume continues from"
    toolkit.assert_one_line_error(result, "train.py", "run/1", "cannot be read", words)
    shutil.rmtree(training.models / "run/1")
    assert training.run("run", 0, 3, "--resume").returncode == 0
    assert {path.name for path in (training.models / "run").iterdir() if path.is_dir()} == {
        "0", "1", "2", "events",
    }  # fmt: skip
    log = training.folder / "preprocessing.log"
    full = log.read_text().count("ready ahead")
    training.preprocess(3)
    _wait_until(lambda: log.read_text().count("ready ahead") > full)
    again = toolkit.run("train.py", training.config, *training.arguments("run", 0, 3, "--resume"))
    assert again.returncode == 0 and "already trained to the end of epoch 2" in again.stdout
    assert training.processes[-1].poll() is None  # it may be that of another run


def test_epochs_that_are_not_there_cannot_be_resumed(training):
    arguments = training.arguments("misspelt", 1, 2, "--resume")
    result = toolkit.run("train.py", training.config, *arguments)
    toolkit.assert_one_line_error(result, "train.py", "misspelt", "no such run", "no runs yet")
    assert not (training.models / "misspelt").exists()


# --- odd surroundings -----------------------------------------------------------------------


def test_a_terminal_that_closes_while_a_batch_is_waited_for_costs_no_step(training):
    """A script's terminal sends SIGHUP twice, within a millisecond."""
    training.preprocess(1)  # training wants two epochs, so it waits after the first
    process = training.start("run", 0, 2, "--log_seconds=0", "--checkpoint_minutes=60")
    log = training.folder / "run.log"
    _wait_until(lambda: "waiting for" in log.read_text().partition("\nsaved ")[2])
    for _ in range(2):
        process.send_signal(signal.SIGHUP)
        time.sleep(0.0004)
    process.send_signal(signal.SIGTERM)  # as systemd does
    assert process.wait(timeout=300) == 128 + signal.SIGHUP, log.read_text()
    assert "stopped before epoch 1, batch 0" in log.read_text()


@pytest.mark.parametrize("name", ["KERAS_BACKEND=torch", "TF_USE_LEGACY_KERAS=1", "keras.json"])
def test_keras_has_no_say(training, tmp_path, name):
    """Nor does its settings file: with floatx = float16 the rate would be rounded."""
    (tmp_path / ".keras").mkdir()
    (tmp_path / ".keras" / "keras.json").write_text('{"floatx": "float16", "backend": "jax"}')
    key, _, value = name.partition("=")
    environment = {"HOME": str(tmp_path)} if name == "keras.json" else {key: value}
    training.preprocess(1)
    arguments = training.arguments("run", 0, 1, "--log_seconds=0")
    result = toolkit.run("train.py", training.config, *arguments, **environment)
    assert result.returncode == 0, result.stderr
    assert {row["learning_rate"] for row in training.log("run")} == {"0.01"}
