"""What experiment is this: one TOML file, validated, unknown keys refused, stored whole with the run.

``load_config(path, overrides)`` reads it; every error names the file, the line where it can, and the key. Where a
process runs is another question (``preceptor.settings``).
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from preceptor.errors import PreceptorError
from preceptor.limits import (
    MAX_ALPHA,
    MAX_BATCH_SIZE,
    MAX_CONFIG_CHARACTERS,
    MAX_DOCUMENTS,
    MAX_EPOCHS,
    MAX_KL,
    MAX_NAME_CHARACTERS,
    MAX_NEW_TOKENS,
    MAX_PROBES,
    MAX_QUESTION_CHARACTERS,
    MAX_RANK,
    MAX_REPLAY_SHARE,
    MAX_REWARD,
    MAX_SAMPLES,
    MAX_SEEDS,
    MAX_SELF_EDITS,
    MAX_SOURCE_CHARACTERS,
    MAX_TARGET_MODULES,
    MAX_TASKS,
    MAX_TRIALS,
    MAX_WEIGHT,
    MIN_TEMPERATURE,
)
from preceptor.names import canonical_json, sha256
from preceptor.recipes import RECIPES
from preceptor.tasks import TARGETS, Schedule

Share = Annotated[float, Field(ge=0, le=1)]
Seeds = Annotated[int, Field(ge=1, le=MAX_SEEDS)]
Name = Annotated[str, Field(max_length=MAX_NAME_CHARACTERS)]
# No file has a NUL in its name, and asking for one is an error of Python's, not of the file system.
PathText = Annotated[str, Field(max_length=MAX_SOURCE_CHARACTERS, pattern=r"^[^\x00]*$")]
# A weight of the reward: a number, not a text or a yes. Far beyond any use, and small enough that sums stay finite.
Weight = Annotated[float, Field(strict=True, ge=-MAX_WEIGHT, le=MAX_WEIGHT)]
Cost = Annotated[float, Field(strict=True, ge=0, le=MAX_WEIGHT)]  # of what is subtracted
Threshold = Annotated[float, Field(ge=0, le=MAX_REWARD)]  # of a reward, or of its errors
Epochs = Annotated[int, Field(ge=1, le=MAX_EPOCHS)]
Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]
Alpha = Annotated[float, Field(gt=0, le=MAX_ALPHA)]
BatchSize = Annotated[int, Field(ge=1, le=MAX_BATCH_SIZE)]
ReplayShare = Annotated[float, Field(ge=0, le=MAX_REPLAY_SHARE)]
Targets = Literal["qv", "attention", "mlp", "all"]  # preceptor.tasks.TARGETS
# With "format:" before it, the name of an arm (64 characters in a database).
FormatName = Annotated[str, Field(min_length=1, max_length=57)]

# Algorithms of an update that learn from every reward of a group, good or bad.
POLICY_GRADIENTS = ("grpo", "rloo")
# An error message stays readable.
SHOWN_PROBLEMS = 20
_TOO_LONG = f"has more than {MAX_CONFIG_CHARACTERS} characters"

# The deepest key has three.
MAX_KEY_PARTS = 32
# Strings and comments of TOML, but for the line ends in them; and what stands between keys.
_TEXTS = re.compile(r'''"""[\s\S]*?"""|'{3}[\s\S]*?'{3}|"(?:\\.|[^"\\\n])*"|'[^'\n]*'|\#[^\n]*''')
_BETWEEN_KEYS = re.compile(r"[,={}\[\]]")

# Paired differences of fewer tasks are below two of their standard errors by chance too often.
LEAST_CANARY = 4


class Section(BaseModel):
    """A table of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)  # JSON has no infinity


