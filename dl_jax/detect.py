"""Detection of objects: overlaps of boxes, non-maximum suppression, and heat maps with a peak at each centre.

A box is ymin, xmin, ymax, xmax, as fractions of the image. Functions take the N boxes of one image; `jax.vmap` maps
them over images. An image with fewer than N boxes is padded, and `present` bool [N] says which are boxes.

`targets` and `peaks` are the two directions of CenterNet (Zhou, Wang and Krähenbühl 2019, "Objects as points",
arXiv:1904.07850, section 3): an object is a peak in the heat map of its class, in the cell that has its centre. Its
size, and the place of its centre within the cell, are read from other maps at this cell. A map has H x W cells.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dl_jax.core.errors import InputError
from dl_jax.core.leaves import at_least_float32
from dl_jax.core.step import Array

OVERLAP = 0.3  # CornerNet's t: corners that are off by a radius or less give boxes with at least this IoU


class Targets(NamedTuple):
    """What the maps of an image should hold, for N boxes."""

    heat: Array  # float32 [H, W, classes]: 1 at centres, and Gaussians around them
    cell: Array  # int32 [N, 2], the row and the column of the cell that has the centre
    size: Array  # float32 [N, 2], height and width in cells
    offset: Array  # float32 [N, 2], the centre's place within its cell, in [0, 1]


class Objects(NamedTuple):
    """Objects that were found in an image, the surest first; those that `present` excludes are padding."""

    boxes: Array  # float32 [N, 4]
    labels: Array  # int32 [N]
    scores: Array  # float32 [N]
    present: Array  # bool [N]


def iou(boxes: Array, others: Array) -> Array:  # [..., N, 4], [..., M, 4] -> [..., N, M]
    """The intersection of each pair of boxes over their union; 0 where a box has no area, NaN where it has a NaN."""
    a, b = at_least_float32(boxes)[..., :, None, :], at_least_float32(others)[..., None, :, :]
    area = lambda sides: jnp.prod(jnp.maximum(sides, 0), -1)
    both = area(jnp.minimum(a[..., 2:], b[..., 2:]) - jnp.maximum(a[..., :2], b[..., :2]))
    union = area(a[..., 2:] - a[..., :2]) + area(b[..., 2:] - b[..., :2]) - both
    return jnp.where(union == 0, 0, both / jnp.where(union == 0, 1, union))


def nms(boxes: Array, scores: Array, labels: Array, present: Array, threshold: float) -> Array:  # -> bool [N]
    """Which boxes non-maximum suppression keeps, each class by itself.

    From the highest score on, a box is kept unless its IoU with one of its class that was kept is above `threshold`. Of
    equal scores the first goes first. A box with a NaN overlaps no other, and a score that is NaN goes last. Raises
    InputError where the threshold is not in [0, 1], or the shapes do not fit.

    Args:
      boxes: [N, 4].
      scores: [N].
      labels: int [N], of any values.
      present: bool [N]; what it excludes is not kept.
      threshold: the IoU up to which two boxes are of two objects.
    """
    if not 0 <= threshold <= 1:
        raise InputError(f"nms: threshold is {threshold}, expected an IoU in [0, 1]")
    n = _count("nms", boxes, scores=scores, labels=labels, present=present)
    if not n:
        return present
    order = jnp.argsort(-at_least_float32(scores), stable=True)  # `descending` would put NaN first
    overlap = (iou(boxes, boxes) > threshold) & (labels[:, None] == labels)  # [N, N]

    def visit(i: Array, kept: Array) -> Array:
        box = order[i]
        return kept.at[box].set(present[box] & ~(overlap[box] & kept).any())

    # What begins with the inputs has their axes under `jax.vmap`, and their devices.
    return jax.lax.fori_loop(0, n, visit, jnp.zeros_like(present, bool))


def gaussian_radius(height: Array, width: Array, overlap: float = OVERLAP) -> Array:  # [...], [...] -> [...]
    """The largest distance by which the corners of a box may be off, on each axis, for an IoU of `overlap` or more.

    Law and Deng 2018, "CornerNet", arXiv:1808.01244, section 3.2: the least of three radii, for boxes that are
    shifted, smaller on all sides and larger on all sides. Raises InputError where `overlap` is not in (0, 1).
    """
    if not 0 < overlap < 1:
        raise InputError(f"gaussian_radius: overlap is {overlap}, expected an IoU above 0 and below 1")
    height, width = (at_least_float32(jnp.asarray(side)) for side in (height, width))
    around, area = height + width, height * width
    # The roots nearest to 0, as c / (b + sqrt(b² - a c)), which does not cancel.
    root = lambda a, b, c: c / (b + jnp.sqrt(jnp.maximum(b * b - a * c, 0)))
    shifted = root(1, around / 2, area * (1 - overlap) / (1 + overlap))
    smaller = root(4, around, area * (1 - overlap))
    larger = root(-4 * overlap, overlap * around, area * (1 - overlap))
    return jnp.minimum(jnp.minimum(shifted, smaller), larger)


def targets(boxes: Array, labels: Array, present: Array, classes: int, height: int, width: int) -> Targets:
    """The targets of an image's boxes, on maps of `height` x `width` cells.

    The heat of a class is the largest exp(-d² / 2 σ²) of its objects, where d is the distance in cells from the cell
    that has the centre, and σ a third of the `gaussian_radius` of the box. A box without area or with a centre outside
    of the image, or a label outside of 0 .. classes - 1, makes the whole heat map NaN. Where two objects of a class
    share a cell they are one peak. Raises InputError where the shapes do not fit.
    """
    _count("targets", boxes, labels=labels, present=present)
    scaled = at_least_float32(boxes) * jnp.array([height, width, height, width])
    size, centre = scaled[:, 2:] - scaled[:, :2], (scaled[:, 2:] + scaled[:, :2]) / 2
    cells = jnp.array([height, width])
    valid = (size > 0).all(-1) & ((centre >= 0) & (centre <= cells)).all(-1) & (labels >= 0) & (labels < classes)
    there = present & valid
    cell = jnp.where(there[:, None], jnp.minimum(jnp.floor(centre), cells - 1), 0)  # 1 itself is in the last cell
    sigma = gaussian_radius(*jnp.where(there[:, None], size, 1).T) / 3  # [N]
    bell = lambda axis, n: jnp.exp(-(((jnp.arange(n) - cell[:, axis, None]) / sigma[:, None]) ** 2) / 2)  # [N, n]
    of_class = there[:, None] & (labels[:, None] == jnp.arange(classes))  # [N, classes]
    product = bell(0, height)[:, :, None, None] * bell(1, width)[:, None, :, None] * of_class[:, None, None]
    heat = jnp.where((present & ~valid).any(), jnp.nan, product.max(0, initial=0))
    zero_else = lambda numbers: jnp.where(there[:, None], numbers, 0)
    return Targets(heat, cell.astype(jnp.int32), zero_else(size), zero_else(centre - cell))


def peaks(heat: Array, size: Array, offset: Array, most: int) -> Objects:
    """The objects at the `most` highest peaks: cells with no higher neighbour of the eight in the map of a class.

    The direction back from `targets`. Where there are fewer peaks the rest is not present. A heat that is NaN is the
    highest peak, so that it is seen. Raises InputError where the shapes do not fit, or `most` is not between 1 and the
    number of all cells.

    Args:
      heat: [H, W, classes], of which a peak's value is the score.
      size: [H, W, 2], heights and widths in cells of the objects with their centres there.
      offset: [H, W, 2], where in its cell a centre is.
      most: the number of objects to return.
    """
    if heat.ndim != 3 or size.shape != (*heat.shape[:2], 2) or offset.shape != size.shape:
        raise InputError(
            f"peaks: heat {heat.shape}, size {size.shape} and offset {offset.shape}, expected [H, W, classes] and "
            "[H, W, 2] for both others; map over images with jax.vmap"
        )
    if not 1 <= most <= heat.size:
        raise InputError(f"peaks: most is {most}, expected 1 to {heat.size}, the cells of all classes")
    height, width, _ = heat.shape
    heat, size, offset = (at_least_float32(each) for each in (heat, size, offset))
    around = jax.lax.reduce_window(heat, -jnp.inf, jax.lax.max, (3, 3, 1), (1, 1, 1), "SAME")
    scores, index = jax.lax.top_k(jnp.where(heat < around, -jnp.inf, heat).ravel(), most)
    row, column, label = jnp.unravel_index(index, heat.shape)
    centre = jnp.stack([row, column], -1) + offset[row, column]
    half = size[row, column] / 2
    boxes = jnp.concatenate([centre - half, centre + half], -1) / jnp.array([height, width, height, width])
    return Objects(boxes, label.astype(jnp.int32), scores, scores != -jnp.inf)


def at_cells(maps: Array, cell: Array) -> Array:  # [H, W, C], int [N, 2] -> [N, C]
    """The values of maps in the cells of `Targets`."""
    return maps[cell[:, 0], cell[:, 1]]


def _count(name: str, boxes: Array, **columns: Array) -> int:
    """N of boxes [N, 4]. Raises InputError for other shapes, and where a column is not [N]."""
    wrong = [column for column, values in columns.items() if values.shape != boxes.shape[:1]]
    if boxes.ndim != 2 or boxes.shape[1] != 4 or wrong:
        shapes = ", ".join(f"{column} {values.shape}" for column, values in {"boxes": boxes, **columns}.items())
        raise InputError(f"{name}: {shapes}, expected (N, 4) and (N,); map over images with jax.vmap")
    return len(boxes)
