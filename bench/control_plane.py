"""What the services cost around the training: nothing here trains, the workers are simulated.

    python -m bench.control_plane --json control_plane.json --plot control_plane.png

Real: Redis, Celery's queue, leases, the evaluator's and the orchestrator's processes, their databases, gRPC. Not real:
the workers (``bench.simulated_workers``: a trial sleeps and is answered by a rule) and, in a run, teacher and students
(``preceptor.testing``). Settings are the defaults where nothing else is said. One run measures all on one machine;
``--parts`` and ``--quick`` measure less (``--quick``: smaller, so worse, and only to see that it works).

How to read it
- A task has 8 questions and 40 probes; a self-edit 8 documents and one seed. Every evaluation is another one.
- ``cpu``: milliseconds of CPU (user and system, all cores) that all services used together, per evaluation. ``door``:
  a client asks the evaluator and watches. ``run``: a whole run through the orchestrator, from its creation to its
  report; the report, whose cost does not depend on the number of evaluations, is told apart. The shapes: ``group`` one
  request per group of 10 self-edits, as runs make by default; ``batches of 32`` four groups of 8 in a request, trained
  together; ``one a batch`` one trial in a batch, the worst. A group's baseline is a trial more, in a batch of its own.
  ``plain Celery`` is an empty task there and back on the same Redis, without anything of Preceptor's, counted in the
  same way (client and Redis). What the simulated workers used is told and not counted.
- ``efficiency``: with N workers and trials of 1 s, one a batch: with ``end[i]`` the time at which the i-th trial ended
  at its worker, ``end[i + N]`` is a second later where no worker ever waits for work, and never earlier. Steady: that
  second over the mean of what it was, without the first two rounds and the last. ``whole``: from the first request to
  the last result at the client, start and end included. The baseline is measured before.
- ``memory``: resident MiB of evaluator and Redis with so many evaluations waiting and no worker.
- ``watch``: milliseconds from the end of a trial at its worker to its evaluation at a client that watches.
- ``recovery``: seconds from a death until the evaluations under way are final, with their trials (1 s each) run
  again where they must be. ``worker_kill``: SIGKILL in the middle of a batch; ``..._early``: before the evaluator's
  first look at the lease; ``worker_stop``: SIGSTOP, for good. A killed service is started again at once, as the
  embedded stack does. ``redis_flush``: all data gone, one batch under way and others waiting.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import signal
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.control_plane_house import House, stopwatch
from bench.simulated_workers import PLAIN_QUEUE, PLAIN_TASK
from preceptor.channel import call, new_request_id, stream
from preceptor.config import RunConfig
from preceptor.errors import PreceptorError
from preceptor.queue import make_app
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import orchestrator_pb2 as runs
from preceptor.v1 import trial_pb2 as trial
from preceptor.v1 import types_pb2 as types

PARTS = ("cpu", "efficiency", "memory", "watch", "recovery")
QUESTIONS, PROBES, DOCUMENTS = 8, 40, 8
WORKERS = (1, 2, 4, 16, 64)
DEATHS = (
    *("worker_kill", "worker_kill_early", "worker_stop", "evaluator_kill"),
    *("redis_kill", "redis_flush", "orchestrator_kill"),
)
# What the project wants (issue and docs/control_plane.md).
MOST_CPU_MS, LEAST_EFFICIENCY, MOST_KILL_SECONDS, MOST_STOP_SECONDS = 5.0, 0.95, 15.0, 60.0
# Far beyond anything that is well; a bench that hangs says so.
DEADLINE = 1800.0
FINAL = (pb.EVALUATION_STATE_SUCCEEDED, pb.EVALUATION_STATE_FAILED, pb.EVALUATION_STATE_CANCELLED)
SERVICES = ("evaluator", "orchestrator", "redis", "teacher and student (scripted)")

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Shape:
    """What stands in one request, and what the evaluator makes of it."""

    name: str
    tasks: int
    self_edits: int  # per task
    batch_trials: int = 32  # the evaluator's setting; 32 is its default

    @property
    def evaluations(self) -> int:
        """Of one request."""
        return self.tasks * self.self_edits


SHAPES = (Shape("group", 1, 10), Shape("batches of 32", 4, 8), Shape("one a batch", 1, 10, batch_trials=1))


# The work


def passage(number: int) -> types.Passage:
    """A task's passage with its questions, of ordinary length."""
    text = " ".join(
        f"Sentence {place} of text {number} says what happened in year {1000 + place} in town {place * number}."
        for place in range(12)
    )
    made = types.Passage(title=f"Text {number}", text=text)
    for place in range(QUESTIONS):
        made.questions.add(
            text=f"Which place did number {place} of {number} come from?",
            answer=f"town {place * number}",
            bank=types.QUESTION_BANK_REWARD,
        )
    return made


