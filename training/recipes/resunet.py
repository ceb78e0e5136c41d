"""ResUNet on three slices, told the noise level: the default of a site that looks at the images.

The training is ours: loss, schedule, averaged weights, clipped gradients and bfloat16 (`training.loop`).
"""

from __future__ import annotations

from pipelines.resunet import SLICES, ResUNet
from training.loop import Schedule
from training.recipes import Faithful, Recipe, flat, told

RECIPES = {
    "quality-2.5d": Recipe(
        card={
            "name": "quality-2.5d",
            "paper": "Zhang K., Li Y., Zuo W., Zhang L., Van Gool L., Timofte R. Plug-and-Play Image Restoration with "
            "Deep Denoiser Prior. IEEE Transactions on Pattern Analysis and Machine Intelligence 2022;44:6360-6376.",
            "doi": "10.1109/TPAMI.2021.3088914",
            "input": "slab3",
            "overlap_zyx": [1, 45, 45],
            "noise_map": True,
            "limits": "One noise level for the whole series: where the noise is far above that of soft tissue in the "
            "middle (shoulders, pelvis) some stays. It takes nearly all noise away elsewhere, which looks smooth; a "
            "strength or blend below 1 keeps texture.",
        },
        network=lambda: flat(ResUNet()),
        predict=told(1),
        loss=Faithful,
        patch_zyx=(SLICES, 96, 96),
        batch=16,
        schedule=Schedule(steps=20_000, learning_rate=1e-3),
        twins=True,
    )
}
