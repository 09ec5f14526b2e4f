"""The networks of problems.py in PyTorch, called twins: the same layers, loss, optimiser and shapes.

Images are [B, 1, 28, 28]. `load` copies our parameters into a twin, so that a test can compare the two.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.problems import (
    BLOCK,
    CHANNELS,
    HEADS,
    HIDDEN,
    LAYERS,
    LETTERS,
    MAPS,
    PROBLEMS,
    SAMPLE,
    STRIDE,
    TAGS,
    TAPS,
    UNITS,
    VOCABULARY,
    WIDTH,
    WORDS,
)
from dl_jax.models.vision import lenet

Tensors = Mapping[str, torch.Tensor]
Params = dict[str, dict[str, np.ndarray]]


class MLP(nn.Sequential):
    """The twin of `dl_jax.models.vision.mlp.MLP`, for images of `pixels` numbers."""

    def __init__(self, hidden: tuple[int, ...], classes: int = 10, dropout: float = 0.0, pixels: int = 784):
        sizes = (pixels, *hidden)
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in zip(sizes, hidden, strict=False):
            layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout)]
        super().__init__(*layers, nn.Linear(sizes[-1], classes))

    def load(self, params: Params) -> None:
        dense = [layer for layer in self if isinstance(layer, nn.Linear)]
        for i, layer in enumerate(dense):
            _copy(layer, params[f"Dense_{i}"])


class LeNet5(nn.Module):
    """The twin of `dl_jax.models.vision.lenet.LeNet5`, with a mask on a dense kernel for the connection table."""

    mask: torch.Tensor
    codes: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c3 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.c5, self.f6 = nn.Linear(400, 120), nn.Linear(120, 84)
        self.s2 = nn.ParameterDict({"scale": torch.rand(6, 1, 1), "bias": torch.zeros(6, 1, 1)})
        self.s4 = nn.ParameterDict({"scale": torch.rand(16, 1, 1), "bias": torch.zeros(16, 1, 1)})
        mask = torch.zeros(16, 6, 1, 1)
        for target, sources in enumerate(lenet.C3_INPUTS):
            mask[target, list(sources)] = 1
        self.register_buffer("mask", mask)
        self.register_buffer("codes", torch.from_numpy(lenet.digit_codes()))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = functional.pad(image, (2, 2, 2, 2)) * 1.275 - 0.1
        x = _squash(self.c1(x))
        x = _squash(functional.avg_pool2d(x, 2, divisor_override=1) * self.s2["scale"] + self.s2["bias"])
        x = _squash(functional.conv2d(x, self.c3.weight * self.mask, self.c3.bias))
        x = _squash(functional.avg_pool2d(x, 2, divisor_override=1) * self.s4["scale"] + self.s4["bias"])
        x = _squash(self.c5(x.flatten(1)))
        x = _squash(self.f6(x))
        return -((x[:, None] - self.codes) ** 2).sum(-1)

    def load(self, params: Params) -> None:
        _copy(self.c1, params["C1"])
        dense = np.zeros((5, 5, 6, 16), np.float32)
        targets, sources = zip(*((t, s) for t, maps in enumerate(lenet.C3_INPUTS) for s in maps), strict=True)
        dense[:, :, sources, targets] = params["C3"]["kernel"]
        _copy(self.c3, {"kernel": dense, "bias": params["C3"]["bias"]})
        maps = np.asarray(params["C5"]["kernel"]).reshape(5, 5, 16, 120)  # S4 is flattened [H, W, C]; here [C, H, W]
        _copy(self.c5, {"kernel": maps.transpose(2, 0, 1, 3).reshape(400, 120), "bias": params["C5"]["bias"]})
        _copy(self.f6, params["F6"])
        with torch.no_grad():
            for ours, name in ((self.s2, "S2"), (self.s4, "S4")):
                for field, value in params[name].items():
                    ours[field].copy_(torch.tensor(np.asarray(value))[:, None, None])


class CNN(nn.Module):
    """The twin of `benchmarks.problems.CNN`."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)])
        self.hidden, self.out = nn.Linear(7 * 7 * 64, 256), nn.Linear(256, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = image
        for conv in self.convs:
            x = functional.avg_pool2d(functional.relu(conv(x)), 2)
        x = x.permute(0, 2, 3, 1).flatten(1)  # [B, H W C]: no copy, as channels are last in memory
        return self.out(functional.relu(self.hidden(x)))

    def load(self, params: Params) -> None:
        for i, conv in enumerate(self.convs):
            _copy(conv, params[f"Conv_{i}"])
        _copy(self.hidden, params["Dense_0"])
        _copy(self.out, params["Dense_1"])


def _normed(inputs: int, maps: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, maps, size, stride, (size - 1) // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(maps))


class LeNetCaffe(nn.Sequential):
    """The twin of `dl_jax.models.vision.lenet.LeNetCaffe` for grey images of 28 x 28 pixels."""

    def __init__(self) -> None:
        convs = [nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2)]
        super().__init__(*convs, nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))

    def load(self, variables: dict[str, Any]) -> None:
        params, (first, second, hidden, out) = variables["params"], (self[i] for i in (0, 2, 5, 7))
        _copy(first, params["Conv_0"])
        _copy(second, params["Conv_1"])
        _copy(out, params["Dense_1"])
        # Our rows are the pixels of all maps, one pixel after the other; PyTorch's are one map after the other.
        kernel = np.asarray(params["Dense_0"]["kernel"]).reshape(4, 4, 50, 500).transpose(2, 0, 1, 3).reshape(800, 500)
        _copy(hidden, {**params["Dense_0"], "kernel": kernel})


