"""How well Keras's ResNet-50 learns from the batches that train.py would train on.

    python3 runtime_preprocessing.py --epoch_start=0 --epoch_end=5 --batch_size=32 &
    python3 tests/benchmarks/benchmark_learning.py FOLDER --epoch_start=0 --epoch_end=5 \\
        --batch_size=32 --learning_rate=0.025 --lr_schedule=cosine

trains `keras.applications.ResNet50` from the toolkit's own buffer, through its files alone, and
evaluates it after each epoch on the crops of preprocess_val.py: the centre crop, and ten crops
after the last epoch, their probabilities averaged. It prints a line per epoch, and writes
FOLDER/keras.csv. train.py with the same flags, and check_accuracy.py, are the other side.

Equal on both sides: the pictures and their order (`[train] seed`), batch size, number of epochs,
schedule and warm-up (train.py's own function), label smoothing, momentum, decay of the kernels
alone, precision, oneDNN on (Keras's users on processors without AVX-512 do not have it unless they
set TF_ENABLE_ONEDNN_OPTS=1), reading the next batch while this one trains.

What differs is what a user of Keras gets: batch normalization with momentum 0.99 and epsilon
1.001e-5, without a warm-up of its averages, instead of batch renormalization; the stride in the
first 1x1 convolution of a stage, not in the 3x3; biases in the convolutions; Glorot's
initialisation instead of He's, with gamma 1 in each block's last normalization instead of 0. The
padding and the normalization of the pixels (mu and sigma) are the same. With --accumulation_steps,
each piece has its own batch statistics, and the averages move with each piece.

Minutes, processor minutes (of all cores) and images per second are those of training alone:
waiting for data and the steps, the first of which builds the graph. Evaluating is not counted.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import toolkit  # noqa: F401  (puts the scripts on the path)
import utils

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

import train  # noqa: E402

COLUMNS = (
    "epoch", "step", "top1_centre", "top5_centre", "top1_10crop", "top5_10crop", "train_loss",
    "images_per_second", "minutes", "processor_minutes", "waiting_for_data",
)  # fmt: skip


def main() -> None:
    args = parse_arguments()
    config = utils.load_config(args.config)
    tf.keras.mixed_precision.set_global_policy(args.precision)
    tf.keras.utils.set_random_seed(config.train.seed)
    buffer = utils.make_folder(config.train.buffer_folder)
    utils.lock(buffer / ".trainer.lock", f"{buffer}: another training uses this buffer")
    info = wait_for_buffer(buffer, args)
    learner = Learner(config, info, args)
    crops = Crops(config.preprocess.path_to_save / "val")
    batches, rows = batches_of(buffer, info, args), []
    for epoch in range(args.epoch_start, args.epoch_end):
        row = {"epoch": epoch, **train_epoch(learner, batches, epoch, info, args)}
        rows.append(row | learner.evaluate(crops, 1))
        utils.write_csv(args.folder / "keras.csv", COLUMNS, rows)
        if epoch == args.epoch_end - 1:
            needs(buffer, args.epoch_end, 0)  # the preprocessor ends
            rows[-1] |= learner.evaluate(crops, 10)
            utils.write_csv(args.folder / "keras.csv", COLUMNS, rows)
        print(", ".join(f"{name} {utils.csv_cell(value)}" for name, value in rows[-1].items()))


def parse_arguments() -> argparse.Namespace:
    """The flags of train.py that say how it learns."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where keras.csv is written")
    parser.add_argument("--config", type=Path, default=toolkit.ROOT / "config.txt")
    parser.add_argument("--epoch_start", type=int, choices=[0], default=0)
    parser.add_argument("--epoch_end", type=int, required=True)
    parser.add_argument("--batch_size", type=int, required=True)
    parser.add_argument("--learning_rate", type=float, required=True)
    parser.add_argument("--lr_schedule", choices=["constant", "cosine"], default="constant")
    parser.add_argument("--warmup_epochs", type=float, default=0.0)
    parser.add_argument("--label_smoothing", type=float, default=0.0)
    parser.add_argument("--accumulation_steps", type=int, default=1)
    parser.add_argument("--precision", choices=train.PRECISIONS, default="float32")
    args = parser.parse_args()
    if args.batch_size % args.accumulation_steps:
        parser.error("--accumulation_steps must divide --batch_size")
    return args


# --- the buffer, as any other framework would read it -----------------------------------------


def wait_for_buffer(folder: Path, args: argparse.Namespace) -> SimpleNamespace:
    """What buffer.json says. Raises UserError if the batches are of another size or span."""
    while not (folder / "buffer.json").exists():
        time.sleep(0.1)
    info = SimpleNamespace(**json.loads((folder / "buffer.json").read_text()))
    made = {"--batch_size": info.batch_size, "--epoch_end": info.epochs[1]}
    asked = {"--batch_size": args.batch_size, "--epoch_end": args.epoch_end}
    if made != asked:
        raise utils.UserError(f"{folder} was made with {made}, this training has {asked}")
    return info


def needs(folder: Path, epoch: int, batch: int) -> None:
    """Tells runtime_preprocessing.py what to keep ready. The file must appear whole."""
    (folder / "progress.new").write_text(f"{epoch}\n{batch}\n")
    (folder / "progress.new").rename(folder / "training_progress.txt")


def batches_of(folder: Path, info: SimpleNamespace, args: argparse.Namespace) -> Iterator[tuple]:
    """Images and labels of every batch, read while the one before trains."""

    def read(step: int) -> tuple[np.ndarray, np.ndarray]:
        epoch, batch = divmod(step, info.batches_per_epoch)
        needs(folder, epoch, batch)
        while not (folder / f"X_{epoch}_{batch}.npy").exists():
            time.sleep(0.02)
        images, labels = (np.load(folder / f"{kind}_{epoch}_{batch}.npy") for kind in "XY")
        return images, labels

    steps = range(args.epoch_end * info.batches_per_epoch)
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(read, 0)
        for step in steps:
            batch = ahead.result()
            ahead = pool.submit(read, step + 1) if step + 1 < len(steps) else None
            yield batch


