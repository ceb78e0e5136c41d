"""From stored instances to jobs: index, forward originals at once, close series, route them.

The association threads only put what they stored into a queue; one thread here writes the tables in batches. A crash in
between loses nothing: the spool holds every acknowledged object, and `recover` indexes what has no row.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import sqlalchemy as sa
from pydicom import dcmread
from sqlalchemy.dialects.sqlite import insert

from dicomnode import jobs as job_table
from dicomnode.config import Config
from dicomnode.db import JobState, SeriesState, instances, jobs, series
from dicomnode.errors import SpoolError, fault, ground_gave_way
from dicomnode.planning import Planning
from dicomnode.router import Router, header_values
from dicomnode.series import KEYWORDS, PROVEN_QUIET_S, Header, OpenSeries, evidence, proven, quiet_needed_s
from dicomnode.spool import Instance, Kept, Spool, read_instance

log = logging.getLogger(__name__)

_BATCH = 256
"""Most instances indexed in one transaction."""
_LOOK_EVERY_S = 0.25
_DATABASE_PAUSE_S = 2.0

_GATHER_S = 0.05
"""A row waits so long for others: a transaction and its sync are the same for one image and for twenty."""

# Built once: to build such a statement costs more than to execute it.
_SERIES = sa.select(series).where(series.c.series_uid == sa.bindparam("wanted"))
_INSTANCE_COLUMNS = [column.name for column in instances.columns]
_ROW = insert(instances)
# The row may be there: the same bytes again, or other bytes after somebody removed the file.
_INSTANCE = _ROW.on_conflict_do_update(
    index_elements=list(instances.primary_key),
    set_={column.name: _ROW.excluded[column.name] for column in instances.columns if not column.primary_key},
)
_COUNT = sa.select(sa.func.count()).where(instances.c.series_uid == sa.bindparam("wanted")).scalar_subquery()
_GROWN = (
    sa.update(series)
    .where(series.c.series_uid == sa.bindparam("wanted"))
    .values(
        n_instances=_COUNT,
        **{name: sa.bindparam(name) for name in ("state", "generation", "n_conflicts", "last_at")},
    )
)

_LATER = (sa.exc.OperationalError, sa.exc.TimeoutError, OSError)
"""What passes: a full disk, a locked database. Any other error comes back as often as its cause is tried."""

_Stored = tuple[Kept, Instance, Header]


class Intake:
    """One per node.

    Parameters
    ----------
    open_associations
        Number of open associations that brought instances of a series, by its UID.
    pipeline_hashes
        Name in config.yaml → hash of that pipeline with its options, for every pipeline that a route names.
    """

    def __init__(
        self,
        config: Config,
        database: sa.Engine,
        spool: Spool,
        open_associations: Callable[[str], int],
        pipeline_hashes: Mapping[str, str],
    ) -> None:
        self._config = config
        self._database = database
        self._spool = spool
        self._router = Router(config.routes)
        self._open_associations = open_associations
        self._planning = Planning(config, self._router, spool.root, pipeline_hashes)
        self._queue: queue.Queue[_Stored] = queue.Queue()
        self._open: dict[str, OpenSeries] = {}
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self.keywords = self._router.keywords | KEYWORDS
        """What the receiver must keep of each header."""

    def stored(self, kept: Kept, instance: Instance, header: Header) -> None:
        """Called by the association threads after the object is safe and before it is acknowledged; never blocks."""
        self._queue.put((kept, instance, header))

    def recover(self) -> None:
        """Make tables and spool agree after a crash; before reception starts.

        A file without a row is indexed as if it came now. A row without a file is reported: somebody removed it.
        """
        with self._database.connect() as connection:
            known = set(connection.execute(sa.select(instances.c.path)).scalars())
            still_open = connection.execute(sa.select(series).where(series.c.state == SeriesState.OPEN)).all()
            for row in still_open:
                self._open[row.series_uid] = self._recall(connection, row.series_uid, row.study_uid, row.generation)
        found = {str(path.relative_to(self._spool.root)): path for path in self._spool.paths()}
        for lost in sorted(known - found.keys()):
            log.error("the spool has no file %s although it was received; restore it from a backup or the sender", lost)
        new = sorted(found.keys() - known)
        for name in new:
            try:
                instance = read_instance(found[name])
            except SpoolError as error:
                log.error("not indexed: %s", error)
                continue
            header = self._header(instance.path)
            if header is not None:
                self._queue.put((Kept.NEW, instance, header))
        if new:
            log.info("%d received files had no row; they are indexed now", len(new))
        while not self._queue.empty():
            self._index_all(self._drain())

    def start(self) -> None:
        """Begin to index and to close series."""
        self._thread = threading.Thread(target=self._run, name="intake", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Index what is queued, then end."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        batch: list[_Stored] = []
        while True:
            try:
                batch = batch or self._drain()
                if batch:
                    self._index_all(batch)
                    batch = []
                elif self._stopping.is_set():
                    return
                if self._queue.empty():
                    # Else a series may only look silent, because the rest of it waits here for its rows.
                    self._close_complete()
            except (sa.exc.SQLAlchemyError, OSError) as error:
                # Full or locked database: reception goes on into the spool, and the rows follow later.
                log.error("cannot index now, will try again: %s", error)
                if self._stopping.wait(_DATABASE_PAUSE_S):
                    return

    def _drain(self) -> list[_Stored]:
        batch = []
        try:
            batch.append(self._queue.get(timeout=_LOOK_EVERY_S))
            self._stopping.wait(_GATHER_S)
            while len(batch) < _BATCH:
                batch.append(self._queue.get_nowait())
        except queue.Empty:
            pass
        return batch

    def _header(self, path: Path) -> Header | None:
        """Values of a file in the spool; None, and said, if it was damaged after it was received.

        Raises
        ------
        OSError
            If the machine has run out of something, so that it can be read later.
        """
        try:
            ds = dcmread(path, stop_before_pixels=True)
            if ds.SOPInstanceUID != path.stem:  # the parser reads on through much that is damaged
                raise SpoolError(f"{path} holds another object")
            return header_values(ds, self.keywords)
        except Exception as error:  # whatever the parser stumbles over: the rest of the series goes on
            if isinstance(error, OSError) and ground_gave_way(error):
                raise
            log.error("%s cannot be read any more (%s): put it back or delete it", path, type(error).__name__)
            return None

    # ── index ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _index_all(self, batch: Sequence[_Stored]) -> None:
        """Index a batch; an object over which the node stumbles is set aside, and the others go on."""
        try:
            self._index(batch)
        except _LATER:
            raise
        except Exception as error:  # a fault of ours, which would come back at every start and stop all series
            if len(batch) > 1:
                for one in batch:
                    self._index_all([one])
            else:
                self._set_aside(batch[0][1], fault(error))

    def _set_aside(self, instance: Instance, why: str) -> None:
        """Open the series of an object that has no row, so that closing it says that something is missing."""
        uid = instance.sop_instance_uid
        log.error("%s not indexed: %s; its file is kept, and tried again when the node starts", uid, why)
        with self._database.begin() as connection:
            generation, _ = self._open_row(connection, instance)
            self._grow(connection, instance, generation)
        opened = self._open.get(instance.series_uid)
        if opened is None:
            opened = self._open[instance.series_uid] = OpenSeries(instance.series_uid, instance.study_uid, generation)
        opened.fault = f"a fault of the node: {uid} not indexed: {why}"
        opened.last_activity_s = time.monotonic()

    def _index(self, batch: Sequence[_Stored]) -> None:
        # The same bytes too: sent again, a series is judged again, by the routes as they are now.
        taken: dict[str, list[Instance]] = {}
        for kept, instance, _ in batch:
            if kept in (Kept.NEW, Kept.SAME):
                taken.setdefault(instance.series_uid, []).append(instance)
        headers: list[tuple[str, str, Header]] = []
        with self._database.begin() as connection:
            grown = {series_uid: self._insert(connection, arrived) for series_uid, arrived in taken.items()}
            for kept, instance, header in batch:
                if kept in (Kept.NEW, Kept.SAME):
                    opened = grown[instance.series_uid]
                    matches = self._router.match(header, instance.calling_ae, instance.called_ae)
                    opened.may_be_denoised |= any(match.action == "pipeline" for match in matches)
                    self._planning.forward_original(connection, instance, matches, opened.generation)
                    headers.append((instance.series_uid, instance.sop_instance_uid, header))
                elif kept is Kept.CONFLICT:
                    self._flag_conflict(connection, instance)
        # Only now, after the commit: a batch that failed is tried again from the start.
        self._open.update(grown)
        for series_uid, sop_instance_uid, header in headers:
            self._open[series_uid].headers[sop_instance_uid] = header
            self._open[series_uid].judged = self._open[series_uid].proven = None
        for _, instance, _ in batch:
            if instance.series_uid in self._open:
                self._open[instance.series_uid].last_activity_s = time.monotonic()

    def _insert(self, connection: sa.Connection, arrived: Sequence[Instance]) -> OpenSeries:
        """Rows of instances of one series; opens the series, or opens it again."""
        first, last = arrived[0], arrived[-1]
        generation, known = self._open_row(connection, first)
        connection.execute(
            _INSTANCE,
            [
                {column: getattr(instance, column) for column in _INSTANCE_COLUMNS}
                | {"path": str(instance.path.relative_to(self._spool.root))}
                for instance in arrived
            ],
        )
        self._grow(connection, last, generation)
        opened = self._open.get(first.series_uid)
        if opened is None and known:
            log.info("series %s comes again or grows (generation %d)", first.series_uid, generation)
            opened = self._recall(connection, first.series_uid, first.study_uid, generation)
        return opened or OpenSeries(first.series_uid, first.study_uid, generation)

    def _open_row(self, connection: sa.Connection, first: Instance) -> tuple[int, bool]:
        """The generation that the series now has, and whether it had a row before; it has one afterwards."""
        row = connection.execute(_SERIES, {"wanted": first.series_uid}).one_or_none()
        if row is not None:
            return row.generation + (row.state == SeriesState.CLOSED), True
        connection.execute(
            sa.insert(series).values(
                series_uid=first.series_uid,
                study_uid=first.study_uid,
                state=SeriesState.OPEN,
                generation=1,
                first_at=first.received_at,
                last_at=first.received_at,
            )
        )
        return 1, False

    def _grow(self, connection: sa.Connection, last: Instance, generation: int) -> None:
        """Count the instances of an open series of which `last` came last."""
        connection.execute(
            _GROWN,
            {
                "wanted": last.series_uid,
                "state": SeriesState.OPEN,
                "generation": generation,
                "n_conflicts": self._spool.count_conflicts(last.series_uid),
                "last_at": last.received_at,
            },
        )

    def _recall(self, connection: sa.Connection, series_uid: str, study_uid: str, generation: int) -> OpenSeries:
        """An open series with the headers of what the spool has of it.

        What somebody removed is left out. What was damaged since it came is not: the rest would look like all.
        """
        opened = OpenSeries(series_uid, study_uid, generation, last_activity_s=time.monotonic())
        rows = connection.execute(sa.select(instances).where(instances.c.series_uid == series_uid)).all()
        damaged = 0
        for row in rows:
            path = self._spool.root / row.path
            if not path.exists():
                continue
            header = self._header(path)
            if header is None:
                damaged += 1
                continue
            opened.headers[row.sop_instance_uid] = header
            matches = self._router.match(header, row.calling_ae, row.called_ae)
            opened.may_be_denoised |= any(match.action == "pipeline" for match in matches)
        if damaged:
            opened.fault = (
                f"received images that cannot be read any more: {damaged}; put their files, which the log names, back "
                "from a backup, or delete them, then send the series again"
            )
        return opened

    def _flag_conflict(self, connection: sa.Connection, instance: Instance) -> None:
        log.warning(
            "%s came again with other bytes (series %s): kept apart in %s",
            instance.sop_instance_uid,
            instance.series_uid,
            instance.path,
        )
        connection.execute(
            sa.update(series)
            .where(series.c.series_uid == instance.series_uid)
            .values(n_conflicts=self._spool.count_conflicts(instance.series_uid))
        )
        concerned = connection.execute(
            sa.select(jobs.c.id, jobs.c.state).where(
                jobs.c.series_uid == instance.series_uid, jobs.c.superseded_by.is_(None)
            )
        ).all()
        for job in concerned:
            what = f"{instance.sop_instance_uid} came with other bytes; not used, kept in {instance.path.parent}"
            job_table.add_event(connection, job.id, JobState(job.state), what)

    # ── close ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _close_complete(self) -> None:
        for opened in list(self._open.values()):
            try:
                self._close_if_complete(opened)
            except _LATER:
                raise
            except Exception as error:  # a fault of ours: this series is not judged, all others are
                opened.fault = opened.fault or f"a fault of the node: {fault(error)}"
                self._give_up(opened)

    def _close_if_complete(self, opened: OpenSeries) -> None:
        assembly = self._config.assembly
        silent_s = time.monotonic() - opened.last_activity_s
        if silent_s < min(assembly.quiet_s, PROVEN_QUIET_S):
            return
        if opened.fault:
            if silent_s >= assembly.quiet_without_evidence_s:
                self._give_up(opened)
            return
        if opened.proven is None:
            opened.proven = proven(list(opened.headers.values()))
        if silent_s < assembly.quiet_s and not opened.proven:
            return
        if opened.judged is None:
            opened.judged = evidence(list(opened.headers.values()))
        judged = opened.judged
        needed_s = quiet_needed_s(
            judged,
            proven=opened.proven,
            may_be_denoised=opened.may_be_denoised,
            association_open=self._open_associations(opened.series_uid) > 0,
            quiet_s=assembly.quiet_s,
            without_evidence_s=assembly.quiet_without_evidence_s,
        )
        if silent_s >= needed_s:
            with self._database.begin() as connection:
                self._planning.close(connection, opened, judged)
            del self._open[opened.series_uid]
            log.info("series %s closed: %s", opened.series_uid, judged.reason)

    def _give_up(self, opened: OpenSeries) -> None:
        """Close a series that cannot be judged, with a failed job that says why."""
        with self._database.begin() as connection:
            self._planning.give_up(connection, opened)
        del self._open[opened.series_uid]
        log.error("series %s closed without being judged: %s", opened.series_uid, opened.fault)
