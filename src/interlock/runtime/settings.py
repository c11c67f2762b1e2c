"""Settings of all rooms: one `interlock.toml`, environment variables `INTERLOCK_*` on top, unknown names refused.

A nested field is reached by its room: `[inference] port = 8001` in the file is `INTERLOCK_INFERENCE_PORT` in the environment. Every
process reads the whole of it, so that rooms know each other's addresses from one source.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from interlock.runtime.fields import Field, Group

if TYPE_CHECKING:
    from interlock.stores.remote import RemoteOptions

PREFIX = "INTERLOCK_"
OTHER_NAMES = frozenset({"INTERLOCK_CONFIG", "INTERLOCK_API_KEY", "INTERLOCK_FAILPOINT", "INTERLOCK_SIM_SEEDS"})
"""Variables that are read elsewhere: the file's place, the command line's key, fault injection, the simulator's test volume."""
REPLICA_PORTS = 10
"""From one replica's ports to the next one's."""


class InferenceSettings(Group):
    """One replica, and how many of them `interlock up` runs on this machine."""

    replicas: int = Field(
        1,
        ge=1,
        le=64,
        description="inference processes that `interlock up` runs; the second has port + 10 and metrics_port + 10, the third + 20 ...",
    )
    port: int = Field(8001, ge=0, le=65535, description="gRPC port; 0 takes a free one")
    metrics_port: int = Field(9101, ge=0, le=65535, description="HTTP port of /metrics and /health; 0 takes a free one")
    warmup_iterations: int = Field(
        5, ge=1, le=1000, description="warm-up inferences before a version may serve"
    )  # seeds 000, 001
    drain_seconds: float = Field(30.0, gt=0, description="time for requests in flight to finish")  # seed 000
    intra_op_threads: int = Field(1, ge=1, le=256, description="threads inside one inference of one version")
    max_intra_op_threads: int = Field(
        0,
        ge=0,
        le=256,
        description="most threads that a version's model.toml may ask for; 0: as many as there are cores",
    )
    providers: list[str] = Field(
        default_factory=lambda: ["auto"],
        description="execution providers, best first; auto: TensorRT, CUDA, CPU, those that work here",
    )
    torch_modules: list[str] = Field(
        default_factory=list,
        description="code that a version may name as its module: package.module:Factory, or package.module for the modules it defines",
    )
    max_message_mb: int = Field(64, ge=1, le=1024, description="largest request, in MiB")
    recorded_requests: int = Field(
        64, ge=0, le=4096, description="recent requests kept per model for warm-up and comparison"
    )
    try_loads: bool = Field(
        True, description="while something serves, a child process loads and runs a candidate before this one does"
    )
    isolate_mb: int = Field(
        64, ge=0, description="a version whose files have this many MiB stays in a process of its own; 0: never"
    )
    load_timeout_seconds: float = Field(300.0, gt=0, description="longest time that a child may take to load a version")
    load_attempts: int = Field(
        3,
        ge=1,
        le=10,
        description="tries of a load that fails for a reason that may pass (memory, a remote store, a time-out)",
    )
    load_p99_factor: float = Field(
        2.0, ge=0, description="a load is paused while p99 is above this many times the p99 before it; 0: never"
    )
    load_p99_floor_ms: float = Field(10.0, ge=0, description="a p99 below this never pauses a load")
    load_pause_max_seconds: float = Field(30.0, ge=0, description="all pauses of one load together")
    load_when_starved: Literal["go_on", "give_up"] = Field(
        "go_on", description="what a load does when its pauses are used up"
    )
    memory_limit_mb: int = Field(0, ge=0, description="memory of this replica and its children, in MiB; 0: no limit")
    memory_reserve_mb: int = Field(128, ge=0, description="memory that a load must leave free, in MiB")

    listen: bool = Field(True, description="the gRPC listener; the inline form can do without one")
    repository: str = Field(
        "", description="a folder <model>/<version>/ to serve from without a controller; empty: a controller decides"
    )
    repository_mode: Literal["watch", "explicit"] = Field(
        "watch", description="watch: the newest version of each model; explicit: what RepositoryModelLoad asks for"
    )
    repository_poll_seconds: float = Field(1.0, gt=0, description="time between two looks at the folder")
    repository_settle_seconds: float = Field(
        1.0, ge=0, description="a version whose files changed more recently is left alone"
    )
    models: dict[str, str] = Field(
        default_factory=dict, description="models to serve without a controller, by name: an ONNX file or a folder"
    )

    @property
    def standalone(self) -> bool:
        """True when a folder, not a controller, decides what is served."""
        return bool(self.repository or self.models)


