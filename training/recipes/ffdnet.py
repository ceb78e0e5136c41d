"""FFDNet on three slices, told the noise level: the noise of the centre slice.

The training is ours: loss, schedule, averaged weights, clipped gradients and bfloat16 (`training.loop`).
"""

from __future__ import annotations

from pipelines.ffdnet import SLICES, STRIDE, FFDNet
from training.loop import Schedule
from training.recipes import Faithful, Recipe, flat, told

RECIPES = {
    "fast-2.5d": Recipe(
        card={
            "name": "fast-2.5d",
            "paper": "Zhang K., Zuo W., Zhang L. FFDNet: Toward a Fast and Flexible Solution for CNN-Based Image "
            "Denoising. IEEE Transactions on Image Processing 2018;27:4608-4622.",
            "doi": "10.1109/TIP.2018.2839891",
            "input": "slab3",
            "overlap_zyx": [1, 21, 21],
            "noise_map": True,
            "limits": "One noise level for the whole series: where the noise is far above that of soft tissue in the "
            "middle (shoulders, pelvis) some stays. It takes nearly all noise away elsewhere, which looks smooth; a "
            "strength or blend below 1 keeps texture.",
        },
        network=lambda: flat(FFDNet()),
        predict=told(STRIDE),
        loss=Faithful,
        patch_zyx=(SLICES, 96, 96),
        batch=16,
        schedule=Schedule(steps=30_000, learning_rate=3e-4),
        twins=True,
    )
}
