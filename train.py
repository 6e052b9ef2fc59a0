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
model of epoch E - 1. The log goes to `training_log.csv` and, for TensorBoard, to `events/`.

This file holds, in order: main and the loop, the learning rate, the step, the command line, devices
and machines, the run's folder, what is saved there and loaded, the steps under way, the log.
"""

import os.path
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -I leaves it out

import utils  # first: it says which package is missing
from utils import REQUIRED, Events, Stop, TryAgain, UserError, number, plural, whole

# isort: split
import argparse
import contextlib
import dataclasses
import errno
import itertools
import json
import math
import re
import shutil
import signal
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from preprocess import CROP
from runtime_preprocessing import (
    BatchReader,
    BatchSpec,
    end_preprocessing,
    wait_for_buffer,
    worker_of_workers,
)

with utils.quiet_tensorflow():
    import tensorflow as tf

    import resnet50
    from batch_renorm import in_updates, limits_at, momentum_at
    from resnet50 import LOG_COLUMNS, STATE, TRAINING_LOG, ResNet50, brief, epochs_in, model_recipe


def main() -> None:
    args = parse_arguments()
    config = utils.load_config(args.config)
    strategy = open_devices(args)
    if args.synthetic:
        measure_speed(Trainer(strategy, config, 1000, 1000, args))
        return
    run = Run(config.train.path_for_saving / args.run_folder, args)
    place = run.claim()
    if place.epoch >= args.epoch_end:
        print(f"{run.folder} is already trained to the end of epoch {args.epoch_end - 1}")
        return
    spec = wait_for_buffer(config, args)  # what the batches are made of
    settings = settings_of(config, spec, args)
    alike = settings | {"class names": spec.class_names}
    del alike["resized"]  # machines may have different resized copies
    agree(strategy, alike)
    trainer = Trainer(strategy, config, spec.classes, spec.batches_per_epoch, args)
    restore(run, place, trainer, spec, settings)
    steps = range(spec.step(place.epoch, place.batch), spec.step(args.epoch_end))
    agree(strategy, {"first step": steps.start, "weights": trainer.checksum()})
    announce(run, trainer, spec, steps)
    saver = Saver(run, trainer, spec, settings)
    reader = BatchReader(config, spec, steps, trainer.to_device, args)
    display = Display(run, spec, steps, reader)
    log = Log(run, spec, steps.start, display)
    with utils.stop_on_signals() as stop, UnderWay(log) as under_way, reader, display:
        step = train(trainer, reader, saver, under_way, stop)
    if step < steps.stop:
        print(f"stopped before {spec.position(step)}; the same command with --resume continues")
        sys.exit(128 + (stop.number or signal.SIGTERM))  # another machine may have been stopped
    # Only after the last model is saved: if killed before that, training needs the batches again.
    agree(strategy, {"last step": steps.stop})  # other machines wait until the chief has saved it
    end_preprocessing(reader.folder, spec, args.epoch_end)
    print(
        f"trained to the end of epoch {args.epoch_end - 1} in {log.time_taken()}; the models are "
        f"in {run.folder}. Next: python3 check_accuracy.py --run_folder={args.run_folder} "
        f"--epoch_start={args.epoch_start} --epoch_end={args.epoch_end} --config={args.config}"
    )


def train(
    trainer: "Trainer", reader: BatchReader, saver: "Saver", under_way: "UnderWay", stop: Stop
) -> int:
    """Trains on one batch per step, to the last step or until `stop`. Returns the next step.

    Steps are counted from 0 across all epochs. A step is sent to the device while the previous one
    still runs there. `settle` waits for both. It raises UserError if a loss was not finite, so that
    such weights are never saved.
    """
    step, per_epoch = reader.steps.start, reader.spec.batches_per_epoch
    while step < reader.steps.stop and not under_way.should_stop(step, stop):
        try:
            with under_way.waiting():
                batch = reader.next(stop)
        except BUFFER_TROUBLE:  # the weights are good
            under_way.settle()
            saver.save_state(step)
            raise
        if batch is None:  # stopped while waiting
            break
        rate = learning_rate(step, trainer.args, per_epoch)
        under_way.add(step, rate, trainer.train_batch(*batch, rate, stop.is_set()))
        step += 1
        if step % per_epoch == 0:
            under_way.settle()
            saver.save_epoch(step, stop)
        elif saver.is_due():
            under_way.settle()
            saver.save_state(step)
    under_way.settle()
    saver.save_state(step)
    return step


BUFFER_TROUBLE = (UserError, OSError, MemoryError, tf.errors.ResourceExhaustedError)
"""What reading a batch and copying it to the device may raise."""


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

MEANS = ("loss", "loss_without_l2", "top1", "gradient_norm")
"""What a row of the log averages over its steps."""

METRICS = (*MEANS, "r_max", "d_max", "loss_scale", "skipped_steps", "stopping")
"""What a step returns: float32 each, means over the replicas."""


class Trainer:
    """The network, its momentum and the step, on the devices of a strategy.

    Each replica has a copy of every variable. The copies stay equal because all replicas apply the
    same updates.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        config: SimpleNamespace,
        classes: int,
        batches_per_epoch: int,
        args: argparse.Namespace,
    ):
        self.strategy, self.config, self.classes, self.args = strategy, config, classes, args
        self.replicas = strategy.num_replicas_in_sync
        self.local_replicas = self.replicas // worker_of_workers()[1]
        self.compute_type = tf.as_dtype(args.precision.removeprefix("mixed_"))
        try:
            self.renorm = in_updates(config.batch_renorm, batches_per_epoch)
        except ValueError as error:
            raise UserError(f"{args.config}: {error}") from None
        tf.random.set_seed(config.train.seed)
        with strategy.scope():
            self.network = ResNet50(classes)
            weights = self.network.trainable_variables
            self.momentum = [tf.Variable(tf.zeros_like(w), trainable=False) for w in weights]
            self.updates = tf.Variable(0, trainable=False, dtype=tf.int64)
            self.loss_scale = tf.Variable(2.0**15, trainable=False)
            self.good_updates = tf.Variable(0, trainable=False, dtype=tf.int64)
            self.averaged = ResNet50(classes) if args.ema_decay else None
        self.average(0.0)
        whole_batch = args.jit_compile and self.replicas == 1
        self._compiled_batch = tf.function(self._batch, jit_compile=whole_batch)
        self._compiled_piece = tf.function(
            self._piece, jit_compile=args.jit_compile and not whole_batch
        )

    def to_device(self, images: np.ndarray, labels: np.ndarray) -> tuple[Any, Any]:
        """Copies a batch to the devices: each replica gets its share of the pictures.

        images: float16 [batch_size, 224, 224, 3]; labels: int32 [batch_size].
        """
        if self.replicas == 1:
            return tf.identity(shared(images)), tf.constant(labels)
        share = len(images) // self.local_replicas

        def part(context: tf.distribute.experimental.ValueContext) -> tuple[tf.Tensor, tf.Tensor]:
            local = context.replica_id_in_sync_group % self.local_replicas
            own = slice(local * share, (local + 1) * share)
            with tf.device(self.strategy.extended.worker_devices[local]):
                return tf.identity(shared(images[own])), tf.identity(labels[own])

        return self.strategy.experimental_distribute_values_from_function(part)

    def train_batch(
        self, images: Any, labels: Any, rate: float, stopping: bool = False
    ) -> tf.Tensor:
        """Takes a step with what `to_device` returned. Returns METRICS, float32 [9], which the
        device may still be computing. `stopping`: whether this machine was asked to stop.
        """
        return self._compiled_batch(images, labels, tf.constant(rate), tf.constant(float(stopping)))

    def _batch(self, images: Any, labels: Any, rate: tf.Tensor, stopping: tf.Tensor) -> tf.Tensor:
        """The step on all replicas. With only one, XLA can compile the whole step."""
        if self.replicas == 1:
            return self._replica(images, labels, rate, stopping)
        values = self.strategy.run(self._replica, (images, labels, rate, stopping))
        return self.strategy.reduce(tf.distribute.ReduceOp.MEAN, values, axis=None)

    def _replica(
        self, images: tf.Tensor, labels: tf.Tensor, rate: tf.Tensor, stopping: tf.Tensor
    ) -> tf.Tensor:
        """The step of a replica: gradients, their mean over all replicas, update, averages."""
        gradients, statistics, values = self._pieces(images, labels)
        if self.replicas > 1:
            context = tf.distribute.get_replica_context()
            gradients = context.all_reduce(tf.distribute.ReduceOp.MEAN, gradients)
            statistics = context.all_reduce(tf.distribute.ReduceOp.MEAN, statistics)
        scale, is_float16 = tf.ones([]), self.compute_type == tf.float16
        if is_float16:
            scale = tf.identity(self.loss_scale)
            gradients = [gradient / scale for gradient in gradients]
        norm = tf.linalg.global_norm(gradients)
        usable = tf.math.is_finite(norm)
        weights = self.network.trainable_variables
        for w, v, gradient in zip(weights, self.momentum, gradients, strict=True):
            velocity = self.config.train.sgd_momentum * v - rate * gradient
            weight = w + velocity
            if is_float16:  # an overflow skips the update; the device decides, nothing waits
                velocity, weight = tf.where(usable, velocity, v), tf.where(usable, weight, w)
            v.assign(velocity)
            w.assign(weight)
        if is_float16:
            self._adapt_loss_scale(usable)
        limits = limits_at(self.updates, self.renorm)
        momentum = momentum_at(self.updates, self.renorm.moving_avgs_momentum)
        for layer, (mean, std) in zip(self.network.norms, statistics, strict=True):
            layer.update(mean, std, momentum)
        if self.averaged:
            self.average(momentum_at(self.updates, self.args.ema_decay))
        self.updates.assign_add(1)
        skipped = 1 - tf.cast(usable, tf.float32) if is_float16 else tf.zeros([])
        return tf.stack([*tf.unstack(values), norm, *limits, scale, skipped, stopping])

    def _pieces(
        self, images: tf.Tensor, labels: tf.Tensor
    ) -> tuple[list[tf.Tensor], list[tuple], tf.Tensor]:
        """Takes a replica's pictures in `accumulation_steps` pieces, one after the other, and
        averages what `_piece` returns for each.
        """
        pieces = self.args.accumulation_steps
        if pieces == 1:
            return self._compiled_piece(images, labels)
        images = tf.reshape(images, [pieces, -1, *images.shape[1:]])
        labels = tf.reshape(labels, [pieces, -1])
        first = self._compiled_piece(images[0], labels[0])

        def add(piece: tf.Tensor, sums: list[tf.Tensor]) -> tuple[tf.Tensor, list[tf.Tensor]]:
            parts = tf.nest.flatten(self._compiled_piece(images[piece], labels[piece]))
            return piece + 1, [s + part / pieces for s, part in zip(sums, parts, strict=True)]

        means = [part / pieces for part in tf.nest.flatten(first)]
        _, means = tf.while_loop(lambda piece, _: piece < pieces, add, (1, means))
        return tf.nest.pack_sequence_as(first, means)

    def _piece(
        self, images: tf.Tensor, labels: tf.Tensor
    ) -> tuple[list[tf.Tensor], list[tuple], tf.Tensor]:
        """One forward and one backward pass. Returns the gradients of the (scaled) loss, the batch
        statistics of every normalisation, and float32 [3]: loss, loss without L2, top-1.
        """
        limits = limits_at(self.updates, self.renorm)
        smoothing = self.args.label_smoothing
        with tf.GradientTape() as tape:
            logits, statistics = self.network(tf.cast(images, self.compute_type), limits)
            targets = tf.one_hot(labels, self.classes) * (1 - smoothing) + smoothing / self.classes
            loss = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(targets, logits))
            penalty = self.config.l2.l2_penalty * tf.add_n(
                [tf.nn.l2_loss(kernel) for kernel in self.network.kernels]
            )
            total = loss + penalty
            scaled = total * self.loss_scale if self.compute_type == tf.float16 else total
        gradients = tape.gradient(scaled, self.network.trainable_variables)
        right = tf.equal(tf.argmax(logits, 1, output_type=tf.int32), labels)
        top1 = tf.reduce_mean(tf.cast(right, tf.float32))
        return gradients, statistics, tf.stack([total, loss, top1])

    def _adapt_loss_scale(self, finite: tf.Tensor) -> None:
        """Dynamic loss scaling (Micikevicius et al. 2018, section 3.2): an overflow halves the
        scale, 2,000 steps without one double it.
        """
        good = tf.where(finite, self.good_updates + 1, 0)
        grown = tf.where(good >= 2000, self.loss_scale * 2, self.loss_scale)
        scale = tf.where(finite, tf.minimum(grown, 2.0**24), tf.maximum(self.loss_scale / 2, 1))
        self.loss_scale.assign(scale)
        self.good_updates.assign(tf.where(good >= 2000, tf.zeros_like(good), good))

    def average(self, decay: tf.Tensor | float) -> None:
        """Moves the averages of all variables (--ema_decay). A decay of 0 copies the variables."""
        if self.averaged:
            pairs = zip(self.averaged.variables, self.network.variables, strict=True)
            for average, value in pairs:
                average.assign(decay * average + (1 - decay) * value)

    def state(self, averaged: bool) -> tf.train.Checkpoint:
        """What training needs besides the network. `averaged`: with --ema_decay's averages."""
        parts = {"averaged": self.averaged} if averaged else {}
        return tf.train.Checkpoint(
            momentum=self.momentum,
            updates=self.updates,
            loss_scale=self.loss_scale,
            good_updates=self.good_updates,
            **parts,
        )

    def checksum(self) -> int:
        """Of the network's weights and moving averages."""
        return zlib.crc32(b"".join(each.numpy().tobytes() for each in self.network.variables))


