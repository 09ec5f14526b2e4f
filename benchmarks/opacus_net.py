"""DP-SGD by Opacus: the network of problems.py, with norms of gradients from the inputs and errors of its layers.

That is Opacus's "ghost clipping". Like ours it computes the gradient of a kernel for no single example. It is not
compiled: it works by hooks.
"""

from collections.abc import Callable

import torch
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import nn

from benchmarks.contest import Block
from benchmarks.problems import PROBLEMS, SAMPLE
from benchmarks.torch_nets import DEVICE, TWINS, repeated, tensor


def train_block() -> Block:
    """A function n -> None that trains for n steps of DP-SGD on one batch."""
    twin = TWINS["DP-SGD"]
    image, label = (tensor(PROBLEMS["DP-SGD"].batch()[name]) for name in ("image", "label"))
    model = twin.model().to(DEVICE)
    step = private_step(model, twin.optimizer(model.parameters()), noise=1.0, batch_size=SAMPLE)
    return repeated(lambda: step(image, label))


def private_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, noise: float, batch_size: int
) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """A step of DP-SGD with a clip norm of 1, as a function of images and labels."""
    followed = GradSampleModuleFastGradientClipping(model, max_grad_norm=1.0, use_ghost_clipping=True)
    private = DPOptimizerFastGradientClipping(
        optimizer, noise_multiplier=noise, max_grad_norm=1.0, expected_batch_size=batch_size
    )
    criterion = DPLossFastGradientClipping(followed, private, nn.CrossEntropyLoss())

    def step(image: torch.Tensor, label: torch.Tensor) -> None:
        private.zero_grad()
        criterion(followed(image), label).backward()
        private.step()

    return step
