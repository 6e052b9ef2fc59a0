"""The layer against Keras's batch renormalization, against the paper's formulas, and at its edges.

python3 -m pytest tests/test_batch_renorm.py
"""

from types import SimpleNamespace

import toolkit  # noqa: F401  (puts the scripts on the path)
import utils

import keras
import numpy as np
import pytest
import tensorflow as tf

from batch_renorm import (
    EPSILON,
    BatchRenorm,
    Limits,
    in_updates,
    limits_at,
    momentum_at,
    ramp,
)

CHANNELS = 6
BATCH_NORM = Limits(tf.constant(1.0), tf.constant(0.0))
WIDE = Limits(tf.constant(1e6), tf.constant(1e6))


def make_layer(seed: int = 0, channels: int = CHANNELS) -> BatchRenorm:
    """A layer with random gamma, beta and averages: every term of the formula counts."""
    draw = np.random.default_rng(seed)
    layer = BatchRenorm(channels)
    layer.gamma.assign(draw.uniform(0.5, 1.5, channels))
    layer.beta.assign(draw.normal(size=channels))
    layer.moving_mean.assign(draw.normal(size=channels))
    layer.moving_std.assign(draw.uniform(0.5, 2.0, channels))
    return layer


def make_batch(seed: int, shape=(4, 5, 3, CHANNELS), mean=0.5, std=1.5) -> np.ndarray:
    """float32 `shape`: each channel with a mean and a deviation of its own around the given."""
    draw = np.random.default_rng(seed)
    own_mean = mean + draw.normal(size=shape[-1])
    own_std = std * draw.uniform(0.5, 2.0, shape[-1])
    return (own_mean + own_std * draw.normal(size=shape)).astype(np.float32)


def paper(x, layer: BatchRenorm, r_max: float, d_max: float) -> SimpleNamespace:
    """The forward pass as the paper writes it, in float64, from the layer's present variables."""
    x = np.asarray(x, np.float64)
    gamma, beta, moving_mean, moving_std = (
        variable.numpy().astype(np.float64)
        for variable in (layer.gamma, layer.beta, layer.moving_mean, layer.moving_std)
    )
    mean = x.mean((0, 1, 2))
    std = np.sqrt(((x - mean) ** 2).mean((0, 1, 2)) + EPSILON)
    r = np.clip(std / moving_std, 1 / r_max, r_max)
    d = np.clip((mean - moving_mean) / moving_std, -d_max, d_max)
    y = gamma * ((x - mean) / std * r + d) + beta
    return SimpleNamespace(mean=mean, std=std, r=r, d=d, y=y, gamma=gamma, beta=beta)


def paper_with_fixed_corrections(x, gamma, beta, r, d) -> np.ndarray:
    """The forward pass with r and d given: what the gradient is the gradient of."""
    mean = x.mean((0, 1, 2))
    std = np.sqrt(((x - mean) ** 2).mean((0, 1, 2)) + EPSILON)
    return gamma * ((x - mean) / std * r + d) + beta


