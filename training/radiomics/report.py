"""The comparison as tables, in the form of the STResNet paper's Figure 2, and as a picture."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.base import ModelCard, Options
from training.radiomics.comparison import ALPHA
from training.radiomics.equivalence import CONCORDANT, MARGIN_SD, Agreement, Count, count
from training.radiomics.study import FULL_DOSE, LOW_DOSE, Row

FAMILIES = {"firstorder": "first order", "glcm": "GLCM", "glrlm": "GLRLM", "glszm": "GLSZM"}
PRINTED = 31, 57
"""Consistent features of STResNet in INT8 against SRResNet3D in FP32 (Wei & Hsu, MIDL 2021, Figure 2)."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What was compared with what."""

    reference: str
    dose: float
    options: Options
    features: int
    cards: Mapping[str, ModelCard]
    """Of each pipeline, by name."""
    command: str


_NOT_EQUIVALENT = """\
**Not significant is not equivalent.** p ≥ 0.05 says that these nodules do not show a difference. Few nodules or much
noise raise the count and prove nothing; many nodules bring differences to light that no reader would care for. What
shows agreement stands below."""
_PAPER = f"""\
The paper (Wei & Hsu, MIDL 2021, Figure 2) prints {PRINTED[0]} of {PRINTED[1]} for STResNet in INT8 against SRResNet3D
in FP32, on 68 real nodules in 42 screening scans at a tenth of their dose. It does not print its list of features, and
its scans and nodules are others: the numbers stand side by side, not on one scale."""
_IMAGES = f"""\
`{FULL_DOSE}` and `{LOW_DOSE}` are the images before any pipeline: the first is the scan as it was, the second what the
pipelines were given."""


def markdown(rows: Sequence[Row], agreements: Mapping[str, Mapping[str, Agreement]], setting: Setting) -> str:
    """Both tables with what they mean.

    Parameters
    ----------
    rows
        Of one set of images, one for each region.
    agreements
        Feature to agreement with the reference, by images.
    """
    regions = [row.region for row in rows]
    kinds = ", ".join(f"{sum(r.kind == k for r in regions)} {k}" for k in dict.fromkeys(r.kind for r in regions))
    diameters = [r.diameter_mm for r in regions]
    counts = {images: _counts(of) for images, of in agreements.items()}
    lines = [
        f"# Radiomic features of nodules against {setting.reference}",
        "",
        f"{len(regions)} nodules ({kinds}; {min(diameters):.1f} to {max(diameters):.1f} mm) in "
        f"{', '.join(dict.fromkeys(row.case for row in rows))}; the pipelines denoise {setting.dose:g} of full dose, "
        f"strength {setting.options.strength:g}, blend {setting.options.blend:g}.",
        "",
        f"    {setting.command}",
        "",
        "## Features that do not differ, as the paper counts",
        "",
        f"Paired t-test over the nodules, p ≥ {ALPHA:g}, not corrected, against {_named(setting.reference, setting)}.",
        "",
        *_as_paper(counts, setting),
        "",
        _PAPER,
        "",
        _NOT_EQUIVALENT,
        "",
        "## Agreement by every criterion",
        "",
        f"- Holm: p ≥ {ALPHA:g} after correction for {setting.features} features.",
        f"- CCC: Lin's concordance correlation coefficient ≥ {CONCORDANT:g}.",
        f"- Equivalent: two one-sided paired t-tests (TOST), p < {ALPHA:g}, with a margin of {MARGIN_SD:g} standard",
        "  deviations of the feature between the nodules of the reference.",
        "- Relative error: median over the features of mean |difference| / mean |reference|.",
        "",
        *_by_criterion(counts),
        "",
        _IMAGES,
        "",
    ]
    return "\n".join(lines)


def _as_paper(counts: Mapping[str, Mapping[str, Count]], setting: Setting) -> list[str]:
    """One line for each set of images: consistent features by family, and what the paper prints."""
    first = next(iter(counts.values()))
    families = " | ".join(f"{name} ({c.features})" for name, c in first.items())
    lines = [
        f"| images | precision | {families} | the paper, all ({PRINTED[1]}) |",
        "|---|---|" + "---|" * (len(first) + 1),
    ]
    for images, of in counts.items():
        consistent = " | ".join(str(c.consistent) for c in of.values())
        lines.append(f"| {images} | {_precision(images, setting)} | {consistent} | {_printed(images, setting)} |")
    return lines


