"""Requests to the compute child; the fixtures `controls`, `worker` and `request_for` are in conftest.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dicomnode.config import Derivation
from dicomnode.denoise import Progress
from dicomnode.worker import Request


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
