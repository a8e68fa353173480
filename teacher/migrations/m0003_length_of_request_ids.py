"""Requests are kept under ids of the length that the contract allows: PostgreSQL takes no longer ones than it is told."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """200 characters become 256."""
    with op.batch_alter_table("requests") as table:
        table.alter_column("request_id", existing_type=sa.String(200), existing_nullable=False, type_=sa.String(256))
