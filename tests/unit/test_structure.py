"""Structural pruning: groups against brute force, cutting against zeroing, training, plans, and what is refused."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dl_jax import classify
from dl_jax.compress import structure
from dl_jax.core import equations
from dl_jax.core.errors import InputError
from dl_jax.export import stablehlo
from dl_jax.models.recur import GRU, LSTM
from dl_jax.models.sequence.rnn import SequenceClassifier

RNG = np.random.default_rng(0)
IMAGE = RNG.random((3, 6, 6, 2), np.float32)
PIXELS = RNG.standard_normal((8, 1, 2, 2), np.float32)
TOKENS = RNG.integers(0, 7, (3, 5), np.int32)


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.relu(nn.Dense(4)(x.reshape(x.shape[0], -1)))
        x = x + nn.Dense(4)(nn.tanh(nn.Dense(3)(x)))
        return nn.Dense(2, use_bias=False)(x)


class Conv(nn.Module):
    """Residual blocks, one depthwise, with BatchNorm; pooling, dropout and a flattening."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, *, train):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = nn.relu(norm()(nn.Conv(6, (3, 3), use_bias=False)(x)))
        y = nn.relu6(norm()(nn.Conv(6, (3, 3), feature_group_count=6, use_bias=False)(x)))
        x = nn.max_pool(x + norm()(nn.Conv(6, (1, 1), use_bias=False)(y)), (2, 2), (2, 2))
        x = nn.Dropout(self.dropout, deterministic=not train)(x).reshape(x.shape[0], -1)
        return nn.Dense(3)(nn.silu(nn.Dense(5)(x)))


class Split(nn.Module):
    """Concatenation, split, groups, padding of channels, a transposed convolution, maxout, and a slice."""

    @nn.compact
    def __call__(self, x, *, train):
        a, b = nn.relu(nn.Conv(4, (1, 1))(x)), nn.relu(nn.Conv(6, (3, 3))(x))
        x = jnp.concatenate([a, b], -1)
        x = nn.relu(nn.Conv(20, (3, 3), feature_group_count=5)(x))
        x = x[..., ::2] * nn.sigmoid(x[..., 1::2])
        x = nn.relu(nn.Conv(10, (1, 1))(x)) + jnp.pad(nn.relu(nn.Conv(6, (1, 1))(x)), (*[(0, 0)] * 3, (1, 3)))
        one, two = jnp.split(nn.relu(nn.ConvTranspose(8, (2, 2), (2, 2))(x))[:, ::2, 1:], 2, -1)
        x = jnp.stack([one, two]).sum(0)
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


class Heads(nn.Module):
    """Attention whose heads and their dimensions are one axis of the parameters, taken apart twice."""

    @nn.compact
    def __call__(self, x, *, train):  # [B, 6, 6, 2]
        query, key, value = (nn.Dense(16)(x[:, 0]).reshape(-1, 6, 4, 4) for _ in range(3))
        mixed = jnp.einsum("bhts,bshd->bthd", nn.softmax(jnp.einsum("bthd,bshd->bhts", query, key)), value)
        merged = nn.tanh(mixed.reshape(-1, 6, 16))
        return nn.Dense(3)(jnp.sin(merged.reshape(-1, 6, 4, 4)).reshape(-1, 6, 16))


class Recurrent(nn.Module):
    cell: type[nn.RNNCellBase]
    layers: int

    @nn.compact
    def __call__(self, tokens, *, train):
        x = nn.Embed(7, 4)(tokens)
        for _ in range(self.layers):
            x = nn.RNN(self.cell(4), reverse=True)(x)
        return nn.Dense(3)(x[:, 0])


MODELS = {
    "mlp": (Mlp(), IMAGE),
    "conv": (Conv(), IMAGE),
    "split": (Split(), IMAGE),
    "heads": (Heads(), IMAGE),
    "transformer": (Transformer(), TOKENS),
    "lstm": (Recurrent(nn.OptimizedLSTMCell, 2), TOKENS),
    "gru": (Recurrent(nn.GRUCell, 1), TOKENS),
    **{
        f"our {name}": (SequenceClassifier(7, 3, 4, 5, layers, cell), TOKENS)
        for name, cell, layers in (("lstm", LSTM, 2), ("gru", GRU, 1))
    },
}


