"""ResNet-50 (He et al. 2015, https://arxiv.org/abs/1512.03385) with batch renormalization.

    python3 resnet50.py saved_models/mytestrun cat.jpg dog.png

prints what a trained model sees: a line per picture with the five most probable classes.

    cat.jpg: 93.1% tabby, 4.0% tiger cat, 1.2% Egyptian cat, 0.4% lynx, 0.1% Persian cat

The first argument is the folder of an epoch, or of a run to take its newest epoch. As a module:

    network = ResNet50(classes=1000)
    logits = network(images)            # images: float [n, 224, 224, 3], normalised, RGB

The network is today's standard one, "v1.5": a stage halves the resolution in the 3x3 convolution of
its first block, not in the 1x1 convolution before it. A k x k convolution pads k // 2 pixels on
every side, because other frameworks do, and weights can be exchanged with them. TensorFlow's SAME
pads unevenly.

The second part of this file exports the network as a TensorFlow SavedModel, which works without
this file. It has three signatures:

    serving_default    uint8 crops [n, 224, 224, 3]        -> probabilities
    jpeg               contents of picture files [n]       -> the five most probable classes
    features           uint8 crops [n, 224, 224, 3]        -> inputs of the dense layer
"""

import argparse
import contextlib
import io
import json
import os
import re
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import utils
from utils import CROP, UserError

