"""What an evaluation is, as ids: the same work always has the same id, in any run, on any machine.

A **trial** id stands for all that a worker's answers depend on: the student's commit and adapters, documents, resolved
settings, seed, questions with their gold answers (their log-probability is scored), probes, replay documents, how
questions are put, and the protocol's version. The **baseline** is the trial without documents, whose id depends on
student, questions, probes and answer settings alone, so it is shared by everything asked about a task.
An **exam** is how answers become a reward: questions with aliases, probes, grader and its version, weights.
An **evaluation** id stands for its trials, its baseline and its exam. Names, titles, labels, the question's bank and
the place where a student lies are in none of them.

``plan`` is pure. Which trials train together is a function of the group (and of what is already known), never of time:
batch mates can change the last bits of a result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from google.protobuf.json_format import MessageToDict

from evaluator.graders import grader_label
from evaluator.request import EvaluationRequest
from evaluator.resolve import resolve_training
from evaluator.reward import Weights
from preceptor.names import content_id, student_identity
from preceptor.queue import PROTOCOL_VERSION
from preceptor.tasks import Question
from preceptor.v1 import trial_pb2 as trial
from preceptor.v1 import types_pb2 as types

# Settings that came after evaluations were first stored, with what holds where they are not used. They are part of an
# identity only where they differ from that, so that what was known stays known.
_LATER = {"gradient_accumulation": 1, "max_steps": 0, "pad_to": 0}


@dataclass(frozen=True, slots=True)
class Exam:
    """How the answers of a trial become a reward."""

    questions: tuple[Question, ...]
    probes: tuple[Question, ...]
    grader: str  # name
    grader_label: str  # name/version
    weights: Weights

    @property
    def id(self) -> str:
        """Content id; the bank of a question is not part of it."""
        return content_id(
            "exam",
            {
                "questions": [[q.text, q.answer, sorted(set(q.aliases))] for q in self.questions],
                "probes": [[q.text, q.answer, sorted(set(q.aliases))] for q in self.probes],
                "grader": self.grader_label,
                "weights": asdict(self.weights),
            },
        )


@dataclass(frozen=True, slots=True)
class PlannedEvaluation:
    """One self-edit's evaluation and the trials it stands on."""

    id: str
    self_edit: types.SelfEdit
    trials: tuple[trial.Trial, ...]  # one per seed, ascending


@dataclass(frozen=True, slots=True)
class Plan:
    """All that one request may need, whatever of it is already known."""

    task_id: str
    student: types.PinnedStudent
    exam: Exam
    evaluations: tuple[PlannedEvaluation, ...]  # in the order of the self-edits, repeated ones repeated
    baseline: trial.Trial
    replay_documents: tuple[str, ...]
    answers: trial.AnswerSettings

    def batch(self, trials: Sequence[trial.Trial]) -> trial.TrialBatch:
        """The payload that has a worker run ``trials`` together."""
        batch = trial.TrialBatch(
            student=self.student,
            trials=trials,
            question_sets=[trial.QuestionSet(questions=_asked(self.exam.questions))],
            probes=_asked(self.exam.probes),
            answers=self.answers,
            protocol_version=PROTOCOL_VERSION,
        )
        if any(item.settings.replay_share > 0 for item in trials):
            batch.replay_documents.extend(self.replay_documents)
        batch.id = batch_id(item.id for item in trials)
        return batch


def plan(request: EvaluationRequest, student: types.PinnedStudent) -> Plan:
    """What is to be done for a request about a pinned student."""
    exam = Exam(request.questions, request.probes, request.grader.name, grader_label(request.grader), request.weights)
    shared = {
        "protocol": PROTOCOL_VERSION,
        "student": student_identity(student),
        "questions": [[q.text, q.answer] for q in request.questions],
        "probes": [[q.text, q.answer] for q in request.probes],
        "answers": _values(request.answers),
    }
    # Hashed once: the replay corpus can be a thousand times longer than a self-edit.
    scope = content_id("scope", shared | {"replay_documents": list(request.replay_documents)})
    baseline = trial.Trial(
        id=content_id("baseline", shared),
        settings=resolve_training(trial.TrainingSettings(), types.Directive(), "baseline"),
    )
    evaluations = []
    for edit in request.edits:
        material = {"scope": scope, "documents": list(edit.documents), "settings": _values(edit.settings)}
        trials = tuple(
            trial.Trial(
                id=content_id("trial", material | {"seed": seed}),
                documents=edit.documents,
                settings=edit.settings,
                seed=seed,
            )
            for seed in request.seeds
        )
        identity = {"trials": [item.id for item in trials], "baseline": baseline.id, "exam": exam.id}
        evaluations.append(PlannedEvaluation(content_id("eval", identity), edit.self_edit, trials))
    return Plan(request.task_id, student, exam, tuple(evaluations), baseline, request.replay_documents, request.answers)


def batch_id(trial_ids: Iterable[str]) -> str:
    """The id of the work of training these trials together, in this order."""
    return content_id("batch", list(trial_ids))


def group_trials(
    evaluations: Sequence[PlannedEvaluation], needed: Mapping[str, bool], most: int
) -> list[list[trial.Trial]]:
    """The trials to train together: in the order of the group, each once, cut at evaluations into batches of <= most.

    ``needed`` says by trial id which ones are not known. An evaluation with more seeds than ``most`` stays whole.
    """
    groups: list[list[trial.Trial]] = [[]]
    seen: set[str] = set()
    for evaluation in evaluations:
        new = [item for item in evaluation.trials if needed[item.id] and item.id not in seen]
        seen.update(item.id for item in new)
        if groups[-1] and len(groups[-1]) + len(new) > most:
            groups.append([])
        groups[-1].extend(new)
    return [group for group in groups if group]


def _asked(questions: Sequence[Question]) -> list[types.Question]:
    """Questions as a worker sees them: no aliases, no bank."""
    return [types.Question(text=question.text, answer=question.answer) for question in questions]


def _values(message: trial.TrainingSettings | trial.AnswerSettings) -> dict[str, object]:
    """Every field with its value, also zeros; later settings only where they are used."""
    values = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return {name: value for name, value in values.items() if name not in _LATER or value != _LATER[name]}
