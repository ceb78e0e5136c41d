"""Streams against the same operations on whole volumes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional

from pipelines import streaming
from pipelines.streaming import Stream


def _whole(stream: Stream) -> torch.Tensor:
    return torch.cat(list(stream))


def _features(slices: int) -> tuple[torch.Tensor, Iterator[torch.Tensor]]:
    volume = torch.randn(slices, 4, 9, 7, generator=torch.Generator().manual_seed(slices))
    return volume, (part.contiguous(memory_format=torch.channels_last) for part in torch.split(volume, 1))


@pytest.mark.parametrize("slices", [1, 2, 3, 8])
def test_temporal_is_a_convolution_across_slices(slices: int) -> None:
    volume, stream = _features(slices)
    weight, bias = torch.randn(5, 4, 3, 1), torch.randn(5)
    out = _whole(streaming.temporal(stream, weight, bias))
    expected = functional.conv3d(volume.transpose(0, 1)[None], weight[..., None], bias, padding=(1, 0, 0))
    assert torch.allclose(out, expected[0].transpose(0, 1), atol=1e-5)


@pytest.mark.parametrize("slices", [1, 2, 3, 8])
def test_volumetric_is_a_convolution_in_three_dimensions(slices: int) -> None:
    volume, stream = _features(slices)
    weight, bias = torch.randn(5, 4, 3, 3, 3), torch.randn(5)
    out = _whole(streaming.volumetric(stream, weight, bias))
    expected = functional.conv3d(volume.transpose(0, 1)[None], weight, bias, padding=1)
    assert torch.allclose(out, expected[0].transpose(0, 1), atol=1e-4)


def test_spatial_is_a_convolution_in_the_plane() -> None:
    volume, stream = _features(5)
    weight, bias = torch.randn(3, 4, 3, 3), torch.randn(3)
    expected = functional.conv2d(volume, weight, bias, padding=1)
    assert torch.allclose(_whole(streaming.spatial(stream, weight, bias)), expected, atol=1e-5)


def test_residual_waits_for_a_late_branch() -> None:
    """Two temporal convolutions answer two slices late."""
    volume, stream = _features(7)
    shift = torch.eye(4)[:, :, None, None] * torch.tensor([0.0, 0.0, 1.0])[None, None, :, None]  # the slice after

    def branch(x: Stream) -> Stream:
        return streaming.temporal(streaming.temporal(x, shift, None), shift, None)

    expected = volume.clone()
    expected[:5] += volume[2:]
    assert torch.allclose(_whole(streaming.residual(stream, branch)), expected, atol=1e-6)


def test_residual_leaves_what_it_holds() -> None:
    volume, stream = _features(4)
    out = _whole(
        streaming.residual(stream, lambda x: streaming.relu(streaming.spatial(x, torch.zeros(4, 4, 3, 3), None)))
    )
    assert torch.equal(out, volume)
