"""How many GPUs a day's work needs, and what the services around them need. Arithmetic; nothing is measured here.

N passages, K self-edits each, S seeds each, in one day:

    trials   = N x K x S x work_share
    GPUs     = ceil(trials x seconds_per_trial / (86,400 x busy_share))

``seconds_per_trial`` is the time of one GPU that trains a bank of adapters together, for one of them. Measured on the
GPU in question it is a number; without it, it is an estimate by counting operations:

    seconds_per_trial = (4 P x trained tokens + 2 P x answered tokens) / (peak FLOP/s x peak_share)

P: parameters of the student. 4 P a trained token: the frozen base costs 2 P forward and 2 P for the gradients of the
activations, and no gradients of weights; 2 P a token that is only read. What is not in it: the adapters, attention,
and that writing answers reads the weights once a step. ``peak_share`` stands for all of that. No GPU has been measured
yet, so ``PEAK_SHARE`` is an assumption; one CPU core reached 0.27 (all linear layers) to 0.42 (q and v) of its own
rate (docs/log.md).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preceptor.errors import PreceptorError

DAY = 86_400.0  # seconds
# Assumed. What an untried GPU is trusted with, of its rate on paper.
PEAK_SHARE = 0.25
# Assumed. A round waits for the teacher's update and for its last trials, and a run measures held-out passages.
BUSY_SHARE = 0.8
# Tokens of a default trial: the mean of bench.inner_loop's workload, lengths of published self-edits x 10 epochs.
TRAINED_TOKENS = 3_600.0
# 8 questions and 40 probes of 50 tokens with their answers.
ANSWERED_TOKENS = 2_400.0
# A self-edit as the teacher writes it: a tenth of what is trained in ten epochs.
SELF_EDIT_TOKENS = 360.0
# Bytes a parameter of the frozen base in bf16; what else a step needs has to fit into the rest of the memory.
BYTES_PER_PARAMETER, WEIGHTS_SHARE = 2, 0.75

# Measured by bench.control_plane (docs/control_plane.md), one trial a batch, which is the worst shape: milliseconds of
# CPU of all services for one evaluation, and evaluations a second that one evaluator and orchestrator brought through
# on two cores which they shared with the simulated workers. Neither is a limit: faster has not been tried.
CPU_MS_PER_EVALUATION = 5.02
MEASURED_PER_SECOND = 143.0
# Measured on the shipped world (12 reward questions and 64 probes a trial): the four databases hold 13 kB for an
# evaluation, 1.4 kB of them for each of its trials; Redis keeps each trial's result (3.8 kB as JSON) for a day.
DATABASE_BYTES_PER_EVALUATION, DATABASE_BYTES_PER_TRIAL, REDIS_BYTES_PER_TRIAL = 12_000, 1_400, 3_800
# The evaluator keeps two batches a worker on the queue, and this many at most (PRECEPTOR_BATCHES_IN_FLIGHT).
BATCHES_PER_WORKER, BATCHES_IN_FLIGHT = 2, 256


@dataclass(frozen=True, slots=True)
class Gpu:
    """What a data sheet says: dense bf16 FLOP/s (without sparsity) and bytes of memory."""

    name: str
    peak: float
    memory: float


GPUS = (
    Gpu("L4", 121e12, 24e9),
    Gpu("L40S", 362e12, 48e9),
    Gpu("A100 80GB", 312e12, 80e9),
    Gpu("H100", 989e12, 80e9),
    Gpu("H200", 989e12, 141e9),
)


@dataclass(frozen=True, slots=True)
class Work:
    """A day's work. Raises PreceptorError(INVALID_REQUEST) for what is no work or no share."""

    passages: int
    self_edits: int  # of a passage
    seeds: int  # of a self-edit
    # Of all seeds for everybody, what is really trained. A race needed 0.15 to 0.21 of 8 seeds (docs/log.md).
    work_share: float = 1.0
    busy_share: float = BUSY_SHARE
    self_edit_tokens: float = SELF_EDIT_TOKENS

    def __post_init__(self) -> None:
        for name in ("passages", "self_edits", "seeds", "self_edit_tokens"):
            _check(name, getattr(self, name), math.inf)
        for name in ("work_share", "busy_share"):
            _check(name, getattr(self, name), 1.0)

    @property
    def evaluations(self) -> int:
        """Of a day."""
        return self.passages * self.self_edits

    @property
    def trials(self) -> float:
        """Of a day."""
        return self.evaluations * self.seeds * self.work_share


