"""Boxes, non-maximum suppression and heat maps against brute force and the equations of the papers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax import detect, losses
from dl_jax.core.errors import InputError

H, W, CLASSES = 7, 9, 3


def random_boxes(n, seed, least=0.02):
    """Boxes within the image, of sides of `least` or more."""
    rng = np.random.default_rng(seed)
    sides = rng.uniform(least, 0.6, (n, 2))
    corner = rng.uniform(0, 1, (n, 2)) * (1 - sides)
    return np.concatenate([corner, corner + sides], 1).astype(np.float32)


def overlap_by_cells(a, b, cells=64):
    """The IoU of boxes whose corners are multiples of 1 / cells, by counting cells."""
    grid = np.zeros((2, cells, cells), bool)
    for covered, (top, left, bottom, right) in zip(grid, np.rint(np.array([a, b]) * cells).astype(int), strict=True):
        covered[top:bottom, left:right] = True
    return grid.all(0).sum() / max(1, grid.any(0).sum())


# Overlaps


def test_iou_against_counted_cells():
    boxes = np.rint(random_boxes(9, 0) * 64) / 64
    boxes[3] = boxes[2]
    found = jax.jit(detect.iou)(boxes[:5], boxes[2:])
    expected = [[overlap_by_cells(a, b) for b in boxes[2:]] for a in boxes[:5]]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found[2, 0] == found[2, 1] == 1


def test_iou_of_what_has_no_area():
    boxes = np.array([[0.2, 0.2, 0.2, 0.8], [0.8, 0.2, 0.2, 0.9], [0, 0, 1, 1], [np.nan, 0, 1, 1]], np.float32)
    found = np.array(detect.iou(boxes, boxes))
    np.testing.assert_array_equal(found[:3, :3], [[0, 0, 0], [0, 0, 0], [0, 0, 1]])
    assert np.isnan(found[3]).all()
    assert np.isnan(found[:, 3]).all()
    assert detect.iou(boxes[:0], boxes).shape == (0, 4)


def test_iou_in_half_precision_is_computed_in_float32():
    boxes = random_boxes(6, 1).astype(jnp.bfloat16)
    assert detect.iou(boxes, boxes).dtype == jnp.float32
    np.testing.assert_array_equal(detect.iou(boxes, boxes), detect.iou(*[boxes.astype(np.float32)] * 2))


# Non-maximum suppression


def nms_by_hand(boxes, scores, labels, present, threshold):
    overlap, kept = np.array(detect.iou(boxes, boxes)), np.zeros(len(boxes), bool)
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):  # stable
        others = [j for j in range(len(boxes)) if kept[j] and labels[j] == labels[i] and overlap[i, j] > threshold]
        kept[i] = present[i] and not others
    return kept


@pytest.mark.parametrize("n", [1, 2, 17, 40])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
def test_nms_against_a_loop_and_over_images(n, threshold):
    rng, images = np.random.default_rng(n), 6
    boxes = np.stack([random_boxes(n, seed) for seed in range(images)])
    scores = rng.integers(0, 6, (images, n)).astype(np.float32)  # many are equal
    labels, present = rng.integers(0, 2, (images, n)), rng.random((images, n)) < 0.8
    suppress = jax.jit(jax.vmap(functools.partial(detect.nms, threshold=threshold)))
    found = suppress(boxes, scores, labels, present)
    expected = [nms_by_hand(*row, threshold) for row in zip(boxes, scores, labels, present, strict=True)]
    np.testing.assert_array_equal(found, expected)


def test_nms_keeps_what_a_suppressed_box_would_have_suppressed():
    """The second box falls to the first, so that the third, which overlaps with the second alone, is kept."""
    boxes = jnp.array([[0, 0, 1, 0.5], [0, 0.2, 1, 0.7], [0, 0.45, 1, 0.95]])
    suppress = jax.jit(lambda *scores: detect.nms(boxes, jnp.array(scores), jnp.zeros(3, int), jnp.ones(3, bool), 0.3))
    np.testing.assert_array_equal(suppress(3.0, 2.0, 1.0), [True, False, True])
    np.testing.assert_array_equal(suppress(2.0, 3.0, 1.0), [False, True, False])
    np.testing.assert_array_equal(suppress(3.0, np.nan, 1.0), [True, False, True])  # NaN goes last


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_outside_is_refused(threshold):
    with pytest.raises(InputError, match=r"threshold is .* in \[0, 1\]"):
        detect.nms(jnp.ones((2, 4)), jnp.ones(2), jnp.ones(2, int), jnp.ones(2, bool), threshold)


def test_shapes_that_do_not_fit_are_refused():
    boxes, two, there = jnp.ones((2, 4)), jnp.ones(2, int), jnp.ones(2, bool)
    with pytest.raises(InputError, match=r"nms: boxes \(2, 4\), scores \(3,\), .* expected \(N, 4\) and \(N,\)"):
        detect.nms(boxes, jnp.ones(3), two, there, 0.5)
    with pytest.raises(InputError, match=r"targets: boxes \(1, 2, 4\), .* map over images with jax.vmap"):
        detect.targets(boxes[None], two[None], there[None], 3, H, W)
    with pytest.raises(InputError, match=r"peaks: heat \(1, 7, 9, 3\), .* map over images with jax.vmap"):
        detect.peaks(jnp.ones((1, H, W, 3)), jnp.ones((1, H, W, 2)), jnp.ones((1, H, W, 2)), 5)
    for most in (0, H * W * 3 + 1):
        with pytest.raises(InputError, match=f"most is {most}, expected 1 to 189"):
            detect.peaks(jnp.ones((H, W, 3)), jnp.ones((H, W, 2)), jnp.ones((H, W, 2)), most)


def test_no_boxes_at_all():
    none, labels, there = jnp.zeros((0, 4)), jnp.zeros(0, int), jnp.zeros(0, bool)
    assert detect.nms(none, jnp.zeros(0), labels, there, 0.5).shape == (0,)
    assert not detect.targets(none, labels, there, CLASSES, H, W).heat.any()


# Heat maps


@pytest.mark.parametrize("overlap", [0.1, 0.3, 0.7])
@pytest.mark.parametrize(("height", "width"), [(5, 5), (3, 20), (0.4, 2)])
def test_corners_within_the_radius_give_the_overlap_and_no_larger_radius_does(height, width, overlap):
    radius = float(detect.gaussian_radius(height, width, overlap))

    def least(radius):
        """Over the corners' moves by as much as the radius on each axis; the least is at the ends or in the middle."""
        moves = radius * np.stack(np.meshgrid(*[[-1, 0, 1]] * 4), -1).reshape(-1, 4)
        box = np.array([[0, 0, height, width]])
        return detect.iou(box, box + moves).min()

    np.testing.assert_allclose(least(radius), overlap, atol=1e-5)
    assert least(1.05 * radius) < overlap - 1e-3


