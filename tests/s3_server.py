"""A real S3-compatible server (moto's) in a process of its own, behind a proxy that can cut it off."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import boto3
import pytest

from tests.chaos.proxy import Proxy

BUCKET = "weights"
# Of the chain of places where AWS's libraries look for settings; a test is to find none but its own.
_OTHERS = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION")


@dataclass
class S3Server:
    """``environment`` is what a process needs to reach it; ``proxy`` may refuse, stall or reset the connections."""

    proxy: Proxy
    direct: str  # past the proxy

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://{self.proxy.address}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def set_environment(self, patch: pytest.MonkeyPatch) -> None:
        """This process is to reach it."""
        for name in _OTHERS:
            patch.delenv(name, raising=False)
        for name, value in self.environment.items():
            patch.setenv(name, value)

    def client(self, service: str = "s3") -> Any:
        """A client of another make, past the proxy, to look at and damage what lies there."""
        keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
        return boto3.client(service, endpoint_url=self.direct, region_name="us-east-1", **keys)

    def keys(self, prefix: str = "") -> list[str]:
        """Every object's key."""
        found = self.client().list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
        return [entry["Key"] for entry in found]

    def read(self, key: str) -> bytes:
        data: bytes = self.client().get_object(Bucket=BUCKET, Key=key)["Body"].read()
        return data

    def put(self, key: str, data: bytes) -> None:
        self.client().put_object(Bucket=BUCKET, Key=key, Body=data)

    def check_keys(self) -> tuple[str, str]:
        """From now on only this key is let in, with its secret. (moto lets everybody in until it is told not to.)"""
        iam = self.client("iam")
        iam.create_user(UserName="reader")
        rule = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
        iam.put_user_policy(UserName="reader", PolicyName="all", PolicyDocument=json.dumps(rule))
        key = iam.create_access_key(UserName="reader")["AccessKey"]
        self._reset_auth("0")
        return key["AccessKeyId"], key["SecretAccessKey"]

    def let_everybody_in(self) -> None:
        """As it was at first."""
        self._reset_auth("inf")

    def _reset_auth(self, free_calls: str) -> None:
        request = urllib.request.Request(
            f"{self.direct}/moto-api/reset-auth", free_calls.encode(), {"Content-Type": "text/plain"}
        )
        urllib.request.urlopen(request, timeout=10).close()


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """The server, with an empty bucket, for as long as the context is open."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    environment = {**os.environ, "MOTO_S3_CUSTOM_ENDPOINTS": "", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        with Proxy(lambda: ("127.0.0.1", port)) as proxy:
            server = S3Server(proxy, f"http://127.0.0.1:{port}")
            _until_it_listens(process, port)
            server.client().create_bucket(Bucket=BUCKET)
            yield server
            proxy.drop()
    finally:
        process.kill()
        process.wait(10)


def _until_it_listens(process: subprocess.Popen[bytes], port: int) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        assert process.poll() is None, "moto's server has ended"
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("moto's server does not listen")
