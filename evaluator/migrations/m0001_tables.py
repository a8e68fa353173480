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
        "attempts",
        sa.Column("batch_id", sa.String(length=64), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("trials", sa.Integer(), nullable=False),
        sa.Column("worker", sa.String(length=256), nullable=False),
        sa.Column("submitted", sa.Float(), nullable=False),
        sa.Column("begun", sa.Float(), nullable=True),
        sa.Column("ended", sa.Float(), nullable=True),
        sa.Column("steps", sa.Integer(), nullable=False),
        sa.Column("reason", sa.String(length=64), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("batch_id", "number"),
        if_not_exists=True,
    )
    op.create_index("ix_attempts_ended", "attempts", ["ended"], unique=False, if_not_exists=True)
    op.create_table(
        "batches",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("turn", INT64, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("since", sa.Integer(), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        if_not_exists=True,
    )
    op.create_index("batches_by_state", "batches", ["state", "turn"], unique=False, if_not_exists=True)
    op.create_table(
        "cancellations",
        sa.Column("seq", INT64, autoincrement=True, nullable=False),
        sa.Column("task_id", sa.String(length=96), nullable=False),
        sa.Column("trial_ids", sa.Text(), nullable=False),
        sa.Column("whole", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("seq"),
        if_not_exists=True,
    )
    op.create_table(
        "dead_batches",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        if_not_exists=True,
    )
    op.create_table(
        "dead_letters",
        sa.Column("trial_id", sa.String(length=64), nullable=False),
        sa.Column("batch_id", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("trial_id"),
        if_not_exists=True,
    )
    op.create_index("ix_dead_letters_batch_id", "dead_letters", ["batch_id"], unique=False, if_not_exists=True)
    op.create_table(
        "evaluation_trials",
        sa.Column("evaluation_id", sa.String(length=64), nullable=False),
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("trial_id", sa.String(length=64), nullable=False),
        sa.Column("seed", sa.String(length=20), nullable=False),
        sa.PrimaryKeyConstraint("evaluation_id", "position"),
        if_not_exists=True,
    )
    op.create_index(
        "ix_evaluation_trials_trial_id", "evaluation_trials", ["trial_id"], unique=False, if_not_exists=True
    )
    op.create_table(
        "evaluations",
        sa.Column("seq", INT64, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("exam_id", sa.String(length=64), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.Column("finished", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("seq"),
        sa.UniqueConstraint("id"),
        if_not_exists=True,
    )
    op.create_index("ix_evaluations_state", "evaluations", ["state"], unique=False, if_not_exists=True)
    op.create_table(
        "exams",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        if_not_exists=True,
    )
    op.create_table(
        "openings",
        sa.Column("bank_id", sa.String(length=64), nullable=False),
        sa.Column("owner", sa.String(length=256), nullable=False),
        sa.Column("first", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("bank_id", "owner"),
        if_not_exists=True,
    )
    op.create_table(
        "origins",
        sa.Column("batch_id", sa.String(length=64), nullable=False),
        sa.Column("earlier", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("batch_id", "earlier"),
        if_not_exists=True,
    )
    op.create_table(
        "owner_turns",
        sa.Column("owner", sa.String(length=256), nullable=False),
        sa.Column("turn", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("owner"),
        if_not_exists=True,
    )
    op.create_table(
        "owners",
        sa.Column("owner", sa.String(length=256), nullable=False),
        sa.Column("evaluation_id", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("owner", "evaluation_id"),
        if_not_exists=True,
    )
    op.create_index("ix_owners_evaluation_id", "owners", ["evaluation_id"], unique=False, if_not_exists=True)
    op.create_table(
        "requests",
        sa.Column("id", sa.String(length=256), nullable=False),
        sa.Column("body_sha256", sa.String(length=64), nullable=False),
        sa.Column("reply", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        if_not_exists=True,
    )
    op.create_table(
        "trials",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("batch_id", sa.String(length=64), nullable=False),
        sa.Column("result", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        if_not_exists=True,
    )
    op.create_index("ix_trials_batch_id", "trials", ["batch_id"], unique=False, if_not_exists=True)
    op.create_table(
        "verdicts",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("right", sa.Boolean(), nullable=False),
        sa.Column("again", sa.Boolean(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
        if_not_exists=True,
    )