class ArtifactSettings(Group):
    """Artifacts that lie elsewhere. Credentials come from AWS's own chain: environment, profile, role."""

    s3_endpoint: str = Field("", description="of a store that speaks S3; empty: AWS")
    s3_region: str = Field("", description="its region; empty: what AWS_REGION or the profile says")
    cache_gb: float = Field(20.0, gt=0, description="what each process keeps of fetched artifacts, in GiB")
    fetch_mb_per_second: float = Field(0.0, ge=0, description="speed limit of a fetch in MiB/s; 0: none")
    timeout_seconds: float = Field(20.0, gt=0, description="to connect to the store, and to wait for its next piece")

    def remote(self) -> RemoteOptions:
        """The same in bytes."""
        from interlock.stores.remote import RemoteOptions

        return RemoteOptions(
            self.s3_endpoint,
            self.s3_region,
            int(self.cache_gb * 2**30),
            int(self.fetch_mb_per_second * 2**20),
            self.timeout_seconds,
        )


class TrainerSettings(Group):
    """The trainer service."""

    port: int = Field(8002, ge=0, le=65535, description="gRPC port; 0 takes a free one")
    metrics_port: int = Field(9102, ge=0, le=65535, description="HTTP port of /metrics and /health; 0 takes a free one")
    decision_timeout_seconds: float = Field(
        2.0, gt=0, description="wait for the controller's rollback decision before acting alone"
    )
    child_threads: int = Field(1, ge=1, le=256, description="torch threads of a run's process")


class ControllerSettings(Group):
    """The controller."""

    port: int = Field(8003, ge=0, le=65535, description="gRPC port; 0 takes a free one")
    metrics_port: int = Field(9103, ge=0, le=65535, description="HTTP port of /metrics and /health; 0 takes a free one")
    replicas: list[str] = Field(
        default_factory=list, description="gRPC addresses of the replicas; empty: those that `interlock up` runs here"
    )
    tick_seconds: float = Field(0.5, gt=0, description="longest time between two looks at the world")


class GatewaySettings(Group):
    """The HTTP gateway."""

    inline: bool = Field(False, description="a replica in the gateway's own process, asked without a hop")
    port: int = Field(8000, ge=0, le=65535, description="HTTP port; 0 takes a free one")
    max_body_mb: int = Field(20, ge=1, le=1024, description="largest request body, in MiB")  # seed 004, MAX_UPLOAD_MB
    max_upload_mb: int = Field(
        20, ge=1, le=1024, description="largest uploaded image, in MiB"
    )  # seed 004, MAX_UPLOAD_MB
    max_batch_mb: int = Field(60, ge=1, le=1024, description="largest body of /batch, in MiB")
    max_batch_files: int = Field(64, ge=1, le=1024, description="most images of one /batch")
    predict_timeout_seconds: float = Field(
        30.0, gt=0, description="deadline of a prediction when the caller names none"
    )
    receive_timeout_seconds: float = Field(
        30.0, gt=0, description="the longest that a request may take to come in; then 408"
    )
    cors_origins: list[str] = Field(default_factory=list, description="origins a browser may call from")
    default_model: str = Field(
        "", description="model of /predict and /version when the request names none; empty: the only one"
    )


