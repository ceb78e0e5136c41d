"""Alembic's entry: runs the migrations on the connection that db.migrate() hands over."""

from alembic import context

from dicomnode.db import OURS, metadata


def _ours(_object: object, name: str | None, kind: str, *_: object) -> bool:
    # The engine keeps its tables in the same file; they are not ours to compare or drop.
    return kind != "table" or name in OURS


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    include_object=_ours,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
