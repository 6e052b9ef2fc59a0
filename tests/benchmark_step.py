"""How fast a training step is, beside Keras's ResNet-50, and what batch renorm costs.

    python3 tests/benchmark_step.py --batch=16 --rounds=9
    python3 tests/benchmark_step.py --memory --batch=64 --rounds=3

The first prints a table of images per second of five training steps and two forward passes, all
in one process and in turns, so that other load on the machine meets each alike: medians over the
rounds, and medians of each round's ratios. The second prints the peak memory of a process that
takes three steps with batch renorm, and with fused batch norm instead, each in fresh processes.
"""

import argparse
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import toolkit  # noqa: F401  (puts the scripts on the path)

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

import resnet50  # noqa: E402
from batch_renorm import EPSILON, BatchRenorm, Limits  # noqa: E402

CLASSES, SIZE, MOMENTUM, L2_PENALTY, RATE = 1000, 224, 0.99, 1e-4, 1e-3
OURS, OURS_PLAIN = "ours, batch renorm", "ours, fused batch norm"
KERAS, KERAS_RENORM = "keras.applications, batch norm", "keras.applications, renorm=True"
ORIGINAL = "ours, statistics in two more passes"


def main() -> None:
    args = parse_arguments()
    tf.get_logger().setLevel("ERROR")  # it warns of every step function's first trace
    if args.measure_memory_of:
        take_steps_and_print_peak_memory(args.measure_memory_of, args.batch)
    elif args.memory:
        compare_memory(args.batch, args.rounds)
    else:
        compare_speed(args.batch, args.rounds)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=16, help="pictures a step (default: 16)")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each (default: 9)")
    parser.add_argument("--memory", action="store_true", help="compare peak memory, not speed")
    parser.add_argument("--measure_memory_of", choices=TRAINING_STEPS, help=argparse.SUPPRESS)
    return parser.parse_args()


# --- speed ------------------------------------------------------------------------------------


def compare_speed(batch: int, rounds: int) -> None:
    print(f"TensorFlow {tf.__version__}, Keras {keras.__version__}, {os.cpu_count()} cores")
    print(f"batch {batch}, {SIZE} x {SIZE}, float32; medians of {rounds} rounds\n")
    data = synthetic_batch(batch)
    show_table("training step", time_in_turns(TRAINING_STEPS, data, rounds), batch)
    show_table("inference", time_in_turns(FORWARD_PASSES, data, rounds), batch)