class Settings(Group):
    """Everything that can be configured."""

    home: Path = Field(Path(".interlock"), description="state folder: databases, runs, models, logs, keys")
    host: str = Field("127.0.0.1", description="address every room listens on")
    insecure: bool = Field(False, description="listen beyond loopback without keys; says so in every start")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "console"] = "json"
    otlp_endpoint: str = Field(
        "", description="OTLP/gRPC receiver of traces, e.g. http://127.0.0.1:4317; empty: traces are off"
    )
    probe_interval_seconds: float = Field(
        0.5, ge=0, description="time between NOT_SERVING and closing the port at shutdown"
    )
    inference: InferenceSettings = InferenceSettings()
    artifacts: ArtifactSettings = ArtifactSettings()
    trainer: TrainerSettings = TrainerSettings()
    controller: ControllerSettings = ControllerSettings()
    gateway: GatewaySettings = GatewaySettings()

    @property
    def inference_address(self) -> str:
        """Where the first replica of this machine is found."""
        return self.inference_addresses[0]

    @property
    def inference_addresses(self) -> list[str]:
        """Where the replicas of this machine are found."""
        own = self.inference
        return [f"{_reachable(self.host)}:{own.port + REPLICA_PORTS * number}" for number in range(own.replicas)]

    @property
    def replica_addresses(self) -> list[str]:
        """All replicas, here or elsewhere: what the controller commands and the gateway spreads over."""
        return self.controller.replicas or self.inference_addresses

    @property
    def trainer_address(self) -> str:
        """Where the controller, the gateway and loops find the trainer."""
        return f"{_reachable(self.host)}:{self.trainer.port}"

    @property
    def controller_address(self) -> str:
        """Where everybody finds the controller."""
        return f"{_reachable(self.host)}:{self.controller.port}"

    @property
    def keys_path(self) -> Path:
        """The file of API keys; keys are required when it exists."""
        return self.home / "keys.toml"


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)  # noqa: S104  a wildcard is not an address to call


def config_path() -> Path:
    """The configuration file: `INTERLOCK_CONFIG`, or `interlock.toml` in the working folder."""
    return Path(os.environ.get("INTERLOCK_CONFIG", "interlock.toml"))


def is_loopback(host: str) -> bool:
    """True when `host` can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _variables() -> dict[str, tuple[str, ...]]:
    """Environment variable -> the setting's place."""
    found: dict[str, tuple[str, ...]] = {}
    for name, kind in Settings.types.items():
        inner = kind.fields if isinstance(kind, type) and issubclass(kind, Group) else {}
        places: list[tuple[str, ...]] = [(name, each) for each in inner] or [(name,)]
        for place in places:
            found[f"{PREFIX}{'_'.join(place)}".upper()] = place
    return found


def _environment() -> dict[str, Any]:
    """What the environment says. Raises ValueError for a name that is not a setting's."""
    variables, said = _variables(), dict[str, Any]()
    for name in sorted(os.environ):
        if name in variables:
            *group, last = variables[name]
            (said.setdefault(group[0], {}) if group else said)[last] = os.environ[name]
        elif name.startswith(PREFIX) and name not in OTHER_NAMES:
            close = difflib.get_close_matches(name, {*variables, *OTHER_NAMES}, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"environment variable {name} is not a setting{hint} (`interlock config` lists all)")
    return said


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two sources as one: the upper wins, field by field of a group."""
    merged = dict(below)
    for name, value in above.items():
        under = merged.get(name)
        if isinstance(under, Mapping) and isinstance(value, Mapping):
            merged[name] = {**under, **value}
        else:
            merged[name] = value
    return merged


def load(**overrides: Any) -> Settings:
    """Reads file and environment; arguments win over the environment, the environment over the file.

    Raises:
        ValueError: one line per mistake, each naming the setting.
    """
    said, path = _environment(), config_path()
    if "INTERLOCK_CONFIG" in os.environ and not path.is_file():
        raise ValueError(f"INTERLOCK_CONFIG names {path}, which is not a file")
    try:
        written = tomllib.loads(path.read_text()) if path.is_file() else {}
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not TOML: {error}") from None
    try:
        return Settings(**_over(_over(written, said), overrides))
    except ValueError as error:
        raise ValueError(f"invalid settings: {error}") from None


def refuse_exposed(settings: Settings) -> None:
    """Refuses an address beyond loopback without keys, unless `insecure` says so.

    Raises:
        ValueError: with what to do.
    """
    if not is_loopback(settings.host) and not settings.keys_path.exists() and not settings.insecure:
        raise ValueError(
            f"host {settings.host} can be reached from other machines and there are no API keys: create one with "
            "`interlock keys create --scope admin --name NAME`, or set insecure = true to accept anybody"
        )
