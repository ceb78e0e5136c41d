"""The demo as a stranger runs it: its numbers recomputed from what the PACS holds, and nothing left running."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import numpy as np
import pytest
from conftest import require_peer
from ct_builder import phantom, write_series
from numpy.typing import NDArray
from peers import listening, wait_for
from PIL import Image
from pydicom import Dataset, dcmread
from skimage.metrics import structural_similarity

from training.sources.phantom import chest_abdomen

ROOT = Path(__file__).resolve().parents[2]
SLICES = 12
TIMEOUT_S = 240
LOW_HU, HIGH_HU = -160.0, 240.0


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "demo", *map(str, arguments)]


def demo(*arguments: object, environment: Mapping[str, str] | None = None) -> str:
    """Run the demo; its output."""
    done = subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ports(said: str) -> list[int]:
    """Ports of the PACS and the node."""
    found = [int(port) for port in re.findall(r"DEMO(?:PACS|NODE) on 127\.0\.0\.1:(\d+)", said)]
    assert len(found) == 2
    return found


def images_of_orthanc(configuration: Path) -> list[Dataset]:
    """What an Orthanc started on the demo's storage gives out."""
    settings = json.loads(configuration.read_text())
    opener = build_opener(ProxyHandler({}))

    def get(path: str) -> bytes:
        with opener.open(f"http://127.0.0.1:{settings['HttpPort']}{path}", timeout=20) as answer:
            body: bytes = answer.read()
        return body

    process = subprocess.Popen(
        [shutil.which("Orthanc") or "Orthanc", str(configuration)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: listening(settings["HttpPort"]), 30, "Orthanc")
        return [dcmread(BytesIO(get(f"/instances/{one}/file"))) for one in json.loads(get("/instances"))]
    finally:
        process.terminate()
        process.wait(30)


def volume(images: list[Dataset]) -> NDArray[np.float64]:
    """HU (z, y, x), head first, by the formula of PS3.3 C.11.1.1.2."""
    images = sorted(images, key=lambda ds: -float(ds.ImagePositionPatient[2]))
    return np.stack([ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept) for ds in images])


def psnr(hu: NDArray[np.float64], truth: NDArray[np.floating]) -> float:
    error = hu.clip(LOW_HU, HIGH_HU) - truth.clip(LOW_HU, HIGH_HU)
    return 20 * math.log10((HIGH_HU - LOW_HU) / math.sqrt(float((error**2).mean(dtype=np.float64))))


def ssim(hu: NDArray[np.float64], truth: NDArray[np.floating]) -> float:
    # From the window's lower end: luminance is part of the index.
    pairs = zip(hu.clip(LOW_HU, HIGH_HU) - LOW_HU, truth.clip(LOW_HU, HIGH_HU).astype(np.float64) - LOW_HU, strict=True)
    return float(
        np.mean(
            [
                structural_similarity(
                    a, b, data_range=HIGH_HU - LOW_HU, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
                )
                for a, b in pairs
            ]
        )
    )


def printed(said: str, what: str) -> tuple[float, float]:
    """The two numbers of a line, before and after."""
    found = re.search(rf"^ *{what} +([\d.]+)[^,]* before, ([\d.]+)[^,(]* after", said, re.MULTILINE)
    assert found is not None, said
    return float(found[1]), float(found[2])


