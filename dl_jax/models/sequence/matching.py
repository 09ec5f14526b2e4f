"""Networks for pairs of texts, such as a premise and a hypothesis: by their vectors, and by attention between them."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dl_jax import masks
from dl_jax.core.errors import InputError, require_positive, require_probability
from dl_jax.models import ops
from dl_jax.models.layers import dense, valid_steps
from dl_jax.models.recur import LSTM, VANILLA, Array, Cell
from dl_jax.models.sequence.attention import masked_softmax
from dl_jax.models.sequence.rnn import Recurrent


class SiameseClassifier(nn.Module):
    """A class of each pair of texts from their vectors: first int [B, T], second int [B, U] -> logits [B, classes].

    The vector of a text is the maximum over the outputs of a bidirectional layer, which both texts share. A layer of
    `units`, with tanh, and a linear layer see u, v, |u - v| and u · v, where u and v are the two vectors (Conneau et
    al. 2017, arXiv:1705.02364, figure 1 and section 3.2.2). The lengths, int [B], are the numbers of tokens; those
    after them have no effect. Dropout acts on the vectors of tokens and the layer of `units`, and uses the random
    stream "dropout".

    Raises InputError for sizes below 1, a dropout outside [0, 1), batches of different sizes, and lengths that are not
    int [B] or not in [1, T].
    """

    vocabulary: int
    classes: int
    embedding: int = 300  # width of a token's vector
    hidden: int = 300  # units of the recurrent layer in one direction
    units: int = 512
    cell: Cell = LSTM
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        first: Array,
        second: Array,
        first_lengths: Array | None = None,
        second_lengths: Array | None = None,
        *,
        train: bool,
    ) -> Array:
        _require(self, ("vocabulary", "classes", "embedding", "units"), first, second)
        lengths = [valid_steps(*text).sum(1) for text in ((first_lengths, first), (second_lengths, second))]
        drop = nn.Dropout(self.dropout, deterministic=not train)
        x = drop(nn.Embed(self.vocabulary, self.embedding, dtype=self.dtype)(_beside(first, second)))  # [B, 2, T, E]
        recurrent = Recurrent(self.cell, self.hidden, bidirectional=True, dtype=self.dtype)
        # Both texts in one batch take half of the steps. Those of a pair are next to each other, so that pairs which
        # are split over devices stay where they are.
        x, lengths = x.reshape(-1, *x.shape[2:]), jnp.stack(lengths, 1).reshape(-1)
        outputs, _ = recurrent(x, lengths, train=train)
        valid = masks.from_lengths(lengths, x.shape[1])[..., None]
        vectors = ops.max_over(jnp.where(valid, outputs, -jnp.inf), 1)
        u, v = vectors.reshape(-1, 2, vectors.shape[-1]).swapaxes(0, 1)  # [B, 2 hidden] each
        x = jnp.concatenate([u, v, abs(u - v), u * v], -1)
        x = drop(jnp.tanh(nn.Dense(self.units, dtype=self.dtype)(x)))
        return nn.Dense(self.classes, dtype=self.dtype)(x).astype(jnp.float32)


def _beside(first: Array, second: Array) -> Array:  # [B, T], [B, U] -> [B, 2, max(T, U)]
    """Both texts of each pair, padded to one length."""
    longest = max(first.shape[1], second.shape[1])
    return jnp.stack([jnp.pad(x, ((0, 0), (0, longest - x.shape[1]))) for x in (first, second)], 1)


def _require(module: Any, sizes: Sequence[str], first: Array, second: Array) -> None:
    """Raises InputError for fields that cannot be, and for texts that are no pairs."""
    require_positive({name: getattr(module, name) for name in sizes})
    require_probability({"dropout": module.dropout})
    shapes = jnp.shape(first), jnp.shape(second)
    if any(len(shape) != 2 or not shape[1] for shape in shapes) or shapes[0][0] != shapes[1][0]:
        raise InputError(
            f"texts {shapes[0]} and {shapes[1]}, expected [B, T] and [B, U] with T and U of 1 or more; give as many "
            "first as second texts"
        )


class FeedForward(nn.Module):
    """Two layers with ReLU, each after dropout: [..., C] -> [..., width]."""

    width: int
    dropout: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        for _ in range(2):
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
            x = nn.relu(dense(self.width, dtype=self.dtype)(x))
        return x


class DecomposableAttention(nn.Module):
    """A class of each pair of texts by attention: first int [B, T], second int [B, U] -> logits [B, classes].

    This is the decomposable attention model without attention within a text (Parikh et al. 2016, arXiv:1606.01933,
    section 3). Each token attends to the tokens of the other text, and is compared with their weighted mean. The
    comparisons of both texts are added up and classified. The vectors of tokens are projected to `hidden` values
    (section 5.1), which is also the width of the networks F, G and H. The lengths, int [B], are the numbers of tokens;
    those after them have no effect. Dropout acts on the inputs of all layers of F, G and H, and uses the random stream
    "dropout".

    Raises InputError for sizes below 1, a dropout outside [0, 1), batches of different sizes, and lengths that are not
    int [B] or not in [1, T].
    """

    vocabulary: int
    classes: int
    embedding: int = 300  # width of a token's vector
    hidden: int = 200
    dropout: float = 0.2
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        first: Array,
        second: Array,
        first_lengths: Array | None = None,
        second_lengths: Array | None = None,
        *,
        train: bool,
    ) -> Array:
        _require(self, ("vocabulary", "classes", "embedding", "hidden"), first, second)
        valid = valid_steps(first_lengths, first), valid_steps(second_lengths, second)
        embed = nn.Embed(self.vocabulary, self.embedding, dtype=self.dtype)
        project = dense(self.hidden, use_bias=False, dtype=self.dtype, name="project")
        attend, compare, aggregate = (
            FeedForward(self.hidden, self.dropout, self.dtype, name=name) for name in ("attend", "compare", "aggregate")
        )
        # The vector of an id outside of the vocabulary is NaN, and padding may be one.
        x = project(
            embed(_beside(*(jnp.where(there, text, 0) for there, text in zip(valid, (first, second), strict=True))))
        )
        a, b = x[:, 0, : first.shape[1]], x[:, 1, : second.shape[1]]  # [B, T, D], [B, U, D]
        keys = (attend(x, train=train) for x in (a, b))
        scores = jnp.einsum("btd,bud->btu", *keys, preferred_element_type=jnp.float32)  # equation 1
        summaries = []
        for x, other, e, mine, theirs in ((a, b, scores, *valid), (b, a, scores.swapaxes(1, 2), *valid[::-1])):
            weights = masked_softmax(e, theirs[:, None]).astype(self.dtype)
            aligned = jnp.matmul(weights, other)  # equation 2
            y = compare(jnp.concatenate([x, aligned], -1), train=train)  # equation 3
            summaries.append(jnp.where(mine[..., None], y, 0).sum(1))  # equation 4
        x = aggregate(jnp.concatenate(summaries, -1), train=train)  # equation 5
        return nn.Dense(self.classes, dtype=self.dtype)(x).astype(jnp.float32)


def examples() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """Tiny instances with a batch of inputs each, for the tests of the whole zoo."""
    rng = np.random.default_rng(0)
    inputs = {
        "first": rng.integers(0, 7, (3, 5), np.int32),
        "second": rng.integers(0, 7, (3, 4), np.int32),
        "first_lengths": np.array([5, 1, 4], np.int32),
        "second_lengths": np.array([3, 4, 1], np.int32),
    }
    return {
        "SiameseClassifier": (SiameseClassifier(7, 3, embedding=4, hidden=5, units=6, cell=VANILLA), inputs),
        "DecomposableAttention": (DecomposableAttention(7, 3, embedding=4, hidden=6, dropout=0.0), inputs),
    }


def published() -> dict[str, tuple[nn.Module, dict[str, jax.ShapeDtypeStruct], int]]:
    """Networks for natural language inference (three classes) with vectors of 300 for 10,000 tokens.

    Parikh et al. 2016 give their network 382K parameters without these vectors (table 1, from memory): 381,803 by the
    sizes of its layers. The siamese network has our sizes, and the number that its layers give.
    """
    pairs = {name: jax.ShapeDtypeStruct((1, 32), jnp.int32) for name in ("first", "second")}
    lstm = 2 * 4 * 300 * (300 + 300 + 1)
    vectors = 10_000 * 300
    return {
        "SiameseClassifier": (
            SiameseClassifier(10_000, 3),
            pairs,
            vectors + lstm + (4 * 600 + 1) * 512 + 513 * 3,
        ),
        "DecomposableAttention": (DecomposableAttention(10_000, 3), pairs, vectors + 381_803),
    }
