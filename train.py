"""Trains the ResNet-50 of resnet50.py on the batches that runtime_preprocessing.py prepares.

    python3 train.py --run_folder=mytestrun --epoch_start=0 --epoch_end=30 --batch_size=64 \\
        --learning_rate=0.01

runtime_preprocessing.py, in another terminal, fills `buffer_folder` with batches. Each step takes
the next one, and waits if it is not there yet. A step is a forward and a backward pass, an update
of the weights by SGD with momentum, and an update of the moving averages.

After epoch e it saves `saved_models/mytestrun/<e>/`, a TensorFlow SavedModel. Its subfolder
`training_state/` holds what else training needs to continue from there. Every 10 minutes, and when
it is stopped, training also saves a state within the epoch, `state_<epoch>_<batch>/`, which
replaces the previous one. The same command with `--resume` loads the latest model or state and
continues at the exact batch, however training stopped. `--epoch_start=E` alone continues from the
model of epoch E - 1. The log lines also go to `training_log.csv` and, for TensorBoard, to
`events/`.

This file holds, in order: main and the loop, the learning rate, the step, the command line, devices
and signals, the run's folder and what is saved there, the log.
"""

import argparse
import atexit
import contextlib
import csv
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import utils
from utils import CROP, REQUIRED, UserError, number, plural, whole

import numpy as np

from runtime_preprocessing import (
    BatchReader,
    BatchSpec,
    end_preprocessing,
    take_buffer,
    wait_for_buffer,
    worker_of_workers,
)

with utils.quiet_tensorflow():
    import tensorflow as tf

    from batch_renorm import limits_at, momentum_at
    from resnet50 import (
        ResNet50,
        epochs_in,
        export_model,
        model_recipe,
        read_weights,
        runs_in,
        warn_of_other_classes,
    )


def main() -> None:
    args = parse_arguments()
    config = utils.load_config(args.config)
    strategy = open_devices(args)
    if args.synthetic:
        measure_speed(Trainer(strategy, config, 1000, args))
        return
    run = Run(config.train.path_for_saving / args.run_folder, chief=worker_of_workers()[0] == 0)
    run.claim(args)
    if args.resume and run.is_trained_to(args.epoch_end):
        end_preprocessing(take_buffer(config), args.epoch_end)
        print(f"{run.folder} is already trained to the end of epoch {args.epoch_end - 1}")
        return
    spec = wait_for_buffer(config, args)  # what the batches are made of
    agree(strategy, spec_and_settings(spec, config, args))
    trainer = Trainer(strategy, config, spec.classes, args)
    steps = range(restore(run, trainer, spec, args), spec.step(args.epoch_end))
    agree(strategy, {"first step": steps.start, "weights": trainer.checksum()})
    saver = Saver(run, trainer, spec, args)
    log = Log(run, trainer, spec, steps, args)
    for line in plan(run, trainer, spec, steps, args):
        print(line)
    reader = BatchReader(config, spec, steps, trainer.put, args)
    with stop_on_signals() as stop, log, reader:
        finished = train(trainer, reader, saver, log, stop)
    if not finished:
        sys.exit(128 + stop.number)
    # Only after the last model is saved: a kill before that makes training need the batches again.
    agree(strategy, {"last step": steps.stop})  # other machines wait until the chief has saved it
    end_preprocessing(reader.folder, args.epoch_end)
    print(
        f"trained to the end of epoch {args.epoch_end - 1} in {log.time_taken()}; the models are "
        f"in {run.folder}. Next: python3 check_accuracy.py --run_folder={args.run_folder} "
        f"--epoch_start={args.epoch_start} --epoch_end={args.epoch_end} --config={args.config}"
    )


def train(
    trainer: "Trainer", reader: BatchReader, saver: "Saver", log: "Log", stop: "Stop"
) -> bool:
    """Trains on one batch per step, to the last step or until `stop`. Returns whether it finished.

    Steps are counted from 0 across all epochs. A step is sent to the device while the previous one
    still runs there. `settle` waits for both. It raises UserError if a loss was not finite, so that
    such weights are never saved.
    """
    step = log.steps.start
    while step < log.steps.stop and not log.should_stop(step, stop):
        try:
            with log.waiting():
                batch = reader.next(stop)
        except (UserError, OSError):  # of the buffer; the weights are good
            log.settle()
            saver.save_rolling(step)
            raise
        if batch is None:  # stopped while waiting
            break
        rate = learning_rate(step, trainer.args, reader.spec.batches_per_epoch)
        log.add(step, rate, trainer.step(*batch, rate, stop))
        step += 1
        if step % reader.spec.batches_per_epoch == 0:
            log.settle()
            saver.save_epoch(step, stop)
            log.say()
        elif saver.is_due():
            log.settle()
            saver.save_rolling(step)
            log.say()
    if step == log.steps.stop:
        return True
    log.settle()
    saved = saver.save_rolling(step)  # before anything is printed: a terminal may block
    log.say()
    print(
        f"stopped before {reader.spec.position(step)}; the same command with --resume continues "
        f"{'there' if saved else 'from the last state that was saved'}"
    )
    return False


def learning_rate(step: int, args: argparse.Namespace, batches_per_epoch: int) -> float:
    """The learning rate at a step, a pure function of the step and the command line.

    Linear warm-up as in Goyal et al. 2017 (section 2.2); then constant, divided by 10 at each of
    `lr_drop_epochs`, or half a cosine down to 0 at `epoch_end` (Loshchilov & Hutter 2017).
    """
    epoch = step / batches_per_epoch
    if epoch < args.warmup_epochs:
        return args.learning_rate * min(1, (step + 1) / (args.warmup_epochs * batches_per_epoch))
    if args.lr_schedule == "step":
        return args.learning_rate * 0.1 ** sum(epoch >= drop for drop in args.lr_drop_epochs)
    if args.lr_schedule == "cosine":
        done = (epoch - args.warmup_epochs) / (args.epoch_end - args.warmup_epochs)
        return args.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    return args.learning_rate


