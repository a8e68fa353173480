"""Ids of requests may be as long as the contract says; PostgreSQL refuses longer ones than its column."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """200 characters become 256."""
    with op.batch_alter_table("requests") as table:
        table.alter_column("request_id", existing_type=sa.String(200), existing_nullable=False, type_=sa.String(256))