def time_in_turns(makers: dict[str, Callable], data: tuple, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round's call, by name. The order turns, so that none is always first."""
    steps = {name: make() for name, make in makers.items()}
    for step in steps.values():
        for _ in range(2):  # traces, then fills the caches
            np.asarray(step(*data))
    seconds = {name: [] for name in steps}
    names = list(steps)
    for _ in range(rounds):
        for name in names:
            start = time.perf_counter()
            np.asarray(steps[name](*data))
            seconds[name].append(time.perf_counter() - start)
        names = names[1:] + names[:1]
    return seconds


def show_table(title: str, seconds: dict[str, list[float]], batch: int) -> None:
    """Images a second, and as multiples of Keras's and of our own network with batch norm."""
    bases = [name for name in (KERAS, OURS_PLAIN) if name in seconds]
    print(f"{title:<36} {'s':>7} {'images/s':>9}", *(f"  x {base}" for base in bases))
    for name, values in seconds.items():
        median = statistics.median(values)
        cells = [
            f"{statistics.median(b / v for b, v in zip(seconds[base], values, strict=True)):.2f}"
            for base in bases
        ]
        ratios = (f"{cell:>{len(base) + 4}}" for cell, base in zip(cells, bases, strict=True))
        print(f"{name:<36} {median:7.3f} {batch / median:9.2f}", *ratios)
    print()


def synthetic_batch(batch: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Images float32 [batch, 224, 224, 3] and labels int32 [batch]."""
    draw = np.random.default_rng(0)
    images = draw.normal(size=(batch, SIZE, SIZE, 3)).astype(np.float32)
    return tf.constant(images), tf.constant(draw.integers(0, CLASSES, batch), tf.int32)


# --- the training steps -----------------------------------------------------------------------


class FusedBatchNorm(BatchRenorm):
    """Plain batch normalization by TensorFlow's fused operation and its own gradient."""

    def __call__(self, x: tf.Tensor, limits: Limits | None = None) -> tf.Tensor:
        if limits is None:
            return super().__call__(x)
        y, self.batch_mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=x, scale=self.gamma, offset=self.beta, mean=[], variance=[], epsilon=EPSILON
        )
        self.batch_std = tf.sqrt(variance + EPSILON)
        return y


def our_network(norm: type[BatchRenorm] = BatchRenorm) -> resnet50.ResNet50:
    resnet50.BatchRenorm = norm
    try:
        return resnet50.ResNet50(CLASSES)
    finally:
        resnet50.BatchRenorm = BatchRenorm


def keras_network(renorm: bool = False) -> keras.Model:
    """Keras's ResNet-50 (v1: stride in the 1x1 convolution, so it has 6% less to compute)."""
    network = keras.applications.ResNet50(
        weights=None, classes=CLASSES, classifier_activation=None, input_shape=(SIZE, SIZE, 3)
    )
    if not renorm:
        return network

    def with_renorm(layer: keras.Layer) -> keras.Layer:
        config = layer.get_config()
        if isinstance(layer, keras.layers.BatchNormalization):
            clipping = {"rmin": 1 / 3, "rmax": 3.0, "dmax": 5.0}
            config |= {"renorm": True, "renorm_clipping": clipping}
        return type(layer).from_config(config)

    return keras.models.clone_model(network, clone_function=with_renorm)


def our_step(norm: type[BatchRenorm] = BatchRenorm) -> Callable:
    """The step as train.py takes it, on one device."""
    network = our_network(norm)

    def forward(images: tf.Tensor) -> tf.Tensor:
        return network(images, Limits(tf.constant(3.0), tf.constant(5.0)))

    def move_averages() -> None:
        for layer in network.norms:
            layer.update(layer.batch_mean, layer.batch_std, tf.constant(MOMENTUM))

    return training_step(forward, network.trainable_variables, network.kernels, move_averages)


def our_step_with_statistics_in_two_more_passes() -> Callable:
    """What the original toolkit did: two more forward passes a step for the moving averages."""
    network = our_network()
    limits = Limits(tf.constant(3.0), tf.constant(5.0))
    train = training_step(
        lambda images: network(images, limits),
        network.trainable_variables,
        network.kernels,
        move_averages=lambda: None,
    )

    @tf.function
    def update(images: tf.Tensor, statistic: str) -> None:
        network(images, limits)
        for layer in network.norms:
            if statistic == "mean":
                layer.update(layer.batch_mean, layer.moving_std, tf.constant(MOMENTUM))
            else:
                layer.update(layer.moving_mean, layer.batch_std, tf.constant(MOMENTUM))

    def step(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        loss = train(images, labels)
        update(images, "mean")
        update(images, "std")
        return loss

    return step


def keras_step(renorm: bool = False) -> Callable:
    """The same step for Keras's network, whose layers move their averages by themselves."""
    network = keras_network(renorm)
    variables = network.trainable_variables
    kernels = [variable for variable in variables if variable.name == "kernel"]
    return training_step(lambda images: network(images, training=True), variables, kernels)


def training_step(
    forward: Callable,
    variables: list,
    kernels: list,
    move_averages: Callable = lambda: None,
) -> Callable:
    """Loss with L2, gradients, SGD with momentum, moving averages: images, labels -> loss."""
    optimizer = keras.optimizers.SGD(RATE, momentum=0.9)
    optimizer.build(variables)

    @tf.function
    def step(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            logits = forward(images)
            loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            penalty = L2_PENALTY * tf.add_n([tf.nn.l2_loss(kernel) for kernel in kernels])
            loss = tf.reduce_mean(loss) + penalty
        optimizer.apply(tape.gradient(loss, variables), variables)
        move_averages()
        return loss

    return step


TRAINING_STEPS = {
    OURS: our_step,
    OURS_PLAIN: lambda: our_step(FusedBatchNorm),
    KERAS: keras_step,
    KERAS_RENORM: lambda: keras_step(renorm=True),
    ORIGINAL: our_step_with_statistics_in_two_more_passes,
}


# --- inference --------------------------------------------------------------------------------


def our_inference() -> Callable:
    network = our_network()
    return tf.function(lambda images, labels: network(images))


def keras_inference() -> Callable:
    network = keras_network()
    return tf.function(lambda images, labels: network(images, training=False))


FORWARD_PASSES = {OURS: our_inference, KERAS: keras_inference}


# --- memory -----------------------------------------------------------------------------------


def compare_memory(batch: int, rounds: int) -> None:
    """Peak resident memory of fresh processes, in turns."""
    print(f"peak memory of three steps, batch {batch}, {SIZE} x {SIZE}, float32; {rounds} rounds\n")
    peaks = {OURS: [], OURS_PLAIN: []}
    for _ in range(rounds):
        for name, values in peaks.items():
            command = [sys.executable, __file__, f"--batch={batch}", f"--measure_memory_of={name}"]
            result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            values.append(float(result.stdout.split()[-1]))
    base = statistics.median(peaks[OURS_PLAIN])
    for name, values in peaks.items():
        median = statistics.median(values)
        spread = f"{min(values):.0f} to {max(values):.0f}"
        print(f"{name:<36} {median:7.0f} MiB  ({spread})  {median / base:.3f} x {OURS_PLAIN}")


def take_steps_and_print_peak_memory(name: str, batch: int) -> None:
    step, data = TRAINING_STEPS[name](), synthetic_batch(batch)
    for _ in range(3):
        np.asarray(step(*data))
        gc.collect()
    status = Path("/proc/self/status").read_text().split()
    print(int(status[status.index("VmHWM:") + 1]) / 1024)


if __name__ == "__main__":
    main()
