"""All tables, as they were before there were migrations: what such a database has stays, what it lacks is made."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from preceptor.database import INT64

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Makes them."""
    op.create_table(
        "requests",
        sa.Column("request_id", sa.String(length=128), nullable=False),
        sa.Column("body_sha256", sa.String(length=64), nullable=False),
        sa.Column("answer", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("request_id"),
        if_not_exists=True,
    )
    op.create_table(
        "students",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("architecture", sa.String(), nullable=False),
        sa.Column("parameters", INT64, nullable=False),
        sa.Column("context_tokens", sa.Integer(), nullable=False),
        sa.Column("current_version", sa.Integer(), nullable=False),
        sa.Column("create_time", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name"),
        if_not_exists=True,
    )
    op.create_table(
        "active_student",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(
            ["name"],
            ["students.name"],
        ),
        sa.PrimaryKeyConstraint("id"),
        if_not_exists=True,
    )
    op.create_table(
        "student_versions",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("source", sa.String(), nullable=False),
        sa.Column("commit", sa.String(), nullable=False),
        sa.Column("evaluation_id", sa.String(), nullable=False),
        sa.Column("create_time", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["name"],
            ["students.name"],
        ),
        sa.PrimaryKeyConstraint("name", "version"),
        if_not_exists=True,
    )