def drawn(model, x):
    """Variables of a model by NumPy, without any symmetry."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    rng = np.random.default_rng(1)

    def draw(path, leaf):  # in NumPy, whose leaves are cut without compiling anything
        signs = 1 if "var" in str(path[-1]) else rng.choice([-1, 1], leaf.shape)
        return (rng.uniform(0.5, 1.5, leaf.shape) * signs).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def of_shapes(**shapes):
    """Parameters of these shapes, drawn as in `drawn`."""
    rng = np.random.default_rng(1)
    return {"params": {name: np.float32(rng.uniform(-1, 1, shape)) for name, shape in shapes.items()}}


# Most of the time of these tests goes into optimising what runs once.
soon_compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def some(found, share=0.5):
    """A plan that removes random channels of every group."""
    rng = np.random.default_rng(2)
    picked = [rng.permutation(len(channels))[: int(share * len(channels))] for channels in found.free.values()]
    return structure.removing(
        channels[i] for channels, each in zip(found.free.values(), picked, strict=True) for i in each
    )


def close(found, expected):
    """Equal within 1e-5 of the largest number of the tree."""
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

    def trained(apply, variables):
        def loss(params):
            out, new = apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
            return (out**2).sum(), (out, new)

        return jax.grad(loss, has_aux=True)(variables["params"])

    zeros = structure.zeroed(variables, plan)
    both = soon_compiled(lambda v, s: (trained(model.apply, v), trained(small, s)))
    (grads, (out, new)), little = jax.device_get(both(zeros, smaller))
    close(little[1][0], out)
    close(little[0], structure.shrunk(grads, plan))
    close(little[1], (out, structure.shrunk(new, plan)))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        return nn.MultiHeadDotProductAttention(2, qkv_features=4, out_features=2, use_bias=False)(x[:, 0])


class Pixel(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(3, (1, 1), use_bias=False)(x)))
        return nn.Dense(2)(nn.Conv(3, (1, 1), feature_group_count=3)(x).mean((1, 2)))


@pytest.mark.parametrize("model", [Mlp(), Attention(), Pixel()], ids=["mlp", "attention", "pixel"])
def test_groups_are_the_smallest_sets_of_axes_that_can_be_permuted_together(model):
    """By brute force: the first two coordinates are swapped along every set of axes, and the outputs are compared."""
    variables = drawn(model, PIXELS)
    leaves, tree = jax.tree.flatten(variables)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(variables)]
    axes = [(k, axis) for k, leaf in enumerate(leaves) for axis in range(leaf.ndim) if leaf.shape[axis] > 1]

    def swapped(chosen):
        new = list(leaves)
        for yes, (k, axis) in zip(chosen, axes, strict=True):
            order = np.arange(new[k].shape[axis])
            order[:2] = 1, 0
            new[k] = jnp.where(yes, jnp.take(new[k], order, axis), new[k])
        return model.apply(jax.tree.unflatten(tree, new), PIXELS, train=False)

    sets = np.array(list(itertools.product([False, True], repeat=len(axes))))
    outputs = np.asarray(jax.jit(lambda sets: jax.lax.map(swapped, sets, batch_size=256))(sets)).reshape(len(sets), -1)
    same = sets[abs(outputs - outputs[0]).max(1) < 1e-5 * abs(outputs).max()][1:]
    smallest = [each for each in same if not any((other <= each).all() and (other < each).any() for other in same)]
    expected = {
        frozenset((paths[k], axis) for yes, (k, axis) in zip(each, axes, strict=True) if yes) for each in smallest
    }
    found = structure.groups(model.apply, variables, PIXELS, train=False)
    assert {frozenset(channels[0]) for channels in found.free.values()} == expected
    assert expected
    for channels in found.free.values():
        assert all(set(channel.values()) == {(i,)} for i, channel in enumerate(channels))


def halved(model, x):
    """Variables, a plan that removes half of every group, and the cut model."""
    variables = drawn(model, x)
    plan = some(structure.groups(model.apply, variables, x, train=False))
    return variables, plan, *structure.cut(model.apply, variables, plan)


def test_training_goes_on_with_the_state_of_the_optimiser():
    """Channels whose parameters are zero get no gradient here, so the large net follows the small one."""
    model = Conv()
    variables, plan, small, _ = halved(model, IMAGE)
    variables, tx = structure.zeroed(variables, plan), optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.01))
    batch = {"image": IMAGE, "label": np.array([0, 2, 1])}

    @functools.partial(soon_compiled, static_argnums=0)
    def step(apply, variables, opt_state):
        def loss(params):
            value, (new, _) = classify.loss(apply)({**variables, "params": params}, batch, jax.random.key(0))
            return value, new

        grads, new = jax.grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = tx.update(grads, opt_state)
        return {"params": optax.apply_updates(variables["params"], updates), **new}, opt_state

    state = jax.device_get(step(model.apply, variables, tx.init(variables["params"])))
    cut = structure.shrunk(state, plan)
    for _ in range(2):
        state, cut = step(model.apply, *state), step(small, *cut)
    assert cut[1][1][0].mu["Conv_0"]["kernel"].shape == (3, 3, 2, 3)
    assert cut[0]["batch_stats"]["BatchNorm_0"]["mean"].shape == (3,)
    close(cut, structure.shrunk(jax.device_get(state), plan))


def test_heads_and_their_dimensions_are_groups():
    found = structure.groups(Heads().apply, drawn(Heads(), IMAGE), IMAGE, train=False)
    sizes = sorted(
        (len(channels), len(channels[0]["params/Dense_0/kernel", 1]))
        for channels in found.free.values()
        if ("params/Dense_0/kernel", 1) in channels[0]
    )
    assert sizes == [(4, 4), (4, 4)]  # heads of four coordinates, and dimensions of four heads


def test_heads_and_dimensions_of_one_kernel_shrink_each_on_its_own():
    """Query, key and value in one product, as in timm: a coordinate of the kernel goes with its head or dimension."""

    def apply(variables, tokens):
        parts = (tokens @ variables["params"]["qkv"]).reshape(2, 3, 3, 4, 8)
        query, key, value = jnp.moveaxis(parts, 2, 0)
        weights = nn.softmax(jnp.einsum("bthd,bshd->bhts", query, key))
        return jnp.einsum("bhts,bshd->bthd", weights, value).reshape(2, 3, 32) @ variables["params"]["out"]

    variables, tokens = of_shapes(qkv=(6, 96), out=(32, 5)), np.float32(RNG.standard_normal((2, 3, 6)))
    found = structure.groups(apply, variables, tokens)
    sizes = {name: (len(channels), len(channels[0]["params/out", 0])) for name, channels in found.free.items()}
    heads, dims = "params/qkv:1", "params/qkv:1#2"
    assert sizes == {heads: (4, 8), dims: (8, 4)}
    assert found.crossing == {heads: {dims}, dims: {heads}}
    assert f"{heads}: 4 channels of 8 inputs and outputs" in structure.explain(found)

    scores, cost = structure.random(found, 0), structure.parameters(variables)
    left = lambda plan: structure.shrunk(variables, plan)["params"]["out"].shape[0]
    assert left(structure.lowest(found, scores, {heads: 0.5})) == 2 * 8
    assert left(structure.lowest(found, scores, {dims: 0.5})) == 4 * 4
    assert left(structure.lowest(found, scores, 0.5, multiple=8)) == 2 * 8
    assert left(structure.lowest(found, scores, 0.9)) == 1
    plan = structure.within(found, scores, cost, 300)
    assert 150 < cost(plan) <= 300
    small, smaller = structure.cut(apply, variables, plan)
    close(jax.jit(small)(smaller, tokens), jax.jit(apply)(structure.zeroed(variables, plan), tokens))


@pytest.mark.parametrize("multiple", [2, 4, 6, 8, 16])
@pytest.mark.parametrize("kernel", [(3, 32), (3, 4, 8)])
def test_what_is_left_of_crossing_groups_together_is_a_multiple(kernel, multiple):
    """One axis of a kernel that is taken apart, or two axes over which the next layer sums."""

    def apply(variables, x):
        hidden = jnp.tanh(jnp.tensordot(x, variables["params"]["a"], 1)).reshape(2, 4, 8)
        return jnp.cos(hidden.swapaxes(1, 2).reshape(2, 32) @ variables["params"]["b"])

    variables = of_shapes(a=kernel, b=(32, 5))
    found = structure.groups(apply, variables, np.ones((2, 3), np.float32))
    for seed, share in itertools.product(range(3), (0.25, 0.5, 0.75, 0.9)):
        plan = structure.lowest(found, structure.random(found, seed), share, multiple)
        left = structure.shrunk(variables, plan)["params"]["b"].shape[0]
        assert left % multiple == 0 or left == 32
        assert multiple > 2 or left < 32


def test_channels_that_are_shuffled_in_part_are_groups():
    """As in ShuffleNet v2: a part of the channels goes by, all are merged in another order, and no axis is emptied."""

    def apply(variables, x):
        params = variables["params"]
        hidden = jnp.concatenate([x @ params["a"], x @ params["b"]], -1).reshape(2, 2, 8)
        return jnp.tanh(hidden.swapaxes(1, 2).reshape(2, 16)) @ params["c"]

    variables, x = of_shapes(a=(3, 4), b=(3, 12), c=(16, 5)), np.float32(RNG.standard_normal((2, 3)))
    found = structure.groups(apply, variables, x)
    plan = structure.lowest(found, structure.random(found, 0), 0.9)
    small, smaller = structure.cut(apply, variables, plan)
    assert smaller["params"]["c"].shape[0] < 16
    close(jax.jit(small)(smaller, x), apply(structure.zeroed(variables, plan), x))


def test_padded_channels_keep_their_places():
    def apply(variables, x):
        params = variables["params"]
        return (jnp.pad(x @ params["a"], ((0, 0), (1, 3))) + x @ params["c"]) @ params["d"]

    variables = of_shapes(a=(3, 6), c=(3, 10), d=(10, 2))
    plan = some(structure.groups(apply, variables, np.ones((2, 3), np.float32)))
    small, smaller = structure.cut(apply, variables, plan)
    x = np.float32(RNG.random((2, 3)))
    assert [leaf.shape for leaf in jax.tree.leaves(smaller)] == [(3, 3), (3, 5), (5, 2)]
    close(jax.jit(small)(smaller, x), apply(structure.zeroed(variables, plan), x))


def test_dropout_draws_for_the_units_that_are_left():
    def apply(variables, x, *, rngs):
        x = nn.Dropout(0.5, deterministic=False).apply({}, x * variables["params"]["a"], rngs=rngs)
        return x.sum(0) @ jnp.ones(8)

    plan, ones = {"params/a": {0: np.arange(6)}}, np.ones((4000, 1), np.float32)
    small, smaller = structure.cut(apply, {"params": {"a": jnp.ones(8)}}, plan)
    draw = jax.jit(lambda v, key: small(v, ones, rngs={"dropout": key}) / 2)  # how many of 8000 are kept
    first, other = draw(smaller, jax.random.key(0)), draw(smaller, jax.random.key(1))
    assert first != other
    for kept in (first, other):
        assert abs(kept - 4000) < 5 * np.sqrt(8000 / 4)


def test_what_is_drawn_for_the_channels_that_are_left_stays():
    """By keys in the model, one and several at once, and by one that it is given: dropout is that of the large net."""

    def apply(variables, x, key):
        one, *several = jax.random.split(jax.random.key(1, impl="unsafe_rbg"), 3)  # which compiles soonest
        noise = jax.vmap(lambda key: jax.random.normal(key, (8,)))(jnp.stack(several))
        hidden = jnp.cos(x @ (variables["params"]["a"] * jax.random.normal(one, (3, 8)))) + noise.mean(0)
        return jnp.where(jax.random.bernoulli(key, 0.5, hidden.shape), hidden, 0) @ variables["params"]["b"]

    variables, x = of_shapes(a=(3, 8), b=(8, 2)), np.float32(RNG.standard_normal((4, 3)))
    plan = some(structure.groups(apply, variables, x, jax.random.key(0, impl="unsafe_rbg")))
    small, smaller = structure.cut(apply, variables, plan)
    assert smaller["params"]["b"].shape == (4, 2)
    both = soon_compiled(lambda s, z, key: (small(s, x, key), apply(z, x, key)))
    for seed in range(2):
        close(*both(smaller, structure.zeroed(variables, plan), jax.random.key(seed, impl="unsafe_rbg")))


def relu_net(variables, x):
    params = variables["params"]
    return nn.relu(x @ params["a"] + params["bias"]) @ params["b"]


RELU = {"params": {"a": jnp.ones((2, 4)), "bias": jnp.zeros(4), "b": jnp.ones((4, 1))}}


def test_a_custom_derivative_stays_what_it_was():
    """That of ReLU at 0 is 0; a maximum's would be 1/2. Forwards, backwards, in loops, and cut twice."""
    plan = {"params/a": {1: [0]}, "params/bias": {0: [0]}, "params/b": {0: [0]}}
    once, smaller = structure.cut(relu_net, RELU, plan)
    twice, smallest = structure.cut(once, smaller, plan)
    looped = lambda v, x: jax.lax.scan(lambda c, _: (c + relu_net(v, x), None), jnp.zeros((1, 1)), length=3)[0]
    loop, _ = structure.cut(looped, RELU, plan)

    @functools.partial(jax.jit, static_argnums=0)
    def slopes(apply, variables):
        total = lambda v, x: apply(v, x).sum()
        off, on = (jax.grad(total)(variables, jnp.full((1, 2), x))["params"]["bias"] for x in (0.0, 1.0))
        return off, on, jax.jvp(lambda v: total(v, jnp.zeros((1, 2))), (variables,), (variables,))[1]

    for apply, variables in ((once, smaller), (twice, smallest), (loop, smaller)):
        off, on, along = slopes(apply, variables)
        np.testing.assert_array_equal(off, 0)
        np.testing.assert_allclose(on, 3 if apply is loop else 1)
        assert along == 0


