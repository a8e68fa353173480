"""One exception and one catalogue: reason -> gRPC status code -> what the user can do about it.

A servicer raises ``PreceptorError("REASON", "what happened")``; ``preceptor.server`` turns it into a status with
``ErrorInfo``; ``preceptor.channel`` raises the same exception again in the client. Reasons are part of the contract.
"""

from __future__ import annotations

from dataclasses import dataclass

import grpc

DOMAIN = "preceptor"


@dataclass(frozen=True, slots=True)
class Entry:
    """How one reason is reported."""

    code: grpc.StatusCode
    next_step: str


_INVALID = grpc.StatusCode.INVALID_ARGUMENT
_MISSING = grpc.StatusCode.NOT_FOUND
_STATE = grpc.StatusCode.FAILED_PRECONDITION
_EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
_DOWN = grpc.StatusCode.UNAVAILABLE

CATALOGUE: dict[str, Entry] = {
    # what the user gave
    "BAD_CONFIG": Entry(_INVALID, "correct the named key; `preceptor run CONFIG --dry-run` prints what is read"),
    "BAD_TASK_FILE": Entry(_INVALID, "correct the named place; `preceptor tasks check FILE` lists all of them"),
    "BAD_SELF_EDIT": Entry(
        _INVALID, 'correct the named place; a self-edit is text, one document a line, or JSON {"documents": [...]}'
    ),
    "FILE_NOT_FOUND": Entry(_INVALID, "check the path"),
    "OUTPUT_NOT_WRITABLE": Entry(_STATE, "choose another folder with --out, or make room and set its permissions"),
    "INVALID_REQUEST": Entry(_INVALID, "correct the named field"),
    "PASSAGE_TOO_LONG": Entry(_INVALID, "shorten or split the passage, or use a model with a longer context"),
    "UNKNOWN_PROMPT_FORMAT": Entry(_INVALID, "use one of the named formats (`preceptor formats list`)"),
    "BAD_PROMPT_TEMPLATE": Entry(
        _INVALID, "correct the named places; docs/formats.md shows what a template looks like"
    ),
    "REQUEST_ID_REUSED": Entry(grpc.StatusCode.ALREADY_EXISTS, "use a new request_id for a request that differs"),
    # models
    "STUDENT_NOT_FOUND": Entry(_MISSING, "`preceptor students list` shows the registered ones"),
    "STUDENT_NAME_TAKEN": Entry(grpc.StatusCode.ALREADY_EXISTS, "choose another name or delete the old student"),
    "STUDENT_IN_USE": Entry(_STATE, "activate another student first"),
    "NO_ACTIVE_STUDENT": Entry(_STATE, "`preceptor students activate NAME`"),
    "BAD_STUDENT_SOURCE": Entry(
        _INVALID, "give a folder or s3://... with config.json, tokenizer.json and *.safetensors, or a hub's model id"
    ),
    "BAD_TEACHER_SOURCE": Entry(
        _INVALID,
        "set PRECEPTOR_TEACHER_SOURCE to a folder with config.json, tokenizer.json and *.safetensors, or a model id",
    ),
    "STUDENT_CHANGED": Entry(_STATE, "put the registered files back, or register the folder under a new name"),
    "STUDENT_TOO_LARGE": Entry(_STATE, "use workers with a larger GPU for it, or a smaller student"),
    "NOT_SERVABLE": Entry(
        _STATE, "serve another student; workers ask this one by themselves (PRECEPTOR_ANSWER_SERVER_URL empty)"
    ),
    "VLLM_NOT_FOUND": Entry(
        _STATE,
        "install vLLM in an environment of its own (`pip install vllm`, on the CPU `make vllm`) and name its "
        "interpreter in PRECEPTOR_VLLM_PYTHON",
    ),
    "UNSAFE_CHECKPOINT": Entry(_INVALID, "convert the checkpoint to safetensors; pickle files are never loaded"),
    "MODEL_UNREACHABLE": Entry(
        _DOWN, "check the network, HF_ENDPOINT (a mirror), HF_HUB_OFFLINE and HF_TOKEN; or give a folder or s3://..."
    ),
    "TEACHER_IS_FIXED": Entry(
        _STATE, "use the teacher backend transformers or vllm for a teacher that learns, or a run without updates"
    ),
    # inference servers (vLLM, a vendor's)
    "EXTERNAL_TEACHER_NOT_SET": Entry(
        _STATE, "set PRECEPTOR_EXTERNAL_TEACHER_ADDRESS for the orchestrator, or leave out heldout.external_teacher"
    ),
    "SERVER_UNREACHABLE": Entry(_DOWN, "check that the inference server of the named address runs"),
    "SERVER_REFUSED": Entry(_STATE, "check the named server's key and model, and what it says; its log says more"),
    "SERVER_UNREADABLE": Entry(_STATE, "give the address of an OpenAI-compatible server (http://host:8000)"),
    "SERVER_TOO_OLD": Entry(_STATE, "install the named version of vLLM or a newer one"),
    "SERVER_CANNOT_ADAPT": Entry(
        _STATE, "start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"
    ),
    "ADAPTER_NOT_SEEN": Entry(
        _STATE, "mount the folder in the server at the same path (teacher: or set PRECEPTOR_TEACHER_SERVER_MOUNT)"
    ),
    "SERVER_CANNOT_SLEEP": Entry(
        _STATE, "start vLLM with --enable-sleep-mode and VLLM_SERVER_DEV_MODE=1, or let the teacher not share its GPU"
    ),
    "MODEL_NOT_SERVED": Entry(_STATE, "give the name of a model that the server serves (vLLM: --served-model-name)"),
    "PROMPT_TOO_LONG": Entry(_INVALID, "shorten the text, or start the server with a larger --max-model-len"),
    "POLICY_NOT_FOUND": Entry(_MISSING, "ListPolicies shows the known ones"),
    "POLICY_OF_ANOTHER_BASE": Entry(
        _STATE, "serve the teacher that the policy was trained from, or name another policy"
    ),
    "POLICY_NOT_READY": Entry(_STATE, "wait until the policy is READY, or use another one"),
    "UPDATE_FAILED": Entry(grpc.StatusCode.INTERNAL, "look at the teacher's log; the parent policy is as it was"),
    "UPDATE_DIVERGED": Entry(_STATE, "lower the update's learning rate; the parent policy is as it was"),
    "ARTIFACT_NOT_FOUND": Entry(
        _MISSING, "check that all services share the artifacts: PRECEPTOR_ARTIFACTS_URL, or one folder for all"
    ),
    "ARTIFACT_CORRUPT": Entry(grpc.StatusCode.DATA_LOSS, "delete the artifact and run again"),
    "ARTIFACT_STORE_UNREACHABLE": Entry(
        _DOWN, "check PRECEPTOR_ARTIFACTS_URL, AWS_ENDPOINT_URL and the network; what was under way goes on by itself"
    ),
    "ARTIFACT_STORE_REFUSED": Entry(
        _STATE, "check the bucket of PRECEPTOR_ARTIFACTS_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION"
    ),
    # evaluations and trials
    "EVALUATION_NOT_FOUND": Entry(_MISSING, "check the id"),
    "GRADER_UNKNOWN": Entry(_INVALID, "use one of the named graders"),
    "JUDGE_NOT_SET": Entry(
        _STATE, "set PRECEPTOR_JUDGE_URL and PRECEPTOR_JUDGE_MODEL for the evaluator, or use the grader `lexical`"
    ),
    "JUDGE_UNREACHABLE": Entry(_DOWN, "check that the judge of PRECEPTOR_JUDGE_URL answers, then ask again"),
    "JUDGE_UNREADABLE": Entry(_STATE, "use a model that answers with one word, as it is told to"),
    "JUDGE_REFUSED": Entry(_STATE, "check PRECEPTOR_JUDGE_URL, PRECEPTOR_JUDGE_MODEL and PRECEPTOR_JUDGE_API_KEY"),
    "TARGET_MODULES_UNMATCHED": Entry(_INVALID, "name modules that the student has, or leave the default"),
    "BASE_NOT_ADAPTABLE": Entry(_STATE, "name other target modules, or register the student unquantised"),
    "RANK_TOO_LARGE": Entry(_INVALID, "lower the rank, or leave out the narrow target modules"),
    "ADAPTER_MISMATCH": Entry(_INVALID, "use a plain LoRA adapter that was made for this base model"),
    "SEQUENCE_TOO_LONG": Entry(_INVALID, "shorten the document; the limit is the student's context"),
    "NOTHING_TO_TRAIN": Entry(_INVALID, "use the loss mask `all`, or put the loss marker into the documents"),
    "TRIAL_DIVERGED": Entry(_STATE, "lower the learning rate"),
    "TRIAL_OUT_OF_MEMORY": Entry(_EXHAUSTED, "lower the batch size or the documents' length"),
    "TRIAL_TIMEOUT": Entry(grpc.StatusCode.DEADLINE_EXCEEDED, "raise the trial's time limit or shrink the work"),
    "TRIAL_LOST": Entry(_DOWN, "look at the worker's log; the trial was given up after its last attempt"),
    "DEVICE_FAILED": Entry(
        _DOWN,
        "the worker ended itself to get a fresh device; where it happens again, look at its log and driver",
    ),
    "QUEUE_FULL": Entry(_EXHAUSTED, "wait until some evaluations are done, or raise PRECEPTOR_MAX_WAITING"),
    "TRIAL_FAILED": Entry(grpc.StatusCode.INTERNAL, "look at the worker's log under the named trial batch"),
    # runs
    "RUN_NOT_FOUND": Entry(_MISSING, "`preceptor runs list` shows the known ones"),
    "RUN_NOT_RESUMABLE": Entry(_STATE, "only a run that failed, was cancelled or was interrupted can be resumed"),
    "RUN_ALREADY_FINISHED": Entry(_STATE, "create a new run"),
    "RUN_NOT_FINISHED": Entry(_STATE, "wait until it has succeeded; `preceptor runs watch RUN` shows how far it is"),
    "RUN_FAILED": Entry(grpc.StatusCode.INTERNAL, "`preceptor runs resume RUN` goes on where it stopped"),
    "TOO_MANY_FAILURES": Entry(_STATE, "look at the failures' reasons, mend them, then `preceptor runs resume RUN`"),
    "NO_QUESTIONS": Entry(
        _STATE, "lower labels.agreement, use a teacher that writes better questions, or give questions"
    ),
    # adapting a student
    "NOTHING_HELPED": Entry(
        _STATE,
        "the student is as it was; see lineage.json for every self-edit's reward, then let the policy write more "
        "(--self-edits), train it (`preceptor run`), or lower --min-z",
    ),
    # the house
    "STACK_NOT_UP": Entry(_DOWN, "start it with `preceptor up`; where --connect was given, leave it out instead"),
    "WRONG_TEACHER": Entry(
        _STATE, "start the stack with `preceptor up --world` and the named world, or leave out --connect"
    ),
    "STACK_ALREADY_UP": Entry(_STATE, "use --connect to work with it, or end it first"),
    "EXTRA_MISSING": Entry(_STATE, "install the named extra: pip install 'preceptor[EXTRA]'"),
    "PORT_IN_USE": Entry(_STATE, "end the named process or choose another port"),
    "REDIS_NOT_FOUND": Entry(
        _STATE, "install Redis (`apt install redis-server`, `brew install redis`) or set PRECEPTOR_BROKER_URL"
    ),
    "DEVICE_UNUSABLE": Entry(_STATE, "set the named variable to cpu or to a device that torch sees"),
    "GPU_NONE_LEFT": Entry(
        _EXHAUSTED, "start fewer workers here, one a GPU (or raise PRECEPTOR_GPU_SHARE), or end the named ones"
    ),
    "DATABASE_UNREACHABLE": Entry(
        _DOWN, "check PRECEPTOR_DATABASE_URL, and that its server runs, or that the folder can be written"
    ),
    "DATABASE_REFUSED": Entry(
        _STATE,
        "correct user, password, database and TLS in PRECEPTOR_DATABASE_URL and PRECEPTOR_DATABASE_PASSWORD_FILE, or "
        "give the user the right that the message names",
    ),
    "DATABASE_TOO_NEW": Entry(
        _STATE, "run the newer version of Preceptor that has migrated it, or go back to a copy from before"
    ),
    "DISK_FULL": Entry(_EXHAUSTED, "make room on the named disk; what was under way goes on by itself"),
    "BROKER_REFUSED": Entry(_STATE, "correct user, password and database number in PRECEPTOR_BROKER_URL"),
    "BROKER_UNREACHABLE": Entry(_DOWN, "check that Redis runs and that PRECEPTOR_BROKER_URL is right"),
    "SERVICE_UNREACHABLE": Entry(_DOWN, "check that the service runs and that its address is right"),
    "UNAUTHENTICATED": Entry(
        grpc.StatusCode.UNAUTHENTICATED, "give every process and client the same token (PRECEPTOR_TOKEN)"
    ),
    "TLS_FAILED": Entry(_DOWN, "give both sides certificates of one authority, still valid (PRECEPTOR_TLS)"),
    "VERSION_SKEW": Entry(_STATE, "run the same version of Preceptor everywhere; the message names both"),
    "PROCESS_DIED": Entry(grpc.StatusCode.INTERNAL, "look at the named log file"),
    "DEADLINE_EXCEEDED": Entry(grpc.StatusCode.DEADLINE_EXCEEDED, "try again; the service is slow or stuck"),
    "CANCELLED": Entry(grpc.StatusCode.CANCELLED, "nothing to do: it was asked for"),
    "RATE_LIMITED": Entry(
        _EXHAUSTED, "call less often, or raise PRECEPTOR_RATE_LIMIT of the service; the client waits by itself"
    ),
    "SERVICE_BUSY": Entry(
        _DOWN, "try again in a few seconds, or raise PRECEPTOR_MAX_THREADS or PRECEPTOR_MAX_STREAMS of the service"
    ),
    "NOT_SERVED": Entry(grpc.StatusCode.UNIMPLEMENTED, "use a version of Preceptor that serves it"),
    "SHUTTING_DOWN": Entry(_DOWN, "try again in a few seconds"),
    "INTERNAL": Entry(grpc.StatusCode.INTERNAL, "this is a bug; the service's log has the traceback"),
}


class PreceptorError(Exception):
    """What went wrong, under a reason of the catalogue.

    ``metadata`` names the place (``file``, ``line``, ``field``, ``port``...); it travels with the error.
    """

    def __init__(self, reason: str, message: str, **metadata: str | int) -> None:
        if reason not in CATALOGUE:
            raise ValueError(f"reason {reason!r} is not in the catalogue")
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata = {key: str(value) for key, value in metadata.items()}

    @property
    def code(self) -> grpc.StatusCode:
        """The gRPC status code of the reason."""
        return CATALOGUE[self.reason].code

    @property
    def next_step(self) -> str:
        """What the user can do about it."""
        return CATALOGUE[self.reason].next_step

    def __str__(self) -> str:
        place = ":".join(self.metadata[k] for k in ("file", "line") if k in self.metadata)
        field = f" [{self.metadata['field']}]" if "field" in self.metadata else ""
        return f"{place}{': ' if place else ''}{self.message}{field}"

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.reason, self.message, self.metadata))


def _rebuild(reason: str, message: str, metadata: dict[str, str]) -> PreceptorError:
    return PreceptorError(reason, message, **metadata)
