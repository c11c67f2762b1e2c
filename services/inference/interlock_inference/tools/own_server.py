"""A server of a tool's own: one version behind gRPC and HTTP in one process, on free ports, for as long as it is measured."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from interlock.errors import Unavailable

MODEL = "bench"
START_SECONDS = 60.0


@contextlib.contextmanager
def serving(version: Path) -> Iterator[dict[str, str]]:
    """Serves the version as model `bench`, as `interlock serve --inline` does; its addresses by face.

    Raises:
        Unavailable: `BENCH_REFUSED`: it did not come up; the end of its log is in the message.
    """
    with tempfile.TemporaryDirectory() as home, (Path(home) / "log").open("wb") as log:
        grpc, metrics, http, *others = free_ports(5)
        clean = {name: value for name, value in os.environ.items() if not name.startswith("INTERLOCK_")}
        ports = {"INFERENCE": grpc, "INFERENCE_METRICS": metrics, "GATEWAY": http, "CONTROLLER": others[0], "TRAINER": others[1]}  # fmt: skip
        clean |= {"INTERLOCK_HOME": home, **{f"INTERLOCK_{room}_PORT": str(port) for room, port in ports.items()}}
        command = [
            sys.executable,
            "-m",
            "interlock.cli",
            "serve",
            "--inline",
            "--model",
            f"{MODEL}={version.absolute()}",
        ]
        process = subprocess.Popen(command, env=clean, stdout=log, stderr=subprocess.STDOUT)  # noqa: S603  our own command
        try:
            _wait_until_ready(process, http, Path(home) / "log")
            yield {"gRPC": f"127.0.0.1:{grpc}", "HTTP": f"127.0.0.1:{http}"}
        finally:
            process.terminate()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline, url = time.monotonic() + START_SECONDS, f"http://127.0.0.1:{port}/v2/models/{MODEL}/ready"
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.05)
    raise Unavailable(f"the server did not come up: {log.read_text()[-600:]}", reason="BENCH_REFUSED")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, all different."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports
