"""A batch knows its student, which says on which queue it goes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Batches from before go on the queue of all students, where they were."""
    op.add_column("batches", sa.Column("student", sa.String(256), nullable=False, server_default=""))
    op.drop_index("batches_by_state", "batches")
    op.create_index("batches_by_state", "batches", ["state", "turn", "student"])
