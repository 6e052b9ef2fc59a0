"""ResNet-50 (He et al. 2015, https://arxiv.org/abs/1512.03385) with batch renormalization.

    python3 resnet50.py saved_models/mytestrun cat.jpg dog.png holiday/

prints what a trained model sees: a line per picture with the five most probable classes.

    cat.jpg: 93.1% tabby, 4.0% tiger cat, 1.2% Egyptian cat, 0.4% lynx, 0.1% Persian cat

The first argument is the folder of an epoch, or of a run to take its newest epoch. The others are
pictures and folders of pictures. If folders are named after classes, top-1 and top-5 follow.
As a module:

    network = ResNet50(classes=1000)
    logits = network(images)            # images: float [n, 224, 224, 3], normalised, RGB

The network is today's standard one, "v1.5": a stage halves the resolution in the 3x3 convolution of
its first block, not in the 1x1 convolution before it. A k x k convolution pads k // 2 pixels on
every side, as in other frameworks, so that weights can be exchanged with them. TensorFlow's SAME
pads unevenly.

Then come the names of what lies in a run's folder, and the export of the network as a TensorFlow
SavedModel, which works without this file. It has three signatures:

    serving_default    uint8 crops [n, 224, 224, 3]        -> probabilities
    jpeg               contents of JPEG or PNG files [n]   -> the five most probable classes
    features           uint8 crops [n, 224, 224, 3]        -> inputs of the dense layer
"""

import os.path
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -I leaves it out

import utils  # first: it says which package is missing
from utils import UserError, number, plural, printable, whole

# isort: split
import argparse
import dataclasses
import itertools
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import preprocess
from preprocess import CROP, SHORTER_SIDE

with utils.quiet_tensorflow():
    import tensorflow as tf

    from batch_renorm import BatchRenorm, Limits

#         blocks, bottleneck channels, output channels, stride of the first block
STAGES = [
    (3, 64, 256, 1),
    (4, 128, 512, 2),
    (6, 256, 1024, 2),
    (3, 512, 2048, 2),
]


