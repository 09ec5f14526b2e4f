"""What a network looked at: how its score for an image depends on the pixels.

A score is a function of images [B, H, W, C] that gives one number for each of them, [B], and depends on no other image:

    score = lambda images: model.apply(variables, images, train=False)[:, 3]  # of class 3
    maps = attribution.integrated_gradients(score, images, steps=50)  # [B, H, W, C]

All functions can be jitted, and are computed in float32 for images in float32.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dl_jax import inspect
from dl_jax.core.equations import DERIVATIVES, bound, evaluate, inlined, trace
from dl_jax.core.errors import InputError, require_positive
from dl_jax.core.step import Array, Tree

Score = Callable[[Array], Array]


def gradient(score: Score, images: Array) -> Array:  # [B, H, W, C] -> [B, H, W, C]
    """The derivative of the score with respect to each value (Simonyan et al. 2014, arXiv:1312.6034, section 3).

    The paper's saliency map is its largest absolute value over the channels. Raises InputError for images that are no
    floats.
    """
    _require_floats(images)
    return jax.grad(lambda images: score(images).sum())(images)


def _require_floats(images: Array) -> None:
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise InputError(
            f"images of {images.dtype} {images.shape}, expected floats, for which a gradient exists; convert them, "
            "such as by classify.to_unit"
        )


def smooth_gradient(score: Score, images: Array, key: Array, sigma: float, samples: int) -> Array:
    """The mean gradient over `samples` copies of the images with Gaussian noise (SmoothGrad, arXiv:1706.03825).

    `sigma` is the standard deviation of the noise, in the units of the images. Raises InputError where it is negative,
    for no samples, and for images that are no floats.
    """
    require_positive({"samples": samples})
    _require_floats(images)
    if not 0 <= sigma < float("inf"):
        raise InputError(f"smooth_gradient: sigma is {sigma}, expected 0 or more; 0 is the gradient itself")

    def add(total: Array, key: Array) -> tuple[Array, None]:
        noise = sigma * jax.random.normal(key, images.shape, images.dtype)
        return total + gradient(score, images + noise), None

    total, _ = jax.lax.scan(add, jnp.zeros_like(images), jax.random.split(key, samples))
    return total / samples


def integrated_gradients(score: Score, images: Array, steps: int, baseline: Array | float = 0.0) -> Array:
    """(image − baseline) times the mean gradient on the straight line between them (arXiv:1703.01365, equation 1).

    The mean is over the midpoints of `steps` equal parts of the line. Its sum over an image approaches the score minus
    that of the baseline as the steps grow (completeness). `baseline` broadcasts to the images. Raises InputError for no
    steps, and for images that are no floats.
    """
    require_positive({"steps": steps})
    _require_floats(images)
    way = images - baseline

    def add(total: Array, part: Array) -> tuple[Array, None]:
        return total + gradient(score, baseline + (part + 0.5) / steps * way), None

    total, _ = jax.lax.scan(add, jnp.zeros_like(images), jnp.arange(steps))
    return way * total / steps


def occlusion(score: Score, images: Array, size: int, stride: int = 1, fill: float = 0.0) -> Array:  # -> [B, h, w]
    """By how much the score falls where a square window is `fill`, for each place of the window.

    The sensitivity of Zeiler & Fergus 2014 (arXiv:1311.2901, section 4.2). `size` is the side of the window in pixels,
    and its places are `stride` pixels apart: h = 1 + (H - size) // stride. Raises InputError for a window that is not
    within the images, and for no stride.
    """
    require_positive({"stride": stride})
    height, width = images.shape[1:3]
    if not 1 <= size <= min(height, width):
        raise InputError(f"occlusion: a window of {size} pixels in images {images.shape}, expected 1 to their side")
    inside = lambda first, n: (jnp.arange(n) >= first) & (jnp.arange(n) < first + size)
    before = score(images)

    def fall(place: Array) -> Array:  # [2] -> [B]
        covered = inside(place[0], height)[:, None] & inside(place[1], width)
        return before - score(jnp.where(covered[..., None], fill, images))

    rows, columns = (jnp.arange(0, n - size + 1, stride) for n in (height, width))
    places = jnp.stack(jnp.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)
    return jax.lax.map(fall, places).reshape(len(rows), len(columns), -1).transpose(2, 0, 1)


def deletion(score: Score, images: Array, maps: Array, fill: float = 0.0) -> Array:  # maps [B, H, W] -> [B, H · W + 1]
    """The scores of the images without their n first pixels, which are `fill`, for n = 0 to all.

    The pixels go in the order of `maps`, the largest first, equal ones in the order of their places. The sooner the
    score falls, the more the maps say about it: the measure of Petsiuk et al. 2018 (arXiv:1806.07421, section 4.2) is
    the mean, where the score is the class's probability. Raises InputError for maps of another size than the images.
    """
    return _covered(score, images, maps, fill, lambda place, n: place < n)


def insertion(score: Score, images: Array, maps: Array, fill: float = 0.0) -> Array:  # maps [B, H, W] -> [B, H · W + 1]
    """The scores of the images of which only the n first pixels are there, the others are `fill`; see `deletion`."""
    return _covered(score, images, maps, fill, lambda place, n: place >= n)


def _covered(
    score: Score, images: Array, maps: Array, fill: float, covers: Callable[[Array, Array], Array]
) -> Array:  # -> [B, H · W + 1]
    if maps.shape != images.shape[:3]:
        raise InputError(f"maps {maps.shape} of images {images.shape}, expected {images.shape[:3]}; resize the maps")
    order = jnp.argsort(jnp.asarray(maps).reshape(len(maps), -1), -1, stable=True, descending=True)
    place = order.argsort(-1).reshape(*maps.shape, 1)  # 0 is the largest
    left = lambda n: score(jnp.where(covers(place, n), fill, images))
    return jax.lax.map(left, jnp.arange(1 + maps[0].size)).T


def grad_cam(
    score: Callable[[Tree, Array], Array],
    variables: Tree,
    images: Array,
    layer: str,
    maps: tuple[int, int, int] | None = None,
) -> Array:  # -> [B, H, W]
    """Grad-CAM: the positive part of the sum of maps, weighted by their mean gradients (arXiv:1610.02391, section 3).

    Raises InputError where `layer` is none of the network, is called more than once, or reads no maps.

    Args:
      score: a function `(variables, images) -> [B]`.
      variables: those of the network.
      images: [B, H, W, C].
      layer: the layer that reads the maps [B, h, w, D], by the path of its parameters, such as "Conv_2".
      maps: (h, w, D), where the layer reads them as one axis, as a dense layer does.

    The result is resized linearly to the size of the images.
    """
    read = inspect.inputs(score)(variables, images)
    if layer not in read:
        raise InputError(f"grad_cam: {layer!r} is no layer, expected one of {', '.join(read)}; name one of these")
    values, *again = read[layer]
    if again:
        raise InputError(f"grad_cam: {layer} is called {1 + len(again)} times, expected once; name another layer")
    shape = (len(images), *(maps or values.shape[1:]))
    if len(shape) != 4 or values.size != math.prod(shape):
        raise InputError(
            f"grad_cam: {layer} reads {values.shape}, expected maps [B, h, w, D]; give their size (h, w, D) as maps"
        )

    def shifted(change: Array) -> Array:
        add = lambda path, x: x + change if path == layer else x
        return inspect.with_inputs(score, add)(variables, images).sum()

    weights = jax.grad(shifted)(jnp.zeros_like(values)).reshape(shape).mean((1, 2), keepdims=True)
    found = jax.nn.relu((weights * values.reshape(shape)).sum(-1))
    return jax.image.resize(found, images.shape[:3], "linear")


def guided(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with another derivative of its ReLUs: only positive gradients pass, where the input is positive too.

    `gradient` of it is guided backpropagation (Springenberg et al. 2015, arXiv:1412.6806, section 3.4). ReLUs are calls
    of `jax.nn.relu`; a maximum of something else and 0, such as the variance in a normalisation, keeps its derivative,
    and so do ReLUs within loops and branches. Raises InputError, when called, where there is no other one.
    """

    @functools.wraps(function)
    def changed(*args: Any, **kwargs: Any) -> Any:
        called = trace(function, *args, **kwargs)
        if not any(map(_is_relu, called.jaxpr.jaxpr.eqns)):
            raise InputError(
                "guided: the network has no ReLU, expected one; guided backpropagation changes nothing else"
            )

        def operation(equation: Any, inputs: list[Any]) -> Sequence[Any]:
            return [_guided_relu(*inputs)] if _is_relu(equation) else bound(equation, inputs)

        return called.result(evaluate(called.jaxpr, [*jax.tree.leaves(args[0]), *called.others], operation))

    return changed


