"""Writes a service's next migration script: what its models have and its scripts do not make yet.

    PYTHONPATH=. python scripts/new_migration.py evaluator "which student a batch is of"

The script is a draft: read it. SQLite cannot change a column in place (use ``op.batch_alter_table``), and old rows need
a ``server_default`` for a new column that may not be null.
"""

from __future__ import annotations

import sys
import tempfile
from importlib import import_module
from pathlib import Path

from alembic.autogenerate import produce_migrations, render_python_code
from alembic.runtime.migration import MigrationContext
from sqlalchemy import MetaData

from preceptor.database import open_database

# Where each service's tables are; a module that adds some to them is named after it.
MODELS = {
    "teacher": ("teacher.policy_store:METADATA",),
    "student": ("student.registry:Base",),
    "evaluator": ("evaluator.database:metadata",),
    "orchestrator": ("orchestrator.tables:Base", "orchestrator.label_store:Base"),
}
_SCRIPT = '''"""{words}."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "{revision:04}"
down_revision = {before}


def upgrade() -> None:
    """Takes the step."""
    {body}
'''


def tables_of(service: str) -> MetaData:
    """The tables as the service's models have them."""
    found = []
    for place in MODELS[service]:
        module, name = place.split(":")
        found.append(getattr(import_module(module), name))
    tables: MetaData = getattr(found[0], "metadata", found[0])
    return tables


def main(service: str, words: str) -> None:
    """Writes the script and says where it is."""
    folder = Path(__file__).parents[1] / service / "migrations"
    number = len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) + 1
    with tempfile.TemporaryDirectory() as home:
        engine = open_database(f"sqlite:///{home}/x.db", f"{service}.migrations")
        with engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            steps = produce_migrations(context, tables_of(service)).upgrade_ops
        engine.dispose()
    assert steps is not None
    if steps.is_empty():
        sys.exit(f"{service}: the scripts make what the models have")
    path = folder / f"m{number:04}_{'_'.join(words.lower().split())}.py"
    before = f'"{number - 1:04}"' if number > 1 else None
    body = render_python_code(steps)
    path.write_text(_SCRIPT.format(words=words.capitalize(), revision=number, before=before, body=body))
    print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
