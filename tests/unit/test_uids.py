"""UIDs against UUID version 5 computed by hand (RFC 4122, 4.3)."""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import replace
from typing import Literal

import pytest
from derivation import CARD
from pydicom.uid import UID

from dicomnode.uids import NAMESPACE, derived_uid, device_uid
from pipelines.base import Options, pipeline_hash


def by_hand(name: str) -> str:
    """SHA-1 of namespace and name, 16 bytes of it, with version 5 and the RFC's variant written over six bits."""
    digest = bytearray(hashlib.sha1(NAMESPACE.bytes + name.encode()).digest()[:16])  # noqa: S324 - RFC 9562 wants SHA-1 here
    digest[6] = digest[6] & 0x0F | 0x50
    digest[8] = digest[8] & 0x3F | 0x80
    return f"2.25.{int.from_bytes(digest, 'big')}"


def test_the_namespace_never_changes() -> None:
    assert str(NAMESPACE) == "c8c4ee2a-3cc1-4dbb-8944-04a8557ff240"


@pytest.mark.parametrize("role", ["series", "instance"])
def test_derived_uid_is_a_name_based_uuid(role: Literal["series", "instance"]) -> None:
    made = derived_uid("1.2.3", "cafe", "f00d", role)
    assert made == by_hand(f"1.2.3,cafe,f00d,{role}")
    assert UID(made).is_valid
    parsed = uuid.UUID(int=int(made.removeprefix("2.25.")))
    assert (parsed.version, parsed.variant) == (5, uuid.RFC_4122)


def test_whatever_can_move_a_voxel_changes_the_uid() -> None:
    cards = [
        CARD,
        replace(CARD, version="1.3"),
        replace(CARD, weights_sha256="cd" * 32),
        replace(CARD, precision="int8"),
    ]
    hashes = [pipeline_hash(card, Options()) for card in cards]
    hashes += [pipeline_hash(CARD, Options(strength=0.7)), pipeline_hash(CARD, Options(blend=0.5))]
    made = {derived_uid(source, h, f, "instance") for source in ("1.2", "1.3") for h in hashes for f in ("a", "b")}
    assert len(made) == 2 * len(hashes) * 2


def test_the_device_changes_with_the_weights_and_not_with_the_precision() -> None:
    assert device_uid(CARD) == by_hand(f"st3d,1.2,{'ab' * 32},device")
    assert device_uid(replace(CARD, weights_sha256="cd" * 32)) != device_uid(CARD)
    assert device_uid(replace(CARD, precision="int8")) == device_uid(CARD)
