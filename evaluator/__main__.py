"""``python -m evaluator``: serves the EvaluatorService until SIGTERM."""

from __future__ import annotations

import logging
import sys

from evaluator.settings import EvaluatorSettings
from preceptor.errors import PreceptorError
from preceptor.launch import launch
from preceptor.telemetry import Telemetry

log = logging.getLogger(__name__)


def run(settings: EvaluatorSettings, telemetry: Telemetry) -> None:
    """Puts the service together and serves it."""
    from evaluator.broker import RedisBroker
    from evaluator.house import Evaluator
    from evaluator.servicer import SERVICE, EvaluatorServicer
    from preceptor.database import HAND_OVER_SECONDS, own_database
    from preceptor.queue import check_broker
    from preceptor.server import serve
    from preceptor.v1.evaluator_pb2_grpc import add_EvaluatorServiceServicer_to_server

    try:
        check_broker(settings.broker_url)
    except PreceptorError as error:
        if error.reason != "BROKER_UNREACHABLE":
            raise
        log.warning("%s; the dispatcher waits for it", error)
    with own_database(settings.database("evaluator"), settings.grace_seconds + HAND_OVER_SECONDS):
        broker = RedisBroker(settings.broker_url)
        evaluator = Evaluator(settings, broker, telemetry=telemetry)
        servicer = EvaluatorServicer(evaluator.evaluations, evaluator.garbage)
        evaluator.dispatcher.start()
        try:
            serve(
                [SERVICE],
                lambda server: add_EvaluatorServiceServicer_to_server(servicer, server),
                settings,
                on_drain=evaluator.drain,
                telemetry=telemetry,
            )
        finally:
            evaluator.drain()
            evaluator.close()
            broker.close()


if __name__ == "__main__":
    sys.exit(launch("evaluator", EvaluatorSettings, run))
