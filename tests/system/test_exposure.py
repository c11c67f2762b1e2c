"""What can be reached from outside, in every start mode: nothing beyond loopback, unless asked for with keys (issue: exposed by default)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from rooms import environment, running, until

pytestmark = [pytest.mark.system]
ROOMS = ("inference", "trainer", "controller", "gateway")


def listening(pids: list[int]) -> dict[str, int]:
    """Addresses that any of the processes listens on, TCP and UDP, with the port."""
    found = {}
    for pid in pids:
        for connection in psutil.Process(pid).net_connections(kind="inet"):
            if connection.status == psutil.CONN_LISTEN or (
                connection.type == 2 and connection.laddr and not connection.raddr
            ):
                found[f"{connection.laddr.ip.removeprefix('::ffff:')}:{connection.laddr.port}"] = connection.laddr.port
    return found


def test_up_listens_on_loopback_only(tmp_path: Path) -> None:
    with running(tmp_path / "home") as rooms:
        found = listening(rooms.pids())
        expected = {
            rooms.port(name)
            for name in (
                "INFERENCE",
                "INFERENCE_METRICS",
                "TRAINER",
                "TRAINER_METRICS",
                "CONTROLLER",
                "CONTROLLER_METRICS",
                "GATEWAY",
            )
        }
        assert set(found.values()) == expected
        assert all(address.startswith("127.0.0.1:") for address in found), found


@pytest.mark.parametrize("room", ROOMS)
def test_one_room_alone_listens_on_loopback_only(tmp_path: Path, room: str) -> None:
    env = environment(tmp_path / "home")
    process = subprocess.Popen(
        [sys.executable, "-m", "interlock.cli", "serve", room],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        found = until(lambda: listening([process.pid]), f"{room} listens")
        assert all(address.startswith("127.0.0.1:") for address in found), found
    finally:
        process.terminate()
        process.communicate(timeout=30)


@pytest.mark.parametrize("room", ROOMS)
def test_a_wider_address_without_keys_is_refused(tmp_path: Path, room: str) -> None:
    for command in (["serve", room], ["up"]):
        done = subprocess.run(
            [sys.executable, "-m", "interlock.cli", *command, "--host", "0.0.0.0"],
            env=environment(tmp_path / "home"),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 2
        assert "there are no API keys" in done.stderr
        assert "interlock keys create" in done.stderr


def test_with_keys_a_wider_address_is_taken_and_admin_verbs_need_one(tmp_path: Path) -> None:
    home = tmp_path / "home"
    made = subprocess.run(
        [sys.executable, "-m", "interlock.cli", "keys", "create", "--name", "ops", "--scope", "admin"],
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert made.returncode == 0, made.stderr
    key = made.stdout.strip()
    assert key not in (home / "keys.toml").read_text()
    with running(home, "--host", "0.0.0.0") as rooms, rooms.http() as http:
        refused = http.post("/reload", json={"model_path": "/nothing"})
        assert (refused.status_code, refused.json()["reason"]) == (401, "API_KEY_MISSING")
        allowed = http.get("/models", headers={"x-api-key": key})
        assert allowed.status_code == 200
        assert key not in "".join(rooms.log(room) for room in ROOMS)


def test_unknown_settings_are_refused_by_name(tmp_path: Path) -> None:
    env = environment(tmp_path / "home") | {"INTERLOCK_GATEWAY_PROT": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "interlock.cli", "up"], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "INTERLOCK_GATEWAY_PROT is not a setting; did you mean INTERLOCK_GATEWAY_PORT?" in done.stderr


def test_an_unknown_key_in_the_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "interlock.toml"
    path.write_text("[gateway]\nprot = 1\n")
    env = environment(tmp_path / "home") | {"INTERLOCK_CONFIG": str(path)}
    done = subprocess.run(
        [sys.executable, "-m", "interlock.cli", "serve", "gateway"], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "gateway.prot" in done.stderr