def shared(array: np.ndarray) -> tf.Tensor:
    """A CPU tensor that shares the array's memory and keeps it alive.

    tf.constant would copy: with 256 pictures that takes three times as long, and the training
    thread has to wait. TensorFlow needs tensors to start at a multiple of 64 bytes.
    """
    if array.ctypes.data % 64:
        return tf.constant(array)
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


def measure_speed(trainer: Trainer, seconds: float = 20.0) -> None:
    """Trains on random batches and prints images per second: what the hardware can do."""
    size, generator = trainer.args.batch_size, np.random.default_rng(0)
    images = generator.standard_normal((size, CROP, CROP, 3), np.float32).astype(np.float16)
    batch = trainer.to_device(images, generator.integers(0, 1000, size).astype(np.int32))
    print(f"measuring for {seconds:.0f} s with random batches; nothing is saved")
    for _ in range(2):
        trainer.train_batch(*batch, 0.0).numpy()  # builds the step
    under_way, count, start = deque(), 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        under_way.append(trainer.train_batch(*batch, 0.0))
        if len(under_way) > 1:  # wait for the step before last, as training does
            under_way.popleft().numpy()
            count += 1
    rate = count * size / (time.perf_counter() - start)
    print(
        f"this hardware trains {rate:,.1f} images/s in {trainer.args.precision}, batches of {size}"
    )


