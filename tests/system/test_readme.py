"""README's examples, as pasted: its curl, grpcurl and Python blocks against running rooms. Only ports and the run's name are filled in."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

import onnx_models
from rooms import PATHS, ROOT, Rooms, free_ports, running, until

pytestmark = [pytest.mark.system]
README = (ROOT / "README.md").read_text()
PORTS = {"8000": "GATEWAY", "8001": "INFERENCE", "8002": "TRAINER", "8003": "CONTROLLER"}


def block(heading: str) -> str:
    """The text of one section."""
    found = re.search(rf"^## {heading}\n(.*?)(?=^## )", README, re.MULTILINE | re.DOTALL)
    assert found, heading
    return found[1]


def commands(heading: str, program: str) -> list[str]:
    """The indented lines of a section that run `program`, without their remarks."""
    lines = [line.strip() for line in block(heading).splitlines() if line.startswith("    ")]
    return [re.sub(r"\s+# .*$", "", line) for line in lines if line.startswith(program)]


def local(rooms: Rooms, text: str) -> str:
    """README's ports as they are here."""
    for port, room in PORTS.items():
        text = re.sub(rf"(localhost|127\.0\.0\.1):{port}\b", rf"\1:{rooms.port(room)}", text)
    return text


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Rooms:
    with running(tmp_path_factory.mktemp("readme") / "home") as rooms:
        create = commands("With curl", ".venv/bin/interlock run create")
        assert len(create) == 1
        rooms.cli(*shlex.split(create[0])[1:], "--id", "readme", "--set", "pace_ms=5")
        with rooms.http() as http:
            until(
                lambda: (
                    len(http.get("/swaps").json()["swaps"]) >= 2
                    and http.get("/version").json().get("version") not in {None, "1"}
                ),
                "two versions of policy",
                90,
            )
        rooms.cli("run", "pause", "readme")
        yield rooms


@pytest.mark.parametrize("command", commands("With curl", "curl"))
def test_curl(rooms: Rooms, command: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    with rooms.http() as http:
        until(lambda: not http.get("/version").json()["active_swap"], "no swap under way")
    done = subprocess.run(
        [*shlex.split(local(rooms, command)), "--fail-with-body"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("{")


@pytest.mark.parametrize("command", commands("With grpcurl", "grpcurl"))
def test_grpcurl(rooms: Rooms, command: str) -> None:
    """`buf curl` speaks the same reflection and takes the same bodies; where the real grpcurl is installed it is used."""
    words = shlex.split(local(rooms, command).replace("runs/RUN", "runs/readme"))
    if shutil.which("grpcurl") is None:
        words = as_buf(words)
    with rooms.http() as http:
        until(lambda: not http.get("/version").json()["active_swap"], "no swap under way")
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=8 if "Stream" in command else 60)
        assert done.returncode == 0, done.stderr
        answer = done.stdout
    except subprocess.TimeoutExpired as endless:  # a stream goes on as long as its run
        answer = (endless.stdout or b"").decode()
    assert answer.strip()


def as_buf(words: list[str]) -> list[str]:
    buf = shutil.which("buf") or str(Path(sys.executable).parent / "buf")
    if not Path(buf).exists():
        pytest.skip("neither grpcurl nor buf is installed: pip install buf-bin")
    body = words[words.index("-d") + 1] if "-d" in words else "{}"
    address, target = words[-2], words[-1]
    call = [buf, "curl", "--http2-prior-knowledge", "--protocol", "grpc"]
    return (
        [*call, "--list-methods", f"http://{address}"]
        if target == "list"
        else [*call, "-d", body, f"http://{address}/{target}"]
    )


def test_python(rooms: Rooms) -> None:
    code = re.search(r"```python\n(.*?)```", block("From Python"), re.DOTALL)
    assert code
    source = local(rooms, code[1]).replace("AdminClient()", f'AdminClient("127.0.0.1:{rooms.port("CONTROLLER")}")')
    with rooms.http() as http:
        until(lambda: not http.get("/version").json()["active_swap"], "no swap under way")
        http.post("/reload", json={"model": "policy", "version": "1"}).raise_for_status()
    done = subprocess.run(
        [sys.executable, "-c", source], env=rooms.environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "COMPLETED" in done.stdout


def test_a_model_that_you_have(tmp_path: Path) -> None:
    serve, bench = commands("A model that you have", ".venv/bin/interlock")
    (look,) = commands("A model that you have", "curl")
    (tmp_path / "digits.onnx").write_bytes(onnx_models.mlp((64, 16, 10)))
    http, *others = free_ports(5)
    names = ("INFERENCE", "INFERENCE_METRICS", "CONTROLLER", "TRAINER")
    ports = {"INTERLOCK_GATEWAY_PORT": str(http)}
    ports |= {f"INTERLOCK_{name}_PORT": str(port) for name, port in zip(names, others, strict=True)}
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, PATHS)),
        "INTERLOCK_HOME": str(tmp_path),
        **ports,
    }
    interlock = [sys.executable, "-m", "interlock.cli"]
    server = subprocess.Popen(
        [*interlock, *shlex.split(serve)[1:]], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL
    )
    try:
        url = shlex.split(look)[-1].replace(":8000", f":{http}")
        until(lambda: ready(f"http://{url}/ready"), "the model serves")
        assert httpx.get(f"http://{url}").json()["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 64]}]
    finally:
        server.terminate()
        assert server.wait(30) == 0
    quick = ["--rounds", "1", "--seconds", "0.05", "--batch", "1"]
    done = subprocess.run(
        [*interlock, *shlex.split(bench)[1:], *quick],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines()[1:]] == ["raw", "gRPC", "gRPC", "HTTP", "HTTP"]


def ready(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url).status_code == 200
    return False


def test_the_two_commands_are_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"\n    make {target} " in README
        assert re.search(rf"^{target}: install", makefile, re.MULTILINE)


def test_links_lead_somewhere() -> None:
    for page in [
        ROOT / "README.md",
        *(ROOT / "docs").rglob("*.md"),
        *ROOT.glob("*/README.md"),
        *ROOT.glob("services/*/README.md"),
    ]:
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.relative_to(ROOT)}: {link}"