@dataclass(frozen=True, slots=True)
class Need:
    """GPUs of one kind that the work needs."""

    gpu: str
    seconds_per_trial: float | None  # None: the student does not fit
    gpus: int | None
    measured: bool  # False: an estimate


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the services need beside the GPUs; ``workers`` is one for each GPU."""

    trials_per_second: float  # while the GPUs are busy
    cores: float  # of all services together
    of_measured_rate: float  # above 1: more than has been tried with one evaluator
    teacher_tokens_per_second: float  # on average, while the GPUs are busy
    redis_bytes: float
    database_bytes_per_day: float
    batches_in_flight: int  # what PRECEPTOR_BATCHES_IN_FLIGHT must be at least


def estimated_seconds(
    parameters: float,
    gpu: Gpu,
    peak_share: float = PEAK_SHARE,
    trained_tokens: float = TRAINED_TOKENS,
    answered_tokens: float = ANSWERED_TOKENS,
) -> float | None:
    """Seconds of the GPU for one trial by the count above; None where the weights leave no room to train.

    Raises PreceptorError(INVALID_REQUEST).
    """
    _check("student_billions", parameters, math.inf)
    _check("trained_tokens", trained_tokens, math.inf)
    _check("peak_share", peak_share, 1.0)
    if not 0 <= answered_tokens < math.inf:
        raise PreceptorError("INVALID_REQUEST", f"must not be negative: {answered_tokens:g}", field="answered_tokens")
    if BYTES_PER_PARAMETER * parameters > WEIGHTS_SHARE * gpu.memory:
        return None
    return parameters * (4 * trained_tokens + 2 * answered_tokens) / (gpu.peak * peak_share)


def gpus_needed(work: Work, seconds_per_trial: float) -> int:
    """GPUs that do the work within a day. Raises PreceptorError(INVALID_REQUEST)."""
    _check("seconds_per_trial", seconds_per_trial, math.inf)
    return max(
        1, math.ceil(round(work.trials * seconds_per_trial / (DAY * work.busy_share), 9))
    )  # 9: no GPU for a last bit


def estimates(work: Work, parameters: float, **how: float) -> list[Need]:
    """For each GPU of the table; ``how`` goes to ``estimated_seconds``."""
    found = [(gpu.name, estimated_seconds(parameters, gpu, **how)) for gpu in GPUS]
    return [Need(name, s, None if s is None else gpus_needed(work, s), measured=False) for name, s in found]


def surroundings(work: Work, gpus: int) -> Surroundings:
    """What stands beside so many GPUs."""
    busy_day = DAY * work.busy_share
    rate = work.trials / busy_day
    return Surroundings(
        trials_per_second=rate,
        # Each trial counted as an evaluation: so it was measured, with one seed.
        cores=rate * CPU_MS_PER_EVALUATION / 1000,
        of_measured_rate=rate / MEASURED_PER_SECOND,
        teacher_tokens_per_second=work.evaluations * work.self_edit_tokens / busy_day,
        redis_bytes=work.trials * REDIS_BYTES_PER_TRIAL,
        database_bytes_per_day=work.evaluations * DATABASE_BYTES_PER_EVALUATION
        + work.trials * DATABASE_BYTES_PER_TRIAL,
        batches_in_flight=BATCHES_PER_WORKER * gpus,
    )


def read_bench(file: Path) -> tuple[str, float]:
    """What was measured and its seconds per trial, from the JSON of ``bench.inner_loop``: the fastest of our arms on
    published self-edits, with answering and export.

    Raises PreceptorError(FILE_NOT_FOUND, INVALID_REQUEST).
    """
    try:
        written: Any = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise PreceptorError("FILE_NOT_FOUND", f"cannot be read: {error.strerror}", file=str(file)) from None
    except (ValueError, RecursionError):
        raise PreceptorError("INVALID_REQUEST", "is not JSON", file=str(file)) from None
    try:
        found = [
            (_seconds(result, written["details"]["arms"][name]), name)
            for name, result in written["arms"].items()
            if name.startswith("ours_k")
        ]
        seconds, arm = min(found)
        _check("arms", seconds, math.inf)
        return f"{written['shape']} on {written['device']}, {arm}", seconds
    except (KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError):
        message = "holds no measurement of ours; write it with `python -m bench.inner_loop --targets qv --json FILE`"
        raise PreceptorError("INVALID_REQUEST", message, file=str(file)) from None


def _seconds(result: Mapping[str, Any], details: Mapping[str, Any]) -> float:
    """Of one trial: training, as the arm's rate says it, then its answers and the adapter's folder."""
    extra = (details["answer_seconds"], details["export_seconds"])
    return 1 / float(result["trials_per_second"]) + sum(float(part or 0.0) for part in extra)


def _check(name: str, value: float, most: float) -> None:
    if not 0 < value <= most or value == math.inf:
        allowed = "above 0" if most == math.inf else f"above 0 and at most {most:g}"
        raise PreceptorError("INVALID_REQUEST", f"must be {allowed}: {value:g}", field=name)
