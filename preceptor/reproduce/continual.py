"""The paper's continual experiment: N passages one after the other, and what is left of each after every edit.

The student of edit i is the base with the edits before it merged into its weights (``PinnedStudent.adapters``). After
every edit it is asked the sealed questions of all N passages and all probes: a row of the forgetting matrix. Three
ways:

* **no replay**: an edit sees its own documents alone, so many times more often that it trains as many documents as
  with replay (as does, with replay, a first edit that has nothing to replay yet);
* **replay**: as many documents again and again, ``training.replay_share`` of all, from old material and from the
  documents of the earlier edits, ``EARLIER`` of the replay from the latter;
* **all at once**: one update on all documents with old material: what it would be if nobody had to wait.

All passages' documents are written once, by one policy under one prompt format, without a race: their directives are
not followed, and what the policy misread stays wrong in all three ways alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from preceptor.adapt.joint import JOINT_DEFAULTS, joint_config, joint_protocol
from preceptor.adapt.subject import read_subject
from preceptor.config import RunConfig
from preceptor.convert import for_teacher, task_to_proto
from preceptor.errors import PreceptorError
from preceptor.limits import MAX_EPOCHS
from preceptor.names import derived_seed
from preceptor.protocols import directive_limits
from preceptor.racing import SUCCEEDED
from preceptor.reproduce.experiment import Findings, Options, PlainTable, Step
from preceptor.reproduce.forgetting import Chain, Material, kept_of, matrix
from preceptor.reproduce.lab import Lab
from preceptor.reproduce.runs import check_full, config_of
from preceptor.statistics import Estimate
from preceptor.union import union_edit, union_task
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import teacher_pb2 as teacher
from preceptor.v1 import types_pb2 as types

STUDENT = "almanac"
# Of what is replayed: documents of the earlier edits. The rest is old material.
EARLIER = 0.4
NO_REPLAY, REPLAY, AT_ONCE = "no replay", "replay", "all at once"
# Of the update on everything at once: as `preceptor adapt` has it.
_AT_ONCE = ("learning_rate=3e-3", "epochs=8")
_TOKENS_PER_CHARACTER = 0.3  # for estimates


def config_for(options: Options, seed: int) -> RunConfig:
    """The config of one seed. Raises PreceptorError(FILE_NOT_FOUND, BAD_CONFIG)."""
    if len(options.students) > 1:
        raise PreceptorError("INVALID_REQUEST", "continual takes one student", field="students")
    student = options.students[0] if options.students else STUDENT
    return config_of(options, "continual.toml", student, seed)


def steps(options: Options) -> Sequence[Step]:
    """Writing, every edit of all chains, and all at once."""
    check_full(options)
    subjects = [(config, read_subject(config)) for config in (config_for(options, s) for s in range(options.seeds))]
    written = sum(_tokens(passage.text) for _, subject in subjects for passage in subject.passages)
    found = [Step("self-edits are written", written_tokens=written)]
    most = max(len(subject.passages) for _, subject in subjects)
    for number in range(most):
        tokens = 0.0
        for config, subject in subjects:
            own = _tokens(subject.passages[number].text) if number < len(subject.passages) else 0.0
            tokens += own * config.training.epochs * 2 / (1 - config.training.replay_share)
        found.append(Step(f"edit {number + 1} of {most}", 2 * len(subjects), tokens))
    found.append(Step("all passages at once", len(subjects), 2 * 8 * written))
    return found


def measure(lab: Lab, options: Options) -> Findings:
    """Raises PreceptorError where nothing could be written, or no chain came to its end."""
    check_full(options)
    lab.step()
    materials = []
    for seed in range(options.seeds):
        made = lab.attempt(f"seed {seed}: writing", lambda seed=seed: _material(lab, config_for(options, seed)))  # type: ignore[misc]
        if made is not None:
            materials.append(made)
    chains = [Chain(one, way, _copy(one.student)) for one in materials for way in (NO_REPLAY, REPLAY)]
    for number in range(max((len(one.edits) for one in materials), default=0)):
        lab.step()
        _together(lab, [chain for chain in chains if not chain.broken], number)
    lab.step()
    joint = [found for one in materials if (found := _at_once(lab, one)) is not None]
    whole = [chain for chain in (*chains, *joint) if chain.whole]
    if not any(chain.way != AT_ONCE for chain in whole):
        reason = lab.failures[0].message if lab.failures else "there was nothing to learn"
        raise PreceptorError("TOO_MANY_FAILURES", f"no chain of edits came to its end; the first: {reason}")
    return findings(whole, [note for one in materials for note in _notes(one)])


def _tokens(text: str) -> float:
    return len(text) * _TOKENS_PER_CHARACTER


def _copy(student: types.PinnedStudent) -> types.PinnedStudent:
    copied = types.PinnedStudent()
    copied.CopyFrom(student)
    return copied


# ---- what is asked of the services


def _material(lab: Lab, config: RunConfig) -> Material:
    subject = read_subject(config)
    tasks = [task_to_proto(passage) for passage in subject.passages]
    settings = config.teacher
    request = teacher.GenerateSelfEditsRequest(
        policy_id=settings.policy or lab.base_policy(),
        tasks=[for_teacher(task) for task in tasks],
        samples_per_task=1,
        prompt_format=settings.prompt_format,
        sampling=teacher.SamplingSettings(
            temperature=settings.temperature, top_p=settings.top_p, max_new_tokens=settings.max_new_tokens
        ),
        seed=derived_seed(config.seed, "continual-sampling"),
        max_resamples=settings.max_resamples,
        limits=directive_limits(config),
    )
    edits: list[types.SelfEdit | None] = []
    for group in lab.write(request):
        (written,) = group.self_edits
        valid = written.status == teacher.SELF_EDIT_STATUS_VALID
        edits.append(types.SelfEdit(documents=written.self_edit.documents) if valid else None)
    return Material(
        seed=config.seed,
        config=config,
        subject=subject,
        union=union_task(tasks, types.QUESTION_BANK_SEALED),
        student=lab.student(config.student.name).pinned,
        edits=edits,
    )


def replay_of(old: Sequence[str], earlier: Sequence[str]) -> list[str]:
    """What replay draws from, so that about EARLIER of it are documents of earlier edits: these, repeated as often as
    that takes (and once at least), behind the old material. Drawing is without repetition as far as the corpus
    reaches."""
    if not old or not earlier:
        return [*old, *earlier]
    times = max(1, round(EARLIER / (1 - EARLIER) * len(old) / len(earlier)))
    return [*old, *(list(earlier) * times)]


def protocol_of(chain: Chain, number: int) -> evaluator.EvaluationProtocol:
    """How edit ``number`` (from 0) of a chain is trained and asked."""
    material = chain.material
    config = material.config
    earlier = [document for edit in material.edits[:number] if edit is not None for document in edit.documents]
    replay = replay_of(material.subject.replay_documents, earlier) if chain.way == REPLAY else []
    if not replay:
        epochs = round(config.training.epochs / (1 - config.training.replay_share))
        changes = {"replay_share": 0.0, "epochs": min(epochs, MAX_EPOCHS)}
        config = config.model_copy(update={"training": config.training.model_copy(update=changes)})
    seed = derived_seed(config.seed, "continual", number)
    return joint_protocol(config, material.subject.probes, replay, seed=seed)


def _together(lab: Lab, chains: Sequence[Chain], number: int) -> None:
    """The same edit of all chains, at the same time: each is a student of its own, so no two train together."""

    def edit(chain: Chain) -> bool:
        study = chain.material.edits[number] if number < len(chain.material.edits) else None
        if study is None:
            chain.repeat()
            return True
        task, protocol = chain.material.union.task, protocol_of(chain, number)
        ((found,),) = lab.evaluate(f"edit {number + 1}", [(task, [study])], protocol, _copy(chain.student))
        _check(found)
        chain.take(found)
        return True

    def attempt(chain: Chain) -> None:
        what = f"seed {chain.material.seed}, {chain.way}: edit {number + 1}"
        chain.broken = lab.attempt(what, lambda: edit(chain)) is None

    with ThreadPoolExecutor(max_workers=max(1, len(chains))) as pool:
        for done in [pool.submit(attempt, chain) for chain in chains]:
            done.result()


def _at_once(lab: Lab, material: Material) -> Chain | None:
    """All edits in one update."""
    studied = [edit for edit in material.edits if edit is not None]
    old = material.subject.replay_documents
    chain = Chain(material, AT_ONCE, _copy(material.student))

    def update() -> bool:
        overrides = [f"{name}={value}" for name, value in JOINT_DEFAULTS.items() if name != "replay_share"]
        config = joint_config(
            material.config, [*overrides, *_AT_ONCE, f"replay_share={0.5 if old else 0.0}"], bool(old)
        )
        protocol = joint_protocol(config, material.subject.probes, old)
        asked = [(material.union.task, [union_edit(studied)])]
        ((found,),) = lab.evaluate("all at once", asked, protocol, material.student)
        _check(found)
        chain.take(found)
        return True

    return chain if studied and lab.attempt(f"seed {material.seed}: all at once", update) is not None else None


def _check(found: evaluator.Evaluation) -> None:
    if found.state != SUCCEEDED:
        raise PreceptorError(found.failure.reason or "CANCELLED", found.failure.message or "it was cancelled")
    if not found.trials[0].HasField("adapter"):  # the next edit would stand on nothing, and nobody would know
        raise PreceptorError("VERSION_SKEW", "the evaluator gave no adapter: it is older than this command")


def _notes(material: Material) -> list[str]:
    missing = sum(edit is None for edit in material.edits)
    return [f"seed {material.seed}: {missing} passages have no self-edit: what was written is none"] if missing else []


# ---- what it comes to


def findings(chains: Sequence[Chain], notes: Sequence[str]) -> Findings:
    """Matrices, what was kept, and the picture."""
    from preceptor.reproduce.forgetting_picture import forgetting

    by_way: dict[str, list[Chain]] = {}
    for chain in chains:
        by_way.setdefault(chain.way, []).append(chain)
    material = chains[0].material
    passages, resamples = len(material.union.counts), material.config.heldout.bootstrap_resamples
    summary = [kept_of(some, resamples) for some in by_way.values()]
    matrices = {way: matrix(some) for way, some in by_way.items() if way != AT_ONCE}
    headers = ["after edit", *(f"passage {number}" for number in range(1, passages + 1)), "old knowledge"]
    tables = [
        PlainTable(
            "kept",
            "What was kept",
            [
                "",
                "seeds",
                "right after its own edit",
                "of these, kept to the end",
                "right in the end",
                "old knowledge kept",
                "tokens",
                "worker seconds",
            ],
            [
                [
                    one.way,
                    len(by_way[one.way]),
                    _with_interval(one.learnt),
                    _with_interval(one.kept) if one.way != AT_ONCE else None,
                    _with_interval(one.final),
                    _with_interval(one.old),
                    round(one.tokens),
                    round(one.seconds, 1),
                ]
                for one in summary
            ],
            "Shares with 95% intervals (passages, or probes, drawn again); tokens and seconds are those of all edits.",
        ),
        *(
            PlainTable(
                f"matrix-{way.replace(' ', '-')}",
                f"Right answers after each edit: {way}",
                headers,
                [
                    ["none" if number == 0 else str(number), *(_percent(value) for value in row)]
                    for number, row in enumerate(rows)
                ],
                f"Sealed questions, {len(by_way[way])} seeds; old knowledge: of the probes that were right before.",
            )
            for way, rows in matrices.items()
        ),
    ]
    config = material.config
    author = config.teacher.policy or "the untrained teacher"
    return Findings(
        title="Continual learning",
        about=f"{passages} passages one after the other; each edit is merged into the student before the next one is"
        f" trained. The study material was written by {author} in the format {config.teacher.prompt_format}, the same"
        f" for all rows. With replay {config.training.replay_share:.0%} of what an edit trains is old material and"
        f" earlier edits ({EARLIER:.0%} of that from earlier edits where there are any); without it an edit trains its"
        " own documents as many times more often. All at once is one update on the documents of all passages with old"
        " material.",
        tables=tables,
        pictures={"forgetting": forgetting(matrices)},
        notes=notes,
        data={
            "matrices": matrices,
            "kept": {one.way: one.as_json() for one in summary},
            "chains": [_chain_json(chain) for chain in chains],
        },
    )


def _with_interval(estimate: Estimate | None) -> str | None:
    if estimate is None:
        return None
    return f"{_percent(estimate.mean)} [{estimate.low * 100:.1f}, {estimate.high * 100:.1f}]"


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value * 100:.1f}%"


def _chain_json(chain: Chain) -> dict[str, Any]:
    return {
        "seed": chain.material.seed,
        "way": chain.way,
        "student": chain.student.commit,
        "adapters": [adapter.sha256 for adapter in chain.student.adapters],
        "right": [[sum(passage) for passage in row] for row in chain.rows],
        "questions": list(chain.material.union.counts),
        "probes_right": [sum(probes) for probes in chain.probes],
        "tokens": chain.tokens,
    }
