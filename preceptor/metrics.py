"""What is counted and measured, for Prometheus: the catalogue, and one object per process that takes it.

    metrics.count(TRIALS, outcome="done")
    metrics.observe(TRIAL_PHASE_SECONDS, 1.5, phase="train")
    metrics.at_scrape(lambda: [sample(BATCHES, 3, state="waiting")])

``Metrics`` takes everything and keeps nothing: what a process has whose PRECEPTOR_METRICS_PORT is 0, at the price of an
empty call. ``PrometheusMetrics`` keeps it in a registry of its own and answers on that port. Nothing that goes wrong
here reaches the work: what cannot be told at a scrape is missing in it, and counted.

Labels have few values (states, reasons of the catalogue of errors, methods), but for ``run``: only runs under way.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from preceptor import __version__
from preceptor.errors import PreceptorError

log = logging.getLogger(__name__)

Kind = Literal["counter", "gauge", "histogram"]

# A batch takes from a tenth of a second (a tiny student) to an hour (its limit).
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 150.0, 300.0, 600.0, 1800.0, 3600.0)
_CALL_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
# A reward is a sum of differences, mostly between -1 and 1.
_REWARDS = (-1.0, -0.5, -0.25, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_ERRORS = (0.0, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)

TEACHER, STUDENT, EVALUATOR, ORCHESTRATOR, WORKER = "teacher", "student", "evaluator", "orchestrator", "worker"
SERVICES = (TEACHER, STUDENT, EVALUATOR, ORCHESTRATOR)
EVERYBODY = (*SERVICES, WORKER)


@dataclass(frozen=True, slots=True, eq=False)
class Metric:
    """One metric. ``labels``: their names, each with its values where they are known beforehand (a counter of them
    starts at 0, so that the first increase is one)."""

    name: str
    kind: Kind
    help: str
    processes: tuple[str, ...]
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()


# Everybody
BUILD = Metric(
    "preceptor_build_info",
    "gauge",
    "1; its labels say who and which version",
    EVERYBODY,
    {"process": (), "version": ()},
)
SCRAPE_ERRORS = Metric(
    "preceptor_scrape_errors_total", "counter", "gauges that could not be told at a scrape, and are missing", EVERYBODY
)
SPANS = Metric(
    "preceptor_spans_total",
    "counter",
    "spans of traces; full: the queue to the collector was full; refused: it did not take them; broken: a bug",
    EVERYBODY,
    {"outcome": ("sent", "full", "refused", "broken")},
)
# gRPC services
CALLS = Metric(
    "preceptor_grpc_calls_total",
    "counter",
    "calls that ended, by gRPC status; health checks are not counted",
    SERVICES,
    {"method": (), "code": ()},
)
CALL_SECONDS = Metric(
    "preceptor_grpc_call_seconds", "histogram", "time of unary calls", SERVICES, {"method": ()}, _CALL_SECONDS
)
STREAMS = Metric("preceptor_grpc_streams_open", "gauge", "streams under way", SERVICES, {"method": ()})
ERRORS = Metric(
    "preceptor_errors_total", "counter", "errors told to callers, by reason (docs/errors.md)", SERVICES, {"reason": ()}
)
# The evaluator
BATCHES = Metric(
    "preceptor_batches",
    "gauge",
    "trial batches that are not final: waiting in SQL, queued on Redis, running on a worker",
    (EVALUATOR,),
    {"state": ("waiting", "queued", "running")},
)
UNFINISHED_BATCHES = Metric(
    "preceptor_unfinished_batches",
    "gauge",
    "batches that are not final, by the queue of their student: what workers are scaled by",
    (EVALUATOR,),
    {"queue": ()},
)
WORKERS = Metric("preceptor_workers_alive", "gauge", "workers whose heartbeat is seen", (EVALUATOR,))
EVALUATIONS = Metric(
    "preceptor_evaluations",
    "gauge",
    "evaluations that are not final: queued, or running on a worker or with a judge",
    (EVALUATOR,),
    {"state": ("queued", "running")},
)
DEAD_LETTERS = Metric(
    "preceptor_dead_letters",
    "gauge",
    "evaluations that FAILED and stay so: `preceptor evaluations failed`, then `retry`",
    (EVALUATOR,),
)
EVALUATIONS_ASKED = Metric(
    "preceptor_evaluations_asked_total",
    "counter",
    "evaluations that were asked for; known: had succeeded before and cost nothing",
    (EVALUATOR,),
    {"known": ("yes", "no")},
)
EVALUATIONS_FINISHED = Metric(
    "preceptor_evaluations_finished_total",
    "counter",
    "evaluations that became final",
    (EVALUATOR,),
    {"state": ("succeeded", "failed", "cancelled")},
)
EVALUATION_FAILURES = Metric(
    "preceptor_evaluation_failures_total", "counter", "evaluations that FAILED, by reason", (EVALUATOR,), {"reason": ()}
)
EVALUATION_SECONDS = Metric(
    "preceptor_evaluation_seconds",
    "histogram",
    "from asking for an evaluation to its final state",
    (EVALUATOR,),
    buckets=_SECONDS,
)
REWARD = Metric(
    "preceptor_reward",
    "histogram",
    "rewards as they are measured; look: of a race's first look, which nobody learns from",
    (EVALUATOR,),
    {"kind": ("reward", "look")},
    _REWARDS,
)
REWARD_ERROR = Metric(
    "preceptor_reward_stderr",
    "histogram",
    "standard errors of the rewards (looks left out), over questions and seeds",
    (EVALUATOR,),
    buckets=_ERRORS,
)
SEED_ERROR = Metric(
    "preceptor_reward_seed_stderr",
    "histogram",
    "standard errors of the rewards over seeds alone, where there are several: the noise of training",
    (EVALUATOR,),
    buckets=_ERRORS,
)
GRADING_SECONDS = Metric(
    "preceptor_grading_seconds",
    "histogram",
    "grading the answers of one evaluation and computing its reward",
    (EVALUATOR,),
    buckets=_CALL_SECONDS,
)
GRADING_WAITS = Metric("preceptor_grading_waiting", "gauge", "evaluations that wait for a judge", (EVALUATOR,))
TRIALS = Metric(
    "preceptor_trials_total",
    "counter",
    "trials that became final: done, or the reason of the failure",
    (EVALUATOR,),
    {"outcome": ("done",)},
)
ATTEMPTS = Metric(
    "preceptor_attempts_total",
    "counter",
    "ends of submitted batches: brought results; retried (some trials run again); given_back (the worker was told to "
    "end); lost (its worker died or stood still); dropped (off the queue, nobody had it); given_up",
    (EVALUATOR,),
    {"end": ("results", "retried", "given_back", "lost", "dropped", "given_up")},
)
DISPATCH_TROUBLE = Metric(
    "preceptor_dispatch_failures_total",
    "counter",
    "turns of the dispatcher that failed, by reason (BROKER_UNREACHABLE: Redis is away)",
    (EVALUATOR,),
    {"reason": ()},
)
# Workers
TRIAL_PHASE_SECONDS = Metric(
    "preceptor_trial_batch_seconds",
    "histogram",
    "time of a trial batch by phase: queue (sent until a worker began), load (the student), train, answer, other",
    (WORKER,),
    {"phase": ("queue", "load", "train", "answer", "other")},
    _SECONDS,
)
WORKER_BATCHES = Metric(
    "preceptor_worker_batches_total",
    "counter",
    "batches of this worker: done, or the reason of the failure of all of it; given_up: left to somebody else",
    (WORKER,),
    {"outcome": ("done", "given_up")},
)
WORKER_TRIALS = Metric(
    "preceptor_worker_trials_total", "counter", "trials that this worker has done; failed ones are none", (WORKER,)
)
WORKER_BUSY = Metric("preceptor_worker_busy", "gauge", "1 while the worker is at a batch", (WORKER,))
TRAINED_TOKENS = Metric("preceptor_trained_tokens_total", "counter", "tokens that students were trained on", (WORKER,))
LOADED_BASES = Metric("preceptor_loaded_students", "gauge", "students in the memory of this worker", (WORKER,))
GPU_MEMORY = Metric(
    "preceptor_gpu_memory_bytes",
    "gauge",
    "memory of the GPU: allocated and reserved by this process, used by all and total of the device",
    (WORKER, TEACHER),
    {"kind": ("allocated", "reserved", "used", "total")},
)
# The teacher
TEACHER_TOKENS = Metric("preceptor_teacher_tokens_total", "counter", "tokens that the teacher has written", (TEACHER,))
TEACHER_WRITING = Metric(
    "preceptor_teacher_writing_seconds", "histogram", "writing one batch of self-edits", (TEACHER,), buckets=_SECONDS
)
SELF_EDITS = Metric(
    "preceptor_self_edits_total",
    "counter",
    "completions of the teacher, after they were drawn again",
    (TEACHER,),
    {"outcome": ("valid", "malformed")},
)
REDRAWS = Metric(
    "preceptor_self_edit_redraws_total", "counter", "completions drawn again because they were malformed", (TEACHER,)
)
UPDATES = Metric(
    "preceptor_policy_updates_total",
    "counter",
    "updates of the teacher that ended",
    (TEACHER,),
    {"state": ("ready", "failed")},
)
UPDATE_SECONDS = Metric(
    "preceptor_policy_update_seconds", "histogram", "training one policy", (TEACHER,), buckets=_SECONDS
)
UPDATE_EDITS = Metric(
    "preceptor_policy_update_self_edits_total",
    "counter",
    "self-edits offered to updates, and those of them that were trained on",
    (TEACHER,),
    {"part": ("offered", "kept")},
)
UPDATE_LOSS = Metric(
    "preceptor_policy_update_loss",
    "gauge",
    "loss of the last update at its first and its last step",
    (TEACHER,),
    {"step": ("first", "last")},
)
# The student service
STUDENT_SWAPS = Metric(
    "preceptor_student_swaps_total", "counter", "activations of another student than the active one", (STUDENT,)
)
# The orchestrator
RUNS = Metric("preceptor_runs", "gauge", "runs under way here", (ORCHESTRATOR,))
RUN_ROUND = Metric("preceptor_run_round", "gauge", "the round that a run is in", (ORCHESTRATOR,), {"run": ()})
RUN_DONE = Metric(
    "preceptor_run_done_ratio", "gauge", "share of a run's work that is done", (ORCHESTRATOR,), {"run": ()}
)
RUN_REWARD = Metric(
    "preceptor_run_reward",
    "gauge",
    "mean reward of a run's latest round that has one",
    (ORCHESTRATOR,),
    {"run": ()},
)
RUN_REWARD_ERROR = Metric(
    "preceptor_run_reward_stderr", "gauge", "standard error of that mean, by task", (ORCHESTRATOR,), {"run": ()}
)
RUNS_FINISHED = Metric(
    "preceptor_runs_finished_total",
    "counter",
    "runs that ended here; stopped: cancelled, or the service went down and it goes on later",
    (ORCHESTRATOR,),
    {"outcome": ("succeeded", "failed", "stopped")},
)

CATALOGUE: tuple[Metric, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))


@dataclass(frozen=True, slots=True)
class Sample:
    """The value of a gauge at a scrape."""

    metric: Metric
    value: float
    labels: Mapping[str, str]


def sample(metric: Metric, value: float, **labels: str) -> Sample:
    """A gauge's value, for ``Metrics.at_scrape``."""
    return Sample(metric, value, labels)


