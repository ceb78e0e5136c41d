"""The node of the demo: its configuration, its process, and what its job log says."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from demo.pacs import AE_TITLE as PACS_AE_TITLE
from demo.processes import HOST, Program, free_port
from dicomnode.db import JobKind, JobState, SeriesState, deliveries, job_events, jobs, series
from dicomnode.jobs import FINAL
from dicomnode.requestor import Peer

AE_TITLE = "DEMONODE"
SCANNER_AE_TITLE = "DEMOSCANNER"
_DESTINATION = "pacs"

_CONFIG = """\
# Written by the demo, as short as it goes; config.yaml at the top of the project explains every line.
node:
  ae_title: {ae_title}
  address: {host}
  port: {port}
  spool: node/spool
  database: sqlite:///node/node.db

assembly:
  quiet_s: 2                     # on a real network: 15
  quiet_without_evidence_s: 8    # on a real network: 120

destinations:
  {destination}: {{ae_title: {pacs_ae_title}, host: {host}, port: {pacs_port}}}

routes:
  - name: localizers
    when: {{ImageType: LOCALIZER}}
    action: forward
    send_to: [{destination}]

  - name: ct
    when: {{Modality: CT}}
    pipeline: {pipeline}
    send_to: [{destination}]
    originals_to: [{destination}]

  - name: everything-else
    action: forward
    send_to: [{destination}]
"""


@dataclass(frozen=True, slots=True)
class JobSeen:
    """A job as the log shows it."""

    id: str
    kind: JobKind
    state: JobState
    reason: str
    progress: float
    pipeline: str
    n_in: int
    n_out: int
    derived_series_uid: str | None
    measured: dict[str, Any]
    """Empty until it is denoised; then seconds per stage and noise before and after, HU."""
    finished_at: datetime | None

    @property
    def final(self) -> bool:
        """Nothing more will happen to it by itself."""
        return self.state in FINAL


_COLUMNS = [jobs.c[name] for name in JobSeen.__dataclass_fields__]


class Node:
    """``dicomnode run`` on a configuration made for the demo; its `program` is started by the caller.

    Parameters
    ----------
    folder
        config.yaml is written there, spool, database and log to ``node/`` below it.
    pipeline
        Name of an installed pipeline.
    """

    def __init__(self, folder: Path, pacs_port: int, pipeline: str) -> None:
        home = folder / "node"
        home.mkdir(parents=True)
        self.config = folder / "config.yaml"
        self.port = free_port()
        self.config.write_text(
            _CONFIG.format(
                ae_title=AE_TITLE,
                host=HOST,
                port=self.port,
                destination=_DESTINATION,
                pacs_ae_title=PACS_AE_TITLE,
                pacs_port=pacs_port,
                pipeline=pipeline,
            )
        )
        self.peer = Peer("the node", AE_TITLE, HOST, self.port, SCANNER_AE_TITLE)
        self.log = home / "node.log"
        self.program = Program(
            "the node",
            [sys.executable, "-m", "dicomnode.cli", "run", "--config", str(self.config)],
            self.log,
            lambda: "dicomnode: ready" in self.log.read_text(errors="replace"),
        )
        self._database = sa.create_engine(f"sqlite:///file:{home / 'node.db'}?mode=ro&uri=true")

    def closed(self, series_uid: str) -> bool:
        """Was the series judged complete, so that its jobs are made?"""
        with self._database.connect() as connection:
            state = connection.execute(
                sa.select(series.c.state).where(series.c.series_uid == series_uid)
            ).scalar_one_or_none()
        return bool(state == SeriesState.CLOSED)

    def jobs(self, series_uid: str) -> list[JobSeen]:
        """Jobs of a series, oldest first."""
        query = sa.select(*_COLUMNS).where(jobs.c.series_uid == series_uid).order_by(jobs.c.created_at, jobs.c.id)
        with self._database.connect() as connection:
            rows = connection.execute(query).mappings().all()
        return [
            JobSeen(
                **{
                    **row,
                    "kind": JobKind(row["kind"]),
                    "state": JobState(row["state"]),
                    "pipeline": row["pipeline"] or "",
                    "measured": row["measured"] or {},
                }
            )
            for row in rows
        ]

    def dispatched_at(self, job_id: str) -> datetime | None:
        """When the derived series was ready to be sent."""
        with self._database.connect() as connection:
            at: datetime | None = connection.execute(
                sa.select(sa.func.min(job_events.c.at)).where(
                    job_events.c.job_id == job_id, job_events.c.state == JobState.DISPATCHING
                )
            ).scalar_one()
        return at

    def trouble(self, job_id: str) -> str:
        """Why the last attempt to send did not succeed; empty if nothing is known."""
        with self._database.connect() as connection:
            reasons = connection.execute(sa.select(deliveries.c.reason).where(deliveries.c.job_id == job_id)).scalars()
            return "; ".join(reason for reason in reasons if reason)

    def close(self) -> None:
        """Let go of the database."""
        self._database.dispose()