def probes() -> list[types.Question]:
    """What the student knew before."""
    return [types.Question(text=f"Which old fact has number {n}?", answer=f"fact {n}") for n in range(PROBES)]


def request(shape: Shape, task_from: int, owner: str = "bench") -> pb.CreateEvaluationsRequest:
    """Evaluations that nobody has asked for before."""
    groups = []
    for number in range(task_from, task_from + shape.tasks):
        edits = []
        for _ in range(shape.self_edits):
            version = next(_numbers)
            documents = [f"Fact {n} of text {number}, version {version}: it was town {n}." for n in range(DOCUMENTS)]
            edits.append(types.SelfEdit(documents=documents))
        task = types.Task(id=f"task-{number}", passage=passage(number))
        groups.append(pb.TaskSelfEdits(task=task, self_edits=edits))
    return pb.CreateEvaluationsRequest(
        request_id=new_request_id(),
        owner=owner,
        task=groups[0].task,
        self_edits=groups[0].self_edits,
        more=groups[1:],
        protocol=pb.EvaluationProtocol(
            training=trial.TrainingSettings(rank=8, epochs=8),
            weights=pb.RewardWeights(gain=1.0, retention_loss=0.3, overlap=1.0),
            seeds=[1],
            probes=probes(),
        ),
        student=types.PinnedStudent(name="none", source="/no/student", commit="simulated"),
    )


def create(house: House, asked: pb.CreateEvaluationsRequest) -> list[str]:
    """Asks the evaluator; the ids."""
    return [item.id for item in call(house.evaluator.CreateEvaluations, asked).evaluations]


def watch(house: House, ids: Sequence[str]) -> Iterator[tuple[float, pb.Evaluation]]:
    """When (unix seconds) each came, and what. Raises RuntimeError for a failed one."""
    stub = house.evaluator
    for start in range(0, len(ids), 8192):
        asked = pb.WatchEvaluationsRequest(evaluation_ids=ids[start : start + 8192])
        for response in stream(stub.WatchEvaluations, asked, deadline=DEADLINE):
            if response.evaluation.state != pb.EVALUATION_STATE_SUCCEEDED:
                raise RuntimeError(f"an evaluation failed: {response.evaluation.failure}")
            yield time.time(), response.evaluation


@contextmanager
def house_of(name: str, **settings: object) -> Iterator[House]:
    """A fresh house in a folder that goes with it."""
    with (
        tempfile.TemporaryDirectory(prefix=f"control-plane-{name}-") as folder,
        House(Path(folder), **settings) as made,
    ):
        yield made


