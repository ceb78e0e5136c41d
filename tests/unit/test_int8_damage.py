"""Networks that ship, whose 8-bit arithmetic goes wrong: the check finds it, and nobody gets the images."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.base import Execution
from pipelines.openvino_core import cpu_supports
from pipelines.runtime import WEIGHTS, ExecutionRefused
from pipelines.shipped import Factory, fast_2p5d, st3d

pytestmark = pytest.mark.skipif(not cpu_supports("int8"), reason="this CPU has no 8-bit dot products")

AUTO = Execution(device="cpu", threads=1)


def installed(factory: Factory, folder: Path) -> Path:
    for path in WEIGHTS.glob(f"{factory.name}.*"):
        shutil.copy(path, folder)
    return folder


def changed(factory: Factory, folder: Path, suffix: str, content: bytes) -> None:
    """Put `content` in the place of one file, and into the card as if it had been meant."""
    (folder / f"{factory.name}.{suffix}").write_bytes(content)
    path = folder / f"{factory.name}.json"
    card = json.loads(path.read_text(encoding="utf-8"))
    card["files_sha256"][suffix] = hashlib.sha256(content).hexdigest()
    path.write_text(json.dumps(card), encoding="utf-8")


def weaker_planes(folder: Path) -> None:
    """A quarter of the weights are half of what they were."""
    codes = np.frombuffer((folder / "fast-2.5d.int8.bin").read_bytes(), np.int8).copy()
    codes[len(codes) // 4 : len(codes) // 2] //= 2
    changed(fast_2p5d, folder, "int8.bin", codes.tobytes())


def saturated_stream(folder: Path) -> None:
    """Whatever is larger than a quarter of what occurs is cut off."""
    ranges = json.loads((folder / "st3d.int8.ranges").read_text(encoding="utf-8"))
    less = {name: (np.array(reach) / 4).tolist() for name, reach in ranges.items()}
    changed(st3d, folder, "int8.ranges", json.dumps(less).encode())


@pytest.mark.parametrize(("factory", "damage"), [(fast_2p5d, weaker_planes), (st3d, saturated_stream)])
def test_wrong_sums_are_found_and_fp32_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, factory: Factory, damage: Callable[[Path], None]
) -> None:
    folder = installed(factory, tmp_path)
    damage(folder)
    with caplog.at_level(logging.WARNING):
        pipeline = factory(AUTO, folder)
    assert pipeline.card.precision == "fp32"
    assert f"in INT8 {factory.name} is up to" in pipeline.card.reason
    assert pipeline.card.reason.removeprefix("the CPU, fp32: ") in caplog.text


def test_wrong_sums_are_refused_where_int8_is_demanded(tmp_path: Path) -> None:
    folder = installed(fast_2p5d, tmp_path)
    weaker_planes(folder)
    with pytest.raises(ExecutionRefused, match=r"in INT8 fast-2\.5d is up to .* set precision auto or fp32"):
        fast_2p5d(Execution("cpu", "int8", 1), folder)