# --- the command line -----------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = utils.Parser(
        "Trains a ResNet-50 with batch renormalization from the buffer's batches.",
        "train.py --run_folder=mytestrun --epoch_start=0 --epoch_end=30 \\\n"
        "    --batch_size=64 --learning_rate=0.01",
    )
    add = parser.add
    add("--run_folder", resnet50.run_name, "the run's folder in path_for_saving", REQUIRED)
    parser.add_epochs()
    add("--batch_size", whole(1), "pictures per batch, shared among the GPUs", REQUIRED)
    add("--learning_rate", number(0), "highest learning rate", REQUIRED)
    add("--lr_schedule", SCHEDULES, "constant (default), step or cosine", "constant")
    add("--lr_drop_epochs", increasing(1), "where step divides the rate by 10, e.g. 30,60,80", ())
    add("--warmup_epochs", number(0), "epochs in which the rate rises from 0 (default: 0)", 0.0)
    add("--label_smoothing", number(0, 0.99), "share of the target spread over all classes", 0.0)
    add("--accumulation_steps", whole(1), "pieces that a batch is split into, to save memory", 1)
    add("--ema_decay", number(0, 0.999999), "save moving averages of the weights, e.g. 0.9999")
    add("--init_from", Path, "saved model whose weights, or whole state, a new run takes")
    add("--resume", None, "continue where the run stopped")
    add("--checkpoint_minutes", number(0), "minutes between two saved states (default: 10)", 10.0)
    add("--keep_last", whole(1), "newest models to keep besides the best (default: all)")
    add("--log_seconds", number(0), "seconds between two log lines (default: 30)", 30.0)
    add("--precision", PRECISIONS, "float32, mixed_float16 (on a GPU) or mixed_bfloat16")
    add("--jit_compile", None, "compile the step with XLA")
    add("--gpu", increasing(0), "GPUs to train on, such as 0,1 (default: 0, else the CPU)")
    add("--deterministic", None, "get the same result every time, but slower")
    add("--synthetic", None, "measure the speed on random batches and exit")
    add("--verbose", None, "show TensorFlow's own messages")  # see utils.quiet_tensorflow
    args = parser.parse()
    check_arguments(args)
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Raises UserError for flags that do not go together. Warns of a rate that never drops."""
    if (args.lr_schedule == "step") != bool(args.lr_drop_epochs):
        raise UserError("--lr_schedule=step and --lr_drop_epochs=30,60,80 need each other")
    if late := [epoch for epoch in args.lr_drop_epochs if epoch >= args.epoch_end]:
        utils.warn(
            f"--lr_drop_epochs: training ends before epoch {late[0]} (--epoch_end="
            f"{args.epoch_end}), so the rate does not drop there"
        )
    if args.warmup_epochs >= args.epoch_end:
        raise UserError(
            f"--warmup_epochs={args.warmup_epochs:g} must be less than --epoch_end={args.epoch_end}"
        )
    if args.synthetic and worker_of_workers()[1] > 1:
        raise UserError("--synthetic measures one machine; run it without TF_CONFIG")


SCHEDULES = ("constant", "step", "cosine")
PRECISIONS = ("float32", "mixed_float16", "mixed_bfloat16")
FLAGS = (
    "learning_rate", "lr_schedule", "lr_drop_epochs", "warmup_epochs", "epoch_end",
    "label_smoothing", "accumulation_steps", "ema_decay", "precision",
)  # fmt: skip
"""Flags that affect the result. States and models record their values."""


def increasing(minimum: int) -> Callable[[str], list[int]]:
    """Argument type: increasing whole numbers, such as 20,40,70."""

    def parse(text: str) -> list[int]:
        numbers = [whole(minimum)(part) for part in text.split(",")]
        if numbers != sorted(set(numbers)):
            raise argparse.ArgumentTypeError(f"expected increasing numbers, not {text!r}")
        return numbers

    return parse


def announce(run: "Run", trainer: Trainer, spec: BatchSpec, steps: range) -> None:
    """Prints what this run will do."""
    args, per_epoch = trainer.args, spec.batches_per_epoch
    devices = "the GPU" if tf.config.get_visible_devices("GPU") else "the CPU"
    if trainer.replicas > 1:
        devices = f"{trainer.replicas} replicas"
    print(
        f"{plural(spec.classes, 'class')}, {plural(spec.N, 'training picture')}; from "
        f"{spec.position(steps.start)} to the end of epoch {args.epoch_end - 1}: "
        f"{plural(len(steps), 'step')} of {plural(args.batch_size, 'picture')}, {per_epoch:,} per "
        f"epoch, {args.precision} on {devices}"
    )
    announce_limits(trainer.renorm, steps, per_epoch)
    if run.chief:
        free = utils.file_size(shutil.disk_usage(run.folder).free)
        print(f"models go to {run.folder}, where {free} are free")
    print("the first step takes longest, because TensorFlow builds the network's graph")


def announce_limits(limits: SimpleNamespace, steps: range, per_epoch: int) -> None:
    """Prints in which epochs batch renormalization relaxes its limits. Warns if it never does."""
    last = steps.stop - 1
    if min(limits.start_relaxing_rmax, limits.start_relaxing_dmax) > last:
        utils.warn(
            f"[batch_renorm] start_relaxing_rmax and start_relaxing_dmax are after the last "
            f"update, {last}: this run is plain batch normalization (fine for a short trial)"
        )
        return

    def when(start: int, reach: int) -> str:
        if reach < steps.start:
            return "(already relaxed)"
        return f"in epochs {start / per_epoch:.1f} to {reach / per_epoch:.1f}"

    print(
        f"batch renormalization relaxes r_max to {limits.rmax_max:g} "
        f"{when(limits.start_relaxing_rmax, limits.reach_rmax_max)}, d_max to "
        f"{limits.dmax_max:g} {when(limits.start_relaxing_dmax, limits.reach_dmax_max)}"
    )


# --- devices and machines -------------------------------------------------------------------


def open_devices(args: argparse.Namespace) -> tf.distribute.Strategy:
    """The strategy for the chosen GPUs, and for all machines if there are several.

    Raises UserError for a GPU that does not exist, and for a batch that cannot be shared.
    """
    if args.deterministic:
        tf.config.experimental.enable_op_determinism()
    wanted = args.gpu or [0]
    chosen = utils.choose_gpus(wanted, required=args.gpu is not None)
    args.gpu = wanted[: len(chosen)]
    args.precision = args.precision or ("mixed_float16" if chosen else "float32")
    parts = max(len(chosen), 1) * args.accumulation_steps
    if args.batch_size % parts:
        raise UserError(
            f"--batch_size={args.batch_size} cannot be split into {parts} equal parts: as many as "
            f"GPUs times --accumulation_steps"
        )
    if worker_of_workers()[1] > 1:
        return tf.distribute.MultiWorkerMirroredStrategy()
    if len(chosen) > 1:
        return tf.distribute.MirroredStrategy([f"GPU:{i}" for i in range(len(chosen))])
    return tf.distribute.get_strategy()


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
                    f"worker {other} of TF_CONFIG has a different {name} from this one; give "
                    f"all machines the same command line, config file and pictures, and the same "
                    f"[train] path_for_saving (a shared folder)"
                )


def explained_main() -> None:
    """`main`. Raises UserError if the device runs out of memory or another machine fails."""
    try:
        main()
    except tf.errors.ResourceExhaustedError:
        raise UserError(
            "not enough memory on the device; use a larger --accumulation_steps, a smaller "
            "--batch_size, or --precision=mixed_float16"
        ) from None
    except (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError):
        if worker_of_workers()[1] == 1:
            raise
        raise TryAgain(
            "another machine of TF_CONFIG stopped answering; see what it printed, and start all "
            "machines again with --resume"
        ) from None


# --- the run's folder -----------------------------------------------------------------------


class Place(NamedTuple):
    """Where training begins: before which batch, and from which folder, if from any."""

    epoch: int
    batch: int
    folder: Path | None


class Run:
    """`path_for_saving/<run_folder>`: models by epoch, the state within an epoch, the log."""

    def __init__(self, folder: Path, args: argparse.Namespace):
        self.folder, self.args = folder, args
        self.chief = worker_of_workers()[0] == 0
        """Whether this machine writes files. Only one of several does."""

    def claim(self) -> Place:
        """Begins the run's log, locks its folder and returns where training begins.

        Removes what killed processes left half-written. Raises UserError if training cannot begin
        or another train.py trains this run.
        """
        place = self.starting_point()  # refuses a mistake before anything is made
        if not self.chief:
            return place
        with contextlib.suppress(FileExistsError):  # first of all: --resume looks for it
            open(utils.make_folder(self.folder) / TRAINING_LOG, "x").close()
        self.hold()
        utils.remove_leftovers(self.folder, "[0-9]*", "state_*", TRAINING_LOG)
        return self.starting_point()  # until it was locked, another train.py could change the run

    def hold(self) -> None:
        """Locks the folder, or locks it again: while training runs, somebody may move the folder
        or remove the lock. check_accuracy.py keeps off the GPUs that the lock names. Raises
        UserError if another train.py trains this run, and OSError.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = self.folder / resnet50.RUN_LOCK
        utils.hold_lock(lock, f"{self.folder}: another train.py is training this run")
        resnet50.write_lock_note(lock, resnet50.LockNote(gpus=self.args.gpu))

    def places(self) -> list[Place]:
        """What training can continue from, the latest first."""
        # Backups of models may be named by the date: no run has an epoch 261224.
        epochs = [epoch for epoch in epochs_in(self.folder) if epoch < self.args.epoch_end]
        found = [Place(epoch + 1, 0, self.folder / str(epoch)) for epoch in epochs]
        for name in utils.patiently(os.listdir, self.folder) if self.folder.is_dir() else []:
            if match := re.fullmatch(r"state_([0-9]{1,9})_([0-9]{1,9})", name):
                found.append(Place(int(match[1]), int(match[2]), self.folder / name))
        return sorted(found, reverse=True)

    def starting_point(self) -> Place:
        """Where training begins. Raises UserError if what it needs is missing, or if it would
        overwrite something.
        """
        for path in (self.folder, self.args.init_from):
            if odd := re.search(r"[\[\]\\]", str(path)):
                raise UserError(f"{path}: TensorFlow cannot read from a path with {odd[0]} in it")
        args, places, start = self.args, self.places(), self.args.epoch_start
        epochs = ", ".join(map(str, epochs_in(self.folder))) or "none"
        if args.resume and not (places or (self.folder / TRAINING_LOG).exists()):
            raise UserError(
                f"{self.folder}: no such run to --resume; {self.folder.parent} has "
                f"{resnet50.runs_in(self.folder.parent)}. A new run begins without --resume"
            )
        place = Place(start, 0, args.init_from)
        if args.resume and places:
            place = places[0]
        elif args.init_from:
            model_recipe(args.init_from)  # raises UserError if it is not a model
        elif start:
            place = Place(start, 0, self.folder / str(start - 1))
            if place not in places:
                raise UserError(
                    f"--epoch_start={start} continues from the model {place.folder}, which does "
                    f"not exist; the run has epochs: {epochs}"
                )
        later = [each.folder for each in reversed(places) if each[:2] > place[:2]]
        way_out = "add --resume to continue from the latest" if later else "move it away"
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        for epoch in sorted(int(name) for name in names if name.isdecimal()):
            if place.epoch <= epoch < args.epoch_end:  # also if it is not a model
                later.append(self.folder / str(epoch))
        if later:
            raise UserError(
                f"{later[0]} already exists and would be replaced; the run has epochs: {epochs}; "
                f"{way_out}, or use another --run_folder"
            )
        if place.epoch + place.batch > 0:
            self.read_state(place)  # raises UserError before the first batch is waited for
        return place

    def read_state(self, place: Place) -> "StateRecord":
        """What the state at `place` says of itself. Raises UserError."""
        state = place.folder / STATE
        try:
            record = utils.read_record(StateRecord, state / "state.json")
        except UserError as error:
            raise UserError(f"{error}; {self.way_out(place)}") from None
        if record is None:
            raise UserError(
                f"{state} is missing, so training cannot continue from {place.folder}; start a new "
                f"run with --init_from={place.folder}, or {self.way_out(place)}"
            )
        if (record.epoch, record.batch) != place[:2]:
            raise UserError(
                f"{place.folder}: training continues from it at epoch {record.epoch}, batch "
                f"{record.batch}, not at epoch {place.epoch}, batch {place.batch}"
            )
        return record

    def way_out(self, place: Place) -> str:
        """What to do about a state that training cannot continue from."""
        if place.folder == self.args.init_from:
            return "choose another model for --init_from"
        older = [each for each in self.places() if each < place]
        where = f"from {older[0].folder}" if older else "at the beginning"
        return f"remove {place.folder}, and --resume continues {where}"

    def accuracies(self) -> dict[int, float]:
        """Top-1 by epoch of the models that check_accuracy.py has evaluated. Raises UserError."""
        top1 = {}
        for row in utils.read_csv(self.folder / resnet50.ACCURACY, resnet50.ACCURACY_COLUMNS):
            model, ten_crops = self.folder / str(row["epoch"]), row["top1_10crop"]
            # A row may be of an earlier model of this epoch.
            if resnet50.is_model(model) and row["model"] == model_recipe(model).fingerprint:
                top1[row["epoch"]] = row["top1_centre"] if ten_crops is None else ten_crops
        return top1


