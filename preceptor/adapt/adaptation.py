"""A student adapted to passages, start to end, on a stack: self-edits, the race, the joint update.

``adapt`` writes nothing to disk. All it asks for is known to the services afterwards, so whoever was interrupted asks
again and is answered at once as far as it came.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from preceptor.adapt.joint import joint_protocol
from preceptor.adapt.measure import PassageEdits, choose, passage_edits, race_settings
from preceptor.adapt.subject import Subject
from preceptor.cli.measuring import Progress
from preceptor.config import RunConfig
from preceptor.convert import for_teacher, question_to_proto, task_to_proto
from preceptor.errors import PreceptorError
from preceptor.names import content_id, derived_seed
from preceptor.protocols import chosen_probes, directive_limits, evaluation_protocol
from preceptor.racing import SUCCEEDED
from preceptor.reproduce.lab import Lab
from preceptor.union import Union, union_edit, union_task
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import teacher_pb2 as teacher
from preceptor.v1 import types_pb2 as types


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be done."""

    subject: Subject
    config: RunConfig
    joint: RunConfig  # the same with the joint update's training
    student: str  # registered name; empty: the active one
    policy: str  # empty: the active one
    min_z: float  # standard errors that a reward must be above 0

    @property
    def id(self) -> str:
        """Stands for all of it, as it was asked for."""
        asked = [self.config.to_json(), self.joint.to_json(), self.student, self.policy, self.min_z]
        texts = [task_to_proto(passage).id for passage in self.subject.passages]
        material = [[probe.text for probe in self.subject.probes], list(self.subject.replay_documents)]
        return content_id("asked", [asked, texts, material])


@dataclass(frozen=True, slots=True)
class Adaptation:
    """What came of it. ``joint`` is None where no self-edit helps; else it SUCCEEDED and has kept its adapter."""

    student: types.PinnedStudent
    policy: teacher.Policy
    passages: Sequence[PassageEdits]
    union: Union
    joint: evaluator.Evaluation | None
    notes: Sequence[str]

    @property
    def kept(self) -> list[bool]:
        """Of which passages the self-edit was kept."""
        return [one.kept is not None for one in self.passages]


def adapt(lab: Lab, wish: Wish) -> Adaptation:
    """Raises PreceptorError where something is not there, or the joint update fails; what self-edits are worth is no
    error."""
    config, subject = wish.config, wish.subject
    student = lab.student(wish.student).pinned
    policy = lab.policy(wish.policy)
    if policy.state not in (teacher.POLICY_STATE_READY, teacher.POLICY_STATE_UNSPECIFIED):
        raise PreceptorError("POLICY_NOT_READY", f"policy {policy.id} is not ready", field="--policy")
    tasks = [_bare(task_to_proto(passage)) for passage in subject.passages]
    union = union_task(tasks, types.QUESTION_BANK_SEALED)
    passages = _written(lab, tasks, policy.id, config)

    def evaluate(
        words: str,
        groups: Sequence[tuple[types.Task, Sequence[types.SelfEdit]]],
        protocol: evaluator.EvaluationProtocol,
    ) -> list[list[evaluator.Evaluation]]:
        return lab.evaluate(words, groups, protocol, student)

    protocol = evaluation_protocol(
        config,
        bank=types.QUESTION_BANK_REWARD,
        probes=chosen_probes(config, [question_to_proto(probe) for probe in subject.probes]),
        replay_documents=subject.replay_documents,
        seeds=[derived_seed(config.seed, "adapt", i) for i in range(race_settings(config).max_seeds)],
    )
    choose(passages, config, protocol, evaluate, min_z=wish.min_z)
    kept = [one.kept for one in passages]
    notes = _notes(passages, union)
    edit = joint_edit(tasks, kept, config)
    if edit is None:
        return Adaptation(student, policy, passages, union, None, notes)
    joint_asked = joint_protocol(wish.joint, subject.probes, subject.replay_documents)
    ((joint,),) = evaluate("joint update", [(union.task, [edit])], joint_asked)
    if joint.state != SUCCEEDED:
        raise PreceptorError(joint.failure.reason or "CANCELLED", f"the joint update failed: {joint.failure.message}")
    if not joint.trials[0].HasField("adapter"):
        raise PreceptorError("VERSION_SKEW", "the evaluator gave no adapter: it is older than this command")
    return Adaptation(student, policy, passages, union, joint, notes)


def joint_edit(
    tasks: Sequence[types.Task], kept: Sequence[types.SelfEdit | None], config: RunConfig
) -> types.SelfEdit | None:
    """What the joint update studies: of each passage whose self-edit is kept its documents, behind the passage's own
    text where the config has it in every fine-tune; None where nothing is kept."""
    chosen = [
        types.SelfEdit(
            documents=([task.passage.text] if config.training.include_passage else []) + list(edit.documents)
        )
        for task, edit in zip(tasks, kept, strict=True)
        if edit is not None
    ]
    return union_edit(chosen) if chosen else None


def _bare(task: types.Task) -> types.Task:
    task.ClearField("reference_edits")
    return task


def _written(lab: Lab, tasks: Sequence[types.Task], policy_id: str, config: RunConfig) -> list[PassageEdits]:
    settings = config.teacher
    count = config.rounds.self_edits
    lab.tell(lambda view: view.progress(Progress("writing", 0, len(tasks), None, "passages")))
    request = teacher.GenerateSelfEditsRequest(
        policy_id=policy_id,
        tasks=[for_teacher(task) for task in tasks],
        samples_per_task=count,
        prompt_format=settings.prompt_format,
        sampling=teacher.SamplingSettings(
            temperature=settings.temperature, top_p=settings.top_p, max_new_tokens=settings.max_new_tokens
        ),
        seed=derived_seed(config.seed, "adapt-sampling"),
        max_resamples=settings.max_resamples,
        limits=directive_limits(config),
    )
    groups = lab.write(request)
    lab.tell(lambda view: view.progress(Progress("writing", len(tasks), len(tasks), None, "passages")))
    return [passage_edits(task, group) for task, group in zip(tasks, groups, strict=True)]


def _notes(passages: Sequence[PassageEdits], union: Union) -> list[str]:
    notes = []
    everything = [written for one in passages for written in one.written]
    if malformed := sum(not written.valid for written in everything):
        notes.append(f"{malformed} of {len(everything)} completions were no self-edits")
    if failed := [
        found
        for one in passages
        for found in (one.fresh, *(e for written in one.written for e in (written.look, written.evaluation)))
        if found is not None and found.state != SUCCEEDED
    ]:
        reasons = sorted({found.failure.reason or "CANCELLED" for found in failed})
        notes.append(f"{len(failed)} evaluations failed ({', '.join(reasons)}); the rest went on")
    if union.left_out:
        notes.append(f"{union.left_out} sealed questions are asked by an earlier passage, too; they were asked once")
    return notes
