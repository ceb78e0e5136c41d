"""Requests for storage commitment"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "commitments",
        sa.Column("transaction_uid", sa.String(length=64), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("destination", sa.String(length=64), nullable=False),
        sa.Column("status", sa.Integer(), nullable=True, comment="of the N-ACTION response; none came if empty"),
        sa.Column("asked_at", sa.DateTime(), nullable=False),
        sa.Column("reported_at", sa.DateTime(), nullable=True),
        sa.ForeignKeyConstraint(["job_id", "destination"], ["deliveries.job_id", "deliveries.destination"]),
        sa.PrimaryKeyConstraint("transaction_uid"),
    )
    with op.batch_alter_table("commitments", schema=None) as batch_op:
        batch_op.create_index("ix_commitments_delivery", ["job_id", "destination"], unique=False)


def downgrade() -> None:
    op.drop_table("commitments")
