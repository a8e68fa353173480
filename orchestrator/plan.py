"""What a run will do, as a pure function of its config and tasks: which tasks when, and every request it sends.

All randomness of a run is here, as seeds derived from the run's seed; nothing depends on a run's id or on time, so
the same config and tasks lead to the same requests, on any machine, interrupted or not.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from orchestrator.entries import Entry, round_stage
from orchestrator.evaluator_client import Submission
from orchestrator.run_store import RunRecord
from preceptor.config import FixedStrategy, RunConfig, TrainingConfig
from preceptor.convert import for_teacher, mask_to_proto
from preceptor.names import derived_seed
from preceptor.tasks import LossMask
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import teacher_pb2 as teacher
from preceptor.v1 import trial_pb2 as trial
from preceptor.v1 import types_pb2 as types

# Arms whose edits need no teacher; those of Task.reference_edits are left out where the tasks bring none.
REFERENCE_ARMS = ("oracle", "shuffled_facts")
# The most that a directive may ask for.
MAX_EPOCHS = 1024


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
    resumes: int = 0

    @staticmethod
    def of(record: RunRecord) -> RunPlan:
        """The plan of a stored run."""
        request = record.request
        return RunPlan(
            run_id=record.id,
            config=record.config(),
            student=record.student,
            tasks=tuple(request.tasks),
            heldout_tasks=tuple(request.heldout_tasks),
            probes=tuple(request.probes),
            replay_documents=tuple(request.replay_documents),
            resumes=record.resumes,
        )

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
        return [arm for arm in REFERENCE_ARMS if tasks and all(arm in task.reference_edits for task in tasks)]

    @property
    def planned_self_edits(self) -> int:
        """Self-edits the whole run will write, for estimates."""
        rounds = self.config.rounds
        trained = rounds.count * min(rounds.tasks, len(self.tasks)) * rounds.self_edits
        selection = len(self.selection_tasks) * len(self.config.heldout.fixed_strategies)
        arms = 3 + len(self.reference_arms) + bool(self.selection_tasks)
        return trained + selection + arms * len(self.heldout_tasks)

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

    def update(self, number: int, parent_id: str, entries: Sequence[Entry]) -> teacher.UpdatePolicyRequest:
        """The round's update from its rewarded self-edits; what failed or was malformed is not among them."""
        tasks = {task.id: task for task in self.tasks_of_round(number)}
        settings = self.config.update
        request = teacher.UpdatePolicyRequest(
            request_id=self._request_id(round_stage(number), "update"),
            parent_id=parent_id,
            settings=teacher.UpdateSettings(**settings.model_dump()),
            seed=self._seed("update", number),
            activate=False,  # several runs may learn at once; the last policy is activated when its run succeeds
        )
        for entry in entries:
            if (reward := entry.reward) is not None:
                request.examples.add(
                    group_id=entry.task_id,
                    task=for_teacher(tasks[entry.task_id]),
                    completion=entry.completion,
                    prompt_format=self.config.teacher.prompt_format,
                    reward=reward.value,
                    reward_stderr=reward.stderr,
                )
        return request

    # What is asked of the evaluator

    # A group is one task's entries. Which groups share a request, and so train together, depends on their order alone:
    # a request is made again, and is the same, as long as one of its entries is not settled.

    def round_submissions(self, number: int, groups: Iterable[Sequence[Entry]]) -> Iterator[Submission]:
        """A round's groups. All candidates share the round's trial seeds (common random numbers)."""
        protocol = self._training_protocol("trial", number)
        for some in self._together(groups, self.config.reward.seeds):
            yield self._submission("", self.tasks_of_round(number), some, protocol)

    def selection_submissions(self, candidate: int, groups: Iterable[Sequence[Entry]]) -> Iterator[Submission]:
        """Each task's self-edits under the candidates for the fixed strategy of which ``candidate`` is the first."""
        protocol = self._training_protocol("selection", 0)
        for some in self._together(groups, self.config.reward.seeds):
            yield self._submission(str(candidate), self.selection_tasks, some, protocol)

    def heldout_submissions(self, name: str, groups: Iterable[Sequence[Entry]]) -> Iterator[Submission]:
        """Each held-out task's self-edits of some arms; ``name`` tells apart the requests of one task."""
        seeds = self.config.heldout.seeds

        def bank(group: Sequence[Entry]) -> types.QuestionBank.ValueType:
            return heldout_bank(self.heldout_tasks[group[0].key.task])

        for some in self._together(groups, seeds, bank):
            protocol = self._protocol(bank(some[0]), self.probes, "heldout", 0, seeds)
            yield self._submission(name, self.heldout_tasks, some, protocol)

    def _together(
        self,
        groups: Iterable[Sequence[Entry]],
        seeds: int,
        asked: Callable[[Sequence[Entry]], object] = lambda _group: None,
    ) -> Iterator[list[Sequence[Entry]]]:
        """Groups in a row that have enough trials to train together and are ``asked`` alike, unless all is settled."""
        some: list[Sequence[Entry]] = []
        for group in groups:
            if some and asked(group) != asked(some[0]):
                yield from _unsettled(some)
                some = []
            some.append(group)
            if sum(map(len, some)) * seeds >= self.config.reward.trials_together:
                yield from _unsettled(some)
                some = []
        yield from _unsettled(some)

    def _submission(
        self,
        part: str,
        tasks: Sequence[types.Task],
        groups: Sequence[Sequence[Entry]],
        protocol: evaluator.EvaluationProtocol,
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
        return Submission(tuple(entry.key for group in valid for entry in group), request)

    def _task_edits(self, task: types.Task, entries: Sequence[Entry]) -> evaluator.TaskSelfEdits:
        edits = [self._as_trained(entry.self_edit) for entry in entries if entry.self_edit is not None]
        asked = evaluator.TaskSelfEdits(task=task, self_edits=edits)
        asked.task.ClearField("reference_edits")
        return asked

    def _as_trained(self, self_edit: types.SelfEdit) -> types.SelfEdit:
        """A recipe is followed as published: no directive changes it."""
        return types.SelfEdit(documents=self_edit.documents) if self.config.training.recipe else self_edit

    def _training_protocol(self, purpose: str, number: int) -> evaluator.EvaluationProtocol:
        probes = self.probes
        if len(probes) > self.config.reward.probes:
            # One choice for the whole run, so that the untouched student is asked once.
            chosen = random.Random(self._seed("probes")).sample(range(len(probes)), self.config.reward.probes)
            probes = tuple(probes[i] for i in sorted(chosen))
        return self._protocol(types.QUESTION_BANK_REWARD, probes, purpose, number, self.config.reward.seeds)

    def _protocol(
        self,
        bank: types.QuestionBank.ValueType,
        probes: Sequence[types.Question],
        purpose: str,
        number: int,
        seeds: int,
    ) -> evaluator.EvaluationProtocol:
        training = self.config.training.model_dump(exclude={"recipe", "include_passage", "loss_mask"})
        loss_mask = mask_to_proto(LossMask(self.config.training.loss_mask))
        reward = self.config.reward
        return evaluator.EvaluationProtocol(
            training=trial.TrainingSettings(**training, loss_mask=loss_mask),
            answers=trial.AnswerSettings(**self.config.answers.model_dump()),
            probes=probes,
            replay_documents=self.replay_documents,
            bank=bank,
            grader=reward.grader,
            weights=evaluator.RewardWeights(
                gain=reward.gain, retention_loss=reward.retention_loss, gold_logprob_gain=reward.gold_logprob_gain
            ),
            seeds=[self._seed(purpose, number, i) for i in range(seeds)],
            include_passage=self.config.training.include_passage,
        )

    def _seed(self, *parts: str | int) -> int:
        return derived_seed(self.config.seed, *parts)

    def _request_id(self, *parts: str) -> str:
        # A run that was resumed on request asks anew, so that what failed is tried again; one that goes on after a
        # crash asks the same again.
        return ".".join((self.run_id, str(self.resumes), *parts))


def _unsettled(groups: list[Sequence[Entry]]) -> Iterator[list[Sequence[Entry]]]:
    if not all(entry.settled for group in groups for entry in group):
        yield groups


def heldout_bank(task: types.Task) -> types.QuestionBank.ValueType:
    """The bank of the final measurement: sealed questions, or the reward questions of a task that has no others."""
    sealed = any(question.bank == types.QUESTION_BANK_SEALED for question in task.passage.questions)
    return types.QUESTION_BANK_SEALED if sealed else types.QUESTION_BANK_REWARD


def under(strategy: FixedStrategy, self_edit: types.SelfEdit) -> types.SelfEdit:
    """The documents of a self-edit under the strategy's directive."""
    directive = types.Directive(
        learning_rate=strategy.learning_rate, epochs=strategy.epochs, replay_share=strategy.replay_share
    )
    return types.SelfEdit(documents=self_edit.documents, directive=directive)


def own_text(task: types.Task, training: TrainingConfig) -> types.SelfEdit:
    """The passage as the only study material, one document a line, under the run's own training settings.

    A passage is often a single line, which the usual number of epochs would show only a few times; where the run has
    a token budget, the passage is repeated until it is spent, as much training as any other material can get.
    """
    lines = [line.strip() for line in task.passage.text.splitlines()]
    directive = types.Directive(epochs=MAX_EPOCHS) if training.max_train_tokens else types.Directive()
    return types.SelfEdit(documents=[line for line in lines if line], directive=directive)
