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


def test_slices_are_the_volume() -> None:
    volume = torch.arange(2 * 3 * 5.0).reshape(5, 2, 3)
    parts = list(streaming.slices(volume))
    assert [part.shape for part in parts] == [(1, 1, 2, 3)] * 5
    assert torch.equal(torch.cat(parts)[:, 0], volume)


def test_triples_replicate_the_ends() -> None:
    volume = torch.arange(5.0)[:, None, None].expand(5, 2, 2)
    triples = _whole(streaming.triples(volume))[:, :, 0, 0].tolist()
    assert triples == [[0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 4]]
    assert _whole(streaming.triples(volume[:1]))[:, :, 0, 0].tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(("rows", "height", "halo"), [(1, 4, 3), (10, 4, 3), (16, 4, 1), (7, 100, 19)])
def test_strips_give_each_row_once_with_its_halo(rows: int, height: int, halo: int) -> None:
    seen = []
    for read, keep, place in streaming.strips(rows, height, halo):
        source = list(range(rows))[read]
        assert source[keep] == list(range(rows))[place]
        assert source[0] == max(place.start - halo, 0)
        assert source[-1] == min(place.stop + halo, rows) - 1
        seen += source[keep]
    assert seen == list(range(rows))
