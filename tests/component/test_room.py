"""A room's server: errors, keys, health, reflection, and an orderly end, over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from interlock.api.controller.v1 import route_service_pb2 as pb
from interlock.api.controller.v1 import route_service_pb2_grpc as pb_grpc
from interlock.errors import Aborted, DeadlineExceeded, Internal, PermissionDenied, Unauthenticated, Unavailable
from interlock.runtime import channels
from interlock.runtime.access import KEY_HEADER, Keys, Scope, hash_key, new_key
from interlock.runtime.lifecycle import GrpcRoom
from interlock.runtime.streams import written

SERVICE = "interlock.api.controller.v1.RouteService"


class Routes(pb_grpc.RouteServiceServicer):
    """A servicer that fails in every way there is."""

    def __init__(self) -> None:
        self.watches_ended = 0
        self.calls = 0

    async def GetRoute(self, request: Any, context: Any) -> Any:
        self.calls += 1
        if request.model == "models/stale":
            raise Aborted(
                "epoch 3 is in force",
                reason="STALE_EPOCH",
                field="expected_epoch",
                retry_after_seconds=0.5,
                metadata={"epoch": "3"},
            )
        if request.model == "models/bug":
            raise ZeroDivisionError("secret path /etc/shadow")
        if request.model == "models/flaky" and self.calls < 3:
            raise Unavailable("not yet")
        if request.model == "models/slow":
            await asyncio.sleep(60)
        return pb.GetRouteResponse()

    async def WatchRoutes(self, request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            while True:
                yield pb.WatchRoutesResponse()
                await asyncio.sleep(0.01)
        finally:
            self.watches_ended += 1


@asynccontextmanager
async def room(home: Path) -> AsyncIterator[tuple[GrpcRoom, Routes, aio.Channel]]:
    stopping, servicer = asyncio.Event(), Routes()
    room = GrpcRoom(stopping, Keys(home))
    pb_grpc.add_RouteServiceServicer_to_server(servicer, room.server)
    room.describe([SERVICE])
    port = await room.start("127.0.0.1", 0)
    async with asyncio.TaskGroup() as group, channels.open_channel(f"127.0.0.1:{port}") as channel:
        group.create_task(room.run(probe_interval_seconds=0.0, drain_seconds=5.0))
        try:
            yield room, servicer, channel
        finally:
            stopping.set()


def request(model: str = "models/x") -> pb.GetRouteRequest:
    return pb.GetRouteRequest(model=model)


async def test_an_error_crosses_the_wire_whole(tmp_path: Path) -> None:
    async with room(tmp_path) as (_, _, channel):
        stub = pb_grpc.RouteServiceStub(channel)
        with pytest.raises(Aborted) as caught:
            await channels.Caller().unary(stub.GetRoute, request("models/stale"), timeout=5)
    error = caught.value
    assert (error.reason, error.field, error.retry_after_seconds, error.metadata) == (
        "STALE_EPOCH",
        "expected_epoch",
        0.5,
        {"epoch": "3"},
    )
    assert error.message == "epoch 3 is in force"


async def test_the_details_are_googles_so_any_client_can_read_them(tmp_path: Path) -> None:
    async with room(tmp_path) as (_, _, channel):
        stub = pb_grpc.RouteServiceStub(channel)
        with pytest.raises(aio.AioRpcError) as caught:
            await stub.GetRoute(request("models/stale"))
    details = dict(caught.value.trailing_metadata())["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(details)
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain) == ("STALE_EPOCH", "interlock")


async def test_an_unexpected_exception_reaches_the_client_as_an_error_id_only(tmp_path: Path) -> None:
    async with room(tmp_path) as (_, _, channel):
        stub = pb_grpc.RouteServiceStub(channel)
        with pytest.raises(Internal) as caught:
            await channels.Caller().unary(stub.GetRoute, request("models/bug"), timeout=5)
    assert "secret" not in caught.value.message
    assert "ZeroDivisionError" not in caught.value.message
    assert caught.value.metadata["error_id"] in caught.value.message


async def test_an_idempotent_call_is_tried_again_and_another_is_not(tmp_path: Path) -> None:
    async with room(tmp_path) as (_, servicer, channel):
        stub = pb_grpc.RouteServiceStub(channel)
        with pytest.raises(Unavailable):
            await channels.Caller().unary(stub.GetRoute, request("models/flaky"), timeout=5)
        assert servicer.calls == 1
        await channels.Caller().unary(stub.GetRoute, request("models/flaky"), timeout=5, idempotent=True)
        assert servicer.calls == 3


async def test_a_deadline_is_an_error_of_ours(tmp_path: Path) -> None:
    async with room(tmp_path) as (_, _, channel):
        stub = pb_grpc.RouteServiceStub(channel)
        with pytest.raises(DeadlineExceeded):
            await channels.Caller().unary(stub.GetRoute, request("models/slow"), timeout=0.05)


async def test_nobody_listening_is_unavailable() -> None:
    async with channels.open_channel("127.0.0.1:1") as channel:
        with pytest.raises(Unavailable):
            await channels.Caller().unary(pb_grpc.RouteServiceStub(channel).GetRoute, request(), timeout=2)


def write_keys(home: Path, key: str, *scopes: Scope) -> None:
    names = ", ".join(f'"{scope}"' for scope in scopes)
    (home / "keys.toml").write_text(f'[[keys]]\nname = "someone"\nhash = "{hash_key(key)}"\nscopes = [{names}]\n')


async def test_with_a_key_file_an_admin_verb_needs_the_admin_scope(tmp_path: Path) -> None:
    key = new_key()
    write_keys(tmp_path, key, Scope.INFER)
    async with room(tmp_path) as (_, _, channel):
        stub = pb_grpc.RouteServiceStub(channel)
        with pytest.raises(Unauthenticated) as nobody:
            await channels.Caller().unary(stub.GetRoute, request(), timeout=5)
        assert nobody.value.reason == "API_KEY_MISSING"
        with pytest.raises(Unauthenticated) as stranger:
            await channels.Caller("ilk_wrong").unary(stub.GetRoute, request(), timeout=5)
        assert stranger.value.reason == "API_KEY_INVALID"
        with pytest.raises(PermissionDenied):
            await channels.Caller(key).unary(stub.GetRoute, request(), timeout=5)
        with pytest.raises(aio.AioRpcError) as stream:
            async for _ in stub.WatchRoutes(pb.WatchRoutesRequest(), metadata=((KEY_HEADER, key),)):
                pass
        assert stream.value.code() is grpc.StatusCode.PERMISSION_DENIED
        write_keys(tmp_path, key, Scope.ADMIN)  # rotation without a restart
        await channels.Caller(key).unary(stub.GetRoute, request(), timeout=5)


async def test_rooms_call_each_other_with_the_internal_key(tmp_path: Path) -> None:
    write_keys(tmp_path, new_key(), Scope.ADMIN)
    async with room(tmp_path) as (_, _, channel):
        await channels.Caller(Keys(tmp_path).internal_key()).unary(
            pb_grpc.RouteServiceStub(channel).GetRoute, request(), timeout=5
        )
    assert (tmp_path / "internal.key").stat().st_mode & 0o777 == 0o600


async def test_health_and_reflection_need_no_key(tmp_path: Path) -> None:
    write_keys(tmp_path, new_key(), Scope.ADMIN)
    async with room(tmp_path) as (_, _, channel):
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=SERVICE))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_stopping_ends_watches_at_once_and_cleanly(tmp_path: Path) -> None:
    async with room(tmp_path) as (room_, servicer, channel):
        stub = pb_grpc.RouteServiceStub(channel)
        health = health_pb2_grpc.HealthStub(channel)
        seen = asyncio.Event()

        async def watch() -> None:
            async for _ in stub.WatchRoutes(pb.WatchRoutesRequest()):
                seen.set()

        async def watch_health() -> list[int]:
            return [answer.status async for answer in health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))]

        async with asyncio.TaskGroup() as group:
            group.create_task(watch())
            states = group.create_task(watch_health())
            await seen.wait()
            room_.stopping.set()
        # Both streams ended without an error; health said NOT_SERVING first or was ended before it could.
        assert servicer.watches_ended == 1
        assert states.result()[0] == health_pb2.HealthCheckResponse.SERVING


async def test_a_taken_port_is_said(tmp_path: Path) -> None:
    async with room(tmp_path) as (room_, _, _):
        other = GrpcRoom(asyncio.Event(), Keys(tmp_path))
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{room_.port}"):
            await other.start("127.0.0.1", room_.port)


async def test_stopping_in_the_middle_of_a_write_breaks_no_call(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Health's Watch writes by itself. Cut inside a write, its end would be a second operation at once, which gRPC refuses."""

    async def read(call: Any) -> None:
        with contextlib.suppress(aio.AioRpcError):  # one that came after the end is refused, and that is right
            async for _ in call:
                pass

    request = health_pb2.HealthCheckRequest(service=SERVICE)
    for attempt in range(40):
        async with room(tmp_path) as (room_, _, channel):
            stub = health_pb2_grpc.HealthStub(channel)
            await stub.Check(request)
            async with asyncio.TaskGroup() as group:
                for _ in range(20):
                    group.create_task(read(stub.Watch(request)))
                await asyncio.sleep(attempt * 0.0002)
                room_.stopping.set()
    assert "ExecuteBatchError" not in caplog.text


async def test_what_a_handler_writes_by_itself_becomes_a_stream() -> None:
    seen: list[str] = []

    async def writes(request: str, context: Any) -> None:
        for number in range(3):
            await context.write(f"{request}{number}")
            seen.append(context.peer())

    context = SimpleNamespace(peer=lambda: "somebody")
    assert [message async for message in written(writes, "m", context)] == ["m0", "m1", "m2"]
    assert seen == ["somebody"] * 3


async def test_an_error_of_a_handler_that_writes_by_itself_is_the_streams() -> None:
    async def breaks(request: str, context: Any) -> None:
        await context.write("one")
        raise Aborted("no", reason="STALE_EPOCH")

    stream = written(breaks, "", None)
    assert await anext(stream) == "one"
    with pytest.raises(Aborted):
        await anext(stream)


async def test_leaving_a_stream_ends_its_handler() -> None:
    ended = asyncio.Event()

    async def endless(request: str, context: Any) -> None:
        try:
            while True:
                await context.write("again")
        finally:
            ended.set()

    stream = written(endless, "", None)
    assert await anext(stream) == "again"
    await stream.aclose()
    assert ended.is_set()
