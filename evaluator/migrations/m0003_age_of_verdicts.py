"""Verdicts know when they were given, so that old ones can be forgotten."""

from __future__ import annotations

import time

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Verdicts from before are as old as this step."""
    op.add_column("verdicts", sa.Column("created", sa.Float(), nullable=False, server_default="0"))
    op.execute(sa.text("UPDATE verdicts SET created = :now").bindparams(now=time.time()))
    op.create_index("ix_verdicts_created", "verdicts", ["created"])
