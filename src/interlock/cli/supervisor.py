"""Keeps the rooms' processes alive: starts them, waits until each is healthy, restarts one that dies, stops them in reverse order.

All start at once: a room that needs another one waits for it by itself and says so by its health, as it does after any restart.
It is not a room: it holds no port and no state, and the rooms do not know it. One supervisor has a state folder at a time: two would
drive one database by turns. A room that exits with code 2 (its settings are wrong, its database is damaged) before it was ever healthy is
not restarted: trying again would say the same thing for ever. One that was healthy is tried again, slowly: the others go on serving.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from interlock.errors import FailedPrecondition, InterlockError
from interlock.runtime.channels import Caller, open_channel
from interlock.runtime.settings import REPLICA_PORTS, Settings

MISCONFIGURED = 2
BACKOFF_SECONDS = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0)
STABLE_SECONDS = 30.0
"""A process that lived this long has recovered: the next crash starts the back-off anew."""
STOP_SECONDS = 40.0
START_SECONDS = 60.0
PORT_SECONDS = 10.0
"""How long the rooms of a supervisor that was killed may take to leave their ports."""

Say = Callable[[str, str], None]
"""(room, what happened) for a person."""


@dataclass(slots=True)
class Room:
    """One process to keep alive."""

    name: str
    module: str
    address: str
    is_grpc: bool = True
    process: asyncio.subprocess.Process | None = None
    was_up: bool = False
    log: Path = field(default_factory=Path)
    environment: dict[str, str] = field(default_factory=dict)


def rooms_of(settings: Settings) -> list[Room]:
    """The four rooms, one process each but for more replicas: what others need comes first, and is stopped last."""
    gateway = settings.trainer_address.rsplit(":", 1)[0] + f":{settings.gateway.port}"
    return [
        *(_replica(settings, number) for number in range(settings.inference.replicas)),
        Room("controller", "interlock_controller", settings.controller_address),
        Room("trainer", "interlock_trainer", settings.trainer_address),
        Room("gateway", "interlock_gateway", gateway, is_grpc=False),
    ]


def _replica(settings: Settings, number: int) -> Room:
    """The first has the ports that are set; the others get theirs through the environment."""
    own, step = settings.inference, REPLICA_PORTS * number
    room = Room(
        f"inference-{number + 1}" if number else "inference",
        "interlock_inference",
        settings.inference_addresses[number],
    )
    if number:
        room.environment = {
            "INTERLOCK_INFERENCE_PORT": str(own.port + step),
            "INTERLOCK_INFERENCE_METRICS_PORT": str(own.metrics_port + step),
        }
    return room


class Supervisor:
    """Runs rooms until `stopping` is set.

    Args:
        say: told of starts, crashes and stops.
    """

    def __init__(self, settings: Settings, rooms: Sequence[Room], say: Say) -> None:
        self._settings = settings
        self._say = say
        self.rooms = list(rooms)
        self.stopping = asyncio.Event()
        self.failed = ""
        for room in self.rooms:
            room.log = settings.home / "logs" / f"{room.name}.jsonl"

    async def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Starts everything, calls `ready` once all rooms are healthy, and returns after all have ended. `failed` says why it gave up."""
        (self._settings.home / "logs").mkdir(parents=True, exist_ok=True)
        try:
            with alone(self._settings.home):
                await self._ports_free()
                await self._run(ready)
        except FailedPrecondition as error:
            self.failed = error.message
            self.stopping.set()

    async def _ports_free(self) -> None:
        """Waits for the ports: a room that finds its own taken would end, while a stranger's answers pass for its health."""
        deadline = asyncio.get_running_loop().time() + PORT_SECONDS
        while not self.stopping.is_set() and (taken := [room for room in self.rooms if not is_free(room.address)]):
            if asyncio.get_running_loop().time() > deadline:
                room = taken[0]
                raise FailedPrecondition(
                    f"{room.address}, the {room.name}'s address, is taken by another process; end it, or set another port",
                    reason="PORT_TAKEN",
                    metadata={"room": room.name, "address": room.address},
                )
            await asyncio.sleep(0.1)

    async def _run(self, ready: Callable[[], None]) -> None:
        async with asyncio.TaskGroup() as group:
            keepers = [group.create_task(self._keep(room)) for room in self.rooms]
            async with asyncio.TaskGroup() as starting:
                for room in self.rooms:
                    starting.create_task(self._healthy(room))
            if not self.stopping.is_set():
                ready()
            await self.stopping.wait()
            for room in reversed(self.rooms):
                await self._stop(room)
            for keeper in keepers:
                keeper.cancel()

    async def _keep(self, room: Room) -> None:
        clock = asyncio.get_running_loop().time
        crashes = 0
        while not self.stopping.is_set():
            started = clock()
            await self._start(room)
            assert room.process is not None
            code = await room.process.wait()
            if self.stopping.is_set():
                return
            if code == MISCONFIGURED and not room.was_up:
                self.failed = f"{room.name} cannot start: {_last_line(room.log)}"
                self.stopping.set()
                return
            crashes = 0 if clock() - started > STABLE_SECONDS else crashes + 1
            delay = BACKOFF_SECONDS[-1 if code == MISCONFIGURED else min(crashes, len(BACKOFF_SECONDS) - 1)]
            why = f"{_cause(code)}: {_last_line(room.log)}" if code == MISCONFIGURED else _cause(code)
            self._say(room.name, f"ended with {why}; starting again in {delay} s (log: {room.log})")
            await asyncio.sleep(delay)

    async def _start(self, room: Room) -> None:
        with room.log.open("ab") as log:
            room.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", room.module, stdout=log, stderr=log, stdin=asyncio.subprocess.DEVNULL,
                env=self._environment() | room.environment,
                start_new_session=True,  # a Ctrl-C at the terminal reaches us alone; we stop the rooms in order
                preexec_fn=_die_with_parent,
            )  # fmt: skip

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "INTERLOCK_HOME": str(self._settings.home.resolve()), "PYTHONUNBUFFERED": "1"}

    async def _healthy(self, room: Room) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + START_SECONDS
        while loop.time() < deadline and not self.stopping.is_set():
            if await is_healthy(room):
                room.was_up = True
                self._say(room.name, f"up on {room.address}")
                return
            await asyncio.sleep(0.05)
        if not self.stopping.is_set():
            self.failed = f"{room.name} is not healthy after {START_SECONDS:.0f} s: {_last_line(room.log)}"
            self.stopping.set()

    async def _stop(self, room: Room) -> None:
        process = room.process
        if process is None or process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
        except TimeoutError:
            self._say(room.name, f"did not stop in {STOP_SECONDS:.0f} s; killed")
            process.kill()
            await process.wait()


