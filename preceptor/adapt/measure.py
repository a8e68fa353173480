"""Self-edits of many passages: written by a policy, raced passage by passage, the best measured again on fresh seeds,
and kept if it clearly helps.

Every passage runs its own race (``preceptor.racing``), but all races take their steps together, so that the trials of
many passages are trained together. Everything asked follows from the config and from results, so whoever asks again is
answered with what is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from preceptor import racing
from preceptor.config import RaceConfig, RunConfig
from preceptor.limits import MAX_SELF_EDITS, MAX_TRIALS
from preceptor.names import derived_seed
from preceptor.protocols import look_protocol
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import teacher_pb2 as teacher
from preceptor.v1 import types_pb2 as types

# What a first look and one more measurement cost is little against training on the wrong thing for good.
DEFAULT_RACE = RaceConfig(look_steps=4, look_keep=0.34, max_seeds=1)

Groups = Sequence[tuple[types.Task, Sequence[types.SelfEdit]]]
# phase, groups, protocol -> evaluations in their final states, group by group.
Evaluate = Callable[[str, Groups, evaluator.EvaluationProtocol], list[list[evaluator.Evaluation]]]


@dataclass(slots=True)
class Written:
    """One thing that the policy wrote, and what is known of it."""

    written: teacher.WrittenSelfEdit
    look: evaluator.Evaluation | None = None
    evaluation: evaluator.Evaluation | None = None
    stopped: bool = False  # in the first look others were better

    @property
    def valid(self) -> bool:
        """Whether there is a self-edit at all."""
        return self.written.status == teacher.SELF_EDIT_STATUS_VALID

    @property
    def candidate(self) -> racing.Candidate:
        """As the race sees it."""
        return racing.Candidate(look=self.look, evaluation=self.evaluation)


@dataclass(slots=True)
class PassageEdits:
    """A passage, what was written for it, and what is kept of that."""

    task: types.Task
    written: list[Written]
    best: Written | None = None
    fresh: evaluator.Evaluation | None = None  # of the best, on seeds that had no part in choosing it
    refused: str = ""  # why nothing is kept; empty: the best is
    runners: list[Written] = field(default_factory=list)  # the valid ones, each once

    @property
    def kept(self) -> types.SelfEdit | None:
        """The self-edit that helps, if one does."""
        return self.best.written.self_edit if self.best is not None and not self.refused else None


def race_settings(config: RunConfig) -> racing.RaceSettings:
    """How every passage is raced: as the config says, else with a short first look."""
    race = config.reward.race or DEFAULT_RACE.model_copy(update={"max_seeds": max(1, config.reward.seeds)})
    if not config.reward.needs_answers:
        race = race.model_copy(update={"look_steps": 0})
    return racing.RaceSettings(**race.model_dump())


def passage_edits(task: types.Task, group: teacher.GenerateSelfEditsResponse) -> PassageEdits:
    """What the teacher wrote; the same self-edit twice runs once."""
    written = [Written(one) for one in group.self_edits]
    unique: dict[bytes, Written] = {}
    for one in written:
        if one.valid:
            unique.setdefault(one.written.self_edit.SerializeToString(deterministic=True), one)
    return PassageEdits(task, written, runners=list(unique.values()))


def choose(
    passages: Sequence[PassageEdits],
    config: RunConfig,
    protocol: evaluator.EvaluationProtocol,
    evaluate: Evaluate,
    *,
    min_z: float,
) -> None:
    """Races, measures the best again, and decides what is kept. ``protocol``: its seeds are the most that anybody gets.

    Raises PreceptorError as ``evaluate`` does; a single evaluation that fails is no error here.
    """
    settings = race_settings(config)
    _race(passages, settings, protocol, evaluate)
    for one in passages:
        found = racing.best([runner.candidate for runner in one.runners], racing.RaceSettings())
        one.best = one.runners[found[0]] if found else None
    contested = [one for one in passages if one.best is not None]
    again = with_seeds(
        protocol, [derived_seed(config.seed, "adapt-fresh", i) for i in range(max(1, config.reward.fresh_seeds))]
    )
    groups = [(one.task, [one.best.written.self_edit]) for one in contested if one.best is not None]
    for one, (fresh,) in zip(contested, _in_requests("best again", groups, again, evaluate), strict=True):
        one.fresh = fresh
    for one in passages:
        one.refused = refusal(one, config.update.min_reward, min_z)


def refusal(one: PassageEdits, min_reward: float, min_z: float) -> str:
    """Why the passage's best self-edit is not kept; empty where it is: the reward on fresh seeds is ``min_z`` of its
    standard errors above ``min_reward``, and above it at all."""
    if not one.runners:
        return f"none of {len(one.written)} completions is a self-edit"
    if one.best is None:
        failed = next((r.evaluation or r.look for r in one.runners if r.evaluation or r.look), None)
        return f"no evaluation succeeded ({failed.failure.reason if failed else 'none was made'})"
    if one.fresh is None or one.fresh.state != racing.SUCCEEDED:
        return f"the best could not be measured again ({one.fresh.failure.reason if one.fresh else 'not asked'})"
    reward = one.fresh.reward
    if reward.value <= min_reward:
        return f"the best does not help ({reward.value:+.3f} on fresh seeds)"
    if reward.value - min_z * reward.stderr <= min_reward:
        return f"the best does not clearly help ({reward.value:+.3f} ± {reward.stderr:.3f} on fresh seeds)"
    return ""


def _race(
    passages: Sequence[PassageEdits],
    settings: racing.RaceSettings,
    protocol: evaluator.EvaluationProtocol,
    evaluate: Evaluate,
) -> None:
    """All races to their ends, step by step: looks first, then seeds, those with the fewest first."""
    look = look_protocol(protocol, settings.look_steps)
    while True:
        steps = [racing.next_step([runner.candidate for runner in one.runners], settings) for one in passages]
        going = [(one, step) for one, step in zip(passages, steps, strict=True) if step is not None]
        if not going:
            break
        kind = min((not step.look, step.seeds) for _, step in going)
        asked = [(one, step) for one, step in going if (not step.look, step.seeds) == kind]
        groups = [(one.task, [one.runners[i].written.self_edit for i in step.candidates]) for one, step in asked]
        if kind[0]:
            words, under = f"race, seed {kind[1]}", with_seeds(protocol, protocol.seeds[: kind[1]])
        else:
            words, under = "first look", look
        for (one, step), found in zip(asked, _in_requests(words, groups, under, evaluate), strict=True):
            for place, evaluation in zip(step.candidates, found, strict=True):
                if step.look:
                    one.runners[place].look = evaluation
                else:
                    one.runners[place].evaluation = evaluation
    for one in passages:
        stopped = racing.stopped([runner.candidate for runner in one.runners], settings)
        for runner, is_stopped in zip(one.runners, stopped, strict=True):
            runner.stopped = is_stopped


def _in_requests(
    words: str, groups: Groups, protocol: evaluator.EvaluationProtocol, evaluate: Evaluate
) -> list[list[evaluator.Evaluation]]:
    """As many groups in one request as it may have."""
    most = min(MAX_SELF_EDITS, MAX_TRIALS // max(1, len(protocol.seeds)))
    found: list[list[evaluator.Evaluation]] = []
    batch: list[tuple[types.Task, Sequence[types.SelfEdit]]] = []
    for group in groups:
        if batch and sum(len(edits) for _, edits in batch) + len(group[1]) > most:
            found += evaluate(words, batch, protocol)
            batch = []
        batch.append(group)
    return found + evaluate(words, batch, protocol) if batch else found


def with_seeds(protocol: evaluator.EvaluationProtocol, seeds: Sequence[int]) -> evaluator.EvaluationProtocol:
    """The same protocol with other seeds."""
    changed = evaluator.EvaluationProtocol()
    changed.CopyFrom(protocol)
    changed.seeds[:] = seeds
    return changed
