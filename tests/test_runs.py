"""What a run keeps, refuses, continues from and says, in this process and with a small network.

The whole commands are in test_training.py.
"""

import argparse
import contextlib
import dataclasses
import errno
import fcntl
import io
import json
import math
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import types
import zlib
from concurrent.futures import Future
from pathlib import Path

import toolkit
import utils

import numpy as np
import pytest
import tensorflow as tf

import resnet50
import train
from runtime_preprocessing import BatchSpec
from test_training import normalise_with_averages

SPEC = BatchSpec(
    batch_size=4,
    seed=0,
    dataset="/data",
    N=10,
    pictures="0123abcd",
    classes=8,
    class_names=[f"class {i}" for i in range(8)],
    mu=[0.5, 0.5, 0.5],
    sigma=[0.25, 0.25, 0.25],
    resized=[],
    worker=0,
    workers=1,
    batches_per_epoch=2,
    epochs=[0, 9],
)


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    monkeypatch.setattr(resnet50, "STAGES", [(1, 64, 256, 1), (1, 128, 512, 2)])


def arguments(*flags: str) -> argparse.Namespace:
    """What the command line of these flags gives, on a machine without a GPU."""
    usual = ["--run_folder=run", "--epoch_end=9", "--batch_size=4", "--learning_rate=0.01"]
    given = [flag.partition("=")[0] for flag in flags]
    usual = [flag for flag in usual if flag.partition("=")[0] not in given]
    if "--epoch_start" not in given:
        usual.append("--epoch_start=0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *usual, *flags])
        args = train.parse_arguments()
    args.precision = args.precision or "float32"
    return args


def trainer_of(*flags: str, spec: BatchSpec = SPEC, **settings: object) -> train.Trainer:
    """`settings` are section__key=value of config.txt."""
    config = utils.load_config(toolkit.ROOT / "config.txt")
    for name, value in settings.items():
        section, key = name.split("__")
        setattr(getattr(config, section), key, value)
    strategy, args = tf.distribute.get_strategy(), arguments(*flags)
    return train.Trainer(strategy, config, spec.classes, spec.batches_per_epoch, args)


def settings_of(trainer: train.Trainer, spec: BatchSpec = SPEC) -> dict[str, object]:
    return train.settings_of(trainer.config, spec, trainer.args)


def saver_of(folder: Path, trainer: train.Trainer, spec: BatchSpec = SPEC) -> train.Saver:
    run = train.Run(folder, trainer.args)
    return train.Saver(run, trainer, spec, settings_of(trainer, spec))


def there(run: Path) -> list[str]:
    """What lies in a run's folder, without its lock."""
    return sorted(name for name in os.listdir(run) if name != resnet50.RUN_LOCK)


def save_epoch(folder: Path, trainer: train.Trainer, step: int) -> None:
    saver_of(folder, trainer).save_epoch(step, utils.Stop())


def restore(folder: Path, trainer: train.Trainer, spec: BatchSpec = SPEC) -> int:
    """Loads what the flags of the trainer ask for. Returns the next step."""
    run = train.Run(folder, trainer.args)
    place = run.starting_point()
    train.restore(run, place, trainer, spec, settings_of(trainer, spec))
    return spec.step(place.epoch, place.batch)


def claim(folder: Path, *flags: str) -> train.Place:
    return train.Run(folder, arguments(*flags)).claim()


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a run."""
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def begin(folder: Path) -> None:
    """Begins the log, as a start of training does."""
    utils.write_csv(folder / "training_log.csv", resnet50.LOG_COLUMNS, [])


def fake_model(folder: Path, fingerprint: str = "") -> None:
    """What counts as a model from which training can continue."""
    (folder / "assets").mkdir(parents=True, exist_ok=True)
    (folder / "saved_model.pb").write_bytes(b"model")
    recipe = resnet50.ModelRecipe(["a"], [0.5] * 3, [0.5] * 3, {}, fingerprint=fingerprint)
    utils.write_record(folder / "assets" / "recipe.json", recipe)


def fake_state(folder: Path, epoch: int, batch: int = 0) -> None:
    (folder / "training_state").mkdir(parents=True, exist_ok=True)
    record = train.StateRecord(2 * epoch + batch, epoch, batch, {})
    utils.write_record(folder / "training_state" / "state.json", record)


def fake_epochs(run: Path, *epochs: int) -> None:
    for epoch in epochs:
        fake_model(run / str(epoch))
        fake_state(run / str(epoch), epoch + 1)


def batch(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Four pictures of 64x64: the network takes any size."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(4, 64, 64, 3)).astype(np.float16), np.arange(4, dtype=np.int32)


def take_step(trainer: train.Trainer, seed: int = 0, rate: float = 0.01) -> dict[str, float]:
    values = trainer.train_batch(*trainer.to_device(*batch(seed)), rate)
    return dict(zip(train.METRICS, values.numpy().tolist(), strict=True))


def everything(trainer: train.Trainer) -> list[np.ndarray]:
    """Weights, averages, momentum and counters."""
    counters = [trainer.updates, trainer.loss_scale, trainer.good_updates]
    return [v.numpy() for v in (*trainer.network.variables, *trainer.momentum, *counters)]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


# --- where training begins ------------------------------------------------------------------


@pytest.mark.parametrize("there", [False, True])
def test_a_run_that_never_began_cannot_be_resumed_and_those_that_did_are_named(tmp_path, there):
    """An unmounted disk looks like a run's folder without anything in it."""
    for name in ("mine", "other"):
        (tmp_path / name).mkdir()
        begin(tmp_path / name)
    if there:
        (tmp_path / "mien").mkdir()
    with pytest.raises(utils.UserError, match="mien: no such run.* has mine, other\\. "):
        claim(tmp_path / "mien", "--resume")
    assert list(tmp_path.glob("mien/*")) == []
    begin(tmp_path / "other")
    assert claim(tmp_path / "other", "--resume") == (0, 0, None)  # killed before its first state


def test_a_start_that_is_killed_as_soon_as_it_has_its_folder_can_be_resumed(tmp_path, monkeypatch):
    def killed(*_: object) -> None:
        raise SystemExit

    monkeypatch.setattr(utils, "hold_lock", killed)
    with pytest.raises(SystemExit):
        claim(tmp_path / "run")
    monkeypatch.undo()
    assert claim(tmp_path / "run", "--resume") == (0, 0, None)
    assert os.path.isfile(tmp_path / "run" / "training_log.csv")


def test_a_state_within_an_epoch_is_never_removed_by_a_start_without_resume(run):
    fake_epochs(run, 0, 1, 2)
    fake_state(run / "state_3_1", 3, 1)
    with pytest.raises(utils.UserError, match="state_3_1 already exists.*--resume"):
        claim(run, "--epoch_start=3")
    assert claim(run, "--epoch_start=0", "--resume") == (3, 1, run / "state_3_1")
    shutil.rmtree(run / "state_3_1")
    utils._forget_locks()
    assert claim(run, "--epoch_start=3") == (3, 0, run / "2")


def test_models_are_neither_overwritten_nor_skipped(run):
    fake_epochs(run, 0, 1)
    for start, words in (
        (0, "0 already exists and would be replaced.*0, 1.*add --resume"),
        (1, "1 already exists"),
        (3, "2, which does not exist.*epochs: 0, 1"),
    ):
        with pytest.raises(utils.UserError, match=words):
            claim(run, f"--epoch_start={start}")
    assert sorted(os.listdir(run)) == ["0", "1"]
    (run / "4").touch()
    with pytest.raises(utils.UserError, match="4 already exists.*0, 1.*move it away"):
        claim(run, "--epoch_start=2")
    (run / "4").rename(run / "400")
    assert claim(run, "--epoch_start=2") == (2, 0, run / "1")


def test_a_run_has_one_trainer_at_a_time_which_says_what_gpus_it_uses(run):
    args = arguments()
    args.gpu = [0, 2]
    train.Run(run, args).claim()
    assert resnet50.read_lock_note(run / resnet50.RUN_LOCK).gpus == [0, 2]
    utils._locks.clear()  # as in another process
    with pytest.raises(utils.UserError, match="another train.py"):
        claim(run)


def test_a_run_that_is_moved_or_loses_its_lock_goes_on(run, tmp_path):
    trainer = trainer_of()
    train.Run(run, trainer.args).claim()
    run.rename(tmp_path / "moved")
    save_epoch(run, trainer, 2)
    assert resnet50.epochs_in(run) == [0] and utils.is_locked(run / resnet50.RUN_LOCK)
    (run / resnet50.RUN_LOCK).unlink()
    with open(run / resnet50.RUN_LOCK, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as another process
        with pytest.raises(utils.UserError, match="another train.py"):
            save_epoch(run, trainer, 4)


def test_leftovers_of_the_trainer_go_and_those_of_the_checker_stay(run):
    for name in ("3", "state_1_1", "training_log.csv", "accuracy.csv", "accuracy.png"):
        (run / f".{name}.aside-0123456789abcdef").touch()
    claim(run)
    left = {path.name.split(".aside")[0] for path in run.glob(".*.aside-*")}
    assert left == {".accuracy.csv", ".accuracy.png"}


def test_continuing_restores_weights_averages_momentum_and_counters(run):
    trainer = trainer_of()
    take_step(trainer), take_step(trainer)
    save_epoch(run, trainer, 2)
    take_step(trainer, seed=1)
    saver_of(run, trainer).save_state(3)
    for flags, step in ((["--resume"], 3), (["--epoch_start=1"], 2)):
        if step == 2:
            shutil.rmtree(run / "state_1_1")
        other = trainer_of(*flags)
        assert restore(run, other) == step
        assert int(other.updates.numpy()) == step
        if step == 3:
            assert same(everything(other), everything(trainer))
            metrics = [take_step(each, seed=2) for each in (trainer, other)]
            assert metrics[0] == metrics[1]
            assert same(everything(other), everything(trainer))


@pytest.mark.parametrize(
    ("before", "after"),
    [("mixed_float16", "float32"), ("float32", "mixed_float16"), ("mixed_bfloat16", "float32")],
)
def test_any_precision_continues_from_any_other(run, before, after, capsys):
    trainer = trainer_of(f"--precision={before}")
    take_step(trainer), take_step(trainer)
    save_epoch(run, trainer, 2)
    other = trainer_of("--resume", f"--precision={after}")
    assert restore(run, other) == 2
    assert same(everything(other), everything(trainer))
    assert f"--precision is now {after}" in capsys.readouterr().out
    assert math.isfinite(take_step(other)["loss"])


def test_other_flags_are_said(run, capsys):
    save_epoch(run, trainer_of("--lr_schedule=cosine", "--warmup_epochs=2"), 2)
    restore(run, trainer_of("--resume", "--learning_rate=0.5"))
    said = capsys.readouterr().out
    assert "--lr_schedule is now constant; the state was trained with cosine" in said
    assert "--warmup_epochs is now 0.0" in said and "--learning_rate is now 0.5" in said
    restore(run, trainer_of("--resume", "--lr_schedule=cosine", "--warmup_epochs=2"))
    assert "is now" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("l2__l2_penalty", 0.01, "[l2] l2_penalty is now 0.01; the state was trained with 0.0001"),
        ("train__sgd_momentum", 0.8, "[train] sgd_momentum is now 0.8"),
        ("batch_renorm__moving_avgs_momentum", 0.5, "[batch_renorm] moving_avgs_momentum is now"),
        ("batch_renorm__reach_rmax_max", utils.Epochs(8), "reach_rmax_max is now 8 epochs; "),
    ],
)
def test_other_settings_are_said_in_a_line_each(run, capsys, key, value, said):
    """A loop that starts training again reads a shared config.txt anew each time."""
    batch_renorm = {"batch_renorm__reach_rmax_max": utils.Epochs(7)}
    save_epoch(run, trainer_of(**batch_renorm), 2)
    other = trainer_of("--resume", **batch_renorm | {key: value})
    restore(run, other)
    printed = capsys.readouterr().out
    assert said in printed and printed.count("is now") == 1


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"batch_size": 2, "batches_per_epoch": 5}, "batch_size is now 2; the state was trained"),
        ({"pictures": "fedc"}, "the training pictures have changed"),
        ({"seed": 5}, "seed is now 5"),
        ({"crop": "area"}, "crop is now area"),
        ({"resized": [256]}, "resized is now [256]"),
    ],
)
def test_other_batches_between_epochs_are_said(run, capsys, changed, said):
    save_epoch(run, trainer_of(), 2)
    spec = dataclasses.replace(SPEC, **changed)
    other = trainer_of("--resume", spec=spec)
    assert restore(run, other, spec) == spec.batches_per_epoch
    assert int(other.updates.numpy()) == spec.batches_per_epoch  # limits stay at their epochs
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    "key", ["mu", "sigma", "seed", "batch_size", "pictures", "N", "workers", "crop"]
)
def test_a_state_within_an_epoch_fits_only_the_same_batches_and_says_the_one_way_on(run, key):
    fake_epochs(run, 0)
    saver_of(run, trainer_of()).save_state(3)
    values = {"mu": [0.1] * 3, "sigma": [0.1] * 3, "pictures": "other", "crop": "area", "N": 11}
    value = values.get(key, 2)
    spec = dataclasses.replace(SPEC, **{key: value})
    way_out = r"change it back, or remove \S*state_1_1, and --resume continues from \S*run/0"
    with pytest.raises(utils.UserError, match=f"{key} = .*{way_out}"):
        restore(run, trainer_of("--resume"), spec)
    shutil.rmtree(run / "state_1_1")
    assert train.Run(run, arguments("--resume")).starting_point() == (1, 0, run / "0")