_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _die_with_parent() -> None:
    """In the child: asks the kernel for SIGTERM when the supervisor is gone, however it went, so that no room holds its port for ever."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def alone(home: Path) -> Iterator[None]:
    """Holds the state folder for this supervisor; the kernel lets it go however the process ends.

    Raises:
        FailedPrecondition: `HOME_IN_USE`.
    """
    with (home / "up.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise FailedPrecondition(
                f"{home.resolve()} is in use by another `interlock up` (process {file.read().strip() or 'unknown'}); stop it, or set another --home",
                reason="HOME_IN_USE",
                metadata={"home": str(home.resolve())},
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def is_free(address: str) -> bool:
    """Whether nobody listens on an address. One that cannot be bound for another reason counts as free: the room says it better."""
    host, port = address.rsplit(":", 1)
    try:
        socket.create_server((host.strip("[]"), int(port))).close()
    except OSError as error:
        return error.errno != errno.EADDRINUSE
    return True


async def is_healthy(room: Room) -> bool:
    """True when the room answers: grpc.health.v1 SERVING, or an open port for the gateway."""
    host, port = room.address.rsplit(":", 1)
    if not room.is_grpc:
        try:
            _, writer = await asyncio.wait_for(asyncio.open_connection(host, int(port)), 1)
        except (OSError, TimeoutError):
            return False
        writer.close()
        return True
    async with open_channel(room.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = await Caller().unary(stub.Check, health_pb2.HealthCheckRequest(), timeout=1)
        except InterlockError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _cause(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _last_line(log: Path) -> str:
    """The last line of a room's log, for an error message."""
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        return "no log"
    return lines[-1][:500] if lines else "empty log"