# --- Keras ------------------------------------------------------------------------------------


class Learner:
    """Keras's network and optimizer, and a step with them."""

    def __init__(self, config: SimpleNamespace, info: SimpleNamespace, args: argparse.Namespace):
        self.info, self.args, self.l2_penalty = info, args, config.l2.l2_penalty
        self.network = tf.keras.applications.ResNet50(
            weights=None, classes=info.classes, classifier_activation=None
        )
        # With accumulation, Keras's optimizer makes one update of the mean of so many gradients.
        pieces = args.accumulation_steps
        self.optimizer = tf.keras.optimizers.SGD(
            momentum=config.train.sgd_momentum,
            gradient_accumulation_steps=pieces if pieces > 1 else None,
        )
        if args.precision == "mixed_float16":
            self.optimizer = tf.keras.mixed_precision.LossScaleOptimizer(self.optimizer)
        variables = self.network.trainable_variables
        self.kernels = [variable for variable in variables if variable.name == "kernel"]
        self.optimizer.build(variables)
        self._piece = tf.function(self._piece)
        self._probabilities = tf.function(self._probabilities)

    def step(self, images: np.ndarray, labels: np.ndarray, rate: float) -> float:
        """Trains on a batch. Returns its loss without L2."""
        self.optimizer.learning_rate = rate
        pieces = self.args.accumulation_steps
        parts = zip(np.split(images, pieces), np.split(labels, pieces), strict=True)
        losses = [self._piece(tf.constant(x), tf.constant(y)) for x, y in parts]
        return float(np.mean([loss.numpy() for loss in losses]))

    def _piece(self, images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        smoothing, classes = self.args.label_smoothing, self.info.classes
        with tf.GradientTape() as tape:
            logits = tf.cast(self.network(tf.cast(images, tf.float32), training=True), tf.float32)
            targets = tf.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes
            loss = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(targets, logits))
            penalty = self.l2_penalty * tf.add_n([tf.nn.l2_loss(k.value) for k in self.kernels])
            scaled = self.optimizer.scale_loss(loss + penalty)
        variables = self.network.trainable_variables
        gradients = tape.gradient(scaled, [variable.value for variable in variables])
        self.optimizer.apply(gradients, variables)
        return loss

    def _probabilities(self, crops: tf.Tensor) -> tf.Tensor:
        """Of uint8 [n, 224, 224, 3] pictures: float32 [n, classes]."""
        pixels = (tf.cast(crops, tf.float32) / 255 - self.info.mu) / self.info.sigma
        return tf.nn.softmax(tf.cast(self.network(pixels, training=False), tf.float32))

    def evaluate(self, crops: "Crops", count: int) -> dict[str, float]:
        """Top-1 and top-5 of the centre crop (`count` 1), or of the mean of ten (`count` 10)."""
        ranks = []
        for images, label in crops.pictures(count):
            probabilities = self._probabilities(tf.constant(images)).numpy()
            probabilities = probabilities.reshape(-1, count, self.info.classes).mean(axis=1)
            right = np.take_along_axis(probabilities, label[:, None], axis=1)
            ranks.extend((probabilities >= right).sum(axis=1))  # 1 if right; ties count against it
        name = "centre" if count == 1 else "10crop"
        return {f"top{k}_{name}": float(np.mean(np.array(ranks) <= k)) for k in (1, 5)}


def train_epoch(
    learner: Learner,
    batches: Iterator[tuple],
    epoch: int,
    info: SimpleNamespace,
    args: argparse.Namespace,
) -> dict[str, float]:
    """An epoch's steps, and what they took."""
    losses, waited = [], 0.0
    start, processor_start = time.perf_counter(), time.process_time()
    first = epoch * info.batches_per_epoch
    for step in range(first, first + info.batches_per_epoch):
        waiting = time.perf_counter()
        images, labels = next(batches)
        waited += time.perf_counter() - waiting
        rate = train.learning_rate(step, args, info.batches_per_epoch)
        losses.append(learner.step(images, labels, rate))
        if step == 0:
            print(f"the first step took {time.perf_counter() - start:.1f} s")
        if step % 20 == 19:
            rate = (step + 1 - first) * info.batch_size / (time.perf_counter() - start)
            print(f"epoch {epoch}, step {step}: loss {np.mean(losses[-20:]):.3f}, {rate:.1f}/s")
    seconds, processor = time.perf_counter() - start, time.process_time() - processor_start
    return {
        "step": step,
        "train_loss": float(np.mean(losses)),
        "images_per_second": len(losses) * info.batch_size / seconds,
        "minutes": seconds / 60,
        "processor_minutes": processor / 60,
        "waiting_for_data": waited / seconds,
    }


class Crops:
    """The crops of preprocess_val.py."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.labels = np.load(folder / "y.npy")

    def pictures(self, count: int, together: int = 10) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """uint8 [n * count, 224, 224, 3] and labels int64 [n], ten pictures at a time.

        Of each picture the centre crop (`count` 1) or all ten. Broken pictures have label -1.
        """
        chosen = slice(8, 9) if count == 1 else slice(0, 10)
        indices = np.flatnonzero(self.labels >= 0)
        for part in np.array_split(indices, -(-len(indices) // together)):
            ten = [np.load(self.folder / f"X10_{index}.npy")[chosen] for index in part]
            yield np.concatenate(ten), self.labels[part]


if __name__ == "__main__":
    utils.run(main)
