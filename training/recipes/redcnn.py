"""RED-CNN, the yardstick: data, loss and schedule of our defaults, so that the networks alone are compared.

As with them, averaged weights, clipped gradients and bfloat16 are ours (`training.loop`).
"""

from __future__ import annotations

from pipelines.redcnn import REDCNN
from training.loop import Schedule
from training.recipes import Faithful, Recipe, flat, plane

RECIPES = {
    "red-cnn": Recipe(
        card={
            "name": "red-cnn",
            "paper": "Chen H., Zhang Y., Kalra M. K., Lin F., Chen Y., Liao P., Zhou J., Wang G. Low-Dose CT With a "
            "Residual Encoder-Decoder Convolutional Neural Network. IEEE Transactions on Medical Imaging "
            "2017;36:2524-2535.",
            "doi": "10.1109/TMI.2017.2715284",
            "input": "slice",
            "overlap_zyx": [0, 20, 20],
            "noise_map": False,
            "limits": "The yardstick, slow on a CPU. Blind to the noise level; sees one slice at a time.",
        },
        network=lambda: flat(REDCNN()),
        predict=plane,
        loss=Faithful,  # the paper: MSE
        patch_zyx=(1, 55, 55),
        batch=16,  # not stated
        schedule=Schedule(steps=20_000, learning_rate=2e-4),  # the paper: 1e-4, slowly decreased to 1e-5
        twins=True,
    )
}
