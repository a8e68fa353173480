"""What an experiment costs on GPUs, before it starts. Arithmetic on assumptions, like ``preceptor.capacity``.

    student   (4 P x trained tokens + 2 P x answered tokens) / (peak x PEAK_SHARE), P the student's parameters
    teacher    4 P x learnt tokens / (peak x PEAK_SHARE) + 2 P x written tokens / (peak x WRITE_SHARE)

No GPU has been measured with it: batches of many adapters may reach the assumed share of the rate, single fine-tunes do
not. ``published_hours`` is the other end: every fine-tune as slow as the paper's authors had it.

Tokens come from the config: a fine-tune trains a self-edit's tokens times its epochs, within the budget if there is
one; every question and probe is a short prompt. A directive may ask for more or less of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from preceptor.capacity import BYTES_PER_PARAMETER, GPUS, PEAK_SHARE, SELF_EDIT_TOKENS, WEIGHTS_SHARE, Gpu
from preceptor.config import RunConfig
from preceptor.errors import PreceptorError
from preceptor.reproduce.experiment import Step
from preceptor.tasks import Bank, FewShotTask, Task

# Assumed. Writing reads the weights once a step and is bound by memory: what a server of many streams reaches.
WRITE_SHARE = 0.05
# Assumed. A question or probe with its answer.
QUESTION_TOKENS = 50.0
# Assumed. A few-shot task as one text: three pairs of grids of 12 x 12 cells with their signs.
FEW_SHOT_TOKENS = 1_000.0
# What evaluating one self-edit took the authors of SEAL on H100s, as they say (arXiv:2506.10943, on limitations).
PUBLISHED_SECONDS = (30.0, 45.0)
_ARMS_OF_THE_TEACHER = 2  # untrained and trained


def run_step(words: str, config: RunConfig, train: Sequence[Task], heldout: Sequence[Task]) -> Step:
    """A run of this config on so many tasks. Everything is an upper bound but for a race, of which a share is run."""
    rounds, reward, arms = config.rounds, config.reward, config.heldout
    tasks = min(rounds.tasks, len(train))
    written = rounds.count * tasks * rounds.self_edits
    raced = reward.race.look_keep if reward.race and reward.race.look_steps else 1.0
    searched = written * raced * reward.seeds + rounds.count * tasks * reward.fresh_seeds
    selection = min(arms.selection_tasks, len(train)) * len(arms.fixed_strategies)
    references = len({name for task in heldout for name in task.reference_edits})
    teachers = _ARMS_OF_THE_TEACHER + len(arms.formats) + bool(arms.fixed_strategies) + arms.external_teacher
    measured = len(heldout) * (1 + teachers + references) * arms.seeds
    trials = searched + selection + measured
    training = config.training
    few_shot = any(isinstance(task, FewShotTask) for task in (*train, *heldout))
    per_trial = FEW_SHOT_TOKENS * config.few_shot.max_documents if few_shot else SELF_EDIT_TOKENS
    per_trial *= training.epochs
    if training.max_train_tokens:
        per_trial = min(per_trial, float(training.max_train_tokens))
    votes, question = config.few_shot.votes, FEW_SHOT_TOKENS if few_shot else QUESTION_TOKENS
    asked = question * _mean_questions(train, Bank.REWARD, votes) + QUESTION_TOKENS * reward.probes
    asked_last = question * _mean_questions(heldout, Bank.SEALED, votes) + QUESTION_TOKENS * reward.probes
    kept = rounds.count * tasks * min(config.update.top_k, rounds.self_edits)
    learns = config.update.algorithm != "none"
    return Step(
        words=words,
        trials=round(trials),
        trained_tokens=trials * per_trial,
        answered_tokens=(searched + selection) * asked + measured * asked_last,
        written_tokens=SELF_EDIT_TOKENS * (written + teachers * len(heldout) + selection),
        learnt_tokens=SELF_EDIT_TOKENS * kept * config.update.epochs if learns else 0.0,
        student=config.student.name,
    )


def _mean_questions(tasks: Sequence[Task], bank: Bank, votes: int) -> float:
    """Prompts of a task: its questions, or a few-shot task's queries in so many views each."""
    asked = [
        len(task.queries) * votes if isinstance(task, FewShotTask) else len(task.questions_of(bank)) for task in tasks
    ]
    return sum(asked) / len(asked) if asked else 0.0


@dataclass(frozen=True, slots=True)
class Cost:
    """An estimate. Seconds are those of one GPU; with several they are shared, the hours' price is not."""

    gpu: str
    trials: int
    student_seconds: float
    teacher_seconds: float
    price_per_hour: float | None

    @property
    def gpu_hours(self) -> float:
        """Of both."""
        return (self.student_seconds + self.teacher_seconds) / 3600

    @property
    def published_hours(self) -> tuple[float, float]:
        """The fine-tunes one after the other, as fast as published; the teacher's part not counted."""
        low, high = PUBLISHED_SECONDS
        return self.trials * low / 3600, self.trials * high / 3600

    def dollars(self, hours: float) -> float | None:
        """None where no price is known."""
        return None if self.price_per_hour is None else hours * self.price_per_hour


def gpu_named(name: str) -> Gpu:
    """A GPU of ``preceptor.capacity``. Raises PreceptorError(INVALID_REQUEST)."""
    for gpu in GPUS:
        if gpu.name.lower() == name.lower():
            return gpu
    raise PreceptorError("INVALID_REQUEST", f"{name!r} is none of {', '.join(gpu.name for gpu in GPUS)}", field="gpu")


def estimate(
    steps: Sequence[Step], student_parameters: float, teacher_parameters: float, gpu: Gpu, price: float | None
) -> Cost:
    """What the steps cost on one such GPU. Raises PreceptorError(INVALID_REQUEST) where a model does not fit."""
    for of, parameters in (("student", student_parameters), ("teacher", teacher_parameters)):
        if not parameters > 0:
            raise PreceptorError("INVALID_REQUEST", f"must be above 0: {parameters:g}", field=f"{of}_billions")
        if BYTES_PER_PARAMETER * parameters > WEIGHTS_SHARE * gpu.memory:
            raise PreceptorError(
                "INVALID_REQUEST",
                f"a {of} of {parameters / 1e9:g} billion parameters does not fit into one {gpu.name}",
                field="gpu",
            )
    trained, answered = sum(step.trained_tokens for step in steps), sum(step.answered_tokens for step in steps)
    written, learnt = sum(step.written_tokens for step in steps), sum(step.learnt_tokens for step in steps)
    rate = gpu.peak * PEAK_SHARE
    return Cost(
        gpu=gpu.name,
        trials=sum(step.trials for step in steps),
        student_seconds=student_parameters * (4 * trained + 2 * answered) / rate,
        teacher_seconds=teacher_parameters * (4 * learnt / rate + 2 * written / (gpu.peak * WRITE_SHARE)),
        price_per_hour=price,
    )
