"""The CT auto-encoder whose encoder is the default feature backbone of the perceptual loss.

Li M., Hsu W. et al., "SACNN: Self-Attention Convolutional Neural Network for Low-Dose CT Denoising With Self-Supervised
Perceptual Loss Network", IEEE Trans Med Imaging 2020;39:2289-2301, put the encoder of an auto-encoder trained on CT in
the place of VGG. Widths 32-64-128, two steps of stride 2 and LeakyReLU 0.1 are ours, as is the decoder, which mirrors
them. The shipped weights, ``training/weights/ct-ae.safetensors``, come from::

    python -m training.autoencoder --out training/weights --series B-5mm … --held-out chestpe …

with folders of full-dose DICOM series. Its card, ``ct-ae.json``, has the exact command.

128 features at a quarter of the resolution are eight values per pixel: nothing is squeezed, so the reconstruction error
says that the features keep what is in the image, not that they understand it. On a phantom, quarter-dose noise, blur
and a shift of equal mean square error have an L_P of 1.8, 1.4 and 1.0; of the random network 1.2, 1.3 and 1.0.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import nn

from pipelines.scaling import to_hu, to_network
from pipelines.volume import read_volume
from training.card import source_of, write_card
from training.command_line import without_folders
from training.data import AIR_PATCH_HU
from training.features import CT_AE_SLOPE, CT_AE_WEIGHTS, CT_AE_WIDTHS, ct_encoder
from training.sources.layouts import Case, find
from training.sources.phantom import chest_abdomen
from training.sources.scans import HU_RANGE

Half = NDArray[np.float16]

STEPS = 5000
BATCH = 8
PATCH_PX = 64
LEARNING_RATE = 1e-3
FINAL_RATE = 0.01
"""Learning rate at the end of the cosine, as a part of the first."""
REAL_PART = 0.5
PHANTOMS = 10
PHANTOM_SLICES = 10
_HELD_OUT_SEED = 900_001


class CtAutoEncoder(nn.Module):
    """Encoder and mirrored decoder, 185,217 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ct_encoder()
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(CT_AE_WIDTHS[2], CT_AE_WIDTHS[1], 3, 2, 1, output_padding=1),
            nn.LeakyReLU(CT_AE_SLOPE),
            nn.ConvTranspose2d(CT_AE_WIDTHS[1], CT_AE_WIDTHS[0], 3, 2, 1, output_padding=1),
            nn.LeakyReLU(CT_AE_SLOPE),
            nn.Conv2d(CT_AE_WIDTHS[0], 1, 3, padding=1, padding_mode="reflect"),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 1, y, x) to the same."""
        y: torch.Tensor = self.decoder(self.encoder(x))
        return y


def patches(volumes: Sequence[Sequence[Half]], step: int, seed: int) -> torch.Tensor:
    """Random patches (`BATCH`, 1, 64, 64) in network units; they depend on seed and step alone.

    Parameters
    ----------
    volumes
        Phantoms, then real volumes, each a list of (z, y, x) in HU. `REAL_PART` of the patches come from the latter if
        there are any. A patch of air is drawn once in ten tries.
    """
    rng = np.random.default_rng((seed, step))
    out = np.empty((BATCH, 1, PATCH_PX, PATCH_PX), np.float32)
    phantoms, real = volumes
    for i in range(BATCH):
        kind = real if real and rng.random() < REAL_PART else phantoms
        volume = kind[int(rng.integers(len(kind)))]
        while True:
            z, top, left = (int(rng.integers(0, n - p + 1)) for n, p in zip(volume.shape, (1, 64, 64), strict=True))
            patch = volume[z, top : top + PATCH_PX, left : left + PATCH_PX].astype(np.float32)
            if rng.random() < 0.1 or patch.mean() > AIR_PATCH_HU:
                break
        if rng.random() < 0.5:
            patch = patch[::-1]
        if rng.random() < 0.5:
            patch = patch.T
        out[i, 0] = patch
    return to_network(torch.from_numpy(out))


def train_autoencoder(volumes: Sequence[Sequence[Half]], steps: int = STEPS, seed: int = 1) -> CtAutoEncoder:
    """Train on reproducing full-dose patches: mean square error, Adam, cosine schedule, float32.

    Parameters
    ----------
    volumes
        As for `patches`.
    steps
        Iterations.
    seed
        Of the first weights and of the patches.
    """
    torch.manual_seed(seed)
    network = CtAutoEncoder().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # no stub
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    start = time.monotonic()
    for step in range(steps):
        x = patches(volumes, step, seed)
        loss = (network(x) - x).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            error = to_hu(math.sqrt(loss.item()))
            print(f"step {step + 1}: RMSE {error:.1f} HU, {time.monotonic() - start:.0f} s", flush=True)
    return network.eval().requires_grad_(False)  # type: ignore[no-any-return]  # of the overload above


def reconstruction_rmse_hu(network: CtAutoEncoder, volume: Half) -> float:
    """Root mean square of output minus input over whole slices (z, y, x), y and x multiples of 4; HU."""
    total = 0.0
    with torch.inference_mode():
        for plane in volume:
            x = to_network(torch.from_numpy(plane.astype(np.float32))[None, None])
            total += float((network(x) - x).double().square().mean())
    return to_hu(math.sqrt(total / len(volume)))


def _phantom(seed: int) -> Half:
    rng = np.random.default_rng((seed, 1))
    pixel_mm, spacing_mm, f50 = rng.uniform(0.65, 0.95), rng.uniform(1, 5), rng.uniform(0.35, 0.8)
    return chest_abdomen(PHANTOM_SLICES, 512, pixel_mm, spacing_mm, seed, f50).astype(np.float16)


def _case(folder: Path) -> Case:
    """The one series in `folder`."""
    cases = find(folder)
    if len(cases) != 1:
        raise SystemExit(f"{len(cases)} CT series in {folder}: name the folder of one")
    return cases[0]


def _volume(case: Case) -> Half:
    volume = read_volume(case.full)
    return np.clip(np.where(volume.padding, HU_RANGE[0], volume.hu), *HU_RANGE).astype(np.float16)


def _write(out: Path, network: CtAutoEncoder, facts: dict[str, Any]) -> None:
    state = {name: tensor.half().contiguous() for name, tensor in network.state_dict().items()}
    weights = save(state)
    digest = hashlib.sha256(weights).hexdigest()
    out.mkdir(parents=True, exist_ok=True)
    (out / CT_AE_WEIGHTS.name).write_bytes(weights)
    card = {
        "name": CT_AE_WEIGHTS.stem,
        "purpose": "Features for the perceptual loss; the decoder is here so that the error can be measured again.",
        "paper": "Li M., Hsu W., Xie X., Cong J., Gao W. SACNN: Self-Attention Convolutional Neural Network for "
        "Low-Dose CT Denoising With Self-Supervised Perceptual Loss Network. IEEE Transactions on Medical Imaging "
        "2020;39:2289-2301.",
        "doi": "10.1109/TMI.2020.2968472",
        "parameters": sum(tensor.numel() for tensor in state.values()),
        "precision": "fp16 in the file, fp32 when run",
        "weights_sha256": digest,
        "hu_window": list(HU_RANGE),
        **facts,
        "never_tried_on": "Sharp (lung, bone) kernels, limbs, children, dual-energy and cone-beam CT. Whether its "
        "features agree with what a radiologist sees has not been measured.",
    }
    write_card(out / CT_AE_WEIGHTS.with_suffix(".json").name, card)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure and write weights and card."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m training.autoencoder", description="Train the CT auto-encoder.")
    parser.add_argument("--out", type=Path, required=True, help="folder of weights and card")
    parser.add_argument("--series", type=Path, nargs="*", default=[], help="folders of full-dose series to train on")
    parser.add_argument("--held-out", type=Path, nargs="*", default=[], help="folders of series to measure on, only")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    phantoms = [_phantom(args.seed * 1000 + k) for k in range(PHANTOMS)]
    cases = [_case(folder) for folder in args.series]
    held_out = {folder.name: _case(folder) for folder in args.held_out}
    real = [_volume(case) for case in cases]
    start = time.monotonic()
    network = train_autoencoder((phantoms, real), args.steps, args.seed)
    hours = (time.monotonic() - start) / 3600
    # what ships is half precision, so that is what is measured
    network.load_state_dict({name: tensor.half().float() for name, tensor in network.state_dict().items()})
    measured = {f"phantom of seed {_HELD_OUT_SEED}": reconstruction_rmse_hu(network, _phantom(_HELD_OUT_SEED))}
    measured |= {name: reconstruction_rmse_hu(network, _volume(case)) for name, case in held_out.items()}
    facts = {
        "trained_on": f"{PHANTOMS} noise-free chest-and-abdomen phantoms of {PHANTOM_SLICES} slices, and the full-dose "
        f"series below ({REAL_PART:.0%} of the patches); patches of {PATCH_PX}×{PATCH_PX}, mean square error",
        "training": {
            "command": "python -m training.autoencoder "
            + without_folders(words, (args.out, *args.series, *args.held_out)),
            "seed": args.seed,
            "steps": args.steps,
            "batch": BATCH,
            "hours": round(hours, 2),
            "hardware": f"CPU ({platform.machine()}), 1 thread, float32",
            "series": [asdict(source_of(case)) for case in cases],
        },
        "measured": {
            "reconstruction_rmse_hu": {name: round(error, 2) for name, error in measured.items()},
            "held_out": "no patch of these was trained on",
        },
    }
    _write(args.out, network, facts)


if __name__ == "__main__":
    main()
