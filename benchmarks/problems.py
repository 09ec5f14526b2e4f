"""The train steps that benchmarks/train_step.py times: seventeen networks, each on one batch.

The same networks in PyTorch are in torch_nets.py. The sizes are the usual ones: Hinton's MLP of 1200-1200 units with
dropout, Kingma's VAE of 500 units and 20 latents, LeNet-5 as published, the CNN of Flax's MNIST example, ResNet-20, the
textbook net and a small MobileNet on colour images of 32 x 32 pixels, and a language model of two recurrent layers of
256 units on 32 sequences of 64 characters. For texts, a BiLSTM of 100 units in each direction that tags 32 sentences of
32 words with 18 tags, with and without a chain over the tags, Kim's network on 50 texts of 40 words, and nanoGPT's
transformer for a CPU. For speech, a convolutional network on 32 waves of half a second, and a TDNN that spells 16
strings of 20 letters in 1.6 seconds by connectionist temporal classification (CTC). No sequence has padding, which
PyTorch would have to pack. A step of DP-SGD is that of a network of 256 units on 600 images.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dl_jax import classify, losses, privacy
from dl_jax.core.step import init_state, make_step
from dl_jax.losses import crf, ctc, latent
from dl_jax.models import ops
from dl_jax.models.generative.vae import VAE
from dl_jax.models.sequence.attention import TransformerLM
from dl_jax.models.sequence.rnn import GRU, LSTM, VANILLA, Cell, CharLM
from dl_jax.models.sequence.tagger import ChainTagger, Tagger
from dl_jax.models.sequence.tdnn import TDNN
from dl_jax.models.sequence.text_cnn import TextCNN
from dl_jax.models.sequence.wave_cnn import WaveCNN
from dl_jax.models.vision.convnet import ConvNet
from dl_jax.models.vision.lenet import LeNet5, map_loss
from dl_jax.models.vision.mlp import MLP
from dl_jax.models.vision.mobilenet import SmallMobileNet
from dl_jax.models.vision.resnet import CifarResNet

BATCH = 128  # images
SEQUENCES, LENGTH, VOCABULARY = 32, 64, 96
HIDDEN = 256  # units of a recurrent layer, and width of a character's embedding
WORDS, TAGS = 9_000, 18  # of the taggers; Kim's network has as many words
BLOCK, WIDTH, LAYERS, HEADS = 64, 128, 4, 4  # of the transformer
MAPS, TAPS, STRIDE = (32, 64, 128, 128), 80, 4  # of the network on waves: its maps, and its first kernel
LETTERS, CHANNELS = 17, 96  # classes and channels of the TDNN
SAMPLE, UNITS = 600, 256  # images and hidden units of DP-SGD
Batch = Mapping[str, np.ndarray]


class Problem(NamedTuple):
    """One network to time. Its functions belong to a module, so that another process can import them."""

    batch: Callable[[], Batch]
    step: Callable[[], tuple[Any, Any]]  # returns our train step and its initial state
    goal: str  # the factor by which our step should be faster than PyTorch's


def images(n: int = BATCH) -> dict[str, np.ndarray]:
    """Random images float32 [n, 28, 28, 1] and labels int32 [n]; the time of a step does not depend on the values."""
    random = np.random.default_rng(0)
    return {
        "image": random.random((n, 28, 28, 1), np.float32),
        "label": random.integers(0, 10, n).astype(np.int32),
    }


def colour_images() -> dict[str, np.ndarray]:
    """Random images float32 [B, 32, 32, 3] and labels int32 [B]."""
    random = np.random.default_rng(0)
    return {
        "image": random.random((BATCH, 32, 32, 3), np.float32),
        "label": random.integers(0, 10, BATCH).astype(np.int32),
    }


def text() -> dict[str, np.ndarray]:
    """Random tokens and targets, int32 [B, T]."""
    characters = np.random.default_rng(0).integers(0, VOCABULARY, (SEQUENCES, LENGTH + 1)).astype(np.int32)
    return {"token": characters[:, :-1], "target": characters[:, 1:]}


def sentences() -> dict[str, np.ndarray]:
    """Random words and tags, int32 [B, T], all of the same length."""
    random = np.random.default_rng(0)
    return {
        "word": random.integers(0, WORDS, (32, 32)).astype(np.int32),
        "tag": random.integers(0, TAGS, (32, 32)).astype(np.int32),
        "length": np.full(32, 32, np.int32),
    }


def labelled_texts() -> dict[str, np.ndarray]:
    """Random words int32 [B, T] and labels int32 [B]."""
    random = np.random.default_rng(0)
    return {
        "word": random.integers(0, WORDS, (50, 40)).astype(np.int32),
        "label": random.integers(0, 6, 50).astype(np.int32),
    }


def windows() -> dict[str, np.ndarray]:
    """Random tokens and targets, int32 [B, T], as nanoGPT's setting for a CPU has them."""
    characters = np.random.default_rng(0).integers(0, VOCABULARY, (12, BLOCK + 1)).astype(np.int32)
    return {"token": characters[:, :-1], "target": characters[:, 1:]}