def test_other_classes_are_refused_between_epochs_too(run):
    save_epoch(run, trainer_of(), 2)
    spec = dataclasses.replace(SPEC, classes=3, class_names=["a", "b", "c"])
    with pytest.raises(utils.UserError, match="classes = 8.*another --run_folder"):
        restore(run, trainer_of("--resume", spec=spec), spec)


def test_a_model_without_its_training_state_is_named_with_the_way_out(run):
    save_epoch(run, trainer_of(), 2)
    shutil.rmtree(run / "0" / "training_state")
    for flags in (["--resume"], ["--epoch_start=1"]):
        with pytest.raises(utils.UserError, match="training_state is missing.*--init_from"):
            restore(run, trainer_of(*flags))


def broken_states() -> list:
    def cut_off(state: Path) -> None:
        checkpoint = next(state.glob("state.data*"))
        checkpoint.write_bytes(checkpoint.read_bytes()[:1000])

    texts = ["[]", "{}", '{"step": 3', '{"step": 1, "epoch": "1", "batch": 1, "settings": {}}', ""]
    write = [lambda state, text=text: (state / "state.json").write_text(text) for text in texts]
    return [cut_off, *write, lambda state: (state / "state.index").unlink()]


@pytest.mark.parametrize("spoil", broken_states(), ids=range(7))
def test_a_broken_state_is_named_and_what_training_continues_from_without_it(run, spoil):
    trainer = trainer_of()
    save_epoch(run, trainer, 2)
    saver_of(run, trainer).save_state(3)
    spoil(run / "state_1_1" / "training_state")
    before = sorted(os.listdir(run))
    words = r"state_1_1.*remove \S*state_1_1, and --resume continues from \S*run/0"
    with pytest.raises(utils.UserError, match=words):
        restore(run, trainer_of("--resume"))
    assert sorted(os.listdir(run)) == before
    shutil.rmtree(run / "state_1_1")
    assert restore(run, trainer_of("--resume")) == 2


def test_a_state_of_a_batch_that_no_epoch_has_is_named_with_the_way_out(run):
    trainer = trainer_of()
    save_epoch(run, trainer, 2)
    saver_of(run, trainer).save_state(3)
    (run / "state_1_1").rename(run / "state_1_7")
    record = train.StateRecord(9, 1, 7, settings_of(trainer))
    utils.write_record(run / "state_1_7" / "training_state" / "state.json", record)
    words = r"state_1_7 does not fit epochs of 2 batches; remove \S*state_1_7, and --resume"
    with pytest.raises(utils.UserError, match=words):
        restore(run, trainer_of("--resume"))


def test_a_device_without_memory_does_not_make_a_state_look_damaged(run, monkeypatch):
    trainer = trainer_of()
    save_epoch(run, trainer, 2)

    def full(*_: object) -> None:
        raise tf.errors.ResourceExhaustedError(None, None, "the device is full")

    monkeypatch.setattr(tf.train.Checkpoint, "read", full)
    with pytest.raises(MemoryError):
        restore(run, trainer_of("--resume"))


@pytest.mark.parametrize("file", ["training_state/weights.index", "variables/variables.index"])
def test_a_pipe_in_the_place_of_weights_is_not_waited_for(run, tmp_path, file):
    trainer = trainer_of()
    save_epoch(run, trainer, 2)
    saver_of(run, trainer).save_state(3)
    model = file.startswith("variables")
    pipe = run / ("0" if model else "state_1_1") / file
    toolkit.make_pipe(pipe)
    other, where = (f"--init_from={run / '0'}", tmp_path / "new") if model else ("--resume", run)
    with pytest.raises(utils.UserError, match=f"{pipe.name} is not a file"):
        restore(where, trainer_of(other))


def test_the_first_state_broken_leaves_the_beginning(run):
    saver_of(run, trainer_of()).save_state(1)
    (run / "state_0_1" / "training_state" / "state.json").write_text("?")
    with pytest.raises(utils.UserError, match="--resume continues at the beginning"):
        claim(run, "--resume")


