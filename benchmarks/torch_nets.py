"""PyTorch twins of the nets that benchmarks/train_step.py times: the same layers, loss, optimiser and shapes.

Images are [B, 1, 28, 28]. `load` puts our parameters into a twin, so that a test can hold the two equal.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from dl_jax.models import lenet

Params = dict[str, dict[str, np.ndarray]]


class MLP(nn.Sequential):
    """`dl_jax.models.mlp.MLP` on images of `pixels` numbers."""

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
    """`dl_jax.models.lenet.LeNet5`: the connection table is a mask on a dense kernel."""

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


def map_loss(logits: torch.Tensor, labels: torch.Tensor, rubbish: float) -> torch.Tensor:
    """`dl_jax.models.lenet.map_loss`, [B]."""
    others = torch.cat([logits, torch.full_like(logits[:, :1], -rubbish)], -1)
    return torch.logsumexp(others, -1) - logits.gather(1, labels[:, None])[:, 0]


def train_block(lenet: bool, compiled: bool, batch: Mapping[str, np.ndarray]) -> Callable[[int], None]:
    """Trains LeNet-5, or the dropout MLP 1200-1200, n steps on one batch; channels last, which is never slower here.

    batch: image float32 [B, 28, 28, 1], label int [B].
    """
    model = LeNet5() if lenet else MLP((1200, 1200), dropout=0.5)
    nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)
    image = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    label = torch.from_numpy(batch["label"]).long()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, foreach=True)

    def loss(image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        logits = model(image)
        return map_loss(logits, label, 10.0).mean() if lenet else functional.cross_entropy(logits, label)

    objective = torch.compile(loss) if compiled else loss

    def block(n: int) -> None:
        for _ in range(n):
            optimizer.zero_grad(set_to_none=True)
            objective(image, label).backward()
            optimizer.step()

    return block


def _squash(x: torch.Tensor) -> torch.Tensor:
    return 1.7159 * torch.tanh(2 / 3 * x)


def _copy(layer: nn.Linear | nn.Conv2d, params: dict[str, np.ndarray]) -> None:
    """Kernels are [in, out] or [H, W, in, out] here, [out, in] or [out, in, H, W] there."""
    kernel = np.asarray(params["kernel"])
    axes = (1, 0) if kernel.ndim == 2 else (3, 2, 0, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(kernel.transpose(axes).copy()))
        assert layer.bias is not None
        layer.bias.copy_(torch.tensor(np.asarray(params["bias"])))
