"""The carried state of a language model: what crosses a window, what does not, and what is sharded and saved."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from dl_jax import data
from dl_jax.core.errors import InputError
from dl_jax.core.fit import fit
from dl_jax.core.step import init_state, make_step, per_seed
from dl_jax.data import text
from dl_jax.harness.run import Preempted, Run, Settings
from dl_jax.models.sequence.rnn import GRU, LSTM, CharLM


@pytest.fixture(scope="module")
def char_lm(load_experiment):
    return load_experiment("text/char_lm")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"sample_length": 0}, "sample_length is 0"), ({"clip": 0.0}, "clip is 0"), ({"hidden": 0}, "hidden is 0")],
)
def test_what_cannot_work_is_refused_before_any_training(char_lm, change, message, monkeypatch):
    monkeypatch.setattr(char_lm, "fit", None)  # a step would fail
    with pytest.raises(InputError, match=message):
        char_lm.main(dataclasses.replace(char_lm.PRESETS["smoke"], **change), Run())


IDS = np.random.default_rng(0).integers(0, 9, 161).astype(np.uint8)
MODEL = CharLM(9, 6, layers=2, cell=LSTM)
TX = optax.sgd(0.5)


def params(model=MODEL):
    return jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32), train=False)["params"])()


@pytest.mark.parametrize("cell", [LSTM, GRU])
def test_a_text_read_in_windows_is_the_text_read_at_once(char_lm, cell):
    model = CharLM(9, 6, layers=2, cell=cell)
    weights = params(model)
    windows = text.reading(IDS, 13)  # which does not divide the 160 targets
    nats = np.asarray(jax.jit(lambda p, w: char_lm.read(model, p, w))(weights, windows)).sum()
    whole = text.reading(IDS, 160)
    logits, _ = model.apply({"params": weights}, whole["token"][0], train=False)
    expected = -jax.nn.log_softmax(logits)[0, np.arange(160), IDS[1:]].sum()
    np.testing.assert_allclose(nats, expected, rtol=1e-5)


def test_a_window_that_is_a_first_one_starts_anew_row_by_row(char_lm):
    token = jnp.array([[1, 2], [1, 2]])
    window = {"token": token, "target": token, "first": jnp.array([True, False])}
    carry = jax.tree.map(lambda leaf: leaf + 0.5, MODEL.initial_carry(2))
    nats, after = char_lm.predict(MODEL, params(), carry, window, train=False)
    empty, _ = char_lm.predict(MODEL, params(), MODEL.initial_carry(2), window, train=False)
    np.testing.assert_array_equal(nats[0], empty[0])
    assert np.abs(nats[1] - empty[1]).min() > 1e-4
    assert np.abs(after[0][0][0] - after[0][0][1]).max() > 1e-4


def test_no_gradient_crosses_a_window(char_lm):
    """A second step's gradient is that of two windows with the first one's carry held fast, not that through both."""
    stream = text.windows(IDS, 4, 5, seed=0)
    windows = [jax.tree.map(jnp.asarray, stream(step)) for step in (1, 2)]
    step = make_step(lambda v, b, k: char_lm.window_loss(MODEL, v, b, k), optax.sgd(1.0))
    state = init_state(jax.random.key(0), {"params": params(), "carry": MODEL.initial_carry(4)}, optax.sgd(1.0))
    state = step(state, windows[0])[0]._replace(params=params())
    found = jax.tree.map(lambda before, after: before - after, params(), step(state, windows[1])[0].params)

    def second(params, held):
        _, carry = char_lm.predict(MODEL, params, MODEL.initial_carry(4), windows[0], train=False)
        carry = jax.lax.stop_gradient(carry) if held else carry
        return char_lm.predict(MODEL, params, carry, windows[1], train=False)[0].mean()

    held, through = (jax.grad(second)(params(), held) for held in (True, False))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(held), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), found, through)
    assert max(jax.tree.leaves(differences)) > 1e-4


def training(char_lm, steps, run=None, devices=None, seeds=(3, 4)):
    mesh = devices.data_mesh(devices)
    rows = devices.process_rows(8, mesh)
    batches = devices.placed(data.per_seed([text.windows(IDS, 8, 5, seed, rows) for seed in seeds]), mesh, axis=1)
    keys = jnp.stack([jax.random.split(jax.random.key(seed)) for seed in seeds])
    states = char_lm.begin(MODEL, TX, 8, keys)
    states = devices.replicated(states, mesh)._replace(extra=devices.place(states.extra, mesh, axis=1))
    step = per_seed(make_step(lambda v, b, k: char_lm.window_loss(MODEL, v, b, k), TX))
    return fit(step, states, batches, steps=steps, run=run)


def test_eight_devices_train_as_one_and_share_the_rows_of_the_carry(char_lm):
    one = training(char_lm, 9, devices=jax.devices()[:1])
    eight = training(char_lm, 9, devices=jax.devices()[:8])
    for a, b in zip(
        jax.tree.leaves((one.params, one.extra)), jax.tree.leaves((eight.params, eight.extra)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)
    carry = jax.tree.leaves(eight.extra)[0]  # [S, B, H]
    assert {shard.data.shape for shard in carry.addressable_shards} == {(2, 1, 6)}


def test_a_resumed_run_goes_on_with_its_carry_bit_by_bit(char_lm, tmp_path):
    whole = training(char_lm, 11)
    run = Run(epath.Path(tmp_path), Settings(preempted=lambda step: step == 5))
    with pytest.raises(Preempted):
        training(char_lm, 11, run)
    run.close()
    run = Run(epath.Path(tmp_path))
    resumed = training(char_lm, 11, run)
    run.close()
    jax.tree.map(np.testing.assert_array_equal, (whole.params, whole.extra), (resumed.params, resumed.extra))


def test_a_lane_is_a_run_of_its_seed(char_lm):
    both, second = training(char_lm, 6), training(char_lm, 6, seeds=(4,))
    for a, b in zip(jax.tree.leaves(both.params), jax.tree.leaves(second.params), strict=True):
        np.testing.assert_allclose(a[1], b[0], atol=1e-5)


def test_the_run_keeps_a_text_by_each_way_of_choosing(char_lm, tmp_path, capsys):
    cfg = dataclasses.replace(char_lm.PRESETS["smoke"], steps=2)
    run = Run(epath.Path(tmp_path), Settings(seeds=(0,), cache_dir=str(tmp_path / "cache")))
    char_lm.main(cfg, run)
    run.close()
    kept = (tmp_path / "samples.txt").read_text()
    assert kept.count("=== ") == len(char_lm.SAMPLERS) == 4
    assert "a nucleus of 0.9" in capsys.readouterr().out
