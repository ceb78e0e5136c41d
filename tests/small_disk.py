"""A node on a disk of some megabytes, which a test fills and empties while the node runs.

The disk is a tmpfs in a mount namespace of the node's own: nobody else sees it, and it is gone with the process.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ct_builder import phantom, write_series
from node_process import NodeProcess
from scanner import Image, data_set_of, image

_NAMESPACE = ["unshare", "--mount", "--propagation", "private", *([] if os.geteuid() == 0 else ["--map-root-user"])]
PAGE = os.sysconf("SC_PAGE_SIZE")
OUT_OF_RESOURCES = 0xA700
AGAIN_S = 75.0
"""Enough for a job that found no space, which is tried again after 30 s."""
_ROWS = 256
_QUERY = """
import json, sqlite3, sys
connection = sqlite3.connect(f"file:{sys.argv[1]}?mode=ro", uri=True, timeout=20)
connection.row_factory = sqlite3.Row
print(json.dumps([dict(row) for row in connection.execute(sys.argv[2], json.loads(sys.argv[3]))]))
"""


def _mounted(where: Path, megabytes: int) -> list[str]:
    """Command that runs the one behind it with a new disk at `where`."""
    mount = f"mount -t tmpfs -o size={megabytes}m,mode=700 tmpfs {shlex.quote(str(where))}"
    return [*_NAMESPACE, "sh", "-c", f'{mount} && exec "$@"', "sh"]


def require_small_disks(folder: Path) -> None:
    """Skip (fail, when CI is set) where a process may not have a disk of its own."""
    try:
        tried = subprocess.run([*_mounted(folder, 1), "true"], capture_output=True, text=True, timeout=30, check=False)
        refusal = tried.stderr.strip() if tried.returncode else ""
    except FileNotFoundError:
        refusal = "unshare is not installed (Debian package util-linux)"
    if refusal:
        reason = f"no mount namespace of its own for a process here: {refusal}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


class SmallDiskNode(NodeProcess):
    """``dicomnode run`` whose spool, database, or both are on a small disk.

    Parameters
    ----------
    folder, pacs_port, settings
        As for `NodeProcess`.
    megabytes
        Size of the disk, in MiB.
    spool, database
        Whether they are on it.
    """

    def __init__(
        self,
        folder: Path,
        pacs_port: int,
        settings: Mapping[str, Any] | None = None,
        *,
        megabytes: int,
        spool: bool = True,
        database: bool = False,
    ) -> None:
        where = {
            "spool": "disk/spool" if spool else "spool",
            "database": f"sqlite:///{'disk/' if database else ''}node.db",
        }
        mount_point = folder / "disk"
        mount_point.mkdir(parents=True)
        super().__init__(
            folder,
            pacs_port,
            {**(settings or {}), "node": where},
            prefix=tuple(_mounted(mount_point, megabytes)),
        )
        self._spool_on_disk, self._database_on_disk = spool, database

    def start(self) -> None:
        """Start and wait until it listens; from now on its files are seen as it sees them."""
        super().start()
        self.disk = Path(f"/proc/{self.pid}/root{self.folder}/disk")
        if self._spool_on_disk:
            self.spool = self.disk / "spool"

    def query(self, sql: str, *values: object) -> list[dict[str, Any]]:
        """Rows of the node's database, read from within its namespace: SQLite wants the true path of a file."""
        if not self._database_on_disk:
            return super().query(sql, *values)
        enter = ["nsenter", "--mount", "--target", str(self.pid), *([] if os.geteuid() == 0 else ["--user"])]
        read = [sys.executable, "-I", "-S", "-c", _QUERY, str(self.folder / "disk" / "node.db"), sql]
        done = subprocess.run([*enter, *read, json.dumps(values)], capture_output=True, timeout=60, check=True)
        rows: list[dict[str, Any]] = json.loads(done.stdout)
        return rows

    def free_bytes(self) -> int:
        status = os.statvfs(self.disk)
        return status.f_bavail * status.f_frsize

    def fill(self, but_bytes: int) -> None:
        """Fill the disk up to so many free bytes, rounded up to pages."""
        with (self.disk / "ballast").open("ab", buffering=0) as file:
            while self.free_bytes() >= but_bytes + PAGE:
                try:
                    file.write(bytes(PAGE))
                except OSError as error:
                    if error.errno != errno.ENOSPC or but_bytes:
                        raise
                    return  # the node, which goes on, took the last page

    def make_space(self) -> None:
        """Take away what `fill` put there."""
        (self.disk / "ballast").unlink()


def series(folder: Path, name: str, slices: int, **overrides: object) -> list[Image]:
    """Images of 131 kB, with these header values."""
    return [image(path) for path in write_series(folder, phantom(slices, _ROWS), name=name, **overrides)]


def received(node: SmallDiskNode) -> dict[str, bytes]:
    """Name of each file that reception left in the spool → its data set."""
    folders = [node.spool / name for name in ("instances", "conflicts")]
    return {path.name: data_set_of(path.read_bytes()) for folder in folders for path in folder.glob("*/*")}


def check_left_nothing_but(node: SmallDiskNode, images: list[Image]) -> None:
    """Whole files of these images, and of nothing else."""
    assert received(node) == {f"{one.sop_instance_uid}.dcm": one.data for one in images}
