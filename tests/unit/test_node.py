"""Two nodes never work on the same things."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tables import config_of

from dicomnode.errors import NodeError
from dicomnode.node import Node
from dicomnode.spool import hold


def test_a_database_of_another_node_is_refused(tmp_path: Path) -> None:
    config = config_of(node={"spool": str(tmp_path / "spool"), "database": f"sqlite:///{tmp_path / 'node.db'}"})
    other = hold(tmp_path / "node.db.lock")
    try:
        with pytest.raises(NodeError, match="in use by another running node"):
            Node(config)
    finally:
        os.close(other)