def waves() -> dict[str, np.ndarray]:
    """Random waves float32 [B, N] and labels int32 [B]."""
    random = np.random.default_rng(0)
    return {
        "wave": random.standard_normal((32, 4096), np.float32),
        "label": random.integers(0, 10, 32).astype(np.int32),
    }


def spoken() -> dict[str, np.ndarray]:
    """Random frames float32 [B, T, D] and letters int32 [B, N] without the blank, 0, all of the same lengths."""
    random = np.random.default_rng(0)
    return {
        "frames": random.standard_normal((16, 160, 40), np.float32),
        "letter": random.integers(1, LETTERS, (16, 20)).astype(np.int32),
        "length": np.full(16, 160, np.int32),
        "letters": np.full(16, 20, np.int32),
    }


class CNN:
    """The CNN of Flax's MNIST example (google/flax, examples/mnist/train.py), with the methods of a Flax module.

    It is written without Flax: only dl_jax/models/ imports Flax, and this network is not there, as no experiment trains
    it.
    """

    shapes: ClassVar = {
        "Conv_0": (3, 3, 1, 32),
        "Conv_1": (3, 3, 32, 64),
        "Dense_0": (7 * 7 * 64, 256),
        "Dense_1": (256, 10),
    }

    def init(self, key: jax.Array, image: jax.Array, *, train: bool) -> dict[str, Any]:
        draw, keys = jax.nn.initializers.lecun_normal(), jax.random.split(key, len(self.shapes))
        layers = zip(keys, self.shapes.items(), strict=True)
        return {
            "params": {name: {"kernel": draw(k, shape), "bias": jnp.zeros(shape[-1])} for k, (name, shape) in layers}
        }

    def apply(self, variables: Any, image: jax.Array, *, train: bool, rngs: Any = None) -> jax.Array:
        """Logits [B, 10] of images [B, 28, 28, 1]."""
        *convs, hidden, out = (variables["params"][name] for name in self.shapes)
        x, layout = image, ("NHWC", "HWIO", "NHWC")
        for layer in convs:
            x = ops.conv_general_dilated(x, layer["kernel"], (1, 1), "SAME", dimension_numbers=layout) + layer["bias"]
            x = ops.sum_pool(jax.nn.relu(x), 2) / 4  # average pooling
        x = jax.nn.relu(x.reshape(len(x), -1) @ hidden["kernel"] + hidden["bias"])
        return x @ out["kernel"] + out["bias"]


def mlp_step():
    return classifier_step(MLP((1200, 1200), dropout=0.5), losses.cross_entropy)


def private_images() -> dict[str, np.ndarray]:
    """Random images and labels of a Poisson sample that fills its batch, which has a column `mask`."""
    return {**images(SAMPLE), "mask": np.ones(SAMPLE, np.float32)}


def private_step():
    """A train step by clipped gradients of each example with SGD, and its initial state."""
    model: Any = MLP((UNITS,))
    tx = optax.sgd(1e-3, momentum=0.9)
    variables = jax.jit(lambda key: model.init(key, images(1)["image"], train=False))(jax.random.key(0))
    step = privacy.private_step(classify.loss(model.apply), tx, clip=1.0, noise=1.0, batch_size=SAMPLE)

    def mean(state, batch):
        state, metrics = step(state, batch)
        total, weight = metrics["loss"]
        return state, {"loss": total / weight, "clipped": metrics["clipped"]}

    return mean, init_state(jax.random.key(1), variables, tx)


def lenet_step():
    return classifier_step(LeNet5(), functools.partial(map_loss, rubbish=10.0))


def cnn_step():
    return classifier_step(CNN(), losses.cross_entropy)


def resnet_step():
    return colour_step(CifarResNet(20))


def convnet_step():
    return colour_step(ConvNet())


def mobilenet_step():
    return colour_step(SmallMobileNet())


def colour_step(model: Any):
    """A train step of a classifier of colour images with SGD and momentum, and its initial state."""
    variables = jax.jit(lambda key: model.init(key, colour_images()["image"][:1], train=False))(jax.random.key(0))
    return _step(classify.loss(model.apply), variables, optax.sgd(1e-3, momentum=0.9))


def classifier_step(model: Any, per_example: Callable[..., Any]):
    """A train step of a classifier with SGD and momentum, and its initial state. The images are scaled in the step."""

    def loss(variables, batch, key):
        logits = model.apply(variables, classify.to_unit(batch["image"]), train=True, rngs={"dropout": key})
        return per_example(logits, batch["label"]).mean(), ({}, {})

    variables = jax.jit(lambda key: model.init(key, images(1)["image"], train=False))(jax.random.key(0))
    return _step(loss, variables, optax.sgd(1e-3, momentum=0.9))


def vae_step():
    model = VAE(latents=20, hidden=(500,))

    def loss(variables, batch, key):
        return -latent.elbo(latent.of_networks(model, variables), batch["image"], key).mean(), ({}, {})

    variables = jax.jit(lambda key: model.init(key, images(1)["image"], train=False))(jax.random.key(0))
    return _step(loss, variables, optax.adam(1e-3))


