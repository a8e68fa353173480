"""Evaluations, their owners and the requests that made them, in SQL.

A SUCCEEDED evaluation is never changed again. One that FAILED or was CANCELLED starts anew when a new request asks for
it. A repeated request (same id, same body) gets its first answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import (
    BindParameter,
    Connection,
    Row,
    bindparam,
    case,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)

from evaluator.database import (
    BASELINE_POSITION,
    LIVE,
    Database,
    State,
    TrialState,
    evaluation_trials,
    evaluations,
    exams,
    openings,
    owners,
    requests,
    trials,
)
from evaluator.demand import AT_ONCE, ask_for, drop_unwanted
from evaluator.identity import Exam, Plan, PlannedEvaluation, group_trials
from evaluator.reward import Weights
from preceptor.errors import PreceptorError
from preceptor.few_shot.views import Way
from preceptor.names import canonical_json
from preceptor.tasks import Question
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import trial_pb2 as trial


@dataclass(frozen=True, slots=True)
class Request:
    """A mutating request: who asks, what makes a repetition the same, and which sealed banks it opens."""

    id: str
    body_sha256: str
    owner: str
    sealed: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Known:
    """An evaluation in the answer to a request."""

    id: str
    cached: bool  # had succeeded before


@dataclass(frozen=True, slots=True)
class Sitting:
    """All that is needed to score one evaluation. Results may carry a failure."""

    evaluation: pb.Evaluation
    exam: Exam
    results: tuple[tuple[int, trial.TrialResult], ...]  # seed and result
    baseline: trial.TrialResult


class EvaluationStore:
    """Every method is one transaction. ``clock`` gives unix seconds."""

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    def reply_to(self, request: Request) -> list[Known] | None:
        """The answer this request was given before. Raises PreceptorError(REQUEST_ID_REUSED)."""
        with self._database.read() as tx:
            reply = _earlier_reply(tx, request)
        return None if reply is None else _read_known(reply)

    def create(self, plan: Plan, request: Request, batch_trials: int) -> list[Known]:
        """Makes the evaluations of a plan exist, owned by who asks, and the batches they still need. That the request
        opens sealed banks is noted with them, also where all is known: a look is a look.

        In the order of the plan. Raises PreceptorError(REQUEST_ID_REUSED).
        """
        with self._database.write() as tx:
            if (reply := _earlier_reply(tx, request)) is not None:
                return _read_known(reply)
            distinct = {item.id: item for item in plan.evaluations}
            rows = tx.execute(select(evaluations.c.id, evaluations.c.state).where(evaluations.c.id.in_(distinct))).all()
            states = {row.id: State(row.state) for row in rows}
            to_start = [item for item in distinct.values() if states.get(item.id) not in (*LIVE, State.SUCCEEDED)]
            if to_start:
                self._put_batches(tx, plan, to_start, batch_trials, request.owner)
                self._put_evaluations(tx, plan, to_start, states)
                # Who asked before has had a final state, and does not wait for what is now begun anew.
                again = [item.id for item in to_start if item.id in states]
                tx.execute(delete(owners).where(owners.c.evaluation_id.in_(again)))
            owned = set(
                tx.execute(
                    select(owners.c.evaluation_id).where(
                        owners.c.owner == request.owner, owners.c.evaluation_id.in_(distinct)
                    )
                ).scalars()
            )
            if new := [{"owner": request.owner, "evaluation_id": item} for item in distinct if item not in owned]:
                tx.execute(insert(owners), new)
            self._put_openings(tx, request)
            known = [Known(item.id, states.get(item.id) is State.SUCCEEDED) for item in plan.evaluations]
            _keep_reply(tx, request, [[item.id, item.cached] for item in known])
            return known

    def openings(self, bank_ids: Iterable[str]) -> dict[str, int]:
        """How many owners have opened each of these sealed banks; a bank that nobody has is not among them."""
        if not (banks := set(bank_ids)):
            return {}
        query = select(openings.c.bank_id, func.count()).where(openings.c.bank_id.in_(banks))
        with self._database.read() as tx:
            return {str(bank): int(count) for bank, count in tx.execute(query.group_by(openings.c.bank_id))}

    def get(self, evaluation_ids: Sequence[str]) -> list[pb.Evaluation]:
        """These evaluations, in this order. Raises PreceptorError(EVALUATION_NOT_FOUND)."""
        with self._database.read() as tx:
            rows = tx.execute(select(evaluations).where(evaluations.c.id.in_(set(evaluation_ids)))).all()
        found = {row.id: row for row in rows}
        for evaluation_id in evaluation_ids:
            if evaluation_id not in found:
                raise PreceptorError("EVALUATION_NOT_FOUND", f"there is no evaluation {evaluation_id!r}")
        return [_evaluation(found[evaluation_id]) for evaluation_id in evaluation_ids]

    def page(self, owner: str, state: State | None, after: int, size: int) -> tuple[list[pb.Evaluation], int]:
        """At most ``size`` evaluations after a position, by age, and the position to go on from (0: that was all)."""
        query = select(evaluations).where(evaluations.c.seq > after).order_by(evaluations.c.seq).limit(size + 1)
        if owner:
            query = query.join(owners, owners.c.evaluation_id == evaluations.c.id).where(owners.c.owner == owner)
        if state is not None:
            query = query.where(evaluations.c.state == state)
        with self._database.read() as tx:
            rows = tx.execute(query).all()
        return [_evaluation(row) for row in rows[:size]], rows[size - 1].seq if len(rows) > size else 0

    def ready(self, *, trial_ids: Sequence[str] = (), evaluation_ids: Sequence[str] = ()) -> list[str]:
        """The live evaluations among these, or with one of these trials, none of whose trials is pending."""
        with self._database.read() as tx:
            found = tx.execute(_READY, {"trial_ids": trial_ids, "evaluation_ids": evaluation_ids})
            return [str(one) for one in found.scalars()]

    def sittings(self, evaluation_ids: Sequence[str]) -> list[Sitting]:
        """What is needed to score these evaluations (see ``ready``)."""
        with self._database.read() as tx:
            rows = tx.execute(_SAT, {"ids": evaluation_ids}).all()
            papers = {
                row.id: _read_exam(row.body) for row in tx.execute(_EXAMS, {"ids": list({row.exam_id for row in rows})})
            }
            answers = tx.execute(_ANSWERS, {"ids": evaluation_ids}).all()
        found: dict[str, list[tuple[int, trial.TrialResult]]] = {row.id: [] for row in rows}
        baselines: dict[str, trial.TrialResult] = {}
        for row in answers:
            result = trial.TrialResult.FromString(row.result)
            if row.position == BASELINE_POSITION:
                baselines[row.evaluation_id] = result
            else:
                found[row.evaluation_id].append((int(row.seed), result))
        return [Sitting(_evaluation(row), papers[row.exam_id], tuple(found[row.id]), baselines[row.id]) for row in rows]

    def finish(self, finished: Sequence[pb.Evaluation]) -> list[pb.Evaluation]:
        """Writes final evaluations (their ``state`` says which); returns those that were still live, with times."""
        now = self._clock()
        with self._database.write() as tx:  # nobody else writes: what is live now is live until the end
            live = set(tx.execute(_LIVE_AMONG, {"ids": [item.id for item in finished]}).scalars())
            changed = [item for item in finished if item.id in live]
            if changed:
                tx.execute(
                    _FINISH,
                    [{"one": item.id, "state": _state(item), "body": _body(item), "finished": now} for item in changed],
                )
        for evaluation in changed:
            _set_time(evaluation.finish_time, now)
        return changed

    def cancel(self, request: Request) -> tuple[int, list[str]]:
        """Ends the live evaluations of an owner that nobody else waits for; how many, and which ended now.

        A repeated request answers with the first number and ends nothing. Raises PreceptorError(REQUEST_ID_REUSED).
        """
        with self._database.write() as tx:
            if (reply := _earlier_reply(tx, request)) is not None:
                return int(json.loads(reply)), []
            mine = (
                select(owners.c.evaluation_id)
                .join(evaluations, evaluations.c.id == owners.c.evaluation_id)
                .where(owners.c.owner == request.owner, evaluations.c.state.in_(LIVE))
            )
            live = set(tx.execute(mine).scalars())
            shared = select(owners.c.evaluation_id).where(
                owners.c.evaluation_id.in_(mine.correlate(None)), owners.c.owner != request.owner
            )
            kept = set(tx.execute(shared).scalars())
            ended = sorted(live - kept)
            left = sorted(kept)
            for start in range(0, len(left), AT_ONCE):
                some = owners.c.evaluation_id.in_(left[start : start + AT_ONCE])
                tx.execute(delete(owners).where(owners.c.owner == request.owner, some))
            for start in range(0, len(ended), AT_ONCE):
                tx.execute(
                    update(evaluations)
                    .where(evaluations.c.id.in_(ended[start : start + AT_ONCE]))
                    .values(state=State.CANCELLED, finished=self._clock())
                )
            drop_unwanted(tx, ended)
            _keep_reply(tx, request, len(ended))
            return len(ended), ended

    def _put_openings(self, tx: Connection, request: Request) -> None:
        mine = select(openings.c.bank_id).where(
            openings.c.owner == request.owner, openings.c.bank_id.in_(request.sealed)
        )
        known = set(tx.execute(mine).scalars())
        new = [{"bank_id": bank, "owner": request.owner} for bank in sorted(request.sealed - known)]
        if new:
            tx.execute(insert(openings).values(first=self._clock()), new)

    def _put_batches(
        self, tx: Connection, plan: Plan, to_start: Sequence[PlannedEvaluation], batch_trials: int, owner: str
    ) -> None:
        ids = {item.id for evaluation in to_start for item in (evaluation.baseline, *evaluation.trials)}
        rows = tx.execute(select(trials.c.id, trials.c.state).where(trials.c.id.in_(ids))).all()
        usable = {row.id for row in rows if row.state != TrialState.FAILED}
        needed = {trial_id: trial_id not in usable for trial_id in ids}
        groups = group_trials(to_start, needed, batch_trials)
        ask_for(tx, owner, [plan.batch(group) for group in groups])

    def _put_evaluations(
        self, tx: Connection, plan: Plan, to_start: Sequence[PlannedEvaluation], states: dict[str, State]
    ) -> None:
        now = self._clock()
        papers = {item.exam_id: item.exam for item in to_start}
        stored = set(tx.execute(select(exams.c.id).where(exams.c.id.in_(papers))).scalars())
        for exam_id, exam in papers.items():
            if exam_id not in stored:
                tx.execute(insert(exams).values(id=exam_id, body=canonical_json(asdict(exam))))
        new, links = [], []
        for item in to_start:
            body = pb.Evaluation(
                id=item.id,
                task_id=item.task_id,
                self_edit=item.self_edit,
                student=plan.student,
                overlap=item.overlap,
            )
            values = {
                "state": State.QUEUED,
                "exam_id": item.exam_id,
                "body": _body(body),
                "created": now,
                "finished": None,
            }
            if item.id in states:  # FAILED or CANCELLED before: anew
                tx.execute(update(evaluations).where(evaluations.c.id == item.id).values(values))
                continue
            new.append({"id": item.id, **values})
            links += [
                {"evaluation_id": item.id, "position": position, "trial_id": one.id, "seed": str(one.seed)}
                for position, one in ((BASELINE_POSITION, item.baseline), *enumerate(item.trials))
            ]
        if new:
            tx.execute(insert(evaluations), new)
            tx.execute(insert(evaluation_trials), links)


# Made once: these are asked for all the time, and to put a question together takes as long as to answer it.


def _among(name: str) -> BindParameter[Any]:
    return bindparam(name, expanding=True)


_READY = (
    select(evaluations.c.id)
    .join(evaluation_trials, evaluation_trials.c.evaluation_id == evaluations.c.id)
    .outerjoin(trials, trials.c.id == evaluation_trials.c.trial_id)
    .where(
        evaluations.c.state.in_(LIVE),
        or_(
            evaluations.c.id.in_(
                select(evaluation_trials.c.evaluation_id).where(evaluation_trials.c.trial_id.in_(_among("trial_ids")))
            ),
            evaluations.c.id.in_(_among("evaluation_ids")),
        ),
    )
    .group_by(evaluations.c.id, evaluations.c.seq)
    .having(func.sum(case((trials.c.state.in_((TrialState.DONE, TrialState.FAILED)), 0), else_=1)) == 0)
    .order_by(evaluations.c.seq)
)
_SAT = select(evaluations).where(evaluations.c.id.in_(_among("ids"))).order_by(evaluations.c.seq)
_EXAMS = select(exams).where(exams.c.id.in_(_among("ids")))
_ANSWERS = (
    select(evaluation_trials.c.evaluation_id, evaluation_trials.c.position, evaluation_trials.c.seed, trials.c.result)
    .join(trials, trials.c.id == evaluation_trials.c.trial_id)
    .where(evaluation_trials.c.evaluation_id.in_(_among("ids")))
    .order_by(evaluation_trials.c.evaluation_id, evaluation_trials.c.position)
)
_LIVE_AMONG = select(evaluations.c.id).where(evaluations.c.id.in_(_among("ids")), evaluations.c.state.in_(LIVE))
_FINISH = (
    update(evaluations)
    .where(evaluations.c.id == bindparam("one"))
    .values(state=bindparam("state"), body=bindparam("body"), finished=bindparam("finished"))
)


def _earlier_reply(tx: Connection, request: Request) -> str | None:
    row = tx.execute(select(requests).where(requests.c.id == request.id)).one_or_none()
    if row is None:
        return None
    if row.body_sha256 != request.body_sha256:
        raise PreceptorError("REQUEST_ID_REUSED", f"the request id {request.id!r} was used for another request")
    return str(row.reply)


def _keep_reply(tx: Connection, request: Request, reply: object) -> None:
    tx.execute(insert(requests).values(id=request.id, body_sha256=request.body_sha256, reply=canonical_json(reply)))


def _read_known(reply: str) -> list[Known]:
    return [Known(evaluation_id, cached) for evaluation_id, cached in json.loads(reply)]


def _read_exam(body: str) -> Exam:
    values = json.loads(body)

    def questions(name: str) -> tuple[Question, ...]:
        return tuple(
            Question(q["text"], q["answer"], aliases=tuple(q["aliases"]), written=q.get("written", False))
            for q in values[name]
        )

    return Exam(
        questions("questions"),
        questions("probes"),
        values["grader"],
        values["grader_label"],
        Weights(**values["weights"]),
        **{name: values[name] for name in ("certainty", "samples") if name in values},
        ways=tuple(Way(**way) for way in values.get("ways", ())),
    )


def _state(evaluation: pb.Evaluation) -> State:
    return State(pb.EvaluationState.Name(evaluation.state).removeprefix("EVALUATION_STATE_"))


def _body(evaluation: pb.Evaluation) -> bytes:
    """The part that does not live in columns of its own."""
    bare = pb.Evaluation()
    bare.CopyFrom(evaluation)
    for name in ("state", "cached", "create_time", "finish_time"):
        bare.ClearField(name)
    return bare.SerializeToString()


def _evaluation(row: Row[tuple[object, ...]]) -> pb.Evaluation:
    evaluation = pb.Evaluation.FromString(row.body)
    evaluation.state = pb.EvaluationState.Value(f"EVALUATION_STATE_{row.state}")
    _set_time(evaluation.create_time, row.created)
    if row.finished is not None:
        _set_time(evaluation.finish_time, row.finished)
    return evaluation


def _set_time(field: object, seconds: float) -> None:
    field.FromNanoseconds(int(seconds * 1e9))  # type: ignore[attr-defined]


def is_final(evaluation: pb.Evaluation) -> bool:
    """Whether this evaluation will not change by itself any more."""
    return evaluation.state in _FINAL


_FINAL: Iterable[int] = frozenset(
    {pb.EVALUATION_STATE_SUCCEEDED, pb.EVALUATION_STATE_FAILED, pb.EVALUATION_STATE_CANCELLED}
)
