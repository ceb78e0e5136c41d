"""The critic of the Wasserstein GAN (DCSWGAN): needed for training only, never shipped.

You C. et al., "Low-dose CT via deep CNN with skip connection and network in network", SPIE 2019, shows it in a figure
only; this is the critic that the same group published for SMGAN (You C. et al., IEEE Access 2018;6:41839-41855) and
that of WGAN-VGG (Yang Q. et al., IEEE Trans Med Imaging 2018;37:1348-1357). The losses are in `training.losses`.
"""

from __future__ import annotations

import torch
from torch import nn

PATCH_PX = 80
"""Side of the paper's patches."""
FILTERS = (64, 64, 128, 128, 256, 256)
STRIDES = (1, 2, 1, 2, 1, 2)
SLOPE = 0.2
"""Of the LeakyReLU."""
HIDDEN = 1024


class Critic(nn.Module):
    """Six 3×3 convolutions, two fully connected layers, LeakyReLU between; no sigmoid.

    No batch normalisation either: the gradient penalty is a matter of each image alone. 27,360,705 parameters for
    patches of 80 × 80, 17,923,521 for 64 × 64.

    Parameters
    ----------
    patch_px
        Side of the square patches.
    """

    def __init__(self, patch_px: int = PATCH_PX) -> None:
        super().__init__()
        self.patch_px = patch_px
        layers: list[nn.Module] = []
        side = patch_px
        for inputs, outputs, stride in zip((1, *FILTERS), FILTERS, STRIDES, strict=False):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.LeakyReLU(SLOPE)]
            side = -(-side // stride)
        layers += [nn.Flatten(), nn.Linear(FILTERS[-1] * side * side, HIDDEN), nn.LeakyReLU(SLOPE)]
        self.layers = nn.Sequential(*layers, nn.Linear(HIDDEN, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 1, patch_px, patch_px) in network units to (n, 1): the higher, the more like full dose.

        Raises
        ------
        ValueError
            If the patches have another shape: the first fully connected layer fixes it.
        """
        if images.shape[1:] != (1, self.patch_px, self.patch_px):
            raise ValueError(
                f"critic for patches (1, {self.patch_px}, {self.patch_px}) was given {tuple(images.shape[1:])}: "
                "make it with patch_px of the training patches"
            )
        score: torch.Tensor = self.layers(images)
        return score