class ConvNorm(tf.Module):
    """A convolution without bias, then batch renormalization."""

    def __init__(
        self,
        size: int,
        inputs: int,
        outputs: int,
        stride: int = 1,
        gamma: float = 1.0,
        name: str | None = None,
    ):
        super().__init__(name)
        self.stride, self.padding = stride, size // 2
        with self.name_scope:
            self.kernel = tf.Variable(he_normal([size, size, inputs, outputs]), name="kernel")
            self.norm = BatchRenorm(outputs, gamma, name="norm")

    def __call__(self, x: tf.Tensor, limits: Limits | None, statistics: list) -> tf.Tensor:
        """With `limits`, in training, appends mean and deviation of the batch to `statistics`."""
        if limits is not None:
            y, mean, std = self.norm(self.convolve(x, self.kernel), limits)
            statistics.append((mean, std))
            return y
        # At inference the normalisation is linear, so fold it into the kernel and a bias.
        scale, offset = self.norm.scale_and_offset()
        return tf.nn.bias_add(self.convolve(x, self.kernel * scale), tf.cast(offset, x.dtype))

    def convolve(self, x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        """Convolution in the type of x, padded by size // 2.

        With stride 1 this is what SAME does, and 1x1 kernels need no padding. In the other cases x
        is padded first. TensorFlow's fast CPU kernels do not support explicit padding in the
        convolution; padding first makes a step 1.4 times as fast.
        """
        if self.stride > 1 and self.padding:
            pad = [self.padding, self.padding]
            x = tf.pad(x, [[0, 0], pad, pad, [0, 0]])
        padding = "SAME" if self.stride == 1 else "VALID"
        return tf.nn.conv2d(x, tf.cast(kernel, x.dtype), self.stride, padding)


class Bottleneck(tf.Module):
    """1x1 down, 3x3, 1x1 up, and a shortcut around them: relu(f(x) + shortcut(x))."""

    def __init__(
        self, inputs: int, channels: int, outputs: int, stride: int, name: str | None = None
    ):
        super().__init__(name)
        with self.name_scope:
            self.conv1 = ConvNorm(1, inputs, channels, name="conv1")
            self.conv2 = ConvNorm(3, channels, channels, stride, name="conv2")
            # gamma = 0: the block starts as the identity, which eases the start of training
            # (Goyal et al. 2017, section 5.1).
            self.conv3 = ConvNorm(1, channels, outputs, gamma=0.0, name="conv3")
            self.shortcut = None
            if stride != 1 or inputs != outputs:
                self.shortcut = ConvNorm(1, inputs, outputs, stride, name="shortcut")

    def __call__(self, x: tf.Tensor, limits: Limits | None, statistics: list) -> tf.Tensor:
        y = tf.nn.relu(self.conv1(x, limits, statistics))
        y = tf.nn.relu(self.conv2(y, limits, statistics))
        y = self.conv3(y, limits, statistics)
        return tf.nn.relu(y + (self.shortcut(x, limits, statistics) if self.shortcut else x))


class ResNet50(tf.Module):
    """Maps normalised RGB pictures, float [n, 224, 224, 3], to logits, float32 [n, classes].

    It computes in the type of its input: float32, float16 or bfloat16. Variables, statistics and
    logits are always float32. With 1000 classes it has 25,557,032 trainable parameters.
    """

    def __init__(self, classes: int, name: str = "resnet50"):
        super().__init__(name)
        with self.name_scope:
            self.stem = ConvNorm(7, 3, 64, stride=2, name="stem")
            self.blocks, inputs = [], 64
            for stage, (count, channels, outputs, stride) in enumerate(STAGES, 1):
                for block in range(1, count + 1):
                    name = f"stage{stage}_block{block}"
                    own_stride = stride if block == 1 else 1
                    self.blocks.append(Bottleneck(inputs, channels, outputs, own_stride, name))
                    inputs = outputs
            bound = inputs**-0.5
            self.dense_kernel = tf.Variable(
                tf.random.uniform([inputs, classes], -bound, bound), name="dense_kernel"
            )
            self.dense_bias = tf.Variable(tf.zeros([classes]), name="dense_bias")

    def __call__(self, x: tf.Tensor, limits: Limits | None = None) -> tf.Tensor | tuple:
        """At inference, returns the logits. In training, with `limits` (see `batch_renorm`), also
        returns the (mean, standard deviation) of the batch for each of `norms`, float32 [channels].
        """
        statistics = []
        logits = self.classify(self.features(x, limits, statistics))
        return logits if limits is None else (logits, statistics)

    def features(
        self, x: tf.Tensor, limits: Limits | None = None, statistics: list | None = None
    ) -> tf.Tensor:
        """All but the dense layer: float32 [n, 2048], averaged over the picture."""
        x = tf.nn.relu(self.stem(x, limits, statistics))
        # Padding with zeros does not change the maximum after a ReLU.
        x = tf.nn.max_pool2d(tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]]), 3, 2, "VALID")
        for block in self.blocks:
            x = block(x, limits, statistics)
        return tf.reduce_mean(tf.cast(x, tf.float32), [1, 2])

    def classify(self, features: tf.Tensor) -> tf.Tensor:
        """The dense layer: float32 [n, classes] logits."""
        return features @ self.dense_kernel + self.dense_bias

    @property
    def norms(self) -> list[BatchRenorm]:
        """Every normalisation of the network, in the order of the forward pass."""
        modules = [module for part in (self.stem, *self.blocks) for module in part.submodules]
        return [module for module in modules if isinstance(module, BatchRenorm)]

    @property
    def kernels(self) -> list[tf.Variable]:
        """What weight decay applies to: convolution and dense kernels, not gamma, beta or bias."""
        return [v for v in self.trainable_variables if "kernel" in v.name]


def he_normal(shape: list[int]) -> tf.Tensor:
    """He et al. 2015b (https://arxiv.org/abs/1502.01852), fan out: deviation √(2 / k² outputs)."""
    height, width, _, outputs = shape
    return tf.random.normal(shape, stddev=(2.0 / (height * width * outputs)) ** 0.5)


# --- the names of what lies in a run's folder -------------------------------------------------
# train.py and check_accuracy.py both work in `path_for_saving/<run>`. They share these names.

