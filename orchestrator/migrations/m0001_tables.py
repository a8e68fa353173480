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
        "canary",
        sa.Column("run_id", sa.String(length=96), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("policy_id", sa.String(length=128), nullable=False),
        sa.Column("mean", sa.Float(), nullable=True),
        sa.Column("stderr", sa.Float(), nullable=True),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("best_round", sa.Integer(), nullable=False),
        sa.Column("difference", sa.Float(), nullable=True),
        sa.Column("difference_stderr", sa.Float(), nullable=True),
        sa.Column("stopped", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "round"),
        if_not_exists=True,
    )
    op.create_table(
        "evaluator_clocks",
        sa.Column("run_id", sa.String(length=96), nullable=False),
        sa.Column("seconds_ahead", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("run_id"),
        if_not_exists=True,
    )
    op.create_table(
        "measurements",
        sa.Column("run_id", sa.String(length=96), nullable=False),
        sa.Column("stage", sa.String(length=16), nullable=False),
        sa.Column("arm", sa.String(length=64), nullable=False),
        sa.Column("task", sa.Integer(), nullable=False),
        sa.Column("sample_index", sa.Integer(), nullable=False),
        sa.Column("look", sa.LargeBinary(), nullable=True),
        sa.Column("fresh", sa.LargeBinary(), nullable=True),
        sa.Column("stopped", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "stage", "arm", "task", "sample_index"),
        if_not_exists=True,
    )
    op.create_table(
        "openings",
        sa.Column("run_id", sa.String(length=96), nullable=False),
        sa.Column("task_id", sa.String(length=64), nullable=False),
        sa.Column("owners", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "task_id"),
        if_not_exists=True,
    )
    op.create_table(
        "requests",
        sa.Column("request_id", sa.String(length=256), nullable=False),
        sa.Column("body_sha256", sa.String(length=64), nullable=False),
        sa.Column("run_id", sa.String(length=96), nullable=False),
        sa.PrimaryKeyConstraint("request_id"),
        if_not_exists=True,
    )
    op.create_table(
        "round_groups",
        sa.Column("run_id", sa.String(length=96), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("groups", sa.Integer(), nullable=False),
        sa.Column("dropped", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "round"),
        if_not_exists=True,
    )
    op.create_table(
        "rounds",
        sa.Column("run_id", sa.String(length=96), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("policy_id", sa.String(length=128), nullable=False),
        sa.Column("kept", sa.Integer(), nullable=False),
        sa.Column("offered", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "round"),
        if_not_exists=True,
    )
    op.create_table(
        "runs",
        sa.Column("id", sa.String(length=96), nullable=False),
        sa.Column("number", INT64, nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("state", sa.Integer(), nullable=False),
        sa.Column("request", sa.LargeBinary(), nullable=False),
        sa.Column("student", sa.LargeBinary(), nullable=False),
        sa.Column("config_sha256", sa.String(length=64), nullable=False),
        sa.Column("failure", sa.LargeBinary(), nullable=True),
        sa.Column("resumes", sa.Integer(), nullable=False),
        sa.Column("base_policy", sa.String(length=128), nullable=False),
        sa.Column("first_reward_seconds", sa.Float(), nullable=True),
        sa.Column("peak_memory_bytes", INT64, nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.Column("finished", sa.Float(), nullable=True),
        sa.Column("summary_json", sa.Text(), nullable=False),
        sa.Column("report_html", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        if_not_exists=True,
    )
    op.create_index("ix_runs_number", "runs", ["number"], unique=True, if_not_exists=True)
    op.create_index("ix_runs_state", "runs", ["state"], unique=False, if_not_exists=True)
    op.create_table(
        "seconds",
        sa.Column("run_id", sa.String(length=96), nullable=False),
        sa.Column("stage", sa.String(length=16), nullable=False),
        sa.Column("phase", sa.String(length=16), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "stage", "phase"),
        if_not_exists=True,
    )
    op.create_table(
        "self_edits",
        sa.Column("run_id", sa.String(length=96), nullable=False),
        sa.Column("stage", sa.String(length=16), nullable=False),
        sa.Column("arm", sa.String(length=64), nullable=False),
        sa.Column("task", sa.Integer(), nullable=False),
        sa.Column("sample_index", sa.Integer(), nullable=False),
        sa.Column("task_id", sa.String(length=64), nullable=False),
        sa.Column("policy_id", sa.String(length=128), nullable=False),
        sa.Column("completion", sa.Text(), nullable=False),
        sa.Column("malformed", sa.Text(), nullable=False),
        sa.Column("self_edit", sa.LargeBinary(), nullable=True),
        sa.Column("evaluation_id", sa.String(length=64), nullable=False),
        sa.Column("evaluation", sa.LargeBinary(), nullable=True),
        sa.Column("cached", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "stage", "arm", "task", "sample_index"),
        if_not_exists=True,
    )
    op.create_index("ix_self_edits_evaluation_id", "self_edits", ["evaluation_id"], unique=False, if_not_exists=True)
    op.create_table(
        "written_questions",
        sa.Column("run_id", sa.String(length=96), nullable=False),
        sa.Column("task", sa.Integer(), nullable=False),
        sa.Column("task_id", sa.String(length=64), nullable=False),
        sa.Column("questions", sa.LargeBinary(), nullable=False),
        sa.Column("dropped", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "task"),
        if_not_exists=True,
    )
