"""Our own entries: a replica's gRPC listener, the gateway before a replica, and both in one process. Metrics are on, as they always are."""

from __future__ import annotations

import subprocess
import sys

from contestants import Contestant

_ROOM = {
    "INTERLOCK_HOME": "{home}",
    "INTERLOCK_INFERENCE_REPOSITORY": "{repository}",
    "INTERLOCK_INFERENCE_REPOSITORY_SETTLE_SECONDS": "0",  # nobody writes there meanwhile
    "INTERLOCK_INFERENCE_PORT": "{grpc}",
    "INTERLOCK_INFERENCE_METRICS_PORT": "{port0}",
    "INTERLOCK_GATEWAY_PORT": "{http}",
    "INTERLOCK_CONTROLLER_PORT": "{port1}",
    "INTERLOCK_TRAINER_PORT": "{port2}",
}

OURS = (
    Contestant("Interlock, replica", ("grpc",), command=("-m", "interlock_inference"), environment=_ROOM),
    Contestant(
        "Interlock, inline",
        ("grpc", "http"),
        command=("-m", "interlock_gateway"),
        environment=_ROOM | {"INTERLOCK_GATEWAY_INLINE": "true"},
    ),
    Contestant("Interlock, gateway and replica", ("http",), command=(__file__,), environment=_ROOM),
)


def main() -> None:
    """The gateway before a replica, as one tree of processes that ends together."""
    rooms = [
        subprocess.Popen([sys.executable, "-m", module]) for module in ("interlock_inference", "interlock_gateway")
    ]
    try:
        rooms[0].wait()
    finally:
        for room in rooms:
            room.terminate()


if __name__ == "__main__":
    main()