RUN_LOCK = ".train.lock"
CHECKER_LOCK = ".check_accuracy.lock"
STATE = "training_state"
"""Subfolder of a model with what training needs to continue. It may be deleted."""

RECIPE = "recipe.json"
"""In a model's `assets`: what the model sees, and how it was trained."""

FINITE = number(0)
TRAINING_LOG = "training_log.csv"
LOG_COLUMNS = {
    "step": whole(0),  # the last of the steps in this row, counted across all epochs
    "epoch": whole(0),  # of that step
    "batch": whole(0),  # of that step, in its epoch
    "seconds": FINITE,  # of training so far; pauses between a stop and a resume do not count
    "steps": whole(1),  # how many are in this row
    "loss": FINITE,  # mean over the steps, in nats: cross-entropy with the L2 penalty
    "loss_without_l2": FINITE,  # mean over the steps, in nats
    "top1": number(0, 1),  # share of the batches' pictures that the network recognised
    "images_per_second": FINITE,  # of this machine
    "learning_rate": FINITE,
    "waiting_for_data": number(0, 1),  # share of the time in which the device had no batch
    "r_max": number(1),  # the limits of batch renormalization
    "d_max": FINITE,
    "gradient_norm": float,  # mean over the steps; not finite if all were skipped
    "loss_scale": FINITE,  # in float16, else 1
    "skipped_steps": whole(0),  # in float16: the gradient was not finite
}
"""The columns of the training log, each with what reads its cells."""


