"""What an evaluation is, as ids: the same work always has the same id, in any run, on any machine.

A **trial** id stands for all that a worker's answers depend on: the student's commit and adapters, documents, resolved
settings, seed, questions with their gold answers (their log-probability is scored), probes, replay documents, how
questions are put, and the protocol's version. The **baseline** is the trial without documents, whose id depends on
student, questions, probes and answer settings alone, so it is shared by everything asked about a task.
In context the trials are asked other questions than their baseline, which has no text before them.
An **exam** is how answers become a reward: questions with aliases, probes, grader and its version, weights; of a
few-shot task also how its views are turned back.
An **evaluation** id stands for its trials, its baseline and its exam. Names, titles, labels, the question's bank and
the place where a student lies are in none of them.

``plan`` is pure. Which trials train together is a function of the request (and of what is already known), never of
time: batch mates can change the last bits of a result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from google.protobuf.json_format import MessageToDict

from evaluator.asking import Asking, in_context, of_views
from evaluator.graders.grader import grader_label
from evaluator.graders.grid import GridMatch
from evaluator.overlap import audit
from evaluator.request import EvaluationRequest, TaskEdits
from evaluator.resolve import resolve_training
from evaluator.reward import Weights
from preceptor.few_shot.views import Way
from preceptor.names import content_id, student_identity
from preceptor.queue import PROTOCOL_VERSION
from preceptor.tasks import Question
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import trial_pb2 as trial
from preceptor.v1 import types_pb2 as types

# Settings that came after evaluations were first stored, with what holds where they are not used. They are part of an
# identity only where they differ from that, so that what was known stays known.
_LATER = {
    **{"gradient_accumulation": 1, "max_steps": 0, "pad_to": 0},
    **{"logprobs_only": False, "certainty": False, "samples": 0, "temperature": 0.0, "full": False, "keep": False},
}
# Changes with what an evaluation says of its trials: what is compared must have been reported alike.
_EXAM_VERSION = 2


@dataclass(frozen=True, slots=True)
class Exam:
    """How the answers of a trial become a reward."""

    questions: tuple[Question, ...]
    probes: tuple[Question, ...]
    grader: str  # name
    grader_label: str  # name/version; empty where nothing is graded
    weights: Weights
    certainty: bool = False  # whether the answers carry it
    samples: int = 0  # sampled answers per question
    ways: tuple[Way, ...] = ()  # of a few-shot task: the way back from each view of a question, one answer for each

    @property
    def graded(self) -> bool:
        """Whether answers are right or wrong, not only probable."""
        return bool(self.grader_label)

    @property
    def labelled(self) -> bool:
        """Whether every question has a gold answer."""
        return all(question.answer for question in self.questions)

    @property
    def id(self) -> str:
        """Content id; the bank of a question is not part of it."""
        asked = {
            "version": _EXAM_VERSION,
            "questions": [_as_list(question) for question in self.questions],
            "probes": [_as_list(question) for question in self.probes],
            "grader": self.grader_label,
            "weights": {name: weight for name, weight in asdict(self.weights).items() if weight},
        }
        ways = [[way.symmetry, way.colours] for way in self.ways]
        further = {"certainty": self.certainty, "samples": self.samples, "ways": ways}
        if ways:
            further["queries"] = grader_label(GridMatch())
        return content_id("exam", asked | {name: value for name, value in further.items() if value})


def _as_list(question: Question) -> list[object]:
    """A question as part of an identity."""
    values: list[object] = [question.text, question.answer, sorted(set(question.aliases))]
    return [*values, "written"] if question.written else values


@dataclass(frozen=True, slots=True)
class PlannedEvaluation:
    """One self-edit's evaluation and the trials it stands on."""

    id: str
    task_id: str
    self_edit: types.SelfEdit
    exam: Exam
    exam_id: str
    baseline: trial.Trial
    trials: tuple[trial.Trial, ...]  # one per seed, ascending
    overlap: pb.OverlapAudit | None  # None: there are no questions to copy


@dataclass(frozen=True, slots=True)
class Plan:
    """All that one request may need, whatever of it is already known."""

    student: types.PinnedStudent
    evaluations: tuple[PlannedEvaluation, ...]  # in the order of the self-edits, repeated ones repeated
    asking_of: Mapping[str, Asking]  # what a trial is asked, by its id; baselines too
    replay_documents: tuple[str, ...]

    def batch(self, trials: Sequence[trial.Trial]) -> trial.TrialBatch:
        """The payload that has a worker run ``trials`` together: trained ones of this plan, or baselines."""
        first = self.asking_of[trials[0].id]
        batch = trial.TrialBatch(
            student=self.student,
            trials=trials,
            probes=_asked(first.probes),
            answers=first.answers,
            protocol_version=PROTOCOL_VERSION,
        )
        sets: dict[tuple[Question, ...], int] = {}
        for item in batch.trials:
            questions = self.asking_of[item.id].questions
            if questions not in sets:
                sets[questions] = len(sets)
                batch.question_sets.add(questions=_asked(questions))
            item.question_set = sets[questions]
        if any(item.settings.replay_share > 0 for item in trials):
            batch.replay_documents.extend(self.replay_documents)
        batch.id = batch_id(item.id for item in trials)
        return batch


