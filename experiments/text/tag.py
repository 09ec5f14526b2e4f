"""A BiLSTM tags words, with and without features of their characters, and with and without a chain over the tags.

Ma & Hovy 2016, "End-to-end Sequence Labeling via Bi-directional LSTM-CNNs-CRF" (arXiv:1603.01354). Their vectors of
words were learnt on other texts. Ours begin at random, and no paper has numbers for this on these sets, so the bars are
our own.

    python experiments/text/tag.py --preset paper --seeds 5 --workdir runs/tag
    python experiments/text/tag.py --preset names --seeds 5 --workdir runs/names

Expected: at least 92.5 % of the parts of speech in Universal Dependencies' English Web Treebank. More are right with
characters than without, and a chain (CRF) loses no 0.1 points. The names in WNUT-17 are found with an F1 of at least 15
%, which is better with a chain than without one.

Four networks learn the same sentences in the same order. They read words in small letters, of which those that occur
once are unknown, and the first bytes of words as they are written. The tag "_", which rows of multi-word tokens carry,
is learnt like any other, but does not count in evaluations. Tags in BIO are scored by the F1 of entities. The test
numbers are those after the last step, and the hyper-parameters were chosen on the split for development. Any set with
tokens and one class label for each will do: `--dataset universal_dependencies/de_gsd`. The quick preset tags tokens of
Python's own standard library.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import optax

from dl_jax import data, masks, metrics, optim
from dl_jax.core.errors import InputError
from dl_jax.core.evaluate import collector
from dl_jax.core.fit import Watch, fit
from dl_jax.core.step import Array, Batch, Tree, make_step, per_seed, start
from dl_jax.data import text
from dl_jax.harness import Claim, Distinct, Positive, Probability, Run, launch
from dl_jax.losses import crf
from dl_jax.models.sequence.tagger import ChainTagger, Tagger

Cell = Literal["softmax", "crf", "softmax_chars", "crf_chars"]


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "universal_dependencies/en_ewt"  # TFDS name of a set of sentences with a column `tokens`
    tags: str = "upos"  # its column of a class label for each token
    train_split: str = "train"  # TFDS split to learn from
    dev_split: str = "dev"  # TFDS split to watch
    test_split: str = "test"  # TFDS split to test on
    steps: Positive[int] = 1960  # train steps: 5 passes
    batch_size: Positive[int] = 32  # sentences per step, over all devices
    boundaries: tuple[Positive[int], ...] = (8, 16, 32)  # lengths to which shorter sentences are padded
    at_least: Positive[int] = 2  # times that a word has to occur to be known
    letters: Positive[int] = 16  # bytes of a word that are read
    embedding: Positive[int] = 100  # width of a word's vector
    hidden: Positive[int] = 100  # units of the recurrent layer in one direction
    dropout: Probability = 0.5  # dropout probability of characters, and on both sides of the recurrent layer
    learning_rate: Positive[float] = 4e-3  # peak learning rate of Adam
    clip: Positive[float] = 5.0  # largest norm of the gradient
    watch_every: Positive[int] = 490  # steps between measurements on the split for development
    cells: Distinct[Cell] = ("softmax", "crf", "softmax_chars", "crf_chars")  # the networks


PRESETS = {
    "paper": Config(),
    "names": Config(dataset="wnut17", tags="ner", steps=3180, watch_every=636, cells=("softmax_chars", "crf_chars")),
    "quick": Config(dataset="python_tokens", tags="tags", dev_split="validation", steps=300, hidden=32, embedding=32,
                    watch_every=100),
    "smoke": Config(dataset="python_tokens", tags="tags", train_split="train[:64]", dev_split="validation[:16]",
                    test_split="test[:16]", steps=2, batch_size=8, boundaries=(), letters=4, embedding=4, hidden=4,
                    watch_every=2, cells=("crf_chars",)),
}  # fmt: skip

ours = functools.partial(Claim, paper="our bar", unit="%", better="higher")
speech = functools.partial(ours, given={"dataset": "universal_dependencies/en_ewt", "tags": "upos"})
entities = functools.partial(ours, preset="names", given={"dataset": "wnut17", "tags": "ner"})
PILOT = "A pilot of one seed, on the split for development: "
CLAIMS = (
    speech("accuracy/crf_chars", at_least=92.5, locator="parts of speech, characters and a chain",
           note=PILOT + "93.6."),
    speech("accuracy/crf_chars", versus="accuracy/crf", note=PILOT + "93.6 against 91.5.",
           locator="parts of speech, characters against none, with a chain"),
    speech("accuracy/softmax_chars", versus="accuracy/softmax",
           locator="parts of speech, characters against none, without a chain"),
    speech("accuracy/crf_chars", versus="accuracy/softmax_chars", locator="parts of speech, a chain against none",
           claimed=0.0, tolerance=0.1, note=PILOT + "93.62 against 93.60."),
    entities("f1/crf_chars", at_least=15.0, locator="names, characters and a chain", note=PILOT + "22.5."),
    entities("f1/crf_chars", versus="f1/softmax_chars", locator="names, a chain against none",
             note=PILOT + "22.5 against 20.7."),
)  # fmt: skip
KEEPS = ("vocabulary.json", "tags.json")  # files in the run's folder

# Examples of words [B, T], lengths [B] and characters [B, T, C].
INPUTS = np.ones((1, 2), np.int32), np.ones(1, np.int32), np.ones((1, 2, 1), np.int32)


def main(cfg: Config, run: Run) -> Mapping[str, np.ndarray]:
    columns = [sentences(cfg, split) for split in (cfg.train_split, cfg.dev_split, cfg.test_split)]
    words = text.vocabulary(lowered(columns[0]["text"].values), cfg.at_least)
    names = data.info(cfg.dataset).labels[cfg.tags]
    train, dev, test = (encoded(each, words, cfg.letters) for each in columns)
    boundaries = data.widths(cfg.boundaries, *(each["length"] for each in (train, dev, test)))
    run.keep("vocabulary.json", words.kept())
    run.keep("tags.json", names)
    stream = data.bucketed(train, "length", boundaries, cfg.batch_size, run.seeds)
    held_out = {split: data.buckets(part, "length", boundaries) for split, part in {"dev": dev, "test": test}.items()}
    rate = optim.warmup_cosine(cfg.learning_rate, cfg.steps)
    tx = optax.chain(optax.clip_by_global_norm(cfg.clip), optax.adam(rate))
    key_init, key = run.keys(2)  # [S] each
    found: dict[str, np.ndarray] = {}
    for name in cfg.cells:
        network, characters = ChainTagger if "crf" in name else Tagger, 256 if "chars" in name else 0
        model = network(len(words), len(names), cfg.embedding, cfg.hidden, characters, dropout=cfg.dropout)
        answer = collector(functools.partial(best_tags, model), 2 * cfg.batch_size)
        states = fit(
            per_seed(make_step(functools.partial(tagging_loss, model), tx)),
            start(model, tx, key_init, key, *INPUTS[: 2 + bool(characters)]),
            stream,
            steps=cfg.steps,
            run=run / name,
            watch=Watch(cfg.watch_every, functools.partial(tested, names, answer, held_out["dev"])),
        )
        last = tested(names, answer, held_out["test"], states.variables)
        found |= {f"{metric}/{name}": value for metric, value in last.items()}
    return found


def sentences(cfg: Config, split: str) -> dict[str, Any]:
    """The words of a split, text [N, L], their tags, int [N, L], and the numbers of words, int [N].

    Raises InputError where `cfg.tags` is no column of a class label for each token, and where a label is missing.
    """
    records = data.load(cfg.dataset, split, only=("tokens", cfg.tags))
    tokens, tags = records["tokens"], records[cfg.tags]
    ragged = isinstance(tags, data.Ragged) and isinstance(tokens, data.Ragged)
    labelled = cfg.tags in data.info(cfg.dataset).labels
    if not (ragged and labelled and np.array_equal(tags.lengths, tokens.lengths)):
        raise InputError(
            f"the column {cfg.tags!r} of {cfg.dataset} is {tags.dtype} {tags.shape}, expected a class label for each "
            f"of the tokens {tokens.shape}; name another with --tags"
        )
    if tags.values.min(initial=0) < 0:
        raise InputError(f"split {split} of {cfg.dataset} has words without a label, expected labels; choose another")
    return {"text": tokens, "tag": tags, "length": records["tokens/length"]}


def lowered(words: np.ndarray) -> np.ndarray:  # bytes [N] -> str [N]
    """The words in small letters, which may be longer; `np.char.lower` would cut them."""
    different, place = np.unique(words, return_inverse=True)
    return np.array([word.decode("utf-8", "surrogateescape").lower() for word in different.tolist()])[place]


def encoded(columns: dict[str, Any], words: text.Vocabulary, letters: int) -> dict[str, Any]:
    """The sentences with ids of words, int [N, L], and bytes of words, [N, L, letters], in place of text."""
    written = columns["text"]
    ids, characters = words.ids(lowered(written.values)), text.letters(written.values, letters)
    return {
        "word": written.of(ids),
        "chars": written.of(characters),
        "tag": columns["tag"],
        "length": columns["length"],
    }


def tag_scores(model: Tagger | ChainTagger, variables: Tree, batch: Batch, **settings: Any):
    """Scores of the tags of each word [B, T, K], and of a chain where the network has one."""
    chars = batch["chars"].astype(jnp.int32) if model.characters else None
    found: Any = model.apply(variables, batch["word"], batch["length"], chars, **settings)
    return (found[0], crf.Chain(*found[1])) if isinstance(model, ChainTagger) else (found, None)


def tagging_loss(model: Tagger | ChainTagger, variables: Tree, batch: Batch, key: Array):
    """Nats per place of a batch. Padding has none, but counts: a number that is known needs no sum over devices."""
    emissions, chain = tag_scores(model, variables, batch, train=True, rngs={"dropout": key})
    if chain is None:
        there = masks.from_lengths(batch["length"], emissions.shape[1])
        nats, _ = metrics.cross_entropy(emissions, batch["tag"], there)
    else:
        nats = crf.negative_log_likelihood(emissions, batch["tag"], chain, batch["length"]).sum()
    return nats / batch["tag"].size, ({}, {})


def best_tags(model: Tagger | ChainTagger, variables: Tree, batch: Batch) -> Array:  # -> int [B, T]
    emissions, chain = tag_scores(model, variables, batch, train=False)
    return emissions.argmax(-1) if chain is None else crf.viterbi(emissions, chain, batch["length"])[0]


def tested(
    names: Sequence[str], answer: Callable[[Tree, Batch], Any], parts: Sequence[Batch], variables: Tree
) -> dict[str, np.ndarray]:  # [S]
    """The score of all seeds on the buckets of a split, by its name."""
    found = [answer(variables, part) for part in parts]  # [S, N, T] each
    width = max(part.shape[-1] for part in found)
    return score(
        np.concatenate([np.pad(part, ((0, 0), (0, 0), (0, width - part.shape[-1]))) for part in found], 1),
        np.concatenate([part["tag"].padded(width)[:] for part in parts]),
        np.concatenate([part["length"] for part in parts]),
        names,
    )


def score(found: np.ndarray, tags: np.ndarray, lengths: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
    """F1 of entities for tags in BIO, and otherwise the accuracy of all words but those whose tag is "_", in per cent.

    The shapes are those of `metrics.entity_scores`. Raises InputError where no word counts.
    """
    if "O" in names:
        return {"f1": 100 * metrics.entity_scores(found, tags, lengths, names)[0].f1}
    counts = np.arange(tags.shape[1]) < lengths[:, None]
    counts &= tags != (list(names).index("_") if "_" in names else -1)
    if not counts.any():
        raise InputError("all words of a split have the tag '_', expected others to evaluate; choose another split")
    return {"accuracy": 100 * (found == tags)[..., counts].mean(-1)}


if __name__ == "__main__":
    launch(main, PRESETS, CLAIMS)