import numpy as np
from PIL import Image, UnidentifiedImageError

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

    def __call__(self, x: tf.Tensor, limits: Limits | None) -> tf.Tensor:
        if limits is not None:
            return self.norm(self.convolve(x, self.kernel), limits)
        # At inference the normalisation is linear, so fold it into the kernel and a bias.
        scale, offset = self.norm.scale_and_offset()
        return tf.nn.bias_add(self.convolve(x, self.kernel * scale), tf.cast(offset, x.dtype))

    def convolve(self, x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        """Convolution in the type of x, padded by size // 2.

        With stride 1 this is what SAME does, and 1x1 kernels need no padding. In the other cases x
        is padded first. TensorFlow's fast CPU kernels do not support explicit padding in the
        convolution; without it a step is 1.4 times as fast.
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

    def __call__(self, x: tf.Tensor, limits: Limits | None) -> tf.Tensor:
        y = tf.nn.relu(self.conv1(x, limits))
        y = tf.nn.relu(self.conv2(y, limits))
        y = self.conv3(y, limits)
        return tf.nn.relu(y + (self.shortcut(x, limits) if self.shortcut else x))


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

    def __call__(self, x: tf.Tensor, limits: Limits | None = None) -> tf.Tensor:
        """Training with `limits` (see `batch_renorm`), inference without."""
        return self.classify(self.features(x, limits))

    def features(self, x: tf.Tensor, limits: Limits | None = None) -> tf.Tensor:
        """All but the dense layer: float32 [n, 2048], averaged over the picture."""
        x = tf.nn.relu(self.stem(x, limits))
        # Padding with zeros does not change the maximum after a ReLU.
        x = tf.nn.max_pool2d(tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]]), 3, 2, "VALID")
        for block in self.blocks:
            x = block(x, limits)
        return tf.reduce_mean(tf.cast(x, tf.float32), [1, 2])

    def classify(self, features: tf.Tensor) -> tf.Tensor:
        """The dense layer: float32 [n, classes] logits."""
        return features @ self.dense_kernel + self.dense_bias

    @property
    def norms(self) -> list[BatchRenorm]:
        """Every normalisation of the network, in a fixed order."""
        return [m for m in self.submodules if isinstance(m, BatchRenorm)]

    @property
    def kernels(self) -> list[tf.Variable]:
        """What weight decay applies to: convolution and dense kernels, not gamma, beta or bias."""
        return [v for v in self.trainable_variables if "kernel" in v.name]


def he_normal(shape: list[int]) -> tf.Tensor:
    """He et al. 2015b (https://arxiv.org/abs/1502.01852), fan out: deviation √(2 / k² outputs)."""
    height, width, _, outputs = shape
    return tf.random.normal(shape, stddev=(2.0 / (height * width * outputs)) ** 0.5)


# --- a trained network as a SavedModel --------------------------------------------------------

SHORTER_SIDE = 256
"""Pixels of a picture's shorter side before its centre is cut out, as in preprocess_val.py."""

RECIPE = "recipe.json"
"""The asset that says how the model was trained."""

CROPS = tf.TensorSpec([None, CROP, CROP, 3], tf.uint8, "images")


class Classifier(tf.Module):
    """What a SavedModel holds: network, normalisation, class names, recipe.

    The three functions are its signatures. They check the size of the crops, which a loaded
    signature does not.
    """

    def __init__(self, network: ResNet50, folder: Path):
        """`folder` holds the two files that become the model's assets."""
        super().__init__()
        self.network = network
        self.class_names = tf.saved_model.Asset(str(folder / utils.CLASS_NAMES))
        self.recipe = tf.saved_model.Asset(str(folder / RECIPE))
        recipe = utils.read_json(folder / RECIPE)
        self.mu, self.sigma = np.float32(recipe["mu"]), np.float32(recipe["sigma"])
        self.names = utils.read_lines(folder / utils.CLASS_NAMES)

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
    picture = tf.io.decode_jpeg(content, 3, dct_method="INTEGER_ACCURATE")  # also reads PNG
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


def export_model(
    network: ResNet50, folder: Path, class_names: list[str], recipe: dict[str, object]
) -> None:
    """Writes the network as a SavedModel into `folder`, with the names of its classes.

    `recipe` says how it was trained. Its `mu` and `sigma` become part of the model. A `fingerprint`
    of the variables is added; it tells check_accuracy.py when an epoch was trained again.
    """
    weights = b"".join(variable.numpy().tobytes() for variable in network.variables)
    recipe = recipe | {"fingerprint": f"{zlib.crc32(weights):08x}"}
    with tempfile.TemporaryDirectory() as temporary:
        assets = Path(temporary)
        utils.write_lines(assets / utils.CLASS_NAMES, class_names)
        utils.write_text(assets / RECIPE, json.dumps(recipe, indent=1))
        model = Classifier(network, assets)
        signatures = {
            "serving_default": model.classify,
            "jpeg": model.jpeg,
            "features": model.features,
        }
        tf.saved_model.save(model, str(folder), signatures)


def model_recipe(folder: Path) -> dict[str, object]:
    """How a saved model was trained; {} if it does not say."""
    return utils.read_json(folder / "assets" / RECIPE) or {}


LOADING_ERRORS = (
    OSError, LookupError, ValueError, AttributeError, TypeError, RuntimeError, AssertionError,
    tf.errors.OpError,
)  # fmt: skip
"""What TensorFlow raises for a folder that is not a complete SavedModel."""


@contextlib.contextmanager
def explained_loading(folder: Path) -> Iterator[None]:
    """Turns LOADING_ERRORS into UserError."""
    try:
        yield
    except LOADING_ERRORS as error:
        reason = str(error).split("\n")[0][:150]
        if epochs := epochs_in(folder):
            reason = f"it is a run; name one of its epochs, such as {folder / str(epochs[-1])}"
        elif not folder.is_dir():
            reason = "there is no such folder"
        raise UserError(f"{folder}: not a model that can be loaded: {reason}") from None


def epochs_in(run: Path) -> list[int]:
    """Epochs that have a model in a run's folder, oldest first."""
    try:
        names = utils.patiently(os.listdir, run)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9]\d*", name))


def runs_in(folder: Path) -> str:
    """The names of the runs in `path_for_saving`, for a message."""
    names = sorted(path.name for path in folder.glob("*") if path.is_dir())
    return ", ".join(names) or "no runs yet"


def load_signature(folder: Path, name: str) -> Callable[..., dict[str, tf.Tensor]]:
    """A signature of a saved model, as a function. Raises UserError if there is none."""
    with explained_loading(folder):
        model = tf.saved_model.load(str(folder))
        if name not in model.signatures:
            raise ValueError(f"it has no signature {name}")
        function = model.signatures[name]
        function.model = model  # keeps the model's variables alive
        return function


def load_model(folder: Path) -> tuple[Callable[..., dict[str, tf.Tensor]], int]:
    """The function from uint8 crops to probabilities, and its number of classes.

    Raises UserError if the folder is not a model of this toolkit.
    """
    classify = load_signature(folder, "serving_default")
    with explained_loading(folder):
        return classify, int(classify.structured_outputs["probabilities"].shape[-1])


def read_weights(network: ResNet50, folder: Path, spec: SimpleNamespace) -> str:
    """Copies the weights and averages of a saved model to the network. Returns a line to print.

    The dense layer is copied only if the classes have the same names in the same order. `spec` has
    the `class_names`, `mu` and `sigma` of the new training. Warns if the model was trained with
    another normalisation. Raises UserError.
    """
    checkpoint = str(folder / "variables" / "variables")
    bias = "network/dense_bias/.ATTRIBUTES/VARIABLE_VALUE"
    with explained_loading(folder):
        shapes = tf.train.load_checkpoint(checkpoint).get_variable_to_shape_map()
        if bias not in shapes:
            raise ValueError("it holds no network of this toolkit")
        source = ResNet50(shapes[bias][0])
        tf.train.Checkpoint(network=source).read(checkpoint).assert_existing_objects_matched()
    same = class_names_of(folder) == [as_written(name) for name in spec.class_names]
    for variable, its in zip(network.variables, source.variables, strict=True):
        if same or "dense" not in variable.name:
            variable.assign(its)
    recipe = model_recipe(folder)
    for name in ("mu", "sigma"):
        its, new = recipe.get(name), list(getattr(spec, name))
        if its not in (None, new):
            utils.warn(
                f"{folder} was trained with {name} = {its}, now it is {new}; its weights work "
                f"best with the old {name}: set that in the [utils] section of your settings"
            )
    its_classes = utils.plural(shapes[bias][0], "class")
    dense = "copied" if same else f"new: {utils.plural(len(spec.class_names), 'class')}"
    return f"initialised from {folder} ({its_classes}); the dense layer is {dense}"


def class_names_of(model: Path) -> list[str]:
    """The class names in a saved model, as its file spells them. [] if it has none."""
    return utils.read_lines(model / "assets" / utils.CLASS_NAMES)


def as_written(name: str) -> str:
    """A class name in the spelling of `class_names_of`."""
    return utils.as_written(utils.one_line(name)).decode()


def warn_of_other_classes(model: Path, names: list[str], where: str) -> None:
    """Warns of the first class whose name differs in a saved model."""
    names = map(as_written, names)
    for label, (its, name) in enumerate(zip(class_names_of(model), names, strict=False)):
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
    classify = load_signature(find_model(args.model, args.config), "jpeg")
    failed = 0
    for path in args.pictures:
        try:
            print(f"{path}: {best_classes(classify, utils.read_file(path))}", flush=True)
        except PICTURE_ERRORS as error:
            failed += 1
            reason = getattr(error, "strerror", None) or error
            utils.warn(f"{path}: cannot be read: {reason}")
    if failed:
        raise UserError(
            f"{failed} of {utils.plural(len(args.pictures), 'picture')} could not be read; see the "
            f"warnings above"
        )


def parse_arguments() -> argparse.Namespace:
    parser = utils.Parser(
        "Prints the five most probable classes of each picture, according to a trained model.",
        "resnet50.py saved_models/mytestrun cat.jpg dog.png",
    )
    model = "folder of a saved model, or folder or name of a run (its newest epoch is used)"
    parser.add_argument("model", type=Path, metavar="MODEL", help=model)
    parser.add_argument("pictures", type=Path, metavar="PICTURE", nargs="+", help="picture files")
    parser.add("--verbose", None, "show TensorFlow's own messages")  # see utils.quiet_tensorflow
    return parser.parse()


def find_model(given: Path, settings: Path) -> Path:
    """The folder of the model. `given`: the folder of a model or a run, or the name of a run.

    Raises UserError if it does not exist.
    """
    folder = given
    if not given.exists() and settings.is_file():
        folder = utils.load_config(settings).train.path_for_saving / given
    if not folder.exists():
        raise UserError(
            f"{given}: no such folder; name a saved model such as saved_models/mytestrun/29, or a "
            f"run such as saved_models/mytestrun"
        )
    epochs = epochs_in(folder)
    return folder / str(epochs[-1]) if epochs else folder


PICTURE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What reading or Pillow raises for files that are not pictures. SyntaxError: a broken PNG."""


def best_classes(classify: Callable, content: bytes) -> str:
    """ "93.1% tabby, 4.0% tiger cat, …" for the content of a picture file.

    Raises one of PICTURE_ERRORS.
    """
    try:
        best = classify(contents=tf.constant([content]))
    except tf.errors.InvalidArgumentError:  # neither JPEG nor PNG: Pillow reads more formats
        best = classify(contents=tf.constant([as_png(content)]))
    shares = zip(best["probabilities"][0].numpy(), best["names"][0].numpy(), strict=True)
    return ", ".join(f"{share:.1%} {name.decode()}" for share, name in shares)


def as_png(content: bytes) -> bytes:
    """A picture of any format that Pillow opens, converted to PNG. Raises one of PICTURE_ERRORS."""
    png = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(content))
        except UnidentifiedImageError:
            raise ValueError("not a picture of a known format") from None
        image.convert("RGB").save(png, "PNG")
    return png.getvalue()


if __name__ == "__main__":
    utils.run(main)
