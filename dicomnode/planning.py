"""What the routes make of received instances: originals forwarded at once, jobs when their series closes.

Everything here is idempotent: the same instance again, or the same series closed again, finds what was planned before
and adds only what is new, for example because a route was corrected meanwhile.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from dicomnode import jobs as job_table
from dicomnode.config import Config
from dicomnode.db import JobKind, JobState, SeriesState, instances, jobs, series, transfers
from dicomnode.delivery import plan
from dicomnode.router import Match, Router
from dicomnode.scu import Outgoing
from dicomnode.series import Evidence, OpenSeries
from dicomnode.settlement import settle
from dicomnode.spool import Instance

_Members = list[tuple[Match, Any]]
"""Rows of ``instances`` that took a route, each with its match."""


class Planning:
    """Made once per node.

    Parameters
    ----------
    pipeline_hashes
        Name in config.yaml → hash of that pipeline with its options, for every pipeline that a route names.
    """

    def __init__(self, config: Config, router: Router, spool: Path, pipeline_hashes: Mapping[str, str]) -> None:
        self._config = config
        self._router = router
        self._spool = spool
        self._pipeline_hashes = pipeline_hashes

    def forward_original(
        self, connection: sa.Connection, instance: Instance, matches: Sequence[Match], generation: int
    ) -> None:
        """Plan the original's way at once, wherever a route wants it, whatever happens to any denoising.

        A destination that these very bytes were planned for already is left out, however often they come again, else a
        PACS that routes to the node what the node forwards to it would never come to rest; and however many routes name
        it, because it may refuse what it has.
        """
        wanted_by = [
            (match, (*match.route.originals_to, *(match.send_to if match.action == "forward" else ())))
            for match in matches
        ]
        planned = self._planned_destinations(connection, instance) if any(names for _, names in wanted_by) else set()
        for match, wanted in wanted_by:
            targets = [name for name in wanted if name not in planned]
            if not targets:
                continue
            identity = job_table.job_id("originals", instance.series_uid, match.route.name, str(generation))
            job_table.create(
                connection,
                identity=identity,
                kind=JobKind.ORIGINALS,
                state=JobState.DISPATCHING,
                reason=f"originals to {', '.join(targets)}, as they arrive",
                series_uid=instance.series_uid,
                study_uid=instance.study_uid,
                generation=generation,
                calling_ae=instance.calling_ae,
                route=match.route.name,
                route_reason=match.reason,
                priority=match.route.priority,
            )
            connection.execute(
                sa.update(jobs).where(jobs.c.id == identity).values(n_in=jobs.c.n_in + 1, n_out=jobs.c.n_out + 1)
            )
            item = Outgoing(
                instance.sop_instance_uid,
                instance.sop_class_uid,
                instance.transfer_syntax_uid,
                instance.path,
                instance.sha256,
            )
            plan(connection, identity, targets, [item], self._spool)
            planned |= set(targets)

    def _planned_destinations(self, connection: sa.Connection, instance: Instance) -> set[str]:
        return set(
            connection.execute(
                sa.select(transfers.c.destination)
                .join(jobs, jobs.c.id == transfers.c.job_id)
                .where(
                    jobs.c.kind == JobKind.ORIGINALS,
                    jobs.c.series_uid == instance.series_uid,
                    transfers.c.sop_instance_uid == instance.sop_instance_uid,
                    transfers.c.sha256 == instance.sha256,
                )
            ).scalars()
        )

    def close(self, connection: sa.Connection, opened: OpenSeries, judged: Evidence) -> None:
        """Close a series, make its jobs, and settle what forwards its originals."""
        self._create_jobs(connection, opened, judged)
        self._settle(connection, opened, judged.reason)

    def give_up(self, connection: sa.Connection, opened: OpenSeries) -> None:
        """Close a series that cannot be judged: a failed job says why."""
        rows = connection.execute(sa.select(instances).where(instances.c.series_uid == opened.series_uid)).all()
        reason = f"the series was not judged: {opened.fault}; its files are kept"
        self._create_ended(connection, opened, JobState.FAILED, "", reason, rows)
        self._settle(connection, opened, reason)

    def _settle(self, connection: sa.Connection, opened: OpenSeries, evidence: str) -> None:
        connection.execute(
            sa.update(series)
            .where(series.c.series_uid == opened.series_uid)
            .values(state=SeriesState.CLOSED, evidence=evidence)
        )
        originals = connection.execute(
            sa.select(jobs.c.id).where(
                jobs.c.series_uid == opened.series_uid,
                jobs.c.kind == JobKind.ORIGINALS,
                jobs.c.state == JobState.DISPATCHING,
            )
        ).scalars()
        for identity in list(originals):
            settle(connection, identity)

    def _create_jobs(self, connection: sa.Connection, opened: OpenSeries, judged: Evidence) -> None:
        """Instances that met the same route with a pipeline become one job; what met nothing is written down too."""
        rows = connection.execute(sa.select(instances).where(instances.c.series_uid == opened.series_uid)).all()
        by_pipeline: dict[str, _Members] = defaultdict(list)
        ignored: dict[str, _Members] = defaultdict(list)
        unmatched = []
        for row in rows:
            header = opened.headers.get(row.sop_instance_uid)
            if header is None:
                continue
            matches = self._router.match(header, row.calling_ae, row.called_ae)
            if not matches:
                unmatched.append((row, header))
            for match in matches:
                if match.action == "pipeline":
                    by_pipeline[match.route.name].append((match, row))
                elif match.action == "ignore":
                    ignored[match.route.name].append((match, row))
        for members in by_pipeline.values():
            self._create_pipeline_job(connection, opened, members[0][0], [row for _, row in members], judged)
        for name, members in ignored.items():
            self._create_ended(
                connection, opened, JobState.SKIPPED, name, members[0][0].reason, [row for _, row in members]
            )
        if unmatched:
            row, header = unmatched[0]
            why = self._router.explain_no_match(header, row.calling_ae, row.called_ae)
            reason = f"no route matched: {'; '.join(why)}"
            self._create_ended(connection, opened, JobState.SKIPPED, "", reason, [row for row, _ in unmatched])

    def _create_pipeline_job(
        self,
        connection: sa.Connection,
        opened: OpenSeries,
        match: Match,
        rows: Sequence[Any],
        judged: Evidence,
    ) -> None:
        route = match.route
        assert route.pipeline is not None
        options = self._config.pipelines[route.pipeline]
        digest = job_table.fingerprint((row.sop_instance_uid, row.sha256) for row in rows)
        pipeline_hash = self._pipeline_hashes[route.pipeline]
        identity = job_table.job_id("pipeline", opened.series_uid, route.name, pipeline_hash, digest)
        created = job_table.create(
            connection,
            identity=identity,
            kind=JobKind.PIPELINE,
            state=JobState.QUEUED,
            reason=f"series closed: {judged.reason}",
            sop_instance_uids=[row.sop_instance_uid for row in rows],
            series_uid=opened.series_uid,
            study_uid=opened.study_uid,
            generation=opened.generation,
            calling_ae=rows[0].calling_ae,
            route=route.name,
            route_reason=match.reason,
            priority=route.priority,
            pipeline=route.pipeline,
            uses=options.uses,
            strength=options.strength,
            blend=options.blend,
            pipeline_hash=pipeline_hash,
            fingerprint=digest,
        )
        if created:
            job_table.supersede(connection, opened.series_uid, route.name, identity)

    def _create_ended(
        self,
        connection: sa.Connection,
        opened: OpenSeries,
        state: JobState,
        route: str,
        reason: str,
        rows: Sequence[Any],
    ) -> None:
        job_table.create(
            connection,
            identity=job_table.job_id(state.lower(), opened.series_uid, route, str(opened.generation)),
            kind=JobKind.PIPELINE,
            state=state,
            reason=reason,
            sop_instance_uids=[row.sop_instance_uid for row in rows],
            series_uid=opened.series_uid,
            study_uid=opened.study_uid,
            generation=opened.generation,
            calling_ae=rows[0].calling_ae if rows else "",
            route=route,
            route_reason=reason,
            priority=100,
        )