# --- the training step ----------------------------------------------------------------------


class SkippingSGD(tf.keras.optimizers.SGD):
    """Keras's SGD, but it can skip a step. The device decides, so nothing waits for the host."""

    usable: tf.Tensor | None = None
    """Whether to take the current step, a bool scalar. None takes every step."""

    def assign(self, variable: tf.Variable, value: tf.Tensor) -> None:
        if self.usable is not None:
            value = tf.where(self.usable, value, variable)
        super().assign(variable, value)

    def assign_add(self, variable: tf.Variable, value: tf.Tensor) -> None:
        if self.usable is not None:
            value = tf.where(self.usable, value, tf.zeros_like(value))
        super().assign_add(variable, value)

    def assign_sub(self, variable: tf.Variable, value: tf.Tensor) -> None:
        self.assign_add(variable, -value)  # without momentum Keras subtracts

    def _all_reduce_sum_gradients(self, grads_and_vars: list) -> list:
        return grads_and_vars  # `Trainer` has already averaged them over the replicas


class Trainer:
    """Network, optimizer and the step function, on the devices of a strategy.

    Each replica has a copy of every variable. The copies stay equal because all replicas apply the
    same updates.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        config: SimpleNamespace,
        classes: int,
        args: argparse.Namespace,
    ):
        self.strategy, self.config, self.classes, self.args = strategy, config, classes, args
        self.replicas = strategy.num_replicas_in_sync
        self.local_replicas = self.replicas // worker_of_workers()[1]
        pieces = self.local_replicas * args.accumulation_steps
        if args.batch_size % pieces:
            raise UserError(
                f"--batch_size={args.batch_size} cannot be shared evenly among "
                f"{self.local_replicas} GPUs, in {args.accumulation_steps} pieces each"
            )
        if self.replicas > 1 and not hasattr(SkippingSGD.__base__, "_all_reduce_sum_gradients"):
            raise UserError("this Keras sums gradients in a new way; install an older tensorflow")
        self.compute_type = tf.as_dtype(args.precision.removeprefix("mixed_"))
        tf.random.set_seed(config.train.seed)
        with strategy.scope():
            self.network = ResNet50(classes)
            self.optimizer = SkippingSGD(momentum=config.train.sgd_momentum)
            self.optimizer.build(self.network.trainable_variables)
            self.updates = tf.Variable(0, trainable=False, dtype=tf.int64)
            self.loss_scale = tf.Variable(2.0**15, trainable=False)
            self.good_updates = tf.Variable(0, trainable=False, dtype=tf.int64)
        self.momentum = [slot.value for slot in self.optimizer.momentums]
        self.state = tf.train.Checkpoint(
            momentum=self.momentum,
            updates=self.updates,
            loss_scale=self.loss_scale,
            good_updates=self.good_updates,
        )
        whole_step = args.jit_compile and self.replicas == 1
        self._gradients = tf.function(
            self._gradients, jit_compile=args.jit_compile and not whole_step
        )
        self._step = tf.function(self._step, jit_compile=whole_step)

    def put(self, images: np.ndarray, labels: np.ndarray) -> tuple:
        """Copies a batch to the devices: each replica gets its share of the pictures."""
        if self.replicas == 1:
            return tf.identity(shared(images)), tf.constant(labels)
        share = len(images) // self.local_replicas

        def part(context: tf.distribute.experimental.ValueContext) -> tuple[tf.Tensor, tf.Tensor]:
            local = context.replica_id_in_sync_group % self.local_replicas
            own = slice(local * share, (local + 1) * share)
            with tf.device(self.strategy.extended.worker_devices[local]):
                return tf.identity(shared(images[own])), tf.identity(labels[own])

        return self.strategy.experimental_distribute_values_from_function(part)

    def step(
        self, images: object, labels: object, rate: float, stop: "Stop | None" = None
    ) -> tf.Tensor:
        """Trains on a batch. Returns METRICS, float32 [9]; the device may still compute them."""
        stopping = float(stop is not None and stop.is_set())
        return self._step(images, labels, tf.constant(rate), tf.constant(stopping))

    def _step(self, images, labels, rate, stopping):
        """The step on all replicas. With only one, XLA can compile the whole step."""
        if self.replicas == 1:
            return self._replica_step(images, labels, rate, stopping)
        values = self.strategy.run(self._replica_step, (images, labels, rate, stopping))
        return self.strategy.reduce(tf.distribute.ReduceOp.MEAN, values, axis=None)

    def _replica_step(self, images, labels, rate, stopping):
        """The whole step: gradients, their mean over the replicas, new weights, new averages."""
        gradients, statistics, values = self._accumulate(images, labels)
        if self.replicas > 1:
            context = tf.distribute.get_replica_context()
            gradients = context.all_reduce(tf.distribute.ReduceOp.MEAN, gradients)
            statistics = context.all_reduce(tf.distribute.ReduceOp.MEAN, statistics)
        if self.compute_type == tf.float16:
            gradients = [gradient / self.loss_scale for gradient in gradients]
        norm = tf.linalg.global_norm(gradients)
        usable = self._adapt_loss_scale(tf.math.is_finite(norm))
        self.optimizer.usable = usable
        self.optimizer.learning_rate = rate
        self.optimizer.apply(gradients, self.network.trainable_variables)
        limits = limits_at(self.updates, self.config.batch_renorm)
        momentum = momentum_at(self.updates, self.config.batch_renorm.moving_avgs_momentum)
        for layer, (mean, std) in zip(self.network.norms, statistics, strict=True):
            layer.update(mean, std, momentum)
        self.updates.assign_add(1)
        skipped, scale = 0.0, 1.0
        if usable is not None:
            skipped, scale = 1 - tf.cast(usable, tf.float32), self.loss_scale
        return tf.stack([*tf.unstack(values), norm, *limits, skipped, scale, stopping])

    def _accumulate(self, images, labels):
        """Splits a replica's pictures into pieces and averages what `_gradients` returns."""
        pieces = self.args.accumulation_steps
        if pieces == 1:
            return self._gradients(images, labels)
        images = tf.reshape(images, [pieces, -1, *images.shape[1:]])
        labels = tf.reshape(labels, [pieces, -1])
        zeros = (
            [tf.zeros_like(variable) for variable in self.network.trainable_variables],
            [[tf.zeros_like(norm.moving_mean)] * 2 for norm in self.network.norms],
            tf.zeros([3]),
        )

        def add(piece, sums):
            parts = tf.nest.flatten(self._gradients(images[piece], labels[piece]))
            return piece + 1, [s + part / pieces for s, part in zip(sums, parts, strict=True)]

        _, means = tf.while_loop(lambda piece, _: piece < pieces, add, (0, tf.nest.flatten(zeros)))
        return tf.nest.pack_sequence_as(zeros, means)

    def _gradients(self, images, labels):
        """One forward and one backward pass. Returns the gradients of the (scaled) loss, the batch
        statistics of every normalisation, and float32 [3]: loss, loss without L2, top-1.
        """
        limits = limits_at(self.updates, self.config.batch_renorm)
        smoothing = self.args.label_smoothing
        with tf.GradientTape() as tape:
            logits = self.network(tf.cast(images, self.compute_type), limits)
            targets = tf.one_hot(labels, self.classes) * (1 - smoothing) + smoothing / self.classes
            loss = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(targets, logits))
            penalty = self.config.l2.l2_penalty * tf.add_n(
                [tf.nn.l2_loss(kernel) for kernel in self.network.kernels]
            )
            total = loss + penalty
            scaled = total * self.loss_scale if self.compute_type == tf.float16 else total
        gradients = tape.gradient(scaled, self.network.trainable_variables)
        statistics = [(norm.batch_mean, norm.batch_std) for norm in self.network.norms]
        right = tf.equal(tf.argmax(logits, 1, output_type=tf.int32), labels)
        return (
            gradients,
            statistics,
            tf.stack([total, loss, tf.reduce_mean(tf.cast(right, tf.float32))]),
        )

    def _adapt_loss_scale(self, finite: tf.Tensor) -> tf.Tensor | None:
        """Dynamic loss scaling (Micikevicius et al. 2018, section 3.2): an overflow skips the step
        and halves the scale; 2,000 steps without an overflow double it. Returns whether to take the
        step. Types other than float16 need no scale and get None.
        """
        if self.compute_type != tf.float16:
            return None
        good = tf.where(finite, self.good_updates + 1, 0)
        grown = tf.where(good >= 2000, self.loss_scale * 2, self.loss_scale)
        scale = tf.where(finite, tf.minimum(grown, 2.0**24), tf.maximum(self.loss_scale / 2, 1))
        self.loss_scale.assign(scale)
        self.good_updates.assign(tf.where(good >= 2000, tf.zeros_like(good), good))
        return finite

    def checksum(self) -> int:
        """Of all weights and averages."""
        return zlib.crc32(b"".join(each.numpy().tobytes() for each in self.network.variables))


