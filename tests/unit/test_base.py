"""What the identity of a pipeline depends on."""

from __future__ import annotations

import pytest

from pipelines import base
from pipelines.base import Options, pipeline_hash
from pipelines.identity import Identity


def test_the_revision_of_our_own_code_is_in_the_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    before = pipeline_hash(Identity.card, Options())
    monkeypatch.setattr(base, "VOXEL_REVISION", base.VOXEL_REVISION + 1)
    assert pipeline_hash(Identity.card, Options()) != before
    monkeypatch.undo()
    assert pipeline_hash(Identity.card, Options()) == before