class TaskConfig(Section):
    """Where the tasks come from: a world that ships, or files of your own."""

    world: Literal["almanac", "mosaic"] | None = None
    path: PathText | None = Field(None, description="a .json, .jsonl or folder; see `preceptor tasks check`")
    solutions_path: PathText | None = Field(
        None, description="outputs of the queries in `path`; default: x_solutions.json beside x_challenges.json"
    )
    heldout_path: PathText | None = Field(None, description="tasks of the final measurement; default: split off `path`")
    heldout_solutions_path: PathText | None = Field(None, description="outputs of the queries in `heldout_path`")
    probes_path: PathText | None = Field(None, description="JSONL of {question, answer}: what the student knew before")
    replay_path: PathText | None = Field(None, description="text file, one document a line: what replay draws from")
    train: int = Field(48, ge=1, le=MAX_TASKS, description="tasks to train on, at most")
    questions: Literal["given", "written"] = Field(
        "given", description="written: the untrained teacher writes the reward questions of the training tasks"
    )
    canary: int = Field(
        0, ge=0, le=10_000, description="labelled training tasks that watch a run without labels; 0: none"
    )
    heldout: int = Field(32, ge=0, le=MAX_TASKS, description="tasks of the final measurement, at most; 0: none")

    def check_canary(self, labelled: int, tasks: int) -> None:
        """Raises PreceptorError(BAD_CONFIG) where ``tasks`` training tasks, ``labelled`` of them with labelled reward
        questions, are too few for the canary."""
        if labelled < self.canary:
            problem = f"a canary of {self.canary} needs as many tasks with labelled questions; there are {labelled}"
        elif self.canary and self.canary == tasks:
            problem = f"all {tasks} training tasks are set aside as canary; none is left to train on"
        else:
            return
        raise PreceptorError("BAD_CONFIG", problem, field="tasks.canary")

    @model_validator(mode="after")
    def _enough_to_see_something(self) -> TaskConfig:
        if 0 < self.canary < LEAST_CANARY:
            raise ValueError(f"canary = {self.canary} can show nothing clearly; use {LEAST_CANARY} or more, or 0")
        return self

    @model_validator(mode="after")
    def _one_source(self) -> TaskConfig:
        if (self.world is None) == (self.path is None):
            raise ValueError("give exactly one of tasks.world and tasks.path")
        return self


