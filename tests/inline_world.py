"""Gateway and inference in one process, in the test's own process, serving a folder."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from gateway_world import DEAD
from interlock.runtime.settings import Settings
from interlock_gateway.__main__ import serve


def settings(home: Path, gateway: dict[str, Any] | None = None, **inference: Any) -> Settings:
    own = {"port": 0, "listen": False, "repository": str(home / "models"), "repository_settle_seconds": 0, **inference}
    return Settings(
        home=home, probe_interval_seconds=0, inference=own, trainer={"port": DEAD}, controller={"port": DEAD},
        gateway={"port": 0, "inline": True, **(gateway or {})},
    )  # type: ignore[arg-type]  # fmt: skip


@asynccontextmanager
async def inline(config: Settings) -> AsyncIterator[tuple[httpx.AsyncClient, int]]:
    """The one process, in this one; ready."""
    stopping, started = asyncio.Event(), asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as group:
        group.create_task(serve(config, stopping, started.set_result))
        port = await started
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            try:
                async with asyncio.timeout(20):
                    while (await http.get("/v2/health/ready")).status_code != 200:
                        await asyncio.sleep(0.01)
                yield http, port
            finally:
                stopping.set()
