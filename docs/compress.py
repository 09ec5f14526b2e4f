"""Makes files of anybody's image classifier that are smaller and faster: fold, cut, distil, quantise, export.

`apply(variables, image [B, H, W, C] in [0, 1], train, rngs)` returns logits [B, classes], for any number of images: it
uses `image.shape[0]`, not `len(image)`. The `apply` of a Flax module is such a function, or becomes one:

    lambda variables, image, train=False, rngs=None: module.apply(variables, image, rngs=rngs)  # without `train`
    lambda variables, image, train=False, rngs=None: module.apply(variables, image, train, rngs=rngs)[0]  # logits, aux
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from dl_jax import classify, data
from dl_jax.compress import distill, fold, quantize, structure
from dl_jax.core.fit import fit
from dl_jax.core.step import init_state, make_step
from dl_jax.export import onnx, record


def compressed(
    apply: Callable[..., Any],
    variables: Any,  # trained
    images: np.ndarray,  # of training, uint8 [N, H, W, C]; their labels are not needed
    folder: Path,
    keep: float = 0.5,  # share of the operations that are kept
    steps: int = 1000,  # of distillation, on batches of 100 images
) -> dict[str, float]:
    """Writes float.onnx, the classifier as it is, small.onnx and int8.onnx to `folder`, and prints what stays and why.

    Each has its record beside it, with which it can be served.

    Returns the share of the images that each file classifies as the classifier does.
    """
    image, predict = np.asarray(classify.to_unit(images[:100])), functools.partial(apply, train=False)
    logits = classify.outputs(lambda some: jax.jit(predict)(variables, classify.to_unit(some)), images)
    print("Normalisations that are not folded:", fold.remaining(predict, variables, image) or "none")
    whole, start = fold.folded(predict, variables, image)  # normalisations into kernels
    onnx.export(whole, start, [image], folder / "float.onnx", tolerance=1e-4)

    print(structure.explain(groups := structure.groups(whole, start, image)))  # channels that have to go together
    operations = structure.operations(whole, start, image)
    plan = structure.within(groups, structure.l2(groups, start), operations, keep * operations({}), multiple=8)
    small, start = structure.cut(whole, start, plan)

    step = make_step(distill.loss(small, temperature=4.0), tx := optax.adam(optax.cosine_decay_schedule(1e-3, steps)))
    taught = data.shuffled({"image": images, "teacher_logits": logits}, 100, seeds=0)
    state = fit(step, init_state(jax.random.key(0), start, tx), taught, steps=steps)
    onnx.export(small, state.variables, [image], folder / "small.onnx", tolerance=1e-4)

    # With weights of 8 bits, sums of two products saturate on x86 CPUs without VNNI.
    read, integers = quantize.after_training(small, state.variables, [(image,)], 7)
    onnx.export(read, integers, [image], folder / "int8.onnx", tolerance=0.1)

    def agreement(predict: Callable[..., Any]) -> float:
        found = classify.outputs(lambda some: predict(np.asarray(classify.to_unit(some))), images)
        return float((found.argmax(1) == logits.argmax(1)).mean())

    files = {name: onnx.load(folder / f"{name}.onnx") for name in ("float", "small", "int8")}
    classes = [str(i) for i in range(logits.shape[1])]
    for name, predict in files.items():  # for `python -m dl_jax.serve`; better of images that no step has seen
        record.write(folder / f"{name}.onnx", predict, [(image,)], request=record.Image(), classes=classes)
    return {name: agreement(predict) for name, predict in files.items()}