class LimitConfig(Section):
    """What a directive may ask for; a self-edit that asks for more is malformed, and one whose training would cost
    more than ``max_trained_characters`` is too costly."""

    min_learning_rate: float = Field(1e-6, gt=0, le=1)
    max_learning_rate: float = Field(1e-1, gt=0, le=1)
    min_epochs: Epochs = 1
    max_epochs: Epochs = 64
    max_replay_share: ReplayShare = 0.9
    max_rank: Rank = 128
    max_documents: int = Field(512, ge=1, le=MAX_DOCUMENTS)
    targets: tuple[Targets, ...] = Field(("qv", "attention", "mlp", "all"), min_length=1)
    allow_full: bool = Field(False, description="a directive may ask for a full fine-tune (fine_tuning=full)")
    max_trained_characters: int = Field(
        0, ge=0, lt=2**63, description="of the documents, times epochs, replay included; 0: no limit"
    )

    @model_validator(mode="after")
    def _ordered(self) -> LimitConfig:
        for name in ("learning_rate", "epochs"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if low > high:
                raise ValueError(f"min_{name} = {low} is above max_{name} = {high}")
        return self


class TeacherConfig(Section):
    """How self-edits are asked for."""

    policy: Name = Field("", description="the policy that the rounds begin with; empty: the untrained teacher")
    limits: LimitConfig = LimitConfig()
    prompt_format: Name = "open"
    temperature: float = Field(1.0, ge=MIN_TEMPERATURE, le=5)
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(512, ge=1, le=32_768)
    max_resamples: int = Field(1, ge=0, le=16)


class RoundsConfig(Section):
    """The outer loop."""

    count: int = Field(3, ge=0, le=10_000, description="0: only the held-out measurement")
    tasks: int = Field(16, ge=1, le=MAX_TASKS, description="tasks per round, drawn from the training tasks in turn")
    self_edits: int = Field(8, ge=1, le=MAX_SELF_EDITS, description="self-edits per task")
    max_failed_share: Share = Field(0.5, description="a round in which more evaluations fail ends the run")
    staleness: int = Field(
        0, ge=0, le=8, description="so many rounds are written ahead, by an older policy, while one is measured"
    )


class UpdateConfig(Section):
    """How the teacher learns from rewards."""

    algorithm: Literal["rest_em", "grpo", "rloo", "none"] = Field(
        "rest_em", description="none: the teacher stays as it is"
    )
    top_k: int = Field(2, ge=1, le=MAX_SELF_EDITS)
    min_reward: float = Field(0.0, ge=-MAX_REWARD, le=MAX_REWARD)
    min_advantage: Threshold = 0.0
    min_reward_z: Threshold = Field(0.0, description="keep what is so many of its errors above min_reward")
    min_advantage_z: Threshold = Field(0.0, description="keep what is so many errors better than its group")
    rank: Rank = 16
    alpha: Alpha = 32.0
    learning_rate: float = Field(1e-3, gt=0, le=1)
    epochs: Epochs = 2
    batch_size: BatchSize = 8
    clip: float = Field(0.2, gt=0, le=1, description="grpo, rloo: bounds of the ratio to the policy that wrote")
    kl: float = Field(0.0, ge=0, le=MAX_KL, description="grpo, rloo: weight of divergence from the untrained teacher")
    diversity: float = Field(0.0, ge=0, le=MAX_WEIGHT, description="earned for being unlike the others of the group")

    @model_validator(mode="after")
    def _divergence_is_of_gradients(self) -> UpdateConfig:
        if self.kl and self.algorithm not in POLICY_GRADIENTS:
            raise ValueError(f"kl = {self.kl:g} means nothing to {self.algorithm}; leave it out")
        return self


class TrainingConfig(Section):
    """How the student is fine-tuned; a directive overrides rank, learning rate, epochs, replay and loss mask.

    With a recipe nothing does: it sets every key but ``loss_marker`` and ``include_passage``, directives are not
    followed, and a key beside it must say what the recipe says.
    """

    recipe: Literal["seal-compat"] | None = Field(None, description="a published way to fine-tune (preceptor.recipes)")
    full: bool = Field(False, description="train all weights, one trial at a time, instead of adapters")
    rank: Rank = 8
    alpha: Alpha = 16.0
    target_modules: tuple[Annotated[Name, Field(pattern=r"^[A-Za-z0-9_.-]+$")], ...] = Field(
        TARGETS["all"],
        min_length=1,
        max_length=MAX_TARGET_MODULES,
    )
    learning_rate: float = Field(3e-3, gt=0, le=1)
    epochs: Epochs = 8
    batch_size: BatchSize = Field(8, description="documents of one optimiser step")
    gradient_accumulation: BatchSize = Field(1, description="a step takes batch_size x so many documents")
    max_steps: int = Field(0, ge=0, lt=2**32, description="optimiser steps of a trial, at most; 0: no limit")
    warmup_share: Share = 0.1
    schedule: Schedule = "linear"
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0, description="a very large number switches clipping off")
    replay_share: ReplayShare = 0.0
    loss_mask: Literal["all", "after_marker", "outputs_only"] = "all"
    loss_marker: Name = Field("Answer:", min_length=1)
    max_train_tokens: int = Field(0, ge=0, lt=2**63, description="training budget of a trial in tokens; 0: none")
    max_document_tokens: int = Field(0, ge=0, lt=2**32, description="0: the student's context")
    pad_to: int = Field(0, ge=0, lt=2**32, description="cut or pad documents, pads in the loss; at most the context")
    include_passage: bool = False

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, values: Any) -> Any:
        recipe = values.get("recipe") if isinstance(values, dict) else None
        return {**RECIPES[recipe], **values} if isinstance(recipe, str) and recipe in RECIPES else values

    @model_validator(mode="after")
    def _keeps_to_the_recipe(self) -> TrainingConfig:
        fixed = RECIPES[self.recipe] if self.recipe else {}
        if other := [name for name, value in fixed.items() if getattr(self, name) != value]:
            raise ValueError(
                f"the recipe {self.recipe} has "
                + ", ".join(f"{name} = {fixed[name]!r} (not {getattr(self, name)!r})" for name in other)
                + "; leave out these keys or the recipe"
            )
        return self


