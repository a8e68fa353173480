"""What is too costly to train, arms that were left out, diversity and divergence of a round's policy."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Takes the step."""
    op.create_table(
        "arms_left_out",
        sa.Column("run_id", sa.String(length=96), nullable=False),
        sa.Column("arm", sa.String(length=64), nullable=False),
        sa.Column("reason", sa.String(length=64), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "arm"),
    )
    op.add_column("round_groups", sa.Column("diversity", sa.Float(), nullable=True))
    op.add_column("round_groups", sa.Column("kl", sa.Float(), nullable=True))
    op.add_column("self_edits", sa.Column("too_costly", sa.Text(), server_default="", nullable=False))
