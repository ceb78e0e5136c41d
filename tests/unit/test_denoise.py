"""Files to files: the result folder appears whole or not at all, and the same work is the same bytes."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ct_builder import phantom, write_series
from numpy.typing import NDArray
from pydicom import dcmread
from scanner import image

from dicomnode import denoise as module
from dicomnode.config import Derivation
from dicomnode.denoise import MANIFEST, Manifest, Withheld, denoise_series, remove_partial
from dicomnode.errors import NodeError
from pipelines.base import Envelope, ModelCard, Options, PipelineFault, load, pipeline_hash
from pipelines.guard import Guard
from pipelines.identity import Identity
from pipelines.volume import Plane, Series, SeriesRefused

AT = datetime(2026, 11, 20, 10, 4, 5, tzinfo=timezone(timedelta(hours=1)))
FINGERPRINT = "5e" * 32
COUNT = 6


class Counting(Identity):
    """The identity, which counts its calls, may go wrong, and may move every voxel."""

    def __init__(self, *, shift_hu: float = 0.0, error: Exception | None = None) -> None:
        super().__init__()
        self.calls = 0
        self._shift_hu = shift_hu
        self._error = error

    def denoise(self, series: Series, options: Options) -> Iterator[NDArray[np.float32]]:
        self.calls += 1
        for k in range(COUNT):
            if self._error is not None and k == COUNT // 2:
                raise self._error
            hu = series.plane(k).hu
            yield np.asarray(hu + np.float32(self._shift_hu) * (hu > -500), dtype=np.float32)


@pytest.fixture(scope="module")
def series_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_series(tmp_path_factory.mktemp("ct"), phantom(COUNT, 64))


def run(paths: Sequence[Path], out: Path, pipeline: Any = None, **changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "pipeline": pipeline or Counting(),
        "options": Options(),
        "fingerprint": FINGERPRINT,
        "settings": Derivation(),
        "created_at": AT,
        "report": lambda progress: None,
    }
    return denoise_series(paths, out, **{**values, **changes})


def content(folder: Path) -> dict[str, str]:
    """Name → SHA-256 of every derived file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.dcm"))}


def test_the_manifest_is_true(series_files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "derived" / "job"
    manifest = run(series_files, out)
    assert [path.name for path in out.parent.iterdir()] == ["job"]
    assert {path.name for path in out.iterdir()} == {MANIFEST, *(one.path.name for one in manifest.instances)}
    assert (manifest.n_in, len(manifest.instances)) == (COUNT, COUNT)
    assert manifest.pipeline_hash == pipeline_hash(Identity().card, Options())
    for one in manifest.instances:
        ds = dcmread(one.path)
        assert (ds.SOPInstanceUID, ds.SOPClassUID, ds.SeriesInstanceUID, ds.file_meta.TransferSyntaxUID) == (
            one.sop_instance_uid,
            one.sop_class_uid,
            manifest.derived_series_uid,
            one.transfer_syntax_uid,
        )
        assert one.size_bytes == one.path.stat().st_size
        assert one.sha256 == image(one.path).sha256
    assert Manifest.read(out) == manifest


def test_the_manifest_may_move_with_its_folder(series_files: list[Path], tmp_path: Path) -> None:
    manifest = run(series_files, tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    moved = Manifest.read(tmp_path / "b")
    assert [one.path for one in moved.instances] == [tmp_path / "b" / one.path.name for one in manifest.instances]
    assert str(tmp_path) not in (tmp_path / "b" / MANIFEST).read_text()


def test_the_same_work_is_the_same_bytes(series_files: list[Path], tmp_path: Path) -> None:
    """No clock, host, process or order of the files in it."""
    run(series_files, tmp_path / "a")
    run(series_files[::-1], tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert len(content(tmp_path / "a")) == COUNT


@pytest.mark.parametrize("change", ["options", "fingerprint", "card"])
def test_whatever_moves_a_voxel_is_another_object(series_files: list[Path], tmp_path: Path, change: str) -> None:
    first = run(series_files, tmp_path / "a")
    pipeline = Counting()
    changes: dict[str, Any] = {}
    if change == "card":
        pipeline.card = replace(pipeline.card, weights_sha256="0" * 64)
    else:
        changes = {"options": Options(blend=0.5)} if change == "options" else {"fingerprint": "0" * 64}
    other = run(series_files, tmp_path / "b", pipeline, **changes)
    assert other.derived_series_uid != first.derived_series_uid
    assert not {one.sop_instance_uid for one in first.instances} & {one.sop_instance_uid for one in other.instances}


def test_the_hash_covers_weights_parameters_and_precision() -> None:
    card = load("identity").card
    hashes = [pipeline_hash(card, Options())]
    for change in ({"name": "x"}, {"version": "9"}, {"weights_sha256": "9"}, {"precision": "int8"}):
        hashes.append(pipeline_hash(replace(card, **change), Options()))
    for option in fields(Options):
        hashes.append(pipeline_hash(card, replace(Options(), **{option.name: 0.75})))
    assert len(set(hashes)) == len(hashes)
    assert pipeline_hash(replace(card, measured={"psnr": 1}, trained_on="other words"), Options()) == hashes[0]
    assert isinstance(card, ModelCard)


def test_what_is_there_is_not_computed_again(series_files: list[Path], tmp_path: Path) -> None:
    pipeline = Counting()
    first = run(series_files, tmp_path / "job", pipeline)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "job").iterdir()}
    assert run(series_files, tmp_path / "job", pipeline) == first
    assert pipeline.calls == 1
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "job").iterdir()} == times