class AnswerConfig(Section):
    """How the student is asked."""

    prompt: str = Field("Question: {question}\nAnswer:", max_length=MAX_QUESTION_CHARACTERS)
    # Extractive answers of real reading tests have up to about 30 words; a longer gold answer than this is refused.
    max_new_tokens: int = Field(32, ge=1, le=MAX_NEW_TOKENS)

    @model_validator(mode="after")
    def _has_question(self) -> AnswerConfig:
        if "{question}" not in self.prompt:
            raise ValueError("answers.prompt needs {question}")
        return self


class RaceConfig(Section):
    """Measures the best candidates of a group well and the others only as far as it takes to know that they are not."""

    look_steps: int = Field(0, ge=0, le=100_000, description="optimiser steps of the first look at all; 0: none")
    look_keep: float = Field(0.5, gt=0, le=1, description="share of a group that goes on after the look")
    max_seeds: Seeds = Field(3, description="fine-tunes of one self-edit, at most")
    budget: float = Field(2.0, ge=1, le=64, description="fine-tunes per self-edit on average, looks by their tokens")
    z: float = Field(1.0, ge=0, le=10, description="standard errors that make a difference clear")


class RewardConfig(Section):
    """What a self-edit earns: the weighted terms of ``evaluator.reward``, and how well they are measured."""

    seeds: Seeds = Field(1, description="fine-tunes per self-edit")
    grader: Literal["exact", "lexical", "grid", "judge", "cascade"] = Field(
        "exact", description="who says what is right; judge and cascade need PRECEPTOR_JUDGE_URL"
    )
    gain: Weight = 1.0
    retention_loss: Cost = 0.3
    gold_logprob_gain: Weight = Field(0.0, description="per nat")
    gold_probability_gain: Weight = 0.0
    overlap: Cost = Field(1.0, description="per copied question's share")
    tokens: Cost = Field(0.0, description="per thousand trained tokens")
    seconds: Cost = Field(0.0, description="per second of a worker; a run with it is not the same twice")
    certainty_gain: Weight = Field(0.0, description="without labels: per nat")
    agreement_gain: Weight = Field(0.0, description="without labels; needs reward.samples")
    samples: int = Field(0, ge=0, le=MAX_SAMPLES, description="answers sampled per question, for their agreement")
    probes: int = Field(32, ge=0, le=MAX_PROBES, description="retention probes asked in training rounds, at most")
    # 8 fill a step on a CPU: more gain nothing there, and are waited for longer (docs/log.md).
    trials_together: int = Field(
        8, ge=1, le=MAX_SELF_EDITS, description="trials sent in one request, at least; a GPU wants more"
    )
    fresh_seeds: int = Field(
        0, ge=0, le=MAX_SEEDS, description="fine-tunes of a group's best on new seeds, which alone count then; 0: none"
    )
    race: RaceConfig | None = Field(None, description="stop measuring self-edits that cannot be among the best")

    @property
    def needs_answers(self) -> bool:
        """Whether gold answers have a part in the reward."""
        return any((self.gain, self.gold_logprob_gain, self.gold_probability_gain))

    @model_validator(mode="after")
    def _makes_sense(self) -> RewardConfig:
        if not (self.needs_answers or self.certainty_gain or self.agreement_gain):
            raise ValueError("no term with a weight can be earned: set gain, gold_logprob_gain or another gain")
        if self.agreement_gain and not self.samples:
            raise ValueError("agreement_gain compares sampled answers; set samples, e.g. samples = 8")
        if self.race is not None and self.race.max_seeds < self.seeds:
            raise ValueError(f"race.max_seeds = {self.race.max_seeds} is less than seeds = {self.seeds}")
        if self.race is not None and self.race.look_steps and not self.needs_answers:
            raise ValueError("race.look_steps looks at gold answers, and no weight does; set it to 0")
        return self


