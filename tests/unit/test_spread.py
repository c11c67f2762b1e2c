"""Which replica a call goes to, and when it goes to another one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from grpc import StatusCode, aio

from fakes import FakeClock
from interlock.errors import InterlockError, NotFound, ResourceExhausted, Unavailable
from interlock.runtime.status import DETAILS_KEY, to_status
from interlock_gateway.spread import COOL_SECONDS, Line, Spread


def rpc_error(error: InterlockError | None) -> aio.AioRpcError:
    """As a client sees it; None: the connection was lost."""
    if error is None:
        return aio.AioRpcError(StatusCode.UNAVAILABLE, aio.Metadata(), aio.Metadata(), "connection reset")
    details = (DETAILS_KEY, to_status(error).SerializeToString())
    return aio.AioRpcError(StatusCode[error.kind], aio.Metadata(), aio.Metadata(details), error.message)


class Channel:
    """Answers with its name, or as it is told."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.fails: list[InterlockError | None] = []
        self.timeouts: list[float | None] = []
        self.gate: asyncio.Event | None = None

    def unary_unary(self, path: str, **codecs: Any) -> Any:
        async def call(request: Any, *, timeout: float | None, metadata: Any) -> str:
            self.timeouts.append(timeout)
            if self.gate is not None:
                await self.gate.wait()
            if self.fails:
                raise rpc_error(self.fails.pop(0))
            return self.name

        return call

    def stream_stream(self, path: str, **codecs: Any) -> Any:
        return lambda *args, **kwargs: self.name

    unary_stream = stream_unary = stream_stream


def made(count: int) -> tuple[Spread, list[Channel], FakeClock]:
    channels, clock = [Channel(str(number)) for number in range(count)], FakeClock()
    return Spread([Line(c.name, c) for c in channels], clock), channels, clock  # type: ignore[arg-type]


async def test_calls_go_round_and_to_the_one_with_the_fewest_in_flight() -> None:
    spread, channels, _ = made(3)
    ask = spread.unary_unary("/s/ModelInfer")
    assert [await ask("q") for _ in range(4)] == ["0", "1", "2", "0"]
    channels[1].gate = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        held = group.create_task(ask("q"))
        await asyncio.sleep(0)
        assert [await ask("q") for _ in range(4)] == ["2", "0", "2", "0"]
        channels[1].gate.set()
    assert held.result() == "1"
    assert [line.in_flight for line in spread.lines] == [0, 0, 0]


async def test_what_a_replica_refused_or_lost_is_asked_of_another_once() -> None:
    spread, channels, clock = made(2)
    ask = spread.unary_unary("/s/ModelInfer")
    for lost in (Unavailable("no", reason="DRAINING"), Unavailable("no", reason="MODEL_NOT_READY"), None):
        for channel in channels:
            channel.fails = [lost]
        with pytest.raises(aio.AioRpcError):  # both refuse: once more, not for ever
            await ask("q", timeout=5.0)
        channels[0].fails = [lost]
        assert {await ask("q", timeout=5.0), await ask("q", timeout=5.0)} <= {"0", "1"}
        channels[0].fails = []
        clock.advance(COOL_SECONDS)


async def test_a_replica_that_is_gone_is_passed_over_for_a_while() -> None:
    spread, channels, clock = made(2)
    ask = spread.unary_unary("/s/ModelInfer")
    channels[0].fails = [None]
    assert [await ask("q") for _ in range(4)] == ["1"] * 4
    clock.advance(COOL_SECONDS)
    assert sorted([await ask("q"), await ask("q")]) == ["0", "1"]


async def test_when_all_are_gone_somebody_is_asked_all_the_same() -> None:
    spread, channels, _ = made(2)
    ask = spread.unary_unary("/s/ModelInfer")
    channels[0].fails, channels[1].fails = [None], [None]
    with pytest.raises(aio.AioRpcError):
        await ask("q")
    assert await ask("q") in {"0", "1"}


@pytest.mark.parametrize("error", [NotFound("no"), ResourceExhausted("full", reason="QUEUE_FULL")])
async def test_other_refusals_are_the_answer(error: InterlockError) -> None:
    spread, channels, _ = made(2)
    channels[0].fails = [error]
    with pytest.raises(aio.AioRpcError):
        await spread.unary_unary("/s/ModelInfer")("q")
    assert not channels[1].timeouts


async def test_what_changes_something_is_asked_once() -> None:
    spread, channels, _ = made(2)
    channels[0].fails = [None]
    with pytest.raises(aio.AioRpcError):
        await spread.unary_unary("/s/RepositoryModelLoad")("q")
    assert not channels[1].timeouts


async def test_the_second_try_has_what_is_left_of_the_time() -> None:
    spread, channels, clock = made(2)
    real = channels[0].unary_unary("")

    async def slow(request: Any, *, timeout: float | None, metadata: Any) -> str:
        clock.advance(2.0)
        return str(await real(request, timeout=timeout, metadata=metadata))

    channels[0].unary_unary = lambda path, **codecs: slow  # type: ignore[method-assign]
    ask = spread.unary_unary("/s/ModelInfer")
    channels[0].fails = [None]
    assert await ask("q", timeout=5.0) == "1"
    assert channels[1].timeouts == [3.0]
    clock.advance(COOL_SECONDS)
    spread.lines[1].turn = 99
    channels[0].fails = [None]
    with pytest.raises(aio.AioRpcError):
        await ask("q", timeout=1.5)


async def test_one_replica_is_asked_again_only_for_what_it_did_not_start() -> None:
    spread, channels, _ = made(1)
    ask = spread.unary_unary("/s/ModelInfer")
    channels[0].fails = [Unavailable("no", reason="DRAINING")]
    assert await ask("q") == "0"
    channels[0].fails = [None]
    with pytest.raises(aio.AioRpcError):
        await ask("q")
    assert await ask("q") == "0"


def test_streams_are_placed_when_they_begin() -> None:
    spread, _, _ = made(2)
    begin = spread.stream_stream("/s/ModelStreamInfer")
    assert [begin(), begin(), begin()] == ["0", "1", "0"]
    assert spread.unary_stream("/s/x")("q") == "1"
