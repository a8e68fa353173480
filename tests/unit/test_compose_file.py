"""What .env may say to the services of compose.yaml, and what it may not."""

from __future__ import annotations

import pytest
import yaml

from tests.unit.test_compose_gpu import FILES, service

OURS = [
    name
    for name, one in yaml.safe_load(FILES[0].read_text())["services"].items()
    if "PRECEPTOR_HOME" in one.get("environment", {})
]


def test_all_processes_of_ours_are_meant() -> None:
    assert set(OURS) == {"teacher", "student", "evaluator", "orchestrator", "worker", "almanac", "cli"}


@pytest.mark.parametrize("name", OURS)
def test_a_limit_in_env_is_for_who_calls_the_orchestrator_and_never_between_services(name: str) -> None:
    """.env is every process's ``env_file``; only what ``environment`` says is stronger."""
    limit = service(name, PRECEPTOR_RATE_LIMIT="20")["environment"].get("PRECEPTOR_RATE_LIMIT")
    assert limit == ("20" if name == "orchestrator" else "0")
