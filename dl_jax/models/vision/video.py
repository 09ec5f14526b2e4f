"""Classifiers of videos from features of their frames: a recurrent network over them, and a bag of frames.

The features of a frame come from the same convolutional network in both, so that they differ only in whether they know
the order of the frames. A frame network below an LSTM is that of Donahue et al. 2015 (arXiv:1411.4389, section 4.1);
here it is small, and the cell is a GRU.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dl_jax.core.errors import require_positive
from dl_jax.models import ops
from dl_jax.models.layers import require_image, require_video
from dl_jax.models.recur import GRU
from dl_jax.models.sequence.rnn import Recurrent

Array = jax.Array


class FrameCNN(nn.Module):
    """Features of images: convolutions 3x3, each with a ReLU and a pooling, and a dense layer with a ReLU.

    image [B, H, W, C] -> [B, features].
    """

    maps: tuple[int, ...]  # of each convolution, after which height and width are halved
    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, image: Array) -> Array:
        init, convolve, x = nn.initializers.he_normal(), ops.conv_general_dilated, image
        for i, maps in enumerate(self.maps):
            layer = nn.Conv(
                maps, (3, 3), kernel_init=init, dtype=self.dtype, conv_general_dilated=convolve, name=f"conv_{i}"
            )
            x = ops.max_pool(nn.relu(layer(x)), 2)
        x = x.reshape(len(x), -1)  # where the digit is stays known
        return nn.relu(nn.Dense(self.features, kernel_init=init, dtype=self.dtype, name="dense")(x))


class _Frames(nn.Module):
    classes: int
    maps: tuple[int, ...] = (8, 16, 32)  # of the convolutions
    features: int = 64  # of a frame
    hidden: int = 64  # units of the layer above the features
    dtype: DTypeLike = jnp.float32

    def _features(self, video: Array) -> Array:  # [B, T, H, W, C] -> [B, T, features]
        sizes = {"maps": min(self.maps, default=0), "features": self.features, "hidden": self.hidden}
        require_positive({"classes": self.classes, **sizes})
        require_video(self, video)
        frames = video.reshape(-1, *video.shape[2:])
        require_image(self, frames, 2 ** len(self.maps), ("frames", "conv_0"))
        features = FrameCNN(self.maps, self.features, self.dtype, name="frames")(frames)
        return features.reshape(*video.shape[:2], self.features)


class FrameGRU(_Frames):
    """A GRU over the features of frames: video [B, T, H, W, C] -> float32 logits [B, classes], of the last state.

    Videos of any number of frames have the same parameters. Raises InputError for what is not [B, T, H, W, C], for
    videos without frames, for frames that are smaller than the poolings allow or have other channels than the
    parameters, and for sizes below 1.
    """

    @nn.compact
    def __call__(self, video: Array, *, train: bool) -> Array:
        recurrent = Recurrent(GRU, self.hidden, dtype=self.dtype, name="recurrent")
        _, ((last,),) = recurrent(self._features(video), train=train)
        return nn.Dense(self.classes, dtype=self.dtype, name="logits")(last).astype(jnp.float32)


class FrameBag(_Frames):
    """The mean of the features of frames and a hidden layer: video [B, T, H, W, C] -> float32 logits [B, classes].

    The order of the frames has no effect. Raises InputError as `FrameGRU` does.
    """

    @nn.compact
    def __call__(self, video: Array, *, train: bool) -> Array:
        x = self._features(video).astype(jnp.float32).mean(1)
        x = nn.relu(nn.Dense(self.hidden, dtype=self.dtype, name="hidden_layer")(x))
        return nn.Dense(self.classes, dtype=self.dtype, name="logits")(x).astype(jnp.float32)


def examples() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """Tiny instances with a batch of videos each, for the tests of the whole zoo."""
    video = np.random.default_rng(0).random((3, 3, 4, 6, 2), np.float32)
    sizes = {"classes": 4, "maps": (4, 5), "features": 6, "hidden": 5}
    return {"FrameGRU": (FrameGRU(**sizes), {"video": video}), "FrameBag": (FrameBag(**sizes), {"video": video})}


def published() -> dict[str, tuple[nn.Module, dict[str, jax.ShapeDtypeStruct], int]]:
    """The networks of the experiment, whose layers' sizes give their numbers of parameters: no paper has them."""
    video = {"video": jax.ShapeDtypeStruct((1, 16, 32, 32, 1), jnp.float32)}
    frames = 10 * 8 + (9 * 8 + 1) * 16 + (9 * 16 + 1) * 32 + (4 * 4 * 32 + 1) * 64
    return {
        "FrameGRU": (FrameGRU(8), video, frames + 3 * 64 * (64 + 64 + 2) + 65 * 8),
        "FrameBag": (FrameBag(8), video, frames + 65 * 64 + 65 * 8),
    }