def test_other_classes_are_warned_of_when_training_continues(run, capsys):
    save_epoch(run, trainer_of(), 2)
    for name, warned in (("class 0", False), ("cat", True)):
        spec = dataclasses.replace(SPEC, class_names=[name, *SPEC.class_names[1:]])
        restore(run, trainer_of("--epoch_start=1"), spec)
        assert ("its class 0 is class 0, but cat" in capsys.readouterr().err) == warned


def test_a_passing_error_of_the_storage_hides_no_state(run, monkeypatch):
    fake_state(run / "state_3_1", 3, 1)
    failures, listdir = [5, 116], os.listdir

    def fails_twice(folder: Path) -> list[str]:
        if failures:
            raise OSError(failures.pop(), "the storage fails")
        return listdir(folder)

    monkeypatch.setattr(utils, "PAUSES", (0, 0))
    monkeypatch.setattr(os, "listdir", fails_twice)
    assert train.Run(run, arguments()).places() == [(3, 1, run / "state_3_1")] and not failures
    assert train.Run(run / "none", arguments()).places() == []


def test_storage_that_fails_does_not_pass_for_a_broken_state(run, monkeypatch):
    saver_of(run, trainer_of()).save_state(1)
    monkeypatch.setattr(train, "worker_of_workers", lambda: (1, 2))
    saver = saver_of(run, trainer_of())
    monkeypatch.undo()
    saver.save_state(3)  # another machine writes nothing
    other, read = trainer_of("--resume"), utils.read_file

    def fail(path: Path) -> bytes:
        if path.name.startswith("weights.data"):
            raise utils.UserError("its storage failed 5 times")
        return read(path)

    monkeypatch.setattr(resnet50, "STAGES", [(1, 64, 256, 1), (1, 128, 512, 2)])
    monkeypatch.setattr(utils, "read_file", fail)
    with pytest.raises(utils.UserError, match="^its storage failed 5 times$"):
        restore(run, other)
    assert there(run) == ["state_0_1"]


def test_momentum_may_be_switched_on_and_off_between_runs(run):
    for epoch, (before, after) in enumerate([(0.0, 0.9), (0.9, 0.0)]):
        save_epoch(run, trainer_of(train__sgd_momentum=before), 2 * epoch + 2)
        assert restore(run, trainer_of("--resume", train__sgd_momentum=after)) == 2 * epoch + 2


def test_a_buffer_that_cannot_be_made_is_named_with_its_setting():
    config = utils.load_config(toolkit.ROOT / "config.txt")
    config.train.buffer_folder = Path("/proc/batches")
    words = "/proc/batches: cannot be created: .*another .train. buffer_folder"
    with pytest.raises(utils.UserError, match=words):
        train.wait_for_buffer(config, arguments())


# --- the loop -------------------------------------------------------------------------------


