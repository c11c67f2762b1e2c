"""Who is measured: how each server is installed, started, asked, checked, stopped, and set aside while another one is measured."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import clients
import grpc
import numpy as np
import orjson
import psutil

from interlock.api.oip import messages
from interlock_inference.tools.own_server import free_ports

HERE = Path(__file__).resolve().parent
START_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Contestant:
    """A server that can be started.

    Attributes:
        faces: `grpc`, `http`.
        protocol: of the JSON bodies: `oip` or `plain`.
        peer: the script below peers/ that starts it; empty for ours.
        command: of ours; ports and the folder of the models come by environment.
        restless: can't be set aside by a signal while others are measured, so it is started anew for each of its turns.
    """

    name: str
    faces: tuple[str, ...]
    protocol: str = "oip"
    peer: str = ""
    command: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    restless: bool = False


PEERS = (
    Contestant("PyTriton", ("grpc", "http"), peer="pytriton"),
    Contestant("KServe SDK", ("grpc", "http"), peer="kserve"),
    Contestant("MLServer", ("grpc", "http"), peer="mlserver"),
    Contestant("LitServe", ("http",), "plain", peer="litserve"),
    Contestant("BentoML", ("http",), "plain", peer="bentoml"),
    Contestant("Ray Serve", ("http",), "plain", peer="ray", restless=True),
)


def requirements(peer: str) -> list[str]:
    """What a peer's script says that it needs."""
    found = re.search(r"^# requires: (.+)$", (HERE / "peers" / f"{peer}_peer.py").read_text(), re.MULTILINE)
    assert found, f"{peer}: no '# requires:' line"
    return found[1].split()


def installed(peer: str, environments: Path) -> str:
    """Makes the peer's environment if there is none; why it can't be had, or nothing."""
    place = environments / peer
    done = place / "installed"
    if done.exists() and done.read_text() == " ".join(requirements(peer)):
        return ""
    for command in (
        [sys.executable, "-m", "venv", str(place)],
        [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet", *requirements(peer)],
    ):
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            return f"can't be installed: {(made.stderr.strip().splitlines() or ['no reason given'])[-1][:200]}"
    done.write_text(" ".join(requirements(peer)))
    return ""


class Server:
    """A started contestant, with the model in `folder` (a version folder)."""

    def __init__(self, contestant: Contestant, folder: Path, environments: Path, pin: str) -> None:
        self.contestant = contestant
        self.grpc_port, self.http_port = free_ports(2)
        self._folder, self._environments, self._pin = folder, environments, pin
        self._process: subprocess.Popen[bytes] | None = None
        self.start_seconds = 0.0
        self.memory_mb = 0.0

    def start(self, x: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
        """Starts it and waits for the first right answer on every face.

        Raises:
            RuntimeError: it ended, did not answer in time, or answered something else.
        """
        begun = time.perf_counter()
        self._log = (self._folder.parent / f"{self.contestant.name.replace(' ', '-')}.log").open("wb")
        command = [*(("taskset", "-c", self._pin) if self._pin else ()), *self._command()]
        self._process = subprocess.Popen(
            command, env=self._environment(), stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )
        for face in self.contestant.faces:
            self._await(face, x, expected, begun + START_SECONDS)
        self.start_seconds = time.perf_counter() - begun
        self.memory_mb = sum(_rss(process) for process in self._tree()) / 2**20

    def _command(self) -> list[str]:
        if not self.contestant.peer:
            return [sys.executable, *self.contestant.command]
        python = self._environments / self.contestant.peer / "bin" / "python"
        script = HERE / "peers" / f"{self.contestant.peer}_peer.py"
        return [str(python), str(script), str(self._folder), str(self.grpc_port), str(self.http_port)]

    def _environment(self) -> dict[str, str]:
        clean = {n: v for n, v in os.environ.items() if not n.startswith(("INTERLOCK_", "PYTHONPATH"))}
        clean["OMP_NUM_THREADS"] = "1"
        if self.contestant.peer:  # PyTriton's stub would else find another libpython than its interpreter's library
            return clean | {"LD_LIBRARY_PATH": str(sysconfig.get_config_var("LIBDIR"))}
        words = {
            "repository": str(self._folder.parent.parent),
            "grpc": str(self.grpc_port),
            "http": str(self.http_port),
        }
        words |= {f"port{i}": str(port) for i, port in enumerate(free_ports(5))}
        words["home"] = str(self._folder.parent / f"home-{self.grpc_port}")
        ours = {name: value.format(**words) for name, value in self.contestant.environment.items()}
        return clean | ours | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}

    def _await(self, face: str, x: np.ndarray[Any, Any], expected: np.ndarray[Any, Any], deadline: float) -> None:
        assert self._process is not None
        while True:
            try:
                found = self._ask_grpc(x) if face == "grpc" else self._ask_http(x)
                break
            except (OSError, grpc.RpcError, urllib.error.URLError) as error:
                if self._process.poll() is not None:
                    raise RuntimeError(f"ended with code {self._process.returncode}; see {self._log.name}") from None
                if time.perf_counter() > deadline:
                    raise RuntimeError(
                        f"no answer by {face} in {START_SECONDS:g} s: {error}; see {self._log.name}"
                    ) from None
                time.sleep(0.02)
        if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-3, atol=1e-4):
            raise RuntimeError(f"answers by {face} differ from ONNX Runtime's")

    def _ask_grpc(self, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        with grpc.insecure_channel(f"127.0.0.1:{self.grpc_port}") as channel:
            call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            response = messages.ModelInferResponse.FromString(call(clients.grpc_message(x), timeout=5))
        shape = list(response.outputs[0].shape)
        if response.raw_output_contents:
            return np.frombuffer(response.raw_output_contents[0], np.float32).reshape(shape)
        return np.array(response.outputs[0].contents.fp32_contents, np.float32).reshape(shape)

    def _ask_http(self, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        path, body = clients.json_body(x, self.contestant.protocol)
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.http_port}{path}", body, {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=5) as response:
            document = orjson.loads(response.read())
        if self.contestant.protocol == "plain":
            return np.array(document["y"] if isinstance(document, dict) else document, np.float32)
        return np.array(document["outputs"][0]["data"], np.float32).reshape(document["outputs"][0]["shape"])

    def _tree(self) -> list[psutil.Process]:
        assert self._process is not None
        root = psutil.Process(self._process.pid)
        return [root, *root.children(recursive=True)]

    @property
    def is_alive(self) -> bool:
        """Whether its first process still runs."""
        return self._process is not None and self._process.poll() is None

    def set_aside(self) -> None:
        """Stops every process of it, so that it takes nothing from the one that is measured."""
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()

    def bring_back(self) -> None:
        """Lets it go on."""
        for process in reversed(self._tree()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def stop(self) -> None:
        """Ends every process of it."""
        if self._process is None or self._process.poll() is not None:
            return
        self.bring_back()
        tree = self._tree()
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        self._log.close()


def _rss(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0
