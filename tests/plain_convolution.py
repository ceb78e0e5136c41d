"""Convolution and pooling in float64 numpy: the independent truth for networks of feature maps."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def convolve(
    x: Array,
    weight: NDArray[Any],
    bias: NDArray[Any],
    stride: int = 1,
    padding: int = 1,
    mode: Literal["constant", "reflect"] = "constant",
) -> Array:
    """Cross-correlation of (channels, y, x) with (features, channels, k, k), one tap of the kernel after the other."""
    k = weight.shape[-1]
    padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding)), mode=mode)
    rows, columns = ((n - k) // stride + 1 for n in padded.shape[1:])
    out = np.zeros((len(weight), rows, columns)) + bias[:, None, None].astype(np.float64)
    for i in range(k):
        for j in range(k):
            seen = padded[:, i : i + stride * rows : stride, j : j + stride * columns : stride][:, :rows, :columns]
            out += np.tensordot(weight[:, :, i, j].astype(np.float64), seen, axes=1)
    return out


def max_pool(x: Array, size: int, stride: int) -> Array:
    """Largest of each window of (channels, y, x) that fits."""
    rows, columns = ((n - size) // stride + 1 for n in x.shape[1:])
    out = np.empty((len(x), rows, columns))
    for i in range(rows):
        for j in range(columns):
            out[:, i, j] = x[:, i * stride : i * stride + size, j * stride : j * stride + size].max(axis=(1, 2))
    return out
