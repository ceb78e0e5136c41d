"""Pipelines as a training left them, before their weights are installed."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

from pipelines.base import ENTRY_POINT_GROUP, Execution, Pipeline, UnknownPipeline
from pipelines.shipped import Factory


def factory_of(name: str) -> Factory:
    """What makes the network `name` of this project.

    Raises
    ------
    UnknownPipeline
        If it is announced as no pipeline, or as one of another package.
    """
    for point in entry_points(group=ENTRY_POINT_GROUP, name=name):
        factory = point.load()
        if isinstance(factory, Factory):
            return factory
    raise UnknownPipeline(
        f"{name} is no network that a node can be told to run: pipelines.shipped has none of that name, or "
        "pyproject.toml does not announce it"
    )


def load_from(folder: Path, name: str, execution: Execution | None = None) -> Pipeline:
    """The pipeline `name` of this project with weights and card of `folder`.

    Raises
    ------
    UnknownPipeline
        As `factory_of`; else what `NetworkPipeline` raises.
    """
    return factory_of(name)(execution, folder)
