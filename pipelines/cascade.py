"""The cascade with perceptual loss, and its parts (`drl`, `drl-mse`, `cnn10`, `cascade`, `cascade-mse`, `cascade-3`).

Ataei S., Alirezaie J., Babyn P., "Cascaded Convolutional Neural Networks with Perceptual Loss for Low Dose CT
Denoising", IJCNN 2020: a first network is trained with a perceptual loss; a second one, trained with MSE, takes the
result of the first and predicts what is still wrong with it. It compares two networks as stages, DRL (225,601
parameters) and CNN10 (335,873), and goes on with DRL for both.

- DRL: Gholizadeh-Ansari M., Alirezaie J., Babyn P., "Deep Learning for Low-Dose CT Denoising Using Perceptual Loss and
  Edge Detection Layer", J Digit Imaging 2020;33:504-515. Dilated convolutions, two skips, the input added at the end.
- CNN10: Wu D., Kim K., El Fakhri G., Li Q., "A Cascaded Convolutional Neural Network for X-ray Low-dose CT Image
  Denoising", arXiv 1705.04267. Predicts the difference, noisy minus clean. Benchmarks call another network CNN-10: the
  three layers of Chen H. et al., Biomed Opt Express 2017;8:679-694.

What the paper leaves open, and what we chose:

- Layers of DRL: a first kernel of 5×5 and no edge layer is the one reading that gives the printed number. Counted as in
  Keras, where the running mean and variance of a batch normalisation are parameters too; so is CNN10, whose "10 layers"
  are one without and nine with normalisation, then the last convolution. The published code adds a 3×3 convolution of
  one channel after DRL (225,611); the paper's number says it does not.
- Batch normalisation with Keras's constants, Glorot's uniform initialisation without offsets (its defaults). The last
  layer starts small, so that each untrained network is nearly the identity.
- Zeros around the image, Keras's "same"; there zero is air, in our units it is water.
- The sign of the final subtraction: the paper writes it the other way round than its labels demand. With the label
  (result of the first − clean), clean is the result of the first minus the prediction.
- In a later stage DRL does not add its input: it predicts a difference.
- A third stage does for the second what the second does for the first; the paper finds it adds next to nothing.
- Its output is 0.3 parts of the input and 0.7 of the denoised image: `pipelines.base.Options.blend` = 0.7.

What could be had and is left out:

- The edge layer of the original DRL (four Sobel filters beside the input, 232,001 parameters): the cascade's own number
  is without it, and nobody asked for the other.
- CNN10 as the second stage: the paper goes on with DRL alone, and nobody asked for the mixture.
- Stages that see the noisy image beside the result so far, as in Wu et al.: the paper gives them the result alone, and
  nobody asked for both.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

FEATURES = 64
DRL_HALO = 17
"""Pixels that a result of DRL depends on in each direction: 2 + (2 + 3 + 4 + 3 + 2) + 1."""
CNN10_NORMALISED = 9
CNN10_HALO = CNN10_NORMALISED + 2


def _conv(inputs: int, outputs: int, size: int = 3, dilation: int = 1) -> nn.Conv2d:
    """With zeros around it, Glorot's uniform initialisation, no offset."""
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2 * dilation, dilation=dilation)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # it has one
    return conv


def _layer(inputs: int, dilation: int = 1) -> nn.Sequential:
    """Convolution, batch normalisation (Keras's 1e-3 and 0.99), ReLU."""
    return nn.Sequential(
        _conv(inputs, FEATURES, dilation=dilation),
        nn.BatchNorm2d(FEATURES, eps=1e-3, momentum=0.01),
        nn.ReLU(inplace=True),
    )


class DRL(nn.Module):
    """Dilated residual network: one slice (batch, 1, y, x) to one, in network units; any size.

    Parameters
    ----------
    residual
        Add the input, so that the result is the denoised slice. Without, it is what the layers make: a difference.
    """

    def __init__(self, *, residual: bool = True) -> None:
        super().__init__()
        self.residual = residual
        self.first = _conv(1, FEATURES, 5)
        self.second = _layer(FEATURES, 2)
        self.middle = nn.Sequential(_layer(FEATURES, 3), _layer(FEATURES, 4), _layer(FEATURES, 3))
        self.sixth = _layer(2 * FEATURES, 2)
        self.last = _conv(2 * FEATURES, 1)
        with torch.no_grad():
            self.last.weight *= 0.01

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = functional.relu(self.first(x))
        two = self.second(one)
        six = self.sixth(torch.cat([self.middle(two), two], 1))
        result: torch.Tensor = self.last(torch.cat([six, one], 1))
        return x + result if self.residual else result


class WuCNN10(nn.Module):
    """Noisy slice minus what eleven 3×3 convolutions predict to be noise; (batch, 1, y, x), network units, any size."""

    def __init__(self) -> None:
        super().__init__()
        self.head = _conv(1, FEATURES)
        self.layers = nn.Sequential(*(_layer(FEATURES) for _ in range(CNN10_NORMALISED)))
        self.tail = _conv(FEATURES, 1)
        with torch.no_grad():
            self.tail.weight *= 0.01

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noise: torch.Tensor = self.tail(self.layers(functional.relu(self.head(x))))
        return x - noise


class Cascade(nn.Module):
    """DRL, then DRLs that take the result so far and predict its difference from the truth, which is subtracted.

    One slice (batch, 1, y, x) in and out, network units, any size. Only the last stage learns: the stages before it are
    frozen, statistics of their normalisation included, and must be given their weights, each trained the same way.

    Parameters
    ----------
    stages
        Number of networks, at least 2.
    """

    def __init__(self, stages: int = 2) -> None:
        super().__init__()
        self.stages = nn.ModuleList(DRL(residual=k == 0) for k in range(stages))
        self.stages[:-1].requires_grad_(False)

    def train(self, mode: bool = True) -> Cascade:
        """Training mode for the last stage alone."""
        super().train(mode)
        self.stages[:-1].eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.stages[0](x)
        for stage in self.stages[1:]:
            y = y - stage(y)
        return y
