"""Networks that continue videos: the ConvLSTM and the FC-LSTM that it is compared with.

Shi, Chen, Wang, Yeung, Wong and Woo 2015, "Convolutional LSTM Network: A machine learning approach for precipitation
nowcasting" (arXiv:1506.04214). An encoder reads the given frames, and a forecaster of the same layers starts from the
encoder's last states and unfolds them without any input (section 3.2, figure 3).

The peepholes of equation 3 are here, with one weight for each map that is the same at all places. The numbers of
parameters in the paper's table 1 have such ones; a weight for each place, which the equation allows, would tie the
parameters to the size of the frames. An FC-LSTM (equation 2) is a ConvLSTM whose features are at a single place.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from dl_jax.core.errors import InputError, require_positive
from dl_jax.models import ops
from dl_jax.models.layers import dense, require_features, require_video

Array = jax.Array
State = tuple[Array, Array]  # h and c, float32 [B, H, W, M]

LAYOUT = ("NHWC", "HWIO", "NHWC")


class Layer(nn.Module):
    """A ConvLSTM layer over T steps: x [T, B, H, W, C] -> h float32 [T, B, H, W, M], and the last state.

    Equation 3, where * is a convolution that keeps the size and ∘ the product with a weight of each map:

        i = σ(Wxi * x + Whi * h + wi ∘ c + bi)        f = σ(Wxf * x + Whf * h + wf ∘ c + bf)
        c' = f ∘ c + i ∘ tanh(Wxc * x + Whc * h + bc)
        o = σ(Wxo * x + Who * h + wo ∘ c' + bo)       h' = o ∘ tanh(c')

    Without x it has no weights of x, and runs for `steps` steps. The convolution of x is one over all steps.
    """

    maps: int  # M
    kernel: int  # pixels of a kernel's side
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array | None, state: State, steps: int) -> tuple[Array, State]:
        draw, zeros, gates, side = nn.initializers.lecun_normal(), nn.initializers.zeros, 4 * self.maps, self.kernel
        bias = self.param("bias", zeros, (gates,))  # of i, f, the candidate and o
        peep_i, peep_f, peep_o = (self.param(f"peephole_{gate}", zeros, (self.maps,)) for gate in "ifo")
        kernel = self.param("kernel", draw, (side, side, self.maps, gates)).astype(self.dtype)
        if x is not None:
            convolve = ops.conv_general_dilated
            layer = nn.Conv(
                gates, (side, side), use_bias=False, dtype=self.dtype, conv_general_dilated=convolve, name="input"
            )
            x = layer(x.reshape(-1, *x.shape[2:])).reshape(*x.shape[:-1], gates)

        def step(state: State, x: Array | None) -> tuple[State, Array]:
            h, c = state
            inner = ops.conv_general_dilated(h.astype(self.dtype), kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)
            total = inner.astype(jnp.float32) + bias
            i, f, g, o = jnp.split(total if x is None else total + x, 4, -1)
            i, f = nn.sigmoid(i + peep_i * c), nn.sigmoid(f + peep_f * c)
            c = f * c + i * jnp.tanh(g)
            h = nn.sigmoid(o + peep_o * c) * jnp.tanh(c)
            return (h, c), h

        state, h = lax.scan(step, state, x, length=steps)
        return h, state


class EncoderForecaster(nn.Module):
    """x [B, T, H, W, C] -> the outputs of each layer of the forecaster, float32 [horizon, B, H, W, M]."""

    hidden: tuple[int, ...]  # maps of each layer
    kernel: int
    horizon: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> list[Array]:
        (batch, steps, *sides, _), states, outputs = x.shape, [], []
        y: Any = x.swapaxes(0, 1)
        for i, maps in enumerate(self.hidden):
            zeros = jnp.zeros((batch, *sides, maps))
            y, state = Layer(maps, self.kernel, self.dtype, name=f"encoder_{i}")(y, (zeros, zeros), steps)
            states.append(state)
        y = None
        for i, (maps, state) in enumerate(zip(self.hidden, states, strict=True)):
            y, _ = Layer(maps, self.kernel, self.dtype, name=f"forecaster_{i}")(y, state, self.horizon)
            outputs.append(y)
        return outputs


INPUT = ("layers", "encoder_0", "input")  # the layer that reads the frames


class ConvLSTM(nn.Module):
    """Continues videos: video [B, T, H, W, C] -> float32 logits of the next frames, [B, horizon, H, W, C].

    Frames are cut into patches, whose pixels are the channels of one place (section 4.1). The logits are a linear
    function of what all layers of the forecaster say of a place. The sigmoid of a logit is the predicted grey value, in
    [0, 1]. The sizes are those of the paper's best network.

    Raises InputError for what is not [B, T, H, W, C], for videos without frames, for frames whose sides `patch` does
    not divide or that have other channels than the parameters, and for sizes below 1.
    """

    hidden: tuple[int, ...] = (128, 64, 64)  # maps of each layer
    kernel: int = 5  # pixels of the sides of all kernels, in patches
    patch: int = 4  # pixels of a patch's side
    horizon: int = 10  # predicted frames
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, video: Array, *, train: bool) -> Array:
        require_positive({"hidden": min(self.hidden, default=0), "kernel": self.kernel})
        require_positive({"patch": self.patch, "horizon": self.horizon})
        require_video(self, video)
        batch, steps, height, width, channels = video.shape
        p, rows, columns = self.patch, height // self.patch, width // self.patch
        if (rows * p, columns * p) != (height, width) or not rows * columns:
            raise InputError(
                f"frames of {height} x {width} pixels, expected sides that the patch of {p} pixels divides; pad them, "
                "or give another patch"
            )
        x = video.reshape(batch, steps, rows, p, columns, p, channels).swapaxes(3, 4)
        x = x.reshape(batch, steps, rows, columns, -1)
        require_features(self, x, INPUT)
        layers = EncoderForecaster(self.hidden, self.kernel, self.horizon, self.dtype, name="layers")(x)
        y = dense(p * p * channels, dtype=self.dtype, name="logits")(jnp.concatenate(layers, -1)).swapaxes(0, 1)
        y = y.reshape(batch, self.horizon, rows, columns, p, p, channels).swapaxes(3, 4)
        return y.reshape(batch, self.horizon, height, width, channels).astype(jnp.float32)


class FCLSTM(nn.Module):
    """The baseline of section 4.1, whose layers are fully connected: as `ConvLSTM`, for frames of one size.

    A frame is one vector, and the logits are a linear function of the last layer's output. Raises InputError for what
    is not [B, T, H, W, C], for videos without frames or of other frames than the parameters, and for sizes below 1.
    """

    hidden: tuple[int, ...] = (2048, 2048)  # units of each layer
    horizon: int = 10  # predicted frames
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, video: Array, *, train: bool) -> Array:
        require_positive({"hidden": min(self.hidden, default=0), "horizon": self.horizon})
        require_video(self, video)
        batch, steps, *frame = video.shape
        x = video.reshape(batch, steps, 1, 1, -1)  # a single place
        require_features(self, x, INPUT)
        *_, last = EncoderForecaster(self.hidden, 1, self.horizon, self.dtype, name="layers")(x)
        y = dense(x.shape[-1], dtype=self.dtype, name="logits")(last).swapaxes(0, 1)
        return y.reshape(batch, self.horizon, *frame).astype(jnp.float32)


def examples() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """Tiny instances with a batch of videos each, for the tests of the whole zoo."""
    video = np.random.default_rng(0).random((3, 3, 4, 6, 2), np.float32)
    return {
        "ConvLSTM": (ConvLSTM((4,), kernel=3, patch=2, horizon=2), {"video": video}),
        "FCLSTM": (FCLSTM((5,), horizon=2), {"video": video}),
    }


def published() -> dict[str, tuple[nn.Module, dict[str, jax.ShapeDtypeStruct], int]]:
    """The paper's networks of three, two and one layer for 64 x 64 pixels, with the parameters of its table 1."""
    video = {"video": jax.ShapeDtypeStruct((1, 10, 64, 64, 1), jnp.float32)}
    return {
        "ConvLSTM": (ConvLSTM(), video, 7_585_296),
        "ConvLSTM2": (ConvLSTM((128, 128)), video, 10_042_896),
        "ConvLSTM1": (ConvLSTM((256,)), video, 13_524_496),
        "FCLSTM": (FCLSTM(), video, 142_667_776),
    }