def plan(request: EvaluationRequest, student: types.PinnedStudent) -> Plan:
    """What is to be done for a request about a pinned student."""
    evaluations: list[PlannedEvaluation] = []
    asking_of: dict[str, Asking] = {}
    for group in request.tasks:
        asking, untouched = _askings(request, group)
        planned = _plan_task(request, group, student, asking, untouched)
        evaluations += planned
        asking_of |= {planned[0].baseline.id: untouched}
        asking_of |= {one.id: asking for item in planned for one in item.trials}
    return Plan(student, tuple(evaluations), asking_of, request.replay_documents)


def _askings(request: EvaluationRequest, group: TaskEdits) -> tuple[Asking, Asking]:
    """What trained students are asked about a task, and the untouched one."""
    # A look at log-probabilities asks no probes.
    plain = Asking(group.questions, () if request.answers.logprobs_only else request.probes, request.answers)
    if group.views:
        seen = of_views(group.views, plain)
        return seen, seen
    return in_context(group.text, plain) if request.in_context else plain, plain


def _plan_task(
    request: EvaluationRequest, group: TaskEdits, student: types.PinnedStudent, asking: Asking, untouched: Asking
) -> list[PlannedEvaluation]:
    looking, answers = request.answers.logprobs_only, request.answers
    exam = Exam(
        questions=group.questions,
        probes=() if looking else request.probes,
        grader="" if looking else request.grader.name,
        grader_label="" if looking else grader_label(request.grader),
        weights=request.weights,
        certainty=answers.certainty,
        samples=answers.samples,
        ways=tuple(view.way for view in group.views[0]) if group.views else (),
    )
    exam_id = exam.id
    # Hashed once: the replay corpus can be a thousand times longer than a self-edit.
    scope = content_id("scope", _shared(student, asking) | {"replay_documents": list(request.replay_documents)})
    baseline = trial.Trial(
        id=content_id("baseline", _shared(student, untouched)),
        settings=resolve_training(trial.TrainingSettings(), types.Directive(), "baseline"),
    )
    evaluations = []
    for edit in group.edits:
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
        overlap = None if group.views else audit(edit.self_edit.documents, group.text, group.questions)
        identity: dict[str, object] = {"trials": [item.id for item in trials], "baseline": baseline.id, "exam": exam_id}
        if request.weights.overlap and overlap is not None:  # the one term that depends on the task's text
            identity["copied"] = overlap.copied
        name = content_id("eval", identity)
        evaluations.append(
            PlannedEvaluation(name, group.task_id, edit.self_edit, exam, exam_id, baseline, trials, overlap)
        )
    return evaluations


def _shared(student: types.PinnedStudent, asking: Asking) -> dict[str, object]:
    """What the answers of any trial depend on that is asked so."""
    return {
        "protocol": PROTOCOL_VERSION,
        "student": student_identity(student),
        "questions": [[q.text, q.answer] for q in asking.questions],
        "probes": [[q.text, q.answer] for q in asking.probes],
        "answers": _values(asking.answers),
    }


def batch_id(trial_ids: Iterable[str]) -> str:
    """The id of the work of training these trials together, in this order."""
    return content_id("batch", list(trial_ids))


def group_trials(
    evaluations: Sequence[PlannedEvaluation], needed: Mapping[str, bool], most: int
) -> list[list[trial.Trial]]:
    """The trials to train together: in the order of the request, each once, cut at evaluations into even batches of at
    most ``most``; the baselines, which train nothing, apart and first.

    ``needed`` says by trial id which ones are not known. An evaluation with more seeds than ``most`` stays whole.
    """
    baselines = {item.baseline.id: (item.baseline,) for item in evaluations if needed[item.baseline.id]}
    seen: set[str] = set()
    trained = []
    for evaluation in evaluations:
        new = tuple(item for item in evaluation.trials if needed[item.id] and item.id not in seen)
        seen.update(item.id for item in new)
        trained.append(new)
    return [*_even(list(baselines.values()), most), *_even(trained, most)]


def _even(parts: Sequence[Sequence[trial.Trial]], most: int) -> list[list[trial.Trial]]:
    """Whole parts in order, in as few batches as ``most`` allows, and these as even as they get."""
    fewest = _cut(parts, most)
    for size in range(sum(map(len, parts)) // max(len(fewest), 1), most):
        if len(batches := _cut(parts, size)) == len(fewest):
            return batches
    return fewest


def _cut(parts: Sequence[Sequence[trial.Trial]], size: int) -> list[list[trial.Trial]]:
    batches: list[list[trial.Trial]] = [[]]
    for part in parts:
        if batches[-1] and len(batches[-1]) + len(part) > size:
            batches.append([])
        batches[-1].extend(part)
    return [batch for batch in batches if batch]


def _asked(questions: Sequence[Question]) -> list[types.Question]:
    """Questions as a worker sees them: no aliases, no bank."""
    return [types.Question(text=question.text, answer=question.answer) for question in questions]


def _values(message: trial.TrainingSettings | trial.AnswerSettings) -> dict[str, object]:
    """Every field with its value, also zeros; later settings only where they are used."""
    values = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return {name: value for name, value in values.items() if name not in _LATER or value != _LATER[name]}
