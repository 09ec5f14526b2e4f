"""A convolutional network whose vectors of words begin at random sorts questions into six kinds.

Kim 2014, "Convolutional Neural Networks for Sentence Classification" (arXiv:1408.5882), Table 2, CNN-rand, TREC.

    python experiments/text/classify.py --preset paper --seeds 5 --workdir runs/classify
    python experiments/text/classify.py --preset reviews --seeds 5 --workdir runs/reviews

Expected: 91.2 ± 2.5 % of TREC's questions, and at least 74 % of sentences from movie reviews (MR) by a bar of our own,
because the set `rotten_tomatoes_mr` has one split and the paper's 76.1 % are of ten-fold cross-validation. A logistic
regression on TF-IDF, shown beside them, has more of both, 78.5 % of the reviews for validation.

Words, sizes, dropout, Adadelta, the limit on the norms of the last layer, batches of 50 and, of TREC, 25 passes are
those of the paper and of its author's code, and the test accuracy is that of the pass with the best accuracy on a tenth
of the training split, or of MR on the split for validation. Ours batches sentences of similar lengths, has one vector
for all words that the training split has not, and reads TREC in lower case, where the author's code keeps it. Two more
networks, an LSTM in both directions and one with attention, learn the same batches with Adam.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import optax

from dl_jax import data, losses, metrics, optim
from dl_jax.core.errors import InputError
from dl_jax.core.evaluate import evaluator
from dl_jax.core.fit import Watch, fit
from dl_jax.core.step import Array, Batch, Tree, make_step, per_seed, start
from dl_jax.data import text
from dl_jax.harness import Claim, Distinct, Positive, Probability, Run, launch
from dl_jax.models.sequence.attention import AttentionClassifier
from dl_jax.models.sequence.rnn import SequenceClassifier
from dl_jax.models.sequence.text_cnn import TextCNN, is_output_kernel

Cell = Literal["cnn", "lstm", "attention"]


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "trec"  # TFDS name of a set of English texts with a class label
    text: str = "text"  # its column of texts
    label: str = "label-coarse"  # its column of labels
    train_split: str = "train[:90%]"  # TFDS split to learn from
    dev_split: str = "train[90%:]"  # TFDS split on which the best pass is chosen
    test_split: str = "test"  # TFDS split to test on
    steps: Positive[int] = 2450  # train steps: 25 passes
    batch_size: Positive[int] = 50  # texts per step, over all devices
    boundaries: tuple[Positive[int], ...] = (8, 16, 32)  # lengths to which shorter texts are padded
    embedding: Positive[int] = 300  # width of a word's vector in the convolutional network
    maps: Positive[int] = 100  # maps of each of its three widths
    dropout: Probability = 0.5  # dropout probability
    max_norm: Positive[float] = 3.0  # largest norm of a class's weights in the convolutional network
    hidden: Positive[int] = 100  # units of the recurrent layers in one direction, and width of their words' vectors
    learning_rate: Positive[float] = 2e-3  # peak learning rate of Adam, for the recurrent networks
    watch_every: Positive[int] = 98  # steps between measurements
    cells: Distinct[Cell] = ("cnn", "lstm", "attention")  # the networks


PRESETS = {
    "paper": Config(),
    "reviews": Config(dataset="rotten_tomatoes_mr", label="label", train_split="train", dev_split="validation",
                      steps=1700, watch_every=170),
    "quick": Config(dataset="docstrings", text="summary", label="label", train_split="train", dev_split="validation",
                    steps=300, embedding=64, maps=32, hidden=32, watch_every=100),
    "smoke": Config(dataset="docstrings", text="summary", label="label", train_split="train[:64]",
                    dev_split="validation[:16]", test_split="test[:16]", steps=2, batch_size=8, boundaries=(),
                    embedding=4, maps=2, hidden=2, watch_every=2, cells=("cnn",)),
}  # fmt: skip

CLAIMS = (
    Claim("accuracy/cnn", paper="Kim 2014", locator="Table 2, CNN-rand, TREC", claimed=91.2, tolerance=2.5, unit="%",
          better="higher", given={"dataset": "trec", "label": "label-coarse"},
          note="No win over the logistic regression is claimed."),
    Claim("accuracy/cnn", paper="our bar", locator="movie reviews, one split", at_least=74.0, unit="%",
          preset="reviews", given={"dataset": "rotten_tomatoes_mr", "label": "label"},
          note="A pilot of one seed on the split for validation: 76.3 %, and the regression 78.5 %; 25 passes were no "
          "better than the first 10."),
)  # fmt: skip
KEEPS = ("vocabulary.json",)  # files in the run's folder


class Network(NamedTuple):
    """A classifier of tokens int [B, T] of some lengths int [B], and its optimiser."""

    model: Any
    tx: optax.GradientTransformation


def main(cfg: Config, run: Run) -> Mapping[str, np.ndarray]:
    splits = [labelled(cfg, split) for split in (cfg.train_split, cfg.dev_split, cfg.test_split)]
    data.check_two_classes(splits[0]["label"], cfg.dataset)
    words = [text.split(each["text"], text.kim_words, empty="<none>") for each in splits]
    known = text.vocabulary(words[0].values)
    run.keep("vocabulary.json", known.kept())
    train, dev, test = (
        {"word": w.of(known.ids(w.values)), "length": w.lengths, "label": each["label"]}
        for w, each in zip(words, splits, strict=True)
    )
    boundaries = data.widths(cfg.boundaries, *(each["length"] for each in (train, dev, test)))
    classes = 1 + max(int(each["label"].max()) for each in splits)
    stream = data.bucketed(train, "length", boundaries, cfg.batch_size, run.seeds)
    key_init, key = run.keys(2)  # [S] each
    found = {"accuracy/tfidf": np.full(len(run.seeds), tfidf_accuracy(splits[0], splits[2]))}
    nets = networks(cfg, len(known), classes)
    for name in cfg.cells:
        model, tx = nets[name]
        evaluate = {
            split: evaluator(
                functools.partial(accuracy, model), data.buckets(part, "length", boundaries), 5 * cfg.batch_size, key
            )
            for split, part in {"dev": dev, "test": test}.items()
        }
        fit(
            per_seed(make_step(functools.partial(classification_loss, model), tx)),
            start(model, tx, key_init, key, np.ones((1, 2), np.int32), np.ones(1, np.int32)),
            stream,
            steps=cfg.steps,
            run=run / name,
            # Both accuracies are measured after every pass, but only that on `dev` is selected on.
            watch=Watch(
                cfg.watch_every, lambda v, of=evaluate: {split: 100 * f(v)["accuracy"] for split, f in of.items()}
            ),
        )
        best = np.argmax((run / name).history("watch/dev")[1], 0)  # [S]
        found[f"accuracy/{name}"] = (run / name).history("watch/test")[1][best, np.arange(len(best))]
    return found


def labelled(cfg: Config, split: str) -> Mapping[str, np.ndarray]:
    """The texts of a split, bytes [N], and their labels, int [N].

    Raises InputError for columns of another kind, and where a text has no label.
    """
    records = data.load(cfg.dataset, split, only=(cfg.text, cfg.label))
    expected = "a text or a class label for each example; give the columns as --text and --label"
    data.check_columns(records, {cfg.text: "S", cfg.label: "i"}, cfg.dataset, expected)
    if (least := records[cfg.label].min()) < 0:
        raise InputError(f"{cfg.dataset}'s split {split} has the label {least}, expected 0 or more; use a labelled one")
    return {"text": records[cfg.text], "label": records[cfg.label]}


def networks(cfg: Config, vocabulary: int, classes: int) -> dict[str, Network]:
    adadelta = optax.chain(optax.adadelta(1.0, rho=0.95, eps=1e-6), optim.max_norm(cfg.max_norm, is_output_kernel))
    adam = optax.adam(optim.warmup_cosine(cfg.learning_rate, cfg.steps))
    hidden, dropout = cfg.hidden, cfg.dropout
    lstm = SequenceClassifier(vocabulary, classes, hidden, hidden, bidirectional=True, dropout=dropout)
    return {
        "cnn": Network(TextCNN(vocabulary, classes, cfg.embedding, cfg.maps, dropout=dropout), adadelta),
        "lstm": Network(lstm, adam),
        "attention": Network(AttentionClassifier(vocabulary, classes, hidden, hidden, hidden, dropout=dropout), adam),
    }


def classification_loss(model: Any, variables: Tree, batch: Batch, key: Array):
    logits = model.apply(variables, batch["word"], batch["length"], train=True, rngs={"dropout": key})
    return losses.cross_entropy(logits, batch["label"]).mean(), ({}, {})


def accuracy(model: Any, variables: Tree, batch: Batch, key: Array):
    logits = model.apply(variables, batch["word"], batch["length"], train=False)
    return {"accuracy": metrics.accuracy(logits, batch["label"], batch["mask"])}


def tfidf_accuracy(train: Mapping[str, np.ndarray], test: Mapping[str, np.ndarray]) -> float:
    """The accuracy in per cent of a logistic regression on TF-IDF of words and pairs of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    vectors = TfidfVectorizer(decode_error="replace", ngram_range=(1, 2), token_pattern=r"\S+")
    regression = make_pipeline(vectors, LogisticRegression(C=30, max_iter=1000))
    return 100 * regression.fit(train["text"], train["label"]).score(test["text"], test["label"])


if __name__ == "__main__":
    launch(main, PRESETS, CLAIMS)