def gradients(layer: BatchRenorm, x, limits: Limits, dy):
    """y, and the gradients of sum(y * dy) with respect to x, gamma and beta."""
    x = tf.convert_to_tensor(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y, *_ = layer(x, limits)
    return y, *tape.gradient(
        y, (x, layer.gamma, layer.beta), output_gradients=tf.convert_to_tensor(dy)
    )


def limits_of(r_max: float, d_max: float) -> Limits:
    return Limits(tf.constant(r_max, tf.float32), tf.constant(d_max, tf.float32))


# --- Keras ------------------------------------------------------------------------------------


def keras_twin(layer: BatchRenorm, momentum: float) -> keras.layers.BatchNormalization:
    """Keras's layer with the same variables.

    Keras keeps the averages twice, once for r and d (`renorm_*`) and once for inference
    (`moving_*`). With the same momentum and start they are the same numbers, the layer's one pair.
    """
    twin = keras.layers.BatchNormalization(
        momentum=momentum,
        epsilon=EPSILON,
        renorm=True,
        renorm_clipping={},
        renorm_momentum=momentum,
    )
    twin.build((None, None, None, layer.gamma.shape[0]))
    twin.gamma.assign(layer.gamma)
    twin.beta.assign(layer.beta)
    for mean, std in (("moving_mean", "moving_stddev"), ("renorm_mean", "renorm_stddev")):
        getattr(twin, mean).assign(layer.moving_mean)
        getattr(twin, std).assign(layer.moving_std)
    twin.moving_variance.assign(layer.moving_std**2 - EPSILON)
    return twin


def test_agrees_with_keras_over_50_steps_with_moving_limits_and_drifting_inputs():
    momentum, steps = 0.9, 50
    layer = make_layer()
    twin = keras_twin(layer, momentum)
    draw = np.random.default_rng(1)
    free, clipped = 0, 0
    for step in range(steps):
        r_max, d_max = 1 + 2 * step / steps, 1.5 * step / steps
        twin.renorm_clipping = {"rmin": 1 / r_max, "rmax": r_max, "dmax": d_max}
        x = make_batch(step, mean=0.06 * step, std=1 + 0.04 * step)
        dy = draw.normal(size=x.shape).astype(np.float32)
        formula = paper(x, layer, r_max, d_max)
        clipped += np.sum(np.isclose(formula.r, r_max) | np.isclose(abs(formula.d), d_max))
        free += np.sum((formula.r < 0.999 * r_max) & (abs(formula.d) < 0.999 * d_max))

        ours = gradients(layer, x, limits_of(r_max, d_max), dy)
        with tf.GradientTape() as tape:
            inputs = tf.constant(x)
            tape.watch(inputs)
            y = twin(inputs, training=True)
        sources = (inputs, twin.gamma.value, twin.beta.value)
        theirs = (y, *tape.gradient(y, sources, output_gradients=tf.constant(dy)))
        _, mean, std = layer(tf.constant(x), limits_of(r_max, d_max))
        layer.update(mean, std, tf.constant(momentum))

        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)
        for mean, std in (("moving_mean", "moving_stddev"), ("renorm_mean", "renorm_stddev")):
            np.testing.assert_allclose(layer.moving_mean, getattr(twin, mean), 1e-5, 1e-5)
            np.testing.assert_allclose(layer.moving_std, getattr(twin, std), 1e-5, 1e-5)
        np.testing.assert_allclose(layer(x), twin(x, training=False), rtol=1e-5, atol=1e-5)
        for variable, other in ((layer.gamma, twin.gamma), (layer.beta, twin.beta)):
            variable.assign_add(tf.constant(draw.normal(scale=0.05, size=CHANNELS), tf.float32))
            other.assign(variable)
    # The comparison says something only if both branches of the clipping were taken often.
    assert free > 50, free
    assert clipped > 50, clipped


# --- the paper's formulas ---------------------------------------------------------------------