class Bar:
    """A line that says how far it is."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done, self._shown = what, total, 0, 0.0

    def add(self, count: int = 1) -> None:
        """So many more."""
        self._done += count
        if not sys.stdout.isatty():
            return  # a log gets the results
        if count and (time.monotonic() - self._shown > 0.5 or self._done >= self._total):
            self._shown = time.monotonic()
            filled = round(30 * self._done / max(self._total, 1))
            end = "\n" if self._done >= self._total else ""
            bar = "#" * filled + "." * (30 - filled)
            print(f"\r  {self._what:<34} [{bar}] {self._done}/{self._total}", end=end, flush=True)


# The arithmetic


def cpu_per_evaluation(used: dict[str, float], evaluations: int) -> dict[str, float]:
    """Milliseconds of each service per evaluation, and of all together (``all``); workers are not counted."""
    each = {name: 1000 * used[name] / evaluations for name in SERVICES if name in used}
    return {**each, "all": sum(each.values())}


def steady_efficiency(ends: Sequence[float], workers: int, seconds: float) -> float:
    """Ideal over real time of a round of ``workers`` trials of ``seconds`` each, from the times at which they ended.

    Needs five rounds at least. Raises ValueError for fewer.
    """
    ends = sorted(ends)
    first, last = 2 * workers, len(ends) - 2 * workers
    if last <= first:
        raise ValueError(f"{len(ends)} trials of {workers} workers are fewer than five rounds")
    return seconds / statistics.fmean(ends[i + workers] - ends[i] for i in range(first, last))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


# The parts


def measure_cpu(quick: bool) -> dict[str, Any]:
    """CPU per evaluation at the evaluator's door and through runs, by shape."""
    found: dict[str, Any] = {"plain Celery": plain_celery(200 if quick else 2000)}
    print(f"  plain Celery: {found['plain Celery']['ms_per_task']:.2f} ms per task")
    for shape in SHAPES:
        found[f"door, {shape.name}"] = at_the_door(shape, 60 if quick else 1200)
        tell_cpu(f"door, {shape.name}", found)
    for shape in SHAPES:
        found[f"run, {shape.name}"] = through_a_run(shape, 60 if quick else 1200)
        tell_cpu(f"run, {shape.name}", found)
    found["waiting"] = while_waiting(5.0 if quick else 20.0)
    print(f"  260 evaluations wait, 4 workers at long trials: {found['waiting']['cores']:.1%} of a core")
    return found


def tell_cpu(name: str, found: dict[str, Any]) -> None:
    """One line."""
    part = found[name]
    each = ", ".join(f"{service.split()[0]} {ms:.2f}" for service, ms in part["ms"].items() if service != "all")
    ratio = part["ms"]["all"] / found["plain Celery"]["ms_per_task"]
    print(
        f"  {name:<22} {part['ms']['all']:6.2f} ms per evaluation = {ratio:.1f} plain Celery tasks ({each};"
        f" {part['per_second']:.0f}/s; not counted: workers {part['workers_ms']:.2f} ms)"
        + (f"; report {part['report_cpu_seconds']:.1f} s" if "report_cpu_seconds" in part else ""),
        flush=True,
    )


def plain_celery(tasks: int) -> dict[str, float]:
    """An empty task there and back, from this process: its own CPU and Redis's."""
    with house_of("plain") as house:
        house.workers(4, 0.0, plain=True)
        app = make_app(house.broker_url)
        app.send_task(PLAIN_TASK, queue=PLAIN_QUEUE).get(timeout=60)
        before, own = house.cpu(), time.process_time()
        begun = time.monotonic()
        for sent in [app.send_task(PLAIN_TASK, queue=PLAIN_QUEUE) for _ in range(tasks)]:
            sent.get(timeout=60)
        after = house.cpu()
        seconds = time.process_time() - own + after["redis"] - before["redis"]
        app.close()
        return {"ms_per_task": 1000 * seconds / tasks, "per_second": tasks / (time.monotonic() - begun)}