# --- what is saved and loaded ---------------------------------------------------------------


@dataclasses.dataclass
class StateRecord:
    """`training_state/state.json`: where training was when it was saved, and how it was trained."""

    step: int
    epoch: int
    batch: int
    settings: dict[str, Any]  # what `settings_of` returned


BATCH_SETTINGS = (
    "classes", "batch_size", "seed", "N", "pictures", "workers", "mu", "sigma", "crop",
)  # fmt: skip
"""Fields of BatchSpec that must not change if training continues within an epoch. Between epochs
only the classes must not change."""


def settings_of(
    config: SimpleNamespace, spec: BatchSpec, args: argparse.Namespace
) -> dict[str, Any]:
    """All that decides how training goes, by the names that users know, as JSON keeps it."""
    settings = {name: getattr(spec, name) for name in (*BATCH_SETTINGS, "resized")}
    settings |= {f"--{name}": getattr(args, name) for name in FLAGS}
    settings["[l2] l2_penalty"] = config.l2.l2_penalty
    settings["[train] sgd_momentum"] = config.train.sgd_momentum
    for name, value in vars(config.batch_renorm).items():
        in_epochs = isinstance(value, utils.Epochs)
        settings[f"[batch_renorm] {name}"] = f"{value:g} epochs" if in_epochs else value
    return json.loads(json.dumps(settings))