def test_of_two_results_the_first_stands(series_files: list[Path], tmp_path: Path) -> None:
    """Another process finishes the same work while this one computes."""
    out = tmp_path / "job"

    class Overtaken(Counting):
        def denoise(self, series: Series, options: Options) -> Iterator[NDArray[np.float32]]:
            run(series_files, tmp_path / "elsewhere")
            (tmp_path / "elsewhere").rename(out)
            (out / "mark").touch()
            yield from super().denoise(series, options)

    manifest = run(series_files, out, Overtaken())
    assert (out / "mark").exists()
    assert manifest == Manifest.read(out)
    assert [path.name for path in tmp_path.iterdir()] == ["job"]


@pytest.mark.parametrize(
    "error", [ValueError("a fault"), OSError(28, "No space left on device"), MemoryError(), KeyboardInterrupt()]
)
def test_a_failure_leaves_nothing(series_files: list[Path], tmp_path: Path, error: Any) -> None:
    with pytest.raises(type(error)):
        run(series_files, tmp_path / "derived" / "job", Counting(error=error))
    assert list((tmp_path / "derived").iterdir()) == []


def test_nothing_is_visible_before_it_is_whole(
    series_files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder gets its name after the manifest was written and everything in it synced."""
    order: list[str] = []
    write, sync, publish = Manifest.write, module.sync_folder, module._publish

    def told(name: str, what: Any) -> Any:
        def call(*arguments: Any) -> Any:
            order.append(f"{name} {arguments[0].name}" if isinstance(arguments[0], Path) else name)
            assert not (tmp_path / "job").exists() or order[-1].startswith("sync")
            return what(*arguments)

        return call

    monkeypatch.setattr(Manifest, "write", told("manifest", write))
    monkeypatch.setattr(module, "sync_folder", told("sync", sync))
    monkeypatch.setattr(module, "_publish", told("publish", publish))
    run(series_files, tmp_path / "job")
    part = next(one for one in order if one.startswith("publish")).split()[1]
    assert order == ["manifest", f"publish {part}", f"sync {part}", f"sync {tmp_path.name}"]


@pytest.mark.parametrize("count", [COUNT - 1, COUNT + 1])
def test_another_number_of_slices_is_a_fault(series_files: list[Path], tmp_path: Path, count: int) -> None:
    class Miscounting(Counting):
        def denoise(self, series: Series, options: Options) -> Iterator[NDArray[np.float32]]:
            return (series.plane(k % COUNT).hu.copy() for k in range(count))

    with pytest.raises(PipelineFault, match=f"{COUNT}"):
        run(series_files, tmp_path / "job", Miscounting())
    assert list(tmp_path.iterdir()) == []


def test_slices_are_written_while_the_pipeline_works_on_the_next(series_files: list[Path], tmp_path: Path) -> None:
    """The pipeline waits for the first file to appear before it gives its last slice."""
    appeared = []

    class Waiting(Counting):
        def denoise(self, series: Series, options: Options) -> Iterator[NDArray[np.float32]]:
            slices = super().denoise(series, options)
            for _ in range(COUNT - 1):
                yield next(slices)
            deadline = time.monotonic() + 30
            while not appeared and time.monotonic() < deadline:
                appeared.extend(tmp_path.glob("job.*/*.dcm"))
            yield next(slices)

    run(series_files, tmp_path / "job", Waiting())
    assert appeared


def test_a_slow_writer_holds_the_pipeline_back(
    series_files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is that of some slices: the pipeline never runs far ahead of the comparison."""
    made, ahead = 0, []

    class Eager(Counting):
        def denoise(self, series: Series, options: Options) -> Iterator[NDArray[np.float32]]:
            nonlocal made
            for hu in super().denoise(series, options):
                made += 1
                yield hu

    class Late(Guard):
        def add(self, k: int, plane: Plane, after: NDArray[np.float32]) -> None:
            ahead.append(made - k)
            super().add(k, plane, after)

    monkeypatch.setattr(module, "Guard", Late)
    run(series_files, tmp_path / "job", Eager())
    assert len(ahead) == COUNT
    assert max(ahead) <= module._SLICES_AHEAD + 1


def test_the_guard_withholds(series_files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(Withheld) as verdict:
        run(series_files, tmp_path / "job", Counting(shift_hu=40.0))
    assert list(tmp_path.iterdir()) == []
    assert str(verdict.value)
    json.dumps(verdict.value.figures)


def test_the_gate_refuses_before_anything_is_computed(series_files: list[Path], tmp_path: Path) -> None:
    pipeline = Counting()
    pipeline.card = replace(pipeline.card, valid_for=Envelope(min_slices=COUNT + 1))
    with pytest.raises(SeriesRefused):
        run(series_files, tmp_path / "job", pipeline)
    assert pipeline.calls == 0
    assert not (tmp_path / "job").exists()


def test_what_killed_attempts_left_is_removed(tmp_path: Path) -> None:
    for name in ("job", "job.1.part", "job.22.part", "job2.1.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.dcm").touch()
    remove_partial(tmp_path / "job")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job", "job2.1.part"]


def test_options_and_instances_survive_json(series_files: list[Path], tmp_path: Path) -> None:
    pipeline = Counting()
    pipeline.card = replace(pipeline.card, noise_map=True)
    manifest = run(series_files, tmp_path / "job", pipeline, options=Options(strength=0.8, blend=0.25))
    again = Manifest.read(tmp_path / "job")
    assert again.options == Options(strength=0.8, blend=0.25)
    assert asdict(again) == asdict(manifest)


def test_a_strength_out_of_range_is_refused_before_any_work(series_files: list[Path], tmp_path: Path) -> None:
    pipeline = Counting()
    with pytest.raises(NodeError, match=r"strength 1\.2 is out of range; identity takes 0 to 1, .*config\.yaml"):
        run(series_files, tmp_path / "job", pipeline, options=Options(strength=1.2))
    assert pipeline.calls == 0
    assert list(tmp_path.iterdir()) == []
