"""A second trainer, for test_oracle.py: the whole of the training, written again.

It knows the papers, Keras and what README says, and nothing of the scripts: no line of train.py,
batch_renorm.py or resnet50.py runs in it. Convolutions, batch renormalization, loss, weight decay
and optimizer are Keras's; schedule, ramps and warm-ups are written here. What depends on the files
that the scripts write stands in one place, the second part of this module.
"""

import csv
import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph

State = dict[str, np.ndarray]
"""float32 arrays by name: `stem/kernel`, `blocks/3/shortcut/norm/moving_std`, `dense_bias` …"""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that decides how training goes. Every value differs from what is shipped."""

    seed: int = 11
    classes: int = 4
    batch_size: int = 4
    batches: int = 7
    """Batches an epoch."""
    epochs: int = 2
    learning_rate: float = 5e-5
    warmup_epochs: int = 1
    label_smoothing: float = 0.2
    sgd_momentum: float = 0.6
    l2_penalty: float = 0.02
    moving_avgs_momentum: float = 0.35
    start_relaxing_rmax: int = 2
    reach_rmax_max: int = 9
    rmax_max: float = 1.5
    start_relaxing_dmax: int = 1
    reach_dmax_max: int = 11
    dmax_max: float = 0.4

    @property
    def steps(self) -> int:
        return self.epochs * self.batches

    def settings(self) -> dict[str, object]:
        """The part that config.txt holds, for toolkit.write_config."""
        ramps = ("rmax_max", "start_relaxing_rmax", "reach_rmax_max")
        ramps += tuple(name.replace("rmax", "dmax") for name in ramps)
        sections = {
            "train": ("seed", "sgd_momentum"),
            "batch_renorm": ("moving_avgs_momentum", *ramps),
            "l2": ("l2_penalty",),
        }
        return {
            f"{section}__{name}": getattr(self, name)
            for section, names in sections.items()
            for name in names
        }

    def flags(self) -> list[str]:
        """The part that the scripts take as flags; the first three are both scripts'."""
        return [
            "--epoch_start=0",
            f"--epoch_end={self.epochs}",
            f"--batch_size={self.batch_size}",
            f"--learning_rate={self.learning_rate}",
            f"--warmup_epochs={self.warmup_epochs}",
            f"--label_smoothing={self.label_smoothing}",
            "--lr_schedule=cosine",
        ]

    def rate(self, step: int) -> float:
        """Linear warm-up to the full rate, then half a cosine down to 0 at the end of training."""
        warm = self.warmup_epochs * self.batches
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        return self.learning_rate * math.cos((step - warm) / (self.steps - warm) * math.pi / 2) ** 2

    def r_max(self, step: int) -> float:
        """From 1 to rmax_max, linearly."""
        return float(
            np.interp(step, [self.start_relaxing_rmax, self.reach_rmax_max], [1, self.rmax_max])
        )

    def d_max(self, step: int) -> float:
        """From 0 to dmax_max, linearly."""
        return float(
            np.interp(step, [self.start_relaxing_dmax, self.reach_dmax_max], [0, self.dmax_max])
        )

    def averages_momentum(self, step: int) -> float:
        """Weight of the old averages, which warms up."""
        return min(self.moving_avgs_momentum, (1 + step) / (10 + step))


# --- what the scripts write -----------------------------------------------------------------


@dataclasses.dataclass
class Saved:
    """A training state as train.py saved it."""

    weights: State
    """Trained numbers and averages."""
    velocity: State
    """The optimizer's momentum, by the name of the weight."""
    updates: int
    """Steps taken."""
    loss_scale: float = 2.0**15
    """That of float16; the others keep the initial one."""