class Parts:
    """Stands in for what the loop uses. Notes what each is told."""

    trouble: Exception | None = None
    """What the reader raises instead of a stop."""

    def __init__(self, steps: range, batches: int, due: int | None = None):
        """`batches`: how many there are before the stop. `due`: when a state is to be saved."""
        self.steps, self.spec, self.batches, self.due = steps, SPEC, batches, due
        self.args = arguments("--learning_rate=0.8", "--warmup_epochs=4")  # rises by 0.1 per step
        self.told: list[object] = []

    def waiting(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def should_stop(self, *_: object) -> bool:
        return False

    def next(self, _stop: object) -> tuple[int] | None:
        self.batches -= 1
        if self.batches < 0 and self.trouble:
            raise self.trouble
        return (self.batches,) if self.batches >= 0 else None

    def train_batch(self, batch: int, rate: float, _stopping: bool) -> int:
        self.told.append(("batch", batch, round(rate, 9)))
        return batch

    def add(self, step: int, rate: float, values: int) -> None:
        self.told.append(("step", step, round(rate, 9), values))
        self.at = step + 1

    def settle(self) -> None:
        self.told.append("settle")

    def is_due(self) -> bool:
        return self.at == self.due

    def save_epoch(self, step: int, _stop: object) -> None:
        self.told.append(("epoch", step))

    def save_state(self, step: int) -> None:
        self.told.append(("state", step))


def test_the_loop_trains_on_each_batch_once_and_saves_what_is_known_to_be_good():
    parts = Parts(range(3, 6), 3, due=5)
    assert train.train(parts, parts, parts, parts, utils.Stop()) == 6
    assert parts.told == [
        *[("batch", 2, 0.4), ("step", 3, 0.4, 2), "settle", ("epoch", 4)],
        *[("batch", 1, 0.5), ("step", 4, 0.5, 1), "settle", ("state", 5)],
        *[("batch", 0, 0.6), ("step", 5, 0.6, 0), "settle", ("epoch", 6)],
        *["settle", ("state", 6)],  # which does nothing at the end of an epoch
    ]


def test_the_loop_saves_a_stopped_training():
    parts = Parts(range(4, 18), 1)
    assert train.train(parts, parts, parts, parts, utils.Stop()) == 5
    assert parts.told == [("batch", 0, 0.5), ("step", 4, 0.5, 0), "settle", ("state", 5)]


@pytest.mark.parametrize(
    "trouble",
    [
        utils.UserError("another buffer"),
        OSError(5, "EIO"),
        MemoryError(),
        tf.errors.ResourceExhaustedError(None, None, "the device is full"),
    ],
)
def test_trouble_with_the_buffer_costs_no_step(trouble):
    parts = Parts(range(4, 18), 1)
    parts.trouble = trouble
    with pytest.raises(type(trouble)):
        train.train(parts, parts, parts, parts, utils.Stop())
    assert parts.told == [("batch", 0, 0.5), ("step", 4, 0.5, 0), "settle", ("state", 5)]


# --- from the model of another run ----------------------------------------------------------


def test_a_run_that_begins_from_a_model_takes_its_weights_and_starts_afresh(run, tmp_path, capsys):
    trainer = trainer_of()
    take_step(trainer)
    save_epoch(run, trainer, 2)
    new, flag = tmp_path / "new", f"--init_from={run / '0'}"
    new.mkdir()
    begin(new)
    for more in ([], ["--resume"]):  # killed before its first state
        started = trainer_of(flag, *more)
        assert restore(new, started) == 0
        assert same(
            [v.numpy() for v in started.network.variables],
            [v.numpy() for v in trainer.network.variables],
        )
        assert int(started.updates.numpy()) == 0
        assert not any(slot.numpy().any() for slot in started.momentum)
    capsys.readouterr()
    spec = dataclasses.replace(SPEC, classes=3, class_names=["a", "b", "c"])
    others = trainer_of(flag, spec=spec)
    assert restore(new, others, spec) == 0
    assert "the dense layer is new: 3 classes" in capsys.readouterr().out
    np.testing.assert_array_equal(others.network.stem.kernel, trainer.network.stem.kernel)
    np.testing.assert_array_equal(
        others.network.stem.norm.moving_std, trainer.network.stem.norm.moving_std
    )
    assert others.network.dense_kernel.shape == (512, 3)


def test_a_run_that_continues_another_takes_its_whole_state(run, tmp_path):
    trainer = trainer_of()
    take_step(trainer), take_step(trainer)
    save_epoch(run, trainer, 2)
    new = tmp_path / "new"
    new.mkdir()
    begin(new)
    for more in ([], ["--resume"]):  # killed before its first state
        other = trainer_of(f"--init_from={run / '0'}", "--epoch_start=1", *more)
        assert restore(new, other) == 2
        assert same(everything(other), everything(trainer))
    save_epoch(new, other, 4)
    assert (
        train.Run(new, arguments(f"--init_from={run / '0'}", "--resume")).starting_point().epoch
        == 2
    )


def test_what_training_begins_from_is_checked_before_a_batch_is_waited_for(run, tmp_path):
    fake_epochs(run, 4)
    new = tmp_path / "new"
    for flags, words in (
        (["--init_from=nowhere"], "nowhere: not a model"),
        ([f"--init_from={run}"], "it is a run|not a model but a run"),
        ([f"--init_from={run / '4'}", "--epoch_start=4"], "at epoch 5, batch 0, not at epoch 4"),
    ):
        with pytest.raises(utils.UserError, match=words):
            claim(new, *flags)
        assert not new.exists()
    assert claim(new, f"--init_from={run / '4'}", "--epoch_start=5") == (5, 0, run / "4")
    (run / "4" / "training_state" / "state.json").write_text("[1]")
    with pytest.raises(utils.UserError, match="choose another model for --init_from"):
        claim(tmp_path / "newer", f"--init_from={run / '4'}", "--epoch_start=5")


# --- saving ---------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["weights", "momentum"])
def test_weights_that_are_not_finite_are_not_saved(run, part):
    trainer = trainer_of()
    broken = trainer.network.dense_bias if part == "weights" else trainer.momentum[-1]
    broken.assign(tf.fill(broken.shape, float("nan")))
    saver = saver_of(run, trainer)
    for save in (lambda: saver.save_epoch(2, utils.Stop()), lambda: saver.save_state(3)):
        with pytest.raises(utils.UserError, match="no longer finite.*smaller --learning_rate"):
            save()
    assert os.listdir(run) == []


FULL_DISK = [
    OSError(28, "No space left on device"),
    tf.errors.ResourceExhaustedError(None, None, "No space left on device"),
]
"""As Python and as TensorFlow say it."""


@pytest.mark.parametrize("error", FULL_DISK)
def test_a_full_disk_while_a_state_is_saved_leaves_the_last_one(run, monkeypatch, capsys, error):
    trainer = trainer_of()
    saver = saver_of(run, trainer)
    saver.save_state(1)

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(trainer, "state", full)
    saver.save_state(3)
    assert there(run) == ["state_0_1"]
    assert "state_1_1: not saved: " in capsys.readouterr().err


def test_a_disk_that_is_read_only_for_a_moment_does_not_end_training(run, monkeypatch, capsys):
    saver = saver_of(run, trainer_of())
    saver.save_state(1)
    pauses = []

    def read_only(path: object, *_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    def wait(_stop: object, seconds: float) -> bool:
        pauses.append(seconds)
        monkeypatch.undo()  # the disk is well again
        return False

    monkeypatch.setattr(os, "mkdir", read_only)
    monkeypatch.setattr(os, "access", lambda *_: False)
    saver.save_state(3)
    assert there(run) == ["state_0_1"]
    assert "state_1_1: not saved: " in capsys.readouterr().err
    monkeypatch.setattr(utils.Stop, "wait", wait)
    saver.save_epoch(4, utils.Stop())
    assert pauses == [60] and there(run) == ["1"]


def test_states_are_removed_once_something_newer_is_saved(run):
    saver = saver_of(run, trainer_of())
    for step, left in ((1, ["state_0_1"]), (2, ["state_0_1"]), (3, ["state_1_1"])):
        saver.save_state(step)
        assert there(run) == left  # none at the end of an epoch, which has its model
    saver.save_epoch(4, utils.Stop())
    assert there(run) == ["1"]


def test_a_state_is_due_after_checkpoint_minutes(run):
    saver = saver_of(run, trainer_of("--checkpoint_minutes=3"))
    now = time.monotonic()
    for seconds, due in ((170, False), (190, True)):
        saver._last = now - seconds
        assert saver.is_due() == due
    saver.save_state(1)
    assert not saver.is_due()


@pytest.mark.parametrize("error", FULL_DISK)
def test_a_stop_does_not_wait_for_a_full_disk(run, monkeypatch, error):
    saver, stop = saver_of(run, trainer_of()), utils.Stop()

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(resnet50, "export_model", full)
    waits = []
    monkeypatch.setattr(stop, "wait", lambda seconds: (waits.append(seconds), stop.set()))
    monkeypatch.setattr(train.time, "sleep", waits.append)
    with pytest.raises(utils.UserError, match="cannot be saved"):
        saver.save_epoch(2, stop)
    assert waits == [60, 2] * 4 and there(run) == []


def test_a_model_is_saved_although_tmpdir_has_vanished(run, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/nowhere")
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    save_epoch(run, trainer_of(), 2)
    assert resnet50.model_recipe(run / "0").step == 2


def keep(run: Path, top1: dict[int, float], epochs: int, *flags: str) -> list[int]:
    """The epochs left of those in the run, of which some were evaluated, with what `top1`."""
    for epoch in range(epochs):
        fake_model(run / str(epoch), f"model {epoch}")
    write_accuracies(run, [(epoch, None, value, f"model {epoch}") for epoch, value in top1.items()])
    return tidied(run, *flags)


def write_accuracies(run: Path, rows: list[tuple]) -> None:
    names = ("epoch", "top1_10crop", "top1_centre", "model")
    filled = dict.fromkeys(resnet50.ACCURACY_COLUMNS, 0)
    table = [filled | dict(zip(names, row, strict=True)) for row in rows]
    utils.write_csv(run / "accuracy.csv", resnet50.ACCURACY_COLUMNS, table)


def tidied(run: Path, *flags: str) -> list[int]:
    trainer = types.SimpleNamespace(args=arguments(*flags))
    newest = max(epoch for epoch in resnet50.epochs_in(run) if epoch < 1000)
    saver = train.Saver(train.Run(run, trainer.args), trainer, SPEC, {})
    saver._tidy(run / str(newest))
    return resnet50.epochs_in(run)


@pytest.fixture
def checker(run):
    """Starts a checker of these epochs, in another open file as in another process."""

    def start(epochs: list[int]) -> None:
        utils.lock(run / resnet50.CHECKER_LOCK, "")
        resnet50.write_lock_note(run / resnet50.CHECKER_LOCK, resnet50.LockNote(epochs=epochs))

    yield start
    utils._forget_locks()


def test_keep_last_keeps_the_newest_and_the_best(run):
    assert keep(run, {0: 0.2, 1: 0.9, 2: 0.5, 3: 0.6, 4: 0.1}, 6, "--keep_last=2") == [1, 4, 5]
    fake_model(run / "261129", "a copy, named by the date")
    assert tidied(run, "--keep_last=1") == [1, 5, 261129]


def test_backups_named_by_the_date_are_no_epochs(run):
    fake_epochs(run, 0, 1)
    fake_model(run / "261129", "a copy")
    assert claim(run, "--epoch_start=2") == (2, 0, run / "1")


def test_keep_last_keeps_the_best_of_ten_crops(run):
    keep(run, {}, 4)
    rows = [(0, 0.3, 0.9, "model 0"), (1, 0.8, 0.2, "model 1"), (2, 0.5, 0.5, "model 2")]
    write_accuracies(run, rows)
    assert tidied(run, "--keep_last=1") == [1, 3]


def test_keep_last_waits_for_a_checker_at_work(run, checker):
    checker(list(range(9)))
    assert keep(run, {0: 0.2, 1: 0.9}, 6, "--keep_last=2") == [1, 2, 3, 4, 5]
    utils._forget_locks()
    assert keep(run, {0: 0.2, 1: 0.9}, 6, "--keep_last=2") == [1, 4, 5]


@pytest.mark.parametrize(
    ("epochs", "left"),
    [
        ([1, 3, 5, 7, 8], [1, 3, 5, 7]),  # 1 is yet to be evaluated
        ([4, 5, 6, 7, 8], [3, 4, 5, 6, 7]),  # what comes before the checker's first epoch goes
        ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 7]),  # and what comes after its last one
    ],
)
def test_keep_last_removes_what_a_checker_passes_over(run, checker, epochs, left):
    checker(epochs)
    assert keep(run, {3: 0.6}, 8, "--keep_last=1") == left


def test_keep_last_does_not_believe_a_row_of_an_earlier_model(run, checker):
    keep(run, {0: 0.2, 1: 0.9, 2: 0.3}, 6)
    for epoch in (1, 2):  # trained again
        fake_model(run / str(epoch), "new")
    checker(list(range(9)))
    assert tidied(run, "--keep_last=2") == [0, 1, 2, 3, 4, 5]  # 0 is the best that is known


@pytest.mark.parametrize("trouble", ["epoch,thoughts\n0,mine\n", None])
def test_a_table_that_cannot_be_read_removes_nothing_and_training_goes_on(run, capsys, trouble):
    keep(run, {0: 0.5}, 2)
    table = run / "accuracy.csv"
    table.write_text(trouble or table.read_text().replace("0.5", "high"))
    save_epoch(run, trainer_of("--keep_last=1"), 6)
    assert resnet50.epochs_in(run) == [0, 1, 2]
    assert "old models and states may stay" in capsys.readouterr().err


def test_what_cannot_be_removed_does_not_end_training(run, capsys, monkeypatch):
    saver = saver_of(run, trainer_of("--keep_last=1"))
    saver.save_state(5)
    keep(run, {}, 2)

    def fail(_: Path) -> None:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(utils, "remove_folder", fail)
    saver.save_epoch(6, utils.Stop())
    assert resnet50.epochs_in(run) == [0, 1, 2]
    assert "may stay: [Errno 116] Stale file handle" in capsys.readouterr().err


# --- averaged weights -----------------------------------------------------------------------


def variables(network: resnet50.ResNet50) -> list[np.ndarray]:
    return [variable.numpy() for variable in network.variables]


@pytest.mark.parametrize("replicas", [1, 2])
def test_ema_averages_weights_and_moving_averages_and_warms_up(replicas):
    import test_training

    decays = [0.1, 2 / 11, 0.2, 0.2]  # min(0.2, (1 + n) / (10 + n))
    trainer = trainer_of("--ema_decay=0.2")
    if replicas == 2:
        trainer = test_training.make_trainer(test_training.two_replicas(), ema_decay=0.2)
    expected = [value.astype(np.float64) for value in variables(trainer.network)]
    for step, decay in enumerate(decays):
        take_step(trainer, seed=step, rate=0.1)
        now = variables(trainer.network)
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, now, strict=True)]
    for found, value in zip(variables(trainer.averaged), expected, strict=True):
        np.testing.assert_allclose(found, value, atol=1e-6)
    assert not same(variables(trainer.averaged), variables(trainer.network))


