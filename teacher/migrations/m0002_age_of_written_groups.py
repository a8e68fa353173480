"""Written groups know when they were stored, so that old ones can be forgotten."""

from __future__ import annotations

import time

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Groups from before are as old as this step."""
    op.add_column("written_groups", sa.Column("created", sa.Float(), nullable=False, server_default="0"))
    op.execute(sa.text("UPDATE written_groups SET created = :now").bindparams(now=time.time()))
    op.create_index("ix_written_groups_created", "written_groups", ["created"])
