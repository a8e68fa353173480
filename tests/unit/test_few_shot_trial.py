"""A few-shot task through a real worker's hands: a tiny random student is trained on what the evaluator makes of it."""

from __future__ import annotations

import pytest

from evaluator.graders.rack import Graders
from evaluator.identity import Plan, PlannedEvaluation, plan
from evaluator.request import read_request
from evaluator.scoring import score
from evaluator.store import Sitting
from preceptor.convert import task_to_proto
from preceptor.tasks import FewShotTask, GridPair
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import trial_pb2 as trial
from preceptor.v1 import types_pb2 as types
from student.payload import answering_of, probes_of, result_of, trials_of
from student.trial_runner import run_trials
from tests.evaluation_requests import STUDENT
from tests.evaluator_house import FAILED, SUCCEEDED
from tests.unit.tiny_students import tiny_base

# Whatever comes in, the same grid comes out: what a student of random weights can learn in seconds.
OUT = ((1, 2), (2, 1))
TASK = FewShotTask(
    "always", tuple(GridPair(((cell,),), OUT) for cell in (3, 4, 5)), (GridPair(((6,),), OUT), GridPair(((7,),), OUT))
)


def work(found: Plan, trials: list[trial.Trial], context: int) -> dict[str, trial.TrialResult]:
    batch = found.batch(trials)
    sent, questions = trials_of(trial.TrialBatch.FromString(batch.SerializeToString()))
    outcomes = run_trials(
        tiny_base(context=context), sent, questions, probes=probes_of(batch), answering=answering_of(batch.answers)
    )
    return {one.trial_id: one for one in result_of(batch.id, outcomes, "here:1", 1).results}


def measured(votes: int, context: int = 256) -> list[pb.Evaluation]:
    """A directive that teaches the rule, and one that hardly does anything."""
    request = pb.CreateEvaluationsRequest(request_id="r", owner="o", task=task_to_proto(TASK), student=STUDENT)
    for epochs, rate in ((30, 3e-2), (1, 1e-6)):
        directive = types.Directive(epochs=epochs, learning_rate=rate, loss_mask=types.LOSS_MASK_AFTER_MARKER)
        directive.augmentations.colours = False
        request.self_edits.add(directive=directive)
    request.protocol.seeds.append(1)
    request.protocol.few_shot.votes = votes
    request.protocol.probes.add(text="Old?", answer="old")
    found = plan(read_request(request), STUDENT)
    results = work(found, [found.evaluations[0].baseline], context)
    results |= work(found, [one for item in found.evaluations for one in item.trials], context)

    def scored(item: PlannedEvaluation) -> pb.Evaluation:
        made = pb.Evaluation(id=item.id, task_id=item.task_id, self_edit=item.self_edit)
        seeded = tuple((one.seed, results[one.id]) for one in item.trials)
        return score(Sitting(made, item.exam, seeded, results[item.baseline.id]), Graders())

    return [scored(item) for item in found.evaluations]


@pytest.mark.parametrize("votes", [1, 2])
def test_a_student_learns_a_rule_from_its_demonstrations_and_another_directive_teaches_it_nothing(votes: int) -> None:
    good, bad = measured(votes)
    assert (good.state, bad.state) == (SUCCEEDED, SUCCEEDED)
    assert (good.reward.accuracy, good.reward.baseline_accuracy, good.reward.questions) == (1.0, 0.0, 2)
    assert bad.reward.accuracy == 0.0
    assert good.reward.terms["gold_logprob_gain"] > 5
    assert abs(bad.reward.terms["gold_logprob_gain"]) < 0.1
    assert len(good.trials[0].gold_logprobs) == 2
    assert good.trials[0].trained_tokens > 0


def test_a_prompt_beyond_the_students_context_is_a_failure_and_no_score() -> None:
    for found in measured(1, context=64):
        assert found.state == FAILED
        assert found.failure.reason == "SEQUENCE_TOO_LONG"
        assert not found.HasField("reward")
