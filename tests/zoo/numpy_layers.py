"""Layers of image networks in NumPy and float64, written from their definitions, for comparison."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def conv(x: np.ndarray, layer: Mapping[str, Any], stride: int = 1, groups: int = 1) -> np.ndarray:
    """A convolution of [B, H, W, C] with kernel [k, k, C / groups, D] and k // 2 pixels of padding, and its bias."""
    kernel = np.asarray(layer["kernel"], np.float64)
    border, own = len(kernel) // 2, kernel.shape[3] // groups
    x = np.pad(x, ((0, 0), (border, border), (border, border), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], (1, 2))[:, ::stride, ::stride]
    parts = [
        np.einsum("bhwcij,ijcd->bhwd", each, kernel[..., g * own : (g + 1) * own])
        for g, each in enumerate(np.split(windows, groups, 3))
    ]
    return np.concatenate(parts, -1) + layer.get("bias", 0.0)


def up_conv(x: np.ndarray, layer: Mapping[str, Any]) -> np.ndarray:
    """A transposed convolution of stride 2: each pixel times the kernel is a window of 2 x 2 pixels of the output."""
    kernel, (batch, height, width, _) = np.asarray(layer["kernel"], np.float64), x.shape
    out = np.zeros((batch, 2 * height, 2 * width, kernel.shape[3]))
    for i, j in np.ndindex(2, 2):
        out[:, i::2, j::2] = x @ kernel[i, j]
    return out + layer["bias"]


def dense(x: np.ndarray, layer: Mapping[str, Any]) -> np.ndarray:
    return x @ np.asarray(layer["kernel"], np.float64) + layer["bias"]


def batch_norm(x: np.ndarray, layer: Mapping[str, Any], running: Mapping[str, Any]) -> np.ndarray:
    return (x - running["mean"]) / np.sqrt(running["var"] + 1e-5) * layer["scale"] + layer["bias"]


def max_pool(x: np.ndarray, window: int, stride: int, border: int) -> np.ndarray:
    x = np.pad(x, ((0, 0), (border, border), (border, border), (0, 0)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(x, (window, window), (1, 2))[:, ::stride, ::stride]
    return windows.max((-1, -2))


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)
