"""experiments/text/char_transformer.py: nanoGPT's settings, every character counted once, texts by both ways."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax import optim
from dl_jax.core.errors import InputError
from dl_jax.core.evaluate import evaluator
from dl_jax.data import text
from dl_jax.harness.run import Run, Settings
from dl_jax.models.sequence.attention import TransformerLM

MODEL = TransformerLM(9, 8, width=8, layers=1, heads=2)
IDS = np.random.default_rng(0).integers(0, 9, 30).astype(np.uint8)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def char_transformer(load_experiment):
    return load_experiment("text/char_transformer")


@pytest.fixture(scope="module")
def params():
    small = jax.jit(lambda: MODEL.init(KEY, jnp.zeros((1, 1), jnp.int32), train=False)["params"])()
    return jax.tree.map(lambda leaf: 20 * leaf if leaf.ndim > 1 else leaf, small)  # so that texts are no mere chance


def test_every_character_is_predicted_once_from_its_window(char_transformer, params):
    nats = functools.partial(char_transformer.window_nats, MODEL)
    windows = char_transformer.held_out_windows(IDS, 8)  # 29 targets: three windows and five characters
    measure = evaluator(nats, windows, 3, KEY[None])  # two batches, the second with padding
    found = measure(jax.tree.map(lambda leaf: leaf[None], {"params": params}))["nats"]
    padded = np.stack([np.append(IDS, np.zeros(8, np.uint8))[start : start + 8] for start in range(0, 29, 8)])
    logits = np.asarray(jax.jit(lambda p: MODEL.apply({"params": p}, padded, train=False))(params), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.mean([log_p[i // 8, i % 8, IDS[i + 1]] for i in range(29)])
    np.testing.assert_allclose(found, [expected], rtol=1e-5)


def test_the_loss_is_the_mean_over_a_window(char_transformer, params):
    batch = text.random_windows(IDS, 3, 8, 0)(0)
    value, _ = jax.jit(lambda p: char_transformer.window_loss(MODEL, {"params": p}, batch, KEY))(params)
    whole = {**batch, "counted": np.ones((3, 8), np.float32), "mask": np.ones(3, np.float32)}
    nats = jax.jit(functools.partial(char_transformer.window_nats, MODEL))
    total, count = nats({"params": params}, whole, KEY)["nats"]
    assert count == 24
    np.testing.assert_allclose(value, total / count, rtol=1e-6)


def test_both_ways_write_the_same_texts(char_transformer, params):
    prompt = jnp.array([[1, 2], [3, 4], [1, 2]])
    written = {name: write(params, prompt, KEY) for name, write in char_transformer.writers(MODEL).items()}
    cached, anew = written.values()
    np.testing.assert_array_equal(cached, anew)
    assert cached.shape == (3, 6)
    assert len(set(map(tuple, cached.tolist()))) == 3  # also after the same prompt


def test_the_difference_of_the_cache_is_none_and_would_be_seen(char_transformer, params, monkeypatch):
    tokens = jnp.asarray(IDS[:16].reshape(2, 8), jnp.int32)
    difference = lambda: jax.jit(functools.partial(char_transformer.cache_difference, MODEL))(params, tokens)
    assert difference() < 1e-4
    step = char_transformer.cached_step

    def wrong(*given):
        logits, carry = step(*given)
        return jnp.where(carry.read[:, None] == 8, jnp.zeros_like(logits), logits), carry  # at the last place alone

    monkeypatch.setattr(char_transformer, "cached_step", wrong)
    whole = jax.jit(lambda p: jax.nn.log_softmax(MODEL.apply({"params": p}, tokens, train=False)))(params)
    expected = abs(np.asarray(whole)[:, -1] + np.log(9)).max()
    np.testing.assert_allclose(difference(), expected, rtol=1e-4)
    assert expected > 0.1


def test_it_is_the_setting_of_nanogpt(char_transformer):
    """0.80 million parameters, as it prints them: without positions, and with 65 characters instead of 256 bytes."""
    cfg = char_transformer.Config()
    model = TransformerLM(65, cfg.block, cfg.width, cfg.layers, cfg.heads)
    params = jax.eval_shape(lambda: model.init(KEY, jnp.zeros((1, 1), jnp.int32), train=False))["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params)) - params["places"].size
    assert count == 4 * 12 * 128**2 + 65 * 128 + 9 * 128
    decayed = char_transformer.matrices(params)
    kept = [path[-1].key for path, yes in jax.tree_util.tree_leaves_with_path(decayed) if not yes]
    assert kept == ["scale"] * 9
    rate = optim.warmup_cosine(cfg.learning_rate, cfg.steps, cfg.warmup, cfg.final_rate)
    np.testing.assert_allclose(
        [rate(0), rate(99), rate(100), rate(1050), rate(2000)],
        [1e-3 / 101, 0.1 / 101, 1e-3, 5.5e-4, 1e-4],
        rtol=1e-5,
    )


def test_a_block_without_room_for_a_text_is_refused(char_transformer):
    cfg = dataclasses.replace(char_transformer.PRESETS["smoke"], block=1)
    with pytest.raises(InputError, match="--block is 1, expected 2 or more"):
        char_transformer.main(cfg, Run(settings=Settings(seeds=(0,))))
