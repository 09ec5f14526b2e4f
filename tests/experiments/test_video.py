"""Motions of moving digits: what is measured, by hand, how videos are moved, and which sets are refused."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax import data
from dl_jax.core.errors import InputError
from dl_jax.harness.run import Run


@pytest.fixture(scope="module")
def video(load_experiment):
    return load_experiment("vision/video")


def test_videos_are_moved_around_the_torus_each_by_itself_and_all_its_frames_alike(video):
    frames = np.random.default_rng(0).integers(0, 256, (12, 3, 4, 6, 1), np.uint8)
    batch = {"video": frames, "label": np.arange(12)}
    moved = jax.device_get(jax.jit(video.rolled)(jax.random.key(0), batch))
    assert moved["label"].tolist() == list(range(12))
    assert moved["video"].dtype == np.uint8
    found = []
    for before, after in zip(frames, moved["video"], strict=True):
        shifts = [at for at in np.ndindex(4, 6) if (np.roll(before, at, (1, 2)) == after).all()]
        assert len(shifts) == 1
        found += shifts
    assert len({row for row, _ in found}) == 4
    assert len({column for _, column in found}) > 3


class Constant:
    """A network whose logits are `logits` for every example."""

    def __init__(self, logits):
        self.logits = jnp.asarray(logits)

    def apply(self, variables, x, train):
        self.seen = x
        return jnp.broadcast_to(self.logits, (len(x), *self.logits.shape))


def test_the_cross_entropy_of_the_next_frames_by_hand(video):
    """The second frame is to be predicted from the first; there are a third frame, and grey values between 0 and 1."""
    cfg = dataclasses.replace(video.Config(), given=1, horizon=1)
    frames = np.array([[0, 0], [255, 51], [9, 9]], np.uint8).reshape(1, 3, 1, 2, 1)
    logits = np.log(np.array([0.8, 0.3]) / np.array([0.2, 0.7])).reshape(1, 1, 2, 1)
    model = Constant(logits.astype(np.float32))
    each, measured = video.nats_per_frame(cfg, model, {}, {"video": frames}, train=True)
    expected = -np.log(0.8) - 0.2 * np.log(0.3) - 0.8 * np.log(0.7)
    np.testing.assert_allclose(each, [expected], rtol=1e-6)
    np.testing.assert_allclose(measured["cross_entropy"], [expected], rtol=1e-6)
    assert model.seen.shape == (1, 1, 1, 2, 1)
    assert not model.seen.any()


def test_two_frames_have_the_mean_of_their_cross_entropies(video):
    cfg = dataclasses.replace(video.Config(), given=1, horizon=2)
    each, _ = video.nats_per_frame(
        cfg, Constant(np.zeros((2, 2, 3, 1), np.float32)), {}, {"video": np.ones((4, 3, 2, 3, 1), np.uint8)}, train=True
    )
    np.testing.assert_allclose(each, [6 * np.log(2)] * 4, rtol=1e-6)


def test_the_accuracy_counts_every_test_video_once(video):
    model = Constant(np.array([0.0, 2.0, 1.0], np.float32))
    batch = {
        "video": np.zeros((3, 1, 1, 1, 1), np.uint8),
        "label": np.array([1, 2, 1]),
        "mask": np.array([1.0, 1.0, 0.0]),
    }
    values = functools.partial(video.classified, video.Config(), model)
    total, weight = video.tested(values, {}, batch, jax.random.key(0))["accuracy"]
    assert (float(total), float(weight)) == (100, 2)
    loss, _ = video.mean_loss(values, {}, batch, jax.random.key(0))
    scores = np.log(np.exp([0, 2, 1]).sum()) - np.array([2, 1, 2])
    np.testing.assert_allclose(loss, scores.mean(), rtol=1e-6)


@pytest.mark.parametrize("name", ["bag", "gru", "conv_lstm", "fc_lstm"])
def test_every_network_gives_a_loss_for_each_video(video, name):
    cfg = video.PRESETS["smoke"]
    model, values, *_ = video.task(cfg, name, 8)
    batch = {"video": np.zeros((3, 16, 32, 32, 1), np.uint8), "label": np.zeros(3, np.int32)}

    def of_start():
        variables = model.init(jax.random.key(0), jnp.zeros((1, cfg.given, 32, 32, 1)), train=False)
        return values(cfg, model, variables, batch, train=True)

    each, measured = jax.eval_shape(of_start)
    assert each.shape == (3,)
    metric = "accuracy" if name in ("bag", "gru") else "cross_entropy"
    assert {name: value.shape for name, value in measured.items()} == {metric: (3,)}


def test_rows_of_frames(video):
    cfg = dataclasses.replace(video.Config(), given=2, horizon=1)
    frames = np.arange(2 * 4 * 2 * 2, dtype=np.uint8).reshape(2, 4, 2, 2, 1)
    rows = video.strips(cfg, ["left", "grow"], frames, {"conv_lstm": np.ones((2, 1, 2, 2, 1))})
    kinds = ("given", "true", "conv_lstm")
    assert list(rows) == [f"{motion}, {kind}" for motion in ("left", "grow") for kind in kinds]
    assert {name: row.shape for name, row in rows.items() if "left" in name} == {
        "left, given": (1, 2, 6),
        "left, true": (1, 2, 3),
        "left, conv_lstm": (1, 2, 3),
    }
    np.testing.assert_allclose(255 * rows["grow, given"][0, :, 3:5], frames[1, 1, ..., 0])
    np.testing.assert_allclose(255 * rows["grow, true"][0, :, :2], frames[1, 2, ..., 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "digits"}, "data set digits has the columns image, label, expected videos in column 'video'"),
        ({"given": 12, "horizon": 5}, r"have 16 frames, expected 17 or more: --given 12 and --horizon 5"),
        ({"patch": 5}, "frames of 32 x 32 pixels, expected sides that the patch of 5 pixels divides"),
        ({"maps": (2,) * 6}, "image of 32 x 32 pixels, expected 64 x 64 or more"),
    ],
)
def test_what_cannot_work_is_refused_before_any_training(video, change, message, monkeypatch):
    monkeypatch.setattr(video, "fit", None)  # a step would fail
    cells = ("gru",) if "maps" in change else ("conv_lstm",)
    with pytest.raises(InputError, match=message):
        video.main(dataclasses.replace(video.PRESETS["smoke"], cells=cells, **change), Run())


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((None, 32, 32, 1), "uint8", r"are uint8 \(None, 32, 32, 1\), expected uint8 \[T, H, W, C\] of one size"),
        ((16, 32, 32), "uint8", r"are uint8 \(16, 32, 32\), expected"),
        ((16, 32, 32, 1), "float32", r"are float32 \(16, 32, 32, 1\), expected"),
        ((3, 32, 32, 1), "uint8", "have 3 frames, expected 4 or more: --given 2 and --horizon 2"),
    ],
)
def test_other_videos_are_refused(video, shape, dtype, message, monkeypatch):
    features = {"video": data.Feature(shape, dtype), "label": data.Feature((), "int32")}
    described = types.SimpleNamespace(features=features, labels={"label": ("a", "b")})
    monkeypatch.setattr(video.data, "info", lambda name: described)
    with pytest.raises(InputError, match=message):
        video.videos(video.PRESETS["smoke"], "train")
