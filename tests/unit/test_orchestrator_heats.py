"""What is measured next of the groups of a round: courses of races, failures, fresh seeds, twins, and that only results
decide. The results are a scripted evaluator's: plumbing only."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.entries import EditKey, Entry, Kind, round_stage
from orchestrator.evaluator_client import Reported, Submission
from orchestrator.heats import Heats, next_measurement, stopped
from orchestrator.plan import RunPlan
from preceptor import racing
from preceptor.testing.scripted_evaluator import ScriptedEvaluator
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import types_pb2 as types
from tests.orchestrated import passage, run_config

RACE = {"look_steps": 3, "look_keep": 0.5, "max_seeds": 4, "budget": 3.0, "z": 1.0}


def plan(**changes: Any) -> RunPlan:
    values: dict[str, Any] = {"rounds": {"tasks": 5, "self_edits": 8}, "reward": {"race": RACE, "fresh_seeds": 2}}
    return RunPlan(
        run_id="run",
        config=run_config(**{**values, **changes}),
        student=types.PinnedStudent(name="first", source="/s", commit="c"),
        tasks=tuple(passage(f"town {i}", questions=8) for i in range(5)),
        heldout_tasks=(),
        probes=tuple(types.Question(text=f"old {i}?", answer="x") for i in range(4)),
        replay_documents=("old",),
    )


def written(of: RunPlan, number: int = 1, size: int = 8) -> list[list[Entry]]:
    """Groups whose self-edits are good to different degrees; the last of each is malformed."""
    groups = []
    for position, task in enumerate(of.tasks_of_round(number)):
        dice = random.Random(position)
        group = []
        for index in range(size):
            documents = [f"{dice.choice(('good', 'poor'))} fact {i} of {task.passage.title}, {index}" for i in range(6)]
            key = EditKey(round_stage(number), "", position, index)
            bad: dict[str, Any] = {"malformed": "bad"} if index == size - 1 else {}
            edit = None if bad else types.SelfEdit(documents=documents)
            group.append(Entry(key, task.id, "base", "text", self_edit=edit, **bad))
        groups.append(group)
    return groups


class Client:
    """A gRPC client that stays."""

    def is_active(self) -> bool:
        return True


def answers(house: ScriptedEvaluator, submission: Submission) -> list[Reported]:
    """The final evaluations of a submission."""
    context = cast(grpc.ServicerContext, Client())
    created = house.CreateEvaluations(submission.request, context).evaluations
    keys: dict[str, list[EditKey]] = {}
    for key, evaluation in zip(submission.keys, created, strict=True):
        keys.setdefault(evaluation.id, []).append(key)
    watch = evaluator.WatchEvaluationsRequest(evaluation_ids=list(keys))
    return [
        Reported(tuple(keys[answer.evaluation.id]), answer.evaluation, submission.kind)
        for answer in house.WatchEvaluations(watch, context)
    ]


class Course:
    """A round driven to its end; results come in an order that ``dice`` decides."""

    def __init__(
        self, of: RunPlan, groups: Sequence[Sequence[Entry]], house: ScriptedEvaluator | None = None, dice: int = 0
    ) -> None:
        self.heats = Heats(of, 1)
        self.house = house or ScriptedEvaluator()  # type: ignore[abstract]
        self.entries = {entry.key: entry for group in groups for entry in group}
        self.stopped: list[EditKey] = []
        self.submissions = list(self.heats.start(groups))
        shuffle, reports = random.Random(dice), [one for sent in self.submissions for one in answers(self.house, sent)]
        while reports:
            report = reports.pop(shuffle.randrange(len(reports)))
            for key in report.keys:
                name = {Kind.FULL: "evaluation"}.get(report.kind, str(report.kind))
                self.entries[key] = replace(self.entries[key], **{name: report.evaluation})
            following = self.heats.take(report)
            self.stopped += following.stopped
            self.submissions += following.submissions
            reports += [one for sent in following.submissions for one in answers(self.house, sent)]
        for key in self.stopped:
            self.entries[key] = replace(self.entries[key], stopped=True)

    def of(self, kind: Kind) -> list[Submission]:
        return [submission for submission in self.submissions if submission.kind is kind]


def asked(submissions: Sequence[Submission]) -> dict[str, bytes]:
    return {one.request.request_id: one.request.SerializeToString(deterministic=True) for one in submissions}


def test_a_race_looks_at_all_and_measures_the_better_part_and_near_ties_further() -> None:
    of = plan()
    course = Course(of, written(of))
    valid = {key for key, entry in course.entries.items() if entry.self_edit is not None}
    looks, full = course.of(Kind.LOOK), course.of(Kind.FULL)
    assert {key for one in looks for key in one.keys} == valid
    for one in looks:
        protocol = one.request.protocol
        assert (protocol.training.max_steps, protocol.answers.logprobs_only) == (3, True)
        assert list(protocol.seeds) == of.trial_seeds(1, 1)
        assert not protocol.probes
    measured = {key for one in full for key in one.keys}
    for task in range(5):
        ranked = sorted((k for k in valid if k.task == task), key=lambda k: -looked(course.entries[k]))
        assert {k for k in measured if k.task == task} == set(ranked[:4])  # half of seven, rounded up
    assert sorted(course.stopped) == sorted(valid - measured)
    most = max(len(one.request.protocol.seeds) for one in full)
    assert most > 1
    for one in full:  # more seeds are those of before and further ones
        assert list(one.request.protocol.seeds) == of.trial_seeds(1, len(one.request.protocol.seeds))
        assert not one.request.protocol.answers.logprobs_only


def looked(entry: Entry) -> float:
    assert entry.look is not None
    return entry.look.reward.value


def test_only_results_decide_what_is_asked_not_when_they_come() -> None:
    of, other = plan(), plan()
    groups = written(of)
    first = Course(of, groups)
    for dice in range(1, 6):
        again = Course(other, groups, dice=dice)
        assert asked(again.submissions) == asked(first.submissions)
        assert again.entries == {key: strip(entry, again.entries[key]) for key, entry in first.entries.items()}


def strip(entry: Entry, like: Entry) -> Entry:
    """``entry`` with the times of ``like``, which are the house's clock."""
    made: dict[str, Any] = {}
    for name in ("look", "evaluation", "fresh"):
        one, other = getattr(entry, name), getattr(like, name)
        if one is not None:
            copy = evaluator.Evaluation.FromString(one.SerializeToString())
            copy.create_time.CopyFrom(other.create_time)
            made[name] = copy
    return replace(entry, **made)