def test_over_seeds_and_with_a_batch_of_unknown_size(tmp_path):
    _, _, small, smaller = halved(Conv(), IMAGE)
    seeds = jax.tree.map(lambda leaf: np.stack([leaf, 2 * leaf]), smaller)
    predict = functools.partial(small, train=False)
    both = soon_compiled(lambda s, v: (jax.vmap(lambda v: predict(v, IMAGE))(s), predict(v, IMAGE[:2])))
    several, one = both(seeds, smaller)
    close(several[0][:2], one)
    stablehlo.export(predict, smaller, (IMAGE,), tmp_path / "net")
    close(stablehlo.load(tmp_path / "net")(IMAGE[:2]), one)
    _, _, small, smaller = halved(Transformer(), TOKENS)
    (batch,) = jax.export.symbolic_shape("batch")
    tokens = jax.ShapeDtypeStruct((batch, 5), jnp.int32)
    assert jax.eval_shape(functools.partial(small, train=False), smaller, tokens).shape == (batch, 3)


# scores, costs and plans


def test_scores_by_hand():
    variables = drawn(Mlp(), IMAGE)
    found = structure.groups(Mlp().apply, variables, IMAGE, train=False)
    params = {name: {k: np.float64(x) for k, x in layer.items()} for name, layer in variables["params"].items()}
    weights = [np.concatenate([params["Dense_2"]["kernel"][:, i], params["Dense_1"]["kernel"][i]]) for i in range(3)]
    name = "params/Dense_2/kernel:1"
    np.testing.assert_allclose(structure.l1(found, variables)[name], [abs(w).mean() for w in weights])
    np.testing.assert_allclose(structure.l2(found, variables)[name], [np.sqrt((w**2).mean()) for w in weights])
    assert structure.norm_scale(found, variables) == {}
    assert structure.random(found, 0)[name].shape == (3,)
    assert (structure.random(found, 0)[name] != structure.random(found, 1)[name]).all()

    loss = lambda variables, x: (Mlp().apply(variables, x, train=False) ** 2).sum()
    expected = np.zeros(3)
    for x in (IMAGE[:1], IMAGE[1:2]):
        g = jax.jit(jax.grad(loss))(variables, x)["params"]
        terms = jax.tree.map(lambda a, b: np.float64(a) * b, g, params)
        expected += (
            terms["Dense_2"]["kernel"].sum(0) + terms["Dense_2"]["bias"] + terms["Dense_1"]["kernel"].sum(1)
        ) ** 2
    scores = structure.taylor(found, loss, variables, (IMAGE[:1], IMAGE[1:2]))
    np.testing.assert_allclose(scores[name], expected, rtol=1e-4)