class CifarResNet(nn.Module):
    """The twin of `dl_jax.models.vision.resnet.CifarResNet`. Its shortcuts can be traced by torch.fx."""

    def __init__(self, depth: int = 20, channels: int = 3) -> None:
        super().__init__()
        self.stem, self.blocks, self.new, inputs = _normed(channels, 16, 3), nn.ModuleList(), [], 16
        for maps in (16, 32, 64):
            for _ in range((depth - 2) // 6):
                first = _normed(inputs, maps, 3, 1 if maps == inputs else 2)
                self.blocks.append(nn.Sequential(first, nn.ReLU(), _normed(maps, maps, 3)))
                self.new.append(maps - inputs)  # maps that the shortcut fills with zeros
                inputs = maps
        self.head = nn.Linear(64, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.stem(image))
        for block, new in zip(self.blocks, self.new, strict=True):
            y = block(x)
            if new:
                x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, new // 2, new // 2))
            x = functional.relu(x + y)
        return self.head(x.mean((2, 3)))

    def load(self, variables: dict[str, Any]) -> None:
        _copy_normed(self.stem, variables, "stem_conv", "stem_norm")
        per_stage = len(self.blocks) // 3
        for i, block in enumerate(self.blocks):
            path = f"stage{i // per_stage + 1}_block{i % per_stage}"
            inner = {name: tree[path] for name, tree in variables.items()}
            _copy_normed(block[0], inner, "conv1", "norm1")
            _copy_normed(block[2], inner, "conv2", "norm2")
        _copy(self.head, variables["params"]["head"])


class ConvNet(nn.Sequential):
    """The twin of `dl_jax.models.vision.convnet.ConvNet` for images of 32 x 32 pixels."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for i, (inputs, maps, size) in enumerate(((3, 32, 5), (32, 32, 5), (32, 64, 3), (64, 64, 3), (64, 64, 3))):
            layers += [nn.Conv2d(inputs, maps, size, padding=size // 2), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if i in (1, 4) else []
        dense = [nn.Flatten(), nn.Linear(64 * 64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)]
        super().__init__(*layers, *dense)


class SmallMobileNet(nn.Sequential):
    """The twin of `dl_jax.models.vision.mobilenet.SmallMobileNet`."""

    def __init__(self, channels: int = 3) -> None:
        layers, inputs = [_normed(channels, 16, 3), nn.ReLU()], 16
        for maps, stride in ((32, 1), (64, 2), (64, 1), (128, 2), (128, 1)):
            layers += [_normed(inputs, inputs, 3, stride, inputs), nn.ReLU(), _normed(inputs, maps, 1), nn.ReLU()]
            inputs = maps
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))

    def load(self, variables: dict[str, Any]) -> None:
        stem, *blocks = (layer for layer in self if isinstance(layer, nn.Sequential))
        _copy_normed(stem, variables, "stem_conv", "stem_norm")
        for i, layer in enumerate(blocks):
            name = f"block{i // 2}_{'pointwise' if i % 2 else 'depthwise'}"
            _copy_normed(layer, variables, f"{name}_conv", f"{name}_norm")
        _copy(self[-1], variables["params"]["head"])


def map_loss(logits: torch.Tensor, labels: torch.Tensor, rubbish: float) -> torch.Tensor:
    """The twin of `dl_jax.models.vision.lenet.map_loss`: losses [B]."""
    others = torch.cat([logits, torch.full_like(logits[:, :1], -rubbish)], -1)
    return torch.logsumexp(others, -1) - logits.gather(1, labels[:, None])[:, 0]


class VAE(nn.Module):
    """The twin of `dl_jax.models.generative.vae.VAE` with one hidden layer."""

    def __init__(self, hidden: int, latents: int, pixels: int = 784) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(pixels, hidden), nn.Tanh(), nn.Linear(hidden, 2 * latents))
        self.decoder = nn.Sequential(nn.Linear(latents, hidden), nn.Tanh(), nn.Linear(hidden, pixels))

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits [B, pixels], mean and log variance [B, latents]."""
        mean, log_sigma = self.encoder(image).chunk(2, -1)
        noise = torch.randn_like(mean) if self.training else torch.zeros_like(mean)
        return self.decoder(mean + torch.exp(log_sigma) * noise), mean, 2 * log_sigma

    def load(self, params: dict[str, Params]) -> None:
        for twin, ours in ((self.encoder, params["encoder"]), (self.decoder, params["decoder"])):
            dense = [layer for layer in twin if isinstance(layer, nn.Linear)]
            for i, layer in enumerate(dense):
                _copy(layer, ours[f"Dense_{i}"])


class CharLM(nn.Module):
    """The twin of `dl_jax.models.sequence.rnn.CharLM`; `cell` is nn.RNN, nn.GRU or nn.LSTM."""

    def __init__(self, cell: Callable[..., nn.Module], vocabulary: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, hidden)
        self.recurrent = cell(hidden, hidden, layers, batch_first=True)
        self.dense = nn.Linear(hidden, vocabulary)

    def forward(self, token: torch.Tensor) -> torch.Tensor:
        return self.dense(self.recurrent(self.embed(token))[0])

    def load(self, params: dict[str, Any]) -> None:
        """Copies our parameters. Where our cell has one bias, the twin's bias of the hidden state is set to zero."""
        tagger = params["SequenceTagger_0"]
        with torch.no_grad():
            self.embed.weight.copy_(torch.tensor(np.asarray(params["Embed_0"]["embedding"])))
            for name, weight in self.recurrent.named_parameters():  # weight_ih_l0, bias_hh_l1, ...
                kind, side, layer = name.split("_")
                ours = tagger["Recurrent_0"][f"forward_{layer[1:]}"]
                ours = ours["input"] if side == "ih" else ours
                if kind == "weight":
                    weight.copy_(torch.tensor(np.asarray(ours["kernel"]).T.copy()))
                else:
                    weight.copy_(torch.tensor(np.asarray(ours["bias"]))) if "bias" in ours else weight.zero_()
        _copy(self.dense, tagger["Dense_0"])


class Tagger(nn.Module):
    """The twin of `dl_jax.models.sequence.tagger.ChainTagger` without characters, or with `chain` False of `Tagger`."""

    def __init__(self, words: int, tags: int, embedding: int, hidden: int, *, chain: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(words, embedding)
        self.recurrent = nn.LSTM(embedding, hidden, batch_first=True, bidirectional=True)
        self.output = nn.Linear(2 * hidden, tags)
        shapes = {"start": (tags,), "step": (tags, tags), "end": (tags,)} if chain else {}
        self.chain = nn.ParameterDict({name: torch.zeros(shape) for name, shape in shapes.items()})

    def forward(self, word: torch.Tensor) -> torch.Tensor:
        return self.output(self.recurrent(self.words(word))[0])

    def load(self, params: dict[str, Any]) -> None:
        with torch.no_grad():
            self.words.weight.copy_(torch.tensor(np.asarray(params["words"]["embedding"])))
            for name, weight in self.recurrent.named_parameters():  # weight_ih_l0, bias_hh_l0_reverse, ...
                ours = params["recurrent"]["backward_0" if name.endswith("reverse") else "forward_0"]
                if name.startswith("weight"):
                    kernel = ours["input"]["kernel"] if "_ih_" in name else ours["kernel"]
                    weight.copy_(torch.tensor(np.asarray(kernel).T.copy()))
                else:
                    weight.copy_(torch.tensor(np.asarray(ours["input"]["bias"]))) if "_ih_" in name else weight.zero_()
            for name, scores in self.chain.items():
                scores.copy_(torch.tensor(np.asarray(params[name])))
        _copy(self.output, params["output"])


class TextCNN(nn.Module):
    """The twin of `dl_jax.models.sequence.text_cnn.TextCNN` for texts without padding."""

    def __init__(self, words: int, classes: int, embedding: int = 300, maps: int = 100) -> None:
        super().__init__()
        self.words = nn.Embedding(words, embedding)
        self.convs = nn.ModuleList([nn.Conv1d(embedding, maps, width, padding=width - 1) for width in (3, 4, 5)])
        self.output = nn.Linear(3 * maps, classes)

    def forward(self, word: torch.Tensor) -> torch.Tensor:
        x = self.words(word).transpose(1, 2)
        return self.output(torch.cat([functional.relu(conv(x)).amax(-1) for conv in self.convs], -1))

    def load(self, params: dict[str, Any]) -> None:
        with torch.no_grad():
            self.words.weight.copy_(torch.tensor(np.asarray(params["words"]["embedding"])))
            for width, conv in zip((3, 4, 5), self.convs, strict=True):
                ours = params[f"width_{width}"]
                conv.weight.copy_(torch.tensor(np.asarray(ours["kernel"]).transpose(2, 1, 0).copy()))
                conv.bias.copy_(torch.tensor(np.asarray(ours["bias"])))
        _copy(self.output, params["output"])


class WaveCNN(nn.Module):
    """The twin of `dl_jax.models.sequence.wave_cnn.WaveCNN` for waves without padding, whose pools are full."""

    def __init__(self, classes: int, maps: tuple[int, ...], taps: int, stride: int, pool: int = 4) -> None:
        super().__init__()
        self.taps, self.pool = taps, pool
        sizes = zip((1, *maps), maps, strict=False)
        self.convs = nn.ModuleList(
            [
                nn.Conv1d(inputs, outputs, 3 if i else taps, 1 if i else stride, 1 if i else 0, bias=False)
                for i, (inputs, outputs) in enumerate(sizes)
            ]
        )
        self.norms = nn.ModuleList([nn.BatchNorm1d(outputs) for outputs in maps])
        self.output = nn.Linear(maps[-1], classes)

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        x = functional.pad(wave[:, None], ((self.taps - 1) // 2, self.taps // 2))
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = functional.max_pool1d(functional.relu(norm(conv(x))), self.pool)
        return self.output(x.mean(-1))

    def load(self, variables: dict[str, Any]) -> None:
        _copy_sequence_layers(self, variables)


class TDNN(nn.Module):
    """The twin of `dl_jax.models.sequence.tdnn.TDNN` for recordings without padding."""

    def __init__(self, classes: int, hidden: int, bins: int = 40) -> None:
        super().__init__()
        layers = ((3, 1), (5, 2), (5, 4))  # taps and dilation
        self.convs = nn.ModuleList(
            [
                nn.Conv1d(hidden if i else bins, hidden, taps, padding="same", dilation=dilation, bias=False)
                for i, (taps, dilation) in enumerate(layers)
            ]
        )
        self.norms = nn.ModuleList([nn.BatchNorm1d(hidden) for _ in layers])
        self.output = nn.Linear(hidden, classes)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        x = frames.transpose(1, 2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = functional.relu(norm(conv(x)))
        return self.output(x.transpose(1, 2))

    def load(self, variables: dict[str, Any]) -> None:
        _copy_sequence_layers(self, variables)


def _copy_sequence_layers(twin: WaveCNN | TDNN, variables: dict[str, Any]) -> None:
    for i, (conv, norm) in enumerate(zip(twin.convs, twin.norms, strict=True)):
        _copy_normed(nn.Sequential(conv, norm), variables, f"conv_{i}", f"norm_{i}")
    _copy(twin.output, variables["params"]["output"])


class Block(nn.Module):
    """The twin of `dl_jax.models.sequence.attention.Block` with a causal mask."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        linear = functools.partial(nn.Linear, bias=False)
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.project = linear(width, 3 * width), linear(width, width)
        self.up, self.down = linear(width, 4 * width), linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        split = self.qkv(self.norm_1(x)).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in split)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(y.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class TransformerLM(nn.Module):
    """The twin of `dl_jax.models.sequence.attention.TransformerLM` without biases."""

    def __init__(self, vocabulary: int, block: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, width), nn.Embedding(block, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width, bias=False)
        for embedding in (self.words, self.places):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, token: torch.Tensor) -> torch.Tensor:
        x = self.words(token) + self.places.weight[: token.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.words.weight.T

    def load(self, params: dict[str, Any]) -> None:
        with torch.no_grad():
            self.words.weight.copy_(torch.tensor(np.asarray(params["words"]["embedding"])))
            self.places.weight.copy_(torch.tensor(np.asarray(params["places"])))
            self.norm.weight.copy_(torch.tensor(np.asarray(params["norm"]["scale"])))
        for i, block in enumerate(self.blocks):
            ours = params[f"blocks_{i}"]
            with torch.no_grad():
                for name in ("norm_1", "norm_2"):
                    getattr(block, name).weight.copy_(torch.tensor(np.asarray(ours[name]["scale"])))
            for name, layer in {**ours["attention"], "up": ours["up"], "down": ours["down"]}.items():
                _copy(getattr(block, name), layer)


def tagging_loss(model: nn.Module, batch: Tensors) -> torch.Tensor:
    return functional.cross_entropy(model(batch["word"]).flatten(0, 1), batch["tag"].flatten())


def chain_loss(model: Any, batch: Tensors) -> torch.Tensor:
    """The twin of `crf.negative_log_likelihood` for sequences without padding, with log-sum-exp in every step."""
    emissions, tag = model(batch["word"]), batch["tag"]  # [B, T, K], [B, T]
    start, step, end = (model.chain[name] for name in ("start", "step", "end"))
    alpha = start + emissions[:, 0]
    for t in range(1, emissions.shape[1]):
        alpha = torch.logsumexp(alpha[:, :, None] + step, 1) + emissions[:, t]
    log_z = torch.logsumexp(alpha + end, 1)
    score = emissions.gather(2, tag[..., None])[..., 0].sum(1) + start[tag[:, 0]] + end[tag[:, -1]]
    return (log_z - score - step[tag[:, :-1], tag[:, 1:]].sum(1)).mean()


def text_loss(model: nn.Module, batch: Tensors) -> torch.Tensor:
    return functional.cross_entropy(model(batch["word"]), batch["label"])


def cross_entropy(model: nn.Module, batch: Tensors) -> torch.Tensor:
    return functional.cross_entropy(model(batch["image"]), batch["label"])


def reading_loss(model: nn.Module, batch: Tensors) -> torch.Tensor:
    return map_loss(model(batch["image"]), batch["label"], 10.0).mean()


def negative_elbo(model: nn.Module, batch: Tensors) -> torch.Tensor:
    logits, mean, log_var = model(batch["image"])
    pixels = functional.binary_cross_entropy_with_logits(logits, batch["image"].flatten(1), reduction="sum")
    return (pixels + 0.5 * (mean**2 + log_var.exp() - log_var - 1).sum()) / len(mean)


def hearing_loss(model: nn.Module, batch: Tensors) -> torch.Tensor:
    return functional.cross_entropy(model(batch["wave"]), batch["label"])


def spelling_loss(model: nn.Module, batch: Tensors) -> torch.Tensor:
    log_probabilities = functional.log_softmax(model(batch["frames"]), -1).transpose(0, 1)  # [T, B, K]
    lengths, letters = batch["length"], batch["letters"]
    return functional.ctc_loss(log_probabilities, batch["letter"], lengths, letters, reduction="sum") / len(lengths)


def next_character(model: nn.Module, batch: Tensors) -> torch.Tensor:
    return functional.cross_entropy(model(batch["token"]).flatten(0, 1), batch["target"].flatten())


class Twin(NamedTuple):
    """A network, its loss and its optimiser."""

    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Tensors], torch.Tensor]
    optimizer: Callable[[Any], torch.optim.Optimizer]


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SGD = functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9, fused=True)  # up to 3 times faster than foreach
ADAM = functools.partial(torch.optim.Adam, lr=1e-3, fused=True)
ADAMW = functools.partial(torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
ADADELTA = functools.partial(torch.optim.Adadelta, lr=1.0, rho=0.95, eps=1e-6, foreach=True)  # it has no fused form
tagger = functools.partial(Tagger, WORDS, TAGS, 100, 100)
transformer = functools.partial(TransformerLM, VOCABULARY, BLOCK, WIDTH, LAYERS, HEADS)
language = functools.partial(CharLM, vocabulary=VOCABULARY, hidden=HIDDEN, layers=2)
TWINS = {
    "MLP": Twin(functools.partial(MLP, (1200, 1200), dropout=0.5), cross_entropy, SGD),
    "DP-SGD": Twin(functools.partial(MLP, (UNITS,)), cross_entropy, SGD),
    "LeNet-5": Twin(LeNet5, reading_loss, SGD),
    "CNN": Twin(CNN, cross_entropy, SGD),
    "ResNet-20": Twin(CifarResNet, cross_entropy, SGD),
    "ConvNet": Twin(ConvNet, cross_entropy, SGD),
    "MobileNet": Twin(SmallMobileNet, cross_entropy, SGD),
    "VAE": Twin(functools.partial(VAE, 500, 20), negative_elbo, ADAM),
    "RNN": Twin(functools.partial(language, nn.RNN), next_character, ADAM),
    "GRU": Twin(functools.partial(language, nn.GRU), next_character, ADAM),
    "LSTM": Twin(functools.partial(language, nn.LSTM), next_character, ADAM),
    "Tagger": Twin(functools.partial(tagger, chain=False), tagging_loss, ADAM),
    "Tagger, CRF": Twin(functools.partial(tagger, chain=True), chain_loss, ADAM),
    "TextCNN": Twin(functools.partial(TextCNN, WORDS, 6), text_loss, ADADELTA),
    "Transformer": Twin(
        functools.partial(TransformerLM, VOCABULARY, BLOCK, WIDTH, LAYERS, HEADS), next_character, ADAMW
    ),
    "WaveCNN": Twin(functools.partial(WaveCNN, 10, MAPS, TAPS, STRIDE), hearing_loss, ADAM),
    "TDNN, CTC": Twin(functools.partial(TDNN, LETTERS, CHANNELS), spelling_loss, ADAM),
}


def train_block(name: str, compiled: bool) -> Callable[[int], None]:
    """A function n -> None that trains a twin for n steps on one batch.

    Images have their channels last in memory, which is never slower here. A step computes the norm of the gradient as
    well as the loss, as ours does. DP-SGD has a block of its own.
    """
    if name == "DP-SGD":
        return private_block(compiled)
    twin, batch = TWINS[name], PROBLEMS[name].batch()
    model = twin.model().to(DEVICE)
    nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)
    tensors = {name: tensor(column) for name, column in batch.items()}
    optimizer = twin.optimizer(model.parameters())
    loss = functools.partial(twin.loss, model)
    objective = torch.compile(loss) if compiled else loss

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        objective(tensors).backward()
        nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()

    return repeated(step)


def repeated(step: Callable[[], None]) -> Callable[[int], None]:
    """A function n -> None that calls `step` n times and waits until the device is done. It is warm."""

    def block(n: int) -> None:
        for _ in range(n):
            step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    block(5)
    return block


def private_block(compiled: bool) -> Callable[[int], None]:
    """A function n -> None that trains for n steps of DP-SGD with the gradients of all examples by `torch.func`."""
    twin, batch = TWINS["DP-SGD"], PROBLEMS["DP-SGD"].batch()
    image, label = (tensor(batch[name]) for name in ("image", "label"))
    model = twin.model().to(DEVICE)
    optimizer = twin.optimizer(model.parameters())
    gradients = torch.func.vmap(torch.func.grad(functools.partial(_loss_of_one, model)), (None, 0, 0))

    def clipped(params: Tensors) -> Tensors:
        each = gradients(params, image, label)
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in each.values()]).norm(dim=0)
        weights = (1 / norms).clamp(max=1)
        return {name: torch.tensordot(weights, g, 1) for name, g in each.items()}

    objective = torch.compile(clipped) if compiled else clipped

    params = dict(model.named_parameters())

    def step() -> None:
        total = objective({name: each.detach() for name, each in params.items()})
        for name, each in params.items():
            each.grad = (total[name] + torch.randn_like(each)) / SAMPLE
        optimizer.step()

    return repeated(step)


def _loss_of_one(model: nn.Module, params: Tensors, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    logits = torch.func.functional_call(model, dict(params), (image[None],))
    return functional.cross_entropy(logits, label[None])


def tensor(column: np.ndarray) -> torch.Tensor:
    """A column as a tensor: integers as int64, images [B, H, W, C] as [B, C, H, W], sequences as they are."""
    if np.issubdtype(column.dtype, np.integer):
        return torch.from_numpy(column).long().to(DEVICE)
    if column.ndim < 4:
        return torch.from_numpy(column).to(DEVICE)
    return torch.from_numpy(column).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last).to(DEVICE)


def _squash(x: torch.Tensor) -> torch.Tensor:
    return 1.7159 * torch.tanh(2 / 3 * x)


def _copy_normed(layers: nn.Sequential, variables: dict[str, Any], conv: str, norm: str) -> None:
    """Copies our convolution without a bias, and our BatchNorm with its statistics, to the two layers of `_normed`."""
    params, (convolution, normalisation) = variables["params"], layers
    _copy(convolution, params[conv])
    found = {**params[norm], **variables["batch_stats"][norm]}
    names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    with torch.no_grad():
        for theirs, ours in names.items():
            getattr(normalisation, theirs).copy_(torch.tensor(np.asarray(found[ours])))


def _copy(layer: nn.Linear | nn.Conv1d | nn.Conv2d, params: dict[str, np.ndarray]) -> None:
    """Copies our kernel, [..., in, out], to a layer with weights [out, in, ...]."""
    kernel = np.asarray(params["kernel"])
    axes = (kernel.ndim - 1, kernel.ndim - 2, *range(kernel.ndim - 2))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(kernel.transpose(axes).copy()))
        if layer.bias is not None:
            layer.bias.copy_(torch.tensor(np.asarray(params["bias"])))
