"""Many passages at once (the paper's continued pretraining): the self-edits of n passages, one update, all questions.

For each seed the teacher of the knowledge experiment's run; its held-out passages in groups of n, for several n. Each
arm's documents of a group's passages are one self-edit, the passages one task (``preceptor.union``). All arms have the
same token budget, n times that of one passage, whatever they have written: a smaller text is read more often. An update
is an adapter of high rank on all layers, or a change of all weights. What a good learning rate is depends on all of
this; so for every arm, n and kind it is the best of LEARNING_RATES on *training* passages of the first seed.

Directives are not followed: one update has one, and here it is chosen as said. The last sections vary the budget at the
largest n: what more tokens bring.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from preceptor import arms
from preceptor.config import RunConfig
from preceptor.convert import for_teacher, question_to_proto, task_to_proto
from preceptor.errors import PreceptorError
from preceptor.limits import MAX_EPOCHS
from preceptor.names import derived_seed
from preceptor.protocols import directive_limits, evaluation_protocol, own_text
from preceptor.racing import SUCCEEDED
from preceptor.reproduce import knowledge
from preceptor.reproduce.experiment import Findings, Options, PlainTable, Step
from preceptor.reproduce.lab import Lab
from preceptor.reproduce.report import file_name
from preceptor.reproduce.runs import in_order, step_of
from preceptor.reproduce.table import Arm, Outcome, Section, arm_values, pairs_with
from preceptor.task_sources import RunTasks, gather_tasks, passages_of
from preceptor.union import Union, union_edit, union_task
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import teacher_pb2 as teacher
from preceptor.v1 import types_pb2 as types

SIZES = (1, 4, 16)
PASSAGES = 16  # of each seed; the same for every n
BUDGETS = (0.25, 0.5, 2.0)  # of the budget, at the largest n
# High rank: two thirds of the tiny student's width.
LORA, FULL = "LoRA rank 64", "full fine-tuning"
KINDS: Mapping[str, Mapping[str, object]] = {LORA: {"rank": 64, "alpha": 64.0, "full": False}, FULL: {"full": True}}
LEARNING_RATES: Mapping[str, Sequence[float]] = {LORA: (1e-3, 3e-3, 1e-2), FULL: (3e-4, 1e-3, 3e-3)}
REPLAY_SHARE = 0.25
# Of one update, drawn evenly from its passages: more are asked for longer than they are taught.
QUESTION_CAP = 1000
BUDGET_OF_A_PASSAGE = 1500  # tokens, where the run's config names none
TAUGHT = (arms.PASSAGE, arms.UNTRAINED, arms.FIXED, arms.TRAINED, arms.ORACLE)


@dataclass(frozen=True, slots=True)
class Setting:
    """How one group is taught."""

    kind: str
    size: int
    share: float = 1.0  # of the budget

    @property
    def words(self) -> str:
        """For people."""
        budget = "" if self.share == 1 else f", {self.share:g} of the budget"
        return f"{self.kind}, {self.size} passage{'' if self.size == 1 else 's'} at once{budget}"


# A full fine-tune is trained alone, so single passages, of which there are most, are left to adapters.
SETTINGS = (*(Setting(LORA, size) for size in SIZES), *(Setting(FULL, size) for size in SIZES if size > 1))
MORE = tuple(Setting(LORA, max(SIZES), share) for share in BUDGETS)


def steps(options: Options) -> Sequence[Step]:
    """The runs first; then the choice of learning rates, then each seed's groups."""
    found = []
    for seed in range(options.seeds):
        config = knowledge.config_for(options, _student(options), seed)
        found.append(step_of(f"seed {seed}: a teacher is trained", config))
    tokens = budget(config) * PASSAGES
    groups = [(setting, PASSAGES // setting.size) for setting in SETTINGS]
    rates = sum(len(LEARNING_RATES[setting.kind]) * len(TAUGHT) * _groups_to_choose(setting) for setting, _ in groups)
    trained = budget(config) * sum(
        setting.size * len(LEARNING_RATES[setting.kind]) * len(TAUGHT) * _groups_to_choose(setting)
        for setting in SETTINGS
    )
    found.append(Step("learning rates are chosen on training passages", rates, trained))
    for seed in range(options.seeds):
        for setting, count in groups:
            step = Step(f"seed {seed}: {setting.words}", count * len(TAUGHT), tokens * len(TAUGHT))
            found.append(step)
        more = tokens * sum(BUDGETS) * len(TAUGHT)
        found.append(Step(f"seed {seed}: other budgets", len(MORE) * len(TAUGHT), more))
    return found


def budget(config: RunConfig) -> int:
    """Tokens of one passage's training."""
    return config.training.max_train_tokens or BUDGET_OF_A_PASSAGE


def _student(options: Options) -> str:
    if len(options.students) > 1:
        raise PreceptorError("INVALID_REQUEST", "batch takes one student", field="students")
    return options.students[0] if options.students else knowledge.STUDENT


def _groups_to_choose(setting: Setting) -> int:
    return 4 if setting.size == 1 else 1


@dataclass(frozen=True, slots=True)
class Authors:
    """A seed's run: its tasks, its teacher, and what each arm writes with."""

    seed: int
    config: RunConfig
    train: Sequence[types.Task]
    heldout: Sequence[types.Task]
    tasks: RunTasks
    ways: Mapping[str, tuple[str, str]]  # arm -> policy, prompt format
    student: types.PinnedStudent


@dataclass(frozen=True, slots=True)
class Material:
    """What each arm wrote about some tasks; None where it was malformed."""

    edits: Mapping[str, Sequence[types.SelfEdit | None]]

    def union(self, arm: str, places: range, learning_rate: float) -> types.SelfEdit:
        """The documents of these passages, with the directive of the update. Raises PreceptorError(INVALID_REQUEST)."""
        edit = union_edit([edit for place in places if (edit := self.edits[arm][place]) is not None])
        edit.directive.CopyFrom(
            types.Directive(learning_rate=learning_rate, epochs=MAX_EPOCHS, replay_share=REPLAY_SHARE)
        )
        return edit


def measure(lab: Lab, options: Options) -> Findings:
    """Raises PreceptorError(TOO_MANY_FAILURES) where no teacher could be trained or nothing was measured."""
    authors: dict[int, Authors] = {}
    for seed in range(options.seeds):
        lab.step()
        config = knowledge.config_for(options, _student(options), seed)
        made = lab.attempt(f"seed {seed}: the teacher", _authors(lab, config))
        if made is not None:
            authors[seed] = made
    if not authors:
        raise PreceptorError("TOO_MANY_FAILURES", f"no teacher was trained; the first: {lab.failures[0].message}")
    lab.step()
    rates = choose_rates(lab, next(iter(authors.values())))
    found: dict[Setting, dict[str, Arm]] = {setting: {} for setting in (*SETTINGS, *MORE)}
    left_out = malformed = 0
    for seed in range(options.seeds):
        material = None
        for number, setting in enumerate((*SETTINGS, *MORE)):
            if number <= len(SETTINGS):  # the other budgets are one step
                lab.step()
            if seed not in authors:
                continue  # said already
            if material is None:
                heldout = authors[seed].heldout[:PASSAGES]
                material = lab.attempt(f"seed {seed}: writing", _written(lab, authors[seed], heldout, "heldout"))
                if material is None:
                    continue
                malformed += sum(edit is None for edits in material.edits.values() for edit in edits)
            left = lab.attempt(
                f"seed {seed}: {setting.words}", _taught(lab, authors[seed], material, setting, rates, found[setting])
            )
            left_out = max(left_out, left or 0)
    if not any(found.values()):
        raise PreceptorError("TOO_MANY_FAILURES", f"nothing was measured; the first: {lab.failures[0].message}")
    return findings(found, rates, authors, left_out, malformed)


def _authors(lab: Lab, config: RunConfig) -> Callable[[], Authors]:
    def make() -> Authors:
        summary = lab.run(config)
        base, trained = summary["policies"][0], summary["policies"][-1]
        usual = config.teacher.prompt_format
        ways = {arms.UNTRAINED: (base, usual), arms.TRAINED: (trained, usual)}
        if fixed := (summary.get("heldout") or {}).get("fixed_strategy"):
            ways[arms.FIXED] = (base, fixed["prompt_format"])
        tasks = gather_tasks(config)
        train, heldout = passages_of(tasks.train), passages_of(tasks.heldout)
        return Authors(
            seed=config.seed,
            config=config,
            train=[task_to_proto(task) for task in train],
            heldout=[task_to_proto(task) for task in heldout],
            tasks=tasks,
            ways=ways,
            student=lab.student(config.student.name).pinned,
        )

    return make


def _written(lab: Lab, authors: Authors, tasks: Sequence[types.Task], split: str) -> Callable[[], Material]:
    """Of held-out tasks the very self-edits that the run has measured one by one."""

    def make() -> Material:
        edits: dict[str, Sequence[types.SelfEdit | None]] = {
            arms.PASSAGE: [own_text(task, authors.config.training) for task in tasks]
        }
        if all(arms.ORACLE in task.reference_edits for task in tasks):
            edits[arms.ORACLE] = [task.reference_edits[arms.ORACLE] for task in tasks]
        for arm, (policy, prompt_format) in authors.ways.items():
            groups = lab.write(generation(authors.config, policy, prompt_format, tasks, split))
            edits[arm] = [
                group.self_edits[0].self_edit if group.self_edits[0].status == teacher.SELF_EDIT_STATUS_VALID else None
                for group in groups
            ]
        return Material({arm: edits[arm] for arm in TAUGHT if arm in edits})

    return make


def generation(
    config: RunConfig, policy: str, prompt_format: str, tasks: Sequence[types.Task], split: str
) -> teacher.GenerateSelfEditsRequest:
    """One self-edit for each task, sampled as a run samples its held-out ones."""
    settings = config.teacher
    return teacher.GenerateSelfEditsRequest(
        policy_id=policy,
        tasks=[for_teacher(task) for task in tasks],
        samples_per_task=1,
        prompt_format=prompt_format,
        sampling=teacher.SamplingSettings(
            temperature=settings.temperature, top_p=settings.top_p, max_new_tokens=settings.max_new_tokens
        ),
        seed=derived_seed(config.seed, f"{split}-sampling"),
        max_resamples=settings.max_resamples,
        limits=directive_limits(config),
    )


def protocol_of(authors: Authors, setting: Setting) -> evaluator.EvaluationProtocol:
    """How a group is taught and asked: the run's own settings, but for how much and which weights are trained."""
    training = authors.config.training.model_copy(
        update={
            **KINDS[setting.kind],
            "max_train_tokens": round(budget(authors.config) * setting.size * setting.share),
            "recipe": None,
        }
    )
    return evaluation_protocol(
        authors.config.model_copy(update={"training": training}),
        bank=types.QUESTION_BANK_SEALED,
        probes=[question_to_proto(probe) for probe in authors.tasks.probes],
        replay_documents=authors.tasks.replay_documents,
        seeds=[derived_seed(authors.seed, "batch")],
    )


def choose_rates(lab: Lab, authors: Authors) -> dict[tuple[str, int, str], float]:
    """The best learning rate of every arm for every kind and n, on training passages, by right answers to the gate
    questions; the middle one where that could not be measured."""
    chosen = {
        (setting.kind, setting.size, arm): LEARNING_RATES[setting.kind][1] for setting in SETTINGS for arm in TAUGHT
    }
    tasks = authors.train[: max(SIZES)]
    material = lab.attempt("learning rates: writing", _written(lab, authors, tasks, "batch"))
    if material is None:
        return chosen
    for setting in SETTINGS:
        places = [range(at * setting.size, (at + 1) * setting.size) for at in range(_groups_to_choose(setting))]
        if places[-1].stop > len(tasks):
            continue
        protocol = protocol_of(authors, setting)
        protocol.bank = types.QUESTION_BANK_GATE
        rates = LEARNING_RATES[setting.kind]

        def ask(
            material: Material = material,
            places: Sequence[range] = places,
            setting: Setting = setting,
            protocol: evaluator.EvaluationProtocol = protocol,
            rates: Sequence[float] = rates,
        ) -> None:
            unions = [_union(tasks, place, types.QUESTION_BANK_GATE) for place in places]
            asked = [
                (union.task, [material.union(arm, place, rate) for arm in material.edits for rate in rates])
                for union, place in zip(unions, places, strict=True)
            ]
            groups = lab.evaluate(f"learning rates: {setting.words}", asked, protocol, authors.student)
            for number, arm in enumerate(material.edits):
                values = []
                for at in range(len(rates)):
                    ours = [evaluations[number * len(rates) + at] for evaluations in groups]
                    known = [of.reward.accuracy for of in ours if of.state == SUCCEEDED]
                    values.append(fmean(known) if known else -1.0)
                if max(values) >= 0:
                    chosen[setting.kind, setting.size, arm] = rates[values.index(max(values))]

        lab.attempt(f"learning rates: {setting.words}", ask)
    return chosen


def _union(tasks: Sequence[types.Task], places: range, bank: types.QuestionBank.ValueType) -> Union:
    """The passages at these places, with as many questions of each as QUESTION_CAP has room for."""
    capped = []
    for place in places:
        task = types.Task()
        task.CopyFrom(tasks[place])
        asked = [question for question in task.passage.questions if question.bank == bank]
        del task.passage.questions[:]
        task.passage.questions.extend(asked[: max(1, QUESTION_CAP // len(places))])
        capped.append(task)
    return union_task(capped, bank)


def _taught(
    lab: Lab,
    authors: Authors,
    material: Material,
    setting: Setting,
    rates: Mapping[tuple[str, int, str], float],
    found: dict[str, Arm],
) -> Callable[[], int]:
    """Teaches all groups of a setting; gives the questions that could not be asked, since two passages contradict."""

    def teach() -> int:
        count = len(next(iter(material.edits.values()))) // setting.size
        if not count:
            raise PreceptorError("INVALID_REQUEST", f"needs {setting.size} held-out passages", field="tasks.heldout")
        places = [range(at * setting.size, (at + 1) * setting.size) for at in range(count)]
        unions = [_union(authors.heldout, place, types.QUESTION_BANK_SEALED) for place in places]
        taught = list(material.edits)
        asked = [
            (union.task, [material.union(arm, place, rates[setting.kind, setting.size, arm]) for arm in taught])
            for union, place in zip(unions, places, strict=True)
        ]
        words = f"seed {authors.seed}: {setting.words}"
        groups = lab.evaluate(words, asked, protocol_of(authors, setting), authors.student)
        add_outcomes(found, authors.seed, authors.heldout, list(zip(places, unions, groups, strict=True)), taught)
        return sum(union.left_out for union in unions)

    return teach


def add_outcomes(
    found: dict[str, Arm],
    seed: int,
    tasks: Sequence[types.Task],
    groups: Sequence[tuple[range, Union, Sequence[evaluator.Evaluation]]],
    taught: Sequence[str],
) -> None:
    """Adds what came of groups (their places, their union, an evaluation for each arm) to the arms, by passage."""
    tokens: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    for places, union, evaluations in groups:
        untouched = False
        for name, evaluation in zip(taught, evaluations, strict=True):
            arm = found.setdefault(name, Arm(name))
            if evaluation.state != SUCCEEDED:
                arm.outcomes.update({(seed, tasks[place].id): None for place in places})
                continue
            (trial,) = evaluation.trials
            tokens.setdefault(name, []).append(trial.trained_tokens)
            seconds.setdefault(name, []).append(trial.seconds)
            arm.outcomes.update(_by_passage(seed, tasks, places, union, trial))
            if not untouched:
                untouched = True
                no_edit = found.setdefault(arms.NO_EDIT, Arm(arms.NO_EDIT))
                no_edit.outcomes.update(_by_passage(seed, tasks, places, union, evaluation.baseline))
    for name, values in tokens.items():
        found[name].tokens.append(fmean(values))
        found[name].seconds.append(fmean(seconds[name]))


def _by_passage(
    seed: int, tasks: Sequence[types.Task], places: range, union: Union, trial: evaluator.TrialReport
) -> dict[tuple[int, str], Outcome | None]:
    retention = trial.retention if trial.probes_correct else None
    return {
        (seed, tasks[place].id): Outcome(sum(correct), len(correct), retention)
        for place, correct in zip(places, union.by_passage(list(trial.correct)), strict=True)
        if correct
    }


# ---- what is said


def findings(
    found: Mapping[Setting, dict[str, Arm]],
    rates: Mapping[tuple[str, int, str], float],
    authors: Mapping[int, Authors],
    left_out: int,
    malformed: int,
) -> Findings:
    """Sections by kind and n, the curves, and what to know of them."""
    per_passage = budget(next(iter(authors.values())).config)
    sections = []
    for setting in SETTINGS:
        if not found[setting]:
            continue
        arms_here = in_order(list(found[setting].values()))
        chosen = ", ".join(
            f"{arm.words} {rates[setting.kind, setting.size, arm.name]:g}" for arm in arms_here if arm.name in TAUGHT
        )
        sections.append(
            Section(
                f"{setting.kind}-{setting.size}",
                setting.words[0].upper() + setting.words[1:],
                arms_here,
                pairs_with(arms.TRAINED, arms_here),
                caption=f"{per_passage * setting.size:,} tokens an update. Learning rates: {chosen}.",
            )
        )
    tables, pictures = [], {}
    for kind in KINDS:
        by_size = {size: here for size in SIZES if (here := found.get(Setting(kind, size)))}
        tables.append(_table(f"{kind}-n", f"{kind}: accuracy by passages at once", "passages at once", by_size))
        pictures[f"{file_name(kind)}-n"] = _curves(by_size, f"passages at once ({kind})")
        shares = sorted({1.0, *BUDGETS})
        size = max(SIZES)
        by_tokens = {
            round(per_passage * size * share): arms_there
            for share in shares
            if (arms_there := found.get(Setting(kind, size, share)))
        }
        if len(by_tokens) < 2:
            continue
        title = f"{kind}: accuracy by trained tokens, {size} passages at once"
        tables.append(_table(f"{kind}-tokens", title, "tokens an update", by_tokens))
        pictures[f"{file_name(kind)}-tokens"] = _curves(by_tokens, f"trained tokens, {size} passages at once ({kind})")
    notes = [
        "Passages of a group share one fine-tune, and intervals draw passages: what the luck of a whole update moves is"
        " not in them. With n = 16 there is one update a seed, so look at the seeds too.",
        "Learning rates of the other budgets are those that were chosen for the full one.",
    ]
    if left_out:
        notes.append(
            f"Up to {left_out} questions of a seed's {PASSAGES} passages were left out, because two passages of a group"
            " tell different things of the same person; their contradictory documents stayed in."
        )
    if malformed:
        notes.append(
            f"{malformed} malformed self-edits brought no documents; their passages are asked about all the same."
        )
    return Findings(
        title="Many passages at once",
        about="The self-edits of n passages are one update of the student, which is then asked about all of them."
        f" Every arm trains {per_passage:,} tokens a passage, {REPLAY_SHARE:.0%} of its documents replay.",
        sections=sections,
        tables=tables,
        pictures={name: svg for name, svg in pictures.items() if svg},
        notes=notes,
        data={
            "learning_rates": [
                {"kind": kind, "passages": size, "arm": arm, "learning_rate": rate}
                for (kind, size, arm), rate in rates.items()
            ],
            "replay_share": REPLAY_SHARE,
            "question_cap": QUESTION_CAP,
            "policies": {str(seed): dict(of.ways) for seed, of in authors.items()},
        },
    )


def _table(name: str, title: str, across: str, columns: Mapping[int, Mapping[str, Arm]]) -> PlainTable:
    names = [arm.name for arm in in_order([arm for found in columns.values() for arm in found.values()])]
    rows: list[list[str | float | int | None]] = []
    for arm in dict.fromkeys(names):
        cells: list[str | float | int | None] = []
        for found in columns.values():
            values = arm_values(found[arm]) if arm in found else None
            low, high = values["ci95"] if values and values["ci95"] else (None, None)
            cells.append(None if values is None or low is None else f"{values['accuracy']:.1%} [{low:.1%}, {high:.1%}]")
        rows.append([arms.words(arm), *cells])
    return PlainTable(file_name(name), title, [across, *(f"{column:,}" for column in columns)], rows)


def _curves(columns: Mapping[int, Mapping[str, Arm]], across: str) -> str:
    from preceptor.reproduce.pictures import lines

    series = []
    for name in TAUGHT:
        points = []
        for at, found in columns.items():
            values = arm_values(found[name]) if name in found else None
            if values and values["ci95"]:
                points.append((float(at), values["accuracy"], (values["ci95"][0], values["ci95"][1])))
        if points:
            series.append((arms.words(name), points))
    return lines(series, across, "right answers, %") if series else ""