@pytest.mark.peer
def test_the_printed_numbers_are_those_of_the_files_in_orthanc(tmp_path: Path) -> None:
    require_peer("Orthanc", "dciodvfy")
    out = tmp_path / "out"
    said = demo("--slices", SLICES, "--out", out)
    assert not any(map(listening, ports(said)))
    assert "denoising by fast-2.5d: DONE" in said
    assert f"{SLICES} in, {SLICES} out, {SLICES} in the PACS" in said

    images = images_of_orthanc(out / "pacs" / "orthanc.json")
    before = volume([ds for ds in images if ds.ImageType[0] == "ORIGINAL"])
    after = volume([ds for ds in images if ds.ImageType[0] == "DERIVED"])
    assert len(before) == len(after) == SLICES
    truth = chest_abdomen(SLICES, 512, 0.8, 2.5, 7)
    for measure, line, tolerance in ((psnr, "PSNR", 0.006), (ssim, "SSIM", 0.0006)):
        assert printed(said, line) == pytest.approx((measure(before, truth), measure(after, truth)), abs=tolerance)
    assert psnr(after, truth) > psnr(before, truth) + 3
    soft = (truth > 0) & (truth < 140)
    noise_before, noise_after = printed(said, "noise in soft tissue")
    # the demo leaves out edges, which hold partial volume and so more error
    assert noise_before == pytest.approx(float((before - truth)[soft].std()), rel=0.1)
    assert noise_after < 0.75 * noise_before

    for path in (out / "low-dose").glob("*.dcm"):
        checked = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, timeout=60, check=False)
        assert "Error" not in checked.stdout + checked.stderr
    with Image.open(out / "before-after-difference.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape[1] > 3 * 512
    assert pixels.shape[0] > 512
    thirds = np.array_split(pixels[40:-50], 3, axis=1)
    assert min(float(third.std()) for third in thirds) > 20


def test_a_folder_without_orthanc_and_a_second_time(tmp_path: Path) -> None:
    """Any CT in any order beside other things; each series has an outcome in words; our own SCP stands in."""
    ct, out = tmp_path / "ct", tmp_path / "out"
    write_series(ct / "a" / "deep", phantom(6), name="good")
    gapped = write_series(ct / "b", phantom(8), name="gapped")
    gapped[3].unlink()
    write_series(ct / "b", phantom(2), name="scout", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write_series(ct / "mr", phantom(1), name="mr", Modality="MR", SOPClassUID="1.2.840.10008.5.1.4.1.1.4")
    write_series(ct, phantom(1), name="refused", StudyInstanceUID=None)
    shutil.copy(gapped[0], ct / "the-same-again.dcm")
    (ct / "notes.txt").write_text("no DICOM")
    nothing_installed = tmp_path / "empty"
    nothing_installed.mkdir()

    arguments = ("--ct", ct, "--pipeline", "fast-2.5d", "--out", out)
    said = demo(*arguments, environment={"PATH": str(nothing_installed)})
    assert "Orthanc is not installed" in said
    assert "4 series with 16 images" in said
    assert "1 other DICOM files, 1 files that are no DICOM" in said
    assert "6 in, 6 out, 6 in the PACS" in said
    assert "nobody knows what it is without noise" in said
    assert re.search(r"denoising by fast-2\.5d: SKIPPED, .*gap", said)
    assert "not accepted: " in said
    assert "the node accepted none of its 1 images" in said
    assert re.search(r"forwarding of originals: DONE, .*\n +originals in the PACS +2 of 2 images", said)
    stored = [dcmread(path, stop_before_pixels=True) for path in (out / "pacs").rglob("*.dcm")]
    assert sorted(ds.ImageType[0] for ds in stored) == ["DERIVED"] * 6 + ["ORIGINAL"] * 15
    assert (out / "before-after-difference.png").exists()

    again = demo(*arguments, environment={"PATH": str(nothing_installed)})
    assert "of an earlier run is replaced" in again
    assert "6 in, 6 out, 6 in the PACS" in again
    assert not any(map(listening, ports(said) + ports(again)))


def test_ctrl_c_stops_the_node_and_the_pacs(tmp_path: Path) -> None:
    write_series(tmp_path / "ct", phantom(3))
    process = subprocess.Popen(
        # What a shell starts in the background ignores SIGINT, and so does whatever that starts.
        ["env", "--default-signal=INT", *command("--ct", tmp_path / "ct", "--out", tmp_path / "out")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    with process, process.stdout as lines:
        said = ""
        for line in lines:
            said += line
            if "DEMONODE on" in line:
                break
        assert all(map(listening, ports(said)))
        process.send_signal(signal.SIGINT)
        said += lines.read()
        assert process.wait(60) == 130, said
    assert not any(map(listening, ports(said)))


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    done = subprocess.run(
        command("--out", tmp_path), cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 1
    assert "not the demo's" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