def test_the_model_holds_the_averages_and_its_state_the_weights_exactly(run, tmp_path):
    trainer = trainer_of("--ema_decay=0.5")
    plain = trainer_of()
    for each in (trainer, plain):
        take_step(each, rate=0.1), take_step(each, seed=1, rate=0.1)
    save_epoch(run, trainer, 2)
    for step, place in ((2, "0"), (3, "state_1_1")):
        if step == 3:
            take_step(trainer, seed=2, rate=0.1), take_step(plain, seed=2, rate=0.1)
            saver_of(run, trainer).save_state(3)
            assert (run / place).is_dir()
        other = trainer_of("--resume", "--ema_decay=0.5")
        assert restore(run, other) == step
        assert same(variables(other.averaged), variables(trainer.averaged))
        assert same(everything(other), everything(trainer))
        assert same(everything(other), everything(plain))  # training itself does not change
    new = trainer_of(f"--init_from={run / '0'}")
    (tmp_path / "new").mkdir()
    restore(tmp_path / "new", new)
    network = tf.train.load_checkpoint(str(run / "0" / "variables" / "variables"))
    bias = network.get_tensor("network/dense_bias/.ATTRIBUTES/VARIABLE_VALUE")
    np.testing.assert_array_equal(new.network.dense_bias, bias)
    assert not np.array_equal(bias, trainer.network.dense_bias)


def test_averages_are_not_taken_for_the_weights_that_are_missing(run):
    save_epoch(run, trainer_of("--ema_decay=0.5"), 2)
    for file in (run / "0" / "training_state").glob("weights.*"):
        file.unlink()
    for flags in ([], ["--ema_decay=0.5"]):
        with pytest.raises(utils.UserError, match="its training state cannot be read"):
            restore(run, trainer_of("--resume", *flags))


def test_ema_may_be_switched_on_and_off_between_runs(run):
    trainer = trainer_of("--ema_decay=0.5")
    take_step(trainer), take_step(trainer)
    save_epoch(run, trainer, 2)
    off = trainer_of("--resume")
    restore(run, off)
    assert same(everything(off), everything(trainer))
    save_epoch(run, off, 4)
    on = trainer_of("--resume", "--ema_decay=0.5")
    restore(run, on)
    assert same(variables(on.averaged), variables(off.network))


# --- the step -------------------------------------------------------------------------------


def test_the_seed_decides_the_initial_weights():
    one, again, other = (everything(trainer_of(train__seed=seed)) for seed in (1, 1, 2))
    assert same(one, again) and not same(one, other)


@pytest.mark.parametrize("precision", ["float32", "mixed_float16"])
def test_a_batch_in_pieces_gives_the_update_of_the_whole(precision):
    results = []
    for pieces in (1, 4):
        trainer = trainer_of(f"--accumulation_steps={pieces}", f"--precision={precision}")
        normalise_with_averages(trainer)
        metrics = [take_step(trainer, rate=0.1) for _ in range(2)]
        results.append((everything(trainer), metrics))
    (whole, of_whole), (parts, of_parts) = results
    tolerance = 1e-6 if precision == "float32" else 2e-3
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance)
    for one, other in zip(of_whole, of_parts, strict=True):
        assert one == pytest.approx(other, rel=1e-2 if precision != "float32" else 1e-5)


def test_averages_of_a_batch_in_pieces_are_those_of_the_mean_statistics():
    trainer = trainer_of("--accumulation_steps=2")
    images, _ = batch()
    stem = trainer.network.stem
    halves = [
        stem.convolve(tf.constant(h, tf.float32), stem.kernel) for h in (images[:2], images[2:])
    ]
    means = [tf.reduce_mean(y, [0, 1, 2]).numpy() for y in halves]
    stds = [tf.sqrt(tf.math.reduce_variance(y, [0, 1, 2]) + 1e-5).numpy() for y in halves]
    take_step(trainer, rate=0.0)
    np.testing.assert_allclose(stem.norm.moving_mean, 0.9 * np.mean(means, axis=0), atol=1e-5)
    np.testing.assert_allclose(stem.norm.moving_std, 0.1 + 0.9 * np.mean(stds, axis=0), atol=1e-5)
    assert int(trainer.updates.numpy()) == 1  # one update, however many pieces


@pytest.mark.parametrize(
    ("flags", "gpus", "words"),
    [
        (["--accumulation_steps=3"], 0, "into 3 equal parts"),
        (["--gpu=0,1", "--accumulation_steps=4"], 2, "into 8 equal parts"),
    ],
)
def test_a_batch_that_cannot_be_split_is_refused_at_once(monkeypatch, flags, gpus, words):
    monkeypatch.setattr(utils, "choose_gpus", lambda wanted, required: wanted[:gpus])
    with pytest.raises(utils.UserError, match=f"--batch_size=4 cannot.*{words}"):
        train.open_devices(arguments(*flags))


def operations(trainer: train.Trainer) -> list[str]:
    """Types of all operations of the step, those of the functions that it calls included."""
    inputs = *trainer.to_device(*batch()), tf.constant(0.1), tf.constant(0.0)
    step = trainer._compiled_batch.get_concrete_function(*inputs)
    graph = step.graph.as_graph_def()
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    return [node.op for node in nodes]


def test_float16_decides_about_skipping_a_step_on_the_device():
    trainer = trainer_of("--precision=mixed_float16")
    kinds = operations(trainer)
    assert not {"If", "StatelessIf", "While", "StatelessWhile", "PyFunc"} & set(kinds)
    # Every weight and its momentum is selected, not branched to.
    assert kinds.count("SelectV2") >= 2 * len(trainer.network.trainable_variables)


def test_jit_compile_compiles_the_whole_step_on_one_device():
    trainer = trainer_of("--jit_compile")
    inputs = *trainer.to_device(*batch()), tf.constant(0.1), tf.constant(0.0)
    compiled = trainer._compiled_batch.experimental_get_compiler_ir(*inputs)(stage="hlo")
    step = trainer._compiled_batch.get_concrete_function(*inputs)
    assert step.function_def.attr["_XlaMustCompile"].b
    updated = len([v for v in step.graph.variables]) - 1
    # All variables, the update included, go into the one compiled program and come out of it.
    assert compiled.split("ENTRY")[1].count("parameter(") >= updated


@pytest.mark.parametrize(
    ("scale", "good", "next_scale", "next_good"),
    [(2.0**100, 7, 2.0**99, 0), (8.0, 1998, 8.0, 1999), (8.0, 1999, 16.0, 0)],
)
def test_the_loss_scale_halves_after_an_overflow_and_doubles_after_2000_good_steps(
    scale, good, next_scale, next_good
):
    trainer = trainer_of("--precision=mixed_float16")
    trainer.loss_scale.assign(scale)
    trainer.good_updates.assign(good)
    metrics = take_step(trainer)
    assert metrics["skipped_steps"] == (next_scale < scale)
    assert float(trainer.loss_scale.numpy()) == next_scale
    assert int(trainer.good_updates.numpy()) == next_good


def test_the_gradients_norm_does_not_depend_on_the_loss_scale():
    full, half = (take_step(trainer_of(f"--precision={p}")) for p in train.PRECISIONS[:2])
    assert full["gradient_norm"] == pytest.approx(half["gradient_norm"], rel=0.05)
    assert (full["loss_scale"], half["loss_scale"]) == (1, 2**15)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_fifty_updates_are_those_of_keras_bit_for_bit(momentum):
    """From the same gradients, which the changes of weight and momentum reveal."""
    import keras

    trainer = trainer_of(train__sgd_momentum=momentum)
    weights = trainer.network.trainable_variables[:6]
    theirs = [keras.Variable(weight.numpy()) for weight in weights]
    sgd = keras.optimizers.SGD(momentum=momentum)
    sgd.build(theirs)
    seen, piece = [], trainer._compiled_piece

    def spy(images: tf.Tensor, labels: tf.Tensor) -> tuple:
        result = piece(images, labels)
        seen.append(result[0][:6])
        return result

    trainer._compiled_piece = spy
    trainer._compiled_batch = trainer._batch  # step by step, so that gradients can be seen
    apply = tf.function(lambda gradients: sgd.apply(gradients, theirs))
    for step in range(50 if momentum else 5):
        take_step(trainer, seed=step, rate=0.01 / (1 + step))
        sgd.learning_rate = 0.01 / (1 + step)
        apply(seen.pop())
    for weight, their in zip(weights, theirs, strict=True):
        np.testing.assert_array_equal(weight.numpy(), np.array(their))


# --- devices and machines -------------------------------------------------------------------