def test_whoever_starts_again_asks_the_same_whatever_the_ledger_has() -> None:
    of = plan()
    groups = written(of)
    house = ScriptedEvaluator()  # type: ignore[abstract]
    first = Course(of, groups, house)
    known = [[first.entries[entry.key] for entry in group] for group in groups]
    assert asked(Course(of, known, house).submissions) == asked(first.submissions)


def test_without_a_race_everybody_gets_the_same_seeds_at_once() -> None:
    of = plan(reward={"seeds": 3, "trials_together": 1})
    course = Course(of, written(of))
    assert [one.kind for one in course.submissions] == [Kind.FULL] * 5
    assert all(list(one.request.protocol.seeds) == of.trial_seeds(1, 3) for one in course.submissions)
    assert all(entry.reward is not None for entry in course.entries.values() if entry.self_edit is not None)
    assert not course.stopped


@pytest.mark.parametrize("race", [RACE, {**RACE, "look_steps": 0}, None])
def test_the_best_of_a_group_and_nobody_else_are_measured_on_seeds_that_nobody_had(race: dict[str, Any] | None) -> None:
    of = plan(reward={"race": race, "fresh_seeds": 2})
    course = Course(of, written(of))
    before = {seed for one in course.submissions if one.kind is not Kind.FRESH for seed in one.request.protocol.seeds}
    for one in course.of(Kind.FRESH):
        assert len(one.request.protocol.seeds) == 2
        assert not before & set(one.request.protocol.seeds)
    for task in range(5):
        group = [entry for key, entry in sorted(course.entries.items()) if key.task == task]
        rewarded = sorted((e for e in group if e.reward is not None), key=lambda e: (-e.reward.value, e.key))  # type: ignore[union-attr]
        again = [entry for entry in group if entry.fresh is not None]
        assert len(again) == 2
        top = {e.reward.value for e in rewarded[:2] if e.reward is not None}
        assert {e.reward.value for e in again if e.reward is not None} == top


