"""A convolutional network for sentences (Kim 2014, arXiv:1408.5882, EMNLP), with vectors of words that it learns."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dl_jax.core.errors import require_positive, require_probability
from dl_jax.models import ops
from dl_jax.models.layers import valid_steps


class TextCNN(nn.Module):
    """Convolutions of several widths and their maxima over time: tokens int [B, T] -> logits float32 [B, classes].

    This is CNN-rand of section 3.2. A convolution of width w sees every window of w tokens that holds at least one of
    the text, with zeros in the place of what lies outside, so that a text may be shorter than the widest. `lengths`,
    int [B], are the numbers of tokens; those after them have no effect. Dropout acts on the maxima and uses the random
    stream "dropout". The paper also limits the norm of each class's weights to 3, which is the last transform of the
    optimiser: `optim.max_norm(3, text_cnn.is_output_kernel)`.

    Raises InputError for sizes below 1, a dropout outside [0, 1), and lengths that are not int [B] or not in [1, T]. A
    traced length of 0, which cannot be checked, is that of a text of zeros.
    """

    vocabulary: int
    classes: int
    embedding: int = 300  # width of a token's vector
    maps: int = 100  # of each width
    widths: tuple[int, ...] = (3, 4, 5)  # tokens in a window
    dropout: float = 0.5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, lengths: jax.Array | None = None, *, train: bool) -> jax.Array:
        require_positive({name: getattr(self, name) for name in ("vocabulary", "classes", "embedding", "maps")})
        require_positive({"the length of a text": tokens.shape[1]})
        require_positive({"the number of widths": len(self.widths), "the least width": min(self.widths, default=0)})
        require_probability({"dropout": self.dropout})
        valid = valid_steps(lengths, tokens)
        x = nn.Embed(self.vocabulary, self.embedding, dtype=self.dtype, embedding_init=_uniform, name="words")(tokens)
        x = jnp.where(valid[..., None], x, 0)
        largest = []
        for width in self.widths:
            # nn.Conv's own convolution took 5 times as long on a CPU, and one product for all taps of all widths,
            # shifted and added up, 0.9 times as long (B 50, T 40, 300 values, forward and gradient, one core).
            y = nn.Conv(
                self.maps,
                (width,),
                padding=((width - 1, width - 1),),
                dtype=self.dtype,
                conv_general_dilated=ops.conv_general_dilated,
                name=f"width_{width}",
            )(x)
            windows = jnp.pad(valid, ((0, 0), (width - 1, 0)), constant_values=True)  # [B, T + width - 1]
            largest.append(nn.relu(ops.max_over(jnp.where(windows[..., None], y, -jnp.inf), 1)))
        x = nn.Dropout(self.dropout, deterministic=not train)(jnp.concatenate(largest, -1))
        return nn.Dense(self.classes, dtype=self.dtype, name="output")(x).astype(jnp.float32)


def _uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """As in the author's code, which the variance of the usual pre-trained vectors gave (section 3.1)."""
    return jax.random.uniform(key, shape, dtype, -0.25, 0.25)


def is_output_kernel(path: jax.tree_util.KeyPath, leaf: jax.Array) -> bool:
    """Whether a parameter is the kernel of the last layer, whose columns are the weights of one class each."""
    return jax.tree_util.keystr(path[-2:], simple=True, separator="/") == "output/kernel"


def examples() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """A tiny instance with a batch of inputs, for the tests of the whole zoo."""
    tokens = np.random.default_rng(0).integers(0, 7, (3, 6), np.int32)
    inputs = {"tokens": tokens, "lengths": np.array([6, 1, 4], np.int32)}
    return {"TextCNN": (TextCNN(7, 3, embedding=5, maps=4, widths=(2, 3)), inputs)}


def published() -> dict[str, tuple[nn.Module, dict[str, jax.ShapeDtypeStruct], int]]:
    """The paper's network for movie reviews, whose layers' sizes give its number of parameters.

    Two classes and 18,765 words are from table 1, the sizes of the layers from section 3.1.
    """
    convolutions = (3 + 4 + 5) * 300 * 100 + 3 * 100
    tokens = {"tokens": jax.ShapeDtypeStruct((1, 56), jnp.int32)}
    return {"TextCNN": (TextCNN(18_765, 2), tokens, 18_765 * 300 + convolutions + 301 * 2)}