def test_scales_of_normalisations_are_scores():
    variables = drawn(Conv(), IMAGE)
    found = structure.groups(Conv().apply, variables, IMAGE, train=False)
    scales = [np.float64(variables["params"][f"BatchNorm_{i}"]["scale"]) for i in range(3)]
    (scores,) = structure.norm_scale(found, variables).values()
    np.testing.assert_allclose(scores, np.abs(scales).mean(0))


def test_a_share_of_each_group_and_multiples():
    variables = drawn(Mlp(), IMAGE)
    found = structure.groups(Mlp().apply, variables, IMAGE, train=False)
    scores = {"params/Dense_0/kernel:1": np.array([3.0, 1, 2, 4]), "params/Dense_2/kernel:1": np.array([1.0, 3, 2])}
    plan = structure.lowest(found, scores, 0.5)
    assert plan["params/Dense_0/bias"][0].tolist() == [1, 2]
    assert {axis: gone.tolist() for axis, gone in plan["params/Dense_2/kernel"].items()} == {0: [1, 2], 1: [0, 2]}
    plan = structure.lowest(found, scores, {"params/Dense_0/kernel:1": 0.4}, multiple=3)  # 2 left, rounded up to 3
    assert plan["params/Dense_0/bias"][0].tolist() == [1]
    assert 1 not in plan["params/Dense_2/kernel"]
    assert structure.lowest(found, scores, 0.9, multiple=8) == {}


