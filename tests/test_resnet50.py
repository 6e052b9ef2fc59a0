"""The network against a ResNet-50 written here with Keras layers, and its structure.

python3 -m pytest tests/test_resnet50.py
"""

import toolkit  # noqa: F401  (puts the scripts on the path)

import keras
import numpy as np
import pytest
import tensorflow as tf

import resnet50
from batch_renorm import Limits
from resnet50 import ConvNorm, ResNet50

BLOCKS = [3, 4, 6, 3]
EPSILON = 1e-5  # what ResNets of other frameworks have, so that weights can be moved
BATCH_NORM = Limits(tf.constant(1.0), tf.constant(0.0))


def random_network(classes: int, seed: int = 0) -> ResNet50:
    """A network in which no variable is at a value that would hide it, gamma 0 above all.

    The averages are those of a batch, disturbed, so that at inference too the logits depend on
    the images as strongly as in a trained network.
    """
    tf.random.set_seed(seed)
    network = ResNet50(classes)
    draw = np.random.default_rng(seed)
    for norm in network.norms:
        shape = norm.gamma.shape
        norm.gamma.assign(draw.uniform(0.5, 1.5, shape))
        norm.beta.assign(draw.normal(scale=0.2, size=shape))
    _, statistics = network(random_images(8, 64, seed=2), BATCH_NORM)
    for norm, (mean, std) in zip(network.norms, statistics, strict=True):
        shape = norm.gamma.shape
        norm.moving_mean.assign(mean + std * draw.normal(scale=0.1, size=shape))
        norm.moving_std.assign(std * draw.uniform(0.8, 1.25, shape))
    network.dense_bias.assign(draw.normal(size=classes))
    return network


def random_images(n: int, size: int, seed: int = 1) -> tf.Tensor:
    """float32 [n, size, size, 3]: coarse patches and fine noise."""
    coarse = tf.random.stateless_normal([n, 4, 4, 3], [seed, 1])
    fine = tf.random.stateless_normal([n, size, size, 3], [seed, 2])
    return tf.image.resize(coarse, [size, size]) + 0.3 * fine


def assert_same_function(ours: tf.Tensor, theirs: tf.Tensor, tolerance: float) -> None:
    """The difference is at most `tolerance` of what distinguishes the images' logits (rms)."""
    assert ours.shape == theirs.shape
    between_images = np.std(theirs, axis=0).mean()
    assert np.sqrt(np.mean((ours - theirs) ** 2)) <= tolerance * between_images


# --- an independent ResNet-50 -----------------------------------------------------------------


def keras_resnet50(classes: int) -> keras.Model:
    """ResNet-50 v1.5 of Keras layers, each named like the variables of the network."""
    images = keras.Input([None, None, 3])
    x = keras.layers.ReLU()(keras_conv_norm(images, "stem", 64, 7, 2))
    x = keras.layers.ZeroPadding2D(1)(x)  # zeros instead of -inf are harmless after a ReLU
    x = keras.layers.MaxPooling2D(3, 2)(x)
    for stage, count in enumerate(BLOCKS, 1):
        width = 32 * 2**stage
        for block in range(1, count + 1):
            name, stride = f"stage{stage}_block{block}", 2 if stage > 1 and block == 1 else 1
            y = keras.layers.ReLU()(keras_conv_norm(x, f"{name}/conv1", width, 1, 1))
            y = keras.layers.ReLU()(keras_conv_norm(y, f"{name}/conv2", width, 3, stride))
            y = keras_conv_norm(y, f"{name}/conv3", 4 * width, 1, 1)
            if block == 1:
                x = keras_conv_norm(x, f"{name}/shortcut", 4 * width, 1, stride)
            x = keras.layers.ReLU()(keras.layers.Add()([x, y]))
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(images, keras.layers.Dense(classes, name="dense")(x))


