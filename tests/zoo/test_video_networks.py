"""Networks for videos against loops over the equations in NumPy: classifiers, and those that continue a video."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import conv, dense, max_pool, relu
from quick import drawn, jit, shapes

from dl_jax.core.errors import InputError
from dl_jax.models.vision.conv_lstm import FCLSTM, ConvLSTM
from dl_jax.models.vision.video import FrameBag, FrameGRU

VIDEO = np.random.default_rng(0).random((2, 4, 8, 4, 1), np.float32)
NETS = {
    "FrameGRU": FrameGRU(3, maps=(2, 3), features=5, hidden=4),
    "FrameBag": FrameBag(3, maps=(2, 3), features=5, hidden=4),
    "ConvLSTM": ConvLSTM((3, 4), kernel=3, patch=2, horizon=3),
    "FCLSTM": FCLSTM((3, 4), horizon=3),
}
each_net = pytest.mark.parametrize("name", NETS)


@functools.cache
def network(name):
    """Drawn variables, and the network as a compiled function of variables and videos."""
    model = NETS[name]
    return drawn(model, VIDEO, train=False, spread=0.6), jit(lambda v, x: model.apply(v, x, train=False))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def features(params, video):  # [B, T, H, W, C] -> [B, T, features]
    x = np.float64(video).reshape(-1, *video.shape[2:])
    for i in range(2):
        x = max_pool(relu(conv(x, params[f"conv_{i}"])), 2, 2, 0)
    return relu(dense(x.reshape(len(x), -1), params["dense"])).reshape(*video.shape[:2], -1)


def gru(params, video):
    x, layer = features(params["frames"], video), params["recurrent"]["forward_0"]
    h = np.zeros((len(x), 4))
    for t in range(x.shape[1]):
        xr, xz, xn = np.split(dense(x[:, t], layer["input"]), 3, -1)
        hr, hz, hn = np.split(h @ layer["kernel"] + layer["bias"], 3, -1)
        r, z = sigmoid(xr + hr), sigmoid(xz + hz)
        h = (1 - z) * np.tanh(xn + r * hn) + z * h
    return dense(h, params["logits"])


def bag(params, video):
    x = features(params["frames"], video).mean(1)
    return dense(relu(dense(x, params["hidden_layer"])), params["logits"])


def conv_lstm_step(params, x, h, c):
    """Equation 3 of Shi et al. 2015, gate by gate, at one step; x is None for a layer without an input."""
    maps = h.shape[-1]

    def summed(gate):
        part = slice(gate * maps, (gate + 1) * maps)
        inner = conv(h, {"kernel": params["kernel"][..., part]}) + params["bias"][part]
        return inner if x is None else inner + conv(x, {"kernel": params["input"]["kernel"][..., part]})

    i = sigmoid(summed(0) + params["peephole_i"] * c)
    f = sigmoid(summed(1) + params["peephole_f"] * c)
    c = f * c + i * np.tanh(summed(2))
    o = sigmoid(summed(3) + params["peephole_o"] * c)
    return o * np.tanh(c), c


def forecast(params, x, horizon):  # [B, T, H, W, C] -> the outputs of both layers in each step
    states = [(np.zeros((*x.shape[:1], *x.shape[2:4], maps)),) * 2 for maps in (3, 4)]
    for t in range(x.shape[1]):
        below = np.float64(x[:, t])
        for i, state in enumerate(states):
            states[i] = conv_lstm_step(params[f"encoder_{i}"], below, *state)
            below = states[i][0]
    steps = []
    for _ in range(horizon):
        below = None
        for i, state in enumerate(states):
            states[i] = conv_lstm_step(params[f"forecaster_{i}"], below, *state)
            below = states[i][0]
        steps.append([h for h, _ in states])
    return steps


def conv_lstm(params, video):
    """Pixel (i, j) of a patch of 2 x 2 is the channel 2 i + j of its place."""
    taps = [(i, j) for i in (0, 1) for j in (0, 1)]
    x = np.concatenate([video[:, :, i::2, j::2] for i, j in taps], -1)
    out = np.zeros((len(video), 3, *video.shape[2:]))
    for k, layers in enumerate(forecast(params["layers"], x, 3)):
        y = dense(np.concatenate(layers, -1), params["logits"])
        for channel, (i, j) in enumerate(taps):
            out[:, k, i::2, j::2, 0] = y[..., channel]
    return out


def fc_lstm(params, video):
    x = video.reshape(*video.shape[:2], 1, 1, -1)
    y = [dense(layers[-1], params["logits"]) for layers in forecast(params["layers"], x, 3)]
    return np.stack(y, 1).reshape(len(video), 3, *video.shape[2:])


@each_net
def test_against_a_loop_over_the_equations(name):
    variables, predict = network(name)
    expected = {"FrameGRU": gru, "FrameBag": bag, "ConvLSTM": conv_lstm, "FCLSTM": fc_lstm}[name]
    found = predict(variables, VIDEO)
    np.testing.assert_allclose(found, expected(variables["params"], VIDEO), rtol=1e-4, atol=1e-5)


@each_net
def test_one_frame_is_enough(name):
    variables, predict = network(name)
    expected = {"FrameGRU": gru, "FrameBag": bag, "ConvLSTM": conv_lstm, "FCLSTM": fc_lstm}[name]
    found = predict(variables, VIDEO[:, :1])
    np.testing.assert_allclose(found, expected(variables["params"], VIDEO[:, :1]), rtol=1e-4, atol=1e-5)


@each_net
def test_the_order_of_the_frames_has_no_effect_on_a_bag_alone(name):
    variables, predict = network(name)
    found, turned = predict(variables, VIDEO), predict(variables, VIDEO[:, ::-1])
    if name == "FrameBag":
        np.testing.assert_allclose(found, turned, rtol=1e-5)
    else:
        assert abs(found - turned).max() > 1e-3


def test_an_fc_lstm_is_a_conv_lstm_whose_features_are_at_one_place():
    """With one layer, as the logits of a ConvLSTM read all layers; a patch is then the whole frame."""
    ours, other = FCLSTM((3,), horizon=2), ConvLSTM((3,), kernel=1, patch=4, horizon=2)
    video = VIDEO[:, :, :4]
    variables = drawn(ours, video, train=False)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shapes(other, video, train=False))
    both = jit(lambda v: [model.apply(v, video, train=False) for model in (ours, other)])(variables)
    np.testing.assert_allclose(*both, rtol=1e-5)


def test_a_conv_lstm_moves_with_its_frames():
    """Far from the border, a digit that is moved by a patch is continued in the same way, moved by a patch."""
    model = ConvLSTM((3,), kernel=3, patch=2, horizon=1)
    video = np.zeros((2, 2, 20, 20, 1), np.float32)
    video[:, :, 8:10, 8:10] = VIDEO[:, :2, :2, :2]
    moved = np.roll(video, (2, -2), (2, 3))
    variables = drawn(model, video, train=False)
    found, other = jit(lambda v: [model.apply(v, x, train=False) for x in (video, moved)])(variables)
    np.testing.assert_allclose(
        np.roll(found, (2, -2), (2, 3))[..., 8:12, 6:10, :], other[..., 8:12, 6:10, :], atol=1e-6
    )


@each_net
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 8, 8, 1), r"takes videos \[B, T, H, W, C\], not an array of shape \(2, 8, 8, 1\)"),
        ((2, 0, 8, 4, 1), "videos of 0 frames, expected 1 or more for"),
    ],
)
def test_what_is_no_video_is_refused(name, shape, message):
    with pytest.raises(InputError, match=message):
        shapes(NETS[name], np.zeros(shape, np.float32), train=False)


@each_net
def test_other_channels_than_the_parameters_are_refused(name):
    variables, _ = network(name)
    with pytest.raises(InputError, match=r"^image with 2 channels, expected 1 as|^\d+ features in .*, expected \d+ as"):
        NETS[name].apply(variables, np.concatenate([VIDEO] * 2, -1), train=False)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ConvLSTM(patch=3), "frames of 8 x 4 pixels, expected sides that the patch of 3 pixels divides"),
        (ConvLSTM(patch=16), "frames of 8 x 4 pixels, expected sides that the patch of 16 pixels divides"),
        (ConvLSTM(horizon=0), "horizon is 0, expected more than 0"),
        (ConvLSTM(hidden=()), "hidden is 0, expected more than 0"),
        (ConvLSTM(kernel=0), "kernel is 0, expected more than 0"),
        (ConvLSTM(patch=0), "patch is 0, expected more than 0"),
        (FCLSTM(hidden=(4, 0)), "hidden is 0, expected more than 0"),
        (FCLSTM(horizon=-1), "horizon is -1, expected more than 0"),
        (FrameGRU(0), "classes is 0, expected more than 0"),
        (FrameGRU(2, hidden=0), "hidden is 0, expected more than 0"),
        (FrameBag(2, maps=(4, 0)), "maps is 0, expected more than 0"),
        (FrameBag(2, maps=(4, 4, 4)), "image of 8 x 4 pixels, expected 8 x 8 or more"),
    ],
)
def test_settings_that_cannot_work_are_refused(model, message):
    with pytest.raises(InputError, match=message):
        shapes(model, VIDEO, train=False)


def test_frames_of_another_size_are_refused_by_an_fc_lstm():
    variables, _ = network("FCLSTM")
    with pytest.raises(InputError, match=r"16 features in .*, expected 32 as in the parameters of FCLSTM"):
        NETS["FCLSTM"].apply(variables, VIDEO[:, :, :4], train=False)
