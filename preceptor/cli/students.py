"""``preceptor students``: the registry of students, and the swap."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from preceptor.cli.output import json_option

if TYPE_CHECKING:
    from preceptor.v1 import student_pb2


@click.group()
def students() -> None:
    """Lists, registers and swaps students."""


@students.command("list")
@json_option
def list_students(as_json: bool) -> None:
    """Lists the registered students."""
    from preceptor.channel import call
    from preceptor.cli.connection import students_in_use
    from preceptor.cli.output import print_json, print_table
    from preceptor.v1 import student_pb2

    stub, token = students_in_use(), ""
    found: list[student_pb2.Student] = []
    while True:
        page = call(stub.ListStudents, student_pb2.ListStudentsRequest(page_token=token))
        found += page.students
        if not (token := page.next_page_token):
            break
    if as_json:
        print_json({"students": [_as_json(student) for student in found]})
        return
    print_table(
        ["name", "active", "architecture", "parameters", "context", "commit", "source"],
        [
            [
                student.name,
                "yes" if student.active else "",
                student.architecture,
                student.parameters,
                student.context_tokens,
                student.pinned.commit[:12],
                student.pinned.source,
            ]
            for student in found
        ],
        empty="no student is registered; `preceptor students register NAME --source FOLDER_S3_URL_OR_HF_ID`",
    )


@students.command()
@click.argument("name")
@click.option(
    "--source", required=True, help="A folder that the workers can read, s3://bucket/prefix, or a model id of the hub."
)
@click.option("--revision", default="", help="Revision on the hub [default: its default branch, pinned now].")
@json_option
def register(name: str, source: str, revision: str, as_json: bool) -> None:
    """Registers a student under NAME. Nothing uses it before it is activated."""
    from preceptor.channel import call, new_request_id
    from preceptor.cli.connection import students_in_use
    from preceptor.cli.output import print_json
    from preceptor.v1 import student_pb2

    # The services may run in another folder; what exists here is meant as seen from here.
    where = str(Path(source).resolve()) if Path(source).exists() else source
    request = student_pb2.RegisterStudentRequest(
        request_id=new_request_id(), name=name, source=where, revision=revision
    )
    # Validation hashes the weights, which takes minutes for a large model.
    student = call(students_in_use().RegisterStudent, request, deadline=600).student
    if as_json:
        print_json(_as_json(student))
    else:
        _print_student(student)


@students.command()
@click.argument("name")
@click.option("--wait", is_flag=True, help="Wait until a worker has it in memory.")
@click.option("--timeout", type=click.FloatRange(min=0.1), default=600.0, show_default=True, help="Seconds to wait.")
@json_option
def activate(name: str, wait: bool, timeout: float, as_json: bool) -> None:
    """Makes NAME the student of new work. What is under way keeps the student it began with."""
    from preceptor.channel import call, new_request_id, stream
    from preceptor.cli.connection import students_in_use
    from preceptor.cli.output import as_json_value, plain, print_json
    from preceptor.errors import CATALOGUE, PreceptorError
    from preceptor.v1 import student_pb2

    stub = students_in_use()
    request = student_pb2.ActivateStudentRequest(request_id=new_request_id(), name=name)
    deployment = call(stub.ActivateStudent, request).deployment
    if wait:
        watch = student_pb2.WatchDeploymentRequest(name=name)
        try:
            for response in stream(stub.WatchDeployment, watch, deadline=timeout):
                deployment = response.deployment
                print(
                    f"{plain(name)}: {_deployment_state(deployment)}, in memory of {deployment.workers_ready} of"
                    f" {deployment.workers_alive} workers",
                    file=sys.stderr,
                    flush=True,
                )
        except PreceptorError as error:
            if error.reason != "DEADLINE_EXCEEDED":
                raise
            raise PreceptorError(
                "DEADLINE_EXCEEDED",
                f"{name} is active, but after {timeout:g} s no worker has it in memory"
                f" ({deployment.workers_alive} workers alive)",
            ) from None
    if deployment.state == student_pb2.DEPLOYMENT_STATE_FAILED:
        reason = deployment.failure.reason if deployment.failure.reason in CATALOGUE else "INTERNAL"
        raise PreceptorError(reason, f"{name} could not be loaded: {deployment.failure.message}")
    if as_json:
        print_json({**as_json_value(deployment), "state": _deployment_state(deployment)})
    else:
        print(f"{plain(name)} is active ({_deployment_state(deployment).lower()})")


@students.command()
@click.argument("name", default="")
@json_option
def show(name: str, as_json: bool) -> None:
    """Shows the student NAME (or the active one) and its versions."""
    from preceptor.channel import call
    from preceptor.cli.connection import students_in_use
    from preceptor.cli.output import as_json_value, print_json, print_table
    from preceptor.v1 import student_pb2

    stub = students_in_use()
    student = call(stub.GetStudent, student_pb2.GetStudentRequest(name=name)).student
    versions = call(stub.ListVersions, student_pb2.ListVersionsRequest(name=student.name)).versions
    if as_json:
        print_json({**_as_json(student), "versions": [as_json_value(version) for version in versions]})
        return
    _print_student(student)
    print_table(
        ["version", "commit", "evaluation"],
        [[version.version, version.pinned.commit[:12], version.evaluation_id or "(base)"] for version in versions],
        empty="no versions",
    )


@students.command(context_settings={"ignore_unknown_options": True})
@click.argument("name")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="FOLDER|NAME=FOLDER",
    help="An adapter in PEFT's format; any number.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Interface to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option("--dtype", default="", help="What it computes in [default: as workers do, float32 or bfloat16].")
@click.option("--max-rank", type=click.IntRange(1, 512), default=64, show_default=True, help="Of any adapter.")
@click.option("--max-loras", type=click.IntRange(1, 256), default=8, show_default=True, help="Adapters in one step.")
@click.option("--for-workers", is_flag=True, help="Workers may load adapters (PRECEPTOR_ANSWER_SERVER_URL).")
@click.option("--dry-run", is_flag=True, help="Print the server's command and leave it at that.")
@click.argument("more", nargs=-1, metavar="[-- VLLM_ARGUMENTS...]", type=click.UNPROCESSED)
def serve(
    name: str, adapters: tuple[str, ...], for_workers: bool, dry_run: bool, more: tuple[str, ...], **given: Any
) -> None:
    """Serves the student NAME, and adapters of it, with vLLM (OpenAI API) until Ctrl-C.

    vLLM lives in an environment of its own: PRECEPTOR_VLLM_PYTHON names its interpreter, else the `vllm` on PATH is
    taken.
    """
    import os

    from preceptor.channel import call
    from preceptor.cli.connection import students_in_use
    from preceptor.v1 import student_pb2

    student = call(students_in_use().GetStudent, student_pb2.GetStudentRequest(name=name)).student
    command = [sys.executable, "-m", "student.serve", "--name", student.name]
    command += ["--source", student.pinned.source, "--commit", student.pinned.commit]
    for option, value in given.items():
        command += [f"--{option.replace('_', '-')}", str(value)]
    command += [word for adapter in adapters for word in ("--adapter", adapter)]
    command += ["--for-workers"] * for_workers + ["--dry-run"] * dry_run + ["--", *more]
    environment = {key: value for key, value in os.environ.items() if key != "PRECEPTOR_METRICS_PORT"}
    sys.stdout.flush()
    # It takes this process's place, so that signals and exit codes are its own.
    os.execve(sys.executable, command, environment)


def _print_student(student: student_pb2.Student) -> None:
    from preceptor.cli.output import plain

    print(
        plain(
            f"{student.name}{' (active)' if student.active else ''}: {student.architecture},"
            f" {student.parameters:,} parameters, context of {student.context_tokens} tokens\n"
            f"  source: {student.pinned.source}\n  commit: {student.pinned.commit}"
        )
    )


def _as_json(student: student_pb2.Student) -> dict[str, Any]:
    from preceptor.cli.output import as_json_value

    # 64-bit numbers are strings in proto JSON; here they are counts that fit.
    return {**as_json_value(student), "parameters": student.parameters}


def _deployment_state(deployment: student_pb2.Deployment) -> str:
    from preceptor.v1 import student_pb2

    return str(student_pb2.DeploymentState.Name(deployment.state)).removeprefix("DEPLOYMENT_STATE_")