class LabelConfig(Section):
    """Where labels are missing: how ``tasks.questions = "written"`` are written, how ``tasks.canary`` is looked at."""

    completions: int = Field(4, ge=2, le=64, description="completions per passage that questions are taken from")
    agreement: Share = Field(0.6, description="share of the completions with a question that must answer it alike")
    canary_self_edits: int = Field(4, ge=1, le=64, description="self-edits per canary task and look")


class AugmentationConfig(Section):
    """Variants of the demonstrations that a few-shot task is trained on (``preceptor.tasks.Augmentations``)."""

    basic: bool = Field(False, description="rotations, flips, reflections, transposition, translation")
    size: bool = Field(False, description="cells doubled and tripled in size")
    chain: bool = Field(False, description="two of the others, one after the other")
    repeat: bool = Field(False, description="grids repeated along an axis")
    colours: bool = Field(True, description="permuted colours")


class FixedStrategy(Section):
    """One prompt format and one directive, for every passage; of few-shot tasks a directive alone."""

    prompt_format: Name = Field("", description="of passages; empty: teacher.prompt_format")
    learning_rate: float = Field(gt=0, le=1)
    epochs: Epochs
    replay_share: ReplayShare = 0.0
    rank: Rank | None = None
    targets: Targets | None = None
    loss_mask: Literal["all", "after_marker", "outputs_only"] | None = None
    augmentations: AugmentationConfig | None = Field(None, description="of few-shot tasks alone")


class FewShotConfig(Section):
    """How few-shot tasks (ARC) become training documents and questions."""

    max_documents: int = Field(64, ge=1, le=MAX_DOCUMENTS, description="training tasks made of the demonstrations")
    votes: int = Field(1, ge=1, le=64, description="views of a query that vote on its answer")
    separator: Literal["", " "] = Field("", description="what stands between the cells of a row")


class HeldoutConfig(Section):
    """The final measurement."""

    seeds: Seeds = Field(1, description="fine-tunes per self-edit")
    formats: tuple[FormatName, ...] = Field(
        (), max_length=64, description="prompt formats, each an arm `format:NAME` of the untrained teacher"
    )
    in_context: bool = Field(False, description="an arm that has the text before each question: the ceiling")
    external_teacher: bool = Field(
        False, description="an arm written by the teacher at PRECEPTOR_EXTERNAL_TEACHER_ADDRESS"
    )
    fixed_strategies: tuple[FixedStrategy, ...] = Field(
        (), max_length=64, description="candidates; the best on training passages becomes the arm fixed_strategy"
    )
    selection_tasks: int = Field(8, ge=1, le=MAX_TASKS, description="training passages that choose the fixed strategy")
    bootstrap_resamples: int = Field(2000, ge=100, le=100_000)

    @field_validator("formats")
    @classmethod
    def _each_once(cls, formats: tuple[str, ...]) -> tuple[str, ...]:
        for name in formats:
            if formats.count(name) > 1:
                raise ValueError(f"names {name!r} more than once; each is one arm")
        return formats


class StudentConfig(Section):
    """Which student; the active one at the start of the run where nothing is said."""

    name: Name = ""


