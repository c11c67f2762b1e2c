"""A gateway in front of a real replica, over real sockets, and what tests send to it; the controller and the trainer are not there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from interlock.runtime.settings import Settings
from interlock_gateway.__main__ import serve
from replica_world import Remote, a_replica

DEAD = 1  # nobody listens on port 1


@dataclass
class World:
    replica: Remote
    http: httpx.AsyncClient
    port: int


@asynccontextmanager
async def world(home: Path, body: bytes | None = None, **gateway: Any) -> AsyncIterator[World]:
    """A replica serving version 1 of `policy`, and a gateway before it."""
    async with a_replica(home) as replica:
        config = Settings(
            home=home, probe_interval_seconds=0, inference={"port": replica.port}, trainer={"port": DEAD}, controller={"port": DEAD},
            gateway={"port": 0, **gateway},
        )  # type: ignore[arg-type]  # fmt: skip
        await replica.load("1", body)
        await replica.route(1, "1")
        stopping, started = asyncio.Event(), asyncio.get_running_loop().create_future()
        async with asyncio.TaskGroup() as group:
            group.create_task(serve(config, stopping, started.set_result))
            port = await started
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
                try:
                    yield World(replica, http, port)
                finally:
                    stopping.set()


def tensor(data: Any, shape: list[int], datatype: str = "FP32", name: str = "x") -> dict[str, Any]:
    return {"inputs": [{"name": name, "datatype": datatype, "shape": shape, "data": data}]}


ROW = tensor([0.0] * 4, [1, 4])


BAD: dict[str, tuple[str, Any, int, str, str]] = {
    # what is wrong: (path, body, status, reason, field)
    "wrong shape": ("/v2/models/policy/infer", tensor([0.0] * 3, [1, 3]), 400, "INVALID_TENSOR", "inputs[0].shape"),
    "wrong datatype": (
        "/v2/models/policy/infer",
        tensor([0] * 4, [1, 4], "INT64"),
        400,
        "INVALID_TENSOR",
        "inputs[0].datatype",
    ),
    "unknown tensor": (
        "/v2/models/policy/infer",
        tensor([0.0] * 4, [1, 4], name="z"),
        400,
        "INVALID_TENSOR",
        "inputs[0].name",
    ),
    "missing tensor": ("/v2/models/policy/infer", {"inputs": []}, 400, "INVALID_REQUEST", "inputs"),
    "too few elements": (
        "/v2/models/policy/infer",
        tensor([0.0] * 3, [1, 4]),
        400,
        "INVALID_REQUEST",
        "inputs[0].data",
    ),
    "ragged rows": (
        "/v2/models/policy/infer",
        tensor([[0.0], [0.0, 0.0]], [1, 4]),
        400,
        "INVALID_REQUEST",
        "inputs[0].data",
    ),
    "text for numbers": (
        "/v2/models/policy/infer",
        tensor(["a"] * 4, [1, 4]),
        400,
        "INVALID_REQUEST",
        "inputs[0].data",
    ),
    "negative shape": (
        "/v2/models/policy/infer",
        tensor([0.0] * 4, [-1, 4]),
        400,
        "INVALID_REQUEST",
        "inputs[0].shape",
    ),
    "no data": (
        "/v2/models/policy/infer",
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4]}]},
        400,
        "INVALID_REQUEST",
        "inputs[0].data",
    ),
    "unknown model": ("/v2/models/nobody/infer", ROW, 404, "MODEL_NOT_FOUND", ""),
    "an array for an object": ("/v2/models/policy/infer", [1], 400, "INVALID_REQUEST", "body"),
    "predict: unknown field": (
        "/predict",
        {"instances": [[0, 0, 0, 0]], "colour": 1},
        400,
        "INVALID_REQUEST",
        "colour",
    ),
    "predict: nothing": ("/predict", {"model": "policy"}, 400, "INVALID_REQUEST", "inputs"),
    "predict: unknown input": ("/predict", {"inputs": {"q": [1]}}, 400, "INVALID_REQUEST", "inputs.q"),
    "predict: wrong width": ("/predict", {"instances": [[0, 0]]}, 400, "INVALID_TENSOR", "inputs[0].shape"),
}


async def raw(port: int, *sent: bytes, pause: float = 0.0) -> bytes:
    """What one connection hears for these bytes, until the gateway hangs up or nothing more comes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    heard = b""
    try:
        for piece in sent:
            writer.write(piece)
            await asyncio.sleep(pause)
        while piece := await asyncio.wait_for(reader.read(65536), 1.0):
            heard += piece
    except TimeoutError:
        pass
    finally:
        writer.close()
    return heard


def http_request(body: bytes = b"", *headers: bytes, path: bytes = b"/v2/models/policy/infer") -> bytes:
    head = [b"POST %b HTTP/1.1" % path, b"host: localhost", b"content-length: %d" % len(body), *headers]
    return b"\r\n".join(head) + b"\r\n\r\n" + body