def test_the_fewest_channels_that_meet_a_budget():
    model, variables = Mlp(), drawn(Mlp(), IMAGE)
    found = structure.groups(model.apply, variables, IMAGE, train=False)
    scores, shape = structure.l2(found, variables), jax.eval_shape(lambda: variables)
    for cost in (structure.parameters(shape), structure.operations(model.apply, shape, IMAGE, train=False)):
        budget = 0.6 * cost({})
        plan = structure.within(found, scores, cost, budget)
        ranked = sorted((score, name, i) for name, each in scores.items() for i, score in enumerate(each))
        gone = [found.free[name][i] for _, name, i in ranked]
        n = next(n for n in range(len(gone)) if cost(structure.removing(gone[:n])) <= budget)
        jax.tree.map(np.testing.assert_array_equal, plan, structure.removing(gone[:n]))
    _, smaller = structure.cut(model.apply, variables, plan)
    assert structure.parameters(variables)(plan) == sum(leaf.size for leaf in jax.tree.leaves(smaller["params"]))


def test_a_budget_that_cannot_be_met_is_refused_with_the_cause():
    variables = drawn(Mlp(), IMAGE)
    found, cost = structure.groups(Mlp().apply, variables, IMAGE, train=False), structure.parameters(variables)
    scores, least = structure.l2(found, variables), 72 + 1 + 2 + 2 + 2  # one unit in each of two groups
    assert cost(structure.within(found, scores, cost, least)) == least
    with pytest.raises(InputError, match=r"as the multiple 4 lets it be, expected at most 79; .* lower the multiple"):
        structure.within(found, scores, cost, least, multiple=4)
    with pytest.raises(InputError, match="as small as it can be, expected at most 78; raise the budget; a lower multi"):
        structure.within(found, scores, cost, least - 1, multiple=4)
    for none in (structure.norm_scale(found, variables), {}):
        with pytest.raises(
            InputError, match=r"where nothing can be removed, .*; raise the budget; `explain` tells why"
        ):
            structure.within(found, none, cost, least, multiple=4)


