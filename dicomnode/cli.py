"""The command line: run the node, look at its jobs, try a destination, denoise a folder, tell how fast it is."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from pydicom import dcmread
from pydicom.errors import InvalidDicomError

from dicomnode import jobs as job_table
from dicomnode.answers import Verdict, judge
from dicomnode.benchmark import MIN_SLICES, NotMeasured, benchmark, table
from dicomnode.config import Config, load
from dicomnode.db import JobState, deliveries, job_events, jobs, now, open_database, series, transfers
from dicomnode.delivery import peer
from dicomnode.denoise import Progress, Withheld, denoise_series, seconds_in_words
from dicomnode.errors import ConfigError, NodeError, PeerError
from dicomnode.node import Node, pipeline_hashes
from dicomnode.scu import Answer, Outgoing, Refused, echo, store
from dicomnode.spool import dataset_digest
from dicomnode.worker import configured_worker, keep_headers_out_of_the_log
from pipelines import base
from pipelines.volume import SeriesRefused

OK, FAILED, BAD_USAGE = 0, 1, 2
"""Exit codes."""
_DEFAULT_CONFIG = Path("config.yaml")
_JOB_LINES = 50
_LOOK_EVERY_S = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the ``dicomnode`` command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.command(arguments))
    except ConfigError as error:
        print(f"{error}", file=sys.stderr)
        return BAD_USAGE
    except BrokenPipeError:  # e.g. `| head`
        return OK
    except (NodeError, SeriesRefused, base.WeightsMissing, base.WeightsDamaged, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return FAILED
    except sa.exc.DBAPIError as error:
        print(f"the job log cannot be used: {error.orig}; is this the user that the node runs as?", file=sys.stderr)
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dicomnode", description="Receive CT, denoise it, send it back to the PACS.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add(commands, "run", "Run the node until it is told to stop (Ctrl-C or SIGTERM).", _run)
    _add(
        commands,
        "check-config",
        "Read the configuration, load the pipelines of its routes, say what is wrong.",
        _check_config,
    )
    sub = _add(commands, "echo", "C-ECHO: does a destination answer?", _echo)
    sub.add_argument("destination", help="name in config.yaml")
    sub = _add(commands, "send", "C-STORE files to a destination, unchanged.", _send)
    sub.add_argument("destination", help="name in config.yaml")
    sub.add_argument("paths", nargs="+", type=Path, help="DICOM files or folders")
    sub = _add(commands, "denoise", "Denoise one series from folder to folder, without any network.", _denoise)
    sub.add_argument("series", type=Path, help="folder with the DICOM files of one CT series")
    sub.add_argument("out", type=Path, help="folder for the derived series; must not exist")
    sub.add_argument("--pipeline", required=True, help="name of a pipeline, installed or in config.yaml")
    sub = _add(commands, "benchmark", "How fast the pipelines of the routes are on this machine.", _benchmark)
    sub.add_argument(
        "--slices",
        type=_slice_count,
        default=64,
        help="slices of the phantom that is denoised (default %(default)s; more take longer and say it more exactly)",
    )
    job_help = "Look at the jobs, try one again, stop one."
    job_commands = commands.add_parser("jobs", help=job_help, description=job_help).add_subparsers(
        required=True, metavar="COMMAND"
    )
    sub = _add(job_commands, "list", "The newest jobs, a line each.", _jobs_list)
    sub.add_argument("--state", choices=[state.value for state in JobState], help="only jobs in this state")
    for name, help_text, command in (
        ("show", "One job with its history and deliveries.", _jobs_show),
        ("retry", "Try a failed job again: compute, or send what was not accepted.", _jobs_retry),
        ("cancel", "Stop a job; what was sent stays sent.", _jobs_cancel),
    ):
        _add(job_commands, name, help_text, command).add_argument("job", help="job id, or its first characters")
    return parser


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    help_text: str,
    command: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help_text, description=help_text)
    parser.set_defaults(command=command)
    parser.add_argument("--config", type=Path, default=_DEFAULT_CONFIG, help="configuration file (config.yaml)")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    config = load(arguments.config)
    _log_to_stderr(config)
    node = Node(config)
    asked = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked.set())
    node.start()
    print(f"dicomnode: ready as {config.node.ae_title} on {config.node.address}:{node.port}", flush=True)
    try:
        # Awake now and then: a signal that the kernel gave to another thread is only seen when this one runs.
        while not asked.wait(_LOOK_EVERY_S):
            node.check()
    finally:
        node.stop()
    return OK


def _log_to_stderr(config: Config) -> None:
    logging.basicConfig(
        level=config.node.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    keep_headers_out_of_the_log()
    logging.getLogger("alembic").setLevel(logging.WARNING)


def _check_config(arguments: argparse.Namespace) -> int:
    config = load(arguments.config)
    worker = configured_worker(config.compute)
    try:
        pipeline_hashes(config, worker)
    finally:
        worker.stop()
    print(
        f"{arguments.config}: good. {config.node.ae_title} on {config.node.address}:{config.node.port}, "
        f"{len(config.destinations)} destinations, {len(config.routes)} routes"
    )
    return OK


def _echo(arguments: argparse.Namespace) -> int:
    destination = peer(load(arguments.config), arguments.destination)
    try:
        print(f"{destination} answered in {echo(destination) * 1000:.0f} ms")
    except PeerError as error:
        print(f"no answer: {error}", file=sys.stderr)
        return FAILED
    return OK


def _send(arguments: argparse.Namespace) -> int:
    destination = peer(load(arguments.config), arguments.destination)
    items = [item for path in _files(arguments.paths) if (item := _outgoing(path)) is not None]
    bad = 0

    def told(answer: Answer | Refused) -> None:
        nonlocal bad
        if isinstance(answer, Refused):
            bad += 1
            print(f"{answer.sop_instance_uid}: not sent, {answer.reason}", file=sys.stderr)
        elif judge(answer.status, unanswered_before=False) is not Verdict.ACCEPTED:
            bad += 1
            print(f"{answer.sop_instance_uid}: 0x{answer.status:04X}", file=sys.stderr)
        elif answer.status != 0:
            print(f"{answer.sop_instance_uid}: accepted with warning 0x{answer.status:04X}", file=sys.stderr)

    begun = time.monotonic()
    store(destination, items, told, lambda: False)
    print(f"{len(items) - bad} of {len(items)} accepted by {destination} in {time.monotonic() - begun:.1f} s")
    return FAILED if bad or not items else OK


def _files(paths: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        found += sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return found


def _outgoing(path: Path) -> Outgoing | None:
    try:
        meta = dcmread(path, stop_before_pixels=True, specific_tags=[]).file_meta
        return Outgoing(
            str(meta.MediaStorageSOPInstanceUID), str(meta.MediaStorageSOPClassUID), str(meta.TransferSyntaxUID), path
        )
    except (InvalidDicomError, AttributeError) as error:
        print(f"{path}: left out, not a DICOM file ({error})", file=sys.stderr)
        return None


def _job_log(arguments: argparse.Namespace) -> sa.Engine:
    """The database of the node; never makes one, which would only show an empty list to who took the wrong folder."""
    url = load(arguments.config).node.database
    path = Path(str(sa.make_url(url).database))
    if not path.exists():
        raise NodeError(
            f"there is no job log {path} yet: {arguments.config} names it; is that the node's configuration?"
        )
    return open_database(url)


def _jobs_list(arguments: argparse.Namespace) -> int:
    database = _job_log(arguments)
    query = sa.select(jobs).order_by(jobs.c.created_at.desc()).limit(_JOB_LINES)
    if arguments.state:
        query = query.where(jobs.c.state == arguments.state)
    with database.connect() as connection:
        rows = connection.execute(query).all()
    print(f"{'job':12}  {'state':11}  {'done':>4}  {'in':>5}  {'out':>5}  {'route':20}  {'created (UTC)':19}  reason")
    for row in rows:
        print(
            f"{row.id[:12]:12}  {row.state:11}  {row.progress:4.0%}  {row.n_in:5}  {row.n_out:5}  {row.route[:20]:20}  "
            f"{row.created_at:%Y-%m-%d %H:%M:%S}  {row.reason[:100]}"
        )
    return OK


def _jobs_show(arguments: argparse.Namespace) -> int:
    database = _job_log(arguments)
    with database.connect() as connection:
        identity = _find(connection, arguments.job)
        job = connection.execute(sa.select(jobs).where(jobs.c.id == identity)).mappings().one()
        events = connection.execute(
            sa.select(job_events).where(job_events.c.job_id == identity).order_by(job_events.c.id)
        ).all()
        sent = connection.execute(sa.select(deliveries).where(deliveries.c.job_id == identity)).all()
        conflicts = connection.execute(
            sa.select(series.c.n_conflicts).where(series.c.series_uid == job["series_uid"])
        ).scalar_one()
        counts = connection.execute(
            sa.select(transfers.c.destination, transfers.c.state, sa.func.count().label("n"))
            .where(transfers.c.job_id == identity)
            .group_by(transfers.c.destination, transfers.c.state)
        ).all()
    for key, value in _described(dict(job)):
        if value not in (None, "", False):
            print(f"{key:25} {value}")
    if conflicts:
        print(f"{conflicts} images of the series came with other bytes under a known UID; see conflicts in the spool")
    for row in sent:
        instances = ", ".join(f"{count.n} {count.state}" for count in counts if count.destination == row.destination)
        print(f"delivery to {row.destination}: {row.state}, {instances}; {row.attempts} attempts; {row.reason}")
    for event in events:
        print(f"{event.at:%Y-%m-%d %H:%M:%S}  {event.state:11}  {event.what}")
    return OK


def _described(job: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """The columns of a job as a person reads them."""
    for key, value in job.items():
        if key == "progress" and job["n_in"]:
            yield key, f"{round(value * job['n_in'])} of {job['n_in']} images ({value:.0%})"
        elif key == "measured" and value:
            yield from _measured(value)
        else:
            yield key, value


def _measured(values: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if key == "seconds":
            yield key, f"{seconds_in_words(value)}; the stages run side by side"
        elif key == "reason":  # the row has one of its own
            yield "ran on", value
        elif isinstance(value, dict):
            yield from ((f"{key} {name}", _figure(figure)) for name, figure in value.items())
        else:
            yield key, _figure(value)


def _figure(value: object) -> object:
    """Numbers without the digits that nobody reads."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_figure(number)}" for name, number in value.items())
    return f"{value:.3g}" if isinstance(value, float) else value


