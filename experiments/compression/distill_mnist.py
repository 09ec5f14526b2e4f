"""A network of 800-800 units learns from a better one's soft outputs, and recognises threes without ever seeing one.

Hinton, Vinyals & Dean 2015, "Distilling the knowledge in a neural network", section 3.

    python experiments/compression/distill_mnist.py --dataset mnist --preset paper --seeds 3 --workdir runs/distill

Expected on 10,000 test digits: 67 errors for the teacher, 146 for the student trained alone and 74 for the distilled
student, within the tolerances of the claims. If the transfer set has no 3, at least 95 % of the threes are recognised
once the bias of this class is corrected. A seed takes some 40 minutes on a CPU core. The teacher of `--preset long`
learns for ten times as long, as the note of its claim explains; that preset is meant for an accelerator.

As in the paper: the networks, dropout, a bound on the weights, jitter of two pixels, and the temperature 20. The paper
does not give the optimiser, the batch size, the number of epochs, the value of the bound and the weight of the hard
labels. Ours are SGD with momentum and a cosine schedule, the bound of the dropout paper (squared norm 15), and a weight
of 0.1. They were fixed before the first run. The gradient is clipped, which was chosen on validation digits: without
it, training diverges at twice the learning rate. The paper chooses the bias of the unseen class by the test error. Ours
is chosen so that threes are predicted on the training digits as often as they occur there; the paper's choice is
reported beside it (`bias_tuned_on_test`).
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dl_jax import augment, classify, data, losses, optim
from dl_jax.compress import distill
from dl_jax.core.errors import InputError
from dl_jax.core.evaluate import collector
from dl_jax.core.fit import fit
from dl_jax.core.step import Loss, Tree, make_step, per_seed, start
from dl_jax.harness import Claim, NonNegative, Positive, Probability, Run, Some, launch, on_digits
from dl_jax.models.vision.mlp import MLP


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "mnist"  # TFDS name of a set of ten classes of 28x28 or 8x8 grey images
    train_split: str = "train"  # TFDS split to learn from
    test_split: str = "test"  # TFDS split to test on
    teacher_hidden: Some[Positive[int]] = (1200, 1200)  # units of the teacher's layers
    student_hidden: Some[Positive[int]] = (800, 800)  # units of the student's layers
    teacher_epochs: Positive[int] = 60  # epochs of the teacher on the training set
    student_epochs: Positive[int] = 40  # epochs of each student on its transfer set
    batch_size: Positive[int] = 250  # examples per step, over all devices
    learning_rate: Positive[float] = 0.1  # peak learning rate
    momentum: Probability = 0.9  # momentum of SGD
    clip: Positive[float] = 1.0  # largest norm of the gradient
    dropout: Probability = 0.5  # probability that the teacher drops a hidden unit
    input_dropout: Probability = 0.2  # probability that the teacher drops a pixel
    max_norm: Positive[float] = 15**0.5  # largest norm of the incoming weights of each unit of the teacher
    jitter: NonNegative[int] = 2  # largest shift of the digits that the teacher is trained on; pixels
    temperature: Positive[float] = 20.0  # temperature of the soft targets
    hard_weight: NonNegative[float] = 0.1  # weight of the hard-label cross-entropy in the loss (soft-target loss: 1)


PRESETS = {
    "paper": Config(),
    "long": Config(teacher_epochs=600),
    "quick": Config(dataset="digits", teacher_hidden=(400, 400), student_hidden=(100, 100), teacher_epochs=60,
                    student_epochs=60, batch_size=50, learning_rate=0.05),
    "smoke": Config(dataset="digits", train_split="train[:120]", test_split="test[:60]", teacher_hidden=(16,),
                    student_hidden=(8,), teacher_epochs=1, student_epochs=1, batch_size=16),
}  # fmt: skip

LESS = "Fewer errors than in the paper; we do not know why. Its optimiser and the weight of its labels are unknown."
PASSES = (
    "60 epochs are too few, given dropout and jitter. On the last 10,000 training digits, three seeds, the teacher "
    "makes 112 ± 2 errors after 60 epochs, 83 ± 2 after 240 and 68 ± 4 after 600. After 240 it makes 88 ± 6 at a rate "
    "of 0.03, 97 ± 4 in batches of 100, and 78 ± 6 with a jitter of one pixel. The paper does not give its epochs. The "
    "preset long has 600, which are hours of a CPU; it has not been run."
)
TUNED = "The paper's bias was chosen on the test set."
claim = functools.partial(Claim, paper="Hinton et al. 2015", seeds=3, given={"dataset": "mnist"})
count = functools.partial(claim, unit="errors")
CLAIMS = (
    count("errors/teacher", locator="section 3, teacher", claimed=67, tolerance=13,
          note=PASSES),
    count("errors/plain", locator="section 3, student alone", claimed=146, tolerance=29),
    count("errors/distilled", locator="section 3, student at T = 20", claimed=74, tolerance=17,
          note="The teacher, from which it learns, misses its number too."),
    count("errors/teacher", locator="section 3, teacher", claimed=67, tolerance=13, preset="long"),
    count("errors/distilled", locator="section 3, student at T = 20", claimed=74, tolerance=17, preset="long"),
    count("errors/distilled", versus="errors/plain", locator="section 3, distilled against alone", claimed=-72,
          tolerance=27),
    count("errors/no_three", locator="section 3, no 3, no bias rule", claimed=206, tolerance=29, note=LESS),
    count("errors/no_three/bias", locator="section 3, no 3, our bias rule", claimed=109, tolerance=21, note=TUNED),
    count("errors/no_three/bias_tuned_on_test", locator="section 3, no 3, the paper's bias rule", claimed=109,
          tolerance=21),
    claim("threes_right/no_three/bias", locator="section 3, no 3, our bias rule", claimed=98.6, tolerance=3.6, unit="%",
          better="higher"),
    count("errors/sevens_eights", locator="section 3, only 7 and 8, no bias rule", claimed=4730, tolerance=300,
          verified=False, note=LESS),
    count("errors/sevens_eights/bias", locator="section 3, only 7 and 8, our bias rule", claimed=1320, tolerance=300,
          verified=False, note=f"{LESS} {TUNED}"),
    on_digits("errors/distilled", at_most=36, unit="errors", note="logistic regression: 36"),
    on_digits("threes_right/no_three/bias", at_least=19, unit="%", note="guessing: 10 %"),
)  # fmt: skip

THREE, SEVENS_EIGHTS = np.arange(10) == 3, np.isin(np.arange(10), (7, 8))  # classes, bool [10]


Columns = Mapping[str, np.ndarray]


def main(cfg: Config, run: Run) -> Mapping[str, np.ndarray]:
    train, test = (data.grey_images(cfg.dataset, split) for split in (cfg.train_split, cfg.test_split))
    big = MLP(cfg.teacher_hidden, dropout=cfg.dropout, input_dropout=cfg.input_dropout)
    small = MLP(cfg.student_hidden)
    smallest = min(len(only(train, classes)["label"]) for classes in (~THREE, SEVENS_EIGHTS))
    for epochs, digits in ((cfg.teacher_epochs, len(train["label"])), (cfg.student_epochs, smallest)):
        if epochs * digits < cfg.batch_size:
            raise InputError(
                f"{epochs} epochs of {digits} digits make no batch of {cfg.batch_size}, expected one or more; raise "
                "the epochs or lower the batch size"
            )
    jittered = augment.compose(classify.unit, augment.pad_and_crop(cfg.jitter))
    teach = losses.with_batch(classify.loss(big.apply), jittered)
    alone = classify.loss(small.apply)
    soft = distill.loss(small.apply, cfg.temperature)
    both = losses.weighted_sum({"soft": (1.0, soft), "hard": (cfg.hard_weight, alone)})

    def trained(name: str, model: MLP, loss: Loss, sets: Sequence[Columns], epochs: int, *last) -> Tree:
        """Trains `model` on the set of each seed, with the transforms `last` after SGD. Returns variables [S, ...]."""
        steps = epochs * len(sets[0]["label"]) // cfg.batch_size
        tx = optax.chain(optim.clipped_sgd(cfg.learning_rate, steps, cfg.momentum, cfg.clip), *last)
        states = start(model, tx, *keys_of(model, run.seeds), jnp.zeros((1, 28, 28, 1)))
        pairs = zip(sets, run.seeds, strict=True)
        stream = data.per_seed([data.shuffled(records, cfg.batch_size, seed) for records, seed in pairs])
        step = per_seed(make_step(loss, tx), one_by_one=True)
        return fit(step, states, stream, steps=steps, run=run / name).variables

    def logits(model: MLP, variables: Tree, records: Columns) -> np.ndarray:  # [S, N, 10]
        predict = lambda variables, batch: model.apply(variables, classify.to_unit(batch["image"]), train=False)
        return collector(predict, 4 * cfg.batch_size)(variables, {"image": records["image"]})

    same = [train for _ in run.seeds]
    teacher = trained("teacher", big, teach, same, cfg.teacher_epochs, optim.max_norm(cfg.max_norm))
    answers = [{**train, "teacher_logits": each} for each in logits(big, teacher, train)]
    plain = trained("plain", small, alone, same, cfg.student_epochs)
    distilled = trained("distilled", small, both, answers, cfg.student_epochs)
    found = {
        "errors/teacher": wrong(logits(big, teacher, test), test["label"]),
        "errors/plain": wrong(logits(small, plain, test), test["label"]),
        "errors/distilled": wrong(logits(small, distilled, test), test["label"]),
    }
    for name, group, seen in (("no_three", THREE, ~THREE), ("sevens_eights", SEVENS_EIGHTS, SEVENS_EIGHTS)):
        student = trained(name, small, both, [only(each, seen) for each in answers], cfg.student_epochs)
        on_train, on_test = logits(small, student, train), logits(small, student, test)
        share = float(group[train["label"]].mean())
        bias = np.array([distill.matched_bias(each, group, share) for each in on_train])  # [S]
        biased = on_test + bias[:, None, None] * group
        tuned = [distill.fewest_errors(each, group, test["label"]) for each in on_test]
        found |= {
            f"errors/{name}": wrong(on_test, test["label"]),
            f"errors/{name}/bias": wrong(biased, test["label"]),
            f"errors/{name}/bias_tuned_on_test": np.array(tuned),
        }
        if name == "no_three":
            threes = test["label"] == 3
            found["threes_right/no_three/bias"] = 100 * (biased[:, threes].argmax(-1) == 3).mean(1)
    return found


def keys_of(model: MLP, seeds: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """The keys [S] for the initial parameters and the keys [S] for training.

    All students of a seed have the same initial parameters.
    """
    one = lambda seed: jax.random.split(jax.random.fold_in(jax.random.key(seed), sum(model.hidden)))
    keys = jax.vmap(one)(np.array(seeds))  # [S, 2]
    return keys[:, 0], keys[:, 1]


def only(records: Columns, classes: np.ndarray) -> dict[str, np.ndarray]:
    """The rows of `records` whose label is one of `classes`, bool [10]."""
    kept = classes[records["label"]]
    return data.rows(records, kept)


def wrong(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:  # [S, N, 10], [N] -> int [S]
    """The number of errors of each seed."""
    return (logits.argmax(-1) != labels).sum(-1)


if __name__ == "__main__":
    launch(main, PRESETS, CLAIMS)