def keras_conv_norm(x, name: str, channels: int, size: int, stride: int):
    name = name.replace("/", "-")
    x = keras.layers.ZeroPadding2D(size // 2)(x)
    x = keras.layers.Conv2D(channels, size, stride, use_bias=False, name=name)(x)
    return keras.layers.BatchNormalization(epsilon=EPSILON, name=name + "-norm")(x)


def pour(network: ResNet50, reference: keras.Model) -> None:
    """Copies every variable into the Keras model, by name."""
    for variable in network.variables:
        path = variable.name.removeprefix("resnet50/").removesuffix(":0")
        if path.startswith("dense_"):
            layer, attribute = "dense", path.removeprefix("dense_")
        else:
            *parts, attribute = path.split("/")
            layer = "-".join(parts)
        if attribute == "moving_std":
            attribute, variable = "moving_variance", variable**2 - EPSILON
        getattr(reference.get_layer(layer), attribute).assign(variable)


def test_same_function_as_a_resnet50_of_keras_layers():
    """At the size that it is made for; inference and training as batch normalization."""
    network, reference = random_network(1000), keras_resnet50(1000)
    assert len(network.variables) == len(reference.variables)
    pour(network, reference)
    images = random_images(2, 224)
    assert_same_function(network(images), reference(images, training=False), 1e-4)
    assert_same_function(network(images, BATCH_NORM)[0], reference(images, training=True), 5e-4)


def test_same_function_at_an_odd_size():
    """Lopsided padding would show: 75 becomes 38, 19, 10, 5, 3."""
    network, reference = random_network(10), keras_resnet50(10)
    pour(network, reference)
    images = random_images(2, 75)
    assert_same_function(network(images), reference(images, training=False), 1e-4)


# --- parts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("extent", [14, 15])
@pytest.mark.parametrize(("size", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
def test_convolution_pads_both_sides_alike(size, stride, extent):
    conv = ConvNorm(size, 3, 5, stride)
    x = random_images(2, extent)
    padding = [[0, 0], [size // 2] * 2, [size // 2] * 2, [0, 0]]
    expected = tf.nn.conv2d(x, conv.kernel, stride, padding)
    np.testing.assert_allclose(conv.convolve(x, conv.kernel), expected, rtol=1e-4, atol=1e-5)


def test_folding_at_inference_changes_nothing(monkeypatch):
    network, images = random_network(10), random_images(2, 64)
    folded = network(images)

    def unfolded(self, x, limits, statistics):
        norm, x = self.norm, self.convolve(x, self.kernel)
        return (x - norm.moving_mean) / norm.moving_std * norm.gamma + norm.beta

    monkeypatch.setattr(ConvNorm, "__call__", unfolded)
    assert_same_function(folded, network(images), 1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(tf.bfloat16, 0.7), (tf.float16, 0.15)])
def test_half_precision_images_give_nearly_the_same_float32_logits(dtype, tolerance):
    """What 8 or 11 bits of mantissa leave after 53 layers; unrelated logits would differ by 1.4."""
    network, images = random_network(10), random_images(4, 64)
    limits = Limits(tf.constant(1.5), tf.constant(0.5))
    for logits, exact in (
        (network(tf.cast(images, dtype)), network(images)),
        (network(tf.cast(images, dtype), limits)[0], network(images, limits)[0]),
    ):
        assert logits.dtype == tf.float32
        assert_same_function(logits, exact, tolerance)


def test_limits_reach_every_normalisation():
    """With r and d free, training computes what inference computes, through all 53."""
    network, images = random_network(10), random_images(4, 64)
    free = Limits(tf.constant(1e6), tf.constant(1e6))
    assert_same_function(network(images, free)[0], network(images), 1e-3)


def test_statistics_come_in_the_order_of_the_normalisations():
    """With the statistics of a batch as averages, inference computes what batch normalization does
    in training. In another order it would not: many of the 53 have the same number of channels.
    """
    network, images = random_network(10), random_images(8, 64)
    logits, statistics = network(images, BATCH_NORM)
    for norm, (mean, std) in zip(network.norms, statistics, strict=True):
        assert mean.dtype == std.dtype == tf.float32
        norm.moving_mean.assign(mean)
        norm.moving_std.assign(std)
    assert_same_function(network(images), logits, 1e-3)


# --- structure --------------------------------------------------------------------------------


def expected_names() -> set[str]:
    """resnet50/stage1_block1/conv2/kernel:0, resnet50/stage1_block1/conv2/norm/gamma:0 …"""
    convolutions = ["stem"]
    for stage, count in enumerate(BLOCKS, 1):
        for block in range(1, count + 1):
            parts = ["conv1", "conv2", "conv3"] + (["shortcut"] if block == 1 else [])
            convolutions += [f"stage{stage}_block{block}/{part}" for part in parts]
    parts = ["kernel", *(f"norm/{part}" for part in ("gamma", "beta", "moving_mean", "moving_std"))]
    names = [f"{convolution}/{part}" for convolution in convolutions for part in parts]
    return {f"resnet50/{name}:0" for name in [*names, "dense_kernel", "dense_bias"]}


@pytest.fixture(scope="module")
def network() -> ResNet50:
    """As it is when training starts. Read only."""
    tf.random.set_seed(0)
    return ResNet50(1000)


@pytest.mark.parametrize(("classes", "numbers"), [(1000, 25_557_032), (10, 23_528_522)])
def test_count_of_trainable_numbers(classes, numbers):
    variables = ResNet50(classes).trainable_variables
    assert sum(np.prod(variable.shape) for variable in variables) == numbers


def test_variable_names_are_readable_and_unique(network):
    names = [variable.name for variable in network.variables]
    assert len(set(names)) == len(names)
    assert set(names) == expected_names()


def test_order_of_variables_is_the_same_in_every_network(network):
    """The optimizer and the statistics of the step pair them by position."""
    other = ResNet50(10)
    for attribute in ("variables", "trainable_variables", "kernels"):
        first, second = getattr(network, attribute), getattr(other, attribute)
        assert [v.name for v in first] == [v.name for v in second]
    assert [n.gamma.name for n in network.norms] == [n.gamma.name for n in other.norms]


def test_53_normalisations_each_once(network):
    assert len(network.norms) == 53
    assert len({norm.gamma.name for norm in network.norms}) == 53


def test_averages_are_not_trained(network):
    trained = {variable.name for variable in network.trainable_variables}
    assert not [name for name in trained if "moving" in name]
    assert len(trained) == len(network.variables) - 2 * 53


def test_weight_decay_is_for_kernels_only(network):
    names = {variable.name.split("/")[-1] for variable in network.kernels}
    assert names == {"kernel:0", "dense_kernel:0"}
    assert len(network.kernels) == 54


def test_blocks_start_as_the_identity(network):
    """gamma of the last normalisation of each of the 16 blocks is 0, every other one is 1."""
    zero = [norm.gamma.name for norm in network.norms if not norm.gamma.numpy().any()]
    assert len(zero) == 16
    assert all("/conv3/" in name for name in zero)
    for norm in network.norms:
        if norm.gamma.name not in zero:
            np.testing.assert_array_equal(norm.gamma, np.ones(norm.gamma.shape))
    block, x = network.blocks[1], tf.nn.relu(tf.random.stateless_normal([2, 6, 6, 256], [1, 2]))
    np.testing.assert_array_equal(block(x, BATCH_NORM, []), x)


def test_he_initialisation_by_fan_out(network):
    kernels = [v for v in network.kernels if "dense" not in v.name]
    assert len(kernels) == 53
    for kernel in kernels:
        height, width, _, outputs = kernel.shape
        expected = np.sqrt(2 / (height * width * outputs))
        values = kernel.numpy()
        error = 5 / np.sqrt(2 * values.size)  # five standard errors of a deviation
        assert values.std() == pytest.approx(expected, rel=error), kernel.name
        assert abs(values.mean()) < 5 * expected / np.sqrt(values.size), kernel.name


def test_stages_table_holds_the_depth():
    assert [row[0] for row in resnet50.STAGES] == BLOCKS
