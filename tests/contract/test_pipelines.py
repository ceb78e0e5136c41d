"""Every installed pipeline keeps the contract; one that is not trained yet says so."""

from __future__ import annotations

import pytest

from pipelines.base import WeightsMissing, load, names
from pipelines.runtime import WEIGHTS
from pipelines.testing import check_pipeline
from training.recipes import MODULES

SHIPPED = sorted(path.stem for path in WEIGHTS.glob("*.json"))
UNTRAINED = sorted(set(MODULES) & set(names()) - set(SHIPPED))


def test_every_network_is_announced() -> None:
    """By the name of its recipe."""
    assert set(MODULES) <= set(names())
    assert {"identity", "fast-2.5d", "st3d"} <= set(names())
    assert set(SHIPPED) <= set(names())


@pytest.mark.parametrize("name", sorted(set(names()) - set(UNTRAINED)))
def test_keeps_the_contract(name: str) -> None:
    check_pipeline(name)


@pytest.mark.parametrize("name", UNTRAINED)
def test_without_weights_the_reason_says_how_to_get_them(name: str) -> None:
    with pytest.raises(WeightsMissing, match=f"{name}.*python -m training export"):
        load(name)
