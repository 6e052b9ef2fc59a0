"""Batch renormalization (Ioffe 2017, https://arxiv.org/abs/1702.03275), as a layer.

    from batch_renorm import BatchRenorm, Limits, limits_at
    norm = BatchRenorm(64, name="norm")
    outputs = norm(images, limits_at(step, config))   # training, then after each step:
    norm.update(norm.batch_mean, norm.batch_std, momentum_at(step, 0.99))
    outputs = norm(images)                            # inference

Batch normalization uses the statistics of the batch in training, but moving averages at inference:
two different functions. Batch renormalization moves the first towards the second, by a scale r and
a shift d per channel. The gradient treats r and d as constants:

    r = clip(sigma_B / sigma, 1/r_max, r_max)      d = clip((mu_B - mu) / sigma, -d_max, d_max)
    y = gamma * ((x - mu_B) / sigma_B * r + d) + beta

With r_max = 1 and d_max = 0 this is batch normalization. Within the limits it computes exactly what
inference computes, so small or unbalanced batches do much less harm.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import tensorflow as tf

EPSILON = 1e-5
"""Added to the variance, once. The fused GPU kernels accept no smaller value, and other frameworks
train ResNets with the same one."""


class Limits(NamedTuple):
    """How far r and d may go: r in [1/r_max, r_max], d in [-d_max, d_max]. float32 scalars."""

    r_max: tf.Tensor
    d_max: tf.Tensor


def ramp(step: tf.Tensor, start: int, end: int, low: float, high: float) -> tf.Tensor:
    """`low` up to step `start`, `high` from step `end`, linear in between. float32 scalar."""
    progress = (tf.cast(step, tf.float32) - start) / max(end - start, 1)
    return low + (high - low) * tf.clip_by_value(progress, 0.0, 1.0)


def limits_at(step: tf.Tensor, config) -> Limits:
    """The limits at a training step, from the `[batch_renorm]` section of config.txt.

    The first moving averages mean little. So the paper (section 4) starts with batch normalization
    and then relaxes the limits slowly: r_max from 1 to 3, d_max from 0 to 5.
    """
    return Limits(
        ramp(step, config.start_relaxing_rmax, config.reach_rmax_max, 1.0, config.rmax_max),
        ramp(step, config.start_relaxing_dmax, config.reach_dmax_max, 0.0, config.dmax_max),
    )


def momentum_at(update: tf.Tensor, momentum: float) -> tf.Tensor:
    """Weight of the old moving averages in an update. float32 scalar. `update` counts from 0.

    The averages warm up: the first updates weigh much more than later ones. So the initial values
    are soon forgotten, and a model evaluates well after a few dozen steps.
    """
    n = tf.cast(update, tf.float32)
    return tf.minimum(momentum, (1.0 + n) / (10.0 + n))


class BatchRenorm(tf.Module):
    """Batch renormalization over all axes but the last of a [n, height, width, channels] tensor.

    Variables, all float32 [channels]: gamma and beta (trained), moving_mean and moving_std (not).
    """

    def __init__(self, channels: int, gamma: float = 1.0, name: str | None = None):
        """`gamma` is the initial value of the scale."""
        super().__init__(name)
        with self.name_scope:
            self.gamma = tf.Variable(tf.fill([channels], gamma), name="gamma")
            self.beta = tf.Variable(tf.zeros([channels]), name="beta")
            self.moving_mean = tf.Variable(
                tf.zeros([channels]), name="moving_mean", trainable=False
            )
            self.moving_std = tf.Variable(tf.ones([channels]), name="moving_std", trainable=False)
        self.batch_mean = self.batch_std = None

    def __call__(self, x: tf.Tensor, limits: Limits | None = None) -> tf.Tensor:
        """Normalises x: float32, float16 or bfloat16 [n, height, width, channels], same type out.

        With `limits`, in training, it uses the batch's statistics, corrected by r and d. It keeps
        them for `update` in `batch_mean` and `batch_std`, float32. Without `limits`, at inference,
        it uses the moving averages.
        """
        if limits is None:
            scale, offset = self.scale_and_offset()
            return x * tf.cast(scale, x.dtype) + tf.cast(offset, x.dtype)
        y, self.batch_mean, self.batch_std = _renormalize(self, x, limits)
        return y

    def scale_and_offset(self) -> tuple[tf.Tensor, tf.Tensor]:
        """At inference the layer computes x * scale + offset. Both are float32 [channels]."""
        scale = self.gamma / self.moving_std
        return scale, self.beta - self.moving_mean * scale

    def update(self, mean: tf.Tensor, std: tf.Tensor, momentum: tf.Tensor) -> None:
        """Moves the averages towards batch statistics; `momentum` is the weight of the old values.

        `mean` and `std`: float32 [channels]. With several replicas, pass the mean over all of them,
        because each replica updates its own copy of the averages.
        """
        for average, value in ((self.moving_mean, mean), (self.moving_std, std)):
            average.assign(momentum * average + (1 - momentum) * value)


def _renormalize(layer: BatchRenorm, x: tf.Tensor, limits: Limits) -> tuple[tf.Tensor, ...]:
    """Returns y, batch mean and batch standard deviation. The gradient is the paper's, section 3.

    The fused kernels do all the heavy work. With r and d constant, the gradient with respect to x
    is that of batch normalization with scale gamma * r. So one call of the fused kernel returns
    every gradient.
    """
    moving_mean, moving_std = layer.moving_mean, layer.moving_std
    prepare = _moments_first if _moments_come_first(x) else _normalize_first

    @tf.custom_gradient
    def renormalize(x, gamma, beta):
        inputs, mean, variance, reserve = prepare(x)
        std = tf.sqrt(variance + EPSILON)
        r = tf.clip_by_value(std / moving_std, 1 / limits.r_max, limits.r_max)
        d = tf.clip_by_value((mean - moving_mean) / moving_std, -limits.d_max, limits.d_max)
        y, *_ = tf.raw_ops.FusedBatchNormV3(
            **inputs,
            scale=gamma * r,
            offset=gamma * d + beta,
            epsilon=EPSILON,
            is_training=False,
        )

        def gradient(dy, *_):
            dx, dscale, doffset, *_ = tf.raw_ops.FusedBatchNormGradV3(
                y_backprop=dy, x=x, scale=gamma * r, **reserve, epsilon=EPSILON
            )
            return dx, dscale * r + doffset * d, doffset

        return (y, mean, std), gradient

    return renormalize(x, layer.gamma, layer.beta)


def _moments_come_first(x: tf.Tensor) -> bool:
    """Whether to use `_moments_first` or `_normalize_first`. Both compute the same.

    `_moments_first` is faster for float32 on a processor without AVX-512: forward and backward it
    ran at 0.8 of the speed of the fused batch norm, `_normalize_first` at 0.75. With AVX-512 they
    ran at 0.7 and 0.8. A GPU uses `_normalize_first`, so that cuDNN computes the statistics. This
    was not measured.
    """
    on_cpu = not tf.config.get_visible_devices("GPU")
    return x.dtype == tf.float32 and on_cpu and not _has_avx512()


@cache
def _has_avx512() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "avx512f" in cpuinfo.read_text()


def _normalize_first(x: tf.Tensor) -> tuple:
    """Normalises with the fused kernel, which also returns the statistics.

    Returns four things: inputs from which the inference form of FusedBatchNormV3 computes y; the
    batch's mean; its variance; the reserved inputs of FusedBatchNormGradV3.
    """
    channels = x.shape[-1]
    ones, zeros = tf.ones([channels]), tf.zeros([channels])
    normalized, mean, variance, *reserve = tf.raw_ops.FusedBatchNormV3(
        x=x, scale=ones, offset=zeros, mean=[], variance=[], epsilon=EPSILON
    )
    # The kernel returns the unbiased variance; the layer needs the batch's own.
    count = tf.cast(tf.size(x) // channels, tf.float32)
    variance = tf.math.multiply_no_nan(variance, (count - 1) / count)
    # With mean 0 and variance 1 - epsilon the inference form is normalized * scale + offset, in
    # one pass over the memory and in the type of x.
    inputs = {"x": normalized, "mean": zeros, "variance": ones - EPSILON}
    return inputs, mean, variance, _reserve(*reserve[:3])


def _moments_first(x: tf.Tensor) -> tuple:
    """Computes the statistics by matrix products, then y in one fused pass. Returns the same four.

    The mean is a row of 1/n times the matrix of all pixels: TensorFlow multiplies faster than it
    reduces. The variance is the mean of the squared differences from the mean. Mean square minus
    squared mean would be faster but loses digits: with n = 200,704 and a mean of 4 deviations, the
    deviation is off by 1e-4 instead of 1e-5.
    """
    rows = tf.cast(tf.reshape(x, [-1, x.shape[-1]]), tf.float32)
    count = tf.shape(rows)[0]
    weights = tf.fill([1, count], 1 / tf.cast(count, tf.float32))
    mean = tf.matmul(weights, rows)[0]
    variance = tf.matmul(weights, tf.math.squared_difference(rows, mean))[0]
    inputs = {"x": x, "mean": mean, "variance": variance}
    # On a CPU the gradient kernel expects the variance; on a GPU it would expect 1 / deviation.
    return inputs, mean, variance, _reserve(mean, variance, tf.zeros([0]))


def _reserve(first: tf.Tensor, second: tf.Tensor, third: tf.Tensor) -> dict[str, tf.Tensor]:
    return {"reserve_space_1": first, "reserve_space_2": second, "reserve_space_3": third}
