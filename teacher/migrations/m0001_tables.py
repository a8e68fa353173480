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
        "active_policy",
        sa.Column("only", sa.Integer(), nullable=False),
        sa.Column("policy_id", sa.String(length=80), nullable=False),
        sa.PrimaryKeyConstraint("only"),
        if_not_exists=True,
    )
    op.create_table(
        "policies",
        sa.Column("number", INT64, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(length=80), nullable=False),
        sa.Column("parent_id", sa.String(length=80), nullable=False),
        sa.Column("base_source", sa.Text(), nullable=False),
        sa.Column("base_commit", sa.String(length=80), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("adapter_uri", sa.Text(), nullable=False),
        sa.Column("adapter_sha256", sa.String(length=64), nullable=False),
        sa.Column("kept", sa.Integer(), nullable=False),
        sa.Column("offered", sa.Integer(), nullable=False),
        sa.Column("first_loss", sa.Float(), nullable=False),
        sa.Column("final_loss", sa.Float(), nullable=False),
        sa.Column("steps", sa.Integer(), nullable=False),
        sa.Column("steps_planned", sa.Integer(), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("failure_reason", sa.String(length=64), nullable=False),
        sa.Column("failure_message", sa.Text(), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.Column("request", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("number"),
        sa.UniqueConstraint("id"),
        if_not_exists=True,
    )
    op.create_table(
        "policy_groups",
        sa.Column("policy_id", sa.String(length=80), nullable=False),
        sa.Column("groups", sa.Integer(), nullable=False),
        sa.Column("groups_dropped", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("policy_id"),
        if_not_exists=True,
    )
    op.create_table(
        "requests",
        sa.Column("request_id", sa.String(length=200), nullable=False),
        sa.Column("body_sha256", sa.String(length=64), nullable=False),
        sa.Column("policy_id", sa.String(length=80), nullable=False),
        sa.PrimaryKeyConstraint("request_id"),
        if_not_exists=True,
    )
    op.create_table(
        "update_owners",
        sa.Column("policy_id", sa.String(length=80), nullable=False),
        sa.Column("owner", sa.String(length=256), nullable=False),
        sa.PrimaryKeyConstraint("policy_id", "owner"),
        if_not_exists=True,
    )
    op.create_table(
        "written_groups",
        sa.Column("key", sa.String(length=80), nullable=False),
        sa.Column("group", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("key"),
        if_not_exists=True,
    )
