"""Networks that read two sentences tell better than TF-IDF how related they are, and whether one entails the other.

Marelli et al. 2014, "A SICK cure for the evaluation of compositional distributional semantic models" (LREC), whose data
are pairs of sentences with a degree of relatedness from 1 to 5 and one of three relations. The papers with numbers on
them use vectors of words that were learnt elsewhere (Tai et al. 2015, arXiv:1503.00075). Ours begin at random, so there
is no paper's number to reach.

    python experiments/text/match.py --preset paper --seeds 5 --workdir runs/match

Expected: the siamese network's degrees correlate better with the true ones than those of TF-IDF, and its relations are
right more often. Attention, without vectors that were learnt elsewhere, falls behind both (in pilots).

Two networks learn each task by itself. A siamese BiLSTM compares the vectors of the two sentences, and decomposable
attention aligns their words (Parikh et al. 2016, arXiv:1606.01933). As in Tai et al., section 4.2, relatedness is the
mean of a distribution over the whole degrees. The control sees the cosine, the product and the absolute difference of
the two TF-IDF vectors, and is a logistic or a ridge regression. The numbers are those after the last step, and the
hyper-parameters of networks and control were chosen on the validation split and on training pairs that were held out.
In the quick preset a text is related to every other word of its own, and not to those of another.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
import optax

from dl_jax import data, losses, metrics, optim
from dl_jax.core.errors import InputError
from dl_jax.core.evaluate import collector
from dl_jax.core.fit import fit
from dl_jax.core.step import Array, Batch, Tree, make_step, per_seed, start
from dl_jax.data import text
from dl_jax.harness import Claim, Distinct, Positive, Probability, Run, launch
from dl_jax.models.sequence.matching import DecomposableAttention, SiameseClassifier

Cell = Literal["siamese", "attention"]


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "sick2014"  # TFDS name of a set of pairs with labels and degrees, or docstrings
    train_split: str = "train"  # TFDS split to learn from
    test_split: str = "test"  # TFDS split to test on
    first: str = "sentence_A"  # column of the first texts
    second: str = "sentence_B"  # column of the second texts
    label: str = "label"  # column of the class labels
    degree: str = "relatedness_score"  # column of the degrees of relatedness
    relations: Positive[int] = 3  # different labels
    degrees: Positive[int] = 5  # the highest degree; the lowest is 1
    steps: Positive[int] = 1000  # train steps: 7 passes
    batch_size: Positive[int] = 32  # pairs per step, over all devices
    boundaries: tuple[Positive[int], ...] = (8, 12, 16)  # lengths to which shorter texts are padded
    longest: Positive[int] = 64  # words of a text that are read
    embedding: Positive[int] = 100  # width of a word's vector
    hidden: Positive[int] = 100  # units of a recurrent layer in one direction, and of the attention's layers
    dropout: Probability = 0.0  # dropout probability
    learning_rate: Positive[float] = 2e-3  # peak learning rate of Adam
    cells: Distinct[Cell] = ("siamese", "attention")  # the networks


PRESETS = {
    "paper": Config(),
    "quick": Config(dataset="docstrings", steps=400, embedding=32, hidden=32),
    "smoke": Config(dataset="docstrings", train_split="train[:64]",
                    test_split="test[:32]", steps=2, batch_size=8, boundaries=(), embedding=8, hidden=8,
                    cells=("attention",)),
}  # fmt: skip

ours = functools.partial(Claim, paper="our bar", better="higher", given={"dataset": "sick2014"})
CLAIMS = (
    ours("pearson/siamese", versus="pearson/tfidf", locator="relatedness, siamese network against TF-IDF",
         note="A pilot of one seed with a dropout of 0.1, on the validation split: 0.806 against 0.751."),
    ours("accuracy/siamese", versus="accuracy/tfidf", unit="%", locator="relation, siamese network against TF-IDF",
         note="A first run of five seeds had a dropout of 0.1 and missed: 81.8 against 82.4 %. Dropout was then left "
         "out, because of pilots on the last 1,000 training pairs: 84.1 % without it, 81.1 with 0.1, 82.2 with 0.1 and "
         "three times as many steps, 76.2 with 0.3, and 82.2 of TF-IDF."),
)  # fmt: skip
KEEPS = ("vocabulary.json",)  # files in the run's folder

TASKS = ("relation", "relatedness")
NETWORKS = {"siamese": SiameseClassifier, "attention": DecomposableAttention}


def main(cfg: Config, run: Run) -> Mapping[str, np.ndarray]:
    train, test = (pairs(cfg, split) for split in (cfg.train_split, cfg.test_split))
    data.check_two_classes(train["relation"].argmax(-1), cfg.dataset)
    found = {name: np.full(len(run.seeds), value) for name, value in tfidf_scores(train, test).items()}
    words = text.vocabulary(np.concatenate([read(train[side], cfg.longest).values for side in ("first", "second")]))
    run.keep("vocabulary.json", words.kept())
    learnt, tested = (encoded(each, words, cfg.longest) for each in (train, test))
    boundaries = data.widths(cfg.boundaries, learnt["length"], tested["length"])
    stream = data.bucketed(learnt, "length", boundaries, cfg.batch_size, run.seeds)
    parts = data.buckets(tested, "length", boundaries)
    tx = optax.adam(optim.warmup_cosine(cfg.learning_rate, cfg.steps))
    key_init, key = run.keys(2)  # [S] each
    for task in TASKS:
        for name in cfg.cells:
            network, classes = NETWORKS[name], learnt[task].shape[1]
            model = network(len(words), classes, cfg.embedding, cfg.hidden, dropout=cfg.dropout)
            states = fit(
                per_seed(make_step(functools.partial(matching_loss, model, task), tx)),
                start(model, tx, key_init, key, *(np.ones((1, 2), np.int32),) * 2),
                stream,
                steps=cfg.steps,
                run=run / f"{task}_{name}",
            )
            answer = collector(functools.partial(probabilities, model), 8 * cfg.batch_size)
            answers = [answer(states.variables, part) for part in parts]  # [S, N, K] each
            truth = np.concatenate([part[task] for part in parts])
            found |= {f"{metric}/{name}": v for metric, v in scores(task, np.concatenate(answers, 1), truth).items()}
    return found


def pairs(cfg: Config, split: str) -> dict[str, np.ndarray]:
    """The texts `first` and `second` of a split, bytes [N], and for each of `TASKS` a distribution, float32 [N, K].

    Of `docstrings`, whose columns are no pairs, every other first sentence is beside every other of its own words, and
    the rest are beside those of the next sentence.
    """
    if cfg.dataset == "docstrings":
        texts = data.load(cfg.dataset, split, only=("summary",))["summary"]
        own, rows = np.arange(len(texts)) % 2, np.arange(len(texts))
        thinned = np.array([b" ".join(each.split()[::2]) for each in texts.tolist()])
        second = thinned[np.where(own, rows, np.roll(rows, -1))]
        records: Mapping[str, Any] = {"first": texts, "second": second, "label": own, "degree": 1 + 4 * own}
        names = "first", "second", "label", "degree"
    else:
        names = cfg.first, cfg.second, cfg.label, cfg.degree
        records = data.load(cfg.dataset, split, only=names)
        expected = "two texts and a degree for each pair; name other columns"
        data.check_columns(records, {cfg.first: "S", cfg.second: "S", cfg.degree: "f"}, cfg.dataset, expected)
    first, second, label, degree = (records[name] for name in names)
    data.check_labels({"label": label}, cfg.dataset, cfg.relations)
    return {
        "first": first,
        "second": second,
        "relation": np.eye(cfg.relations, dtype=np.float32)[label],
        "relatedness": mixtures(degree, cfg.degrees),
    }


def mixtures(degrees: np.ndarray, highest: int) -> np.ndarray:  # [N] -> float32 [N, highest]
    """Distributions over the whole degrees 1, 2, ... `highest` with these means (Tai et al. 2015, equation 15).

    Raises InputError for a degree outside of them.
    """
    if not 1 <= degrees.min() <= degrees.max() <= highest:
        raise InputError(
            f"degrees from {degrees.min():g} to {degrees.max():g}, expected 1 to {highest}; set --degrees, or choose "
            "another --degree"
        )
    return np.maximum(0, 1 - np.abs(degrees[:, None] - np.arange(1, highest + 1))).astype(np.float32)


def read(texts: np.ndarray, longest: int) -> data.Ragged:  # bytes [N] -> bytes [N, L]
    return text.split(texts, lambda each: text.kim_words(each)[:longest], empty="<none>")


def encoded(given: Mapping[str, np.ndarray], words: text.Vocabulary, longest: int) -> dict[str, Any]:
    """The pairs with ids in place of texts, and the numbers of words; `length` is the larger one."""
    first, second = (read(given[side], longest) for side in ("first", "second"))
    return {
        **{task: given[task] for task in TASKS},
        "first": first.of(words.ids(first.values)),
        "second": second.of(words.ids(second.values)),
        "first_length": first.lengths,
        "second_length": second.lengths,
        "length": np.maximum(first.lengths, second.lengths),
    }


def logits_of(model: Any, variables: Tree, batch: Batch, **settings: Any) -> Array:
    columns = ("first", "second", "first_length", "second_length")
    return model.apply(variables, *(batch[name] for name in columns), **settings)


def matching_loss(model: Any, task: str, variables: Tree, batch: Batch, key: Array):
    logits = logits_of(model, variables, batch, train=True, rngs={"dropout": key})
    return losses.soft_cross_entropy(logits, batch[task]).mean(), ({}, {})


def probabilities(model: Any, variables: Tree, batch: Batch) -> Array:  # -> [B, K]
    return jax.nn.softmax(logits_of(model, variables, batch, train=False))


def scores(task: str, found: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:  # [S, N, K], [N, K] -> [S]
    """The accuracy of the relation in per cent, or the correlations of the mean degree."""
    if task == "relation":
        return {"accuracy": 100 * (found.argmax(-1) == truth.argmax(-1)).mean(-1)}
    degrees = np.arange(1, truth.shape[1] + 1)
    return {"pearson": metrics.pearson(found @ degrees, truth @ degrees),
            "spearman": metrics.spearman(found @ degrees, truth @ degrees)}  # fmt: skip


def tfidf_scores(train: Mapping[str, np.ndarray], test: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The same metrics of a logistic and a ridge regression on pairs of TF-IDF vectors."""
    import scipy.sparse
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge

    vectors = TfidfVectorizer(decode_error="replace").fit(np.concatenate([train["first"], train["second"]]))

    def features(given: Mapping[str, np.ndarray]) -> Any:
        u, v = (vectors.transform(given[side]) for side in ("first", "second"))
        return scipy.sparse.hstack([abs(u - v), u.multiply(v), u.multiply(v).sum(1)]).tocsr()

    x, x_test = features(train), features(test)
    relation = LogisticRegression(C=10, max_iter=1000).fit(x, train["relation"].argmax(-1)).predict(x_test)
    degrees = np.arange(1, train["relatedness"].shape[1] + 1)
    guess, degree = (
        Ridge(alpha=1.0).fit(x, train["relatedness"] @ degrees).predict(x_test),
        test["relatedness"] @ degrees,
    )
    return {
        "accuracy/tfidf": 100 * float((relation == test["relation"].argmax(-1)).mean()),
        "pearson/tfidf": float(metrics.pearson(guess, degree)),
        "spearman/tfidf": float(metrics.spearman(guess, degree)),
    }


if __name__ == "__main__":
    launch(main, PRESETS, CLAIMS)
