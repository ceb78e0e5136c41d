"""Pipelines as a training left them, before their weights are installed."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

from pipelines.base import ENTRY_POINT_GROUP, Execution, Pipeline
from pipelines.shipped import Factory


def load_from(folder: Path, name: str, execution: Execution | None = None) -> Pipeline:
    """The pipeline `name` of this project with weights and card of `folder`; raises what `NetworkPipeline` raises."""
    (point,) = entry_points(group=ENTRY_POINT_GROUP, name=name)
    factory: Factory = point.load()
    return factory(execution, folder)