def shared(array: np.ndarray) -> tf.Tensor:
    """A CPU tensor that shares the array's memory and keeps it alive.

    tf.constant would copy: with 256 pictures that takes three times as long, and the training
    thread has to wait. TensorFlow needs tensors to start at a multiple of 64 bytes.
    """
    if array.ctypes.data % 64:
        return tf.constant(array)
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


METRICS = (
    "loss", "loss_without_l2", "top1", "gradient_norm", "r_max", "d_max", "skipped_steps",
    "loss_scale", "stopping",
)  # fmt: skip
"""What a step returns: float32 each, means over the replicas."""


def measure_speed(trainer: Trainer, seconds: float = 20.0) -> None:
    """Trains on random batches and prints images per second: what the hardware can do."""
    size, generator = trainer.args.batch_size, np.random.default_rng(0)
    images = generator.standard_normal((size, CROP, CROP, 3), np.float32).astype(np.float16)
    batch = trainer.put(images, generator.integers(0, 1000, size).astype(np.int32))
    print(
        f"random batches of {size}, {trainer.args.precision}; nothing is saved. Preparing the "
        f"step, then measuring for {seconds:.0f} s"
    )
    for _ in range(2):
        trainer.step(*batch, 0.0).numpy()  # builds the step
    under_way, count, start = deque(), 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        under_way.append(trainer.step(*batch, 0.0))
        if len(under_way) > 1:  # wait for the step before last, as training does
            under_way.popleft().numpy()
            count += 1
    rate = count * size / (time.perf_counter() - start)
    print(f"this hardware trains {rate:,.1f} images/s with batches of {size}")


