"""How different the self-edits were that a policy was offered, and how far it went from the base."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Of policies from before, it was not measured."""
    op.add_column("policies", sa.Column("diversity", sa.Float(), nullable=True))
    op.add_column("policies", sa.Column("kl", sa.Float(), nullable=True))
