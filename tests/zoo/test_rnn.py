"""Recurrent networks against their equations, automatic differentiation, one sequence at a time, and PyTorch."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from quick import drawn, jit, shapes

from dl_jax.core import devices, equations
from dl_jax.core.errors import InputError
from dl_jax.harness.plan import hlo
from dl_jax.models.recur import recur
from dl_jax.models.sequence import rnn
from dl_jax.models.sequence.rnn import GRU, LSTM, VANILLA, CharLM, Recurrent, SequenceClassifier, SequenceTagger
from dl_jax.models.vision.mlp import MLP

CELLS = {"VANILLA": VANILLA, "LSTM": LSTM, "GRU": GRU}
each_cell = pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
LENGTHS = np.array([6, 1, 4], np.int32)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


X = draw(3, 6, 4)  # [B, T, D]


def carry_of(model, batch=3):
    """A random initial state."""
    return jax.tree.map(lambda leaf: draw(*leaf.shape, seed=2), model.initial_carry(batch))


def weights(model, x=X):
    """Parameters about three times as large as at the start, so that the gates differ."""
    return drawn(model, x, spread=1.3, train=False)


@functools.cache
def compiled(model):
    return jit(lambda variables, *inputs: model.apply(variables, *inputs, train=False))


def assert_close(actual, expected, tolerance=2e-5):
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.shape(one) == np.shape(other)
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * max(1.0, float(np.abs(other).max())))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def one_step(cell, state, x, h):
    """The equations, in float64; x and h are the two projections with their biases."""
    blocks = list(zip(np.split(x, cell.gates, -1), np.split(h, cell.gates, -1), strict=True))
    if cell is VANILLA:
        return (np.tanh(x + h),)
    if cell is LSTM:
        i, f, g, o = (a + b for a, b in blocks)
        c = sigmoid(f) * state[1] + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(c), c
    (xr, hr), (xz, hz), (xn, hn) = blocks
    z = sigmoid(xz + hz)
    return ((1 - z) * np.tanh(xn + sigmoid(xr + hr) * hn) + z * state[0],)


def in_numpy(cell, params, x, state):
    """One layer over one sequence [T, D], forward."""
    params, x, state = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, x, state))
    outputs = []
    for step in x:
        h = state[0] @ params["kernel"] + params.get("bias", 0)
        state = one_step(cell, state, step @ params["input"]["kernel"] + params["input"]["bias"], h)
        outputs.append(state[0])
    return np.stack(outputs), state


@each_cell
def test_a_layer_is_its_equations(cell):
    model = Recurrent(cell, 5)
    variables, carry = weights(model), carry_of(model)
    y, last = compiled(model)(variables, X, None, carry)
    for row in range(3):
        state = jax.tree.map(lambda leaf, row=row: leaf[row], carry[0])
        outputs, state = in_numpy(cell, variables["params"]["forward_0"], X[row], state)
        assert_close((y[row], jax.tree.map(lambda leaf, row=row: leaf[row], last[0])), (outputs, state), 1e-6)


@each_cell
def test_layers_and_directions_are_layers_side_by_side(cell):
    """The second layer takes both outputs of the first; backward is forward over the reversed sequence."""
    model = Recurrent(cell, 5, layers=2, bidirectional=True)
    # Weights of up to a third: with larger ones a plain RNN's steps magnify the rounding of the steps before.
    variables, carry = jax.tree.map(lambda leaf: leaf / 3, weights(model)), carry_of(model)
    y, last = compiled(model)(variables, X, None, carry)
    for row in range(3):
        x, states = X[row], iter(jax.tree.map(lambda leaf, row=row: leaf[row], carry))
        expected = []
        for layer in range(2):
            params = [variables["params"][f"{side}_{layer}"] for side in ("forward", "backward")]
            forward, first = in_numpy(cell, params[0], x, next(states))
            backward, second = in_numpy(cell, params[1], x[::-1], next(states))
            x, expected = np.concatenate([forward, backward[::-1]], -1), [*expected, first, second]
        assert_close((y[row], jax.tree.map(lambda leaf, row=row: leaf[row], last)), (x, tuple(expected)), 1e-6)


def run(cell, kernel, bias, x, state, valid):
    """`recur` by plain automatic differentiation, without its custom derivative."""
    outputs = []
    for i in range(len(x)):
        h = jnp.matmul(state[0].astype(kernel.dtype), kernel, preferred_element_type=jnp.float32)
        new, *_ = cell.forward(state, x[i].astype(jnp.float32), h if bias is None else h + bias)
        state = new if valid is None else jax.tree.map(lambda a, b, i=i: jnp.where(valid[i], a, b), new, state)
        outputs.append(state[0])
    return jnp.stack(outputs), state


@each_cell
@pytest.mark.parametrize(("ragged", "dtype"), [(False, "float32"), (True, "float32"), (True, "bfloat16")])
def test_its_gradient_is_that_of_automatic_differentiation(cell, ragged, dtype):
    state = tuple(draw(3, 5, seed=i) for i in range(cell.states))
    bias = draw(5 * cell.gates, seed=5) if cell.bias else None
    valid = (np.arange(3)[:, None] < np.array([3, 1, 2]))[..., None] if ragged else None
    kernel, x = (draw(*shape, 5 * cell.gates, seed=3).astype(dtype) for shape in ((5,), (3, 3)))

    def gradients(function, *arguments):
        output, pullback = jax.vjp(lambda *a: function(cell, *a, valid), *arguments)
        return pullback(jax.tree.map(lambda leaf: jnp.asarray(draw(*leaf.shape, seed=leaf.ndim)), output))

    both = jit(lambda *arguments: [gradients(function, *arguments) for function in (rnn.recur, run)])
    found, expected = both(kernel, bias, x, state)
    assert [leaf.dtype for leaf in jax.tree.leaves(found)] == [leaf.dtype for leaf in jax.tree.leaves(expected)]
    single = lambda tree: jax.tree.map(lambda leaf: leaf.astype(np.float32), tree)
    assert_close(single(found), single(expected), 2e-5 if dtype == "float32" else 2e-2)


def scans(jaxpr):
    """The bodies of all scans in `jaxpr`, and the equations outside them."""
    bodies, outside = [], []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            bodies.append(equation.params["jaxpr"].jaxpr)
            continue
        outside.append(equation.primitive.name)
        for value in equation.params.values():
            if inner := getattr(value, "jaxpr", None):
                more, equations = scans(inner)
                bodies, outside = bodies + more, outside + equations
    return bodies, outside


@each_cell
def test_projections_and_weight_gradients_are_products_over_all_steps(cell):
    model = Recurrent(cell, 5)
    gradient = jax.grad(lambda variables: model.apply(variables, X, train=True)[0].sum())
    bodies, outside = scans(equations.inlined(jax.make_jaxpr(gradient)(weights(model))).jaxpr)
    inside = [scans(body)[1].count("dot_general") for body in bodies]
    assert inside == [1, 1]  # the product with the state, there and back
    assert outside.count("dot_general") == 3  # the input's projection, its kernel's gradient and the state's kernel's


def total(model, variables, x, lengths):
    """A scalar loss to which every valid output contributes with another weight."""
    y, carry = model.apply(variables, x, lengths, train=False)
    return (jnp.sin(y) * draw(x.shape[1], y.shape[-1], seed=7)).sum() + sum(
        jnp.cos(leaf).sum() for leaf in jax.tree.leaves(carry)
    ), (y, carry)


@pytest.mark.parametrize(
    ("cell", "bidirectional"),
    [(VANILLA, True), (LSTM, True), (GRU, True), (LSTM, False)],
    ids=["VANILLA", "LSTM", "GRU", "LSTM, forward alone"],
)
def test_a_padded_batch_equals_its_sequences_one_by_one(cell, bidirectional):
    model, lengths = Recurrent(cell, 5, layers=2, bidirectional=bidirectional), np.array([4, 1, 4], np.int32)
    variables = weights(model)
    padded = X.copy()
    for row, length in enumerate(lengths):
        padded[row, length:] = np.nan  # has no effect, whatever it is
    value = jit(jax.value_and_grad(lambda v, x, n: total(model, v, x, n), (0, 1), has_aux=True))
    (_, (y, carry)), (grads, dx) = value(variables, padded, lengths)
    alone = jit(jax.value_and_grad(lambda v, x: total(model, v, x, None), (0, 1), has_aux=True))
    sum_grads = jax.tree.map(np.zeros_like, variables)
    for row, length in enumerate(lengths):
        (_, expected), (more, dx_alone) = alone(variables, X[row : row + 1, :length])
        # Row 0 of `draw` in `total` belongs to step 0, so both sides weigh a step alike.
        assert_close((y[row : row + 1, :length], jax.tree.map(lambda leaf, r=row: leaf[r : r + 1], carry)), expected)
        assert_close(dx[row : row + 1, :length], dx_alone)
        assert not y[row, length:].any()
        assert not dx[row, length:].any()
        sum_grads = jax.tree.map(np.add, sum_grads, more)
    assert_close(grads, sum_grads)


@each_cell
def test_the_carry_continues_a_sequence(cell):
    model = Recurrent(cell, 5, layers=2)
    variables, apply, zeros = weights(model), compiled(model), jax.tree.map(np.asarray, model.initial_carry(3))
    whole, last = apply(variables, X)
    first, carry = apply(variables, X[:, :3], None, zeros)
    second, carry = apply(variables, X[:, 3:], None, carry)
    assert_close((np.concatenate([first, second], 1), carry), (whole, last), 1e-6)


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (Recurrent(LSTM, 0), X, "hidden is 0, expected more than 0"),
        (Recurrent(LSTM, 5, layers=0), X, "layers is 0, expected more than 0"),
        (Recurrent(LSTM, 5, dropout=1.0), X, "dropout is 1.0, expected a probability"),
        (Recurrent(LSTM, 5), X[:, :0], "the length of a sequence is 0"),
    ],
)
def test_a_network_that_cannot_be_is_refused(model, x, message):
    with pytest.raises(InputError, match=message):
        shapes(model, x, train=False)


@pytest.mark.parametrize(
    "carry",
    [
        ((np.zeros((3, 5)),),),  # of one state
        ((np.zeros((3, 5)),) * 2,) * 2,  # of two layers
        ((np.zeros((2, 5)),) * 2,),
        ((np.zeros((3, 4)),) * 2,),
        (),
    ],
)
def test_the_carry_of_another_network_or_batch_is_refused(carry):
    model = Recurrent(LSTM, 5)
    with pytest.raises(InputError, match=r"the carry has the states .* expected \(\(\(3, 5\), \(3, 5\)\),\)"):
        model.apply(weights(model), X, None, carry, train=False)


@pytest.mark.parametrize(("lengths", "wrong"), [([6, 7, 2], 7), ([6, 0, 2], 0), ([-3, 1, 1], -3)])
def test_lengths_outside_the_padding_are_refused(lengths, wrong):
    model = Recurrent(GRU, 5)
    variables = weights(model)
    with pytest.raises(InputError, match=f"length {wrong}, expected 1 to 6"):
        model.apply(variables, X, np.array(lengths), train=False)
    with pytest.raises(InputError, match=f"length {wrong}, expected 1 to 6"):
        model.apply(variables, X, jnp.array(lengths), train=False)


@pytest.mark.parametrize("lengths", [[[6], [4], [2]], [6], 6, [6.0, 4.0, 2.0], [True, True, True]])
def test_lengths_of_another_shape_or_kind_are_refused(lengths):
    """[B, 1] would broadcast to another mask where B is T, and one length to all sequences."""
    x = X[:, :3]
    model = Recurrent(GRU, 5)
    variables = weights(model)
    for each in (np.array(lengths), jnp.array(lengths)):
        with pytest.raises(InputError, match=r"expected whole numbers \(3,\); give one for each sequence"):
            model.apply(variables, x, each, train=False)
        with pytest.raises(InputError, match=r"expected whole numbers \(3,\)"):
            jax.jit(functools.partial(model.apply, train=False))(variables, x, each)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_lengths_and_tokens_of_small_integer_types(dtype):
    """300 steps and 300 tokens are more than either type holds."""
    lengths = np.array([1, 100, 127], dtype)
    model, tokens = SequenceClassifier(300, classes=2, embedding=3, hidden=2), lengths[:, None]
    variables = drawn(model, tokens, train=False)
    apply = jit(lambda tokens: model.apply(variables, tokens, train=False))
    np.testing.assert_array_equal(apply(tokens), apply(tokens.astype(np.int32)))


def test_unknown_lengths_beyond_the_padding_count_as_its_end():
    model = Recurrent(GRU, 5, bidirectional=True)
    variables = weights(model)
    long = compiled(model)(variables, X, np.array([9, 6, 7]))
    assert_close(long, compiled(model)(variables, X), 1e-6)


def test_seeds_as_an_axis_equal_one_by_one():
    model = Recurrent(LSTM, 5, layers=2, bidirectional=True)
    variables = jax.tree.map(lambda leaf: np.stack([leaf, -leaf, leaf[::-1]]), weights(model))
    xs = draw(3, *X.shape)
    gradient = jax.value_and_grad(lambda v, x: total(model, v, x, LENGTHS), has_aux=True)
    together, alone = jit(jax.vmap(gradient))(variables, xs), jit(gradient)
    for seed in range(3):
        member = jax.tree.map(lambda leaf, i=seed: leaf[i], (variables, xs))
        assert_close(jax.tree.map(lambda leaf, i=seed: leaf[i], together), alone(*member))


def test_rows_split_over_devices_give_the_same():
    model, x = Recurrent(LSTM, 5, layers=2), draw(8, 6, 4)
    lengths = np.array([6, 5, 4, 3, 2, 1, 6, 6], np.int32)
    variables, mesh = weights(model), devices.data_mesh()
    gradient = jit(jax.value_and_grad(lambda v, x, n: total(model, v, x, n), has_aux=True))
    rows = NamedSharding(mesh, PartitionSpec(devices.DATA))
    split = gradient(devices.replicated(variables, mesh), jax.device_put(x, rows), jax.device_put(lengths, rows))
    assert_close(split, gradient(variables, x, lengths))


def test_dropout_acts_between_layers_in_training_only():
    model = Recurrent(VANILLA, 32, layers=2, dropout=0.5)
    variables = weights(model)
    train = jit(lambda v, key: model.apply(v, X, train=True, rngs={"dropout": key}))
    (one, (lower, _)), (other, (lower_too, _)) = (train(variables, jax.random.key(seed)) for seed in (0, 1))
    assert (one != other).any()
    np.testing.assert_array_equal(lower[0], lower_too[0])  # the first layer's own state
    assert (one != 0).all()  # nothing is dropped after the last
    never = jit(lambda v: model.clone(dropout=0.0).apply(v, X, train=True))(variables)
    assert_close(never, compiled(model)(variables, X), 1e-6)


def test_the_classifier_reads_the_last_valid_state_of_both_directions():
    model = SequenceClassifier(7, classes=3, embedding=4, hidden=5, layers=2, cell=GRU, bidirectional=True)
    tokens = np.random.default_rng(0).integers(0, 7, (3, 6), np.int32)
    variables = drawn(model, tokens, LENGTHS, train=False)
    params = variables["params"]
    recurrent = Recurrent(GRU, 5, layers=2, bidirectional=True)
    embedded = params["Embed_0"]["embedding"][tokens]
    y, _ = compiled(recurrent)({"params": params["Recurrent_0"]}, embedded, LENGTHS)
    ends = np.concatenate([y[np.arange(3), LENGTHS - 1, :5], y[:, 0, 5:]], -1)
    expected = ends @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    assert_close(compiled(model)(variables, tokens, LENGTHS), expected, 1e-6)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_tagger_is_a_linear_layer_on_every_valid_output(bidirectional):
    model = SequenceTagger(2, hidden=5, layers=2, cell=GRU, bidirectional=bidirectional)
    variables = drawn(model, X, LENGTHS, train=False)
    params = variables["params"]
    carry = carry_of(Recurrent(GRU, 5, layers=2, bidirectional=bidirectional))
    outputs, last = compiled(model)(variables, X, LENGTHS, carry)
    recurrent = compiled(Recurrent(GRU, 5, layers=2, bidirectional=bidirectional))
    y, expected = recurrent({"params": params["Recurrent_0"]}, X, LENGTHS, carry)
    assert_close(outputs, y @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"], 1e-6)
    assert_close(last, expected, 1e-6)


def test_the_language_model_sees_the_past_alone_and_carries_it():
    model = CharLM(7, hidden=5, layers=2)
    tokens = np.random.default_rng(0).integers(0, 7, (2, 6), np.int32)
    variables, apply = drawn(model, tokens, train=False), compiled(model)
    logits, last = apply(variables, tokens)
    changed = tokens.copy()
    changed[:, 3] = (changed[:, 3] + 1) % 7
    differs = (apply(variables, changed)[0] != logits).any((0, 2))
    np.testing.assert_array_equal(differs, [False, False, False, True, True, True])
    first, carry = apply(variables, tokens[:, :3], jax.tree.map(np.asarray, model.initial_carry(2)))
    second, carry = apply(variables, tokens[:, 3:], carry)
    assert_close((np.concatenate([first, second], 1), carry), (logits, last), 1e-6)


@pytest.mark.parametrize(("bias", "kept"), [(-1e4, 0.0), (0.0, 0.5), (1e4, 1.0)])
def test_the_forget_bias_says_how_much_of_the_state_is_kept(bias, kept):
    model = Recurrent(LSTM, 5, bidirectional=True)
    zeros = jax.tree.map(np.zeros_like, weights(model))
    variables = jax.device_get(rnn.with_forget_bias(zeros, bias))
    carry = carry_of(model)
    _, last = compiled(model)(variables, X[:, :1], None, carry)
    for (_, before), (_, after) in zip(carry, last, strict=True):
        np.testing.assert_allclose(after, kept * before, atol=1e-6)  # every other gate and weight is zero
    changed = sum(int((a != b).sum()) for a, b in zip(*map(jax.tree.leaves, (variables, zeros)), strict=True))
    assert changed == (2 * 5 if bias else 0)


def test_the_forget_bias_of_a_stack_of_seeds():
    """As many seeds as gates, so that a cut along the wrong axis would fit."""
    variables = jax.tree.map(lambda leaf: np.stack([leaf] * 4), weights(Recurrent(LSTM, 5, layers=2)))
    found = jax.device_get(rnn.with_forget_bias(variables, 3.0))
    one = jax.device_get(rnn.with_forget_bias(jax.tree.map(lambda leaf: leaf[2], variables), 3.0))
    jax.tree.map(lambda stack, leaf: np.testing.assert_array_equal(stack[2], leaf), found, one)
    bias = found["params"]["forward_1"]["input"]["bias"]
    np.testing.assert_array_equal(bias[:, 5:10], 3)
    np.testing.assert_array_equal(bias[:, :5], variables["params"]["forward_1"]["input"]["bias"][:, :5])


@pytest.mark.parametrize(
    "model",
    [Recurrent(GRU, 5), Recurrent(VANILLA, 4), Recurrent(GRU, 1), MLP((8,)), nn.Dense(8)],
    ids=["GRU", "VANILLA", "GRU of one unit", "MLP", "Dense"],
)
def test_a_network_without_a_forget_gate_is_refused(model):
    settings = {} if isinstance(model, nn.Dense) else {"train": False}
    with pytest.raises(InputError, match=r"with_forget_bias: none of .* is of an LSTM layer, expected input/bias"):
        rnn.with_forget_bias(drawn(model, X, **settings), 1.0)


def test_a_dense_layer_called_input_is_no_lstm():
    layer = {"kernel": np.zeros((3, 8)), "bias": np.zeros(8)}
    for params in ({"input": layer}, {"input": layer, "kernel": np.zeros((4, 4))}):
        with pytest.raises(InputError, match="with_forget_bias: none of params/input/bias, params/input/kernel"):
            rnn.with_forget_bias({"params": params}, 1.0)


def test_variables_without_arrays_have_no_forget_gate():
    with pytest.raises(InputError, match="with_forget_bias: the variables hold no arrays, expected input/bias"):
        rnn.with_forget_bias({}, 1.0)


def test_of_a_network_with_an_lstm_nothing_else_is_changed():
    tokens = np.zeros((3, 4), np.int32)
    before = drawn(SequenceClassifier(7, classes=3, embedding=4, hidden=5), tokens, train=False)
    after = rnn.with_forget_bias(before, 9.0)
    changed = jax.tree.map(lambda a, b: int((a != b).sum()), after, before)
    assert sum(jax.tree.leaves(changed)) == changed["params"]["Recurrent_0"]["forward_0"]["input"]["bias"] == 5


def test_parameter_counts():
    def count(cell):
        return sum(leaf.size for leaf in jax.tree.leaves(shapes(Recurrent(cell, 5), X, train=False)))

    assert count(VANILLA) == (4 + 5 + 1) * 5
    assert count(LSTM) == 4 * (4 + 5 + 1) * 5
    assert count(GRU) == 3 * (4 + 5 + 2) * 5


def test_all_weights_start_uniform_below_one_over_the_root_of_the_units():
    params = jit(lambda: Recurrent(GRU, 25).init(jax.random.key(0), X, train=False))()["params"]
    for leaf in jax.tree.leaves(params):  # 75 numbers or more each
        assert 0.9 / 5 < leaf.max() <= 1 / 5
        assert -1 / 5 <= leaf.min() < -0.9 / 5
        assert abs(leaf.std() * 5 - 3**-0.5) < 0.1


def torch_twin(torch, cell, params, layers, bidirectional):
    """torch.nn's layers with our weights: [gates H, D] each, our single bias of RNN and LSTM as their first."""
    kind = {VANILLA: torch.nn.RNN, LSTM: torch.nn.LSTM, GRU: torch.nn.GRU}[cell]
    twin = kind(4, 5, layers, batch_first=True, bidirectional=bidirectional)
    with torch.no_grad():
        for layer in range(layers):
            for side, suffix in (("forward", ""), ("backward", "_reverse"))[: 1 + bidirectional]:
                ours = params[f"{side}_{layer}"]
                bias = ours.get("bias", np.zeros_like(ours["input"]["bias"]))
                pairs = {"weight_ih": ours["input"]["kernel"].T, "weight_hh": ours["kernel"].T}
                pairs |= {"bias_ih": ours["input"]["bias"], "bias_hh": bias}
                for name, value in pairs.items():
                    getattr(twin, f"{name}_l{layer}{suffix}").copy_(torch.tensor(np.asarray(value)))
    return twin


