"""The line between loop and trainer, cut again and again: nothing is lost, nothing comes twice, no order is carried out twice."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from component.test_trainer_service import Loop, Service, _known


class Proxy:
    """Forwards bytes to the service until it is told to cut every connection."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._writers: set[asyncio.StreamWriter] = set()
        self.num_connections = 0

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        with contextlib.suppress(OSError):
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
            self._writers |= {writer, back}
            async with asyncio.TaskGroup() as group:
                group.create_task(self._copy(reader, back))
                group.create_task(self._copy(there, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def stop(self) -> None:
        self._server.close()
        self.cut()
        await asyncio.sleep(0.05)


class ThroughProxy(Service):
    """A service that loops reach only through the proxy."""

    proxy: Proxy

    async def start(self) -> ThroughProxy:
        await super().start()
        self.proxy = Proxy(self.port)
        self.address = f"127.0.0.1:{await self.proxy.start()}"
        return self


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[ThroughProxy]:
    running = await ThroughProxy(tmp_path / "home").start()
    yield running
    await running.proxy.stop()
    await running.stop()


async def test_a_line_that_is_cut_again_and_again_loses_nothing(service: ThroughProxy) -> None:
    """Cuts at random moments, by seed; a rollback and a save are ordered in between."""
    generator = random.Random(7)
    loop = Loop(service, until=1500, pace=0.002)
    loop.start()
    await _known(service)
    cuts = 0
    while loop.is_alive() and cuts < 25:
        await asyncio.sleep(generator.uniform(0.02, 0.25))
        service.proxy.cut()
        cuts += 1
        if cuts == 5:
            service.runs.get("loop").roll_back("", "ada", "a drill")
        if cuts == 12:
            loop.bad.set()
    await loop.ended()
    assert service.proxy.num_connections > 5
    session = service.runs.get("loop")
    records = service.store.steps.read("loop", 1, 100_000)
    assert [record.seq for record in records] == list(range(1, session.head_seq + 1))
    assert loop.attached is not None
    assert (records[-1].step, records[-1].attempt) == (1500, loop.attached.attempt)
    attempts = [record.attempt for record in records]
    assert attempts == sorted(attempts)
    done = [row for row in session.rollbacks.values() if row.state == "completed"]
    assert len(done) == max(attempts) - 1, "every rollback was carried out once"
    assert session.row.state == "completed"
    assert not service.store.open_orders("loop")