def changes(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """A line for each setting that is not as it was when a state was saved."""
    for name, value in now.items():
        irrelevant = name == "--epoch_end" and now["--lr_schedule"] != "cosine"
        if before.get(name, value) == value or irrelevant:
            continue
        if name == "pictures":
            yield "the training pictures have changed since the state was saved"
        else:
            yield f"{name} is now {value}; the state was trained with {before[name]}"


def restore(
    run: Run, place: Place, trainer: Trainer, spec: BatchSpec, settings: dict[str, Any]
) -> None:
    """Loads what training begins from, and says what has changed since. Raises UserError."""
    folder = place.folder
    if folder is None:
        print(f"{run.folder}: starting at the beginning")
        return
    if place.epoch + place.batch == 0:  # a new run with the weights of --init_from
        names, mu, sigma = spec.class_names, spec.mu, spec.sigma
        print(resnet50.read_weights(trainer.network, folder, names, mu, sigma))
        trainer.average(0.0)
        return
    record = run.read_state(place)
    for name in BATCH_SETTINGS if place.batch else ("classes",):
        if record.settings.get(name) != settings[name]:
            way_out = f"change it back, or {run.way_out(place)}"
            raise UserError(
                f"{folder} was trained with {name} = {record.settings.get(name)}, now {name} is "
                f"{settings[name]}; {way_out if place.batch else 'use another --run_folder'}"
            )
    if place.batch and divmod(record.step, spec.batches_per_epoch) != place[:2]:
        epochs = f"epochs of {plural(spec.batches_per_epoch, 'batch')}"
        raise UserError(f"{folder} does not fit {epochs}; {run.way_out(place)}")
    try:
        load_state(trainer, folder, averaged=bool(record.settings.get("--ema_decay")))
    except resnet50.DAMAGED as error:
        reason = f"its training state cannot be read: {brief(error)}"
        raise UserError(f"{folder}: {reason}; {run.way_out(place)}") from None
    trainer.updates.assign(spec.step(place.epoch, place.batch))  # the batch size may have changed
    if place.batch == 0:
        resnet50.warn_of_other_classes(folder, spec.class_names, "the training pictures")
    for line in changes(record.settings, settings):
        print(f"note: {line}")
    print(f"continuing from {folder}")


def load_state(trainer: Trainer, folder: Path, averaged: bool) -> None:
    """Loads the network and all else. `averaged`: whether the state holds averages of the weights.

    Raises what `resnet50.read_checkpoint` raises.
    """
    weights = folder / "variables" / "variables"  # those of the model
    if averaged or not resnet50.is_model(folder):  # see `Saver._write`
        weights = folder / STATE / "weights"
    resnet50.read_checkpoint(tf.train.Checkpoint(network=trainer.network), weights)
    averaged = averaged and trainer.averaged is not None
    resnet50.read_checkpoint(trainer.state(averaged), folder / STATE / "state")
    if not averaged:
        trainer.average(0.0)


class Saver:
    """Writes models and states, each aside and then renamed: it is complete or does not exist."""

    def __init__(self, run: Run, trainer: Trainer, spec: BatchSpec, settings: dict[str, Any]):
        self.run, self.trainer, self.spec, self.settings = run, trainer, spec, settings
        self._last = time.monotonic()

    def is_due(self) -> bool:
        return time.monotonic() - self._last > 60 * self.trainer.args.checkpoint_minutes

    def save_state(self, step: int) -> None:
        """Saves the state before `step`, which replaces the previous one; at the end of an epoch
        its model is enough. If that fails, warns and keeps the previous one.
        """
        epoch, batch = divmod(step, self.spec.batches_per_epoch)
        folder = self.run.folder / f"state_{epoch}_{batch}"
        self._last = time.monotonic()
        if not self.run.chief or batch == 0:
            return
        try:
            if folder.exists():
                return
            self._write(folder, step, model=False)
        except (OSError, tf.errors.OpError) as error:
            utils.warn(f"{folder}: not saved: {brief(error)}; the previous state stays")
            return
        self._tidy(newest=folder)

    def save_epoch(self, step: int, stop: Stop) -> None:
        """Saves the model and the state of the epoch that ends before `step`. If that fails, tries
        again each minute, sooner after a stop. Raises UserError after five failures.
        """
        if not self.run.chief:
            return
        folder = self.run.folder / str(step // self.spec.batches_per_epoch - 1)
        for attempt in range(1, 6):
            try:
                self._write(folder, step, model=True)
                break
            except (OSError, tf.errors.OpError) as error:
                if attempt == 5:
                    raise UserError(f"{folder}: cannot be saved: {brief(error)}") from None
                utils.warn(f"{folder}: cannot be saved yet: {brief(error)}; trying again")
                if stop.wait(60):
                    time.sleep(2)
        self._last = time.monotonic()
        print(f"saved {folder}")
        self._tidy(newest=folder)

    def _write(self, folder: Path, step: int, model: bool) -> None:
        """Writes a state, with or without a model. Raises UserError for weights that are not
        finite, OSError and tf.errors.OpError.
        """
        trainer, spec, args = self.trainer, self.spec, self.trainer.args
        weights = [*trainer.network.variables, *trainer.momentum]
        if not all(tf.reduce_all(tf.math.is_finite(weight)) for weight in weights):
            raise UserError(
                f"{spec.position(step)}: the weights are no longer finite; they were not saved. "
                f"Continue from the last state with a smaller --learning_rate"
            )
        self.run.hold()
        with utils.folder_written_aside(folder) as aside:
            if model:
                flags = {name: getattr(args, name) for name in FLAGS}
                recipe = resnet50.ModelRecipe(spec.class_names, spec.mu, spec.sigma, flags, step)
                resnet50.export_model(trainer.averaged or trainer.network, aside, recipe)
            state = aside / STATE
            state.mkdir()
            trainer.state(trainer.averaged is not None).write(str(state / "state"))
            if trainer.averaged or not model:  # else the model holds the weights
                tf.train.Checkpoint(network=trainer.network).write(str(state / "weights"))
            position = divmod(step, spec.batches_per_epoch)
            record = StateRecord(step, *position, self.settings)
            utils.write_record(state / "state.json", record)

    def _tidy(self, newest: Path) -> None:
        """Removes older states, and older models if --keep_last asks for it. If something cannot be
        removed, warns: that must not end training.
        """
        try:
            for state in self.run.places():
                if state.batch and state.folder != newest:
                    utils.remove_folder(state.folder)
            if self.trainer.args.keep_last and newest.name.isdecimal():
                self._remove_old_epochs(self.trainer.args.keep_last, int(newest.name))
        except (UserError, OSError) as error:
            utils.warn(f"{self.run.folder}: old models and states may stay: {brief(error)}")

    def _remove_old_epochs(self, keep: int, newest: int) -> None:
        """Keeps the newest models, the best, and those that check_accuracy.py has yet to see."""
        top1 = self.run.accuracies()
        checked = resnet50.read_lock_note(self.run.folder / resnet50.CHECKER_LOCK).epochs
        best = max(top1, key=top1.get, default=None)
        for epoch in [epoch for epoch in epochs_in(self.run.folder) if epoch <= newest][:-keep]:
            awaited = epoch in checked and epoch not in top1
            if epoch != best and not awaited:
                utils.remove_folder(self.run.folder / str(epoch))


# --- the steps under way --------------------------------------------------------------------


class Finished(NamedTuple):
    """A step that the device has finished. Times are those of time.perf_counter."""

    step: int
    rate: float
    metrics: dict[str, float]
    asked: float  # when its batch was asked for
    idle: float  # seconds that the device waited for the batch
    previous: float | None  # when the step before was finished; None for the first one
    at: float  # when it was finished


class UnderWay(contextlib.AbstractContextManager):
    """The steps that were sent to the device, until it has finished them. Then the log has them."""

    def __init__(self, log: "Log"):
        self.log = log
        self._steps: deque[tuple[int, float, tuple[float, float], Future]] = deque()
        self._thread = ThreadPoolExecutor(1)
        """Waits for each step's values and notes when they came, so the loop does not have to."""
        self._wait = (0.0, 0.0)  # when the batch was asked for, and when it was there
        self._previous: float | None = None  # when the last step was finished
        self._stopping = math.inf  # the first step in which a machine was asked to stop

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Times the wait for a batch."""
        display = self.log.display
        start = display.waiting_since = time.perf_counter()
        yield
        self._wait, display.waiting_since = (start, time.perf_counter()), None

    def add(self, step: int, rate: float, values: tf.Tensor) -> None:
        """Adds a step, which may still run on the device, and waits for the one before it. Raises
        UserError if a loss is not finite.
        """
        done = self._thread.submit(lambda: (values.numpy().tolist(), time.perf_counter()))
        self._steps.append((step, rate, self._wait, done))
        self._finish(leave=1)

    def settle(self) -> None:
        """Waits for all steps and writes their row. Runs before a state is saved, so that no row is
        missing if the process is killed afterwards. Raises UserError if a loss is not finite.
        """
        self._finish(leave=0)
        self.log.write_row()

    def should_stop(self, step: int, stop: Stop) -> bool:
        """Whether to stop before `step`.

        Several machines must stop before the same step. A step's values tell all of them that one
        was asked to stop. Two steps later all of them have seen those values.
        """
        return stop.is_set() if self.log.spec.workers == 1 else self._stopping <= step - 2

    def _finish(self, leave: int) -> None:
        """Waits until only `leave` steps are left. Raises UserError if one of the others has a loss
        that is not finite.
        """
        while len(self._steps) > leave:
            step, rate, (asked, given), done = self._steps.popleft()
            values, at = done.result()
            metrics = dict(zip(METRICS, values, strict=True))
            if not math.isfinite(metrics["loss"]):
                self.log.write_row()  # the steps before it
                raise UserError(
                    f"{self.log.spec.position(step)}: the loss is {metrics['loss']}; nothing was "
                    f"saved after it. Continue from the last state with a smaller --learning_rate"
                )
            if metrics["stopping"]:
                self._stopping = min(self._stopping, step)
            # As long as the step before was at work, the device did not wait.
            idle = max(0.0, given - max(asked, self._previous or 0.0))
            self.log.add(Finished(step, rate, metrics, asked, idle, self._previous, at))
            self._previous = at


# --- the log --------------------------------------------------------------------------------


class Log:
    """Writes a row of training_log.csv per interval, and the same as events. With several machines
    only the chief does.
    """

    def __init__(self, run: Run, spec: BatchSpec, first: int, display: "Display"):
        """`first`: the step that training begins with."""
        self.run, self.spec, self.first, self.display = run, spec, first, display
        self._row: list[Finished] = []
        self._start, self._seconds_before = time.monotonic(), 0.0
        self._next_row = self._start + run.args.log_seconds
        if run.chief:
            self._open()

    def add(self, finished: Finished) -> None:
        """Adds a step, and writes a row if it is time."""
        self._row.append(finished)
        self.display.recent.append(finished)
        if time.monotonic() >= self._next_row:
            self.write_row()

    def write_row(self) -> None:
        """Writes a row for the steps that were added since the last row."""
        self._next_row = time.monotonic() + self.run.args.log_seconds
        steps, self._row = self._row, []
        if not steps or not self.run.chief:
            return
        row = summary(steps, self.spec)
        row["seconds"] = self._seconds_before + time.monotonic() - self._start
        try:
            self._append({name: utils.csv_cell(row[name]) for name in LOG_COLUMNS})
            self._events.add(row["step"], {f"training/{name}": row[name] for name in CURVES})
            self._events.flush()
        except (OSError, tf.errors.OpError) as error:
            utils.warn(f"the log could not be written: {brief(error)}")
        self.display.print_row(row)

    def time_taken(self) -> str:
        return utils.duration(time.monotonic() - self._start)

    def _append(self, row: dict[str, object]) -> None:
        """Adds a row to the table, which somebody may have replaced or removed meanwhile: the whole
        row, or nothing if the disk is full.
        """
        with open(self.run.folder / TRAINING_LOG, "ab", buffering=0) as file:
            size = file.tell()
            lines = [LOG_COLUMNS, row.values()] if size == 0 else [row.values()]
            text = "".join(f"{','.join(map(str, cells))}\n" for cells in lines).encode()
            if file.write(text) < len(text):
                file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _open(self) -> None:
        """Drops the rows of steps that will be trained again."""
        path = self.run.folder / TRAINING_LOG
        begin = divmod(self.first, self.spec.batches_per_epoch)
        rows = utils.read_csv(path, LOG_COLUMNS)
        # By epoch and batch: if the batch size has changed, old rows count steps differently.
        rows = [row for row in rows if (row["epoch"], row["batch"]) < begin]
        utils.write_csv(path, LOG_COLUMNS, rows)
        self._seconds_before = rows[-1]["seconds"] if rows else 0.0
        # If epochs now have another number of steps, step numbers would collide with older events'.
        part = f"training_{self.spec.batches_per_epoch}_steps_per_epoch"
        folder = self.run.folder / "events" / part
        try:
            self._events = Events(folder, self.first)
        except tf.errors.OpError as error:
            raise UserError(f"{folder}: cannot be written: {brief(error)}") from None


CURVES = [
    name for name in LOG_COLUMNS if name not in ("step", "epoch", "batch", "seconds", "steps")
]
"""The columns of the log that are written as events."""


def summary(steps: list[Finished], spec: BatchSpec, waiting: float = 0.0) -> dict[str, Any]:
    """The row of the log for these steps. `waiting`: seconds that a wait has taken since.

    The first step of all builds the graph, after a first wait that may be long. The speed and the
    share of waiting leave it out, unless there is no other.
    """
    last, timed = steps[-1], steps
    if steps[0].previous is None and len(steps) > 1:
        timed = steps[1:]
    seconds = last.at - (timed[0].previous or timed[0].asked) + waiting
    idle = sum(step.idle for step in timed) + waiting
    epoch, batch = divmod(last.step, spec.batches_per_epoch)
    return {
        "step": last.step,
        "epoch": epoch,
        "batch": batch,
        "steps": len(steps),
        **{name: mean_of_finite([step.metrics[name] for step in steps]) for name in MEANS},
        "images_per_second": len(timed) * spec.batch_size / seconds,
        "learning_rate": last.rate,
        "waiting_for_data": min(idle / seconds, 1.0),
        **{name: last.metrics[name] for name in ("r_max", "d_max", "loss_scale")},
        "skipped_steps": round(sum(step.metrics["skipped_steps"] for step in steps)),
    }


def mean_of_finite(values: list[float]) -> float:
    """The mean of the finite values. Skipped steps have gradient norms that are not finite."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.inf


class Display(contextlib.AbstractContextManager):
    """Prints the rows of the log. On a terminal it prints only those that end an epoch, and redraws
    a line with the present state below them every second.
    """

    def __init__(self, run: Run, spec: BatchSpec, steps: range, reader: BatchReader):
        self.run, self.spec, self.steps, self.reader = run, spec, steps, reader
        self.recent: deque[Finished] = deque(maxlen=100)  # these steps tell the present state
        self.waiting_since: float | None = None
        self._is_terminal = sys.stdout.isatty() and run.chief
        self._best: list[str] = []
        self._closed = threading.Event()

    def __enter__(self) -> "Display":
        if self._is_terminal:
            threading.Thread(target=self._redraw, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    def _redraw(self) -> None:
        for second in itertools.count():
            if second % 60 == 0:
                self._best = self._best_accuracy()
            if self._closed.wait(1.0):
                return
            utils.show_status(self.status())

    def _best_accuracy(self) -> list[str]:
        with contextlib.suppress(UserError, OSError):
            if accuracies := self.run.accuracies().values():
                return [f"best {max(accuracies):.1%}"]
        return []

    def print_row(self, row: dict[str, Any]) -> None:
        per_epoch = self.spec.batches_per_epoch
        if not self._is_terminal:
            more = [f"loss with L2 {row['loss']:.3f}", f"rate {row['learning_rate']:.3g}"]
            where = f"epoch {row['epoch']}, {row['batch'] + 1} of {plural(per_epoch, 'batch')}"
            print(f"{where}: {', '.join([*self._parts(row), *more])}")
        elif row["batch"] + 1 == per_epoch:
            latest = summary(list(self.recent), self.spec)  # the row may be of one step
            print(fitted(f"end of epoch {row['epoch']}:", self._parts(latest)))

    def status(self) -> str:
        """The present state of training: a bar of the epoch, and as much as fits the terminal."""
        recent, since = list(self.recent), self.waiting_since
        step = recent[-1].step + 1 if recent else self.steps.start
        epoch, batch = divmod(min(step, self.steps.stop - 1), self.spec.batches_per_epoch)
        parts = ["waiting for a batch" if since else "the first step takes longest"]
        if recent:
            waiting = time.perf_counter() - since if since else 0.0
            parts = [*self._parts(summary(recent, self.spec, waiting)), *self._best]
        with contextlib.suppress(OSError):
            steps = map(self.spec.step_of, os.listdir(self.reader.folder))
            ready = {each for each in steps if each is not None and each >= step}
            parts.append(f"{len(ready)} ready")
        width = shutil.get_terminal_size().columns // 16
        bar = utils.bar(batch / self.spec.batches_per_epoch, width)
        return fitted(f"epoch {epoch} {bar}", parts)

    def _parts(self, row: dict[str, Any]) -> list[str]:
        """What a line says, the most important first."""
        return [
            f"loss {row['loss_without_l2']:.3f}",
            f"top-1 {row['top1']:.1%}",
            f"{row['images_per_second']:,.1f} images/s",
            f"{self._time_left()} left",
            f"waiting {row['waiting_for_data']:.1%}",
        ]

    def _time_left(self) -> str:
        recent = list(self.recent)
        if len(recent) < 2:  # only the step that builds the graph
            return "?"
        rate = summary(recent, self.spec)["images_per_second"]
        images = (self.steps.stop - 1 - recent[-1].step) * self.spec.batch_size
        return utils.duration(images / rate)


def fitted(start: str, parts: list[str]) -> str:
    """A line that fits the terminal: its start, and as many of the parts as there is room for."""
    room = shutil.get_terminal_size().columns - 1
    for part in parts:
        if len(start) + len(f" {part}") <= room:
            start += f" {part}"
    return start


if __name__ == "__main__":
    utils.run(explained_main)
