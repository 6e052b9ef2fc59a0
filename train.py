"""Trains the ResNet-50 of resnet50.py from the batches that runtime_preprocessing.py prepares.

    python3 train.py --run_folder=mytestrun --epoch_start=0 --epoch_end=30 --batch_size=64 \\
        --learning_rate=0.01

saves a model after each epoch e to `saved_models/mytestrun/<e>/`: a TensorFlow SavedModel and, in
the same folder, all that training needs to go on from there. `--resume` added to the same command
goes on at the exact batch where training stopped, however it stopped. What the log lines say is
also in `training_log.csv` and, for TensorBoard, in `events/`.
"""

import argparse
import atexit
import contextlib
import csv
import dataclasses
import json
import math
import os
import queue
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import utils
from utils import CROP, Position, UserError, plural

with utils.quiet_tensorflow():
    import tensorflow as tf

    from batch_renorm import limits_at, momentum_at
    from resnet50 import ResNet50


def main() -> None:
    args = parse_arguments()
    config = utils.load_config(args.config)
    worker, workers = utils.worker()
    strategy = open_devices(args.gpu, workers, args.deterministic)
    precision = args.precision or ("mixed_float16" if on_gpu() else "float32")
    if args.synthetic:
        with explained_failures(workers):
            show_bound(args, config, strategy, precision)
        return
    run = Run(utils.run_folder(config, args.run_folder), chief=worker == 0)
    run.check_start(args)
    if args.resume and run.is_done(args.epoch_end):
        tell_the_end(config, args.epoch_end)
        print(f"{run.folder} is trained to the end of epoch {args.epoch_end - 1} already")
        return
    buffer = open_buffer(config, args.batch_size, worker, workers)
    trainer = Trainer(strategy, config, buffer["classes"], precision, args)
    facts = {key: buffer.get(key) for key in (*FACTS, "resized")}
    position = restore(run, trainer, args, facts, buffer["class_names"])
    batches = utils.batches_per_epoch(buffer["N"], args.batch_size, workers)
    print(plan(buffer, batches, position, args, precision, strategy))
    if run.chief:
        print(disk_plan(run.folder, trainer, args.epoch_end - position[0]))
    log = Log(run, position, batches, args)
    saver = Saver(run, trainer, config, buffer["class_names"], facts)
    if not args.resume:
        saver.remove_rolling()  # of the training that this one goes on from at another point
    reader = Reader(
        config.train.buffer_folder,
        batches,
        position,
        args.epoch_end,
        lambda: check_buffer(config, args.batch_size, worker, workers, before=buffer),
        config.train.sleep_time,
        trainer.put,
    )
    with explained_failures(workers), stop_on_signals() as stop, reader:
        train(trainer, reader, log, saver, position, batches, args, stop)
    if stop.is_set():
        sys.exit(128 + stop.signal)
    reader.finish()
    print(
        f"trained to the end of epoch {args.epoch_end - 1} in {log.time_taken()}; the models are "
        f"in {run.folder}. Next: python3 check_accuracy.py --run_folder={args.run_folder} "
        f"--epoch_start={args.epoch_start} --epoch_end={args.epoch_end} --config={args.config}"
    )


def train(trainer, reader, log, saver, position, batches, args, stop) -> None:
    """The loop: from the batch at `position` to the end of the last epoch, or until `stop`."""
    last_save = time.monotonic()
    while position[0] < args.epoch_end and not stop.is_set():
        epoch, batch = position
        images_and_labels = reader.next(stop, before_waiting=log.settle)
        if images_and_labels is not None:
            step = epoch * batches + batch
            rate = learning_rate(step, batches, args)
            log.add(epoch, batch, rate, trainer.step(*images_and_labels, rate))
            position = divmod(step + 1, batches)
        log.show_if_due(reader, trainer)
        if position[0] > epoch:
            log.show(reader, trainer)
            saver.save_epoch(epoch)
            last_save = time.monotonic()
        elif stop.is_set() or time.monotonic() - last_save > 60 * args.checkpoint_minutes:
            log.show(reader, trainer)
            saver.save_rolling(position)
            last_save = time.monotonic()
    if stop.is_set():
        print(
            f"stopped before epoch {position[0]}, batch {position[1]}; the same command with "
            f"--resume goes on there"
        )