def gpu_memory() -> Iterator[Sample]:
    """Of the GPU that this process computes on, for ``Metrics.at_scrape``; nothing where it has not begun to use one.
    Imports nothing."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    cuda = torch.cuda
    # The current device is the one of the asking thread. Whoever has tensors somewhere computes there.
    for index in [index for index in range(cuda.device_count()) if cuda.memory_reserved(index)][:1]:
        free, total = cuda.mem_get_info(index)
        yield sample(GPU_MEMORY, cuda.memory_allocated(index), kind="allocated")
        yield sample(GPU_MEMORY, cuda.memory_reserved(index), kind="reserved")
        yield sample(GPU_MEMORY, total - free, kind="used")
        yield sample(GPU_MEMORY, total, kind="total")


class Metrics:
    """Takes everything and keeps nothing. May be called from any thread."""

    def count(self, metric: Metric, amount: float = 1.0, **labels: str) -> None:
        """A counter grows."""

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """One more value of a histogram."""

    def put(self, metric: Metric, value: float, **labels: str) -> None:
        """A gauge is this now."""

    def add(self, metric: Metric, amount: float, **labels: str) -> None:
        """A gauge rises, or falls by a negative amount."""

    def at_scrape(self, look: Callable[[], Iterable[Sample]]) -> None:
        """These gauges are asked for at each scrape, in a thread of the scrape. Where ``look`` raises they are missing
        in it."""

    def close(self) -> None:
        """Answers no more scrapes."""


class PrometheusMetrics(Metrics):
    """Keeps the metrics of one process, and answers ``GET /metrics`` since its construction.

    Raises PreceptorError: EXTRA_MISSING without prometheus_client, PORT_IN_USE.
    """

    def __init__(self, process: str, host: str, port: int) -> None:
        """``port``: 0 means any free one; it is then ``self.port``."""
        try:
            import prometheus_client as client
            from prometheus_client.core import GaugeMetricFamily
        except ImportError:
            raise PreceptorError(
                "EXTRA_MISSING",
                "PRECEPTOR_METRICS_PORT is set and prometheus_client is not installed",
                extra="observability",
            ) from None
        client.disable_created_metrics()  # type: ignore[no-untyped-call]  # a time beside each counter
        self._registry = client.CollectorRegistry()
        self._looks: list[Callable[[], Iterable[Sample]]] = []
        self._instruments: dict[Metric, Any] = {}
        self._children: dict[tuple[Metric, tuple[tuple[str, str], ...]], Any] = {}
        self._shown: set[Metric] = set()
        self._lock = threading.Lock()
        self._families = GaugeMetricFamily
        self._registry.register(self)
        client.ProcessCollector(registry=self._registry)
        classes = {"counter": client.Counter, "gauge": client.Gauge}
        for metric in CATALOGUE:
            if process not in metric.processes:
                continue
            if metric.kind == "histogram":
                made: Any = client.Histogram(
                    metric.name, metric.help, tuple(metric.labels), buckets=metric.buckets, registry=None
                )
            else:
                made = classes[metric.kind](metric.name, metric.help, tuple(metric.labels), registry=None)
            self._instruments[metric] = made
            if metric.kind != "gauge":
                self._registry.register(made)
                if len(metric.labels) == 1:
                    ((_, values),) = metric.labels.items()
                    for value in values:
                        made.labels(value)
        self.put(BUILD, 1, process=process, version=__version__)
        try:
            self._server, self._thread = client.start_http_server(port, host, self._registry)
        except OSError as error:
            raise PreceptorError(
                "PORT_IN_USE", f"cannot answer scrapes on {host}:{port}: {error.strerror or error}", port=port
            ) from None
        self.port = int(self._server.server_port)

    def count(self, metric: Metric, amount: float = 1.0, **labels: str) -> None:
        """See Metrics."""
        self._child(metric, labels).inc(amount)

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """See Metrics."""
        self._child(metric, labels).observe(value)

    def put(self, metric: Metric, value: float, **labels: str) -> None:
        """See Metrics."""
        self._child(metric, labels).set(value)

    def add(self, metric: Metric, amount: float, **labels: str) -> None:
        """See Metrics."""
        self._child(metric, labels).inc(amount)

    def at_scrape(self, look: Callable[[], Iterable[Sample]]) -> None:
        """See Metrics."""
        self._looks.append(look)

    def close(self) -> None:
        """See Metrics."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def collect(self) -> Iterator[Any]:
        """For prometheus_client: what is asked for at each scrape."""
        found: dict[Metric, Any] = {}
        for look in list(self._looks):
            try:
                samples = list(look())
            except (
                Exception
            ) as error:  # a database or Redis that is away: the rest of the scrape says more than an error
                log.debug("a gauge cannot be told: %s", error)
                self.count(SCRAPE_ERRORS)
                continue
            for one in samples:
                family = found.get(one.metric)
                if family is None:
                    labels = list(one.metric.labels)
                    family = found[one.metric] = self._families(one.metric.name, one.metric.help, labels=labels)
                family.add_metric([one.labels[label] for label in one.metric.labels], one.value)
        yield from found.values()

    def describe(self) -> list[Any]:
        """For prometheus_client, which would otherwise ask at registration."""
        return []

    def _child(self, metric: Metric, labels: Mapping[str, str]) -> Any:
        key = (metric, tuple(labels.items()))
        child = self._children.get(key)
        if child is None:
            made = self._instruments[metric]
            with self._lock:
                if metric.kind == "gauge" and metric not in self._shown:  # one that nobody puts is not shown as 0
                    self._registry.register(made)
                    self._shown.add(metric)
            child = self._children[key] = made.labels(**labels) if metric.labels else made
        return child
