"""Has the base teacher write the reward questions of the training tasks, once, each task's in the ledger before use."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.label_store import WrittenQuestions
from orchestrator.ledger import Ledger
from orchestrator.plan import RunPlan
from orchestrator.progress import Progress
from orchestrator.questions import checked, divided
from orchestrator.teacher_client import TeacherClient
from preceptor.errors import PreceptorError
from preceptor.v1 import teacher_pb2 as teacher
from preceptor.v1 import types_pb2 as types


class QuestionWriting:
    """The questions of one run whose training tasks have none, or whose questions are not to be used."""

    def __init__(self, plan: RunPlan, teacher_client: TeacherClient, ledger: Ledger, progress: Progress) -> None:
        self._plan = plan
        self._teacher = teacher_client
        self._ledger = ledger
        self._progress = progress

    def plan(self, base_policy: str) -> RunPlan:
        """The plan with the training tasks that have written questions, under the ids that they had, and with these
        questions only; the plan as it is where questions are given.

        Raises PreceptorError (NO_QUESTIONS where no task has one, and what the teacher refuses), Stopped.
        """
        if self._plan.config.tasks.questions == "given":
            return self._plan
        tasks = []
        for written in self._written(base_policy):
            if written.rewarded:
                task = types.Task()
                task.CopyFrom(self._plan.tasks[written.task])
                del task.passage.questions[:]
                task.passage.questions.extend(written.questions)
                tasks.append(task)
        if not tasks:
            raise PreceptorError(
                "NO_QUESTIONS",
                f"of the questions that were written for {len(self._plan.tasks)} tasks, none can be used",
            )
        return replace(self._plan, tasks=tuple(tasks))

    def _written(self, base_policy: str) -> list[WrittenQuestions]:
        """What is known, and what is asked for now. Where only some is known, all is asked for again and the known
        skipped, as ``orchestrator.writing`` does it."""
        store = self._ledger.labels
        known = {written.task: written for written in store.questions()}
        if len(known) < len(self._plan.tasks):
            self._progress.enter("writing questions")
            groups = self._teacher.generate(self._plan.question_generation(base_policy))
            for position, group in enumerate(groups):
                if position not in known:
                    known[position] = self._checked(position, group)
                    store.keep_questions(known[position])
        return [known[position] for position in sorted(known)]

    def _checked(self, position: int, group: teacher.GenerateSelfEditsResponse) -> WrittenQuestions:
        passage = self._plan.tasks[position].passage
        valid = [one for one in group.self_edits if one.status == teacher.SELF_EDIT_STATUS_VALID]
        found = checked(
            passage.title,
            passage.text,
            [one.self_edit.documents for one in valid],
            agreement=self._plan.config.labels.agreement,
            max_words=self._plan.config.answers.max_new_tokens,
        )
        return WrittenQuestions(
            position,
            group.task_id,
            tuple(divided(found.pairs, self._plan.question_seed(group.task_id))),
            found.dropped,
        )
