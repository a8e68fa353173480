"""What .env.example says is what the processes and the compose files read."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return runpy.run_path(str(REPOSITORY / "scripts" / "generate_env_example.py"))


def test_the_file_is_what_the_generator_makes_of_the_settings_and_the_compose_files(made: dict[str, Any]) -> None:
    text = (REPOSITORY / ".env.example").read_text(encoding="utf-8")
    assert text == made["example"](), "run: PYTHONPATH=. python scripts/generate_env_example.py"


def test_every_setting_and_every_variable_is_there_with_words(made: dict[str, Any]) -> None:
    text = (REPOSITORY / ".env.example").read_text(encoding="utf-8")
    there = set(re.findall(r"^#(\w+)=", text, re.MULTILINE))
    variables = {name for path in made["compose_files"]() for name in made["compose_variables"](path)}
    assert there == set(made["settings_names"]()) | variables
    for settings in made["process_settings"]():
        for name, field in settings.model_fields.items():
            assert field.description, f"{settings.__name__}.{name} has no description"


def test_every_class_of_settings_in_the_tree_is_counted(made: dict[str, Any]) -> None:
    counted = {one.__name__ for one in made["process_settings"]()} | {"HouseSettings", "ServiceSettings"}
    packages = ("preceptor", "teacher", "student", "evaluator", "orchestrator", "worlds")
    for path in (path for package in packages for path in (REPOSITORY / package).rglob("*.py")):
        for name, bases in re.findall(r"^class (\w+)\(([\w, ]*)\)", path.read_text(encoding="utf-8"), re.MULTILINE):
            if re.search(r"(House|Service|Security|Student|Worker)Settings\b", bases):
                assert name in counted, f"{name} in {path} is in no settings.py"


def test_nothing_in_it_is_set() -> None:
    text = (REPOSITORY / ".env.example").read_text(encoding="utf-8")
    assert all(line.startswith("#") or not line for line in text.splitlines())
