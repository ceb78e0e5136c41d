"""What the node does between an image and its answer, in the order of its system calls.

That nothing is lost by kill -9 proves no durability: what a dead process wrote, the kernel keeps. A power cut keeps
what was synced, and 0x0000 promises that it was.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from ct_builder import phantom, write_series
from node_process import NodeProcess
from oracle import StorageOracle
from peers import wait_for
from scanner import Image, Scanner, image
from tracing import ANSWERED, kept, require_strace

TRACED = "write,writev,pwrite64,pwritev,fsync,fdatasync,rename,renameat,renameat2,link,linkat,mkdir,sendto,sendmsg"


def test_a_trace_is_understood() -> None:
    part = "/s/incoming/0123456789abcdef0123456789abcdef-42.part"
    synced = f"""
7  fsync(5<{part}> <unfinished ...>
8  mkdir("/s/instances/1.2", 0777) = 0
8  fsync(6</elsewhere>) = 0
8  fsync(6</s/instances>) = 0
7  <... fsync resumed>) = 0
"""
    renamed = f"""
8  rename("{part}", "/s/instances/1.2/3.dcm") = 0
"""
    answered = """
8  fsync(5</s/instances/1.2>) = -1 EIO (Input/output error)
8  sendmsg(9<TCP:[127.0.0.1:104->127.0.0.1:5000]>, {msg_name=NULL, ...}, MSG_NOSIGNAL) = 120
9  sendmsg(9<TCP:[127.0.0.1:5000->127.0.0.1:104]>, {msg_name=NULL, ...}, MSG_NOSIGNAL) = 120
"""
    assert kept(synced + renamed + answered, Path("/s"), from_port(104)) == [
        [
            "mkdir instances/1.2",
            "fsync instances",
            "fsync incoming/PART",
            "rename incoming/PART instances/1.2/3.dcm",
            ANSWERED,
        ]
    ]
    begun, ended = synced.rsplit("7  <", 1)
    early = begun + renamed.replace(" = 0", " <unfinished ...>") + "7  <" + ended + "8  <... rename resumed>) = 0"
    with pytest.raises(AssertionError, match=r"rename .* began too early"):
        kept(early, Path("/s"), from_port(104))


def from_port(port: int) -> str:
    """What strace says of a call on a connection of our port."""
    return f"<TCP:[127.0.0.1:{port}->"


def expected(one: Image, *, under: str = "instances", name: str = "", new_folder: bool = False) -> list[str]:
    """Calls that keep an object, and the answer after them."""
    folder = f"{under}/{one.series_uid}"
    return [
        *([f"mkdir {folder}", f"fsync {under}"] if new_folder else []),
        "writev incoming/PART",
        "fsync incoming/PART",
        f"rename incoming/PART {folder}/{name or one.sop_instance_uid}.dcm",
        f"fsync {folder}",
        ANSWERED,
    ]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Image]:
    paths = write_series(tmp_path_factory.mktemp("ct"), phantom(3, 64), name="durability")
    return [image(path) for path in paths]


def test_each_answer_follows_the_syncs_that_make_it_true(tmp_path: Path, images: list[Image]) -> None:
    require_strace(tmp_path)
    trace = tmp_path / "trace"
    first, *others = images
    changed = replace(first, data=first.data[:-2] + b"\1\1")
    # With -D the node is our own child, which can be told to stop.
    strace = ("strace", "-D", "-f", "--seccomp-bpf", "-yy", "-s", "0", "-e", f"trace={TRACED}", "-o", str(trace))
    with StorageOracle(ae_title="PACS") as pacs, NodeProcess(tmp_path / "node", pacs.port, prefix=strace) as node:
        with Scanner(node.port, images) as scanner:
            assert [scanner.store(one) for one in [first, *others, first, changed]] == [0] * 5
        with Scanner(node.port, images) as scanner:
            assert scanner.store(first) == 0
        assert node.stop() == 0
        wait_for(lambda: re.search(rf"^{node.pid} +\+\+\+ exited", trace.read_text(), re.MULTILINE), what="the trace")
    repeated = ["writev incoming/PART", "fsync incoming/PART", f"fsync instances/{first.series_uid}", ANSWERED]
    accepted = released = [ANSWERED]
    start, *then = kept(trace.read_text(), node.spool, from_port(node.port))
    assert start[-1] == ANSWERED  # the first association, accepted
    assert then == [
        expected(first, new_folder=True),
        *(expected(one) for one in others),
        repeated,
        expected(first, under="conflicts", name=f"{first.sop_instance_uid}.{changed.sha256[:16]}", new_folder=True),
        released,
        accepted,
        repeated,
        released,
    ]
