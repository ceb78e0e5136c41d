"""What a request to the compute child ends in, and in which words: whatever the pipeline does and the files are."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from child import ignore
from ct_builder import phantom, write_series

from dicomnode.errors import NodeError
from dicomnode.worker import Outcome, Request, Worker
from pipelines.base import Options


def test_weights_that_are_missing_are_no_missing_slices(worker: Worker, request_for: Callable[..., Request]) -> None:
    told = "WeightsMissing: there are no weights of 'absent' in weights (absent.json is missing): train them"
    with pytest.raises(NodeError, match=re.escape(f"pipeline 'test-untrained' cannot be loaded: {told}")):
        worker.describe("test-untrained", Options())
    outcome = worker.run(request_for("test-untrained"), ignore)
    assert outcome.kind == "failed"
    assert outcome.detail.startswith(told)
    assert "backup" not in outcome.detail


@pytest.mark.parametrize(
    ("uses", "kind", "words"),
    [
        ("test-broken", "failed", "a fault in the pipeline or the node: ValueError at denoise:"),
        ("test-harmful", "withheld", ""),
        ("test-no-space", "no-infrastructure", "OSError: [Errno 28] No space left on device"),
        ("test-unreachable", "failed", "ConnectionRefusedError (Connection refused) at denoise:"),
        ("test-unfinished", "failed", "FileNotFoundError (No such file or directory) at denoise:"),
    ],
)
def test_each_end_has_its_outcome(
    worker: Worker, controls: Path, request_for: Callable[..., Request], uses: str, kind: str, words: str
) -> None:
    outcome = worker.run(request_for(uses), ignore)
    assert outcome.kind == kind
    assert words in outcome.detail
    assert outcome.detail
    assert "Doe" not in outcome.detail
    assert "backup" not in outcome.detail
    assert (outcome.figures is not None) == (kind == "withheld")
    assert list((controls / "derived").iterdir()) == []


def test_what_caused_an_error_of_ours_is_not_told(
    worker: Worker, request_for: Callable[..., Request], capfd: pytest.CaptureFixture[str]
) -> None:
    """It is a library's, and may quote the header."""
    outcome = worker.run(request_for("test-quoting"), ignore)
    assert outcome == Outcome("failed", "1.2.3 cannot be derived from")
    assert "Phantom" not in capfd.readouterr().err


def test_a_series_that_the_gate_refuses(
    worker: Worker, controls: Path, request_for: Callable[..., Request], tmp_path: Path
) -> None:
    files = write_series(tmp_path / "two", phantom(4, 32), ImageOrientationPatient=None)
    outcome = worker.run(request_for("identity", paths=tuple(map(str, files))), ignore)
    assert outcome.kind == "refused"
    assert outcome.detail


def test_a_vanished_source_file_fails_the_job_instead_of_repeating_it(
    worker: Worker, request_for: Callable[..., Request], tmp_path: Path
) -> None:
    files = write_series(tmp_path / "three", phantom(3, 32))
    files[1].unlink()
    outcome = worker.run(request_for("identity", paths=tuple(map(str, files))), ignore)
    assert outcome.kind == "failed"
    assert str(files[1]) in outcome.detail


def test_a_source_file_that_cannot_be_read_fails_the_job_likewise(
    worker: Worker, request_for: Callable[..., Request], tmp_path: Path
) -> None:
    """It lies on what can be opened, but gives no byte: the first page of a process."""
    files = write_series(tmp_path / "three", phantom(3, 32))
    files[0].unlink()
    files[0].symlink_to("/proc/self/mem")
    outcome = worker.run(request_for("identity", paths=tuple(map(str, files)), sha256=("0" * 64,) * 3), ignore)
    assert outcome.kind == "failed"
    assert outcome.detail.startswith(f"{files[0]} cannot be read (Input/output error); restore it from a backup")