@pytest.mark.parametrize("overlap", [0.0, 1.0])
def test_an_overlap_without_a_radius_is_refused(overlap):
    with pytest.raises(InputError, match=r"overlap is .* expected an IoU above 0 and below 1"):
        detect.gaussian_radius(3, 4, overlap)


def targets_by_hand(boxes, labels, present):
    heat = np.zeros((H, W, CLASSES))
    for (top, left, bottom, right), label, there in zip(boxes, labels, present, strict=True):
        if not there:
            continue
        row, column = (np.array([top + bottom, left + right]) / 2 * [H, W]).astype(int)
        sigma = float(detect.gaussian_radius((bottom - top) * H, (right - left) * W, 0.3)) / 3
        for y, x in np.ndindex(H, W):
            value = np.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * sigma**2))
            heat[y, x, label] = max(heat[y, x, label], value)
    return heat


def test_heat_maps_against_a_loop():
    rng = np.random.default_rng(0)
    boxes = np.stack([random_boxes(12, seed, least=0.2) for seed in range(4)])
    labels, present = rng.integers(0, CLASSES, (4, 12)), rng.random((4, 12)) < 0.6
    present[3] = False
    labels[~present] = 99  # padding may hold anything
    boxes[~present] = 0
    found = jax.jit(jax.vmap(lambda *given: detect.targets(*given, CLASSES, H, W)))(boxes, labels, present)
    expected = [targets_by_hand(*given) for given in zip(boxes, labels, present, strict=True)]
    np.testing.assert_allclose(found.heat, expected, atol=1e-5)
    assert not found.heat[3].any()
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2 * [H, W]
    np.testing.assert_allclose((found.cell + found.offset)[present], centre[present], rtol=1e-5)
    np.testing.assert_allclose(found.size[present], (boxes[..., 2:] - boxes[..., :2])[present] * [H, W], rtol=1e-5)
    image, row = np.nonzero(present)
    cell = np.array(found.cell)[present]
    assert (np.array(found.heat)[image, cell[:, 0], cell[:, 1], labels[image, row]] == 1).all()


def test_decoding_gives_the_boxes_back():
    """Those of one class have different cells; two of different classes would share sizes."""
    rng = np.random.default_rng(2)
    boxes = random_boxes(6, 3, least=0.1)
    labels, present = rng.integers(0, CLASSES, 6), np.array([True] * 5 + [False])
    encode = jax.jit(lambda *given: detect.targets(*given, CLASSES, 40, 30))
    wanted = jax.tree.map(np.array, encode(boxes, labels, present))
    assert len({tuple(cell) for cell in wanted.cell[:5]}) == 5
    size, offset = np.zeros((2, 40, 30, 2), np.float32)
    for maps, values in ((size, wanted.size), (offset, wanted.offset)):
        maps[wanted.cell[:5, 0], wanted.cell[:5, 1]] = values[:5]
    found = jax.jit(functools.partial(detect.peaks, most=20))(wanted.heat, size, offset)
    sure = np.array(found.scores) == 1
    assert sure.sum() == 5
    order = np.lexsort(np.array(found.boxes)[sure].T), np.lexsort(boxes[:5].T)
    np.testing.assert_allclose(np.array(found.boxes)[sure][order[0]], boxes[:5][order[1]], atol=1e-6)
    np.testing.assert_array_equal(np.array(found.labels)[sure][order[0]], labels[:5][order[1]])


