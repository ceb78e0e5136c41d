"""Every installed pipeline keeps the contract."""

from __future__ import annotations

import pytest

from pipelines.base import names
from pipelines.testing import check_pipeline


def test_ours_are_installed() -> None:
    assert {"identity", "st3d", "fast-2.5d"} <= set(names())


@pytest.mark.parametrize("name", names())
def test_keeps_the_contract(name: str) -> None:
    check_pipeline(name)
