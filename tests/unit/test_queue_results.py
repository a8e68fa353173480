"""Results as they come back from the queue: read quickly where they can be, and always as ParseDict reads them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict

from preceptor.queue import fetch_results, make_app, to_payload
from preceptor.v1 import trial_pb2 as trial


class Stored:
    """A result backend that has one value."""

    def __init__(self, result: Any) -> None:
        self.value = json.dumps({"status": "SUCCESS", "result": result})

    def mget(self, keys: list[str]) -> list[str]:
        return [self.value for _ in keys]


def fetched(result: Any, monkeypatch: pytest.MonkeyPatch) -> trial.TrialBatchResult:
    app = make_app("redis://127.0.0.1:1/0")
    monkeypatch.setattr(app.backend, "mget", Stored(result).mget)
    return fetch_results(app, ["batch-1.1"])["batch-1.1"]


def measured() -> dict[str, Any]:
    result = trial.TrialBatchResult(batch_id="batch-1", worker="host:1", peak_memory_bytes=2**40)
    for number in range(2):
        one = result.results.add(trial_id=f"trial-{number}", steps=3, trained_tokens=2**40)
        one.answers.add(text="Zürich", gold_logprob=-0.5, gold_tokens=2, certainty=1.5, samples=["a", "b"])
        one.probe_answers.add(text="", gold_logprob=-1.0)
    result.results.add(trial_id="trial-2").failure.reason = "TRIAL_DIVERGED"
    return to_payload(result)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("text", "another"),
        ("gold_logprob", "NaN"),
        ("gold_logprob", "-Infinity"),
        ("gold_tokens", "7"),
        ("goldTokens", 7),
        ("from_a_later_version", {"nested": [1]}),
        ("samples", None),
    ],
)
def test_a_result_is_read_as_json_says_it(name: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    payload = measured()
    answer = payload["results"][1]["answers"][0]
    answer.pop("gold_tokens") if name == "goldTokens" else None
    answer[name] = value
    expected = ParseDict(payload, trial.TrialBatchResult(), ignore_unknown_fields=True)
    found = fetched(payload, monkeypatch)
    assert found.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)
    assert math.isnan(found.results[1].answers[0].gold_logprob) == (value == "NaN")
    assert found.results[0].trained_tokens == 2**40


@pytest.mark.parametrize("answers", [[{"text": 5}], [{"gold_tokens": 1.5}], 5])
def test_answers_that_are_none_are_a_failure(answers: object, monkeypatch: pytest.MonkeyPatch) -> None:
    payload = measured()
    payload["results"][0]["answers"] = answers
    found = fetched(payload, monkeypatch)
    assert found.failure.reason == "TRIAL_FAILED"
    assert not found.results