# --- the command line -----------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = utils.Parser(
        "Trains a ResNet-50 with batch renormalization from the buffer's batches.",
        "train.py --run_folder=mytestrun --epoch_start=0 --epoch_end=30 \\\n"
        "    --batch_size=64 --learning_rate=0.01",
    )
    add = parser.add
    parser.add_run()
    parser.add_epochs()
    add("--batch_size", whole(1), "pictures per batch, shared among the GPUs", REQUIRED)
    add("--learning_rate", number(0), "highest learning rate", REQUIRED)
    add("--lr_schedule", SCHEDULES, "constant (default), step or cosine", "constant")
    add("--lr_drop_epochs", epoch_list, "where step divides the rate by 10, e.g. 30,60,80", ())
    add("--warmup_epochs", number(0), "epochs in which the rate rises from 0 (default: 0)", 0.0)
    add("--label_smoothing", number(0, 0.99), "share of the target spread over all classes", 0.0)
    add("--accumulation_steps", whole(1), "pieces that a batch is split into, to save memory", 1)
    add("--init_from", Path, "saved model that a new run takes its weights from")
    add("--resume", None, "continue where the run stopped")
    add("--checkpoint_minutes", number(0), "minutes between two saved states (default: 10)", 10.0)
    add("--keep_last", whole(1), "newest models to keep besides the best (default: all)")
    add("--log_seconds", number(0), "seconds between two log lines (default: 30)", 30.0)
    add("--precision", PRECISIONS, "float32, mixed_float16 (on a GPU) or mixed_bfloat16")
    add("--jit_compile", None, "compile the step with XLA")
    add("--gpu", gpu_list, "GPUs to train on, such as 0,1 (default: 0, else the CPU)")
    add("--deterministic", None, "get the same result every time, but slower")
    add("--synthetic", None, "measure the speed on random batches and exit")
    add("--verbose", None, "show TensorFlow's own messages")  # see utils.quiet_tensorflow
    args = parser.parse()
    if args.lr_schedule == "step" and not args.lr_drop_epochs:
        raise UserError("--lr_schedule=step needs --lr_drop_epochs, such as 30,60,80")
    if args.lr_schedule != "step" and args.lr_drop_epochs:
        raise UserError("--lr_drop_epochs needs --lr_schedule=step")
    if args.warmup_epochs >= args.epoch_end:
        raise UserError(
            f"--warmup_epochs={args.warmup_epochs:g} must be less than --epoch_end={args.epoch_end}"
        )
    if args.synthetic and worker_of_workers()[1] > 1:
        raise UserError("--synthetic measures one machine; run it without TF_CONFIG")
    if args.init_from and args.epoch_start:
        raise UserError("--init_from begins a new run, so it needs --epoch_start=0")
    return args


SCHEDULES = ("constant", "step", "cosine")
PRECISIONS = ("float32", "mixed_float16", "mixed_bfloat16")
RECIPE = (
    "learning_rate", "lr_schedule", "lr_drop_epochs", "warmup_epochs", "epoch_end",
    "label_smoothing", "accumulation_steps", "precision",
)  # fmt: skip
"""Flags that affect the result. States and models record their values."""


def recipe_of(args: argparse.Namespace) -> dict[str, object]:
    return {name: getattr(args, name) for name in RECIPE}


def epoch_list(text: str) -> tuple[int, ...]:
    """Argument type: increasing epochs, "20,40,70"."""
    epochs = tuple(whole(1)(part) for part in text.split(","))
    if list(epochs) != sorted(set(epochs)):
        raise argparse.ArgumentTypeError(f"expected increasing epochs, not {text!r}")
    return epochs


def gpu_list(text: str) -> list[int]:
    """Argument type: different GPUs, "0" or "0,1"."""
    gpus = [whole(0)(part) for part in text.split(",")]
    if len(set(gpus)) < len(gpus):
        raise argparse.ArgumentTypeError(f"expected different GPUs, not {text!r}")
    return gpus


def plan(
    run: "Run", trainer: Trainer, spec: BatchSpec, steps: range, args: argparse.Namespace
) -> Iterator[str]:
    """Lines that say what this run will do. Warns of likely mistakes."""
    devices = "the GPU" if tf.config.get_visible_devices("GPU") else "the CPU"
    if trainer.replicas > 1:
        devices = f"{trainer.replicas} replicas"
    per_epoch = spec.batches_per_epoch
    yield (
        f"{plural(spec.classes, 'class')}, {plural(spec.N, 'training picture')}; from "
        f"{spec.position(steps.start)} to the end of epoch {args.epoch_end - 1}: "
        f"{plural(len(steps), 'step')} of {plural(args.batch_size, 'picture')}, {per_epoch:,} per "
        f"epoch, {trainer.args.precision} on {devices}"
    )
    left_out = spec.N - spec.workers * per_epoch * args.batch_size
    if left_out > 0.03 * spec.N:
        utils.warn(
            f"each epoch leaves out {plural(left_out, 'picture')} of {spec.N}, too few to fill a "
            f"batch; a smaller --batch_size leaves out fewer"
        )
    yield "the first step takes longest, because TensorFlow builds the network's graph"
    first = steps.start - int(trainer.updates.numpy())  # not 0 if the batch size has changed
    yield from renorm_plan(trainer.config.batch_renorm, per_epoch, first, args)
    if run.chief:
        yield disk_plan(run.folder, trainer, args.epoch_end - steps.start // per_epoch)


def renorm_plan(
    settings: SimpleNamespace, per_epoch: int, first: int, args: argparse.Namespace
) -> Iterator[str]:
    """In which epochs batch renormalization relaxes its limits. Warns if it never does.

    `first`: the step from which updates are counted.
    """
    last = args.epoch_end * per_epoch - 1 - first
    if min(settings.start_relaxing_rmax, settings.start_relaxing_dmax) > last:
        utils.warn(
            f"[batch_renorm] start_relaxing_rmax and start_relaxing_dmax are after the last "
            f"update, {last}: this run is plain batch normalization"
        )
        return

    def epochs(start: int, reach: int) -> str:
        begin, end = (max(0, first + step) / per_epoch for step in (start, reach))
        return f"in epochs {begin:.1f} to {end:.1f}"

    yield (
        f"batch renormalization relaxes r_max to {settings.rmax_max:g} "
        f"{epochs(settings.start_relaxing_rmax, settings.reach_rmax_max)}, d_max to "
        f"{settings.dmax_max:g} {epochs(settings.start_relaxing_dmax, settings.reach_dmax_max)}"
    )


def disk_plan(folder: Path, trainer: Trainer, epochs: int) -> str:
    """How much disk the models will take, in one line."""
    # Trainable variables count twice: each has a momentum.
    kept = trainer.network.variables + trainer.network.trainable_variables
    each = sum(4 * variable.shape.num_elements() for variable in kept)
    if trainer.args.keep_last:
        epochs = min(epochs, trainer.args.keep_last + 2)  # plus the best and the one being written
    free = shutil.disk_usage(folder).free
    short = "" if epochs * each <= free else "; free some space, or use another path_for_saving"
    return (
        f"models go to {folder}: {utils.file_size(each)} each, {utils.file_size(epochs * each)} in "
        f"all, {utils.file_size(free)} free{short}"
    )


# --- devices and signals --------------------------------------------------------------------


def open_devices(args: argparse.Namespace) -> tf.distribute.Strategy:
    """The strategy for the chosen GPUs, and for all machines if there are several.

    Raises UserError for a GPU that does not exist.
    """
    if args.deterministic:
        tf.config.experimental.enable_op_determinism()
    chosen = utils.choose_gpus(args.gpu or [0], required=args.gpu is not None)
    args.precision = args.precision or ("mixed_float16" if chosen else "float32")
    if worker_of_workers()[1] > 1:
        return tf.distribute.MultiWorkerMirroredStrategy()
    if len(chosen) > 1:
        return tf.distribute.MirroredStrategy([f"GPU:{i}" for i in range(len(chosen))])
    return tf.distribute.get_strategy()


def spec_and_settings(
    spec: BatchSpec, config: SimpleNamespace, args: argparse.Namespace
) -> dict[str, object]:
    """What must be the same on all machines, by its name in a message."""
    flags = {f"--{name}": value for name, value in recipe_of(args).items()}
    facts = {name: getattr(spec, name) for name in (*FACTS, "class_names")}
    settings = {"[l2]": config.l2, "[batch_renorm]": config.batch_renorm}
    return facts | flags | settings | {"sgd_momentum": config.train.sgd_momentum}


def agree(strategy: tf.distribute.Strategy, values: dict[str, object]) -> None:
    """Waits for all machines. Raises UserError unless they have the same values."""
    worker, workers = worker_of_workers()
    if workers == 1:
        return
    own = [zlib.crc32(repr(value).encode()) for value in values.values()]
    table = np.zeros([workers, len(own)], np.int64)
    table[worker] = own

    def exchange() -> tf.Tensor:
        context = tf.distribute.get_replica_context()
        return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.constant(table))

    sums = strategy.experimental_local_results(strategy.run(tf.function(exchange)))
    # Each machine's row was added once by each of its replicas.
    rows = sums[0].numpy() // len(sums)
    for other, row in enumerate(rows.tolist()):
        for name, theirs, ours in zip(values, row, own, strict=True):
            if theirs != ours:
                raise UserError(
                    f"worker {other} of TF_CONFIG has another value of {name} than this one; give "
                    f"all machines the same command line, config file and pictures, and the same "
                    f"[train] path_for_saving (a shared folder)"
                )


