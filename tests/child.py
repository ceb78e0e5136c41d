"""Requests to the compute child, and the folder through which the pipelines of tests/plugins are steered in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from node_process import PLUGINS

from dicomnode.config import Derivation
from dicomnode.denoise import Progress
from dicomnode.worker import Request, Worker


def steered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`folder`, through which the pipelines of the children that start from now on are steered."""
    monkeypatch.setenv("PYTHONPATH", str(PLUGINS))
    monkeypatch.setenv("TEST_PIPELINES", str(folder))
    return folder


def workers() -> Iterator[Worker]:
    """Body of a fixture: a worker of one thread, stopped in the end."""
    made = Worker(1)
    yield made
    made.stop()


def requests(paths: Sequence[Path], folder: Path) -> Callable[..., Request]:
    """A maker of requests to denoise `paths` into `folder`."""

    def made(uses: str, job_id: str = "job", **changes: Any) -> Request:
        values: dict[str, Any] = {
            "job_id": job_id,
            "paths": tuple(map(str, paths)),
            "out": str(folder / "derived" / job_id),
            "uses": uses,
            "strength": 1.0,
            "blend": 1.0,
            "fingerprint": "f" * 64,
            "created_at": "2026-11-20T10:00:00+01:00",
            "settings": Derivation().model_dump(),
        }
        return Request(**{**values, **changes})

    return made


def ignore(progress: Progress) -> None:
    """A listener to the progress who does not care."""