@each_cell
@pytest.mark.parametrize("bidirectional", [False, True])
def test_it_computes_what_torch_computes(cell, bidirectional):
    torch = pytest.importorskip("torch", reason="PyTorch, to compare with, is not installed")
    model = Recurrent(cell, 5, layers=2, bidirectional=bidirectional)
    variables, carry = weights(model), carry_of(model)
    cotangent = draw(3, 6, 5 * (1 + bidirectional), seed=8)

    def loss(variables, x, carry):
        y, last = model.apply(variables, x, LENGTHS, carry, train=False)
        return (y * cotangent).sum() + sum((leaf**2).sum() for leaf in jax.tree.leaves(last)), (y, last)

    gradients, (y, last) = jit(jax.grad(loss, (0, 1, 2), has_aux=True))(variables, X, carry)

    twin = torch_twin(torch, cell, variables["params"], 2, bidirectional)
    x = torch.tensor(X, requires_grad=True)
    stacked = [torch.tensor(np.stack(leaves), requires_grad=True) for leaves in zip(*carry, strict=True)]  # [L, B, H]
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor(LENGTHS), True, enforce_sorted=False)
    output, state = twin(packed, tuple(stacked) if cell is LSTM else stacked[0])
    state = state if cell is LSTM else (state,)
    theirs, _ = torch.nn.utils.rnn.pad_packed_sequence(output, batch_first=True)
    ((theirs * torch.tensor(cotangent)).sum() + sum((leaf**2).sum() for leaf in state)).backward()

    def stack(states):
        return [np.stack(leaves) for leaves in zip(*states, strict=True)]

    assert_close((y, stack(last)), (theirs.detach().numpy(), [leaf.detach().numpy() for leaf in state]))
    assert_close((gradients[1], stack(gradients[2])), (x.grad.numpy(), [leaf.grad.numpy() for leaf in stacked]))
    for layer in range(2):
        for side, suffix in (("forward", ""), ("backward", "_reverse"))[: 1 + bidirectional]:
            ours = gradients[0]["params"][f"{side}_{layer}"]
            pairs = {"weight_ih": ours["input"]["kernel"].T, "weight_hh": ours["kernel"].T}
            pairs |= {"bias_ih": ours["input"]["bias"]} | ({"bias_hh": ours["bias"]} if cell.bias else {})
            for name, value in pairs.items():
                assert_close(value, getattr(twin, f"{name}_l{layer}{suffix}").grad.numpy())


def test_a_kernel_that_is_split_over_devices_is_gathered_once_for_all_steps():
    mesh, steps, batch, hidden = devices.data_mesh(), 5, 16, 32
    split = lambda axis, *shape: jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))
    )
    kernel, x = split(0, hidden, 4 * hidden), split(1, steps, batch, 4 * hidden)

    def loss(kernel, x):
        zeros = jnp.zeros((batch, hidden))
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return recur(LSTM, kernel, None, x, (zeros, zeros), None)[0].sum()

    text = jax.jit(jax.grad(loss, (0, 1)), out_shardings=(kernel.sharding, x.sharding)).lower(kernel, x).compile()
    assert {each.times for each in hlo.read(text.as_text(), 8).collectives} == {1}
