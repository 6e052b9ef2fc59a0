"""How fast a training step is, beside Keras's ResNet-50, and what batch renorm costs.

    python3 tests/benchmarks/benchmark_step.py --batch=16 --rounds=9
    python3 tests/benchmarks/benchmark_step.py --without_avx512
    python3 tests/benchmarks/benchmark_step.py --memory --batch=64 --rounds=3

The first prints a table of images per second of six training steps and three forward passes, in
turns, so that other load on the machine meets each alike: medians over the rounds, and medians of
each round's ratios. All are in this process, with TF_ENABLE_ONEDNN_OPTS=1 unless the variable is
set, but for Keras "as a user starts it": that is in a process of its own without the variable.
Processor seconds, of all cores together, are less disturbed by other load than seconds are.

The second comes near a processor without AVX-512: oneDNN keeps to AVX2, and is off for Keras "as a
user starts it", which is TensorFlow's default there. The third prints the peak memory of a process
that takes three steps with batch renorm, and with fused batch norm instead, in fresh processes.
"""

import argparse
import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import toolkit  # noqa: F401  (puts the scripts on the path)

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
USERS_ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TF_ENABLE_ONEDNN_OPTS"}
if "--without_avx512" in sys.argv:
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
    USERS_ENVIRONMENT["TF_ENABLE_ONEDNN_OPTS"] = "0"
if not any(argument.startswith("--serve") for argument in sys.argv):
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

import resnet50  # noqa: E402
from batch_renorm import EPSILON, BatchRenorm, Limits  # noqa: E402

CLASSES, SIZE, MOMENTUM, L2_PENALTY, RATE = 1000, 224, 0.99, 1e-4, 1e-3
OURS, OURS_PLAIN = "ours, batch renorm", "ours, fused batch norm"
KERAS, KERAS_RENORM = "keras.applications, batch norm", "keras.applications, renorm=True"
ORIGINAL = "ours, statistics in two more passes"
KERAS_OF_A_USER = "Keras as a user starts it"


def main() -> None:
    args = parse_arguments()
    tf.get_logger().setLevel("ERROR")  # it warns of every step function's first trace
    if args.serve:
        serve({"training": keras_step, "inference": keras_inference}[args.serve](), args.batch)
    elif args.measure_memory_of:
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
    parser.add_argument(
        "--without_avx512", action="store_true", help="as on a processor that has only AVX2"
    )
    parser.add_argument("--memory", action="store_true", help="compare peak memory, not speed")
    parser.add_argument("--measure_memory_of", choices=TRAINING_STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--serve", choices=["training", "inference"], help=argparse.SUPPRESS)
    return parser.parse_args()


# --- speed ------------------------------------------------------------------------------------


def compare_speed(batch: int, rounds: int) -> None:
    onednn = os.environ["TF_ENABLE_ONEDNN_OPTS"]
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "what the processor has")
    print(
        f"{processor()}, {os.cpu_count()} cores, {len(tf.config.list_physical_devices('GPU'))} GPUs"
    )
    print(f"TensorFlow {tf.__version__}, Keras {keras.__version__}")
    print(f"TF_ENABLE_ONEDNN_OPTS={onednn}, oneDNN uses {limit}")
    print(f"batch {batch}, {SIZE} x {SIZE}, float32; medians of {rounds} rounds\n")
    data = synthetic_batch(batch)
    for title, kind, makers in (
        ("training step", "training", TRAINING_STEPS),
        ("inference", "inference", FORWARD_PASSES),
    ):
        makers = {name: timed(make) for name, make in makers.items()}
        makers[KERAS_OF_A_USER] = in_own_process(kind)
        show_table(title, time_in_turns(makers, data, rounds), batch)


def processor() -> str:
    """The processor's name, and the vector instructions that matter here."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    lines = (line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in lines}
    wanted = {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16"}
    flags = sorted(wanted & set(facts.get("flags", "").split()))
    return f"{facts.get('model name', platform.machine())} ({' '.join(flags)})"


Timings = dict[str, list[tuple[float, float]]]
"""By name, for each round: seconds, and processor seconds of all cores together."""


def time_in_turns(makers: dict[str, Callable], data: tuple, rounds: int) -> Timings:
    """The order turns, so that none is always first."""
    steps = {name: make() for name, make in makers.items()}
    for step in steps.values():
        for _ in range(2):  # traces, then fills the caches
            step(*data)
    timings = {name: [] for name in steps}
    names = list(steps)
    for _ in range(rounds):
        for name in names:
            timings[name].append(steps[name](*data))
        names = names[1:] + names[:1]
    return timings


def timed(make: Callable) -> Callable:
    """A maker of a function that returns the seconds and the processor seconds of its call."""

    def make_timed() -> Callable:
        function = make()

        def call(*data) -> tuple[float, float]:
            start, processor_start = time.perf_counter(), time.process_time()
            np.asarray(function(*data))
            return time.perf_counter() - start, time.process_time() - processor_start

        return call

    return make_timed


def in_own_process(kind: str) -> Callable:
    """The same for Keras's `kind` ("training" or "inference"), in the environment of a user."""

    def make_timed() -> Callable:
        process = None

        def call(images: tf.Tensor, labels: tf.Tensor) -> tuple[float, float]:
            nonlocal process
            if process is None:
                command = [sys.executable, __file__, f"--batch={len(images)}", f"--serve={kind}"]
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
                process = subprocess.Popen(command, env=USERS_ENVIRONMENT, **pipes)
            process.stdin.write("\n")
            process.stdin.flush()
            seconds, processor_seconds = process.stdout.readline().split()
            return float(seconds), float(processor_seconds)

        return call

    return make_timed


