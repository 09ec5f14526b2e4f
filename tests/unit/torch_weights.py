"""Weights and images drawn by NumPy, with which PyTorch's networks and ours are compared.

`python tests/unit/torch_weights.py` writes golden/weights-v1 anew, with torch, torchvision and timm installed; do so
only for another choice of networks or draws. A file has the keys of a network's state dict with their shapes, and what
PyTorch computes of the drawn weights and images. torchvision's and timm's ResNets must have the same keys.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "golden" / "weights-v1"
SIZES = {  # of the square images, in pixels
    **dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "mobilenet_v2"), 64),
    "mobilenetv2_100": 64,
    "resnet20": 32,
}
EVERY = 20  # of 1,000 logits, this one is kept
LEARNING_RATE = 0.1


def drawn(keys: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """A state dict of these shapes: kernels with variance 1 / fan-in, and scales and variances around 1."""
    rng, state = np.random.default_rng(0), {}
    for key, shape in keys.items():
        if key.endswith("num_batches_tracked"):
            state[key] = np.zeros((), np.int64)
        elif len(shape) > 1:
            state[key] = rng.standard_normal(shape, np.float32) / np.float32(math.sqrt(math.prod(shape[1:])))
        elif key.endswith(("weight", "running_var")):
            state[key] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        else:
            state[key] = rng.uniform(-0.2, 0.2, shape).astype(np.float32)
    return state


def images(size: int) -> np.ndarray:
    """Two images [2, size, size, 3]."""
    return np.random.default_rng(1).standard_normal((2, size, size, 3), np.float32)


def network(name: str) -> Any:
    """PyTorch's network, without its weights."""
    if name == "resnet20":
        return resnet20()
    if name.startswith("mobilenetv2"):
        import timm

        return timm.create_model(name)
    import torchvision

    return getattr(torchvision.models, name)()


def resnet20() -> Any:
    """The ResNet-20 of CIFAR, with the keys of github.com/akamaster/pytorch_resnet_cifar10."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self, before: int, maps: int) -> None:
            super().__init__()
            self.stride, self.new = (1, 0) if before == maps else (2, maps - before)
            self.conv1, self.bn1 = nn.Conv2d(before, maps, 3, self.stride, 1, bias=False), nn.BatchNorm2d(maps)
            self.conv2, self.bn2 = nn.Conv2d(maps, maps, 3, 1, 1, bias=False), nn.BatchNorm2d(maps)

        def forward(self, x: Any) -> Any:
            y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            half = self.new // 2
            return torch.relu(y + functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half)))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
            self.layer1 = nn.Sequential(*(Block(16, 16) for _ in range(3)))
            self.layer2 = nn.Sequential(Block(16, 32), *(Block(32, 32) for _ in range(2)))
            self.layer3 = nn.Sequential(Block(32, 64), *(Block(64, 64) for _ in range(2)))
            self.linear = nn.Linear(64, 10)

        def forward(self, x: Any) -> Any:
            x = self.layer3(self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x))))))
            return self.linear(x.mean((2, 3)))

    return Net()


def logits_of(net: Any, state: Mapping[str, np.ndarray], image: np.ndarray) -> np.ndarray:
    """What PyTorch's network computes in evaluation. All keys have to fit."""
    import torch

    net.load_state_dict({key: torch.tensor(array) for key, array in state.items()}, strict=True)
    with torch.no_grad():
        return net.eval()(torch.tensor(image.transpose(0, 3, 1, 2).copy())).numpy()


def updated(net: Any, image: np.ndarray) -> tuple[np.ndarray, dict[str, list[float]]]:
    """The logits in training, and the first numbers of each tensor after a step of SGD for the labels 0 and 1."""
    import torch

    logits = net.train()(torch.tensor(image.transpose(0, 3, 1, 2).copy()))
    torch.nn.functional.cross_entropy(logits, torch.arange(2)).backward()
    torch.optim.SGD(net.parameters(), LEARNING_RATE).step()
    return logits.detach().numpy(), {key: rounded(tensor.flatten()[:4]) for key, tensor in net.state_dict().items()}


def rounded(array: Any) -> Any:
    return json.loads(json.dumps(array.tolist()), parse_float=lambda text: float(f"{float(text):.7g}"))


def write(name: str) -> None:
    net = network(name)
    keys = {key: list(tensor.shape) for key, tensor in net.state_dict().items()}
    logits = logits_of(net, drawn(keys), images(SIZES[name]))
    content = {"keys": keys, "logits": rounded(logits[:, ::EVERY] if logits.shape[1] > 10 else logits)}
    if name == "resnet20":
        train, after = updated(net, images(SIZES[name]))
        content |= {"train": rounded(train), "updated": after}
    elif name.startswith("resnet"):
        import timm

        assert keys == {key: list(tensor.shape) for key, tensor in timm.create_model(name).state_dict().items()}
    lines = ",\n".join(f"{json.dumps(field)}: {json.dumps(value)}" for field, value in content.items())
    (GOLDEN / f"{name}.json").write_text(f"{{{lines}}}\n")
    print(name, abs(logits).max(), abs(logits[0] - logits[1]).max())


if __name__ == "__main__":
    for each in SIZES:
        write(each)