class Stop(threading.Event):
    """Set by SIGINT or SIGTERM, whose number is in `signal`."""

    signal = 0


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Turns Ctrl-C and SIGTERM into an event. A second one ends the process at once."""
    stop = Stop()

    def handle(number: int, _frame: object) -> None:
        stop.signal = number
        stop.set()
        for each in before:
            signal.signal(each, signal.SIG_DFL)

    before = {each: signal.signal(each, handle) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def explained_failures(workers: int) -> Iterator[None]:
    """Turns what TensorFlow raises when the hardware fails or is too small into UserError."""
    try:
        yield
    except tf.errors.ResourceExhaustedError:
        raise UserError(
            "not enough memory on the device; take a smaller --batch_size, or "
            "--precision=mixed_float16"
        ) from None
    except (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError):
        if workers == 1:
            raise
        raise UserError(
            "another machine of TF_CONFIG stopped answering; start all of them again with --resume"
        ) from None


def parse_arguments():
    parser = utils.Parser(
        "Trains a ResNet-50 with batch renormalization from the buffer's batches.",
        "train.py --run_folder=mytestrun --epoch_start=0 --epoch_end=30 \\\n"
        "    --batch_size=64 --learning_rate=0.01",
    )
    add = parser.add_argument
    add(
        "--run_folder",
        required=True,
        metavar="NAME",
        help="name of this run, and of its folder",
    )
    parser.add_epochs()
    add(
        "--batch_size",
        type=utils.whole(1),
        required=True,
        metavar="B",
        help="pictures a batch, shared among the GPUs",
    )
    add(
        "--learning_rate",
        type=utils.number(0),
        required=True,
        metavar="R",
        help="learning rate at its highest",
    )
    add(
        "--lr_schedule",
        choices=("constant", "step", "cosine"),
        default="constant",
        metavar="NAME",
        help="how the rate falls: constant, step or cosine (default: constant)",
    )
    add(
        "--lr_drop_epochs",
        type=epoch_list,
        default=(),
        metavar="E,E",
        help="where --lr_schedule=step divides it by 10: 30,60,80",
    )
    add(
        "--warmup_epochs",
        type=utils.number(0),
        default=0,
        metavar="E",
        help="epochs in which the rate rises from 0 (default: 0)",
    )
    add(
        "--label_smoothing",
        type=utils.number(0, 0.99),
        default=0.0,
        metavar="P",
        help="share of the target for all classes (default: 0)",
    )
    add("--resume", action="store_true", help="go on where the run stopped")
    add(
        "--checkpoint_minutes",
        type=utils.number(0),
        default=10,
        metavar="M",
        help="minutes between two saved states (default: 10)",
    )
    add(
        "--log_seconds",
        type=utils.number(0),
        default=30,
        metavar="S",
        help="seconds between two log lines (default: 30)",
    )
    add(
        "--precision",
        choices=("float32", "mixed_float16", "mixed_bfloat16"),
        metavar="NAME",
        help="float32, mixed_float16 (default on a GPU) or mixed_bfloat16",
    )
    add("--jit_compile", action="store_true", help="compile the step with XLA")
    add(
        "--gpu",
        type=utils.gpu_list,
        metavar="I,I",
        help="GPUs to train on (default: 0, or the CPU if there is none)",
    )
    add("--deterministic", action="store_true", help="same result each time, slower")
    add(
        "--synthetic",
        action="store_true",
        help="measure the speed on random batches and exit",
    )
    add("--verbose", action="store_true", help="show TensorFlow's own messages")  # fmt: skip
    args = parser.parse()
    if args.lr_schedule == "step" and not args.lr_drop_epochs:
        raise UserError("--lr_schedule=step needs --lr_drop_epochs, such as 30,60,80")
    if args.lr_schedule != "step" and args.lr_drop_epochs:
        raise UserError("--lr_drop_epochs goes with --lr_schedule=step")
    if args.warmup_epochs >= args.epoch_end:
        raise UserError(
            f"--warmup_epochs={args.warmup_epochs:g} must be less than --epoch_end={args.epoch_end}"
        )
    return args


def epoch_list(text: str) -> tuple[int, ...]:
    """Argument type: rising epochs, "20,40,70"."""
    epochs = tuple(utils.whole(1)(part) for part in text.split(","))
    if list(epochs) != sorted(set(epochs)):
        raise argparse.ArgumentTypeError(f"expected rising epochs, not {text!r}")
    return epochs


def learning_rate(step: int, batches: int, args) -> float:
    """The learning rate at a step counted from epoch 0, with so many batches an epoch.

    Linear warm-up as in Goyal et al. 2017 (section 2.2); then constant, divided by 10 at each of
    `lr_drop_epochs`, or half a cosine down to 0 at `epoch_end` (Loshchilov & Hutter 2017).
    """
    epoch = step / batches
    if epoch < args.warmup_epochs:
        return args.learning_rate * (step + 1) / (args.warmup_epochs * batches)
    if args.lr_schedule == "step":
        return args.learning_rate * 0.1 ** sum(epoch >= drop for drop in args.lr_drop_epochs)
    if args.lr_schedule == "cosine":
        done = (epoch - args.warmup_epochs) / (args.epoch_end - args.warmup_epochs)
        return args.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    return args.learning_rate


def plan(buffer: dict, batches: int, position: Position, args, precision: str, strategy) -> str:
    """What is going to happen, in one line."""
    steps = args.epoch_end * batches - position[0] * batches - position[1]
    replicas = strategy.num_replicas_in_sync
    devices = f"{replicas} replicas" if replicas > 1 else "the GPU" if on_gpu() else "the CPU"
    where = f"epoch {position[0]}, batch {position[1]}"
    return (
        f"{plural(buffer['classes'], 'class')}, {plural(buffer['N'], 'training picture')}; from "
        f"{where} to the end of epoch {args.epoch_end - 1}: {plural(steps, 'step')} of "
        f"{plural(args.batch_size, 'picture')}, {batches:,} an epoch, {precision} on {devices}"
    )


def disk_plan(folder: Path, trainer: "Trainer", epochs: int) -> str:
    """How much disk the models will take, in one line."""
    network = trainer.network
    # float32, in the SavedModel and in the training state, which holds momentum besides.
    kept = 2 * network.variables + network.trainable_variables
    each = sum(4 * variable.shape.num_elements() for variable in kept)
    there = shutil.disk_usage(folder).free
    short = "" if epochs * each <= there else "; make room in time, or take another path_for_saving"
    return (
        f"a model of {utils.file_size(each)} an epoch goes to {folder}: "
        f"{utils.file_size(epochs * each)} of the {utils.file_size(there)} there{short}"
    )


# --- devices --------------------------------------------------------------------------------


def open_devices(
    gpus: list[int] | None, workers: int, deterministic: bool
) -> tf.distribute.Strategy:
    """The strategy for the GPUs asked for and, with several workers, for all machines.

    Raises UserError for a GPU that is not there.
    """
    if deterministic:
        tf.config.experimental.enable_op_determinism()
    chosen = utils.choose_gpus(gpus if gpus is not None else [0], required=gpus is not None)
    if workers > 1:
        return tf.distribute.MultiWorkerMirroredStrategy()
    if len(chosen) > 1:
        return tf.distribute.MirroredStrategy([f"GPU:{i}" for i in range(len(chosen))])
    return tf.distribute.get_strategy()


def on_gpu() -> bool:
    return bool(tf.config.get_visible_devices("GPU"))


# --- the training step ----------------------------------------------------------------------


class Trainer:
    """Network, optimizer and the step function, on the devices of a strategy."""

    def __init__(self, strategy, config: SimpleNamespace, classes: int, precision: str, args):
        self.strategy, self.config = strategy, config
        self.local_replicas = strategy.num_replicas_in_sync // utils.worker()[1]
        if args.batch_size % self.local_replicas:
            raise UserError(
                f"--batch_size={args.batch_size} cannot be shared evenly among "
                f"{self.local_replicas} GPUs"
            )
        self.compute_type = tf.as_dtype(precision.removeprefix("mixed_"))
        self.classes, self.smoothing = classes, args.label_smoothing
        tf.random.set_seed(config.train.seed)
        with strategy.scope():
            self.network = ResNet50(classes)
            self.updates = tf.Variable(
                0,
                dtype=tf.int64,
                trainable=False,
                name="updates",
                aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
            )
            self.optimizer = tf.keras.optimizers.SGD(momentum=config.train.sgd_momentum)
            self.rate_variable = self.optimizer
            if self.compute_type == tf.float16:
                self.optimizer = tf.keras.optimizers.LossScaleOptimizer(self.optimizer)
            self.optimizer.build(self.network.trainable_variables)
        self.checkpoint = tf.train.Checkpoint(
            network=self.network, optimizer=self.optimizer, updates=self.updates
        )
        self._gradients = tf.function(self._gradients, jit_compile=args.jit_compile or None)

    def put(self, images: np.ndarray, labels: np.ndarray) -> tuple:
        """A batch on the devices: each replica gets its share of the pictures."""
        if self.strategy.num_replicas_in_sync == 1:
            return tf.constant(images), tf.constant(labels)
        share = len(images) // self.local_replicas

        def part(array):
            def of_replica(context):
                first = context.replica_id_in_sync_group % self.local_replicas * share
                return tf.constant(array[first : first + share])

            return self.strategy.experimental_distribute_values_from_function(of_replica)

        return part(images), part(labels)

    def step(self, images, labels, rate: float) -> tf.Tensor:
        """Trains on a batch. Returns float32 [3]: loss, loss without L2, share classified right."""
        self.rate_variable.learning_rate = rate
        return self._step(images, labels)

    @tf.function
    def _step(self, images, labels):
        values = self.strategy.run(self._replica_step, (images, labels))
        return self.strategy.reduce(tf.distribute.ReduceOp.MEAN, values, axis=None)

    def _replica_step(self, images, labels):
        gradients, statistics, values = self._gradients(images, labels)
        if self.strategy.num_replicas_in_sync > 1:
            gradients, statistics = self._across_replicas(gradients, statistics)
        self.optimizer.apply(gradients, self.network.trainable_variables)
        momentum = momentum_at(self.updates, self.config.batch_renorm.moving_avgs_momentum)
        for norm, (mean, std) in zip(self.network.norms, statistics, strict=True):
            norm.update(mean, std, momentum)
        self.updates.assign_add(1)
        return values

    def _across_replicas(self, gradients, statistics):
        """Statistics become the mean over all replicas. Gradients are summed by the optimizer."""
        reduce = tf.distribute.get_replica_context().all_reduce
        statistics = reduce(tf.distribute.ReduceOp.MEAN, statistics)
        if self.compute_type == tf.float16:
            # The optimizer looks for overflows in one replica's gradients, or in each one's own;
            # so that all skip the step together, an overflow anywhere has to show everywhere.
            local = tf.add_n([tf.reduce_sum(gradient) for gradient in gradients])
            poison = 0 * reduce(tf.distribute.ReduceOp.SUM, local)
            gradients = [gradients[0] + poison, *gradients[1:]]
        return gradients, statistics

    def _gradients(self, images, labels):
        """One forward and one backward pass over a replica's pictures."""
        limits = limits_at(self.updates, self.config.batch_renorm)
        with tf.GradientTape() as tape:
            logits = self.network(tf.cast(images, self.compute_type), limits)
            targets = tf.one_hot(labels, self.classes) * (1 - self.smoothing)
            targets += self.smoothing / self.classes
            loss = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(targets, logits))
            penalty = self.config.l2.l2_penalty * tf.add_n(
                [tf.nn.l2_loss(kernel) for kernel in self.network.kernels]
            )
            share = (loss + penalty) / self.strategy.num_replicas_in_sync
            scaled = self.optimizer.scale_loss(share)
        gradients = tape.gradient(scaled, self.network.trainable_variables)
        statistics = [(norm.batch_mean, norm.batch_std) for norm in self.network.norms]
        right = tf.equal(tf.argmax(logits, 1, output_type=tf.int32), labels)
        values = [loss + penalty, loss, tf.reduce_mean(tf.cast(right, tf.float32))]
        return gradients, statistics, tf.stack(values)

    def limits(self) -> dict[str, float]:
        """r_max and d_max at present."""
        limits = limits_at(self.updates, self.config.batch_renorm)
        return {name: float(limit) for name, limit in limits._asdict().items()}


