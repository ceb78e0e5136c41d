"""The phantom's table in a model's card, and the model's page in docs/models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.base import Execution, denoise_volume, load
from pipelines.noise import noise_level
from pipelines.runtime import INT8_MAX_LOSS_DB, WEIGHTS
from training.card import plateau_in_words, write_card
from training.measuring.cases import PHANTOM_PIXEL_MM, PHANTOM_SEED, PHANTOM_SPACING_MM, volume_of
from training.metrics import FULL, SOFT_TISSUE, psnr
from training.simulate import low_dose
from training.sources.phantom import chest_abdomen
from training.tissues import tissue_masks

Array = NDArray[np.float32]

DOSE = 0.25
SLICES = 32
PAGES = Path(__file__).parents[2] / "docs" / "models"


def measure(before: Array, after: Array, truth: Array) -> dict[str, Any]:
    """PSNR, and mean shift and noise of each tissue that is there, of an image before and after denoising.

    Parameters
    ----------
    before, after, truth
        (z, y, x) HU; the tissue masks are taken from the truth.
    """
    tissues = {}
    for name, mask in tissue_masks(truth).items():
        if not mask.any():
            continue
        errors = before[mask] - truth[mask], after[mask] - truth[mask]
        tissues[name] = {
            "voxels": int(mask.sum()),
            "mean_shift_hu": round(float(errors[1].mean(dtype=np.float64)), 3),
            "error_sd_before_hu": round(float(errors[0].std(dtype=np.float64)), 2),
            "error_sd_after_hu": round(float(errors[1].std(dtype=np.float64)), 2),
        }
    nothing = np.zeros(truth.shape, np.bool_)
    return {
        "psnr_db": {
            str(window): [round(psnr(image, truth, window), 2) for image in (before, after)]
            for window in (FULL, SOFT_TISSUE)
        },
        "noise_level_hu": [round(noise_level(image, nothing, PHANTOM_PIXEL_MM), 1) for image in (before, after)],
        "tissues": tissues,
    }


def table(measured: dict[str, Any]) -> str:
    """The measurement as Markdown."""
    before, after = measured["noise_level_hu"]
    lines = [
        "| | before | after |",
        "|---|---|---|",
        *(f"| PSNR, {span} (dB) | {a:.2f} | {b:.2f} |" for span, (a, b) in measured["psnr_db"].items()),
        f"| noise level (HU) | {before:.1f} | {after:.1f} |",
        "",
        "| tissue | mean shift (HU) | error SD before (HU) | error SD after (HU) |",
        "|---|---|---|---|",
        *(
            f"| {name} | {t['mean_shift_hu']:+.2f} | {t['error_sd_before_hu']:.1f} | {t['error_sd_after_hu']:.1f} |"
            for name, t in measured["tissues"].items()
        ),
    ]
    return "\n".join(lines)


def _how(training: dict[str, Any]) -> list[str]:
    """Lines on the training itself; what was not recorded in its time is left out."""
    seen = f" ({training['samples']} patches)" if "samples" in training else ""
    at = f", commit {training['commit']}" if training.get("commit") else ""
    lines = [
        f"{training['steps']} steps{seen} in {training['hours']:g} h on {training['hardware']}, "
        f"seed {training['seed']}{at}:",
        "",
        f"    {training['command']}",
    ]
    if began_with := training.get("began_with"):
        lines += ["", "It began with the weights of {} (version {}).".format(*began_with.split())]
    if features := training.get("features"):
        backbone, *digest = features.split()
        known = f", weights SHA-256 `{digest[0]}`" if digest else ""
        lines += ["", f"Compared by the features of {backbone}{known}, beside its values."]
    if plateau := training.get("plateau"):
        lines += ["", plateau_in_words(plateau)]
        if validated_on := training.get("validated_on"):
            lines[-1] += f" It was validated on {validated_on}."
    return lines


def _taught_spacing(training: dict[str, Any]) -> str:
    """What of the range was shown; older cards do not tell."""
    if "slice_spacing_mm" not in training:
        return ""
    return " Trained on slices {:g} to {:g} mm apart and pixels of {:g} to {:g} mm.".format(
        *training["slice_spacing_mm"], *training["pixel_spacing_mm"]
    )


def _in_int8(card: dict[str, Any]) -> list[str]:
    """Lines on the INT8 version, if there is one."""
    if "int8" not in card:
        return []
    int8 = card["int8"]
    phantoms, series = int8["calibrated_on"]["phantoms"], len(int8["calibrated_on"]["series"])
    in_float = ", ".join(f"`{layer}`" for layer in int8["float_layers"])
    steps = int8["tuning_steps"]
    return [
        "## In INT8",
        "",
        f"Against fp32, on patches of {', '.join(int8['validated_on'])}, at all doses that were taught:",
        "",
        "| PSNR | fp32 (dB) | INT8 (dB) | lost (dB) |",
        "|---|---|---|---|",
        *(
            f"| {window} | {before:.2f} | {after:.2f} | {int8['loss_db'][window]:.3f} |"
            for window, (before, after) in int8["psnr_db"].items()
        ),
        "",
        f"The images differ by {int8['rms_hu']:.2f} HU (root mean square). A node takes INT8 "
        + ("by itself" if card["int8_loss_db"] <= INT8_MAX_LOSS_DB else "**only where it is told to**")
        + ", on a CPU that has instructions for it.",
        "",
        f"Ranges from {phantoms} phantoms and {series} series of its training, "
        + (f"{steps} steps of fine-tuning" if steps else "no fine-tuning")
        + (f"; in float stay {in_float}, " if in_float else "; in float stays nothing, ")
        + f"{100 * int8['float_part']:.1f} % of the products."
        + (f" Commit {int8['commit']}:" if int8["commit"] else ""),
        "",
        f"    {int8['command']}",
        "",
    ]


def page(card: dict[str, Any]) -> str:
    """The page of a model in docs/models, from its card."""
    training, measured = card["training"], card["measured"]
    envelope = card["valid_for"]
    sources = [
        f"- {source['name']} ({source['licence']}): {source['attribution']} Licence status: {source['licence_status']}"
        for source in training["series"]
    ] or ["- none"]
    return "\n".join(
        [
            f"# {card['name']}",
            "",
            f"{card['paper']}" + (f" doi:{card['doi']}" if card["doi"] else ""),
            "",
            f"Version {card['version']}, weights SHA-256 `{card['weights_sha256']}`. "
            f"Input: {card['input']}. Noise map: {'yes, scaled by `strength`' if card['noise_map'] else 'no'}.",
            "",
            "Valid for slice spacing {:g} to {:g} mm and pixels of {:g} to {:g} mm.".format(
                *envelope["slice_spacing_mm"], *envelope["pixel_spacing_mm"]
            )
            + _taught_spacing(training),
            "",
            "## Measured",
            "",
            f"In {card['precision']}, on a phantom at {measured['dose']:g} of full dose, {measured['slices']} slices "
            f"of 512×512, seed {measured['seed']}, which no training saw:",
            "",
            table(measured),
            "",
            "PSNR is taken over all voxels, clipped to the stated range. Masks come from the noise-free truth, eroded.",
            "",
            f"    {measured['command']}",
            "",
            *_in_int8(card),
            "## Trained",
            "",
            card["trained_on"],
            "",
            *_how(training),
            "",
            "Real series:",
            "",
            *sources,
            "",
            "## Known limits",
            "",
            card["limits"],
            "",
            "## Not covered by its training",
            "",
            card["never_tried_on"],
            "",
        ]
    )


def write_page(name: str) -> None:
    """Write the page of the installed pipeline `name`, if it was measured."""
    card = json.loads((WEIGHTS / f"{name}.json").read_text(encoding="utf-8"))
    if card["measured"]:
        PAGES.mkdir(parents=True, exist_ok=True)
        (PAGES / f"{name}.md").write_text(page(card), encoding="utf-8")


def write(name: str, command: str, slices: int = SLICES, seed: int = PHANTOM_SEED) -> str:
    """Measure the installed pipeline `name` on the phantom, write its card and page, return the table.

    Parameters
    ----------
    name
        As in `pipelines.base.names`.
    command
        The command line, for the card.
    slices, seed
        Of the phantom.

    Raises
    ------
    FileNotFoundError
        If the pipeline has no card in pipelines/weights.
    """
    path = WEIGHTS / f"{name}.json"
    card = json.loads(path.read_text(encoding="utf-8"))
    truth = chest_abdomen(slices, 512, PHANTOM_PIXEL_MM, PHANTOM_SPACING_MM, seed)
    before = low_dose(truth, PHANTOM_PIXEL_MM, DOSE, seed)
    volume = volume_of(before, PHANTOM_PIXEL_MM, PHANTOM_SPACING_MM)
    after = denoise_volume(load(name, Execution(precision="fp32")), volume)
    card["measured"] = {
        "command": command,
        "dose": DOSE,
        "seed": seed,
        "slices": slices,
        **measure(before, after, truth),
    }
    write_card(path, card)
    write_page(name)
    return table(card["measured"])