def _find(connection: sa.Connection, start: str) -> str:
    found = connection.execute(sa.select(jobs.c.id).where(jobs.c.id.startswith(start, autoescape=True))).scalars().all()
    if len(found) != 1:
        raise NodeError(f"{len(found)} jobs begin with {start!r}; see dicomnode jobs list")
    return str(found[0])


def _jobs_retry(arguments: argparse.Namespace) -> int:
    database = _job_log(arguments)
    with database.begin() as connection:
        identity = _find(connection, arguments.job)
        job_table.retry(connection, identity)
    print(f"job {identity} is tried again")
    return OK


def _jobs_cancel(arguments: argparse.Namespace) -> int:
    database = _job_log(arguments)
    with database.begin() as connection:
        identity = _find(connection, arguments.job)
        asked = connection.execute(
            sa.update(jobs)
            .where(jobs.c.id == identity, jobs.c.state.not_in(list(job_table.FINAL)))
            .values(cancel_requested=True, updated_at=now())
        ).rowcount
        if not asked:
            raise NodeError(f"job {identity} is through already")
    print(f"job {identity} will be cancelled by the running node")
    return OK


def _denoise(arguments: argparse.Namespace) -> int:
    config = load(arguments.config) if arguments.config.exists() else Config()
    compute, chosen = config.compute, config.pipelines.get(arguments.pipeline)
    if chosen is None:
        raise NodeError(f"no pipeline {arguments.pipeline!r}; there are: {', '.join(sorted(config.pipelines))}")
    if arguments.out.exists():
        raise NodeError(f"{arguments.out} exists; choose a folder that does not")
    files = [path for path in _files([arguments.series]) if _outgoing(path) is not None]
    if not files:
        raise NodeError(f"no DICOM files in {arguments.series}")
    digests = []
    for path in files:
        header = dcmread(path, stop_before_pixels=True, specific_tags=["SOPInstanceUID"])
        digests.append((str(header.SOPInstanceUID), dataset_digest(path)))
    try:
        manifest = denoise_series(
            files,
            arguments.out,
            pipeline=base.load(chosen.uses, base.Execution(compute.device, compute.precision, compute.threads)),
            options=base.Options(chosen.strength, chosen.blend),
            fingerprint=job_table.fingerprint(digests),
            settings=config.derivation,
            created_at=datetime.now(UTC).astimezone(),
            report=_show_progress,
        )
    except Withheld as verdict:
        print(f"\nwithheld, nothing was written: {verdict}\n{verdict.figures}", file=sys.stderr)
        return FAILED
    finally:
        print(file=sys.stderr)
    print(
        f"{len(manifest.instances)} slices by {manifest.pipeline} {manifest.version} ({manifest.precision}) "
        f"in {arguments.out}\nran on: {manifest.reason or 'this machine'}\n"
        f"seconds: {seconds_in_words(manifest.seconds)}\n"
        f"noise: {manifest.noise_before_hu} HU before, {manifest.noise_after_hu} HU after"
    )
    return OK


def _slice_count(text: str) -> int:
    if not text.isdecimal() or int(text) < MIN_SLICES:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of slices of at least {MIN_SLICES}")
    return int(text)


def _benchmark(arguments: argparse.Namespace) -> int:
    config = load(arguments.config)
    rows = list(benchmark(config, arguments.slices, _show_progress))
    print(file=sys.stderr)
    print(table(rows, config.compute))
    return FAILED if any(isinstance(row, NotMeasured) for row in rows) else OK


def _show_progress(progress: Progress) -> None:
    if sys.stderr.isatty():
        print(f"\r{progress.slices} of {progress.of} slices", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