class Classifier(tf.Module):
    """What a SavedModel holds: uint8 crops to probabilities, normalisation inside."""

    def __init__(self, network: ResNet50, config: SimpleNamespace, class_names: Path):
        super().__init__()
        self.network = network
        self.mu, self.sigma = (np.float32(values) for values in utils.mu_sigma(config))
        self.class_names = tf.saved_model.Asset(str(class_names))

    @tf.function(input_signature=[tf.TensorSpec([None, CROP, CROP, 3], tf.uint8, "images")])
    def classify(self, images):
        """images: uint8 [n, 224, 224, 3], RGB. Returns float32 [n, classes] probabilities."""
        x = (tf.cast(images, tf.float32) / 255 - self.mu) / self.sigma
        return {"probabilities": tf.nn.softmax(self.network(x))}


# --- the buffer's batches -------------------------------------------------------------------


def take_buffer(config: SimpleNamespace) -> Path:
    """The buffer's folder, this process's own from here on. Raises UserError if another has it."""
    folder = utils.make_folder(config.train.buffer_folder)
    utils.lock(folder / ".trainer.lock", f"{folder}: another train.py takes batches from here")
    return folder


def open_buffer(config: SimpleNamespace, batch_size: int, worker: int, workers: int) -> dict:
    """Takes the buffer for this process and returns its buffer.json, waiting for it if need be.

    Raises UserError if another training uses the buffer, or if it does not fit this one.
    """
    folder = take_buffer(config)
    waiting = False
    while (buffer := check_buffer(config, batch_size, worker, workers)) is None:
        if not waiting:
            print(
                f"no batches in {folder} yet; waiting for runtime_preprocessing.py, to be started "
                f"with the same epochs, --batch_size and --config"
            )
        waiting = True
        time.sleep(min(config.train.sleep_time, 5))
    return buffer


