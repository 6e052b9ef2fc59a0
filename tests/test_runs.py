"""What a run keeps, refuses, continues from and says, in this process and with a small network.

The whole commands are in test_training.py.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import time
import types
import zlib
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


def trainer_of(*flags: str, classes: int = 8, **settings: object) -> train.Trainer:
    """`settings` are section__key=value of config.txt."""
    config = utils.load_config(toolkit.ROOT / "config.txt")
    for name, value in settings.items():
        section, key = name.split("__")
        setattr(getattr(config, section), key, value)
    return train.Trainer(tf.distribute.get_strategy(), config, classes, arguments(*flags))


def saver_of(run: train.Run, trainer: train.Trainer, spec: BatchSpec = SPEC) -> train.Saver:
    return train.Saver(run, trainer, spec, trainer.args)


@pytest.fixture
def run(tmp_path) -> train.Run:
    (tmp_path / "run").mkdir()
    return train.Run(tmp_path / "run", chief=True)


def batch(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Four pictures of 64x64: the network takes any size."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(4, 64, 64, 3)).astype(np.float16), np.arange(4, dtype=np.int32)


def take_step(trainer: train.Trainer, seed: int = 0, rate: float = 0.01) -> dict[str, float]:
    values = trainer.step(*trainer.put(*batch(seed)), rate)
    return dict(zip(train.METRICS, values.numpy().tolist(), strict=True))


def everything(trainer: train.Trainer) -> list[np.ndarray]:
    """Weights, averages, momentum and counters."""
    counters = [trainer.updates, trainer.loss_scale, trainer.good_updates]
    return [v.numpy() for v in (*trainer.network.variables, *trainer.momentum, *counters)]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


# --- starting and continuing ----------------------------------------------------------------


def test_a_run_that_does_not_exist_cannot_be_resumed_and_those_that_do_are_named(tmp_path):
    for name in ("mine", "other"):
        (tmp_path / name).mkdir()
    with pytest.raises(utils.UserError, match="mien: no such run.*mine, other"):
        train.Run(tmp_path / "mien", chief=True).claim(arguments("--resume"))
    assert not (tmp_path / "mien").exists()


def test_a_state_within_an_epoch_is_never_removed_by_a_start_without_resume(run):
    for name in ("0", "1", "2", "state_3_1"):
        (run.folder / name).mkdir()
    with pytest.raises(utils.UserError, match="state_3_1.*--resume.*epoch 3 again"):
        run.claim(arguments("--epoch_start=3"))
    assert (run.folder / "state_3_1").is_dir()
    shutil.rmtree(run.folder / "state_3_1")
    run.claim(arguments("--epoch_start=3"))


def test_models_are_neither_overwritten_nor_skipped(run):
    for name in ("0", "1"):
        (run.folder / name).mkdir()
    for start, words in (
        (0, "0 already exists.*overwritten"),
        (1, "1 already exists"),
        (3, "2, which does not exist"),
    ):
        with pytest.raises(utils.UserError, match=words):
            run.claim(arguments(f"--epoch_start={start}"))
    run.claim(arguments("--epoch_start=2"))


def test_a_run_has_one_trainer_at_a_time(run):
    run.claim(arguments())
    with pytest.raises(utils.UserError, match="another train.py"):
        train.Run(run.folder, chief=True).claim(arguments())


def test_a_refused_start_leaves_no_folder_of_its_own(tmp_path):
    run = train.Run(tmp_path / "new", chief=True)
    run.claim(arguments())
    run._remove_if_empty()
    assert not run.folder.exists()
    run.claim(arguments())
    (run.folder / "0").mkdir()
    run._remove_if_empty()
    assert run.folder.exists()


def test_continuing_restores_weights_averages_momentum_and_counters(run):
    trainer = trainer_of()
    take_step(trainer)
    saver_of(run, trainer).save_epoch(2, train.Stop())
    take_step(trainer, seed=1)
    saver_of(run, trainer).save_rolling(3)
    for flags, step in ((["--epoch_start=1"], 2), (["--resume"], 3)):
        other = trainer_of(*flags)
        assert train.restore(run, other, SPEC, other.args) == step
        if step == 3:
            assert same(everything(other), everything(trainer))
        assert float(other.updates.numpy()) == step - 1
    metrics = [take_step(each, seed=2) for each in (trainer, other)]
    assert metrics[0] == metrics[1]
    assert same(everything(other), everything(trainer))


@pytest.mark.parametrize(
    ("before", "after"),
    [("mixed_float16", "float32"), ("float32", "mixed_float16"), ("mixed_bfloat16", "float32")],
)
def test_any_precision_continues_from_any_other(run, before, after, capsys):
    trainer = trainer_of(f"--precision={before}")
    take_step(trainer)
    saver_of(run, trainer).save_epoch(2, train.Stop())
    other = trainer_of("--resume", f"--precision={after}")
    assert train.restore(run, other, SPEC, other.args) == 2
    assert same(everything(other), everything(trainer))
    assert f"--precision is now {after}" in capsys.readouterr().out
    assert math.isfinite(take_step(other)["loss"])


def test_other_flags_of_the_schedule_are_said(run, capsys):
    trainer = trainer_of("--lr_schedule=cosine", "--warmup_epochs=2")
    saver_of(run, trainer).save_epoch(2, train.Stop())
    other = trainer_of("--resume", "--learning_rate=0.5")
    train.restore(run, other, SPEC, other.args)
    said = capsys.readouterr().out
    assert "--lr_schedule is now constant; the state was trained with cosine" in said
    assert "--warmup_epochs is now 0.0" in said and "--learning_rate is now 0.5" in said
    again = trainer_of("--resume", "--lr_schedule=cosine", "--warmup_epochs=2")
    train.restore(run, again, SPEC, again.args)
    assert "is now" not in capsys.readouterr().out


@pytest.mark.parametrize("key", ["mu", "sigma", "seed", "batch_size", "pictures", "N", "workers"])
def test_a_state_within_an_epoch_fits_only_the_same_batches(run, key):
    saver_of(run, trainer_of()).save_rolling(3)
    value = {"mu": [0.1] * 3, "sigma": [0.1] * 3, "pictures": "other"}.get(key, 7)
    other = trainer_of("--resume")
    with pytest.raises(utils.UserError, match=f"{key} = "):
        train.restore(run, other, dataclasses.replace(SPEC, **{key: value}), other.args)


def test_a_model_without_its_training_state_is_named_with_the_way_out(run):
    saver_of(run, trainer_of()).save_epoch(2, train.Stop())
    shutil.rmtree(run.folder / "0" / "training_state")
    for flags in (["--resume"], ["--epoch_start=1"]):
        other = trainer_of(*flags)
        with pytest.raises(utils.UserError, match="training_state is missing.*--init_from"):
            train.restore(run, other, SPEC, other.args)
    assert (run.folder / "0").is_dir()
    assert run.is_trained_to(1) and not run.is_trained_to(2)


def test_a_model_that_is_removed_while_the_buffer_is_waited_for_is_not_passed_over(run):
    other = trainer_of("--epoch_start=1")
    with pytest.raises(utils.UserError, match="training_state is missing"):
        train.restore(run, other, SPEC, other.args)


def test_other_classes_are_warned_of_when_training_continues(run, capsys):
    saver_of(run, trainer_of()).save_epoch(2, train.Stop())
    other = trainer_of("--epoch_start=1")
    for name, warned in (("class 0", False), ("cat", True)):
        spec = dataclasses.replace(SPEC, class_names=[name, *SPEC.class_names[1:]])
        train.restore(run, other, spec, other.args)
        assert ("its class 0 is class 0, but cat" in capsys.readouterr().err) == warned


def test_a_passing_error_of_the_storage_does_not_hide_the_epochs(run, monkeypatch):
    (run.folder / "3").mkdir()
    failures, listdir = [5, 116], os.listdir

    def fails_twice(folder: Path) -> list[str]:
        if failures:
            raise OSError(failures.pop(), "the storage fails")
        return listdir(folder)

    monkeypatch.setattr(utils, "PAUSES", (0, 0))
    monkeypatch.setattr(os, "listdir", fails_twice)
    assert run.epochs() == [3] and not failures
    assert train.Run(run.folder / "none", chief=True).epochs() == []


def test_storage_that_fails_does_not_pass_for_a_broken_state(run, monkeypatch):
    assert saver_of(run, trainer_of()).save_rolling(1)
    chief = train.Run(run.folder, chief=False)
    assert not saver_of(chief, trainer_of()).save_rolling(3)  # another machine writes nothing
    other, read = trainer_of("--resume"), utils.read_file

    def fail(path: Path) -> bytes:
        if path.name.startswith("weights.data"):
            raise utils.UserError("its storage failed 5 times")
        return read(path)

    monkeypatch.setattr(utils, "read_file", fail)
    with pytest.raises(utils.UserError, match="its storage failed 5 times, or move .*state_0_1"):
        train.restore(run, other, SPEC, other.args)
    assert os.listdir(run.folder) == ["state_0_1"]


def test_momentum_may_be_switched_on_and_off_between_runs(run):
    for epoch, (before, after) in enumerate([(0.0, 0.9), (0.9, 0.0)]):
        saver_of(run, trainer_of(train__sgd_momentum=before)).save_epoch(
            2 * epoch + 2, train.Stop()
        )
        other = trainer_of("--resume", train__sgd_momentum=after)
        assert train.restore(run, other, SPEC, other.args) == 2 * epoch + 2


# --- the loop -------------------------------------------------------------------------------


class Parts:
    """Stands in for trainer, reader, saver and log of the loop. Notes what each of them is told."""

    room = True
    """Whether there is room for a state."""

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

    def step(self, batch: int, rate: float, _stop: object) -> int:
        self.told.append(("batch", batch, round(rate, 9)))
        return batch

    def add(self, step: int, rate: float, values: int) -> None:
        self.told.append(("step", step, round(rate, 9), values))
        self.at = step + 1

    def settle(self) -> None:
        self.told.append("settle")

    def say(self) -> None:
        self.told.append("say")

    def is_due(self) -> bool:
        return self.at == self.due

    def save_epoch(self, step: int, _stop: object) -> None:
        self.told.append(("epoch", step))

    def save_rolling(self, step: int) -> bool:
        self.told.append(("state", step))
        return self.room


def test_the_loop_trains_on_each_batch_once_and_saves_what_is_known_to_be_good():
    parts = Parts(range(3, 6), 3, due=5)
    assert train.train(parts, parts, parts, parts, train.Stop())
    assert parts.told == [
        *[("batch", 2, 0.4), ("step", 3, 0.4, 2), "settle", ("epoch", 4), "say"],
        *[("batch", 1, 0.5), ("step", 4, 0.5, 1), "settle", ("state", 5), "say"],
        *[("batch", 0, 0.6), ("step", 5, 0.6, 0), "settle", ("epoch", 6), "say"],
    ]


@pytest.mark.parametrize("room", [True, False])
def test_the_loop_saves_a_stopped_training_before_it_says_so(room, monkeypatch):
    parts = Parts(range(4, 18), 1)
    parts.room = room
    monkeypatch.setattr("builtins.print", lambda line: parts.told.append(line))
    assert not train.train(parts, parts, parts, parts, train.Stop())
    *told, said = parts.told
    steps = [("batch", 0, 0.5), ("step", 4, 0.5, 0)]
    assert told == [*steps, "settle", ("state", 5), "say"]
    assert "before epoch 2, batch 1" in said
    assert said.endswith("continues there" if room else "from the last state that was saved")


@pytest.mark.parametrize("trouble", [utils.UserError("another buffer"), OSError(5, "EIO")])
def test_trouble_with_the_buffer_costs_no_step(trouble):
    parts = Parts(range(4, 18), 1)
    parts.trouble = trouble
    with pytest.raises(type(trouble)):
        train.train(parts, parts, parts, parts, train.Stop())
    assert parts.told == [("batch", 0, 0.5), ("step", 4, 0.5, 0), "settle", ("state", 5)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_an_event_and_a_second_one_ends_training(number):
    before = signal.signal(number, signal.SIG_DFL)  # a test under nohup ignores SIGHUP
    try:
        with train.stop_on_signals() as stop:
            assert callable(signal.getsignal(number))
            os.kill(os.getpid(), number)
            assert stop.wait(10) and stop.number == number
            assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_under_nohup_a_logout_does_not_stop_training():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with train.stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.wait(0.2)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_that_begins_from_a_model_takes_its_weights_and_starts_afresh(run, tmp_path, capsys):
    trainer = trainer_of()
    take_step(trainer)
    saver_of(run, trainer).save_epoch(2, train.Stop())
    flag = f"--init_from={run.folder / '0'}"
    new_run = train.Run(tmp_path / "new", chief=True)
    same_classes = trainer_of(flag)
    assert train.restore(new_run, same_classes, SPEC, same_classes.args) == 0
    assert same(
        [v.numpy() for v in same_classes.network.variables],
        [v.numpy() for v in trainer.network.variables],
    )
    assert int(same_classes.updates.numpy()) == 0
    assert not any(slot.numpy().any() for slot in same_classes.momentum)
    started_again = trainer_of(flag, "--resume")  # killed before its first state
    assert train.restore(new_run, started_again, SPEC, started_again.args) == 0
    assert same(
        [v.numpy() for v in started_again.network.variables],
        [v.numpy() for v in trainer.network.variables],
    )
    capsys.readouterr()
    others = trainer_of(flag, classes=3)
    spec = dataclasses.replace(SPEC, classes=3, class_names=["a", "b", "c"])
    assert train.restore(new_run, others, spec, others.args) == 0
    assert "the dense layer is new: 3 classes" in capsys.readouterr().out
    np.testing.assert_array_equal(others.network.stem.kernel, trainer.network.stem.kernel)
    np.testing.assert_array_equal(
        others.network.stem.norm.moving_std, trainer.network.stem.norm.moving_std
    )
    assert others.network.dense_kernel.shape == (512, 3)


# --- saving ---------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["weights", "momentum"])
def test_weights_that_are_not_finite_are_not_saved(run, part):
    trainer = trainer_of()
    broken = trainer.network.dense_bias if part == "weights" else trainer.momentum[-1]
    broken.assign(tf.fill(broken.shape, float("nan")))
    saver = saver_of(run, trainer)
    for save in (lambda: saver.save_epoch(2, train.Stop()), lambda: saver.save_rolling(3)):
        with pytest.raises(utils.UserError, match="no longer finite.*smaller --learning_rate"):
            save()
    assert os.listdir(run.folder) == []


FULL_DISK = [
    OSError(28, "No space left on device"),
    tf.errors.ResourceExhaustedError(None, None, "No space left on device"),
]
"""As Python and as TensorFlow say it."""


@pytest.mark.parametrize("error", FULL_DISK)
def test_a_full_disk_while_a_state_is_saved_leaves_the_last_one(run, monkeypatch, capsys, error):
    trainer = trainer_of()
    saver = saver_of(run, trainer)
    saver.save_rolling(1)

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(saver, "_write_state", full)
    assert not saver.save_rolling(3)
    assert os.listdir(run.folder) == ["state_0_1"]
    assert "state_1_1: not saved: " in capsys.readouterr().err


def test_states_are_removed_once_something_newer_is_saved(run):
    saver = saver_of(run, trainer_of())
    for step, left in ((1, ["state_0_1"]), (2, ["state_0_1"]), (3, ["state_1_1"])):
        assert saver.save_rolling(step)
        assert os.listdir(run.folder) == left  # none at the end of an epoch, which has its model
    saver.save_epoch(4, train.Stop())
    assert os.listdir(run.folder) == ["1"]


def test_a_state_is_due_after_checkpoint_minutes(run):
    saver = saver_of(run, trainer_of("--checkpoint_minutes=3"))
    now = time.monotonic()
    for seconds, due in ((170, False), (190, True)):
        saver._last = now - seconds
        assert saver.is_due() == due
    saver.save_rolling(1)
    assert not saver.is_due()


@pytest.mark.parametrize("error", FULL_DISK)
def test_a_stop_does_not_wait_for_a_full_disk(run, monkeypatch, error):
    saver, stop = saver_of(run, trainer_of()), train.Stop()

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(saver, "_write_model", full)
    waits = []
    monkeypatch.setattr(stop, "wait", lambda seconds: (waits.append(seconds), stop.set()))
    monkeypatch.setattr(train.time, "sleep", waits.append)
    with pytest.raises(utils.UserError, match="cannot be saved"):
        saver.save_epoch(2, stop)
    assert waits == [60, 2] * 4 and run.epochs() == []


def keep(run: train.Run, evaluated: dict[int, float], epochs: int, *flags: str) -> list[int]:
    """The epochs left of those in the run, of which some were `evaluated`, with what top-1."""
    for epoch in range(epochs):
        assets = run.folder / str(epoch) / "assets"
        assets.mkdir(parents=True, exist_ok=True)
        (assets / "recipe.json").write_text(f'{{"fingerprint": "model {epoch}"}}')
    rows = [
        {"epoch": e, "top1_10crop": "", "top1_centre": top1, "model": f"model {e}"}
        for e, top1 in evaluated.items()
    ]
    utils.write_csv(run.folder / "accuracy.csv", train.ACCURACY_COLUMNS, rows)
    args = arguments(*flags)
    if args.keep_last:
        train.Saver(run, None, SPEC, args)._remove_old_epochs(args.keep_last)
    return run.epochs()


def test_keep_last_keeps_the_newest_and_the_best(run):
    assert keep(run, {0: 0.2, 1: 0.9, 2: 0.5, 3: 0.6, 4: 0.1}, 6, "--keep_last=2") == [1, 4, 5]


def test_keep_last_keeps_the_best_of_ten_crops(run):
    keep(run, {}, 4)
    rows = ["0,0.3,0.9,model 0", "1,0.8,0.2,model 1", "2,0.5,0.5,model 2"]
    table = [",".join(train.ACCURACY_COLUMNS), *rows, ""]
    (run.folder / "accuracy.csv").write_text("\n".join(table))
    train.Saver(run, None, SPEC, arguments())._remove_old_epochs(1)
    assert run.epochs() == [1, 3]


def test_keep_last_waits_for_a_checker_at_work(run):
    utils.lock(run.folder / ".check_accuracy.lock", "")
    assert keep(run, {0: 0.2, 1: 0.9}, 6, "--keep_last=2") == [1, 2, 3, 4, 5]
    utils.remove_lock(run.folder / ".check_accuracy.lock")
    assert keep(run, {0: 0.2, 1: 0.9}, 6, "--keep_last=2") == [1, 4, 5]


def test_keep_last_removes_what_a_checker_passes_over(run):
    """As with --every=2."""
    utils.lock(run.folder / ".check_accuracy.lock", "")
    (run.folder / ".check_accuracy.lock").write_text("2")
    assert keep(run, {3: 0.6}, 8, "--keep_last=1") == [1, 3, 5, 7]  # 1 could not be evaluated yet


def test_keep_last_does_not_believe_a_row_of_an_earlier_model(run):
    keep(run, {0: 0.2, 1: 0.9, 2: 0.3}, 6)
    for epoch in (1, 2):  # trained again
        (run.folder / f"{epoch}/assets/recipe.json").write_text('{"fingerprint": "new"}')
    utils.lock(run.folder / ".check_accuracy.lock", "")
    train.Saver(run, None, SPEC, arguments())._remove_old_epochs(2)
    assert run.epochs() == [0, 1, 2, 3, 4, 5]  # 0 is the best of those that are known


@pytest.mark.parametrize(
    "trouble",
    ["epoch,thoughts\n0,mine\n", "epoch,top1_10crop,top1_centre,model\n0,,high,model 0\n"],
)
def test_a_table_that_cannot_be_read_removes_nothing_and_training_goes_on(run, capsys, trouble):
    keep(run, {}, 2)
    (run.folder / "accuracy.csv").write_text(trouble)
    saver_of(run, trainer_of("--keep_last=1")).save_epoch(6, train.Stop())
    assert run.epochs() == [0, 1, 2]
    assert "old models and states may stay" in capsys.readouterr().err


def test_what_cannot_be_removed_does_not_end_training(run, capsys, monkeypatch):
    saver = saver_of(run, trainer_of("--keep_last=1"))
    keep(run, {}, 2)
    assert saver.save_rolling(5)

    def fail(_: Path) -> None:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(utils, "remove_folder", fail)
    saver.save_epoch(6, train.Stop())
    assert run.epochs() == [0, 1, 2]
    assert capsys.readouterr().err.count("may stay: [Errno 116] Stale file handle") == 2


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


def test_a_batch_that_pieces_do_not_divide_is_refused():
    with pytest.raises(utils.UserError, match="--batch_size=4.*3 pieces"):
        trainer_of("--accumulation_steps=3")


def operations(trainer: train.Trainer) -> list[str]:
    """Types of all operations of the step, those of the functions that it calls included."""
    images, labels = trainer.put(*batch())
    step = trainer._step.get_concrete_function(images, labels, tf.constant(0.1), tf.constant(0.0))
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
    images, labels = trainer.put(*batch())
    inputs = images, labels, tf.constant(0.1), tf.constant(0.0)
    compiled = trainer._step.experimental_get_compiler_ir(*inputs)(stage="hlo")
    step = trainer._step.get_concrete_function(*inputs)
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
        with pytest.raises(utils.UserError, match=f"worker 2 of TF_CONFIG has another.*{name}"):
            machines_of(monkeypatch, replicas, ours, dict(ours), ours | {name: 6})


@pytest.mark.parametrize(
    ("flags", "settings", "spec", "word"),
    [
        ([], {}, {"seed": 7}, "seed"),
        ([], {}, {"N": 11}, "N"),
        ([], {}, {"classes": 9}, "classes"),
        ([], {}, {"class_names": ["a"] * 8}, "class_names"),
        ([], {}, {"batch_size": 8}, "batch_size"),
        (["--learning_rate=0.02"], {}, {}, "--learning_rate"),
        (["--accumulation_steps=2"], {}, {}, "--accumulation_steps"),
        ([], {"train__sgd_momentum": 0.8}, {}, "sgd_momentum"),
        ([], {"l2__l2_penalty": 0.1}, {}, "[l2]"),
        ([], {"batch_renorm__rmax_max": 2.0}, {}, "[batch_renorm]"),
    ],
)
def test_machines_compare_pictures_flags_and_settings(flags, settings, spec, word):
    def values(trainer: train.Trainer, spec: BatchSpec) -> dict[str, object]:
        return train.spec_and_settings(spec, trainer.config, trainer.args)

    ours = values(trainer_of(), SPEC)
    theirs = values(trainer_of(*flags, **settings), dataclasses.replace(SPEC, worker=1, **spec))
    assert [name for name in ours if repr(ours[name]) != repr(theirs[name])] == [word]


def test_the_checksum_changes_with_any_weight():
    trainer = trainer_of()
    before = trainer.checksum()
    assert trainer_of().checksum() == before
    trainer.network.norms[-1].moving_std[0].assign(2.0)
    assert trainer.checksum() != before


def test_the_preprocessor_is_told_of_the_end_once_the_chief_has_saved(monkeypatch, capsys):
    """On the chief `train` returns after that; the others wait for it in `agree`."""
    told = []
    args = arguments("--run_folder=new")
    stand = types.SimpleNamespace(checksum=lambda: 77, put=None, config=None)
    log = contextlib.nullcontext(types.SimpleNamespace(time_taken=lambda: "1 s"))
    log.time_taken = lambda: "1 s"
    reader = contextlib.nullcontext()
    reader.folder = "buffer"
    run = types.SimpleNamespace(claim=lambda _: None, folder="run", chief=False)
    replaced = {
        "parse_arguments": lambda: args, "open_devices": lambda _: None,
        "Run": lambda *_, **__: run,
        "wait_for_buffer": lambda *_: SPEC, "Trainer": lambda *_: stand, "restore": lambda *_: 0,
        "Saver": lambda *_: None, "Log": lambda *_: log, "plan": lambda *_: [],
        "BatchReader": lambda *_: reader, "train": lambda *_: told.append("train") or True,
        "end_preprocessing": lambda *_: told.append("end"),
        "agree": lambda _, values: told.append(list(values)),
    }  # fmt: skip
    for name, value in replaced.items():
        monkeypatch.setattr(train, name, value)
    train.main()
    assert "seed" in told.pop(0)
    assert told == [["first step", "weights"], "train", ["last step"], "end"]


def test_the_plan_of_two_replicas(run):
    import test_training

    strategy = test_training.two_replicas()
    trainer = train.Trainer(
        strategy, utils.load_config(toolkit.ROOT / "config.txt"), 8, arguments()
    )
    assert any(
        "2 replicas" in line for line in train.plan(run, trainer, SPEC, range(18), arguments())
    )


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
    for error, workers, words in (
        (tf.errors.ResourceExhaustedError, 1, "--accumulation_steps"),
        (tf.errors.UnavailableError, 2, "another machine"),
    ):
        monkeypatch.setattr(train, "worker_of_workers", lambda workers=workers: (0, workers))
        with pytest.raises(utils.UserError, match=words), train.explained_failures():
            raise error(None, None, "gone")
    monkeypatch.setattr(train, "worker_of_workers", lambda: (0, 1))
    with pytest.raises(tf.errors.UnavailableError), train.explained_failures():
        raise tf.errors.UnavailableError(None, None, "gone")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lr_drop_epochs=3"], "needs --lr_schedule=step"),
        (["--lr_schedule=step"], "needs --lr_drop_epochs"),
        (["--warmup_epochs=9"], "must be less than --epoch_end=9"),
        (["--init_from=a", "--epoch_start=1"], "needs --epoch_start=0"),
        (["--label_smoothing=2"], "label_smoothing"),
        (["--lr_schedule=step", "--lr_drop_epochs=5,3"], "increasing"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, words):
    with pytest.raises(utils.UserError, match=words):
        arguments(*flags)


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
    return tf.constant([loss, loss / 2, 0.25, step, 1.0, 0.0, skipped, 8.0, 0.0], tf.float32)


def log_of(run: train.Run, steps: range, *flags: str, compute_type=tf.float32) -> train.Log:
    trainer = types.SimpleNamespace(compute_type=compute_type, args=arguments())
    return train.Log(run, trainer, SPEC, steps, arguments(*flags))


def logged(run: train.Run, steps: range, upto: int, *flags: str) -> list[dict]:
    with log_of(run, steps, "--log_seconds=0", *flags) as log:
        for step in range(steps.start, upto):
            with log.waiting():
                pass
            log.add(step, 0.5, values_of(step))
        log.settle()
    return utils.read_csv(run.folder / "training_log.csv", train.COLUMNS)


def test_steps_trained_again_are_in_the_log_and_among_the_events_once(run):
    logged(run, range(0, 18), 7)
    (events,) = (run.folder / "events" / "training").iterdir()
    assert "tfevents" in events.name  # or TensorBoard does not find it
    events.rename(events.with_name("events.out.tfevents.1.toolkit"))  # as if begun long ago
    rows = logged(run, range(4, 18), 9)
    assert sorted({int(row["step"]) for row in rows}) == [int(row["step"]) for row in rows]
    assert int(rows[-1]["step"]) == 8
    assert [float(row["seconds"]) for row in rows] == sorted(float(r["seconds"]) for r in rows)
    seen = toolkit.scalars(run.folder / "events" / "training")  # fails where one appears twice
    assert {step for _, step in seen} == {int(row["step"]) for row in rows}
    for row in rows:
        for name in train.COLUMNS[5:]:
            assert seen[f"training/{name}", int(row["step"])] == pytest.approx(
                float(row[name]), rel=1e-4
            )
    text = (run.folder / "training_log.csv").read_bytes()
    assert b"\r" not in text and text.endswith(b"\n")


def test_another_batch_size_costs_no_row_of_the_epochs_before(run):
    """Steps of the old rows are counted in batches of another size."""
    logged(run, range(0, 18), 6)
    spec = dataclasses.replace(SPEC, batch_size=2, batches_per_epoch=1)
    trainer = types.SimpleNamespace(compute_type=tf.float32, args=arguments())
    with train.Log(run, trainer, spec, range(2, 9), arguments()) as log:  # from epoch 2 on
        log.add(2, 0.5, values_of(2))
        log.settle()
    rows = utils.read_csv(run.folder / "training_log.csv", train.COLUMNS)
    assert [(r["epoch"], r["batch"]) for r in rows] == [
        *[("0", "0"), ("0", "1"), ("1", "0"), ("1", "1"), ("2", "0")]
    ]
    assert max(step for _, step in toolkit.scalars(run.folder / "events" / "training")) == 2


def test_a_row_averages_its_steps(run):
    with log_of(run, range(0, 18), compute_type=tf.float16) as log:
        for step, loss in enumerate([1.0, 3.0, 8.0]):
            log.add(step, 0.5, values_of(step, loss, skipped=step == 1))
        log._row_start = time.perf_counter() - 1000
        log.settle()
    (row,) = utils.read_csv(run.folder / "training_log.csv", train.COLUMNS)
    assert float(row["loss"]) == 4 and float(row["loss_without_l2"]) == 2
    assert (row["steps"], row["step"], row["epoch"], row["batch"]) == ("3", "2", "1", "0")
    assert float(row["gradient_norm"]) == 1 and float(row["loss_scale"]) == 8
    assert row["skipped_steps"] == "1"
    assert float(row["images_per_second"]) == pytest.approx(3 * 4 / 1000, rel=0.05)


def test_a_loss_that_is_no_number_stops_training(run):
    with log_of(run, range(0, 18)) as log:
        log.add(0, 0.5, values_of(0))
        log.add(1, 0.5, values_of(1, math.nan))
        with pytest.raises(utils.UserError, match="epoch 0, batch 1: the loss is nan"):
            log.settle()


def test_only_time_without_a_step_under_way_counts_as_waiting(run):
    """On a GPU a step goes on while the next batch is waited for."""
    with log_of(run, range(0, 18)) as log:
        log._finished = 100.0
        for asked, given, waited in ((90, 95, 0), (90, 103, 3), (102, 103, 1)):
            log._waited, log._finished, log._wait = 0.0, 100.0, (asked, given)
            log.add(0, 0.5, values_of(0))
            log._settle_first()
            assert log._waited == waited


def test_a_row_has_the_waiting_of_its_own_steps(run):
    with log_of(run, range(0, 18)) as log:
        now = time.perf_counter()
        log._row_start = log._finished = now - 10
        log._wait = now - 4, now - 1
        log.add(0, 0.5, values_of(0))
        log.settle()
        assert log._finished >= now  # the next wait counts from here
        log._wait = now - 4, now - 1  # while the step was under way
        log.add(1, 0.5, values_of(1))
        log.settle()
    rows = utils.read_csv(run.folder / "training_log.csv", train.COLUMNS)
    assert float(rows[0]["waiting_for_data"]) == pytest.approx(0.3, abs=0.05)
    assert float(rows[1]["waiting_for_data"]) == 0


@pytest.mark.parametrize("error", FULL_DISK)
@pytest.mark.parametrize("part", ["_rows", "_events"])
def test_a_full_disk_behind_the_log_does_not_end_training(run, part, error, capsys):
    def full(*_: object) -> None:
        raise error

    with log_of(run, range(0, 18)) as log:
        setattr(log, part, types.SimpleNamespace(writerow=full, write=full))
        log.add(0, 0.5, values_of(0))
        log.settle()
    assert "the log could not be written: " in capsys.readouterr().err


def test_a_cut_off_row_is_dropped(run):
    logged(run, range(0, 18), 4)
    path = run.folder / "training_log.csv"
    path.write_bytes(path.read_bytes()[:-20])
    assert [row["step"] for row in logged(run, range(4, 18), 5)][-1] == "4"


def test_a_state_is_saved_after_the_rows_of_its_steps(run):
    """So that a kill between the two costs no row."""
    with log_of(run, range(0, 18)) as log:
        log.add(0, 0.5, values_of(0))
        log.settle()
        assert len(utils.read_csv(run.folder / "training_log.csv", train.COLUMNS)) == 1


def test_a_row_is_printed_once_and_only_when_said(run, capsys):
    with log_of(run, range(0, 18)) as log:
        log.add(0, 0.5, values_of(0))
        log.settle()
        assert capsys.readouterr().out == ""
        log.say()
        log.say()
    assert capsys.readouterr().out.count("loss 0.500 + 0.500 L2") == 1


def test_a_table_of_somebody_else_is_not_written_over(run):
    path = run.folder / "training_log.csv"
    path.write_text("step,thoughts\n1,mine\n")
    with pytest.raises(utils.UserError, match="training_log.csv: not the expected table"):
        logged(run, range(0, 18), 1)
    assert path.read_text() == "step,thoughts\n1,mine\n"


# --- the plan -------------------------------------------------------------------------------


def renorm_lines(start: int, capsys, first: int = 0) -> str:
    config = utils.load_config(toolkit.ROOT / "config.txt").batch_renorm
    config.start_relaxing_rmax = config.start_relaxing_dmax = start
    config.reach_rmax_max = config.reach_dmax_max = start + 100
    lines = list(train.renorm_plan(config, 50, first, arguments()))
    return " ".join(lines) + capsys.readouterr().err


def test_the_plan_says_in_which_epochs_the_limits_are_relaxed_or_warns(capsys):
    said = renorm_lines(100, capsys)
    assert "r_max to 3 in epochs 2.0 to 4.0" in said and "d_max to 5" in said
    assert "warning" not in said
    said = renorm_lines(450, capsys)  # 9 epochs of 50
    assert "warning" in said and "plain batch normalization" in said
    # After 200 updates of another batch size, which were 4 epochs, now 2: counted from step -100.
    assert "r_max to 3 in epochs 0.0 to 2.0" in renorm_lines(100, capsys, first=-100)
    assert "warning" not in renorm_lines(450, capsys, first=-100)


def test_the_plan_of_a_resumed_run_has_the_same_limits(run):
    trainer = trainer_of(batch_renorm__start_relaxing_rmax=4, batch_renorm__reach_rmax_max=8)
    for done in (0, 6):
        trainer.updates.assign(done)
        lines = list(train.plan(run, trainer, SPEC, range(done, 18), trainer.args))
        assert any("r_max to 3 in epochs 2.0 to 4.0" in line for line in lines)


def test_a_share_of_pictures_that_does_not_fill_a_batch_is_warned_of(run, capsys):
    trainer = trainer_of()
    list(train.plan(run, trainer, SPEC, range(0, 18), trainer.args))
    assert "leaves out 2 pictures of 10" in capsys.readouterr().err
    spec = dataclasses.replace(SPEC, N=100, workers=4, batches_per_epoch=6)
    list(train.plan(run, trainer, spec, range(0, 18), trainer.args))
    assert "leaves out 4 pictures of 100" in capsys.readouterr().err
    spec = dataclasses.replace(SPEC, N=1001, batches_per_epoch=250)
    list(train.plan(run, trainer, spec, range(0, 18), trainer.args))
    assert "leaves out" not in capsys.readouterr().err


def test_models_and_states_remember_their_recipe(run):
    trainer = trainer_of("--label_smoothing=0.1")
    saver_of(run, trainer).save_epoch(4, train.Stop())
    state = json.loads((run.folder / "1" / "training_state" / "state.json").read_text())
    assert state["step"] == 4 and state["recipe"]["label_smoothing"] == 0.1
    assert state["mu"] == SPEC.mu
    recipe = resnet50.model_recipe(run.folder / "1")
    assert (recipe["step"], recipe["epoch_end"], recipe["learning_rate"]) == (4, 9, 0.01)
    assert (recipe["label_smoothing"], recipe["batch_size"]) == (0.1, SPEC.batch_size)


def test_weights_are_written_once_per_model(run):
    """The momentum is as large as the weights; nothing else is large."""
    trainer = trainer_of()
    saver_of(run, trainer).save_epoch(2, train.Stop())
    weights = sum(4 * v.shape.num_elements() for v in trainer.network.variables)
    size = sum(path.stat().st_size for path in Path(run.folder / "0").rglob("*") if path.is_file())
    assert size < 2.2 * weights + 1e6