@pytest.mark.parametrize(("r_max", "d_max"), [(1.0, 0.0), (1.2, 0.3), (3.0, 5.0), (1e6, 1e6)])
@pytest.mark.parametrize("std", [0.3, 1.5])
def test_outputs_and_statistics_follow_the_paper(r_max, d_max, std):
    layer, x = make_layer(), make_batch(3, std=std)
    formula = paper(x, layer, r_max, d_max)
    y, mean, std = layer(tf.constant(x), limits_of(r_max, d_max))
    np.testing.assert_allclose(y, formula.y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mean, formula.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(std, formula.std, rtol=1e-5)


@pytest.mark.parametrize(("r_max", "d_max"), [(1.0, 0.0), (1.2, 0.3), (1e6, 1e6)])
def test_gradients_are_those_of_the_formula_with_r_and_d_held_fixed(r_max, d_max):
    """Central differences in float64, for every element of x, gamma and beta."""
    layer, x = make_layer(channels=3), make_batch(4, shape=(2, 3, 2, 3))
    dy = np.random.default_rng(5).normal(size=x.shape).astype(np.float32)
    formula = paper(x, layer, r_max, d_max)

    def loss(x, gamma, beta):
        return np.sum(paper_with_fixed_corrections(x, gamma, beta, formula.r, formula.d) * dy)

    _, *computed = gradients(layer, x, limits_of(r_max, d_max), dy)
    point = [x.astype(np.float64), formula.gamma, formula.beta]
    for i, gradient in enumerate(computed):
        for index in np.ndindex(point[i].shape):
            ends = []
            for sign in (1, -1):
                moved = [array.copy() for array in point]
                moved[i][index] += sign * 1e-5
                ends.append(loss(*moved))
            expected = (ends[0] - ends[1]) / 2e-5
            assert gradient.numpy()[index] == pytest.approx(expected, rel=1e-4, abs=1e-5)


# --- how it is computed -------------------------------------------------------------------------


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(tf.float32, 1e-5), (tf.float16, 4e-3), (tf.bfloat16, 3e-2)]
)
def test_every_type_compiled_or_not_follows_the_paper(dtype, tolerance, jit_compile):
    """The statistics are those of the rounded pictures, to float32's accuracy, not to `dtype`'s."""
    layer = make_layer()
    x = tf.cast(make_batch(13, shape=(8, 6, 6, CHANNELS)), dtype)
    dy = tf.cast(tf.random.stateless_normal(x.shape, [9, 10]), dtype)

    @tf.function(jit_compile=jit_compile)
    def compute():
        return *gradients(layer, x, limits_of(1.3, 0.4), dy), *layer(x, limits_of(1.3, 0.4))[1:]

    values = compute()
    kinds = [dtype, dtype, tf.float32, tf.float32, tf.float32, tf.float32]
    assert [value.dtype for value in values] == kinds
    assert layer(x).dtype == dtype
    y, *found, mean, std = (tf.cast(value, tf.float32).numpy() for value in values)
    exact = tf.cast(x, tf.float32).numpy()
    formula = paper(exact, layer, 1.3, 0.4)
    np.testing.assert_allclose(y, formula.y, tolerance, tolerance)
    np.testing.assert_allclose(mean, formula.mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(std, formula.std, rtol=1e-5)
    for mine, other in zip(found, paper_gradients(exact, dy, formula), strict=True):
        np.testing.assert_allclose(mine / abs(other).max(), other / abs(other).max(), 0, tolerance)


def paper_gradients(x, dy, formula: SimpleNamespace) -> tuple:
    """With respect to x, gamma and beta, in float64: batch normalization's with scale gamma * r."""
    x, dy = np.asarray(x, np.float64), np.asarray(tf.cast(dy, tf.float64))
    normalized, axes = (x - formula.mean) / formula.std, (0, 1, 2)
    centred = dy - dy.mean(axes) - normalized * (dy * normalized).mean(axes)
    dx = formula.gamma * formula.r / formula.std * centred
    return dx, (dy * (normalized * formula.r + formula.d)).sum(axes), dy.sum(axes)


def test_a_large_mean_beside_a_small_deviation_cancels_nothing():
    """Mean 100, deviation 0.1: mean square minus squared mean would have no correct digit."""
    layer, draw = make_layer(), np.random.default_rng(14)
    x = (100 + 0.1 * draw.normal(size=(4, 8, 8, CHANNELS))).astype(np.float32)
    dy = draw.normal(size=x.shape).astype(np.float32)
    y, *found = gradients(layer, x, limits_of(3, 5), dy)
    _, _, std = layer(tf.constant(x), limits_of(3, 5))
    formula = paper(x, layer, 3, 5)
    np.testing.assert_allclose(std, formula.std, rtol=1e-4)
    np.testing.assert_allclose(y, formula.y, rtol=1e-3, atol=1e-3)
    for mine, other in zip(found, paper_gradients(x, dy, formula), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-3 * abs(other).max())


@pytest.mark.parametrize(
    ("deviations", "jit_compile", "tolerance"),
    [(0, False, 1e-5), (8, False, 1e-5), (1000, False, 1e-5), (0, True, 1e-5), (8, True, 1e-4)],
)
def test_the_deviation_is_exact_however_far_the_mean_is(deviations, jit_compile, tolerance):
    """Also where one channel of several is far, and the others are not. Compiled by XLA, the fused
    kernel subtracts the squared mean from the mean square, which loses digits.
    """
    layer, x = make_layer(), make_batch(15, shape=(8, 9, 9, CHANNELS), mean=0.0, std=1.0)
    x[..., 2] = 0.3 * (np.random.default_rng(16).normal(size=x.shape[:3]) + deviations)
    _, mean, std = tf.function(layer, jit_compile=jit_compile)(tf.constant(x), WIDE)
    formula = paper(x, layer, 1e6, 1e6)
    np.testing.assert_allclose(mean, formula.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(std, formula.std, rtol=tolerance)


def test_averages_have_no_gradient():
    layer, x = make_layer(), tf.constant(make_batch(6))
    with tf.GradientTape() as tape:
        tape.watch([layer.moving_mean, layer.moving_std])
        loss = tf.reduce_sum(layer(x, WIDE)[0] ** 2)
    assert tape.gradient(loss, [layer.moving_mean, layer.moving_std]) == [None, None]


def test_trained_and_untrained_variables():
    layer = BatchRenorm(5, gamma=0.25)
    assert [v.name.split("/")[-1] for v in layer.trainable_variables] == ["beta:0", "gamma:0"]
    np.testing.assert_array_equal(layer.gamma, np.full(5, 0.25, np.float32))
    np.testing.assert_array_equal(layer.beta, np.zeros(5))
    np.testing.assert_array_equal(layer.moving_mean, np.zeros(5))
    np.testing.assert_array_equal(layer.moving_std, np.ones(5))


# --- special cases of the formula -------------------------------------------------------------


def test_at_the_tightest_limits_it_is_batch_normalization():
    layer, x = make_layer(), tf.constant(make_batch(7))
    dy = tf.random.stateless_normal(x.shape, [1, 2])
    ours = gradients(layer, x, BATCH_NORM, dy)
    with tf.GradientTape() as tape:
        tape.watch(x)
        mean, variance = tf.nn.moments(x, [0, 1, 2])
        y = tf.nn.batch_normalization(x, mean, variance, layer.beta, layer.gamma, EPSILON)
    theirs = (y, *tape.gradient(y, (x, layer.gamma, layer.beta), output_gradients=dy))
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)


def test_inside_the_limits_training_computes_what_inference_computes():
    layer, x = make_layer(), make_batch(8)
    formula = (x - layer.moving_mean) / layer.moving_std * layer.gamma + layer.beta
    np.testing.assert_allclose(layer(tf.constant(x)), formula, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layer(tf.constant(x), WIDE)[0], formula, rtol=1e-5, atol=1e-5)
    assert abs(layer(tf.constant(x), BATCH_NORM)[0] - formula).numpy().max() > 0.1


def test_statistics_of_large_half_precision_values_do_not_overflow():
    """Sums over 4096 values of 100 ± 30 and their squares leave float16's range (65504) far."""
    layer = BatchRenorm(2)
    x = tf.cast(100 + 30 * tf.random.stateless_normal([16, 16, 16, 2], [5, 6]), tf.float16)
    y, mean, std = layer(x, WIDE)
    formula = paper(x, layer, 1e6, 1e6)
    np.testing.assert_allclose(mean, formula.mean, rtol=1e-4)
    np.testing.assert_allclose(std, formula.std, rtol=1e-4)
    np.testing.assert_allclose(y, formula.y, rtol=4e-3, atol=0.1)


@pytest.mark.parametrize("dtype", [tf.float32, tf.float16])
def test_a_single_value_per_channel_gives_no_nan(dtype):
    """n * height * width = 1: variance 0, and the unbiased variance would be 0 / 0."""
    layer = make_layer()
    x = tf.cast(make_batch(10, shape=(1, 1, 1, CHANNELS)), dtype)
    for limits in (BATCH_NORM, limits_of(3, 5)):
        y, *gradient = gradients(layer, x, limits, tf.ones_like(x))
        formula = paper(x, layer, float(limits.r_max), float(limits.d_max))
        np.testing.assert_allclose(tf.cast(y, tf.float32), formula.y, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(layer(x, limits)[2], np.full(CHANNELS, EPSILON**0.5), rtol=1e-5)
        for value in gradient:
            assert np.isfinite(tf.cast(value, tf.float32)).all()
        np.testing.assert_allclose(tf.cast(gradient[0], tf.float32), np.zeros(x.shape), atol=1e-3)


def test_a_constant_channel_gives_no_nan():
    layer, x = make_layer(), np.ones([4, 3, 3, CHANNELS], np.float32)
    y, *gradient = gradients(layer, x, limits_of(3, 5), np.ones_like(x))
    np.testing.assert_allclose(y, paper(x, layer, 3, 5).y, rtol=1e-4, atol=1e-4)
    _, _, std = layer(tf.constant(x), limits_of(3, 5))
    np.testing.assert_allclose(std, EPSILON**0.5, rtol=1e-3)  # inference divides by it
    assert all(np.isfinite(value).all() for value in gradient)


def test_works_in_a_graph_with_an_unknown_batch_size():
    layer = make_layer()
    function = tf.function(
        lambda x: layer(x, limits_of(2, 1))[0],
        input_signature=[tf.TensorSpec([None, 5, 3, CHANNELS])],
    )
    for n in (1, 4):
        x = make_batch(11, shape=(n, 5, 3, CHANNELS))
        np.testing.assert_allclose(function(x), paper(x, layer, 2, 1).y, rtol=1e-5, atol=1e-5)


def test_xla_computes_the_same():
    layer, x = make_layer(), tf.constant(make_batch(12))
    dy = tf.random.stateless_normal(x.shape, [7, 8])
    compiled = tf.function(gradients, jit_compile=True)
    plain = gradients(layer, x, limits_of(1.3, 0.4), dy)
    for mine, other in zip(compiled(layer, x, limits_of(1.3, 0.4), dy), plain, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)


# --- averages, schedule -----------------------------------------------------------------------


def test_update_moves_the_averages_by_one_minus_momentum():
    layer = BatchRenorm(2)
    layer.update(tf.constant([10.0, -10.0]), tf.constant([3.0, 0.5]), tf.constant(0.9))
    np.testing.assert_allclose(layer.moving_mean, [1.0, -1.0], rtol=1e-6)
    np.testing.assert_allclose(layer.moving_std, [1.2, 0.95], rtol=1e-6)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 1), (60_000, 1), (80_000, 1.5), (100_000, 2), (140_000, 3), (10**9, 3)],
)
def test_ramp(step, expected):
    for step_type in (tf.int64, tf.int32):
        value = ramp(tf.constant(step, step_type), 60_000, 140_000, 1.0, 3.0)
        assert value.dtype == tf.float32
        assert float(value) == pytest.approx(expected, rel=1e-6)