def check_buffer(
    config: SimpleNamespace,
    batch_size: int,
    worker: int,
    workers: int,
    before: dict | None = None,
) -> dict | None:
    """The content of buffer.json, None if there is none.

    Raises UserError if it does not fit this training, or has become another one than `before`.
    """
    folder = config.train.buffer_folder
    buffer = utils.read_json(folder / "buffer.json")
    if buffer is None:
        return None
    mu, sigma = utils.mu_sigma(config)
    ours = {
        "format": utils.BUFFER_FORMAT,
        "batch_size": batch_size,
        "seed": config.train.seed,
        "N": config.train.N or buffer.get("N"),
        "mu": mu,
        "sigma": sigma,
        "worker": worker,
        "workers": workers,
    }
    for key, value in ours.items():
        if buffer.get(key) != value:
            raise UserError(
                f"{folder}: its batches were made with {key} = {buffer.get(key)}, this training "
                f"has {key} = {value}; start both scripts with the same"
            )
    for key in (*FACTS, "class_names"):
        if before and buffer.get(key) != before[key]:
            raise UserError(
                f"{folder}: its batches are of other {key} than when this training began; stop "
                f"runtime_preprocessing.py, or start this training again"
            )
    return buffer


def tell_the_end(config: SimpleNamespace, epoch_end: int) -> None:
    """Ends a runtime_preprocessing.py that still waits for a training which is over."""
    folder = take_buffer(config)
    if (folder / "buffer.json").exists():
        utils.write_progress(folder, (epoch_end, 0))


