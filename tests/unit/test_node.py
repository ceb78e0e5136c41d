"""Two nodes never work on the same things, and none goes on with a part of itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from peers import free_port
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


_FAULTY = """
import sys
from dicomnode import cli, intake

def fault(*_):
    raise RuntimeError("a fault of ours")

intake.Intake._close_complete = fault
sys.exit(cli.main(["run", "--config", sys.argv[1]]))
"""


def test_a_node_that_lost_a_thread_ends(tmp_path: Path) -> None:
    """It would take images and do nothing with them; whoever supervises it starts another."""
    config = tmp_path / "config.yaml"
    settings = {"port": free_port(), "spool": "spool", "database": "sqlite:///node.db"}
    config.write_text(yaml.safe_dump({"node": settings}))
    ended = subprocess.run([sys.executable, "-c", _FAULTY, config], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1, ended.stderr
    assert "a fault ended the thread intake, see the log" in ended.stderr
    assert "RuntimeError: a fault of ours" in ended.stderr