def test_a_ramp_without_length_is_a_jump():
    values = [float(ramp(tf.constant(step), 100, 100, 0.0, 5.0)) for step in (99, 100, 101)]
    assert values == [0.0, 0.0, 5.0]


def test_limits_follow_the_two_ramps_of_the_settings():
    config = SimpleNamespace(
        rmax_max=3, dmax_max=5,
        start_relaxing_rmax=10, reach_rmax_max=20, start_relaxing_dmax=20, reach_dmax_max=120,
    )  # fmt: skip
    expected = {0: (1, 0), 10: (1, 0), 15: (2, 0), 20: (3, 0), 70: (3, 2.5), 120: (3, 5)}
    for step, values in expected.items():
        limits = limits_at(tf.constant(step, tf.int64), config)
        assert [float(limit) for limit in limits] == pytest.approx(values)


def test_epochs_become_updates_and_whole_numbers_are_updates_already():
    settings = SimpleNamespace(
        rmax_max=3.0, dmax_max=5.0, moving_avgs_momentum=0.99,
        start_relaxing_rmax=utils.Epochs(1.5), reach_rmax_max=utils.Epochs(7),
        start_relaxing_dmax=900, reach_dmax_max=utils.Epochs(9.004),
    )  # fmt: skip
    updates = in_updates(settings, 100)
    assert vars(updates) == vars(settings) | {
        "start_relaxing_rmax": 150,
        "reach_rmax_max": 700,
        "reach_dmax_max": 900,
    }
    assert all(type(getattr(updates, name)) is int for name in vars(settings) if "_rel" in name)
    assert float(limits_at(tf.constant(425), updates).r_max) == pytest.approx(2)