class Reader:
    """Loads batch after batch in a thread of its own, up to two ahead of training.

    A context manager; `next` returns the batches in order.
    """

    def __init__(
        self,
        folder: Path,
        batches: int,
        position: Position,
        epoch_end: int,
        check: Callable[[], object],
        sleep_time: float,
        put: Callable,
    ):
        self.folder, self.batches, self.position = folder, batches, position
        self.epoch_end, self.check, self.sleep_time, self.put = epoch_end, check, sleep_time, put
        self.waited = 0.0
        self._ahead = queue.Queue(maxsize=1)
        self._closed = threading.Event()
        self._pool = ThreadPoolExecutor(1)

    def __enter__(self):
        self._tell()
        self._reading = self._pool.submit(self._read_all)
        return self

    def __exit__(self, *_):
        self._closed.set()
        self._pool.shutdown()

    def next(self, stop: threading.Event, before_waiting: Callable[[], None]):
        """Images and labels as `put` gave them, or None when `stop` was set while waiting.

        `before_waiting` lets the step before finish, so that `waited` counts only seconds in which
        nothing was left to train on. Raises UserError.
        """
        item = self._take(0)
        if item is None:
            before_waiting()
            start = time.perf_counter()
            while item is None and not stop.is_set():
                if self._reading.done():
                    self._reading.result()  # raises what the thread raised
                item = self._take(0.1)
            self.waited += time.perf_counter() - start
        return item

    def finish(self) -> None:
        """Says that training has passed the last epoch, which ends runtime_preprocessing.py.

        Said only once the last model is saved: a training killed before that needs batches again.
        """
        utils.write_progress(self.folder, (self.epoch_end, 0))

    def _take(self, timeout: float):
        try:
            return self._ahead.get(timeout > 0, timeout)
        except queue.Empty:
            return None

    def _read_all(self) -> None:
        while self.position[0] < self.epoch_end:
            arrays = self._load()
            if arrays is None:
                return
            epoch, batch = self.position
            self.position = divmod(epoch * self.batches + batch + 1, self.batches)
            if self.position[0] < self.epoch_end:
                self._tell()
            item = self.put(*arrays)
            while not self._closed.is_set():
                try:
                    self._ahead.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue

    def _tell(self) -> None:
        """Says which batch is needed next; without room for that, it is said while waiting."""
        try:
            utils.write_progress(self.folder, self.position)
        except OSError as error:
            if not utils.is_no_room(error):
                raise

    def _load(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The batch at `position`, waiting for it if need be. None once the reader is closed."""
        paths = utils.batch_files(self.folder, self.position)
        say_again = 0.0
        while not self._closed.is_set():
            try:
                if buffer := self.check():
                    return load_batch(*paths, buffer)
            except FileNotFoundError:
                pass  # not made yet
            except ValueError as error:
                utils.warn(f"{error}; removed, to be made again")
                for path in paths:
                    path.unlink(missing_ok=True)
            if time.monotonic() >= say_again:
                print(
                    f"waiting for {paths[0]}; is runtime_preprocessing.py running, and with an "
                    f"--epoch_end beyond it?"
                )
                say_again = time.monotonic() + self.sleep_time
            self._tell()  # again: the file may have been lost
            self._closed.wait(min(self.sleep_time, 1))
        return None


def load_batch(x_path: Path, y_path: Path, buffer: dict) -> tuple[np.ndarray, np.ndarray]:
    """float16 [batch_size, 224, 224, 3] and int32 [batch_size].

    Raises FileNotFoundError, and ValueError for anything else than such a batch.
    """
    size, classes = buffer["batch_size"], buffer["classes"]
    images = utils.load_array(x_path, np.float16, (size, CROP, CROP, 3))
    labels = utils.load_array(y_path, np.int32, (size,))
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"{y_path}: labels outside 0 … {classes - 1}")
    return images, labels


def show_bound(args, config, strategy, precision: str, seconds: float = 20.0) -> None:
    """Trains on random batches and prints images per second: what the hardware can do."""
    trainer = Trainer(strategy, config, 1000, precision, args)
    generator = np.random.default_rng(0)
    images = generator.standard_normal((args.batch_size, CROP, CROP, 3), np.float32)
    labels = generator.integers(0, 1000, args.batch_size).astype(np.int32)
    batch = trainer.put(images.astype(np.float16), labels)
    print(
        f"random batches of {args.batch_size}, {precision}; nothing is saved. Preparing the step, "
        f"then measuring for {seconds:.0f} s"
    )
    for _ in range(2):
        trainer.step(*batch, 0.0).numpy()  # builds the step
    batches, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        trainer.step(*batch, 0.0).numpy()
        batches += 1
    rate = batches * args.batch_size / (time.perf_counter() - start)
    print(f"this hardware trains {rate:,.1f} images/s with batches of {args.batch_size}")


# --- the run's folder -----------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """`path_for_saving/<run_folder>`: epochs, the rolling state, the log."""

    folder: Path
    chief: bool
    """Only one of several machines writes."""

    def epochs(self) -> list[int]:
        """Epochs that have a model."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9]\d*", name))

    def rolling(self) -> list[tuple[Position, Path]]:
        """States saved within epochs, oldest first."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        found = [(re.fullmatch(r"state_(\d+)_(\d+)", name), name) for name in names]
        return sorted(
            ((int(match[1]), int(match[2])), self.folder / name) for match, name in found if match
        )

    def remove_if_empty(self) -> None:
        """After a start that was refused."""
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def is_done(self, epoch_end: int) -> bool:
        """Whether the last epoch is saved."""
        return any(
            epoch + 1 >= epoch_end and utils.read_json(state_file(self.folder / str(epoch)))
            for epoch in self.epochs()
        )

    def check_start(self, args) -> None:
        """Takes the run's folder. Raises UserError where models would be lost or are missing."""
        if args.epoch_start and not self.epochs():
            raise UserError(
                f"--epoch_start={args.epoch_start} goes on from a model in {self.folder}, which "
                f"has none"
            )
        if self.chief:
            utils.make_folder(self.folder)
            utils.lock(self.folder, f"{self.folder}: another train.py is working on this run")
            atexit.register(self.remove_if_empty)  # its own by now, not that of another
            utils.remove_leftovers(self.folder)
        if args.resume:
            return
        there = f"it has epochs {compact(self.epochs())}"
        if args.epoch_start and args.epoch_start - 1 not in self.epochs():
            raise UserError(
                f"--epoch_start={args.epoch_start} needs {self.folder / str(args.epoch_start - 1)},"
                f" which is not there; {there}"
            )
        if existing := [epoch for epoch in self.epochs() if epoch >= args.epoch_start]:
            raise UserError(
                f"{self.folder / str(existing[0])} is there already and would be overwritten; "
                f"{there}. Add --resume to go on, or take another --run_folder"
            )
        if not args.epoch_start and self.rolling():
            raise UserError(
                f"{self.rolling()[-1][1]} was saved by an unfinished training. Add --resume to go "
                f"on, or take another --run_folder"
            )


