"""``python -m orchestrator`` as a process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def test_an_occupied_port_is_one_clear_message_and_exit_code_2(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environment = os.environ | {"PRECEPTOR_HOME": str(tmp_path), "PRECEPTOR_PORT": str(port)}
        ended = subprocess.run(
            [sys.executable, "-m", "orchestrator"], env=environment, capture_output=True, text=True, timeout=60
        )
    assert ended.returncode == 2
    assert str(port) in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_orchestrator_needs_neither_torch_nor_celery() -> None:
    code = "import sys, orchestrator.executor, orchestrator.servicer, orchestrator.pictures; "
    code += "print([m for m in ('torch', 'transformers', 'celery', 'redis') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, timeout=60).strip() == "[]"
