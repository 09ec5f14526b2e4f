"""ResNet-50 reaches 76.5 % on ImageNet: a run for a pod.

He, Zhang, Ren & Sun 2016, "Deep residual learning for image recognition", with the schedule of Goyal et al. 2017,
"Accurate, large minibatch SGD". The number is that of Flax's ImageNet example (google/flax, examples/imagenet).

    python experiments/vision/imagenet_resnet.py --preset paper --seeds 1 --workdir gs://BUCKET/resnet50

Expected: 76.5 ± 0.5 % of the validation images right after 100 epochs. The example took two hours on a TPU v3-32. This
has not been run.

As in the example: the network (version 1.5), 100 epochs in batches of 1,024, Nesterov's momentum 0.9, a learning rate
of 0.1 for each 256 images that rises over five epochs and then falls as a cosine, a weight decay of 1e-4 and bfloat16.
Images are random windows of 8 to 100 % of the area, scaled to 224 pixels and flipped; they are tested scaled to 256
pixels and cropped at the centre. Two things are ours: label smoothing of 0.1, and the last scale of each block starts
at zero, as in Goyal et al.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dl_jax import augment, classify, data, losses, metrics, optim
from dl_jax.core.errors import InputError
from dl_jax.core.evaluate import evaluator
from dl_jax.core.fit import Watch, fit
from dl_jax.core.step import make_step, per_seed, start
from dl_jax.harness import Claim, NonNegative, Positive, Probability, Run, Some, launch, on_shapes
from dl_jax.models.layers import Normalise
from dl_jax.models.vision.resnet import ResNet


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "imagenet2012"  # TFDS name of a set of colour images of any sizes
    train_split: str = "train"  # TFDS split to learn from
    test_split: str = "validation"  # TFDS split to test on
    classes: Positive[int] = 1000  # classes of the set
    size: Positive[int] = 224  # side of the images that the network sees; pixels
    test_size: Positive[int] = 256  # shorter side to which test images are scaled before the crop; pixels
    blocks: Some[Positive[int]] = (3, 4, 6, 3)  # blocks of each stage: those of ResNet-50
    width: Positive[int] = 64  # maps of the first stage
    steps: Positive[int] = 125_100  # train steps: 100 epochs of 1,281,167 images
    batch_size: Positive[int] = 1024  # examples per step, over all devices
    learning_rate: Positive[float] = 0.1  # largest learning rate for each 256 examples of a batch
    warmup: Probability = 0.05  # fraction of the steps in which the learning rate rises
    momentum: Probability = 0.9  # Nesterov's momentum
    weight_decay: NonNegative[float] = 1e-4  # half the weight of the squared norm of the kernels in the loss
    label_smoothing: Probability = 0.1  # share of a label that is spread over all classes
    watch_every: Positive[int] = 6255  # steps between measurements on the test images (for the curve only)
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"  # type of activations; parameters are float32


PRESETS = {
    "paper": Config(),
    "large": Config(steps=15_640, batch_size=8192, watch_every=782),  # as many epochs in batches for larger slices
    "quick": Config(dataset="shapes", test_split="test", classes=10, size=28, test_size=32, blocks=(1, 1), width=16,
                    steps=200, batch_size=64, watch_every=100, compute_dtype="float32"),
    "smoke": Config(dataset="shapes", train_split="train[:64]", test_split="test[:20]", classes=10, size=16,
                    test_size=20, blocks=(1,), width=4, steps=2, batch_size=16, watch_every=2),
}  # fmt: skip

CLAIMS = (
    Claim("top1", paper="Flax ImageNet example", locator="README, TPU v3-32", claimed=76.54, tolerance=0.5, unit="%",
          better="higher", seeds=1, given={"dataset": "imagenet2012"}),
    on_shapes("top1", at_least=14.0, unit="%", note="logistic regression: 12 %"),
)  # fmt: skip

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels


def main(cfg: Config, run: Run) -> Mapping[str, np.ndarray]:
    if cfg.test_size < cfg.size:
        raise InputError(f"test_size is {cfg.test_size}, expected {cfg.size} or more, the size of the crop; enlarge it")
    net = ResNet(cfg.blocks, classes=cfg.classes, width=cfg.width, zero_scale=True, normalise=Normalise(MEAN, STD),
                 dtype=jnp.dtype(cfg.compute_dtype))  # fmt: skip
    see = augment.compose(classify.unit, augment.flip())
    loss = losses.label_smoothing(losses.with_batch(classify.loss(net.apply), see), cfg.classes, cfg.label_smoothing)
    rate = optim.warmup_cosine(cfg.learning_rate * cfg.batch_size / 256, cfg.steps, cfg.warmup)
    tx = optax.sgd(rate, cfg.momentum, nesterov=True)
    step = per_seed(make_step(losses.l2(loss, cfg.weight_decay), tx), one_by_one=True)
    test = data.images(cfg.dataset, cfg.test_split, size=cfg.test_size, classes=cfg.classes)
    crop = augment.compose(classify.unit, augment.centre_crop(cfg.size))

    def measure(variables, batch, key):
        logits: Any = net.apply(variables, crop(key, {"image": batch["image"]})["image"], train=False)
        given = logits, batch["label"], batch["mask"]
        return {"top1": metrics.accuracy(*given), "top5": metrics.top_k(*given, 5)}

    key_init, key, key_test = run.keys(3)  # [S] each
    test_of = evaluator(measure, test, cfg.batch_size, key_test)
    percent = lambda variables: jax.tree.map(lambda share: 100 * share, test_of(variables))
    window = data.resized_crop(cfg.size)
    only = lambda rng, example: window(rng, {"image": example["image"], "label": example["label"]})
    states = fit(
        step,
        start(net, tx, key_init, key, jnp.zeros((1, cfg.size, cfg.size, 3))),
        data.streamed(cfg.dataset, cfg.train_split, cfg.batch_size, run.seeds, transform=only),
        steps=cfg.steps,
        run=run,
        watch=Watch(cfg.watch_every, lambda variables: dict(percent(variables))),
    )
    return percent(states.variables)


if __name__ == "__main__":
    launch(main, PRESETS, CLAIMS)
