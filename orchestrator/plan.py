"""What a run will do, as a pure function of its config and tasks: which tasks when, and every request it sends.

All randomness of a run is here, as seeds derived from the run's seed; nothing depends on a run's id or on time, so
the same config and tasks lead to the same requests, on any machine, interrupted or not.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from orchestrator.entries import Entry, Kind, round_stage
from orchestrator.evaluator_client import Submission
from orchestrator.heats import GroupSettings, Measurement
from orchestrator.run_store import RunRecord
from preceptor import arms
from preceptor.config import FixedStrategy, RunConfig
from preceptor.convert import directive_to_proto, for_teacher
from preceptor.groups import advantages
from preceptor.limits import MAX_SELF_EDITS, MAX_TRIALS
from preceptor.names import content_id, derived_seed
from preceptor.protocols import as_trained, chosen_probes, directive_limits, evaluation_protocol, look_protocol
from preceptor.racing import RaceSettings
from preceptor.tasks import Augmentations, Directive, LossMask
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import teacher_pb2 as teacher
from preceptor.v1 import types_pb2 as types

# How the untrained teacher is asked for questions.
QUESTION_FORMAT = "self_qa"


@dataclass(frozen=True)
class RunPlan:
    """The plan of one run. Positions of tasks count from 0, rounds from 1."""

    run_id: str
    config: RunConfig
    student: types.PinnedStudent
    tasks: tuple[types.Task, ...]
    heldout_tasks: tuple[types.Task, ...]
    probes: tuple[types.Question, ...]
    replay_documents: tuple[str, ...]
    canary_tasks: tuple[types.Task, ...] = ()
    resumes: int = 0

    @staticmethod
    def of(record: RunRecord) -> RunPlan:
        """The plan of a stored run."""
        request, config = record.request, record.config()
        canary = set(canary_places(config, request.tasks))
        return RunPlan(
            run_id=record.id,
            config=config,
            student=record.student,
            tasks=tuple(task for place, task in enumerate(request.tasks) if place not in canary),
            canary_tasks=tuple(task for place, task in enumerate(request.tasks) if place in canary),
            heldout_tasks=tuple(request.heldout_tasks),
            probes=tuple(request.probes),
            replay_documents=tuple(request.replay_documents),
            resumes=record.resumes,
        )

    @cached_property
    def few_shot(self) -> bool:
        """Whether the tasks are few-shot tasks; all of a run are of one kind."""
        return any(task.HasField("few_shot") for task in (*self.heldout_tasks, *self.tasks, *self.canary_tasks))

    @cached_property
    def _order(self) -> list[int]:
        order = list(range(len(self.tasks)))
        random.Random(self._seed("tasks")).shuffle(order)
        return order

    def tasks_of_round(self, number: int) -> list[types.Task]:
        """The round's tasks: the shuffled training tasks in turn, each at most once in a round."""
        count = min(self.config.rounds.tasks, len(self.tasks))
        start = (number - 1) * count
        return [self.tasks[self._order[i % len(self.tasks)]] for i in range(start, start + count)]

    def writer_of(self, number: int) -> int:
        """The round after which the policy was that writes this round; 0: before the first. By the config alone, never
        by time."""
        return max(0, number - 1 - self.config.rounds.staleness)

    def written_ahead(self, number: int) -> range:
        """The rounds that can be written while this one is measured."""
        rounds = self.config.rounds
        return range(number + 1, min(number + rounds.staleness, rounds.count) + 1)

    @cached_property
    def selection_tasks(self) -> list[types.Task]:
        """The training tasks that choose the fixed strategy; none without candidates."""
        if not (self.config.heldout.fixed_strategies and self.heldout_tasks):
            return []
        order = list(range(len(self.tasks)))
        random.Random(self._seed("selection-tasks")).shuffle(order)
        return [self.tasks[i] for i in order[: self.config.heldout.selection_tasks]]

    @cached_property
    def reference_arms(self) -> list[str]:
        """The reference arms that every held-out task can fill."""
        tasks = self.heldout_tasks
        return [arm for arm in arms.REFERENCES if tasks and all(arm in task.reference_edits for task in tasks)]

    @cached_property
    def arms(self) -> list[str]:
        """The arms of the held-out measurement in the order of every table: those that each run has (of which the tasks
        may bring nothing), and those that this one asks for. A few-shot task has no text of its own to train on, and
        its demonstrations stand in every prompt: the untouched student is the in-context baseline."""
        asked = self.config.heldout
        found = [
            arms.NO_EDIT,
            *([] if self.few_shot else [arms.PASSAGE]),
            *map(arms.format_arm, asked.formats),
            arms.UNTRAINED,
            arms.FIXED,
            *([arms.EXTERNAL] if asked.external_teacher else []),
            arms.TRAINED,
            *([arms.IN_CONTEXT] if asked.in_context else []),
        ]
        return [*found, *arms.REFERENCES]

    @property
    def planned_self_edits(self) -> int:
        """Self-edits the whole run will write, for estimates."""
        rounds = self.config.rounds
        trained = rounds.count * min(rounds.tasks, len(self.tasks)) * rounds.self_edits
        selection = len(self.selection_tasks) * len(self.config.heldout.fixed_strategies)
        nothing = [arm for arm in arms.REFERENCES if arm not in self.reference_arms]
        nothing += [arms.NO_EDIT] + ([] if self.selection_tasks else [arms.FIXED])
        watched = (rounds.count + 1) * len(self.canary_tasks) * self.config.labels.canary_self_edits
        return trained + selection + watched + (len(self.arms) - len(nothing)) * len(self.heldout_tasks)

    # What is asked of the teacher

    def generation(
        self, policy_id: str, tasks: Sequence[types.Task], *, samples: int, prompt_format: str, seed: int
    ) -> teacher.GenerateSelfEditsRequest:
        """The request for ``samples`` self-edits of each task."""
        settings = self.config.teacher
        return teacher.GenerateSelfEditsRequest(
            policy_id=policy_id,
            tasks=[for_teacher(task) for task in tasks],
            samples_per_task=samples,
            prompt_format=prompt_format,
            sampling=teacher.SamplingSettings(
                temperature=settings.temperature, top_p=settings.top_p, max_new_tokens=settings.max_new_tokens
            ),
            seed=seed,
            max_resamples=settings.max_resamples,
            limits=directive_limits(self.config),
        )

    def round_generation(self, number: int, policy_id: str) -> teacher.GenerateSelfEditsRequest:
        """The round's request to the teacher."""
        return self.generation(
            policy_id,
            self.tasks_of_round(number),
            samples=self.config.rounds.self_edits,
            prompt_format=self.config.teacher.prompt_format,
            seed=self._seed("generate", number),
        )

    def selection_generation(self, base_policy: str, prompt_format: str) -> teacher.GenerateSelfEditsRequest:
        """What the untrained teacher writes for the candidates with this format."""
        seed = self._seed("selection-sampling")
        return self.generation(base_policy, self.selection_tasks, samples=1, prompt_format=prompt_format, seed=seed)

    def heldout_generation(self, policy_id: str, prompt_format: str) -> teacher.GenerateSelfEditsRequest:
        """What a policy writes for the held-out tasks; the seed is the same for all policies and formats."""
        seed = self._seed("heldout-sampling")
        return self.generation(policy_id, self.heldout_tasks, samples=1, prompt_format=prompt_format, seed=seed)

    def canary_generation(self, policy_id: str) -> teacher.GenerateSelfEditsRequest:
        """What a policy writes for the canary tasks; the seed is the same after every round."""
        prompt_format, seed = self.config.teacher.prompt_format, self._seed("canary-sampling")
        samples = self.config.labels.canary_self_edits
        return self.generation(policy_id, self.canary_tasks, samples=samples, prompt_format=prompt_format, seed=seed)

    def question_generation(self, base_policy: str) -> teacher.GenerateSelfEditsRequest:
        """What the untrained teacher writes as questions and answers about the training tasks."""
        samples, seed = self.config.labels.completions, self._seed("question-sampling")
        return self.generation(base_policy, self.tasks, samples=samples, prompt_format=QUESTION_FORMAT, seed=seed)

    def question_seed(self, task_id: str) -> int:
        """The seed by which a task's written questions are divided."""
        return self._seed("questions", task_id)

    def update(self, number: int, parent_id: str, entries: Sequence[Entry]) -> teacher.UpdatePolicyRequest:
        """The round's update from its rewarded self-edits; what failed, was malformed or was stopped without a reward
        is not among them. Without examples where the run has no updates.

        Where the best of a group were measured again on fresh seeds, that alone counts for them, in their group's mean
        too, and the others are there for comparison: the seeds that chose somebody flatter him.
        """
        tasks = {task.id: task for task in self.tasks_of_round(number)}
        settings = self.config.update
        request = teacher.UpdatePolicyRequest(
            request_id=self._request_id(round_stage(number), "update"),
            parent_id=parent_id,
            settings=teacher.UpdateSettings(**settings.model_dump()),
            seed=self._seed("update", number),
            activate=False,  # several runs may learn at once; the last policy is activated when its run succeeds
            owner=self.run_id,
        )
        if settings.algorithm == "none":
            return request
        groups: dict[str, list[Entry]] = {}
        for entry in entries:
            if entry.earned is not None:
                groups.setdefault(entry.task_id, []).append(entry)
        for task_id, group in groups.items():
            measured = [entry.fresh or entry.evaluation for entry in group]
            differences = advantages([one for one in measured if one is not None])
            for entry, (advantage, stderr) in zip(group, differences, strict=True):
                assert entry.earned is not None
                example = request.examples.add(
                    group_id=task_id,
                    task=for_teacher(tasks[task_id]),
                    completion=entry.completion,
                    prompt_format=self.config.teacher.prompt_format,
                    reward=entry.earned.value,
                    reward_stderr=entry.earned.stderr,
                    only_compared=bool(self.config.reward.fresh_seeds) and entry.fresh is None,
                    policy_id=entry.policy_id,
                    student_commit=entry.student_commit,
                )
                if len(group) > 1:  # one alone has nothing to be compared with
                    example.advantage, example.advantage_stderr = advantage, stderr
        return request

    # What is asked of the evaluator

    # A group is one task's entries. Which groups share a request, and so train together, depends on their order and
    # on results alone: a request is made again, and is the same, by whoever goes on with the run.

    @cached_property
    def groups(self) -> GroupSettings:
        """How the groups of the rounds are measured."""
        reward, top = self.config.reward, self.config.update.top_k
        race = None if reward.race is None else RaceSettings(**reward.race.model_dump(), top=top)
        return GroupSettings(race, reward.seeds, reward.fresh_seeds, top)

    def heats(self, groups: Iterable[Sequence[Entry]]) -> Iterator[list[Sequence[Entry]]]:
        """Groups in a row that are measured together: of which there are enough trials to train together.

        In a race what counts is how many of a group go on after its first step; later steps are about fewer still, and
        a batch that is half full costs less than waiting for twice as many groups (docs/adr/0009).
        """

        def trials(group: Sequence[Entry]) -> int:
            race = self.config.reward.race
            return len(group) * self.config.reward.seeds if race is None else math.ceil(len(group) * race.look_keep)

        return self._together(groups, trials)

    def trial_seeds(self, number: int, count: int) -> list[int]:
        """The first seeds of a round's trials, which all its candidates share (common random numbers)."""
        return [self._seed("trial", number, i) for i in range(count)]

    def round_submission(self, number: int, measurement: Measurement, groups: Sequence[Sequence[Entry]]) -> Submission:
        """Measures these entries of some groups of a round, in their order."""
        keys = [[entry.key.task, entry.key.index] for group in groups for entry in group]
        # What is asked follows from results. Where these changed under the run (another one had a failed evaluation
        # tried again), it is another question, and needs another id.
        part = f"{measurement.kind}-{measurement.seeds}-{content_id('of', keys)}"
        protocol = self._round_protocol(number, measurement)
        return self._submission(part, self.tasks_of_round(number), groups, protocol, measurement.kind)

    def _round_protocol(self, number: int, measurement: Measurement) -> evaluator.EvaluationProtocol:
        if measurement.kind is Kind.FRESH:
            return self._training_protocol([self._seed("fresh", number, i) for i in range(measurement.seeds)])
        protocol = self._training_protocol(self.trial_seeds(number, measurement.seeds))
        if measurement.kind is Kind.LOOK:
            assert self.groups.race is not None
            return look_protocol(protocol, self.groups.race.look_steps)
        return protocol

    def selection_submissions(self, candidate: int, groups: Iterable[Sequence[Entry]]) -> Iterator[Submission]:
        """Each task's self-edits under the candidates for the fixed strategy of which ``candidate`` is the first."""
        seeds = self.config.reward.seeds
        protocol = self._training_protocol([self._seed("selection", 0, i) for i in range(seeds)])
        for some in self._together(groups, lambda group: len(group) * seeds):
            if _unsettled(some):
                yield self._submission(str(candidate), self.selection_tasks, some, protocol)

    def heldout_submissions(
        self, name: str, groups: Iterable[Sequence[Entry]], *, in_context: bool = False
    ) -> Iterator[Submission]:
        """Each held-out task's self-edits of some arms; ``name`` tells apart the requests of one task. ``in_context``:
        the task's text stands before each of its questions."""
        seeds = self.config.heldout.seeds

        def bank(group: Sequence[Entry]) -> types.QuestionBank.ValueType:
            return heldout_bank(self.heldout_tasks[group[0].key.task])

        for some in self._together(groups, lambda group: len(group) * seeds, bank):
            if _unsettled(some):
                protocol = self._heldout_protocol(bank(some[0]))
                protocol.in_context = in_context
                yield self._submission(name, self.heldout_tasks, some, protocol)

    def canary_submissions(self, groups: Iterable[Sequence[Entry]]) -> Iterator[Submission]:
        """Each canary task's self-edits: labelled questions, plain weights, the same seeds after every round."""
        seeds = self.config.reward.seeds
        protocol = self._training_protocol([self._seed("canary", 0, i) for i in range(seeds)])
        protocol.answers.samples, protocol.answers.certainty = 0, False
        plain = evaluator.RewardWeights(gain=1.0, retention_loss=self.config.reward.retention_loss)
        protocol.weights.CopyFrom(plain)
        for some in self._together(groups, lambda group: len(group) * seeds):
            if _unsettled(some):
                yield self._submission("", self.canary_tasks, some, protocol)

    def _together(
        self,
        groups: Iterable[Sequence[Entry]],
        trials: Callable[[Sequence[Entry]], int],
        asked: Callable[[Sequence[Entry]], object] = lambda _group: None,
    ) -> Iterator[list[Sequence[Entry]]]:
        """Groups in a row that have enough ``trials`` to train together and are ``asked`` alike."""
        most = min(MAX_SELF_EDITS, MAX_TRIALS // self.config.most_seeds)  # the evaluator takes no more at once
        some: list[Sequence[Entry]] = []
        for group in groups:
            full = sum(map(len, some)) + len(group) > most
            if some and (full or asked(group) != asked(some[0])):
                yield some
                some = []
            some.append(group)
            if sum(map(trials, some)) >= self.config.reward.trials_together:
                yield some
                some = []
        if some:
            yield some

    def _submission(
        self,
        part: str,
        tasks: Sequence[types.Task],
        groups: Sequence[Sequence[Entry]],
        protocol: evaluator.EvaluationProtocol,
        kind: Kind = Kind.FULL,
    ) -> Submission:
        first = groups[0][0]
        valid = [[entry for entry in group if entry.self_edit is not None] for group in groups]
        asked = [self._task_edits(tasks[group[0].key.task], group) for group in valid if group]
        request = evaluator.CreateEvaluationsRequest(
            request_id=self._request_id(first.key.stage, part, first.task_id),
            owner=self.run_id,
            task=asked[0].task,
            self_edits=asked[0].self_edits,
            more=asked[1:],
            protocol=protocol,
            student=self.student,
        )
        return Submission(tuple(entry.key for group in valid for entry in group), request, kind)

    def _task_edits(self, task: types.Task, entries: Sequence[Entry]) -> evaluator.TaskSelfEdits:
        edits = [entry.self_edit for entry in entries if entry.self_edit is not None]
        training = self.config.training
        asked = evaluator.TaskSelfEdits(task=task, self_edits=[as_trained(edit, training) for edit in edits])
        asked.task.ClearField("reference_edits")
        return asked

    def _training_protocol(self, seeds: Sequence[int]) -> evaluator.EvaluationProtocol:
        return evaluation_protocol(
            self.config,
            bank=types.QUESTION_BANK_REWARD,
            probes=chosen_probes(self.config, self.probes),
            replay_documents=self.replay_documents,
            seeds=seeds,
        )

    def _heldout_protocol(self, bank: types.QuestionBank.ValueType) -> evaluator.EvaluationProtocol:
        protocol = evaluation_protocol(
            self.config,
            bank=bank,
            probes=self.probes,
            replay_documents=self.replay_documents,
            seeds=[self._seed("heldout", 0, i) for i in range(self.config.heldout.seeds)],
        )
        # The measurement is made with labels, however the teacher was rewarded: confidence is not asked for.
        protocol.answers.samples, protocol.answers.certainty = 0, False
        protocol.weights.certainty_gain = protocol.weights.agreement_gain = 0.0
        return protocol

    def _seed(self, *parts: str | int) -> int:
        return derived_seed(self.config.seed, *parts)

    def _request_id(self, *parts: str) -> str:
        # A run that was resumed on request asks anew, so that what failed is tried again; one that goes on after a
        # crash asks the same again.
        return ".".join((self.run_id, str(self.resumes), *parts))


def _unsettled(groups: Sequence[Sequence[Entry]]) -> bool:
    return not all(entry.settled for group in groups for entry in group)


def canary_places(config: RunConfig, tasks: Sequence[types.Task]) -> list[int]:
    """Which training tasks are set aside as canaries, ascending: a choice by the run's seed among the labelled ones."""
    labelled = labelled_places(tasks)
    count = min(config.tasks.canary, len(labelled))
    return sorted(random.Random(derived_seed(config.seed, "canary-tasks")).sample(labelled, count))


def labelled_places(tasks: Sequence[types.Task]) -> list[int]:
    """Which tasks have a reward question with an answer, or a query with its output."""
    return [place for place, task in enumerate(tasks) if _is_labelled(task)]


def _is_labelled(task: types.Task) -> bool:
    if task.HasField("few_shot"):
        return any(pair.output.rows for pair in task.few_shot.queries)
    rewarding = (types.QUESTION_BANK_REWARD, types.QUESTION_BANK_UNSPECIFIED)
    return any(question.bank in rewarding and question.answer.strip() for question in task.passage.questions)


def heldout_bank(task: types.Task) -> types.QuestionBank.ValueType:
    """The bank of the final measurement: sealed questions, or the reward questions of a task that has no others. A
    few-shot task has no banks, but its queries."""
    sealed = any(question.bank == types.QUESTION_BANK_SEALED for question in task.passage.questions)
    return types.QUESTION_BANK_SEALED if sealed else types.QUESTION_BANK_REWARD


def under(strategy: FixedStrategy, self_edit: types.SelfEdit) -> types.SelfEdit:
    """The documents of a self-edit under the strategy's directive."""
    asked = strategy.augmentations
    directive = Directive(
        learning_rate=strategy.learning_rate,
        epochs=strategy.epochs,
        replay_share=strategy.replay_share,
        rank=strategy.rank,
        targets=strategy.targets,
        loss_mask=LossMask(strategy.loss_mask) if strategy.loss_mask else None,
        augmentations=None if asked is None else Augmentations(**asked.model_dump()),
    )
    return types.SelfEdit(documents=self_edit.documents, directive=directive_to_proto(directive))
