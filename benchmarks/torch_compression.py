"""Compression with PyTorch's tools, for benchmarks/compressed.py: torch.ao's integers, and Torch-Pruning's cuts.

Images are float32 [B, 1, 28, 28] tensors inside and NumPy [B, 28, 28, 1] arrays outside.
"""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import torch_pruning
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx
from torch.nn import functional

from benchmarks import torch_nets

ENGINE = "x86"  # weights of 7 bits where the processor has no VNNI
NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "LeNet-Caffe": torch_nets.LeNetCaffe,
    "ResNet-8": lambda: torch_nets.CifarResNet(8, 1),
    "small MobileNet": lambda: torch_nets.SmallMobileNet(1),
}


def twin(name: str, variables: dict) -> nn.Module:
    """The network in PyTorch with our weights."""
    model = NETWORKS[name]()
    model.load(variables)
    return model.eval()


def in_integers(model: nn.Module, images: np.ndarray) -> nn.Module:
    """The network in 8 bits, quantised after training by torch.ao (FX graph mode), calibrated on `images`."""
    with _quiet():
        example = torch_nets.tensor(images[:100])
        prepared = quantize_fx.prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping(ENGINE), example)
        with torch.no_grad():
            for i in range(0, len(images), 100):
                prepared(torch_nets.tensor(images[i : i + 100]))
        return quantize_fx.convert_fx(prepared)


def cut(model: nn.Module, images: np.ndarray, share: float) -> nn.Module:
    """The network without a share of the channels of every layer, those of the smallest weights."""
    model = copy.deepcopy(model)
    head = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        torch_nets.tensor(images[:1]),
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=share,
        ignored_layers=[head],
    )
    pruner.step()
    return model


def trained(
    model: nn.Module, batches: Iterable[Mapping[str, np.ndarray]], rates: Iterable[float], momentum: float
) -> nn.Module:
    """The network after a step of SGD on each batch, uint8 images and labels, at the learning rate beside it."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=momentum, fused=True)
    for batch, rate in zip(batches, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        logits = model(torch_nets.tensor(batch["image"].astype(np.float32) / 255))
        functional.cross_entropy(logits, torch_nets.tensor(batch["label"])).backward()
        optimizer.step()
    return model.eval()


def predictor(model: nn.Module, compiled: bool = False) -> Callable[[np.ndarray], np.ndarray]:
    """Images [B, 28, 28, 1] -> logits [B, 10]."""
    function = torch.compile(model, dynamic=True) if compiled else model

    def predict(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode(), _quiet():
            return function(torch_nets.tensor(images)).numpy()

    return predict


def saved_bytes(model: nn.Module) -> int:
    """The size of a file with the weights, without the network's code."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def export(model: nn.Module, images: np.ndarray, path: Path) -> None:
    """Writes the network to an ONNX file that takes any number of images [B, 1, 28, 28]."""
    with _quiet(), contextlib.redirect_stdout(io.StringIO()):
        example = torch_nets.tensor(images[:2])
        batch = {0: torch.export.Dim("batch")}
        torch.onnx.export(model, (example,), path, dynamo=True, external_data=False, dynamic_shapes=(batch,))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of libraries about themselves."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(level)
