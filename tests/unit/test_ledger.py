"""The ledger: what stays, what is replaced, what is asked for again; and that an older database is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from orchestrator.entries import EditKey, Entry, Kind, round_stage
from orchestrator.evaluator_client import Reported
from orchestrator.ledger import FinishedRound, Ledger
from orchestrator.progress import Progress
from preceptor.database import open_database
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import orchestrator_pb2 as pb
from preceptor.v1 import teacher_pb2 as teacher
from preceptor.v1 import types_pb2 as types
from tests.old_homes import old_home

QUEUED, SUCCEEDED, FAILED = (
    evaluator.EVALUATION_STATE_QUEUED,
    evaluator.EVALUATION_STATE_SUCCEEDED,
    evaluator.EVALUATION_STATE_FAILED,
)


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    opened = open_database(database_url, "orchestrator.migrations")
    yield opened
    opened.dispose()


def key(task: int = 0, index: int = 0, number: int = 1) -> EditKey:
    return EditKey(round_stage(number), "", task, index)


def entry(*place: int) -> Entry:
    return Entry(key(*place), "task", "base", "text", self_edit=types.SelfEdit(documents=["x"]))


def report(state: int, value: float = 0.0, kind: Kind = Kind.FULL, at: EditKey | None = None) -> Reported:
    evaluation = evaluator.Evaluation(id=f"{kind}-{value}", state=evaluator.EvaluationState.Name(state))
    if state == SUCCEEDED:
        evaluation.reward.value = value
    return Reported((at or key(),), evaluation, kind)


def test_what_is_final_stays_until_something_final_replaces_it(engine: Engine) -> None:
    ledger = Ledger(engine, "run", 0.0)
    ledger.write([entry()])
    seen = []
    for state, value in ((QUEUED, 0), (SUCCEEDED, 0.5), (QUEUED, 0), (SUCCEEDED, 0.4), (FAILED, 0)):
        ledger.record(report(state, value))
        (line,) = ledger.entries()
        seen.append((line.state, line.reward.value if line.reward else None))
    assert seen == [(QUEUED, None), (SUCCEEDED, 0.5), (SUCCEEDED, 0.5), (SUCCEEDED, 0.4), (FAILED, None)]


def test_reports_that_come_together_do_what_they_do_one_after_another(engine: Engine) -> None:
    reports = [
        report(QUEUED),
        report(SUCCEEDED, 2.5, Kind.LOOK),
        report(SUCCEEDED, 0.5),
        report(QUEUED, 0.1),
        report(FAILED, kind=Kind.FRESH, at=key(0, 1)),
        Reported((key(0, 1), key(0, 2)), report(SUCCEEDED, 0.75).evaluation),
    ]
    told: list[list[Entry]] = []
    together = Ledger(engine, "together", 0.0, lambda entries: told.append(list(entries)))
    apart = Ledger(engine, "apart", 0.0)
    for ledger in (together, apart):
        ledger.write([entry(), entry(0, 1), entry(0, 2)])
    together.record(*reports)
    for one in reports:
        apart.record(one)
    assert together.entries() == apart.entries()
    assert told[1:] == [together.entries()], "each line once, as it stands at the end"
    assert [line.reward.value if line.reward else None for line in together.entries()] == [0.5, 0.75, 0.75]


def test_more_lines_in_a_report_than_are_asked_for_at_once(engine: Engine) -> None:
    ledger = Ledger(engine, "run", 0.0)
    keys = [key(0, index) for index in range(2_500)]
    ledger.write([entry(0, index) for index in range(len(keys))])
    ledger.record(Reported(tuple(keys), report(SUCCEEDED, 0.5).evaluation))
    assert all(line.reward is not None for line in ledger.entries())


def test_looks_and_fresh_rewards_are_kept_beside_the_evaluation(engine: Engine) -> None:
    ledger = Ledger(engine, "run", 0.0)
    ledger.write([entry(), entry(0, 1), entry(0, 2)])
    ledger.record(report(SUCCEEDED, 2.5, Kind.LOOK))
    ledger.record(report(SUCCEEDED, 0.5))
    ledger.record(report(QUEUED, kind=Kind.FRESH))
    (first, *_) = ledger.entries()
    assert first.earned is None  # the fresh one is to be waited for
    ledger.record(report(SUCCEEDED, 0.25, Kind.FRESH))
    ledger.record(report(SUCCEEDED, 1.5, Kind.LOOK, key(0, 1)))
    ledger.stop([key(0, 1)])
    first, second, third = ledger.entries()
    assert first.look is not None
    assert first.reward is not None
    assert first.earned is not None
    assert (first.look.reward.value, first.reward.value, first.earned.value) == (2.5, 0.5, 0.25)
    assert (second.stopped, second.settled, second.reward, second.failed) == (True, True, None, False)
    assert (third.stopped, third.settled, third.look) == (False, False, None)
    assert ledger.page(1, 1, 2) == [second, third]


def test_what_failed_is_asked_again_with_its_group_outside_the_stages_that_are_done(engine: Engine) -> None:
    ledger = Ledger(engine, "run", 0.0)
    places = [(0, 0), (0, 1), (1, 0), (0, 0, 2), (0, 1, 2)]
    ledger.write([entry(*place) for place in places])
    for place in places:
        ledger.record(report(SUCCEEDED, 1.0, Kind.LOOK, key(*place)))
        ledger.record(report(SUCCEEDED, 0.5, at=key(*place)))
    ledger.record(report(FAILED, kind=Kind.FRESH, at=key(0, 1)))
    ledger.stop([key(0, 0)])
    ledger.record(report(FAILED, at=key(0, 1, 2)))
    ledger.ask_again([round_stage(2)])
    known = {line.key: line for line in ledger.entries()}
    for place in ((0, 0), (0, 1)):
        line = known[key(*place)]
        assert (line.look, line.evaluation, line.fresh, line.stopped) == (None, None, None, False)
    assert known[key(1, 0)].reward is not None
    assert known[key(0, 1, 2)].failed


def test_a_round_says_how_many_groups_taught_nothing_and_one_of_before_does_not(engine: Engine) -> None:
    ledger = Ledger(engine, "run", 0.0)
    ledger.finish_round(1, teacher.Policy(id="a", kept=3, offered=8, groups=4, groups_dropped=1))
    ledger.finish_round(2, teacher.Policy(id="b", kept=2, offered=8))
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM round_groups WHERE round = 2"))
    assert ledger.finished_rounds() == {1: FinishedRound("a", 3, 8, 4, 1), 2: FinishedRound("b", 2, 8, None, None)}


def test_of_openings_the_most_is_kept(engine: Engine) -> None:
    ledger = Ledger(engine, "run", 0.0)
    ledger.opened([evaluator.SealedOpening(task_id="a", owners=2), evaluator.SealedOpening(task_id="b", owners=1)])
    ledger.opened([evaluator.SealedOpening(task_id="a", owners=1)])
    Ledger(engine, "other", 0.0).opened([evaluator.SealedOpening(task_id="a", owners=5)])
    assert ledger.openings() == {"a": 2, "b": 1}


def test_a_database_of_before_races_is_read_and_continued(tmp_path: Path) -> None:
    url = old_home(tmp_path, "orchestrator", without=("measurements", "round_groups", "openings"))
    engine = open_database(url, "orchestrator.migrations")
    ledger = Ledger(engine, "run", 0.0)
    (line,) = ledger.entries()
    assert line.earned is not None
    assert line.earned.value == 0.5
    assert ledger.finished_rounds()[1] == FinishedRound("p-1", 1, 1)
    ledger.record(report(SUCCEEDED, 0.25, Kind.FRESH))
    assert ledger.entries()[0].fresh is not None
    engine.dispose()


def test_progress_counts_what_was_stopped_as_done_and_shows_the_fresh_reward(engine: Engine) -> None:
    progress = Progress(rounds=1, planned=4, elapsed=lambda: 1.0)
    ledger = Ledger(engine, "run", 0.0, progress.show)
    ledger.write([entry(0, index) for index in range(4)])
    for index in range(3):
        ledger.record(report(SUCCEEDED, 2.0, Kind.LOOK, key(0, index)))
    ledger.stop([key(0, 1)])
    ledger.record(report(SUCCEEDED, 0.5))
    ledger.record(report(SUCCEEDED, 0.25, Kind.FRESH))
    shown = progress.snapshot(pb.RUN_STATE_RUNNING)
    assert (shown.self_edits_stopped, shown.evaluations_done, shown.evaluations_running) == (1, 1, 1)
    assert shown.done_share == 0.5
    assert [reward.mean for reward in shown.rewards] == [0.25]


def test_every_look_at_the_progress_has_the_rewards_of_all_rounds_as_they_are_now(engine: Engine) -> None:
    progress = Progress(rounds=2, planned=4, elapsed=lambda: 1.0)
    ledger = Ledger(engine, "run", 0.0, progress.show)
    ledger.write([entry(0, index, number) for number in (1, 2) for index in range(2)])

    def shown() -> list[tuple[int, float, int]]:
        return [(one.round, one.mean, one.count) for one in progress.snapshot(pb.RUN_STATE_RUNNING).rewards]

    assert shown() == []
    ledger.record(report(SUCCEEDED, 0.5, at=key(0, 0, 1)))
    assert shown() == [(1, 0.5, 1)]
    ledger.record(report(SUCCEEDED, 1.0, at=key(0, 1, 2)))
    assert shown() == shown() == [(1, 0.5, 1), (2, 1.0, 1)]
    ledger.record(report(SUCCEEDED, 0.25, at=key(0, 1, 1)), report(FAILED, at=key(0, 1, 2)))
    assert shown() == [(1, 0.375, 2)]
