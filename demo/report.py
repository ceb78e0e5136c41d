"""What happened, from the job log and from the files that the PACS holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset

from demo.node import JobSeen, Node
from demo.pacs import Pacs
from demo.picture import draw
from demo.series import Source
from dicomnode.db import JobKind, JobState
from dicomnode.denoise import seconds_in_words
from training.metrics import SOFT_TISSUE, psnr, ssim
from training.tissues import tissue_masks

Array = NDArray[np.float32]

PICTURE = "before-after-difference.png"


def report(out: Path, node: Node, pacs: Pacs, sources: Sequence[Source]) -> bool:
    """Print the outcome of every series and draw those that were denoised; False if one with a known truth was not."""
    good = True
    drawn = 0
    for source in sources:
        print(f"\nSeries {source.series_uid}")
        for job in node.jobs(source.series_uid):
            _print_job(node, pacs, job, source)
            denoised = job.kind is JobKind.PIPELINE and job.state is JobState.DONE
            if denoised:
                drawn += 1
                picture = out / (PICTURE if drawn == 1 else PICTURE.replace(".png", f"-{drawn}.png"))
                _measure(pacs, job, source, picture)
            elif job.kind is JobKind.PIPELINE and source.truth_hu is not None:
                good = False
    if not drawn:
        print("\nNo series was denoised; the reason stands with each.")
    print(
        f"\nWhat the PACS holds is in {out / 'pacs'}, what the node received and derived in {out / 'node' / 'spool'}."
    )
    return good


def _print_job(node: Node, pacs: Pacs, job: JobSeen, source: Source) -> None:
    what = (
        f"denoising by {job.pipeline}" if job.kind is JobKind.PIPELINE and job.pipeline else "forwarding of originals"
    )
    if job.kind is JobKind.PIPELINE and not job.pipeline:
        what = "kept"
    print(f"  job {job.id[:12]}  {what}: {job.state}, {job.reason}")
    if job.kind is JobKind.ORIGINALS:
        print(f"    originals in the PACS  {pacs.count(source.series_uid)} of {len(source.items)} images")
        return
    if job.state is not JobState.DONE or job.derived_series_uid is None:
        return
    print(
        f"    slices                 {job.n_in} in, {job.n_out} out, {pacs.count(job.derived_series_uid)} in the PACS"
    )
    seconds = seconds_in_words(job.measured["seconds"])
    dispatched = node.dispatched_at(job.id)
    if dispatched is not None and job.finished_at is not None:
        seconds += f"; sending {(job.finished_at - dispatched).total_seconds():.1f} s"
    print(f"    seconds                {seconds}")
    before, after = job.measured.get("noise_before_hu"), job.measured.get("noise_after_hu")
    if before is not None and after is not None:
        print(f"    noise, as the node saw {before:.1f} HU before, {after:.1f} HU after")


def _measure(pacs: Pacs, job: JobSeen, source: Source, picture: Path) -> None:
    """Compare what the PACS holds, originals and derived, and draw the slice in the middle."""
    assert job.derived_series_uid is not None
    if source.truth_hu is None:
        print("    PSNR and SSIM          not for this series: nobody knows what it is without noise")
        pair = _middle(pacs, source.series_uid, job.derived_series_uid)
        if pair is None:
            print("    picture                none: the PACS has not accepted the original")
            return
        before, after = pair
    else:
        volume_before = _volume(pacs, source.series_uid)
        volume_after = _volume(pacs, job.derived_series_uid)
        _print_quality(volume_before, volume_after, source.truth_hu)
        middle = len(volume_before) // 2
        before, after = volume_before[middle], volume_after[middle]
    draw(picture, before, after, job.pipeline)
    print(f"    picture                {picture}")


def _print_quality(before: Array, after: Array, truth: Array) -> None:
    ratios = [psnr(image, truth, SOFT_TISSUE) for image in (before, after)]
    # Slice by slice: the moments of a whole volume would take gigabytes.
    likenesses = [
        sum(ssim(a, b, SOFT_TISSUE) for a, b in zip(image, truth, strict=True)) / len(truth)
        for image in (before, after)
    ]
    tissues = tissue_masks(truth)
    soft = tissues["soft"]
    noise = [float((image - truth)[soft].std()) for image in (before, after)]
    moved = [f"{name} {float((after - before)[mask].mean()):+.2f}" for name, mask in tissues.items() if mask.any()]
    print(
        f"    the files in the PACS against the noise-free phantom:\n"
        f"    noise in soft tissue   {noise[0]:.1f} HU before, {noise[1]:.1f} HU after"
        f" (standard deviation of the error)\n"
        f"    PSNR                   {ratios[0]:.2f} dB before, {ratios[1]:.2f} dB after"
        f" (window {SOFT_TISSUE})\n"
        f"    SSIM                   {likenesses[0]:.4f} before, {likenesses[1]:.4f} after"
        f" (same window; Gaussian 11x11, sigma 1.5)\n"
        f"    mean HU moved by       {', '.join(moved)}"
    )


def _volume(pacs: Pacs, series_uid: str) -> Array:
    """HU (z, y, x) in the order of InstanceNumber."""
    images = sorted(pacs.instances(series_uid), key=lambda ds: int(ds.InstanceNumber))
    return np.stack([_hu(ds) for ds in images])


def _middle(pacs: Pacs, series_uid: str, derived_uid: str) -> tuple[Array, Array] | None:
    """The slice in the middle of a derived series, before and after; None if the PACS has no such original.

    One image in memory at a time: a folder may hold a thousand.
    """
    places = sorted((float(ds.ImagePositionPatient[2]), str(ds.SOPInstanceUID)) for ds in pacs.instances(derived_uid))
    wanted = places[len(places) // 2][1]
    after = next(ds for ds in pacs.instances(derived_uid) if ds.SOPInstanceUID == wanted)
    source_uid = after.SourceImageSequence[0].ReferencedSOPInstanceUID
    before = next((ds for ds in pacs.instances(series_uid) if ds.SOPInstanceUID == source_uid), None)
    return None if before is None else (_hu(before), _hu(after))


def _hu(ds: Dataset) -> Array:
    """Stored values to HU (PS3.3 C.11.1.1.2)."""
    return np.asarray(ds.pixel_array * np.float32(ds.RescaleSlope) + np.float32(ds.RescaleIntercept), dtype=np.float32)