def machines_of(monkeypatch, replicas: int, *values: dict) -> None:
    """`agree` on a machine with these first values, the others having the other ones."""
    monkeypatch.setattr(train, "worker_of_workers", lambda: (0, len(values)))
    rows = [[zlib.crc32(repr(value).encode()) for value in each.values()] for each in values]
    sums = tf.constant(rows, tf.int64) * replicas  # each replica adds its machine's row
    strategy = types.SimpleNamespace(
        run=lambda _: [sums] * replicas, experimental_local_results=lambda values: values
    )
    train.agree(strategy, values[0])


@pytest.mark.parametrize("replicas", [1, 2])
def test_machines_begin_with_the_same_of_everything(monkeypatch, replicas):
    ours = {"first step": 5, "weights": 77}
    machines_of(monkeypatch, replicas, ours, dict(ours), dict(ours))
    for name in ours:
        with pytest.raises(utils.UserError, match=f"worker 2 of TF_CONFIG has a different {name}"):
            machines_of(monkeypatch, replicas, ours, dict(ours), ours | {name: 6})


@pytest.mark.parametrize(
    ("flags", "settings", "spec", "word"),
    [
        ([], {}, {"seed": 7}, "seed"),
        ([], {}, {"N": 11}, "N"),
        ([], {}, {"classes": 9, "class_names": ["a"] * 9}, "classes"),
        ([], {}, {"batch_size": 8}, "batch_size"),
        (["--learning_rate=0.02"], {}, {}, "--learning_rate"),
        (["--accumulation_steps=2"], {}, {}, "--accumulation_steps"),
        (["--ema_decay=0.9"], {}, {}, "--ema_decay"),
        ([], {"train__sgd_momentum": 0.8}, {}, "[train] sgd_momentum"),
        ([], {"l2__l2_penalty": 0.1}, {}, "[l2] l2_penalty"),
        ([], {"batch_renorm__rmax_max": 2.0}, {}, "[batch_renorm] rmax_max"),
    ],
)
def test_machines_compare_pictures_flags_and_settings(flags, settings, spec, word):
    spec = dataclasses.replace(SPEC, worker=0, **spec)
    ours, theirs = settings_of(trainer_of()), settings_of(trainer_of(*flags, **settings), spec)
    assert [name for name in ours if repr(ours[name]) != repr(theirs[name])] == [word]


def test_the_checksum_changes_with_any_weight():
    trainer = trainer_of()
    before = trainer.checksum()
    assert trainer_of().checksum() == before
    trainer.network.norms[-1].moving_std[0].assign(2.0)
    assert trainer.checksum() != before


def told_by_main(monkeypatch, place: train.Place, *flags: str) -> list:
    """What `main` does with its parts, in order."""
    told, args = [], arguments(*flags)
    stand = types.SimpleNamespace(checksum=lambda: 77, to_device=None, config=None)
    run = types.SimpleNamespace(claim=lambda: place, folder="run")
    part = contextlib.nullcontext()
    part.time_taken, part.folder = lambda: "1 s", "buffer"
    replaced = {
        "parse_arguments": lambda: args, "open_devices": lambda _: None, "Run": lambda *_: run,
        "wait_for_buffer": lambda *_: SPEC, "Trainer": lambda *_: stand, "restore": lambda *_: None,
        "Saver": lambda *_: None, "Log": lambda *_: part, "announce": lambda *_: None,
        "BatchReader": lambda *_: part, "Display": lambda *_: part,
        "train": lambda *_: told.append("train") or 18,
        "end_preprocessing": lambda folder, spec, epoch_end: told.append((folder, epoch_end)),
        "agree": lambda _, values: told.append(values),
    }  # fmt: skip
    for name, value in replaced.items():
        monkeypatch.setattr(train, name, value)
    train.main()
    return told


def test_the_preprocessor_is_told_of_the_end_once_the_chief_has_saved(monkeypatch):
    """On the chief `train` returns after that; the others wait for it in `agree`."""
    told = told_by_main(monkeypatch, train.Place(1, 1, None))
    settings = told.pop(0)
    assert settings["seed"] == 0 and settings["class names"] == SPEC.class_names
    assert "resized" not in settings  # of which machines may have different ones
    first = {"first step": 3, "weights": 77}
    assert told == [first, "train", {"last step": 18}, ("buffer", 9)]


def test_a_finished_run_does_not_end_the_preprocessor_of_another(monkeypatch, capsys):
    told = told_by_main(monkeypatch, train.Place(9, 0, Path("8")), "--resume")
    assert told == []
    assert "already trained to the end of epoch 8" in capsys.readouterr().out


def test_two_replicas_are_announced(run, capsys):
    import test_training

    trainer = test_training.make_trainer(test_training.two_replicas())
    train.announce(train.Run(run, arguments()), trainer, SPEC, range(18))
    said = capsys.readouterr().out
    assert "2 replicas" in said and f"models go to {run}, where" in said


def test_random_batches_are_no_measure_of_several_machines(monkeypatch):
    monkeypatch.setattr(train, "worker_of_workers", lambda: (0, 2))
    with pytest.raises(utils.UserError, match="without TF_CONFIG"):
        arguments("--synthetic")


@pytest.mark.parametrize(
    ("flags", "there", "asked", "precision", "replicas"),
    [
        ([], [], ([0], False), "float32", None),
        ([], ["zero"], ([0], False), "mixed_float16", None),
        (["--gpu=1"], ["one"], ([1], True), "mixed_float16", None),
        (["--gpu=0,2"], ["zero", "two"], ([0, 2], True), "mixed_float16", ["GPU:0", "GPU:1"]),
        (["--gpu=0", "--precision=float32"], ["zero"], ([0], True), "float32", None),
    ],
)
def test_devices_are_those_asked_for(monkeypatch, flags, there, asked, precision, replicas):
    told = []
    choose = lambda wanted, required: told.append((wanted, required)) or there  # noqa: E731
    monkeypatch.setattr(utils, "choose_gpus", choose)
    monkeypatch.setattr(tf.distribute, "MirroredStrategy", lambda devices: devices)
    args = arguments(*flags)
    args.precision = args.precision if "--precision=float32" in flags else None
    strategy = train.open_devices(args)
    assert told == [asked] and args.precision == precision
    assert strategy == (replicas or tf.distribute.get_strategy())


def test_deterministic_is_tensorflows_own(monkeypatch):
    told = []
    monkeypatch.setattr(
        tf.config.experimental, "enable_op_determinism", lambda: told.append("deterministic")
    )
    train.open_devices(arguments())
    assert told == []
    train.open_devices(arguments("--deterministic"))
    assert told == ["deterministic"]


def test_failures_of_the_device_and_of_other_machines_are_explained(monkeypatch):
    def fail(error: type) -> None:
        def main() -> None:
            raise error(None, None, "gone")

        monkeypatch.setattr(train, "main", main)
        train.explained_main()

    for error, workers, words in (
        (tf.errors.ResourceExhaustedError, 1, "--accumulation_steps"),
        (tf.errors.UnavailableError, 2, "another machine"),
    ):
        monkeypatch.setattr(train, "worker_of_workers", lambda workers=workers: (0, workers))
        with pytest.raises(utils.UserError, match=words) as raised:
            fail(error)
        assert raised.value.status == (1 if workers == 2 else 2)
    monkeypatch.setattr(train, "worker_of_workers", lambda: (0, 1))
    with pytest.raises(tf.errors.UnavailableError):
        fail(tf.errors.UnavailableError)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lr_drop_epochs=3"], "need each other"),
        (["--lr_schedule=step"], "need each other"),
        (["--warmup_epochs=9"], "must be less than --epoch_end=9"),
        (["--label_smoothing=2"], "label_smoothing"),
        (["--lr_schedule=step", "--lr_drop_epochs=5,3"], "increasing"),
        (["--gpu=0,0"], "increasing"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, words):
    with pytest.raises(utils.UserError, match=words):
        arguments(*flags)


def test_a_rate_that_never_drops_is_warned_of(capsys):
    arguments("--lr_schedule=step", "--lr_drop_epochs=3,8")
    assert capsys.readouterr().err == ""
    arguments("--lr_schedule=step", "--lr_drop_epochs=3,9")
    assert "ends before epoch 9 (--epoch_end=9), so the rate does not" in capsys.readouterr().err


def test_the_chosen_gpus_alone_are_seen_and_their_memory_is_taken_as_needed(monkeypatch):
    told = []
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda _: ["zero", "one", "two"])
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda gpus, _: told.append(gpus))
    monkeypatch.setattr(
        tf.config.experimental, "set_memory_growth", lambda gpu, grows: told.append((gpu, grows))
    )
    assert utils.choose_gpus([1, 2], required=True) == ["one", "two"]
    assert told == [["one", "two"], ("one", True), ("two", True)]
    with pytest.raises(utils.UserError, match="--gpu=3: TensorFlow finds 3 GPUs"):
        utils.choose_gpus([3], required=True)
    told.clear()
    assert utils.choose_gpus([3], required=False) == []
    assert told == [[]]  # none, so that the memory of the others stays free


# --- the log --------------------------------------------------------------------------------


