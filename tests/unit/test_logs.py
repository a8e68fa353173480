"""What third parties log on our behalf."""

from __future__ import annotations

import logging

import pytest
import redis
from kombu.asynchronous.hub import logger as hub

from preceptor.settings import HouseSettings
from preceptor.telemetry import set_up_logging


@pytest.mark.parametrize(
    ("error", "tracebacks"), [(redis.exceptions.OutOfMemoryError("no memory"), 0), (KeyError("a bug"), 1)]
)
def test_a_redis_that_refuses_a_timer_of_kombu_is_a_line_and_a_bug_has_its_traceback(
    error: Exception, tracebacks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    set_up_logging("worker", HouseSettings(log_format="text"))
    try:
        try:
            raise error
        except Exception as raised:
            hub.error("Error in timer: %r", raised, exc_info=True)
    finally:
        root.handlers[:], root.level = before
    said = capsys.readouterr().err
    assert repr(error) in said
    assert said.count("Traceback") == tracebacks
