"""A number and some bytes."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table("things", sa.Column("n", sa.Integer, primary_key=True), sa.Column("data", sa.LargeBinary))