def serve(step: Callable, batch: int) -> None:
    """Takes a step per line of the standard input and prints its timing, to the input's end."""
    step, data = timed(lambda: step)(), synthetic_batch(batch)
    for _ in sys.stdin:
        print(*step(*data), flush=True)


def show_table(title: str, timings: Timings, batch: int) -> None:
    """Images a second, and as multiples of Keras's and of our own network with batch norm.

    A multiple is the median over the rounds, of seconds / of processor seconds.
    """
    bases = [name for name in (KERAS_OF_A_USER, OURS_PLAIN) if name in timings]
    print(f"{title:<36} {'s':>7} {'images/s':>9}", *(f"  x {base}" for base in bases))
    for name, values in timings.items():
        median = statistics.median(seconds for seconds, _ in values)
        cells = []
        for base in bases:
            ratios = [
                statistics.median(b[i] / v[i] for b, v in zip(timings[base], values, strict=True))
                for i in range(2)
            ]
            cells.append(f"{ratios[0]:.2f} / {ratios[1]:.2f}".rjust(len(base) + 4))
        print(f"{name:<36} {median:7.3f} {batch / median:9.2f}", *cells)
    print()


def synthetic_batch(batch: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Images float32 [batch, 224, 224, 3] and labels int32 [batch]."""
    draw = np.random.default_rng(0)
    images = draw.normal(size=(batch, SIZE, SIZE, 3)).astype(np.float32)
    return tf.constant(images), tf.constant(draw.integers(0, CLASSES, batch), tf.int32)


# --- the training steps -----------------------------------------------------------------------


class FusedBatchNorm(BatchRenorm):
    """Plain batch normalization by TensorFlow's fused operation and its own gradient."""

    def __call__(self, x: tf.Tensor, limits: Limits | None = None) -> tf.Tensor | tuple:
        if limits is None:
            return super().__call__(x)
        y, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=x, scale=self.gamma, offset=self.beta, mean=[], variance=[], epsilon=EPSILON
        )
        return y, mean, tf.sqrt(variance + EPSILON)


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
    variables = network.trainable_variables
    momentum = [tf.Variable(tf.zeros_like(variable), trainable=False) for variable in variables]

    def update(gradients: list[tf.Tensor], statistics: list[tuple]) -> None:
        for w, v, gradient in zip(variables, momentum, gradients, strict=True):
            velocity = 0.9 * v - RATE * gradient
            v.assign(velocity)
            w.assign(w + velocity)
        for layer, (mean, std) in zip(network.norms, statistics, strict=True):
            layer.update(mean, std, tf.constant(MOMENTUM))

    limits = Limits(tf.constant(3.0), tf.constant(5.0))
    return training_step(lambda images: network(images, limits), variables, network.kernels, update)


def our_step_with_statistics_in_two_more_passes() -> Callable:
    """What the original toolkit did: two more forward passes a step for the moving averages."""
    network = our_network()
    limits = Limits(tf.constant(3.0), tf.constant(5.0))
    variables = network.trainable_variables
    train = training_step(
        lambda images: network(images, limits), variables, network.kernels, sgd(variables)
    )

    @tf.function
    def update(images: tf.Tensor, statistic: str) -> None:
        _, statistics = network(images, limits)
        for layer, (mean, std) in zip(network.norms, statistics, strict=True):
            if statistic == "mean":
                layer.update(mean, layer.moving_std, tf.constant(MOMENTUM))
            else:
                layer.update(layer.moving_mean, std, tf.constant(MOMENTUM))

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

    def forward(images: tf.Tensor) -> tuple[tf.Tensor, None]:
        return network(images, training=True), None

    return training_step(forward, variables, kernels, sgd(variables))


def sgd(variables: list) -> Callable:
    """Keras's SGD with momentum, as an update of `training_step`."""
    optimizer = keras.optimizers.SGD(RATE, momentum=0.9)
    optimizer.build(variables)
    return lambda gradients, _: optimizer.apply(gradients, variables)


def training_step(forward: Callable, variables: list, kernels: list, update: Callable) -> Callable:
    """Loss with L2, gradients, update: images, labels -> loss.

    `forward` returns logits and statistics. `update` takes the gradients and the statistics.
    """

    @tf.function
    def step(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            logits, statistics = forward(images)
            loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            penalty = L2_PENALTY * tf.add_n([tf.nn.l2_loss(kernel) for kernel in kernels])
            loss = tf.reduce_mean(loss) + penalty
        update(tape.gradient(loss, variables), statistics)
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
