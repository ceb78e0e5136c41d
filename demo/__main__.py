"""``python -m demo [--ct FOLDER]``: make or find a low-dose series, send it, wait, measure, show."""

from __future__ import annotations

import argparse
import fcntl
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from demo import pacs as pacs_module
from demo.node import AE_TITLE, Node
from demo.pacs import AE_TITLE as PACS_AE_TITLE
from demo.pacs import Pacs
from demo.processes import HOST, DemoFailed
from demo.progress import Step
from demo.report import report
from demo.series import DOSE, Source, find_ct, make_phantom
from dicomnode.answers import Verdict, judge
from dicomnode.db import JobKind, JobState
from dicomnode.errors import PeerError
from dicomnode.scu import Answer, Refused, store
from pipelines import base

SLICES = 64
_OUT = Path("demo-output")
_MARK = "made-by-the-demo"
"""File that says: this folder may be emptied by the next run."""
_LOOK_EVERY_S = 0.25
_REFUSALS_SHOWN = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 0 if every series had an outcome, and the phantom the one it should have."""
    parser = argparse.ArgumentParser(prog="python -m demo", description="A low-dose CT through the node into a PACS.")
    parser.add_argument("--ct", type=Path, help="folder with DICOM CT (default: a phantom is made)")
    parser.add_argument("--pipeline", default="fast-2.5d", help="what denoises (default: %(default)s)")
    parser.add_argument("--slices", type=int, default=SLICES, help="slices of the phantom (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=_OUT, help="folder for everything (default: %(default)s)")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if arguments.pipeline not in base.names():
            raise DemoFailed(f"no pipeline {arguments.pipeline!r}; there are: {', '.join(base.names())}")
        if arguments.ct is not None and not arguments.ct.is_dir():
            raise DemoFailed(f"{arguments.ct} is no folder")
        return _run(arguments.out, arguments.ct, arguments.pipeline, arguments.slices)
    except (DemoFailed, PeerError) as error:
        print(f"\nThe demo failed: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nStopped; the node and the PACS are stopped too.", file=sys.stderr)
        return 130
    return 1


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _run(out: Path, ct: Path | None, pipeline: str, slices: int) -> int:
    begun = time.monotonic()
    print("A low-dose CT series goes through the node into a PACS.\n")
    _empty(out)
    sources = _find(ct) if ct is not None else [_phantom(out / "low-dose", slices)]
    with ExitStack() as stack:
        with Step("start a PACS") as step:
            pacs = pacs_module.make(out / "pacs")
            stack.enter_context(pacs.program)
            step.result(f"{pacs.name}, {PACS_AE_TITLE} on {HOST}:{pacs.port}")
        with Step("start the node") as step:
            node = Node(out, pacs.port, pipeline)
            stack.callback(node.close)
            stack.enter_context(node.program)
            step.result(f"{AE_TITLE} on {HOST}:{node.port}, pipeline {pipeline}")
        accepted = _send(node, sources)
        arrived: list[Source] = []
        missed: list[Source] = []
        for source in sources:
            (arrived if any(item.sop_instance_uid in accepted for item in source.items) else missed).append(source)
        _wait(node, pacs, arrived)
        good = report(out, node, pacs, arrived)
        for source in missed:
            print(
                f"\nSeries {source.series_uid}\n  the node accepted none of its {len(source.items)} images, see above"
            )
    print(f"\nEverything together took {time.monotonic() - begun:.0f} s. The node and the PACS are stopped.")
    _what_next(out, node, pacs, sources)
    return 0 if good else 1


def _empty(out: Path) -> None:
    """A fresh folder `out`; what an earlier run left there goes, what somebody else put there stays and is an error."""
    if out.exists() and any(out.iterdir()):
        if not (out / _MARK).exists():
            raise DemoFailed(f"{out} holds files that are not the demo's; name another folder with --out")
        lock = out / "node" / "spool" / "lock"
        if lock.exists() and _locked(lock):
            raise DemoFailed(f"a node is running on {out}; stop it first (Ctrl-C where it runs)")
        print(f"  {out} of an earlier run is replaced; node and PACS begin empty")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARK).write_text("The next run of the demo empties this folder.\n")


def _locked(path: Path) -> bool:
    with path.open("rb+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _phantom(folder: Path, slices: int) -> Source:
    with Step("simulate a scan") as step:
        source = make_phantom(folder, slices, step.at)
        step.result(f"{slices} slices of a chest-and-abdomen phantom at {DOSE:.0%} of full dose")
    return source


def _find(folder: Path) -> list[Source]:
    with Step("look for CT") as step:
        found = find_ct(folder)
        images = sum(len(source.items) for source in found.sources)
        step.result(
            f"{len(found.sources)} series with {images} images in {folder}; left out: {found.other_dicom} other DICOM "
            f"files, {found.not_dicom} files that are no DICOM"
        )
    if not found.sources:
        raise DemoFailed(f"no DICOM CT in {folder}")
    return list(found.sources)


def _send(node: Node, sources: Sequence[Source]) -> set[str]:
    """Send all series over one association, as a scanner does; the SOP Instance UIDs that were accepted."""
    items = [item for source in sources for item in source.items]
    accepted: set[str] = set()
    refused: list[str] = []
    with Step("send by C-STORE") as step:

        def told(answer: Answer | Refused) -> None:
            if isinstance(answer, Refused):
                refused.append(f"{answer.sop_instance_uid}: {answer.reason}")
            elif judge(answer.status, unanswered_before=False) is not Verdict.ACCEPTED:
                refused.append(f"{answer.sop_instance_uid}: status 0x{answer.status:04X}")
            else:
                accepted.add(answer.sop_instance_uid)
            answered = len(accepted) + len(refused)
            step.at(answered / len(items), f"{answered} of {len(items)} images")

        store(node.peer, items, told, lambda: False)
        megabytes = sum(item.path.stat().st_size for item in items) / 1e6
        step.result(
            f"{len(accepted)} of {len(items)} images accepted, "
            f"{megabytes / step.seconds:.0f} MB/s, each safe on disk before its answer"
        )
    for line in refused[:_REFUSALS_SHOWN]:
        print(f"    not accepted: {line}")
    if len(refused) > _REFUSALS_SHOWN:
        print(f"    ... and {len(refused) - _REFUSALS_SHOWN} more; the reasons are in {node.log}")
    if not accepted:
        raise DemoFailed(f"the node accepted none of the images; the reasons are in {node.log}")
    return accepted


def _wait(node: Node, pacs: Pacs, sources: Sequence[Source]) -> None:
    """Wait until every job has come to its end."""
    with Step("denoise and send to the PACS") as step:
        while True:
            node.program.check()
            pacs.program.check()
            fraction, what = _progress(node, sources)
            if fraction >= 1:
                break
            step.at(fraction, what)
            time.sleep(_LOOK_EVERY_S)
        step.result("done")


def _progress(node: Node, sources: Sequence[Source]) -> tuple[float, str]:
    """Fraction of the work that is done (1: all of it), and what is going on."""
    done, what = 0.0, ""
    for source in sources:
        jobs = node.jobs(source.series_uid)
        if not node.closed(source.series_uid):
            what = what or "waiting until no more images come"
        elif all(job.final for job in jobs):
            done += 1
        else:
            job = next((job for job in jobs if not job.final and job.kind is JobKind.PIPELINE), jobs[0])
            done += 0.95 * job.progress
            if job.state is JobState.DISPATCHING:
                trouble = node.trouble(job.id)
                what = what or f"sending to the PACS {trouble}".rstrip()
            elif job.state is JobState.RUNNING:
                what = f"denoising {job.n_in} slices"
    return done / len(sources), what or "waiting for its turn"


def _what_next(out: Path, node: Node, pacs: Pacs, sources: Sequence[Source]) -> None:
    command = Path(sys.executable).parent / "dicomnode"
    shown = command.relative_to(Path.cwd()) if command.is_relative_to(Path.cwd()) else command
    seen = [job for source in sources for job in node.jobs(source.series_uid)]
    job = min(seen, key=lambda job: job.kind is not JobKind.PIPELINE, default=None)
    print(
        f"\nLook at the jobs:         {shown} jobs list --config {node.config}\n"
        f"... at this one:          {shown} jobs show {job.id[:12] if job else 'JOB'} --config {node.config}\n"
        f"Keep the node running:    {shown} run --config {node.config}\n"
        f"... and its PACS:         {pacs.start_command}\n"
        f"Send it something:        C-STORE to {AE_TITLE}, {HOST}, port {node.port}\n"
        f'A real PACS:              README.md, "Five minutes to a real PACS"'
    )


if __name__ == "__main__":
    sys.exit(main())
