"""ResNet-50 (He et al. 2015, https://arxiv.org/abs/1512.03385) with batch renormalization.

    from resnet50 import ResNet50
    network = ResNet50(classes=1000)
    logits = network(images)            # images: float [n, 224, 224, 3], normalised, RGB

The network is today's standard one ("v1.5": a stage halves its resolution in the 3x3 convolution of
its first block, not in the 1x1 before it). Convolutions pad k // 2 on every side, as in other
frameworks, not TensorFlow's lopsided SAME, so weights can be moved between them without loss.
"""

import tempfile
from pathlib import Path

import numpy as np
import tensorflow as tf

import utils
from batch_renorm import BatchRenorm, Limits
from utils import CROP, UserError

#         blocks, bottleneck channels, output channels, stride of the first block
STAGES = [
    (3, 64, 256, 1),
    (4, 128, 512, 2),
    (6, 256, 1024, 2),
    (3, 512, 2048, 2),
]


class ConvNorm(tf.Module):
    """A convolution without bias and its batch renormalization."""

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
        # At inference the normalisation is linear: it goes into the kernel and a bias.
        scale, offset = self.norm.scale_and_offset()
        return tf.nn.bias_add(self.convolve(x, self.kernel * scale), tf.cast(offset, x.dtype))

    def convolve(self, x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        """Convolution in the type of x, whatever the type of the kernel, padded by size // 2.

        With stride 1 that is SAME, and for 1x1 kernels VALID. Telling TensorFlow so, and padding
        beforehand in the few other places, makes a step on a CPU 1.4 times as fast as explicit
        padding in the convolution, which its fast kernels do not take.
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
            projects = stride != 1 or inputs != outputs
            self.shortcut = (
                ConvNorm(1, inputs, outputs, stride, name="shortcut") if projects else None
            )

    def __call__(self, x: tf.Tensor, limits: Limits | None) -> tf.Tensor:
        y = tf.nn.relu(self.conv1(x, limits))
        y = tf.nn.relu(self.conv2(y, limits))
        y = self.conv3(y, limits)
        return tf.nn.relu(y + (self.shortcut(x, limits) if self.shortcut else x))


class ResNet50(tf.Module):
    """float [n, 224, 224, 3] normalised RGB pictures to float32 [n, classes] logits.

    It computes in the type of its input: float32, float16 or bfloat16; variables, statistics and
    logits are float32 always. 25,557,032 trainable numbers for 1000 classes.
    """

    def __init__(self, classes: int, name: str = "resnet50"):
        super().__init__(name)
        with self.name_scope:
            self.stem = ConvNorm(7, 3, 64, stride=2, name="stem")
            self.blocks, inputs = [], 64
            for stage, (count, channels, outputs, stride) in enumerate(STAGES, 1):
                for block in range(1, count + 1):
                    self.blocks.append(
                        Bottleneck(
                            inputs,
                            channels,
                            outputs,
                            stride if block == 1 else 1,
                            name=f"stage{stage}_block{block}",
                        )
                    )
                    inputs = outputs
            bound = inputs**-0.5
            self.dense_kernel = tf.Variable(
                tf.random.uniform([inputs, classes], -bound, bound), name="dense_kernel"
            )
            self.dense_bias = tf.Variable(tf.zeros([classes]), name="dense_bias")

    def __call__(self, x: tf.Tensor, limits: Limits | None = None) -> tf.Tensor:
        """Training with `limits` (see `batch_renorm`), inference without."""
        x = tf.nn.relu(self.stem(x, limits))
        # After a ReLU, zeros around a picture never win the maximum.
        x = tf.nn.max_pool2d(tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]]), 3, 2, "VALID")
        for block in self.blocks:
            x = block(x, limits)
        x = tf.reduce_mean(tf.cast(x, tf.float32), [1, 2])
        return x @ self.dense_kernel + self.dense_bias

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


class Classifier(tf.Module):
    """What a SavedModel holds: uint8 crops to probabilities, normalisation inside."""

    def __init__(self, network: ResNet50, mu: list[float], sigma: list[float], class_names: Path):
        super().__init__()
        self.network = network
        self.mu, self.sigma = np.float32(mu), np.float32(sigma)
        self.class_names = tf.saved_model.Asset(str(class_names))

    @tf.function(input_signature=[tf.TensorSpec([None, CROP, CROP, 3], tf.uint8, "images")])
    def classify(self, images):
        """images: uint8 [n, 224, 224, 3], RGB. Returns float32 [n, classes] probabilities."""
        x = (tf.cast(images, tf.float32) / 255 - self.mu) / self.sigma
        return {"probabilities": tf.nn.softmax(self.network(x))}


def export_model(
    network: ResNet50, folder: Path, class_names: list[str], recipe: dict[str, object]
) -> None:
    """Writes the network as a SavedModel into `folder`, with the names of its classes.

    `recipe` says how it was trained; its `mu` and `sigma` become part of the model.
    """
    with tempfile.TemporaryDirectory() as temporary:
        names = Path(temporary) / utils.CLASS_NAMES
        utils.write_lines(names, class_names)
        classifier = Classifier(network, recipe["mu"], recipe["sigma"], names)
        tf.saved_model.save(classifier, str(folder), signatures=classifier.classify)


def read_weights(network: ResNet50, folder: Path) -> str:
    """Gives the network the weights and averages of a saved model; says so in the line returned.

    Where the model has other classes, the dense layer stays as it is. Raises UserError.
    """
    raise NotImplementedError


LOADING_ERRORS = (
    OSError, LookupError, ValueError, AttributeError, TypeError, RuntimeError, tf.errors.OpError,
)  # fmt: skip
"""What TensorFlow raises for folders that are no whole SavedModel."""


def load_model(folder: Path):
    """The function from uint8 crops to probabilities, and its number of classes.

    Raises UserError for a folder that is no model of this toolkit.
    """
    try:
        model = tf.saved_model.load(str(folder))
        classify = model.signatures["serving_default"]
        shape = classify.structured_outputs["probabilities"].shape
        classify.model = model  # the variables live as long as the model
        return classify, int(shape[-1])
    except LOADING_ERRORS as error:
        reason = str(error).split("\n")[0][:150]
        raise UserError(f"{folder}: not a model that can be loaded: {reason}") from None


def warn_of_other_classes(model: Path, names: list[str], where: str) -> None:
    """Warns where a saved model has another name for a class: its labels may mean other things."""
    known = utils.read_lines(model / "assets" / utils.CLASS_NAMES)
    for label, (its, name) in enumerate(zip(known, map(utils.one_line, names), strict=False)):
        if its != utils.as_written(name).decode():
            utils.warn(
                f"{model}: its class {label} is {its}, but {name} in {where}; unless these are two "
                f"names of the same thing, the labels do not fit"
            )
            return


def model_recipe(folder: Path) -> dict:
    """How a saved model was trained; empty where it does not say."""
    return utils.read_json(folder / "assets" / "recipe.json") or {}