def test_peaks_against_a_loop():
    rng = np.random.default_rng(4)
    heat = rng.permutation(H * W * CLASSES).reshape(H, W, CLASSES).astype(np.float32)
    size, offset = rng.random((2, H, W, 2), np.float32)
    expected = []
    for y, x, label in np.ndindex(heat.shape):
        around = heat[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2, label]
        if heat[y, x, label] == around.max():
            middle, half = np.array([y, x]) + offset[y, x], size[y, x] / 2
            box = np.concatenate([middle - half, middle + half]) / [H, W, H, W]
            expected.append((heat[y, x, label], label, *box))
    expected.sort(reverse=True)
    found = jax.jit(functools.partial(detect.peaks, most=H * W * CLASSES))(heat, size, offset)
    n = len(expected)
    np.testing.assert_array_equal(found.present, np.arange(heat.size) < n)
    flat = np.column_stack([found.scores, found.labels, found.boxes])[:n]
    np.testing.assert_allclose(flat, expected, rtol=1e-5, atol=1e-6)
    few = jax.jit(functools.partial(detect.peaks, most=3))(heat, size, offset)
    np.testing.assert_array_equal(few.scores, np.array(found.scores)[:3])
    heat[2, 3, 1] = np.nan
    broken = jax.jit(functools.partial(detect.peaks, most=3))(heat, size, offset)
    assert np.isnan(broken.scores[0])
    assert broken.present[0]


@pytest.mark.parametrize(
    "wrong",
    [([0.2, 0.2, 0.2, 0.4], 0), ([0.9, 0.2, 1.3, 0.4], 0), ([0.2, 0.2, 0.4, 0.4], 3), ([0.2, 0.2, 0.4, 0.4], -1)],
)
def test_a_box_without_sense_makes_the_map_nan(wrong):
    boxes, labels = np.array([[0.1, 0.1, 0.5, 0.5], wrong[0]], np.float32), np.array([0, wrong[1]])
    of = jax.jit(lambda present: detect.targets(boxes, labels, present, CLASSES, H, W))
    assert np.isnan(of(np.array([True, True])).heat).all()
    assert of(np.array([True, False])).heat.max() == 1


def test_a_centre_on_the_last_edge_is_in_the_last_cell():
    boxes = np.array([[1 - 6e-8, 1 - 6e-8, 1, 1]], np.float32)
    found = jax.jit(lambda boxes: detect.targets(boxes, np.array([1]), np.array([True]), CLASSES, H, W))(boxes)
    np.testing.assert_array_equal(found.cell, [[H - 1, W - 1]])
    assert np.array(found.heat)[H - 1, W - 1, 1] == 1


def test_maps_are_read_at_cells_of_each_image():
    maps, cell = np.arange(2 * H * W * 2).reshape(2, H, W, 2), np.array([[[0, 1], [6, 8]], [[3, 3], [2, 0]]])
    found = jax.vmap(detect.at_cells)(maps, cell)
    np.testing.assert_array_equal(found, [[maps[i, y, x] for y, x in cell[i]] for i in range(2)])


# The focal loss


def test_the_focal_loss_against_equation_1():
    rng = np.random.default_rng(5)
    logits, heat = rng.normal(size=(2, 3, H, W)) * 3
    heat = np.where(rng.random(heat.shape) < 0.1, 1, 1 / (1 + np.exp(-heat)))
    p = 1 / (1 + np.exp(-logits))
    terms = np.where(heat == 1, (1 - p) ** 2 * np.log(p), (1 - heat) ** 4 * p**2 * np.log(1 - p))
    found = jax.jit(losses.peak_focal)(logits.astype(np.float32), heat.astype(np.float32))
    np.testing.assert_allclose(found, -terms.sum((1, 2)), rtol=1e-5)


def test_the_focal_loss_is_finite_where_probabilities_are_rounded_and_in_half_precision():
    logits, heat = np.array([[-200, 200, -200, 200]], np.float32), np.array([[1, 1, 0, 0]], np.float32)
    of = jax.jit(jax.value_and_grad(lambda x: losses.peak_focal(x, heat).sum()))
    value, gradient = jax.device_get(of(logits))
    assert value == 400
    np.testing.assert_array_equal(gradient, [[-1, 0, 0, 1]])
    half = jax.ShapeDtypeStruct(logits.shape, jnp.bfloat16)
    assert jax.eval_shape(losses.peak_focal, half, heat).dtype == jnp.float32
    with pytest.raises(InputError, match="peak_focal: predictions"):
        losses.peak_focal(logits, heat[0])