def or_empty(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """What reads a cell that may be empty, as None."""
    return lambda text: kind(text) if text else None


ACCURACY = "accuracy.csv"
ACCURACY_COLUMNS = {
    "epoch": whole(0), "step": or_empty(whole(0)),
    "top1_10crop": or_empty(number(0, 1)), "top5_10crop": or_empty(number(0, 1)),
    "top1_centre": number(0, 1), "top5_centre": number(0, 1), "loss_centre": FINITE,
    "pictures": whole(0), "crops": str, "model": str,
}  # fmt: skip
"""The columns of the table of accuracies. Accuracies are 0…1. With --crops=1 those of ten crops are
empty. The loss is the mean cross-entropy in nats. `crops` changes with the validation pictures or
labels, `model` when the epoch is trained again."""


@dataclass
class LockNote:
    """What a running script says in its lock."""

    gpus: list[int] = dataclasses.field(default_factory=list)  # that train.py uses
    epochs: list[int] = dataclasses.field(default_factory=list)  # that check_accuracy.py evaluates


def write_lock_note(lock: Path, note: LockNote) -> None:
    """Writes into a lock file that this process holds."""
    descriptor = os.open(lock, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(utils.record_text(note))


def read_lock_note(lock: Path) -> LockNote:
    """The note in a lock; an empty one if no process holds it. All GPUs and epochs if it is
    being written right now and cannot be read.
    """
    try:
        note = utils.read_record(LockNote, lock) if utils.is_locked(lock) else None
        return note or LockNote()
    except UserError:
        return LockNote(list(range(100)), list(range(10**6)))


def run_name(text: str) -> str:
    """Argument type: a plain name, which becomes a folder below path_for_saving."""
    if not re.fullmatch(r"[\w][\w.+ -]*", text):
        raise argparse.ArgumentTypeError(
            f"expected a plain name of letters, digits and . _ + -, not {text!r}"
        )
    return text


def runs_in(folder: Path) -> str:
    """The names of the runs in `path_for_saving`, for a message. An empty folder is not a run."""
    names = sorted({path.parent.name for path in folder.glob("*/*")})
    return ", ".join(names) or "no runs yet"


def epochs_in(run: Path) -> list[int]:
    """Epochs that have a model in a run's folder, oldest first. Other folders may have numbers for
    names too: backups named by the date, say.
    """
    try:
        names = utils.patiently(os.listdir, run)
    except (FileNotFoundError, NotADirectoryError):
        return []
    numbers = [int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]{0,5}", name)]
    return sorted(number for number in numbers if is_model(run / str(number)))


def is_model(folder: Path) -> bool:
    """Whether a folder holds a SavedModel."""
    try:
        return utils.patiently(os.stat, folder / "saved_model.pb").st_size > 0
    except (FileNotFoundError, NotADirectoryError):
        return False


# --- a trained network as a SavedModel --------------------------------------------------------

CROPS = tf.TensorSpec([None, CROP, CROP, 3], tf.uint8, "images")


@dataclass
class ModelRecipe:
    """What a model sees, and how it was trained. The content of recipe.json."""

    class_names: list[str]  # by label
    mu: list[float]  # subtracted from pixels scaled to 0…1: R, G, B
    sigma: list[float]  # what the difference is divided by
    flags: dict[str, Any]  # of the training; they inform people
    step: int | None = None  # steps before the model was saved, counted across all epochs
    fingerprint: str = ""  # of the variables; `export_model` sets it

    def __post_init__(self) -> None:
        """Raises ValueError if a value is out of range."""
        if not self.class_names or len(self.mu) != 3 or len(self.sigma) != 3 or 0 in self.sigma:
            raise ValueError("class_names, mu and sigma must be those of a model")
        if not 0 <= (self.step or 0) < 2**62:
            raise ValueError(f"no training has {self.step} steps")


def model_recipe(folder: Path) -> ModelRecipe:
    """How a saved model was trained. Raises UserError if the folder is no model of this toolkit."""
    recipe = utils.read_record(ModelRecipe, folder / "assets" / RECIPE)
    if recipe is not None and is_model(folder):
        return recipe
    reason = "it is not complete" if folder.is_dir() else "there is no such folder"
    if epochs := epochs_in(folder):
        reason = f"it is a run; name one of its epochs, such as {folder / str(epochs[-1])}"
    raise UserError(f"{folder}: not a model of this toolkit, such as saved_models/he/29: {reason}")


class Classifier(tf.Module):
    """What a SavedModel holds: network, normalisation, class names.

    The three functions are its signatures. They check the size of the crops, which a loaded
    signature does not.
    """

    def __init__(self, network: ResNet50, recipe: ModelRecipe):
        super().__init__()
        self.network = network
        self.mu, self.sigma = np.float32(recipe.mu), np.float32(recipe.sigma)
        # Names of folders need not be UTF-8.
        self.names = [name.encode("utf-8", "backslashreplace") for name in recipe.class_names]

    @tf.function(input_signature=[CROPS])
    def features(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        """images: uint8 [n, 224, 224, 3], RGB. Returns features: float32 [n, 2048]."""
        images = tf.ensure_shape(images, CROPS.shape)
        x = (tf.cast(images, tf.float32) / 255 - self.mu) / self.sigma
        return {"features": self.network.features(x)}

    @tf.function(input_signature=[CROPS])
    def classify(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        """images: uint8 [n, 224, 224, 3], RGB. Returns probabilities: float32 [n, classes]."""
        logits = self.network.classify(self.features(images)["features"])
        return {"probabilities": tf.nn.softmax(logits)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "contents")])
    def jpeg(self, contents: tf.Tensor) -> dict[str, tf.Tensor]:
        """contents: string [n], JPEG or PNG files. Returns the k = min(5, classes) most probable
        classes, best first: names, string [n, k]; probabilities, float32; labels, int32.
        """
        crop = tf.TensorSpec(CROPS.shape[1:], tf.uint8)
        images = tf.map_fn(centre_crop, contents, fn_output_signature=crop)
        probabilities = self.classify(images)["probabilities"]
        best, labels = tf.math.top_k(probabilities, min(5, probabilities.shape[1]))
        names = tf.gather(self.names, labels)
        return {"names": names, "probabilities": best, "labels": labels}


def centre_crop(content: tf.Tensor) -> tf.Tensor:
    """The centre crop of a JPEG or PNG file. content: string []. Returns uint8 [224, 224, 3], RGB.

    Each pixel is within one of 256 levels of the crop that preprocess_val.py cuts. They differ
    because Pillow resizes rows, rounds, and then resizes columns.
    """
    picture = decode_in_graph(content)
    size = tf.shape(picture)[:2]
    resized = tf.round(size * SHORTER_SIDE / tf.reduce_min(size))  # half to even, as in Python
    resized = tf.cast(resized, tf.int32)
    # What tf.image.resize(picture, size, antialias=True) computes, but only within the window.
    crop = tf.raw_ops.ScaleAndTranslate(
        images=picture[None],
        size=[CROP, CROP],
        scale=tf.cast(resized / size, tf.float32),
        translation=-tf.cast((resized - CROP) // 2, tf.float32),
        kernel_type="triangle",
    )
    return tf.saturate_cast(tf.round(crop[0]), tf.uint8)


ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
"""The segment that Adobe's programs put into a CMYK JPEG, whose values they invert."""


def decode_in_graph(content: tf.Tensor) -> tf.Tensor:
    """A JPEG or PNG file as uint8 [height, width, 3], RGB. content: string [].

    TensorFlow decodes GIF too, but not as Pillow does, so it is refused. Pillow takes every CMYK
    JPEG for inverted, TensorFlow only those with Adobe's segment. So one is put at the start. The
    file's own segment, if any, comes later and takes precedence.
    """
    is_jpeg = tf.strings.substr(content, 0, 3) == b"\xff\xd8\xff"
    is_png = tf.strings.substr(content, 0, 8) == b"\x89PNG\r\n\x1a\n"

    def marked() -> tf.Tensor:
        rest = tf.strings.substr(content, 2, tf.strings.length(content))
        is_cmyk = tf.image.extract_jpeg_shape(content)[2] == 4
        return tf.where(is_cmyk, tf.strings.join([b"\xff\xd8", ADOBE, rest]), content)

    with tf.control_dependencies([tf.debugging.Assert(is_jpeg | is_png, ["not JPEG or PNG"])]):
        file = tf.cond(is_jpeg, marked, lambda: tf.identity(content))
    return tf.io.decode_jpeg(file, 3, dct_method="INTEGER_ACCURATE")  # also decodes PNG


def export_model(network: ResNet50, folder: Path, recipe: ModelRecipe) -> None:
    """Writes the network as a SavedModel into `folder`. The recipe's `fingerprint` is computed."""
    checksum = 0
    for variable in network.variables:
        checksum = zlib.crc32(variable.numpy().tobytes(), checksum)
    recipe = dataclasses.replace(recipe, fingerprint=f"{checksum:08x}")
    model = Classifier(network, recipe)
    signatures = {
        "serving_default": model.classify,
        "jpeg": model.jpeg,
        "features": model.features,
    }
    tf.saved_model.save(model, str(folder), signatures)
    (folder / "assets").mkdir(exist_ok=True)
    utils.write_record(folder / "assets" / RECIPE, recipe)


DAMAGED = (LookupError, ValueError, AssertionError, RuntimeError, tf.errors.OpError)
"""What TensorFlow raises for files that are cut off or do not belong together."""


def brief(error: Exception) -> str:
    """The start of an error's text: TensorFlow's errors have many lines."""
    return printable(error)[:150]


def refuse_pipes(files: list[Path]) -> None:
    """Raises ValueError: TensorFlow would wait until somebody writes into a pipe."""
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file.name} is not a file")


def load_model(folder: Path) -> tuple[Callable[..., dict[str, tf.Tensor]], ModelRecipe]:
    """The function from uint8 crops to probabilities, and the model's recipe.

    Raises UserError if the folder is not a model of this toolkit.
    """
    recipe = model_recipe(folder)
    try:
        refuse_pipes([*folder.glob("*.pb"), *folder.glob("variables/*")])
        model = tf.saved_model.load(str(folder))
        classify = model.signatures["serving_default"]
        classes = classify.structured_outputs["probabilities"].shape[-1]
    except (OSError, *DAMAGED) as error:
        raise UserError(f"{folder}: the model is damaged: {brief(error)}") from None
    classify.model = model  # keeps the model's variables alive
    if classes != len(recipe.class_names):
        its = plural(len(recipe.class_names), "class")
        raise UserError(f"{folder}: {RECIPE} names {its}, but the model has {classes:,}")
    return classify, recipe


def read_checkpoint(checkpoint: tf.train.Checkpoint, prefix: Path) -> None:
    """Loads the variables that were saved under the names `prefix`.*.

    Raises one of DAMAGED. Raises UserError or OSError if the storage fails, and MemoryError if the
    device is full: then the files are not damaged.
    """
    files = list(prefix.parent.glob(f"{prefix.name}.*"))
    refuse_pipes(files)
    for file in files:
        utils.read_file(file)
    try:
        checkpoint.read(str(prefix)).assert_existing_objects_matched()
    except tf.errors.ResourceExhaustedError:
        raise MemoryError from None


def read_weights(
    network: ResNet50, folder: Path, class_names: list[str], mu: list[float], sigma: list[float]
) -> str:
    """Copies the weights and averages of a saved model to the network. Returns a line to print.

    `class_names`, `mu` and `sigma` are those of the new training. The dense layer is copied only if
    the classes have the same names in the same order. Warns if the model was trained with another
    normalisation. Raises UserError.
    """
    recipe = model_recipe(folder)
    source = ResNet50(len(recipe.class_names))
    try:
        read_checkpoint(tf.train.Checkpoint(network=source), folder / "variables" / "variables")
    except DAMAGED as error:
        raise UserError(f"{folder}: the model is damaged: {brief(error)}") from None
    same = recipe.class_names == class_names
    for variable, its in zip(network.variables, source.variables, strict=True):
        if same or "dense" not in variable.name:
            variable.assign(its)
    for name, its, new in (("mu", recipe.mu, mu), ("sigma", recipe.sigma, sigma)):
        if its != new:
            utils.warn(
                f"{folder} was trained with {name} = {its}, now it is {new}; its weights work "
                f"best with the old {name}: set that in the [utils] section of your settings"
            )
    dense = "copied" if same else f"new: {plural(len(class_names), 'class')}"
    its_classes = plural(len(recipe.class_names), "class")
    return f"initialised from {folder} ({its_classes}); the dense layer is {dense}"


def warn_of_other_classes(model: Path, names: list[str], where: str) -> None:
    """Warns of the first class whose name differs in a saved model."""
    pairs = zip(model_recipe(model).class_names, names, strict=False)
    for label, (its, name) in enumerate(pairs):
        if its != name:
            utils.warn(
                f"{model}: its class {label} is {its}, but {name} in {where}; unless both names "
                f"mean the same thing, the labels do not match"
            )
            return


# --- the command line -------------------------------------------------------------------------


def main() -> None:
    args = parse_arguments()
    tf.config.set_visible_devices([], "GPU")  # train.py may need all of the GPU's memory
    classify, recipe = load_model(find_model(args.model))
    names = recipe.class_names
    pictures = find_pictures(args.paths, names)
    progress, rows, hits = utils.Progress(len(pictures), "pictures"), [], []
    for path, probabilities in predict(classify, list(pictures)):
        best = np.argsort(-probabilities, kind="stable")[:5].tolist()
        shares = [(label, printable(names[label]), float(probabilities[label])) for label in best]
        rows.append(as_row(path, shares))
        if args.csv:
            progress.add()
        else:
            line = ", ".join(f"{share:.1%} {name}" for _, name, share in shares)
            print(f"{printable(path)}: {line}")
        if pictures[path] is not None:
            hits.append([names[label] == pictures[path] for label in best])
    if args.csv:
        utils.write_csv(args.csv, COLUMNS, rows)
        print(f"wrote {args.csv}")
    if hits:
        top1, top5 = np.mean([hit[0] for hit in hits]), np.mean([any(hit) for hit in hits])
        print(
            f"{plural(len(hits), 'picture')} in folders with names of classes: top-1 {top1:.2%}, "
            f"top-5 {top5:.2%} (centre crop)"
        )
    if failed := len(pictures) - len(rows):
        raise UserError(
            f"{failed} of {plural(len(pictures), 'picture')} could not be read; see the warnings "
            f"above"
        )


def parse_arguments() -> argparse.Namespace:
    parser = utils.Parser(
        "Prints the five most probable classes of each picture, according to a trained model. A\n"
        "saved model can run any code when it is loaded: load only models that you trust.",
        "resnet50.py saved_models/mytestrun cat.jpg dog.png holiday/",
    )
    add, model = parser.add_argument, "folder of a saved model, or of a run (its newest is used)"
    add("model", type=Path, metavar="MODEL", help=model)
    add("paths", type=Path, metavar="PATH", nargs="+", help="pictures, and folders of pictures")
    parser.add("--csv", Path, "write a table with a row per picture, instead of the lines")
    parser.add("--verbose", None, "show TensorFlow's own messages")  # see utils.quiet_tensorflow
    args = parser.parse()
    if args.csv and not (args.csv.suffix == ".csv" and can_be_written(args.csv)):
        raise UserError(
            f"--csv={args.csv}: expected a name ending in .csv, in a folder that can be written to"
        )
    return args


def can_be_written(file: Path) -> bool:
    folder = file.absolute().parent
    return not file.is_dir() and folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def find_model(folder: Path) -> Path:
    """The folder of a model, given that or the run's. Raises UserError if there is no model."""
    if epochs := epochs_in(folder):
        return folder / str(epochs[-1])
    if not is_model(folder):
        raise UserError(
            f"{folder}: not a saved model such as saved_models/mytestrun/29, nor a run that has "
            f"one, such as saved_models/mytestrun; the model comes first, then the pictures"
        )
    return folder


def find_pictures(paths: list[Path], names: list[str]) -> dict[Path, str | None]:
    """These pictures and those in these folders, in order. Raises UserError for an empty folder.

    A picture in a folder that has the name of a class, at any depth, gets that name; others None.
    """
    found, known = {}, set(names)
    for path in paths:
        if not path.is_dir():
            found[path] = None
            continue
        files = preprocess.files_below(path, ".", os.path.realpath(path), set())
        files = [Path(file) for file in sorted(files) if preprocess.is_picture_name(file)]
        if not files:
            raise UserError(f"{path}: no pictures in this folder or below")
        top = path.absolute().name
        folders = {top}.union(*(file.parts[:-1] for file in files))
        readable = dict(zip(folders, preprocess.readable_names(path, folders), strict=True))
        for file in files:
            own = (n for f in (top, *file.parts[:-1]) for n in (f, readable[f]) if n in known)
            found[path / file] = next(own, None)
    return found


def predict(classify: Callable, paths: list[Path]) -> Iterator[tuple[Path, np.ndarray]]:
    """Yields each picture that can be read and its probabilities, float32 [classes], in order."""
    loaded = zip(paths, utils.map_in_order(centre, paths, utils.cores()), strict=True)
    crops = ((path, crop) for path, crop in loaded if crop is not None)
    while group := list(itertools.islice(crops, 16)):  # together, which is faster
        images = tf.constant(np.stack([crop for _, crop in group]))
        probabilities = classify(images=images)["probabilities"].numpy()
        yield from zip([path for path, _ in group], probabilities, strict=True)


def centre(path: Path) -> np.ndarray | None:
    """The centre crop of a picture, as check_accuracy.py evaluates it: uint8 [224, 224, 3]. None,
    with a warning, if the picture cannot be read.
    """
    try:
        image = preprocess.decode(preprocess.read_picture(path))
    except (preprocess.BrokenPicture, OSError) as error:
        utils.warn(f"{path}: left out, {getattr(error, 'strerror', None) or error}")
        return None
    width, height = preprocess.resized_size(*image.size, SHORTER_SIDE)
    left, top = (width - CROP) // 2, (height - CROP) // 2
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized.crop((left, top, left + CROP, top + CROP)))


COLUMNS = ["path", *(f"{k}_{i}" for k in ("label", "name", "probability") for i in range(1, 6))]


def as_row(path: Path, shares: list[tuple[int, str, float]]) -> dict[str, object]:
    """The row of a picture in the table. `shares`: labels, names and probabilities, best first."""
    row = {"path": printable(path)}
    for i, (label, name, share) in enumerate(shares, 1):
        row |= {f"label_{i}": label, f"name_{i}": name, f"probability_{i}": share}
    return row


if __name__ == "__main__":
    utils.run(main, lines_are_product=True)
