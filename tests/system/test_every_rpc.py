"""Every RPC of every room, called once: what docs/reference/planned.md lists answers UNIMPLEMENTED, and nothing else does."""

from __future__ import annotations

import asyncio
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import message_factory
from grpc import aio

from interlock.api.oip import rpc
from interlock.runtime.access import hash_key, new_key
from rooms import ROOT, running

pytestmark = [pytest.mark.system]
ROOM_OF = {"inference": "INFERENCE", "trainer": "TRAINER", "controller": "CONTROLLER"}


def planned() -> set[str]:
    """The RPCs that the document lists; in a list of several, the service is said once."""
    found, service = set(), ""
    for line in (ROOT / "docs/reference/planned.md").read_text().splitlines():
        if not line.startswith("| `"):
            continue
        for name in re.findall(r"`([\w./]+)`", line.split("|")[1]):
            service = name.split("/")[0] if "/" in name else service
            found.add(f"/{service}/{name.split('/')[-1]}")
    return found


def contracts() -> Iterator[tuple[str, str, Any, Any, bool]]:
    """(room, full method name, request class, response class, response streams) of every RPC."""
    api = ROOT / "src" / "interlock" / "api"
    for path in sorted(api.rglob("*_service_pb2.py")):
        module = importlib.import_module(".".join(path.relative_to(ROOT / "src").with_suffix("").parts))
        for service in module.DESCRIPTOR.services_by_name.values():
            room = ROOM_OF[service.full_name.split(".")[2]]
            for method in service.methods:
                classes = [message_factory.GetMessageClass(kind) for kind in (method.input_type, method.output_type)]
                yield room, f"/{service.full_name}/{method.name}", classes[0], classes[1], method.server_streaming
    for name, (arity, request, response) in rpc.METHODS.items():
        yield "INFERENCE", f"/{rpc.SERVICE_NAME}/{name}", request, response, arity.endswith("stream")


async def code_of(
    channel: aio.Channel, method: str, request: Any, response: Any, streams: bool, key: str = ""
) -> grpc.StatusCode:
    """The status code of a call with an empty request; a stream is left after its first message or half a second."""
    options = {"request_serializer": request.SerializeToString, "response_deserializer": response.FromString}
    metadata = (("x-api-key", key),) if key else ()
    try:
        if streams:
            both_ways = method.endswith(("/Attach", "/ModelStreamInfer"))
            call = channel.stream_stream(method, **options)(iter([request()]), metadata=metadata) if both_ways else channel.unary_stream(method, **options)(request(), metadata=metadata)  # fmt: skip
            try:
                await asyncio.wait_for(call.read(), 0.5)
            except TimeoutError:
                call.cancel()
                return grpc.StatusCode.OK
            if not call.done():
                call.cancel()
                return grpc.StatusCode.OK
            return await call.code()  # type: ignore[no-any-return]
        await channel.unary_unary(method, **options)(request(), timeout=20, metadata=metadata)
    except aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def test_unimplemented_is_what_is_planned(tmp_path: Path) -> None:
    async def call_all() -> dict[str, grpc.StatusCode]:
        answers = {}
        for room, method, request, response, streams in contracts():
            async with aio.insecure_channel(f"127.0.0.1:{rooms.port(room)}") as channel:
                answers[method] = await code_of(channel, method, request, response, streams)
        return answers

    with running(tmp_path / "home") as rooms:
        answers = asyncio.run(call_all())
    refused = {method for method, code in answers.items() if code is grpc.StatusCode.UNIMPLEMENTED}
    assert refused == planned()
    broken = {
        method: code for method, code in answers.items() if code in {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}
    }
    assert not broken, "an empty request must get a precise error"
    assert len(answers) > 60


def test_with_keys_every_admin_verb_is_refused_without_one(tmp_path: Path) -> None:
    from interlock.runtime.access import Scope, rpc_scope

    home = tmp_path / "home"
    home.mkdir()
    keys = {scope: new_key() for scope in (Scope.INFER, Scope.TRAIN)}
    (home / "keys.toml").write_text(
        "".join(f'[[keys]]\nname = "{s}"\nhash = "{hash_key(k)}"\nscopes = ["{s}"]\n' for s, k in keys.items())
    )

    async def call_all() -> list[str]:
        wrong = []
        for room, method, request, response, streams in contracts():
            scope = rpc_scope(method)
            async with aio.insecure_channel(f"127.0.0.1:{rooms.port(room)}") as channel:
                nobody = await code_of(channel, method, request, response, streams)
                if (nobody is grpc.StatusCode.UNAUTHENTICATED) is (scope is Scope.PUBLIC):
                    wrong.append(f"{method} without a key: {nobody}")
                for held, key in keys.items():
                    if scope in {Scope.PUBLIC, held}:
                        continue
                    code = await code_of(channel, method, request, response, streams, key)
                    if code is not grpc.StatusCode.PERMISSION_DENIED:
                        wrong.append(f"{method} with {held}: {code}")
        return wrong

    with running(home) as rooms:
        assert asyncio.run(call_all()) == []