def compact(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    spans = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def restore(run: Run, trainer: Trainer, args, facts: dict, class_names: list[str]) -> Position:
    """Loads the state that training goes on from, if any, and returns the first batch to train on.

    With --resume that is the latest whole one, else the end of epoch_start - 1. Broken ones after
    it are renamed, so that they are made again. Raises UserError.
    """
    if args.resume:
        states = run.rolling() + [((e + 1, 0), run.folder / str(e)) for e in run.epochs()]
    else:
        states = [((e, 0), run.folder / str(e - 1)) for e in [args.epoch_start] if e]
    broken = []
    for position, folder in sorted(states, reverse=True):
        try:
            load_state(trainer, folder, facts, exact=position[1] > 0)
        except BrokenState as error:
            broken.append((folder, error))
            continue
        for bad, error in broken:
            utils.warn(f"{error}; renamed to {bad.name}.broken, going on from {folder}")
            if run.chief:
                renamed = bad.with_name(f"{bad.name}.broken")
                shutil.rmtree(renamed, ignore_errors=True)
                bad.rename(renamed)
        utils.warn_of_other_classes(folder, class_names, "the training pictures")
        print(f"going on from {folder}")
        return position
    if broken:
        raise broken[0][1]
    if args.resume:
        print(f"{run.folder} has nothing to go on from; starting at the beginning")
    return args.epoch_start, 0


def state_file(folder: Path) -> Path:
    """What tells which training a model or rolling state belongs to."""
    return folder / "training_state" / "state.json"


class BrokenState(UserError):
    """A folder that holds no whole training state."""


def load_state(trainer: Trainer, folder: Path, facts: dict, exact: bool) -> None:
    """Raises BrokenState, and UserError where the state belongs to another training.

    A state within an epoch (`exact`) fits only the same batches; one between epochs needs only the
    same classes.
    """
    saved = utils.read_json(state_file(folder))
    if saved is None:
        raise BrokenState(f"{folder}: holds no training state")
    for key in FACTS if exact else ["classes"]:
        value = facts[key]
        if saved.get(key) != value:
            raise UserError(
                f"{folder} was trained with {key} = {saved.get(key)}, now {key} is {value}; "
                + (
                    "take another --run_folder"
                    if key == "classes"
                    else "put that back, or go on from the end of an epoch: without --resume, with "
                    "--epoch_start"
                )
            )
    if exact and saved.get("resized") != facts["resized"]:
        utils.warn(f"{folder} was trained from another set of resized copies; going on from these")
    try:
        status = trainer.checkpoint.read(str(folder / "training_state" / "checkpoint"))
        status.assert_existing_objects_matched()
    except (tf.errors.OpError, AssertionError, ValueError, LookupError, RuntimeError) as error:
        reason = utils.one_line(str(error))[:100]
        raise BrokenState(f"{folder}: its training state cannot be read: {reason}") from None


class Saver:
    """Writes models and states, each aside and then renamed: complete or not there."""

    def __init__(self, run: Run, trainer: Trainer, config, class_names: list[str], facts: dict):
        self.run, self.trainer, self.config, self.facts = run, trainer, config, facts
        self.class_names = class_names
        self._classifier = None

    def save_rolling(self, position: Position) -> None:
        """The state before the batch at `position`. Without room, says so; the last one stays."""
        if not self.run.chief:
            return
        folder = self.run.folder / f"state_{position[0]}_{position[1]}"
        if folder.exists():  # not a step since it was saved
            return
        try:
            with utils.folder_written_aside(folder) as aside:
                self._write_state(aside, position)
        except (OSError, tf.errors.OpError) as error:
            utils.warn(f"{folder}: not saved, training goes on: {utils.one_line(str(error))[:200]}")
            return
        self.remove_rolling(but=folder)

    def save_epoch(self, epoch: int, tries: int = 5, pause: float = 60.0) -> None:
        """The model after an epoch, and the state. Raises UserError if it cannot be saved."""
        if not self.run.chief:
            return
        folder = self.run.folder / str(epoch)
        for attempt in range(1, tries + 1):
            try:
                with utils.folder_written_aside(folder) as aside:
                    self._write_model(aside)
                    self._write_state(aside, (epoch + 1, 0))
                break
            except (OSError, tf.errors.OpError) as error:
                reason = utils.one_line(str(error))[:200]
                if attempt == tries:
                    raise UserError(f"{folder}: cannot be saved: {reason}") from None
                utils.warn(
                    f"{folder}: cannot be saved yet: {reason}; trying again in {pause:.0f} s"
                )
                time.sleep(pause)
        self.remove_rolling()
        print(f"saved {folder}")

    def _write_model(self, folder: Path) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            names = Path(temporary) / utils.CLASS_NAMES
            utils.write_class_names(names, self.class_names)
            classifier = Classifier(self.trainer.network, self.config, names)
            tf.saved_model.save(classifier, str(folder), signatures=classifier.classify)

    def _write_state(self, folder: Path, position: Position) -> None:
        state = folder / "training_state"
        state.mkdir()
        self.trainer.checkpoint.write(str(state / "checkpoint"))
        facts = {"epoch": position[0], "batch": position[1], **self.facts}
        utils.write_text(state_file(folder), json.dumps(facts, indent=1))

    def remove_rolling(self, but: Path | None = None) -> None:
        if not self.run.chief:
            return
        for _, folder in self.run.rolling():
            if folder != but:
                shutil.rmtree(folder)


FACTS = ("classes", "batch_size", "seed", "N", "pictures", "workers")
"""What of buffer.json a state within an epoch fits to. One between epochs: only the first."""

# --- the log --------------------------------------------------------------------------------

COLUMNS = [
    "epoch", "batch", "batches", "loss", "loss_without_l2", "top1", "images_per_second",
    "learning_rate", "waiting_for_data", "r_max", "d_max",
]  # fmt: skip


class Log:
    """Prints a line per interval, and writes the same to training_log.csv and as events.

    Of several machines only the chief writes; all stop at a loss that is not a number.
    """

    def __init__(self, run: Run, position: Position, batches: int, args):
        self.batches, self.args, self.chief = batches, args, run.chief
        if run.chief:
            self._file = open_log(run.folder / "training_log.csv", position)
            self._events = tf.summary.create_file_writer(str(run.folder / "events" / "training"))
        self._start = self._shown = time.monotonic()
        self._under_way, self._settled = [], []

    def add(self, epoch: int, batch: int, rate: float, values: tf.Tensor) -> None:
        """Takes the values of a step, which may still be under way on a GPU."""
        self._under_way.append((epoch, batch, rate, values))
        if len(self._under_way) > 1:
            self._settle_first()

    def settle(self) -> None:
        """Waits for all steps. Raises UserError at the first loss that is not a number."""
        while self._under_way:
            self._settle_first()

    def _settle_first(self) -> None:
        epoch, batch, rate, values = self._under_way.pop(0)
        values = values.numpy()
        if not np.isfinite(values).all():
            raise UserError(
                f"epoch {epoch}, batch {batch}: the loss is {values[0]}; nothing was saved after "
                f"it. Go on from the last state with a smaller --learning_rate"
            )
        self._settled.append((epoch, batch, rate, *values))

    def show_if_due(self, reader: "Reader", trainer: Trainer) -> None:
        if time.monotonic() - self._shown >= self.args.log_seconds:
            self.show(reader, trainer)

    def show(self, reader: "Reader", trainer: Trainer) -> None:
        """The interval since the last line, if there was a step in it."""
        self.settle()
        if not self._settled:
            return
        seconds = time.monotonic() - self._shown
        epoch, batch, rate, *_ = self._settled[-1]
        loss, plain, top1 = np.mean([values for _, _, _, *values in self._settled], axis=0)
        row = {
            "epoch": epoch,
            "batch": batch,
            "batches": len(self._settled),
            "loss": loss,
            "loss_without_l2": plain,
            "top1": top1,
            "images_per_second": len(self._settled) * self.args.batch_size / seconds,
            "learning_rate": rate,
            "waiting_for_data": min(reader.waited / seconds, 1.0),
            **trainer.limits(),
        }
        if self.chief:
            self._write(row)
        self._settled, reader.waited, self._shown = [], 0.0, time.monotonic()

    def _write(self, row: dict) -> None:
        step = row["epoch"] * self.batches + row["batch"]
        left = (self.args.epoch_end * self.batches - step - 1) * self.args.batch_size
        print(
            f"epoch {row['epoch']}, {row['batch'] + 1} of {plural(self.batches, 'batch')}: "
            f"loss {row['loss']:.3f} ({row['loss_without_l2']:.3f} without L2), "
            f"top-1 {row['top1']:.1%}, {row['images_per_second']:,.1f} images/s, "
            f"rate {row['learning_rate']:.3g}, waiting for data {row['waiting_for_data']:.1%}, "
            f"{utils.duration(left / row['images_per_second'])} left"
        )
        values = [v if isinstance(v, int) else f"{v:.6g}" for v in row.values()]
        csv.writer(self._file).writerow(values)
        try:
            self._file.flush()
            with self._events.as_default(step):
                for name in COLUMNS[3:]:
                    utils.write_event(f"training/{name}", row[name])
            self._events.flush()
        except (OSError, tf.errors.OpError) as error:
            utils.warn(f"the log is not written: {utils.one_line(str(error))[:200]}")

    def time_taken(self) -> str:
        return utils.duration(time.monotonic() - self._start)


def open_log(path: Path, position: Position):
    """training_log.csv, open for the rows from `position` on; later ones of before are dropped."""
    rows = []
    if path.is_file():
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if len(row) == len(COLUMNS)][1:]
        rows = [row for row in rows if is_before(row, position)]
    with utils.written_aside(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    return open(path, "a", newline="", encoding="utf-8")


def is_before(row: list[str], position: Position) -> bool:
    """Whether a row of the log is of a batch before `position`; not if it cannot be read."""
    try:
        return (int(row[0]), int(row[1])) < position
    except ValueError:
        return False


if __name__ == "__main__":
    utils.run(main)
