"""STResNet: its size and its reach."""

from __future__ import annotations

import torch

from pipelines.stresnet import STResNet


def test_number_of_parameters() -> None:
    """Counted by hand: 9 weights per pair of channels across, 3 along, and a bias for each output."""

    def pair(inputs: int, outputs: int) -> int:
        return inputs * outputs * 9 + outputs + outputs * outputs * 3 + outputs

    expected = pair(1, 32) + 17 * pair(32, 32) + pair(32, 1)
    assert sum(p.numel() for p in STResNet().parameters()) == expected == 213_701


def test_untrained_it_is_the_identity() -> None:
    x = torch.randn(1, 1, 4, 9, 9)
    assert torch.equal(STResNet()(x), x)


def test_halo_is_the_reach_of_one_voxel() -> None:
    torch.manual_seed(0)
    network = STResNet(features=4, blocks=2).double()
    for parameter in network.parameters():
        torch.nn.init.uniform_(parameter, 0.1, 1)  # all positive: nothing cancels, no ReLU closes
    x = torch.zeros(1, 1, 1, 41, 41, dtype=torch.double)
    pulse = x.clone()
    pulse[..., 20, 20] = 1
    reached = (network(pulse) - network(x)).abs()[0, 0, 0].amax(1) > 1e-12
    assert network.halo == 7
    assert reached.nonzero().flatten().tolist() == list(range(20 - 7, 20 + 8))
