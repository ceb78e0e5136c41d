"""Nothing here calls home: the node and its worker connect to the configured destination and to nobody else."""

from __future__ import annotations

import re
from pathlib import Path

from ct_builder import phantom, write_series
from node_process import NodeProcess
from oracle import StorageOracle
from peers import HOST, wait_for
from scanner import image, send
from tracing import require_strace

OUTGOING = re.compile(r"^\d+ +(connect|sendto|sendmsg|sendmmsg)\(")
ADDRESS = re.compile(r"sa_family=(AF_\w+)(?:, sin6?_port=htons\((\d+)\))?(?:.*?\"([0-9a-f.:]+)\")?")


def called(trace: str) -> set[tuple[str, int]]:
    """Internet addresses that a traced process connected or sent to."""
    found = set()
    for line in trace.splitlines():
        if OUTGOING.match(line):
            for family, port, address in ADDRESS.findall(line):
                if family in ("AF_INET", "AF_INET6"):
                    found.add((address, int(port)))
    return found


def trace_node(folder: Path, pacs_port: int) -> str:
    """System calls of a node's life: start, one series through the identity and through a network, delivery, stop."""
    trace = folder / "trace"
    # With -D the node is our own child, which we can tell to stop; without CI libraries send their statistics.
    strace = ("strace", "-D", "-f", "--seccomp-bpf", "-e", "trace=network", "-s", "64", "-o", str(trace))
    settings = {
        "routes": [
            {"name": "network", "pipeline": "fast-2.5d", "send_to": ["pacs"], "continue": True},
            {"name": "identity", "pipeline": "identity", "send_to": ["pacs"]},
        ]
    }
    images = [image(path) for path in write_series(folder / "ct", phantom(6, 128), name="silence")]
    with NodeProcess(folder / "node", pacs_port, settings, prefix=("env", "-u", "CI", *strace)) as node:
        send(node.port, images)
        # What the guard thinks of a phantom this small is not the question here.
        wait_for(lambda: [job["state"] in {"DONE", "WITHHELD"} for job in node.jobs()] == [True, True], 90)
        assert node.stop() == 0
        end = f"{node.pid} +++ exited with 0 +++"
        wait_for(lambda: end in re.sub(" +", " ", trace.read_text()), what="the end of the trace")
    return trace.read_text()


def test_the_trace_is_understood() -> None:
    lines = """
12 connect(5, {sa_family=AF_UNIX, sun_path="/var/run/nscd/socket"}, 110) = -1 ENOENT (No such file or directory)
12 connect(5, {sa_family=AF_INET, sin_port=htons(53), sin_addr=inet_addr("10.0.0.2")}, 16 <unfinished ...>
13 connect(6, {sa_family=AF_INET6, sin6_port=htons(443), inet_pton(AF_INET6, "2001:db8::1", &sin6_addr)}, 28) = 0
13 sendto(7, "x", 1, 0, {sa_family=AF_INET, sin_port=htons(9), sin_addr=inet_addr("192.0.2.1")}, 16) = 1
13 sendto(7, {{len=20}}, 20, 0, {sa_family=AF_NETLINK, nl_pid=0, nl_groups=00000000}, 12) = 20
14 accept4(3, {sa_family=AF_INET, sin_port=htons(4000), sin_addr=inet_addr("127.0.0.1")}, [16], SOCK_CLOEXEC) = 8
14 sendto(8, "answer", 6, 0, NULL, 0) = 6
"""
    assert called(lines) == {("10.0.0.2", 53), ("2001:db8::1", 443), ("192.0.2.1", 9)}


def test_the_node_calls_its_destination_only(tmp_path: Path) -> None:
    require_strace(tmp_path)
    with StorageOracle(ae_title="PACS") as pacs:
        trace = trace_node(tmp_path, pacs.port)
        assert len(pacs.sop_instance_uids()) >= 6
    assert len({line.split()[0] for line in trace.splitlines()}) > 2, "only one process was traced"
    assert called(trace) == {(HOST, pacs.port)}