def test_a_limit_that_would_reach_its_maximum_before_it_moves_is_refused():
    settings = SimpleNamespace(
        start_relaxing_rmax=0, reach_rmax_max=0, start_relaxing_dmax=900,
        reach_dmax_max=utils.Epochs(8.9),
    )  # fmt: skip
    with pytest.raises(
        ValueError, match="reach_dmax_max .update 890. comes before start_relaxing_"
    ):
        in_updates(settings, 100)
    assert in_updates(settings, 102).reach_dmax_max == 908


@pytest.mark.parametrize("momentum", [0.99, 0.9999, 0.05])
def test_momentum_warms_up(momentum):
    for n in (0, 1, 7, 90, 880, 891, 10_000, 10**6):
        value = momentum_at(tf.constant(n, tf.int64), momentum)
        assert value.dtype == tf.float32
        assert float(value) == pytest.approx(min(momentum, (1 + n) / (10 + n)), rel=1e-6)


def test_warm_up_forgets_the_initial_averages():
    """After 30 updates with the shipped momentum the averages are the data's."""
    layer = BatchRenorm(1)
    for n in range(30):
        layer.update(tf.constant([7.0]), tf.constant([0.2]), momentum_at(tf.constant(n), 0.99))
    np.testing.assert_allclose(layer.moving_mean, [7.0], rtol=1e-5)
    np.testing.assert_allclose(layer.moving_std, [0.2], rtol=1e-5)
