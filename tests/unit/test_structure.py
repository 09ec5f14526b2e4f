"""Structural pruning: the grouping against brute force, cutting against zeroing, training, plans, and what is refused."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dl_jax.compress import structure
from dl_jax.core.errors import InputError
from dl_jax.models.recur import GRU, LSTM, VANILLA
from dl_jax.models.sequence.rnn import SequenceClassifier

RNG = np.random.default_rng(0)
IMAGE = RNG.random((3, 6, 6, 2), np.float32)
TOKENS = RNG.integers(0, 7, (3, 5))


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.relu(nn.Dense(4)(x.reshape(len(x), -1)))
        x = x + nn.Dense(4)(nn.tanh(nn.Dense(3)(x)))
        return nn.Dense(2, use_bias=False)(x)


class Conv(nn.Module):
    """Residual blocks, one depthwise, with BatchNorm; pooling, dropout and a flattening."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, *, train):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = nn.relu(norm()(nn.Conv(6, (3, 3))(x)))
        y = nn.relu6(norm()(nn.Conv(6, (3, 3), feature_group_count=6, use_bias=False)(x)))
        x = nn.max_pool(x + norm()(nn.Conv(6, (1, 1))(y)), (2, 2), (2, 2))
        x = nn.Dropout(self.dropout, deterministic=not train)(x).reshape(len(x), -1)
        return nn.Dense(3)(nn.silu(nn.Dense(5)(x)))


class Split(nn.Module):
    """Concatenation, split, groups, padding of channels, a transposed convolution, maxout, and a slice."""

    @nn.compact
    def __call__(self, x, *, train):
        a, b = nn.relu(nn.Conv(4, (1, 1))(x)), nn.relu(nn.Conv(6, (3, 3))(x))
        x = jnp.concatenate([a, b], -1)
        x = nn.relu(nn.Conv(10, (3, 3), feature_group_count=5)(x))
        one, two = jnp.split(x, 2, -1)
        x = one * nn.sigmoid(two) + jnp.pad(a, ((0, 0), (0, 0), (0, 0), (0, 1)))
        x = nn.relu(nn.ConvTranspose(4, (2, 2), (2, 2))(x))[:, ::2, 1:]
        return nn.Dense(2)(nn.Dense(12)(x.mean((1, 2))).reshape(-1, 4, 3).max(-1))


class Transformer(nn.Module):
    heads: int = 2

    @nn.compact
    def __call__(self, tokens, *, train):
        x = nn.Embed(7, 8)(tokens) + self.param("position", nn.initializers.normal(), (tokens.shape[1], 8))
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, qkv_features=6)(y, mask=nn.make_causal_mask(tokens))
        x = x + nn.Dense(8)(nn.gelu(nn.Dense(10)(nn.LayerNorm()(x))))
        return nn.Dense(3)(nn.LayerNorm()(x)[:, -1])


class Recurrent(nn.Module):
    cell: type[nn.RNNCellBase] = nn.OptimizedLSTMCell

    @nn.compact
    def __call__(self, tokens, *, train):
        x = nn.RNN(self.cell(4))(nn.Embed(7, 4)(tokens))
        return nn.Dense(3)(nn.RNN(self.cell(5), reverse=True)(x)[:, 0])


MODELS = {
    "mlp": (Mlp(), IMAGE),
    "conv": (Conv(), IMAGE),
    "split": (Split(), IMAGE),
    "transformer": (Transformer(), TOKENS),
    "lstm": (Recurrent(), TOKENS),
    "gru": (Recurrent(nn.GRUCell), TOKENS),
    **{
        f"our {name}": (SequenceClassifier(7, 3, 4, 5, layers=2, cell=cell), TOKENS)
        for name, cell in {"rnn": VANILLA, "lstm": LSTM, "gru": GRU}.items()
    },
}


def drawn(model, x):
    """Variables of a model by NumPy, without any symmetry."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape) * (1 if "var" in str(path[-1]) else rng.choice([-1, 1], leaf.shape)), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def some(found, share=0.5):
    """A plan that removes random channels of every group."""
    rng = np.random.default_rng(2)
    picked = [rng.permutation(len(channels))[: int(share * len(channels))] for channels in found.free.values()]
    return structure.removing(
        channels[i] for channels, each in zip(found.free.values(), picked, strict=True) for i in each
    )


def close(found, expected):
    """Equal within 1e-5 of the largest number of the tree: the gradient of a bias before BatchNorm is rounding alone."""
    scale = max(abs(leaf).max() for leaf in jax.tree.leaves(expected))
    assert np.isfinite(scale)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("name", MODELS)
def test_the_cut_model_is_the_one_with_zeros_in_outputs_gradients_and_statistics(name):
    model, x = MODELS[name]
    variables = drawn(model, x)
    found = structure.groups(model.apply, variables, x, train=False)
    plan = some(found)
    assert len(plan) > 3
    small, smaller = structure.cut(model.apply, variables, plan)

    def both(apply, variables):
        def loss(params):
            out, new = apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
            return (out**2).sum(), new

        return apply(variables, x, train=False), jax.grad(loss, has_aux=True)(variables["params"])

    big, little = jax.jit(lambda v, s: (both(model.apply, v), both(small, s)))(structure.zeroed(variables, plan), smaller)
    (out, (grads, new)), (small_out, (small_grads, small_new)) = big, little
    close(small_out, out)
    close(small_grads, structure.shrunk(grads, plan))
    close([small_out, small_new], [out, structure.shrunk(new, plan)])
    print(name, {n: len(c) for n, c in found.free.items()}, sum(l.size for l in jax.tree.leaves(variables)), sum(l.size for l in jax.tree.leaves(smaller)))
    print(structure.explain(found))
