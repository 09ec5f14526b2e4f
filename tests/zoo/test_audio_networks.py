"""Networks of audio against their definitions, and without any effect of what lies behind a recording."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import batch_norm
from quick import drawn, jit, shapes

from dl_jax.core.errors import InputError
from dl_jax.models.sequence.mel_cnn import MelCNN
from dl_jax.models.sequence.tdnn import TDNN
from dl_jax.models.sequence.wave_cnn import WaveCNN

RNG = np.random.default_rng(0)
LENGTHS = np.array([22, 1, 13], np.int32)
WAVE, FRAMES = RNG.standard_normal((3, 22), np.float32), RNG.standard_normal((3, 22, 5), np.float32)
WAVE_NET, MEL_NET = WaveCNN(3, (4, 6), taps=5, stride=2, pool=2), MelCNN(3, (4, 6))
TDNN_NET = TDNN(3, hidden=4, layers=((3, 1), (2, 3)))
NETS = {"wave": (WAVE_NET, WAVE), "mel": (MEL_NET, FRAMES), "tdnn": (TDNN_NET, FRAMES)}
nets = pytest.mark.parametrize("name", NETS)


def variables_of(name):
    variables = drawn(*NETS[name], train=False)
    stats = jax.tree.map(lambda leaf: abs(leaf) + np.float32(0.5), variables.get("batch_stats", {}))
    return {**variables, "batch_stats": stats}


def convolved(x, kernel, stride, dilation, before):
    """A convolution of x [T, ..., C] along its first axis, padded with zeros to ceil(T / stride) steps."""
    taps = len(kernel)
    padded = np.pad(x, [(before, (taps - 1) * dilation)] + [(0, 0)] * (x.ndim - 1))
    return np.stack(
        [sum(padded[t + k * dilation] @ kernel[k] for k in range(taps)) for t in range(0, len(x), stride)], 0
    )


def double(variables):
    tree = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    return tree["params"], tree["batch_stats"]


def wave_in_numpy(variables, x):
    params, stats = double(variables)
    x = x[:, None].astype(np.float64)
    for i, (stride, before) in enumerate(((2, 2), (1, 1))):
        x = convolved(x, params[f"conv_{i}"]["kernel"], stride, 1, before)
        x = np.maximum(batch_norm(x, params[f"norm_{i}"], stats[f"norm_{i}"]), 0)
        x = np.stack([x[t : t + 2].max(0) for t in range(0, len(x), 2)])
    return x.mean(0) @ params["output"]["kernel"] + params["output"]["bias"]


def mel_in_numpy(variables, x):
    params, stats = double(variables)
    x = x[..., None].astype(np.float64)
    for i in range(2):
        kernel = params[f"conv_{i}"]["kernel"]
        padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
        x = sum(padded[a : a + len(x), b : b + x.shape[1]] @ kernel[a, b] for a in range(3) for b in range(3))
        x = np.maximum(batch_norm(x, params[f"norm_{i}"], stats[f"norm_{i}"]), 0)
        x = np.stack([x[t : t + 2].max(0) for t in range(0, len(x), 2)])
        x = np.stack([x[:, f : f + 2].max(1) for f in range(0, x.shape[1], 2)], 1)
    return x.mean(0).ravel() @ params["output"]["kernel"] + params["output"]["bias"]


def tdnn_in_numpy(variables, x):
    params, stats = double(variables)
    for i, (dilation, before) in enumerate(((1, 1), (3, 1))):
        x = convolved(x, params[f"conv_{i}"]["kernel"], 1, dilation, before)
        x = np.maximum(batch_norm(x, params[f"norm_{i}"], stats[f"norm_{i}"]), 0)
    return x @ params["output"]["kernel"] + params["output"]["bias"]


IN_NUMPY = {"wave": wave_in_numpy, "mel": mel_in_numpy, "tdnn": tdnn_in_numpy}


@nets
def test_each_recording_is_its_definition_whatever_lies_behind_it(name):
    """Recordings of one sample or frame and of odd lengths, behind which there is NaN."""
    model, inputs = NETS[name]
    variables = variables_of(name)
    behind = np.arange(22) >= LENGTHS[:, None]
    spoilt = np.where(behind.reshape(behind.shape + (1,) * (inputs.ndim - 2)), np.nan, inputs)
    found = jit(lambda: model.apply(variables, spoilt, LENGTHS, train=False))()
    for row, length in enumerate(LENGTHS):
        expected = IN_NUMPY[name](variables, inputs[row, :length])
        given = found[row, :length] if name == "tdnn" else found[row]
        np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-4)


@nets
def test_in_training_neither_statistics_nor_gradients_see_the_padding(name):
    model, inputs = NETS[name]
    variables = variables_of(name)

    def loss(params, x, lengths):
        given = {**variables, "params": params}
        logits, new = model.apply(given, x, lengths, train=True, mutable=["batch_stats"])
        valid = jnp.arange(x.shape[1]) < lengths[:, None]
        parts = jnp.where(valid[..., None], jnp.sin(logits), 0) if name == "tdnn" else jnp.sin(logits)
        return parts.sum(), new

    gradient = jit(jax.grad(loss, has_aux=True))
    spoilt = np.where((np.arange(22) >= LENGTHS[:, None]).reshape(3, 22, *[1] * (inputs.ndim - 2)), 9, inputs)
    longer = np.pad(spoilt, ((0, 0), (0, 9), *[(0, 0)] * (inputs.ndim - 2)), constant_values=-7)
    for one, other in zip(
        jax.tree.leaves(gradient(variables["params"], inputs, LENGTHS)),
        jax.tree.leaves(gradient(variables["params"], longer.astype(np.float32), LENGTHS)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_batch_statistics_are_those_of_valid_frames():
    variables = variables_of("tdnn")
    _, new = jit(lambda: TDNN_NET.apply(variables, FRAMES, LENGTHS, train=True, mutable=["batch_stats"]))()
    params, stats = double(variables)
    kernel = params["conv_0"]["kernel"]
    rows = [convolved(x[:n], kernel, 1, 1, 1) for x, n in zip(FRAMES.astype(np.float64), LENGTHS, strict=True)]
    values = np.concatenate(rows)
    found = new["batch_stats"]["norm_0"]
    np.testing.assert_allclose(found["mean"], 0.9 * stats["norm_0"]["mean"] + 0.1 * values.mean(0), rtol=1e-4)
    np.testing.assert_allclose(found["var"], 0.9 * stats["norm_0"]["var"] + 0.1 * values.var(0), rtol=1e-4)


def test_a_frame_depends_on_its_receptive_field():
    variables = variables_of("tdnn")
    one = jit(lambda x: TDNN_NET.apply(variables, x, train=False))
    moved = FRAMES.copy()
    moved[:, 10] += 5
    changed = np.flatnonzero((one(FRAMES) != one(moved)).any((0, 2)))
    assert len(changed) <= changed.max() - changed.min() + 1 == TDNN_NET.receptive_field == 6
    plain = TDNN_NET.clone(normalise=False)
    assert "batch_stats" not in shapes(plain, FRAMES, train=False)


@pytest.mark.parametrize(
    ("model", "inputs", "lengths", "message"),
    [
        (WAVE_NET, FRAMES, None, r"waves of shape \(3, 22, 5\), expected \[B, N\]"),
        (WAVE_NET, WAVE[:, :0], None, r"waves of shape \(3, 0\)"),
        (WAVE_NET, WAVE[:0], None, r"waves of shape \(0, 22\)"),
        (WAVE_NET, WAVE, LENGTHS + 1, "length 23, expected 1 to 22"),
        (WAVE_NET, WAVE, LENGTHS - 1, "length 0, expected 1 to 22"),
        (WAVE_NET.clone(maps=()), WAVE, None, "the number of convolutions is 0"),
        (WAVE_NET.clone(stride=0), WAVE, None, "stride is 0"),
        (WAVE_NET.clone(dropout=1.0), WAVE, None, "dropout is 1.0"),
        (MEL_NET, WAVE, None, r"frames of shape \(3, 22\), expected \[B, T, D\]"),
        (MEL_NET, FRAMES[:0], None, r"frames of shape \(0, 22, 5\)"),
        (MEL_NET, FRAMES, LENGTHS[:2], r"lengths are int32 \(2,\)"),
        (MEL_NET.clone(maps=(2, 0)), FRAMES, None, "the least maps is 0"),
        (TDNN_NET, WAVE, None, r"frames of shape \(3, 22\), expected \[B, T, D\]"),
        (TDNN_NET, FRAMES[:0], None, r"frames of shape \(0, 22, 5\)"),
        (TDNN_NET, FRAMES, LENGTHS * 1.0, "lengths are float32"),
        (TDNN_NET.clone(layers=()), FRAMES, None, "the number of layers is 0"),
        (TDNN_NET.clone(layers=((3, 0),)), FRAMES, None, "the least of taps and dilations is 0"),
    ],
)
def test_what_cannot_be_is_refused(model, inputs, lengths, message):
    with pytest.raises(InputError, match=message):
        shapes(model, inputs, lengths, train=False)


@pytest.mark.parametrize("name", ["mel", "tdnn"])
def test_frames_with_other_bins_than_the_parameters_are_refused(name):
    model, frames = NETS[name]
    with pytest.raises(InputError, match=r"\d+ features in .*, expected \d+ as in the parameters of"):
        model.apply(variables_of(name), np.concatenate([frames] * 2, -1), train=False)