class Wide(nn.Module):
    """Attention with more dimensions than heads, grouped and depthwise convolutions, and a flattening."""

    @nn.compact
    def __call__(self, x, *, train):  # [B, 6, 6, 2]
        x = nn.relu(nn.Conv(32, (3, 3), feature_group_count=8)(nn.relu(nn.Conv(32, (1, 1))(x))))
        x = nn.relu(nn.Conv(24, (1, 1))(nn.relu(nn.Conv(32, (3, 3), feature_group_count=32)(x))))
        y = nn.MultiHeadDotProductAttention(4, qkv_features=64, out_features=24)(x[:, 0])
        return nn.Dense(2)(nn.relu(nn.Dense(24)(nn.tanh(x[:, 1] + y).reshape(x.shape[0], -1))))


def dimensions(jaxpr):
    """The lengths over which products sum, and those of their results that come from one factor, in order."""
    found = []
    for equation in jaxpr.eqns:
        x, kernel = ([*v.aval.shape] for v in equation.invars[:2]) if len(equation.invars) > 1 else ([], [])
        if equation.primitive.name == "dot_general":
            (summed, others), (batch, batches) = equation.params["dimension_numbers"]
            found.append(np.prod([x[i] for i in summed]))
            for shape, used in ((x, {*summed, *batch}), (kernel, {*others, *batches})):
                found.append(np.prod([n for i, n in enumerate(shape) if i not in used]))
        if equation.primitive.name == "conv_general_dilated":
            found += [x[-1], kernel[-1]]
    return found


@functools.cache
def wide():
    variables = drawn(Wide(), IMAGE)
    return variables, structure.groups(Wide().apply, variables, IMAGE, train=False)


@pytest.mark.parametrize(("multiple", "heads"), [(8, 2), (32, 2), (64, 4)])
def test_what_is_left_of_layers_is_a_multiple(multiple, heads):
    """Half of four heads of 16 are 32 inputs and outputs, a multiple of 8; half of 16 dimensions of 4 heads are 8."""
    variables, found = wide()
    plan = structure.lowest(found, structure.random(found, 0), 0.5, multiple)
    small, smaller = structure.cut(Wide().apply, variables, plan)
    before, after = (
        dimensions(equations.trace(f, v, IMAGE, train=False).jaxpr.jaxpr)
        for f, v in ((Wide().apply, variables), (small, smaller))
    )
    changed = [left for left, n in zip(after, before, strict=True) if left != n]
    assert all(left % multiple == 0 for left in changed)
    assert bool(changed) == (multiple < 64)
    attention = smaller["params"]["MultiHeadDotProductAttention_0"]
    assert attention["out"]["kernel"].shape[0] == heads
    name = "params/MultiHeadDotProductAttention_0/key/kernel:1"
    assert f"{name}: 4 channels of 16 inputs and outputs" in structure.explain(found)