def test_the_update_gets_fresh_rewards_for_the_best_and_the_others_for_comparison_only() -> None:
    of = plan()
    course = Course(of, written(of))
    request = of.update(1, "parent", list(course.entries.values()))
    offered = [entry for entry in course.entries.values() if entry.reward is not None]
    assert len(request.examples) == len(offered)
    for example, entry in zip(request.examples, offered, strict=True):
        assert example.only_compared == (entry.fresh is None)
        assert entry.earned is not None
        assert example.reward == entry.earned.value
    for task in of.tasks_of_round(1):
        group = [example for example in request.examples if example.group_id == task.id]
        mean = sum(example.reward for example in group) / len(group)
        for example in group:
            assert example.advantage == pytest.approx(example.reward - mean)
            assert example.advantage_stderr > 0


def test_what_was_stopped_at_the_look_is_never_offered() -> None:
    of = plan()
    course = Course(of, written(of))
    for entry in course.entries.values():
        entry = replace(entry, completion=f"{entry.key.task} {entry.key.index}")
        request = of.update(1, "parent", [entry])
        assert len(request.examples) == (entry.reward is not None)
        if entry.stopped:
            assert entry.reward is None
            assert not request.examples


def failing(*, look: bool) -> tuple[RunPlan, list[list[Entry]], EditKey, ScriptedEvaluator]:
    """A race whose best by the looks loses its look, or its first full evaluation."""
    of = plan(rounds={"tasks": 1, "self_edits": 8})
    groups = written(of)
    course = Course(of, groups)
    best = max((e for e in course.entries.values() if e.look is not None), key=looked)

    class Failing(ScriptedEvaluator):
        def CreateEvaluations(
            self, request: evaluator.CreateEvaluationsRequest, context: grpc.ServicerContext
        ) -> evaluator.CreateEvaluationsResponse:
            self.fails = lambda _task, edit: edit == best.self_edit and request.protocol.answers.logprobs_only == look
            return super().CreateEvaluations(request, context)

    return of, groups, best.key, Failing()  # type: ignore[abstract]


@pytest.mark.parametrize("look", [True, False])
def test_a_failure_takes_a_candidate_out_of_the_race_and_is_no_bad_score(look: bool) -> None:
    of, groups, best, house = failing(look=look)
    course = Course(of, groups, house)
    entry = course.entries[best]
    assert entry.failed
    assert entry.settled
    assert not entry.stopped
    assert entry.reward is None
    assert [one.failure.reason for one in entry.failures] == ["TRIAL_LOST"]
    assert entry.fresh is None
    assert not any(best in one.keys for one in course.of(Kind.FRESH))
    assert (best in {key for one in course.of(Kind.FULL) for key in one.keys}) == (not look)
    rest = [e for e in course.entries.values() if e.key != best and e.self_edit is not None]
    assert sum(e.reward is not None for e in rest) >= 3
    assert len([e for e in rest if e.fresh is not None]) == 2


