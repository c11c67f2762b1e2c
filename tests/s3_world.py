"""A bucket over the real protocol: moto's server in a process of its own, and what tests put in it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest

import onnx_models
from interlock.stores.remote import RemoteArtifacts, RemoteOptions

KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_EC2_METADATA_DISABLED": "true"}
SERVER = """
import sys, logging; logging.getLogger("werkzeug").disabled = True
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False); server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def a_store() -> Iterator[str]:
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.communicate(timeout=20)


def use_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))


class Bucket:
    """A bucket and a version in it."""

    def __init__(self, endpoint: str, home: Path) -> None:
        self.endpoint, self.home = endpoint, home
        self.s3 = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
        self.name = f"b{time.monotonic_ns()}"
        self.s3.create_bucket(Bucket=self.name)
        self.cache = home / "cache"

    def uri(self, key: str) -> str:
        return f"s3://{self.name}/{key}"

    def version(self, key: str = "models/policy/3", value: float = 3.0) -> str:
        folder = self.home / "local" / key
        digest = onnx_models.write_version(folder, onnx_models.mlp((4, 64, 4), seed=int(value)))
        for path in folder.rglob("*"):
            self.s3.upload_file(str(path), self.name, f"{key}/{path.relative_to(folder)}")
        return digest

    def artifacts(self, **options: Any) -> RemoteArtifacts:
        made = {"endpoint": self.endpoint, "region": "us-east-1", "timeout_seconds": 2.0, **options}
        return RemoteArtifacts(self.cache, RemoteOptions(**made))

    def left(self) -> list[str]:
        return sorted(p.name for p in self.cache.iterdir() if not p.name.startswith(".lock"))