def test_operations_and_seconds_of_what_a_plan_leaves():
    variables = {"params": {"a": jnp.ones((200, 400)), "bias": jnp.zeros(400), "b": jnp.ones((400, 100))}}
    gone = np.arange(100)
    plan = {"params/a": {1: gone}, "params/bias": {0: gone}, "params/b": {0: gone}}
    cost = structure.operations(relu_net, variables, np.ones((5, 200), np.float32))
    assert (cost({}), cost(plan)) == (2 * 5 * 300 * 400, 2 * 5 * 300 * 300)
    assert 0 < structure.seconds(relu_net, variables, np.ones((5, 200), np.float32), rounds=3)(plan) < 1


# what stays, and what is refused


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda h: (jax.debug.callback(id, h), h)[1], "the operation debug_callback, which is not followed"),
        (lambda h: jnp.sort(h, -1), "the operation sort, which is not followed"),
        (lambda h: jax.nn.softmax(h), "one number is made"),
        (lambda h: h * jax.nn.sigmoid(h).sum(-1, keepdims=True), "terms need not be zero"),
        (lambda h: jnp.cumsum(h, -1), "an order of coordinates"),
        (lambda h: h * jnp.arange(4), "numbered"),
        (lambda h: h[:, jnp.array([0, 2, 1, 3])], "indexed"),
        (lambda h: jax.lax.pad(h, 0.0, ((0, 0, 0), (1, -1, 0))), "negative"),
        (lambda h: nn.avg_pool(h[..., None], (2,), (1,), "SAME")[..., 0], "pixels"),
        (lambda h: h.reshape(-1, 4, 1) @ h.reshape(-1, 1, 4) @ jnp.ones(4), "terms need not be zero"),
    ],
)
def test_what_cannot_be_followed_stays_for_a_reason(function, why):
    def apply(variables, x):
        return function(jnp.cos(x @ variables["params"]["a"])) @ variables["params"]["b"]

    variables = {"params": {"a": jnp.ones((3, 4)), "b": jnp.ones(4)}}
    found = structure.groups(apply, variables, jnp.ones((2, 3)))
    assert not found.free
    assert why in found.frozen["params/a", 1]
    assert found.frozen["params/a", 0] == "an input of the model"
    assert "axis 1 of params/a" in structure.explain(found)
    with pytest.raises(InputError, match=f"^params/a:1 cannot shrink: .*{why}"):
        structure.lowest(found, {}, {"params/a:1": 0.5})
    small, smaller = structure.cut(apply, variables, {"params/a": {1: [0]}, "params/b": {0: [0]}})
    with pytest.raises(InputError, match=f"^the plan removes 0 of axis 1 of params/a, which this call needs: .*{why}"):
        small(smaller, jnp.ones((2, 3)))


def test_seeds_are_no_channels():
    def apply(variables, x):
        drawn = jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), ()))(variables["seeds"]["s"])
        return (x @ (variables["params"]["a"] * drawn)).sum(-1)

    variables = {"seeds": {"s": np.arange(4)}, **of_shapes(a=(3, 4))}
    found = structure.groups(apply, variables, np.ones((2, 3), np.float32))
    assert (found.free, found.frozen["params/a", 1]) == ({}, "random keys")


@pytest.mark.parametrize(
    ("function", "stays"),
    [
        (lambda e, i: e.at[i].get(mode="fill", fill_value=1.0), True),
        (lambda e, i: e.astype(int).at[i].get(mode="fill"), True),
        (lambda e, i: e.at[i].get(mode="fill", fill_value=0.0), False),
        (lambda e, i: jnp.take(e, i, axis=0), False),
        (lambda e, i: e.at[i].get(mode="clip"), False),
        (lambda e, i: jax.lax.reduce_window(e, -jnp.inf, jax.lax.max, (1, 1), (1, 1), ((1, 0), (0, 0))), True),
        (lambda e, i: nn.max_pool(e[None, ..., None], (3, 1), padding="SAME")[0, ..., 0], False),
    ],
)
def test_what_is_filled_with_other_numbers_than_zero_is_not_summed_without_them(function, stays):
    """Rows that indices miss, and windows of nothing but padding."""
    apply = lambda v, i: function(v["params"]["e"], i).sum(-1)
    found = structure.groups(apply, of_shapes(e=(9, 12)), np.array([3, 50]))
    assert (not found.free) == stays
    assert stays == ("terms need not be zero" in found.frozen.get(("params/e", 1), ""))


@pytest.mark.parametrize("hidden", [12, 7])
def test_outputs_in_lists_are_not_the_variables_in_these_places(hidden):
    def apply(variables, x):
        first, second = variables
        return jnp.tanh(x @ first), {"w": [(x @ first) @ second]}

    variables = [np.ones((16, hidden), np.float32), np.ones((hidden, 12), np.float32)]
    for wrapped, of in ((variables, apply), ({"w": variables}, lambda v, x: apply(v["w"], x))):
        found = structure.groups(of, wrapped, np.ones((16, 16), np.float32))
        assert not found.free
        assert set(found.frozen.values()) == {"an input of the model", "an output of the model"}


