"""What the evaluator tells of its work, with the clock and the queue in hand."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import text

from preceptor.metrics import EVALUATOR, PrometheusMetrics
from preceptor.telemetry import Telemetry
from preceptor.tracing import OtlpTraces, evaluation_place
from preceptor.v1 import evaluator_pb2 as pb
from tests.evaluator_house import SUCCEEDED, House
from tests.fake_broker import FakeBroker


class SeenHouse(House):
    """One that somebody looks at."""

    def __init__(self, url: str) -> None:
        self.metrics = PrometheusMetrics(EVALUATOR, "127.0.0.1", 0)
        self.spans = InMemorySpanExporter()
        self.traces = OtlpTraces(EVALUATOR, "http://127.0.0.1:9", self.metrics, self.spans)
        super().__init__(url, FakeBroker(), telemetry=Telemetry(self.metrics, self.traces), dedicated=("own",))

    def told(self) -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics.port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    def leave(self) -> None:
        self.close()
        self.traces.close()
        self.metrics.close()


@pytest.fixture
def house(database_url: str) -> Iterator[SeenHouse]:
    made = SeenHouse(database_url)
    yield made
    made.leave()


def test_each_queue_has_a_series_from_the_start_and_counts_all_its_batches_that_are_not_final(
    house: SeenHouse,
) -> None:
    told = house.told()
    assert told['preceptor_unfinished_batches{queue="trials"}'] == 0
    assert told['preceptor_unfinished_batches{queue="trials.own"}'] == 0
    house.create("Ada lives in Lisbon.")
    assert house.told()['preceptor_batches{state="waiting"}'] == 2
    house.step()
    house.broker.take()
    house.step(1)
    told = house.told()
    assert told['preceptor_unfinished_batches{queue="trials"}'] == 2
    assert told['preceptor_batches{state="running"}'] == 2
    house.broker.finish()
    house.step()
    assert house.told()['preceptor_unfinished_batches{queue="trials"}'] == 0


def test_evaluations_trials_and_rewards_are_counted_once_each(house: SeenHouse) -> None:
    for _ in range(2):  # the second is a repetition
        house.create("Ada lives in Lisbon.", "fail:TRIAL_DIVERGED", request_id="r")
    house.step()
    house.broker.work()
    house.step()
    told = house.told()
    assert told['preceptor_evaluations_asked_total{known="no"}'] == 2
    assert told['preceptor_evaluations_finished_total{state="succeeded"}'] == 1
    assert told['preceptor_evaluations_finished_total{state="failed"}'] == 1
    assert told['preceptor_evaluation_failures_total{reason="TRIAL_DIVERGED"}'] == 1
    assert told['preceptor_trials_total{outcome="TRIAL_DIVERGED"}'] == 1
    assert told['preceptor_trials_total{outcome="done"}'] == 2  # and the baseline
    assert told['preceptor_attempts_total{end="results"}'] == 2
    assert told['preceptor_reward_count{kind="reward"}'] == 1
    assert told["preceptor_dead_letters"] == 1
    assert told["preceptor_grading_seconds_count"] == 2


def test_a_lost_worker_is_counted_and_told_in_the_trace_of_each_who_waited(house: SeenHouse) -> None:
    made = house.create("Ada lives in Lisbon.", "Tom is a smith.")
    house.step()
    assert sorted(house.broker.asked_for[house.broker.submitted[0]]) == sorted(one.id for one in made)
    house.broker.take()
    house.step(1)
    house.broker.die()
    house.pass_time(6)
    assert house.told()['preceptor_attempts_total{end="lost"}'] == 2
    house.broker.work()
    house.step()
    assert house.states(made) == [SUCCEEDED] * 2
    house.traces.close()
    for one in made:
        place = evaluation_place(one.id)
        trace = [span for span in house.spans.get_finished_spans() if f"{span.context.trace_id:032x}" == place.trace_id]
        (whole,) = (span for span in trace if span.parent is None)
        assert f"{whole.context.span_id:016x}" == place.span_id
        lost = [span for span in trace if span.name == "attempt lost"]
        assert len(lost) == 2  # of its batch and of the baseline's
        assert {span.attributes["preceptor.attempt"] for span in lost if span.attributes} == {1}
        assert sum(span.name == "waiting in SQL" for span in trace) == 2


def test_work_goes_on_where_it_cannot_be_told_for_whom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    house = SeenHouse(f"sqlite:///{tmp_path}/evaluator.db")

    def broken(*_: object) -> None:
        with house.database.read() as tx:
            tx.execute(text("SELECT nothing FROM nowhere"))

    monkeypatch.setattr("evaluator.sight._evaluations_of", broken)
    made = house.create("Ada lives in Lisbon.")
    house.step()
    house.broker.work()
    house.step()
    assert house.states(made) == [SUCCEEDED]
    house.leave()


def test_cancelling_succeeds_where_its_end_cannot_be_told(house: SeenHouse) -> None:
    made = house.create("Ada lives in Lisbon.")
    get = house.evaluations._store.get
    # somebody asks for the same again before the end is told
    house.evaluations._store.get = lambda ids: [pb.Evaluation(id=one, state=pb.EVALUATION_STATE_QUEUED) for one in ids]  # type: ignore[method-assign]
    assert house.cancel() == 1
    house.evaluations._store.get = get  # type: ignore[method-assign]
    assert house.states(made) == [pb.EVALUATION_STATE_CANCELLED]
    assert house.told()['preceptor_evaluations_finished_total{state="cancelled"}'] == 1

    def away(_: object) -> list[pb.Evaluation]:
        raise OSError("the disk is gone")

    house.create("Tom is a smith.", request_id="r2")
    house.evaluations._store.get = away  # type: ignore[method-assign, assignment]
    assert house.cancel(request_id="c2") == 1
    assert house.told()['preceptor_evaluations_finished_total{state="cancelled"}'] == 2
    house.evaluations._store.get = get  # type: ignore[method-assign]
    (third,) = house.create("Eva is a baker.", request_id="r3")
    assert house.cancel(request_id="c3") == 1
    house.traces.close()
    whole = evaluation_place(third.id).span_id
    ends = [span for span in house.spans.get_finished_spans() if f"{span.context.span_id:016x}" == whole]
    assert [span.status.description for span in ends] == ["CANCELLED"]