def rnn_step():
    return language_step(VANILLA)


def gru_step():
    return language_step(GRU)


def lstm_step():
    return language_step(LSTM)


def language_step(cell: Cell):
    """A train step of a character language model with Adam, and its initial state."""
    model = CharLM(VOCABULARY, HIDDEN, layers=2, cell=cell)

    def loss(variables, batch, key):
        logits, _ = model.apply(variables, batch["token"], train=True)
        return losses.cross_entropy(logits, batch["target"]).mean(), ({}, {})

    variables = jax.jit(lambda key: model.init(key, text()["token"], train=False))(jax.random.key(0))
    return _step(loss, variables, optax.adam(1e-3))


def tagger_step():
    model: Any = Tagger(WORDS, TAGS, hidden=100, dropout=0)

    def loss(variables, batch, key):
        logits = model.apply(variables, batch["word"], batch["length"], train=True)
        return losses.cross_entropy(logits, batch["tag"]).mean(), ({}, {})

    return _sequence_step(model, sentences()["word"], loss, optax.adam(1e-3))


def chain_tagger_step():
    model: Any = ChainTagger(WORDS, TAGS, hidden=100, dropout=0)

    def loss(variables, batch, key):
        emissions, chain = model.apply(variables, batch["word"], batch["length"], train=True)
        nats = crf.negative_log_likelihood(emissions, batch["tag"], crf.Chain(*chain), batch["length"])
        return nats.mean(), ({}, {})

    return _sequence_step(model, sentences()["word"], loss, optax.adam(1e-3))


def text_cnn_step():
    model: Any = TextCNN(WORDS, 6, dropout=0)

    def loss(variables, batch, key):
        logits = model.apply(variables, batch["word"], train=True)
        return losses.cross_entropy(logits, batch["label"]).mean(), ({}, {})

    return _sequence_step(model, labelled_texts()["word"], loss, optax.adadelta(1.0, rho=0.95, eps=1e-6))


def transformer_step():
    model: Any = TransformerLM(VOCABULARY, BLOCK, WIDTH, LAYERS, HEADS)

    def loss(variables, batch, key):
        logits = model.apply(variables, batch["token"], train=True)
        return losses.cross_entropy(logits, batch["target"]).mean(), ({}, {})

    return _sequence_step(model, windows()["token"], loss, optax.adamw(1e-3, b2=0.99, weight_decay=0.1))


def wave_cnn_step():
    model: Any = WaveCNN(10, MAPS, TAPS, STRIDE)
    loss = lambda variables, batch, key: classify.loss(model.apply)(variables, {**batch, "image": batch["wave"]}, key)
    return _sequence_step(model, waves()["wave"], loss, optax.adam(1e-3))


def tdnn_step():
    model: Any = TDNN(LETTERS, CHANNELS)

    def loss(variables, batch, key):
        logits, changed = model.apply(variables, batch["frames"], train=True, mutable=["batch_stats"])
        nats = ctc.negative_log_likelihood(logits, batch["length"], batch["letter"], batch["letters"])
        return nats.mean(), (changed, {})

    return _sequence_step(model, spoken()["frames"], loss, optax.adam(1e-3))


def _sequence_step(model, words, loss, tx):
    variables = jax.jit(lambda key: model.init(key, words, train=False))(jax.random.key(0))
    return _step(loss, variables, tx)


def _step(loss, variables, tx):
    return make_step(loss, tx), init_state(jax.random.key(1), variables, tx)


PROBLEMS = {
    "MLP": Problem(images, mlp_step, ">= 2.2"),
    "DP-SGD": Problem(private_images, private_step, ">= 5"),
    "LeNet-5": Problem(images, lenet_step, ">= 1.0"),
    "CNN": Problem(images, cnn_step, ">= 0.85"),
    "ResNet-20": Problem(colour_images, resnet_step, ">= 0.55"),
    "ConvNet": Problem(colour_images, convnet_step, ">= 0.75"),
    "MobileNet": Problem(colour_images, mobilenet_step, ">= 0.8"),
    "VAE": Problem(images, vae_step, ">= 2.2"),
    "RNN": Problem(text, rnn_step, ">= 1.4"),
    "GRU": Problem(text, gru_step, ">= 1.4"),
    "LSTM": Problem(text, lstm_step, ">= 0.9"),
    "Tagger": Problem(sentences, tagger_step, ">= 2.0"),
    "Tagger, CRF": Problem(sentences, chain_tagger_step, ">= 2.0"),
    "TextCNN": Problem(labelled_texts, text_cnn_step, ">= 1.1"),
    "Transformer": Problem(windows, transformer_step, ">= 0.9"),
    "WaveCNN": Problem(waves, wave_cnn_step, ">= 1.0"),
    "TDNN, CTC": Problem(spoken, tdnn_step, ">= 1.0"),
}