def values_of(step: int, loss: float = 1.0, skipped: bool = False) -> tf.Tensor:
    """What a step returns: METRICS."""
    return tf.constant([loss, loss / 2, 0.25, step, 1.0, 0.0, 8.0, skipped, 0.0], tf.float32)


def finished(step: int, at: float, idle: float = 0.0, first: bool = False, **metrics: float):
    values = dict(zip(train.METRICS, values_of(step).numpy().tolist(), strict=True)) | metrics
    previous = None if first else at - 1
    return train.Finished(step, 0.5, values, at - 1, idle, previous, at)


def display_of(folder: Path, steps: range, *flags: str, spec: BatchSpec = SPEC) -> train.Display:
    reader = types.SimpleNamespace(folder=folder / "buffer")
    return train.Display(train.Run(folder, arguments(*flags)), spec, steps, reader)


def under_way_of(folder: Path, steps: range, *flags: str, spec: BatchSpec = SPEC) -> train.UnderWay:
    display = display_of(folder, steps, *flags, spec=spec)
    return train.UnderWay(train.Log(display.run, spec, steps.start, display))


def logged(folder: Path, steps: range, upto: int, *flags: str, spec=SPEC) -> list[dict]:
    with under_way_of(folder, steps, "--log_seconds=0", *flags, spec=spec) as under_way:
        for step in range(steps.start, upto):
            with under_way.waiting():
                pass
            under_way.add(step, 0.5, values_of(step))
        under_way.settle()
    for file in folder.glob("events/*/*"):  # the name tells the second; a start takes longer
        if not file.name.endswith("earlier"):
            count = len(list(file.parent.iterdir()))
            file.rename(file.with_name(f"events.out.tfevents.{count}.earlier"))
    return rows_of(folder)


def rows_of(folder: Path) -> list[dict]:
    return utils.read_csv(folder / "training_log.csv", resnet50.LOG_COLUMNS)


def test_steps_trained_again_are_in_the_log_and_among_the_events_once(run):
    logged(run, range(0, 18), 7)
    (events,) = (run / "events" / "training_2_steps_per_epoch").iterdir()
    assert "tfevents" in events.name  # or TensorBoard does not find it
    rows = logged(run, range(4, 18), 9)
    assert [row["step"] for row in rows] == list(range(9))
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
    seen = toolkit.scalars(events.parent)  # fails where one appears twice
    assert {step for _, step in seen} == set(range(9))
    for row in rows:
        for name in row.keys() - {"step", "epoch", "batch", "seconds", "steps"}:
            assert seen[f"training/{name}", row["step"]] == pytest.approx(row[name], rel=1e-4)
    text = (run / "training_log.csv").read_bytes()
    assert b"\r" not in text and text.endswith(b"\n")


def test_another_batch_size_costs_no_row_and_no_event(run):
    """Steps of the old rows are counted in batches of another size."""
    logged(run, range(0, 18), 6)  # two batches an epoch
    one = dataclasses.replace(SPEC, batch_size=8, batches_per_epoch=1)
    logged(run, range(3, 9), 5, spec=one)
    logged(run, range(4, 9), 6, spec=one)  # resumed
    rows = logged(run, range(12, 18), 13)  # and back
    assert [(row["epoch"], row["batch"]) for row in rows] == [
        *((epoch, batch) for epoch in range(3) for batch in range(2)),
        *[(3, 0), (4, 0), (5, 0), (6, 0)],
    ]
    events = run / "events"
    seen = {f.name: {step for _, step in toolkit.scalars(f)} for f in events.iterdir()}
    assert seen == {
        "training_2_steps_per_epoch": {0, 1, 2, 3, 4, 5, 12},
        "training_1_steps_per_epoch": {3, 4, 5},
    }


def test_a_row_averages_its_steps(run):
    with under_way_of(run, range(0, 18)) as under_way:
        for step, loss in enumerate([1.0, 3.0, 8.0]):
            under_way.add(step, 0.5, values_of(step, loss, skipped=step == 1))
        under_way.settle()
    (row,) = rows_of(run)
    assert row["loss"] == 4 and row["loss_without_l2"] == 2
    assert (row["steps"], row["step"], row["epoch"], row["batch"]) == (3, 2, 1, 0)
    assert row["gradient_norm"] == 1 and row["loss_scale"] == 8
    assert row["skipped_steps"] == 1


def test_speed_and_waiting_of_a_row_leave_out_the_first_step_which_builds_the_graph():
    first = finished(4, 1000.0, idle=900.0, first=True)
    later = [finished(5, 1001.0, idle=0.25), finished(6, 1002.0, idle=0.25)]
    for steps in ([first, *later], later):
        row = train.summary(steps, SPEC)
        assert row["images_per_second"] == 4 and row["waiting_for_data"] == 0.25
    assert train.summary([first], SPEC)["images_per_second"] == 4  # a row has only one step
    held_up = train.summary(later, SPEC, waiting=3.0)  # since then
    assert held_up["images_per_second"] == 8 / 5 and held_up["waiting_for_data"] == 3.5 / 5


def test_a_loss_that_is_no_number_stops_training(run):
    with under_way_of(run, range(0, 18)) as under_way:
        under_way.add(0, 0.5, values_of(0))
        under_way.add(1, 0.5, values_of(1, math.nan))
        with pytest.raises(utils.UserError, match="epoch 0, batch 1: the loss is nan"):
            under_way.settle()
    assert [row["step"] for row in rows_of(run)] == [0], "what led to it is in the log"


def test_a_loss_that_grows_beyond_all_bounds_can_be_read_back(run):
    with under_way_of(run, range(0, 18)) as under_way:
        under_way.add(0, 0.5, values_of(0, 3e38))
        under_way.settle()
    with under_way_of(run, range(1, 18)):
        assert len(rows_of(run)) == 1


def test_only_time_without_a_step_under_way_counts_as_waiting(run, monkeypatch):
    """On a GPU a step goes on while the next batch is waited for."""
    for asked, given, idle in ((90, 95, 0), (90, 103, 3), (102, 103, 1)):
        with under_way_of(run, range(0, 18)) as under_way:
            times = iter([80.0, 81.0, asked, given])
            monkeypatch.setattr(train.time, "perf_counter", lambda times=times: next(times))
            done = iter([100.0, 110.0])
            submit = lambda _, done=done: of_a_step(next(done))  # noqa: E731
            monkeypatch.setattr(under_way._thread, "submit", submit)
            for step in range(2):
                with under_way.waiting():
                    pass
                under_way.add(step, 0.5, values_of(step))
            under_way._finish(leave=0)
        first, second = under_way.log.display.recent
        assert (first.previous, first.idle, first.at) == (None, 1, 100)
        assert (second.previous, second.idle, second.at) == (100, idle, 110)


def of_a_step(at: float) -> Future:
    """A step that the device finished at this time."""
    future = Future()
    future.set_result((values_of(0).numpy().tolist(), at))
    return future


def test_a_step_is_waited_for_when_the_next_has_been_sent(run):
    with under_way_of(run, range(0, 18)) as under_way:
        for step in range(3):
            under_way.add(step, 0.5, values_of(step))
            assert [each.step for each in under_way.log.display.recent] == list(range(step))


@pytest.mark.parametrize("error", FULL_DISK)
@pytest.mark.parametrize("part", ["_append", "_events"])
def test_a_full_disk_behind_the_log_does_not_end_training(run, part, error, capsys):
    def full(*_: object) -> None:
        raise error

    with under_way_of(run, range(0, 18)) as under_way:
        setattr(under_way.log, part, full if part == "_append" else types.SimpleNamespace(add=full))
        under_way.add(0, 0.5, values_of(0))
        under_way.settle()
    assert "the log could not be written: " in capsys.readouterr().err


def test_a_log_that_is_replaced_or_removed_loses_no_later_row(run):
    """An editor saves under another name and renames it."""
    path = run / "training_log.csv"
    with under_way_of(run, range(0, 18), "--log_seconds=0") as under_way:
        for step in range(3):
            under_way.add(step, 0.5, values_of(step))
            under_way.settle()
            if step == 0:
                (run / "copy").write_bytes(path.read_bytes())
                (run / "copy").rename(path)
            if step == 1:
                assert [int(row["step"]) for row in rows_of(run)] == [0, 1]
                path.unlink()
    assert [int(row["step"]) for row in rows_of(run)] == [2]


def test_a_path_that_tensorflow_cannot_read_from_is_refused(tmp_path):
    """It would take the brackets for a pattern, and find no state."""
    (tmp_path / "runs [old]").mkdir()
    with pytest.raises(utils.UserError, match=r"runs \[old\].*cannot read"):
        claim(tmp_path / "runs [old]" / "a")
    assert os.listdir(tmp_path / "runs [old]") == []
    with pytest.raises(utils.UserError, match=r"models \[old\]/0: TensorFlow cannot read"):
        claim(tmp_path / "new", f"--init_from={tmp_path / 'models [old]' / '0'}")


