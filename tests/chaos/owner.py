"""``python -m tests.chaos.owner PORTS [--scripted] [--workers N]``: ``preceptor up`` with proxies in between.

PORTS is a JSON object: for ``redis`` and each service the port of its proxy. Whatever happens is printed, a line each;
``up`` is the line that says that everything serves. Ends with SIGTERM, or with exit code 1 where the stack has failed.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import time
from typing import NoReturn

from preceptor.errors import PreceptorError
from preceptor.settings import HouseSettings
from preceptor.stack import SERVICES, Stack

SCRIPTED = {name: [sys.executable, "-m", f"tests.chaos.scripted_{name}"] for name in ("teacher", "worker")}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("ports", type=json.loads)
    parser.add_argument("--scripted", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()

    def wire(addresses: HouseSettings) -> HouseSettings:
        told = {f"{name}_address": f"127.0.0.1:{options.ports[name]}" for name in SERVICES}
        told["broker_url"] = re.sub(r":\d+/0$", f":{options.ports['redis']}/0", addresses.broker_url)
        return addresses.model_copy(update=told)

    def say(message: str) -> None:
        print(message, flush=True)

    def end(_signal: int, _frame: object) -> NoReturn:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, end)
    commands = SCRIPTED if options.scripted else {}
    try:
        with Stack(HouseSettings(), options.workers, on_event=say, commands=commands, wire=wire) as stack:
            say("up")
            while stack.failed is None:
                time.sleep(0.2)
            raise stack.failed
    except PreceptorError as error:
        say(f"failed: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