class RunConfig(Section):
    """One experiment."""

    name: str = Field("run", pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    seed: int = Field(0, ge=0, lt=2**31, description="governs everything, the world's passages too")
    tasks: TaskConfig
    student: StudentConfig = StudentConfig()
    teacher: TeacherConfig = TeacherConfig()
    rounds: RoundsConfig = RoundsConfig()
    update: UpdateConfig = UpdateConfig()
    training: TrainingConfig = TrainingConfig()
    answers: AnswerConfig = AnswerConfig()
    reward: RewardConfig = RewardConfig()
    labels: LabelConfig = LabelConfig()
    few_shot: FewShotConfig = FewShotConfig()
    heldout: HeldoutConfig = HeldoutConfig()

    @model_validator(mode="after")
    def _recipe_is_the_only_strategy(self) -> RunConfig:
        if self.training.recipe and self.heldout.fixed_strategies:
            raise ValueError("heldout.fixed_strategies set rate and epochs, which training.recipe fixes; leave one out")
        return self

    @model_validator(mode="after")
    def _gradients_need_every_reward(self) -> RunConfig:
        name = self.update.algorithm
        if name not in POLICY_GRADIENTS:
            return self
        if self.rounds.self_edits < 2:
            raise ValueError(f"update.algorithm = {name} compares the self-edits of a task; rounds.self_edits is 1")
        if self.reward.race is not None or self.reward.fresh_seeds:
            raise ValueError(
                f"update.algorithm = {name} learns from poor self-edits too, which a race and fresh seeds leave "
                "unmeasured: --set reward.race= --set reward.fresh_seeds=0"
            )
        return self

    @property
    def most_seeds(self) -> int:
        """The most seeds that any of the run's self-edits is measured with."""
        reward = self.reward
        return max(reward.seeds, reward.fresh_seeds, reward.race.max_seeds if reward.race else 0, self.heldout.seeds)

    @model_validator(mode="after")
    def _a_group_fits_into_a_request(self) -> RunConfig:
        trials = self.rounds.self_edits * self.most_seeds
        if trials > MAX_TRIALS:
            raise ValueError(
                f"rounds.self_edits = {self.rounds.self_edits} with up to {self.most_seeds} seeds each are {trials}"
                f" trials of one task; at most {MAX_TRIALS} are measured together"
            )
        return self

    def to_json(self) -> str:
        """Canonical JSON of the resolved config."""
        return canonical_json(self.model_dump(mode="json"))

    def digest(self) -> str:
        """SHA-256 of ``to_json()``."""
        return sha256(self.to_json())


def parse_config_json(text: str) -> RunConfig:
    """The config in a CreateRun request. Raises PreceptorError(BAD_CONFIG)."""
    if len(text) > MAX_CONFIG_CHARACTERS:
        raise PreceptorError("BAD_CONFIG", _TOO_LONG, field="config_json")
    try:
        return RunConfig.model_validate_json(text)
    except ValidationError as error:
        raise _bad_config(error, "config_json", "") from None


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The config in ``path`` (None: nothing but defaults) with ``key.path=value`` overrides: values in TOML, a bare
    word is a string, nothing takes the key back.

    Raises PreceptorError(FILE_NOT_FOUND, BAD_CONFIG) naming file, line and key.
    """
    text = "" if path is None else _read(path)
    if (line := _long_key(text)) is not None:
        raise PreceptorError("BAD_CONFIG", f"has a key of more than {MAX_KEY_PARTS} parts", file=str(path), line=line)
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError; an integer of thousands of digits; nested deeply
        found = re.search(r"line (\d+)", str(error))
        raise PreceptorError(
            "BAD_CONFIG", f"is not valid TOML: {error}", file=str(path), **({"line": found[1]} if found else {})
        ) from None
    for override in overrides:
        _apply(values, override)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise _bad_config(error, str(path or ""), text, overrides) from None


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CONFIG_CHARACTERS + 1)
    except FileNotFoundError:
        raise PreceptorError("FILE_NOT_FOUND", f"there is no config file {path}", file=str(path)) from None
    except (OSError, ValueError) as error:  # not UTF-8, or a NUL in the path
        raise PreceptorError("BAD_CONFIG", f"cannot be read: {error}", file=str(path)) from None
    if len(text) > MAX_CONFIG_CHARACTERS:
        raise PreceptorError("BAD_CONFIG", _TOO_LONG, file=str(path))
    return text


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, raw = override.partition("=")
    shown, field = f"--set {_cut(override)!r}", _cut(key or override)
    if len(override) > MAX_CONFIG_CHARACTERS:
        raise PreceptorError("BAD_CONFIG", f"{shown} {_TOO_LONG}", field=field)
    if key.count(".") >= MAX_KEY_PARTS or _long_key(raw) is not None:
        raise PreceptorError("BAD_CONFIG", f"{shown} has a key of more than {MAX_KEY_PARTS} parts", field=field)
    if not equals or not key:
        raise PreceptorError("BAD_CONFIG", f"{shown} is not KEY=VALUE", field=field)
    try:
        value = tomllib.loads(f"v = {raw}")["v"]
    except tomllib.TOMLDecodeError:
        value = raw
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; nested too deeply
        raise PreceptorError("BAD_CONFIG", f"{shown} cannot be read: {error}", field=field) from None
    if any("\ud800" <= char <= "\udfff" for char in override):  # how Python passes bytes that are not UTF-8
        raise PreceptorError("BAD_CONFIG", f"{shown} is not UTF-8", field=ascii(field))
    *tables, last = key.split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise PreceptorError(
                "BAD_CONFIG", f"--set {_cut(override)!r}: {_cut(table)} is not a table", field=_cut(key)
            )
    if raw:
        values[last] = value
    else:
        values.pop(last, None)


def _long_key(text: str) -> int | None:
    """The line of a dotted key that tomllib, whose time grows with the square of its parts, would take minutes for."""
    bare = _TEXTS.sub(lambda found: "\n" * found[0].count("\n"), text)
    for number, line in enumerate(bare.split("\n"), 1):
        if any(part.count(".") >= MAX_KEY_PARTS for part in _BETWEEN_KEYS.split(line)):
            return number
    return None


def _bad_config(error: ValidationError, file: str, text: str, overrides: Sequence[str] = ()) -> PreceptorError:
    """All problems in one message; the place is that of the first, which may be an override."""
    problems = error.errors(include_url=False)
    lines = []
    for problem in problems[:SHOWN_PROBLEMS]:
        key = _cut(".".join(str(part) for part in problem["loc"]))
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown key {key}")
        else:
            shown = "" if problem["type"] == "missing" else f" (given: {_shown(problem['input'])})"
            said = _cut(problem["msg"].removeprefix("Value error, "), 500)
            lines.append(f"{key}: {said}{shown}" if key else said)
    if (more := len(problems) - SHOWN_PROBLEMS) > 0:
        lines.append(f"and {more} more")
    first = problems[0]["loc"]
    place: dict[str, str | int] = {"field": _cut(".".join(str(part) for part in first))} if first else {}
    if given := [override for override in overrides if place and override.startswith(f"{place['field']}=")]:
        lines[0] = lines[0].removeprefix(f"{place['field']}: ")
        return PreceptorError("BAD_CONFIG", f"--set {_cut(given[-1])}: {'; '.join(lines)}", **place)
    if (line := _line_of(text, first)) is not None:
        place["line"] = line
    return PreceptorError("BAD_CONFIG", "; ".join(lines), file=file, **place)


def _line_of(text: str, location: tuple[int | str, ...]) -> int | None:
    """The line of a key or table, found by reading from top to bottom (tomllib keeps no places)."""
    *tables, key = [part for part in location if isinstance(part, str)] or [""]
    current: list[str] = []
    for number, line in enumerate(text.splitlines() if key else (), 1):
        if header := re.match(r"\s*\[\[?([^\[\]]+)\]", line):
            current = [part.strip() for part in header[1].split(".")]
            if current == [*tables, key]:
                return number
        elif re.match(rf"\s*{re.escape(key)}\s*=", line) and current == tables:
            return number
    return None


def _shown(value: Any) -> str:
    """A value as it was given, or the beginning of it."""
    try:
        return json.dumps(value, default=str)[:80]
    except (ValueError, RecursionError):  # an integer of thousands of digits; nested too deeply
        return f"a {type(value).__name__} that is too large to show"


def _cut(text: str, most: int = 200) -> str:
    return text if len(text) <= most else text[:most] + "..."
