"""Requests of all kinds on one connection, cut anywhere: each is answered, in its order, whichever way it went."""

from __future__ import annotations

import asyncio
import random
import re
from pathlib import Path

import orjson
import pytest

import onnx_models
from gateway_world import ROW, http_request, tensor
from inline_world import inline, settings

BODY = orjson.dumps(ROW)


def chunked(body: bytes, path: bytes) -> bytes:
    head = b"POST %b HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n" % path
    return head + b"%x\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (9, body[:9], len(body) - 9, body[9:])


QUICK, SLOW = b"/v2/models/policy/infer", b"/v2/models/slow/infer"
KINDS: dict[str, tuple[bytes, bytes]] = {
    # what is sent, and the status that it gets
    "quick": (http_request(BODY, path=QUICK), b"200"),
    "slow": (http_request(BODY, path=SLOW), b"200"),
    "wrong": (http_request(orjson.dumps(tensor([0.0], [1, 1])), path=QUICK), b"400"),
    "not json": (http_request(b"{", path=QUICK), b"400"),
    "no body": (http_request(b"", path=QUICK), b"400"),
    "unknown": (http_request(BODY, path=b"/v2/models/nobody/infer"), b"404"),
    "plain": (http_request(b'{"model": "policy", "instances": [[0, 0, 0, 0]]}', path=b"/predict"), b"200"),
    "chunked": (chunked(BODY, QUICK), b"200"),
    "chunked slow": (chunked(BODY, SLOW), b"200"),
    "get": (b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n", b"200"),
    "lost": (b"GET /nowhere HTTP/1.1\r\nhost: localhost\r\n\r\n", b"404"),
    "large": (http_request(orjson.dumps(tensor([0.0] * 40_000, [10_000, 4])), path=QUICK), b"200"),
}
ENDS: dict[str, tuple[bytes, bytes]] = {
    # the connection ends behind these
    "close": (http_request(BODY, b"connection: close", path=QUICK), b"200"),
    "too large": (http_request(b"", path=QUICK).replace(b"content-length: 0", b"content-length: 99999999"), b"413"),
}


async def statuses(port: int, pieces: list[bytes], expected: int) -> list[bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    heard = bytearray()

    async def send() -> None:
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0)

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        group.create_task(send())
        while len(found := re.findall(rb"HTTP/1\.1 (\d\d\d) ", heard)) < expected:
            piece = await reader.read(1 << 16)
            if not piece:
                break
            heard += piece
    writer.close()
    return found


@pytest.mark.parametrize("seed", range(4))
async def test_every_request_is_answered_in_its_order(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    onnx_models.write_version(tmp_path / "models" / "policy" / "1", onnx_models.constant(1.0))
    onnx_models.write_version(tmp_path / "models" / "slow" / "1", onnx_models.slow(1.0, size=300), name="slow")
    async with inline(settings(tmp_path)) as (_, port):
        for _ in range(15):
            chosen = [KINDS[name] for name in dice.choices(list(KINDS), k=dice.randint(1, 8))]
            if dice.random() < 0.4:
                chosen.append(ENDS[dice.choice(list(ENDS))])
            sent = b"".join(request for request, _ in chosen)
            cuts = sorted(dice.sample(range(1, len(sent)), dice.randint(0, 12)))
            pieces = [sent[a:b] for a, b in zip([0, *cuts], [*cuts, len(sent)], strict=True)]
            assert await statuses(port, pieces, len(chosen)) == [status for _, status in chosen], (seed, cuts)