def _by_criterion(counts: Mapping[str, Mapping[str, Count]]) -> list[str]:
    """One line for each set of images and family: all criteria."""
    lines = [
        f"| images | family | features | p ≥ {ALPHA:g} | Holm | CCC ≥ {CONCORDANT:g} | equivalent | relative error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for images, of in counts.items():
        lines += [
            f"| {images} | {family} | {c.features} | {c.consistent} | {c.consistent_holm} | {c.concordant} | "
            f"{c.equivalent} | {c.median_relative_error:.1%} |"
            for family, c in of.items()
        ]
    return lines


def _counts(agreements: Mapping[str, Agreement]) -> dict[str, Count]:
    """By family, and of all."""
    by_family = {
        name: count(one for feature, one in agreements.items() if feature.startswith(f"{prefix}_"))
        for prefix, name in FAMILIES.items()
    }
    return {**by_family, "all": count(agreements.values())}


def _precision(images: str, setting: Setting) -> str:
    card = setting.cards.get(images)
    return card.precision if card else "–"


def _named(images: str, setting: Setting) -> str:
    return f"{images} in {_precision(images, setting)}" if images in setting.cards else images


def _printed(images: str, setting: Setting) -> str:
    """What the paper prints for these images: it compares one pair only."""
    return str(PRINTED[0]) if images.startswith("st") and _precision(images, setting) == "int8" else "–"


def write_features(path: Path, rows: Sequence[Row]) -> None:
    """All values: one line for each region and set of images."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("series", "nodule", "kind", "diameter_mm", "images", *rows[0].features))
        for row in rows:
            one = row.region
            known = (row.case, one.name, one.kind, f"{one.diameter_mm:.2f}", row.images)
            table.writerow((*known, *(f"{value:.9g}" for value in row.features.values())))


def write_comparison(path: Path, agreements: Mapping[str, Mapping[str, Agreement]]) -> None:
    """All tests: one line for each set of images and feature."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("images", "feature", "t", "p", "p_holm", "concordance", "relative_error", "p_equivalence"))
        for images, of in agreements.items():
            for name, one in of.items():
                d = one.difference
                values = (d.t, d.p, d.p_holm, d.concordance, d.relative_error, one.p_equivalence)
                table.writerow((images, name, *(f"{value:.6g}" for value in values)))


def draw(path: Path, agreements: Mapping[str, Mapping[str, Agreement]], setting: Setting) -> None:
    """Share of consistent and of equivalent features of each family, by images."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 + 1.2 * len(agreements), 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    groups = (*FAMILIES.values(), "all")
    width = 0.8 / len(groups)
    titles = (f"do not differ (paired t-test, p ≥ {ALPHA:g})", f"equivalent (TOST, {MARGIN_SD:g} SD)")
    for row, title in enumerate(titles):
        axes = figure.add_subplot(2, 1, row + 1)
        for k, family in enumerate(groups):
            shares = []
            for of in agreements.values():
                c = _counts(of)[family]
                shares.append(100 * (c.equivalent if row else c.consistent) / max(c.features, 1))
            axes.bar([i + (k - 2) * width for i in range(len(shares))], shares, width, label=family)
        if row == 0:
            printed, features = PRINTED
            label = f"paper: {printed} of {features}, STResNet in INT8"
            axes.axhline(100 * printed / features, color="0.3", linestyle="--", linewidth=1, label=label)
            axes.legend(ncols=len(groups) + 1, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.1))
        axes.set_xticks(range(len(agreements)), list(agreements))
        axes.set_ylim(0, 105)
        axes.margins(x=0.02)
        axes.set_ylabel("% of features")
        axes.set_title(f"{title}, against {_named(setting.reference, setting)}", fontsize=9)
    figure.savefig(path, dpi=120)