class Stop(threading.Event):
    """Set by a signal. `number` is the signal's number."""

    number: int = signal.SIGTERM


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Turns Ctrl-C, SIGTERM and SIGHUP into an event. A second one ends the process at once."""
    stop, before = Stop(), {}

    def handle(number: int, _frame: object) -> None:
        stop.number = number
        stop.set()
        for each in before:
            signal.signal(each, signal.SIG_DFL)

    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN:  # nohup
            before[each] = signal.signal(each, handle)
    try:
        yield stop
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def explained_failures() -> Iterator[None]:
    """Raises UserError if the device runs out of memory or another machine fails."""
    try:
        yield
    except tf.errors.ResourceExhaustedError:
        raise UserError(
            "not enough memory on the device; use a larger --accumulation_steps, a smaller "
            "--batch_size, or --precision=mixed_float16"
        ) from None
    except (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError):
        if worker_of_workers()[1] == 1:
            raise
        raise UserError(
            "another machine of TF_CONFIG stopped answering; see what it printed, and start all "
            "machines again with --resume"
        ) from None


# --- the run's folder -----------------------------------------------------------------------

STATE = "training_state"
"""Subfolder of a model with what training needs to continue. It may be deleted."""

ACCURACY_COLUMNS = ("epoch", "top1_10crop", "top1_centre", "model")
"""Columns of check_accuracy.py's table that --keep_last needs."""

FACTS = ("classes", "batch_size", "seed", "N", "pictures", "workers", "mu", "sigma")
"""Fields of BatchSpec that must not change if training continues within an epoch. Between epochs
only the first must not change."""


@dataclasses.dataclass
class Run:
    """`path_for_saving/<run_folder>`: models by epoch, the rolling state, the log."""

    folder: Path
    chief: bool
    """Whether this machine writes files. Only one of several does."""

    def epochs(self) -> list[int]:
        """Epochs that have a model."""
        return epochs_in(self.folder)

    def rolling(self) -> list[tuple[int, int, Path]]:
        """Epoch, batch and folder of the states saved within epochs, oldest first."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        found = [re.fullmatch(r"state_(\d+)_(\d+)", name) for name in names]
        return sorted((int(m[1]), int(m[2]), self.folder / m[0]) for m in found if m)

    def is_trained_to(self, epoch_end: int) -> bool:
        """Whether the last epoch's model exists and is complete."""
        last = max(self.epochs(), default=-1)
        return last >= epoch_end - 1 and (self.folder / str(last) / "saved_model.pb").exists()

    def claim(self, args: argparse.Namespace) -> None:
        """Locks the run's folder and removes half-written files of killed processes.

        Raises UserError if models would be overwritten or are missing, or if another train.py uses
        the run.
        """
        self._check_position(args)
        if not self.chief:
            return
        utils.make_folder(self.folder)
        utils.lock(self.folder / LOCK, f"{self.folder}: another train.py is training this run")
        atexit.register(self._remove_if_empty)
        utils.remove_leftovers(self.folder)
        self._check_position(args)  # again: from here on no one else changes it

    def _remove_if_empty(self) -> None:
        """Removes the folder if it holds nothing but the lock, as after a refused start."""
        if list(self.folder.glob("*")) == [self.folder / LOCK]:
            utils.remove_lock(self.folder / LOCK)
            self.folder.rmdir()

    def _check_position(self, args: argparse.Namespace) -> None:
        """Raises UserError if models would be overwritten or are missing."""
        epochs, start = self.epochs(), args.epoch_start
        has = f"it has epochs {compact(epochs)}" if epochs else "it has none"
        if args.resume and not self.folder.is_dir():
            raise UserError(
                f"{self.folder}: no such run to --resume; {self.folder.parent} has "
                f"{runs_in(self.folder.parent)}. A new run begins without --resume"
            )
        if start and start - 1 not in epochs and not (args.resume and epochs):
            raise UserError(
                f"--epoch_start={start} continues from the model {self.folder / str(start - 1)}, "
                f"which does not exist; {has}"
            )
        if args.resume:
            return
        if existing := [epoch for epoch in epochs if epoch >= start]:
            raise UserError(
                f"{self.folder / str(existing[0])} already exists and would be overwritten; "
                f"{has}. Add --resume to continue, or use another --run_folder"
            )
        if rolling := self.rolling():
            raise UserError(
                f"{rolling[-1][2]} was saved in an unfinished epoch. Add --resume to continue "
                f"there, or remove that folder to start epoch {start} again"
            )


