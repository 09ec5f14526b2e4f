"""Makes files of anybody's image classifier that are smaller and faster: fold, cut, distil, quantise, export."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from dl_jax import classify, data
from dl_jax.compress import distill, fold, quantize, structure
from dl_jax.core.fit import fit
from dl_jax.core.step import init_state, make_step
from dl_jax.export import onnx


def compressed(
    apply: Callable[..., Any],  # such as `model.apply`: (variables, image [B, H, W, C], train) -> logits [B, classes]
    variables: Any,  # trained
    train: Mapping[str, np.ndarray],  # image, uint8 [N, H, W, C], and label, int [N]
    folder: Path,
    keep: float = 0.5,  # share of the operations that are kept
    steps: int = 1000,  # of distillation, on batches of 100 images
) -> None:
    """Writes float.onnx, the classifier as it is, and small.onnx and int8.onnx to `folder`."""
    image = np.asarray(classify.to_unit(train["image"][:100]))
    apply, variables = fold.folded(apply, variables, image, train=False)  # normalisations into kernels
    onnx.export(functools.partial(apply, train=False), variables, [image], folder / "float.onnx")

    groups = structure.groups(apply, variables, image, train=False)  # channels that have to go together
    operations = structure.operations(apply, variables, image, train=False)
    plan = structure.within(groups, structure.l2(groups, variables), operations, keep * operations({}), multiple=8)
    small, start = structure.cut(apply, variables, plan)

    teacher = jax.jit(lambda image: apply(variables, classify.to_unit(image), train=False))
    taught = {**train, "teacher_logits": classify.outputs(teacher, train["image"])}
    step = make_step(distill.loss(small, temperature=4.0), tx := optax.adam(optax.cosine_decay_schedule(1e-3, steps)))
    state = fit(step, init_state(jax.random.key(0), start, tx), data.shuffled(taught, 100, seeds=0), steps=steps)
    onnx.export(functools.partial(small, train=False), state.variables, [image], folder / "small.onnx")

    predict = functools.partial(small, train=False)
    ranges = quantize.calibrate(lambda v, batch: predict(v, batch["image"]), state.variables, [{"image": image}])
    integers = {**state.variables, "params": quantize.quantize(state.params, 8), quantize.RANGES: ranges}
    rounded = quantize.with_activations(predict, 8)
    read = lambda variables, image: rounded({**variables, "params": quantize.dequantize(variables["params"])}, image)
    onnx.export(read, integers, [image], folder / "int8.onnx", tolerance=0.1)