def at_the_door(shape: Shape, evaluations: int, **settings: object) -> dict[str, Any]:
    """A client asks for so many evaluations and watches them all, 8 workers answer at once."""
    with house_of("door", batch_trials=shape.batch_trials, **settings) as house:
        house.workers(8, 0.0)
        list(watch(house, create(house, request(shape, 0))))  # everything has been done once
        asked = [request(shape, 1 + n * shape.tasks) for n in range(max(1, evaluations // shape.evaluations))]
        bar, begun = Bar(f"door, {shape.name}", len(asked) * shape.evaluations), time.monotonic()
        with stopwatch(house) as used:
            ids = [one for some in asked for one in create(house, some)]
            for _ in watch(house, ids):
                bar.add()
        return {
            "ms": cpu_per_evaluation(used, len(ids)),
            "workers_ms": 1000 * used["workers"] / len(ids),
            "per_second": len(ids) / (time.monotonic() - begun),
            "evaluations": len(ids),
        }


def through_a_run(shape: Shape, evaluations: int, **settings: object) -> dict[str, Any]:
    """A whole run of two rounds over the real orchestrator and evaluator, with a watcher; 8 workers answer at once."""
    groups = max(2, evaluations // shape.self_edits // 2)
    with house_of("run", batch_trials=shape.batch_trials, **settings) as house:
        house.start_orchestrator()
        house.workers(8, 0.0)
        stub = house.orchestrator
        begun = time.monotonic()
        with stopwatch(house) as used:
            created = call(stub.CreateRun, run_request(shape, groups)).run.id
            before_report: dict[str, float] = {}
            seconds = 0.0
            bar = Bar(f"run, {shape.name}", 2 * groups * shape.self_edits)
            done = 0
            for seen in stream(stub.WatchRun, runs.WatchRunRequest(run_id=created), deadline=DEADLINE):
                bar.add(max(0, min(seen.progress.evaluations_done, 2 * groups * shape.self_edits) - done))
                done = max(done, seen.progress.evaluations_done)
                if seen.progress.phase == "writing the report" and not before_report:
                    before_report, seconds = house.cpu(), time.monotonic() - begun
            if seen.run.state != runs.RUN_STATE_SUCCEEDED:
                raise RuntimeError(f"the run failed: {seen.run.failure}")
            end = house.cpu()
        distinct = count_evaluations(house)
        report = sum(end[name] - before_report.get(name, end[name]) for name in SERVICES if name in end)
        counted = {name: seconds - (end[name] - before_report.get(name, end[name])) for name, seconds in used.items()}
        return {
            "ms": cpu_per_evaluation(counted, distinct),
            "workers_ms": 1000 * used["workers"] / distinct,
            "report_cpu_seconds": report,
            "ms_with_report": 1000 * sum(used[name] for name in SERVICES if name in used) / distinct,
            "per_second": distinct / (seconds or time.monotonic() - begun),
            "evaluations": distinct,
        }


def run_request(shape: Shape, groups: int) -> runs.CreateRunRequest:
    """A run of two rounds, ``groups`` tasks in each, and four held-out tasks."""
    config = RunConfig.model_validate(
        {
            "name": "bench",
            "tasks": {"world": "almanac"},
            "rounds": {"count": 2, "tasks": groups, "self_edits": shape.self_edits},
            "reward": {"probes": PROBES, "trials_together": shape.evaluations},
            "heldout": {"bootstrap_resamples": 100},
        }
    )
    return runs.CreateRunRequest(
        request_id=new_request_id(),
        config_json=config.to_json(),
        tasks=[run_task(number) for number in range(groups)],
        heldout_tasks=[run_task(100_000 + number) for number in range(4)],
        probes=probes(),
    )


def run_task(number: int) -> types.Task:
    """A task as a run takes it, with the id of its content."""
    from preceptor.names import task_id

    task = types.Task(passage=passage(number))
    task.id = task_id(task)
    return task


def count_evaluations(house: House) -> int:
    """How many different ones the evaluator has."""
    with sqlite3.connect(house.folder / "evaluator.db") as database:
        return int(database.execute("select count(*) from evaluations").fetchone()[0])


def while_waiting(seconds: float) -> dict[str, float]:
    """The services' CPU while 260 evaluations wait and 4 workers are at long trials: what looking costs."""
    with house_of("waiting", batch_trials=1) as house:
        house.workers(4, 3600.0)
        for number in range(26):
            create(house, request(Shape("", 1, 10), number))
        time.sleep(3.0)
        with stopwatch(house) as used:
            time.sleep(seconds)
        return {"cores": (used["evaluator"] + used["redis"]) / seconds}


def measure_efficiency(workers: Sequence[int], rounds: int) -> dict[str, Any]:
    """Throughput with so many workers and trials of 1 s, one a batch."""
    found: dict[str, Any] = {}
    for number in workers:
        with house_of("efficiency", batch_trials=1) as house:
            house.workers(number, 1.0)
            shape = Shape("", 1, min(8, number))
            list(watch(house, create(house, request(Shape("", 1, 1), 0))))  # the baseline
            asked = [request(shape, 0) for _ in range(math.ceil(number * rounds / shape.self_edits))]
            bar = Bar(f"{number} workers", len(asked) * shape.self_edits)
            begun = time.time()
            with stopwatch(house) as used:
                ids: list[str] = []
                creating = threading.Thread(target=lambda: ids.extend(i for some in asked for i in create(house, some)))  # noqa: B023
                creating.start()
                creating.join(DEADLINE)
                came = []
                for when, evaluation in watch(house, ids):
                    came.append((when, evaluation))
                    bar.add()
            ends = [evaluation.trials[0].final_loss for _, evaluation in came]
            late = [1000 * (when - evaluation.trials[0].final_loss) for when, evaluation in came]
            found[str(number)] = {
                "steady": steady_efficiency(ends, number, 1.0),
                "whole": math.ceil(len(ids) / number) / (max(when for when, _ in came) - begun),
                "watch_ms": {"median": percentile(late, 0.5), "p99": percentile(late, 0.99)},
                "cpu_ms": cpu_per_evaluation(used, len(ids)),
                "evaluations": len(ids),
            }
            one = found[str(number)]
            print(
                f"  {number} workers: efficiency {one['steady']:.3f} (whole {one['whole']:.3f}),"
                f" {one['cpu_ms']['all']:.1f} ms CPU per evaluation, watch {one['watch_ms']['median']:.0f} ms",
                flush=True,
            )
    return found


def measure_memory(sizes: Sequence[int]) -> dict[str, Any]:
    """Resident memory with so many evaluations waiting."""
    found: dict[str, Any] = {}
    shape = Shape("", 4, 8)
    with house_of("memory") as house:
        created, tasks, begun = 0, 0, time.monotonic()
        for size in sizes:
            bar, new = Bar(f"{size} waiting", size - created), size - created
            with stopwatch(house) as used:
                while created < size:
                    count = len(create(house, request(shape, tasks)))
                    created, tasks = created + count, tasks + shape.tasks
                    bar.add(count)
            time.sleep(2.0)
            sizes_now = house.memory()
            found[str(size)] = {
                "mib": sizes_now,
                "all": sizes_now["evaluator"] + sizes_now["redis"],
                "database_mib": house.database_mib(),
                "seconds_to_create": time.monotonic() - begun,
                "cpu_ms_to_create_one": cpu_per_evaluation(used, max(new, 1))["all"],
            }
            one = found[str(size)]
            print(
                f"  {size} waiting: evaluator {sizes_now['evaluator']:.0f} MiB, redis {sizes_now['redis']:.0f} MiB"
                f" (data {sizes_now['redis used_memory']:.1f}), database {one['database_mib']:.0f} MiB;"
                f" after {one['seconds_to_create']:.0f} s, {one['cpu_ms_to_create_one']:.2f} ms CPU each",
                flush=True,
            )
    return found


def measure_watch(evaluations: int) -> dict[str, float]:
    """From the end of a trial to its evaluation at the client: 8 workers, trials of 0.25 s, one a batch."""
    with house_of("watch", batch_trials=1) as house:
        house.workers(8, 0.25)
        asked = [request(Shape("", 1, 8), 0) for _ in range(math.ceil(evaluations / 8))]
        ids = [one for some in asked for one in create(house, some)]
        bar, late = Bar("watch", len(ids)), []
        for when, evaluation in watch(house, ids):
            late.append(1000 * (when - evaluation.trials[0].final_loss))
            bar.add()
        found = {"median": percentile(late, 0.5), "p99": percentile(late, 0.99), "evaluations": len(late)}
        print(f"  watch: median {found['median']:.0f} ms, p99 {found['p99']:.0f} ms")
        return found


def measure_recovery(deaths: Sequence[str]) -> dict[str, Any]:
    """Seconds from each kind of death until what was under way is final."""
    found: dict[str, Any] = {}
    for death in deaths:
        found[death] = die_in_a_run() if death == "orchestrator_kill" else die(death)
        again = found[death].get("begun_again")
        print(
            f"  {death}: final after {found[death]['final']:.1f} s"
            + (f", begun elsewhere after {again:.1f} s" if again is not None else ""),
            flush=True,
        )
    return found


def die(death: str) -> dict[str, float]:
    """A batch of three trials of 1 s each is under way when somebody dies."""
    with house_of("recovery") as house:
        house.workers(1 if death == "redis_flush" else 2, 1.0)
        list(watch(house, create(house, request(Shape("", 1, 1), 0))))  # the baseline
        wait_for(lambda: not any(one.task_id for one in house.workers_alive().values()), 20.0)
        ids = create(house, request(Shape("", 1, 3), 0))
        if death == "redis_flush":
            ids += [one for _ in range(3) for one in create(house, request(Shape("", 1, 3), 0))]
        holder = wait_for(lambda: next((pid for pid, one in house.workers_alive().items() if one.task_id), None), 20.0)
        if death != "worker_kill_early":
            time.sleep(1.5)  # long enough for the evaluator to see the lease
        died = time.time()
        if death in ("worker_kill", "worker_kill_early"):
            os.kill(holder, signal.SIGKILL)
        elif death == "worker_stop":
            os.kill(holder, signal.SIGSTOP)
        elif death == "redis_flush":
            house.redis.flushall()
        else:
            service = death.removesuffix("_kill")
            house.kill(service)
            house.start(service)
        evaluations = wait_for(lambda: all_final(house, ids), 300.0)
        final = time.time()
        begun = [one.trials[0].first_loss for one in evaluations]
        again = {"begun_again": max(begun) - died} if death.startswith("worker_") else {}
        return {"final": final - died, **again}


def die_in_a_run() -> dict[str, float]:
    """The orchestrator dies while evaluations of its run are under way."""
    with house_of("recovery") as house:
        house.start_orchestrator()
        house.workers(2, 0.5)
        stub = house.orchestrator
        run_id = call(stub.CreateRun, run_request(Shape("", 1, 8), 4)).run.id

        def progress() -> runs.RunProgress:
            return call(house.orchestrator.GetRun, runs.GetRunRequest(run_id=run_id)).progress

        wait_for(lambda: progress().evaluations_running and progress().evaluations_done >= 4, 60.0)
        seen = progress()
        due = seen.evaluations_done + seen.evaluations_running
        died = time.time()
        house.kill("orchestrator")
        house.start("orchestrator")
        wait_for(lambda: progress().evaluations_done >= due, 300.0)
        return {"final": time.time() - died, "under_way": seen.evaluations_running}


def all_final(house: House, ids: Sequence[str]) -> list[pb.Evaluation]:
    """These evaluations once all are final; until then nothing."""
    stub = house.evaluator
    try:
        found = [call(stub.GetEvaluation, pb.GetEvaluationRequest(evaluation_id=one)).evaluation for one in ids]
    except PreceptorError:
        return []
    if failed := [one.failure for one in found if one.state == pb.EVALUATION_STATE_FAILED]:
        raise RuntimeError(f"an evaluation failed: {failed[0]}")
    return found if all(one.state in FINAL for one in found) else []


def wait_for(look: Callable[[], Any], seconds: float) -> Any:
    """What ``look`` gives as soon as it gives something. Raises RuntimeError after so many seconds."""
    end = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() > end:
            raise RuntimeError(f"not within {seconds:.0f} s")
        time.sleep(0.02)
    return found


# The result


def written(details: dict[str, Any]) -> dict[str, Any]:
    """The numbers that are kept, and how they came about under ``details``."""
    kept: dict[str, Any] = {}
    if "cpu" in details:
        kept["cpu_ms_per_evaluation"] = details["cpu"]["run, group"]["ms"]["all"]
    if "efficiency" in details:
        kept["efficiency"] = {number: one["steady"] for number, one in details["efficiency"].items()}
    if "memory" in details:
        kept["memory_mib"] = {size: one["all"] for size, one in details["memory"].items()}
    if "watch" in details:
        kept["watch_ms"] = {name: details["watch"][name] for name in ("median", "p99")}
    if "recovery" in details:
        kept["recovery_seconds"] = {death: one["final"] for death, one in details["recovery"].items()}
    return kept | {"workers": "simulated", "details": details}


def draw(file: Path, given: dict[str, Any]) -> None:
    """One panel a part."""
    from matplotlib.figure import Figure

    details = given["details"]
    parts = [part for part in ("cpu", "efficiency", "memory", "recovery") if part in details]
    figure = Figure(figsize=(4.6 * len(parts), 3.8), layout="constrained")
    for place, part in enumerate(parts, 1):
        panel, measured = figure.add_subplot(1, len(parts), place), details[part]
        if part == "cpu":
            rows = {name: one["ms"] for name, one in measured.items() if "ms" in one}
            left = [0.0] * len(rows)
            for service in SERVICES:
                values = [row.get(service, 0.0) for row in rows.values()]
                panel.barh(list(rows), values, left=left, label=service.split()[0])
                left = [a + b for a, b in zip(left, values, strict=True)]
            for number, total in enumerate(left):
                panel.text(total, number, f" {total:.1f}", va="center")
            panel.axvline(MOST_CPU_MS, color="black", linestyle=":")
            panel.invert_yaxis()
            panel.set(xlabel="ms of CPU per evaluation", title="all services together", xlim=(0, max(left) * 1.2))
            panel.legend(fontsize=7)
        elif part == "efficiency":
            numbers = [int(number) for number in measured]
            panel.plot(numbers, [one["steady"] for one in measured.values()], "o-", label="steady")
            panel.plot(numbers, [one["whole"] for one in measured.values()], "o--", label="with start and end")
            panel.axhline(LEAST_EFFICIENCY, color="black", linestyle=":")
            panel.set(xscale="log", xlabel="simulated workers", title="efficiency, trials of 1 s", ylim=(0, 1.05))
            panel.set_xticks(numbers, [str(number) for number in numbers])
            panel.minorticks_off()
            panel.legend(loc="lower left")
        elif part == "memory":
            sizes = [int(size) for size in measured]
            for name in ("evaluator", "redis"):
                panel.plot(sizes, [one["mib"][name] for one in measured.values()], "o-", label=name)
            panel.set(xscale="log", xlabel="evaluations waiting", ylabel="resident MiB", title="memory")
            panel.set_ylim(0, None)
            panel.legend()
        else:
            bars = panel.barh(list(measured), [one["final"] for one in measured.values()])
            panel.bar_label(bars, fmt="%.1f", padding=2)
            panel.axvline(MOST_KILL_SECONDS, color="black", linestyle=":")
            panel.invert_yaxis()
            panel.set(xlabel="seconds until all is final", title="after a death")
            panel.set_xlim(0, max(one["final"] for one in measured.values()) * 1.2)
    figure.suptitle("the control plane with simulated workers; dotted: what is wanted")
    figure.savefig(file, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="small: to see that it works")
    parser.add_argument("--workers", nargs="+", type=int, help="of efficiency")
    parser.add_argument("--sizes", nargs="+", type=int, help="evaluations of memory")
    parser.add_argument("--deaths", nargs="+", choices=DEATHS, help="of recovery")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="a picture; needs matplotlib")
    parser.add_argument("--measured", type=Path, help="measure nothing: plot what an earlier run wrote with --json")
    given = parser.parse_args(arguments)
    if given.measured:
        earlier = json.loads(given.measured.read_text(encoding="utf-8"))
        draw(given.plot or given.measured.with_suffix(".png"), earlier)
        return
    quick = given.quick
    measures: dict[str, Callable[[], Any]] = {
        "cpu": lambda: measure_cpu(quick),
        "efficiency": lambda: measure_efficiency(given.workers or ((1, 4) if quick else WORKERS), 6 if quick else 24),
        "memory": lambda: measure_memory(given.sizes or ((256, 1024) if quick else (1_000, 10_000, 100_000))),
        "watch": lambda: measure_watch(40 if quick else 800),
        "recovery": lambda: measure_recovery(given.deaths or (DEATHS[:1] if quick else DEATHS)),
    }
    details: dict[str, Any] = {}
    for part in given.parts:
        load = psutil.getloadavg()[0]
        print(f"{part} (simulated workers; load of the machine before: {load:.1f})", flush=True)
        details[part] = measures[part]()
        details.setdefault("load_before", {})[part] = load
    result = written(details)
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if given.plot:
        draw(given.plot, result)
    print(json.dumps({name: value for name, value in result.items() if name != "details"}))


if __name__ == "__main__":
    main()
