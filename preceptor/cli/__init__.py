"""``preceptor ...``: the command line, a client like any other.

``main`` is the one place where an error becomes a message and an exit code:

* 0 it worked (a run: it succeeded); 1 ``doctor`` found the machine unusable
* 2 anything of the error catalogue, a failed run too: what, where, and the next step, on stderr
* 130, 143 interrupted by Ctrl-C, by SIGTERM; children are down by then

Modules import what is heavy inside their commands, so that ``--help`` answers at once. Nothing here imports torch,
Celery or SQLAlchemy.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

import click

from preceptor import __version__
from preceptor.cli.adapt import adapt
from preceptor.cli.artifacts import artifacts
from preceptor.cli.capacity import capacity
from preceptor.cli.certificates import certificates
from preceptor.cli.doctor import doctor
from preceptor.cli.evaluate import evaluate
from preceptor.cli.evaluations import evaluations
from preceptor.cli.export import export
from preceptor.cli.formats import formats
from preceptor.cli.gc import gc
from preceptor.cli.probe import probe
from preceptor.cli.reproduce import reproduce
from preceptor.cli.run import run
from preceptor.cli.runs import runs
from preceptor.cli.students import students
from preceptor.cli.tasks import tasks
from preceptor.cli.up import up


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="preceptor")
def cli() -> None:
    """Trains a teacher model to write study material that makes a separate student model better.

    Where things run is set by environment variables (PRECEPTOR_HOME, PRECEPTOR_ORCHESTRATOR_ADDRESS, ...), what is run
    by a config file. PRECEPTOR_DEBUG=1 shows the traceback of an error.
    """


for _command in (
    run,
    reproduce,
    evaluate,
    adapt,
    up,
    runs,
    evaluations,
    students,
    tasks,
    formats,
    export,
    doctor,
    probe,
    certificates,
    capacity,
    artifacts,
    gc,
):
    cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line (of this process, where none is given); returns the exit code."""
    own = arguments is None
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with _terminated_as_exit():
        try:
            code = _run(arguments)
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            # Whoever read our output has gone (`| head`). Python would complain again when it closes stdout.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except (KeyboardInterrupt, click.Abort):
            print("interrupted", file=sys.stderr)
            return _leave(130, at_once=own)
        except SystemExit as error:
            return _leave(error.code if isinstance(error.code, int) else 1, at_once=own)


def _run(arguments: list[str]) -> int:
    try:
        result = cli.main(arguments, prog_name="preceptor", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.Abort:
        raise
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except Exception as error:
        from preceptor.cli.output import report_error
        from preceptor.errors import PreceptorError

        if not isinstance(error, PreceptorError):
            raise  # a bug; its traceback is what a report of it needs
        if os.environ.get("PRECEPTOR_DEBUG"):
            traceback.print_exc()
        report_error(error, as_json="--json" in arguments)
        return 2


def _leave(code: int, at_once: bool) -> int:
    """After an interruption all that had to be done is done (children are down). What is left are destructors, and
    that of a gRPC channel may hang if the interruption reached it in the wrong place: so they are left out."""
    if at_once:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # nobody reads it any more
                stream.flush()
        os._exit(code)
    return code


@contextmanager
def _terminated_as_exit() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind the stack like Ctrl-C does, so that children are taken down."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
