"""The evaluator process with a judge: killed and ended while the judge is away or slow, and no reward suffers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from preceptor.channel import call
from preceptor.errors import PreceptorError
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import types_pb2 as types
from tests.evaluation_requests import group
from tests.integration.test_evaluator_queue import Stack, wait_until
from tests.judge_server import JudgeServer, honest, judge_server

KEY = "key-that-nobody-may-see"


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with judge_server() as started:
        yield started


@pytest.fixture
def stack(tmp_path: Path, server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    monkeypatch.setenv("PRECEPTOR_JUDGE_URL", server.url)
    monkeypatch.setenv("PRECEPTOR_JUDGE_MODEL", "tiny")
    monkeypatch.setenv("PRECEPTOR_JUDGE_API_KEY", KEY)
    monkeypatch.setenv("PRECEPTOR_LOG_LEVEL", "DEBUG")
    made = Stack(tmp_path)
    yield made
    made.close()


def create(stack: Stack, *documents: str, grader: str = "judge") -> list[str]:
    request = group(*documents)
    request.protocol.grader = grader
    return [item.id for item in call(stack.stub.CreateEvaluations, request).evaluations]


def test_an_evaluator_that_dies_while_the_judge_is_away_grades_after_its_restart(
    stack: Stack, server: JudgeServer
) -> None:
    server.script = lambda number, body: honest(number, body) if number < 2 else (503, {})
    stack.start_worker()
    ids = create(stack, "Ada lives in Lisbon.", "Nothing.")
    wait_until(lambda: len(server.bodies) >= 6, 60)
    stack.kill(stack.evaluator)
    server.script = honest
    stack.evaluator = stack.start_evaluator()
    found = stack.results(ids)
    assert [item.reward.value for item in found] == [0.5, 0.0]
    assert set(stack.trained().values()) == {1}  # nothing was trained twice
    assert not any(KEY in log.read_text(errors="replace") for log in stack.folder.glob("process-*.log"))


def test_a_slow_judge_does_not_hold_the_end(stack: Stack, server: JudgeServer) -> None:
    server.delay = 60.0
    stack.start_worker()
    ids = create(stack, "Ada lives in Lisbon.")
    wait_until(lambda: server.bodies, 60)
    started = time.monotonic()
    stack.evaluator.terminate()
    assert stack.evaluator.wait(20) == 0
    assert time.monotonic() - started < 10
    server.delay = 0.0
    stack.evaluator = stack.start_evaluator()
    assert [item.reward.value for item in stack.results(ids)] == [0.5]


def test_answers_are_graded_by_the_judge_without_any_training(stack: Stack, server: JudgeServer) -> None:
    question = types.Question(text="Where does Ada live?", answer="Lisbon")
    request = pb.GradeAnswersRequest(grader="judge", questions=[question] * 2, answers=["Lisbon.", "Porto."])
    graded = call(stack.stub.GradeAnswers, request)
    assert list(graded.correct) == [True, False]
    assert graded.grader.startswith("judge/1+tiny+")
    server.script = lambda *_: "Who knows?"
    request.answers[0] = "It may be Lisbon."
    with pytest.raises(PreceptorError) as raised:
        call(stack.stub.GradeAnswers, request)
    assert raised.value.reason == "JUDGE_UNREADABLE"