def test_an_output_of_the_name_of_a_variable_but_another_shape_stays():
    apply = lambda v, x: {"stats": {"mean": (x @ v["params"]["a"])[0] + v["stats"]["mean"].sum()}}
    variables = {**of_shapes(a=(3, 4)), "stats": {"mean": np.ones(6, np.float32)}}
    found = structure.groups(apply, variables, np.ones((2, 3), np.float32))
    assert found.frozen["params/a", 1] == "an output of the model"


@pytest.mark.parametrize("length", [1, 4])
def test_a_coordinate_that_is_broadcast_stays_and_is_no_zero_for_others(length):
    """The second parameter goes with no unit, so that the cosine of a removed one would be missed in the sum."""
    apply = lambda v, x: (jnp.cos(v["params"]["a"]) * v["params"]["s"][:, :1]).sum(1) + x
    variables = {"params": {"a": jnp.ones((3, 4)), "s": jnp.ones((3, length))}}
    found = structure.groups(apply, variables, jnp.ones(3))
    assert "terms need not be zero" in found.frozen["params/a", 1]
    assert [channel["params/s", 1] for each in found.free.values() for channel in each] == [
        (i,) for i in range(1, length)
    ]


def test_a_report():
    found = structure.groups(relu_net, RELU, jnp.ones((1, 2)))
    expected = """Groups of channels that can be removed: 1
  params/a:1: 4 channels
    axis 1 of params/a
    axis 0 of params/b
    axis 0 of params/bias

Axes that stay, in whole or in part: 1
  an input of the model:
    axis 0 of params/a"""
    assert structure.explain(found) == expected


def test_what_is_refused():
    found = structure.groups(relu_net, RELU, jnp.ones((1, 2)))
    scores = structure.l1(found, RELU)
    plan = structure.lowest(found, scores, 0.5)
    for share in (1.0, -0.1):
        with pytest.raises(InputError, match=f"^the share of params/a:1 is {share}, expected a fraction"):
            structure.lowest(found, scores, share)
    with pytest.raises(InputError, match=r"^params/c:0 cannot shrink: there is no such group"):
        structure.lowest(found, scores, {"params/c:0": 0.5})
    with pytest.raises(InputError, match=r"^there are no scores of params/a:1"):
        structure.lowest(found, {}, {"params/a:1": 0.5})
    for multiple in (0, 2.5):
        with pytest.raises(InputError, match=rf"^multiple is {multiple}, expected a whole number"):
            structure.lowest(found, scores, 0.5, multiple=multiple)
    with pytest.raises(InputError, match=r"^the scores of params/a:1 are not all finite, .* look for NaN"):
        structure.lowest(found, structure.l1(found, {"params": {**RELU["params"], "a": np.full((2, 4), np.nan)}}), 0.5)
    with pytest.raises(InputError, match="expected at most nan"):
        structure.within(found, scores, structure.parameters(RELU), np.nan)
    with pytest.raises(InputError, match=r"^taylor: there are no batches"):
        structure.taylor(found, lambda variables, batch: 0.0, RELU, ())
    other = {"params": {**RELU["params"], "a": jnp.ones((2, 2))}}
    with pytest.raises(
        InputError, match=r"^params/a of shape \(2, 2\) does not fit the plan, which removes 3 of axis 1"
    ):
        structure.cut(relu_net, other, {"params/a": {1: [0, 3]}})
    with pytest.raises(InputError, match=r"^the plan removes coordinates of params/c, which the model does not have"):
        structure.cut(relu_net, RELU, {**plan, "params/c": {0: [0]}})
    with pytest.raises(InputError, match=r"^the plan removes all 4 of axis 1 of params/a"):
        structure.cut(relu_net, RELU, {"params/a": {1: np.arange(4)}})
    small, _ = structure.cut(relu_net, RELU, {"params/a": {1: [0]}})
    with pytest.raises(InputError, match=r"^params/a has shape \(2, 4\), expected \(2, 3\)"):
        small(RELU, jnp.ones((1, 2)))
    small, smaller = structure.cut(relu_net, RELU, {"params/a": {1: [0]}})
    with pytest.raises(InputError, match="others that the plan keeps go with it"):
        small(smaller, jnp.ones((1, 2)))
    factored = optax.scale_by_factored_rms(min_dim_size_to_factor=1).init(RELU["params"])
    with pytest.raises(InputError, match=r"^v_row/a of shape \(2,\) does not fit the plan"):
        structure.shrunk(factored, plan)