@pytest.mark.parametrize("cut", [2, 3, 20])  # within the last cell, after the last comma
def test_a_cut_off_row_is_dropped(run, cut):
    logged(run, range(0, 18), 3)
    path = run / "training_log.csv"
    row = ",".join(["3", "1", "1", *["1"] * 12, "12"]) + "\n"
    path.write_bytes((path.read_bytes() + row.encode())[:-cut])
    assert [row["step"] for row in logged(run, range(4, 18), 5)] == [0, 1, 2, 4]


def test_a_row_that_the_disk_has_no_room_for_is_not_begun(run, monkeypatch, capsys):
    class Full(io.FileIO):
        def write(self, data: bytes) -> int:
            return super().write(data[:9])

    with under_way_of(run, range(0, 18), "--log_seconds=0") as under_way:
        for step in range(3):
            with monkeypatch.context() as patch:
                if step == 1:
                    full = lambda path, mode, **_: Full(path, mode)  # noqa: E731
                    patch.setattr(train, "open", full, raising=False)
                under_way.add(step, 0.5, values_of(step))
                under_way.settle()
    assert [row["step"] for row in rows_of(run)] == [0, 2]
    assert "the log could not be written: [Errno 28] No space left" in capsys.readouterr().err


def test_a_state_is_saved_after_the_rows_of_its_steps(run):
    """So that a kill between the two costs no row."""
    with under_way_of(run, range(0, 18)) as under_way:
        under_way.add(0, 0.5, values_of(0))
        under_way.settle()
        assert len(rows_of(run)) == 1


@pytest.mark.parametrize("text", ["step,thoughts\n1,mine\n", "cell"])
def test_a_table_of_somebody_else_is_not_written_over(run, text):
    path = run / "training_log.csv"
    if text == "cell":
        logged(run, range(0, 18), 2)
        text = path.read_text().replace("0.25", "mine")
    path.write_text(text)
    with pytest.raises(utils.UserError, match="training_log.csv: line .*move the file away"):
        logged(run, range(0, 18), 1)
    assert path.read_text() == text


# --- what is printed ------------------------------------------------------------------------


def test_a_row_is_printed_as_a_line(run, capsys):
    rows = logged(run, range(0, 18), 3)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(rows) == 3
    assert lines[0].startswith("epoch 0, 1 of 2 batches: loss 0.500, top-1 25.0%, ")
    assert ", ? left, waiting " in lines[0]
    assert lines[0].endswith("%, loss with L2 1.000, rate 0.5")
    assert re.search(r"images/s, \d s left, ", lines[2])


class Terminal:
    """Standard output that is a terminal of some width."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.patch = monkeypatch

    def set_width(self, columns: int) -> None:
        self.patch.setattr(sys.stdout, "isatty", lambda: True)
        self.patch.setenv("COLUMNS", str(columns))


@pytest.fixture
def terminal(monkeypatch, capsys):
    return Terminal(monkeypatch)


LONG = dataclasses.replace(SPEC, N=4000, batches_per_epoch=1000)


def busy_display(run: Path) -> train.Display:
    """In epoch 3, after the first step: four images a second, a quarter of the time waiting."""
    display = display_of(run, range(3000, 9000), spec=LONG)
    (run / "buffer").mkdir()
    for step in (3299, 3301, 3302, 3400):  # three of them are ready ahead, one was used
        for path in LONG.files(run / "buffer", step):
            path.touch()
    display.recent.append(finished(3299, 500.0, idle=400.0, first=True))
    display.recent.append(finished(3300, 501.0, idle=0.25))
    return display


def test_the_line_on_a_terminal_says_all_that_fits_its_width(run, terminal):
    display = busy_display(run)
    terminal.set_width(140)
    fake_model(run / "1", "one")
    write_accuracies(run, [(1, 0.625, 0.5, "one")])
    display._best = display._best_accuracy()
    for columns in range(60, 160, 10):
        terminal.set_width(columns)
        assert len(display.status()) < columns
    terminal.set_width(140)
    assert display.status() == (
        "epoch 3 ██░░░░░░ loss 0.500 top-1 25.0% 4.0 images/s 1 h 34 min left "
        "waiting 25.0% best 62.5% 3 ready"
    )
    terminal.set_width(80)
    assert display.status().startswith("epoch 3 ██░░░ ")
    assert display.status().endswith(" left waiting 25.0%")


def test_a_wait_shows_while_it_lasts(run, terminal):
    display = busy_display(run)
    terminal.set_width(140)
    display.waiting_since = time.perf_counter() - 9
    assert " 0.4 images/s" in display.status() and "waiting 92." in display.status()


def test_before_the_first_step_the_line_says_what_is_waited_for(run, terminal):
    display = display_of(run, range(0, 18))
    terminal.set_width(80)
    assert "the first step takes longest" in display.status()
    display.waiting_since = 1.0
    assert "waiting for a batch" in display.status()


def test_a_terminal_gets_the_last_row_of_each_epoch(run, terminal, capsys):
    """It is of the latest steps, not only of those since the row before."""
    terminal.set_width(80)
    display = display_of(run, range(0, 18))
    for step, loss in enumerate([9.0, 1.0, 3.0]):  # two a epoch
        display.recent.append(finished(step, 1.0 + step, loss_without_l2=loss, first=step == 0))
        display.print_row(train.summary([display.recent[-1]], SPEC))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("end of epoch 0: loss 5.000 top-1 25.0% ") and len(line) < 80


def test_the_line_is_redrawn_on_a_terminal_only(run, terminal, monkeypatch):
    shown = []
    monkeypatch.setattr(utils, "show_status", shown.append)
    monkeypatch.setattr(threading.Event, "wait", lambda *_: len(shown) >= 3)
    for is_terminal in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda is_terminal=is_terminal: is_terminal)
        before = threading.active_count()
        with display_of(run, range(0, 18)):
            while threading.active_count() > before:
                time.sleep(0.01)
        assert len(shown) == 3 * is_terminal


# --- what is announced ----------------------------------------------------------------------


@pytest.mark.parametrize(("start", "reach"), [(100, 200), (utils.Epochs(2), utils.Epochs(4))])
def test_the_epochs_in_which_the_limits_are_relaxed_are_announced(start, reach, capsys):
    limits = relaxed(start, reach)
    train.announce_limits(limits, range(150, 450), per_epoch=50)
    said = capsys.readouterr()
    assert "r_max to 3 in epochs 2.0 to 4.0, d_max to 5 in epochs 2.0 to 4.0" in said.out
    train.announce_limits(limits, range(201, 450), per_epoch=50)
    both = "r_max to 3 (already relaxed), d_max to 5 (already relaxed)"
    assert both in capsys.readouterr().out and said.err == ""


def test_limits_that_are_never_relaxed_are_warned_of(capsys):
    train.announce_limits(relaxed(450, 500), range(450), per_epoch=50)
    said = capsys.readouterr()
    assert "plain batch normalization" in said.err and said.out == ""


def relaxed(start: object, reach: object) -> types.SimpleNamespace:
    """The limits of a training of 50 batches an epoch, in updates."""
    return trainer_of(
        spec=dataclasses.replace(SPEC, N=200, batches_per_epoch=50),
        batch_renorm__start_relaxing_rmax=start, batch_renorm__reach_rmax_max=reach,
        batch_renorm__start_relaxing_dmax=start, batch_renorm__reach_dmax_max=reach,
    ).renorm  # fmt: skip


def test_limits_in_the_wrong_order_are_one_line():
    with pytest.raises(utils.UserError, match="config.txt: .*reach_rmax_max"):
        trainer_of(
            batch_renorm__start_relaxing_rmax=9, batch_renorm__reach_rmax_max=utils.Epochs(2)
        )


def test_models_and_states_remember_how_they_were_trained(run):
    save_epoch(run, trainer_of("--label_smoothing=0.1"), 4)
    state = json.loads((run / "1" / "training_state" / "state.json").read_text())
    assert (state["step"], state["epoch"], state["batch"]) == (4, 2, 0)
    assert state["settings"]["--label_smoothing"] == 0.1 and state["settings"]["mu"] == SPEC.mu
    recipe = resnet50.model_recipe(run / "1")
    assert (recipe.step, recipe.mu) == (4, SPEC.mu)
    assert recipe.flags["epoch_end"] == state["settings"]["--epoch_end"] == 9
    assert (recipe.flags["learning_rate"], recipe.flags["label_smoothing"]) == (0.01, 0.1)


@pytest.mark.parametrize(("flags", "most"), [([], 2.2), (["--ema_decay=0.9"], 4.3)])
def test_weights_are_written_once_per_model(run, flags, most):
    """The momentum is as large as the weights; nothing else is large. Averages are there twice."""
    trainer = trainer_of(*flags)
    save_epoch(run, trainer, 2)
    weights = sum(4 * v.shape.num_elements() for v in trainer.network.variables)
    size = sum(path.stat().st_size for path in Path(run / "0").rglob("*") if path.is_file())
    assert size < most * weights + 1e6