def _is_relu(equation: Any) -> bool:
    """Whether it is max(x, 0) with a derivative of its own, as in `jax.nn.relu`."""
    if (kind := DERIVATIVES.get(equation.primitive.name)) is None:
        return False
    body = inlined(equation.params[kind]).jaxpr
    if len(body.eqns) != 1 or len(body.invars) != 1:
        return False
    return body.eqns[0].primitive.name == "max" and any(_is_zero(atom) for atom in body.eqns[0].invars)


def _is_zero(atom: Any) -> bool:
    return hasattr(atom, "val") and jnp.ndim(atom.val) == 0 and atom.val == 0


@jax.custom_vjp
def _guided_relu(x: Array) -> Array:
    return jnp.maximum(x, 0)


_guided_relu.defvjp(lambda x: (jnp.maximum(x, 0), x > 0), lambda on, grad: (jnp.where(on, jnp.maximum(grad, 0), 0),))


def maximised(
    score: Score, images: Array, steps: int, rate: float, between: Callable[[Array], Array] = lambda images: images
) -> Array:
    """Images in [0, 1] with a larger score: gradient ascent from `images` (Erhan et al. 2009; arXiv:1312.6034, 2).

    In each step an image moves by `rate` along its gradient, which is divided by its root mean square, then becomes
    `between` of itself, such as a blurred image (Yosinski et al. 2015, arXiv:1506.06579, section 3), and is cut to
    [0, 1]. Raises InputError for no steps, and for a rate that is not above 0.
    """
    require_positive({"steps": steps, "rate": rate})

    def climb(images: Array, _: None) -> tuple[Array, None]:
        slope = gradient(score, images)
        size = jnp.sqrt(jnp.mean(slope**2, (1, 2, 3), keepdims=True))
        moved = images + rate * slope / jnp.maximum(size, jnp.finfo(slope.dtype).tiny)
        return jnp.clip(between(moved), 0, 1), None

    return jax.lax.scan(climb, images, None, length=steps)[0]