LOCK = ".train.lock"


def compact(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    spans = []
    for each in numbers:
        if spans and each == spans[-1][1] + 1:
            spans[-1][1] = each
        else:
            spans.append([each, each])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


class BrokenState(UserError):
    """A folder whose training state cannot be read."""


def restore(run: Run, trainer: Trainer, spec: BatchSpec, args: argparse.Namespace) -> int:
    """Loads the state that training continues from, if any, and returns the next step.

    With --resume that is the latest readable state; newer ones are broken and get renamed. Without
    --resume it is the end of epoch_start - 1. Raises UserError.
    """
    ends = run.epochs() if args.resume else [args.epoch_start - 1] * (args.epoch_start > 0)
    states = [(epoch + 1, 0, run.folder / str(epoch)) for epoch in ends]
    if args.resume:
        states += run.rolling()
    broken = []
    for epoch, batch, folder in sorted(states, reverse=True):
        try:
            load_state(trainer, folder, spec, exact=batch > 0)
        except BrokenState as error:
            broken.append((folder, error))
            continue
        for bad, error in broken:
            utils.warn(f"{error}; renamed to {bad.name}.broken, continuing from {folder}")
            if run.chief:
                renamed = bad.with_name(f"{bad.name}.broken")
                shutil.rmtree(renamed, ignore_errors=True)
                bad.rename(renamed)
        warn_of_other_classes(folder, spec.class_names, "the training pictures")
        print(f"continuing from {folder}")
        return spec.step(epoch, batch)
    if broken:
        raise broken[0][1]
    if args.resume:
        print(f"{run.folder} has nothing to continue from; starting at the beginning")
    if args.init_from:
        print(read_weights(trainer.network, args.init_from, spec))
    return spec.step(args.epoch_start)


def load_state(trainer: Trainer, folder: Path, spec: BatchSpec, exact: bool) -> None:
    """Loads a state. Raises BrokenState, or UserError if it belongs to another training.

    A state within an epoch (`exact`) needs the same batches. A state between epochs needs only the
    same classes.
    """
    state = folder / STATE
    if not state.is_dir():
        raise UserError(
            f"{state} is missing, so training cannot continue from {folder}; "
            f"--init_from={folder} starts a new run with its weights"
        )
    saved = utils.read_json(state / "state.json")
    if saved is None:
        raise BrokenState(f"{folder}: its state.json cannot be read")
    for key in FACTS if exact else FACTS[:1]:
        if saved.get(key) != getattr(spec, key):
            way_out = "change it back, or continue from the end of an epoch with --epoch_start"
            raise UserError(
                f"{folder} was trained with {key} = {saved.get(key)}, now {key} is "
                f"{getattr(spec, key)}; {way_out if exact else 'use another --run_folder'}"
            )
    if exact and saved.get("resized") != spec.resized:
        utils.warn(f"{folder} was trained from another set of resized copies; using the new one")
    say_changes(saved.get("recipe", {}), recipe_of(trainer.args))
    weights = state / "weights" if exact else folder / "variables" / "variables"
    try:
        for file in {*state.glob("*"), *weights.parent.glob("*")}:
            if file.is_file():
                utils.read_file(file)  # storage that fails must not pass for a broken state
    except UserError as error:
        way_out = f", or move {folder} away to use an earlier state" if trainer.args.resume else ""
        raise UserError(f"{error}{way_out}") from None
    try:
        network = tf.train.Checkpoint(network=trainer.network)
        network.read(str(weights)).assert_existing_objects_matched()
        status = trainer.state.read(str(state / "state"))
        if saved.get("sgd_momentum"):
            status.assert_existing_objects_matched()
        else:
            status.expect_partial()  # without saved momentum, it starts at zero
    except (tf.errors.OpError, AssertionError, ValueError, LookupError, RuntimeError) as error:
        raise BrokenState(f"{folder}: its training state cannot be read: {brief(error)}") from None


def say_changes(before: dict, now: dict) -> None:
    """Prints the flags of RECIPE that have changed."""
    for name, value in now.items():
        value = list(value) if isinstance(value, tuple) else value
        irrelevant = name == "epoch_end" and now["lr_schedule"] != "cosine"
        if before.get(name, value) != value and not irrelevant:
            print(f"note: --{name} is now {value}; the state was trained with {before[name]}")


def brief(error: Exception) -> str:
    return utils.one_line(str(error))[:150]


class Saver:
    """Writes models and states, each aside and then renamed: it is complete or does not exist."""

    def __init__(self, run: Run, trainer: Trainer, spec: BatchSpec, args: argparse.Namespace):
        self.run, self.trainer, self.spec, self.args = run, trainer, spec, args
        self._last = time.monotonic()

    def is_due(self) -> bool:
        return time.monotonic() - self._last > 60 * self.args.checkpoint_minutes

    def save_rolling(self, step: int) -> bool:
        """Saves the state before `step`, which replaces the previous one. If that fails, warns,
        keeps the previous one and returns False, as do machines that write nothing.
        """
        epoch, batch = divmod(step, self.spec.batches_per_epoch)
        folder = self.run.folder / f"state_{epoch}_{batch}"
        self._last = time.monotonic()
        if not self.run.chief:
            return False
        if batch == 0 or folder.exists():
            return True  # already saved
        self._check_weights(step)
        try:
            with utils.folder_written_aside(folder) as aside:
                self._write_state(aside, step)
                network = tf.train.Checkpoint(network=self.trainer.network)
                network.write(str(aside / STATE / "weights"))
        except (OSError, tf.errors.OpError) as error:
            utils.warn(f"{folder}: not saved: {brief(error)}")
            return False
        self._remove_rolling(but=folder)
        return True

    def save_epoch(self, step: int, stop: Stop, tries: int = 5, pause: float = 60.0) -> None:
        """Saves the model and the state of the epoch that ends before `step`. Raises UserError
        after `tries` failures. After `stop` the pauses between them are short.
        """
        if not self.run.chief:
            return
        self._check_weights(step)
        folder = self.run.folder / str(step // self.spec.batches_per_epoch - 1)
        for attempt in range(1, tries + 1):
            try:
                with utils.folder_written_aside(folder) as aside:
                    self._write_model(aside, step)
                    self._write_state(aside, step)
                break
            except (OSError, tf.errors.OpError) as error:
                if attempt == tries:
                    raise UserError(f"{folder}: cannot be saved: {brief(error)}") from None
                utils.warn(f"{folder}: cannot be saved yet: {brief(error)}; trying again")
                if stop.wait(pause):
                    time.sleep(pause / 30)
        self._last = time.monotonic()
        self._remove_rolling()
        print(f"saved {folder}")
        if self.args.keep_last:
            with self._tidying():
                self._remove_old_epochs(self.args.keep_last)

    def _check_weights(self, step: int) -> None:
        weights = [*self.trainer.network.variables, *self.trainer.momentum]
        if not all(tf.reduce_all(tf.math.is_finite(weight)) for weight in weights):
            raise UserError(
                f"{self.spec.position(step)}: the weights are no longer finite; they were not "
                f"saved. Continue from the last state with a smaller --learning_rate"
            )

    def _write_model(self, folder: Path, step: int) -> None:
        names = ("batch_size", "seed", "N", "mu", "sigma")
        facts = {name: getattr(self.spec, name) for name in names}
        recipe = {**recipe_of(self.args), "step": step, **facts}
        export_model(self.trainer.network, folder, self.spec.class_names, recipe)

    def _write_state(self, folder: Path, step: int) -> None:
        (folder / STATE).mkdir()
        self.trainer.state.write(str(folder / STATE / "state"))
        facts = {name: getattr(self.spec, name) for name in (*FACTS, "resized")}
        facts["sgd_momentum"] = self.trainer.config.train.sgd_momentum
        content = {"step": step, "recipe": recipe_of(self.args), **facts}
        utils.write_text(folder / STATE / "state.json", json.dumps(content, indent=1))

    @contextlib.contextmanager
    def _tidying(self) -> Iterator[None]:
        """Warns of an error. What is old and cannot be removed must not end training."""
        try:
            yield
        except (UserError, OSError, ValueError) as error:
            utils.warn(f"{self.run.folder}: old models and states may stay: {brief(error)}")

    def _remove_rolling(self, but: Path | None = None) -> None:
        with self._tidying():
            for _, _, folder in self.run.rolling():
                if folder != but:
                    utils.remove_folder(folder)

    def _remove_old_epochs(self, keep: int) -> None:
        """Keeps the newest models, the best, and those that check_accuracy.py has yet to see."""
        top1 = {}
        for row in utils.read_csv(self.run.folder / "accuracy.csv", ACCURACY_COLUMNS):
            model = model_recipe(self.run.folder / row["epoch"]).get("fingerprint")
            if row["model"] == model:  # not of an earlier model of this epoch
                top1[int(row["epoch"])] = float(row["top1_10crop"] or row["top1_centre"])
        lock = self.run.folder / ".check_accuracy.lock"
        every = int(lock.read_text() or 1) if utils.is_locked(lock) else None
        best = max(top1, key=top1.get, default=None)
        for epoch in self.run.epochs()[:-keep]:
            needed = every and (epoch + 1) % every == 0 and epoch not in top1
            if epoch != best and not needed:
                utils.remove_folder(self.run.folder / str(epoch))


# --- the log --------------------------------------------------------------------------------

COLUMNS = [
    "step", "epoch", "batch", "seconds", "steps", "loss", "loss_without_l2", "top1",
    "images_per_second", "learning_rate", "waiting_for_data", "r_max", "d_max", "gradient_norm",
    "loss_scale", "skipped_steps",
]  # fmt: skip


class Log(contextlib.AbstractContextManager):
    """Prints a line per interval, and writes the same to training_log.csv and as events.

    With several machines only the chief writes, but all stop if a loss is not finite. A thread
    waits for each step's values and records when the step finished, so the loop does not have to.
    """

    def __init__(
        self, run: Run, trainer: Trainer, spec: BatchSpec, steps: range, args: argparse.Namespace
    ):
        self.run, self.trainer, self.spec, self.steps, self.args = run, trainer, spec, steps, args
        self._pool = ThreadPoolExecutor(1)
        self._under_way, self._settled, self._unsaid = deque(), [], []
        self._stopping = math.inf
        self._waited = self._finished = 0.0
        self._wait = (0.0, 0.0)
        self._start, self._row_start = time.monotonic(), time.perf_counter()
        self._seconds_before = 0.0
        if run.chief:
            self._open()

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Times the wait for a batch."""
        start = time.perf_counter()
        yield
        self._wait = start, time.perf_counter()

    def add(self, step: int, rate: float, values: tf.Tensor) -> None:
        """Adds a step, which may still run on the device, and waits for the one before it. Raises
        UserError if a loss is not finite.
        """
        finished = self._pool.submit(lambda: (values.numpy(), time.perf_counter()))
        self._under_way.append((step, rate, finished, self._wait))
        if len(self._under_way) > 1:
            self._settle_first()
        if time.perf_counter() - self._row_start >= self.args.log_seconds:
            self._write()
            self.say()

    def settle(self) -> None:
        """Waits for all steps and writes their row. Runs before a state is saved, so that no row is
        missing if the process is killed afterwards. Raises UserError if a loss is not finite.
        """
        while self._under_way:
            self._settle_first()
        self._write()

    def say(self) -> None:
        """Prints the rows written since the last call."""
        while self._unsaid:
            self._print(self._unsaid.pop(0))

    def _settle_first(self) -> None:
        step, rate, future, (asked, given) = self._under_way.popleft()
        values, finished = future.result()
        metrics = dict(zip(METRICS, values.tolist(), strict=True))
        # The device waits only once it has finished the previous step.
        self._waited += max(0.0, given - max(asked, self._finished))
        self._finished = finished
        if not math.isfinite(metrics["loss"]):
            raise UserError(
                f"{self.spec.position(step)}: the loss is {metrics['loss']}; nothing was saved "
                f"after it. Continue from the last state with a smaller --learning_rate"
            )
        if metrics["stopping"]:
            self._stopping = min(self._stopping, step)
        self._settled.append(metrics | {"step": step, "learning_rate": rate, "at": finished})

    def should_stop(self, step: int, stop: Stop) -> bool:
        """Whether to stop before `step`.

        Several machines must stop before the same step. A step's values tell all of them that one
        was asked to stop. Two steps later all of them have seen those values.
        """
        return stop.is_set() if self.spec.workers == 1 else self._stopping <= step - 2

    def _write(self) -> None:
        """Writes a row for the steps that finished since the last row."""
        if not self._settled:
            return
        steps, last = self._settled, self._settled[-1]
        seconds = last["at"] - self._row_start
        epoch, batch = divmod(last["step"], self.spec.batches_per_epoch)
        row = {name: mean_of_finite([s[name] for s in steps]) for name in METRICS[:4]} | {
            "step": last["step"],
            "epoch": epoch,
            "batch": batch,
            "seconds": self._seconds_before + time.monotonic() - self._start,
            "steps": len(steps),
            "images_per_second": len(steps) * self.args.batch_size / seconds,
            "learning_rate": last["learning_rate"],
            "waiting_for_data": min(self._waited / seconds, 1.0),
            **{name: last[name] for name in ("r_max", "d_max", "loss_scale")},
            "skipped_steps": round(sum(s["skipped_steps"] for s in steps)),
        }
        self._settled, self._waited = [], 0.0
        self._row_start = last["at"]
        if self.run.chief:
            self._append(row)
            self._unsaid.append(row)

    def _print(self, row: dict) -> None:
        left = (self.steps.stop - row["step"] - 1) * self.args.batch_size / row["images_per_second"]
        scale = ""
        if self.trainer.compute_type == tf.float16:
            scale = f", loss scale {row['loss_scale']:g}, {row['skipped_steps']} skipped"
        print(
            f"epoch {row['epoch']}, {row['batch'] + 1} of "
            f"{plural(self.spec.batches_per_epoch, 'batch')}: loss {row['loss_without_l2']:.3f} + "
            f"{row['loss'] - row['loss_without_l2']:.3f} L2, top-1 {row['top1']:.1%}, "
            f"{row['images_per_second']:,.1f} images/s, rate {row['learning_rate']:.3g}, waiting "
            f"for data {row['waiting_for_data']:.1%}{scale}, {utils.duration(left)} left"
        )

    def _open(self) -> None:
        """Drops the rows of steps that will be trained again, and rewrites the events."""
        path = self.run.folder / "training_log.csv"
        start = divmod(self.steps.start, self.spec.batches_per_epoch)
        rows = [as_numbers(row) for row in utils.read_csv(path, COLUMNS)]
        # By epoch and batch: if the batch size has changed, the steps of old rows are others.
        rows = [row for row in rows if row and (row["epoch"], row["batch"]) < start]
        utils.write_csv(path, COLUMNS, rows)
        self._file = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115
        self._rows = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")
        self._seconds_before = rows[-1]["seconds"] if rows else 0.0
        try:
            self._events = utils.new_event_file(self.run.folder / "events" / "training")
            for row in rows:
                if row["step"] < self.steps.start:
                    self._add_event(row, time.time() - self._seconds_before + row["seconds"])
            self._events.flush()
        except tf.errors.OpError as error:
            raise UserError(
                f"{self.run.folder / 'events'}: cannot be written: {brief(error)}"
            ) from None

    def _append(self, row: dict) -> None:
        try:
            self._rows.writerow({name: utils.csv_cell(row[name]) for name in COLUMNS})
            self._file.flush()
            self._add_event(row, time.time())
            self._events.flush()
        except (OSError, tf.errors.OpError) as error:
            utils.warn(f"the log could not be written: {brief(error)}")

    def _add_event(self, row: dict, wall_time: float) -> None:
        scalars = {f"training/{name}": float(row[name]) for name in COLUMNS[5:]}
        self._events.write(utils.event(int(row["step"]), scalars, wall_time))

    def time_taken(self) -> str:
        return utils.duration(time.monotonic() - self._start)


def mean_of_finite(values: list[float]) -> float:
    """The mean of the finite values. Skipped steps have gradient norms that are not finite."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.inf


def as_numbers(row: dict[str, str]) -> dict[str, float] | None:
    """A row of the log as numbers. None if a cell is not a number."""
    try:
        return {
            name: int(text) if re.fullmatch(r"-?\d+", text) else float(text)
            for name, text in row.items()
        }
    except ValueError:
        return None


if __name__ == "__main__":
    utils.run(explained_failures()(main))