def test_a_failed_fresh_evaluation_leaves_nothing_to_offer() -> None:
    of = plan(rounds={"tasks": 1, "self_edits": 8})
    course = Course(of, written(of))
    entry = next(e for e in course.entries.values() if e.fresh is not None)
    lost = replace(entry, fresh=evaluator.Evaluation(state=evaluator.EVALUATION_STATE_FAILED))
    assert lost.failed
    assert lost.earned is None
    assert len(of.update(1, "p", [lost, *(e for e in course.entries.values() if e.key != entry.key)]).examples) == 3


def test_a_self_edit_that_was_written_twice_is_one_candidate() -> None:
    of = plan(rounds={"tasks": 1, "self_edits": 8})
    (group,) = written(of)
    best = max((e for e in Course(of, [group]).entries.values() if e.look is not None), key=looked)
    other = next(e for e in group if e.key != best.key)
    twin = replace(other, self_edit=best.self_edit)
    course = Course(of, [[twin if e.key == other.key else e for e in group]])
    both = [course.entries[key] for key in (best.key, twin.key)]
    assert both[0].look == both[1].look
    assert both[0].evaluation == both[1].evaluation
    assert both[0].fresh == both[1].fresh
    assert len({e.fresh.id for e in course.entries.values() if e.fresh is not None}) == 2


def test_groups_of_a_heat_share_requests_and_heats_do_not_wait_for_one_another() -> None:
    of = plan(reward={"race": RACE, "trials_together": 8})
    course = Course(of, written(of))
    assert [sorted({key.task for key in one.keys}) for one in course.of(Kind.LOOK)] == [[0, 1], [2, 3], [4]]
    heats = Heats(of, 1)
    first, second, _ = heats.start(written(of))
    house = ScriptedEvaluator()  # type: ignore[abstract]
    outcomes = [heats.take(report) for report in answers(house, first)]
    assert [one.kind for one in outcomes[-1].submissions] == [Kind.FULL]
    assert {key.task for key in outcomes[-1].submissions[0].keys} == {0, 1}
    assert not any(outcome.submissions for outcome in outcomes[:-1])
    assert second.keys[0].task == 2


def test_a_changed_result_is_another_question_under_another_id() -> None:
    """Another run may have had a failed evaluation of ours tried again."""
    of, groups, _, failed = failing(look=True)
    one, two = Course(of, groups, failed), Course(of, groups)
    shared = set(asked(one.submissions)) & set(asked(two.submissions))
    assert all(asked(one.submissions)[name] == asked(two.submissions)[name] for name in shared)
    assert asked(one.submissions) != asked(two.submissions)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 9),
    st.sampled_from([0, 3]),
    st.sampled_from([0, 2]),
    st.integers(1, 16),
    st.lists(st.integers(0, 34), max_size=6),
)
def test_every_course_ends_and_nobody_is_left_waiting(
    dice: int, look_steps: int, fresh: int, together: int, unlucky: list[int]
) -> None:
    race = {**RACE, "look_steps": look_steps}
    of = plan(reward={"race": race, "fresh_seeds": fresh, "trials_together": together})
    groups = written(of)
    valid = [entry for group in groups for entry in group if entry.self_edit is not None]
    lost = [valid[i].self_edit for i in unlucky]
    fails: Callable[[types.Task, types.SelfEdit], bool] = lambda _task, edit: edit in lost  # noqa: E731
    course = Course(of, groups, ScriptedEvaluator(fails=fails), dice)  # type: ignore[abstract]
    assert len(asked(course.submissions)) == len(course.submissions)  # no id twice
    for group in groups:
        ended = [course.entries[e.key] for e in group if e.self_edit is not None]
        assert all(entry.settled for entry in ended)
        assert next_measurement(ended, of.groups) is None
        assert stopped(ended, of.groups) == {entry.key for entry in ended if entry.stopped}
        assert not any(entry.stopped and entry.failed for entry in ended)
        assert all(entry.failed == (entry.self_edit in lost) for entry in ended)
        assert of.groups.race is not None
        candidates = [racing.Candidate(entry.look, entry.evaluation) for entry in ended]
        assert racing.spent(candidates) <= race["budget"] * len(ended) + 1
