"""Weights and model card of a trained network: what `pipelines.runtime` reads and docs/models shows."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save
from torch import nn

from pipelines.ct_slice import read_slice
from training.data import ADDED_DOSE, ADDED_NOISE_HU
from training.sources.layouts import Case
from training.sources.scans import HU_RANGE
from training.sources.splits import entry_of

LOGS = Path(__file__).parent / "logs"
"""Of the trainings whose weights are installed, ``NAME.jsonl``."""
_NEVER_TAUGHT = (
    "Head, neck and limbs of patients; children; iterative or network reconstructions of patients; dual-energy, "
    "cone-beam; photon starvation and metal streaks"
)
"""What neither phantoms nor the series of the split table that teach show."""
UNCHECKED = (
    "Given here as known to us, not checked against the collection's own page; check there before redistributing."
)
"""What the card says of licence, DOI and attribution whose status in ``SOURCE.txt`` begins with UNVERIFIED."""

PLATEAU_DB = 0.05
"""A network whose validated PSNR moves by less in a third of its training has reached its plateau."""
_CHECKS_OF_A_LINE = 4
TOLERANCE = 1.25
"""How much smaller or larger than in training slice distance and pixels may be, as a factor. A network sees pixels, not
millimetres, and patients differ by more in size, kernels by a factor of three in sharpness: a quarter beyond the ends
looks like something that was shown."""
CLOSER = 2.0
"""How much closer than in training slices may lie: the closer, the more alike are neighbours, in tissue and, where
slices overlap, in noise. Phantoms whose slices are up to twice as thick as their distance showed both."""
_ROUNDED_MM = 0.01
"""Positions and pixel sizes in headers are rounded by as much."""


@dataclass(frozen=True, slots=True)
class Source:
    """A real series used in training, with what its licence demands."""

    name: str
    licence: str
    licence_status: str
    """Who has checked the licence, in words."""
    attribution: str
    study_uid: str
    """StudyInstanceUID, by which other series of the same examination are known. Nothing else of the patient is kept:
    a digest of a PatientID is undone by trying all."""


@dataclass(frozen=True, slots=True)
class Plateau:
    """Had the validated PSNR come to rest when the learning rate began to fall?"""

    gain_db: float | None
    """Rise of the validated PSNR (a fall is below 0) over the last third of the constant part, from a straight line
    through what of it one state of the code and one loss trained; None if that has too few validations to tell."""
    reached: bool | None
    """None of a network that learns against a critic: the PSNR is not what it learns."""
    obstacle: str = ""
    """Why it counts as not reached whatever its own PSNR did; empty if nothing is in the way."""

    @classmethod
    def of(cls, log: Path, decay_from: int, same_since: int = 0, obstacle: str = "") -> Plateau:
        """From the log of a training; not reached while there are fewer than `_CHECKS_OF_A_LINE` validations.

        Parameters
        ----------
        log
            ``log.jsonl``.
        decay_from
            Step at which the learning rate began to fall.
        same_since
            Step after which neither code nor loss changed; what came before says nothing of what they come to.
        obstacle
            As the attribute.
        """
        rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        checks = [(row["step"], row["validation_psnr_db"]) for row in rows if "validation_psnr_db" in row]
        last = [check for check in checks if decay_from * 2 / 3 <= check[0] <= decay_from and check[0] > same_since]
        if len(last) < _CHECKS_OF_A_LINE:
            return cls(None, False, obstacle)
        steps, values = np.array(last).T
        gain = float(np.polyfit(steps, values, 1)[0] * decay_from / 3)
        return cls(round(gain, 3), abs(gain) < PLATEAU_DB and not obstacle, obstacle)


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """How a network came to be."""

    command: str
    commit: str
    """Of the code that trained it, with the step from which on if there were several; empty outside a checkout."""
    began_with: str
    """Network whose weights it began with, and their digest; empty if it began with chance."""
    features: str
    """Digest of the weights that a perceptual loss compared features with; empty without one."""
    seed: int
    hours: float
    steps: int
    samples: int
    hardware: str
    phantoms: int
    series: tuple[Source, ...]
    pairs: int
    """How many of them were shown with their real low-dose image."""
    plateau: Plateau
    slice_spacing_mm: tuple[float, float]
    """Least and largest of what taught."""
    pixel_spacing_mm: tuple[float, float]
    validated_on: str
    """What the validated PSNR is of, in words."""


def plateau_in_words(plateau: Mapping[str, Any]) -> str:
    """A sentence on the plateau in a card."""
    obstacle = plateau.get("obstacle", "")
    if plateau["reached"] is None:
        return f"There is no plateau to reach: {obstacle}."
    gain = plateau["gain_db"]
    if gain is None:
        moved = "there were too few validations of one state of the code and one loss to tell"
    else:
        moved = (
            f"the validated PSNR {'fell' if gain < 0 else 'rose'} by {abs(gain):.2f} dB in the last third before the "
            "learning rate fell"
        )
    return f"The plateau was {'' if plateau['reached'] else '**not** '}reached: {moved}{obstacle and f'; {obstacle}'}."


def card_in(training: Path) -> Path:
    """The card in the folder of a training.

    Raises
    ------
    FileNotFoundError
        If there is none: nothing was trained there.
    """
    card = next(training.glob("*.json"), None)
    if card is None:
        raise FileNotFoundError(f"{training} holds no card: it is no folder of a training, or that has not saved yet")
    return card


def commit() -> str:
    """Commit of the checkout that this code runs from; empty if it is none, ``+`` after it if files were changed."""
    here = Path(__file__).parent
    try:
        head, changed = (
            subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
            for words in (
                ("rev-parse", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no", "--", ".", "../pipelines"),
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + "+" * bool(changed)


def source_of(case: Case) -> Source:
    """Study of a series, and its licence and attribution from ``SOURCE.txt`` in the folder of its first file.

    Without that file nothing is known of them, and the card says so.

    Raises
    ------
    ValueError
        If the file does not name all three.
    """
    study_uid = read_slice(case.full[0]).study_uid
    path = case.full[0].parent / "SOURCE.txt"
    if not path.exists():
        return Source(case.name, "not stated", "no SOURCE.txt lay beside the images", "not stated", study_uid)
    lines = (line.partition(": ") for line in path.read_text(encoding="utf-8").splitlines())
    fields = {key: value.strip() for key, _, value in lines}
    missing = [key for key in ("licence", "licence status", "attribution") if not fields.get(key)]
    if missing:
        raise ValueError(f"SOURCE.txt of {path.parent.name} does not name {' and '.join(missing)}")
    status = UNCHECKED if fields["licence status"].startswith("UNVERIFIED") else fields["licence status"]
    return Source(path.parent.name, fields["licence"], status, fields["attribution"], study_uid)


def _trained_on(record: TrainingRecord) -> str:
    parts = []
    if record.phantoms:
        parts.append(
            f"{record.phantoms} chest-and-abdomen phantoms with {ADDED_NOISE_HU[0]:g} to {ADDED_NOISE_HU[1]:g} HU of "
            "simulated quantum noise, soft and sharp kernels."
        )
    if record.pairs:
        parts.append(f"{record.pairs} series at full dose with the real low-dose image of the same scan.")
    if alone := len(record.series) - record.pairs:
        parts.append(
            f"{alone} real series with simulated quantum noise added ({ADDED_DOSE[0]:g} to {ADDED_DOSE[1]:g} of their "
            "dose)."
        )
    names = ", ".join(source.name for source in record.series)
    return " ".join(parts) + (f" Series: {names}." if names else "")


def _never_tried_on(record: TrainingRecord) -> str:
    """What the training did not show; of series that our table does not know, their owner knows that alone."""
    if any(entry_of(source.name) is None for source in record.series):
        seen = "the series named above and the phantoms" if record.phantoms else "the series named above"
        never = f"Whatever {seen} do not show: regions, ages, kernels, reconstructions, artefacts"
    else:  # those of the table are all of soft kernels
        never = _NEVER_TAUGHT + ("" if record.phantoms else "; sharp (lung, bone) kernels")
    return never + "; reading by a radiologist."


def valid_for(record: TrainingRecord) -> dict[str, Any]:
    """`pipelines.base.Envelope` of what was shown, wider by `TOLERANCE`, and by `CLOSER` for slices close together."""

    def wider(ends: tuple[float, float], closer: float) -> list[float]:
        low, high = ends[0] / closer, ends[1] * TOLERANCE
        return [
            round(math.floor(low / _ROUNDED_MM - 0.5) * _ROUNDED_MM, 2),
            round(math.ceil(high / _ROUNDED_MM + 0.5) * _ROUNDED_MM, 2),
        ]

    return {
        "slice_spacing_mm": wider(record.slice_spacing_mm, CLOSER),
        "pixel_spacing_mm": wider(record.pixel_spacing_mm, TOLERANCE),
        "min_slices": 1,
        "max_slices": 3000,
    }


def write_network(out: Path, card: Mapping[str, Any], network: nn.Module, record: TrainingRecord) -> None:
    """Write ``NAME.safetensors`` (half precision) and ``NAME.json`` into `out`.

    The card starts without measurements; ``python -m training evaluate`` adds them once both files are installed in
    pipelines/weights.

    Raises
    ------
    ValueError
        If a weight is not finite, or too large for half precision (65504).
    """
    state = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).cpu().contiguous()
        for name, tensor in network.state_dict().items()
    }
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(
            f"{card['name']}: {len(broken)} tensors are not finite in half precision, the first is {broken[0]}: the "
            "training has diverged; start it again with a lower learning rate"
        )
    weights = save(state)
    digest = hashlib.sha256(weights).hexdigest()
    (out / f"{card['name']}.safetensors").write_bytes(weights)
    full = {
        **card,
        "valid_for": valid_for(record),
        "version": digest[:8],
        "hu_window": list(HU_RANGE),
        "precision": "fp32",
        "weights_sha256": digest,
        "trained_on": _trained_on(record),
        "never_tried_on": _never_tried_on(record),
        "training": asdict(record),
        "measured": {},
    }
    write_card(out / f"{card['name']}.json", full)


def write_card(path: Path, card: Mapping[str, Any]) -> None:
    """Write a card as JSON in UTF-8, as programs and people read it.

    Raises
    ------
    ValueError
        For what JSON has no word for: NaN and infinities.
    """
    path.write_text(json.dumps(card, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