def read_state(folder: Path) -> Saved:
    """The state within the folder of a model, or of a state saved within an epoch."""
    state = folder / "training_state"
    apart = state / "weights"  # a model has them in its SavedModel
    files = apart if apart.with_suffix(".index").exists() else folder / "variables" / "variables"
    weights = read_checkpoint(files, "network")
    rest = read_checkpoint(state / "state")
    trained = sorted((name for name in weights if "moving" not in name), key=place_of_momentum)
    return Saved(
        weights=weights,
        velocity={name: rest[f"momentum/{place}"] for place, name in enumerate(trained)},
        updates=int(rest["updates"]),
        loss_scale=float(rest["loss_scale"]),
    )


def place_of_momentum(name: str) -> tuple:
    """Sorts names as tf.Module lists variables: a module's own, then its parts, by name."""
    first, second, *_ = f"{name}//".split("/")
    return "/" in name, first, int(second) if first == "blocks" else 0, name


def read_checkpoint(path: Path, root: str | None = None) -> State:
    """The arrays of a tf.train.Checkpoint by their attributes' names, from `root` on.

    The names in the file depend on which object was met first, so the objects are followed.
    """
    reader = tf.train.load_checkpoint(str(path))
    nodes = TrackableObjectGraph.FromString(reader.get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH")).nodes

    def arrays(node: int, name: str) -> Iterator[tuple[str, np.ndarray]]:
        if nodes[node].attributes:
            yield name[1:], reader.get_tensor(nodes[node].attributes[0].checkpoint_key)
        for child in nodes[node].children:
            if child.local_name != "save_counter":
                yield from arrays(child.node_id, f"{name}/{child.local_name}")

    first = {child.local_name: child.node_id for child in nodes[0].children}
    return dict(arrays(first[root] if root else 0, ""))


def rolling_state(run: Path) -> tuple[int, int, Path]:
    """The latest state saved within an epoch: epoch and batch that come next, and its folder."""
    found = [(path.name.split("_"), path) for path in run.glob("state_*_*")]
    return max((int(epoch), int(batch), path) for (_, epoch, batch), path in found)


def batch_files(folder: Path, epoch: int, batch: int) -> tuple[Path, Path]:
    """Pictures and labels."""
    return folder / f"X_{epoch}_{batch}.npy", folder / f"Y_{epoch}_{batch}.npy"


def read_log(run: Path) -> list[dict[str, float]]:
    """training_log.csv."""
    with open(run / "training_log.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


# --- the second trainer ---------------------------------------------------------------------

Stages = Sequence[tuple[int, int, int]]
"""Blocks, channels, and the stride of the first block."""

RESNET_50 = ((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2))
"""Table 1 of He et al. 2015."""


class ConvNorm:
    """Convolution, padded evenly, and batch renormalization."""

    def __init__(self, name: str, size: int, inputs: int, outputs: int, stride: int = 1):
        self.pad = keras.layers.ZeroPadding2D(size // 2)
        self.conv = keras.layers.Conv2D(outputs, size, stride, use_bias=False)
        self.norm = keras.layers.BatchNormalization(epsilon=1e-5, renorm=True)
        self.conv.build((None, None, None, inputs))
        self.norm.build((None, None, None, outputs))
        self.trained = {
            f"{name}/kernel": self.conv.kernel,
            f"{name}/norm/gamma": self.norm.gamma,
            f"{name}/norm/beta": self.norm.beta,
        }
        # Keras keeps the averages twice, for r and d and for inference; here they are the same.
        self.averages = {
            f"{name}/norm/moving_mean": (self.norm.renorm_mean, self.norm.moving_mean),
            f"{name}/norm/moving_std": (self.norm.renorm_stddev, self.norm.moving_stddev),
        }

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        return self.norm(self.conv(self.pad(x)), training=True)


class Network:
    """ResNet-50, or one with other stages, of Keras layers."""

    def __init__(self, classes: int, stages: Stages = RESNET_50):
        self.stem = ConvNorm("stem", 7, 3, 64, 2)
        self.pool = [keras.layers.ZeroPadding2D(1), keras.layers.MaxPooling2D(3, 2)]
        self.blocks, inputs = [], 64
        for count, channels, stride in stages:
            for block in range(count):
                self.blocks.append(self.block(inputs, channels, 1 if block else stride))
                inputs = 4 * channels
        self.dense = keras.layers.Dense(classes)
        self.dense.build((None, inputs))
        self.units = [self.stem]
        for convs, shortcut in self.blocks:
            self.units += convs + shortcut
        self.trained = {"dense_kernel": self.dense.kernel, "dense_bias": self.dense.bias}
        self.averages = {}
        for unit in self.units:
            self.trained |= unit.trained
            self.averages |= unit.averages

    def block(self, inputs: int, channels: int, stride: int) -> tuple[list, list]:
        """Three convolutions, and the one of the shortcut where the shape changes."""
        name = f"blocks/{len(self.blocks)}"
        convs = [
            ConvNorm(f"{name}/conv1", 1, inputs, channels),
            ConvNorm(f"{name}/conv2", 3, channels, channels, stride),
            ConvNorm(f"{name}/conv3", 1, channels, 4 * channels),
        ]
        if inputs == 4 * channels:
            return convs, []
        return convs, [ConvNorm(f"{name}/shortcut", 1, inputs, 4 * channels, stride)]

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        """float32 [n, height, width, 3] to logits: float32 [n, classes]."""
        x = tf.nn.relu(self.stem(x))
        for layer in self.pool:
            x = layer(x)
        for (first, second, third), shortcut in self.blocks:
            y = third(tf.nn.relu(second(tf.nn.relu(first(x)))))
            x = tf.nn.relu(y + (shortcut[0](x) if shortcut else x))
        return self.dense(tf.reduce_mean(x, [1, 2]))


class Trainer:
    """Takes the steps of a recipe, from some initial weights on."""

    def __init__(self, recipe: Recipe, stages: Stages = RESNET_50):
        self.recipe, self.network, self.steps = recipe, Network(recipe.classes, stages), 0
        self.r_min, self.r_max, self.d_max, self.momentum = (tf.Variable(0.0) for _ in range(4))
        for unit in self.network.units:
            limits = {"rmin": self.r_min, "rmax": self.r_max, "dmax": self.d_max}
            unit.norm.renorm_clipping = limits
            unit.norm.momentum = unit.norm.renorm_momentum = self.momentum
        self.sgd = keras.optimizers.SGD(momentum=recipe.sgd_momentum)
        self.variables = list(self.network.trained.values())
        self.sgd.build(self.variables)
        self.loss = keras.losses.CategoricalCrossentropy(
            from_logits=True, label_smoothing=recipe.label_smoothing
        )
        self.decay = keras.regularizers.L2(recipe.l2_penalty / 2)

    def start(self, weights: State) -> None:
        """From these weights on, the averages' included, without momentum."""
        for name, variable in self.network.trained.items():
            variable.assign(weights[name])
        self._set_averages(weights)
        for slot in self.sgd.momentums:
            slot.assign(tf.zeros_like(slot))
        self.steps = 0

    def step(self, images: np.ndarray, labels: np.ndarray, rate: float, replicas: int = 1) -> dict:
        """A step, with the batch shared among replicas. Returns what the log would say.

        Each replica normalises with the statistics of its own share. Gradients and averages
        become the mean of all. `clipped` is the share of r's and of d's at their limits.
        """
        r_max, d_max = self.recipe.r_max(self.steps), self.recipe.d_max(self.steps)
        momentum = self.recipe.averages_momentum(self.steps)
        for variable, value in (
            (self.r_min, 1 / r_max), (self.r_max, r_max), (self.d_max, d_max),
            (self.momentum, momentum),
        ):  # fmt: skip
            variable.assign(value)
        before, moved, gradients, values = self._averages(), [], [], []
        for part in zip(np.split(images, replicas), np.split(labels, replicas), strict=True):
            self._set_averages(before)
            gradient, value = self._gradients(*part)
            gradients.append(gradient)
            values.append(value.numpy())
            moved.append(self._averages())
        after = {name: np.mean([each[name] for each in moved], axis=0) for name in before}
        self._set_averages(after)
        self.sgd.learning_rate = rate
        self.sgd.apply([tf.add_n(each) / replicas for each in zip(*gradients, strict=True)])
        self.steps += 1
        loss, plain, top1 = np.mean(values, axis=0)
        return {
            "loss": loss, "loss_without_l2": plain, "top1": top1, "learning_rate": rate,
            "r_max": r_max, "d_max": d_max,
            "clipped": clipped(before, moved[0], momentum, r_max, d_max),
        }  # fmt: skip

    @tf.function(
        input_signature=[tf.TensorSpec([None, None, None, 3], tf.float16), tf.TensorSpec([None])]
    )
    def _gradients(self, images, labels):
        with tf.GradientTape() as tape:
            logits = self.network(tf.cast(images, tf.float32))
            classes = tf.cast(labels, tf.int64)
            plain = self.loss(tf.one_hot(classes, self.recipe.classes), logits)
            kernels = [v for name, v in self.network.trained.items() if name.endswith("kernel")]
            loss = plain + tf.add_n([self.decay(kernel) for kernel in kernels])
        right = tf.reduce_mean(tf.cast(tf.argmax(logits, axis=1) == classes, tf.float32))
        values = [variable.value for variable in self.variables]
        return tape.gradient(loss, values), tf.stack([loss, plain, right])

    def _averages(self) -> State:
        return {name: pair[0].numpy() for name, pair in self.network.averages.items()}

    def _set_averages(self, values: State) -> None:
        for name, pair in self.network.averages.items():
            for variable in pair:
                variable.assign(values[name])

    def state(self) -> Saved:
        """As train.py would save it."""
        trained = {name: variable.numpy() for name, variable in self.network.trained.items()}
        slots = [slot.numpy() for slot in self.sgd.momentums]
        velocity = dict(zip(trained, slots, strict=True))
        return Saved(trained | self._averages(), velocity, self.steps)


def clipped(before: State, after: State, momentum: float, r_max: float, d_max: float) -> tuple:
    """Which shares of all channels had r, and d, at their limits, as the averages moved tell."""
    r, d = [], []
    for name in before:
        if name.endswith("moving_std"):
            old = {kind: before[name.replace("std", kind)] for kind in ("mean", "std")}
            new = {kind: after[name.replace("std", kind)] for kind in ("mean", "std")}
            batch = {kind: old[kind] + (new[kind] - old[kind]) / (1 - momentum) for kind in old}
            r.append(batch["std"] / old["std"])
            d.append((batch["mean"] - old["mean"]) / old["std"])
    r, d = np.abs(np.log(np.concatenate(r))), np.abs(np.concatenate(d))
    return float(np.mean(r >= np.log(r_max))), float(np.mean(d >= d_max))


def initial(weights: State) -> State:
    """These weights with the averages that training starts from."""
    start = {"moving_mean": np.zeros_like, "moving_std": np.ones_like}
    return {name: start.get(name.split("/")[-1], np.copy)(weights[name]) for name in weights}


Distances = dict[str, tuple[float, float]]


def apart(ours: State, other: State, start: State | None = None) -> Distances:
    """How far two states are apart, by kind of array: of all arrays together, and of the worst.

    The norm of the difference, as a share of the norm of `other`, or of what moved from `start`;
    where an array hardly moved, as a share of its rounding to float32.
    """
    assert ours.keys() == other.keys(), ours.keys() ^ other.keys()
    squares = {}
    for name, expected in other.items():
        far = np.linalg.norm(ours[name] - expected)
        length = np.linalg.norm(expected - start[name] if start else expected)
        if start:
            length = max(length, 1e-6 * np.linalg.norm(expected))
        squares.setdefault(name.split("/")[-1], []).append((far**2, length**2 + 1e-60))
    return {
        kind: (
            math.sqrt(sum(far for far, _ in pairs) / sum(length for _, length in pairs)),
            math.sqrt(max(far / length for far, length in pairs)),
        )
        for kind, pairs in squares.items()
    }
