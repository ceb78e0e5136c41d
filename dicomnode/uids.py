"""UIDs of what the node makes: derived from what it was made of, never from clock, host or chance.

All are ``2.25.`` plus the decimal value of a UUID (PS3.5 B.2), and the UUID is a name-based one (RFC 4122 version 5):
the same source through the same pipeline is the same object again, so sending twice never makes a second copy.
"""

from __future__ import annotations

from typing import Literal
from uuid import UUID, uuid5

from pipelines.base import ModelCard

NAMESPACE = UUID("c8c4ee2a-3cc1-4dbb-8944-04a8557ff240")
"""Made once at random. Never change it: every derived object would get another identity."""


def derived_uid(source_uid: str, pipeline_hash: str, fingerprint: str, role: Literal["series", "instance"]) -> str:
    """UID of a derived series or instance.

    Parameters
    ----------
    source_uid
        SeriesInstanceUID or SOPInstanceUID of what it is derived from.
    pipeline_hash
        `pipelines.base.pipeline_hash`: whatever can move a voxel.
    fingerprint
        Of the set of source slices: a series that grew gives a new derived series.
    role
        Which of the two it is.
    """
    return _uid(f"{source_uid},{pipeline_hash},{fingerprint},{role}")


def device_uid(card: ModelCard) -> str:
    """DeviceUID (0018,1002) of a pipeline: another one for other weights, the same on every host."""
    return _uid(f"{card.name},{card.version},{card.weights_sha256},device")


def _uid(name: str) -> str:
    return f"2.25.{uuid5(NAMESPACE, name).int}"
