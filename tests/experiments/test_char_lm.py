"""The carried state of a language model: what crosses a window, what does not, and what is sharded and saved."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from dl_jax.core.fit import fit
from dl_jax.core.step import init_state, make_step, per_seed
from dl_jax.data import text
from dl_jax.harness.run import Preempted, Run, Settings
from dl_jax.models.sequence.rnn import GRU, LSTM, CharLM

IDS = np.random.default_rng(0).integers(0, 9, 161).astype(np.uint8)
MODEL = CharLM(9, 6, cell=LSTM)
TX = optax.sgd(0.5)
SEEDS, STEPS = (3, 4), 11
KEYS = jax.random.split(jax.random.key(0), 2)


@pytest.fixture(scope="module")
def char_lm(load_experiment):
    return load_experiment("text/char_lm")


@pytest.fixture(scope="module")
def step(char_lm):
    return make_step(lambda variables, batch, key: char_lm.window_loss(MODEL, variables, batch, key), TX)


@pytest.fixture(scope="module")
def training(char_lm, step):
    """run -> the states of two seeds after `STEPS` steps on eight devices."""
    both = per_seed(step)

    def train(run=None):
        states, stream = char_lm.begin(MODEL, TX, 8, KEYS, KEYS), text.windows(IDS, 8, 5, SEEDS)
        return fit(both, states, stream, steps=STEPS, run=run, carried=("carry",))

    return train


@pytest.fixture(scope="module")
def trained(training):
    return training()


@pytest.fixture(scope="module")
def params(char_lm):
    return jax.tree.map(lambda leaf: leaf[0], char_lm.begin(MODEL, TX, 1, KEYS, KEYS).params)


@pytest.mark.parametrize("model", [MODEL, CharLM(9, 4, layers=2, cell=GRU)], ids=["LSTM", "GRU"])
def test_a_text_read_in_windows_is_the_text_read_at_once(char_lm, model):
    params = jax.tree.map(lambda leaf: leaf[0], char_lm.begin(model, TX, 1, KEYS, KEYS).params)
    windows = text.reading(IDS, 13)  # which does not divide the 160 targets
    nats = np.asarray(jax.jit(lambda p, w: char_lm.read(model, p, w))(params, windows)).sum()
    whole = text.reading(IDS, 160)
    logits, _ = jax.jit(lambda p: model.apply({"params": p}, whole["token"][0], train=False))(params)
    expected = -jax.nn.log_softmax(logits)[0, np.arange(160), IDS[1:]].sum()
    np.testing.assert_allclose(nats, expected, rtol=1e-5)


def test_a_window_that_is_a_first_one_starts_anew_row_by_row(char_lm, params):
    token = jnp.array([[1, 2], [1, 2]])
    window = {"token": token, "target": token, "first": jnp.array([True, False])}
    predict = jax.jit(lambda carry: char_lm.predict(MODEL, params, carry, window, train=False))
    nats, after = predict(jax.tree.map(lambda leaf: leaf + 0.5, MODEL.initial_carry(2)))
    empty, _ = predict(MODEL.initial_carry(2))
    np.testing.assert_array_equal(nats[0], empty[0])
    assert np.abs(nats[1] - empty[1]).min() > 1e-4
    assert np.abs(after[0][0][0] - after[0][0][1]).max() > 1e-4


def test_no_gradient_crosses_a_window(char_lm, step, params):
    """The gradient of a second step takes the carry of the first window as constant: it does not flow through both."""
    first, second = (jax.tree.map(jnp.asarray, text.windows(IDS, 4, 5, seeds=0)(i)) for i in (1, 2))
    state, move = (
        init_state(KEYS[0], {"params": params, "carry": MODEL.initial_carry(4)}, TX),
        jax.jit(step),
    )
    state = move(state, first)[0]._replace(params=params)
    found = jax.tree.map(lambda before, after: (before - after) / 0.5, params, move(state, second)[0].params)

    def nats(params, held):
        _, carry = char_lm.predict(MODEL, params, MODEL.initial_carry(4), first, train=False)
        carry = jax.tree.map(lambda leaf: jnp.where(held, jax.lax.stop_gradient(leaf), leaf), carry)
        return char_lm.predict(MODEL, params, carry, second, train=False)[0].mean()

    held, through = (jax.jit(jax.grad(nats))(params, held) for held in (True, False))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(held), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), found, through)
    assert max(jax.tree.leaves(differences)) > 1e-4


def test_eight_devices_share_the_seeds_and_rows_of_the_carry(trained):
    assert jax.device_count() == 8
    carry = jax.tree.leaves(trained.extra)[0]  # [S, B, H]
    assert {shard.data.shape for shard in carry.addressable_shards} == {(1, 2, 6)}


def test_two_seeds_on_eight_devices_train_as_each_alone_on_one(char_lm, step, trained):
    move = jax.jit(step)
    for i, seed in enumerate(SEEDS):
        stream, state = text.windows(IDS, 8, 5, seed), char_lm.begin(MODEL, TX, 8, KEYS, KEYS)
        state = jax.tree.map(lambda leaf, i=i: leaf[i], state)
        for at in range(STEPS):
            state, _ = move(state, stream(at))
        together = jax.tree.map(lambda leaf, i=i: leaf[i], (trained.params, trained.extra))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), together, (state.params, state.extra))


def test_a_resumed_run_goes_on_with_its_carry_bit_by_bit(training, trained, tmp_path):
    settings = Settings(preempted=lambda step: step == 5)
    with pytest.raises(Preempted), contextlib.closing(Run(epath.Path(tmp_path), settings)) as run:
        training(run)
    with contextlib.closing(Run(epath.Path(tmp_path))) as run:
        resumed = training(run)
    jax.tree.map(np.testing.assert_array_equal, (trained.params, trained.extra), (resumed.params, resumed.extra))


def test_a_text_by_each_way_of_choosing(char_lm):
    model = CharLM(text.VOCABULARY, 4)
    params = jax.jit(lambda: model.init(KEYS[0], jnp.zeros((1, 1), jnp.int32), train=False)["params"])()
    written = char_lm.samples(model, params, 40, KEYS[1])
    assert list(written) == list(char_lm.SAMPLERS)
    assert len(set(written.values())) == len(written) == 4
